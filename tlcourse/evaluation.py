"""How good a model is, and how sure one can be of the number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import ndtri, stdtrit
from torch import nn

from tlcourse.inference import Inputs, Loader, forward, inference, predictions
from tlcourse.processes import Processes


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % confidence interval (or that of the level asked for)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class ClassReport:
    """One row of the per-class report; precision, recall and f1 in [0, 1], 0 where undefined."""

    name: str
    precision: float
    recall: float
    f1: float
    count: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What ``evaluate`` found on N examples of K classes.

    Attributes:
        accuracy: fraction of the examples, in [0, 1].
        interval: Wilson 95 % interval of the accuracy.
        loss: mean cross-entropy per example, in nats.
        calibration_error: expected calibration error, in [0, 1].
        per_class: one ``ClassReport`` per class.
        confusion: int array, shape (K, K); row: target, column: prediction.
        targets: int array, shape (N,).
        predictions: int array, shape (N,).
        probabilities: float array, shape (N, K), rows sum to 1.
    """

    accuracy: float
    interval: Interval
    loss: float
    calibration_error: float
    per_class: list[ClassReport]
    confusion: np.ndarray
    targets: np.ndarray
    predictions: np.ndarray
    probabilities: np.ndarray

    def __str__(self) -> str:
        width = max(len("class"), *(len(row.name) for row in self.per_class))
        lines = [
            f"accuracy {self.interval} on {len(self.targets)} examples, "
            f"loss {self.loss:.3f}, calibration error {self.calibration_error:.3f}",
            "",
            f"{'class':<{width}}  precision  recall     f1  count",
        ]
        lines += [
            f"{r.name:<{width}}  {r.precision:9.3f}  {r.recall:6.3f}  {r.f1:5.3f}  {r.count:5d}"
            for r in self.per_class
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Evaluation(accuracy={self.interval}, examples={len(self.targets)})"


def evaluate(model: nn.Module, loader: Loader, classes: Sequence[str] | None = None) -> Evaluation:
    """Measure a classifier on every example of a loader.

    The model runs in evaluation mode without gradients; afterwards each of its modules is in
    the mode it was in. Numbers are aggregated by example, so a short last batch does not count
    double.

    Args:
        model: gives logits, shape (B, K), or an object with such ``.logits``.
        loader: see ``Loader``.
        classes: K names for the report; None: "0", "1", ...

    Raises:
        ValueError: if the loader is empty, a label is outside the head's range, or the number
            of names is not K.
    """
    batches = [(logits.cpu(), targets.cpu()) for logits, targets in predictions(model, loader)]
    logits = torch.cat([batch[0] for batch in batches])
    targets = torch.cat([batch[1] for batch in batches])
    num_classes = logits.shape[1]
    names = [str(k) for k in range(num_classes)] if classes is None else list(classes)
    if len(names) != num_classes:
        raise ValueError(f"classes must hold {num_classes} names, got {len(names)}: {names}")
    probabilities = logits.softmax(dim=1).numpy()
    true, guessed = targets.numpy(), logits.argmax(dim=1).numpy()
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(confusion, (true, guessed), 1)
    interval = wilson_interval(int(confusion.trace()), len(true))
    return Evaluation(
        accuracy=interval.mean,
        interval=interval,
        loss=F.cross_entropy(logits.double(), targets).item(),
        calibration_error=calibration_error(probabilities, true),
        per_class=_class_reports(confusion, names),
        confusion=confusion,
        targets=true,
        predictions=guessed,
        probabilities=probabilities,
    )


def score(
    model: nn.Module, loader: Loader, processes: Processes | None = None
) -> tuple[float, float]:
    """Mean cross-entropy per example and accuracy: the part of ``evaluate`` that ``fit`` needs.

    Sums stay on the model's device until the end.

    Args:
        model, loader: as for ``evaluate``.
        processes: among which each batch is divided; all get the same numbers. None: this alone.
    """
    processes = processes or Processes()
    loss, correct, seen = torch.zeros(()), torch.zeros(()), 0
    for logits, targets in predictions(model, processes.part_of(loader)):
        loss = loss.to(logits.device) + F.cross_entropy(logits, targets, reduction="sum")
        correct = correct.to(logits.device) + (logits.argmax(dim=1) == targets).sum()
        seen += len(targets)
    if processes.size > 1:
        sums = torch.stack([loss.double(), correct.double(), loss.new_tensor(seen).double()])
        loss, correct, total = processes.sum(sums)
        seen = int(total.item())
    return loss.item() / seen, correct.item() / seen


def predict(model: nn.Module, inputs: Inputs, batch_size: int = 256) -> torch.Tensor:
    """Class probabilities for new inputs, in evaluation mode and without gradients.

    Args:
        model: as for ``evaluate``.
        inputs: tensor, shape (B, ...), or a dict of such tensors.
        batch_size: examples per forward pass, >= 1.

    Returns:
        Float tensor on the CPU, shape (B, K), rows sum to 1.
    """
    tensors = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    if not tensors or len(tensors[0]) == 0:
        raise ValueError("predict needs at least one input, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    with inference(model):
        parts = [
            forward(model, _slice(inputs, start, start + batch_size)).softmax(dim=1).cpu()
            for start in range(0, len(tensors[0]), batch_size)
        ]
    return torch.cat(parts)


def wilson_interval(correct: int, seen: int, confidence: float = 0.95) -> Interval:
    """Interval for a proportion; stays inside [0, 1] and works at 0 and 1.

    Wilson 1927, J. Am. Stat. Assoc. 22(158), 209-212.

    Args:
        correct: number of successes, 0 <= correct <= seen.
        seen: number of trials, >= 1.
        confidence: level, in (0, 1).
    """
    if seen < 1 or not 0 <= correct <= seen:
        raise ValueError(f"need 0 <= correct <= seen and seen >= 1, got {correct} of {seen}")
    z = float(ndtri(0.5 + _checked_level(confidence) / 2))
    p = correct / seen
    centre = (p + z * z / (2 * seen)) / (1 + z * z / seen)
    spread = z / (1 + z * z / seen) * math.sqrt(p * (1 - p) / seen + z * z / (4 * seen * seen))
    # Rounding can push a bound past p at 0 and 1, where the two are equal.
    return Interval(p, min(p, max(0.0, centre - spread)), max(p, min(1.0, centre + spread)))


def mean_interval(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> Interval:
    """Interval for the mean of independent draws: mean +- t s / sqrt(n), Student's t, n - 1.

    Args:
        values: n >= 2 finite numbers.
        confidence: level, in (0, 1).

    Raises:
        ValueError: for fewer than two values (one says nothing about the spread), or one that
            is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"an interval needs at least 2 values in a row, got {values!r}")
    if not np.isfinite(array).all():
        raise ValueError(f"values must be finite, got {array[~np.isfinite(array)][0]} among them")
    quantile = float(stdtrit(len(array) - 1, 0.5 + _checked_level(confidence) / 2))
    mean = float(array.mean())
    half_width = quantile * float(array.std(ddof=1)) / math.sqrt(len(array))
    return Interval(mean, mean - half_width, mean + half_width)


def calibration_error(probabilities: np.ndarray, targets: np.ndarray, num_bins: int = 15) -> float:
    """Expected calibration error of the predicted class, in [0, 1].

    Guo et al. 2017, section 2, arXiv:1706.04599: examples are binned by the confidence of
    their prediction into equal-width bins ((m - 1) / M, m / M]; the error is the mean over
    examples of |accuracy of the bin - mean confidence of the bin|.

    Args:
        probabilities: shape (N, K), rows sum to 1.
        targets: int array, shape (N,), in [0, K).
        num_bins: M, >= 1.
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = probabilities.argmax(axis=1) == targets
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gap = np.bincount(bins, weights=correct - confidence, minlength=num_bins)
    return float(np.abs(gap).sum() / len(targets))


def _class_reports(confusion: np.ndarray, names: Sequence[str]) -> list[ClassReport]:
    hits, counts, guessed = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    return [
        ClassReport(
            name=name,
            precision=float(hits[k] / max(guessed[k], 1)),
            recall=float(hits[k] / max(counts[k], 1)),
            f1=float(2 * hits[k] / max(guessed[k] + counts[k], 1)),
            count=int(counts[k]),
        )
        for k, name in enumerate(names)
    ]


def _slice(inputs: Inputs, start: int, stop: int) -> Inputs:
    if isinstance(inputs, Mapping):
        return {name: tensor[start:stop] for name, tensor in inputs.items()}
    return inputs[start:stop]


def _checked_level(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    return confidence
