"""Which layers transfer? Copy the first n layers, freeze them or not, train the rest.

    python benchmarks/layer_transfer.py [--draws 0 2 4] [--workers W]

Yosinski et al. 2014, section 2, arXiv:1411.1792, in small: the target B is wild digits, 50 labels
per class; the source A is near (glyph scenes) or far (textured shapes), with the same budget of
pre-training. Draws with an even number use the first pre-training seed, odd ones the second.
The learning rate of each arm is chosen on the validation split of one extra draw; six other draws
are then measured on the test split, all arms on the same labels, the same new weights and the same
batches. Writes ``data/results/layer_transfer.json``; with ``--draws`` the rates and the other
draws recorded there are kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import tlcourse as tl
from tlcourse.comparing import versions
from tlcourse.layers import LayerFeatures
from tlcourse.locations import data_dir
from tlcourse.parallel import default_workers
from tlcourse.transferability import cka

LABELS, STEPS, WARMUP, BATCH = 50, 300, 75, 32
DONOR_STEPS, DONOR_LR = 900, 1e-3  # the network on B whose layers the selfer nets take
DRAWS, TUNING_DRAW = range(6), 1_000
LAYERS = ("stem", "stages.0", "stages.1", "stages.2")  # of GlyphNet; the head comes on top
NEAR = ("glyphs", "glyphs_seed1")
FAR = ("shapes", "shapes_seed1")
RATES, HEAD_RATES = (1e-3, 3e-3), (3e-3, 1e-2, 3e-2)
# arm -> what happens to the copied layers. "self" copies from the donor that was trained on B.
FROZEN = ("near", "far", "self", "random")
TUNED = ("near+", "far+", "self+")


def fresh(seed: int, num_classes: int = 10) -> tl.Classifier:
    """A network with new weights; one seed gives the same weights in every arm."""
    torch.manual_seed(seed)
    return tl.Classifier(tl.load_backbone("glyphnet", False, seed), num_classes)


def transplant(model: tl.Classifier, donor: nn.Module, n: int, frozen: bool) -> tl.Classifier:
    """Put the donor body's first n layers into ``model``; freeze them if asked to."""
    for name in LAYERS[:n]:
        layer = model.backbone.body.get_submodule(name)
        layer.load_state_dict(donor.get_submodule(name).state_dict())
        if frozen:
            tl.freeze(layer)
    return model


def train(model: tl.Classifier, task: tl.datasets.Task, lr: float, steps: int, seed: int) -> None:
    """The last weights stay: nothing is chosen in the run."""
    config = tl.TrainConfig(
        lr=lr, num_steps=steps, warmup_steps=WARMUP, weight_decay=0.02, precision="bf16",
        progress=False, seed=seed,
    )  # fmt: skip
    tl.fit(model, task.loaders(BATCH, augment=True, seed=seed).train, None, config)


def train_donor(draw: int) -> tl.Classifier:
    """The network on B itself; other new weights and another order than the arms of the draw."""
    model = fresh(20_000 + draw)
    task = tl.load_task("wild_digits", LABELS, draw)
    train(model, task, DONOR_LR, DONOR_STEPS, 20_000 + draw)
    return model


def build(arm: str, n: int, draw: int, donor: tl.Classifier) -> tl.Classifier:
    """The network of one arm before training."""
    kind, seed = arm.rstrip("+"), draw % 2
    model = fresh(draw)
    if kind == "base":
        return model
    donors = {
        "near": lambda: tl.load_backbone(NEAR[seed]).body,
        "far": lambda: tl.load_backbone(FAR[seed]).body,
        "self": lambda: donor.backbone.body,
        "random": lambda: copy.deepcopy(model.backbone.body),
    }
    return transplant(model, donors[kind](), n, frozen=not arm.endswith("+"))


def tuning_trials() -> list[tuple[str, int, float]]:
    """(arm, n, rate): n = 2 stands for the lower cuts, n = 4 (head only, if frozen) for itself."""
    trials = [("base", 0, lr) for lr in RATES]
    for arm in (*FROZEN, *TUNED):
        trials += [(arm, 2, lr) for lr in RATES]
        trials += [(arm, 4, lr) for lr in (HEAD_RATES if arm in FROZEN else RATES)]
    return trials


def try_rate(donor: tl.Classifier, trial: tuple[str, int, float]) -> float:
    """Validation accuracy on the extra draw."""
    arm, n, lr = trial
    task = tl.load_task("wild_digits", LABELS, TUNING_DRAW)
    model = build(arm, n, TUNING_DRAW, donor)
    train(model, task, lr, STEPS, TUNING_DRAW)
    return tl.evaluate(model, task.loaders().val).accuracy


def choose_rates(workers: int) -> dict[str, dict[str, float]]:
    """arm -> n -> rate, and what was tried."""
    trials = tuning_trials()
    donor = train_donor(TUNING_DRAW)
    accuracies = list(tl.side_by_side(partial(try_rate, donor), trials, workers))
    found = dict(zip(trials, accuracies, strict=True))
    for trial, accuracy in found.items():
        print(f"tuning {trial}: {accuracy:.3f}", flush=True)
    rates: dict[str, dict[str, float]] = {}
    for arm, n in dict.fromkeys((arm, n) for arm, n, _ in trials):
        tried = {lr: a for (other, m, lr), a in found.items() if (other, m) == (arm, n)}
        best = max(tried, key=lambda lr: tried[lr])
        last = 4 if n == 4 else 3 if arm in FROZEN else 2
        for cut in {0: (0,), 2: range(1, last + 1), 4: (4,) if arm in FROZEN else (3, 4)}[n]:
            rates.setdefault(arm, {})[str(cut)] = best
    return rates


def activations(body: nn.Module, name: str, images: torch.Tensor) -> np.ndarray:
    """All numbers of a layer's map, one row for each image."""
    with torch.no_grad():
        return LayerFeatures(body, name, "flatten")(images).numpy()


def movement(before: nn.Module, after: nn.Module, images: torch.Tensor) -> dict[str, list[float]]:
    """How far each layer went: debiased CKA (mean over blocks of 200), and relative distance."""
    moved: dict[str, list[float]] = {"cka": [], "distance": []}
    for name in LAYERS:
        similar = [
            cka(activations(before, name, block), activations(after, name, block))
            for block in images.split(200)
        ]
        old, new = (
            nn.utils.parameters_to_vector(body.get_submodule(name).parameters()).detach()
            for body in (before, after)
        )
        moved["cka"].append(float(np.mean(similar)))
        moved["distance"].append(float((new - old).norm() / old.norm()))
    return moved


def measure_draw(rates: dict[str, dict[str, float]], draw: int) -> dict:
    """Every arm at every n on one draw of labels: test accuracies."""
    start = time.process_time()
    task = tl.load_task("wild_digits", LABELS, draw)
    images = tl.load_task("wild_digits", None).train.inputs[:400]  # no test image
    test = task.loaders().test
    donor = train_donor(draw).eval()
    scores = {"donor": {"4": tl.evaluate(donor, test).accuracy}}
    moved = {}
    for arm, by_cut in rates.items():
        for cut, lr in by_cut.items():
            model = build(arm, int(cut), draw, donor)
            before = copy.deepcopy(model.backbone.body)
            train(model, task, lr, STEPS, draw)
            scores.setdefault(arm, {})[cut] = tl.evaluate(model, test).accuracy
            if arm in TUNED and cut == "4":
                moved[arm] = movement(before, model.eval().backbone.body, images)
    return {"scores": scores, "moved": moved, "cpu_seconds": time.process_time() - start}


def save(out: Path, rates: dict, draws: dict[str, dict]) -> None:
    content = {
        "command": "python benchmarks/layer_transfer.py",
        "versions": versions(),
        "settings": {
            "labels_per_class": LABELS, "num_steps": STEPS, "warmup_steps": WARMUP,
            "batch_size": BATCH, "donor_steps": DONOR_STEPS, "donor_lr": DONOR_LR, "rates": rates,
            "near": NEAR, "far": FAR, "layers": LAYERS,
        },
        "draws": dict(sorted(draws.items(), key=lambda item: int(item[0]))),
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, nargs="+", help="add these to what is recorded")
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    parser.add_argument("--out", type=Path, default=data_dir() / "results" / "layer_transfer.json")
    arguments = parser.parse_args()
    workers = arguments.workers or default_workers()
    torch.set_num_threads(1)
    kept = {}
    if arguments.draws and arguments.out.is_file():
        kept = json.loads(arguments.out.read_text("utf-8"))
    rates = kept["settings"]["rates"] if kept else choose_rates(workers)
    draws, wanted = kept.get("draws", {}), arguments.draws or list(DRAWS)
    save(arguments.out, rates, draws)
    measured = tl.side_by_side(partial(measure_draw, rates), wanted, workers)
    for draw, found in zip(wanted, measured, strict=True):
        draws[str(draw)] = found
        save(arguments.out, rates, draws)
        print(f"draw {draw}: {found['cpu_seconds']:.0f} CPU-seconds, {found['scores']}", flush=True)


if __name__ == "__main__":
    main()
