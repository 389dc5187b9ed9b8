"""What a pass must leave behind: nothing."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that the model is afterwards as it was, without hooks and without gradients."""

    def state() -> Any:
        return (
            {name: (p.requires_grad, p.grad is None, p._version) for name, p in model.named_parameters()},
            {name: (module.training, sorted(vars(module))) for name, module in model.named_modules()},
        )

    def hooks() -> int:
        tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return sum(len(getattr(module, table)) for module in model.modules() for table in tables) + sum(
            len(parameter._backward_hooks or ()) for parameter in model.parameters()
        )

    before = state()
    assert hooks() == 0
    yield
    assert state() == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert hooks() == 0


def tensors_kept_by(run: Callable[[], None]) -> int:
    """How many tensors stay alive after a call until the garbage collector comes."""
    run()  # what a first call alone sets up
    gc.collect()
    gc.disable()  # a cycle that waits for the collector would keep activations for a while
    try:
        before = _alive()
        run()
        return _alive() - before
    finally:
        gc.enable()


def _alive() -> int:
    return sum(issubclass(type(item), Tensor) for item in gc.get_objects())
