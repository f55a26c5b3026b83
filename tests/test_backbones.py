"""Backbones, heads, and files that give back the same logits."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from tlcourse import backbones
from tlcourse.backbones import Classifier, Preprocess, load_backbone
from tlcourse.pretrain_text import TEXT_RECIPES


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Classifier(load_backbone("glyphnet", pretrained=False), num_classes=4)


def test_random_backbone_is_seeded_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a, b, c = (load_backbone("glyphnet", False, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(a(images), b(images)) and not torch.equal(a(images), c(images))


def test_embedded_checkpoint_matches_its_card():
    backbone = load_backbone("glyphnet")
    assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, backbone.feature_dim)
    assert sum(p.numel() for p in backbone.parameters()) == backbone.card["num_parameters"]
    stored = load_file(backbones.checkpoint_path("glyphnet"))
    assert torch.equal(backbone.body.state_dict()["stem.0.weight"], stored["stem.0.weight"])


def test_features_do_not_depend_on_the_batch():
    """GroupNorm: an image's features are its own, in training mode as well."""
    backbone = load_backbone("glyphnet", pretrained=False).train()
    images = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(backbone(images)[:2], backbone(images[:2]))


def test_unknown_backbone_lists_the_names():
    with pytest.raises(ValueError, match=r"'resnet51'.*glyphnet.*resnet50.*vit_b_16"):
        load_backbone("resnet51")


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16"])
def test_torchvision_models_lose_their_head(name):
    backbone = load_backbone(name, pretrained=False).eval()
    with torch.no_grad():
        features = backbone(torch.zeros(1, 3, 224, 224))
    assert features.shape == (1, backbone.feature_dim)


def test_torchvision_weights_are_loaded_from_torch_hub_cache(tmp_path, monkeypatch):
    """The real loading code, on a file we make: features equal those of the model we saved."""
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(1)
    ours = torchvision.models.resnet18()
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    path = tmp_path / "hub" / "checkpoints" / weights.url.rsplit("/", 1)[1]
    path.parent.mkdir(parents=True)
    torch.save(ours.state_dict(), path)
    monkeypatch.setattr(torch.hub, "_get_torch_home", lambda: str(tmp_path))
    backbone = load_backbone("resnet18").eval()
    ours.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(backbone(images), ours.eval()(images))


def test_missing_download_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_get_torch_home", lambda: str(tmp_path))

    def refuse(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(ConnectionError, match=r"'resnet18' could not be downloaded.*no route"):
        load_backbone("resnet18")


def test_hub_model_from_files_we_make(tmp_path):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=32, patch_size=16,
    )  # fmt: skip
    ours = ViTModel(config).eval()
    ours.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    backbone = load_backbone(f"hf:{tmp_path}").eval()
    assert (backbone.feature_dim, backbone.preprocess.size) == (16, 32)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = ours(images).last_hidden_state[:, 0]
        torch.testing.assert_close(backbone(images), expected)


def test_hub_without_network_is_one_clear_error():
    with pytest.raises(ConnectionError, match="'no-such/model' could not be loaded"):
        load_backbone("hf:no-such/model")


def test_preprocess_equals_torchvision():
    from torchvision.transforms import v2

    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    ours = Preprocess(32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))(pixels)
    reference = v2.Compose([
        v2.Resize((32, 32)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)),
    ])(Image.fromarray(pixels))  # fmt: skip
    torch.testing.assert_close(ours, reference, atol=1e-5, rtol=0)


def test_preprocess_agrees_with_itself_on_the_course_images():
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    preprocess = Preprocess(32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    course = (torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1).unsqueeze(0)
    torch.testing.assert_close(preprocess.from_unit_range(course)[0], preprocess(pixels))


@pytest.mark.parametrize("bad", [np.zeros((4, 4, 3)), np.zeros((2, 2, 2, 2), np.uint8), "x.png"])
def test_preprocess_refuses(bad):
    with pytest.raises(ValueError, match="picture must be"):
        Preprocess(32)(bad)


@pytest.mark.parametrize("options, message", [
    ({"num_classes": 1}, "num_classes must be >= 2, got 1"),
    ({"num_classes": 3, "dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
])  # fmt: skip
def test_classifier_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Classifier(load_backbone("glyphnet", False), **options)


def test_cards_are_complete():
    cards = sorted(backbones.checkpoint_path("x").parent.glob("*.json"))
    assert cards
    for path in cards:
        card = json.loads(path.read_text(encoding="utf-8"))
        wanted = {"trained_on", "command", "seed", "num_steps", "machine", "licence", "sha256"}
        if path.stem in TEXT_RECIPES:
            wanted |= {"test_loss", "test_accuracy", "test_accuracy_interval_95"}
        else:
            wanted |= {"source_test_accuracy", "source_test_interval_95"}
        assert wanted <= card.keys(), path
