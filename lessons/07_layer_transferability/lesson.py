# %% [markdown]
# # 07 Layer transferability
#
# "The lower layers are general, the upper ones are specific." It is said of every deep network.
# Here you cut a network open after each layer, put the lower part into a new network, and measure
# what the sentence is worth. Then you look at the layers themselves, without any training, and
# learn how easily such a look deceives.
#
# **Goals.** When you have worked through it you can
#
# 1. build the nets of Yosinski et al. (copied, frozen, fine-tuned, selfer, random) and say which
#    question each of them answers;
# 2. read a curve over the cut, tell a loss by *specificity* from a loss by *freezing*, and say when
#    the second one is *co-adaptation*;
# 3. derive linear CKA, say what it ignores and what it does not, remove its bias, and choose the
#    control without which its numbers mean nothing.
#
# **You need** lessons 03 (what freezing saves) and 05 (features of a layer). **Time** about 75
# minutes; the notebook itself runs in under a minute on two cores.
#
# **Expected result.** With all four layers frozen, letters beat shapes as a source by .22 [.17, .26]
# of the test images; with three, or with all layers trained on, the two sources are equal. The dip
# by co-adaptation that the original paper shows is *not* there in this small network.

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %%
import copy
import json
import math
from itertools import permutations

import numpy as np
import torch
from matplotlib.patches import Rectangle
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# %%
from tlcourse.comparing import Comparison
from tlcourse.evaluation import mean_interval
from tlcourse.layers import LayerFeatures
from tlcourse.locations import data_dir
from tlcourse.transferability import cka as library_cka

BLUE, ORANGE, GREEN, PURPLE = tl.plots.palette[:4]
GREY = "#999999"
torch.set_num_threads(1)  # a network this small gains nothing from a second core

# %% [markdown]
# ## Before you run anything
#
# A network with four layers and a head has learned to read letters and symbols. You copy its first
# $n$ layers into a new network, freeze them, give everything above new random weights, and train
# that on 50 images of each digit.
#
# Write down four guesses.
#
# 1. Which $n$ from 0 to 4 is best? Which is worst?
# 2. The same, but the layers come from a network that was trained on *these very digits*. It is
#    cut after layer 2, the upper half is made new and trained again on the same images. Can it end
#    up *worse* than the network it was cut from? Why should it?
# 3. Layers from a network that learned to name coloured, textured *shapes*: for which $n$ are they
#    as good as those of the letter network?
# 4. Two networks with *random* weights, never trained, from different seeds. On a scale from 0
#    (nothing in common) to 1 (the same up to a rotation), how similar are their top layers?

# %% [markdown]
# ## The picture
#
# The target task is called **B**: wild digits. The source task is called **A**. Each row below is
# one network, cut here at $n = 2$. The colour says where a layer's weights come from. A solid edge
# says that they are frozen, a dashed edge that they are trained.
#
# | network | lower $n$ layers | upper layers and head | the question it answers |
# |---|---|---|---|
# | base B | new, trained | new, trained | what do the labels give alone? |
# | A*n*B | from A, frozen | new, trained | are A's layers of use as they are? |
# | A*n*B+ | from A, trained on | new, trained | are they a good start? |
# | B*n*B | from B, frozen | new, trained | does *cutting and freezing* do harm by itself? |
# | B*n*B+ | from B, trained on | new, trained | and does cutting alone? |
# | random *n* | new, frozen | new, trained | is it what A has learned, or would any layers do? |
#
# B*n*B is called a **selfer**: its layers come from its own task. It is the control that makes the
# rest readable, and the one that is left out most often.


# %% jupyter={"source_hidden": true}
LAYERS = ("stem", "block 1", "block 2", "block 3")
COLOURS = {"A": BLUE, "B": GREEN, "random": GREY, "new": "white"}
NETS = {"base B": "", "AnB": "A", "AnB+": "A", "BnB": "B", "BnB+": "B", "random n": "random"}


def draw_net(ax, y, origin, n, frozen, name=""):
    """Four layers and a head from left to right; returns nothing."""
    for column, layer in enumerate((*LAYERS, "head")):
        below = column < n
        colour = COLOURS[origin if below and origin else "new"]
        locked = below and origin and frozen
        edge = {"lw": 2.4 if locked else 1.2, "ls": "-" if locked else "--", "ec": "black"}
        ax.add_patch(Rectangle((column, y - 0.33), 0.86, 0.66, fc=colour, **edge))
        ink = "white" if below and origin in ("A", "B") else "black"
        text = f"{layer}\nfrozen" if locked else layer
        ax.text(column + 0.43, y, text, ha="center", va="center", fontsize=9, color=ink)
    ax.text(-0.15, y, name, ha="right", va="center", fontsize=11)


# %% jupyter={"source_hidden": true}
figure, ax = tl.plots.subplots(figsize=(7.6, 4))
for row, (name, origin) in enumerate(NETS.items()):
    draw_net(ax, -row, origin, 2, not name.endswith("+"), name)
ax.set(xlim=(-1.3, 5), ylim=(-5.5, 0.9), title="Six networks, cut at n = 2")
ax.axis("off")
legend = [Rectangle((0, 0), 1, 1, fc=colour, ec="black") for colour in COLOURS.values()]
words = ["from A", "from B", "random", "new"]
ax.legend(legend, words, ncols=4, loc="lower center", bbox_to_anchor=(0.6, -0.12))
tl.plots.alt(
    figure,
    "Six rows of five boxes: stem, blocks 1 to 3, head. In AnB and AnB+ stem and block 1 come from "
    "A, in BnB and BnB+ from B, in random n from chance; those of AnB, BnB and random n are frozen.",
)

# %% [markdown]
# ## Two causes of a loss
#
# Suppose that A3B is worse than you hoped. There are two quite different reasons.
#
# **Specificity.** The copied layers answer the questions of A. What B needs to know was thrown
# away in them, and no training above can bring it back.
#
# **Co-adaptation.** Layers that were trained together rely on each other. Layer 2 says things in a
# code that layer 3 has learned to read, because both moved at the same time. Take layer 3 away,
# freeze layer 2, and a new layer 3 may not find the way to read that code.
#
# The second one has nothing to do with A. So it shows in a network whose layers come from B. Write
# $a(\cdot)$ for accuracy and add and subtract $a(\mathrm{B}n\mathrm{B})$:
#
# $$a(\mathrm{B}n\mathrm{B}^+) - a(\mathrm{A}n\mathrm{B}) \;=\;
# \underbrace{a(\mathrm{B}n\mathrm{B}^+) - a(\mathrm{B}n\mathrm{B})}_{\text{cost of freezing: same layers, may they move?}}
# \;+\; \underbrace{a(\mathrm{B}n\mathrm{B}) - a(\mathrm{A}n\mathrm{B})}_{\text{specificity: both frozen, from where?}}$$
#
# The sum is true whatever the numbers are. What it buys you is that each bracket changes *one*
# thing. The second bracket may be negative: then A's layers serve B better than B's own, which is
# the whole hope of transfer.
#
# **When is the cost of freezing co-adaptation?** Layers that may move can also simply learn more.
# That gain has nothing to do with a cut. We need a place where co-adaptation is impossible, and
# there is one: $n = 4$. All features are frozen there and only the head is new. With features $h$,
# a linear head and the cross-entropy of lesson 03, the loss is convex in the head (log-sum-exp is
# convex, the logits are linear in the head's weights), so gradient descent finds the best head
# again, whoever trained it before. What freezing costs at $n = 4$ is learning alone.
#
# Below it, the new layers above the cut are a non-convex problem, on a floor that may not move. If
# co-adaptation costs anything, it costs it **in the middle, on top of what $n = 4$ shows**. That is
# the dip to look for.
#
# Yosinski and colleagues found it, on ImageNet, with eight layers and half a million steps. Will
# it be there in a network of four layers? We do not know yet.

# %% [markdown]
# ## Cut and join
#
# `glyphs` is a network pre-trained on letters and symbols over photographs, for 2,500 steps.
# `shapes` has the same budget, and learned shapes with textures. Both cards say how well it went.

# %%
for name in ("glyphs", "shapes"):
    card = tl.load_backbone(name).card
    about = card["trained_on"].partition("(")[2].partition(")")[0]
    print(f"{name}: {about}")
    print(f"    {card['num_steps']:,} steps of {card['batch_size']} images, ", end="")
    print(f"{card['source_test_accuracy']:.0%} right on new ones")

# %% [markdown]
# The layers have names. The copy needs care at one place: a layer's parameters are those whose name
# begins with the layer's name *and a dot*, or layer 1 would also take layers 10 to 19 of a deeper
# network.

# %% tags=["nbval-check-output"]
layer_names = tl.freezing.layer_names(tl.load_backbone("glyphs").body)
print(layer_names)


def fresh(seed):
    """A network with new weights; the same ones for the same seed."""
    torch.manual_seed(seed)
    return tl.Classifier(tl.load_backbone("glyphnet", pretrained=False, seed=seed), 10)


# %%
def transplant(model, donor, n, frozen):
    """Put the first n layers of the donor's body into the model, and freeze them if asked to."""
    target, source = model.backbone.body.state_dict(), donor.state_dict()
    lower = tuple(name + "." for name in layer_names[:n])
    copied = {key: value for key, value in source.items() if key.startswith(lower)}
    model.backbone.body.load_state_dict({**target, **copied})
    if frozen:
        for name in layer_names[:n]:
            tl.freeze(model.backbone.body.get_submodule(name))
    return model


# %% [markdown]
# Two checks before we trust it. Up to the cut the new network must *say* the same as the donor,
# number for number. Above the cut it must not.

# %% tags=["nbval-check-output"]
donor = tl.load_backbone("glyphs").body
images = tl.load_task("wild_digits", None).val.inputs  # 300 images, no labels needed
model = transplant(fresh(0), donor, n=2, frozen=True).eval()
with torch.no_grad():
    for layer, name in zip(LAYERS, layer_names):
        ours = LayerFeatures(model.backbone.body, name, "flatten")(images[:8])
        theirs = LayerFeatures(donor, name, "flatten")(images[:8])
        print(f"{layer:8} the same as the donor's: {torch.equal(ours, theirs)}")
        assert torch.equal(ours, theirs) == (layer in LAYERS[:2])

# %% [markdown]
# And after a few steps of training the frozen layers must not have moved by a bit, while all the
# others have. `tl.fit` decays weights, so a frozen layer that only had its gradient set to zero
# would shrink (lesson 03). `tl.freeze` takes the parameter out of training altogether.


# %%
def train(model, task, num_steps, lr, seed, batch_size=24):
    """The last weights stay: nothing is chosen in the run."""
    config = tl.TrainConfig(
        lr=lr, num_steps=num_steps, warmup_steps=num_steps // 4, weight_decay=0.02,
        progress=False, seed=seed,
    )  # fmt: skip
    loaders = task.loaders(batch_size, augment=True, seed=seed)
    tl.fit(model.to(run.device), loaders.train, None, config)
    return model


# %% tags=["nbval-check-output"]
task = tl.load_task("wild_digits", labels_per_class=50, seed=0)
before = copy.deepcopy(model.state_dict())
train(model, task, num_steps=4, lr=3e-3, seed=0)
after = {name: value.cpu() for name, value in model.state_dict().items()}
for layer, name in zip((*LAYERS, "head"), (*(f"backbone.body.{n}" for n in layer_names), "head")):
    same = all(torch.equal(before[k], after[k]) for k in before if k.startswith(name + "."))
    print(f"{layer:8} {'has not moved' if same else 'has moved'}")
    assert same == (layer in LAYERS[:2])

# %% [markdown]
# ### What the freezing saves
#
# The rule of lesson 03: a *weight product* is needed where a layer is trained, an *input product*
# where anything below it is. For a convolution with a kernel of $k \times k$, from
# $C_\text{in}$ to $C_\text{out}$ channels and a map of $H \times W$ places, each of these products
# takes as many multiplications as the forward pass:
#
# $$t = C_\text{in}\, C_\text{out}\, k^2\, H\, W.$$
#
# **Guess.** Freeze the stem and block 1, which hold 7 % of all weights. Which share of the backward
# pass is gone: about a tenth, about a quarter, or about a half?


# %%
def backward_cost(n):
    """Multiplications of the backward pass for one image, with the first n layers frozen."""
    model = transplant(fresh(0), donor, n, frozen=True)
    loss = model(images[:1]).logsumexp(dim=1).sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops() // 2  # a multiplication and an addition are two


# %%
def by_hand(n):
    """The rule: weight products from the cut up; input products from the second product up."""
    conv = {"stem": [(3, 32, 25, 256)], "block 1": [(32, 32, 9, 256)] * 2}
    conv["block 2"] = [(32, 64, 9, 64), (64, 64, 9, 64), (32, 64, 1, 64)]  # the last: short cut
    conv["block 3"] = [(64, 128, 9, 16), (128, 128, 9, 16), (64, 128, 1, 16)]
    products = {layer: [math.prod(c) for c in conv[layer]] for layer in LAYERS} | {"head": [1280]}
    trained = list(products.values())[n:]
    reads_the_cut = [trained[0][i] for i in (0, 2) if i < len(trained[0])]
    return 2 * sum(map(sum, trained)) - sum(reads_the_cut)


# %% tags=["nbval-check-output"]
costs = [backward_cost(n) for n in range(5)]
weights = [tl.freezing.count_parameters(transplant(fresh(0), donor, n, True)) for n in range(5)]
for n, (cost, count) in enumerate(zip(costs, weights)):
    print(f"n = {n}: {count.trainable / count.total:6.1%} of the weights are trained,", end="  ")
    print(f"backward {cost:11,} multiplications ({cost / costs[0]:6.1%})")
    assert cost == by_hand(n)

# %% [markdown]
# Look at $n = 2$: 46 % are gone. The low layers have few weights, but each is used at 256 places. In
# a convolutional network the *low* layers are the ones whose freezing saves time, and memory too,
# because their large maps need not be kept for the way back. The formula is exact, as before.
#
# ## A short experiment
#
# Five paired draws of labels, three frozen networks cut at $n = 3$, few steps. They share labels,
# new weights and batches; they differ in where the frozen layers come from. The fourth network is
# A4B+, full fine-tuning with a new head. We keep it for later.

# %%
num_draws, num_steps = {"tiny": (5, 80), "full": (10, 80)}[run.profile]


# %%
def short_run(draw):
    """Test accuracies of four networks on one draw of labels, and the fine-tuned body."""
    task = tl.load_task("wild_digits", labels_per_class=50, seed=draw)
    near, far = (tl.load_backbone(name).body for name in ("glyphs", "shapes"))
    nets = {
        "A3B, near": transplant(fresh(draw), near, 3, frozen=True),
        "A3B, far": transplant(fresh(draw), far, 3, frozen=True),
        "random 3": transplant(fresh(draw), fresh(draw).backbone.body, 3, frozen=True),
        "A4B+, near": transplant(fresh(draw), near, 4, frozen=False),
    }
    loader = task.loaders().test
    trained = {name: train(net, task, num_steps, 3e-3, draw) for name, net in nets.items()}
    scores = {name: tl.evaluate(net, loader).accuracy for name, net in trained.items()}
    return scores, trained["A4B+, near"].backbone.body.cpu()


# %%
short = list(tl.side_by_side(short_run, range(num_draws)))
result = Comparison({name: [scores[name] for scores, _ in short] for name in short[0][0]})
fine_tuned = [body for _, body in short]
print(result.table("random 3"))
print("near minus far, A3B:", result.difference("A3B, near", "A3B, far"))
assert result.difference("A3B, near", "random 3").low > 0.15
assert result.difference("A3B, far", "random 3").low > 0.1
ax = tl.plots.plot_comparison(result, "test accuracy")
tl.plots.alt(ax, f"Dots and intervals of the four networks.\n{result.table()}")

# %% [markdown]
# Two rows are clear. Layers that have learned something, be it letters or shapes, are worth far more
# than random ones; and moving them (A4B+) is worth much more than keeping them still. Near against
# far is nine points here, with an interval from four to fifteen, after very few steps. That needs a
# longer run, and so do the selfers.
#
# ## The long experiment
#
# All cuts, all networks, and enough steps that base B is no longer hopeless. It takes too long for a
# lesson, so it was run before and recorded, by one command:

# %%
record = json.loads((data_dir() / "results" / "layer_transfer.json").read_text("utf-8"))
settings, draws = record["settings"], list(record["draws"].values())
print(record["command"], " on torch", record["versions"]["torch"])
for name in ("labels_per_class", "num_steps", "batch_size", "donor_steps", "near", "far"):
    print(f"    {name}: {settings[name]}")
print(f"    {len(draws)} draws, {sum(draw['cpu_seconds'] for draw in draws) / 60:.0f} CPU-minutes")

# %% [markdown]
# What is fair in it, and what is not:
#
# - Within a draw all networks see the same labels, start with the same new weights and get the same
#   300 batches. Draws with an even number take A from the first pre-training seed, odd ones from
#   the second, so that the intervals hold the luck of pre-training as well.
# - The rate of each arm was chosen on validation, on an extra draw, from 2 or 3 values. The test
#   split was read once.
# - The **donor** of the selfers is a network trained on the same labels for three times as many
#   steps. So B*n*B and B*n*B+ have had more training on B than base B, and lie above it for that
#   reason alone. The comparison that is free of this is the one in the first bracket: B*n*B+
#   against B*n*B.


# %%
def scores(arm, n):
    """One test accuracy for each draw."""
    arm, n = ("base", 0) if n == 0 else (arm, n)
    return np.array([draw["scores"][arm][str(n)] for draw in draws])


def minus(a, b):
    """Paired difference of two lists of scores, as an interval."""
    return mean_interval(a - b)


CUTS = range(1, 5)
print(f"base B, {settings['num_steps']} steps:  {mean_interval(scores('base', 0))}")
print(f"donor, {settings['donor_steps']} steps:   {mean_interval(scores('donor', 4))}")

# %%
ARMS = {
    "near": ("AnB, near", BLUE), "far": ("AnB, far", ORANGE),
    "self": ("BnB", GREEN), "random": ("random n", GREY),
}  # fmt: skip


# %%
def draw_curve(ax, arm, offset):
    """Mean and 95 % band over the cut; arms with a plus are hollow and dashed."""
    label, colour = ARMS[arm.rstrip("+")]
    plus = arm.endswith("+")
    bands = np.array([[i.mean, i.low, i.high] for i in (mean_interval(scores(arm, n)) for n in range(5))])
    x = np.arange(5) + offset
    marker = tl.plots.markers[list(ARMS).index(arm.rstrip("+"))]
    style = {"ls": "--" if plus else "-", "marker": marker, "mfc": "white" if plus else colour}
    ax.plot(x, bands[:, 0], color=colour, label=label.replace("nB", "nB+") if plus else label, **style)
    ax.fill_between(x, bands[:, 1], bands[:, 2], color=colour, alpha=0.18, lw=0)


# %%
figure, axes = tl.plots.subplots(1, 2, figsize=(10, 4), sharey=True)
panels = {"copied layers frozen": ("near", "far", "self", "random")}
panels["copied layers trained on"] = ("near+", "far+", "self+")
for ax, (title, arms) in zip(axes, panels.items()):
    for place, arm in enumerate(arms):
        draw_curve(ax, arm, 0.04 * (place - 1))
    donor_mean = scores("donor", 4).mean()
    ax.axhline(donor_mean, color=GREEN, ls=":", lw=1.2)
    ax.text(0, donor_mean + 0.01, "donor of BnB", color=GREEN, fontsize=9)
    ax.set(title=title, xlabel="n, layers copied (0: base B)", ylim=(0, 1), xticks=range(5))
    ax.legend(loc="lower left", fontsize=9)
axes[0].set_ylabel("test accuracy")
words = [f"{a} n={n}: {scores(a, n).mean():.2f}" for arms in panels.values() for a in arms for n in CUTS]
tl.plots.alt(figure, "Test accuracy over the cut, with 95 % bands; base B at n = 0. " + ", ".join(words))

# %% [markdown]
# A curve is read by its differences. At each cut, the two brackets of the identity above, near and
# far, as paired intervals:

# %%
print(f"n   {'freezing: BnB+ - BnB':25}{'specificity, near: BnB - AnB':30}far: BnB - AnB")
for n in CUTS:
    freezing = minus(scores("self+", n), scores("self", n))
    near, far = (minus(scores("self", n), scores(source, n)) for source in ("near", "far"))
    print(f"{n}   {freezing!s:25}{near!s:30}{far}")

# %% [markdown]
# **Specificity first.** Read the two columns on the right downwards.
#
# - *Far, at $n = 4$*: the own layers are ahead by .33. Block 3 of the shape network speaks of shapes.
# - *Far, at $n = 3$*: .06. One layer lower, nearly all of the loss is gone.
# - *Near*: .11 at $n = 4$, and at $n = 3$ the interval holds zero.
#
# So the last block is specific to its task, near or far, and the three layers below it serve digits
# almost as well as layers that were trained on digits. Compare the sources with each other:

# %%
for n in CUTS:
    frozen = minus(scores("near", n), scores("far", n))
    moved_on = minus(scores("near+", n), scores("far+", n))
    print(f"n = {n}: near minus far, frozen {frozen}; trained on {moved_on}")
drop = {name: minus(scores(name, 3), scores(name, 4)) for name in ("near", "far")}
print("loss by freezing block 3 too: near", drop["near"], " far", drop["far"])
assert minus(scores("near", 4), scores("far", 4)).low > 0.1
assert drop["far"].low > 0.15 and drop["near"].low > 0.03
nulls = [minus(scores("near", n), scores("far", n)) for n in (2, 3)]
nulls += [minus(scores("near+", n), scores("far+", n)) for n in (2, 3, 4)]
assert all(null.low > -0.12 and null.high < 0.12 for null in nulls)

# %% [markdown]
# **Guess 3.** Up to $n = 3$ no interval separates letters from shapes. Only at $n = 4$ does the
# distance of the source show, and there it shows at once. As a *start* (right panel) the two sources
# cannot be told apart at any cut (at $n = 1$ the interval is wide). From $n = 2$ on it is narrow:
# what the far block 3 does not know, it learns in 300 steps.
#
# Now the null that is not to be overlooked: *near* is not better than *far* as a start. "Choose the
# source that looks like your target" has no support here. Lesson 10 takes the question up.
#
# **Now co-adaptation.** Left column: freezing costs B's own layers .03 to .05 at $n = 2, 3, 4$. Is
# that the famous dip? Apply the test: does the middle pay more than $n = 4$, where co-adaptation is
# impossible?

# %%
freezing = {n: scores("self+", n) - scores("self", n) for n in CUTS}
for n in (1, 2, 3):
    print(f"cost of freezing at n = {n} minus that at n = 4: {minus(freezing[n], freezing[4])}")
assert mean_interval(freezing[4]).low > 0.01  # not zero where it cannot be co-adaptation
assert all(minus(freezing[n], freezing[4]).high < 0.04 for n in (1, 2, 3))

# %% [markdown]
# It does not. All of the cost at $n = 2$ and 3 is there at $n = 4$ as well: layers that move go on
# learning. **Co-adaptation: null.** Our network has four layers with short cuts, and a short
# training; Yosinski's had eight without, and a long one. What they saw may be true there and is not
# visible here.
#
# **And $n = 1$?** There B1B loses .20 against its donor. Is that co-adaptation at last? No: *moving*
# the layer does not mend it, B1B+ is no better. Everything above the stem is new and has only 300
# steps. Base B tells the same story: .40, with all layers new. It is the budget.

# %%
random_loss = [minus(scores("random", n), scores("base", 0)) for n in CUTS]
for n, interval in zip(CUTS, random_loss):
    print(f"random {n} minus base B: {interval}")
assert random_loss[3].high < -0.1
for source in ("near", "far"):
    learned = minus(scores(source, 3), scores("random", 3))
    print(f"A3B, {source}, minus random 3: {learned}")
    assert learned.low > 0.4

# %% [markdown]
# **Any layers?** One frozen *random* layer costs little: a random stem still passes the pixels on.
# Every further one costs more. At $n = 3$ the layers of either source are ahead of random ones by
# more than half of all test images. It is what was learned that transfers, not the shape of the net.
#
# **Guess 1.** Frozen, the best cut is $n = 3$ for letters; for shapes $n = 2$ and 3 are equal. The
# worst is $n = 0$: no transfer at all. Trained on, $n = 3$ and 4 are equal.
# If you may train everything, copy everything; if you must freeze, leave the last block free.
#
# **Guess 2.** Cut after layer 2, frozen, trained again: B2B ends .03 below the network it was cut
# from, B3B and B4B on its level. The interval of B2B just excludes zero. Its new half had a third of
# the donor's steps, and B2B+ is back at the donor's level, so this is no proof of anything more.

# %% [markdown]
# ## Looking at the layers themselves
#
# Training forty networks is a slow way to ask whether two layers say the same. Can we not just
# look? Take $N$ images and write what a layer says of them into a matrix $X$ of shape $(N, p)$, one
# row for each image. Another layer, of another network perhaps, gives $Y$ of shape $(N, q)$.
#
# You cannot subtract them. The sizes differ, and even where they do not, feature 5 of one network
# has nothing to do with feature 5 of the other: the order of the features is an accident of the
# seed. But each description says which *images* are alike, and the images are the same. That can
# be compared.


# %%
def activations(body, images):
    """What each layer says of the images: four arrays, shape (N, p) with p of the layer."""
    with torch.no_grad():
        maps = [LayerFeatures(body, name, "flatten")(images) for name in layer_names]
    return [values.numpy() for values in maps]


# %%
said = {
    "near": activations(tl.load_backbone("glyphs").body, images),
    "near, seed 1": activations(tl.load_backbone("glyphs_seed1").body, images),
    "far": activations(tl.load_backbone("shapes").body, images),
    "random": activations(fresh(0).backbone.body, images),
    "random, seed 1": activations(fresh(1).backbone.body, images),
    "fine-tuned": activations(fine_tuned[0], images),
}
said["pixels"] = [images.flatten(1).numpy()] * 4
print("features of each layer:", [x.shape[1] for x in said["near"]], " images:", len(images))


# %%
def similarity(x):
    """Dot products of the images, after the mean image is taken away: shape (N, N)."""
    centred = x - x.mean(axis=0)
    return centred @ centred.T


# %%
digits = tl.load_task("wild_digits", None).val.targets
by_class = digits.argsort(stable=True).numpy()[::3]  # every third image, zeros first
figure, axes = tl.plots.subplots(1, 3, figsize=(10, 3.6))
for ax, name in zip(axes, ("random", "near", "fine-tuned")):
    K = similarity(said[name][3])[np.ix_(by_class, by_class)]
    limit = np.quantile(K, 0.99)
    ax.imshow(K, cmap="PuOr_r", vmin=-limit, vmax=limit, interpolation="nearest")
    ax.set(title=f"block 3, {name}", xticks=[], yticks=[], xlabel="images, zeros to nines")
    ax.grid(False)
words = "Similarity of 100 images, sorted by digit: stripes for random, for fine-tuned ten squares."
tl.plots.alt(figure, words)

# %% [markdown]
# (Orange: alike. Violet: unlike.) A random network sees stripes, the light images and the dark
# ones. The fine-tuned one sees ten squares along the diagonal, the digits. The pre-trained one lies
# between. So: **compare the pictures, not the features.**
#
# ### From covariance to CKA, in four steps
#
# **1. Centre.** Subtract the mean of each column: $X_c = HX$, with $H = I - \frac1N
# \mathbf 1 \mathbf 1^\top$. What all images have in common distinguishes none of them.
#
# **2. Ask every feature of $X$ about every feature of $Y$.** The covariances are
# $C = \frac{1}{N-1} X_c^\top Y_c$, shape $(p, q)$. Sum their squares, so that none cancels another:
#
# $$\mathrm{HSIC}(X, Y) = \sum_{j,k} C_{jk}^2 = \frac{1}{(N-1)^2}\,\lVert X_c^\top Y_c \rVert_F^2.$$
#
# That is the Hilbert-Schmidt independence criterion, with the simplest kernel there is, the dot
# product. It is 0 exactly when no feature of one varies linearly with any feature of the other.
#
# **3. Turn it round.** $\lVert M \rVert_F^2 = \operatorname{tr}(M^\top M)$, and factors may be
# rotated inside a trace. With the similarities $K = X_c X_c^\top$ and $L = Y_c Y_c^\top$, both
# $(N, N)$,
#
# $$\lVert X_c^\top Y_c \rVert_F^2 = \operatorname{tr}(Y_c^\top X_c\, X_c^\top Y_c)
# = \operatorname{tr}(X_c X_c^\top\, Y_c Y_c^\top) = \sum_{i,j} K_{ij} L_{ij}.$$
#
# Read it slowly: the sum over all pairs of *features* is a sum over all pairs of *images*. It is
# the dot product of the two pictures above.
#
# **4. Divide by the lengths.** A dot product of two matrices, over their lengths, is a cosine:
#
# $$\mathrm{CKA}(X, Y) = \frac{\mathrm{HSIC}(X,Y)}{\sqrt{\mathrm{HSIC}(X,X)\,\mathrm{HSIC}(Y,Y)}}
# = \frac{\sum_{ij} K_{ij}L_{ij}}{\lVert K\rVert_F\,\lVert L\rVert_F} \in [0, 1].$$
#
# It cannot be negative, since $\sum_{ij}K_{ij}L_{ij}$ is the squared norm of step 3. Kornblith and
# colleagues named it **centred kernel alignment**.


# %%
def cka(x, y):
    K, L = similarity(x), similarity(y)
    return (K * L).sum() / (np.linalg.norm(K) * np.linalg.norm(L))


def hsic_by_features(x, y):
    """Step 2 taken literally: every covariance of two features, squared."""
    covariances = [np.cov(a, b)[0, 1] for a in x.T for b in y.T]
    return np.square(covariances).sum()


# %% tags=["nbval-check-output"]
rng = np.random.default_rng(0)
x = rng.normal(size=(40, 6))
y = x[:, :4] + rng.normal(size=(40, 4))
covariance_form = hsic_by_features(x, y)
image_form = (similarity(x) * similarity(y)).sum() / 39**2
np.testing.assert_allclose(covariance_form, image_form, rtol=1e-10)
brute = covariance_form / math.sqrt(hsic_by_features(x, x) * hsic_by_features(y, y))
np.testing.assert_allclose(cka(x, y), brute, rtol=1e-10)
np.testing.assert_allclose(cka(x, y), library_cka(x, y, debiased=False), rtol=1e-10)
print(f"features {covariance_form:.4f}, images {image_form:.4f}; CKA {cka(x, y):.4f}")

# %% [markdown]
# ### What it does not see, and what it does
#
# Put $XM + \mathbf 1 b^\top$ in the place of $X$. The shift $b$ is gone after centring. The
# similarity becomes $X_c\, M M^\top X_c^\top$. So CKA stays as it is **for every $X$ exactly when
# $M M^\top = c\,I$** with $c > 0$: then the new similarity is $cK$, and $c$ falls out of the cosine.
#
# - *Rotations, mirrors, permutations*: $M M^\top = I$. Not seen. Good: the order of features is an
#   accident.
# - *One scale for all*: $M = sI$. Not seen.
# - *A scale for each feature, or any other invertible $M$*: seen.
#
# Should it not ignore *every* invertible $M$, since a linear layer on top could undo it? Look at
# what that would mean when $p \ge N$, as here with thousands of features and 300 images. Then the
# rows of $X$ are as good as always linearly independent, and some invertible $M$ turns $X$ into
# *any other* such matrix. A measure that ignores every $M$ would have to call all layers equal.

# %% tags=["nbval-check-output"]
rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
stretch = np.diag([10.0, 1, 1, 1, 1, 1])
changes = {
    "rotation": x @ rotation,
    "order of the features": x[:, ::-1],
    "scale and shift": 7 * x + 3,
    "one feature times 10": x @ stretch,
    "an invertible M": x @ rng.normal(size=(6, 6)),
}
for name, changed in changes.items():
    print(f"{name:22} CKA with the original {cka(x, changed):.3f}")
    assert (abs(cka(x, changed) - 1) < 1e-9) == (name in list(changes)[:3])

# %% [markdown]
# ### A bias you can compute
#
# **Guess.** Describe 60 images by 8,192 random numbers each. Do it again, with other random
# numbers. The two descriptions have nothing in common. What is their CKA?

# %% tags=["nbval-check-output"]
noise, other = rng.normal(size=(2, 60, 8192))
print(f"CKA of two descriptions that have nothing in common: {cka(noise, other):.3f}")
assert cka(noise, other) > 0.95

# %% [markdown]
# It is no bug. Let all entries be independent with mean 0 and variance 1, and leave the centring
# out for a moment. $K_{ij} = \sum_{k} X_{ik} X_{jk}$ is a sum of $p$ terms:
#
# - on the diagonal, of $p$ squares: mean $p$, and $\mathbb E K_{ii}^2 = p^2 + 2p$;
# - elsewhere, of $p$ products with mean 0: $\mathbb E K_{ij} = 0$ and $\mathbb E K_{ij}^2 = p$.
#
# Therefore $\mathbb E \sum_{ij} K_{ij} L_{ij} = N\,p\,q$: the diagonal alone. And
# $\mathbb E \lVert K \rVert_F^2 = N(p^2 + 2p) + N(N-1)\,p = N p\,(p + N + 1)$. Centring takes away
# one of the $N$ directions, so $N - 1$ stands for $N$, and
#
# $$\mathrm{CKA} \approx \sqrt{\frac{p}{p + N}\cdot\frac{q}{q + N}}.$$
#
# With many more features than images this goes to 1, *whatever they say*. All of it comes from the
# diagonal: every image is like itself, in any description. That is no news, so leave it out.
#
# But centring mixes the diagonal into every other entry, so one has to be careful. Go back to
# step 2, for two random images with descriptions $(x, y)$. In expectation
#
# $$\mathrm{HSIC} = \big\lVert\, \mathbb E[x y^\top] - \mathbb E[x]\,\mathbb E[y]^\top \big\rVert_F^2
# = \mathbb E[k_{ij}\, l_{ij}] - 2\,\mathbb E[k_{ij}\, l_{iq}] + \mathbb E[k_{ij}\, l_{qr}],$$
#
# with $i, j, q, r$ four *different* images and $k_{ij} = x_i \cdot x_j$, $l_{ij} = y_i \cdot y_j$.
# (Multiply the square out: $\lVert \mathbb E[x y^\top]\rVert^2 = \mathbb E[(x_i\cdot x_j)(y_i\cdot
# y_j)]$, and so on.) An average over all choices of four different images is right on average for
# any $N$. That is a sum of $N^4$ terms, but the same sums in closed form are three products. Let
# $\tilde K, \tilde L$ be the similarities with a diagonal of zeros:
#
# $$\widehat{\mathrm{HSIC}} = \frac{1}{N(N-3)} \left[\, \sum_{ij}\tilde K_{ij}\tilde L_{ij}
# + \frac{\mathbf 1^\top \tilde K \mathbf 1\;\mathbf 1^\top \tilde L \mathbf 1}{(N-1)(N-2)}
# - \frac{2}{N-2}\, \mathbf 1^\top \tilde K \tilde L\, \mathbf 1 \right].$$


# %%
def unbiased_hsic(x, y):
    K, L = x @ x.T, y @ y.T  # no centring: the formula does it
    np.fill_diagonal(K, 0)
    np.fill_diagonal(L, 0)
    num = len(K)
    mean_part = K.sum() * L.sum() / ((num - 1) * (num - 2))
    rows_part = 2 * (K.sum(axis=0) @ L.sum(axis=0)) / (num - 2)
    return ((K * L).sum() + mean_part - rows_part) / (num * (num - 3))


def debiased_cka(x, y):
    return unbiased_hsic(x, y) / math.sqrt(unbiased_hsic(x, x) * unbiased_hsic(y, y))


# %% [markdown]
# Do not believe the closed form: sum over all choices of four out of seven images, and compare. And
# compare with the library, which holds the same.

# %% tags=["nbval-check-output"]
few_x, few_y = x[:7], y[:7]
K, L = few_x @ few_x.T, few_y @ few_y.T
fours = [
    K[i, j] * L[i, j] - 2 * K[i, j] * L[i, q] + K[i, j] * L[q, r]
    for i, j, q, r in permutations(range(7), 4)
]
np.testing.assert_allclose(np.mean(fours), unbiased_hsic(few_x, few_y), rtol=1e-10)
np.testing.assert_allclose(debiased_cka(x, y), library_cka(x, y), rtol=1e-10)
print(f"{len(fours)} choices of four images: {np.mean(fours):.4f}, closed form the same")
print(f"debiased CKA of pure noise: {debiased_cka(noise, other):+.2f}")
assert abs(debiased_cka(noise, other)) < 0.05

# %%
sizes, num = 2 ** np.arange(2, 13), 60
pairs = [rng.normal(size=(2, num, p)) for p in sizes for _ in range(5)]
curves = {"plain": [cka(*pair) for pair in pairs], "debiased": [debiased_cka(*p) for p in pairs]}
figure, ax = tl.plots.subplots(figsize=(7, 3.2))
for (name, values), colour in zip(curves.items(), (ORANGE, BLUE)):
    by_size = np.reshape(values, (len(sizes), 5))
    ax.plot(sizes, by_size, ".", color=colour)
    ax.plot([], [], ".", color=colour, label=name)
ax.plot(sizes, sizes / (sizes + num), color="black", ls=":", label="p / (p + N)")
ax.set(xscale="log", xlabel="features p (N = 60 images)", ylabel="CKA of pure noise")
ax.legend()
tl.plots.alt(ax, "Plain CKA of noise follows p / (p + N) from 0.1 to 1; the debiased one stays at 0.")
gap = np.reshape(curves["plain"], (-1, 5)).mean(axis=1) - sizes / (sizes + num)
assert np.abs(gap).max() < 0.1

# %% [markdown]
# The dots lie on the formula. From here on, only the debiased estimate. As it is right on average
# for any number of images, we may cut the 300 images into five blocks of 60, compute it in each,
# and get an interval.
#
# ## Near, far, seed, chance
#
# Now the question that CKA was made for. Compare, layer by layer: the near network with the same
# recipe from another seed; near with far; near with a **random** network, as a floor; and two
# random networks with each other. Guess 4 asked for the last one.


# %%
def blocks_of_cka(a, b):
    """Debiased CKA of two networks: shape (4 layers, 5 blocks of images)."""
    layers = zip(said[a], said[b])
    return np.array([[library_cka(x[i::5], y[i::5]) for i in range(5)] for x, y in layers])


# %%
PAIRS = {
    "random, two seeds": ("random", "random, seed 1"),
    "near, two seeds": ("near", "near, seed 1"),
    "near and far": ("near", "far"),
    "near and random": ("near", "random"),
    "far and random": ("far", "random"),
    "near and pixels": ("near", "pixels"),
    "random and pixels": ("random", "pixels"),
}
alike = {name: blocks_of_cka(*pair) for name, pair in PAIRS.items()}

# %%
figure, ax = tl.plots.subplots(figsize=(7.6, 3.8))
colours = (GREY, BLUE, ORANGE, "black")
for place, (name, colour) in enumerate(zip(list(PAIRS)[:4], colours)):
    rows = np.array([[i.mean, i.low, i.high] for i in map(mean_interval, alike[name])])
    errors = [rows[:, 0] - rows[:, 1], rows[:, 2] - rows[:, 0]]
    x_places = np.arange(4) + 0.06 * (place - 1.5)
    line = {"marker": tl.plots.markers[place], "ls": tl.plots.line_styles[place], "capsize": 3}
    ax.errorbar(x_places, rows[:, 0], yerr=errors, color=colour, label=name, **line)
ax.set(ylabel="debiased CKA, same layer", ylim=(0, 1.02))
ax.set_xticks(range(4), LAYERS)
ax.legend(loc="lower left")
words = [f"{name}: {np.round(alike[name].mean(axis=1), 2).tolist()}" for name in list(PAIRS)[:4]]
tl.plots.alt(ax, "CKA at stem, block 1, 2, 3. " + "; ".join(words))

# %%
for name, values in alike.items():
    print(f"{name:18}", "  ".join(f"{layer}: {mean_interval(v)}" for layer, v in zip(LAYERS, values)))
top = {name: values[3] for name, values in alike.items()}
stem = {name: values[0] for name, values in alike.items()}
assert minus(top["random, two seeds"], top["near and random"]).low > 0.3
assert minus(top["near, two seeds"], top["near and random"]).low > 0.2
assert minus(top["near and far"], top["near and random"]).high < 0.2
assert mean_interval(stem["near and random"]).low > 0.75
assert minus(stem["near and far"], stem["near and random"]).high < 0.15

# %% [markdown]
# **Guess 4.** The two networks that never learned anything are the most similar pair of all: 0.85 at
# block 3, where two networks of *one recipe* have 0.71. The last row says why. A random network
# mixes and rectifies, but roughly keeps which images are alike in their pixels, up to the top
# (0.88), and two that follow the pixels resemble each other. Learning leaves the pixels behind
# (0.13), and each seed finds a way of its own.
#
# **Now hold orange against black.** The stems of near and far agree to 0.93. Is that a proof that
# both have found the same general features? Black has 0.93 as well, and that is a network which has
# found nothing. Every stem follows the pixels; the number says no more. At block 3 near and far have
# 0.20 in common, and near and random 0.18. In between they have 0.42 at block 2, and there far and
# random have 0.46. In none of the four layers do these two networks agree more than *both* of them
# agree with chance.
#
# **Only blue lies above its floor** from block 1 up: two seeds have the recipe in common, and it
# shows.
#
# The sentence "CKA falls with depth, so the lower layers are general" could have been written from
# the orange line alone. It would have been a reading of the pixels.
#
# ## Which layers move?
#
# Fine-tuning changed the near network (A4B+ of the short experiment). Which layers? Two rulers:
#
# - CKA of each layer before and after, on the same images;
# - the simple one: the distance of its weights, relative to their size,
#   $\lVert \theta_\text{after} - \theta_\text{before} \rVert \,/\, \lVert \theta_\text{before} \rVert$.


# %%
def distances(before, after):
    """Relative distance of the weights of each layer."""
    found = []
    for name in layer_names:
        old, new = (
            nn.utils.parameters_to_vector(body.get_submodule(name).parameters()).detach()
            for body in (before, after)
        )
        found.append(float((new - old).norm() / old.norm()))
    return found


# %%
pretrained = tl.load_backbone("glyphs").body
moved = np.array([distances(pretrained, body) for body in fine_tuned])  # (draws, 4)
after = [activations(body, images) for body in fine_tuned]
kept = np.array([[library_cka(x, y) for x, y in zip(said["near"], each)] for each in after])
print("layer     1 - CKA                 relative distance of the weights")
for i, layer in enumerate(LAYERS):
    print(f"{layer:8}  {mean_interval(1 - kept[:, i])}    {mean_interval(moved[:, i])}")
assert mean_interval(1 - kept[:, 0]).high < 0.1
assert minus(kept[:, 0], kept[:, 3]).low > 0.2
assert minus(moved[:, 3], moved[:, 0]).low > 0.03

# %% [markdown]
# Both rulers say that the stem moved least and block 3 most. Look at the size: the weights of block 3
# went a fifth of their own length, and yet what block 3 *says* is less like its own past (0.52) than
# two networks from different seeds are like each other (0.71).
#
# Look at blocks 1 and 2, too: the same distance of the weights, but not the same change of what they
# say. A layer's output changes with everything below it. CKA measures the sum, the distance measures
# the layer alone.
#
# **Can you trust the simple ruler?** Multiply the stem's convolution by 3. The normalisation behind
# it divides by the size again, so the network computes the same function. And change the order of
# the first four channels of the stem, with everything that reads them: the same function again.

# %%
tripled, reordered = copy.deepcopy(pretrained), copy.deepcopy(pretrained)
turn = torch.tensor([3, 0, 1, 2, *range(4, 32)])  # within one group of GroupNorm
with torch.no_grad():
    tripled.stem[0].weight.mul_(3)
    reordered.stem[0].weight.copy_(pretrained.stem[0].weight[turn])
    for name in ("weight", "bias"):
        getattr(reordered.stem[1], name).copy_(getattr(pretrained.stem[1], name)[turn])
for name, body in {"weights times 3": tripled, "another order": reordered}.items():
    similar = library_cka(said["near"][0], activations(body, images)[0])
    print(f"{name:16} distance {distances(pretrained, body)[0]:.2f}, CKA of the stem {similar:.4f}")
    assert similar > 0.999 and distances(pretrained, body)[0] > moved[:, 0].max()

# %% [markdown]
# The distance calls both of them large. It is a distance between *weights*, and many weights are the
# same function. Between two seeds it is therefore useless. Between a network and its own
# fine-tuned version, where nothing had a reason to be reordered, it is cheap and often enough.
#
# ## Where it fails
#
# **CKA hears the loudest feature.** Take two unrelated descriptions, and give both the same one
# feature more, twenty times as loud as the others:

# %% tags=["nbval-check-output"]
quiet, hushed = rng.normal(size=(2, 300, 50))
loud = 20 * rng.normal(size=(300, 1))
apart, together = debiased_cka(quiet, hushed), debiased_cka(*(np.hstack([z, loud]) for z in (quiet, hushed)))
print(f"unrelated: {apart:+.2f};  with one loud feature in common: {together:.2f}")
assert abs(apart) < 0.1 and together > 0.95

# %% [markdown]
# Squares of covariances are summed, so one direction with a large variance decides alone. In our
# images that direction is likely brightness and colour, and every stem hears it.
#
# **CKA says alike, not useful.** Two random networks are the most similar pair of all, and their
# frozen layers are the worst that you can copy. No similarity without a task says whether a layer
# transfers. The cut does.
#
# **The cut measures a recipe, not a law.** It depends on how long A was trained, on the steps and
# labels that B has, on the rate, on the width. Base B is cut off after 300 steps here; after 1,500
# steps (lesson 01, recorded at 50 labels per class) the same network from scratch is far better, and
# every gain over it is smaller.
#
# **A frozen layer is not a fixed meaning.** With BatchNorm, "frozen" layers whose running statistics
# still move are not frozen at all (lesson 06). Our networks have GroupNorm, and `tl.freeze` stops
# both.
#
# ## Explorer: cut it yourself
#
# Choose a source, a cut, and whether the copied layers are frozen. The picture shows the network,
# its recorded accuracy against base B, and what it costs. Three things to look for:
#
# 1. For which source and cut does *freezing* cost nothing?
# 2. Where is the largest gap between near and far?
# 3. Which choice is the best that needs less than half of the backward pass?

# %% jupyter={"source_hidden": true}
SOURCES = {"near": "A", "far": "A", "self": "B", "random": "random"}


def draw_choice(source, n, frozen):
    """The network, its recorded accuracy beside base B, and its cost."""
    arm = source if frozen or n == 0 else source + "+"
    if arm == "random+":
        arm, n = "base", 0  # random layers that are trained are a network from scratch
    figure, (net, bar) = tl.plots.subplots(2, 1, figsize=(7.4, 3.6), height_ratios=(1, 1.4))
    draw_net(net, 0, SOURCES[source] if n else "", n, frozen)
    cost = costs[n] if frozen else costs[0]
    net.set(xlim=(-0.2, 5), ylim=(-0.5, 0.5), title=f"backward pass: {cost / costs[0]:.0%} of a full one")
    net.axis("off")
    chosen = "this network" if n else "this network (base B)"
    intervals = {"base B": mean_interval(scores("base", 0)), chosen: mean_interval(scores(arm, n))}
    tl.plots.plot_intervals(intervals, "test accuracy (recorded)", ax=bar)
    bar.set_xlim(0, 1)


# %%
tl.widgets.explore(
    draw_choice,
    source=tl.widgets.choice(list(SOURCES), label="source"),
    n=tl.widgets.slider(0, 4, 1, 3, label="n"),
    frozen=tl.widgets.choice([("frozen", True), ("trained on", False)], label="copied layers"),
)

# %% [markdown]
# ## Quiz

# %%
tl.quiz("07")

# %% [markdown]
# ## Exercise
#
# [Exercise 07](../exercises/07_layer_transferability.ipynb): the plan of a transplant, the price of
# a cut, CKA and its debiased form by hand, and a program that reads a curve and names the cause.
#
# ## Papers
#
# - Yosinski, Clune, Bengio, Lipson 2014, *How transferable are features in deep neural networks?*,
#   section 2 (the nets), section 4.1 (co-adaptation against specificity), arXiv:1411.1792.
# - Kornblith, Norouzi, Lee, Hinton 2019, *Similarity of neural network representations revisited*,
#   sections 2 (invariances) and 3 (CKA), arXiv:1905.00414.
# - Gretton, Bousquet, Smola, Schölkopf 2005, *Measuring statistical dependence with
#   Hilbert-Schmidt norms*, section 3 (HSIC), ALT 2005.
# - Song, Smola, Gretton, Bedo, Borgwardt 2012, *Feature selection via dependence maximization*,
#   equation 5 (the unbiased estimate), JMLR 13.
# - Nguyen, Raghu, Kornblith 2021, *Do wide and deep networks learn the same things?*, section 3
#   (CKA with the unbiased estimate), arXiv:2010.15327.
# - Neyshabur, Sedghi, Zhang 2020, *What is being transferred in transfer learning?*, section 3,
#   arXiv:2008.11687 (feature reuse, CKA and distances of fine-tuned networks).
#
# ## Glossary
#
# | term | meaning | Chinese |
# |---|---|---|
# | transferability of a layer | what is lost or gained when it is copied into a network for another task | 层的可迁移性 |
# | to freeze the first n layers | to copy them and train only what lies above | 冻结前 n 层 |
# | general, specific | of use for many tasks; of use for the source alone | 通用的，专用的 |
# | co-adaptation | layers that rely on each other because they were trained together | 共适应 |
# | selfer network (BnB) | layers copied from a network of the same task, as a control | 自迁移对照网络 |
# | representation similarity | how alike two layers describe the same inputs | 表征相似度 |
# | Gram matrix, similarity matrix | dot products of all pairs of examples | 格拉姆矩阵，相似度矩阵 |
# | HSIC | sum of the squared covariances of all pairs of features | 希尔伯特-施密特独立性准则 |
# | centred kernel alignment (CKA) | cosine of two centred similarity matrices | 中心核对齐 |
# | invariance | what a measure does not see | 不变性 |
# | debiased estimate | one that is right on average for any number of examples | 去偏估计 |
