# %% [markdown]
# # 01 Why transfer?
#
# A network that learned to tell *letters and symbols* apart reads *digits* better than one that
# starts from nothing. How much better? Until when? And what did it cost? This lesson measures all
# three, against opponents that are given a fair chance.
#
# **Goals.** When you have worked through it you can
#
# 1. name the parts of a transfer problem: domain, task, source, target;
# 2. read a learning curve over labels, and say what pre-training is worth at each point of it;
# 3. list the controls without which a transfer result means nothing, and name a case where
#    transfer does not pay.
#
# **Before this:** lesson 00. **Time:** about 60 minutes.
# **Expected result:** at 5 labels per class, on wild digits, probe-then-fine-tune beats a tuned
# network from scratch by more than 40 points of accuracy (lower end of the 95 % interval). At 50
# labels a few points are left. On plain digits, augmentation does more than pre-training.

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %%
from functools import partial

import numpy as np
import torch

from tlcourse import arms, plots
from tlcourse.sources import GLYPHS, glyph_batch

# %% [markdown]
# ## 1. A question before anything is shown
#
# You get images of handwritten digits on photographs and five labels for each digit. Four people
# offer help. Put them in order, from the least to the most useful:
#
# - (a) logistic regression on the pixels;
# - (b) a convolutional network with *random* weights, whose features go into logistic regression;
# - (c) the same network, trained on your fifty images, with augmentation and all the time it wants;
# - (d) the same network, trained on letters and symbols, frozen, its features in logistic
#   regression.
#
# Write the order down, and beside (c) and (d) a guess of their accuracy.

# %% [markdown]
# ## 2. Four words
#
# Pan and Yang (2010, section 2) gave the words that everybody uses.
#
# A **domain** is a set of possible inputs $\mathcal{X}$ together with a distribution $P(X)$ over
# them: which images there can be, and how often each kind appears.
#
# A **task** is a set of labels $\mathcal{Y}$ together with the rule $P(Y \mid X)$: what is to be
# said about an input.
#
# The **source** is a domain and a task for which there are plenty of labels. The **target** is a
# domain and a task for which there are few. **Transfer** is to let what was learned on the source
# improve the prediction on the target.
#
# Here are ours, side by side.

# %%
task = tl.load_task("wild_digits", labels_per_class=5, seed=0)
scenes, glyph_labels = glyph_batch(12, torch.Generator().manual_seed(4))

axes = plots.show_images(scenes, [GLYPHS[label] for label in glyph_labels], ncols=12, size=0.9)
plots.alt(axes, "Source: twelve letters and symbols in colour over patches of a photo of a temple")

# %%
rows = torch.arange(12) * 4
titles = [int(label) for label in task.train.targets[rows]]
axes = plots.show_images(task.train.inputs[rows], titles, ncols=12, size=0.9)
plots.alt(axes, "Target: twelve handwritten digits in colour over patches of a photo of a flower")

# %% [markdown]
# | | source: glyph scenes | target: wild digits |
# |---|---|---|
# | inputs | printed glyphs over patches of photograph A | handwriting over patches of photograph B |
# | labels | 203 letters and symbols, no digit among them | 10 digits |
# | how many | as many as we like: a program draws them | 1,797 in all; 5 to 50 labelled per class |
#
# Domain *and* task differ. What they share is how an image is put together: one mark, turned and
# coloured, over a photograph. Remember this; it is why transfer will look so good here, and we come
# back to it in section 9.
#
# A claim about transfer needs two checks before anything else: the target's classes must not be
# among the source's, and no target image may be on both sides of the split.

# %%
assert not set(GLYPHS) & set("0123456789")
train_ids, val_ids, test_ids = (set(part.ids.tolist()) for part in (task.train, task.val, task.test))
assert not train_ids & val_ids and not train_ids & test_ids and not val_ids & test_ids

# %% [markdown]
# The split does a little more. The digits are stored in the order in which people wrote them, so
# training, validation and test are cut from three different stretches, and the test holds the
# hands of other writers.

# %% [markdown]
# ## 3. What is carried over
#
# Write the network as two functions. The **backbone** $f_\theta$ turns an image $x$ into features
# $f_\theta(x) \in \mathbb{R}^{128}$; $\theta$ are its weights. The **head** turns features into
# probabilities of the classes,
#
# $$p(y \mid x) = \operatorname{softmax}\big(W f_\theta(x) + b\big)_y ,$$
#
# with a matrix $W$ and a vector $b$. The source's head is of no use: it speaks about letters. What
# is carried over is $\theta$. Call the pre-trained weights $\theta_0$. There are three things to do
# with them:
#
# - keep $\theta = \theta_0$, learn $W$ and $b$: **linear probe**;
# - start at $\theta_0$, learn all three: **full fine-tuning**;
# - ignore $\theta_0$, start at random, learn all three: **scratch**.
#
# This is the map of the whole course. Everything to come is a way to choose how far, and along
# which directions, $\theta$ may leave $\theta_0$.


# %% jupyter={"source_hidden": true}
def draw_map():
    boxes = {  # name: (x, y, text)
        "transfer": (0.1, 0.5, "transfer\nlearning"),
        "pre": (0.38, 0.85, "pre-training\nwhich source, how long?"),
        "adapt": (0.38, 0.5, "adaptation\nhow far from the start?"),
        "rules": (0.38, 0.15, "regularisation\nwhat holds it back?"),
        "probe": (0.8, 0.93, "supervised, contrastive, masked\n(lessons 10, 11, 18, 22)"),
        "full": (0.8, 0.72, "linear probe, full fine-tuning\n(lessons 05 to 08)"),
        "peft": (0.8, 0.5, "parameter-efficient: LoRA,\nadapters, prompts (12 to 17)"),
        "l2": (0.8, 0.28, "L2-SP, early stopping, augmentation\n(lessons 02, 09)"),
        "shift": (0.8, 0.07, "other worlds: shift, forgetting\n(lessons 23 to 28)"),
    }
    arrows = [("transfer", "pre"), ("transfer", "adapt"), ("transfer", "rules"), ("pre", "probe"),
              ("adapt", "full"), ("adapt", "peft"), ("rules", "l2"), ("rules", "shift")]  # fmt: skip
    figure, ax = plots.subplots(figsize=(9.5, 4.0))
    for start, end in arrows:
        ax.annotate("", boxes[end][:2], boxes[start][:2], arrowprops={"arrowstyle": "-", "lw": 1.5})
    for x, y, text in boxes.values():
        ax.text(x, y, text, ha="center", va="center", fontsize=10,
                bbox={"boxstyle": "round,pad=0.5", "fc": "#E8F1FA", "ec": "#0072B2"})  # fmt: skip
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.axis("off")
    plots.alt(figure, "Concept map: transfer learning splits into pre-training, adaptation (linear "
              "probe, full and parameter-efficient fine-tuning) and regularisation")  # fmt: skip


draw_map()

# %% [markdown]
# ## 4. Frozen features, live
#
# With a frozen backbone the features never change, so we compute them once for all images and can
# then afford as many experiments as we like. Three descriptions of an image compete: its pixels,
# the features of a network with **random** weights, and the features of the pre-trained one.
#
# Why the random network? If it did well, the credit would belong to the architecture and not to
# pre-training.

# %%
everything = tl.load_task("wild_digits", labels_per_class=None)
describe = {
    "pixels": torch.nn.Flatten(),
    "random features": tl.load_backbone("glyphnet", pretrained=False, seed=0),
    "pre-trained features": tl.load_backbone("glyphnet"),
}
features = {}  # name -> features of the 300 validation and of the 797 test images
for name, network in describe.items():
    parts = everything.loaders(batch_size=700, augment=False)
    features[name] = [tl.extract_features(network, part) for part in (parts.val, parts.test)]

# %% [markdown]
# One probe by hand, so that nothing is hidden: bring every feature to mean 0 and deviation 1, fit
# logistic regression, count the hits. The library call does the same and also chooses the strength
# of the penalty on the validation images; here we fix it, to compare like with like.

# %%
from sklearn.linear_model import LogisticRegression

loader = task.loaders(batch_size=50, augment=False).train
train = tl.extract_features(describe["pre-trained features"], loader)
val, test = features["pre-trained features"]

mean, deviation = train.features.mean(axis=0), train.features.std(axis=0)
by_hand = LogisticRegression(C=1.0, max_iter=5000)
by_hand.fit((train.features - mean) / deviation, train.targets)
hits = by_hand.predict((test.features - mean) / deviation) == test.targets
print(f"by hand: {hits.mean():.3f}")

# %%
library = tl.linear_probe(train, test, c_grid=[1.0])
print(f"library: {library.accuracy:.3f}")
assert abs(library.accuracy - hits.mean()) < 0.005

# %% [markdown]
# Now the learning curve: 2, 5, 10, 20 and 50 labels per class, and at each point five different
# **draws** of which images are labelled. All three arms see the same draw, so their differences are
# *paired*: a lucky draw is lucky for all. That makes differences much more certain than the
# accuracies themselves.

# %%
counts = (2, 5, 10, 20, 50)


def probe_accuracy(name, labels_per_class, seed):
    labelled = tl.load_task("wild_digits", labels_per_class, seed)
    loader = labelled.loaders(batch_size=256, augment=False).train
    val, test = features[name]
    train = tl.extract_features(describe[name], loader)
    return tl.linear_probe(train, test, val, c_grid=(0.01, 0.1)).accuracy


# %%
live = {}  # labels per class -> comparison
for count in counts:
    probes = {name: partial(probe_accuracy, name, count) for name in describe}
    live[count] = tl.compare(probes, draws=5, progress=False)  # each arm is called with the seed

# %%
curves = {name: [live[count].scores[name] for count in counts] for name in describe}
ax = plots.plot_learning_curve(counts, curves, chance=0.1)
ax.set(ylim=(0, 1), title="Frozen descriptions of the image")
plots.alt(ax, "Accuracy over labels: pixels and random features stay below 0.3, pre-trained "
          "features rise far above both")  # fmt: skip

# %% [markdown]
# Random features hardly leave chance, and pixels climb slowly. On plain, centred digits both would do
# well; over photographs, in all colours and positions, they cannot separate mark and background.
# The pre-trained features can. At every number of labels:

# %%
for count in counts:
    gain = live[count].difference("pre-trained features", "pixels")
    print(f"{count:2} labels: pre-trained minus pixels {gain}")
    assert gain.low > 0.1

# %% [markdown]
# ## 5. Scratch deserves a fair chance
#
# Random features are an easy opponent. The hard one is the same network, trained from scratch. It
# is easy to cheat here without noticing. A fair scratch arm has
#
# 1. the **same augmentation** as the transfer arm;
# 2. **enough steps**: it has more to learn, so it gets 1,500, five times as many as transfer;
# 3. its **own learning rate**, chosen on validation images;
# 4. the **same labelled images**, draw by draw.
#
# One run of each, live and short, to see how they differ. Watch the validation accuracy.

# %%
task = tl.load_task("wild_digits", labels_per_class=10, seed=0)
loaders = task.loaders(batch_size=32, augment=True, seed=0)


def trained(pretrained, lr):
    model = tl.Classifier(tl.load_backbone("glyphnet", pretrained=pretrained), task.num_classes)
    config = tl.TrainConfig(lr=lr, num_steps=120, warmup_steps=20, eval_every_steps=30)
    return tl.fit(model, loaders.train, loaders.val, config)


histories = {"scratch": trained(False, 3e-3), "fine-tuned": trained(True, 1e-3)}

# %%
_, ax = plots.subplots()
for (name, history), marker in zip(histories.items(), "os", strict=True):
    ax.plot(history.eval_step, history.val_accuracy, marker=marker, label=name)
ax.set(xlabel="step", ylabel="validation accuracy", ylim=(0, 1))
ax.legend(loc="center right")
plots.alt(ax, "Validation accuracy over 120 steps: fine-tuning climbs at once, scratch stays low")

# %% [markdown]
# Fine-tuning climbs within the first steps; scratch is still looking for the mark in the picture.
# But 120 steps are not 1,500. The fair comparison takes about an hour on two cores, so it was run in
# advance by a program that you can run too, and its results came with the course:
#
# ```
# python benchmarks/wild_digits.py
# ```
#
# Everything below reads these recorded numbers.

# %% [markdown]
# ## 6. The whole learning curve
#
# Six arms, five paired draws each, 797 test images that no arm saw before the end. The last arm is
# the best that we know so far: fit the probe first, start the head from it, then fine-tune
# everything. Lesson 08 explains why this order matters.

# %%
recorded = arms.recorded("wild_digits")
names = ["pixels", "random features", "scratch", "probe", "fine-tune", "probe, then fine-tune"]
curves = {name: [recorded[count].scores[name] for count in counts] for name in names}
ax = plots.plot_learning_curve(counts, curves, chance=0.1)
ax.set(ylim=(0, 1))
plots.alt(ax, "Learning curves of six arms: fine-tuning far ahead at few labels, scratch catching "
          "up at 50 labels per class")  # fmt: skip

# %%
print("labels per class      " + "".join(f"{count:8}" for count in counts))
for name in names:
    means = (recorded[count].interval(name).mean for count in counts)
    print(f"{name:22}" + "".join(f"{mean:8.3f}" for mean in means))

# %% [markdown]
# Compare with your order from section 1. Then read the figure in three ways.
#
# **Vertically**: at a given number of labels, how much accuracy does pre-training add? Take the
# best arm minus scratch, draw by draw.

# %%
best, margins = "probe, then fine-tune", {5: 0.40, 10: 0.40, 20: 0.20, 50: 0.03}
gains = {count: recorded[count].difference(best, "scratch") for count in counts}
for count, gain in gains.items():
    print(f"{count:2} labels per class: {gain.mean:+.3f}  [{gain.low:+.3f}, {gain.high:+.3f}]")
assert all(gains[count].low > margin for count, margin in margins.items())

# %% [markdown]
# **Horizontally**: how many labels is pre-training worth? Transfer with $n$ labels reaches some
# accuracy; how many labels does scratch need for the same? We interpolate between the measured
# points, on a logarithmic axis of labels.


# %%
def labels_needed(accuracy, arm):
    """Labels per class at which an arm's mean curve reaches an accuracy; infinite if never."""
    means = [recorded[count].interval(arm).mean for count in counts]
    if accuracy > max(means):
        return np.inf
    return float(np.exp(np.interp(accuracy, means, np.log(counts))))


for count in (2, 5, 10):
    reached = recorded[count].interval(best).mean
    needed = labels_needed(reached, "scratch")
    worth = f"about {needed:.0f}" if np.isfinite(needed) else f"more than {max(counts)}"
    print(f"transfer, {count:2} labels: {reached:.2f}; scratch needs {worth} labels per class")

# %% [markdown]
# **By slope**: where does more labelling help each arm most? The probe flattens early: a fixed
# description has a ceiling, and more labels cannot raise it. Fine-tuning goes on, since it may
# change the description. Scratch rises last and steepest. Pre-training buys a *head start*: with
# labels in plenty and patience, scratch is known to come level (He et al. 2019).

# %%
flat = recorded[50].interval("probe").mean - recorded[20].interval("probe").mean
steep = recorded[50].interval("scratch").mean - recorded[20].interval("scratch").mean
print(f"from 20 to 50 labels: probe {flat:+.3f}, scratch {steep:+.3f}")
assert steep > flat + 0.05

# %% [markdown]
# **Was it a lucky checkpoint?** Pre-training has a seed of its own. The whole recipe was run from two
# more, with other initial weights and other scenes, and each checkpoint was fine-tuned on the same
# draws. If the gain hung on one lucky network, it would show here.

# %%
others = [f"{best} (seed {seed})" for seed in (1, 2)]
for count in (5, 10, 20, 50):
    apart = [recorded[count].difference(other, best) for other in others]
    print(f"{count:2} labels: seed 1 minus seed 0 {apart[0]}, seed 2 minus seed 0 {apart[1]}")
    assert all(abs(difference.mean) < 0.05 for difference in apart)

# %% [markdown]
# The three agree to within a point or two where the gain is tens of points.

# %% [markdown]
# ## 7. What did it cost?
#
# Pre-training is work too. The checkpoint's **card** says how much.

# %%
card = tl.load_backbone("glyphnet").card
images_seen = card["num_steps"] * card["batch_size"]
print(f"{card['num_steps']:,} steps of {card['batch_size']} scenes: {images_seen:,} images")
print(f"{card['minutes']} minutes, {card['machine']}")
print(f"accuracy on new scenes: {card['source_test_accuracy']}, {len(GLYPHS)} classes")

# %% [markdown]
# A million images for one checkpoint, against 50 for one fine-tuning. It pays when the cost is
# shared: the source labels were free because a program draws the scenes; the checkpoint is trained
# once and used by every lesson of this course. If you had to *buy* a million source labels for a
# single target that needs 500 of its own, buy the 500.

# %% [markdown]
# ## 8. When transfer does not pay
#
# Take the background away. *Plain digits* are the same digits, white on black, upright. Guess
# again: at five labels per class, which gives more, pre-training or augmentation?

# %%
plain = arms.recorded("plain_digits")
plain_names = ["scratch, no augmentation", "scratch", "probe, then fine-tune"]
plain_counts = sorted(plain)
curves = {name: [plain[count].scores[name] for count in plain_counts] for name in plain_names}
ax = plots.plot_learning_curve(plain_counts, curves, chance=0.1)
ax.set(ylim=(0, 1), title="Plain digits")
plots.alt(ax, "On plain digits the arms come together; augmentation closes most of the gap")

# %%
print("labels   pre-training adds             augmentation adds")
for count in plain_counts:
    by_pretraining = plain[count].difference("probe, then fine-tune", "scratch")
    by_augmentation = plain[count].difference("scratch", "scratch, no augmentation")
    print(f"{count:6}   {by_pretraining}   {by_augmentation}")

# %% [markdown]
# Here "pre-training adds" is transfer minus scratch, both augmented, and "augmentation adds" is
# scratch with minus scratch without it. At five labels, a few lines of augmentation are worth about
# 20 points, and pre-training about 3 on top. With one label pre-training seems to add more, but look
# at the width of that interval: five draws of ten images say little. At fifty labels next to nothing
# is left to add. An easy target needs little help, and augmentation has told the network most of
# what pre-training would have told it.

# %%
pretraining = {n: plain[n].difference("probe, then fine-tune", "scratch") for n in plain_counts}
augmentation = plain[5].difference("scratch", "scratch, no augmentation")
assert augmentation.low > pretraining[5].high + 0.05
assert pretraining[5].high < gains[5].low - 0.2  # far less than on wild digits
assert abs(pretraining[50].mean) < 0.03

# %% [markdown]
# So, before you reach for a pre-trained network, ask:
#
# 1. Is the target hard for the labels that I have? If a tuned scratch arm is good already, the gain
#    is small.
# 2. Does the source share what makes the target hard? Here it was the background. Lesson 10 tries
#    a source that has the same glyphs and no photographs.
# 3. Is there something cheaper that gives the same? Augmentation often is.

# %% [markdown]
# ## 9. Where it fails
#
# - **Our source was made to fit.** Source and target are composed by the same program, over
#   different photographs. The gains above are at the friendly end of what you will meet. Lesson 10
#   compares eight sources, some of them bad.
# - **Validation was generous.** 300 labelled validation images chose learning rate and step, more
#   than the training images of most arms. All arms had the same privilege, so the *differences*
#   are fair; the accuracies are a little better than what you would get with 50 labels in all.
# - **Five draws of labels, one test set.** The intervals say how much the choice of labelled images
#   matters. They do not say what other writers or other photographs would do.
# - **One architecture.** A larger network from scratch, or one built for small data, might close
#   part of the gap.

# %% [markdown]
# ## 10. Explorer
#
# Drag the number of labels and choose two arms. The figure shows their five draws, joined in pairs,
# and the difference with its interval. Find
#
# - two arms whose difference has an interval that contains zero;
# - the number of labels at which scratch overtakes the probe.


# %%
def show_pair(count, left, right):
    scores = [recorded[count].scores[name] for name in (left, right)]
    _, ax = plots.subplots(figsize=(6.4, 3.6))
    for pair in zip(*scores, strict=True):
        ax.plot([0, 1], pair, color=plots.palette[0], marker="o", ls="-", lw=1)
    ax.set(xlim=(-0.4, 1.4), ylim=(0, 1), ylabel="accuracy")
    ax.set_xticks([0, 1], [left, right])
    if left != right:
        ax.set_title(f"{count} labels per class, right minus left: "
                     f"{recorded[count].difference(right, left)}", fontsize=10)  # fmt: skip


# %%
tl.widgets.explore(
    show_pair,
    count=tl.widgets.choice(list(counts), 5, "labels", drag=True),
    left=tl.widgets.choice(names, "scratch", "left"),
    right=tl.widgets.choice(names, "probe, then fine-tune", "right"),
)

# %% [markdown]
# ## 11. Quiz

# %%
tl.quiz("01")

# %% [markdown]
# ## 12. Exercise
#
# [Exercise 01](../exercises/01_why_transfer.ipynb): paired intervals, the worth of a label, a probe
# in four lines, a hunt for leaks, and a decision to make.
#
# ## Papers
#
# - Pan and Yang 2010, *A Survey on Transfer Learning*, section 2, doi:10.1109/TKDE.2009.191.
# - He, Girshick, Dollár 2019, *Rethinking ImageNet Pre-training*, sections 4 and 5,
#   arXiv:1811.08883: scratch catches up when it is given time, and when it is not.
# - Kornblith, Shlens, Le 2019, *Do Better ImageNet Models Transfer Better?*, section 4.7,
#   arXiv:1805.08974: the gain as the number of labels grows.
# - Kumar et al. 2022, *Fine-Tuning can Distort Pretrained Features*, section 3, arXiv:2202.10054.
#
# ## Glossary
#
# | term | meaning | 中文 |
# |---|---|---|
# | domain | inputs and how often each appears | 领域 |
# | task | labels and the rule from input to label | 任务 |
# | source, target | where knowledge comes from; where it is used | 源域、目标域 |
# | linear probe | linear classifier on frozen features | 线性探测 |
# | from scratch | training from random weights | 从头训练 |
# | learning curve | accuracy over the number of labels | 学习曲线 |
# | paired draws | arms compared on the same random choices | 配对抽样 |
# | negative transfer | the source makes the target worse | 负迁移 |
