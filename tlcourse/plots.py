"""Figures from plain values. Each function draws, labels its axes and returns the ``Axes``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter, NullLocator

from tlcourse.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    SKY,
    VERMILION,
    alt,
    line_styles,
    markers,
    palette,
    style,
    subplots,
)
from tlcourse.images import show_images

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tlcourse.comparing import Comparison
    from tlcourse.evaluation import Interval
    from tlcourse.recording import History

__all__ = [
    "alt", "line_styles", "markers", "palette", "plot_comparison", "plot_confusion",
    "plot_history", "plot_intervals", "plot_learning_curve", "plot_reliability", "show_images",
    "style", "subplots",
]  # fmt: skip


@style()
def plot_history(history: History) -> np.ndarray:
    """Training and validation loss above, the learning rate below, over the steps.

    Args:
        history: of ``tl.fit``; a validation set is not needed.

    Returns:
        Array of two Axes: loss and learning rate.
    """
    if not history.step:
        raise ValueError("history has no steps to plot")
    _, axes = plt.subplots(
        2, 1, sharex=True, figsize=(6.4, 4.4), gridspec_kw={"height_ratios": (3, 1)}
    )
    loss, rate = axes
    loss.plot(history.step, history.train_loss, color=SKY, lw=0.8, ls="-", label="each step")
    window = max(1, len(history.step) // 40)
    smooth = np.convolve(history.train_loss, np.ones(window) / window, mode="valid")
    loss.plot(history.step[window - 1 :], smooth, color=BLUE, ls="-", label="training")
    if history.eval_step:
        loss.plot(
            history.eval_step, history.val_loss, color=VERMILION, ls="--", marker="s", ms=4,
            label="validation",
        )  # fmt: skip
    if history.best_step is not None:
        for ax in axes:
            ax.axvline(history.best_step, color=BLACK, ls=":", lw=1.2)
        loss.plot([], [], color=BLACK, ls=":", label=f"best: step {history.best_step}")
    loss.set(ylabel="loss (nats)", ylim=(0, None))
    loss.legend()
    rate.plot(history.step, history.lr, color=GREEN, ls="-")
    rate.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    return axes


@style()
def plot_comparison(
    comparison: Comparison, xlabel: str = "accuracy", ax: Axes | None = None
) -> Axes:
    """Each arm on a line: a small dot for each draw, the mean and its 95 % interval.

    Args:
        comparison: of ``tl.compare``; the first arm comes on top.
        xlabel: what the scores are.
        ax: where to draw; None makes a figure.
    """
    arms = list(comparison.scores)
    own = ax is None
    ax = plot_intervals({arm: comparison.interval(arm) for arm in arms}, xlabel=xlabel, ax=ax)
    for row, arm in enumerate(arms):
        draws = comparison.scores[arm]
        # Draw i stands at the same height in every arm, as draws are paired.
        heights = row + 0.26 + 0.16 * np.linspace(-1, 1, len(draws))
        ax.plot(draws, heights, ".", color=GREY, ms=5, label="one draw" if row == 0 else None)
    if own:
        ax.figure.legend(loc="outside lower center", ncols=2)
    else:
        ax.legend()
    return ax


@style()
def plot_intervals(
    intervals: Mapping[str, Interval | Sequence[float]],
    xlabel: str = "accuracy",
    reference: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """One line for each name: an estimate and its 95 % interval.

    Args:
        intervals: name -> ``Interval`` or (mean, low, high); the first comes on top.
        xlabel: what the numbers are.
        reference: a value to compare with, drawn as a vertical line.
        ax: where to draw; None makes a figure.

    Raises:
        ValueError: if there is none, or a mean lies outside its interval.
    """
    if not intervals:
        raise ValueError("plot_intervals needs at least one interval, got none")
    if ax is None:
        _, ax = plt.subplots(figsize=(6.4, 0.9 + 0.5 * len(intervals)))
    for row, (name, interval) in enumerate(intervals.items()):
        mean, low, high = _triple(interval)
        if not low <= mean <= high:
            raise ValueError(f"{name!r}: mean {mean} must lie in its interval [{low}, {high}]")
        ax.errorbar(
            mean, row, xerr=[[mean - low], [high - mean]], color=palette[row % len(palette)],
            marker=markers[row % len(markers)], ms=7, capsize=4, lw=2,
            label="mean, 95 % interval" if row == 0 else None,
        )  # fmt: skip
    if reference is not None:
        ax.axvline(reference, color=BLACK, ls="--", lw=1.2)
    ax.set(xlabel=xlabel, ylim=(len(intervals) - 0.45, -0.55))
    ax.set_yticks(range(len(intervals)), list(intervals))
    ax.grid(False, axis="y")
    return ax


@style()
def plot_learning_curve(
    counts: Sequence[int],
    scores: Mapping[str, Any],
    chance: float | None = None,
    xlabel: str = "labels per class",
    ylabel: str = "accuracy",
    ax: Axes | None = None,
) -> Axes:
    """Scores over the number of labels, one line for each arm, with 95 % intervals.

    Args:
        counts: increasing numbers of labels, each >= 1; on a logarithmic axis.
        scores: arm -> array, shape (len(counts), draws), draws >= 2.
        chance: score of guessing, drawn as a horizontal line.
        xlabel: what is counted.
        ylabel: what the scores are.
        ax: where to draw; None makes a figure.

    Raises:
        ValueError: if a shape is wrong; names the arm.
    """
    from tlcourse.evaluation import mean_interval

    positions = np.asarray(counts, dtype=float)
    if positions.ndim != 1 or not (np.diff(positions, prepend=0) > 0).all() or positions[0] < 1:
        raise ValueError(f"counts must be increasing numbers >= 1, got {list(counts)}")
    own = ax is None
    if ax is None:
        _, ax = plt.subplots(figsize=(8.0, 3.9))
    for i, (arm, values) in enumerate(scores.items()):
        array = np.asarray(values, dtype=float)
        if array.ndim != 2 or len(array) != len(positions) or array.shape[1] < 2:
            raise ValueError(
                f"{arm!r}: expected scores of shape ({len(positions)}, draws) with two or more "
                f"draws, got {array.shape}"
            )
        rows = np.array([_triple(mean_interval(row)) for row in array])
        # Side by side, so that the intervals of two arms do not hide each other.
        aside = positions * 1.03 ** (i - (len(scores) - 1) / 2)
        ax.errorbar(
            aside, rows[:, 0], yerr=[rows[:, 0] - rows[:, 1], rows[:, 2] - rows[:, 0]],
            color=palette[i % len(palette)], marker=markers[i % len(markers)],
            ls=line_styles[i % len(line_styles)], capsize=3, elinewidth=1.2, label=arm,
        )  # fmt: skip
    if chance is not None:
        ax.axhline(chance, color=GREY, ls=(0, (1, 3)), lw=1.5, label="chance")
    ax.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    ax.set_xticks(positions, [f"{count:g}" for count in positions])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
    title = {"title": "mean, 95 % interval", "title_fontsize": 9}
    if own:
        ax.figure.legend(loc="outside right upper", **title)
    else:
        ax.legend(**title)
    return ax


@style()
def plot_confusion(
    confusion: np.ndarray, classes: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Confusion matrix: counts as numbers, the fraction of each row as shade.

    Args:
        confusion: int array, shape (K, K); row: target, column: prediction.
        classes: K names; None means 0 to K - 1.
        ax: where to draw; None makes a figure.
    """
    confusion = np.asarray(confusion)
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
        raise ValueError(f"confusion must have the shape (K, K), got {confusion.shape}")
    names = [str(k) for k in range(len(confusion))] if classes is None else list(classes)
    if len(names) != len(confusion):
        raise ValueError(f"expected {len(confusion)} class names, got {len(names)}")
    if ax is None:
        side = max(3.0, 1.2 + 0.42 * len(names))
        _, ax = plt.subplots(figsize=(side + 0.4, side))
    fractions = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    ax.imshow(fractions, vmin=0, vmax=1, cmap="Blues")
    for (row, column), count in np.ndenumerate(confusion):
        colour = "white" if fractions[row, column] > 0.55 else BLACK if count else "#BBBBBB"
        ax.text(column, row, f"{count:g}", ha="center", va="center", color=colour, fontsize=9)
    slanted = max(map(len, names)) > 3
    ax.set_xticks(
        range(len(names)), names, rotation=45 if slanted else 0, ha="right" if slanted else "center"
    )
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="predicted", ylabel="target")
    ax.grid(False)
    return ax


@style()
def plot_reliability(
    probabilities: np.ndarray, targets: np.ndarray, num_bins: int = 10, ax: Axes | None = None
) -> Axes:
    """How often a prediction is right, over how sure the model was of it.

    Points on the diagonal are calibrated; below it the model is too sure. Bins as in
    ``evaluation.calibration_error`` (Guo et al. 2017, section 2, arXiv:1706.04599); bars are
    Wilson 95 % intervals of the accuracy in the bin.

    Args:
        probabilities: float array, shape (N, K), rows sum to 1.
        targets: int array, shape (N,).
        num_bins: bins of equal width over [0, 1].
        ax: where to draw; None makes a figure.
    """
    from tlcourse.evaluation import calibration_error, wilson_interval

    probabilities, targets = np.asarray(probabilities), np.asarray(targets)
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == targets
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    if ax is None:
        _, ax = plt.subplots(figsize=(4.8, 4.4))
    ax.plot([0, 1], [0, 1], color=GREY, ls="--", lw=1.2, label="calibrated")
    for i, k in enumerate(np.unique(bins)):
        inside = bins == k
        mean, low, high = _triple(wilson_interval(int(correct[inside].sum()), int(inside.sum())))
        ax.errorbar(
            confidence[inside].mean(), mean, yerr=[[mean - low], [high - mean]], color=BLUE,
            marker="o", ms=4 + 8 * np.sqrt(inside.mean()), capsize=3, lw=1.4, ls="none",
            label="predictions, 95 % interval" if i == 0 else None,
        )  # fmt: skip
    error = calibration_error(probabilities, targets, num_bins)
    ax.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    ax.set_title(f"calibration error {error:.3f}", loc="left")
    ax.legend(loc="upper left")
    return ax


def _triple(interval: Interval | Sequence[float]) -> tuple[float, float, float]:
    if isinstance(interval, Sequence):
        mean, low, high = interval
        return mean, low, high
    return interval.mean, interval.low, interval.high
