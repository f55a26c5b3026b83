"""Figures that are no glyphs: fractals, and textured shapes. Drawn by formulas, in seconds."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tlcourse.sources import IMAGE_SIZE, MASK_SIZE, uniform_draws

NUM_FRACTALS, VARIANTS = 100, 8
SHAPES = ("disc", "square", "triangle", "ring", "cross", "star")
TEXTURES = ("plain", "stripes", "checks", "dots", "circles", "noise")


@lru_cache(maxsize=1)
def fractal_bank() -> tuple[Tensor, Tensor]:
    """Attractors of random iterated function systems, one system per class.

    Kataoka et al. 2020, section 3, arXiv:2101.08515, in small: two to four affine maps; the
    variants of a class scale each map's entries by 0.9 to 1.1. Systems whose picture covers
    less than 8 % of the mask are drawn again.

    Returns:
        masks, float tensor, shape (100 * 8, 40, 40), in [0, 1]; class of each, in order.
    """
    generator = torch.Generator().manual_seed(77)
    kept: list[Tensor] = []
    while len(kept) < NUM_FRACTALS:
        maps, weights = _random_systems(60, generator)
        repeated = maps.repeat_interleave(VARIANTS, 0)
        jitter = 1 + 0.1 * (2 * torch.rand(repeated.shape, generator=generator) - 1)
        masks = _attractors(repeated * jitter, weights.repeat_interleave(VARIANTS, 0), generator)
        groups = masks.view(-1, VARIANTS, MASK_SIZE, MASK_SIZE)
        covered = (groups > 0.2).float().mean(dim=(2, 3)).amin(dim=1)
        kept += [group for group, share in zip(groups, covered, strict=True) if share > 0.08]
    classes = torch.arange(NUM_FRACTALS).repeat_interleave(VARIANTS)
    return torch.cat(kept[:NUM_FRACTALS]), classes


def textured_shapes(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Shapes filled with a texture, over a plain ground; the class is shape and texture.

    Returns:
        images, shape (num, 3, 32, 32), in [-1, 1]; labels, shape (num,), in [0, 36):
        ``6 * shape + texture``.
    """
    labels = torch.randint(len(SHAPES) * len(TEXTURES), (num,), generator=generator)
    draw = uniform_draws(num, generator)
    x, y = _turned_grid(draw(0, 2 * math.pi), draw(0.5, 0.9), draw(-0.25, 0.25, 2))
    inside = _by_class(labels // len(TEXTURES), _shapes(x, y))
    u, v = _turned_grid(draw(0, 2 * math.pi), draw(0.7, 1.4), draw(-1, 1, 2))
    noise = torch.randn(num, 1, 16, 16, generator=generator)
    noise = F.interpolate(noise, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear").squeeze(1)
    pattern = _by_class(labels % len(TEXTURES), _textures(u, v, noise))
    first, second, ground = (draw(0, 1, 3, 1, 1) for _ in range(3))
    filled = first * pattern.unsqueeze(1) + second * (1 - pattern.unsqueeze(1))
    mask = inside.unsqueeze(1)
    images = filled * mask + ground * (1 - mask)
    grain = torch.randn(images.shape, generator=generator) * draw(0, 0.06, 1, 1, 1)
    return (images + grain).clamp(0, 1) * 2 - 1, labels


def _random_systems(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Affine maps, shape (num, 4, 2, 3), and how often each is taken, shape (num, 4)."""
    maps = 2 * torch.rand(num, 4, 2, 3, generator=generator) - 1
    # Contractions: the largest singular value of each linear part is brought below 0.8.
    linear = maps[..., :2]
    norm = torch.linalg.matrix_norm(linear, ord=2)[..., None, None]
    maps[..., :2] = linear / norm * (0.4 + 0.4 * torch.rand(norm.shape, generator=generator))
    weights = torch.linalg.det(maps[..., :2]).abs() + 0.02
    count = torch.randint(2, 5, (num, 1), generator=generator)
    weights = weights * (torch.arange(4) < count)
    return maps, weights / weights.sum(dim=1, keepdim=True)


def _attractors(maps: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
    """Play the chaos game with 100 points for each system; shape (N, 40, 40), in [0, 1]."""
    num, num_points = len(maps), 100
    points = torch.zeros(num, num_points, 2)
    rows, visited = torch.arange(num).unsqueeze(1), []
    for step in range(60):
        chosen = torch.multinomial(weights, num_points, replacement=True, generator=generator)
        picked = maps[rows, chosen]  # (N, points, 2, 3)
        points = (picked[..., :2] @ points.unsqueeze(-1)).squeeze(-1) + picked[..., 2]
        if step >= 15:
            visited.append(points)
    cloud = torch.cat(visited, dim=1)  # (N, 45 * points, 2)
    low, high = cloud.amin(dim=1, keepdim=True), cloud.amax(dim=1, keepdim=True)
    centre, span = (low + high) / 2, (high - low).amax(dim=2, keepdim=True).clamp(min=1e-6)
    cells = ((cloud - centre) / span * 34 + MASK_SIZE / 2).long().clamp(0, MASK_SIZE - 1)
    flat = cells[..., 1] * MASK_SIZE + cells[..., 0]
    counts = torch.zeros(num, MASK_SIZE**2).scatter_add_(1, flat, torch.ones(flat.shape))
    return (counts / 3).clamp(max=1).view(num, MASK_SIZE, MASK_SIZE)


def _turned_grid(angle: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates of each pixel, shape (B, 32, 32) each, about [-2, 2], turned and scaled."""
    line = torch.linspace(-1, 1, IMAGE_SIZE)
    y, x = torch.meshgrid(line, line, indexing="ij")
    x, y = x - shift[:, 0].view(-1, 1, 1), y - shift[:, 1].view(-1, 1, 1)
    cos, sin = (f(angle).view(-1, 1, 1) for f in (torch.cos, torch.sin))
    size = scale.view(-1, 1, 1)
    return (cos * x + sin * y) / size, (cos * y - sin * x) / size


def _shapes(x: Tensor, y: Tensor) -> list[Tensor]:
    radius, angle = (x * x + y * y).sqrt(), torch.atan2(y, x)
    square = torch.maximum(x.abs(), y.abs())
    arms = torch.minimum(x.abs(), y.abs())
    corner = torch.maximum(2 * y - 1, torch.maximum(-y + 1.73 * x, -y - 1.73 * x) - 1) / 1.2
    return [
        radius < 1,
        square < 0.85,
        corner < 0,
        (radius < 1) & (radius > 0.55),
        (square < 1) & (arms < 0.33),
        radius < 0.7 + 0.3 * torch.cos(5 * angle),
    ]


def _textures(u: Tensor, v: Tensor, noise: Tensor) -> list[Tensor]:
    wave_u, wave_v = torch.sin(9 * u), torch.sin(9 * v)
    return [
        torch.zeros_like(u),
        wave_u > 0,
        wave_u * wave_v > 0,
        torch.minimum(wave_u, wave_v) > 0.2,
        torch.sin(9 * (u * u + v * v).sqrt()) > 0,
        noise > 0,
    ]


def _by_class(index: Tensor, choices: list[Tensor]) -> Tensor:
    """For each example the picture of its class, as float, shape (B, 32, 32)."""
    return torch.stack([choice.float() for choice in choices])[index, torch.arange(len(index))]
