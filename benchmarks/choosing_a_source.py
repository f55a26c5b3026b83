"""What each pre-training source is worth on a target, and a source that is worth less than none.

    python benchmarks/choosing_a_source.py [--only outcomes harm] [--starts NAME ...] [--workers N]

``outcomes``: wild digits. Ten starts for the same network, fine-tuned for the same 200 steps, and
a linear probe on each. ``harm``: plain digits. The start that learned random labels against random
weights, with parts of it new, shrunk or rescaled. Learning rates are chosen on the validation
split, for each start by itself, over two extra draws of labels; other draws, paired across the
starts, are then measured on the test split. ``fixed_rate``: plain digits again, and one small
rate for all.
Writes ``data/results/choosing_a_source.json``; what is not asked for keeps what is recorded there.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tlcourse.arms import probe, train_all
from tlcourse.backbones import Backbone, GlyphNet, load_backbone
from tlcourse.comparing import Comparison, versions
from tlcourse.config import TrainConfig
from tlcourse.datasets import load_task
from tlcourse.locations import data_dir
from tlcourse.parallel import default_workers, side_by_side

NUM_STEPS, BATCH_SIZE, RATES = 200, 32, (1e-3, 3e-3)
TUNING_DRAWS = (1_000, 1_001)
FRESH = "random init"
SOURCES = (
    "glyphs", "fonts", "bare_glyphs", "inverted", "quarter_turns", "fractals", "shapes",
    "random_labels",
)  # fmt: skip
STARTS = (*SOURCES, FRESH, "glyphnet")  # the last: glyphs with 12,000 steps instead of 2,500
NEW_TOP, ONLY_TOP, SHRUNK, RESCALED = (
    f"random_labels, {change}"
    for change in (
        "last stage new", "all but last stage new", "shrunk and perturbed", "weights rescaled",
    )
)  # fmt: skip
REMEDIES = (NEW_TOP, ONLY_TOP, SHRUNK, RESCALED)
# part -> (task, labels per class, draws, starts); the same rate for all in "fixed_rate"
PARTS = {
    "outcomes": [("wild_digits", 5, 5, STARTS), ("wild_digits", 50, 5, (*STARTS, NEW_TOP))],
    "harm": [
        ("plain_digits", 1, 10, (FRESH, "random_labels", "glyphs", *REMEDIES)),
        ("plain_digits", 5, 5, (FRESH, "random_labels", NEW_TOP)),
    ],
    "fixed_rate": [("plain_digits", 5, 10, (FRESH, "random_labels", *REMEDIES))],
}
FIXED_RATE = 1e-3


@dataclass(frozen=True)
class Run:
    """One fine-tuning, or one probe (``lr`` is 0)."""

    start: str
    task: str
    labels: int
    draw: int
    lr: float = 0.0


def make_start(name: str, seed: int) -> Backbone:
    """A backbone as a checkpoint left it, or with parts of it changed.

    Args:
        name: of a checkpoint, ``FRESH``, or one of ``REMEDIES``.
        seed: of random weights.
    """
    fresh = load_backbone("glyphnet", pretrained=False, seed=seed)
    if name == FRESH:
        return fresh
    source, _, change = name.partition(", ")
    backbone = load_backbone(source)
    if change:
        body, new = backbone.body, fresh.body
        assert isinstance(body, GlyphNet) and isinstance(new, GlyphNet)
        _change(body, new, name)
    return backbone


@torch.no_grad()
def _change(body: GlyphNet, fresh: GlyphNet, name: str) -> None:
    """Replace, shrink or rescale the weights of ``body`` in place."""
    if name == NEW_TOP:
        body.stages[2].load_state_dict(fresh.stages[2].state_dict())
    elif name == ONLY_TOP:
        kept = {key: value for key, value in body.state_dict().items() if "stages.2" in key}
        kept = {key: value.clone() for key, value in kept.items()}
        body.load_state_dict(fresh.state_dict() | kept)
    elif name == SHRUNK:  # Ash and Adams 2020, section 4, arXiv:1910.08475
        for old, new in zip(body.parameters(), fresh.parameters(), strict=True):
            old.mul_(0.4).add_(new, alpha=0.6)
    elif name == RESCALED:
        # A norm layer follows each convolution: its scale changes no output, only how far one
        # step of the optimizer turns it.
        for old, new in zip(body.parameters(), fresh.parameters(), strict=True):
            if old.ndim == 4:
                old.mul_(new.norm() / old.norm())
    else:
        raise ValueError(f"unknown start {name!r}; choose one of {STARTS + REMEDIES}")


def perform(run: Run) -> tuple[float, float]:
    """Accuracy on the validation and on the test split."""
    task = load_task(run.task, run.labels, run.draw)
    backbone = make_start(run.start, run.draw)
    if run.lr == 0:
        outcome = probe(task, backbone)
    else:
        config = TrainConfig(
            lr=run.lr, num_steps=NUM_STEPS, warmup_steps=20, weight_decay=0.02, seed=run.draw,
            eval_every_steps=50, precision="bf16", progress=False,
        )  # fmt: skip
        outcome = train_all(task, backbone, config, batch_size=BATCH_SIZE)
    return outcome.val_accuracy, outcome.test_accuracy


def choose_rates(task: str, labels: int, starts: list[str], workers: int) -> dict[str, float]:
    """For each start the rate with the best mean validation accuracy on the tuning draws."""
    runs = [Run(s, task, labels, draw, lr) for s in starts for lr in RATES for draw in TUNING_DRAWS]
    found = dict(zip(runs, side_by_side(perform, runs, workers), strict=True))
    rates = {}
    for start in starts:
        means = {
            lr: sum(found[Run(start, task, labels, draw, lr)][0] for draw in TUNING_DRAWS)
            for lr in RATES
        }
        rates[start] = max(means, key=means.__getitem__)
        tried = ", ".join(f"{lr}: {v / len(TUNING_DRAWS):.3f}" for lr, v in means.items())
        print(f"{task}, {labels} labels, {start}: {tried}", flush=True)
    return rates


def measure(
    task: str, labels: int, draws: int, starts: list[str], workers: int, tune: bool
) -> dict[str, Any]:
    """Test accuracies of each start on each draw: fine-tuned at its rate, and probed."""
    rates = dict.fromkeys(starts, FIXED_RATE)
    if tune:
        rates = choose_rates(task, labels, starts, workers)
    result: dict[str, Any] = {"lr": rates}
    for method in ("fine-tune", "probe"):
        runs = [
            Run(s, task, labels, draw, rates[s] if method == "fine-tune" else 0.0)
            for draw in range(draws)
            for s in starts
        ]
        scores: dict[str, list[float]] = {start: [] for start in starts}
        for run, (_, on_test) in zip(runs, side_by_side(perform, runs, workers), strict=True):
            scores[run.start].append(on_test)
        result[method] = scores
    return result


def merge(out: Path, part: str, task: str, labels: int, found: dict[str, Any]) -> None:
    """Put what was found into the file; starts that were not measured stay."""
    content = json.loads(out.read_text("utf-8")) if out.is_file() else {}
    entry = content.setdefault(part, {}).setdefault(str(labels), {})
    for key, values in found.items():
        entry.setdefault(key, {}).update(values)
    content |= {
        "command": "python benchmarks/choosing_a_source.py",
        "settings": {
            "num_steps": NUM_STEPS, "batch_size": BATCH_SIZE, "rates": RATES,
            "fixed_rate": FIXED_RATE,
            "tuning_draws": TUNING_DRAWS,
            "tasks": {name: jobs[0][0] for name, jobs in PARTS.items()},
        },
        "versions": versions(),
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"\n{task}, {labels} labels per class\n{Comparison(entry['fine-tune'])}\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--starts", nargs="+", choices=[*STARTS, *REMEDIES], help="default: all")
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    parser.add_argument("--out", type=Path, help="default: data/results/choosing_a_source.json")
    arguments = parser.parse_args()
    workers = arguments.workers or default_workers()
    torch.set_num_threads(1)
    out = arguments.out or data_dir() / "results" / "choosing_a_source.json"
    for part in arguments.only:
        for task, labels, draws, starts in PARTS[part]:
            wanted = [s for s in starts if arguments.starts is None or s in arguments.starts]
            if wanted:
                tune = part != "fixed_rate"
                found = measure(task, labels, draws, wanted, workers, tune)
                merge(out, part, task, labels, found)


if __name__ == "__main__":
    main()
