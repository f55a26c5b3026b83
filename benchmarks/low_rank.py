"""LoRA of several ranks beside full fine-tuning, and the rank of full fine-tuning's own update.

    python benchmarks/low_rank.py [--workers N] [--out FILE]

Documentation routing with MiniLM, 16 labels per topic. A rate is chosen for each arm on the
validation split of one extra draw; five other draws, paired across the arms, are then measured on
the test split. After each full fine-tuning the update of every matrix of the encoder is taken
apart by its singular values, and cut to few of them. Writes ``data/results/low_rank.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tlcourse as tl
from tlcourse.comparing import Comparison, versions
from tlcourse.inference import predictions
from tlcourse.locations import data_dir
from tlcourse.lora import LoRAConfig, add_lora
from tlcourse.parallel import default_workers, side_by_side
from tlcourse.text import TextTask, load_text_task

DRAWS, TUNING_DRAW, LABELS, BATCH_SIZE, STEPS = 5, 1_000, 16, 16, 30
HEAD_LR = 3e-3
# alpha / sqrt(rank): the first updates are then about as large at every rank, so that one grid
# of rates is fair to all.
ALPHA = 4.0
RANKS = {f"LoRA, r = {rank}": rank for rank in (1, 4, 16)}
RATES = dict.fromkeys(RANKS, (1e-3, 3e-3)) | {"full fine-tuning": (1e-4, 3e-4)}
HEAD, FULL = "head only", "full fine-tuning"
ARMS = (HEAD, *RANKS, FULL)
CUTS = (0, 1, 4, 16)  # singular values of the update that are kept
RANDOM = 16  # random directions that are kept, for comparison
SHARES = (1, 4, 16, 64)
SHOWN = 384  # singular values that are recorded of queries and values


@dataclass(frozen=True)
class Run:
    arm: str
    draw: int
    lr: float = 0.0


def build(run: Run, task: TextTask) -> nn.Module:
    """MiniLM and a new head, with what the arm trains."""
    torch.manual_seed(run.draw)
    model = tl.Classifier(tl.load_backbone("minilm"), task.num_classes)
    if run.arm in RANKS:
        add_lora(model, LoRAConfig(rank=RANKS[run.arm], alpha=ALPHA, rank_stabilised=True))
    return model


def guesses(model: nn.Module, loader: Any) -> tuple[float, Tensor]:
    """Accuracy, and the class of each text."""
    with torch.autocast("cpu", torch.bfloat16):
        found = [(logits.argmax(dim=1), y) for logits, y in predictions(model, loader)]
    chosen = torch.cat([guess for guess, _ in found])
    return (chosen == torch.cat([y for _, y in found])).double().mean().item(), chosen


def perform(run: Run) -> dict[str, Any]:
    """Accuracy on validation (tuning draw) or test (others) and what else there is to know."""
    task = load_text_task("doc_routing", LABELS, run.draw)
    model = build(run, task)
    loaders = task.loaders(model.backbone.preprocess, BATCH_SIZE, run.draw)
    if run.arm == HEAD:
        train, val, test = (
            tl.extract_features(model.backbone, part)
            for part in (loaders.train, loaders.val, loaders.test)
        )
        return {"accuracy": tl.linear_probe(train, test, val).accuracy}
    before = copy.deepcopy(model) if run.arm == FULL else None
    config = tl.TrainConfig(
        lr=run.lr, head_lr=HEAD_LR, num_steps=STEPS, warmup_steps=STEPS // 10,
        precision="bf16", progress=False, seed=run.draw,
    )  # fmt: skip
    tl.fit(model, loaders.train, None, config)
    tuning = run.draw == TUNING_DRAW
    accuracy, chosen = guesses(model, loaders.val if tuning else loaders.test)
    found: dict[str, Any] = {"accuracy": accuracy}
    if before is not None and not tuning:
        found["update"] = take_apart(before, model, loaders.test, chosen)
    return found


def take_apart(before: nn.Module, after: nn.Module, loader: Any, chosen: Tensor) -> dict[str, Any]:
    """Singular values of the updates, and what the model says with each update cut short."""
    old, parts, kinds = before.state_dict(), {}, {}
    for name, module in after.backbone.body.encoder.named_modules():
        if isinstance(module, nn.Linear):
            weight = old[f"backbone.body.encoder.{name}.weight"]
            U, S, V = torch.linalg.svd(module.weight.detach() - weight, full_matrices=False)
            parts[name] = (weight, U, S, V)
            kinds[name] = {
                "size": float(S.norm() / weight.norm()),
                "stable_rank": float(S.square().sum() / S[0].square()),
                "shares": [float(S[:k].square().sum() / S.square().sum()) for k in SHARES],
            }
    spectra = {
        kind: torch.stack([(p[2] / p[2].norm()) for n, p in parts.items() if n.endswith(kind)])
        for kind in ("query", "value")
    }
    generator = torch.Generator().manual_seed(0)
    cut: dict[str, dict[str, float]] = {}
    for kept in (*map(str, CUTS), "random"):
        for name, (weight, U, S, V) in parts.items():
            if kept == "random":
                axes = torch.linalg.qr(torch.randn(V.shape[1], RANDOM, generator=generator))[0]
                update = U @ (S[:, None] * (V @ axes)) @ axes.T
            else:
                update = (U[:, : int(kept)] * S[: int(kept)]) @ V[: int(kept)]
            after.backbone.body.encoder.get_submodule(name).weight.data = weight + update
        accuracy, now = guesses(after, loader)
        cut[kept] = {"accuracy": accuracy, "same": (now == chosen).double().mean().item()}
    means = {k: [round(v, 6) for v in s.mean(0)[:SHOWN].tolist()] for k, s in spectra.items()}
    return {"matrices": kinds, "spectra": means, "cut": cut}


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    parser.add_argument("--out", type=Path, default=data_dir() / "results" / "low_rank.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    run_all = partial(_run_all, options.workers or default_workers())

    trials = [Run(arm, TUNING_DRAW, lr) for arm, rates in RATES.items() for lr in rates]
    tuning: dict[str, dict[str, float]] = {}
    for run, found in zip(trials, run_all(trials), strict=True):
        tuning.setdefault(run.arm, {})[f"{run.lr:g}"] = found["accuracy"]
    rates = {arm: max(by_rate, key=by_rate.__getitem__) for arm, by_rate in tuning.items()}
    runs = [Run(arm, draw, float(rates.get(arm, 0))) for draw in range(DRAWS) for arm in ARMS]
    results = dict(zip(runs, run_all(runs), strict=True))
    scores = {arm: [results[r]["accuracy"] for r in runs if r.arm == arm] for arm in ARMS}
    content = {
        "scores": scores,
        "lr": {arm: float(rate) for arm, rate in rates.items()},
        "tuning": tuning,
        "updates": [results[run]["update"] for run in runs if run.arm == FULL],
        "command": "python benchmarks/low_rank.py",
        "versions": versions(),
        "settings": {
            "model": "minilm", "labels_per_class": LABELS, "steps": STEPS,
            "batch_size": BATCH_SIZE, "draws": DRAWS, "head_lr": HEAD_LR, "alpha": ALPHA,
            "scale": "alpha / sqrt(rank)", "targets": ["query", "value"], "precision": "bf16",
            "shares": list(SHARES), "cuts": list(CUTS), "random_directions": RANDOM,
        },
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(Comparison(scores), flush=True)


def _run_all(workers: int, runs: list[Run]) -> list[dict[str, Any]]:
    found = []
    for run, result in zip(runs, side_by_side(perform, runs, workers), strict=True):
        print(f"{run.arm}, draw {run.draw}, lr {run.lr:g}: {result['accuracy']:.3f}", flush=True)
        found.append(result)
    return found


if __name__ == "__main__":
    main()
