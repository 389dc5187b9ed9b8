"""What we log: one line for each answer, and what becomes of the scorer. Numbers and reasons, never text."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from gnuq_serve.service.seeing.observation import Observation, Observer
from gnuq_serve.service.seeing.telemetry import attributes

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

_ROOT = "gnuq_serve"
_FIELDS = "gnuq_fields"  # of a log record: a mapping that a formatter puts beside the message

answers_logger = logging.getLogger(f"{_ROOT}.answers")


def configure_logging(level: LogLevel, log_format: LogFormat) -> None:
    """Send our log to standard error, unless somebody has said already where it goes.

    vLLM sets up the logger ``vllm`` alone: without this, what we say at ``info`` would be lost. A logging
    configuration of the operator's own (``VLLM_LOGGING_CONFIG_PATH``) that has handlers for ``gnuq_serve`` or for
    the root logger is left as it is.
    """
    logger = logging.getLogger(_ROOT)
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False


def answer_observer(level: int) -> Observer:
    """An observer that logs one line for each result.

    Args:
        level: of these lines, such as ``logging.INFO``.
    """

    def observe(observation: Observation) -> None:
        if answers_logger.isEnabledFor(level):
            fields = {name.removeprefix("gnuq."): value for name, value in attributes(observation).items()}
            answers_logger.log(level, "answer %s", fields["status"], extra={_FIELDS: fields})

    return observe


class TextFormatter(logging.Formatter):
    """``LEVEL time [logger] message name=value …``."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(asctime)s [%(name)s] %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The line without a traceback."""
        fields: Mapping[str, Any] = getattr(record, _FIELDS, {})
        # As JSON: a value stays one word or one quoted string, whatever it holds.
        return " ".join(
            [super().formatMessage(record), *(f"{name}={json.dumps(value)}" for name, value in fields.items())]
        )


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (UTC), ``level``, ``logger``, ``message``, and the fields of an answer."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; a traceback stands in ``exception``."""
        time = datetime.fromtimestamp(record.created, UTC)
        line = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
