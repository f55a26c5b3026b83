"""The look of the course's figures, and how a figure is shown with alternative text.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which stay apart for
the common kinds of colour blindness; every series also has its own marker and line style.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler

from tlcourse import display

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, ORANGE, BLACK, YELLOW = "#56B4E9", "#E69F00", "#000000", "#F0E442"
# Yellow comes last: on white it is the hardest to see.
palette = (BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE, BLACK, YELLOW)
markers = ("o", "s", "^", "D", "v", "P", "X", "*")
line_styles: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (7, 2)), (0, (3, 1, 1, 1)), "-", "--")
GREY = "#666666"

_STYLE: dict[str, Any] = {
    "figure.dpi": 90,
    "figure.figsize": (6.4, 3.8),
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "image.cmap": "Blues",
    "axes.prop_cycle": cycler(color=palette, linestyle=line_styles),
}


@contextmanager
def style() -> Iterator[None]:
    """The look of the course for every figure made inside: ``with tl.plots.style(): ...``."""
    with plt.rc_context(_STYLE):
        yield


def subplots(rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """``plt.subplots`` in the look of the course; sizes in inches through ``figsize``."""
    with style():
        return plt.subplots(rows, columns, **options)


def alt(shown: Axes | Figure | np.ndarray, text: str) -> None:
    """Show a figure together with a text for readers who cannot see it, and close it.

    In a notebook the picture carries ``text`` as its alternative text. In a plain script the
    figure opens in a window where there is a display, and nothing happens elsewhere.

    Args:
        shown: a figure, axes or an array of axes; the whole figure is shown.
        text: one or two sentences: what is plotted and what it shows, with numbers.

    Raises:
        ValueError: if the text is empty.
        TypeError: if ``shown`` belongs to no figure.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"text must say what the figure shows, got {text!r}")
    figure = _figure_of(shown)
    if display.in_notebook():
        picture = display.image_html(display.png(figure), text)
        display.publish({"text/html": picture, "text/plain": text})
    elif plt.get_backend().lower() != "agg":
        plt.show()
    plt.close(figure)


def _figure_of(shown: Any) -> Figure:
    first = shown.flat[0] if isinstance(shown, np.ndarray) and shown.size else shown
    figure = getattr(first, "figure", None)
    if figure is None:
        raise TypeError(f"expected a figure, axes or an array of axes, got {type(shown).__name__}")
    return figure.figure  # a figure's own is itself; that of a sub-figure is the whole
