"""Collect what students handed in, from a learning platform's download into ``submitted/``.

Everything in the source is hostile: names and contents are the students'. Nothing outside the
source is read and nothing outside the class folder's ``submitted/`` and ``grading/earlier/`` is
written. The layouts that are understood stand in :mod:`tlcourse.grading.layouts`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Literal, get_args

from tlcourse.grading.class_folder import ClassFolder
from tlcourse.grading.class_settings import MEGABYTE, ClassError
from tlcourse.grading.incoming import Found, Refusal, open_source
from tlcourse.grading.layouts import (
    LayoutError,
    Roster,
    TableLine,
    find_assignment,
    read_origin,
    read_origin_table,
)
from tlcourse.grading.store import read_submitted_at, store_notebook, store_refusal

Status = Literal["new", "resubmitted", "unchanged", "superseded", "refused", "skipped"]
_MAX_TRIES = 5  # notebooks of one student for one assignment that are read, newest first
_MAX_LINES = 20  # of the summary, for one status
_MAX_SHOWN = 200  # characters of a path or reason


@dataclass(frozen=True)
class Entry:
    """What became of one file. ``path`` is safe to print; ``submitted_at`` is aware."""

    path: str
    student: str | None
    assignment: str | None
    status: Status
    reason: str = ""
    submitted_at: datetime | None = None


@dataclass(frozen=True)
class Collected:
    """What became of a source.

    Attributes:
        entries: one for each file, by path; hidden files are left out.
        unknown: ids that were collected although ``students.csv``, which is not empty, lacks them.
    """

    entries: list[Entry]
    unknown: list[str]

    def summary(self) -> str:
        """Counts, and all that needs a teacher's eye, for a terminal."""
        counts = Counter(entry.status for entry in self.entries)
        lines = [", ".join(f"{counts[status]} {status}" for status in get_args(Status))]
        for status in ("resubmitted", "superseded", "refused", "skipped"):
            chosen = [entry for entry in self.entries if entry.status == status]
            for entry in chosen[:_MAX_LINES]:
                lines.append(f"{status}: {entry.path}" + (entry.reason and f" ({entry.reason})"))
            if len(chosen) > _MAX_LINES:
                lines.append(f"{status}: {len(chosen) - _MAX_LINES} more")
        if self.unknown:
            listed = ", ".join(self.unknown)
            lines.append(f"not in students.csv (as id or platform_id): {listed}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Notebook:
    """A file of a known student and assignment that is not read yet."""

    path: str
    student: str
    assignment: str
    submitted_at: datetime
    order: tuple[datetime, datetime, int, str]  # the newest is the greatest
    read: Callable[[], bytes]

    def entry(self, status: Status, reason: str = "") -> Entry:
        shown = _printable(self.path)
        reason = _printable(reason)
        return Entry(shown, self.student, self.assignment, status, reason, self.submitted_at)


@dataclass(frozen=True)
class _Sorter:
    """Finds the student, the assignment and the time of each file."""

    roster: Roster
    table: list[TableLine]
    assignments: list[str]
    only: str | None
    now: datetime
    name_times: tzinfo | None

    def sort(self, file: Found) -> _Notebook | Entry:
        """The notebook to be read, or what to report of a file that is none."""
        shown = _printable(file.path)
        if file.read is None:
            return Entry(shown, None, None, file.status, _printable(file.reason))
        try:
            origin = read_origin(file.path, self.roster, self.table)
        except LayoutError as error:
            return Entry(shown, None, None, "refused", _printable(str(error)))
        assignment = self.only or find_assignment(file.path, origin.name, self.assignments)
        if assignment is None:
            reason = "no assignment in its name; name it, or collect it with `only`"
            return Entry(shown, origin.student, None, "refused", reason)
        named_at = origin.named_at
        zoned = named_at.replace(tzinfo=self.name_times) if named_at and self.name_times else None
        time = origin.submitted_at or zoned or self.now
        order = (time, named_at or datetime.min, origin.attempt, file.path)
        return _Notebook(file.path, origin.student, assignment, time, order, file.read)


def collect(
    folder: ClassFolder,
    source: Path,
    assignments: list[str],
    *,
    only: str | None = None,
    table: Path | None = None,
    now: datetime,
    name_times: tzinfo | None = None,
) -> Collected:
    """Store the newest notebook of each student and assignment; report on every file.

    A notebook's time comes from the table, else (with ``name_times``) from the name that the
    platform gave, else it is ``now``; never from a file or a zip, where a student could set it.
    What is stored keeps its time: to correct one, delete its folder and collect again.

    Args:
        folder: the class folder.
        source: a folder, a ``.zip`` or an ``.ipynb``.
        assignments: names of the released assignments.
        only: take every notebook as one of this assignment.
        table: CSV file ``path,student_id,submitted_at`` that overrules the layout.
        now: aware; the time of collecting.
        name_times: the time zone of the times in Blackboard's and Brightspace's names.

    Raises:
        ClassError: if the source, the table or a file of the class folder is not as expected; a
            student's file never raises.
    """
    if now.tzinfo is None:
        raise ClassError(f"now must have a time zone, got {now}")
    if only is not None and only not in assignments:
        raise ClassError(f"only must be one of {', '.join(assignments)}, got {only!r}")
    roster = Roster(folder.students())
    lines = read_origin_table(table) if table else []
    sorter = _Sorter(roster, lines, assignments, only, now, name_times)
    limit_bytes = int(folder.settings().limits.notebook_mb * MEGABYTE)
    entries: list[Entry] = []
    groups: dict[tuple[str, str], list[_Notebook]] = {}
    with open_source(Path(source), limit_bytes) as files:
        for file in files:
            found = sorter.sort(file)
            if isinstance(found, Entry):
                entries.append(found)
            else:
                groups.setdefault((found.student, found.assignment), []).append(found)
        for notebooks in groups.values():
            entries += _store_newest(folder, notebooks)
    students = {student for student, _ in groups}
    unknown = sorted(students - roster.ids) if roster.ids else []
    return Collected(sorted(entries, key=lambda entry: entry.path), unknown)


def _store_newest(folder: ClassFolder, notebooks: list[_Notebook]) -> list[Entry]:
    """Store the newest notebook that can be read, of one student for one assignment."""
    newest_first = sorted(notebooks, key=lambda notebook: notebook.order, reverse=True)
    refused: list[tuple[_Notebook, Refusal]] = []
    stored: list[Entry] = []
    for notebook in newest_first[:_MAX_TRIES]:
        try:
            content = notebook.read()
        except Refusal as refusal:
            refused.append((notebook, refusal))
        else:
            stored.append(_store(folder, notebook, content))
            break
    older = newest_first[len(refused) + len(stored) :]
    entries = stored + [notebook.entry("superseded") for notebook in older]
    if refused:
        stays = bool(stored) or not _store_refusal(folder, *refused[0])
        note = "; an older notebook stays" if stays else ""
        entries += [each.entry("refused", refusal.reason + note) for each, refusal in refused]
    return entries


def _store_refusal(folder: ClassFolder, notebook: _Notebook, refusal: Refusal) -> bool:
    return store_refusal(
        folder,
        notebook.student,
        notebook.assignment,
        _printable(refusal.reason),
        refusal.size_bytes,
        notebook.submitted_at,
    )


def _store(folder: ClassFolder, notebook: _Notebook, content: bytes) -> Entry:
    student, assignment = notebook.student, notebook.assignment
    status = store_notebook(folder, student, assignment, content, notebook.submitted_at)
    if status == "superseded":
        return notebook.entry(status, "the stored notebook was submitted later")
    stamp = read_submitted_at(folder.submitted(student, assignment))
    return replace(notebook.entry(status), submitted_at=stamp)


def _printable(text: str) -> str:
    """Hostile text for a terminal: no control characters, not endless."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."
