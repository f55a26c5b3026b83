"""Side by side or one after the other: the same results, in the same order."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

import tlcourse as tl
from tlcourse.parallel import default_workers, side_by_side
from tlcourse.recording import History, TrainingDiverged


def test_order_processes_and_threads() -> None:
    found = list(side_by_side(lambda x: (x * x, os.getpid(), torch.get_num_threads()), range(6), 2))
    assert [square for square, _, _ in found] == [0, 1, 4, 9, 16, 25]
    assert os.getpid() not in {process for _, process, _ in found}
    assert {threads for _, _, threads in found} == {1}


@pytest.mark.parametrize("workers", [1, 2])
def test_every_call_starts_from_the_same_seed(workers: int) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    draws = [float(draw) for draw in side_by_side(lambda _: torch.rand(()), range(4), workers)]
    expected = torch.rand((), generator=torch.Generator().manual_seed(0)).item()
    assert draws == [expected] * 4
    assert torch.equal(before, torch.get_rng_state()), "the caller's generator goes on unused"


def test_a_function_may_use_torch_and_something_called_classes() -> None:
    # A test's functions go by name, a notebook's by value: this one is made as in a notebook.
    space = {"__name__": "__main__", "torch": torch, "SimpleNamespace": SimpleNamespace}
    code = "def f(x): return int(torch.tensor(SimpleNamespace(classes=x).classes))"
    exec(code, space)
    assert list(side_by_side(space["f"], range(3), 2)) == [0, 1, 2]


def test_one_task_or_one_worker_stays_in_this_process() -> None:
    assert list(side_by_side(lambda _: os.getpid(), [0], 2)) == [os.getpid()]
    assert list(side_by_side(lambda _: os.getpid(), [0, 1], 1)) == [os.getpid()] * 2
    assert 1 <= default_workers() <= (os.cpu_count() or 1)
    with pytest.raises(ValueError, match="workers must be >= 1, got 0"):
        list(side_by_side(abs, [1], 0))


def test_an_error_of_a_worker_arrives_whole() -> None:
    def diverge(_: int) -> None:
        raise TrainingDiverged("the loss became nan at step 3", History(step=[1, 2, 3]))

    with pytest.raises(TrainingDiverged, match=r"^the loss became nan at step 3$") as caught:
        list(side_by_side(diverge, range(2), 2))
    assert caught.value.history.step == [1, 2, 3]


def test_compare_gives_the_same_scores_with_two_workers() -> None:
    def arm(seed: int) -> float:
        return float(torch.rand(())) + seed

    one = tl.compare({"a": arm, "b": arm}, draws=3)
    two = tl.compare({"a": arm, "b": arm}, draws=3, workers=2)
    assert one.scores == two.scores and one.scores["a"] == one.scores["b"]
    assert [len(times) for times in two.seconds.values()] == [3, 3]
