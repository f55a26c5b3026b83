"""Graded questions of lesson 00: accuracy, and accuracy over batches."""

from __future__ import annotations

import numpy as np

from tlcourse.checks import Question


def cases_accuracy(rng: np.random.Generator) -> list[tuple]:
    """Predictions that are right with different probabilities, for different numbers of images."""
    cases = []
    for num, right in ((1, 1.0), (7, 0.5), (40, 0.8), (64, 0.0)):
        targets = rng.integers(0, 10, num)
        wrong = (targets + rng.integers(1, 10, num)) % 10
        cases.append((np.where(rng.random(num) < right, targets, wrong), targets))
    return cases


def accuracy(predictions, targets):
    return float(np.mean(predictions == targets))


def cases_batches(rng: np.random.Generator) -> list[tuple]:
    """Full batches and a short last one with another accuracy."""
    cases = [(np.array([0.9, 0.0]), np.array([100, 2]))]
    for num in (1, 3, 6):
        sizes = np.append(np.full(num - 1, 32), rng.integers(1, 20))
        cases.append((rng.integers(0, sizes + 1) / sizes, sizes))
    return cases


def overall_accuracy(batch_accuracies, batch_sizes):
    return float((batch_accuracies * batch_sizes).sum() / batch_sizes.sum())


QUESTIONS = [
    Question(
        id="00.q1",
        title="Accuracy",
        points=1,
        cases=cases_accuracy,
        expected=accuracy,
        hint="`predictions == targets` is an array of booleans; its mean is the fraction of True.",
        wrong={
            "counts instead of averaging": lambda p, t: float((p == t).sum()),
            "error instead of accuracy": lambda p, t: float((p != t).mean()),
            "per cent": lambda p, t: 100 * float((p == t).mean()),
            "mean absolute difference": lambda p, t: float(np.abs(p - t).mean()),
        },
    ),
    Question(
        id="00.q2",
        title="Accuracy from batches",
        points=2,
        cases=cases_batches,
        expected=overall_accuracy,
        hint="Turn each accuracy back into a number of right images; add those, then divide once.",
        wrong={
            "mean of the batch accuracies": lambda a, n: float(a.mean()),
            "divides by the number of batches": lambda a, n: float((a * n).sum() / len(n)),
            "leaves out the last batch": lambda a, n: float(
                (a[:-1] * n[:-1]).sum() / max(1, n[:-1].sum())
            ),
            "weights by the largest batch": lambda a, n: float((a * n).sum() / (n.max() * len(n))),
        },
    ),
    Question(
        id="00.q3",
        title="Your own transfer",
        points=2,
        manual=True,
        rubric="1 point: names what was kept and what was new. 1 point: names where the old "
        "knowledge misled, or argues why it did not.",
    ),
]
