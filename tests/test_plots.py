"""Figures show the numbers they were given, with labels, and without changing global settings."""

from __future__ import annotations

import base64
import html
import io
import re
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from tlcourse import display, figures, plots

pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def _t_interval(values):
    """scipy's own 95 % interval of a mean."""
    return stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))


def _history(best_step=20):
    steps = np.arange(1, 41)
    return SimpleNamespace(
        step=steps.tolist(),
        train_loss=(2 / steps).tolist(),
        lr=np.linspace(1e-3, 0, 40).tolist(),
        eval_step=[10, 20, 30, 40],
        val_loss=[1.0, 0.5, 0.6, 0.7],
        val_accuracy=[0.4, 0.7, 0.7, 0.7],
        best_step=best_step,
    )


def _comparison(scores):
    from tlcourse.comparing import Comparison

    return Comparison(scores)


SCORES = {"scratch": [0.2, 0.3, 0.25], "transfer": [0.8, 0.82, 0.87]}
CONFUSION = np.array([[8, 2, 0], [0, 5, 0], [1, 1, 2]])
PROBABILITIES = np.random.default_rng(0).dirichlet(np.full(4, 0.4), size=300)
TARGETS = np.random.default_rng(1).integers(0, 4, size=300)

EVERY_PLOT = {
    "history": lambda: plots.plot_history(_history())[1],
    "comparison": lambda: plots.plot_comparison(_comparison(SCORES)),
    "intervals": lambda: plots.plot_intervals({"a": (0.5, 0.4, 0.6)}),
    "learning curve": lambda: plots.plot_learning_curve([2, 5], {"a": [[0.1, 0.2], [0.3, 0.5]]}),
    "confusion": lambda: plots.plot_confusion(CONFUSION),
    "reliability": lambda: plots.plot_reliability(PROBABILITIES, TARGETS),
}


@pytest.mark.parametrize("name", EVERY_PLOT)
def test_every_plot_labels_its_axes_and_keeps_global_settings(name):
    before = dict(matplotlib.rcParams)
    ax = EVERY_PLOT[name]()
    assert ax.get_xlabel()
    # The rows of these are named by their ticks.
    assert ax.get_ylabel() or [text.get_text() for text in ax.get_yticklabels()]
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("name", EVERY_PLOT)
def test_every_plot_is_small_enough_for_a_notebook(name):
    assert len(display.png(EVERY_PLOT[name]().figure)) < 20_000


def test_series_differ_without_colour():
    pairs = list(zip(plots.markers, map(str, plots.line_styles), strict=True))
    assert len(plots.palette) == len(pairs) == len(set(plots.markers))
    assert len({style for _, style in pairs[:5]}) == 5


# Machado, Oliveira and Fernandes 2009, table 1, severity 1.0; for linear RGB.
COLOUR_BLIND = {
    "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritan": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def _lab(linear):
    """CIE L*a*b* (D65) of linear RGB, shape (N, 3)."""
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    x, y, z = np.cbrt(np.clip(linear @ to_xyz.T, 1e-6, None) / [0.9505, 1, 1.089]).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


@pytest.mark.parametrize("kind", COLOUR_BLIND)
def test_the_first_five_colours_stay_apart_for_the_colour_blind(kind):
    rgb = np.array([matplotlib.colors.to_rgb(colour) for colour in plots.palette[:5]])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = _lab(np.clip(linear @ np.array(COLOUR_BLIND[kind]).T, 0, 1))
    distances = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]]
    assert min(distances) > 10  # a just noticeable difference is about 2.3


def test_learning_curve_shows_means_and_t_intervals_at_the_real_counts():
    rng = np.random.default_rng(0)
    counts = [2, 5, 10, 50]
    scores = {"scratch": rng.random((4, 5)), "transfer": rng.random((4, 5))}
    ax = plots.plot_learning_curve(counts, scores, chance=0.1)
    assert ax.get_xscale() == "log"
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["2", "5", "10", "50"]
    assert len(ax.containers) == 2
    for container, values in zip(ax.containers, scores.values(), strict=True):
        line, _, (bars,) = container
        np.testing.assert_allclose(line.get_xdata(), counts, rtol=0.05)
        np.testing.assert_allclose(line.get_ydata(), values.mean(axis=1))
        drawn = np.array([segment[:, 1] for segment in bars.get_segments()])
        np.testing.assert_allclose(drawn, [_t_interval(row) for row in values], rtol=1e-6)
    assert {text.get_text() for text in ax.figure.legends[0].get_texts()} == {
        "scratch", "transfer", "chance",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("counts", "scores", "message"),
    [
        ([5, 2], {"a": np.ones((2, 2))}, "increasing"),
        ([0, 2], {"a": np.ones((2, 2))}, "increasing"),
        ([2, 5], {"arm one": np.ones((3, 2))}, r"'arm one'.*\(2, draws\).*\(3, 2\)"),
        ([2, 5], {"arm one": np.ones((2, 1))}, "two or more"),
        ([2, 5], {"arm one": np.ones(2)}, "two or more"),
    ],
)
def test_learning_curve_refuses_wrong_shapes(counts, scores, message):
    with pytest.raises(ValueError, match=message):
        plots.plot_learning_curve(counts, scores)


def test_comparison_shows_every_draw_and_the_interval():
    ax = plots.plot_comparison(_comparison(SCORES))
    for row, values in enumerate(SCORES.values()):
        line, _, (bar,) = ax.containers[row]
        assert line.get_xdata()[0] == pytest.approx(np.mean(values))
        np.testing.assert_allclose(bar.get_segments()[0][:, 0], _t_interval(values), rtol=1e-6)
        assert any(np.array_equal(dots.get_xdata(), values) for dots in ax.lines)
    assert [text.get_text() for text in ax.get_yticklabels()] == list(SCORES)
    bottom, top = ax.get_ylim()
    assert bottom > top  # the first arm is on top


def test_intervals_refuse_a_mean_outside():
    with pytest.raises(ValueError, match=r"'a'.*0\.7"):
        plots.plot_intervals({"a": (0.7, 0.4, 0.6)})
    with pytest.raises(ValueError, match="at least one"):
        plots.plot_intervals({})


def test_history_marks_the_best_step():
    history = _history()
    loss, rate = plots.plot_history(history)
    lines = {line.get_label(): line for line in loss.lines}
    np.testing.assert_array_equal(lines["validation"].get_ydata(), history.val_loss)
    np.testing.assert_array_equal(lines["each step"].get_ydata(), history.train_loss)
    assert "best: step 20" in lines
    assert any(list(line.get_xdata()) == [20, 20] for line in loss.lines)
    np.testing.assert_array_equal(rate.lines[-1].get_ydata(), history.lr)


def test_history_without_validation():
    history = _history(best_step=None)
    history.eval_step, history.val_loss = [], []
    loss, _ = plots.plot_history(history)
    assert {line.get_label() for line in loss.lines} == {"each step", "training"}


def test_confusion_writes_counts_and_shades_rows_by_fraction():
    ax = plots.plot_confusion(CONFUSION, ["ant", "bee", "cow"])
    assert [int(text.get_text()) for text in ax.texts] == CONFUSION.ravel().tolist()
    np.testing.assert_allclose(ax.images[0].get_array().sum(axis=1), 1)
    with pytest.raises(ValueError, match="3 class names, got 2"):
        plots.plot_confusion(CONFUSION, ["ant", "bee"])
    with pytest.raises(ValueError, match=r"\(K, K\), got \(3, 2\)"):
        plots.plot_confusion(CONFUSION[:, :2])


def test_reliability_points_are_the_bins_counted_by_hand():
    ax = plots.plot_reliability(PROBABILITIES, TARGETS, num_bins=5)
    confidence, error, points = PROBABILITIES.max(axis=1), 0.0, []
    for low in np.arange(5) / 5:
        inside = (confidence > low) & (confidence <= low + 0.2)
        if inside.any():
            right = (PROBABILITIES[inside].argmax(axis=1) == TARGETS[inside]).mean()
            points.append((confidence[inside].mean(), right))
            error += inside.mean() * abs(right - confidence[inside].mean())
    drawn = [(c[0].get_xdata()[0], c[0].get_ydata()[0]) for c in ax.containers]
    np.testing.assert_allclose(drawn, points)
    assert f"{error:.3f}" in ax.get_title(loc="left")


def _pixels(axes):
    return np.stack([np.asarray(ax.images[0].get_array()) for ax in axes.flat if ax.images])


def test_images_of_every_kind_look_the_same():
    torch = pytest.importorskip("torch")
    levels = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
    unit = (levels / 255).astype(np.float32)
    expected = _pixels(plots.show_images(levels, ncols=3))
    np.testing.assert_allclose(expected, levels / 255)
    signed = torch.tensor(unit).permute(0, 3, 1, 2) * 2 - 1
    for images in (unit, np.moveaxis(unit, 3, 1), signed, signed.requires_grad_()):
        np.testing.assert_allclose(_pixels(plots.show_images(images)), expected, atol=1e-6)


def test_images_lie_in_a_grid_with_titles():
    axes = plots.show_images(np.zeros((5, 8, 8)), titles=list("abcde"), ncols=3)
    assert axes.shape == (2, 3)
    assert [ax.get_title() for ax in axes.flat] == ["a", "b", "c", "d", "e", ""]
    with pytest.raises(ValueError, match="5 titles"):
        plots.show_images(np.zeros((5, 8, 8)), titles=["a"])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.full((2, 8, 8), 16.0), r"\[16, 16\]"),
        (np.full((2, 8, 8), np.nan), "nan"),
        (np.full((2, 8, 8), -1.5), r"-1\.5"),
        (np.full((2, 8, 8), 200, dtype=np.int64), "int64"),
        (np.zeros((3, 32, 32)), r"images\[None\]"),
        (np.zeros((32, 32, 3)), r"images\[None\]"),
        (np.zeros((8, 8)), r"\(8, 8\)"),
        (np.zeros((2, 4, 8, 8)), r"\(2, 4, 8, 8\)"),
        (np.zeros((0, 3, 8, 8)), r"N >= 1"),
    ],
)
def test_images_that_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        plots.show_images(images)


def test_alt_shows_one_picture_with_its_text_and_closes_it(monkeypatch):
    shown = []
    monkeypatch.setattr(display, "in_notebook", lambda: True)
    monkeypatch.setattr(display, "publish", shown.append)
    text = 'Loss falls from 2 to "0.05" & stays <there>.'
    figure, ax = plots.subplots()
    ax.plot([1, 2])
    assert plots.alt(ax, text) is None
    assert not plt.fignum_exists(figure.number)
    (bundle,) = shown
    assert bundle["text/plain"] == text
    tag = bundle["text/html"]
    assert html.unescape(re.search(r'alt="([^"]*)"', tag)[1]) == text
    data = base64.b64decode(re.search(r"base64,([^\"]*)", tag)[1])
    with Image.open(io.BytesIO(data)) as picture:
        assert f'width="{picture.width}" height="{picture.height}"' in tag


def test_alt_takes_axes_arrays_and_figures(monkeypatch):
    for make in (
        lambda: plots.show_images(np.zeros((2, 8, 8))),
        lambda: plots.subplots()[0],
        lambda: plots.subplots(1, 2)[1],
    ):
        plots.alt(make(), "Nothing yet.")  # silent in a plain script
        assert not plt.get_fignums()


def test_alt_refuses_what_cannot_be_read_or_shown():
    _, ax = plots.subplots()
    with pytest.raises(ValueError, match="text must say"):
        plots.alt(ax, " ")
    with pytest.raises(TypeError, match="list"):
        plots.alt([ax], "An axes in a list.")


def test_same_figure_same_bytes():
    first, second = (display.png(plots.plot_confusion(CONFUSION).figure) for _ in range(2))
    assert first == second


def test_colours_of_photographs_are_kept_and_those_of_charts_hardly_change():
    def drawn_and_shown(figure):
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=figure.dpi, bbox_inches="tight")
        pictures = (Image.open(buffer), Image.open(io.BytesIO(display.png(figure))))
        return [np.asarray(picture.convert("RGB"), dtype=float) for picture in pictures]

    noise = np.random.default_rng(0).random((8, 32, 32, 3))
    np.testing.assert_array_equal(*drawn_and_shown(plots.show_images(noise)[0, 0].figure))
    drawn, shown = drawn_and_shown(EVERY_PLOT["learning curve"]().figure)
    assert np.abs(drawn - shown).mean() < 0.5


def test_style_ends_with_its_block():
    before = matplotlib.rcParams["figure.dpi"]
    with plots.style():
        assert matplotlib.rcParams["figure.dpi"] == figures._STYLE["figure.dpi"] != before
    assert matplotlib.rcParams["figure.dpi"] == before
