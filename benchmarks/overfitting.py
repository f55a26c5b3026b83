"""Which remedy against overfitting helps a network fine-tuned on 100 wild digits?

    python benchmarks/overfitting.py [--draws 8] [--workers 2]

Every model starts from the same point, the pre-trained backbone with the head of a linear probe,
and makes the same number of steps; where an arm costs several trainings, its name says so. Each
arm is tried on two bases: alone ("plain"), and on top of augmentation. The strength of a remedy
is chosen by validation accuracy, over draws of labels that are not measured; test images are
read once per finished model. Writes ``data/results/overfitting.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from tlcourse.backbones import Classifier, load_backbone
from tlcourse.comparing import Comparison, versions
from tlcourse.config import TrainConfig
from tlcourse.datasets import BatchLoader, Split, Task, augment_images, load_task
from tlcourse.evaluation import calibration_error, predict, score
from tlcourse.locations import data_dir
from tlcourse.parallel import default_workers, side_by_side
from tlcourse.probing import extract_features, linear_probe
from tlcourse.train import fit
from tlcourse.weight_space import average, greedy_soup

LABELS, BATCH, STEPS, AFTER_PRUNING = 10, 20, 150, 40
LEARNING_RATE, PROBE_C = 3e-3, 0.01
RATES = (1.0, 1 / 3, 2.0, 1.0)  # of the members of a soup, relative to LEARNING_RATE
TUNING_DRAWS = (1_000, 1_001)
BASES = {"plain": 0.0, "augmentation": 1.0}  # share of the training images that are augmented
STRENGTHS = {  # what is chosen on validation
    "weight decay": (0.01, 0.1, 1.0, 4.0),
    "dropout": (0.1, 0.3, 0.5, 0.7),
    "label smoothing": (0.05, 0.1, 0.2, 0.4),
    "pruning": (0.2, 0.5, 0.8),
}
SPARSITIES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
CURVE_STEPS, CURVE_DRAWS = 400, 5  # one run at a constant rate, to watch it overfit
CONFIG = TrainConfig(
    lr=LEARNING_RATE, num_steps=STEPS, warmup_steps=10, weight_decay=0.0, progress=False,
    precision="fp32",
)  # fmt: skip


def start(task: Task, dropout: float = 0.0) -> Classifier:
    """Where every run begins: pre-trained backbone, head from the probe."""
    model = Classifier(load_backbone("glyphnet"), task.num_classes, dropout)
    features = extract_features(model.backbone, task.loaders(256, augment=False).train)
    linear_probe(features, features, c_grid=(PROBE_C,)).copy_to(model.head)
    return model


def batches(split: Split, augmented: float, seed: int) -> BatchLoader:
    """Training batches in which this share of the images is augmented."""

    def transform(images: Tensor, generator: torch.Generator) -> Tensor:
        changed = torch.rand(len(images), generator=generator) < augmented
        return torch.where(changed.view(-1, 1, 1, 1), augment_images(images, generator), images)

    chosen = transform if augmented else None
    return BatchLoader(split.inputs, split.targets, BATCH, True, chosen, seed)


def train(
    task: Task, base: str, seed: int, dropout: float = 0.0, stop_early: bool = False,
    augmented: float | None = None, model: nn.Module | None = None, **changes: object,
) -> tuple[nn.Module, dict[str, list[float]]]:  # fmt: skip
    """One training run; the model keeps its last weights, or the best if it may stop early."""
    model = start(task, dropout) if model is None else model
    loader = batches(task.train, BASES[base] if augmented is None else augmented, seed)
    val = BatchLoader(task.val.inputs, task.val.targets, 300)
    config = replace(CONFIG, seed=seed, eval_every_steps=10, **changes)
    history = fit(model, loader, val if stop_early else None, config)
    curves = {"step": history.eval_step, "val_loss": history.val_loss,
              "val_accuracy": history.val_accuracy, "train_loss": history.train_loss}  # fmt: skip
    return model, curves


def prune_globally(model: nn.Module, sparsity: float) -> nn.Module:
    """Set the smallest weights of all convolutions and of the head to zero, and keep them there."""
    if sparsity > 0:
        parts = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        prune.global_unstructured(
            [(part, "weight") for part in parts], prune.L1Unstructured, amount=sparsity
        )
    return model


def pruned(task: Task, base: str, seed: int, sparsity: float, stop_early: bool = False):
    """The budget of one model: train, prune, train what is left."""
    model, _ = train(task, base, seed, num_steps=STEPS - AFTER_PRUNING)
    return after_pruning(prune_globally(model, sparsity), task, base, seed, stop_early)


def after_pruning(model: nn.Module, task: Task, base: str, seed: int, stop_early: bool = False):
    return train(
        task, base, seed + 50_000, model=model, num_steps=AFTER_PRUNING, lr=LEARNING_RATE / 3,
        stop_early=stop_early,
    )  # fmt: skip


def with_strength(name: str, task: Task, base: str, seed: int, strength: float, **options):
    """One training run with one remedy."""
    if name == "pruning":
        return pruned(task, base, seed, strength, **options)
    key = {"weight decay": "weight_decay", "label smoothing": "label_smoothing"}.get(name, name)
    return train(task, base, seed, **{key: strength}, **options)


def measures(probabilities: Tensor, targets: Tensor) -> dict[str, float]:
    p = probabilities.double()
    return {
        "accuracy": (p.argmax(dim=1) == targets).double().mean().item(),
        "loss": -p[torch.arange(len(p)), targets].clamp_min(1e-30).log().mean().item(),
        "calibration error": calibration_error(p.numpy(), targets.numpy()),
    }


def tuning_run(trial: tuple[str, str, float, int]) -> dict[str, list[float]]:
    base, name, strength, seed = trial
    task = load_task("wild_digits", LABELS, seed)
    if name == "augmentation":
        return train(task, base, seed, augmented=strength, stop_early=True)[1]
    return with_strength(name, task, base, seed, strength, stop_early=True)[1]


def tune(workers: int) -> dict:
    """base -> remedy -> curves of every strength (means over draws), and the chosen strength."""
    tried = {base: dict(STRENGTHS) for base in BASES}
    tried["plain"]["augmentation"] = (0.0, 0.5, 1.0)  # 0 is the plain run
    trials = [
        (base, name, strength, seed)
        for base, names in tried.items()
        for name, strengths in names.items()
        for strength in strengths
        for seed in TUNING_DRAWS
    ]
    found = list(side_by_side(tuning_run, trials, workers))
    curves: dict = {base: {name: {} for name in names} for base, names in tried.items()}
    for base, name, strength, _ in trials[:: len(TUNING_DRAWS)]:
        runs = [run for trial, run in zip(trials, found, strict=True)
                if trial[:3] == (base, name, strength)]  # fmt: skip
        means = {key: np.mean([run[key] for run in runs], axis=0) for key in runs[0]}
        means["train_loss"] = means["train_loss"].reshape(-1, 10).mean(axis=1)  # as val_loss
        curves[base][name][str(strength)] = {k: v.round(4).tolist() for k, v in means.items()}

    def quality(base: str, name: str, strength: float) -> tuple[float, float]:
        run = curves[base][name][str(strength)]
        return run["val_accuracy"][-1], -run["val_loss"][-1]

    chosen = {
        base: {n: max(s, key=partial(quality, base, n)) for n, s in STRENGTHS.items()}
        for base in BASES
    }
    print("chosen:", json.dumps(chosen), flush=True)
    return {"curves": curves, "chosen": chosen}


def sparsity_curve(model: nn.Module, task: Task, base: str, seed: int) -> dict[str, dict]:
    """Test measures of the finished model, pruned: at once, and after some more training."""
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    found: dict[str, dict] = {"pruned": {}, "trained on": {}}
    for sparsity in SPARSITIES:
        copy = start(task)
        copy.load_state_dict(kept)
        prune_globally(copy, sparsity)
        found["pruned"][str(sparsity)] = on_test(copy, task)
        after_pruning(copy, task, base, seed)
        found["trained on"][str(sparsity)] = on_test(copy, task)
    return found


def on_test(model: nn.Module, task: Task) -> dict[str, float]:
    return measures(predict(model, task.test.inputs), task.test.targets)


def several_models(task: Task, base: str, seed: int, first: nn.Module) -> tuple[dict, dict]:
    """Arms made of several trainings from one start, which differ in order, chance and rate."""
    models = [first] + [
        train(task, base, seed + 10_000 * i, lr=LEARNING_RATE * rate)[0]
        for i, rate in enumerate(RATES)
        if i > 0
    ]
    thetas = [model.state_dict() for model in models]
    val = BatchLoader(task.val.inputs, task.val.targets, 300)
    taster = start(task)

    def val_accuracy(theta: dict[str, Tensor]) -> float:
        taster.load_state_dict(theta)
        return score(taster, val)[1]

    greedy, ingredients = greedy_soup(thetas, val_accuracy)
    each = [predict(model, task.test.inputs) for model in models]
    arms = {"ensemble of 4": measures(torch.stack(each).mean(dim=0), task.test.targets)}
    for name, theta in (("uniform soup of 4", average(thetas)), ("greedy soup of 4", greedy)):
        taster.load_state_dict(theta)
        arms[name] = on_test(taster, task)
    members = [measures(p, task.test.targets) for p in each]
    return arms, {"members": members, "greedy": ingredients}


def temperature(model: nn.Module, task: Task) -> tuple[float, dict[str, float]]:
    """The one number that logits are best divided by on validation, and what it does on test."""
    grid = torch.logspace(-0.7, 1, 171)
    val = predict(model, task.val.inputs).double().clamp_min(1e-30).log()
    losses = [nn.functional.cross_entropy(val / t, task.val.targets).item() for t in grid]
    best = grid[int(np.argmin(losses))].item()
    test = predict(model, task.test.inputs).double().clamp_min(1e-30).log()
    return best, measures((test / best).softmax(dim=1), task.test.targets)


def measure(job: tuple[str, int, dict[str, float]]) -> dict:
    """All arms on one draw of labels and one base."""
    base, seed, strengths = job
    task = load_task("wild_digits", LABELS, seed)
    model, _ = train(task, base, seed)
    arms = {base: on_test(model, task)}
    if base == "plain":
        arms["augmentation"] = on_test(train(task, "augmentation", seed)[0], task)
    for name, strength in strengths.items():
        arms[name] = on_test(with_strength(name, task, base, seed, strength)[0], task)
    arms["early stopping"] = on_test(train(task, base, seed, stop_early=True)[0], task)
    several, extra = several_models(task, base, seed, model)
    arms |= several
    longer = train(task, base, seed, num_steps=len(RATES) * STEPS)[0]
    arms["one model, 4 x the steps"] = on_test(longer, task)
    extra["temperature"], extra["divided by it"] = temperature(model, task)
    if base == "plain":
        extra["sparsity"] = sparsity_curve(model, task, base, seed)
    print(f"{base}, draw {seed} done", flush=True)
    return {"arms": arms, "extra": extra}


def long_curve(seed: int) -> dict[str, list[float]]:
    """The plain run at a constant rate: it never comes to rest."""
    task = load_task("wild_digits", LABELS, seed)
    changes = {"num_steps": CURVE_STEPS, "schedule": "constant"}
    return train(task, "plain", seed, stop_early=True, **changes)[1]


def by_metric(results: list[dict]) -> dict[str, dict[str, list[float]]]:
    """metric -> arm -> one number for each draw."""
    arms = results[0]["arms"]
    return {
        metric: {arm: [result["arms"][arm][metric] for result in results] for arm in arms}
        for metric in next(iter(arms.values()))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    parser.add_argument("--out", type=Path, default=data_dir() / "results" / "overfitting.json")
    arguments = parser.parse_args()
    workers, began = arguments.workers or default_workers(), time.perf_counter()
    torch.set_num_threads(1)
    tuned = tune(workers)
    jobs = [(base, seed, tuned["chosen"][base]) for seed in range(arguments.draws)
            for base in BASES]  # fmt: skip
    found = list(side_by_side(measure, jobs, workers))
    curves = list(side_by_side(long_curve, range(CURVE_DRAWS), workers))
    results = {base: [r for job, r in zip(jobs, found, strict=True) if job[0] == base]
               for base in BASES}  # fmt: skip
    settings = {
        "labels per class": LABELS, "batch": BATCH, "steps": STEPS, "lr": LEARNING_RATE,
        "schedule": CONFIG.schedule, "warm-up": CONFIG.warmup_steps, "probe C": PROBE_C,
        "steps after pruning": AFTER_PRUNING, "rates of members": RATES, "draws": arguments.draws,
        "tuning draws": TUNING_DRAWS, "test images": 797, "chosen": tuned["chosen"],
    }  # fmt: skip
    content = {
        "command": "python benchmarks/overfitting.py",
        "settings": settings,
        "scores": {base: by_metric(results[base]) for base in BASES},
        "extra": {base: [result["extra"] for result in results[base]] for base in BASES},
        "tuning": tuned["curves"],
        "long_curves": curves,
        "wall_seconds": round(time.perf_counter() - began),
        "versions": versions(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for base, metrics in content["scores"].items():
        for metric, scores in metrics.items():
            print(f"\n{base}: {metric}\n{Comparison(scores).table()}")


if __name__ == "__main__":
    main()
