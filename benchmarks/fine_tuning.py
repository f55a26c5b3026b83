"""Learning rate and warm-up, BatchNorm, and layer by layer: full fine-tuning on wild digits.

    python benchmarks/fine_tuning.py [--only rates layers batchnorm] [--workers N]

Ten labels per class, and one start for every run of a draw: the pre-trained backbone with a head
from logistic regression on its frozen features. What is tuned is tuned on the validation split,
over two extra draws of labels; other draws, paired across arms, are then measured on the test
split. Writes ``data/results/fine_tuning.json``; parts not named by ``--only`` keep what is
recorded there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tlcourse.arms import probe
from tlcourse.backbones import Classifier, load_backbone
from tlcourse.comparing import Comparison, versions
from tlcourse.config import TrainConfig
from tlcourse.datasets import Loaders, Task, load_task
from tlcourse.evaluation import evaluate
from tlcourse.freezing import freeze, freeze_statistics, layer_names, unfreeze
from tlcourse.locations import data_dir
from tlcourse.parallel import default_workers, side_by_side
from tlcourse.probing import extract_features, linear_probe
from tlcourse.recording import History, TrainingDiverged
from tlcourse.train import fit

LABELS, BATCH_SIZE, NUM_STEPS, LONG_STEPS, WARMUP = 10, 20, 40, 120, 10
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
LAYER_RATES = (1e-3, 3e-3, 1e-2, 3e-2)  # layer decay slows all but the head: needs more at the top
NORM_RATES = (3e-4, 1e-3, 3e-3)
NORM_DRAWS = 5  # at most: batches of two cost ten times as many steps
TUNING_DRAWS = (1_000, 1_001)
BATCH_SIZES = (2, 4, 20)
ULMFIT_DECAY = 1 / 2.6  # Howard & Ruder 2018, section 3.2, arXiv:1801.06146
MODES = ("batch statistics", "frozen statistics", "all of BatchNorm frozen")
LAYER_ARMS = ("one rate", "layer decay", "gradual", "gradual, layer decay")


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        arm: "one rate" or another of ``LAYER_ARMS``, or one of ``MODES``.
        lr: peak learning rate.
        draw: of the labelled images.
        warmup_steps, num_steps, batch_size: as the names say.
    """

    arm: str
    lr: float
    draw: int
    warmup_steps: int = WARMUP
    num_steps: int = NUM_STEPS
    batch_size: int = BATCH_SIZE


def perform(run: Run) -> dict[str, Any]:
    """Losses and accuracies of a run, and how far its backbone moved from where it began."""
    task = load_task("wild_digits", LABELS, run.draw)
    backbone = "glyphnet_bn" if run.arm in MODES else "glyphnet"
    model = common_start(task, backbone)
    before = [parameter.detach().clone() for parameter in model.backbone.parameters()]
    config = TrainConfig(
        lr=run.lr, num_steps=run.num_steps, warmup_steps=run.warmup_steps, seed=run.draw,
        layer_decay=ULMFIT_DECAY if "decay" in run.arm else None, precision="fp32",
        eval_every_steps=max(1, run.num_steps // 4), progress=False,
    )  # fmt: skip
    loaders = task.loaders(run.batch_size, seed=run.draw)
    if run.arm in MODES:
        set_batchnorm(model, run.arm)
    try:
        train = train_gradually if "gradual" in run.arm else fit_all
        history = train(model, loaders, config)
    except TrainingDiverged as error:
        history = error.history
    moved = zip(model.backbone.parameters(), before, strict=True)
    squares = sum(float((now.detach() - then).square().sum()) for now, then in moved)
    return {
        "train_loss": [round(loss, 3) for loss in history.train_loss],
        "val_loss": [round(loss, 4) for loss in history.val_loss],
        "val_accuracy": evaluate(model, loaders.val).accuracy,
        "test_accuracy": evaluate(model, loaders.test).accuracy,
        "distance": round((squares / sum(p.numel() for p in before)) ** 0.5, 6),  # rms of a weight
    }


def common_start(task: Task, backbone: str) -> Classifier:
    """Pre-trained backbone, head from the probe (Kumar et al. 2022, arXiv:2202.10054)."""
    model = Classifier(load_backbone(backbone), task.num_classes)
    plain = task.loaders(augment=False)
    train, val = (extract_features(model.backbone, part) for part in (plain.train, plain.val))
    linear_probe(train, val, val).copy_to(model.head)
    return model


def fit_all(model: Classifier, loaders: Loaders, config: TrainConfig) -> History:
    return fit(model, loaders.train, loaders.val, config)


def train_gradually(model: Classifier, loaders: Loaders, config: TrainConfig) -> History:
    """One layer more in each epoch, from the head down; what is left of the steps for all.

    Howard & Ruder 2018, section 3.3, arXiv:1801.06146.
    """
    layers = dict(model.named_modules())
    names = layer_names(model)[::-1]
    epoch = len(loaders.train)
    freeze(model)
    for name in names[:-1]:
        unfreeze(layers[name])
        stage = replace(config, num_steps=epoch, warmup_steps=min(2, config.warmup_steps))
        fit(model, loaders.train, None, replace(stage, schedule="constant"))
    unfreeze(layers[names[-1]])
    left = config.num_steps - epoch * (len(names) - 1)
    last = replace(config, num_steps=left, warmup_steps=min(2, config.warmup_steps))
    return fit(model, loaders.train, loaders.val, last)


def set_batchnorm(model: Classifier, mode: str) -> None:
    if mode != MODES[0]:
        freeze_statistics(model, affine=mode == MODES[2])


def measure_rates(draws: int, workers: int) -> dict[str, Any]:
    """Every rate, with and without warm-up: curves and scores of each draw."""
    grid = list(product(RATES, (0, WARMUP), range(draws)))
    runs = [Run("one rate", lr, draw, warmup) for lr, warmup, draw in grid]
    found = list(side_by_side(perform, runs, workers))
    tasks = (load_task("wild_digits", LABELS, draw) for draw in range(draws))
    frozen = [probe(task, load_backbone("glyphnet")).test_accuracy for task in tasks]
    keys = ("lr", "warmup_steps", "draw")
    records = [
        dict(zip(keys, place, strict=True)) | result
        for place, result in zip(grid, found, strict=True)
    ]
    return {"num_steps": NUM_STEPS, "batch_size": BATCH_SIZE, "probe": frozen, "runs": records}


def measure_tuned(
    make_run: Callable[[str, float, int], Run],
    arms: Sequence[str],
    rates: Sequence[float],
    draws: int,
    workers: int,
) -> dict[str, Any]:
    """Choose each arm's rate on validation, then read the test split of other draws."""
    trials = list(product(arms, rates, TUNING_DRAWS))
    found = list(side_by_side(perform, [make_run(*trial) for trial in trials], workers))
    accuracy = dict(zip(trials, (result["val_accuracy"] for result in found), strict=True))
    chosen = {
        arm: max(rates, key=lambda lr: sum(accuracy[arm, lr, d] for d in TUNING_DRAWS))
        for arm in arms
    }
    runs = [make_run(arm, chosen[arm], draw) for arm in arms for draw in range(draws)]
    results = list(side_by_side(perform, runs, workers))
    scores: dict[str, list[float]] = {arm: [] for arm in arms}
    for run, result in zip(runs, results, strict=True):
        scores[run.arm].append(result["test_accuracy"])
    print(Comparison(scores).table(), flush=True)
    tried = {
        arm: {f"{lr:g}": sum(accuracy[arm, lr, d] for d in TUNING_DRAWS) / 2 for lr in rates}
        for arm in arms
    }
    return {"scores": scores, "lr": chosen, "val_accuracy_while_tuning": tried}


def measure_layers(draws: int, workers: int) -> dict[str, Any]:
    def run_of(num_steps: int) -> Callable[[str, float, int], Run]:
        return lambda arm, lr, draw: Run(arm, lr, draw, num_steps=num_steps)

    return {
        str(steps): measure_tuned(run_of(steps), LAYER_ARMS, LAYER_RATES, draws, workers)
        for steps in (NUM_STEPS, LONG_STEPS)
    }


def measure_batchnorm(draws: int, workers: int) -> dict[str, Any]:
    """Every mode at every batch size, over the same number of images."""

    def run_of(size: int) -> Callable[[str, float, int], Run]:
        times = BATCH_SIZE // size
        return lambda arm, lr, draw: Run(
            arm, lr, draw, WARMUP * times, NUM_STEPS * times, batch_size=size
        )

    return {
        str(size): measure_tuned(run_of(size), MODES, NORM_RATES, min(draws, NORM_DRAWS), workers)
        for size in BATCH_SIZES
    }


PARTS = {"rates": measure_rates, "layers": measure_layers, "batchnorm": measure_batchnorm}


def write(parts: dict[str, Any], out: Path) -> None:
    """Put the parts into the file; a list of numbers stays on one line."""
    recorded = json.loads(out.read_text("utf-8")) if out.is_file() else {}
    recorded |= parts | {
        "command": "python benchmarks/fine_tuning.py",
        "task": f"wild_digits, {LABELS} labels per class",
        "versions": versions(),
    }
    lines = [f" {json.dumps(key)}: {_lines(value)}" for key, value in recorded.items()]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _lines(value: Any) -> str:
    if isinstance(value, dict) and "runs" in value:
        rest = {key: item for key, item in value.items() if key != "runs"}
        runs = ",\n  ".join(json.dumps(run) for run in value["runs"])
        return json.dumps(rest)[:-1] + f', "runs": [\n  {runs}\n ]}}'
    if isinstance(value, dict):
        items = (f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items())
        return "{\n" + ",\n".join(items) + "\n }"
    return json.dumps(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    parser.add_argument("--out", type=Path, default=data_dir() / "results" / "fine_tuning.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    workers = arguments.workers or default_workers()
    for name in arguments.only:
        write({name: PARTS[name](arguments.draws, workers)}, arguments.out)
        print(f"{name}: written to {arguments.out}", flush=True)


if __name__ == "__main__":
    main()
