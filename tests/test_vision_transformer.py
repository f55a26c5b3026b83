"""The faster forward passes equal torchvision's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

import tlcourse as tl
from tlcourse.vision_transformer import speed_up


def vit(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32}
    model = VisionTransformer(**(sizes | {"mlp_dim": 64, "num_classes": 5} | changes))
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it at zero
    return model


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_same_outputs_and_gradients_as_torchvision() -> None:
    theirs = vit().double()
    ours = speed_up(copy.deepcopy(theirs))
    results = []
    for model in (theirs, ours):
        model.train()
        logits = model(IMAGES.double())
        logits.square().sum().backward()
        results.append((logits, {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(*(logits for logits, _ in results))
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient)


def test_the_state_dict_goes_both_ways() -> None:
    theirs, ours = vit(), speed_up(vit())
    nn.init.normal_(theirs.conv_proj.weight)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(IMAGES), theirs(IMAGES))


def test_under_autocast_the_residual_sum_is_half_precision() -> None:
    model, seen = speed_up(vit()), []
    model.encoder.layers[1].register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        half = model(IMAGES)
    assert seen == [torch.bfloat16]
    torch.testing.assert_close(half.float(), model(IMAGES), rtol=0.05, atol=0.05)
    assert seen[1:] == [torch.float32]


def test_attention_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dropout must be 0, got 0\.1"):
        speed_up(vit(attention_dropout=0.1))


def test_the_backbone_is_one_of_them() -> None:
    body = tl.load_backbone("vit_b_16", pretrained=False).body
    assert type(body.encoder.layers[0].self_attention).__name__ == "SelfAttention"
