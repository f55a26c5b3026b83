"""Graded questions of lesson 11: pieces, padding, attention with a mask, hiding, masked loss."""

from __future__ import annotations

import numpy as np

from tlcourse.checks import Question

Arrays = dict[str, np.ndarray]


def near(a: object, b: float) -> bool:
    return isinstance(a, float) and bool(np.isclose(a, b, rtol=1e-6, atol=1e-8))


def same(a: object, b: np.ndarray) -> bool:
    """An array of the right shape with these values."""
    return np.shape(a) == np.shape(b) and bool(np.allclose(a, b, rtol=1e-6, atol=1e-9))


# --- 11.q1 WordPiece -----------------------------------------------------------------------

# (word, pieces of the vocabulary), in letters that are exchanged in each draw.
_PATTERNS = (
    ("abcde", "a ab abc de ##c ##bc ##d ##de ##e"),  # the plain way: abc ##de
    ("abc", "abc ab ##c a"),  # a whole word
    ("abcd", "ab cd ##c ##d"),  # cd may start a word only
    ("fabde", "f fa ##a ##abd ##b ##de ##d ##e"),  # longest from the left, not longest anywhere
    ("abcd", "ab abc ##c ##cd"),  # ab ##cd would do, but abc was taken
    ("abgde", "ab ##de ##d ##e"),  # nothing for g
    ("abc", "##ab ##a ##c b c"),  # ##ab cannot start a word
    ("abcabc", "a abc ##ab ##abc ##abcd ##c"),
)


def cases_q1(rng: np.random.Generator) -> list[tuple]:
    """Eight patterns in new letters, and two words over a random vocabulary."""
    cases = []
    for word, pieces in _PATTERNS:
        letters = str.maketrans("abcdefg", "".join(rng.permutation(list("abcdefghijklmno"))[:7]))
        tokens = ["[UNK]", *pieces.translate(letters).split()]
        cases.append((word.translate(letters), _numbered(tokens)))
    for _ in range(2):
        word = "".join(rng.choice(list("xyz"), size=12))
        tokens = [*"xyz", "##x", "##y", "##z"]
        for _ in range(15):
            start, length = rng.integers(10), rng.integers(2, 4)
            piece = word[start : start + length]
            tokens.append(piece if rng.random() < 0.3 else f"##{piece}")
        cases.append((word, _numbered(["[UNK]", *dict.fromkeys(tokens)])))
    return cases


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def _greedy(word, vocabulary, lengths, prefix="##", look="##", fail="whole"):
    """WordPiece with its parts exchangeable; ``lengths(rest)`` is the order of the tries."""
    pieces, start = [], 0
    while start < len(word):
        for length in lengths(len(word) - start):
            piece = word[start : start + length]
            if (look if start else "") + piece in vocabulary:
                pieces.append((prefix if start else "") + piece)
                start += length
                break
        else:
            if fail == "whole":
                return ["[UNK]"]
            pieces.append("[UNK]")
            if fail == "stop":
                return pieces
            start += 1
    return pieces


def _longest(rest):
    return range(rest, 0, -1)


def wordpiece(word: str, vocabulary: dict[str, int]) -> list[str]:
    return _greedy(word, vocabulary, _longest)


def _shortest_first(word, vocabulary):
    return _greedy(word, vocabulary, lambda rest: range(1, rest + 1))


def _mark_only_written(word, vocabulary):
    """Looks all pieces up without ##, and writes it in front of the answer."""
    return _greedy(word, vocabulary, _longest, look="")


def _mark_not_written(word, vocabulary):
    return _greedy(word, vocabulary, _longest, prefix="")


def _keeps_the_beginning(word, vocabulary):
    return _greedy(word, vocabulary, _longest, fail="stop")


def _unknown_character(word, vocabulary):
    return _greedy(word, vocabulary, _longest, fail="one")


def _takes_choices_back(word, vocabulary, start=0):
    """Searches on until some cut of the whole word fits."""

    def cut(start):
        if start == len(word):
            return []
        for end in range(len(word), start, -1):
            piece = ("##" if start else "") + word[start:end]
            if piece in vocabulary and (rest := cut(end)) is not None:
                return [piece, *rest]
        return None

    return cut(0) or ["[UNK]"]


def _longest_anywhere(word, vocabulary):
    """Cuts the longest piece out of the middle, then the two sides."""

    def cut(left, right):
        if left == right:
            return []
        for length in range(right - left, 0, -1):
            for start in range(left, right - length + 1):
                piece = ("##" if start else "") + word[start : start + length]
                if piece in vocabulary:
                    sides = cut(left, start), cut(start + length, right)
                    return None if None in sides else [*sides[0], piece, *sides[1]]
        return None

    return cut(0, len(word)) or ["[UNK]"]


def hint_q1(case: tuple, expected: list[str], got: object) -> str:
    word, vocabulary = case
    if not isinstance(got, list) or not all(isinstance(token, str) for token in got):
        return "return a list of texts."
    if expected == ["[UNK]"] and got == _takes_choices_back(word, vocabulary) != expected:
        return "a cut that fits exists, but WordPiece does not take a choice back: it is [UNK]."
    if "[UNK]" in got and len(got) > 1:
        return "if one place cannot be written, the *whole* word is the one token [UNK]."
    if got == _mark_not_written(word, vocabulary) or got == _mark_only_written(word, vocabulary):
        return "a piece that does not start the word is looked up *and* returned with ## in front."
    if expected != ["[UNK]"] and got == ["[UNK]"]:
        return "this word can be written. Is ## missing where you look a piece up?"
    if got == _shortest_first(word, vocabulary):
        return "try the longest beginning first, then one character less, and so on."
    if got == _longest_anywhere(word, vocabulary):
        return "the longest *beginning* of what is left, not the longest piece anywhere."
    if any(token not in vocabulary for token in got):
        return "you returned a piece that is not in the vocabulary."
    return (
        "from the left: the longest beginning of what is left, with ## unless it starts the word."
    )


# --- 11.q2 padding -------------------------------------------------------------------------


def cases_q2(rng: np.random.Generator) -> list[tuple]:
    """A last batch that is full or not, and longer than all texts together."""
    full = rng.integers(3, 60, size=12)
    ragged = rng.integers(3, 60, size=11)
    ragged[-1] = 90  # the longest text stands alone in the last batch
    return [(full, 4), (ragged, 5), (rng.integers(1, 9, size=7), 20), (ragged[::-1].copy(), 2)]


def padding_share(lengths: np.ndarray, batch_size: int) -> dict[str, float]:
    return {
        "plain": _share(_batches(lengths, batch_size)),
        "bucketed": _share(_batches(np.sort(lengths), batch_size)),
    }


def _batches(lengths: np.ndarray, size: int) -> list[np.ndarray]:
    return [lengths[start : start + size] for start in range(0, len(lengths), size)]


def _share(batches: list[np.ndarray]) -> float:
    places = sum(int(batch.max()) * len(batch) for batch in batches)
    return 1 - sum(int(batch.sum()) for batch in batches) / places


def _padding_variant(share_of, order=np.sort):
    """The two orders, with another measure ``share_of(batches, batch_size)``."""

    def wrong(lengths, batch_size):
        orders = {"plain": lengths, "bucketed": order(lengths)}
        return {n: share_of(_batches(o, batch_size), batch_size) for n, o in orders.items()}

    return wrong


def _share_of_batches(batches, size):
    """Mean of the batches' own shares: a short last batch counts as much as a full one."""
    return float(np.mean([_share([batch]) for batch in batches]))


def _over_real(batches, size):
    share = _share(batches)
    return share / (1 - share)


def _filled_last(batches, size):
    """As if the last batch had empty rows up to the batch size."""
    places = sum(int(batch.max()) * size for batch in batches)
    return 1 - sum(int(batch.sum()) for batch in batches) / places


def _one_width(batches, size):
    """Every batch as wide as the longest text of all."""
    widest = max(int(batch.max()) for batch in batches)
    return 1 - float(np.concatenate(batches).mean()) / widest


_by_batches = _padding_variant(_share_of_batches)
_by_real = _padding_variant(_over_real)
_with_empty_rows = _padding_variant(_filled_last)
_wide = _padding_variant(_one_width)
_longest_first = _padding_variant(lambda b, _: _share(b), lambda lengths: np.sort(lengths)[::-1])
_real_share = _padding_variant(lambda b, _: 1 - _share(b))


def hint_q2(case: tuple, expected: dict, got: object) -> str:
    if not isinstance(got, dict) or set(got) != {"plain", "bucketed"}:
        return "return a dict with the keys 'plain' and 'bucketed'."
    known = (
        (_by_batches, "count places over all batches, then divide once: batches differ in size."),
        (_by_real, "divide by all places, padding included, not by the real tokens."),
        (_with_empty_rows, "the last batch has fewer rows: it is not filled up with empty texts."),
        (_wide, "a batch is only as wide as its *own* longest text."),
        (_longest_first, "sort with the shortest first: it decides who is in the last batch."),
        (_real_share, "that is the share of the real tokens."),
    )
    for wrong, text in known:
        values = wrong(*case)
        if all(near(got[name], value) for name, value in values.items()):
            return text
    if near(got["plain"], expected["plain"]):
        return "the plain order is right. For the other, sort the texts, then cut into batches."
    return "places = rows of the batch times its longest text; share = 1 - tokens / places."


# --- 11.q3 attention with a mask -----------------------------------------------------------


def cases_q3(rng: np.random.Generator) -> list[tuple]:
    """Padding behind, before, between, none; large scores; garbage at the padded places."""

    def draw(T: int, D: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        return rng.normal(size=(T, D)) * scale, rng.normal(size=(T, D)) * scale

    wild_q, wild_k = draw(6, 2, 40.0)
    garbage_q, garbage_k = draw(5, 4)
    # A padded key along the first query: its score is far above all others.
    garbage_k[3] = 1e6 * garbage_q[0]
    return [
        (*draw(5, 4), np.array([1, 1, 1, 0, 0])),
        (*draw(4, 9), np.array([1, 1, 1, 1])),
        (*draw(3, 2), np.array([0, 1, 0])),
        (wild_q, wild_k, np.array([1, 1, 1, 1, 0, 1])),
        (garbage_q, garbage_k, np.array([0, 1, 1, 0, 1])),
    ]


def attention_weights(q: np.ndarray, k: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return _softmax(_scores(q, k), mask)


def _scores(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    return q @ k.T / np.sqrt(q.shape[1])


def _softmax(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    scores = np.where(mask == 1, scores, -np.inf)
    exp = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def _not_shared_out_again(q, k, mask):
    """Softmax over everything, then zeros: rows sum to less than 1."""
    return _softmax(_scores(q, k), np.ones_like(mask)) * mask


def _scores_to_zero(q, k, mask):
    """A score of 0 is not "nothing": exp(0) = 1."""
    return _softmax(_scores(q, k) * mask, np.ones_like(mask))


def _no_maximum(q, k, mask):
    with np.errstate(all="ignore"):
        exp = np.exp(_scores(q, k)) * mask
        return exp / exp.sum(axis=1, keepdims=True)


def _maximum_of_the_padding(q, k, mask):
    """The maximum is taken before the mask: real scores may all underflow."""
    scores = _scores(q, k)
    with np.errstate(all="ignore"):
        exp = np.exp(scores - scores.max(axis=1, keepdims=True)) * mask
        return exp / exp.sum(axis=1, keepdims=True)


def _minus_ten_thousand(q, k, mask):
    """A penalty that a large score overcomes."""
    return _softmax(_scores(q, k) - 1e4 * (1 - mask), np.ones_like(mask))


def _rows_masked(q, k, mask):
    weights = _softmax(_scores(q, k), np.ones_like(mask))
    return weights * mask[:, None]


def _rows_zeroed_too(q, k, mask):
    return attention_weights(q, k, mask) * mask[:, None]


def _over_the_queries(q, k, mask):
    masked = np.where(mask[:, None] == 1, _scores(q, k).T, -np.inf)
    exp = np.exp(masked - masked.max(axis=0))
    return (exp / exp.sum(axis=0)).T.T


def _mask_inverted(q, k, mask):
    return attention_weights(q, k, mask if mask.all() else 1 - mask)


def _no_scale(q, k, mask):
    return attention_weights(q * np.sqrt(q.shape[1]), k, mask)


def _scale_d(q, k, mask):
    return attention_weights(q / np.sqrt(q.shape[1]), k, mask)


def hint_q3(case: tuple, expected: np.ndarray, got: object) -> str:
    q, k, mask = case
    if np.shape(got) != expected.shape:
        return f"one row for each query, one column for each key: shape {expected.shape}."
    weights = np.asarray(got)
    if not np.isfinite(weights).all():
        return (
            "subtract each row's maximum before exp; and take it over the *real* tokens, so "
            "that a huge score of padding does not make all others vanish."
        )
    if same(weights, _rows_masked(q, k, mask)) or same(weights, _rows_zeroed_too(q, k, mask)):
        return "mask the columns (who is looked at). Rows of padding still sum to 1."
    if same(weights, _mask_inverted(q, k, mask)) and not mask.all():
        return "the mask is 1 for a real token, 0 for padding."
    padded = weights[:, mask == 0]
    if padded.size and np.any(padded > 0):
        return (
            "the columns of padding must be exactly 0. A score of 0 still has exp(0) = 1, and a "
            "large negative number can be outweighed: the score of padding is -inf."
        )
    if not np.allclose(weights.sum(axis=1), 1):
        if same(weights, _not_shared_out_again(q, k, mask)):
            return "rows sum to less than 1: mask before the softmax, or divide again."
        return "each *row* sums to 1: the softmax goes over the keys."
    for wrong in (_no_scale, _scale_d):
        if same(weights, wrong(q, k, mask)):
            return "scores are divided by the square root of D, once."
    if same(weights, _softmax(_scores(k, q), mask)):
        return "s_ij is q_i times k_j: rows belong to queries."
    return "q k^T / sqrt(D), then -inf in the columns of padding, then a softmax over each row."


# --- 11.q4 which tokens to hide ------------------------------------------------------------

_SPECIAL, _MASK = [0, 1, 2, 3, 4], 4  # [PAD] [UNK] [CLS] [SEP] [MASK]


def cases_q4(rng: np.random.Generator) -> list[tuple]:
    """A small case first; each of the three treatments occurs; special tokens have low draws."""
    cases = []
    for shape, share in (((1, 14), 0.7), ((4, 30), 0.4), ((1, 40), 0.6)):
        ids, other = rng.integers(5, 50, size=(2, *shape))
        ids[:, 0], ids[:, -3], ids[:, -2:] = 2, 3, 0
        places = rng.permutation(np.flatnonzero(~np.isin(ids, _SPECIAL)))
        asked = places[: round(share * len(places))]  # at least 8
        pick, how = rng.uniform(0.15, 1, size=shape), rng.random(shape)
        pick.flat[asked] = rng.uniform(0, 0.15, size=len(asked))
        pick[:, 0], pick[-1, -1] = 0.1, 0.01
        how.flat[asked[:6]] = [0.8, 0.83, 0.87, 0.9, 0.93, 0.79]  # the bounds among them
        other += other == ids
        other.flat[asked[1]] = ids.flat[asked[1]]  # by chance the token itself
        cases.append((ids, _SPECIAL, _MASK, pick, how, other))
    return cases


def hide_tokens(
    ids: np.ndarray,
    special_ids: list[int],
    mask_id: int,
    pick: np.ndarray,
    how: np.ndarray,
    other: np.ndarray,
) -> Arrays:
    return _hide(ids, special_ids, mask_id, pick, how, other)


def _hide(ids, special_ids, mask_id, pick, how, other, first=0.8, second=0.9, share=0.15):
    hidden = (pick < share) & ~np.isin(ids, special_ids)
    replaced = np.where(how < first, mask_id, np.where(how < second, other, ids))
    return {"shown": np.where(hidden, replaced, ids), "hidden": hidden}


def _asks_only_the_changed(ids, *rest):
    result = _hide(ids, *rest)
    return result | {"hidden": result["shown"] != ids}


def _hides_special(ids, special_ids, *rest):
    return _hide(ids, [], *rest)


def _all_masked(*case):
    return _hide(*case, first=2)


def _never_kept(*case):
    return _hide(*case, second=2)


def _other_from_the_rest(ids, special_ids, mask_id, pick, how, other):
    """80 / 10 / 10 of *all* tokens, not only of those asked for."""
    hidden = (pick < 0.15) & ~np.isin(ids, special_ids)
    replaced = np.where(how < 0.8, mask_id, np.where(how < 0.9, other, ids))
    return {"shown": np.where(np.isin(ids, special_ids), ids, replaced), "hidden": hidden}


def _kept_and_replaced_swapped(ids, special_ids, mask_id, pick, how, other):
    hidden = (pick < 0.15) & ~np.isin(ids, special_ids)
    replaced = np.where(how < 0.8, mask_id, np.where(how < 0.9, ids, other))
    return {"shown": np.where(hidden, replaced, ids), "hidden": hidden}


def _hidden_inverted(*case):
    result = _hide(*case)
    return result | {"hidden": ~result["hidden"]}


def _bounds(*case):
    return _hide(*case, first=0.8 + 1e-9, second=0.9 + 1e-9)


def hint_q4(case: tuple, expected: Arrays, got: object) -> str:
    ids, special_ids, mask_id, _, how, other = case
    if not isinstance(got, dict) or set(got) != {"shown", "hidden"}:
        return "return a dict with the keys 'shown' and 'hidden'."
    shown, hidden = np.asarray(got["shown"]), np.asarray(got["hidden"])
    if shown.shape != ids.shape or hidden.shape != ids.shape:
        return f"both have the shape of ids, {ids.shape}."
    if hidden.dtype != bool:
        return "'hidden' holds True and False."
    if np.any(hidden & np.isin(ids, special_ids)):
        return "special tokens are never asked for, whatever their draw."
    if np.array_equal(hidden, shown != ids) and not np.array_equal(hidden, expected["hidden"]):
        return "a token that stays as it is, or is replaced by itself, is asked for all the same."
    if np.array_equal(hidden, ~expected["hidden"]):
        return "'hidden' is True where the model is asked."
    if not np.array_equal(hidden, expected["hidden"]):
        return "asked for: pick < 0.15 and not special. `how` plays no part in it."
    if not np.array_equal(shown[~hidden], ids[~hidden]):
        return "a token that is not asked for is shown as it is: 80/10/10 is of those asked for."
    place = tuple(np.argwhere(shown != expected["shown"])[0])
    words = "mask_id" if how[place] < 0.8 else "`other`" if how[place] < 0.9 else "the token itself"
    return f"how is {how[place]:.3g} at {[int(i) for i in place]}: there the model sees {words}."


# --- 11.q5 masked loss ---------------------------------------------------------------------


def cases_q5(rng: np.random.Generator) -> list[tuple]:
    """Texts with unlike numbers of hidden tokens, one only, large logits, and none hidden."""
    cases = []
    for shape, V, scale in (((3, 5), 7, 1.0), ((1, 4), 3, 2.0), ((2, 4), 5, 800.0)):
        hidden = rng.random(shape) < 0.3
        hidden[0] = rng.permutation(np.arange(shape[1]) < 3)  # three in the first text
        hidden[-1, :2] = True, False
        cases.append((rng.normal(size=(*shape, V)) * scale, rng.integers(V, size=shape), hidden))
    logits, ids, hidden = cases[0]
    one = np.zeros_like(hidden)
    one[rng.integers(3), rng.integers(5)] = True
    return [*cases, (logits, ids, one), (logits[:2], ids[:2], np.zeros((2, 5), dtype=bool))]


def masked_loss(logits: np.ndarray, ids: np.ndarray, hidden: np.ndarray) -> dict:
    return _weighted(logits, ids, hidden / max(hidden.sum(), 1))


def _weighted(logits: np.ndarray, ids: np.ndarray, weight: np.ndarray) -> dict:
    """Sum of weight times -log p, and its gradient."""
    p, log_p = _log_softmax(logits)
    true = np.eye(logits.shape[-1])[ids]
    loss = float(-(weight * (true * log_p).sum(axis=-1)).sum())
    return {"loss": loss, "gradient": weight[..., None] * (p - true)}


def _log_softmax(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return np.exp(log_p), log_p


def _mean_of_all_places(logits, ids, hidden):
    return _weighted(logits, ids, hidden / hidden.size)


def _every_place(logits, ids, hidden):
    """As if all tokens had been hidden."""
    return _weighted(logits, ids, np.full(ids.shape, 1 / ids.size))


def _sum(logits, ids, hidden):
    return _weighted(logits, ids, hidden * 1.0)


def _mean_of_texts(logits, ids, hidden):
    """A mean for each text, then over the texts."""
    count = np.maximum(hidden.sum(axis=1, keepdims=True), 1)
    return _weighted(logits, ids, hidden / count / len(ids))


def _visible(logits, ids, hidden):
    return masked_loss(logits, ids, ~hidden)


def _none_is_nan(logits, ids, hidden):
    with np.errstate(all="ignore"):
        return _weighted(logits, ids, hidden / hidden.sum())


def _naive(logits, ids, hidden):
    with np.errstate(all="ignore"):
        exp = np.exp(logits)
        p = exp / exp.sum(axis=-1, keepdims=True)
        true = np.eye(logits.shape[-1])[ids]
        count = max(hidden.sum(), 1)
        loss = -(hidden * np.log((true * p).sum(axis=-1))).sum() / count
        return {"loss": float(loss), "gradient": hidden[..., None] * (p - true) / count}


def _gradient_variant(change):
    def wrong(logits, ids, hidden):
        right = masked_loss(logits, ids, hidden)
        return right | {"gradient": change(right["gradient"], logits, ids, hidden)}

    return wrong


def _pull_everywhere(gradient, logits, ids, hidden):
    """p - 1[true] at the visible places as well, divided by the number of hidden ones."""
    count = max(hidden.sum(), 1)
    return _weighted(logits, ids, np.full(ids.shape, 1 / count))["gradient"]


def _no_count(gradient, logits, ids, hidden):
    return gradient * max(hidden.sum(), 1) * 1.0


def _no_true(gradient, logits, ids, hidden):
    return hidden[..., None] * _log_softmax(logits)[0] / max(hidden.sum(), 1)


def _true_only(gradient, logits, ids, hidden):
    """Pulls the true token up and pushes nothing down."""
    return gradient * np.eye(logits.shape[-1])[ids]


def hint_q5(case: tuple, expected: dict, got: object) -> str:
    logits, ids, hidden = case
    if not isinstance(got, dict) or set(got) != {"loss", "gradient"}:
        return "return a dict with the keys 'loss' and 'gradient'."
    loss, gradient = got["loss"], got["gradient"]
    if np.shape(gradient) != logits.shape:
        return f"the gradient has the shape of the logits, {logits.shape}."
    if not hidden.any():
        return "nothing is hidden here: the loss is 0.0 and the gradient 0 everywhere, not 0/0."
    if not np.isfinite(gradient).all() or not np.isfinite(loss):
        return "logits of any size: log softmax = z - max - log(sum(exp(z - max)))."
    if near(loss, _sum(logits, ids, hidden)["loss"]) and hidden.sum() > 1:
        return "a mean over the hidden places, not a sum."
    if near(loss, -expected["loss"]):
        return "the sign: the loss is *minus* the log probability."
    if near(loss, _mean_of_all_places(logits, ids, hidden)["loss"]):
        return "divide by the number of hidden places, not by all places."
    if near(loss, _every_place(logits, ids, hidden)["loss"]):
        return "only the hidden places count."
    if near(loss, _visible(logits, ids, hidden)["loss"]):
        return "that is the loss of the visible tokens: hidden is True where the model is asked."
    if near(loss, _mean_of_texts(logits, ids, hidden)["loss"]):
        return "one mean over the hidden places of the *batch*, not a mean for each text first."
    if not near(loss, expected["loss"]):
        return "at each hidden place, the log softmax over the V tokens, read at the true id."
    if np.any(np.asarray(gradient)[~hidden]):
        return "the loss is right. A visible place is not in it, so its gradient is 0."
    if same(gradient, _no_count(expected["gradient"], *case)):
        return "the loss is right. It is a mean, so the gradient carries 1 / |H|, too."
    if same(gradient, _no_true(None, *case)):
        return "the loss is right. The gradient is claimed *minus true*: subtract 1 at the true id."
    return "the loss is right. At a hidden place the gradient is (softmax - one-hot) / |H|."


# --- 11.q6 judgement -----------------------------------------------------------------------

RUBRIC = """\
4 points; 1 for each, half marks allowed.
1. The 91 %: paragraphs of the same manual are in training and test, so the figure is none for new
   manuals; split by manual (file). Half a mark for "leak" without the remedy.
2. "It is the pre-training": 27 % is chance with four topics; random weights at one small rate for one
   epoch are a control that was not trained. They need their own rate and more steps, chosen on
   validation. Full marks also require the control that is missing: TF-IDF (words alone).
3. "No fine-tuning, no other pooling": one epoch at one rate does not show that fine-tuning is worse;
   tune rate and steps. [CLS] was not compared with anything; the mean over real tokens is a cheap
   alternative. Both parts, half a mark each.
4. Uncertainty and wording: one seed and one draw have no interval, and paragraphs of the same manual
   are not independent, however many; five or more paired draws, interval of the difference, test
   read once. AND "understands" is replaced by what such numbers could support (better than a named
   control on new manuals, by so much).
"""

QUESTIONS = [
    Question(
        id="11.q1",
        title="A word in pieces",
        points=3,
        cases=cases_q1,
        expected=wordpiece,
        hint=hint_q1,
        wrong={
            "shortest first": _shortest_first,
            "## written, not looked up": _mark_only_written,
            "## looked up, not written": _mark_not_written,
            "keeps the beginning": _keeps_the_beginning,
            "[UNK] for one character": _unknown_character,
            "takes choices back": _takes_choices_back,
            "longest piece anywhere": _longest_anywhere,
        },
    ),
    Question(
        id="11.q2",
        title="What padding costs",
        points=2,
        cases=cases_q2,
        expected=padding_share,
        hint=hint_q2,
        wrong={
            "mean over batches": _by_batches,
            "over the real tokens": _by_real,
            "last batch filled up": _with_empty_rows,
            "one width for all": _wide,
            "longest first": _longest_first,
            "share of real tokens": _real_share,
        },
    ),
    Question(
        id="11.q3",
        title="Attention that looks past the padding",
        points=3,
        cases=cases_q3,
        expected=attention_weights,
        hint=hint_q3,
        wrong={
            "zeros after the softmax": _not_shared_out_again,
            "scores set to 0": _scores_to_zero,
            "no maximum": _no_maximum,
            "maximum over the padding": _maximum_of_the_padding,
            "minus 10,000": _minus_ten_thousand,
            "rows masked": _rows_masked,
            "rows of padding zeroed, too": _rows_zeroed_too,
            "softmax over the queries": _over_the_queries,
            "queries and keys swapped": lambda q, k, mask: attention_weights(k, q, mask),
            "mask inverted": _mask_inverted,
            "no scale": _no_scale,
            "scale D": _scale_d,
        },
    ),
    Question(
        id="11.q4",
        title="Which tokens to hide, and how",
        points=3,
        cases=cases_q4,
        expected=hide_tokens,
        hint=hint_q4,
        wrong={
            "asks only for what was changed": _asks_only_the_changed,
            "special tokens hidden": _hides_special,
            "always [MASK]": _all_masked,
            "never kept": _never_kept,
            "80/10/10 of all tokens": _other_from_the_rest,
            "kept and replaced swapped": _kept_and_replaced_swapped,
            "hidden inverted": _hidden_inverted,
            "bounds": _bounds,
        },
    ),
    Question(
        id="11.q5",
        title="The loss of the hidden tokens",
        points=4,
        cases=cases_q5,
        expected=masked_loss,
        hint=hint_q5,
        wrong={
            "mean over all places": _mean_of_all_places,
            "all places asked": _every_place,
            "sum": _sum,
            "mean of each text first": _mean_of_texts,
            "the visible tokens": _visible,
            "0/0 when nothing is hidden": _none_is_nan,
            "naive softmax": _naive,
            "gradient at visible places": _gradient_variant(_pull_everywhere),
            "gradient without 1/|H|": _gradient_variant(_no_count),
            "gradient without the true token": _gradient_variant(_no_true),
            "gradient at the true token only": _gradient_variant(_true_only),
        },
    ),
    Question(
        id="11.q6", title="Judgement: a BERT that understands", points=4, manual=True, rubric=RUBRIC
    ),
]
