"""Hand out an exercise: the student's notebook, and its questions in nbgrader's gradebook."""

from __future__ import annotations

import os
from datetime import UTC
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from tlcourse import locations
from tlcourse.grading.class_folder import ClassFolder
from tlcourse.grading.gradebook import open_gradebook
from tlcourse.grading.plan import Plan, PlanError, make_plan
from tlcourse.lessons import Lesson, find_lessons


def release(folder: ClassFolder, number: str) -> Path:
    """Write ``source/``, ``release/`` and the gradebook's entry of one exercise.

    It may be repeated: a new deadline or new points are taken over, and what is graded stays.

    Args:
        folder: of the class.
        number: of the lesson, such as ``"03"``.

    Returns:
        The notebook to hand out.

    Raises:
        PlanError: if there is no such exercise, it cannot be graded, or it has other questions
            than the one that was handed out and graded before.
    """
    from tlcourse import notebooks  # it needs jupytext, which grading needs nowhere else

    lesson = _lesson(number)
    nb = notebooks.make(lesson, "exercise")
    nb.metadata.pop("tlcourse", None)
    path = hand_out(folder, lesson.name, nb)
    teacher = notebooks.make_teacher(lesson)
    teacher.metadata.pop("tlcourse", None)
    _write(teacher, folder.source(lesson.name) / f"{lesson.name}.ipynb")
    return path


def hand_out(folder: ClassFolder, name: str, nb: NotebookNode) -> Path:
    """Write a notebook into ``release/`` and its questions into the gradebook."""
    make_plan(name, nb, folder.secret())  # can it be graded at all?
    _enter(folder, name, nb)
    path = folder.release(name) / f"{name}.ipynb"
    _write(nb, path)
    return path


def released(folder: ClassFolder) -> list[str]:
    """Names of the exercises that were handed out, in order."""
    paths = (folder.root / "release").glob("*/*.ipynb")
    return sorted(path.stem for path in paths if path.stem == path.parent.name)


def load_plan(folder: ClassFolder, name: str) -> tuple[Plan, NotebookNode]:
    """The plan of an exercise that was handed out, and its notebook.

    Raises:
        PlanError: if it was not handed out, or the course has other questions now.
    """
    path = folder.release(name) / f"{name}.ipynb"
    if not path.is_file():
        raise PlanError(f"{name} was not handed out; run: tlcourse grade release {name[:2]}")
    nb = nbformat.read(path, as_version=4)
    return make_plan(name, nb, folder.secret()), nb


def _lesson(number: str) -> Lesson:
    root = locations.repo_root()
    if root is None:
        raise PlanError("exercises are handed out from a checkout of the course")
    lessons = [lesson for lesson in find_lessons(root) if lesson.has_exercise]
    for lesson in lessons:
        if number in (lesson.number, lesson.name):
            return lesson
    known = ", ".join(lesson.number for lesson in lessons)
    raise PlanError(f"no exercise {number!r}; there are: {known}")


def _enter(folder: ClassFolder, name: str, nb: NotebookNode) -> None:
    """Enter the questions as nbgrader itself does; adds its checksums to the notebook."""
    from nbgrader.preprocessors import CheckCellMetadata, ComputeChecksums, LockCells, SaveCells

    due = folder.settings().deadlines.get(name[:2])
    naive = due.astimezone(UTC).replace(tzinfo=None) if due else None  # nbgrader's way
    with open_gradebook(folder) as book:
        book.update_or_create_assignment(name, duedate=naive)
    resources: dict[str, Any] = {
        "nbgrader": {"notebook": name, "assignment": name, "db_url": folder.gradebook_url}
    }
    try:
        for step in (LockCells(), CheckCellMetadata(), ComputeChecksums(), SaveCells()):
            step.preprocess(nb, resources)
    except RuntimeError as error:  # cells were added or removed after something was graded
        raise PlanError(f"{name}: {error}") from None


def _write(nb: NotebookNode, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        nbformat.write(nb, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
