"""Grade one attack and look at everything that must hold for it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

from tests.grading.hostile.scene import LIMITS, MARKER, POINTS, Attack, Scene, edited
from tlcourse.grading import attempt, marking, scoring
from tlcourse.grading.class_settings import MEGABYTE
from tlcourse.grading.scoring import WORDS, Outcome
from tlcourse.grading.submission import UnreadableError, read

_HONEST = edited()


@dataclass
class Result:
    """What happened: the outcome, all that the worker brought back, and each thing amiss."""

    attack: Attack
    outcome: Outcome
    raw: dict[str, Any]
    seconds: float
    amiss: list[str] = field(default_factory=list)

    @property
    def points(self) -> dict[str, float]:
        marks = {mark.id.split(".")[1]: mark for mark in self.outcome.marks}
        return {question: marks[question].points or 0.0 for question in POINTS}


def grade(
    scene: Scene, data: bytes | Path, changes: dict[str, Any] | None = None
) -> tuple[Outcome, dict[str, Any]]:
    """The outcome of a submission, and the worker's JSON behind it."""
    limits = replace(LIMITS, **(changes or {}))
    brought = [b"{}"]

    def record(job: bytes) -> bytes:
        brought.append(attempt.attempt(job))
        return brought[-1]

    with mock.patch.object(marking, "attempt", record):
        try:
            if isinstance(data, Path):
                data = read(data, int(limits.notebook_mb * MEGABYTE)).data
            outcome = marking.mark(scene.plan, data, limits)
        except UnreadableError as error:
            outcome = scoring.unreadable(scene.plan, str(error))
    return outcome, json.loads(brought[-1])


def run(scene: Scene, attack: Attack) -> Result:
    """Grade an attack, and find what is not as it must be."""
    if attack.before is not None:
        earlier, _ = grade(scene, attack.before(scene))
        assert not earlier.reason and not earlier.failed_cells, earlier
    data = attack.make(scene)
    digest, start = scene.digest(), time.monotonic()
    with at_most(attack.within + 60):
        outcome, raw = grade(scene, data, attack.limits)
    result = Result(attack, outcome, raw, round(time.monotonic() - start, 2))
    if result.seconds > attack.within:
        result.amiss.append(f"took {result.seconds} s, more than {attack.within}")
    result.amiss += marks_amiss(result) + words_amiss(outcome) + leaks(scene, digest, raw)
    if attack.check is not None:
        try:
            attack.check(scene, outcome, raw)
        except AssertionError as error:
            result.amiss.append(f"its own check: {error or 'an assertion'}")
    return result


def marks_amiss(result: Result) -> list[str]:
    """Points, statuses and words that are not those expected."""
    attack, outcome, points = result.attack, result.outcome, result.points
    amiss = []
    if attack.points is not None and points != POINTS | attack.points:
        amiss.append(f"points {points}, expected {POINTS | attack.points}")
    statuses = {mark.id.split(".")[1]: mark.status for mark in outcome.marks}
    for question, status in attack.status.items():
        if statuses[question] != status:
            amiss.append(f"{question} is {statuses[question]!r}, expected {status!r}")
    said = f"{outcome.status}: {outcome.reason}"
    amiss += [f"{said!r} does not say {words!r}" for words in attack.says if words not in said]
    if outcome.status != "graded" and not outcome.reason:
        amiss.append("no reason is given")
    return amiss


def words_amiss(outcome: Outcome) -> list[str]:
    """Words for the student or the teacher that the submission itself has put in."""
    ours = "|".join(map(re.escape, WORDS.values()))
    for_student = re.compile(rf"({ours}|right on \d of \d hidden inputs)( \([A-Z]\w{{3,30}}\))?")
    where = r"(cell \d+|question 03\.q\d|start )"
    stop = rf"({where}: ({ours})|it was not run to its end)"
    amiss = [f"told to the student: {mark.words()!r}" for mark in outcome.marks
             if not for_student.fullmatch(mark.words())]  # fmt: skip
    stops = re.compile(rf"({stop}(; {stop})*)?")
    if outcome.status != "unreadable" and not stops.fullmatch(outcome.reason):
        amiss.append(f"the reason is {outcome.reason!r}")
    texts = [*outcome.failed_cells.values(), *(mark.remark for mark in outcome.marks)]
    amiss += [f"not one line: {text[:80]!r}" for text in texts if not text.isprintable()]
    return amiss


def leaks(scene: Scene, digest: str, raw: dict[str, Any]) -> list[str]:
    """What came out of the sandbox, or is left of the submission."""
    amiss = [f"reached the {name}" for name in scene.heard()]
    if scene.digest() != digest:
        amiss.append("the class folder has changed")
    amiss += [f"found {marker}" for marker in set(MARKER.findall(json.dumps(raw)))]
    left = processes_left()
    if left:
        amiss.append(f"{left} processes are left")
    return amiss


def processes_left() -> int:
    """Processes of this worker's sandbox beyond bubblewrap's two and the one that waits."""
    kept = getattr(attempt._here, "sandbox", None)
    if kept is None:
        return 0
    parents = {}
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            _, _, state = Path("/proc", name, "stat").read_text().rpartition(")")
            parents[int(name)] = int(state.split()[1])
    found, size = {kept[1]._process.pid}, 0
    while len(found) != size:
        size = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    group = kept[1]._group
    for folder in group.folders if group else []:
        found |= {int(pid) for pid in (folder / "cgroup.procs").read_text().split()}
    return len(found) - 3


def honest_work_amiss(scene: Scene) -> list[str]:
    """Grade honest work in the same sandbox; what is wrong with its outcome."""
    outcome, _ = grade(scene, _HONEST(scene))
    points = sum(mark.points or 0 for mark in outcome.marks)
    if (outcome.status, points) == ("graded", sum(POINTS.values())):
        return []
    return [f"honest work after it: {outcome.status}, {outcome.reason}, {points} points"]


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError where the parent itself hangs."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"grading did not come back within {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
