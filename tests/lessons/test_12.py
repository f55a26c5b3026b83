"""Lesson 12: the reference answers against autograd, tensors that exist, and the library."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from judging import assert_hints_name, assert_reference_is
from torch import nn

from tlcourse.locations import data_dir
from tlcourse.lora import LoRAConfig, LoRALinear, add_lora
from tlcourse.peft_files import WEIGHTS_FILE, save_adapter
from tlcourse.questions import load_questions

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "lessons" / "12_lora_from_scratch"
QUESTIONS = {question.id: question for question in load_questions(FOLDER / "questions.py")}
SEEDS = (0, 1, b"a class secret")


def bytes_of_tensors(num_weights, weight_bytes, shapes, rank, head):
    """Make the trained tensors and one step of AdamW, and count."""
    trained = [torch.zeros(head), torch.zeros(head[0])]
    for outputs, inputs in shapes:
        layer = LoRALinear(nn.Linear(int(inputs), int(outputs)), LoRAConfig(rank=rank))
        trained += [layer.lora_A.detach(), layer.lora_B.detach()]
    trained = [nn.Parameter(value) for value in trained]
    optimizer = torch.optim.AdamW(trained)
    sum(p.sum() for p in trained).backward()
    optimizer.step()

    def count(tensors):
        return float(sum(x.numel() * x.element_size() for x in tensors))

    moments = [x for s in optimizer.state.values() for x in s.values() if x.ndim > 0]
    return {
        "weights": num_weights * weight_bytes + count(trained),
        "gradients": count(p.grad for p in trained),
        "moments": count(moments),
    }


def gradients_by_autograd(X, G, W, A, B, alpha, rank_stabilised):
    """Through the library's own layer."""
    base = nn.Linear(W.shape[1], W.shape[0], bias=False).double()
    base.weight.data = torch.tensor(W)
    config = LoRAConfig(rank=len(A), alpha=alpha, rank_stabilised=rank_stabilised)
    layer = LoRALinear(base, config)
    layer.lora_A.data, layer.lora_B.data = torch.tensor(A), torch.tensor(B)
    inputs = torch.tensor(X, requires_grad=True)
    layer(inputs).backward(torch.tensor(G))
    return {
        "A": layer.lora_A.grad.numpy(),
        "B": layer.lora_B.grad.numpy(),
        "X": inputs.grad.numpy(),
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_the_account_equals_counted_tensors(seed: int | bytes) -> None:
    assert_reference_is(bytes_of_tensors, QUESTIONS["12.q1"], seed, rtol=0, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_way_back_equals_autograd(seed: int | bytes) -> None:
    assert_reference_is(gradients_by_autograd, QUESTIONS["12.q2"], seed, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_trained_pair_is_nearer_than_the_best_one(seed: int | bytes) -> None:
    question = QUESTIONS["12.q3"]
    for update, rank, alpha in question.draw_cases(seed):
        found = question.expect((update, rank, alpha))
        norm = np.sum(update**2)
        assert np.sum((update - found["update"]) ** 2) / norm == pytest.approx(
            found["lost"], abs=1e-12
        )
        assert np.linalg.matrix_rank(found["update"]) <= rank
        torch.manual_seed(0)  # alternating least squares from a random start
        A = torch.randn(rank, update.shape[1], dtype=torch.float64)
        target = torch.tensor(update)
        for _ in range(200):
            B = target @ torch.linalg.pinv(A)
            A = torch.linalg.pinv(B) @ target
        trained = (target - B @ A).square().sum().item() / norm
        assert trained > found["lost"] - 1e-9
        assert trained < found["lost"] + 0.05


def test_other_pairs_with_the_same_product_are_right() -> None:
    question = QUESTIONS["12.q3"]
    (update, rank, alpha) = case = question.draw_cases(0)[2]
    A, B, lost = question.right(update, rank, alpha)
    turn = np.random.default_rng(0).normal(size=(rank, rank))

    def another(*_):
        return np.linalg.solve(turn, A), B @ turn, lost

    got, expected = question.run(another, case), question.expect(case)
    np.testing.assert_allclose(got["update"], expected["update"])


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.query(x))


def test_the_file_format_is_that_of_the_library(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    question = QUESTIONS["12.q4"]
    model = add_lora(Small(), LoRAConfig(rank=2, target_modules=("query",)))
    save_adapter(model, tmp_path)
    names, parameters = zip(*model.named_parameters(), strict=True)
    case = (
        list(names),
        [p.requires_grad for p in parameters],
        list(load_file(tmp_path / WEIGHTS_FILE)),
    )
    assert question.expect(case) == []
    without = [key for key in case[2] if "lora" in key]
    assert question.expect((case[0], case[1], without)) == ["head.bias", "head.weight"]


HINTS = {
    "12.q1": {"no head": "head", "gradients of frozen weights": "frozen", "one moment": "two"},
    "12.q2": {
        "always alpha / r": "sqrt(r)", "nothing passes the frozen weight": "travels",
        "dX without the pair": "pair", "first token only": "row",
    },
    "12.q3": {"no scale": "scale", "share that is kept": "kept", "no singular values": "missing"},
    "12.q4": {"frozen ones too": "frozen", "no .weight": "is in the file", "not sorted": "order"},
}  # fmt: skip


@pytest.mark.parametrize("question_id", HINTS)
def test_hints_name_the_mistake(question_id: str) -> None:
    assert_hints_name(QUESTIONS[question_id], HINTS[question_id])


# --- what the lesson derives ---------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 8])
def test_the_first_step_is_the_full_one_times_s_squared_r_sigma_squared(rank: int) -> None:
    """Mean over many A of the first step of gradient descent, through the library's layer."""
    torch.manual_seed(0)
    base = nn.Linear(5, 4, bias=False).double()
    X, G = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    config = LoRAConfig(rank=rank, alpha=6.0)
    full, mean, count = -(G.T @ X), torch.zeros(4, 5, dtype=torch.float64), 4000
    for _ in range(count):
        layer = LoRALinear(base, config)
        layer(X).backward(G)
        mean -= config.scale * layer.lora_B.grad @ layer.lora_A.detach() / count
    share = (mean * full).sum() / full.square().sum()
    assert share.item() == pytest.approx(config.scale**2 * rank / (3 * 5), rel=0.05)
    assert (mean - share * full).norm() < 0.1 * mean.norm()


def test_either_factor_may_be_zero_but_not_both() -> None:
    for zero, alive in (("A", "A"), ("B", "B"), ("AB", "")):
        layer = LoRALinear(nn.Linear(5, 4), LoRAConfig(rank=2))
        nn.init.normal_(layer.lora_B)
        for name in zero:
            nn.init.zeros_(getattr(layer, f"lora_{name}"))
        x = torch.randn(3, 5)
        assert torch.equal(layer(x), layer.base(x))
        F.mse_loss(layer(x), torch.randn(3, 4)).backward()
        for name in "AB":
            assert getattr(layer, f"lora_{name}").grad.any() == (name in alive)


def benchmark():
    spec = importlib.util.spec_from_file_location("low_rank", ROOT / "benchmarks" / "low_rank.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_what_is_recorded_is_what_the_benchmark_does() -> None:
    content = json.loads((data_dir() / "results" / "low_rank.json").read_text("utf-8"))
    module = benchmark()
    assert list(content["scores"]) == list(module.ARMS)
    assert all(len(scores) == module.DRAWS for scores in content["scores"].values())
    assert content["settings"]["alpha"] == module.ALPHA
    for arm, rates in module.RATES.items():
        assert content["lr"][arm] in rates
        tried = {float(rate): score for rate, score in content["tuning"][arm].items()}
        assert tried[content["lr"][arm]] == max(tried.values())


def test_cutting_an_update_apart_puts_it_together_again() -> None:
    module = benchmark()
    before, after = (Encoder(seed) for seed in (0, 1))
    x = torch.randn(40, 6)
    loader = [({"x": x}, torch.zeros(40, dtype=torch.int64))]
    module.CUTS = (0, 6)
    full = after.backbone.body.encoder.query.weight.detach().clone()
    chosen = module.guesses(after, loader)[1]
    module.RANDOM = 2
    found = module.take_apart(before, after, loader, chosen)
    assert found["cut"]["6"]["same"] == 1
    sigma = np.linalg.svd((full - before.backbone.body.encoder.query.weight).detach().numpy())[1]
    part = found["matrices"]["query"]
    assert part["stable_rank"] == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-4)
    assert part["shares"][1] == pytest.approx((sigma[:4] ** 2).sum() / (sigma**2).sum(), rel=1e-4)


class Encoder(nn.Module):
    """The attributes that ``take_apart`` asks for, and no more."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Module()
        self.backbone.body = nn.Module()
        layers = {name: nn.Linear(6, 6) for name in ("query", "value")}
        self.backbone.body.encoder = nn.Sequential(OrderedDict(layers))
        torch.manual_seed(2)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.backbone.body.encoder(x)))
