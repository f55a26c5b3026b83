"""The settings of a class, ``class.toml``: read strictly, since a typing error costs points."""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

MEGABYTE = 1_000_000  # bytes; what "mb" means in the names below
SECONDS_PER_DAY = 86_400
TEMPLATE = """\
# Settings of this class, read by `tlcourse grade`. An unknown or misspelt name is an error.

# Name of the class, also nbgrader's course_id: letters, digits, dot, hyphen and underscore.
course_id = "{course_id}"

# What a submission may use. MB are 1,000,000 bytes.
[limits]
notebook_mb = 20          # MB; a larger file is refused and graded as such
cell_seconds = 60         # seconds for one cell
question_seconds = 20     # seconds for all cases of one question
submission_seconds = 300  # seconds for a whole submission
memory_mb = 2048          # MB of memory for one submission
processes = 64            # number of processes and threads
disk_mb = 64              # MB that may be written
output_mb = 16            # MB of printed text and results

# What a late submission costs.
[late]
grace_minutes = 0         # minutes after the deadline that cost nothing
percent_per_day = 0       # percent of the score, for each started day after the grace
most_percent = 100        # percent of the score, never more than this

# When each assignment is due, by its number; always with the offset from UTC.
[deadlines]
# "03" = 2026-11-20T23:59:00+01:00

# Another deadline for one student, by number and student id (in quotes).
# [extensions."03"]
# "ada" = 2026-11-27T23:59:00+01:00
"""
_COURSE_ID = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NUMBER = r"[0-9]{2}"
_STUDENT_ID = r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}"
_Numbers = TypeVar("_Numbers", "Limits", "LateRule")


class ClassError(ValueError):
    """Something in a class folder is not as expected; names file, key, value and expectation."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a submission may use; each > 0. MB are 1,000,000 bytes.

    Raises:
        ClassError: if a value is not a number > 0, or not whole where an ``int`` is expected.
    """

    notebook_mb: float = 20
    cell_seconds: float = 60
    question_seconds: float = 20
    submission_seconds: float = 300
    memory_mb: int = 2048
    processes: int = 64
    disk_mb: int = 64
    output_mb: int = 16

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            whole = each.type == "int"
            if not _is_number(value, whole) or value <= 0:
                kind = "a whole number" if whole else "a number"
                raise ClassError(f"{each.name} must be {kind} > 0, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class LateRule:
    """What a late submission costs.

    Attributes:
        grace_minutes: >= 0; minutes after the deadline that cost nothing.
        percent_per_day: in [0, 100]; of the score, for each started day after the grace.
        most_percent: in [0, 100]; of the score, the most that is taken off.

    Raises:
        ClassError: if a value is outside its range.
    """

    grace_minutes: float = 0
    percent_per_day: float = 0
    most_percent: float = 100

    def __post_init__(self) -> None:
        if not _is_number(self.grace_minutes) or self.grace_minutes < 0:
            raise ClassError(f"grace_minutes must be a number >= 0, got {self.grace_minutes!r}")
        for name in ("percent_per_day", "most_percent"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= 100:
                raise ClassError(f"{name} must be a number in [0, 100], got {value!r}")

    def penalty(self, score: float, seconds_late: float) -> float:
        """Points taken off a score (>= 0) that came this late; <= 0 seconds is in time."""
        days = math.ceil((seconds_late - 60 * self.grace_minutes) / SECONDS_PER_DAY)
        percent = min(max(days, 0) * self.percent_per_day, self.most_percent)
        return score * percent / 100


@dataclass(frozen=True)
class Settings:
    """What ``class.toml`` says.

    Attributes:
        course_id: name of the class, also nbgrader's.
        limits: what a submission may use.
        late: what a late submission costs.
        deadlines: number of the assignment, such as ``"03"`` -> aware datetime.
        extensions: number -> student id -> aware datetime, in place of the deadline.
    """

    course_id: str
    limits: Limits = field(default_factory=Limits)
    late: LateRule = field(default_factory=LateRule)
    deadlines: dict[str, datetime] = field(default_factory=dict)
    extensions: dict[str, dict[str, datetime]] = field(default_factory=dict)

    def deadline(self, number: str, student: str) -> datetime | None:
        """When this student must have handed in; None if there is no deadline."""
        return self.extensions.get(number, {}).get(student, self.deadlines.get(number))


def is_student_id(text: str) -> bool:
    """Whether this can be a student id, and so a folder's name: no ``/``, no ``..``."""
    return re.fullmatch(_STUDENT_ID, text) is not None


def read_settings(path: Path) -> Settings:
    """Read and check a ``class.toml``.

    Raises:
        ClassError: if it is no TOML, has an unknown key, or a value that is not as expected.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ClassError(f"{path}: not TOML in UTF-8: {error}") from error
    _refuse_unknown(path, raw, [each.name for each in fields(Settings)])
    course_id = raw.get("course_id")
    if not isinstance(course_id, str) or not re.fullmatch(_COURSE_ID, course_id):
        raise ClassError(
            f"{path}: course_id must be a text of letters, digits, '.', '-' and '_' that begins "
            f"with a letter or digit, got {course_id!r}"
        )
    extensions = _table(path, raw, "extensions", _NUMBER, "a lesson's number such as '03'")
    return Settings(
        course_id=course_id,
        limits=_numbers(path, raw, "limits", Limits),
        late=_numbers(path, raw, "late", LateRule),
        deadlines=_times(path, raw, "deadlines", _NUMBER, "a lesson's number such as '03'"),
        extensions={
            number: _times(path, extensions, number, _STUDENT_ID, "a student id", "extensions.")
            for number in extensions
        },
    )


def _is_number(value: Any, whole: bool = False) -> bool:
    kinds = int if whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)


def _refuse_unknown(path: Path, table: dict[str, Any], known: list[str], before: str = "") -> None:
    for key in table:
        if key not in known:
            expected = ", ".join(known)
            raise ClassError(f"{path}: unknown key {before}{key}; expected one of: {expected}")


def _numbers(path: Path, raw: dict[str, Any], name: str, kind: type[_Numbers]) -> _Numbers:
    table = _table(path, raw, name)
    _refuse_unknown(path, table, [each.name for each in fields(kind)], f"{name}.")
    try:
        return kind(**table)
    except ClassError as error:
        raise ClassError(f"{path}: {name}.{error}") from error


def _times(
    path: Path, raw: dict[str, Any], name: str, key: str, expected: str, before: str = ""
) -> dict[str, datetime]:
    table = _table(path, raw, name, key, expected, before)
    for each, value in table.items():
        if not isinstance(value, datetime) or value.tzinfo is None:
            raise ClassError(
                f"{path}: {before}{name}.{each} must be a date and time with its offset from UTC, "
                f"such as 2026-11-20T23:59:00+01:00 (no quotes), got {_shown(value)}"
            )
    return table


def _table(
    path: Path, raw: dict[str, Any], name: str, key: str = "", expected: str = "", before: str = ""
) -> dict[str, Any]:
    """A sub-table, empty if absent; each of its keys must match ``key`` where one is given."""
    table = raw.get(name, {})
    if not isinstance(table, dict):
        raise ClassError(f"{path}: {before}{name} must be a table, got {_shown(table)}")
    for each in table:
        if key and not re.fullmatch(key, each):
            raise ClassError(f"{path}: key {before}{name}.{each} must be {expected}, got {each!r}")
    return table


def _shown(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else repr(value)
