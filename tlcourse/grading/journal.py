"""The journal of results: one line for each graded submission, written before anything else.

A line that was cut off by a crash is ignored; of several lines for a student the last counts.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tlcourse.grading.scoring import Outcome, outcome_from_json


@dataclass(frozen=True)
class Entry:
    """A graded submission.

    Attributes:
        student: id.
        sha256: of the submitted file, or of the reason why it was refused.
        plan: sha256 of what was asked and what is right.
        run: the run that graded it.
        outcome: what came out.
    """

    student: str
    sha256: str
    plan: str
    run: str
    outcome: Outcome


def read(path: Path) -> dict[str, Entry]:
    """The last entry of each student."""
    entries: dict[str, Entry] = {}
    if not path.is_file():
        return entries
    for line in path.read_bytes().split(b"\n"):
        try:
            data: dict[str, Any] = json.loads(line)
            data["outcome"] = outcome_from_json(data["outcome"])
            entry = Entry(**data)
        except (ValueError, KeyError, TypeError):
            continue
        entries[entry.student] = entry
    return entries


class Journal:
    """The file, open for adding lines; each is on the disk when :meth:`add` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        if self._file.tell() and not path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")  # the last line was cut off

    def add(self, entry: Entry) -> None:
        """Write one line.

        Raises:
            OSError: if the disk is full; what was there before stays readable.
        """
        line = json.dumps(asdict(entry), sort_keys=True).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
