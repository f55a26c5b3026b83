"""The reference answers of lesson 02 against torch, autograd and simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tlcourse import locations
from tlcourse.questions import load_questions

FOLDER: Path = locations.lessons_dir() / "02_mathematics_of_transfer"
REFERENCES = {
    question.id: question.expected for question in load_questions(FOLDER / "questions.py")
}
sgd_step, adam_step, l2sp_with_head, early_stopping_risk, safe_length = (
    REFERENCES[f"02.q{i}"] for i in range(1, 6)
)


def optimizer_path(optimizer_class, theta, grads, lr, alpha):
    """Weights after each step of a torch optimiser; grads is (steps, d)."""
    weights = torch.tensor(theta, requires_grad=True)
    optimizer = optimizer_class([weights], lr=lr, weight_decay=alpha)
    path = []
    for grad in grads:
        weights.grad = torch.tensor(grad)
        optimizer.step()
        path.append(weights.detach().numpy().copy())
    return np.array(path)


def test_sgd_step_is_that_of_torch():
    rng = np.random.default_rng(0)
    theta, grads = rng.normal(size=5), rng.normal(size=(1, 5))
    expected = optimizer_path(torch.optim.SGD, theta, grads, 0.1, 0.3)[0]
    np.testing.assert_allclose(
        sgd_step(theta, grads[0], 0.1, 0.3, np.zeros(5)), expected, rtol=1e-14
    )


@pytest.mark.parametrize(
    ("optimizer_class", "decoupled"), [(torch.optim.Adam, False), (torch.optim.AdamW, True)]
)
def test_adam_step_is_that_of_torch_in_both_forms(optimizer_class, decoupled):
    rng = np.random.default_rng(1)
    theta, grads = rng.normal(size=5), rng.normal(size=(30, 5)) * [1, 10, 1e-3, 1e-7, 0]
    m, v = np.zeros(5), np.zeros(5)
    path = optimizer_path(optimizer_class, theta, grads, 0.01, 0.2)
    for step, (grad, expected) in enumerate(zip(grads, path, strict=True), 1):
        state = adam_step(theta, grad, m, v, step, 0.01, 0.2, np.zeros(5), decoupled)
        theta, m, v = state["theta"], state["m"], state["v"]
        np.testing.assert_allclose(theta, expected, rtol=1e-12, atol=1e-14)


def test_a_pull_to_a_centre_is_a_pull_to_zero_in_moved_coordinates():
    rng = np.random.default_rng(2)
    theta, grad, center, m = rng.normal(size=(4, 5))
    v = rng.uniform(size=5)
    for decoupled in (False, True):
        here = adam_step(theta, grad, m, v, 3, 0.1, 0.5, center, decoupled)["theta"]
        moved = adam_step(theta - center, grad, m, v, 3, 0.1, 0.5, np.zeros(5), decoupled)["theta"]
        np.testing.assert_allclose(here - center, moved, atol=1e-14)


@pytest.mark.parametrize(("n", "d", "k"), [(12, 5, 3), (4, 7, 5)])
def test_gradient_of_the_objective_vanishes_at_l2sp_with_head(n, d, k):
    rng = np.random.default_rng(3)
    X, y, theta_0 = rng.normal(size=(n, d)), rng.normal(size=n), rng.normal(size=k)
    theta = torch.tensor(l2sp_with_head(X, y, theta_0, 0.4, 0.05), requires_grad=True)
    loss = (torch.tensor(X) @ theta - torch.tensor(y)).square().sum() / (2 * n)
    loss = loss + 0.2 * (theta[:k] - torch.tensor(theta_0)).square().sum()
    loss = loss + 0.025 * theta[k:].square().sum()
    loss.backward()
    assert theta.grad is not None
    assert theta.grad.abs().max() < 1e-12


@pytest.mark.parametrize(("n", "d"), [(15, 4), (4, 7)])
def test_early_stopping_risk_is_that_of_simulated_runs(n, d):
    rng = np.random.default_rng(4)
    X, theta_star = rng.normal(size=(n, d)), rng.normal(size=d)
    start, sigma, lr, steps, draws = theta_star + 0.5, 0.8, 0.05, 50, 20_000
    Y = X @ theta_star + sigma * rng.normal(size=(draws, n))
    theta = np.tile(start, (draws, 1))
    for _ in range(steps):
        theta -= lr * (theta @ X.T - Y) @ X / n
    bias2, variance = early_stopping_risk(X, theta_star, start, sigma, lr, steps)
    risks = np.sum((theta - theta_star) ** 2, axis=1)
    scatter = np.sum((theta - theta.mean(axis=0)) ** 2, axis=1)
    for samples, expected in ((risks, bias2 + variance), (scatter, variance)):
        standard_error = samples.std() / draws**0.5
        assert abs(samples.mean() - expected) < 5 * standard_error


@pytest.mark.parametrize(("n", "d"), [(20, 6), (5, 8)])
def test_safe_length_is_safe_and_not_longer_than_that(n, d):
    rng = np.random.default_rng(5)
    X, theta_star = rng.normal(size=(n, d)), rng.normal(size=d)
    setting = 0.5, 0.05, 60  # sigma, lr, steps
    length = safe_length(X, theta_star, *setting[1:])
    scratch = sum(early_stopping_risk(X, theta_star, np.zeros(d), *setting))
    _, V = np.linalg.eigh(X.T @ X / n)  # ascending: the quietest direction first
    directions = [*rng.normal(size=(200, d)), *V.T]
    for direction in directions:
        delta = length * direction / np.linalg.norm(direction)
        assert (
            sum(early_stopping_risk(X, theta_star, theta_star + delta, *setting)) <= scratch + 1e-12
        )
    too_long = 1.01 * length * V[:, 0]
    assert sum(early_stopping_risk(X, theta_star, theta_star + too_long, *setting)) > scratch
