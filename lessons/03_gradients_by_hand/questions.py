"""Graded questions of lesson 03: cross-entropy, head, backbone and LoRA gradients by hand."""

from __future__ import annotations

import numpy as np

from tlcourse.checks import Question

Arrays = dict[str, np.ndarray]


def one_hot(targets: np.ndarray, num_classes: int) -> np.ndarray:
    return np.eye(num_classes)[targets]


def softmax(logits: np.ndarray) -> np.ndarray:
    exps = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exps / exps.sum(axis=1, keepdims=True)


def apart(got: object, expected: np.ndarray) -> bool:
    """True if an answer's array differs, in shape or in value."""
    got = np.asarray(got)
    return got.shape != np.shape(expected) or not np.allclose(got, expected, rtol=1e-6, atol=1e-8)


def factor(got: object, expected: np.ndarray) -> float | None:
    """The f with ``got == f * expected``, where there is one."""
    got, expected = np.asarray(got), np.asarray(expected)
    if got.shape != expected.shape or not np.all(np.isfinite(got)) or not np.any(expected):
        return None
    ratio = float(np.sum(got * expected) / np.sum(expected * expected))
    return None if apart(got, ratio * expected) else ratio


def near(ratio: float | None, *values: float) -> bool:
    return ratio is not None and any(abs(ratio - value) < 1e-6 * abs(value) for value in values)


# --- 03.q1 cross-entropy -------------------------------------------------------------------


def cases_q1(rng: np.random.Generator) -> list[tuple]:
    """Ordinary logits, large ones, and rows on very different levels."""
    plain = rng.normal(size=(4, 3))
    large = 1000 * rng.normal(size=(5, 10))
    levels = rng.normal(size=(3, 4)) + np.array([[-2000.0], [0.0], [2000.0]])
    return [(logits, _targets(rng, logits)) for logits in (plain, large, levels)]


def _targets(rng: np.random.Generator, logits: np.ndarray) -> np.ndarray:
    return rng.integers(logits.shape[1], size=len(logits))


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    top = logits.max(axis=1, keepdims=True)
    lse = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
    return float(np.mean(lse - logits[np.arange(len(logits)), targets]))


def _naive_cross_entropy(logits, targets):
    with np.errstate(all="ignore"):
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        return float(-np.mean(np.log(p[np.arange(len(p)), targets])))


def _one_top_for_all(logits, targets):
    """The maximum over the whole batch: rows far below it underflow."""
    with np.errstate(all="ignore"):
        shifted = logits - logits.max()
        lse = np.log(np.exp(shifted).sum(axis=1))
        return float(np.mean(lse - shifted[np.arange(len(shifted)), targets]))


def _top_of_the_columns(logits, targets):
    with np.errstate(all="ignore"):
        return cross_entropy(logits - logits.max(axis=0), targets)


def _log_of_clipped(logits, targets):
    """The popular log(p + 1e-9)."""
    p = softmax(logits)[np.arange(len(logits)), targets]
    return float(-np.mean(np.log(p + 1e-9)))


def hint_q1(case: tuple, expected: float, got: object) -> str:
    logits = case[0]
    if not isinstance(got, float):
        return "return one number, the mean over the images."
    if not np.isfinite(got):
        return (
            "something overflowed or underflowed. Subtract each row's own maximum (axis=1, "
            "keepdims=True) before exp, and never take the log of a p: log p = z - lse(z)."
        )
    if near(factor(got, expected), len(logits)):
        return "that is the sum over the images; the question asks for the mean."
    if near(factor(got, expected), -1):
        return "the loss is *minus* the log of the true class's probability."
    if np.abs(logits).max() > 500:
        return "a p of exactly 0 was mended before the log. Use log p = z - lse(z) instead."
    return "log p = z - lse(z), and lse runs along axis 1, over the classes of one image."


# --- 03.q2 gradient of the logits ----------------------------------------------------------


def cases_q2(rng: np.random.Generator) -> list[tuple]:
    shapes = {(1, 3): 1, (6, 3): 2, (4, 10): 800}  # shape (n, K) and scale
    logits = [scale * rng.normal(size=shape) for shape, scale in shapes.items()]
    return [(array, _targets(rng, array)) for array in logits]


def logit_gradient(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return (softmax(logits) - one_hot(targets, logits.shape[1])) / len(logits)


def _softmax_over_images(logits, targets):
    return (softmax(logits.T).T - one_hot(targets, logits.shape[1])) / len(logits)


def _naive_logit_gradient(logits, targets):
    with np.errstate(all="ignore"):
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return (p - one_hot(targets, logits.shape[1])) / len(logits)


def _only_the_true_class(logits, targets):
    y = one_hot(targets, logits.shape[1])
    return y * (softmax(logits) - y) / len(logits)


def hint_q2(case: tuple, expected: np.ndarray, got: object) -> str:
    if np.shape(got) != expected.shape:
        return f"dZ has the shape of Z, {expected.shape}."
    if not np.all(np.isfinite(np.asarray(got))):
        return "exp overflowed: subtract each row's own maximum first."
    ratio = factor(got, expected)
    if near(ratio, len(expected)):
        return "that is p - y. The loss is a *mean* over n images, so its gradient carries 1/n."
    if near(ratio, -1):
        return "the sign: claimed minus true."
    if ratio is not None:
        return f"yours is {ratio:.4g} times the right one; divide by n, the number of images."
    return "p - y for each image: softmax along axis 1, minus a row of np.eye(K)."


# --- 03.q3 head ----------------------------------------------------------------------------


def cases_q3(rng: np.random.Generator) -> list[tuple]:
    """Non-square shapes, one square (where a transposed answer has the right shape)."""
    return [_head_case(rng, n, d, k) for n, d, k in ((1, 4, 3), (5, 4, 3), (6, 5, 5))]


def _head_case(rng: np.random.Generator, n: int, d: int, k: int) -> tuple:
    features, weight, bias = rng.normal(size=(n, d)), rng.normal(size=(k, d)), rng.normal(size=k)
    return features, rng.integers(k, size=n), weight, bias


def head_gradients(
    features: np.ndarray, targets: np.ndarray, weight: np.ndarray, bias: np.ndarray
) -> Arrays:
    dlogits = logit_gradient(features @ weight.T + bias, targets)
    return {"weight": dlogits.T @ features, "bias": dlogits.sum(axis=0)}


def _head_variant(change):
    """A wrong answer: `change(gradients, features)` spoils the right one."""

    def wrong(features, targets, weight, bias):
        return change(head_gradients(features, targets, weight, bias), features)

    return wrong


def _head_without_bias(features, targets, weight, bias):
    return head_gradients(features, targets, weight, np.zeros_like(bias))


def hint_q3(case: tuple, expected: Arrays, got: object) -> str:
    n = len(case[0])
    if not isinstance(got, dict) or set(got) != set(expected):
        return "return a dict with the keys 'weight' and 'bias'."
    for name, right in expected.items():
        if np.shape(got[name]) != right.shape:
            return f"the gradient of the {name} has the shape of the {name}, {right.shape}."
    for name, right in expected.items():
        ratio = factor(got[name], right)
        if n > 1 and near(ratio, n, 1 / n):
            return f"{name}: dZ carries the 1/n, once. Sum over the images."
    if apart(got["weight"], expected["weight"]) and apart(got["bias"], expected["bias"]):
        return "are the logits H V^T + c? Check dZ first, with question 2."
    return "dV sums dz_ik h_ij over the images i; dc sums dz_ik over them."


# --- 03.q4 backbone ------------------------------------------------------------------------


def cases_q4(rng: np.random.Generator) -> list[tuple]:
    """Trained and frozen, several shapes, and one network with a unit that never fires."""
    cases = []
    for n, d, k, num_classes, frozen in (
        (1, 4, 3, 2, False),
        (6, 5, 4, 3, False),
        (6, 5, 4, 3, True),
    ):
        net = {
            "W1": rng.normal(size=(k, d)),
            "b1": rng.normal(size=k),
            "V": rng.normal(size=(num_classes, k)),
            "c": rng.normal(size=num_classes),
        }
        inputs = rng.normal(size=(n, d))
        cases.append((net, inputs, rng.integers(num_classes, size=n), frozen))
    dead = {**cases[1][0], "b1": np.array([-100.0, 0.5, 0.5, 0.5])}
    square = (_square_net(rng), rng.normal(size=(4, 4)), rng.integers(4, size=4), False)
    return [*cases, (dead, *cases[1][1:]), square]


def _square_net(rng: np.random.Generator) -> Arrays:
    shapes = {"W1": (4, 4), "b1": (4,), "V": (4, 4), "c": (4,)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def backward(net: Arrays, inputs: np.ndarray, targets: np.ndarray, frozen: bool) -> Arrays:
    before = inputs @ net["W1"].T + net["b1"]
    hidden = np.maximum(before, 0)
    dlogits = logit_gradient(hidden @ net["V"].T + net["c"], targets)
    gradients = {"V": dlogits.T @ hidden, "c": dlogits.sum(axis=0)}
    if not frozen:
        dbefore = (dlogits @ net["V"]) * (before > 0)
        gradients |= {"W1": dbefore.T @ inputs, "b1": dbefore.sum(axis=0)}
    return gradients


def _no_gate(net, inputs, targets, frozen):
    gradients = backward(net, inputs, targets, frozen)
    if not frozen:
        hidden = np.maximum(inputs @ net["W1"].T + net["b1"], 0)
        dhidden = logit_gradient(hidden @ net["V"].T + net["c"], targets) @ net["V"]
        gradients |= {"W1": dhidden.T @ inputs, "b1": dhidden.sum(axis=0)}
    return gradients


def _gate_from_the_gradient(net, inputs, targets, frozen):
    """ReLU applied to the gradient instead of its slope."""
    gradients = backward(net, inputs, targets, frozen)
    if not frozen:
        hidden = np.maximum(inputs @ net["W1"].T + net["b1"], 0)
        dhidden = logit_gradient(hidden @ net["V"].T + net["c"], targets) @ net["V"]
        dbefore = np.maximum(dhidden, 0)
        gradients |= {"W1": dbefore.T @ inputs, "b1": dbefore.sum(axis=0)}
    return gradients


def _ignores_frozen(net, inputs, targets, frozen):
    return backward(net, inputs, targets, False)


def _frozen_as_zeros(net, inputs, targets, frozen):
    """Zero gradients instead of none: weight decay would still shrink the weights."""
    gradients = backward(net, inputs, targets, False)
    if frozen:
        gradients |= {name: np.zeros_like(net[name]) for name in ("W1", "b1")}
    return gradients


def _head_on_the_sums(net, inputs, targets, frozen):
    """dV from the values before the ReLU."""
    gradients = backward(net, inputs, targets, frozen)
    before = inputs @ net["W1"].T + net["b1"]
    dlogits = logit_gradient(np.maximum(before, 0) @ net["V"].T + net["c"], targets)
    return gradients | {"V": dlogits.T @ before}


def _backbone_variant(change):
    def wrong(net, inputs, targets, frozen):
        gradients = backward(net, inputs, targets, frozen)
        return {name: change(name, value, inputs) for name, value in gradients.items()}

    return wrong


def hint_q4(case: tuple, expected: Arrays, got: object) -> str:
    if not isinstance(got, dict):
        return "return a dict with one gradient for each name: 'W1', 'b1', 'V', 'c'."
    if set(got) != set(expected):
        return (
            "when frozen is True the keys 'W1' and 'b1' must be absent. A gradient of zeros is "
            "not the same: weight decay would still shrink the weights."
        )
    for name, right in expected.items():
        if np.shape(got[name]) != right.shape:
            return f"the gradient of {name} has the shape of {name}, {right.shape}."
    if apart(got["V"], expected["V"]) or apart(got["c"], expected["c"]):
        return "start with the head: it reads the values *after* the ReLU, and dZ carries the 1/n."
    return "the head is right. On the way down, dU = (dZ V) times [U > 0]: is the gate there?"


# --- 03.q5 LoRA ----------------------------------------------------------------------------


def cases_q5(rng: np.random.Generator) -> list[tuple]:
    """The first step (B = 0), a later one, and a square layer with rank equal to its width."""
    cases = []
    for n, i, o, r, alpha in ((3, 5, 4, 2, 2.0), (7, 6, 5, 2, 8.0), (4, 3, 3, 3, 1.0)):
        B = np.zeros((o, r)) if not cases else rng.normal(size=(o, r))
        A, dU = rng.normal(size=(r, i)), rng.normal(size=(n, o))
        cases.append((rng.normal(size=(n, i)), dU, A, B, alpha))
    return cases


def lora_gradients(
    H: np.ndarray, dU: np.ndarray, A: np.ndarray, B: np.ndarray, alpha: float
) -> Arrays:
    scale = alpha / len(A)
    return {"A": scale * (dU @ B).T @ H, "B": scale * dU.T @ (H @ A.T)}


def _lora_scaled(scale_of):
    def wrong(H, dU, A, B, alpha):
        right = lora_gradients(H, dU, A, B, len(A))  # scale 1
        return {name: scale_of(name, alpha, len(A)) * value for name, value in right.items()}

    return wrong


def _lora_swapped(H, dU, A, B, alpha):
    right = lora_gradients(H, dU, A, B, alpha)
    return {"A": right["B"], "B": right["A"]}


def _lora_transposed(H, dU, A, B, alpha):
    return {name: value.T for name, value in lora_gradients(H, dU, A, B, alpha).items()}


def _lora_averaged_again(H, dU, A, B, alpha):
    return {name: value / len(H) for name, value in lora_gradients(H, dU, A, B, alpha).items()}


def _lora_A_never_moves(H, dU, A, B, alpha):
    """Takes "dA = 0 at the first step" for "dA = 0"."""
    return lora_gradients(H, dU, A, B, alpha) | {"A": np.zeros_like(A)}


def hint_q5(case: tuple, expected: Arrays, got: object) -> str:
    H, _, A, B, alpha = case
    if not isinstance(got, dict) or set(got) != {"A", "B"}:
        return "return a dict with the keys 'A' and 'B'."
    for name in "AB":
        if np.shape(got[name]) != expected[name].shape:
            return f"d{name} must have the shape of {name}, {expected[name].shape}."
    if np.any(B) and not np.any(got["A"]):
        return "dA is zero only while B is: dA = s B^T dW."
    if not np.any(B) and np.any(got["A"]):
        return "here B = 0, so dA must be zero: A is felt only through B."
    ratios = [factor(got[name], expected[name]) for name in "AB" if np.any(expected[name])]
    if any(near(ratio, 1 / len(H)) for ratio in ratios):
        return "dU carries the 1/n already."
    for ratio in ratios:
        if ratio is not None and not near(ratio, 1):
            return f"yours is {ratio:.4g} times the right one. The scale is s = alpha / r, once."
    return "form dW = dU^T H on paper, then dB = s dW A^T and dA = s B^T dW."


# --- 03.q6 judgement -----------------------------------------------------------------------

RUBRIC = """\
4 points; 1 for each, half marks allowed.
1. Counts products, not weights: the expectation "time falls with the share of frozen weights" is
   wrong, because a weight product is saved only where a layer is frozen and an input product only
   where nothing at or below is trained; the forward pass stays in any case.
2. The three plans: (a) LoRA in every layer keeps forward and all input products, about two thirds
   of a step; (b) head only keeps the forward pass, about a third, and next to nothing per epoch
   once features are cached (at the price of no augmentation); (c) the lowest layer alone keeps
   the whole way back, about two thirds, in spite of its few weights.
3. The gradient check: float32 and a tolerance of 1e-2 at the start of training prove little.
   Names at least two of: float64 with h near 1e-5; tolerance near 1e-6; at B = 0 (or a zero head)
   wrong gradients pass as zero; a check cannot see a wrong loss or wrong labels.
4. Says what to measure before deciding: seconds per step (or counted multiplications) AND
   accuracy on validation data for at least two of the plans, because the cheapest plan is of no
   use if its frozen features are not good enough.
"""

QUESTIONS = [
    Question(
        id="03.q1",
        title="A loss that does not overflow",
        points=2,
        cases=cases_q1,
        expected=cross_entropy,
        hint=hint_q1,
        wrong={
            "naive softmax": _naive_cross_entropy,
            "one maximum for the whole batch": _one_top_for_all,
            "maximum of the columns": _top_of_the_columns,
            "log(p + 1e-9)": _log_of_clipped,
            "sum, not mean": lambda logits, targets: cross_entropy(logits, targets) * len(logits),
            "sign": lambda logits, targets: -cross_entropy(logits, targets),
        },
    ),
    Question(
        id="03.q2",
        title="Claimed minus true",
        points=2,
        cases=cases_q2,
        expected=logit_gradient,
        hint=hint_q2,
        wrong={
            "no 1/n": lambda logits, targets: logit_gradient(logits, targets) * len(logits),
            "1/(n K)": lambda logits, targets: logit_gradient(logits, targets) / logits.shape[1],
            "sign": lambda logits, targets: -logit_gradient(logits, targets),
            "softmax along the wrong axis": _softmax_over_images,
            "naive softmax": _naive_logit_gradient,
            "only the true class": _only_the_true_class,
            "transposed": lambda logits, targets: logit_gradient(logits, targets).T,
        },
    ),
    Question(
        id="03.q3",
        title="The head",
        points=2,
        cases=cases_q3,
        expected=head_gradients,
        hint=hint_q3,
        wrong={
            "transposed": _head_variant(lambda g, _: {**g, "weight": g["weight"].T}),
            "averaged twice": _head_variant(lambda g, h: {k: v / len(h) for k, v in g.items()}),
            "no 1/n": _head_variant(lambda g, h: {k: v * len(h) for k, v in g.items()}),
            "mean for the bias": _head_variant(lambda g, h: {**g, "bias": g["bias"] / len(h)}),
            "bias left out of the logits": _head_without_bias,
            "bias of one number": _head_variant(lambda g, _: {**g, "bias": g["bias"].sum()}),
        },
    ),
    Question(
        id="03.q4",
        title="Down through the backbone",
        points=4,
        cases=cases_q4,
        expected=backward,
        hint=hint_q4,
        wrong={
            "no ReLU gate": _no_gate,
            "ReLU of the gradient": _gate_from_the_gradient,
            "ignores frozen": _ignores_frozen,
            "frozen means zeros": _frozen_as_zeros,
            "head reads the sums before the ReLU": _head_on_the_sums,
            "no 1/n": _backbone_variant(lambda name, g, x: g * len(x)),
            "transposed": _backbone_variant(lambda name, g, x: g.T),
        },
    ),
    Question(
        id="03.q5",
        title="The two thin matrices of LoRA",
        points=4,
        cases=cases_q5,
        expected=lora_gradients,
        hint=hint_q5,
        wrong={
            "no scale": _lora_scaled(lambda name, alpha, rank: 1.0),
            "alpha alone": _lora_scaled(lambda name, alpha, rank: alpha),
            "alpha over r, twice": _lora_scaled(lambda name, alpha, rank: (alpha / rank) ** 2),
            "rank over alpha": _lora_scaled(lambda name, alpha, rank: rank / alpha),
            "swapped": _lora_swapped,
            "transposed": _lora_transposed,
            "averaged again": _lora_averaged_again,
            "A never moves": _lora_A_never_moves,
        },
    ),
    Question(
        id="03.q6", title="Judgement: three ways to save", points=4, manual=True, rubric=RUBRIC
    ),
]
