"""The report: exact tables, the same bytes each time, and nothing a spreadsheet would run."""

from __future__ import annotations

import csv
import dataclasses
import shutil
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nbgrader")

from tests.grading.made import NAME, NOON, enter, mark_by_hand, notebook, outcome
from tlcourse.grading import store
from tlcourse.grading.class_folder import ClassFolder, create
from tlcourse.grading.report import report
from tlcourse.grading.results import Answer, Exercise, Result, question_statistics
from tlcourse.questions import Question

DEADLINE = "2026-11-20T12:00:00+00:00"
HEADER = "id,first_name,last_name,email,platform_id\n"


def _rows(folder: ClassFolder, table: str) -> list[dict[str, str]]:
    with (folder.reports / table).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _of(folder: ClassFolder, student: str) -> dict[str, str]:
    """One student's row, without the name of the exercise in its columns."""
    (row,) = [row for row in _rows(folder, "gradebook.csv") if row["student"] == student]
    return {key.removeprefix(f"{NAME} "): value for key, value in row.items()}


@pytest.fixture
def ten_percent_a_day(change_settings):
    change_settings("[deadlines]\n", f'[deadlines]\n"00" = {DEADLINE}\n')
    change_settings("percent_per_day = 0 ", "percent_per_day = 10 ")


def test_gradebook_has_a_row_for_everybody(school, ten_percent_a_day):
    (school.root / "students.csv").write_text(
        HEADER + "ada,Ada,Abel,,\nbela,Béla,Zöld,,\nzoe,,,,\n", encoding="utf-8"
    )
    enter(school, "ada", outcome(1, 2), notebook(school, "Because."), NOON - timedelta(hours=1))
    enter(school, "bela", outcome(0.5, 2), at=NOON + timedelta(seconds=90))
    enter(school, "guest", outcome(0, 0, status="graded, parts were stopped"))
    mark_by_hand(school, "ada", 1.5)
    report(school)
    first, *rest = (school.reports / "gradebook.csv").read_text(encoding="utf-8").splitlines()
    columns = ("before_penalty", "penalty", "total", "of", "status", "submitted_at", "seconds_late")
    names = ",".join(f"{NAME} {column}" for column in columns)
    assert first == f"student,last_name,first_name,{names},total,of"
    assert rest == [
        "ada,Abel,Ada,4.50,0.00,4.50,5.00,graded,2026-11-20T11:00:00Z,0,4.50,5.00",
        "bela,Zöld,Béla,2.50,0.25,2.25,5.00,graded,2026-11-20T12:01:30Z,90,2.25,5.00",
        'guest,,,0.00,0.00,0.00,5.00,"graded, parts were stopped",2026-11-20T12:00:00Z,0,0.00,5.00',
        "zoe,,,0.00,0.00,0.00,5.00,not handed in,,,0.00,5.00",
    ]


def test_what_is_still_to_be_done_is_the_status(school):
    enter(school, "ada", outcome(1, 2), notebook(school, "Because."))
    enter(school, "bela", "the file is empty")
    enter(school, "chen", outcome(1, 2), notebook(school, "One."))
    enter(school, "dora", outcome(1, 2))
    later = NOON + timedelta(days=1)
    store.store_notebook(school, "dora", NAME, b"{}", later)  # after it was graded
    store.store_notebook(school, "emil", NAME, b"{}", later)
    text = report(school)
    status = {row["student"]: row[f"{NAME} status"] for row in _rows(school, "gradebook.csv")}
    assert status == {
        "ada": "needs a mark by hand",
        "bela": "unreadable",
        "chen": "needs a mark by hand",
        "dora": "not graded yet",
        "emil": "not graded yet",
    }
    assert "tlcourse grade run 00" in text
    summary = text.splitlines()[1].split()
    assert summary[:6] == [NAME, "5", "of", "5", "0", "1"]


def test_marks_by_hand_are_asked_for_until_they_are_given(school):
    assert "by hand" not in report(school)
    enter(school, "ada", outcome(1, 2), notebook(school, "Because."))
    enter(school, "bela", outcome(1, 2))  # no answer to the free-text question
    text = report(school)
    assert "1 answer needs a mark by hand" in text and "Formgrader" in text
    row = {"student": "ada", "exercise": NAME, "question": "00.q3", "why": "free text"}
    assert _rows(school, "to_mark.csv") == [row]
    assert "00.q3" in (school.reports / "rubrics.txt").read_text(encoding="utf-8")

    mark_by_hand(school, "ada", 2)
    assert "by hand" not in report(school)
    assert _rows(school, "to_mark.csv") == []
    assert _of(school, "ada")["status"] == "graded"

    enter(school, "ada", outcome(1, 2), notebook(school, "No, but."), NOON + timedelta(hours=1))
    report(school)
    (row,) = _rows(school, "to_mark.csv")
    assert row["why"] == "handed in again: the mark was given for another answer"
    assert _of(school, "ada")["total"] == "5.00"  # and it counts until someone changes it


def test_penalty_follows_the_score_and_the_rule(school, ten_percent_a_day, change_settings):
    enter(school, "ada", outcome(1, 1), notebook(school, "Because."), NOON + timedelta(hours=1))
    report(school)
    assert _of(school, "ada")["penalty"] == "0.20"
    mark_by_hand(school, "ada", 2)
    report(school)
    assert _of(school, "ada")["penalty"] == "0.40"
    change_settings("grace_minutes = 0 ", "grace_minutes = 61 ")
    report(school)
    assert _of(school, "ada")["penalty"] == "0.00"
    assert _of(school, "ada")["seconds_late"] == "3600"


def test_the_same_class_gives_the_same_bytes(released_class, tmp_path):
    made = []
    for number, students in enumerate((("ada", "bela", "chen"), ("chen", "ada", "bela"))):
        root = tmp_path / str(number) / "school"
        shutil.copytree(released_class, root)
        school = ClassFolder(root)
        for student in students:
            points = len(student) % 2
            seconds = float(number)  # how long a run took is no result
            enter(school, student, outcome(points, 2 * points, seconds=seconds))
        report(school)
        made.append({path.name: path.read_bytes() for path in school.reports.iterdir()})
    assert made[0] == made[1]
    names = {"gradebook.csv", "questions.csv", "to_mark.csv", "rubrics.txt", "histogram.png"}
    assert made[0].keys() == names
    assert all(b"\r" not in made[0][name] for name in names if name != "histogram.png")
    assert made[0]["histogram.png"].startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ['=HYPERLINK("http://x","y")', "+1", "-1+1", "@SUM(1)", "＝1"])
def test_no_cell_is_a_formula(school, name):
    with (school.root / "students.csv").open("w", newline="", encoding="utf-8") as file:
        lines = [["ada", name, f"A\n{name}", "", ""], ["bela", f"\t{name}", "B\r\n=1", "", ""]]
        csv.writer(file).writerows([HEADER.strip().split(","), *lines])
    enter(school, "ada", outcome(1, 2), notebook(school, "Because."))
    report(school)
    rows = _rows(school, "gradebook.csv")
    assert rows[0]["first_name"] == f"'{name}" and rows[0]["last_name"] == f"A {name}"
    assert rows[1]["last_name"] == "B =1"
    for table in ("gradebook.csv", "questions.csv", "to_mark.csv"):
        text = (school.reports / table).read_text(encoding="utf-8")
        for cell in (cell for row in csv.reader(text.splitlines()) for cell in row):
            assert not cell.lstrip().startswith(("=", "+", "-", "@", "＝"))


def _exercise(shares: dict[str, list[float | None]]) -> Exercise:
    """An exercise of questions of 2, 3, ... points, from each question's shares by student."""
    questions = [
        Question(id=name, title="t", points=2 + i, manual=True, rubric="r")
        for i, name in enumerate(shares)
    ]
    results = {
        f"student{i}": Result(
            "graded",
            answers={q: Answer("other", share) for q, share in zip(shares, row, strict=True)},
        )
        for i, row in enumerate(zip(*shares.values(), strict=True))
    }
    return Exercise("00_made_up", questions, results)


def test_discrimination_is_the_correlation_with_the_points_of_the_other_questions():
    one, two, three = np.random.default_rng(0).integers(0, 3, size=(3, 12)) / 2
    exercise = _exercise({"00.q1": list(one), "00.q2": list(two), "00.q3": list(three)})
    found = question_statistics(exercise)
    rest = (3 * two + 4 * three, 2 * one + 4 * three, 2 * one + 3 * two)
    for each, own, other in zip(found, (one, two, three), rest, strict=True):
        assert each.share == pytest.approx(own.mean())
        assert each.discrimination == pytest.approx(np.corrcoef(own, other)[0, 1])


def test_discrimination_is_empty_where_it_is_not_defined():
    constant, single = [0.1] * 5, [0.0, 0.0, 1.0, 1.0, 1.0]
    first, second = question_statistics(_exercise({"00.q1": constant, "00.q2": single}))
    assert first.discrimination is None and first.share == pytest.approx(0.1)
    assert second.discrimination is None  # the others all have the same points
    (alone,) = question_statistics(_exercise({"00.q1": single}))
    assert alone.discrimination is None
    (nobody,) = question_statistics(_exercise({"00.q1": []}))
    assert nobody.share is None and nobody.discrimination is None


def test_a_mark_that_is_missing_is_neither_zero_nor_part_of_the_rest():
    shares = {"00.q1": [0.0, 0.5, 1.0, 1.0], "00.q2": [0.0, 1.0, 1.0, 0.5]}
    marked = question_statistics(_exercise(shares))
    free = [1.0, None, None, 0.0]
    first, second, third = question_statistics(_exercise({**shares, "00.q3": free}))
    assert (first.discrimination, second.discrimination) == (
        pytest.approx(marked[0].discrimination),
        pytest.approx(marked[1].discrimination),
    )
    assert third.share == 0.5 and third.answers == 2
    assert third.discrimination == pytest.approx(-1)


def test_unreadable_submissions_say_nothing_about_a_question(school):
    enter(school, "ada", outcome(1, 1), notebook(school, "Because."))
    enter(school, "bela", outcome(0, 2))
    enter(school, "chen", "the file is empty")
    mark_by_hand(school, "ada", 1)
    report(school)
    q1, q2, q3 = _rows(school, "questions.csv")
    kinds = ("right", "partly", "wrong", "not attempted", "other")
    assert [q1[kind] for kind in kinds] == ["1", "0", "1", "0", "1"]
    assert [q2[kind] for kind in kinds] == ["1", "1", "0", "0", "1"]
    assert [q3[kind] for kind in kinds] == ["0", "1", "0", "1", "1"]
    assert [q1["mean_share"], q2["mean_share"], q3["mean_share"]] == ["0.500", "0.750", "0.250"]
    assert q2["discrimination"] == "-1.000"  # a number, so no apostrophe


def test_questions_are_flagged_from_ten_answers_on():
    hard = [0.0] * 8 + [1.0, 1.0]
    upside_down = [1.0] * 8 + [0.0, 0.0]
    found = question_statistics(_exercise({"00.q1": hard, "00.q2": upside_down}))
    assert "only 20%" in found[0].remarks()[0]
    assert [len(each.remarks()) for each in found] == [2, 1]
    fewer = question_statistics(_exercise({"00.q1": hard[1:], "00.q2": upside_down[1:]}))
    assert [each.remarks() for each in fewer] == [[], []]
    fine = dataclasses.replace(found[0], share=0.3, discrimination=0.0, counts=Counter())
    assert fine.remarks() == []


def test_flagged_questions_are_printed(school):
    for number in range(10):
        enter(school, f"student{number}", outcome(0, 2 * (number > 5)))
    text = report(school)
    assert "00.q1" in text.split("Questions worth a look:")[1]
    assert "00.q2" not in text.split("Questions worth a look:")[1]


def test_a_class_without_exercises(tmp_path: Path):
    school = create(tmp_path / "empty")
    (school.root / "students.csv").write_text(HEADER + "ada,,,,\n")
    report(school)
    assert [row["student"] for row in _rows(school, "gradebook.csv")] == ["ada"]
    assert not (school.reports / "histogram.png").exists()


def test_no_torch_is_needed_to_load_it():
    code = "import sys, tlcourse.grading.report, tlcourse.plots; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
