"""Called by vLLM in each of its processes before anything is served (entry point ``vllm.general_plugins``).

The endpoint plugin gates answers in vLLM's own HTTP server. Where another one is about to answer, or the settings
can't be used, this stops vLLM at once: by itself it would serve answers that nothing judges.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from types import ModuleType

_GRPC = "vllm.entrypoints.launchers.grpc_server"


def guard() -> None:
    """Stop vLLM where it could not keep what the settings promise.

    Raises:
        SystemExit: with the reason; vLLM would only log another exception.
    """
    asked_for = "gnuq" in os.environ.get("VLLM_PLUGINS", "").split(",")
    if not asked_for or multiprocessing.parent_process() is not None:
        return
    try:
        from gnuq_serve.service.decisions import Decisions
        from gnuq_serve.service.responses.gate import check_environment
        from gnuq_serve.service.settings.model import load_settings

        settings = load_settings()
        check_environment(settings)
        Decisions.load(settings)
        # Where it can't be imported vLLM would go on without it.
        import gnuq_serve.vllm.plugin  # noqa: F401
    except Exception as error:
        raise SystemExit(f"gnuq: {error}") from error
    if settings.blocks_unscored_routes:
        if getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", None) == _GRPC:
            raise SystemExit(_Refused.why)
        sys.modules.setdefault(_GRPC, _Refused(_GRPC))


class _Refused(ModuleType):
    """In the place of vLLM's gRPC server, which is imported when it is about to serve (``--grpc``)."""

    why = (
        "gnuq: gRPC answers come without a score, and on_uncertain: abstain, on_failure: closed or "
        "unscored_routes: block let no such answer through; serve without --grpc"
    )

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise SystemExit(self.why)
