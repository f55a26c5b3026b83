"""Packed rows: each text comes out as if it were alone, once in every pass."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel

import tlcourse as tl
from tlcourse import minilm
from tlcourse.backbones import Backbone
from tlcourse.language_models import TextBackbone
from tlcourse.packing import PackedLoader, best_fit, mean_of_texts, pack_backbone, varying
from tlcourse.processes import has_rows
from tlcourse.text import TokenLoader, pad

ROW = 32
HAS_MINILM = importlib.util.find_spec(minilm.MINILM_WHEEL) is not None
needs_minilm = pytest.mark.skipif(not HAS_MINILM, reason="the offline extra is not installed")


def texts(num: int, longest: int = ROW, shortest: int = 2, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (num,), generator=generator).tolist()
    return [torch.randint(5, 50, (n,), generator=generator).tolist() for n in lengths]


def small(pooling: str = "cls", attention: str = "sdpa", dropout: float = 0.0) -> TextBackbone:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, initializer_range=0.5,
        attn_implementation=attention,
    )  # fmt: skip
    body = BertModel(config, add_pooling_layer=False).eval()
    return TextBackbone(body, "small", 32, None, pooling)


def alone(model: nn.Module, tokens: list[list[int]]) -> Tensor:
    return torch.cat([model(**pad([one])) for one in tokens])


def packed(model: nn.Module, loader: PackedLoader) -> Tensor:
    """Outputs in the order of the texts; the loader's targets are their numbers."""
    batches = [(targets, model(**inputs)) for inputs, targets in loader]
    order = torch.cat([targets for targets, _ in batches]).argsort()
    return torch.cat([outputs for _, outputs in batches])[order]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_text_comes_out_as_if_alone(pooling, attention):
    backbone = small(pooling, attention)
    model = tl.Classifier(pack_backbone(backbone), 3).eval()
    tokens = texts(41)
    loader = PackedLoader(tokens, torch.arange(41), 4, ROW, shuffle=True)
    unpacked = tl.Classifier(backbone, 3).eval()
    unpacked.load_state_dict(model.state_dict())  # the same keys
    with torch.no_grad():
        torch.testing.assert_close(
            packed(model, loader), alone(unpacked, tokens), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("name", ["docbert", pytest.param("minilm", marks=needs_minilm)])
def test_real_backbones_give_the_same_features(name):
    backbone = tl.load_text_backbone(name)
    sentence = "Return a new lock, or write the archive to disk and close it afterwards. "
    tokens = backbone.preprocess([sentence[i:] * (1 + i % 4) for i in range(16)])
    loader = PackedLoader(tokens, torch.arange(len(tokens)), 2, 128, backbone.preprocess.pad_id)
    with torch.no_grad():
        found, expected = packed(pack_backbone(backbone), loader), alone(backbone, tokens)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_gradients_are_those_of_the_padded_batch():
    tokens, targets = texts(12), torch.arange(12) % 3
    model = tl.Classifier(pack_backbone(small("mean")), 3)
    other = copy.deepcopy(model)
    [(inputs, order)] = PackedLoader(tokens, torch.arange(12), 20, ROW, shuffle=True)
    F.cross_entropy(model(**inputs), targets[order]).backward()
    F.cross_entropy(other(**pad(tokens)), targets).backward()
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_nothing_leaks_from_text_to_text(pooling):
    model = pack_backbone(small(pooling))
    tokens = texts(9, longest=12)
    [(inputs, order)] = PackedLoader(tokens, torch.arange(9), 9, ROW)
    place = inputs["starts"][4] + 1
    changed = inputs | {"input_ids": inputs["input_ids"].clone()}
    changed["input_ids"].view(-1)[place] += 1

    def run(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        words = model.body.embeddings.word_embeddings
        handle = words.register_forward_hook(lambda *call: seen.append(call[-1]))
        features = model(**batch)
        handle.remove()
        others = torch.arange(9) != 4
        grads = torch.autograd.grad(features[others].square().sum(), seen[0])[0]
        return features.detach(), grads  # (9, D) and (R, T, D)

    (before, grads), (after, changed_grads) = run(inputs), run(changed)
    same = (before == after).all(dim=1)
    assert same.tolist() == [number != 4 for number in range(9)]
    assert torch.equal(grads, changed_grads)
    text_ids = inputs["text_ids"].view_as(inputs["input_ids"])
    mine, padding = text_ids == 4, text_ids == 9
    assert padding.any() and mine.sum() == len(tokens[order[4]])
    assert (grads[mine | padding] == 0).all() and (grads[~(mine | padding)] != 0).any(dim=1).all()


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8, 1000])
def test_every_text_comes_once_in_every_pass(rows, shuffle):
    tokens = texts(101)
    loader = PackedLoader(tokens, torch.arange(101), rows, ROW, pad_id=1, shuffle=shuffle)
    assert 0.75 * rows <= loader.rows <= rows or len(loader) == 1
    for _ in range(2):
        seen: dict[int, list[int]] = {}
        batches = list(loader)
        assert len(batches) == len(loader)
        for inputs, targets in batches:
            ids = inputs["input_ids"]
            assert ids.shape == inputs["position_ids"].shape == (loader.rows, ROW)
            text_ids = inputs["text_ids"].view_as(ids)
            assert (ids[text_ids == len(targets)] == 1).all()
            for number, text in enumerate(targets.tolist()):
                inside = text_ids == number
                seen[text] = ids[inside].tolist()
                assert inside.any(dim=1).sum() == 1, "a text stays in its row"
                places = inside.flatten().nonzero().squeeze(1)
                assert places[0] == inputs["starts"][number]
                assert len(places) == inputs["lengths"][number]
                assert inputs["position_ids"][inside].tolist() == list(range(len(places)))
        assert [seen[text] for text in range(101)] == tokens


@pytest.mark.parametrize("rows", [1, 4, 16, 64, 256])
def test_hardly_a_place_is_padding_and_batches_are_alike(rows):
    tokens = texts(3000, longest=64, shortest=8)
    loader = PackedLoader(tokens, torch.zeros(3000, dtype=torch.long), rows, 128, shuffle=True)
    real = sum((inputs["text_ids"] < len(targets)).sum() for inputs, targets in loader)
    places = sum(inputs["input_ids"].numel() for inputs, _ in loader)
    assert loader.real_share == pytest.approx(real / places) and loader.real_share > 0.95
    if rows >= 16:
        sizes = torch.tensor([float(len(targets)) for _, targets in loader])
        assert sizes.std(correction=0) < 0.05 * sizes.mean()


def test_best_fit_by_hand():
    assert best_fit([3, 6, 5, 4, 2], 10) == [[1, 3], [2, 0, 4]]
    assert best_fit([10, 1], 10) == [[0], [1]]


def test_the_order_depends_on_the_seed_alone():
    def passes(seed: int, shuffle: bool = True) -> list[list[int]]:
        loader = PackedLoader(texts(60), torch.arange(60), 4, ROW, shuffle=shuffle, seed=seed)
        return [torch.cat([targets for _, targets in loader]).tolist() for _ in range(2)]

    torch.manual_seed(1)
    first, second = passes(5)
    torch.manual_seed(2)
    assert passes(5) == [first, second] and first != second and passes(6)[0] != first
    still = passes(5, shuffle=False)
    assert still[0] == still[1] == passes(6, shuffle=False)[0]


def test_mean_by_hand():
    hidden = torch.tensor([[[1.0], [3.0], [5.0], [99.0]]])
    text_ids = torch.tensor([0, 0, 1, 2])
    assert mean_of_texts(hidden, text_ids, torch.tensor([2, 1])).tolist() == [[2.0], [5.0]]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_one_graph_without_a_break_serves_every_batch(pooling):
    compilations = []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = tl.Classifier(pack_backbone(small(pooling)), 3)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    loader = PackedLoader(texts(60), torch.arange(60), 4, ROW, shuffle=True)
    batches = list(loader)
    assert len({len(targets) for _, targets in batches}) > 1
    for inputs, _ in batches:
        torch.testing.assert_close(compiled(**varying(inputs)), model(**inputs))
    assert len(compilations) == 1


def test_fit_learns_from_packed_rows_and_is_validated_on_padded_texts():
    targets = torch.arange(60) % 2
    tokens = [  # odd and even numbers
        [2 * (token // 2) + target for token in one]
        for one, target in zip(texts(60), targets.tolist(), strict=True)
    ]
    model = tl.Classifier(pack_backbone(small("mean", dropout=0.1)), 2)
    train = PackedLoader(tokens, targets, 6, ROW, shuffle=True)
    config = tl.TrainConfig(lr=3e-3, num_epochs=8, progress=False)
    history = tl.fit(model, train, TokenLoader(tokens, targets, 16), config)
    assert len(history.step) == 8 * len(train) and history.val_accuracy[-1] > 0.9
    assert (
        tl.evaluate(model, train).accuracy
        == tl.evaluate(model, TokenLoader(tokens, targets, 7)).accuracy
    )


def test_a_batch_is_never_cut_into_texts():
    """``fit`` cuts a batch whose tensors all have a row for each target."""
    [batch] = PackedLoader(texts(5, ROW, 20), torch.zeros(5, dtype=torch.long), 5, ROW)
    assert len(batch[0]["input_ids"]) == len(batch[1]) and not has_rows(*batch)


def test_packing_leaves_the_backbone_as_it_was():
    backbone = small(dropout=0.5)
    wrapped = pack_backbone(backbone)
    assert wrapped.body is backbone.body and not wrapped.body.training
    assert wrapped.training == backbone.training
    assert wrapped.state_dict().keys() == backbone.state_dict().keys()


@pytest.mark.parametrize(
    ("tokens", "num_targets", "rows", "message"),
    [
        ([[1]], 2, 1, "1 texts but 2 targets"),
        ([[1]], 1, 0, "rows_per_batch must be >= 1, got 0"),
        ([], 0, 1, "at least one text"),
        ([[1], []], 2, 1, "at least one token in each"),
        ([[1], [1] * 33], 2, 1, "text 1 has 33 tokens, a row only 32; cut it"),
    ],
)
def test_bad_texts_are_refused(tokens, num_targets, rows, message):
    with pytest.raises(ValueError, match=message):
        PackedLoader(tokens, torch.zeros(num_targets, dtype=torch.long), rows, ROW)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="of bert and modernbert, got Backbone"):
        pack_backbone(Backbone(nn.Linear(2, 2), "x", 2, None))
    config = ModernBertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="sliding windows"):
        pack_backbone(TextBackbone(ModernBertModel(config), "x", 32, None))
    backbone = small()
    backbone.body.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="must be 'sdpa' or 'eager', got 'flex_attention'"):
        pack_backbone(backbone)
    with pytest.raises(ValueError, match="give attention_mask"):
        pack_backbone(small())(torch.ones(1, 3, dtype=torch.long))
