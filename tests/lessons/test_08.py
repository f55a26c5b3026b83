"""Lesson 08: reference answers against autograd, simulation and the library; the derivations."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from judging import assert_hints_name
from torch import nn

from tlcourse.losses import L2SP
from tlcourse.questions import load_questions
from tlcourse.weight_space import interpolate

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = {
    question.id: question
    for question in load_questions(ROOT / "lessons" / "08_feature_distortion" / "questions.py")
}
SEEDS = (0, 1, b"a class secret")


def cases(question_id: str) -> list[tuple]:
    return [case for seed in SEEDS for case in QUESTIONS[question_id].draw_cases(seed)]


def flow(v0: float, c: float, v_true: float, lr: float = 2e-3, steps: int = 20_000) -> np.ndarray:
    """Gradient descent with small steps on one feature; ends at (s, v)."""
    s, v = c, v0
    for _ in range(steps):
        rho = v * s - v_true * c
        s, v = s - lr * rho * v, v - lr * rho * s
    return np.array([s, v])


def test_gradients_are_those_of_autograd() -> None:
    for v, B, X, y in cases("08.q1"):
        leaf_v, leaf_B = (torch.tensor(a, requires_grad=True) for a in (v, B))
        residual = torch.tensor(X) @ leaf_B.T @ leaf_v - torch.tensor(y)
        (residual.square().mean() / 2).backward()
        expected = QUESTIONS["08.q1"].expect((v, B, X, y))
        np.testing.assert_allclose(expected["v"], leaf_v.grad.numpy(), atol=1e-12)
        np.testing.assert_allclose(expected["B"], leaf_B.grad.numpy(), atol=1e-12)


def test_unreached_is_the_residual_of_least_squares() -> None:
    for X, new in cases("08.q2"):
        coefficients = np.linalg.lstsq(X.T, new.T, rcond=1e-8)[0]  # best sums of training inputs
        expected = QUESTIONS["08.q2"].expect((X, new))
        np.testing.assert_allclose(expected, new - (X.T @ coefficients).T, atol=1e-6)
        np.testing.assert_allclose(expected @ X.T, 0, atol=1e-8)


def test_features_of_unreached_inputs_never_move() -> None:
    """Also with a large step, mini-batches and a head that changes."""
    rng = np.random.default_rng(0)
    gradients, unreached = QUESTIONS["08.q1"].expected, QUESTIONS["08.q2"].expected
    X = rng.normal(size=(30, 4)) @ rng.normal(size=(4, 9)) / 3
    y, v, B = rng.normal(size=30), rng.normal(size=3), rng.normal(size=(3, 9)) / 3
    outside = unreached(X, rng.normal(size=(5, 9)))
    before, start = outside @ B.T, B.copy()
    for _ in range(50):
        rows = rng.choice(30, size=6, replace=False)
        step = gradients(v, B, X[rows], y[rows])
        v, B = v - 0.05 * step["v"], B - 0.05 * step["B"]
    assert np.abs(B - start).max() > 0.05
    np.testing.assert_allclose(outside @ B.T, before, atol=1e-12)


def test_what_is_conserved_drifts_half_as_much_with_half_the_step() -> None:
    rng = np.random.default_rng(1)
    gradients = QUESTIONS["08.q1"].expected
    X, y = rng.normal(size=(20, 6)), rng.normal(size=20)
    v0, B0 = rng.normal(size=3), rng.normal(size=(3, 6)) / 2

    def drift(lr: float, steps: int) -> float:
        v, B = v0, B0
        for _ in range(steps):
            step = gradients(v, B, X, y)
            v, B = v - lr * step["v"], B - lr * step["B"]
        gained_by_head = np.outer(v, v) - np.outer(v0, v0)
        assert np.linalg.norm(gained_by_head) > 0.1
        return float(np.linalg.norm(gained_by_head - (B @ B.T - B0 @ B0.T)))

    assert drift(2e-3, 2000) / drift(1e-3, 4000) == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("case", cases("08.q3")[:5], ids=str)
def test_the_formula_says_where_training_ends(case: tuple) -> None:
    expected = QUESTIONS["08.q3"].expect(case)
    np.testing.assert_allclose([expected["s"], expected["v"]], flow(*case), atol=5e-3)


def test_the_cases_reach_both_branches() -> None:
    signs = {
        (np.sign(end["s"]), np.sign(end["v"]))
        for end in (QUESTIONS["08.q3"].expect(case) for case in cases("08.q3"))
    }
    assert signs == {(1.0, 1.0), (-1.0, -1.0)}


class Small(nn.Module):
    """Named as the arrays of question 4."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        super().__init__()
        for name, array in arrays.items():
            part, _, kind = name.partition(".")
            if part not in self._modules:
                self.add_module(part, nn.Module())
            parameter = nn.Parameter(torch.tensor(array))
            getattr(self, part).register_parameter(kind, parameter)


def test_spring_step_is_sgd_on_the_librarys_penalty() -> None:
    for theta, start, gradient, lr, alpha, beta in cases("08.q4"):
        model = Small(start)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in gradient)
        penalty = L2SP(model, alpha, beta)
        linear_loss = torch.zeros((), dtype=torch.float64)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.tensor(theta[name]))
        for name, parameter in model.named_parameters():
            if name in gradient:
                linear_loss = linear_loss + (parameter * torch.tensor(gradient[name])).sum()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
        (linear_loss + penalty(model)).backward()
        optimizer.step()
        expected = QUESTIONS["08.q4"].expect((theta, start, gradient, lr, alpha, beta))
        for name, parameter in model.named_parameters():
            np.testing.assert_allclose(expected[name], parameter.detach().numpy(), atol=1e-12)


def test_interpolation_is_the_librarys() -> None:
    outcomes = []
    for theta_a, theta_b, alpha in cases("08.q5"):
        expected = QUESTIONS["08.q5"].expect((theta_a, theta_b, alpha))
        pair = [
            {name: torch.as_tensor(array) for name, array in theta.items()}
            for theta in (theta_a, theta_b)
        ]
        outcomes.append(isinstance(expected, str))
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=expected.split()[-1]):
                interpolate(*pair, alpha)
            continue
        for name, tensor in interpolate(*pair, alpha).items():
            np.testing.assert_allclose(expected["state"][name], tensor.numpy(), atol=1e-12)
    assert {True, False} == set(outcomes)


HINTS = {
    "08.q1": {"no 1/n": "mean", "a 2 too many": "half", "sign": "sign", "transposed": "shape"},
    "08.q2": {"the part inside": "inside", "QR of all inputs": "rank|span only"},
    "08.q3": {"always the upper branch": "branch", "the probe's end": "start"},
    "08.q4": {"head on the spring": "head", "frozen layer pulled": "frozen"},
    "08.q5": {"averages the counter": "whole number", "broadcasts": "broadcast",
              "error without a name": "name", "backwards": "nearer|alpha"},
}  # fmt: skip


@pytest.mark.parametrize("question_id", HINTS)
def test_hints_name_the_mistake(question_id: str) -> None:
    assert_hints_name(QUESTIONS[question_id], HINTS[question_id])


def benchmark() -> ModuleType:
    path = ROOT / "benchmarks" / "feature_distortion.py"
    spec = importlib.util.spec_from_file_location("feature_distortion", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # for dataclasses
    spec.loader.exec_module(module)
    return module


def test_the_record_was_made_by_this_benchmark() -> None:
    """Arms, parts, settings and the number of draws agree; every score is a fraction."""
    made_by = benchmark()
    path = ROOT / "data" / "results" / "feature_distortion.json"
    recorded = json.loads(path.read_text(encoding="utf-8"))
    assert (ROOT / recorded["command"].split()[1]).is_file()
    assert recorded["num_steps"] == made_by.NUM_STEPS
    assert recorded["labels_per_class"] == made_by.LABELS_PER_CLASS
    for name, arms in made_by.TASK_ARMS.items():
        assert set(recorded["lrs"][name]) == set(arms)
        found = recorded["tasks"][name]["accuracy"]
        assert {"validation", "test", "inverted", "noisy"} <= set(found)
        for by_arm in found.values():
            assert {"probe", *arms} <= set(by_arm)
            scores = np.array(list(by_arm.values()))
            assert scores.shape[1] == recorded["draws"] >= 5
            assert (scores >= 0).all() and (scores <= 1).all()
