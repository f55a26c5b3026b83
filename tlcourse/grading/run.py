"""Grade a whole class: what is new or changed, on this machine or on a Dask cluster.

The order of safety: a result goes to the journal first, then into the gradebook. Whatever
interrupts a run, what is in the journal is never graded again, and the gradebook catches up at
the next run.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import nbformat
from nbformat import NotebookNode
from tqdm import tqdm

from tlcourse.grading import attempt, journal, pools, sandbox, scoring
from tlcourse.grading.class_folder import ClassFolder
from tlcourse.grading.class_settings import MEGABYTE, ClassError, Limits
from tlcourse.grading.gradebook import (
    enter_outcome,
    enter_students,
    open_gradebook,
    set_late_penalty,
)
from tlcourse.grading.graded import answered_questions, graded_notebook
from tlcourse.grading.marking import make_job
from tlcourse.grading.plan import Plan
from tlcourse.grading.release import load_plan
from tlcourse.grading.store import REFUSED_FILE, read_submitted_at, write_atomically
from tlcourse.grading.submission import UnreadableError, parse, read


@dataclass(frozen=True)
class Options:
    """How to grade.

    Attributes:
        workers: submissions at the same time on this machine; ignored with a scheduler.
        scheduler: address of a Dask scheduler, such as ``"tcp://host:8786"``; None for none.
        walled: False runs submissions without a sandbox: only for a teacher's own notebooks.
        again: grade what is graded already, too.
        resume: with ``again``: go on with an interrupted run.
        quiet: no progress bar.
    """

    workers: int = 1
    scheduler: str | None = None
    walled: bool = True
    again: bool = False
    resume: bool = False
    quiet: bool = False


@dataclass
class Summary:
    """What a run did.

    Attributes:
        name: of the exercise.
        graded: submissions that were graded in this run.
        unchanged: those that were graded before and have not changed.
        statuses: status -> how many submissions have it, of all.
        failed: student -> why it could not be graded; no fault of the student.
        interrupted: the run was stopped; `resume` goes on.
        seconds: that the run took.
    """

    name: str
    graded: int = 0
    unchanged: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    failed: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class _Read:
    """What a student has handed in: the file's bytes, or the reason why there are none."""

    student: str
    sha256: str
    data: bytes = b""
    reason: str = ""


def grade(folder: ClassFolder, name: str, options: Options = Options()) -> Summary:
    """Grade all submissions of an exercise that are new, changed, or asked otherwise now.

    Raises:
        SandboxError: if there is no sandbox here to grade in.
        PlanError: if the exercise was not handed out.
        ClassError: if the class folder lies where submissions can read.
    """
    start = time.monotonic()
    if options.walled and options.scheduler is None and (why := sandbox.problem()):
        raise sandbox.SandboxError(why)
    _refuse_in_view(folder)
    plan, release = load_plan(folder, name)
    students = submitters(folder, name)
    known = journal.read(folder.results(name))
    run = _run_id(folder, name, options)
    summary = Summary(name)
    limits = folder.settings().limits
    found = (_read(folder, name, student, limits) for student in students)
    todo = [each.student for each in found
            if not _is_done(each, known.get(each.student), plan, run, options)]  # fmt: skip
    summary.unchanged = len(students) - len(todo)
    try:
        _grade_all(folder, plan, todo, limits, run, options, summary)
    except KeyboardInterrupt:
        summary.interrupted = True
    entries = journal.read(folder.results(name))
    enter_all(folder, plan, release, {s: entries[s] for s in students if s in entries})
    summary.statuses = Counter(entries[s].outcome.status for s in students if s in entries)
    summary.seconds = time.monotonic() - start
    return summary


def _refuse_in_view(folder: ClassFolder) -> None:
    for path in sandbox.visible():
        if folder.root.is_relative_to(path):
            raise ClassError(f"{folder.root} lies in {path}, which submissions can read; move it")


def submitters(folder: ClassFolder, name: str) -> list[str]:
    """Students who have handed in an exercise, in order."""
    root = folder.root / "submitted"
    files = [*root.glob(f"*/{name}/{name}.ipynb"), *root.glob(f"*/{name}/{REFUSED_FILE}")]
    return sorted({path.parent.parent.name for path in files})


def enter_all(
    folder: ClassFolder, plan: Plan, release: NotebookNode, entries: dict[str, journal.Entry]
) -> None:
    """Bring gradebook and graded notebooks up to the journal; in the order of the students."""
    marker = folder.results(plan.name).with_suffix(".entered.json")
    entered: dict[str, list[str]] = json.loads(marker.read_text()) if marker.is_file() else {}
    try:
        with open_gradebook(folder) as book:
            enter_students(book, folder)
            for student, entry in sorted(entries.items()):
                stamp = read_submitted_at(folder.submitted(student, plan.name))
                state = [entry.sha256, entry.plan, entry.run, str(stamp)]
                before = entered.get(student)
                if before != state:
                    new = before is not None and before[0] != entry.sha256
                    _enter(book, folder, plan, release, entry, stamp, new)
                    entered[student] = state
                set_late_penalty(book, folder, plan.name, student)
    finally:
        write_atomically(marker, json.dumps(entered, sort_keys=True).encode())


def _enter(
    book: Any,
    folder: ClassFolder,
    plan: Plan,
    release: NotebookNode,
    entry: journal.Entry,
    stamp: datetime | None,
    new: bool,
) -> None:
    path = folder.submitted(entry.student, plan.name) / f"{plan.name}.ipynb"
    submitted = None
    if entry.outcome.status != "unreadable":
        submitted = parse(path.read_bytes())
    nb = graded_notebook(plan, release, submitted, entry.outcome)
    target = folder.autograded(entry.student, plan.name) / f"{plan.name}.ipynb"
    write_atomically(target, nbformat.writes(nb).encode())
    answered = answered_questions(plan, release, nb)
    enter_outcome(book, plan.name, entry.student, entry.outcome,
                  submitted_at=stamp, answered=answered, new=new)  # fmt: skip


def _grade_all(
    folder: ClassFolder,
    plan: Plan,
    todo: list[str],
    limits: Limits,
    run: str,
    options: Options,
    summary: Summary,
) -> None:
    book = journal.Journal(folder.results(plan.name))
    bar = tqdm(total=len(todo), desc=plan.name, unit="submission", disable=options.quiet)
    pool = pools.open_pool(options.workers, options.scheduler)

    def note(item: _Read, outcome: scoring.Outcome) -> None:
        book.add(journal.Entry(item.student, item.sha256, plan.sha256, run, outcome))
        summary.graded += 1
        bar.update()

    def jobs() -> Iterator[tuple[_Read, bytes]]:
        """Read and parsed when a worker is free, so that a large class fits into memory."""
        for student in todo:
            item = _read(folder, plan.name, student, limits)
            try:
                if item.reason:
                    raise UnreadableError(item.reason)
                job = make_job(plan, item.data, limits, options.walled)
            except UnreadableError as error:
                note(item, scoring.unreadable(plan, str(error)))
            else:
                yield replace(item, data=b""), job

    try:
        for item, result in pool.run(attempt.attempt, jobs()):
            if isinstance(result, Exception):
                summary.failed[item.student] = str(result)
                bar.update()
            else:
                note(item, scoring.score(plan, json.loads(result)))
    finally:
        pool.close()
        bar.close()
        book.close()


def _is_done(
    item: _Read, known: journal.Entry | None, plan: Plan, run: str, options: Options
) -> bool:
    if known is None or (known.sha256, known.plan) != (item.sha256, plan.sha256):
        return False
    return not options.again or known.run == run


def _read(folder: ClassFolder, name: str, student: str, limits: Limits) -> _Read:
    place = folder.submitted(student, name)
    path = place / f"{name}.ipynb"
    if not path.exists() and (place / REFUSED_FILE).is_file():
        reason = str(json.loads((place / REFUSED_FILE).read_text())["reason"])
        return _Read(student, _sha256(reason), reason=reason)
    try:
        submission = read(path, int(limits.notebook_mb * MEGABYTE))
    except UnreadableError as error:
        return _Read(student, _sha256(str(error)), reason=str(error))
    return _Read(student, submission.sha256, submission.data)


def _run_id(folder: ClassFolder, name: str, options: Options) -> str:
    """The name of this run; that of the last one if it is to be resumed."""
    marker = folder.results(name).with_suffix(".run")
    if options.resume and marker.is_file():
        return marker.read_text()
    run = datetime.now().astimezone().isoformat(timespec="milliseconds")
    write_atomically(marker, run.encode())
    return run


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
