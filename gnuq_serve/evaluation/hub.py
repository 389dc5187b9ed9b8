"""Question sets from a hub, by the library ``datasets``: data files alone, no code of the set's, no pickle."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gnuq_serve.calibration.command import check_packages
from gnuq_serve.calibration.progress import say
from gnuq_serve.calibration.row_reader import DataError, Record
from gnuq_serve.evaluation.hub_rows import COLUMNS, RULES, has_answer, in_our_fields

PREFIX = "hub:"
FORM = "hub:OWNER/NAME[/CONFIG][@SPLIT][:TASK]"
_NAME = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<config>[^/@:]+))?(?:@(?P<split>\w+(?:\.\w+)*))?")
# `cache`: Arrow files that the library made of such data earlier, read where the hub can't be reached.
_FORMATS = ("parquet", "json", "csv", "cache")
_DEFAULT_SPLITS = ("test", "validation", "train")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSet:
    """One split.

    Attributes:
        name: ``OWNER/NAME[/CONFIG]@SPLIT``.
        rows: in the fields of our files; a row's line is its index + 1.
        unfit: how many rows have none of the shapes of `RULES`.
    """

    name: str
    rows: list[Record]
    unfit: int


def read_hub(name: str) -> HubSet:
    """Read one split of a data set; which one, where none is named, is said on stderr.

    Args:
        name: as `FORM`, without a task. The default split is the first of test, validation and train in which a
            row names its answer.

    Raises:
        DataError: the hub can't be reached, there is no such set, config or split, its files are of another
            format than Parquet, JSON and CSV, or no row is a question with an answer.
        ImportError: ``datasets`` is not installed.
    """
    if (parts := _NAME.fullmatch(name)) is None:
        raise DataError(f"{name}: not of the form {FORM}")
    check_packages(["datasets"], "hub")
    repo, config, split = parts["repo"], parts["config"], parts["split"]
    with _as_data_error(f"{PREFIX}{repo}"):
        builder = _builder(repo, config)
        # Before anything is downloaded; the cache names its splits elsewhere.
        there = [str(one) for one in builder.config.data_files or builder.info.splits or ()]
        candidates = _candidates(name, split, there)
        builder.download_and_prepare()
    full = repo if builder.config.name == "default" else f"{repo}/{builder.config.name}"
    passed_over: list[str] = []
    for one in candidates:
        with _as_data_error(f"{PREFIX}{full}@{one}"):
            found = _read(f"{full}@{one}", builder.as_dataset(split=one))
        if any(has_answer(row.row) for row in found.rows):
            if split is None:
                why = f" ({', '.join(passed_over)}: no answers)" if passed_over else ""
                say(f"{PREFIX}{full}: split {one}{why}")
            return found
        passed_over.append(one)
    raise DataError(
        f"{PREFIX}{full}: no row of the split {', '.join(passed_over)} names its answer (many test splits keep "
        f"them back); splits there are: {', '.join(there)}"
    )


def _builder(repo: str, config: str | None) -> Any:
    from datasets import get_dataset_config_names, load_dataset_builder

    try:
        builder = load_dataset_builder(repo, config)
    except ValueError as error:
        configs = get_dataset_config_names(repo)
        if configs == ["default"] or config in configs:  # something else; or the cache, which names its own
            raise
        wrong = f"no config {config!r}" if config else "several configs, and --data names none"
        raise DataError(
            f"{PREFIX}{repo}: {wrong}; name one as {PREFIX}{repo}/CONFIG: {', '.join(configs)}"
        ) from error
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in _FORMATS:
        raise DataError(
            f"{PREFIX}{repo}: its files are of the kind {kind!r}; only Parquet, JSON and CSV are read"
        )
    return builder


def _candidates(name: str, split: str | None, there: Sequence[str]) -> list[str]:
    if split is None:
        some = [one for one in _DEFAULT_SPLITS if one in there] or (list(there) if len(there) == 1 else [])
    else:
        some = [split] if split in there else []
    if not some:
        wrong = f"no split {split!r}" if split else f"no split {' or '.join(_DEFAULT_SPLITS)}; name one with @"
        raise DataError(f"{name}: {wrong}; there are: {', '.join(there)}")
    return some


def _read(name: str, dataset: Any) -> HubSet:
    # Passages, images and the like are never decoded.
    columns = [column for column in dataset.column_names if column in COLUMNS]
    rows = enumerate(map(in_our_fields, dataset.select_columns(columns)), start=1) if columns else ()
    path = Path(f"{PREFIX}{name}")
    records = [Record(path, line, row) for line, row in rows if row is not None]
    if not records:
        raise DataError(
            f"{path}: none of its {len(dataset)} rows fits; its columns: {', '.join(dataset.column_names)}; "
            f"wanted: question, and one of: {'; '.join(RULES)}"
        )
    return HubSet(name=name, rows=records, unfit=len(dataset) - len(records))


@contextmanager
def _as_data_error(what: str) -> Iterator[None]:
    """Whatever the library raises (its own errors, three HTTP libraries', Arrow's) is about the set named."""
    try:
        yield
    except DataError:
        raise
    except ConnectionError as error:
        raise DataError(
            f"{what}: the hub can't be reached, and the set is not in the cache ({_one_line(error)}); "
            "check HF_HUB_OFFLINE, or put its files into a folder and name that"
        ) from error
    except Exception as error:
        raise DataError(f"{what}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
