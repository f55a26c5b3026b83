"""Graded questions of lesson 12: bytes, the way back, the best pair, what would be lost."""

from __future__ import annotations

import numpy as np

from tlcourse.checks import Question

Arrays = dict[str, np.ndarray]


def near(a: object, b: float) -> bool:
    return isinstance(a, (int, float)) and bool(np.isclose(a, b, rtol=1e-9, atol=0))


# --- 12.q1 bytes ---------------------------------------------------------------------------


def cases_q1(rng: np.random.Generator) -> list[tuple]:
    """Square and other matrices; float32, half precision and four bits."""
    cases = []
    for count, size in ((1, 4), (3, 2), (5, 0.5)):
        shapes = rng.integers(5, 60, size=(count, 2))
        head = (int(rng.integers(2, 9)), int(rng.integers(10, 50)))
        total = 2 * int(rng.integers(20_000, 90_000))
        cases.append((total, size, shapes, int(rng.integers(2, 6)), head))
    return cases


def lora_bytes(
    num_weights: int, weight_bytes: float, shapes: np.ndarray, rank: int, head: tuple[int, int]
) -> dict[str, float]:
    return _bytes(num_weights, weight_bytes, _thin(shapes, rank), _head(head))


def _thin(shapes: np.ndarray, rank: int) -> float:
    return float(rank * np.sum(shapes))


def _head(head: tuple[int, int]) -> float:
    classes, features = head
    return float(classes * features + classes)


def _bytes(num_weights, weight_bytes, thin, head, moments=8.0, gradients=None):
    trained = thin + head
    return {
        "weights": float(weight_bytes * num_weights + 4 * trained),
        "gradients": float(4 * (trained if gradients is None else gradients)),
        "moments": float(moments * trained),
    }


def _full_matrices(num_weights, weight_bytes, shapes, rank, head):
    """As if the update were a whole matrix."""
    return _bytes(num_weights, weight_bytes, float(np.prod(shapes, axis=1).sum()), _head(head))


def _one_factor(num_weights, weight_bytes, shapes, rank, head):
    return _bytes(num_weights, weight_bytes, float(rank * shapes[:, 1].sum()), _head(head))


def _no_head(num_weights, weight_bytes, shapes, rank, head):
    return _bytes(num_weights, weight_bytes, _thin(shapes, rank), 0.0)


def _no_bias(num_weights, weight_bytes, shapes, rank, head):
    return _bytes(num_weights, weight_bytes, _thin(shapes, rank), float(head[0] * head[1]))


def _one_moment(num_weights, weight_bytes, shapes, rank, head):
    return _bytes(num_weights, weight_bytes, _thin(shapes, rank), _head(head), moments=4.0)


def _all_gradients(num_weights, weight_bytes, shapes, rank, head):
    """Gradients for the frozen weights as well."""
    thin, top = _thin(shapes, rank), _head(head)
    return _bytes(num_weights, weight_bytes, thin, top, gradients=num_weights + thin + top)


def _all_quantised(num_weights, weight_bytes, shapes, rank, head):
    """The trained numbers as small as the frozen ones."""
    right = lora_bytes(num_weights, weight_bytes, shapes, rank, head)
    trained = _thin(shapes, rank) + _head(head)
    return right | {"weights": float(weight_bytes * (num_weights + trained))}


def _only_frozen(num_weights, weight_bytes, shapes, rank, head):
    right = lora_bytes(num_weights, weight_bytes, shapes, rank, head)
    return right | {"weights": float(weight_bytes * num_weights)}


def hint_q1(case: tuple, expected: dict, got: object) -> str:
    if not isinstance(got, dict) or set(got) != set(expected):
        return "return a dict with the keys 'weights', 'gradients' and 'moments'."
    if near(got["gradients"], _all_gradients(*case)["gradients"]):
        return "frozen weights get no gradient."
    if near(got["gradients"], _no_head(*case)["gradients"]):
        return "the head is trained in full: count it."
    if near(got["gradients"], _no_bias(*case)["gradients"]):
        return "the head has biases as well, one for each class."
    if near(got["gradients"], _full_matrices(*case)["gradients"]):
        return "a pair has rank * (inputs + outputs) numbers, not inputs * outputs."
    if not near(got["gradients"], expected["gradients"]):
        return "A is (rank, inputs), B is (outputs, rank): rank * (inputs + outputs) for each matrix."
    if not near(got["moments"], expected["moments"]):
        return "AdamW keeps two moments for each trained number, 4 bytes each."
    return "weights: the frozen ones in weight_bytes each, plus A, B and the head in 4 bytes each."


# --- 12.q2 the way back --------------------------------------------------------------------


def cases_q2(rng: np.random.Generator) -> list[tuple]:
    """The first step (B = 0), later ones, both scales, one token only."""
    cases = []
    for texts, tokens, i, o, r, alpha, stable in (
        (2, 3, 5, 4, 2, 6.0, False),
        (3, 2, 4, 6, 3, 4.0, True),
        (1, 1, 6, 5, 4, 1.0, False),
        (2, 4, 5, 5, 2, 8.0, True),
    ):
        B = np.zeros((o, r)) if not cases else rng.normal(size=(o, r))
        X, G = rng.normal(size=(texts, tokens, i)), rng.normal(size=(texts, tokens, o))
        W, A = rng.normal(size=(o, i)), rng.normal(size=(r, i))
        cases.append((X, G, W, A, B, alpha, stable))
    return cases


def _scale(alpha: float, rank: int, rank_stabilised: bool) -> float:
    return alpha / (rank**0.5 if rank_stabilised else rank)


def lora_backward(X, G, W, A, B, alpha: float, rank_stabilised: bool) -> Arrays:
    return _backward(X, G, W, A, B, _scale(alpha, len(A), rank_stabilised))


def _backward(X, G, W, A, B, s) -> Arrays:
    rows, arriving = X.reshape(-1, X.shape[-1]), G.reshape(-1, G.shape[-1])
    dU = s * arriving @ B
    return {
        "A": dU.T @ rows,
        "B": s * arriving.T @ (rows @ A.T),
        "X": (arriving @ W + dU @ A).reshape(X.shape),
    }


def _other_scale(X, G, W, A, B, alpha, stable):
    return lora_backward(X, G, W, A, B, alpha, not stable)


def _always_plain(X, G, W, A, B, alpha, stable):
    return lora_backward(X, G, W, A, B, alpha, False)


def _no_scale(X, G, W, A, B, alpha, stable):
    return _backward(X, G, W, A, B, 1.0)


def _frozen_stops(X, G, W, A, B, alpha, stable):
    """Takes 'frozen' for 'no gradient passes': dX through the pair only."""
    return _backward(X, G, np.zeros_like(W), A, B, _scale(alpha, len(A), stable))


def _pair_forgotten(X, G, W, A, B, alpha, stable):
    right = lora_backward(X, G, W, A, B, alpha, stable)
    return right | {"X": G @ W}


def _pair_unscaled(X, G, W, A, B, alpha, stable):
    """The scale is missing in dX only."""
    return lora_backward(X, G, W, A, B, alpha, stable) | {"X": G @ W + G @ B @ A}


def _mean_over_tokens(X, G, W, A, B, alpha, stable):
    right, count = lora_backward(X, G, W, A, B, alpha, stable), X.shape[0] * X.shape[1] + 1
    return {name: g / (1 if name == "X" else count) for name, g in right.items()}


def _first_text_only(X, G, W, A, B, alpha, stable):
    right = lora_backward(X, G, W, A, B, alpha, stable)
    first = lora_backward(X[:1, :1], G[:1, :1], W, A, B, alpha, stable)
    return {"A": first["A"], "B": first["B"], "X": right["X"]}


def _A_never_moves(X, G, W, A, B, alpha, stable):
    return lora_backward(X, G, W, A, B, alpha, stable) | {"A": np.zeros_like(A)}


def hint_q2(case: tuple, expected: Arrays, got: object) -> str:
    X, G, W, A, B, alpha, stable = case
    if not isinstance(got, dict) or set(got) != {"A", "B", "X"}:
        return "return a dict with the keys 'A', 'B' and 'X'."
    for name, value in expected.items():
        if np.shape(got[name]) != value.shape:
            return f"d{name} must have the shape of {name}, {value.shape}, got {np.shape(got[name])}."

    def is_like(name: str, other: Arrays) -> bool:
        return bool(np.allclose(got[name], other[name])) and not np.allclose(
            other[name], expected[name]
        )

    if is_like("B", _other_scale(*case)):
        return f"rank_stabilised is {stable} here: s = alpha / " + ("sqrt(r)." if stable else "r.")
    if is_like("B", _no_scale(*case)):
        return "the scale s is missing in dB."
    if not np.allclose(got["B"], expected["B"]):
        return "dB = s G^T (X A^T), summed over all tokens of all texts: make every token a row."
    if not np.any(B) and np.any(got["A"]):
        return "here B = 0, so dA must be zero."
    if not np.allclose(got["A"], expected["A"]):
        return "dA = s (G B)^T X, summed over all tokens of all texts."
    if is_like("X", _frozen_stops(*case)):
        return "W is frozen, but the gradient still travels through it: dX has a term G W."
    if is_like("X", _pair_forgotten(*case)):
        return "x is felt through the pair as well: add s (G B) A."
    return "dX = G W + s (G B) A."


# --- 12.q3 the best pair -------------------------------------------------------------------


def cases_q3(rng: np.random.Generator) -> list[tuple]:
    """Wide, tall and square; a rank that keeps all of it."""
    cases = []
    for o, i, rank, alpha in ((4, 6, 1, 2.0), (7, 3, 2, 8.0), (5, 5, 3, 1.0)):
        cases.append((rng.normal(size=(o, i)), rank, alpha))
    cases.append((rng.normal(size=(6, 2)) @ rng.normal(size=(2, 5)), 3, 4.0))
    return cases


def best_pair(update: np.ndarray, rank: int, alpha: float) -> tuple:
    U, sigma, Vt = np.linalg.svd(update, full_matrices=False)
    B = U[:, :rank] * sigma[:rank] * (rank / alpha)
    return Vt[:rank], B, float(np.sum(sigma[rank:] ** 2) / np.sum(sigma**2))


def judged_pair(answer, update: np.ndarray, rank: int, alpha: float) -> dict:
    """What is compared: pairs that have the same product count alike."""
    A, B, lost = answer(update, rank, alpha)
    A, B = np.asarray(A, dtype=float), np.asarray(B, dtype=float)
    fits = A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1]
    return {
        "shape of A": list(A.shape),
        "shape of B": list(B.shape),
        "update": alpha / rank * B @ A if fits else np.zeros_like(update),
        "lost": float(lost),
    }


def judged_reference(update: np.ndarray, rank: int, alpha: float) -> dict:
    return judged_pair(best_pair, update, rank, alpha)


def _pair_unscaled_q3(update, rank, alpha):
    A, B, lost = best_pair(update, rank, alpha)
    return A, B * (alpha / rank), lost


def _scaled_wrong_way(update, rank, alpha):
    A, B, lost = best_pair(update, rank, alpha)
    return A, B * (alpha / rank) ** 2, lost


def _both_scaled(update, rank, alpha):
    """Divides both factors by the scale."""
    A, B, lost = best_pair(update, rank, alpha)
    return A * (rank / alpha), B, lost


def _lost_not_squared(update, rank, alpha):
    A, B, _ = best_pair(update, rank, alpha)
    sigma = np.linalg.svd(update, compute_uv=False)
    return A, B, float(sigma[rank:].sum() / sigma.sum()) + 1e-3 * (len(sigma) == rank)


def _kept_instead(update, rank, alpha):
    A, B, lost = best_pair(update, rank, alpha)
    return A, B, 1 - lost


def _smallest(update, rank, alpha):
    """The last terms instead of the first."""
    U, sigma, Vt = np.linalg.svd(update, full_matrices=False)
    B = U[:, -rank:] * sigma[-rank:] * (rank / alpha)
    return Vt[-rank:], B, float(np.sum(sigma[:-rank] ** 2) / np.sum(sigma**2))


def _no_sigma(update, rank, alpha):
    U, _, Vt = np.linalg.svd(update, full_matrices=False)
    return Vt[:rank], U[:, :rank] * (rank / alpha), best_pair(update, rank, alpha)[2]


def _columns_of_vt(update, rank, alpha):
    """Takes what numpy returns for V, not for its transpose."""
    U, sigma, Vt = np.linalg.svd(update, full_matrices=False)
    A = Vt[:, :rank].T
    if A.shape != (rank, update.shape[1]):
        A = np.resize(A, (rank, update.shape[1]))
    return A, U[:, :rank] * sigma[:rank] * (rank / alpha), best_pair(update, rank, alpha)[2]


def hint_q3(case: tuple, expected: dict, got: object) -> str:
    update, rank, alpha = case
    if not isinstance(got, dict):
        return "return A, B and the share that is lost."
    for name in "AB":
        if got[f"shape of {name}"] != expected[f"shape of {name}"]:
            return f"{name} must have shape {tuple(expected[f'shape of {name}'])}."
    for name, wrong in {
        "(alpha / rank) B A must be the update: divide one of the factors by the scale.": (
            _pair_unscaled_q3
        ),
        "the scale went in the wrong way: the pair is multiplied by alpha / rank later.": (
            _scaled_wrong_way
        ),
        "divide one of the factors by the scale, not both.": _both_scaled,
        "the singular values are missing.": _no_sigma,
        "the first singular values are the largest; keep those.": _smallest,
    }.items():
        other = judged_pair(wrong, *case)["update"]
        if np.allclose(got["update"], other) and not np.allclose(other, expected["update"]):
            return name
    if not np.allclose(got["update"], expected["update"]):
        return "U[:, :r] * sigma[:r] is one factor, the first r rows of V^T the other."
    if np.isclose(got["lost"], 1 - expected["lost"]):
        return "that is the share that is kept."
    return "the share lost is sum of sigma_k^2 over k > rank, over the sum of all sigma_k^2."


# --- 12.q4 what would be lost --------------------------------------------------------------

PREFIX = "base_model.model."


def cases_q4(rng: np.random.Generator) -> list[tuple]:
    """A head that is missing, one that is there, a forgotten factor, a trained bias, none lost."""
    return [
        _file(rng, lost=("head.weight", "head.bias")),
        _file(rng, lost=("block.0.query.lora_B",)),
        _file(rng, lost=()),
        _file(rng, lost=("block.1.value.bias", "head.bias"), also_trained=("block.1.value.bias",)),
        _file(rng, lost=(), also_trained=("decoder_lora_A.weight",)),
    ]


def _file(rng: np.random.Generator, lost: tuple, also_trained: tuple = ()) -> tuple:
    names = [f"block.{b}.{m}.base.weight" for b in range(2) for m in ("query", "value")]
    thin = [f"block.{b}.{m}.lora_{x}" for b in range(2) for m in ("query", "value") for x in "AB"]
    others = ["block.1.value.bias", "decoder_lora_A.weight", "norm.weight"]
    head = ["head.weight", "head.bias"]
    everything = [str(name) for name in rng.permutation(names + thin + others + head)]
    trained = {*thin, *head, *also_trained}
    keys = []
    for name in everything:
        if name in trained and name not in lost:
            keys.append(PREFIX + name + (".weight" if name in thin else ""))
    # Names that end alike, of things that are not asked for.
    keys += [f"{PREFIX}old.{name}" for name in lost]
    return everything, [name in trained for name in everything], keys


def would_be_lost(names: list, trainable: list, keys: list) -> list:
    return sorted(n for n, t in zip(names, trainable, strict=True) if t and _key(n) not in keys)


def _key(name: str) -> str:
    return PREFIX + name + (".weight" if name.endswith((".lora_A", ".lora_B")) else "")


def _lost_frozen_too(names, trainable, keys):
    return sorted(name for name in names if _key(name) not in keys)


def _lost_ignores_lora(names, trainable, keys):
    """Takes it that what has lora in its name is always saved."""
    return [name for name in would_be_lost(names, trainable, keys) if "lora" not in name]


def _lost_weight_missing(names, trainable, keys):
    kept = zip(names, trainable, strict=True)
    return sorted(name for name, t in kept if t and PREFIX + name not in keys)


def _lost_no_prefix(names, trainable, keys):
    kept = zip(names, trainable, strict=True)
    return sorted(n for n, t in kept if t and _key(n).removeprefix(PREFIX) not in keys)


def _lost_any_lora(names, trainable, keys):
    """Adds .weight wherever lora is in the name."""

    def key(name):
        return PREFIX + name + (".weight" if "lora_" in name else "")

    kept = zip(names, trainable, strict=True)
    return sorted(name for name, t in kept if t and key(name) not in keys)


def _lost_by_ending(names, trainable, keys):
    """A key that ends so will do."""
    kept = zip(names, trainable, strict=True)
    ends = [_key(n).removeprefix(PREFIX) for n in names]
    return sorted(
        n
        for (n, t), end in zip(kept, ends, strict=True)
        if t and not any(key.endswith(end) for key in keys)
    )


def _lost_unsorted(names, trainable, keys):
    found = would_be_lost(names, trainable, keys)
    return found[::-1]


def hint_q4(case: tuple, expected: list, got: object) -> str:
    names, trainable, keys = case
    if not isinstance(got, list) or not all(isinstance(name, str) for name in got):
        return "return a list of names."
    if sorted(got) == expected:
        return "the right names; put them into alphabetical order."
    trained = {name for name, is_trained in zip(names, trainable, strict=True) if is_trained}
    extra, missing = sorted(set(got) - set(expected)), sorted(set(expected) - set(got))
    if extra and extra[0] not in trained:
        return f"{extra[0]!r} is frozen (or no name of the model): the base model has it."
    if extra:
        return f"{extra[0]!r} is in the file, as {_key(extra[0])!r}."
    return f"{missing[0]!r} is trained, and {_key(missing[0])!r} is not in the file."


# --- 12.q5 judgement -----------------------------------------------------------------------

RUBRIC = """\
4 points; 1 for each, half marks allowed.
1. Ranks: with alpha fixed the scale alpha / r (and so the step) shrinks as the rank grows, and one
   rate served all; so the comparison is one of step sizes. Names a remedy (a rate for each rank, or
   alpha / sqrt(r)). "The task is of rank 4" is not shown. Also accepted here: chosen on the test set,
   one run, no interval.
2. Full fine-tuning: 1e-3 is far too high for all weights, so the two were not both tuned; asks for
   rates tuned on validation, paired draws and the interval of the difference.
3. Memory and time: the frozen weights stay (at most a factor of 4 in float32 with AdamW), activations
   shrink little; time stays at about two thirds of a step, as the gradient travels through the frozen
   layers. Both halves for the full point.
4. The file holds no head: after loading it is random, right about once in 60. First: save the head
   with the adapter (modules_to_save), reload into a fresh model, compare logits.
"""

QUESTIONS = [
    Question(
        id="12.q1",
        title="The account in bytes",
        points=3,
        cases=cases_q1,
        expected=lora_bytes,
        hint=hint_q1,
        wrong={
            "whole matrices": _full_matrices,
            "A only": _one_factor,
            "no head": _no_head,
            "no biases": _no_bias,
            "one moment": _one_moment,
            "gradients of frozen weights": _all_gradients,
            "trained numbers as small as frozen ones": _all_quantised,
            "frozen weights only": _only_frozen,
        },
    ),
    Question(
        id="12.q2",
        title="The way back through an adapted layer",
        points=4,
        cases=cases_q2,
        expected=lora_backward,
        hint=hint_q2,
        wrong={
            "always alpha / r": _always_plain,
            "scales exchanged": _other_scale,
            "no scale": _no_scale,
            "nothing passes the frozen weight": _frozen_stops,
            "dX without the pair": _pair_forgotten,
            "dX with the pair unscaled": _pair_unscaled,
            "mean over the tokens": _mean_over_tokens,
            "first token only": _first_text_only,
            "A never moves": _A_never_moves,
        },
    ),
    Question(
        id="12.q3",
        title="The best pair of a given rank",
        points=4,
        cases=cases_q3,
        expected=judged_reference,
        apply=judged_pair,
        right=best_pair,
        hint=hint_q3,
        wrong={
            "no scale": _pair_unscaled_q3,
            "scale the wrong way": _scaled_wrong_way,
            "both factors scaled": _both_scaled,
            "share without squares": _lost_not_squared,
            "share that is kept": _kept_instead,
            "smallest singular values": _smallest,
            "no singular values": _no_sigma,
            "columns of V transposed": _columns_of_vt,
        },
    ),
    Question(
        id="12.q4",
        title="What would be lost?",
        points=3,
        cases=cases_q4,
        expected=would_be_lost,
        hint=hint_q4,
        wrong={
            "frozen ones too": _lost_frozen_too,
            "lora is always saved": _lost_ignores_lora,
            "no .weight": _lost_weight_missing,
            "no prefix": _lost_no_prefix,
            "lora anywhere in the name": _lost_any_lora,
            "a key that ends so": _lost_by_ending,
            "not sorted": _lost_unsorted,
        },
    ),
    Question(
        id="12.q5",
        title="Judgement: a report about LoRA",
        points=4,
        manual=True,
        rubric=RUBRIC,
    ),
]
