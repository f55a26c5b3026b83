# %% [markdown]
# # Exercise 06: full fine-tuning
#
# Five small functions that answer the five questions one has in front of a fine-tuning run: how high
# may the rate be, how far has each weight moved, what does BatchNorm remember, how fast does each
# layer learn, and *what moved that should not have?* The last one you can take home and use.
#
# | question | | points |
# |---|---|---|
# | 1 | the largest stable rate | 2 |
# | 2 | Adam's first steps, with warm-up | 4 |
# | 3 | what BatchNorm remembers | 4 |
# | 4 | a rate for each layer | 2 |
# | 5 | what moved? | 4 |
# | 6 | judgement, in your own words | 4 |
#
# Replace each `raise NotImplementedError(...)` by your answer, run the cell, and then the check
# below it. It says *right*, or shows the first input on which your answer differs, with a hint. A
# check costs nothing and records nothing.

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %%
import numpy as np
import torch

BLUE, ORANGE, GREEN = tl.plots.palette[:3]
torch.set_num_threads(1)
rng = np.random.default_rng(0)

# %% [markdown]
# ## Question 1. The largest stable rate (2 points)
#
# A loss that is a parabola in many weights has a constant Hessian $H$ (symmetric, no negative
# eigenvalue, at least one positive). Below which learning rate does gradient descent with momentum
# $\beta$ come closer to the bottom, in every direction that has any curvature?
#
# `np.linalg.eigvalsh` gives the eigenvalues of a symmetric matrix, the smallest first.


# %% question="06.q1"
def largest_stable_rate(hessian, momentum):
    """The limit of the learning rate; below it every curved direction shrinks.

    Args:
        hessian: symmetric, shape (d, d), with no negative eigenvalue and a positive one.
        momentum: in [0, 1).

    Returns:
        One number.
    """
    ### BEGIN SOLUTION
    # The steepest direction has the say. A root leaves the unit circle at z = -1.
    return float(2 * (1 + momentum) / np.linalg.eigvalsh(hessian)[-1])
    ### END SOLUTION


# %% check="06.q1"
right_1 = tl.check("06.q1", largest_stable_rate)

# %% [markdown]
# When it is right: gradient descent on a parabola in three weights, just below and just above your
# limit.

# %%
if right_1:
    root = rng.normal(size=(3, 3))
    hessian = root @ root.T
    fig, ax = tl.plots.subplots(figsize=(7, 3))
    for share, color in ((0.97, BLUE), (1.03, ORANGE)):
        place, losses = np.ones(3), []
        for _ in range(120):
            losses.append(place @ hessian @ place / 2)
            place = place - share * largest_stable_rate(hessian, 0.0) * hessian @ place
        ax.plot(losses, color=color, label=f"{share} x your limit")
    ax.set(xlabel="step", ylabel="loss", yscale="log")
    ax.legend()
    tl.plots.alt(fig, "The loss falls just below the limit and grows without end just above it.")

# %% [markdown]
# ## Question 2. Adam's first steps, with warm-up (4 points)
#
# Some weights start at 0. You are handed their gradients, one row for each step. Where are the
# weights *after* each step of Adam? Take $\beta_1 = 0.9$, $\beta_2 = 0.999$, $\epsilon = 10^{-8}$
# (added to the root), no weight decay. In step $t = 1, 2, \dots$ the rate is $\eta\, t / w$ as long
# as $t < w$, and $\eta$ from then on, with $w$ the number of warm-up steps; $w = 0$ means no warm-up.


# %% question="06.q2"
def adam_path(gradients, lr, warmup_steps):
    """Places of the weights after each step of Adam, from 0.

    Args:
        gradients: shape (S, d), the gradients of step 1, 2, ..., S.
        lr: rate after the warm-up, > 0.
        warmup_steps: >= 0.

    Returns:
        Shape (S, d).
    """
    ### BEGIN SOLUTION
    m = v = place = np.zeros(gradients.shape[1])
    path = []
    for t, gradient in enumerate(gradients, start=1):
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)  # both began at zero
        rate = lr * min(1.0, t / warmup_steps) if warmup_steps else lr
        place = place - rate * m_hat / (np.sqrt(v_hat) + 1e-8)
        path.append(place)
    return np.array(path)
    ### END SOLUTION


# %% check="06.q2"
right_2 = tl.check("06.q2", adam_path)

# %% [markdown]
# When it is right: 2,000 weights whose gradients are pure noise. How far have they gone?

# %%
if right_2:
    noise = rng.normal(size=(60, 2000))
    fig, ax = tl.plots.subplots(figsize=(7, 3))
    for warmup, color in ((0, ORANGE), (20, BLUE)):
        distance = np.sqrt(np.square(adam_path(noise, 1.0, warmup)).mean(axis=1))
        ax.plot(np.arange(1, 61), distance, color=color, label=f"warm-up of {warmup} steps")
    ax.plot(np.arange(1, 61), np.sqrt(np.arange(1, 61)), color="grey", label="square root of t")
    ax.set(xlabel="step t", ylabel="distance / learning rate", ylim=(0, None))
    ax.legend()
    tl.plots.alt(fig, "Distance of pure noise: like the square root of t; warm-up starts lower.")

# %% [markdown]
# ## Question 3. What BatchNorm remembers (4 points)
#
# A BatchNorm layer is new: its running mean is 0, its running variance 1, for each channel. Then it
# sees some batches in training mode. What are its running statistics afterwards? Torch's
# conventions: `momentum` is the weight of the *new* value, and the stored variance is the unbiased
# one.


# %% question="06.q3"
def running_statistics(batches, momentum):
    """Running mean and variance of a new BatchNorm after some batches in training mode.

    Args:
        batches: list of arrays, shape (B, C, H, W); B may differ.
        momentum: weight of the new value, in (0, 1).

    Returns:
        dict with "mean" and "var", shape (C,).
    """
    ### BEGIN SOLUTION
    channels = batches[0].shape[1]
    mean, var = np.zeros(channels), np.ones(channels)
    for batch in batches:
        # All numbers of a channel count alike: over the batch and all places.
        mean = (1 - momentum) * mean + momentum * batch.mean(axis=(0, 2, 3))
        var = (1 - momentum) * var + momentum * batch.var(axis=(0, 2, 3), ddof=1)
    return {"mean": mean, "var": var}
    ### END SOLUTION


# %% check="06.q3"
right_3 = tl.check("06.q3", running_statistics)

# %% [markdown]
# When it is right: real images. The statistics of the three colours of wild digits, from batches of
# 2 and of 50, seen batch after batch.

# %%
if right_3:
    photos = tl.load_task("wild_digits", None).train.inputs.numpy().astype(float)
    fig, ax = tl.plots.subplots(figsize=(7, 3))
    for size, color in ((2, ORANGE), (50, BLUE)):
        rows = [rng.choice(len(photos), size, replace=False) for _ in range(60)]
        seen = [photos[chosen] for chosen in rows]
        red = [running_statistics(seen[: t + 1], 0.1)["mean"][0] for t in range(60)]
        ax.plot(np.arange(1, 61), red, color=color, label=f"batches of {size}")
    ax.axhline(photos[:, 0].mean(), color="grey", ls=":", label="all images")
    ax.set(xlabel="batches seen", ylabel="running mean of red")
    ax.legend()
    tl.plots.alt(fig, "Both averages drift from 0 to the mean of all images; that of 2 is noisy.")

# %% [markdown]
# ## Question 4. A rate for each layer (2 points)
#
# Names of layers from the input to the head. The head, the last name, learns at `lr`; each layer
# learns `decay` times as fast as the one above it. If `head_lr` is given, it is the rate of the head
# *and of nothing else*: the layers below are still counted down from `lr`.


# %% question="06.q4"
def layer_rates(names, lr, decay, head_lr):
    """Learning rate of each layer.

    Args:
        names: layers from the input to the head, at least two.
        lr: rate of the top, > 0.
        decay: in (0, 1].
        head_lr: rate of the head, or None for ``lr``.

    Returns:
        dict from name to rate.
    """
    ### BEGIN SOLUTION
    top = len(names) - 1
    rates = {name: lr * decay ** (top - place) for place, name in enumerate(names)}
    if head_lr is not None:
        rates[names[-1]] = head_lr
    return rates
    ### END SOLUTION


# %% check="06.q4"
right_4 = tl.check("06.q4", layer_rates)

# %% [markdown]
# When it is right: your rates against those of the library, on the course's network.

# %%
if right_4:
    model = tl.Classifier(tl.load_backbone("glyphnet"), num_classes=10)
    names = tl.freezing.layer_names(model)
    yours = layer_rates(names, 0.01, 1 / 2.6, 0.05)
    groups = tl.freezing.parameter_groups(model, 0.01, 0.0, head_lr=0.05, layer_decay=1 / 2.6)
    given = {name: group["lr"] for group in groups for name in group["names"]}
    for layer in names:
        library = next(lr for name, lr in given.items() if name.startswith(layer + "."))
        print(f"{layer:24} yours {yours[layer]:.6f}, library {library:.6f}")

# %% [markdown]
# ## Question 5. What moved? (4 points)
#
# The audit of a "frozen" model. You are handed its tensors before and after training, by name, and
# the parts that were *meant* to be trained. Which of the others are not equal, to the last bit, and
# are they weights or statistics?
#
# - A part named `"head"` holds the tensors whose names begin with `"head."`, with the dot.
# - A name that ends in `running_mean`, `running_var` or `num_batches_tracked` is a *statistic*;
#   every other is a *weight*.
# - Sort the names.


# %% question="06.q5"
def audit(before, after, trainable):
    """Tensors that moved outside the parts that were meant to be trained.

    Args:
        before: dict from name to array.
        after: dict with the same names and shapes.
        trainable: list of names of parts.

    Returns:
        dict with two sorted lists of names, "weights" and "statistics".
    """
    ### BEGIN SOLUTION
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    found = {"weights": [], "statistics": []}
    for name in sorted(before):
        meant_to = any(name.startswith(part + ".") for part in trainable)
        if not meant_to and not np.array_equal(before[name], after[name]):
            found["statistics" if name.endswith(statistics) else "weights"].append(name)
    return found
    ### END SOLUTION


# %% check="06.q5"
right_5 = tl.check("06.q5", audit)

# %% [markdown]
# When it is right, let it look at two frozen backbones.


# %%
def before_and_after(freeze):
    """Tensors of a model with a frozen backbone, before and after five steps of its head."""
    model = tl.Classifier(tl.load_backbone("glyphnet_bn"), num_classes=10)
    freeze(model.backbone)
    before = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    train = tl.load_task("wild_digits", 10).loaders(20).train
    tl.fit(model, train, None, tl.TrainConfig(num_steps=5, progress=False))
    return before, {name: tensor.numpy() for name, tensor in model.state_dict().items()}


# %%
if right_5:
    ways = {"requires_grad_(False)": lambda part: part.requires_grad_(False), "tl.freeze": tl.freeze}
    for name, freeze in ways.items():
        found = audit(*before_and_after(freeze), ["head"])
        print(f"{name:22} {len(found['weights'])} weights, {len(found['statistics'])} statistics moved")

# %% [markdown]
# ## Question 6. Judgement (4 points)
#
# A report lands on your desk:
#
# > "We fine-tuned a ResNet-50 on our 400 images with Adam. GPU memory allowed batches of two. With the
# > learning rate 0.03 of our last project the loss stood at $\log 10$ (ten classes) from the first
# > epoch on, so we trained ten times as long. Then we added warm-up, and test accuracy rose from 12 % to
# > 55 %. Warm-up is clearly the key to fine-tuning. With layer-wise rates and gradual unfreezing we got
# > 57 %, the best of our eight runs on the test set; we recommend both. We also trained a second head
# > on the backbone, frozen with `requires_grad = False`. Strangely, the first head has become worse
# > since then."
#
# Answer in about 150 words. What would you change first, and why? What does the 43 point gain of
# warm-up tell you? What happened to the first head, and what do the batches of two do? Which of the
# conclusions do the numbers support?

# %% [markdown] question="06.q6"
# **Your answer**
#
# <!-- BEGIN SOLUTION -->
# First the learning rate. A loss at $\log 10$ from the first epoch on is a network that says the same
# for every image: its features were destroyed in the first steps, and training longer cannot bring
# them back. Try rates a factor of three apart, downwards, and choose on validation. The gain of
# warm-up says the same thing: warm-up matters that much only where the rate is too high. It saves
# part of such a run, and is no substitute for a right rate, at which it may gain nothing.
#
# Batches of two in training mode make every image's features depend on one neighbour, and running
# averages noisy. Freeze BatchNorm's statistics. That also explains the first head: `requires_grad`
# stops gradients, not running averages; the shared backbone moved. Compare state dicts before and
# after, bit by bit, and use a freeze that survives `model.train()`.
#
# 57 against 55 % is one run each, and the best of eight chosen on the test set. It supports nothing.
# Needed: several paired seeds with intervals, choices on validation, and a linear probe as control.
# <!-- END SOLUTION -->
