"""Tensors in four and eight bits, after QLoRA: levels, blocks, and scales of scales."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_CODES = 16  # of four bits
# Share of the normal distribution below the largest NF4 level. Half a share is left above it,
# on the average of 15 and 16 equal shares: the 0.9677083 of bitsandbytes.
NF4_TOP = 1 - (1 / 15 + 1 / 16) / 4


def nf4_levels() -> Tensor:
    """The 16 levels of 4-bit NormalFloat, float32, ascending from -1 to 1, one exactly 0.

    Dettmers et al. 2023 (QLoRA), section 3 and appendix E, arXiv:2305.14314. Quantiles of the
    standard normal distribution, so that each level is used about equally often: 7 below zero
    and 8 above, scaled to end at -1 and 1. Equation 4 of the paper does not give the numbers of
    its appendix E; this recipe of its code (bitsandbytes) does.
    """

    def quantiles(count: int) -> Tensor:  # (count,), descending, all > 0
        shares = torch.linspace(NF4_TOP, 0.5, count + 1, dtype=torch.float64)[:-1]
        return torch.special.ndtri(shares)

    zero = torch.zeros(1, dtype=torch.float64)
    levels = torch.cat([-quantiles(7), zero, quantiles(8).flip(0)])
    return (levels / levels.max()).float()


def int4_levels() -> Tensor:
    """The 15 evenly spaced levels -7/7, ..., 7/7, float32, shape (15,).

    Four-bit integers in the manner of the paper's equation 1 (which has -127, ..., 127 for
    eight bits): symmetric around an exact zero, so that one of the 16 codes is not used.
    """
    return torch.arange(-7, 8) / 7


@dataclass(frozen=True)
class QuantisedScales:
    """Scales of blocks, themselves quantised to 8 bits (``double_quantise``).

    Attributes:
        codes: int8 tensor, shape (num_scales,), in [-127, 127].
        steps: float32 tensor, one step size for each block of codes.
        mean: float32 scalar tensor, subtracted before quantisation.
        block_size: scales in a block.
    """

    codes: Tensor
    steps: Tensor
    mean: Tensor
    block_size: int


@dataclass(frozen=True)
class Quantised:
    """A tensor in four bits: ``levels[code] * scale of its block``.

    Attributes:
        codes: uint8 tensor, two codes a byte, the first in the high half; an odd last code has
            a zero beside it.
        scales: largest absolute value of each block, float32, or their ``QuantisedScales``.
        levels: float32 tensor, at most 16, ascending.
        shape, dtype: of the tensor that was quantised.
        block_size: values in a block, in row-major order; the last block may be shorter.
    """

    codes: Tensor
    scales: Tensor | QuantisedScales
    levels: Tensor
    shape: torch.Size
    dtype: torch.dtype
    block_size: int

    @property
    def nbytes(self) -> int:
        """Codes and scales, without the table of levels, which all tensors can share."""
        s = self.scales
        scales = (s,) if isinstance(s, Tensor) else (s.codes, s.steps, s.mean)
        return sum(part.nbytes for part in (self.codes, *scales))

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.shape.numel()


@dataclass(frozen=True)
class QuantisedInt8:
    """A tensor in eight bits: ``codes * step``.

    Attributes:
        codes: int8 tensor of the shape that was quantised, in [-127, 127].
        step: float32 tensor; a scalar, or one for each row, shape (..., 1).
        dtype: of the tensor that was quantised.
    """

    codes: Tensor
    step: Tensor
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.step.nbytes


def quantise_blockwise(x: Tensor, levels: Tensor | None = None, block_size: int = 64) -> Quantised:
    """Round each value to the nearest level, after division by the largest of its block.

    Dettmers et al. 2023, section 2, arXiv:2305.14314. Ties go to the lower level. Blocks run
    through the tensor in row-major order, as in bitsandbytes.

    Args:
        x: floating tensor of any shape, finite, not empty.
        levels: ascending, 2 to 16 of them, within [-1, 1]; None: ``nf4_levels()``.
        block_size: >= 1; the paper takes 64.

    Raises:
        ValueError: if x or levels are not as above, or block_size is less than 1.
    """
    levels = (nf4_levels() if levels is None else levels).to(x.device, torch.float32)
    _check_levels(levels)
    blocks = _blocks(_finite(x).flatten(), block_size)
    scales = blocks.abs().amax(dim=1)
    # A block of zeros has scale 0: it is divided by 1, and decodes to zeros.
    unit = blocks / scales.where(scales > 0, 1.0)[:, None]
    midpoints = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(unit, midpoints).flatten()[: x.numel()].to(torch.uint8)
    pairs = F.pad(codes, (0, x.numel() % 2)).view(-1, 2)
    packed = pairs[:, 0] * NUM_CODES + pairs[:, 1]
    return Quantised(packed, scales, levels, x.shape, x.dtype, block_size)


def double_quantise(quantised: Quantised, block_size: int = 256) -> Quantised:
    """Quantise the scales of the blocks as well, to 8 bits.

    Dettmers et al. 2023, section 3, "Double Quantization", arXiv:2305.14314. The mean is
    subtracted first, since scales are positive and the codes symmetric. With blocks of 64 and
    256 the scales cost 8/64 + 32/(64 * 256) = 0.127 bits a weight in place of 0.5, and the
    mean 32 bits a tensor. Deliberate difference: evenly spaced int8 codes, where the paper has
    8-bit floats.

    Args:
        quantised: with float32 scales.
        block_size: scales in a block, >= 1.

    Raises:
        ValueError: if the scales are quantised already, or block_size is less than 1.
    """
    scales = quantised.scales
    if not isinstance(scales, Tensor):
        raise ValueError("the scales are quantised already")
    mean = scales.mean()
    codes, steps = _round_to_int8(_blocks(scales - mean, block_size))
    codes = codes.flatten()[: len(scales)]
    return replace(quantised, scales=QuantisedScales(codes, steps[:, 0], mean, block_size))


def quantise_int8(x: Tensor, per_row: bool = False) -> QuantisedInt8:
    """Absmax quantisation to 8 bits: ``round(127 / absmax * x)``.

    Dettmers et al. 2023, equations 1 and 2, arXiv:2305.14314.

    Args:
        x: floating tensor of any shape, finite, not empty.
        per_row: one step for each row (all but the last dimension) in place of one for all.

    Raises:
        ValueError: if x is not as above, or per_row is asked of fewer than two dimensions.
    """
    if per_row and x.ndim < 2:
        raise ValueError(f"per_row needs a tensor of rows, got shape {tuple(x.shape)}")
    rows = _finite(x).reshape(-1 if per_row else 1, x.shape[-1] if per_row else x.numel())
    codes, steps = _round_to_int8(rows)
    steps = steps.view(*x.shape[:-1], 1) if per_row else steps.view(())
    return QuantisedInt8(codes.view(x.shape), steps, x.dtype)


def dequantise(quantised: Quantised | QuantisedInt8 | QuantisedScales) -> Tensor:
    """The tensor that the codes stand for, in the dtype and shape that was quantised."""
    if isinstance(quantised, QuantisedInt8):
        return (quantised.codes * quantised.step).to(quantised.dtype)
    if isinstance(quantised, QuantisedScales):
        blocks = _blocks(quantised.codes.float(), quantised.block_size)
        scales = (blocks * quantised.steps[:, None]).flatten()[: len(quantised.codes)]
        return (scales + quantised.mean).clamp(min=0)  # largest absolute values: never negative
    kept = quantised.scales
    scales = kept if isinstance(kept, Tensor) else dequantise(kept)
    levels = F.pad(quantised.levels, (0, NUM_CODES - len(quantised.levels)))
    # One look-up for each byte: the pair of levels that it stands for.
    pairs = torch.stack([levels.repeat_interleave(NUM_CODES), levels.repeat(NUM_CODES)], dim=1)
    count = quantised.shape.numel()
    values = pairs[quantised.codes.int()].flatten()[:count]
    values = _blocks(values, quantised.block_size) * scales[:, None]
    return values.flatten()[:count].view(quantised.shape).to(quantised.dtype)


def _check_levels(levels: Tensor) -> None:
    fits = levels.ndim == 1 and 2 <= len(levels) <= NUM_CODES
    if not fits or not (levels.diff() > 0).all() or not (levels.abs() <= 1).all():
        raise ValueError(
            f"levels must be 2 to {NUM_CODES} ascending numbers in [-1, 1], got {levels.tolist()}"
        )


def _finite(x: Tensor) -> Tensor:
    """As float32."""
    if not x.is_floating_point() or x.numel() == 0:
        raise ValueError(
            f"x must be a floating tensor that is not empty, got {x.dtype}, shape {tuple(x.shape)}"
        )
    x = x.detach().float()
    if not x.isfinite().all():
        raise ValueError(f"x must be finite, got {x[~x.isfinite()][0].item()}")
    return x


def _blocks(x: Tensor, block_size: int) -> Tensor:
    """(N,) -> (num_blocks, block_size), the last one filled up with zeros."""
    if block_size < 1:
        raise ValueError(f"block_size must be >= 1, got {block_size}")
    return F.pad(x, (0, -len(x) % block_size)).view(-1, block_size)


def _round_to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, shape (R, C), and step of each row, shape (R, 1)."""
    steps = rows.abs().amax(dim=1, keepdim=True) / 127
    codes = (rows / steps.where(steps > 0, 1.0)).round().clamp(-127, 127)
    return codes.to(torch.int8), steps
