"""Outcomes into nbgrader's gradebook. Only the process that grades a class writes it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tlcourse.grading.class_folder import ClassFolder
from tlcourse.grading.scoring import Mark, Outcome


@contextlib.contextmanager
def open_gradebook(folder: ClassFolder) -> Iterator[Any]:
    """nbgrader's ``Gradebook`` of the class, closed at the end."""
    from nbgrader.api import Gradebook
    from sqlalchemy.exc import SAWarning

    logging.getLogger("alembic").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SAWarning)  # of nbgrader's own queries
        with _programs_of_this_python():
            book = Gradebook(folder.gradebook_url, folder.settings().course_id)
        try:
            yield book
        finally:
            book.close()


@contextlib.contextmanager
def _programs_of_this_python() -> Iterator[None]:
    """nbgrader calls alembic by its name, which lies beside the Python that runs."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def answer_cell(mark: Mark) -> str:
    """nbgrader's id of the cell that holds the answer."""
    return f"{mark.id.replace('.', '-')}-answer"


def grade_cell(mark: Mark) -> str:
    """nbgrader's id of the cell that carries the points: the answer's own, if marked by hand."""
    return answer_cell(mark) if mark.by_hand else f"{mark.id.replace('.', '-')}-check"


def enter_students(book: Any, folder: ClassFolder) -> None:
    """Take over names and addresses from ``students.csv``."""
    for student in folder.students():
        book.update_or_create_student(
            student.id,
            first_name=student.first_name or None,
            last_name=student.last_name or None,
            email=student.email or None,
        )


def enter_outcome(
    book: Any,
    name: str,
    student: str,
    outcome: Outcome,
    *,
    submitted_at: datetime | None,
    answered: set[str],
    new: bool,
) -> None:
    """Enter one outcome; what a person has marked or written stays.

    Args:
        book: of :func:`open_gradebook`.
        name: of the exercise.
        student: id; entered if it is not known.
        outcome: of the submission.
        submitted_at: by the teacher's clock.
        answered: questions marked by hand that hold an answer.
        new: the submission is another one than the last that was entered; marks given by hand
            are then kept, and flagged for review.
    """
    from nbgrader.api import MissingEntry

    try:
        book.find_student(student)
    except MissingEntry:
        book.add_student(student)
    stamp = submitted_at.astimezone(UTC).replace(tzinfo=None) if submitted_at else None
    book.update_or_create_submission(name, student, timestamp=stamp)
    grades, comments = _cells(book, name, student)
    for mark in outcome.marks:
        empty = mark.by_hand and mark.id not in answered
        _enter_mark(grades[grade_cell(mark)], mark, empty, new)
        words = "No response." if empty and outcome.status != "unreadable" else mark.words()
        comment = comments.get(answer_cell(mark))
        if comment is not None:
            comment.auto_comment = None if mark.status == "manual" and not empty else words
    book.db.commit()


def set_late_penalty(book: Any, folder: ClassFolder, name: str, student: str) -> float:
    """Work out again what lateness costs, from the score as it is now; returns the points."""
    notebook = book.find_submission_notebook(name, name, student)
    stamp = notebook.assignment.timestamp
    settings = folder.settings()
    deadline = settings.deadline(name[:2], student)
    seconds = 0.0
    if stamp is not None and deadline is not None:
        seconds = (stamp.replace(tzinfo=UTC) - deadline).total_seconds()
    penalty = settings.late.penalty(notebook.score, seconds)
    notebook.late_submission_penalty = penalty or None
    book.db.commit()
    return penalty


def _enter_mark(grade: Any, mark: Mark, empty: bool, new: bool) -> None:
    before = grade.auto_score
    score = 0.0 if empty else mark.points
    grade.auto_score = score
    if grade.manual_score is not None:
        # A person has given points. They stay, but what they were given for has changed.
        changed = new or (before is not None and score is not None and before != score)
        grade.needs_manual_grade = grade.needs_manual_grade or changed
    else:
        grade.needs_manual_grade = score is None


def _cells(book: Any, name: str, student: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Grades and comments of a submission by the name of their cell, in two queries."""
    notebook = book.find_submission_notebook(name, name, student)
    grades = {grade.name: grade for grade in notebook.grades}
    comments = {comment.name: comment for comment in notebook.comments}
    return grades, comments
