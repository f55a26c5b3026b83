"""Every graded question of the course: its reference passes, its known wrong answers do not."""

from __future__ import annotations

import time

import pytest

from tlcourse import locations
from tlcourse.lessons import find_lessons
from tlcourse.questions import PUBLIC_SEED, Question, selfcheck

LESSONS = find_lessons(locations.lessons_dir().parent)
QUESTIONS = [question for lesson in LESSONS for question in lesson.questions()]


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.id)
def test_question_accepts_and_rejects(question: Question) -> None:
    assert selfcheck(question) == []


@pytest.mark.parametrize(
    "question", [q for q in QUESTIONS if not q.manual], ids=lambda question: question.id
)
def test_reference_takes_less_than_a_second(question: Question) -> None:
    # Processor time, not wall time: other tests may share the cores.
    [question.expect(case) for case in question.draw_cases(PUBLIC_SEED)]  # imports come first
    started = time.process_time()
    [question.expect(case) for case in question.draw_cases(PUBLIC_SEED)]
    assert time.process_time() - started < 1


def test_measure_is_what_is_compared_and_a_result_that_it_cannot_read_is_an_error() -> None:
    question = Question(
        id="99.q1",
        title="two parts of n things",
        points=1,
        cases=lambda rng: [(4,)],
        apply=lambda answer, n: answer(n),
        measure=lambda parts, n: {"sizes": len(parts[0]) + len(parts[1]) == n},
        expected=lambda n: {"sizes": True},
    )
    assert question.run(lambda n: [[0], [1, 2, 3]], (4,)) == {"sizes": True}
    assert question.run(lambda n: [[0], [1]], (4,)) == {"sizes": False}
    with pytest.raises(ValueError, match="cannot be read"):
        question.run(lambda n: 3, (4,))


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_one_question_is_about_judgement(lesson: object) -> None:
    questions = lesson.questions()  # type: ignore[attr-defined]
    if lesson.number == "00" or not questions:  # type: ignore[attr-defined]
        pytest.skip("no graded exercise")
    assert 3 <= len(questions) <= 12
    assert any(question.manual for question in questions)
