"""Graded questions of lesson 02: steps with a pull, L2-SP, the risk of stopping early."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tlcourse.checks import Question

Mistakes = dict[str, tuple[Callable[..., Any], str]]  # name -> (wrong answer, what to tell)


def recognise(mistakes: Mistakes, otherwise: str) -> Callable[[tuple, Any, Any], str]:
    """A hint that knows the usual mistakes: it compares what it got with what they give."""

    def hint(case: tuple, expected: Any, got: Any) -> str:
        for answer, text in mistakes.values():
            if _same(answer(*case), got):
                return text
        return otherwise

    return hint


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    try:
        a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    except (TypeError, ValueError):
        return False
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-6, atol=1e-9, equal_nan=True)


def wrong(mistakes: Mistakes) -> dict[str, Callable[..., Any]]:
    return {name: answer for name, (answer, _) in mistakes.items()}


# --- 02.q1 one step with a pull ------------------------------------------------------------


def cases_q1(rng: np.random.Generator) -> list[tuple]:
    """A pull towards a point, one towards zero, and none."""
    cases = []
    for size, alpha, centred in ((4, 0.3, True), (6, 0.05, False), (3, 0.0, True)):
        theta, grad = rng.normal(size=size), rng.normal(size=size)
        center = rng.normal(size=size) if centred else np.zeros(size)
        cases.append((theta, grad, 0.1, alpha, center))
    return cases


def sgd_step(theta, grad, lr, alpha, center):
    return theta - lr * (grad + alpha * (theta - center))


MISTAKES_Q1: Mistakes = {
    "pulls to zero": (
        lambda theta, grad, lr, alpha, center: theta - lr * (grad + alpha * theta),
        "this pulls towards zero. The pull is alpha times the distance from center.",
    ),
    "decay without the learning rate": (
        lambda theta, grad, lr, alpha, center: theta - lr * grad - alpha * (theta - center),
        "the penalty's gradient is a gradient too: it is multiplied by lr like the other.",
    ),
    "pushes away": (
        lambda theta, grad, lr, alpha, center: theta - lr * (grad - alpha * (theta - center)),
        "the sign of the pull: with grad = 0 the step must bring theta nearer to center.",
    ),
    "factor two": (
        lambda theta, grad, lr, alpha, center: theta - lr * (grad + 2 * alpha * (theta - center)),
        "the penalty is alpha / 2 times the square, so its gradient has no factor 2.",
    ),
    "one after the other": (
        lambda theta, grad, lr, alpha, center: (
            (theta - lr * grad) - lr * alpha * (theta - lr * grad - center)
        ),
        "both gradients are taken at the same theta, before it moves.",
    ),
}


# --- 02.q2 Adam with a pull, in two forms --------------------------------------------------


def cases_q2(rng: np.random.Generator) -> list[tuple]:
    """First and later steps, in both forms; tiny and zero gradients, so that epsilon counts."""
    cases = []
    for step, decoupled in ((1, False), (1, True), (7, False), (400, True)):
        theta, center = rng.normal(size=(2, 5))
        grad = rng.normal(size=5) * np.array([1, 10, 1e-3, 1e-7, 0])
        started = step > 1
        m = started * 0.5 * rng.normal(size=5) * np.abs(grad)
        v = started * rng.uniform(0.5, 2, size=5) * grad**2 * (1 - 0.999 ** (step - 1))
        cases.append((theta, grad, m, v, step, 0.01, 0.2, center, decoupled))
    return cases


def adam_step(theta, grad, m, v, step, lr, alpha, center, decoupled):
    pull = alpha * (theta - center)
    if not decoupled:
        grad = grad + pull
    m = 0.9 * m + 0.1 * grad
    v = 0.999 * v + 0.001 * grad**2
    m_hat, v_hat = m / (1 - 0.9**step), v / (1 - 0.999**step)
    new = theta - lr * m_hat / (np.sqrt(v_hat) + 1e-8)
    return {"theta": new - lr * pull if decoupled else new, "m": m, "v": v}


def _always_in_gradient(*case):
    return adam_step(*case[:-1], False)


def _always_decoupled(*case):
    return adam_step(*case[:-1], True)


def _pull_to_zero(theta, grad, m, v, step, lr, alpha, center, decoupled):
    return adam_step(theta, grad, m, v, step, lr, alpha, np.zeros_like(theta), decoupled)


def _without_lr(theta, grad, m, v, step, lr, alpha, center, decoupled):
    result = adam_step(theta, grad, m, v, step, lr, alpha, center, decoupled)
    if decoupled:
        result["theta"] = result["theta"] + (lr - 1) * alpha * (theta - center)
    return result


def _uncorrected(theta, grad, m, v, step, lr, alpha, center, decoupled):
    """A step so late that both corrections are 1."""
    return adam_step(theta, grad, m, v, 10**6, lr, alpha, center, decoupled)


def _counts_from_zero(theta, grad, m, v, step, lr, alpha, center, decoupled):
    result = adam_step(theta, grad, m, v, step, lr, alpha, center, decoupled)
    pull = lr * alpha * (theta - center) if decoupled else 0.0
    with np.errstate(all="ignore"):
        m_hat = np.divide(result["m"], 1 - 0.9 ** (step - 1))
        v_hat = np.divide(result["v"], 1 - 0.999 ** (step - 1))
        return {**result, "theta": theta - lr * m_hat / (np.sqrt(v_hat) + 1e-8) - pull}


def _epsilon_in_the_root(theta, grad, m, v, step, lr, alpha, center, decoupled):
    result = adam_step(theta, grad, m, v, step, lr, alpha, center, decoupled)
    m_hat, v_hat = result["m"] / (1 - 0.9**step), result["v"] / (1 - 0.999**step)
    pull = lr * alpha * (theta - center) if decoupled else 0.0
    return {**result, "theta": theta - lr * m_hat / np.sqrt(v_hat + 1e-8) - pull}


MISTAKES_Q2: Mistakes = {
    "always in the gradient": (
        _always_in_gradient,
        "with decoupled=True, m and v must not see the pull; it acts on theta alone.",
    ),
    "always decoupled": (
        _always_decoupled,
        "with decoupled=False the pull is added to the gradient before m and v are updated.",
    ),
    "pulls to zero": (_pull_to_zero, "the pull is alpha times the distance from center."),
    "decoupled pull without lr": (
        _without_lr,
        "the decoupled pull is multiplied by lr, as in torch: lr * alpha * (theta - center).",
    ),
    "no bias correction": (
        _uncorrected,
        "m and v start at zero and are too small at first: divide by 1 - beta**step.",
    ),
    "step counted from zero": (
        _counts_from_zero,
        "step is 1 in the first step, so the exponent of the correction is step itself.",
    ),
    "epsilon inside the root": (_epsilon_in_the_root, "epsilon is added to the root, not in it."),
}


# --- 02.q3 L2-SP with a new head -----------------------------------------------------------


def cases_q3(rng: np.random.Generator) -> list[tuple]:
    """More examples than weights, fewer, and a head of one weight."""
    cases = []
    for n, d, k in ((12, 5, 3), (4, 7, 5), (9, 4, 3)):
        X, y = rng.normal(size=(n, d)), rng.normal(size=n)
        cases.append((X, y, rng.normal(size=k), 0.4, 0.05))
    return cases


def l2sp_with_head(X, y, theta_0, alpha, beta):
    n, d = X.shape
    center = np.concatenate([theta_0, np.zeros(d - len(theta_0))])
    strength = np.where(np.arange(d) < len(theta_0), alpha, beta)
    return center + np.linalg.solve(X.T @ X / n + np.diag(strength), X.T @ (y - X @ center) / n)


def _one_strength(X, y, theta_0, alpha, beta):
    return l2sp_with_head(X, y, theta_0, alpha, alpha)


def _not_divided(X, y, theta_0, alpha, beta):
    return l2sp_with_head(X, y, theta_0, alpha / len(y), beta / len(y))


def _ridge(X, y, theta_0, alpha, beta):
    return l2sp_with_head(X, y, np.zeros_like(theta_0), alpha, beta)


def _added(X, y, theta_0, alpha, beta):
    ridge = _ridge(X, y, theta_0, alpha, beta)
    return ridge + np.concatenate([theta_0, np.zeros(X.shape[1] - len(theta_0))])


def _swapped(X, y, theta_0, alpha, beta):
    return l2sp_with_head(X, y, theta_0, beta, alpha)


MISTAKES_Q3: Mistakes = {
    "one strength for all": (_one_strength, "the head has its own strength, beta."),
    "not divided by n": (
        _not_divided,
        "the empirical risk is a mean: X^T X and X^T y are divided by n, alpha and beta are not.",
    ),
    "ridge to zero": (_ridge, "the first weights are pulled towards theta_0, not towards zero."),
    "theta_0 plus ridge of y": (
        _added,
        "theta_0 explains a part of y already. What is fitted is the rest, y - X center.",
    ),
    "alpha and beta swapped": (_swapped, "alpha belongs to the backbone, beta to the head."),
}


# --- 02.q4 bias and variance of t steps ----------------------------------------------------


def cases_q4(rng: np.random.Generator) -> list[tuple]:
    """Few and many steps; more examples than weights, and fewer (silent directions)."""
    cases = []
    for n, d, steps in ((15, 4, 10), (15, 4, 300), (4, 7, 50)):
        X, theta_star = rng.normal(size=(n, d)), rng.normal(size=d)
        start = theta_star + 0.5 * rng.normal(size=d)
        cases.append((X, theta_star, start, 0.8, 0.05, steps))
    return cases


def _spectrum(X):
    eigenvalues, V = np.linalg.eigh(X.T @ X / len(X))
    eigenvalues[eigenvalues < 1e-10 * eigenvalues[-1]] = 0.0
    return eigenvalues, V


def early_stopping_risk(X, theta_star, start, sigma, lr, steps):
    eigenvalues, V = _spectrum(X)
    keep = (1 - lr * eigenvalues) ** steps
    heard = eigenvalues > 0
    bias2 = np.sum((keep * (V.T @ (start - theta_star))) ** 2)
    variance = np.sum((1 - keep[heard]) ** 2 * sigma**2 / (len(X) * eigenvalues[heard]))
    return [float(bias2), float(variance)]


def _in_data_coordinates(X, theta_star, start, sigma, lr, steps):
    eigenvalues, _ = _spectrum(X)
    bias2 = np.sum(((1 - lr * eigenvalues) ** steps * (start - theta_star)) ** 2)
    return [float(bias2), early_stopping_risk(X, theta_star, start, sigma, lr, steps)[1]]


def _filter_not_squared(X, theta_star, start, sigma, lr, steps):
    eigenvalues, _ = _spectrum(X)
    heard = eigenvalues[eigenvalues > 0]
    variance = np.sum((1 - (1 - lr * heard) ** steps) * sigma**2 / (len(X) * heard))
    return [early_stopping_risk(X, theta_star, start, sigma, lr, steps)[0], float(variance)]


def _without_n(X, theta_star, start, sigma, lr, steps):
    return early_stopping_risk(X, theta_star, start, sigma * len(X) ** 0.5, lr, steps)


def _sum_not_mean(X, theta_star, start, sigma, lr, steps):
    """Eigenvalues of X^T X; a step n times too long."""
    with np.errstate(all="ignore"):
        bias2, _ = early_stopping_risk(X, theta_star, start, sigma, lr * len(X), steps)
        eigenvalues = _spectrum(X)[0] * len(X)
        heard = eigenvalues[eigenvalues > 0]
        variance = np.sum((1 - (1 - lr * heard) ** steps) ** 2 * sigma**2 / (len(X) * heard))
    return [bias2, float(variance)]


def _as_ridge(X, theta_star, start, sigma, lr, steps):
    eigenvalues, V = _spectrum(X)
    filters = eigenvalues / (eigenvalues + 1 / (lr * steps))
    heard = eigenvalues > 0
    bias2 = np.sum(((1 - filters) * (V.T @ (start - theta_star))) ** 2)
    variance = np.sum(filters[heard] ** 2 * sigma**2 / (len(X) * eigenvalues[heard]))
    return [float(bias2), float(variance)]


def _from_zero(X, theta_star, start, sigma, lr, steps):
    return early_stopping_risk(X, theta_star, np.zeros_like(start), sigma, lr, steps)


MISTAKES_Q4: Mistakes = {
    "start not turned into the eigenbasis": (
        _in_data_coordinates,
        "bias: the filters belong to the eigenvectors. Turn start - theta_star first: V.T @ (...).",
    ),
    "filter not squared in the variance": (
        _filter_not_squared,
        "variance: a factor f on a random number multiplies its variance by f squared.",
    ),
    "n forgotten": (_without_n, "variance: more examples mean less noise. Where does n stand?"),
    "X^T X not divided by n": (
        _sum_not_mean,
        "the empirical risk is a mean, so the eigenvalues are those of X^T X / n.",
    ),
    "ridge with alpha = 1 / (lr steps)": (
        _as_ridge,
        "close, but that is the filter of ridge. Steps give 1 - (1 - lr * eigenvalue)**steps.",
    ),
    "starts from zero": (_from_zero, "the bias is what is left of start - theta_star."),
}


# --- 02.q5 the length that is safe ---------------------------------------------------------


def cases_q5(rng: np.random.Generator) -> list[tuple]:
    """With and without silent directions; few and many steps."""
    cases = []
    for n, d, steps in ((20, 6, 40), (20, 6, 150), (5, 8, 100)):
        cases.append((rng.normal(size=(n, d)), rng.normal(size=d), 0.05, steps))
    return cases


def safe_length(X, theta_star, lr, steps):
    eigenvalues, V = _spectrum(X)
    weights = (1 - lr * eigenvalues) ** (2 * steps)
    return float(np.sqrt(np.sum(weights * (V.T @ theta_star) ** 2) / weights.max()))


def _plain_length(X, theta_star, lr, steps):
    return float(np.linalg.norm(theta_star))


def _loudest(X, theta_star, lr, steps):
    eigenvalues, V = _spectrum(X)
    weights = (1 - lr * eigenvalues) ** (2 * steps)
    return float(np.sqrt(np.sum(weights * (V.T @ theta_star) ** 2) / weights.min()))


def _average_weight(X, theta_star, lr, steps):
    eigenvalues, V = _spectrum(X)
    weights = (1 - lr * eigenvalues) ** (2 * steps)
    return float(np.sqrt(np.sum(weights * (V.T @ theta_star) ** 2) / weights.mean()))


def _weights_not_squared(X, theta_star, lr, steps):
    eigenvalues, V = _spectrum(X)
    weights = (1 - lr * eigenvalues) ** steps
    return float(np.sqrt(np.sum(weights * (V.T @ theta_star) ** 2) / weights.max()))


MISTAKES_Q5: Mistakes = {
    "length of the truth": (
        _plain_length,
        "the lengths compare like this only when all directions have the same weight.",
    ),
    "worst case is the loudest direction": (
        _loudest,
        "an error in the loudest direction is repaired by the data. Which direction is worst?",
    ),
    "average weight": (
        _average_weight,
        "that holds on average over delta. The length must be safe for the worst delta.",
    ),
    "weights not squared": (_weights_not_squared, "the weight is (1 - f) squared: a squared bias."),
    "square of the length": (
        lambda X, theta_star, lr, steps: safe_length(X, theta_star, lr, steps) ** 2,
        "this is the square of the length.",
    ),
}


RUBRIC_Q6 = """\
4 points, one for each of these, in any words; half a point where the verdict is right and the
reason is missing.

1. Anna. Wrong about the direction: AdamW's decay pulls towards zero, not towards theta_0. And at
   this setting it does nothing: lr * weight_decay * steps = 1e-4 * 0.01 * 300 = 0.0003, so the
   weights keep 99.97 % of their size. Full credit needs the number or the rate lr * alpha.
2. What does keep them near theta_0 is that 300 steps are few (early stopping; under SGD like a
   penalty 1 / (lr * steps)). So Anna's run may well be good, for another reason than hers.
3. Ben. Right that L2-SP states the belief openly, and that it does not depend on when one stops;
   wrong that the strongest pull is the safest: the best alpha is sigma^2 / (n tau^2), it must fall
   as labels are added (1/n), and an alpha that is far too large keeps every error of theta_0.
4. Chen. "Far" is the wrong question: what counts is the error in directions of which the 60 images
   say little; with 25 million weights and 60 images almost all directions are silent, and there a
   start from scratch is wrong too. The experiment: scratch with the same augmentation and tuned
   steps, Anna's run, L2-SP with alpha over a few powers of ten; choice on validation images
   (split by patient); the test read once; several draws of the 60, paired, with an interval.
   The point needs either the argument about silent directions or a fair experiment, and no gross
   error in the other."""


QUESTIONS = [
    Question(
        id="02.q1",
        title="One step with a pull",
        points=1,
        cases=cases_q1,
        expected=sgd_step,
        hint=recognise(MISTAKES_Q1, "Write the gradient of the penalty on paper first."),
        wrong=wrong(MISTAKES_Q1),
    ),
    Question(
        id="02.q2",
        title="Adam with a pull, in two forms",
        points=3,
        cases=cases_q2,
        expected=adam_step,
        hint=recognise(
            MISTAKES_Q2,
            "Compare with the four formulas of lesson 02, section 5, one line at a time.",
        ),
        wrong=wrong(MISTAKES_Q2),
    ),
    Question(
        id="02.q3",
        title="L2-SP with a new head",
        points=3,
        cases=cases_q3,
        expected=l2sp_with_head,
        hint=recognise(
            MISTAKES_Q3,
            "Set the gradient to zero. The penalty's matrix is diagonal: alpha, ..., beta, ...",
        ),
        wrong=wrong(MISTAKES_Q3),
    ),
    Question(
        id="02.q4",
        title="The risk of stopping early",
        points=3,
        cases=cases_q4,
        expected=early_stopping_risk,
        hint=recognise(
            MISTAKES_Q4,
            "One direction at a time: bias (1 - f) times the start's error, variance "
            "f^2 sigma^2 / (n lambda), and no variance where lambda = 0.",
        ),
        wrong=wrong(MISTAKES_Q4),
    ),
    Question(
        id="02.q5",
        title="The length that is safe",
        points=3,
        cases=cases_q5,
        expected=safe_length,
        hint=recognise(
            MISTAKES_Q5,
            "For a given length, into which direction would an enemy put delta?",
        ),
        wrong=wrong(MISTAKES_Q5),
    ),
    Question(
        id="02.q6",
        title="Advise a hospital",
        points=4,
        manual=True,
        rubric=RUBRIC_Q6,
    ),
]
