"""BitFit beside full fine-tuning as labels grow: wild digits, and documentation routing.

    python benchmarks/selective_tuning.py [--tasks wild_digits doc_routing] [--workers N]

Every run of a draw starts from the same point: the pre-trained backbone, with a head from logistic
regression on its frozen features ("probe" is that start). The head is always trained, at one rate;
"head only" trains nothing else. The rate of what is trained in the backbone is chosen for each arm
and each number of labels, on the validation split of two extra draws. Other draws, paired across
the arms, are then measured on the test split; both arms also with one rate for all, the one chosen
for most labels. After each full fine-tuning of MiniLM the updates of the matrices that (IA)3 scales
are set beside what a diagonal could have done. Writes ``data/results/selective_tuning.json`` after
every run, and goes on from there when it was stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tlcourse as tl
from tlcourse.adapters import train_biases
from tlcourse.comparing import Comparison, versions
from tlcourse.freezing import count_parameters
from tlcourse.locations import data_dir
from tlcourse.parallel import side_by_side

PROBE, HEAD, BITFIT, FULL = "probe", "head only", "BitFit", "full fine-tuning"
TRAINED = (BITFIT, FULL)
ONE_RATE = {arm: f"{arm}, one rate" for arm in TRAINED}  # that of the largest number of labels
ARMS = (PROBE, HEAD, *TRAINED, *ONE_RATE.values())
TUNING_DRAWS = (1_000, 1_001)


@dataclass(frozen=True)
class Setting:
    """What is fixed for a task: labels per class -> steps, rates to choose from, and so on."""

    backbone: str
    steps: dict[int, int]
    rates: dict[str, tuple[float, ...]]
    draws: int
    batch_size: int
    head_lr: float
    looks: int  # evaluations on validation within a run, the best is kept; 0: the last weights


SETTINGS = {
    "wild_digits": Setting(
        "glyphnet", dict.fromkeys((2, 5, 10, 20, 50), 200),
        {BITFIT: (3e-3, 1e-2, 3e-2), FULL: (1e-4, 3e-4, 1e-3, 3e-3)}, 6, 32, 1e-3, 4,
    ),
    "doc_routing": Setting(
        "minilm", {16: 16, 100: 30},
        {BITFIT: (1e-3, 3e-3), FULL: (3e-5, 1e-4)}, 5, 16, 1e-3, 0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    task: str
    labels: int
    arm: str
    draw: int
    lr: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.task}, {self.labels} labels, {self.arm}, draw {self.draw}, lr {self.lr:g}"


def perform(run: Run) -> dict[str, Any]:
    """Accuracy on validation (tuning draw) or test (others), and what else there is to know."""
    setting = SETTINGS[run.task]
    loaders, plain = load(run, setting)
    model = start(tl.load_backbone(setting.backbone), plain)
    found: dict[str, Any] = {}
    if run.arm != PROBE:
        if run.arm == BITFIT:
            train_biases(model)
        elif run.arm == HEAD:
            tl.freeze(model.backbone)
        found["trained"] = count_parameters(model).trainable
        before = {name: value.clone() for name, value in model.state_dict().items()}
        began = time.process_time()
        losses = train(model, loaders, run, setting)
        found["cpu_seconds"] = round(time.process_time() - began, 1)
        found["train_loss"] = round(float(np.mean(losses[-10:])), 4)
        if run.task == "doc_routing" and run.arm == FULL and run.draw not in TUNING_DRAWS:
            found["shares"] = diagonal_shares(before, model.state_dict())
    part = loaders.val if run.draw in TUNING_DRAWS else loaders.test
    with torch.autocast("cpu", torch.bfloat16):
        return {"accuracy": tl.evaluate(model, part).accuracy} | found


def load(run: Run, setting: Setting) -> tuple[Any, Any]:
    """Loaders for training, and without augmentation."""
    if run.task == "wild_digits":
        task = tl.load_task(run.task, run.labels, run.draw)
        size = min(setting.batch_size, len(task.train))
        return task.loaders(size, seed=run.draw), task.loaders(augment=False)
    text_task = tl.load_text_task(run.task, run.labels, run.draw)
    tokenise = tl.load_backbone(setting.backbone).preprocess
    loaders = text_task.loaders(tokenise, setting.batch_size, run.draw)
    return loaders, text_task.loaders(tokenise, 64)


def start(backbone: nn.Module, plain: Any) -> nn.Module:
    """A head from the probe; how strongly it is regularised, validation says."""
    with torch.autocast("cpu", torch.bfloat16):
        train, val = (tl.extract_features(backbone, part) for part in (plain.train, plain.val))
    model = tl.Classifier(backbone, int(train.targets.max()) + 1)
    tl.linear_probe(train, val, val).copy_to(model.head)
    return model


def train(model: nn.Module, loaders: Any, run: Run, setting: Setting) -> list[float]:
    """Losses of every step; with looks, the model keeps the weights that were best."""
    steps = setting.steps[run.labels]
    config = tl.TrainConfig(
        lr=run.lr or setting.head_lr, head_lr=setting.head_lr, num_steps=steps,
        warmup_steps=steps // 10, precision="bf16", progress=False, seed=run.draw,
        monitor="val_accuracy",
        eval_every_steps=steps // setting.looks if setting.looks else None,
    )  # fmt: skip
    return tl.fit(model, loaders.train, loaders.val if setting.looks else None, config).train_loss


def diagonal_shares(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, list[float]]:
    """Of the squares of each update: what scaling rows (or columns) holds, and what rank 1 holds.

    Keys and values: their rows, as (IA)3 scales outputs there. Second layer of each feed-forward:
    its columns, as (IA)3 scales inputs there.
    """
    found: dict[str, list[float]] = {"key": [], "value": [], "feed-forward": []}
    for name, old in before.items():
        kind = next((k for k in ("key", "value") if name.endswith(f"self.{k}.weight")), None)
        if name.endswith("output.dense.weight") and "attention" not in name:
            kind = "feed-forward"
        if kind is None:
            continue
        update = after[name] - old
        rows, base = (update.T, old.T) if kind == "feed-forward" else (update, old)
        along = (rows * base).sum(1).square() / base.square().sum(1)
        first = torch.linalg.matrix_norm(update, 2).square()
        squares = update.square().sum()
        found[kind].append(round((along.sum() / squares).item(), 5))
        found.setdefault(f"{kind}, rank 1", []).append(round((first / squares).item(), 5))
    return found


def plan(task: str, known: dict[str, Any]) -> list[Run]:
    """What is left to do: tuning first; then, when all rates are tried, the draws that count."""
    trials = [
        run
        for labels in SETTINGS[task].steps
        for arm in TRAINED
        for lr in SETTINGS[task].rates[arm]
        for run in trials_of(task, labels, arm, lr)
    ]
    if missing := [run for run in trials if run.key not in known]:
        return missing
    runs = [
        run
        for labels in SETTINGS[task].steps
        for of_draw in zip(*measured(task, labels, known).values(), strict=True)
        for run in of_draw
    ]
    return list({run.key: run for run in runs if run.key not in known}.values())


def measured(task: str, labels: int, known: dict[str, Any]) -> dict[str, list[Run]]:
    """The runs of each arm, one for each draw."""
    setting, most = SETTINGS[task], max(SETTINGS[task].steps)
    own, last = chosen(task, labels, known), chosen(task, most, known)
    ways = {arm: (arm, own.get(arm, 0.0)) for arm in (PROBE, HEAD, *TRAINED)}
    ways |= {ONE_RATE[arm]: (arm, last[arm]) for arm in TRAINED}
    return {
        name: [Run(task, labels, arm, draw, lr) for draw in range(setting.draws)]
        for name, (arm, lr) in ways.items()
    }


def chosen(task: str, labels: int, known: dict[str, Any]) -> dict[str, float]:
    """The rate of each arm with the best accuracy on validation; of equals, the smallest."""
    found = tuning(task, labels, known)
    return {arm: float(max(scores, key=scores.__getitem__)) for arm, scores in found.items()}


def tuning(task: str, labels: int, known: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Mean accuracy on validation for each arm and rate."""

    def score(arm: str, lr: float) -> float:
        runs = trials_of(task, labels, arm, lr)
        return float(np.mean([known[run.key]["accuracy"] for run in runs]))

    rates = SETTINGS[task].rates
    return {arm: {f"{lr:g}": score(arm, lr) for lr in rates[arm]} for arm in TRAINED}


def trials_of(task: str, labels: int, arm: str, lr: float) -> list[Run]:
    return [Run(task, labels, arm, draw, lr) for draw in TUNING_DRAWS]


def summary(task: str, labels: int, known: dict[str, Any]) -> dict[str, Any]:
    """What the lesson reads: scores by arm, rates, losses, shares."""
    found = {
        arm: [known[run.key] for run in runs] for arm, runs in measured(task, labels, known).items()
    }
    content: dict[str, Any] = {
        "scores": {arm: [row["accuracy"] for row in rows] for arm, rows in found.items()},
        "lr": chosen(task, labels, known),
        "tuning": tuning(task, labels, known),
        "trained": {arm: found[arm][0]["trained"] for arm in (HEAD, *TRAINED)},
    }
    for name in ("train_loss", "cpu_seconds"):
        content[name] = {arm: [row[name] for row in found[arm]] for arm in found if arm != PROBE}
    if task == "doc_routing":
        content["shares"] = [row["shares"] for row in found[FULL]]
    return content


def settings() -> dict[str, Any]:
    return {
        task: {
            "backbone": s.backbone, "steps": {str(n): steps for n, steps in s.steps.items()},
            "rates": {arm: list(rates) for arm, rates in s.rates.items()}, "draws": s.draws,
            "batch_size": s.batch_size, "head_lr": s.head_lr, "looks": s.looks,
        }
        for task, s in SETTINGS.items()
    }  # fmt: skip


def read(out: Path) -> dict[str, Any]:
    """Runs that were recorded with the present settings; other rates or draws do not matter."""
    if not out.is_file():
        return {}
    content = json.loads(out.read_text("utf-8"))
    same = without_grid(content["settings"]) == without_grid(settings())
    return content["runs"] if same else {}


def without_grid(recorded: dict[str, Any]) -> dict[str, Any]:
    return {
        task: {name: value for name, value in setting.items() if name not in ("rates", "draws")}
        for task, setting in recorded.items()
    }


def write(out: Path, known: dict[str, Any]) -> None:
    """Everything so far; a number of labels has a summary once all its runs are there."""
    results: dict[str, dict[str, Any]] = {}
    for task, setting in SETTINGS.items():
        if not plan(task, known):
            results[task] = {str(labels): summary(task, labels, known) for labels in setting.steps}
    rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(run)}" for key, run in known.items())
    rest = {
        "command": "python benchmarks/selective_tuning.py", "versions": versions(),
        "settings": settings(), "results": results,
    }  # fmt: skip
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in rest.items()]
    text = "{\n" + ",\n".join([*lines, ' "runs": {\n' + rows + "\n }"]) + "\n}\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    parser.add_argument(
        "--out", type=Path, default=data_dir() / "results" / "selective_tuning.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = read(options.out)
    for task in options.tasks:
        while todo := plan(task, known):
            done = side_by_side(perform, todo, options.workers)
            for run, found in zip(todo, done, strict=True):
                known[run.key] = found
                write(options.out, known)
                print(f"{run.key}: {found['accuracy']:.3f}", flush=True)
        for labels in SETTINGS[task].steps:
            print(f"\n{task}, {labels} labels per class")
            print(Comparison(summary(task, labels, known)["scores"]).table(FULL), flush=True)


if __name__ == "__main__":
    main()
