"""A small engine that keeps a Llama's weights its own way: fused, padded, transposed."""

import torch
from torch import nn

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
