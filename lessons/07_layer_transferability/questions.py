"""Graded questions of lesson 07: transplants, their price, CKA, and the cause of a loss."""

from __future__ import annotations

import numpy as np
from scipy.special import stdtrit

from tlcourse.checks import Question

# --- 07.q1 the plan of a transplant --------------------------------------------------------


def cases_q1(rng: np.random.Generator) -> list[tuple]:
    """A small network; one of twelve blocks, whose names are each other's beginnings; the ends."""
    small = ["stem", "stages.0", "stages.1"]
    deep = ["embed", *(f"blocks.{i}" for i in range(12))]
    cut = int(rng.integers(3, 11))  # in the deep network: copies blocks.1, not blocks.10
    return [
        (_parameters(rng, layers), layers, n, frozen)
        for layers, n, frozen in (
            (small, 2, True),
            (small, 1, False),
            (deep, cut, True),
            (small, 0, True),
            (small, 3, True),
            (small, 3, False),
        )
    ]


def _parameters(rng: np.random.Generator, layers: list[str]) -> list[str]:
    """Names in any order: a plan must not count positions."""
    inside = [f"{layer}.{part}" for layer in layers for part in ("conv.weight", "norm.bias")]
    names = [*inside, "head.weight", "head.bias"]
    return [names[i] for i in rng.permutation(len(names))]


def plan(parameters: list[str], layers: list[str], n: int, frozen: bool) -> dict[str, str]:
    lower = tuple(layer + "." for layer in layers[:n])
    copied = "copied, frozen" if frozen else "copied, trained"
    return {name: copied if name.startswith(lower) else "new, trained" for name in parameters}


def _plan_without_dot(parameters, layers, n, frozen):
    copied = "copied, frozen" if frozen else "copied, trained"
    lower = tuple(layers[:n])
    return {name: copied if name.startswith(lower) else "new, trained" for name in parameters}


def _plan_head_too(parameters, layers, n, frozen):
    found = plan(parameters, layers, n, frozen)
    if n == len(layers) and frozen:
        return dict.fromkeys(parameters, "copied, frozen")
    return found


def _plan_upper(parameters, layers, n, frozen):
    """Copies what lies above the cut."""
    copied = "copied, frozen" if frozen else "copied, trained"
    upper = tuple(layer + "." for layer in layers[n:])
    return {name: copied if name.startswith(upper) else "new, trained" for name in parameters}


def hint_q1(case: tuple, expected: dict[str, str], got: object) -> str:
    parameters, layers, n, _ = case
    if not isinstance(got, dict) or set(got) != set(parameters):
        return "return a dict with every parameter's name as a key, and no other."
    wrong = [name for name in parameters if got[name] != expected[name]]
    if any(name.startswith("head.") for name in wrong):
        return "the head is always new and trained: it belongs to another task."
    if any(str(got[name]).split(",")[0] == expected[name].split(",")[0] for name in wrong):
        return "only copied layers are frozen, and only if frozen is True."
    if len(layers) > 10:
        return f"look at {wrong[0]!r}. Compare with the layer's name *and a dot*."
    return f"the first n = {n} layers are copied: {layers[:n]}."


# --- 07.q2 the price of a cut --------------------------------------------------------------


def cases_q2(rng: np.random.Generator) -> list[tuple]:
    """Nothing frozen, something frozen, everything but the head."""
    cases = []
    for depth, pick in ((2, "none"), (4, "some"), (5, "some"), (3, "head")):
        widths = [int(width) for width in rng.integers(2, 9, size=depth + 1)]
        sides = [int(side) for side in np.sort(rng.integers(2, 9, size=depth))[::-1]]
        kernels = [int(kernel) for kernel in rng.choice([3, 5], size=depth)]
        layers = [(widths[i], widths[i + 1], kernels[i], sides[i]) for i in range(depth)]
        layers.append((widths[-1], 10, 1, 1))
        n = {"none": 0, "some": int(rng.integers(1, depth)), "head": depth}[pick]
        cases.append((layers, n))
    return cases


def price(layers: list[tuple[int, int, int, int]], n: int) -> dict[str, int]:
    cost = [a * b * kernel**2 * side**2 for a, b, kernel, side in layers]
    return {"forward": sum(cost), "backward": sum(cost[n:]) + sum(cost[n + 1 :])}


def _price(backward):
    """A wrong answer: another backward pass, from the costs of the layers and n."""

    def wrong(layers, n):
        cost = [a * b * kernel**2 * side**2 for a, b, kernel, side in layers]
        return {"forward": sum(cost), "backward": backward(cost, n)}

    return wrong


def _price_of_kernels(exponent_kernel, exponent_side):
    def wrong(layers, n):
        cost = [a * b * k**exponent_kernel * s**exponent_side for a, b, k, s in layers]
        return {"forward": sum(cost), "backward": sum(cost[n:]) + sum(cost[n + 1 :])}

    return wrong


def _price_forward_shrinks(layers, n):
    found = price(layers, n)
    return found | {"forward": price(layers[n:], 0)["forward"]}


def hint_q2(case: tuple, expected: dict[str, int], got: object) -> str:
    layers, n = case
    if not isinstance(got, dict) or set(got) != {"forward", "backward"}:
        return "return a dict with the keys 'forward' and 'backward'."
    if got["forward"] != expected["forward"]:
        if got["forward"] == price(layers[n:], 0)["forward"]:
            return "frozen layers still run forward."
        return "forward is the sum of C_in C_out k^2 S^2 over all layers, frozen or not."
    cost = [a * b * kernel**2 * side**2 for a, b, kernel, side in layers]
    if got["backward"] == 2 * sum(cost[n:]):
        return "the lowest trained layer need not pass a gradient further down."
    if got["backward"] == sum(cost[n:]) + sum(cost[1:]):
        return "an input product is needed only where something *below* is trained."
    return "weight products where the layer is trained, input products where anything below is."


# --- 07.q3 linear CKA ----------------------------------------------------------------------


def cases_q3(rng: np.random.Generator) -> list[tuple]:
    """Related descriptions of different widths, far from the origin; more features than images."""
    cases = []
    for num, p, q, shift in ((20, 4, 6, 0.0), (30, 5, 3, 4.0), (8, 40, 25, 1.0)):
        x = rng.normal(size=(num, p)) * rng.uniform(0.5, 3, size=p) + shift
        y = x @ rng.normal(size=(p, q)) / np.sqrt(p) + rng.normal(size=(num, q)) - shift
        cases.append((x, y))
    return cases


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    k, m = x @ x.T, y @ y.T
    return float((k * m).sum() / (np.linalg.norm(k) * np.linalg.norm(m)))


def _cka_uncentred(x, y):
    k, m = x @ x.T, y @ y.T
    return float((k * m).sum() / (np.linalg.norm(k) * np.linalg.norm(m)))


def _cka_centred_by_image(x, y):
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    return _cka_uncentred(x, y)


def _cka_standardised(x, y):
    return linear_cka(x / x.std(axis=0), y / y.std(axis=0))


def _cka_norm_not_squared(x, y):
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    norm = np.linalg.norm
    return float(norm(x.T @ y) / np.sqrt(norm(x.T @ x) * norm(y.T @ y)))


def _cka_product_of_features(x, y):
    """Divides by the sizes of X and Y, not of their similarities."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return float(np.square(x.T @ y).sum() / (np.square(x).sum() * np.square(y).sum()))


def hint_q3(case: tuple, expected: float, got: object) -> str:
    x, y = case
    if not isinstance(got, float | int) or isinstance(got, bool):
        return "return one number."
    variants = {
        _cka_uncentred: "centre first: subtract the mean of each column (axis=0).",
        _cka_centred_by_image: "centre the columns: the mean over the *images*, axis=0.",
        _cka_norm_not_squared: "HSIC is the *squared* norm of X^T Y.",
        _cka_standardised: "leave the scale of the features alone.",
    }
    for variant, words in variants.items():
        if abs(got - variant(x, y)) < 1e-6:
            return words
    return "the cosine of K = X X^T and L = Y Y^T, after centring: sum(K * L) / (|K| |L|)."


# --- 07.q4 without the bias ----------------------------------------------------------------


def cases_q4(rng: np.random.Generator) -> list[tuple]:
    """As in q3, and pure noise with more features than images."""
    return [*cases_q3(rng), (rng.normal(size=(12, 60)), rng.normal(size=(12, 30)))]


def _zero_diagonal(z: np.ndarray) -> np.ndarray:
    k = z @ z.T
    np.fill_diagonal(k, 0)
    return k


def _debiased(x, y, mean_part: float = 1.0, rows_part: float = 2.0, shift: int = 0) -> float:
    """CKA from the unbiased HSIC; other arguments make wrong answers."""
    num = len(x)

    def hsic(k, m):
        mean = mean_part * k.sum() * m.sum() / ((num - 1 + shift) * (num - 2 + shift))
        rows = rows_part * (k.sum(axis=0) @ m.sum(axis=0)) / (num - 2 + shift)
        return (k * m).sum() + mean - rows

    k, m = _zero_diagonal(x), _zero_diagonal(y)
    with np.errstate(invalid="ignore"):
        return float(hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m)))


def debiased_cka(x: np.ndarray, y: np.ndarray) -> float:
    # Centring changes nothing in the result, and keeps the numbers small.
    return _debiased(x - x.mean(axis=0), y - y.mean(axis=0))


def _diagonal_only(x, y):
    """Centred, diagonal left out, and nothing else done about it."""
    k, m = (_zero_diagonal(z - z.mean(axis=0)) for z in (x, y))
    return float((k * m).sum() / (np.linalg.norm(k) * np.linalg.norm(m)))


def _plain_denominator(x, y):
    """Unbiased above, plain below."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    num = len(x)
    k, m = _zero_diagonal(x), _zero_diagonal(y)
    mean = k.sum() * m.sum() / ((num - 1) * (num - 2))
    above = (k * m).sum() + mean - 2 * (k.sum(axis=0) @ m.sum(axis=0)) / (num - 2)
    return float(above / (np.linalg.norm(x @ x.T) * np.linalg.norm(y @ y.T)))


def hint_q4(case: tuple, expected: float, got: object) -> str:
    x, y = case
    if not isinstance(got, float | int) or isinstance(got, bool):
        return "return one number."
    if abs(got - linear_cka(x, y)) < 1e-6:
        return "that is the plain estimate. Set the diagonals to zero, and add the two corrections."
    if abs(got - _diagonal_only(x, y)) < 1e-6:
        return "the diagonal is gone, but the two other terms of the formula are missing."
    if abs(got - _plain_denominator(x, y)) < 1e-6:
        return "use the unbiased HSIC three times: of (x, y), of (x, x) and of (y, y)."
    return (
        "1^T K 1 is the sum of all entries; 1^T K L 1 is the dot product of the row sums of K "
        "with those of L. Do not forget the 2."
    )


# --- 07.q5 name the cause ------------------------------------------------------------------

# The two losses at a cut, as fractions: by freezing, by specificity.
LOSSES = {"neither": (0.0, 0.0), "freezing": (0.2, 0.0), "specificity": (0.0, 0.2)}
LOSSES |= {"both": (0.2, 0.2), "gain": (-0.2, -0.2)}


def cases_q5(rng: np.random.Generator) -> list[tuple]:
    """Every cause once, in a random order; draws differ more than the arms do, so pairing counts."""
    cases = []
    for num_draws, noise in ((5, 0.01), (8, 0.02)):
        losses = np.array(list(LOSSES.values()))[rng.permutation(len(LOSSES))]
        shape = (num_draws, len(losses))
        selfer = rng.uniform(0.3, 0.9, size=(num_draws, 1)) + noise * rng.normal(size=shape)
        selfer_plus = selfer + losses[:, 0] + _balanced(rng, noise, shape)
        copied = selfer - losses[:, 1] + _balanced(rng, noise, shape)
        cases.append((selfer_plus, selfer, copied))
    # A large mean loss that is all one draw's: an interval sees it, a mean does not.
    selfer = rng.uniform(0.4, 0.5, size=(5, 1))
    lonely = selfer + np.array([[0.4], [0.01], [-0.01], [0.02], [-0.02]])
    cases.append((lonely, selfer, selfer - 0.2 + _balanced(rng, 0.01, (5, 1))))
    return cases


def _balanced(rng: np.random.Generator, noise: float, shape: tuple[int, int]) -> np.ndarray:
    """Noise whose mean over the draws is zero, so that "no loss" is never a near miss."""
    values = noise * rng.normal(size=shape)
    return values - values.mean(axis=0)


def _low(values: np.ndarray) -> float:
    """Lower end of the 95 % interval of the mean."""
    num = len(values)
    return float(values.mean() - stdtrit(num - 1, 0.975) * values.std(ddof=1) / np.sqrt(num))


def _name(co_adapted: bool, specific: bool) -> str:
    if co_adapted and specific:
        return "both"
    return "freezing" if co_adapted else "specificity" if specific else "neither"


def _decide(lost, first=lambda p, s, c: (p, s), second=lambda p, s, c: (s, c)):
    """An answer that calls ``lost(better, worse)`` for the two pairs of each cut."""

    def answer(selfer_plus, selfer, copied):
        cuts = zip(selfer_plus.T, selfer.T, copied.T, strict=True)
        return [_name(lost(*first(*cut)), lost(*second(*cut))) for cut in cuts]

    return answer


def _lost(better: np.ndarray, worse: np.ndarray) -> bool:
    return _low(better - worse) > 0


def _lost_unpaired(better, worse):
    """The intervals of the two arms must not overlap."""
    high = worse.mean() + (worse.mean() - _low(worse))
    return _low(better) > high


def _lost_by_the_mean(better, worse):
    return better.mean() - worse.mean() > 0.01


causes = _decide(_lost)
_against_plus = _decide(_lost, second=lambda p, s, c: (p, c))
_swapped = _decide(_lost, first=lambda p, s, c: (s, c), second=lambda p, s, c: (p, s))
_wrong_sign = _decide(lambda better, worse: _lost(worse, better))


def _two_sided(better, worse):
    """Any difference counts, a gain as well."""
    return _lost(better, worse) or _lost(worse, better)


def hint_q5(case: tuple, expected: list[str], got: object) -> str:
    if not isinstance(got, list) or len(got) != len(expected):
        return f"return a list with one text for each of the {len(expected)} cuts."
    if set(got) - {"freezing", "specificity", "both", "neither"}:
        return "use the four texts of the question."
    variants = {
        _against_plus: "specificity compares AnB with BnB, not with BnB+: both are frozen.",
        _swapped: "BnB+ against BnB is freezing; BnB against AnB is specificity.",
        _wrong_sign: "a loss is (better - worse) > 0. Yours finds gains.",
        _decide(_two_sided): "a gain is no loss: look at the lower end of (better - worse).",
        _decide(_lost_unpaired): "take the interval of the *difference*, draw by draw.",
        _decide(_lost_by_the_mean): "a mean is not enough: its interval must lie above zero.",
    }
    for variant, words in variants.items():
        if got == variant(*case):
            return words
    return "at each cut, two paired intervals: BnB+ minus BnB, and BnB minus AnB. Is .low > 0?"


# --- 07.q6 judgement -----------------------------------------------------------------------

RUBRIC = """\
4 points; 1 for each, half marks allowed.
1. The estimate: with 12,544 features and 50 images the plain CKA is close to 1 for anything (about
   p / (p + N) = 0.996 for noise); asks for the debiased estimate, or many more images.
2. The meaning of CKA: names a floor (a random network, or the pixels) without which 0.97 says
   nothing, or another seed of the same recipe as a ceiling for 0.30; and says that alike is not
   useful (low CKA does not make a layer useless as a starting point).
3. The experiment: several things were changed at once (stem frozen, upper layers new, rate and
   steps), so that 0.81 -> 0.74 does not prove specificity. Names at least two missing networks:
   AnB+ at the same cut, all layers copied with the stem frozen, selfers BnB / BnB+ for
   co-adaptation, random frozen layers, scratch.
4. Next step: a concrete, fair comparison, with the pre-trained upper layers kept in one arm, a rate
   of its own for each arm, and several paired draws with intervals; chosen on validation.
"""

QUESTIONS = [
    Question(
        id="07.q1",
        title="The plan of a transplant",
        points=2,
        cases=cases_q1,
        expected=plan,
        hint=hint_q1,
        wrong={
            "no dot": _plan_without_dot,
            "one layer too many": lambda p, layers, n, f: plan(p, layers, n + 1, f)
            if n < len(layers)
            else plan(p, [*layers, "head"], n + 1, f),
            "one layer too few": lambda p, layers, n, f: plan(p, layers, max(n - 1, 0), f),
            "always frozen": lambda p, layers, n, f: plan(p, layers, n, True),
            "never frozen": lambda p, layers, n, f: plan(p, layers, n, False),
            "head copied at the top cut": _plan_head_too,
            "upper layers": _plan_upper,
            "layers in alphabetical order": lambda p, layers, n, f: plan(p, sorted(layers), n, f),
        },
    ),
    Question(
        id="07.q2",
        title="The price of a cut",
        points=3,
        cases=cases_q2,
        expected=price,
        hint=hint_q2,
        wrong={
            "lowest input product": _price(lambda cost, n: 2 * sum(cost[n:])),
            "all input products": _price(lambda cost, n: sum(cost[n:]) + sum(cost[1:])),
            "weight products only": _price(lambda cost, n: sum(cost[n:])),
            "nothing saved": _price(lambda cost, n: 2 * sum(cost) - cost[0]),
            "kernel not squared": _price_of_kernels(1, 2),
            "weights, not places": _price_of_kernels(2, 0),
            "forward shrinks": _price_forward_shrinks,
        },
    ),
    Question(
        id="07.q3",
        title="Linear CKA",
        points=3,
        cases=cases_q3,
        expected=linear_cka,
        hint=hint_q3,
        wrong={
            "not centred": _cka_uncentred,
            "centred by image": _cka_centred_by_image,
            "standardised": _cka_standardised,
            "norm not squared": _cka_norm_not_squared,
            "divided by the sizes of X and Y": _cka_product_of_features,
            "debiased": debiased_cka,
        },
    ),
    Question(
        id="07.q4",
        title="Without the bias",
        points=4,
        cases=cases_q4,
        expected=debiased_cka,
        hint=hint_q4,
        wrong={
            "plain": linear_cka,
            "diagonal only": _diagonal_only,
            "no mean term": lambda x, y: _debiased(x, y, mean_part=0.0),
            "one, not two": lambda x, y: _debiased(x, y, rows_part=1.0),
            "N for N - 2": lambda x, y: _debiased(x, y, shift=2),
            "plain denominator": _plain_denominator,
        },
    ),
    Question(
        id="07.q5",
        title="Name the cause",
        points=4,
        cases=cases_q5,
        expected=causes,
        hint=hint_q5,
        wrong={
            "unpaired": _decide(_lost_unpaired),
            "means only": _decide(_lost_by_the_mean),
            "specificity against BnB+": _against_plus,
            "causes swapped": _swapped,
            "sign": _wrong_sign,
            "gains count": _decide(_two_sided),
        },
    ),
    Question(id="07.q6", title="Judgement: three conclusions", points=4, manual=True, rubric=RUBRIC),
]
