"""What every attack is made of: an honest notebook, a place to attack, and what must come of it."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
import select
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from tlcourse.grading.class_settings import Limits
from tlcourse.grading.plan import Plan, make_plan
from tlcourse.grading.scoring import Outcome

ROOT = Path(__file__).resolve().parents[3]
NAME = "03_gradients_by_hand"
POINTS = {"q1": 2.0, "q2": 2.0, "q3": 2.0, "q4": 4.0, "q5": 4.0}  # q6 is marked by hand
LIMITS = Limits(
    cell_seconds=10, question_seconds=6, submission_seconds=60, memory_mb=600, processes=64,
    disk_mb=16, output_mb=4,
)  # fmt: skip
GROUPS = {
    1: "endless work",
    2: "a process that ends or crashes",
    3: "memory",
    4: "processes",
    5: "output",
    6: "files that are no notebook",
    7: "test cells deleted",
    8: "test cells, points or checksums edited",
    9: "grade ids doubled or swapped",
    10: "the interpreter turned against the test",
    11: "answers that only look right",
    12: "looking for answers, secrets and other students",
    13: "writing where it must not",
    14: "network, descriptors and forged results",
    15: "honest work that looks odd",
}
MARKER = re.compile(r"PROBE-[a-z]+-[0-9a-f]{16}")  # of everything that nobody may find
WRONG_1 = "def cross_entropy(logits, targets):\n    return 0.0"

Make = Callable[["Scene"], bytes | Path]
Edit = Callable[[NotebookNode], object]
Check = Callable[["Scene", Outcome, dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One submission and what must come of it.

    Attributes:
        group: a key of :data:`GROUPS`.
        name: short, unique.
        does: one sentence.
        make: from the scene to the submitted bytes, or to the file.
        points: question -> points; all others get all of theirs. None: whatever it earns.
        status: question -> status of its mark.
        says: all of these stand in the status and reason of the outcome.
        before: another student's submission, graded just before in the same sandbox.
        check: looks at the outcome and at all that the worker brought back.
        within: seconds, the most that grading may take.
        limits: those that are not as usual; short where time is what is attacked.
    """

    group: int
    name: str
    does: str
    make: Make
    points: dict[str, float] | None = field(default_factory=dict)
    status: dict[str, str] = field(default_factory=dict)
    says: tuple[str, ...] = ()
    before: Make | None = None
    check: Check | None = None
    within: float = 40
    limits: dict[str, float] = field(default_factory=dict)

    @property
    def honest_points(self) -> float:
        """The points of the part that is honest work."""
        return sum((POINTS | (self.points or {})).values())


@dataclass
class Scene:
    """A fake class, open doors that nobody may reach, and the exercise.

    Attributes:
        folder: a class folder with a secret, a gradebook and another student's work.
        listeners: name -> socket that waits for a connection or a datagram.
    """

    folder: Path
    plan: Plan
    listeners: dict[str, socket.socket]
    places: dict[str, str] = field(default_factory=dict)

    def fill(self, source: str) -> str:
        """Put the places of this scene into a cell's source: ``@FOLDER@``, ``@TCP@``, ..."""
        return re.sub("@([A-Z_]+)@", lambda match: self.places[match[1]], source)

    def heard(self) -> list[str]:
        """Listeners that somebody has reached."""
        ready = select.select(list(self.listeners.values()), [], [], 0)[0]
        return [name for name, each in self.listeners.items() if each in ready]

    def digest(self) -> str:
        """Of all names, kinds, modes, times and contents in the class folder."""
        lines = []
        for path in sorted(self.folder.rglob("*")):
            info = path.lstat()
            content = path.read_bytes() if stat.S_ISREG(info.st_mode) else b""
            lines.append([str(path), info.st_mode, info.st_mtime_ns, content.hex()])
        return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


@contextlib.contextmanager
def make_scene(place: Path) -> Iterator[Scene]:
    """Build a scene below ``place``; its markers stand in files, environment and memory."""

    def marker(kind: str) -> str:
        return f"PROBE-{kind}-{hashlib.sha256(kind.encode()).hexdigest()[:16]}"

    folder = place / "class"
    other = folder / "submitted" / "other" / NAME
    other.mkdir(parents=True)
    (other / f"{NAME}.ipynb").write_text(json.dumps({"cells": [], "by": marker("student")}))
    class_secret = marker("secret")
    for name, text in {"class_secret": class_secret, "gradebook.db": marker("grades"),
                       "class.toml": 'course_id = "probe"\n'}.items():  # fmt: skip
        (folder / name).write_text(text)
    os.environ["TLCOURSE_PROBE"] = marker("environ")
    listeners = _listen(folder)
    release = nbformat.read(ROOT / "notebooks" / "exercises" / f"{NAME}.ipynb", 4)
    plan = make_plan(NAME, release, class_secret.encode())
    places = {
        "FOLDER": str(folder),
        "PACKAGE": str(ROOT / "tlcourse"),
        "TCP": str(listeners["TCP"].getsockname()[1]),
        "UDP": str(listeners["UDP"].getsockname()[1]),
        "ABSTRACT": listeners["abstract socket"].getsockname()[1:].decode(),
    }
    try:
        yield Scene(folder, plan, listeners, places)
    finally:
        os.environ.pop("TLCOURSE_PROBE")
        for each in listeners.values():
            each.close()


def _listen(folder: Path) -> dict[str, socket.socket]:
    kinds = {
        "TCP": (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
        "UDP": (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
        "abstract socket": (socket.AF_UNIX, socket.SOCK_STREAM, f"\0probe-{os.getpid()}"),
        "socket in the class folder": (socket.AF_UNIX, socket.SOCK_STREAM, f"{folder}/socket"),
    }
    listeners = {}
    for name, (family, kind, address) in kinds.items():
        listeners[name] = socket.socket(family, kind)
        listeners[name].bind(address)
        if kind == socket.SOCK_STREAM:
            listeners[name].listen()
    return listeners


_solution: list[NotebookNode] = []
_PICTURE = 3


def solution(whole: bool = False) -> NotebookNode:
    """Honest work that is worth all points; not whole: without a picture that takes long."""
    if not _solution:
        _solution.append(nbformat.read(ROOT / "solutions" / f"{NAME}.ipynb", 4))
    nb = copy.deepcopy(_solution[0])
    if not whole:
        del nb.cells[_PICTURE]
    return nb


def grade_id(cell: NotebookNode) -> str:
    return cell.metadata.get("nbgrader", {}).get("grade_id", "")


def find(nb: NotebookNode, part: str) -> NotebookNode:
    """The cell of a part such as ``"q1-answer"``."""
    return next(cell for cell in nb.cells if grade_id(cell) == f"03-{part}")


def checks(nb: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in nb.cells if grade_id(cell).endswith("-check")]


def edited(*edits: Edit, **answers: str) -> Make:
    """The solution after some edits; ``q1="..."`` replaces the answer to a question."""

    def make(scene: Scene) -> bytes:
        nb = solution()
        for question, source in answers.items():
            find(nb, f"{question}-answer").source = source
        for edit in edits:
            edit(nb)
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.source = scene.fill(cell.source)
        return nbformat.writes(nb).encode()

    return make


def first(source: str, **answers: str) -> Make:
    """The solution with a cell put before all others."""
    return edited(lambda nb: nb.cells.insert(0, new_code_cell(source)), **answers)


def last(source: str, **answers: str) -> Make:
    """The solution with a cell put behind all others."""
    return edited(lambda nb: nb.cells.append(new_code_cell(source)), **answers)


def before_checks(source: str, **answers: str) -> Make:
    """The solution with a cell put behind the imports, before the first check."""
    return edited(lambda nb: nb.cells.insert(5, new_code_cell(source)), **answers)


def beside(body: str, right: bool = True) -> str:
    """An answer to question 1 that does something else before it gives its value."""
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    value = "np.mean(lse - logits[np.arange(len(targets)), targets])" if right else "0.0"
    return (
        f"def cross_entropy(logits, targets):\n{lines}"
        "    top = logits.max(axis=1, keepdims=True)\n"
        "    lse = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))\n"
        f"    return {value}"
    )


def failed_text(raw: dict[str, Any], cell: int = 0) -> str:
    """What an attack reported: the text of the error that its cell raised."""
    assert str(cell) in raw["failed"], f"the attack did not get to its report: {raw['failed']}"
    return raw["failed"][str(cell)][1]
