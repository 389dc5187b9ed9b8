"""Everything that imports vLLM: offline use, and the plugin for its server."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gnuq_serve.vllm.offline import UncertaintyLLM

__all__ = ["UncertaintyLLM"]


def __getattr__(name: str) -> Any:
    # The plugin lives in the server process, which must not load the scorer's torch model code.
    if name == "UncertaintyLLM":
        from gnuq_serve.vllm.offline import UncertaintyLLM

        return UncertaintyLLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
