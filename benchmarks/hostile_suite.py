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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the tests

from tests.grading.hostile.scene import LIMITS
from tests.grading.hostile.table import run_all
from tlcourse import locations
from tlcourse.authoring import machine
from tlcourse.grading import sandbox
from tlcourse.locations import data_dir

PREFACE = """\
Every line is a notebook made from an honest solution of exercise 03 (14 points without its free
text), with something hostile added or an answer replaced. "Points" are those that it got, of those
that its honest part is worth. Each was contained: nothing was read, written or reached that should
not be, no process was left, and the next honest submission got full points. Written by
`python benchmarks/hostile_suite.py`; the same attacks are tests in `tests/grading/hostile`."""


def by_group(recorded: dict[str, Any]) -> str:
    """The table of ``docs/grading.md``: one line for each group of attacks."""
    lines = ["| group | attacks | what happened (attacks) | points | contained |", "|---" * 5 + "|"]
    for number in sorted({row["group"] for row in recorded["attacks"]}):
        rows = [row for row in recorded["attacks"] if row["group"] == number]
        happened = Counter(word for row in rows for word in happenings(row))
        told = ", ".join(f"{word} ({count})" for word, count in happened.most_common(4))
        judged = [row for row in rows if row["honest_points"] is not None]
        got = sum(row["points"] for row in judged)
        of = sum(row["honest_points"] for row in judged)
        contained = sum(row["contained"] for row in rows)
        lines.append(f"| {number} {rows[0]['group_name']} | {len(rows)} | {told} | "
                     f"{got:g} of {of:g} | {contained} of {len(rows)} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def happenings(row: dict[str, Any]) -> set[str]:
    """What an attack came to, in the grader's words."""
    found = {text.partition(": ")[2] or text for text in row["reason"].split("; ") if text}
    found |= {text.partition(" (")[0] for text in row["marks"].values()}
    return found or {"graded"}


def every_attack(recorded: dict[str, Any]) -> str:
    """The page ``docs/hostile_suite.md``."""
    lines = ["# The hostile suite", "", PREFACE]
    group = 0
    for row in recorded["attacks"]:
        if row["group"] != group:
            group = row["group"]
            lines += ["", f"## {group}. {row['group_name'].capitalize()}", "",
                      "| attack | what happened | points | s |", "|---|---|---|---|"]  # fmt: skip
        happened = ", ".join(sorted(happenings(row)))
        of = "" if row["honest_points"] is None else f" of {row['honest_points']:g}"
        cells = (row["does"], happened, f"{row['points']:g}{of}", f"{row['seconds']:.1f}")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


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
    page = locations.repo_root() / "docs" / "hostile_suite.md"
    page.write_text(every_attack(recorded), encoding="utf-8")
    print(by_group(recorded))
    print(f"{recorded['contained']} of {len(rows)} attacks were contained; {out}")
    return 0 if recorded["contained"] == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
