"""Models of one architecture as one: their weights stacked, a row for each (see ``fit_many``)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from tlcourse.config import no_penalty
from tlcourse.datasets import BatchLoader
from tlcourse.inference import (
    Inputs,
    Loader,
    check_targets,
    device_of,
    forward,
    inference,
    unpack,
)
from tlcourse.recording import Plan
from tlcourse.resuming import MicroBatch, StepBatches
from tlcourse.train import resident

# From so many channels on, in and out, one grouped convolution for all models takes a CPU longer
# than a convolution for each (measured for 3 x 3 kernels).
WIDE = 32
_NOT_COMPARED = {"_parameters", "_buffers", "_modules", "_before_freezing", "train", "training"}


class Stack:
    """The weights of M models of one architecture, stacked.

    Attributes:
        rows: name -> tensor, shape (M, ...): what is trained, or differs between the models.
            After ``bind`` the models' own tensors are views of its rows.
        common: name -> tensor: the rest.
    """

    def __init__(self, models: list[nn.Module]) -> None:
        self.models, self.net = models, _Logits(copy.deepcopy(models[0]).train())
        self.rows: dict[str, Tensor] = {}
        self.common: dict[str, Tensor] = {}
        columns = [dict(_tensors(model)) for model in models]
        training = {name for name, part in self.net.model.named_modules() if part.training}
        for name, first in columns[0].items():
            column = [tensors[name].detach() for tensors in columns]
            is_buffer = not isinstance(first, nn.Parameter)
            moves = first.requires_grad or (is_buffer and name.rpartition(".")[0] in training)
            if not moves and all(torch.equal(column[0], other) for other in column[1:]):
                self.common[f"model.{name}"] = column[0]
            else:
                self.rows[name] = torch.stack(column).requires_grad_(first.requires_grad)
        self.homes = [{n: x.data for n, x in _tensors(m) if n in self.rows} for m in models]
        everywhere = models[0].named_parameters(remove_duplicate=False)
        names = [*everywhere, *models[0].named_buffers(remove_duplicate=False)]
        self.tied = len(names) > len(columns[0])  # a tensor has two names; finding it takes time

    def bind(self) -> None:
        """Let the models' tensors be views of the rows, so that they always have its values."""
        for row, model in enumerate(self.models):
            for name, tensor in _tensors(model):
                if name in self.rows:
                    tensor.data = self.rows[name].data[row]

    def release(self, leaving: Sequence[int] | None = None) -> None:
        """Give models (by row; None: all) their values in memory of their own, as before."""
        for row in range(len(self.models)) if leaving is None else leaving:
            for name, tensor in _tensors(self.models[row]):
                if name in self.rows:
                    tensor.data = self.homes[row][name].copy_(tensor.data)

    def keep(self, going: list[int], optimizer: torch.optim.Optimizer) -> None:
        """Take all other models out, and out of the optimizer's state."""
        self.release([row for row in range(len(self.models)) if row not in going])
        for tensor in self.rows.values():
            for key, value in optimizer.state[tensor].items() if tensor.requires_grad else ():
                if isinstance(value, Tensor) and value.ndim > 0:  # not the count of steps
                    optimizer.state[tensor][key] = value[going]
            tensor.data = tensor.data[going]
        self.models = [self.models[row] for row in going]
        self.homes = [self.homes[row] for row in going]
        self.bind()

    def logits(self, inputs: Inputs, rows: slice, each: bool) -> Tensor:
        """Logits, shape (M, B, K), of the models in ``rows``.

        Args:
            inputs: shape (M, B, ...); or (1, B, ...) for all models, if not ``each``.
        """
        weights = {
            f"model.{name}": tensor if rows == slice(None) else tensor[rows]
            for name, tensor in self.rows.items()
        }

        def one(weights: dict[str, Tensor], inputs: Inputs) -> Tensor:
            weights = {**self.common, **weights}
            return functional_call(self.net, weights, (inputs,), tie_weights=self.tied)

        if not each:
            inputs = (
                {name: x[0] for name, x in inputs.items()}
                if isinstance(inputs, Mapping)
                else inputs[0]
            )
        return vmap(one, in_dims=(0, 0 if each else None))(weights, inputs)

    def score(self, loader: Loader, rows: slice = slice(None)) -> list[tuple[float, float]]:
        """As ``evaluation.score``, of each model."""
        loss, correct, seen = torch.zeros(()), torch.zeros(()), 0
        for batch in loader:
            inputs, targets = collate([unpack(batch)])
            with inference(self.net):
                logits = self.logits(inputs, rows, each=False)
                check_targets(targets[0], logits[0])
                targets = targets.to(logits.device)
                loss = loss.to(logits.device) + cross_entropy(logits, targets).sum(1)
                correct = correct.to(logits.device) + (logits.argmax(2) == targets).sum(1)
            seen += targets.shape[1]
        if seen == 0:
            raise ValueError("the loader is empty: it gave no batch to evaluate on")
        return [(a / seen, b / seen) for a, b in zip(loss.tolist(), correct.tolist(), strict=True)]


class Source:
    """A loader whose first pass has begun, read under the chance of its own run.

    In ``fit`` whatever a loader draws from torch's generator depends on the seed of the run.
    """

    def __init__(self, loader: Loader, plan: Plan) -> None:
        self.loader = resident(loader, plan.device)
        self.state = torch.Generator().manual_seed(plan.config.seed).get_state()
        with self.chance():
            self.begun: Iterator[Any] | None = iter(self.loader)
            self.first = next(self.begun, None)
        self.steps = iter(StepBatches(self, plan.num_steps, plan.config.accumulation_steps))
        self.draws = type(loader) is not BatchLoader or loader.transform is not None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        begun, self.begun = self.begun, None
        if begun is not None and self.first is not None:
            if self.draws:
                torch.set_rng_state(self.state)  # as the first batch left it
            yield self.first
        yield from self.loader if begun is None else begun

    def next_step(self) -> list[MicroBatch]:
        if not self.draws:  # it has a generator of its own
            return next(self.steps)
        with self.chance():
            return next(self.steps)

    @contextmanager
    def chance(self) -> Iterator[None]:
        outside = torch.get_rng_state()
        torch.set_rng_state(self.state)
        try:
            yield
        finally:
            self.state = torch.get_rng_state()
            torch.set_rng_state(outside)


class _Logits(nn.Module):
    """``inference.forward`` as a module. It refuses what stacked weights would not notice."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.device = model, device_of(model)
        self.buffered = [(part, name) for part in model.modules() for name in part._buffers]

    def forward(self, inputs: Inputs) -> Tensor:
        before = [part._buffers[name] for part, name in self.buffered]
        logits = forward(self.model, inputs, self.device)
        after = [part._buffers[name] for part, name in self.buffered]
        if any(a is not b for a, b in zip(before, after, strict=True)):
            raise RuntimeError("the forward pass replaces a buffer (change it in place)")
        return logits


def obstacle(runs: Sequence[tuple[Any, ...]], plan: Plan) -> str | None:
    """Why the models cannot be stacked (or gain nothing), as far as one can tell beforehand."""
    config, models, lengths = plan.config, [run[0] for run in runs], {len(run[1]) for run in runs}
    convs = [m for m in models[0].modules() if isinstance(m, nn.modules.conv._ConvNd)]
    widths = [min(m.in_channels, m.out_channels) // m.groups for m in convs]
    frozen = any(not parameter.requires_grad for parameter in models[0].parameters())
    hooked = any(
        hooks
        for m in models[0].modules()
        for key, hooks in vars(m).items()
        if key.endswith("_hooks")
    )
    reasons = {
        "there is only one": len(models) == 1,
        "they have hooks": hooked,
        "config.penalty is set": config.penalty is not no_penalty,
        f"their precision is {plan.dtype}": plan.dtype != torch.float32,
        f"log_to is {config.log_to!r}": config.log_to is not None,
        f"their loaders have {sorted(lengths)} batches": len(lengths) > 1,
        f"convolutions of {max(widths, default=0)} channels gain nothing on a CPU": (
            plan.device.type == "cpu" and max(widths, default=0) >= WIDE and not frozen
        ),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    for other in models[1:] if not found else ():
        found += [f"they differ in {name}" for name in _differences(models[0], other)]
    return found[0] if found else None


def trial(models: list[nn.Module], sources: list[Source]) -> str | None:
    """Why the forward pass cannot be stacked: it is tried, on copies, with the first batches."""
    if any(source.first is None for source in sources):
        return "a loader gave no batch"
    batches = [unpack(source.first) for source in sources]
    if len({shapes(batch) for batch in batches}) > 1:
        return "their batches differ in shape"
    try:
        stack = Stack(models)
        inputs, targets = collate(batches)
        with torch.no_grad():
            logits = stack.logits(inputs, slice(None), each=len(sources) > 1)
    except Exception as error:
        random = "random operation" in str(error)
        why = "it draws random numbers" if random else str(error).partition("\n")[0]
        return f"their forward pass cannot be stacked ({why})"
    if logits.shape[1] != targets.shape[1]:
        return "a batch does not fit the models"
    changed = next(_differences(models[0], stack.net.model), None)
    return None if changed is None else f"their forward pass changes {changed}"


def _differences(a: nn.Module, b: nn.Module) -> Iterator[str]:
    """Names of what differs between two models, but for the values of parameters and buffers."""
    parts, others = dict(a.named_modules()), dict(b.named_modules())
    mine, theirs = dict(_tensors(a)), dict(_tensors(b))
    if parts.keys() != others.keys() or mine.keys() != theirs.keys():
        yield "their parts"
        return
    for name, part in parts.items():
        facts, other_facts = vars(part), vars(others[name])
        frozen = ["_before_freezing" in each for each in (facts, other_facts)]
        if type(part) is not type(others[name]) or frozen[0] != frozen[1]:
            yield f"{name or 'the model'} ({type(part).__name__})"
        for key in sorted((facts.keys() | other_facts.keys()) - _NOT_COMPARED):
            if not _same(facts.get(key), other_facts.get(key)):
                yield f"{name}.{key}".lstrip(".")
    for name, x in mine.items():
        y = theirs[name]
        if (x.shape, x.dtype, x.requires_grad) != (y.shape, y.dtype, y.requires_grad):
            yield name


def alike(steps: list[list[MicroBatch]]) -> Iterator[tuple[slice, list[list[MicroBatch]]]]:
    """Split M models' steps into groups that can be stacked: all, or each model alone.

    Each alone where shapes differ, as in a short last batch. A single step is for all models.
    """
    if len({tuple(shapes(batch) for batch in step) for step in steps}) == 1:
        yield slice(None), steps
    else:
        yield from ((slice(row, row + 1), [step]) for row, step in enumerate(steps))


def collate(batches: Sequence[MicroBatch]) -> MicroBatch:
    """M batches of one shape as one: inputs, shape (M, B, ...), and targets, shape (M, B)."""
    first, targets = batches[0][0], torch.stack([targets for _, targets in batches])
    if isinstance(first, Mapping):
        columns: Any = [inputs for inputs, _ in batches]
        return {name: torch.stack([x[name] for x in columns]) for name in first}, targets
    return torch.stack([inputs for inputs, _ in batches]), targets  # type: ignore[misc]


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Loss of each example, shape (M, B); logits: (M, B, K), targets: (M, B), or (1, B) for all."""
    targets = targets.expand(logits.shape[:2]).flatten()
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets, reduction="none", label_smoothing=label_smoothing
    )
    return losses.view(logits.shape[:2])


def shapes(batch: MicroBatch) -> tuple[Any, ...]:
    """What must be the same in batches that are stacked."""
    inputs, targets = batch
    tensors = inputs if isinstance(inputs, Mapping) else {"": inputs}
    return len(targets), *((name, x.shape, x.dtype) for name, x in tensors.items())


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    try:
        return bool(a == b)
    except Exception:  # arrays, for example, have no single answer
        return False
