"""A small engine that keeps a Llama's weights its own way: fused, padded, transposed; and shares them."""

import msgspec
import torch
from torch import nn

from gnuq_serve.weights.sharing import made_shareable, shared_weights
from gnuq_serve.weights.tracing import CopyRecorder

PADDING = 11


def _empty(*shape):
    return nn.Parameter(torch.full(shape, torch.nan))


class FusedEngine(nn.Module):
    """Holds q, k, v in one matrix, gate and up in another, a padded embedding, the down projection transposed."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        heads = config.hidden_size // config.num_attention_heads
        sizes = [config.num_attention_heads * heads, *[config.num_key_value_heads * heads] * 2]
        self.parts = {"q": (0, sizes[0]), "k": (sizes[0], sizes[1]), "v": (sum(sizes[:2]), sizes[2])}
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.embed_tokens = _empty(config.vocab_size + PADDING, hidden)
        self.layers = nn.ModuleList()
        for _ in range(config.num_hidden_layers):
            layer = nn.Module()
            layer.qkv = _empty(sum(sizes), hidden)
            layer.gate_up = _empty(2 * intermediate, hidden)
            layer.down = _empty(intermediate, hidden)
            layer.o = _empty(hidden, sizes[0])
            layer.norms = nn.ParameterList([_empty(hidden), _empty(hidden)])
            self.layers.append(layer)
        self.norm = _empty(hidden)

    @torch.no_grad()
    def load_weights(self, weights):
        for name, tensor in weights:
            self._place(name, tensor).copy_(tensor)

    def _place(self, name, tensor):
        words = name.split(".")
        if "embed_tokens" in name:
            return self.embed_tokens[: tensor.shape[0]]
        if name == "model.norm.weight":
            return self.norm
        layer = self.layers[int(words[2])]
        match words[-2].removesuffix("_proj"):
            case "q" | "k" | "v" as part:
                start, length = self.parts[part]
                return layer.qkv[start : start + length]
            case "gate" | "up" as part:
                return layer.gate_up.chunk(2)[part == "up"]
            case "down":
                return layer.down.t()
            case "o":
                return layer.o
            case norm:
                return layer.norms[norm == "post_attention_layernorm"]

    def tensors(self):
        return [*self.named_parameters(), *self.named_buffers()]


class SharingEngine:
    """Serves a model on some device, shares its weights as vLLM's worker does, and can be given others."""

    def __init__(self, config, tensors, device="cpu", dtype=torch.float32, **probe):
        with torch.device(device):
            self.engine = FusedEngine(config).to(dtype)
        recorder = CopyRecorder()
        with recorder:
            self.engine.load_weights(recorder.watched(tensors))
        layout, storages = recorder.layout(self.engine.tensors())
        self.file, layout, self.storages = made_shareable(self.engine, layout, storages)
        shared = shared_weights(self.file, layout, self.storages)
        self.weights = msgspec.structs.replace(shared, **probe)

    @property
    def json(self):
        return msgspec.json.encode(self.weights).decode()

    def reload(self, tensors, *, whole=True):
        self.file.begin_change()
        self.engine.load_weights(tensors)
        if self.storages[0].device.type == "cuda":
            torch.cuda.synchronize()
        if whole:
            self.file.end_change()
