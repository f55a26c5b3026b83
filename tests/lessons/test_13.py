"""Lesson 13: the reference answers against autograd, torch's own counter, and the library."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from judging import assert_hints_name, assert_reference_is
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tlcourse.adapters import (
    BottleneckConfig,
    BottleneckLinear,
    IA3Config,
    IA3Linear,
)
from tlcourse.locations import data_dir
from tlcourse.questions import load_questions
from tlcourse.training_memory import saved_for_backward

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "lessons" / "13_adapters_and_selective"
QUESTIONS = {question.id: question for question in load_questions(FOLDER / "questions.py")}
SEEDS = (0, 1, b"a class secret")


# --- the references ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_the_folded_layer_does_the_same(seed: int | bytes) -> None:
    question = QUESTIONS["13.q1"]
    for W, b, scale_in, scale_out in question.draw_cases(seed):
        weight, bias = question.expect((W, b, scale_in, scale_out))
        x = np.random.default_rng(0).normal(size=(20, W.shape[1]))
        wanted = ((x * scale_in) @ W.T + b) * scale_out
        np.testing.assert_allclose(x @ np.asarray(weight).T + bias, wanted, atol=1e-12)


def counted_by_torch(shapes, weights, biases, rows):
    """Run the stack, and let torch count what its backward pass multiplies."""
    layers = []
    for (outputs, inputs), weight, bias in zip(shapes, weights, biases, strict=True):
        layer = nn.Linear(int(inputs), int(outputs))
        layer.weight.requires_grad_(weight)
        layer.bias.requires_grad_(bias)
        layers.append(layer)
    output = nn.Sequential(*layers)(torch.randn(rows, int(shapes[0][1])))
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    return counter.get_total_flops() // 2  # torch counts the additions, too


@pytest.mark.parametrize("seed", SEEDS)
def test_the_way_back_is_what_torch_counts(seed: int | bytes) -> None:
    assert_reference_is(counted_by_torch, QUESTIONS["13.q2"], seed, rtol=0, atol=0)


def bottleneck_by_autograd(H, G, D, c, U):
    leaves = {name: torch.tensor(x, requires_grad=True) for name, x in
              {"H": H, "D": D, "c": c, "U": U, "e": np.zeros(len(U))}.items()}  # fmt: skip
    inner = F.relu(leaves["H"] @ leaves["D"].T + leaves["c"])
    (leaves["H"] + inner @ leaves["U"].T + leaves["e"]).backward(torch.tensor(G))
    return {name: leaf.grad.numpy() for name, leaf in leaves.items()}


@pytest.mark.parametrize("seed", SEEDS)
def test_the_bottleneck_equals_autograd(seed: int | bytes) -> None:
    assert_reference_is(bottleneck_by_autograd, QUESTIONS["13.q3"], seed, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_other_scales_are_nearer(seed: int | bytes) -> None:
    """Least squares, one row or column at a time, and the share from what is left."""
    question = QUESTIONS["13.q4"]
    for W, change, columns in question.draw_cases(seed):
        scales, share = question.expect((W, change, columns))
        wanted, base = ((W + change).T, W.T) if columns else (W + change, W)
        best = [
            np.linalg.lstsq(old[:, None], new, rcond=None)[0][0]
            for old, new in zip(base, wanted, strict=True)
        ]
        np.testing.assert_allclose(scales, best, rtol=1e-9)
        left = wanted - np.array(best)[:, None] * base
        assert share == pytest.approx(1 - np.sum(left**2) / np.sum(change**2), abs=1e-12)


HINTS = {
    "13.q1": {
        "bias as it was": "bias", "outputs only": "columns", "inputs only": "rows",
        "rows and columns exchanged": "rows", "one added": "start",
    },
    "13.q2": {
        "always two products": "frozen", "down to the data": "data",
        "a frozen weight stops the gradient": "carries", "a bias costs a product": "sum",
        "the layer itself counts as below": "itself|data", "only weights below count": "bias",
        "no rows": "rows",
    },
    "13.q3": {
        "no short cut": "short cut", "only the short cut": "through D", "no gate": "ReLU",
        "mean over the tokens": "mean", "U without the ReLU": "output of the ReLU",
        "U transposed": "shape",
    },
    "13.q4": {
        "scales of the change": "no change", "the other axis": "row",
        "share that is left": "left", "share of lengths": "squares",
        "mean of the rows' shares": "long rows",
    },
}  # fmt: skip


@pytest.mark.parametrize("question_id", HINTS)
def test_hints_name_the_mistake(question_id: str) -> None:
    assert_hints_name(QUESTIONS[question_id], HINTS[question_id])


# --- what the lesson derives ---------------------------------------------------------------


@pytest.mark.parametrize(("dim", "width", "std"), [(64, 384, 0.01), (16, 256, 0.02)])
def test_the_start_is_half_sigma_squared_root_md_away(dim: int, width: int, std: float) -> None:
    torch.manual_seed(0)
    base = nn.Linear(width, width)
    config = BottleneckConfig(bottleneck_dim=dim, init_std=std, target_modules=("x",))
    found = []
    for _ in range(20):
        layer = BottleneckLinear(base, config)
        x = torch.randn(30, width)
        with torch.no_grad():
            found.append(((layer(x) - base(x)).norm() / base(x).norm()).item())
    sigma = 0.880 * std  # cut off at two deviations
    assert np.mean(found) == pytest.approx(sigma**2 * math.sqrt(dim * width) / 2, rel=0.15)


def test_a_normal_cut_off_at_two_deviations_keeps_880_of_its_deviation() -> None:
    drawn = nn.init.trunc_normal_(torch.empty(1_000_000), std=1.0, a=-2.0, b=2.0)
    assert drawn.std().item() == pytest.approx(0.880, abs=0.003)


def test_a_bottleneck_that_starts_at_zero_is_a_bias() -> None:
    config = BottleneckConfig(bottleneck_dim=3, target_modules=("x",))
    layer = BottleneckLinear(nn.Linear(6, 6), config)
    for parameter in (*layer.down.parameters(), *layer.up.parameters()):
        nn.init.zeros_(parameter)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        F.mse_loss(layer(torch.randn(20, 6)), torch.randn(20, 6)).backward()
        optimizer.step()
    moved = [name for name, p in layer.named_parameters() if "base" not in name and p.any()]
    assert moved == ["up.bias"]


def test_scaling_keeps_what_it_scales_and_a_bias_nothing() -> None:
    def kept(layer: nn.Module, trained: str) -> int:
        layer.requires_grad_(False).get_parameter(trained).requires_grad_(True)
        return saved_for_backward(layer, lambda: layer(torch.randn(10, 32)))[0]

    ia3 = IA3Linear(nn.Linear(32, 16), IA3Config(target_modules=("x",), feedforward_modules=()))
    assert kept(nn.Linear(32, 16), "weight") == 10 * 32 * 4
    assert kept(nn.Linear(32, 16), "bias") == 0
    assert kept(ia3, "ia3_l") == 10 * 16 * 4


# --- the benchmark -------------------------------------------------------------------------


def benchmark():
    path = ROOT / "benchmarks" / "selective_tuning.py"
    spec = importlib.util.spec_from_file_location("selective_tuning", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_what_is_recorded_is_what_the_benchmark_does() -> None:
    content = json.loads((data_dir() / "results" / "selective_tuning.json").read_text("utf-8"))
    module = benchmark()
    assert content["settings"] == module.settings()
    for task, setting in module.SETTINGS.items():
        assert not module.plan(task, content["runs"])
        assert list(content["results"][task]) == [str(labels) for labels in setting.steps]
        for labels in setting.steps:
            entry = content["results"][task][str(labels)]
            assert entry == module.summary(task, labels, content["runs"])
            assert list(entry["scores"]) == list(module.ARMS)
            assert all(len(scores) == setting.draws for scores in entry["scores"].values())
            for arm, tried in entry["tuning"].items():
                assert tried[f"{entry['lr'][arm]:g}"] == max(tried.values())


def test_one_rate_for_all_is_that_of_most_labels() -> None:
    module = benchmark()
    content = json.loads((data_dir() / "results" / "selective_tuning.json").read_text("utf-8"))
    few = module.measured("wild_digits", 2, content["runs"])
    last = module.chosen("wild_digits", 50, content["runs"])
    for arm, name in module.ONE_RATE.items():
        assert {run.lr for run in few[name]} == {last[arm]}
        assert [run.draw for run in few[name]] == [run.draw for run in few[arm]]


@pytest.mark.parametrize("kind", ["key", "feed-forward"])
def test_the_share_of_a_diagonal_is_that_of_the_exercise(kind: str) -> None:
    module, question = benchmark(), QUESTIONS["13.q4"]
    name = {
        "key": "layer.0.attention.self.key.weight",
        "feed-forward": "layer.0.output.dense.weight",
    }
    torch.manual_seed(0)
    old, change = torch.randn(2, 6, 9, dtype=torch.float64)
    found = module.diagonal_shares({name[kind]: old}, {name[kind]: old + change})
    _, share = question.expect((old.numpy(), change.numpy(), kind == "feed-forward"))
    assert found[kind] == [pytest.approx(share, abs=1e-5)]
    sigma = np.linalg.svd(change.numpy(), compute_uv=False)
    assert found[f"{kind}, rank 1"] == [pytest.approx(sigma[0] ** 2 / (sigma**2).sum(), abs=1e-5)]
