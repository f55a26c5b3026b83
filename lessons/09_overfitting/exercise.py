# %% [markdown]
# # Exercise 09: overfitting
#
# Five small tools of this lesson, written by you in numpy, and one table of twelve remedies that
# somebody would like you to sign.
#
# | question | | points |
# |---|---|---|
# | 1 | stop with patience | 2 |
# | 2 | what label smoothing aims at | 2 |
# | 3 | average what? | 3 |
# | 4 | a greedy soup | 4 |
# | 5 | prune by magnitude | 3 |
# | 6 | judgement, in your own words | 4 |
#
# **How it works.** Replace each `raise NotImplementedError(...)` by your answer, run the cell, and
# then the check below it. It says *right*, or shows the first input on which your answer differs,
# with a hint. Try as often as you like: a check costs nothing and records nothing. Most right
# answers unlock a picture.

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %%
import json

import numpy as np
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

from tlcourse.locations import data_dir

BLUE, ORANGE, GREEN = tl.plots.palette[:3]
threadpool_limits(1)  # for matrices this small, several threads only wait for each other
images, digits = load_digits(return_X_y=True)
images, rng = images / 16, np.random.default_rng(0)  # (1797, 64) ink in [0, 1]
path = data_dir() / "results" / "overfitting.json"  # what the lesson's benchmark recorded

# %% [markdown]
# ## Question 1. Stop with patience (2 points)
#
# You get the training and the validation loss at each reading of a run, and a `patience`. Training
# stops at the first reading at which `patience` readings in a row have brought nothing *below* the
# best so far; without such a reading it stops at the last. The weights of the best reading are
# kept. What comes after the stop was never trained, and you may not look at it.


# %% question="09.q1"
def early_stopping(train_loss, val_loss, patience):
    """Where a run stops, and what is kept.

    Args:
        train_loss: at each reading, shape (T,).
        val_loss: likewise.
        patience: whole number, at least 1.

    Returns:
        dict with "stop" and "best", indices of readings (int), and "gap", the generalisation gap
        at the kept reading (float), estimated by the validation loss.
    """
    ### BEGIN SOLUTION
    best, stop = 0, len(val_loss) - 1
    for reading in range(1, len(val_loss)):
        if val_loss[reading] < val_loss[best]:
            best = reading
        elif reading - best >= patience:
            stop = reading
            break
    return {"stop": stop, "best": best, "gap": float(val_loss[best] - train_loss[best])}
    ### END SOLUTION


# %% check="09.q1"
right_1 = tl.check("09.q1", early_stopping)

# %% [markdown]
# When it is right: a recorded run of the lesson's benchmark, and what each patience makes of it.

# %%
if right_1:
    curve = json.loads(path.read_text(encoding="utf-8"))["long_curves"][0]
    step, val = curve["step"], np.array(curve["val_loss"])
    train = np.array(curve["train_loss"]).reshape(len(step), -1).mean(axis=1)
    fig, ax = tl.plots.subplots(figsize=(7, 3))
    ax.plot(step, val, "-", color=ORANGE, marker="", label="validation")
    ax.plot(step, train, "-", color=BLUE, marker="", label="training")
    for patience, marker, size in ((1, "o", 9), (3, "s", 9), (10, "^", 17)):
        best = early_stopping(train, val, patience)["best"]
        style = {"color": "black", "ms": size, "mfc": "none", "ls": "none"}
        ax.plot(step[best], val[best], marker=marker, label=f"patience {patience}", **style)
    ax.set(xlabel="step", ylabel="loss (nats)", ylim=(0, 1.2))
    ax.legend(ncols=2)
    tl.plots.alt(fig, "Loss curves, and the reading that is kept with patience 1, 3 and 10.")

# %% [markdown]
# ## Question 2. What label smoothing aims at (2 points)
#
# With $K$ classes and strength $\varepsilon$ the target of an image of class $y$ is
# $q_y = 1 - \varepsilon + \varepsilon/K$, and $\varepsilon/K$ for every other class. Return the
# targets, the gap $z_y - z_k$ between the logits at the optimum, and the *floor*: the lowest value
# that the smoothed loss $-\sum_k q_k \log p_k$ can reach.


# %% question="09.q2"
def smoothing(targets, num_classes, eps):
    """The optimum of label smoothing.

    Args:
        targets: whole numbers from 0 to K - 1, shape (n,).
        num_classes: K, at least 2.
        eps: in (0, 1).

    Returns:
        dict with "targets", shape (n, K); "gap" and "floor", numbers.
    """
    ### BEGIN SOLUTION
    low, high = eps / num_classes, 1 - eps + eps / num_classes
    q = np.full((len(targets), num_classes), low)
    q[np.arange(len(targets)), targets] = high
    floor = -high * np.log(high) - (num_classes - 1) * low * np.log(low)
    return {"targets": q, "gap": float(np.log(high / low)), "floor": float(floor)}
    ### END SOLUTION


# %% check="09.q2"
right_2 = tl.check("09.q2", smoothing)

# %%
if right_2:
    strengths = np.linspace(0.01, 0.99, 99)
    found = [smoothing(np.array([0]), 10, eps) for eps in strengths]
    fig, axes = tl.plots.subplots(1, 2, figsize=(8, 2.8))
    for ax, name in zip(axes, ("gap", "floor"), strict=True):
        ax.plot(strengths, [row[name] for row in found], "-", color=BLUE, marker="")
        ax.set(xlabel="strength of smoothing", ylabel=name)
    tl.plots.alt(fig, "Gap over strength falls from 7 to 0; the floor rises from 0 to log 10.")

# %% [markdown]
# ## Question 3. Average what? (3 points)
#
# You have the logits of $k$ models. Return three mean losses (cross-entropy, averaged over the
# images): the mean of the members' own losses; the loss of the *average of their probabilities*;
# the loss of the softmax of the *average of their logits*. Some logits are in the hundreds.


# %% question="09.q3"
def averages(logits, targets):
    """Losses of the members and of two ensembles.

    Args:
        logits: shape (k, n, K), any finite numbers.
        targets: whole numbers from 0 to K - 1, shape (n,).

    Returns:
        dict with the numbers "members", "probabilities" and "logits".
    """

    ### BEGIN SOLUTION
    def log_softmax(z):
        z = z - z.max(axis=-1, keepdims=True)
        return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))

    def loss(log_p):
        return float(-np.mean(log_p[..., np.arange(len(targets)), targets]))

    log_p = log_softmax(logits)  # (k, n, K)
    top = log_p.max(axis=0)  # so that the largest member cannot underflow
    log_mean = top + np.log(np.mean(np.exp(log_p - top), axis=0))
    by_logits = log_softmax(logits.mean(axis=0))
    return {"members": loss(log_p), "probabilities": loss(log_mean), "logits": loss(by_logits)}
    ### END SOLUTION


# %% check="09.q3"
right_3 = tl.check("09.q3", averages)

# %% [markdown]
# When it is right: two thousand random sets of three models. Both averages stay below the dashed
# line, where they would equal the members' mean: Jensen, twice. Which of the two is lower depends.

# %%
if right_3:
    points = np.array(
        [
            list(averages(3 * rng.normal(size=(3, 2, 4)), rng.integers(4, size=2)).values())
            for _ in range(2000)
        ]
    )
    fig, ax = tl.plots.subplots(figsize=(4.6, 4))
    ax.plot(points[:, 0], points[:, 1], ".", color=BLUE, ms=3, ls="none", label="probabilities")
    ax.plot(points[:, 0], points[:, 2], ".", color=ORANGE, ms=3, ls="none", label="logits")
    ax.plot([0, 10], [0, 10], "--", color="black", marker="", label="equal")
    ax.set(xlabel="mean loss of the members", ylabel="loss of the average", xlim=(0, 10))
    ax.legend()
    tl.plots.alt(fig, "Scatter of points, all of them below the diagonal.")

# %% [markdown]
# ## Question 4. A greedy soup (4 points)
#
# The models are linear heads on the same features: head $W$ answers with the largest entry of
# $W h$. Cook the greedy soup of Wortsman et al. (2022, recipe 1): sort the heads by their accuracy
# (equal ones in the order given), begin with the first, and take in each further one if the mean
# of all ingredients then is *at least* as accurate as the soup so far.


# %% question="09.q4"
def greedy_soup(heads, features, targets):
    """The greedy soup of linear heads.

    Wortsman et al. 2022, recipe 1, arXiv:2203.05482.

    Args:
        heads: shape (k, K, d).
        features: of the validation images, shape (n, d).
        targets: theirs, whole numbers from 0 to K - 1, shape (n,).

    Returns:
        dict with "ingredients", int array, the indices in the order in which they went in, and
        "soup", shape (K, d).
    """

    ### BEGIN SOLUTION
    def accuracy(head):
        return np.mean((features @ head.T).argmax(axis=1) == targets)

    alone = np.array([accuracy(head) for head in heads])
    kept, best = [], -1.0
    for i in np.argsort(-alone, kind="stable"):  # stable: equal ones stay in their order
        reached = accuracy(heads[[*kept, i]].mean(axis=0))
        if reached >= best:
            kept, best = [*kept, int(i)], reached
    return {"ingredients": np.array(kept), "soup": heads[kept].mean(axis=0)}
    ### END SOLUTION


# %% check="09.q4"
right_4 = tl.check("09.q4", greedy_soup)

# %% [markdown]
# When it is right: eight heads on the pixels of handwritten digits, each trained for a few steps on
# 50 images of its own. Heads 3 and 6 were trained on labels that somebody had mixed up, at a high
# learning rate. Will the uniform soup notice?


# %%
def few_steps(seed, lr, mixed=False):
    rows = np.random.default_rng(seed).permutation(1000)[:50]
    labels = np.roll(digits[rows], 1) if mixed else digits[rows]
    head = np.zeros((10, 64))
    for _ in range(30):
        scores = np.exp(images[rows] @ head.T - (images[rows] @ head.T).max(axis=1, keepdims=True))
        p = scores / scores.sum(axis=1, keepdims=True)
        head -= lr / 50 * (p - np.eye(10)[labels]).T @ images[rows]
    return head


# %%
if right_4:
    heads = np.stack([few_steps(i, 10 if i in (3, 6) else 1, i in (3, 6)) for i in range(8)])
    cooked = greedy_soup(heads, images[1000:1300], digits[1000:1300])
    pot = {f"head {i}": head for i, head in enumerate(heads)}
    pot |= {"uniform soup": heads.mean(axis=0), "greedy soup": cooked["soup"]}
    test = {n: np.mean((images[1300:] @ h.T).argmax(axis=1) == digits[1300:]) for n, h in pot.items()}
    print("ingredients:", cooked["ingredients"].tolist())
    fig, ax = tl.plots.subplots(figsize=(7, 3))
    colors = [BLUE] * len(heads) + [GREEN, ORANGE]
    ax.barh(list(test), list(test.values()), color=colors)
    ax.invert_yaxis()
    ax.set(xlabel="test accuracy", xlim=(0, 1))
    tl.plots.alt(fig, f"Bars: {({n: round(float(a), 3) for n, a in test.items()})}")

# %% [markdown]
# ## Question 5. Prune by magnitude (3 points)
#
# Return, for each array of weights, a mask of 1.0 (kept) and 0.0 (pruned) of its shape. Over *all*
# arrays together, `round(sparsity * number of weights)` weights are pruned: those of smallest
# $|w|$. Of equally small ones the earlier goes first (first array first, row by row). At sparsity
# 0 nothing is pruned.


# %% question="09.q5"
def magnitude_masks(weights, sparsity):
    """Global magnitude pruning.

    Args:
        weights: list of float arrays, any shapes.
        sparsity: share of all weights that are pruned, in [0, 1].

    Returns:
        list of float arrays of the same shapes, with entries 0.0 and 1.0.
    """
    ### BEGIN SOLUTION
    sizes = np.concatenate([np.abs(weight).ravel() for weight in weights])
    mask = np.ones(len(sizes))
    # A stable sort keeps equal sizes in their order; [:0] is empty, so sparsity 0 prunes nothing.
    mask[np.argsort(sizes, kind="stable")[: round(sparsity * len(sizes))]] = 0.0
    masks = []
    for weight in weights:
        masks.append(mask[: weight.size].reshape(weight.shape))
        mask = mask[weight.size :]
    return masks
    ### END SOLUTION


# %% check="09.q5"
right_5 = tl.check("09.q5", magnitude_masks)

# %%
if right_5:
    head = few_steps(0, 1)
    row = np.abs(head).max(axis=1).argmax()  # the digit with the largest weight
    top = np.abs(head[row]).max()
    fig, axes = tl.plots.subplots(1, 4, figsize=(9, 2.6))
    for ax, sparsity in zip(axes, (0.0, 0.5, 0.8, 0.95), strict=True):
        kept = head * magnitude_masks([head], sparsity)[0]
        hits = np.mean((images[1300:] @ kept.T).argmax(axis=1) == digits[1300:])
        ax.imshow(kept[row].reshape(8, 8), cmap="PuOr_r", vmin=-top, vmax=top)
        ax.set_title(f"sparsity {sparsity}\naccuracy {hits:.2f}", fontsize=10)
        ax.axis("off")
    tl.plots.alt(fig, "The weights of one digit at four sparsities: ever fewer pixels stay coloured.")

# %% [markdown]
# ## Question 6. Judgement (4 points)
#
# A hospital fine-tunes a network on 400 labelled images and sends you this:
#
# > "Plain fine-tuning overfits: from epoch 6 on the validation loss rises, while accuracy stays at
# > 0.88. We tried twelve remedies with four strengths each, on five draws, and kept for each the
# > strength with the best validation accuracy. Two are significant at the 5 % level on these
# > validation images: mixup (p = 0.04) and an ensemble of five networks (p = 0.03, +1.9 points).
# > The other ten do not work. We recommend the ensemble for all clinics."
#
# Answer in about 150 words. What of this do the data show, and what not? What would you measure
# before anybody deploys anything?

# %% [markdown] question="09.q6"
# **Your answer**
#
# <!-- BEGIN SOLUTION -->
# Rising loss at level accuracy is first of all growing confidence: the wrong answers are given
# with more certainty. Whether that matters depends on use. If clinics act on the probability, look
# at calibration; one temperature, fitted on validation images, may do, and changes no answer.
#
# Twelve tests at 5 % give 0.6 false alarms when nothing works. Under Holm the smallest p must be
# below 0.05/12 = 0.004; 0.03 and 0.04 are far from it. Nor have the other ten been refuted: five
# draws leave wide intervals, which should be shown.
#
# Strengths were chosen on the images that are reported, so all numbers flatter. And the ensemble
# had five times the training, and costs five networks for every image. The controls are one
# network with five times the steps, and a soup of the five, which costs one.
#
# I would fix one candidate now, take ten fresh draws, choose on validation, read a test set of
# other patients once, and report paired differences in accuracy, loss and calibration, with
# intervals and cost.
# <!-- END SOLUTION -->
