"""What the upstream server has loaded, by the proxy's own flags and files, and whether it says the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import PurePath
from typing import Any

import msgspec

from gnuq_serve.service.proxy.upstream import Model
from gnuq_serve.service.served import ServedModel

# What vLLM takes over from a model's generation_config.json.
_SAMPLING = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "max_new_tokens",
)


class ModelFacts(msgspec.Struct, frozen=True):
    """What a model's files say.

    Attributes:
        end_of_turn_ids: tokens that end an answer, the tokenizer's own first.
        context: longest sequence; None: not stated.
        sampling: how vLLM draws answers where a request does not say, unless ``--generation-config`` tells it
            otherwise.
        thinking_end_ids: tokens of the text that ends the model's thinking, where it was asked for.
        quantization: how its weights are quantised; None: they are plain, as far as its files say.
    """

    end_of_turn_ids: tuple[int, ...]
    context: int | None
    sampling: dict[str, Any] = {}
    thinking_end_ids: tuple[int, ...] = ()
    quantization: str | None = None


def read_facts(
    model: str,
    revision: str | None,
    trust_remote_code: bool,
    config_overrides: Mapping[str, Any],
    thinking_end: str | None,
) -> ModelFacts:
    """Read them in a process of its own: torch would cost the proxy half a gigabyte.

    Args:
        model: folder or hub name.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the model.
        config_overrides: entries of the model's configuration to replace.
        thinking_end: text that ends the model's thinking; None: it does not think.

    Raises:
        CheckpointError: there is no such model, or no tokenizer for ``thinking_end``.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        arguments = (model, revision, trust_remote_code, dict(config_overrides), thinking_end)
        return pool.submit(_read_facts, *arguments).result()


def _read_facts(
    model: str,
    revision: str | None,
    trust_remote_code: bool,
    config_overrides: dict[str, Any],
    thinking_end: str | None,
) -> ModelFacts:
    from transformers import AutoTokenizer, GenerationConfig

    from gnuq_serve.weights.checkpoint import CheckpointError, load_config

    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = load_config(model, config_overrides=config_overrides, **source)

    try:
        generation = GenerationConfig.from_pretrained(model, revision=revision)
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **source)
    except (OSError, ValueError):  # token ids need none
        tokenizer = None

    def ids() -> Iterator[int]:
        for holder in (tokenizer, generation, config):
            found = getattr(holder, "eos_token_id", None)
            if found is not None:
                yield from found if isinstance(found, list | tuple) else [found]

    sampling = {name: value for name, value in generation.to_diff_dict().items() if name in _SAMPLING}
    if "max_new_tokens" in sampling:
        sampling["max_tokens"] = sampling.pop("max_new_tokens")
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    end: list[int] = []
    if thinking_end is not None:
        if tokenizer is None:
            raise CheckpointError(f"--thinking-end: the tokenizer of {model!r} can't be loaded")
        # As vLLM's parsers do: by its name in the vocabulary, which need not be how the text is tokenised.
        known = tokenizer.get_vocab().get(thinking_end)
        end = [known] if known is not None else tokenizer.encode(thinking_end, add_special_tokens=False)
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None and not isinstance(quantised, dict):
        quantised = quantised.to_dict()
    quantization = None if quantised is None else str(quantised.get("quant_method", "quantised"))
    return ModelFacts(tuple(dict.fromkeys(ids())), context, sampling, tuple(end), quantization)


def differences(served: ServedModel, facts: ModelFacts, listed: Sequence[Model]) -> list[str]:
    """Warnings where the upstream server seems to have loaded something else.

    Args:
        served: what the proxy was told.
        facts: what that model's files say.
        listed: what the upstream server lists.
    """
    warnings = []
    for model in listed:
        if model.parent is not None:
            continue
        if model.root is not None and _name(model.root) != _name(served.model):
            warnings.append(
                f"the upstream server says that {model.id} is {model.root}; --model is {served.model}"
            )
        if model.max_model_len is not None and facts.context is not None and model.max_model_len > facts.context:
            warnings.append(
                f"the upstream server reads {model.max_model_len} tokens, --model {served.model} was made for "
                f"{facts.context}: give the same --hf-overrides"
            )
    return warnings


def _name(model: str) -> str:
    # The same folder may be mounted elsewhere.
    return PurePath(model).name.lower()
