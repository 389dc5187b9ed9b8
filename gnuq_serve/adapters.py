"""Scorers of one base model with this or that LoRA adapter, which share its weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any, get_args

from gnuq_serve.errors import first_line
from gnuq_serve.scorer import Scorer
from gnuq_serve.uncertainty import Mode
from gnuq_serve.weights.fingerprint import add_tensors

# Entries of an adapter's configuration that say where it came from, not what it computes.
_NO_INFLUENCE = ("base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type")


class AdapterError(ValueError):
    """An adapter that can't be scored; the message says why."""


class AdapterScorers:
    """Loads adapters as they are asked for, and keeps those used last.

    One model is used for all: ask for a scorer again before each call of it, which switches the model.
    """

    def __init__(self, base: Scorer, *, keep: int = 8, **settings: Any) -> None:
        """Nothing is loaded yet.

        Args:
            base: scores without an adapter.
            keep: how many adapters stay in memory.
            settings: of their scorers, as in ``Scorer``.
        """
        self._base, self._model = base, base.model
        self._keep, self._settings = keep, settings
        self._number = 0
        self._loaded: dict[tuple[str, int], tuple[str, Scorer]] = {}
        self._refused: dict[tuple[str, int], str] = {}

    def of(self, path: str | None) -> Scorer:
        """The scorer with an adapter, or without.

        Args:
            path: a folder as PEFT saves it, or a name on the hub; None for the base model.

        Raises:
            AdapterError: it can't be loaded, or its parameters can't all be counted.
        """
        if path is None:
            self._use(None)
            return self._base
        key = (path, _changed(path))
        if key in self._refused:
            raise AdapterError(self._refused[key])
        if key not in self._loaded:
            try:
                self._loaded[key] = self._load(path)
            except Exception as error:  # PEFT and transformers raise all kinds
                self._refused[key] = reason = first_line(error)
                raise AdapterError(reason) from error
        name, scorer = self._loaded[key] = self._loaded.pop(key)  # the last used is last
        self._use(name)
        return scorer

    def weights_changed(self) -> None:
        """Forget what was learned of the base model's weights, and the adapters, named after it."""
        for name, _ in self._loaded.values():
            self._model.delete_adapter(name)  # type: ignore[operator]
        self._loaded.clear()
        self._base.weights_changed()

    def _load(self, path: str) -> tuple[str, Scorer]:
        base = {mode: self._base.fingerprint_in(mode) for mode in get_args(Mode)}  # before names change
        while len(self._loaded) >= self._keep:
            old, _ = self._loaded.pop(next(iter(self._loaded)))
            self._model.delete_adapter(old)  # type: ignore[operator]
        name = f"adapter{self._number}"
        self._number += 1
        model: Any = self._model
        try:
            model.load_adapter(path, adapter_name=name)
            dtype = next(model.get_input_embeddings().parameters()).dtype  # as vLLM serves it
            for parameter_name, parameter in model.named_parameters():
                if f".{name}." in parameter_name:
                    parameter.data = parameter.data.to(dtype)
            model.requires_grad_(False).eval()
            self._use(name)
            fingerprints: dict[Mode, str] = {mode: self._fingerprint(name, base[mode]) for mode in base}
            return name, Scorer.from_model(model, fingerprints=fingerprints, **self._settings)
        except Exception:
            with contextlib.suppress(Exception):
                model.delete_adapter(name)
            _unwrap_ends(model)
            self._use(None)
            raise

    def _use(self, name: str | None) -> None:
        model: Any = self._model
        if name is not None:
            model.enable_adapters()
            model.set_adapter(name)
        elif self._loaded:
            model.disable_adapters()

    def _fingerprint(self, name: str, base: str) -> str:
        model: Any = self._model
        digest = hashlib.sha256(base.encode())
        settings = {k: v for k, v in model.peft_config[name].to_dict().items() if k not in _NO_INFLUENCE}
        digest.update(json.dumps(settings, sort_keys=True, default=_plain).encode())
        own = [(n.replace(name, ""), p) for n, p in model.named_parameters() if f".{name}." in n]
        add_tensors(digest, own)
        return digest.hexdigest()[:12]


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _unwrap_ends(model: Any) -> None:
    """Take a refused adapter's wrapper off head and embedding: around these every adapter is refused."""
    for end in ("input", "output"):
        layer = getattr(model, f"get_{end}_embeddings")()
        for inner in ("base_layer", "original_module"):
            if (original := getattr(layer, inner, None)) is not None:
                getattr(model, f"set_{end}_embeddings")(original)


def _changed(path: str) -> int:
    """When the adapter's files last changed: a server may load another one from the same place."""
    times = [file.stat().st_mtime_ns for file in Path(path).glob("adapter_*")]
    return max(times, default=0)
