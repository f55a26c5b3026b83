# %% [markdown]
# # 10 Choosing a source
#
# A hub offers you ten pre-trained networks and you can afford to fine-tune one. Which? There are
# scores that claim to know, from one forward pass and a few labels. Here you derive three of them,
# catch each one cheating, and then let measured outcomes judge. And you meet a source that is
# worse than no source at all, find the layer that is to blame, and mend it.
#
# **After this lesson you can**
#
# 1. derive LEEP, H-score and LogME on paper, and write each in ten lines;
# 2. test a score before you trust it: against shuffled labels, against outcomes, with one interval
#    over draws and another over sources;
# 3. recognise negative transfer, find the guilty layer without training anything, and mend it.
#
# **You need** lessons 01, 05 and 07, and Gaussian integrals up to completing a square. **Time**
# about 90 minutes; the notebook itself runs in about a minute on two cores.
#
# **Expected result.** At five labels LogME orders ten starts with a weighted tau of .90; over other
# shelves of sources it might be anything in [.65, 1], and plain neighbours do as well. Frozen features
# that were trained on random labels are worth *less* than random weights, by .37 [.32, .41].

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %%
import json
from functools import partial

import numpy as np
import torch
from scipy.stats import multivariate_normal, weightedtau
from sklearn.covariance import ledoit_wolf
from threadpoolctl import threadpool_limits

# %%
from tlcourse import transferability
from tlcourse.evaluation import mean_interval
from tlcourse.layers import all_activations
from tlcourse.locations import data_dir

BLUE, ORANGE, GREEN = tl.plots.palette[:3]
threadpool_limits(1)  # for matrices this small, several threads only wait for each other

# %% [markdown]
# ## Before you run anything
#
# The target is *wild digits*: handwritten digits in colour on photographs, five labels of each.
# You may start from any of these. All are the same small network; all but the last two were
# trained for 2,500 steps of 96 images, each on a task of its own.
#
# | start | what it learned to tell apart | on what |
# |---|---|---|
# | `glyphs` | 203 letters and symbols | photographs |
# | `fonts` | the 11 fonts in which these are drawn | photographs |
# | `bare_glyphs` | the same 203 letters and symbols | black |
# | `inverted` | the same | photographic negatives |
# | `quarter_turns` | by how many quarters the whole image was turned | photographs |
# | `fractals` | fractals | black |
# | `shapes` | shape and texture of a figure | textures |
# | `random_labels` | 2,048 fixed images with labels drawn at random | photographs |
# | `random init` | nothing: random weights | |
# | `glyphnet` | as `glyphs`, but for 12,000 steps | photographs |
#
# Write down:
#
# 1. Your order of the first nine, best first. Where do you put `random_labels`, below `random init`?
# 2. The network knows its own source task to 78 % (`glyphs`), 98 % (`bare_glyphs`), 99.9 %
#    (`random_labels`). Is that a reason to prefer one?
# 3. One of these starts is *worse* than random weights when the target is plain digits, white on
#    black. Which, and is it the first layers or the last that do the harm? Can fine-tuning mend it?

# %% [markdown]
# ## The picture

# %%
SOURCES = ["glyphs", "fonts", "bare_glyphs", "inverted", "quarter_turns", "fractals", "shapes"]
SOURCES += ["random_labels"]
FRESH = "random init"
STARTS = [*SOURCES, FRESH, "glyphnet"]
pool = tl.load_task("wild_digits", labels_per_class=None)  # all 700 images of the training block


def strip(images):
    """A few images side by side, shape (32, 32 * count, 3), in [0, 1]."""
    return (images.permute(2, 0, 3, 1).reshape(32, -1, 3) / 2 + 0.5).clamp(0, 1)


generator = torch.Generator().manual_seed(1)
drawn = {name: tl.scenes.SOURCES[name].batch(5, generator)[0] for name in SOURCES}
drawn["the target: wild digits"] = pool.train.inputs[:5]

# %%
fig, axes = tl.plots.subplots(3, 3, figsize=(9, 4.2))
for ax, (name, images) in zip(axes.flat, drawn.items(), strict=True):
    ax.imshow(strip(images))
    ax.set_title(name, fontsize=10)
    ax.axis("off")
words = "Five images of each of the eight sources, and of the target, coloured digits on flowers."
tl.plots.alt(fig, words)

# %% [markdown]
# A score looks at frozen features of the labelled target images. So we run each start once over
# all 700 images of the training block, and keep the features and, where the checkpoint still has
# it, what the source's **own head** says: probabilities over the source's classes. Two starts have
# none: random weights never had a head, and that of `glyphnet` was thrown away.

# %%
num_draws = {"tiny": 5, "full": 10}[run.profile]  # of the experiment that runs here, further below


def load_start(name, seed=0):
    fresh = name == FRESH
    return tl.load_backbone("glyphnet" if fresh else name, not fresh, seed).to(run.device).eval()


def features_of(backbone, images):
    """Frozen features, float64, shape (N, 128)."""
    with torch.no_grad():
        return backbone(images.to(run.device)).double().cpu().numpy()


# %%
def source_probabilities(backbone, F):
    """What the source's own head says of each image, shape (N, Z); None without a head."""
    if backbone.source_head is None:
        return None
    weight, bias = (part.detach().double().cpu().numpy() for part in backbone.source_head)
    logits = F @ weight.T + bias
    exps = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exps / exps.sum(axis=1, keepdims=True)


F_of, P_of = {}, {}
for name in STARTS:
    backbone = load_start(name)
    F_of[name] = features_of(backbone, pool.train.inputs)
    P_of[name] = source_probabilities(backbone, F_of[name])


# %%
def labelled(labels_per_class, seed):
    """Rows of the pool that a draw gives us, and their labels."""
    rows = tl.load_task("wild_digits", labels_per_class, seed).train.ids.numpy()
    return rows, pool.train.targets.numpy()[rows]


rows, y = labelled(labels_per_class=5, seed=0)
print(f"{len(y)} labelled images, {F_of['glyphs'].shape[1]} features")

# %% [markdown]
# ## The naive score: how good is it at its own job?
#
# Every model card has this number, and it is tempting.

# %% tags=["nbval-check-output"]
own_accuracy = {name: load_start(name).card["source_test_accuracy"] for name in SOURCES}
for name, accuracy in sorted(own_accuracy.items(), key=lambda item: -item[1]):
    print(f"{name:14} {accuracy:.3f}")

# %% [markdown]
# On top stands a network that learned nothing but 2,048 images by heart. The number compares tasks,
# not features: ten classes against 203, black against photographs. (Among networks for *one* source
# task it is a decent guide: Kornblith et al. 2019.) We keep it as the baseline that the real scores
# must beat.
#
# ## LEEP: what do the source's words say about our labels?
#
# Show the source's head a handwritten seven. It has no word for it, but it will say *something*:
# perhaps "Γ, 60 %; ↴, 30 %". If it says much the same of all sevens, and something else of all
# twos, then its words can be translated. LEEP measures how well a word-for-word dictionary does.
#
# Write $p(z \mid x)$ for what the head says of image $x$, over source classes $z$; our labels are
# $y_1, \dots, y_n$, of $K$ classes.
#
# **Count.** An image adds $p(z \mid x_i)$ of itself to word $z$ in the row of its label:
#
# $$\hat P(y, z) = \frac1n \sum_{i:\, y_i = y} p(z \mid x_i), \qquad
# \hat P(z) = \sum_y \hat P(y, z), \qquad \hat P(y \mid z) = \frac{\hat P(y, z)}{\hat P(z)}.$$
#
# **Translate.** For an image, draw a word from the head, then a label from the dictionary:
#
# $$\hat p(y \mid x) = \sum_z \hat P(y \mid z)\, p(z \mid x).$$
#
# **Score.** The mean log-likelihood of the true labels,
# $\;\text{LEEP} = \frac1n \sum_i \log \hat p(y_i \mid x_i).$
#
# By hand, four images, two words, two labels:
#
# | image | $p(z \mid x)$ | label | $\hat p(y_i \mid x_i)$ |
# |---|---|---|---|
# | 1 | .9, .1 | 0 | $.9 \cdot .727 + .1 \cdot .222 = .677$ |
# | 2 | .7, .3 | 0 | $.7 \cdot .727 + .3 \cdot .222 = .576$ |
# | 3 | .2, .8 | 1 | $.2 \cdot .273 + .8 \cdot .778 = .677$ |
# | 4 | .4, .6 | 1 | $.4 \cdot .273 + .6 \cdot .778 = .576$ |
#
# Word 0 got $.9 + .7 = 1.6$ from label 0 and $.2 + .4 = .6$ from label 1, so
# $\hat P(0 \mid z{=}0) = 1.6 / 2.2 = .727$; likewise $\hat P(0 \mid z{=}1) = .4 / 1.8 = .222$.
# LEEP is the mean of the four logarithms, $-0.471$.


# %% tags=["nbval-check-output"]
def leep(P, y):
    """P: what the source's head says, (N, Z); y: labels, (N,)."""
    one_hot = np.eye(y.max() + 1)[y]  # (N, K)
    joint = one_hot.T @ P  # (K, Z), times n
    given = joint / joint.sum(axis=0)  # (K, Z): P(y | z)
    return np.log((given[y] * P).sum(axis=1)).mean()


four = np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.4, 0.6]])
print(f"by hand -0.471, in code {leep(four, np.array([0, 0, 1, 1])):.3f}")
for name in SOURCES:
    ours, theirs = leep(P_of[name][rows], y), transferability.leep(P_of[name][rows], y)
    assert abs(ours - theirs) < 1e-10

# %% [markdown]
# It agrees with `tlcourse.transferability.leep` on every source. Now the important question, and it
# is the same for any score: **what does it say when there is nothing to say?** Shuffle the labels.
# Whatever a source knows, it knows nothing about shuffled labels, so an honest score must give all
# sources the same low number. Guess what LEEP gives.


# %%
def shuffled(score, values, y, repeats=5):
    """Mean score over labels in random order: what the score gives for nothing."""
    chance = np.random.default_rng(0)
    return np.mean([score(values, chance.permutation(y)) for _ in range(repeats)])


print(f"to know nothing costs log 10: {-np.log(10):.3f}\n")
print("source         classes   LEEP  shuffled labels")
for name in SOURCES:
    P = P_of[name][rows]
    print(f"{name:14} {P.shape[1]:7} {leep(P, y):6.2f}  {shuffled(leep, P, y):10.2f}")

# %% [markdown]
# With five labels, most of LEEP's order is the order of the second column: the *number of source
# classes*. On shuffled labels a source with 203 words seems to know a great deal more than one with
# four. Why? The images that are scored are the images that were counted. With many words, an image
# is nearly alone with its favourite word, and the dictionary translates that word into the label
# it was just told.
#
# One can even prove that LEEP never admits to knowing nothing. The logarithm is concave, so (Jensen)
#
# $$\log \sum_z p(z \mid x_i)\, \hat P(y_i \mid z) \;\ge\; \sum_z p(z \mid x_i) \log \hat P(y_i \mid z).$$
#
# Average over $i$. The right side becomes $\sum_{y,z} \hat P(y, z) \log \hat P(y \mid z)$, which is
# minus the conditional entropy of $y$ given $z$, and a condition never raises an entropy:
#
# $$\text{LEEP} \;\ge\; -\hat H(y \mid z) \;\ge\; -\hat H(y) = -\log K \text{ (for balanced labels).}$$
#
# **The remedy** is one line. Count the dictionary *without* the image that is scored: its own share,
# $p(z \mid x_i)$, leaves the counts of its own label.


# %%
def leep_left_out(P, y):
    """LEEP in which no image is translated by a dictionary that has seen its label."""
    joint = np.eye(y.max() + 1)[y].T @ P  # (K, Z), times n
    given = (joint[y] - P) / (joint.sum(axis=0) - P)  # (N, Z), each row without its own image
    return np.log((given * P).sum(axis=1)).mean()


lowest = min(shuffled(leep, P_of[name][rows], y) for name in SOURCES)
highest = max(shuffled(leep_left_out, P_of[name][rows], y) for name in SOURCES)
print(f"shuffled labels: LEEP at least {lowest:.2f}, left out at most {highest:.2f}")
assert highest < -np.log(10) < lowest

# %% [markdown]
# Left out, nobody gets anything for nothing: overconfident sources are even *below* $-\log 10$. We
# keep both versions in the race.
#
# ## H-score: how much of the variation lies between the classes?
#
# LEEP needs the source's head. The next two scores only need features. Look at one feature $f$ and
# ask: of its variance, how much is there because the classes differ?
#
# $$H = \frac{\operatorname{var}\big(E[f \mid y]\big)}{\operatorname{var}(f)}.$$
#
# By hand: values 1, 3 for class A and 5, 7 for class B. The mean is 4 and the variance
# $(9 + 1 + 1 + 9)/4 = 5$. Replace each value by its class mean: 2, 2, 6, 6, variance 4.
# So $H = 4/5$: eighty percent of the variation lies between the classes.
#
# With $D$ features, first turn and stretch the axes until all directions have variance 1 and no two
# are correlated (multiply by $\Sigma^{-1/2}$, where $\Sigma$ is the covariance). Then each direction
# has its own ratio, and we add them up:
#
# $$H = \operatorname{tr}\!\big(\Sigma^{-1/2}\, \Sigma_B\, \Sigma^{-1/2}\big)
# = \operatorname{tr}\!\big(\Sigma^{-1} \Sigma_B\big), \qquad \Sigma_B = \operatorname{cov}\big(E[f \mid y]\big).$$
#
# Each ratio is at most 1, and $K$ class means around their common mean reach into at most $K - 1$
# directions. So $0 \le H \le K - 1$.


# %% tags=["nbval-check-output"]
def h_score(F, y):
    """F: features, (N, D); y: labels, (N,)."""
    F = F - F.mean(axis=0)
    one_hot = np.eye(y.max() + 1)[y]  # (N, K)
    means = one_hot.T @ F / one_hot.sum(axis=0)[:, None]  # (K, D): class means
    between = means[y].T @ means[y] / len(y)  # (D, D)
    total = F.T @ F / len(y)  # (D, D)
    return np.trace(np.linalg.pinv(total, rcond=1e-10, hermitian=True) @ between)


by_hand = np.array([[1.0], [3.0], [5.0], [7.0]])
print(f"by hand 0.8, in code {h_score(by_hand, np.array([0, 0, 1, 1])):.3f}")
for name in STARTS:
    F = F_of[name][rows]
    assert abs(h_score(F, y) - transferability.h_score(F, y)) < 1e-6

# %% [markdown]
# Before you run the next cell: there are 50 images and 128 features. Which start has the highest
# H-score?

# %% tags=["nbval-check-output"]
for name in ("glyphnet", "glyphs", "random_labels", FRESH):
    F = F_of[name][rows]
    print(f"{name:14} {h_score(F, y):.4f}   shuffled labels {shuffled(h_score, F, y):.4f}")
    assert abs(h_score(F, y) - 9) < 1e-6 and abs(shuffled(h_score, F, y) - 9) < 1e-6

# %% [markdown]
# All have 9, the highest there is, with right labels and with wrong ones. Fifty centred points in
# 128 dimensions span 49 directions and nothing ties them together: there is always a direction in
# which class 3 is at 1 and all else at 0. Every ratio is 1. **With fewer images than features the
# H-score is the constant $K - 1$.** It says so without a warning.
#
# Ibrahim et al. (2021) pull the covariance towards a round one, by the amount $\rho$ that Ledoit and
# Wolf's formula finds best, $\;\Sigma_\rho = (1 - \rho)\,\Sigma + \rho\, \bar\sigma^2 I$ (with
# $\bar\sigma^2$ the mean variance), and score $(1 - \rho) \operatorname{tr}(\Sigma_\rho^{-1} \Sigma_B)$.

# %%
h_shrunk = partial(transferability.h_score, shrinkage=True)
print("start          shrunk H  shuffled labels  amount  largest of 128 variances")
for name in ("glyphnet", "glyphs", "random_labels", FRESH):
    F = F_of[name][rows]
    amount = ledoit_wolf(F)[1]
    share = np.linalg.svd(F - F.mean(axis=0), compute_uv=False) ** 2
    print(f"{name:14} {h_shrunk(F, y):8.2f} {shuffled(h_shrunk, F, y):16.2f} {amount:7.2f}", end="")
    print(f"{share[0] / share.sum():26.0%}")

# %% [markdown]
# Better, and yet: the best start, by far, seems to be *random weights*. The shuffled column shows
# the trick again. The features of a random network move mostly together along one direction
# (last column), the brightness of the image. Ledoit and Wolf measure how round the cloud is as a
# whole, find it anything but, and hardly shrink; and in the many tiny directions the fit is perfect
# as before. A score that rewards a random network is not to be used with five labels. With 50 it
# will do better.
#
# ## LogME: the evidence of a linear model
#
# The trouble with the H-score was a fit without a price. Bayes has a price built in. Ask: if I draw
# a linear model at random *before* seeing labels, how probable is it that it produces exactly our
# labels? A model that could fit anything spreads its bets over all labellings, and gives little to
# ours. That number is the **evidence**, and it needs no held-out data.
#
# For one class at a time, let $t_i = 1$ if image $i$ is of that class, else 0. Model:
#
# $$t = F w + \text{noise}, \qquad w \sim N(0, \alpha^{-1} I), \qquad \text{noise} \sim N(0, \beta^{-1} I).$$
#
# $F$ are the features, $(n, D)$; $\alpha$ and $\beta$ are *precisions*, one over a variance.
#
# **Step 1. Write the product.** Likelihood times prior is a constant times $e^{-E(w)}$:
#
# $$p(t \mid w)\, p(w) = \Big(\frac{\beta}{2\pi}\Big)^{n/2} \Big(\frac{\alpha}{2\pi}\Big)^{D/2} e^{-E(w)},
# \qquad E(w) = \tfrac{\beta}{2} |t - F w|^2 + \tfrac{\alpha}{2} |w|^2.$$
#
# **Step 2. Complete the square.** $E$ is quadratic in $w$. Its second derivative is
# $A = \alpha I + \beta F^\top F$, and setting the first to zero gives its lowest point,
# $m = \beta A^{-1} F^\top t$. So $E(w) = E(m) + \tfrac12 (w - m)^\top A\, (w - m)$, exactly.
#
# **Step 3. Integrate over all models.** $\int e^{-\frac12 (w-m)^\top A (w-m)}\, dw = (2\pi)^{D/2} |A|^{-1/2}$.
# The $2\pi$ of the prior cancels:
#
# $$\log p(t) = \underbrace{\tfrac n2 \log\beta - \tfrac n2 \log 2\pi - \tfrac\beta2 |t - Fm|^2}_{\text{fit}}
# \; \underbrace{ - \tfrac\alpha2 |m|^2 + \tfrac D2 \log \alpha - \tfrac12 \log |A|}_{\text{price}}.$$
#
# Read the price slowly. $\tfrac12 \log |A| - \tfrac D2 \log\alpha$ is how much narrower the models
# have become by seeing the labels. Features that must be tuned finely to fit cost much.
#
# By hand, $n = 2$, $D = 1$, $F = (1, 1)^\top$, $t = (1, 1)^\top$, $\alpha = \beta = 1$: $A = 1 + 2 = 3$,
# $m = 2/3$, $|t - Fm|^2 = 2/9$, $|m|^2 = 4/9$, and
# $\log p = -\log 2\pi - \tfrac19 - \tfrac29 - \tfrac12 \log 3 = -2.7205.$


# %% tags=["nbval-check-output"]
def log_evidence(F, t, alpha, beta):
    """log p(t) of a linear model on F, (N, D), with weights and noise integrated out."""
    (N, D), A = F.shape, alpha * np.eye(F.shape[1]) + beta * F.T @ F
    m = beta * np.linalg.solve(A, F.T @ t)
    fit = N * np.log(beta / (2 * np.pi)) - beta * np.sum((t - F @ m) ** 2)
    price = alpha * m @ m - D * np.log(alpha) + np.linalg.slogdet(A)[1]
    return (fit - price) / 2


print(f"by hand -2.7205, in code {log_evidence(np.ones((2, 1)), np.ones(2), 1, 1):.4f}")

# %% [markdown]
# There is a second way to the same number, and it makes a good referee. $t$ is a sum of Gaussians,
# so it is Gaussian itself, with mean 0 and covariance $F F^\top / \alpha + I / \beta$. Same density?

# %%
F, t = F_of["glyphs"][rows], (y == 3).astype(float)
covariance = F @ F.T / 2.0 + np.eye(len(y)) / 5.0
direct = multivariate_normal(cov=covariance).logpdf(t)
print(f"integrated {log_evidence(F, t, 2.0, 5.0):.6f}, density of t {direct:.6f}")
assert abs(log_evidence(F, t, 2.0, 5.0) - direct) < 1e-6

# %% [markdown]
# **Step 4. Choose the precisions.** They are nobody's opinion: take those with the highest
# evidence. Write $s_j^2$ for the eigenvalues of $F^\top F$. Since $m$ is the lowest point of $E$, its own
# change does not count, and
#
# $$\frac{\partial \log p}{\partial \alpha} = \frac{D}{2\alpha} - \frac{|m|^2}{2} - \frac12 \sum_j \frac{1}{\alpha + \beta s_j^2} = 0
# \;\Rightarrow\; \alpha\, |m|^2 = \sum_j \Big(1 - \frac{\alpha}{\alpha + \beta s_j^2}\Big) = \sum_j \frac{\beta s_j^2}{\alpha + \beta s_j^2} =: \gamma.$$
#
# $\gamma$ counts the directions that the data decide (a term is near 1) against those left to the
# prior (near 0). In the same way $\partial / \partial \beta = 0$ gives $\beta\, |t - Fm|^2 = n - \gamma$.
# These are not solutions, as $m$ and $\gamma$ depend on $\alpha$ and $\beta$; but repeat the two lines and
# they settle (MacKay 1992).


# %%
def best_precisions(F, t, steps=100):
    """The precisions (alpha, beta) of highest evidence, by MacKay's fixed point."""
    squares, axes = np.linalg.eigh(F.T @ F)
    squares, along = np.maximum(squares, 0), axes.T @ (F.T @ t)
    alpha = beta = 1.0
    for _ in range(steps):
        m = axes @ (along / (squares + alpha / beta))
        gamma = np.sum(squares / (squares + alpha / beta))  # directions that the data decide
        alpha, beta = gamma / (m @ m), (len(t) - gamma) / np.sum((t - F @ m) ** 2)
    return alpha, beta


# %%
def log_me(F, y):
    """Mean over the classes of the highest log evidence, per example."""
    found = []
    for k in range(y.max() + 1):
        t = (y == k).astype(float)
        found.append(log_evidence(F, t, *best_precisions(F, t)) / len(y))
    return np.mean(found)


ours = {name: log_me(F_of[name][rows], y) for name in STARTS}
for name in STARTS:
    assert abs(ours[name] - transferability.log_me(F_of[name][rows], y)) < 1e-3

# %% [markdown]
# It is the library's `log_me`. Here is the evidence for one class against the ratio
# $\alpha / \beta$, from "fit all you can" on the left to "all weights zero" on the right.


# %%
def evidence_curve(F, t, ratios):
    """Highest evidence per example for each alpha / beta (beta has a closed form then)."""
    squares, axes = np.linalg.eigh(F.T @ F)
    along, curve = axes.T @ (F.T @ t), []
    for ratio in ratios:
        m = axes @ (along / (np.maximum(squares, 0) + ratio))
        beta = len(t) / (np.sum((t - F @ m) ** 2) + ratio * m @ m)
        curve.append(log_evidence(F, t, ratio * beta, beta) / len(t))
    return np.array(curve)


# %%
many_rows, many_y = labelled(labels_per_class=50, seed=0)
ratios, t = np.logspace(-1, 6, 60), (many_y == 3).astype(float)
fig, ax = tl.plots.subplots(figsize=(7.5, 3.6))
for name, color in zip(("glyphnet", "shapes", FRESH), (BLUE, ORANGE, GREEN), strict=True):
    F = F_of[name][many_rows]
    ax.semilogx(ratios, evidence_curve(F, t, ratios), color=color, ls="-", label=name)
    alpha, beta = best_precisions(F, t)
    ax.plot(alpha / beta, log_evidence(F, t, alpha, beta) / len(t), "o", color=color)
ax.set(xlabel="ratio of the precisions, alpha / beta", ylabel="log evidence per image (nats)")
ax.legend(title="is it a three? 500 images", loc="lower left")
words = "Three hills: glyphnet's is highest, that of random weights lowest; a dot on each top."
tl.plots.alt(ax, words)

# %% [markdown]
# The dots are the fixed points: on top of each hill. To the left of a top the model fits better
# and pays more than that is worth.
#
# ## Two plain competitors
#
# Before we admire a formula we ask what something simple would do. **Neighbours**: for each labelled
# image, a vote among the four or five most similar *other* labelled images. The share that is right
# is the score.
#
# **A probe, left out**: take LogME's own linear model and, instead of its evidence, ask how often it
# is right on an image that it has not seen. That needs no second fit. The fitted values are
# $\hat t = S\,t$ with $S = F (F^\top F + \tfrac\alpha\beta I)^{-1} F^\top$. Suppose image $i$ is left out
# and the new model predicts $u$ for it. Put $u$ in the place of $t_i$ and fit everything: the new
# model is still the best, as image $i$ now costs nothing. So $u = \hat t_i + S_{ii}\,(u - t_i)$, and
#
# $$u = \frac{\hat t_i - S_{ii}\, t_i}{1 - S_{ii}}.$$


# %%
def probe_left_out(F, y):
    """Accuracy of ridge regression, each image predicted by a model that has not seen it."""
    U, s, _ = np.linalg.svd(F, full_matrices=False)
    unseen = []
    for k in range(y.max() + 1):
        t = (y == k).astype(float)
        alpha, beta = best_precisions(F, t)
        kept = s**2 / (s**2 + alpha / beta)
        fitted, own = U @ (kept * (U.T @ t)), U**2 @ kept  # S t, and the diagonal of S
        unseen.append((fitted - own * t) / (1 - own))
    return np.mean(np.argmax(unseen, axis=0) == y)


def neighbours(F, y):
    return transferability.neighbour_score(F, y, k=min(5, np.bincount(y).min() - 1))


# %% [markdown]
# One leave-one-out by brute force, to be sure of the short cut:

# %%
F, t = F_of["glyphs"][rows], (y == 3).astype(float)
alpha, beta = best_precisions(F, t)
ridge = F.T @ F + alpha / beta * np.eye(128)
S = F @ np.linalg.solve(ridge, F.T)
kept = np.arange(len(y)) != 7
refit = F[kept].T @ F[kept] + alpha / beta * np.eye(128)
by_refit = F[7] @ np.linalg.solve(refit, F[kept].T @ t[kept])
short_cut = ((S @ t)[7] - S[7, 7] * t[7]) / (1 - S[7, 7])
assert abs(by_refit - short_cut) < 1e-8

# %% [markdown]
# ## Choose now
#
# All scores, all starts, at 5 and at 50 labels per class, over five draws of the labels. They see
# the labelled images of the draw and nothing else.

# %%
FEATURE_SCORES = {
    "H-score": transferability.h_score,
    "H-score, shrunk": h_shrunk,
    "LogME": transferability.log_me,
    "neighbours": neighbours,
    "probe, left out": probe_left_out,
}
HEAD_SCORES = {"LEEP": leep, "LEEP, left out": leep_left_out}
SCORES = ["source accuracy", *HEAD_SCORES, *FEATURE_SCORES]


# %%
def all_scores(name, labels_per_class, seed):
    """Every score of one start on one draw; NaN where it is not defined."""
    rows, y = labelled(labels_per_class, seed)
    P, F = P_of[name], F_of[name][rows]
    found = {"source accuracy": own_accuracy.get(name, np.nan)}
    found |= {s: np.nan if P is None else f(P[rows], y) for s, f in HEAD_SCORES.items()}
    return found | {s: f(F, y) for s, f in FEATURE_SCORES.items()}


table = {}  # (labels, score) -> (starts, draws)
for labels in (5, 50):
    found = [[all_scores(name, labels, seed) for seed in range(5)] for name in STARTS]
    for score in SCORES:
        table[labels, score] = np.array([[draw[score] for draw in start] for start in found])

# %%
print("5 labels per class".ljust(17) + "".join(f"{score:>17}" for score in SCORES))
for row, name in enumerate(STARTS):
    means = [table[5, score][row].mean() for score in SCORES]
    print(f"{name:17}" + "".join(f"{mean:17.2f}" for mean in means))

# %% [markdown]
# Look at one column after the other, and write down the start that each score would have you take,
# and the one that *you* would take. (A `nan` says: not defined. A source without a head has no
# LEEP, and a network that was never trained no source accuracy.)
#
# ## The outcomes
#
# First three of the starts on your machine, in short: a new head, all weights trained, 40 steps of
# 20 on ten labels per class, the same labels and settings for each, and the accuracy on 797 test
# images.


# %%
def short_run(name, seed):
    """Test accuracy on wild digits after 40 steps from a start."""
    task = tl.load_task("wild_digits", labels_per_class=10, seed=seed)
    loaders = task.loaders(batch_size=20, seed=seed)
    model = tl.Classifier(load_start(name, seed), task.num_classes).to(run.device)
    config = tl.TrainConfig(lr=3e-3, num_steps=40, warmup_steps=10, seed=seed, progress=False)
    tl.fit(model, loaders.train, None, config)
    return tl.evaluate(model, loaders.test).accuracy


# %%
arms = {name: partial(short_run, name) for name in ("glyphs", "random_labels", FRESH)}
short = tl.compare(arms, draws=num_draws, workers=None, progress=False)
print(short.table(reference=FRESH))
assert short.difference("glyphs", FRESH).low > 0.1

# %% [markdown]
# Forty steps are few: two of the three have hardly left the ground. The full measurement gives
# every start 200 steps of 32 at 5 and at 50 labels per class, and a peak learning rate chosen on
# validation for each start by itself; five paired draws of labels, test read once. It takes about
# half an hour, so it was run in advance, and the results came with the course:
#
# ```
# python benchmarks/choosing_a_source.py
# ```

# %%
recorded = json.loads((data_dir() / "results" / "choosing_a_source.json").read_text("utf-8"))
outcome = {n: recorded["outcomes"][str(n)]["fine-tune"] for n in (5, 50)}
probed = {n: recorded["outcomes"][str(n)]["probe"] for n in (5, 50)}
order = sorted(STARTS, key=lambda name: -np.mean(outcome[50][name]))
print("test accuracy     fine-tuned, 5 labels   50 labels              probe, 50 labels")
for name in order:
    cells = [mean_interval(part[name]) for part in (outcome[5], outcome[50], probed[50])]
    print(f"{name:15}" + "".join(f"{cell!s:>23}" for cell in cells))

# %%
fig, axes = tl.plots.subplots(1, 2, figsize=(9, 4.2), sharey=True)
for ax, n in zip(axes, (5, 50), strict=True):
    intervals = {name: mean_interval(outcome[n][name]) for name in order}
    tl.plots.plot_intervals(intervals, f"test accuracy, {n} labels per class", ax=ax)
    ax.axvline(np.mean(outcome[n][FRESH]), color="black", ls="--", lw=1)
words = "From best to worst: " + ", ".join(f"{n} {np.mean(outcome[50][n]):.2f}" for n in order)
tl.plots.alt(fig, words)

# %% [markdown]
# **Guess 1.** Read the right panel from the top.
#
# - More steps of the same source beat everything else (`glyphnet`).
# - Letters help on black, in the negative, on photographs; even fractals, which never showed a letter
#   or a photograph, lift the network from .21 to .74.
# - `fonts` saw the same pictures as `glyphs`. Only the *question* was another, which font instead of
#   which letter, and that costs .23. A source is a question, not a pile of images.
# - `quarter_turns` and `random_labels` are worth nothing at five labels.
#
# **Guess 2.** The network that is best at its own task, 99.9 %, is the last but one.


# %%
def gain(name, n, over=FRESH, part=outcome):
    return mean_interval(np.subtract(part[n][name], part[n][over]))


print("glyphs minus fonts, 50 labels:", gain("glyphs", 50, over="fonts"))
print("fractals minus random init, 50 labels:", gain("fractals", 50))
assert gain("glyphs", 50, over="fonts").low > 0.15 and gain("fractals", 50).low > 0.25
assert gain("glyphnet", 50, over="glyphs").low > 0.02
assert all(abs(gain(name, 5).mean) < 0.06 for name in ("quarter_turns", "random_labels"))

# %% [markdown]
# ## How well did the scores order them?
#
# Two lists of numbers, one question: do they put the starts into the same order? Take every pair of
# starts. If score and outcome agree about which of the two is better, the pair counts $+1$, else
# $-1$. The mean over all pairs is **Kendall's tau**: 1 for the same order, $-1$ for the reverse, 0
# for no relation. We care about the top more than about the tail, so the **weighted** tau (Vigna
# 2015) gives a pair the weight $\frac{1}{1 + r_i} + \frac{1}{1 + r_j}$, where $r$ is the rank, 0 for
# the best; once with ranks by score and once with ranks by outcome, and takes the mean.


# %% tags=["nbval-check-output"]
def weighted_tau(x, y):
    """Agreement of two orders, without ties, pairs near the top weighing more."""
    agree = np.sign(x[:, None] - x) * np.sign(y[:, None] - y)  # (n, n), 0 on the diagonal
    taus = []
    for values in (x, y):
        weight = 1 / (1 + np.argsort(np.argsort(-values)))  # by rank, 0 for the best
        pairs = weight[:, None] + weight
        taus.append((pairs * agree).sum() / pairs[~np.eye(len(x), dtype=bool)].sum())
    return np.mean(taus)


a, b = np.array([4.0, 3.0, 2.0, 1.0]), np.array([4.0, 3.0, 1.0, 2.0])  # the last two swapped
print(f"tail swapped {weighted_tau(a, b):.3f}, top swapped {weighted_tau(-a, -b):.3f}")
assert abs(weighted_tau(a, b) - weightedtau(a, b).statistic) < 1e-12

# %% [markdown]
# Both examples have one wrong pair of six, and the plain tau of both is 0.667. The weighted one
# minds a mistake at the top more.
#
# **Which interval?** There are two, and they answer different questions.
#
# - *Over draws*: other labelled images, the same ten starts. Draw five draws with replacement, take
#   the mean scores and mean outcomes, and the tau. Many times.
# - *Over sources*: another shelf of starts like these. Draw the starts with replacement.
#
# Before you look: which of the two will be wide?


# %%
def taus(n, score, over, resamples=400):
    """Bootstrap sample of the weighted tau of a score with the outcomes at n labels."""
    chance = np.random.default_rng(0)
    x, z = table[n, score], np.array([outcome[n][name] for name in STARTS])  # (starts, draws)
    defined = np.flatnonzero(~np.isnan(x[:, 0]))
    sample = []
    for _ in range(resamples):
        s = chance.choice(defined, len(defined)) if over == "sources" else defined
        d = chance.integers(5, size=5) if over == "draws" else np.arange(5)
        sample.append(weightedtau(x[s][:, d].mean(axis=1), z[s][:, d].mean(axis=1)).statistic)
    return np.array(sample)


# %%
def tau_interval(n, score, over):
    """(tau, low, high): the tau of the mean scores, and the middle 95 % of the bootstrap."""
    low, high = np.nanpercentile(taus(n, score, over), [2.5, 97.5])
    x, z = table[n, score].mean(axis=1), np.array([np.mean(outcome[n][name]) for name in STARTS])
    defined = ~np.isnan(x)
    tau = weightedtau(x[defined], z[defined]).statistic
    return tau, min(low, tau), max(high, tau)


compared = [score for score in SCORES if score != "H-score"]
agreement = {
    (n, score, over): tau_interval(n, score, over)
    for n in (5, 50) for score in SCORES for over in ("draws", "sources")
    if (n, score) != (5, "H-score")  # a constant orders nothing
}  # fmt: skip

# %%
print(f"{'':17}labels   tau   over draws       over sources")
for (n, score, over), (tau, low, high) in agreement.items():
    if over == "draws":
        wide = agreement[n, score, "sources"]
        print(f"{score:17}{n:4}  {tau:6.2f}   [{low:5.2f}, {high:5.2f}]", end="")
        print(f"   [{wide[1]:5.2f}, {wide[2]:5.2f}]")

# %%
fig, axes = tl.plots.subplots(1, 2, figsize=(9, 4), sharey=True)
for ax, n in zip(axes, (5, 50), strict=True):
    for row, score in enumerate(compared):
        for over, color, shift in (("sources", ORANGE, 0.15), ("draws", BLUE, -0.15)):
            tau, low, high = agreement[n, score, over]
            ax.plot([low, high], [row + shift] * 2, color=color, lw=3, ls="-", marker="")
            ax.plot(tau, row + shift, "o", color=color, label=f"over {over}" if not row else None)
    ax.set(xlabel=f"weighted tau, {n} labels per class", xlim=(-1.05, 1.05))
    ax.axvline(0, color="black", lw=0.8, ls="--")
axes[0].set_yticks(range(len(compared)), compared)
axes[0].invert_yaxis()
axes[0].legend(loc="lower left")
values = [f"{s}, {n} labels {agreement[n, s, 'draws'][0]:.2f}" for n in (5, 50) for s in compared]
tl.plots.alt(fig, "Tau with its two intervals. " + "; ".join(values))

# %% [markdown]
# **Source accuracy fails.** Its tau is negative, and no interval saves it. So does the shrunk H-score
# at five labels, for the reason that you saw: it loves random weights.
#
# **All others order this shelf well**, with a tau of .8 to .94. LEEP among them, although it gave
# points for nothing: the sources with many classes happen to be the good ones here. It was lucky.
# You would not have known without the shuffled labels.
#
# **And which interval is wide?** The one over sources, for nearly every row. More labelled draws make
# the blue bars short. They do not make the shelf longer than ten.

# %%
widths = {key: high - low for key, (tau, low, high) in agreement.items()}
rows_of = [key[:2] for key in agreement if key[2] == "draws"]
wider = sum(widths[*row, "sources"] > widths[*row, "draws"] for row in rows_of)
print(f"over sources is wider than over draws in {wider} of {len(rows_of)} rows")
assert wider >= 0.75 * len(rows_of)
assert all(agreement[n, "source accuracy", "draws"][0] < 0.2 for n in (5, 50))
assert all(agreement[50, score, "draws"][0] > 0.6 for score in compared if score != "source accuracy")

# %% [markdown]
# Is the best formula better than the plain neighbours?


# %%
def tau_difference(n, a, b):
    """Bootstrap over sources of (tau of score a) - (tau of score b), on the same resamples."""
    difference = taus(n, a, "sources") - taus(n, b, "sources")
    return np.nanpercentile(difference, [2.5, 97.5])


for n in (5, 50):
    low, high = tau_difference(n, "LogME", "neighbours")
    print(f"{n} labels per class, tau of LogME minus tau of neighbours: [{low:+.2f}, {high:+.2f}]")
    assert low < 0.05 and high > -0.05  # LogME is not shown to be better

# %% [markdown]
# ## The same choice under a budget
#
# If no start suits, you may pre-train one. Then there are two dials, *which* source and *how many*
# steps, and both cost. `glyphs` and `glyphnet` are the same source with 2,500 and with 12,000 steps.

# %%
print(f"{'':15}steps   gain over glyphs, 5 labels   50 labels")
for name in ("glyphnet", "bare_glyphs", "fractals", "random_labels"):
    steps = load_start(name).card["num_steps"]
    gains = [gain(name, n, "glyphs") for n in (5, 50)]
    print(f"{name:14}{steps:6}   " + "   ".join(str(g) for g in gains))

# %% [markdown]
# Five times the steps are worth .11 at five labels and .05 at fifty. The photographs behind the letters
# are worth .15 and .05 (that is what `bare_glyphs` lacks). Fractals lose .29 at five labels: choosing
# the right source comes before training it longer.
#
# ## Negative transfer
#
# *Negative transfer* has a strict definition (Wang et al. 2019): the same algorithm does worse with
# the source than without it. The same algorithm: same steps, same labels, same tuning, another
# start. On wild digits, did it happen?

# %%
for n in (5, 50):
    worst = min(SOURCES, key=lambda name: np.mean(outcome[n][name]))
    print(f"{n:2} labels, the least useful source, {worst}, minus random init: {gain(worst, n)}")

# %% [markdown]
# At 50 labels, no. At five, `quarter_turns` is .02 below random weights and the interval just excludes
# zero. But we picked it as the worst of eight *after* looking. The worst of eight harmless sources
# would look like that too, so we do not count it.
#
# Now another target: *plain digits*, the same handwriting in white on black. First with frozen
# features, here on your machine: a linear probe, five labels per class. Before you run it: can a
# trained network give worse features than random weights?


# %%
def plain_probe(name, seed):
    """Test accuracy on plain digits of logistic regression on frozen features."""
    task = tl.load_task("plain_digits", labels_per_class=5, seed=seed)
    return tl.arms.probe(task, load_start(name, seed)).test_accuracy


frozen = {name: partial(plain_probe, name) for name in ("glyphs", FRESH, "random_labels")}
frozen = tl.compare(frozen, draws=num_draws, workers=None, progress=False)
print(frozen.table(reference=FRESH))
assert frozen.difference("random_labels", FRESH).high < -0.1

# %% [markdown]
# It can, and by a wide margin. That is negative transfer of frozen features, .37 of all test images.
#
# ### Which layer is to blame?
#
# You can find out without training anything. Read both networks after each layer and ask the
# neighbours: how well do the features here tell digits apart? All layers of a random network pass
# the image on, somewhat scrambled. A layer that does *worse* than its random twin has learned to
# throw digits away.


# %%
plain_pool = tl.load_task("plain_digits", labels_per_class=None).train
PARTS = {"stem": "body.stem", "stage 1": "body.stages.0"}
PARTS |= {"stage 2": "body.stages.1", "stage 3": "body.stages.2"}


def by_layer(name, seed=0):
    """Neighbour score of the pooled output of each layer, on 700 plain digits."""
    backbone, targets = load_start(name, seed), plain_pool.targets.numpy()
    with torch.no_grad():
        read = all_activations(backbone, list(PARTS.values()), plain_pool.inputs.to(run.device))
    pooled = [part.mean(dim=(2, 3)).double().cpu().numpy() for part in read.values()]
    return [neighbours(F, targets) for F in pooled]


# %%
twins = np.array([by_layer(FRESH, seed) for seed in range(5)])  # five random networks
layers = {name: by_layer(name) for name in ("glyphs", "random_labels")}

# %%
fig, ax = tl.plots.subplots(figsize=(7.5, 3.6))
places = np.arange(len(PARTS))
ax.fill_between(places, twins.min(axis=0), twins.max(axis=0), color="#CCCCCC", label=FRESH)
for (name, curve), color, marker in zip(layers.items(), (BLUE, ORANGE), "os", strict=True):
    ax.plot(places, curve, color=color, marker=marker, ls="-", label=name)
ax.set_xticks(places, list(PARTS))
ax.set(xlabel="features read after", ylabel="neighbour score, plain digits", ylim=(0, 1))
ax.legend(loc="lower left")
words = "random_labels stays in the band of random networks up to stage 2, then falls far below it."
tl.plots.alt(ax, words)
assert layers["random_labels"][3] < twins[:, 3].min() - 0.2
assert layers["random_labels"][1] > twins[:, 1].min() - 0.1

# %% [markdown]
# Up to stage 2 the memoriser is as good as random weights. In stage 3, the last, it falls from the
# level of its neighbours to less than half. To keep 2,048 images apart, of which many are alike, it had
# to tear apart what looks alike. Two slightly distorted copies of one digit show it:

# %%
copies = [
    tl.datasets.augment_images(plain_pool.inputs[:200], torch.Generator().manual_seed(seed))
    for seed in (0, 1)
]
for name in ("glyphs", FRESH, "random_labels"):
    backbone = load_start(name)
    centre = features_of(backbone, plain_pool.inputs).mean(axis=0)
    one, two = (features_of(backbone, part) - centre for part in copies)
    cosine = np.sum(one * two, axis=1)
    cosine /= np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    print(f"{name:14} cosine of two copies of one digit: {mean_interval(cosine)}")

# %% [markdown]
# ### Is it really that layer? Interventions
#
# A correlation is a suspicion. The proof is to intervene. There are four suspects, and a change that
# convicts or clears each:
#
# - *Stage 3*: give it new random weights, keep the rest. The harm must shrink.
# - *The layers below*: the other way round, keep only stage 3, all below new. The harm must stay.
# - *Grown weights*: after much training the weights are long, and a step of the optimizer turns a
#   long vector less. A norm layer follows each convolution, so dividing its weights by a number
#   **changes no output**. Give each the length of a fresh one. Frozen features must stay as they
#   are, to the last digit, and only fine-tuning can notice.
# - *Stuck*: shrink all weights towards zero and add noise (Ash and Adams 2020).
#
# First on frozen features, one label per class, ten paired draws. The benchmark from above recorded
# them.

# %%
tuned = {n: recorded["harm"][str(n)] for n in (1, 5)}  # each start with its own best rate
fixed = recorded["fixed_rate"]["5"]  # the same small rate for all
CHANGES = [name for name in fixed["fine-tune"] if name.startswith("random_labels, ")]


def harm(part, name, method="fine-tune"):
    """What a start loses or gains against random weights, paired over the draws."""
    return mean_interval(np.subtract(part[method][name], part[method][FRESH]))


# %%
print("linear probe on frozen features, plain digits, 1 label per class, minus random init")
for name in ("random_labels", *CHANGES):
    print(f"{name:38} {harm(tuned[1], name, 'probe')}")
probes = tuned[1]["probe"]
mended = np.subtract(probes[CHANGES[0]], probes["random_labels"])
print(f"what a new last stage gives back: {mean_interval(mended)}")
assert harm(tuned[1], "random_labels", "probe").high < -0.1 and mean_interval(mended).low > 0.05
assert np.allclose(probes["random_labels, weights rescaled"], probes["random_labels"], atol=0.01)

# %% [markdown]
# A new last stage, as random as they come, gives back more than half of what the learned one cost.
# With only the last stage kept, most of the harm stays. And the rescaled network gives the same
# accuracies as the one it was made from, as promised. Below random weights they all remain: the
# layers that were kept still do not know digits.
#
# ### Does fine-tuning undo it?
#
# Frozen features are the easy case. Fine-tuning may change every weight, stage 3 as well. First with
# a rate of $10^{-3}$ for all, a usual one, five labels per class, 200 steps, ten paired draws.
# Before you look: which of the four changes will help?

# %%
print(f"fine-tuned at lr 1e-3: random init {mean_interval(fixed['fine-tune'][FRESH])}; minus that:")
names = ["random_labels", *CHANGES]
for name in names:
    print(f"{name:38} {harm(fixed, name)}")
ax = tl.plots.plot_intervals(
    {name.replace(", ", ",\n"): harm(fixed, name) for name in names},
    "accuracy minus random init, plain digits, 5 labels",
    reference=0,
)
tl.plots.alt(ax, "Losses: " + "; ".join(f"{name} {harm(fixed, name)}" for name in names))
assert harm(fixed, "random_labels").high < -0.01
assert harm(fixed, "random_labels, all but last stage new").high < -0.01
assert harm(fixed, "random_labels, last stage new").low > -0.03
assert abs(harm(fixed, "random_labels, weights rescaled").mean) < 0.03

# %% [markdown]
# **Negative transfer, in the strict sense**: same labels, same steps, same rate, and the network that
# was trained before is .04 [.03, .05] *worse* than one that was not. (Guess 3.)
#
# **The cause.** Give stage 3 new weights, and the harm is gone. Keep nothing but stage 3, and all of it
# is there. That is as close to a proof as an experiment comes.
#
# **And what about stage 3 does it?** Look at the last row. Rescaling changed nothing of what the
# network says, and most of the harm went. So the wrong things that stage 3 knows can be overwritten
# in 200 steps, if only its weights *turn* far enough. How much too long are they?

# %%
old, new = load_start("random_labels").body, load_start(FRESH).body
for name, weight in old.named_parameters():
    if "stages.2.conv" in name:
        ratio = weight.norm() / new.get_parameter(name).norm()
        print(f"{name}: {ratio:.1f} times as long as a fresh one")
given_back = np.subtract(fixed["fine-tune"]["random_labels, weights rescaled"],
                         fixed["fine-tune"]["random_labels"])  # fmt: skip
print(f"what the rescaling gives back: {mean_interval(given_back)}")
assert mean_interval(given_back).low > 0

# %% [markdown]
# A step of Adam has a length that does not depend on the weights, so it turns these 1.7 times less.
# What is small is the *effective* rate. (The weights of `glyphs` are longer still. There nothing has
# to be turned round.) Then the plainest remedy of all should do: a larger rate.

# %%
for n in (1, 5):
    lr = tuned[n]["lr"]
    print(f"{n} label(s), rates by validation: {lr['random_labels']:g}, random init {lr[FRESH]:g}")
    print(f"   random_labels minus random init: {harm(tuned[n], 'random_labels')}")
    assert harm(tuned[n], "random_labels").high > 0  # no harm is shown any more

# %% [markdown]
# With a rate that validation chose for each start ($3 \cdot 10^{-3}$ for both), **nothing is left to
# be seen**: the interval holds zero at one label and at five. Whether a source harms depends on the
# source, on the target, *and* on the recipe.
#
# So when somebody reports negative transfer, ask three things: against which control, was the rate
# tuned for each start, and which layer? And if a layer is to blame: read below it, renew it, or let
# it learn faster.
#
# ## Where it fails
#
# **Scores see features, fine-tuning changes them.** Every score here reads the frozen network. What
# fine-tuning can make of a start is another question. At 50 labels the frozen features of `shapes`
# are worth less than those of `fonts` (.45 against .48); fine-tuned, it is far ahead (.81 to .65).
#
# **Ten starts are a small shelf.** The interval over sources does not shrink with more labels or more
# draws. Papers that rank scores by a tau over a dozen networks rarely print it (Agostinelli et al.
# 2022 measure how much the winner depends on the collection).
#
# **Shuffled labels are necessary, not sufficient.** A score that passes can still be fooled by a
# source that tells digits apart by something that will not be there tomorrow (lesson 26).
#
# **"Equal steps" is one fairness among several.** Random weights need more steps. With 1,500 of them
# they reach the accuracy that lesson 01 recorded for scratch, well above many starts here after 200.
#
# **Negative transfer belongs to a pair.** The source that harms plain digits does not harm wild ones.
# "A bad checkpoint" is not a property of a file.
#
# ## Explorer
#
# Choose a score and a number of labels. Each point is a start: the score that it got, against what
# came of it. Three questions; the answers are below.
#
# 1. Find the score with the worst single mistake: the start that it ranks highest and should not.
# 2. *LEEP* at 5 labels: `fonts` lies to the left of `random_labels`. Does it deserve that? What does
#    *LEEP, left out* say?
# 3. *Neighbours* at 5 labels: five starts lie within .05 of each other. Does it matter?


# %%
def show_score(score, labels):
    x = table[labels, score].mean(axis=1)
    z = np.array([np.mean(outcome[labels][name]) for name in STARTS])
    defined = ~np.isnan(x)
    ax = tl.plots.subplots(figsize=(7.5, 4))[1]
    ax.plot(x[defined], z[defined], "o", color=BLUE)
    for name, across, up in zip(STARTS, x, z, strict=True):
        if not np.isnan(across):
            ax.annotate(name, (across, up), (4, 4), textcoords="offset points", fontsize=8)
    constant = np.ptp(x[defined]) < 1e-6
    tau = "not defined" if constant else f"{weightedtau(x[defined], z[defined]).statistic:.2f}"
    ax.set(xlabel=score, ylabel="accuracy after fine-tuning", ylim=(0, 1))
    ax.set_title(f"{defined.sum()} starts, weighted tau {tau}")


# %%
tl.widgets.explore(
    show_score,
    score=tl.widgets.choice(SCORES, "LogME", "score"),
    labels=tl.widgets.choice([5, 50], 50, "labels per class"),
)

# %% [markdown]
# **Answers.** 1. Source accuracy: it puts `random_labels` on top, which is worth next to nothing.
# (Second prize: the shrunk H-score at 5 labels, with random weights.) 2. No: .26 against .13 after
# fine-tuning. `fonts` has a head of few words that are rarely sure, and LEEP counts words. Left out,
# the two change places. 3. It mixes up the middle of the list. The top is right, and the top is what
# you came for.
#
# ## Quiz

# %%
tl.quiz("10")

# %% [markdown]
# ## Exercise
#
# [Choosing a source: the exercise](../exercises/10_choosing_a_source.ipynb) lets you write LEEP,
# H-score and the evidence yourself, judge an order with ties, pick a source under a budget, and
# answer somebody who reports negative transfer.
#
# ## Papers
#
# - Nguyen, Hassner, Seeger and Archambeau 2020, *LEEP: a new measure to evaluate transferability of
#   learned representations*, section 3, arXiv:2002.12462.
# - Bao et al. 2019, *An information-theoretic approach to transferability in task transfer
#   learning*, definition 2, ICIP.
# - Ibrahim, Ponomareva and Mazumder 2021, *Newer is not always better: rethinking transferability
#   metrics, their peculiarities, stability and performance*, arXiv:2110.06893.
# - You, Liu, Wang and Long 2021, *LogME: practical assessment of pre-trained models for transfer
#   learning*, section 4, arXiv:2102.11005.
# - MacKay 1992, *Bayesian interpolation*, Neural Computation 4(3): evidence and its fixed point.
# - Vigna 2015, *A weighted correlation index for rankings with ties*, arXiv:1404.3325.
# - Agostinelli, Pándy, Uijlings, Mensink and Ferrari 2022, *How stable are transferability metrics
#   evaluations?*, arXiv:2204.01403.
# - Kornblith, Shlens and Le 2019, *Do better ImageNet models transfer better?*, arXiv:1805.08974.
# - Wang, Dai, Póczos and Carbonell 2019, *Characterizing and avoiding negative transfer*, section 3,
#   arXiv:1811.09751.
# - Maennel et al. 2020, *What do neural networks learn when trained with random labels?*,
#   arXiv:2006.10455: lower layers help, upper layers harm.
# - Ash and Adams 2020, *On warm-starting neural network training*, arXiv:1910.08475.
#
# ## Glossary
#
# | term | meaning | Chinese |
# |---|---|---|
# | transferability score | a forecast of what a source is worth, without fine-tuning | 可迁移性度量 |
# | LEEP | mean log-likelihood of target labels translated from the source's own | 对数期望经验预测 |
# | H-score | share of the features' variation between classes, summed over directions | H 分数 |
# | shrinkage | pulling a covariance towards a round one | 收缩估计 |
# | evidence, marginal likelihood | probability of the labels, averaged over the prior's models | 证据（边缘似然） |
# | precision | one over a variance | 精度 |
# | leave-one-out | each example judged without itself | 留一法 |
# | Kendall's tau | agreement of two orders, from -1 to 1 | 肯德尔 τ 系数 |
# | bootstrap | an interval from resampling with replacement | 自助法 |
# | negative transfer | worse with the source than without it | 负迁移 |
# | shrink and perturb | smaller weights plus noise before training on | 收缩与扰动 |
