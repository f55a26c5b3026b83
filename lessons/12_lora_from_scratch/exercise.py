# %% [markdown]
# # Exercise 12: LoRA from scratch
#
# You keep the account of memory before anything is bought, write the way back through an adapted layer,
# find the best pair of a given rank, and build the guard that no trained number gets past. Then
# somebody reports a great success, and you decide what the report is worth.
#
# | question | | points |
# |---|---|---|
# | 1 | the account in bytes | 3 |
# | 2 | the way back through an adapted layer | 4 |
# | 3 | the best pair of a given rank | 4 |
# | 4 | what would be lost? | 3 |
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
# ## Question 1. The account in bytes (3 points)
#
# A model has `num_weights` numbers without its head, stored in `weight_bytes` bytes each and frozen. LoRA
# of one rank goes beside some matrices; a new head is trained in full. $A$, $B$ and the head are
# float32, 4 bytes, and so are their gradients and the *two* moments of AdamW. Return the bytes of
# weights (all of them), gradients and moments.


# %% question="12.q1"
def lora_bytes(num_weights, weight_bytes, shapes, rank, head):
    """Memory of LoRA in training, without activations.

    Args:
        num_weights: of the frozen model, the adapted matrices included, the head not.
        weight_bytes: of one frozen number: 4, 2 or 0.5.
        shapes: a row (outputs, inputs) for each adapted matrix, whole numbers, shape (M, 2).
        rank: of every pair.
        head: (classes, features); the head has a weight for each pair of them, and biases.

    Returns:
        dict with "weights", "gradients" and "moments", in bytes.
    """
    ### BEGIN SOLUTION
    classes, features = head
    thin = rank * np.sum(shapes)  # A is (rank, inputs), B is (outputs, rank)
    trained = thin + classes * features + classes
    return {
        "weights": weight_bytes * num_weights + 4 * trained,
        "gradients": 4 * trained,
        "moments": 8 * trained,
    }
    ### END SOLUTION


# %% check="12.q1"
right_1 = tl.check("12.q1", lora_bytes)

# %% [markdown]
# When it is right: a model of 6.7 billion numbers, 32 layers of width 4,096, LoRA of rank 16 beside
# queries and values. How much of a GPU of 24 GB is left for activations?

# %%
if right_1:
    for name, size in {"float32": 4, "bfloat16": 2, "4 bits": 0.5}.items():
        account = lora_bytes(6_700_000_000, size, np.full((64, 2), 4096), 16, (2, 4096))
        print(f"{name:9}" + "".join(f"{k} {v / 1e9:6.2f} GB   " for k, v in account.items()))
    print(f"full fine-tuning, float32: {16 * 6.7:.0f} GB")

# %% [markdown]
# ## Question 2. The way back through an adapted layer (4 points)
#
# $H = X W^\top + s\,(X A^\top) B^\top$, with $s = \alpha / r$, or $s = \alpha/\sqrt r$ if `rank_stabilised`.
# You are given $G = \partial L / \partial H$. Here the layer sits in a transformer, so $X$ and $G$ have
# **three** axes: texts, tokens, features. Return the gradients of $A$, $B$ and of $X$: the layers below
# need that one. (The $1/n$ of the loss is in $G$ already.)


# %% question="12.q2"
def lora_backward(X, G, W, A, B, alpha, rank_stabilised):
    """Gradients of a LoRA layer.

    Hu et al. 2021, section 4.1, arXiv:2106.09685.

    Args:
        X: inputs, shape (texts, tokens, i).
        G: gradient of the loss with respect to the outputs, shape (texts, tokens, o).
        W: frozen weight, shape (o, i).
        A: shape (r, i).
        B: shape (o, r).
        alpha: > 0.
        rank_stabilised: True for the scale alpha / sqrt(r), else alpha / r.

    Returns:
        dict with "A", "B" and "X", each in the shape of what it is the gradient of.
    """
    ### BEGIN SOLUTION
    rank = len(A)
    scale = alpha / (np.sqrt(rank) if rank_stabilised else rank)
    rows, arriving = X.reshape(-1, X.shape[-1]), G.reshape(-1, G.shape[-1])  # every token a row
    dU = scale * G @ B  # (texts, tokens, r)
    return {
        "A": dU.reshape(-1, rank).T @ rows,
        "B": scale * arriving.T @ (rows @ A.T),
        "X": G @ W + dU @ A,
    }
    ### END SOLUTION


# %% check="12.q2"
right_2 = tl.check("12.q2", lora_backward)

# %% [markdown]
# When it is right: your gradients against those of Hugging Face peft, on a layer of its own.

# %%
if right_2:
    import peft

    base = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=8, target_modules=["0"]))
    layer = model.base_model.model[0]
    A, B = (getattr(layer, f"lora_{name}")["default"].weight for name in "AB")
    torch.nn.init.normal_(B)
    X, G = torch.randn(3, 4, 6, requires_grad=True), torch.randn(3, 4, 5)
    model(X).backward(G)
    arrays = [t.detach().numpy() for t in (X, G, layer.base_layer.weight, A, B)]
    mine = lora_backward(*arrays, 8.0, False)
    for name, theirs in {"A": A.grad, "B": B.grad, "X": X.grad}.items():
        gap = np.abs(mine[name] - theirs.numpy()).max()
        print(f"d{name}: largest difference from peft {gap:.1e}")

# %% [markdown]
# ## Question 3. The best pair of a given rank (4 points)
#
# Somebody fine-tuned a model in full, and you may keep only a thin pair for each matrix. Given the update
# $\Delta W$, shape $(o, i)$, find $A$, $(r, i)$, and $B$, $(o, r)$, so that $\frac{\alpha}{r} B A$ is as near to
# $\Delta W$ as rank $r$ allows, in the sum of squares. Return also the share of the squares of
# $\Delta W$ that is **lost**. (`np.linalg.svd(M, full_matrices=False)` gives $U$, $\sigma$, $V^\top$.)
#
# Many pairs have the same product. The check looks at shapes, at $\frac{\alpha}{r} B A$ and at the share.


# %% question="12.q3"
def best_pair(update, rank, alpha):
    """The LoRA that comes nearest to a full update.

    Eckart and Young 1936.

    Args:
        update: shape (o, i), not zero.
        rank: at least 1, at most min(o, i).
        alpha: > 0; the pair counts as (alpha / rank) B A.

    Returns:
        A, shape (rank, i); B, shape (o, rank); the share that is lost, in [0, 1].
    """
    ### BEGIN SOLUTION
    U, sigma, Vt = np.linalg.svd(update, full_matrices=False)
    B = U[:, :rank] * sigma[:rank] * (rank / alpha)
    return Vt[:rank], B, np.sum(sigma[rank:] ** 2) / np.sum(sigma**2)
    ### END SOLUTION


# %% check="12.q3"
right_3 = tl.check("12.q3", best_pair)

# %%
if right_3:
    ranks = [1, 2, 4, 8, 16, 32]
    rng, ax = np.random.default_rng(0), tl.plots.subplots(figsize=(7, 3))[1]
    few = rng.normal(size=(32, 3)) @ rng.normal(size=(3, 32)) + 0.3 * rng.normal(size=(32, 32))
    matrices = {"three strong directions and noise": few, "noise alone": rng.normal(size=(32, 32))}
    for (name, M), color, marker in zip(matrices.items(), (BLUE, ORANGE), "os"):
        lost = [best_pair(M, r, 8.0)[2] for r in ranks]
        ax.semilogx(ranks, lost, color=color, marker=marker, ls="-", label=name)
    ax.set_xticks(ranks, ranks)
    ax.minorticks_off()
    ax.set(xlabel="rank", ylabel="share of the squares lost", ylim=(-0.03, 1))
    ax.legend()
    words_ = "With three strong directions little is lost from rank 4 on; noise alone loses on to 32."
    tl.plots.alt(ax, words_)

# %% [markdown]
# ## Question 4. What would be lost? (3 points)
#
# Before an adapter is written, list the trained parameters that are **not** in the file. The keys of a
# file in the format of peft differ from the names in the model:
#
# - each begins with `base_model.model.`;
# - a name that ends with `.lora_A` or `.lora_B` has `.weight` after it in the file; other names are as
#   in the model.
#
# A frozen parameter may be missing: it is in the base model. Return the names as the model has them, in
# alphabetical order.


# %% question="12.q4"
def would_be_lost(names, trainable, keys):
    """Trained parameters that a file does not hold.

    Args:
        names: of all parameters of the model, a list of strings.
        trainable: True or False for each name, in the same order.
        keys: of the file, a list of strings.

    Returns:
        a sorted list of names.
    """
    ### BEGIN SOLUTION
    lost = []
    for name, is_trained in zip(names, trainable):
        end = ".weight" if name.endswith((".lora_A", ".lora_B")) else ""
        if is_trained and f"base_model.model.{name}{end}" not in keys:
            lost.append(name)
    return sorted(lost)
    ### END SOLUTION


# %% check="12.q4"
right_4 = tl.check("12.q4", would_be_lost)

# %% [markdown]
# When it is right: a model with LoRA and a new head, and a file with everything that has "lora" in its
# name.

# %%
if right_4:
    from tlcourse.lora import LoRAConfig, add_lora

    model = tl.Classifier(tl.load_backbone("minilm"), 4)
    add_lora(model, LoRAConfig(rank=2, alpha=4.0))
    names, parameters = zip(*model.named_parameters())
    keys = [f"base_model.model.{name}.weight" for name in names if "lora" in name]
    print("lost:", would_be_lost(list(names), [p.requires_grad for p in parameters], keys))

# %% [markdown]
# ## Question 5. Judgement (4 points)
#
# This report reaches you:
#
# > "We adapted a model of 1 billion weights to our 60 support topics, 500 labelled mails, with LoRA. We
# > compared ranks 4, 16, 64 and 256 at alpha = 16 and one learning rate: rank 4 was best on the test set,
# > 81.2 %, so the task is of rank 4. Full fine-tuning, with the same learning rate of 1e-3, got 74 %:
# > LoRA is better *and* regularises. LoRA trains 0.1 % of the weights, so our memory need fell by a
# > factor of 1,000 and training is 1,000 times faster. We saved every tensor with 'lora' in its name and
# > delivered the file."
#
# Answer in about 170 words. What does the comparison of ranks show, and that with full fine-tuning? What
# do you say to memory and time? What will the customer find when the file is loaded? What would you do
# first?

# %% [markdown] question="12.q5"
# **Your answer**
#
# <!-- BEGIN SOLUTION -->
# Ranks: with alpha fixed, the scale alpha / r falls from 4 to 1/16, and one rate serves all. So they
# compared step sizes as much as ranks; large ranks may have been trained too slowly. Each rank needs its
# own rate (or alpha / sqrt(r)). One run, chosen on the test set, has no interval and is flattered by
# the choice. "The task is of rank 4" follows from nothing here.
#
# Full fine-tuning: 1e-3 is a rate for LoRA, far too high for all weights; they compare rates. Tune both
# on validation, five or more paired draws, then the interval of the difference.
#
# Memory: gradients and moments shrink a thousandfold, but the frozen weights stay: 16 bytes per weight
# become 4, a factor of 4 in float32 at most, before activations, which shrink little. Time: forward and
# the gradient through the frozen layers stay, about two thirds of a step.
#
# The file lacks the head of 60 topics. It will be random after loading, right about once in 60. First
# I would save the head too, reload into a fresh model, and compare logits; then repeat the comparison.
# <!-- END SOLUTION -->

# %% [markdown]
# ## If you want more (not graded)
#
# - Show that $(BR, R^{-1}A)$ is the same update as $(B, A)$ for every invertible $R$. How many of the
#   $r(i + o)$ numbers are free, then?
# - Weight decay acts on $A$ and $B$. To which point does it pull the adapted model? Compare L2-SP,
#   lesson 02.
# - Two adapters of rank 4, for two tasks, are added to one $W$. What rank can the sum have? What does it
#   do on the inputs of the first task?
