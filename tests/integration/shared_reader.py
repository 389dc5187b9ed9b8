"""A process that reads another one's weights: told what to do over its standard input, answers in JSON."""

import hashlib
import json
import sys

import msgspec
import torch

from gnuq_serve.scorer import Sample, Scorer
from gnuq_serve.weights.layout import SharedWeights
from gnuq_serve.weights.shared import SharedSource


def digest(tensor):
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def gpu_bytes():
    """Taken by torch here, and of the device by anybody; the device's own libraries are there by then."""
    if not torch.cuda.is_available():
        return [0, 0]
    torch.zeros(1, device="cuda").sum().item()
    free, total = torch.cuda.mem_get_info()
    return [torch.cuda.memory_allocated(), total - free]


class Reader:
    def open(self, weights, model, dtype):
        """Bytes that it took: of this process by torch, and of the device; and where the model is."""
        before = gpu_bytes()
        self.source = SharedSource(msgspec.json.decode(weights, type=SharedWeights), model, dtype=dtype)
        self.model = self.source.load()
        grown = [after - was for was, after in zip(before, gpu_bytes(), strict=True)]
        return [*grown, next(self.model.parameters()).device.type]

    def digests(self):
        return {name: digest(parameter) for name, parameter in self.model.named_parameters()}

    def version(self):
        return self.source.version()

    def score(self, prompt, answer):
        (score,) = Scorer.from_model(self.model).score([Sample(prompt, answer)])
        return [score.log_probability, score.log_grad_norm_sq]


def main():
    reader = Reader()
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        print("RESULT " + json.dumps(getattr(reader, method)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
