"""What the manual and the README say of grading is what was recorded."""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType
from typing import Any

import pytest

from tests.grading.synthetic import ROOT
from tlcourse.locations import data_dir


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recorded(name: str) -> dict[str, Any]:
    return json.loads((data_dir() / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_tables_of_attacks_are_those_of_the_result() -> None:
    made, found = benchmark("hostile_suite"), recorded("hostile_suite")
    assert made.by_group(found) in (ROOT / "docs" / "grading.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "hostile_suite.md").read_text(encoding="utf-8")
    assert page == made.every_attack(found)


def test_every_attack_was_contained_and_honest_work_kept_its_points() -> None:
    found = recorded("hostile_suite")["attacks"]
    assert {row["group"] for row in found} == set(range(1, 16))
    for row in found:
        assert row["contained"], row["name"]
        if row["honest_points"] is not None:
            assert row["points"] == pytest.approx(row["honest_points"]), row["name"]


def test_the_tables_of_speed_are_those_of_the_result() -> None:
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert benchmark("grading").markdown(recorded("grading")) in readme


def test_grading_is_as_fast_as_the_readme_says() -> None:
    found = recorded("grading")
    assert found["hundred"]["seconds"] < 60
    ways = found["compare"]
    assert ways["answers, no torch"]["nbgrader autograde"]["times_ours_2_workers"] >= 5
    assert ways["answers"]["nbgrader autograde"]["times_ours_2_workers"] >= 3
