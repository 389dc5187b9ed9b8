"""``gnuq-serve proxy``: scores in front of a vLLM server that somebody else runs."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
from typing import Any

from gnuq_serve.service.settings.model import Settings, load_settings
from gnuq_serve.service.settings.sources import add_flags, flags_of

logger = logging.getLogger(__name__)

KEY_VARIABLE = "GNUQ_UPSTREAM_API_KEY"


def add_proxy(commands: Any) -> None:
    """Add the command to an argparse subparser collection."""
    parser = commands.add_parser(
        "proxy",
        help="uncertainty in front of a vLLM server that runs already",
        description="Hands every request on to a vLLM server, and scores the answers on their way back.",
        allow_abbrev=False,
    )
    parser.add_argument("--upstream", required=True, metavar="URL", help="such as http://127.0.0.1:8000")
    parser.add_argument(
        "--upstream-api-key",
        default=os.environ.get(KEY_VARIABLE),
        metavar="KEY",
        help=f"for what the proxy itself asks; better as {KEY_VARIABLE}, since flags can be read by other users "
        "of the machine. Clients' requests carry their own",
    )
    parser.add_argument("--model", required=True, help="what the upstream server serves: folder or hub name")
    parser.add_argument("--revision", help="as given to the upstream server")
    parser.add_argument(
        "--dtype", default="auto", help="the upstream server's (default auto: the checkpoint's own)"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument(
        "--hf-overrides", type=_json_object, default={}, metavar="JSON", help="as given to the upstream server"
    )
    parser.add_argument(
        "--logprobs-mode", default="raw_logprobs", metavar="MODE", help="as given to the upstream server"
    )
    parser.add_argument(
        "--generation-config",
        choices=("auto", "vllm"),
        default="auto",
        help="as given to the upstream server; part of what a calibration is bound to",
    )
    parser.add_argument(
        "--thinking-end",
        metavar="TEXT",
        help="for a server with a reasoning parser: what ends the model's thinking, such as </think>; without it "
        "thinking and answer are scored as one",
    )
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8001, help="default 8001")
    parser.add_argument(
        "--shutdown-timeout", type=int, default=10, metavar="SECONDS", help="for answers under way (default 10)"
    )
    add_flags(parser, Settings)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; returns the exit code.

    Raises:
        ImportError: what the proxy needs is not installed.
        SettingsError: a setting can't be used.
        UpstreamError: the upstream server can't be worked with.
    """
    try:
        import uvicorn  # noqa: F401

        from gnuq_serve.service.seeing.logs import configure_logging
    except ImportError:
        raise ImportError("the proxy needs more packages: pip install 'gnuq-serve[service]'") from None
    settings = load_settings(args.gnuq_config, flags_of(args))
    configure_logging(settings.log_level, settings.log_format)
    asyncio.run(_serve(args, settings))
    return 0


async def _serve(args: argparse.Namespace, settings: Settings) -> None:
    import uvicorn

    from gnuq_serve.service.proxy.app import proxy_app
    from gnuq_serve.service.proxy.end_marker import thinking_until
    from gnuq_serve.service.proxy.proxied_model import differences, read_facts
    from gnuq_serve.service.proxy.upstream import Upstream
    from gnuq_serve.service.served import ServedModel, Server
    from gnuq_serve.service.service import UncertaintyService

    upstream = Upstream(args.upstream, args.upstream_api_key)
    source = (args.model, args.revision, args.trust_remote_code, args.hf_overrides, args.thinking_end)
    facts = await asyncio.to_thread(read_facts, *source)
    served = ServedModel(
        model=args.model,
        dtype=args.dtype,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        config_overrides=args.hf_overrides,
        quantization=facts.quantization,
        raw_logprobs=args.logprobs_mode == "raw_logprobs",
        end_of_turn_ids=facts.end_of_turn_ids,
    )
    for difference in differences(served, facts, await upstream.wait()):
        logger.warning("%s", difference)
    end = thinking_until(facts.thinking_end_ids) if facts.thinking_end_ids else None
    parses = None if end is None else True
    sampling = facts.sampling if args.generation_config == "auto" else {}
    server = Server(
        name=f"proxy:{args.host}:{args.port}",
        adapters=upstream.adapters,
        parses=lambda: parses,
        sampling_defaults=lambda: sampling,
        thinking_length=end,
        engine_load=upstream.waiting if settings.yield_to_engine else None,
    )
    service = UncertaintyService(settings, lambda: load_settings(args.gnuq_config, flags_of(args)))
    app = proxy_app(service, upstream, served, server)
    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        log_level=settings.log_level,
        ws="none",
        lifespan="on",
        proxy_headers=False,  # handed on as they are
        server_header=False,  # the upstream server's own
        date_header=False,
        timeout_graceful_shutdown=args.shutdown_timeout,
    )
    await uvicorn.Server(config).serve()


def _json_object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError
    return found
