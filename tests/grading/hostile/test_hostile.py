"""The hostile suite: whatever is handed in, the class is safe and honest work keeps its points."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.grading.hostile.attacks import ATTACKS
from tests.grading.hostile.judging import honest_work_amiss, run
from tests.grading.hostile.on_limits import MANY as MANY_PROGRAMS
from tests.grading.hostile.scene import GROUPS, LIMITS, ROOT, Attack, Scene, grade_id, make_scene
from tlcourse.grading import attempt, cgroups, marking, sandbox, scoring, untrusted
from tlcourse.grading.class_settings import Limits
from tlcourse.grading.plan import make_plan
from tlcourse.plain_data import to_json

pytestmark = pytest.mark.usefixtures("needs_sandbox")
LAST = {attack.group: attack for attack in ATTACKS}  # of each group


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """One class and one sandbox for the whole module."""
    attempt.close_sandbox()  # whatever ran before has another environment
    with make_scene(tmp_path_factory.mktemp("hostile")) as made:
        yield made
    attempt.close_sandbox()


@pytest.fixture
def fresh() -> Iterator[None]:
    """A sandbox of this test's own."""
    attempt.close_sandbox()
    yield
    attempt.close_sandbox()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: f"{a.group}-{a.name.replace(' ', '_')}")
def test_attack(scene: Scene, attack: Attack) -> None:
    amiss = run(scene, attack).amiss
    if attack is LAST[attack.group]:
        amiss += honest_work_amiss(scene)
    assert not amiss, "\n".join(amiss)


def test_every_group_is_covered() -> None:
    assert {attack.group for attack in ATTACKS} == set(GROUPS)
    assert len({(attack.group, attack.name) for attack in ATTACKS}) == len(ATTACKS)


def job(*cells: str, **limits: float) -> bytes:
    """Cells without a question, and without imports that take long."""
    order: dict[str, Any] = {"cells": [{"check": "", "source": source} for source in cells]}
    order |= {"questions": [], "inputs": {}, "preload": [], "walled": True}
    return json.dumps(order | {"limits": {**vars(LIMITS), **limits}}).encode()


def answers(*cells: str, **limits: float) -> dict[str, Any]:
    return json.loads(attempt.attempt(job(*cells, **limits)))


@pytest.mark.usefixtures("fresh")
def test_a_sandbox_that_breaks_is_the_cells_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds a way to break the sandbox loses a cell, and stops nobody else."""
    real = sandbox.Sandbox.wait

    def wait(self: sandbox.Sandbox) -> dict[str, Any]:
        ending = real(self)
        if times and times.pop():
            raise sandbox.SandboxError("3 processes outlived their submission")
        return ending

    times = [True, True]  # in the first sandbox, and in the second, which is the last chance
    monkeypatch.setattr(sandbox.Sandbox, "wait", wait)
    found = answers("import os; os._exit(0)", "x = 1")
    assert found["stopped"] == [{"kind": "cell", "which": 0, "reason": "crash"}]
    assert found["finished"] and not times


KILL_ALL = """\
import os, time
for _ in range(20):
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                os.kill(int(name), 9)
            except OSError:
                pass
    time.sleep(0.1)"""
MARK = """\
import os
open("/tmp/mark", "w").write("x")
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        import time; time.sleep(100)"""
FOUND = """\
import os
names = [open(f"/proc/{p}/comm").read().strip() for p in os.listdir("/proc") if p.isdigit()]
raise ValueError(sorted(names), os.path.exists("/tmp/mark"))"""


@pytest.mark.usefixtures("fresh")
def test_without_the_inner_wall_nobody_else_is_hurt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system allows one wall only, each run has a sandbox of its own."""

    def one_wall(*arguments: Any, **named: Any) -> sandbox.Sandbox:
        return sandbox.Sandbox(*arguments, nest=False, **named)

    monkeypatch.setattr(attempt, "Sandbox", one_wall)
    found = answers(KILL_ALL, "x = 1", submission_seconds=20)
    assert found["stopped"] and not found["failed"]
    assert answers(MARK, "x = 1")["finished"]
    ours = "['bwrap', 'python', 'python', 'python']"
    assert answers(FOUND)["failed"]["0"][1] == f"({ours}, False)"


@pytest.mark.usefixtures("fresh")
def test_memory_is_bounded_without_a_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that share nothing with the sandbox's own process count in full."""
    monkeypatch.setattr(cgroups, "new_group", lambda *_: None)
    found = answers(MANY_PROGRAMS)
    assert found["stopped"] == [{"kind": "cell", "which": 0, "reason": "memory"}]
    copies = "import os, time\nx = bytearray(300_000_000)\nx[::4096] = b'1' * len(x[::4096])\n"
    copies += "for _ in range(5):\n    if os.fork() == 0: time.sleep(1); os._exit(0)\nos.wait()"
    assert answers(copies)["stopped"] == [], "copies that hold nothing of their own"


@pytest.mark.usefixtures("fresh")
def test_all_of_a_sandbox_is_in_its_group_and_knows_nothing_of_us(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TLCOURSE_PROBE", "PROBE-environ-0123456789abcdef")
    assert answers("x = 1")["finished"]
    box = attempt._here.sandbox[1]
    environ = Path(f"/proc/{box._process.pid}/environ").read_bytes()
    assert b"PATH=" in environ and b"PROBE" not in environ
    if box._group is None:
        pytest.skip("no control group can be made here")
    for folder in box._group.folders:  # bubblewrap, its process 1, and the one that imports
        assert len((folder / "cgroup.procs").read_text().split()) == 3, folder
    folders = box._group.folders
    attempt.close_sandbox()
    assert not any(folder.exists() for folder in folders)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_a_submission_beside_does_not_starve() -> None:
    """Forty busy processes in sessions of their own take no more than one share of a processor."""
    group = cgroups.new_group(10**9, 100)
    folders = group.folders if group else []
    shared = any((f / name).exists() for f in folders for name in ("cpu.shares", "cpu.weight"))
    if group:
        group.remove()
    if not shared:
        pytest.skip("no control group shares out the processor here")
    work = "n = 0\nfor _ in range(3_000_000): n += 1"
    spin = "import os\nfor _ in range(40):\n    if os.fork() == 0:\n        os.setsid()\n"
    spin += "        while True: pass\nwhile True: pass"
    assert answers(work, cell_seconds=60)["finished"]

    def beside() -> None:
        answers(spin, cell_seconds=4, submission_seconds=5)
        attempt.close_sandbox()

    thread = threading.Thread(target=beside)
    thread.start()
    time.sleep(2.5)  # its sandbox has to start
    start = time.monotonic()
    assert answers(work, cell_seconds=60)["finished"]
    seconds = time.monotonic() - start
    thread.join()
    assert seconds < 2.5, "in turns with forty others it takes ten times as long"


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_torch_turned_against_the_test() -> None:
    name = "04_five_steps"
    release = nbformat.read(ROOT / "notebooks" / "exercises" / f"{name}.ipynb", 4)
    plan = make_plan(name, release, b"a secret")
    nb = nbformat.read(ROOT / "solutions" / f"{name}.ipynb", 4)
    (answer,) = [cell for cell in nb.cells if grade_id(cell) == "04-q2-answer"]
    answer.source = """\
import torch
torch.allclose = torch.equal = torch.isclose = lambda *a, **k: True
torch.testing.assert_close = lambda *a, **k: None
class Tensor(torch.Tensor):
    def __eq__(self, other): return torch.ones(self.shape, dtype=torch.bool)
    def allclose(self, *a, **k): return True
    equal = isclose = allclose
def prepare_images(images):
    return torch.zeros(len(images), 3, *images.shape[1:3]).as_subclass(Tensor)"""
    limits = Limits(cell_seconds=60, question_seconds=20, submission_seconds=120, memory_mb=2000)
    outcome = marking.mark(plan, nbformat.writes(nb).encode(), limits)
    points = {mark.id: mark.points for mark in outcome.marks if mark.status != "manual"}
    assert points == {f"04.q{n}": float(n != 2) for n in range(1, 10)}
    assert outcome.status == "graded" and outcome.marks[1].status == "wrong"


def odd(rng: random.Random, depth: int = 0) -> Any:
    """JSON that is close to that of plain data."""
    simple = [None, True, 0, -1, 2**64, 10**30, 0.5, float("nan"), float("inf"), "", "\ud800", "W1"]
    kind = rng.randrange(6 if depth < 4 else 1)
    if kind == 1:
        return [odd(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 2:
        names = rng.sample(["W1", "b1", "V", "c", "A", "B", "weight", "bias", "dict", "array"], 3)
        return {"dict": {name: odd(rng, depth + 1) for name in names}}
    if kind == 3:
        return {rng.choice(["dict", "array", "x"]): odd(rng, depth + 1)}
    if kind >= 4:
        dtype = rng.choice(["<f8", "<f2", "|b1", "|u1", "U", "O", "<f16", 5, "<i8"])
        shape = rng.choice([[], [1], [0], [2, 0], [-1], [True], ["1"], None, [10**19], [1] * 40])
        content = rng.choice(["AAAAAAAA8D8=", "", "?", ["a"], [1], "a", 1])
        return {"array": {"dtype": dtype, "shape": shape, rng.choice(["base64", "text"]): content}}
    return rng.choice(simple)


def test_no_value_upsets_the_parent(scene: Scene) -> None:
    """Whatever JSON comes in place of values: marks, no exception, and no point by chance."""
    rng = random.Random(0)
    plan = scene.plan
    for _ in range(2000):
        values = {q: {str(case): odd(rng) for case in range(5)} for q in plan.cases}
        brought = {**vars(attempt.Answers(values=values, finished=True))}
        outcome = scoring.score(plan, json.loads(json.dumps(brought)))
        assert sum(mark.points or 0 for mark in outcome.marks) == 0
    right = {q: {str(n): to_json(value) for n, value in enumerate(wanted)}
             for q, wanted in plan.expected.items()}  # fmt: skip
    outcome = scoring.score(plan, vars(attempt.Answers(values=right, finished=True)))
    assert sum(mark.points or 0 for mark in outcome.marks) == 14


def test_values_that_cost_the_parent_too_much_are_refused() -> None:
    def nested(levels: int) -> Any:
        value: Any = 1
        for _ in range(levels):
            value = [value]
        return value

    refused = {
        "deep": nested(60),
        "brackets": [[]] * 200_000,
        "huge shape": {"array": {"shape": [10**4000] * 3, "dtype": "<f8", "base64": ""}},
        "many axes": {"dict": {"W1": {"array": {"shape": [1] * 1000}}}},
        "wide text": [{"array": {"shape": [20_001], "text": ["x" * 20_000] + [""] * 20_000}}],
    }
    assert [name for name, value in refused.items() if untrusted.within_bounds(value)] == []
    accepted = {
        "numbers": [0.5] * 300_000,
        "rows": [[1, 2]] * 50_000,
        "text": {"array": {"shape": [1000], "dtype": "U", "text": ["a word"] * 1000}},
        "array": {"array": {"shape": [1000, 1000], "dtype": "<f8", "base64": "..."}},
        "plain": nested(40),
    }
    assert [name for name, value in accepted.items() if not untrusted.within_bounds(value)] == []


def test_nothing_is_left_behind(scene: Scene) -> None:
    """Once the sandbox is closed none of its processes and control groups is there."""
    assert honest_work_amiss(scene) == []
    box = attempt._here.sandbox[1]
    pid, folders = box._process.pid, box._group.folders if box._group else []
    attempt.close_sandbox()
    assert not Path(f"/proc/{pid}").exists() and not any(folder.exists() for folder in folders)
    assert not [name for name in os.listdir("/tmp") if "hostile_probe" in name]
