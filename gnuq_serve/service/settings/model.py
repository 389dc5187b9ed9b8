"""The operator's settings. `sources` says where they may be given."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from gnuq_serve.service.settings.contradictions import contradiction
from gnuq_serve.service.settings.sources import (
    SettingsError,
    combine,
    from_environment,
    from_file,
    from_flags,
)
from gnuq_serve.uncertainty import Mode

CONFIG_VARIABLE = "GNUQ_CONFIG"

__all__ = ["CONFIG_VARIABLE", "Settings", "SettingsError", "check_paths", "load_settings"]


class Settings(BaseModel):
    """Settings of the scoring service."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scorer_model: str | None = Field(
        None, description="Checkpoint to score with; the served model by default. Same vocabulary required."
    )
    scorer_weights: Literal["auto", "shared", "checkpoint"] = Field(
        "auto",
        description="Where the scorer's weights come from: a checkpoint of its own, or vLLM's tensors (shared: "
        "no second copy, but some CPUs' engine makes a third fewer tokens a second under load). auto on a GPU: "
        "vLLM's tensors, or a copy where that can't be; the health route says why. auto on a CPU: a checkpoint, "
        "mapped; where its dtype is not the scorer's, from a converted file that is written once to the cache "
        "(GNUQ_CACHE). checkpoint: as it is, without such a file, and a GPU's engine leaves room for a copy.",
    )
    scorer_dtype: str = Field("auto", description="Dtype of the scorer's weights; auto: as served.")
    scorer_device: str = Field("auto", description="Device of the scorer, such as cpu or cuda:1.")
    scorer_device_map: str | None = Field(
        None,
        description="Instead of scorer_device: how the scorer's checkpoint is split over several GPUs, such as "
        "balanced, as transformers takes it.",
    )
    scorer_threads: int = Field(1, ge=1, description="CPU threads of the scorer process.")
    scorer_gpu_memory_fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Largest share of a GPU's memory that the scorer process may take, weights and passes; by "
        "default as much as is free. What is over it is skipped or split, never taken from the engine.",
    )
    scorer_adapters: int = Field(
        8,
        ge=0,
        description="LoRA adapters that the scorer keeps loaded beside the model, those used last; 0: answers of "
        "adapters are skipped.",
    )
    scorer_start_timeout_seconds: float = Field(
        900.0, gt=0, description="A scorer that is not ready after this time is killed and started again."
    )
    stuck_scorer_seconds: float = Field(
        30.0,
        ge=5,
        description="A scorer that gives no sign of life for this time is killed and started again; it does give "
        "them during a long pass.",
    )
    max_batch_seconds: float = Field(
        600.0, gt=0, description="Longest that the scorer may take for one batch; over it, it is killed too."
    )
    yield_to_engine: bool = Field(
        False,
        description="The scorer starts no batch while requests wait in the engine. An answer whose deadline "
        "comes meanwhile is skipped.",
    )
    mode: Mode = Field(
        "exact",
        description="How answers are scored unless a request says otherwise: exact, or answer_only (the prompt's "
        "keys and values are constants: cheaper on long prompts, another number).",
    )
    max_trace_tokens: int = Field(
        256, ge=0, description="Longest answer whose tokens are scored one by one on request; 0 forbids it."
    )
    allow_semantic: bool = Field(True, description="Clients may ask for SemGrad and its relatives.")
    max_batch_tokens: int = Field(2048, ge=1, description="Padded positions in one gradient pass.")
    memory_budget: str | None = Field(
        None,
        description="Memory of a gradient pass beyond the weights, such as 2GiB; by default half of what is "
        "free, on a CPU 2 GiB at most.",
    )
    deadline_seconds: float = Field(30.0, gt=0, description="Longest that an answer waits for its score.")
    background_deadline_seconds: float = Field(
        300.0, gt=0, description="Longest that a score with `wait: false` may take."
    )
    max_queue: int = Field(
        256, ge=1, description="Answers that may wait for a score at a time, of all API server processes."
    )
    on_overload: Literal["skip", "wait"] = Field(
        "skip",
        description="When the queue is full: skip the score, or wait for a place until the deadline.",
    )
    max_score_tokens: int = Field(
        8192, ge=2, description="Longest prompt and answer together that is scored; longer ones are skipped."
    )
    keep_results: int = Field(10_000, ge=0, description="How many results GET /v1/uncertainty/{id} knows.")
    keep_results_seconds: float = Field(86_400.0, gt=0, description="How long it knows them.")
    results_path: str | None = Field(
        None, description="SQLite file of the results; by default one for each server in a folder of its user."
    )
    mirror_in_logprobs: bool = Field(
        True, description="Put the object into choices[i].logprobs too, where stock OpenAI clients keep it."
    )

    # Decisions: what a score means.
    calibrations: dict[str, str] = Field(
        {},
        description="Files of `gnuq-serve calibrate` by name, such as {faq: faq.json}; they give p_correct and a "
        "decision. A request names one as uncertainty.calibration.",
    )
    default_calibration: str | None = Field(
        None, description="Which one where neither the request nor its API key says; the only one by default."
    )
    calibration_by_key: dict[str, str] = Field(
        {},
        description="SHA-256 of an API key in hexadecimal, and the calibration for requests that come with it.",
    )
    max_error: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of errors among answers that decisions keep to, such as 0.1; by default the first "
        "level of each calibration.",
    )
    policy: dict[str, Any] | str | None = Field(
        None,
        description="More than answer or abstain: thresholds by hand ({answer: 0.8, escalate: 0.5, otherwise: "
        "human}), without `answer` the calibration's own; or a YAML file with them.",
    )

    # Gating: answers that are held back.
    on_uncertain: Literal["pass", "abstain"] = Field(
        "pass",
        description="An answer whose decision is another than `answer`: pass it on, or put abstain_text in its "
        "place.",
    )
    on_failure: Literal["open", "closed"] = Field(
        "open",
        description="An answer without a score (with on_uncertain: abstain, without a decision): pass it on "
        "(open), or put abstain_text in its place (closed).",
    )
    unscored_routes: Literal["pass", "block"] | None = Field(
        None,
        description="Routes that answer without a score, such as /v1/responses: pass them on, or refuse them. By "
        "default they are refused where answers are held back.",
    )
    silent_routes: list[str] = Field(
        [],
        description="Paths of further routes, of plugins say, that give no answer of the model: never refused.",
    )
    abstain_text: str = Field(
        "I am not sure enough to answer this.", min_length=1, description="What stands in an answer's place."
    )
    allow_opt_out: bool = Field(True, description='Clients may ask for no score ("uncertainty": false).')
    score_by_default: bool = Field(True, description="Requests that do not mention uncertainty are scored.")
    max_exact_tokens: int | None = Field(
        None,
        ge=2,
        description="Longest prompt and answer together that is scored in mode exact; longer ones are scored in "
        "mode answer_only, with a warning.",
    )

    max_body_bytes: int = Field(
        64 * 2**20,
        ge=1,
        description="Longest request to the routes that are read here: chat, completions, our own. 413 beyond.",
    )

    # What is logged.
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="From which level on we log, to standard error; a logging configuration of your own for "
        "`gnuq_serve` goes first.",
    )
    log_format: Literal["text", "json"] = Field("text", description="Lines of our log: text, or JSON objects.")
    log_answers: Literal["debug", "info"] = Field(
        "debug", description="Level of the one line for each answer: its numbers, or the reason; never text."
    )

    # Rolling out, and audits.
    score_fraction: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the requests that are scored, drawn at random; the others are skipped. Below 1 "
        "nothing can be gated.",
    )
    operator_key: SecretStr | None = Field(
        None,
        description="Key of the operator's routes (switch, reload, feedback), sent as X-Gnuq-Operator-Key; "
        "without it they are off. At least 16 characters; give it as a variable, since other users of the "
        "machine can read flags.",
    )
    score_log: str | None = Field(
        None, description="File that takes one JSON line for each scored answer; `calibrate` reads it."
    )
    log_text: bool = Field(False, description="The text of question and answer goes into the log of scores too.")
    audit_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the scored answers that are marked for labelling, drawn at random; the promise is "
        "tested with these labels.",
    )
    labels_path: str | None = Field(
        None, description="SQLite file of the labels; by default beside score_log, ending in .labels.sqlite."
    )
    drift_window: int = Field(
        200, ge=20, description="Live scores in one comparison with the calibration's, every half window."
    )
    drift_alpha: float = Field(
        0.001,
        gt=0,
        lt=1,
        description="Level of one comparison: the chance of an alarm where nothing has changed.",
    )

    @field_validator("operator_key")
    @classmethod
    def _long_enough(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None and len(key.get_secret_value()) < 16:
            raise ValueError("is too short: at least 16 characters, such as those of `openssl rand -hex 16`")
        return key

    @property
    def labels_file(self) -> Path | None:
        """Where labels are kept; None: nowhere."""
        if self.labels_path is not None:
            return Path(self.labels_path)
        return None if self.score_log is None else Path(f"{self.score_log}.labels.sqlite")

    @property
    def gates(self) -> bool:
        """Some answers are held back."""
        return self.on_uncertain == "abstain" or self.on_failure == "closed"

    @property
    def blocks_unscored_routes(self) -> bool:
        """Routes that answer without a score are refused."""
        return self.gates if self.unscored_routes is None else self.unscored_routes == "block"

    @model_validator(mode="after")
    def _together(self) -> Self:
        if (problem := contradiction(self)) is not None:
            raise ValueError(problem)
        return self


def load_settings(path: str | None = None, flags: Mapping[str, str] | None = None) -> Settings:
    """The settings from flags, environment and file, in this order; defaults where nothing is said.

    Args:
        path: YAML file; None: the one named in the environment variable ``GNUQ_CONFIG``, if any.
        flags: texts by name (`sources.flags_of`).

    Raises:
        SettingsError: the file can't be used, a key, variable or flag is unknown, or a value is out of range; it
            names the place.
    """
    named_by = CONFIG_VARIABLE if path is None else "--gnuq-config"
    path = path or os.environ.get(CONFIG_VARIABLE)
    return combine(
        Settings,
        from_file(path, named_by) if path else {},
        from_environment(Settings, os.environ),
        from_flags(Settings, flags or {}),
    )


def check_paths(settings: Settings) -> None:
    """Say at the start that a file can't be written, not with the first answer.

    Raises:
        SettingsError: the folder of a file is not there.
    """
    for name in ("score_log", "labels_path"):
        path = getattr(settings, name)
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise SettingsError(f"{name}={path}: there is no folder {Path(path).parent}")
