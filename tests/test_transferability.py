"""Transferability scores against brute force and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from tlcourse.transferability import cka, h_score, leep, log_me, neighbour_score

RNG = np.random.default_rng(0)
TARGETS = np.array([0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 2, 1] * 3)
FEATURES = RNG.normal(size=(36, 5)) + np.eye(5)[TARGETS]


def test_leep_by_loops() -> None:
    probabilities = RNG.dirichlet(np.ones(4), size=36)
    joint = np.zeros((3, 4))
    for row, y in zip(probabilities, TARGETS, strict=True):
        for z in range(4):
            joint[y, z] += row[z] / 36
    total = 0.0
    for row, y in zip(probabilities, TARGETS, strict=True):
        total += math.log(sum(joint[y, z] / joint[:, z].sum() * row[z] for z in range(4)))
    assert leep(probabilities, TARGETS) == pytest.approx(total / 36, rel=1e-12)


def test_leep_of_a_perfect_and_of_a_blind_source() -> None:
    assert leep(np.eye(3)[TARGETS], TARGETS) == pytest.approx(0)
    blind = leep(np.full((36, 4), 0.25), TARGETS)
    assert blind == pytest.approx(-math.log(3))  # three equally frequent classes


def evidence(features: np.ndarray, y: np.ndarray, log_alpha: float, log_beta: float) -> float:
    """Density of y under its Gaussian marginal, with a full covariance matrix."""
    n = len(y)
    cov = features @ features.T / math.exp(log_alpha) + np.eye(n) / math.exp(log_beta)
    _, log_det = np.linalg.slogdet(2 * math.pi * cov)
    return float(-0.5 * (y @ np.linalg.solve(cov, y)) - 0.5 * log_det)


@pytest.mark.parametrize("width", [5, 60])  # fewer, and more, features than examples
def test_log_me_is_the_best_evidence_on_a_grid(width: int) -> None:
    features = RNG.normal(size=(36, width)) + np.eye(width)[TARGETS]
    best = []
    for k in range(3):
        y = np.equal(TARGETS, k).astype(float)
        found = minimize(
            lambda p, y=y: -evidence(features, y, *p), [1.0, 1.0], method="Nelder-Mead",
            options={"xatol": 1e-6, "fatol": 1e-9, "maxiter": 4000},
        )  # fmt: skip
        best.append(-found.fun / 36)
    assert log_me(features, TARGETS) == pytest.approx(np.mean(best), abs=1e-4)


def test_h_score_by_loops() -> None:
    centred = FEATURES - FEATURES.mean(0)
    between = np.zeros((5, 5))
    for k in range(3):
        members = np.equal(TARGETS, k)
        mean = centred[members].mean(0)
        between += members.mean() * np.outer(mean, mean)
    total = np.cov(FEATURES, rowvar=False, bias=True)
    expected = np.trace(np.linalg.inv(total) @ between)
    assert h_score(FEATURES, TARGETS) == pytest.approx(expected, rel=1e-9)
    # Invariant under any invertible linear map; between 0 and K - 1.
    mixed = FEATURES @ RNG.normal(size=(5, 5))
    assert h_score(mixed, TARGETS) == pytest.approx(expected, rel=1e-6)
    assert 0 < h_score(FEATURES, TARGETS) < 2
    assert h_score(np.eye(3)[TARGETS], TARGETS) == pytest.approx(2)


def test_shrinkage_tames_the_h_score_of_noise() -> None:
    noise = RNG.normal(size=(36, 30))
    assert h_score(noise, TARGETS) > 1.2
    assert h_score(noise, TARGETS, shrinkage=True) < 0.5 * h_score(noise, TARGETS)


def test_neighbour_score_by_leaving_each_example_out() -> None:
    for k in (1, 4, 5):
        hits = 0
        for i, (row, truth) in enumerate(zip(FEATURES, TARGETS, strict=True)):
            others, labels = np.delete(FEATURES, i, axis=0), np.delete(TARGETS, i)
            cosine = others @ row / np.linalg.norm(others, axis=1) / np.linalg.norm(row)
            votes = np.bincount(labels[np.argsort(-cosine)[:k]], minlength=3)
            hits += int(votes.argmax() == truth)
        assert neighbour_score(FEATURES, TARGETS, k) == hits / len(TARGETS)
    assert neighbour_score(np.eye(3)[TARGETS] + 1e-3 * FEATURES[:, :3], TARGETS) == 1
    with pytest.raises(ValueError, match=r"k must be in 1\.\.35 .*got 36"):
        neighbour_score(FEATURES, TARGETS, 36)


def test_cka_invariances() -> None:
    x, y = RNG.normal(size=(50, 6)), RNG.normal(size=(50, 9))
    rotation, _ = np.linalg.qr(RNG.normal(size=(6, 6)))
    for debiased in (False, True):
        assert cka(x, 3 * x @ rotation + 2, debiased) == pytest.approx(1)
        assert cka(x, y, debiased) == pytest.approx(cka(y, x, debiased))
    # An invertible map that is no rotation changes it.
    assert cka(x, x @ np.diag([10, 1, 1, 1, 1, 1])) < 0.9


def test_debiased_cka_of_unrelated_wide_features_is_about_zero() -> None:
    pairs = [(RNG.normal(size=(40, 400)), RNG.normal(size=(40, 400))) for _ in range(20)]
    assert np.mean([cka(x, y, debiased=False) for x, y in pairs]) > 0.8
    assert abs(np.mean([cka(x, y) for x, y in pairs])) < 0.03


def test_hsic_estimate_by_its_formula() -> None:
    """Song et al. 2012, equation 5, with matrices of ones."""
    x, y = RNG.normal(size=(8, 3)), RNG.normal(size=(8, 2))
    x, y = x - x.mean(0), y - y.mean(0)
    one = np.ones((8, 1))

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        k, m = (z @ z.T - np.diag(np.diag(z @ z.T)) for z in (a, b))
        middle = (one.T @ k @ one * (one.T @ m @ one)).item() / (7 * 6)
        return (np.trace(k @ m) + middle - 2 / 6 * (one.T @ k @ m @ one).item()) / (8 * 5)

    expected = hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))
    assert cka(x, y) == pytest.approx(expected)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"got \(36, 5\) and \(35,\)"):
        log_me(FEATURES, TARGETS[:-1])
    with pytest.raises(ValueError, match="must sum to 1"):
        leep(np.abs(FEATURES), TARGETS)
    with pytest.raises(ValueError, match="class numbers"):
        h_score(FEATURES, TARGETS.astype(float))
    with pytest.raises(ValueError, match=r"got \(36, 5\) and \(3, 5\)"):
        cka(FEATURES, FEATURES[:3])
