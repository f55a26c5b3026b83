"""What becomes of every attack that the tests know, and of the honest work beside it?

    python benchmarks/hostile_suite.py

Grades the attacks of ``tests/grading/hostile`` one after the other in one sandbox, and honest work
after each. Writes ``data/results/hostile_suite.json``: for each its group, what it does, status and
reason, points, those of its honest part, seconds, and whether it was contained: nothing read,
written, reached, left running or upset, and full points for the honest work after it.
"""

from __future__ import annotations

import json
import platform
import sys
from collections import Counter
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the tests

from tests.grading.hostile.scene import LIMITS
from tests.grading.hostile.table import run_all
from tlcourse.authoring import machine
from tlcourse.grading import sandbox
from tlcourse.locations import data_dir


def main() -> int:
    if why := sandbox.problem():
        sys.exit(why)
    rows = run_all()
    recorded = {
        "command": "python benchmarks/hostile_suite.py",
        "limits": asdict(LIMITS),
        "machine": machine(),
        "kernel": platform.release(),
        "versions": {name: version(name) for name in ("ipython", "nbformat", "numpy")},
        "attacks_per_group": Counter(str(row["group"]) for row in rows),
        "contained": sum(row["contained"] for row in rows),
        "attacks": rows,
    }
    out = data_dir() / "results" / "hostile_suite.json"
    out.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    print(f"{recorded['contained']} of {len(rows)} attacks were contained; {out}")
    return 0 if recorded["contained"] == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
