"""Whose notebook is this, and of which assignment? Read from its path, or from a table.

Only the first part of a path, which the teacher or the learning platform has chosen, says who
handed in; everything below it is the student's, who may name a folder after somebody else.
The layouts, with what names the student in capitals:

=============  ==================================================================
nbgrader       ``STUDENT/03_gradients_by_hand/NB.ipynb``
plain          ``STUDENT/NB.ipynb``, also several levels below
Moodle         ``Full Name_NUMBER_assignsubmission_file_/NB.ipynb``, also without the last
               underscore, several levels below, or flat (``..._file_NB.ipynb``)
Canvas         ``name_NUMBER_67890_NB-2.ipynb`` or ``name_LATE_NUMBER_67890_NB-2.ipynb``,
               where 67890 is the upload and ``-2`` the attempt
Blackboard     ``Title_USERNAME_attempt_2026-11-20-13-05-11_NB.ipynb``
Brightspace    ``NUMBER-67890 - Full Name - Nov 20, 2026 105 PM/NB.ipynb``
=============  ==================================================================

In the flat layouts the file may be a ``.zip`` of the student's. Moodle's numbers are other ones
for each assignment: a student's line in ``students.csv`` may list several, or a table with the
pattern ``Full Name_*`` serves the whole course.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from tlcourse.grading.class_folder import Student, read_csv
from tlcourse.grading.class_settings import ClassError, is_student_id

_MOODLE = re.compile(r"[^_]+_(?P<id>[0-9]+)_assignsubmission_file(?:_(?P<rest>.*))?", re.S)
_CANVAS = re.compile(r"(?=_(?P<id>[0-9]+)_[0-9]+_(?P<rest>.+))", re.S)
_BLACKBOARD = re.compile(
    r"(?P<before>.+?)_attempt_(?P<time>[0-9]{4}(?:-[0-9]{2}){5})_(?P<rest>.+)", re.S
)
_BRIGHTSPACE = re.compile(r"(?P<id>[0-9]+)-[0-9]+ - .+ - (?P<time>.+)", re.S)
_BRIGHTSPACE_TIME = re.compile(
    r"([A-Z][a-z]{2})[a-z]*\s([0-9]{1,2}),\s([0-9]{4})\s([0-9]{1,2})([0-9]{2})\s([AP])M"
)
_MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


class LayoutError(ValueError):
    """A path that does not say who handed in."""


@dataclass(frozen=True)
class Origin:
    """What a path says.

    Attributes:
        student: the student's id.
        name: the file's name as the student chose it.
        named_at: the time that the platform put into the name, without a zone; None if none.
        attempt: Canvas's count of attempts, 0 where there is none.
        submitted_at: the time of the table; None if it has none.
    """

    student: str
    name: str
    named_at: datetime | None = None
    attempt: int = 0
    submitted_at: datetime | None = None


@dataclass(frozen=True)
class TableLine:
    """One line of a ``--table``: paths that match the pattern are this student's."""

    pattern: str
    student: str
    submitted_at: datetime | None

    def matches(self, path: str) -> bool:
        """Whether the path, or a folder or zip that holds it, is or matches the pattern."""
        pattern = self.pattern.rstrip("/")
        if path == pattern or path.startswith(f"{pattern}/"):  # names with brackets, too
            return True
        return fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}/*")


class Roster:
    """Who takes part, by id and by the ids that platforms give."""

    def __init__(self, students: list[Student]) -> None:
        self.ids = {student.id for student in students}
        self._of_platform = {p: student.id for student in students for p in student.platform_ids}

    def translate(self, platform_id: str) -> str:
        """The student with this id on the platform; the id itself if there is none."""
        return self._of_platform.get(platform_id, platform_id)

    def knows(self, platform_id: str) -> bool:
        return self.translate(platform_id) in self.ids


def read_origin(path: str, roster: Roster, table: list[TableLine]) -> Origin:
    """Who handed in the file at this path, which is relative to the source, with ``/``.

    Raises:
        LayoutError: if the path fits no layout, fits two students, or gives an id that cannot be
            a folder's name.
    """
    line = next((line for line in table if line.matches(path)), None)
    if line is not None:
        origin = _from_platform(path, Roster([])) or _plain(path)
        return replace(origin, student=line.student, submitted_at=line.submitted_at)
    origin = _from_platform(path, roster) or _plain(path)
    if not origin.student:
        raise LayoutError("no student in the path; collect a folder of students, or use a table")
    if not is_student_id(origin.student):
        raise LayoutError(
            f"{origin.student!r} cannot be a student id (letters, digits and . _ @ + -, at most "
            "64); use a table"
        )
    return origin


def find_assignment(path: str, name: str, assignments: list[str]) -> str | None:
    """The assignment whose name or number the file has, or whose name a folder above has."""
    stem = PurePosixPath(name).stem.casefold()
    folders = PurePosixPath(path).parts[1:-1]
    for assignment in assignments:
        if assignment.casefold() in stem:
            return assignment
    for assignment in assignments:
        if re.match(assignment[:2] + r"(?![0-9])", stem):
            return assignment
    return next((folder for folder in reversed(folders) if folder in assignments), None)


def read_origin_table(path: Path) -> list[TableLine]:
    """Read a ``--table``: a CSV file ``path,student_id,submitted_at``, the last one optional.

    Raises:
        ClassError: if a student id is not allowed, or a time is not ISO 8601 with an offset.
    """
    lines = []
    for number, row in read_csv(path, ["path", "student_id", "submitted_at"], "submitted_at"):
        student, text = row["student_id"], row["submitted_at"]
        if not row["path"]:
            raise ClassError(f"{path}, line {number}: path must not be empty")
        if not is_student_id(student):
            raise ClassError(f"{path}, line {number}: student_id is not allowed: {student!r}")
        lines.append(TableLine(row["path"], student, _parse_time(text, path, number)))
    return lines


def _parse_time(text: str, path: Path, number: int) -> datetime | None:
    if not text:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = None
    if time is None or time.tzinfo is None:
        raise ClassError(
            f"{path}, line {number}: submitted_at must be ISO 8601 with an offset, such as "
            f"2026-11-20T23:59:00+01:00, got {text!r}"
        )
    return time


def _plain(path: str) -> Origin:
    """The first folder is the student; "" where the path begins with a file or a zip."""
    first, slash, _ = path.partition("/")
    student = first if slash and not first.lower().endswith(".zip") else ""
    return Origin(student, PurePosixPath(path).name)


def _from_platform(path: str, roster: Roster) -> Origin | None:
    """Read the first part of a path as a name that a learning platform gave; None if it is not."""
    first, slash, below = path.partition("/")
    origin: Origin | None = None
    if found := _MOODLE.fullmatch(first):
        origin = Origin(roster.translate(found["id"]), found["rest"] or "")
    elif not slash or first.lower().endswith(".zip"):
        origin = _blackboard(first, roster) or _canvas(first, roster)
    elif found := _BRIGHTSPACE.fullmatch(first):
        student = roster.translate(found["id"])
        origin = Origin(student, "", named_at=_brightspace_time(found["time"]))
    return replace(origin, name=PurePosixPath(below).name) if origin and below else origin


def _canvas(first: str, roster: Roster) -> Origin | None:
    """The first number is the student's, as file names belong to students.

    A display name that ends in ``_12345`` would come before it, though, so a name that also
    reads as another known student's is refused.
    """
    readings = list(_CANVAS.finditer(first))
    if not readings:
        return None
    student, rest = roster.translate(readings[0]["id"]), readings[0]["rest"]
    others = {roster.translate(found["id"]) for found in readings[1:]} & roster.ids
    if others - {student}:
        raise LayoutError(f"could be of {student} or {min(others - {student})}; use a table")
    attempt = re.search(r"-([0-9]{1,6})$", PurePosixPath(rest).stem)
    return Origin(student, rest, attempt=int(attempt[1]) if attempt else 0)


def _blackboard(first: str, roster: Roster) -> Origin | None:
    """The user name ends at the first ``_attempt_``; it may itself have underscores."""
    found = _BLACKBOARD.fullmatch(first)
    if not found:
        return None
    words = found["before"].split("_")
    readings = ["_".join(words[start:]) for start in range(len(words))]
    known = {roster.translate(user) for user in readings if roster.knows(user)}
    if len(known) > 1:
        raise LayoutError(f"could be of {' or '.join(sorted(known))}; use a table")
    student = known.pop() if known else words[-1]
    return Origin(student, found["rest"], named_at=_time(*map(int, found["time"].split("-"))))


def _brightspace_time(text: str) -> datetime | None:
    found = _BRIGHTSPACE_TIME.fullmatch(text)
    if not found or found[1] not in _MONTHS:
        return None
    hour = int(found[4]) % 12 + (12 if found[6] == "P" else 0)
    return _time(int(found[3]), _MONTHS.index(found[1]) + 1, int(found[2]), hour, int(found[5]))


def _time(year: int, *rest: int) -> datetime | None:
    try:
        return datetime(year, *rest) if 1970 <= year < 9000 else None  # type: ignore[arg-type]
    except ValueError:
        return None
