from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import tlcourse as tl
from tlcourse.comparing import Comparison
from tlcourse.config import TrainConfig

SCORES = {
    "scratch": [0.20, 0.26, 0.24, 0.31],
    "probe": [0.50, 0.53, 0.56, 0.58],
    "a | b": [0.51, 0.50, 0.60, 0.55],
}


def test_every_arm_gets_the_same_seeds() -> None:
    calls: list[tuple[str, int]] = []

    def arm(name: str):
        def run(seed: int) -> float:
            calls.append((name, seed))
            return seed / 10

        return run

    found = tl.compare({"a": arm("a"), "b": arm("b")}, draws=3)
    assert sorted(calls) == [(name, seed) for name in "ab" for seed in range(3)]
    assert found.scores == {"a": [0.0, 0.1, 0.2], "b": [0.0, 0.1, 0.2]}
    assert all(type(score) is float for score in found.scores["a"])
    assert [len(times) for times in found.seconds.values()] == [3, 3]
    assert all(time >= 0 for times in found.seconds.values() for time in times)


def test_takes_numbers_of_numpy_and_torch() -> None:
    arms = {"np": lambda seed: np.float32(0.5), "torch": lambda seed: torch.tensor(0.25)}
    assert tl.compare(arms, draws=2).scores == {"np": [0.5, 0.5], "torch": [0.25, 0.25]}


def test_intervals_are_those_of_scipy() -> None:
    comparison = Comparison(SCORES)
    for arm, scores in SCORES.items():
        exact = stats.ttest_1samp(scores, 0.0).confidence_interval()
        ours = comparison.interval(arm)
        assert (ours.mean, ours.low, ours.high) == pytest.approx(
            (np.mean(scores), exact.low, exact.high)
        )
    paired = stats.ttest_rel(SCORES["probe"], SCORES["scratch"]).confidence_interval()
    ours = comparison.difference("probe", "scratch")
    assert (ours.low, ours.high) == pytest.approx((paired.low, paired.high))
    assert ours.mean == pytest.approx(0.29)


def test_pairing_makes_the_interval_of_a_difference_narrow() -> None:
    hard = np.random.default_rng(0).random(6)
    comparison = Comparison({"a": list(hard), "b": list(hard + 0.01)})
    gain = comparison.difference("b", "a")
    assert gain.low == pytest.approx(0.01) and gain.high == pytest.approx(0.01)
    assert comparison.interval("a").high - comparison.interval("a").low > 0.3


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace(r"\|", "/")[1:-1].split("|")]


def test_table_is_markdown() -> None:
    comparison = Comparison(SCORES)
    lines = comparison.table().splitlines()
    assert cells(lines[0]) == ["arm", "mean", "95 % interval", "minus scratch (paired)"]
    assert {len(cells(line)) for line in lines} == {4} and len(lines) == 5
    assert set(lines[1]) == set("|-")
    assert cells(lines[2])[0] == "scratch" and cells(lines[2])[3] == ""
    gain = comparison.difference("probe", "scratch")
    assert cells(lines[3])[1] == "0.542"
    assert cells(lines[3])[3] == f"+0.290 [{gain.low:+.3f}, {gain.high:+.3f}]"
    assert cells(lines[4])[0] == "a / b"  # a bar in a name does not break the table
    assert str(comparison) == comparison.table()


def test_table_against_another_arm() -> None:
    lines = Comparison(SCORES).table(reference="probe").splitlines()
    assert cells(lines[0])[3] == "minus probe (paired)"
    assert cells(lines[2])[3].startswith("-0.290")


def test_unknown_arms_are_named() -> None:
    comparison = Comparison(SCORES)
    for ask in (
        lambda: comparison.interval("prob"),
        lambda: comparison.difference("probe", "prob"),
        lambda: comparison.table("prob"),
    ):
        with pytest.raises(KeyError, match="no arm 'prob'; there are 'scratch', 'probe'"):
            ask()


@pytest.mark.parametrize(
    ("score", "shown"), [(math.nan, "nan"), (math.inf, "inf"), (None, "None"), ("high", "'high'")]
)
def test_scores_that_are_no_numbers_are_refused(score: object, shown: str) -> None:
    arms = {"good": lambda seed: 0.5, "bad": lambda seed: score if seed == 1 else 0.5}
    with pytest.raises(ValueError, match=f"'bad' must return a finite .* {shown} on draw 1"):
        tl.compare(arms)  # type: ignore[arg-type]


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="at least one arm"):
        tl.compare({})
    with pytest.raises(TypeError, match=r"arm 'a' must be a function of the seed, got 0\.5"):
        tl.compare({"a": 0.5})  # type: ignore[dict-item]
    for draws in (1, 0, 2.0, True, "5"):
        with pytest.raises(ValueError, match="draws must be an int >= 2, got"):
            tl.compare({"a": lambda seed: 0.5}, draws=draws)  # type: ignore[arg-type]
    for scores in ({}, {"a": [0.1, 0.2], "b": [0.1]}):
        with pytest.raises(ValueError, match="a score for every draw"):
            Comparison(scores)


def test_an_error_in_an_arm_comes_through() -> None:
    def broken(seed: int) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tl.compare({"a": broken})


def test_an_interrupted_arm_does_not_enter_the_table() -> None:
    """``fit`` returns after Ctrl-C, but inside ``compare`` its score would be a lie."""

    class Interrupting(list):
        def __iter__(self):
            raise KeyboardInterrupt

    def arm(seed: int) -> float:
        config = TrainConfig(num_steps=3, progress=False)
        tl.fit(nn.Linear(2, 2), Interrupting([1]), None, config)
        return 0.5

    with pytest.raises(KeyboardInterrupt):
        tl.compare({"a": arm})
    assert arm(0) == 0.5  # outside compare, fit returns


def test_saved_and_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = str(tmp_path / "private" / "run.py")
    monkeypatch.setattr(sys, "argv", [script, "--draws", "2 3"])
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    comparison = tl.compare({"a": lambda seed: 0.1 * seed, "ä": lambda seed: 0.5}, draws=2)
    assert comparison.command == "python run.py --draws '2 3'"
    path = tmp_path / "results" / "first.json"
    comparison.save(path)
    assert Comparison.load(path) == comparison
    content = json.loads(path.read_text(encoding="utf-8"))
    assert set(content) == {"scores", "seconds", "command", "versions"}
    assert content["versions"]["torch"] == torch.__version__.split("+")[0]
    assert content["versions"]["python"] == sys.version.split()[0]
    assert "private" not in path.read_text()
    comparison.save(path, command="make bench")
    assert Comparison.load(path).command == "make bench"


def test_nothing_that_is_no_number_is_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Comparison({"a": [math.nan, 0.5]}).save(tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()
