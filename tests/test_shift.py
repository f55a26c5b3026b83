"""Shifts change the pictures as they say, and nothing else."""

from __future__ import annotations

import pytest
import torch

import tlcourse as tl
from tlcourse.shift import SHIFTS, _rotated, shifted


@pytest.mark.parametrize("shift", SHIFTS)
def test_targets_stay_and_pictures_change_the_same_way_each_time(shift: str) -> None:
    split = tl.load_task("wild_digits").test
    found = shifted(split, shift)
    assert torch.equal(found.targets, split.targets) and torch.equal(found.ids, split.ids)
    assert found.inputs.shape == split.inputs.shape
    assert found.inputs.min() >= -1 and found.inputs.max() <= 1
    assert (found.inputs - split.inputs).abs().mean() > 0.1
    assert torch.equal(found.inputs, shifted(split, shift).inputs)


def test_inverted_and_noise() -> None:
    split = tl.load_task("wild_digits").val
    assert torch.equal(shifted(shifted(split, "inverted"), "inverted").inputs, split.inputs)
    middle = split.inputs.abs() < 0.1  # far from the ends, so that nothing is cut off
    noise = (shifted(split, "noisy").inputs - split.inputs)[middle]
    assert noise.std() == pytest.approx(0.35, rel=0.03) and abs(noise.mean()) < 0.01


def test_a_rotation_by_a_quarter_is_rot90_one_way_or_the_other() -> None:
    images = torch.rand(20, 3, 32, 32)
    turned = _rotated(images, 90.0, torch.Generator().manual_seed(0))
    ways = [
        next(k for k in (1, 3) if torch.allclose(new, old.rot90(k, (1, 2)), atol=1e-4))
        for new, old in zip(turned, images, strict=True)
    ]
    assert set(ways) == {1, 3}


def test_the_other_photograph_leaves_the_digit_where_it_was() -> None:
    """The brightest change of ink sits at the same place: masks of both agree."""
    split = tl.load_task("wild_digits").test
    other = shifted(split, "photograph")
    assert not torch.equal(other.inputs, split.inputs)
    model = tl.Classifier(tl.load_backbone("glyphnet"), 10)
    loaders = tl.load_task("wild_digits", 20).loaders(augment=False)
    train = tl.extract_features(model.backbone, loaders.train)
    test = tl.extract_features(model.backbone, [(other.inputs, other.targets)])
    assert tl.linear_probe(train, test).accuracy > 0.4  # the digits are still there to be read


def test_unknown_shift() -> None:
    with pytest.raises(ValueError, match="unknown shift 'snow'; choose one of photograph"):
        shifted(tl.load_task("wild_digits").val, "snow")
