"""Asking the engine for its own weights, before anything is served."""

from __future__ import annotations

import json
import secrets
from typing import Any

from vllm import SamplingParams

from gnuq_serve.errors import first_line
from gnuq_serve.vllm.names import LOGPROBS_MODES

_PROBE_TOKENS = 24
_PROBE_START = 7919  # any token, for models without one that begins a text


async def share_weights(engine_client: Any) -> tuple[str | None, str | None]:
    """Where the scorer can read the weights that the engine computes with.

    Each of the server's processes asks, and all are told the same.

    Args:
        engine_client: vLLM's.

    Returns:
        The weights, as a ``SharedWeights`` in JSON, and None; or None and why there are none.
    """
    config = engine_client.model_config
    if config.logprobs_mode not in LOGPROBS_MODES:
        return None, f"they can't be checked with --logprobs-mode {config.logprobs_mode}"
    try:
        answer = await _probed(engine_client)
    except Exception as error:  # vLLM raises all kinds; without the extension there is no such method
        return None, f"the engine does not share them ({type(error).__name__}: {first_line(error)})"
    return answer.get("weights"), answer.get("refused")


async def _probed(engine_client: Any) -> dict[str, str]:
    """What the worker says, after the engine has written a sample."""
    answer = await _ask(engine_client)
    if "refused" in answer:
        return answer
    weights = json.loads(answer["weights"])
    if weights["probe_log_probability"] is not None:
        return answer
    ids, log_probability = await _sample(engine_client)
    await engine_client.collective_rpc("gnuq_keep_probe", args=(ids, log_probability, weights["version"]))
    return await _ask(engine_client)


async def _ask(engine_client: Any) -> dict[str, str]:
    answer: dict[str, str]
    answer, *_ = await engine_client.collective_rpc("gnuq_share_weights")
    return answer


async def _sample(engine_client: Any) -> tuple[list[int], float]:
    """Token ids that the engine writes, and the log-probability that it gives to all of them but the first.

    Of its own greedy text, begun as texts begin, it is sure. Of tokens at random it isn't, and rounding alone
    moves their log-probability by more than a wrong layer may: in bfloat16 by 3 of -450 with Gemma 3 270M.
    """
    config = engine_client.model_config
    begin = getattr(config.hf_text_config, "bos_token_id", None)
    start = begin if isinstance(begin, int) else _PROBE_START % config.get_vocab_size()
    count = min(_PROBE_TOKENS, config.max_model_len) - 1
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, logprobs=0, detokenize=False)
    request_id = f"gnuq-probe-{secrets.token_hex(8)}"
    final = None
    async for output in engine_client.generate({"prompt_token_ids": [start]}, params, request_id):
        final = output
    assert final is not None
    (completion,) = final.outputs
    written = list(completion.token_ids)
    pairs = zip(written, completion.logprobs, strict=True)
    return [start, *written], sum(float(position[token].logprob) for token, position in pairs)
