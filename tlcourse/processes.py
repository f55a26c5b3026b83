"""One run in several processes, as ``torchrun`` starts them: each takes its part of every batch.

Every process runs the same script with the same seeds, so all make the same batches; of each, a
process computes its rows. Gradients are averaged by torch's DistributedDataParallel (Li et al.
2020, arXiv:2006.15704).
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: of this one, in [0, size).
        size: how many there are; with 1 every method is nearly free.
        device: of the model in this process.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """What to call in the place of the model, so that backward averages the gradients.

        A model with divided weights (``tlcourse.sharding``) does that itself.
        """
        if self.size == 1 or any(hasattr(p, "full_tensor") for p in model.parameters()):
            return model
        devices = [self.device] if self.device.index is not None else None
        # A parameter that a step does not use is left alone, as in one process.
        return DistributedDataParallel(model, devices, find_unused_parameters=True)

    def rows(self, inputs: Any, targets: Tensor) -> tuple[Any, Tensor, int]:
        """This process's rows of a batch, and how many there are.

        Where there is none, it is one row that must count nothing: each process has to take part.

        Raises:
            ValueError: if an input has not one row for each target.
        """
        if self.size == 1:
            return inputs, targets, len(targets)
        if not has_rows(inputs, targets):
            tensors = inputs.values() if isinstance(inputs, Mapping) else [inputs]
            raise ValueError(
                f"{self.size} processes need batches with a row for each target, got shapes "
                f"{[tuple(x.shape) for x in tensors]} for {len(targets)} targets"
            )
        mine = torch.arange(len(targets)).tensor_split(self.size)[self.rank]
        part = slice(int(mine[0]), int(mine[-1]) + 1) if len(mine) else slice(0, 1)
        return take_rows(inputs, part), targets[part], len(mine)

    def part_of(self, loader: Any) -> Any:
        """This process's rows of each batch, left out where there are none."""
        return loader if self.size == 1 else _Part(loader, self)

    def waiting(self, wrapped: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Around all but the last backward pass of a step: gradients are averaged once."""
        if last or not isinstance(wrapped, DistributedDataParallel):
            return nullcontext()
        return wrapped.no_sync()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, value: bool) -> bool:
        """Whether it is true in one of the processes; all get the same answer."""
        if self.size == 1:
            return value
        return bool(self.sum(torch.tensor([float(value)], device=self.device)).item() > 0)

    def align_buffers(self, model: nn.Module) -> None:
        """Give all processes the buffers (BatchNorm's statistics) of the first."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


def has_rows(inputs: Any, targets: Tensor) -> bool:
    """Whether each input has one row for each target."""
    tensors = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    return all(len(x) == len(targets) for x in tensors)


def take_rows(inputs: Any, part: slice) -> Any:
    """Some rows of the inputs of a batch, a tensor or a dict of tensors."""
    if isinstance(inputs, Mapping):
        return {name: x[part] for name, x in inputs.items()}
    return inputs[part]


def join_processes(device: torch.device) -> Processes:
    """The processes that ``torchrun`` started, or this one alone.

    A process group that is there already is used; else one is made, with NCCL for CUDA and Gloo
    for a CPU.
    """
    if not dist.is_available():
        return Processes(device=device)
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            return Processes(device=device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    return Processes(dist.get_rank(), dist.get_world_size(), device)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class _Part:
    def __init__(self, loader: Iterable[Any], processes: Processes) -> None:
        self.loader, self.processes = loader, processes

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        for inputs, targets in self.loader:
            inputs, targets, count = self.processes.rows(inputs, targets)
            if count:
                yield inputs, targets
