"""A teacher's class folder: settings, the secret, students, and where everything lies.

Names are nbgrader's where it has them, so that nbgrader and its formgrader work in the folder::

    class.toml          settings
    class_secret        seeds the cases of the questions; never leaves this machine
    students.csv        who takes part
    nbgrader_config.py  points nbgrader at this folder
    gradebook.db        nbgrader's gradebook
    source/ASSIGNMENT/  release/ASSIGNMENT/
    submitted/STUDENT/ASSIGNMENT/  autograded/...  feedback/...
    grading/            our journal of results, and earlier submissions
    reports/
"""

from __future__ import annotations

import csv
import io
import os
import re
import secrets
import stat
from dataclasses import dataclass, fields
from pathlib import Path

from tlcourse.grading.class_settings import (
    TEMPLATE,
    ClassError,
    LateRule,
    Limits,
    Settings,
    is_student_id,
    read_settings,
)

__all__ = ["ClassError", "ClassFolder", "LateRule", "Limits", "Settings", "Student"]
__all__ += ["create", "find"]

_ASSIGNMENT = r"[0-9]{2}_[A-Za-z0-9_]+"
_IGNORED = ["class_secret", "gradebook.db", "students.csv", "submitted/", "autograded/"]
_IGNORED += ["feedback/", "grading/", "reports/"]
_NBGRADER_CONFIG = '''\
"""nbgrader's settings for this class, written by `tlcourse grade init`; see class.toml."""

import tomllib
from pathlib import Path

c = get_config()  # noqa: F821
root = Path(__file__).resolve().parent
settings = tomllib.loads((root / "class.toml").read_text(encoding="utf-8"))
c.CourseDirectory.root = str(root)
c.CourseDirectory.course_id = settings["course_id"]

# Formgrader shows what students wrote: keep these two lines.
c.HTMLExporter.filters = {"markdown2html": "tlcourse.grading.formgrader.safe_markdown"}
c.HTMLExporter.sanitize_html = True
# nbgrader would run submissions without a sandbox, and overwrite what `tlcourse grade` has made.
for step in (c.Autograde, c.GenerateAssignment, c.GenerateFeedback):
    step.exporter_class = "tlcourse.grading.formgrader.Refused"
'''


@dataclass(frozen=True)
class Student:
    """One line of ``students.csv``.

    Attributes:
        id: nbgrader's student id, a folder's name.
        platform_id: ids of this student on the learning platform, with spaces between them
            (Moodle has another number for each assignment).
    """

    id: str
    first_name: str = ""
    last_name: str = ""
    email: str = ""
    platform_id: str = ""

    @property
    def platform_ids(self) -> list[str]:
        return self.platform_id.split()


@dataclass(frozen=True)
class ClassFolder:
    """A class folder; ``root`` is absolute and holds a ``class.toml``."""

    root: Path

    def settings(self) -> Settings:
        """What ``class.toml`` says. Raises ClassError if something in it is not as expected."""
        return read_settings(self.root / "class.toml")

    def secret(self) -> bytes:
        """The 32 secret bytes of the class.

        Raises:
            ClassError: if the file is missing, others can read it (POSIX), or it is not 64
                hexadecimal digits.
        """
        path = self.root / "class_secret"
        if not path.is_file():
            raise ClassError(f"{path}: missing; restore it, a new one would change every case")
        mode = stat.S_IMODE(path.stat().st_mode)
        if os.name == "posix" and mode & 0o077:
            raise ClassError(
                f"{path}: others can open it (mode {mode:03o}, expected 600); run: chmod 600 {path}"
            )
        text = path.read_bytes().strip()
        if not re.fullmatch(rb"[0-9a-fA-F]{64}", text):
            raise ClassError(f"{path}: expected 64 hexadecimal digits, got {len(text)} bytes")
        return bytes.fromhex(text.decode("ascii"))

    def students(self) -> list[Student]:
        """The lines of ``students.csv``.

        Raises:
            ClassError: if the header is another, an id is not allowed, or an id or platform id
                is given to two students.
        """
        path = self.root / "students.csv"
        names = [each.name for each in fields(Student)]
        students = []
        for line, row in read_csv(path, names):
            student = Student(**row)
            if not is_student_id(student.id):
                raise ClassError(
                    f"{path}, line {line}: id must be 1 to 64 of A-Z a-z 0-9 . _ @ + -, begin "
                    f"with a letter or digit and have no '..', got {student.id!r}"
                )
            students.append(student)
        # Folders that differ in case only are one folder on macOS and Windows.
        _refuse_twice(path, "id", [student.id.casefold() for student in students])
        _refuse_twice(path, "platform_id", [p for s in students for p in s.platform_ids])
        return students

    @property
    def gradebook_url(self) -> str:
        """nbgrader's gradebook, for SQLAlchemy."""
        return f"sqlite:///{self.root / 'gradebook.db'}"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    def source(self, assignment: str) -> Path:
        """The teacher's version of an assignment."""
        return self.root / "source" / _checked_assignment(assignment)

    def release(self, assignment: str) -> Path:
        """The students' version of an assignment."""
        return self.root / "release" / _checked_assignment(assignment)

    def submitted(self, student: str, assignment: str) -> Path:
        """What a student handed in."""
        return self._of_student("submitted", student, assignment)

    def autograded(self, student: str, assignment: str) -> Path:
        """A submission with its marks."""
        return self._of_student("autograded", student, assignment)

    def feedback(self, student: str, assignment: str) -> Path:
        """What a student gets back."""
        return self._of_student("feedback", student, assignment)

    def earlier(self, student: str, assignment: str) -> Path:
        """Submissions that a later one replaced."""
        return self._of_student("grading/earlier", student, assignment)

    def results(self, assignment: str) -> Path:
        """The journal of an assignment's results, one JSON object for each line."""
        return self.root / "grading" / f"{_checked_assignment(assignment)}.jsonl"

    def _of_student(self, step: str, student: str, assignment: str) -> Path:
        if not is_student_id(student):
            raise ClassError(f"not a student id: {student!r}")
        return self.root / step / student / _checked_assignment(assignment)


def create(root: Path) -> ClassFolder:
    """Make a class folder. Files that are there already stay as they are.

    Raises:
        ClassError: if the folder has a ``class.toml``.
    """
    root = Path(root).resolve()
    if (root / "class.toml").exists():
        raise ClassError(f"{root / 'class.toml'}: there is a class already; nothing was changed")
    root.mkdir(parents=True, exist_ok=True)
    _write_new(root / "class_secret", secrets.token_hex(32) + "\n", mode=0o600)
    _write_new(root / "students.csv", ",".join(each.name for each in fields(Student)) + "\n")
    _write_new(root / "nbgrader_config.py", _NBGRADER_CONFIG)
    _ignore(root / ".gitignore")
    course_id = re.sub(r"[^A-Za-z0-9._-]+", "_", root.name).lstrip("._-") or "class"
    # Last, so that an interrupted `init` can be run again.
    _write_new(root / "class.toml", TEMPLATE.format(course_id=course_id))
    return ClassFolder(root)


def find(start: Path | None = None) -> ClassFolder:
    """The class folder that holds ``start``, by default the current folder.

    Raises:
        ClassError: if neither it nor a folder above it has a ``class.toml``.
    """
    start = Path(start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "class.toml").is_file():
            return ClassFolder(folder)
    raise ClassError(
        f"no class.toml in {start} or above it; make a class with `tlcourse grade init NAME`"
    )


def read_csv(path: Path, names: list[str], optional: str = "") -> list[tuple[int, dict[str, str]]]:
    """The lines of a CSV file with these columns: line number and stripped cells.

    Args:
        path: the file, in UTF-8.
        names: the columns, in this order.
        optional: name of the last column, where it may be left out; its cells are then "".

    Raises:
        ClassError: if there is no such file, it is not UTF-8, or its header or a line is another.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Excel writes a byte order mark
        lines = csv.reader(io.StringIO(text, newline=""))
        header = [name.strip() for name in next(lines, [])]
        rows = [(lines.line_num, [cell.strip() for cell in cells]) for cells in lines]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ClassError(f"{path}: not a CSV file in UTF-8: {error}") from error
    if header != names and [*header, optional] != names:
        raise ClassError(f"{path}: header must be {','.join(names)}, got {','.join(header)!r}")
    rows = [(line, cells) for line, cells in rows if any(cells)]
    for line, cells in rows:
        if len(cells) != len(header):
            raise ClassError(f"{path}, line {line}: expected {len(header)} cells, got {len(cells)}")
    empty = dict.fromkeys(names, "")
    return [(line, empty | dict(zip(header, cells, strict=True))) for line, cells in rows]


def _refuse_twice(path: Path, name: str, values: list[str]) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise ClassError(f"{path}: {name} {value!r} appears twice, expected once")
        seen.add(value)


def _checked_assignment(assignment: str) -> str:
    if not re.fullmatch(_ASSIGNMENT, assignment):
        raise ClassError(f"assignment must look like '03_gradients_by_hand', got {assignment!r}")
    return assignment


def _write_new(path: Path, text: str, mode: int = 0o666) -> None:
    """Write a file that must not exist yet (``O_EXCL``); one that does stays as it is."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        return
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)


def _ignore(path: Path) -> None:
    """Add what must stay out of git; lines that are there stay."""
    present = path.read_text(encoding="utf-8") if path.exists() else ""
    missing = [name for name in _IGNORED if name not in present.splitlines()]
    if missing:
        gap = "\n" if present and not present.endswith("\n") else ""
        with path.open("a", encoding="utf-8") as file:
            file.write(gap + "".join(f"{name}\n" for name in missing))
