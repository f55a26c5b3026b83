# %% [markdown]
# # 09 Overfitting
#
# A hundred labelled images, three hundred thousand weights. After a few dozen steps the network
# knows its images by heart, and then you read that it "overfits", and that the remedy is
# augmentation, or dropout, or an ensemble. This lesson takes the word apart, derives what each
# remedy does, and then measures all of them against each other, with the same start and the same
# number of steps.
#
# **After this lesson you can**
#
# 1. read from training and validation curves in which sense a model overfits, and name the parts
#    of its error: approximation, estimation, optimisation;
# 2. derive what a remedy does: dropout and augmentation as a penalty, smoothed labels as a finite
#    target, an ensemble as an average that cannot be worse than its mean member, a soup as its
#    cheap approximation;
# 3. compare ten remedies honestly: one budget, paired draws, and a correction for having looked
#    ten times.
#
# **You need** lessons 02 (risk, weight decay, early stopping), 04 (the loop) and some patience
# with expectations. **Time** about 90 minutes; the notebook itself runs in about a minute on two
# cores.
#
# **Expected result.** On eight draws of 100 labelled images, augmentation lifts the test accuracy
# from 0.82 to 0.86 (+4.0 points, 95 % interval [3.1, 4.9]) and lowers the loss by 0.13 [0.09, 0.17].
# Averaging four augmented models, or just their weights, lowers the loss by another 0.06 to 0.07.
# Weight decay, dropout and early stopping change nothing that can be told from noise.

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %%
import itertools
import json
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from tlcourse.comparing import Comparison
from tlcourse.evaluation import calibration_error, mean_interval
from tlcourse.locations import data_dir

BLUE, ORANGE, GREEN = tl.plots.palette[:3]

# %% [markdown]
# ## Before you run anything
#
# Write down four guesses.
#
# 1. A run goes on after its validation loss has turned up, and the loss rises by a tenth. What
#    does the validation *accuracy* do in the meantime?
# 2. Fine-tune the same network four times, and average the *weights* of the four. Is the network
#    in the middle broken, as good as its mean member, or better?
# 3. Weight decay 0.01, the usual default; learning rate 0.003 at its peak; 150 steps. By how much
#    does the decay shrink a weight in the whole run?
# 4. Ten remedies, each tried on eight draws of 100 labelled images. How many of them change the
#    test accuracy by more than noise? Which one most?
#
# ## 1. Watching one run
#
# The task is the one of lesson 04: wild digits, ten labelled images of each class. Every run of
# this lesson begins at the same point: the pre-trained backbone, with the head of a linear probe.

# %%
num_draws = {"tiny": 5, "full": 10}[run.profile]  # of the live comparison in section 5
watched_steps = {"tiny": 200, "full": 1000}[run.profile]
torch.set_num_threads(1)  # a network this small gains nothing from a second core


def at_the_start(seed, backbone="glyphnet"):
    """The task with labels drawn by seed, and the model that every run begins with."""
    task = tl.load_task("wild_digits", labels_per_class=10, seed=seed)
    model = tl.Classifier(tl.load_backbone(backbone), task.num_classes).to(run.device)
    features = tl.extract_features(model.backbone, task.loaders(augment=False).train)
    tl.linear_probe(features, features, c_grid=(0.01,)).copy_to(model.head)
    return task, model


# %% [markdown]
# No remedy yet: no augmentation, no decay, no stopping, and a constant learning rate, so that the
# run never comes to rest. The loop is written out once more, because it does something that
# `tl.fit` does not: every 20 steps it writes down what the model says about *all* training and
# validation images. It keeps log-probabilities. They are the logits, each image's moved by a
# constant that the softmax does not see.


# %%
def log_probabilities(model, part):
    """Shape (N, K), float64, on the CPU."""
    return tl.predict(model, part.inputs).double().clamp_min(1e-30).log()


# %%
def watch(model, task, loader, num_steps, lr=3e-3, every=20):
    """AdamW at a constant rate; step -> log-probabilities of training and validation images."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    batches, seen = itertools.chain.from_iterable(itertools.repeat(loader)), {}
    device = next(model.parameters()).device
    for step, (images, targets) in zip(range(num_steps + 1), batches):
        if step % every == 0:
            seen[step] = [log_probabilities(model, part) for part in (task.train, task.val)]
        if step < num_steps:
            F.cross_entropy(model(images.to(device)), targets.to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return seen


# %%
task, model = at_the_start(seed=0)
seen = watch(model, task, task.loaders(20, augment=False, seed=0).train, watched_steps)
parts = {"training": task.train, "validation": task.val}
losses, accuracies = {}, {}
for i, (name, part) in enumerate(parts.items()):
    losses[name] = np.array([F.nll_loss(s[i], part.targets).item() for s in seen.values()])
    hits = [(s[i].argmax(dim=1) == part.targets).double().mean().item() for s in seen.values()]
    accuracies[name] = np.array(hits)
steps = np.array(list(seen))
lowest = losses["validation"].argmin()

# %% [markdown]
# One thing before the picture: is this loop still `tl.fit`? With the same settings, twenty steps
# of each must end in the same weights.

# %%
plainly = tl.TrainConfig(
    lr=3e-3, num_steps=20, schedule="constant", weight_decay=0.0, max_grad_norm=None,
    precision="fp32", progress=False,
)  # fmt: skip
by_hand, by_fit = (at_the_start(0)[1].cpu() for _ in range(2))  # a GPU adds in another order
watch(by_hand, task, task.loaders(20, augment=False, seed=0).train, 20, every=99)
tl.fit(by_fit, task.loaders(20, augment=False, seed=0).train, None, plainly)
for ours, theirs in zip(by_hand.parameters(), by_fit.parameters(), strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)

# %% [markdown]
# It is. Now the picture, and guess 1.

# %% jupyter={"source_hidden": true}
fig, axes = tl.plots.subplots(1, 2, figsize=(9, 3.3))
for ax, curves, label in zip(axes, (losses, accuracies), ("loss (nats)", "accuracy"), strict=True):
    ax.plot(steps, curves["training"], "-", color=BLUE, marker="", label="training (100 images)")
    ax.plot(steps, curves["validation"], "--", color=ORANGE, marker="s", ms=4,
            label="validation (300 images)")  # fmt: skip
    ax.axvline(steps[lowest], color="black", ls=":", lw=1.2, label="lowest validation loss")
    ax.set(xlabel="step", ylabel=label)
axes[0].set_ylim(0, None)
axes[1].set_ylim(0, 1.04)
axes[1].legend(loc="lower right", fontsize=9)
tl.plots.alt(
    fig,
    "Left: training loss falls to zero; validation loss falls, has its lowest point early and then "
    "rises slowly. Right: training accuracy is 1 after a few steps; validation accuracy rises to "
    "about 0.8 and stays there.",
)

# %%
end = {name: (losses[name][-1], accuracies[name][-1]) for name in parts}
print(f"lowest validation loss, step {steps[lowest]}: {losses['validation'][lowest]:.3f}, "
      f"accuracy {accuracies['validation'][lowest]:.3f}")
print(f"last step, {steps[-1]}: loss {end['validation'][0]:.3f}, "
      f"accuracy {end['validation'][1]:.3f}")
print(f"training, last step: loss {end['training'][0]:.5f}, accuracy {end['training'][1]:.3f}")
assert end["training"][1] == 1.0 and end["validation"][0] > losses["validation"][lowest]

# %% [markdown]
# The loss turned up early and rises steadily. The accuracy wavers by a few images of 300 (one
# standard error of such an accuracy is 2.3 points, so this curve cannot tell). Is that this draw?
# `benchmarks/overfitting.py` recorded the same run on five draws (400 steps, with warm-up and
# clipping):

# %%
path = data_dir() / "results" / "overfitting.json"
record = json.loads(path.read_text(encoding="utf-8"))
print(record["command"])
loss_rise, accuracy_change = [], []
for curve in record["long_curves"]:
    best = int(np.argmin(curve["val_loss"]))
    loss_rise.append(curve["val_loss"][-1] / curve["val_loss"][best] - 1)
    accuracy_change.append(curve["val_accuracy"][-1] - curve["val_accuracy"][best])
print(f"from the lowest loss to the end: loss {mean_interval(loss_rise).mean:+.1%}, "
      f"accuracy {mean_interval(accuracy_change)}")  # fmt: skip
assert mean_interval(loss_rise).low > 0 and mean_interval(accuracy_change).low > -0.03

# %% [markdown]
# (The first number can only be positive, since the lowest point was chosen; what counts is that
# the accuracy did not pay for it.) The loss ends a tenth above its lowest point. The accuracy ends
# where it was, as far as five draws can tell. That is guess 1.
#
# ### Why: confidence
#
# How can a model get worse in loss and not in accuracy? Take its logits $z$ for one image with
# true class $y$, and multiply all of them by one number $t > 0$. The largest stays the largest, so
# the answer, and the accuracy, does not depend on $t$ *at all*. The confidence does: $t \to 0$
# gives $p_k = 1/K$ for each class, $t \to \infty$ puts everything on one. Now the loss,
#
# $$\ell(t) = \log \sum_k e^{t z_k} - t\,z_y, \qquad
# \frac{d\ell}{dt} = \sum_k p_k(t)\, z_k - z_y ,\qquad p_k(t) = \frac{e^{t z_k}}{\sum_j e^{t z_j}}.$$
#
# Read the slope: *the logit that the model expects, minus the logit of the truth.*
#
# - **A right answer.** $z_y$ is the largest logit, and a mean is never above the largest. The
#   slope is negative for every $t$: more confidence always pays, but ever less, as $\ell \to 0$.
# - **A wrong answer.** Some $z_j$ is above $z_y$. As $t$ grows, $p$ gathers there, and the slope
#   tends to $z_j - z_y > 0$: from some point on, every bit of confidence costs, at a constant rate.
#
# On the training images every answer is right after a few steps. There is then *no* best $t$:
# gradient descent can always lower the loss by growing the logits, and it does. On validation
# images one answer in five is wrong. The right ones have next to nothing left to win, the wrong
# ones pay for every step. That would be the rising curve.
#
# It can be checked. Sort the validation images by whether their answer was right at the lowest
# point and is right at the end. Who pays?

# %%
targets = task.val.targets
last = list(seen.values())[-1]
moments = {"before": list(seen.values())[lowest][1], "after": last[1]}
right = {name: log_p.argmax(dim=1) == targets for name, log_p in moments.items()}
cost = {name: F.nll_loss(log_p, targets, reduction="none") for name, log_p in moments.items()}
groups = {
    "right before and after": right["before"] & right["after"],
    "wrong before and after": ~right["before"] & ~right["after"],
    "answer turned": right["before"] ^ right["after"],
}
for name, group in groups.items():
    before, after = cost["before"][group].mean().item(), cost["after"][group].mean().item()
    share = (cost["after"] - cost["before"])[group].sum().item() / 300
    print(f"{name:22} {group.sum():3} images: loss {before:.3f} -> {after:.3f}, of the rise: {share:+.3f}")

# %%
stay_right, stay_wrong, _ = ((cost["after"] - cost["before"])[group].mean().item() for group in groups.values())
assert stay_wrong > 0.1 and stay_right < 0.05

# %% [markdown]
# The images that were wrong and stayed wrong pay: the same answer, with more confidence. Those that
# stayed right win about half of it back. The few whose answer turned hardly count.
#
# How much of it is *common* confidence, one $t$ for all? That can be undone afterwards, by the $t$
# that is best on validation images:


# %%
def loss_at(t, log_p, targets):
    """Mean loss when the logits are multiplied by t."""
    return F.cross_entropy(t * log_p, targets).item()


t_grid = np.logspace(-1, 0.7, 80)
by_t = {name: [loss_at(t, last[i], part.targets) for t in t_grid]
        for i, (name, part) in enumerate(parts.items())}  # fmt: skip
best_t = t_grid[np.argmin(by_t["validation"])]

# %% jupyter={"source_hidden": true}
fig, ax = tl.plots.subplots(figsize=(6.4, 3.2))
ax.loglog(t_grid, by_t["training"], "-", color=BLUE, marker="", label="training")
ax.loglog(t_grid, by_t["validation"], "--", color=ORANGE, marker="", label="validation")
ax.axvline(1, color="black", lw=0.8, ls="-")
ax.axvline(best_t, color=GREEN, ls=":", label=f"best on validation: t = {best_t:.2f}")
ax.set(xlabel="logits of the last step, times t", ylabel="loss (nats)", ylim=(1e-3, 4))
ax.set_xticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
ax.legend(loc="lower left")
tl.plots.alt(ax, "Loss over t: the training curve falls all the way, the validation curve is a U "
             "whose lowest point lies left of t = 1.")  # fmt: skip

# %%
now, undone = end["validation"][0], min(by_t["validation"])
print(f"validation loss: lowest of the run {losses['validation'][lowest]:.3f}, last step {now:.3f}, "
      f"last step with t = {best_t:.2f}: {undone:.3f}")  # fmt: skip
expected = (last[1].exp() * last[1]).sum(dim=1)  # the logit that the model expects
slope = (expected - last[1].gather(1, targets[:, None])[:, 0]).mean().item()
h = 1e-4
by_difference = (loss_at(1 + h, last[1], targets) - loss_at(1 - h, last[1], targets)) / (2 * h)
assert abs(slope - by_difference) < 1e-6  # the derivation
assert slope > 0 and best_t < 1

# %% [markdown]
# On the training images more is always better; on the validation images the slope at $t = 1$ is
# positive, and the last model is too sure. One number takes back a part of the rise, not all: what
# is left is confidence that grew on some images more than on others. (In the literature $1/t$ is
# called the **temperature**; Guo et al. 2017 show how much of the calibration of modern networks
# this single number mends.)
#
# A reliability diagram draws it, as far as 300 images can tell. Sort the answers by confidence: of
# those that were given with 90 %, how many are right?

# %% jupyter={"source_hidden": true}
fig, axes = tl.plots.subplots(1, 3, figsize=(11, 3.6), sharey=True)
stages = {f"step {steps[lowest]}": list(seen.values())[lowest][1].exp(),
          f"step {steps[-1]}": last[1].exp(),
          f"step {steps[-1]}, t = {best_t:.2f}": (best_t * last[1]).softmax(1)}  # fmt: skip
for ax, (name, p) in zip(axes, stages.items(), strict=True):
    tl.plots.plot_reliability(p.numpy(), task.val.targets.numpy(), 8, ax)
    error = calibration_error(p.numpy(), task.val.targets.numpy(), 8)
    ax.set_title(f"{name}: error {error:.3f}", loc="left")
    ax.legend(loc="lower right", fontsize=8).set_visible(ax is axes[0])
tl.plots.alt(fig, "Three reliability diagrams. At the lowest loss the points lie around the diagonal, "
             "at the last step most lie a little below it, with shrunk logits they are around it again; "
             "the intervals are wide.")  # fmt: skip

# %% [markdown]
# Points below the diagonal are answers that were too sure; each bar says how little so few images
# can tell. The **calibration error** above each panel is the distance from the diagonal, averaged over the
# images. The
# diagonal is what a weather forecaster is paid for.
#
# So "is it overfitting?" has no answer until you say **in which number**. If only the answer
# counts, let it run. If somebody acts on the probabilities (a doctor, a threshold, a second
# stage), it overfits early. From here on we report both: accuracy and loss.
#
# ## 2. The gap, and what it is made of
#
# Let $R(f)$ be the **risk**: the expected loss of a model $f$ on a new example. Let $\hat R(f)$ be
# its mean loss on the training set. The **generalisation gap** is
#
# $$\text{gap}(f) = R(f) - \hat R(f).$$
#
# We estimate $R$ by the validation loss. In the run above:

# %%
for name, i in {"start": 0, "lowest": lowest, "end": -1}.items():
    validation, training = losses["validation"][i], losses["training"][i]
    print(f"{name:7} validation {validation:.3f} - training {training:.3f} = {validation - training:.3f}")
assert losses["validation"][lowest] < losses["validation"][0] - 0.3

# %% [markdown]
# From the start to the lowest point the model gets far better, *and its gap grows*. A large gap is
# no disease. What you pay for is $R$; the gap only says how little the training loss is worth as an
# estimate of it.
#
# What, then, is $R$ made of? Let $R^*$ be the lowest risk of any function at all, $f_\mathcal{F}$
# the best model *of your class* $\mathcal{F}$, $\hat f$ the one with the lowest training loss, and
# $f_t$ the one where you stopped. Add and subtract (Bottou and Bousquet 2008):
#
# $$R(f_t) - R^* = \underbrace{R(f_\mathcal{F}) - R^*}_{\text{approximation}}
# + \underbrace{R(\hat f) - R(f_\mathcal{F})}_{\text{estimation}}
# + \underbrace{R(f_t) - R(\hat f)}_{\text{optimisation}} .$$
#
# Approximation: the class is too small. Estimation: the data are too few. Optimisation: training
# has not reached its minimum. **One question before the picture:** the first two cannot be
# negative. Can the third?
#
# For a network none of the three can be computed. For a polynomial all can. Take $n = 20$ noisy
# points of a sine, Legendre polynomials $\phi_0, \dots, \phi_d$ scaled so that they are orthonormal
# on $[-1, 1]$, and the squared loss. Then with $c_j$ the true coefficients of the sine,
# $R(w) - R^* = \sum_{j > d} c_j^2 + \sum_{j \le d} (w_j - c_j)^2$: every part is a sum of squares. We
# draw 400 such samples and show the median.

# %%
DEGREES, n, sigma = np.arange(1, 13), 20, 0.4
rng = np.random.default_rng(0)


def legendre(x, degree):
    """Orthonormal on [-1, 1] under the uniform density; shape (len(x), degree + 1)."""
    return np.polynomial.legendre.legvander(x, degree) * np.sqrt(2 * np.arange(degree + 1) + 1)


nodes, weights = np.polynomial.legendre.leggauss(60)
truth = np.sin(1.5 * np.pi * nodes)
c = legendre(nodes, 20).T @ (weights * truth) / 2  # true coefficients
power = weights @ truth**2 / 2  # the sine's mean square: nothing is left out beyond degree 20
assert abs(power - c @ c) < 1e-10


# %%
def excess_parts(degree, steps, lr=0.02):
    """Approximation, estimation, and optimisation part after so many steps from zero."""
    x = rng.uniform(-1, 1, n)
    y = np.sin(1.5 * np.pi * x) + sigma * rng.normal(size=n)
    phi = legendre(x, degree)
    curvature, directions = np.linalg.eigh(phi.T @ phi / n)
    minimum = np.linalg.lstsq(phi, y, rcond=None)[0]
    along = directions.T @ minimum  # gradient descent, direction by direction (lesson 02)
    stopped = [directions @ ((1 - (1 - lr * curvature) ** t) * along) for t in steps]
    true = c[: degree + 1]
    risks = np.array([np.sum((w - true) ** 2) for w in [minimum, *stopped]])
    return c[degree + 1 :] @ c[degree + 1 :], risks[0], risks[1:] - risks[0]


# %%
many = 400
by_degree = [np.median([excess_parts(d, [1])[1] for _ in range(many)]) for d in DEGREES]
missing = np.array([c[d + 1 :] @ c[d + 1 :] for d in DEGREES])  # approximation
t_steps = np.unique(np.logspace(0, 6, 60).astype(int))
approximation, estimation, optimisation = zip(*(excess_parts(8, t_steps) for _ in range(many)))
typical = np.median(estimation)
over_steps = np.median(np.array(optimisation) + np.array(estimation)[:, None], axis=0)

# %% jupyter={"source_hidden": true}
fig, axes = tl.plots.subplots(1, 2, figsize=(10, 3.6))
axes[0].bar(DEGREES, missing, color=BLUE, label="approximation")
axes[0].bar(DEGREES, by_degree, bottom=missing, color=ORANGE, label="estimation", hatch="//",
            edgecolor="white")  # fmt: skip
axes[0].set(xlabel="degree: size of the class", ylabel="excess risk", ylim=(0, 1.1))
axes[0].set_title("Trained to the end")
axes[0].legend()
floor = approximation[0]
total, to_the_end = floor + over_steps, floor + typical
axes[1].semilogx(t_steps, total, "-", color="black", lw=2.5, marker="", label="excess risk")
axes[1].axhline(to_the_end, color=ORANGE, ls="--", label="approximation + estimation")
axes[1].axhline(floor, color=BLUE, ls=":", lw=2.5, label="approximation")
above = total >= to_the_end
axes[1].fill_between(t_steps, to_the_end, total, where=above, color="#BBBBBB", alpha=0.6,
                     label="optimisation, positive", interpolate=True)  # fmt: skip
axes[1].fill_between(t_steps, to_the_end, total, where=~above, color=GREEN, alpha=0.4,
                     label="optimisation, negative", interpolate=True)  # fmt: skip
axes[1].set(xlabel="steps of gradient descent, degree 8", ylim=(0, 1.1))
axes[1].set_title("Stopped on the way")
axes[1].legend(fontsize=8, loc="upper right")
tl.plots.alt(fig, "Left: bars over the degree; approximation vanishes at about degree 5, estimation "
             "grows from there on. Right: over steps the excess risk falls below the level of the "
             "fully trained model and comes back up to it.")  # fmt: skip

# %%
print(f"degree 8, trained to the end: excess risk {to_the_end:.2f} "
      f"(approximation {floor:.4f}); lowest on the way {total.min():.2f} "
      f"after {t_steps[total.argmin()]} steps")
assert total.min() < 0.9 * to_the_end

# %% [markdown]
# Left, the classical trade: a larger class approximates better and is estimated worse (beyond degree
# 8 the bars leave the picture). Right, the
# answer to the question: yes, the optimisation part can be *negative*. A model that stopped on the
# way can be better than the one with the lowest training loss. Early stopping lives in the green
# area, and so does nearly every remedy of this lesson: it makes the training loss worse on purpose.
#
# And transfer? The class stays the same network. What pre-training moves is the *start*: the path
# begins close to good models, so that much of the green area is reached before much noise is
# learned (lesson 02, section 8).
#
# ## 3. The remedies
#
# Each has a derivation or a picture, and one measurement. The measurements come from the recorded
# benchmark: eight paired draws, test images, difference to the plain run, each remedy's strength
# chosen on two other draws by validation accuracy. The whole table, and the reckoning with it,
# comes in section 5.

# %%
tables = {base: {metric: Comparison(scores) for metric, scores in metrics.items()}
          for base, metrics in record["scores"].items()}  # fmt: skip
chosen = record["settings"]["chosen"]
print({key: record["settings"][key] for key in ("steps", "lr", "batch", "schedule", "draws")})
print("chosen strengths:", chosen["plain"])


def effect(arm, base="plain"):
    """Prints the recorded difference to the base, draw by draw, with its 95 % interval."""
    for metric in ("accuracy", "loss"):
        d = tables[base][metric].difference(arm, base)
        print(f"{arm} minus {base}: {metric} {d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]")


# %% [markdown]
# ### Noise in front of the head is a penalty
#
# Augmentation and dropout look like two ideas. They are one. Take one row $w$ of a linear head, the
# features $h$ of one image, a target $y$, and the squared loss. Disturb the features:
# $\tilde h = h + \varepsilon$, where $\varepsilon$ has mean 0 and covariance $S$. Then
#
# $$E\,(y - w^\top \tilde h)^2 = E\,\big((y - w^\top h) - w^\top\varepsilon\big)^2
# = (y - w^\top h)^2 - 2\,(y - w^\top h)\,w^\top \underbrace{E\,\varepsilon}_{0}
# + \underbrace{E\,(w^\top\varepsilon)^2}_{w^\top S\, w} .$$
#
# **Training on disturbed features is training on the clean ones, with the penalty $w^\top S\,w$.**
# What the noise looks like decides which weights are expensive.
#
# **Dropout** with rate $p$ sets each feature to zero with probability $p$, and divides the others
# by $1 - p$: $\tilde h_j = h_j\,m_j / (1 - p)$, with $m_j = 1$ with probability $1 - p$. The mean is
# $h_j$, as it must be. The variance is
#
# $$\operatorname{Var}\tilde h_j = \frac{h_j^2}{(1-p)^2}\,\operatorname{Var} m_j
# = \frac{h_j^2}{(1-p)^2}\; p\,(1-p) = \frac{p}{1-p}\, h_j^2 ,$$
#
# and features are dropped independently, so $S$ is diagonal. Averaged over $n$ images $h_i$:
#
# $$\boxed{\;\text{penalty} = \frac{p}{1-p} \sum_j w_j^2\; \frac1n \sum_i h_{ij}^2\;}$$
#
# It is an L2 penalty, but *adaptive*: the weight on a feature that is large pays more. (With all
# features scaled to mean square 1 it is plain weight decay with $\lambda = p/(1-p)$; $p = 1/2$ is
# then $\lambda = 1$.) For the cross-entropy the same holds to second order in the noise (Wager et
# al. 2013). Check it on the real features of our 100 images, with the row of the digit 3:

# %%
_, model = at_the_start(seed=0)  # not yet trained
H = tl.extract_features(model.backbone, task.loaders(augment=False).train).features.astype(float)
w, bias = model.head.weight[3].detach().cpu().double().numpy(), model.head.bias[3].item()
y = (task.train.targets == 3).double().numpy()
p, copies = 0.5, 2000
simulated = []
for _ in range(copies):
    dropped = H * (rng.random(H.shape) >= p) / (1 - p)
    simulated.append(np.mean((y - dropped @ w - bias) ** 2))
clean = np.mean((y - H @ w - bias) ** 2)
penalty = p / (1 - p) * np.sum(w**2 * np.mean(H**2, axis=0))
print(f"clean {clean:.4f} + penalty {penalty:.4f} = {clean + penalty:.4f}")
print(f"simulated with {copies} drops: {mean_interval(simulated)}")
assert abs(np.mean(simulated) - clean - penalty) < 5 * np.std(simulated) / np.sqrt(copies)

# %%
effect("dropout")

# %% [markdown]
# **Augmentation** disturbs the image, and the features move with it. Here $S$ is not diagonal. It
# is large along those directions in which a turn, a shift or another colour moves the features.
# Weights along them become expensive: the head is told not to listen to what changes although the
# digit stays the same.

# %%
generator = torch.Generator().manual_seed(1)
one = task.train.inputs[[35]]
copies = tl.datasets.augment_images(one.repeat(9, 1, 1, 1), generator)
shown = torch.cat([one, copies])
pictures = tl.plots.show_images(shown, ["as it is"] + [""] * 9, ncols=10)
tl.plots.alt(pictures, "A digit, and nine copies: turned, zoomed, shifted, in other colours.")

# %% [markdown]
# How much of the features' spread is such disturbance? Take 20 distorted copies of each image and
# split the variance: between the classes, between images of a class, and between the copies of one
# image. (Within the copies the mean is not the clean $h$; the identity above then holds with the
# copies' own mean in place of $h$.)

# %%
loader = task.loaders(100, augment=True, seed=1).train
loader.shuffle = False  # the same image in the same row of each pass
moved = np.stack([tl.extract_features(model.backbone, loader).features for _ in range(20)])
image_mean = moved.mean(axis=0)  # (100, 128)
labels = task.train.targets.numpy()
class_mean = np.stack([image_mean[labels == k].mean(axis=0) for k in range(10)])
share = {
    "between classes": np.sum((class_mean[labels] - class_mean.mean(axis=0)) ** 2) / 100,
    "images of one class": np.sum((image_mean - class_mean[labels]) ** 2) / 100,
    "copies of one image": np.sum((moved - image_mean) ** 2) / 2000,
}
for name, variance in share.items():
    print(f"{name:20} {variance / sum(share.values()):.0%}")

# %%
noise = (moved[:, 0] - image_mean[0]).T @ (moved[:, 0] - image_mean[0]) / 20  # S of image 0
left = np.mean((1 - moved[:, 0] @ w) ** 2)
np.testing.assert_allclose(left, (1 - image_mean[0] @ w) ** 2 + w @ noise @ w, rtol=1e-4)

# %% [markdown]
# A third of what the frozen features say is about things that do not matter, and that is more than
# they say about the digit. And fine-tuning
# trains the backbone too: it may not only refuse to listen, it may stop saying it.

# %%
effect("augmentation")
assert tables["plain"]["loss"].difference("augmentation", "plain").high < -0.03

# %% [markdown]
# ### Weight decay: do the sum first
#
# Decoupled weight decay multiplies each weight by $1 - \eta_s \lambda$ in step $s$ (lesson 02). In
# a whole run that makes
#
# $$\prod_s (1 - \eta_s \lambda) \approx e^{-\lambda \sum_s \eta_s} .$$
#
# Only the *sum of the learning rates* counts. That answers guess 3, with torch's own AdamW and a
# weight whose gradient is always zero:

# %%
weight = nn.Parameter(torch.ones(1, 1))
optimizer = torch.optim.AdamW([weight], lr=3e-3, weight_decay=0.01)
rates = [3e-3 * 0.5 * (1 + np.cos(np.pi * step / 150)) for step in range(150)]  # a cosine
for rate in rates:
    optimizer.param_groups[0]["lr"] = rate
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
print(f"sum of the rates {sum(rates):.3f}; decay 0.01 leaves {weight.item():.4f} of a weight, "
      f"e^(-0.01 sum) = {np.exp(-0.01 * sum(rates)):.4f}")
for decay in (0.1, 1.0, 4.0):
    print(f"decay {decay}: {np.exp(-decay * sum(rates)):.2f}")
assert abs(weight.item() - np.exp(-0.01 * sum(rates))) < 1e-4

# %% [markdown]
# A fifth of one percent: in a short fine-tuning the default decay does nothing whatever. To be felt
# it must be a hundred times stronger. Then it pulls towards zero, where no pre-trained weight wants
# to be; the pull towards $\theta_0$ is L2-SP (lessons 02 and 08).

# %%
effect("weight decay")

# %% [markdown]
# ### Early stopping, and what choosing costs
#
# Lesson 02 derived that stopping after $t$ steps of size $\eta$ acts like a penalty of strength
# $1/(\eta t)$ on the distance from the start. Here it keeps the weights of the best of 15 readings
# of the validation loss. (The benchmark's learning rate falls to zero along a cosine. Such a run
# comes to rest by itself, and little is left to stop. Our watched run had a constant rate.)

# %%
effect("early stopping")

# %% [markdown]
# The validation images that choose the step become a little flattering. By how much? Split the 300
# at random into halves A and B: let A choose the step of our watched run, and compare A's loss
# there with B's. Over many splits the halves are alike; only the choosing makes a difference.

# %%
nll = np.stack([-s[1].gather(1, task.val.targets[:, None])[:, 0].numpy() for s in seen.values()])
optimism, kept = [], []
for _ in range(2000):
    order = rng.permutation(300)
    a, b = nll[:, order[:150]].mean(axis=1), nll[:, order[150:]].mean(axis=1)
    optimism.append(b[a.argmin()] - a[a.argmin()])
    kept.append(steps[a.argmin()])
print(f"B's loss minus A's at the step that A chose: {np.mean(optimism):+.3f}")
print(f"steps chosen, middle 80 %: {np.percentile(kept, 10):.0f} to {np.percentile(kept, 90):.0f}")

# %% [markdown]
# About two percent of the loss: the readings of one run are nearly the same model, and a choice among
# like things cannot flatter much. Choices among different things flatter more, and they add up. In the benchmark the
# 300 validation images chose four strengths, a step, and the ingredients of a soup. That is why its
# table is made of *test* images only, which chose nothing.
#
# ### Label smoothing: a target that can be reached
#
# Section 1 found the driving force: on right answers the cross-entropy has no minimum, so logits
# grow for ever. Label smoothing (Szegedy et al. 2016) moves the target. The true class gets
# $q_y = 1 - \varepsilon + \varepsilon/K$, each other class $q_k = \varepsilon / K$, and the loss is
# $-\sum_k q_k \log p_k$. Which $p$ is best? Write
#
# $$-\sum_k q_k \log p_k = \underbrace{-\sum_k q_k \log q_k}_{\text{entropy of } q}
# + \underbrace{\sum_k q_k \log \frac{q_k}{p_k}}_{\ge 0,\ = 0 \text{ only if } p = q} .$$
#
# (The last sum is the Kullback-Leibler divergence; it is not negative since $-\log$ is convex.) So
# $p = q$. Since $\log p_y - \log p_k = z_y - z_k$, the best logits have a *finite* gap,
#
# $$\boxed{\;z_y - z_k = \log\frac{1 - \varepsilon + \varepsilon/K}{\varepsilon / K}\;}$$
#
# and the loss cannot fall below the entropy of $q$. Check: free logits, plain gradient descent,
# torch's own smoothed loss.

# %%
K, eps = 10, 0.1
target_gap = np.log((1 - eps + eps / K) / (eps / K))
q = np.full(K, eps / K)
q[3] += 1 - eps
z = torch.zeros(1, K, dtype=torch.float64, requires_grad=True)
for _ in range(5000):
    loss = F.cross_entropy(z, torch.tensor([3]), label_smoothing=eps)
    (gradient,) = torch.autograd.grad(loss, z)
    z = (z - 2.0 * gradient).detach().requires_grad_()
found_gap = (z[0, 3] - z[0, 0]).item()
print(f"gap: formula {target_gap:.4f}, found {found_gap:.4f}")
print(f"loss: entropy of q {-np.sum(q * np.log(q)):.4f}, found {loss.item():.4f}")
assert abs(found_gap - target_gap) < 1e-3 and abs(loss.item() + np.sum(q * np.log(q))) < 1e-6

# %%
effect("label smoothing")
calibration = tables["plain"]["calibration error"]
print("calibration error minus plain:", calibration.difference("label smoothing", "plain"))

# %% [markdown]
# Validation accuracy chose the strongest smoothing, and look what came of it. The four strengths lay
# within two points of each other on the validation images, so the choice was luck. The accuracy has
# not changed by more than noise. The loss has nearly doubled: at $\varepsilon = 0.4$ the target
# gives the true class 0.64, so even a perfect answer costs $-\log 0.64 = 0.45$. The logits are no
# longer too large, they are far too small, and the model is *under*-confident. Too sure or not sure
# enough: smoothing moves the target of confidence, it does not find it.
#
# On top of augmentation $\varepsilon = 0.05$ was chosen, and does no harm to the loss:

# %%
effect("label smoothing", "augmentation")
calibration = tables["augmentation"]["calibration error"]
change = calibration.difference("label smoothing", "augmentation")
print("calibration error minus augmentation:", change)
assert change.low > 0 and tables["plain"]["loss"].difference("label smoothing", "plain").low > 0.2

# %% [markdown]
# ### Ensembles: the average cannot lose
#
# Train $k$ models from the same start, in different orders and with different augmentations, and
# average their *probabilities*. Two facts, one about the loss, one about variance.
#
# **Jensen.** $-\log$ is convex, so for probabilities $p_1, \dots, p_k$ of the true class
#
# $$-\log\Big(\frac1k \sum_i p_i\Big) \;\le\; \frac1k \sum_i \big(-\log p_i\big):$$
#
# the loss of the average is at most the average loss. Not on average: on every single image. (The
# same is true if *logits* are averaged, as the cross-entropy is convex in them.) It says nothing
# about the best member, and nothing about accuracy.
#
# **Variance.** Let the members' outputs have variance $s^2$ each and correlation $\rho$ between any
# two. Then
#
# $$\operatorname{Var}\Big(\frac1k\sum_i X_i\Big) = \frac{1}{k^2}\Big(k\,s^2 + k(k-1)\,\rho\,s^2\Big)
# = \rho\,s^2 + (1-\rho)\,\frac{s^2}{k} .$$
#
# The second part falls as $1/k$; the first one stays. It is what the members have in common: the
# same start, and above all the same 100 images. That sets the price of *likeness*, and it is why
# members should differ.

# %%
rho, s, ks = 0.6, 1.5, np.arange(1, 17)
common, own = rng.normal(size=(200_000, 1)), rng.normal(size=(200_000, 16))
X = s * (np.sqrt(rho) * common + np.sqrt(1 - rho) * own)
by_formula = rho * s**2 + (1 - rho) * s**2 / ks
by_simulation = [X[:, :k].mean(axis=1).var() for k in ks]
np.testing.assert_allclose(by_simulation, by_formula, rtol=0.03)

# %% jupyter={"source_hidden": true}
fig, ax = tl.plots.subplots(figsize=(5.6, 2.8))
ax.plot(ks, by_formula, "-", color=BLUE, marker="", label="formula")
ax.plot(ks, by_simulation, "o", color=ORANGE, label="simulation")
ax.axhline(rho * s**2, color="black", ls=":", label=r"what is common: $\rho s^2$")
ax.set(xlabel="members k", ylabel="variance of the mean", ylim=(0, None))
ax.legend()
tl.plots.alt(ax, "Variance over the number of members falls like 1/k towards a floor above zero; "
             "most of the gain comes with the first four members.")  # fmt: skip

# %% [markdown]
# Four members already bring three quarters of what infinitely many would.
#
# ### Now live: twenty short trainings
#
# For each draw one plain model and three augmented ones, from the same start, 30 steps each. We
# need them for the ensemble, for the soup that comes next, and for a small live form of the table.

# %%
quick = tl.TrainConfig(
    lr=3e-3, num_steps=30, warmup_steps=5, weight_decay=0.0, precision="fp32", progress=False
)
recipes = {"plain": (False, 0), "augmentation": (True, 0), "member 2": (True, 1), "member 3": (True, 2)}
jobs = list(itertools.product(range(num_draws), recipes))


def short_run(job):
    """One training; returns the weights and the probabilities on the test images."""
    seed, recipe = job
    augment, order = recipes[recipe]
    task, model = at_the_start(seed)
    loader = task.loaders(20, augment=augment, seed=100 * seed + order).train
    tl.fit(model, loader, None, replace(quick, seed=order))
    return model.cpu().state_dict(), tl.predict(model, task.test.inputs).double()


# %%
runs = dict(zip(jobs, tl.side_by_side(short_run, jobs), strict=True))
truth = task.test.targets
rows = torch.arange(len(truth))
members = ["augmentation", "member 2", "member 3"]
p = torch.stack([torch.stack([runs[seed, m][1] for m in members]) for seed in range(num_draws)])
member_losses = -p[:, :, rows, truth].log()  # (draws, members, images)
ensemble_losses = -p.mean(dim=1)[:, rows, truth].log()  # (draws, images)
never_worse = (ensemble_losses <= member_losses.mean(dim=1) + 1e-12).all().item()
print(f"Jensen holds on each of {ensemble_losses.numel():,} images: {never_worse}")
print(f"mean loss of a member {member_losses.mean():.3f}, of the ensemble {ensemble_losses.mean():.3f}")
assert never_worse

# %%
effect("ensemble of 4")
effect("ensemble of 4", "augmentation")

# %% [markdown]
# It costs four trainings and four times the work for every answer, for ever. The next idea gets rid
# of the second half of the bill.
#
# ### Soups: average the weights
#
# Average the *weights* instead, and it is one model again. For two networks trained from different
# random starts this is nonsense: unit 17 of one has nothing to do with unit 17 of the other. But
# ours share $\theta_0$, and none has gone far. Write $\theta_i = \theta_0 + \delta_i$ and expand the
# logits to first order:
#
# $$z(\theta_0 + \bar\delta) \approx z(\theta_0) + J\,\bar\delta
# = \frac1k \sum_i \big( z(\theta_0) + J\,\delta_i \big) \approx \frac1k \sum_i z(\theta_i),$$
#
# with $\bar\delta$ the mean of the $\delta_i$ and $J$ the slopes of the logits in the weights. **As
# long as the network is nearly linear along the $\delta_i$, the soup is the ensemble** (the one that
# averages logits), at the price of one model. The errors are of second order in $\delta$; whether
# they are small, only a measurement says. From scratch the uniform soup is one line:


# %%
def uniform(thetas):
    return {key: sum(theta[key] for theta in thetas) / len(thetas) for key in thetas[0]}


def accuracy_of(theta, part, model=by_fit):
    model.load_state_dict(theta)
    return (tl.predict(model, part.inputs).argmax(dim=1) == part.targets).double().mean().item()


thetas = [runs[0, m][0] for m in members]
soup = uniform(thetas)
for key, value in tl.weight_space.average(thetas).items():
    torch.testing.assert_close(soup[key], value)

# %% [markdown]
# A soup is only as good as its worst vegetable allows. The **greedy soup** tastes: sort the models
# by validation accuracy, begin with the best, add the next one only if the soup does not get worse.


# %%
def greedy(thetas, score):
    order = sorted(range(len(thetas)), key=lambda i: -score(thetas[i]))
    kept, best = order[:1], score(thetas[order[0]])
    for i in order[1:]:
        taste = score(uniform([thetas[j] for j in [*kept, i]]))
        if taste >= best:
            kept, best = [*kept, i], taste
    return uniform([thetas[j] for j in kept]), kept


# %%
def on_validation(theta):
    return accuracy_of(theta, task.val)


ours, kept = greedy(thetas, on_validation)
theirs, also_kept = tl.weight_space.greedy_soup(thetas, on_validation)
print("validation accuracy of the members:", [round(on_validation(theta), 3) for theta in thetas])
print(f"the greedy soup takes {kept} and reaches {on_validation(ours):.3f}")
assert kept == also_kept

# %% [markdown]
# When does it work? Walk in a straight line from one model to another and read the loss on the way.
# Once to a member with the same start; once to a model that was fine-tuned from *another*
# pre-training of the same network on the same letters (`glyphnet_seed1`), just as good. **Draw both
# curves before you look.**

# %%
_, stranger = at_the_start(0, "glyphnet_seed1")
tl.fit(stranger, task.loaders(20, augment=True, seed=1).train, None, quick)
ends = {"same start": thetas[1], "another pre-training": stranger.cpu().state_dict()}
alphas, lines = np.linspace(0, 1, 9), {}
walker = by_fit
for name, theta in ends.items():
    lines[name] = []
    for alpha in alphas:
        walker.load_state_dict(tl.weight_space.interpolate(thetas[0], theta, alpha))
        lines[name].append(F.nll_loss(log_probabilities(walker, task.val), task.val.targets).item())

# %% jupyter={"source_hidden": true}
fig, ax = tl.plots.subplots(figsize=(6, 3.2))
for (name, line), color, style in zip(lines.items(), (BLUE, ORANGE), ("-", "--"), strict=True):
    ax.plot(alphas, line, style, color=color, marker="o", label=name)
ax.axhline(np.log(10), color="black", ls=":", lw=1, label="no knowledge: log 10")
ax.set(xlabel="from model A (0) to model B (1), in a straight line", ylabel="validation loss",
       ylim=(0, 4.4))  # fmt: skip
ax.legend(loc="upper right", fontsize=9)
tl.plots.alt(ax, "Loss between two models: with the same start the middle is lower than both ends; "
             "with another pre-training the middle is as bad as knowing nothing.")  # fmt: skip

# %%
middle = {name: line[4] - (line[0] + line[-1]) / 2 for name, line in lines.items()}
print({name: f"middle minus mean of the ends: {rise:+.2f}" for name, rise in middle.items()})
assert middle["same start"] < 0.02 and middle["another pre-training"] > 0.5

# %% [markdown]
# No wall between models of one start; a mountain between models of two, in whose middle nothing is
# left of either. A common pre-trained $\theta_0$ is what makes a soup possible: one more thing that
# pre-training buys.

# %%
effect("uniform soup of 4", "augmentation")
effect("greedy soup of 4", "augmentation")
soup_or_all = tables["augmentation"]["loss"].difference("uniform soup of 4", "ensemble of 4")
print("loss, uniform soup minus ensemble:", soup_or_all)

# %% [markdown]
# ### Pruning: does it regularise, or only compress?
#
# A model with fewer weights should overfit less: so one reads. Magnitude pruning sets the smallest
# weights to zero, over all layers together, and keeps them there. From scratch: one ranking of all.


# %%
def magnitude_masks(weights, sparsity):
    """For each tensor a mask of 0 and 1; the smallest of all weights together get 0."""
    sizes = torch.cat([weight.abs().flatten() for weight in weights])
    mask = torch.ones_like(sizes)
    mask[sizes.argsort(stable=True)[: round(sparsity * len(sizes))]] = 0
    pieces = mask.split([weight.numel() for weight in weights])
    return [piece.view_as(weight) for piece, weight in zip(pieces, weights, strict=True)]


# %%
_, thin = at_the_start(seed=0)
thin.load_state_dict(soup)
layers = [m for m in thin.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
ours = magnitude_masks([layer.weight.detach() for layer in layers], 0.5)
prune.global_unstructured([(m, "weight") for m in layers], prune.L1Unstructured, amount=0.5)
assert all(torch.equal(mask, m.weight_mask) for mask, m in zip(ours, layers, strict=True))
walker.load_state_dict(soup)
for name, reader in {"the soup": walker, "half of it pruned": thin}.items():
    hits = log_probabilities(reader, task.val).argmax(dim=1) == task.val.targets
    print(f"{name:18} validation accuracy {hits.double().mean():.3f}")

# %% [markdown]
# `torch.nn.utils.prune` does the same, and keeps the mask beside the weight (`weight_orig` times
# `weight_mask`), so that training cannot bring a dead weight back. The recorded curve: the plain
# models of eight draws, pruned, and then trained on for 40 steps on the same images. The fair
# comparison for *trained on* is sparsity 0: the same 40 steps, nothing pruned.

# %%
curves = [extra["sparsity"] for extra in record["extra"]["plain"]]
sparsities = [float(sparsity) for sparsity in curves[0]["pruned"]]
tested = {name: {s: [curve[name][str(s)]["accuracy"] for curve in curves] for s in sparsities}
          for name in ("pruned", "trained on")}  # fmt: skip
for sparsity in sparsities:
    gain = [a - b for a, b in zip(tested["trained on"][sparsity], tested["trained on"][0.0])]
    shown = mean_interval(gain) if sparsity else "(reference)"
    print(f"sparsity {sparsity:4}: pruned {np.mean(tested['pruned'][sparsity]):.3f}, trained on "
          f"{np.mean(tested['trained on'][sparsity]):.3f}; minus sparsity 0: {shown}")

# %% jupyter={"source_hidden": true}
fig, ax = tl.plots.subplots(figsize=(6.4, 3.2))
for (name, by_sparsity), color, style in zip(tested.items(), (ORANGE, BLUE), ("--", "-")):
    found = [mean_interval(values) for values in by_sparsity.values()]
    mean = np.array([interval.mean for interval in found])
    half = mean - np.array([interval.low for interval in found])
    ax.errorbar(sparsities, mean, yerr=half, ls=style, color=color, marker="o", capsize=3,
                label={"pruned": "pruned, nothing after", "trained on": "then 40 more steps"}[name])
ax.axhline(0.1, color="black", ls=":", lw=1, label="chance")
ax.set(xlabel="sparsity: share of weights that are zero", ylabel="test accuracy", ylim=(0, 1))
ax.legend(loc="lower left")
tl.plots.alt(ax, "Accuracy over sparsity: without training it falls from 0.4 on; with 40 more steps "
             "it is level up to about 0.6 and falls to chance at 0.9 and beyond.")  # fmt: skip

# %% [markdown]
# Without more training a fifth of the weights go unnoticed, then the answers fall apart. With 40 more
# steps 40 % can go at no cost that we could measure; at 60 % it costs a point or two, at 80 % most of
# what was known. And nowhere is the pruned model *better* than the unpruned one by more than noise.
# Here pruning compresses. It does not regularise. (Zeros save memory in a sparse file, and time only
# on hardware that skips them: lesson 36.)

# %%
for sparsity in (0.2, 0.4):
    gain = [a - b for a, b in zip(tested["trained on"][sparsity], tested["trained on"][0.0])]
    assert mean_interval(gain).low > -0.02 and mean_interval(gain).high < 0.02
at_80 = np.subtract(tested["trained on"][0.8], tested["trained on"][0.0])
assert mean_interval(at_80).high < -0.1

# %% [markdown]
# In the table this arm has to live on the same budget: 110 steps, pruning, 40 steps.

# %%
effect("pruning")

# %% [markdown]
# ## 4. Ten looks at noise
#
# Ten arms are compared with one. A 95 % interval misses the truth once in twenty times. If *nothing*
# helped, ten intervals would still give $10 \times 0.05 = 0.5$ false alarms per table: one in two
# tables. And whoever writes about the best arm of ten writes about the luckiest.
#
# **Holm's procedure** keeps the chance of *any* false alarm below 5 %. Take the p-values of the
# paired t-tests and sort them: $p_{(1)} \le \dots \le p_{(m)}$. Compare the smallest with
# $0.05/m$, the next with $0.05/(m-1)$, and so on, until one fails; stop there, and believe only
# what came before.
#
# Why does it hold? Let $m_0$ of the $m$ arms truly do nothing. Look at the first of them that the
# procedure comes to, in place $j$. Only arms that do something stand before it, so
# $j - 1 \le m - m_0$, and its bar is $0.05/(m - j + 1) \le 0.05/m_0$. So a false alarm needs one
# of the $m_0$ idle arms to have $p \le 0.05/m_0$. Each does with probability $0.05/m_0$; together
# at most $0.05$. Independence was not needed, which is good, as all arms share one control.


# %%
def holm(p_values, level=0.05):
    """Which of the hypotheses are rejected; bool array."""
    p_values = np.asarray(p_values)
    rejected = np.zeros(len(p_values), dtype=bool)
    for place, i in enumerate(np.argsort(p_values, kind="stable")):
        if not p_values[i] <= level / (len(p_values) - place):  # nan: no difference at all
            break
        rejected[i] = True
    return rejected


# %%
def paired_p(differences):
    """Two-sided p-value of a paired t-test, for each row of differences (arms, draws)."""
    from scipy.stats import ttest_1samp

    return ttest_1samp(np.atleast_2d(differences), 0.0, axis=1).pvalue


# %% [markdown]
# Three thousand tables in which no arm does anything (noise, and a control that all share):

# %%
tables_tried, arms, draws = 3000, 10, 8
noise = rng.normal(size=(tables_tried, arms + 1, draws))
idle = (noise[:, 1:] - noise[:, :1]).reshape(-1, draws)  # each arm minus the control
p_idle = paired_p(idle).reshape(tables_tried, arms)
print(f"false alarms per table: {np.mean((p_idle < 0.05).sum(axis=1)):.2f}")
print(f"tables with any: {np.mean((p_idle < 0.05).any(axis=1)):.0%}, "
      f"after Holm: {np.mean([holm(row).any() for row in p_idle]):.1%}")
assert np.mean([holm(row).any() for row in p_idle]) < 0.06

# %% [markdown]
# ## 5. The experiment
#
# First the small live form: what the twenty short runs say. Same start, 30 steps per model.

# %%
arms_live = {arm: [runs[seed, arm][1] for seed in range(num_draws)]
             for arm in ("plain", "augmentation")}  # fmt: skip
arms_live["ensemble of 3, augmented"] = list(p.mean(dim=1))
arms_live["soup of 3, augmented"] = []
for seed in range(num_draws):
    walker.load_state_dict(uniform([runs[seed, m][0] for m in members]))
    arms_live["soup of 3, augmented"].append(log_probabilities(walker, task.test).exp())
live = {arm: [-q[rows, truth].log().mean().item() for q in found] for arm, found in arms_live.items()}

# %%
live["mean of 3 members"] = member_losses.mean(dim=(1, 2)).tolist()
live = Comparison(live)
for arm in live.scores:
    print(f"{arm:26} loss {live.interval(arm)}, minus plain {live.difference(arm, 'plain')}")
for arm in ("ensemble of 3, augmented", "soup of 3, augmented"):
    gain = live.difference(arm, "mean of 3 members")
    print(f"{arm:26} minus the mean of its members {gain}")
    assert gain.high < 0

# %% [markdown]
# Five draws of 30 steps cannot tell augmentation from plain. But the averages already stand clear of
# their members, the soup too: guess 2.
#
# Then the recorded form: 150 steps per model, eight draws, two tables. In the first, each remedy is
# alone against the plain run. In the second, each is added to augmentation. Three arms cost four
# trainings (their learning rates are 1, 1/3, 2 and 1 times the usual one), so beside them stands what
# a single model makes of four times the steps. (Augmentation's strength was not chosen: every image
# is augmented, as the library does it.)


# %%
def verdicts(base, metric):
    """arm -> (paired difference to the base, whether it survives Holm's correction)."""
    comparison = tables[base][metric]
    arms = [arm for arm in comparison.scores if arm != base]
    gains = [np.subtract(comparison.scores[arm], comparison.scores[base]) for arm in arms]
    survives = holm(paired_p(gains)).tolist()
    return {arm: (comparison.difference(arm, base), real) for arm, real in zip(arms, survives)}


# %%
def show_table(base):
    accuracy, loss = verdicts(base, "accuracy"), verdicts(base, "loss")
    print(f"{'minus ' + base:26} {'accuracy':30} loss           (* survives Holm)")
    for arm in accuracy:
        cells = [f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}] {'*' if real else ' '}"
                 for d, real in (accuracy[arm], loss[arm])]  # fmt: skip
        print(f"{arm:26} {cells[0]:30} {cells[1]}")


# %%
for base in tables:
    for metric in ("accuracy", "loss"):
        print(f"{base}, {metric}: {tables[base][metric].interval(base)}")
show_table("plain")

# %%
show_table("augmentation")

# %% jupyter={"source_hidden": true}
FOURFOLD = ("ensemble of 4", "uniform soup of 4", "greedy soup of 4", "one model, 4 x the steps")


def draw_verdicts(axes, base):
    for ax, metric in zip(axes, ("accuracy", "loss"), strict=True):
        found = verdicts(base, metric)
        for row, (arm, (d, real)) in enumerate(found.items()):
            color = ORANGE if arm in FOURFOLD else BLUE
            if d.low > 0.3:  # far outside: say so, and keep the scale for the others
                ax.text(0.98, row, f"{d.mean:+.2f} $\\rightarrow$", ha="right", va="center",
                        transform=ax.get_yaxis_transform())  # fmt: skip
                continue
            ax.errorbar(d.mean, row, xerr=[[d.mean - d.low], [d.high - d.mean]], color=color,
                        marker="o", ms=7, mfc=color if real else "white", capsize=3, lw=1.8)
        ax.axvline(0, color="black", ls="--", lw=1)
        ax.set_yticks(range(len(found)), list(found))
        ax.set(xlabel=f"{metric}, minus {base}", ylim=(len(found) - 0.4, -0.6))
        ax.grid(False, axis="y")
        ax.locator_params(axis="x", nbins=6)
        better = "right" if metric == "accuracy" else "left"
        ax.set_title(f"better is {better}", fontsize=9, loc=better)


fig, axes = tl.plots.subplots(2, 2, figsize=(10, 7.2), sharey="row")
for row, base in zip(axes, tables, strict=True):
    draw_verdicts(row, base)
tl.plots.alt(
    fig,
    "Paired differences with 95 % intervals. Above, to plain: augmentation gains most; ensemble and "
    "soups next. Below, to augmentation: ensemble and soups lower the loss most. Filled markers "
    "survive Holm's correction; orange arms cost four trainings.",
)

# %% [markdown]
# (Filled: survives Holm among the arms of its panel. Orange: four trainings.)
#
# **What mattered.** *Augmentation*: four points of accuracy and a fifth of the loss, for one
# training. Then *averages*: ensemble and uniform soup lower the loss in both tables, by 0.06 to 0.08,
# and the gain of augmentation and that of averaging add up. It is not the four-fold work that does
# it: one model of four times the steps is no better than one of one time; alone it is worse. The soup needs no more work per answer
# than a single model, and cannot be told from the ensemble.
#
# **What is within noise,** after the correction: weight decay, dropout and early stopping, in both
# tables and both numbers.
# Greedy is not better than uniform here. On top of augmentation *no* arm changes the accuracy by an
# amount that survives nine looks, though ensemble and soups all lie a point or more to the right. That
# is not "averages do not help accuracy". It is "eight draws cannot say".
#
# **What Holm took back.** Weight decay's loss and the uniform soup's accuracy (first table), and the
# accuracies of ensemble and greedy soup (second) have intervals that exclude zero. Had we run only that one arm, we
# would have announced it. And one thing that Holm leaves: four times the steps cost 0.4 points of
# accuracy, three images of 797. Certain is not the same as large.
#
# Compare with guess 4.

# %%
gained = tables["plain"]["loss"].difference("augmentation", "plain")
longer = tables["augmentation"]["loss"].difference("ensemble of 4", "one model, 4 x the steps")
souped = tables["augmentation"]["loss"].difference("uniform soup of 4", "augmentation")
print("loss, augmentation minus plain:               ", gained)
print("loss, ensemble minus one model of 4 x steps:  ", longer)
print("loss, uniform soup minus one augmented model: ", souped)
for base in tables:
    for metric in ("accuracy", "loss"):
        print(f"{base}, {metric}:", [arm for arm, (_, real) in verdicts(base, metric).items() if real])
assert gained.high < -0.03 and longer.high < -0.02 and souped.high < -0.01
assert tables["plain"]["accuracy"].difference("augmentation", "plain").low > 0.015

# %% [markdown]
# And the cheapest remedy of all, which is in no table because it cannot change an answer: divide
# the finished model's logits by the one number that is best on validation (section 1).

# %%
for base in tables:
    after = [extra["divided by it"]["loss"] for extra in record["extra"][base]]
    change = np.subtract(after, tables[base]["loss"].scores[base])
    found = mean_interval([extra["temperature"] for extra in record["extra"][base]])
    print(f"{base}: temperature {found}; loss {mean_interval(change)}")

# %% [markdown]
# ## Where it fails
#
# **Averages promise nothing about accuracy.** Three members, one image, two classes; two members
# are right, and barely. The third is wrong, and sure:

# %%
three = np.array([[0.55, 0.45], [0.55, 0.45], [0.05, 0.95]])  # the truth is class 0
print("right:", (three.argmax(axis=1) == 0).tolist(), " ensemble:", three.mean(axis=0).round(2))
assert three.mean(axis=0).argmax() == 1

# %% [markdown]
# **Soups need a common start,** and members that stayed near it. You saw the mountain.
#
# **Intervals say what was drawn, no more.** The draws share 797 test images and one pool of 700.
# They say how much depends on which 100 images were labelled, not how it would be on another task,
# with another backbone or with more labels, which leave less to repair.
#
# **A remedy that was hardly tuned is not refuted.** Each had three or four strengths, and two draws to
# choose by. A null here says: not worth more than noise *at this effort*.
#
# **The metric decides.** Label smoothing is the example: choose by accuracy, and you may pay in loss
# and calibration without seeing it.
#
# ## Explorer: how strong?
#
# Every remedy has a strength, and every strength a curve (means over the two tuning draws,
# validation images). Take a remedy and go from weak to strong. Where does the training curve stop
# falling to zero? Does the validation curve follow? (Training loss is the loss that was minimised,
# with the remedy in it.)

# %% jupyter={"source_hidden": true}
REMEDIES = ["augmentation", "weight decay", "dropout", "label smoothing"]


def draw_strength(remedy, strength):
    curves = record["tuning"]["plain"]
    values = list(curves[remedy])
    value = values[min(strength, len(values)) - 1]
    fig, axes = tl.plots.subplots(1, 2, figsize=(9, 3.2))
    pairs = [("plain", curves["augmentation"]["0.0"], "black"),
             (f"{remedy} {value}", curves[remedy][value], ORANGE)]  # fmt: skip
    for name, run_curves, color in pairs:
        at = run_curves["step"]
        axes[0].plot(at, run_curves["train_loss"], ":", color=color, marker="", label=f"{name}, training")
        axes[0].plot(at, run_curves["val_loss"], "-", color=color, marker="", label=f"{name}, validation")
        axes[1].plot(at, run_curves["val_accuracy"], "-", color=color, marker="", label=name)
    axes[0].set(xlabel="step", ylabel="loss (nats)", ylim=(0, 2))
    axes[1].set(xlabel="step", ylabel="validation accuracy", ylim=(0.5, 1))
    axes[0].legend(fontsize=8)
    axes[1].legend(fontsize=8, loc="lower right")


# %%
tl.widgets.explore(
    draw_strength,
    remedy=tl.widgets.choice(REMEDIES, label="remedy"),
    strength=tl.widgets.slider(1, 4, 1, 3, label="strength, weak to strong"),
)

# %% [markdown]
# ## Quiz

# %%
tl.quiz("09")

# %% [markdown]
# ## Exercise
#
# [Overfitting: the exercise](../exercises/09_overfitting.ipynb): stop a run with patience, find
# what label smoothing aims at, average probabilities and logits, cook a greedy soup, prune by
# magnitude, and judge somebody's table of twelve remedies.
#
# ## Papers
#
# - Bottou and Bousquet 2008, *The tradeoffs of large scale learning*, NIPS 20, section 2 (the three
#   parts). A later account: Bottou, Curtis and Nocedal 2018, arXiv:1606.04838.
# - Guo, Pleiss, Sun and Weinberger 2017, *On calibration of modern neural networks*, sections 2 and
#   4.2 (reliability, temperature), arXiv:1706.04599.
# - Wager, Wang and Liang 2013, *Dropout training as adaptive regularization*, section 2,
#   arXiv:1307.1493.
# - Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov 2014, *Dropout*, JMLR 15.
# - Szegedy, Vanhoucke, Ioffe, Shlens and Wojna 2016, *Rethinking the Inception architecture for
#   computer vision*, section 7 (label smoothing), arXiv:1512.00567.
# - Lakshminarayanan, Pritzel and Blundell 2017, *Simple and scalable predictive uncertainty
#   estimation using deep ensembles*, arXiv:1612.01474.
# - Wortsman et al. 2022, *Model soups*, section 2 (recipes), arXiv:2203.05482.
# - Neyshabur, Sedghi and Zhang 2020, *What is being transferred in transfer learning?* (no barrier
#   between models of one pre-training), arXiv:2008.11687.
# - Holm 1979, *A simple sequentially rejective multiple test procedure*, Scand. J. Statistics 6.
#
# ## Glossary
#
# | term | meaning | Chinese |
# |---|---|---|
# | overfitting | a choice fits the training examples better and new ones worse | 过拟合 |
# | generalisation gap | risk minus training loss | 泛化差距 |
# | approximation, estimation, optimisation error | class too small, data too few, minimum not reached | 逼近误差，估计误差，优化误差 |
# | calibration | of the answers given with 90 %, 90 % are right | 校准 |
# | temperature | one number that logits are divided by | 温度 |
# | data augmentation | training on changed copies whose label stays | 数据增强 |
# | dropout | setting random features to zero in training | 随机失活 |
# | weight decay | a pull of every weight towards zero | 权重衰减 |
# | early stopping | keeping the weights of the best validation reading | 早停 |
# | label smoothing | a target with a little probability for every class | 标签平滑 |
# | ensemble | several models whose answers are averaged | 集成 |
# | model soup | one model whose weights are the average of several | 模型汤（权重平均） |
# | magnitude pruning | setting the smallest weights to zero | 幅值剪枝 |
# | sparsity | share of the weights that are zero | 稀疏度 |
# | multiple comparisons | more than one test, so more than one chance of a false alarm | 多重比较 |
