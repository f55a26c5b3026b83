"""What a training loop costs beyond the work: ``tl.fit``, a loop written by hand, other libraries.

    python benchmarks/loop_overhead.py [--cases NAME ...] [--steps N] [--rounds N] [--out FILE]

Every way trains a copy of the same model on the same batches in the same order, in float32 on one
CPU thread: torch's AdamW without weight decay, half a cosine, gradients clipped to norm 1, no
validation. The loss of the last step must agree to 1e-5, else nothing is written. A turn takes in
what a call of ``fit`` or ``train`` takes in, with making the optimizer and a copy of the model
(as long in every way), but no import. All dropout is 0, as each library draws at other moments.

* By hand: shuffled tensors, cut once in each pass; losses stay tensors and are read at the end.
  AdamW with ``fused=True``, as in ``tl.fit``; and once more as torch gives it.
* As it comes: a ``DataLoader`` over a data set of single examples, torch's AdamW as it is (for the
  Trainer its own default, which is the fused one), and the library's own defaults: the Trainer and
  Lightning save checkpoints, Lightning logs for TensorBoard, fastai and skorch keep averages and
  print. What they print goes to a file that nobody reads.
* Tuned: batches from the course's loader, fused AdamW, and all of this switched off (Lightning: its
  ``barebones=True``, made for such measurements). accelerate wraps model and optimizer alone.

One thing must not leak from one way into another: ``import lightning`` sets an environment variable
that makes torch look for NVIDIA's driver in each step of an optimizer, .2 ms where there is none.
It is set for Lightning as it comes, and for nothing else.

Peers that are not installed are left out with a line: ``pip install accelerate lightning fastai
skorch``. fastai 2.8 needs ``fastprogress<1.1`` (later ones import fasthtml). "Slope" of the MLP is
a long run minus a short one over the steps between: the cost of a step without that of a start.
Writes ``data/results/loop_overhead.json`` and ``benchmarks/plots/loop_overhead.png``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import itertools
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

import tlcourse as tl
from tlcourse.datasets import BatchLoader
from tlcourse.evaluation import Interval
from tlcourse.figures import BLACK, markers, palette, subplots
from tlcourse.inference import Inputs
from tlcourse.locations import data_dir, repo_root
from tlcourse.text import TokenLoader, pad
from tlcourse.timing import Timings, load_timings, save_timings, take_turns

STEPS = {"MLP": 1000, "CNN": 100, "MiniLM": 4}
SHORT = 0.2  # of the steps: the short run that is subtracted for the slope
SLOPE = "MLP, slope"
FIT, HAND, PLAIN = "tl.fit", "by hand", "by hand, AdamW not fused"
PEERS = ("transformers", "lightning", "accelerate", "fastai", "skorch")
TOLERANCE = 1e-5
NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
Batch = tuple[Inputs, Tensor]


class Case:
    """A model, its data and the length of the run; what all ways share.

    Args:
        model: every way trains a copy.
        examples: inputs of each example: a tensor, shape (N, ...), or token ids of each text.
        targets: long tensor, shape (N,).
        batch_size: divides the number of examples used.
        steps: length of the run; a whole number of passes over the data.
        lr: peak learning rate.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Any,
        targets: Tensor,
        batch_size: int,
        steps: int,
        lr: float,
    ) -> None:
        whole = len(targets) // batch_size
        per_pass = max(n for n in range(1, whole + 1) if steps % n == 0)
        count = per_pass * batch_size
        self.model, self.batch_size, self.steps, self.lr = model, batch_size, steps, lr
        self.examples, self.targets = examples[:count], targets[:count]
        self.passes = steps // per_pass
        numbered = self._loader(torch.arange(count))
        self.orders = [torch.cat([rows for _, rows in numbered]) for _ in range(self.passes)]

    def loader(self) -> Any:
        """The course's own loader, at its beginning."""
        return self._loader(self.targets)

    def _loader(self, targets: Tensor) -> Any:
        if isinstance(self.examples, Tensor):
            return BatchLoader(self.examples, targets, self.batch_size, shuffle=True, seed=0)
        return TokenLoader(self.examples, targets, self.batch_size, shuffle=True, seed=0)

    def cut_by_hand(self) -> Iterator[Batch]:
        """The same batches as fast as a script gets them."""
        if not isinstance(self.examples, Tensor):
            loader = self.loader()
            for _ in range(self.passes):
                yield from loader
            return
        for order in self.orders:  # stands for a permutation drawn here
            inputs, targets = self.examples[order], self.targets[order]
            yield from zip(
                inputs.split(self.batch_size), targets.split(self.batch_size), strict=True
            )

    def data_loader(self, named: bool = False) -> DataLoader:
        """The same batches from single examples; ``named``: dicts with "labels"."""
        rows = Rows(self.examples, self.targets, named)
        return DataLoader(
            rows, self.batch_size, sampler=InOrder(self.orders), collate_fn=rows.collate
        )

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model).train()

    def optimizer(self, model: nn.Module, fused: bool | None) -> torch.optim.AdamW:
        return torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.0, fused=fused)

    def factor(self, step: int) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * step / self.steps))


class Rows(Dataset):
    """Single examples, as tutorials of these libraries load them."""

    def __init__(self, examples: Any, targets: Tensor, named: bool) -> None:
        self.examples, self.targets, self.named = examples, targets, named
        self.collate: Any = default_collate if isinstance(examples, Tensor) else self._collate

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> Any:
        example, target = self.examples[row], self.targets[row]
        return {"inputs": example, "labels": target} if self.named else (example, target)

    def _collate(self, rows: list[Any]) -> Any:
        pairs = [tuple(row.values()) if self.named else row for row in rows]
        inputs, targets = pad([tokens for tokens, _ in pairs]), torch.stack([t for _, t in pairs])
        return inputs | {"labels": targets} if self.named else (inputs, targets)


class InOrder(Sampler):
    """Shuffled rows as recorded: the next order in each pass."""

    def __init__(self, orders: list[Tensor]) -> None:
        self.orders, self.passes = orders, 0

    def __len__(self) -> int:
        return len(self.orders[0])

    def __iter__(self) -> Iterator[int]:
        order = self.orders[self.passes % len(self.orders)].tolist()
        self.passes += 1
        return iter(order)


class OneInput(nn.Module):
    """For libraries that hand over the inputs as one argument."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs) -> Tensor:
        return self.model(inputs) if isinstance(inputs, Tensor) else self.model(**inputs)


# The ways: each trains a copy for the steps of the case and returns the loss of the last one.


def with_fit(case: Case) -> float:
    config = tl.TrainConfig(num_steps=case.steps, lr=case.lr, weight_decay=0.0, precision="fp32")
    return tl.fit(case.copy(), case.loader(), None, config).train_loss[-1]


def by_hand(case: Case, fused: bool | None) -> float:
    model = case.copy()
    optimizer = case.optimizer(model, fused)
    scheduler = LambdaLR(optimizer, case.factor)
    parameters, losses = list(model.parameters()), []
    for inputs, targets in case.cut_by_hand():
        logits = model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses).tolist()[-1]


def with_trainer(case: Case, tuned: bool) -> float:
    from transformers import Trainer, TrainingArguments

    class WithLoss(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.last = model, 0.0

        def forward(
            self,
            labels: Tensor,
            inputs: Any = None,
            input_ids: Any = None,
            attention_mask: Any = None,
        ) -> dict[str, Tensor]:
            one = inputs is not None
            logits = self.model(inputs) if one else self.model(input_ids, attention_mask)
            loss = F.cross_entropy(logits, labels)
            self.last = loss.detach()
            return {"loss": loss, "logits": logits}

    class SameOrder(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
            return InOrder(case.orders)

    class ReadyBatches(Trainer):
        def get_train_dataloader(self) -> Any:
            return Named(case.loader())

    model = WithLoss(case.copy())
    optimizer = case.optimizer(model, fused=True)  # "adamw_torch_fused" is its default
    rows = Rows(case.examples, case.targets, named=True)
    with tempfile.TemporaryDirectory() as folder:
        quiet: dict[str, Any] = {
            "save_strategy": "no", "logging_strategy": "no", "report_to": "none",
            "disable_tqdm": True, "dataloader_pin_memory": False, "logging_nan_inf_filter": False,
        }  # fmt: skip
        arguments = TrainingArguments(
            output_dir=folder, max_steps=case.steps, per_device_train_batch_size=case.batch_size,
            max_grad_norm=1.0, use_cpu=True, **(quiet if tuned else {}),
        )  # fmt: skip
        (ReadyBatches if tuned else SameOrder)(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=None if isinstance(case.examples, Tensor) else rows.collate,
            optimizers=(optimizer, LambdaLR(optimizer, case.factor)),
        ).train()
    return float(model.last)


class Named:
    """Batches of a loader as dicts with "labels"."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for inputs, targets in self.loader:
            named = {"inputs": inputs} if isinstance(inputs, Tensor) else inputs
            yield {**named, "labels": targets}


def with_lightning(case: Case, tuned: bool) -> float:
    import lightning

    os.environ[NVML_CHECK] = "0" if tuned else "1"  # 1: what the import says

    class Module(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Batch, number: int) -> Tensor:
            inputs, targets = batch
            logits = self.model(inputs) if isinstance(inputs, Tensor) else self.model(**inputs)
            loss = F.cross_entropy(logits, targets)
            self.last = loss.detach()
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = case.optimizer(self.model, fused=tuned or None)
            scheduler = LambdaLR(optimizer, case.factor)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
            }

    module = Module(case.copy())
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_steps=case.steps,
            accelerator="cpu",
            gradient_clip_val=1.0,
            default_root_dir=folder,
            barebones=tuned,
        )
        trainer.fit(module, case.loader() if tuned else case.data_loader())
    return float(module.last)


def with_accelerate(case: Case, tuned: bool) -> float:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = case.copy()
    optimizer: Any = case.optimizer(model, fused=tuned or None)
    scheduler: Any = LambdaLR(optimizer, case.factor)
    if tuned:
        loader = case.loader()
        model, optimizer = accelerator.prepare(model, optimizer)
    else:
        model, optimizer, loader, scheduler = accelerator.prepare(
            model, optimizer, case.data_loader(), scheduler
        )
    losses = []
    for _ in range(case.passes):
        for inputs, targets in loader:
            logits = model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
            loss = F.cross_entropy(logits, targets)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return torch.stack(losses).tolist()[-1]


def with_fastai(case: Case, tuned: bool) -> float:
    import fastai.callback.progress  # noqa: F401  # makes the progress bar a default
    from fastai.callback.schedule import ParamScheduler, SchedCos
    from fastai.callback.training import GradientClip
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    losses: list[Tensor] = []

    def loss_func(logits: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, targets)
        losses.append(loss.detach())
        return loss

    learner = Learner(
        DataLoaders(case.loader() if tuned else case.data_loader(), []),
        OneInput(case.copy()),
        loss_func=loss_func,
        opt_func=partial(OptimWrapper, opt=partial(torch.optim.AdamW, fused=tuned or None)),
        lr=case.lr,
        wd=0.0,
        cbs=[GradientClip(1.0), ParamScheduler({"lr": SchedCos(case.lr, 0.0)})],
    )
    with contextlib.ExitStack() as quiet:
        if tuned:
            quiet.enter_context(learner.no_bar())
            quiet.enter_context(learner.no_logging())
        learner.fit(case.passes)
    return float(losses[-1])


def with_skorch(case: Case, tuned: bool) -> float:
    from skorch import NeuralNetClassifier
    from skorch.callbacks import GradientNormClipping, LRScheduler

    rows = Rows(case.examples, case.targets, named=False)
    options: dict[str, Any] = {
        "iterator_train__sampler": InOrder(case.orders),
        "iterator_train__collate_fn": rows.collate,
    }
    if tuned:
        loader = case.loader()
        unwanted = ("epoch_timer", "train_loss", "valid_loss", "valid_acc", "print_log")
        options = {f"callbacks__{name}": None for name in unwanted}
        options |= {"iterator_train": lambda dataset, **_: loader, "verbose": 0}
    net = NeuralNetClassifier(
        case.copy(),
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        optimizer__weight_decay=0.0,
        optimizer__fused=tuned or None,
        lr=case.lr,
        batch_size=case.batch_size,
        max_epochs=case.passes,
        train_split=None,
        callbacks=[
            ("schedule", LRScheduler(LambdaLR, step_every="batch", lr_lambda=case.factor)),
            ("clip", GradientNormClipping(1.0)),
        ],
        **options,
    )
    net.fit(rows, None)
    return float(net.history[-1, "batches", -1, "train_loss"])


@dataclass(frozen=True)
class Way:
    train: Callable[[Case], float]
    needs: str | None = None  # a package


WAYS = {
    FIT: Way(with_fit),
    HAND: Way(partial(by_hand, fused=True)),
    PLAIN: Way(partial(by_hand, fused=None)),
    "transformers Trainer": Way(partial(with_trainer, tuned=False), "accelerate"),
    "transformers Trainer, tuned": Way(partial(with_trainer, tuned=True), "accelerate"),
    "Lightning": Way(partial(with_lightning, tuned=False), "lightning"),
    "Lightning, tuned": Way(partial(with_lightning, tuned=True), "lightning"),
    "accelerate": Way(partial(with_accelerate, tuned=False), "accelerate"),
    "accelerate, tuned": Way(partial(with_accelerate, tuned=True), "accelerate"),
    "fastai": Way(partial(with_fastai, tuned=False), "fastai"),
    "fastai, tuned": Way(partial(with_fastai, tuned=True), "fastai"),
    "skorch": Way(partial(with_skorch, tuned=False), "skorch"),
    "skorch, tuned": Way(partial(with_skorch, tuned=True), "skorch"),
}


def make_case(name: str, steps: int) -> Case:
    """A case by its name in ``STEPS``."""
    torch.manual_seed(0)
    if name == "MLP":
        from sklearn.datasets import load_digits

        digits = load_digits()
        mlp = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        images = torch.from_numpy(digits.data).float() / 16  # (1797, 64), in [0, 1]
        targets = torch.from_numpy(digits.target).long()
        return Case(mlp, images[:1280], targets[:1280], 32, steps, 1e-3)
    if name == "CNN":
        widths = (3, 32, 64, 48)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        cnn = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))
        train = tl.load_task("wild_digits", None).train
        return Case(cnn, train.inputs[:640], train.targets[:640], 32, steps, 1e-3)
    task = tl.load_text_task("doc_routing", 40)
    backbone = tl.load_text_backbone("minilm")
    model = tl.Classifier(backbone, task.num_classes)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return Case(model, backbone.preprocess(task.train.texts), task.train.targets, 16, steps, 1e-4)


def available(names: Iterable[str]) -> list[str]:
    """The ways whose packages are there; a line for each package that is not."""
    names = list(names)
    needed = sorted({WAYS[name].needs or "torch" for name in names})
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    for package in missing:
        print(f"{package} is not installed: left out")
    return [name for name in names if WAYS[name].needs not in missing]


def measure(case: Case, names: list[str], rounds: int) -> Timings:
    """Time the ways in turns; the loss of the last step must be the same in all of them."""
    losses: dict[str, float] = {}

    def turn(name: str) -> None:
        losses[name] = WAYS[name].train(case)
        os.environ.pop(NVML_CHECK, None)

    with silence():
        timings = take_turns({name: partial(turn, name) for name in names}, rounds)
    difference = max(losses.values()) - min(losses.values())
    if not difference <= TOLERANCE:
        raise ValueError(f"the last losses differ by {difference:.2g} > {TOLERANCE}: {losses}")
    facts = {
        "num_steps": case.steps,
        "batch_size": case.batch_size,
        "parameters": sum(p.numel() for p in case.model.parameters()),
        "last_loss": losses,
        "largest_difference": difference,
    }
    return Timings(timings.wall, timings.cpu, facts)


def slope(long: Timings, short: Timings) -> Timings:
    """Seconds of a long run minus those of a short one, round by round."""

    def minus(clock: str) -> dict[str, list[float]]:
        pairs = getattr(long, clock), getattr(short, clock)
        return {
            way: [a - b for a, b in zip(pairs[0][way], pairs[1][way], strict=True)]
            for way in pairs[0]
        }

    steps = long.facts["num_steps"] - short.facts["num_steps"]
    result = Timings(minus("wall"), minus("cpu"))
    start = {
        way: 1e3 * (short.seconds(way, "cpu").mean
                    - short.facts["num_steps"] * result.seconds(way, "cpu").mean / steps)
        for way in long.wall
    }  # fmt: skip
    return Timings(result.wall, result.cpu, {"num_steps": steps, "start_cpu_ms": start})


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """What libraries print goes nowhere; they still make it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for name in ("lightning.pytorch", "lightning.fabric"):  # bound to the real stderr
            logging.getLogger(name).setLevel(logging.ERROR)
        yield


def tables(path: Path) -> str:
    """Markdown: a table for each recorded case, as in ``benchmarks/README.md``."""
    parts = []
    for name, timings in load_timings(path).items():
        facts = timings.facts
        unit = "us" if name.startswith("MLP") else "ms"
        what = f"**{name}**, per step, {facts['num_steps']} steps"
        if "start_cpu_ms" in facts:
            what += " more than the short run"
            starts = ", ".join(f"{way} {ms:.0f}" for way, ms in facts["start_cpu_ms"].items())
            after = f"\n\nA start, ms of CPU: {starts}."
        else:
            what += f" of {facts['batch_size']}, {facts['parameters']:,} parameters"
            after = f"\n\nLast losses differ by {facts['largest_difference']:.1g} at most."
        reference = HAND if HAND in timings.wall else next(iter(timings.wall))
        parts.append(f"{what}:\n\n{timings.table(reference, facts['num_steps'], unit)}{after}")
    return "\n\n".join(parts) + "\n"


def draw(cases: dict[str, Timings], path: Path) -> Path:
    """CPU time over that of the loop by hand, a row for each way, a mark for each case."""
    import matplotlib.pyplot as plt

    ways = [way for way in WAYS if any(way in timings.wall for timings in cases.values())]
    _, ax = subplots(figsize=(8.0, 1.4 + 0.42 * len(ways)))
    for number, (name, timings) in enumerate(cases.items()):
        shift = 0.18 * (number - (len(cases) - 1) / 2)
        for row, way in enumerate(ways):
            if way not in timings.wall or HAND not in timings.wall:
                continue
            ratio: Interval = timings.ratio(way, HAND, "cpu")
            ax.errorbar(
                ratio.mean, row + shift,
                xerr=[[ratio.mean - ratio.low], [ratio.high - ratio.mean]],
                color=palette[number % len(palette)], marker=markers[number % len(markers)],
                ms=6, capsize=3, lw=1.4, ls="none", label=name if row == 0 else None,
            )  # fmt: skip
    ax.axvline(1.0, color=BLACK, ls="--", lw=1.0)
    ax.set(xscale="log", ylim=(len(ways) - 0.5, -0.5))
    ax.set_xlabel("CPU time / loop by hand (median, 95 % interval)")
    low, high = ax.get_xlim()
    ticks = [t for t in (0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 30, 50) if low <= t <= high]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_yticks(range(len(ways)), ways)
    ax.grid(False, axis="y")
    ax.figure.legend(loc="outside lower center", ncols=len(cases))
    path.parent.mkdir(parents=True, exist_ok=True)
    ax.figure.savefig(path, dpi=120)
    plt.close(ax.figure)
    return path


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--steps", type=int, help="length of every run (default: by case)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=data_dir() / "results" / "loop_overhead.json")
    plots = (repo_root() or Path()) / "benchmarks" / "plots"
    parser.add_argument("--plot", type=Path, default=plots / "loop_overhead.png")
    options = parser.parse_args(None if arguments is None else list(arguments))
    torch.set_num_threads(1)

    names, cases = available(options.ways), {}
    for name in options.cases:
        steps = options.steps or STEPS[name]
        cases[name] = measure(make_case(name, steps), names, options.rounds)
        if name == "MLP":
            few = make_case(name, max(1, round(SHORT * steps)))
            cases[SLOPE] = slope(cases[name], measure(few, names, options.rounds))
        print(f"{name}: measured", flush=True)
    there = [package for package in PEERS if importlib.util.find_spec(package) is not None]
    save_timings(
        options.out, cases, "python benchmarks/loop_overhead.py", threads=1,
        peers={package: metadata.version(package) for package in there},
    )  # fmt: skip
    print(tables(options.out))
    print(draw(cases, options.plot))


if __name__ == "__main__":
    main()
