"""What does fine-tuning do to accuracy on images that differ from the training images?

    python benchmarks/feature_distortion.py [--draws 8] [--workers 2]

Ten labels per class, the same images and the same start for all arms of a draw. Each arm's
learning rate is chosen on validation images, which are never shifted, over two extra draws of
labels. All runs have the same number of steps and keep the weights of the last one. Writes
``data/results/feature_distortion.json``; lesson 08 reads it.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tlcourse.backbones import Classifier, load_backbone
from tlcourse.comparing import Comparison, versions
from tlcourse.config import TrainConfig, no_penalty
from tlcourse.datasets import BatchLoader, Split, Task, load_task
from tlcourse.locations import data_dir
from tlcourse.losses import L2SP
from tlcourse.parallel import default_workers, side_by_side
from tlcourse.probing import Features, Probe, extract_features, linear_probe
from tlcourse.shift import SHIFTS, shifted
from tlcourse.sources import glyph_batch
from tlcourse.train import fit
from tlcourse.weight_space import interpolate

LABELS_PER_CLASS, NUM_STEPS, BATCH_SIZE = 10, 150, 20
TUNING_DRAWS = (1_000, 1_001)
LRS = (1e-3, 3e-3, 1e-2)
HEADS = {
    "fine-tune": "random",
    "fine-tune, zero head": "zero",
    "probe, then fine-tune": "probe",
}
TASK_ARMS = {"wild_digits": list(HEADS), "plain_digits": ["fine-tune", "probe, then fine-tune"]}
STRENGTHS = (0.003, 0.03, 0.3)  # of L2-SP
ALPHAS = (0.125, 0.25, 0.375, 0.5, 0.75)  # probe at 0, fine-tuned at 1
Found = dict[str, dict[str, dict[str, float]]]  # measure -> part -> arm -> number


@dataclass(frozen=True)
class Parts:
    """Images on which a model is measured, and what the pre-trained backbone says of them."""

    splits: dict[str, Split]
    before: dict[str, np.ndarray]


def parts_of(task_name: str) -> Parts:
    """Validation images, test images and the shifted test images of a task."""
    task = load_task(task_name, LABELS_PER_CLASS)
    splits = {"validation": task.val, "test": task.test}
    if task_name == "plain_digits":
        splits |= {shift: shifted(task.test, shift) for shift in ("inverted", "noisy")}
        splits["wild"] = load_task("wild_digits").test
        splits["photograph"] = shifted(splits["wild"], "photograph")
    else:
        splits |= {shift: shifted(task.test, shift) for shift in SHIFTS}
    backbone = load_backbone("glyphnet")
    before = {name: features_of(backbone, part).features for name, part in splits.items()}
    return Parts(splits, before)


def source_scenes() -> Split:
    images, _ = glyph_batch(400, torch.Generator().manual_seed(7))
    return Split(images, torch.zeros(400, dtype=torch.long), torch.arange(400))


def features_of(backbone: nn.Module, split: Split) -> Features:
    return extract_features(backbone, BatchLoader(split.inputs, split.targets, 256))


def probe_of(backbone: nn.Module, task: Task, augmented_passes: int = 0) -> Probe:
    """A probe whose penalty is chosen on validation images."""
    train, val = features_of(backbone, task.train), features_of(backbone, task.val)
    if augmented_passes:
        loader = task.loaders(256, augment=True).train
        passes = [extract_features(backbone, loader) for _ in range(augmented_passes)]
        train = Features(
            np.concatenate([part.features for part in passes]),
            np.concatenate([part.targets for part in passes]),
        )
    return linear_probe(train, val, val)


def start(task: Task, head: str, seed: int) -> Classifier:
    """The pre-trained backbone under a head that is "random", "zero" or "probe"."""
    torch.manual_seed(seed)
    model = Classifier(load_backbone("glyphnet"), task.num_classes)
    if head == "zero":
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
    elif head == "probe":
        probe_of(model.backbone, task).copy_to(model.head)
    return model


def train(model: Classifier, task: Task, lr: float, seed: int, strength: float = 0.0) -> None:
    """Train everything, in place, for ``NUM_STEPS`` steps."""
    config = TrainConfig(
        lr=lr, num_steps=NUM_STEPS, weight_decay=0, warmup_steps=15, seed=seed, progress=False,
        penalty=L2SP(model, strength) if strength else no_penalty,
    )  # fmt: skip
    fit(model, task.loaders(BATCH_SIZE, seed=seed).train, None, config)


def measure(found: Found, arm: str, model: Classifier, parts: Parts) -> dict[str, Features]:
    """Accuracy on validation, test and shifted images; returns the features of these images."""
    after = {name: features_of(model.backbone, split) for name, split in parts.splits.items()}
    for name, features in after.items():
        put(found, "accuracy", name, arm, accuracy(model.head, features))
    return after


def measure_whole(found: Found, arm: str, model: Classifier, parts: Parts, labelled: Split) -> None:
    """Also how far the features moved, and what a new head makes of them elsewhere.

    The new head is fitted on the same labelled images, shifted like the images it is tested on.
    """
    after, backbone = measure(found, arm, model, parts), model.backbone
    for name, before in parts.before.items():
        put(found, "moved", name, arm, change(before, after[name].features))
    for name, split in {"training": labelled, "glyph scenes": source_scenes()}.items():
        pair = [features_of(net, split).features for net in (load_backbone("glyphnet"), backbone)]
        put(found, "moved", name, arm, change(*pair))
    for name in sorted(after.keys() & set(SHIFTS)):
        shifted_train = features_of(backbone, shifted(labelled, name))
        refit = linear_probe(shifted_train, after[name], c_grid=(0.1,))
        put(found, "refit", name, arm, refit.accuracy)


def put(found: Found, measured: str, part: str, arm: str, number: float) -> None:
    found.setdefault(measured, {}).setdefault(part, {})[arm] = number


def accuracy(head: nn.Linear, part: Features) -> float:
    with torch.no_grad():
        guessed = head(torch.from_numpy(part.features)).argmax(dim=1).numpy()
    return float((guessed == part.targets).mean())


def change(before: np.ndarray, after: np.ndarray) -> float:
    """Mean over the images of ||after - before|| / ||before||."""
    size = np.linalg.norm(before, axis=1)
    return float((np.linalg.norm(after - before, axis=1) / size).mean())


def tuned_lrs(task_name: str, workers: int) -> dict[str, float]:
    """For each arm the rate with the best mean validation accuracy on extra draws."""
    arms = TASK_ARMS[task_name]
    trials = [(arm, lr, draw) for arm in arms for lr in LRS for draw in TUNING_DRAWS]

    def validation_accuracy(trial: tuple[str, float, int]) -> float:
        arm, lr, draw = trial
        task = load_task(task_name, LABELS_PER_CLASS, draw)
        model = start(task, HEADS[arm], draw)
        train(model, task, lr, draw)
        return accuracy(model.head, features_of(model.backbone, task.val))

    found = dict(zip(trials, side_by_side(validation_accuracy, trials, workers), strict=True))
    chosen = {}
    for arm in arms:
        means = {lr: float(np.mean([found[arm, lr, draw] for draw in TUNING_DRAWS])) for lr in LRS}
        print(f"{task_name}, {arm}: {means}", flush=True)
        chosen[arm] = max(means, key=lambda lr: means[lr])
    return chosen


def one_draw(task_name: str, draw: int, lrs: dict[str, float]) -> Found:
    """Every arm on one draw of labelled images."""
    task, parts = load_task(task_name, LABELS_PER_CLASS, draw), parts_of(task_name)
    found: Found = {}
    probed = start(task, "probe", draw)
    measure_whole(found, "probe", probed, parts, task.train)
    augmented = start(task, "probe", draw)
    probe_of(augmented.backbone, task, augmented_passes=10).copy_to(augmented.head)
    measure(found, "probe on augmented images", augmented, parts)
    for arm, lr in lrs.items():
        model = start(task, HEADS[arm], draw)
        train(model, task, lr, draw)
        measure_whole(found, arm, model, parts, task.train)
        if HEADS[arm] == "probe" and task_name == "wild_digits":
            measure_line(found, probed, model, parts)
            measure_strengths(found, parts, task, lr, draw)
    return found


def measure_line(found: Found, probed: Classifier, tuned: Classifier, parts: Parts) -> None:
    """WiSE-FT: models between the probe (alpha 0) and the fine-tuned one (alpha 1)."""
    model = copy.deepcopy(probed)
    for alpha in ALPHAS:
        model.load_state_dict(interpolate(probed.state_dict(), tuned.state_dict(), alpha))
        measure(found, f"alpha {alpha}", model, parts)


def measure_strengths(found: Found, parts: Parts, task: Task, lr: float, draw: int) -> None:
    """L2-SP of several strengths, from the same start and with the same rate."""
    for strength in STRENGTHS:
        model = start(task, "probe", draw)
        train(model, task, lr, draw, strength)
        measure(found, f"L2-SP {strength}", model, parts)


def gathered(per_draw: list[Found]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Numbers of all draws side by side."""
    return {
        measured: {
            part: {arm: [found[measured][part][arm] for found in per_draw] for arm in arms}
            for part, arms in parts.items()
        }
        for measured, parts in per_draw[0].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    parser.add_argument("--out", type=Path, help="a file (default: in data/results)")
    arguments = parser.parse_args()
    workers = arguments.workers or default_workers()
    out = arguments.out or data_dir() / "results" / "feature_distortion.json"
    torch.set_num_threads(1)
    recorded: dict = {
        "command": "python benchmarks/feature_distortion.py",
        "labels_per_class": LABELS_PER_CLASS, "num_steps": NUM_STEPS, "batch_size": BATCH_SIZE,
        "draws": arguments.draws, "lrs": {}, "tasks": {},
        "versions": versions(),
    }  # fmt: skip
    for task_name in TASK_ARMS:
        lrs = recorded["lrs"][task_name] = tuned_lrs(task_name, workers)
        draws = [(task_name, draw, lrs) for draw in range(arguments.draws)]
        recorded["tasks"][task_name] = gathered(list(side_by_side(_unpacked, draws, workers)))
        for part, arms in recorded["tasks"][task_name]["accuracy"].items():
            print(f"\n{task_name}, {part}\n{Comparison(arms).table()}", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


def _unpacked(arguments: tuple[str, int, dict[str, float]]) -> Found:
    return one_draw(*arguments)


if __name__ == "__main__":
    main()
