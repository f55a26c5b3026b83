"""Backbones behind one call: embedded checkpoints, torchvision models and hub models."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tlcourse.locations import data_dir

EMBEDDED = {  # name -> normalisation layers; all are a GlyphNet, pre-trained by tlcourse.pretrain
    "glyphnet": "group",
    "glyphnet_seed1": "group",  # the same recipe from other seeds
    "glyphnet_seed2": "group",
    "glyphnet_bn": "batch",
    # One source each, for one smaller budget of steps (lessons 07 and 10).
    "glyphs": "group",
    "glyphs_seed1": "group",
    "fonts": "group",
    "bare_glyphs": "group",
    "inverted": "group",
    "quarter_turns": "group",
    "fractals": "group",
    "shapes": "group",
    "shapes_seed1": "group",
    "random_labels": "group",
}
TEXT_MODELS = ("minilm", "docbert")  # see tlcourse.language_models
HEAD_WEIGHT, HEAD_BIAS = "source_head.weight", "source_head.bias"  # beside the body's own keys
TORCHVISION = {  # name -> (builder, weights, name of the last layer, feature size)
    "resnet18": ("resnet18", "ResNet18_Weights", "fc", 512),
    "resnet50": ("resnet50", "ResNet50_Weights", "fc", 2048),
    "vit_b_16": ("vit_b_16", "ViT_B_16_Weights", "heads", 768),
}


@dataclass(frozen=True)
class Preprocess:
    """Turns one picture into what a backbone takes.

    Attributes:
        size: side of the square input, in pixels.
        mean, std: per channel, for pixels in [0, 1].
    """

    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __call__(self, picture: Any) -> Tensor:
        """Args:
            picture: a PIL image, or a uint8 array of shape (H, W) or (H, W, 3).

        Returns:
            float tensor, shape (3, size, size), normalised.

        Raises:
            ValueError: for another type or shape.
        """
        from PIL import Image

        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
                raise ValueError(
                    "picture must be uint8 of shape (H, W) or (H, W, 3), "
                    f"got {picture.dtype} of shape {picture.shape}"
                )
            picture = Image.fromarray(picture)
        if not isinstance(picture, Image.Image):
            raise ValueError(f"picture must be a PIL image or a uint8 array, got {type(picture)}")
        resized = picture.convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def from_unit_range(self, images: Tensor) -> Tensor:
        """The course's image tensors, shape (B, 3, H, W), in [-1, 1], as this backbone's input."""
        if images.shape[-1] != self.size:
            images = F.interpolate(
                images, size=(self.size, self.size), mode="bilinear", antialias=True
            )
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (images / 2 + 0.5 - mean) / std


def norm_layer(kind: str, channels: int) -> nn.Module:
    """GroupNorm of 8 groups (Wu and He 2018, arXiv:1803.08494), or BatchNorm.

    Raises:
        ValueError: if kind is neither "group" nor "batch".
    """
    if kind == "group":
        return nn.GroupNorm(8, channels)
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    raise ValueError(f"norm must be 'group' or 'batch', got {kind!r}")


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, normalised, and a short cut (He et al. 2016, arXiv:1512.03385)."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, norm: str = "group"
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = norm_layer(norm, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = norm_layer(norm, out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                norm_layer(norm, out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:  # (B, in, H, W) -> (B, out, H/stride, W/stride)
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class GlyphNet(nn.Module):
    """A small ResNet for 32 x 32 colour images.

    Args:
        widths: channels of the stem and of each stage; multiples of 8.
        norm: "group" (keeps no batch statistics) or "batch".
    """

    def __init__(self, widths: tuple[int, ...] = (32, 32, 64, 128), norm: str = "group") -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 5, stride=2, padding=2, bias=False),
            norm_layer(norm, widths[0]),
            nn.ReLU(),
        )
        pairs = itertools.pairwise(widths)
        self.stages = nn.Sequential(
            *(ResidualBlock(a, b, 1 if a == b else 2, norm) for a, b in pairs)
        )
        self.feature_dim = widths[-1]

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, 32, 32) -> (B, feature_dim)
        return self.stages(self.stem(images)).mean(dim=(2, 3))


class Backbone(nn.Module):
    """A network without its head.

    Attributes:
        body: the wrapped network; ``forward`` gives its features.
        name: as given to ``load_backbone``.
        feature_dim: length of the feature vector.
        preprocess: a ``Preprocess`` (picture -> input tensor); of text, a ``Tokeniser``.
        card: what the checkpoint's card says; empty for random weights.
        source_head: weight, shape (Z, feature_dim), and bias, shape (Z,), of the head that the
            backbone was pre-trained with, or None. No part of the module: it is never trained.
    """

    def __init__(
        self,
        body: nn.Module,
        name: str,
        feature_dim: int,
        preprocess: Any,
        features: Callable[[Any], Tensor] | None = None,
        card: dict[str, Any] | None = None,
        source_head: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.body = body
        self.source_head = source_head
        self.name, self.feature_dim, self.preprocess = name, feature_dim, preprocess
        self.card = card or {}
        self._features = features

    def forward(self, images: Tensor) -> Tensor:
        """Args:
            images: float tensor, shape (B, 3, size, size), as ``preprocess`` makes them.

        Returns:
            features, float tensor, shape (B, feature_dim).
        """
        outputs = self.body(images)
        return outputs if self._features is None else self._features(outputs)


class Classifier(nn.Module):
    """A backbone with a new linear head.

    Args:
        backbone: anything with ``feature_dim`` that maps inputs to (B, feature_dim).
        num_classes: at least 2.
        dropout: share of features dropped in training, in [0, 1).

    Raises:
        ValueError: if num_classes or dropout is outside its range.
    """

    def __init__(self, backbone: Backbone, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be >= 2, got {num_classes}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(backbone.feature_dim, num_classes)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:  # -> (B, num_classes)
        return self.head(self.dropout(self.backbone(*inputs, **named)))


def load_backbone(name: str, pretrained: bool = True, seed: int = 0) -> Backbone:
    """A backbone by name.

    Args:
        name: "glyphnet" or another of ``EMBEDDED`` (from the course's own files), "resnet18",
            "resnet50", "vit_b_16" (torchvision), "minilm" or "docbert" (encoders of text,
            see ``tlcourse.language_models``), or
            "hf:organisation/model@revision" for an image model of the Hugging Face hub; the
            revision may be left out.
        pretrained: False gives random weights drawn from ``seed``.
        seed: of the random weights; not used when pretrained.

    Raises:
        ValueError: for an unknown name (lists the names).
        ConnectionError: if weights must be downloaded and cannot be.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in TORCHVISION:
            return _torchvision_backbone(name, pretrained)
        if name.startswith("hf:"):
            return _hub_backbone(name, pretrained)
        if name in EMBEDDED:
            return _embedded_backbone(name, pretrained)
    if name in TEXT_MODELS:
        from tlcourse.language_models import load_text_backbone

        return load_text_backbone(name, pretrained, seed)
    known = ", ".join([*EMBEDDED, *TORCHVISION, *TEXT_MODELS, "hf:organisation/model"])
    raise ValueError(f"unknown backbone {name!r}; choose one of {known}")


def checkpoint_path(name: str) -> Path:
    """Where the embedded checkpoint of that name lies; its card is beside it, as JSON."""
    return data_dir() / "checkpoints" / f"{name}.safetensors"


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
    """The body's state dict, and weight and bias of the source's head if the file has them."""
    state = load_file(path)
    if HEAD_WEIGHT not in state:
        return state, None
    return state, (state.pop(HEAD_WEIGHT), state.pop(HEAD_BIAS))


def _embedded_backbone(name: str, pretrained: bool) -> Backbone:
    body, card, head = GlyphNet(norm=EMBEDDED[name]), {}, None
    if pretrained:
        path = checkpoint_path(name)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; `tlcourse pretrain {name}` makes it")
        state, head = read_checkpoint(path)
        body.load_state_dict(state)
        card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return Backbone(body, name, body.feature_dim, Preprocess(32), card=card, source_head=head)


def _torchvision_backbone(name: str, pretrained: bool) -> Backbone:
    import torchvision.models as zoo

    builder, weights_name, head, feature_dim = TORCHVISION[name]
    weights = getattr(zoo, weights_name).DEFAULT if pretrained else None
    try:
        body = getattr(zoo, builder)(weights=weights)
    except OSError as error:
        raise ConnectionError(
            f"the weights of {name!r} could not be downloaded ({error}); "
            "connect to the internet, or use the embedded 'glyphnet'"
        ) from error
    setattr(body, head, nn.Identity())
    if isinstance(body, zoo.VisionTransformer):
        from tlcourse.vision_transformer import speed_up

        speed_up(body)
    imagenet = Preprocess(224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    return Backbone(body, name, feature_dim, imagenet, card={"weights": str(weights)})


def _hub_backbone(name: str, pretrained: bool) -> Backbone:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    repo, _, revision = name.removeprefix("hf:").partition("@")
    options = {"revision": revision} if revision else {}
    try:
        config = AutoConfig.from_pretrained(repo, **options)
        processor = AutoImageProcessor.from_pretrained(repo, **options)
        if pretrained:
            body = AutoModel.from_pretrained(repo, use_safetensors=True, **options)
        else:
            body = AutoModel.from_config(config)
    except OSError as error:
        raise ConnectionError(
            f"the hub model {repo!r} could not be loaded ({error}); check the name and the "
            "connection, or use the embedded 'glyphnet'"
        ) from error
    side = processor.size.get("height") or processor.size["shortest_edge"]
    preprocess = Preprocess(side, tuple(processor.image_mean), tuple(processor.image_std))
    feature_dim = getattr(config, "hidden_size", None) or config.hidden_sizes[-1]
    return Backbone(
        body, name, feature_dim, preprocess, _pooled, {"hub": repo, "revision": revision}
    )


def _pooled(outputs: Any) -> Tensor:
    """One vector for each image from a transformers output: the first token, or the pooled map."""
    hidden = outputs.last_hidden_state
    return hidden[:, 0] if hidden.ndim == 3 else hidden.mean(dim=(2, 3))
