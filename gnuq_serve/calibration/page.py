"""A page of a report: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from typing import Any

_NOTHING = "\u2013"
_THIN = "\u202f"  # a space at which no line breaks


def render(package: str, template: str, **values: Any) -> str:
    """Fill in a template of a package's folder ``templates``, with filters percent, number and interval.

    Raises:
        ImportError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the report needs {error.name}, not installed here: pip install 'gnuq-serve[calibrate]'"
        ) from error
    environment = Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "number": number, "interval": interval}
    return environment.get_template(template).render(**values)


def data_url(png: bytes) -> str:
    """A figure as it stands inside of the page."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def percent(value: float | None, decimals: int = 0) -> str:
    """A share as percent; a dash for None."""
    return _NOTHING if value is None else f"{100 * value:.{decimals}f}{_THIN}%"


def number(value: float | None, decimals: int = 3) -> str:
    """A number; a dash for None."""
    return _NOTHING if value is None else f"{value:.{decimals}f}"


def interval(value: Any) -> str:
    """A value and, where known, the ends of its interval; a dash for None."""
    if value is None or value.value is None:
        return _NOTHING
    if value.low is None:
        return f"{value.value:.3f}"
    return f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f})"
