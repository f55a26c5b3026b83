"""What a submission's answers are worth. Here, and only here, they meet the right ones."""

from __future__ import annotations

import builtins
from dataclasses import asdict, dataclass, field
from typing import Any

from tlcourse.grading.plan import Plan
from tlcourse.plain_data import compare, from_json
from tlcourse.questions import Question

# All that a student is told about hidden inputs. A submission can see them, so no word of its own
# may come back: not the text of an error, not even the name of one that it has defined.
WORDS = {
    "right": "right on all hidden inputs",
    "partly right": "right on some of the hidden inputs",
    "wrong": "wrong on the hidden inputs",
    "not attempted": "not attempted",
    "no answer": "the name that the question asks for is not defined",
    "raised": "an error was raised on hidden inputs",
    "not plain": "the answer is not made of numbers, arrays, text, lists and dicts",
    "time limit": "it took too long",
    "memory limit": "it took too much memory",
    "output limit": "it gave too much output",
    "crashed": "it crashed the Python process",
    "ended the process": "it ended the Python process",
    "interfered": "it interfered with the grading",
    "not run": "it was not reached",
    "unreadable": "the submitted file cannot be read",
    "manual": "marked by hand",
}
_REASONS = {"time": "time limit", "memory": "memory limit", "output": "output limit",
            "crash": "crashed", "exit": "ended the process", "protocol": "interfered"}  # fmt: skip
_ERRORS = {name for name, value in vars(builtins).items()
           if isinstance(value, type) and issubclass(value, BaseException)}  # fmt: skip


@dataclass(frozen=True)
class Mark:
    """The outcome of one question.

    Attributes:
        id: of the question.
        status: a key of :data:`WORDS`.
        points: 0 to ``of``; None if a person has to give them.
        of: the most that there is.
        by_hand: the question is free text.
        right, cases: hidden inputs that were right, and all.
        error: name of a built-in error that was raised, or "".
        remark: for the teacher only: text that comes from the submission.
    """

    id: str
    status: str
    points: float | None
    of: float
    by_hand: bool = False
    right: int = 0
    cases: int = 0
    error: str = ""
    remark: str = ""

    def words(self) -> str:
        """One sentence for the student."""
        text = WORDS[self.status]
        if self.status == "partly right":
            text = f"right on {self.right} of {self.cases} hidden inputs"
        return f"{text} ({self.error})" if self.error else text


@dataclass
class Outcome:
    """The outcome of one submission: what the journal keeps.

    Attributes:
        status: "graded", "graded, parts were stopped", or "unreadable".
        reason: why it is unreadable, or what was stopped.
        marks: one for each question, in order.
        failed_cells: cell number (from 1) -> name of the error, for the teacher.
    """

    status: str
    reason: str
    marks: list[Mark]
    failed_cells: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def outcome_from_json(data: dict[str, Any]) -> Outcome:
    """The inverse of :meth:`Outcome.to_json`."""
    marks = [Mark(**mark) for mark in data["marks"]]
    failed = {int(number): name for number, name in data["failed_cells"].items()}
    return Outcome(data["status"], data["reason"], marks, failed, data["seconds"])


def unreadable(plan: Plan, reason: str) -> Outcome:
    """No point for anything, and a reason."""
    marks = [Mark(q.id, "unreadable", 0.0, q.points, q.manual) for q in plan.questions]
    return Outcome("unreadable", reason, marks)


def score(plan: Plan, answers: dict[str, Any]) -> Outcome:
    """Compare what a worker brought back with what is right."""
    marks = [_manual(q) if q.manual else _mark(plan, q, answers) for q in plan.questions]
    stops = [
        f"{stop['kind']} {stop['which'] + 1 if stop['kind'] == 'cell' else stop['which']}: "
        f"{WORDS[_REASONS[stop['reason']]]}"
        for stop in answers["stopped"]
    ]
    if not answers["finished"]:
        stops.append("it was not run to its end")
    status = "graded, parts were stopped" if stops else "graded"
    failed = {int(number) + 1: error[0] for number, error in answers["failed"].items()}
    return Outcome(status, "; ".join(stops), marks, failed, answers["seconds"])


def _manual(question: Question) -> Mark:
    return Mark(question.id, "manual", None, question.points, by_hand=True)


def _mark(plan: Plan, question: Question, answers: dict[str, Any]) -> Mark:
    key = question.id
    values, errors = answers["values"].get(key, {}), answers["errors"].get(key, {})
    cases, expected = plan.cases[key], plan.expected[key]
    right = sum(
        _is_right(question, case, values[str(i)], want)
        for i, (case, want) in enumerate(zip(cases, expected, strict=True))
        if str(i) in values
    )
    error = next((e for i, e in sorted(errors.items()) if i not in values), ["", ""])
    if right == len(cases):
        status, error = "right", ["", ""]
    else:
        status, error = _status(key, answers, bool(values), error)
        status = "partly right" if right and status in ("wrong", "raised", "not plain") else status
    points = round(question.points * right / len(cases), 6)
    named = error[0] if error[0] in _ERRORS else ""
    remark = ": ".join(filter(None, error))
    return Mark(key, status, points, question.points, False, right, len(cases), named, remark)


def _status(
    key: str, answers: dict[str, Any], has_values: bool, error: list[str]
) -> tuple[str, list[str]]:
    """Why an answer is not right, and the error behind it."""
    stops = [s["reason"] for s in answers["stopped"] if s["which"] == key]
    if stops:
        return _REASONS[stops[-1]], ["", ""]
    missing = answers["no_answer"].get(key)
    if missing is not None and not has_values:
        if missing == "NotImplementedError":
            return "not attempted", ["", ""]
        return ("no answer", ["", ""]) if missing == "NameError" else ("raised", [missing, ""])
    if error[0] == "NotImplementedError" and not has_values:
        return "not attempted", ["", ""]
    if error[0] == "MemoryError":
        return "memory limit", ["", ""]
    if error[0] == "NotPlainError":
        return "not plain", ["", error[1]]
    if error[0]:
        return "raised", error
    return ("wrong", ["", ""]) if has_values else ("not run", ["", ""])


def _is_right(question: Question, case: tuple, raw: Any, expected: Any) -> bool:
    """Whether a value from a sandbox is right; whatever it holds, this gives an answer."""
    try:
        got = question.measured(from_json(raw), case)
        return compare(got, expected, question.rtol, question.atol) is None
    except (ValueError, TypeError, RecursionError, OverflowError, MemoryError):
        return False
