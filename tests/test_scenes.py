"""Every source: deterministic, in range, all labels used, and the label says what it should."""

from __future__ import annotations

import pytest
import torch

from tlcourse import patterns, scenes, sources
from tlcourse.scenes import SOURCES, SceneLoader


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", SOURCES)
def test_batches_are_deterministic_and_in_range(name: str) -> None:
    source = SOURCES[name]
    images, labels = source.batch(3000, generator(3))
    again, same = source.batch(3000, generator(3))
    assert torch.equal(images, again) and torch.equal(labels, same)
    assert not torch.equal(images[:9], source.batch(9, generator(4))[0])
    assert images.shape == (3000, 3, 32, 32) and images.min() >= -1 and images.max() <= 1
    assert set(labels.tolist()) == set(range(source.num_classes))


def test_loader_draws_anew_unless_fixed() -> None:
    train = SceneLoader("glyphs", 3, 4, seed=1)
    first, second = list(train), list(train)
    assert len(train) == len(first) == 3
    assert not torch.equal(first[0][0], second[0][0]), "every pass draws new scenes"
    fixed = SceneLoader("glyphs", 2, 4, seed=1, fixed=True)
    assert torch.equal(next(iter(fixed))[0], next(iter(fixed))[0])


def test_loader_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="got 0 and 4"):
        SceneLoader("glyphs", 0, 4, seed=1)
    with pytest.raises(ValueError, match="unknown source 'letters'; choose one of glyphs, fonts"):
        SceneLoader("letters", 1, 1, seed=1)


def test_variants_differ_from_glyph_scenes_as_they_say() -> None:
    plain, labels = sources.glyph_batch(200, generator(5))
    inverted, same = scenes.inverted_batch(200, generator(5))
    assert torch.equal(inverted, -plain) and torch.equal(labels, same)
    turned, turns = scenes.quarter_turn_batch(200, generator(5))
    for image, original, turn in zip(turned, plain, turns.tolist(), strict=True):
        assert torch.equal(image.rot90(-turn, (1, 2)), original)
    bare, same = scenes.bare_glyph_batch(200, generator(5))
    assert torch.equal(labels, same)
    assert (bare < -0.7).float().mean() > 0.5, "no photograph behind the glyph"


def test_a_font_label_names_the_font() -> None:
    masks, fonts = scenes._font_bank()
    for label, font in enumerate(sources.FONTS):
        drawn = [sources.render_glyph(character, font) for character in sources.GLYPHS[:40]]
        mine = masks[fonts == label]
        for mask in drawn:
            assert mask is None or (mine == mask).all(dim=(1, 2)).any()


def test_random_labels_stay_with_their_scene_and_say_nothing() -> None:
    images, labels = scenes._fixed_scenes()
    drawn, given = scenes.random_label_batch(50, generator(1))
    for image, label in zip(drawn, given, strict=True):
        place = int((images == image).all(dim=(1, 2, 3)).nonzero()[0])
        assert labels[place] == label
    assert torch.bincount(labels).max() < 1.3 * len(labels) / scenes.NUM_RANDOM_LABELS


def test_fractals_of_a_class_are_alike_and_fill_the_mask() -> None:
    masks, classes = patterns.fractal_bank()
    assert torch.bincount(classes).tolist() == [patterns.VARIANTS] * patterns.NUM_FRACTALS
    assert (masks > 0.2).float().mean(dim=(1, 2)).min() > 0.08
    flat = torch.nn.functional.normalize(masks.flatten(1) - masks.flatten(1).mean(1, True), dim=1)
    likeness = flat @ flat.T
    own = classes[:, None] == classes[None]
    assert likeness[own].mean() > likeness[~own].mean() + 0.3


def test_shapes_cover_what_their_formula_says() -> None:
    """Area of each shape in its own coordinates, by counting pixels."""
    zero, one = torch.zeros(1), torch.ones(1)
    x, y = patterns._turned_grid(zero, one * 0.9, torch.zeros(1, 2))
    side = 2 * 32 / 31 / 0.9  # the outermost pixels have their centres at -1 and 1
    areas = [shape.float().mean().item() * side**2 for shape in patterns._shapes(x, y)]
    disc, square, triangle, ring, cross, _ = areas
    assert disc == pytest.approx(torch.pi, rel=0.04)
    assert square == pytest.approx(1.7**2, rel=0.08)
    assert ring == pytest.approx(torch.pi * (1 - 0.55**2), rel=0.08)
    assert cross == pytest.approx(4 - 4 * 0.67**2, rel=0.08)
    assert 0.8 < triangle < 2.2


def test_the_label_of_a_shape_is_shape_and_texture() -> None:
    """With the texture "plain" the figure has one colour: two flat colours in all but for grain."""
    images, labels = patterns.textured_shapes(600, generator(2))
    flat = labels % len(patterns.TEXTURES) == 0
    rough = (images[:, :, 1:] - images[:, :, :-1]).abs().gt(0.5).any(1).float().mean(dim=(1, 2))
    assert rough[flat].mean() < 0.7 * rough[~flat].mean()
