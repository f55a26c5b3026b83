"""Pre-training sources by name, and the endless loader that draws from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tlcourse.patterns import NUM_FRACTALS, SHAPES, TEXTURES, fractal_bank, textured_shapes
from tlcourse.sources import (
    FONTS,
    GLYPHS,
    composite,
    glyph_bank,
    glyph_batch,
    mask_batch,
    render_glyph,
)

Batch = tuple[Tensor, Tensor]
NUM_FIXED_SCENES, NUM_RANDOM_LABELS = 2048, 10


@dataclass(frozen=True)
class Source:
    """A source task.

    Attributes:
        num_classes: labels are in [0, num_classes).
        batch: ``batch(num, generator)`` gives images, shape (num, 3, 32, 32), in [-1, 1], and
            labels, shape (num,).
        about: what is drawn, and what the label says.
        material: what the pictures are made of.
    """

    num_classes: int
    batch: Callable[[int, torch.Generator], Batch]
    about: str
    material: str = "fonts of matplotlib, photograph china.jpg of scikit-learn"


class SceneLoader:
    """An endless supply of scenes, seen as a loader of ``num_batches`` batches.

    Every pass draws new scenes; the same seed draws the same sequence.

    Args:
        source: a name of ``SOURCES``.
        num_batches: at least 1; what ``len`` returns.
        batch_size: at least 1.
        seed: of the sequence.
        fixed: True repeats the same scenes in every pass (for validation).

    Raises:
        ValueError: for an unknown source (lists the names), or a number below 1.
    """

    def __init__(
        self, source: str, num_batches: int, batch_size: int, seed: int, fixed: bool = False
    ) -> None:
        if source not in SOURCES:
            raise ValueError(f"unknown source {source!r}; choose one of {', '.join(SOURCES)}")
        if num_batches < 1 or batch_size < 1:
            raise ValueError(
                f"num_batches and batch_size must be >= 1, got {num_batches} and {batch_size}"
            )
        self.source = SOURCES[source]
        self.num_batches, self.batch_size = num_batches, batch_size
        self.seed, self.fixed = seed, fixed
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        if self.fixed:
            self._generator.manual_seed(self.seed)
        for _ in range(self.num_batches):
            yield self.source.batch(self.batch_size, self._generator)


def font_batch(num: int, generator: torch.Generator) -> Batch:
    """Glyph scenes of which the *font* is to be named, not the glyph."""
    return mask_batch(_font_bank(), num, generator)


def bare_glyph_batch(num: int, generator: torch.Generator) -> Batch:
    """Glyphs in colour on black: the same strokes, no photograph behind them."""
    return mask_batch(glyph_bank(), num, generator, _black())


def fractal_batch(num: int, generator: torch.Generator) -> Batch:
    """Fractals in colour on black, turned and scaled; the system is to be named."""
    masks, classes = fractal_bank()
    rows = torch.randint(len(masks), (num,), generator=generator)
    return composite(masks[rows], _black(), generator), classes[rows]


def inverted_batch(num: int, generator: torch.Generator) -> Batch:
    """Glyph scenes as a photographic negative."""
    images, labels = glyph_batch(num, generator)
    return -images, labels


def quarter_turn_batch(num: int, generator: torch.Generator) -> Batch:
    """Glyph scenes, photograph and all, turned by 0 to 3 quarters; the turn is to be named.

    Gidaris, Singh, Komodakis 2018, section 2, arXiv:1803.07728.
    """
    images, _ = glyph_batch(num, generator)
    turns = torch.randint(4, (num,), generator=generator)
    turned = torch.stack([images.rot90(k, (2, 3)) for k in range(4)])
    return turned[turns, torch.arange(num)], turns


def random_label_batch(num: int, generator: torch.Generator) -> Batch:
    """A fixed set of glyph scenes, each with a label drawn at random: nothing but memory.

    Maennel et al. 2020, section 1, arXiv:2006.10455. There are no further scenes: what a
    validation loader draws is from the same set.
    """
    images, labels = _fixed_scenes()
    rows = torch.randint(len(labels), (num,), generator=generator)
    return images[rows], labels[rows]


SOURCES = {
    "glyphs": Source(len(GLYPHS), glyph_batch, "glyph scenes; which letter or symbol"),
    "fonts": Source(len(FONTS), font_batch, "glyph scenes; which font"),
    "bare_glyphs": Source(
        len(GLYPHS), bare_glyph_batch, "glyphs on black; which one", "fonts of matplotlib"
    ),
    "inverted": Source(len(GLYPHS), inverted_batch, "glyph scenes as negatives; which glyph"),
    "quarter_turns": Source(4, quarter_turn_batch, "turned glyph scenes; by how many quarters"),
    "fractals": Source(
        NUM_FRACTALS, fractal_batch, "fractals on black; which system", "formulas alone"
    ),
    "shapes": Source(
        len(SHAPES) * len(TEXTURES),
        textured_shapes,
        "textured shapes; which shape and texture",
        "formulas alone",
    ),
    "random_labels": Source(
        NUM_RANDOM_LABELS,
        random_label_batch,
        f"{NUM_FIXED_SCENES:,} fixed glyph scenes; labels drawn at random",
    ),
}


@lru_cache(maxsize=1)
def _black() -> Tensor:
    return torch.zeros(3, 427, 640)


@lru_cache(maxsize=1)
def _font_bank() -> tuple[Tensor, Tensor]:
    """All glyphs, in the order of their fonts, and the font of each."""
    masks: list[Tensor] = []
    fonts: list[int] = []
    for label, font in enumerate(FONTS):
        drawn = [render_glyph(character, font) for character in GLYPHS]
        masks += [mask for mask in drawn if mask is not None]
        fonts += [label] * (len(masks) - len(fonts))
    return torch.stack(masks), torch.tensor(fonts)


@lru_cache(maxsize=1)
def _fixed_scenes() -> Batch:
    generator = torch.Generator().manual_seed(99)
    images, _ = glyph_batch(NUM_FIXED_SCENES, generator)
    return images, torch.randint(NUM_RANDOM_LABELS, (NUM_FIXED_SCENES,), generator=generator)
