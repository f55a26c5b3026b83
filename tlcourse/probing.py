"""What frozen features know: cached features, linear probes, nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from threadpoolctl import threadpool_limits
from torch import nn

from tlcourse.evaluation import Interval, wilson_interval
from tlcourse.inference import Loader, call, device_of, inference, unpack
from tlcourse.layers import Pooling, all_activations, pool

C_GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
RIDGE_GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


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

    def take(self, rows: np.ndarray) -> Features:
        """The examples at ``rows`` (int indices, or a boolean mask), in that order."""
        return Features(self.features[rows], self.targets[rows])


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


def extract_layers(
    network: nn.Module,
    loader: Loader,
    layers: Sequence[str],
    poolings: Sequence[Pooling] = ("mean",),
) -> dict[tuple[str, str], Features]:
    """``extract_features`` at several layers, from one forward pass of each batch.

    Args:
        network: as in ``tlcourse.layers.LayerFeatures``.
        loader: see ``tlcourse.inference.Loader``; its inputs are tensors.
        layers: for example ``tlcourse.freezing.layer_names(network)``.
        poolings: how each output becomes a vector, see ``tlcourse.layers.LayerFeatures``.

    Returns:
        (layer, pooling) -> float32 features and targets, in the order of the loader.

    Raises:
        ValueError: if the loader is empty, nothing is asked for, or a layer or pooling is unknown.
    """
    if not poolings:
        raise ValueError("extract_layers needs at least one pooling, got none")
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    targets, device = [], device_of(network)
    with inference(network):
        for batch in loader:
            inputs, labels = unpack(batch)
            if not isinstance(inputs, torch.Tensor):
                raise ValueError(f"the inputs must be a tensor, got {type(inputs).__name__}")
            for layer, output in all_activations(network, layers, inputs.to(device)).items():
                for pooling in poolings:
                    pooled = pool(output, pooling).float().cpu().numpy()
                    found.setdefault((layer, pooling), []).append(pooled)
            targets.append(labels.cpu())
    if not targets:
        raise ValueError("the loader is empty: it gave no batch to take features from")
    together = torch.cat(targets).numpy()
    return {place: Features(np.concatenate(parts), together) for place, parts in found.items()}


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
    grid = _checked_grid(c_grid)
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


def ridge_probe(
    train: Features,
    test: Features,
    val: Features | None = None,
    c_grid: Sequence[float] = RIDGE_GRID,
    standardise: bool = True,
) -> Probe:
    """A linear probe in closed form: least squares on one-hot targets, with an L2 penalty.

    It minimises ``sum_i |V h_i + b - y_i|^2 + |V|^2 / C``; the bias b is not penalised. That is
    scikit-learn's ``RidgeClassifier(alpha=1 / C)``. All values of C share one decomposition.

    Args:
        train, test, val: as in ``linear_probe``. C is chosen by accuracy on ``val`` (ties: the
            stronger penalty), without it by leave-one-out on ``train``, in closed form.
        c_grid: values of C to choose from, each > 0.
        standardise: bring features to mean 0 and deviation 1 by the statistics of ``train``.
            (Leave-one-out does not take the left-out example out of these statistics.)

    Raises:
        ValueError: if widths differ, a class has no training example, or a C is not > 0.
    """
    _check_same_space(train, *(part for part in (test, val) if part is not None))
    grid = _checked_grid(c_grid)
    raw, one_hot = train.features.astype(np.float64), np.eye(train.targets.max() + 1)[train.targets]
    mean, scale = raw.mean(axis=0), np.ones(raw.shape[1])
    if standardise:
        scale = _deviation(raw)
    centred, aims = (raw - mean) / scale, one_hot - one_hot.mean(axis=0)
    few = len(raw) <= raw.shape[1]  # solve in the span of the examples, or of the features
    with threadpool_limits(1, user_api="blas"):
        values, basis = np.linalg.eigh(centred @ centred.T if few else centred.T @ centred)
    values = np.maximum(values, 0.0)
    turned_aims = basis.T @ (aims if few else centred.T @ aims)
    candidates = []
    for C in sorted(grid):
        shrink = 1 / (values + 1 / C)
        solution = basis @ (shrink[:, None] * turned_aims)  # (N, K) or (D, K)
        standard_weight = centred.T @ solution if few else solution  # (D, K)
        weight = (standard_weight / scale[:, None]).T
        bias = one_hot.mean(axis=0) - weight @ mean
        if len(grid) == 1:
            goodness = 0.0
        elif val is not None:
            logits = val.features @ weight.T + bias
            goodness = float((logits.argmax(axis=1) == val.targets).mean())
        else:
            squares = basis**2 * values if few else (centred @ basis) ** 2
            leverage = 1 / len(raw) + squares @ shrink  # diagonal of the hat matrix
            residual = aims - centred @ standard_weight
            left_out = residual / np.maximum(1 - leverage, 1e-12)[:, None]
            goodness = float(((one_hot - left_out).argmax(axis=1) == train.targets).mean())
        candidates.append((goodness, -C, weight, bias))
    _, negative, weight, bias = max(candidates, key=lambda found: found[:2])
    hits = (test.features @ weight.T + bias).argmax(axis=1) == test.targets
    interval = wilson_interval(int(hits.sum()), len(hits))
    return Probe(interval.mean, interval, weight, bias, -negative)


def knn(
    train: Features,
    test: Features,
    k: int = 5,
    metric: Literal["cosine", "euclidean"] = "cosine",
) -> float:
    """Accuracy of a vote among the k nearest training examples.

    Equal votes go to the smaller class number.

    Args:
        train: features, shape (N, D).
        test: features, shape (M, D).
        k: in 1..N.
        metric: nearest by the highest cosine similarity, or by the smallest Euclidean distance.
    """
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric must be 'cosine' or 'euclidean', got {metric!r}")
    _check_same_space(train, test, all_classes=False)
    if not 1 <= k <= len(train.targets):
        raise ValueError(f"k must be in 1..{len(train.targets)} (training examples), got {k}")
    if metric == "cosine":
        keys, queries = _unit_rows(train.features), _unit_rows(test.features)
        half_squares = np.zeros(len(keys))
    else:  # moved together: large common offsets would cost digits in the squares below
        middle = train.features.astype(np.float64).mean(axis=0)
        keys, queries = train.features - middle, test.features - middle
        half_squares = (keys**2).sum(axis=1) / 2  # |q - k|^2 = |q|^2 - 2 (q.k - |k|^2 / 2)
    one_hot = np.eye(train.targets.max() + 1)[train.targets]
    correct = 0
    for start in range(0, len(queries), 1024):
        similarity = queries[start : start + 1024] @ keys.T - half_squares
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        votes = one_hot[nearest].sum(axis=1)
        correct += int((votes.argmax(axis=1) == test.targets[start : start + 1024]).sum())
    return correct / len(queries)


def _fit(train: Features, grid: Sequence[float]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weight (K, D) and bias (K,) in raw coordinates, for each C of the grid."""
    raw = train.features.astype(np.float64)
    mean, scale = raw.mean(axis=0), _deviation(raw)
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
        _goodness(train.take(kept), train.take(held_out), grid)
        for kept, held_out in splitter.split(train.features, train.targets)
    ]
    means = [tuple(pair) for pair in np.mean(per_fold, axis=0)]
    return max(zip(means, grid, strict=True))[1]


def _checked_grid(c_grid: Sequence[float]) -> tuple[float, ...]:
    grid = tuple(float(c) for c in c_grid)
    if not grid or min(grid) <= 0:
        raise ValueError(f"c_grid must hold numbers > 0, got {grid}")
    return grid


def _deviation(raw: np.ndarray) -> np.ndarray:
    """Standard deviation of each column, shape (D,); 1 for a constant or a dead one.

    A dead column (three of MiniLM's are: 1e-9, 1e-32) would get weights that no head survives.
    """
    scale = raw.std(axis=0)
    constant = scale <= 1e-9 * np.abs(raw).max(axis=0)
    scale[constant | (scale <= 1e-6 * scale.max())] = 1.0
    return scale


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
