# %% [markdown]
# # Exercise 03: gradients by hand
#
# You are going to write the backward pass of a small network, one line at a time, with nothing
# but numpy. By question 4 it reads handwritten digits, taught by *your* gradients alone. By
# question 5 it reads them in a mirror, with two thin matrices and everything else frozen.
#
# | question | | points |
# |---|---|---|
# | 1 | a loss that does not overflow | 2 |
# | 2 | claimed minus true | 2 |
# | 3 | the head | 2 |
# | 4 | down through the backbone | 4 |
# | 5 | the two thin matrices of LoRA | 4 |
# | 6 | judgement, in your own words | 4 |
#
# **How it works.** Replace each `raise NotImplementedError(...)` by your answer, run the cell,
# and then the check below it. It says *right*, or shows the first input on which your answer
# differs, with a hint. Try as often as you like: a check costs nothing and records nothing. Most
# right answers unlock a picture.
#
# **A tip.** Paper first. Each answer is one to six lines, and all of them follow from one
# sentence: *a gradient has the shape of the thing that it belongs to.*

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %%
import numpy as np
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

BLUE, ORANGE, GREEN = tl.plots.palette[:3]
threadpool_limits(1)  # for matrices this small, several threads only wait for each other
images, digits = load_digits(return_X_y=True)  # (1797, 64) ink, (1797,) whole numbers 0 to 9
images = images / 16  # ink in [0, 1]


def mirrored(X):
    return X.reshape(-1, 8, 8)[:, :, ::-1].reshape(-1, 64)


# %%
fig, axes = tl.plots.subplots(2, 10, figsize=(10, 2.2))
for row, X in zip(axes, (images, mirrored(images)), strict=True):
    for ax, image in zip(row, X[10:20], strict=True):
        ax.imshow(image.reshape(8, 8), cmap="Greys")
        ax.axis("off")
tl.plots.alt(fig, "Ten handwritten digits, 0 to 9, and below each its mirror image.")

# %% [markdown]
# Above: what you will teach the network to read. Below: the same in a mirror, for question 5.
# Images come as rows of 64 numbers, targets as whole numbers from 0 to $K - 1$. Two lines of
# numpy that you may want:

# %%
logits = np.array([[2.0, 1.0, -1.0], [0.0, 3.0, 0.5]])
targets = np.array([1, 0])
print("the logit of each image's true class:", logits[np.arange(2), targets])
print("one-hot:", np.eye(3)[targets], sep="\n")

# %% [markdown]
# ## Question 1. A loss that does not overflow (2 points)
#
# Write the mean cross-entropy
#
# $$L = \frac1n \sum_i -\log p_{i,t_i}, \qquad p_{ik} = \frac{e^{z_{ik}}}{\sum_j e^{z_{ij}}},$$
#
# with $t_i$ the target of image $i$. It must be right for *any* finite logits, $z = \pm 1000$
# included, and you may not print a warning to get there.


# %% question="03.q1"
def cross_entropy(logits, targets):
    """Mean cross-entropy.

    Args:
        logits: shape (n, K), any finite numbers.
        targets: whole numbers from 0 to K - 1, shape (n,).

    Returns:
        The loss, one number.
    """
    ### BEGIN SOLUTION
    # Each row's own maximum: a common one would let rows far below it underflow.
    top = logits.max(axis=1, keepdims=True)  # (n, 1)
    logsumexp = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))  # (n,)
    return np.mean(logsumexp - logits[np.arange(len(targets)), targets])
    ### END SOLUTION


# %% check="03.q1"
right_1 = tl.check("03.q1", cross_entropy)

# %%
if right_1:
    far = np.array([[1000.0, 0.0]])
    print("a claim that is wrong by 1,000 costs", cross_entropy(far, np.array([1])))

# %% [markdown]
# ## Question 2. Claimed minus true (2 points)
#
# Write $dZ = \partial L / \partial Z$ of the loss of question 1. Do not forget that it is a
# *mean* over the images.


# %% question="03.q2"
def logit_gradient(logits, targets):
    """Gradient of the mean cross-entropy with respect to the logits.

    Args:
        logits: shape (n, K), any finite numbers.
        targets: whole numbers from 0 to K - 1, shape (n,).

    Returns:
        Shape (n, K).
    """
    ### BEGIN SOLUTION
    exps = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = exps / exps.sum(axis=1, keepdims=True)
    return (p - np.eye(logits.shape[1])[targets]) / len(targets)
    ### END SOLUTION


# %% check="03.q2"
right_2 = tl.check("03.q2", logit_gradient)

# %% [markdown]
# With both in hand you need no answer key any more: central differences of your loss must give
# your gradient.

# %%
if right_1 and right_2:
    by_difference, h = np.zeros_like(logits), 6e-6
    for place in np.ndindex(logits.shape):
        nudge = np.zeros_like(logits)
        nudge[place] = h
        rise = cross_entropy(logits + nudge, targets) - cross_entropy(logits - nudge, targets)
        by_difference[place] = rise / (2 * h)
    apart = np.abs(by_difference - logit_gradient(logits, targets)).max()
    print(f"your loss and your gradient agree to {apart:.0e}")

# %% [markdown]
# ## Question 3. The head (2 points)
#
# Logits from features: $Z = H V^\top + c$, with features $H\;(n, m)$, weight $V\;(K, m)$ and bias
# $c\;(K)$. Write $dV$ and $dc$. You may call your own `logit_gradient`.


# %% question="03.q3"
def head_gradients(features, targets, weight, bias):
    """Gradients of the mean cross-entropy of a linear head.

    Args:
        features: shape (n, m).
        targets: whole numbers from 0 to K - 1, shape (n,).
        weight: shape (K, m).
        bias: shape (K,).

    Returns:
        dict with "weight", shape (K, m), and "bias", shape (K,).
    """
    ### BEGIN SOLUTION
    dlogits = logit_gradient(features @ weight.T + bias, targets)  # (n, K)
    return {"weight": dlogits.T @ features, "bias": dlogits.sum(axis=0)}
    ### END SOLUTION


# %% check="03.q3"
right_3 = tl.check("03.q3", head_gradients)

# %% [markdown]
# When it is right: put a head of zeros straight on the pixels. What does the very first step,
# $-dV$, draw?

# %%
if right_3:
    first = head_gradients(images, digits, np.zeros((10, 64)), np.zeros(10))
    fig, axes = tl.plots.subplots(1, 10, figsize=(10, 1.5))
    for label, (ax, row) in enumerate(zip(axes, -first["weight"], strict=True)):
        ax.imshow(row.reshape(8, 8), cmap="PuOr_r", vmin=-0.03, vmax=0.03)
        ax.set_title(label)
        ax.axis("off")
    words = "Ten 8 x 8 images, one per class: each shows its digit against the mean of all digits."
    tl.plots.alt(fig, words)

# %% [markdown]
# ## Question 4. Down through the backbone (4 points)
#
# A network with one hidden layer:
#
# $$U = X W_1^\top + b_1, \qquad H = \max(U, 0), \qquad Z = H V^\top + c.$$
#
# Return the gradients of all its weights. If the backbone is `frozen`, return those of the head
# only: the keys `"W1"` and `"b1"` must then be *absent*. (Zeros would be something else. You know
# from the lesson what weight decay does to them.)


# %% question="03.q4"
def backward(net, inputs, targets, frozen):
    """Gradients of the mean cross-entropy.

    Args:
        net: dict with "W1" (m, d), "b1" (m,), "V" (K, m) and "c" (K,).
        inputs: shape (n, d).
        targets: whole numbers from 0 to K - 1, shape (n,).
        frozen: True if the backbone, W1 and b1, is not trained.

    Returns:
        dict from name to gradient: "V" and "c", and also "W1" and "b1" unless frozen.
    """
    ### BEGIN SOLUTION
    before = inputs @ net["W1"].T + net["b1"]  # U (n, m)
    hidden = np.maximum(before, 0)  # H (n, m)
    dlogits = logit_gradient(hidden @ net["V"].T + net["c"], targets)  # (n, K)
    gradients = {"V": dlogits.T @ hidden, "c": dlogits.sum(axis=0)}
    if not frozen:
        dbefore = (dlogits @ net["V"]) * (before > 0)
        gradients |= {"W1": dbefore.T @ inputs, "b1": dbefore.sum(axis=0)}
    return gradients
    ### END SOLUTION


# %% check="03.q4"
right_4 = tl.check("03.q4", backward)

# %% [markdown]
# When it is right, let it learn: 600 steps on 1,000 images, tested on the other 797. Once all
# weights are trained, once only the head on a backbone of random, frozen weights.


# %%
def new_network(m=32, seed=0):
    rng = np.random.default_rng(seed)
    W1, V = rng.normal(size=(m, 64)) / 8, rng.normal(size=(10, m)) / np.sqrt(m)
    return {"W1": W1, "b1": np.zeros(m), "V": V, "c": np.zeros(10)}


def accuracy(net, X, truth):
    hidden = np.maximum(X @ net["W1"].T + net["b1"], 0)
    return np.mean((hidden @ net["V"].T + net["c"]).argmax(axis=1) == truth)


# %%
def learn(X, count, frozen):
    """Train on the first images; returns the network and its test accuracy after each step."""
    net, curve = new_network(), []
    for _ in range(600):
        for name, gradient in backward(net, X[:count], digits[:count], frozen).items():
            net[name] -= 0.5 * gradient
        curve.append(accuracy(net, X[1000:], digits[1000:]))
    return net, curve


# %%
if right_4:
    net, everything = learn(images, 1000, frozen=False)
    _, head_only = learn(images, 1000, frozen=True)
    fig, ax = tl.plots.subplots(figsize=(7, 3))
    ax.plot(everything, color=BLUE, label=f"everything: {everything[-1]:.2f}")
    ax.plot(head_only, color=ORANGE, label=f"head on a random backbone: {head_only[-1]:.2f}")
    ax.set(xlabel="step", ylabel="test accuracy", ylim=(0, 1))
    ax.legend(loc="lower right")
    words = "Test accuracy over 600 steps: everything ends above 0.9, the head alone near 0.7."
    tl.plots.alt(fig, words)

# %% [markdown]
# ## Question 5. The two thin matrices of LoRA (4 points)
#
# One linear layer inside a network, its weight frozen at $W_0$, with a correction of rank $r$
# beside it:
#
# $$U = H\,(W_0 + s\,B A)^\top, \qquad s = \alpha / r.$$
#
# You are handed $H$, what came in, and $dU$, the gradient that arrives from above (it carries the
# $1/n$ already). Write $dA$ and $dB$. The check begins with the first step of training, where
# $B = 0$. A point of honour: do not form the big matrix $dU^\top H$.


# %% question="03.q5"
def lora_gradients(H, dU, A, B, alpha):
    """Gradients of the two factors of a LoRA layer.

    Hu et al. 2021, section 4.1, arXiv:2106.09685.

    Args:
        H: inputs of the layer, shape (n, i).
        dU: gradient of the loss with respect to its outputs, shape (n, o).
        A: shape (r, i).
        B: shape (o, r).
        alpha: > 0; the correction is (alpha / r) B A.

    Returns:
        dict with "A", shape (r, i), and "B", shape (o, r).
    """
    ### BEGIN SOLUTION
    scale = alpha / len(A)  # A has r rows
    # These brackets cost n r (i + o) products each, instead of n i o for dU^T H.
    return {"A": scale * (dU @ B).T @ H, "B": scale * dU.T @ (H @ A.T)}
    ### END SOLUTION


# %% check="03.q5"
right_5 = tl.check("03.q5", lora_gradients)

# %% [markdown]
# When it is right: hold the digits to a mirror. The network of question 4 has never seen one and
# fails. We keep all its weights frozen, give its first layer your LoRA of rank 4, and show it 100
# mirrored images.


# %%
def arriving(net, X, targets):
    """dU at the first layer, from your logit_gradient."""
    U = X @ net["W1"].T + net["b1"]
    dZ = logit_gradient(np.maximum(U, 0) @ net["V"].T + net["c"], targets)
    return (dZ @ net["V"]) * (U > 0)


# %%
def adapt(net, X, targets, rank=4, alpha=4.0, steps=400):
    """Train LoRA on the first layer; returns accuracy and size of dA and dB at each step."""
    rng = np.random.default_rng(1)
    lora = {"A": rng.normal(size=(rank, 64)) / 8, "B": np.zeros((32, rank))}
    score, size = [], []
    for _ in range(steps):
        adapted = {**net, "W1": net["W1"] + alpha / rank * lora["B"] @ lora["A"]}
        score.append(accuracy(adapted, mirrored(images[1000:]), digits[1000:]))
        dU = arriving(adapted, X, targets)
        gradients = lora_gradients(X, dU, lora["A"], lora["B"], alpha)
        size.append([np.linalg.norm(gradients[name]) for name in "AB"])
        for name in "AB":
            lora[name] -= 0.1 * gradients[name]
    return score, np.array(size)


# %%
if right_4 and right_5:
    score, size = adapt(net, mirrored(images[:100]), digits[:100])
    _, scratch = learn(mirrored(images), 100, frozen=False)
    fig, (left, right) = tl.plots.subplots(1, 2, figsize=(9, 3.2))
    left.plot(score, color=GREEN, label=f"LoRA, 384 numbers: {score[-1]:.2f}")
    left.plot(scratch[:400], color="grey", label=f"from scratch, 2,410: {scratch[399]:.2f}")
    left.set(xlabel="step", ylabel="accuracy on mirrored digits", ylim=(0, 1))
    left.legend(loc="lower right")
    right.plot(size[:12, 0], color=ORANGE, label="dA")
    right.plot(size[:12, 1], color=BLUE, label="dB")
    right.set(xlabel="step (the first twelve)", ylabel="norm of the gradient")
    right.legend()
    words = "Left: LoRA rises from below 0.5 to 0.8, scratch too. Right: dA begins at zero."
    tl.plots.alt(fig, words)

# %% [markdown]
# The grey line keeps us honest: a new network, trained from scratch on those 100 images, does
# even a little better, as these digits are easy. What you have shown is not that LoRA wins, but
# that 384 numbers and your two formulas can turn a frozen network around. And look to the right:
# at step 0, $dA$ is exactly zero.
#
# ## Question 6. Judgement (4 points)
#
# A colleague has to adapt a 12-layer network to a new task: 2,000 labelled images, no GPU, and a
# laptop that is needed again tomorrow. This message arrives:
#
# > "I see three plans: (a) LoRA of rank 8 in every layer, (b) train only the head, (c) train only
# > the lowest layer, because it is the smallest. Each leaves at least 95 % of the weights frozen,
# > so each will be about 20 times faster than full fine-tuning. The gradients are fine: I checked
# > them in float32 right after initialisation and everything was within 1e-2."
#
# Answer in about 150 words. What is left of the cost of a training step in (a), (b) and (c), and
# why? What is that gradient check worth, and what would you change in it? What would you measure
# before choosing a plan?

# %% [markdown] question="03.q6"
# **Your answer**
#
# <!-- BEGIN SOLUTION -->
# The cost does not follow the share of trained weights. A step is one product per layer forward
# and up to two backward: a weight product where the layer is trained, and an input product where
# anything below it is trained. (a) LoRA drops the large weight products, but the gradient must
# still reach the lowest layer: forward plus all input products, about two thirds of a full step.
# (b) Head only leaves the forward pass, about a third; since the backbone is frozen, its features
# can be computed once and cached, and then a step costs next to nothing (but augmentation is
# lost). (c) The lowest layer needs every input product above it: about two thirds again, however
# small it is.
#
# The check proves little. Float32 rounding alone is large, and 1e-2 would let a wrong factor
# through. At initialisation LoRA's $B$ is zero (and perhaps the head), so the gradients behind it
# are zero whether they are right or wrong. Use float64, $h \approx 10^{-5}$, a tolerance of
# $10^{-6}$, and a random point. Even then a wrong loss or wrong labels pass.
#
# Before choosing, I would time 20 steps of each plan on this laptop, and train (b), the cheapest,
# with validation accuracy. Only if its frozen features are not good enough would I pay for (a).
# <!-- END SOLUTION -->

# %% [markdown]
# ## If you want more (not graded)
#
# - With label smoothing $y$ becomes $(1-\epsilon)\,y + \epsilon/K$. Does $dZ = P - Y$ survive? On
#   which line of the derivation was $\sum_k y_k = 1$ used?
# - Replace the ReLU by $\tanh$. Which single line of question 4 changes?
# - Tie two layers, $W_2 = W_1$. What is the gradient of the one weight they share?
