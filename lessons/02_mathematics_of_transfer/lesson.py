# %% [markdown]
# # 02 The mathematics of transfer
#
# A pre-trained network hands you one thing: a point $\theta_0$ in the space of its weights. What
# can a *point* be good for? This lesson answers with pencil and paper, and lets the computer check
# every line.
#
# **Goals.** When you have worked through it you can
#
# 1. write fine-tuning as the minimisation of an empirical risk, and name the two places where
#    $\theta_0$ enters;
# 2. write one step of SGD, Adam and AdamW with weight decay by hand, and say where "weight decay"
#    and "L2 penalty" part ways;
# 3. predict from formulas that you derived when staying near $\theta_0$ lowers the test error, and
#    when it raises it.
#
# **Before this:** lessons 00 and 01; gradients; eigenvectors of a symmetric matrix.
#
# **Time:** about 90 minutes.
#
# **Expected result:** five ways of training, simulated 4,000 times each, have the bias, the
# variance and the test error that one closed formula gives them, all within 4 standard errors.

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %%
import numpy as np
import torch

from tlcourse import plots
from tlcourse.evaluation import mean_interval

BLUE, ORANGE, GREEN = plots.palette[:3]  # transfer, scratch, a third thing
torch.set_default_dtype(torch.float64)  # we compare numbers to ten digits in this lesson

# %% [markdown]
# ## 1. A question before anything is shown
#
# A linear model has 20 weights. You own 30 noisy examples. Somebody offers you pre-trained weights
# $\theta_0$ and admits: *they are further from the true weights than the zero vector is*, by a
# factor of 1.5.
#
# You train twice by gradient descent, once from zero and once from $\theta_0$, and stop each run
# at its own best moment. Which run ends with the smaller test error?
#
# - (a) The one from zero: it starts closer to the truth.
# - (b) The one from $\theta_0$: pre-training always helps.
# - (c) The distance does not settle it; you would have to know one thing more. Which?
#
# Write your guess down. Section 11 has the answer, in colour.

# %% [markdown]
# ## 2. What transfer changes in the empirical risk
#
# Let $\ell(\theta; x, y)$ be the loss of the weights $\theta$ on one example. We would like
# a small **risk**, the loss expected on a new example of the target task,
#
# $$R(\theta) = \mathbb{E}_{(x, y)}\,[\ell(\theta; x, y)],$$
#
# but we own only $n$ examples, so we minimise their average, the **empirical risk**:
#
# $$\hat R(\theta) = \frac{1}{n}\sum_{i=1}^{n} \ell(\theta; x_i, y_i).$$
#
# Write $\theta^*$ for the weights with the smallest risk $R$: the truth, as far as this model can
# hold it. With many examples $\hat R$ is nearly $R$, and its lowest point is nearly $\theta^*$.
# With few examples there are directions in which $\hat R$ is almost flat: the data do not say
# where to go, and what little they say is noise. *Something else* decides there.
#
# Now transfer. A source task with many examples has been solved and left us $\theta_0$. The target
# examples are the same as before, and so is the loss: transfer does not touch $\hat R$. It changes
# what decides where $\hat R$ is silent:
#
# 1. **where the search begins**: at $\theta_0$ instead of at zero or at random (*initialisation*);
# 2. **what is added to $\hat R$**: a pull towards $\theta_0$ instead of a pull towards zero
#    (*prior*).
#
# How good is the pre-trained point? All that matters about it is one vector, its error
#
# $$\delta = \theta_0 - \theta^*.$$
#
# Nobody knows $\delta$ in practice. We shall play with it, and see which of its properties count.

# %% [markdown]
# ## 3. The picture
#
# Two weights and eight examples, so that we can see everything. The model is
# $y = x^\top\theta^* + \text{noise}$, the loss half the squared error. The inputs vary a lot along
# one direction and little along another, as the features of real data do.

# %%
rng = np.random.default_rng(8)
spread = np.array([[1.0, 0.4], [-0.12, 0.3]])  # long along one axis, short across
toy_X = rng.normal(size=(8, 2)) @ spread  # (n, d) = (8, 2)
truth = np.array([0.4, 1.6])  # theta*
toy_y = toy_X @ truth + 0.6 * rng.normal(size=8)
toy_0 = truth + np.array([0.65, 0.1])  # theta_0: wrong, but not very wrong


def descend(X, y, start, lr, steps):
    """Gradient descent on the empirical risk. Returns every point visited, (steps + 1, d)."""
    path = [start]
    for _ in range(steps):
        gradient = X.T @ (X @ path[-1] - y) / len(y)
        path.append(path[-1] - lr * gradient)
    return np.array(path)


# %%
paths = {
    "from zero": (descend(toy_X, toy_y, np.zeros(2), 0.1, 4000), ORANGE),
    "from θ₀": (descend(toy_X, toy_y, toy_0, 0.1, 4000), BLUE),
}

# %% jupyter={"source_hidden": true}
grid_1, grid_2 = np.meshgrid(np.linspace(-0.4, 1.7, 100), np.linspace(-0.3, 2.2, 100))
grid = np.stack([grid_1.ravel(), grid_2.ravel()])  # (2, 10000)
toy_risk = np.mean((toy_X @ grid - toy_y[:, None]) ** 2, axis=0).reshape(grid_1.shape) / 2

figure, ax = plots.subplots(figsize=(6, 4.8))
levels = toy_risk.min() + np.array([0.01, 0.05, 0.15, 0.35, 0.7, 1.2])
ax.contour(grid_1, grid_2, toy_risk, levels, colors="0.75", linewidths=1)
for name, (path, colour) in paths.items():
    ax.plot(*path.T, "-", color=colour, label=name)
    ax.plot(*path[[0, 5, 10, 20, 40, 80, 160, 320, 640]].T, "o", color=colour, ms=5)
ax.plot(*truth, "*", color="black", ms=16, label=r"truth $\theta^*$")
ax.plot(*path[-1], "s", color="0.4", ms=8, label=r"bottom of $\hat R$")
ax.set(xlabel="weight 1", ylabel="weight 2", aspect="equal")
ax.set_title("One bowl, two starts (dots: steps 0, 5, 10, 20, 40, ...)")
ax.legend(loc="lower right")
plots.alt(figure, "Contours of the empirical risk form a long tilted valley. The path from zero "
          "enters the valley far below the truth and creeps to the bottom. The path from theta_0 "
          "passes close to the truth in a few steps, then creeps down to the same bottom.")

# %% [markdown]
# Before you run the next cell: at which moment is the blue run nearest to the truth? And the
# orange one?

# %% tags=["nbval-check-output"]
for name, (path, _) in paths.items():
    distance = np.linalg.norm(path - truth, axis=1)
    best = distance.argmin()
    when = "at the very end" if best > 1000 else f"after {best} steps"
    print(f"{name}: distance from the truth at the start {distance[0]:.2f}, "
          f"at its smallest {distance[best]:.2f} ({when}), at the end {distance[-1]:.2f}")

# %% [markdown]
# Both runs end at the same point, the bottom of the bowl. So *where you start does not matter, if
# you go all the way*. And the bottom is not the truth: the bowl is made of eight noisy examples.
#
# Look at the way there. First both runs fall down the steep side; there the data speak loudly and
# are right. Then they creep along the valley floor; there the data whisper, and what they whisper
# is mostly noise. The blue run comes to the floor *near the truth*, because $\theta_0$ was about
# right in the direction of which the data say little. Stopped there, it is good. Left to run, it
# forgets what it was given.
#
# This is one draw, picked because it is easy to see. What happens on average is a matter of
# algebra, and we shall do it in section 6. First the second role of $\theta_0$.

# %% [markdown]
# ## 4. The pre-trained point as a prior
#
# Stopping early is one way of staying near $\theta_0$. The other is to say so in the objective.
# Ask what you *believe* about the true weights before you see a target example: that they are
# $\theta_0$, give or take $\tau$ in every coordinate. As a density (the **prior**):
#
# $$p(\theta) \propto \exp\left(-\frac{\|\theta - \theta_0\|^2}{2\tau^2}\right).$$
#
# The model says how probable the observed targets $y$ are for given $\theta$ (the **likelihood**).
# With Gaussian noise of standard deviation $\sigma$, and the inputs as rows of a matrix $X$,
#
# $$p(y \mid \theta) \propto \exp\left(-\frac{\|X\theta - y\|^2}{2\sigma^2}\right).$$
#
# Bayes' rule multiplies the two: $p(\theta \mid y) \propto p(y \mid \theta)\, p(\theta)$. The most
# probable weights afterwards (*maximum a posteriori*, MAP) minimise
#
# $$-\log p(\theta \mid y) = \frac{\|X\theta - y\|^2}{2\sigma^2}
#   + \frac{\|\theta - \theta_0\|^2}{2\tau^2} + \text{const}.$$
#
# Multiply by $\sigma^2/n$, which moves no minimum, and the first term becomes our empirical risk:
#
# $$\underbrace{\frac{1}{2n}\|X\theta - y\|^2}_{\hat R(\theta)}
#   + \frac{\alpha}{2}\,\|\theta - \theta_0\|^2
#   \qquad\text{with}\qquad \boxed{\;\alpha = \frac{\sigma^2}{n\,\tau^2}\;}$$
#
# This penalty is called **L2-SP** (starting point; Li et al. 2018). With $\theta_0 = 0$ it is the
# ordinary L2 penalty, ridge regression, "weight decay to zero": the belief that the weights are
# small.
#
# Read the box slowly. Noisy labels ($\sigma$ large) or a trusted $\theta_0$ ($\tau$ small) pull
# harder. More examples pull less: **the prior fades as $1/n$.** In lesson 01 the gain of transfer
# shrank as labels were added; here is the reason in one symbol.
#
# **The minimum.** Set the gradient to zero, and write $H = X^\top X/n$ for short:
#
# $$H\theta - \tfrac1n X^\top y + \alpha(\theta - \theta_0) = 0 .$$
#
# Subtract $H\theta_0$ on both sides, so that only $\theta - \theta_0$ is left as the unknown:
#
# $$(H + \alpha I)(\theta - \theta_0) = \tfrac1n X^\top (y - X\theta_0)
#   \quad\Longrightarrow\quad
#   \hat\theta = \theta_0 + (H + \alpha I)^{-1}\, \tfrac1n X^\top (y - X\theta_0).$$
#
# In words: *let $\theta_0$ predict; take what it leaves unexplained; fit that with ridge; add.*

# %%
def l2sp(X, y, theta_0, alpha):
    """Minimiser of |X theta - y|^2 / 2n + alpha/2 |theta - theta_0|^2, shape (d,)."""
    n, d = X.shape
    unexplained = y - X @ theta_0  # (n,)
    return theta_0 + np.linalg.solve(X.T @ X / n + alpha * np.eye(d), X.T @ unexplained / n)


# %% [markdown]
# Is it the most probable point? Autograd knows nothing of our algebra. The gradient of the
# negative log posterior must vanish there, and nowhere near.

# %%
def posterior_gradient(theta, sigma, tau):
    """Largest entry of the gradient of -log p(theta | y), by autograd."""
    theta = torch.tensor(theta, requires_grad=True)
    X, y, theta_0 = (torch.from_numpy(a) for a in (toy_X, toy_y, toy_0))
    loss = (X @ theta - y).square().sum() / (2 * sigma**2)
    loss = loss + (theta - theta_0).square().sum() / (2 * tau**2)
    loss.backward()
    return theta.grad.abs().max().item()


# %%
sigma, tau = 0.6, 0.5
map_point = l2sp(toy_X, toy_y, toy_0, alpha=sigma**2 / (len(toy_y) * tau**2))
assert posterior_gradient(map_point, sigma, tau) < 1e-10
assert posterior_gradient(map_point + 0.01, sigma, tau) > 1e-2

# %% [markdown]
# **The library call that does the same.** scikit-learn has no L2-SP. It has ridge, and you have
# just read how to make one from the other: fit the residual, add $\theta_0$. (Its `Ridge` does not
# divide by $n$, so its `alpha` is our $n\alpha$.)

# %%
from sklearn.linear_model import Ridge

ridge = Ridge(alpha=len(toy_y) * 0.3, fit_intercept=False).fit(toy_X, toy_y - toy_X @ toy_0)
np.testing.assert_allclose(toy_0 + ridge.coef_, l2sp(toy_X, toy_y, toy_0, 0.3), rtol=1e-10)

# %% [markdown]
# ## 5. One step with weight decay
#
# Networks have no closed form; they take steps. Let $g$ be the gradient of $\hat R$ at the present
# $\theta$ (of a mini-batch, if you like), and $\eta$ the learning rate. The gradient of
# $\frac{\alpha}{2}\|\theta\|^2$ is $\alpha\theta$. So one step of SGD on the penalised risk is
#
# $$\theta \leftarrow \theta - \eta\,(g + \alpha\theta) \;=\; (1 - \eta\alpha)\,\theta - \eta\, g .$$
#
# Left: the penalty adds its gradient. Right: the same numbers, read differently; every weight
# first shrinks by the factor $1 - \eta\alpha$, hence **weight decay**. For L2-SP replace
# $\alpha\theta$ by $\alpha(\theta - \theta_0)$: the *distance from $\theta_0$* shrinks by that
# factor.
#
# Does torch do exactly this? One step, three ways:

# %%
torch.manual_seed(0)
lr, alpha = 0.1, 0.3
theta, grad = torch.randn(5), torch.randn(5)

by_torch = theta.clone().requires_grad_(True)
by_torch.grad = grad.clone()
torch.optim.SGD([by_torch], lr=lr, weight_decay=alpha).step()

as_penalty = theta - lr * (grad + alpha * theta)
as_shrinking = (1 - lr * alpha) * theta - lr * grad
torch.testing.assert_close(by_torch.detach(), as_penalty, rtol=0, atol=1e-14)
torch.testing.assert_close(by_torch.detach(), as_shrinking, rtol=0, atol=1e-14)

# %% [markdown]
# Under SGD "L2 penalty" and "weight decay" are two names for one thing. Now the optimiser that you
# will use in practice.
#
# ### Adam
#
# Adam keeps two running averages per weight, of the gradient and of its square, corrects both for
# their start at zero, and divides:
#
# $$m \leftarrow \beta_1 m + (1-\beta_1)\, g, \qquad v \leftarrow \beta_2 v + (1-\beta_2)\, g^2,$$
#
# $$\hat m = \frac{m}{1-\beta_1^t}, \qquad \hat v = \frac{v}{1-\beta_2^t}, \qquad
#   \theta \leftarrow \theta - \eta\,\frac{\hat m}{\sqrt{\hat v} + \epsilon},$$
#
# where $t = 1, 2, \dots$ counts the steps. By default $\beta_1 = 0.9$, $\beta_2 = 0.999$,
# $\epsilon = 10^{-8}$; all operations act on each weight by itself. The division makes every
# weight move at about the speed $\eta$, whether its gradients are large or small.
#
# Where does the decay go? There are two places, and now they differ:
#
# - **in the gradient** (`torch.optim.Adam(weight_decay=...)`): $g \leftarrow g + \alpha\theta$
#   comes first, and then everything above, the division included;
# - **decoupled** (`torch.optim.AdamW`): $g$ stays the gradient of the data; the step also shrinks
#   the weights, $\theta \leftarrow (1 - \eta\alpha)\,\theta$, outside the division.

# %%
def adam_step(theta, grad, m, v, t, lr, alpha, decoupled):
    """One step of Adam (decay in the gradient) or of AdamW (decoupled). Any shape."""
    if decoupled:
        theta = (1 - lr * alpha) * theta
    else:
        grad = grad + alpha * theta
    m = 0.9 * m + 0.1 * grad
    v = 0.999 * v + 0.001 * grad**2
    m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
    return theta - lr * m_hat / (v_hat**0.5 + 1e-8), m, v


# %%
def largest_difference(optimizer_class, decoupled):
    """Largest gap between torch's optimiser and the function above, after 50 steps."""
    ours, m, v = theta.clone(), torch.zeros(5), torch.zeros(5)
    theirs = theta.clone().requires_grad_(True)
    optimizer = optimizer_class([theirs], lr=0.1, weight_decay=0.3)
    for t in range(1, 51):
        theirs.grad = torch.randn(5)
        optimizer.step()
        ours, m, v = adam_step(ours, theirs.grad, m, v, t, 0.1, 0.3, decoupled)
    return (ours - theirs.detach()).abs().max().item()


# %%
assert largest_difference(torch.optim.Adam, decoupled=False) < 1e-12
assert largest_difference(torch.optim.AdamW, decoupled=True) < 1e-12
assert largest_difference(torch.optim.AdamW, decoupled=False) > 1e-2  # they are not the same

# %% [markdown]
# ### How different? Predict first
#
# Four weights start at 1. The data pull each of them to and fro, $+s, -s, +s, \dots$, so that the
# pulls cancel and only the decay remains; the size $s$ is 0.01, 0.1, 1 and 10. We take 1,000 steps
# with $\eta = 0.001$ and $\alpha = 0.1$. A decay of $1 - \eta\alpha$ per step leaves
# $(1 - 0.0001)^{1000} = 0.905$ of each weight.
#
# With the decay inside Adam's gradient: which weight shrinks most, the one with large gradients or
# the one with small ones?

# %%
gradient_size = torch.tensor([0.01, 0.1, 1.0, 10.0])


def weights_left(optimizer_class, alpha_in_optimizer, shrink_by_hand=0.0, lr=1e-3):
    """What is left of four weights 1 after 1,000 steps."""
    weights = torch.ones(4, requires_grad=True)
    optimizer = optimizer_class([weights], lr=lr, weight_decay=alpha_in_optimizer)
    for step in range(1000):
        weights.grad = gradient_size * (-1) ** step
        with torch.no_grad():
            weights.mul_(1 - lr * shrink_by_hand)
        optimizer.step()
    return weights.detach()


# %% tags=["nbval-check-output"]
left = {
    "SGD, decay in the gradient": weights_left(torch.optim.SGD, 0.1),
    "SGD, decoupled": weights_left(torch.optim.SGD, 0.0, shrink_by_hand=0.1),
    "Adam, decay in the gradient": weights_left(torch.optim.Adam, 0.1),
    "AdamW (decoupled)": weights_left(torch.optim.AdamW, 0.1),
}
print("size of the data's gradient    0.01   0.10   1.00  10.00")
for name, weights in left.items():
    print(f"{name:28}", "  ".join(f"{w:5.2f}" for w in weights))

# %% [markdown]
# Three rows say 0.9. The third says: the weight with the small gradients has lost three quarters,
# the weight with the large gradients next to nothing. Nobody asked for that. Where does it come
# from?
#
# Put $g + \alpha\theta$ into the division. The pulls $\pm s$ cancel in $\hat m$, so
# $\hat m \approx \alpha\theta$. They do not cancel in the squares: $\hat v \approx s^2$ when $s$
# is much larger than $\alpha\theta$. The step is
#
# $$-\eta\,\frac{\hat m}{\sqrt{\hat v}} \approx -\frac{\eta\alpha}{s}\,\theta :$$
#
# **the decay is divided by the size of the gradient.** With $s = 10$ this predicts
# $e^{-\eta\alpha\cdot 1000/10} = 0.99$. When $s$ is much smaller than $\alpha\theta$, then
# $\hat m/\sqrt{\hat v} \approx 1$, and the weight walks to zero at full speed $\eta$, whatever
# $\alpha$ is. Loshchilov and Hutter (2019) took the decay out of the division, and that is all the
# "W" means.

# %%
assert (left["SGD, decay in the gradient"] - left["SGD, decoupled"]).abs().max() < 1e-3
assert (left["AdamW (decoupled)"] - 0.905).abs().max() < 0.01
assert left["Adam, decay in the gradient"][0] < 0.4
assert abs(left["Adam, decay in the gradient"][3] - 0.99) < 0.01

# %% [markdown]
# Two warnings before we go on.
#
# - AdamW's `weight_decay` is *not* the $\alpha$ of a prior: AdamW minimises no penalised risk. It
#   is a rate of forgetting, $\eta\alpha$ per step.
# - It shrinks towards **zero**, not towards $\theta_0$. No optimiser in torch shrinks towards
#   $\theta_0$; after `optimizer.step()` you may do it by hand, in one line:
#   `theta -= lr * alpha * (theta - theta_0)`.
#
# How much does a usual setting forget? With `lr=1e-4`, `weight_decay=0.01` and 1,000 steps a
# weight keeps $(1 - 10^{-6})^{1000} = 0.999$ of itself. In such a run decay to zero does almost
# nothing, good or bad. What keeps you near $\theta_0$ is that the run is *short*. How strong is
# that tie? For this we need algebra.

# %% [markdown]
# ## 6. A model in which everything can be computed
#
# We take the linear model $y = X\theta^* + \varepsilon$: $n$ examples, $d$ weights, noise
# $\varepsilon$ with mean 0, variance $\sigma^2$ and no correlation between examples. We look at
# the weights that a method produces, *averaged over the noise*; $X$, $\theta^*$ and $\theta_0$
# stay fixed. Five steps.
#
# **Step 1: the gradient.** Put $y = X\theta^* + \varepsilon$ into it:
#
# $$g = \tfrac1n X^\top (X\theta - y) = \tfrac1n X^\top (X\theta - X\theta^* - \varepsilon)
#   = H(\theta - \theta^*) - \tfrac1n X^\top\varepsilon .$$
#
# Following $-g$, you are pulled towards the truth, and the noise shoves you aside.

# %% [markdown]
# **Step 2: turn the axes.** $H = X^\top X/n$ is symmetric, so it has orthonormal eigenvectors
# $v_1, \dots, v_d$ with eigenvalues $\lambda_j \ge 0$. What is $\lambda_j$?
#
# $$\lambda_j = v_j^\top H v_j = \frac1n \sum_i (x_i^\top v_j)^2 :$$
#
# it says how much the inputs vary along $v_j$, **how loudly the data speak about that direction.**
# In the picture of section 3 the loud direction points across the valley, the quiet one along it.
#
# Measure all errors along these axes: $e_j = v_j^\top(\theta - \theta^*)$. Multiply the gradient
# by $v_j^\top$ and use $v_j^\top H = \lambda_j v_j^\top$. It falls apart into $d$ separate
# numbers,
#
# $$g_j = \lambda_j\, e_j - z_j, \qquad z_j = \tfrac1n (X v_j)^\top \varepsilon .$$

# %% [markdown]
# **Step 3: how large is the noise term?** $z_j$ is a weighted sum of $n$ uncorrelated noises, each
# with variance $\sigma^2$. Its mean is 0, its variance
#
# $$\operatorname{Var} z_j = \frac{\sigma^2}{n^2}\,\|X v_j\|^2 = \frac{\sigma^2\lambda_j}{n},$$
#
# because $\|X v_j\|^2 = \sum_i (x_i^\top v_j)^2 = n\lambda_j$.

# %% [markdown]
# **Step 4: one step of gradient descent,** with a penalty $\frac\alpha2\|\theta - c\|^2$ towards
# some centre $c$: zero, or $\theta_0$, or switched off by $\alpha = 0$. Let $c_j = v_j^\top(c -
# \theta^*)$ be the error of the centre. The penalty's gradient along $v_j$ is $\alpha(e_j - c_j)$,
# so
#
# $$e_j \leftarrow e_j - \eta\,[\lambda_j e_j - z_j + \alpha(e_j - c_j)]
#   = r_j\, e_j + \eta\,(z_j + \alpha c_j), \qquad r_j = 1 - \eta(\lambda_j + \alpha).$$

# %% [markdown]
# **Step 5: $t$ steps.** From here on we leave the index $j$ out. The rule "multiply by $r$, add a
# constant" leaves one point alone: $e_\infty = r\,e_\infty + \eta(z + \alpha c)$ gives
# $e_\infty = (z + \alpha c)/(\lambda + \alpha)$. Subtract this equation from the rule: the
# distance from that point is multiplied by $r$ in every step, so $e_t - e_\infty = r^t (e_0 -
# e_\infty)$, or
#
# $$\boxed{\; e_t = r^t e_0 + (1 - r^t)\,\frac{z + \alpha c}{\lambda + \alpha} \;}$$
#
# That is all of it: the whole run, in one line. It holds for one particular noise, not only on
# average, so we can test it to the last digits.

# %%
n, d, sigma = 30, 20, 0.7
rng = np.random.default_rng(1)
X = rng.normal(size=(n, d))
theta_star = rng.normal(size=d)
theta_star /= np.linalg.norm(theta_star)  # the truth has length 1
delta = rng.normal(size=d)
delta *= 0.5 / np.linalg.norm(delta)  # the pre-trained point is wrong by 0.5
theta_0 = theta_star + delta
eigenvalues, V = np.linalg.eigh(X.T @ X / n)  # (d,), and the v_j as columns, (d, d)
eigenvalues = eigenvalues.clip(min=0)
print(f"loudness of the 20 directions: from {eigenvalues[0]:.2f} to {eigenvalues[-1]:.2f}")

# %%
noise = sigma * rng.normal(size=n)
y = X @ theta_star + noise
lr, alpha, steps = 0.02, 0.2, 200
theta = theta_0.copy()
for _ in range(steps):  # an ordinary training run with the L2-SP penalty
    theta -= lr * (X.T @ (X @ theta - y) / n + alpha * (theta - theta_0))

z = V.T @ X.T @ noise / n
keep = (1 - lr * (eigenvalues + alpha)) ** steps  # r^t
start = centre = V.T @ delta
predicted = keep * start + (1 - keep) * (z + alpha * centre) / (eigenvalues + alpha)
np.testing.assert_allclose(V.T @ (theta - theta_star), predicted, atol=1e-12)

# %% [markdown]
# ### Bias and variance
#
# Average the square of $e_t$ over the noise. For any random number the mean square is the square
# of the mean plus the variance. In the box only $z$ is random, with mean 0 and variance
# $\sigma^2\lambda/n$. So the mean error, the **bias**, and the **variance** are
#
# $$\text{bias}_j = r^t e_0 + (1 - r^t)\,\frac{\alpha c}{\lambda + \alpha}, \qquad
#   \text{variance}_j = \left(\frac{1 - r^t}{\lambda + \alpha}\right)^2 \frac{\sigma^2\lambda}{n} .$$
#
# And the test error? Let a new input $x$ have independent coordinates of mean 0 and variance 1.
# Then the expected squared error of its prediction, beyond the noise that nobody can predict, is
# $\mathbb{E}\,(x^\top(\hat\theta - \theta^*))^2 = \|\hat\theta - \theta^*\|^2$: simply the squared
# distance from the truth. We average it over the training noise and call it the risk from here on:
#
# $$\text{risk} = \sum_j \left(\text{bias}_j^2 + \text{variance}_j\right).$$

# %%
def error_parts(eigenvalues, keep, start, centre, alpha, sigma, n):
    """Squared bias and variance in each direction, both (..., d).

    keep: r^t, the part of the start that is left; 0 for the minimiser itself.
    start, centre: errors of the starting point and of the penalty's centre, in the eigenbasis.
    """
    total = np.maximum(eigenvalues + alpha, 1e-12)  # 0 / 0 in a silent direction: gives 0
    bias = keep * start + (1 - keep) * alpha * centre / total
    variance = ((1 - keep) / total) ** 2 * eigenvalues * sigma**2 / n
    return bias**2, variance


# %% [markdown]
# One formula, four readings. Write $\theta^*_j = v_j^\top\theta^*$ and $\delta_j =
# v_j^\top\delta$. Starting at zero means an error of $e_0 = -\theta^*_j$; starting at $\theta_0$
# means $e_0 = \delta_j$. Letting a penalised run go on for ever means $r^t \to 0$ (the rate must
# be small enough for that: $\eta(\lambda + \alpha) < 2$).
#
# | method | put in | filter $f_j$ | bias$^2$ | variance |
# |---|---|---|---|---|
# | $t$ steps from zero | $\alpha = 0$ | $1 - (1 - \eta\lambda_j)^t$ | $(1 - f_j)^2\, \theta_j^{*2}$ | $f_j^2\,\sigma^2/(n\lambda_j)$ |
# | $t$ steps from $\theta_0$ | $\alpha = 0$ | $1 - (1 - \eta\lambda_j)^t$ | $(1 - f_j)^2\, \delta_j^2$ | $f_j^2\,\sigma^2/(n\lambda_j)$ |
# | ridge (decay to zero) | $t \to \infty,\ c = 0$ | $\lambda_j/(\lambda_j + \alpha)$ | $(1 - f_j)^2\, \theta_j^{*2}$ | $f_j^2\,\sigma^2/(n\lambda_j)$ |
# | L2-SP | $t \to \infty,\ c = \theta_0$ | $\lambda_j/(\lambda_j + \alpha)$ | $(1 - f_j)^2\, \delta_j^2$ | $f_j^2\,\sigma^2/(n\lambda_j)$ |
#
# The **filter** $f_j$, between 0 and 1, is the part of direction $j$ that the data decide; the
# part $1 - f_j$ stays where it started. (Check one row yourself: put $\alpha = 0$ into the bias,
# and $r^t = 1 - f$ is all that is left.)
#
# Now read down the last two columns, for this is the heart of the lesson. **Transfer replaces
# $\theta^*_j$ by $\delta_j$ in the bias. It leaves the variance alone.** At the same number of
# steps the pre-trained run is exactly as noisy as the run from scratch. What you gain is that you
# may *stop sooner*, and the variance is lower for that reason.

# %% [markdown]
# ## 7. Formula against simulation
#
# The four methods, and a fifth one that people really use: start at $\theta_0$, but let weight
# decay pull to zero. We train each of them 4,000 times, with fresh noise, by the plain update in
# weight space; no eigenvector appears in this code. (Numbers of steps and penalties are about the
# best ones; section 8 shows how they were found.)

# %%
draws = 4000
noise = sigma * rng.normal(size=(draws, n))
Y = X @ theta_star + noise  # one training set in each row


def train_all(Y, start, centre, alpha, steps, lr=0.02):
    """Train on every row of Y; steps=None goes straight to the minimiser. Returns (draws, d)."""
    if steps is None:
        unexplained = (Y - X @ centre) @ X / n  # (draws, d)
        return centre + np.linalg.solve(X.T @ X / n + alpha * np.eye(d), unexplained.T).T
    theta = np.tile(start, (len(Y), 1))
    for _ in range(steps):
        theta -= lr * ((theta @ X.T - Y) @ X / n + alpha * (theta - centre))
    return theta


# %%
zero = np.zeros(d)
methods = {  # name: start, centre of the penalty, alpha, steps
    "from zero, 95 steps": (zero, zero, 0.0, 95),
    "from θ₀, 29 steps": (theta_0, zero, 0.0, 29),
    "ridge": (zero, zero, 0.35, None),
    "L2-SP": (zero, theta_0, 1.1, None),
    "from θ₀, decay to 0": (theta_0, zero, 0.2, 100),
}


def formula(start, centre, alpha, steps, lr=0.02):
    """The same five methods through the boxed formula: squared bias, variance, each (d,)."""
    keep = 0.0 if steps is None else (1 - lr * (eigenvalues + alpha)) ** steps
    in_basis = V.T @ (start - theta_star), V.T @ (centre - theta_star)
    return error_parts(eigenvalues, keep, *in_basis, alpha, sigma, n)


# %% [markdown]
# A simulated mean is uncertain itself; its **standard error** is the spread over draws divided by
# $\sqrt{4000}$. If the formula is right, simulation and formula differ by a few standard errors at
# the most. We compare three things: the squared distance of the *mean* result from the truth
# (bias), the mean squared distance of the results from *their* mean (variance), and the whole.

# %%
def standard_errors_apart(samples, expected):
    """How far the mean of the samples lies from `expected`, in standard errors."""
    return (samples.mean() - expected) * len(samples) ** 0.5 / samples.std(ddof=1)


# %%
def compare_with_simulation(settings):
    """Simulated risk, and how far bias, variance and risk are from the formula."""
    results = train_all(Y, *settings)
    bias2, variance = (part.sum() for part in formula(*settings))
    bias_vector = results.mean(axis=0) - theta_star
    # Each result's error along that vector; the mean of these is the length of the bias.
    along_bias = (results - theta_star) @ bias_vector / np.linalg.norm(bias_vector)
    scatter = np.sum((results - results.mean(axis=0)) ** 2, axis=1) * draws / (draws - 1)
    risks = np.sum((results - theta_star) ** 2, axis=1)
    pairs = (along_bias, bias2**0.5), (scatter, variance), (risks, bias2 + variance)
    return bias2, variance, risks.mean(), [standard_errors_apart(*pair) for pair in pairs]


# %%
print(f"{'':26}        formula         simulated   standard errors apart")
print(f"{'':26} bias^2   var   risk      risk      bias    var   risk")
for name, settings in methods.items():
    bias2, variance, simulated, apart = compare_with_simulation(settings)
    print(f"{name:26} {bias2:.3f}  {variance:.3f}  {bias2 + variance:.3f}    {simulated:.3f}   ",
          "  ".join(f"{z:+5.1f}" for z in apart))
    assert max(abs(z) for z in apart) < 4, name

# %% [markdown]
# Fifteen comparisons, none off by more than chance allows. From here on we may trust the formula
# and draw curves with it instead of waiting for simulations.

# %% [markdown]
# ## 8. Bias against variance, from scratch and from $\theta_0$
#
# Predict three things before you look. Which of the two runs should stop first? At which end does
# transfer have its advantage, after few steps or after many? And where is its variance curve,
# above or below that of the run from scratch?

# %%
step_grid = np.unique(np.logspace(0, 3.5, 70).astype(int))
alpha_grid = np.logspace(2, -2, 70)  # from a strong pull to a weak one


def curves_over_steps(gap, eigenvalues=eigenvalues, sigma=sigma, n=n, lr=0.02):
    """Squared bias and variance after each number of steps. gap: e_0, the start's error."""
    keep = (1 - lr * eigenvalues) ** step_grid[:, None]
    return [p.sum(axis=1) for p in error_parts(eigenvalues, keep, gap, gap, 0.0, sigma, n)]


def curves_over_alpha(gap, eigenvalues=eigenvalues, sigma=sigma, n=n):
    """The same for the minimiser at each alpha. gap: c, the error of the penalty's centre."""
    alphas = alpha_grid[:, None]
    return [p.sum(axis=1) for p in error_parts(eigenvalues, 0.0, gap, gap, alphas, sigma, n)]


# %%
gaps = {"scratch": (V.T @ -theta_star, ORANGE), "transfer": (V.T @ delta, BLUE)}


def draw_curves(ax, grid, curves, gaps):
    """Bias, variance and risk over steps or over alpha, for every gap."""
    for name, (gap, colour) in gaps.items():
        bias2, variance = curves(gap)
        ax.semilogx(grid, bias2, "--", color=colour, lw=1.2, label=f"bias$^2$, {name}")
        ax.semilogx(grid, bias2 + variance, "-", color=colour, lw=2.5, label=f"risk, {name}")
    ax.semilogx(grid, variance, ":", color="0.3", label="variance, both")


# %% jupyter={"source_hidden": true}
figure, axes = plots.subplots(1, 2, figsize=(9.4, 3.8), sharey=True)
draw_curves(axes[0], step_grid, curves_over_steps, gaps)
draw_curves(axes[1], alpha_grid, curves_over_alpha, gaps)
axes[0].set(xlabel="steps of gradient descent", ylabel="squared error", ylim=(0, 1.4))
axes[0].set_title("Start there and stop early")
axes[1].set(xlabel=r"penalty $\alpha$ (weaker to the right)", title="Penalise the distance")
axes[1].invert_xaxis()
axes[0].legend(loc="upper center", fontsize=9)
plots.alt(figure, "Left: over steps, right: over a weakening penalty. Bias falls, variance rises; "
          "the variance is the same for both. The risk from scratch has its minimum, 0.42, "
          "after 95 steps; with transfer 0.18 after 29 steps. At the right end the risks meet.")

# %% tags=["nbval-check-output"]
best_risk = {}
for name, (gap, _) in gaps.items():
    risk = sum(curves_over_steps(gap))
    best_risk[name] = risk.min()
    print(f"{name:9} risk at the start {gap @ gap:.2f}, after 3,000 steps {risk[-1]:.2f}, "
          f"best {risk.min():.2f} after {step_grid[risk.argmin()]} steps")
assert best_risk["transfer"] < 0.8 * best_risk["scratch"]

# %% [markdown]
# Follow one solid curve from left to right. At first the bias is all there is. Every step buys a
# piece of bias and pays for it with variance: loud directions first, where the price
# $\sigma^2/(n\lambda)$ is low, quiet ones later and dearer. The minimum is where the next piece
# costs more than it brings.
#
# The transfer run has less bias to buy. So it stops sooner, and *therefore* pays less variance.
# Left alone, it pays all of it, and the gift is spent: at the right end nobody can tell who was
# pre-trained.
#
# The right panel looks like the left one. That is no accident.

# %% [markdown]
# ## 9. Steps and penalty are one knob
#
# Compare the two filters. For small $\eta\lambda$ we have $(1 - \eta\lambda)^t \approx
# e^{-\eta\lambda t}$, so
#
# $$f^{\text{steps}} \approx 1 - e^{-\lambda\,\eta t}, \qquad
#   f^{\text{penalty}} = \frac{\lambda}{\lambda + \alpha} .$$
#
# In a loud direction both are near 1. In a quiet one, to first order in $\lambda$, they are
# $\lambda\,\eta t$ and $\lambda/\alpha$. These agree when
#
# $$\boxed{\;\alpha \approx \frac{1}{\eta\, t}\;}$$
#
# **Stopping after $t$ steps of size $\eta$ is about the penalty $1/(\eta t)$.** That is the tie of
# section 5: our 29 steps with $\eta = 0.02$ are a pull of $\alpha \approx 1.7$ to $\theta_0$.
# Whoever chooses a learning rate and a number of steps has chosen a prior, knowingly or not.

# %% jupyter={"source_hidden": true}
figure, ax = plots.subplots(figsize=(6, 3.5))
loudness = np.logspace(-3, 1, 200)
for steps, colour in ((1000, ORANGE), (100, GREEN), (10, BLUE)):
    alpha = 1 / (0.02 * steps)  # eta is 0.02
    by_steps, by_penalty = 1 - (1 - 0.02 * loudness) ** steps, loudness / (loudness + alpha)
    ax.semilogx(loudness, by_steps, "-", color=colour, label=f"{steps} steps")
    ax.semilogx(loudness, by_penalty, "--", color=colour, label=rf"$\alpha$ = {alpha:.2g}")
ax.set(xlabel=r"loudness $\lambda$ of a direction", ylabel="filter $f$: part decided by data")
ax.legend()
plots.alt(figure, "Filters of gradient descent and of the matching penalty against the eigenvalue. "
          "Both rise from 0 to 1 at the same place; the filter of gradient descent is steeper.")

# %% [markdown]
# The same cut-off; early stopping cuts a little more sharply. Ali, Kolter and Tibshirani (2019)
# prove how little that matters: with $\alpha = 1/(\eta t)$ and small steps the risk of stopping
# early is at most 1.69 times the risk of ridge, for every $t$, every $X$ and every truth. Ours:

# %% tags=["nbval-check-output"]
for name, (gap, _) in gaps.items():
    stopped = sum(curves_over_steps(gap))
    alphas = 1 / (0.02 * step_grid[:, None])
    penalised = sum(error_parts(eigenvalues, 0.0, gap, gap, alphas, sigma, n)).sum(axis=1)
    ratio = stopped / penalised
    print(f"{name}: risk of stopping / risk of ridge from {ratio.min():.2f} to {ratio.max():.2f}")
    assert ratio.max() <= 1.69

# %% [markdown]
# In the picture of section 3 the two look like this: the steps of gradient descent, and the
# minimisers of L2-SP as $\alpha$ falls from very strong to nothing.

# %% jupyter={"source_hidden": true}
figure, ax = plots.subplots(figsize=(5.6, 3.8))
ax.contour(grid_1, grid_2, toy_risk, levels, colors="0.75", linewidths=1)
sp_path = np.array([l2sp(toy_X, toy_y, toy_0, a) for a in np.logspace(2, -4, 100)])
ax.plot(*paths["from θ₀"][0].T, "-", color=BLUE, label="steps of gradient descent")
ax.plot(*sp_path.T, "--", color=GREEN, lw=2.5, label=r"L2-SP, $\alpha$ from $\infty$ to 0")
ax.plot(*truth, "*", color="black", ms=16, label=r"truth $\theta^*$")
ax.set(xlabel="weight 1", ylabel="weight 2", xlim=(0.2, 1.7), ylim=(0.8, 1.85), aspect="equal")
ax.legend(loc="lower right")
plots.alt(figure, "The path of gradient descent from theta_0 and the curve of L2-SP minimisers "
          "start and end together and lie close; gradient descent turns more sharply.")

# %% [markdown]
# ## 10. How strong should the pull be?
#
# Suppose the errors $\delta_j$ of the pre-trained point are spread evenly: independent, mean 0,
# variance $\tau^2$ in every direction. Average the risk over them as well. A direction with filter
# $f$ contributes
#
# $$\rho(f) = (1 - f)^2\,\tau^2 + f^2\,\frac{\sigma^2}{n\lambda} .$$
#
# Choose the best $f$ for *each direction separately*, with no formula for $f$ in mind. The
# derivative $-2(1 - f)\tau^2 + 2f\sigma^2/(n\lambda)$ vanishes at
#
# $$f = \frac{\tau^2}{\tau^2 + \sigma^2/(n\lambda)} = \frac{\lambda}{\lambda + \sigma^2/(n\tau^2)} .$$
#
# (It is the minimum, since the second derivative is positive.) Look at the right side. We were
# free to choose twenty unrelated numbers, and out came the L2-SP filter, with one and the same
# penalty for all directions:
#
# $$\boxed{\;\alpha^* = \frac{\sigma^2}{n\,\tau^2}\;}$$
#
# It is the $\alpha$ of section 4, which came from Bayes' rule and knew nothing of bias and
# variance. Two things follow. No number of steps can beat L2-SP at $\alpha^*$, if the $\delta_j$
# are spread evenly. And scratch is the special case in which $\tau$ is the size of the true
# weights themselves: they are larger, so its $\alpha^*$ is smaller, and it must listen to more
# noise.

# %%
tau = 0.5 / d**0.5  # the size of one delta_j when |delta| is 0.5
best_alpha = sigma**2 / (n * tau**2)
even_gap = np.full(d, tau)  # only squares enter, so this *is* the average over delta


def average_risk(alphas):
    """Risk of L2-SP averaged over delta, for each alpha."""
    alphas = np.reshape(alphas, (-1, 1))
    parts = error_parts(eigenvalues, 0.0, even_gap, even_gap, alphas, sigma, n)
    return sum(parts).sum(axis=1)


# %%
fine_grid = best_alpha * np.linspace(0.5, 2, 3001)
found = fine_grid[average_risk(fine_grid).argmin()]
print(f"alpha* by formula {best_alpha:.4f}, by search {found:.4f}")
assert abs(found / best_alpha - 1) < 0.002

# %% tags=["nbval-check-output"]
by_penalty = average_risk(best_alpha)[0]
by_steps = sum(curves_over_steps(even_gap)).min()
print(f"average risk: L2-SP at alpha* {by_penalty:.4f}, best number of steps {by_steps:.4f}")
for factor in (0.1, 0.3, 3, 10):
    price = average_risk(factor * best_alpha)[0] / by_penalty - 1
    print(f"  alpha* x {factor:<4} costs {price:5.0%} more")
assert by_penalty < by_steps < 1.1 * by_penalty

# %% [markdown]
# Two things to take from the table. Early stopping loses next to nothing, so a well-chosen number
# of steps is a perfectly good prior. And a pull ten times too weak costs far more than one ten
# times too strong: too strong merely keeps $\theta_0$, too weak buys noise. Nobody tells you
# $\tau$ and $\sigma$; in practice you try $\alpha$, or the number of steps, in factors of 3 on
# validation data.

# %% [markdown]
# ## 11. When does transfer lose?
#
# Run scratch and transfer with the same filter (the same number of steps, or the same $\alpha$).
# The variances cancel. What is left of the difference:
#
# $$\text{risk}_{\text{scratch}} - \text{risk}_{\text{transfer}}
#   = \sum_j w_j \left(\theta_j^{*2} - \delta_j^2\right), \qquad w_j = (1 - f_j)^2 .$$
#
# Transfer wins exactly when **$\sum_j w_j\,\delta_j^2 < \sum_j w_j\,\theta_j^{*2}$**: a contest of
# two lengths, $\|\delta\|$ against $\|\theta^*\|$, in which every direction has a weight. If both
# point anywhere, without preference, the weights even out, and the crossing lies at
# $\|\delta\| = \|\theta^*\|$.
#
# But look at the weights. A loud direction has $f \approx 1$, so $w \approx 0$: *an error of
# $\theta_0$ there costs nothing, the data repair it at once.* A quiet direction has $w \approx 1$:
# an error there stays.
#
# So here is the one thing that you would have to know in section 1: not how far $\theta_0$ is from
# the truth, but **in which directions**. Let us see it. Three kinds of $\delta$: anywhere; only in
# the ten loud directions; only in the ten quiet ones. 200 draws of inputs, truth and $\delta$;
# each run stops at its own best step.

# %%
length_ratios = np.linspace(0, 3, 13)  # |delta| / |theta*|
kinds = {"quiet directions only": ORANGE, "anywhere": GREEN, "loud directions only": BLUE}


def unit_vector(rng, kind):
    """Random direction in the eigenbasis; eigenvalues ascend, so the quiet ones come first."""
    vector = rng.normal(size=d)
    if kind == "loud directions only":
        vector[: d // 2] = 0
    if kind == "quiet directions only":
        vector[d // 2 :] = 0
    return vector / np.linalg.norm(vector)


# %%
def gains(draw):
    """Best risk from scratch minus best risk with transfer, (3 kinds, 13 lengths)."""
    rng = np.random.default_rng(draw)
    X = rng.normal(size=(n, d))
    loudness = np.linalg.eigvalsh(X.T @ X / n).clip(min=0)

    def best(gap):
        return sum(curves_over_steps(gap, loudness)).min()

    scratch = best(unit_vector(rng, "anywhere"))  # theta*, of length 1
    deltas = [unit_vector(rng, kind) for kind in kinds]
    return [[scratch - best(ratio * unit) for ratio in length_ratios] for unit in deltas]


# %%
all_gains = np.array([gains(draw) for draw in range(200)])  # (200, 3, 13)

# %% jupyter={"source_hidden": true}
figure, ax = plots.subplots(figsize=(6.2, 4))
ax.axhline(0, color="black", lw=1)
for k, (kind, colour) in enumerate(kinds.items()):
    intervals = [mean_interval(column) for column in all_gains[:, k].T]
    ax.plot(length_ratios, [i.mean for i in intervals], "-", color=colour, label=kind)
    ax.fill_between(length_ratios, [i.low for i in intervals], [i.high for i in intervals],
                    color=colour, alpha=0.25, lw=0)
ax.set(xlabel=r"$\|\delta\| \,/\, \|\theta^*\|$", ylabel="gain of transfer in risk")
ax.legend(title=r"$\theta_0$ is wrong in ...")
plots.alt(figure, "Gain of transfer against the length of delta, with 95 % bands. Wrong anywhere: "
          "positive up to ratio 1, then negative. Wrong in quiet directions: negative from about "
          "0.7 on. Wrong in loud directions: positive up to ratio 3.")

# %% tags=["nbval-check-output"]
for ratio in (1.0, 1.5):
    print(f"gain at |delta| = {ratio} |theta*|:")
    at_ratio = all_gains[:, :, list(length_ratios).index(ratio)].T  # (3, 200)
    gain = dict(zip(kinds, map(mean_interval, at_ratio), strict=True))
    for kind, i in gain.items():
        print(f"  {kind:22} {i.mean:+.3f}, 95 % interval [{i.low:+.3f}, {i.high:+.3f}]")
assert gain["anywhere"].high < 0 and gain["quiet directions only"].high < 0  # at 1.5
assert gain["loud directions only"].low > 0

# %% [markdown]
# The answer to section 1 is (c). At 1.5 times the distance transfer loses when the error is
# anywhere, loses more when it sits where the data are quiet, and *wins* when it sits where the
# data are loud. And where $\delta$ and $\theta^*$ point anywhere, the crossing is where the
# algebra put it, at equal lengths.
#
# Take this sentence with you: **pre-training must be right where your own data have nothing to
# say.** For networks it is a guide, not a theorem. But it explains how photographs can help with
# X-rays, in spite of every difference that the X-rays themselves make plain.

# %% [markdown]
# ## 12. Fewer examples than weights
#
# A network has more weights than you have examples. Then some directions are not just quiet but
# *silent*: $\lambda_j = 0$. Take 10 examples for our 20 weights; at least ten directions are
# silent. We train from $\theta_0$ and do not stop early: without penalty, with weight decay to
# zero, with L2-SP. And once from zero. (The lengths are 1 and 0.5 as before, averaged over 50 random
# truths and errors. The labels are less noisy, $\sigma = 0.2$, so that what we see is not noise.)
#
# In section 3 the start did not matter in the end. Ask the boxed formula of section 6 before you
# look: what becomes of a silent direction ($\lambda = z = 0$) without penalty? With decay to zero?

# %%
n_few, alpha = 10, 0.05
few_X = rng.normal(size=(n_few, d))
few_eigenvalues = np.linalg.eigvalsh(few_X.T @ few_X / n_few)
few_eigenvalues = np.where(few_eigenvalues < 1e-10, 0, few_eigenvalues)
from_zero = -np.array([[unit_vector(rng, "anywhere")] for _ in range(50)])  # (50, 1, d)
from_0 = 0.5 * np.array([[unit_vector(rng, "anywhere")] for _ in range(50)])
long_run = np.unique(np.logspace(0, 5.5, 120).astype(int))[:, None]  # (steps, 1)


# %%
def risk_of(start, centre, alpha):
    """Risk after each number of steps, averaged over 50 truths and errors."""
    keep = (1 - 0.02 * (few_eigenvalues + alpha)) ** long_run
    parts = error_parts(few_eigenvalues, keep, start, centre, alpha, 0.2, n_few)
    return sum(parts).sum(axis=-1).mean(axis=0)


runs = {
    "from zero, decay to zero": (risk_of(from_zero, from_zero, alpha), "-", ORANGE),
    "from θ₀, decay to zero": (risk_of(from_0, from_zero, alpha), "--", BLUE),
    "from θ₀, no penalty": (risk_of(from_0, from_0, 0.0), ":", "0.3"),
    "from θ₀, L2-SP": (risk_of(from_0, from_0, alpha), "-", GREEN),
}

# %% jupyter={"source_hidden": true}
figure, ax = plots.subplots(figsize=(6.2, 3.8))
for name, (risk, line, colour) in runs.items():
    ax.semilogx(long_run, risk, line, color=colour, label=name, lw=2.2)
ax.axvline(1 / (0.02 * alpha), color="0.6", lw=1)
ax.annotate(r"$1/(\eta\alpha)$", (1150, 0.02), color="0.4")
ax.set(xlabel="steps of gradient descent", ylabel="risk", ylim=(0, None))
ax.legend(loc="upper right")
plots.alt(figure, "Risk over steps. The runs from theta_0 fall to about 0.15. Without penalty and "
          "with L2-SP they stay near 0.2. With decay to zero the risk climbs after about 1,000 "
          "steps and meets that of the run from zero, 0.56.")

# %% tags=["nbval-check-output"]
print("silent directions:", (few_eigenvalues == 0).sum())
for name, (risk, *_) in runs.items():
    print(f"{name:26} best {risk.min():.2f}   in the end {risk[-1]:.2f}")
end = {name: risk[-1] for name, (risk, *_) in runs.items()}
assert abs(end["from θ₀, decay to zero"] - end["from zero, decay to zero"]) < 1e-6
assert end["from θ₀, L2-SP"] < end["from zero, decay to zero"] - 0.2

# %% [markdown]
# In a silent direction the formula reads $e_t = r^t e_0 + (1 - r^t)\,c$ with $r = 1 - \eta\alpha$.
#
# - No penalty: $r = 1$, the direction keeps $\delta_j$ for ever. **With fewer examples than
#   weights the start matters even at the end.** Nothing will ever correct it, nothing will ever
#   spoil it.
# - Decay to zero: $\theta_0$ is forgotten at the rate $\eta\alpha$ per step. After a few times
#   $1/(\eta\alpha)$ steps the run from $\theta_0$ *is* the run from zero.
# - L2-SP: $c = e_0$, and nothing moves there.
#
# So decay to zero and a pre-trained start contradict each other; whether it hurts depends on
# whether you train for longer than $1/(\eta\alpha)$ steps. (With the `lr=1e-4` and
# `weight_decay=0.01` of section 5 that would be a million.)

# %% [markdown]
# ## 13. Real data
#
# Everything above was true by construction. Here is a linear model on people: scikit-learn's
# *diabetes* data, 442 patients. Age, body mass index, blood pressure and six blood values are to
# predict how far the disease has progressed a year later. The column `sex` has two values. Source
# task: the 235 patients of the first group. Target task: the 207 of the second, of whom we are
# given a few.

# %%
from sklearn.datasets import load_diabetes

table, progression = load_diabetes(return_X_y=True, scaled=False)
sex = table[:, 1]  # coded 1 and 2


def transfer_task(source_group):
    """Everything scaled by the source group alone. Returns source X, y and target X, y."""
    rows = sex == source_group
    inputs = np.delete(table, 1, axis=1)
    inputs = (inputs - inputs[rows].mean(axis=0)) / inputs[rows].std(axis=0)
    inputs = np.column_stack([inputs, np.ones(len(inputs))])  # last column: the intercept
    targets = (progression - progression[rows].mean()) / progression[rows].std()
    return inputs[rows], targets[rows], inputs[~rows], targets[~rows]


# %% tags=["nbval-check-output"]
source_X, source_y, target_X, target_y = transfer_task(source_group=1)
source_weights = np.linalg.lstsq(source_X, source_y)[0]  # theta_0, shape (10,)
all_target = np.linalg.lstsq(target_X, target_y)[0]  # theta* as well as 207 patients tell it
difference = source_weights - all_target
for name, vector in (("delta", difference), ("theta*", all_target)):
    in_predictions = np.mean((target_X @ vector) ** 2) ** 0.5
    print(f"{name:7} length {np.linalg.norm(vector):.2f}, size in predictions {in_predictions:.2f}")

# %% [markdown]
# By length, the pre-trained weights are *further from the truth than zero*. Would you use them?
# The last column says more. It measures the same two vectors by what they do to the predictions on
# real inputs (root mean square), and there $\delta$ is the smaller by far: the blood values are
# strongly correlated, so weights can be exchanged between them and the predictions hardly change.
# (In our model the inputs had variance 1 in all directions, and the two measures were the same.)
#
# The prior says: each weight is the source's, give or take $\tau$. The source data give
# $\sigma^2$, and then $\alpha = \sigma^2/(n\tau^2)$. Ridge is the same with a prior around zero.
# Neither is favoured: both get the best of the same four $\tau$ for each $n$, *picked in hindsight
# on the test patients*. The third arm does not train at all and takes $\theta_0$ as it is.

# %%
TAUS = (0.1, 0.2, 0.3, 0.5)


def patient_errors(task, n, draw):
    """Squared error on patients not drawn: theta_0, then L2-SP, then ridge per tau. (9,)"""
    source_X, source_y, target_X, target_y = task
    weights, squares = np.linalg.lstsq(source_X, source_y)[:2]
    variance = squares[0] / (len(source_y) - 10)  # sigma^2: what the fit leaves unexplained
    order = np.random.default_rng(draw).permutation(len(target_y))
    X, y, test = target_X[order[:n]], target_y[order[:n]], order[n:]
    fitted = [weights]
    for centre in (weights, np.zeros(10)):
        fitted += [l2sp(X, y, centre, variance / (n * tau**2)) for tau in TAUS]
    return [np.mean((target_X[test] @ w - target_y[test]) ** 2) for w in fitted]


# %%
advantage = {}
for group in (1, 2):  # each group serves once as the source
    task = transfer_task(group)
    print(f"source: group {group}\n   n  theta_0  L2-SP  ridge   ridge - L2-SP, 95 % interval")
    for count in (5, 10, 20, 40, 80):
        errors = np.array([patient_errors(task, count, draw) for draw in range(100)])  # (100, 9)
        near_source, near_zero = errors[:, 1:5], errors[:, 5:]
        best = [part[:, part.mean(axis=0).argmin()] for part in (near_source, near_zero)]
        advantage[group, count] = mean_interval(best[1] - best[0])
        means = errors[:, 0].mean(), best[0].mean(), best[1].mean()
        print(f"{count:4}   ", "  ".join(f"{m:.3f}" for m in means), " ", advantage[group, count])

# %% [markdown]
# Both ways round, the pull to the source is worth most with few patients and fades as their number
# grows, as the $1/n$ of section 4 promised. With 80 patients there is little or nothing left to
# gain; with 5, little is lost by not training at all. (The intervals are over 100 draws of the
# labelled patients; the people stay the same.)

# %%
for group in (1, 2):
    assert all(advantage[group, count].low > 0.01 for count in (5, 10, 20))
    assert abs(advantage[group, 80].mean) < 0.04
    assert advantage[group, 5].low > advantage[group, 40].high

# %% [markdown]
# ## 14. Where it fails
#
# - **Somebody must choose $\alpha$.** Every best number above was picked knowing the truth or the
#   test patients. The honest way is to let the few target examples choose. The cell below shows
#   what that costs.
# - **A network is not linear.** $H$ changes as the weights move, so the formulas hold near
#   $\theta_0$ at best. Lesson 08 shows what a random head does to good features in the first steps,
#   which no linear model with fixed features can show.
# - **Distance in weight space is not distance between functions.** Swap two hidden units: the
#   network computes the same, yet $\|\delta\|$ is large. The diabetes data showed a mild case.
# - **The new head has no $\theta_0$.** Li et al. pull the head towards zero, with a strength of
#   its own, and the rest towards $\theta_0$.
# - **One $\tau$ for all weights is crude.** If the source knows which weights mattered to it, pull
#   those harder: that is elastic weight consolidation, lesson 24.

# %% [markdown]
# Leave-one-out: train on all patients but one, test on that one, in turn, and keep the best of 13
# values of $\alpha$. `RidgeCV` does this in closed form. Predict: with 10 patients, does L2-SP
# with an $\alpha$ chosen like this beat a $\tau$ that is simply guessed?

# %%
from sklearn.linear_model import RidgeCV


def tuned_error(task, n, draw):
    """Error of L2-SP on the patients not drawn, alpha chosen by leave-one-out. A float."""
    source_X, source_y, target_X, target_y = task
    weights = np.linalg.lstsq(source_X, source_y)[0]
    order = np.random.default_rng(draw).permutation(len(target_y))
    train, test = order[:n], order[n:]
    ridge = RidgeCV(alphas=n * np.logspace(-2, 2, 13), fit_intercept=False)
    ridge.fit(target_X[train], target_y[train] - target_X[train] @ weights)
    return np.mean((target_X[test] @ (weights + ridge.coef_) - target_y[test]) ** 2)


# %%
task, price = transfer_task(source_group=1), {}
print("error with tuned alpha minus error with guessed tau, 95 % interval")
for count in (10, 80):
    tuned = np.array([tuned_error(task, count, draw) for draw in range(100)])
    guessed = np.array([patient_errors(task, count, draw) for draw in range(100)])[:, 1:4]
    for tau, errors in zip(TAUS[:3], guessed.T, strict=True):
        price[count, tau] = mean_interval(tuned - errors)
        print(f"  {count} patients, tau = {tau}:  {price[count, tau]}")
assert all(price[10, tau].low > 0 for tau in (0.1, 0.2, 0.3))
assert all(abs(price[80, tau].mean) < 0.03 for tau in (0.1, 0.2, 0.3))

# %% [markdown]
# With 10 patients the choice itself is mostly noise, and each of the three guesses beats it.
# With 80 it hardly matters. A prior is worth most exactly where you cannot afford to tune it.

# %% [markdown]
# ## 15. Explorer
#
# The model of section 8, with everything movable. Try these:
#
# - Make transfer lose with the shortest $\delta$ that you can.
# - Let $n$ fall below 20. Which curves no longer meet at the right end?
# - Raise the noise. Where does the best step go, and why?

# %%
def draw_risks(examples, noise, length, where, steps):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(examples, d))
    setting = {"eigenvalues": np.linalg.eigvalsh(X.T @ X / examples).clip(min=0),
               "sigma": noise, "n": examples}
    truth, error = unit_vector(rng, "anywhere"), length * unit_vector(rng, where)
    gaps = {"scratch": (truth, ORANGE), "transfer": (error, BLUE)}
    figure, axes = plots.subplots(1, 2, figsize=(9.4, 3.5), sharey=True)
    draw_curves(axes[0], step_grid, lambda gap: curves_over_steps(gap, **setting), gaps)
    draw_curves(axes[1], alpha_grid, lambda gap: curves_over_alpha(gap, **setting), gaps)
    finish_panels(axes, steps)


# %%
def finish_panels(axes, steps):
    axes[0].axvline(steps, color="0.6", lw=1)
    axes[1].axvline(1 / (0.02 * steps), color="0.6", lw=1)
    axes[0].set(xlabel="steps t", ylabel="squared error", ylim=(0, 2), title="Stop early")
    axes[1].set(xlabel=r"penalty $\alpha$", title=r"Penalise; grey line: $\alpha = 1/(\eta t)$")
    axes[1].invert_xaxis()
    axes[0].legend(fontsize=9, loc="upper right")


# %%
tl.widgets.explore(
    draw_risks,
    examples=tl.widgets.slider(5, 100, 5, 30, "examples n"),
    noise=tl.widgets.slider(0.1, 2.0, 0.1, 0.7, "noise sigma"),
    length=tl.widgets.slider(0.0, 3.0, 0.1, 0.5, "length of delta"),
    where=tl.widgets.choice(list(kinds), "anywhere", "delta lies"),
    steps=tl.widgets.choice([1, 3, 10, 30, 100, 300, 1000, 3000], 30, "steps t", drag=True),
)

# %% [markdown]
# ## 16. Quiz

# %%
tl.quiz("02")

# %% [markdown]
# ## 17. Exercise
#
# [Exercise 02](../exercises/02_mathematics_of_transfer.ipynb): write the step with a pull, Adam
# and AdamW, L2-SP and the risk of early stopping yourself; then advise a hospital.
#
# ## Papers
#
# - Li, Grandvalet, Davoine 2018, *Explicit Inductive Bias for Transfer Learning with Convolutional
#   Networks*, section 3 (L2-SP), arXiv:1802.01483.
# - Loshchilov, Hutter 2019, *Decoupled Weight Decay Regularization*, section 2 and algorithm 2,
#   arXiv:1711.05101. Their decay is multiplied by the schedule; torch multiplies it by the whole
#   learning rate.
# - Kingma, Ba 2015, *Adam*, algorithm 1, arXiv:1412.6980.
# - Ali, Kolter, Tibshirani 2019, *A Continuous-Time View of Early Stopping for Least Squares*,
#   arXiv:1810.10082 (the factor 1.69).
#
# ## Glossary
#
# | term | meaning | 中文 |
# |---|---|---|
# | empirical risk $\hat R$ | mean loss on the examples you have | 经验风险 |
# | prior | what is believed about the weights before the target data | 先验 |
# | maximum a posteriori (MAP) | the most probable weights after the data | 最大后验估计 |
# | L2-SP | penalty on the squared distance from the starting point | 以起点为中心的 L2 正则化 |
# | weight decay | shrinking every weight by a factor at each step | 权重衰减 |
# | decoupled weight decay | the same, outside the optimiser's rescaling (AdamW) | 解耦权重衰减 |
# | ridge regression | least squares with an L2 penalty towards zero | 岭回归 |
# | bias | error of the mean result | 偏差 |
# | variance | scatter of the results around their mean | 方差 |
# | early stopping | ending training before the minimum | 早停 |
# | filter $f_j$ | part of direction $j$ that the data decide | 滤波因子 |
