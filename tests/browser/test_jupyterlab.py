"""A learner's first minutes, in real JupyterLab in headless Chromium.

Screenshots are kept in artifacts/browser.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("playwright")
pytest.importorskip("jupyterlab")

import lab
import nbformat
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image
from playwright.sync_api import Locator

from tlcourse.cli import FIRST_NOTEBOOK

pytestmark = pytest.mark.browser

# Where the products are; the tests can be tried on those of another folder.
PRODUCTS = Path(os.environ.get("TLCOURSE_PRODUCTS", lab.REPO))
LESSON = "notebooks/part1_foundations/01_why_transfer.ipynb"
EXERCISE = "notebooks/exercises/03_gradients_by_hand.ipynb"
SOLUTION = "solutions/03_gradients_by_hand.ipynb"
QUIZ = lab.REPO / "lessons" / "01_why_transfer" / "quiz.toml"
WIDGETS = "widgets.ipynb"
WIDGET_CELLS = (
    """
import tlcourse as tl
def show(step):
    print(f"this is step {step}")
tl.widgets.stepper(show, 4)
""",
    """
def show_ink(image):
    print(f"ink {image.sum():g} of 1024")
pad = tl.widgets.draw_digit(show_ink, example=1)
""",
)
PICTURES = lab.REPO / "artifacts" / "browser"


@pytest.fixture(scope="module")
def browser(chromium_path):
    with lab.browser(chromium_path) as launched:
        yield launched


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """JupyterLab on a copy of the notebooks; its folder, address and token."""
    root = tmp_path_factory.mktemp("course")
    for name in ("notebooks", "solutions"):
        if (PRODUCTS / name).is_dir():
            shutil.copytree(PRODUCTS / name, root / name)
    cells = [new_code_cell(source.strip()) for source in WIDGET_CELLS]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    notebook = new_notebook(cells=cells, metadata=kernel)
    (root / WIDGETS).write_text(nbformat.writes(notebook), encoding="utf-8")
    with lab.server(root) as (address, token):
        yield root, address, token


@pytest.fixture
def open_notebook(course, browser):
    """Opens a notebook; afterwards nothing may have gone wrong in its page."""
    root, address, token = course
    opened = []

    def open_it(path: str) -> lab.Notebook:
        if not (root / path).is_file():
            pytest.skip(f"{path} is not there; run `make build`")
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        notebook = lab.Notebook(page, address, token)
        opened.append(notebook)
        notebook.open(path)
        return notebook

    yield open_it
    for notebook in opened:
        notebook.page.close()
        assert notebook.problems == []


def _picture(notebook: lab.Notebook, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    notebook.page.screenshot(path=PICTURES / f"{name}.png")


def _cells(root: Path, path: str) -> list[dict]:
    return json.loads((root / path).read_text(encoding="utf-8"))["cells"]


def test_the_course_opens_on_its_first_notebook(course, browser):
    root, address, token = course
    if not (root / FIRST_NOTEBOOK).is_file():
        pytest.skip(f"{FIRST_NOTEBOOK} is not there; run `make build`")
    page = browser.new_page()
    notebook = lab.Notebook(page, address, token)
    page.goto(f"{address}/?token={token}")
    page.wait_for_url(f"**/lab/tree/{FIRST_NOTEBOOK}**", timeout=60_000)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=120_000)
    # No question about news, no update notice, no dialog about a kernel.
    page.wait_for_timeout(1000)
    assert page.locator(".jp-Dialog, .Toastify__toast").count() == 0
    assert notebook.problems == []
    page.close()


def test_lesson_runs_and_its_explorer_and_quiz_answer(course, open_notebook):
    notebook = open_notebook(LESSON)
    notebook.run_all(timeout_seconds=300)
    assert notebook.errors() == []
    page = notebook.page
    for image in page.locator(".jp-Notebook .jp-OutputArea img").all():
        assert len(image.get_attribute("alt") or "") > 10

    _move_a_slider(notebook)
    _picture(notebook, "lesson_01_explorer")

    question = tomllib.loads(QUIZ.read_text(encoding="utf-8"))["question"][0]
    quiz = page.locator(".tl-quiz")
    options = quiz.locator(".tl-option")
    right = question["answer"]
    wrong = 1 if right == 0 else 0
    check = quiz.get_by_role("button", name="Check").first
    options.nth(wrong).click()
    check.click()
    quiz.locator(".tl-wrong").wait_for()
    # Again, with the keyboard alone.
    options.nth(right).get_by_role("radio").focus()
    page.keyboard.press("Space")
    quiz.locator(".tl-wrong").wait_for(state="detached")
    check.focus()
    page.keyboard.press("Enter")
    quiz.locator(".tl-right").wait_for()
    assert "1 of" in quiz.locator('[role="status"]').last.inner_text()
    assert [radio.is_checked() for radio in options.get_by_role("radio").all()].count(True) == 1
    _picture(notebook, "lesson_01_quiz")
    assert notebook.errors() == []


def _move_a_slider(notebook: lab.Notebook) -> None:
    """Press an arrow key on the first slider; the figure below it must become another."""
    page = notebook.page
    output = page.locator(".jp-Cell").filter(has=page.locator(".noUi-handle")).first
    handle, figure = output.locator(".noUi-handle").first, output.locator("img").first
    before = figure.get_attribute("src")
    at_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
    handle.focus()
    page.keyboard.press("ArrowLeft" if at_end else "ArrowRight")
    page.wait_for_function(
        "([image, before]) => image.isConnected ? image.src !== before : true",
        arg=[figure.element_handle(), before],
        timeout=20_000,
    )
    assert figure.get_attribute("src") != before
    assert len(figure.get_attribute("alt") or "") > 10
    figure.scroll_into_view_if_needed()


def test_the_saved_lesson_reads_well_before_anything_runs(open_notebook):
    notebook = open_notebook(LESSON)
    if not notebook.page.locator(".jp-OutputArea-output").count():
        pytest.skip(f"{LESSON} is a draft without outputs")
    for image in notebook.page.locator(".jp-OutputArea img").all():
        assert len(image.get_attribute("alt") or "") > 10
        assert image.evaluate("image => image.naturalWidth") > 100
    answers = notebook.page.locator(".jp-OutputArea details")
    assert answers.count() == len(tomllib.loads(QUIZ.read_text(encoding="utf-8"))["question"])
    answers.first.locator("summary").click()
    assert answers.first.get_by_text("Right.").is_visible()
    assert "Error displaying widget" not in notebook.page.inner_text(".jp-Notebook")


def test_stepper_and_drawing_pad(open_notebook, tmp_path):
    notebook = open_notebook(WIDGETS)
    notebook.run_all()
    assert notebook.errors() == []
    page, (stepper, pad) = notebook.page, (notebook.cell(0), notebook.cell(1))

    stepper.get_by_role("button", name="Next").click()
    stepper.get_by_text("this is step 1").wait_for()
    stepper.locator(".widget-play button").first.click()
    stepper.get_by_text("this is step 3").wait_for()
    assert stepper.get_by_role("button", name="Next").is_disabled()

    first = pad.get_by_title("row 1, column 1", exact=True)
    before = _ink(pad)
    first.click()
    pad.get_by_text(f"ink {before + 16} of").wait_for()
    assert first.evaluate("cell => getComputedStyle(cell).backgroundColor") == "rgb(0, 0, 0)"
    first.focus()
    page.keyboard.press("Enter")
    pad.get_by_text(f"ink {before} of").wait_for()
    pad.get_by_role("button", name="Clear").click()
    pad.get_by_text("ink 0 of").wait_for()

    _upload(pad, tmp_path / "letter.txt", b"Dear teacher")
    pad.get_by_text("letter.txt: expected a whole image").wait_for()
    assert _ink(pad) == 0
    buffer = io.BytesIO()
    sheet = Image.new("L", (300, 300), "white")
    sheet.paste(0, (120, 40, 160, 240))  # a one
    sheet.save(buffer, "PNG")
    _upload(pad, tmp_path / "one.png", buffer.getvalue())
    pad.get_by_text("ink 0 of").wait_for(state="detached")
    assert pad.get_by_text("expected a whole image").count() == 0
    _picture(notebook, "drawing_pad")


def _ink(pad: Locator) -> int:
    return int(re.search(r"ink (\d+) of", pad.locator("pre").last.inner_text())[1])


def _upload(pad: Locator, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pad.page.expect_file_chooser() as chooser:
        pad.get_by_role("button", name="Upload").click()
    chooser.value.set_files(path)


def test_exercise_tells_right_from_wrong(course, open_notebook):
    root, _, _ = course
    notebook = open_notebook(EXERCISE)
    cells = _cells(root, EXERCISE)
    place = {cell["id"]: number for number, cell in enumerate(cells)}
    answers = [cell["id"] for cell in cells if re.fullmatch(r"03-q\d-answer", cell["id"])]
    solved, spoilt, *_ = [name for name in answers if name.replace("answer", "check") in place]
    notebook.write(place[solved], _solution(root, solved))
    notebook.write(place[spoilt], _nonsense(cells[place[spoilt]]))
    notebook.run_all(timeout_seconds=180)
    assert notebook.errors() == []

    results = {
        name: notebook.cell(place[name.replace("answer", "check")])
        .locator('.jp-OutputArea [role="status"]')
        .first.inner_text()
        for name in answers
        if name.replace("answer", "check") in place
    }
    assert _verdict(results.pop(solved)) == "right"
    told = results.pop(spoilt)
    assert _verdict(told) == "wrong"
    assert "expected" in told  # and it says what differs
    assert results and {_verdict(text) for text in results.values()} == {"not attempted"}

    # The last check in view shows the one above it too: right, then wrong.
    notebook.cell(place[spoilt.replace("answer", "check")]).scroll_into_view_if_needed()
    _picture(notebook, "exercise_03")


def _solution(root: Path, cell_id: str) -> str:
    """The answer of the solutions notebook, read when the test runs."""
    if not (root / SOLUTION).is_file():
        pytest.skip(f"{SOLUTION} is not there; run `make build`")
    (source,) = [cell["source"] for cell in _cells(root, SOLUTION) if cell["id"] == cell_id]
    return "".join(source)


def _nonsense(cell: dict) -> str:
    """A function of the same name that cannot be right."""
    name = re.search(r"^def (\w+)\(", "".join(cell["source"]), re.MULTILINE)[1]
    return f"def {name}(*anything):\n    return 'no idea'"


def _verdict(text: str) -> str:
    """The status in the first line of a check's output."""
    return re.search(r": (not attempted|right|wrong)\s*$", text.splitlines()[0])[1]
