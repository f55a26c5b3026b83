"""Things to play with. A saved notebook, without a kernel, shows their first picture.

Everything here runs on ipywidgets 7.7.1 (Colab) and 8. In a plain script each function prints
one line instead.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets

from tlcourse import display
from tlcourse.drawing import draw_digit
from tlcourse.panes import Pane, capture
from tlcourse.quizzes import quiz

__all__ = ["choice", "draw_digit", "explore", "quiz", "slider", "stepper"]

# Redrawing follows the pointer while a drawing takes less than this.
_FOLLOW_BELOW_SECONDS = 0.2


def slider(
    min: float, max: float, step: float = 1, value: float | None = None, label: str = ""
) -> ipywidgets.Widget:
    """A slider for ``explore``; gives int when all of its numbers are int, else float.

    Args:
        min: lowest value.
        max: highest value, above ``min``.
        step: distance between neighbouring values, > 0.
        value: where it starts; None means ``min``.
        label: text beside the slider; empty means the name of draw's argument.

    Raises:
        ValueError: if the numbers do not make a slider.
    """
    value = min if value is None else value
    if not min < max:
        raise ValueError(f"slider: min must be below max, got min={min!r}, max={max!r}")
    if not step > 0:
        raise ValueError(f"slider: step must be > 0, got {step!r}")
    if not min <= value <= max:
        raise ValueError(f"slider: value must be in [{min}, {max}], got {value!r}")
    whole = all(isinstance(number, int) for number in (min, max, step, value))
    options: dict[str, Any] = {"min": min, "max": max, "step": step, "value": value}
    if whole:
        return ipywidgets.IntSlider(**options, description=label)
    decimals = f"{step:.10f}".rstrip("0").partition(".")[2]
    return ipywidgets.FloatSlider(**options, description=label, readout_format=f".{len(decimals)}f")


def choice(
    options: Sequence[Any], value: Any = None, label: str = "", drag: bool = False
) -> ipywidgets.Widget:
    """One of several values for ``explore``.

    Args:
        options: the values, or (text, value) pairs.
        value: where it starts; None means the first.
        label: text beside the control; empty means the name of draw's argument.
        drag: a slider over the options instead of a list, for values that have an order.

    Raises:
        ValueError: if there are no options, or ``value`` is none of them.
    """
    pairs = [item if isinstance(item, tuple) else (str(item), item) for item in options]
    values = [chosen for _, chosen in pairs]
    if not values:
        raise ValueError("choice: options must not be empty")
    value = values[0] if value is None else value
    if value not in values:
        raise ValueError(f"choice: value must be one of {values}, got {value!r}")
    kind = ipywidgets.SelectionSlider if drag else ipywidgets.Dropdown
    # By index: given the value of the first option, a slider would show no text beside it.
    return kind(options=pairs, index=values.index(value), description=label)


def explore(draw: Callable[..., Any], /, **controls: ipywidgets.Widget) -> None:
    """Let the reader move the arguments of a drawing and watch.

    ``draw`` is called once before anything is shown, so its error is the cell's error. Later
    errors appear in place of the picture. While the course is built (``TLCOURSE_BUILD`` is
    set), both ends of every slider and every choice are tried as well.

    Args:
        draw: called with one value for each control; makes matplotlib figures or prints.
            What it returns is not used. It should take less than 0.3 s.
        controls: argument name -> ``slider(...)`` or ``choice(...)``.

    Raises:
        TypeError: if a control is neither slider nor choice.
    """
    _check_controls(controls)
    picture = _picture(draw, controls)
    if os.environ.get("TLCOURSE_BUILD"):
        _try_ends(draw, controls)
    _align(controls)
    pane = Pane(picture)
    summary = _summary(controls)

    def redraw(_: Any) -> None:
        started = time.perf_counter()
        pane.show(lambda: _picture(draw, controls))
        follow = time.perf_counter() - started < _FOLLOW_BELOW_SECONDS
        for control in controls.values():
            if hasattr(control, "continuous_update"):
                control.continuous_update = follow

    for control in controls.values():
        control.observe(redraw, names="value")
    display.show_widget(
        ipywidgets.VBox([*controls.values(), pane.widget]),
        f"Explorer: {summary}. Run the cell to move the controls.",
        picture,
    )


def stepper(
    draw: Callable[[int], Any],
    num_steps: int,
    label: str = "step",
    interval_seconds: float = 1.0,
) -> None:
    """Show a sequence of drawings: step by step, or played.

    The last and the first are drawn before anything is shown; an error is the cell's error.
    Each drawing is made once and kept.

    Args:
        draw: called with a number in 0, ..., num_steps - 1.
        num_steps: how many drawings, >= 2.
        label: text beside the slider.
        interval_seconds: time between two drawings when played, > 0.

    Raises:
        ValueError: if there are fewer than two drawings, or the interval is not positive.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 2:
        raise ValueError(f"stepper: num_steps must be an int >= 2, got {num_steps!r}")
    if not interval_seconds > 0:
        raise ValueError(f"stepper: interval_seconds must be > 0, got {interval_seconds!r}")
    last = num_steps - 1

    @functools.cache
    def picture(step: int) -> str:
        return capture(functools.partial(draw, step), f"Figure for {label} {step}")

    picture(last)
    pane = Pane(picture(0))
    place = ipywidgets.IntSlider(value=0, min=0, max=last, description=label)
    _align({label: place})
    narrow = ipywidgets.Layout(width="7rem")
    back = ipywidgets.Button(description="Previous", layout=narrow, disabled=True)
    forward = ipywidgets.Button(description="Next", layout=narrow)
    play = ipywidgets.Play(min=0, max=last, interval=round(1000 * interval_seconds))
    ipywidgets.jslink((play, "value"), (place, "value"))

    def go(by: int) -> None:
        place.value += by

    def moved(_: Any) -> None:
        back.disabled, forward.disabled = place.value == 0, place.value == last
        pane.show(lambda: picture(place.value))

    back.on_click(lambda _: go(-1))
    forward.on_click(lambda _: go(+1))
    place.observe(moved, names="value")
    display.show_widget(
        ipywidgets.VBox([place, ipywidgets.HBox([back, forward, play]), pane.widget]),
        f"Showing {label} 0 of 0 to {last}. Run the cell to step through.",
        picture(0),
    )


def _picture(draw: Callable[..., Any], controls: dict[str, ipywidgets.Widget]) -> str:
    return capture(functools.partial(draw, **_values(controls)), f"Figure for {_summary(controls)}")


def _check_controls(controls: dict[str, ipywidgets.Widget]) -> None:
    for name, control in controls.items():
        if not hasattr(control, "value"):
            raise TypeError(
                f"explore: {name} must be a slider(...) or a choice(...), got {control!r}"
            )
        control.description = control.description or name.replace("_", " ")


def _values(controls: dict[str, ipywidgets.Widget]) -> dict[str, Any]:
    return {name: control.value for name, control in controls.items()}


def _summary(controls: dict[str, ipywidgets.Widget]) -> str:
    """The controls' values as the reader sees them."""
    return ", ".join(
        f"{control.description} = {getattr(control, 'label', control.value)}"
        for control in controls.values()
    )


def _align(controls: dict[str, ipywidgets.Widget]) -> None:
    """Labels in one column, as wide as the longest."""
    longest = max((len(control.description) for control in controls.values()), default=0)
    for control in controls.values():
        control.style.description_width = f"{longest + 2}ch"
        control.layout.width = "min(100%, 34rem)"


def _try_ends(draw: Callable[..., Any], controls: dict[str, ipywidgets.Widget]) -> None:
    """Draw at both ends of each slider and at each choice, the other controls at their start."""
    start = _values(controls)
    for name, control in controls.items():
        if hasattr(control, "options"):
            tried = [value for _, value in control.options]
        else:
            tried = [control.min, control.max]
        for value in tried:
            try:
                capture(functools.partial(draw, **{**start, name: value}), "tried")
            except Exception as error:
                raise RuntimeError(f"explore: draw fails at {name}={value!r}: {error}") from error
