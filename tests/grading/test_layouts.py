"""Every layout of a platform gives student and assignment; nobody can be named by another."""

from __future__ import annotations

import os

import pytest
from collecting import (
    A3,
    A4,
    NOW,
    STAMP,
    files_in,
    make_zip,
    only_entry,
    put,
    run,
    stamp,
    statuses,
    stored,
    with_students,
)

from tlcourse.grading.class_folder import ClassError

# --- layouts

LAYOUTS = [
    # path, student, assignment
    (f"ada/{A3}/{A3}.ipynb", "ada", A3),  # nbgrader
    (f"ada/{A3}/my work.ipynb", "ada", A3),
    (f"ada/{A3}/{A4}.ipynb", "ada", A4),  # the file's own name comes first
    (f"ada/{A3}.ipynb", "ada", A3),  # plain
    ("ada/03.ipynb", "ada", A3),
    ("ada/03 final version (2).ipynb", "ada", A3),
    (f"ada/ada_{A4}_done.ipynb", "ada", A4),
    ("ada/work/deep/03-x.IPYNB", "ada", A3),
    (f"b.o-b+1@x.org/{A3}.ipynb", "b.o-b+1@x.org", A3),
    (f"Ada Lovelace_1234567_assignsubmission_file_/{A3}.ipynb", "1234567", A3),  # Moodle
    (f"Ada Lovelace_1234567_assignsubmission_file/{A3}.ipynb", "1234567", A3),
    (f"Ada Lovelace_1234567_assignsubmission_file_/a/b/{A3}.ipynb", "1234567", A3),
    (f"Group 1-Ada Lovelace_1234567_assignsubmission_file_{A3}.ipynb", "1234567", A3),
    (f"Ada Lovelace_1234567_assignsubmission_file_/{A3}/x.ipynb", "1234567", A3),
    (f"lovelaceada_12345_67890_{A3}.ipynb", "12345", A3),  # Canvas
    (f"lovelaceada_12345_67890_{A3}-2.ipynb", "12345", A3),
    (f"lovelaceada_LATE_12345_67890_{A3}-2.ipynb", "12345", A3),
    ("lovelaceada_12345_67890_04.ipynb", "12345", A4),
    (f"Homework 3_ada_attempt_2026-11-20-13-05-11_{A3}.ipynb", "ada", A3),  # Blackboard
    (f"A_b_c_ada_attempt_2026-11-20-13-05-11_{A3}.ipynb", "ada", A3),
    ("Homework_ada_attempt_2026-11-20-13-05-11_04.ipynb", "ada", A4),
    (f"12345-67890 - Ada Lovelace - Nov 20, 2026 105 PM/{A3}.ipynb", "12345", A3),  # Brightspace
    (f"12345-67890 - Ada - Lovelace - Nov 20, 2026 1105 AM/x/{A3}.ipynb", "12345", A3),
    (f"12345-67890 - Ada Lovelace - 20 novembre 2026/{A3}.ipynb", "12345", A3),
]


@pytest.mark.parametrize(("path", "student", "assignment"), LAYOUTS)
@pytest.mark.parametrize("zipped", [False, True])
def test_every_layout_gives_student_and_assignment(
    folder, source, tmp_path, path, student, assignment, zipped
):
    put(source, path, b'{"a": 1}')
    if zipped:
        source = make_zip(tmp_path / "all.zip", {path: b'{"a": 1}'})
    entry = only_entry(run(folder, source))
    assert (entry.student, entry.assignment, entry.status) == (student, assignment, "new")
    assert entry.submitted_at == NOW.replace(microsecond=0)
    place = f"{student}/{assignment}"
    assert files_in(folder.root / "submitted") == [
        f"{place}/{assignment}.ipynb",
        f"{place}/timestamp.txt",
    ]
    assert stored(folder, student, assignment) == b'{"a": 1}'
    assert stamp(folder, student, assignment) == STAMP


@pytest.mark.parametrize(
    "path",
    [
        f"Ada Lovelace_777_assignsubmission_file_/{A3}.ipynb",
        f"adalovelace_777_67890_{A3}.ipynb",
        f"Homework_777_attempt_2026-11-20-13-05-11_{A3}.ipynb",
        f"777-67890 - Ada Lovelace - Nov 20, 2026 105 PM/{A3}.ipynb",
    ],
)
def test_a_platforms_id_is_translated_through_the_students_list(folder, source, path):
    with_students(folder, "bob,,,,888", "ada,,,,666 777")
    put(source, path)
    collected = run(folder, source)
    assert only_entry(collected).student == "ada"
    assert collected.unknown == []


def test_a_plain_folder_is_not_translated(folder, source):
    with_students(folder, "ada,,,,bob", "bob,,,,")
    put(source, "bob/03.ipynb")
    assert only_entry(run(folder, source)).student == "bob"


def test_an_unknown_id_is_collected_and_reported(folder, source):
    put(source, "ada/03.ipynb")
    put(source, "eve/03.ipynb")
    assert run(folder, source).unknown == []  # nobody is listed, so nobody is unknown
    with_students(folder, "ada,,,,")
    collected = run(folder, source)
    assert collected.unknown == ["eve"]
    assert "not in students.csv (as id or platform_id): eve" in collected.summary()
    assert stored(folder, "eve") is not None


def test_a_blackboard_user_name_with_underscores_is_found_in_the_students_list(folder, source):
    with_students(folder, "j_doe,,,,")
    put(source, f"Homework_3_j_doe_attempt_2026-11-20-13-05-11_{A3}.ipynb")
    assert only_entry(run(folder, source)).student == "j_doe"


def test_a_blackboard_name_of_two_students_is_refused(folder, source):
    with_students(folder, "j_doe,,,,", "doe,,,,")
    put(source, f"Homework_j_doe_attempt_2026-11-20-13-05-11_{A3}.ipynb")
    entry = only_entry(run(folder, source))
    assert entry.status == "refused" and "doe or j_doe" in entry.reason


@pytest.mark.parametrize(
    ("path", "student"),
    [
        # mallory names a file or folder so that a deeper or later reading would be ada
        (f"mallory/Ada_777_assignsubmission_file_/{A3}.ipynb", "mallory"),
        (f"mallory/777-1 - Ada - Nov 20, 2026 105 PM/{A3}.ipynb", "mallory"),
        (f"mallory/x_777_888_{A3}.ipynb", "mallory"),
        (f"mallory/ada/{A3}/{A3}.ipynb", "mallory"),
        (f"M_5_assignsubmission_file_/A_777_assignsubmission_file_/{A3}.ipynb", "5"),
        (f"M_5_assignsubmission_file_A_777_assignsubmission_file_{A3}.ipynb", "5"),
        (
            f"H_mallory_attempt_2026-11-20-13-05-11_H_ada_attempt_2026-11-20-13-05-11_{A3}.ipynb",
            "mallory",
        ),
    ],
)
def test_a_students_own_names_do_not_make_another_student(folder, source, path, student):
    with_students(folder, "ada,,,,777", "mallory,,,,")
    put(source, path)
    assert only_entry(run(folder, source)).student == student


@pytest.mark.parametrize("name", ["mallory_5_888_777_999_03.ipynb", "mallory_777_5_888_03.ipynb"])
def test_a_canvas_name_that_reads_as_two_students_is_refused(folder, source, name):
    """A file name (first) or a display name (second) with numbers of another student."""
    with_students(folder, "ada,,,,777", "mallory,,,,5")
    put(source, name)
    entry = only_entry(run(folder, source))
    assert entry.status == "refused" and "ada" in entry.reason and "table" in entry.reason
    assert not (folder.root / "submitted").exists()


@pytest.mark.parametrize(
    "student", ["a b", "-x", "_x", "a..b", "x" * 65, "é", "a*", "a;b", "x'y", "a\nb"]
)
def test_an_id_that_cannot_be_a_folder_is_refused(folder, source, student):
    put(source, f"{student}/03.ipynb")
    put(source, "ada/03.ipynb")
    collected = run(folder, source)
    refused = [entry for entry in collected.entries if entry.status == "refused"]
    assert len(refused) == 1 and "cannot be a student id" in refused[0].reason
    assert "\n" not in refused[0].path and "\n" not in refused[0].reason
    assert os.listdir(folder.root / "submitted") == ["ada"]


def test_no_student_or_no_assignment_is_refused(folder, source):
    put(source, f"{A3}.ipynb")
    put(source, "ada/homework.ipynb")
    put(source, "ada/0304.ipynb")
    put(source, "ada/05_other.ipynb")
    collected = run(folder, source)
    assert set(statuses(collected).values()) == {"refused"}
    reasons = {entry.path: entry.reason for entry in collected.entries}
    assert "no student" in reasons[f"{A3}.ipynb"]
    assert "no assignment" in reasons["ada/homework.ipynb"]
    assert not (folder.root / "submitted").exists()


def test_only_takes_every_notebook_as_this_assignment(folder, source):
    put(source, "ada/homework.ipynb")
    put(source, f"bob/{A3}.ipynb")
    collected = run(folder, source, only=A4)
    assert {(e.student, e.assignment, e.status) for e in collected.entries} == {
        ("ada", A4, "new"),
        ("bob", A4, "new"),
    }
    with pytest.raises(ClassError, match=r"only must be one of 03_gradients_by_hand, 04.*'05_x'"):
        run(folder, source, only="05_x")


def test_a_single_notebook_needs_a_name_of_a_platform_or_a_table(folder, source, tmp_path):
    path = put(source, f"ada_12345_67890_{A3}.ipynb")
    assert only_entry(run(folder, path)).student == "12345"
    plain = put(source, f"{A3}.ipynb")
    assert only_entry(run(folder, plain)).status == "refused"
    table = tmp_path / "table.csv"
    table.write_text("path,student_id\n*.ipynb,ada\n")
    assert only_entry(run(folder, plain, table=table)).student == "ada"


# --- the table


def test_the_table_overrules_the_layout_and_its_first_line_wins(folder, source, tmp_path):
    for path in ("a [1]/03.ipynb", "team/x/03.ipynb", "eve/03.ipynb", "z_1_2_04-3.ipynb"):
        put(source, path)
    make_zip(source / "work.zip", {"03.ipynb": b"{}"})
    table = tmp_path / "table.csv"
    table.write_text(
        "path,student_id,submitted_at\n"
        "a [1]/03.ipynb,ada,2026-11-20T13:05:11+01:00\n"  # a name, though it has brackets
        "team/,bob,\n"  # a folder: all below
        "t*/03.ipynb,nobody,\n"
        "work.zip,cy,\n"
        "z_*,dan,2026-11-20T13:05:11Z\n"
    )
    collected = run(folder, source, table=table)
    assert {(e.path, e.student, e.assignment) for e in collected.entries} == {
        ("a [1]/03.ipynb", "ada", A3),
        ("team/x/03.ipynb", "bob", A3),
        ("eve/03.ipynb", "eve", A3),
        ("work.zip/03.ipynb", "cy", A3),
        ("z_1_2_04-3.ipynb", "dan", A4),
    }
    assert stamp(folder, "ada") == "2026-11-20 12:05:11 UTC\n"
    assert stamp(folder, "bob") == STAMP
    assert stamp(folder, "dan", A4) == "2026-11-20 13:05:11 UTC\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,student\n", "header must be path,student_id,submitted_at"),
        ("path,student_id,submitted_at\n*,../x,\n", r"line 2: student_id is not allowed: '\.\./x'"),
        ("path,student_id,submitted_at\n,x,\n", "line 2: path must not be empty"),
        (
            "path,student_id,submitted_at\n*,x,2026-11-20T13:00:00\n",
            "line 2: submitted_at .*offset",
        ),
        ("path,student_id,submitted_at\n*,x,yesterday\n", "submitted_at .* got 'yesterday'"),
    ],
)
def test_a_wrong_table_is_an_error_before_anything_is_stored(
    folder, source, tmp_path, text, message
):
    put(source, "ada/03.ipynb")
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(ClassError, match=message):
        run(folder, source, table=tmp_path / "table.csv")
    assert not (folder.root / "submitted").exists()
