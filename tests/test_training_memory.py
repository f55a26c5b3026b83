"""Bytes counted against bytes known."""

import torch
from torch import nn

from tlcourse.training_memory import num_bytes, saved_for_backward


def test_bytes_of_tensors():
    assert num_bytes([torch.zeros(3, 4), torch.zeros(5, dtype=torch.float16)]) == 48 + 10


def test_a_linear_layer_keeps_its_input_for_the_weight_and_nothing_for_the_bias():
    x = torch.randn(10, 32)
    for trained, expected in (("weight", num_bytes([x])), ("bias", 0)):
        layer = nn.Linear(32, 16).requires_grad_(False)
        layer.get_parameter(trained).requires_grad_(True)
        kept, result = saved_for_backward(layer, lambda layer=layer: layer(x))
        assert kept == expected
        assert torch.equal(result, layer(x))


def test_a_storage_is_counted_once_and_the_models_own_never():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()
    x = torch.randn(4, 8)
    kept, _ = saved_for_backward(model, lambda: model(x))
    # x; the output of the ReLU, kept by it and by the layer after it; the input of BatchNorm.
    assert kept == 3 * num_bytes([x])
