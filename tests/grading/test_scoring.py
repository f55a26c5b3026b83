"""Points and words for what a worker brings back, and nothing of the submission's own words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tlcourse.grading.plan import Plan
from tlcourse.grading.scoring import WORDS, Mark, outcome_from_json, score, unreadable
from tlcourse.plain_data import to_json
from tlcourse.questions import Question


def double(x: float) -> float:
    return 2 * x


@pytest.fixture
def plan() -> Plan:
    cases = [(1.0,), (2.0,), (3.0,), (4.0,)]
    question = Question(id="99.q1", title="t", points=2, cases=lambda rng: cases, expected=double)
    free = Question(id="99.q2", title="t", points=3, manual=True, rubric="all or nothing")
    expected = [double(*case) for case in cases]
    return Plan("99_made_up", [question, free], [], {}, {}, {"99.q1": cases},
                {"99.q1": expected}, (), "sha")  # fmt: skip


def brought(**parts: Any) -> dict[str, Any]:
    empty = {"values": {}, "errors": {}, "no_answer": {}, "stopped": [], "failed": {},
             "finished": True, "seconds": 0.1}  # fmt: skip
    return empty | {key: value if key in ("stopped", "finished", "failed") else {"99.q1": value}
                    for key, value in parts.items()}  # fmt: skip


def marked(plan: Plan, **parts: Any) -> Mark:
    return score(plan, brought(**parts)).marks[0]


RIGHT = {str(i): 2.0 * (i + 1) for i in range(4)}


def test_all_right(plan: Plan) -> None:
    mark = marked(plan, values=RIGHT)
    assert (mark.status, mark.points, mark.right, mark.cases) == ("right", 2.0, 4, 4)


def test_credit_for_each_case(plan: Plan) -> None:
    mark = marked(plan, values=RIGHT | {"1": 5.0})
    assert (mark.status, mark.points) == ("partly right", 1.5)
    assert mark.words() == "right on 3 of 4 hidden inputs"


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ({"values": dict.fromkeys("0123", 7.0)}, "wrong"),
        ({}, "not run"),
        ({"no_answer": "NotImplementedError"}, "not attempted"),
        ({"no_answer": "NameError"}, "no answer"),
        ({"no_answer": "ZeroDivisionError"}, "raised"),
        ({"errors": {"0": ["NotImplementedError", "99.q1: write"]}}, "not attempted"),
        ({"errors": {"0": ["ValueError", "text"]}}, "raised"),
        ({"errors": {"0": ["MemoryError", ""]}}, "memory limit"),
        ({"errors": {"0": ["NotPlainError", "a Net"]}}, "not plain"),
        *(
            ({"stopped": [{"kind": "question", "which": "99.q1", "reason": reason}]}, status)
            for reason, status in [("time", "time limit"), ("memory", "memory limit"),
                                   ("crash", "crashed"), ("exit", "ended the process"),
                                   ("output", "output limit")]
        ),
    ],
)  # fmt: skip
def test_every_failure_has_its_word_and_no_point(plan: Plan, parts: dict, status: str) -> None:
    mark = marked(plan, **parts)
    assert (mark.status, mark.points) == (status, 0.0)
    assert mark.words().startswith(WORDS[status])


@pytest.mark.parametrize(
    "value",
    [
        {"array": {"dtype": "O", "shape": [1], "base64": "gASVAA=="}},
        {"array": {"dtype": "<f8", "shape": [10**9, 10**9], "base64": ""}},
        {"array": {"dtype": "<f8", "shape": [-1], "base64": ""}},
        {"array": {"dtype": "U", "shape": [1], "text": [["x"]]}},
        {"dict": {"__eq__": True}},
        [[[[[[[[[[[[[[[[[[[[[[[[[2.0]]]]]]]]]]]]]]]]]]]]]]]]],
        "2.0", True, None, float("nan"), float("inf"), 10**30, -(2**70), [], {}, "\ud800",
    ],
)  # fmt: skip
def test_no_value_is_right_by_being_strange(plan: Plan, value: Any) -> None:
    assert marked(plan, values=dict.fromkeys("0123", value)).points == 0.0


def test_a_case_that_was_not_asked_changes_nothing(plan: Plan) -> None:
    assert marked(plan, values={"7": 2.0, "-1": 8.0, "x": 2.0}).points == 0.0


def test_arrays_where_numbers_are_wanted(plan: Plan) -> None:
    assert marked(plan, values={k: to_json(np.array(v)) for k, v in RIGHT.items()}).points == 2.0
    wide = {k: to_json(np.full(3, v)) for k, v in RIGHT.items()}
    assert marked(plan, values=wide).points == 0.0


def test_a_student_reads_nothing_that_a_submission_wrote(plan: Plan) -> None:
    leak = "input was 1.0 2.0"
    for parts in (
        {"errors": {"0": [leak, leak]}},
        {"no_answer": leak},
        {"errors": {"0": ["ValueError", leak]}, "failed": {"3": [leak, leak]}},
    ):
        outcome = score(plan, brought(**parts))
        assert "input was" not in outcome.marks[0].words() + outcome.status + outcome.reason
    assert marked(plan, errors={"0": ["ValueError", leak]}).words().endswith("(ValueError)")


def test_free_text_waits_for_a_person(plan: Plan) -> None:
    mark = score(plan, brought(values=RIGHT)).marks[1]
    assert (mark.status, mark.points, mark.of, mark.by_hand) == ("manual", None, 3, True)


def test_what_was_stopped_is_said(plan: Plan) -> None:
    stop = {"kind": "cell", "which": 4, "reason": "time"}
    outcome = score(plan, brought(values=RIGHT, stopped=[stop], finished=False))
    assert outcome.status == "graded, parts were stopped"
    assert outcome.reason == "cell 5: it took too long; it was not run to its end"
    assert outcome.marks[0].points == 2.0


def test_an_unreadable_submission_has_a_reason_and_no_points(plan: Plan) -> None:
    outcome = unreadable(plan, "the file is empty")
    assert (outcome.status, outcome.reason) == ("unreadable", "the file is empty")
    assert [mark.points for mark in outcome.marks] == [0.0, 0.0]


def test_json_and_back(plan: Plan) -> None:
    outcome = score(plan, brought(values=RIGHT, failed={"3": ["NameError", "x"]}))
    assert outcome_from_json(outcome.to_json()) == outcome


def test_measure_runs_where_the_grade_is_given(plan: Plan) -> None:
    question = Question(
        id="99.q1",
        title="t",
        points=2,
        cases=lambda rng: [(4,)],
        expected=lambda n: {"sum": n},
        measure=lambda raw, n: {"sum": sum(raw)},
    )
    other = Plan("99_made_up", [question], [], {}, {}, {"99.q1": [(4,)]},
                 {"99.q1": [{"sum": 4}]}, (), "sha")  # fmt: skip
    assert marked(other, values={"0": [1, 3]}).points == 2.0
    # The verdict itself is not taken from a submission, and a result that cannot be read is wrong.
    for value in ({"dict": {"sum": 4}}, [1, "3"], None):
        assert marked(other, values={"0": value}).points == 0.0
