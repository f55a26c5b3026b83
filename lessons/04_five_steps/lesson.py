# %% [markdown]
# # 04. Five steps
#
# So far you have looked at transfer in pieces: why it works, what its mathematics says, where its
# gradients flow. Here you do the whole job once, from an empty file to a saved model that reads a
# digit that you draw, and then on to the day when the next batch of labels arrives.
#
# **After this lesson you can**
#
# 1. take a pre-trained backbone to a tested and saved model in five steps, and say for each step
#    which data it may look at;
# 2. put either of two heads on it, one that *chooses* and one that *writes*, and derive both losses;
# 3. write the training loop yourself, and prove that it is `tl.fit`, weight for weight;
# 4. bring back a run whose machine went away, and prove that it ends in the same weights.
#
# **You need** lessons 01 and 03. **Time** about 60 minutes; the notebook itself runs in under a
# minute on two cores.
#
# **Expected result.** From 100 labelled images and 40 steps, a reader that is right on about 84 %
# [82, 86] of the test digits; a network without pre-training gets 18 % [15, 21] with up to 1,500
# steps. Trained on with new data alone, the reader loses about 29 points [21, 37] on the old; with
# the old images mixed in, about 3 [0, 6].

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %%
import contextlib
import copy
import io
import itertools
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# %%
from tlcourse.comparing import Comparison
from tlcourse.datasets import BatchLoader, augment_images
from tlcourse.evaluation import mean_interval, wilson_interval
from tlcourse.locations import data_dir

# %% [markdown]
# ## Before you run anything
#
# You train a digit reader on 100 labelled images, test it, and ship it. Next month a second camera
# goes into service. It lies on its side, so its digits are turned by a quarter, and somebody labels
# 100 of its images for you. You load the saved model and train on: a few dozen steps, on the new
# images only.
#
# What happens to the accuracy on the *first* camera: does it rise (more data), stay, or fall?
#
# 1. By how many points, if you train on the new images only?
# 2. If you mix all 100 old images in?
# 3. If you kept only 20 old images, two of each digit, and mix these in?
#
# Write down three numbers. They are measured near the end.

# %% [markdown]
# ## The picture
#
# Five boxes, and below them the three parts of the data. A dot says: this step reads that part.
# Look at the last row first. The test set has *one* dot. Everything that was chosen (the backbone,
# the learning rate, the moment to stop) was chosen without it, which is the only reason why its
# number means anything.


# %% jupyter={"source_hidden": true}
def draw_steps():
    """The five steps, and which part of the data each of them reads."""
    names = ["1\ndata and\nbackbone", "2\nhead", "3\nhyper-\nparameters"]
    names += ["4\ntraining", "5\ntest, save,\npredict"]
    reads = {"training": [1, 2, 3], "validation": [2, 3], "test": [4]}
    figure, axes = tl.plots.subplots(figsize=(7.6, 3.6))
    draw_boxes(axes, names)
    for row, (part, columns) in enumerate(reads.items()):
        axes.axhline(-row, color="#DDDDDD", zorder=0)
        axes.plot(columns, [-row] * len(columns), "o", color=tl.plots.palette[row], markersize=13)
    axes.set_yticks([0, -1, -2], [f"{part} data" for part in reads])
    axes.set(xlim=(-0.6, 4.6), ylim=(-2.5, 4.3), xticks=[])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


# %% jupyter={"source_hidden": true}
def draw_boxes(axes, names):
    """A box for each step, arrows between them, and the way back for new labels."""
    arrow = {"arrowstyle": "-|>", "color": "black", "lw": 1.5}
    axes.grid(False)
    for column, name in enumerate(names):
        box = plt.Rectangle((column - 0.4, 1.0), 0.8, 1.8, fc="#EAF3F9", ec=tl.plots.palette[0])
        axes.add_patch(box)
        axes.text(column, 1.9, name, ha="center", va="center", fontsize=10)
        if column:
            axes.annotate("", (column - 0.4, 1.9), (column - 0.6, 1.9), arrowprops=arrow)
    back = dict(arrow, color=tl.plots.palette[1], connectionstyle="arc3,rad=0.45", linestyle="--")
    axes.annotate("", (3, 2.8), (4, 2.8), arrowprops=back)
    axes.text(3.5, 3.75, "refresh: new labels", ha="center", color=tl.plots.palette[1], fontsize=10)


# %% jupyter={"source_hidden": true}
tl.plots.alt(
    draw_steps(),
    "Five boxes in a row: data and backbone, head, hyper-parameters, training, and test, save, "
    "predict. Training data are read by steps 2, 3 and 4, validation data by steps 3 and 4, test "
    "data by step 5 only. A dashed arrow, refresh with new labels, leads from step 5 to step 4.",
)

# %% [markdown]
# ## Step 1: the data and the backbone
#
# The task is *wild digits*: real handwritten digits, in any colour, over patches of a photograph.
# Ten labelled images of each digit are ours to learn from. Validation and test images come from
# other stretches of the collection, and so, but for a few, from other writers.
#
# The first thing to do with data is to look at it. The second is to make sure that no image is in
# two parts.

# %% tags=["nbval-check-output"]
task = tl.load_task("wild_digits", labels_per_class=10, seed=0)
parts = {"training": task.train, "validation": task.val, "test": task.test}
for name, part in parts.items():
    print(f"{name:10}  inputs {tuple(part.inputs.shape)}, targets {tuple(part.targets.shape)}")
ids = [set(part.ids.tolist()) for part in parts.values()]
assert not ids[0] & ids[1] and not ids[0] & ids[2] and not ids[1] & ids[2]

# %%
shown = [int((task.train.targets == digit).nonzero()[0]) for digit in range(10)]
pictures = tl.plots.show_images(
    task.train.inputs[shown], titles=[str(digit) for digit in range(10)], ncols=10
)
tl.plots.alt(pictures, "One training image of each digit from 0 to 9, in colours, on photographs.")

# %% [markdown]
# The backbone is `glyphnet`: a small residual network that has never seen a digit. It was
# pre-trained to tell some two hundred letters and symbols apart. It comes with two things that
# belong together, its weights and its `preprocess`: the size and the range of numbers that the
# weights are used to. Most silent failures in transfer learning are a preprocessing that does not
# belong to the weights. You will meet three near the end of this lesson.

# %%
backbone = tl.load_backbone("glyphnet")
print(tl.freezing.count_parameters(backbone))
print(f"features per image: {backbone.feature_dim};  input: {backbone.preprocess}")
num_draws = {"tiny": 5, "full": 10}[run.profile]  # of every comparison below
torch.set_num_threads(1)  # a network this small gains nothing from a second core

# %% [markdown]
# ## Step 2: a head
#
# The backbone turns an image into a vector of features, $h$, with $d$ numbers. Somebody has to say
# something about it. That is the head, and it is always the same object, one linear layer and a
# softmax. What differs is how often it is asked.
#
# ### A head that chooses
#
# A **classification head** is asked once. It has one row of weights, $w_k$, for each of $K$
# classes:
#
# $$z_k = w_k \cdot h + b_k, \qquad p_k = \frac{e^{z_k}}{\sum_j e^{z_j}}, \qquad
# L = -\log p_y,$$
#
# where $y$ is the right class. $L$, the cross-entropy, is the price for having been surprised: 0
# if the head was certain and right, and $\log K$ if it spread its bets evenly. That gives a check
# that costs one line, and finds half of all mistakes in wiring. A head with zero weights *must*
# start at $\log K$.

# %% tags=["nbval-check-output"]
classifier = tl.Classifier(backbone, task.num_classes).to(run.device)
nn.init.zeros_(classifier.head.weight)
nn.init.zeros_(classifier.head.bias)
loaders = task.loaders(batch_size=20, augment=True, seed=0)
start = tl.evaluate(classifier, loaders.val).loss
print(f"loss of a head of zeros: {start:.4f};  log 10 = {math.log(10):.4f}")
assert abs(start - math.log(10)) < 1e-4

# %% [markdown]
# Zeros are a safe place to start from, and a slow one. The frozen backbone's features of 100 images
# are a small table, so the best head *for the frozen backbone* is one logistic regression away. We
# start there: "probe, then fine-tune" (lesson 08 says why this protects the features).
# `linear_probe` also reports an accuracy; we let it report on the validation set.

# %%
plain = task.loaders(augment=False)
features = tl.extract_features(backbone.to(run.device), plain.train)  # (100, d), computed once
val_features = tl.extract_features(backbone, plain.val)
probe = tl.linear_probe(features, val_features)
print(f"features {features.features.shape};  validation accuracy of the probe: {probe.interval}")

# %% [markdown]
# ### A head that writes
#
# Now the other kind. Let the answer be a *text*: not class 7, but the letters s, e, v, e, n. There
# are endlessly many texts, so no head has a row for each. The way out is to ask the same small head
# again and again, each time for the next letter only.
#
# Cut a text into **tokens** $x_1, \dots, x_T$ from a fixed list, the **vocabulary**, of size $V$.
# Here a token is a letter, and the last token is a full stop, which says that the word is over. By
# the chain rule of probability, with nothing left out,
#
# $$p(x_1, \dots, x_T) = \prod_{t=1}^{T} p(x_t \mid x_1, \dots, x_{t-1}).$$
#
# A **decoder** reads the tokens so far and gives a vector $h_t$. The **generation head**, also
# called language-model head, turns it into logits over the vocabulary, one row $e_v$ for each
# token $v$. Take the logarithm, and the product becomes a sum:
#
# $$-\log p(x_1, \dots, x_T) = \sum_{t=1}^{T} -\log \frac{e^{\,e_{x_t} \cdot h_t}}
# {\sum_v e^{\,e_v \cdot h_t}}.$$
#
# This is the **negative log-likelihood**. Read it slowly: each term is the cross-entropy from
# above, with the next token as the class. A generation head is a classification head with $V$
# classes that is asked $T$ times, and its gradient is the one of lesson 03, $p - y$ at each place.

# %%
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
VOCABULARY = "." + "".join(sorted(set("".join(NAMES))))  # the full stop is token 0
NO_TARGET = -100  # places after the end of a word; cross_entropy leaves them out


def to_tokens(names):
    """Inputs and targets, both (N, T): at each place, the target is the next token."""
    longest = max(map(len, names)) + 1
    inputs = torch.zeros(len(names), longest, dtype=torch.long)
    targets = torch.full((len(names), longest), NO_TARGET)
    for row, name in enumerate(names):
        tokens = torch.tensor([VOCABULARY.index(letter) for letter in f".{name}."])
        inputs[row, : len(tokens) - 1], targets[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
    return inputs, targets


# %% tags=["nbval-check-output"]
inputs, targets = to_tokens(NAMES)
print(f"vocabulary of {len(VOCABULARY)} tokens: {VOCABULARY}")
print("the decoder reads:   ", " ".join(VOCABULARY[token] for token in inputs[6]))
print("the head must say:   ", " ".join(VOCABULARY[t] if t >= 0 else "-" for t in targets[6]))

# %% [markdown]
# The decoder reads the same letters one place late, with a full stop in front to begin with. Where
# the word is over, there is nothing to say and nothing to pay.
#
# Any decoder will do; the head does not care. Ours is a GRU, a small recurrent network, in a dozen
# lines (lesson 15 has a transformer). It starts from a **context**, a vector that says what to
# write about. For now the context is zero: nothing to go by.
#
# One line deserves a stop. The head has one row of numbers for each token. The embedding, which the
# decoder reads with, has one row for each token too, of the same length. **Weight tying** uses *one*
# matrix for both jobs: what is learned about a letter from reading it helps to say it, and there is
# less to store. GPT-2 has 124 million parameters; without tying it would have 39 million more.


# %%
class Decoder(nn.Module):
    """Reads a context and tokens; gives logits for the next token at every place."""

    def __init__(self, context_dim, dim=48):
        super().__init__()
        self.start = nn.Sequential(nn.Dropout(0.5), nn.Linear(context_dim, dim))
        self.embed = nn.Embedding(len(VOCABULARY), dim)
        self.recurrent = nn.GRU(dim, dim, batch_first=True)
        self.head = nn.Linear(dim, len(VOCABULARY), bias=False)
        nn.init.normal_(self.embed.weight, std=0.1)
        self.head.weight = self.embed.weight  # weight tying: one matrix, two jobs

    def forward(self, context, tokens):  # (B, C), (B, T) -> (B, T, V)
        state = self.start(context).tanh().unsqueeze(0)  # (1, B, dim)
        return self.head(self.recurrent(self.embed(tokens), state)[0])


# %% [markdown]
# The loss is one call of `cross_entropy` over all places. Before we trust it, the formula above by
# hand for one word: probability of each letter, product, logarithm.


# %%
def name_loss(decoder, context, inputs, targets):
    """Negative log-likelihood of each name, in nats, shape (B,)."""
    logits = decoder(context, inputs).transpose(1, 2)  # (B, V, T)
    return F.cross_entropy(logits, targets, ignore_index=NO_TARGET, reduction="none").sum(dim=1)


torch.manual_seed(0)
decoder = Decoder(context_dim=1)
nothing = torch.zeros(10, 1)
losses = name_loss(decoder, nothing, inputs, targets)
letters = decoder(nothing, inputs)[6].softmax(dim=-1)  # (T, V) for "six"
by_hand = -math.log(math.prod(letters[t, VOCABULARY.index(x)].item() for t, x in enumerate("six.")))
print(f"six: {losses[6]:.4f} nats, by hand {by_hand:.4f}; 4 log 16 = {4 * math.log(16):.4f}")
assert abs(losses[6].item() - by_hand) < 1e-4

# %% [markdown]
# An untrained decoder pays about $\log V$ for each letter, as it should: 16 tokens, all alike.
#
# **Now predict.** The ten names are equally frequent, and the decoder has no image to look at. It is
# trained until it knows the ten names perfectly. How much does it then pay *for a whole name*, on
# average: next to nothing, about 1 nat, about 2.3, or about 11? Not for a letter. For the name.


# %%
def train_decoder(decoder, context, inputs, targets, num_steps):
    """Every step on all names at once; leaves the decoder in evaluation mode."""
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    decoder.train()
    for _step in range(num_steps):
        name_loss(decoder, context, inputs, targets).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    decoder.eval()


# %%
train_decoder(decoder, nothing, inputs, targets, num_steps=300)
losses = name_loss(decoder, nothing, inputs, targets).detach()
print(f"mean loss per name: {losses.mean():.2f} nats")
assert math.log(10) - 1e-4 < losses.mean() < math.log(10) + 0.1

# %% [markdown]
# About 2.3, and no training gets it lower. A perfect model says $p = 1/10$ for each name, so it pays
# $\log 10 = 2.30$: exactly the price of a classification head that knows nothing. You can watch
# where it is paid. Take *three*: the first letter is t in two names of ten, price $\log 5 = 1.61$.
# After t comes w or h, price $\log 2 = 0.69$. After that no letter is a surprise, and all are free.
# And $\log 5 + \log 2 = \log 10$.

# %%
probabilities = decoder(nothing, inputs)[3].softmax(dim=-1).detach()  # for "three"
for place, letter in enumerate("three."):
    price = -math.log(probabilities[place, VOCABULARY.index(letter)])
    print(f"{'.three'[: place + 1]:>7} -> {letter}   price {price:5.3f} nats")

# %% [markdown]
# To get below $\log 10$, the decoder must *see*. So give it a context: the frozen backbone's features
# of an image. (We take five distorted copies of each training image, as 100 are few.) Now the loss
# is $-\log p(\text{name} \mid \text{image})$, and the two heads can be read on one scale.


# %%
def as_context(part):
    """Features as a context, (N, d): mean 0 and deviation 1 over the training images."""
    mean, scale = features.features.mean(axis=0), features.features.std(axis=0) + 1e-6
    return torch.from_numpy((part.features - mean) / scale).float()


torch.manual_seed(0)
passes = [tl.extract_features(backbone, loaders.train) for _ in range(5)]
context = torch.cat([as_context(part) for part in passes])
words = to_tokens([NAMES[label] for part in passes for label in part.targets])
writer = Decoder(backbone.feature_dim)
train_decoder(writer, context, *words, num_steps=60)

# %% [markdown]
# To write, the decoder is asked for the next letter, and its answer becomes its next input, until it
# says that the word is over.


# %%
def write(writer, context, longest=6):
    """A word, letter by letter: always the likeliest token; context has shape (C,)."""
    text = "."
    while len(text) == 1 or (text[-1] != "." and len(text) <= longest):
        tokens = torch.tensor([[VOCABULARY.index(letter) for letter in text]])  # (1, T)
        with torch.no_grad():
            logits = writer(context[None], tokens)[0, -1]  # (V,), of the last place
        text += VOCABULARY[int(logits.argmax())]
    return text.strip(".")


# %%
some = range(0, 300, 30)
val_context = as_context(val_features)
titles = [f"{val_features.targets[i]}: {write(writer, val_context[i])}" for i in some]
pictures = tl.plots.show_images(task.val.inputs[list(some)], titles, ncols=10)
tl.plots.alt(pictures, "Ten validation images with the right digit and the word that was written.")

# %%
truth = torch.from_numpy(val_features.targets)
words = to_tokens([NAMES[label] for label in truth])
with torch.no_grad():
    writing = name_loss(writer, val_context, *words).mean()
choosing = F.cross_entropy(torch.from_numpy(probe.logits(val_features.features)), truth)
print(f"validation loss per image: choosing {choosing:.2f}, writing {writing:.2f} nats")
print(f"without the image, either would pay at least {math.log(10):.2f}")
assert choosing < math.log(10) - 0.3 and writing < math.log(10) - 0.3

# %% [markdown]
# (The head that writes can do something that the other cannot: misspell.)
#
# Both heads read the same features, and both are now well below $\log 10$. (Which of the two is ahead
# depends on how each is regularised; we make no claim.) The choice between them follows from the
# task: a fixed list of answers calls for the head that chooses, anything that must be *said* for
# the head that writes. From here on digits are ten classes, and we choose.
#
# ## Step 3: hyper-parameters
#
# All settings of a run in one place, frozen, checked when they are made:

# %%
config = tl.TrainConfig(
    lr=1e-3,  # peak learning rate: how far one step goes
    num_steps=60,  # updates, at most
    warmup_steps=10,  # steps in which lr rises from 0, while Adam's averages are still empty
    weight_decay=0.01,  # not for biases and norm scales
    max_grad_norm=1.0,  # a gradient longer than this is shortened to it
    eval_every_steps=5,  # how often the validation set is read
    patience=6,  # stop after so many readings without a better one ...
    monitor="val_loss",  # ... where better means a lower validation loss
    precision="fp32",  # small enough for full precision everywhere
    progress=False,
)

# %% [markdown]
# (The batch size belongs to the loaders. Ours is 20: 100 images are then five whole batches. With 32
# every fourth batch would hold four images, and its gradient would be the opinion of four.)
#
# Most of these can stay as they are from one task to the next. One cannot: the learning rate. Too
# low wastes the budget. Too high, and the first steps wipe out what was pre-trained. So we try three,
# a factor of ten apart, briefly, from the same start, and let the *validation* set choose. One draw
# of 100 images may be an odd one, so each rate gets three draws, and the means are compared.


# %%
def at_the_start():
    """Pre-trained backbone, head from the probe: where every run below begins."""
    model = tl.Classifier(tl.load_backbone("glyphnet"), task.num_classes)
    probe.copy_to(model.head)
    return model.to(run.device)


def beginning(seed):
    """Ten labels per class drawn by seed; pre-trained backbone, head from a probe on them."""
    labelled = tl.load_task("wild_digits", labels_per_class=10, seed=seed)
    reader = tl.Classifier(tl.load_backbone("glyphnet"), labelled.num_classes).to(run.device)
    cached = tl.extract_features(reader.backbone, labelled.loaders(augment=False).train)
    # The penalty is the one chosen above; with a single candidate there is nothing to choose.
    tl.linear_probe(cached, cached, cached, c_grid=(probe.C,)).copy_to(reader.head)
    return labelled, reader


# %%
trials = {}
for lr in (3e-4, 3e-3, 3e-2):
    short = replace(config, lr=lr, num_steps=15, patience=None)
    losses = []
    for seed in range(3):
        labelled, reader = beginning(seed)
        loaders = labelled.loaders(batch_size=20, augment=True, seed=seed)  # the same for each lr
        losses.append(min(tl.fit(reader, loaders.train, loaders.val, short).val_loss))
    trials[lr] = np.mean(losses)
    print(f"lr {lr:g}: best validation loss {trials[lr]:.3f}, mean of three draws")

# %%
best_lr = min(trials, key=trials.get)
config = replace(config, lr=best_lr)
assert best_lr == 3e-3 and trials[3e-2] > trials[best_lr] + 0.3
print(f"chosen: lr = {config.lr:g}")

# %% [markdown]
# Remember $\log 10 = 2.30$. The readers trained at the highest rate know no more than a head of
# zeros, although their backbone was as well pre-trained as the others.
#
# ## Step 4: training
#
# One call. (What it does is written out further below.) Two series of numbers come back: one entry
# for every step, and one for every reading of the validation set.

# %%
model = at_the_start()
loaders = task.loaders(batch_size=20, augment=True, seed=0)
history = tl.fit(model, loaders.train, loaders.val, config)
print(f"ended after step {history.step[-1]}, kept the weights of step {history.best_step}")

# %%
tl.plots.alt(
    tl.plots.plot_history(history),
    "Above, the losses over the steps: training falls to nearly zero, validation stays well above. "
    "Below, the learning rate: a short line up, then half a cosine down to zero.",
)

# %% [markdown]
# The training loss goes to zero: the reader knows its 100 images by heart, however they are
# distorted. The validation loss does not follow. What lies between the curves is what 100 images
# cannot tell (lesson 09). It goes up and down while the learning rate is high, and settles as the
# rate goes down. `fit` puts the weights of the *best* reading back, which need not be the last.
#
# When should it have stopped? **Early stopping** waits until `patience` readings in a row have
# brought nothing better. The curve is recorded, so we can ask what each patience would have done:


# %%
def stopping_point(val_loss, patience):
    """Index of the reading after which training stops, and of the one that is kept."""
    best = 0
    for reading, loss in enumerate(val_loss):
        if loss < val_loss[best]:
            best = reading
        elif reading - best >= patience:
            break
    return reading, best


for patience in range(1, 8):
    last, best = stopping_point(history.val_loss, patience)
    steps = f"stops after step {history.eval_step[last]:3}, keeps step {history.eval_step[best]:3}"
    print(f"patience {patience}: {steps}, validation loss {history.val_loss[best]:.3f}")

# %% [markdown]
# Little patience saves steps and falls for the first bump. Patience is paid in steps. It is one more
# choice that was made by looking at the validation set, and so the validation accuracy of the kept
# weights is a little too good to be reported.
#
# ## Step 5: test, save, predict
#
# Now, and only now, the test set.

# %%
report = tl.evaluate(model, loaders.test, classes=task.classes)
print(report)

# %% [markdown]
# **Recall** is the share of a digit's images that were found; **precision** is the share of its
# answers that were right; f1 is their harmonic mean. A digit with high recall and low precision is
# one that the reader says too often.
#
# Before you write an e-mail about the worst digit: each row stands on some 80 images, so each recall
# has an interval of its own. Are the two worst really different from each other? From the best?


# %%
def recall_interval(row):
    """Wilson 95 % interval of the recall of one class."""
    return wilson_interval(round(row.recall * row.count), row.count)


ranked = sorted(report.per_class, key=lambda row: row.recall)
for row in (ranked[0], ranked[1], ranked[-1]):
    print(f"digit {row.name}: recall {recall_interval(row)} on {row.count} images")
assert recall_interval(ranked[0]).high < recall_interval(ranked[-1]).low

# %% [markdown]
# The worst is worse than the best beyond doubt. *Which* digit is the worst is not settled.
#
# ### Save, and load again
#
# A model that cannot be loaded is not finished. `save_model` writes every weight, head included,
# as safetensors (numbers only; loading such a file runs no code). Then the one test worth having:
# load it into a *new* object and ask for the same logits, equal to the last bit.

# %%
folder = Path(tempfile.mkdtemp())
tl.save_model(model, folder / "reader.safetensors")
reader = tl.Classifier(tl.load_backbone("glyphnet", pretrained=False), task.num_classes)
reader = tl.load_model(folder / "reader.safetensors", reader).to(run.device).eval()
images = task.val.inputs.to(run.device)
with torch.no_grad():
    assert torch.equal(reader(images), model(images))
size = (folder / "reader.safetensors").stat().st_size
print(f"identical logits; {size / 1e6:.1f} MB on disk")

# %% [markdown]
# Compare with the classic accident: only the backbone is saved; on loading, a head of the right
# shape is made; nothing complains.

# %%
tl.save_model(model.backbone, folder / "backbone.safetensors")
forgetful = tl.Classifier(tl.load_backbone("glyphnet", pretrained=False), task.num_classes)
tl.load_model(folder / "backbone.safetensors", forgetful.backbone)
accuracy = tl.evaluate(forgetful.to(run.device), loaders.val).accuracy
print(f"validation accuracy, all saved:           {tl.evaluate(reader, loaders.val).accuracy:.2f}")
print(f"validation accuracy, only backbone saved: {accuracy:.2f}")
assert accuracy < 0.4

# %% [markdown]
# ### A picture of your own
#
# A new picture is not a tensor: it has some size, some number of channels, numbers from 0 to 255.
# What stands between it and the model is the backbone's `preprocess`, and nothing else may. Here is
# a 3, as a pen would leave it on grey paper.


# %%
def pen_stroke(points, size=224, paper=(205, 200, 190), ink=(30, 40, 110)):
    """A picture of one stroke of a pen; points are fractions of the side of the picture."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (size, size), paper)
    corners = [(x * size, y * size) for x, y in points]
    ImageDraw.Draw(picture).line(corners, fill=ink, width=size // 9, joint="curve")
    return picture


three = pen_stroke(
    [(0.3, 0.27), (0.42, 0.18), (0.6, 0.2), (0.66, 0.32), (0.58, 0.44), (0.45, 0.48)]
    + [(0.6, 0.52), (0.7, 0.64), (0.66, 0.78), (0.5, 0.85), (0.3, 0.78)]
)


# %%
def read_digit(picture):
    """Class probabilities for one picture (PIL image or uint8 array), shape (10,)."""
    return tl.predict(model, backbone.preprocess(picture).unsqueeze(0))[0]


answer = read_digit(three)
print("says", int(answer.argmax()), "with probability", f"{answer.max():.2f}")


# %%
def show_answer(picture):
    """The picture beside a bar for each class."""
    figure, (left, right) = tl.plots.subplots(1, 2, figsize=(6.5, 2.6))
    left.imshow(picture)
    left.set_axis_off()
    right.bar(range(10), read_digit(picture), color=tl.plots.palette[0])
    right.set(xticks=range(10), xlabel="digit", ylabel="probability", ylim=(0, 1))
    return figure


tl.plots.alt(
    show_answer(three), "A hand-drawn 3, and the probability that the model gives each digit."
)

# %% [markdown]
# Now yours. Click cells to draw, or upload a picture of a digit. What you draw is put on grey
# paper, like the 3 above. Then try to fool it: a thin stroke, a digit in the corner, a letter.


# %%
def on_paper(ink):
    """A picture from the ink of the drawing pad, shape (8, 8), in [0, 16]."""
    from PIL import Image

    paper, pen = np.array([205, 200, 190]), np.array([30, 40, 110])
    amount = np.pad(ink, 2)[:, :, None] / 16  # a margin around the digit
    pixels = (paper * (1 - amount) + pen * amount).astype(np.uint8)  # (12, 12, 3)
    return Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC)


tl.widgets.draw_digit(lambda ink: show_answer(on_paper(ink)))

# %% [markdown]
# ## What `fit` does, written out
#
# You have seen the call; now write it. Without names and docstrings it is some thirty lines, in four
# pieces: the learning rate of a step, the optimizer, the reading of the validation set, and the
# loop itself.
#
# The learning rate climbs in a straight line for $w$ steps, then follows half a cosine down to
# zero. In step $s = 0, 1, \dots, S - 1$ it is the peak rate times
#
# $$\frac{s+1}{w} \ \text{ for } s < w, \qquad
# \tfrac12\left(1 + \cos \pi\,\frac{s - w}{S - w}\right) \ \text{ after that.}$$


# %%
def learning_rate(step, config):
    """Learning rate of one step, counted from 0."""
    if step < config.warmup_steps:
        return config.lr * ((step + 1) / config.warmup_steps)
    progress = (step - config.warmup_steps) / (config.num_steps - config.warmup_steps)
    return config.lr * (0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model, config):
    """AdamW; matrices and kernels decay, biases and norm scales do not."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = zip((decayed, others), (config.weight_decay, 0.0))
    settings = [{"params": p, "weight_decay": decay} for p, decay in groups]
    return torch.optim.AdamW(settings, fused=True)  # all tensors in one call


# %%
def batch_loss(model, images, targets, reduction="mean"):
    """Forward pass and cross-entropy of one batch, on the model's device."""
    device = next(model.parameters()).device
    logits = model(images.to(device))  # (B, K)
    return F.cross_entropy(logits, targets.to(device), reduction=reduction)


def validation_loss(model, loader):
    """Loss per example: a sum over all batches, divided once."""
    model.eval()
    with torch.no_grad():
        total = sum(batch_loss(model, *batch, reduction="sum") for batch in loader)
    model.train()
    return total.item() / len(loader.targets)


# %%
def train_step(model, optimizer, batch, lr, max_grad_norm):
    """One update of the weights. The order matters."""
    batch_loss(model, *batch).backward()  # forward, loss, backward
    nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)  # after backward, before the step
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()  # or the next gradient is added to this one


# %%
def fit_by_hand(model, train_loader, val_loader, config):
    """Trains the model, leaves it with its best weights, and returns their step."""
    optimizer, best_loss, best_step = make_optimizer(model, config), math.inf, 0
    batches = itertools.chain.from_iterable(itertools.repeat(train_loader))  # pass after pass
    model.train()
    for step, batch in zip(range(1, config.num_steps + 1), batches):
        train_step(model, optimizer, batch, learning_rate(step - 1, config), config.max_grad_norm)
        if step % config.eval_every_steps == 0:
            if (loss := validation_loss(model, val_loader)) < best_loss:
                best_loss, best_step, best = loss, step, copy.deepcopy(model.state_dict())
            elif step - best_step >= config.patience * config.eval_every_steps:
                break
    model.load_state_dict(best)
    return best_step


# %% [markdown]
# If this is what `fit` does, then the same start, the same batches and the same settings must end
# in the same weights. Not in a similar accuracy: in the same numbers, all 310,186 of them. We give
# both a patience of 1, so that early stopping is put to the test as well. And both run on the CPU: a
# GPU adds up in an order of its own, a little differently each time, and a near tie of two validation
# losses would then stop one of them earlier.

# %%
hasty = replace(config, patience=1)
by_hand, by_fit = at_the_start().cpu(), at_the_start().cpu()
first, second = (task.loaders(batch_size=20, seed=0) for _ in range(2))  # that draw the same
kept = fit_by_hand(by_hand, first.train, first.val, hasty)
hasty_history = tl.fit(by_fit, second.train, second.val, hasty)
pairs = zip(by_hand.parameters(), by_fit.parameters(), strict=True)
largest = max((a - b).abs().max().item() for a, b in pairs)
print(f"by hand: kept step {kept}")
print(f"tl.fit:  kept step {hasty_history.best_step}, ended after step {hasty_history.step[-1]}")
print(f"largest difference of any weight: {largest:.1e}")
assert kept == hasty_history.best_step and largest < 1e-3

# %% [markdown]
# It holds. The difference is 0: every bit is the same. What `fit` has on top is what you would not
# want to write each time: half precision, accumulation over small batches, a progress bar, refusing
# what cannot work. And one thing more.
#
# ## What if the machine goes away?
#
# A session on Colab ends when its time is up, or when your laptop sleeps for too long. Its memory
# is gone then, and its disk too.
#
# **Now predict.** A run of 12 steps is cut off after step 7. All that you have is a file with the
# weights after that step. You load them and run the 5 steps that are left. Do you end with the model
# of the run that was never cut off? If not, what else must be in the file? Look at `fit_by_hand`:
# whatever lives from one step to the next is a candidate.
#
# First the run that nothing happens to. It is on the CPU, like the proof above, and for the same
# reason.


# %%
def fresh_batches(kind=BatchLoader):
    """The training images, 20 at a time, shuffled and distorted: 5 batches in each epoch."""
    return kind(task.train.inputs, task.train.targets, 20, True, augment_images, seed=0)


twelve = replace(config, num_steps=12, warmup_steps=3, patience=None)
whole = at_the_start().cpu()
whole_history = tl.fit(whole, fresh_batches(), None, twelve)

# %% [markdown]
# A **checkpoint** is everything that a run needs in order to go on as if nothing had happened. There
# are five parts, and each is missed in its own way:
#
# | part | without it |
# |---|---|
# | weights | You begin again. |
# | state of the optimizer | Adam's averages are empty: next, each weight moves by the full rate. |
# | step in the schedule | The learning rate climbs to its peak again, just when it should fall. |
# | chance | Order and distortions of the first epoch come a second time. |
# | position in the epoch | The epoch begins anew: some images come twice, and others not yet. |
#
# (Chance is the states of all random generators: the loader's, and those of torch, NumPy and Python.)
#
# The machine may also go away *while* a checkpoint is written, and half a file is worse than none.
# So `fit` writes it beside its place, under another name, and renames it when all is on the disk.
# A rename has happened or it has not; there is no half of it.
#
# ```text
# step-00000007.safetensors.812.partial   being written by process 812: does not count
# step-00000007.safetensors               all tensors, renamed: does not count yet
# step-00000007.json                      the rest, with a checksum: now it counts
# ```
#
# Now the accident. This loader gives seven batches, and then the machine is gone.


# %%
class Disconnects(BatchLoader):
    """A loader on a machine that goes away."""

    left = 7  # batches until then

    def __iter__(self):
        for batch in super().__iter__():
            if self.left == 0:
                raise ConnectionError("the machine is gone")
            self.left -= 1
            yield batch


# %% [markdown]
# The cell that trains makes everything as at the start, the model and the loader. `resume="auto"`
# does the rest: if there is a checkpoint in the folder, the run goes on from it; if not, it begins.
# So it is *the same cell* before the accident and after it. (`fit` says on the error stream where
# it goes on; we print that line without the name of the folder.)

# %%
place = tempfile.TemporaryDirectory()  # stands for a folder that outlives the machine
saving = replace(twelve, checkpoint_dir=place.name, checkpoint_minutes=0)  # 0: after every step


def begin_or_go_on(batches):
    """Model and history of the run, wherever it was."""
    reader = at_the_start().cpu()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        history = tl.fit(reader, batches, None, saving, resume="auto")
    print(said.getvalue().partition(" (")[0])
    return reader, history


# %% tags=["nbval-check-output"]
try:
    begin_or_go_on(fresh_batches(Disconnects))
except ConnectionError as error:
    print(error)
for path in sorted(Path(place.name).iterdir()):
    print(path.name)

# %% [markdown]
# The two newest checkpoints are there. (Two, in case the newest turns out to be damaged: its checksum
# would tell, and `fit` would take the one before.) What is in the last one?

# %%
from safetensors.torch import load_file

newest = load_file(Path(place.name) / "step-00000007.safetensors")
parts = {"weights": {}, "optimizer": {}, "before": {}, "now": {}}
for name, tensor in newest.items():
    part, _, rest = name.partition(".")
    parts[part][rest] = tensor
for part, tensors in parts.items():
    kilobytes = sum(tensor.nbytes for tensor in tensors.values()) / 1000
    print(f"{part:9}  {len(tensors):3} tensors, {kilobytes:6.0f} kB")

# %% [markdown]
# The optimizer's state is twice as large as the weights: Adam keeps two averages for each of them, of
# its gradient and of the gradient's square. *Before* and *now* are chance, as it was before this
# epoch and as it is after step 7. The order of the epoch follows from the first, so the position is
# a single number. It is in the JSON file, with the step.
#
# Your prediction, with the weights alone:

# %%
alone = at_the_start().cpu()
alone.load_state_dict(parts["weights"])
alone_history = tl.fit(alone, fresh_batches(), None, replace(twelve, num_steps=5))

# %% [markdown]
# And the same cell as before the accident, with all five parts:

# %%
resumed, resumed_history = begin_or_go_on(fresh_batches())
print("loss of step      8      9     10     11     12   largest difference of a weight")
runs = {"not cut off": (whole, whole_history), "five parts": (resumed, resumed_history)}
runs["weights only"] = (alone, alone_history)
for name, (reader, its_history) in runs.items():
    pairs = zip(reader.parameters(), whole.parameters(), strict=True)
    largest = max((a - b).abs().max().item() for a, b in pairs)
    losses = " ".join(f"{loss:6.3f}" for loss in its_history.train_loss[-5:])
    print(f"{name:12} {losses}   {largest:.1e}")

# %%
states = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
assert all(torch.equal(a, b) for a, b in states)  # to the last bit
assert resumed_history.train_loss == whole_history.train_loss
assert largest > 1e-3  # with the weights alone, the last row of the table
assert alone_history.train_loss[0] < whole_history.train_loss[7]  # step 8
place.cleanup()

# %% [markdown]
# With all five parts no bit differs, in the weights or in the losses. With the weights alone it is
# another run. Its loss is *lower* at first, which looks like good news. It is not: chance came a
# second time, so these are the images of the first three steps, with the same distortions. Then the
# learning rate is at its peak again, and the losses to the right go their own way. Nothing stopped,
# and nothing warned. Whether such a model is worse, one run cannot say. It is not the model of the
# settings that you report.
#
# In your own work, on Colab, a mounted drive outlives the machine:
#
# ```python
# from google.colab import drive
#
# drive.mount("/content/drive")
# config = replace(config, checkpoint_dir=tl.run_dir("my_reader"))
# history = tl.fit(model, loaders.train, loaders.val, config, resume="auto")
# ```
#
# `tl.run_dir` finds the mounted drive; without one it gives `runs/my_reader` in the present folder.
# A checkpoint is written every five minutes (`checkpoint_minutes`), so that is what you can lose.
# Each run needs a name of its own: `fit` refuses the checkpoints of a run with other settings, and
# names the first that differs. On a GPU all five parts come back too. But it adds up in another order
# each time, so there do not expect the last bit.
#
# ## Was it the transfer?
#
# A sceptic has two questions. *Was that luck, one draw of 100 images?* So we train several readers
# in the same way, each on other labelled images, for 40 steps. They are kept; we need them again.


# %%
def train_reader(seed, num_steps=40):
    """Ten labels per class drawn by seed, head from a probe, then everything is trained."""
    labelled, reader = beginning(seed)
    settings = replace(config, num_steps=num_steps, patience=None, seed=seed)
    tl.fit(reader, labelled.loaders(batch_size=20, seed=seed).train, None, settings)
    return reader


# %% [markdown]
# Draws do not wait for each other, so `side_by_side` gives each core one of them.

# %%
readers = list(tl.side_by_side(train_reader, range(num_draws)))
ours = [tl.evaluate(reader, loaders.test).accuracy for reader in readers]
print(f"test accuracy over {num_draws} draws: {mean_interval(ours)}")

# %% [markdown]
# *Would a network without pre-training not have done as well?* It gets the same architecture, images
# and augmentation, learning rates of its own to choose from on validation, and up to 1,500 steps.
# That takes minutes, so these numbers are read from the recorded run of lesson 01; the file says how
# to repeat it. Every draw of labels was given to each arm.

# %% tags=["nbval-check-output"]
recorded = json.loads((data_dir() / "results" / "wild_digits.json").read_text(encoding="utf-8"))
comparison = Comparison(recorded["counts"]["10"]["scores"])  # ten labels per class
print(recorded["command"])
for arm in ("scratch", "random features", "probe", "probe, then fine-tune"):
    print(f"{arm:22} {comparison.interval(arm)}")

# %%
gain = comparison.difference("probe, then fine-tune", "scratch")
print(f"gain over scratch, draw by draw: {gain}")
assert gain.low > 0.4 and mean_interval(ours).low > comparison.interval("scratch").high

# %% [markdown]
# It was the transfer. Not the architecture: random features are hardly better than chance. Not the
# head alone: the probe is far behind what fine-tuning reaches.
#
# ## The day after: a refresh
#
# Back to the question from the start. The second camera lies on its side. From it come ten more
# labelled images of each digit, and none of them is one that the reader was trained on.


# %%
def second_camera(split):
    """The same images as seen by a camera that lies on its side."""
    return replace(split, inputs=split.inputs.rot90(1, dims=(2, 3)))


def new_delivery(seed):
    """What the reader of this seed was trained on, and a hundred new images, turned."""
    old = tl.load_task("wild_digits", labels_per_class=10, seed=seed).train
    more = tl.load_task("wild_digits", labels_per_class=20, seed=seed).train  # contains the old
    return old, second_camera(more.take(~torch.isin(more.ids, old.ids)))


# %%
old, new = new_delivery(seed=0)
assert not set(old.ids.tolist()) & set(new.ids.tolist())
shown = torch.cat([old.inputs[::20], new.inputs[::20]])
pictures = tl.plots.show_images(shown, ["old"] * 5 + ["new"] * 5, ncols=10)
tl.plots.alt(pictures, "Five old images, upright, and five new ones, turned by a quarter.")

# %% [markdown]
# Three ways to go on from the saved reader, with the same number of steps and the same batch size:
# the new images alone; the new ones and two old ones of each digit; the new ones and all the old
# ones. Training on old examples together with new ones is called **replay**.


# %%
def join(a, b):
    """One split out of two."""
    inputs, targets = torch.cat([a.inputs, b.inputs]), torch.cat([a.targets, b.targets])
    return replace(a, inputs=inputs, targets=targets, ids=torch.cat([a.ids, b.ids]))


def refresh(saved, split, seed, num_steps=40):
    """Train on from a saved reader; the saved one is left as it is."""
    reader = copy.deepcopy(saved)
    batches = BatchLoader(split.inputs, split.targets, 20, True, augment_images, seed)  # shuffled
    tl.fit(reader, batches, None, replace(config, num_steps=num_steps, patience=None))
    return reader


# %%
def refreshed_readers(seed):
    """Name -> reader: before, and after each of the three ways."""
    saved, (old, new) = readers[seed], new_delivery(seed)
    few = old.take(torch.arange(len(old)) % 10 < 2)  # ten in a row are of one class
    return {
        "before": saved,
        "new only": refresh(saved, new, seed),
        "new + 20 old": refresh(saved, join(new, few), seed),
        "new + all old": refresh(saved, join(new, old), seed),
    }


# %%
cameras = {"old": task.val, "new": second_camera(task.val)}
scores = {camera: {} for camera in cameras}
refreshed = list(tl.side_by_side(refreshed_readers, range(num_draws)))
for by_way in refreshed:
    for way, reader in by_way.items():
        for camera, part in cameras.items():
            loader = BatchLoader(part.inputs, part.targets, 256)
            scores[camera].setdefault(way, []).append(tl.evaluate(reader, loader).accuracy)
print(f"{'':15}  {'old camera':22}  new camera")
for way in scores["old"]:
    print(f"{way:15}  {mean_interval(scores['old'][way])}   {mean_interval(scores['new'][way])}")

# %%
figure, axes = tl.plots.subplots(1, 2, figsize=(9, 2.9), sharey=True)
results = {camera: Comparison(by_way) for camera, by_way in scores.items()}
for ax, camera in zip(axes, results):
    tl.plots.plot_comparison(results[camera], f"validation accuracy, {camera} camera", ax)
    ax.set_xlim(0, 1)
tl.plots.alt(
    figure,
    "Validation accuracy before the refresh and after three ways of it. Old camera: new only falls "
    "by some 28 points, 20 old images halve the loss, all old images keep the level. New camera: "
    "all three rise from chance to about 0.7.",
)

# %%
for way in ("new only", "new + 20 old", "new + all old"):
    print(f"{way:14} change on the old camera {results['old'].difference(way, 'before')}")
forgets = results["old"].difference("new only", "before")
keeps = results["old"].difference("new + all old", "before")
saved_by_replay = results["old"].difference("new + all old", "new only")
assert forgets.high < -0.1 and keeps.low > -0.12 and saved_by_replay.low > 0.1

# %% [markdown]
# Compare with your three numbers. On the new images alone the reader forgets, in a few dozen steps,
# a third of what it could do, and *nothing in its training tells you*: training reads only new images.
# You see it if you measure the old camera, and not otherwise.
#
# Two old images of each digit save about half of what would be lost. All of them save nearly all of
# it. The price is on the right side of the picture: at the same number of steps half of every batch
# is old, and the new camera is learned more slowly. Whether more steps pay for that, you can try:
# `num_steps` is an argument of `refresh`.
#
# The decision was made on validation images. Now that it is made (new + all old), the chosen readers
# are tested, once, on both cameras.

# %%
chosen = [by_way["new + all old"] for by_way in refreshed]
turned = second_camera(task.test)
turned_loader = BatchLoader(turned.inputs, turned.targets, 256)
after = [tl.evaluate(reader, loaders.test).accuracy for reader in chosen]
on_turned = [tl.evaluate(reader, turned_loader).accuracy for reader in chosen]
change = mean_interval([b - a for a, b in zip(ours, after, strict=True)])
print(f"test, new camera: {mean_interval(on_turned)}")
print(f"test, old camera: {mean_interval(after)}")
print(f"change on the old camera: {change}")
assert change.low > -0.12 and mean_interval(on_turned).low > 0.4

# %% [markdown]
# The last line is what you send along with the new model: what has changed for those who used the old
# one, and how sure you are of it.
#
# ## Where it fails
#
# **There is no answer "none of these".** The head that chooses divides a probability of one among
# ten digits, whatever it is shown. Here are letters and symbols that are not digits:

# %%
letters, _ = tl.sources.glyph_batch(400, torch.Generator().manual_seed(0))
on_letters = tl.predict(model, letters).max(dim=1)
on_digits = tl.predict(model, task.val.inputs).max(dim=1)
print(f"mean confidence on digits:  {on_digits.values.mean():.2f}")
print(f"mean confidence on letters: {on_letters.values.mean():.2f}")
titles = [f"{int(on_letters.indices[i])}: {on_letters.values[i]:.2f}" for i in range(10)]
pictures = tl.plots.show_images(letters[:10], titles, ncols=10)
tl.plots.alt(pictures, "Ten letters and symbols with the digit that was read and the confidence.")
assert on_letters.values.mean() > 0.4

# %% [markdown]
# **The preprocessing is part of the model.** Three accidents that no shape and no type gives away:
# the range [0, 1] in place of [-1, 1]; colours in the order blue, green, red, as OpenCV reads a file;
# rows and columns exchanged, one wrong number in a `permute`. Which of them hurts most? Which hardly?

# %%
right = task.val.inputs
accidents = {
    "as trained": right,
    "range [0, 1]": right / 2 + 0.5,
    "blue, green, red": right.flip(1),
    "rows and columns": right.transpose(2, 3),
}
found = {}
for name, images in accidents.items():
    answers = [tl.predict(reader, images).argmax(dim=1) for reader in readers]
    found[name] = [(answer == task.val.targets).float().mean().item() for answer in answers]
    print(f"{name:17} {mean_interval(found[name])}")

# %%
accuracies = Comparison(found)
assert accuracies.difference("blue, green, red", "as trained").high < -0.05
assert accuracies.interval("rows and columns").high < 0.3

# %% [markdown]
# Not one error, not one warning. The wrong range is mostly forgiven: the normalisation layers inside
# undo most of it, and not every architecture has them. The wrong order of colours costs some 16
# points, too few to be noticed at a glance and too many to ship. Exchanged rows and columns leave
# nothing but chance. That is why `preprocess` comes with the weights, and why it alone should stand
# between a picture and the model.
#
# **Replay needs the old data.** If they may not be kept, or are too many, you are in the country of
# continual learning (lesson 24). And replay protects what is *in* the replayed images, nothing else.
#
# **A validation set wears out.** It chose the learning rate, the step to keep, and the way to
# refresh. Each choice made it a little more flattering. When it has been read a hundred times, get
# a new one.
#
# ## Explorer: two heads, one image
#
# The head that chooses, asked once, and the head that writes, asked for its next letter. Move
# *letters* to let the writer go on. Look for an image on which the two disagree, and for a word in
# which the first letter is dear and the rest is free.


# %%
def next_letter(image, letters):
    """What the writer has written after so many letters, and its probabilities for the next."""
    text = "." + write(writer, val_context[image])[:letters]
    tokens = torch.tensor([[VOCABULARY.index(letter) for letter in text]])
    return text, writer(val_context[image][None], tokens)[0, -1].softmax(dim=-1).detach()


# %%
def draw_both_heads(image, letters):
    figure, axes = tl.plots.subplots(1, 3, figsize=(9, 2.6), width_ratios=(1, 1.6, 2.4))
    axes[0].imshow(task.val.inputs[image].permute(1, 2, 0) / 2 + 0.5)
    axes[0].set_axis_off()
    logits = torch.from_numpy(probe.logits(val_features.features[[image]])[0])
    axes[1].bar(range(10), logits.softmax(dim=0), color=tl.plots.palette[0])
    axes[1].set(xticks=range(10), xlabel="digit", ylabel="probability", ylim=(0, 1))
    text, probabilities = next_letter(image, letters)
    axes[2].bar(list(VOCABULARY), probabilities, color=tl.plots.palette[1])
    axes[2].set(xlabel=f"next letter after “{text}”", ylim=(0, 1))


# %%
tl.widgets.explore(
    draw_both_heads,
    image=tl.widgets.slider(0, 299, 1, 30, "image"),
    letters=tl.widgets.slider(0, 5, 1, 0, "letters"),
)

# %% [markdown]
# ## Quiz

# %%
tl.quiz("04")

# %% [markdown]
# ## Exercise
#
# [Exercise 04](../exercises/04_five_steps.ipynb): a fine-tuning script as you find them on the web.
# It has nine mistakes. Five stop it; four let it run and print a number. Find them, mend them.
#
# ## Papers
#
# - Kumar, Raghunathan, Jones, Ma, Liang 2022, *Fine-tuning can distort pretrained features and
#   underperform out-of-distribution*, section 3 (probe, then fine-tune), arXiv:2202.10054.
# - Vinyals, Toshev, Bengio, Erhan 2015, *Show and tell: a neural image caption generator*,
#   section 3, equations 1 and 2 (the loss of a writing head that sees an image), arXiv:1411.4555.
# - Press, Wolf 2017, *Using the output embedding to improve language models*, section 3 (weight
#   tying), arXiv:1608.05859.
# - Loshchilov, Hutter 2019, *Decoupled weight decay regularization*, algorithm 2 (AdamW),
#   arXiv:1711.05101.
# - Chaudhry, Rohrbach, Elhoseiny, Ajanthan, Dokania, Torr, Ranzato 2019, *On tiny episodic memories
#   in continual learning*, section 4 (replay of a few old examples), arXiv:1902.10486.
#
# ## Glossary
#
# | term | meaning | 中文 |
# |---|---|---|
# | classification head | linear layer and softmax that choose one of $K$ classes | 分类头 |
# | generation head, language-model head | the same over a vocabulary, asked for one token after the other | 生成头，语言模型头 |
# | token, vocabulary | a piece of text; the fixed list of all pieces | 词元，词表 |
# | decoder | network that reads the tokens so far and gives a vector for the next | 解码器 |
# | negative log-likelihood | minus the logarithm of the probability given to what happened | 负对数似然 |
# | weight tying | one matrix as embedding and as head | 权重共享 |
# | hyper-parameter | a number that is set, not learned | 超参数 |
# | warm-up | first steps, in which the learning rate rises | 学习率预热 |
# | checkpoint | all that a run needs to go on where it was | 检查点 |
# | early stopping | to stop, and keep the best weights, when validation no longer improves | 早停 |
# | recall, precision | share of a class that is found; share of its answers that are right | 召回率，精确率 |
# | refresh | to train a model in service on with new labels | 模型更新 |
# | replay | to mix old examples into the new ones | 回放（经验重放） |
