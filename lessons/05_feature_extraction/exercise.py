# %% [markdown]
# # Exercise 05: feature extraction
#
# You write the account of the cache, three heads' worth of linear algebra, and then mend a pipeline
# whose author was very pleased with it.
#
# | question | | points |
# |---|---|---|
# | 1 | the account | 2 |
# | 2 | a pooled head is a flattened head | 2 |
# | 3 | neighbours | 3 |
# | 4 | a probe in closed form | 4 |
# | 5 | three leaks | 4 |
# | 6 | judgement, in your own words | 4 |
#
# **How it works.** Replace each `raise NotImplementedError(...)` by your answer, run the cell,
# and then the check below it. It says *right*, or shows the first input on which your answer
# differs, with a hint. Try as often as you like: a check costs nothing and records nothing. Most
# right answers unlock a picture of real features.

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %%
import numpy as np
import torch

from tlcourse.datasets import BatchLoader
from tlcourse.layers import LayerFeatures

torch.set_num_threads(1)  # a network this small gains nothing from a second core
task = tl.load_task("wild_digits", labels_per_class=None)
backbone = tl.load_backbone("glyphnet").to(run.device)
flatten = LayerFeatures(backbone, "body.stages.2", "flatten")

# %% [markdown]
# Real features to work on: the last layer of the lesson's network, flattened (128 channels at 4 x 4
# places, channel by channel), and averaged over the places.


# %%
def features_of(part):
    loader = BatchLoader(part.inputs, part.targets, 250)
    return tl.extract_features(flatten, loader).features.astype(np.float64)  # (n, 2048)


flat = {"train": features_of(task.train), "val": features_of(task.val)}
mean = {name: H.reshape(-1, 128, 16).mean(axis=2) for name, H in flat.items()}  # (n, 128)
targets = {"train": task.train.targets.numpy(), "val": task.val.targets.numpy()}
ten = tl.load_task("wild_digits", labels_per_class=10, seed=0).train.ids.numpy()  # rows of train

# %% [markdown]
# ## Question 1. The account (2 points)
#
# $n$ images, $E$ epochs. A forward pass of the backbone costs $f$ per image, a step of the head
# (forward and backward) $g$ per image. What does it cost
#
# - to compute the features in **every epoch**;
# - to compute them **once**, for each image *and* for $m$ augmented copies of it, and then train the
#   head, which in each epoch sees *one* version of each image, the original or a copy?
#
# And how many times cheaper is *once*, the **ratio**? (It may be less than one.)


# %% question="05.q1"
def costs(num_images, num_epochs, forward, head, num_copies):
    """Cost of training a head on frozen features, in the unit of ``forward`` and ``head``.

    Args:
        num_images: n.
        num_epochs: E.
        forward: f, cost of one image in the backbone.
        head: g, cost of one image in a step of the head.
        num_copies: m >= 0, augmented copies of each image, kept besides the image itself.

    Returns:
        dict with "every epoch", "once" and "ratio".
    """
    ### BEGIN SOLUTION
    every_epoch = num_epochs * num_images * (forward + head)
    once = num_images * ((1 + num_copies) * forward + num_epochs * head)
    return {"every epoch": every_epoch, "once": once, "ratio": every_epoch / once}
    ### END SOLUTION


# %% check="05.q1"
right_1 = tl.check("05.q1", costs)

# %%
if right_1:
    epochs, (_, ax) = range(1, 61), tl.plots.subplots(figsize=(7, 3.2))
    for m, color in zip((0, 4, 19), tl.plots.palette, strict=False):
        ratio = [costs(500, E, 12_673_024, 2_560, m)["ratio"] for E in epochs]
        ax.plot(epochs, ratio, color=color, label=f"{m} copies")
    ax.axhline(1, color="grey", lw=1)
    ax.set(xlabel="epochs", ylabel="times cheaper", title="glyphnet, 500 images")
    ax.legend()
    words = "Nearly straight lines: steep without copies, 5 times flatter with 4, 20 times with 19."
    tl.plots.alt(ax, words)

# %% [markdown]
# ## Question 2. A pooled head is a flattened head (2 points)
#
# A head reads the *mean* over the places of each channel, with weight $V\;(K, C)$. Write the weight
# of a head that reads the *flattened* map, shape $(K, C \cdot H \cdot W)$, and gives the same logits
# for every map. Flattened is a map channel by channel: `maps.reshape(n, -1)`, from $(n, C, H, W)$.


# %% question="05.q2"
def flattened_weight(weight, height, width):
    """Weight on the flattened map that says what ``weight`` says of the channel means.

    Args:
        weight: shape (K, C).
        height, width: of the map.

    Returns:
        Shape (K, C * height * width).
    """
    ### BEGIN SOLUTION
    places = height * width
    return np.repeat(weight, places, axis=1) / places
    ### END SOLUTION


# %% check="05.q2"
right_2 = tl.check("05.q2", flattened_weight)

# %%
if right_2:
    V = np.random.default_rng(0).normal(size=(10, 128))
    apart = np.abs(flat["val"] @ flattened_weight(V, 4, 4).T - mean["val"] @ V.T).max()
    print(f"on real maps the two heads differ by {apart:.0e}")
    print(f"numbers to learn: {V.size:,} for the mean, {flattened_weight(V, 4, 4).size:,} for flatten")

# %% [markdown]
# ## Question 3. Neighbours (3 points)
#
# For each query, the $k$ training vectors with the highest **cosine** similarity vote with their
# class, each with one vote. Return the class with the most votes; of equal ones, the smaller number.


# %% question="05.q3"
def neighbours(train, targets, queries, k, num_classes):
    """Classes by a vote of the k nearest.

    Args:
        train: shape (n, d), no row is zero.
        targets: whole numbers from 0 to num_classes - 1, shape (n,).
        queries: shape (m, d), no row is zero.
        k: 1 to n.
        num_classes: K.

    Returns:
        Whole numbers, shape (m,).
    """
    ### BEGIN SOLUTION
    keys = train / np.linalg.norm(train, axis=1, keepdims=True)
    # The length of a query does not change the order of its neighbours.
    nearest = np.argsort(-(queries @ keys.T), axis=1)[:, :k]  # (m, k)
    votes = np.eye(num_classes)[targets][nearest].sum(axis=1)  # (m, K)
    return votes.argmax(axis=1)
    ### END SOLUTION


# %% check="05.q3"
right_3 = tl.check("05.q3", neighbours)

# %% [markdown]
# When it is right: validation accuracy over $k$, with 100 labelled images. Where would you stop?

# %%
if right_3:
    ks, (_, ax) = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100), tl.plots.subplots(figsize=(7, 3))
    found = [neighbours(mean["train"][ten], targets["train"][ten], mean["val"], k, 10) for k in ks]
    accuracy = [np.mean(classes == targets["val"]) for classes in found]
    ax.plot(ks, accuracy, color=tl.plots.palette[0], marker="o", ms=5)
    ax.set(xscale="log", xlabel="neighbours k", ylabel="validation accuracy", ylim=(0, 1))
    ax.set_xticks(ks, [str(k) for k in ks])
    ax.minorticks_off()
    words = "Accuracy is flat near 0.6 up to about 20 neighbours, then falls to 0.1 at 100."
    tl.plots.alt(ax, words)

# %% [markdown]
# ## Question 4. A probe in closed form (4 points)
#
# Minimise
#
# $$J(V, b) = \tfrac12 \sum_i \lVert V h_i + b - y_i \rVert^2 + \tfrac{\lambda}{2} \lVert V \rVert^2$$
#
# with one-hot $y_i$. The bias is *not* penalised, and the features are *not* centred when you get
# them. No loop, no learning rate.


# %% question="05.q4"
def ridge(features, targets, num_classes, penalty):
    """The head that minimises J.

    Args:
        features: shape (n, d).
        targets: whole numbers from 0 to num_classes - 1, shape (n,).
        num_classes: K.
        penalty: lambda > 0.

    Returns:
        dict with "weight", shape (K, d), and "bias", shape (K,).
    """
    ### BEGIN SOLUTION
    one_hot = np.eye(num_classes)[targets]
    middle, share = features.mean(axis=0), one_hot.mean(axis=0)
    X, T = features - middle, one_hot - share  # what is left once the bias has been solved for
    weight = np.linalg.solve(X.T @ X + penalty * np.eye(X.shape[1]), X.T @ T).T
    return {"weight": weight, "bias": share - weight @ middle}
    ### END SOLUTION


# %% check="05.q4"
right_4 = tl.check("05.q4", ridge)

# %% [markdown]
# When it is right: training and validation accuracy over the penalty. (The features are left as they
# are.) Which end is memory, and which end is the class means?

# %%
if right_4:
    penalties, curves = 10.0 ** np.arange(-3, 7), {"train": [], "val": []}
    rows = {"train": ten, "val": np.arange(300)}
    for penalty in penalties:
        head = ridge(mean["train"][ten], targets["train"][ten], 10, penalty)
        for name, curve in curves.items():
            logits = mean[name][rows[name]] @ head["weight"].T + head["bias"]
            curve.append(np.mean(logits.argmax(axis=1) == targets[name][rows[name]]))
    _, ax = tl.plots.subplots(figsize=(7, 3))
    for (name, curve), marker in zip(curves.items(), "os", strict=True):
        ax.plot(penalties, curve, marker=marker, label=name)
    ax.set(xscale="log", xlabel="penalty", ylabel="accuracy", ylim=(0, 1.03))
    ax.legend()
    words = "Training falls from 1 to 0.8 over the penalty; validation rises from 0.35 to 0.7, then 0.6."
    tl.plots.alt(ax, words)

# %% [markdown]
# ## Question 5. Three leaks (4 points)
#
# A colleague hands you this function. It standardises, fits ridge for each penalty, takes the best
# one and reports. It runs, and the numbers are excellent.
#
# ```text
# def pipeline(train, val, test, penalties):
#     rows = np.concatenate([part["features"] for part in (train, val, test)])
#     middle, spread = rows.mean(axis=0), rows.std(axis=0)
#     scaled = lambda part: (part["features"] - middle) / spread
#     best = {"penalty": None, "accuracy": -1.0}
#     for penalty in penalties:
#         head = ridge(scaled(train), train["targets"], 3, penalty)
#         scores = scaled(test) @ head["weight"].T + head["bias"]
#         accuracy = np.mean(scores.argmax(axis=1) == test["targets"])
#         if accuracy > best["accuracy"]:
#             best = {"penalty": penalty, "accuracy": accuracy}
#     return best
# ```
#
# The mean, the deviation and the penalty all know the test set. Write it so that none does: what is
# learned comes from `train`, what is chosen is chosen by the accuracy on `val` (the first of equal
# ones), and `test` is read once, for the number that is reported. You may call your own `ridge`.


# %% question="05.q5"
def pipeline(train, val, test, penalties):
    """A standardised ridge probe with an honest number.

    Args:
        train, val, test: dicts with "features", shape (n, d), and "targets", shape (n,), whole
            numbers 0 to 2.
        penalties: list of penalties to choose from.

    Returns:
        dict with the chosen "penalty" and the test "accuracy".
    """
    ### BEGIN SOLUTION
    middle, spread = train["features"].mean(axis=0), train["features"].std(axis=0)

    def fitted(penalty):
        return ridge((train["features"] - middle) / spread, train["targets"], 3, penalty)

    def accuracy(part, head):
        scores = (part["features"] - middle) / spread @ head["weight"].T + head["bias"]
        return float(np.mean(scores.argmax(axis=1) == part["targets"]))

    best = max(penalties, key=lambda penalty: accuracy(val, fitted(penalty)))  # first of equals
    return {"penalty": best, "accuracy": accuracy(test, fitted(best))}
    ### END SOLUTION


# %% check="05.q5"
right_5 = tl.check("05.q5", pipeline)

# %% [markdown]
# When it is right: what was the choice on the test set worth? Here features and labels have *nothing*
# to do with each other, so the truth is one third. Many small test sets, 40 penalties to choose from:
# the honest pipeline is right on average; the one that chooses on test is not.


# %%
def nothing_to_learn(rng):
    """Three parts of pure noise."""
    return [
        {"features": rng.normal(size=(30, 20)), "targets": rng.integers(3, size=30)}
        for _ in range(3)
    ]


def chosen_on_test(train, _val, test, penalties):
    return pipeline(train, test, test, penalties)  # the test set stands in for validation


# %%
if right_4 and right_5:
    rng, grid = np.random.default_rng(0), list(10.0 ** np.linspace(-3, 4, 40))
    draws = [nothing_to_learn(rng) for _ in range(60)]
    reported = {
        name: [function(*parts, grid)["accuracy"] for parts in draws]
        for name, function in (("honest", pipeline), ("chosen on test", chosen_on_test))
    }
    intervals = {name: tl.evaluation.mean_interval(scores) for name, scores in reported.items()}
    ax = tl.plots.plot_intervals(intervals, "reported accuracy on noise", reference=1 / 3)
    words = f"Reported accuracy on noise, truth one third: {intervals}"
    tl.plots.alt(ax, words)

# %% [markdown]
# ## Question 6. Judgement (4 points)
#
# A shop has a network that names products in photos, pre-trained on millions of them, and a million
# photos of its own from twelve cameras. It wants to know which photos are **blurred**. 800 photos have
# been labelled by hand: 760 are sharp, 40 are blurred. A message arrives:
#
# > "I took the last layer, as one does, flattened it to be on the safe side (100,000 numbers), and
# > standardised each day's photos by that day's mean and deviation. Logistic regression gets 97 % on
# > a random fifth of the photos. To gain a bit more I want to run the network over all photos in
# > every one of 30 epochs. That takes a week. May I?"
#
# Answer in about 150 words. Which layer and pooling would you try, and why? What is the 97 % worth,
# and how would you measure instead? What of the standardisation, and of the week?

# %% [markdown] question="05.q6"
# **Your answer**
#
# <!-- BEGIN SOLUTION -->
# The last layer was paid for naming a product *whatever* the sharpness, so it has learned to ignore
# what we ask. Blur is a matter of fine edges: I would scan all layers, early ones included, with mean
# and with max ("is there a sharp edge anywhere?"), and let validation choose. 100,000 numbers against
# 40 blurred photos is a bet against the odds; I would measure flatten, not start with it.
#
# 97 % is little: whoever always says "sharp" has 95 %. I want the recall of the blurred photos, or the
# balanced accuracy, with an interval, and controls: random weights, and a number such as the variance
# of the pixels. The split must go by camera or by day, since photos of one series are near-copies. The
# test set is read once, at the end.
#
# A day's own statistics hide what we look for: if the lens is dirty all day, all that day's photos look
# normal. Mean and deviation belong to the model and come from the training photos.
#
# The week is not needed. The backbone is frozen: one pass over the 800 labelled photos, in evaluation
# mode, is enough to train any number of heads, and one pass over the million applies the best one.
# <!-- END SOLUTION -->

# %% [markdown]
# ## If you want more (not graded)
#
# - **Leave one out, without leaving.** Ridge is linear in the targets: the fitted scores are $S Y$ for
#   an $n \times n$ matrix $S$. Show that the score of example $i$ when it is left out is
#   $y_i - (y_i - \hat y_i) / (1 - S_{ii})$, and choose the penalty without any validation set.
# - Show that the scores of a ridge head always add up to one, and that one of them can be negative.
# - In question 5 the statistics leak, too. Make up data on which it is worth ten points.
