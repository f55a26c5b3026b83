"""Questions and the learner's check, on right, wrong, failing and hostile answers."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tlcourse import checks, locations
from tlcourse.checks import CheckResult, Question, evaluate_answer
from tlcourse.plain_data import NotPlainError
from tlcourse.questions import find_question, load_questions, selfcheck


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def cases(rng: np.random.Generator) -> list[tuple]:
    return [(rng.normal(size=(2, 3)) * 10,) for _ in range(3)] + [(np.full((1, 2), 1e4),)]


def no_max(logits: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


QUESTION = Question(
    id="03.q1",
    title="Softmax",
    points=2,
    cases=cases,
    expected=softmax,
    hint="Subtract the row maximum before exp.",
    wrong={
        "no max": no_max,
        "columns": lambda logits: softmax(logits.T).T,
        "one sum": lambda logits: softmax(logits.reshape(1, -1)).reshape(logits.shape),
    },
)  # fmt: skip


def detail(answer: Any, question: Question = QUESTION, status: str = "wrong") -> str:
    result = evaluate_answer(question, answer)
    assert result.status == status, result
    assert bool(result) == (status == "right")
    return result.detail


def test_right_answers() -> None:
    assert detail(softmax, status="right") == ""
    assert detail(lambda x: torch.softmax(torch.from_numpy(x), 1), status="right") == ""


def test_wrong_value_says_where_and_what() -> None:
    text = detail(QUESTION.wrong["no max"])
    assert "on input 4 of 4" in text
    assert "logits = array([[10000., 10000.]]) (shape (1, 2), float64)" in text
    assert "expected array([[0.5, 0.5]])" in text
    assert "yours    array([[nan, nan]])" in text
    assert "at [0, 0]: expected 0.5, yours is nan (2 of 2 entries differ)" in text
    assert text.endswith("hint: Subtract the row maximum before exp.")


def test_wrong_shape_and_missing_return() -> None:
    assert "expected shape (2, 3), yours has shape (6,)" in detail(lambda x: softmax(x).ravel())
    assert "is a return missing?" in detail(lambda x: None)


def test_not_attempted() -> None:
    def stub(logits: np.ndarray) -> np.ndarray:
        raise NotImplementedError("03.q1: write your answer here")

    def calls_another(logits: np.ndarray) -> np.ndarray:
        raise NotImplementedError("03.q0: write your answer here")

    assert detail(stub, status="not attempted") == ""
    assert detail(..., status="not attempted") == ""
    assert detail(None, status="not attempted") == ""
    assert "03.q0: write your answer here" in detail(calls_another, status="not attempted")


def test_exception_shows_type_message_and_line() -> None:
    def fails(logits: np.ndarray) -> np.ndarray:
        return np.reshape(logits, (7, 7))  # raises inside numpy

    text = detail(fails)
    line = fails.__code__.co_firstlineno + 1
    assert "your code raised ValueError: cannot reshape" in text
    assert f"line {line}, in fails: return np.reshape(logits, (7, 7))" in text
    assert "takes 0 positional arguments" in detail(lambda: 1)


def test_nothing_that_an_answer_does_raises() -> None:
    def leaves(logits: np.ndarray) -> None:
        sys.exit(0)

    def recurses(logits: np.ndarray) -> Any:
        return recurses(logits)

    assert "SystemExit" in detail(leaves)
    assert "RecursionError" in detail(recurses)
    assert "your answer gave an object" in detail(lambda x: object())
    assert "expected a function, yours is of type int" in detail(7)


def test_arguments_are_copies() -> None:
    def mutates(logits: np.ndarray) -> np.ndarray:
        result = softmax(logits)
        logits[:] = 0
        return result

    case = QUESTION.draw_cases(0)[0]
    before = case[0].copy()
    QUESTION.run(mutates, case)
    np.testing.assert_array_equal(case[0], before)
    replace(QUESTION, expected=mutates).expect(case)
    np.testing.assert_array_equal(case[0], before)


def test_value_question_and_true_is_not_one() -> None:
    question = Question(
        id="03.q2", title="Value", points=1, cases=lambda rng: [()], expected=lambda: 3.0,
        wrong={"two": 2.0, "text": "3", "true": True},
    )  # fmt: skip
    assert detail(3, question, "right") == ""
    assert detail(lambda: 3.0, question, "right") == ""
    assert "expected 3, yours is 2" in detail(2.0, question)
    assert detail(..., question, "not attempted") == ""
    assert selfcheck(question) == []


def test_apply_and_hint_function() -> None:
    question = replace(
        QUESTION,
        apply=lambda answer, logits: answer["f"](logits),
        hint=lambda case, expected, got: f"rows sum to {got.sum():.0f}",
        right={"f": softmax},
        wrong={name: {"f": f} for name, f in QUESTION.wrong.items()},
    )
    assert detail({"f": softmax}, question, "right") == ""
    assert "hint: rows sum to 1" in detail({"f": lambda x: np.full((2, 3), 1 / 6)}, question)
    assert "KeyError" in detail({}, question)
    broken = replace(question, hint=lambda *_: 1 / 0)
    assert "hint" not in detail({"f": lambda x: x}, broken)


def test_cases_depend_on_the_seed_only() -> None:
    first, again, other = (QUESTION.draw_cases(seed) for seed in (0, 0, b"secret"))
    np.testing.assert_array_equal(first[0][0], again[0][0])
    assert not np.array_equal(first[0][0], other[0][0])
    twin = replace(QUESTION, id="03.q2").draw_cases(0)
    assert not np.array_equal(first[0][0], twin[0][0])


def test_grader_halves() -> None:
    case = QUESTION.draw_cases(b"secret")[0]
    tensor = QUESTION.run(lambda x: torch.softmax(torch.from_numpy(x), 1), case)
    assert type(tensor) is np.ndarray
    np.testing.assert_allclose(tensor, QUESTION.expect(case))
    with pytest.raises(NotPlainError):
        QUESTION.run(lambda x: object(), case)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id": "3.q1"}, "must look like '03.q1'"),
        ({"points": 0}, "points must be > 0"),
        ({"rtol": -1}, "tolerances"),
        ({"cases": None}, "needs cases and expected"),
        ({"manual": True}, "needs a rubric"),
    ],
)
def test_mistaken_questions_are_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(QUESTION, **change)


def test_mistaken_cases_are_refused() -> None:
    with pytest.raises(TypeError, match="must be a tuple"):
        replace(QUESTION, cases=lambda rng: [1.0]).draw_cases(0)
    with pytest.raises(TypeError, match="a module"):
        replace(QUESTION, cases=lambda rng: [(np,)]).draw_cases(0)
    with pytest.raises(ValueError, match="not empty"):
        replace(QUESTION, cases=lambda rng: []).draw_cases(0)


def test_selfcheck_passes_a_good_question() -> None:
    assert selfcheck(QUESTION) == []


def noisy(logits: np.ndarray) -> np.ndarray:
    return logits + np.random.random()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"wrong": {}}, "needs 3 known wrong answers, has 0"),
        ({"wrong": {**QUESTION.wrong, "fine": softmax}}, "accepts the known wrong answer 'fine'"),
        ({"wrong": {**QUESTION.wrong, "arity": lambda: 1}}, "'arity' cannot be called"),
        ({"cases": lambda rng: [(np.eye(2),)]}, "same cases for another seed"),
        ({"cases": lambda rng: [(np.random.rand(2, 2),)]}, "other cases for the same seed"),
        ({"cases": lambda rng: [(rng.normal(size=(2, 1)),)] * 2}, "accepts a constant"),
        ({"expected": noisy}, "not deterministic"),
        ({"right": QUESTION.wrong["columns"]}, "rejects the right answer"),
        ({"atol": 2.0}, "accepts the known wrong answer 'columns'"),
    ],
)
def test_selfcheck_finds_bad_questions(change: dict, words: str) -> None:
    assert words in "\n".join(selfcheck(replace(QUESTION, **change)))


@pytest.fixture
def lesson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "03_sample" / "questions.py"
    path.parent.mkdir()
    path.write_text(
        "from tlcourse.checks import Question\n"
        "def q(n, **k): return Question(id=f'03.q{n}', title='Double', points=1, **k)\n"
        "QUESTIONS = [q(1, cases=lambda rng: [(rng.normal(),)], expected=lambda x: 2 * x),\n"
        "             q(2, manual=True, rubric='one point for a reason')]\n"
    )
    monkeypatch.setattr(locations, "lessons_dir", lambda: tmp_path)
    return path


def test_check_finds_the_question_and_prints(
    lesson: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.perf_counter()
    result = checks.check("03.q1", lambda x: x + x)
    assert time.perf_counter() - started < 1
    assert result and result.status == "right"
    assert capsys.readouterr().out == "\N{CHECK MARK} 03.q1 Double: right\n"


def test_check_fails_where_nbgrader_runs_it(lesson: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    assert checks.check("03.q1", lambda x: 2 * x)
    with pytest.raises(AssertionError, match=r"03\.q1: wrong"):
        checks.check("03.q1", lambda x: x)
    with pytest.raises(AssertionError, match=r"03\.q1: not attempted"):
        checks.check("03.q1", ...)


def test_check_reads_a_changed_file(lesson: Path) -> None:
    assert load_questions(lesson) is load_questions(lesson)
    lesson.write_text(lesson.read_text().replace("2 * x", "3 * x"))
    os.utime(lesson, (1, 1))
    assert not checks.check("03.q1", lambda x: 2 * x)


@pytest.mark.parametrize(
    ("question_id", "words"),
    [
        ("03.q9", "no question '03.q9'; lesson 03 has 03.q1, 03.q2"),
        ("04.q1", "no lesson has a question '04.q1'; lessons with questions: 03"),
        ("", "no lesson has a question"),
        ("03.q2", "marked by hand"),
    ],
)
def test_unknown_question_lists_the_known(lesson: Path, question_id: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        checks.check(question_id, 1)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("QUESTIONS =", "OTHER =", "expected a list QUESTIONS"),
        ("q(2,", "q(1,", "appears twice"),
        ("f'03.q{n}'", "f'04.q{n}'", "of another lesson"),
    ],
)
def test_mistaken_files_are_refused(lesson: Path, old: str, new: str, words: str) -> None:
    lesson.write_text(lesson.read_text().replace(old, new))
    with pytest.raises(ValueError, match=words):
        load_questions(lesson)


def test_html_escapes_and_does_not_rest_on_colour() -> None:
    page = CheckResult("03.q1", "a < b", "wrong", "expected <1>")._repr_html_()
    assert "a &lt; b" in page and "expected &lt;1&gt;" in page
    assert "\N{BALLOT X}" in page and "<b>wrong</b>" in page
    assert "background:transparent" in page and "color:inherit" in page  # dark themes


def notebook_outputs(*sources: str) -> list[list[str]]:
    """Run sources in one IPython shell; the text/plain outputs of each."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    shell = InteractiveShell.instance()
    try:
        shown = []
        for source in sources:
            with capture_output() as captured:
                shell.run_cell(source, store_history=True).raise_error()
            shown.append([out.data["text/plain"] for out in captured.outputs])
        return shown
    finally:
        InteractiveShell.clear_instance()


def test_a_notebook_shows_each_result_once(lesson: Path) -> None:
    right, wrong = "\N{CHECK MARK} 03.q1", "\N{BALLOT X} 03.q1"
    shown = notebook_outputs(
        "import tlcourse as tl\ntl.check('03.q1', lambda x: 2 * x)",
        "r = tl.check('03.q1', lambda x: 2 * x)",
        "tl.check('03.q1', lambda x: x); tl.check('03.q1', lambda x: 2 * x)",
        "r",
    )
    starts = [[text[: len(right)] for text in cell] for cell in shown]
    assert starts == [[right], [right], [wrong, right], [right]]


def test_find_question_is_public_to_the_grader(lesson: Path) -> None:
    assert find_question("03.q2").rubric == "one point for a reason"
