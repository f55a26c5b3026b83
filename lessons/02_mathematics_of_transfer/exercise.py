# %% [markdown]
# # Exercise 02: the mathematics of transfer
#
# You write the steps and the formulas of lesson 02 in the forms that the lesson left out: Adam
# that pulls towards $\theta_0$, L2-SP with a new head, the risk of stopping early, and the largest
# error of $\theta_0$ that is still safe. Pencil first, then Python.
#
# **Points**: 17. **Time**: about 60 minutes. **Before this**: lesson 02.
#
# Below every answer stands a check. Run it as often as you like; nothing is recorded.

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %%
import numpy as np

# %% [markdown]
# ## Question 1 (1 point): one step with a pull
#
# The objective is $\hat R(\theta) + \frac{\alpha}{2}\|\theta - c\|^2$ with a centre $c$ of any
# kind. Write one step of plain SGD.

# %% question="02.q1"
def sgd_step(theta, grad, lr, alpha, center):
    """One step of SGD on the penalised risk.

    Args:
        theta: present weights, shape (d,).
        grad: gradient of the empirical risk at theta, without the penalty, shape (d,).
        lr: learning rate, > 0.
        alpha: strength of the pull, >= 0.
        center: where the penalty pulls to, shape (d,).

    Returns:
        The new weights, shape (d,).
    """
    ### BEGIN SOLUTION
    return theta - lr * (grad + alpha * (theta - center))
    ### END SOLUTION


# %% check="02.q1"
tl.check("02.q1", sgd_step)

# %% [markdown]
# ## Question 2 (3 points): Adam with a pull, in two forms
#
# Now under Adam, and towards a centre. If `decoupled` is false, the pull is part of the gradient
# from the start. If it is true, the gradient stays as it is, and the step moves the weights in
# addition by $-\eta\alpha(\theta - c)$, where $\theta$ are the weights *before* the step.
#
# Use $\beta_1 = 0.9$, $\beta_2 = 0.999$, $\epsilon = 10^{-8}$.

# %% question="02.q2"
def adam_step(theta, grad, m, v, step, lr, alpha, center, decoupled):
    """One step of Adam with a pull towards a centre.

    Args:
        theta, grad, center: as in question 1, shape (d,).
        m, v: running averages of the gradient and of its square before this step, shape (d,).
        step: number of this step; the first is 1.
        lr, alpha: learning rate and strength of the pull.
        decoupled: False: pull in the gradient (Adam). True: pull outside (AdamW).

    Returns:
        dict with the new "theta", "m" and "v", each of shape (d,).
    """
    ### BEGIN SOLUTION
    pull = alpha * (theta - center)
    if not decoupled:
        grad = grad + pull
    m = 0.9 * m + 0.1 * grad
    v = 0.999 * v + 0.001 * grad**2
    m_hat, v_hat = m / (1 - 0.9**step), v / (1 - 0.999**step)
    new_theta = theta - lr * m_hat / (np.sqrt(v_hat) + 1e-8)
    if decoupled:
        new_theta = new_theta - lr * pull
    return {"theta": new_theta, "m": m, "v": v}
    ### END SOLUTION


# %% check="02.q2"
tl.check("02.q2", adam_step)

# %% [markdown]
# ## Question 3 (3 points): L2-SP with a new head
#
# A head for a new task has no pre-trained value. Li et al. (2018) therefore use two penalties. Let
# the first $k$ weights be the pre-trained ones and the rest the head:
#
# $$\frac{1}{2n}\|X\theta - y\|^2 + \frac{\alpha}{2}\sum_{j \le k} (\theta_j - \theta_{0,j})^2
#   + \frac{\beta}{2}\sum_{j > k} \theta_j^2 .$$
#
# Find the minimiser. *On the way:* what does the matrix $\alpha I$ of the lesson turn into? What
# does the centre?

# %% question="02.q3"
def l2sp_with_head(X, y, theta_0, alpha, beta):
    """Minimiser of the risk with a pull to theta_0 and a pull of the head to zero.

    Args:
        X: inputs, shape (n, d); n may be smaller than d.
        y: targets, shape (n,).
        theta_0: pre-trained values of the first k weights, shape (k,), k < d.
        alpha: strength for the first k weights, > 0.
        beta: strength for the other d - k weights, > 0.

    Returns:
        All weights, shape (d,).
    """
    ### BEGIN SOLUTION
    n, d = X.shape
    k = len(theta_0)
    center = np.concatenate([theta_0, np.zeros(d - k)])
    strength = np.concatenate([np.full(k, alpha), np.full(d - k, beta)])
    unexplained = y - X @ center
    return center + np.linalg.solve(X.T @ X / n + np.diag(strength), X.T @ unexplained / n)
    ### END SOLUTION


# %% check="02.q3"
tl.check("02.q3", l2sp_with_head)

# %% [markdown]
# ## Question 4 (3 points): the risk of stopping early
#
# Gradient descent without penalty from any start, $t$ steps at rate $\eta$, in the linear model of
# the lesson. Give the squared bias and the variance, each summed over all directions. There may be
# fewer examples than weights; what happens in a silent direction?

# %% question="02.q4"
def early_stopping_risk(X, theta_star, start, sigma, lr, steps):
    """Squared bias and variance of gradient descent, averaged over the noise.

    Args:
        X: inputs, shape (n, d); n may be smaller than d.
        theta_star: true weights, shape (d,).
        start: where gradient descent starts, shape (d,).
        sigma: standard deviation of the noise.
        lr: learning rate; lr times the largest eigenvalue of X^T X / n is below 2.
        steps: number of steps, >= 1.

    Returns:
        [squared bias, variance], two floats.
    """
    ### BEGIN SOLUTION
    n = len(X)
    eigenvalues, V = np.linalg.eigh(X.T @ X / n)
    keep = (1 - lr * eigenvalues) ** steps
    bias = keep * (V.T @ (start - theta_star))
    heard = eigenvalues > 1e-10 * eigenvalues.max()  # a silent direction has no noise either
    variance = (1 - keep[heard]) ** 2 * sigma**2 / (n * eigenvalues[heard])
    return [np.sum(bias**2), np.sum(variance)]
    ### END SOLUTION


# %% check="02.q4"
tl.check("02.q4", early_stopping_risk)

# %% [markdown]
# ## Question 5 (3 points): how wrong may $\theta_0$ be?
#
# Scratch (from zero) and transfer (from $\theta_0 = \theta^* + \delta$) take the same number of
# steps. You know how long $\delta$ is, but not where it points. Find the largest length for which
# transfer is *never* worse than scratch, wherever $\delta$ points.
#
# *On the way:* section 11 has the condition. For a given length, which direction is the worst?

# %% question="02.q5"
def safe_length(X, theta_star, lr, steps):
    """Largest |delta| at which transfer cannot lose against scratch at the same steps.

    Args:
        X: inputs, shape (n, d); n may be smaller than d.
        theta_star: true weights, shape (d,).
        lr, steps: as in question 4.

    Returns:
        The length, a float >= 0.
    """
    ### BEGIN SOLUTION
    eigenvalues, V = np.linalg.eigh(X.T @ X / len(X))
    weights = (1 - lr * eigenvalues) ** (2 * steps)  # (1 - f)^2 in each direction
    scratch = np.sum(weights * (V.T @ theta_star) ** 2)
    return np.sqrt(scratch / weights.max())  # the worst delta lies in the quietest direction
    ### END SOLUTION


# %% check="02.q5"
tl.check("02.q5", safe_length)

# %% [markdown]
# ## Question 6 (4 points, marked by hand): advise a hospital
#
# A hospital has 60 labelled X-rays and a network with 25 million weights, pre-trained on
# photographs.
#
# - *Anna* wants to fine-tune with AdamW, `lr=1e-4`, `weight_decay=0.01`, for 300 steps. "The
#   weight decay keeps us near the pre-trained weights."
# - *Ben* wants L2-SP. "And $\alpha$ as large as possible, that is the safest choice."
# - *Chen* wants to train from scratch. "X-rays are not photographs, so $\theta_0$ is far from the
#   truth."
#
# What is right and what is wrong in each sentence? Use numbers and formulas from the lesson where
# you can. Which experiment would you run to decide? 10 to 15 sentences.

# %% [markdown] question="02.q6"
# <!-- BEGIN SOLUTION -->
# **Anna.** The decay of AdamW pulls towards zero; nothing in it knows $\theta_0$. It also does
# next to nothing here: in 300 steps a weight keeps $(1 - 10^{-6})^{300} = 0.9997$ of itself. What
# keeps her weights near $\theta_0$ is that the run is short: under SGD, $t$ steps at rate $\eta$
# act like a pull to $\theta_0$ of strength $1/(\eta t)$. Her run may well be good, for a reason
# that is not hers, and the number of steps is what she should tune.
#
# **Ben.** L2-SP says openly what is believed, and its result does not depend on the moment of
# stopping. But the largest $\alpha$ is not the safest: it returns $\theta_0$ itself, with all its
# errors, even where the 60 images know better. The best is about $\sigma^2/(n\tau^2)$: less pull
# with more labels, more with noisy labels. The head must not be pulled to $\theta_0$, since it has
# none.
#
# **Chen.** The distance is the wrong question. Errors where the images speak loudly are repaired
# in the first steps. What matters are the directions in which 60 images say nothing, and with 25
# million weights these are nearly all. There a start from scratch keeps its random values, and the
# photographs' edges and textures are likely to be less wrong than those.
#
# **The experiment.** Three arms: scratch with the same augmentation and its own tuned number of
# steps; fine-tuning with steps tuned; L2-SP with $\alpha$ over powers of ten. Choose on validation
# images of other patients, read the test once, repeat on several draws of the 60, and compare the
# arms on the same draws with an interval for the difference.
# <!-- END SOLUTION -->
