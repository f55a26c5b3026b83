"""Running a model over the batches of a loader, and refusing what does not fit it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

Inputs = torch.Tensor | Mapping[str, torch.Tensor]


class Loader(Protocol):
    """What ``fit`` and ``evaluate`` iterate over, as often as they like.

    Yields ``(inputs, targets)``: ``inputs`` is a tensor, or a dict of tensors that the model
    takes as keyword arguments; ``targets`` is an int64 tensor, shape (B,).
    """

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...


def predictions(model: nn.Module, loader: Loader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ``(logits, targets)``, shapes (B, K) and (B,), of every batch, on the model's device.

    Evaluation mode and ``no_grad`` hold while a batch is computed.

    Raises:
        ValueError: if the loader is empty, or a batch is not as ``Loader`` says.
    """
    seen = 0
    for batch in loader:
        inputs, targets = unpack(batch)
        with inference(model):
            logits = forward(model, inputs)
        check_targets(targets, logits)
        seen += len(targets)
        yield logits, targets.to(logits.device)
    if seen == 0:
        raise ValueError("the loader is empty: it gave no batch to evaluate on")


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's own mode comes back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def call(model: nn.Module, inputs: Inputs, device: torch.device | None = None) -> Any:
    """``model(inputs)``, or ``model(**inputs)`` for a dict, on the device of the model.

    Args:
        model: see ``forward``.
        inputs: likewise.
        device: of the model, where it is known; it saves looking for it.
    """
    device = device_of(model) if device is None else device
    if isinstance(inputs, Mapping):
        return model(**{name: x.to(device, non_blocking=True) for name, x in inputs.items()})
    return model(inputs.to(device, non_blocking=True))


def forward(model: nn.Module, inputs: Inputs, device: torch.device | None = None) -> torch.Tensor:
    """Logits of a batch, shape (B, K), in at least single precision.

    Args:
        model: called as ``model(inputs)``, or ``model(**inputs)`` for a dict; gives the logits
            or an object with ``.logits``.
        inputs: moved to the device of the model's parameters.
        device: see ``call``.

    Raises:
        ValueError: if the model does not give one row of logits per example.
    """
    output = call(model, inputs, device)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(f"the model must give logits of shape (batch, classes), got {got}")
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter (or buffer) of a model; the CPU if it has none."""
    tensors = (tensor for group in (model.parameters(), model.buffers()) for tensor in group)
    first = next(tensors, None)
    return torch.device("cpu") if first is None else first.device


def unpack(batch: Any) -> tuple[Inputs, torch.Tensor]:
    """Split a batch of a loader into inputs and targets.

    Raises:
        ValueError: if it is not ``(inputs, targets)`` with targets as ``Loader`` says.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        size = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise ValueError(
            f"a loader must yield (inputs, targets), got a {type(batch).__name__}{size}"
        )
    inputs, targets = batch
    is_tensor = isinstance(targets, torch.Tensor)
    if not is_tensor or targets.dtype != torch.int64 or targets.ndim != 1 or len(targets) == 0:
        got = f"{targets.dtype}, shape {tuple(targets.shape)}" if is_tensor else type(targets)
        raise ValueError(f"targets must be class numbers, torch.int64, shape (batch,), got {got}")
    return inputs, targets


def check_targets(targets: torch.Tensor, logits: torch.Tensor) -> None:
    """Refuse targets that do not fit the logits. For targets on a GPU this waits for the GPU.

    Args:
        targets: int64, shape (B,), must be in [0, K).
        logits: shape (B, K).

    Raises:
        ValueError: names the label and the range, or the two batch sizes.
    """
    if len(targets) != len(logits):
        raise ValueError(
            f"the model gave {len(logits)} rows of logits for a batch of {len(targets)} targets"
        )
    check_range(targets, logits.shape[1])


def check_range(targets: torch.Tensor, num_classes: int) -> None:
    """Refuse targets, int64, shape (B,), that are not in [0, num_classes)."""
    low, high = (int(bound) for bound in torch.aminmax(targets))
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"label {low if low < 0 else high} is outside the head's range: "
            f"it has {num_classes} classes, labels must be in 0..{num_classes - 1}"
        )
