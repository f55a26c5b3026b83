"""L2-SP against its formula, its gradient, and a closed form through ``fit``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tlcourse as tl
from tlcourse.losses import L2SP


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu())


def test_value_and_gradient() -> None:
    model = Small()
    penalty = L2SP(model, alpha=0.4, beta=0.1)
    with torch.no_grad():
        model.body.weight += 0.5
    expected = 0.2 * 12 * 0.25 + 0.05 * sum(p.square().sum() for p in model.head.parameters())
    value = penalty(model)
    torch.testing.assert_close(value, expected)
    value.backward()
    torch.testing.assert_close(model.body.weight.grad, torch.full((4, 3), 0.4 * 0.5))
    torch.testing.assert_close(model.head.weight.grad, 0.1 * model.head.weight)
    assert model.body.bias.grad.abs().max() == 0


def test_frozen_parameters_cost_nothing_and_late_ones_are_refused() -> None:
    model = Small()
    tl.freeze(model.body)
    penalty = L2SP(model, alpha=1.0)
    assert penalty(model).item() == 0
    tl.unfreeze(model.body)
    with pytest.raises(KeyError, match=r"body\.weight"):
        penalty(model)


def test_fit_minimises_loss_plus_penalty() -> None:
    """At the minimum the spring balances the gradient: alpha (w - w_0) = -dL/dw."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    inputs, targets = torch.randn(30, 4), torch.randint(3, (30,))
    penalty = L2SP(model, alpha=0.5)
    start = model.weight.detach().clone()
    config = tl.TrainConfig(
        lr=0.3, num_steps=400, optimizer="sgd", momentum=0.0, weight_decay=0,
        schedule="constant", max_grad_norm=None, penalty=penalty, progress=False,
    )  # fmt: skip
    history = tl.fit(model, [(inputs, targets)], None, config)
    loss = nn.functional.cross_entropy(model(inputs), targets)
    (slope,) = torch.autograd.grad(loss, model.weight)
    torch.testing.assert_close(0.5 * (model.weight - start).detach(), -slope, atol=1e-5, rtol=0)
    assert history.train_loss[-1] == pytest.approx((loss + penalty(model)).item(), abs=1e-5)


def test_accumulation_counts_the_penalty_once() -> None:
    inputs, targets = torch.randn(30, 4), torch.randint(3, (30,))
    ends = []
    for size in (30, 7):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        penalty = L2SP(model, alpha=3.0)
        with torch.no_grad():
            model.weight += 1
        batches = [(inputs[i : i + size], targets[i : i + size]) for i in range(0, 30, size)]
        config = tl.TrainConfig(
            lr=0.1, num_steps=3, accumulation_steps=len(batches), optimizer="sgd",
            penalty=penalty, progress=False,
        )  # fmt: skip
        tl.fit(model, batches, None, config)
        ends.append(model.weight.detach())
    torch.testing.assert_close(ends[0], ends[1])


def test_bad_strengths() -> None:
    with pytest.raises(ValueError, match=r"alpha must be >= 0, got -1"):
        L2SP(Small(), -1)
    with pytest.raises(ValueError, match=r"beta must be >= 0, got -0\.5"):
        L2SP(Small(), 1, -0.5)
    with pytest.raises(TypeError, match="penalty must be a function of the model, got 3"):
        tl.TrainConfig(num_steps=1, penalty=3)  # type: ignore[arg-type]
