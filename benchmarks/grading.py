"""Grading a class: our sandboxes beside nbgrader's autograder and bare nbclient.

    python benchmarks/grading.py [--rounds N] [--out FILE]

Each of two rounds grades the same 20 made-up submissions of exercise 03 in every way, one way after
the other, in another order each round. Every way pays for its own start in every round.
Three editions of the exercise:

- as it is, in the first round alone: with its experiments, which run in a notebook only when the
  answer is right;
- answers: the set-up cell, the answers and the checks alone, so that all ways run the same cells;
- answers, no torch: the same without the set-up cell, so that nothing imports torch.

nbgrader and nbclient run one notebook at a time and have no sandbox. Cores are the whole machine's
busy seconds, so run it on a quiet one. Then: workers, a Dask cluster on this machine, memory, and
100 submissions at once. Writes ``data/results/grading.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.grading.processes import descendants
from tests.grading.synthetic import make_class
from tlcourse.authoring import machine
from tlcourse.grading import attempt, class_folder
from tlcourse.grading.class_folder import ClassFolder
from tlcourse.grading.marking import make_job
from tlcourse.grading.plan import make_plan
from tlcourse.grading.release import hand_out
from tlcourse.grading.run import Options, grade
from tlcourse.grading.store import store_notebook
from tlcourse.locations import data_dir, repo_root

NAME = "03_gradients_by_hand"
PER_ROUND, ROUNDS, MANY = 20, 2, 100
EDITIONS = ("as it is", "answers", "answers, no torch")
OURS = ("ours, 1 worker", "ours, 2 workers")
WAYS = (*OURS, "nbgrader autograde", "nbclient")
ROOT = repo_root() or Path()


def edit(nb: NotebookNode, edition: str) -> NotebookNode:
    """An edition of the exercise, or of a submission."""
    nb = copy.deepcopy(nb)
    if edition == EDITIONS[0]:
        return nb
    kept = []
    for cell in nb.cells:
        is_setup = "setup" in cell.metadata.get("tags", [])
        graded = "nbgrader" in cell.metadata
        mistake = cell.cell_type == "code" and cell.source.startswith("kept_")
        if is_setup and edition == EDITIONS[2]:
            cell.source = "import tlcourse as tl"
        if is_setup or graded or mistake:
            kept.append(cell)
    nb.cells = kept
    nb.cells.insert(1, nbformat.v4.new_code_cell("import numpy as np"))
    return nb


def make_school(root: Path, edition: str, count: int, seed: int) -> ClassFolder:
    """A class whose submissions are collected and not graded."""
    school = class_folder.create(root)
    exercise = nbformat.read(ROOT / "notebooks" / "exercises" / f"{NAME}.ipynb", as_version=4)
    hand_out(school, NAME, edit(exercise, edition))
    now = time.time()
    for one in make_class(NAME, count, seed):
        data = nbformat.writes(edit(one.notebook, edition)).encode()
        store_notebook(school, one.student, NAME, data, _datetime(now))
    return school


def _datetime(seconds: float) -> Any:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC)


def command(school: ClassFolder, *arguments: str) -> None:
    """Run a command in a class folder; its output is shown when it fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=school.root, env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{arguments}: {done.stderr[-2000:]}")


def run_nbclient(school: ClassFolder) -> None:
    from nbclient import NotebookClient

    for path in sorted(school.root.glob(f"submitted/*/{NAME}/{NAME}.ipynb")):
        nb = nbformat.read(path, as_version=4)
        NotebookClient(nb, timeout=600, allow_errors=True, kernel_name="python3").execute()


def run_nbgrader(school: ClassFolder) -> None:
    """nbgrader alone: the settings of a class folder refuse to run a submission this way."""
    (school.root / "nbgrader_config.py").write_text("c = get_config()\n")
    command(school, "nbgrader", "autograde", NAME, "--create")


def runner(way: str) -> Callable[[ClassFolder], None]:
    if way == "nbclient":
        return run_nbclient
    if way == "nbgrader autograde":
        return run_nbgrader
    workers = way.split()[1]
    return lambda school: command(school, "tlcourse.cli", "grade", "run", "--workers", workers)


def busy_seconds() -> float:
    """Seconds that the machine's cores have worked, all programs together."""
    words = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    idle = int(words[3]) + int(words[4])
    return (sum(map(int, words[:8])) - idle) / os.sysconf("SC_CLK_TCK")


def timed(action: Callable[[], None]) -> dict[str, float]:
    start, busy = time.perf_counter(), busy_seconds()
    action()
    return {"seconds": time.perf_counter() - start, "core_seconds": busy_seconds() - busy}


def compare(rounds: int, scratch: Path) -> dict[str, Any]:
    """Every way on every edition, interleaved."""
    found: dict[str, Any] = {edition: {way: [] for way in WAYS} for edition in EDITIONS}
    for number in range(rounds):
        for edition in EDITIONS[min(number, 1) :]:  # as it is: in the first round alone
            school = make_school(scratch / "school", edition, PER_ROUND, seed=number)
            for way in WAYS[number % 4 :] + WAYS[: number % 4]:
                copied = ClassFolder(Path(shutil.copytree(school.root, scratch / "copy")))
                found[edition][way].append(timed(lambda: runner(way)(copied)))  # noqa: B023
                print(f"round {number + 1}, {edition}, {way}: "
                      f"{found[edition][way][-1]['seconds']:.1f} s", flush=True)  # fmt: skip
                shutil.rmtree(copied.root)
            shutil.rmtree(school.root)
    return {edition: _medians(ways) for edition, ways in found.items()}


def _medians(ways: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for way, runs in ways.items():
        seconds = [run["seconds"] / PER_ROUND for run in runs]
        cores = [run["core_seconds"] / PER_ROUND for run in runs]
        slower = [r["seconds"] / o["seconds"] for r, o in zip(runs, ways[OURS[1]], strict=True)]
        rows[way] = {
            "seconds_per_submission": statistics.median(seconds),
            "range": [min(seconds), max(seconds)],
            "core_seconds_per_submission": statistics.median(cores),
            "times_ours_2_workers": statistics.median(slower),
            "times_range": [min(slower), max(slower)],
        }
    return rows


def scaling(scratch: Path) -> dict[str, Any]:
    """40 submissions by 1, 2 and 4 workers, and by a warm Dask cluster of two; 2 turns each."""
    from dask.distributed import LocalCluster

    school = make_school(scratch / "school", EDITIONS[0], 40, seed=9)
    with LocalCluster(2, threads_per_worker=1, dashboard_address=None) as cluster:
        address = cluster.scheduler_address
        settings = {f"{n} workers": Options(workers=n, quiet=True, again=True) for n in (1, 2, 4)}
        settings["Dask, 2 workers"] = Options(scheduler=address, quiet=True, again=True)
        found: dict[str, list[float]] = {name: [] for name in settings}
        grade(school, NAME, settings["Dask, 2 workers"])  # the workers' imports
        for _ in range(2):
            for name, options in settings.items():
                found[name].append(timed(lambda: _graded(school, options))["seconds"])  # noqa: B023
                print(f"{name}: {found[name][-1]:.1f} s", flush=True)
    shutil.rmtree(school.root)
    return {name: {"seconds": statistics.median(runs), "range": [min(runs), max(runs)]}
            for name, runs in found.items()}  # fmt: skip


def _graded(school: ClassFolder, options: Options) -> None:
    summary = grade(school, NAME, options)
    assert summary.graded == 40 and not summary.failed, summary


def memory(scratch: Path) -> dict[str, float]:
    """Memory (PSS) of one worker's sandbox: at rest, and its peak over a round."""
    school = make_school(scratch / "school", EDITIONS[0], PER_ROUND, seed=3)
    release = nbformat.read(school.release(NAME) / f"{NAME}.ipynb", as_version=4)
    plan = make_plan(NAME, release, school.secret())
    paths = sorted(school.root.glob(f"submitted/*/{NAME}/{NAME}.ipynb"))
    jobs = [make_job(plan, path.read_bytes(), school.settings().limits) for path in paths]
    attempt.attempt(jobs[0])
    rest, peak, done = sandbox_megabytes(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, sandbox_megabytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for job in jobs:
        attempt.attempt(job)
    done.set()
    watcher.join()
    attempt.close_sandbox()
    shutil.rmtree(school.root)
    return {"at_rest_mb": rest, "peak_mb": peak}


def sandbox_megabytes() -> float:
    """PSS of all processes below this one."""
    total = 0
    for pid in descendants(os.getpid()):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1000


def hundred(scratch: Path) -> dict[str, float]:
    """`tlcourse grade run` on 100 submissions of exercise 03 as it is, two workers."""
    school = make_school(scratch / "school", EDITIONS[0], MANY, seed=5)
    found = timed(lambda: runner(OURS[1])(school))
    shutil.rmtree(school.root)
    return found


def markdown(result: dict[str, Any]) -> str:
    """The tables of ``benchmarks/README.md``."""
    lines = [
        "| way | " + " | ".join(f"{edition}: s, cores, times ours" for edition in EDITIONS) + " |",
        "|---" * (len(EDITIONS) + 1) + "|",
    ]
    for way in WAYS:
        cells = []
        for edition in EDITIONS:
            row = result["compare"][edition][way]
            low, high = row["times_range"]
            cells.append(
                f"{row['seconds_per_submission']:.2f}, {row['core_seconds_per_submission']:.2f}, "
                f"{row['times_ours_2_workers']:.1f} [{low:.1f}, {high:.1f}]"
            )
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| 40 submissions, as it is | seconds, median of 2 [lowest, highest] |",
        "|---|---|",
    ]
    for name, row in result["scaling"].items():
        low, high = row["range"]
        lines.append(f"| {name} | {row['seconds']:.1f} [{low:.1f}, {high:.1f}] |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=data_dir() / "results" / "grading.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        result = {
            "settings": {"exercise": NAME, "per_round": PER_ROUND, "rounds": options.rounds},
            "machine": machine(),
            "compare": compare(options.rounds, scratch),
            "hundred": hundred(scratch),
            "memory": memory(scratch),
            "scaling": scaling(scratch),
        }
    packages = ("nbgrader", "nbclient", "distributed", "torch", "ipython")
    result["versions"] = {name: version(name) for name in packages}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{markdown(result)}\nwritten: {options.out}")


if __name__ == "__main__":
    main()
