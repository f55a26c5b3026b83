"""Ten seeds trained at once, beside ten fits one after another: how much sooner are they done?

    python benchmarks/many_seeds.py [--rounds N] [--cases mlp ...]

Each case trains ten models that differ in seed, initial weights and order of the batches, on
scikit-learn's digits with batches of 32: by ``tl.fit`` in a loop ("separate") and by ``fit_many``
("together"). Both evaluate after each epoch on the same 300 digits, on one thread. The ways take
turns for ``--rounds`` rounds after a warm-up; a speed-up is the median over the rounds of (seconds
separate / seconds together), with the interval of ``timing.median_interval``.
The agreement is the largest difference of final training losses. Cases with wide convolutions,
where ``fit_many`` would fall back to ``fit``, are stacked all the same, to show why it does. Of one
more run together the parts are timed, to show what is left to gain. Writes
``data/results/many_seeds.json`` and ``benchmarks/plots/many_seeds.png``.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import matplotlib
import torch
from torch import nn

import tlcourse as tl
from tlcourse import many, stacking
from tlcourse.datasets import BatchLoader
from tlcourse.evaluation import Interval
from tlcourse.locations import data_dir
from tlcourse.many import fit_many
from tlcourse.recording import History
from tlcourse.timing import Timings, load_timings, save_timings, take_turns

SEEDS = tuple(range(10))
BATCH_SIZE, NUM_TRAIN = 32, 700
PLOT = Path(__file__).parent / "plots" / "many_seeds.png"


@dataclass(frozen=True)
class Case:
    """A model to make from the present state of torch's generator, and what it is trained on."""

    label: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of an 8 x 8 digit; or the 32 x 32 x 3 images of wild digits
    num_steps: int
    shared_loader: bool = False


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn(*widths: int) -> nn.Module:
    """Three 3 x 3 convolutions, the second and third with stride 2, each with GroupNorm."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(zip((1, *widths), widths, strict=False)):
        conv = nn.Conv2d(a, b, 3, stride=1 if i == 0 else 2, padding=1, bias=False)
        layers += [conv, nn.GroupNorm(4, b), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)
    )  # fmt: skip


def glyphnet() -> nn.Module:
    return tl.Classifier(tl.load_backbone("glyphnet"), 10)


def glyphnet_head() -> nn.Module:
    model = glyphnet()
    tl.freeze(model.backbone)
    return model


PARTS: dict[str, tuple[type, str]] = {
    "forward passes": (stacking.Stack, "logits"),
    "backward passes": (torch.Tensor, "backward"),
    "AdamW": (torch.optim.AdamW, "step"),
    "clipping": (many.Together, "clip"),
    "evaluation": (many.Together, "evaluate"),
    "batches": (stacking.Source, "next_step"),
    "records": (many.Lane, "attempt"),
}
IMAGE, SCENE = (1, 8, 8), (3, 32, 32)
CASES = {
    "mlp": Case("MLP 64-64-10", mlp, (64,), 88),
    "cnn": Case("CNN, 8-16-32 channels", lambda: cnn(8, 16, 32), IMAGE, 44),
    "wider": Case("CNN, 16-32-64 channels", lambda: cnn(16, 32, 64), IMAGE, 22),
    "head": Case("GlyphNet, head only", glyphnet_head, SCENE, 4),
    "head_shared": Case("GlyphNet, head only, same batches", glyphnet_head, SCENE, 4, True),
    "glyphnet": Case("GlyphNet", glyphnet, SCENE, 4),
}


class Data:
    """Loaders of a case; new ones for each run, so that all runs see the same batches."""

    def __init__(self, case: Case) -> None:
        self.case = case
        if case.shape == SCENE:
            task = tl.load_task("wild_digits", labels_per_class=None)
            self.train, self.val = (
                (split.inputs, split.targets) for split in (task.train, task.val)
            )
        else:
            from sklearn.datasets import load_digits

            digits = load_digits()
            inputs = torch.tensor(digits.data, dtype=torch.float32).view(-1, *case.shape) / 16
            targets = torch.tensor(digits.target)
            self.train = inputs[:NUM_TRAIN], targets[:NUM_TRAIN]
            self.val = inputs[NUM_TRAIN : NUM_TRAIN + 300], targets[NUM_TRAIN : NUM_TRAIN + 300]

    def loader(self, seed: int) -> BatchLoader:
        return BatchLoader(*self.train, BATCH_SIZE, shuffle=True, seed=seed)

    def val_loader(self) -> BatchLoader:
        return BatchLoader(*self.val, 256)

    def models(self) -> list[nn.Module]:
        models = []
        for seed in SEEDS:
            torch.manual_seed(seed)
            models.append(self.case.make())
        return models


def config(case: Case) -> tl.TrainConfig:
    return tl.TrainConfig(lr=1e-3, num_steps=case.num_steps, progress=False, precision="fp32")


def separate(data: Data) -> list[History]:
    case, histories = data.case, []
    for seed, model in zip(SEEDS, data.models(), strict=True):
        loader = data.loader(0 if case.shared_loader else seed)
        one = replace(config(case), seed=seed)
        histories.append(tl.fit(model, loader, data.val_loader(), one))
    return histories


def together(data: Data) -> list[History]:
    shared = data.case.shared_loader
    loaders = data.loader(0) if shared else [data.loader(seed) for seed in SEEDS]
    return fit_many(data.models(), loaders, data.val_loader(), config(data.case), SEEDS)


def shares(data: Data) -> dict[str, float]:
    """Of a run together, the share of time in each of ``PARTS``, "the rest" included."""
    spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    running: list[str] = []

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            running.append(part)
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                running.pop()
                if not running:  # a part within another counts as that one
                    spent[part] += time.perf_counter() - start

        return call

    with contextlib.ExitStack() as patches:
        for part, (owner, name) in PARTS.items():
            patches.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
        start = time.perf_counter()
        together(data)
        whole = time.perf_counter() - start
    found = {part: seconds / whole for part, seconds in spent.items()}
    return found | {"the rest": 1 - sum(found.values())}


def measure(case: Case, rounds: int) -> Timings:
    data = Data(case)
    pairs = zip(separate(data), together(data), strict=True)
    apart = max(abs(a.train_loss[-1] - b.train_loss[-1]) for a, b in pairs)
    ways = {"separate": lambda: separate(data), "together": lambda: together(data)}
    timings = take_turns(ways, rounds)
    runs = [shares(data) for _ in range(rounds)]
    facts = {
        "label": case.label,
        "steps": case.num_steps,
        "largest_loss_difference": apart,
        "shares": {part: median(run[part] for run in runs) for part in runs[0]},
    }
    return replace(timings, facts=facts)


def tables(path: Path) -> str:
    """The table of a result, as it stands in benchmarks/README.md."""
    lines = [
        "| networks | separate, s | together, s "
        "| speed-up, wall | speed-up, CPU | losses agree to |",
        "|---|---|---|---|---|---|",
    ]
    for case in load_timings(path).values():
        medians = [f"{case.seconds(way).mean:.2f}" for way in ("separate", "together")]
        ratios = [case.ratio("separate", "together", clock) for clock in ("wall", "cpu")]
        cells = [case.facts["label"], *medians]
        cells += [f"{r.mean:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in ratios]
        lines.append(f"| {' | '.join(cells)} | {case.facts['largest_loss_difference']:.0e} |")
    for case in list(load_timings(path).values())[:1]:
        parts = ", ".join(f"{part} {share:.0%}" for part, share in case.facts["shares"].items())
        lines += ["", f"{case.facts['label']}, time of a run together: {parts}."]
    return "\n".join(lines)


def draw(measured: dict[str, Timings], path: Path) -> None:
    """Speed-up of each case, by wall clock and by CPU time."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from tlcourse.plots import plot_intervals

    speedups: dict[str, Interval] = {}
    for timings in measured.values():
        name = timings.facts["label"]
        speedups[f"{name}, wall"] = timings.ratio("separate", "together")
        speedups[f"{name}, CPU"] = timings.ratio("separate", "together", "cpu")
    ax = plot_intervals(speedups, "times as fast together as separate", reference=1.0)
    ax.set_xscale("log")
    ax.set_xticks([0.5, 1, 2, 3, 5, 10, 20], ["0.5", "1", "2", "3", "5", "10", "20"])
    ax.minorticks_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="at least 7")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path, default=data_dir() / "results" / "many_seeds.json")
    parser.add_argument("--plot", type=Path, default=PLOT)
    options = parser.parse_args()
    stacking.WIDE = 10**9  # stack in any case
    torch.set_num_threads(1)
    measured = {}
    for name in options.cases:
        measured[name] = measure(CASES[name], options.rounds)
        print(f"{name}: measured", flush=True)
    settings = {"seeds": len(SEEDS), "batch_size": BATCH_SIZE, "rounds": options.rounds}
    save_timings(options.out, measured, "python benchmarks/many_seeds.py", **settings)
    print(tables(options.out))
    draw(measured, options.plot)


if __name__ == "__main__":
    main()
