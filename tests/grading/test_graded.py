"""The graded notebook: every graded cell once, the hand-out's own checks, safe outputs."""

from __future__ import annotations

import base64
import copy
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_output

from tests.grading.synthetic import ROOT, answer_index, cell_of, solved
from tlcourse.grading.graded import answered_questions, graded_notebook
from tlcourse.grading.plan import Plan, make_plan
from tlcourse.grading.scoring import Mark, Outcome, unreadable
from tlcourse.grading.submission import parse

NAME = "00_start_here"
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"0" * 20).decode()


@pytest.fixture
def release() -> NotebookNode:
    path = ROOT / "notebooks" / "exercises" / f"{NAME}.ipynb"
    return nbformat.read(path, as_version=4)


@pytest.fixture
def plan(release: NotebookNode) -> Plan:
    return make_plan(NAME, release, b"s" * 32)


@pytest.fixture
def outcome(plan: Plan) -> Outcome:
    marks = [Mark(q.id, "manual", None, q.points, True) if q.manual
             else Mark(q.id, "partly right", q.points / 2, q.points, right=1, cases=2)
             for q in plan.questions]  # fmt: skip
    return Outcome("graded", "", marks)


def graded(plan: Plan, release: NotebookNode, nb: NotebookNode, outcome: Outcome) -> NotebookNode:
    return graded_notebook(plan, release, parse(nbformat.writes(nb).encode()), outcome)


def ids(nb: NotebookNode) -> list[str]:
    return [c.metadata.nbgrader.grade_id for c in nb.cells if "nbgrader" in c.metadata]


def test_the_students_cells_and_the_verdicts(plan, release, outcome) -> None:
    whole = solved(NAME)
    nb = graded(plan, release, whole, outcome)
    assert [cell.source for cell in nb.cells] == [cell.source for cell in whole.cells]
    assert ids(nb) == ids(release)
    [verdict] = cell_of(nb, "00-q2-check").outputs
    assert verdict.text == "00.q2: right on 1 of 2 hidden inputs. 1 of 2 points.\n"


def test_checks_and_points_are_those_that_were_handed_out(plan, release, outcome) -> None:
    nb = solved(NAME)
    check = cell_of(nb, "00-q1-check")
    check.source = "pass"
    check.metadata.nbgrader.points = 1000
    check.metadata.nbgrader.locked = False
    mended = cell_of(graded(plan, release, nb, outcome), "00-q1-check")
    assert mended.source == cell_of(release, "00-q1-check").source
    assert mended.metadata.nbgrader == cell_of(release, "00-q1-check").metadata.nbgrader


def test_deleted_cells_come_back_and_doubled_ones_count_once(plan, release, outcome) -> None:
    nb = solved(NAME)
    nb.cells.remove(cell_of(nb, "00-q1-check"))
    nb.cells.append(copy.deepcopy(nb.cells[answer_index(nb, "00.q1")]))
    nb.cells[-1].id = "another"
    found = graded(plan, release, nb, outcome)
    assert sorted(ids(found)) == sorted(ids(release))
    nbformat.validate(found)


def test_a_cell_of_another_kind_does_not_pass_for_an_answer(plan, release, outcome) -> None:
    nb = solved(NAME)
    cell = nb.cells[answer_index(nb, "00.q3")]
    place = answer_index(nb, "00.q3")
    nb.cells[place] = new_code_cell("print(1)", metadata=cell.metadata)
    found = graded(plan, release, nb, outcome)
    assert cell_of(found, "00-q3-answer").cell_type == "markdown"
    assert answered_questions(plan, release, found) == set()


def test_answered_is_what_differs_from_the_hand_out(plan, release, outcome) -> None:
    assert answered_questions(plan, release, graded(plan, release, release, outcome)) == set()
    whole = graded(plan, release, solved(NAME), outcome)
    assert answered_questions(plan, release, whole) == {"00.q3"}


def test_of_outputs_only_text_and_pictures_stay(plan, release, outcome) -> None:
    nb = solved(NAME)
    evil = "<script>alert(1)</script>"
    data = {"text/html": evil, "image/svg+xml": evil, "application/javascript": evil}
    cell = new_code_cell("1", outputs=[
        new_output("display_data", data=data),
        new_output("display_data", data=data | {"text/plain": "kept"}),
        new_output("display_data", data={"image/png": PNG}),
        new_output("display_data", data={"image/png": base64.b64encode(b"<svg>").decode()}),
        new_output("stream", text="x" * 50_000),
        new_output("error", ename="E", evalue="v", traceback=[evil]),
    ])  # fmt: skip
    nb.cells.append(cell)
    outputs = graded(plan, release, nb, outcome).cells[-1].outputs
    assert [o.output_type for o in outputs] == ["display_data"] * 2 + ["stream"] * 2
    assert outputs[0].data == {"text/plain": "kept"}
    assert outputs[1].data == {"image/png": PNG}
    assert len(outputs[2].text) < 11_000
    assert outputs[3].text == "E: v\n"
    assert "script" not in str(outputs)


def test_an_unreadable_submission_says_so(plan, release, tmp_path: Path) -> None:
    nb = graded_notebook(plan, release, None, unreadable(plan, "the file is empty"))
    assert nb.cells[0].source == "**the file is empty**"
    assert ids(nb) == ids(release)
    assert answered_questions(plan, release, nb) == set()
