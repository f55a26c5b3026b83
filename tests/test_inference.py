from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tlcourse as tl
from tlcourse import inference


def test_every_module_gets_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3)))
    model[1][1].eval()
    tl.freeze(model[0])
    before = [part.training for part in model.modules()]
    assert before == [True, False, True, True, False]
    with inference.inference(model):
        assert not any(part.training for part in model.modules())
        assert not torch.is_grad_enabled()
    assert [part.training for part in model.modules()] == before
    assert torch.is_grad_enabled()


def test_modes_come_back_after_an_error() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), inference.inference(model):
        model(torch.zeros(1, 3))
    assert model.training and torch.is_grad_enabled()


def test_mode_is_restored_between_batches() -> None:
    """What happens around the loop over batches sees the model as it was."""
    model = nn.Linear(2, 2)
    loader = [(torch.zeros(3, 2), torch.tensor([0, 1, 0]))] * 2
    for logits, targets in inference.predictions(model, loader):
        assert model.training and torch.is_grad_enabled()
        assert logits.shape == (3, 2) and not logits.requires_grad
        assert targets.tolist() == [0, 1, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_logits_have_at_least_single_precision(dtype: torch.dtype) -> None:
    model = nn.Linear(2, 3, dtype=dtype)
    logits = inference.forward(model, torch.zeros(4, 2, dtype=dtype))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert logits.dtype == expected


def test_keyword_inputs_and_outputs_with_logits() -> None:
    class Model(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=a - b)

    a, b = torch.rand(2, 3), torch.rand(2, 3)
    assert torch.equal(inference.forward(Model(), {"b": b, "a": a}), a - b)


@pytest.mark.parametrize("output", [torch.zeros(3), torch.zeros(2, 3, 4), (torch.zeros(2, 3),)])
def test_refuses_what_is_no_row_of_logits(output: object) -> None:
    class Model(nn.Module):
        def forward(self, inputs: torch.Tensor) -> object:
            return output

    with pytest.raises(ValueError, match=r"logits of shape \(batch, classes\), got"):
        inference.forward(Model(), torch.zeros(2, 2))


def test_device_of_models_without_parameters() -> None:
    assert inference.device_of(nn.Flatten()) == torch.device("cpu")
    assert inference.device_of(nn.Linear(1, 1, device="meta")) == torch.device("meta")
    norm = nn.BatchNorm1d(2, affine=False, device="meta")
    assert inference.device_of(norm) == torch.device("meta")
