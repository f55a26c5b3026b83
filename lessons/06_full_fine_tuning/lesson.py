# %% [markdown]
# # 06 Full fine-tuning
#
# Every weight of the backbone may move now, and what you hold in your hand is one number: the
# learning rate. This lesson turns it from a number that is tried into a number that you can read.
# Then it looks at the three things that are usually set beside it, and asks of each what it is
# worth: warm-up, BatchNorm, and a rate for each layer.
#
# **After this lesson you can**
#
# 1. say what a learning rate is, for gradient descent (a limit, $2/h$) and for Adam (a distance
#    per step), and let the validation set choose it;
# 2. derive why Adam's first steps are its longest, and say when warm-up matters and when not;
# 3. put BatchNorm into the mode that you mean, prove that what you froze is frozen, and give each
#    layer its own rate or its own starting time.
#
# **You need** lessons 03 and 04. **Time** about 90 minutes; the notebook itself runs in about a
# minute on two cores.
#
# **Expected result.** On 100 labelled wild digits a linear probe reads 66 % [65, 67] of the test
# digits, full fine-tuning 84 % [83, 85] at the best of six rates, and 13 % [11, 15] at ten times
# that rate. Warm-up is worth nothing at the best rate and 44 points [33, 54] at ten times it.
# A BatchNorm backbone that was "frozen" by its gradients alone falls from 91 % to 74 % on its own old
# task, within 40 steps and without one changed weight. Rates by layer and gradual unfreezing, both
# famous, gain nothing here.

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %%
import copy
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# %%
from tlcourse.comparing import Comparison
from tlcourse.evaluation import mean_interval
from tlcourse.locations import data_dir
from tlcourse.parallel import side_by_side
from tlcourse.recording import lr_factor

BLUE, ORANGE, GREEN, PURPLE = tl.plots.palette[:4]
recorded = json.loads((data_dir() / "results" / "fine_tuning.json").read_text("utf-8"))
num_draws = {"tiny": 5, "full": 10}[run.profile]  # of every comparison that runs here
torch.set_num_threads(1)  # a network this small gains nothing from a second core

# %% [markdown]
# ## Before you run anything
#
# Four guesses. Write them down.
#
# 1. In its steepest direction, the loss of our network is curved so strongly that on a parabola of
#    that curvature every learning rate above 0.01 would explode. You run plain gradient descent at
#    *four times* that limit. Does it explode, does it hop back and forth, or does it learn?
# 2. You multiply the loss by 1,000. By which factor does Adam's first step grow?
# 3. Without warm-up, the first step of Adam is as long as the learning rate allows, in every
#    weight. With the *best* learning rate, how many points of accuracy does warm-up gain?
# 4. You switch off the gradient of every weight of a backbone with BatchNorm and train a new head
#    on it for 40 steps. Then you take the head off and put the *old* head back. The old task was
#    solved with 91 % accuracy. And now?

# %% [markdown]
# ## The picture: one weight, one valley
#
# Take one weight $w$ and a loss that is a parabola around its best value $w^*$:
#
# $$L(w) = \frac h2\,(w - w^*)^2.$$
#
# $h$ is the second derivative of $L$, the **curvature**: large for a narrow valley, small for a
# wide one. Write $e_t = w_t - w^*$ for how far the weight is from the bottom after $t$ steps. The
# slope there is $h\,e_t$, and gradient descent with learning rate $\eta$ takes away $\eta$ times
# the slope:
#
# $$e_{t+1} = e_t - \eta\,h\,e_t = (1 - \eta h)\,e_t \qquad\Longrightarrow\qquad
# e_t = (1 - \eta h)^t\,e_0.$$
#
# One number decides everything: the factor $1 - \eta h$. Between 0 and 1 the weight walks down on
# one side. Between $-1$ and 0 it hops from side to side, and still comes down. Beyond $-1$ each
# hop is longer than the last. So
#
# $$|1 - \eta h| < 1 \qquad\Longleftrightarrow\qquad 0 < \eta < \frac2h.$$
#
# Before you look: which of $\eta h = 0.1,\ 1,\ 1.8,\ 2.1$ is at the bottom after *one* step?


# %%
def descend(h, lr, num_steps, start=1.0):
    """Gradient descent on h/2 e^2: the distances e from the bottom, shape (num_steps + 1,)."""
    path = [start]
    for _ in range(num_steps):
        path.append(path[-1] - lr * h * path[-1])  # the slope of h/2 e^2 is h e
    return np.array(path)


# %% jupyter={"source_hidden": true}
fig, axes = tl.plots.subplots(1, 4, figsize=(10, 2.6), sharey=True)
line = np.linspace(-1.9, 1.9, 200)
for ax, product, title in zip(
    axes, (0.1, 1.0, 1.8, 2.1), ("too low", "right", "nearly too high", "too high"), strict=True
):
    path = descend(1.0, product, 6)
    ax.plot(line, line**2 / 2, color="#BBBBBB", ls="-")
    ax.plot(path, path**2 / 2, color=ORANGE, ls="-", marker="o", ms=4)
    ax.plot(path[0], path[0] ** 2 / 2, color=BLUE, marker="o", ms=8)
    ax.set(title=f"{title}: $\\eta h$ = {product}", xlabel="$w - w^*$", ylim=(-0.1, 1.7))
axes[0].set_ylabel("loss")
words = "A parabola with six steps from the blue point: creeping down, at the bottom after one step, "
words += "hopping from side to side and down, hopping from side to side and up."
tl.plots.alt(fig, words)

# %% tags=["nbval-check-output"]
for product in (0.1, 1.0, 1.8, 1.99, 2.01, 2.1):
    path = descend(h=7.0, lr=product / 7.0, num_steps=200)
    np.testing.assert_allclose(path, (1 - product) ** np.arange(201), rtol=1e-9, atol=1e-12)
    print(f"lr = {product:4} / h: after 200 steps", "closer" if abs(path[-1]) < 1 else "further away")
    assert (abs(path[-1]) < 1) == (product < 2)

# %% [markdown]
# ## Many weights: the steepest direction has the say
#
# With many weights the curvature is a matrix, the **Hessian** $H$, of all second derivatives. It
# is symmetric, so it has directions at right angles (its eigenvectors) in which it acts as a plain
# number (its eigenvalues $h_1 \ge h_2 \ge \dots$). Written in these directions, gradient descent
# falls apart into the one-weight problem above, once for each direction, all with the same $\eta$:
#
# $$e_t^{(i)} = (1 - \eta h_i)^t\, e_0^{(i)}.$$
#
# The *steepest* direction sets the limit: $\eta < 2/h_1$. The *flattest* one sets the pace: with
# $\eta = 1/h_1$ it shrinks by $1 - h_i/h_1$ per step, which is nearly nothing if $h_i$ is a
# thousandth of $h_1$. A learning rate is too high for one direction and too low for another at
# the same time.
#
# **Momentum** adds a part $\beta$ of the last step to this one. In one direction,
#
# $$e_{t+1} = e_t - \eta h\, e_t + \beta\,(e_t - e_{t-1}).$$
#
# Try $e_t = z^t$: then $z^2 - (1 + \beta - \eta h)\,z + \beta = 0$. The product of the two roots is
# $\beta < 1$. As $\eta$ grows, the first root to leave the unit circle leaves it at $z = -1$ (the
# hopping again). Put $z = -1$ in: $1 + (1 + \beta - \eta h) + \beta = 0$, so
#
# $$\eta < \frac{2\,(1 + \beta)}{h_1}.$$
#
# With $\beta = 0.9$ nearly twice the rate is allowed, and flat directions run up to
# $1/(1-\beta) = 10$ times as fast, because ten pushes in the same direction add up.
#
# **A real loss that is exactly a parabola**: a linear head on *frozen* features, with the squared
# error. $L(V) = \frac1{2n} \|F V^\top - Y\|^2$ has the Hessian $F^\top F / n$ for each class, with
# the features in the rows of $F$. We can know all its curvatures.

# %%
task = tl.load_task("wild_digits", labels_per_class=10, seed=0)
backbone = tl.load_backbone("glyphnet").to(run.device)
plain = task.loaders(augment=False)
features = tl.extract_features(backbone, plain.train)
design = np.hstack([features.features, np.ones((100, 1))]).astype(np.float64)  # (100, 129): a bias
one_hot = np.eye(10)[features.targets]
curvatures = np.linalg.eigvalsh(design.T @ design / len(design))[::-1]
print(f"steepest {curvatures[0]:.2f}, tenth {curvatures[9]:.2g}, fiftieth {curvatures[49]:.2g}")
print(f"directions without any curvature: {(curvatures < 1e-9).sum()} of {len(curvatures)}")


# %%
def squared_loss(lr, momentum=0.0, num_steps=500):
    """Loss of a linear head after gradient descent from zero."""
    head, step = np.zeros((10, design.shape[1])), 0.0
    for _ in range(num_steps):
        slope = (design @ head.T - one_hot).T @ design / len(design)
        step = momentum * step - lr * slope
        head = head + step
    return 0.5 * np.square(design @ head.T - one_hot).sum() / len(design)


# %%
start_loss = squared_loss(lr=0.0)
for momentum in (0.0, 0.9):
    limit = 2 * (1 + momentum) / curvatures[0]
    for share in (0.1, 0.98, 1.02):
        loss = squared_loss(share * limit, momentum)
        print(f"momentum {momentum}, lr {share:4} x the limit: loss {start_loss:.2f} -> {loss:.2g}")
        assert (loss < start_loss) == (share < 1)

# %% [markdown]
# The limit is sharp: two per cent below it all is well, two per cent above it the loss explodes.
# Look at the two lines with 0.1: there momentum went much further in the same number of steps.
#
# ## Explorer: one rate, two directions
#
# A valley that is ten times as steep across as along, $h = 10$ and $h = 1$. So the limit is
# $\eta = 0.2$ without momentum. Find the best rate without momentum. (Theory: the two factors are
# equally far from zero at $\eta = 2/(h_1 + h_2) = 0.18$.) Then switch momentum on. What happens
# when it is very high? (It overshoots: the weight runs past the bottom and back, several times.)


# %% jupyter={"source_hidden": true}
def draw_valley(lr, momentum):
    curvature, place, step = np.array([1.0, 10.0]), np.array([2.0, 0.5]), np.zeros(2)
    path = [place]
    for _ in range(40):
        step = momentum * step - lr * curvature * place
        place = np.clip(place + step, -1e6, 1e6)
        path.append(place)
    path = np.array(path)
    fig, (left, right) = tl.plots.subplots(1, 2, figsize=(9, 3.2))
    x, y = np.meshgrid(np.linspace(-2.5, 2.5, 80), np.linspace(-1.2, 1.2, 80))
    left.contour(x, y, (x**2 + 10 * y**2) / 2, levels=[0.05, 0.3, 1, 2.5, 5], colors="#BBBBBB")
    left.plot(path[:, 0], path[:, 1], color=ORANGE, ls="-", marker="o", ms=3)
    left.set(xlim=(-2.5, 2.5), ylim=(-1.2, 1.2), xlabel="along, h = 1", ylabel="across, h = 10")
    losses = (path**2 @ curvature) / 2
    right.plot(np.maximum(losses, 1e-12), color=BLUE, ls="-")
    limit = 0.2 * (1 + momentum)
    right.set(xlabel="step", ylabel="loss", yscale="log", ylim=(1e-9, 1e4))
    right.set_title(f"limit for this momentum: {limit:.2f}")


tl.widgets.explore(
    draw_valley,
    lr=tl.widgets.slider(0.01, 0.42, 0.01, 0.1, "learning rate"),
    momentum=tl.widgets.slider(0.0, 0.95, 0.05, 0.0, "momentum"),
)

# %% [markdown]
# ## And the network? Measure its steepest direction
#
# Our network has 310,186 weights. Its Hessian would have $10^{11}$ entries. But we need only its
# largest eigenvalue, and for that it is enough to *multiply* by $H$:
#
# - Start with any direction $v$ of length 1 and replace it, again and again, by $Hv$ scaled to
#   length 1. Each time the part of $v$ along the steepest direction grows by $h_1$, every other
#   part by less. After a few rounds little else is left, and $v^\top H v = h_1$. This is **power
#   iteration**.
# - $Hv$ costs one more backward pass: $H v = \nabla\,(\nabla L \cdot v)$, as $v$ is a constant.
#   (Pearlmutter 1994.)


# %%
def steepest_curvature(loss, parameters, num_rounds=8):
    """Largest eigenvalue of the Hessian of a scalar loss, by power iteration."""
    parameters = list(parameters)
    slope = flat(torch.autograd.grad(loss, parameters, create_graph=True))
    v = slope.detach() / slope.detach().norm()  # downhill: has a part in every steep direction
    for _ in range(num_rounds):
        product = flat(torch.autograd.grad(slope @ v, parameters, retain_graph=True))  # H v
        curvature, v = (v @ product).item(), product / product.norm()
    return curvature


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


# %% [markdown]
# Check it where we know the answer: on the parabola.

# %%
head = torch.zeros(10, design.shape[1], dtype=torch.float64, requires_grad=True)
residual = torch.from_numpy(design) @ head.T - torch.from_numpy(one_hot)
measured = steepest_curvature(residual.square().sum() / (2 * len(design)), [head], num_rounds=40)
print(f"power iteration {measured:.6f}, eigenvalues {curvatures[0]:.6f}")
assert abs(measured / curvatures[0] - 1) < 1e-6

# %% [markdown]
# Now the network. All fine-tuning in this lesson starts from the same point: the pre-trained
# backbone, and a head from logistic regression on its frozen features ("probe, then fine-tune",
# as in lesson 04), one such head for each draw of labels. Two backbones will be needed, one with
# GroupNorm and, further below, one with BatchNorm.


# %%
def probe_heads(backbone_name):
    """The best head for the frozen backbone, for each draw of ten labels per class."""
    frozen = tl.load_backbone(backbone_name).to(run.device)
    val, found = tl.extract_features(frozen, plain.val), []
    for draw in range(num_draws):
        drawn = tl.load_task("wild_digits", labels_per_class=10, seed=draw)
        train = tl.extract_features(frozen, drawn.loaders(augment=False).train)
        found.append(tl.linear_probe(train, val, val))  # regularised as validation says
    return found


names = ("glyphnet", "glyphnet_bn")
heads = dict(zip(names, side_by_side(probe_heads, names), strict=True))


# %%
def at_the_start(draw=0, backbone_name="glyphnet"):
    """Pre-trained backbone, head from the probe: where every run of a draw begins."""
    model = tl.Classifier(tl.load_backbone(backbone_name), num_classes=10)
    heads[backbone_name][draw].copy_to(model.head)
    return model.to(run.device)


images = task.train.inputs[::3].to(run.device)  # a third of the images, of all classes
targets = task.train.targets[::3].to(run.device)
model = at_the_start().eval()
h = steepest_curvature(F.cross_entropy(model(images), targets), model.parameters())
print(f"steepest curvature h = {h:.0f}; a parabola allows lr < 2 / h = {2 / h:.4f}")

# %% [markdown]
# Here is guess 1. Gradient descent on these images, at half the limit, at four times the limit,
# and at 64 times. And afterwards we measure the curvature *where it arrived*.


# %%
def plain_descent(share, num_steps=13):
    """Losses of full-batch gradient descent at ``share`` of the limit, and curvature at the end."""
    model, losses = at_the_start().eval(), []
    parameters = list(model.parameters())
    for _ in range(num_steps):
        loss = F.cross_entropy(model(images), targets)
        losses.append(loss.item())
        slopes = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter -= share * 2 / h * slope
    loss = F.cross_entropy(model(images), targets)
    return losses, steepest_curvature(loss, parameters, num_rounds=5)


# %%
shares = (0.5, 4, 64)
descents = dict(zip(shares, side_by_side(plain_descent, shares), strict=True))
for share, (losses, curvature) in descents.items():
    shown = " ".join(f"{losses[step]:.2f}" for step in (0, 1, 2, 4, 8, 12))
    allowed = h / share  # 2 / lr
    print(f"lr {share:3} x 2/h: loss {shown}; curvature {curvature:5.1f}, 2/lr = {allowed:.1f}")
assert descents[4][0][-1] < descents[0.5][0][-1] < descents[0.5][0][0]
assert descents[64][0][-1] > descents[64][0][0]
assert descents[64][1] < descents[4][1] < 0.75 * h

# %% [markdown]
# At half the limit the loss falls slowly. At four times the limit it *falls faster*, where a parabola
# would have exploded. The valley of a network is not a parabola: its walls bend, and a walker who is
# thrown out of its steepest part lands where it is flatter. Look at the curvature at the end. It began
# at 214; at the low rate it is still about that, at the higher ones it has come down into the
# neighbourhood of $2/\eta$, the most that the rate allows. (It goes up and down from step to step.
# Lewkowycz et al. 2020 call it the catapult; Cohen et al. 2021 show that training then goes on for long
# at this edge.) At 64 times the limit the price is too high: what was pre-trained is lost.
#
# So $2/h$ is where the picture of the valley ends, no wall for the network. It tells you where to
# begin to be careful, and that *some* rate is too high. Which one, has to be tried.
#
# ## Adam: the rate is a distance
#
# Almost nobody fine-tunes with plain gradient descent. Adam keeps, for each weight, a moving
# average $m$ of its gradients $g$ and another, $v$, of their squares:
#
# $$m_t = \beta_1 m_{t-1} + (1 - \beta_1)\,g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2)\,g_t^2,
# \qquad m_0 = v_0 = 0,$$
#
# usually with $\beta_1 = 0.9$ and $\beta_2 = 0.999$. Both begin at zero, so at first both are too
# small. If all gradients were equal to $g$, then $m_t = (1 - \beta_1^t)\,g$ (a geometric series).
# Dividing by $1 - \beta_1^t$ puts that right. The step is
#
# $$\Delta w_t = -\,\eta\;\frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}, \qquad
# \hat m_t = \frac{m_t}{1 - \beta_1^t}, \quad \hat v_t = \frac{v_t}{1 - \beta_2^t}.$$
#
# **The first step.** $\hat m_1 = g_1$ and $\hat v_1 = g_1^2$, so (with $\epsilon$ negligible)
#
# $$\Delta w_1 = -\,\eta\,\frac{g_1}{|g_1|} = -\,\eta\;\mathrm{sign}(g_1).$$
#
# *Every* weight moves by exactly $\eta$, however small its gradient. A weight whose gradient is
# $10^{-7}$, from a handful of images that happened to disagree, moves as far as the one that
# matters most.


# %%
def adam(gradients, lr, beta1=0.9, beta2=0.999, eps=1e-8):
    """Updates for a sequence of gradients; both have the shape (S, d)."""
    m = v = np.zeros_like(gradients[0])
    updates = []
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        updates.append(-lr * m_hat / (np.sqrt(v_hat) + eps))
    return np.array(updates)


# %%
rng = np.random.default_rng(0)
gradients = rng.normal(size=(30, 5)) * np.array([1e-4, 1e-2, 1.0, 100.0, 1e4])
updates = adam(gradients, lr=0.01)
with np.printoptions(formatter={"float": "{:+.4f}".format}):
    print("first gradients:", *(f"{g:+.0e}" for g in gradients[0]))
    print("first step:     ", updates[0])
np.testing.assert_allclose(updates[0], -0.01 * np.sign(gradients[0]), rtol=1e-3)
np.testing.assert_allclose(adam(1000 * gradients, lr=0.01), updates, rtol=1e-3)  # guess 2

# %% [markdown]
# Guess 2: the step does not grow at all. Numerator and denominator grow alike. For the same reason
# clipping the gradient does not shorten the first step of Adam. Now the same from torch:

# %%
weight = torch.zeros(5, dtype=torch.float64, requires_grad=True)
optimizer = torch.optim.Adam([weight], lr=0.01)
for gradient in gradients:
    weight.grad = torch.from_numpy(gradient)
    optimizer.step()
np.testing.assert_allclose(weight.detach().numpy(), updates.sum(axis=0), rtol=1e-9)

# %% [markdown]
# ### The later steps are shorter
#
# Let a weight's gradients be pure noise: independent, mean 0, standard deviation $\sigma$. Nothing
# is to be learned from them. How far does Adam move it per step?
#
# Written out, $m_t = (1-\beta_1) \sum_{i=0}^{t-1} \beta_1^{\,i}\, g_{t-i}$. Variances of independent
# numbers add up, each with its factor squared, and the sum is again a geometric series:
#
# $$\mathrm{Var}(m_t) = \sigma^2 (1-\beta_1)^2 \sum_{i=0}^{t-1} \beta_1^{2i}
# = \sigma^2 (1-\beta_1)^2\, \frac{1 - \beta_1^{2t}}{1 - \beta_1^2}
# = \sigma^2\, \frac{(1-\beta_1)\,(1 - \beta_1^{2t})}{1 + \beta_1}.$$
#
# Divide by $(1 - \beta_1^t)^2$ for $\hat m_t$, use $1 - \beta_1^{2t} = (1-\beta_1^t)(1+\beta_1^t)$,
# and note that $\hat v_t \approx \sigma^2$:
#
# $$\text{typical step} \;=\; \eta\, \sqrt{\frac{1-\beta_1}{1+\beta_1} \cdot
# \frac{1 + \beta_1^t}{1 - \beta_1^t}}
# \;=\; \eta \cdot \begin{cases} 1 & t = 1 \\ 0.23 & t \to \infty \end{cases}$$
#
# In a weight that has nothing to say, the first step is more than four times as long as a later
# one: the averages are still empty, and one gradient cannot be averaged with anything. (A weight
# whose gradient always has the same sign would move by $\eta$ in every step.)
#
# That is theory about noise. Is the gradient of a real weight noise? Train the network for 40
# steps at a constant rate, and measure the typical step (root mean square over all weights).


# %%
def noise_step(t, beta1=0.9):
    """Root mean square of Adam's step for pure noise, in units of the learning rate."""
    return np.sqrt((1 - beta1) / (1 + beta1) * (1 + beta1**t) / (1 - beta1**t))


times = np.arange(1, 41)
simulated = adam(rng.normal(size=(40, 20_000)), lr=1.0)
simulated = np.sqrt(np.square(simulated).mean(axis=1))
assert np.abs(simulated / noise_step(times) - 1).max() < 0.02


# %%
def endless(loader):
    while True:
        yield from loader


# %%
def typical_steps(num_steps=40, lr=1e-3):
    """Root mean square of each step over all weights of the network, in units of lr."""
    model, sizes = at_the_start().train(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for inputs, labels in itertools.islice(endless(task.loaders(20, seed=0).train), num_steps):
        before = flat(model.parameters()).detach()
        F.cross_entropy(model(inputs.to(run.device)), labels.to(run.device)).backward()
        optimizer.step()
        optimizer.zero_grad()
        sizes.append((flat(model.parameters()).detach() - before).square().mean().sqrt().item())
    return np.array(sizes) / lr


# %%
network = typical_steps()
fig, ax = tl.plots.subplots(figsize=(7, 3.4))
ax.plot(times, noise_step(times), color="#999999", ls="-", lw=5, label="formula for pure noise")
ax.plot(times, simulated, color=BLUE, ls="--", label="simulated noise")
ax.plot(times, network, color=ORANGE, ls="", marker="o", ms=4, label="all weights of the network")
ax.set(xlabel="step", ylabel="typical step / learning rate", ylim=(0, 1.05))
ax.legend()
words = "Typical step over the learning rate: 1 at the first step, about 0.45 at the fifth, 0.23 at "
tl.plots.alt(fig, words + "the fortieth. Formula, simulation and network lie on one curve.")
assert np.abs(network / noise_step(times) - 1).max() < 0.35

# %% [markdown]
# Three hundred thousand weights of a real network follow the curve for noise almost to the line.
# The signal that makes it learn is the small part by which they do not.
#
# ### How far from the pre-trained point?
#
# This gives the learning rate a meaning that you can compare with something. Let $f_t$ be the
# schedule (warm-up, cosine), so that step $t$ has the rate $\eta f_t$. After $S$ steps a weight has
# moved
#
# - by $\eta \sum_t f_t$, if its gradient always said the same;
# - by about $\eta \sqrt{\sum_t f_t^2}$, if it was noise. (In $\sum_t \hat m_t$ each gradient is
#   counted once in total, a little at a time: a random walk of $S$ steps.)
#
# Without a schedule these are $\eta S$ and $\eta \sqrt S$. So all of $\theta_0$ moves by something
# between the two. Compare that with the size of the weights themselves. If the walk is as long as
# the weights are large, nothing of the pre-trained network can be left. We have recorded ten draws
# at each of six rates:

# %%
runs = recorded["rates"]["runs"]
rates = sorted({entry["lr"] for entry in runs})


def select(key, lr, warmup_steps):
    """One number for each recorded draw."""
    chosen = [e for e in runs if (e["lr"], e["warmup_steps"]) == (lr, warmup_steps)]
    return np.array([entry[key] for entry in sorted(chosen, key=lambda entry: entry["draw"])])


distance = np.array([select("distance", lr, 0).mean() for lr in rates])
factors = np.array([lr_factor(step, 40, 0, "cosine") for step in range(40)])
size = flat(p for p in backbone.parameters() if p.ndim > 1).square().mean().sqrt().item()
print(f"sum of f: {factors.sum():.1f}, root of the sum of squares: {(factors**2).sum() ** 0.5:.1f}")
print("moved / size:", *(f"{lr:g}: {d / size:.2f} " for lr, d in zip(rates, distance, strict=True)))

# %%
fig, ax = tl.plots.subplots(figsize=(7, 3.6))
ax.plot(rates, distance, color=ORANGE, ls="", marker="o", ms=7, label="measured, ten draws")
lower, upper = np.sqrt((factors**2).sum()) * np.array(rates), factors.sum() * np.array(rates)
ax.fill_between(rates, lower, upper, color=BLUE, alpha=0.15, label="between noise and agreement")
ax.axhline(size, color="black", ls="--", label="size of the weights themselves")
ax.set(xlabel="learning rate", ylabel="distance from $\\theta_0$ per weight", xscale="log")
ax.set_yscale("log")
ax.legend(loc="lower right")
words = "Distance from the pre-trained weights over the learning rate, both logarithmic: a straight "
words += "line inside the predicted band, which reaches the size of the weights at a rate of 0.03."
tl.plots.alt(fig, words)
assert np.all(distance > 0.9 * lower) and np.all(distance < upper)

# %% [markdown]
# All six points lie in the band, near its lower edge: mostly noise. At the highest rate the network
# walks further than its own weights are large. At $3 \cdot 10^{-3}$ it moves by about an eighth of
# them. Read a learning rate of Adam like this from now on: **how far may each weight go?** And if
# you double the steps, the distance grows by at least $\sqrt2$.
#
# ## Too low, right, too high
#
# Now the accuracy. First three rates live, on one draw of labels: 40 steps, batches of 20, cosine
# schedule, no warm-up yet. From the picture above: which of the three will be the lowest after 40
# steps, and what will the highest rate do?


# %%
config = tl.TrainConfig(
    lr=3e-3, num_steps=40, warmup_steps=10, eval_every_steps=20, precision="fp32", progress=False
)


def sweep(lr):
    loaders = task.loaders(batch_size=20, seed=0)  # the same batches for each rate
    settings = replace(config, lr=lr, warmup_steps=0, eval_every_steps=10)
    return tl.fit(at_the_start(), loaders.train, loaders.val, settings)


live_rates = (1e-4, 3e-3, 3e-2)
histories = dict(zip(live_rates, side_by_side(sweep, live_rates), strict=True))


# %%
def draw_losses(histories):
    """Training loss, averaged over the five steps of an epoch, and validation loss."""
    fig, axes = tl.plots.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for lr, history in histories.items():
        epochs = np.array(history.train_loss).reshape(-1, 5).mean(axis=1)
        axes[0].plot(5 * np.arange(1, len(epochs) + 1), epochs, label=f"lr {lr:g}")
        axes[1].plot(history.eval_step, history.val_loss)
    axes[0].set(xlabel="step", ylabel="loss (nats)", title="training", ylim=(0, 3.2))
    axes[1].set(xlabel="step", title="validation")
    axes[1].axhline(math.log(10), color="#999999", ls=":", lw=1.2)
    fig.legend(loc="outside lower center", ncols=4)
    return fig


# %%
words = "Losses over 40 steps. At 1e-4 they hardly fall; at 3e-3 they fall, training further than "
words += "validation; at 3e-2 they jump up and come back to log 10, the loss of knowing nothing."
tl.plots.alt(draw_losses(histories), words)
best = {lr: min(history.val_loss) for lr, history in histories.items()}
print({f"{lr:g}": round(loss, 2) for lr, loss in best.items()})
assert best[3e-2] > best[1e-4] > best[3e-3]

# %% [markdown]
# Three signatures, worth knowing by sight. **Too low**: a line that hardly leaves its beginning.
# **Right**: falls fast, and training and validation part. **Too high**: jumps at once (off the scale)
# and comes back to $\log 10$ (dotted), the loss of a network that has forgotten its features and says
# the same for every image. That all lines are flat at the end says nothing: the cosine has taken the
# rate to zero there, and a run that was too slow looks as finished as one that is.
#
# Which rate in between is the best? The training loss cannot tell: it is the lower, the faster a network
# learns its 100 images by heart. The validation set can. Here it is with ten draws and six rates. In
# every draw we take the rate with the lowest validation loss, and only then look at the test set:

# %%
val_losses = np.array([[min(curve) for curve in select("val_loss", lr, 0)] for lr in rates])
test = np.array([select("test_accuracy", lr, 0) for lr in rates])  # (rates, draws)
probe_test = np.array(recorded["rates"]["probe"])
for lr, row in zip(rates, test, strict=True):
    print(f"lr {lr:6g}: test accuracy {mean_interval(row)}")
chosen = val_losses.argmin(axis=0)
chosen_test = test[chosen, np.arange(test.shape[1])]
print(f"\nchosen by validation: {[f'{rates[i]:g}' for i in chosen]}")
print(f"its test accuracy:    {mean_interval(chosen_test)}")
print(f"the frozen probe:     {mean_interval(probe_test)}")

# %%
gain = mean_interval(chosen_test - probe_test)
scratch = tl.arms.recorded("wild_digits")[10].interval("scratch")
print(f"full fine-tuning minus probe, paired: {gain}")
print(f"control, from scratch with its own best rate (lesson 01): {scratch}")
assert gain.low > 0.1 and scratch.high < mean_interval(chosen_test).low
assert mean_interval(test[-1]).high < 0.3 < 0.7 < mean_interval(test[0]).low

# %% [markdown]
# Two things to keep. The good region is broad to the left and ends in a cliff on the right: a
# factor of three below the best rate costs a point or two, a factor of three above it costs
# 27. And a learning rate that is too high does worse than no fine-tuning at all (the probe). **When
# in doubt, go lower and train longer.**
#
# ## Warm-up
#
# You know now what is wrong with the first step: everything moves by $\eta$, wherever noise points.
# Warm-up lets the rate rise in a straight line over the first steps, so that the long steps are
# taken with a small rate. Two facts about it, first:

# %%
warm = np.array([lr_factor(step, 40, 10, "cosine") for step in range(40)])
for name, schedule in {"no warm-up": factors, "warm-up of 10 steps": warm}.items():
    first = np.sqrt(np.square(schedule * noise_step(times))[:10].sum())
    print(f"{name:20}: sum of f {schedule.sum():.1f}, first ten steps {first:.2f} x lr")
assert abs(warm.sum() / factors.sum() - 1) < 0.05

# %% [markdown]
# The two schedules have nearly the *same* sum. So if warm-up helps, it is not because less was
# learned, but because of where the steps are. (The second number adds up the first ten steps as if
# they were independent.)
#
# Where is the damage done? Each training loss is recorded *before* its step. So the second one shows
# what the very first step has done:

# %%
for lr in (1e-3, 3e-3, 1e-2, 3e-2):
    cold, warmed = (select("train_loss", lr, steps).mean(axis=0)[:2] for steps in (0, 10))
    print(f"lr {lr:5g}: loss {cold[0]:.1f} -> {cold[1]:4.1f}; with warm-up -> {warmed[1]:.1f}")
assert select("train_loss", 3e-2, 0).mean(axis=0)[1] > 2 * math.log(10)

# %% [markdown]
# *One* step of Adam at 0.03, in the direction $-\mathrm{sign}(g)$ in all weights at once, and a network
# that read two thirds of the digits is far worse than one that knows nothing ($\log 10 = 2.3$).
#
# Now guess 3. Recorded: ten draws, with and without, at every rate. And live, at the highest rate,
# on fresh processes:


# %%
def all_at_once(model, loaders, settings):
    """Full fine-tuning: every weight, from the first step."""
    tl.fit(model, loaders.train, loaders.val, settings)


def fine_tune(draw, settings, backbone_name="glyphnet", train=all_at_once):
    """Test accuracy of one run from the common start."""
    loaders = tl.load_task("wild_digits", labels_per_class=10, seed=draw).loaders(20, seed=draw)
    model = at_the_start(draw, backbone_name)
    train(model, loaders, replace(settings, seed=draw))
    return tl.evaluate(model, loaders.test).accuracy


# %%
too_high = replace(config, lr=3e-2)
arms = {
    "warm-up": lambda draw: fine_tune(draw, too_high),
    "no warm-up": lambda draw: fine_tune(draw, replace(too_high, warmup_steps=0)),
}
live = tl.compare(arms, draws=num_draws, progress=False, workers=None)
warmup_gain = live.difference("warm-up", "no warm-up")
print(f"live, lr 0.03: warm-up minus none {warmup_gain}")
assert warmup_gain.mean > 0.1  # the interval that counts is the recorded one, below

# %% [markdown]
# These five draws agree, but a run at such a rate is a gamble: one draw gets away with it, the next
# does not, and another five may leave an interval that comes close to zero. So the claim rests on
# the recorded ten.

# %%
gains = {}
for lr in rates:
    gains[lr] = mean_interval(
        select("test_accuracy", lr, 10) - select("test_accuracy", lr, 0)
    )
    print(f"lr {lr:6g}: warm-up minus none, paired {gains[lr]}")
ax = tl.plots.plot_intervals(
    {f"lr {lr:g}": interval for lr, interval in gains.items()},
    xlabel="test accuracy with warm-up minus without", reference=0.0,
)  # fmt: skip
words = "Gain of warm-up at six rates: zero up to 0.003, then about 0.2 at 0.01 and 0.4 at 0.03."
tl.plots.alt(ax, words)

# %%
assert all(interval.high < 0.03 for lr, interval in gains.items() if lr <= 3e-3)
assert gains[1e-2].low > 0.05 and gains[3e-2].low > 0.2

# %% [markdown]
# At every rate up to the best one, warm-up makes **no difference** that ten draws could show. At
# three times the best rate it saves 23 points, at ten times 44. It does not make the best model
# better; it moves the cliff to the right. Warm-up is an insurance against a rate that was chosen
# too high, and it cost nothing that we could measure. Keep it, and do not expect a gain from it.
#
# (With warm-up, is 0.01 as good as 0.003? No: compare the printed accuracies in the explorer at the
# end. What was saved is not what was never lost.)
#
# ## BatchNorm: two functions in one layer
#
# Most convolutional networks that you will fine-tune (every ResNet of torchvision) contain
# BatchNorm. In training it computes something *different* from what it computes in evaluation, and
# unlike dropout it also *remembers*. (GroupNorm, in our network so far, does neither: it takes its
# mean and variance from the one image.) For each channel, with $x$ running over the batch and all places of the image, $n$
# numbers in all:
#
# | | training mode | evaluation mode |
# |---|---|---|
# | mean | $\mu = \frac1n \sum x$, of this batch | $\mu = r_\mu$, a stored number |
# | variance | $s^2 = \frac1n \sum (x - \mu)^2$, of this batch | $s^2 = r_{s^2}$, a stored number |
# | output | $y = \gamma\,\dfrac{x - \mu}{\sqrt{s^2 + \epsilon}} + \beta$ | the same line |
# | afterwards | $r \leftarrow (1 - m)\,r + m \cdot \text{new}$ | nothing |
#
# $\gamma$ and $\beta$ (scale and shift) are weights: they have gradients. $r_\mu$ and $r_{s^2}$ are
# **buffers**: nobody trains them. They change *because data flowed through in training mode*. Torch's
# $m$, called momentum, is 0.1, the weight of the *new* value (other libraries mean the weight of the
# old one). And for the stored variance, torch takes $\frac{1}{n-1} \sum (x - \mu)^2$, the unbiased
# estimate, though it normalises with $\frac1n$.


# %%
def batchnorm(x, gamma, beta, running, training, m=0.1, eps=1e-5):
    """x: shape (B, C, H, W); running: dict with "mean" and "var", shape (C,), changed in place."""
    mean, var = running["mean"], running["var"]
    if training:
        n = x.numel() // x.shape[1]
        mean, var = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), unbiased=False)
        running["mean"] = (1 - m) * running["mean"] + m * mean
        running["var"] = (1 - m) * running["var"] + m * var * n / (n - 1)
    x_hat = (x - by_channel(mean)) / (by_channel(var) + eps).sqrt()
    return by_channel(gamma) * x_hat + by_channel(beta)


def by_channel(values):
    return values[None, :, None, None]


# %%
layer = nn.BatchNorm2d(4).double()
nn.init.normal_(layer.weight)
running = {"mean": torch.zeros(4).double(), "var": torch.ones(4).double()}
for step in range(6):
    layer.train(step < 4)  # four batches in training mode, two in evaluation mode
    x = 3 + 2 * torch.randn(2, 4, 3, 3, dtype=torch.float64)
    ours = batchnorm(x, layer.weight, layer.bias, running, training=step < 4)
    torch.testing.assert_close(ours, layer(x))
torch.testing.assert_close(running["mean"], layer.running_mean)
torch.testing.assert_close(running["var"], layer.running_var)

# %% [markdown]
# ### How fast do the running averages drift?
#
# If each batch says about $\mu$, then $r_T - \mu = (1-m)\,(r_{T-1} - \mu)$, so
#
# $$r_T = \mu + (1-m)^T\,(r_0 - \mu).$$
#
# With $m = 0.1$ half of the old value is gone after $\log 2 / {-\log 0.9} = 6.6$ batches, and after
# 40 batches 1.5 % is left. Fine-tune for 40 steps and the source's statistics are *gone*, whatever
# your learning rate is. It does not appear in the formula.
#
# And each batch says only *about* $\mu$. The noise of the average is that of one batch times
# $\sqrt{m / (2 - m)} = 0.23$. You have met this number: it is the same moving average as Adam's.
#
# Check it on the first BatchNorm of `glyphnet_bn`, the same network as before with BatchNorm in
# place of GroupNorm. How much of the distance to the target's mean is left after $T$ batches?

# %%
bn_backbone = tl.load_backbone("glyphnet_bn").to(run.device)
norm = copy.deepcopy(bn_backbone.body.stem[1]).train()
convolution = bn_backbone.body.stem[0]
r_0, left = norm.running_mean.clone(), []
with torch.no_grad():
    target_mean = convolution(task.train.inputs.to(run.device)).mean(dim=(0, 2, 3))
    for inputs, _ in itertools.islice(endless(task.loaders(20, augment=False).train), 40):
        norm(convolution(inputs.to(run.device)))
        left.append(((norm.running_mean - target_mean).norm() / (r_0 - target_mean).norm()).item())
for batches in (1, 7, 20, 40):
    print(f"after {batches:2} batches: left {left[batches - 1]:.2f}, formula {0.9**batches:.2f}")
assert abs(left[6] - 0.9**7) < 0.15 and left[39] < 0.3

# %% [markdown]
# ### The classic bug: a frozen backbone that moves
#
# Guess 4. The backbone of `glyphnet_bn` was pre-trained to tell 203 letters and symbols apart, and
# the file still has the head that did it. We freeze the backbone
# as it is often done, by switching its gradients off, train a digit head on it, and put the old head
# back.


# %%
scenes = list(tl.scenes.SceneLoader("glyphs", 2, 250, seed=9_003, fixed=True))  # of the source task


def source_accuracy(frozen):
    """Accuracy on the task of pre-training, with the head of pre-training."""
    old = tl.Classifier(frozen, num_classes=len(frozen.source_head[1])).to(run.device)
    with torch.no_grad():
        old.head.weight.copy_(frozen.source_head[0])
        old.head.bias.copy_(frozen.source_head[1])
    return tl.evaluate(old, scenes).accuracy


def moved(before, after):
    """Names of the tensors of two state dicts that are not equal to the last bit."""
    return [name for name in before if not torch.equal(before[name], after[name].cpu())]


# %%
def train_head_on(frozen):
    """40 steps of a new digit head; returns what moved in the backbone, and its old skill."""
    before = {name: value.cpu().clone() for name, value in frozen.state_dict().items()}
    loaders = task.loaders(20, seed=0)
    model = tl.Classifier(frozen, num_classes=10).to(run.device)
    tl.fit(model, loaders.train, None, replace(config, lr=1e-2))
    return moved(before, frozen.state_dict()), source_accuracy(frozen)


# %%
bug = tl.load_backbone("glyphnet_bn")
before = source_accuracy(bug)
bug.requires_grad_(False)  # "frozen"
names, after = train_head_on(bug)
print(f"moved: {len(names)} tensors, such as {names[:3]}")
print(f"source accuracy {before:.2f} -> {after:.2f}, and no weight has changed")
assert not any(name.endswith(("weight", "bias")) for name in names) and after < before - 0.05

# %% [markdown]
# Nothing in that script is an error, and nothing warned. `requires_grad` speaks about gradients, and
# the running averages never had one. They moved because `fit`, like every training loop, calls
# `model.train()`. Whoever shares this backbone with you (another head, a cache of features, the next
# experiment) now has another backbone.
#
# The remedy is one call. `tl.freeze` keeps the module in evaluation mode for good, also after
# `model.train()`:

# %%
remedied = tl.freeze(tl.load_backbone("glyphnet_bn"))
names, after = train_head_on(remedied)
print(f"moved: {len(names)} tensors; source accuracy {before:.2f} -> {after:.2f}")
assert not names and after == before

# %% [markdown]
# ### Small batches: your neighbours change you
#
# In training mode an image's features depend on the images beside it. Here are the features of the
# same 300 images, twice, in two random companies. By how much do they differ, relative to
# their size? The mean of $n$ independent numbers has the error $\sigma/\sqrt n$; so the smaller the
# batch, the more of what an image "is" comes from its neighbours.


# %%
def company_noise(batch_size, repeats=2):
    """Spread of features over random companies, relative to the size of the features."""
    noisy, pool = copy.deepcopy(bn_backbone).train(), task.val.inputs
    outputs = torch.zeros(repeats, len(pool), bn_backbone.feature_dim)
    for repeat in range(repeats):
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(repeat))
        for rows in order.split(batch_size):
            with torch.no_grad():
                outputs[repeat, rows] = noisy(pool[rows].to(run.device)).cpu()
    return (outputs.var(dim=0).sum() / outputs.mean(dim=0).square().sum()).sqrt().item()


# %%
sizes = (2, 20, 100)
noise = dict(zip(sizes, side_by_side(company_noise, sizes), strict=True))
print({size: round(value, 2) for size, value in noise.items()})
assert noise[2] > noise[20] > noise[100] and noise[2] > 0.2

# %% [markdown]
# And how far apart are the two sets of statistics, the source's and the target's? The same 300
# images once in evaluation mode, once as one big batch in training mode, where companions no longer
# matter:

# %%
both = copy.deepcopy(bn_backbone)
with torch.no_grad():
    by_source = both.eval()(task.val.inputs.to(run.device))
    by_target = both.train()(task.val.inputs.to(run.device))
apart = ((by_target - by_source).norm() / by_source.norm()).item()
print(f"features differ by {apart:.0%} of their size")
assert apart > 0.25

# %% [markdown]
# ### Three modes, measured
#
# So there are three things that you can do with BatchNorm when you fine-tune everything else:
#
# - **(a) batch statistics**: training mode, what you get if you think of nothing. Running averages
#   move to the target.
# - **(b) frozen statistics**: evaluation mode throughout; scale and shift are trained like any
#   weight. In our library `tl.freezing.freeze_statistics(model)`.
# - **(c) all of BatchNorm frozen**: scale and shift as well. `freeze_statistics(model, affine=True)`.
#
# In (b) and (c) the layer is a fixed straight line for each channel, training and test compute the
# same function, and the size of the batch does not matter. In (a) the network sees statistics that
# fit the new data. Which of the two is worth more? Live, with batches of 20 and the rate that
# validation chose for each mode in the recorded runs (0.001 for all of them). Do not compare with
# the numbers above: this backbone was pre-trained for a third of the steps.


# %%
def with_frozen_statistics(model, loaders, settings):
    tl.freezing.freeze_statistics(model)
    all_at_once(model, loaders, settings)


slower = replace(config, lr=1e-3)
arms = {
    "(a) batch statistics": lambda draw: fine_tune(draw, slower, "glyphnet_bn"),
    "(b) frozen statistics": lambda draw: fine_tune(
        draw, slower, "glyphnet_bn", with_frozen_statistics
    ),
}
live = tl.compare(arms, draws=num_draws, progress=False, workers=None)
print(live.table())
assert live.difference("(b) frozen statistics", "(a) batch statistics").high < 0.02

# %% [markdown]
# And recorded, all three modes, at three sizes of the batch, five draws:

# %%
for batch_size, entry in recorded["batchnorm"].items():
    modes = Comparison(entry["scores"])
    print(f"batches of {batch_size}")
    for mode in modes.scores:
        difference = modes.difference(mode, "batch statistics")
        against = "" if mode == "batch statistics" else f", minus batch statistics {difference}"
        print(f"  {mode:24} lr {entry['lr'][mode]:g}: {modes.interval(mode)}{against}")

# %%
fig, ax = tl.plots.subplots(figsize=(7, 3.4))
for shift, (mode, color) in enumerate(zip(modes.scores, (BLUE, ORANGE, GREEN), strict=True)):
    found = [Comparison(e["scores"]).interval(mode) for e in recorded["batchnorm"].values()]
    mean = [interval.mean for interval in found]
    half = [interval.high - interval.mean for interval in found]
    x = np.arange(3) + 0.12 * (shift - 1)
    ax.errorbar(x, mean, half, color=color, marker="osD"[shift], ls="", capsize=4, label=mode)
ax.set_xticks(range(3), [f"batches of {size}" for size in recorded["batchnorm"]])
ax.set(ylabel="test accuracy", ylim=(0.7, 0.9))
ax.legend(loc="upper left")
words = "Accuracy of the three modes: level at batches of 2 and 4; at 20 batch statistics lead by 0.04."
tl.plots.alt(fig, words)

# %%
for batch_size, entry in recorded["batchnorm"].items():
    gap = Comparison(entry["scores"]).difference("frozen statistics", "batch statistics")
    assert gap.high < 0 if batch_size == "20" else max(-gap.low, gap.high) < 0.05

# %% [markdown]
# At batches of 20 and 40 steps, batch statistics win by about 4 points [2, 6], live and recorded. They
# hand the network statistics of the target at once, while with frozen statistics the weights have to
# make up for the difference, and 40 steps are few. Freezing scale and shift as well changes nothing
# that five draws could show.
#
# At batches of 4 and 2 the three modes are level; no difference is outside its interval. (Smaller
# batches also mean more steps, as every size sees the same number of images. So compare the modes
# within one size, not the sizes with each other.) The rule "with small batches freeze the statistics"
# would have cost nothing here and gained nothing. Why was the noise not worse? A batch of 2 is not 2
# numbers: in the first layers a channel has 256 places in each image, so its mean is taken over 512.
# A network with few places left, or one image per GPU, is less lucky.
#
# So choose by measuring, with two things in mind. Frozen statistics are the *safe* mode: training and
# test compute the same function, nothing is shared in secret, the batch may have any size. Batch
# statistics are the mode that *adapts*, for good where the images look different, and for bad where
# someone else needs the old statistics.
#
# ### At test time
#
# What if you *forget* evaluation mode at the end? Take a model of mode (a), and test it four ways.

# %%
loaders = task.loaders(20, seed=0)
model = at_the_start(0, "glyphnet_bn")
tl.fit(model, loaders.train, loaders.val, config)


def accuracy_in_training_mode(batch_size, by_class=False):
    """Test accuracy if somebody forgot model.eval(); the model itself is not changed."""
    forgot, correct = copy.deepcopy(model).train(), 0
    order = torch.randperm(len(task.test), generator=torch.Generator().manual_seed(0))
    order = task.test.targets.argsort(stable=True) if by_class else order
    for rows in order.split(batch_size):
        with torch.no_grad():
            answers = forgot(task.test.inputs[rows].to(run.device)).argmax(dim=1).cpu()
        correct += (answers == task.test.targets[rows]).sum().item()
    return correct / len(task.test)


# %%
tests = {
    "training mode, batches of 2, mixed": (2, False),
    "training mode, batches of 50, mixed": (50, False),
    "training mode, batches of 50, one class after the other": (50, True),
}
found = list(side_by_side(lambda name: accuracy_in_training_mode(*tests[name]), tests))
print(f"{tl.evaluate(model, loaders.test).accuracy:.2f}  evaluation mode")
for name, accuracy in zip(tests, found, strict=True):
    print(f"{accuracy:.2f}  {name}")
mixed, one_class = found[1:]
assert one_class < mixed - 0.1

# %% [markdown]
# In big mixed batches the mistake hardly shows, and that is the danger: your test passes. In
# service, images come one at a time or sorted by what they show, and the same model is suddenly a
# bad one. If all images of a batch are sevens, subtracting the mean of the batch subtracts what
# makes a seven.
#
# ## A rate for each layer
#
# Low layers of a network hold what many tasks share, high layers what is particular (lesson 07
# measures it). So, says Howard and Ruder's ULMFiT (2018), let the low ones move less. **Discriminative
# rates**: if the top layer learns at the rate $\eta$, the next lower one learns at $\eta/2.6$, the
# next at $\eta/2.6^2$, and so on. You know how to read that: with Adam it is a *distance budget* for
# each layer.
#
# `TrainConfig(layer_decay=1 / 2.6)` does it. By hand, the layers from the input to the head, and the
# rate of layer $l$ of $0, \dots, T$: $\eta \cdot d^{\,T - l}$.

# %%
layers = tl.freezing.layer_names(at_the_start())
decay, top = 1 / 2.6, len(layers) - 1
by_hand = {name: 1e-2 * decay ** (top - place) for place, name in enumerate(layers)}
groups = tl.freezing.parameter_groups(at_the_start(), 1e-2, 0.01, layer_decay=decay)
for name, rate in by_hand.items():
    print(f"{name:24} {rate:.6f}")
    given = {g["lr"] for g in groups if any(n.startswith(name + ".") for n in g["names"])}
    assert len(given) == 1 and abs(given.pop() - rate) < 1e-12

# %% [markdown]
# **Gradual unfreezing**, from the same paper: first the head alone, for one epoch; then the layer
# below is unfrozen as well, for another epoch; and so on down to the input. Freezing and `fit` are
# all that it takes. (Each call of `fit` starts Adam's averages anew, so its long first steps come
# five times over. Hence a warm-up of two steps in each stage.)


# %%
def gradually(model, loaders, settings, epoch=5):
    """One layer more in each epoch, from the head down; then all of them."""
    parts, names = dict(model.named_modules()), tl.freezing.layer_names(model)[::-1]
    tl.freeze(model)
    for name in names:
        tl.unfreeze(parts[name])
        if name != names[-1]:
            stage = replace(settings, num_steps=epoch, warmup_steps=2, schedule="constant")
            tl.fit(model, loaders.train, None, stage)
    left = settings.num_steps - epoch * (len(names) - 1)
    tl.fit(model, loaders.train, loaders.val, replace(settings, num_steps=left, warmup_steps=2))


# %% [markdown]
# All arms get the same 40 steps, the same images in the same order, the same start. Each arm's rate
# was chosen on validation, over two draws that are not measured, from the same grid (the benchmark
# `benchmarks/fine_tuning.py` does it). **Guess**: by how many points will the two tricks beat one
# rate for all layers?

# %%
for num_steps, entry in recorded["layers"].items():
    comparison = Comparison(entry["scores"])
    print(f"{num_steps} steps")
    for arm in comparison.scores:
        difference = comparison.difference(arm, "one rate")
        against = "" if arm == "one rate" else f", minus one rate {difference}"
        print(f"  {arm:20} lr {entry['lr'][arm]:5g}: {comparison.interval(arm)}{against}")

# %% [markdown]
# And live, gradual unfreezing against all at once, 40 steps:

# %%
arms = {
    "one rate": lambda draw: fine_tune(draw, config),
    "gradual": lambda draw: fine_tune(draw, config, train=gradually),
}
live = tl.compare(arms, draws=num_draws, progress=False, workers=None)
print(live.table())
assert live.difference("gradual", "one rate").high < 0.04
for entry in recorded["layers"].values():
    comparison = Comparison(entry["scores"])
    gained = [comparison.difference(arm, "one rate") for arm in comparison.scores]
    assert all(gain.high < 0.03 for gain in gained)

# %% [markdown]
# Neither trick wins. At 40 steps both are *worse* than one rate for all: 3 points for the rates by
# layer [1.8, 4.4], 2 for gradual unfreezing [0.5, 3.7], 6 for both together. With three times as many steps
# gradual unfreezing is level with one rate (0.3 points [-0.9, 1.5], which is nothing); the rates by
# layer are still about a point behind [0, 2.3], and both together two.
#
# A likely reason: both hold the low layers back, and here these have to move. Letters over one
# photograph became coloured digits over another. With few steps, a layer that waits or crawls does
# not get there. ULMFiT fine-tuned a language model on text of the same language, for epochs. So these
# are no laws of fine-tuning but a *bet that the low layers are right already*. Lesson 07 shows how to
# test that bet before you place it, lesson 08 where staying close to $\theta_0$ does pay.
#
# ## Where it fails
#
# **The best rate belongs to a budget.** It was 0.003 for 40 steps. For 120 steps 0.001 and 0.003 were
# level on validation. The distance rule tells you to expect that: more steps go further at the same
# rate. A rate from a paper is a rate for its batch size, its schedule and its number of steps.
#
# **Neighbouring rates cannot be told apart.** The validation set has 300 images. An accuracy of 0.82 on
# 300 images has an interval of four points to either side. So do not search between 0.002 and 0.003,
# and between two that look alike take the lower one: the cliff is on the right.
#
# **Noise is a statement about most weights, not about all.** The curve of typical steps is an average
# over 310,186 weights. A bias of the head, whose gradient has one sign for twenty steps, moves by
# $\eta$ in each of them.
#
# **An audit sees tensors, not functions.** Nothing moves in a dropout layer, and in training mode it
# still gives another answer each time. `tl.freeze` puts the whole part into evaluation mode for this
# reason too; a comparison of state dicts would not have told you.
#
# **Frozen statistics can be the wrong statistics.** If the target looks very different from the source
# (other brightness, other sensor), evaluation mode normalises by numbers that do not fit. You saw how
# far these two tasks are apart: half of the size of a feature. Measure both modes.
#
# ## Explorer: rate and warm-up
#
# The recorded training curves of ten draws (thin) and their mean. The dotted line is $\log 10$. Find
# the lowest rate at which warm-up changes the picture. At 0.03 with warm-up, when does it go wrong:
# in the first steps, or when the rate has reached its peak?


# %% jupyter={"source_hidden": true}
def draw_recorded(lr, warmup):
    curves = select("train_loss", lr, warmup)  # (draws, steps)
    scores = mean_interval(select("test_accuracy", lr, warmup))
    fig, (left, right) = tl.plots.subplots(
        1, 2, figsize=(9, 3.2), gridspec_kw={"width_ratios": (3, 2)}
    )
    for curve in curves:
        left.plot(np.arange(1, 41), curve, color=BLUE, lw=0.6, ls="-", alpha=0.5)
    left.plot(np.arange(1, 41), curves.mean(axis=0), color=BLUE, lw=2.5, ls="-")
    left.axhline(math.log(10), color="#999999", ls=":")
    left.set(xlabel="step", ylabel="training loss (nats)", ylim=(0, 5))
    left.set_title(f"test accuracy {scores}")
    schedule = [lr * lr_factor(step, 40, warmup, "cosine") for step in range(40)]
    right.plot(np.arange(1, 41), schedule, color=GREEN, ls="-")
    right.set(xlabel="step", ylabel="learning rate", ylim=(0, 0.032))
    moved_by = select("distance", lr, warmup).mean() / size
    right.set_title(f"moved by {moved_by:.0%} of the weights' size")


# %%
tl.widgets.explore(
    draw_recorded,
    lr=tl.widgets.choice([(f"{lr:g}", lr) for lr in rates], value=1e-2, label="rate", drag=True),
    warmup=tl.widgets.choice([("none", 0), ("10 steps", 10)], label="warm-up"),
)

# %% [markdown]
# (With warm-up, at 0.03, no single step does it: the loss climbs with the rate, and is worst when the
# rate is at its peak.)
#
# ## Quiz

# %%
tl.quiz("06")

# %% [markdown]
# ## Exercise
#
# [Exercise 06](../exercises/06_full_fine_tuning.ipynb): the largest stable rate of a loss, the first
# steps of Adam under warm-up, BatchNorm's running averages by hand, a rate for each layer, and an
# audit that finds what moved in a "frozen" model.
#
# ## Papers
#
# - Kingma, Ba 2015, *Adam: a method for stochastic optimization*, section 2.1 (the step is bounded
#   by the rate) and section 3 (bias correction), arXiv:1412.6980.
# - Ma, Yarats 2021, *On the adequacy of untuned warmup for adaptive optimization* (warm-up is about
#   the size of the first updates), arXiv:1910.04209.
# - Liu et al. 2020, *On the variance of the adaptive learning rate and beyond* (RAdam: another
#   explanation), arXiv:1908.03265.
# - Lewkowycz, Bahri, Dyer, Sohl-Dickstein, Gur-Ari 2020, *The large learning rate phase of deep
#   learning: the catapult mechanism*, arXiv:2003.02218.
# - Cohen, Kaur, Li, Kolter, Talwalkar 2021, *Gradient descent on neural networks typically occurs at
#   the edge of stability*, arXiv:2103.00065.
# - Pearlmutter 1994, *Fast exact multiplication by the Hessian*, Neural Computation 6(1).
# - Ioffe, Szegedy 2015, *Batch normalization*, section 3 and algorithm 2 (statistics in training and
#   in inference), arXiv:1502.03167.
# - Howard, Ruder 2018, *Universal language model fine-tuning for text classification*, section 3.2
#   (discriminative rates, slanted triangular rates) and 3.3 (gradual unfreezing), arXiv:1801.06146.
#
# ## Glossary
#
# | term | meaning | Chinese |
# |---|---|---|
# | full fine-tuning | to train every weight on, from the pre-trained point | 全参数微调 |
# | learning rate | how far one step goes | 学习率 |
# | curvature | second derivative of the loss along a direction | 曲率 |
# | Hessian | matrix of all second derivatives | 海森矩阵 |
# | power iteration | repeated multiplication, to find the largest eigenvalue | 幂迭代 |
# | momentum | a part of the last step, added to this one | 动量 |
# | moving average | old value times $1 - m$ plus new value times $m$ | 滑动平均 |
# | bias correction | division that makes up for an average that began at zero | 偏差修正 |
# | warm-up | first steps, in which the learning rate rises | 学习率预热 |
# | batch normalisation | normalising each channel by statistics of the batch | 批归一化 |
# | running statistics | moving averages kept for evaluation mode | 运行统计量 |
# | buffer | a tensor of a model that has no gradient | 缓冲区 |
# | discriminative learning rates | a rate of its own for each layer | 分层学习率 |
# | gradual unfreezing | releasing layers one after the other, from the head down | 逐层解冻 |
