"""The walls themselves, where the hostile suite does not reach: other systems, other places."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.grading.conftest import SMALL
from tests.grading.synthetic import ROOT, solved
from tlcourse.grading import attempt, cgroups, sandbox
from tlcourse.grading.class_settings import Limits
from tlcourse.grading.marking import make_job, mark
from tlcourse.grading.plan import Plan, make_plan

pytestmark = pytest.mark.usefixtures("needs_sandbox")
LIMITS = Limits(cell_seconds=5, question_seconds=5, submission_seconds=60)


@pytest.fixture(scope="module")
def plan() -> Plan:
    path = ROOT / "notebooks" / "exercises" / f"{SMALL}.ipynb"
    made = make_plan(SMALL, nbformat.read(path, as_version=4), b"s" * 32)
    return replace(made, preload=())  # nothing here needs torch before it asks for it


@pytest.fixture(autouse=True)
def no_sandbox_left() -> Any:
    attempt.close_sandbox()
    yield
    attempt.close_sandbox()


def submission(*cells: str) -> bytes:
    """The solution without its set-up, which would import torch, and with some cells before it."""
    nb = solved(SMALL)
    nb.cells = [cell for cell in nb.cells if "setup" not in cell.metadata.get("tags", [])]
    first = ["import numpy as np\nimport tlcourse as tl", *cells]
    nb.cells[:0] = [nbformat.v4.new_code_cell(source) for source in first]
    return nbformat.writes(nb).encode()


def points(plan: Plan, data: bytes) -> list[float | None]:
    return [one.points for one in mark(plan, data, LIMITS).marks]


def test_honest_work_gets_its_points(plan: Plan) -> None:
    assert points(plan, submission()) == [1.0, 2.0, None]


def test_where_no_inner_wall_can_be_each_submission_has_a_sandbox_of_its_own(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    class Flat(sandbox.Sandbox):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, nest=False, **named)
            started.append(self)

    monkeypatch.setattr(attempt, "Sandbox", Flat)
    leave = "open('/tmp/left', 'w').write('a mark')"
    assert points(plan, submission(leave)) == [1.0, 2.0, None]
    look = "import os\nif os.path.exists('/tmp/left'):\n    os._exit(0)"
    outcome = mark(plan, submission(look), LIMITS)
    assert (outcome.status, outcome.reason) == ("graded", "")
    endless = "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    outcome = mark(plan, submission(endless), Limits(cell_seconds=2))
    assert [one.points for one in outcome.marks] == [1.0, 2.0, None]
    assert outcome.reason == "cell 2: it took too long"
    assert len(started) == 4 and not any(one.nested for one in started)
    assert all(one._process.poll() is not None for one in started)


def test_a_course_that_lies_below_tmp_is_still_visible(tmp_path: Path, plan: Plan) -> None:
    root = tmp_path / "course"
    shutil.copytree(ROOT / "tlcourse", root / "tlcourse")
    shutil.copy(ROOT / "pyproject.toml", root)
    for name in ("data", "lessons"):
        (root / name).symlink_to(ROOT / name)
    job = make_job(plan, submission("open('/tmp/mine', 'w')", "import tlcourse.losses"), LIMITS)
    (tmp_path / "job").write_bytes(job)
    code = f"""
import sys, tlcourse
from pathlib import Path
from tlcourse.grading import attempt, sandbox
assert tlcourse.__file__.startswith({str(root)!r}), tlcourse.__file__
assert sandbox.can_nest()
sys.stdout.buffer.write(attempt.attempt(Path({str(tmp_path / "job")!r}).read_bytes()))
"""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    answers = json.loads(done.stdout)
    assert answers["finished"] and answers["failed"] == {} and answers["stopped"] == []


def test_what_is_visible_holds_no_lesson_and_no_class() -> None:
    folders = [*sandbox.visible(), *map(Path, ("/bin", "/lib", "/lib64", "/sbin"))]
    hidden = sandbox.hidden_folders()
    for path in (ROOT / "lessons", ROOT / "solutions", ROOT / "tests", ROOT / ".git"):
        inside = any(path.is_relative_to(folder) for folder in folders)
        assert not inside or any(path.is_relative_to(folder) for folder in hidden)


def test_lessons_inside_an_installed_package_are_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ROOT / "tlcourse"
    monkeypatch.setattr(sandbox.locations, "lessons_dir", lambda: package / "grading")
    assert sandbox.hidden_folders() == [package / "grading"]
    command = sandbox.outer_wall()
    place = command.index(str(package / "grading"))
    assert command[place - 1] == "--tmpfs"
    listed = subprocess.run([*command, "ls", str(package / "grading")], capture_output=True)
    assert (listed.returncode, listed.stdout) == (0, b"")


def test_a_sandbox_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "outer_wall", lambda: ["/bin/sh", "-c", "echo no rights >&2"])
    with pytest.raises(sandbox.SandboxError, match="no rights"):
        sandbox.Sandbox()
    monkeypatch.setattr(sandbox, "outer_wall", lambda: ["/nowhere/bwrap"])
    with pytest.raises(sandbox.SandboxError, match="/nowhere/bwrap cannot be started"):
        sandbox.Sandbox()


def test_a_control_group_bounds_memory() -> None:
    group = cgroups.new_group(100 * 10**6, 64)
    if group is None:
        pytest.skip("this system lets us make no control group")
    hog = [sys.executable, "-c", "x = bytearray(300 * 10**6); print(len(x))"]
    run = functools.partial(subprocess.run, capture_output=True)
    try:
        assert run(hog).returncode == 0
        assert run(group.entered_by(hog)).returncode != 0
    finally:
        group.remove()
    assert not any(folder.exists() for folder in group.folders)


def test_groups_of_killed_processes_are_cleared_up(tmp_path: Path) -> None:
    folders = [tmp_path / f"tlcourse-{pid}-0" for pid in (2**22 + 1, os.getpid())]
    for folder in folders:
        folder.mkdir()
    cgroups._clear_up([tmp_path])
    assert [folder.exists() for folder in folders] == [False, True]


def test_a_group_that_bounds_nothing_is_not_used(tmp_path: Path) -> None:
    """A folder that looks like version 2 and takes no limit."""
    (tmp_path / "cgroup.controllers").write_text("")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        (tmp_path / line.split(":", 2)[2].lstrip("/")).mkdir(parents=True, exist_ok=True)
    assert cgroups.new_group(10**9, 64, root=tmp_path) is None
    assert not list(tmp_path.rglob("tlcourse-*"))
