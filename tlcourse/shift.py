"""The same digits in other worlds: test sets whose distribution differs from the training set's."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tlcourse.datasets import Split, digit_scenes
from tlcourse.sources import affine_matrices

SHIFTS = ("photograph", "inverted", "rotated", "noisy")
_SEED = 30_241


def shifted(split: Split, shift: str) -> Split:
    """A split of wild digits as it would look after a shift; ids and targets stay.

    Args:
        split: of the task "wild_digits".
        shift: "photograph" (the same digits over patches of the other photograph, the one that
            the glyph scenes of pre-training were laid over), "inverted" (a negative), "rotated"
            (by 40 degrees, either way; the corners are mirrored in) or "noisy" (Gaussian noise
            of deviation 0.35, on pixels in [-1, 1]).

    Raises:
        ValueError: for another shift (lists the names).
    """
    if shift not in SHIFTS:
        raise ValueError(f"unknown shift {shift!r}; choose one of {', '.join(SHIFTS)}")
    if shift == "photograph":
        return replace(split, inputs=digit_scenes("china")[split.ids])
    generator = torch.Generator().manual_seed(_SEED)
    if shift == "inverted":
        return replace(split, inputs=-split.inputs)
    if shift == "rotated":
        return replace(split, inputs=_rotated(split.inputs, 40.0, generator))
    noise = torch.randn(split.inputs.shape, generator=generator)
    return replace(split, inputs=(split.inputs + 0.35 * noise).clamp(-1, 1))


def _rotated(images: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    """Turned by so many degrees, half of them to the left and half to the right."""
    num = len(images)
    sign = torch.randint(2, (num,), generator=generator) * 2.0 - 1
    one, zero = torch.ones(num), torch.zeros(num)
    theta = affine_matrices(
        sign * torch.deg2rad(torch.tensor(degrees)), one, one, zero, torch.zeros(num, 2)
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
