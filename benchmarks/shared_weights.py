"""Which architectures' weights can a scorer read in vLLM's own memory? Tried on tiny random models, on a CPU.

python benchmarks/shared_weights.py [NAME ...]

Each model is loaded by vLLM, and a transformers model is built on vLLM's tensors. It is exact if every parameter
and every logit equals the checkpoint's, bit by bit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models.vllm_families import FAMILIES, SIZES, save_tiny

from gnuq_serve.weights import load_checkpoint
from gnuq_serve.weights.assemble import assemble
from gnuq_serve.weights.checkpoint import load_config
from gnuq_serve.weights.source import SourceRefused

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@dataclass(frozen=True)
class Finding:
    """What became of one architecture.

    Attributes:
        tensors: parameters of the transformers model.
        unequal: how many of them differ from the checkpoint's.
        logit_difference: the largest.
        added_bytes: memory of parameters that are not vLLM's.
        refused: why there is no such model.
    """

    name: str
    model_class: str
    tensors: int = 0
    unequal: int = 0
    logit_difference: float = 0.0
    added_bytes: int = 0
    refused: str | None = None

    @property
    def exact(self) -> bool:
        """Nothing differs, and nothing was copied."""
        return self.refused is None and not (self.unequal or self.logit_difference or self.added_bytes)


class InProcess:
    """vLLM's model loading without an engine around it. One to a process."""

    def __init__(self) -> None:
        import vllm.v1.worker.cpu.shm  # noqa: F401  (as vLLM's CPU worker does first)
        from vllm.distributed import init_distributed_environment, initialize_model_parallel

        import gnuq_serve.vllm.loader  # noqa: F401  (registers itself)

        rendezvous = Path(tempfile.mkdtemp()) / "rendezvous"
        with self._configured(None):
            init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
            initialize_model_parallel(1, 1)

    def load(self, path: str) -> tuple[Any, Any]:
        """The model as vLLM loads it, and its configuration."""
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.model_loader import get_model
        from vllm.model_executor.models.registry import ModelRegistry

        # Known as a class, it is looked at here; known by name, in a process of its own, which takes ten seconds.
        (architecture,) = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))["architectures"]
        if architecture in ModelRegistry.models:
            model_class = ModelRegistry.models[architecture].load_model_cls()
            ModelRegistry.register_model(architecture, model_class)

        config = EngineArgs(
            model=path, dtype="float32", load_format="gnuq", enforce_eager=True, skip_tokenizer_init=True
        ).create_engine_config()
        with self._configured(config):
            return get_model(vllm_config=config), config

    def reload(self, model: Any, config: Any, path: str) -> None:
        """As a worker does it when it is told to."""
        from vllm.model_executor.model_loader.reload.inplace import reload_weights

        with self._configured(config):
            reload_weights(config, model, None, path, is_checkpoint_format=True)

    @staticmethod
    def _configured(config: Any) -> Any:
        from vllm.config import VllmConfig, set_current_vllm_config

        return set_current_vllm_config(config or VllmConfig())


def examine(name: str, folder: Path, vllm: InProcess) -> Finding:
    """Load a tiny model both ways and compare."""
    from vllm.config import set_current_vllm_config

    from gnuq_serve.vllm.loader import traced_weights

    path = str(save_tiny(name, folder))
    engine, config = vllm.load(path)
    model_class = type(engine).__name__
    try:
        traced = traced_weights(engine)
        with set_current_vllm_config(config):  # vLLM changes transformers' classes for models that it runs so
            tensors = traced.layout.on(traced.storages)
            shared = assemble(load_config(path), tensors, dtype=torch.float32, untraced=traced.layout.untraced)
            checkpoint = load_checkpoint(path, dtype="float32", device="cpu")
    except SourceRefused as error:
        return Finding(name, model_class, refused=str(error))
    expected = dict(checkpoint.named_parameters())
    found = dict(shared.named_parameters())
    assert found.keys() == expected.keys()
    engines = {tensor.untyped_storage().data_ptr() for tensor in [*engine.parameters(), *engine.buffers()]}
    ids = torch.randint(0, SIZES["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (shared(input_ids=ids).logits - checkpoint(input_ids=ids).logits).abs().max().item()
    return Finding(
        name,
        model_class,
        len(found),
        sum(not torch.equal(found[key], expected[key]) for key in found),
        difference,
        sum(p.nbytes for p in found.values() if p.untyped_storage().data_ptr() not in engines),
    )


def main() -> int:
    """Print the table; returns 1 where one is neither exact nor refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=[], help="architectures; all by default")
    names = parser.parse_args().names or list(FAMILIES)
    vllm, findings = InProcess(), []
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names):
            findings.append(examine(name, Path(folder) / str(number), vllm))
    print("| architecture | vLLM's class | tensors | equal | largest difference of a logit | result |")
    print("|---|---|---|---|---|---|")
    for f in findings:
        if f.refused is not None:
            print(f"| {f.name} | `{f.model_class}` | | | | refused: {f.refused} |")
        else:
            result = "exact" if f.exact else "NOT EXACT"
            print(
                f"| {f.name} | `{f.model_class}` | {f.tensors} | {f.tensors - f.unequal} "
                f"| {f.logit_difference:g} | {result} |"
            )
    return int(any(f.refused is None and not f.exact for f in findings))


if __name__ == "__main__":
    sys.exit(main())
