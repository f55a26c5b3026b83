"""How much does pre-training on glyph scenes gain on wild digits, label by label?

    python benchmarks/wild_digits.py [--task TASK] [--only ARM ...] [--counts 5 10]

Each arm's learning rate is chosen on the validation split, over two extra draws of labels; five
other draws are then measured on the test split, paired across arms. The other pre-training seeds
use the rate that was chosen for the first. Writes
``data/results/TASK.json``; arms not named by ``--only`` keep what is recorded there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from tlcourse.arms import Outcome, pixels, probe, train_all
from tlcourse.backbones import load_backbone
from tlcourse.comparing import Comparison, compare
from tlcourse.config import TrainConfig
from tlcourse.datasets import Task, load_task
from tlcourse.locations import data_dir
from tlcourse.parallel import default_workers, side_by_side

COUNTS = {"wild_digits": (2, 5, 10, 20, 50), "plain_digits": (1, 5, 50)}
TUNING_DRAWS = (1_000, 1_001)
# What is tuned: peak learning rate, for a number of steps. `fit` keeps the weights of the step
# that was best on validation, so a run that should have been shorter is cut there.
SCRATCH_GRID = ((1e-3, 1500), (3e-3, 1500), (1e-2, 1500))
TRANSFER_GRID = ((3e-4, 300), (1e-3, 300))
SCRATCH_STEPS = {"plain_digits": 500}  # an easy task, learned sooner
Arm = Callable[[Task, int, tuple[float, int]], Outcome]


def config(setting: tuple[float, int], seed: int) -> TrainConfig:
    lr, num_steps = setting
    return TrainConfig(
        lr=lr, num_steps=num_steps, weight_decay=0.02, warmup_steps=20, seed=seed,
        eval_every_steps=50 if num_steps < 1000 else 150, precision="bf16",
        progress=False,
    )  # fmt: skip


def scratch(augment: bool) -> Arm:
    def arm(task: Task, seed: int, setting: tuple[float, int]) -> Outcome:
        backbone = load_backbone("glyphnet", False, seed)
        return train_all(task, backbone, config(setting, seed), augment=augment)

    return arm


def from_checkpoint(name: str, probe_first: bool) -> Arm:
    def arm(task: Task, seed: int, setting: tuple[float, int]) -> Outcome:
        return train_all(task, load_backbone(name), config(setting, seed), probe_first)

    return arm


def frozen(name: str, pretrained: bool) -> Arm:
    def arm(task: Task, seed: int, setting: tuple[float, int]) -> Outcome:
        return probe(task, load_backbone(name, pretrained, seed))

    return arm


# arm -> (function, settings to choose from)
ARMS: dict[str, tuple[Arm, tuple[tuple[float, int], ...]]] = {
    "pixels": (lambda task, seed, setting: pixels(task), ((0.0, 0),)),
    "random features": (frozen("glyphnet", False), ((0.0, 0),)),
    "scratch": (scratch(True), SCRATCH_GRID),
    "scratch, no augmentation": (scratch(False), SCRATCH_GRID),
    "probe": (frozen("glyphnet", True), ((0.0, 0),)),
    "fine-tune": (from_checkpoint("glyphnet", False), TRANSFER_GRID),
    "probe, then fine-tune": (from_checkpoint("glyphnet", True), TRANSFER_GRID),
    "probe, then fine-tune (seed 1)": (from_checkpoint("glyphnet_seed1", True), TRANSFER_GRID),
    "probe, then fine-tune (seed 2)": (from_checkpoint("glyphnet_seed2", True), TRANSFER_GRID),
}
WILD_ARMS = [name for name in ARMS if name != "scratch, no augmentation"]
PLAIN_ARMS = ["scratch, no augmentation", "scratch", "probe, then fine-tune"]


def tune(name: str, task_name: str, count: int, workers: int) -> tuple[float, int]:
    """The setting with the best mean validation accuracy on draws that are not measured."""
    arm, settings = ARMS[name]
    if name.startswith("scratch"):
        most = SCRATCH_STEPS.get(task_name, 1500)
        settings = tuple((lr, min(steps, most)) for lr, steps in settings)
    if len(settings) == 1:
        return settings[0]

    def accuracy(trial: tuple[tuple[float, int], int]) -> float:
        setting, draw = trial
        return arm(load_task(task_name, count, draw), draw, setting).val_accuracy

    trials = [(setting, draw) for setting in settings for draw in TUNING_DRAWS]
    found = list(side_by_side(accuracy, trials, workers))
    tried = {s: sum(a for t, a in zip(trials, found, strict=True) if t[0] == s) for s in settings}
    means = {setting: total / len(TUNING_DRAWS) for setting, total in tried.items()}
    print(f"{name}, {count} labels: " + ", ".join(f"{s}: {a:.3f}" for s, a in means.items()))
    return max(means, key=lambda setting: means[setting])


def choose_settings(
    names: list[str], task_name: str, count: int, workers: int, known: dict
) -> dict[str, tuple[float, int]]:
    """Settings of each arm; those of another pre-training seed are those of the first seed."""
    settings: dict[str, tuple[float, int]] = {}
    for name in names:
        first = name.partition(" (seed")[0]
        if first != name and first in settings | known:
            settings[name] = (settings | known)[first]
        else:
            settings[name] = tune(name, task_name, count, workers)
    return settings


def measure(
    names: list[str], task_name: str, count: int, draws: int, workers: int, known: dict
) -> dict:
    """Scores of each arm on each draw, with the settings that were chosen."""
    settings = choose_settings(names, task_name, count, workers, known)

    def run(name: str, seed: int) -> float:
        task = load_task(task_name, count, seed)
        return ARMS[name][0](task, seed, settings[name]).test_accuracy

    arms = {name: lambda seed, name=name: run(name, seed) for name in names}
    found = compare(arms, draws, progress=False, workers=workers)
    return {"scores": found.scores, "seconds": found.seconds, "settings": settings,
            "versions": found.versions}  # fmt: skip


def read_entry(out: Path, count: int) -> tuple[dict, dict]:
    """What the file holds, and its part about one number of labels."""
    recorded = json.loads(out.read_text("utf-8")) if out.is_file() else {"counts": {}}
    empty: dict[str, dict] = {"scores": {}, "seconds": {}, "settings": {}}
    return recorded, recorded["counts"].setdefault(str(count), empty)


def record(
    task: str, names: list[str], counts: list[int], draws: int, workers: int, out: Path
) -> None:
    """Measure the arms and put their scores into the file, count by count."""
    for count in counts:
        known = read_entry(out, count)[1]["settings"]
        found = measure(names, task, count, draws, workers, known)
        # Read again: another process may have added its arms meanwhile.
        recorded, entry = read_entry(out, count)
        for key in ("scores", "seconds", "settings"):
            entry[key] |= found[key]
        recorded["counts"] = dict(sorted(recorded["counts"].items(), key=lambda item: int(item[0])))
        recorded |= {
            "command": f"python benchmarks/wild_digits.py --task {task}",
            "task": task,
            "test_images": len(load_task(task).test),
            "versions": found["versions"],
            "threads": torch.get_num_threads(),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
        print(
            f"\n{task}, {count} labels per class\n{Comparison(entry['scores']).table()}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=list(COUNTS), help="default: both")
    parser.add_argument("--counts", type=int, nargs="+")
    parser.add_argument("--only", nargs="+", choices=list(ARMS))
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    parser.add_argument("--out", type=Path, help="a file (default: data/results/TASK.json)")
    arguments = parser.parse_args()
    workers = arguments.workers or default_workers()
    torch.set_num_threads(1)
    for task in [arguments.task] if arguments.task else COUNTS:
        names = arguments.only or (PLAIN_ARMS if task == "plain_digits" else WILD_ARMS)
        out = arguments.out or data_dir() / "results" / f"{task}.json"
        counts = arguments.counts or list(COUNTS[task])
        record(task, names, counts, arguments.draws, workers, out)


if __name__ == "__main__":
    main()
