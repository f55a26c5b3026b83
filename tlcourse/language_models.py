"""Language models: tokenizers, MiniLM, and the course's own small BERT and GPT."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from tlcourse.backbones import TEXT_MODELS, Backbone, checkpoint_path, read_checkpoint
from tlcourse.locations import data_dir
from tlcourse.minilm import MINILM_HUB, MINILM_REVISION, minilm_folder

TextPooling = Literal["mean", "cls"]
MAX_TOKENS = 128  # of a text, special tokens included; a longer one is cut

# Not BERT's own layers: with a learned table of positions it stayed a bag of words at this size.
BERT_SHAPE = {
    "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6,
    "intermediate_size": 512, "max_position_embeddings": MAX_TOKENS,
    "global_attn_every_n_layers": 1, "initializer_range": 0.05,
}  # fmt: skip
GPT_SHAPE = {"n_embd": 192, "n_layer": 4, "n_head": 6, "n_positions": 256}
GENERATORS = ("docgpt",)


class Tokeniser:
    """Texts -> token ids, special tokens included.

    Args:
        tokenizer: a fast tokenizer of transformers.
        max_tokens: of one text; what is longer loses its end.

    Attributes:
        pad_id: of the token that fills up short texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_tokens: int = MAX_TOKENS) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.pad_id = int(tokenizer.pad_token_id)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Raises: TypeError: for one text instead of a list of texts."""
        if isinstance(texts, str):
            raise TypeError("give a list of texts, got a single text")
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens)
        return encoded["input_ids"]


class TextBackbone(Backbone):
    """An encoder of text without its head; ``preprocess`` is a ``Tokeniser``.

    Args:
        body: called with ``input_ids`` and ``attention_mask``; gives ``last_hidden_state``.
        name, feature_dim, preprocess, card: as in ``Backbone``.
        pooling: "mean" of the real tokens, or the first token ("cls").
    """

    def __init__(
        self,
        body: nn.Module,
        name: str,
        feature_dim: int,
        preprocess: Tokeniser,
        pooling: TextPooling = "mean",
        card: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(body, name, feature_dim, preprocess, card=card)
        self.pooling = pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        """Args:
            input_ids, attention_mask: long, shape (B, T).

        Returns:
            features, float tensor, shape (B, feature_dim).
        """
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return pool_tokens(hidden, attention_mask, self.pooling)


def pool_tokens(hidden: Tensor, attention_mask: Tensor, pooling: TextPooling = "mean") -> Tensor:
    """One vector for each text.

    Args:
        hidden: shape (B, T, D).
        attention_mask: shape (B, T), 1 for real tokens; at least one in each row.
        pooling: "mean" over the real tokens (Reimers and Gurevych 2019, section 3,
            arXiv:1908.10084), or "cls", the first token.

    Returns:
        shape (B, D).

    Raises:
        ValueError: for another pooling, or if the shapes do not agree.
    """
    if hidden.shape[:2] != attention_mask.shape:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} does not fit mask {tuple(attention_mask.shape)}"
        )
    if pooling == "cls":
        return hidden[:, 0]
    if pooling != "mean":
        raise ValueError(f"pooling must be 'mean' or 'cls', got {pooling!r}")
    weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1)


def load_text_backbone(
    name: str, pretrained: bool = True, seed: int = 0, pooling: TextPooling = "mean"
) -> TextBackbone:
    """An encoder of text by name.

    Args:
        name: "minilm" (all-MiniLM-L6-v2, 22.7 million parameters) or "docbert" (the course's
            own, 3 million; pre-trained on docstrings of installed packages).
        pretrained: False gives random weights of the same architecture, drawn from ``seed``.
        pooling: how the tokens become one vector.

    Raises:
        ValueError: for an unknown name.
        FileNotFoundError: if the weights are neither installed nor to be had.
    """
    if name not in TEXT_MODELS:
        raise ValueError(f"unknown text model {name!r}; choose one of {', '.join(TEXT_MODELS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "minilm":
            return _minilm(pretrained, pooling)
        body = small_bert().model
    card: dict[str, Any] = {}
    if pretrained:
        state, card = _embedded(name)
        prefix = "model."
        body.load_state_dict(
            {
                key.removeprefix(prefix): value
                for key, value in state.items()
                if key.startswith(prefix)
            }
        )
    body.eval()
    return TextBackbone(body, name, body.config.hidden_size, load_tokeniser(name), pooling, card)


def load_masked_lm(name: str = "docbert") -> ModernBertForMaskedLM:
    """The small BERT with the head that it was pre-trained with, in evaluation mode."""
    model = small_bert()
    model.load_state_dict(_with_tied_weights(model, _embedded(name)[0]))
    return model.eval()


def load_generator(name: str = "docgpt", pretrained: bool = True, seed: int = 0) -> GPT2LMHeadModel:
    """A decoder with its head, in evaluation mode.

    Args:
        name: "docgpt" (the course's own, 2.6 million parameters, pre-trained on docstrings of
            installed packages), or "hf:organisation/model@revision" for a causal language model
            of the Hugging Face hub.
        pretrained: False gives random weights of the same architecture, drawn from ``seed``.

    Raises:
        ValueError: for an unknown name.
        ConnectionError: if weights must be downloaded and cannot be.
    """
    if name.startswith("hf:"):
        return _hub_generator(name)
    if name not in GENERATORS:
        raise ValueError(f"unknown generator {name!r}; choose one of {', '.join(GENERATORS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = small_gpt()
    if pretrained:
        model.load_state_dict(_with_tied_weights(model, _embedded(name)[0]))
    return model.eval()


def small_bert() -> ModernBertForMaskedLM:
    """The architecture of "docbert", with random weights.

    Masked language modelling of Devlin et al. 2019, arXiv:1810.04805, in the layers of ModernBERT
    (Warner et al. 2024, section 2.1, arXiv:2412.13663): rotary positions, normalisation before
    each layer, gated feed-forward, no biases. Every layer looks at the whole text.
    """
    tokenizer = load_tokeniser("docbert").tokenizer
    ends = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "cls_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
    }
    return ModernBertForMaskedLM(ModernBertConfig(vocab_size=len(tokenizer), **ends, **BERT_SHAPE))


def small_gpt() -> GPT2LMHeadModel:
    """The architecture of "docgpt", with random weights (Radford et al. 2019)."""
    tokenizer = load_tokeniser("docgpt").tokenizer
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, pad_token_id=end, **GPT_SHAPE
    )
    return GPT2LMHeadModel(config)


@lru_cache(maxsize=4)
def load_tokeniser(name: str) -> Tokeniser:
    """The tokeniser of "minilm", "docbert" or "docgpt"."""
    if name == "minilm":
        folder = minilm_folder()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), **_BERT_TOKENS
        )
        return Tokeniser(tokenizer)
    path = data_dir() / "tokenizers" / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; `tlcourse pretrain {name}` makes it")
    tokens = _GPT_TOKENS if name in GENERATORS else _BERT_TOKENS
    return Tokeniser(PreTrainedTokenizerFast(tokenizer_file=str(path), **tokens))


_BERT_TOKENS = {
    "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}  # fmt: skip
_GPT_TOKENS = {"eos_token": "<|end|>", "bos_token": "<|end|>", "pad_token": "<|end|>"}


def _embedded(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights, in float32, and card of a checkpoint that comes with the course."""
    path = checkpoint_path(name)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; `tlcourse pretrain {name}` makes it")
    state = {key: value.float() for key, value in read_checkpoint(path)[0].items()}
    return state, json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def _with_tied_weights(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A full state dict from one in which a tied tensor is stored once."""
    whole = dict(state)
    first: dict[int, str] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        source = first.setdefault(value.data_ptr(), key)
        if key not in whole and source in whole:
            whole[key] = whole[source]
    return whole


def _minilm(pretrained: bool, pooling: TextPooling) -> TextBackbone:
    folder = minilm_folder()
    if pretrained:
        with _without_progress_bar():
            body = BertModel.from_pretrained(folder)
    else:
        body = BertModel(BertConfig.from_pretrained(folder))
    body.pooler = None  # we pool ourselves, and an unused layer would still count as trainable
    card = {"hub": MINILM_HUB, "revision": MINILM_REVISION, "licence": "Apache-2.0"}
    dim = body.config.hidden_size
    return TextBackbone(
        body.eval(), "minilm", dim, load_tokeniser("minilm"), pooling, card if pretrained else {}
    )


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """transformers draws one for each file that it reads, however small."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _hub_generator(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    repo, _, revision = name.removeprefix("hf:").partition("@")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            repo, use_safetensors=True, **({"revision": revision} if revision else {})
        )
    except OSError as error:
        raise ConnectionError(
            f"the hub model {repo!r} could not be loaded ({error}); check the name and the "
            "connection, or use the embedded 'docgpt'"
        ) from error
    return model.eval()
