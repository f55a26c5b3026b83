"""A class folder: made once, read strictly, its secret kept, and usable by nbgrader."""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tlcourse.grading import class_folder
from tlcourse.grading.class_folder import (
    ClassError,
    ClassFolder,
    LateRule,
    Limits,
    Settings,
    Student,
)

DAY = 86_400
ASSIGNMENT = "03_gradients_by_hand"


@pytest.fixture()
def folder(tmp_path) -> ClassFolder:
    return class_folder.create(tmp_path / "deep learning 2026")


def with_toml(folder: ClassFolder, text: str) -> ClassFolder:
    (folder.root / "class.toml").write_text(text, encoding="utf-8")
    return folder


# --- create and find


def test_a_new_class_has_its_files_and_default_settings(folder):
    names = sorted(path.name for path in folder.root.iterdir())
    assert names == [
        ".gitignore",
        "class.toml",
        "class_secret",
        "nbgrader_config.py",
        "students.csv",
    ]
    assert folder.settings() == Settings(course_id="deep_learning_2026")
    assert folder.students() == []
    assert (folder.root / "students.csv").read_text() == (
        "id,first_name,last_name,email,platform_id\n"
    )


def test_the_template_names_every_setting_with_its_default(folder):
    text = (folder.root / "class.toml").read_text()
    for settings in (Limits(), LateRule()):
        for name, value in vars(settings).items():
            assert f"\n{name} = {value} " in text, name


@pytest.mark.parametrize("name", ["köln", "___", "2026 (a)"])
def test_any_folder_name_gives_a_valid_course_id(tmp_path, name):
    assert class_folder.create(tmp_path / name).settings().course_id


def test_a_second_create_is_refused_and_changes_nothing(folder):
    before = {path: path.read_bytes() for path in folder.root.iterdir()}
    with pytest.raises(ClassError, match=r"class\.toml: there is a class already"):
        class_folder.create(folder.root)
    assert {path: path.read_bytes() for path in folder.root.iterdir()} == before


def test_create_in_a_folder_with_files_overwrites_none_of_them(tmp_path):
    secret = "ab" * 32
    (tmp_path / "class_secret").write_text(secret)
    (tmp_path / "class_secret").chmod(0o600)
    (tmp_path / "nbgrader_config.py").write_text("mine = 1\n")
    (tmp_path / "students.csv").write_text("id,first_name,last_name,email,platform_id\nada,,,,\n")
    (tmp_path / ".gitignore").write_text("*.log\nsubmitted/")
    folder = class_folder.create(tmp_path)
    assert folder.secret() == bytes.fromhex(secret)
    assert (tmp_path / "nbgrader_config.py").read_text() == "mine = 1\n"
    assert folder.students() == [Student("ada")]
    ignored = (tmp_path / ".gitignore").read_text().splitlines()
    assert ignored[:2] == ["*.log", "submitted/"]
    assert "class_secret" in ignored and "grading/" in ignored
    assert ignored.count("submitted/") == 1


def test_an_interrupted_create_can_be_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(class_folder, "_ignore", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        class_folder.create(tmp_path)
    secret = (tmp_path / "class_secret").read_bytes()
    monkeypatch.undo()
    assert class_folder.create(tmp_path).secret().hex() == secret.decode().strip()


def test_find_walks_upward(folder, monkeypatch):
    below = folder.root / "submitted" / "ada"
    below.mkdir(parents=True)
    assert class_folder.find(below) == folder
    monkeypatch.chdir(below)
    assert class_folder.find() == folder


def test_find_says_how_to_make_a_class(tmp_path):
    with pytest.raises(ClassError, match="tlcourse grade init NAME"):
        class_folder.find(tmp_path)


# --- the secret


def test_the_secret_is_32_random_bytes_for_the_owner_only(folder, tmp_path):
    other = class_folder.create(tmp_path / "other")
    assert len(folder.secret()) == 32
    assert folder.secret() != other.secret()
    assert folder.secret() == folder.secret()
    if os.name == "posix":
        assert stat.S_IMODE((folder.root / "class_secret").stat().st_mode) == 0o600


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_secret_that_others_can_open_is_an_error(folder, mode):
    (folder.root / "class_secret").chmod(mode)
    with pytest.raises(ClassError, match=r"chmod 600 .*class_secret"):
        folder.secret()


@pytest.mark.parametrize("content", [b"", b"ab" * 31, b"ab" * 33, b"zz" * 32, b"\xff" * 64])
def test_a_secret_that_is_not_64_hex_digits_is_an_error(folder, content):
    (folder.root / "class_secret").write_bytes(content)
    with pytest.raises(ClassError, match="expected 64 hexadecimal digits") as caught:
        folder.secret()
    assert "zz" not in str(caught.value) and "abab" not in str(caught.value)  # it may be logged


def test_a_missing_secret_is_an_error(folder):
    (folder.root / "class_secret").unlink()
    with pytest.raises(ClassError, match="class_secret: missing"):
        folder.secret()


# --- settings


def test_settings_are_read(folder):
    settings = with_toml(
        folder,
        """
        course_id = "dl.2026"
        [limits]
        cell_seconds = 1.5
        memory_mb = 512
        [late]
        percent_per_day = 10
        [deadlines]
        03 = 2026-11-20T23:59:00+01:00
        "04" = 2026-12-04T12:00:00Z
        [extensions.03]
        "ada.l@x.org" = 2026-11-27T23:59:00+01:00
        """,
    ).settings()
    assert settings.course_id == "dl.2026"
    assert settings.limits == Limits(cell_seconds=1.5, memory_mb=512)
    assert settings.late == LateRule(percent_per_day=10)
    due = datetime(2026, 11, 20, 22, 59, tzinfo=UTC)
    assert settings.deadline("03", "bob") == due
    assert settings.deadline("03", "ada.l@x.org") == due + timedelta(days=7)
    assert settings.deadline("04", "ada.l@x.org") == datetime(2026, 12, 4, 12, tzinfo=UTC)
    assert settings.deadline("05", "ada.l@x.org") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("course_id = 'a'\ncolour = 1", "unknown key colour; expected one of: course_id"),
        ("course_id = 'a'\n[limits]\ncell_second = 1", r"unknown key limits\.cell_second;"),
        ("course_id = 'a'\n[late]\ngrace = 1", r"unknown key late\.grace; .*grace_minutes"),
        ("[late]", "course_id must be a text .* got None"),
        ("course_id = 'a b'", "course_id must .* got 'a b'"),
        ("course_id = '../a'", "course_id must .* got '../a'"),
        ("course_id = 'a'\nlimits = 3", "limits must be a table, got 3"),
        ("course_id = 'a'\n[limits]\nprocesses = 0", r"limits\.processes must be .* > 0, got 0"),
        ("course_id = 'a'\n[limits]\nprocesses = 1.5", r"processes must be a whole number .* 1\.5"),
        ("course_id = 'a'\n[limits]\ncell_seconds = true", "cell_seconds must .* got True"),
        ("course_id = 'a'\n[limits]\ncell_seconds = inf", "cell_seconds must .* got inf"),
        ("course_id = 'a'\n[limits]\ncell_seconds = nan", "cell_seconds must .* got nan"),
        ("course_id = 'a'\n[limits]\ncell_seconds = '9'", "cell_seconds must .* got '9'"),
        ("course_id = 'a'\n[late]\nmost_percent = 101", r"late\.most_percent .* got 101"),
        ("course_id = 'a'\n[late]\ngrace_minutes = -1", r"late\.grace_minutes .* got -1"),
        (
            "course_id = 'a'\n[deadlines]\n'03' = 2026-11-20T23:59:00",
            r"deadlines\.03 must be .*offset from UTC.* got 2026-11-20T23:59:00",
        ),
        ("course_id = 'a'\n[deadlines]\n'03' = 2026-11-20", r"deadlines\.03 must be"),
        ("course_id = 'a'\n[deadlines]\n'03' = '2026-11-20T23:59:00Z'", r"deadlines\.03 must be"),
        (
            "course_id = 'a'\n[deadlines]\n3 = 2026-11-20T23:59:00Z",
            r"deadlines\.3 must be a lesson",
        ),
        ("course_id = 'a'\n[extensions]\n'03' = 1", r"extensions\.03 must be a table"),
        (
            "course_id = 'a'\n[extensions.03]\nada = 2026-11-20T23:59:00",
            r"extensions\.03\.ada must be a date",
        ),
        (
            "course_id = 'a'\n[extensions.03]\n'../ada' = 2026-11-20T23:59:00Z",
            r"extensions\.03\.\.\./ada must be a student id",
        ),
        ("course_id = 'a", "not TOML"),
    ],
)
def test_a_wrong_setting_names_file_key_value_and_expectation(folder, text, message):
    with pytest.raises(ClassError, match=message) as caught:
        with_toml(folder, text).settings()
    assert str(folder.root / "class.toml") in str(caught.value)


def test_late_points_grow_with_each_started_day_up_to_the_most():
    rule = LateRule(grace_minutes=10, percent_per_day=20, most_percent=50)
    seconds = [-DAY, 0, 600, 601, 600 + DAY, 601 + DAY, 601 + 2 * DAY, 1000 * DAY]
    points = [rule.penalty(8.0, late) for late in seconds]
    assert points == pytest.approx([0, 0, 0, 1.6, 1.6, 3.2, 4.0, 4.0])
    assert LateRule().penalty(8.0, 5 * DAY) == 0


# --- students


def with_students(folder: ClassFolder, lines: str) -> ClassFolder:
    header = "id,first_name,last_name,email,platform_id\n"
    (folder.root / "students.csv").write_text(header + lines, encoding="utf-8")
    return folder


def test_students_are_read_also_as_excel_writes_them(folder):
    text = "\ufeffid,first_name,last_name,email,platform_id\r\n"
    text += 'ada, Ada ,"Lovelace, Countess",ada@x.org,12 345\r\n,,,,\r\nb.ob,Bö,,,\r\n'
    (folder.root / "students.csv").write_bytes(text.encode())
    ada, bob = folder.students()
    assert ada == Student("ada", "Ada", "Lovelace, Countess", "ada@x.org", "12 345")
    assert ada.platform_ids == ["12", "345"]
    assert bob == Student("b.ob", "Bö") and bob.platform_ids == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("../x,,,,", r"line 2: id must be .* got '\.\./x'"),
        ("a..b,,,,", "line 2: id must be"),
        (".hidden,,,,", "line 2: id must be"),
        ("ada\nbob,,,,", "line 2: expected 5 cells, got 1"),
        ("ok,,,,\n" + "x" * 65 + ",,,,", "line 3: id must be"),
        ("ada,,,,\nADA,,,,", "id 'ada' appears twice"),
        ("ada,,,,7\nbob,,,,8 7", "platform_id '7' appears twice"),
    ],
)
def test_a_wrong_line_of_students_is_named(folder, lines, message):
    with pytest.raises(ClassError, match=message):
        with_students(folder, lines).students()


def test_another_header_or_encoding_is_named(folder):
    path = folder.root / "students.csv"
    path.write_text("id;first_name;last_name;email;platform_id\n")
    with pytest.raises(ClassError, match=r"header must be id,first_name.* got 'id;first_name"):
        folder.students()
    path.write_bytes("id,first_name,last_name,email,platform_id\nx,ö,,,".encode("latin-1"))
    with pytest.raises(ClassError, match="UTF-8"):
        folder.students()
    path.unlink()
    with pytest.raises(ClassError, match=r"students\.csv"):
        folder.students()


# --- places


def test_places_are_those_of_nbgrader(folder):
    root = folder.root
    assert folder.source(ASSIGNMENT) == root / "source" / ASSIGNMENT
    assert folder.release(ASSIGNMENT) == root / "release" / ASSIGNMENT
    assert folder.submitted("ada", ASSIGNMENT) == root / "submitted" / "ada" / ASSIGNMENT
    assert folder.autograded("ada", ASSIGNMENT) == root / "autograded" / "ada" / ASSIGNMENT
    assert folder.feedback("ada", ASSIGNMENT) == root / "feedback" / "ada" / ASSIGNMENT
    assert folder.earlier("ada", ASSIGNMENT) == root / "grading" / "earlier" / "ada" / ASSIGNMENT
    assert folder.results(ASSIGNMENT) == root / "grading" / f"{ASSIGNMENT}.jsonl"
    assert folder.reports == root / "reports"


@pytest.mark.parametrize("student", ["", "..", "a/b", "/etc", "a\\b", "a..b", "a\n", "-a", "a b"])
def test_no_place_is_made_from_what_is_not_a_student_id(folder, student):
    with pytest.raises(ClassError, match="not a student id"):
        folder.submitted(student, ASSIGNMENT)


@pytest.mark.parametrize("assignment", ["", "..", "3_x", "03_x/..", "03_x\n", "../03_x"])
def test_no_place_is_made_from_what_is_not_an_assignment(folder, assignment):
    with pytest.raises(ClassError, match="assignment must look like"):
        folder.release(assignment)
    with pytest.raises(ClassError, match="assignment must look like"):
        folder.submitted("ada", assignment)


def test_nbgrader_finds_the_class_from_its_config(folder, monkeypatch, tmp_path):
    from nbgrader.coursedir import CourseDirectory
    from traitlets.config.loader import PyFileConfigLoader

    monkeypatch.chdir(tmp_path)
    with_toml(folder, "course_id = 'dl-2026'")
    config = PyFileConfigLoader("nbgrader_config.py", path=str(folder.root)).load_config()
    course = CourseDirectory(config=config)
    assert Path(course.root) == folder.root
    assert course.course_id == "dl-2026"
    assert course.db_url == folder.gradebook_url
    place = course.format_path(course.submitted_directory, "ada", ASSIGNMENT)
    assert Path(place) == folder.submitted("ada", ASSIGNMENT)
