"""Submissions in the class folder: stored atomically, and never lost when another replaces them.

``submitted/STUDENT/ASSIGNMENT/`` holds ``ASSIGNMENT.ipynb`` and nbgrader's ``timestamp.txt``, or
``refused.json`` in the place of a notebook that could not be taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from tlcourse.grading.class_folder import ClassFolder

REFUSED_FILE = "refused.json"  # {"reason": why, "bytes": how many it has at least}
STAMP_FILE = "timestamp.txt"
_STAMP = "%Y-%m-%d %H:%M:%S UTC"


def store_notebook(
    folder: ClassFolder, student: str, assignment: str, content: bytes, submitted_at: datetime
) -> Literal["new", "resubmitted", "unchanged", "superseded"]:
    """Store a notebook; an earlier one moves to ``grading/earlier/``, with its time.

    Returns:
        ``"unchanged"`` if these bytes are stored already (their time stays), ``"superseded"`` if
        the stored notebook was submitted later.
    """
    place = folder.submitted(student, assignment)
    notebook = place / f"{assignment}.ipynb"
    stored = notebook.read_bytes() if notebook.is_file() else None
    before = read_submitted_at(place)
    if stored == content:
        (place / REFUSED_FILE).unlink(missing_ok=True)
        return "unchanged"
    if stored is not None:
        if before and submitted_at < before:
            return "superseded"
        _keep(folder.earlier(student, assignment), stored, place / STAMP_FILE)
    # The time goes first: after a crash in between, the next collect finds another notebook.
    _write_stamp(place, submitted_at)
    write_atomically(notebook, content)
    (place / REFUSED_FILE).unlink(missing_ok=True)
    return "new" if stored is None else "resubmitted"


def store_refusal(
    folder: ClassFolder,
    student: str,
    assignment: str,
    reason: str,
    size_bytes: int,
    submitted_at: datetime,
) -> bool:
    """Write why there is no notebook, so that grading can say it; False if there is one."""
    place = folder.submitted(student, assignment)
    if (place / f"{assignment}.ipynb").is_file():
        return False
    content = json.dumps({"reason": reason, "bytes": size_bytes}).encode() + b"\n"
    path = place / REFUSED_FILE
    if not path.is_file() or path.read_bytes() != content:
        _write_stamp(place, submitted_at)
        write_atomically(path, content)
    return True


def read_submitted_at(place: Path) -> datetime | None:
    """The time in a submission's ``timestamp.txt``, in UTC; None if there is none that we wrote."""
    try:
        text = (place / STAMP_FILE).read_text(encoding="utf-8").strip()
        return datetime.strptime(text, _STAMP).replace(tzinfo=UTC)
    except (FileNotFoundError, ValueError):
        return None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def _write_stamp(place: Path, submitted_at: datetime) -> None:
    text = submitted_at.astimezone(UTC).strftime(_STAMP)
    write_atomically(place / STAMP_FILE, f"{text}\n".encode())


def _keep(earlier: Path, content: bytes, stamp: Path) -> None:
    """Keep a notebook under its hash, with the time when these bytes first came."""
    name = hashlib.sha256(content).hexdigest()[:16]
    if not (earlier / f"{name}.ipynb").exists():
        if stamp.is_file():
            write_atomically(earlier / f"{name}.txt", stamp.read_bytes())
        write_atomically(earlier / f"{name}.ipynb", content)
