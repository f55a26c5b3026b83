"""Results made by hand and entered as `tlcourse grade run` enters them; no submission is run."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from tlcourse.grading import journal, run, store
from tlcourse.grading.class_folder import ClassFolder
from tlcourse.grading.gradebook import open_gradebook
from tlcourse.grading.plan import Plan
from tlcourse.grading.release import load_plan
from tlcourse.grading.scoring import Mark, Outcome, unreadable

NAME = "00_start_here"  # questions q1 (1 point), q2 (2 points) and q3 (2 points, free text)
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


@cache
def _plan(root: Path) -> tuple[Plan, NotebookNode]:
    return load_plan(ClassFolder(root), NAME)


def notebook(folder: ClassFolder, free_text: str = "") -> NotebookNode:
    """The exercise as a student hands it in, with this answer to the free-text question."""
    nb = nbformat.read(folder.release(NAME) / f"{NAME}.ipynb", as_version=4)
    if free_text:
        cell = next(c for c in nb.cells if c.metadata.get("nbgrader", {}).get("solution")
                    and c.cell_type == "markdown")  # fmt: skip
        cell.source = free_text
    return nb


def outcome(q1: float, q2: float, **changes: Any) -> Outcome:
    """A graded outcome from the points of the two questions that are checked."""
    marks = [_mark("00.q1", q1, 1.0), _mark("00.q2", q2, 2.0)]
    marks.append(Mark("00.q3", "manual", None, 2.0, by_hand=True))
    return Outcome(**{"status": "graded", "reason": "", "marks": marks, **changes})


def enter(
    folder: ClassFolder,
    student: str,
    result: Outcome | str,
    nb: NotebookNode | None = None,
    at: datetime = NOON,
) -> None:
    """Hand in and grade: store the notebook, then write journal, notebook and gradebook.

    Args:
        folder: of the class.
        student: id.
        result: what came out, or the reason why it cannot be read.
        nb: the notebook; the exercise as it was handed out if None.
        at: when it was handed in.
    """
    plan, release = _plan(folder.root)
    data = nbformat.writes(nb or notebook(folder)).encode()
    store.store_notebook(folder, student, NAME, data, at)
    made = unreadable(plan, result) if isinstance(result, str) else result
    entry = journal.Entry(student, hashlib.sha256(data).hexdigest(), plan.sha256, str(at), made)
    book = journal.Journal(folder.results(NAME))
    book.add(entry)
    book.close()
    run.enter_all(folder, plan, release, {student: entry})


def mark_by_hand(
    folder: ClassFolder, student: str, points: float, comment: str | None = None
) -> None:
    """What formgrader writes when a teacher marks the free text."""
    with open_gradebook(folder) as book:
        grade = book.find_grade("00-q3-answer", NAME, NAME, student)
        grade.manual_score, grade.needs_manual_grade = points, False
        book.find_comment("00-q3-answer", NAME, NAME, student).manual_comment = comment
        book.db.commit()


def _mark(question: str, points: float, of: float) -> Mark:
    cases = 8
    right = round(cases * points / of)
    status = "right" if right == cases else "partly right" if right else "wrong"
    return Mark(question, status, points, of, right=right, cases=cases)
