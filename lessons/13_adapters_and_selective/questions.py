"""Graded questions of lesson 13: folding, the way back, a bottleneck, what a diagonal reaches."""

from __future__ import annotations

import numpy as np

from tlcourse.checks import Question

Arrays = dict[str, np.ndarray]


def alike(a: object, b: object) -> bool:
    """Arrays of the same shape and values; False for what is no array of numbers."""
    try:
        first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    except (TypeError, ValueError):
        return False
    return first.shape == second.shape and bool(np.allclose(first, second, rtol=1e-6, atol=1e-9))


# --- 13.q1 fold ----------------------------------------------------------------------------


def cases_q1(rng: np.random.Generator) -> list[tuple]:
    """Square, tall, wide; scales of both signs, and one that is zero."""
    cases = []
    for o, i in ((4, 4), (5, 3), (2, 6)):
        scale_in, scale_out = rng.normal(size=i), rng.normal(size=o)
        scale_out[0] = 0.0 if (o, i) == (5, 3) else scale_out[0]
        cases.append((rng.normal(size=(o, i)), rng.normal(size=o), scale_in, scale_out))
    return cases


def fold(W, b, scale_in, scale_out) -> tuple[np.ndarray, np.ndarray]:
    return scale_out[:, None] * W * scale_in, scale_out * b


def _bias_left(W, b, scale_in, scale_out):
    return fold(W, b, scale_in, scale_out)[0], b


def _outputs_only(W, b, scale_in, scale_out):
    return scale_out[:, None] * W, scale_out * b


def _inputs_only(W, b, scale_in, scale_out):
    return W * scale_in, b


def _exchanged(W, b, scale_in, scale_out):
    """Rows by the scale of the inputs, columns by that of the outputs, where the sizes allow it."""
    if W.shape[0] != W.shape[1]:
        return fold(W, b, scale_in, scale_out)
    return scale_in[:, None] * W * scale_out, scale_out * b


def _bias_doubly(W, b, scale_in, scale_out):
    """Scales the bias by the mean of the other vector as well."""
    return fold(W, b, scale_in, scale_out)[0], scale_out * b * scale_in.mean()


def _divided(W, b, scale_in, scale_out):
    """Undoes what should be done."""
    safe = np.where(scale_out == 0, 1.0, scale_out)
    return W / safe[:, None] / scale_in, b / safe


def _ones_added(W, b, scale_in, scale_out):
    return (1 + scale_out)[:, None] * W * (1 + scale_in), (1 + scale_out) * b


def hint_q1(case: tuple, expected: list, got: object) -> str:
    W, b, _, scale_out = case
    if not isinstance(got, (list, tuple)) or len(got) != 2:
        return "return the weight and the bias."
    weight, bias = got
    if np.shape(weight) != W.shape:
        return f"the weight must keep its shape {W.shape}."
    if alike(weight, _exchanged(*case)[0]) and not alike(weight, expected[0]):
        return "outputs belong to rows, inputs to columns."
    if alike(weight, _outputs_only(*case)[0]):
        return "the inputs are scaled, too: that is the columns of W."
    if alike(weight, _inputs_only(*case)[0]):
        return "the outputs are scaled, too: that is the rows of W."
    if alike(weight, _ones_added(*case)[0]):
        return "the vectors themselves are the factors; one is where they start, not added."
    if not alike(weight, expected[0]):
        return "the entry (j, k) of W is multiplied by scale_out[j] and by scale_in[k]."
    if alike(bias, b):
        return "the output scale stands outside the bracket: it multiplies the bias as well."
    return "the bias is added after the inputs were scaled: only the output scale meets it."


# --- 13.q2 the way back --------------------------------------------------------------------


def cases_q2(rng: np.random.Generator) -> list[tuple]:
    """A bias in the middle, everything, biases alone, the last layers, a gap, the first layer."""
    patterns = [
        ((0, 1, 0, 0, 1), (0, 0, 1, 0, 0)),
        ((1, 1, 1), (1, 1, 1)),
        ((0, 0, 0, 0), (1, 1, 1, 1)),
        ((0, 0, 1, 1), (0, 0, 1, 1)),
        ((0, 1, 0, 0), (0, 0, 0, 0)),
        ((1, 0, 0), (0, 0, 0)),
    ]
    cases = []
    for weights, biases in patterns:
        widths = rng.integers(3, 30, size=len(weights) + 1)
        shapes = np.stack([widths[1:], widths[:-1]], axis=1)
        on = [[bool(x) for x in row] for row in (weights, biases)]
        cases.append((shapes, *on, int(rng.integers(2, 9))))
    return cases


def backward_work(shapes, weights, biases, rows) -> int:
    return _work(shapes, weights, biases, rows)


def _work(shapes, weights, biases, rows, count_weight=None, needs_input=None) -> int:
    """The rule with one of its two halves changed."""
    total, below = 0, False
    for k, (outputs, inputs) in enumerate(np.asarray(shapes).tolist()):
        own = weights[k] if count_weight is None else count_weight(weights[k], biases[k])
        passes = below if needs_input is None else needs_input(k, below, weights[k] or biases[k])
        total += rows * outputs * inputs * (int(own) + int(passes))
        below = below or weights[k] or biases[k]
    return int(total)


def _always_two(shapes, weights, biases, rows):
    """Full fine-tuning, whatever is trained."""
    return _work(shapes, weights, biases, rows, lambda w, b: True, lambda k, below, own: True)


def _to_the_data(shapes, weights, biases, rows):
    """Asks for the gradient of the data, too, if anything is trained anywhere."""
    anything = any(weights) or any(biases)
    return _work(shapes, weights, biases, rows, None, lambda k, below, own: anything)


def _frozen_stops(shapes, weights, biases, rows):
    """No gradient passes a frozen weight."""
    return _work(
        shapes, weights, biases, rows, None, lambda k, below, own: below and weights[k]
    )


def _bias_is_a_product(shapes, weights, biases, rows):
    return _work(shapes, weights, biases, rows, lambda w, b: w or b)


def _own_counts(shapes, weights, biases, rows):
    """Takes the layer itself for one below it."""
    return _work(shapes, weights, biases, rows, None, lambda k, below, own: below or own)


def _weights_only_below(shapes, weights, biases, rows):
    """Forgets that a trained bias below needs the gradient as well."""
    return _work(
        shapes, weights, biases, rows, None, lambda k, below, own: any(weights[:k])
    )


def _no_rows(shapes, weights, biases, rows):
    return _work(shapes, weights, biases, 1)


def _from_above(shapes, weights, biases, rows):
    """Looks at the layers above in place of those below."""
    above = [any(weights[k + 1 :]) or any(biases[k + 1 :]) for k in range(len(weights))]
    return _work(shapes, weights, biases, rows, None, lambda k, below, own: above[k])


def hint_q2(case: tuple, expected: int, got: object) -> str:
    if isinstance(got, bool) or not isinstance(got, (int, float)):
        return "return a number of multiplications."
    for text, wrong in {
        "rows is missing: a product of (n, a) with (a, c) costs n a c.": _no_rows,
        "not everything is trained: a frozen weight needs no gradient of its own.": _always_two,
        "the gradient of the data is not asked for: nothing below the first layer.": _to_the_data,
        "a trained bias below needs the gradient, too.": _weights_only_below,
        "a frozen weight carries the gradient on, if something below is trained.": _frozen_stops,
        "the gradient of a bias is a sum over the rows, no product.": _bias_is_a_product,
        "the gradient of a layer's input serves the layers below it, not itself.": _own_counts,
        "the gradient goes down: look at the layers below, not at those above.": _from_above,
    }.items():
        other = wrong(*case)
        if got == other and other != expected:
            return text
    return "each layer: one product if its weight is trained, one more if anything below is."


# --- 13.q3 back through a bottleneck -------------------------------------------------------


def cases_q3(rng: np.random.Generator) -> list[tuple]:
    """Several texts and tokens; a bottleneck with U = 0; one text of one token."""
    cases = []
    for texts, tokens, d, m in ((2, 3, 5, 2), (3, 2, 4, 3), (1, 1, 6, 4)):
        H, G = rng.normal(size=(2, texts, tokens, d))
        D, c, U = rng.normal(size=(m, d)), rng.normal(size=m), rng.normal(size=(d, m))
        cases.append((H, G, D, c, U))
    H, G = rng.normal(size=(2, 2, 2, 4))
    cases.append((H, G, rng.normal(size=(2, 4)), rng.normal(size=2), np.zeros((4, 2))))
    return cases


def bottleneck_backward(H, G, D, c, U) -> Arrays:
    return _bottleneck(H, G, D, c, U)


def _bottleneck(H, G, D, c, U, gate=True, with_c=True, scale=1.0, cut=True) -> Arrays:
    rows, arriving = H.reshape(-1, H.shape[-1]), scale * G.reshape(-1, G.shape[-1])
    A = rows @ D.T + (c if with_c else 0)
    dA = (arriving @ U) * ((A > 0) if gate else 1)
    return {
        "D": dA.T @ rows,
        "c": dA.sum(axis=0),
        "U": arriving.T @ np.maximum(A, 0),
        "e": arriving.sum(axis=0),
        "H": (G if cut else 0 * G) + (dA @ D).reshape(H.shape) / scale,
    }


def _no_shortcut(H, G, D, c, U):
    return _bottleneck(H, G, D, c, U, cut=False)


def _no_gate(H, G, D, c, U):
    return _bottleneck(H, G, D, c, U, gate=False)


def _no_bias_inside(H, G, D, c, U):
    return _bottleneck(H, G, D, c, U, with_c=False)


def _mean_over_tokens(H, G, D, c, U):
    return _bottleneck(H, G, D, c, U, scale=1 / (H.shape[0] * H.shape[1]))


def _only_shortcut(H, G, D, c, U):
    return _bottleneck(H, G, D, c, U) | {"H": G}


def _U_without_relu(H, G, D, c, U):
    """What went into U is the output of the ReLU, not its input."""
    A = (H @ D.T + c).reshape(-1, len(c))
    return _bottleneck(H, G, D, c, U) | {"U": G.reshape(-1, G.shape[-1]).T @ A}


def _per_token_biases(H, G, D, c, U):
    """Sums over the texts, not over the tokens, where there is more than one."""
    found = _bottleneck(H, G, D, c, U)
    return found | {"e": G.sum(axis=0)[0], "c": found["c"] * (1 / H.shape[1])}


def _U_transposed(H, G, D, c, U):
    found = _bottleneck(H, G, D, c, U)
    return found | {"U": found["U"].T}


def hint_q3(case: tuple, expected: Arrays, got: object) -> str:
    if not isinstance(got, dict) or set(got) != set(expected):
        return "return a dict with the keys 'D', 'c', 'U', 'e' and 'H'."
    for name in expected:
        if np.shape(got[name]) != np.shape(expected[name]):
            return f"the gradient of {name} must have the shape of {name}, {np.shape(expected[name])}."

    def is_like(name: str, wrong) -> bool:
        other = wrong(*case)[name]
        return alike(got[name], other) and not alike(other, expected[name])

    if is_like("e", _mean_over_tokens):
        return "sum over texts and tokens, no mean: the 1/n is in G."
    if not alike(got["e"], expected["e"]):
        return "e is felt in every token of every text: sum G over both axes."
    if is_like("U", _U_without_relu):
        return "U was multiplied with S, the output of the ReLU, not with A."
    if is_like("U", _no_bias_inside):
        return "A = H D^T + c: the bias c decides which units are on."
    if is_like("D", _no_gate):
        return "where A <= 0 the ReLU lets nothing through: the slope is 0 there."
    if is_like("H", _no_shortcut):
        return "h is felt on the short cut as well: add G."
    if is_like("H", _only_shortcut):
        return "h is felt through D as well: add dA D."
    return "dS = G U, dA = dS where A > 0, dD = dA^T H, dH = G + dA D."


# --- 13.q4 what a diagonal can reach -------------------------------------------------------


def cases_q4(rng: np.random.Generator) -> list[tuple]:
    """Rows and columns; a change that is a diagonal's own; square and other matrices."""
    cases = []
    for o, i, columns in ((4, 6, False), (6, 4, True), (5, 5, False), (5, 5, True)):
        W = rng.normal(size=(o, i)) + 0.5
        cases.append((W, rng.normal(size=(o, i)) + 0.4 * W, columns))
    W = rng.normal(size=(3, 5))
    cases.append((W, rng.normal(size=(3, 1)) * W, False))
    return cases


def best_scales(W, change, columns) -> tuple[np.ndarray, float]:
    along = _along(W, change, 0 if columns else 1)
    return 1 + along, _share(W, change, columns, along)


def _along(W, change, axis) -> np.ndarray:
    return np.sum(change * W, axis=axis) / np.sum(W**2, axis=axis)


def _share(W, change, columns, along) -> float:
    fitted = along * W if columns else along[:, None] * W
    return float(1 - np.sum((change - fitted) ** 2) / np.sum(change**2))


def _without_one(W, change, columns):
    """The scales of the change, not of the matrix."""
    scales, share = best_scales(W, change, columns)
    return scales - 1, share


def _other_axis(W, change, columns):
    return best_scales(W, change, not columns)


def _length_not_square(W, change, columns):
    axis = 0 if columns else 1
    along = np.sum(change * W, axis=axis) / np.linalg.norm(W, axis=axis)
    return 1 + along, best_scales(W, change, columns)[1]


def _ratio_of_lengths(W, change, columns):
    """As long as the new rows, whatever their direction."""
    axis = 0 if columns else 1
    scales = np.linalg.norm(W + change, axis=axis) / np.linalg.norm(W, axis=axis)
    return scales, best_scales(W, change, columns)[1]


def _mean_ratio(W, change, columns):
    scales = 1 + np.mean(change / W, axis=0 if columns else 1)
    return scales, best_scales(W, change, columns)[1]


def _share_left(W, change, columns):
    scales, share = best_scales(W, change, columns)
    return scales, 1 - share


def _share_not_squared(W, change, columns):
    """Of lengths instead of squares."""
    scales, share = best_scales(W, change, columns)
    return scales, share**0.5


def _share_of_all(W, change, columns):
    """Of the squares of the new matrix, not of the change."""
    scales, share = best_scales(W, change, columns)
    left = (1 - share) * np.sum(change**2)
    return scales, float(1 - left / np.sum((W + change) ** 2)) - 1e-3 * (left < 1e-12)


def _mean_of_shares(W, change, columns):
    """The mean over rows of each row's own share."""
    axis = 0 if columns else 1
    cosines = np.sum(change * W, axis=axis) ** 2
    cosines = cosines / np.sum(W**2, axis=axis) / np.sum(change**2, axis=axis)
    return best_scales(W, change, columns)[0], float(cosines.mean())


def hint_q4(case: tuple, expected: list, got: object) -> str:
    W, _, columns = case
    if not isinstance(got, (list, tuple)) or len(got) != 2:
        return "return the scales and the share that is reached."
    scales, share = got
    if np.shape(scales) != np.shape(expected[0]):
        many = W.shape[1] if columns else W.shape[0]
        return f"one scale for each {'column' if columns else 'row'}: {many} of them."
    if alike(scales, _without_one(*case)[0]):
        return "that is k - 1, what is added: a scale of 1 means no change."
    if W.shape[0] == W.shape[1] and alike(scales, _other_axis(*case)[0]):
        return "rows and columns are exchanged."
    if not alike(scales, expected[0]):
        return "project each row (or column) of the change on that of W: (change . w) / (w . w)."
    if alike(share, 1 - expected[1]):
        return "that is the share that is left."
    if alike(share, _share_not_squared(*case)[1]):
        return "the share is one of squares, not of lengths."
    if alike(share, _share_of_all(*case)[1]):
        return "divide by the squares of the change, not by those of the new matrix."
    if alike(share, _mean_of_shares(*case)[1]):
        return "sum the squares over all rows first, then divide: long rows count more."
    return "one minus the squares of what is left of the change, over the squares of the change."


# --- 13.q5 judgement -----------------------------------------------------------------------

RUBRIC = """\
4 points; 1 for each, half marks allowed.
1. Memory and backward pass: the frozen weights stay (a factor of at most 4 in float32 with AdamW);
   the activations of (IA)3 shrink little, since it must keep what it scales (BitFit keeps less,
   last layers much less); the gradient travels through every frozen matrix, so about one forward
   of two backward remains. Both halves for the full point.
2. The comparison: full fine-tuning had one rate, that of 10,000 tickets, (IA)3 the best of six;
   the best was taken on the test set. Asks for rates tuned on validation for this number of
   labels, paired draws, the interval of the difference, or a head-only control.
3. The crossing was not measured; it may come from the one fixed rate. It must be measured, with
   rates tuned at each number of labels.
4. Folding can be undone (keep the old weight, or the vector) and makes answers as fast as before;
   a scale of zero silences a unit, and no product revives what is zero. Names a sensible first
   step (such as repeating the comparison with tuned rates).
"""

QUESTIONS = [
    Question(
        id="13.q1",
        title="Fold the vectors away",
        points=3,
        cases=cases_q1,
        expected=fold,
        hint=hint_q1,
        wrong={
            "bias as it was": _bias_left,
            "outputs only": _outputs_only,
            "inputs only": _inputs_only,
            "rows and columns exchanged": _exchanged,
            "bias scaled by both": _bias_doubly,
            "divided": _divided,
            "one added": _ones_added,
        },
    ),
    Question(
        id="13.q2",
        title="How long is the way back?",
        points=3,
        cases=cases_q2,
        expected=backward_work,
        rtol=0,
        atol=0,
        hint=hint_q2,
        wrong={
            "always two products": _always_two,
            "down to the data": _to_the_data,
            "a frozen weight stops the gradient": _frozen_stops,
            "a bias costs a product": _bias_is_a_product,
            "the layer itself counts as below": _own_counts,
            "only weights below count": _weights_only_below,
            "no rows": _no_rows,
            "looks above": _from_above,
        },
    ),
    Question(
        id="13.q3",
        title="Back through a bottleneck",
        points=4,
        cases=cases_q3,
        expected=bottleneck_backward,
        hint=hint_q3,
        wrong={
            "no short cut": _no_shortcut,
            "only the short cut": _only_shortcut,
            "no gate": _no_gate,
            "no bias inside": _no_bias_inside,
            "mean over the tokens": _mean_over_tokens,
            "U without the ReLU": _U_without_relu,
            "biases of the first token": _per_token_biases,
            "U transposed": _U_transposed,
        },
    ),
    Question(
        id="13.q4",
        title="What a diagonal can reach",
        points=4,
        cases=cases_q4,
        expected=best_scales,
        hint=hint_q4,
        wrong={
            "scales of the change": _without_one,
            "the other axis": _other_axis,
            "divided by the length": _length_not_square,
            "ratio of lengths": _ratio_of_lengths,
            "mean of ratios": _mean_ratio,
            "share that is left": _share_left,
            "share of lengths": _share_not_squared,
            "share of the new matrix": _share_of_all,
            "mean of the rows' shares": _mean_of_shares,
        },
    ),
    Question(
        id="13.q5",
        title="Judgement: a report about (IA)3",
        points=4,
        manual=True,
        rubric=RUBRIC,
    ),
]
