"""How well will a source transfer? Scores that need one forward pass and no training.

All take float arrays on the CPU: features, shape (N, D), or source probabilities, shape (N, Z),
of N labelled target examples, and their targets, shape (N,), int in [0, K).
"""

from __future__ import annotations

import math

import numpy as np
from scipy.linalg import pinvh, svd


def leep(source_probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Log expected empirical prediction: how well the source's own labels predict the target's.

    Nguyen, Hassner, Seeger, Archambeau 2020, section 3, arXiv:2002.12462. The mean
    log-likelihood of the target labels under ``sum_z P(y | z) p(z | x)``, where P(y | z) is
    counted on the same examples.

    Args:
        source_probabilities: what the source's head says of each target example, shape (N, Z),
            rows sum to 1.
        targets: shape (N,).

    Returns:
        In nats, at most 0; higher is better.

    Raises:
        ValueError: if lengths differ or a row is no distribution.
    """
    probabilities, targets = _checked(source_probabilities, targets, "source_probabilities")
    sums = probabilities.sum(axis=1)
    if probabilities.min() < 0 or not np.allclose(sums, 1, atol=1e-4):
        worst = float(sums[np.abs(sums - 1).argmax()])
        raise ValueError(f"rows of source_probabilities must sum to 1 and be >= 0, got {worst}")
    joint = _one_hot(targets).T @ probabilities / len(targets)  # P(y, z), shape (K, Z)
    given_source = joint / np.maximum(joint.sum(axis=0), 1e-300)  # P(y | z)
    expected = (probabilities * given_source[targets]).sum(axis=1)  # (N,)
    return float(np.log(expected).mean())


def log_me(features: np.ndarray, targets: np.ndarray) -> float:
    """Logarithm of the maximum evidence of a linear model on the features, per example.

    You, Liu, Wang, Long 2021, section 4, arXiv:2102.11005: one Bayesian linear regression from
    the features to the indicator of each class; prior precision and noise precision are those
    that maximise the evidence; mean over the classes.

    Args:
        features: shape (N, D).
        targets: shape (N,).

    Returns:
        In nats per example; higher is better.

    Raises:
        ValueError: if lengths differ.
    """
    features, targets = _checked(features, targets, "features")
    u, s, _ = svd(features, full_matrices=False)
    one_hot = _one_hot(targets)
    columns = one_hot[:, one_hot.any(axis=0)].T  # classes that occur
    evidence = [_max_evidence(u, s, column, features.shape[1]) for column in columns]
    return float(np.mean(evidence))


def h_score(features: np.ndarray, targets: np.ndarray, shrinkage: bool = False) -> float:
    """Share of the features' variation that lies between the classes, summed over directions.

    Bao et al. 2019, definition 2 (ICIP): ``trace(cov(f)^+ cov(E[f | y]))``, between 0 and
    K - 1. With fewer examples than features it is large for any features; ``shrinkage`` takes
    the Ledoit-Wolf covariance and scales the class means likewise (Ibrahim, Ponomareva, Mazumder
    2021, equation 5, arXiv:2110.06893).

    Args:
        features: shape (N, D).
        targets: shape (N,).
        shrinkage: whether to regularise the covariance.

    Raises:
        ValueError: if lengths differ.
    """
    features, targets = _checked(features, targets, "features")
    centred = features - features.mean(axis=0)
    one_hot = _one_hot(targets)
    counts = np.maximum(one_hot.sum(axis=0), 1)
    class_means = (one_hot.T @ centred / counts[:, None])[targets]  # (N, D)
    between = class_means.T @ class_means / len(targets)
    if not shrinkage:
        total = centred.T @ centred / len(targets)
        return float(np.trace(pinvh(total, rtol=1e-10) @ between))
    from sklearn.covariance import ledoit_wolf

    total, amount = ledoit_wolf(centred, assume_centered=True)
    return float((1 - amount) * np.trace(pinvh(total) @ between))


def neighbour_score(features: np.ndarray, targets: np.ndarray, k: int = 5) -> float:
    """Leave-one-out accuracy of a vote among each example's k nearest other examples.

    Nearest by cosine similarity; equal votes go to the smaller class number (as in ``tl.knn``).
    The cheapest score that needs neither the source's head nor a model.

    Args:
        features: shape (N, D).
        targets: shape (N,).
        k: in 1..N-1.

    Returns:
        In [0, 1]; higher is better. With balanced classes, blind features score a little below
        1/K, as leaving an example out makes its own class the scarcest.

    Raises:
        ValueError: if lengths differ, or k is out of range.
    """
    features, targets = _checked(features, targets, "features")
    if not 1 <= k < len(targets):
        raise ValueError(f"k must be in 1..{len(targets) - 1} (other examples), got {k}")
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    directions = features / np.maximum(lengths, 1e-12)
    similarity = directions @ directions.T
    np.fill_diagonal(similarity, -np.inf)  # nobody is their own neighbour
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    votes = _one_hot(targets)[nearest].sum(axis=1)  # (N, K)
    return float((votes.argmax(axis=1) == targets).mean())


def cka(x: np.ndarray, y: np.ndarray, debiased: bool = True) -> float:
    """Linear centred kernel alignment of two descriptions of the same examples.

    Kornblith, Norouzi, Lee, Hinton 2019, section 3, arXiv:1905.00414. 1 for descriptions that
    differ by a rotation and a scale; about 0 for unrelated ones. The plain estimate is too high
    when features outnumber examples; ``debiased`` uses the unbiased estimate of HSIC (Song et
    al. 2012, equation 5; Nguyen, Raghu, Kornblith 2021, section 3, arXiv:2010.15327), which may
    be slightly negative.

    Args:
        x: shape (N, D1), N >= 4.
        y: shape (N, D2), the same examples in the same order.

    Raises:
        ValueError: if lengths differ, or there are fewer than 4 examples.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 4:
        raise ValueError(
            f"x and y must have shapes (N, D1) and (N, D2) with N >= 4, got {x.shape} and {y.shape}"
        )
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    if not debiased:
        cross = np.square(x.T @ y).sum()
        return float(cross / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))
    k, m = x @ x.T, y @ y.T
    return float(_hsic(k, m) / math.sqrt(_hsic(k, k) * _hsic(m, m)))


def _hsic(k: np.ndarray, m: np.ndarray) -> float:
    """Unbiased estimate of HSIC, up to a factor that cancels in CKA. k, m: shape (N, N)."""
    n = len(k)
    k, m = k.copy(), m.copy()
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    rows_k, rows_m = k.sum(axis=0), m.sum(axis=0)
    return float(
        (k * m).sum()
        + rows_k.sum() * rows_m.sum() / ((n - 1) * (n - 2))
        - 2 * rows_k @ rows_m / (n - 2)
    )


def _max_evidence(u: np.ndarray, s: np.ndarray, y: np.ndarray, dim: int) -> float:
    """Evidence per example, maximised over the precisions by MacKay's fixed point.

    Args:
        u, s: left singular vectors, shape (N, r), and singular values, shape (r,), of the features.
        y: shape (N,).
        dim: number of features, D.
    """
    n = len(y)
    projected = u.T @ y
    outside = max(float(y @ y - projected @ projected), 0.0)  # what no weights can explain
    alpha, beta = 1.0, 1.0  # precision of the weights' prior, and of the noise
    for _ in range(100):
        ratio = alpha / beta
        shrunk = s / (s * s + ratio)
        mean_square = float(((shrunk * projected) ** 2).sum())  # |m|^2
        residual = float(((ratio / (s * s + ratio) * projected) ** 2).sum()) + outside
        gamma = float((s * s / (s * s + ratio)).sum())  # number of well-determined weights
        alpha, beta = gamma / max(mean_square, 1e-12), (n - gamma) / max(residual, 1e-12)
        if abs(alpha / beta / ratio - 1) < 1e-6:
            break
    ratio = alpha / beta
    mean_square = float(((s / (s * s + ratio) * projected) ** 2).sum())
    residual = float(((ratio / (s * s + ratio) * projected) ** 2).sum()) + outside
    log_det = float(np.log(alpha + beta * s * s).sum()) + (dim - len(s)) * math.log(alpha)
    evidence = (
        n * math.log(beta) + dim * math.log(alpha) - n * math.log(2 * math.pi)
        - beta * residual - alpha * mean_square - log_det
    ) / 2  # fmt: skip
    return evidence / n


def _one_hot(targets: np.ndarray) -> np.ndarray:
    return np.eye(int(targets.max()) + 1)[targets]


def _checked(values: np.ndarray, targets: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    values, targets = np.asarray(values, np.float64), np.asarray(targets)
    if values.ndim != 2 or targets.shape != (len(values),) or len(values) == 0:
        raise ValueError(
            f"{name} must have shape (N, D) and targets shape (N,), "
            f"got {values.shape} and {targets.shape}"
        )
    if not np.issubdtype(targets.dtype, np.integer) or targets.min() < 0:
        raise ValueError(f"targets must be class numbers >= 0, got {targets.dtype}")
    return values, targets
