"""Lesson 09: reference answers against torch and brute force, and what the lesson derives."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from tlcourse.comparing import Comparison
from tlcourse.questions import load_questions
from tlcourse.weight_space import greedy_soup

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "lessons" / "09_overfitting"
QUESTIONS = {question.id: question for question in load_questions(FOLDER / "questions.py")}
SEEDS = (0, 1, b"a class secret")


def cases(question_id: str):
    question = QUESTIONS[question_id]
    for seed in SEEDS:
        for case in question.draw_cases(seed):
            yield case, question.expect(case)


def test_patience_by_brute_force() -> None:
    stops = set()
    for (train, val, patience), expected in cases("09.q1"):
        # Reading t ends the run if the lowest value up to t is `patience` or more readings old.
        ends = [t for t in range(len(val)) if t - int(np.argmin(val[: t + 1])) >= patience]
        stop = ends[0] if ends else len(val) - 1
        best = int(np.argmin(val[: stop + 1]))
        assert expected == {"stop": stop, "best": best, "gap": val[best] - train[best]}
        stops.add(stop < len(val) - 1)
    assert stops == {True, False}


def test_smoothing_is_where_torch_has_its_minimum() -> None:
    for (targets, num_classes, eps), expected in cases("09.q2"):
        y = torch.tensor(targets)
        logits = torch.zeros(len(targets), num_classes, dtype=torch.float64)
        logits[torch.arange(len(targets)), y] = expected["gap"]
        logits.requires_grad_()
        loss = F.cross_entropy(logits, y, label_smoothing=eps)
        loss.backward()
        assert abs(loss.item() - expected["floor"]) < 1e-12
        assert logits.grad.abs().max() < 1e-12
        np.testing.assert_allclose(logits.detach().softmax(dim=1), expected["targets"])


def test_averages_equal_torch_and_obey_jensen() -> None:
    for (logits, targets), expected in cases("09.q3"):
        z, y = torch.tensor(logits), torch.tensor(targets)
        members = [F.cross_entropy(member, y).item() for member in z]
        log_mean = z.log_softmax(dim=-1).logsumexp(dim=0) - np.log(len(z))
        np.testing.assert_allclose(expected["members"], np.mean(members))
        np.testing.assert_allclose(expected["probabilities"], F.nll_loss(log_mean, y).item())
        np.testing.assert_allclose(expected["logits"], F.cross_entropy(z.mean(0), y).item())
        assert max(expected["probabilities"], expected["logits"]) <= expected["members"] + 1e-12


def test_greedy_soup_equals_the_library() -> None:
    lengths = set()
    for (heads, features, targets), expected in cases("09.q4"):

        def accuracy(theta, features=features, targets=targets):
            return float(np.mean((features @ theta["w"].numpy().T).argmax(axis=1) == targets))

        soup, kept = greedy_soup([{"w": torch.tensor(head)} for head in heads], accuracy)
        assert kept == expected["ingredients"].tolist()
        np.testing.assert_allclose(soup["w"], expected["soup"])
        lengths.add(len(kept))
    assert len(lengths) > 1


def test_masks_equal_torch_where_sizes_differ() -> None:
    for (weights, sparsity), expected in cases("09.q5"):
        sizes = np.concatenate([np.abs(weight).ravel() for weight in weights])
        zeros = sum(int((mask == 0).sum()) for mask in expected)
        assert zeros == round(sparsity * len(sizes))
        kept = np.concatenate([mask.ravel() for mask in expected]) == 1
        if 0 < zeros < len(sizes):
            assert sizes[~kept].max() <= sizes[kept].min()
        if len(np.unique(sizes)) < len(sizes) or sparsity == 0:
            continue
        parts = [nn.Module() for _ in weights]
        for part, weight in zip(parts, weights, strict=True):
            part.weight = nn.Parameter(torch.tensor(weight))
        prune.global_unstructured(
            [(part, "weight") for part in parts], prune.L1Unstructured, amount=sparsity
        )
        for part, mask in zip(parts, expected, strict=True):
            np.testing.assert_array_equal(part.weight_mask.numpy(), mask)


def test_dropout_on_a_linear_head_is_an_adaptive_penalty() -> None:
    """The minimiser, not only the loss: ridge with that penalty, by enumerating all masks."""
    rng = np.random.default_rng(0)
    H, y, p = rng.normal(size=(7, 4)) * [3, 1, 1, 0.2], rng.normal(size=7), 0.3
    masks = np.array(list(itertools.product((0, 1), repeat=4)))
    chance = np.prod(np.where(masks, 1 - p, p), axis=1)
    gram, cross = np.zeros((4, 4)), np.zeros(4)
    for mask, weight in zip(masks, chance, strict=True):
        dropped = H * mask / (1 - p)
        gram += weight * dropped.T @ dropped / 7
        cross += weight * dropped.T @ y / 7
    penalty = np.diag(p / (1 - p) * np.mean(H**2, axis=0))
    np.testing.assert_allclose(gram, H.T @ H / 7 + penalty)
    np.testing.assert_allclose(
        np.linalg.solve(gram, cross), np.linalg.solve(H.T @ H / 7 + penalty, H.T @ y / 7)
    )


@pytest.mark.parametrize("k", [2, 5])
def test_variance_of_a_mean_of_correlated_members(k: int) -> None:
    s, rho = 1.7, 0.4
    covariance = s**2 * (rho * np.ones((k, k)) + (1 - rho) * np.eye(k))
    share = np.full(k, 1 / k)
    np.testing.assert_allclose(share @ covariance @ share, rho * s**2 + (1 - rho) * s**2 / k)


def test_slope_in_the_temperature() -> None:
    z = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64)
    for label, always_negative in ((0, True), (1, False)):
        slopes = []
        for t in (0.1, 1.0, 10.0):
            scale = torch.tensor(t, dtype=torch.float64, requires_grad=True)
            F.cross_entropy(scale * z, torch.tensor([label])).backward()
            expected = ((t * z).softmax(dim=1) * z).sum() - z[0, label]
            torch.testing.assert_close(scale.grad, expected)
            slopes.append(scale.grad.item())
        assert (max(slopes) < 0) == always_negative
    assert abs(slopes[-1] - 3.0) < 1e-3  # wrong answer: tends to the largest logit minus the true


def test_record_is_complete() -> None:
    path = ROOT / "data" / "results" / "overfitting.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["command"].startswith("python benchmarks/overfitting.py")
    for base, metrics in record["scores"].items():
        for scores in metrics.values():
            comparison = Comparison(scores)
            assert base in scores and len(scores) == 11 - (base == "augmentation")
            assert len(comparison.scores[base]) == record["settings"]["draws"] >= 5
    # Jensen must hold in what was recorded, too.
    for base, extras in record["extra"].items():
        ensemble = record["scores"][base]["loss"]["ensemble of 4"]
        for extra, reached in zip(extras, ensemble, strict=True):
            assert reached <= np.mean([member["loss"] for member in extra["members"]]) + 1e-9
