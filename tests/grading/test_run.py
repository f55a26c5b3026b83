"""A whole class through the command: graded once, nothing lost, marks of people kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.grading.conftest import SMALL
from tests.grading.processes import descendants
from tests.grading.synthetic import Made, answer_index, make_class, solved
from tlcourse.grading import cli, journal, pools, sandbox
from tlcourse.grading.class_folder import ClassError, ClassFolder
from tlcourse.grading.gradebook import open_gradebook
from tlcourse.grading.run import Options, grade
from tlcourse.grading.store import store_notebook, store_refusal

pytestmark = pytest.mark.usefixtures("needs_sandbox")
MONDAY = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
QUIET = Options(quiet=True)
MANY = 60  # more than are graded before a signal arrives


def submit(school: ClassFolder, made: list[Made], at: datetime = MONDAY) -> None:
    for one in made:
        data = nbformat.writes(one.notebook).encode()
        store_notebook(school, one.student, SMALL, data, at)


def lines(school: ClassFolder) -> list[dict[str, Any]]:
    path = school.results(SMALL)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def grades(school: ClassFolder) -> list[tuple]:
    """All that the gradebook says, without its random ids."""
    with open_gradebook(school) as book:
        return sorted(
            (s.student.id, s.timestamp, g.name, g.auto_score, g.manual_score, g.needs_manual_grade)
            for s in book.assignment_submissions(SMALL)
            for g in s.notebooks[0].grades
        )


def test_marks_are_those_that_the_answers_earn(school: ClassFolder) -> None:
    made = make_class(SMALL, 6)
    submit(school, made)
    summary = grade(school, SMALL, QUIET)
    assert (summary.graded, summary.failed, dict(summary.statuses)) == (6, {}, {"graded": 6})
    found = {(row[0], row[2]): row[3] for row in grades(school)}
    shares = {(m.student, q): share for m in made for q, share in m.share.items()}
    assert 0.0 in shares.values() and 1.0 in shares.values()
    for (student, question), share in shares.items():
        points = {"00.q1": 1.0, "00.q2": 2.0}[question]
        assert found[student, f"{question.replace('.', '-')}-check"] == points * share
    # Free text is for a person, where there is any.
    assert {row[3] for row in grades(school) if row[2] == "00-q3-answer"} == {None}
    assert all(row[5] for row in grades(school) if row[2] == "00-q3-answer")


def test_free_text_that_is_as_it_was_handed_out_gets_no_point(school: ClassFolder) -> None:
    handed_out = nbformat.read(school.release(SMALL) / f"{SMALL}.ipynb", as_version=4)
    submit(school, [Made("ada", handed_out, {})])
    grade(school, SMALL, QUIET)
    assert [row[3:] for row in grades(school) if row[2] == "00-q3-answer"] == [(0.0, None, False)]
    with open_gradebook(school) as book:
        comment = book.find_comment("00-q3-answer", SMALL, SMALL, "ada")
        assert comment.comment == "No response."
        assert book.find_comment("00-q1-answer", SMALL, SMALL, "ada").comment == "not attempted"


def test_what_is_graded_is_not_graded_again_unless_asked(school: ClassFolder) -> None:
    submit(school, make_class(SMALL, 3))
    assert grade(school, SMALL, QUIET).graded == 3
    second = grade(school, SMALL, QUIET)
    assert (second.graded, second.unchanged) == (0, 3)
    assert grade(school, SMALL, Options(quiet=True, again=True)).graded == 3
    # All of that run is done: resuming it finds nothing to do.
    assert grade(school, SMALL, Options(quiet=True, again=True, resume=True)).graded == 0


def test_another_secret_grades_anew(school: ClassFolder) -> None:
    submit(school, make_class(SMALL, 2))
    grade(school, SMALL, QUIET)
    (school.root / "class_secret").write_text("ab" * 32)
    assert grade(school, SMALL, QUIET).graded == 2


def test_a_new_submission_keeps_the_mark_of_a_person_and_flags_it(school: ClassFolder) -> None:
    whole = solved(SMALL)
    submit(school, [Made("ada", whole, {})])
    grade(school, SMALL, QUIET)
    with open_gradebook(school) as book:
        mark = book.find_grade("00-q3-answer", SMALL, SMALL, "ada")
        mark.manual_score, mark.needs_manual_grade = 2.0, False
        book.db.commit()
    # Graded again without a change: the mark stands.
    grade(school, SMALL, Options(quiet=True, again=True))
    assert [row[3:] for row in grades(school) if row[2] == "00-q3-answer"] == [(None, 2.0, False)]
    whole.cells[answer_index(whole, "00.q3")].source += "\n\nOn second thoughts, no."
    whole.cells[answer_index(whole, "00.q1")].source = "accuracy = 1"
    submit(school, [Made("ada", whole, {})], MONDAY.replace(hour=13))
    assert grade(school, SMALL, QUIET).graded == 1
    rows = {row[2]: row[3:] for row in grades(school)}
    assert rows["00-q3-answer"] == (None, 2.0, True)
    assert rows["00-q1-check"] == (0.0, None, False)
    assert len([line for line in lines(school) if line["student"] == "ada"]) == 3


def test_late_is_what_the_teachers_clock_says(school: ClassFolder, change_settings: Any) -> None:
    change_settings("percent_per_day = 0 ", "percent_per_day = 10 ")
    change_settings("[deadlines]", '[deadlines]\n"00" = 2026-11-23T10:00:00+00:00')
    change_settings("# [extensions", '[extensions."00"]\nbela = 2026-11-30T10:00:00+00:00\n# [ext')
    nb = solved(SMALL)
    nb.metadata["timestamp"] = "2020-01-01 00:00:00 UTC"  # what a student says does not count
    submit(school, [Made("ada", nb, {}), Made("bela", nb, {})])
    grade(school, SMALL, QUIET)
    with open_gradebook(school) as book:
        late = {s: book.find_submission_notebook(SMALL, SMALL, s).late_submission_penalty
                for s in ("ada", "bela")}  # fmt: skip
    assert late == {"ada": pytest.approx(0.3), "bela": None}  # 10 % of 3 points


def test_what_cannot_be_read_gets_a_status_and_the_class_goes_on(school: ClassFolder) -> None:
    submit(school, make_class(SMALL, 2))
    store_notebook(school, "xaver", SMALL, b'{"cells": [', MONDAY)
    store_refusal(school, "yann", SMALL, "the file has 500 MB", 500_000_000, MONDAY)
    summary = grade(school, SMALL, QUIET)
    assert dict(summary.statuses) == {"graded": 2, "unreadable": 2}
    entries = journal.read(school.results(SMALL))
    assert entries["xaver"].outcome.reason.startswith("the file is not JSON")
    assert entries["yann"].outcome.reason == "the file has 500 MB"
    assert {row[3] for row in grades(school) if row[0] in ("xaver", "yann")} == {0.0}
    assert grade(school, SMALL, QUIET).graded == 0


def test_an_interrupted_run_keeps_what_it_has(
    school: ClassFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(school, make_class(SMALL, 5))
    run = pools.LocalPool.run

    def stops_after_two(self, function, jobs):
        for number, result in enumerate(run(self, function, jobs)):
            if number == 2:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(pools.LocalPool, "run", stops_after_two)
    first = grade(school, SMALL, QUIET)
    assert first.interrupted and first.graded == 2
    assert len({row[0] for row in grades(school)}) == 2
    monkeypatch.setattr(pools.LocalPool, "run", run)
    second = grade(school, SMALL, QUIET)
    assert (second.graded, second.unchanged) == (3, 2)
    assert set(Counter(line["student"] for line in lines(school)).values()) == {1}


def test_a_regrading_that_was_interrupted_is_resumed(
    school: ClassFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(school, make_class(SMALL, 3))
    grade(school, SMALL, QUIET)
    run = pools.LocalPool.run

    def stops_after_one(self, function, jobs):
        yield next(run(self, function, jobs))
        raise KeyboardInterrupt

    monkeypatch.setattr(pools.LocalPool, "run", stops_after_one)
    assert grade(school, SMALL, Options(quiet=True, again=True)).interrupted
    monkeypatch.setattr(pools.LocalPool, "run", run)
    assert grade(school, SMALL, Options(quiet=True, again=True, resume=True)).graded == 2


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_stopped_grades_nothing_twice(school: ClassFolder, how: int) -> None:
    submit(school, make_class(SMALL, MANY))
    command = [sys.executable, "-m", "tlcourse.cli", "grade", "--class", str(school.root), "run",
               "--workers", "1"]  # fmt: skip
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=heed_interrupts,
    )  # fmt: skip
    end = time.monotonic() + 60
    while len(lines_written(school)) < 3 and time.monotonic() < end:
        time.sleep(0.02)
    below = descendants(process.pid)
    assert len(below) >= 2  # bubblewrap, and what runs in it
    process.send_signal(how)
    told, _ = process.communicate(timeout=30)
    if how == signal.SIGINT:
        assert process.returncode == 130 and "nothing that was graded is lost" in told
    assert are_gone(below)
    before = len(lines_written(school))
    assert 3 <= before < MANY
    with school.results(SMALL).open("ab") as file:
        file.write(b'{"student": "ada", "cut o')  # as if it had been killed while writing
    rest = grade(school, SMALL, QUIET)
    assert (rest.graded, rest.unchanged) == (MANY - before, before)
    assert len({row[0] for row in grades(school)}) == MANY


def heed_interrupts() -> None:
    """As in the foreground: where the tests run in the background, Ctrl-C is ignored below, too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def lines_written(school: ClassFolder) -> list[bytes]:
    path = school.results(SMALL)
    return path.read_bytes().splitlines() if path.exists() else []


def are_gone(pids: set[int]) -> bool:
    end = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_without_a_sandbox_it_refuses_and_says_how_to_get_one(
    school: ClassFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(school, make_class(SMALL, 1))
    monkeypatch.setenv("PATH", os.devnull)
    sandbox._tried.cache_clear()
    with pytest.raises(sandbox.SandboxError, match="apt install bubblewrap"):
        grade(school, SMALL, QUIET)
    assert lines(school) == []
    # The teacher's own notebooks may be tried all the same.
    trusted = grade(school, SMALL, Options(quiet=True, walled=False))
    assert (trusted.graded, trusted.failed) == (1, {})
    sandbox._tried.cache_clear()


def test_a_class_that_submissions_could_read_is_refused(
    school: ClassFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(school, make_class(SMALL, 1))
    visible = [*sandbox.visible(), school.root.parent]
    monkeypatch.setattr(sandbox, "visible", lambda: visible)
    with pytest.raises(ClassError, match="which submissions can read"):
        grade(school, SMALL, QUIET)
    assert lines(school) == []


def test_a_failing_sandbox_is_no_grade(
    school: ClassFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    submit(school, make_class(SMALL, 2))
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "problem", lambda: "")
        patch.setattr(sandbox, "outer_wall", lambda: ["/bin/false"])
        assert cli.main(["--class", str(school.root), "run"]) == 1
    assert "NOT GRADED ada" in capsys.readouterr().out
    assert lines(school) == [] and grades(school) == []
    assert grade(school, SMALL, QUIET).graded == 2
