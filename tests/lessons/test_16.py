"""Lesson 16: the reference answers against library and autograd, and what the lesson derives."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from judging import assert_hints_name, assert_reference_is
from scipy.stats import norm

from tlcourse.comparing import Comparison
from tlcourse.quantisation import (
    NF4_TOP,
    Quantised,
    dequantise,
    int4_levels,
    nf4_levels,
    quantise_blockwise,
    quantise_int8,
)
from tlcourse.questions import load_questions

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = {
    question.id: question
    for question in load_questions(ROOT / "lessons" / "16_quantised_fine_tuning" / "questions.py")
}
SEEDS = (0, 1, b"a class secret")


def int8_by_library(W):
    kept = quantise_int8(torch.tensor(W, dtype=torch.float32), per_row=True)
    return {"codes": kept.codes.numpy(), "step": kept.step[:, 0].numpy()}


def levels_one_by_one(below, above, top):
    positive = [norm.ppf(0.5 + (top - 0.5) * k / above) for k in range(1, above + 1)]
    negative = [norm.ppf(0.5 - (top - 0.5) * k / below) for k in range(below, 0, -1)]
    return np.array([*negative, 0.0, *positive]) / norm.ppf(top)


def pack_by_hex(codes):
    digits = "".join(f"{code:x}" for code in codes)
    return np.frombuffer(bytes.fromhex(digits + "0" * (len(digits) % 2)), dtype=np.uint8)


def decode_by_library(packed, count, levels, scales, block_size):
    parts = (torch.tensor(packed), torch.tensor(scales), torch.tensor(levels))
    return dequantise(Quantised(*parts, torch.Size([count]), torch.float64, block_size)).numpy()


def backward_by_autograd(codes, levels, scales, A, B, alpha, X, G):
    frozen = torch.tensor(levels)[torch.tensor(codes)] * torch.tensor(scales)[:, None]
    leaves = {
        name: torch.tensor(value, requires_grad=True)
        for name, value in {"A": A, "B": B, "X": X}.items()
    }
    weight = frozen + alpha / len(A) * leaves["B"] @ leaves["A"]
    F.linear(leaves["X"], weight).backward(torch.tensor(G))
    return {name: leaf.grad.numpy() for name, leaf in leaves.items()}


TRUTH = {
    "16.q1": (int8_by_library, 1e-6),
    "16.q2": (levels_one_by_one, 1e-10),
    "16.q3": (pack_by_hex, 0),
    "16.q4": (decode_by_library, 1e-6),
    "16.q5": (backward_by_autograd, 1e-10),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("question_id", TRUTH)
def test_reference_equals_truth(question_id: str, seed: int | bytes) -> None:
    truth, rtol = TRUTH[question_id]
    assert_reference_is(truth, QUESTIONS[question_id], seed, rtol=rtol, atol=1e-12)


def test_quantile_levels_give_nf4() -> None:
    levels = QUESTIONS["16.q2"].expect((7, 8, NF4_TOP))
    np.testing.assert_allclose(levels, nf4_levels().numpy(), atol=1e-7)


def test_cases_reach_what_the_questions_are_about() -> None:
    assert any((np.abs(W).max(axis=1) == 0).any() for (W,) in QUESTIONS["16.q1"].draw_cases(0))
    lengths = {len(codes) % 2 for (codes,) in QUESTIONS["16.q3"].draw_cases(0)}
    assert lengths == {0, 1}
    decoding = QUESTIONS["16.q4"].draw_cases(0)
    assert any(case[1] % case[4] for case in decoding), "no short last block"
    assert any(case[1] % 2 for case in decoding), "no odd count"
    assert any(case[4] % 2 and case[4] > 1 for case in decoding), "no block that splits a byte"
    starts = [not case[4].any() for case in QUESTIONS["16.q5"].draw_cases(0)]
    assert set(starts) == {True, False}


HINTS = {
    "16.q1": {"one step for all": "each row", "128": "127", "not absolute": "absolute",
              "cut off": "nearest", "0/0": "division by 0"},
    "16.q2": {"not scaled": "largest", "sides swapped": "negative", "even levels": "shares",
              "no exact zero": "exactly 0", "zero twice": "once", "descending": "ascending"},
    "16.q3": {"low half first": "high half", "odd one dropped": "odd", "times 15": "16",
              "first half and second half": "neighbours", "filled up in front": "end"},
    "16.q4": {"low half first": "high half", "tiled scales": "// block_size",
              "keeps the filling": "count", "codes as weights": "levels[code]",
              "no scales": "scale", "divided": "way in", "first all high halves": "turns"},
    "16.q5": {"no alpha / r": "alpha / r", "alpha only": "alpha / r", "averaged": "average",
              "frozen carries nothing": "carries", "adapter carries nothing": "adapter",
              "a gradient for the codes": "frozen", "transposed": "shape"},
}  # fmt: skip


@pytest.mark.parametrize("question_id", HINTS)
def test_hints_name_the_mistake(question_id: str) -> None:
    assert_hints_name(QUESTIONS[question_id], HINTS[question_id])


def test_error_of_rounding_is_a_twelfth_of_the_square_of_the_step() -> None:
    W = torch.randn(600, 600, generator=torch.Generator().manual_seed(0))
    kept = quantise_int8(W)
    error = dequantise(kept) - W
    assert error.abs().max() <= kept.step / 2 * 1.0001
    assert error.square().mean() / (kept.step**2 / 12) == pytest.approx(1, abs=0.02)


def test_lloyd_steps_never_raise_the_error_and_end_below_nf4() -> None:
    blocks = np.random.default_rng(0).normal(size=(500, 64))
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    u, s = (blocks / scale).ravel(), np.repeat(scale.ravel(), 64)

    def cost(levels):
        cell = np.searchsorted((levels[1:] + levels[:-1]) / 2, u)
        return np.mean(s**2 * (u - levels[cell]) ** 2), cell

    levels = nf4_levels().double().numpy()
    costs = [cost(levels)[0]]
    for _ in range(30):
        cell = cost(levels)[1]
        levels = np.array([np.average(u[cell == k], weights=s[cell == k] ** 2) for k in range(16)])
        costs.append(cost(levels)[0])
    assert (np.diff(costs) <= 1e-12).all()
    assert costs[-1] < 0.95 * costs[0]


def test_even_levels_win_on_uniform_weights_and_nf4_on_normal_ones() -> None:
    def error(W, levels):
        return (dequantise(quantise_blockwise(W, levels)) - W).square().mean().item()

    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(200, 640, generator=generator)
    uniform = torch.rand(200, 640, generator=generator) * 2 - 1
    assert error(normal, nf4_levels()) < 0.9 * error(normal, int4_levels())
    assert error(uniform, int4_levels()) < 0.8 * error(uniform, nf4_levels())


def benchmark():
    path = ROOT / "benchmarks" / "quantised_lora.py"
    spec = importlib.util.spec_from_file_location("quantised_lora", path)
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks up its module.
    importlib.import_module("sys").modules["quantised_lora"] = module
    spec.loader.exec_module(module)
    return module


def test_benchmark_rounds_as_the_library_does() -> None:
    rounded = benchmark().rounded
    W = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        rounded(W, 4, 64), dequantise(quantise_blockwise(W, int4_levels(), 64))
    )
    torch.testing.assert_close(rounded(W, 8, None), dequantise(quantise_int8(W)))


def test_recorded_results_have_every_arm_and_draw() -> None:
    content = json.loads((ROOT / "data" / "results" / "quantised_lora.json").read_text("utf-8"))
    tuned, frozen = Comparison(content["fine_tuned"]), Comparison(content["frozen"])
    assert set(tuned.scores) == {"full precision", "int8", "int4", "NF4", "2 bits"}
    assert set(frozen.scores) > set(tuned.scores)
    assert all(len(scores) == content["settings"]["draws"] for scores in tuned.scores.values())
    assert all(0 <= score <= 1 for scores in frozen.scores.values() for score in scores)
