"""The operator's settings: a YAML file named in ``GNUQ_CONFIG``."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from gnuq_serve.uncertainty import Mode

CONFIG_VARIABLE = "GNUQ_CONFIG"


class SettingsError(ValueError):
    """The settings file can't be used; the message names the key and the remedy."""


class Settings(BaseModel):
    """Settings of the scoring service."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scorer_model: str | None = Field(
        None, description="Checkpoint to score with; the served model by default. Same vocabulary required."
    )
    scorer_dtype: str = Field("auto", description="Dtype of the scorer's weights; auto: as served.")
    scorer_device: str = Field("auto", description="Device of the scorer, such as cpu or cuda:1.")
    scorer_threads: int = Field(1, ge=1, description="CPU threads of the scorer process.")
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
        256, ge=1, description="Answers that may wait for a score at a time, for each API server process."
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


def load_settings(path: str | None = None) -> Settings:
    """Read the settings file; defaults where none is named.

    Args:
        path: YAML file; None: the one named in the environment variable ``GNUQ_CONFIG``, if any.

    Raises:
        SettingsError: no such file, not a mapping, an unknown key, or a value out of range.
    """
    path = path or os.environ.get(CONFIG_VARIABLE)
    if not path:
        return Settings.model_validate({})
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{CONFIG_VARIABLE}={path}: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict | None):
        raise SettingsError(
            f"{CONFIG_VARIABLE}={path}: expected a mapping of settings, found {type(data).__name__}"
        )
    try:
        return Settings.model_validate(data or {})
    except ValidationError as error:
        raise SettingsError(f"{CONFIG_VARIABLE}={path}: " + "; ".join(map(_explain, error.errors()))) from error


def _explain(problem: ErrorDetails) -> str:
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] != "extra_forbidden":
        return f"{key}: {problem['msg']}"
    near = difflib.get_close_matches(key, Settings.model_fields, n=1)
    return f"unknown key {key!r}" + (
        f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(Settings.model_fields)}"
    )
