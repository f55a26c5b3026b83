"""Graded questions of lesson 10: LEEP, H-score, evidence, tau with ties, a choice on a budget."""

from __future__ import annotations

import numpy as np

from tlcourse.checks import Question


def near(a: object, b: float) -> bool:
    return isinstance(a, float) and bool(np.isclose(a, b, rtol=1e-6, atol=1e-8))


def _labels(rng: np.random.Generator, n: int, num_classes: int) -> np.ndarray:
    """Every class occurs, in random order."""
    return rng.permutation(np.concatenate([np.arange(num_classes)] * n)[:n])


# --- 10.q1 LEEP ----------------------------------------------------------------------------


def cases_q1(rng: np.random.Generator) -> list[tuple]:
    """As many words as classes, many words, and a word that nobody uses."""
    few = rng.dirichlet(np.ones(3), size=12)
    many = rng.dirichlet(np.full(20, 0.3), size=9)
    unused = rng.dirichlet(np.ones(5), size=10) * [1, 1, 1, 0, 1]
    unused /= unused.sum(axis=1, keepdims=True)
    counts = (3, 4, 2)
    return [(P, _labels(rng, len(P), k)) for P, k in zip((few, many, unused), counts, strict=True)]


def _dictionary(P: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P(y, z) times n, shape (K, Z), and P(y | z)."""
    joint = np.eye(y.max() + 1)[y].T @ P
    word = joint.sum(axis=0)
    return joint, joint / np.where(word > 0, word, 1)


def leep(probabilities: np.ndarray, targets: np.ndarray) -> float:
    given = _dictionary(probabilities, targets)[1]
    return float(np.mean(np.log((given[targets] * probabilities).sum(axis=1))))


def _leep_joint(P, y):
    """Translates with P(y, z) instead of P(y | z)."""
    return float(np.mean(np.log((_dictionary(P, y)[0][y] / len(y) * P).sum(axis=1))))


def _leep_wrong_condition(P, y):
    """P(z | y): divides by the rows."""
    joint = _dictionary(P, y)[0]
    given = joint / joint.sum(axis=1, keepdims=True)
    return float(np.mean(np.log((given[y] * P).sum(axis=1))))


def _leep_by_word(P, y):
    """The NCE-like short cut: only the likeliest word of each image."""
    given = _dictionary(P, y)[1]
    return float(np.mean(np.log(given[y, P.argmax(axis=1)] + 1e-12)))


def _leep_log_inside(P, y):
    """Mean of log P(y | z) under p(z | x): Jensen's lower bound."""
    given = _dictionary(P, y)[1]
    return float(np.mean((np.log(np.where(P > 0, given[y], 1)) * P).sum(axis=1)))


def _leep_log_of_mean(P, y):
    given = _dictionary(P, y)[1]
    return float(np.log((given[y] * P).sum(axis=1).mean()))


def _leep_naive(P, y):
    joint = _dictionary(P, y)[0]
    with np.errstate(all="ignore"):
        given = joint / joint.sum(axis=0)
        return float(np.mean(np.log((given[y] * P).sum(axis=1))))


def hint_q1(case: tuple, expected: float, got: object) -> str:
    P, y = case
    if not isinstance(got, float):
        return "return one number, the mean over the images."
    if not np.isfinite(got):
        return "a source class that no image uses gave 0/0: let its P(y | z) be 0."
    if near(got, expected * len(y)):
        return "that is the sum over the images; the question asks for the mean."
    if near(got, -expected):
        return "the sign: LEEP is a log-likelihood, at most 0."
    if near(got, _leep_joint(P, y)):
        return "you translated with P(y, z). Divide each column by its sum, P(z)."
    if near(got, _leep_wrong_condition(P, y)):
        return "that is P(z | y). The dictionary goes from word to label: divide each column."
    if near(got, _leep_log_inside(P, y)):
        return "first the sum over z, then the logarithm: this is Jensen's lower bound."
    if near(got, _leep_log_of_mean(P, y)):
        return "the logarithm comes before the mean over the images."
    return "P(y, z): sum the rows p(. | x_i) of each label; divide each column by its sum."


# --- 10.q2 H-score -------------------------------------------------------------------------


def cases_q2(rng: np.random.Generator) -> list[tuple]:
    """Features off centre, of unlike scales; one case with unequal classes."""
    cases = []
    for n, D, k in ((12, 1, 2), (30, 3, 3), (40, 6, 4)):
        y = _labels(rng, n, k)
        if k == 4:
            y = np.concatenate([y, np.zeros(15, dtype=y.dtype)])
        mixing = rng.normal(size=(D, D)) + 2 * np.eye(D)
        F = (rng.normal(size=(len(y), D)) + rng.normal(size=(k, D))[y]) @ mixing + 5
        cases.append((F, y))
    return cases


def h_score(features: np.ndarray, targets: np.ndarray) -> float:
    centred = features - features.mean(axis=0)
    by_class = _class_means(centred, targets)[targets]
    return float(np.trace(np.linalg.solve(centred.T @ centred, by_class.T @ by_class)))


def _class_means(F: np.ndarray, y: np.ndarray) -> np.ndarray:
    one_hot = np.eye(y.max() + 1)[y]
    return one_hot.T @ F / one_hot.sum(axis=0)[:, None]


def _h_not_centred(F, y):
    by_class = _class_means(F, y)[y]
    return float(np.trace(np.linalg.solve(F.T @ F, by_class.T @ by_class)))


def _h_traces(F, y):
    """Ratio of the traces: no whitening."""
    F = F - F.mean(axis=0)
    by_class = _class_means(F, y)[y]
    ratio = np.trace(by_class.T @ by_class) / np.trace(F.T @ F)
    return float(ratio * F.shape[1]) + 1e-3 * (F.shape[1] == 1)


def _h_within(F, y):
    """Fisher's ratio: divides by the scatter within the classes."""
    F = F - F.mean(axis=0)
    by_class = _class_means(F, y)[y]
    within = (F - by_class).T @ (F - by_class)
    return float(np.trace(np.linalg.solve(within, by_class.T @ by_class)))


def _h_each_class_once(F, y):
    """Covariance of the K means, as if all classes were equally large."""
    F = F - F.mean(axis=0)
    means = _class_means(F, y)
    between = means.T @ means / len(means)
    return float(np.trace(np.linalg.solve(F.T @ F / len(F), between)))


def _h_swapped(F, y):
    F = F - F.mean(axis=0)
    by_class = _class_means(F, y)[y]
    return float(np.trace(np.linalg.pinv(by_class.T @ by_class) @ (F.T @ F)))


def hint_q2(case: tuple, expected: float, got: object) -> str:
    F, y = case
    if not isinstance(got, float):
        return "return one number."
    if near(got, _h_not_centred(F, y)):
        return "subtract the mean of all images first: these are covariances."
    if near(got, _h_within(F, y)):
        return "that is Fisher's ratio. Divide by the whole covariance, not by that within classes."
    if near(got, _h_each_class_once(F, y)):
        return "a class with more images counts more: average over images, not over classes."
    if near(got, expected * len(y)) or near(got, expected / len(y)):
        return "both covariances are divided by n, so n must cancel."
    if got > y.max() + 1e-6:
        return "H is at most K - 1. Is it the inverse of the *whole* covariance?"
    return "trace of inv(cov of the features) times (cov of the features replaced by class means)."


# --- 10.q3 evidence ------------------------------------------------------------------------


def cases_q3(rng: np.random.Generator) -> list[tuple]:
    """One feature, fewer and more features than images, and alike precisions once only."""
    cases = []
    for n, D, alpha, beta in ((2, 1, 1.0, 1.0), (8, 3, 0.5, 4.0), (6, 10, 3.0, 0.7)):
        F = rng.normal(size=(n, D))
        cases.append((F, F[:, 0] + rng.normal(size=n), alpha, beta))
    return cases


def log_evidence(F: np.ndarray, t: np.ndarray, alpha: float, beta: float) -> float:
    return _evidence(F, t, alpha, beta)


def _evidence(F, t, alpha, beta, constant=1.0, prior=1.0, det=1.0, width=1.0):
    """The evidence with each of its parts multiplied by a factor."""
    n, D = F.shape
    A = alpha * np.eye(D) + beta * F.T @ F
    m = beta * np.linalg.solve(A, F.T @ t)
    fit = n * np.log(beta) - constant * n * np.log(2 * np.pi) - beta * np.sum((t - F @ m) ** 2)
    price = prior * alpha * m @ m - width * D * np.log(alpha) + det * np.linalg.slogdet(A)[1]
    return float((fit - price) / 2)


def _at_the_best_weights(F, t, alpha, beta):
    """The likelihood of the posterior mean: nothing integrated out."""
    n = len(t)
    m = np.linalg.solve(alpha / beta * np.eye(F.shape[1]) + F.T @ F, F.T @ t)
    return float(n / 2 * np.log(beta / (2 * np.pi)) - beta / 2 * np.sum((t - F @ m) ** 2))


def _variances(F, t, alpha, beta):
    return _evidence(F, t, 1 / alpha, 1 / beta)


def hint_q3(case: tuple, expected: float, got: object) -> str:
    F, t, alpha, beta = case
    n = len(t)
    if not isinstance(got, float):
        return "return one number."
    if not np.isfinite(got):
        return "a logarithm of something negative or infinite: use np.linalg.slogdet(A)[1]."
    if near(got, _at_the_best_weights(F, t, alpha, beta)):
        return "that is the fit alone, at the best weights. The price is missing."
    if near(got, expected / n):
        return "for all examples together, not per example."
    if near(got, _evidence(F, t, alpha, beta, constant=0)):
        return "-n/2 log(2 pi) is missing."
    if near(got, _evidence(F, t, alpha, beta, det=0)):
        return "-1/2 log|A| is missing: the integral over w."
    if near(got, _evidence(F, t, alpha, beta, prior=0)):
        return "-alpha/2 |m|^2 is missing: E has two terms."
    if near(got, _variances(F, t, alpha, beta)) and not near(alpha, 1.0):
        return "alpha and beta are precisions, one over a variance."
    return "t is Gaussian with mean 0 and covariance F F^T / alpha + I / beta: compare with that."


# --- 10.q4 tau with ties -------------------------------------------------------------------


def cases_q4(rng: np.random.Generator) -> list[tuple]:
    """No ties, ties in either list, ties in both, and a list that is all ties."""
    whole = [rng.permutation(9).astype(float) for _ in range(5)]
    coarse = [np.floor(array / 2) for array in whole[:3]]
    return [
        (whole[0], whole[1]),
        (coarse[0], whole[2]),
        (whole[3], coarse[1]),
        (coarse[2], np.floor(whole[4] / 3)),
        (np.full(9, float(rng.integers(2, 9))), whole[4]),
        (whole[0] + whole[1] / 10, whole[0]),
    ]


def tau_b(scores: np.ndarray, outcomes: np.ndarray) -> float:
    by_score = np.sign(scores[:, None] - scores)
    by_outcome = np.sign(outcomes[:, None] - outcomes)
    ordered = np.abs(by_score).sum() * np.abs(by_outcome).sum()
    return float("nan") if ordered == 0 else float((by_score * by_outcome).sum() / ordered**0.5)


def _tau_a(x, z):
    """Ties stay in the denominator."""
    agree = np.sign(x[:, None] - x) * np.sign(z[:, None] - z)
    return float("nan") if np.ptp(x) == 0 else float(agree.sum() / (len(x) * (len(x) - 1)))


def _tau_gamma(x, z):
    """Pairs that are tied in either list are thrown away."""
    agree = np.sign(x[:, None] - x) * np.sign(z[:, None] - z)
    counted = np.abs(agree).sum()
    return float("nan") if counted == 0 else float(agree.sum() / counted)


def _tau_zero(x, z):
    value = tau_b(x, z)
    return 0.0 if np.isnan(value) else value


def _tau_ties_agree(x, z):
    """A tie counts as agreement: x_i >= x_j."""
    above = np.triu_indices(len(x), 1)
    same = (x[:, None] >= x) == (z[:, None] >= z)
    return float(2 * same[above].mean() - 1)


def _spearman(x, z):
    def ranks(v):
        return (v[:, None] > v).sum(axis=1) + ((v[:, None] == v).sum(axis=1) - 1) / 2

    if np.ptp(x) == 0:
        return float("nan")
    return float(np.corrcoef(ranks(x), ranks(z))[0, 1])


def hint_q4(case: tuple, expected: float, got: object) -> str:
    x, z = case
    if not isinstance(got, float):
        return "return one number (np.nan is one)."
    if np.isnan(expected):
        return "all scores are equal here: they order nothing, so return nan."
    if np.isnan(got):
        return "nan only if *all* scores or all outcomes are equal."
    if near(got, _tau_a(x, z)):
        return "right without ties. With them, divide by sqrt(N_x N_z), not by all pairs."
    if near(got, _tau_gamma(x, z)):
        return "N_x counts the pairs not tied in x, even if they are tied in z."
    if near(got, -expected):
        return "the sign: +1 for a pair that both lists order alike."
    return "sgn(x_i - x_j) sgn(z_i - z_j) summed over pairs, over sqrt(N_x N_z)."


# --- 10.q5 a source on a budget ------------------------------------------------------------


def cases_q5(rng: np.random.Generator) -> list[tuple]:
    """A near tie that is won by price; paired noise; the best too dear; nothing to spend."""
    together = rng.normal(0, 0.05, size=6)  # how hard each draw is, for all sources
    own = rng.normal(0, 0.004, size=(5, 6))
    own -= own.mean(axis=1, keepdims=True)
    level = np.array([0.50, 0.80, 0.801, 0.83, 0.79])
    accuracy = level[:, None] + together + own
    costs = np.array([0.0, 30.0, 80.0, 200.0, 10.0])
    # Apart by 0.02, give or take 0.01 in a draw, while the draws themselves differ by 0.1.
    paired = np.array([0.60, 0.70, 0.72])[:, None] + 0.1 * _spread(rng, 1, 6)
    paired[2] += 0.01 * _spread(rng, 1, 6)[0]
    noisy = np.array([0.40, 0.69, 0.71, 0.70])[:, None] + 0.06 * _spread(rng, 4, 6)
    return [
        (accuracy, costs, 100.0, 2.57),
        (accuracy, costs, 500.0, 2.57),
        (paired, np.array([0.0, 5.0, 50.0]), 50.0, 2.57),
        (noisy, np.array([0.0, 20.0, 60.0, 20.0]), 60.0, 2.57),
        (accuracy, costs, 0.0, 2.57),
        (accuracy[::-1][[4, 0, 1, 2, 3]], np.array([0.0, 100.0, 40.0, 7.0, 9.0]), 20.0, 2.57),
    ]


def _spread(rng: np.random.Generator, rows: int, draws: int) -> np.ndarray:
    """Noise of mean 0 in each row, with a deviation of 1."""
    noise = rng.normal(size=(rows, draws))
    noise -= noise.mean(axis=1, keepdims=True)
    return noise / noise.std(axis=1, ddof=1, keepdims=True)


def choose_source(
    accuracy: np.ndarray, costs: np.ndarray, budget: float, t: float, paired: bool = True
) -> int:
    affordable = np.flatnonzero(costs <= budget)
    means = accuracy.mean(axis=1)
    best = affordable[means[affordable].argmax()]
    shortfall = accuracy[best] - accuracy[affordable]
    spread = shortfall.std(axis=1, ddof=1)
    if not paired:
        own = accuracy.std(axis=1, ddof=1)
        spread = np.sqrt(own[best] ** 2 + own[affordable] ** 2)
    half = t * spread / np.sqrt(accuracy.shape[1])
    close = affordable[(shortfall.mean(axis=1) <= half) | (affordable == best)]
    return int(min(close, key=lambda source: (costs[source], -means[source])))


def _highest_mean(accuracy, costs, budget, t):
    affordable = np.flatnonzero(costs <= budget)
    return int(affordable[accuracy.mean(axis=1)[affordable].argmax()])


def _ignores_budget(accuracy, costs, budget, t):
    return choose_source(accuracy, costs, float(costs.max()), t)


def _best_of_all_first(accuracy, costs, budget, t):
    """Compares with the best source even if that is too dear."""
    means = accuracy.mean(axis=1)
    shortfall = accuracy[means.argmax()] - accuracy
    half = t * shortfall.std(axis=1, ddof=1) / np.sqrt(accuracy.shape[1])
    close = [i for i in range(len(costs)) if shortfall[i].mean() <= half[i] and costs[i] <= budget]
    return int(min(close, key=lambda i: costs[i])) if close else 0


def _no_root(accuracy, costs, budget, t):
    return choose_source(accuracy, costs, budget, t * np.sqrt(accuracy.shape[1]))


def _highest_of_the_close(accuracy, costs, budget, t):
    """Takes the cheapest affordable source whatever its accuracy."""
    return int(np.flatnonzero(costs <= budget)[costs[costs <= budget].argmin()])


def _first_of_the_cheap(accuracy, costs, budget, t):
    """Of equally cheap ones, the lower mean."""
    best = choose_source(accuracy, costs, budget, t)
    twins = np.flatnonzero(costs == costs[best])
    return int(min(twins, key=lambda source: accuracy[source].mean()))


def hint_q5(case: tuple, expected: int, got: object) -> str:
    accuracy, costs, budget, t = case
    if not isinstance(got, int) or not 0 <= got < len(costs):
        return f"return one whole number from 0 to {len(costs) - 1}."
    if costs[got] > budget:
        return f"source {got} costs {costs[got]:g}, and the budget is {budget:g}."
    if got == _highest_mean(accuracy, costs, budget, t):
        return "the highest mean; but a cheaper source cannot be told from it on these draws."
    if got == choose_source(accuracy, costs, budget, t, paired=False):
        return "pair the draws: the deviation is that of the differences, draw by draw."
    if got == _no_root(accuracy, costs, budget, t):
        return "the half width is t s / sqrt(m)."
    if costs[got] == costs[expected]:
        return "of equally cheap ones take the one with the higher mean."
    return (
        "best affordable mean first; then the cheapest whose paired shortfall is <= t s / sqrt(m)."
    )


# --- 10.q6 judgement -----------------------------------------------------------------------

RUBRIC = """\
4 points; 1 for each, half marks allowed.
1. Not shown, and why: the runs differ in more than the start (fixed rate against a tuned one), the
   rate of scratch was chosen on the test set, and there is one draw and no interval. At least two
   of these three.
2. What a fair comparison needs: same steps, same grid of rates for both, chosen on validation,
   five or more paired draws, an interval of the difference, test read once.
3. The scores: source accuracy compares tasks (and may be memory); H-score 9 = K - 1 with fewer
   images than features says nothing; LEEP favours many source classes when labels are few (shuffled
   labels or leaving out would show it). At least two of the three with the reason.
4. Cause and remedy: looks layer by layer (neighbours or probe against a random network, or
   re-initialising layers one at a time) AND names a remedy that fits (renew the upper layers, larger
   rate, more steps, shrink and perturb). Full marks also require not deleting A on this evidence.
"""

QUESTIONS = [
    Question(
        id="10.q1",
        title="LEEP",
        points=3,
        cases=cases_q1,
        expected=leep,
        hint=hint_q1,
        wrong={
            "joint instead of conditional": _leep_joint,
            "conditional the wrong way round": _leep_wrong_condition,
            "likeliest word only": _leep_by_word,
            "logarithm inside": _leep_log_inside,
            "logarithm of the mean": _leep_log_of_mean,
            "0/0 for an unused word": _leep_naive,
            "sum": lambda P, y: leep(P, y) * len(y),
            "sign": lambda P, y: -leep(P, y),
        },
    ),
    Question(
        id="10.q2",
        title="H-score",
        points=3,
        cases=cases_q2,
        expected=h_score,
        hint=hint_q2,
        wrong={
            "not centred": _h_not_centred,
            "ratio of traces": _h_traces,
            "within the classes": _h_within,
            "classes equally large": _h_each_class_once,
            "the inverse of the wrong one": _h_swapped,
            "divided by n once": lambda F, y: h_score(F, y) / len(y),
        },
    ),
    Question(
        id="10.q3",
        title="The evidence of a linear model",
        points=4,
        cases=cases_q3,
        expected=log_evidence,
        hint=hint_q3,
        wrong={
            "fit only": _at_the_best_weights,
            "no log 2 pi": lambda *case: _evidence(*case, constant=0),
            "no determinant": lambda *case: _evidence(*case, det=0),
            "no prior term": lambda *case: _evidence(*case, prior=0),
            "no D log alpha": lambda *case: _evidence(*case, width=0),
            "whole determinant": lambda *case: _evidence(*case, det=2),
            "variances": _variances,
            "per example": lambda *case: _evidence(*case) / len(case[1]),
        },
    ),
    Question(
        id="10.q4",
        title="Agreement of two orders, with ties",
        points=3,
        cases=cases_q4,
        expected=tau_b,
        hint=hint_q4,
        wrong={
            "ties in the denominator": _tau_a,
            "tied pairs thrown away": _tau_gamma,
            "0 for all ties": _tau_zero,
            "ties agree": _tau_ties_agree,
            "Spearman": _spearman,
            "sign": lambda x, z: -tau_b(x, z),
        },
    ),
    Question(
        id="10.q5",
        title="The best source that you can pay for",
        points=3,
        cases=cases_q5,
        expected=choose_source,
        hint=hint_q5,
        wrong={
            "highest mean": _highest_mean,
            "no budget": _ignores_budget,
            "best of all, even if too dear": _best_of_all_first,
            "unpaired": lambda *case: choose_source(*case, paired=False),
            "deviation instead of error": _no_root,
            "cheapest of all": _highest_of_the_close,
            "lower mean of the cheap": _first_of_the_cheap,
        },
    ),
    Question(
        id="10.q6",
        title="Judgement: a report of negative transfer",
        points=4,
        manual=True,
        rubric=RUBRIC,
    ),
]
