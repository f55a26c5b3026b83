"""Graded questions of lesson 06: stable rates, Adam, BatchNorm, rates by layer, an audit."""

from __future__ import annotations

from typing import Any

import numpy as np

from tlcourse.checks import Question

Arrays = dict[str, np.ndarray]
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def ratio_of(got: object, expected: object) -> float | None:
    """The f with ``got == f * expected``, where there is one."""
    try:
        got, expected = np.asarray(got, dtype=float), np.asarray(expected, dtype=float)
    except (TypeError, ValueError):
        return None
    if got.shape != expected.shape or not np.all(np.isfinite(got)) or not np.any(expected):
        return None
    factor = float(np.sum(got * expected) / np.sum(expected * expected))
    return factor if np.allclose(got, factor * expected, rtol=1e-6, atol=1e-9) else None


def near(value: float | None, *wanted: float) -> bool:
    return value is not None and any(abs(value - want) < 1e-6 * abs(want) for want in wanted)


# --- 06.q1 the largest stable rate ----------------------------------------------------------


def cases_q1(rng: np.random.Generator) -> list[tuple]:
    """Hessians of several sizes, not diagonal, with and without momentum, one with a flat direction."""
    cases = []
    for size, momentum in ((1, 0.0), (3, 0.0), (5, 0.9), (4, 0.5)):
        root = rng.normal(size=(size, size)) * rng.uniform(0.3, 3.0)
        cases.append((root @ root.T, momentum))
    thin = rng.normal(size=(4, 2))
    return [*cases, (thin @ thin.T, 0.0)]


def largest_stable_rate(hessian: np.ndarray, momentum: float) -> float:
    return float(2 * (1 + momentum) / np.linalg.eigvalsh(hessian)[-1])


def _rate_from(curvature_of):
    """A wrong answer that takes another number for the steepest curvature."""

    def wrong(hessian, momentum):
        return float(2 * (1 + momentum) / curvature_of(hessian))

    return wrong


def _by_descending(hessian, momentum):
    """Tries rates until the loss explodes, on a grid of powers of two."""
    rates = 2.0 ** np.arange(-12, 6)
    return float(max(r for r in rates if r < largest_stable_rate(hessian, momentum)))


def hint_q1(case: tuple, expected: float, got: object) -> str:
    hessian, momentum = case
    if not isinstance(got, float):
        return "return one number."
    values = np.linalg.eigvalsh(hessian)
    if near(got, 2 / values[-1]) and momentum:
        return "that is the limit without momentum. With it, the roots leave the circle at z = -1."
    if near(got, 1 / values[-1], (1 + momentum) / values[-1]):
        return "1/h brings the steepest direction down in one step. The limit is further out."
    if near(got, 2 / (1 - momentum) / values[-1]):
        return "1/(1 - beta) is how much faster flat directions run; the limit is another question."
    if near(got, 2 * (1 + momentum) / values[0]):
        return "the flattest direction sets the pace; which one sets the limit?"
    if near(got, *(2 * (1 + momentum) / np.diag(hessian))):
        return "an entry of the diagonal is the curvature along an axis. Use the eigenvalues."
    return "2 (1 + momentum) over the largest eigenvalue of the Hessian."


# --- 06.q2 Adam under warm-up ---------------------------------------------------------------


def cases_q2(rng: np.random.Generator) -> list[tuple]:
    """Gradients of very different size in each column; without and with warm-up."""
    cases = []
    for steps, lr, warmup in ((1, 0.1, 0), (4, 0.01, 0), (6, 0.01, 3), (3, 0.5, 5)):
        scale = 10.0 ** rng.uniform(-3, 3, size=4)
        cases.append((rng.normal(size=(steps, 4)) * scale, lr, warmup))
    return cases


def adam_path(
    gradients: np.ndarray,
    lr: float,
    warmup_steps: int,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    correct: bool = True,
) -> np.ndarray:
    """``adam`` in slow motion; the options beyond ``warmup_steps`` make the wrong answers."""
    m, v = np.zeros(gradients.shape[1]), np.zeros(gradients.shape[1])
    place, path = np.zeros(gradients.shape[1]), []
    for t, gradient in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        m_hat = m / (1 - beta1**t) if correct else m
        v_hat = v / (1 - beta2**t) if correct else v
        rate = lr * min(1.0, t / warmup_steps) if warmup_steps else lr
        place = place - rate * m_hat / (np.sqrt(v_hat) + eps)
        path.append(place)
    return np.array(path)


def _updates_only(gradients, lr, warmup_steps):
    path = adam_path(gradients, lr, warmup_steps)
    return np.diff(path, axis=0, prepend=np.zeros((1, path.shape[1])))


def _late_warmup(gradients, lr, warmup_steps):
    """Factor (t - 1) / warmup: the first step has the rate 0."""
    updates = _updates_only(gradients, lr, 0)
    steps = np.arange(len(gradients))
    factor = np.minimum(1.0, steps / warmup_steps) if warmup_steps else np.ones(len(steps))
    return np.cumsum(updates * factor[:, None], axis=0)


def _warm_gradients(gradients, lr, warmup_steps):
    """Scales the gradients instead of the rate; Adam does not mind their size."""
    steps = np.arange(1, len(gradients) + 1)
    factor = np.minimum(1.0, steps / warmup_steps) if warmup_steps else np.ones(len(steps))
    return adam_path(gradients * factor[:, None], lr, 0)


def hint_q2(case: tuple, expected: np.ndarray, got: object) -> str:
    gradients, lr, warmup_steps = case
    got = np.asarray(got)
    if got.shape != expected.shape:
        return f"one row for each step, shape {expected.shape}: where the weights are *after* it."
    if near(ratio_of(got, expected), -1):
        return "downhill: the step has the sign opposite to the gradient."
    if len(gradients) == 1:
        return "the first step is lr times the sign of the gradient, if both averages are corrected."
    if np.allclose(np.cumsum(got, axis=0), expected):
        return "those are the steps. The question asks for the places: add them up."
    if np.allclose(got, adam_path(gradients, lr, 0)) and warmup_steps:
        return "that is right without warm-up. In step t = 1, 2, ... the rate is lr * t / warmup_steps."
    if warmup_steps and np.allclose(got[0], 0):
        return "the factor of the first step is 1 / warmup_steps, not 0."
    if warmup_steps and np.allclose(got, _warm_gradients(gradients, lr, warmup_steps)):
        return "Adam does not feel the size of its gradients. Warm-up belongs to the rate."
    return "m and v are averages that began at zero: divide by 1 - beta**t, with t from 1."


# --- 06.q3 running statistics ---------------------------------------------------------------


def cases_q3(rng: np.random.Generator) -> list[tuple]:
    """Lists of batches (B, C, H, W), of different and of very small size."""
    cases = []
    for sizes, channels, side in (((2,), 2, 2), ((4, 4, 4), 3, 2), ((1, 2, 5, 1), 2, 3)):
        centre, spread = rng.normal(size=(channels, 1, 1)) * 3, rng.uniform(0.5, 3)
        batches = [centre + spread * rng.normal(size=(b, channels, side, side)) for b in sizes]
        cases.append((batches, float(rng.choice([0.1, 0.2, 0.01]))))
    return cases


def running_statistics(
    batches: list[np.ndarray],
    momentum: float,
    ddof: int = 1,
    axes: tuple[int, ...] = (0, 2, 3),
    start: tuple[float, float] = (0.0, 1.0),
) -> Arrays:
    channels = batches[0].shape[1]
    mean, var = np.full(channels, start[0]), np.full(channels, start[1])
    for batch in batches:
        mean = (1 - momentum) * mean + momentum * batch.mean(axis=axes)
        var = (1 - momentum) * var + momentum * batch.var(axis=axes, ddof=ddof)
    return {"mean": mean, "var": var}


def _all_at_once(batches, momentum):
    """The statistics of all batches together: no moving average at all."""
    everything = np.concatenate(batches)
    axes = (0, 2, 3)
    return {"mean": everything.mean(axis=axes), "var": everything.var(axis=axes, ddof=1)}


def _mean_of_the_places_first(batches, momentum):
    """One number per image, then statistics over the images: loses the spread within an image."""
    pooled = [batch.mean(axis=(2, 3), keepdims=True) for batch in batches]
    return running_statistics(pooled, momentum, ddof=0)


def hint_q3(case: tuple, expected: Arrays, got: object) -> str:
    batches, momentum = case
    if not isinstance(got, dict) or set(got) != {"mean", "var"}:
        return "return a dict with the keys 'mean' and 'var'."
    channels = batches[0].shape[1]
    for name in ("mean", "var"):
        if np.shape(got[name]) != (channels,):
            return f"'{name}' has one number for each channel, shape ({channels},)."
    if np.allclose(got["mean"], running_statistics(batches, 1 - momentum)["mean"]):
        return "in torch, momentum is the weight of the *new* value: (1 - m) * old + m * new."
    if not np.allclose(got["mean"], expected["mean"]):
        return "the mean starts at 0 and runs over the batch and all places, axes (0, 2, 3)."
    if np.allclose(got["var"], running_statistics(batches, momentum, ddof=0)["var"]):
        return "the stored variance is the unbiased one, with n - 1 (n = B * H * W)."
    return "the variance starts at 1, and is averaged like the mean."


# --- 06.q4 a rate for each layer ------------------------------------------------------------


def cases_q4(rng: np.random.Generator) -> list[tuple]:
    """Layers from the input to the head; with and without a rate of the head's own."""
    cases = []
    for count, decay, own in ((3, 0.5, False), (5, 1 / 2.6, False), (6, 0.8, True), (2, 1.0, True)):
        names = ["embeddings", *(f"block.{i}" for i in range(count - 2)), "head"]
        lr = float(10 ** rng.uniform(-4, -1))
        cases.append((names, lr, decay, 10 * lr if own else None))
    return cases


def layer_rates(
    names: list[str], lr: float, decay: float, head_lr: float | None
) -> dict[str, float]:
    top = len(names) - 1
    rates = {name: lr * decay ** (top - place) for place, name in enumerate(names)}
    return rates if head_lr is None else rates | {names[-1]: head_lr}


def _upside_down(names, lr, decay, head_lr):
    """The input learns fastest."""
    rates = list(layer_rates(names, lr, decay, head_lr).values())
    return dict(zip(names, rates[::-1], strict=True))


def _one_power_too_many(names, lr, decay, head_lr):
    rates = layer_rates(names, lr * decay, decay, head_lr)
    return rates | {names[-1]: head_lr or lr * decay}


def _head_not_counted(names, lr, decay, head_lr):
    """The block below the head learns at lr, too."""
    return layer_rates(names[:-1], lr, decay, None) | {names[-1]: head_lr or lr}


def _decay_from_head_lr(names, lr, decay, head_lr):
    return layer_rates(names, head_lr or lr, decay, None)


def hint_q4(case: tuple, expected: dict, got: object) -> str:
    names, lr, decay, head_lr = case
    if not isinstance(got, dict) or set(got) != set(names):
        return "return a dict with one rate for each name."
    if head_lr is not None and not near(got[names[-1]], head_lr):
        return "if head_lr is given, it is the rate of the head, the last name."
    if head_lr is None and not near(got[names[-1]], lr):
        return "without head_lr, the top layer (the last name) learns at lr itself."
    if near(got[names[0]], (head_lr or 0) * decay ** (len(names) - 1)):
        return "head_lr changes the head alone; the layers below are counted down from lr."
    if len(names) > 2 and near(got[names[-2]], lr) and decay < 1:
        return "the layer below the head is one step down already: lr * decay."
    return "count the layers between this one and the head, and multiply by decay that many times."


# --- 06.q5 the audit ------------------------------------------------------------------------


def cases_q5(rng: np.random.Generator) -> list[tuple]:
    """State dicts before and after; some tensors moved a lot, some by the last bit."""
    return [
        _audit_case(rng, moved={"head.weight"}, trainable=["head"]),
        _audit_case(rng, moved={"head.weight", "norm.running_mean"}, trainable=["head"]),
        _audit_case(
            rng,
            moved={"head.bias", "conv.weight", "norm.num_batches_tracked", "norm.weight"},
            trainable=["head", "norm"],
        ),
        _audit_case(rng, moved={"header.weight", "norm.num_batches_tracked"}, trainable=["head"]),
        _audit_case(rng, moved={"conv.weight", "head.weight"}, trainable=[], tiny=True),
    ]


def _audit_case(
    rng: np.random.Generator, moved: set[str], trainable: list[str], tiny: bool = False
) -> tuple:
    before = {
        "conv.weight": rng.normal(size=(2, 3)),
        "norm.weight": rng.normal(size=3),
        "norm.running_mean": rng.normal(size=3),
        "norm.running_var": rng.uniform(0.5, 2, size=3),
        "norm.num_batches_tracked": np.array(int(rng.integers(10, 99))),
        "header.weight": rng.normal(size=2),
        "head.weight": rng.normal(size=(2, 2)),
        "head.bias": rng.normal(size=2),
    }
    after = {}
    for name, value in before.items():
        step = 1 if value.dtype.kind == "i" else (1e-10 if tiny else 0.1)
        changed = value.copy()
        if name in moved:
            changed.flat[0] += step  # one entry is enough
        after[name] = changed
    return before, after, trainable


def audit(before: Arrays, after: Arrays, trainable: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"weights": [], "statistics": []}
    for name in sorted(before):
        allowed = any(name.startswith(part + ".") for part in trainable)
        if not allowed and not np.array_equal(before[name], after[name]):
            kind = "statistics" if name.endswith(STATISTICS) else "weights"
            found[kind].append(name)
    return found


def _audit_with(allowed=None, equal=np.array_equal, look_at=lambda name: True):
    """A wrong audit: other rules for what may move, what is equal, or what is looked at."""
    allowed = allowed or (lambda name, part: name.startswith(part + "."))

    def wrong(before, after, trainable):
        found: dict[str, list[str]] = {"weights": [], "statistics": []}
        for name in sorted(before):
            if any(allowed(name, part) for part in trainable) or not look_at(name):
                continue
            if not equal(before[name], after[name]):
                kind = "statistics" if name.endswith(STATISTICS) else "weights"
                found[kind].append(name)
        return found

    return wrong


def _one_list(before, after, trainable):
    found = audit(before, after, trainable)
    return sorted(found["weights"] + found["statistics"])


def hint_q5(case: tuple, expected: dict, got: Any) -> str:
    before, _, trainable = case
    if not isinstance(got, dict) or set(got) != {"weights", "statistics"}:
        return "return a dict with two lists of names, 'weights' and 'statistics'."
    if not all(isinstance(value, list) for value in got.values()):
        return "each value is a list of names."
    named = {name for value in got.values() for name in value if isinstance(name, str)}
    wanted = {name for value in expected.values() for name in value}
    if named == wanted and any(sorted(got[kind]) == expected[kind] for kind in expected):
        return "the names are right; sort each list."
    if named == wanted:
        return "running_mean, running_var and num_batches_tracked are statistics; the rest are weights."
    missed = sorted(wanted - named)
    if missed and missed[0].endswith(STATISTICS):
        return f"{missed[0]} moved. A buffer has no gradient, and is what this audit is for."
    if missed and any(missed[0].startswith(part) for part in trainable):
        return f"{missed[0]} is not inside {trainable}: a part's name is followed by a dot."
    if missed:
        return f"{missed[0]} moved, if only by a little. Frozen means equal to the last bit."
    extra = sorted(named - wanted)
    return f"{extra[0] if extra else 'a name'} did not move, or was allowed to move."


# --- 06.q6 judgement ------------------------------------------------------------------------

RUBRIC = """\
4 points; 1 for each, half marks allowed.
1. Learning rate: 0.03 was taken from another set-up and never tuned; the loss at log 10 from the
   first epoch on is the signature of a rate that is too high (features destroyed), and more epochs
   will not bring them back. Try several rates a factor of about three apart, choose on validation.
2. Warm-up: it rescues part of a run at a rate that is too high but is no substitute for the right
   rate; a gain of 40 points by warm-up says that the rate is too high, not that warm-up is good.
3. BatchNorm: batches of two in training mode make every image's features depend on its neighbour
   and the running averages noisy; "frozen" by requires_grad leaves the statistics moving, which is
   why the old task got worse. Freeze the statistics (evaluation mode that survives model.train()),
   or use larger batches or GroupNorm; check by comparing state dicts bit by bit.
4. Evidence: one run, and the test set chose. Asks for several paired draws or seeds with an
   interval, the choice on validation, and controls (linear probe, one rate without tricks) before
   layer-wise rates and gradual unfreezing are called necessary.
"""

QUESTIONS = [
    Question(
        id="06.q1",
        title="The largest stable rate",
        points=2,
        cases=cases_q1,
        expected=largest_stable_rate,
        hint=hint_q1,
        wrong={
            "flattest direction": lambda hessian, momentum: float(
                2 * (1 + momentum) / max(np.linalg.eigvalsh(hessian)[0], 1e-12)
            ),
            "one over h": lambda hessian, momentum: largest_stable_rate(hessian, momentum) / 2,
            "momentum forgotten": lambda hessian, momentum: largest_stable_rate(hessian, 0.0),
            "one over one minus beta": lambda hessian, momentum: (
                largest_stable_rate(hessian, 0.0) / (1 - momentum)
            ),
            "trace": _rate_from(np.trace),
            "largest entry of the diagonal": _rate_from(lambda hessian: np.diag(hessian).max()),
            "first eigenvalue of eigvalsh": _rate_from(
                lambda hessian: np.linalg.eigvalsh(hessian)[0] + 1e-9
            ),
            "a grid of rates": _by_descending,
        },
    ),
    Question(
        id="06.q2",
        title="Adam's first steps",
        points=4,
        cases=cases_q2,
        expected=adam_path,
        hint=hint_q2,
        wrong={
            "no bias correction": lambda g, lr, w: adam_path(g, lr, w, correct=False),
            "betas swapped": lambda g, lr, w: adam_path(g, lr, w, beta1=0.999, beta2=0.9),
            "uphill": lambda g, lr, w: -adam_path(g, lr, w),
            "steps, not places": _updates_only,
            "warm-up forgotten": lambda g, lr, w: adam_path(g, lr, 0),
            "first step has rate zero": _late_warmup,
            "warm-up on the gradients": _warm_gradients,
            "sign only": lambda g, lr, w: np.cumsum(-lr * np.sign(g), axis=0),
            "plain gradient descent": lambda g, lr, w: np.cumsum(-lr * g, axis=0),
        },
    ),
    Question(
        id="06.q3",
        title="What BatchNorm remembers",
        points=4,
        cases=cases_q3,
        expected=running_statistics,
        hint=hint_q3,
        wrong={
            "biased variance": lambda b, m: running_statistics(b, m, ddof=0),
            "momentum is the weight of the old": lambda b, m: running_statistics(b, 1 - m),
            "over the batch only": lambda b, m: running_statistics(b, m, axes=(0,)),
            "places averaged first": _mean_of_the_places_first,
            "variance starts at 0": lambda b, m: running_statistics(b, m, start=(0.0, 0.0)),
            "starts with the first batch": lambda b, m: running_statistics([b[0]] * 300 + b, m),
            "all at once": _all_at_once,
            "standard deviation": lambda b, m: {
                name: value**0.5 if name == "var" else value
                for name, value in running_statistics(b, m).items()
            },
        },
    ),
    Question(
        id="06.q4",
        title="A rate for each layer",
        points=2,
        cases=cases_q4,
        expected=layer_rates,
        hint=hint_q4,
        rtol=1e-9,
        atol=0.0,
        wrong={
            "upside down": _upside_down,
            "one power too many": _one_power_too_many,
            "head not counted": _head_not_counted,
            "counted down from head_lr": _decay_from_head_lr,
            "head_lr ignored": lambda n, lr, d, h: layer_rates(n, lr, d, None),
            "divided": lambda n, lr, d, h: layer_rates(n, lr, 1 / d, h),
        },
    ),
    Question(
        id="06.q5",
        title="What moved?",
        points=4,
        cases=cases_q5,
        expected=audit,
        hint=hint_q5,
        wrong={
            "statistics are not looked at": _audit_with(
                look_at=lambda name: not name.endswith(STATISTICS)
            ),
            "counter is not looked at": _audit_with(look_at=lambda name: "num_" not in name),
            "allclose": _audit_with(equal=np.allclose),
            "any entry equal": _audit_with(equal=lambda a, b: bool(np.any(a == b))),
            "prefix without a dot": _audit_with(allowed=lambda name, part: name.startswith(part)),
            "name contains the part": _audit_with(allowed=lambda name, part: part in name),
            "what may move, too": _audit_with(allowed=lambda name, part: False),
            "one list": _one_list,
        },
    ),
    Question(
        id="06.q6",
        title="Judgement: a report",
        points=4,
        manual=True,
        rubric=RUBRIC,
    ),
]
