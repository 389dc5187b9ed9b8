"""vLLM's own routes, all of them: each is known to answer, or known to give no answer."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from gnuq_serve.service.requests.request_plan import ROUTES
from gnuq_serve.service.requests.unscored_routes import ANSWERING, OTHER, SILENT, answering_route

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


@pytest.fixture(scope="module")
def vllm_routes():
    """(method, path) of every route that vLLM's server can have; ``WS`` for a websocket."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        patch.setenv("VLLM_ENABLE_COHERE_API", "1")
        patch.setenv("VLLM_PLUGINS", "")
        from starlette.routing import WebSocketRoute
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.tasks import GENERATION_TASKS, POOLING_TASKS
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        flags = ["--model", "none", "--enable-scale-out", "--enable-fault-tolerance"]
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
        app = build_app(args, (*GENERATION_TASKS, *POOLING_TASKS, "render"))
        found = set()
        for route in app.routes:
            if isinstance(route, WebSocketRoute) or not getattr(route, "methods", None):
                found.add(("WS" if "websocket" in type(route).__name__.lower() else "GET", route.path))
            else:
                found |= {(method, route.path) for method in route.methods}
        return found


def test_every_route_is_known(vllm_routes):
    unknown = []
    for method, path in sorted(vllm_routes):
        path = path.replace("{adapter_name}", "mine").replace("{response_id}", "resp_1")
        scope = {"type": "http", "method": method, "path": path}
        if method == "WS":
            scope = {"type": "websocket", "path": path}
        if not (method == "POST" and path in ROUTES) and answering_route(scope) == OTHER:
            unknown.append((method, path))
    assert unknown == []


def test_no_route_in_the_lists_is_made_up():
    """Some are there for some models only, so they are looked for in vLLM's source."""
    package = Path(find_spec("vllm").origin).parent / "entrypoints"
    source = "".join(file.read_text(encoding="utf-8") for file in package.rglob("*.py"))
    assert [path for path in (*ANSWERING, *sorted(SILENT)) if f'"{path}"' not in source] == ["/adapters"]
