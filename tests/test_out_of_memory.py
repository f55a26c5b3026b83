"""Out of memory in a step: smaller pieces, the same step. The shortage is acted, on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tlcourse as tl
from tlcourse.config import TrainConfig
from tlcourse.train import cut

INPUTS = torch.randn(22, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(3, (22,), generator=torch.Generator().manual_seed(1))
BATCHES = [(INPUTS[:9], TARGETS[:9]), (INPUTS[9:18], TARGETS[9:18]), (INPUTS[18:], TARGETS[18:])]


class Hungry(nn.Module):
    """Has memory for so many examples in training, and fails in the middle of the step."""

    def __init__(self, most: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.most = nn.Linear(4, 8), nn.Linear(8, 3), most
        self.sizes: list[int] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.body(inputs).relu()
        if self.training:
            self.sizes.append(len(inputs))
            if len(inputs) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.head(hidden)


def settings(**changes) -> TrainConfig:
    return TrainConfig(**({"num_epochs": 4, "progress": False, "lr": 0.02} | changes))


@pytest.mark.parametrize("most", [5, 3, 1])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_smaller_pieces_give_the_same_run(most: int, accumulation_steps: int, capsys) -> None:
    config = settings(accumulation_steps=accumulation_steps, optimizer="sgd")
    hungry, fed = Hungry(most), Hungry(100)
    history = tl.fit(hungry, BATCHES, BATCHES, config)
    expected = tl.fit(fed, BATCHES, BATCHES, config)
    assert history.train_loss == pytest.approx(expected.train_loss, rel=1e-5)
    for a, b in zip(hungry.parameters(), fed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == (
        f"Out of memory in step 1: the run goes on with at most {max(hungry.sizes[-9:])} examples "
        "at a time, the same batch in each step."
    )
    assert len(lines) == {5: 1, 3: 2, 1: 4}[most]  # 9, then pieces of at most 5, 3, 2, 1
    assert max(hungry.sizes[20:]) <= most


def test_a_single_example_that_does_not_fit_is_an_error() -> None:
    model = Hungry(0)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        tl.fit(model, BATCHES, None, settings())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


class Rows(nn.Module):
    """Two texts in a row: inputs that have not one row for each target."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_what_cannot_be_cut_by_rows_is_an_error(capsys) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        tl.fit(Rows(), [({"packed": torch.ones(2, 8)}, torch.tensor([0, 1, 2]))], None, settings())
    assert capsys.readouterr().err == ""


def test_cut_keeps_rows_together_and_in_order() -> None:
    batch = ({"a": INPUTS, "b": INPUTS[:, :1]}, TARGETS)
    for pieces in (1, 2, 5, 22, 40):
        parts = cut(batch, pieces)
        assert len(parts) == min(pieces, 22)
        sizes = [len(targets) for _, targets in parts]
        assert max(sizes) - min(sizes) <= 1
        assert torch.equal(torch.cat([targets for _, targets in parts]), TARGETS)
        assert torch.equal(torch.cat([inputs["b"] for inputs, _ in parts]), INPUTS[:, :1])
