"""Full fine-tuning of ViT-B/16 and ResNet-50 on a GPU: how many images a second?

    python benchmarks/gpu_vision.py [--out FILE]

Random weights (speed does not depend on them), 256 images of 224 x 224 that lie on the GPU, bf16
autocast, AdamW, cosine schedule, gradients clipped to norm 1. Ways, with the same start, batch and
settings: a loop written by hand around ``torch.compile``; ``tl.fit`` compiled and eager; Hugging
Face's Trainer with ``bf16=True`` and all else at its defaults, and (ViT alone) tuned by
``torch_compile`` and without logging; Lightning, as it comes. The loader reads the clock before
steps 2 and 8 (of 0 to 8), and waits for the GPU both times, so that neither compiling nor starting
counts. After a call of all ways that is not counted come 7 rounds, in turns.

"Share of the peak" is counted operations (forward and backward of convolutions, products and
attention) over time and over 989 TFLOPS, the datasheet's dense bf16 rate of an H100 or H200. The
product of two 8192 x 8192 matrices shows what the machine reaches at best.

Writes ``data/results/gpu_vision.json`` and a plot.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tlcourse as tl
from tlcourse.inference import device_of
from tlcourse.locations import data_dir, repo_root
from tlcourse.plots import plot_intervals
from tlcourse.recording import lr_factor
from tlcourse.timing import Clocked, Timings, load_timings, median_interval, save_timings
from tlcourse.train import fast_convolutions, make_optimizer

PEAK_TFLOPS, ROUNDS = 989.0, 7
WARM_UP, STEPS, LR, WEIGHT_DECAY, NUM_CLASSES = 2, 9, 1e-4, 0.05, 100
NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
MODELS = {"ViT-B/16": "vit_b_16", "ResNet-50": "resnet50"}


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def settings(**changes: Any) -> Any:
    return tl.TrainConfig(
        lr=LR, weight_decay=WEIGHT_DECAY, num_epochs=1, progress=False, **changes
    )  # bf16 on this GPU by itself


def by_hand(model: nn.Module, loader: Clocked) -> None:
    """The raw compiled loop."""
    optimizer = make_optimizer(model, settings())
    parameters, device = list(model.parameters()), device_of(model).type
    forward = torch.compile(model)
    model.train()
    with fast_convolutions(model):
        for step, (inputs, targets) in enumerate(loader):
            for group in optimizer.param_groups:
                group["lr"] = LR * lr_factor(step, STEPS, 0, "cosine")
            with torch.autocast(device, torch.bfloat16):
                logits = forward(inputs)
            loss = F.cross_entropy(logits.float(), targets)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()


def fitted(compile: bool) -> Callable[[nn.Module, Clocked], Any]:
    return lambda model, loader: tl.fit(model, loader, None, settings(compile=compile))


class WithLoss(nn.Module):
    """What transformers' Trainer takes: named inputs, and the loss among the outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(pixel_values)
        return {"loss": F.cross_entropy(logits.float(), labels), "logits": logits}


def huggingface(tuned: bool) -> Callable[[nn.Module, Clocked], Any]:
    def way(model: nn.Module, loader: Clocked) -> None:
        from transformers import Trainer, TrainingArguments

        class OnOurBatches(Trainer):
            def get_train_dataloader(self) -> Any:
                return loader

        extra = {"torch_compile": True, "logging_strategy": "no"} if tuned else {}
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, bf16=True, learning_rate=LR, weight_decay=WEIGHT_DECAY, max_steps=STEPS,
                lr_scheduler_type="cosine", report_to="none", save_strategy="no",
                disable_tqdm=tuned, **extra,
            )  # fmt: skip
            trainer = OnOurBatches(WithLoss(model), arguments)
            inputs, targets = loader.batch
            loader.batch = {"pixel_values": inputs, "labels": targets}
            trainer.train()

    return way


def lightning(model: nn.Module, loader: Clocked) -> None:
    import pytorch_lightning as pl

    os.environ[NVML_CHECK] = "1"  # as the import leaves it

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]).float(), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = make_optimizer(self.model, settings())
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: lr_factor(step, STEPS, 0, "cosine")
            )
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            precision="bf16-mixed", max_steps=STEPS, gradient_clip_val=1.0, logger=False,
            default_root_dir=folder, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(Module(), loader)


WAYS: dict[str, Callable[[nn.Module, Clocked], Any]] = {
    "raw compiled loop": by_hand,
    "tl.fit, compiled": fitted(True),
    "tl.fit, eager": fitted(False),
    "Trainer": huggingface(tuned=False),
    "Trainer, compiled": huggingface(tuned=True),
    "Lightning": lightning,
}


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    with torch.no_grad(), torch.autocast(inputs.device.type, torch.bfloat16):
        return float(F.cross_entropy(model(inputs).float(), targets))


def operations(model: nn.Module, image: Tensor) -> float:
    """Floating-point operations of forward and backward pass for one image, a product as 2."""
    counter = FlopCounterMode(display=False)
    with counter:
        model(image).sum().backward()
    model.zero_grad()
    return float(counter.get_total_flops())


def measure(name: str, batch_size: int, size: int, device: torch.device) -> Timings:
    """All ways on one model; a way that fails is left out, with its reason."""
    torch.manual_seed(0)
    model = tl.Classifier(tl.load_backbone(name, pretrained=False), NUM_CLASSES).to(device)
    start = copy.deepcopy(model.state_dict())
    inputs = torch.randn(batch_size, 3, size, size, device=device)
    targets = torch.randint(NUM_CLASSES, (batch_size,), device=device)
    facts: dict[str, Any] = {"batch_size": batch_size, "loss": {}, "first_call_s": {}}
    facts["gflop_per_image"] = round(operations(model, inputs[:1]) / 1e9, 2)
    ways = [way for way in WAYS if not (way == "Trainer, compiled" and name == "resnet50")]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(ROUNDS + 1):
        for way in list(seconds):
            model.load_state_dict(start)
            model.to(device)  # Lightning leaves it on the CPU
            # What the Trainer and ``import lightning`` change for all that runs after them.
            torch.set_float32_matmul_precision("highest")
            os.environ.pop(NVML_CHECK, None)
            loader, begin = Clocked([(inputs, targets)], STEPS, WARM_UP), time.perf_counter()
            try:
                WAYS[way](model, loader)
                facts["loss"][way] = loss_of(model.to(device).train(), inputs, targets)
            except Exception as error:
                print(f"{way}: left out, {type(error).__name__}: {str(error)[:300]}", flush=True)
                del seconds[way]
                continue
            if turn == 0:
                facts["first_call_s"][way] = round(time.perf_counter() - begin, 1)
                print(f"{name}, {way}: {facts['first_call_s'][way]} s at first", flush=True)
            else:
                seconds[way].append(loader.seconds)
    return Timings(seconds, seconds, facts)


def matrix_product(device: torch.device) -> list[float]:
    """TFLOPS of a large bf16 product, 7 times."""
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    reached = []
    for _ in range(ROUNDS + 1):
        synchronise()
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        synchronise()
        reached.append(10 * 2 * size**3 / (time.perf_counter() - start) / 1e12)
    return reached[1:]


def tables(path: Path) -> str:
    """The tables of a result, as they stand in benchmarks/README.md."""
    lines, cases = [], load_timings(path)
    for name, case in cases.items():
        if name not in MODELS:
            continue
        raw, facts = "raw compiled loop", case.facts
        lines += [
            f"| {name} | images a second | share of the peak | time / {raw} | loss after |",
            "|---|---|---|---|---|",
        ]
        for way in case.wall:
            rate = facts["batch_size"] / case.seconds(way).mean
            share = rate * facts["gflop_per_image"] / 1e3 / PEAK_TFLOPS
            ratio = case.ratio(way, raw)
            cells = [way, f"{rate:,.0f}", f"{share:.1%}"]
            cells += [f"{ratio.mean:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"]
            cells += [f"{facts['loss'][way]:.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    reached = median_interval(next(iter(cases.values())).facts["matrix_tflops"])
    lines.append(
        f"A product of two 8192 x 8192 matrices in bf16: {reached.mean:.0f} TFLOPS, "
        f"{reached.mean / PEAK_TFLOPS:.0%} of the peak."
    )
    return "\n".join(lines)


def plot(path: Path, target: Path) -> None:
    rows = {}
    for name, case in load_timings(path).items():
        for way in case.wall:
            values = [case.facts["batch_size"] / s for s in case.wall[way]]
            rows[f"{name}, {way}"] = median_interval(values)
    ax = plot_intervals(rows, xlabel="images a second")
    target.parent.mkdir(parents=True, exist_ok=True)
    ax.figure.savefig(target, dpi=120, bbox_inches="tight")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=data_dir() / "results" / "gpu_vision.json")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, to see that it runs")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    if not (options.tiny or torch.cuda.is_available()):
        print("gpu_vision: nothing measured, no CUDA GPU here")
        return
    if importlib.util.find_spec("pytorch_lightning") is None:
        WAYS.pop("Lightning")
    device = torch.device("cpu" if options.tiny else "cuda")
    product, cases = matrix_product(device), {}
    for name, backbone in MODELS.items():
        batch_size, size = (2, 224) if options.tiny else (256, 224)
        cases[name] = measure(backbone, batch_size, size, device)
        cases[name].facts["matrix_tflops"] = product
        save_timings(options.out, cases, "python benchmarks/gpu_vision.py", peak=PEAK_TFLOPS)
    print(tables(options.out), flush=True)
    plot(options.out, (repo_root() or Path()) / "benchmarks" / "plots" / "gpu_vision.png")


if __name__ == "__main__":
    main()
