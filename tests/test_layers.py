"""Reading a layer equals running the network up to it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tlcourse as tl
from tlcourse.freezing import layer_names
from tlcourse.layers import LayerFeatures, all_activations, pool

IMAGES = torch.randn(5, 3, 32, 32)


def test_each_layer_is_what_the_network_computes_there() -> None:
    backbone = tl.load_backbone("glyphnet", pretrained=False).eval()
    body = backbone.body
    first = body.stages[0](body.stem(IMAGES))
    read = LayerFeatures(backbone, "body.stages.0")
    assert torch.equal(read.activations(IMAGES), first)
    torch.testing.assert_close(read(IMAGES), first.mean(dim=(2, 3)))
    last = LayerFeatures(backbone, layer_names(backbone)[-1])
    torch.testing.assert_close(last(IMAGES), backbone(IMAGES))


def test_later_layers_do_not_run_and_no_hook_stays() -> None:
    class Bomb(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("ran")

    network = nn.Sequential(nn.Conv2d(3, 4, 3), Bomb())
    read = LayerFeatures(network, "0")
    assert read(IMAGES).shape == (5, 4)
    with pytest.raises(AssertionError, match="ran"):
        network(IMAGES)
    assert not network[0]._forward_hooks


def test_it_takes_the_place_of_a_backbone_and_adds_no_parameter() -> None:
    backbone = tl.load_backbone("glyphnet", pretrained=False)
    read = LayerFeatures(backbone, "body.stem", "mean+max")
    assert len(list(read.parameters())) == len(list(backbone.parameters()))
    features = tl.extract_features(read, [(IMAGES, torch.zeros(5, dtype=torch.long))])
    assert features.features.shape == (5, 64)


def test_all_layers_from_one_pass_are_those_read_one_by_one() -> None:
    backbone = tl.load_backbone("glyphnet", pretrained=False)
    layers = layer_names(backbone)
    passes = []
    counter = backbone.register_forward_hook(lambda *_: passes.append(1))
    found = all_activations(backbone, layers[::-1], IMAGES)
    counter.remove()
    assert list(found) == layers[::-1] and len(passes) == 1
    for layer in layers:
        assert torch.equal(found[layer], LayerFeatures(backbone, layer).activations(IMAGES))
    assert not any(part._forward_hooks for part in backbone.modules())


def test_all_layers_refuses_what_it_cannot_read() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    network = Skips()
    with pytest.raises(ValueError, match="'unused' did not run"):
        all_activations(network, ["used", "unused"], IMAGES)
    assert not network.used._forward_hooks
    with pytest.raises(ValueError, match="no layer 'stem'"):
        all_activations(network, ["used", "stem"], IMAGES)
    with pytest.raises(ValueError, match="at least one layer"):
        all_activations(network, [], IMAGES)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("mean", [[1.5, 5.5]]),
        ("max", [[3.0, 7.0]]),
        ("mean+max", [[1.5, 5.5, 3.0, 7.0]]),
        ("flatten", [[0.0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_pooling_of_a_map(pooling: str, expected: list[list[float]]) -> None:
    assert pool(torch.arange(8.0).view(1, 2, 2, 2), pooling).tolist() == expected  # type: ignore[arg-type]


def test_pooling_of_tokens() -> None:
    tokens = torch.arange(6.0).view(1, 3, 2)
    assert pool(tokens, "first").tolist() == [[0, 1]]
    assert pool(tokens, "mean").tolist() == [[2, 3]]
    assert pool(tokens, "max").tolist() == [[4, 5]]
    assert pool(tokens[:, 0], "max").tolist() == [[0, 1]]


def test_bad_input_is_named() -> None:
    backbone = tl.load_backbone("glyphnet", pretrained=False)
    with pytest.raises(ValueError, match=r"no layer 'stem'; the layers are body\.stem, body\.st"):
        LayerFeatures(backbone, "stem")
    with pytest.raises(ValueError, match="pooling must be one of mean, max"):
        LayerFeatures(backbone, "body.stem", "median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cannot pool shape \(1, 2, 2, 2\) by 'first'"):
        pool(torch.zeros(1, 2, 2, 2), "first")
