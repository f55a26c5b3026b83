"""Before a run: will it fit, how long does a step take, and how should it be set up?"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tlcourse.checkpoints import chance_of, set_chance
from tlcourse.config import TrainConfig
from tlcourse.devices import Device, find_device
from tlcourse.dry_run import DryRun, dry_run
from tlcourse.estimates import Estimate, seconds_text, size_text, step_seconds
from tlcourse.inference import Inputs, Loader, device_of, unpack
from tlcourse.train import fit

LIBRARIES, DATA = "libraries", "data"


@dataclass(frozen=True)
class Preflight:
    """What ``preflight`` found; printing it shows a table and the proposal.

    Attributes:
        device: the device that is planned for.
        planned: the run as it was asked for.
        proposed: with the precision that suits the device and the largest micro-batch that fits,
            as many examples a step as planned; None if not even one example fits.
        usable_bytes: what a run may take: the free memory less a reserve.
        measured_step_seconds: of the planned run, or None.
    """

    device: Device
    planned: Estimate
    proposed: Estimate | None
    usable_bytes: int
    measured_step_seconds: float | None
    _config: TrainConfig
    _hint: str

    @property
    def fits(self) -> bool:
        """Whether the run fits as it was planned."""
        return self.planned.peak_bytes <= self.usable_bytes

    @property
    def micro_batch(self) -> int | None:
        """Batch size to give the loader, or None if nothing fits."""
        return None if self.proposed is None else self.proposed.batch_size

    @property
    def config(self) -> TrainConfig:
        """The planned config with precision and accumulation as proposed.

        Raises:
            ValueError: if nothing fits.
        """
        if self.proposed is None:
            raise ValueError(self._hint)
        return replace(
            self._config,
            precision=self.proposed.precision,  # type: ignore[arg-type]
            accumulation_steps=self.proposed.accumulation_steps,
        )

    def __str__(self) -> str:
        plan, free = self.planned, self.device.free_bytes
        rows = [("", "whole", "at the peak")]
        for kind, size in plan.whole.items():
            if size or plan.at_peak[kind]:
                rows.append((kind, size_text(size), size_text(plan.at_peak[kind])))
        share = f"{plan.peak_bytes / max(self.usable_bytes, 1):.0%} of what a run should take here"
        rows.append(("peak", "", f"{size_text(plan.peak_bytes)} ({share})"))
        lines = [f"{self.device.name}, {size_text(free)} free: {plan}"]
        lines += [f"  {kind:<13}{whole:>9}   {peak}" for kind, whole, peak in rows]
        if self.measured_step_seconds is not None:
            lines.append(f"A step took {seconds_text(self.measured_step_seconds)} here.")
        verdict = "It fits." if self.fits else "It does not fit."
        return "\n".join([*lines, f"{verdict} {self._proposal()}"])

    def _proposal(self) -> str:
        if self.proposed is None:
            return self._hint
        if str(self.proposed) == str(self.planned):
            return "Proposal: as planned."
        text = f"Proposal: batch_size={self.proposed.batch_size}, "
        text += f"accumulation_steps={self.proposed.accumulation_steps}, "
        return text + f"precision={self.proposed.precision!r} ({self.proposed})."


def preflight(
    model: nn.Module,
    config: TrainConfig,
    device: torch.device | str | None = None,
    *,
    example: Any,
    batch_size: int | None = None,
    measure: bool = False,
) -> Preflight:
    """Predict memory and time of ``tl.fit``, and propose batch, accumulation and precision.

    Nothing is allocated and nothing is computed (see ``tlcourse.dry_run``), so a GPU that is not
    here can be planned for, and a model that is too large for this machine. The model, the
    random generators and the loader stay as they are.

    The memory is that of training without ``torch.compile``; an evaluation with larger batches
    can take more. Values decide nothing in a dry run: padding cannot be skipped, say. The time
    is what the operations need at the usual shares of the device's peak speed: a wide range.

    Args:
        model: as for ``fit``; on any device.
        config: as for ``fit``.
        device: where the run is to be: "T4", "L4", "A100", "A100-80GB", "H100", "H200", "cpu",
            or "cuda" or a ``torch.device`` for one that is here; None: what ``tl.setup`` takes.
        example: one batch as a loader yields it, or the training loader.
        batch_size: examples in a batch of the loader, >= 1; None: as many as in ``example``.
        measure: time some steps too, on a copy of the model, if device is here and they fit.

    Raises:
        ValueError: for an unknown device, an example that is no batch or does not suit the
            model, a model without trainable parameters, or one whose forward pass depends on
            the numbers themselves.
    """
    target, batch = find_device(device), _first_batch(example)
    planned_size = len(batch[1]) if batch_size is None else batch_size
    if isinstance(planned_size, bool) or not isinstance(planned_size, int) or planned_size < 1:
        raise ValueError(f"batch_size must be an int >= 1, got {batch_size!r}")
    usable, data_bytes = _usable_bytes(target, model), _resident_bytes(example, target)

    @cache
    def estimate(size: int, accumulation_steps: int, precision: str) -> Estimate:
        changed = replace(config, accumulation_steps=accumulation_steps)
        run = _dry_run(model, changed, batch, size, target, precision != "fp32")
        extra = {LIBRARIES: target.workspace_bytes, DATA: data_bytes}
        seconds = step_seconds(run, target, accumulation_steps)
        whole, at_peak = run.whole | extra, run.at_peak | extra
        return Estimate(size, accumulation_steps, precision, whole, at_peak, seconds)

    precision = target.precision if config.precision == "auto" else str(config.precision)
    planned = estimate(planned_size, config.accumulation_steps, precision)
    together = planned_size * config.accumulation_steps
    proposed, least = _largest(estimate, together, target.precision, usable)
    measured = None
    if measure and target.is_here and planned.peak_bytes <= usable:
        measured = _measured_seconds(model, config, batch, planned_size, target)
    hint = "" if proposed else _hint(least or planned, usable)
    return Preflight(target, planned, proposed, usable, measured, config, hint)


def _largest(
    estimate: Callable[[int, int, str], Estimate], together: int, precision: str, usable: int
) -> tuple[Estimate | None, Estimate | None]:
    """Of the divisors of ``together``, the largest micro-batch that fits; and the smallest tried.

    Memory grows with the batch, so the divisors are searched by halves.
    """
    sizes = [size for size in range(1, together + 1) if together % size == 0]
    best, least, low, high = None, None, 0, len(sizes) - 1
    middle = high  # most often all fit
    while low <= high:
        try:
            found = estimate(sizes[middle], together // sizes[middle], precision)
        except ValueError:  # BatchNorm over a single number has no variance
            found = None
        if found is not None and (least is None or found.batch_size < least.batch_size):
            least = found
        if found is not None and found.peak_bytes <= usable:
            best, low = found, middle + 1
        elif found is None:
            low = middle + 1
        else:
            high = middle - 1
        middle = (low + high) // 2
    return best, least


def _dry_run(
    model: nn.Module,
    config: TrainConfig,
    batch: tuple[Inputs, Tensor],
    size: int,
    device: Device,
    half: bool,
) -> DryRun:
    return dry_run(
        model,
        config,
        batch,
        batch_size=size,
        on_gpu=device.type == "cuda",
        half=half,
        allocation_bytes=device.allocation_bytes,
    )


def _measured_seconds(
    model: nn.Module,
    config: TrainConfig,
    batch: tuple[Inputs, Tensor],
    batch_size: int,
    device: Device,
) -> float:
    """Seconds of one step: the difference between runs of two and of five on a copy, each the
    faster of two; where other work on the machine hides it, a fifth of the longer run."""
    rows = torch.arange(batch_size) % len(batch[1])
    inputs, targets = tree_map(lambda x: x[rows] if len(x) == len(batch[1]) else x, batch)
    trained = copy.deepcopy(model).to(device.type)
    times: dict[int, float] = {}
    for num_steps in (2, 5, 2, 5):
        short = replace(
            config, num_steps=num_steps, num_epochs=None, warmup_steps=0, patience=None,
            progress=False, log_to=None, checkpoint_dir=None,
        )  # fmt: skip
        loader = [(inputs, targets)] * (num_steps * config.accumulation_steps)
        seconds = fit(trained, loader, None, short).seconds
        times[num_steps] = min(seconds, times.get(num_steps, seconds))
    return (times[5] - times[2]) / 3 if times[5] > times[2] else times[5] / 5


def _first_batch(example: Any) -> tuple[Inputs, Tensor]:
    """The batch itself, or the first of a loader, whose source of chance is put back."""
    is_pair = isinstance(example, (tuple, list)) and len(example) == 2
    if isinstance(example, tuple) or (is_pair and isinstance(example[1], Tensor)):
        return unpack(example)
    if not hasattr(example, "__iter__") or isinstance(example, (Tensor, dict, str)):
        raise ValueError(
            "example must be a batch (inputs, targets) or a loader of such, "
            f"got {type(example).__name__}"
        )
    chance = chance_of(example)
    batch = next(iter(example), None)
    set_chance(chance, example)
    if batch is None:
        raise ValueError("the loader given as example is empty: it gave no batch")
    return unpack(batch)


def _usable_bytes(device: Device, model: nn.Module) -> int:
    """Free memory, and the model's own if it lies there already, less a reserve."""
    if device.memory_bytes == 0:  # unknown
        return sys.maxsize
    free = device.free_bytes
    if device.is_here and device_of(model).type == device.type:
        free += sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    return int(free * device.fill_share)


def _resident_bytes(example: Loader, device: Device) -> int:
    """Bytes of a loader's data that ``fit`` moves to a GPU as a whole (``BatchLoader``)."""
    asks = getattr(example, "resident_bytes", None)
    return 0 if asks is None or device.type != "cuda" else asks(device.free_bytes)


def _hint(least: Estimate, usable: int) -> str:
    """Why nothing fits, and what would help."""
    text = f"Not even a micro-batch of {least.batch_size} fits in {size_text(usable)}: "
    kinds = [kind for kind in least.whole if kind != "activations"]
    lasting = sum(least.whole[kind] for kind in kinds)
    if lasting > least.at_peak["activations"]:
        return text + (
            f"weights, gradients and optimizer state alone take {size_text(lasting)}, which "
            "neither smaller batches nor accumulation make less. Train fewer parameters (LoRA, "
            "tl.freeze), take a smaller model, or a larger device."
        )
    return text + (
        f"the activations take {size_text(least.at_peak['activations'])}. Shorter or smaller "
        "inputs help, half precision (bf16, fp16), freezing the lower layers, or a larger device; "
        "more accumulation does not."
    )
