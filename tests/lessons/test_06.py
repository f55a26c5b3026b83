"""Lesson 06: the reference answers against torch, and what the lesson derives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from judging import assert_hints_name
from torch import nn

import tlcourse as tl
from tlcourse.questions import load_questions
from tlcourse.recording import lr_factor

FOLDER = Path(__file__).resolve().parents[2] / "lessons" / "06_full_fine_tuning"
QUESTIONS = {question.id: question for question in load_questions(FOLDER / "questions.py")}
SEEDS = (0, 1, b"a class secret")


def cases(question_id: str, seed: int | bytes) -> list[tuple]:
    return QUESTIONS[question_id].draw_cases(seed)


def descend(hessian: np.ndarray, lr: float, momentum: float, num_steps: int) -> float:
    """How much torch's SGD shrinks or grows a start along the steepest direction."""
    weight = torch.tensor(np.linalg.eigh(hessian)[1][:, -1], requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=lr, momentum=momentum)
    for _ in range(num_steps):
        weight.grad = torch.tensor(hessian) @ weight.detach()
        optimizer.step()
    return float(weight.detach().norm())


@pytest.mark.parametrize("seed", SEEDS)
def test_q1_is_where_torch_begins_to_explode(seed: int | bytes) -> None:
    for hessian, momentum in cases("06.q1", seed):
        limit = QUESTIONS["06.q1"].expect((hessian, momentum))
        assert descend(hessian, 0.98 * limit, momentum, 600) < 0.1
        assert descend(hessian, 1.02 * limit, momentum, 600) > 10


@pytest.mark.parametrize("seed", SEEDS)
def test_q2_equals_torch(seed: int | bytes) -> None:
    for gradients, lr, warmup_steps in cases("06.q2", seed):
        weight = torch.zeros(gradients.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=lr)
        path = []
        for step, gradient in enumerate(gradients):
            optimizer.param_groups[0]["lr"] = lr * lr_factor(
                step, len(gradients), warmup_steps, "constant"
            )
            weight.grad = torch.tensor(gradient)
            optimizer.step()
            path.append(weight.detach().numpy().copy())
        expected = QUESTIONS["06.q2"].expect((gradients, lr, warmup_steps))
        np.testing.assert_allclose(expected, path, rtol=1e-8)


@pytest.mark.parametrize("seed", SEEDS)
def test_q3_equals_torch(seed: int | bytes) -> None:
    for batches, momentum in cases("06.q3", seed):
        layer = nn.BatchNorm2d(batches[0].shape[1], momentum=momentum).double()
        for batch in batches:
            layer(torch.tensor(batch))
        expected = QUESTIONS["06.q3"].expect((batches, momentum))
        np.testing.assert_allclose(expected["mean"], layer.running_mean.numpy(), rtol=1e-10)
        np.testing.assert_allclose(expected["var"], layer.running_var.numpy(), rtol=1e-10)


@pytest.mark.parametrize("head_lr", [None, 0.3])
def test_q4_equals_the_library(head_lr: float | None) -> None:
    model = tl.Classifier(tl.load_backbone("glyphnet", pretrained=False), num_classes=10)
    names = tl.freezing.layer_names(model)
    groups = tl.freezing.parameter_groups(model, 0.1, 0.0, head_lr=head_lr, layer_decay=0.4)
    expected = QUESTIONS["06.q4"].expect((names, 0.1, 0.4, head_lr))
    for group in groups:
        for parameter in group["names"]:
            [layer] = [name for name in names if parameter.startswith(name + ".")]
            assert expected[layer] == pytest.approx(group["lr"], rel=1e-12)


@pytest.mark.parametrize("complete", [False, True])
def test_q5_finds_the_classic_bug(complete: bool) -> None:
    model = tl.Classifier(tl.load_backbone("glyphnet_bn", pretrained=False), num_classes=10)
    model.backbone.requires_grad_(False)
    if complete:
        tl.freeze(model.backbone)
    before = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    model.train()
    model(torch.randn(4, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    after = {name: value.numpy() for name, value in model.state_dict().items()}
    found = QUESTIONS["06.q5"].expect((before, after, ["head"]))
    assert not found["weights"]
    buffers = {f"backbone.{name}" for name, _ in model.backbone.named_buffers()}
    assert set(found["statistics"]) == (set() if complete else buffers)
    assert set(QUESTIONS["06.q5"].expect((before, after, []))["weights"]) == {
        "head.bias", "head.weight",
    }  # fmt: skip


def test_q5_cases_reach_what_the_question_is_about() -> None:
    drawn = cases("06.q5", 0)
    steps = [np.abs(a[name] - b[name]).max() for b, a, _ in drawn for name in b]
    assert any(0 < step < 1e-8 for step in steps), "nothing that allclose overlooks"
    expected = [QUESTIONS["06.q5"].expect(case) for case in drawn]
    assert any(e["statistics"] for e in expected) and any(e["weights"] for e in expected)
    assert not any(expected[0].values()), "no clean model among the cases"


def test_first_step_of_adam_is_the_sign() -> None:
    gradient = torch.tensor([1e-5, -3.0, 1e4], dtype=torch.float64)
    for scale in (1, 1000):
        weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        weight.grad = scale * gradient
        torch.optim.Adam([weight], lr=0.01).step()
        torch.testing.assert_close(weight.detach(), -0.01 * gradient.sign(), rtol=2e-3, atol=0)


def test_typical_step_for_noise_is_the_closed_form() -> None:
    noise = np.random.default_rng(0).normal(size=(40, 20_000))
    path = QUESTIONS["06.q2"].expect((noise, 1.0, 0))
    steps = np.diff(path, axis=0, prepend=np.zeros((1, noise.shape[1])))
    t = np.arange(1, 41)
    formula = np.sqrt(0.1 / 1.9 * (1 + 0.9**t) / (1 - 0.9**t))
    np.testing.assert_allclose(np.sqrt(np.square(steps).mean(axis=1)), formula, rtol=0.02)


HINTS = {
    "06.q1": {"momentum forgotten": "momentum", "one over h": "one step", "trace": "eigenvalue"},
    "06.q2": {
        "no bias correction": "corrected",
        "uphill": "sign",
        "warm-up forgotten": "warm-up",
        "first step has rate zero": "first step",
        "warm-up on the gradients": "rate",
    },
    "06.q3": {
        "biased variance": "unbiased",
        "momentum is the weight of the old": "new",
        "over the batch only": "shape",
        "variance starts at 0": "starts at 1",
    },
    "06.q4": {
        "head not counted": "below the head",
        "counted down from head_lr": "head alone",
        "head_lr ignored": "head_lr",
    },
    "06.q5": {
        "statistics are not looked at": "buffer",
        "allclose": "last bit",
        "prefix without a dot": "dot",
        "one list": "dict",
    },
}


@pytest.mark.parametrize("question_id", HINTS)
def test_hints_name_the_mistake(question_id: str) -> None:
    assert_hints_name(QUESTIONS[question_id], HINTS[question_id])
