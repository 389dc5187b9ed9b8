"""``gnuq-serve serve``: vLLM's own server with our plugin switched on."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec

from gnuq_serve.service.decisions import Decisions
from gnuq_serve.service.responses.gate import check_environment
from gnuq_serve.service.settings.model import CONFIG_VARIABLE, SettingsError, check_paths, load_settings
from gnuq_serve.service.settings.sources import variable
from gnuq_serve.vllm.names import EXTENSION, LOAD_FORMAT

_ON_BY_DEFAULT = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)
# How vLLM loads its weights when a scorer is to read them.
_SHARING_FLAGS = {"--load-format": LOAD_FORMAT, "--worker-extension-cls": EXTENSION}


def serve(vllm_args: Sequence[str], config: str | None = None, flags: Mapping[str, str] | None = None) -> None:
    """Become ``vllm serve`` with the plugin ``gnuq`` on; does not return.

    Args:
        vllm_args: everything that follows ``vllm serve``.
        config: settings file.
        flags: settings of the command line; handed on as environment variables.

    Raises:
        ImportError: vLLM is not installed.
        SettingsError: the settings can't be used.
    """
    if find_spec("vllm") is None:
        raise ImportError("vLLM is not installed here: pip install 'gnuq-serve[vllm]' (GPU) or 'gnuq-serve[cpu]'")
    settings = load_settings(config, flags)
    check_environment(settings)
    Decisions.load(settings)
    check_paths(settings)
    given = {variable(name): text for name, text in (flags or {}).items()}
    environment = {**os.environ, **given, "VLLM_PLUGINS": plugin_list(os.environ.get("VLLM_PLUGINS"))}
    if config is not None:
        environment[CONFIG_VARIABLE] = config
    if settings.scorer_weights == "shared":
        vllm_args = [*vllm_args, *sharing_flags(vllm_args)]
    command = [sys.executable, "-m", "gnuq_serve.vllm.server_main", *vllm_args]
    os.execve(sys.executable, command, environment)  # noqa: S606


def sharing_flags(vllm_args: Sequence[str]) -> list[str]:
    """The flags of ``vllm serve`` with which the engine shares its weights.

    Args:
        vllm_args: those given.

    Raises:
        SettingsError: one of them is among these.
    """
    given = {argument.split("=")[0].replace("_", "-") for argument in vllm_args if argument.startswith("--")}
    for flag in _SHARING_FLAGS:
        if flag in given:
            raise SettingsError(f"scorer_weights: shared sets {flag} itself: leave it out, or use checkpoint")
    return [word for pair in _SHARING_FLAGS.items() for word in pair]


def plugin_list(current: str | None) -> str:
    """``VLLM_PLUGINS`` with ours added. It is one allow-list for all groups: those on by default stay on."""
    if current is None:
        names = {point.name for group in _ON_BY_DEFAULT for point in entry_points(group=group)}
    else:
        names = {name for name in current.split(",") if name}
    return ",".join(sorted(names | {"gnuq"}))
