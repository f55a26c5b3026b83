"""Lesson 10: the reference answers against truth, and what the lesson derives."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from judging import assert_hints_name
from scipy.integrate import quad
from scipy.stats import kendalltau, multivariate_normal, norm, ttest_1samp, weightedtau
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge

from tlcourse import transferability
from tlcourse.questions import load_questions

FOLDER = Path(__file__).resolve().parents[2] / "lessons" / "10_choosing_a_source"
QUESTIONS = {question.id: question for question in load_questions(FOLDER / "questions.py")}
SEEDS = (0, 1, 2, b"a class secret")
RNG = np.random.default_rng(0)


def leep_by_loops(probabilities: np.ndarray, targets: np.ndarray) -> float:
    n, num_words = probabilities.shape
    total = 0.0
    for i in range(n):
        likelihood = 0.0
        for z in range(num_words):
            same = sum(probabilities[j, z] for j in range(n) if targets[j] == targets[i])
            word = sum(probabilities[j, z] for j in range(n))
            likelihood += probabilities[i, z] * (same / word if word else 0.0)
        total += math.log(likelihood)
    return total / n


def h_by_discriminant_analysis(features: np.ndarray, targets: np.ndarray) -> float:
    """Variance between the classes along each discriminant axis, over all the variance there."""
    solver = LinearDiscriminantAnalysis(solver="svd")
    along = solver.fit(features, targets).transform(features)  # (n, at most K - 1)
    total = 0.0
    for column in along.T:
        means = np.array([column[targets == k].mean() for k in range(targets.max() + 1)])[targets]
        total += float(means.var() / column.var())
    return total


def evidence_by_density(F: np.ndarray, t: np.ndarray, alpha: float, beta: float) -> float:
    covariance = F @ F.T / alpha + np.eye(len(t)) / beta
    return float(multivariate_normal(cov=covariance).logpdf(t))


def tau_by_scipy(scores: np.ndarray, outcomes: np.ndarray) -> float:
    return float(kendalltau(scores, outcomes, variant="b").statistic)


def choice_by_t_test(accuracy: np.ndarray, costs: np.ndarray, budget: float, t: float) -> int:
    """In order of price: the first that a paired t statistic cannot tell from the best."""
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -accuracy[i].mean()))
    order = [i for i in order if costs[i] <= budget]
    best = max(order, key=lambda i: accuracy[i].mean())
    for source in order:
        apart = accuracy[best] - accuracy[source]
        if source == best or ttest_1samp(apart, 0).statistic <= t:
            return source
    raise AssertionError


TRUTH = {
    "10.q1": leep_by_loops,
    "10.q2": h_by_discriminant_analysis,
    "10.q3": evidence_by_density,
    "10.q4": tau_by_scipy,
    "10.q5": choice_by_t_test,
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("question_id", TRUTH)
def test_reference_equals_truth(question_id: str, seed: int | bytes) -> None:
    question = QUESTIONS[question_id]
    for case in question.draw_cases(seed):
        expected, truth = question.expect(case), TRUTH[question_id](*case)
        np.testing.assert_allclose(expected, truth, rtol=1e-8, atol=1e-10, equal_nan=True)


def test_evidence_is_an_integral_over_the_weights() -> None:
    """One weight: integrate likelihood times prior numerically; and the lesson's case by hand."""
    expect = QUESTIONS["10.q3"].expected
    assert expect is not None
    F, t, alpha, beta = np.array([[0.5], [-1.0], [2.0]]), np.array([0.3, -0.2, 1.0]), 0.7, 3.0

    def integrand(w: float) -> float:
        noise = norm(scale=beta**-0.5).pdf(t - F[:, 0] * w).prod()
        return float(noise * norm(scale=alpha**-0.5).pdf(w))

    assert expect(F, t, alpha, beta) == pytest.approx(math.log(quad(integrand, -20, 20)[0]))
    one = np.ones(2)
    assert expect(np.ones((2, 1)), one, 1.0, 1.0) == pytest.approx(-2.7205, abs=1e-4)


def test_small_cases_of_the_lesson() -> None:
    four = np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.4, 0.6]])
    labels = np.array([0, 0, 1, 1])
    assert transferability.leep(four, labels) == pytest.approx(-0.471, abs=5e-4)
    values = np.array([[1.0], [3.0], [5.0], [7.0]])
    assert transferability.h_score(values, labels) == pytest.approx(0.8)


def test_leep_is_never_below_the_entropy_of_the_labels() -> None:
    for words in (2, 10, 200):
        probabilities = RNG.dirichlet(np.full(words, 0.2), size=60)
        labels = RNG.permutation(np.repeat(np.arange(5), 12))
        assert transferability.leep(probabilities, labels) >= -math.log(5)


def test_h_score_of_few_examples_is_constant() -> None:
    for width in (30, 64):
        noise, labels = RNG.normal(size=(24, width)), RNG.permutation(np.repeat(np.arange(4), 6))
        assert transferability.h_score(noise, labels) == pytest.approx(3)


def test_left_out_prediction_of_a_linear_smoother() -> None:
    """u = (fitted - S_ii t_i) / (1 - S_ii), against a refit by scikit-learn."""
    F, t, ratio = RNG.normal(size=(12, 5)), RNG.normal(size=12), 0.6
    smoother = F @ np.linalg.solve(F.T @ F + ratio * np.eye(5), F.T)
    fitted, own = smoother @ t, np.diag(smoother)
    for i in range(12):
        rest = np.arange(12) != i
        refit = Ridge(alpha=ratio, fit_intercept=False).fit(F[rest], t[rest])
        assert (fitted[i] - own[i] * t[i]) / (1 - own[i]) == pytest.approx(
            refit.predict(F[i : i + 1])[0]
        )


def test_weighted_tau_as_the_lesson_writes_it() -> None:
    for _ in range(20):
        x, z = RNG.normal(size=8), RNG.normal(size=8)
        agree = np.sign(x[:, None] - x) * np.sign(z[:, None] - z)
        taus = []
        for values in (x, z):
            weight = 1 / (1 + np.argsort(np.argsort(-values)))
            pairs = weight[:, None] + weight
            taus.append((pairs * agree).sum() / pairs[~np.eye(8, dtype=bool)].sum())
        assert np.mean(taus) == pytest.approx(weightedtau(x, z).statistic)


def test_cases_reach_what_the_questions_are_about() -> None:
    unused = [case[0].sum(axis=0) == 0 for case in QUESTIONS["10.q1"].draw_cases(0)]
    assert any(columns.any() for columns in unused), "no word that nobody uses"
    shapes = [case[0].shape for case in QUESTIONS["10.q3"].draw_cases(0)]
    assert any(n < D for n, D in shapes) and any(n > D for n, D in shapes)
    taus = [QUESTIONS["10.q4"].expect(case) for case in QUESTIONS["10.q4"].draw_cases(0)]
    assert sum(map(math.isnan, taus)) == 1
    question = QUESTIONS["10.q5"]
    chosen = [question.expect(case) for case in question.draw_cases(0)]
    assert 0 in chosen and len(set(chosen)) >= 3


HINTS = {
    "10.q1": {
        "joint instead of conditional": "P(z)",
        "sum": "mean",
        "0/0 for an unused word": "0/0",
    },
    "10.q2": {
        "not centred": "mean",
        "within the classes": "Fisher",
        "classes equally large": "more",
    },
    "10.q3": {"no determinant": "log|A|", "fit only": "price", "variances": "precisions"},
    "10.q4": {"ties in the denominator": "N_x", "0 for all ties": "nan", "sign": "sign"},
    "10.q5": {"no budget": "budget", "unpaired": "pair", "highest mean": "cheaper"},
}


@pytest.mark.parametrize("question_id", HINTS)
def test_hints_name_the_mistake(question_id: str) -> None:
    assert_hints_name(QUESTIONS[question_id], HINTS[question_id])
