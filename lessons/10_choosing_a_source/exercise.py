# %% [markdown]
# # Exercise 10: choosing a source
#
# You write the scores of the lesson yourself, judge an order with ties in it, and spend a budget.
# Then somebody reports negative transfer, and you decide what the report is worth.
#
# | question | | points |
# |---|---|---|
# | 1 | LEEP | 3 |
# | 2 | H-score | 3 |
# | 3 | the evidence of a linear model | 4 |
# | 4 | agreement of two orders, with ties | 3 |
# | 5 | the best source that you can pay for | 3 |
# | 6 | judgement, in your own words | 4 |
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
from threadpoolctl import threadpool_limits

BLUE, ORANGE, GREEN = tl.plots.palette[:3]
threadpool_limits(1)  # for matrices this small, several threads only wait for each other

# %% [markdown]
# The first three answers will be tried on real features: five labels per class of *wild digits*,
# read by three starts.

# %%
task = tl.load_task("wild_digits", labels_per_class=5, seed=0)
targets = task.train.targets.numpy()
starts = {name: tl.load_backbone(name).eval() for name in ("glyphs", "shapes", "random_labels")}
features, words = {}, {}
for name, backbone in starts.items():
    F = backbone(task.train.inputs).detach().double()  # (50, 128)
    weight, bias = (part.detach().double() for part in backbone.source_head)
    features[name] = F.numpy()
    words[name] = (F @ weight.T + bias).softmax(dim=1).numpy()  # (50, source classes)

# %% [markdown]
# ## Question 1. LEEP (3 points)
#
# `probabilities[i, z]` is what the source's head says of image $i$. Count
# $\hat P(y, z)$, from it $\hat P(y \mid z)$, translate, and return the mean log-likelihood
#
# $$\frac1n \sum_i \log \sum_z \hat P(y_i \mid z)\, p(z \mid x_i).$$
#
# The classes of the target are $0, \dots,$ `targets.max()`. A source class may get no probability
# from any image; it must not spoil the result.


# %% question="10.q1"
def leep(probabilities, targets):
    """Log expected empirical prediction.

    Nguyen et al. 2020, section 3, arXiv:2002.12462.

    Args:
        probabilities: shape (n, Z), rows sum to 1.
        targets: whole numbers from 0, shape (n,).

    Returns:
        One number, in nats.
    """
    ### BEGIN SOLUTION
    one_hot = np.eye(targets.max() + 1)[targets]  # (n, K)
    joint = one_hot.T @ probabilities  # (K, Z), times n
    word = joint.sum(axis=0)  # (Z,)
    given = joint / np.where(word > 0, word, 1)  # P(y | z); 0 for a word that is never used
    return np.mean(np.log((given[targets] * probabilities).sum(axis=1)))
    ### END SOLUTION


# %% check="10.q1"
right_1 = tl.check("10.q1", leep)

# %%
if right_1:
    order = np.random.default_rng(0).permutation(len(targets))
    for name, P in words.items():
        print(f"{name:14} {P.shape[1]:4} words: LEEP {leep(P, targets):.2f}, ", end="")
        print(f"with shuffled labels {leep(P, targets[order]):.2f}")

# %% [markdown]
# Remember what the second number says about the first.
#
# ## Question 2. H-score (3 points)
#
# $H = \operatorname{tr}(\Sigma^{-1} \Sigma_B)$: the covariance of the features, and the covariance
# of what is left when each image's features are replaced by the mean of its class. Both are divided
# by $n$. There are more images than features here, and $\Sigma$ is invertible. The features do
# *not* come centred.


# %% question="10.q2"
def h_score(features, targets):
    """Share of the variation that lies between the classes, summed over directions.

    Bao et al. 2019, definition 2.

    Args:
        features: shape (n, D), n > D.
        targets: whole numbers from 0, every class occurs, shape (n,).

    Returns:
        One number, between 0 and K - 1.
    """
    ### BEGIN SOLUTION
    centred = features - features.mean(axis=0)
    one_hot = np.eye(targets.max() + 1)[targets]  # (n, K)
    means = one_hot.T @ centred / one_hot.sum(axis=0)[:, None]  # (K, D)
    by_class = means[targets]  # (n, D): each image by the mean of its class
    # The 1/n of both covariances cancels.
    return np.trace(np.linalg.solve(centred.T @ centred, by_class.T @ by_class))
    ### END SOLUTION


# %% check="10.q2"
right_2 = tl.check("10.q2", h_score)

# %% [markdown]
# When it is right: give it more and more features that are nothing but noise, and random labels.

# %%
if right_2:
    rng = np.random.default_rng(0)
    counts = range(1, 49, 3)
    noise = [h_score(rng.normal(size=(50, D)), targets) for D in counts]
    ax = tl.plots.subplots(figsize=(7, 3))[1]
    ax.plot(counts, noise, color=ORANGE, marker="o", ls="-")
    ax.axhline(9, color="black", ls="--", lw=1)
    ax.set(xlabel="features of pure noise, for 50 images", ylabel="H-score", ylim=(0, 10))
    tl.plots.alt(ax, "The H-score of noise rises in a straight line to its maximum, 9.")

# %% [markdown]
# ## Question 3. The evidence of a linear model (4 points)
#
# $t = F w + \text{noise}$, with $w \sim N(0, \alpha^{-1} I)$ and noise $\sim N(0, \beta^{-1} I)$. Return
# $\log p(t)$, with $w$ integrated out. There may be more features than images. You may use the
# lesson's formula, or the density of $t$ itself: both are right.


# %% question="10.q3"
def log_evidence(F, t, alpha, beta):
    """Log marginal likelihood of a Bayesian linear model.

    Args:
        F: features, shape (n, D).
        t: shape (n,).
        alpha: precision of the weights' prior, > 0.
        beta: precision of the noise, > 0.

    Returns:
        One number, in nats, for all n examples together.
    """
    ### BEGIN SOLUTION
    n, D = F.shape
    A = alpha * np.eye(D) + beta * F.T @ F
    m = beta * np.linalg.solve(A, F.T @ t)
    fit = n * np.log(beta / (2 * np.pi)) - beta * np.sum((t - F @ m) ** 2)
    price = alpha * m @ m - D * np.log(alpha) + np.linalg.slogdet(A)[1]
    return (fit - price) / 2
    ### END SOLUTION


# %% check="10.q3"
right_3 = tl.check("10.q3", log_evidence)

# %%
if right_3:
    ratios, ax = np.logspace(0, 5, 40), tl.plots.subplots(figsize=(7, 3))[1]
    indicators = np.eye(10)[targets].T  # (10, n): is it a zero? is it a one? ...
    for (name, F), color in zip(features.items(), (BLUE, ORANGE, GREEN), strict=True):
        curve = [np.mean([log_evidence(F, t, 20 * r, 20.0) for t in indicators]) for r in ratios]
        ax.semilogx(ratios, np.array(curve) / len(targets), color=color, ls="-", label=name)
    ax.set(xlabel="alpha / beta (beta = 20)", ylabel="log evidence per image")
    ax.legend(title="mean over ten classes")
    words_ = "Three curves that rise from the left; that of glyphs lies highest at its top."
    tl.plots.alt(ax, words_)

# %% [markdown]
# ## Question 4. Agreement of two orders, with ties (3 points)
#
# Plain Kendall's tau counts pairs: $+1$ if score and outcome agree about which of two sources is
# better, $-1$ if they disagree. But scores *tie* (a constant H-score ties all). A pair that is tied
# in one of the lists counts 0 above, and the list with the tie has fewer pairs to order. So
#
# $$\tau_b = \frac{\sum_{i<j} \operatorname{sgn}(x_i - x_j)\, \operatorname{sgn}(z_i - z_j)}{\sqrt{N_x\, N_z}},$$
#
# with $N_x$ the number of pairs that are not tied in $x$, and $N_z$ likewise. And judge: if one of the
# lists is *all* ties, it orders nothing. Then return `nan`, not 0 and not 1.


# %% question="10.q4"
def tau_b(scores, outcomes):
    """Kendall's tau with ties (tau-b).

    Args:
        scores: shape (n,), n >= 2.
        outcomes: shape (n,).

    Returns:
        One number in [-1, 1], or nan if all scores or all outcomes are equal.
    """
    ### BEGIN SOLUTION
    by_score = np.sign(scores[:, None] - scores)  # (n, n)
    by_outcome = np.sign(outcomes[:, None] - outcomes)
    # Each pair is in these matrices twice, above and below: the factor cancels.
    ordered = np.abs(by_score).sum() * np.abs(by_outcome).sum()
    return np.nan if ordered == 0 else (by_score * by_outcome).sum() / np.sqrt(ordered)
    ### END SOLUTION


# %% check="10.q4"
right_4 = tl.check("10.q4", tau_b)

# %% [markdown]
# When it is right: how far does tau spread for a score that knows *nothing*, with ten sources?

# %%
if right_4:
    rng = np.random.default_rng(0)
    blind = [tau_b(rng.normal(size=10), np.arange(10.0)) for _ in range(2000)]
    ax = tl.plots.subplots(figsize=(7, 2.6))[1]
    ax.hist(blind, bins=23, color=BLUE)
    ax.set(xlabel="tau of a score that knows nothing, 10 sources", ylabel="of 2,000")
    tl.plots.alt(ax, "A bell around 0 that reaches from about -0.5 to 0.5.")
    print("95 % of them lie in", np.percentile(blind, [2.5, 97.5]).round(2))

# %% [markdown]
# ## Question 5. The best source that you can pay for (3 points)
#
# Several sources were fine-tuned on the same draws of labels, in a pilot, and measured on
# *validation* data. Each source has a price. Choose as a careful person does:
#
# - only sources with `costs <= budget` count; source 0 is "no source", costs 0, and always counts;
# - among them find the highest mean accuracy;
# - then take the **cheapest** source whose shortfall, best minus it, paired over the draws, cannot be
#   told from 0: the interval $\bar d \pm t\, s / \sqrt m$ contains 0, where $d$ are the $m$ differences, $s$
#   their standard deviation (divide by $m - 1$) and $t$ is given. (The best itself always qualifies.)
#   Of equally cheap ones take the one with the higher mean.


# %% question="10.q5"
def choose_source(accuracy, costs, budget, t):
    """Index of the source to take.

    Args:
        accuracy: shape (S, m): of each source on each draw, m >= 2.
        costs: shape (S,); costs[0] is 0.
        budget: at least 0.
        t: > 0, factor of the interval.

    Returns:
        One whole number in 0, ..., S - 1.
    """
    ### BEGIN SOLUTION
    affordable = np.flatnonzero(costs <= budget)
    means = accuracy.mean(axis=1)
    best = affordable[means[affordable].argmax()]
    shortfall = accuracy[best] - accuracy[affordable]  # (affordable, m)
    half = t * shortfall.std(axis=1, ddof=1) / np.sqrt(accuracy.shape[1])
    close = affordable[shortfall.mean(axis=1) <= half]  # the best has 0 <= 0
    return int(min(close, key=lambda source: (costs[source], -means[source])))
    ### END SOLUTION


# %% check="10.q5"
right_5 = tl.check("10.q5", choose_source)

# %%
if right_5:
    recorded = tl.arms.recorded("wild_digits")[50]
    arms = ["scratch", "probe, then fine-tune", "probe, then fine-tune (seed 1)"]
    accuracy = np.array([recorded.scores[arm] for arm in arms])
    for budget in (0, 12_000):
        chosen = choose_source(accuracy, np.array([0, 12_000, 12_000]), budget, 2.78)
        print(f"wild digits, 50 labels, up to {budget:6,} pre-training steps: {arms[chosen]}")

# %% [markdown]
# ## Question 6. Judgement (4 points)
#
# This report reaches you:
#
# > "Negative transfer confirmed. We fine-tuned checkpoint A (source accuracy 99.9 %) on our 40
# > labelled images at the learning rate of its paper, 1e-4, for 200 steps, and got 61 % on the test
# > set. Training from scratch at 1e-3, chosen by us as it worked best on the test set, got 66 %. The
# > source must be unrelated to our task. We also checked its H-score: 9.0, so this was unexpected.
# > LEEP ranks it above checkpoint B, which has 4 classes to A's 1,000. We will delete A."
#
# Answer in about 170 words. Is it shown that A transfers negatively, and what is missing? What are
# the three scores in the report (source accuracy, H-score, LEEP) worth here? Suppose the harm is
# confirmed after all: what would you measure to find its cause, and what would you try before
# deleting A?

# %% [markdown] question="10.q6"
# **Your answer**
#
# <!-- BEGIN SOLUTION -->
# It is not shown. The two runs differ in the start *and* in the learning rate: A got one fixed rate,
# scratch a tuned one, and tuned on the test set at that. There is one draw of 40 images and one seed,
# so 5 points have no interval. Fair: the same steps and the same grid of rates for both, chosen on
# validation, five or more paired draws, the interval of the difference, test read once.
#
# Source accuracy compares tasks, not features; 99.9 % may be memory. An H-score of 9 with 40 images
# is K - 1, what any features get when there are more features than images. LEEP grows with the
# number of source classes when labels are few; compare it with shuffled labels, or leave each image
# out.
#
# If the harm is real: read the features layer by layer (neighbours, against a random network of the
# same shape), and re-initialise layers one at a time. If the last ones are to blame, keep the lower
# and renew the upper; otherwise a larger rate, more steps, shrink and perturb. And A may still help
# another target: negative transfer belongs to a pair.
# <!-- END SOLUTION -->

# %% [markdown]
# ## If you want more (not graded)
#
# - Prove that LEEP is at most 0, and find the sources for which it is 0.
# - Show that $\gamma$ in LogME's fixed point is the trace of the matrix $S$ of the left-out probe.
# - Which of the scores change if all features are multiplied by 10? If they are rotated?
