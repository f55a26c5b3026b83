# %% [markdown]
# # Exercise 07: layer transferability
#
# You plan a transplant, work out its price, write the ruler that compares two layers, take the bias
# out of it, and at last write a program that reads a curve and names the cause. It will read the
# recorded curves of the lesson.
#
# | question | | points |
# |---|---|---|
# | 1 | the plan of a transplant | 2 |
# | 2 | the price of a cut | 3 |
# | 3 | linear CKA | 3 |
# | 4 | without the bias | 4 |
# | 5 | name the cause | 4 |
# | 6 | judgement, in your own words | 4 |
#
# **How it works.** Replace each `raise NotImplementedError(...)` by your answer, run the cell,
# and then the check below it. It says *right*, or shows the first input on which your answer
# differs, with a hint. Try as often as you like: a check costs nothing and records nothing.

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %%
import json

import numpy as np
import torch

from tlcourse.evaluation import mean_interval
from tlcourse.layers import LayerFeatures
from tlcourse.locations import data_dir

BLUE, ORANGE, GREEN = tl.plots.palette[:3]

# %% [markdown]
# ## Question 1. The plan of a transplant (2 points)
#
# Before a weight is moved, write down what is to happen to each. You get the names of all
# parameters, the names of the layers from the input to the top (the head is not among them), the
# cut $n$, and whether the copied layers are frozen. Say for every parameter one of
#
# - `"copied, frozen"`,
# - `"copied, trained"`,
# - `"new, trained"`.
#
# A parameter belongs to a layer if its name is the layer's name, a dot, and something more.


# %% question="07.q1"
def plan(parameters, layers, n, frozen):
    """What happens to each parameter of AnB (frozen) or AnB+ (not frozen).

    Args:
        parameters: names, for example "stages.1.conv1.weight" or "head.bias".
        layers: names of the layers from the input up, for example "stem", "stages.0".
        n: how many layers are copied, from 0 to len(layers).
        frozen: whether the copied layers are frozen.

    Returns:
        dict from each parameter's name to one of the three texts above.
    """
    ### BEGIN SOLUTION
    lower = tuple(layer + "." for layer in layers[:n])
    copied = "copied, frozen" if frozen else "copied, trained"
    return {name: copied if name.startswith(lower) else "new, trained" for name in parameters}
    ### END SOLUTION


# %% check="07.q1"
right_1 = tl.check("07.q1", plan)

# %%
if right_1:
    body = tl.load_backbone("glyphs").body
    names = [name for name, _ in body.named_parameters()]
    for name, fate in plan(names, tl.freezing.layer_names(body), 2, True).items():
        print(f"{name:32} {fate}")

# %% [markdown]
# ## Question 2. The price of a cut (3 points)
#
# A chain of convolutions, and a linear head as the last of them (a convolution of kernel 1 on a map
# of one place). Layer $\ell$ is described by $(C_\text{in}, C_\text{out}, k, S)$: channels in and
# out, the side of its kernel, and the side of the square map that it *puts out*. Its forward pass
# takes $t_\ell = C_\text{in}\,C_\text{out}\,k^2\,S^2$ multiplications.
#
# The first $n$ layers are frozen. How many multiplications does one image cost, forward and
# backward?


# %% question="07.q2"
def price(layers, n):
    """Multiplications of one training step for one image, the first n layers frozen.

    Args:
        layers: list of (in_channels, out_channels, kernel, side), from the input to the head.
        n: frozen layers, from 0 to len(layers) - 1: the head is always trained.

    Returns:
        dict with "forward" and "backward", whole numbers.
    """
    ### BEGIN SOLUTION
    cost = [a * b * kernel**2 * side**2 for a, b, kernel, side in layers]
    weight_products = sum(cost[n:])
    input_products = sum(cost[n + 1 :])  # layer n itself need not pass anything down
    return {"forward": sum(cost), "backward": weight_products + input_products}
    ### END SOLUTION


# %% check="07.q2"
right_2 = tl.check("07.q2", price)

# %%
if right_2:
    chain = [(3, 32, 5, 16), (32, 32, 3, 16), (32, 64, 3, 8), (64, 128, 3, 4), (128, 10, 1, 1)]
    weights = [a * b * kernel**2 for a, b, kernel, _ in chain]
    whole = price(chain, 0)
    for n in range(5):
        cost = price(chain, n)
        step = sum(cost.values()) / sum(whole.values())
        print(
            f"n = {n}: {sum(weights[n:]) / sum(weights):6.1%} of the weights trained, "
            f"backward {cost['backward'] / whole['backward']:6.1%}, whole step {step:6.1%}"
        )

# %% [markdown]
# The backward pass nearly vanishes, and the whole step does not: the forward pass stays. Features of
# frozen layers can be computed once and kept (lesson 05), but then there is no augmentation.
#
# ## Question 3. Linear CKA (3 points)
#
# Two layers describe the same $N$ images: $X$ of shape $(N, p)$ and $Y$ of shape $(N, q)$. Write
# the plain estimate of linear CKA. Do not forget what comes first.


# %% question="07.q3"
def linear_cka(x, y):
    """Linear centred kernel alignment, the plain estimate.

    Kornblith et al. 2019, section 3, arXiv:1905.00414.

    Args:
        x: shape (N, p).
        y: shape (N, q), the same images in the same order.

    Returns:
        A number in [0, 1].
    """
    ### BEGIN SOLUTION
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    K, L = x @ x.T, y @ y.T  # (N, N), however many features there are
    return (K * L).sum() / (np.linalg.norm(K) * np.linalg.norm(L))
    ### END SOLUTION


# %% check="07.q3"
right_3 = tl.check("07.q3", linear_cka)

# %% [markdown]
# When it is right: hold every layer of a network against every layer of the same recipe from
# another seed.

# %%
task = tl.load_task("wild_digits", labels_per_class=None)
images = task.val.inputs[::3]  # 100 images


def activations(name):
    body = tl.load_backbone(name).body
    with torch.no_grad():
        layers = [LayerFeatures(body, layer, "flatten") for layer in tl.freezing.layer_names(body)]
        return [layer(images).numpy() for layer in layers]


# %%
if right_3:
    first, second = activations("glyphnet_seed1"), activations("glyphnet_seed2")
    table = np.array([[linear_cka(x, y) for y in second] for x in first])
    fig, ax = tl.plots.subplots(figsize=(4.4, 3.6))
    ax.imshow(table, vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(table):
        colour = "white" if value > 0.6 else "black"
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
    names = ["stem", "block 1", "block 2", "block 3"]
    ax.set_xticks(range(4), names)
    ax.set_yticks(range(4), names)
    ax.set(xlabel="seed 2", ylabel="seed 1", title="plain CKA")
    ax.grid(False)
    tl.plots.alt(ax, f"Table of plain CKA, seed 1 by seed 2: {table.round(2).tolist()}")

# %% [markdown]
# The diagonal is the largest in its row: layers of equal depth agree most. But all those numbers are
# too high, as there are thousands of features and 100 images.
#
# ## Question 4. Without the bias (4 points)
#
# Write CKA with the unbiased estimate of HSIC. With $\tilde K$ and $\tilde L$ the similarities with a
# diagonal of zeros,
#
# $$\widehat{\mathrm{HSIC}} \propto \sum_{ij}\tilde K_{ij}\tilde L_{ij}
# + \frac{\mathbf 1^\top \tilde K \mathbf 1\;\mathbf 1^\top \tilde L \mathbf 1}{(N-1)(N-2)}
# - \frac{2}{N-2}\, \mathbf 1^\top \tilde K \tilde L\, \mathbf 1 ,$$
#
# and CKA is its cosine, as before. Your answer may be slightly negative.


# %% question="07.q4"
def debiased_cka(x, y):
    """Linear CKA with the unbiased estimate of HSIC.

    Song et al. 2012, equation 5, JMLR 13; Nguyen et al. 2021, section 3, arXiv:2010.15327.

    Args:
        x: shape (N, p), N >= 4.
        y: shape (N, q), the same images in the same order.

    Returns:
        A number, at most 1.
    """
    ### BEGIN SOLUTION
    num = len(x)

    def hsic(K, L):
        mean_part = K.sum() * L.sum() / ((num - 1) * (num - 2))
        rows_part = 2 * K.sum(axis=0) @ L.sum(axis=0) / (num - 2)
        return (K * L).sum() + mean_part - rows_part

    # Centring is not needed, but it keeps the numbers small.
    K, L = (z @ z.T for z in (x - x.mean(axis=0), y - y.mean(axis=0)))
    np.fill_diagonal(K, 0)
    np.fill_diagonal(L, 0)
    return hsic(K, L) / np.sqrt(hsic(K, K) * hsic(L, L))
    ### END SOLUTION


# %% check="07.q4"
right_4 = tl.check("07.q4", debiased_cka)

# %%
if right_3 and right_4:
    rng = np.random.default_rng(0)
    print("features   plain   debiased   (noise, 50 images)")
    for size in (5, 50, 500, 5000):
        x, y = rng.normal(size=(2, 50, size))
        print(f"{size:8d}   {linear_cka(x, y):5.2f}   {debiased_cka(x, y):+8.2f}")

# %% [markdown]
# ## Question 5. Name the cause (4 points)
#
# You have test accuracies of three networks at every cut, on the same draws of labels: B*n*B+,
# B*n*B and A*n*B, each an array of shape (draws, cuts). For each cut say
#
# - `"freezing"` if B*n*B is worse than B*n*B+: holding the same layers still costs something,
# - `"specificity"` if A*n*B is worse than B*n*B: layers of the source are worth less than B's own,
# - `"both"` if both hold, `"neither"` if none does.
#
# *Worse* means: the 95 % interval of the **paired** difference lies wholly on the side of a loss.
# `mean_interval(values)` from the first cell gives an interval with `.low` and `.high`.


# %% question="07.q5"
def causes(selfer_plus, selfer, copied):
    """The cause of the loss at each cut.

    Args:
        selfer_plus: accuracies of BnB+, shape (draws, cuts).
        selfer: accuracies of BnB, shape (draws, cuts).
        copied: accuracies of AnB, shape (draws, cuts).

    Returns:
        list of texts, one for each cut: "freezing", "specificity", "both", "neither".
    """
    ### BEGIN SOLUTION
    found = []
    for cut in range(selfer.shape[1]):
        co_adapted = mean_interval(selfer_plus[:, cut] - selfer[:, cut]).low > 0
        specific = mean_interval(selfer[:, cut] - copied[:, cut]).low > 0
        if co_adapted and specific:
            found.append("both")
        elif co_adapted or specific:
            found.append("freezing" if co_adapted else "specificity")
        else:
            found.append("neither")
    return found
    ### END SOLUTION


# %% check="07.q5"
right_5 = tl.check("07.q5", causes)

# %%
if right_5:
    path = data_dir() / "results" / "layer_transfer.json"
    draws = json.loads(path.read_text("utf-8"))["draws"].values()
    curve = {
        arm: np.array([[draw["scores"][arm][str(n)] for n in range(1, 5)] for draw in draws])
        for arm in ("self+", "self", "near", "far")
    }
    for source in ("near", "far"):
        print(source, causes(curve["self+"], curve["self"], curve[source]))

# %% [markdown]
# Those are the recorded curves of the lesson, at the cuts 1 to 4. "Neither" means that no loss was
# *shown* with so few draws, not that there is none. And `"freezing"` is the name of a difference, not
# of a reason: at cut 4 it stands although layers that stay together cannot be torn apart there.
#
# ## Question 6. Judgement (4 points)
#
# A colleague writes:
#
# > "Our network was trained on photographs of streets. For the new task, X-ray images, we compared
# > it with a network that was trained on X-rays: linear CKA of the stems is 0.97, on 50 images
# > with 12,544 features each. So the stem is general, and we freeze it. In the upper layers CKA
# > is 0.30, so those are useless and we train them from new weights. We tried it: the accuracy
# > fell from 0.81 (full fine-tuning) to 0.74. That proves that the upper layers were specific."
#
# Answer in about 150 words. What is each of the three conclusions worth? Which controls are missing
# for the CKA, and which networks are missing for the experiment? What would you do next?

# %% [markdown] question="07.q6"
# **Your answer**
#
# <!-- BEGIN SOLUTION -->
# **0.97 at the stem** says little. With 12,544 features and 50 images the plain estimate is near
# $p/(p+N) = 0.996$ for pure noise: I would use the debiased one. Even then a floor is missing: a
# random network's stem may look just as alike, because every stem still follows the pixels. Alike is
# not the same as useful, in either direction.
#
# **0.30 above** does not make layers useless. Two seeds of one recipe may not be much more alike,
# and as a starting point (A*n*B+) they may still be the best there is.
#
# **0.81 to 0.74** mixes three changes: the stem was frozen, the upper layers were thrown away, and
# (perhaps) rate and steps no longer fit. It is no proof of specificity. Missing: copying all layers
# with freezing only the stem, A*n*B+ at the same cut, the selfers B*n*B and B*n*B+ (co-adaptation),
# a random frozen stem, scratch. All with a rate of their own and several paired draws.
#
# Next I would keep all pre-trained layers and compare "stem frozen" with "nothing frozen".
# <!-- END SOLUTION -->

# %% [markdown]
# ## If you want more (not graded)
#
# - Show that $\widehat{\mathrm{HSIC}}$ does not change when a constant is added to every row of $X$,
#   although nothing is centred. (Which sums over four different images contain it?)
# - CKA with a Gaussian kernel in the place of the dot product: which invariances are left?
# - Freeze the *upper* layers and train the lower. What does the rule of question 2 say of its price?
