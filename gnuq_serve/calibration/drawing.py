"""How figures are drawn: as PNG, in colours told apart in grey and with the common colour blindnesses."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RIGHT, WRONG, INK, FAINT = "#2166ac", "#d6604d", "#222222", "#9a9a9a"
_DPI = 160


def png(draw: Callable[[Any], None], height: float, width: float = 6.4) -> bytes:
    """One figure as PNG, ``width`` by ``height`` inches; ``draw`` is handed the empty figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        # Not pyplot: no global state, no window system.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the report needs {error.name}, not installed here: pip install 'gnuq-serve[calibrate]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=_DPI, format="png", metadata={"Software": None})
    return buffer.getvalue()


def percent(axes: Axes, which: str) -> None:
    """Axes that count in percent: ``"x"``, ``"y"`` or ``"both"``."""
    from matplotlib.ticker import PercentFormatter

    if which in ("both", "x"):
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if which in ("both", "y"):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
