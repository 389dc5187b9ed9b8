"""Asking the engine for its own weights, before anything is served."""

from __future__ import annotations

import json
import secrets
from typing import Any

from vllm import SamplingParams

from gnuq_serve.errors import first_line

_PROBE_TOKENS = 24
_NEEDED = "raw_logprobs", "processed_logprobs"


async def share_weights(engine_client: Any) -> tuple[str | None, str | None]:
    """Where the scorer can read the weights that the engine computes with.

    Each of the server's processes asks, and all are told the same.

    Args:
        engine_client: vLLM's.

    Returns:
        The weights, as a ``SharedWeights`` in JSON, and None; or None and why there are none.
    """
    config = engine_client.model_config
    if config.logprobs_mode not in _NEEDED:
        return None, f"they can't be checked with --logprobs-mode {config.logprobs_mode}"
    try:
        answer = await _probed(engine_client)
    except Exception as error:  # vLLM raises all kinds; without the extension there is no such method
        return None, f"the engine does not share them ({type(error).__name__}: {first_line(error)})"
    return answer.get("weights"), answer.get("refused")


async def _probed(engine_client: Any) -> dict[str, str]:
    """What the worker says, after the engine has read a sample."""
    answer = await _ask(engine_client)
    if "refused" in answer:
        return answer
    weights = json.loads(answer["weights"])
    if weights["probe_log_probability"] is not None:
        return answer
    ids = _probe_ids(engine_client.model_config)
    log_probability = await _read(engine_client, ids)
    await engine_client.collective_rpc("gnuq_keep_probe", args=(ids, log_probability, weights["version"]))
    return await _ask(engine_client)


async def _ask(engine_client: Any) -> dict[str, str]:
    answer: dict[str, str]
    answer, *_ = await engine_client.collective_rpc("gnuq_share_weights")
    return answer


def _probe_ids(model_config: Any) -> list[int]:
    """Token ids from all over the vocabulary, as many as the context allows."""
    size = model_config.get_vocab_size()
    count = min(_PROBE_TOKENS, model_config.max_model_len - 1)
    return [7919 * (i + 1) % size for i in range(count)]


async def _read(engine_client: Any, ids: list[int]) -> float:
    """The log-probability that the engine gives to all of the ids but the first."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    request_id = f"gnuq-probe-{secrets.token_hex(8)}"
    final = None
    async for output in engine_client.generate({"prompt_token_ids": ids}, params, request_id):
        final = output
    assert final is not None
    pairs = zip(ids[1:], final.prompt_logprobs[1:], strict=True)
    return sum(float(position[token].logprob) for token, position in pairs)
