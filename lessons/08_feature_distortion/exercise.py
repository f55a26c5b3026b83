# %% [markdown]
# # Exercise 08: feature distortion
#
# You rebuild the lesson's two-layer network in numpy, until you can say where fine-tuning ends
# without running it. Then two tools: one step of training with a spring, and a point on the line
# between two models that do not quite fit together.
#
# | question | | points |
# |---|---|---|
# | 1 | two gradients | 2 |
# | 2 | what training cannot reach | 3 |
# | 3 | where fine-tuning ends | 3 |
# | 4 | a step with a spring | 3 |
# | 5 | a point on the line | 4 |
# | 6 | judgement, in your own words | 4 |
#
# Replace each `raise NotImplementedError(...)`, run the cell, then the check below it. A check costs
# nothing and records nothing. Right answers unlock a picture or a number.

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %%
import numpy as np

BLUE, RED, GREEN, PURPLE = tl.plots.palette[:4]

# %% [markdown]
# ## Question 1. Two gradients (2 points)
#
# Inputs $X\;(n, d)$, targets $y\;(n)$, a backbone $B\;(k, d)$, a head $v\;(k)$. The network says
# $z = v^\top B x$, and the loss is
#
# $$L = \frac{1}{2n} \sum_{i=1}^n \big( v^\top B x_i - y_i \big)^2 .$$
#
# Write both gradients.


# %% question="08.q1"
def gradients(v, B, X, y):
    """Gradients of the loss with respect to the head and to the backbone.

    Args:
        v: shape (k,).
        B: shape (k, d).
        X: shape (n, d), one input per row.
        y: shape (n,).

    Returns:
        dict with "v", shape (k,), and "B", shape (k, d).
    """
    ### BEGIN SOLUTION
    g = X.T @ (X @ (B.T @ v) - y) / len(X)  # the gradient of w = B^T v: in the span of the inputs
    return {"v": B @ g, "B": np.outer(v, g)}
    ### END SOLUTION


# %% check="08.q1"
right_1 = tl.check("08.q1", gradients)

# %% [markdown]
# When it is right: 300 of your steps. The training inputs live in 3 of 6 dimensions, and below is how
# far each *column* of $B$ has moved. Which columns belong to inputs that were never seen?

# %%
if right_1:
    rng = np.random.default_rng(0)
    X = np.concatenate([rng.normal(size=(40, 3)), np.zeros((40, 3))], axis=1)
    y = X @ rng.normal(size=6)
    v, B = rng.normal(size=2), rng.normal(size=(2, 6))
    start_B = B.copy()
    for _ in range(300):
        step = gradients(v, B, X, y)
        v, B = v - 0.05 * step["v"], B - 0.05 * step["B"]
    print("training loss:", round(float(np.mean((X @ B.T @ v - y) ** 2)), 8))
    print("movement of each column of B:", np.linalg.norm(B - start_B, axis=0).round(4))

# %% [markdown]
# ## Question 2. What training cannot reach (3 points)
#
# In general the span $S$ of the training inputs is not made of whole columns. Given the training
# inputs and some new ones, return the part of each new input that is *at right angles to $S$*: the
# part on which the features stay as they were, whatever happens.
#
# Careful: inputs may repeat, and there may be more of them than dimensions in their span. (Count a
# direction as missing if its singular value is below $10^{-8}$ of the largest.)


# %% question="08.q2"
def unreached(X, new):
    """The part of each new input that is at right angles to all training inputs.

    Args:
        X: training inputs, shape (n, d); their rank may be less than n and d.
        new: new inputs, shape (m, d).

    Returns:
        Shape (m, d).
    """
    ### BEGIN SOLUTION
    _, sizes, rows = np.linalg.svd(X, full_matrices=False)
    basis = rows[sizes > 1e-8 * sizes.max()]  # (rank, d): more rows would be directions of noise
    return new - new @ basis.T @ basis
    ### END SOLUTION


# %% check="08.q2"
right_2 = tl.check("08.q2", unreached)

# %%
if right_1 and right_2:
    X = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 6))  # now S is askew
    v, B = rng.normal(size=2), rng.normal(size=(2, 6))
    moved = B - 0.1 * gradients(v, B, X, rng.normal(size=40))["B"]
    new = rng.normal(size=(1, 6))
    rest = unreached(X, new)
    print("features of a new input moved by", np.abs((moved - B) @ new.T).max().round(4))
    print("those of its unreached part by  ", np.abs((moved - B) @ rest.T).max().round(12))

# %% [markdown]
# ## Question 3. Where fine-tuning ends (3 points)
#
# One feature, as in the lesson's picture: $s$ is its length inside $S$, $v$ the head. Both start at
# $(c, v_0)$ with $c > 0$. Gradient flow on $\frac12 (v s - v^* c)^2$ keeps $v^2 - s^2$, and ends where
# the error is zero. Return $s$ and $v$ at the end. (You may assume $v^* > 0$ and $v_0 \neq -c$.)
#
# The check tries heads on both sides. Draw the hyperbolas before you decide on a sign.


# %% question="08.q3"
def end_of_training(v0, c, v_true):
    """Where gradient flow from (s, v) = (c, v0) ends.

    Args:
        v0: the head at the start; any sign, not -c.
        c: the feature's length inside S at the start, > 0.
        v_true: the right head, > 0.

    Returns:
        dict with "s" and "v", two numbers.
    """
    ### BEGIN SOLUTION
    a = v0**2 - c**2  # what is conserved
    v = np.sqrt((a + np.sqrt(a**2 + 4 * (v_true * c) ** 2)) / 2)
    v = -v if v0 < -c else v  # the lower branch never reaches a positive head
    return {"s": v_true * c / v, "v": v}
    ### END SOLUTION


# %% check="08.q3"
right_3 = tl.check("08.q3", end_of_training)

# %% [markdown]
# When it is right, your formula draws a map without a single step of training: the error outside $S$
# for every head that you could start from.

# %%
if right_3:
    heads = np.linspace(-2.5, 3.5, 301)
    fig, ax = tl.plots.subplots(figsize=(7, 3.2))
    for length, color in ((0.3, BLUE), (0.6, RED), (0.9, GREEN)):
        ends = np.array([end_of_training(v0, length + 1e-9, 1.5)["v"] for v0 in heads])
        ax.plot(heads, (ends / 1.5 - 1) ** 2, color=color, label=f"c = {length}")
    ax.set(xlabel="head at the start", ylabel="error outside S", ylim=(0, 6))
    ax.axvline(1.5, color="black", ls=":", lw=1)
    ax.legend(title="the right head is 1.5", title_fontsize=9)
    words = "Error outside S over the starting head: zero at 1.5, a jump upward at minus c."
    tl.plots.alt(fig, words)

# %% [markdown]
# ## Question 4. A step with a spring (3 points)
#
# One step of plain gradient descent on
#
# $$L(\theta) + \tfrac{\alpha}{2}\,|\theta_{backbone} - \theta_0|^2 + \tfrac{\beta}{2}\,|\theta_{head}|^2.$$
#
# Parameters come as a dict from name to array. The head's names begin with `"head."`. You are handed
# the gradient of $L$ alone. A name that has no gradient is **frozen**.


# %% question="08.q4"
def spring_step(theta, start, gradient, lr, alpha, beta):
    """One step of gradient descent with the L2-SP penalty.

    Li, Grandvalet, Davoine 2018, section 3, arXiv:1802.01483.

    Args:
        theta: name -> array, the parameters now.
        start: name -> array, the parameters at the start; same names and shapes.
        gradient: name -> array, of the loss without the penalty; frozen parameters are absent.
        lr: learning rate, > 0.
        alpha: strength of the spring, >= 0.
        beta: strength of the pull of the head to zero, >= 0.

    Returns:
        dict with all the names of theta, after the step.
    """
    ### BEGIN SOLUTION
    new = dict(theta)  # what is frozen stays
    for name, slope in gradient.items():
        is_head = name.startswith("head.")  # with the dot: other layers may begin with "head"
        pull = beta * theta[name] if is_head else alpha * (theta[name] - start[name])
        new[name] = theta[name] - lr * (slope + pull)
    return new
    ### END SOLUTION


# %% check="08.q4"
right_4 = tl.check("08.q4", spring_step)

# %% [markdown]
# ## Question 5. A point on the line (4 points)
#
# Return the state dict at $\alpha$ on the line from `theta_a` ($\alpha = 0$) to `theta_b`
# ($\alpha = 1$). Real state dicts have traps:
#
# - arrays of whole numbers (a count of batches) cannot be mixed: take that of the nearer end, and of
#   `theta_b` from $\alpha = 0.5$ on;
# - if one has a key that the other lacks, or two shapes differ, raise a `ValueError` whose message
#   contains the name of the key. numpy will not help you with shapes: it broadcasts.


# %% question="08.q5"
def interpolate(theta_a, theta_b, alpha):
    """Point on the line between two models of one architecture.

    Wortsman et al. 2022 (WiSE-FT), section 3, arXiv:2109.01903.

    Args:
        theta_a: name -> array, at alpha = 0.
        theta_b: name -> array, at alpha = 1.
        alpha: in [0, 1].

    Returns:
        A new dict with the same names.

    Raises:
        ValueError: if keys or shapes differ; names the key.
    """
    ### BEGIN SOLUTION
    for name in theta_a.keys() ^ theta_b.keys():
        raise ValueError(f"only one of the two models has {name}")
    mixed = {}
    for name, a in theta_a.items():
        b = theta_b[name]
        if np.shape(a) != np.shape(b):
            raise ValueError(f"{name} has the shapes {np.shape(a)} and {np.shape(b)}")
        if np.issubdtype(np.asarray(a).dtype, np.integer):
            mixed[name] = a if alpha < 0.5 else b
        else:
            mixed[name] = (1 - alpha) * a + alpha * b
    return mixed
    ### END SOLUTION


# %% check="08.q5"
right_5 = tl.check("08.q5", interpolate)

# %% [markdown]
# When it is right: a linear network whose head was probed, one that was fine-tuned, and the line
# between them. Outside $S$, is the middle better than its worse end?

# %%
if right_1 and right_5:
    rng = np.random.default_rng(3)
    X, v_right = np.pad(rng.normal(size=(60, 8)), ((0, 0), (0, 16))), rng.normal(size=4)
    B_good = np.linalg.qr(rng.normal(size=(24, 4)))[0].T
    y, v, B = X @ B_good.T @ v_right, np.zeros(4), B_good
    for _ in range(3000):
        step = gradients(v, B, X, y)
        v, B = v - 0.05 * step["v"], B - 0.05 * step["B"]
    ends = {"v": v_right, "B": B_good}, {"v": v, "B": B}
    for alpha in (0, 0.25, 0.5, 0.75, 1):
        point = interpolate(*ends, alpha)
        error = point["B"].T @ point["v"] - B_good.T @ v_right
        inside, outside = np.sum(error[:8] ** 2), np.sum(error[8:] ** 2)
        print(f"alpha {alpha:4}  error inside S {inside:.4f}   outside {outside:.4f}")

# %% [markdown]
# ## Question 6. Judgement (4 points)
#
# A colleague writes:
#
# > "Our X-ray model must also work in hospital B, where the machine is another. We have 2,000 labelled
# > images of hospital A, and 60 of B. I fine-tuned checkpoint M and checkpoint N (two different
# > pre-trainings, same architecture) on A. The paper says fine-tuning hurts out of distribution, so for
# > B we should use a probe. Or I average the weights of the two fine-tuned models; averaging is known
# > to be robust. I will try probe, both models, and the line between them at 21 points on the 60
# > images of B, and report the best accuracy."
#
# Answer in about 150 words. Is the sentence about the paper a reason? Will the average work? What is
# wrong with the plan's last sentence? What would you do instead, and what would you report?

# %% [markdown] question="08.q6"
# **Your answer**
#
# <!-- BEGIN SOLUTION -->
# The paper's result needs good features *under this shift*. Whether M's features are good on B's
# machine is an empirical question: a probe's accuracy on B, next to that on A, is the evidence. If the
# probe is poor on B too, there is nothing to protect, and fine-tuning (with augmentation that looks
# like B) may win.
#
# The average of models from two pre-trainings will probably be near chance: their channels do not
# correspond. A safe line joins models with one start, for example the probe on M and the model that was
# fine-tuned from it. M and N can be combined by averaging their *predictions*.
#
# Choosing the best of 24 candidates on 60 images and reporting that very number is optimistic: with
# 60 images an interval is some 12 points to each side. I would fix alpha = 0.5 in advance, or choose on
# validation images of A, and use B once, for the report. Or split B, and say so.
#
# I would report accuracy on A and on B separately, with intervals, for the probe, probe-then-fine-tune
# and their middle, so that the price on A is visible too.
# <!-- END SOLUTION -->

# %% [markdown]
# ## If you want more (not graded)
#
# - Two heads share the features, $Z = V B x$ with $V\;(K, k)$. What is conserved now?
# - Put weight decay into the one-feature network. What happens to $v^2 - s^2$ over time? (It shrinks
#   at a rate that you can write down.) Which hyperbola does training end on after a long time?
# - Take different learning rates for $v$ and $s$. Which curve replaces the hyperbola, and what does a
#   head that learns 100 times faster than the feature remind you of?
