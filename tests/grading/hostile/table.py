"""Run all attacks and write down what became of them: ``python -m tests.grading.hostile.table``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.grading.hostile.attacks import ATTACKS
from tests.grading.hostile.judging import Result, honest_work_amiss, run
from tests.grading.hostile.scene import GROUPS, POINTS, Attack, Scene, make_scene
from tlcourse.grading import attempt


def run_all(attacks: list[Attack] = ATTACKS) -> list[dict[str, Any]]:
    """One row for each attack, graded one after the other in one sandbox."""
    attempt.close_sandbox()
    rows = []
    with tempfile.TemporaryDirectory() as place, make_scene(Path(place)) as scene:
        try:
            for attack in attacks:
                rows.append(_row(scene, run(scene, attack)))
                print(_line(rows[-1]), flush=True)
        finally:
            attempt.close_sandbox()
    return rows


def _row(scene: Scene, result: Result) -> dict[str, Any]:
    attack, outcome = result.attack, result.outcome
    amiss = result.amiss + honest_work_amiss(scene)
    marks = {mark.id.split(".")[1]: mark.words() for mark in outcome.marks
             if mark.status not in ("right", "manual")}  # fmt: skip
    return {
        "group": attack.group,
        "group_name": GROUPS[attack.group],
        "name": attack.name,
        "does": attack.does,
        "status": outcome.status,
        "reason": outcome.reason,
        "marks": marks,
        "points": round(sum(result.points.values()), 6),
        "honest_points": None if attack.points is None else attack.honest_points,
        "all_points": sum(POINTS.values()),
        "seconds": result.seconds,
        "contained": not amiss,
        "amiss": amiss,
    }


def _line(row: dict[str, Any]) -> str:
    sign = "ok" if row["contained"] else "NOT CONTAINED"
    points = f"{row['points']:g} of {row['honest_points']}"
    text = f"{row['group']:>2} {row['name']:<32} {points:<10} {row['seconds']:>5} s  {sign}"
    return "\n   ".join([text, *row["amiss"]])


if __name__ == "__main__":
    sys.exit(0 if all(row["contained"] for row in run_all()) else 1)
