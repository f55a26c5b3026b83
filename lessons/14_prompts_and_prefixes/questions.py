"""Graded questions of lesson 14: the gate, its undoing, gradients, pooling, the account."""

from __future__ import annotations

import numpy as np

from tlcourse.checks import Question

Arrays = dict[str, np.ndarray]


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores)
    return weights / weights.sum(axis=1, keepdims=True)


def _same(a: object, b: object) -> bool:
    return np.shape(a) == np.shape(b) and bool(np.allclose(a, b, rtol=1e-6, atol=1e-9))


# --- 14.q1 the gate ------------------------------------------------------------------------


def cases_q1(rng: np.random.Generator) -> list[tuple]:
    """Padding at the end, none, in front; one virtual token and several; a key that takes all."""
    cases = []
    for N, T, P, d, padded in ((3, 5, 2, 4, 2), (2, 4, 1, 6, 0), (4, 6, 3, 3, -1), (2, 3, 4, 5, 1)):
        q, K, V = rng.normal(size=(N, d)), rng.normal(size=(T, d)), rng.normal(size=(T, d))
        mask = np.ones(T, dtype=np.int64)
        if padded:
            mask[-padded if padded > 0 else slice(0, 2)] = 0
        prefix_K, prefix_V = rng.normal(size=(2, P, d))
        if len(cases) == 3:
            prefix_K[0] += 3 * q[0]
        cases.append((q, K, V, mask, prefix_K, prefix_V))
    return cases


def gated_attention(q, K, V, mask, prefix_K, prefix_V) -> Arrays:
    return _gated(q, K, V, mask, prefix_K, prefix_V, np.sqrt(q.shape[1]))


def _gated(q, K, V, mask, prefix_K, prefix_V, scale) -> Arrays:
    words, prefix = np.exp(q @ K.T / scale) * mask, np.exp(q @ prefix_K.T / scale)
    total = words.sum(axis=1) + prefix.sum(axis=1)
    output = (words @ V + prefix @ prefix_V) / total[:, None]
    return {"gate": prefix.sum(axis=1) / total, "output": output}


def _gate_no_root(q, K, V, mask, prefix_K, prefix_V):
    return _gated(q, K, V, mask, prefix_K, prefix_V, 1.0)


def _gate_by_d(q, K, V, mask, prefix_K, prefix_V):
    return _gated(q, K, V, mask, prefix_K, prefix_V, q.shape[1])


def _gate_no_mask(q, K, V, mask, prefix_K, prefix_V):
    return gated_attention(q, K, V, np.ones_like(mask), prefix_K, prefix_V)


def _gate_masked_keys(q, K, V, mask, prefix_K, prefix_V):
    """Zeroes the keys of padding, so that their score is 0 and their weight is not."""
    return gated_attention(
        q, K * mask[:, None], V * mask[:, None], mask * 0 + 1, prefix_K, prefix_V
    )


def _gate_by_count(q, K, V, mask, prefix_K, prefix_V):
    right = gated_attention(q, K, V, mask, prefix_K, prefix_V)
    share = len(prefix_K) / (len(prefix_K) + mask.sum())
    return right | {"gate": np.full(len(q), share)}


def _gate_of_words(q, K, V, mask, prefix_K, prefix_V):
    right = gated_attention(q, K, V, mask, prefix_K, prefix_V)
    return right | {"gate": 1 - right["gate"]}


def _gate_mean_weight(q, K, V, mask, prefix_K, prefix_V):
    """The mean weight of a virtual token in place of the sum."""
    right = gated_attention(q, K, V, mask, prefix_K, prefix_V)
    return right | {"gate": right["gate"] / (len(prefix_K) + 1e-3)}


def _gate_two_softmaxes(q, K, V, mask, prefix_K, prefix_V):
    """Adds the two attentions instead of mixing them."""
    right = gated_attention(q, K, V, mask, prefix_K, prefix_V)
    scale = np.sqrt(q.shape[1])
    words, prefix = np.exp(q @ K.T / scale) * mask, np.exp(q @ prefix_K.T / scale)
    words, prefix = (x / x.sum(axis=1, keepdims=True) for x in (words, prefix))
    return right | {"output": words @ V + prefix @ prefix_V}


def _gate_words_only(q, K, V, mask, prefix_K, prefix_V):
    """As if all values of the prefix were zero."""
    return gated_attention(q, K, V, mask, prefix_K, np.zeros_like(prefix_V))


def hint_q1(case: tuple, expected: Arrays, got: object) -> str:
    if not isinstance(got, dict) or set(got) != {"gate", "output"}:
        return "return a dict with the keys 'gate' and 'output'."
    for name, value in expected.items():
        if np.shape(got[name]) != value.shape:
            return f"{name} must have shape {value.shape}, got {np.shape(got[name])}."
    for said, wrong in {
        "divide the scores by the square root of d.": _gate_no_root,
        "divide by the square root of d, not by d.": _gate_by_d,
        "padding must get no weight at all.": _gate_no_mask,
        "a key of zeros has score 0, and e^0 = 1: take the weight of padding away, not its key.": (
            _gate_masked_keys
        ),
        "the gate depends on the scores, not only on how many tokens there are.": _gate_by_count,
        "that is the share of the words; the gate is the share of the prefix.": _gate_of_words,
        "the gate is the sum over the virtual tokens, not their mean.": _gate_mean_weight,
    }.items():
        if _same(got["gate"], wrong(*case)["gate"]) and not _same(got["gate"], expected["gate"]):
            return said
    if not _same(got["gate"], expected["gate"]):
        return (
            "the gate is Z_P / (Z + Z_P), with sums of e^score over the prefix and the real words."
        )
    if _same(got["output"], _gate_two_softmaxes(*case)["output"]):
        return "one softmax over prefix and words together: (1 - gate) o + gate o_P, not o + o_P."
    return "the output is (1 - gate) o + gate o_P; the values of the prefix belong to it."


# --- 14.q2 as if there were no prefix ------------------------------------------------------


def cases_q2(rng: np.random.Generator) -> list[tuple]:
    """One virtual token and several; a prefix that takes nearly all."""
    cases = []
    for N, T, P, push in ((2, 4, 1, 0.0), (3, 5, 3, 1.0), (2, 3, 5, 6.0)):
        scores = rng.normal(size=(N, P + T))
        scores[:, :P] += push
        cases.append((_softmax(scores), P))
    return cases


def without_prefix(weights, num_virtual) -> np.ndarray:
    words = weights[:, num_virtual:]
    return words / words.sum(axis=1, keepdims=True)


def _cut_only(weights, num_virtual):
    return weights[:, num_virtual:]


def _cut_end(weights, num_virtual):
    return without_prefix(weights[:, ::-1], num_virtual)[:, ::-1]


def _softmax_again(weights, num_virtual):
    return _softmax(weights[:, num_virtual:])


def _spread_evenly(weights, num_virtual):
    """Gives the prefix's share to all words alike."""
    words = weights[:, num_virtual:]
    return words + (1 - words.sum(axis=1, keepdims=True)) / words.shape[1]


def _wrong_axis(weights, num_virtual):
    words = weights[:, num_virtual:]
    return words / words.sum(axis=0, keepdims=True)


def _one_sum(weights, num_virtual):
    words = weights[:, num_virtual:]
    return words / words.sum() * len(words)


def hint_q2(case: tuple, expected: np.ndarray, got: object) -> str:
    if np.shape(got) != expected.shape:
        return f"expected shape {expected.shape}: a weight for each word, none for the prefix."
    for said, wrong in {
        "without the prefix a row must sum to 1 again.": _cut_only,
        "the prefix comes first; that cut the end off.": _cut_end,
        "these are weights already, not scores: no second softmax.": _softmax_again,
        "the ratio of two words must stay; adding the same to each changes it.": _spread_evenly,
        "each row sums to 1, not each column.": _wrong_axis,
        "each row has its own gate; divide each by its own sum.": _one_sum,
    }.items():
        if _same(got, wrong(*case)):
            return said
    return "all words shrank by the same factor, 1 - gate; undo that."


# --- 14.q3 the gradients of a prefix -------------------------------------------------------


def cases_q3(rng: np.random.Generator) -> list[tuple]:
    cases = []
    for N, T, P, d in ((3, 4, 2, 5), (1, 3, 1, 2), (4, 2, 3, 3)):
        shapes = [(N, d), (T, d), (T, d), (P, d), (P, d), (N, d)]
        cases.append(tuple(rng.normal(size=shape) for shape in shapes))
    return cases


def prefix_gradients(q, K, V, prefix_K, prefix_V, G) -> Arrays:
    weights, outputs = _with_prefix(q, K, V, prefix_K, prefix_V)
    return _gradients(q, prefix_V, G, weights, outputs)


def _with_prefix(q, K, V, prefix_K, prefix_V):
    weights = _softmax(q @ np.concatenate([prefix_K, K]).T / np.sqrt(q.shape[1]))
    return weights, weights @ np.concatenate([prefix_V, V])


def _gradients(q, prefix_V, G, weights, outputs) -> Arrays:
    on_prefix = weights[:, : len(prefix_V)]
    better = G @ prefix_V.T - (G * outputs).sum(axis=1, keepdims=True)
    return {"keys": (on_prefix * better).T @ q / np.sqrt(q.shape[1]), "values": on_prefix.T @ G}


def _grad_no_root(q, K, V, prefix_K, prefix_V, G):
    right = prefix_gradients(q, K, V, prefix_K, prefix_V, G)
    return right | {"keys": right["keys"] * np.sqrt(q.shape[1])}


def _grad_no_output(q, K, V, prefix_K, prefix_V, G):
    """Forgets that all other weights shrink."""
    weights, outputs = _with_prefix(q, K, V, prefix_K, prefix_V)
    return _gradients(q, prefix_V, G, weights, np.zeros_like(outputs))


def _grad_plain_output(q, K, V, prefix_K, prefix_V, G):
    """o of the words alone in place of o'."""
    weights, _ = _with_prefix(q, K, V, prefix_K, prefix_V)
    plain = _softmax(q @ K.T / np.sqrt(q.shape[1])) @ V
    return _gradients(q, prefix_V, G, weights, plain)


def _grad_prefix_softmax(q, K, V, prefix_K, prefix_V, G):
    """Softmax over the prefix alone."""
    _, outputs = _with_prefix(q, K, V, prefix_K, prefix_V)
    return _gradients(q, prefix_V, G, _softmax(q @ prefix_K.T / np.sqrt(q.shape[1])), outputs)


def _grad_mean(q, K, V, prefix_K, prefix_V, G):
    right = prefix_gradients(q, K, V, prefix_K, prefix_V, G)
    return {name: value / (len(q) + 0.5) for name, value in right.items()}


def _grad_sign(q, K, V, prefix_K, prefix_V, G):
    right = prefix_gradients(q, K, V, prefix_K, prefix_V, G)
    return right | {"keys": -right["keys"]}


def _grad_no_weight(q, K, V, prefix_K, prefix_V, G):
    """The weight is missing in the gradient of the keys."""
    right = prefix_gradients(q, K, V, prefix_K, prefix_V, G)
    weights, outputs = _with_prefix(q, K, V, prefix_K, prefix_V)
    ones = np.ones_like(weights)
    return right | {"keys": _gradients(q, prefix_V, G, ones, outputs)["keys"]}


def _grad_values_sum(q, K, V, prefix_K, prefix_V, G):
    right = prefix_gradients(q, K, V, prefix_K, prefix_V, G)
    return right | {"values": np.tile(G.sum(axis=0), (len(prefix_V), 1))}


def hint_q3(case: tuple, expected: Arrays, got: object) -> str:
    if not isinstance(got, dict) or set(got) != {"keys", "values"}:
        return "return a dict with the keys 'keys' and 'values'."
    for name, value in expected.items():
        if np.shape(got[name]) != value.shape:
            return f"{name} must have the shape of the prefix, {value.shape}."
    if _same(got["values"], _grad_prefix_softmax(*case)["values"]):
        return "softmax runs over prefix and words together."
    if _same(got["values"], _grad_values_sum(*case)["values"]):
        return "a value is felt in each output with the weight that it gets there."
    if not _same(got["values"], expected["values"]):
        return "d value_p = sum over i of a_ip g_i: a sum over the queries, no mean."
    for said, wrong in {
        "the score is divided by sqrt(d), so the slope of the key is, too.": _grad_no_root,
        "when one weight grows the others shrink: (nu_p - o'), not nu_p alone.": _grad_no_output,
        "o' is the output with the prefix, not that of the words alone.": _grad_plain_output,
        "the sign is turned round: the key moves the score up when nu_p is better than o'.": _grad_sign,
        "the weight a_ip is missing: without attention there is no gradient.": _grad_no_weight,
    }.items():
        if _same(got["keys"], wrong(*case)["keys"]):
            return said
    return "d key_p = sum over i of a_ip (g_i . (nu_p - o'_i)) q_i / sqrt(d)."


# --- 14.q4 pooling after a prompt ----------------------------------------------------------


def cases_q4(rng: np.random.Generator) -> list[tuple]:
    """Padding behind, in front, none; no virtual token at all; more of them than text."""
    cases = []
    for B, T, P, D, lengths in (
        (2, 4, 3, 3, (2, 4)),
        (3, 3, 0, 2, (1, 3, 2)),
        (2, 2, 5, 4, (2, 2)),
        (2, 5, 2, 3, (-3, 5)),
    ):
        mask = np.zeros((B, T), dtype=np.int64)
        for row, length in enumerate(lengths):
            mask[row, slice(length, None) if length < 0 else slice(0, length)] = 1
        cases.append((rng.normal(size=(B, P + T, D)), mask))
    return cases


def pool_after_prompt(hidden, attention_mask) -> np.ndarray:
    weight = attention_mask[:, :, None]
    real = hidden[:, hidden.shape[1] - attention_mask.shape[1] :]
    return (real * weight).sum(axis=1) / weight.sum(axis=1)


def _padded_mask(attention_mask: np.ndarray, num: int) -> np.ndarray:
    return np.pad(attention_mask, ((0, 0), (num, 0)), constant_values=1)


def _pool_all(hidden, attention_mask):
    return hidden.mean(axis=1)


def _pool_virtual_too(hidden, attention_mask):
    num = hidden.shape[1] - attention_mask.shape[1]
    return pool_after_prompt(hidden, _padded_mask(attention_mask, num))


def _pool_first(hidden, attention_mask):
    """Cuts the virtual tokens off at the wrong end."""
    return pool_after_prompt(hidden[:, : attention_mask.shape[1]], attention_mask)


def _pool_padding_too(hidden, attention_mask):
    return hidden[:, hidden.shape[1] - attention_mask.shape[1] :].mean(axis=1)


def _pool_by_width(hidden, attention_mask):
    """Zeroes padding, and then divides by the width of the batch."""
    real = hidden[:, hidden.shape[1] - attention_mask.shape[1] :]
    return (real * attention_mask[:, :, None]).mean(axis=1)


def _pool_cls(hidden, attention_mask):
    return hidden[:, 0]


def _pool_true_cls(hidden, attention_mask):
    return hidden[:, hidden.shape[1] - attention_mask.shape[1]]


def hint_q4(case: tuple, expected: np.ndarray, got: object) -> str:
    hidden, mask = case
    if np.shape(got) != expected.shape:
        return f"expected shape {expected.shape}: one vector for each text, got {np.shape(got)}."
    for said, wrong in {
        "that is the mean of all that came back, virtual tokens and padding included.": _pool_all,
        "the virtual tokens are in your mean: cut them off.": _pool_virtual_too,
        "the virtual tokens come first; that cut off the end.": _pool_first,
        "padding is in your mean: use the mask.": _pool_padding_too,
        "divide by the number of real tokens, not by the width of the batch.": _pool_by_width,
        "that is one vector; asked for is the mean over the real tokens.": _pool_true_cls,
    }.items():
        if _same(got, wrong(*case)):
            return said
    if _same(got, _pool_cls(*case)):
        return "that is the first virtual token."
    num = hidden.shape[1] - mask.shape[1]
    return f"here P = {num}: drop the first {num} vectors, then the mean with the mask."


# --- 14.q5 what it costs -------------------------------------------------------------------


def cases_q5(rng: np.random.Generator) -> list[tuple]:
    """Each method; heads that fill the width, and fewer."""
    cases = []
    for method, kv_heads, heads in (
        ("prompt", 4, 4), ("prefix", 4, 4), ("prefix", 2, 6), ("mlp", 3, 3), ("mlp", 1, 4),
    ):  # fmt: skip
        head_size = int(rng.integers(4, 17))
        layers, hidden, num = (
            int(rng.integers(low, high)) for low, high in ((2, 9), (5, 30), (3, 40))
        )
        cases.append((method, num, layers, heads * head_size, kv_heads, head_size, hidden, 512))
    return cases


def cost(method, num_virtual, layers, width, kv_heads, head_size, hidden, positions) -> dict:
    for_each = 2 * layers * kv_heads * head_size
    saved = num_virtual * (width if method == "prompt" else for_each)
    trained = saved
    if method == "mlp":
        trained = num_virtual * width + (width + 1) * hidden + (hidden + 1) * for_each
    return {"trained": trained, "saved": saved, "text": positions - num_virtual}


def _cost_width(method, num_virtual, layers, width, kv_heads, head_size, hidden, positions):
    """Takes keys and values to be as wide as the model."""
    heads = width // head_size
    return cost(method, num_virtual, layers, width, heads, head_size, hidden, positions)


def _cost_one_of_two(method, num_virtual, layers, width, kv_heads, head_size, hidden, positions):
    """Keys or values, not both."""
    right = cost(method, num_virtual, layers, width, kv_heads, head_size, hidden, positions)
    if method == "prompt":
        return right
    half = right["saved"] // 2
    trained = half
    if method == "mlp":
        trained = num_virtual * width + (width + 1) * hidden + (hidden + 1) * half // num_virtual
    return right | {"saved": half, "trained": trained}


def _cost_one_layer(method, num_virtual, layers, width, kv_heads, head_size, hidden, positions):
    return cost(method, num_virtual, 1, width, kv_heads, head_size, hidden, positions)


def _cost_no_bias(method, num_virtual, layers, width, kv_heads, head_size, hidden, positions):
    right = cost(method, num_virtual, layers, width, kv_heads, head_size, hidden, positions)
    bias = hidden + 2 * layers * kv_heads * head_size
    return right | {"trained": right["trained"] - bias * (method == "mlp")}


def _cost_keeps_mlp(method, num_virtual, layers, width, kv_heads, head_size, hidden, positions):
    right = cost(method, num_virtual, layers, width, kv_heads, head_size, hidden, positions)
    return right | {"saved": right["trained"]}


def _cost_no_start(method, num_virtual, layers, width, kv_heads, head_size, hidden, positions):
    """Forgets the vectors that the MLP starts from."""
    right = cost(method, num_virtual, layers, width, kv_heads, head_size, hidden, positions)
    return right | {"trained": right["trained"] - num_virtual * width * (method == "mlp")}


def _cost_mlp_for_each(method, num_virtual, layers, width, kv_heads, head_size, hidden, positions):
    """An MLP for every virtual token in place of one for all."""
    right = cost(method, num_virtual, layers, width, kv_heads, head_size, hidden, positions)
    if method != "mlp":
        return right
    one = right["trained"] - num_virtual * width
    return right | {"trained": num_virtual * (width + one)}


def _cost_all_text(method, num_virtual, layers, width, kv_heads, head_size, hidden, positions):
    right = cost(method, num_virtual, layers, width, kv_heads, head_size, hidden, positions)
    return right | {"text": positions}


def hint_q5(case: tuple, expected: dict, got: object) -> str:
    if not isinstance(got, dict) or set(got) != set(expected):
        return "return a dict with the keys 'trained', 'saved' and 'text'."
    if got["text"] != expected["text"]:
        return "each virtual token uses up one position."
    for key in ("saved", "trained"):
        for said, wrong in {
            "keys and values are kv_heads * head_size wide, which may be less than the width.": (
                _cost_width
            ),
            "a virtual token has a key and a value: twice as many.": _cost_one_of_two,
            "keys and values are trained in every layer.": _cost_one_layer,
            "when training is over the MLP is thrown away; its output is kept.": _cost_keeps_mlp,
            "both linear layers have biases.": _cost_no_bias,
            "the vectors that go into the MLP are trained as well.": _cost_no_start,
            "one MLP serves all virtual tokens.": _cost_mlp_for_each,
        }.items():
            if got[key] == wrong(*case)[key] != expected[key]:
                return said
        if got[key] != expected[key]:
            break
    return "prompt: P * width; prefix: 2 * layers * P * kv_heads * head_size; mlp: vectors and two layers."


# --- 14.q6 judgement -----------------------------------------------------------------------

RUBRIC = """\
4 points; 1 for each, half marks allowed.
1. The rate: at 2e-5 with AdamW a number of the prompt moves by about 1e-3 in the whole run, against a
   start of deviation 1 (peft's default), so the prompt stayed random; they measured the head. Says that
   the rate must be in proportion to the start, or be tuned over powers of ten.
2. The features: peft gives back the virtual tokens too; the plain mean takes in 20 of them, and padding. Cut
   first, then the mean with the mask.
3. The differences: half a point, one run, no interval; neither "hurts" nor "names help" is shown. Asks for
   paired draws and the interval of the difference, and for the best rate of each.
4. The prefix: keys and values are not normalised, a rate of 1 makes them far larger than real ones, the text
   is drowned; says nothing about ability. And a first step that is sensible: mend the pooling, then a
   grid of rates on validation.
"""

QUESTIONS = [
    Question(
        id="14.q1",
        title="The gate",
        points=3,
        cases=cases_q1,
        expected=gated_attention,
        hint=hint_q1,
        wrong={
            "no root": _gate_no_root,
            "divided by d": _gate_by_d,
            "no mask": _gate_no_mask,
            "keys of padding set to zero": _gate_masked_keys,
            "by count": _gate_by_count,
            "share of the words": _gate_of_words,
            "mean weight": _gate_mean_weight,
            "two softmaxes": _gate_two_softmaxes,
            "no values of the prefix": _gate_words_only,
        },
    ),
    Question(
        id="14.q2",
        title="As if there were no prefix",
        points=2,
        cases=cases_q2,
        expected=without_prefix,
        hint=hint_q2,
        wrong={
            "cut only": _cut_only,
            "end cut off": _cut_end,
            "softmax again": _softmax_again,
            "spread evenly": _spread_evenly,
            "columns": _wrong_axis,
            "one sum for all": _one_sum,
        },
    ),
    Question(
        id="14.q3",
        title="The gradients of a prefix",
        points=4,
        cases=cases_q3,
        expected=prefix_gradients,
        hint=hint_q3,
        wrong={
            "no root": _grad_no_root,
            "others do not shrink": _grad_no_output,
            "output without prefix": _grad_plain_output,
            "softmax over the prefix": _grad_prefix_softmax,
            "mean over queries": _grad_mean,
            "sign": _grad_sign,
            "no weight": _grad_no_weight,
            "values without weight": _grad_values_sum,
        },
    ),
    Question(
        id="14.q4",
        title="Pooling after a prompt",
        points=3,
        cases=cases_q4,
        expected=pool_after_prompt,
        hint=hint_q4,
        wrong={
            "everything": _pool_all,
            "virtual tokens too": _pool_virtual_too,
            "cut at the end": _pool_first,
            "padding too": _pool_padding_too,
            "by the width": _pool_by_width,
            "first vector": _pool_cls,
            "true first token": _pool_true_cls,
        },
    ),
    Question(
        id="14.q5",
        title="What it costs",
        points=3,
        cases=cases_q5,
        expected=cost,
        hint=hint_q5,
        wrong={
            "as wide as the model": _cost_width,
            "keys only": _cost_one_of_two,
            "one layer": _cost_one_layer,
            "no biases": _cost_no_bias,
            "MLP kept": _cost_keeps_mlp,
            "no vectors before the MLP": _cost_no_start,
            "an MLP for each token": _cost_mlp_for_each,
            "all positions": _cost_all_text,
        },
    ),
    Question(
        id="14.q6",
        title="Judgement: prompts do not work",
        points=4,
        manual=True,
        rubric=RUBRIC,
    ),
]
