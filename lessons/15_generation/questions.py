"""Graded questions of lesson 15: two currencies, looking back, sampling, targets that count."""

from __future__ import annotations

import numpy as np

from tlcourse.checks import Question

IGNORED = -100


def near(a: object, b: float) -> bool:
    return isinstance(a, (int, float)) and bool(np.isclose(a, b, rtol=1e-7, atol=0))


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# --- 15.q1 perplexity and bits per byte ----------------------------------------------------


def cases_q1(rng: np.random.Generator) -> list[tuple]:
    """One full text; texts of different length, with nonsense where there is filling."""
    cases = []
    for lengths in ((6,), (7, 3), (2, 9, 5)):
        log_p = -rng.gamma(2.0, 1.5, size=(len(lengths), max(lengths)))
        # Short texts are harder, so that a mean of means is another number.
        log_p *= (1 + 3 / np.array(lengths))[:, None]
        real = np.arange(max(lengths)) < np.array(lengths)[:, None]
        cases.append((log_p, real, int(rng.integers(3, 6) * real.sum() + 1)))
    return cases


def report(log_p, real, num_bytes):
    nats = -log_p[real].sum()
    return _two(nats / real.sum(), nats, num_bytes)


def _two(per_token, nats, num_bytes):
    return {
        "perplexity": float(np.exp(per_token)),
        "bits_per_byte": float(nats / np.log(2) / num_bytes),
    }


def _filling_counts(log_p, real, num_bytes):
    return report(log_p, np.ones_like(real), num_bytes)


def _mean_of_means(log_p, real, num_bytes):
    means = [-row[keep].mean() for row, keep in zip(log_p, real, strict=True)]
    right = report(log_p, real, num_bytes)
    return right | {"perplexity": float(np.exp(np.mean(means)))}


def _mean_of_perplexities(log_p, real, num_bytes):
    """The mean of 'one in how many', not the geometric one."""
    return report(log_p, real, num_bytes) | {"perplexity": float(np.exp(-log_p[real]).mean())}


def _nats_per_byte(log_p, real, num_bytes):
    right = report(log_p, real, num_bytes)
    return right | {"bits_per_byte": right["bits_per_byte"] * float(np.log(2))}


def _bits_per_token(log_p, real, num_bytes):
    right = report(log_p, real, num_bytes)
    return right | {"bits_per_byte": float(np.log2(right["perplexity"]))}


def _two_to_the(log_p, real, num_bytes):
    right = report(log_p, real, num_bytes)
    return right | {"perplexity": float(2 ** np.log(right["perplexity"]))}


def _sign(log_p, real, num_bytes):
    return report(-log_p, real, num_bytes)


def _loss_itself(log_p, real, num_bytes):
    right = report(log_p, real, num_bytes)
    return right | {"perplexity": float(np.log(right["perplexity"]))}


def hint_q1(case: tuple, expected: dict, got: object) -> str:
    if not isinstance(got, dict) or set(got) != set(expected):
        return "return a dict with the keys 'perplexity' and 'bits_per_byte'."
    for key, said, wrong in (
        ("perplexity", "mind the sign: the loss is minus the logarithm.", _sign),
        ("perplexity", "filling is not text: leave it out.", _filling_counts),
        ("perplexity", "that is the loss; the perplexity is exp of it.", _loss_itself),
        ("perplexity", "nats go with exp, bits with powers of two.", _two_to_the),
        (
            "perplexity",
            "first the mean of the losses, then exp: the mean is a geometric one.",
            _mean_of_perplexities,
        ),
        (
            "perplexity",
            "every token counts the same, not every text: one mean over all real tokens.",
            _mean_of_means,
        ),
        ("bits_per_byte", "those are nats per byte; a bit has ln 2 nats.", _nats_per_byte),
        (
            "bits_per_byte",
            "those are bits per token; divide all bits by all bytes.",
            _bits_per_token,
        ),
    ):
        other = wrong(*case)[key]
        if near(got[key], other) and not near(other, expected[key]):
            return said
    return "sum -log_p over the real tokens; divide by their number, or by ln 2 and the bytes."


# --- 15.q2 causal attention behind a cache -------------------------------------------------


def cases_q2(rng: np.random.Generator) -> list[tuple]:
    """No cache; one new token; some; large scores."""
    cases = []
    for n, T, d, e, size in ((4, 4, 3, 3, 1.0), (1, 5, 4, 2, 1.0), (3, 7, 2, 5, 1.0), (2, 4, 6, 3, 25.0)):
        q, k = size * rng.normal(size=(n, d)), size * rng.normal(size=(T, d))
        cases.append((q, k, rng.normal(size=(T, e))))
    return cases


def causal_attention(q, k, v):
    return _attend(q, k, v, np.arange(len(k) - len(q), len(k)))


def _attend(q, k, v, token, scale=None, ahead=0):
    visible = np.arange(len(k)) <= token[:, None] + ahead
    scores = q @ k.T / (np.sqrt(q.shape[1]) if scale is None else scale)
    return softmax(np.where(visible, scores, -np.inf)) @ v


def _mask_from_the_first(q, k, v):
    """As if the rows of q were the first tokens."""
    return _attend(q, k, v, np.arange(len(q)))


def _no_mask(q, k, v):
    return softmax(q @ k.T / np.sqrt(q.shape[1])) @ v


def _no_scale(q, k, v):
    return _attend(q, k, v, np.arange(len(k) - len(q), len(k)), scale=1.0)


def _divided_by_d(q, k, v):
    return _attend(q, k, v, np.arange(len(k) - len(q), len(k)), scale=q.shape[1])


def _one_ahead(q, k, v):
    return _attend(q, k, v, np.arange(len(k) - len(q), len(k)), ahead=1)


def _not_itself(q, k, v):
    """Looks back only; the first token of all has nothing to see, and gets zeros."""
    token = np.arange(len(k) - len(q), len(k))
    out = np.zeros((len(q), v.shape[1]))
    rows = token > 0
    if rows.any():
        out[rows] = _attend(q[rows], k, v, token[rows], ahead=-1)
    return out


def _zeroed_after(q, k, v):
    """Zeroes the weights after the softmax, so that a row no longer sums to 1."""
    token = np.arange(len(k) - len(q), len(k))
    weights = softmax(q @ k.T / np.sqrt(q.shape[1]))
    return weights * (np.arange(len(k)) <= token[:, None]) @ v


def _scores_zeroed(q, k, v):
    """Scores of the future set to 0 instead of minus infinity."""
    token = np.arange(len(k) - len(q), len(k))
    scores = q @ k.T / np.sqrt(q.shape[1])
    return softmax(np.where(np.arange(len(k)) <= token[:, None], scores, 0.0)) @ v


def hint_q2(case: tuple, expected: np.ndarray, got: object) -> str:
    if np.shape(got) != expected.shape:
        return f"one row for each row of q: shape {expected.shape}, got {np.shape(got)}."
    for said, wrong in {
        "the rows of q are the last n tokens: the first of them may see T - n + 1 tokens.": (
            _mask_from_the_first
        ),
        "a token sees its future: mask what comes after it.": _no_mask,
        "divide the scores by the root of d.": _no_scale,
        "by the root of d, not by d.": _divided_by_d,
        "each token sees one token too many: j may be at most i.": _one_ahead,
        "a token sees itself, too.": _not_itself,
        "after the mask a row of weights must still sum to 1: mask the scores, before the softmax.": (
            _zeroed_after
        ),
        "a score of 0 is not 'unseen', as exp(0) = 1; it takes minus infinity.": _scores_zeroed,
    }.items():
        other = wrong(*case)
        if np.allclose(got, other) and not np.allclose(other, expected):
            return said
    if not np.isfinite(got).all():
        return "subtract the largest score of a row before exp: exp(1000) is infinite."
    return "row i of q is token T - n + i; it sees the tokens 0 to T - n + i."


# --- 15.q3 temperature, top-k, top-p -------------------------------------------------------


def cases_q3(rng: np.random.Generator) -> list[tuple]:
    """Each cut alone, both, and the ends of the ranges."""
    settings = ((0.6, 9, 1.0), (1.7, 4, 1.0), (1.5, 9, 0.7), (0.5, 9, 0.8), (2.5, 6, 0.75), (1.3, 1, 0.9))
    cases = []
    for temperature, k, p in settings:
        # No running sum of the probabilities comes near p, so that rounding cannot decide.
        while True:
            logits = rng.permutation(np.arange(9.0) * 0.6 + rng.uniform(0, 0.4, size=9))
            sums = np.cumsum(-np.sort(-softmax(np.sort(logits)[-k:] / temperature)))
            if p == 1 or np.abs(sums - p).min() > 0.01:
                break
        cases.append((logits, temperature, k, p))
    return cases


def next_token_probabilities(logits, temperature, k, p):
    return _cut(logits / temperature, k, p)


def _cut(z, k, p, keep_last=True, renormalise=True):
    order = np.argsort(-z)[:k]
    shares = softmax(z[order])
    running = np.cumsum(shares)
    keep = (running - shares < p) if keep_last else (running <= p)
    keep[0] = True
    shares = np.where(keep, shares, 0)
    found = np.zeros(len(z))
    found[order] = shares / (shares.sum() if renormalise else 1)
    return found


def _times_temperature(logits, temperature, k, p):
    return _cut(logits * temperature, k, p)


def _temperature_last(logits, temperature, k, p):
    """Cuts at temperature 1, then warms what is left."""
    kept = _cut(logits, k, p) > 0
    return softmax(np.where(kept, logits / temperature, -np.inf))


def _no_temperature(logits, temperature, k, p):
    return _cut(logits, k, p)


def _too_few(logits, temperature, k, p):
    """The token that reaches p is left out."""
    return _cut(logits / temperature, k, p, keep_last=False)


def _p_before_k(logits, temperature, k, p):
    """Top-p on all tokens, then top-k."""
    found = _cut(logits / temperature, len(logits), p)
    found[np.argsort(-logits)[k:]] = 0
    return found / found.sum()


def _no_top_k(logits, temperature, k, p):
    return _cut(logits / temperature, len(logits), p)


def _no_top_p(logits, temperature, k, p):
    return _cut(logits / temperature, k, 1.0)


def _not_renormalised(logits, temperature, k, p):
    return _cut(logits / temperature, k, p, renormalise=False)


def _in_order_of_size(logits, temperature, k, p):
    return -np.sort(-next_token_probabilities(logits, temperature, k, p))


def _threshold(logits, temperature, k, p):
    """Keeps tokens whose own probability is at least 1 - p."""
    z = logits / temperature
    order = np.argsort(-z)[:k]
    shares = softmax(z[order])
    keep = shares >= 1 - p
    keep[0] = True
    found = np.zeros(len(z))
    found[order] = np.where(keep, shares, 0)
    return found / found.sum()


def hint_q3(case: tuple, expected: np.ndarray, got: object) -> str:
    if np.shape(got) != expected.shape:
        return f"return a probability for each of the {len(expected)} tokens."
    for said, wrong in {
        "divide by the temperature, do not multiply.": _times_temperature,
        "the temperature is missing.": _no_temperature,
        "first the temperature, then the cuts: it changes how many tokens reach p.": (
            _temperature_last
        ),
        "the token that reaches p is in the set: keep it while what stands before it is below p.": (
            _too_few
        ),
        "top-k comes before top-p, and what it leaves sums to 1 again.": _p_before_k,
        "top-k is missing.": _no_top_k,
        "top-p is missing.": _no_top_p,
        "what is left must sum to 1.": _not_renormalised,
        "give the probabilities back in the order of the logits.": _in_order_of_size,
        "top-p looks at the running sum of the probabilities, not at each one.": _threshold,
    }.items():
        other = wrong(*case)
        if np.allclose(got, other) and not np.allclose(other, expected):
            return said
    return "sort, keep k, softmax, keep a token while the sum of those before it is below p."


# --- 15.q4 targets that count --------------------------------------------------------------


def cases_q4(rng: np.random.Generator) -> list[tuple]:
    """All count; some; one alone; the first token of the vocabulary, and large logits."""
    cases = []
    for T, V, ignored, size in ((3, 4, (), 1.0), (6, 5, (0, 1, 3), 2.0), (4, 6, (0, 1, 2), 1.0), (5, 3, (4,), 300.0)):
        logits, targets = size * rng.normal(size=(T, V)), rng.integers(0, V, size=T)
        targets[-1] = V - 1  # -100 as an index from the end would be an error or another row
        targets[list(ignored)] = IGNORED
        if size > 100:  # what came must have a probability that is not zero
            targets[:4] = logits[:4].argmax(axis=1)
        cases.append((logits, targets))
    return cases


def masked_loss(logits, targets):
    rows = np.flatnonzero(targets != IGNORED)
    return _loss(logits, targets, rows, len(rows))


def _loss(logits, targets, rows, count):
    p = softmax(logits)
    top = logits.max(axis=1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    gradient = np.zeros_like(p)
    gradient[rows] = p[rows]
    gradient[rows, targets[rows]] -= 1
    return {
        "loss": float(-log_p[rows, targets[rows]].sum() / count),
        "gradient": gradient / count,
    }


def _mean_over_all(logits, targets):
    return _loss(logits, targets, np.flatnonzero(targets != IGNORED), len(targets))


def _sum_not_mean(logits, targets):
    return _loss(logits, targets, np.flatnonzero(targets != IGNORED), 1)


def _gradient_of_sum(logits, targets):
    right = masked_loss(logits, targets)
    return right | {"gradient": right["gradient"] * (targets != IGNORED).sum()}


def _ignored_as_zero(logits, targets):
    """Takes token 0 for what does not count."""
    return _loss(logits, np.where(targets == IGNORED, 0, targets), np.arange(len(targets)), len(targets))


def _ignored_pushed(logits, targets):
    """Places that do not count still push all logits down."""
    right, p = masked_loss(logits, targets), softmax(logits)
    out = targets == IGNORED
    gradient = right["gradient"].copy()
    gradient[out] = p[out] / (~out).sum()
    return right | {"gradient": gradient}


def _sign_turned(logits, targets):
    right = masked_loss(logits, targets)
    return right | {"gradient": -right["gradient"]}


def _no_one_hot(logits, targets):
    rows = np.flatnonzero(targets != IGNORED)
    gradient = np.zeros_like(logits)
    gradient[rows] = softmax(logits)[rows] / len(rows)
    return masked_loss(logits, targets) | {"gradient": gradient}


def _moved_again(logits, targets):
    """Moves the targets by one place, though row t is the guess of target t."""
    later = np.append(targets[1:], IGNORED)
    rows = np.flatnonzero(later != IGNORED)
    return _loss(logits, later, rows, max(len(rows), 1))


def hint_q4(case: tuple, expected: dict, got: object) -> str:
    logits, targets = case
    if not isinstance(got, dict) or set(got) != {"loss", "gradient"}:
        return "return a dict with the keys 'loss' and 'gradient'."
    if np.shape(got["gradient"]) != logits.shape:
        return f"the gradient must have shape {logits.shape}, got {np.shape(got['gradient'])}."
    for said, wrong in {
        "divide by the number of places that count, not by all.": _mean_over_all,
        "the loss is a mean over the places that count, not a sum.": _sum_not_mean,
        "-100 means that the place does not count; it is not token 0.": _ignored_as_zero,
        "row t is the guess of target t already: do not move the targets again.": _moved_again,
    }.items():
        other = wrong(logits, targets)
        if near(got["loss"], other["loss"]) and not near(other["loss"], expected["loss"]):
            return said
    if not near(got["loss"], expected["loss"]):
        return "mean of -ln softmax(logits)[t, targets[t]] over the places that count."
    for said, wrong in {
        "the loss is a mean, so its gradient is divided by the count as well.": _gradient_of_sum,
        "mind the sign: p minus one-hot.": _sign_turned,
        "take one-hot of the target away from p.": _no_one_hot,
        "places that do not count have no gradient at all.": _ignored_pushed,
    }.items():
        other = wrong(logits, targets)["gradient"]
        if np.allclose(got["gradient"], other) and not np.allclose(other, expected["gradient"]):
            return said
    return "(p - one-hot) / count in the rows that count, zero in the others."


RUBRIC = """\
4 points; 1 for each, half marks allowed.
1. Perplexity: 31 to 9 shows that the style was learned only if the test chats are new; a random split puts
   chats of one customer on both sides (split by customer). 9 against 12 cannot be compared: other text and
   other tokenizer; on one text, in bits per byte, it could.
2. LoRA: 2e-5 is a rate for all weights, far too small for LoRA, so they compared rates. Tune both on
   validation; several draws, paired interval.
3. Forgetting: the loss that fell is the loss on chats; old text was not measured at all. Measure before and
   after on old text or tasks. Half a point for a remedy: replay, interpolation, an adapter to switch off.
4. Samples: the best of 50 are chosen; asks for samples in order, from fixed seeds, unedited. Names a first
   step that fits (new split, loss on old text).
"""

QUESTIONS = [
    Question(
        id="15.q1",
        title="Perplexity and bits per byte",
        points=3,
        cases=cases_q1,
        expected=report,
        hint=hint_q1,
        wrong={
            "filling counts": _filling_counts,
            "mean of means": _mean_of_means,
            "mean of perplexities": _mean_of_perplexities,
            "nats per byte": _nats_per_byte,
            "bits per token": _bits_per_token,
            "two to the nats": _two_to_the,
            "sign": _sign,
            "the loss itself": _loss_itself,
        },
    ),
    Question(
        id="15.q2",
        title="Causal attention behind a cache",
        points=4,
        cases=cases_q2,
        expected=causal_attention,
        hint=hint_q2,
        wrong={
            "mask from the first token": _mask_from_the_first,
            "no mask": _no_mask,
            "no scale": _no_scale,
            "divided by d": _divided_by_d,
            "one ahead": _one_ahead,
            "not itself": _not_itself,
            "zeroed after the softmax": _zeroed_after,
            "scores zeroed": _scores_zeroed,
        },
    ),
    Question(
        id="15.q3",
        title="Temperature, top-k, top-p",
        points=4,
        cases=cases_q3,
        expected=next_token_probabilities,
        hint=hint_q3,
        wrong={
            "times temperature": _times_temperature,
            "temperature last": _temperature_last,
            "no temperature": _no_temperature,
            "too few": _too_few,
            "p before k": _p_before_k,
            "no top-k": _no_top_k,
            "no top-p": _no_top_p,
            "not renormalised": _not_renormalised,
            "in order of size": _in_order_of_size,
            "a threshold": _threshold,
        },
    ),
    Question(
        id="15.q4",
        title="The gradient, if some targets do not count",
        points=4,
        cases=cases_q4,
        expected=masked_loss,
        hint=hint_q4,
        wrong={
            "mean over all": _mean_over_all,
            "sum": _sum_not_mean,
            "gradient of the sum": _gradient_of_sum,
            "ignored as token 0": _ignored_as_zero,
            "ignored still pushes": _ignored_pushed,
            "sign": _sign_turned,
            "no one-hot": _no_one_hot,
            "moved again": _moved_again,
        },
    ),
    Question(
        id="15.q5",
        title="Judgement: a report about a generator",
        points=4,
        manual=True,
        rubric=RUBRIC,
    ),
]
