# %% [markdown]
# # Exercise 17: Bake-off
#
# You count what twelve methods train without building one, send numbers through DoRA and back, correct for many
# comparisons, and turn a table of scores into verdicts. Then a table arrives in which the author's method wins.
#
# | question | | points |
# |---|---|---|
# | 1 | how many numbers does it train? | 3 |
# | 2 | DoRA, forwards and backwards | 4 |
# | 3 | Holm's correction | 3 |
# | 4 | verdicts from a table | 4 |
# | 5 | judgement, in your own words | 4 |
#
# **How it works.** Replace each `raise NotImplementedError(...)` by your answer, run the cell,
# and then the check below it. It says *right*, or shows the first input on which your answer
# differs, with a hint. Try as often as you like: a check costs nothing and records nothing. Most
# right answers unlock something to look at.

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %%
import json

import numpy as np
from scipy.special import stdtr

from tlcourse.locations import data_dir

BLUE, ORANGE = tl.plots.palette[:2]

# %% [markdown]
# ## Question 1. How many numbers does it train? (3 points)
#
# A BERT has `layers` layers of width $d$; the feed-forward has $f$ inner units. Each layer has four matrices of
# attention ($d \times d$, each with a bias), two of the feed-forward ($f \times d$ and $d \times f$, with biases) and two
# layer normalisations (scale and shift of $d$). One more normalisation sits behind the embeddings. `size` is the
# rank, the bottleneck, or the number of virtual tokens; other methods do not use it.
#
# - "BitFit": all biases, the shifts of the normalisations included;
# - "(IA)3": scales for keys, for values, and for the inputs of the second feed-forward matrix;
# - "bottleneck": two in each layer, down and up with biases, behind layers of $d$ outputs; normalisations stay frozen;
# - "LoRA", "DoRA": beside queries and values; DoRA trains a length for each output as well;
# - "prompt": vectors before the text; "prefix": a key and a value for each layer and virtual token;
# - "head": nothing but the head.
#
# Each trains the new head, too: one weight for each pair of class and feature, and a bias for each class.


# %% question="17.q1"
def trained_numbers(method, layers, d, f, classes, size):
    """How many numbers a method trains.

    Args:
        method: one of the names above.
        layers, d, f: of the BERT.
        classes: of the head.
        size: rank, bottleneck or number of virtual tokens.

    Returns:
        int, the head included.
    """
    ### BEGIN SOLUTION
    beside_the_head = {
        "head": 0,
        "BitFit": layers * (4 * d + f + d + 2 * d) + d,
        "(IA)3": layers * (2 * d + f),
        "bottleneck": 2 * layers * (2 * size * d + size + d),
        "LoRA": 2 * layers * size * 2 * d,
        "DoRA": 2 * layers * (size * 2 * d + d),
        "prompt": size * d,
        "prefix": size * 2 * layers * d,
    }
    return beside_the_head[method] + classes * d + classes
    ### END SOLUTION


# %% check="17.q1"
right_1 = tl.check("17.q1", trained_numbers)

# %% [markdown]
# When it is right: the same methods in a BERT-large (24 layers of width 1,024), 100 classes, size 16. How large is a
# file in float32?

# %%
if right_1:
    for method in ("head", "BitFit", "(IA)3", "bottleneck", "LoRA", "DoRA", "prompt", "prefix"):
        count = trained_numbers(method, 24, 1024, 4096, 100, 16)
        print(f"{method:12} {count:>12,} numbers {4 * count / 1e6:8.2f} MB")

# %% [markdown]
# ## Question 2. DoRA, forwards and backwards (4 points)
#
# $V = W + s\,BA$ has rows $v_j$; the layer uses $w'_j = m_j\, v_j / \lVert v_j \rVert$, and $H = X W'^\top$. You are given
# $D = \partial L / \partial H$. Return $H$ and the gradients of $m$ and $B$. If `constant_length` is true, the length
# $\lVert v_j \rVert$ counts as a constant in the backward pass, as in peft; if not, take the whole derivative. (First
# $G = D^\top X$, the gradient of $W'$.)


# %% question="17.q2"
def dora(X, W, A, B, m, s, D, constant_length):
    """A DoRA layer and its gradients.

    Liu et al. 2024, section 4.3, arXiv:2402.09353.

    Args:
        X: inputs, shape (n, i).
        W: frozen weight, shape (o, i).
        A: shape (r, i).
        B: shape (o, r).
        m: lengths, shape (o,).
        s: scale of BA.
        D: gradient of the loss with respect to H, shape (n, o).
        constant_length: whether the length of v_j counts as a constant.

    Returns:
        dict with "H", shape (n, o); "m", shape (o,); "B", shape (o, r).
    """
    ### BEGIN SOLUTION
    V = W + s * B @ A
    length = np.linalg.norm(V, axis=1, keepdims=True)  # (o, 1)
    direction = V / length
    G = D.T @ X  # (o, i)
    along = np.sum(G * direction, axis=1, keepdims=True)
    dV = m[:, None] / length * (G if constant_length else G - along * direction)
    return {"H": X @ (m[:, None] * direction).T, "m": along[:, 0], "B": s * dV @ A.T}
    ### END SOLUTION


# %% check="17.q2"
right_2 = tl.check("17.q2", dora)

# %% [markdown]
# When it is right: how far is the shortcut from the truth? Start from $B = 0$ and $m_j = \lVert w_j \rVert$, as training does,
# with inputs that have a mean (as features after a ReLU do) or none.

# %%
if right_2:
    rng = np.random.default_rng(0)
    W, A, B, D = (rng.normal(size=shape) for shape in ((8, 16), (3, 16), (8, 3), (50, 8)))
    for name, mean in {"without a mean": 0.0, "with a mean": 1.0}.items():
        X = rng.normal(mean, 1.0, (50, 16))
        start = (X, W, A, 0 * B, np.linalg.norm(W, axis=1), 2.0, D)
        quick, whole = (dora(*start, constant_length)["B"] for constant_length in (True, False))
        cosine = np.sum(quick * whole) / np.linalg.norm(quick) / np.linalg.norm(whole)
        print(f"inputs {name:15}: cosine of the two gradients of B {cosine:.3f}")

# %% [markdown]
# ## Question 3. Holm's correction (3 points)
#
# $k$ p values, in any order. Sorted, $p_{(1)} \le \dots \le p_{(k)}$; adjusted,
#
# $$\tilde p_{(j)} = \max_{l \le j} \min\left(1, (k - l + 1)\, p_{(l)}\right) .$$
#
# Return them in the order in which they came.


# %% question="17.q3"
def holm(p):
    """Adjusted p values.

    Holm 1979, Scandinavian Journal of Statistics 6.

    Args:
        p: numbers in [0, 1], shape (k,).

    Returns:
        array, shape (k,), in the order of p.
    """
    ### BEGIN SOLUTION
    order, k = np.argsort(p), len(p)
    adjusted = np.empty(k)
    adjusted[order] = np.maximum.accumulate(np.minimum(1, p[order] * np.arange(k, 0, -1)))
    return adjusted
    ### END SOLUTION


# %% check="17.q3"
right_3 = tl.check("17.q3", holm)

# %% [markdown]
# When it is right: what does the correction cost? Of twenty comparisons ten are null and ten have a real effect. How many
# real ones are found, and how often is a null called real?

# %%
if right_3:
    from scipy.special import ndtr

    rng, trials = np.random.default_rng(0), 1000
    z = np.abs(rng.normal(size=(trials, 20)) + np.array([0.0] * 10 + [3.0] * 10))
    p = 2 * ndtr(-z)
    adjusted = np.array([holm(row) for row in p])
    for name, values in {"none": p, "Holm": adjusted, "Bonferroni": 20 * p}.items():
        found = (values[:, 10:] < 0.05).mean()
        false = (values[:, :10] < 0.05).any(axis=1).mean()
        print(
            f"{name:10} finds {found:.0%} of the real effects; false alarm in {false:.0%} of trials"
        )

# %% [markdown]
# ## Question 4. Verdicts from a table (4 points)
#
# A table holds the accuracies of $M$ methods, one row each, on the same draws, one column each. Compare every *other* method
# with the reference, in the order of the table: the mean difference (method minus reference), the two-sided p of
# Student's **paired** test, **adjusted by Holm** over the $M - 1$ comparisons, and a word: "better" or "worse" if the
# adjusted p is below `level`, else "tie".
#
# `stdtr(df, t)` is the probability that Student's $t$ with `df` degrees of freedom is at most `t`.


# %% question="17.q4"
def verdicts(scores, reference, level):
    """Compare all methods with one of them.

    Args:
        scores: accuracies, shape (M, draws).
        reference: row of the reference.
        level: such as 0.05.

    Returns:
        dict with "difference" and "p", shape (M - 1,), and "words", a list of M - 1 strings.
    """
    ### BEGIN SOLUTION
    d = np.delete(scores, reference, axis=0) - scores[reference]
    n = d.shape[1]
    t = d.mean(axis=1) / (d.std(axis=1, ddof=1) / np.sqrt(n))
    p = 2 * stdtr(n - 1, -np.abs(t))
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(np.minimum(1, p[order] * np.arange(len(p), 0, -1)))
    words = [
        "tie" if q >= level else "better" if gap > 0 else "worse"
        for q, gap in zip(adjusted, d.mean(axis=1))
    ]
    return {"difference": d.mean(axis=1), "p": adjusted, "words": words}
    ### END SOLUTION


# %% check="17.q4"
right_4 = tl.check("17.q4", verdicts)

# %% [markdown]
# When it is right: the bake-off of the lesson, images, with LoRA as the reference in place of full fine-tuning. Are two
# methods that tie with a third tied with each other?

# %%
if right_4:
    recorded = json.loads((data_dir() / "results" / "bake_off.json").read_text("utf-8"))
    table = recorded["tasks"]["vision"]["scores"]
    names, scores = list(table), np.array(list(table.values()))
    for reference in ("LoRA", "DoRA", "full fine-tuning"):
        row = names.index(reference)
        words = dict(zip(names[:row] + names[row + 1 :], verdicts(scores, row, 0.05)["words"]))
        print(f"tied with {reference}: {[name for name, word in words.items() if word == 'tie']}")

# %% [markdown]
# ## Question 5. Judgement (4 points)
#
# A paper has this table. "Ours" is a new method that trains 0.2 % of the weights.
#
# > | method | trained | accuracy |
# > |---|---|---|
# > | full fine-tuning (lr 2e-5, from Smith et al.) | 100 % | 83.1 |
# > | LoRA (lr 2e-5) | 0.2 % | 79.4 |
# > | BitFit (lr 2e-5) | 0.1 % | 78.8 |
# > | **Ours** (best of 24 settings) | 0.2 % | **83.6** |
# >
# > "One run each, test set of 500. Ours beats all baselines, so less is more. As it trains 500 times fewer weights,
# > training needs 500 times less memory. We recommend it for all tasks."
#
# And you have to decide this: 300 customers, each with 80 labelled texts; one GPU that is idle at night; a single copy of the
# frozen model serves all customers.
#
# Answer in about 180 words. Which parts of the table are unfair, and in whose favour? What is the difference between
# 83.6 and 83.1 worth? What do you say about memory? What do you do for the 300 customers, and what would you measure first?

# %% [markdown] question="17.q5"
# **Your answer**
#
# <!-- BEGIN SOLUTION -->
# Unfair: ours was chosen from 24 settings, each baseline got one. 2e-5 is a rate for all weights; LoRA and BitFit
# need rates ten to a hundred times as high, so they were hardly trained. Full fine-tuning has a rate from another paper.
# All of it favours ours. If the 24 settings were compared on the test set, the winner is flattered as well.
#
# 83.6 against 83.1 are two or three texts of 500, one run each. The sampling error alone is about 1.7 points; without
# paired runs over several seeds there is no interval, and with three comparisons a correction. It is a tie.
#
# Memory: only gradients and moments shrink with the trained numbers. The frozen weights stay, a factor of 4 at most,
# and activations hardly change. Storage for each task does shrink 500 times.
#
# For 300 customers storage and serving decide, not half a point: a small file beside one frozen model. With 80 texts
# each I would first try the linear head on frozen features, on validation, over several customers (they are the
# draws), then LoRA or BitFit with tuned rates, paired. Only if the interval shows a gain is it worth the training.
# <!-- END SOLUTION -->

# %% [markdown]
# ## If you want more (not graded)
#
# - Merge a trained DoRA layer into its weight by hand. What does one layer cost afterwards?
# - AdaLoRA's penalty is written for $P$ and $Q$. Show that without it $(cP, \Lambda / c, Q)$ is the same update with other
#   scores. Which number of the triplet would the score favour?
# - Take the bake-off's scores and leave out one draw at a time. How many of the verdicts change?
