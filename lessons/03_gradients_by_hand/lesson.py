# %% [markdown]
# # 03 Gradients by hand
#
# Fine-tuning is nothing but gradients: a pre-trained weight moves because some derivative told it
# to, and a frozen one stays because we threw its derivative away. Here you derive every one of
# those derivatives yourself, write each as one line of numpy, and let two referees check it.
#
# **After this lesson you can**
#
# 1. derive the gradient of the cross-entropy, binary and multi-class, through head and backbone,
#    on paper;
# 2. prove a gradient right to ten digits, and know when the proof itself is worth nothing;
# 3. say which products leave the backward pass when you freeze, decay or use LoRA, and what each
#    one costs.
#
# **You need** lessons 00 to 02, the chain rule, and matrix products. **Time** about 75 minutes;
# the notebook itself runs in well under a minute on two cores.
#
# **Expected result.** Every gradient of a three-layer network agrees with finite differences to
# better than $10^{-6}$ and with autograd to better than $10^{-10}$. Freezing 98 % of the weights
# makes the backward pass 111 times cheaper, and yet the training step less than 3 times.

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %%
import time
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits
from torch.utils.flop_counter import FlopCounterMode

BLUE, ORANGE, GREEN = tl.plots.palette[:3]
threadpool_limits(1)  # for matrices this small, several threads only wait for each other
rng = np.random.default_rng(0)

# %% [markdown]
# ## Before you run anything
#
# Write down three guesses. Being wrong here is worth more than being right.
#
# 1. You put a new head on a pre-trained backbone and start all its weights at **zero**. In the
#    first step of full fine-tuning, which weights of the backbone move?
# 2. You freeze the backbone, and with it 98 % of all weights. By which factor does one training
#    step (forward and backward) get cheaper: about **1.5**, about **3**, or about **50**?
# 3. LoRA adds a product $BA$ to a frozen weight, and starts with $B = 0$ and a random $A$. In the
#    first step, which of the two receives a gradient: $A$, $B$, both, or neither?

# %% [markdown]
# ## The picture
#
# This is the whole network of the lesson: a backbone of two layers, a linear head, and a loss.
# Values flow to the right (blue). Gradients flow back to the left (orange), along the same edges,
# and at each weight a branch drops down to it. Everything we derive is one orange arrow. (The
# biases $b_1$, $b_2$ and $c$ sit beside their weights and are left out of the drawing.)
#
# | symbol | shape | meaning |
# |---|---|---|
# | $n,\ d,\ m,\ K$ | | images in the batch, pixels (64), hidden units, classes |
# | $X$ | $(n, d)$ | the images, one per row |
# | $W_1,\ b_1$ and $W_2,\ b_2$ | $(m, d),\ (m)$ and $(m, m),\ (m)$ | the backbone's weights and biases |
# | $U_1,\ U_2$ | $(n, m)$ | sums before the activation, $U_1 = X W_1^\top + b_1$ |
# | $H_1,\ H_2$ | $(n, m)$ | after it, $H = \max(U, 0)$; $H_2$ are the *features* |
# | $V,\ c$ | $(K, m),\ (K)$ | the head |
# | $Z$ | $(n, K)$ | logits, $Z = H_2 V^\top + c$ |
# | $L$ | a number | the mean cross-entropy |
#
# One shorthand carries the lesson. For any quantity $q$ in the picture, **$dq$ means
# $\partial L / \partial q$**, the answer to "if this number grew a little, how much would the
# loss grow?". So $dq$ always has the shape of $q$. Half of all mistakes die on that sentence
# alone. The other tool is the chain rule, which is one sentence too: slopes multiply along a
# path, and add up over all paths.

# %% jupyter={"source_hidden": true}
GREY = "#C8C8C8"
NODES = {"X": "n, d", "U1": "n, m", "H1": "n, m", "U2": "n, m", "H2": "n, m", "Z": "n, K", "L": "1"}
WEIGHTS = {"W1": ("U1", "m, d"), "W2": ("U2", "m, m"), "V": ("Z", "K, m")}
OPERATIONS = ["linear", "ReLU", "linear", "ReLU", "linear", "cross-entropy"]


def arrow(ax, start, end, color, label="", shift=0.14):
    style = {"arrowstyle": "-|>", "color": color, "lw": 1.8, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", xy=end, xytext=start, arrowprops=style)
    x, y = (np.array(start) + np.array(end)) / 2
    ax.text(x, y + shift, label, color=color, ha="center", va="center", fontsize=10)


# %% jupyter={"source_hidden": true}
def draw_network(trainable, title):
    """The graph with the gradients that are needed (orange) to train the named weights."""
    ax = tl.plots.subplots(figsize=(10, 3))[1]
    nodes = list(NODES)
    lowest = min(nodes.index(WEIGHTS[name][0]) for name in trainable)
    box = {"boxstyle": "round", "fc": "white"}
    for i, name in enumerate(nodes):
        ax.text(i, 1, f"{name}\n({NODES[name]})", ha="center", va="center", bbox=box)
        if i:
            arrow(ax, (i - 0.7, 1.12), (i - 0.3, 1.12), BLUE, OPERATIONS[i - 1])
            color = ORANGE if i > lowest else GREY
            arrow(ax, (i - 0.3, 0.88), (i - 0.7, 0.88), color, "d" + nodes[i - 1], -0.14)
    for name, (node, shape) in WEIGHTS.items():
        draw_weight(ax, nodes.index(node), name, shape, name in trainable)
    ax.set(xlim=(-0.5, 6.5), ylim=(-0.35, 1.4), title=title)
    ax.axis("off")
    return ax


# %% jupyter={"source_hidden": true}
def draw_weight(ax, x, name, shape, trained):
    color, fill = (ORANGE, "#FFF1E0") if trained else (GREY, "#EEEEEE")
    box = {"boxstyle": "round", "fc": fill, "ec": color}
    ax.text(x, -0.1, f"{name}\n({shape})", ha="center", va="center", bbox=box)
    arrow(ax, (x - 0.08, 0.13), (x - 0.08, 0.76), BLUE)
    arrow(ax, (x + 0.08, 0.76), (x + 0.08, 0.13), color)
    ax.text(x + 0.16, 0.45, "d" + name, color=color, ha="left", va="center")


# %%
ax = draw_network(["W1", "W2", "V"], "Values go right, gradients come back")
tl.plots.alt(
    ax,
    "Graph X, U1, H1, U2, H2, Z, L in a row; W1, W2 and V below the linear nodes. Blue arrows lead "
    "forward, orange arrows back along every edge but the one to X, and down to each weight.",
)

# %% [markdown]
# ## One output: is it an eight?
#
# We start at the right end of the picture and with the smallest case: one weight vector on the
# pixels, one number out. The data are real: scikit-learn's handwritten digits, 8 x 8 pixels of
# ink, here only threes and eights.

# %%
images, digits = load_digits(return_X_y=True)  # (1797, 64) ink from 0 to 16, (1797,)
images = images / 16  # ink in [0, 1], float64
pair = (digits == 3) | (digits == 8)
X2, y2 = images[pair], (digits[pair] == 8).astype(float)  # y = 1 says: an eight
print(f"{len(X2)} images, {y2.mean():.0%} of them eights")

# %% [markdown]
# For one image $x$ the score is $z = w^\top x + b$, and the sigmoid turns it into the probability
# of "eight":
#
# $$p = \sigma(z) = \frac{1}{1 + e^{-z}}, \qquad L = -\,y \log p - (1 - y) \log(1 - p).$$
#
# $L$ is minus the log of the probability that the model gave to what really was there. Now walk
# back, one edge at a time.
#
# **Loss to probability.**
# $\;\dfrac{\partial L}{\partial p} = -\dfrac{y}{p} + \dfrac{1-y}{1-p} = \dfrac{-y(1-p) + (1-y)p}{p(1-p)} = \dfrac{p - y}{p\,(1-p)}.$
#
# **Probability to score.**
# $\;\dfrac{dp}{dz} = \dfrac{e^{-z}}{(1+e^{-z})^2} = \dfrac{1}{1+e^{-z}} \cdot \dfrac{e^{-z}}{1+e^{-z}} = p\,(1-p).$
#
# **Multiply.** The ugly denominator is exactly the sigmoid's slope, and cancels it:
#
# $$dz = \frac{p-y}{p(1-p)} \cdot p(1-p) = p - y.$$
#
# Read it slowly: *claimed minus true*. It lies between $-1$ and $1$. Confident and right: no
# push. Confident and wrong: the full push, however flat the sigmoid is there. (With the squared
# error the slope $p(1-p)$ would stay, and a confidently wrong model would hardly learn.)
#
# **Score to weights.** $z = \sum_j w_j x_j + b$, so $\partial z / \partial w_j = x_j$ and
# $\partial z / \partial b = 1$:
#
# $$dw = (p - y)\,x, \qquad db = p - y.$$
#
# With $n$ images and the mean loss, each is averaged:
# $dw = \frac{1}{n}\sum_i (p_i - y_i)\,x_i = \frac{1}{n} X^\top (p - y)$.


# %%
def sigmoid(z):
    return 0.5 * (1 + np.tanh(z / 2))  # the same function; no exp that could overflow


def binary_cross_entropy(z, y):
    """Mean of log(1 + e^z) - y z, with an exponent that is never positive."""
    return np.mean(np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z))) - y * z)


def binary_gradient(w, b, X, y):
    dz = (sigmoid(X @ w + b) - y) / len(y)  # (n,): claimed minus true, over n
    return X.T @ dz, dz.sum()  # dw (d,), db


# %% [markdown]
# The loss in the code looks different from the one in the text. Put $\log p = z - \log(1+e^z)$
# and $\log(1-p) = -\log(1+e^z)$ into $L$ and collect terms: $L = \log(1+e^z) - yz$. It is the
# same number, without the logarithm of something that rounds to zero. Its derivative is
# $\sigma(z) - y$ at once, with nothing to cancel.
#
# **A guess first.** At $w = 0$ every $p$ is one half. What does $-dw$, the direction of the very
# first step, look like as an image?

# %%
dw, db = binary_gradient(np.zeros(64), 0.0, X2, y2)
mean_three, mean_eight = X2[y2 == 0].mean(axis=0), X2[y2 == 1].mean(axis=0)
panels = {"mean three": mean_three, "mean eight": mean_eight, "first step: $-dw$": -dw}

fig, axes = tl.plots.subplots(1, 3, figsize=(7, 2.5))
for ax, (title, panel) in zip(axes, panels.items(), strict=True):
    top = np.abs(panel).max()
    ax.imshow(panel.reshape(8, 8), cmap="PuOr_r", vmin=-top, vmax=top)
    ax.set_title(title)
    ax.axis("off")
words = "Mean three, mean eight, and minus the gradient: positive at the left of both loops."
tl.plots.alt(fig, words)

# %% [markdown]
# (Orange: more ink there says "eight". Violet: more ink says "three".) The gradient found the
# difference between a three and an eight: the two strokes on the left that close the loops. It
# had to: with $p - y = \pm\frac12$, the formula says "half the eights minus half the threes".

# %%
half_the_difference = 0.5 * (y2 @ X2 - (1 - y2) @ X2) / len(y2)
np.testing.assert_allclose(-dw, half_the_difference, atol=1e-12)

# %% [markdown]
# ## The first referee: finite differences
#
# How do you know that a derivation is right? Ask the loss itself. Move one number by a small $h$
# to either side and look how the loss changes. Taylor's theorem says what you get:
#
# $$f(\theta \pm h) = f \pm h f' + \tfrac{h^2}{2} f'' \pm \tfrac{h^3}{6} f''' + \dots
# \quad\Longrightarrow\quad \frac{f(\theta+h) - f(\theta-h)}{2h} = f' + \tfrac{h^2}{6} f''' + \dots$$
#
# The even terms cancel: that is why we look to both sides. What is left, $\frac{h^2}{6} f'''$,
# shrinks with $h$. So take $h$ tiny?
#
# No. The computer stores numbers to a relative precision $\varepsilon \approx 2 \cdot 10^{-16}$
# (float64). Each of the two losses is wrong by about $\varepsilon |f|$, and we divide by $h$. The
# two errors pull in opposite directions:
#
# $$E(h) \approx \underbrace{\frac{\varepsilon\,|f|}{h}}_{\text{rounding}} + \underbrace{\frac{h^2}{6}\,|f'''|}_{\text{Taylor}},
# \qquad E'(h) = -\frac{\varepsilon\,|f|}{h^2} + \frac{h}{3}\,|f'''| = 0 \;\Rightarrow\; h^3 = 3\,\varepsilon\,\frac{|f|}{|f'''|}.$$
#
# If $f$ and $f'''$ are of similar size, $h \approx \varepsilon^{1/3} \approx 6 \cdot 10^{-6}$.

# %%
STEP = np.finfo(np.float64).eps ** (1 / 3)  # 6e-6


def finite_difference(loss, theta, h=STEP):
    """Central differences of loss() in each entry of theta, which is moved and put back."""
    gradient = np.zeros_like(theta)
    for index in np.ndindex(theta.shape):
        kept = theta[index]
        theta[index] = kept + h
        above = loss()
        theta[index] = kept - h
        below = loss()
        theta[index] = kept
        gradient[index] = (above - below) / (2 * h)
    return gradient


# %% [markdown]
# "Wrong by $10^{-6}$" means nothing without a scale, so we compare relative to the size of the
# gradient:


# %% tags=["nbval-check-output"]
def relative_error(a, b):
    """Largest difference over largest entry; 0 if both are zero everywhere."""
    scale = max(np.abs(a).max(), np.abs(b).max())
    return np.abs(a - b).max() / scale if scale > 0 else 0.0


w, b = rng.normal(size=64), 0.3
dw, db = binary_gradient(w, b, X2, y2)
error = relative_error(dw, finite_difference(lambda: binary_cross_entropy(X2 @ w + b, y2), w))
print("dw agrees with finite differences to 1e-6:", error < 1e-6)
assert error < 1e-6

# %% [markdown]
# Now watch the two errors fight. To draw them we need one number, so walk along one random
# direction $v$ of length 1: with $f(t) = L(w + t v)$, the slope at $t = 0$ is $dw \cdot v$. One
# arm of the curve will be smooth and one ragged. **Guess which.**

# %%
v = rng.normal(size=64)
v /= np.linalg.norm(v)


def slope_errors(steps, dtype=np.float64):
    """Relative error of the two-sided and of the one-sided slope along v, for each step size."""
    wt, vt, Xt, yt = (array.astype(dtype) for array in (w, v, X2, y2))

    def f(t):
        return np.float64(binary_cross_entropy(Xt @ (wt + dtype(t) * vt) + dtype(b), yt))

    two_sided = np.array([(f(h) - f(-h)) / (2 * h) for h in steps])
    one_sided = np.array([(f(h) - f(0)) / h for h in steps])
    return np.abs(two_sided / (dw @ v) - 1), np.abs(one_sided / (dw @ v) - 1)


# %% [markdown]
# The formula for $E(h)$ can be drawn, too. All it needs is $f'''$, and that has a closed form
# here: each image adds $\sigma''(z)\,(x \cdot v)^3$ to it, with $\sigma'' = p\,(1-p)(1-2p)$.

# %%
p, along = sigmoid(X2 @ w + b), X2 @ v
third = abs(np.mean(p * (1 - p) * (1 - 2 * p) * along**3))
loss, eps = binary_cross_entropy(X2 @ w + b, y2), np.finfo(np.float64).eps

steps = np.logspace(-14, 0, 85)
predicted = (eps * loss / steps + steps**2 / 6 * third) / abs(dw @ v)
best = (3 * eps * loss / third) ** (1 / 3)
print(f"predicted best step: {best:.0e}, against eps^(1/3) = {STEP:.0e}")

# %%
two_sided, one_sided = slope_errors(steps)
two_sided32, _ = slope_errors(steps, np.float32)

fig, ax = tl.plots.subplots(figsize=(7.5, 4))
ax.loglog(steps, two_sided32, color=tl.plots.palette[5], lw=1, ls="-", label="two-sided, float32")
ax.loglog(steps, one_sided, color=GREEN, lw=1, ls="-", label="one-sided, float64")
ax.loglog(steps, two_sided, color=BLUE, lw=2, ls="-", label="two-sided, float64")
ax.loglog(steps, predicted, color="black", ls=":", label="the formula for E(h)")
ax.axvline(STEP, color="black", ls="--", lw=0.8)
ax.text(STEP / 1.6, 2, r"$\varepsilon^{1/3}$", ha="right")
ax.set(xlabel="step size h", ylabel="relative error of the slope", ylim=(1e-13, 10))
ax.legend(loc="lower left", fontsize=9)
words = "Each curve is a V on logarithmic axes: ragged on the left, straight on the right."
tl.plots.alt(ax, words)

# %% [markdown]
# A V, and the formula lies on it. The right arm is Taylor: a straight line, and a step ten times
# smaller makes the error a hundred times smaller (two-sided) or ten times (one-sided). The left
# arm is rounding: ragged, because rounding errors are as good as random.
#
# The bottom is where the formula puts it. Here the loss is smooth, $f'''$ is far smaller than
# $f$, and so the best $h$ is some twenty times *larger* than $\varepsilon^{1/3}$. You rarely know
# $f'''$, and need not: the V is wide, and anything near $\varepsilon^{1/3}$ is good to $10^{-6}$
# and better. In float32 the whole V moves up, by more than four orders of magnitude at the
# bottom, and below $h = 10^{-8}$ the step is lost altogether: $w + h$ *is* $w$, the measured
# slope is 0, its error 1. That is why gradients are checked in float64.

# %% tags=["nbval-check-output"]
near = np.abs(np.log10(steps / STEP)) < 0.5  # within a factor of three of eps^(1/3)
print("near eps^(1/3) the error is below 1e-6:", two_sided[near].max() < 1e-6)
assert two_sided[near].max() < 1e-6
assert np.median(two_sided[steps < 1e-11]) > 100 * two_sided[near].max()  # rounding
assert two_sided[-1] > 100 * two_sided[near].max()  # Taylor
assert two_sided32.min() > 100 * two_sided.min()
right_arm = (steps > 1e-3) & (steps < 1e-1)
np.testing.assert_allclose(two_sided[right_arm], predicted[right_arm], rtol=0.2)

# %% [markdown]
# ## The second referee: autograd
#
# PyTorch walks the same graph and multiplies the same local slopes, with no $h$ anywhere. It
# should agree with us to rounding.

# %% tags=["nbval-check-output"]
wt = torch.tensor(w, requires_grad=True)
bt = torch.tensor(b, dtype=torch.float64, requires_grad=True)
logits = torch.tensor(X2) @ wt + bt
F.binary_cross_entropy_with_logits(logits, torch.tensor(y2)).backward()

error = relative_error(dw, wt.grad.numpy())
print("dw agrees with autograd to 1e-10:", error < 1e-10)
assert error < 1e-10 and abs(db - bt.grad.item()) < 1e-10

# %% [markdown]
# Two referees because each has a blind spot. Finite differences need nothing but the loss, but
# are slow (two losses per weight) and only good to some eight digits. Autograd is exact to
# rounding, but it differentiates the program that *you* wrote in PyTorch: put the same mistake
# into both, and it agrees.
#
# ## Many classes: softmax
#
# Ten digits, ten logits $z_1 \dots z_K$, and
#
# $$p_k = \frac{e^{z_k}}{\sum_j e^{z_j}}, \qquad L = -\sum_k y_k \log p_k,$$
#
# where $y$ is the one-hot truth (or any other numbers that sum to one, such as smoothed labels).
#
# **First, make it safe.** $e^{1000}$ overflows. But adding a constant $a$ to all logits changes
# nothing, as $e^{a}$ cancels from the fraction. Choose $a = -\max_j z_j$: the largest exponent is
# then $0$, the sum lies between $1$ and $K$, and its logarithm is harmless.
#
# $$\mathrm{lse}(z) = \log \sum_j e^{z_j} = \max_j z_j + \log \sum_j e^{z_j - \max z}, \qquad \log p_k = z_k - \mathrm{lse}(z).$$


# %%
def logsumexp(Z):
    """log of the sum of exp, along each row: (n, K) -> (n, 1)."""
    top = Z.max(axis=1, keepdims=True)  # the row's own maximum
    return top + np.log(np.exp(Z - top).sum(axis=1, keepdims=True))


def softmax(Z):
    return np.exp(Z - logsumexp(Z))


def cross_entropy(Z, Y):
    """Mean over the rows of -sum_k y_k log p_k. Z: logits (n, K); Y: (n, K), rows sum to 1."""
    return -np.mean(np.sum(Y * (Z - logsumexp(Z)), axis=1))


# %% tags=["nbval-check-output"]
Z = np.array([[1000.0, 0.0, -1000.0]])
Y = np.array([[0.0, 1.0, 0.0]])
with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
    naive = -np.log(np.exp(Z) / np.exp(Z).sum())[0, 1]
print("naive:", naive, " stable:", cross_entropy(Z, Y))
assert cross_entropy(Z, Y) == 1000.0 and not np.isfinite(naive)

# %% [markdown]
# **Now the gradient, the short way.** Since the $y_k$ sum to one,
# $L = -\sum_k y_k (z_k - \mathrm{lse}(z)) = \mathrm{lse}(z) - \sum_k y_k z_k$. And the slope of
# lse is the softmax itself:
#
# $$\frac{\partial\,\mathrm{lse}}{\partial z_k} = \frac{e^{z_k}}{\sum_j e^{z_j}} = p_k
# \qquad\Longrightarrow\qquad dz_k = p_k - y_k.$$
#
# **The long way**, as most books walk it. The quotient rule gives the softmax's own derivatives,
#
# $$\frac{\partial p_j}{\partial z_k} = \frac{[j = k]\, e^{z_k} \sum_i e^{z_i} - e^{z_j} e^{z_k}}{(\sum_i e^{z_i})^2} = p_j\,([j = k] - p_k),$$
#
# ($[j=k]$ is 1 if $j$ equals $k$, else 0), and then the chain rule sums over every path from
# $z_k$ through a $p_j$ to the loss:
#
# $$dz_k = \sum_j -\frac{y_j}{p_j} \cdot p_j\,([j=k] - p_k) = -y_k + p_k \sum_j y_j = p_k - y_k.$$
#
# Both end where the binary case ended: **claimed minus true**, once per class.

# %% tags=["nbval-check-output"]
z, y = np.array([[2.0, 1.0, -1.0]]), np.array([[0.0, 1.0, 0.0]])
p = softmax(z)[0]
jacobian = np.diag(p) - np.outer(p, p)  # entry (j, k): dp_j / dz_k
long_way = (-y[0] / p) @ jacobian
by_difference = finite_difference(lambda: cross_entropy(z, y), z)[0]
print("claimed p    ", p.round(3))
print("true y       ", y[0])
print("gradient p-y ", (p - y[0]).round(3), " sums to", abs((p - y).sum()).round(12))
np.testing.assert_allclose(long_way, p - y[0], atol=1e-12)
np.testing.assert_allclose(by_difference, p - y[0], atol=1e-8)

# %% [markdown]
# The entries sum to zero: what the true class gains, the others pay, each in proportion to the
# probability it had claimed without being entitled to it. The binary case is the same thing with
# two logits and only their difference $z = z_1 - z_0$ kept:

# %%
scores = rng.normal(size=(5, 2))
np.testing.assert_allclose(softmax(scores)[:, 1], sigmoid(scores[:, 1] - scores[:, 0]), rtol=1e-12)

# %% [markdown]
# ## The head
#
# The head is linear: $z_{ik} = \sum_j V_{kj}\, h_{ij} + c_k$ for image $i$, class $k$, feature
# $j$. From here on $dZ$ is the gradient of the *mean* loss, so it carries the $1/n$ and nobody
# after it needs to think of it again:
#
# $$dZ = \tfrac{1}{n} (P - Y).$$
#
# Which entries of $Z$ does the single weight $V_{kj}$ touch? Column $k$, in every row $i$, with
# slope $h_{ij}$. Sum over what it touches:
#
# $$dV_{kj} = \sum_i dz_{ik}\, h_{ij} \;\Rightarrow\; dV = dZ^\top H, \qquad dc_k = \sum_i dz_{ik}.$$
#
# And which does the single feature $h_{ij}$ touch? Row $i$, in every class $k$, with slope
# $V_{kj}$:
#
# $$dh_{ij} = \sum_k dz_{ik}\, V_{kj} \;\Rightarrow\; dH = dZ\, V.$$
#
# Remember these as **two products per linear layer**. One, $dZ^\top H$, feeds the *weight*. The
# other, $dZ\,V$, feeds *whatever lies below*. They have the same cost and are independent of each
# other: you may skip one and keep the other. The whole economy of transfer learning is in that
# sentence.
#
# Shapes help the memory. $dV$ must be $(K, m)$; you hold $dZ\;(n, K)$ and $H\;(n, m)$. There is
# only one way to multiply them.


# %% tags=["nbval-check-output"]
def head_gradients(V, c, H, Y):
    """Gradients of the mean cross-entropy of logits H V^T + c."""
    dZ = (softmax(H @ V.T + c) - Y) / len(Y)  # (n, K)
    return {"V": dZ.T @ H, "c": dZ.sum(axis=0), "H": dZ @ V}


head = {"V": 0.1 * rng.normal(size=(10, 64)), "c": np.zeros(10)}
H, Y = images[:64].copy(), np.eye(10)[digits[:64]]  # for now the pixels are the features
by_hand = head_gradients(head["V"], head["c"], H, Y)
for name, theta in {**head, "H": H}.items():
    by_difference = finite_difference(lambda: cross_entropy(H @ head["V"].T + head["c"], Y), theta)
    assert relative_error(by_hand[name], by_difference) < 1e-6, name
    print(f"d{name} {by_hand[name].shape}: agrees")

# %% [markdown]
# What does $p - y$ look like when it is at work? We train this head for 200 steps with our own
# gradient and then look at three images of the rest of the data: the one it is surest about and
# right, the one it is least sure about, and the one it is surest about and wrong.

# %%
for _ in range(200):
    gradients = head_gradients(head["V"], head["c"], images[:500], np.eye(10)[digits[:500]])
    for name in head:
        head[name] -= 0.5 * gradients[name]

P = softmax(images[500:] @ head["V"].T + head["c"])
truth, sure = digits[500:], P.max(axis=1)
right = P.argmax(axis=1) == truth
print(f"accuracy on the other {len(truth)} images: {right.mean():.2f}")
chosen = {"sure, right": np.argmax(sure * right), "unsure": np.argmin(sure)}
chosen["sure, wrong"] = np.argmax(sure * ~right)

# %%
fig, axes = tl.plots.subplots(2, 3, figsize=(9, 3.9), sharey="row")
for (upper, lower), (title, i) in zip(axes.T, chosen.items(), strict=True):
    error = P[i] - np.eye(10)[truth[i]]
    upper.imshow(images[500 + i].reshape(8, 8), cmap="Greys")
    upper.set_title(f"{title}: a {truth[i]}, read as {P[i].argmax()}")
    upper.axis("off")
    lower.bar(range(10), error, color=np.where(error > 0, ORANGE, BLUE))
    lower.axhline(0, color="black", lw=0.8)
    lower.set(xticks=range(10), xlabel="class", ylim=(-1.1, 1.1))
axes[1, 0].set_ylabel("p - y")
words = "Bars of p - y below three digits: none; one down and many small up; one down and one up."
tl.plots.alt(fig, words)

# %% [markdown]
# Left: nothing to learn, so no gradient, and no change to any weight of the network. Middle: a
# push up for the 8, paid for by every class that claimed a part. Right: a full push up for the
# truth and down for the one false claim. Learning is spent where the model is wrong. (It also
# means that one mislabelled image, which a good model finds "sure, wrong", pushes as hard as an
# image can.)
#
# ## The backbone
#
# Two layers with a ReLU each. Nothing new is needed: the linear layer you have just done, and the
# ReLU, $h = \max(u, 0)$, whose slope is 1 where $u > 0$ and 0 where $u < 0$. It lets the gradient
# through or it does not:
#
# $$dU = dH \odot [\,U > 0\,],$$
#
# with $\odot$ the product entry by entry. (At exactly $u = 0$ there is no derivative. We take 0,
# like PyTorch.)
#
# Now follow the orange arrows of the picture from right to left and write down what you pass:
#
# $$\begin{aligned}
# dZ &= \tfrac1n (P - Y) & dV &= dZ^\top H_2 & dc &= \mathbf{1}^\top dZ \\
# dH_2 &= dZ\, V \\
# dU_2 &= dH_2 \odot [U_2 > 0] & dW_2 &= dU_2^\top H_1 & db_2 &= \mathbf{1}^\top dU_2 \\
# dH_1 &= dU_2\, W_2 \\
# dU_1 &= dH_1 \odot [U_1 > 0] & dW_1 &= dU_1^\top X & db_1 &= \mathbf{1}^\top dU_1
# \end{aligned}$$
#
# The left column is the way down, the middle and right columns are the branches
# ($\mathbf{1}^\top$ adds up the rows, that is, the images). For one single image and with
# everything put in,
#
# $$dW_1 = \Big[\, W_2^\top \big( V^\top (p - y) \odot [u_2 > 0] \big) \odot [u_1 > 0] \,\Big]\; x^\top.$$
#
# Read from the inside out: the error, seen through the head, gated, seen through layer 2, gated,
# times what came in. In the code, `link` is what turns logits into probabilities: here the
# softmax.


# %%
def forward(net, X):
    """All values of the picture, by name. X: (n, d)."""
    U1 = X @ net["W1"].T + net["b1"]
    H1 = np.maximum(U1, 0)
    U2 = H1 @ net["W2"].T + net["b2"]
    H2 = np.maximum(U2, 0)
    Z = H2 @ net["V"].T + net["c"]
    return {"X": X, "U1": U1, "H1": H1, "U2": U2, "H2": H2, "Z": Z}


# %%
def backward(net, values, Y, link=softmax):
    """Gradient of the mean cross-entropy for every weight. Y: the truth, (n, K)."""
    dZ = (link(values["Z"]) - Y) / len(Y)  # (n, K)
    dH2 = dZ @ net["V"]  # (n, m)
    dU2 = dH2 * (values["U2"] > 0)
    dH1 = dU2 @ net["W2"]
    dU1 = dH1 * (values["U1"] > 0)
    return {
        "W1": dU1.T @ values["X"], "b1": dU1.sum(axis=0),
        "W2": dU2.T @ values["H1"], "b2": dU2.sum(axis=0),
        "V": dZ.T @ values["H2"], "c": dZ.sum(axis=0),
    }  # fmt: skip


# %% [markdown]
# Twelve lines, and nothing but numpy. The referees look at all 1,482 derivatives:


# %%
def make_network(rng, d=64, m=16, K=10):
    """Random weights, and random biases too: no check should stand at a zero."""
    shapes = {"W1": (m, d), "b1": (m,), "W2": (m, m), "b2": (m,), "V": (K, m), "c": (K,)}
    return {name: rng.normal(size=shape) / shape[-1] ** 0.5 for name, shape in shapes.items()}


def autograd(net, X, Y, loss=F.cross_entropy):
    """The same gradients by PyTorch, in float64."""
    t = {name: torch.tensor(value, requires_grad=True) for name, value in net.items()}
    hidden = torch.relu(F.linear(torch.tensor(X), t["W1"], t["b1"]))
    hidden = torch.relu(F.linear(hidden, t["W2"], t["b2"]))
    loss(F.linear(hidden, t["V"], t["c"]), torch.tensor(Y)).backward()
    return {name: value.grad.numpy() for name, value in t.items()}


# %%
net, X = make_network(np.random.default_rng(1)), images[:64]
by_hand, by_torch = backward(net, forward(net, X), Y), autograd(net, X, Y)
print("weight   shape      finite differences   autograd   (relative errors)")
for name, theta in net.items():
    by_difference = finite_difference(lambda: cross_entropy(forward(net, X)["Z"], Y), theta)
    first = relative_error(by_hand[name], by_difference)
    second = relative_error(by_hand[name], by_torch[name])
    assert first < 1e-6 and second < 1e-10, name
    print(f"{name:8s} {theta.shape!s:10s} {first:.0e}                {second:.0e}")

# %% [markdown]
# Every number in the network has now been differentiated by you. And the binary case? The loss
# enters in the line of $dZ$ and nowhere else. For one output (an eight or not?) $V$ has a single
# row, and the link is the sigmoid. All other lines stay.

# %% tags=["nbval-check-output"]
one_output = make_network(np.random.default_rng(1), K=1)
is_eight = (digits[:64, None] == 8).astype(float)  # (n, 1)
by_hand = backward(one_output, forward(one_output, X), is_eight, link=sigmoid)
by_torch = autograd(one_output, X, is_eight, loss=F.binary_cross_entropy_with_logits)


def binary_loss():
    return binary_cross_entropy(forward(one_output, X)["Z"], is_eight)


for name, theta in one_output.items():
    assert relative_error(by_hand[name], finite_difference(binary_loss, theta)) < 1e-6, name
    assert relative_error(by_hand[name], by_torch[name]) < 1e-10, name
print("the binary network agrees with both referees")

# %% [markdown]
# **Guess 1.** A new head starts at zero. Which backbone weights move in the first step? Look at
# the line $dH_2 = dZ\,V$.

# %% tags=["nbval-check-output"]
fresh = {**net, "V": np.zeros((10, 16)), "c": np.zeros(10)}
first_step = backward(fresh, forward(fresh, X), Y)
for name, gradient in first_step.items():
    print(name, "moves" if gradient.any() else "gets no gradient")
assert not any(first_step[name].any() for name in ("W1", "b1", "W2", "b2"))
assert first_step["V"].any()

# %% [markdown]
# None of them. Everything that the backbone learns comes through $V$, and a zero head passes
# nothing on. After one step the head is no longer zero and the shield is gone. A *random* head
# does the opposite: it sends random messages down from the first step on, which is the trouble
# that lesson 08 is about.
#
# ## Freezing: which terms vanish
#
# Freeze the backbone, and $dW_1$, $db_1$, $dW_2$ and $db_2$ are not wanted. But then nobody asks
# for $dU_1$, $dH_1$, $dU_2$ and $dH_2$ either: they were only ever steps on the way.

# %%
ax = draw_network(["V"], "Backbone frozen, head trained: one product is left")
tl.plots.alt(ax, "The same graph; orange are only the arrows from L to Z and from Z down to V.")

# %% [markdown]
# Now the opposite: train *only the first layer*, and freeze everything above it. The gradient has
# to come all the way down.

# %%
ax = draw_network(["W1"], "Only the first layer trained: the whole way back is needed")
tl.plots.alt(ax, "The same graph; orange is every arrow from L back to U1, and the one down to W1.")

# %% [markdown]
# So the rule is not "cost goes with the number of trained weights". It is:
#
# > A **weight product** $dU^\top H$ is needed where the layer itself is trained.
# >
# > An **input product** $dU\,W$ is needed where *anything below* is trained.
#
# **Count them.** A linear layer with $i$ inputs and $o$ outputs takes $n \cdot i \cdot o$
# multiplications forward, as many for its weight product, and as many for its input product.
# (ReLUs and biases cost less than a hundredth of that; we leave them out.) With
# $t_\ell = n\, i_\ell\, o_\ell$,
#
# $$\text{forward} = \sum_\ell t_\ell, \qquad
# \text{weight products} = \sum_{\ell\ \text{trained}} t_\ell, \qquad
# \text{input products} = \sum_{\ell\ >\ \text{lowest trained}} t_\ell.$$


# %%
def multiplications(widths, trained, n):
    """Products in one step of a network widths[0] -> widths[1] -> ...; layer 0 is the lowest."""
    cost = [n * i * o for i, o in pairwise(widths)]
    return {
        "forward": sum(cost),
        "weight": sum(cost[layer] for layer in trained),
        "input": sum(cost[min(trained) + 1 :]),
    }


widths, n = (64, 512, 512, 10), 256
arms = {"everything": (0, 1, 2), "layer 2 and head": (1, 2), "head only": (2,)}
arms["layer 1 only"] = (0,)
print("head only:", multiplications(widths, arms["head only"], n))

# %% [markdown]
# A formula is a claim, too. PyTorch can count the multiplications it really does (it counts two
# floating-point operations, one multiply and one add, for each). **Guess 2** gets its answer
# here.


# %%
def build(widths, trained):
    layers = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers += [torch.nn.Linear(a, b).requires_grad_(i in trained), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])  # no ReLU after the logits


def counted(model, n, d=64):
    """Multiplications that PyTorch does: (forward, backward)."""
    inputs, targets = torch.zeros(n, d), torch.zeros(n, dtype=torch.long)
    with FlopCounterMode(display=False) as ahead:
        loss = F.cross_entropy(model(inputs), targets)
    with FlopCounterMode(display=False) as back:
        loss.backward()
    return ahead.get_total_flops() // 2, back.get_total_flops() // 2


# %% tags=["nbval-check-output"]
costs = {name: multiplications(widths, trained, n) for name, trained in arms.items()}
full_step = sum(costs["everything"].values())
entries = [i * o for i, o in pairwise(widths)]
print("trained            weights   forward  backward   whole step")
for name, trained in arms.items():
    ahead, back = costs[name]["forward"], costs[name]["weight"] + costs[name]["input"]
    assert counted(build(widths, trained), n) == (ahead, back)
    share, step = sum(entries[i] for i in trained) / sum(entries), (ahead + back) / full_step
    print(f"{name:18s} {share:7.1%} {ahead // n:9,d} {back // n:9,d} {step:12.0%}")

# %% [markdown]
# The formula is not nearly right, it is exactly right. (Forward and backward are printed per
# image.) Read the table:
#
# - **Everything** costs three forward passes: one forward, and two backward (less the first
#   layer's input product, which nobody needs).
# - **Head only**: the backward pass falls from 567,296 multiplications to 5,120, which is 111
#   times less. But the forward pass is still there, so the *step* is cheaper by a factor of 2.8.
#   "About 3" was the right guess, and 3 is the limit, however much you freeze.
# - **Layer 1 only** trains a tenth of the weights, and costs *more* than **layer 2 and head**,
#   which train the other nine tenths. What counts is how far down the gradient has to go.
#
# To get below a third you must stop paying for the forward pass, too. A frozen backbone gives the
# same features for the same image every time: compute them once and keep them. That is lesson 05.

# %% tags=["nbval-check-output"]
full, head_only = costs["everything"], costs["head only"]
backward_ratio = (full["weight"] + full["input"]) / (head_only["weight"] + head_only["input"])
step_ratio = sum(full.values()) / sum(head_only.values())
print(f"head only: backward {backward_ratio:.0f} times cheaper, the step {step_ratio:.1f} times")
assert backward_ratio > 100 and 2.5 < step_ratio < 3
assert sum(costs["layer 1 only"].values()) > sum(costs["layer 2 and head"].values())

# %% [markdown]
# And on the clock? Counts are exact and times are not, so nothing is claimed here: memory traffic
# and the other programs on your machine have their say. But the order should look familiar.


# %%
def milliseconds(model, n, repeats=15):
    inputs, targets, times = torch.rand(n, 64), torch.zeros(n, dtype=torch.long), []
    for _ in range(repeats):
        started = time.perf_counter()
        F.cross_entropy(model(inputs), targets).backward()
        times.append(1000 * (time.perf_counter() - started))
    return np.median(times)


for name, trained in arms.items():
    print(f"{name:18s} {milliseconds(build(widths, trained), n):5.1f} ms a step, one thread")

# %% [markdown]
# ## The weight-decay term
#
# Lesson 02 added $\frac{\lambda}{2}\lVert\theta\rVert^2 = \frac{\lambda}{2}\sum_j \theta_j^2$ to
# the loss. Its derivative is the easiest of the lesson: only one term of the sum holds
# $\theta_j$, so
#
# $$\frac{\partial}{\partial \theta_j}\Big(L + \frac{\lambda}{2}\lVert\theta\rVert^2\Big) = d\theta_j + \lambda\,\theta_j .$$
#
# It needs no data, no chain rule and no backward pass. Every weight is pulled towards zero (with
# L2-SP: towards its pre-trained value), whatever the images say.

# %%
decay = 0.1


def penalised_loss():
    return cross_entropy(forward(net, X)["Z"], Y) + decay / 2 * np.sum(net["W2"] ** 2)


decayed = backward(net, forward(net, X), Y)["W2"] + decay * net["W2"]
assert relative_error(decayed, finite_difference(penalised_loss, net["W2"])) < 1e-6

# %% [markdown]
# "No backward pass" has a sting. Two ways to freeze a weight look alike: switch its gradient
# *off* (`requires_grad = False`), or set its gradient to *zero* before each step. **Guess:**
# after 100 steps of SGD with weight decay 0.1, are both weights where they were?

# %% tags=["nbval-check-output"]
switched_off, zeroed = torch.ones(3, requires_grad=False), torch.ones(3, requires_grad=True)
optimizer = torch.optim.SGD([switched_off, zeroed], lr=0.1, weight_decay=0.1)
for _ in range(100):
    zeroed.grad = torch.zeros(3)  # "frozen", or so it seems
    optimizer.step()
print(f"switched off: {switched_off[0].item():.3f}   gradient set to zero: {zeroed[0].item():.3f}")
assert torch.equal(switched_off, torch.ones(3)) and zeroed[0] < 0.5

# %% [markdown]
# The second weight has lost 63 % of its size without seeing a single image:
# $(1 - 0.1 \cdot 0.1)^{100} = 0.366$. A zero gradient is a gradient; decay is added to it. No
# gradient is none, and the optimizer passes the weight over. `tl.freeze` switches off.
#
# ## LoRA: the gradient of two thin matrices
#
# LoRA (Hu et al. 2021, section 4.1) keeps the pre-trained $W_0$ of a linear layer and learns a
# correction of low rank $r$:
#
# $$W = W_0 + s\,B A, \qquad s = \frac{\alpha}{r}, \qquad B: (o, r), \quad A: (r, i).$$
#
# Call the gradient that full fine-tuning would have given to $W$ by its usual name,
# $dW = dU^\top H$, shape $(o, i)$. Written out, $W_{ab} = W_{0,ab} + s \sum_q B_{aq} A_{qb}$. The
# entry $B_{aq}$ touches row $a$ of $W$, in every column $b$, with slope $s A_{qb}$; the entry
# $A_{qb}$ touches column $b$, in every row $a$, with slope $s B_{aq}$. Sum over what is touched,
# as always:
#
# $$dB_{aq} = s \sum_b dW_{ab} A_{qb} \;\Rightarrow\; dB = s\; dW A^\top, \qquad
# dA_{qb} = s \sum_a B_{aq}\, dW_{ab} \;\Rightarrow\; dA = s\; B^\top dW .$$
#
# Each factor gets the full gradient *seen through the other factor*. And **guess 3** is answered
# by looking: with $B = 0$, $dA = 0$, while $dB = s\,dW A^\top$ is alive. Were both zero, both
# gradients would be zero, and would stay so for ever.
#
# In practice $dW$, the big $(o, i)$ matrix, is never formed. Put $dW = dU^\top H$ in and move the
# brackets:
#
# $$dB = s\; dU^\top (H A^\top), \qquad dA = s\; (dU\, B)^\top H .$$

# %%
rank, alpha = 4, 8
s = alpha / rank
A, B = rng.normal(size=(rank, 16)) / 4, np.zeros((16, rank))
lora = {"A": A, "B": B}  # B at zero: the model starts unchanged


def with_lora(net, lora):
    """The network with W2 replaced by W0 + s B A."""
    return {**net, "W2": net["W2"] + s * lora["B"] @ lora["A"]}


# %%
def lora_gradients(net, lora, X, Y):
    values = forward(with_lora(net, lora), X)
    dZ = (softmax(values["Z"]) - Y) / len(Y)
    dU2 = (dZ @ net["V"]) * (values["U2"] > 0)  # (n, o)
    H1 = values["H1"]  # (n, i)
    return {"A": s * (dU2 @ lora["B"]).T @ H1, "B": s * dU2.T @ (H1 @ lora["A"].T)}


# %%
def lora_autograd(net, lora, X, Y):
    t = {name: torch.tensor(value) for name, value in net.items()}
    A, B = (torch.tensor(lora[name], requires_grad=True) for name in "AB")
    hidden = torch.relu(F.linear(torch.tensor(X), t["W1"], t["b1"]))
    hidden = torch.relu(F.linear(hidden, t["W2"] + s * B @ A, t["b2"]))
    F.cross_entropy(F.linear(hidden, t["V"], t["c"]), torch.tensor(Y)).backward()
    return {"A": A.grad.numpy(), "B": B.grad.numpy()}


# %%
def lora_loss():
    return cross_entropy(forward(with_lora(net, lora), X)["Z"], Y)


for moment in ("first step, B = 0", "later, B not 0"):
    by_hand, by_torch = lora_gradients(net, lora, X, Y), lora_autograd(net, lora, X, Y)
    for name, theta in lora.items():
        assert relative_error(by_hand[name], finite_difference(lora_loss, theta)) < 1e-6, name
        assert relative_error(by_hand[name], by_torch[name]) < 1e-10, name
    sizes = ", ".join(f"d{name} {np.abs(by_hand[name]).max():.3f}" for name in lora)
    print(f"{moment}: both agree; largest entries: {sizes}")
    lora["B"] = 0.3 * rng.normal(size=(16, rank))

# %% [markdown]
# Both referees agree, at the start and later. The first line says what was promised: $dA$ is
# exactly zero.
#
# What does the first step do to the *function*? $A$ stays, $B$ becomes $-\eta\, dB$ (with
# learning rate $\eta$), so
#
# $$\Delta W = s\,B A = -\eta\, s^2\; dW\, A^\top A .$$
#
# Full fine-tuning would have done $-\eta\, dW$. LoRA does the same, *seen through*
# $s^2 A^\top A$: of all the directions in which the inputs of the layer can vary, only the $r$
# random ones in $A$ get an answer. That is what a low rank costs. And the scale $s = \alpha / r$
# acts like a learning rate, squared.

# %%
start = {"A": lora["A"], "B": np.zeros((16, rank))}
dB = lora_gradients(net, start, X, Y)["B"]
dW = backward(net, forward(net, X), Y)["W2"]
lora_step = s * (-0.1 * dB) @ start["A"]  # what one step with learning rate 0.1 does to W
full_update = -0.1 * dW
np.testing.assert_allclose(lora_step, s**2 * full_update @ start["A"].T @ start["A"], atol=1e-12)
ranks = [np.linalg.matrix_rank(update) for update in (full_update, lora_step)]
print(f"rank of the full update: {ranks[0]}, of LoRA's: {ranks[1]}")
assert ranks[1] == rank < ranks[0]

neither = lora_gradients(net, {"A": 0 * A, "B": 0 * B}, X, Y)  # both factors at zero
assert not neither["A"].any() and not neither["B"].any()

# %% [markdown]
# ### What LoRA saves, and what it does not
#
# Give both backbone layers of the wide network LoRA of rank 4, and train that and the head: less
# than 4 % of the weights. **Guess:** how much of a full training step is left?
#
# The rule has the answer. The weight products of the frozen matrices are gone. But the gradient
# still has to travel *down to the first layer's* $A$ and $B$, through every frozen matrix on its
# way.


# %%
class LoRALinear(torch.nn.Module):
    """A frozen linear layer plus B A; the scale is left out, as it costs next to nothing."""

    def __init__(self, inputs, outputs, rank):
        super().__init__()
        self.frozen = torch.nn.Linear(inputs, outputs).requires_grad_(False)
        self.A = torch.nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.B = torch.nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, h):
        return self.frozen(h) + F.linear(F.linear(h, self.A), self.B)


# %%
d, m, K = widths[0], widths[1], widths[3]
thin = rank * (d + m) + rank * (m + m)  # entries of A and B, both layers
lora_cost = {
    "forward": n * (d * m + m * m + m * K + thin),
    "weight": n * (thin + m * K),  # dA, dB and dV
    "input": n * (m * K + m * m + 3 * rank * m),  # through V, W2, and inside the thin branches
}
layers = [LoRALinear(d, m, rank), LoRALinear(m, m, rank), torch.nn.Linear(m, K)]
model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
assert counted(model, n) == (lora_cost["forward"], lora_cost["weight"] + lora_cost["input"])

# %% tags=["nbval-check-output"]
trained_share = (thin + m * K) / (sum(entries) + thin)
step_share = sum(lora_cost.values()) / full_step
print(
    f"LoRA trains {trained_share:.1%} of the weights; a step costs {step_share:.0%} of a full one"
)
assert 0.6 < step_share < 0.75

# %%
bars = {**costs, "LoRA and head": lora_cost}
fig, ax = tl.plots.subplots(figsize=(8, 3.2))
left = np.zeros(len(bars))
for part, color in {"forward": BLUE, "input": ORANGE, "weight": GREEN}.items():
    length = np.array([bar[part] for bar in bars.values()]) / full_step
    label = part if part == "forward" else f"{part} products"
    ax.barh(list(bars), length, left=left, color=color, label=label)
    left += length
ax.set(xlabel="multiplications, as a share of a full training step", xlim=(0, 1.02))
ax.invert_yaxis()
ax.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1.0))
words = f"Stacked bars, whole step: {dict(zip(bars, left.round(2).tolist(), strict=True))}"
tl.plots.alt(fig, words)

# %% [markdown]
# LoRA takes away the green part and nothing else: a third, at best. What it does save is *memory*
# (gradients, optimizer state, checkpoints); lesson 12 keeps that account. Parameter-efficient is
# not the same as compute-efficient.
#
# ## Your gradients at work
#
# Derived, checked, counted: now let them learn. The loop is all there is to training.


# %%
def train(net, X, Y, trained, steps=300, lr=0.3):
    """Plain gradient descent on the whole training set; returns a new network."""
    net = {name: value.copy() for name, value in net.items()}
    for _ in range(steps):
        gradients = backward(net, forward(net, X), Y)
        for name in trained:
            net[name] -= lr * gradients[name]
    return net


# %%
def train_by_torch(net, X, Y, steps=300, lr=0.3):
    net = {name: value.copy() for name, value in net.items()}
    for _ in range(steps):
        for name, gradient in autograd(net, X, Y).items():
            net[name] -= lr * gradient
    return net


# %% tags=["nbval-check-output"]
few, few_targets = images[:200], np.eye(10)[digits[:200]]
ours = train(net, few, few_targets, list(net))
theirs = train_by_torch(net, few, few_targets)
apart = max(np.abs(ours[name] - theirs[name]).max() for name in net)
print("after 300 steps the weights agree to eight digits:", apart < 1e-8)
assert apart < 1e-8

# %% [markdown]
# And a fair experiment: five random sets of 500 training images, the other 1,297 as test. Three
# arms: train everything; freeze a **random** backbone and train the head; and, as the control, a
# linear head straight on the pixels. The first two share every gradient but those that freezing
# removes.


# %%
def accuracy(net, X, truth):
    return np.mean(forward(net, X)["Z"].argmax(axis=1) == truth)


def run_arm(seed, trained):
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(images))
    seen, unseen = order[:500], order[500:]
    net, targets = make_network(draw, m=32), np.eye(10)[digits[seen]]
    net = train(net, images[seen], targets, trained, steps=500)
    return accuracy(net, images[unseen], digits[unseen])


# %%
def pixels_arm(seed):
    order = np.random.default_rng(seed).permutation(len(images))
    seen, unseen = order[:500], order[500:]
    V, c = np.zeros((10, 64)), np.zeros(10)
    for _ in range(500):
        step = head_gradients(V, c, images[seen], np.eye(10)[digits[seen]])
        V, c = V - 0.3 * step["V"], c - 0.3 * step["c"]
    return np.mean((images[unseen] @ V.T + c).argmax(axis=1) == digits[unseen])


# %%
comparison = tl.compare({
    "everything": lambda seed: run_arm(seed, list(net)),
    "head on a frozen random backbone": lambda seed: run_arm(seed, ["V", "c"]),
    "head on the pixels": pixels_arm,
}, draws=5, progress=False)  # fmt: skip
for arm in comparison.scores:
    print(f"{arm:34s} {comparison.interval(arm)}")
assert comparison.difference("everything", "head on a frozen random backbone").low > 0.1
assert comparison.difference("head on the pixels", "head on a frozen random backbone").low > 0.1
assert comparison.interval("everything").low > 0.9

# %% [markdown]
# Read the middle row first. Freezing made the backward pass cheap, and the random features it
# froze are worth *less than no backbone at all*. Freezing saves computing; what it gives is
# exactly what the frozen features are worth, and that is why lesson 01 began with a good
# backbone. The last row is the control that keeps us modest: on these easy digits two more layers
# win one point over a linear head on the pixels. Nothing here is a triumph, but all of it was
# driven by your gradients.
#
# ## Where it fails
#
# **A check at a special point proves nothing.** Here is a backward pass with a real mistake: the
# ReLU gate of layer 2 is forgotten. And here is a check that it passes.


# %%
def forgot_the_gate(net, values, Y):
    dH2 = (softmax(values["Z"]) - Y) / len(Y) @ net["V"]
    return dH2.T @ values["H1"]  # dW2 without [U2 > 0]


def check_w2(net):
    truth = finite_difference(lambda: cross_entropy(forward(net, X)["Z"], Y), net["W2"])
    return relative_error(forgot_the_gate(net, forward(net, X), Y), truth)


for point, tested in {"zero head": fresh, "random head": net}.items():
    error = check_w2(tested)
    print(f"{point}: relative error {error:.1e}", "(passes)" if error < 1e-6 else "(caught)")
    assert (error < 1e-6) == (point == "zero head")

# %% [markdown]
# At the zero head every gradient of the backbone is zero, the right one and the wrong one. The
# same goes for $dA$ at $B = 0$: that is why the LoRA check above ran a second time. Check at a
# *random* point.
#
# **At a kink there is nothing to agree on.** At $u = 0$ the ReLU has slope 0 on one side and 1 on
# the other. Autograd says 0, central differences say the average:

# %%
u = torch.zeros(1, requires_grad=True)
torch.relu(u).sum().backward()
at_kink = (np.maximum(STEP, 0) - np.maximum(-STEP, 0)) / (2 * STEP)
print("ReLU at 0: autograd", u.grad.item(), " central differences", at_kink)
assert u.grad.item() == 0.0 and at_kink == 0.5

values = forward(net, X)
nearest = min(np.abs(values["U1"]).min(), np.abs(values["U2"]).min())
assert nearest > 10 * STEP  # why our checks could be so strict

# %% [markdown]
# In our checks no $u$ lay that close to its kink. Among a million units one always does, and a
# check of a big network must look at the median error, not at the worst.
#
# **The gradient can be right and the loss wrong.** Give every image the label of its neighbour
# and check again: perfect agreement. The referees compare a gradient with a loss. Whether the
# loss is the one you meant, they cannot know. Many real bugs (lesson 04 has nine) live there.

# %%
nonsense = np.roll(Y, 1, axis=0)  # each image gets the label of the one before
by_difference = finite_difference(lambda: cross_entropy(forward(net, X)["Z"], nonsense), net["V"])
assert relative_error(backward(net, forward(net, X), nonsense)["V"], by_difference) < 1e-6

# %% [markdown]
# **It does not scale.** Finite differences cost two losses per weight. For a model of 100 million
# weights, check one random direction, as we did for the V curve: one number, two losses, and a
# mistake in any weight shows in it.
#
# ## Explorer: one update, step by step
#
# A network small enough to see it whole: two inputs, two hidden layers of two, two classes, no
# biases. The inputs are real: the mean ink in the upper and in the lower half of a handwritten 6
# or 9. Move **step** from left to right: values run forward (blue), gradients come back (orange,
# below the value or the weight they belong to), and the last step moves the weights (green).
#
# Three questions for it; the answers are below.
#
# 1. Train *everything*. Which weights get the gradient 0, and which unit is to blame?
# 2. Switch to *head only* and to *layer 1 only*. Which orange numbers vanish?
# 3. Choose *a nine*, train *everything*, and raise the learning rate to 8. The loss after the
#    update is 0.693, exactly $\log 2$. What has happened to the network?

# %% jupyter={"source_hidden": true}
TINY = [
    np.array([[3.0, -3.0], [-3.0, 3.0]]),  # W1: "more ink above", "more ink below"
    np.array([[1.0, 0.4], [0.2, 1.2]]),  # W2
    np.array([[0.3, -0.2], [-0.4, 0.5]]),  # V
]
PARTS = {"everything": (0, 1, 2), "head only": (2,), "layer 1 only": (0,)}
EXAMPLES = {"a six": (6, 0), "a nine": (9, 1), "an odd nine": (9, 1)}  # digit, class


def tiny_input(example):
    digit, label = EXAMPLES[example]
    found = images[digits == digit].reshape(-1, 2, 32).mean(axis=2)  # ink above, ink below
    order = np.argsort(found[:, 0] - found[:, 1])
    return found[order[0] if example == "an odd nine" else order[len(order) // 2]], np.eye(2)[label]


# %% jupyter={"source_hidden": true}
def tiny_pass(weights, x, y):
    """Values and gradients at the four columns of nodes, and gradients of the three layers."""
    values = [x]
    for layer, weight in enumerate(weights):
        u = weight @ values[-1]
        values.append(np.maximum(u, 0) if layer < 2 else u)
    p = softmax(values[3][None])[0]
    node_gradients, weight_gradients = [p - y], []
    for layer in (2, 1, 0):
        weight_gradients.insert(0, np.outer(node_gradients[0], values[layer]))
        below = weights[layer].T @ node_gradients[0]
        node_gradients.insert(0, below * (values[layer] > 0) if layer else below)
    return values, p, node_gradients, weight_gradients, -np.log(p @ y)


# %% jupyter={"source_hidden": true}
def shown(value):
    return "0" if value == 0 else f"{value:+.2f}"


def draw_tiny_nodes(ax, step, lowest, values, node_gradients):
    names = ("ink above", "ink below"), ("top-heavy", "bottom-heavy"), ("H2", "H2")
    for column, pair in enumerate((*names, ("Z: six", "Z: nine"))):
        for row, name in enumerate(pair):
            middle = {"ha": "center", "va": "center", "zorder": 4}
            ax.scatter(column, 1 - row, s=2600, color="white", edgecolor="black", zorder=3)
            ax.text(column, 1.27 - row, name, fontsize=9, **middle)
            if step >= column:
                ax.text(column, 1.06 - row, f"{values[column][row]:.2f}", color=BLUE, **middle)
            if step >= 7 - column and lowest < column:
                text = shown(node_gradients[column][row])
                ax.text(column, 0.92 - row, text, color=ORANGE, **middle)


# %% jupyter={"source_hidden": true}
def draw_tiny_weights(ax, step, trained, gradients, lr):
    style = {"ha": "center", "va": "center", "fontsize": 9, "zorder": 2}
    style["bbox"] = {"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none"}
    for layer, weight in enumerate(TINY):
        active = layer in trained
        for (row, column), value in np.ndenumerate(weight):
            ends = np.array([[layer, 1 - column], [layer + 1, 1 - row]])
            ax.plot(*ends.T, color="black" if active else GREY, lw=1, ls="-", zorder=1)
            x, y = ends[0] + 0.33 * (ends[1] - ends[0])
            ax.text(x, y + 0.08, f"{value:.2f}", color="black" if active else "grey", **style)
            if active and step >= 7 - layer:
                ax.text(x, y - 0.02, shown(gradients[layer][row, column]), color=ORANGE, **style)
            if active and step == 8:
                moved = value - lr * gradients[layer][row, column]
                ax.text(x, y - 0.12, f"{moved:.2f}", color=GREEN, **style)


# %% jupyter={"source_hidden": true}
STEPS = ["the input", "the first hidden layer", "the second hidden layer", "logits and loss"]
STEPS += ["dZ = p - y", "dV and dH2", "dW2 and dH1", "dW1", "the update"]


def draw_update(step, train, image, lr):
    x, y = tiny_input(image)
    values, p, node_gradients, gradients, loss = tiny_pass(TINY, x, y)
    fig, ax = tl.plots.subplots(figsize=(9, 4.2))
    draw_tiny_weights(ax, step, PARTS[train], gradients, lr)
    draw_tiny_nodes(ax, step, min(PARTS[train]), values, node_gradients)
    title = f"Step {step}: {STEPS[step]}\n"
    if step > 2:
        title += f"p = ({p[0]:.2f}, {p[1]:.2f}), y = ({y[0]:.0f}, {y[1]:.0f}), loss {loss:.3f}"
    if step == 8:
        lrs = [lr if layer in PARTS[train] else 0 for layer in range(3)]
        moved = [w - rate * g for w, rate, g in zip(TINY, lrs, gradients, strict=True)]
        title += f", after the update {tiny_pass(moved, x, y)[-1]:.3f}"
    ax.set(xlim=(-0.4, 3.4), ylim=(-0.35, 1.4), title=title)
    ax.axis("off")


# %%
tl.widgets.explore(
    draw_update,
    step=tl.widgets.slider(0, 8, 1, 8, label="step"),
    train=tl.widgets.choice(list(PARTS), label="train"),
    image=tl.widgets.choice(list(EXAMPLES), label="image"),
    lr=tl.widgets.slider(0.5, 10.0, 0.5, 1.0, label="learning rate"),
)

# %% [markdown]
# **Answers.** (1) The unit of the first layer that is 0: its gate is shut, so nothing passes down
# through it, and what it sends up is 0, so the weights that read it get 0 as well. (2) *Head
# only*: all but $dZ$ and $dV$. *Layer 1 only*: just $dV$ and $dW_2$; the whole way down stays.
# (3) The step was so long that every gate is shut. All values are 0, both classes get
# $p = \frac12$, every gradient is zero, and the network will never move again. A learning rate
# can kill.
#
# ## Quiz

# %%
tl.quiz("03")

# %% [markdown]
# ## Exercise
#
# [Gradients by hand: the exercise](../exercises/03_gradients_by_hand.ipynb) asks you to write
# these gradients yourself, from a loss that does not overflow to the two matrices of LoRA. Each
# answer is checked at once, and most of them draw a picture when they are right.
#
# ## Papers
#
# - Rumelhart, Hinton and Williams 1986, *Learning representations by back-propagating errors*,
#   Nature 323: equations 4 to 7 are our way back.
# - Baydin et al. 2018, *Automatic differentiation in machine learning: a survey*, section 2.1
#   (numerical differentiation and its V) and section 3.2 (reverse mode), arXiv:1502.05767.
# - Parr and Howard 2018, *The matrix calculus you need for deep learning*, sections 4 to 6,
#   arXiv:1802.01528.
# - Blanchard, Higham and Higham 2021, *Accurately computing the log-sum-exp and softmax
#   functions*, section 1 (overflow and the shift), arXiv:1909.03469.
# - Hu et al. 2021, *LoRA: low-rank adaptation of large language models*, section 4.1,
#   arXiv:2106.09685.
# - Loshchilov and Hutter 2019, *Decoupled weight decay regularization*, section 2,
#   arXiv:1711.05101.
#
# ## Glossary
#
# | term | meaning | Chinese |
# |---|---|---|
# | gradient | the slopes of the loss in all entries of a quantity, in its shape | 梯度 |
# | chain rule | slopes multiply along a path and add over paths | 链式法则 |
# | computational graph | values as nodes, operations as edges | 计算图 |
# | back-propagation | the chain rule from the loss backwards, each node once | 反向传播 |
# | automatic differentiation | a program that does it for you | 自动微分 |
# | finite differences | slopes from two losses close by | 有限差分 |
# | cross-entropy | minus the log of the probability given to the truth | 交叉熵 |
# | logit | a score before the softmax | 对数几率（未归一化得分） |
# | log-sum-exp | a smooth maximum, whose gradient is the softmax | 对数求和指数 |
# | backbone, head | the features, and what reads them | 骨干网络，任务头 |
# | to freeze | to train none of a part's weights | 冻结 |
# | weight decay | a pull of every weight towards zero | 权重衰减 |
# | low-rank adaptation (LoRA) | training a thin product beside a frozen weight | 低秩适配 |
