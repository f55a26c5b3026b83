"""Lesson 05: the reference answers against torch, scikit-learn and counting; what is derived."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from judging import assert_hints_name, assert_reference_is
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tlcourse import locations
from tlcourse.questions import Question, load_questions

FOLDER = locations.lessons_dir() / "05_feature_extraction"
QUESTIONS = {question.id: question for question in load_questions(FOLDER / "questions.py")}
SEEDS = (0, 1, b"a class secret")


def counted_costs(num_images, num_epochs, forward, head, num_copies):
    """The account, by walking through the training."""
    every_epoch = once = 0.0
    for _ in range(num_images):
        once += (1 + num_copies) * forward
        for _ in range(num_epochs):
            every_epoch += forward + head
            once += head
    return {"every epoch": every_epoch, "once": once, "ratio": every_epoch / once}


def flattened_by_torch(weight, height, width):
    """The weight is the gradient of the pooled logits in the map."""
    maps = torch.zeros(weight.shape[1], height, width, dtype=torch.float64, requires_grad=True)
    rows = []
    for row in torch.tensor(weight):
        (gradient,) = torch.autograd.grad((maps.mean(dim=(1, 2)) * row).sum(), maps)
        rows.append(gradient.flatten())
    return torch.stack(rows).numpy()


def neighbours_by_sklearn(train, targets, queries, k, num_classes):
    model = KNeighborsClassifier(n_neighbors=k, metric="cosine", algorithm="brute")
    return model.fit(train, targets).predict(queries)


def ridge_by_sklearn(features, targets, num_classes, penalty):
    model = Ridge(alpha=penalty, solver="svd").fit(features, np.eye(num_classes)[targets])
    return {"weight": model.coef_, "bias": model.intercept_}


def pipeline_by_sklearn(train, val, test, penalties):
    best = None
    for penalty in penalties:
        model = make_pipeline(StandardScaler(), RidgeClassifier(alpha=penalty, solver="svd"))
        model.fit(train["features"], train["targets"])
        score = model.score(val["features"], val["targets"])
        if best is None or score > best[0]:
            best = score, penalty, model.score(test["features"], test["targets"])
    return {"penalty": best[1], "accuracy": best[2]}


TRUTH = {
    "05.q1": counted_costs,
    "05.q2": flattened_by_torch,
    "05.q3": neighbours_by_sklearn,
    "05.q4": ridge_by_sklearn,
    "05.q5": pipeline_by_sklearn,
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("question_id", TRUTH)
def test_reference_equals_truth(question_id: str, seed: int | bytes) -> None:
    question: Question = QUESTIONS[question_id]
    assert_reference_is(TRUTH[question_id], question, seed, rtol=1e-8, atol=1e-9)


def test_cases_reach_what_the_questions_are_about() -> None:
    ratios = [QUESTIONS["05.q1"].expect(case)["ratio"] for case in QUESTIONS["05.q1"].draw_cases(0)]
    assert min(ratios) < 1 < max(ratios), "caching must win and lose"
    votes = QUESTIONS["05.q3"].wrong["votes, not classes"]
    tied = [np.sort(votes(*case), axis=1)[:, -2:] for case in QUESTIONS["05.q3"].draw_cases(0)]
    assert any((pair[:, 0] == pair[:, 1]).any() for pair in tied), "no equal votes"
    shapes = [case[0].shape for case in QUESTIONS["05.q4"].draw_cases(0)]
    assert {n < d for n, d in shapes} == {True, False}, "more and fewer features than examples"


def test_the_listing_is_the_leaky_pipeline_that_the_check_knows() -> None:
    text = (FOLDER / "exercise.py").read_text(encoding="utf-8")
    listing = text.split("# ```text\n")[1].split("# ```")[0]
    source = "\n".join(line.removeprefix("# ") for line in listing.splitlines())

    def ridge(features, targets, num_classes, penalty):
        return QUESTIONS["05.q4"].expected(features, targets, num_classes, penalty)

    names = {"np": np, "ridge": ridge}
    exec(source, names)
    question = QUESTIONS["05.q5"]
    for case in question.draw_cases(0):
        found, known = names["pipeline"](*case), question.wrong["as found"](*case)
        assert found == pytest.approx(known)
        assert found != pytest.approx(question.expect(case))


HINTS = {
    "05.q1": {
        "the head works once": "in every epoch",
        "copies cost nothing": "copies pass the backbone once",
        "upside down": "larger account over the smaller",
    },
    "05.q2": {"tiled": "np.repeat", "not divided": "number of places", "transposed": "shape"},
    "05.q3": {
        "Euclid": "Euclidean",
        "products of raw vectors": "own length",
        "the least similar": "small to large",
        "votes, not classes": "one class for each query",
    },
    "05.q4": {
        "bias penalised": "not be penalised",
        "no bias": "not be penalised",
        "penalty times n": "times n",
        "penalty upside down": "upside down",
        "transposed": "shape",
        "bias without the mean feature": "weight is right",
    },
    "05.q5": {
        "as found": "all three",
        "statistics of everything": "whose mean",
        "chosen on test": "chosen by the test",
        "chosen on train": "training images may not choose",
        "reports the validation accuracy": "test set, read once",
    },
}


@pytest.mark.parametrize("question_id", HINTS)
def test_hints_name_the_mistake(question_id: str) -> None:
    assert_hints_name(QUESTIONS[question_id], HINTS[question_id])


# What the lesson derives.


def small_table():
    rng = np.random.default_rng(0)
    features, targets = rng.normal(size=(30, 7)) + 2, np.arange(30) % 3
    centred, aims = features - features.mean(axis=0), np.eye(3)[targets] - 1 / 3
    return features, targets, centred, aims


def ridge(features, targets, penalty):
    return ridge_by_sklearn(features, targets, 3, penalty)


@pytest.mark.parametrize("penalty", [0.01, 1.0, 100.0])
def test_a_probe_is_a_vote_among_examples(penalty: float) -> None:
    features, targets, X, T = small_table()
    votes = np.linalg.solve(X @ X.T + penalty * np.eye(len(X)), T)
    np.testing.assert_allclose(votes.T @ X, ridge(features, targets, penalty)["weight"], atol=1e-10)


def test_a_huge_penalty_leaves_the_class_means() -> None:
    features, targets, X, _ = small_table()
    means = np.stack([X[targets == label].mean(axis=0) for label in range(3)])
    weight = ridge(features, targets, 1e9)["weight"]
    np.testing.assert_allclose(weight * 1e9, 10 * means, rtol=1e-5, atol=1e-6)


def test_scaling_all_features_is_another_penalty() -> None:
    features, targets, *_ = small_table()
    scaled = ridge(5 * features, targets, 3.0 * 25)["weight"]
    np.testing.assert_allclose(5 * scaled, ridge(features, targets, 3.0)["weight"], atol=1e-12)


def test_ridge_scores_add_up_to_one_and_can_be_negative() -> None:
    features, targets, *_ = small_table()
    head = ridge(features, targets, 0.1)
    scores = 10 * features @ head["weight"].T + head["bias"]
    np.testing.assert_allclose(scores.sum(axis=1), 1.0, atol=1e-10)
    assert (scores < 0).any()


def test_vote_shares_split_into_bias_and_variance() -> None:
    rng = np.random.default_rng(0)
    shares, truth = rng.dirichlet(np.ones(4), size=50), np.eye(4)[2]
    average = shares.mean(axis=0)
    bias = ((average - truth) ** 2).sum()
    variance = ((shares - average) ** 2).sum(axis=1).mean()
    assert ((shares - truth) ** 2).sum(axis=1).mean() == pytest.approx(bias + variance)
