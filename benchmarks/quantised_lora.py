"""LoRA on a frozen base in full precision, in 8, 4 and 2 bits; and frozen features against bits.

    python benchmarks/quantised_lora.py [--workers N] [--out FILE]

Documentation routing with MiniLM, 16 labels per topic. The base's 36 linear layers are rounded
and frozen; LoRA (rank 8, on all of them, as in QLoRA) and a head are trained. The head starts
from a linear probe on the features of the arm's own base. Five draws, paired: labelled texts,
batches, and the random start of A are the same in each arm. The rate is chosen for the
full-precision arm, on the validation split of one extra draw, and all arms share it: the largest
rate within one standard error of the best. (At a rate so small that LoRA does nothing, all arms
would be alike. This rule was set after a first look, at which the best rate was that small.)
Then linear probes on frozen features of bases of 8 to 2 bits, with one scale for each block of 64
or one for each matrix.
Writes ``data/results/quantised_lora.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import tlcourse as tl
from tlcourse.comparing import Comparison, versions
from tlcourse.locations import data_dir
from tlcourse.lora import LoRAConfig, add_lora
from tlcourse.parallel import default_workers, side_by_side
from tlcourse.quantisation import dequantise, int4_levels, nf4_levels, quantise_int8
from tlcourse.quantised_layers import memory_bytes, quantise_linears
from tlcourse.text import TextTask, TokenLoader, load_text_task

DRAWS, TUNING_DRAW, LABELS, BATCH_SIZE, STEPS = 5, 1_000, 16, 16, 20
RATES, HEAD_LR = (1e-4, 5e-4, 2e-3), 1e-3
LORA = LoRAConfig(rank=8, alpha=16, target_modules=("query", "key", "value", "dense"))
FULL, INT8, INT4, NF4, TWO_BITS = "full precision", "int8", "int4", "NF4", "2 bits"
ARMS = (FULL, INT8, INT4, NF4, TWO_BITS)
LEVELS = {INT4: int4_levels(), NF4: nf4_levels(), TWO_BITS: torch.tensor([-1.0, 0.0, 1.0])}
WHOLE, BLOCKS = "one scale per matrix", "blocks of 64"
# (bits, values that share a scale; None: the whole matrix). The arms above have blocks too.
FROZEN: dict[str, tuple[int, int | None]] = {
    **{f"{bits} bits, {BLOCKS}": (bits, 64) for bits in (5, 3)},
    **{f"{bits} bits, {WHOLE}": (bits, None) for bits in (8, 6, 5, 4)},
}


@dataclass(frozen=True)
class Run:
    arm: str
    draw: int
    lr: float


@dataclass(frozen=True)
class Found:
    on_val: float
    on_test: float
    train_loss: float  # of the last five steps
    cpu_seconds: float  # of the training alone


def linears(backbone: nn.Module) -> list[nn.Linear]:
    return [module for module in backbone.modules() if isinstance(module, nn.Linear)]


def rounded(weight: Tensor, bits: int, block_size: int | None) -> Tensor:
    """Nearest of evenly spaced levels, scaled by the largest of the block (None: matrix)."""
    blocks = weight.reshape(-1, block_size or weight.numel())
    steps = blocks.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((blocks / steps).round() * steps).reshape(weight.shape)


def base(arm: str) -> nn.Module:
    """MiniLM with its linear layers as the arm keeps them."""
    backbone = tl.load_backbone("minilm")
    if arm in LEVELS:
        quantise_linears(backbone, levels=LEVELS[arm])
    elif arm == INT8:  # the values that the codes stand for: computing is the same
        for layer in linears(backbone):
            layer.weight.data = dequantise(quantise_int8(layer.weight.data, per_row=True))
    return backbone


def perform(run: Run) -> Found:
    task = load_text_task("doc_routing", LABELS, run.draw)
    backbone = base(run.arm)
    torch.manual_seed(run.draw)  # the same A in every arm
    model = add_lora(tl.Classifier(backbone, task.num_classes), LORA)
    loaders = task.loaders(backbone.preprocess, BATCH_SIZE, run.draw)
    known = tl.extract_features(backbone, loaders.train)
    tl.linear_probe(known, known, c_grid=(0.01,)).copy_to(model.head)
    config = tl.TrainConfig(
        lr=run.lr, head_lr=HEAD_LR, num_steps=STEPS, warmup_steps=3, precision="bf16",
        progress=False, seed=run.draw,
    )  # fmt: skip
    start = time.process_time()
    history = tl.fit(model, loaders.train, None, config)  # the last weights stay
    seconds = time.process_time() - start
    with torch.autocast("cpu", torch.bfloat16):
        on_val, on_test = (
            tl.evaluate(model, part).accuracy for part in (loaders.val, loaders.test)
        )
    return Found(on_val, on_test, float(np.mean(history.train_loss[-5:])), round(seconds, 1))


def frozen_scores(backbone: nn.Module, pool: TextTask) -> list[float]:
    """Test accuracy of a linear probe on each draw; every text is read once."""
    parts = {}
    for name in ("train", "val", "test"):
        split = getattr(pool, name)
        loader = TokenLoader(backbone.preprocess(split.texts), split.targets, 64)
        with torch.autocast("cpu", torch.bfloat16):
            features = tl.extract_features(backbone, loader)
        # The loader sorts by length (a stable sort): undo it.
        order = sorted(range(len(split)), key=lambda row: len(loader.tokens[row]))
        parts[name] = features.take(np.argsort(order))
    place = {text: row for row, text in enumerate(pool.train.texts)}
    scores = []
    for draw in range(DRAWS):
        few = load_text_task("doc_routing", LABELS, draw).train
        train = parts["train"].take(np.array([place[text] for text in few.texts]))
        assert (train.targets == few.targets.numpy()).all()
        scores.append(tl.linear_probe(train, parts["test"], parts["val"]).accuracy)
    return scores


def perform_frozen(name: str) -> list[float]:
    pool = load_text_task("doc_routing", None)
    if name in ARMS:
        return frozen_scores(base(name), pool)
    backbone, (bits, block_size) = tl.load_backbone("minilm"), FROZEN[name]
    for layer in linears(backbone):
        layer.weight.data = rounded(layer.weight.data, bits, block_size)
    return frozen_scores(backbone, pool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    parser.add_argument("--out", type=Path, default=data_dir() / "results" / "quantised_lora.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run_all = partial(side_by_side, workers=arguments.workers or default_workers())

    tuning = [Run(FULL, TUNING_DRAW, lr) for lr in RATES]
    on_val = {r.lr: f.on_val for r, f in zip(tuning, run_all(perform, tuning), strict=True)}
    print(on_val, flush=True)
    best = max(on_val.values())
    error = (best * (1 - best) / len(load_text_task("doc_routing", LABELS).val)) ** 0.5
    lr = max(rate for rate in RATES if on_val[rate] >= best - error)
    runs = [Run(arm, draw, lr) for draw in range(DRAWS) for arm in ARMS]
    scores: dict[str, list[float]] = {arm: [] for arm in ARMS}
    losses: dict[str, list[float]] = {arm: [] for arm in ARMS}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for run, found in zip(runs, run_all(perform, runs), strict=True):
        scores[run.arm].append(found.on_test)
        losses[run.arm].append(found.train_loss)
        seconds[run.arm].append(found.cpu_seconds)
        print(run, found, flush=True)
    names = [*ARMS, *FROZEN]
    frozen = dict(zip(names, run_all(perform_frozen, names), strict=True))
    print(Comparison(scores).table(FULL))
    print(Comparison(frozen).table(FULL))
    content = {
        "command": "python benchmarks/quantised_lora.py",
        "versions": versions(),
        "settings": {
            "labels_per_class": LABELS, "draws": DRAWS, "steps": STEPS, "batch_size": BATCH_SIZE,
            "rank": LORA.rank, "alpha": LORA.alpha, "target_modules": LORA.target_modules,
            "head_lr": HEAD_LR, "rates": RATES, "lr": lr, "precision": "bf16",
        },
        "tuning": list(on_val.items()),
        "fine_tuned": scores,
        "train_loss": losses,
        "cpu_seconds_of_training": seconds,
        "frozen": frozen,
        "base_bytes": {arm: memory_bytes(base(arm)) for arm in ARMS if arm != INT8},
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
