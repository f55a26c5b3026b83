"""The source task: its glyphs, and the compositing it shares with the target."""

import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from tlcourse import sources


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_glyphs_are_distinct_and_none_is_a_number():
    assert len(set(sources.GLYPHS)) == len(sources.GLYPHS) >= 200
    for character in sources.GLYPHS:
        assert unicodedata.category(character) not in ("Nd", "No", "Nl")
        assert "DIGIT" not in unicodedata.name(character)


def look(character, font):
    """Blurred, centred, unit-length picture of a character; None if the font lacks it."""
    mask = sources.render_glyph(character, font)
    if mask is None:
        return None
    picture = Image.fromarray((mask.numpy() * 255).astype(np.uint8)).resize((24, 24))
    flat = np.asarray(picture.filter(ImageFilter.GaussianBlur(1.2)), dtype=float).ravel()
    flat -= flat.mean()
    return flat / np.linalg.norm(flat)


def likeness_to_digits(character):
    """Highest correlation with a digit of the same font."""
    found = [
        look(character, font) @ look(digit, font)
        for font in sources.FONTS
        for digit in "0123456789"
        if look(character, font) is not None and look(digit, font) is not None
    ]
    return max(found)


def test_no_glyph_looks_like_a_digit():
    alike = {c: likeness_to_digits(c) for c in "OIlZB"}
    assert min(alike.values()) > 0.85, "the measure must notice look-alikes"
    for character in sources.GLYPHS:
        assert likeness_to_digits(character) < 0.9, character


def test_every_glyph_has_several_fonts():
    masks, classes = sources.glyph_bank()
    assert masks.shape[1:] == (sources.MASK_SIZE, sources.MASK_SIZE)
    assert torch.bincount(classes, minlength=len(sources.GLYPHS)).min() >= 2
    assert (classes.diff() >= 0).all(), "glyph_batch relies on the order"


def test_photographs_of_source_and_target_differ():
    assert sources.photograph("china").shape == sources.photograph("flower").shape
    assert (sources.photograph("china") - sources.photograph("flower")).abs().mean() > 0.1
    with pytest.raises(ValueError, match="'cat'"):
        sources.photograph("cat")


def test_batches_are_deterministic_and_in_range():
    images, labels = sources.glyph_batch(64, generator(3))
    again, same = sources.glyph_batch(64, generator(3))
    other, _ = sources.glyph_batch(64, generator(4))
    assert torch.equal(images, again) and torch.equal(labels, same)
    assert not torch.equal(images, other)
    assert images.shape == (64, 3, 32, 32) and images.min() >= -1 and images.max() <= 1
    assert labels.min() >= 0 and labels.max() < len(sources.GLYPHS)


def test_labels_name_the_glyph_that_is_drawn():
    """Laid straight on black, a composited glyph correlates best with its own class."""
    masks, classes = sources.glyph_bank()
    rows = torch.arange(0, len(masks), 37)
    soft = sources.soften(masks[rows], generator())
    flat = torch.nn.functional.normalize(masks.flatten(1) - masks.flatten(1).mean(1, True), dim=1)
    mine = torch.nn.functional.normalize(soft.flatten(1) - soft.flatten(1).mean(1, True), dim=1)
    best = classes[(mine @ flat.T).argmax(1)]
    assert (best == classes[rows]).float().mean() > 0.8


def test_photo_patches_come_from_the_photo():
    photo = torch.arange(3 * 100 * 120, dtype=torch.float32).view(3, 100, 120)
    patches = sources.photo_patches(photo, 16, generator())
    assert patches.shape == (16, 3, 32, 32)
    assert torch.equal(patches[:, 1] - patches[:, 0], torch.full((16, 32, 32), 12_000.0))
    steps = (patches[:, 0, 1:, 0] - patches[:, 0, :-1, 0]) / 120
    assert torch.isin(steps, torch.tensor([1.0, 2.0, 3.0])).all()


def test_identity_affine_moves_nothing():
    zero, one = torch.zeros(1), torch.ones(1)
    theta = sources.affine_matrices(zero, one, one, zero, torch.zeros(1, 2))
    assert torch.equal(theta, torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]))


def test_quarter_turn_equals_rot90():
    image = torch.rand(1, 1, 8, 8)
    zero, one = torch.zeros(1), torch.ones(1)
    theta = sources.affine_matrices(one * torch.pi / 2, one, one, zero, torch.zeros(1, 2))
    grid = torch.nn.functional.affine_grid(theta, [1, 1, 8, 8], align_corners=False)
    turned = torch.nn.functional.grid_sample(image, grid, align_corners=False)
    torch.testing.assert_close(turned, torch.rot90(image, 1, (2, 3)), atol=1e-5, rtol=0)
