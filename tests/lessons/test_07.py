"""Lesson 07: CKA against definitions, the price of a cut against PyTorch, transplants, causes."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from judging import assert_hints_name
from scipy import stats
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tlcourse as tl
from benchmarks import layer_transfer
from tlcourse import transferability
from tlcourse.locations import data_dir
from tlcourse.questions import load_questions

FOLDER = Path(__file__).resolve().parents[2] / "lessons" / "07_layer_transferability"
QUESTIONS = {question.id: question for question in load_questions(FOLDER / "questions.py")}
SEEDS = (0, 1, b"a class secret")


def cases(question_id: str) -> list[tuple]:
    return [case for seed in SEEDS for case in QUESTIONS[question_id].draw_cases(seed)]


def test_plan_covers_every_parameter_and_knows_blocks_1_from_10() -> None:
    question = QUESTIONS["07.q1"]
    for parameters, layers, n, frozen in cases("07.q1"):
        fates = question.expect((parameters, layers, n, frozen))
        assert list(fates) == parameters
        copied = {name.rsplit(".", 2)[0] for name, fate in fates.items() if fate[:6] == "copied"}
        assert copied == set(layers[:n])
    assert any("blocks.10" in layers and n > 1 for _, layers, n, _ in cases("07.q1"))


def test_price_is_what_pytorch_counts() -> None:
    question = QUESTIONS["07.q2"]
    for layers, n in cases("07.q2"):
        net, size = [], layers[0][3] + 3
        for i, (a, b, kernel, side) in enumerate(layers[:-1]):
            # A padding or a stride of its own would not change the count: only maps put out do.
            net += [nn.AdaptiveAvgPool2d(side + kernel - 1), nn.Conv2d(a, b, kernel)]
            net[-1].requires_grad_(i >= n)
        head = nn.Linear(layers[-1][0], layers[-1][1])
        model = nn.Sequential(*net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
        with FlopCounterMode(display=False) as ahead:
            loss = model(torch.ones(1, layers[0][0], size, size)).sum()
        with FlopCounterMode(display=False) as back:
            loss.backward()
        counted = {"forward": ahead.get_total_flops() // 2, "backward": back.get_total_flops() // 2}
        assert question.expect((layers, n)) == counted


def test_linear_cka_is_the_sum_of_squared_covariances() -> None:
    def hsic(x: np.ndarray, y: np.ndarray) -> float:
        return sum(np.cov(a, b)[0, 1] ** 2 for a in x.T for b in y.T)

    for x, y in cases("07.q3"):
        expected = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
        got = QUESTIONS["07.q3"].expect((x, y))
        np.testing.assert_allclose(got, expected, rtol=1e-9)
        np.testing.assert_allclose(got, transferability.cka(x, y, debiased=False), rtol=1e-9)


def test_debiased_cka_is_the_average_over_four_different_images() -> None:
    def hsic(x: np.ndarray, y: np.ndarray) -> float:
        k, m = x @ x.T, y @ y.T
        i, j, q, r = np.array(list(permutations(range(len(x)), 4))).T
        return float(np.mean(k[i, j] * m[i, j] - 2 * k[i, j] * m[i, q] + k[i, j] * m[q, r]))

    for x, y in cases("07.q4"):
        got = QUESTIONS["07.q4"].expect((x, y))
        np.testing.assert_allclose(got, transferability.cka(x, y), rtol=1e-9, atol=1e-12)
        if len(x) <= 12:
            expected = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
            np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-10)


def test_plain_cka_of_noise_follows_the_formula() -> None:
    rng = np.random.default_rng(0)
    for num, p, q in ((30, 100, 100), (60, 20, 500), (40, 2000, 400)):
        found = [
            transferability.cka(rng.normal(size=(num, p)), rng.normal(size=(num, q)), False)
            for _ in range(20)
        ]
        assert np.mean(found) == pytest.approx(np.sqrt(p / (p + num) * q / (q + num)), rel=0.05)


def test_causes_agree_with_scipy_and_every_cause_occurs() -> None:
    seen = set()
    for plus, selfer, copied in cases("07.q5"):
        texts = []
        for cut in range(selfer.shape[1]):
            lost = [
                stats.ttest_rel(a[:, cut], b[:, cut]).confidence_interval(0.95).low > 0
                for a, b in ((plus, selfer), (selfer, copied))
            ]
            names = {(1, 1): "both", (1, 0): "freezing", (0, 1): "specificity"}
            texts.append(names.get((int(lost[0]), int(lost[1])), "neither"))
        assert QUESTIONS["07.q5"].expect((plus, selfer, copied)) == texts
        seen |= set(texts)
    assert seen == {"both", "freezing", "specificity", "neither"}


HINTS = {
    "07.q1": {"no dot": "dot", "head copied at the top cut": "head", "always frozen": "frozen"},
    "07.q2": {"lowest input product": "lowest trained", "forward shrinks": "run forward"},
    "07.q3": {"not centred": "centre", "norm not squared": "squared"},
    "07.q4": {"plain": "plain", "diagonal only": "missing", "plain denominator": "three times"},
    "07.q5": {"gains count": "gain", "specificity against BnB+": "not with BnB+"},
}


@pytest.mark.parametrize("question_id", HINTS)
def test_hints_name_the_mistake(question_id: str) -> None:
    assert_hints_name(QUESTIONS[question_id], HINTS[question_id])


@pytest.mark.parametrize("arm", ["near", "far+", "self", "self+", "random", "base"])
def test_arms_copy_and_freeze_what_they_say(arm: str) -> None:
    donor = layer_transfer.fresh(5)
    model = layer_transfer.build(arm, 2, 0, donor)
    new = layer_transfer.fresh(0)
    origin = {
        "near": lambda: tl.load_backbone("glyphs").body,
        "far": lambda: tl.load_backbone("shapes").body,
        "self": lambda: donor.backbone.body,
    }.get(arm.rstrip("+"), lambda: new.backbone.body)()
    for i, name in enumerate(layer_transfer.LAYERS):
        ours = model.backbone.body.get_submodule(name)
        theirs = (origin if i < 2 else new.backbone.body).get_submodule(name).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.state_dict().items())
        frozen = i < 2 and arm in layer_transfer.FROZEN
        assert all(parameter.requires_grad != frozen for parameter in ours.parameters())
    assert torch.equal(model.head.weight, new.head.weight)


def test_movement_is_zero_for_the_same_network_and_blind_to_a_rescaled_stem() -> None:
    body = layer_transfer.fresh(0).backbone.body
    images = tl.load_task("plain_digits", None).train.inputs[:40]
    still = layer_transfer.movement(body, body, images)
    np.testing.assert_allclose(still["cka"], 1, rtol=1e-9)
    assert still["distance"] == [0, 0, 0, 0]
    tripled = layer_transfer.fresh(0).backbone.body
    with torch.no_grad():
        tripled.stem[0].weight.mul_(3)
    moved = layer_transfer.movement(body, tripled, images)
    assert moved["distance"][0] > 1 and moved["cka"][0] > 0.999


def test_the_record_is_complete() -> None:
    record = json.loads((data_dir() / "results" / "layer_transfer.json").read_text("utf-8"))
    assert set(record["draws"]) == {str(draw) for draw in layer_transfer.DRAWS}
    rates = record["settings"]["rates"]
    for draw in record["draws"].values():
        for arm in ("base", *layer_transfer.FROZEN, *layer_transfer.TUNED):
            cuts = {"0"} if arm == "base" else {"1", "2", "3", "4"}
            assert set(draw["scores"][arm]) == set(rates[arm]) == cuts
            assert all(0 <= score <= 1 for score in draw["scores"][arm].values())
