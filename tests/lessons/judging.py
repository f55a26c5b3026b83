"""What the tests of several lessons ask of a question."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tlcourse.plain_data import compare
from tlcourse.questions import Question


def first_hint(question: Question, answer: Callable[..., Any]) -> str:
    """The hint for the first case on which the answer differs."""
    for case in question.draw_cases(0):
        expected, got = question.expect(case), question.run(answer, case)
        if compare(got, expected, question.rtol, question.atol) is not None:
            return question.hint(case, expected, got)
    raise AssertionError("the wrong answer was accepted")


def assert_hints_name(question: Question, words: Mapping[str, str]) -> None:
    """The hint for each of these wrong answers holds its word, or one of those between bars."""
    for name, alternatives in words.items():
        said = first_hint(question, question.wrong[name])
        assert any(word in said for word in alternatives.split("|")), f"{name}: {said}"


def assert_reference_is(
    truth_of: Callable[..., Any], question: Question, seed: int | bytes, rtol: float, atol: float
) -> None:
    """The reference answer equals an independent computation on every case of a seed."""
    for case in question.draw_cases(seed):
        expected, truth = question.expect(case), truth_of(*case)
        if not isinstance(truth, dict):
            expected, truth = {"": expected}, {"": truth}
        assert set(expected) == set(truth)
        for name in truth:
            np.testing.assert_allclose(expected[name], truth[name], rtol=rtol, atol=atol)
