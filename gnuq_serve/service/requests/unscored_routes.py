"""Routes that give an answer of the model without a score, told from those that give none.

What can't be told counts as answering: a route that a new vLLM or a plugin brings is refused where answers are
gated, until it is named in ``silent_routes``. The lists are vLLM 0.32's; a test compares them with its own.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from starlette.types import Scope

OTHER = "other"

# Labels of metrics: a path each, with what follows it.
ANSWERING = (
    "/v1/responses",
    "/v1/messages",
    "/v1/chat/completions/batch",
    "/v1/chat/completions/derender",
    "/v1/completions/derender",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/realtime",
    "/v1/systemone",
    "/generative_scoring",
    "/inference/v1/generate",
    "/invocations",
    "/collective_rpc",  # of the development mode: whatever it is told to call
    "/cohere/v2/chat",
)
# Taking or changing something, and giving no answer of the model.
SILENT = frozenset(
    {
        "/tokenize",
        "/detokenize",
        "/v1/chat/completions/render",
        "/v1/completions/render",
        "/v1/responses/render",
        "/v1/messages/render",
        "/v1/messages/count_tokens",
        "/cohere/v2/chat/render",
        "/pooling",
        "/classify",
        "/score",
        "/v1/score",
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
        "/v1/embeddings",
        "/v2/embed",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/adapters",
        "/ping",
        "/abort_requests",
        "/inference/v1/abort_requests",
        "/start_profile",
        "/stop_profile",
        "/scale_elastic_ep",
        "/is_scaling_elastic_ep",
        "/fault_tolerance/apply",
        "/reset_prefix_cache",
        "/reset_mm_cache",
        "/reset_encoder_cache",
        "/sleep",
        "/release_kv_cache_memory",
        "/wake_up",
        "/pause",
        "/resume",
        "/init_weight_transfer_engine",
        "/shutdown_weight_transfer_engine",
        "/start_weight_update",
        "/start_draft_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/update_weight_version",
        "/weight_checker",
    }
)
_MORE_SILENT = re.compile(r"/v1/uncertainty(/[A-Za-z0-9_-]+){0,2}|/adapters/[A-Za-z0-9_-][A-Za-z0-9._-]*")
_READING = ("GET", "HEAD", "OPTIONS")


def answering_route(scope: Scope, silent: Collection[str] = ()) -> str | None:
    """The route of a connection that may answer without a score, as a label; None: it gives no answer.

    The routes that we score are not asked about.

    Args:
        scope: the connection's.
        silent: further paths that give no answer.
    """
    if scope["type"] not in ("http", "websocket"):
        return None
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    label = _label(path)
    if scope["type"] == "http":
        if path in silent or path in SILENT or _MORE_SILENT.fullmatch(path):
            return None
        if scope["method"] in _READING and label is None and not _is_odd(path):
            return None
    return label or OTHER


def _label(path: str) -> str | None:
    path = path.lower()
    return next((one for one in ANSWERING if path == one or path.startswith(f"{one}/")), None)


def _is_odd(path: str) -> bool:
    """Written so that a server behind us might read another path."""
    segments = path.split("/")[1:]
    return "%" in path or "\\" in path or any(part in (".", "..") for part in segments) or "" in segments[:-1]
