"""Quizzes, explorers, steppers and the drawing pad, without a browser.

They run on ipywidgets 7.7.1 and 8; in a real page they are tested in tests/browser.
"""

from __future__ import annotations

import io
import re
import warnings

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from tlcourse import display, drawing, locations, quizzes, widgets


@pytest.fixture
def shown(monkeypatch):
    """What is shown, as (widget, text, picture), as if in a notebook."""
    calls = []
    monkeypatch.setattr(display, "show_widget", lambda *parts: calls.append(parts))
    return calls


def _all(widget, kind):
    """Every widget of a kind below one, in the order of the page."""
    found = [widget] if isinstance(widget, kind) else []
    for child in getattr(widget, "children", ()):
        found += _all(child, kind)
    return found


# Quiz


GOOD = """
[[question]]
text = 'What is $\\theta_0$ to `fit`?'
options = ['a *start*', 'a prior', 'both']
answer = 2
why = ['Not only.', 'Not only.', 'Few steps stay near it.']
[[question]]
text = "Which number is honest?"
options = ["the best of five", "the mean of five draws"]
answer = 1
why = ["Biased **upwards**.", "With an interval."]
[[question]]
text = "Is 1 < 2 & 3?"
options = ["yes", "no"]
answer = 0
why = ["So it is.", "Try it."]
"""


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    """A folder of lessons with one quiz, "07"."""
    folder = tmp_path / "07_layers"
    folder.mkdir()
    (folder / "quiz.toml").write_text(GOOD)
    monkeypatch.setattr(locations, "lessons_dir", lambda: tmp_path)
    return folder / "quiz.toml"


def _rows(quiz_widget):
    """Radio buttons of each question."""
    return [_all(form, ipywidgets.RadioButtons) for form in quiz_widget.children[1:-1]]


def _check(quiz_widget, question):
    _all(quiz_widget, ipywidgets.Button)[question].click()
    return _all(quiz_widget.children[1 + question], ipywidgets.HTMLMath)[-1].value


def test_quiz_judges_at_once_and_can_be_tried_again(lesson, shown):
    quizzes.quiz("07")
    (widget, _, _), score = shown[0], shown[0][0].children[-1]
    rows = _rows(widget)
    assert [len(row) for row in rows] == [3, 2, 2]
    assert "0 of 3 right" in score.value
    assert "Choose" in _check(widget, 0)
    rows[0][0].index = 0
    assert re.search(r"Wrong.*Not only\.", _check(widget, 0))
    rows[0][2].index = 0
    assert [row.index for row in rows[0]] == [None, None, 0]
    feedback = _check(widget, 0)
    assert re.search(r"Right.*Few steps stay near it\.", feedback)
    rows[2][0].index = 0
    assert "Right" in _check(widget, 2)
    assert "2 of 3 right" in score.value
    rows[0][1].index = 0
    assert re.search(r"Wrong", _check(widget, 0))
    assert "1 of 3 right" in score.value


def test_choosing_again_takes_the_old_judgement_away(lesson, shown):
    quizzes.quiz("07")
    widget = shown[0][0]
    rows = _rows(widget)
    rows[1][0].index = 0
    assert "Wrong" in _check(widget, 1)
    rows[1][1].index = 0
    assert _all(widget.children[2], ipywidgets.HTMLMath)[-1].value == ""


def test_quiz_without_a_kernel_folds_out_its_answers(lesson, shown):
    quizzes.quiz("07")
    _, text, picture = shown[0]
    assert "3 questions" in text
    assert picture.count("<details>") == 3
    assert r"$\theta_0$" in picture and "<code>fit</code>" in picture
    assert "Is 1 &lt; 2 &amp; 3?" in picture
    answers = picture.split("<details>")[1]
    assert re.search(r"Wrong\.\s*Not only.*Wrong\.\s*Not only.*Right\.</b>\s*Few steps", answers)


def test_markdown_of_quizzes():
    assert quizzes.to_html("**a** *b* `<c*d*e>`") == "<b>a</b> <i>b</i> <code>&lt;c*d*e&gt;</code>"
    # Mathematics keeps its stars and backslashes; "<" must not open a tag.
    assert quizzes.to_html(r"$a * b * c < \beta$ and 2 * 3 * 4") == (
        r"$a * b * c &lt; \beta$ and 2 * 3 * 4"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("answer = 2", "answer = 3", r"question 1: answer .* 0 to 2, got 3"),
        ("answer = 2", "answer = true", "question 1: answer .* got True"),
        ("answer = 2", "", r"question 1: expected the keys .*answer"),
        ("answer = 2", "answer = 2\nhint = 'x'", "question 1: .*hint"),
        ("['a *start*', 'a prior', 'both']", "'both'", "options must be a list"),
        ("'a prior', 'both'", "'a prior', 'a prior'", "different options"),
        ('["yes", "no"]', '["yes", "no", "maybe"]', "question 3: .* each of 3 options, got 2"),
        ('"Is 1 < 2 & 3?"', '" "', "question 3, text: expected a text"),
        ("'Not only.', 'Not only.'", "'Not only.', 5", r"question 1, why\[1\]: expected a text"),
        (r"'What is $\theta_0$ to `fit`?'", r'"What is $\theta_0$?"', "'single quotes'"),
        (r"'What is $\theta_0$ to `fit`?'", r'"What is $\nabla L$?"', "'single quotes'"),
        (r"'What is $\theta_0$ to `fit`?'", r'"What is $\alpha$?"', "'single quotes'"),
        ("[[question]]\ntext = \"Is", "[[other]]\ntext = \"Is", "only .*question"),
        (GOOD, "", "question"),
        (GOOD, "[[question]]\n" + GOOD.split("[[question]]")[1], "3 to 5 questions, got 1"),
    ],
)  # fmt: skip
def test_a_wrong_quiz_file_says_where_and_what_was_expected(lesson, old, new, message):
    assert old in GOOD
    lesson.write_text(GOOD.replace(old, new))
    with pytest.raises(ValueError, match=message) as caught:
        quizzes.quiz("07")
    assert str(lesson) in str(caught.value)


def test_unknown_lesson_lists_those_with_a_quiz(lesson):
    with pytest.raises(ValueError, match=r"'42'.*07"):
        quizzes.quiz("42")


def test_every_quiz_of_the_course_is_valid():
    for path in sorted(locations.lessons_dir().glob("*/quiz.toml")):
        questions = quizzes.read_quiz(path)
        quizzes.quiz_widget(questions)
        # The place of the right option must not give it away.
        assert len({question.answer for question in questions}) > 1, path


# Explorer


def _line(labels, arm="scratch"):
    _, ax = plt.subplots()
    ax.plot([0, labels])
    print(f"{labels} labels, {arm}")


def test_explorer_draws_with_the_values_of_its_controls(shown):
    calls = []

    def draw(**values):
        calls.append(values)
        _line(**values)

    widgets.explore(
        draw,
        labels=widgets.slider(2, 50, 1, 10, "labels per class"),
        arm=widgets.choice(["scratch", "transfer"], "transfer"),
    )
    (widget, text, picture) = shown[0]
    assert calls == [{"labels": 10, "arm": "transfer"}]
    assert text.startswith("Explorer: labels per class = 10, arm = transfer.")
    assert "10 labels, transfer" in picture and picture.count("<img") == 1
    assert 'alt="Figure for labels per class = 10, arm = transfer"' in picture
    slider, arm, pane = widget.children
    assert pane.value == picture
    slider.value = 20
    arm.value = "scratch"
    assert calls[-1] == {"labels": 20, "arm": "scratch"}
    assert "20 labels, scratch" in pane.value and pane.value.count("<img") == 1
    assert not plt.get_fignums()


def test_explorer_takes_displayed_figures_too(shown, monkeypatch):
    from tlcourse import plots

    def draw(k):
        _, ax = plots.subplots()
        plots.alt(ax, f"A figure of {k}.")

    monkeypatch.setattr(display, "in_notebook", lambda: True)
    outputs = []
    monkeypatch.setattr(display, "publish", outputs.append)
    widgets.explore(draw, k=widgets.slider(0, 3))
    assert 'alt="A figure of 0."' in outputs[0]["text/html"]
    assert not plt.get_fignums()


def test_error_of_the_first_drawing_is_the_error_of_the_cell(shown):
    def draw(k):
        plt.figure()
        raise ZeroDivisionError("k")

    with pytest.raises(ZeroDivisionError):
        widgets.explore(draw, k=widgets.slider(0, 3))
    assert not shown and not plt.get_fignums()


def test_later_errors_appear_in_place_of_the_picture(shown):
    def draw(k):
        print(1 / (2 - k))

    widgets.explore(draw, k=widgets.slider(0, 3))
    slider, pane = shown[0][0].children
    slider.value = 2
    assert 'role="alert"' in pane.value and "ZeroDivisionError" in pane.value
    slider.value = 3
    assert "-1.0" in pane.value and "alert" not in pane.value


def test_build_tries_both_ends_of_every_control(shown, monkeypatch):
    def at_the_end(k):
        print(1 / (3 - k))

    def of_one_choice(name):
        print({"a": 1}[name])

    monkeypatch.setenv("TLCOURSE_BUILD", "1")
    with pytest.raises(RuntimeError, match="fails at k=3"):
        widgets.explore(at_the_end, k=widgets.slider(0, 3))
    with pytest.raises(RuntimeError, match="fails at name='b'"):
        widgets.explore(of_one_choice, name=widgets.choice(["a", "b"]))
    monkeypatch.delenv("TLCOURSE_BUILD")
    widgets.explore(at_the_end, k=widgets.slider(0, 3))


def test_slow_drawings_wait_until_the_slider_is_let_go(shown, monkeypatch):
    ticks = iter([0.0, 5.0, 10.0, 10.01])
    monkeypatch.setattr(widgets.time, "perf_counter", lambda: next(ticks))
    widgets.explore(lambda k: print(k), k=widgets.slider(0, 3))
    slider = shown[0][0].children[0]
    slider.value = 1
    assert slider.continuous_update is False
    slider.value = 2
    assert slider.continuous_update is True


def test_sliders_keep_the_kind_of_their_numbers():
    assert isinstance(widgets.slider(0, 3).value, int)
    fine = widgets.slider(0.0, 1.0, 0.05, 0.5)
    assert isinstance(fine.value, float) and fine.readout_format == ".2f"
    assert widgets.choice([2, 5, 10], 5, drag=True).value == 5
    assert widgets.choice([2, 5, 10], drag=True).label == "2", "the first option has its text, too"
    assert widgets.choice([("half", 0.5), ("all", 1.0)]).value == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: widgets.slider(3, 3), "min=3, max=3"),
        (lambda: widgets.slider(0, 3, 0), "step must be > 0, got 0"),
        (lambda: widgets.slider(0, 3, 1, 4), r"in \[0, 3\], got 4"),
        (lambda: widgets.choice([]), "must not be empty"),
        (lambda: widgets.choice(["a"], "b"), "got 'b'"),
        (lambda: widgets.stepper(print, 1), ">= 2, got 1"),
        (lambda: widgets.stepper(print, 3, interval_seconds=0), "> 0, got 0"),
        (lambda: widgets.draw_digit(example=10), "got 10"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(TypeError, match="labels must be a slider"):
        widgets.explore(_line, labels=3)


# Stepper


def test_stepper_walks_and_keeps_what_it_drew(shown):
    calls = []

    def draw(step):
        calls.append(step)
        print(f"<{step}>")

    widgets.stepper(draw, 4)
    widget, _, picture = shown[0]
    (slider,), (back, forward) = (
        _all(widget, ipywidgets.IntSlider),
        _all(widget, ipywidgets.Button),
    )
    pane = widget.children[-1]
    assert sorted(calls) == [0, 3] and "&lt;0&gt;" in picture == pane.value
    assert back.disabled and not forward.disabled
    forward.click()
    forward.click()
    assert slider.value == 2 and "&lt;2&gt;" in pane.value
    back.click()
    assert "&lt;1&gt;" in pane.value
    slider.value = 3
    assert forward.disabled and "&lt;3&gt;" in pane.value
    assert sorted(calls) == [0, 1, 2, 3]


def test_an_error_at_the_last_step_is_the_error_of_the_cell(shown):
    with pytest.raises(IndexError):
        widgets.stepper(lambda step: [1, 2][step], 3)


# Drawing pad


def test_pad_draws_toggles_and_predicts(shown):
    seen = []
    pad = widgets.draw_digit(lambda image: (seen.append(image), print(image.sum())), example=1)
    widget, _, picture = shown[0]
    assert pad.image.shape == (8, 8) and pad.image.min() == 0 and pad.image.max() == 16
    assert f"{pad.image.sum()}" in picture
    cells = [b for b in _all(widget, ipywidgets.Button) if not b.description]
    before = pad.image.sum()
    assert len(cells) == 64 and pad.image[0, 0] == 0
    assert len({cell.tooltip for cell in cells}) == 64
    cells[0].click()
    assert pad.image[0, 0] == 16 and cells[0].style.button_color == "rgb(0, 0, 0)"
    np.testing.assert_array_equal(seen[-1], pad.image)
    cells[0].click()
    assert pad.image[0, 0] == 0 and pad.image.sum() == before
    (examples,) = _all(widget, ipywidgets.Dropdown)
    examples.value = 8
    np.testing.assert_array_equal(pad.image, drawing.example_image(8))
    next(b for b in _all(widget, ipywidgets.Button) if b.description == "Clear").click()
    assert not pad.image.any()


def test_pad_refuses_what_is_no_image_of_a_digit(shown):
    pad = widgets.draw_digit()
    with pytest.raises(ValueError, match=r"\(8, 8\).*\(7, 8\)"):
        pad.draw(np.zeros((7, 8)))
    with pytest.raises(ValueError, match=r"\[0, 16\].*\[0, 17\]"):
        pad.draw(np.eye(8) * 17)


def test_pad_as_tensor(shown):
    torch = pytest.importorskip("torch")
    tensor = widgets.draw_digit(example=4).to_tensor()
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor.numpy(), drawing.example_image(4))


def test_examples_are_ten_different_digits():
    images = np.stack([drawing.example_image(digit) for digit in range(10)])
    assert images.shape == (10, 8, 8)
    assert len({image.tobytes() for image in images}) == 10


def test_examples_are_read_as_their_digit_by_a_model_of_real_digits():
    """A nearest-neighbour classifier on scikit-learn's digits names at least nine of ten."""
    from sklearn.datasets import load_digits
    from sklearn.neighbors import KNeighborsClassifier

    digits = load_digits()
    model = KNeighborsClassifier(5).fit(digits.data, digits.target)
    images = [drawing.example_image(digit).ravel() for digit in range(10)]
    assert (model.predict(images) == np.arange(10)).sum() >= 9


def _file(image, kind="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def _picture(digit, size=40, ink=20, paper=230):
    """An example digit, enlarged, somewhere on a sheet of paper."""
    part = np.kron(drawing.example_image(digit) / 16, np.ones((size, size)))
    sheet = np.full((700, 500), float(paper))
    sheet[100 : 100 + 8 * size, 60 : 60 + 8 * size] += part * (ink - paper)
    return sheet.astype(np.uint8)


@pytest.mark.parametrize("digit", [0, 4, 9])
@pytest.mark.parametrize("ink, paper", [(20, 230), (255, 0)])
def test_upload_finds_the_digit_wherever_it_is(digit, ink, paper):
    image = drawing.image_from_file(_file(_picture(digit, ink=ink, paper=paper)))
    expected = drawing.example_image(digit)
    # It is centred anew: compare at the best of three shifts to either side.
    errors = [np.abs(np.roll(image, by, axis=1) - expected).mean() for by in (-1, 0, 1)]
    assert image.min() >= 0 and image.max() <= 16
    assert min(errors) < 1.5


def test_upload_takes_jpeg_transparency_and_large_pictures():
    sheet = _picture(7)
    expected = drawing.image_from_file(_file(sheet))
    np.testing.assert_allclose(
        drawing.image_from_file(_file(sheet, "JPEG", quality=95)), expected, atol=1
    )
    alpha = np.zeros((*sheet.shape, 4), dtype=np.uint8)
    alpha[..., 3] = 230 - sheet  # black ink on nothing
    np.testing.assert_allclose(drawing.image_from_file(_file(alpha)), expected, atol=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a whole image"),
        (b"hello", "expected a whole image"),
        (_file(_picture(3))[:-300], "expected a whole image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(60), "expected a whole image"),
        (_file(np.full((50, 50), 7, dtype=np.uint8)), "all is one shade"),
        (bytes(drawing.MAX_UPLOAD_BYTES + 1), "at most 10 MB"),
        (_file(np.zeros((8000, 8000), dtype=np.uint8)), "8000 x 8000 pixels"),
    ],
)
def test_a_bad_upload_says_why(content, message):
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
        warnings.simplefilter("error")
        drawing.image_from_file(content)


@pytest.mark.parametrize("version", [7, 8])
def test_upload_of_either_ipywidgets(shown, version):
    pad = widgets.draw_digit()
    before = pad.image
    for name, content in (("<b>.txt", b"hello"), ("seven.png", _file(_picture(7)))):
        new = (
            {name: {"metadata": {"name": name}, "content": content}}
            if version == 7
            else ({"name": name, "content": memoryview(content)},)
        )
        pad._upload({"new": new})
        message = _all(pad.widget, ipywidgets.HTML)[1].value
        if name == "seven.png":
            assert message == ""
            np.testing.assert_array_equal(pad.image, drawing.image_from_file(content))
        else:
            assert "&lt;b&gt;.txt: expected a whole image" in message
            np.testing.assert_array_equal(pad.image, before)


# Where they are shown


def test_in_a_plain_script_one_line_is_printed(lesson, capsys):
    quizzes.quiz("07")
    widgets.explore(_line, labels=widgets.slider(0, 3))
    widgets.stepper(print, 2)
    pad = widgets.draw_digit(print)
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == ["Quiz", "Explorer:", "Showing", "Drawing"]
    assert pad.image.shape == (8, 8)


def test_an_output_has_the_widget_and_two_renderings_without_it(monkeypatch):
    outputs = []
    monkeypatch.setattr(display, "in_notebook", lambda: True)
    monkeypatch.setattr(display, "publish", outputs.append)
    widget = ipywidgets.HTML("x")
    display.show_widget(widget, "a text", "<img>")
    assert outputs == [
        {
            "application/vnd.jupyter.widget-view+json": {
                "version_major": 2,
                "version_minor": 0,
                "model_id": widget.model_id,
            },
            "text/html": "<img><p><em>a text</em></p>",
            "text/plain": "a text",
        }
    ]


CELLS = """
import matplotlib.pyplot as plt
from tlcourse import display, plots, widgets
assert display.in_notebook()

def draw(k):
    plots.subplots()[1].plot([0, k])
    print("k is", k)
widgets.explore(draw, k=widgets.slider(0, 3))
pad = widgets.draw_digit(lambda image: plots.alt(plots.subplots()[1], "Two figures."))
plots.alt(plots.subplots()[1], "One figure.")
pad
"""


def test_in_a_real_kernel_each_thing_is_shown_once():
    nbclient = pytest.importorskip("nbclient")
    from nbformat.v4 import new_code_cell, new_notebook

    nb = new_notebook(cells=[new_code_cell(CELLS)])
    nbclient.NotebookClient(nb, timeout=120, kernel_name="python3").execute()
    explorer, pad, figure = nb.cells[0].outputs
    for output in (explorer, pad):
        assert "application/vnd.jupyter.widget-view+json" in output.data
        assert output.data["text/html"].count("<img") == 1
    assert "k is 0" in explorer.data["text/html"]
    assert 'alt="Two figures."' in pad.data["text/html"]
    assert figure.data["text/plain"] == "One figure."
    assert "image/png" not in figure.data  # the picture is in the file once
