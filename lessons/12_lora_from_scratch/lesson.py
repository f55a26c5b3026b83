# %% [markdown]
# # 12 LoRA from scratch
#
# A network has 22.6 million weights. You have 64 labelled texts. Must all 22.6 million move? LoRA
# freezes them and puts beside some of its matrices a product of two thin ones: 0.17 % of the
# numbers. Here you derive it, build it, put it into two networks, and get from it exactly what the
# well-known library gets. Then two claims are put to the test: that it saves, and that it loses nothing.
#
# **After this lesson you can**
#
# 1. derive the gradients of LoRA, say why $B$ starts at zero and $A$ does not, and what rank and
#    alpha do to a step;
# 2. keep an account of training memory, in bytes, on paper and measured;
# 3. adapt any transformer by the names of its layers, merge the result, and save it so that no head
#    is ever random after a reload.
#
# **You need** lessons 03 (gradients), 06 (full fine-tuning) and 11 (MiniLM and the task). **Time**
# about 90 minutes; the notebook itself runs in under a minute on two cores.
#
# **Expected result.** LoRA of rank 4 trains 0.17 % of the numbers and needs 3.97 times less memory for
# weights, gradients and moments; activations shrink to 69 % only. Its accuracy minus that of full
# fine-tuning is .02 [-.04, .09] at 16 labels per topic: no ranking. The first 16 of 384 directions of full
# fine-tuning's own update give the same answer as all on .97 [.95, .98] of the texts.

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %%
import copy
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers
from torch import nn

# %%
from tlcourse.backbones import Backbone, Preprocess
from tlcourse.comparing import Comparison
from tlcourse.derivatives import finite_differences
from tlcourse.evaluation import mean_interval
from tlcourse.freezing import count_parameters
from tlcourse.locations import data_dir
from tlcourse.lora import LoRAConfig, add_lora, merge_lora
from tlcourse.peft_files import load_adapter, save_adapter

BLUE, ORANGE, GREEN = tl.plots.palette[:3]

# %% [markdown]
# ## Before you run anything
#
# MiniLM has six layers of width 384. Each has a matrix of 384 by 384 for the queries of attention,
# and one for the values. LoRA of rank 4 goes beside those twelve, and a new head on top. Write down:
#
# 1. Full fine-tuning in float32 with AdamW keeps weights, gradients and two moments. By which factor
#    does that memory shrink with LoRA: 1.5, 4, 16, 500? And the memory for activations?
# 2. The product $BA$ starts at zero: $B = 0$, $A$ random. Would $A = 0$ and $B$ random do as well?
#    And both zero? Both random?
# 3. You raise the rank from 4 to 64 and leave alpha and the learning rate. Does the first step
#    change the network more, less, or as much as before?
# 4. You saved $A$ and $B$, load them tomorrow into a fresh MiniLM, and put a head on. How good is it?
# 5. Now fine-tune *all* weights, and look at what was added to a matrix of 384 by 384. Is that sum
#    itself of low rank? How many of its 384 directions hold half of it?
#
# ## The picture

# %% jupyter={"source_hidden": true}
fig, ax = tl.plots.subplots(figsize=(8.5, 3))
blocks = [  # left, bottom, width, height, colour, text
    (0, 0, 384, 384, "lightgrey", "W, frozen\n384 x 384\n147,456 numbers"),
    (560, 0, 16, 384, ORANGE, ""),
    (640, 368, 384, 16, BLUE, ""),
]
for left, bottom, width, height, color, text in blocks:
    ax.add_patch(tl.plots.plt.Rectangle((left, bottom), width, height, fc=color, ec="black", lw=0.8))
    ax.text(left + width / 2, bottom + height / 2, text, ha="center", va="center")
ax.text(465, 190, r"$+\;\frac{\alpha}{r}$", ha="center", va="center", fontsize=18)
ax.text(600, 170, "B: 384 x 16,\nstarts at zero", va="center")
ax.text(640, 330, "A: 16 x 384, starts random", va="center")
ax.text(600, 60, "B and A, rank r = 16: 12,288 numbers", va="center")
ax.set(xlim=(-10, 1060), ylim=(-10, 394), aspect="equal")
ax.axis("off")
words = "To scale: a grey square W, plus alpha over r times a tall thin B and a flat wide A."
tl.plots.alt(fig, words)

# %% [markdown]
# The square stays as it is. Everything that the new task teaches has to go through the thin pair.
# An update $BA$ has rank at most $r$: whatever the input, what is added to the output lies in the
# space of the $r$ columns of $B$.
#
# ## Derivation
#
# One linear layer, one input $x \in \mathbb R^i$, output $h \in \mathbb R^o$. Write $u$ for what is
# between the two thin matrices:
#
# $$h = W x + b + s\,B u, \qquad u = A x \in \mathbb R^r, \qquad s = \frac{\alpha}{r}.$$
#
# $W$ and $b$ are frozen. Let $L$ be the loss and $g = \partial L / \partial h \in \mathbb R^o$ what
# arrives from above. Lesson 03 found the gradients of $A$ and $B$ from the gradient of the whole
# matrix. Here is the direct way, one arrow after the other.
#
# **B.** The entry $B_{jq}$ is felt in $h_j$ only, with slope $s\,u_q$. So
# $\dfrac{\partial L}{\partial B_{jq}} = g_j\, s\, u_q$, that is $\; dB = s\; g\, u^\top$.
#
# **u.** The entry $u_q$ is felt in *every* $h_j$, with slope $s B_{jq}$. Slopes add over paths:
# $\dfrac{\partial L}{\partial u_q} = s \sum_j B_{jq}\, g_j$, that is $\; du = s\, B^\top g$.
#
# **A.** The entry $A_{qk}$ is felt in $u_q$ only, with slope $x_k$. So $\; dA = du\; x^\top = s\, B^\top g\, x^\top$.
#
# **x.** The input is felt on both ways, through $W$ and through $u$. So $\; dx = W^\top g + A^\top du$.
# The layers below need it: the frozen $W$ stays in the backward pass.
#
# With many inputs (each token of each text is one), stacked as rows of $X$, $(n, i)$, and $G$,
# $(n, o)$, the gradients of the weights add up:
#
# $$dB = s\, G^\top (X A^\top), \qquad dA = s\, (G B)^\top X, \qquad dX = G W + s\,(G B) A .$$


# %%
def lora_forward(X, W, b, A, B, s):
    return X @ W.T + b + s * (X @ A.T) @ B.T  # (n, o)


def lora_backward(X, G, W, A, B, s):
    """From G = dL/dH, shape (n, o), to the gradients of A, B and X."""
    U = X @ A.T  # (n, r)
    dU = s * G @ B  # (n, r)
    return {"A": dU.T @ X, "B": s * G.T @ U, "X": G @ W + dU @ A}


# %% [markdown]
# Two referees, in float64: finite differences, and autograd. As loss take $L = \sum_{nj} C_{nj} \sin H_{nj}$
# with random $C$, because then $G = C \cos H$ is not the same everywhere.

# %%
generator = torch.Generator().manual_seed(0)
n, i, o, r, alpha = 5, 7, 6, 3, 6.0
shapes = {"X": (n, i), "W": (o, i), "b": (o,), "A": (r, i), "B": (o, r), "C": (n, o)}
t = {k: torch.randn(v, generator=generator, dtype=torch.float64) for k, v in shapes.items()}


def toy_loss(X, W, b, A, B, C):
    return (C * lora_forward(X, W, b, A, B, alpha / r).sin()).sum()


# %%
for start in ("B = 0", "B not 0"):
    kept = {**t, "B": torch.zeros_like(t["B"]) if start == "B = 0" else t["B"]}
    G = kept["C"] * lora_forward(*(kept[k] for k in "XWbAB"), alpha / r).cos()
    by_hand = lora_backward(kept["X"], G, kept["W"], kept["A"], kept["B"], alpha / r)
    leaves = {k: v.clone().requires_grad_(k in "ABX") for k, v in kept.items()}
    toy_loss(**leaves).backward()
    for name, grad in by_hand.items():
        slopes = finite_differences(lambda kept=kept: toy_loss(**kept), kept[name])
        torch.testing.assert_close(grad, slopes, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(grad, leaves[name].grad, rtol=1e-12, atol=1e-12)
    print(f"{start:8} |dA| {by_hand['A'].norm():6.3f}  |dB| {by_hand['B'].norm():6.3f}  all agree")

# %% [markdown]
# Every derivation above is right, at the start and later. And the first line shows something: with
# $B = 0$ there is no gradient for $A$ at all. Training begins with $B$ alone. One step later $B$ is
# not zero, and $A$ wakes up.
#
# ## The layer


# %%
class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable (alpha / rank) B A."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        bound = 1 / math.sqrt(base.in_features)
        A = base.weight.new_empty(rank, base.in_features).uniform_(-bound, bound)
        self.lora_A = nn.Parameter(A)
        # B starts at zero, so the adapted layer starts as the pre-trained one.
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(self, x):  # (..., i) -> (..., o)
        return self.base(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


# %% [markdown]
# ## Why B starts at zero, and A does not
#
# We want two things of a start. The adapted model should *be* the pre-trained one: $BA = 0$. And it
# should be able to leave: some gradient must not be zero. Go through the four starts with
#
# $$dB = s\, G^\top (X A^\top), \qquad dA = s\, (G B)^\top X :$$
#
# - $A$ random, $B = 0$: $dB$ lives, $dA = 0$ at first.
# - $A = 0$, $B$ random: $dA$ lives, $dB = 0$ at first.
# - both zero: both gradients are zero. No step changes anything, and so it stays for ever.
# - both random: both live, but $BA \ne 0$: the model starts as a damaged one.
#
# Try all four on a small regression: 16 inputs, 12 outputs, and a truth that differs from the
# pre-trained $W$ by a matrix of rank 2.

# %%
torch.manual_seed(1)
plain = nn.Linear(16, 12)
inputs = torch.randn(200, 16)
difference = torch.randn(12, 2) @ torch.randn(2, 16) / 4
truth = (plain(inputs) + inputs @ difference.T).detach()
starts = {"A random, B = 0": (1, 0), "A = 0, B random": (0, 1), "both zero": (0, 0)}
starts["both random"] = (1, 1)


# %%
def train_from(size_A, size_B, rank=2, steps=150):
    """Losses of gradient descent, and the norms of the first dA and dB."""
    torch.manual_seed(2)
    layer, losses, first = LoRALinear(copy.deepcopy(plain), rank, alpha=rank), [], None
    layer.lora_A.data = size_A * torch.randn(rank, 16) / 4
    layer.lora_B.data = size_B * torch.randn(12, rank)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.5)
    for _ in range(steps):
        loss = F.mse_loss(layer(inputs), truth)
        optimizer.zero_grad()
        loss.backward()
        first = first or [layer.lora_A.grad.norm().item(), layer.lora_B.grad.norm().item()]
        optimizer.step()
        losses.append(loss.item())
    return losses, first


# %%
fig, ax = tl.plots.subplots(figsize=(7.5, 3.2))
curves = {}
for (name, sizes), color, style in zip(starts.items(), tl.plots.palette, ["-", "--", ":", "-."]):
    curves[name], (dA, dB) = train_from(*sizes)
    ax.semilogy(curves[name], color=color, ls=style, label=name)
    print(f"{name:16} first |dA| {dA:.3f}, first |dB| {dB:.3f}, loss {curves[name][0]:.3f}", end="")
    print(f" -> {curves[name][-1]:.2g}")
ax.set(xlabel="step of gradient descent", ylabel="squared error")
ax.legend(title="start", loc="lower left")
words = "Both zero is flat; the other three fall; both random starts higher than they do."
tl.plots.alt(ax, words)
assert curves["both zero"][0] == curves["both zero"][-1]
assert curves["both random"][0] > 1.2 * curves["A random, B = 0"][0]
assert max(curves["A random, B = 0"][-1], curves["A = 0, B random"][-1]) < 0.01 * curves["both zero"][0]

# %% [markdown]
# **Guess 2.** Either factor may be the one that is zero. Both zero never moves. Both random learns too,
# but it begins with a loss twice as high: a model that someone pre-trained for weeks, damaged before the
# first step. (Do not compare the speeds here: they depend on how large the random factor is.) The paper
# and the libraries set $B$ to zero. In wide networks that choice stands larger learning rates than the
# other one (Hayou et al. 2024).
#
# ## Rank and alpha: how large is a step?
#
# From $B = 0$, one step of gradient descent with learning rate $\eta$ gives $B = -\eta\, dB$, with
# $dB = s\; dW A^\top$, where $dW = G^\top X$ is the gradient that the whole matrix would get. So
#
# $$\Delta W = s\, B A = -\eta\, s^2\; dW\, A^\top A .$$
#
# The scale enters twice: once when the gradient comes in, once when the product goes out. And $A^\top A$?
# Its entry $(k, l)$ is $\sum_{q=1}^r A_{qk} A_{ql}$. The entries of $A$ are independent, with mean 0
# and variance $\sigma^2$. So the mean of this sum is $r \sigma^2$ if $k = l$, and 0 if not:
#
# $$E[A^\top A] = r \sigma^2 I \quad\Rightarrow\quad E[\Delta W] = s^2\, r\, \sigma^2 \cdot (-\eta\, dW).$$
#
# In the mean it is the step of full fine-tuning, times $c = s^2 r \sigma^2$. Put in the two scales:
#
# | scale | $s$ | $c / \sigma^2 = s^2 r$ | rank up |
# |---|---|---|---|
# | LoRA | $\alpha / r$ | $\alpha^2 / r$ | the step shrinks |
# | rank-stabilised LoRA | $\alpha / \sqrt r$ | $\alpha^2$ | the step stays |
#
# That is the argument of Kalajdzievski (2023) for $\alpha/\sqrt{r}$. Now AdamW. Its first step divides
# each entry of the gradient by its own size, so $B = -\eta \operatorname{sign}(dB)$: the scale enters
# only *once*, on the way out. What is added to an output is $s\,\eta$ times a sum of $r$ terms $\pm u_q$.
# If their signs agree, the sum grows like $r$; if they are independent, like $\sqrt r$. So it should
# lie between
#
# - for $s = \alpha / r$: $r^{-1/2}$ and 1,
# - for $s = \alpha / \sqrt r$: 1 and $r^{1/2}$.
#
# Measure it: one batch of 16 texts through MiniLM, inputs $X$ and gradients $G$ of the twelve query
# and value layers. Everything else follows from these, for each rank, over five random $A$.


# %%
task = tl.load_text_task("doc_routing", labels_per_class=16, seed=0)
minilm = tl.load_backbone("minilm")


def fresh(head_seed=0):
    """MiniLM as it was pre-trained, with a new head; dropout off, so that runs can be compared."""
    torch.manual_seed(head_seed)
    model = tl.Classifier(copy.deepcopy(minilm), task.num_classes).to(run.device)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


# %%
batch, targets = next(iter(task.loaders(minilm.preprocess, batch_size=16).train))
batch = {name: x.to(run.device) for name, x in batch.items()}
targets = targets.to(run.device)


# %%
def watch(model, names):
    """Inputs X and gradients G, each (n, 384), of the layers whose names end so."""
    seen = {}

    def hook(layer, arguments, output, full):
        seen[full] = [arguments[0].detach().flatten(0, 1)]
        output.register_hook(lambda G: seen[full].append(G.flatten(0, 1)))

    for full, layer in model.named_modules():
        if full.endswith(names):
            layer.register_forward_hook(lambda *a, full=full: hook(*a, full))
    F.cross_entropy(model(**batch), targets).backward()
    return seen


# %% [markdown]
# The first backward pass of a fresh model gives all that is needed.

# %%
seen = watch(fresh(), ("query", "value"))
print(len(seen), "layers; tokens in the batch, padding included:", len(next(iter(seen.values()))[0]))


# %%
def first_step(X, G, rank, seed):
    """At scale 1: share c of the full step (SGD), and size of the added output (AdamW, lr 1)."""
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(X.shape[1])
    A = (2 * torch.rand(rank, X.shape[1], generator=generator) - 1).to(X) * bound
    dW = G.T @ X
    dB = dW @ A.T
    share = (dB @ A * dW).sum() / dW.square().sum()  # of dW A^T A along dW
    added = X @ A.T @ dB.sign().T  # (n, o)
    return share.item(), added.norm().item() / math.sqrt(len(X))


# %%
ranks = [1, 2, 4, 8, 16, 32, 64]
sizes = np.array(
    [[[first_step(*x, r, seed) for x in seen.values()] for seed in range(5)] for r in ranks]
).mean(axis=(1, 2))  # (ranks, 2)
alpha, variance, r = 8.0, 1 / (3 * 384), np.array(ranks)
scales = {"alpha / r": alpha / r, "alpha / sqrt(r)": alpha / np.sqrt(r)}

# %%
fig, (left, right) = tl.plots.subplots(1, 2, figsize=(9.5, 3.6))
for (name, s), color, marker in zip(scales.items(), (BLUE, ORANGE), "os"):
    left.loglog(r, s**2 * sizes[:, 0], marker, color=color, label=name)
    left.loglog(r, s**2 * r * variance, color=color, ls="--", lw=1)
    right.loglog(r, s * sizes[:, 1] / (s[0] * sizes[0, 1]), marker + "-", color=color, label=name)
left.set(title="gradient descent", xlabel="rank r", ylabel="share of the full step")
right.set(title="AdamW", xlabel="rank r", ylabel="size of s B A x, rank 1 = 1")
right.set_yticks([0.25, 0.5, 1, 2], ["0.25", "0.5", "1", "2"])
for ax in (left, right):
    ax.set_xticks(ranks, ranks)
    ax.minorticks_off()
    ax.legend(title="scale s")
words = "Left: the share falls like 1/r for alpha/r, stays for alpha/sqrt(r), along the dashed "
tl.plots.alt(fig, words + "formula. Right: with AdamW alpha/r falls slowly, alpha/sqrt(r) rises slowly.")

# %% [markdown]
# How steep are the lines on the right, and how good is the formula on the left?

# %%
slopes = {name: np.polyfit(np.log(r), np.log(s * sizes[:, 1]), 1)[0] for name, s in scales.items()}
print("AdamW: the size goes like r to the power", {k: round(float(v), 2) for k, v in slopes.items()})
by_formula = sizes[:, 0] / (r * variance)
print("gradient descent: measured share / formula:", by_formula.round(2))
assert np.all(np.abs(by_formula[2:] - 1) < 0.35)
assert -0.6 < slopes["alpha / r"] < -0.1 and -0.1 < slopes["alpha / sqrt(r)"] < 0.4

# %% [markdown]
# **Guess 3.** Less, if the scale is $\alpha / r$. Under gradient descent the share of the full step falls
# like $1/r$, on the dashed line of the formula. Under AdamW it falls more slowly. With
# $\alpha / \sqrt r$ the first step hardly depends on the rank. (The formula is about the mean. A single
# random $A$ also adds something at right angles to the full step, the more so the smaller $r$ is.)
#
# What follows for you: $\alpha$ is a second learning rate. Whoever raises the rank, keeps all else
# and sees no gain may only have taken smaller steps. Tune the rate for *each* rank, or hold the step
# with $\alpha/\sqrt r$ (`rank_stabilised=True` in the course's library, `use_rslora=True` in peft). And there is no need to tune $\alpha$ *and* the learning rate.
#
# ## Into a whole network, by name
#
# A transformer has its layers in a tree, and each has a name. So adapting is: freeze all, walk the
# tree, and replace every linear layer whose last name is on a list.


# %%
def inject(model, names, rank, alpha):
    """Freeze a model, put LoRA beside the layers with these names, and train its head in full."""
    model.requires_grad_(False)
    found = [full for full, _ in model.named_modules() if full.rpartition(".")[2] in names]
    for full in found:
        parent, _, child = full.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, child, LoRALinear(getattr(parent, child), rank, alpha).to(run.device))
    model.head.requires_grad_(True)
    return model


# %%
adapted = inject(fresh(), ("query", "value"), rank=4, alpha=8.0)
print(count_parameters(adapted))
print(*[name for name, p in adapted.named_parameters() if p.requires_grad][:4], "...", sep="\n")
with torch.no_grad():
    assert torch.equal(adapted(**batch), fresh()(**batch))  # B = 0: not a bit has changed

# %% [markdown]
# Count it on paper. A matrix of $o \times i$ gets $r\,i + o\,r = r\,(i + o)$ numbers:
# $12 \cdot 4 \cdot (384 + 384) = 36{,}864$. The head has $384 \cdot 4 + 4 = 1{,}540$. Together 38,404.

# %% tags=["nbval-check-output"]
by_formula = 12 * 4 * (384 + 384) + 384 * 4 + 4
print(by_formula, count_parameters(adapted).trainable)
assert by_formula == count_parameters(adapted).trainable

# %% [markdown]
# ## The account of memory
#
# Let $P$ be the number of weights and $T$ the number that is trained. In float32 a number takes
# 4 bytes. AdamW keeps, for each *trained* number, its gradient and two moments:
#
# | | full fine-tuning | LoRA |
# |---|---|---|
# | weights | $4P$ | $4\,(P + T_{AB})$ |
# | gradients | $4P$ | $4T$ |
# | two moments | $8P$ | $8T$ |
# | together | $16P$ | $4P + 4T_{AB} + 12T$ |
#
# ($T_{AB}$ are the numbers in $A$ and $B$; $T$ includes the head.) With $T \ll P$ the factor goes to
# $16P / 4P = 4$, and **never beyond, however small the rank**: the frozen weights are still there. To
# win more, the frozen weights must become smaller themselves: 2 bytes in half precision, or half a byte
# (lesson 16).
#
# And the activations, which are kept for the backward pass? Some need not be kept: the gradient of a
# frozen $W$ is not asked for, so its input is not needed. But the gradient still travels through every
# layer, and softmax, normalisation and GELU need what they saw. So there will be a saving, but a modest
# one. Count all of it, from the tensors themselves, after one real step. Autograd tells what it keeps.


# %%
def num_bytes(tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


def kept_by_autograd(model):
    """Bytes of activations that the forward pass keeps for the backward pass, and the loss."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = F.cross_entropy(model(**batch), targets)
    return sum(size for place, size in kept.items() if place not in own), loss


# %% [markdown]
# One step of AdamW, and then every tensor is asked for its size.

# %%
def memory_of_a_step(model):
    """Bytes by kind, counted from the tensors after one step of AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    activations, loss = kept_by_autograd(model)
    loss.backward()
    optimizer.step()
    moments = [x for s in optimizer.state.values() for x in s.values() if x.ndim > 0]
    return {
        "weights": num_bytes(model.parameters()),
        "gradients": num_bytes(p.grad for p in trained),
        "moments": num_bytes(moments),
        "activations": activations,
    }


# %%
def head_only():
    model = fresh().requires_grad_(False)
    model.head.requires_grad_(True)
    return model


# %%
models = {
    "full fine-tuning": fresh,
    "LoRA, r = 64": lambda: inject(fresh(), ("query", "value"), 64, 8.0),
    "LoRA, r = 4": lambda: inject(fresh(), ("query", "value"), 4, 8.0),
    "head only": head_only,
}
account = {name: memory_of_a_step(build().eval()) for name, build in models.items()}
print("MB".ljust(18) + "".join(f"{kind:>13}" for kind in account["head only"]))
for name, bytes_of in account.items():
    print(f"{name:18}" + "".join(f"{size / 1e6:13.2f}" for size in bytes_of.values()))

# %% [markdown]
# Do the measured bytes agree with the account on paper, number for number?

# %%
P, T_AB, T_head = count_parameters(fresh()).total, 12 * 4 * (384 + 384), 384 * 4 + 4
T = T_AB + T_head


def without_activations(name):
    return sum(account[name].values()) - account[name]["activations"]


assert without_activations("full fine-tuning") == 16 * P
assert without_activations("LoRA, r = 4") == 4 * P + 4 * T_AB + 12 * T
saving = without_activations("full fine-tuning") / without_activations("LoRA, r = 4")
left = account["LoRA, r = 4"]["activations"] / account["full fine-tuning"]["activations"]
print(f"weights, gradients, moments: {saving:.2f} times less; activations: {left:.0%} are left")
assert 3.9 < saving < 4 and 0.3 < left < 0.95

# %%
fig, ax = tl.plots.subplots(figsize=(8.5, 2.9))
start = np.zeros(len(account))
for kind, color in zip(account["head only"], tl.plots.palette):
    length = np.array([bytes_of[kind] for bytes_of in account.values()]) / 1e6
    ax.barh(list(account), length, left=start, color=color, label=kind)
    start += length
ax.set(xlabel="MB in a training step, 16 texts, float32")
ax.invert_yaxis()
ax.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1.0))
tl.plots.alt(fig, f"Stacked bars; in all {dict(zip(account, start.round().tolist()))} MB.")

# %% [markdown]
# **Guess 1.** Both formulas fit to the byte. Weights, gradients and moments shrink by nearly 4. The
# rank hardly matters for memory: rank 64 costs a few MB more than rank 4. Activations shrink much less,
# and they grow with the batch and with the length of the texts, where weights do not. With long
# texts they are the larger part, and then LoRA saves a third of the whole, not three quarters. (The head alone keeps next to nothing: no
# gradient has to travel.)
#
# What LoRA saves beyond doubt is **storage per task**: 38,404 numbers, 154 kB, against 90 MB. A
# hundred tasks share one MiniLM.
#
# ## The library, and peft: the same to 1e-6
#
# The course's library has the same layer, and `add_lora` for the injection. The best-known library
# for this is Hugging Face **peft**. Put the same $A$ and $B$ into all of them; outputs and gradients
# must agree. $B$ is made random first: at $B = 0$ the comparison would say nothing about $A$.

# %%
config = LoRAConfig(rank=4, alpha=8.0, target_modules=("query", "value"))  # and the head in full
theirs_config = peft.LoraConfig(
    r=4, lora_alpha=8, target_modules=["query", "value"], modules_to_save=["head"]
)


# %%
def trained_parts(model):
    """What is trained, by one name for all three libraries."""
    extra = ("base_model.model.", ".default", ".modules_to_save", ".weight")
    parts = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            short = name
            for word in extra if "lora" in name else extra[:3]:
                short = short.replace(word, "")
            parts[short] = parameter
    return parts


# %%
def three_ways(build, names, shake=0.02):
    """From scratch, tlcourse and peft on equal models, with equal A and B, B not zero."""
    models = {
        "from scratch": inject(build(), names, 4, 8.0),
        "tlcourse": add_lora(build(), replace(config, target_modules=names)),
        "peft": peft.get_peft_model(build(), replace(theirs_config, target_modules=list(names))),
    }
    parts = {name: trained_parts(model) for name, model in models.items()}
    for short, parameter in parts["from scratch"].items():
        if "lora_B" in short:
            nn.init.normal_(parameter, std=shake)
        for other in parts.values():
            other[short].data.copy_(parameter.data)
    return models, parts


# %%
def largest_gaps(models, parts, inputs, targets):
    """Largest difference from the model from scratch: of the logits, and of the gradients."""
    logits = {}
    for name, model in models.items():
        logits[name] = model.eval()(**inputs)
        F.cross_entropy(logits[name], targets).backward()
    ours = parts["from scratch"]
    smallest = min(parameter.grad.abs().max().item() for parameter in ours.values())
    print(f"no gradient is zero: the largest entry of each tensor is at least {smallest:.0e}")
    for name in ("tlcourse", "peft"):
        assert parts[name].keys() == ours.keys()
        gap = (logits[name] - logits["from scratch"]).abs().max().item()
        slopes = max((parts[name][k].grad - ours[k].grad).abs().max().item() for k in ours)
        print(f"{name:9} differs by: logits {gap:.1e}, gradients {slopes:.1e}, of {len(ours)} tensors")
        assert max(gap, slopes) < {"cpu": 1e-6, "cuda": 1e-4}[run.device.type]


# %%
models, parts = three_ways(fresh, ("query", "value"))
largest_gaps(models, parts, batch, targets)

# %% [markdown]
# ### A vision transformer
#
# Nothing in this was about text. Build a small vision transformer: images of 32 by 32 are cut into 16
# patches, and patches are treated like words. First look what its layers are called.


# %%
def small_vit():
    torch.manual_seed(5)
    options = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=128,
    )
    body = transformers.ViTModel(options, add_pooling_layer=False)
    first_token = lambda output: output.last_hidden_state[:, 0]  # noqa: E731
    model = tl.Classifier(Backbone(body, "small_vit", 64, Preprocess(32), first_token), 10)
    return model.to(run.device)


# %%
linear = [n for n, m in small_vit().named_modules() if isinstance(m, nn.Linear)]
print(*linear[:7], sep="\n")
try:
    add_lora(small_vit(), LoRAConfig(target_modules=("queri", "value")))
except ValueError as error:
    print("\nValueError:", error)

# %% [markdown]
# The names depend on the model, and on the version of the library. A wrong name is an error that
# lists the right ones: a name that silently matched nothing would train the head alone.

# %%
query = next(n for n in ("q_proj", "query") if any(name.endswith(n) for name in linear))
value = {"q_proj": "v_proj", "query": "value"}[query]
images = tl.load_task("wild_digits", labels_per_class=2).train
pictures, labels = images.inputs[:16].to(run.device), images.targets[:16].to(run.device)
models, parts = three_ways(small_vit, (query, value))
largest_gaps(models, parts, {"images": pictures}, labels)

# %% [markdown]
# ## The same fine-tuning, in peft's own words
#
# From here on you would use a library. A few steps with ours, and the same in peft: start from the same
# $A$, the same head, the same batches. The training loop does not care which library the layers came
# from.

# %%
num_steps = {"tiny": 8, "full": 60}[run.profile]
settings = tl.TrainConfig(lr=1e-3, head_lr=3e-3, num_steps=num_steps, progress=False, precision="fp32")

ours = add_lora(fresh(), config)
theirs = peft.get_peft_model(fresh(), theirs_config)
theirs.print_trainable_parameters()
for short, parameter in trained_parts(ours).items():
    trained_parts(theirs)[short].data.copy_(parameter.data)


# %%
histories = {}
for name, model in {"tlcourse": ours, "peft": theirs}.items():
    loaders = task.loaders(minilm.preprocess, batch_size=16, seed=0)
    histories[name] = tl.fit(model, loaders.train, None, settings).train_loss
    print(f"{name:9}", np.round(histories[name], 4))
gap = np.abs(np.subtract(*histories.values())).max()
assert gap < 1e-3 and histories["peft"][-1] < histories["peft"][0]

# %% [markdown]
# One thing would differ if we had not set dropout to zero in `fresh()`: `add_lora` switches the dropout
# inside the *frozen* part off, peft leaves it on in training. Both are done; it is a thing to know when
# two curves do not match.
#
# ## Merge
#
# After training the thin branch is not needed any more. $Wx + sBAx = (W + sBA)\,x$: add it to the
# frozen weight, and the layer is a plain one again. No extra products, no extra memory, the same
# names of the weights as before.


# %%
def merge(layer):
    """The plain layer that does what a LoRALinear does."""
    plain = copy.deepcopy(layer.base)
    plain.weight.data += layer.scale * (layer.lora_B @ layer.lora_A).data
    return plain


# %%
by_hand = next(m for m in models["from scratch"].modules() if isinstance(m, LoRALinear))
merged = merge_lora(copy.deepcopy(ours)).eval()
with torch.no_grad():
    y = torch.randn(16, by_hand.base.in_features, device=run.device)
    one_layer = (merge(by_hand)(y) - by_hand(y)).abs().max().item()
    whole = (merged(**batch) - ours.eval()(**batch)).abs().max().item()
print(f"largest difference: one layer by hand {one_layer:.1e}, the whole model {whole:.1e}")
assert merged.state_dict().keys() == fresh().state_dict().keys()
assert count_parameters(merged).total == count_parameters(fresh()).total
assert max(one_layer, whole) < {"cpu": 1e-4, "cuda": 1e-2}[run.device.type]

# %% [markdown]
# Equal, up to rounding: the sum is taken in another order. Going back is less innocent. Subtract what
# you added, in float32, and look at the bits. The library does not subtract: while merged it keeps the
# old weight aside, and puts that back.

# %%
layer = ours.backbone.body.encoder.layer[3].attention.self.query
W = layer.base.weight.detach().clone()
D = (layer.config.scale * layer.lora_B @ layer.lora_A).detach()
there_and_back = (W + D) - D
layer.merge()
layer.unmerge()
print(f"subtracting: {(there_and_back != W).float().mean():.0%} of the entries have other bits,")
print(f"  by at most {(there_and_back - W).abs().max():.1e}")
print("the library:", torch.equal(layer.base.weight, W), "(the same bits)")
assert torch.equal(layer.base.weight, W) and not torch.equal(there_and_back, W)

# %% [markdown]
# Those are rounding errors of float32, harmless once, a drift if adapters are swapped a thousand times.
# In **bfloat16** it is another matter. It keeps 8 binary digits, so a change of less than about one
# part in 500 of an entry is rounded away. Before you look: what share of the entries of $W$ does the
# merge of this adapter change at all?

# %%
low = W.bfloat16()
low_merged = (low.float() + D).bfloat16()
kept = low_merged.float() - low.float()  # what arrives of the update
lost = ((kept - D).norm() / D.norm()).item()
print(f"changed: {(low_merged != low).float().mean():.0%} of the entries")
print(f"size of D against W: {(D.norm() / W.norm()).item():.1e}; error of what arrives: {lost:.0%}")
assert lost > 0.02

# %% [markdown]
# A short fine-tuning makes small updates, and they fall between two numbers of bfloat16. Nearly half of the
# entries do not move at all, and the others move by the wrong amount: what arrives is off by about half
# of the update's own size. The roundings go up as often as down, so the model may survive. But test the
# *merged* model, or leave the pair beside the weight.
#
# ## The head, or what the file does not hold
#
# $A$ and $B$ are not all that was trained. The head is new and was trained in full: 1,540 numbers that
# are in no pre-trained checkpoint. A common accident: save what has "lora" in its name, load it into a
# fresh model with `strict=False` (because, of course, most keys are missing), and get no error.

# %%
only_lora = {name: x for name, x in ours.state_dict().items() if "lora_" in name}
reloaded = add_lora(fresh(head_seed=7), config)
reloaded.load_state_dict(only_lora, strict=False)  # no complaint

val = task.loaders(minilm.preprocess).val
with torch.no_grad():
    features = torch.cat([ours.backbone(**{k: v.to(run.device) for k, v in x.items()}) for x, _ in val])
    answers = ours.head(features).argmax(dim=1)
    heads = [nn.Linear(384, 4).to(run.device) for _ in range(50)]
    same = [(head(features).argmax(dim=1) == answers).float().mean().item() for head in heads]
print(f"same answer as the trained model: {np.mean(same):.0%} of the texts, mean over 50 fresh heads")
assert np.mean(same) < 0.5

# %% [markdown]
# **Guess 4.** As good as a guess among four. The features are the adapted ones; the head is random
# *again*, and nothing said so. Two rules make the accident impossible, and the library has both: what is
# trained in full is named in the settings (`modules_to_save`, by default `("head",)`), and saving
# **refuses** if a trainable parameter would not be in the files.

# %%
forgetful = add_lora(fresh(), LoRAConfig(rank=4, alpha=8.0, modules_to_save=()))
forgetful.head.requires_grad_(True)
kept_here = tempfile.TemporaryDirectory()
folder = Path(kept_here.name)
try:
    save_adapter(forgetful, folder / "forgetful")
except ValueError as error:
    print("ValueError:", error)
assert not (folder / "forgetful").exists()

# %% [markdown]
# With the head named, the files are those of peft. It loads ours, and we load its own. Each time into a
# fresh MiniLM with *another* random head, so that a head that was not loaded would show.

# %%
save_adapter(ours, folder / "ours")
for path in sorted((folder / "ours").iterdir()):
    print(f"{path.name:28} {path.stat().st_size / 1000:8.1f} kB")
read_by_peft = peft.PeftModel.from_pretrained(fresh(head_seed=8), folder / "ours").eval()
theirs.save_pretrained(folder / "theirs")
read_by_us = load_adapter(fresh(head_seed=9), folder / "theirs")
with torch.no_grad():
    assert torch.equal(read_by_peft(**batch), ours.eval()(**batch))
    assert torch.equal(read_by_us(**batch), theirs.eval()(**batch))
print("identical logits, both ways, head included")

# %% [markdown]
# ## The experiment: does LoRA lose anything?
#
# Sixteen labels per topic, four topics, MiniLM. Five arms: logistic regression on frozen features
# (head only), LoRA of rank 1, 4 and 16, and full fine-tuning. Each fine-tuning has 30 steps of 16 texts.
# The rate of each arm was chosen from two on the validation texts of an extra draw. Then five other
# draws of the labels, the same for all arms, and the test texts, once. LoRA used $\alpha / \sqrt r$, so
# that one grid of rates is fair to all ranks. It takes some minutes, so it was run in advance:
#
# ```
# python benchmarks/low_rank.py
# ```
#
# What you ran above was its short form. Before you look: which arm is best, and by how much?

# %%
recorded = json.loads((data_dir() / "results" / "low_rank.json").read_text("utf-8"))
comparison = Comparison(recorded["scores"])
print(comparison.table(reference="full fine-tuning"))
print("\nchosen rates:", recorded["lr"])

# %%
ax = tl.plots.plot_comparison(comparison, "test accuracy, 200 texts")
means = {arm: round(comparison.interval(arm).mean, 2) for arm in comparison.scores}
tl.plots.alt(ax, f"Means of five draws with intervals that overlap: {means}.")

# %%
pairs = [(arm, "full fine-tuning") for arm in list(comparison.scores)[:-1]]
pairs += [("LoRA, r = 4", "LoRA, r = 1"), ("LoRA, r = 16", "LoRA, r = 1")]
pairs += [("LoRA, r = 4", "head only")]
gaps = {f"{a} minus {b}": comparison.difference(a, b) for a, b in pairs}
for name, gap in gaps.items():
    print(f"{name:34} {gap}")
assert all(abs(gap.mean) < 0.08 for gap in gaps.values())
assert all(gap.low < 0.03 and gap.high > -0.03 for gap in gaps.values())

# %% [markdown]
# **A null, plainly.** All seven intervals hold 0, one of them only just. With 64 labelled texts, rank 1, 4 or 16, all weights, or
# none but the head: these data do not say which is better. Nor do they say that they are equal. The
# widest intervals reach from about -.06 to .11, so a true difference of some points may well hide in
# there. (LoRA of rank 16 comes closest to a difference. Among seven comparisons one near miss is no
# surprise. And two arms, rank 16 and full fine-tuning, chose the larger of their two rates, so a wider grid
# might lift them.)
#
# What may be claimed was counted, not estimated: 38,404 numbers trained in place of 22.6 million, a factor
# of 3.97 in weights, gradients and moments, 157 kB for each task instead of 90 MB. And the head alone,
# which costs even less, does as well *here*: with so few labels try that first (lesson 05). Lesson 17 sets
# all methods side by side.
#
# ## Is the update of full fine-tuning of low rank?
#
# LoRA bets that the change a task needs is of low rank. Full fine-tuning makes no such bet. So take
# what it did, $\Delta W = W_{\text{after}} - W_{\text{before}}$, apart by singular values:
#
# $$\Delta W = \sum_{k=1}^{384} \sigma_k\, u_k v_k^\top, \qquad \sigma_1 \ge \sigma_2 \ge \dots \ge 0 .$$
#
# $\sum_k \sigma_k^2$ is the sum of the squares of all entries, and the best matrix of rank $r$ keeps
# exactly the first $r$ terms (Eckart and Young 1936). So the share of the first $r$ squares says how
# much a rank $r$ could have kept. The control is a random matrix with independent entries: it, too, has a
# first singular value that is larger than its last.

# %%
noise = torch.linalg.svdvals(torch.randn(384, 384, generator=torch.Generator().manual_seed(0)))
spectra = {"random matrix": (noise / noise.norm()).numpy()}
for kind in ("query", "value"):
    spectra[kind] = np.mean([update["spectra"][kind] for update in recorded["updates"]], axis=0)

# %%
fig, (left, right) = tl.plots.subplots(1, 2, figsize=(9.5, 3.5))
for (name, sigma), color, style in zip(spectra.items(), ("black", BLUE, ORANGE), (":", "-", "--")):
    left.loglog(np.arange(1, 385), sigma, color=color, ls=style, label=name)
    kept = np.cumsum(sigma**2) / np.sum(sigma**2)
    right.semilogx(np.arange(1, 385), kept, color=color, ls=style, label=name)
left.set(xlabel="number k", ylabel="singular value / norm", ylim=(1e-4, 1))
right.set(xlabel="rank r", ylabel="share of the squares kept", ylim=(0, 1))
for ax in (left, right):
    ax.set_xticks([1, 4, 16, 64, 384], [1, 4, 16, 64, 384])
    ax.minorticks_off()
left.legend()
words = "Left: singular values fall steeply for updates, slowly for noise. Right: shares kept by rank."
tl.plots.alt(fig, words)

# %%
half = {name: int(np.searchsorted(np.cumsum(v**2) / np.sum(v**2), 0.5)) + 1 for name, v in spectra.items()}
print("directions that hold half of the squares:", half)
assert 10 * half["value"] < half["random matrix"] and 5 * half["query"] < half["random matrix"]


# %% [markdown]
# That was a mean over matrices. Each kind of matrix by itself, with intervals over the draws:

# %%
def shares(part, rank):
    """For each draw: mean share of the squares that the first singular values hold."""
    column = recorded["settings"]["shares"].index(rank)
    return [
        np.mean([m["shares"][column] for name, m in update["matrices"].items() if part in name])
        for update in recorded["updates"]
    ]


# %%
kinds = {"query": "query", "key": "key", "value": "value", "attention output": "attention.output"}
kinds |= {"feed-forward, in": "intermediate", "all 36 matrices": ""}
print("share of the squares in".ljust(24) + "".join(f"{f'first {k}':>24}" for k in (1, 4, 16, 64)))
for name, part in kinds.items():
    print(f"{name:24}" + "".join(f"{mean_interval(shares(part, k))!s:>24}" for k in (1, 4, 16, 64)))
of_noise = [(noise[:k] ** 2).sum().item() / (noise**2).sum().item() for k in (1, 4, 16, 64)]
print("random matrix".ljust(24) + "".join(f"{share:24.3f}" for share in of_noise))

# %% [markdown]
# **Guess 5.** A handful of directions holds half: 5 of 384 in the value matrices, 9 in those for queries,
# against 70 in a random matrix. So the updates are far from random. But they are not of low rank in the
# strict sense: over all 36 matrices the first 4 directions hold .43 of the squares and the first 16 .66,
# and even 64 leave .13 behind. "The update is of low rank" is too strong; "a few directions stand out" is
# what we find. (Part of it may be the small data: each step adds up gradients of 16 texts only. With more
# texts the picture may change; this was not measured.)
#
# The share of squares is a statement about numbers. What about the *function*? Put the first $r$ terms of
# each update back on the pre-trained weights, in all 36 matrices of the encoder, and leave the rest of
# the model fine-tuned (head, biases, normalisation, embeddings). Does it still say what the whole update
# says? As a control keep 16 *random* directions of each update.

# %%
cuts = {"none": "0", "first 1": "1", "first 4": "4", "first 16": "16", "random 16": "random"}
print("kept of each update   test accuracy             same answer as the whole")
kept_accuracy, kept_same = {}, {}
for name, key in cuts.items():
    kept_accuracy[name] = mean_interval([u["cut"][key]["accuracy"] for u in recorded["updates"]])
    kept_same[name] = mean_interval([u["cut"][key]["same"] for u in recorded["updates"]])
    print(f"{name:21} {kept_accuracy[name]!s:25} {kept_same[name]}")
print(f"{'all 384':21} {comparison.interval('full fine-tuning')}")
same_16, same_random = ([u["cut"][k]["same"] for u in recorded["updates"]] for k in ("16", "random"))
better = mean_interval(np.subtract(same_16, same_random))
print("\nsame answer, first 16 minus random 16:", better)
assert kept_same["first 16"].low > 0.9 and better.low > 0.1
assert abs(kept_accuracy["first 4"].mean - comparison.interval("full fine-tuning").mean) < 0.06

# %% [markdown]
# That is the stronger evidence for LoRA's bet. Sixteen directions hold two thirds of the squares and nearly
# all of the function: the same answer on .97 of the texts. Four give the same accuracy as all, give or take
# some points. Sixteen *random* directions are worth hardly more than none. The rest of the update, most of its
# directions and a third of its squares, does next to nothing on these texts. (With *no* direction there
# is still a changed head, which was trained for features that are now gone: hence the .60.)
#
# Mind what was *not* shown. The best 16 directions were found after full fine-tuning; LoRA has to find
# its own, from a random $A$. And Aghajanyan et al. (2020) ask a related but other question: in how few random
# directions of *all* weights together a task can be learned.
#
# ## Where it fails
#
# **When the change is not of low rank.** Eckart and Young give the floor: whatever the training does, a
# rank $r$ leaves at least $\sum_{k > r} \sigma_k^2$ of the change undone. Two layers of width 32 have to
# learn a given change $\Delta^*$ of the same size. One change has singular values that fall fast, the
# other has all 32 alike. Train LoRA on both, to the end, and compare with the floor.

# %%
generator = torch.Generator().manual_seed(0)
U, V = (torch.linalg.qr(torch.randn(32, 32, generator=generator))[0] for _ in range(2))
changes = {"falling": 2.0 ** -torch.arange(32), "flat": torch.ones(32)}
changes = {name: sigma / sigma.norm() for name, sigma in changes.items()}


# %%
def left_undone(sigma, rank, steps=400):
    """Squared distance from the change, of size 1, after training a LoRA of this rank."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(32, 32, bias=False), rank, alpha=rank)
    layer.base.weight.data.zero_()
    target = U @ sigma.diag() @ V.T
    optimizer = torch.optim.Adam([layer.lora_A, layer.lora_B], lr=0.02)
    for _ in range(steps):
        loss = (layer(torch.eye(32)).T - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


# %%
some_ranks = [1, 2, 4, 8, 16, 32]
fig, ax = tl.plots.subplots(figsize=(7.5, 3.2))
for (name, sigma), color, marker in zip(changes.items(), (BLUE, ORANGE), "os"):
    floor = [sigma[rank:].square().sum().item() for rank in some_ranks]
    trained = [left_undone(sigma, rank) for rank in some_ranks]
    ax.semilogx(some_ranks, floor, color=color, ls="--", lw=1)
    ax.semilogx(some_ranks, trained, marker, color=color, ls="", label=f"{name} spectrum")
    assert all(f - 1e-3 < t < f + 0.1 for f, t in zip(floor, trained))
ax.set(xlabel="rank r", ylabel="share of the change left undone", ylim=(-0.03, 1))
ax.set_xticks(some_ranks, some_ranks)
ax.minorticks_off()
ax.legend(title="dots: trained; dashed: floor")
words = "Falling spectrum: near 0 from rank 4 on. Flat: a straight share, 1 - r / 32, to the end."
tl.plots.alt(ax, words)

# %% [markdown]
# On the flat change a rank of 4 does an eighth, and no learning rate helps. Much new
# material (code or mathematics, in millions of examples) can be like that: there full fine-tuning was
# measured to learn more, with updates of higher rank (Biderman et al. 2024).
#
# **When time is what you lack.** Lesson 03 counted: the gradient travels through every frozen matrix, so
# about two thirds of a full step remain.
#
# **When activations fill the memory.** Long inputs and large batches: see the account above.
#
# **When rank, alpha and rate are mixed up.** A comparison of ranks at one learning rate compares step
# sizes.
#
# ## Explorer: rank and alpha
#
# What do rank and alpha cost, how large is the first step under AdamW (as measured above), and how much
# of full fine-tuning's own update of a value matrix could a rank have held (as recorded)?

# %%
matrices = {"query, value": (12, 12 * 768), "all in the encoder": (36, 24 * 768 + 12 * 1920)}


# %% jupyter={"source_hidden": true}
def draw(rank, alpha, adapt, scale):
    count, per_rank = matrices[adapt]
    T_AB = rank * per_rank
    parts = {"weights": 4 * (P + T_AB), "gradients": 4 * (T_AB + 1540), "moments": 8 * (T_AB + 1540)}
    s = alpha / (rank if scale == "alpha / r" else math.sqrt(rank))
    size = s * np.interp(math.log(rank), np.log(ranks), sizes[:, 1]) / sizes[2, 1] / 2
    fig, (left, right) = tl.plots.subplots(1, 2, figsize=(9.5, 3.0), width_ratios=(2, 3))
    left.bar(list(parts), [b / 1e6 for b in parts.values()], color=tl.plots.palette[:3])
    left.set(ylabel="MB without activations", ylim=(0, 370))
    left.axhline(16 * P / 1e6, color="black", ls="--", lw=1)
    left.set_title(f"{T_AB + 1540:,} numbers trained, {sum(parts.values()) / 1e6:.1f} MB", fontsize=10)
    held = np.cumsum(spectra["value"] ** 2) / np.sum(spectra["value"] ** 2)
    right.semilogx(np.arange(1, 385), held, color=ORANGE, ls="-")
    right.plot(rank, held[rank - 1], "o", color=BLUE)
    right.set(xlabel="rank", ylabel="share of a full update held", ylim=(0, 1))
    right.set_xticks([1, 4, 16, 64, 384], [1, 4, 16, 64, 384])
    right.minorticks_off()
    right.set_title(f"scale {s:.2f}; first AdamW step {size:.2f} (rank 4, alpha 8: 1)", fontsize=10)
    words = f"{count} matrices, rank {rank}: {sum(parts.values()) / 1e6:.1f} MB, full 361 (dashed)."
    tl.plots.alt(fig, words)


# %%
tl.widgets.explore(
    draw,
    rank=tl.widgets.choice(ranks, value=4, drag=True),
    alpha=tl.widgets.slider(1, 32, value=8),
    adapt=tl.widgets.choice(list(matrices)),
    scale=tl.widgets.choice(["alpha / r", "alpha / sqrt(r)"]),
)

# %% [markdown]
# ## Quiz

# %%
tl.quiz("12")

# %% [markdown]
# ## Exercise
#
# [LoRA from scratch: the exercise](../exercises/12_lora_from_scratch.ipynb) asks for the account in
# bytes, the way back through a layer, the best pair of a given rank, and a guard against lost heads; at
# the end you judge a report.
#
# ## Papers
#
# - Hu et al. 2021, *LoRA: low-rank adaptation of large language models*, section 4.1 (the method),
#   section 7 (which rank, and what the update looks like), arXiv:2106.09685.
# - Aghajanyan, Zettlemoyer and Gupta 2020, *Intrinsic dimensionality explains the effectiveness of
#   language model fine-tuning*, section 3, arXiv:2012.13255.
# - Kalajdzievski 2023, *A rank stabilization scaling factor for fine-tuning with LoRA*, section 3,
#   arXiv:2312.03732.
# - Hayou, Ghosh and Yu 2024, *The impact of initialization on LoRA finetuning dynamics*,
#   arXiv:2406.08447.
# - Biderman et al. 2024, *LoRA learns less and forgets less*, arXiv:2405.09673.
# - Eckart and Young 1936, *The approximation of one matrix by another of lower rank*, Psychometrika 1.
#
# ## Glossary
#
# | term | meaning | Chinese |
# |---|---|---|
# | parameter-efficient fine-tuning | training few numbers beside a frozen network | 参数高效微调 |
# | low-rank adaptation (LoRA) | a frozen matrix plus a thin trainable product | 低秩适配 |
# | rank | number of directions that a matrix can answer with | 秩 |
# | scale alpha / r | what the product is multiplied by | 缩放系数 |
# | rank-stabilised LoRA | scale alpha / sqrt(r) | 秩稳定 LoRA |
# | to merge | add the product to the frozen weight | 合并（权重） |
# | optimizer state, moments | what AdamW keeps for each trained number | 优化器状态，动量 |
# | activations | what the forward pass keeps for the backward pass | 激活值 |
# | singular values | strengths of the directions of a matrix | 奇异值 |
# | intrinsic dimension | in how few directions a task can be learned | 内在维度 |
