"""The place in the page where a function's figures and printed text appear, and are replaced.

A result is sent to the page as one string of HTML, not through ``ipywidgets.Output``: a new
picture then replaces the old one in one step, so nothing flickers, and the same string is the
picture of the saved notebook.
"""

from __future__ import annotations

import base64
import traceback
from collections.abc import Callable
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
from IPython.utils.capture import capture_output

from tlcourse import display


class Pane:
    """A place for HTML.

    Attributes:
        widget: to be placed in the page.
    """

    def __init__(self, html: str = "") -> None:
        self.widget = ipywidgets.HTML(html)

    def show(self, make_html: Callable[[], str]) -> None:
        """Show what a function returns; if it raises, the error appears in its place."""
        try:
            self.widget.value = make_html()
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            message = f"{type(error).__name__}: {error}\n(in {last.name}, line {last.lineno})"
            self.widget.value = display.preformatted(message, role="alert")


def capture(call: Callable[[], Any], text: str) -> str:
    """Call a function; all that it printed, displayed or plotted, as HTML.

    Figures that it makes are closed, also when it raises.

    Args:
        call: what it returns is not used.
        text: alternative text of its figures.
    """
    before = set(plt.get_fignums())
    try:
        with capture_output() as captured:
            call()
        made = [plt.figure(number) for number in plt.get_fignums() if number not in before]
        pictures = [display.image_html(display.png(figure), text) for figure in made]
    finally:
        for number in set(plt.get_fignums()) - before:
            plt.close(number)
    printed = [part for part in (captured.stdout, captured.stderr) if part.strip()]
    shown = [_output_html(output.data, text) for output in captured.outputs]
    return "\n".join([*map(display.preformatted, printed), *shown, *pictures])


def _output_html(data: dict[str, Any], text: str) -> str:
    """One displayed output as HTML; the richest form that it has."""
    if "text/html" in data:
        return data["text/html"]
    if "image/png" in data:
        image = data["image/png"]
        return display.image_html(
            base64.b64decode(image) if isinstance(image, str) else image, text
        )
    return display.preformatted(str(data.get("text/plain", "")))
