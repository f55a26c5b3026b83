"""Peak memory and time of a step as `tl.preflight` predicts them, beside those of a real `tl.fit`.

    python benchmarks/preflight_memory.py [--out FILE]

On a CUDA GPU the measured peak is `torch.cuda.max_memory_allocated` over a run of three steps, and
a step is timed over ten more. On a CPU each case has a process of its own, and the measured peak is
the growth of its resident memory (VmHWM, Linux) from before the model was made, after a small run
of the same model; malloc is told to give freed blocks back (MALLOC_MMAP_THRESHOLD_), so that
resident memory is memory in use. Models have random weights where they are not embedded. Writes
`data/results/preflight_memory.json`, on a GPU `preflight_memory_gpu.json`, and prints a table.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tlcourse as tl
from tlcourse.config import Optimizer, Precision, TrainConfig
from tlcourse.locations import data_dir
from tlcourse.lora import LoRAConfig, add_lora
from tlcourse.preflight import preflight
from tlcourse.train import fit

NUM_CLASSES, NUM_STEPS, TIMED_STEPS = 10, 3, 10
UNCOMPILED: dict[str, Any] = (
    {"compile": False} if "compile" in {f.name for f in fields(TrainConfig)} else {}
)
# Blocks of 64 KiB and more are mapped one by one, and unmapped when freed.
SHARP_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


@dataclass(frozen=True)
class Case:
    """A model, what is trained of it, and how."""

    model: str
    trained: str  # "all", "head" or "lora"
    optimizer: Optimizer
    precision: Precision
    batch_sizes: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.model}, {self.trained}, {self.optimizer}, {self.precision}"


ON_GPU = (
    Case("mlp", "all", "adamw", "fp32", (1024, 8192)),
    Case("mlp", "all", "sgd", "bf16", (1024, 8192)),
    Case("glyphnet", "all", "adamw", "bf16", (1024, 4096)),
    Case("glyphnet", "head", "adamw", "fp32", (2048, 8192)),
    Case("bert", "all", "adamw", "bf16", (16, 64)),
    Case("bert", "all", "sgd", "fp32", (16, 64)),
    Case("bert", "lora", "adamw", "bf16", (16, 64)),
    Case("bert", "head", "adamw", "bf16", (64, 256)),
    Case("resnet50", "all", "adamw", "fp32", (16, 64)),
    Case("resnet50", "all", "sgd", "bf16", (32, 128)),
    Case("vit_b_16", "all", "adamw", "bf16", (16, 64)),
    Case("vit_b_16", "all", "sgd", "fp32", (16, 64)),
)
ON_CPU = (
    Case("mlp", "all", "adamw", "fp32", (256, 2048)),
    Case("mlp", "all", "sgd", "fp32", (256, 2048)),
    Case("glyphnet", "all", "adamw", "fp32", (512, 2048)),
    Case("glyphnet", "head", "adamw", "fp32", (1024, 4096)),
    Case("minilm", "all", "adamw", "fp32", (8, 48)),
    Case("minilm", "lora", "adamw", "fp32", (8, 48)),
    Case("minilm", "head", "sgd", "fp32", (64, 192)),
    Case("resnet50", "all", "sgd", "fp32", (2, 6)),
    Case("vit_b_16", "all", "adamw", "fp32", (2, 6)),
)


def build(case: Case) -> nn.Module:
    """The model on the CPU, with what the case trains."""
    torch.manual_seed(0)
    model: Any
    if case.model == "mlp":
        hidden = [nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU()]
        model = nn.Sequential(*hidden, nn.Linear(4096, NUM_CLASSES))
    elif case.model == "bert":
        from transformers import BertConfig, BertForSequenceClassification

        model = BertForSequenceClassification(BertConfig(num_labels=NUM_CLASSES))
    else:
        pretrained = case.model in ("glyphnet", "minilm")
        model = tl.Classifier(tl.load_backbone(case.model, pretrained), NUM_CLASSES)
    if case.trained == "lora":
        head = "classifier" if case.model == "bert" else "head"
        add_lora(model, LoRAConfig(modules_to_save=(head,)))
    elif case.trained == "head":
        tl.freeze(model.backbone if hasattr(model, "backbone") else model.bert)
    return model


def batch_of(case: Case, batch_size: int) -> tuple[Any, Tensor]:
    """Random inputs and targets, on the CPU."""
    targets = torch.randint(NUM_CLASSES, (batch_size,))
    if case.model in ("bert", "minilm"):
        ids = torch.randint(1000, 20000, (batch_size, 128))
        mask = torch.ones_like(ids)
        mask[::2, 100:] = 0  # some padding, so that the mask is used
        return {"input_ids": ids, "attention_mask": mask}, targets
    if case.model == "mlp":
        return torch.randn(batch_size, 1024), targets
    side = 32 if case.model == "glyphnet" else 224
    return torch.randn(batch_size, 3, side, side), targets


def config_of(case: Case, num_steps: int = NUM_STEPS) -> TrainConfig:
    return TrainConfig(
        lr=1e-5, num_steps=num_steps, optimizer=case.optimizer, precision=case.precision,
        progress=False, **UNCOMPILED,
    )  # fmt: skip


def predicted(case: Case, model: nn.Module, batch: Any) -> dict[str, Any]:
    """What ``preflight`` says of the device that is here, with all parts of the sum."""
    found = preflight(model, config_of(case), example=batch)
    plan = found.planned
    return {
        "case": case.name, "batch_size": len(batch[1]), "device": found.device.name,
        "predicted_bytes": plan.peak_bytes, "at_peak": plan.at_peak, "whole": plan.whole,
        "predicted_seconds": plan.step_seconds,
    }  # fmt: skip


def measure_on_gpu(case: Case) -> list[dict[str, Any]]:
    """Both batch sizes of a case in this process."""
    model, rows = build(case).cuda(), []
    for size in case.batch_sizes:
        batch = batch_of(case, size)
        gc.collect()
        torch.cuda.synchronize()
        _clear_workspaces()
        torch.cuda.empty_cache()
        # Like for like: a model that a fit has left is at its place, and nothing else is.
        row = predicted(case, model, batch) | {"before_bytes": torch.cuda.memory_allocated()}
        torch.cuda.reset_peak_memory_stats()
        fit(model, [batch] * NUM_STEPS, None, config_of(case))
        row["measured_bytes"] = torch.cuda.max_memory_allocated()
        row["reserved_bytes"] = torch.cuda.max_memory_reserved()
        timed = fit(model, [batch] * TIMED_STEPS, None, config_of(case, TIMED_STEPS))
        row["measured_seconds"] = timed.seconds / TIMED_STEPS
        rows.append(row)
    return rows


def _clear_workspaces() -> None:
    """Take the workspaces of cuBLAS away that an earlier case has left."""
    clear: Callable[[], None] | None = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()


def measure_on_cpu(case: Case, batch_size: int) -> dict[str, Any]:
    """In a fresh process with ``SHARP_MALLOC``: peak of the resident memory of a run."""
    torch.set_num_threads(1)
    small = build(case)
    row = predicted(case, small, batch_of(case, batch_size))
    fit(small, [batch_of(case, 2)], None, config_of(case, 1))  # libraries load, kernels are made
    del small
    _settle()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    # A copy: the weights of a checkpoint are mapped from its file until something writes them.
    model, batch = copy.deepcopy(build(case)), batch_of(case, batch_size)
    _settle()
    history = fit(model, [batch] * NUM_STEPS, None, config_of(case))
    row["measured_bytes"] = _resident("VmHWM") - before
    return row | {"before_bytes": before, "measured_seconds": history.seconds / NUM_STEPS}


def _settle() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def in_fresh_process(index: int, batch_size: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", str(index), str(batch_size)]
    environment = os.environ | SHARP_MALLOC
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-500:])
    return json.loads(done.stdout.splitlines()[-1])


def measure_all() -> list[dict[str, Any]]:
    """All cases of the device that is here; a case that fails is a row with its error."""
    on_gpu = torch.cuda.is_available()
    rows: list[dict[str, Any]] = []
    for index, case in enumerate(ON_GPU if on_gpu else ON_CPU):
        try:
            if on_gpu:
                found = measure_on_gpu(case)
            else:
                found = [in_fresh_process(index, size) for size in case.batch_sizes]
        except Exception as error:
            found = [{"case": case.name, "error": f"{type(error).__name__}: {error}"[-800:]}]
        rows += found
        for row in found:
            print(_line(row), flush=True)
    return rows


def tables(path: str | Path) -> str:
    """Markdown: predicted and measured peak and seconds of each case in a results file."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    rows = content["rows"]
    lines = [
        "| case | batch | predicted, MB | measured, MB | ratio | predicted, ms | measured, ms |",
        "|---|---|---|---|---|---|---|",
        *map(_line, rows),
    ]
    good = [row for row in rows if "error" not in row and abs(_ratio(row) - 1) <= 0.15]
    lines += ["", f"{len(good)} of {len(rows)} within 15 %. {content['where']}."]
    return "\n".join(lines)


def _ratio(row: dict[str, Any]) -> float:
    return row["predicted_bytes"] / row["measured_bytes"]


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {row['case']} | | | {' '.join(row['error'].split())} | | | |"
    low, high = (1e3 * seconds for seconds in row["predicted_seconds"])
    cells = [
        row["case"], row["batch_size"], f"{row['predicted_bytes'] / 1e6:,.0f}",
        f"{row['measured_bytes'] / 1e6:,.0f}", f"{_ratio(row):.2f}", f"{low:,.1f} to {high:,.1f}",
        f"{1e3 * row['measured_seconds']:,.1f}",
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _where() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return f"{device or platform.machine()}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    name = "preflight_memory_gpu" if torch.cuda.is_available() else "preflight_memory"
    parser.add_argument("--out", type=Path, default=data_dir() / "results" / f"{name}.json")
    parser.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        index, batch_size = options.one
        print(json.dumps(measure_on_cpu(ON_CPU[index], batch_size)))
        return
    rows = measure_all()
    cases = [asdict(case) for case in (ON_GPU if torch.cuda.is_available() else ON_CPU)]
    content = {
        "rows": rows, "where": _where(), "command": "python benchmarks/preflight_memory.py",
        "settings": {"num_steps": NUM_STEPS, "timed_steps": TIMED_STEPS, "cases": cases},
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(tables(options.out), flush=True)


if __name__ == "__main__":
    main()
