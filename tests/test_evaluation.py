from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

import tlcourse as tl
from tlcourse.evaluation import (
    Interval,
    calibration_error,
    mean_interval,
    score,
    wilson_interval,
)

CLASSES = ("ant", "bee", "cat", "dog", "elephant")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 5))


@pytest.fixture
def loader(model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """83 examples in uneven batches, labels related to the model's guesses, one class absent."""
    generator = torch.Generator().manual_seed(1)
    inputs = 3 * torch.randn(83, 6, generator=generator)
    guesses = model[1](inputs).argmax(dim=1)
    noise = torch.randint(4, (83,), generator=generator)
    targets = torch.where(torch.rand(83, generator=generator) < 0.6, guesses, noise)
    targets[targets == 4] = 0
    return list(zip(inputs.split(20), targets.split(20), strict=True))


@pytest.fixture
def truth(model: nn.Module, loader) -> tuple[np.ndarray, torch.Tensor]:
    inputs, targets = (torch.cat(parts) for parts in zip(*loader, strict=True))
    return targets.numpy(), model[1](inputs).detach()


def test_numbers_are_those_of_scikit_learn(model, loader, truth) -> None:
    targets, logits = truth
    guesses = logits.argmax(dim=1).numpy()
    result = tl.evaluate(model, loader, classes=CLASSES)
    assert result.accuracy == sklearn.metrics.accuracy_score(targets, guesses)
    assert result.loss == pytest.approx(
        sklearn.metrics.log_loss(targets, logits.softmax(1).numpy(), labels=range(5)), rel=1e-5
    )
    assert result.loss == pytest.approx(
        F.cross_entropy(logits, torch.from_numpy(targets)).item(), rel=1e-5
    )
    np.testing.assert_array_equal(
        result.confusion, sklearn.metrics.confusion_matrix(targets, guesses, labels=range(5))
    )
    report = sklearn.metrics.classification_report(
        targets, guesses, labels=range(5), target_names=CLASSES, output_dict=True, zero_division=0
    )
    assert [row.name for row in result.per_class] == list(CLASSES)
    for row in result.per_class:
        expected = report[row.name]
        assert row.precision == pytest.approx(expected["precision"])
        assert row.recall == pytest.approx(expected["recall"])
        assert row.f1 == pytest.approx(expected["f1-score"])
        assert row.count == expected["support"]
    assert result.per_class[4].count == 0  # the absent class


def test_arrays_are_in_the_order_of_the_loader(model, loader, truth) -> None:
    targets, logits = truth
    result = tl.evaluate(model, loader)
    np.testing.assert_array_equal(result.targets, targets)
    np.testing.assert_array_equal(result.predictions, logits.argmax(1).numpy())
    np.testing.assert_allclose(result.probabilities, logits.softmax(1).numpy(), rtol=1e-5)
    np.testing.assert_allclose(result.probabilities.sum(axis=1), 1.0, rtol=1e-5)


def test_dropout_is_off_and_the_mode_comes_back(model, loader) -> None:
    first, second = tl.evaluate(model, loader), tl.evaluate(model, loader)
    np.testing.assert_array_equal(first.probabilities, second.probabilities)
    assert model.training and model[0].training


def test_batches_do_not_matter(model, loader) -> None:
    inputs, targets = (torch.cat(parts) for parts in zip(*loader, strict=True))
    whole = tl.evaluate(model, [(inputs, targets)])
    parts = tl.evaluate(model, loader)
    assert whole.accuracy == parts.accuracy
    assert whole.loss == pytest.approx(parts.loss, rel=1e-6)
    assert score(model, loader) == pytest.approx((parts.loss, parts.accuracy), rel=1e-5)


def test_prints_an_aligned_table(model, loader) -> None:
    result = tl.evaluate(model, loader, classes=CLASSES)
    lines = str(result).splitlines()
    assert lines[0].startswith(f"accuracy {result.accuracy:.3f} [")
    assert "on 83 examples" in lines[0]
    assert lines[2].split() == ["class", "precision", "recall", "f1", "count"]
    table = lines[2:]
    assert len(table) == 6 and len({len(line) for line in table}) == 1
    row = result.per_class[1]
    assert table[2].split() == [
        "bee", f"{row.precision:.3f}", f"{row.recall:.3f}", f"{row.f1:.3f}", str(row.count),
    ]  # fmt: skip
    assert len(repr(result)) < 100


def test_refuses_names_of_another_number(model, loader) -> None:
    with pytest.raises(ValueError, match="must hold 5 names, got 2"):
        tl.evaluate(model, loader, classes=["a", "b"])


def test_refuses_an_empty_loader_and_foreign_labels(model) -> None:
    with pytest.raises(ValueError, match="loader is empty"):
        tl.evaluate(model, [])
    with pytest.raises(ValueError, match=r"label 5 is outside the head's range"):
        tl.evaluate(model, [(torch.zeros(2, 6), torch.tensor([0, 5]))])


# predict


def test_predict_is_softmax_in_any_batch_size(model, truth, loader) -> None:
    inputs = torch.cat([batch[0] for batch in loader])
    expected = truth[1].softmax(dim=1)
    for batch_size in (1, 7, 83, 1000):
        torch.testing.assert_close(tl.predict(model, inputs, batch_size), expected)
    assert model.training
    torch.testing.assert_close(tl.predict(model, {"input": inputs}), expected)


def test_predict_refuses_nothing(model) -> None:
    for inputs in (torch.zeros(0, 6), {}):
        with pytest.raises(ValueError, match="at least one input"):
            tl.predict(model, inputs)
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        tl.predict(model, torch.zeros(1, 6), batch_size=0)


# Calibration


def brute_force_calibration(probabilities: np.ndarray, targets: np.ndarray, bins: int) -> float:
    """Guo et al. 2017, equations 2 and 3, one bin after the other."""
    total = 0.0
    for m in range(1, bins + 1):
        members = [
            i for i, row in enumerate(probabilities) if (m - 1) / bins < row.max() <= m / bins
        ]
        if members:
            accuracy = np.mean([probabilities[i].argmax() == targets[i] for i in members])
            confidence = np.mean([probabilities[i].max() for i in members])
            total += len(members) / len(targets) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("classes", [2, 7])
def test_calibration_error_is_the_brute_force_sum(bins: int, classes: int) -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(classes, 0.3), size=500)
    targets = rng.integers(classes, size=500)
    expected = brute_force_calibration(probabilities, targets, bins)
    assert calibration_error(probabilities, targets, bins) == pytest.approx(expected, abs=1e-12)


def test_calibration_error_in_known_cases() -> None:
    sure = np.array([[1.0, 0.0]] * 4)
    assert calibration_error(sure, np.zeros(4, dtype=int)) == 0.0
    assert calibration_error(sure, np.ones(4, dtype=int)) == 1.0
    assert calibration_error(sure, np.array([0, 0, 0, 1])) == pytest.approx(0.25)


def test_a_bin_holds_its_upper_edge() -> None:
    """Guo et al.: ((m - 1) / M, m / M]; a confidence of 1/2 is in the first of two bins."""
    probabilities, targets = np.array([[0.5, 0.5], [0.75, 0.25]]), np.array([0, 1])
    expected = brute_force_calibration(probabilities, targets, 2)
    assert expected == pytest.approx((abs(1 - 0.5) + abs(0 - 0.75)) / 2)
    assert calibration_error(probabilities, targets, 2) == pytest.approx(expected)


def test_a_model_whose_probabilities_are_true_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(3), size=100_000)
    targets = (rng.random((100_000, 1)) > probabilities.cumsum(axis=1)).sum(axis=1)
    assert calibration_error(probabilities, targets) < 0.01
    assert calibration_error(probabilities, (targets + 1) % 3) > 0.2


# Intervals


@pytest.mark.parametrize(("correct", "seen"), [(0, 5), (5, 5), (1, 3), (620, 797), (1, 1)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_wilson_interval_is_that_of_scipy(correct: int, seen: int, confidence: float) -> None:
    exact = stats.binomtest(correct, seen).proportion_ci(confidence, method="wilson")
    ours = wilson_interval(correct, seen, confidence)
    assert ours.mean == correct / seen
    assert (ours.low, ours.high) == pytest.approx((exact.low, exact.high), abs=1e-12)
    assert 0.0 <= ours.low <= ours.mean <= ours.high <= 1.0


@pytest.mark.parametrize(("correct", "seen"), [(0, 0), (-1, 4), (5, 4)])
def test_wilson_interval_refuses_impossible_counts(correct: int, seen: int) -> None:
    with pytest.raises(ValueError, match=f"got {correct} of {seen}"):
        wilson_interval(correct, seen)


@pytest.mark.parametrize("confidence", [0.5, 0.95])
@pytest.mark.parametrize("values", [[0.1, 0.4], [1.0, 2.0, 4.0, 8.0, 9.0], [3.0, 3.0, 3.0]])
def test_mean_interval_is_that_of_scipy(values: list[float], confidence: float) -> None:
    ours = mean_interval(values, confidence)
    assert ours.mean == pytest.approx(np.mean(values))
    if np.ptp(values) == 0:
        assert ours.low == ours.mean == ours.high
    else:
        exact = stats.ttest_1samp(values, 0.0).confidence_interval(confidence)
        assert (ours.low, ours.high) == pytest.approx((exact.low, exact.high))


@pytest.mark.parametrize("size", [2, 5])
def test_mean_interval_covers_the_truth_19_times_in_20(size: int) -> None:
    rng = np.random.default_rng(0)
    found = [mean_interval(rng.normal(0.7, 0.1, size)) for _ in range(4000)]
    coverage = np.mean([each.low <= 0.7 <= each.high for each in found])
    assert coverage == pytest.approx(0.95, abs=0.013)  # nearly four standard errors


@pytest.mark.parametrize("values", [[], [0.5], 0.5, [[0.1, 0.2], [0.3, 0.4]]])
def test_mean_interval_needs_two_values(values: object) -> None:
    with pytest.raises(ValueError, match="at least 2 values"):
        mean_interval(values)  # type: ignore[arg-type]


def test_intervals_refuse_what_is_no_number_or_level() -> None:
    with pytest.raises(ValueError, match="finite, got nan"):
        mean_interval([0.1, np.nan])
    for confidence in (0.0, 1.0, 95):
        with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\)"):
            mean_interval([0.1, 0.2], confidence)
        with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\)"):
            wilson_interval(1, 2, confidence)


def test_interval_prints_mean_and_bounds() -> None:
    assert str(Interval(0.51234, 0.4, 0.6)) == "0.512 [0.400, 0.600]"
