# %% [markdown]
# # Exercise 16: quantised fine-tuning
#
# You round a matrix to eight bits, place levels at quantiles, pack codes into bytes and get the weights
# back, and write the backward pass through a layer of four bits. Then a colleague is short of memory, and
# has a plan.
#
# | question | | points |
# |---|---|---|
# | 1 | eight bits, one step per row | 3 |
# | 2 | levels at quantiles | 3 |
# | 3 | two codes in a byte | 2 |
# | 4 | from bytes back to weights | 4 |
# | 5 | the backward pass over a frozen quantised weight | 4 |
# | 6 | judgement, in your own words | 4 |
#
# **How it works.** Replace each `raise NotImplementedError(...)` by your answer, run the cell,
# and then the check below it. It says *right*, or shows the first input on which your answer
# differs, with a hint. Try as often as you like: a check costs nothing and records nothing. Most
# right answers unlock something to look at.

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %%
import numpy as np
from scipy.special import ndtri

BLUE, ORANGE, GREEN = tl.plots.palette[:3]

# %% [markdown]
# Your answers will be tried on a real matrix of MiniLM: the one with the weight at 175 deviations.

# %%
minilm = tl.load_backbone("minilm")
spiked = minilm.get_submodule("body.encoder.layer.0.output.dense").weight.detach().numpy()
spiked = spiked.astype(np.float64)  # (384, 1536)


def relative_error(W, rounded):
    return np.sqrt(np.mean((rounded - W) ** 2) / np.mean(W**2))


# %% [markdown]
# ## Question 1. Eight bits, one step per row (3 points)
#
# For each row, the step is its largest absolute value over 127, and the codes are the weights over the
# step, rounded to the nearest whole number. A row of zeros gets the step 0 and codes 0, without a warning.


# %% question="16.q1"
def int8_rows(W):
    """Absmax quantisation to 8 bits, one step for each row.

    Dettmers et al. 2023, equation 1, arXiv:2305.14314.

    Args:
        W: shape (n, d).

    Returns:
        Dict with "codes", whole numbers in -127, ..., 127 of an integer dtype, shape (n, d), and
        "step", shape (n,).
    """
    ### BEGIN SOLUTION
    step = np.abs(W).max(axis=1) / 127
    safe = np.where(step > 0, step, 1)
    return {"codes": np.round(W / safe[:, None]).astype(np.int64), "step": step}
    ### END SOLUTION


# %% check="16.q1"
right_1 = tl.check("16.q1", int8_rows)

# %% [markdown]
# When it is right: which rows of the real matrix suffer?

# %%
if right_1:
    found = int8_rows(spiked)
    rows = np.abs(found["codes"] * found["step"][:, None] - spiked).mean(axis=1)
    ax = tl.plots.subplots(figsize=(7.5, 2.6))[1]
    ax.semilogy(rows, ".", color=BLUE)
    ax.set(xlabel="row", ylabel="mean absolute error")
    tl.plots.alt(
        ax, f"Errors of 384 rows on a log scale: most alike, row {rows.argmax()} far above."
    )

# %% [markdown]
# ## Question 2. Levels at quantiles (3 points)
#
# The recipe of NF4, for any number of levels: `below` negative ones, an exact zero, `above` positive ones.
# The positive ones are normal quantiles at shares that go from $\frac12$ (which is the zero itself) to `top`
# in `above` equal steps; the negative ones likewise, in `below` steps, with a minus. All are divided by the
# largest. `ndtri(p)` is the quantile of a standard normal distribution.


# %% question="16.q2"
def quantile_levels(below, above, top):
    """Levels of a normal float.

    Dettmers et al. 2023, section 3, arXiv:2305.14314.

    Args:
        below, above: at least 1.
        top: share of the normal distribution below the largest level, in (0.5, 1).

    Returns:
        Ascending levels from -1 to 1, one of them exactly 0, shape (below + 1 + above,).
    """
    ### BEGIN SOLUTION
    positive = ndtri(np.linspace(0.5, top, above + 1)[1:])
    negative = -ndtri(np.linspace(0.5, top, below + 1)[1:])
    return np.concatenate([negative[::-1], [0.0], positive]) / ndtri(top)
    ### END SOLUTION


# %% check="16.q2"
right_2 = tl.check("16.q2", quantile_levels)

# %%
if right_2:
    for bits in (2, 3, 4):
        half = 2 ** (bits - 1)
        top = 1 - (1 / (2 * half) + 1 / (2 * half - 1)) / 4
        print(f"NF{bits}:", quantile_levels(half - 1, half, top).round(3))

# %% [markdown]
# ## Question 3. Two codes in a byte (2 points)
#
# The first of two codes goes into the high half of the byte, the second into the low half. If the
# number of codes is odd, the last byte has a zero in its low half.


# %% question="16.q3"
def pack(codes):
    """Two codes of four bits in each byte.

    Args:
        codes: whole numbers in 0, ..., 15, shape (n,), n >= 1.

    Returns:
        Bytes (uint8), shape (ceil(n / 2),).
    """
    ### BEGIN SOLUTION
    pairs = np.append(codes, 0)[: len(codes) + len(codes) % 2].reshape(-1, 2)
    return (16 * pairs[:, 0] + pairs[:, 1]).astype(np.uint8)
    ### END SOLUTION


# %% check="16.q3"
right_3 = tl.check("16.q3", pack)

# %% [markdown]
# ## Question 4. From bytes back to weights (4 points)
#
# Unpack the bytes; look up each code's level; multiply by the scale of its block. A block is a run of
# `block_size` weights, and the last one may be shorter. There are `count` weights: with an odd count the
# last half byte is only filling.


# %% question="16.q4"
def decode(packed, count, levels, scales, block_size):
    """Weights from packed codes.

    Args:
        packed: bytes as of question 3, shape (ceil(count / 2),), uint8.
        count: number of weights.
        levels: shape (16,).
        scales: one for each block, shape (ceil(count / block_size),).
        block_size: weights in a block, >= 1; not always even.

    Returns:
        Weights, shape (count,).
    """
    ### BEGIN SOLUTION
    codes = np.stack([packed // 16, packed % 16], axis=1).ravel()[:count]
    block = np.arange(count) // block_size
    return levels[codes] * scales[block]
    ### END SOLUTION


# %% check="16.q4"
right_4 = tl.check("16.q4", decode)

# %% [markdown]
# When both are right: the real matrix through your own bytes, in blocks of different sizes.

# %%
if right_2 and right_3 and right_4:
    levels = quantile_levels(7, 8, 1 - (1 / 32 + 1 / 30) / 2)
    middles = (levels[1:] + levels[:-1]) / 2
    for size in (16, 64, 256, 4096, spiked.size):
        blocks = spiked.reshape(-1, size)
        scales = np.abs(blocks).max(axis=1)
        codes = np.searchsorted(middles, blocks / scales[:, None]).ravel()
        back = decode(pack(codes), spiked.size, levels, scales, size).reshape(spiked.shape)
        print(
            f"block {size:6}: {4 + 32 / size:5.3f} bits, error {relative_error(spiked, back):.3f}"
        )

# %% [markdown]
# ## Question 5. The backward pass over a frozen quantised weight (4 points)
#
# The layer is $y = D x + \frac{\alpha}{r} B A x$ for each example $x$, with $D_{jk} = s_j\, \ell_{c_{jk}}$:
# the levels $\ell$, looked up by the codes, times a scale for each row. You get the inputs of $n$
# examples and $\partial L / \partial y$. Return the gradients of everything that needs one.


# %% question="16.q5"
def backward(codes, levels, scales, A, B, alpha, X, G):
    """Gradients through LoRA on a quantised weight.

    Args:
        codes: whole numbers, shape (o, i).
        levels: shape (16,).
        scales: one for each row, shape (o,).
        A: shape (r, i). B: shape (o, r).
        alpha: strength of LoRA.
        X: inputs, shape (n, i).
        G: gradient of the loss by the outputs, shape (n, o); nothing is left to average.

    Returns:
        Dict with the gradients "A", "B" and "X", in the shapes of A, B and X.
    """
    ### BEGIN SOLUTION
    D = levels[codes] * scales[:, None]
    gamma = alpha / len(A)
    return {
        "A": gamma * (G @ B).T @ X,
        "B": gamma * G.T @ (X @ A.T),
        "X": G @ D + gamma * (G @ B) @ A,
    }
    ### END SOLUTION


# %% check="16.q5"
right_5 = tl.check("16.q5", backward)

# %% [markdown]
# ## Question 6. Judgement (4 points)
#
# A colleague writes:
#
# > "Our encoder has 300 million parameters, 200 million of them embeddings. We fine-tune it by LoRA in bf16
# > on texts of 4,000 tokens, and the 24 GB card is full. Plan: (a) the linear layers in four bits. With one
# > scale per matrix, not per block, we save the extra half bit. (b) That should also make training about
# > four times as fast. (c) A trial of LoRA on int4 gave 81.5 % on our 200 test texts, LoRA on bf16 82.0 %: so
# > four bits cost half a point, which we can live with. (d) At the end we merge the adapter and store the
# > result in four bits again."
#
# Answer in about 170 words. Take the four points in turn: what is wrong with each, with numbers where you
# can give them, and what would you do instead?

# %% [markdown] question="16.q6"
# **Your answer**
#
# <!-- BEGIN SOLUTION -->
# (a) The base is not what fills the card: 300 million parameters in bf16 are 0.6 GB, and four bits save at
# most 100 million times 1.5 bytes, 0.15 GB. With 4,000 tokens it is the activations: smaller batches
# with accumulation, shorter texts, or checkpointing. And one scale per matrix hands every matrix to its
# largest weight; a single outlier rounds all others to zero. Blocks of 64 with quantised scales cost 0.127
# bits, not a half.
#
# (b) No: the weights are dequantised and then multiplied as before, so it is slower on a CPU and not
# four times faster on a GPU either. Measure it.
#
# (c) Half a point is one text of 200, in one run. It shows neither a loss nor none. Five or more
# paired draws, the same batches and starts, the interval of the difference.
#
# (d) Rounding the sum again has an error as large as the update or larger, so much of what was learned is
# lost. Keep the adapter beside the base, or merge into bf16; in any case evaluate what is shipped.
# <!-- END SOLUTION -->

# %% [markdown]
# ## If you want more (not graded)
#
# - Write a Lloyd step with weights $s_i^2$, and show that it never raises the error.
# - How many bits per weight does double quantisation cost with blocks of 32 and 128?
# - Quantise MiniLM's word embeddings, too. What does the probe say?
