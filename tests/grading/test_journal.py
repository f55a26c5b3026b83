"""The journal: the last whole line of a student counts, and a cut one is no harm."""

from __future__ import annotations

from pathlib import Path

from tlcourse.grading.journal import Entry, Journal, read
from tlcourse.grading.scoring import Mark, Outcome


def entry(student: str, points: float) -> Entry:
    return Entry(
        student, "sha", "plan", "run", Outcome("graded", "", [Mark("00.q1", "right", points, 2.0)])
    )


def write(path: Path, *entries: Entry) -> None:
    journal = Journal(path)
    for one in entries:
        journal.add(one)
    journal.close()


def test_the_last_line_of_a_student_counts(tmp_path: Path) -> None:
    path = tmp_path / "grading" / "00.jsonl"
    assert read(path) == {}
    write(path, entry("ada", 1.0), entry("bela", 2.0))
    write(path, entry("ada", 2.0))
    assert read(path) == {"ada": entry("ada", 2.0), "bela": entry("bela", 2.0)}


def test_a_line_that_was_cut_off_is_ignored_and_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "00.jsonl"
    write(path, entry("ada", 1.0), entry("bela", 2.0))
    path.write_bytes(path.read_bytes()[:-30])
    assert set(read(path)) == {"ada"}
    write(path, entry("chen", 2.0))
    assert set(read(path)) == {"ada", "chen"}


def test_lines_that_are_something_else_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "00.jsonl"
    path.write_bytes(b'\n[]\n{"student": "x"}\nnull\n\xff\n')
    assert read(path) == {}
