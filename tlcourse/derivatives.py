"""Slopes from differences: the referee of every gradient by hand (lesson 03)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def finite_differences(loss: Callable[[], Tensor], theta: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of a loss in each entry of ``theta``.

    Args:
        loss: reads ``theta`` and gives one number.
        theta: float64 tensor of any shape, without a gradient; moved, and put back.
        step: > 0; errors are of size step squared, and of rounding over step.

    Returns:
        the slopes, shape of ``theta``.

    Raises:
        ValueError: for another dtype, in which rounding would drown the slopes, or another step.
    """
    if theta.dtype != torch.float64:
        raise ValueError(f"theta must be float64, got {theta.dtype}")
    if not step > 0:
        raise ValueError(f"step must be > 0, got {step}")
    slopes = torch.zeros_like(theta)
    for place in np.ndindex(*theta.shape):
        kept = theta[place].item()
        theta[place] = kept + step
        above = loss()
        theta[place] = kept - step
        slopes[place] = (above - loss()) / (2 * step)
        theta[place] = kept
    return slopes
