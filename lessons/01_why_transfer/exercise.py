# %% [markdown]
# # Exercise 01: is it the transfer?
#
# Somebody shows you two numbers and says that transfer helped. In this exercise you write the tools
# with which you find out: a paired interval, the worth of a label, the simplest probe there is, and
# a hunt for leaks. Then you decide whether to pay for pre-training.
#
# **Points:** 14. **Time:** about 45 minutes. **Before this:** lesson 01.
#
# Below every answer stands a check. Run it as often as you like; it counts nothing.

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %%
import numpy as np

# %% [markdown]
# ## Question 1 (2 points): a paired interval
#
# Two arms were run on the same $n$ draws. Let $d_i$ be the difference of their accuracies on draw
# $i$, with mean $\bar d$ and standard deviation $s$ (the one that divides by $n - 1$). The 95 %
# interval of the mean difference is
#
# $$\bar d \pm t \, \frac{s}{\sqrt{n}} ,$$
#
# where $t$ is the 0.975 quantile of Student's distribution with $n - 1$ degrees of freedom. It is
# given to you as an argument.


# %% question="01.q1"
def paired_interval(transfer, scratch, t):
    """95 % interval of the mean of (transfer - scratch).

    Args:
        transfer: accuracies of one arm on n >= 2 draws, shape (n,).
        scratch: accuracies of the other arm on the same draws, shape (n,).
        t: the quantile, a number > 0.

    Returns:
        A tuple (mean, low, high).
    """
    ### BEGIN SOLUTION
    difference = transfer - scratch
    mean = difference.mean()
    half = t * difference.std(ddof=1) / np.sqrt(len(difference))
    return mean, mean - half, mean + half
    ### END SOLUTION


# %% check="01.q1"
tl.check("01.q1", paired_interval)

# %% [markdown]
# ## Question 2 (3 points): what is pre-training worth in labels?
#
# An arm was measured at a few numbers of labels. How many labels would it need for a given
# accuracy? Between two measured points, assume that accuracy is a straight line over the
# *logarithm* of the number of labels. If the first point is already good enough, answer with its
# number of labels. If no point reaches the accuracy, answer `None`.


# %% question="01.q2"
def labels_needed(counts, accuracies, wanted):
    """Number of labels at which the learning curve first reaches an accuracy.

    Args:
        counts: increasing numbers of labels, shape (m,), m >= 2.
        accuracies: increasing accuracies at these numbers, shape (m,).
        wanted: the accuracy to reach.

    Returns:
        A number of labels, not rounded, or None.
    """
    ### BEGIN SOLUTION
    if wanted > accuracies[-1]:
        return None
    # np.interp answers with the first point for everything below it.
    return float(np.exp(np.interp(wanted, accuracies, np.log(counts))))
    ### END SOLUTION


# %% check="01.q2"
tl.check("01.q2", labels_needed)

# %% [markdown]
# ## Question 3 (3 points): a probe without training
#
# The simplest probe on frozen features: describe each class by the mean of its few labelled
# features, and give a new image the class whose mean is nearest (Euclidean distance). There is
# nothing to tune and nothing to converge. With two labels per class it is hard to beat.
#
# One precaution: features have different scales, and the largest would rule the distance. So first
# bring every feature to mean 0 and deviation 1, with mean and deviation **of the training features**.


# %% question="01.q3"
def nearest_class_mean(train_features, train_targets, test_features):
    """Classify by the nearest class mean in standardised features.

    Args:
        train_features: shape (n, d); no feature is constant.
        train_targets: integers in [0, K), shape (n,); every class appears.
        test_features: shape (m, d).

    Returns:
        Predicted classes, integer array, shape (m,).
    """
    ### BEGIN SOLUTION
    mean, deviation = train_features.mean(axis=0), train_features.std(axis=0)
    train = (train_features - mean) / deviation
    test = (test_features - mean) / deviation
    classes = range(train_targets.max() + 1)
    means = np.stack([train[train_targets == label].mean(axis=0) for label in classes])  # (K, d)
    distances = ((test[:, None, :] - means[None, :, :]) ** 2).sum(axis=2)  # (m, K)
    return distances.argmin(axis=1)
    ### END SOLUTION


# %% check="01.q3"
tl.check("01.q3", nearest_class_mean)

# %% [markdown]
# ## Question 4 (3 points): a hunt for leaks
#
# A colleague split 10,000 pictures into training and test at random and is delighted with the
# result. The pictures were taken by 60 people, many by each. A network may have learned to
# recognise the *people*.
#
# Write the audit: which groups (people, patients, files, ...) have examples on **both** sides, and
# what share of the test examples belongs to such a group?


# %% question="01.q4"
def audit_split(groups, is_test):
    """Find groups that are in training and in test.

    Args:
        groups: the group of each example, integer array, shape (n,).
        is_test: True for test examples, boolean array, shape (n,); some are True.

    Returns:
        A dict with "leaking": sorted list of group numbers, and "share": fraction of the test
        examples whose group also is in training, in [0, 1].
    """
    ### BEGIN SOLUTION
    leaking = np.intersect1d(groups[is_test], groups[~is_test])  # sorted, each once
    share = np.isin(groups[is_test], leaking).mean()
    return {"leaking": leaking.tolist(), "share": float(share)}
    ### END SOLUTION


# %% check="01.q4"
tl.check("01.q4", audit_split)

# %% [markdown]
# ## Question 5 (3 points, read by a person): would you pay?
#
# A small museum wants to sort scans of its 40,000 index cards into 12 kinds. It can label by hand,
# at about 100 cards an hour. Somebody offers a network pre-trained on printed documents; adapting
# it would take a specialist two days.
#
# What would you measure first, with which arms and controls, before you advise the museum to pay?
# At which outcome would you advise against it? Four to eight sentences.

# %% [markdown] question="01.q5"
# <!-- BEGIN SOLUTION -->
# Label 600 cards (six hours): 25 for each kind to learn from, and 25 for each kind to test,
# cards of one writer or drawer only on one side. On the training part compare, at 5, 10 and 25
# labels per kind and with five paired draws: logistic regression on simple features, a small
# network from scratch with augmentation and a tuned rate, and a linear probe on features of the
# offered network, which needs no specialist. Look at the paired difference between probe and the
# best of the others, with its interval, and at the slopes of the curves. I would advise against
# paying if the interval includes differences too small to matter, or if scratch at 25 labels is
# about to catch up: two days of labelling give 1,600 more cards, and labels last longer than a
# checkpoint. If transfer is ahead by much at 5 labels and still at 25, pay.
# <!-- END SOLUTION -->
