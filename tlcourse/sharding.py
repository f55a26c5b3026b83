"""A model whose weights are divided among processes: fully sharded data parallel (FSDP).

Zhao et al. 2023, arXiv:2304.11277, as torch's ``fully_shard`` does it: each process keeps its part
of weights, gradients and optimizer state, and the parts come together where a layer needs them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tlcourse.processes import Processes


@contextmanager
def sharded(
    model: nn.Module,
    processes: Processes,
    wanted: bool,
    also_after: type[Exception] | tuple[type[Exception], ...] = (),
) -> Iterator[nn.Module]:
    """The model to train: a copy with divided weights, or, if not wanted or alone, itself.

    At the end the model has the copy's weights and buffers and is in evaluation mode. Every block
    of a ``Sequential`` or ``ModuleList`` is divided by itself.

    Args:
        model: whole in every process, with the same weights.
        processes: of the run.
        wanted: ``TrainConfig.fsdp``.
        also_after: errors that end the run in all processes at once, after which the model gets
            the weights, too. (After any other a process would wait for the rest in vain.)
    """
    if not wanted or processes.size == 1:
        yield model
        return
    divided = _divide(model, processes)
    try:
        yield divided
    except also_after:
        _gather(divided, model)
        raise
    _gather(divided, model)


def _divide(model: nn.Module, processes: Processes) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    divided = copy.deepcopy(model)
    mesh = init_device_mesh(processes.device.type, (processes.size,))
    for part in list(divided.modules()):
        if isinstance(part, (nn.Sequential, nn.ModuleList)):
            for block in part.children():
                if next(block.parameters(), None) is not None:
                    fully_shard(block, mesh=mesh)
    fully_shard(divided, mesh=mesh)
    return divided


def _gather(divided: nn.Module, model: nn.Module) -> None:
    names = {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        for name, tensor in (*divided.named_parameters(), *divided.named_buffers()):
            target = model.get_parameter(name) if name in names else model.get_buffer(name)
            target.copy_(whole(tensor))
    model.eval()


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its parts; every process must ask for it. One that is whole stays."""
    gathered = getattr(tensor, "full_tensor", None)
    return tensor if gathered is None else gathered()


def assign(tensor: Tensor, value: Tensor) -> None:
    """Put a whole value into a tensor that may be divided."""
    tensor.copy_(part_like(value, tensor))


def part_like(value: Tensor, tensor: Tensor) -> Tensor:
    """This process's part of a whole value, divided as ``tensor`` is."""
    if not hasattr(tensor, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    like: Any = tensor
    return distribute_tensor(value.detach().to(like.device), like.device_mesh, like.placements)
