"""What an engine has loaded and what its server does, read off vLLM."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from gnuq_serve.service.scorer.engine_load import waiting_in_this_server
from gnuq_serve.service.served import ServedModel, Server
from gnuq_serve.vllm.thinking import ThinkingFinder


def served_model(model_config: Any, state: Any = None, workers: int = 1) -> ServedModel:
    """The scorer's view of vLLM's ``ModelConfig``.

    Args:
        model_config: vLLM's.
        state: the server's state; its tokenizer knows the end-of-turn token.
        workers: over which the weights are split.
    """
    overrides = model_config.hf_overrides
    return ServedModel(
        model=str(model_config.model),
        dtype=str(model_config.dtype).removeprefix("torch."),
        revision=model_config.revision,
        trust_remote_code=bool(model_config.trust_remote_code),
        config_overrides=dict(overrides) if isinstance(overrides, dict) else {},
        quantization=None if model_config.quantization is None else str(model_config.quantization),
        workers=workers,
        raw_logprobs=model_config.logprobs_mode == "raw_logprobs",
        end_of_turn_ids=tuple(dict.fromkeys(_end_of_turn_ids(model_config, state))) if state is not None else (),
    )


def server(state: Any, args: Namespace) -> Server:
    """What the service knows of vLLM's server.

    Args:
        state: the server's state; its parsers are looked up at each request.
        args: its command line.
    """
    models = getattr(state, "openai_serving_models", None)
    address = (getattr(args, name, None) for name in ("uds", "host", "port"))
    return Server(
        name=":".join(map(str, address)),
        adapters=lambda: getattr(models, "lora_requests", {}),
        adapter_path=lambda name: getattr(getattr(models, "lora_requests", {}).get(name), "lora_path", None),
        parses=lambda: getattr(_chat(state), "parser_cls", None) is not None,
        sampling_defaults=lambda: getattr(_chat(state), "default_sampling_params", None),
        thinking_length=_thinking_finder(state),
        engine_load=None if getattr(args, "disable_log_stats", False) else waiting_in_this_server,
    )


def _chat(state: Any) -> Any:
    return getattr(state, "openai_serving_chat", None)


def _thinking_finder(state: Any) -> ThinkingFinder | None:
    chat = _chat(state)
    parser = getattr(getattr(chat, "parser_cls", None), "reasoning_parser_cls", None)
    if parser is None:
        return None
    return ThinkingFinder(
        parser, chat.renderer.tokenizer, dict(chat.default_chat_template_kwargs), chat.model_config
    )


def _end_of_turn_ids(model_config: Any, state: Any) -> Iterator[int]:
    tokenizer = getattr(getattr(_chat(state), "renderer", None), "tokenizer", None)
    generation = model_config.try_get_generation_config() or {}
    sources = (
        getattr(tokenizer, "eos_token_id", None),
        generation.get("eos_token_id"),
        getattr(model_config.hf_config, "eos_token_id", None),
    )
    for ids in sources:
        if ids is not None:
            yield from ids if isinstance(ids, list | tuple) else [ids]
