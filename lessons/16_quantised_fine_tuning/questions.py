"""Graded questions of lesson 16: int8 by rows, quantile levels, packing, decoding, backward."""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri

from tlcourse.checks import Question


def near(a: object, b: np.ndarray) -> bool:
    return isinstance(a, np.ndarray) and a.shape == b.shape and bool(np.allclose(a, b, rtol=1e-6))


# --- 16.q1 eight bits by rows --------------------------------------------------------------


def cases_q1(rng: np.random.Generator) -> list[tuple]:
    """Rows of one size, of very different sizes, the largest negative, and a row of zeros."""
    plain = rng.normal(size=(3, 4))
    sizes = rng.normal(size=(4, 6)) * np.array([1.0, 100.0, 0.01, 1.0])[:, None]
    negative = rng.uniform(0.1, 1, size=(3, 5))
    negative[np.arange(3), rng.integers(5, size=3)] = -2.5
    empty = rng.normal(size=(3, 5))
    empty[1] = 0
    return [(plain,), (sizes,), (negative,), (empty,)]


def _int8(W: np.ndarray, top: np.ndarray, parts: int = 127) -> dict:
    step = top / parts
    codes = np.round(W / np.where(step > 0, step, 1)[:, None])
    return {"codes": codes.astype(np.int64), "step": step}


def int8_rows(W: np.ndarray) -> dict:
    return _int8(W, np.abs(W).max(axis=1))


def _int8_floor(W):
    step = int8_rows(W)["step"]
    codes = np.trunc(W / np.where(step > 0, step, 1)[:, None] + 1e-9 * np.sign(W))
    return {"codes": codes.astype(np.int64), "step": step}


def _int8_nan(W):
    step = np.abs(W).max(axis=1) / 127
    with np.errstate(invalid="ignore"):
        return {"codes": np.round(W / step[:, None]), "step": step}


def _int8_rounded_weights(W):
    found = int8_rows(W)
    return found | {"codes": found["codes"] * found["step"][:, None]}


def hint_q1(case: tuple, expected: dict, got: object) -> str:
    W = case[0]
    if not isinstance(got, dict) or set(got) != {"codes", "step"}:
        return 'return a dict with "codes" and "step".'
    codes, step = got["codes"], got["step"]
    if isinstance(step, np.ndarray) and step.shape == (len(W), 1):
        return "step has the shape (n,)."
    if near(step, np.abs(W).max() / 127 * np.ones(len(W))) and len(set(expected["step"])) > 1:
        return "one step for each row, not one for all."
    if near(step, expected["step"] * 127 / 128):
        return "127, not 128: codes from -127 to 127."
    if near(step, W.max(axis=1) / 127):
        return "the largest *absolute* value."
    if isinstance(codes, np.ndarray) and not np.issubdtype(codes.dtype, np.integer):
        return "codes are whole numbers: .astype(int) at the end, and no division by 0 before it."
    if near(step, expected["step"]):
        return "the steps are right; round the codes to the nearest whole number."
    return "step: largest absolute value of the row over 127; codes: W / step, rounded."


# --- 16.q2 levels at quantiles -------------------------------------------------------------


def cases_q2(rng: np.random.Generator) -> list[tuple]:
    """NF4's own numbers of levels, few, one, and more below than above."""
    tops = rng.uniform(0.9, 0.99, size=4)
    return [
        (7, 8, float(tops[0])),
        (3, 4, float(tops[1])),
        (1, 2, float(tops[2])),
        (5, 2, float(tops[3])),
    ]


def quantile_levels(below: int, above: int, top: float) -> np.ndarray:
    positive = ndtri(np.linspace(0.5, top, above + 1)[1:])
    negative = -ndtri(np.linspace(0.5, top, below + 1)[1:])
    return np.concatenate([negative[::-1], [0.0], positive]) / ndtri(top)


def _levels_unscaled(below, above, top):
    return quantile_levels(below, above, top) * ndtri(top)


def _levels_swapped(below, above, top):
    return quantile_levels(above, below, top)


def _levels_even(below, above, top):
    return np.concatenate(
        [-np.arange(below, 0, -1) / below, [0.0], np.arange(1, above + 1) / above]
    )


def _levels_no_zero(below, above, top):
    return ndtri(np.linspace(1 - top, top, below + 1 + above)) / ndtri(top)


def _levels_short(below, above, top):
    """Shares from 1/2 to top in one step too few: the zero comes twice."""
    positive = ndtri(np.linspace(0.5, top, above))
    negative = -ndtri(np.linspace(0.5, top, below))
    return np.concatenate([negative[::-1], [0.0], positive]) / ndtri(top)


def hint_q2(case: tuple, expected: np.ndarray, got: object) -> str:
    below, above, top = case
    if not isinstance(got, np.ndarray) or got.shape != expected.shape:
        return f"one array of {below} + 1 + {above} levels."
    if near(got, _levels_unscaled(*case)):
        return "divide by the largest, ndtri(top), so that they end at -1 and 1."
    if near(got, _levels_swapped(*case)):
        return "`below` of them are negative, `above` are positive."
    if near(got, -expected[::-1]) or near(np.sort(got), expected):
        return "ascending, from -1 to 1."
    if not (got == 0).any():
        return "one level is exactly 0: build the two sides apart, and put 0 between them."
    if (got == 0).sum() > 1:
        return "zero comes once: linspace needs one point more, and its first is the zero itself."
    if near(got, _levels_even(*case)):
        return "equal steps in the *shares*, which ndtri turns into levels."
    return "ndtri(np.linspace(0.5, top, above + 1)[1:]) is the positive side, before scaling."


# --- 16.q3 two codes in a byte -------------------------------------------------------------


def cases_q3(rng: np.random.Generator) -> list[tuple]:
    """Even and odd numbers of codes, all sixteen, and a single one."""
    return [
        (rng.integers(16, size=6),),
        (rng.permutation(16),),
        (np.append(rng.integers(16, size=4), rng.integers(1, 16)),),
        (rng.integers(1, 16, size=1),),
    ]


def pack(codes: np.ndarray) -> np.ndarray:
    pairs = np.append(codes, 0)[: len(codes) + len(codes) % 2].reshape(-1, 2)
    return (16 * pairs[:, 0] + pairs[:, 1]).astype(np.uint8)


def _pack_low_first(codes):
    pairs = np.append(codes, 0)[: len(codes) + len(codes) % 2].reshape(-1, 2)
    return (16 * pairs[:, 1] + pairs[:, 0]).astype(np.uint8)


def _pack_drops(codes):
    return pack(codes[: len(codes) // 2 * 2])


def _pack_halves(codes):
    half = -(-len(codes) // 2)
    low = np.append(codes[half:], 0)[:half] if len(codes) % 2 else codes[half:]
    return (16 * codes[:half] + low).astype(np.uint8)


def _pack_fifteen(codes):
    pairs = np.append(codes, 0)[: len(codes) + len(codes) % 2].reshape(-1, 2)
    return (15 * pairs[:, 0] + pairs[:, 1]).astype(np.uint8)


def _pack_front(codes):
    """An odd number is filled up in front."""
    return pack(np.append(0, codes)) if len(codes) % 2 else pack(codes)


def hint_q3(case: tuple, expected: np.ndarray, got: object) -> str:
    codes = case[0]
    if near(got, _pack_low_first(codes)):
        return "the first code goes into the high half: 16 times the first, plus the second."
    if not isinstance(got, np.ndarray) or got.shape != expected.shape:
        return "an odd number of codes needs a last byte with a zero in its low half."
    if near(got, _pack_front(codes)):
        return "the filling comes at the end, not in front."
    if near(got, _pack_halves(codes)):
        return "*neighbours* share a byte: codes 0 and 1, codes 2 and 3, ..."
    if near(got, _pack_fifteen(codes)):
        return "a half byte has 16 values: shift by 16."
    return "16 * first + second, as np.uint8."


# --- 16.q4 from bytes to weights -----------------------------------------------------------


def cases_q4(rng: np.random.Generator) -> list[tuple]:
    """Whole blocks, a short last block, an odd count, an odd block, one block only."""
    levels = np.sort(rng.uniform(-1, 1, size=16))
    cases = []
    for count, block_size in ((12, 4), (14, 4), (13, 4), (11, 3), (8, 8), (7, 1)):
        codes = rng.integers(16, size=count)
        scales = rng.uniform(0.5, 5, size=-(-count // block_size))
        cases.append((pack(codes), count, levels, scales, block_size))
    return cases


def _unpack(packed: np.ndarray, count: int, low_first: bool = False) -> np.ndarray:
    halves = [packed % 16, packed // 16] if low_first else [packed // 16, packed % 16]
    return np.stack(halves, axis=1).ravel()[:count]


def decode(packed, count: int, levels, scales, block_size: int) -> np.ndarray:
    return levels[_unpack(packed, count)] * scales[np.arange(count) // block_size]


def _decode_low_first(packed, count, levels, scales, block_size):
    return levels[_unpack(packed, count, True)] * scales[np.arange(count) // block_size]


def _decode_tiled(packed, count, levels, scales, block_size):
    """Neighbours in different blocks."""
    return levels[_unpack(packed, count)] * scales[np.arange(count) % len(scales)]


def _decode_filling(packed, count, levels, scales, block_size):
    """Keeps the filling of an odd count."""
    n = 2 * len(packed)
    block = np.minimum(np.arange(n) // block_size, len(scales) - 1)
    return levels[_unpack(packed, n)] * scales[block]


def _decode_codes(packed, count, levels, scales, block_size):
    return _unpack(packed, count) * scales[np.arange(count) // block_size]


def _decode_unscaled(packed, count, levels, scales, block_size):
    return levels[_unpack(packed, count)]


def _decode_halves(packed, count, levels, scales, block_size):
    codes = np.concatenate([packed // 16, packed % 16])[:count]
    return levels[codes] * scales[np.arange(count) // block_size]


def _decode_divides(packed, count, levels, scales, block_size):
    return levels[_unpack(packed, count)] / scales[np.arange(count) // block_size]


def hint_q4(case: tuple, expected: np.ndarray, got: object) -> str:
    if isinstance(got, np.ndarray) and got.shape != expected.shape:
        return "exactly `count` weights: with an odd count the last half byte is filling."
    for wrong, text in (
        (_decode_low_first, "the first code is in the high half: packed // 16."),
        (_decode_unscaled, "multiply by the scale of the block."),
        (_decode_divides, "multiply by the scale; the division was on the way in."),
        (_decode_codes, "a code is the number of a level: levels[code]."),
        (_decode_halves, "high and low half take turns: byte 0 holds the codes 0 and 1."),
        (_decode_tiled, "weight k belongs to block k // block_size."),
    ):
        if near(got, wrong(*case)):
            return text
    return "levels[code] * scales[k // block_size] for weight k."


# --- 16.q5 the backward pass ---------------------------------------------------------------


def cases_q5(rng: np.random.Generator) -> list[tuple]:
    """B is zero at the start of training, and not later; one example, and many."""
    cases = []
    for n, o, i, r, start in ((4, 3, 5, 2, False), (1, 4, 3, 1, False), (6, 5, 4, 3, True)):
        B = np.zeros((o, r)) if start else rng.normal(size=(o, r))
        cases.append((
            rng.integers(16, size=(o, i)), np.sort(rng.uniform(-1, 1, size=16)),
            rng.uniform(0.5, 2, size=o), rng.normal(size=(r, i)), B,
            float(rng.integers(3, 9)) + 0.5, rng.normal(size=(n, i)), rng.normal(size=(n, o)),
        ))  # fmt: skip
    return cases


def _backward(codes, levels, scales, A, B, alpha, X, G, gamma=None, base=1.0, adapter=1.0):
    D = levels[codes] * scales[:, None]
    gamma = alpha / len(A) if gamma is None else gamma
    return {
        "A": gamma * (G @ B).T @ X,
        "B": gamma * G.T @ (X @ A.T),
        "X": base * G @ D + adapter * gamma * (G @ B) @ A,
    }


def backward(codes, levels, scales, A, B, alpha, X, G) -> dict:
    return _backward(codes, levels, scales, A, B, alpha, X, G)


def _averaged(*case):
    found = backward(*case)
    return found | {name: found[name] / len(case[6]) for name in ("A", "B")}


def _codes_as_weights(codes, levels, scales, *rest):
    return backward(codes, np.arange(16.0), scales, *rest)


def _no_scales(codes, levels, scales, *rest):
    return backward(codes, levels, np.ones_like(scales), *rest)


def _with_codes(*case):
    return backward(*case) | {"codes": case[7].T @ case[6]}


def _transposed(*case):
    found = backward(*case)
    return found | {name: found[name].T for name in ("A", "B")}


def _unit_scale(*case):
    return _backward(*case, gamma=1.0)


def _whole_alpha(*case):
    return _backward(*case, gamma=case[5])


def _no_base(*case):
    return _backward(*case, base=0.0)


def _no_adapter(*case):
    return _backward(*case, adapter=0.0)


def hint_q5(case: tuple, expected: dict, got: object) -> str:
    if not isinstance(got, dict):
        return 'return a dict with "A", "B" and "X".'
    if "codes" in got or not set(got) >= {"A", "B", "X"}:
        return 'exactly "A", "B" and "X": codes, levels and scales are frozen and need none.'

    def same(wrong: dict, names: tuple = ("A", "B", "X")) -> bool:
        return all(near(got[name], wrong[name]) for name in names)

    if same(expected, ("A", "B")):
        if same(_no_adapter(*case), ("X",)):
            return "X reaches the loss through the adapter as well."
        if same(_no_base(*case), ("X",)):
            return "the frozen weight is not trained, but it carries the gradient down: G @ D."
        return "X: G @ D + gamma G B A, with D the level of each code times the scale of its row."
    if same(_averaged(*case), ("A", "B")):
        return "G has it all: nothing is left to average over the examples."
    if same(_unit_scale(*case), ("A", "B")) or same(_whole_alpha(*case), ("A", "B")):
        return "the update is multiplied by alpha / r, and so are its gradients."
    shapes = {name: np.shape(got[name]) for name in ("A", "B", "X")}
    if any(shapes[name] != expected[name].shape for name in shapes):
        return "a gradient has the shape of what it belongs to."
    return "dB = gamma g (A x)^T and dA = gamma B^T g x^T, summed over the examples."


# --- 16.q6 judgement -----------------------------------------------------------------------

RUBRIC = """\
4 points; 1 for each, half marks allowed.
1. (a) Memory: sees that the base is small (0.6 GB in bf16; four bits save at most about 0.15 GB, as
   embeddings stay) and that activations of 4,000 tokens fill the card, with a remedy that fits
   (smaller batch, accumulation, shorter texts, checkpointing). One number is required.
2. (a) Scales: one scale per matrix leaves it to its largest weight (outlier); blocks of 64 with
   double quantisation cost 0.127 bits, or 0.5 without.
3. (b) and (c): not faster, since weights are dequantised and multiplied as before (slower on a CPU);
   half a point is one text of 200 in one run: paired draws and an interval are needed, and it is
   neither a loss nor its absence. Half a mark each.
4. (d) Rounding the merged weight again has an error of the size of the update: keep the adapter
   apart, or merge into bf16, and evaluate what is shipped.
"""

QUESTIONS = [
    Question(
        id="16.q1",
        title="Eight bits, one step per row",
        points=3,
        cases=cases_q1,
        expected=int8_rows,
        hint=hint_q1,
        wrong={
            "one step for all": lambda W: _int8(W, np.full(len(W), np.abs(W).max())),
            "128": lambda W: _int8(W, np.abs(W).max(axis=1), 128),
            "not absolute": lambda W: _int8(W, W.max(axis=1)),
            "cut off": _int8_floor,
            "0/0": _int8_nan,
            "weights, not codes": _int8_rounded_weights,
        },
    ),
    Question(
        id="16.q2",
        title="Levels at quantiles",
        points=3,
        cases=cases_q2,
        expected=quantile_levels,
        hint=hint_q2,
        wrong={
            "not scaled": _levels_unscaled,
            "sides swapped": _levels_swapped,
            "even levels": _levels_even,
            "no exact zero": _levels_no_zero,
            "zero twice": _levels_short,
            "descending": lambda *case: quantile_levels(*case)[::-1],
        },
    ),
    Question(
        id="16.q3",
        title="Two codes in a byte",
        points=2,
        cases=cases_q3,
        expected=pack,
        hint=hint_q3,
        wrong={
            "low half first": _pack_low_first,
            "odd one dropped": _pack_drops,
            "first half and second half": _pack_halves,
            "times 15": _pack_fifteen,
            "filled up in front": _pack_front,
        },
    ),
    Question(
        id="16.q4",
        title="From bytes back to weights",
        points=4,
        cases=cases_q4,
        expected=decode,
        hint=hint_q4,
        wrong={
            "low half first": _decode_low_first,
            "tiled scales": _decode_tiled,
            "keeps the filling": _decode_filling,
            "codes as weights": _decode_codes,
            "no scales": _decode_unscaled,
            "first all high halves": _decode_halves,
            "divided": _decode_divides,
        },
    ),
    Question(
        id="16.q5",
        title="The backward pass over a frozen quantised weight",
        points=4,
        cases=cases_q5,
        expected=backward,
        hint=hint_q5,
        wrong={
            "no alpha / r": _unit_scale,
            "alpha only": _whole_alpha,
            "frozen carries nothing": _no_base,
            "adapter carries nothing": _no_adapter,
            "codes as weights": _codes_as_weights,
            "no scales": _no_scales,
            "a gradient for the codes": _with_codes,
            "averaged": _averaged,
            "transposed": _transposed,
        },
    ),
    Question(
        id="16.q6",
        title="Judgement: a plan to save memory",
        points=4,
        manual=True,
        rubric=RUBRIC,
    ),
]
