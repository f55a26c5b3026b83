"""Graded questions of lesson 08: a two-layer linear network, its span, its end; L2-SP; a line."""

from __future__ import annotations

import numpy as np

from tlcourse.checks import Question

Arrays = dict[str, np.ndarray]


def same(got: object, expected: np.ndarray) -> bool:
    """True if an answer's array has the right shape and values."""
    got = np.asarray(got)
    return got.shape == np.shape(expected) and bool(np.allclose(got, expected, rtol=1e-6))


# --- 08.q1 gradients ------------------------------------------------------------------------


def cases_q1(rng: np.random.Generator) -> list[tuple]:
    """Several features, one feature, and a head of zeros."""
    cases = []
    for n, d, k in ((5, 4, 3), (6, 3, 1), (4, 6, 2)):
        v = np.zeros(k) if len(cases) == 2 else rng.normal(size=k)
        B, X = rng.normal(size=(k, d)), rng.normal(size=(n, d))
        cases.append((v, B, X, rng.normal(size=n)))
    return cases


def gradients(v: np.ndarray, B: np.ndarray, X: np.ndarray, y: np.ndarray) -> Arrays:
    g = X.T @ (X @ (B.T @ v) - y) / len(X)
    return {"v": B @ g, "B": np.outer(v, g)}


def _q1_variant(change):
    def wrong(v, B, X, y):
        return {name: change(value, X) for name, value in gradients(v, B, X, y).items()}

    return wrong


def _swapped_outer(v, B, X, y):
    right = gradients(v, B, X, y)
    return {"v": right["v"], "B": right["B"].T}


def _head_without_backbone(v, B, X, y):
    """The features' gradient of a head on the pixels, cut to size."""
    g = X.T @ (X @ (B.T @ v) - y) / len(X)
    return {"v": np.resize(g, len(v)), "B": np.outer(v, g)}


def _frozen(v, B, X, y):
    return gradients(v, B, X, y) | {"B": np.zeros_like(B)}


def hint_q1(case: tuple, expected: Arrays, got: object) -> str:
    v, B, X, _ = case
    if not isinstance(got, dict) or set(got) != {"v", "B"}:
        return "return a dict with the keys 'v' and 'B'."
    for name, shape in (("v", v.shape), ("B", B.shape)):
        if np.shape(got[name]) != shape:
            return f"the gradient of {name} must have the shape of {name}, {shape}."
    pairs = [(np.asarray(got[name]), expected[name]) for name in ("v", "B")]
    for factor, text in (
        (len(X), "the loss is a mean: divide by n."),
        (2, "the loss has a half in front, so no 2 is left."),
        (-1, "wrong sign: the residual is prediction minus target."),
    ):
        if all(np.allclose(g, factor * e) for g, e in pairs):
            return text
    return "first g = X^T r / n, shape (d,). Then dv = B g, and dB = v g^T."


# --- 08.q2 what training cannot reach -------------------------------------------------------


def cases_q2(rng: np.random.Generator) -> list[tuple]:
    """Independent inputs; more inputs than dimensions of their span; repeated and tiny ones."""
    few = rng.normal(size=(3, 7))
    many = rng.normal(size=(9, 2)) @ rng.normal(size=(2, 6))
    base = rng.normal(size=(2, 5))
    repeated = np.concatenate([base, base[:1], 1e-3 * base[1:]])
    cases = []
    for X in (few, many, repeated):
        d = X.shape[1]
        inside = rng.normal(size=(1, len(X))) @ X  # an input inside the span
        cases.append((X, np.concatenate([rng.normal(size=(3, d)), inside])))
    return cases


def unreached(X: np.ndarray, new: np.ndarray) -> np.ndarray:
    _, sizes, rows = np.linalg.svd(X, full_matrices=False)
    basis = rows[sizes > 1e-8 * sizes.max()]
    return new - new @ basis.T @ basis


def _inside(X, new):
    return new - unreached(X, new)


def _qr_of_everything(X, new):
    """An orthonormal basis of as many directions as there are inputs."""
    basis = np.linalg.qr(X.T)[0]
    return new - new @ basis @ basis.T


def _svd_without_rank(X, new):
    basis = np.linalg.svd(X, full_matrices=False)[2]
    return new - new @ basis.T @ basis


def _not_orthonormal(X, new):
    return new - new @ X.T @ X


def _one_input_at_a_time(X, new):
    """Subtracts the shadow on each input, although the inputs are not at right angles."""
    shadows = [np.outer(new @ x, x) / (x @ x) for x in X]
    return new - np.sum(shadows, axis=0)


def hint_q2(case: tuple, expected: np.ndarray, got: object) -> str:
    X, new = case
    if np.shape(got) != new.shape:
        return f"return one row for each row of new: shape {new.shape}."
    if same(got, new - expected):
        return "that is the part inside the span; asked for is what is left of each input."
    rank = np.linalg.matrix_rank(X)
    if rank < min(X.shape):
        return (
            f"the {len(X)} inputs span only {rank} dimensions, so a basis has {rank} vectors. Use "
            "the rows of V^T from np.linalg.svd(X) whose singular value is not 0 (by rounding)."
        )
    return "with orthonormal rows Q that span S, the part inside is (new Q^T) Q."


# --- 08.q3 where fine-tuning ends -----------------------------------------------------------


def cases_q3(rng: np.random.Generator) -> list[tuple]:
    """A head of zero, the right head, a head beyond it, and one on the wrong branch."""
    cases = []
    for kind in ("zero", "right", "beyond", "wrong side", "weak negative"):
        c, v_true = float(rng.uniform(0.3, 0.9)), float(rng.uniform(1.2, 2.5))
        v0 = {
            "zero": 0.0,
            "right": v_true,
            "beyond": v_true + float(rng.uniform(0.5, 1.5)),
            "wrong side": -c - float(rng.uniform(0.3, 1.0)),
            "weak negative": -0.5 * c,
        }[kind]
        cases.append((v0, c, v_true))
    return cases


def end_of_training(v0: float, c: float, v_true: float) -> Arrays:
    a = v0**2 - c**2
    v = np.sqrt((a + np.sqrt(a**2 + 4 * (v_true * c) ** 2)) / 2)
    v = -v if v0 < -c else v
    return {"s": v_true * c / v, "v": v}


def _always_upper_branch(v0, c, v_true):
    return {name: abs(value) for name, value in end_of_training(v0, c, v_true).items()}


def _sign_of_the_start(v0, c, v_true):
    right = _always_upper_branch(v0, c, v_true)
    return {name: -value if v0 < 0 else value for name, value in right.items()}


def _end_of_the_probe(v0, c, v_true):
    return {"s": c, "v": v_true}


def _backbone_alone(v0, c, v_true):
    """As if only the feature moved."""
    return {"s": v_true * c / v0 if v0 else c, "v": v0}


def _sum_is_constant(v0, c, v_true):
    """Takes v^2 + s^2 for the conserved quantity."""
    a = v0**2 + c**2
    v = np.sqrt((a + np.sqrt(abs(a**2 - 4 * (v_true * c) ** 2))) / 2)
    return {"s": v_true * c / v, "v": v}


def _truth_without_c(v0, c, v_true):
    """Solves s v = v_true."""
    return end_of_training(v0, c, v_true / c)


def hint_q3(case: tuple, expected: Arrays, got: object) -> str:
    v0, c, v_true = case
    if not isinstance(got, dict) or set(got) != {"s", "v"}:
        return "return a dict with the keys 's' and 'v'."
    s, v = float(got["s"]), float(got["v"])
    if not np.isclose(s * v, v_true * c, rtol=1e-4):
        return "at the end the training error is zero: s v = v_true c."
    if not np.isclose(v**2 - s**2, v0**2 - c**2, rtol=1e-4, atol=1e-6):
        return "s v is right, but v^2 - s^2 must still have the value that it had at the start."
    return (
        "both equations hold, but you are on the other branch of the hyperbola. A path cannot "
        "leave its branch: v keeps its sign if |v0| > c, and s keeps its sign if |v0| < c."
    )


# --- 08.q4 a step with a spring -------------------------------------------------------------


def cases_q4(rng: np.random.Generator) -> list[tuple]:
    """A backbone with a layer named "headline", a frozen layer, and several strengths."""
    shapes = {
        "conv.weight": (2, 3), "headline.weight": (3,), "frozen.weight": (2,),
        "head.weight": (2, 2), "head.bias": (2,),
    }  # fmt: skip
    cases = []
    for lr, alpha, beta in ((0.1, 0.5, 0.0), (0.05, 2.0, 0.3), (0.2, 0.0, 1.0)):
        theta, start, gradient = (
            {name: rng.normal(size=shape) for name, shape in shapes.items()} for _ in range(3)
        )
        del gradient["frozen.weight"]
        cases.append((theta, start, gradient, lr, alpha, beta))
    return cases


def spring_step(
    theta: Arrays, start: Arrays, gradient: Arrays, lr: float, alpha: float, beta: float
) -> Arrays:
    new = dict(theta)
    for name, slope in gradient.items():
        pull = beta * theta[name] if name.startswith("head.") else alpha * (
            theta[name] - start[name]
        )  # fmt: skip
        new[name] = theta[name] - lr * (slope + pull)
    return new


def _to_zero(theta, start, gradient, lr, alpha, beta):
    return spring_step(theta, {k: 0 * v for k, v in start.items()}, gradient, lr, alpha, beta)


def _away(theta, start, gradient, lr, alpha, beta):
    return spring_step(theta, start, gradient, lr, -alpha, beta)


def _no_half(theta, start, gradient, lr, alpha, beta):
    return spring_step(theta, start, gradient, lr, 2 * alpha, 2 * beta)


def _head_on_a_spring(theta, start, gradient, lr, alpha, beta):
    return {
        name: theta[name] - lr * (gradient[name] + alpha * (theta[name] - start[name]))
        if name in gradient
        else theta[name]
        for name in theta
    }


def _startswith_head(theta, start, gradient, lr, alpha, beta):
    """Takes "headline" for the head."""
    right = spring_step(theta, start, gradient, lr, alpha, beta)
    name = "headline.weight"
    right[name] = theta[name] - lr * (gradient[name] + beta * theta[name])
    return right


def _frozen_is_pulled(theta, start, gradient, lr, alpha, beta):
    full = {name: gradient.get(name, np.zeros_like(theta[name])) for name in theta}
    return spring_step(theta, start, full, lr, alpha, beta)


def _frozen_is_dropped(theta, start, gradient, lr, alpha, beta):
    right = spring_step(theta, start, gradient, lr, alpha, beta)
    return {name: right[name] for name in gradient}


def hint_q4(case: tuple, expected: Arrays, got: object) -> str:
    theta, _, gradient, *_ = case
    if not isinstance(got, dict) or set(got) != set(theta):
        return "return all parameters of theta, those without a gradient unchanged."
    wrong = [name for name in theta if not same(got[name], expected[name])]
    if "frozen.weight" in wrong:
        return "frozen.weight has no gradient: it is frozen, and must not move at all."
    if wrong == ["headline.weight"]:
        return 'the head\'s names start with "head." (with the dot); headline is a layer.'
    if all(name.startswith("head.") for name in wrong):
        return "the head has no pre-trained value: pull it to zero, with beta."
    return "the gradient of alpha / 2 |theta - start|^2 is alpha (theta - start)."


# --- 08.q5 a point on the line --------------------------------------------------------------


def cases_q5(rng: np.random.Generator) -> list[tuple]:
    """Two ordinary pairs with counters, a pair with other keys, a pair with other shapes."""

    def state(counter: int) -> dict:
        return {
            "conv.weight": rng.normal(size=(2, 3)),
            "norm.running_var": rng.uniform(0.5, 2, size=3),
            "norm.num_batches_tracked": np.array(counter),
        }

    def number() -> int:
        return int(rng.integers(1, 1000))

    pairs = [(state(number()), state(number() + 1000)) for _ in range(5)]
    pairs[3][1]["head.weight"] = rng.normal(size=(2,))  # only the second has it
    pairs[4][1]["norm.running_var"] = rng.uniform(0.5, 2, size=1)  # numpy would broadcast it
    return [(*pair, alpha) for pair, alpha in zip(pairs, (0.25, 0.7, 1.0, 0.5, 0.5), strict=True)]


def interpolate(theta_a: Arrays, theta_b: Arrays, alpha: float) -> Arrays:
    if theta_a.keys() != theta_b.keys():
        raise ValueError(f"keys differ: {sorted(theta_a.keys() ^ theta_b.keys())}")
    mixed = {}
    for name, a in theta_a.items():
        b = theta_b[name]
        if np.shape(a) != np.shape(b):
            raise ValueError(f"{name}: shapes {np.shape(a)} and {np.shape(b)}")
        if np.issubdtype(np.asarray(a).dtype, np.integer):
            mixed[name] = a if alpha < 0.5 else b
        else:
            mixed[name] = (1 - alpha) * a + alpha * b
    return mixed


def call_q5(answer, theta_a: Arrays, theta_b: Arrays, alpha: float) -> dict | str:
    """The answer's state dict with its types, or the name of the error that it raised."""
    try:
        mixed = answer(theta_a, theta_b, alpha)
    except ValueError as error:
        named = sorted(name for name in theta_a.keys() | theta_b.keys() if name in str(error))
        return f"ValueError that names {', '.join(named) or 'no key'}"
    if not isinstance(mixed, dict):
        return mixed
    kinds = {name: str(np.asarray(value).dtype.kind) for name, value in mixed.items()}
    return {"state": mixed, "kinds": kinds}


def expect_q5(theta_a: Arrays, theta_b: Arrays, alpha: float) -> dict | str:
    return call_q5(interpolate, theta_a, theta_b, alpha)


def _mix_everything(theta_a, theta_b, alpha):
    """Averages the counter too."""
    interpolate(theta_a, theta_b, alpha)
    return {name: (1 - alpha) * theta_a[name] + alpha * theta_b[name] for name in theta_a}


def _backwards(theta_a, theta_b, alpha):
    return interpolate(theta_a, theta_b, 1 - alpha)


def _counter_of_the_first(theta_a, theta_b, alpha):
    name = "norm.num_batches_tracked"
    return interpolate(theta_a, theta_b, alpha) | {name: theta_a[name]}


def _common_keys(theta_a, theta_b, alpha):
    """Quietly leaves out what only one has."""
    both = theta_a.keys() & theta_b.keys()
    return interpolate({k: theta_a[k] for k in both}, {k: theta_b[k] for k in both}, alpha)


def _broadcast(theta_a, theta_b, alpha):
    """Never looks at shapes."""
    if theta_a.keys() != theta_b.keys():
        raise ValueError(f"keys differ: {sorted(theta_a.keys() ^ theta_b.keys())}")
    filled = {name: np.broadcast_to(theta_b[name], np.shape(a)) for name, a in theta_a.items()}
    return interpolate(theta_a, filled, alpha)


def _silent_error(theta_a, theta_b, alpha):
    try:
        return interpolate(theta_a, theta_b, alpha)
    except ValueError:
        raise ValueError("the models do not fit together") from None


def hint_q5(case: tuple, expected: object, got: object) -> str:
    theta_a, theta_b, _ = case
    if isinstance(expected, str):
        if isinstance(got, str):
            return "the message of the ValueError must name the key that does not fit."
        if theta_a.keys() != theta_b.keys():
            return "one model has a key that the other lacks: raise a ValueError that names it."
        return "two shapes differ, and numpy broadcast one silently: raise a ValueError."
    if not isinstance(got, dict) or "state" not in got:
        return "return a state dict; this pair fits together."
    counter = "norm.num_batches_tracked"
    if got["kinds"].get(counter) != "i":
        return "a count of batches is a whole number: take that of the nearer end."
    if not same(got["state"].get(counter), expected["state"][counter]):
        return "the counter is that of the nearer end (from alpha = 0.5 on, the second)."
    return "alpha = 0 is the first model, alpha = 1 the second: (1 - alpha) a + alpha b."


# --- 08.q6 judgement -------------------------------------------------------------------------

RUBRIC = """\
4 points; 1 for each, half marks allowed.
1. Uses the question "do the pre-trained features still work under THIS shift?": another scanner or
   hospital may be covered by pre-training or not; the probe's own accuracy there (or features' kNN)
   is the evidence. Does not claim that "fine-tuning always hurts out of distribution", nor the
   opposite.
2. Sees the flaw in the choice: picking alpha (or a strength, or an arm) on the 60 images of hospital B
   and then reporting accuracy on the same 60 spends the only unseen data. Either fixes alpha before
   (0.5), or chooses on A's validation images, or splits B into a part for choosing and a part for
   the report, and says which.
3. Averaging the two fine-tuned models: says that a line is only safe between models that share one
   pre-trained start (and architecture); with two different checkpoints the middle is expected to be
   near chance, and averaging predictions (an ensemble) is the alternative; or demands to measure it.
4. A plan with a price: a cheap sequence such as probe -> probe, then fine-tune -> the line between
   the two, reported for A and for B separately with intervals over several draws (60 images alone
   give +-12 points or so), including what it costs on A.
"""

QUESTIONS = [
    Question(
        id="08.q1",
        title="Two gradients",
        points=2,
        cases=cases_q1,
        expected=gradients,
        hint=hint_q1,
        wrong={
            "no 1/n": _q1_variant(lambda g, X: g * len(X)),
            "a 2 too many": _q1_variant(lambda g, X: 2 * g),
            "sign": _q1_variant(lambda g, X: -g),
            "transposed": _swapped_outer,
            "head on the pixels": _head_without_backbone,
            "backbone frozen": _frozen,
        },
    ),
    Question(
        id="08.q2",
        title="What training cannot reach",
        points=3,
        cases=cases_q2,
        expected=unreached,
        rtol=1e-5,
        atol=1e-7,
        hint=hint_q2,
        wrong={
            "the part inside": _inside,
            "QR of all inputs": _qr_of_everything,
            "SVD without looking at the rank": _svd_without_rank,
            "not orthonormal": _not_orthonormal,
            "one input at a time": _one_input_at_a_time,
        },
    ),
    Question(
        id="08.q3",
        title="Where fine-tuning ends",
        points=3,
        cases=cases_q3,
        expected=end_of_training,
        hint=hint_q3,
        wrong={
            "always the upper branch": _always_upper_branch,
            "sign of the start": _sign_of_the_start,
            "the probe's end": _end_of_the_probe,
            "only the feature moves": _backbone_alone,
            "sum of squares conserved": _sum_is_constant,
            "forgets c": _truth_without_c,
        },
    ),
    Question(
        id="08.q4",
        title="A step with a spring",
        points=3,
        cases=cases_q4,
        expected=spring_step,
        hint=hint_q4,
        wrong={
            "pull to zero": _to_zero,
            "pushes away": _away,
            "a 2 too many": _no_half,
            "head on the spring": _head_on_a_spring,
            "headline taken for the head": _startswith_head,
            "frozen layer pulled": _frozen_is_pulled,
            "frozen layer dropped": _frozen_is_dropped,
        },
    ),
    Question(
        id="08.q5",
        title="A point on the line",
        points=4,
        cases=cases_q5,
        expected=expect_q5,
        apply=call_q5,
        right=interpolate,
        hint=hint_q5,
        wrong={
            "averages the counter": _mix_everything,
            "backwards": _backwards,
            "counter of the first": _counter_of_the_first,
            "common keys only": _common_keys,
            "broadcasts": _broadcast,
            "error without a name": _silent_error,
        },
    ),
    Question(
        id="08.q6", title="Judgement: a second hospital", points=4, manual=True, rubric=RUBRIC
    ),
]
