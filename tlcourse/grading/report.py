"""Grades and statistics of a class, as tables, one figure, and a text for the terminal.

The files are the same, byte for byte, for the same gradebook and journals. In every table a text
that a spreadsheet would take for a formula, such as a name that begins with ``=``, ``+``, ``-`` or
``@``, begins with an apostrophe, and line breaks in it are spaces.
"""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Iterable

from tlcourse.grading.class_folder import ClassFolder, Student
from tlcourse.grading.gradebook import open_gradebook
from tlcourse.grading.release import released
from tlcourse.grading.results import (
    KINDS,
    NOT_GRADED,
    NOT_HANDED_IN,
    UNREADABLE,
    Exercise,
    Result,
    Statistics,
    question_statistics,
    read_exercise,
)
from tlcourse.grading.store import write_atomically

_NUMBER = re.compile(r"-?[0-9]+\.[0-9]+")
_FORMULA = re.compile(r"[=+\-@\uff1d\uff0b\uff0d\uff20]")
_COLUMNS = ("before_penalty", "penalty", "total", "of", "status", "submitted_at", "seconds_late")
_HOW_TO_MARK = """\
To mark: in {root} run `jupyter lab`, choose Nbgrader > Formgrader > Manual Grading,
then run this report again. What an answer earns stands in rubrics.txt."""


def report(folder: ClassFolder) -> str:
    """Work out late penalties anew, and write tables and a figure into ``reports/``.

    Returns:
        A text for the terminal.

    Raises:
        ClassError: if ``class.toml`` or ``students.csv`` is not as expected.
    """
    with open_gradebook(folder) as book:
        exercises = [read_exercise(book, folder, name) for name in released(folder)]
        known = [Student(s.id, s.first_name or "", s.last_name or "") for s in book.students]
    found = {student.id: student for student in [*known, *folder.students()]}
    for exercise in exercises:
        found = {**{name: Student(name) for name in exercise.results}, **found}
    students = [found[name] for name in sorted(found)]
    numbers = {exercise.name: question_statistics(exercise) for exercise in exercises}
    files = {
        "gradebook.csv": _table(_gradebook(students, exercises)),
        "questions.csv": _table(_questions(numbers)),
        "to_mark.csv": _table(_to_mark(exercises)),
        "rubrics.txt": _rubrics(exercises).encode(),
    }
    drawn = [exercise for exercise in exercises if exercise.graded()]
    if drawn:
        files["histogram.png"] = _histogram(drawn)
    for name, content in files.items():
        write_atomically(folder.reports / name, content)
    return _text(folder, len(students), exercises, numbers, list(files))


def _gradebook(students: list[Student], exercises: list[Exercise]) -> Iterable[list[str]]:
    per_exercise = [f"{exercise.name} {column}" for exercise in exercises for column in _COLUMNS]
    yield ["student", "last_name", "first_name", *per_exercise, "total", "of"]
    most = _points(sum(exercise.of for exercise in exercises))
    for student in students:
        row = [student.id, student.last_name, student.first_name]
        total = 0.0
        for exercise in exercises:
            result = exercise.results.get(student.id, Result(NOT_HANDED_IN))
            total += result.total
            stamp = result.submitted_at
            row += [_points(x) for x in (result.points, result.penalty, result.total, exercise.of)]
            row += [result.status, stamp.strftime("%Y-%m-%dT%H:%M:%SZ") if stamp else ""]
            row.append("" if result.seconds_late is None else str(result.seconds_late))
        yield [*row, _points(total), most]


def _questions(numbers: dict[str, list[Statistics]]) -> Iterable[list[str]]:
    yield ["exercise", "question", "title", "points", *KINDS, "mean_share", "discrimination"]
    for name, found in numbers.items():
        for each in found:
            row = [name, each.question.id, each.question.title, _points(each.question.points)]
            row += [str(each.counts[kind]) for kind in KINDS]
            for number in (each.share, each.discrimination):
                row.append("" if number is None else f"{number:.3f}")
            yield row


def _to_mark(exercises: list[Exercise]) -> Iterable[list[str]]:
    yield ["student", "exercise", "question", "why"]
    for exercise in exercises:
        for student, result in exercise.results.items():
            for question, answer in result.answers.items():
                if answer.why:
                    yield [student, exercise.name, question, answer.why]


def _rubrics(exercises: list[Exercise]) -> str:
    questions = [q for exercise in exercises for q in exercise.questions if q.manual]
    return "\n".join(f"{q.id} {q.title}\n\n{q.rubric.strip()}\n" for q in questions)


def _table(rows: Iterable[list[str]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_plain(cell) for cell in row] for row in rows)
    return text.getvalue().encode()


def _points(points: float) -> str:
    return f"{round(points, 2) + 0.0:.2f}"  # never -0.00


def _plain(text: str) -> str:
    """A cell that no spreadsheet takes for a formula; numbers stay as they are."""
    text = " ".join(text.split())
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def _histogram(exercises: list[Exercise]) -> bytes:
    """A PNG with one panel for each exercise."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    from tlcourse import plots

    columns = min(3, len(exercises))
    rows = -(-len(exercises) // columns)
    size = (4.4 * columns, 3.2 * rows)
    with plots.style():
        figure, axes = plots.subplots(rows, columns, figsize=size, squeeze=False)
        for ax in axes.flat[len(exercises) :]:
            ax.set_axis_off()
        for exercise, ax in zip(exercises, axes.flat, strict=False):
            totals = [result.total for result in exercise.graded()]
            mean, most = statistics.fmean(totals), max(exercise.of, *totals)
            bins = min(20, max(5, round(most)))
            ax.hist(totals, bins=bins, range=(0, most), color=plots.palette[0], edgecolor="white")
            ax.axvline(mean, color=plots.palette[1], ls="--", label=f"mean {mean:.1f}")
            ax.set(xlabel=f"points after the penalty, of {exercise.of:g}", ylabel="submissions")
            ax.set_title(exercise.name, loc="left")
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_locator(MaxNLocator(integer=True))
            ax.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    plt.close(figure)
    return picture.getvalue()


def _text(
    folder: ClassFolder,
    size: int,
    exercises: list[Exercise],
    numbers: dict[str, list[Statistics]],
    files: list[str],
) -> str:
    lines = _summary(size, exercises)
    unfinished = [
        e.name for e in exercises if any(r.status == NOT_GRADED for r in e.results.values())
    ]
    lines += [
        f"{name}: some are not graded yet; run: tlcourse grade run {name[:2]}"
        for name in unfinished
    ]
    waiting = len(list(_to_mark(exercises))) - 1
    if waiting:
        answers = "1 answer needs" if waiting == 1 else f"{waiting} answers need"
        lines += ["", f"{answers} a mark by hand; points above are without it."]
        lines.append(_HOW_TO_MARK.format(root=folder.root))
    flagged = [
        f"  {each.question.id} {each.question.title}: {remark}"
        for found in numbers.values()
        for each in found
        for remark in each.remarks()
    ]
    lines += ["", "Questions worth a look:", *flagged] if flagged else []
    return "\n".join([*lines, "", f"{folder.reports}: {', '.join(files)}"])


def _summary(size: int, exercises: list[Exercise]) -> list[str]:
    width = max([len("exercise"), *(len(exercise.name) for exercise in exercises)])
    heads = ("handed in", "late", "unreadable", "mean", "median", "lowest", "highest", "of")
    lines = [f"{'exercise':{width}}  " + "  ".join(heads)]
    for exercise in exercises:
        results = exercise.results.values()
        totals = [result.total for result in exercise.graded()]
        figures = (statistics.fmean, statistics.median, min, max)
        cells = [
            f"{len(results)} of {size}",
            str(sum(1 for result in results if result.seconds_late)),
            str(sum(1 for result in results if result.status == UNREADABLE)),
            *(f"{figure(totals):.2f}" if totals else "-" for figure in figures),
            f"{exercise.of:g}",
        ]
        padded = [f"{cell:>{len(head)}}" for cell, head in zip(cells, heads, strict=True)]
        lines.append(f"{exercise.name:{width}}  " + "  ".join(padded))
    return lines
