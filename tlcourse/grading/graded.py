"""The graded notebook: what teacher and student look at, made safe to look at.

It holds the student's cells in the student's order, with nbgrader's metadata from the notebook
that was handed out, the outcome below each check, and of the student's outputs only text and
pictures.
"""

from __future__ import annotations

import base64
import binascii
import copy
import textwrap
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook, new_output

from tlcourse.grading.plan import Plan
from tlcourse.grading.scoring import Mark, Outcome

_LONGEST_TEXT = 10_000  # characters of one output
_LARGEST_PICTURE = 2_000_000  # characters of base64
_MOST_OUTPUTS = 50
_PNG = b"\x89PNG\r\n\x1a\n"


def graded_notebook(
    plan: Plan, release: NotebookNode, submitted: NotebookNode | None, outcome: Outcome
) -> NotebookNode:
    """Put a submission and its outcome together.

    Args:
        plan: of the exercise.
        release: the notebook that was handed out.
        submitted: what :func:`tlcourse.grading.submission.parse` gave; None if it is unreadable.
        outcome: of the submission.

    Returns:
        A valid notebook with every graded cell of the release exactly once.
    """
    from tlcourse.grading.formgrader import inert  # it needs nbconvert, which is slow to load

    marked = [cell for cell in release.cells if "nbgrader" in cell.metadata]
    ours = {cell.metadata.nbgrader.grade_id: cell for cell in marked}
    if submitted is None:
        cells = [new_markdown_cell(inert(f"**{outcome.reason}**")), *copy.deepcopy(release.cells)]
    else:
        cells = _students_cells(submitted, ours)
    marks = {f"{mark.id.replace('.', '-')}-check": mark for mark in outcome.marks}
    for number, cell in enumerate(cells):
        info = cell.metadata.get("nbgrader", {})
        cell.id = info.get("grade_id") or f"cell-{number}"
        if info.get("grade_id") in marks:
            cell.outputs = [_verdict(marks[info.grade_id])]
    nb = new_notebook(cells=cells)
    nb.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nb.metadata.language_info = {"name": "python"}
    nbformat.validate(nb)
    return nb


def answered_questions(plan: Plan, release: NotebookNode, nb: NotebookNode) -> set[str]:
    """Questions marked by hand whose cell says something else than when it was handed out."""
    before, after = _sources(release), _sources(nb)
    found = set()
    for question in plan.questions:
        cell = f"{question.id.replace('.', '-')}-answer"
        if question.manual and after.get(cell) not in ("", None, before.get(cell)):
            found.add(question.id)
    return found


def _sources(nb: NotebookNode) -> dict[str, str]:
    marked = [cell for cell in nb.cells if "nbgrader" in cell.metadata]
    return {cell.metadata.nbgrader.grade_id: cell.source.strip() for cell in marked}


def _students_cells(submitted: NotebookNode, ours: dict[str, NotebookNode]) -> list[NotebookNode]:
    from tlcourse.grading.formgrader import inert

    cells, seen = [], set()
    for theirs in submitted.cells:
        cell = copy.deepcopy(theirs)
        claim = cell.metadata.pop("claims", None)
        known = ours.get(claim)
        if known is not None and claim not in seen and known.cell_type == cell.cell_type:
            seen.add(claim)
            cell.metadata = copy.deepcopy(known.metadata)
            if known.metadata.nbgrader.locked:
                cell.source = known.source
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = _safe_outputs(cell.outputs)
        elif cell.cell_type == "markdown":
            cell.source = inert(cell.source)
        else:  # raw: nbconvert would hand it to the browser
            cell = new_markdown_cell(inert(textwrap.indent(cell.source, "    ")))
        cells.append(cell)
    for grade_id, known in ours.items():  # deleted ones come back, in their order, at the end
        if grade_id not in seen:
            cells.append(copy.deepcopy(known))
    return cells


def _verdict(mark: Mark) -> NotebookNode:
    points = f"{mark.points:g} of {mark.of:g} points"
    return new_output("stream", name="stdout", text=f"{mark.id}: {mark.words()}. {points}.\n")


def _safe_outputs(outputs: Any) -> list[NotebookNode]:
    safe = []
    for output in outputs[:_MOST_OUTPUTS] if isinstance(outputs, list) else []:
        made = _safe_output(output) if isinstance(output, dict) else None
        if made is not None:
            safe.append(made)
    return safe


def _safe_output(output: dict) -> NotebookNode | None:
    """Text or a PNG picture of an output; None if it has neither."""
    if isinstance(output.get("traceback"), list):
        text = f"{_text(output.get('ename'))}: {_text(output.get('evalue'))}\n"
        return new_output("stream", name="stderr", text=text)
    if "text" in output:
        name = "stderr" if output.get("name") == "stderr" else "stdout"
        return new_output("stream", name=name, text=_text(output["text"]))
    data = output.get("data")
    if not isinstance(data, dict):
        return None
    picture = _picture(data.get("image/png"))
    if picture:
        return new_output("display_data", data={"image/png": picture})
    if "text/plain" in data:
        return new_output("display_data", data={"text/plain": _text(data["text/plain"])})
    return None


def _text(value: Any) -> str:
    if isinstance(value, list):
        value = "".join(part for part in value if isinstance(part, str))
    text = value if isinstance(value, str) else ""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + " ..."


def _picture(value: Any) -> str:
    """Base64 of a PNG, or ""."""
    if isinstance(value, list):
        value = "".join(part for part in value if isinstance(part, str))
    if not isinstance(value, str) or len(value) > _LARGEST_PICTURE:
        return ""
    try:
        raw = base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError):
        return ""
    return base64.b64encode(raw).decode("ascii") if raw.startswith(_PNG) else ""
