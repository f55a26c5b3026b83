"""What goes into a sandbox holds no answer, for every exercise of the course."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat import NotebookNode

from tests.grading.synthetic import ROOT, cell_of
from tlcourse.grading.plan import PlanError, apply_source, check_call, make_plan
from tlcourse.questions import Question, load_questions

EXERCISES = sorted(path.stem for path in (ROOT / "notebooks" / "exercises").glob("*.ipynb"))
SECRET = b"s" * 32


def handed_out(name: str) -> NotebookNode:
    return nbformat.read(ROOT / "notebooks" / "exercises" / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", EXERCISES)
def test_every_exercise_has_a_plan(name: str) -> None:
    plan = make_plan(name, handed_out(name), SECRET)
    automatic = {question.id for question in plan.questions if not question.manual}
    assert {question["id"] for question in plan.asked} == automatic
    assert set(plan.checks.values()) == automatic
    for key in automatic:
        assert len(plan.inputs[key]) == len(plan.expected[key]) == len(plan.cases[key]) >= 1


@pytest.mark.parametrize("name", EXERCISES)
def test_no_code_of_a_reference_goes_into_the_sandbox(name: str) -> None:
    plan = make_plan(name, handed_out(name), SECRET)
    sent = json.dumps([plan.asked, plan.inputs])
    for question in plan.questions:
        for part in (question.expected, question.right, *question.wrong.values()):
            text = getattr(part, "__name__", "")
            if text not in ("", "<lambda>", "<listcomp>"):
                assert f"def {text}(" not in sent


def test_the_secret_decides_the_hidden_inputs() -> None:
    first, same, other = (
        make_plan("03_gradients_by_hand", handed_out("03_gradients_by_hand"), secret)
        for secret in (SECRET, SECRET, b"t" * 32)
    )
    assert first.inputs == same.inputs and first.sha256 == same.sha256
    assert first.sha256 != other.sha256
    assert all(first.inputs[key] != other.inputs[key] for key in first.inputs)


def test_the_secret_does_not_go_into_the_sandbox() -> None:
    plan = make_plan(
        "00_start_here", handed_out("00_start_here"), b"marker-of-the-class-secret-0001"
    )
    assert "marker-of" not in json.dumps([plan.asked, plan.inputs, plan.preload])


def test_check_call_finds_the_answer_and_the_names_that_its_cell_binds() -> None:
    assert check_call('right = tl.check("03.q1", f)', "03.q1") == ("f", ["right"])
    assert check_call('check("03.q1", nets[0].head)', "03.q1") == ("nets[0].head", [])
    with pytest.raises(PlanError, match=r"03\.q2"):
        check_call('tl.check("03.q1", f)', "03.q2")


def test_an_exercise_without_a_check_cell_is_refused() -> None:
    nb = handed_out("00_start_here")
    nb.cells.remove(cell_of(nb, "00-q1-check"))
    with pytest.raises(PlanError, match="00-q1-check"):
        make_plan("00_start_here", nb, SECRET)


QUESTIONS = """
import numpy as np
from tlcourse.checks import Question

def helper(x):
    return np.asarray(x) + OFFSET

OFFSET = 3

def reference(x):
    return x * 2

def honest(answer, x):
    return helper(answer(x))

def cheating(answer, x):
    return answer(x) - reference(x)

def cases(rng):
    return [(float(rng.normal()),)]

QUESTIONS = [
    Question(id="99.q1", title="t", points=1, cases=cases, expected=reference, apply=honest),
    Question(id="99.q2", title="t", points=1, cases=cases, expected=reference, apply=cheating),
]
"""


@pytest.fixture
def two_questions(tmp_path: Path) -> list[Question]:
    folder = tmp_path / "99_made_up"
    folder.mkdir()
    (folder / "questions.py").write_text(QUESTIONS)
    return load_questions(folder / "questions.py")


def test_apply_brings_what_it_uses_and_nothing_else(two_questions: list[Question]) -> None:
    source = apply_source(two_questions[0])
    space: dict = {}
    exec(source, space)
    assert space["honest"](lambda x: 2 * x, 1.0) == np.asarray(5.0)
    assert "reference" not in source and "cases" not in source and "Question" not in source


def test_apply_that_uses_the_reference_is_refused(two_questions: list[Question]) -> None:
    with pytest.raises(PlanError, match=r"99\.q2: apply uses reference"):
        apply_source(two_questions[1])
