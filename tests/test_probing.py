from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import tlcourse as tl
from tlcourse import probing
from tlcourse.evaluation import wilson_interval
from tlcourse.freezing import layer_names
from tlcourse.layers import LayerFeatures
from tlcourse.probing import Features


def blobs(
    per_class: int, classes: int = 4, width: int = 6, seed: int = 0, spread: float = 1.0
) -> Features:
    """Classes around fixed centres; columns of very different scale and offset."""
    centres = np.random.default_rng(99).normal(size=(classes, width))
    rng = np.random.default_rng(seed)
    targets = np.repeat(np.arange(classes), per_class)
    raw = centres[targets] + spread * rng.normal(size=(len(targets), width))
    return Features((raw * 10.0 ** np.linspace(-2, 2, width) + 5.0).astype(np.float32), targets)


def reference(train: Features, C: float):
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=5000, tol=1e-8))
    return model.fit(train.features.astype(np.float64), train.targets)


# Features


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs)


def test_extracts_in_order_in_evaluation_mode() -> None:
    backbone = Backbone()
    inputs, targets = torch.randn(23, 5), torch.arange(23) % 4
    buffers = [buffer.clone() for buffer in backbone.buffers()]
    loader = list(zip(inputs.split(10), targets.split(10), strict=True))
    found = tl.extract_features(backbone, loader)
    assert found.features.dtype == np.float32 and found.features.shape == (23, 7)
    np.testing.assert_array_equal(found.targets, targets.numpy())
    assert all(part.training for part in backbone.modules())
    assert all(torch.equal(a, b) for a, b in zip(buffers, backbone.buffers(), strict=True))
    expected = backbone.eval()(inputs).detach().numpy()
    np.testing.assert_allclose(found.features, expected, rtol=1e-5, atol=1e-8)


def test_extracts_from_keyword_inputs_and_low_precision() -> None:
    backbone = Backbone().to(torch.bfloat16)
    loader = [({"inputs": torch.randn(4, 5, dtype=torch.bfloat16)}, torch.arange(4))]
    assert tl.extract_features(backbone, loader).features.dtype == np.float32


def test_refuses_empty_loaders_and_maps() -> None:
    with pytest.raises(ValueError, match="loader is empty"):
        tl.extract_features(Backbone(), [])
    loader = [(torch.zeros(2, 3, 4), torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match=r"features of shape \(B, D\), got .*2, 3, 4"):
        tl.extract_features(nn.Identity(), loader)


@pytest.mark.parametrize(
    ("features", "targets", "message"),
    [
        (np.zeros(3), np.zeros(3, int), r"\(3,\) and \(3,\)"),
        (np.zeros((3, 2)), np.zeros(4, int), r"\(3, 2\) and \(4,\)"),
        (np.zeros((3, 2)), np.zeros(3), "integers, got float64"),
        (np.zeros((0, 2)), np.zeros(0, int), "at least one example"),
        (np.zeros((2, 2)), np.array([0, -1]), "class numbers >= 0"),
        (np.array([[np.nan]]), np.array([0]), "finite"),
    ],
)
def test_features_are_checked(features: np.ndarray, targets: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Features(features, targets)


def test_rows_are_taken_in_the_order_asked_for() -> None:
    part = blobs(3).take(np.array([5, 0]))
    np.testing.assert_array_equal(part.features, blobs(3).features[[5, 0]])
    assert part.targets.tolist() == [1, 0]


def test_layers_extracted_together_are_those_extracted_one_by_one() -> None:
    network = tl.load_backbone("glyphnet_bn", pretrained=False).train()
    inputs, targets = torch.randn(7, 3, 32, 32), torch.arange(7) % 3
    loader = list(zip(inputs.split(4), targets.split(4), strict=True))
    layers = layer_names(network)[1:3]
    found = probing.extract_layers(network, loader, layers, ("mean", "flatten"))
    assert list(found) == [(layer, how) for layer in layers for how in ("mean", "flatten")]
    for (layer, how), part in found.items():
        alone = tl.extract_features(LayerFeatures(network, layer, how), loader)  # type: ignore[arg-type]
        np.testing.assert_array_equal(part.features, alone.features)
        np.testing.assert_array_equal(part.targets, targets.numpy())
    assert all(part.training for part in network.modules())


def test_extract_layers_refuses_nothing_to_do() -> None:
    network = tl.load_backbone("glyphnet", pretrained=False)
    loader = [(torch.randn(1, 3, 32, 32), torch.tensor([0]))]
    with pytest.raises(ValueError, match="loader is empty"):
        probing.extract_layers(network, [], ["body.stem"])
    with pytest.raises(ValueError, match="at least one pooling"):
        probing.extract_layers(network, loader, ["body.stem"], ())
    with pytest.raises(ValueError, match="must be a tensor, got dict"):
        probing.extract_layers(network, [({"x": loader[0][0]}, loader[0][1])], ["body.stem"])


# Linear probe


@pytest.mark.parametrize("C", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("width", [6, 100])  # fewer and more features than the 40 examples
def test_probe_is_scikit_learns_in_raw_coordinates(C: float, classes: int, width: int) -> None:
    train = blobs(40 // classes, classes, width)
    test = blobs(50, classes, width, seed=1)
    probe = tl.linear_probe(train, test, c_grid=[C])
    truth = reference(train, C)
    assert probe.weight.shape == (classes, width) and probe.bias.shape == (classes,)
    np.testing.assert_allclose(
        softmax(probe.logits(test.features), axis=1),
        truth.predict_proba(test.features.astype(np.float64)),
        atol=1e-4,
    )
    hits = int((probe.logits(test.features).argmax(axis=1) == test.targets).sum())
    assert probe.interval == wilson_interval(hits, len(test.targets))
    assert probe.accuracy == hits / len(test.targets) and probe.C == C


@pytest.mark.parametrize("classes", [2, 4])
def test_a_head_that_starts_from_the_probe_gives_its_logits(classes: int) -> None:
    train, test = blobs(15, classes), blobs(20, classes, seed=1)
    probe = tl.linear_probe(train, test)
    head = nn.Linear(6, classes)
    probe.copy_to(head)
    logits = head(torch.from_numpy(test.features)).detach().numpy()
    np.testing.assert_allclose(logits, probe.logits(test.features), atol=1e-4)
    accuracy = tl.evaluate(
        head, [(torch.from_numpy(test.features), torch.from_numpy(test.targets))]
    ).accuracy
    assert accuracy == probe.accuracy


def test_copy_keeps_the_heads_own_precision_and_gradients() -> None:
    probe = tl.linear_probe(blobs(5), blobs(5, seed=1))
    head = nn.Linear(6, 4, dtype=torch.bfloat16)
    probe.copy_to(head)
    assert head.weight.dtype == torch.bfloat16 and head.weight.requires_grad
    assert isinstance(head.weight, nn.Parameter) and head.weight.is_leaf


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (nn.Linear(6, 3), r"shape \(4, 6\), got \(3, 6\)"),
        (nn.Linear(6, 4, bias=False), "nn.Linear with a bias"),
        (nn.Identity(), "nn.Linear with a bias"),
    ],
)
def test_copy_refuses_other_heads(head: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tl.linear_probe(blobs(5), blobs(5, seed=1)).copy_to(head)


def test_penalty_is_chosen_on_validation() -> None:
    """The choice is the best of all fits on ``val``, and the fit uses ``train`` alone."""
    train, val, test = blobs(6, spread=2), blobs(60, seed=1, spread=2), blobs(50, seed=2, spread=2)
    grid = (1e-4, 1e-2, 1.0, 100.0)
    probe = tl.linear_probe(train, test, val, c_grid=grid)
    accuracies = {C: tl.linear_probe(train, val, c_grid=[C]).accuracy for C in grid}
    assert accuracies[probe.C] == max(accuracies.values()) > min(accuracies.values())
    alone = tl.linear_probe(train, test, c_grid=[probe.C])
    np.testing.assert_array_equal(probe.weight, alone.weight)


def test_without_validation_the_choice_is_made_by_folds_of_train() -> None:
    """A small difference of two large, alike features needs large weights; noise needs none."""
    rng = np.random.default_rng(0)
    targets = np.tile([0, 1], 40)
    shared = rng.normal(size=80)
    alike = np.stack([shared + 0.1 * targets, shared + 0.01 * rng.normal(size=80)], axis=1)
    clean = Features(alike, targets)
    assert tl.linear_probe(clean, clean, c_grid=(1e-3, 1e3)).C == 1e3
    noise = Features(rng.normal(size=(80, 40)), targets)
    assert tl.linear_probe(noise, noise, c_grid=(1e-3, 1e3)).C == 1e-3


def test_two_examples_per_class_are_too_few_to_choose() -> None:
    assert tl.linear_probe(blobs(2), blobs(9, seed=1)).C == 1.0


def test_constant_features_do_no_harm() -> None:
    train, test = blobs(10), blobs(10, seed=1)

    def widened(part: Features) -> Features:
        extra = np.full((len(part.targets), 2), [1e6, 0.0], dtype=np.float32)
        return Features(np.hstack([part.features, extra]), part.targets)

    plain = tl.linear_probe(train, test, c_grid=[1.0])
    wide = tl.linear_probe(widened(train), widened(test), c_grid=[1.0])
    np.testing.assert_allclose(wide.logits(widened(test).features), plain.logits(test.features))


@pytest.mark.parametrize("size", [1e-9, 1e-32])
def test_dead_features_get_no_weight_that_a_head_could_not_bear(size: float) -> None:
    """Such a head's gradients, clipped together with all others, would stop the training."""
    train = blobs(10)
    noise = np.random.default_rng(0).normal(0, size, (len(train.targets), 1)).astype(np.float32)
    wide = Features(np.hstack([train.features, noise]), train.targets)
    plain, dead = (tl.linear_probe(part, part, c_grid=[1.0]) for part in (train, wide))
    np.testing.assert_allclose(dead.weight[:, -1], 0, atol=1e-6)
    np.testing.assert_allclose(dead.weight[:, :-1], plain.weight, rtol=1e-4, atol=1e-6)


def test_test_set_does_not_decide_anything() -> None:
    train, test = blobs(8), blobs(30, seed=1)
    shuffled = Features(test.features, test.targets[::-1].copy())
    a, b = tl.linear_probe(train, test), tl.linear_probe(train, shuffled)
    np.testing.assert_array_equal(a.weight, b.weight)
    assert a.accuracy != b.accuracy


def test_probe_refuses_what_it_cannot_fit() -> None:
    train, test = blobs(5), blobs(5, seed=1)
    with pytest.raises(ValueError, match="6 columns of train, got 7"):
        tl.linear_probe(train, blobs(5, width=7))
    kept = train.targets != 2
    part = Features(train.features[kept], train.targets[kept])
    with pytest.raises(ValueError, match=r"each of 0\.\.3, none of class 2"):
        tl.linear_probe(part, test)
    one = Features(train.features[:5], train.targets[:5])
    with pytest.raises(ValueError, match="at least two classes"):
        tl.linear_probe(one, one)
    for grid in ([], [1.0, 0.0], [-1.0]):
        with pytest.raises(ValueError, match="numbers > 0"):
            tl.linear_probe(train, test, c_grid=grid)


# Ridge probe


@pytest.mark.parametrize("C", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("width", [6, 100])  # fewer and more features than the 40 examples
@pytest.mark.parametrize("standardise", [True, False])
def test_ridge_is_scikit_learns(C: float, classes: int, width: int, standardise: bool) -> None:
    train, test = blobs(40 // classes, classes, width), blobs(50, classes, width, seed=1)
    probe = probing.ridge_probe(train, test, c_grid=[C], standardise=standardise)
    steps = [StandardScaler()] if standardise else []
    truth = make_pipeline(*steps, RidgeClassifier(alpha=1 / C, solver="svd"))
    truth.fit(train.features.astype(np.float64), train.targets)
    scores = truth.decision_function(test.features.astype(np.float64))  # targets -1 and 1
    ours = 2 * probe.logits(test.features) - 1
    np.testing.assert_allclose(ours[:, 1] if classes == 2 else ours, scores, atol=1e-6)
    assert probe.weight.shape == (classes, width) and probe.C == C
    assert probe.accuracy == truth.score(test.features.astype(np.float64), test.targets)


def test_ridge_without_validation_chooses_as_if_each_example_were_left_out() -> None:
    grid = (1e-3, 1e-1, 1e1)
    for seed in range(5):
        train = blobs(4, width=9, seed=seed, spread=3.0)
        hits = dict.fromkeys(grid, 0)
        for row in range(len(train.targets)):
            rest, alone = np.arange(len(train.targets)) != row, np.array([row])
            for C in grid:
                left = train.take(rest)
                probe = probing.ridge_probe(left, train.take(alone), None, [C], standardise=False)
                hits[C] += int(probe.accuracy)
        best = max(grid, key=lambda C: (hits[C], -C))
        assert best == probing.ridge_probe(train, train, None, grid, standardise=False).C


def test_ridge_chooses_on_validation_and_not_on_test() -> None:
    train, val, test = blobs(4, spread=2.0), blobs(30, seed=1, spread=2.0), blobs(30, seed=2)
    grid = (1e-4, 1e-2, 1e0, 1e2)
    probe = probing.ridge_probe(train, test, val, grid)
    on_val = {C: probing.ridge_probe(train, val, c_grid=[C]).accuracy for C in grid}
    assert on_val[probe.C] == max(on_val.values())
    shuffled = Features(test.features, test.targets[::-1].copy())
    np.testing.assert_array_equal(
        probe.weight, probing.ridge_probe(train, shuffled, val, grid).weight
    )


def test_ridge_refuses_what_it_cannot_fit() -> None:
    train = blobs(5)
    with pytest.raises(ValueError, match="6 columns of train, got 7"):
        probing.ridge_probe(train, blobs(5, width=7))
    with pytest.raises(ValueError, match="numbers > 0"):
        probing.ridge_probe(train, train, c_grid=[0.0])


# Nearest neighbours


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("spread", [0.5, 2.0])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_knn_is_scikit_learns(k: int, spread: float, metric: str) -> None:
    train, test = blobs(10, spread=spread), blobs(400, seed=1, spread=spread)
    truth = KNeighborsClassifier(n_neighbors=k, metric=metric, algorithm="brute")
    truth.fit(train.features.astype(np.float64), train.targets)
    expected = truth.score(test.features.astype(np.float64), test.targets)
    assert tl.knn(train, test, k, metric) == pytest.approx(expected, abs=1e-9)  # type: ignore[arg-type]


def test_knn_in_known_cases() -> None:
    axes = Features(np.eye(3, dtype=np.float32), np.arange(3))
    assert tl.knn(axes, Features(100 * axes.features, axes.targets), k=1) == 1.0  # cosine
    near_the_first = Features(np.array([[0.4, 0.5, 9.0]], dtype=np.float32) - 9, np.array([2]))
    assert tl.knn(axes, near_the_first, k=1, metric="euclidean") == 1.0
    assert tl.knn(axes, axes, k=3) == pytest.approx(1 / 3)  # all tie: the smallest class


def test_knn_refuses_other_k() -> None:
    for k in (0, 21):
        with pytest.raises(ValueError, match=rf"k must be in 1\.\.20 .*, got {k}"):
            tl.knn(blobs(5), blobs(5), k)
    with pytest.raises(ValueError, match="metric must be 'cosine' or 'euclidean', got 'l1'"):
        tl.knn(blobs(5), blobs(5), metric="l1")  # type: ignore[arg-type]


def test_default_grid_is_wide_enough() -> None:
    assert min(probing.C_GRID) <= 1e-3 and max(probing.C_GRID) >= 100
