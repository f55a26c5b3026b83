"""Graded questions: inputs, reference answers, and a check of the questions themselves.

A lesson's ``questions.py`` holds a list ``QUESTIONS`` of :class:`Question`. A learner's check
runs a question whole; a grader uses it in two halves, :func:`respond` beside the untrusted
answer, and :meth:`Question.measured`, :meth:`Question.expect` and
:func:`tlcourse.plain_data.compare` where the grade is given.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tlcourse import locations
from tlcourse.plain_data import compare, from_json, to_json, to_plain

PUBLIC_SEED = 0  # the cases of the learner's check; a class secret seeds those of the grader
_SEEDS = (PUBLIC_SEED, 1, 2, b"a class secret")  # on which a question is tried
_MIN_WRONG = 3


@dataclass(frozen=True, kw_only=True)
class Question:
    """One graded question of an exercise.

    Attributes:
        id: lesson and question, such as ``"03.q1"``.
        title: a few words.
        points: > 0.
        cases: from a random generator to a list of tuples of positional arguments, plain data.
            A list with the one empty tuple, ``[()]``, asks for a value, not for a function.
        expected: the right result for the arguments of a case; plain data.
        apply: ``apply(answer, *case)``, what is done with an answer; ``answer(*case)`` if None.
            It runs beside the untrusted answer, so it must give raw results and no verdicts, and
            neither it nor what it calls may be part of the reference.
        measure: ``measure(raw, *case)``, what is compared with ``expected``; ``raw`` itself, the
            result of the answer, if None. It runs where the grade is given.
        rtol, atol: tolerances, ``|got - expected| <= atol + rtol * |expected|``.
        hint: shown with a wrong answer; text, or ``hint(case, expected, got) -> str``.
        wrong: name -> known wrong answer, which every check must reject; at least three.
        right: a right answer, where ``expected`` itself cannot serve as one (with ``apply``).
        manual: free text, marked by hand with the rubric.
        rubric: what earns how many points; for manual questions.
    """

    id: str
    title: str
    points: float
    cases: Callable[[np.random.Generator], list[tuple]] | None = None
    expected: Callable[..., Any] | None = None
    apply: Callable[..., Any] | None = None
    measure: Callable[..., Any] | None = None
    rtol: float = 1e-6
    atol: float = 1e-8
    hint: str | Callable[[tuple, Any, Any], str] = ""
    wrong: dict[str, Any] = field(default_factory=dict)
    right: Any = None
    manual: bool = False
    rubric: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d\d\.q[1-9]\d?", self.id):
            raise ValueError(f"question id must look like '03.q1', got {self.id!r}")
        if not self.points > 0:
            raise ValueError(f"{self.id}: points must be > 0, got {self.points}")
        if self.rtol < 0 or self.atol < 0:
            raise ValueError(f"{self.id}: tolerances must be >= 0, got {self.rtol}, {self.atol}")
        if self.manual and not self.rubric.strip():
            raise ValueError(f"{self.id}: a manual question needs a rubric")
        if not self.manual and (self.cases is None or self.expected is None):
            raise ValueError(f"{self.id}: a question needs cases and expected, or manual=True")

    def draw_cases(self, seed: int | bytes) -> list[tuple]:
        """Draw the inputs: the same for the same seed, and independent between questions.

        Raises:
            TypeError: if a case is not a tuple of plain data.
            ValueError: if there is no case, or the question is marked by hand.
        """
        if self.cases is None:
            raise ValueError(f"{self.id} is marked by hand and has no cases")
        text = seed if isinstance(seed, bytes) else str(seed).encode()
        digest = hashlib.sha256(self.id.encode() + b"\0" + text).digest()
        drawn = self.cases(np.random.default_rng(int.from_bytes(digest, "big")))
        if not isinstance(drawn, list) or not drawn:
            raise ValueError(f"{self.id}: cases must give a list that is not empty, got {drawn!r}")
        for case in drawn:
            if not isinstance(case, tuple):
                raise TypeError(f"{self.id}: each case must be a tuple, got {type(case).__name__}")
        return [tuple(to_plain(list(case), f"{self.id} case {i}")) for i, case in enumerate(drawn)]

    def run(self, answer: Any, case: tuple) -> Any:
        """Apply an answer to a copy of one case. Whatever the answer raises comes through.

        Raises:
            NotPlainError: if the result is not plain data.
        """
        raw = to_plain(respond(answer, copy.deepcopy(case), self.apply))
        return self.measured(raw, case)

    def measured(self, raw: Any, case: tuple) -> Any:
        """What is compared with :meth:`expect`, from the plain result of an answer.

        Raises:
            ValueError: if ``measure`` cannot read the result.
        """
        if self.measure is None:
            return raw
        try:
            return to_plain(self.measure(raw, *copy.deepcopy(case)))
        except Exception as error:
            raise ValueError(f"the result cannot be read: {error}") from error

    def expect(self, case: tuple) -> Any:
        """The right result for one case, as plain data."""
        if self.expected is None:
            raise ValueError(f"{self.id} is marked by hand and expects no value")
        return to_plain(self.expected(*copy.deepcopy(case)))


def respond(answer: Any, case: tuple, apply: Callable[..., Any] | None) -> Any:
    """What an answer gives for a case; all of a question that runs beside untrusted code."""
    if apply is not None:
        return apply(answer, *case)
    if not case and not callable(answer):
        return answer
    return answer(*case)


def load_questions(path: Path) -> list[Question]:
    """Read ``QUESTIONS`` of a ``questions.py``; kept until the file changes.

    Raises:
        ValueError: if the file has no list ``QUESTIONS``, or an id twice.
    """
    stat = path.stat()
    stamp = (stat.st_mtime_ns, stat.st_size)
    if path in _loaded and _loaded[path][0] == stamp:
        return _loaded[path][1]
    spec = importlib.util.spec_from_file_location(f"tlcourse_{path.parent.name}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    questions = getattr(module, "QUESTIONS", None)
    if not isinstance(questions, list) or not all(isinstance(q, Question) for q in questions):
        raise ValueError(f"{path}: expected a list QUESTIONS of Question")
    ids = [question.id for question in questions]
    for question_id in ids:
        if ids.count(question_id) > 1:
            raise ValueError(f"{path}: question id {question_id!r} appears twice")
        if not path.parent.name.startswith(question_id[:2] + "_"):
            raise ValueError(f"{path}: question id {question_id!r} is of another lesson")
    _loaded[path] = (stamp, questions)
    return questions


def find_question(question_id: str) -> Question:
    """The question with this id, from the lesson's ``questions.py``.

    Raises:
        ValueError: if there is none; lists the ids of that lesson, or the lessons.
    """
    text = str(question_id)
    folders = locations.lessons_dir()
    paths = sorted(folders.glob("[0-9][0-9]_*/questions.py"))
    found = [path for path in paths if path.parent.name.startswith(text[:2] + "_")]
    if len(text) < 2 or not found:
        lessons = ", ".join(path.parent.name[:2] for path in paths) or "none"
        raise ValueError(f"no lesson has a question {text!r}; lessons with questions: {lessons}")
    questions = load_questions(found[0])
    for question in questions:
        if question.id == text:
            return question
    known = ", ".join(question.id for question in questions)
    raise ValueError(f"no question {text!r}; lesson {text[:2]} has {known}")


def selfcheck(question: Question) -> list[str]:
    """Find what is wrong with a question itself, for the tests of a lesson.

    On several seeds: the cases are plain data, the same for the same seed and others for
    another; the reference is deterministic and passes; every known wrong answer is rejected,
    and not because it cannot be called; an answer that returns one constant is rejected.

    Returns:
        Problems, one sentence each; empty if there is none.
    """
    if question.manual:
        return []
    problems = []
    if len(question.wrong) < _MIN_WRONG:
        problems.append(f"needs {_MIN_WRONG} known wrong answers, has {len(question.wrong)}")
    drawn = {seed: question.draw_cases(seed) for seed in _SEEDS}
    texts = {seed: _as_text(cases) for seed, cases in drawn.items()}
    if any(_as_text(question.draw_cases(seed)) != texts[seed] for seed in _SEEDS):
        problems.append("draws other cases for the same seed")
    is_value = all(case == () for cases in drawn.values() for case in cases)
    if not is_value and len(set(texts.values())) < len(_SEEDS):
        problems.append("draws the same cases for another seed")
    for seed in _SEEDS:
        expected = [question.expect(case) for case in drawn[seed]]
        if _as_text(expected) != _as_text([question.expect(case) for case in drawn[seed]]):
            problems.append(f"seed {seed!r}: the reference is not deterministic")
        problems += _answer_problems(question, drawn[seed], expected, is_value, seed)
    return [f"{question.id}: {problem}" for problem in dict.fromkeys(problems)]


def _answer_problems(
    question: Question, cases: list[tuple], expected: list, is_value: bool, seed: int | bytes
) -> list[str]:
    problems = []
    right = question.right
    if right is None and question.apply is None:
        right = expected[0] if is_value else question.expected
    if right is not None and (reason := _rejection(question, right, cases, expected)):
        problems.append(f"seed {seed!r}: rejects the right answer: {reason}")
    if (
        question.apply is None
        and not is_value
        and not _rejection(question, lambda *_: expected[0], cases, expected)
    ):
        problems.append(f"seed {seed!r}: accepts a constant; let the expected values differ")
    for name, answer in question.wrong.items():
        reason = _rejection(question, answer, cases, expected)
        if not reason:
            problems.append(f"seed {seed!r}: accepts the known wrong answer {name!r}")
        elif reason.startswith("cannot"):
            problems.append(f"the known wrong answer {name!r} {reason}")
    return problems


def _rejection(question: Question, answer: Any, cases: list[tuple], expected: list) -> str:
    """Why an answer is rejected; empty if it is accepted."""
    for case, want in zip(cases, expected, strict=True):
        try:
            got = question.run(answer, case)
        except NotImplementedError:
            return "cannot be a wrong answer: it counts as not attempted"
        except Exception as error:
            # Raised by the call itself, not inside the answer: a mistake of the question.
            depth = len(list(traceback.walk_tb(error.__traceback__)))
            inside = depth > 3  # this function, `run` and `respond`
            if isinstance(error, TypeError) and not inside:
                return f"cannot be called: {error}"
            return f"{type(error).__name__}: {error}"
        difference = compare(got, want, question.rtol, question.atol)
        if difference is not None:
            return _with_hint(question, case, want, got, str(difference))
    return ""


def _with_hint(question: Question, case: tuple, expected: Any, got: Any, reason: str) -> str:
    if not callable(question.hint):
        return reason
    text = question.hint(case, expected, got)  # must not raise on a known wrong answer
    assert isinstance(text, str), f"{question.id}: the hint must be text, got {text!r}"
    return reason


def _as_text(value: Any) -> str:
    """The JSON that carries a value between processes, after a round trip."""
    plain = to_plain(value)
    text = json.dumps(to_json(plain))
    again = json.dumps(to_json(from_json(json.loads(text))))
    assert again == text, f"plain data does not survive JSON: {plain!r}"
    return text


_loaded: dict[Path, tuple[tuple[int, int], list[Question]]] = {}
