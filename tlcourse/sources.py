"""Glyph scenes, the course's main pre-training source, and the compositing shared with the target.

A scene is one glyph (a letter or a symbol from the fonts that matplotlib ships), turned,
scaled, sheared and coloured, over a patch of a photograph. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IMAGE_SIZE = 32
MASK_SIZE = 40

# Classes of the source task. No digits, and nothing that reads as one: every character that
# correlates with a digit of its own font above 0.88 was left out (a test measures it again),
# then look-alikes by eye (O, I, l, Z, S, B, b, G, q, o ...), numerals and second copies of a shape.
GLYPHS = (
    "ACEFKLMNPRVWYdefhkmprwΓΛΣΦΨαηλντφωЃДЖИФЦШялԳԹԻՀՃՆՊՖ"
    "¢£¤©«®±»×÷₨₪↖↘↚↯↰↱↲↳↵↶↷↸↹↺↻↼↽⇂⇄⇋⇖⇘⇥⇫⇶∌∓√∝∟∠∢∿≅≉≏≣≤≥⊀⊃⊆⊇⊏⊐⊓⊔⊞⊠⊢⊧⊨⊩⊪⊳⊻⊿⋄⋆⋈⋋⋌⋔⋜⋝⋿"
    "▢△▽◁◅◠◡◢◣◤◥◨◫◭◮◴◶◸◹◺☄☆☈☊☋☑☕☖☚☜☝☞☟☠☢☥☧☪☭☼☽☿♀♂♈♉♊♌♎♏♐♓♕♘♡♤♨♩♪♫♬♮"
    '"^✂✍❝❤❬❭➩➫➬➭'
)
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic",
    "DejaVuSansMono", "DejaVuSansMono-Bold",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic",
)  # fmt: skip


@lru_cache(maxsize=2)
def photograph(name: str) -> Tensor:
    """One of scikit-learn's two sample photographs.

    Args:
        name: "china" (used by the source) or "flower" (used by the target).

    Returns:
        float tensor, shape (3, 427, 640), in [0, 1].

    Raises:
        ValueError: for another name.
    """
    if name not in ("china", "flower"):
        raise ValueError(f"photograph must be 'china' or 'flower', got {name!r}")
    from sklearn.datasets import load_sample_image

    return torch.from_numpy(load_sample_image(f"{name}.jpg").copy()).permute(2, 0, 1).float() / 255


def font_path(font: str) -> Path:
    """The file of a font that matplotlib ships, for example ``DejaVuSans``."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"


def render_glyph(character: str, font: str) -> Tensor | None:
    """Draw one character, cropped and centred with its longer side at 34 of 40 pixels.

    Returns:
        float tensor, shape (40, 40), in [0, 1]; None if the font lacks the character.
    """
    from PIL import Image, ImageDraw

    face, known = _face(font)
    if ord(character) not in known:
        return None
    canvas = Image.new("L", (160, 160))
    ImageDraw.Draw(canvas).text((50, 40), character, font=face, fill=255)
    box = canvas.getbbox()
    if box is None:
        return None
    glyph = canvas.crop(box)
    scale = 34 / max(glyph.size)
    width, height = (max(1, round(side * scale)) for side in glyph.size)
    mask = Image.new("L", (MASK_SIZE, MASK_SIZE))
    corner = ((MASK_SIZE - width) // 2, (MASK_SIZE - height) // 2)
    mask.paste(glyph.resize((width, height), Image.Resampling.LANCZOS), corner)
    return torch.from_numpy(np.asarray(mask, dtype=np.float32) / 255)


@lru_cache(maxsize=len(FONTS))
def _face(font: str):
    from matplotlib.ft2font import FT2Font
    from PIL import ImageFont

    return ImageFont.truetype(str(font_path(font)), 56), set(
        FT2Font(str(font_path(font))).get_charmap()
    )


@lru_cache(maxsize=1)
def glyph_bank() -> tuple[Tensor, Tensor]:
    """Every glyph in every font that has it.

    Returns:
        masks, float tensor, shape (M, 40, 40), in [0, 1]; class of each, shape (M,).
    """
    masks, classes = [], []
    for label, character in enumerate(GLYPHS):
        for font in FONTS:
            mask = render_glyph(character, font)
            if mask is not None:
                masks.append(mask)
                classes.append(label)
    return torch.stack(masks), torch.tensor(classes)


def composite(masks: Tensor, photo: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale, shear, shift and colour each mask, and lay it over a patch of the photograph.

    Args:
        masks: float tensor, shape (B, H, W), in [0, 1]; 1 is ink.
        photo: float tensor, shape (3, H', W'), in [0, 1].
        generator: the only source of chance.

    Returns:
        images, float tensor, shape (B, 3, 32, 32), in [-1, 1].
    """
    num = len(masks)
    draw = uniform_draws(num, generator)
    scale = 1 / draw(0.6, 1.0)
    theta = affine_matrices(
        angle=draw(-0.35, 0.35),
        scale_x=scale * draw(0.85, 1.18),
        scale_y=scale * draw(0.85, 1.18),
        shear=draw(-0.2, 0.2),
        shift=draw(-0.22, 0.22, 2),
    )
    grid = F.affine_grid(theta, [num, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    ink = F.grid_sample(masks.unsqueeze(1), grid, align_corners=False).clamp(0, 1)  # (B, 1, 32, 32)
    patches = photo_patches(photo, num, generator)
    level = patches.mean(dim=(1, 2, 3))
    # Ink differs from its patch by 0.3 to 0.7 in brightness, towards the side with more room.
    target = level + torch.where(level > 0.5, -1.0, 1.0) * draw(0.3, 0.7)
    colour = (target.view(-1, 1) + draw(-0.25, 0.25, 3)).clamp(0, 1).view(-1, 3, 1, 1)
    opacity = ink * draw(0.7, 1.0).view(-1, 1, 1, 1)
    images = patches * (1 - opacity) + colour * opacity
    noise = torch.randn(images.shape, generator=generator) * draw(0, 0.06).view(-1, 1, 1, 1)
    return (images + noise).clamp(0, 1) * 2 - 1


def uniform_draws(
    num: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Callable[..., Tensor]:
    """A function ``draw(low, high, *shape)`` that gives uniform numbers, shape (num, *shape).

    They are drawn where the generator is and then moved, so a device gets the same numbers.
    """

    def draw(low: float, high: float, *shape: int) -> Tensor:
        numbers = torch.rand(num, *shape, generator=generator, device=generator.device)
        return (numbers * (high - low) + low).to(device, non_blocking=True)

    return draw


def affine_matrices(
    angle: Tensor, scale_x: Tensor, scale_y: Tensor, shear: Tensor, shift: Tensor
) -> Tensor:
    """Matrices for ``torch.nn.functional.affine_grid`` (output to input coordinates).

    Args:
        angle: rotation in radians, shape (B,).
        scale_x, scale_y: above 1 shrinks the picture, shape (B,).
        shear: shape (B,).
        shift: in half image widths, shape (B, 2).

    Returns:
        float tensor, shape (B, 2, 3).
    """
    cos, sin = torch.cos(angle), torch.sin(angle)
    row_x = torch.stack([cos * scale_x, (shear * cos - sin) * scale_x, shift[:, 0]], dim=1)
    row_y = torch.stack([sin * scale_y, (shear * sin + cos) * scale_y, shift[:, 1]], dim=1)
    return torch.stack([row_x, row_y], dim=1)


def photo_patches(photo: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Random patches of a photograph, 32 to 96 pixels wide, half of them mirrored.

    Returns:
        float tensor, shape (num, 3, 32, 32), in the photograph's range.
    """
    _, height, width = photo.shape
    stride = torch.randint(1, 4, (num, 1), generator=generator)  # one pixel in 1, 2 or 3
    span = stride * (IMAGE_SIZE - 1) + 1
    top = (torch.rand(num, 1, generator=generator) * (height - span)).long()
    left = (torch.rand(num, 1, generator=generator) * (width - span)).long()
    steps = torch.arange(IMAGE_SIZE).view(1, -1) * stride
    mirrored = torch.rand(num, 1, generator=generator) < 0.5
    columns = left + torch.where(mirrored, span - 1 - steps, steps)
    rows = top + steps
    return photo[:, rows[:, :, None], columns[:, None, :]].transpose(0, 1)


def soften(masks: Tensor, generator: torch.Generator) -> Tensor:
    """Redraw each mask through a coarse grid of 7 to 20 cells, as a low-resolution scan would.

    The target's digits were scanned at 8 x 8, so their strokes are round and thick; without
    this step source and target would differ in sharpness as well as in shape.
    """
    sizes = torch.tensor([7, 8, 10, 13, 20])
    choice = torch.randint(len(sizes), (len(masks),), generator=generator)
    softened = torch.empty_like(masks)
    for index, size in enumerate(sizes.tolist()):
        rows = choice == index
        if rows.any():
            coarse = F.interpolate(masks[rows].unsqueeze(1), size=(size, size), mode="area")
            softened[rows] = enlarge(coarse.squeeze(1) * 1.3)
    return softened


def enlarge(coarse: Tensor) -> Tensor:
    """Bicubic enlargement to 40 x 40, then contrast, so that strokes have an edge again.

    Args:
        coarse: float tensor, shape (B, h, w), about [0, 1].

    Returns:
        float tensor, shape (B, 40, 40), in [0, 1].
    """
    smooth = F.interpolate(
        coarse.unsqueeze(1), size=(MASK_SIZE, MASK_SIZE), mode="bicubic", align_corners=False
    ).squeeze(1)
    return ((smooth - 0.25) / 0.4).clamp(0, 1)


def glyph_batch(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A fresh batch of glyph scenes over the "china" photograph.

    Returns:
        images, shape (num, 3, 32, 32), in [-1, 1]; labels, shape (num,), in [0, len(GLYPHS)).
    """
    return mask_batch(glyph_bank(), num, generator)


def mask_batch(
    bank: tuple[Tensor, Tensor],
    num: int,
    generator: torch.Generator,
    photo: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a class, then one of its masks, and compose a scene.

    Args:
        bank: masks, shape (M, 40, 40), in [0, 1], and the class of each, in ascending order.
        num: scenes.
        generator: the only source of chance.
        photo: shape (3, H, W), in [0, 1]; None is the "china" photograph.

    Returns:
        images, shape (num, 3, 32, 32), in [-1, 1]; labels, shape (num,).
    """
    masks, classes = bank
    wanted = torch.randint(int(classes[-1]) + 1, (num,), generator=generator)
    starts = torch.searchsorted(classes, wanted)
    counts = torch.searchsorted(classes, wanted, right=True) - starts
    rows = starts + (torch.rand(num, generator=generator) * counts).long()
    chosen = masks[rows]
    crisp = torch.rand(num, 1, 1, generator=generator) < 0.3
    chosen = torch.where(crisp, chosen, soften(chosen, generator))
    return composite(chosen, photograph("china") if photo is None else photo, generator), wanted
