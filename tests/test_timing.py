"""Timing in turns: order, medians with intervals, and what is written."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tlcourse.timing import (
    Clocked,
    Timings,
    load_timings,
    median_interval,
    save_timings,
    take_turns,
)


def test_every_way_runs_once_a_round_and_each_goes_first_in_turn() -> None:
    calls: list[str] = []
    ways = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings = take_turns(ways, rounds=7)
    assert calls[:3] == list("abc")  # the warm-up
    rounds = ["".join(calls[i : i + 3]) for i in range(3, len(calls), 3)]
    assert rounds == ["abc", "bca", "cab", "abc", "bca", "cab", "abc"]
    assert {len(times) for times in (*timings.wall.values(), *timings.cpu.values())} == {7}


def test_waiting_costs_wall_time_and_no_cpu_time() -> None:
    def busy() -> None:
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass

    timings = take_turns({"waits": lambda: time.sleep(0.02), "works": busy}, warm_up=False)
    assert timings.seconds("waits").low >= 0.02
    assert timings.seconds("waits", "cpu").mean < 0.01 < timings.seconds("works", "cpu").low
    assert timings.ratio("works", "waits", "cpu").low > 1.5


@pytest.mark.parametrize(("n", "low", "high"), [(7, 0, 6), (9, 1, 7), (20, 5, 14)])
def test_median_interval_takes_the_ranks_of_the_tables(n: int, low: int, high: int) -> None:
    """Ranks (from 0) as in tables of the sign test at 95 %."""
    found = median_interval(np.random.default_rng(0).permutation(n).astype(float))
    assert (found.low, found.mean, found.high) == (low, (n - 1) / 2, high)


def test_median_interval_covers() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        found = median_interval(rng.lognormal(size=9))
        hits += found.low <= 1.0 <= found.high
    assert hits / 2000 > 0.94


def test_clocked_gives_as_many_batches_as_asked_and_times_those_after_the_warm_up() -> None:
    clocked, given = Clocked(["a", "b"], steps=7, warm_up=2), []
    assert len(clocked) == 7
    for batch in clocked:
        given.append(batch)
        # The steps before number 2 and the last one are long, and do not count.
        time.sleep(0.01 if 2 < len(given) < 7 else 0.1)
    assert given == ["a", "b", "a", "b", "a", "b", "a"]
    assert 0.01 <= clocked.seconds < 0.05


@pytest.mark.parametrize("warm_up", [-1, 6])
def test_clocked_refuses_what_leaves_no_step(warm_up: int) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 5\] of 7 steps, got"):
        Clocked([1], steps=7, warm_up=warm_up)


@pytest.mark.parametrize("call", [
    lambda: median_interval([1.0, 2.0, 3.0]),
    lambda: take_turns({"a": lambda: None}, rounds=3),
    lambda: take_turns({}),
])  # fmt: skip
def test_too_little_is_refused(call) -> None:
    with pytest.raises(ValueError, match="need"):
        call()


def test_written_and_read_again(tmp_path) -> None:
    timings = Timings({"a": [2.0] * 7, "b": [1.0] * 7}, {"a": [3.0] * 7, "b": [1.0] * 7}, {"n": 4})
    path = tmp_path / "deep" / "result.json"
    save_timings(path, {"case": timings}, "python benchmarks/x.py", batch_size=8)
    assert load_timings(path) == {"case": timings}
    assert '"batch_size": 8' in path.read_text() and " cores, " in path.read_text()
    table = timings.table("b", per=10, unit="ms")
    assert (
        "| a | 200 [200, 200] | 300 [300, 300] | 2.00 [2.00, 2.00] | 3.00 [3.00, 3.00] |" in table
    )
