"""Lesson 03: the reference answers against autograd, and the formula for a step's cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from judging import assert_hints_name, assert_reference_is

from tlcourse.questions import Question, load_questions

FOLDER = Path(__file__).resolve().parents[2] / "lessons" / "03_gradients_by_hand"
QUESTIONS = {question.id: question for question in load_questions(FOLDER / "questions.py")}
SEEDS = (0, 1, b"a class secret")


def leaf(array: np.ndarray) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float64, requires_grad=True)


def loss_q1(logits, targets):
    return F.cross_entropy(leaf(logits), torch.tensor(targets)).item()


def grad_q2(logits, targets):
    logits = leaf(logits)
    F.cross_entropy(logits, torch.tensor(targets)).backward()
    return logits.grad.numpy()


def grad_q3(features, targets, weight, bias):
    weight, bias = leaf(weight), leaf(bias)
    logits = F.linear(torch.tensor(features), weight, bias)
    F.cross_entropy(logits, torch.tensor(targets)).backward()
    return {"weight": weight.grad.numpy(), "bias": bias.grad.numpy()}


def grad_q4(net, inputs, targets, frozen):
    t = {name: leaf(value) for name, value in net.items()}
    if frozen:
        t["W1"].requires_grad_(False)
        t["b1"].requires_grad_(False)
    hidden = torch.relu(F.linear(torch.tensor(inputs), t["W1"], t["b1"]))
    F.cross_entropy(F.linear(hidden, t["V"], t["c"]), torch.tensor(targets)).backward()
    return {name: value.grad.numpy() for name, value in t.items() if value.grad is not None}


def grad_q5(H, dU, A, B, alpha):
    frozen_weight = torch.zeros(len(B), A.shape[1], dtype=torch.float64)
    A, B = leaf(A), leaf(B)
    outputs = F.linear(torch.tensor(H), frozen_weight + alpha / len(A) * B @ A)
    outputs.backward(torch.tensor(dU))
    return {"A": A.grad.numpy(), "B": B.grad.numpy()}


BY_TORCH = {
    "03.q1": loss_q1,
    "03.q2": grad_q2,
    "03.q3": grad_q3,
    "03.q4": grad_q4,
    "03.q5": grad_q5,
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("question_id", BY_TORCH)
def test_reference_equals_autograd(question_id: str, seed: int | bytes) -> None:
    question: Question = QUESTIONS[question_id]
    assert_reference_is(BY_TORCH[question_id], question, seed, rtol=1e-10, atol=1e-12)


def test_cases_reach_what_the_questions_are_about() -> None:
    logits = [case[0] for case in QUESTIONS["03.q1"].draw_cases(0)]
    assert any(np.abs(array).max() > 800 for array in logits), "no logits that overflow exp"
    assert any(np.ptp(array.max(axis=1)) > 1500 for array in logits), "no rows far apart"
    nets = QUESTIONS["03.q4"].draw_cases(0)
    assert {case[3] for case in nets} == {True, False}
    before = [case[1] @ case[0]["W1"].T + case[0]["b1"] for case in nets]
    assert any((array < 0).any() and (array > 0).any() for array in before), "gate never closes"
    factors = [case[3] for case in QUESTIONS["03.q5"].draw_cases(0)]
    assert not factors[0].any() and all(B.any() for B in factors[1:])


HINTS = {
    "03.q1": {"naive softmax": "maximum", "sum, not mean": "mean", "log(p + 1e-9)": "lse"},
    "03.q2": {"no 1/n": "1/n", "transposed": "shape", "sign": "sign", "naive softmax": "maximum"},
    "03.q3": {"transposed": "shape", "averaged twice": "1/n", "no 1/n": "1/n"},
    "03.q4": {"no ReLU gate": "gate", "ignores frozen": "absent", "transposed": "shape"},
    "03.q5": {"no scale": "alpha / r", "transposed": "shape", "averaged again": "1/n"},
}


@pytest.mark.parametrize("question_id", HINTS)
def test_hints_name_the_mistake(question_id: str) -> None:
    assert_hints_name(QUESTIONS[question_id], HINTS[question_id])
