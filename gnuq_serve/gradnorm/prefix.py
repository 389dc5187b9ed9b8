"""Keys and values of prompt prefixes, computed once and kept for the samples that share them.

``answer_only`` takes the keys and values of all prompt positions but the last as constants. Where they come from
is a small interface, ``PrefixSource``: here they are computed, or kept from an earlier sample or turn.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from gnuq_serve.gradnorm.frozen import frozen


class PrefixSource(Protocol):
    """Gives the keys and values of a prefix."""

    def keys_and_values(self, ids: Sequence[int]) -> Any:
        """A transformers cache over these tokens, batch size 1, that nobody writes to."""
        ...


class PrefixCache:
    """The prefixes used last, up to a number of bytes.

    A prompt that goes on from a kept one (the next turn of a conversation) computes only what is new. One that
    shares just its beginning with it (a system prompt) takes that much, unless a layer has dropped its oldest
    keys (sliding windows).
    """

    def __init__(self, model: nn.Module, max_bytes: int) -> None:
        """Keep at most ``max_bytes`` of keys and values of ``model``."""
        self.max_bytes = max_bytes
        self._model = model
        self._kept: OrderedDict[tuple[int, ...], Any] = OrderedDict()

    def clear(self) -> None:
        """Forget all prefixes."""
        self._kept.clear()

    @property
    def nbytes(self) -> int:
        """What is kept now."""
        return sum(_nbytes(cache) for cache in self._kept.values())

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def keys_and_values(self, ids: Sequence[int]) -> Any:
        """The cache over ``ids``, computed from the longest kept beginning on."""
        key = tuple(ids)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        cache, done = self._beginning(key)
        if done < len(key):
            device = next(self._model.parameters()).device
            body = getattr(self._model, "base_model", self._model)  # no logits are wanted
            new = torch.tensor([key[done:]], device=device)
            with frozen(self._model):
                body(
                    input_ids=new,
                    past_key_values=cache,
                    use_cache=True,
                    **positions_for(self._model, torch.arange(done, len(key), device=device)[None]),
                )
        self._keep(key, cache)
        return cache

    def _beginning(self, key: tuple[int, ...]) -> tuple[Any, int]:
        best: tuple[int, ...] = ()
        length = 0
        for kept in self._kept:
            common = _common_length(kept, key)
            if common > length and (common == len(kept) or _can_be_cut(self._kept[kept])):
                best, length = kept, common
        if not length:
            return DynamicCache(config=self._model.config), 0
        cache = shallow_copy(self._kept[best])
        if length < len(best):
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        return cache, length

    def _keep(self, key: tuple[int, ...], cache: Any) -> None:
        for layer in cache.layers:
            if layer.is_initialized:
                layer.keys, layer.values = _alone(layer.keys), _alone(layer.values)
        if _nbytes(cache) > self.max_bytes:
            return  # it would drive out all others and itself
        self._kept[key] = cache
        total = self.nbytes
        while total > self.max_bytes:
            _, oldest = self._kept.popitem(last=False)
            total -= _nbytes(oldest)


class ConstantPrefix(DynamicCache):
    """A cache that never grows: a layer gets its new keys and values behind the kept ones, and nothing is stored.

    So a layer that runs again (recomputed blocks, layers on the slow path) sees what it saw the first time.
    """

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Keys and values of the prefix and, behind them, the new ones."""
        return copy.copy(self.layers[layer_idx]).update(key_states, value_states, *args, **kwargs)


def joined(prefixes: Sequence[Any]) -> ConstantPrefix:
    """One cache for a batch, of prefixes of one length."""
    cache = ConstantPrefix()
    cache.layers = shallow_copy(prefixes[0]).layers
    if len(prefixes) > 1:
        for i, layer in enumerate(cache.layers):
            if layer.is_initialized:
                layer.keys = torch.cat([prefix.layers[i].keys for prefix in prefixes])
                layer.values = torch.cat([prefix.layers[i].values for prefix in prefixes])
    return cache


def shallow_copy(cache: Any) -> Any:
    """The same tensors in a cache of its own: appending to one replaces its tensors, never writes to them."""
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    return new


def positions_for(model: nn.Module, positions: Tensor) -> dict[str, Tensor]:
    """The argument that tells a model its tokens' positions; empty for those that count by themselves."""
    # PEFT's wrapper takes anything and hides what the model itself takes.
    inner = getattr(model, "get_base_model", lambda: model)()
    return {"position_ids": positions} if "position_ids" in inspect.signature(inner.forward).parameters else {}


def _common_length(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _can_be_cut(cache: Any) -> bool:
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor without the rest of a larger one that it is a view of (a sliding window cuts one off)."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _nbytes(cache: Any) -> int:
    return sum(
        t.numel() * t.element_size()
        for layer in cache.layers
        if layer.is_initialized
        for t in (layer.keys, layer.values)
    )
