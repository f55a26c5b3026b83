"""Does ``compile="auto"`` choose well, and what would the other choice have cost?

    python benchmarks/auto_compile.py [--out FILE]

For each network a fresh process with an empty compiler cache measures the parts: an eager step, a
compiled step, and what compiling takes at first. From them come the times of 50 and of 2,000 steps
for ``compile=False``, ``compile=True`` and ``"auto"`` (on a GPU: 10 eager steps, then what
``tlcourse.compiling.worth_compiling`` says; on a CPU: never). The runs of 2,000 steps are computed,
not run. A step is that of ``tl.fit``: 30 steps less 10, over 20. 7 rounds.

On a CPU: an MLP and the course's GlyphNet, 32 images of 32 x 32. On a GPU besides: GlyphNet with
256 images, ResNet-50 and ViT-B/16 with 256 images of 224 x 224 in bf16 (3 rounds).

Writes ``data/results/auto_compile.json`` (on a GPU ``auto_compile_gpu.json``) and a plot.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import tlcourse as tl
from tlcourse.compiling import TIMED_STEPS, WARM_UP_STEPS, worth_compiling
from tlcourse.locations import data_dir, repo_root
from tlcourse.timing import where

LENGTHS, SHORT, LONG, NUM_CLASSES = (50, 2_000), 10, 30, 10
CASES = {  # name -> (batch size, side of the images, device)
    "MLP": (32, 32, "cpu"),
    "GlyphNet": (32, 32, "cpu"),
    "GlyphNet, GPU": (256, 32, "cuda"),
    "ResNet-50, GPU": (256, 224, "cuda"),
    "ViT-B/16, GPU": (256, 224, "cuda"),
}
BACKBONES = {"GlyphNet": "glyphnet", "ResNet-50": "resnet50", "ViT-B/16": "vit_b_16"}


def build(case: str) -> nn.Module:
    torch.manual_seed(0)
    if case == "MLP":
        hidden = nn.Linear(3 * 32 * 32, 64)
        return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(64, NUM_CLASSES))
    name = BACKBONES[case.removesuffix(", GPU")]
    return tl.Classifier(tl.load_backbone(name, pretrained=False), NUM_CLASSES)


def parts(case: str) -> dict[str, float]:
    """Seconds: an eager step, a compiled step, compiling; measured in this process."""
    torch.set_num_threads(1)
    batch_size, size, device = CASES[case]
    model = build(case).to(device)
    inputs = torch.randn(batch_size, 3, size, size, device=device)
    targets = torch.randint(NUM_CLASSES, (batch_size,), device=device)

    def seconds(steps: int, compile: bool) -> float:
        config = tl.TrainConfig(num_steps=steps, compile=compile, progress=False)
        return tl.fit(model, [(inputs, targets)], None, config).seconds

    seconds(SHORT, False)  # the first kernels, and cuDNN's trials
    eager = (seconds(LONG, False) - seconds(SHORT, False)) / (LONG - SHORT)
    cold = seconds(SHORT, True)
    short = seconds(SHORT, True)
    compiled = (seconds(LONG, True) - short) / (LONG - SHORT)
    steps_left = LENGTHS[1] - WARM_UP_STEPS - TIMED_STEPS
    chosen = device == "cuda" and worth_compiling(model, eager, steps_left)
    return {"eager": eager, "compiled": compiled, "compiling": cold - short, "chosen": chosen}


def in_a_fresh_process(case: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
        command = [sys.executable, __file__, "--case", case]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def times(measured: dict[str, float], steps: int) -> dict[str, float]:
    """Seconds of a run with each setting of ``compile``."""
    eager, compiled = (measured[name] * steps for name in ("eager", "compiled"))
    compiled += measured["compiling"]
    tried = (WARM_UP_STEPS + TIMED_STEPS) * (measured["eager"] - measured["compiled"])
    chosen = measured["chosen"] and steps == LENGTHS[1]
    return {"False": eager, "True": compiled, "auto": compiled + tried if chosen else eager}


def tables(path: Path) -> str:
    """The table of a result, as it stands in benchmarks/README.md."""
    content = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "| network | eager step, ms | compiled step, ms | compiling, s "
        "| steps | False, s | True, s | auto, s | auto / better |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, rounds in content["cases"].items():
        measured = {key: float(np.median([r[key] for r in rounds])) for key in rounds[0]}
        for steps in LENGTHS:
            each = [times(r, steps) for r in rounds]
            ratios = [t["auto"] / min(t["False"], t["True"]) for t in each]
            cells = [case, f"{measured['eager'] * 1e3:.2f}", f"{measured['compiled'] * 1e3:.2f}"]
            cells += [f"{measured['compiling']:.1f}", f"{steps:,}"]
            cells += [
                f"{np.median([t[way] for t in each]):.1f}" for way in ("False", "True", "auto")
            ]
            cells += [f"{np.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(path: Path, target: Path) -> None:
    import matplotlib.pyplot as plt

    from tlcourse.plots import palette, style

    content = json.loads(path.read_text(encoding="utf-8"))
    names = [f"{case}, {steps:,} steps" for case in content["cases"] for steps in LENGTHS]
    found = [
        {
            way: np.median([times(r, steps)[way] for r in rounds])
            for way in ("False", "True", "auto")
        }
        for rounds in content["cases"].values()
        for steps in LENGTHS
    ]
    with style():
        _, ax = plt.subplots(figsize=(6.4, 1 + 0.6 * len(names)))
        for number, way in enumerate(("False", "True", "auto")):
            rows = [row + 0.25 * (number - 1) for row in range(len(names))]
            ax.barh(
                rows, [t[way] for t in found], 0.22, color=palette[number], label=f"compile={way}"
            )
        ax.set(xlabel="seconds of a run", xscale="log")
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
        target.parent.mkdir(parents=True, exist_ok=True)
        ax.figure.savefig(target, dpi=120, bbox_inches="tight")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case is not None:
        print(json.dumps(parts(options.case)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = "auto_compile_gpu" if device == "cuda" else "auto_compile"
    out = options.out or data_dir() / "results" / f"{name}.json"
    cases: dict[str, Any] = {case: [] for case in CASES if CASES[case][2] == device}
    for number in range(options.rounds or (3 if device == "cuda" else 7)):
        for case in cases:
            cases[case].append(in_a_fresh_process(case))
            print(f"round {number}, {case}: {cases[case][-1]}", flush=True)
    content = {"command": "python benchmarks/auto_compile.py", "where": where(), "cases": cases}
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(tables(out))
    plot(out, (repo_root() or Path()) / "benchmarks" / "plots" / f"{name}.png")


if __name__ == "__main__":
    main()
