# %% [markdown]
# # Exercise 13: adapters and selective fine-tuning
#
# You fold vectors into a matrix, count the way back layer by layer before anything is run, go back
# through a bottleneck, and find out how much of a change a diagonal can reach. Then a team tells you why
# it will use (IA)³ from now on, and you decide.
#
# | question | | points |
# |---|---|---|
# | 1 | fold the vectors away | 3 |
# | 2 | how long is the way back? | 3 |
# | 3 | back through a bottleneck | 4 |
# | 4 | what a diagonal can reach | 4 |
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
import numpy as np
import torch

BLUE, ORANGE, GREEN = tl.plots.palette[:3]

# %% [markdown]
# ## Question 1. Fold the vectors away (3 points)
#
# A layer was trained with *two* vectors around it: $l$ scales its inputs, $k$ its outputs,
#
# $$y = k \odot \big(W (l \odot x) + b\big).$$
#
# Return the weight and the bias of the plain layer $y = W' x + b'$ that does the same.


# %% question="13.q1"
def fold(W, b, scale_in, scale_out):
    """A plain layer in place of one with scaled inputs and outputs.

    Liu et al. 2022, section 3.3, arXiv:2205.05638.

    Args:
        W: shape (o, i).
        b: shape (o,).
        scale_in: shape (i,).
        scale_out: shape (o,).

    Returns:
        W', shape (o, i), and b', shape (o,).
    """
    ### BEGIN SOLUTION
    return scale_out[:, None] * W * scale_in, scale_out * b
    ### END SOLUTION


# %% check="13.q1"
right_1 = tl.check("13.q1", fold)

# %% [markdown]
# When it is right: your fold beside the library's, on a layer of its own.

# %%
if right_1:
    from tlcourse.adapters import IA3Config, IA3Linear

    config = IA3Config(target_modules=("x",), feedforward_modules=())
    layer = IA3Linear(torch.nn.Linear(6, 4), config)
    torch.nn.init.normal_(layer.ia3_l)
    W, b, k = (x.detach().numpy() for x in (layer.base.weight, layer.base.bias, layer.ia3_l))
    mine = fold(W, b, np.ones(6), k)
    layer.merge()
    gaps = [np.abs(a - p.detach().numpy()).max() for a, p in zip(mine, (layer.weight, layer.bias))]
    print(f"largest difference from the library: weight {gaps[0]:.0e}, bias {gaps[1]:.0e}")

# %% [markdown]
# ## Question 2. How long is the way back? (3 points)
#
# Linear layers stand in a row, the first one gets the data. Layer `k` has a weight of `shapes[k]` = (outputs, inputs), and
# a bias. `weights[k]` and `biases[k]` say what is trained. A product of an $(n, a)$ with an $(a, c)$ matrix costs $n\,a\,c$
# multiplications. Count those of the backward pass:
#
# - the gradient of a weight is one product, if that weight is trained;
# - the gradient of a layer's *input* is one product, if anything in the layers below it is trained;
# - the gradient of a bias is a sum: no multiplications.


# %% question="13.q2"
def backward_work(shapes, weights, biases, rows):
    """Multiplications in the backward pass of a stack of linear layers.

    Args:
        shapes: a row (outputs, inputs) for each layer, from the first to the last, shape (L, 2).
        weights: True or False for each layer: is its weight trained?
        biases: True or False for each layer: is its bias trained?
        rows: number n of inputs in a batch (tokens count each).

    Returns:
        a whole number.
    """
    ### BEGIN SOLUTION
    work, trained_below = 0, False
    for (outputs, inputs), weight, bias in zip(shapes, weights, biases):
        product = rows * int(outputs) * int(inputs)
        work += product * (bool(weight) + trained_below)
        trained_below = trained_below or weight or bias
    return work
    ### END SOLUTION


# %% check="13.q2"
right_2 = tl.check("13.q2", backward_work)

# %% [markdown]
# When it is right: six equal layers. What does each way of freezing cost, in units of one forward pass?

# %%
if right_2:
    shapes, forward = np.full((6, 2), 100), 6 * 100 * 100
    ways = {f"last {k} layers": [False] * (6 - k) + [True] * k for k in (1, 2, 3, 6)}
    for name, weights in ways.items():
        print(f"{name:16} {backward_work(shapes, weights, weights, 1) / forward:.2f}")
    for name, biases in {"all biases": [True] * 6, "last 3 biases": [False] * 3 + [True] * 3}.items():
        print(f"{name:16} {backward_work(shapes, [False] * 6, biases, 1) / forward:.2f}")

# %% [markdown]
# ## Question 3. Back through a bottleneck (4 points)
#
# A bottleneck with ReLU in the middle stands in a transformer, so $H$ and $G = \partial L/\partial Z$ have **three** axes: texts,
# tokens, features.
#
# $$A = H D^\top + c, \qquad S = \max(0, A), \qquad Z = H + S\,U^\top + e .$$
#
# Return the gradients of $D$, $c$, $U$, $e$ and of $H$. (Take the slope of ReLU at exactly zero as zero. The $1/n$ of the loss
# is in $G$ already.)


# %% question="13.q3"
def bottleneck_backward(H, G, D, c, U):
    """Gradients of a bottleneck adapter with ReLU.

    Houlsby et al. 2019, section 2.1, arXiv:1902.00751.

    Args:
        H: outputs of the frozen layer, shape (texts, tokens, d).
        G: gradient of the loss with respect to Z, shape (texts, tokens, d).
        D: way down, shape (m, d).
        c: its bias, shape (m,).
        U: way up, shape (d, m).

    Returns:
        dict with "D", "c", "U", "e" and "H", each in the shape of what it is the gradient of.
    """
    ### BEGIN SOLUTION
    d = H.shape[-1]
    rows, arriving = H.reshape(-1, d), G.reshape(-1, d)  # every token a row
    A = rows @ D.T + c
    dA = (arriving @ U) * (A > 0)
    return {
        "D": dA.T @ rows,
        "c": dA.sum(axis=0),
        "U": arriving.T @ np.maximum(A, 0),
        "e": arriving.sum(axis=0),
        "H": G + (dA @ D).reshape(H.shape),
    }
    ### END SOLUTION


# %% check="13.q3"
right_3 = tl.check("13.q3", bottleneck_backward)

# %% [markdown]
# When it is right: which of the new numbers get a gradient in the first step, from three starts?

# %%
if right_3:
    rng = np.random.default_rng(0)
    H, G = rng.normal(size=(2, 2, 5, 8))
    starts = {"D and U random": (1, 1), "U = 0": (1, 0), "both zero": (0, 0)}
    for name, (down, up) in starts.items():
        D, U = down * rng.normal(size=(3, 8)), up * rng.normal(size=(8, 3))
        slopes = bottleneck_backward(H, G, D, np.zeros(3), U)
        print(f"{name:15}", {k: round(float(np.linalg.norm(slopes[k])), 2) for k in "DcUe"})

# %% [markdown]
# ## Question 4. What a diagonal can reach (4 points)
#
# A matrix $W$ should have changed to $W + \Delta$. You may only multiply its rows by numbers $k_j$ (or, if `columns`, its columns).
# Which numbers come nearest, in the sum of squares of $(\operatorname{diag}(k) W) - (W + \Delta)$? And which share of the squares of
# $\Delta$ is then **reached**? That is one minus the sum of squares that is left, divided by the sum of the squares of $\Delta$.


# %% question="13.q4"
def best_scales(W, change, columns):
    """The scales that come nearest to a wanted change of a matrix.

    Args:
        W: shape (o, i); no row and no column is zero.
        change: wanted, shape (o, i), not zero.
        columns: True to scale columns, False to scale rows.

    Returns:
        the scales, shape (i,) for columns, else (o,); the share that is reached, in [0, 1].
    """
    ### BEGIN SOLUTION
    axis = 0 if columns else 1
    along = np.sum(change * W, axis=axis) / np.sum(W**2, axis=axis)  # the best k - 1
    reached = np.sum(along**2 * np.sum(W**2, axis=axis)) / np.sum(change**2)
    return 1 + along, reached
    ### END SOLUTION


# %% check="13.q4"
right_4 = tl.check("13.q4", best_scales)

# %% [markdown]
# When it is right: let every row of $W$ turn by an angle, at its old length. How much of that can a scale reach?

# %%
if right_4:
    rng, angles = np.random.default_rng(0), np.array([1, 15, 30, 60, 90, 120, 180])
    W = rng.normal(size=(50, 64))
    W /= np.linalg.norm(W, axis=1, keepdims=True)
    other = rng.normal(size=W.shape)
    other -= np.sum(other * W, axis=1, keepdims=True) * W  # at right angles to the old row
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    turned = [np.cos(a) * W + np.sin(a) * other for a in np.radians(angles)]
    shares = [best_scales(W, new - W, False)[1] for new in turned]

# %%
if right_4:
    ax = tl.plots.subplots(figsize=(7, 3))[1]
    ax.plot(angles, shares, color=BLUE, marker="o", ls="-", label="every row turned")
    ax.axhline(1 / 64, color=ORANGE, ls="--", label="a random change, on average")
    ax.set(xlabel="angle in degrees", ylabel="share of the change reached", ylim=(-0.03, 1.05))
    ax.set_xticks([1, 30, 60, 90, 120, 180])
    ax.legend()
    words = f"Share reached at {angles.tolist()} degrees: {np.round(shares, 2).tolist()}."
    tl.plots.alt(ax, words)

# %% [markdown]
# Small turns are out of reach: a scale sees only what lies along the old row. At 180 degrees all is reached, with $k = -1$.
#
# ## Question 5. Judgement (4 points)
#
# This report reaches you:
#
# > "We adapted a language model of 300 million weights to routing of tickets, 40 labelled tickets per queue. (IA)³ trains 0.01 % of the
# > weights, so it needs the least memory of all methods, and since hardly anything is trained, our backward pass is now nearly
# > free. Full fine-tuning, with the rate of 1e-3 that we use at 10,000 tickets, got 61 %, (IA)³ at its best of six rates 70 % on the
# > test tickets. So with few labels (IA)³ is better; above some thousand tickets the curves will cross, as in the literature. In
# > production we keep the vectors beside the weights, because a fold cannot be undone. And as all starts at one, a zero in a scale is no problem."
#
# Answer in about 170 words. What do you say to memory and to the backward pass? To the comparison with full fine-tuning, and to the crossing?
# To the last two sentences? What would you do first?

# %% [markdown] question="13.q5"
# **Your answer**
#
# <!-- BEGIN SOLUTION -->
# Memory: weights stay, so a factor of at most 4 against full fine-tuning with AdamW, as for every method that trains little. Activations
# hardly shrink: (IA)³ must keep the outputs of keys and values and the inner units of each feed-forward, nearly as much as
# full fine-tuning. BitFit keeps less; last layers much less.
#
# Backward: the gradient travels through every frozen matrix down to the first vector. One forward of work remains of two; nothing is free.
#
# Comparison: full fine-tuning had one rate, from 10,000 tickets, likely far too high for 40; (IA)³ had six, and the best was taken on the
# test tickets. So rates were compared, and the winner is flattered. Tune both on validation, at each number of labels, five or
# more paired draws, intervals of the difference, head-only as control. A crossing that was not measured is a guess; it may come from the fixed rate.
#
# Folding can be undone by keeping the old weight (or the vector aside); folded, it costs nothing. A scale that is zero silences a unit, and a product
# cannot revive what is zero.
#
# First: repeat the comparison with tuned rates.
# <!-- END SOLUTION -->

# %% [markdown]
# ## If you want more (not graded)
#
# - (IA)³ on keys: show that scaling the keys by $l$ is the same as scaling the queries by $l$. Could both be trained to any use?
# - BitFit in the last $k$ layers only: what is left of the backward work, and of the biases?
# - Put a bottleneck *beside* a layer, fed by its input, instead of behind it. What changes in $dH$? Compare with LoRA.
