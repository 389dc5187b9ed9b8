"""Where settings come from: flags go before environment variables, these before a YAML file.

Names follow from the model's fields: ``max_queue`` in the file, ``GNUQ_MAX_QUEUE`` in the environment,
``--gnuq-max-queue`` on the command line (vLLM has no flag that begins so). Every error names the place.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

PREFIX = "GNUQ_"
# Variables of ours that are no settings of a server.
_NO_SETTINGS = frozenset(
    {"GNUQ_CONFIG", "GNUQ_CACHE", "GNUQ_API_KEY", "GNUQ_BASE_URL", "GNUQ_JUDGE_API_KEY", "GNUQ_UPSTREAM_API_KEY"}
)
# Kubernetes sets these in every container where a service has a name like ours.
_OF_KUBERNETES = re.compile(r"GNUQ_(\w+_)?(SERVICE_(HOST|PORT\w*)|PORT(_\d+_(TCP|UDP)\w*)?)")
_FLAG = "--gnuq-"

_Model = TypeVar("_Model", bound=BaseModel)


class SettingsError(ValueError):
    """The settings can't be used; the message names the place, the setting and the remedy."""


@dataclass(frozen=True, slots=True)
class Given:
    """One value and where it stands.

    Attributes:
        where: the place, such as ``GNUQ_MAX_QUEUE``.
        value: as read.
        unknown: what to say where there is no such setting.
        spell: a setting's name as it is written in this kind of place.
    """

    where: str
    value: Any
    unknown: str
    spell: Callable[[str], str]


def from_file(path: str, named_by: str) -> dict[str, Given]:
    """The settings of a YAML file.

    Args:
        path: the file.
        named_by: where its name stands, for errors.

    Raises:
        SettingsError: the file can't be read, or is no mapping.
    """
    place = f"{named_by}={path}"
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{place}: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict | None):
        raise SettingsError(f"{place}: expected a mapping of settings, found {type(data).__name__}")
    return {
        str(key): Given(f"{place}: {key}", value, f"{place}: unknown key {str(key)!r}", str)
        for key, value in (data or {}).items()
    }


def from_environment(model: type[BaseModel], environment: Mapping[str, str]) -> dict[str, Given]:
    """The settings among environment variables; an empty variable says nothing.

    Raises:
        SettingsError: a value is not YAML where a mapping or a list is wanted.
    """
    given = {}
    for key, text in environment.items():
        if key.startswith(PREFIX) and text and key not in _NO_SETTINGS:
            name = key.removeprefix(PREFIX).lower()
            if name not in model.model_fields and _OF_KUBERNETES.fullmatch(key):
                continue
            given[name] = Given(key, _read(model, name, text, key), f"unknown variable {key}", variable)
    return given


def from_flags(model: type[BaseModel], flags: Mapping[str, str]) -> dict[str, Given]:
    """The settings of `flags_of`.

    Raises:
        SettingsError: a value is not YAML where a mapping or a list is wanted.
    """
    return {
        name: Given(flag(name), _read(model, name, text, flag(name)), f"unknown flag {flag(name)}", flag)
        for name, text in flags.items()
    }


def combine(model: type[_Model], *sources: Mapping[str, Given]) -> _Model:
    """The settings of all sources, later ones first.

    Raises:
        SettingsError: an unknown setting, or a value that is not allowed; all mistakes at once.
    """
    given = {name: one for source in sources for name, one in source.items()}
    try:
        return model.model_validate({name: one.value for name, one in given.items()})
    except ValidationError as error:
        # Not chained: pydantic's text repeats the values, and one of them may be a key.
        problems = [_explain(model, problem, given) for problem in error.errors()]
    raise SettingsError("; ".join(problems))


def flag(name: str) -> str:
    """The flag of a setting."""
    return _FLAG + name.replace("_", "-")


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()


def add_flags(parser: argparse.ArgumentParser, model: type[BaseModel]) -> None:
    """One flag for each setting, and ``--gnuq-config``."""
    group = parser.add_argument_group(
        "settings of scoring",
        "Each also as a key of the file, or as an environment variable: --gnuq-max-queue 64 is max_queue: 64 in "
        "the file and GNUQ_MAX_QUEUE=64. Flags go first, then variables, then the file.",
    )
    group.add_argument(f"{_FLAG}config", metavar="FILE", help="YAML file with settings (also GNUQ_CONFIG)")
    for name, field in model.model_fields.items():
        text = f"{field.description} ({default_of(field)})".replace("%", "%%")
        if field.annotation is bool:
            group.add_argument(
                flag(name),
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=text,
            )
        else:
            metavar = name.rpartition("_")[2].upper()
            group.add_argument(flag(name), metavar=metavar, default=argparse.SUPPRESS, help=text)


def flags_of(args: argparse.Namespace) -> dict[str, str]:
    """The settings that the command line gives, as texts."""
    found = {name.removeprefix("gnuq_"): value for name, value in vars(args).items() if name.startswith("gnuq_")}
    found.pop("config", None)
    return {name: str(value).lower() if isinstance(value, bool) else value for name, value in found.items()}


def unknown_flag(model: type[BaseModel], arguments: Iterable[str]) -> str | None:
    """The complaint about the first argument that looks like a flag of ours but is none; None: all is well."""
    known = [flag(name) for name in ("config", *model.model_fields)]
    known += [f"--no{flag(name)[1:]}" for name, field in model.model_fields.items() if field.annotation is bool]
    for argument in arguments:
        name = argument.partition("=")[0]
        if re.match(r"--(no[-_])?gnuq", name) and name not in known:
            return f"unknown flag {name}" + _near(name, known)
    return None


def default_of(field: FieldInfo) -> str:
    """The default as one would write it in YAML."""
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _read(model: type[BaseModel], name: str, text: str, where: str) -> Any:
    """A text as the value of a setting; pydantic makes numbers of texts by itself."""
    field = model.model_fields.get(name)
    if field is None:
        return text
    kinds = set(_kinds(field.annotation))
    if text == "null" and type(None) in kinds:
        return None
    if not kinds & {dict, list, tuple, Mapping}:
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
    return value if isinstance(value, dict | list) or str not in kinds else text


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that a value may have, as far as they matter for reading a text."""
    origin = get_origin(annotation)
    if origin is None:
        yield annotation
    elif isinstance(origin, type) and issubclass(origin, Mapping | list | tuple):
        yield Mapping if issubclass(origin, Mapping) else origin
    else:
        for argument in get_args(annotation):
            yield from _kinds(argument)


def _explain(model: type[BaseModel], problem: ErrorDetails, given: Mapping[str, Given]) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else ""
    where = given.get(name)
    if problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1 and where is not None:
        return where.unknown + _near(where.spell(name), [where.spell(known) for known in model.model_fields])
    message = problem["msg"].removeprefix("Value error, ")
    within = ".".join(map(str, problem["loc"][1:]))
    place = where.where if where is not None else name
    return f"{place}{'.' if within else ''}{within}: {message}" if place else message


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
