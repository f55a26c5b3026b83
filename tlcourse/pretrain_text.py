"""Rebuild the course's own language models: ``tlcourse pretrain docbert`` (or ``docgpt``).

The text is the prose in the docstrings of installed packages (``tlcourse.docstrings``), never the
standard library: that is kept for the tasks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlcourse import backbones, saving
from tlcourse.cards import check_request, machine_facts, run_facts
from tlcourse.config import TrainConfig
from tlcourse.docstrings import PACKAGES, package_prose, place
from tlcourse.evaluation import evaluate
from tlcourse.language_modelling import (
    MaskedBlocks,
    MaskedTokens,
    NextTokenBlocks,
    NextTokens,
    pack,
)
from tlcourse.language_models import GENERATORS, load_tokeniser, small_bert, small_gpt
from tlcourse.locations import data_dir
from tlcourse.runtime import default_device
from tlcourse.train import History, fit


@dataclass(frozen=True)
class TextRecipe:
    """How one language model is made.

    Attributes:
        vocab_size: tokens of the tokenizer, special ones included.
        block_size: tokens of one training sequence.
        batch_size: sequences in each step.
        num_steps: updates of the weights.
        lr: peak learning rate of AdamW, with warm-up and cosine.
    """

    vocab_size: int
    block_size: int
    batch_size: int
    num_steps: int
    lr: float = 1.5e-3
    weight_decay: float = 0.05
    warmup_steps: int = 300
    seed: int = 0


TEXT_RECIPES = {
    "docbert": TextRecipe(
        vocab_size=6_000, block_size=128, batch_size=16, num_steps=3_000, lr=2e-3
    ),
    "docgpt": TextRecipe(vocab_size=4_096, block_size=256, batch_size=8, num_steps=4_000, lr=2e-3),
}
EVAL_BLOCKS = 40
LICENCE = (
    "CC0-1.0 (the weights; the docstrings keep the licences of their packages: BSD-3-Clause, "
    "Apache-2.0, and matplotlib's)"
)


def split_prose(prose: Iterator[tuple[str, str]]) -> dict[str, list[str]]:
    """Paragraphs for "train" (96 %), "val" and "test" (2 % each), whole files at a time."""
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for file, paragraph in prose:
        share = place(file)
        parts["val" if share < 0.02 else "test" if share < 0.04 else "train"].append(paragraph)
    return parts


def train_tokenizer(name: str, texts: list[str], vocab_size: int, path: Path) -> None:
    """Learn a vocabulary and write it: WordPiece in lower case for docbert, else byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer, WordPieceTrainer

    trainer: Any
    if name in GENERATORS:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = BpeTrainer(
            vocab_size=vocab_size, special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        )  # fmt: skip
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        trainer = WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=special, show_progress=False
        )
    tokenizer.train_from_iterator(texts, trainer)
    if name not in GENERATORS:
        ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path), pretty=False)


def blocks_of(name: str, texts: list[str], block_size: int) -> Tensor:
    """Texts packed without padding: long tensor, (N, block_size), one more for a generator."""
    tokenizer = load_tokeniser(name).tokenizer
    if name in GENERATORS:
        return pack(texts, tokenizer, block_size)
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    stream = [token for text in encoded for token in (*text, last)]
    inside = block_size - 2
    starts = range(0, len(stream) - inside + 1, inside)
    return torch.tensor([[first, *stream[start : start + inside], last] for start in starts])


def pretrain_text(
    name: str,
    num_steps: int | None = None,
    folder: Path | None = None,
    packages: tuple[str, ...] = PACKAGES,
) -> Path:
    """Pre-train a language model; write tokenizer, checkpoint and card.

    Args:
        name: a key of ``TEXT_RECIPES``.
        num_steps: at least 1, overrides the recipe; such a checkpoint goes to ``folder`` only,
            and takes the tokenizer that is shipped.
        folder: where to write; None is ``data/checkpoints``.
        packages: whose docstrings are read.

    Returns:
        the path of the safetensors file; the card is beside it, as JSON.

    Raises:
        ValueError: for an unknown name, or a shortened run without a folder.
    """
    check_request(name, TEXT_RECIPES, num_steps, folder)
    recipe = TEXT_RECIPES[name]
    steps = num_steps or recipe.num_steps
    parts = split_prose(package_prose(packages))
    if folder is None:
        path = data_dir() / "tokenizers" / f"{name}.json"
        train_tokenizer(name, parts["train"], recipe.vocab_size, path)
        load_tokeniser.cache_clear()
    blocks = {part: blocks_of(name, texts, recipe.block_size) for part, texts in parts.items()}
    torch.manual_seed(recipe.seed)
    model = small_gpt() if name in GENERATORS else small_bert()
    wrapped = (NextTokens(model) if name in GENERATORS else MaskedTokens(model)).to(
        default_device()
    )
    config = TrainConfig(
        lr=recipe.lr, num_steps=steps, weight_decay=recipe.weight_decay,
        warmup_steps=min(recipe.warmup_steps, steps // 10), precision="bf16",
        eval_every_steps=max(1, steps // 20), seed=recipe.seed,
    )  # fmt: skip
    loaders = {part: _loader(name, part, blocks[part], recipe) for part in blocks}
    history = fit(wrapped, loaders["train"], loaders["val"], config)
    target = (folder / f"{name}.safetensors") if folder else backbones.checkpoint_path(name)
    saving.save_state(_compact(model), target)
    card = _card(name, recipe, history, wrapped, loaders["test"], target, packages)
    card["trained_on"] += f" {blocks['train'].numel():,} tokens in {len(blocks['train']):,} blocks."
    target.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return target


def _loader(name: str, part: str, blocks: Tensor, recipe: TextRecipe) -> Any:
    training = part == "train"
    if not training:
        blocks = blocks[:: max(1, len(blocks) // EVAL_BLOCKS)][:EVAL_BLOCKS]
    size = recipe.batch_size if training else min(8, len(blocks))
    if name in GENERATORS:
        return NextTokenBlocks(blocks, size, recipe.seed, shuffle=training)
    tokenizer = load_tokeniser(name).tokenizer
    return MaskedBlocks(blocks, tokenizer, size, recipe.seed, shuffle=training)


def _compact(model: nn.Module) -> dict[str, Tensor]:
    """The state dict in half precision, a tied tensor once."""
    seen: dict[int, str] = {}
    state = {}
    for key, value in model.state_dict(keep_vars=True).items():
        if seen.setdefault(value.data_ptr(), key) == key:
            state[key] = value.half() if value.is_floating_point() else value
    return state


def _card(
    name: str,
    recipe: TextRecipe,
    history: History,
    model: nn.Module,
    test: Any,
    path: Path,
    packages: tuple[str, ...],
) -> dict[str, Any]:
    """Data, command, seed, steps, machine, metrics, licence, sha256."""
    result = evaluate(model, test)
    versions = ", ".join(f"{p} {metadata.version(_DIST.get(p, p))}" for p in packages)
    return {
        "name": name,
        "architecture": "GPT-2, 4 layers, width 192, 6 heads, context 256, tied embeddings"
        if name in GENERATORS
        else "ModernBERT, 4 layers, width 192, 6 heads, rotary positions, tied embeddings",
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "trained_on": f"prose in the docstrings of {versions}; not the standard library;",
        **run_facts(name, recipe, history),
        "block_size": recipe.block_size,
        "test_loss": round(result.loss, 4),
        "test_perplexity": round(math.exp(result.loss), 2),
        "test_accuracy": round(result.accuracy, 4),
        "test_accuracy_interval_95": [
            round(result.interval.low, 4),
            round(result.interval.high, 4),
        ],
        "val_loss_by_step": dict(
            zip(history.eval_step, (round(loss, 3) for loss in history.val_loss), strict=True)
        ),
        **machine_facts(history, path, LICENCE),
    }


_DIST = {"sklearn": "scikit-learn", "huggingface_hub": "huggingface-hub"}
