"""Graded questions of lesson 17: counts, DoRA, Holm's correction, verdicts from a table."""

from __future__ import annotations

import numpy as np
from scipy.special import ndtr, stdtr

from tlcourse.checks import Question

Arrays = dict[str, np.ndarray]

# --- 17.q1 counts --------------------------------------------------------------------------

METHODS = ("head", "BitFit", "(IA)3", "bottleneck", "LoRA", "DoRA", "prompt", "prefix")


def cases_q1(rng: np.random.Generator) -> list[tuple]:
    """Each method once, in models of different shapes."""
    cases = []
    for method in METHODS:
        layers, classes, size = (int(rng.integers(*b)) for b in ((2, 13), (2, 20), (2, 17)))
        d = int(8 * rng.integers(4, 40))
        cases.append((method, layers, d, 4 * d + 8, classes, size))
    return cases


def trained_numbers(method: str, layers: int, d: int, f: int, classes: int, size: int) -> int:
    return _body(method, layers, d, f, size) + classes * d + classes


def _body(method, layers, d, f, size):
    return {
        "head": 0,
        "BitFit": layers * (4 * d + f + d + 2 * d) + d,
        "(IA)3": layers * (2 * d + f),
        "bottleneck": 2 * layers * (2 * size * d + size + d),
        "LoRA": 2 * layers * size * 2 * d,
        "DoRA": 2 * layers * (size * 2 * d + d),
        "prompt": size * d,
        "prefix": size * 2 * layers * d,
    }[method]


def _no_head(method, layers, d, f, classes, size):
    return _body(method, layers, d, f, size)


def _no_head_bias(method, layers, d, f, classes, size):
    return trained_numbers(method, layers, d, f, classes, size) - classes


def _with(name, change):
    """The right answer, but another count for one method."""

    def answer(method, layers, d, f, classes, size):
        right = trained_numbers(method, layers, d, f, classes, size)
        return right + (change(layers, d, f, size) if method == name else 0)

    return answer


_bitfit_no_norms = _with("BitFit", lambda layers, d, f, size: -layers * 2 * d - d)
_bitfit_no_embedding = _with("BitFit", lambda layers, d, f, size: -d)
_bitfit_both = _with("BitFit", lambda layers, d, f, size: layers * 2 * d + d)
_ia3_outputs = _with("(IA)3", lambda layers, d, f, size: layers * (d - f))
_one_bottleneck = _with(
    "bottleneck", lambda layers, d, f, size: -layers * (2 * size * d + size + d)
)
_bottleneck_no_bias = _with("bottleneck", lambda layers, d, f, size: -2 * layers * (size + d))
_lora_one_factor = _with("LoRA", lambda layers, d, f, size: -2 * layers * size * d)
_dora_inputs_too = _with("DoRA", lambda layers, d, f, size: 2 * layers * d)
_dora_as_lora = _with("DoRA", lambda layers, d, f, size: -2 * layers * d)
_dora_one_length = _with("DoRA", lambda layers, d, f, size: 2 * layers * (1 - d))
_prompt_everywhere = _with("prompt", lambda layers, d, f, size: (layers - 1) * size * d)
_prefix_keys_only = _with("prefix", lambda layers, d, f, size: -size * layers * d)
_prefix_first_layer = _with("prefix", lambda layers, d, f, size: -size * 2 * (layers - 1) * d)


def hint_q1(case: tuple, expected: int, got: object) -> str:
    method, layers, d, f, classes, size = case
    if isinstance(got, bool) or not isinstance(got, (int, np.integer)):
        return "return a whole number."
    if got == _no_head(*case):
        return "the head is trained as well: classes * d weights and a bias for each class."
    if got == _no_head_bias(*case):
        return "the head has a bias for each class."
    told = {
        _bitfit_no_norms: "the shifts of the normalisations are biases, too.",
        _bitfit_no_embedding: "one more normalisation sits behind the embeddings.",
        _bitfit_both: "of a normalisation only the shift is a bias; the scale stays frozen.",
        _ia3_outputs: "in the feed-forward it is the *inputs* of the second matrix, f of them.",
        _one_bottleneck: "there are two bottlenecks in each layer.",
        _bottleneck_no_bias: "down and up have biases: the bottleneck's width, and d.",
        _lora_one_factor: "A has rank * d numbers, and so has B.",
        _dora_inputs_too: "DoRA trains a length for each *output* of a layer, d, not 2 d.",
        _dora_as_lora: "DoRA trains a length for each output of a layer as well.",
        _dora_one_length: "DoRA trains one length for each output, not one for the layer.",
        _prompt_everywhere: "a prompt stands before the text once, not in every layer.",
        _prefix_keys_only: "a prefix has a key *and* a value.",
        _prefix_first_layer: "a prefix is in every layer.",
    }
    for wrong, words in told.items():
        if got == wrong(*case) != expected:
            return words
    return f"for {method!r}: go through one layer, multiply by {layers}, and add the head."


# --- 17.q2 DoRA ----------------------------------------------------------------------------


def cases_q2(rng: np.random.Generator) -> list[tuple]:
    """The start (B = 0) and later; with the shortcut and without."""
    cases = []
    for n, i, o, r, s, constant in (
        (3, 5, 4, 2, 2.0, True),
        (4, 4, 6, 3, 0.5, False),
        (2, 6, 3, 2, 1.5, True),
        (5, 5, 5, 1, 3.0, False),
    ):
        W, A = rng.normal(size=(o, i)), rng.normal(size=(r, i))
        B = np.zeros((o, r)) if not cases else rng.normal(size=(o, r))
        m = np.linalg.norm(W, axis=1) if not cases else rng.uniform(0.5, 2, o)
        X, D = rng.normal(size=(n, i)), rng.normal(size=(n, o))
        cases.append((X, W, A, B, m, s, D, constant))
    return cases


def dora(X, W, A, B, m, s, D, constant_length) -> Arrays:
    V = W + s * B @ A
    length = np.linalg.norm(V, axis=1, keepdims=True)
    direction = V / length
    G = D.T @ X
    along = np.sum(G * direction, axis=1, keepdims=True)
    dV = m[:, None] / length * (G if constant_length else G - along * direction)
    return {"H": X @ (m[:, None] * direction).T, "m": along[:, 0], "B": s * dV @ A.T}


def _other_length(X, W, A, B, m, s, D, constant_length):
    return dora(X, W, A, B, m, s, D, not constant_length)


def _always_constant(X, W, A, B, m, s, D, constant_length):
    return dora(X, W, A, B, m, s, D, True)


def _never_constant(X, W, A, B, m, s, D, constant_length):
    return dora(X, W, A, B, m, s, D, False)


def _columns(X, W, A, B, m, s, D, constant_length):
    """Norm over all entries in place of each row."""
    right = dora(X, W, A, B, m, s, D, constant_length)
    V = W + s * B @ A
    return right | {"H": X @ (m[:, None] * V / np.linalg.norm(V)).T}


def _frozen_length(X, W, A, B, m, s, D, constant_length):
    """Divides by the length of W, not of V."""
    right = dora(X, W, A, B, m, s, D, constant_length)
    V = W + s * B @ A
    return right | {"H": X @ (m[:, None] * V / np.linalg.norm(W, axis=1, keepdims=True)).T}


def _direction_without_lora(X, W, A, B, m, s, D, constant_length):
    return dora(X, W, A, 0 * B, m, s, D, constant_length)


def _no_scale_forward(X, W, A, B, m, s, D, constant_length):
    return dora(X, W, A, B, m, 1.0, D, constant_length)


def _m_not_normalised(X, W, A, B, m, s, D, constant_length):
    right = dora(X, W, A, B, m, s, D, constant_length)
    return right | {"m": np.sum(D.T @ X * (W + s * B @ A), axis=1)}


def _B_no_scale(X, W, A, B, m, s, D, constant_length):
    right = dora(X, W, A, B, m, s, D, constant_length)
    return right | {"B": right["B"] / s}


def _B_no_length(X, W, A, B, m, s, D, constant_length):
    right = dora(X, W, A, B, m, s, D, constant_length)
    length = np.linalg.norm(W + s * B @ A, axis=1, keepdims=True)
    return right | {"B": right["B"] * length / m[:, None]}


def hint_q2(case: tuple, expected: Arrays, got: object) -> str:
    X, W, A, B, m, s, D, constant = case
    if not isinstance(got, dict) or set(got) != {"H", "m", "B"}:
        return "return a dict with the keys 'H', 'm' and 'B'."
    for name, value in expected.items():
        if np.shape(got[name]) != value.shape:
            return f"{name!r} must have shape {value.shape}, got {np.shape(got[name])}."

    def is_like(name: str, other: Arrays) -> bool:
        return bool(np.allclose(got[name], other[name])) and not np.allclose(
            other[name], expected[name]
        )

    if is_like("H", _columns(*case)):
        return "each row has a length of its own: the norm runs over the inputs, axis 1."
    if is_like("H", _frozen_length(*case)):
        return "divide by the length of V, which moves in training, not by that of W."
    if is_like("H", _direction_without_lora(*case)):
        return "V = W + s B A: the low-rank part belongs to the direction."
    if is_like("H", _no_scale_forward(*case)):
        return "the scale s is missing: V = W + s B A."
    if not np.allclose(got["H"], expected["H"]):
        return "H = X W'^T, where row j of W' is m_j v_j / |v_j|."
    if is_like("m", _m_not_normalised(*case)):
        return "dm_j = g_j . v_j / |v_j|: the row must be divided by its length."
    if not np.allclose(got["m"], expected["m"]):
        return "dm_j = g_j . v_j / |v_j|, with G = D^T X."
    if is_like("B", _other_length(*case)):
        return f"constant_length is {constant} here: " + (
            "the part along the row is not taken out of g_j."
            if constant
            else "take out of g_j what points along the row."
        )
    if is_like("B", _B_no_scale(*case)):
        return "dB = s dV A^T: the scale s is missing."
    if is_like("B", _B_no_length(*case)):
        return "dV has the factor m_j / |v_j|."
    return "dV_j = m_j / |v_j| times g_j (or its part across the row), and dB = s dV A^T."


# --- 17.q3 Holm ----------------------------------------------------------------------------


def cases_q3(rng: np.random.Generator) -> list[tuple]:
    """One value; where the running maximum matters; where the cap does; more in any order."""
    cases: list[tuple] = [
        (rng.uniform(0.01, 0.2, 1),),
        # 3 * .02 = .06 is more than 2 * .025 = .05: the maximum carries it on.
        (rng.permutation(np.array([0.02, 0.025, 0.3]) * rng.uniform(0.9, 1.1)),),
        # 3 * .4 is more than 1.
        (rng.permutation(np.array([0.01, 0.4, 0.5, 0.9]) * rng.uniform(0.9, 1.1, 4)),),
    ]
    for k in (5, 8, 11):
        cases.append((rng.permutation(np.exp(rng.uniform(-8, -0.2, k))),))
    return cases


def holm(p: np.ndarray) -> np.ndarray:
    order, k = np.argsort(p), len(p)
    adjusted = np.empty(k)
    adjusted[order] = np.maximum.accumulate(np.minimum(1, p[order] * np.arange(k, 0, -1)))
    return adjusted


def _bonferroni(p):
    return np.minimum(1, len(p) * p)


def _sorted_out(p):
    return np.sort(holm(p))


def _no_maximum(p):
    order, k = np.argsort(p), len(p)
    adjusted = np.empty(k)
    adjusted[order] = np.minimum(1, p[order] * np.arange(k, 0, -1))
    return adjusted


def _not_capped(p):
    order, k = np.argsort(p), len(p)
    adjusted = np.empty(k)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(k, 0, -1))
    return adjusted


def _hochberg(p):
    """Step-up: the minimum from the largest down."""
    order, k = np.argsort(p), len(p)
    adjusted = np.empty(k)
    stepped = np.minimum(1, p[order] * np.arange(k, 0, -1))
    adjusted[order] = np.minimum.accumulate(stepped[::-1])[::-1]
    return adjusted


def _benjamini_hochberg(p):
    order, k = np.argsort(p), len(p)
    adjusted = np.empty(k)
    stepped = np.minimum(1, p[order] * k / np.arange(1, k + 1))
    adjusted[order] = np.minimum.accumulate(stepped[::-1])[::-1]
    return adjusted


def _wrong_way_round(p):
    """The largest p gets the largest factor."""
    order, k = np.argsort(p), len(p)
    adjusted = np.empty(k)
    adjusted[order] = np.maximum.accumulate(np.minimum(1, p[order] * np.arange(1, k + 1)))
    return adjusted


def _in_given_order(p):
    """Does not sort at all."""
    return np.maximum.accumulate(np.minimum(1, p * np.arange(len(p), 0, -1)))


def hint_q3(case: tuple, expected: np.ndarray, got: object) -> str:
    (p,) = case
    if np.shape(got) != p.shape:
        return f"return one value for each p, shape {p.shape}, got {np.shape(got)}."
    told = {
        _bonferroni: "that is Bonferroni. Holm's factor falls from k for the smallest p to 1.",
        _no_maximum: "adjusted values must not fall when p grows: take the running maximum.",
        _not_capped: "a p value is at most 1.",
        _hochberg: "that is a minimum from the largest down (Hochberg); Holm goes from the "
        "smallest up, with a running maximum.",
        _benjamini_hochberg: "that controls the share of false discoveries (Benjamini and "
        "Hochberg), not the chance of any.",
        _wrong_way_round: "the *smallest* p is multiplied by k, the largest by 1.",
        _in_given_order: "sort first; then the factors.",
    }
    values = np.asarray(got, dtype=float)
    for wrong, words in told.items():
        other = wrong(p)
        if np.allclose(values, other) and not np.allclose(other, expected):
            return words
    if np.allclose(np.sort(values), np.sort(expected)):
        return "the values are right, but must come back in the order of p."
    return "sort; factors k, k - 1, ..., 1; cap at 1; running maximum; back to the given order."


# --- 17.q4 verdicts ------------------------------------------------------------------------


def cases_q4(rng: np.random.Generator) -> list[tuple]:
    """Hard and easy draws, common to all methods; some methods better, some worse."""
    cases = []
    for count, draws, reference, level in ((4, 5, 3, 0.05), (6, 5, 0, 0.05), (8, 7, 2, 0.1)):
        common = rng.normal(0.7, 0.06, draws)
        gaps = rng.permutation(np.linspace(-0.08, 0.08, count))
        noise = rng.normal(0, 0.02, (count, draws))
        cases.append((common + gaps[:, None] + noise, reference, level))
    return cases


def verdicts(scores: np.ndarray, reference: int, level: float) -> dict:
    d = np.delete(scores, reference, axis=0) - scores[reference]
    return _judge(d, _paired(d), level)


def _paired(d: np.ndarray, ddof: int = 1) -> np.ndarray:
    n = d.shape[1]
    t = d.mean(axis=1) / (d.std(axis=1, ddof=ddof) / np.sqrt(n))
    return 2 * stdtr(n - 1, -np.abs(t))


def _judge(d: np.ndarray, p: np.ndarray, level: float, adjust=holm, sign: int = 1) -> dict:
    gap, adjusted = sign * d.mean(axis=1), adjust(p)
    words = [
        "tie" if q >= level else "better" if g > 0 else "worse"
        for q, g in zip(adjusted, gap, strict=True)
    ]
    return {"difference": gap, "p": adjusted, "words": words}


def _differences(scores: np.ndarray, reference: int) -> np.ndarray:
    return np.delete(scores, reference, axis=0) - scores[reference]


def _uncorrected(scores, reference, level):
    d = _differences(scores, reference)
    return _judge(d, _paired(d), level, adjust=lambda p: p)


def _with_bonferroni(scores, reference, level):
    d = _differences(scores, reference)
    return _judge(d, _paired(d), level, adjust=_bonferroni)


def _unpaired(scores, reference, level):
    """Two independent samples."""
    d = _differences(scores, reference)
    n = scores.shape[1]
    others = np.delete(scores, reference, axis=0)
    error = np.sqrt((others.var(axis=1, ddof=1) + scores[reference].var(ddof=1)) / n)
    return _judge(d, 2 * stdtr(2 * n - 2, -np.abs(d.mean(axis=1) / error)), level)


def _population_std(scores, reference, level):
    d = _differences(scores, reference)
    return _judge(d, _paired(d, ddof=0), level)


def _normal(scores, reference, level):
    d = _differences(scores, reference)
    t = d.mean(axis=1) / (d.std(axis=1, ddof=1) / np.sqrt(d.shape[1]))
    return _judge(d, 2 * ndtr(-np.abs(t)), level)


def _one_sided(scores, reference, level):
    d = _differences(scores, reference)
    return _judge(d, _paired(d) / 2, level)


def _reference_minus_method(scores, reference, level):
    d = _differences(scores, reference)
    return _judge(d, _paired(d), level, sign=-1)


def _with_reference(scores, reference, level):
    """Counts the reference as one more comparison."""
    d = _differences(scores, reference)
    return _judge(d, _paired(d), level, adjust=lambda p: holm(np.append(p, 1.0))[:-1])


def _by_sign_alone(scores, reference, level):
    """No ties."""
    right = verdicts(scores, reference, level)
    words = ["better" if gap > 0 else "worse" for gap in right["difference"]]
    return right | {"words": words}


def hint_q4(case: tuple, expected: dict, got: object) -> str:
    scores, reference, level = case
    if not isinstance(got, dict) or set(got) != {"difference", "p", "words"}:
        return "return a dict with the keys 'difference', 'p' and 'words'."
    for name in ("difference", "p"):
        if np.shape(got[name]) != (len(scores) - 1,):
            return f"{name!r} has one value for each method but the reference: {len(scores) - 1}."
    if np.allclose(got["difference"], -expected["difference"]):
        return "the difference is the method minus the reference."
    if not np.allclose(got["difference"], expected["difference"]):
        return "difference: mean over the draws of (method - reference), in the order of the table."
    told = {
        _uncorrected: "the p values lack Holm's correction over the M - 1 comparisons.",
        _with_bonferroni: "that is Bonferroni's correction; Holm's factor falls from M - 1 to 1.",
        _unpaired: "the draws are the same for all methods: test the differences (paired).",
        _population_std: "the standard deviation of a sample divides by n - 1 (ddof=1).",
        _normal: "with so few draws use Student's t with n - 1 degrees of freedom, not the normal.",
        _one_sided: "the test is two-sided: twice the tail.",
        _with_reference: "there are M - 1 comparisons; the reference is not compared with itself.",
    }
    for wrong, words in told.items():
        other = wrong(*case)["p"]
        if np.allclose(got["p"], other) and not np.allclose(other, expected["p"]):
            return words
    if not np.allclose(got["p"], expected["p"]):
        return (
            "p: t = mean(d) / (std(d) / sqrt(n)), two-sided, n - 1 degrees of freedom, then Holm."
        )
    if "tie" not in list(got["words"]):
        return "where the adjusted p is not below the level, the word is 'tie'."
    return f"words: 'better' or 'worse' where the adjusted p is below {level}, else 'tie'."


RUBRIC = """\
1 point: unfair tuning: 24 settings for ours against one for each baseline, and 2e-5 is a rate
  for all weights, far too low for LoRA and BitFit; all of it favours ours.
1 point: 0.5 points of 500 texts in one run is noise: no seeds, no pairing, no interval, no
  correction for several comparisons; it is a tie (a choice on the test set flatters it further).
1 point: memory: frozen weights and activations stay, so a factor of about 4 at most for weights,
  gradients and moments; only storage for each task shrinks 500 times.
1 point: a decision for the 300 customers that follows: small files beside one frozen model, the
  linear head first with so few labels, then a tuned efficient method; measured on validation,
  paired over customers.
"""

QUESTIONS = [
    Question(
        id="17.q1",
        title="How many numbers does it train?",
        points=3,
        cases=cases_q1,
        expected=trained_numbers,
        hint=hint_q1,
        wrong={
            "no head": _no_head,
            "no bias of the head": _no_head_bias,
            "BitFit without normalisations": _bitfit_no_norms,
            "BitFit without the first normalisation": _bitfit_no_embedding,
            "BitFit with scales": _bitfit_both,
            "(IA)3 scales outputs": _ia3_outputs,
            "one bottleneck": _one_bottleneck,
            "bottleneck without biases": _bottleneck_no_bias,
            "LoRA with one factor": _lora_one_factor,
            "DoRA with lengths of inputs": _dora_inputs_too,
            "DoRA as LoRA": _dora_as_lora,
            "DoRA with one length": _dora_one_length,
            "prompt in every layer": _prompt_everywhere,
            "prefix of keys": _prefix_keys_only,
            "prefix in the first layer": _prefix_first_layer,
        },
    ),
    Question(
        id="17.q2",
        title="DoRA, forwards and backwards",
        points=4,
        cases=cases_q2,
        expected=dora,
        hint=hint_q2,
        wrong={
            "always constant": _always_constant,
            "never constant": _never_constant,
            "the other way round": _other_length,
            "one norm for the matrix": _columns,
            "length of W": _frozen_length,
            "no BA in the direction": _direction_without_lora,
            "no scale": _no_scale_forward,
            "dm not normalised": _m_not_normalised,
            "dB without scale": _B_no_scale,
            "dB without the length": _B_no_length,
        },
    ),
    Question(
        id="17.q3",
        title="Holm's correction",
        points=3,
        cases=cases_q3,
        expected=holm,
        hint=hint_q3,
        wrong={
            "Bonferroni": _bonferroni,
            "sorted": _sorted_out,
            "no running maximum": _no_maximum,
            "not capped": _not_capped,
            "Hochberg": _hochberg,
            "Benjamini and Hochberg": _benjamini_hochberg,
            "wrong way round": _wrong_way_round,
            "not sorted first": _in_given_order,
        },
    ),
    Question(
        id="17.q4",
        title="Verdicts from a table",
        points=4,
        cases=cases_q4,
        expected=verdicts,
        hint=hint_q4,
        wrong={
            "not corrected": _uncorrected,
            "Bonferroni": _with_bonferroni,
            "unpaired": _unpaired,
            "divides by n": _population_std,
            "normal": _normal,
            "one-sided": _one_sided,
            "reference minus method": _reference_minus_method,
            "the reference counts": _with_reference,
            "no ties": _by_sign_alone,
        },
    ),
    Question(
        id="17.q5",
        title="Judgement: a table in which ours wins",
        points=4,
        manual=True,
        rubric=RUBRIC,
    ),
]
