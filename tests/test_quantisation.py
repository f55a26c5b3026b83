from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tlcourse import quantisation
from tlcourse.quantisation import (
    Quantised,
    QuantisedScales,
    dequantise,
    double_quantise,
    int4_levels,
    nf4_levels,
    quantise_blockwise,
    quantise_int8,
)

PUBLISHED_NF4 = [  # QLoRA, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
LEVELS = {"nf4": nf4_levels, "int4": int4_levels}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_nf4_levels_are_the_published_ones() -> None:
    levels = nf4_levels()
    torch.testing.assert_close(levels, torch.tensor(PUBLISHED_NF4), atol=1e-6, rtol=0)
    assert levels[7] == 0 and levels[0] == -1 and levels[15] == 1


def test_nf4_levels_split_the_normal_distribution_evenly() -> None:
    """Each level serves about as many values, where evenly spaced ones do not."""
    top = torch.special.ndtri(torch.tensor(quantisation.NF4_TOP, dtype=torch.float64))

    def shares(levels: Tensor) -> Tensor:
        bounds = top * (levels[1:] + levels[:-1]).double() / 2
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        return torch.cat([ends[:1], torch.special.ndtr(bounds), ends[1:]]).diff()

    nf4, even = shares(nf4_levels()), shares(int4_levels())
    assert nf4.min() > 0.03 and nf4.max() < 0.08
    assert even.max() / even.min() > 2 * nf4.max() / nf4.min()


def test_int4_levels_are_symmetric_and_even() -> None:
    levels = int4_levels()
    assert len(levels) == 15 and levels[7] == 0 and levels[-1] == 1
    torch.testing.assert_close(levels, -levels.flip(0))
    torch.testing.assert_close(levels.diff(), torch.full((14,), 1 / 7))


def unpacked(quantised: Quantised) -> Tensor:
    """By arithmetic, byte for byte."""
    codes = [code for byte in quantised.codes.tolist() for code in divmod(byte, 16)]
    return torch.tensor(codes[: quantised.shape.numel()])


def by_hand(x: Tensor, levels: Tensor, block_size: int) -> tuple[list[int], list[float]]:
    """Codes and scales, one value after another, in double precision."""
    values = x.flatten().double()
    codes, scales = [], []
    for start in range(0, len(values), block_size):
        block = values[start : start + block_size]
        scales.append(block.abs().max().item())
        for value in block:
            distances = (value / (scales[-1] or 1.0) - levels.double()).abs()
            codes.append(int(distances.argmin()))
    return codes, scales


SHAPES = [(64,), (5,), (1,), (3, 64), (7, 9), (2, 3, 43), ()]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("block_size", [64, 10, 1])
def test_codes_are_the_nearest_levels(shape: tuple, levels: str, block_size: int) -> None:
    x, table = torch.randn(shape), LEVELS[levels]()
    quantised = quantise_blockwise(x, table, block_size)
    codes, scales = by_hand(x, table, block_size)
    assert unpacked(quantised).tolist() == codes
    assert quantised.scales.tolist() == scales
    assert quantised.codes.numel() == -(-x.numel() // 2) and quantised.codes.dtype == torch.uint8
    expected = [table[c].item() * scales[i // block_size] for i, c in enumerate(codes)]
    found = dequantise(quantised)
    assert found.shape == x.shape and found.dtype == x.dtype
    torch.testing.assert_close(found, torch.tensor(expected).view(shape))


def test_any_levels_will_do() -> None:
    x = torch.randn(100)
    for levels in (torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([-0.3, 0.9])):
        quantised = quantise_blockwise(x, levels, 7)
        assert unpacked(quantised).tolist() == by_hand(x, levels, 7)[0]


def test_every_pair_of_codes_survives_packing() -> None:
    levels = nf4_levels()
    pairs = torch.cartesian_prod(levels, levels)  # each of the 256 bytes once
    x = torch.cat([pairs.flatten(), torch.ones(1)])  # an odd number of values
    quantised = quantise_blockwise(x, levels, block_size=len(x))
    assert quantised.codes.tolist() == [*range(256), 15 * 16]
    assert torch.equal(dequantise(quantised), x)


def test_quantising_again_changes_nothing() -> None:
    once = dequantise(quantise_blockwise(torch.randn(5, 77)))
    assert torch.equal(dequantise(quantise_blockwise(once)), once)


def test_zeros_stay_zeros() -> None:
    x = torch.randn(4, 64)
    x[1], x[2, ::2] = 0.0, 0.0
    for quantised in (quantise_blockwise(x), double_quantise(quantise_blockwise(x), 2)):
        found = dequantise(quantised)
        assert torch.equal(found[x == 0], torch.zeros(96))
    assert not dequantise(quantise_blockwise(torch.zeros(130))).any()
    assert not dequantise(double_quantise(quantise_blockwise(torch.zeros(130)))).any()


@pytest.mark.parametrize("levels", LEVELS)
def test_error_is_at_most_half_a_gap_of_the_block(levels: str) -> None:
    x, table = torch.randn(50, 64), LEVELS[levels]()
    quantised = quantise_blockwise(x, table)
    error = (dequantise(quantised) - x).abs().amax(dim=1)
    bound = table.diff().max() / 2 * x.abs().amax(dim=1)
    assert (error <= bound * (1 + 1e-6)).all()
    assert (error > 0.5 * bound).any()  # the bound is no idle one
    largest = x.abs().argmax(dim=1)
    rows = torch.arange(50)
    assert torch.equal(dequantise(quantised)[rows, largest], x[rows, largest])  # exactly +-absmax


def paired_differences(draw: Callable[[int, int], Tensor], rival: Tensor) -> tuple[float, float]:
    """95 % interval of the NF4 error minus the rival's, relative to the rival's, 12 draws."""
    ratios = []
    for _ in range(12):
        x = draw(64, 64)
        ours, theirs = (
            (dequantise(quantise_blockwise(x, levels)) - x).square().mean().item()
            for levels in (nf4_levels(), rival)
        )
        ratios.append(ours / theirs - 1)
    values = torch.tensor(ratios)
    half = 2.201 * values.std().item() / math.sqrt(len(ratios))  # Student's t, 11 degrees
    return values.mean().item() - half, values.mean().item() + half


@pytest.mark.parametrize("rival", [int4_levels(), torch.linspace(-1, 1, 16)])
def test_nf4_is_better_on_normal_weights_and_worse_on_uniform_ones(rival: Tensor) -> None:
    assert paired_differences(torch.randn, rival)[1] < -0.1
    assert paired_differences(lambda *shape: 2 * torch.rand(*shape) - 1, rival)[0] > 0.3


def test_smaller_blocks_cost_bits_and_save_error() -> None:
    x = torch.randn(256, 256)
    errors, bits = [], []
    for block_size in (16, 64, 256, 1024):
        quantised = quantise_blockwise(x, block_size=block_size)
        errors.append((dequantise(quantised) - x).square().mean().item())
        bits.append(quantised.bits_per_weight)
        assert bits[-1] == 4 + 32 / block_size
    assert errors == sorted(errors) and bits == sorted(bits, reverse=True)


def test_double_quantisation_costs_an_eighth_of_a_bit() -> None:
    x = 0.02 * torch.randn(64, 256 * 16)  # 16 blocks of 256 scales
    single = quantise_blockwise(x)
    double = double_quantise(single)
    assert single.bits_per_weight == 4.5
    scales = 8 / 64 + 32 / (64 * 256)
    assert double.bits_per_weight == 4 + scales + 32 / x.numel()  # and one mean
    assert f"{4 + scales:.3f}" == "4.127"
    assert double.nbytes == x.numel() // 2 + 4096 + 16 * 4 + 4


def test_double_quantisation_is_near_in_every_block_of_scales() -> None:
    x = torch.randn(70, 640) * torch.rand(70, 1)  # 700 scales: two blocks and a part
    single = quantise_blockwise(x)
    double = double_quantise(single)
    assert isinstance(double.scales, QuantisedScales) and double.scales.codes.dtype == torch.int8
    assert len(double.scales.codes) == 700 and len(double.scales.steps) == 3
    found = dequantise(double.scales)
    for start, stop in ((0, 256), (256, 512), (512, 700)):
        part = single.scales[start:stop]
        step = (part - single.scales.mean()).abs().max() / 127
        error = (found[start:stop] - part).abs().max()
        assert step / 10 < error <= step / 2 * (1 + 1e-4)
    assert torch.equal(double.codes, single.codes)
    rough, rougher = ((dequantise(q) - x).square().mean() for q in (single, double))
    assert rougher < 1.01 * rough and not torch.equal(rough, rougher)


def test_subtracting_the_mean_pays() -> None:
    """Scales are positive: without it, half of the signed codes would go unused."""
    single = quantise_blockwise(torch.randn(256, 256))
    with_mean = dequantise(double_quantise(single).scales)
    without = dequantise(quantise_int8(single.scales.view(-1, 256), per_row=True)).flatten()
    errors = [(found - single.scales).square().mean() for found in (with_mean, without)]
    assert errors[0] < errors[1] / 2


def test_double_quantised_scales_are_never_negative() -> None:
    single = quantise_blockwise(torch.randn(2560, 64) * torch.rand(2560, 1) ** 8)
    scales = double_quantise(single).scales
    steps = scales.steps.repeat_interleave(256)
    assert (scales.codes * steps + scales.mean).min() < 0  # they would be
    assert dequantise(scales).min() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(3, 70).to(dtype)
    quantised = quantise_blockwise(x)
    found = dequantise(quantised)
    assert found.dtype == dtype and quantised.scales.dtype == torch.float32
    expected = dequantise(quantise_blockwise(x.float())).to(dtype)
    assert torch.equal(found, expected)
    assert dequantise(quantise_int8(x)).dtype == dtype


def test_any_memory_layout() -> None:
    x = torch.randn(70, 3).T
    assert torch.equal(
        dequantise(quantise_blockwise(x)), dequantise(quantise_blockwise(x.contiguous()))
    )


def test_takes_a_parameter_and_keeps_no_graph() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 70))
    assert not dequantise(quantise_blockwise(weight)).requires_grad
    assert not dequantise(quantise_int8(weight)).requires_grad


def test_int8_is_the_formula_of_the_paper() -> None:
    x = torch.randn(5, 3, 40) * torch.rand(5, 3, 1) * 10
    whole = quantise_int8(x)
    assert torch.equal(whole.codes, torch.round(x * (127 / x.abs().max())).to(torch.int8))
    assert whole.codes.abs().max() == 127 and whole.step.shape == ()
    rows = quantise_int8(x, per_row=True)
    absmax = x.abs().amax(dim=-1, keepdim=True)
    assert torch.equal(rows.codes, torch.round(x * (127 / absmax)).to(torch.int8))
    assert rows.step.shape == (5, 3, 1)
    for quantised in (whole, rows):
        assert ((dequantise(quantised) - x).abs() <= quantised.step / 2 * (1 + 1e-5)).all()
    errors = [(dequantise(q) - x).square().mean() for q in (whole, rows)]
    assert errors[1] < errors[0] / 2
    assert whole.nbytes == 600 + 4 and rows.nbytes == 600 + 15 * 4


def test_int8_of_zeros() -> None:
    x = torch.randn(3, 4)
    x[1] = 0.0
    assert not dequantise(quantise_int8(x, per_row=True))[1].any()
    assert not dequantise(quantise_int8(torch.zeros(4))).any()


def test_one_outlier_spoils_its_block_alone() -> None:
    """Why blocks (Dettmers et al. 2023, section 2)."""
    x = torch.randn(64, 64)
    x[0, 0] = 1000.0
    error = (dequantise(quantise_blockwise(x)) - x)[1:].square().mean()
    one_block = (dequantise(quantise_blockwise(x, block_size=x.numel())) - x)[1:].square().mean()
    assert one_block > 0.9 * x[1:].square().mean()  # all else becomes zero
    assert error < 0.02


def test_equals_bitsandbytes() -> None:
    reference = pytest.importorskip("bitsandbytes").functional
    x = torch.randn(33, 64)
    codes, state = reference.quantize_4bit(x, blocksize=64, quant_type="nf4")
    ours = quantise_blockwise(x)
    assert torch.equal(codes.flatten(), ours.codes)
    assert torch.equal(state.absmax, ours.scales)
    torch.testing.assert_close(
        reference.dequantize_4bit(codes, state), dequantise(ours), atol=2e-6, rtol=0
    )


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([1.0, float("nan")]), "x must be finite, got nan"),
        (torch.tensor([1.0, float("inf")]), "x must be finite, got inf"),
        (torch.zeros(0, 3), r"not empty, got torch.float32, shape \(0, 3\)"),
        (torch.ones(3, dtype=torch.int64), "must be a floating tensor .* got torch.int64"),
    ],
)
def test_refuses_what_cannot_be_quantised(x: Tensor, message: str) -> None:
    for quantise in (quantise_blockwise, quantise_int8):
        with pytest.raises(ValueError, match=message):
            quantise(x)


def test_refuses_bad_settings() -> None:
    x = torch.randn(100)
    with pytest.raises(ValueError, match="block_size must be >= 1, got 0"):
        quantise_blockwise(x, block_size=0)
    with pytest.raises(ValueError, match="per_row needs a tensor of rows, got shape"):
        quantise_int8(x, per_row=True)
    for levels in ([0.0], [0.0, 0.0], [0.5, -0.5], [0.0, 1.5], [n / 20 for n in range(17)]):
        with pytest.raises(ValueError, match="levels must be 2 to 16 ascending numbers in"):
            quantise_blockwise(x, torch.tensor(levels))
    double = double_quantise(quantise_blockwise(x))
    with pytest.raises(ValueError, match="the scales are quantised already"):
        double_quantise(double)
    with pytest.raises(dataclasses.FrozenInstanceError):
        double.block_size = 3  # type: ignore[misc]
