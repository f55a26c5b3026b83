"""A grid of images, from whatever kind of array holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from tlcourse.figures import style


@style()
def show_images(
    images: Any, titles: Sequence[Any] | None = None, ncols: int = 8, size: float = 1.1
) -> np.ndarray:
    """Images in a grid.

    Args:
        images: tensor or array, shape (N, C, H, W), (N, H, W, C) or, grey, (N, H, W), with C
            1 or 3; uint8, or float in [-1, 1] (if any value is negative) or in [0, 1].
        titles: N short texts above the images.
        ncols: images in one row.
        size: of one image, in inches.

    Returns:
        Array of Axes, shape (rows, columns).

    Raises:
        ValueError: if shape or values are none of these; it says what they are.
    """
    pictures = _as_pictures(images)
    if titles is not None and len(titles) != len(pictures):
        raise ValueError(f"expected {len(pictures)} titles, one for each image, got {len(titles)}")
    columns = min(ncols, len(pictures))
    rows = -(-len(pictures) // columns)
    height = size + (0.25 if titles is not None else 0)
    _, axes = plt.subplots(rows, columns, figsize=(columns * size, rows * height), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for i, picture in enumerate(pictures):
        ax = axes.flat[i]
        ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        if titles is not None:
            ax.set_title(str(titles[i]), fontsize=10, pad=3)
    return axes


def _as_pictures(images: Any) -> np.ndarray:
    """Images as float array, shape (N, H, W) or (N, H, W, 3), in [0, 1]."""
    array = np.asarray(images.detach().cpu() if hasattr(images, "detach") else images)
    if array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[3] not in (1, 3):
        array = np.moveaxis(array, 1, 3)
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    colour = array.ndim == 4 and array.shape[3] == 3
    # (3, H, W) and (H, W, 3) would be a stack of grey images or one in colour: not guessed.
    grey = array.ndim == 3 and 3 not in (array.shape[0], array.shape[2])
    if not len(array) or not (colour or grey):
        raise ValueError(
            f"images must have the shape (N, C, H, W), (N, H, W, C) or (N, H, W) with N >= 1 and "
            f"C 1 or 3, got {array.shape}; write images[None] for one image in colour, "
            "images[:, None] for three grey ones"
        )
    if array.dtype == np.uint8:
        return array / 255
    low, high = float(array.min()), float(array.max())
    if not (low >= -1 and high <= 1):  # NaN fails too
        raise ValueError(
            f"image values must be uint8 or lie in [-1, 1] or [0, 1], got {array.dtype} in "
            f"[{low:g}, {high:g}]"
        )
    return (array + 1) / 2 if low < 0 else array
