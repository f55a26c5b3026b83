"""Graded questions of lesson 01: paired intervals, the worth of a label, a probe, a leak."""

from __future__ import annotations

import numpy as np

from tlcourse.checks import Question

# --- 01.q1 a paired interval ----------------------------------------------------------------


def cases_interval(rng: np.random.Generator) -> list[tuple]:
    """Draws whose luck is shared by both arms, so that pairing matters."""
    cases = []
    for num, t in ((5, 2.776), (2, 12.706), (9, 2.306)):
        luck = rng.normal(0, 0.08, num)
        scratch = 0.4 + luck + rng.normal(0, 0.01, num)
        cases.append((scratch + 0.1 + rng.normal(0, 0.02, num), scratch, t))
    return cases


def paired_interval(transfer, scratch, t):
    return _interval(transfer - scratch, t, ddof=1)


def _interval(values, t, ddof):
    half = t * values.std(ddof=ddof) / np.sqrt(len(values))
    return values.mean(), values.mean() - half, values.mean() + half


def _unpaired(transfer, scratch, t):
    mean = transfer.mean() - scratch.mean()
    half = t * np.sqrt((transfer.var(ddof=1) + scratch.var(ddof=1)) / len(transfer))
    return mean, mean - half, mean + half


def _forgot_root(transfer, scratch, t):
    difference = transfer - scratch
    half = t * difference.std(ddof=1)
    return difference.mean(), difference.mean() - half, difference.mean() + half


# --- 01.q2 labels needed --------------------------------------------------------------------


def cases_labels(rng: np.random.Generator) -> list[tuple]:
    """Inside, at a point, below the first point, above the last."""
    counts = np.array([2, 5, 10, 20, 50])
    accuracies = np.sort(rng.uniform(0.2, 0.9, 5)) + np.arange(5) * 0.005
    inside = 0.3 * accuracies[1] + 0.7 * accuracies[2]
    last = 0.5 * (accuracies[3] + accuracies[4])
    wanted = (inside, accuracies[3], accuracies[0] - 0.05, accuracies[4] + 0.01, last)
    return [(counts, accuracies, float(value)) for value in wanted]


def labels_needed(counts, accuracies, wanted):
    if wanted > accuracies[-1]:
        return None
    return float(np.exp(np.interp(wanted, accuracies, np.log(counts))))


def _first_point(counts, accuracies, wanted):
    reached = np.flatnonzero(accuracies >= wanted)
    return float(counts[reached[0]]) if len(reached) else None


def _linear(counts, accuracies, wanted):
    return None if wanted > accuracies[-1] else float(np.interp(wanted, accuracies, counts))


def _clamped(counts, accuracies, wanted):
    return float(np.exp(np.interp(wanted, accuracies, np.log(counts))))


def _extrapolates(counts, accuracies, wanted):
    if wanted >= accuracies[0]:
        return labels_needed(counts, accuracies, wanted)
    slope = np.log(counts[1] / counts[0]) / (accuracies[1] - accuracies[0])
    return float(counts[0] * np.exp(slope * (wanted - accuracies[0])))


# --- 01.q3 nearest class mean ---------------------------------------------------------------


def cases_means(rng: np.random.Generator) -> list[tuple]:
    """Classes that differ in a feature of small scale, beside a loud feature that says nothing."""
    cases = []
    for num_classes, per_class, dim in ((2, 3, 2), (3, 5, 4), (4, 2, 6)):
        centres = rng.normal(0, 2, (num_classes, dim))
        targets = np.repeat(np.arange(num_classes), per_class)
        scale = np.append(np.full(dim - 1, 0.01), 30.0)
        shift = rng.normal(0, 50, dim)
        train = (centres[targets] + rng.normal(0, 1, (len(targets), dim))) * scale + shift
        truth = rng.integers(0, num_classes, 30)
        test = (centres[truth] * 0.7 + rng.normal(0, 1, (30, dim)) + 0.8) * scale + shift
        order = rng.permutation(len(targets))
        cases.append((train[order], targets[order], test))
    return cases


def nearest_class_mean(train, targets, test):
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    return _nearest((train - mean) / deviation, targets, (test - mean) / deviation)


def _nearest(train, targets, test):
    means = np.stack([train[targets == label].mean(axis=0) for label in range(targets.max() + 1)])
    return ((test[:, None] - means[None]) ** 2).sum(axis=2).argmin(axis=1)


def _test_statistics(train, targets, test):
    standard = (test - test.mean(axis=0)) / test.std(axis=0)
    return _nearest((train - train.mean(axis=0)) / train.std(axis=0), targets, standard)


def _nearest_example(train, targets, test):
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    distances = (((test - mean) / deviation)[:, None] - ((train - mean) / deviation)[None]) ** 2
    return targets[distances.sum(axis=2).argmin(axis=1)]


def _farthest(train, targets, test):
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    train, test = (train - mean) / deviation, (test - mean) / deviation
    means = np.stack([train[targets == label].mean(axis=0) for label in range(targets.max() + 1)])
    return ((test[:, None] - means[None]) ** 2).sum(axis=2).argmax(axis=1)


# --- 01.q4 audit of a split -----------------------------------------------------------------


def cases_audit(rng: np.random.Generator) -> list[tuple]:
    """A clean split, a leaking one, one where every group leaks, and one with a single group."""
    groups = rng.permutation(np.repeat(np.arange(6) * 7 + 3, [4, 9, 2, 7, 5, 3]))
    clean = np.isin(groups, [3, 17, 24])
    leaky = clean.copy()
    leaky[np.flatnonzero(groups == 10)[:2]] = True
    everywhere = np.zeros(len(groups), dtype=bool)
    for group in np.unique(groups):
        everywhere[np.flatnonzero(groups == group)[0]] = True
    single = np.array([5, 5, 5, 5])
    one = (single, np.array([True, False, False, True]))
    return [(groups, clean), (groups, leaky), (groups, everywhere), one]


def audit_split(groups, is_test):
    leaking = np.intersect1d(groups[is_test], groups[~is_test])
    share = np.isin(groups[is_test], leaking).mean()
    return {"leaking": leaking.tolist(), "share": float(share)}


def _share_of_all(groups, is_test):
    leaking = np.intersect1d(groups[is_test], groups[~is_test])
    return {"leaking": leaking.tolist(), "share": float(np.isin(groups, leaking).mean())}


def _share_of_groups(groups, is_test):
    leaking = np.intersect1d(groups[is_test], groups[~is_test])
    return {
        "leaking": leaking.tolist(),
        "share": len(leaking) / len(np.unique(groups[is_test])),
    }


def _repeats(groups, is_test):
    shared = np.isin(groups[is_test], groups[~is_test])
    return {"leaking": sorted(groups[is_test][shared].tolist()), "share": float(shared.mean())}


def _all_test_groups(groups, is_test):
    return {"leaking": np.unique(groups[is_test]).tolist(), "share": 1.0}


QUESTIONS = [
    Question(
        id="01.q1",
        title="A paired interval",
        points=2,
        cases=cases_interval,
        expected=paired_interval,
        hint="Subtract first, draw by draw; everything else is about the differences. "
        "The standard deviation takes `ddof=1`.",
        wrong={
            "unpaired": _unpaired,
            "divides by n": lambda a, b, t: _interval(a - b, t, ddof=0),
            "forgets the root of n": _forgot_root,
            "the other way round": lambda a, b, t: _interval(b - a, t, ddof=1),
        },
    ),
    Question(
        id="01.q2",
        title="What pre-training is worth in labels",
        points=3,
        cases=cases_labels,
        expected=labels_needed,
        hint="`np.interp(wanted, accuracies, np.log(counts))` gives the logarithm of the answer. "
        "What does it do beyond the last point?",
        wrong={
            "next measured point": _first_point,
            "linear in the labels": _linear,
            "never None": _clamped,
            "extrapolates below the first point": _extrapolates,
        },
    ),
    Question(
        id="01.q3",
        title="A probe without training",
        points=3,
        cases=cases_means,
        expected=nearest_class_mean,
        hint="Mean and deviation come from the training features, `axis=0`, and are applied to "
        "both; then one mean for each class, then the nearest.",
        wrong={
            "no standardisation": _nearest,
            "test standardised by itself": _test_statistics,
            "nearest example, not mean": _nearest_example,
            "argmax of the distance": _farthest,
        },
    ),
    Question(
        id="01.q4",
        title="A hunt for leaks",
        points=3,
        cases=cases_audit,
        expected=audit_split,
        hint="A group leaks if it has examples with `is_test` and others without. The share counts "
        "test examples, not groups.",
        wrong={
            "share of all examples": _share_of_all,
            "share of groups": _share_of_groups,
            "lists a group more than once": _repeats,
            "every test group leaks": _all_test_groups,
        },
    ),
    Question(
        id="01.q5",
        title="Would you pay?",
        points=3,
        manual=True,
        rubric="1 point: arms and controls (a simple baseline, a tuned scratch arm, a probe) at "
        "several numbers of labels. 1 point: a test set without leaks, several paired draws, an "
        "interval. 1 point: a stated outcome at which the advice is no, with labelling as the "
        "alternative use of the time.",
    ),
]
