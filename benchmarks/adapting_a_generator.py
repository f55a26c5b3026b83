"""A small GPT that has read documentation learns to write code: what it learns, what it forgets.

    python benchmarks/adapting_a_generator.py [--workers N] [--out FILE]

``docgpt`` was pre-trained on prose in docstrings of packages. It is adapted to another style, the
functions of Python's standard library without their comments and docstrings, by full fine-tuning,
LoRA, prefix tuning, and full fine-tuning with old text in each batch (replay); a control starts
from random weights. A rate is chosen for each arm on one extra draw of the training text, by the
loss on validation code; replay takes that of full fine-tuning. Five other draws, paired across
the arms, are then measured once on test code (learned) and on documentation (forgotten):
docstrings of the standard library, which was no part of pre-training, and those of held-out files
of the packages. All splits are by file. Writes ``data/results/adapting_a_generator.json``; an
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tlcourse as tl
from tlcourse.comparing import Comparison, versions
from tlcourse.docstrings import package_prose
from tlcourse.evaluation import score
from tlcourse.freezing import count_parameters
from tlcourse.language_modelling import NextTokenBlocks, NextTokens, pack
from tlcourse.language_models import load_generator, load_tokeniser
from tlcourse.library_code import library_styles
from tlcourse.locations import data_dir
from tlcourse.lora import LoRAConfig, LoRALinear, add_lora
from tlcourse.parallel import default_workers, side_by_side
from tlcourse.prompts import PrefixTuning
from tlcourse.weight_space import interpolate

DRAWS, TUNING_DRAW = 5, 1_000
STEPS, BATCH_SIZE, LENGTH, TEST_BLOCKS = 80, 8, 128, 64
REPLAYED = 2  # of the blocks in a batch, in the arm with replay
FULL, LORA, PREFIX, REPLAY, SCRATCH = (
    "full fine-tuning", "LoRA", "prefix tuning", "full with replay", "from random weights",
)  # fmt: skip
ARMS = (FULL, LORA, PREFIX, REPLAY, SCRATCH)
RATES = {
    FULL: (3e-4, 1e-3, 3e-3),
    LORA: (3e-3, 1e-2, 3e-2),
    PREFIX: (3e-2, 1e-1, 3e-1, 1.0),
    SCRATCH: (3e-4, 1e-3, 3e-3, 1e-2),
}
LORA_SETTINGS = LoRAConfig(
    rank=8, alpha=16.0, target_modules=("c_attn", "c_proj", "c_fc"), modules_to_save=()
)
NUM_VIRTUAL = 16
SHARES = (0.25, 0.5, 0.75)  # of the way from the pre-trained to the adapted model
PROMPTS = {"code": "def close(self):\n", "docs": "Return the"}
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "max_new_tokens": 60}


@dataclass(frozen=True)
class Run:
    arm: str
    draw: int
    lr: float


# --- the text ----------------------------------------------------------------------------------


def texts_of(part: str) -> list[list[str]]:
    """A list of texts for each file of a part."""
    if part == "test packages":
        return held_out_prose(0.02, 0.04)  # the split of tlcourse.pretrain_text
    if part == "old":
        return held_out_prose(0.04, 0.06)  # seen in pre-training
    return library_styles()[part]


def held_out_prose(low: float, high: float) -> list[list[str]]:
    """Prose of the packages' files whose place lies between; a list for each file."""
    found: dict[str, list[str]] = {}
    for file, paragraph in package_prose(low=low, high=high):
        found.setdefault(file, []).append(paragraph)
    return list(found.values())


def blocks(part: str, draw: int | None = None) -> Tensor:
    """Blocks of a part, or those that a draw trains on: whole files in random order."""
    tokenizer, files = load_tokeniser("docgpt").tokenizer, list(texts_of(part))
    if draw is not None:
        random.Random(draw).shuffle(files)
    packed = pack([text for file in files for text in file], tokenizer, LENGTH)
    if draw is not None:
        return packed[: STEPS * BATCH_SIZE]
    return packed[torch.linspace(0, len(packed) - 1, min(TEST_BLOCKS, len(packed))).long()]


class WithReplay:
    """Batches of new blocks in which the last ones are exchanged for old blocks."""

    def __init__(self, new: Tensor, old: Tensor, seed: int) -> None:
        self.new = NextTokenBlocks(new, BATCH_SIZE - REPLAYED, seed)
        self.old = NextTokenBlocks(old, REPLAYED, seed)

    def __len__(self) -> int:
        return min(len(self.new), len(self.old))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for (x, y), (x_old, y_old) in zip(self.new, self.old):  # noqa: B905 (the shorter ends it)
            yield torch.cat([x, x_old]), torch.cat([y, y_old])


# --- the runs ---------------------------------------------------------------------------------


def build(run: Run) -> Any:
    """docgpt without dropout, with what the arm trains."""
    model = load_generator("docgpt", pretrained=run.arm != SCRATCH, seed=run.draw)
    model.config.pad_token_id = None  # packed blocks hold no padding
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.manual_seed(run.draw)
    if run.arm == LORA:
        return add_lora(model, LORA_SETTINGS)
    return PrefixTuning(model, NUM_VIRTUAL) if run.arm == PREFIX else model


def losses(model: nn.Module, split: str) -> dict[str, float]:
    """Nats per token on code and documentation."""
    parts = {"code": f"{split} code", "docs": f"{split} docs"}
    if split == "test":
        parts["packages"] = "test packages"
    return {
        name: score(NextTokens(model), NextTokenBlocks(blocks(part), 8, shuffle=False))[0]
        for name, part in parts.items()
    }


def perform(run: Run) -> dict[str, Any]:
    """Losses on validation (tuning draw) or test (others) and what else there is to know."""
    model, train = build(run), blocks("train code", run.draw)
    loader: Any = NextTokenBlocks(train, BATCH_SIZE, run.draw)
    if run.arm == REPLAY:
        loader = WithReplay(train, blocks("old", run.draw), run.draw)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = tl.TrainConfig(
        lr=run.lr, num_steps=STEPS, warmup_steps=STEPS // 10, precision="bf16",
        progress=False, seed=run.draw,
    )  # fmt: skip
    started = time.process_time()
    history = tl.fit(NextTokens(model), loader, None, config)
    seconds = time.process_time() - started
    tuning = run.draw == TUNING_DRAW
    found: dict[str, Any] = losses(model, "val" if tuning else "test")
    found |= {
        "train_loss": round(sum(history.train_loss[-10:]) / 10, 4),
        "trained": count_parameters(model).trainable,
        "cpu_seconds": round(seconds, 1),
    }
    if run.arm in (FULL, LORA):
        found["line"] = part_of_the_way(run.arm, model, before, "val" if tuning else "test")
    if run.draw == 0:
        found["samples"] = samples(model)
    return found


def part_of_the_way(
    arm: str, model: Any, before: dict[str, Tensor], split: str
) -> dict[str, dict[str, float]]:
    """Losses between the pre-trained and the adapted model; the model is as before at the end."""
    after = {name: value.clone() for name, value in model.state_dict().items()}
    found = {}
    for share in SHARES:
        if arm == FULL:
            model.load_state_dict(interpolate(before, after, share))
        else:  # the update is linear in B
            for layer in model.modules():
                if isinstance(layer, LoRALinear):
                    layer.lora_B.data *= share
        found[f"{share:g}"] = losses(model, split)
        model.load_state_dict(after)
    return found


def samples(model: Any) -> dict[str, str]:
    """One text for each prompt, not chosen and not edited."""
    tokenizer, found = load_tokeniser("docgpt").tokenizer, {}
    for style, prompt in PROMPTS.items():
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(prompt)["input_ids"]]])
        torch.manual_seed(0)
        options = SAMPLING | {"pad_token_id": tokenizer.eos_token_id}
        written = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        found[style] = tokenizer.decode(written[0, 1:].tolist())
    return found


def baselines() -> dict[str, Any]:
    """What is known without a network: uniform and unigram losses, bytes in a token."""
    tokenizer = load_tokeniser("docgpt").tokenizer
    counted = torch.bincount(blocks("train code", 0)[:, 1:].flatten(), minlength=len(tokenizer))
    unigram = ((counted + 1) / (counted + 1).sum()).log()
    found: dict[str, Any] = {"uniform": math.log(len(tokenizer)), "bytes_per_token": {}}
    for part in ("test code", "test docs", "test packages"):
        targets = blocks(part)[:, 1:]
        length = len(
            tokenizer.decode(targets.flatten().tolist(), skip_special_tokens=True).encode()
        )
        found["bytes_per_token"][part.removeprefix("test ")] = length / targets.numel()
    found["unigram_code"] = -unigram[blocks("test code")[:, 1:]].mean().item()
    return found


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    default = data_dir() / "results" / "adapting_a_generator.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    kept = Kept(options.out.with_suffix(".partial.json"), options.workers or default_workers())

    trials = [Run(arm, TUNING_DRAW, lr) for arm, rates in RATES.items() for lr in rates]
    tuning: dict[str, dict[str, Any]] = {}
    for run, found in zip(trials, kept.run_all(trials), strict=True):
        tuning.setdefault(run.arm, {})[f"{run.lr:g}"] = found
    rates = {
        arm: float(min(by_rate, key=lambda lr, by_rate=by_rate: by_rate[lr]["code"]))
        for arm, by_rate in tuning.items()
    }
    rates[REPLAY] = rates[FULL]
    runs = [Run(arm, draw, rates[arm]) for draw in range(DRAWS) for arm in ARMS]
    results = dict(zip(runs, kept.run_all(runs), strict=True))
    start = build(Run("before", 0, 0.0))
    content = {
        "before": {split: losses(start, split) for split in ("val", "test")},
        "before_samples": samples(start),
        "baselines": baselines(),
        "runs": {arm: [results[run] for run in runs if run.arm == arm] for arm in ARMS},
        "lr": rates,
        "tuning": tuning,
        "command": "python benchmarks/adapting_a_generator.py",
        "versions": versions(),
        "settings": {
            "model": "docgpt", "steps": STEPS, "batch_size": BATCH_SIZE, "length": LENGTH,
            "draws": DRAWS, "replayed": REPLAYED, "test_blocks": TEST_BLOCKS,
            "rank": LORA_SETTINGS.rank, "alpha": LORA_SETTINGS.alpha,
            "targets": list(LORA_SETTINGS.target_modules), "virtual_tokens": NUM_VIRTUAL,
            "shares": list(SHARES), "prompts": PROMPTS, "sampling": SAMPLING, "precision": "bf16",
        },
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    kept.path.unlink(missing_ok=True)
    for part in ("code", "docs", "packages"):
        scores = {arm: [found[part] for found in content["runs"][arm]] for arm in ARMS}
        print(f"{part}, nats per token\n{Comparison(scores)}", flush=True)


class Kept:
    """Runs whose results are written as they come, so that an interruption loses one at most."""

    def __init__(self, path: Path, workers: int) -> None:
        self.path, self.workers = path, workers
        self.done = json.loads(path.read_text("utf-8")) if path.is_file() else {}

    def run_all(self, runs: list[Run]) -> list[dict[str, Any]]:
        waiting = [run for run in runs if str(run) not in self.done]
        for run, found in zip(waiting, side_by_side(perform, waiting, self.workers), strict=True):
            self.done[str(run)] = found
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.done), encoding="utf-8")
            print(f"{run.arm}, draw {run.draw}, lr {run.lr:g}: code {found['code']:.3f}, "
                  f"docs {found['docs']:.3f}", flush=True)  # fmt: skip
        return [self.done[str(run)] for run in runs]


if __name__ == "__main__":
    main()
