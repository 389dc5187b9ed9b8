"""How much memory a pass needs beyond the weights, measured on the model itself, and how much it may take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from gnuq_serve.gradnorm.backward import graph
from gnuq_serve.gradnorm.batch import Batch
from gnuq_serve.gradnorm.coverage import Coverage
from gnuq_serve.gradnorm.layer_call import accumulation_dtype
from gnuq_serve.gradnorm.linear import TILE_BYTES
from gnuq_serve.gradnorm.prefix import PrefixCache
from gnuq_serve.gradnorm.recorder import MIN_HEAD_ROWS, Recorder
from gnuq_serve.gradnorm.token_probability import token_log_probabilities

# A cache-sized working set is as fast as a larger one on a CPU, and the engine beside us wants its memory.
MAX_CPU_BUDGET = 2 * 2**30
_LONGEST_PROBE = 48


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """Bytes that a pass holds for one sample of T visited positions behind a prefix of P constant ones.

    ``per_token T + per_pair T (P + T) + (per_prefix_token + per_cached_token) P``

    Attributes:
        per_token: activations of all layers for one position.
        per_pair: for a query and a key: 0 where fused attention never forms their matrix.
        logits: of one answer token, in the model's dtype.
        wide_logits: the same in the dtype that sums run in.
        head_gradient: the largest piece of the head's weight gradient that SemGrad's relatives form.
        blocks: number of decoder blocks.
        per_boundary: one position's hidden state between two blocks.
        window: length past which layers with a sliding window need a mask; None where no layer has one.
        per_pair_windowed: ``per_pair`` past that length.
        per_prefix_token: what the graph keeps of a prefix's keys and values, where a sample has a prefix.
        per_cached_token: those keys and values themselves.
        per_pair_in_prefix: ``per_pair`` while they are computed.
    """

    per_token: float
    per_pair: float
    logits: int
    wide_logits: int
    head_gradient: int
    blocks: int
    per_boundary: int
    window: int | None = None
    per_pair_windowed: float = 0.0
    per_prefix_token: float = 0.0
    per_cached_token: float = 0.0
    per_pair_in_prefix: float = 0.0

    def bytes(
        self,
        positions: int,
        samples: int,
        answer_tokens: int,
        *,
        prefix: int = 0,
        recompute: int = 0,
        at_once: int = 1,
        semantic: bool = False,
    ) -> int:
        """Peak of a pass over ``samples`` sequences padded to ``positions``, of ``answer_tokens`` in all.

        ``recompute`` blocks keep their input only, and one block at a time runs again. ``at_once`` gradients
        come down together. The prefixes themselves are not counted, only a batch's copy that holds them side by
        side.
        """
        length = prefix + positions
        windowed = self.window is not None and length > self.window
        pairs = (self.per_pair_windowed if windowed else self.per_pair) * positions * length
        kept = self.per_token * positions + self.per_prefix_token * prefix + pairs
        blocks = max(1, self.blocks)
        # What runs again does so after the blocks above it have gone.
        at_a_time = max(blocks - recompute, 1) / blocks
        side_by_side = self.per_cached_token * prefix if samples > 1 else 0
        each = at_a_time * kept + recompute * positions * self.per_boundary + side_by_side
        # The gradient on its way through one block takes about as much as the block keeps, or has kept; an
        # unfused softmax takes its matrix a second time.
        on_the_way = samples * at_once * (kept + pairs) / blocks + answer_tokens * self.logits
        # Before it the prefixes are computed, one at a time; unfused, scores become probabilities in three steps.
        computing = (self.per_token * prefix + 3 * self.per_pair_in_prefix * prefix**2) / blocks
        return int(max(samples * each + max(on_the_way, self.head_bytes(answer_tokens, semantic)), computing))

    def head_bytes(self, answer_tokens: int, semantic: bool = False) -> int:
        """Peak at the head: logits, then their gradient, and what turns them into probabilities tile by tile."""
        logits = max(answer_tokens, MIN_HEAD_ROWS) * self.logits
        tile = min(answer_tokens * self.wide_logits, TILE_BYTES)
        head_gradient = self.head_gradient if semantic else 0
        return max(logits + 3 * tile, 2 * logits + max(2 * tile, head_gradient))


def measure(model: nn.Module, coverage: Coverage, *, answer_only: bool = False) -> MemoryModel:
    """Count what autograd and the rules keep in short passes, and extend it to any length.

    With ``answer_only`` the passes have prefixes: keys and values are then kept otherwise, and masks needed.
    """
    config = _text_config(model)
    context = getattr(config, "max_position_embeddings", None) or _LONGEST_PROBE + 1
    longest = max(6, min(_LONGEST_PROBE, context - 1))
    weight = coverage.embedding_weight
    vocabulary, width = weight.shape
    window = getattr(config, "sliding_window", None)
    lengths = [(longest * i // 3, 0) for i in (1, 2, 3)]
    per_token, per_pair, _ = _fit(model, coverage, lengths)
    rest: dict[str, Any] = {}
    if answer_only:
        third = longest // 3
        rest["per_pair_in_prefix"] = per_pair
        rest["per_cached_token"] = _prefix(model, longest)[1] / longest
        behind = [(t, p) for t in (third // 2, third) for p in (third, 2 * third)]
        per_token, per_pair, rest["per_prefix_token"] = _fit(model, coverage, behind)
    elif isinstance(window, int):
        with _window(config, lengths[0][0] // 2):
            _, windowed, _ = _fit(model, coverage, lengths)
        if window <= longest:  # then the first fit saw some lengths with masks and some without
            per_pair = windowed
        rest |= {"window": window, "per_pair_windowed": windowed}
    wide = accumulation_dtype(weight).itemsize
    return MemoryModel(
        per_token=max(per_token, 1.0),
        per_pair=per_pair,
        logits=vocabulary * weight.element_size(),
        wide_logits=vocabulary * wide,
        head_gradient=min(vocabulary * width * wide, TILE_BYTES),
        blocks=len(coverage.blocks),
        per_boundary=width * weight.element_size(),
        **rest,
    )


def default_budget(device: torch.device) -> int:
    """Half of the memory that is free now, in bytes; on a CPU 2 GiB at most."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free // 2)
    return min(int(psutil.virtual_memory().available // 2), MAX_CPU_BUDGET)


def parse_bytes(amount: int | str) -> int:
    """A number of bytes from an integer or a text such as ``"2GiB"``, ``"500MB"``.

    Raises:
        ValueError: not such an amount, or not above 0.
    """
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", str(amount), re.IGNORECASE)
    value = int(float(match[1]) * units[(match[2] or "").upper()]) if match else 0
    if value <= 0:
        raise ValueError(f"memory_budget={amount!r} is no amount of memory; give bytes, or a text such as '2GiB'")
    return value


def _fit(model: nn.Module, coverage: Coverage, lengths: list[tuple[int, int]]) -> tuple[float, float, float]:
    """Bytes for a position, a pair, a position of the prefix, from passes over (positions, prefix)."""
    kept = [_kept_bytes(model, coverage, positions, prefix) for positions, prefix in lengths]
    columns = [(t, t * (p + t), p, 1) for t, p in lengths]
    (per_token, per_pair, per_prefix, _), *_ = np.linalg.lstsq(np.array(columns, float), np.array(kept, float))
    # Rounding of the fit must not become the largest term of a long sample.
    negligible = 1e-3 * per_token / _LONGEST_PROBE
    return float(per_token), float(per_pair) if per_pair > negligible else 0.0, max(0.0, float(per_prefix))


def _kept_bytes(model: nn.Module, coverage: Coverage, length: int, prefix: int) -> int:
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor.detach()  # itself, a node's output would hold that node, and be held by it for ever

    batch = Batch.of([([0] * (prefix + length), [0])], coverage.embedding_weight.device, prefix)
    recorder = Recorder(coverage, batch)
    prefixes = [_prefix(model, prefix)[0]] if prefix else None
    with (
        torch.inference_mode(mode=False),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        graph(model, coverage, batch, recorder, prefixes=prefixes) as logits,
    ):
        chosen, _ = token_log_probabilities(logits, batch.targets)
        for tensor in recorder.inputs():
            keep(tensor)
        del chosen
    return sum(storage.nbytes() for storage in storages.values())


def _prefix(model: nn.Module, length: int) -> tuple[Any, int]:
    """Keys and values of a prefix, and their bytes."""
    cache = PrefixCache(model, 2**62)
    return cache.keys_and_values([0] * length), cache.nbytes


@contextmanager
def _window(config: Any, size: int) -> Iterator[None]:
    """Inside, layers with a sliding window have a small one, so that short passes need its mask."""
    usual = config.sliding_window
    config.sliding_window = size
    try:
        yield
    finally:
        config.sliding_window = usual


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()
