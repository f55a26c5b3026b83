"""Graded questions of lesson 05: the account, tied weights, neighbours, ridge, and leaks."""

from __future__ import annotations

import numpy as np

from tlcourse.checks import Question

Arrays = dict[str, np.ndarray]


def apart(got: object, expected: object) -> bool:
    """True if an answer differs, in shape or in value."""
    got, expected = np.asarray(got), np.asarray(expected)
    return got.shape != expected.shape or not np.allclose(got, expected, rtol=1e-6, atol=1e-8)


# --- 05.q1 the account ---------------------------------------------------------------------


def cases_q1(rng: np.random.Generator) -> list[tuple]:
    """Images, epochs, forward, head, copies: no copies, some, and a case where caching loses."""
    n, e = int(rng.integers(200, 900)), int(rng.integers(10, 40))
    f, g = float(rng.integers(5_000, 20_000)), float(rng.integers(10, 90))
    return [(n, e, f, g, 0), (n + 1, e + 3, 2 * f, g, 4), (n, 5, f, 3 * g, 7), (1, 1, f, g, 0)]


def costs(
    num_images: int, num_epochs: int, forward: float, head: float, num_copies: int
) -> dict[str, float]:
    every_epoch = num_epochs * num_images * (forward + head)
    once = num_images * ((1 + num_copies) * forward + num_epochs * head)
    return {"every epoch": every_epoch, "once": once, "ratio": every_epoch / once}


def _costs_variant(once_of):
    def wrong(num_images, num_epochs, forward, head, num_copies):
        right = costs(num_images, num_epochs, forward, head, num_copies)
        once = once_of(num_images, num_epochs, forward, head, num_copies)
        return right | {"once": once, "ratio": right["every epoch"] / once}

    return wrong


def _free_head(num_images, num_epochs, forward, head, num_copies):
    every_epoch, once = num_epochs * num_images * forward, num_images * (1 + num_copies) * forward
    return {"every epoch": every_epoch, "once": once, "ratio": every_epoch / once}


def _upside_down(*case):
    right = costs(*case)
    return right | {"ratio": 1 / right["ratio"]}


def _copies_in_every_epoch(num_images, num_epochs, forward, head, num_copies):
    """Takes it that each epoch shows all copies."""
    return (1 + num_copies) * num_images * (forward + num_epochs * head)


def hint_q1(case: tuple, expected: dict, got: object) -> str:
    if not isinstance(got, dict) or set(got) != set(expected):
        return "return a dict with the keys 'every epoch', 'once' and 'ratio'."
    if apart(got["every epoch"], expected["every epoch"]):
        return "every epoch, each image passes the backbone and then the head."
    if apart(got["once"], expected["once"]):
        if case[4]:
            return (
                "the image and each of its copies pass the backbone once; in an epoch the head "
                "still sees one version of each image."
            )
        return "once through the backbone, but the head still works in every epoch."
    return "how many times cheaper is 'once': the larger account over the smaller."


# --- 05.q2 a pooled head as a flattened one -----------------------------------------------


def cases_q2(rng: np.random.Generator) -> list[tuple]:
    shapes = ((3, 2, 2, 2), (4, 5, 1, 3), (2, 3, 4, 2))  # classes, channels, height, width
    return [(rng.normal(size=(k, c)), h, w) for k, c, h, w in shapes]


def flattened_weight(weight: np.ndarray, height: int, width: int) -> np.ndarray:
    places = height * width
    return np.repeat(weight, places, axis=1) / places


def hint_q2(case: tuple, expected: np.ndarray, got: object) -> str:
    weight, height, width = case
    if np.shape(got) != expected.shape:
        return f"one weight for each number of the map: shape {expected.shape}."
    got = np.asarray(got)
    if not apart(got, expected * height * width):
        return "the mean divides by the number of places; so must the weight."
    if not apart(got, np.tile(weight, height * width) / (height * width)):
        return (
            "flattening keeps the places of one channel together: channel 0 at all its places, "
            "then channel 1. (np.repeat, not np.tile.)"
        )
    return "z = sum_c v_c (1/P) sum_p a_cp: which weight multiplies a_cp?"


# --- 05.q3 neighbours ----------------------------------------------------------------------


def cases_q3(rng: np.random.Generator) -> list[tuple]:
    """Lengths that differ widely (cosine is not Euclid), and many ties."""
    cases = []
    for n, m, d, num_classes, k in ((9, 12, 2, 3, 1), (12, 15, 4, 3, 4), (10, 20, 3, 5, 10)):
        lengths = np.exp(rng.normal(size=(n, 1)) * 1.5)
        targets = np.concatenate([np.arange(num_classes), rng.integers(num_classes, size=n)])[:n]
        train = rng.normal(size=(n, d)) * lengths
        queries = rng.normal(size=(m, d)) * np.exp(rng.normal(size=(m, 1)))
        cases.append((train, rng.permutation(targets), queries, k, num_classes))
    return cases


def neighbours(
    train: np.ndarray, targets: np.ndarray, queries: np.ndarray, k: int, num_classes: int
) -> np.ndarray:
    return _votes(train, targets, queries, k, num_classes).argmax(axis=1)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _votes(train, targets, queries, k, num_classes) -> np.ndarray:
    nearest = np.argsort(-(_unit(queries) @ _unit(train).T), axis=1)[:, :k]
    return np.eye(num_classes)[targets][nearest].sum(axis=1)


def _by_distance(train, targets, queries, k, num_classes):
    distance = np.linalg.norm(queries[:, None] - train[None], axis=2)
    nearest = np.argsort(distance, axis=1)[:, :k]
    return np.eye(num_classes)[targets][nearest].sum(axis=1).argmax(axis=1)


def _by_product(train, targets, queries, k, num_classes):
    """Forgets the length of the training vectors: a long one is similar to everything."""
    nearest = np.argsort(-(queries @ train.T), axis=1)[:, :k]
    return np.eye(num_classes)[targets][nearest].sum(axis=1).argmax(axis=1)


def _farthest(train, targets, queries, k, num_classes):
    return neighbours(-train, targets, queries, k, num_classes)


def _only_the_nearest(train, targets, queries, k, num_classes):
    return neighbours(train, targets, queries, 1, num_classes)


def _larger_class_wins(train, targets, queries, k, num_classes):
    votes = _votes(train, targets, queries, k, num_classes)
    return num_classes - 1 - votes[:, ::-1].argmax(axis=1)


def hint_q3(case: tuple, expected: np.ndarray, got: object) -> str:
    if np.shape(got) != expected.shape:
        return f"one class for each query: shape {expected.shape}, got {np.shape(got)}."
    answer = np.asarray(got)
    if not apart(answer, _by_distance(*case)):
        return "that is the Euclidean distance; the question asks for the cosine."
    if not apart(answer, _by_product(*case)):
        return "divide each training vector by its own length, too."
    if not apart(answer, _farthest(*case)):
        return "argsort sorts from small to large; the most similar come last."
    if not apart(answer, _larger_class_wins(*case)):
        return "equal votes go to the smaller class number: argmax of the votes does that."
    if case[3] > 1 and not apart(answer, _only_the_nearest(*case)):
        return f"all {case[3]} nearest vote, not only the first."
    return "unit vectors, similarities, the k largest of each row, votes, argmax."


# --- 05.q4 ridge ---------------------------------------------------------------------------


def cases_q4(rng: np.random.Generator) -> list[tuple]:
    """Features far from mean zero, unequal classes; more features than examples; many more."""
    cases = []
    for n, d, num_classes, penalty in ((12, 3, 2, 0.5), (9, 20, 3, 4.0), (15, 15, 4, 30.0)):
        features = rng.normal(size=(n, d)) + rng.normal(size=d) * 3
        targets = np.concatenate([np.arange(num_classes), np.zeros(n, dtype=int)])[:n]
        cases.append((features, rng.permutation(targets), num_classes, penalty))
    return cases


def ridge(features: np.ndarray, targets: np.ndarray, num_classes: int, penalty: float) -> Arrays:
    one_hot = np.eye(num_classes)[targets]
    middle, share = features.mean(axis=0), one_hot.mean(axis=0)
    X, T = features - middle, one_hot - share
    weight = np.linalg.solve(X.T @ X + penalty * np.eye(X.shape[1]), X.T @ T).T
    return {"weight": weight, "bias": share - weight @ middle}


def _no_centring(features, targets, num_classes, penalty):
    d = features.shape[1]
    gram = features.T @ features + penalty * np.eye(d)
    weight = np.linalg.solve(gram, features.T @ np.eye(num_classes)[targets]).T
    return {"weight": weight, "bias": np.zeros(num_classes)}


def _penalised_bias(features, targets, num_classes, penalty):
    """A column of ones, penalised like any other."""
    wide = np.hstack([features, np.ones((len(features), 1))])
    found = _no_centring(wide, targets, num_classes, penalty)["weight"]
    return {"weight": found[:, :-1], "bias": found[:, -1]}


def _ridge_variant(penalty_of=lambda penalty, n: penalty, change=lambda found, share: found):
    def wrong(features, targets, num_classes, penalty):
        found = ridge(features, targets, num_classes, penalty_of(penalty, len(features)))
        return change(found, np.eye(num_classes)[targets].mean(axis=0))

    return wrong


def hint_q4(case: tuple, expected: Arrays, got: object) -> str:
    features, targets, num_classes, penalty = case
    if not isinstance(got, dict) or set(got) != {"weight", "bias"}:
        return "return a dict with the keys 'weight' and 'bias'."
    for name, right in expected.items():
        if np.shape(got[name]) != right.shape:
            return f"the {name} must have the shape {right.shape}, got {np.shape(got[name])}."
    if apart(got["weight"], expected["weight"]):
        for wrong_penalty, word in (
            (penalty * len(features), "times n: J adds up the examples, it does not average"),
            (1 / penalty, "upside down"),
            (penalty / 2, "halved: the halves of J cancel"),
        ):
            if not apart(
                got["weight"], ridge(features, targets, num_classes, wrong_penalty)["weight"]
            ):
                return f"the penalty is {word}."
        for leaky in (_no_centring, _penalised_bias):
            if not apart(got["weight"], leaky(*case)["weight"]):
                return (
                    "the bias must not be penalised. Take the means off features and targets "
                    "first; the bias follows from them."
                )
        return "V (X^T X + lambda I) = T^T X, with X and T the differences from their means."
    return "the weight is right. b = mean target - V (mean feature)."


# --- 05.q5 a pipeline with three leaks -----------------------------------------------------


def cases_q5(rng: np.random.Generator) -> list[tuple]:
    """Validation and test drawn elsewhere than training, so that each leak changes the answer."""
    return [_pipeline_case(rng, d) for d in (4, 6, 5)]


PENALTIES = (0.01, 1.0, 30.0, 1000.0)


def _pipeline_case(rng: np.random.Generator, d: int) -> tuple:
    """Drawn again until the right answer and all the known leaks can be told apart."""
    while True:
        case = (
            *(_part(rng, n, d, shift) for n, shift in ((24, 0.0), (33, 0.4), (41, 1.2))),
            list(PENALTIES),
        )
        answers = [tuple(found(*case).values()) for found in (honest, *map(_leaky_of, _LEAKS))]
        if len(set(answers)) == len(answers):
            return case


def _leaky_of(which: tuple[str, int]):
    return _leaky(*which)


def _part(rng: np.random.Generator, n: int, d: int, shift: float) -> Arrays:
    targets = np.arange(n) % 3
    centres = np.eye(3, d) * 1.2
    features = (centres[targets] + rng.normal(size=(n, d)) + shift) * np.linspace(1, 20, d)
    return {"features": features, "targets": targets}


def _run(train, val, test, penalties, statistics, chosen_on):
    """The pipeline, with the rows that give the statistics and the part that chooses."""
    middle, spread = statistics.mean(axis=0), statistics.std(axis=0)
    scaled = [(part["features"] - middle) / spread for part in (train, val, test)]
    found = []
    for penalty in penalties:
        head = ridge(scaled[0], train["targets"], 3, penalty)
        accuracies = [
            float(np.mean((H @ head["weight"].T + head["bias"]).argmax(axis=1) == part["targets"]))
            for H, part in zip(scaled, (train, val, test), strict=True)
        ]
        found.append((accuracies[chosen_on], accuracies[2], penalty))
    best = max(found, key=lambda one: one[0])  # the first of equals
    return {"penalty": float(best[2]), "accuracy": best[1]}


def honest(train: Arrays, val: Arrays, test: Arrays, penalties: list) -> dict[str, float]:
    return _run(train, val, test, penalties, train["features"], 1)


def _leaky(statistics_from: str, chosen_on: int):
    def wrong(train, val, test, penalties):
        parts = {"train": [train], "test": [test], "all": [train, val, test]}[statistics_from]
        rows = np.concatenate([part["features"] for part in parts])
        return _run(train, val, test, penalties, rows, chosen_on)

    return wrong


_LEAKS = (("all", 2), ("all", 1), ("train", 2), ("train", 0))


def _own_statistics(train, val, test, penalties):
    """Each part standardised by itself."""
    parts = []
    for part in (train, val, test):
        H = part["features"]
        parts.append({**part, "features": (H - H.mean(axis=0)) / H.std(axis=0)})
    return honest(*parts, penalties)


def _reports_validation(train, val, test, penalties):
    right = honest(train, val, test, penalties)
    return right | {"accuracy": honest(train, val, val, penalties)["accuracy"]}


def hint_q5(case: tuple, expected: dict, got: object) -> str:
    if not isinstance(got, dict) or set(got) != {"penalty", "accuracy"}:
        return "return a dict with the keys 'penalty' and 'accuracy'."
    values = list(got.values())
    messages = {
        ("all", 2): "all three leaks are still there: statistics, choice, and what they read.",
        ("all", 1): "whose mean and deviation are these? Only the training images may give them.",
        ("train", 2): "the penalty is still chosen by the test accuracy.",
        ("train", 0): (
            "the training images may not choose the penalty: the weakest always fits them best."
        ),
    }
    for which, message in messages.items():
        if not apart(values, [_leaky(*which)(*case)[name] for name in got]):
            return message
    if not apart(values, [_reports_validation(*case)[name] for name in got]):
        return "the accuracy to report is that of the test set, read once, after the choice."
    if not apart(values, [_own_statistics(*case)[name] for name in got]):
        return "one mean and one deviation, those of the training images, for all three parts."
    return (
        "statistics from train; fit on train; choose by the accuracy on val (the first of equals); "
        "report the accuracy on test."
    )


# --- 05.q6 judgement -----------------------------------------------------------------------

RUBRIC = """\
4 points; 1 for each, half marks allowed.
1. Layer: says that the last layer is the wrong place to look *only*, for a reason (pre-training for
   product names was rewarded for ignoring blur, light and background; the question is a low-level
   one), and proposes to scan several layers, not just another guess.
2. Measurement: layer, pooling and penalty chosen on validation (or by cross-validation), which is
   split by camera or by day so that near-copies of one photo are not on both sides; controls named
   (random weights and/or pixels or mean brightness), test read once. Names the flaw in 97 %: 95 %
   of the photos are sharp, so always saying "sharp" gets 95 % (balanced accuracy or recall of the
   blurred class is wanted).
3. Flatten or mean: with 40 blurred images, 100,000 weights per class are a bet against the odds,
   but it is measured, not decreed; or argues for the max or for an early layer's mean because blur
   shows anywhere.
4. Cost and scale: the backbone is frozen and the photos do not change, so one pass (over the 800
   labelled photos for training, over the million once to apply the head) replaces 30; needs
   evaluation mode and no augmentation (or a fixed number of copies). Standardisation uses stored
   training statistics: those of the day's photos make an answer depend on the other photos (a day
   with a dirty lens would look normal).
"""

QUESTIONS = [
    Question(
        id="05.q1",
        title="The account",
        points=2,
        cases=cases_q1,
        expected=costs,
        hint=hint_q1,
        wrong={
            "the head is free": _free_head,
            "the head works once": _costs_variant(lambda n, e, f, g, m: n * (1 + m) * (f + g)),
            "copies cost nothing": _costs_variant(lambda n, e, f, g, m: n * (f + e * g)),
            "copies, but not the image": _costs_variant(
                lambda n, e, f, g, m: n * (max(m, 1) * f + e * g)
            ),
            "the head sees all copies in every epoch": _costs_variant(_copies_in_every_epoch),
            "upside down": _upside_down,
        },
    ),
    Question(
        id="05.q2",
        title="A pooled head is a flattened head",
        points=2,
        cases=cases_q2,
        expected=flattened_weight,
        hint=hint_q2,
        wrong={
            "not divided": lambda weight, h, w: np.repeat(weight, h * w, axis=1),
            "tiled": lambda weight, h, w: np.tile(weight, h * w) / (h * w),
            "one place only": lambda weight, h, w: (
                np.repeat(weight, h * w, axis=1) * (np.arange(weight.shape[1] * h * w) % (h * w) == 0)
            ),
            "not flattened": lambda weight, h, w: weight / (h * w),
            "transposed": lambda weight, h, w: flattened_weight(weight, h, w).T,
        },
    ),
    Question(
        id="05.q3",
        title="Neighbours",
        points=3,
        cases=cases_q3,
        expected=neighbours,
        hint=hint_q3,
        wrong={
            "Euclid": _by_distance,
            "products of raw vectors": _by_product,
            "the least similar": _farthest,
            "only the nearest": _only_the_nearest,
            "ties to the larger class": _larger_class_wins,
            "votes, not classes": _votes,
        },
    ),
    Question(
        id="05.q4",
        title="A probe in closed form",
        points=4,
        cases=cases_q4,
        expected=ridge,
        hint=hint_q4,
        wrong={
            "no bias": _no_centring,
            "bias penalised": _penalised_bias,
            "penalty times n": _ridge_variant(lambda penalty, n: penalty * n),
            "penalty upside down": _ridge_variant(lambda penalty, n: 1 / penalty),
            "penalty halved": _ridge_variant(lambda penalty, n: penalty / 2),
            "bias without the mean feature": _ridge_variant(
                change=lambda found, share: found | {"bias": share}
            ),
            "transposed": _ridge_variant(
                change=lambda found, share: found | {"weight": found["weight"].T}
            ),
        },
    ),
    Question(
        id="05.q5",
        title="Three leaks",
        points=4,
        cases=cases_q5,
        expected=honest,
        hint=hint_q5,
        wrong={
            "as found": _leaky("all", 2),
            "statistics of everything": _leaky("all", 1),
            "chosen on test": _leaky("train", 2),
            "chosen on train": _leaky("train", 0),
            "each part by its own statistics": _own_statistics,
            "reports the validation accuracy": _reports_validation,
        },
    ),
    Question(
        id="05.q6",
        title="Judgement: which layer, and what for",
        points=4,
        manual=True,
        rubric=RUBRIC,
    ),
]
