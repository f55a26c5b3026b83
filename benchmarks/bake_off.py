"""All methods of part 3 under one budget: accuracy, trained numbers, memory, time per step.

    python benchmarks/bake_off.py [--workers N] [--tasks TASK ...] [--only PART ...] [--out FILE]

Two tasks: documentation routing with MiniLM, and wild digits with the course's GlyphNet. Every
method starts from the pre-trained backbone with a head from logistic regression on its features,
has the same batches, steps and rate of the head, and three rates of its own to choose from. That
rate is chosen by the mean accuracy on the validation split over three extra draws of labels; other
draws, paired across the methods, are then measured on the test split. "linear head" is that start,
without any step.

Memory is counted in bytes from the tensors of one step: weights, gradients, state (the moments of
AdamW, and the scores of AdaLoRA), and what autograd keeps. It is checked against the peak of
resident memory, each method in a process of its own. Time is CPU time of one step, the median of
steps that take turns with those of the other methods. With a GPU, wall time of a step and peak of
its memory there are measured, too; accuracy is always measured on the CPU.

Every single result is appended to the ``--resume`` file at once, with the machine that gave it:
stopped and started again, the benchmark goes on where it was, with as many workers as you like,
and parts may be measured on different machines (``--tasks``, ``--only``). Once all is done that
file is renamed. Writes ``data/results/bake_off.json``.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import tlcourse as tl
from tlcourse.adapters import (
    BottleneckConfig,
    IA3Config,
    add_bottlenecks,
    add_ia3,
    train_biases,
    train_last_layers,
)
from tlcourse.comparing import Comparison
from tlcourse.evaluation import mean_interval
from tlcourse.freezing import count_parameters
from tlcourse.locations import data_dir, repo_root
from tlcourse.parallel import default_workers, side_by_side
from tlcourse.prompts import PrefixTuning, PromptTuning
from tlcourse.text import load_text_task
from tlcourse.timing import where
from tlcourse.train import make_optimizer
from tlcourse.training_memory import num_bytes, saved_for_backward

DRAWS, TUNING_DRAWS, HEAD_LR, HEAD_C = 5, (1_000, 1_001, 1_002), 1e-3, 0.01
RANK, ALPHA, HIGH_RANK = 8, 16.0, 32
INIT_RANK, ORTHOGONAL = 12, 0.5  # AdaLoRA: starts at 12, ends at RANK on average
BOTTLENECK, VIRTUAL_TOKENS = 8, 10
ROUNDS, STEPS_OF_A_ROUND, RSS_REPEATS = 5, 10, 3


@dataclass(frozen=True)
class Setting:
    """One task and its budget."""

    backbone: str
    labels: int
    batch_size: int
    steps: int
    warmup: int
    precision: str
    targets: tuple[str, ...]  # layers that LoRA and its relatives go beside
    rates: dict[str, tuple[float, ...]]  # method -> rates of the body to choose from


HEAD, LAST, BITFIT, IA3, BOTTLENECKS = (
    "linear head", "last block", "BitFit", "(IA)3", "bottleneck adapters",
)  # fmt: skip
LORA, RSLORA, DORA, ADALORA = "LoRA", "rsLoRA", "DoRA", "AdaLoRA"
PROMPT, PREFIX, FULL = "prompt tuning", "prefix tuning", "full fine-tuning"
SMALL_RATES, LOW_RATES = (1e-4, 3e-4, 1e-3), (3e-4, 1e-3, 3e-3)
MIDDLE_RATES, HIGH_RATES = (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2)

SETTINGS = {
    "text": Setting(
        "minilm", 16, 16, 30, 3, "bf16", ("query", "value"),
        {
            HEAD: (), LAST: SMALL_RATES, BITFIT: LOW_RATES, IA3: HIGH_RATES,
            BOTTLENECKS: LOW_RATES, LORA: SMALL_RATES, RSLORA: SMALL_RATES, DORA: SMALL_RATES,
            ADALORA: HIGH_RATES, PROMPT: HIGH_RATES, PREFIX: HIGH_RATES, FULL: (3e-5, 1e-4, 3e-4),
        },
    ),
    "vision": Setting(
        "glyphnet", 10, 25, 160, 10, "fp32", ("conv1", "conv2"),
        {
            HEAD: (), LAST: LOW_RATES, BITFIT: HIGH_RATES, IA3: HIGH_RATES,
            LORA: HIGH_RATES, RSLORA: MIDDLE_RATES, DORA: MIDDLE_RATES, ADALORA: HIGH_RATES,
            FULL: MIDDLE_RATES,
        },
    ),
}  # fmt: skip
DOES_NOT_APPLY = {
    "vision": {
        BOTTLENECKS: "made for linear layers, here and in peft; GlyphNet has none",
        PROMPT: "a convolutional network has no tokens to put a prompt before",
        PREFIX: "a convolutional network has no attention to give keys and values to",
    }
}


PARTS = ("memory", "accuracy", "time", "rss", "gpu")


@dataclass(frozen=True)
class Run:
    """One result to be made."""

    part: str  # one of PARTS
    task: str
    method: str
    draw: int = 0
    lr: float = 0.0


# --- the methods -----------------------------------------------------------------------------


def adapt(model: nn.Module, method: str, setting: Setting) -> nn.Module:
    """Prepare a classifier for a method: what is not trained is frozen."""
    if method == FULL:
        return model
    if method == HEAD:
        return train_last_layers(model, 0)
    if method == LAST:
        return train_last_layers(model, 1)
    if method == BITFIT:
        return train_biases(model)
    if method == BOTTLENECKS:
        return add_bottlenecks(model, BottleneckConfig(bottleneck_dim=BOTTLENECK))
    if method in (PROMPT, PREFIX):
        return add_virtual_tokens(model, method)
    if method == IA3 and setting.backbone == "minilm":
        feedforward = tuple(f"layer.{n}.output.dense" for n in range(6))
        names = ("key", "value", *feedforward)
        return add_ia3(model, IA3Config(target_modules=names, feedforward_modules=feedforward))
    return with_peft(model, method, setting)


def add_virtual_tokens(model: Any, method: str) -> nn.Module:
    tl.freeze(model.backbone)
    body = model.backbone.body
    if method == PROMPT:  # real text keeps the positions that it had in pre-training
        model.backbone.body = PromptTuning(body, VIRTUAL_TOKENS, "vocabulary", False)
    else:
        model.backbone.body = PrefixTuning(body, VIRTUAL_TOKENS, shift_positions=False)
    return model


def with_peft(model: nn.Module, method: str, setting: Setting) -> nn.Module:
    names: dict[str, Any] = {
        "target_modules": list(setting.targets),
        "modules_to_save": ["head"],
    }
    if method == IA3:
        return peft.get_peft_model(model, peft.IA3Config(**names, feedforward_modules=[]))
    if method == ADALORA:
        config = peft.AdaLoraConfig(
            **names, init_r=INIT_RANK, target_r=RANK, lora_alpha=int(ALPHA / RANK * INIT_RANK),
            total_step=setting.steps, tinit=setting.steps // 6, tfinal=setting.steps // 3,
        )  # fmt: skip
    else:
        config = peft.LoraConfig(
            **names, r=HIGH_RANK if method == RSLORA else RANK, lora_alpha=int(ALPHA),
            use_rslora=method == RSLORA, use_dora=method == DORA,
        )  # fmt: skip
    return peft.get_peft_model(model, config)


def orthogonality(model: nn.Module) -> Tensor:
    """AdaLoRA's penalty, Zhang et al. 2023, equation 4.

    peft adds it only to an output that has a ``loss``; a classifier that gives logits must add
    it itself.
    """
    distances = []
    for name, x in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = x @ x.T if "lora_A" in name else x.T @ x
            distances.append((gram - torch.eye(len(gram), device=x.device)).norm())
    return ORTHOGONAL * torch.stack(distances).mean()


@contextmanager
def allocating(model: Any, method: str) -> Iterator[None]:
    """Let AdaLoRA share out its budget after each step of any optimizer; others need nothing."""
    if method != ADALORA:
        yield
        return
    steps = 0

    def after_step(*_: Any) -> None:
        nonlocal steps
        steps += 1
        model.base_model.update_and_allocate(steps)  # gradients are still there

    handle = register_optimizer_step_post_hook(after_step)
    try:
        yield
    finally:
        handle.remove()


def build(task: Any, setting: Setting, method: str, seed: int) -> nn.Module:
    """Backbone without dropout, with what the method adds, and a head that is still random."""
    torch.manual_seed(seed)
    model = tl.Classifier(tl.load_backbone(setting.backbone), task.num_classes)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with warnings.catch_warnings():
        # peft looks for a ``config`` of transformers, which a plain module does not have.
        warnings.filterwarnings("ignore", category=UserWarning, module="peft")
        return adapt(model, method, setting)


def plain(model: Any) -> Any:
    """The classifier inside the wrapper of peft."""
    return model.base_model.model if isinstance(model, peft.PeftModel) else model


def head_of(model: Any) -> nn.Linear:
    head = plain(model).head
    return getattr(head, "modules_to_save", {"default": head})["default"]


def loaders_of(name: str, task: Any, model: Any, seed: int, plainly: bool = False) -> Any:
    setting = SETTINGS[name]
    if name == "text":
        return task.loaders(plain(model).backbone.preprocess, setting.batch_size, seed)
    return task.loaders(setting.batch_size, augment=not plainly, seed=seed)


def load(name: str, draw: int) -> Any:
    labels = SETTINGS[name].labels
    if name == "text":
        return load_text_task("doc_routing", labels, draw)
    return tl.load_task("wild_digits", labels, draw)


# --- accuracy --------------------------------------------------------------------------------


def accuracy(run: Run) -> dict[str, Any]:
    """Accuracy on validation (tuning draws) or test (the others)."""
    setting, task = SETTINGS[run.task], load(run.task, run.draw)
    model = build(task, setting, run.method, run.draw)
    with torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "bf16"):
        train = loaders_of(run.task, task, model, run.draw, plainly=True).train
        known = tl.extract_features(plain(model).backbone, train)
    tl.linear_probe(known, known, c_grid=(HEAD_C,)).copy_to(head_of(model))
    loaders = loaders_of(run.task, task, model, run.draw)
    start, losses = time.process_time(), []
    if run.method != HEAD:
        config = tl.TrainConfig(
            lr=run.lr, head_lr=HEAD_LR, num_steps=setting.steps, warmup_steps=setting.warmup,
            precision=setting.precision, progress=False, seed=run.draw,  # type: ignore[arg-type]
            **({"penalty": orthogonality} if run.method == ADALORA else {}),
        )  # fmt: skip
        with allocating(model, run.method):
            losses = tl.fit(model, loaders.train, None, config).train_loss
    seconds = time.process_time() - start
    with torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "bf16"):
        part = loaders.val if run.draw in TUNING_DRAWS else loaders.test
        found = {"accuracy": tl.evaluate(model, part).accuracy}
    found["train_loss"] = round(float(np.mean(losses[-5:])), 4) if losses else None
    return found | {"cpu_seconds": round(seconds, 1), "saved": numbers_to_save(model)}


def numbers_to_save(model: Any) -> int:
    """Trained numbers that a file for this task must hold."""
    pattern = getattr(getattr(model, "active_peft_config", None), "rank_pattern", None)
    if not pattern:
        return count_parameters(model).trainable
    sizes = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            sizes[name] = parameter.numel()
    for name, kept in pattern.items():
        layer = model.base_model.model.get_submodule(name.partition(".lora_E")[0])
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        sizes[name] = sum(kept) * (A.shape[1] + 1 + B.shape[0])
    return sum(sizes.values())


# --- memory and time ---------------------------------------------------------------------------


def on_device(batch: tuple[Any, Tensor], device: torch.device) -> tuple[Any, Tensor]:
    inputs, targets = batch
    if isinstance(inputs, dict):
        return {k: v.to(device) for k, v in inputs.items()}, targets.to(device)
    return inputs.to(device), targets.to(device)


def fixed_batch(name: str, task: Any, model: Any) -> tuple[Any, Tensor]:
    """The longest texts of the training split; any images."""
    batches = list(loaders_of(name, task, model, 0, plainly=True).train)
    if name == "text":
        return max(batches, key=lambda batch: batch[0]["input_ids"].numel())
    return batches[0]


class Stepper:
    """A method on one fixed batch, one step at a time."""

    def __init__(self, name: str, method: str, device: torch.device) -> None:
        task = load(name, 0)
        self.model: Any = build(task, SETTINGS[name], method, 0).to(device).train()
        self.batch = on_device(fixed_batch(name, task, self.model), device)
        self.config = tl.TrainConfig(lr=1e-5, num_steps=1_000, precision="fp32")
        self.optimizer = make_optimizer(self.model, self.config)
        self.method, self.steps = method, SETTINGS[name].steps
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.penalty: Callable[[Any], Any] = orthogonality if method == ADALORA else lambda _: 0.0

    def loss(self) -> Tensor:
        inputs, targets = self.batch
        logits = self.model(**inputs) if isinstance(inputs, dict) else self.model(inputs)
        return F.cross_entropy(logits, targets) + self.penalty(self.model)

    def finish(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        if self.method == ADALORA:  # always a step in which the budget is shared out
            self.model.base_model.update_and_allocate(self.steps // 3)

    def __call__(self) -> None:
        self.finish(self.loss())
        self.optimizer.zero_grad(set_to_none=True)


def counted(name: str, method: str) -> dict[str, int]:
    """Bytes by kind, from the tensors of one step in float32."""
    step = Stepper(name, method, torch.device("cpu"))
    activations, loss = saved_for_backward(step.model, step.loss)
    step.finish(loss)
    states = list(step.optimizer.state.values())
    if method == ADALORA:  # three running numbers for each trained one, to judge importance
        judge = step.model.base_model.rankallocator
        states += [judge.ipt, judge.exp_avg_ipt, judge.exp_avg_unc]
    return {
        "weights": num_bytes(step.model.parameters()),
        "gradients": num_bytes(p.grad for p in step.trained if p.grad is not None),
        "state": num_bytes(x for s in states for x in s.values() if x.ndim > 0),
        "activations": activations,
        "trainable": count_parameters(step.model).trainable,
        "total": count_parameters(step.model).total,
    }


def peak(name: str, method: str) -> dict[str, float]:
    """Growth of resident memory by a model and two steps, in this fresh process, in bytes."""
    # Once small, so that libraries are loaded before the count begins.
    nn.Linear(4, 4)(torch.zeros(2, 4)).sum().backward()
    load(name, 0), tl.load_backbone(SETTINGS[name].backbone)
    before = resident()[0]
    step = Stepper(name, method, torch.device("cpu"))
    step()
    step()
    return {"peak": resident()[1] - before}


def resident() -> tuple[int, int]:
    """Resident memory now and at its peak, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        size *= 1 if sys.platform == "darwin" else 1024
        return size, size
    fields = dict(line.split(":", 1) for line in lines)
    now, most = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


def in_own_process(run: Run) -> dict[str, float]:
    command = [sys.executable, __file__, "--peak", run.task, run.method]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def step_times(name: str) -> dict[str, float]:
    """Median CPU seconds of a step of each method; the methods take turns."""
    cpu = torch.device("cpu")
    steppers = {method: Stepper(name, method, cpu) for method in SETTINGS[name].rates}
    return take_turns(name, steppers, time.process_time)


def gpu_round(name: str) -> dict[str, dict[str, float]]:
    """Median wall seconds of a step on the GPU, and the peak of its memory there in bytes."""
    steppers, peaks = {}, {}
    for method in SETTINGS[name].rates:
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        steppers[method] = step = Stepper(name, method, torch.device("cuda"))
        step()
        step()
        peaks[method] = torch.cuda.max_memory_allocated() - before

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    seconds = take_turns(name, steppers, clock)
    return {method: {"seconds": seconds[method], "peak": peaks[method]} for method in steppers}


def take_turns(
    name: str, steppers: dict[str, Stepper], clock: Callable[[], float]
) -> dict[str, float]:
    """Median of ``STEPS_OF_A_ROUND`` steps of each method."""
    times: dict[str, list[float]] = {method: [] for method in steppers}
    precision = torch.bfloat16 if SETTINGS[name].precision == "bf16" else torch.float32
    for turn in range(STEPS_OF_A_ROUND + 2):  # the first two are not counted
        for method, step in steppers.items():
            start = clock()
            kind = step.trained[0].device.type
            with torch.autocast(kind, precision, enabled=precision != torch.float32):
                step()
            if turn >= 2:
                times[method].append(clock() - start)
    return {method: float(np.median(values)) for method, values in times.items()}


# --- everything --------------------------------------------------------------------------------


def perform(run: Run) -> dict[str, Any]:
    if run.part == "accuracy":
        return accuracy(run)
    if run.part == "memory":
        return counted(run.task, run.method)
    if run.part == "rss":
        return in_own_process(run)
    return gpu_round(run.task) if run.part == "gpu" else step_times(run.task)


class Notebook:
    """Results by run, in a file to which every worker appends a line at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, dict[str, Any]] = {}
        if path.is_file() and not path.read_bytes().endswith(b"\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")  # what was cut short must not spoil the next line
        for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
            try:
                key, result = json.loads(line)
            except ValueError:  # cut short when it was stopped
                continue
            self.found[key] = result

    def all_of(self, runs: list[Run], workers: int) -> list[dict[str, Any]]:
        left = [run for run in runs if key_of(run) not in self.found]
        noted = side_by_side(Noted(self.path, where()), left, workers)
        for run, result in zip(left, noted, strict=True):
            self.found[key_of(run)] = result
            shown = result.get("accuracy", result.get("peak", ""))
            print(run.part, run.task, run.method, run.draw, f"{run.lr:g}", shown, flush=True)
        return [self.found[key_of(run)] for run in runs]


@dataclass(frozen=True)
class Noted:
    """``perform``, and a line in the file."""

    path: Path
    where: str

    def __call__(self, run: Run) -> dict[str, Any]:
        result = perform(run) | {"where": self.where}
        line = json.dumps([key_of(run), result]) + "\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)
        return result


def key_of(run: Run) -> str:
    """Names the run and everything that was set; other settings are other runs."""
    rates = {name: {**vars(s), "rates": None} for name, s in SETTINGS.items()}
    known = [rates[run.task], HEAD_LR, HEAD_C, RANK, ALPHA, HIGH_RANK, INIT_RANK, ORTHOGONAL]
    known += [BOTTLENECK, VIRTUAL_TOKENS, STEPS_OF_A_ROUND]
    sign = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:8]
    return f"{run.part}|{run.task}|{run.method}|{run.draw}|{run.lr:g}|{sign}"


def measure(name: str, notebook: Notebook, workers: int, parts: Iterable[str]) -> None:
    """Make what is missing of these parts of a task."""
    for part in parts:
        if part == "accuracy":
            notebook.all_of(trials_of(name), workers)
            notebook.all_of(runs_of(name, choose_all(tune(name, notebook))), workers)
        elif part != "gpu" or torch.cuda.is_available():
            notebook.all_of(others_of(part, name), 1)


def trials_of(name: str) -> list[Run]:
    grids = SETTINGS[name].rates
    return [
        Run("accuracy", name, m, draw, lr)
        for m, rates in grids.items()
        for lr in rates
        for draw in TUNING_DRAWS
    ]


def runs_of(name: str, rates: dict[str, float]) -> list[Run]:
    methods = SETTINGS[name].rates
    return [
        Run("accuracy", name, m, draw, rates.get(m, 0.0)) for draw in range(DRAWS) for m in methods
    ]


def others_of(part: str, name: str) -> list[Run]:
    methods = SETTINGS[name].rates
    if part == "memory":
        return [Run(part, name, method) for method in methods]
    if part == "rss":
        # The growth by GlyphNet, a few MB, is less than what libraries add by chance.
        repeats = RSS_REPEATS if name == "text" else 0
        return [Run(part, name, method, n) for n in range(repeats) for method in methods]
    return [Run(part, name, "all", n) for n in range(ROUNDS)]


def tune(name: str, notebook: Notebook) -> dict[str, dict[str, list[float]]]:
    """Accuracies on validation, one for each tuning draw, by method and rate."""
    tuning: dict[str, dict[str, list[float]]] = {}
    for run in trials_of(name):
        found = notebook.found[key_of(run)]["accuracy"]
        tuning.setdefault(run.method, {}).setdefault(f"{run.lr:g}", []).append(found)
    return tuning


def choose_all(tuning: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """The rate of each method, by the mean over the draws."""
    means = {m: {lr: float(np.mean(x)) for lr, x in rates.items()} for m, rates in tuning.items()}
    return {method: choose(by_rate) for method, by_rate in means.items()}


def summary(name: str, notebook: Notebook) -> dict[str, Any]:
    """Everything about one task."""
    setting, methods = SETTINGS[name], list(SETTINGS[name].rates)
    tuning = tune(name, notebook)
    chosen = choose_all(tuning)
    runs = {"accuracy": runs_of(name, chosen)}
    runs |= {part: others_of(part, name) for part in PARTS if part != "accuracy"}
    runs["gpu"] = [run for run in runs["gpu"] if key_of(run) in notebook.found]  # none without one
    found = {part: [notebook.found[key_of(run)] for run in runs[part]] for part in PARTS}

    def by_method(part: str, field: str) -> dict[str, list]:
        rows = zip(runs[part], found[part], strict=True)
        pairs = [(run.method, row[field]) for run, row in rows]
        return {m: [value for method, value in pairs if method == m] for m in methods}

    counts = dict(zip(methods, found["memory"], strict=True))
    kinds = ("weights", "gradients", "state", "activations")
    return {
        "scores": by_method("accuracy", "accuracy"),
        "train_loss": by_method("accuracy", "train_loss"),
        "lr": chosen,
        "tuning": tuning,
        "trainable": {m: counts[m]["trainable"] for m in methods},
        "total": {m: counts[m]["total"] for m in methods},
        "saved": by_method("accuracy", "saved"),
        "bytes": {m: {kind: counts[m][kind] for kind in kinds} for m in methods},
        "peak_growth_bytes": by_method("rss", "peak"),
        "step_seconds": {m: [row[m] for row in found["time"]] for m in methods},
        "gpu_step_seconds": {m: [row[m]["seconds"] for row in found["gpu"]] for m in methods},
        "gpu_peak_bytes": {m: [row[m]["peak"] for row in found["gpu"]] for m in methods},
        "where": {part: sorted({row["where"] for row in found[part]}) for part in PARTS},
        "does_not_apply": DOES_NOT_APPLY.get(name, {}),
        "settings": {k: v for k, v in vars(setting).items() if k != "rates"},
    }


def markdown(found: dict[str, Any]) -> str:
    """The table of one task, as it stands in ``benchmarks/README.md``."""
    comparison = Comparison(found["scores"])
    heads = ["method", "test accuracy", "minus full fine-tuning", "trained", "MB of a step"]
    heads += ["step / full, CPU"]
    with_gpu = any(found["gpu_step_seconds"].values())
    heads += ["step / full, GPU", "peak MB, GPU"] if with_gpu else []
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for m in found["scores"]:
        gap = "" if m == FULL else f"{comparison.difference(m, FULL)}"
        megabytes = sum(found["bytes"][m].values()) / 1e6
        row = [m, f"{comparison.interval(m)}", gap, f"{found['trainable'][m]:,}"]
        row += [f"{megabytes:.1f}", ratio(found["step_seconds"], m)]
        if with_gpu:
            peak_megabytes = np.median(found["gpu_peak_bytes"][m]) / 1e6
            row += [ratio(found["gpu_step_seconds"], m), f"{peak_megabytes:.1f}"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def ratio(seconds: dict[str, list[float]], method: str) -> str:
    """Time of a step over that of full fine-tuning, paired by round."""
    interval = mean_interval(np.divide(seconds[method], seconds[FULL]))
    return f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def choose(by_rate: dict[str, float]) -> float:
    rates = sorted(by_rate, key=float)
    best = [rate for rate in rates if by_rate[rate] == max(by_rate.values())]
    return float(rates[1] if rates[1] in best else best[0])


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    artifacts = (repo_root() or Path()) / "artifacts"
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    parser.add_argument("--tasks", nargs="+", choices=list(SETTINGS), help="measure these and stop")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="measure these parts and stop")
    parser.add_argument("--out", type=Path, default=data_dir() / "results" / "bake_off.json")
    parser.add_argument("--resume", type=Path, default=artifacts / "bake_off.jsonl")
    parser.add_argument("--peak", nargs=2, metavar=("TASK", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args(None if arguments is None else list(arguments))
    torch.set_num_threads(1)
    if options.peak:
        print(json.dumps(peak(*options.peak)))
        return

    notebook, workers = Notebook(options.resume), options.workers or default_workers()
    for name in options.tasks or SETTINGS:
        measure(name, notebook, workers, options.only or PARTS)
    if options.tasks or options.only:
        return
    tasks = {name: summary(name, notebook) for name in SETTINGS}
    content = {
        "command": "python benchmarks/bake_off.py",
        "settings": {
            "draws": DRAWS, "tuning_draws": len(TUNING_DRAWS), "head_lr": HEAD_LR,
            "head_C": HEAD_C, "rank": RANK, "alpha": ALPHA,
            "rank_of_rslora": HIGH_RANK, "adalora": [INIT_RANK, RANK],
            "bottleneck": BOTTLENECK, "virtual_tokens": VIRTUAL_TOKENS, "rounds": ROUNDS,
            "steps_of_a_round": STEPS_OF_A_ROUND, "peak_repeats": RSS_REPEATS,
        },
        "tasks": tasks,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for found in tasks.values():
        print(markdown(found), flush=True)
    options.resume.rename(options.resume.with_suffix(".done.jsonl"))


if __name__ == "__main__":
    main()
