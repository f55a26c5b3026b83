"""A teacher marks free text in nbgrader's formgrader; report and feedback take it over.

Screenshots are kept in artifacts/browser.
"""

from __future__ import annotations

import csv
import shutil
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("playwright")
pytest.importorskip("jupyterlab")
pytest.importorskip("nbgrader")

import lab
from nbformat.v4 import new_markdown_cell, new_raw_cell
from playwright.sync_api import Page, Route

from tests.grading.made import NAME, enter, notebook, outcome
from tlcourse.grading import class_folder
from tlcourse.grading.class_folder import ClassFolder
from tlcourse.grading.feedback import write_feedback
from tlcourse.grading.gradebook import open_gradebook
from tlcourse.grading.release import release
from tlcourse.grading.report import report

pytestmark = [pytest.mark.browser, pytest.mark.slow]

PICTURES = lab.REPO / "artifacts" / "browser"
ANSWER = "00-q3-answer"
ATTACK = "document.title='acted';document.cookie='acted=1'"


@pytest.fixture(scope="module")
def school(tmp_path_factory) -> ClassFolder:
    """A class with an honest and a hostile answer to the free-text question of exercise 00."""
    folder = class_folder.create(tmp_path_factory.mktemp("class") / "school")
    release(folder, NAME[:2])
    text = "Birds from photographs. The pictures differ in *one* way: the light."
    enter(folder, "ada", outcome(1, 1), notebook(folder, text))
    hostile = notebook(folder, f'<img src="x" onerror="{ATTACK}">')
    hostile.cells += [new_markdown_cell(f"<script>{ATTACK}</script>\n\n[a](javascript:{ATTACK})")]
    hostile.cells += [new_raw_cell(f"<script>{ATTACK}</script>")]
    enter(folder, "mallory", outcome(0, 0), hostile)
    # Graded before text was made inert: formgrader's own wall has to hold alone.
    path = folder.autograded("mallory", NAME) / f"{NAME}.ipynb"
    shutil.copy(folder.submitted("mallory", NAME) / path.name, path)
    return folder


@pytest.fixture
def page(school, chromium_path) -> Iterator[Page]:
    """A page at formgrader's list of assignments; nothing but MathJax is asked of others."""
    with lab.server(school.root) as (address, token), lab.browser(chromium_path) as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        outside: list[str] = []

        def keep_inside(route: Route) -> None:
            if route.request.url.startswith(address):
                route.continue_()
            else:
                outside.append(route.request.url)
                route.abort()

        page.route("**", keep_inside)
        page.goto(f"{address}/formgrader?token={token}")
        yield page
        assert {url.split("/mathjax/")[0] for url in outside} <= {
            "https://cdnjs.cloudflare.com/ajax/libs"
        }


def test_a_mark_given_in_formgrader_counts(school, page):
    assert "2 answers need a mark by hand" in report(school)
    page.get_by_role("link", name=NAME, exact=True).first.wait_for()
    origin = page.url.split("/formgrader")[0]

    _open(page, origin, school, "mallory")
    assert "<script>" in page.locator(".nbgrader_cell, .text_cell").last.inner_text()
    page.wait_for_timeout(500)
    assert page.title() != "acted" and "acted" not in page.evaluate("document.cookie")

    _open(page, origin, school, "ada")
    cell = page.locator(".nbgrader_cell").filter(has=page.locator(f"[id='{ANSWER}']"))
    assert "Birds from photographs" in cell.inner_text()
    assert cell.locator("em").inner_text() == "one"
    cell.locator(f"[id='{ANSWER}']").fill("1.5")
    cell.locator(f"[id='{ANSWER}-comment']").fill("And what does **the light** change?")
    page.keyboard.press("Tab")
    _wait_for_mark(school)
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / "formgrader.png")

    text = report(school)
    assert "1 answer needs a mark by hand" in text  # mallory's
    with (school.reports / "gradebook.csv").open(newline="") as file:
        rows = {row["student"]: row for row in csv.DictReader(file)}
    assert rows["ada"]["total"] == "3.50" and rows["ada"][f"{NAME} status"] == "graded"
    ada, _ = write_feedback(school, NAME)
    html = ada.read_text(encoding="utf-8")
    assert "3.5 of 5 points" in html and "<strong>the light</strong>" in html


def _open(page: Page, origin: str, school: ClassFolder, student: str) -> None:
    """Open a student's submission, by way of the list of all."""
    page.goto(f"{origin}/formgrader/gradebook/{NAME}/{NAME}")
    with open_gradebook(school) as book:
        number = book.find_submission_notebook(NAME, NAME, student).id
    page.locator(f"a[href*='{number}']").first.click()
    page.locator(f"[id='{ANSWER}']").wait_for()
    page.locator(".score-saved").first.wait_for(state="attached")
    page.wait_for_load_state("networkidle")


def _wait_for_mark(school: ClassFolder, max_seconds: float = 20) -> None:
    end = time.monotonic() + max_seconds
    while time.monotonic() < end:
        with open_gradebook(school) as book:
            grade = book.find_grade(ANSWER, NAME, NAME, "ada")
            comment = book.find_comment(ANSWER, NAME, NAME, "ada")
            if grade.manual_score == 1.5 and comment.manual_comment:
                return
        time.sleep(0.2)
    raise AssertionError(f"formgrader saved no mark in {max_seconds} s")
