"""A first transfer result in under half a minute: ``tlcourse first``."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

LABELS_PER_CLASS = 5


def main(argv: list[str] | None = None) -> int:
    """Compare three ways to learn from 50 labelled images; print a table and draw a plot."""
    parser = argparse.ArgumentParser(prog="tlcourse first", description=__doc__)
    parser.add_argument("--steps", type=int, default=150, help="of the scratch arm (default 150)")
    parser.add_argument(
        "--out", type=Path, help="the picture (default artifacts/first_transfer.png)"
    )
    arguments = parser.parse_args(argv)
    os.environ.setdefault("MPLBACKEND", "Agg")
    start = time.perf_counter()
    print(f"A first transfer: 797 digits to read, {10 * LABELS_PER_CLASS} labelled to learn from.")
    outcomes = run(arguments.steps)
    print("\n| method | accuracy | 95 % interval |\n|---|---|---|")
    for name, interval in outcomes.items():
        print(f"| {name} | {interval.mean:.2f} | [{interval.low:.2f}, {interval.high:.2f}] |")
    path = draw(outcomes, arguments.out or default_path())
    print(
        f"\nOne draw of the labels; the interval is over the test images. Lesson 01 has five draws"
        f"\nand a scratch arm that is tuned. Picture: {path} ({time.perf_counter() - start:.0f} s)"
    )
    return 0


def run(scratch_steps: int) -> dict:
    """Test accuracy of each method on one draw, as an interval over the test images."""
    from tlcourse.arms import pixels, train_all
    from tlcourse.backbones import load_backbone
    from tlcourse.config import TrainConfig
    from tlcourse.datasets import load_task
    from tlcourse.evaluation import wilson_interval
    from tlcourse.runtime import set_seed

    set_seed(0)
    task = load_task("wild_digits", LABELS_PER_CLASS, seed=0)
    slow = TrainConfig(
        lr=3e-3,
        num_steps=scratch_steps,
        warmup_steps=min(10, scratch_steps // 10),
        eval_every_steps=50,
    )
    fast = TrainConfig(lr=1e-3, num_steps=max(1, scratch_steps // 2), eval_every_steps=50)
    methods = {
        "logistic regression on pixels": lambda: pixels(task),
        "network from scratch": lambda: train_all(task, load_backbone("glyphnet", False), slow),
        "pre-trained network, fine-tuned": lambda: train_all(
            task, load_backbone("glyphnet"), fast, probe_first=True
        ),
    }
    outcomes = {}
    for name, method in methods.items():
        print(f"  {name} ...", end=" ", flush=True)
        outcome = method()
        print(f"{outcome.test_accuracy:.2f} ({outcome.seconds:.0f} s)", flush=True)
        seen = len(task.test)
        outcomes[name] = wilson_interval(round(outcome.test_accuracy * seen), seen)
    return outcomes


def draw(outcomes: dict, path: Path) -> Path:
    """Write the picture of the intervals; returns its path."""
    from tlcourse.plots import plot_intervals, subplots

    figure, ax = subplots(figsize=(7.0, 2.6))
    plot_intervals(outcomes, xlabel="accuracy on 797 test images", ax=ax)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return path


def default_path() -> Path:
    """``artifacts/first_transfer.png`` in a checkout, relative to where we are if possible."""
    from tlcourse.locations import cache_dir, repo_root

    root = repo_root()
    path = (root / "artifacts" if root else cache_dir()) / "first_transfer.png"
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
