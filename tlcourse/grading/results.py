"""What a class did, read from gradebook and journal: results, and statistics of the questions."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tlcourse import locations
from tlcourse.grading import journal
from tlcourse.grading.class_folder import ClassFolder
from tlcourse.grading.gradebook import grade_cell, set_late_penalty
from tlcourse.grading.run import submitters
from tlcourse.grading.scoring import Mark
from tlcourse.grading.store import read_submitted_at
from tlcourse.questions import Question, load_questions

KINDS = ("right", "partly", "wrong", "not attempted", "other")
NOT_HANDED_IN, NOT_GRADED, TO_MARK = "not handed in", "not graded yet", "needs a mark by hand"
UNREADABLE = "unreadable"
_FREE_TEXT, _AGAIN = "free text", "handed in again: the mark was given for another answer"
_FEW = 10  # answers; with fewer, the numbers of a question are mostly chance
_HARD = 0.3  # share of the points


@dataclass(frozen=True)
class Answer:
    """What came of one question of one submission.

    Attributes:
        kind: one of :data:`KINDS`.
        share: points by points that there are, extra credit left out; None if not marked yet, or
            the submission is unreadable.
        why: why a person has to look at it, or "".
    """

    kind: str
    share: float | None
    why: str = ""


@dataclass(frozen=True)
class Result:
    """One student's submission of one exercise.

    Attributes:
        status: what grading said, or that something is still to be done.
        points: before the penalty.
        penalty: points taken off for lateness.
        submitted_at: by the teacher's clock; None if nobody knows.
        seconds_late: 0 if in time; None without a deadline.
        answers: question id -> what came of it.
    """

    status: str
    points: float = 0.0
    penalty: float = 0.0
    submitted_at: datetime | None = None
    seconds_late: int | None = None
    answers: dict[str, Answer] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return self.points - self.penalty


@dataclass(frozen=True)
class Exercise:
    """An exercise that was handed out, and the results of those who handed it in, by student."""

    name: str
    questions: list[Question]
    results: dict[str, Result]

    @property
    def of(self) -> float:
        """The most points that there are."""
        return sum(question.points for question in self.questions)

    def graded(self) -> list[Result]:
        return [result for result in self.results.values() if result.status != NOT_GRADED]


@dataclass(frozen=True)
class Statistics:
    """How a class did in one question.

    Attributes:
        counts: kind -> submissions.
        answers: submissions that :attr:`share` is of.
        share: mean share of the points; None if there are no marks.
        discrimination: point-biserial correlation, in [-1, 1], of the question's share with the
            points in the other questions; None where it is not defined.
    """

    question: Question
    counts: Counter[str]
    answers: int
    share: float | None
    discrimination: float | None

    def remarks(self) -> list[str]:
        """What is worth a look; nothing below ten answers."""
        found = []
        if self.answers >= _FEW and self.share is not None and self.share < _HARD:
            found.append(f"only {self.share:.0%} of the points were given")
        if self.answers >= _FEW and self.discrimination is not None and self.discrimination < 0:
            found.append(f"discrimination {self.discrimination:.2f}: the better did worse")
        return found


def read_exercise(book: Any, folder: ClassFolder, name: str) -> Exercise:
    """The results of an exercise; late penalties are worked out anew, and entered.

    Args:
        book: of :func:`tlcourse.grading.gradebook.open_gradebook`.
        folder: of the class.
        name: of an exercise that was handed out.
    """
    entries = journal.read(folder.results(name))
    in_book = {each.student.id for each in book.notebook_submissions(name, name)}
    for student in sorted(in_book & entries.keys()):
        set_late_penalty(book, folder, name, student)
    results = dict.fromkeys(submitters(folder, name), Result(NOT_GRADED))
    for submission in book.notebook_submissions(name, name):
        entry = entries.get(submission.student.id)
        if entry is not None:
            results[entry.student] = _result(folder, name, entry, submission)
    questions = load_questions(locations.lessons_dir() / name / "questions.py")
    return Exercise(name, questions, dict(sorted(results.items())))


def _result(folder: ClassFolder, name: str, entry: journal.Entry, submission: Any) -> Result:
    grades = {grade.name: grade for grade in submission.grades}
    answers = {
        mark.id: _answer(mark, grades[grade_cell(mark)])
        for mark in entry.outcome.marks
        if grade_cell(mark) in grades
    }
    naive = submission.assignment.timestamp
    stamp = naive.replace(tzinfo=UTC) if naive else None
    status = entry.outcome.status
    newest = read_submitted_at(folder.submitted(entry.student, name))
    if newest is not None and newest != stamp:
        status = NOT_GRADED
    elif status != UNREADABLE and any(answer.why for answer in answers.values()):
        status = TO_MARK
    deadline = folder.settings().deadline(name[:2], entry.student)
    late = None
    if stamp is not None and deadline is not None:
        late = max(0, int((stamp - deadline).total_seconds()))
    penalty = submission.late_submission_penalty or 0.0
    return Result(status, submission.score, penalty, stamp, late, answers)


def _answer(mark: Mark, grade: Any) -> Answer:
    by_person = grade.manual_score is not None
    points = grade.manual_score if by_person else grade.auto_score
    why = (_AGAIN if by_person else _FREE_TEXT) if grade.needs_manual_grade else ""
    if mark.status == UNREADABLE or points is None:
        return Answer("other", None, why)
    if mark.status == "manual":
        kind = "right" if points >= mark.of else "partly" if points > 0 else "wrong"
        kind = kind if by_person else "not attempted"  # only an empty one is marked by itself
    else:
        kind = "partly" if mark.status == "partly right" else mark.status
    return Answer(kind if kind in KINDS else "other", points / mark.of, why)


def question_statistics(exercise: Exercise) -> list[Statistics]:
    """How the class did in each question. Unreadable submissions count as "other" only.

    A question with a mark still missing is no part of the points that others are compared with.
    """
    results = exercise.graded()
    shares = [
        {q.id: r.answers[q.id].share if q.id in r.answers else None for q in exercise.questions}
        for r in results
    ]
    shares = [row for row in shares if any(share is not None for share in row.values())]
    whole = [q for q in exercise.questions if all(row[q.id] is not None for row in shares)]
    found = []
    for question in exercise.questions:
        own: list[float] = []
        rest: list[float] = []
        for row in shares:
            share = row[question.id]
            if share is not None:
                own.append(share)
                rest.append(sum(q.points * (row[q.id] or 0) for q in whole if q is not question))
        counts = Counter(r.answers[question.id].kind for r in results if question.id in r.answers)
        mean = statistics.fmean(own) if own else None
        found.append(Statistics(question, counts, len(own), mean, _correlation(own, rest)))
    return found


def _correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Pearson's; None if one of them does not vary."""
    if not one or max(one) - min(one) < 1e-9 or max(other) - min(other) < 1e-9:
        return None
    return statistics.correlation(one, other)
