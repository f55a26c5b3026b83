"""What frozen features know: cached features, linear probe, nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from threadpoolctl import threadpool_limits
from torch import nn

from tlcourse.evaluation import Interval, wilson_interval
from tlcourse.inference import Loader, call, inference, unpack

C_GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


@dataclass(frozen=True, eq=False)
class Features:
    """Features of N examples, computed once.

    Attributes:
        features: float array, shape (N, D).
        targets: int array, shape (N,), class numbers from 0.
    """

    features: np.ndarray
    targets: np.ndarray

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or self.targets.shape != (len(self.features),):
            raise ValueError(
                "need features (N, D) and targets (N,), "
                f"got {self.features.shape} and {self.targets.shape}"
            )
        if not np.issubdtype(self.targets.dtype, np.integer):
            raise ValueError(f"targets must be integers, got {self.targets.dtype}")
        if len(self.targets) == 0 or self.targets.min() < 0:
            raise ValueError("need at least one example and class numbers >= 0")
        if not np.isfinite(self.features).all():
            raise ValueError("features must be finite, got NaN or infinity among them")


@dataclass(frozen=True, eq=False)
class Probe:
    """A fitted linear probe, in the coordinates of the raw features.

    Attributes:
        accuracy: on the test features, in [0, 1].
        interval: Wilson 95 % interval of the accuracy.
        weight: float array, shape (K, D).
        bias: float array, shape (K,).
        C: the inverse strength of the L2 penalty that was chosen.
    """

    accuracy: float
    interval: Interval
    weight: np.ndarray
    bias: np.ndarray
    C: float

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Logits, shape (N, K), for raw features, shape (N, D)."""
        return features @ self.weight.T + self.bias

    def copy_to(self, head: nn.Linear) -> None:
        """Start a head where the probe ended: "probe, then fine-tune".

        Kumar et al. 2022, section 3, arXiv:2202.10054.

        Raises:
            ValueError: if the head has another shape than (K, D), or no bias.
        """
        if not isinstance(head, nn.Linear) or head.bias is None:
            raise ValueError(f"the head must be an nn.Linear with a bias, got {head}")
        if tuple(head.weight.shape) != self.weight.shape:
            raise ValueError(
                f"the head's weight must have shape {self.weight.shape}, "
                f"got {tuple(head.weight.shape)}"
            )
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(self.weight))
            head.bias.copy_(torch.from_numpy(self.bias))


def extract_features(backbone: nn.Module, loader: Loader) -> Features:
    """Run a backbone once over a loader and keep what it says.

    Evaluation mode, no gradients; afterwards each module is in the mode it was in.

    Args:
        backbone: maps inputs to features, shape (B, D).
        loader: see ``tlcourse.inference.Loader``; one that augments gives augmented features.

    Returns:
        float32 features, shape (N, D), and int64 targets, in the order of the loader.

    Raises:
        ValueError: if the loader is empty or the output is not (B, D).
    """
    features, targets = [], []
    with inference(backbone):
        for batch in loader:
            inputs, labels = unpack(batch)
            output = call(backbone, inputs)
            if not isinstance(output, torch.Tensor) or output.ndim != 2:
                got = getattr(output, "shape", type(output).__name__)
                raise ValueError(f"the backbone must give features of shape (B, D), got {got}")
            features.append(output.float().cpu())
            targets.append(labels.cpu())
    if not features:
        raise ValueError("the loader is empty: it gave no batch to take features from")
    return Features(torch.cat(features).numpy(), torch.cat(targets).numpy())


def linear_probe(
    train: Features,
    test: Features,
    val: Features | None = None,
    c_grid: Sequence[float] = C_GRID,
) -> Probe:
    """Multinomial logistic regression on frozen features.

    Features are standardised with the mean and deviation of the training examples; the result
    is mapped back to raw coordinates. The penalty is chosen by accuracy (ties: by loss) on
    ``val``, without it by stratified cross-validation on ``train`` if every class has at least
    3 examples there, else it is 1. ``test`` is read once, at the end.

    Args:
        train: features, shape (N, D), of all K classes 0..K-1.
        test: features of the same width.
        val: likewise, or None.
        c_grid: values of C to choose from, each > 0.

    Raises:
        ValueError: if widths differ, a class has no training example, or a C is not > 0.
    """
    _check_same_space(train, *(part for part in (test, val) if part is not None))
    grid = tuple(float(c) for c in c_grid)
    if not grid or min(grid) <= 0:
        raise ValueError(f"c_grid must hold numbers > 0, got {grid}")
    if len(grid) == 1:
        best = grid[0]
    elif val is not None:
        best = max(zip(_goodness(train, val, grid), grid, strict=True))[1]
    else:
        best = _cross_validated(train, grid)
    weight, bias = _fit(train, (best,))[0]
    hits = (test.features @ weight.T + bias).argmax(axis=1) == test.targets
    interval = wilson_interval(int(hits.sum()), len(hits))
    return Probe(interval.mean, interval, weight, bias, best)


def knn(train: Features, test: Features, k: int = 5) -> float:
    """Accuracy of a vote among the k training examples with the highest cosine similarity.

    Equal votes go to the smaller class number.

    Args:
        train: features, shape (N, D).
        test: features, shape (M, D).
        k: in 1..N.
    """
    _check_same_space(train, test, all_classes=False)
    if not 1 <= k <= len(train.targets):
        raise ValueError(f"k must be in 1..{len(train.targets)} (training examples), got {k}")
    keys, queries = _unit_rows(train.features), _unit_rows(test.features)
    one_hot = np.eye(train.targets.max() + 1)[train.targets]
    correct = 0
    for start in range(0, len(queries), 1024):
        similarity = queries[start : start + 1024] @ keys.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        votes = one_hot[nearest].sum(axis=1)
        correct += int((votes.argmax(axis=1) == test.targets[start : start + 1024]).sum())
    return correct / len(queries)


def _fit(train: Features, grid: Sequence[float]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weight (K, D) and bias (K,) in raw coordinates, for each C of the grid."""
    raw = train.features.astype(np.float64)
    mean, scale = raw.mean(axis=0), raw.std(axis=0)
    scale[scale <= 1e-9 * np.abs(raw).max(axis=0)] = 1.0  # constant features
    standard, basis = (raw - mean) / scale, None
    # With an L2 penalty the optimum lies in the span of the examples: with fewer examples than
    # features, the same problem has a smaller, exact form there.
    if len(raw) < raw.shape[1]:
        basis = np.linalg.svd(standard, full_matrices=False)[2]
        standard = standard @ basis.T
    fits = []
    for C in grid:
        # Matrices this small are solved faster by one thread than by two that wait for each other.
        with threadpool_limits(1, user_api="blas"):
            solver = LogisticRegression(C=C, max_iter=5000, tol=1e-6)
            solver.fit(standard, train.targets)
        weight, bias = solver.coef_, solver.intercept_
        if len(bias) == 1:  # two classes: sigmoid(z) is softmax(-z/2, z/2)
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        weight = (weight if basis is None else weight @ basis) / scale
        fits.append((weight, bias - weight @ mean))
    return fits


def _goodness(
    train: Features, held_out: Features, grid: Sequence[float]
) -> list[tuple[float, float]]:
    """For each C: accuracy and mean log-likelihood on held-out examples, to compare in order."""
    found = []
    for weight, bias in _fit(train, grid):
        logits = held_out.features @ weight.T + bias
        log_likelihood = logits[np.arange(len(logits)), held_out.targets] - logsumexp(
            logits, axis=1
        )
        accuracy = (logits.argmax(axis=1) == held_out.targets).mean()
        found.append((float(accuracy), float(log_likelihood.mean())))
    return found


def _cross_validated(train: Features, grid: tuple[float, ...]) -> float:
    folds = min(5, int(np.bincount(train.targets).min()))
    if folds < 3:
        return 1.0
    splitter = StratifiedKFold(n_splits=folds, shuffle=True, random_state=0)
    per_fold = [
        _goodness(_rows(train, kept), _rows(train, held_out), grid)
        for kept, held_out in splitter.split(train.features, train.targets)
    ]
    means = [tuple(pair) for pair in np.mean(per_fold, axis=0)]
    return max(zip(means, grid, strict=True))[1]


def _rows(part: Features, rows: np.ndarray) -> Features:
    return Features(part.features[rows], part.targets[rows])


def _unit_rows(features: np.ndarray) -> np.ndarray:
    rows = features.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _check_same_space(train: Features, *others: Features, all_classes: bool = True) -> None:
    for other in others:
        if other.features.shape[1] != train.features.shape[1]:
            raise ValueError(
                f"all features must have the {train.features.shape[1]} columns of train, "
                f"got {other.features.shape[1]}"
            )
    num_classes = 1 + max(int(part.targets.max()) for part in (train, *others))
    missing = sorted(set(range(num_classes)) - set(train.targets.tolist()))
    if all_classes and (missing or num_classes < 2):
        raise ValueError(
            f"train must hold examples of at least two classes and of each of 0..{num_classes - 1}"
            + (f", none of class {missing[0]}" if missing else "")
        )
