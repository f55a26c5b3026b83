"""What a training step keeps in memory, counted from the tensors themselves (lesson 12)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the numbers in some tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


def saved_for_backward(model: nn.Module, forward: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes of activations that a forward pass keeps for the backward pass.

    Args:
        model: its own parameters and buffers are not counted.
        forward: runs the pass, such as ``lambda: loss_of(model(inputs))``.

    Returns:
        the bytes, each storage once however often it is kept; and what ``forward`` gave.
    """
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = forward()
    return sum(size for place, size in kept.items() if place not in own), result
