"""Graded questions of lesson 09: patience, smoothed targets, averages, soups, pruning."""

from __future__ import annotations

import numpy as np

from tlcourse.checks import Question


def softmax(logits: np.ndarray) -> np.ndarray:
    exps = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exps / exps.sum(axis=-1, keepdims=True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


# --- 09.q1 patience ------------------------------------------------------------------------


def cases_q1(rng: np.random.Generator) -> list[tuple]:
    """A bump before the lowest point, ties, a run that never stops, patience 1."""
    train = np.round(2.0 * 0.7 ** np.arange(9) + 0.01 * rng.random(9), 3)
    bump = np.array([1.5, 1.0, 1.2, 1.1, 0.8, 0.9, 0.95, 0.7, 1.0]) + round(rng.random(), 2)
    tie = np.array([1.4, 0.9, 1.0, 0.9, 0.9, 1.1, 0.5, 0.9, 0.9]) + round(rng.random(), 2)
    falls = np.sort(np.round(rng.random(9), 3))[::-1].copy() + 0.5
    short = falls.copy()
    short[3] = short[2] + 0.1
    return [(train, bump, 2), (train, bump, 3), (train, tie, 3), (train, falls, 2),
            (train, short, 1)]  # fmt: skip


def early_stopping(train_loss: np.ndarray, val_loss: np.ndarray, patience: int) -> dict:
    best, stop = 0, len(val_loss) - 1
    for reading in range(1, len(val_loss)):
        if val_loss[reading] < val_loss[best]:
            best = reading
        elif reading - best >= patience:
            stop = reading
            break
    return {"stop": stop, "best": best, "gap": float(val_loss[best] - train_loss[best])}


def _global_minimum(train_loss, val_loss, patience):
    """Looks at the whole curve, also at what was never trained."""
    right = early_stopping(train_loss, val_loss, patience)
    best = int(np.argmin(val_loss))
    return right | {"best": best, "gap": float(val_loss[best] - train_loss[best])}


def _rises_in_a_row(train_loss, val_loss, patience):
    """Counts rises from one reading to the next, not readings since the best."""
    best, rises, stop = 0, 0, len(val_loss) - 1
    for reading in range(1, len(val_loss)):
        if val_loss[reading] < val_loss[best]:
            best = reading
        rises = rises + 1 if val_loss[reading] > val_loss[reading - 1] else 0
        if rises >= patience:
            stop = reading
            break
    return {"stop": stop, "best": best, "gap": float(val_loss[best] - train_loss[best])}


def _ties_are_better(train_loss, val_loss, patience):
    best, stop = 0, len(val_loss) - 1
    for reading in range(1, len(val_loss)):
        if val_loss[reading] <= val_loss[best]:
            best = reading
        elif reading - best >= patience:
            stop = reading
            break
    return {"stop": stop, "best": best, "gap": float(val_loss[best] - train_loss[best])}


def _gap_at_the_stop(train_loss, val_loss, patience):
    right = early_stopping(train_loss, val_loss, patience)
    return right | {"gap": float(val_loss[right["stop"]] - train_loss[right["stop"]])}


def _one_too_patient(train_loss, val_loss, patience):
    return early_stopping(train_loss, val_loss, patience + 1)


def _gap_turned(train_loss, val_loss, patience):
    right = early_stopping(train_loss, val_loss, patience)
    return right | {"gap": -right["gap"]}


def hint_q1(case: tuple, expected: dict, got: object) -> str:
    if not isinstance(got, dict) or set(got) != set(expected):
        return "return a dict with the keys 'stop', 'best' and 'gap'."
    train_loss, val_loss, patience = case
    if got["best"] != expected["best"]:
        if val_loss[got["best"]] == val_loss[expected["best"]]:
            return "an equal loss is no improvement: the earlier reading stays the best."
        return "the best reading is the lowest among those up to the stop; later ones never were."
    if got["stop"] != expected["stop"]:
        return f"stop as soon as {patience} readings in a row have brought nothing below the best."
    return "the gap is validation loss minus training loss, both at the kept reading."


# --- 09.q2 label smoothing -----------------------------------------------------------------


def cases_q2(rng: np.random.Generator) -> list[tuple]:
    eps = round(float(rng.uniform(0.05, 0.4)), 3)
    return [(rng.integers(k, size=n), k, e) for n, k, e in ((3, 10, 0.1), (4, 3, eps), (2, 2, 0.5))]


def smoothing(targets: np.ndarray, num_classes: int, eps: float) -> dict:
    q = np.full((len(targets), num_classes), eps / num_classes)
    q[np.arange(len(targets)), targets] += 1 - eps
    row = q[0]
    gap = np.log((1 - eps + eps / num_classes) / (eps / num_classes))
    return {"targets": q, "gap": float(gap), "floor": float(-np.sum(row * np.log(row)))}


def _others_only(targets, num_classes, eps):
    """Shares eps among the other classes: another convention."""
    q = np.full((len(targets), num_classes), eps / (num_classes - 1))
    q[np.arange(len(targets)), targets] = 1 - eps
    row = q[0]
    gap = np.log((1 - eps) * (num_classes - 1) / eps)
    return {"targets": q, "gap": float(gap), "floor": float(-np.sum(row * np.log(row)))}


def _floor_of_zero(targets, num_classes, eps):
    return smoothing(targets, num_classes, eps) | {"floor": 0.0}


def _floor_of_the_true_class(targets, num_classes, eps):
    q = 1 - eps + eps / num_classes
    return smoothing(targets, num_classes, eps) | {"floor": float(-np.log(q))}


def _logit_of_the_true_class(targets, num_classes, eps):
    q = 1 - eps + eps / num_classes
    return smoothing(targets, num_classes, eps) | {"gap": float(np.log(q / (1 - q)))}


def _gap_of_probabilities(targets, num_classes, eps):
    return smoothing(targets, num_classes, eps) | {"gap": 1 - eps}


def hint_q2(case: tuple, expected: dict, got: object) -> str:
    if not isinstance(got, dict) or set(got) != set(expected):
        return "return a dict with the keys 'targets', 'gap' and 'floor'."
    q = np.asarray(got["targets"])
    if q.shape != expected["targets"].shape:
        return f"one row for each image: shape {expected['targets'].shape}."
    if not np.allclose(q, expected["targets"]):
        return "eps is shared among all K classes, the true one too: 1 - eps + eps/K and eps/K."
    if not np.isclose(got["gap"], expected["gap"]):
        return "at the best p = q, and log p_y - log p_k is z_y - z_k."
    return "the loss at p = q is the entropy of q: a sum over all K classes, not only the true one."


# --- 09.q3 averages ------------------------------------------------------------------------


def cases_q3(rng: np.random.Generator) -> list[tuple]:
    """Ordinary logits; large ones; members that disagree, each with a level of its own."""
    cases = []
    for k, n, num_classes, scale in ((3, 4, 5, 1.0), (2, 3, 10, 300.0), (4, 5, 3, 4.0)):
        logits = scale * rng.normal(size=(k, n, num_classes)) + scale * rng.normal(size=(k, n, 1))
        cases.append((logits, rng.integers(num_classes, size=n)))
    return cases


def _nll(log_p: np.ndarray, targets: np.ndarray) -> float:
    return float(-np.mean(log_p[np.arange(len(targets)), targets]))


def averages(logits: np.ndarray, targets: np.ndarray) -> dict:
    log_p = log_softmax(logits)
    top = log_p.max(axis=0)
    log_mean = top + np.log(np.mean(np.exp(log_p - top), axis=0))
    return {
        "members": float(np.mean([_nll(member, targets) for member in log_p])),
        "probabilities": _nll(log_mean, targets),
        "logits": _nll(log_softmax(logits.mean(axis=0)), targets),
    }


def _averages_swapped(logits, targets):
    right = averages(logits, targets)
    return right | {"probabilities": right["logits"], "logits": right["probabilities"]}


def _averages_overflow(logits, targets):
    with np.errstate(all="ignore"):
        p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        mean_logits = logits.mean(axis=0)
        q = np.exp(mean_logits) / np.exp(mean_logits).sum(axis=-1, keepdims=True)
        return {"members": float(np.mean([_nll(np.log(m), targets) for m in p])),
                "probabilities": _nll(np.log(p.mean(axis=0)), targets),
                "logits": _nll(np.log(q), targets)}  # fmt: skip


def _averages_over_images(logits, targets):
    """Averages the loss of each image's mean, by the wrong axis."""
    right = averages(logits, targets)
    log_p = log_softmax(logits)
    return right | {"members": float(np.min([_nll(member, targets) for member in log_p]))}


def _mean_of_log_probabilities(logits, targets):
    """Averages log-probabilities without normalising again."""
    log_p = log_softmax(logits).mean(axis=0)
    return averages(logits, targets) | {"logits": _nll(log_p, targets)}


def _clipped(logits, targets):
    p = softmax(logits).mean(axis=0)
    return averages(logits, targets) | {"probabilities": _nll(np.log(p + 1e-9), targets)}


def hint_q3(case: tuple, expected: dict, got: object) -> str:
    if not isinstance(got, dict) or set(got) != set(expected):
        return "return a dict with the keys 'members', 'probabilities' and 'logits'."
    if not all(np.isfinite(got[key]) for key in expected):
        return "something overflowed: subtract each row's largest logit before exp."
    if not np.isclose(got["members"], expected["members"]):
        return "'members' is the mean over the k members of each one's mean loss."
    if not np.isclose(got["logits"], expected["logits"]):
        return "average the logits over axis 0 first, then one softmax of the average."
    return (
        "softmax for each member first, then the mean of the probabilities, then the log. Where all "
        "probabilities of the true class underflow, work with logarithms: log(mean exp(log p))."
    )


# --- 09.q4 greedy soup ---------------------------------------------------------------------


def cases_q4(rng: np.random.Generator) -> list[tuple]:
    """Heads around a good one, some bad, one given twice (a tie). The first tells all apart."""
    telling = _heads_case(rng, 6, 3, 4, 60)
    mistakes = (_soup_uniform, _soup_strict, _soup_in_given_order, _soup_worst_first,
                _soup_running_mean, _soup_against_the_first)  # fmt: skip
    while any(_same_soup(wrong(*telling), greedy_soup(*telling)) for wrong in mistakes):
        telling = _heads_case(rng, 6, 3, 4, 60)
    return [telling, _heads_case(rng, 4, 4, 5, 80), _heads_case(rng, 5, 2, 3, 40)]


def _heads_case(rng: np.random.Generator, k: int, num_classes: int, d: int, n: int) -> tuple:
    truth, features = rng.normal(size=(num_classes, d)), rng.normal(size=(n, d))
    targets = (features @ truth.T + 0.5 * rng.normal(size=(n, num_classes))).argmax(axis=1)
    spread = np.linspace(0.6, 2.5, k)[rng.permutation(k), None, None]
    heads = truth + spread * rng.normal(size=(k, num_classes, d))
    heads[-1] = heads[0]
    return heads, features, targets


def _same_soup(a: dict, b: dict) -> bool:
    return np.array_equal(a["ingredients"], b["ingredients"]) and np.allclose(a["soup"], b["soup"])


def head_accuracy(head: np.ndarray, features: np.ndarray, targets: np.ndarray) -> float:
    return float(np.mean((features @ head.T).argmax(axis=1) == targets))


def greedy_soup(heads: np.ndarray, features: np.ndarray, targets: np.ndarray) -> dict:
    return _soup(heads, features, targets)


def _soup(heads, features, targets, strict=False, start_order=None, reference=None):
    alone = [head_accuracy(head, features, targets) for head in heads]
    order = np.argsort(-np.array(alone), kind="stable") if start_order is None else start_order
    kept = [int(order[0])]
    best = alone[kept[0]]
    for i in order[1:]:
        reached = head_accuracy(heads[[*kept, int(i)]].mean(axis=0), features, targets)
        if reached > best or (not strict and reached == best):
            kept.append(int(i))
            best = reached if reference is None else best
    return {"ingredients": np.array(kept), "soup": heads[kept].mean(axis=0)}


def _soup_uniform(heads, features, targets):
    return {"ingredients": np.arange(len(heads)), "soup": heads.mean(axis=0)}


def _soup_strict(heads, features, targets):
    return _soup(heads, features, targets, strict=True)


def _soup_in_given_order(heads, features, targets):
    return _soup(heads, features, targets, start_order=np.arange(len(heads)))


def _soup_worst_first(heads, features, targets):
    alone = np.array([head_accuracy(head, features, targets) for head in heads])
    return _soup(heads, features, targets, start_order=np.argsort(alone, kind="stable"))


def _soup_running_mean(heads, features, targets):
    """Averages the soup so far with the new head, half and half."""
    alone = [head_accuracy(head, features, targets) for head in heads]
    order = np.argsort(-np.array(alone), kind="stable")
    kept, soup, best = [int(order[0])], heads[order[0]], alone[order[0]]
    for i in order[1:]:
        trial = (soup + heads[i]) / 2
        reached = head_accuracy(trial, features, targets)
        if reached >= best:
            kept, soup, best = [*kept, int(i)], trial, reached
    return {"ingredients": np.array(kept), "soup": soup}


def _soup_against_the_first(heads, features, targets):
    return _soup(heads, features, targets, reference="first")


def hint_q4(case: tuple, expected: dict, got: object) -> str:
    if not isinstance(got, dict) or set(got) != set(expected):
        return "return a dict with the keys 'ingredients' and 'soup'."
    kept = np.asarray(got["ingredients"]).tolist()
    right = expected["ingredients"].tolist()
    if kept == right:
        return "the soup is the plain mean of all its ingredients, each with the same share."
    if kept and kept[0] != right[0]:
        return "begin with the head that is best alone; of equal ones, the one given first."
    if len(kept) < len(right):
        return "a head goes in if the soup does not get worse: equal is good enough."
    return "compare each trial soup with the soup so far, not with the first head alone."


# --- 09.q5 magnitude pruning ---------------------------------------------------------------


def cases_q5(rng: np.random.Generator) -> list[tuple]:
    """Layers on different scales, ties, nothing and everything pruned, a rounded count."""
    small, large = 0.1 * rng.normal(size=(3, 4)), rng.normal(size=(2, 5))
    ties = [np.array([[1.0, -2.0], [2.0, 0.5]]), np.array([2.0, -2.0, 3.0])]
    other = [rng.normal(size=(2, 2, 2)), rng.normal(size=(3,))]
    return [([small, large], 0.5), (ties, 4 / 7), (other, 0.0), (other, 1.0), ([large, small], 0.3)]


def magnitude_masks(weights: list, sparsity: float) -> list:
    sizes = np.concatenate([np.abs(weight).ravel() for weight in weights])
    mask = np.ones(len(sizes))
    mask[np.argsort(sizes, kind="stable")[: round(sparsity * len(sizes))]] = 0
    ends = np.cumsum([weight.size for weight in weights])[:-1]
    pieces = np.split(mask, ends)
    return [piece.reshape(w.shape) for piece, w in zip(pieces, weights, strict=True)]


def _layer_by_layer(weights, sparsity):
    return [magnitude_masks([weight], sparsity)[0] for weight in weights]


def _without_abs(weights, sparsity):
    shifted = [weight - min(w.min() for w in weights) + 1 for weight in weights]
    return magnitude_masks(shifted, sparsity)


def _keeps_the_small(weights, sparsity):
    return [1 - mask for mask in magnitude_masks(weights, sparsity)]


def _by_threshold(weights, sparsity):
    """Everything up to the k-th smallest size: ties all go."""
    sizes = np.sort(np.concatenate([np.abs(weight).ravel() for weight in weights]))
    count = round(sparsity * len(sizes))
    bar = sizes[count - 1] if count else -1.0
    return [(np.abs(weight) > bar).astype(float) for weight in weights]


def _always_one(weights, sparsity):
    """Index -1 at sparsity zero: keeps nothing."""
    sizes = np.sort(np.concatenate([np.abs(weight).ravel() for weight in weights]))
    bar = sizes[round(sparsity * len(sizes)) - 1]
    return [(np.abs(weight) > bar).astype(float) for weight in weights]


def _weights_not_masks(weights, sparsity):
    masks = magnitude_masks(weights, sparsity)
    return [weight * mask for weight, mask in zip(weights, masks, strict=True)]


def hint_q5(case: tuple, expected: list, got: object) -> str:
    weights, sparsity = case
    if not isinstance(got, list) or len(got) != len(weights):
        return "return a list with one mask for each array of weights."
    for mask, right in zip(got, expected, strict=True):
        if np.shape(mask) != right.shape:
            return "each mask has the shape of its weights."
        if not np.isin(np.asarray(mask), (0, 1)).all():
            return "return masks of 0.0 and 1.0, not the masked weights."
    zeros = sum(int((np.asarray(mask) == 0).sum()) for mask in got)
    wanted = sum(int((mask == 0).sum()) for mask in expected)
    if zeros != wanted:
        if sparsity == 0:
            return "at sparsity 0 nothing is pruned; [-1] is the last entry, not none."
        return f"{wanted} weights go in all, yours are {zeros}. Of equal sizes, not all need to go."
    return "one ranking by |w| over all layers together; of equal ones the earlier goes first."


# --- 09.q6 judgement -----------------------------------------------------------------------

RUBRIC = """\
4 points; 1 for each, half marks allowed.
1. Multiple comparisons: with twelve arms at the 5 % level about 0.6 false alarms are expected from
   nothing (a chance of any of up to 46 %); two "significant" ones of which the better was picked are
   weak evidence. Names a correction (Holm, Bonferroni) and sees that p = 0.03 and p = 0.04 fail it
   (0.05 / 12 = 0.004), or asks for fresh draws on the one chosen arm.
2. Choosing and reporting on the same data: the strengths, and the best arm, were picked by the very
   validation images whose accuracy is reported; the numbers flatter. Choose on validation, report a
   test set that was read once.
3. Unequal budget or start: the ensemble of five has five times the steps (and the cost of five
   models in service); the control is one model with five times the steps, or a soup. Names what
   each costs.
4. The claim "it overfits, since the validation loss rises": in which number? Accuracy did not fall;
   rising loss at level accuracy is over-confidence, which one temperature (or shrunk logits, label
   smoothing, early stopping) addresses without a change of the answers; what matters depends on
   whether the clinic uses the answer or the probability. Credit for asking that.
"""

QUESTIONS = [
    Question(
        id="09.q1",
        title="Stop with patience",
        points=2,
        cases=cases_q1,
        expected=early_stopping,
        hint=hint_q1,
        wrong={
            "lowest of the whole curve": _global_minimum,
            "rises in a row": _rises_in_a_row,
            "a tie is an improvement": _ties_are_better,
            "gap at the stop": _gap_at_the_stop,
            "one too patient": _one_too_patient,
            "training minus validation": _gap_turned,
        },
    ),
    Question(
        id="09.q2",
        title="What label smoothing aims at",
        points=2,
        cases=cases_q2,
        expected=smoothing,
        hint=hint_q2,
        wrong={
            "eps among the others only": _others_only,
            "floor of zero": _floor_of_zero,
            "floor of the true class alone": _floor_of_the_true_class,
            "log odds of the true class": _logit_of_the_true_class,
            "gap of probabilities": _gap_of_probabilities,
        },
    ),
    Question(
        id="09.q3",
        title="Average what?",
        points=3,
        cases=cases_q3,
        expected=averages,
        hint=hint_q3,
        wrong={
            "swapped": _averages_swapped,
            "naive softmax": _averages_overflow,
            "best member": _averages_over_images,
            "mean of log-probabilities, not normalised": _mean_of_log_probabilities,
            "log(p + 1e-9)": _clipped,
        },
    ),
    Question(
        id="09.q4",
        title="A greedy soup",
        points=4,
        cases=cases_q4,
        expected=greedy_soup,
        hint=hint_q4,
        wrong={
            "uniform": _soup_uniform,
            "only if better": _soup_strict,
            "in the order given": _soup_in_given_order,
            "worst first": _soup_worst_first,
            "half and half": _soup_running_mean,
            "against the first head": _soup_against_the_first,
        },
    ),
    Question(
        id="09.q5",
        title="Prune by magnitude",
        points=3,
        cases=cases_q5,
        expected=magnitude_masks,
        hint=hint_q5,
        wrong={
            "layer by layer": _layer_by_layer,
            "without the absolute value": _without_abs,
            "keeps the small ones": _keeps_the_small,
            "all ties go": _by_threshold,
            "index -1 at sparsity 0": _always_one,
            "weights, not masks": _weights_not_masks,
        },
    ),
    Question(
        id="09.q6",
        title="Judgement: twelve remedies",
        points=4,
        manual=True,
        rubric=RUBRIC,
    ),
]
