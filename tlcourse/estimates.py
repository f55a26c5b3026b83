"""Memory and time of a training run, from a dry run and what is known of the device."""

from __future__ import annotations

from dataclasses import dataclass

from tlcourse.devices import Device
from tlcourse.dry_run import DryRun


@dataclass(frozen=True)
class Estimate:
    """What a run with these settings takes.

    Attributes:
        batch_size: examples in a micro-batch, that is, in a batch of the loader.
        accumulation_steps: micro-batches in each step.
        precision: "fp32", "bf16" or "fp16".
        whole: kind -> bytes: "parameters" (with buffers), "gradients", "optimizer" (its state),
            "best weights" (of ``fit``; only on the CPU), "activations" (between forward and
            backward pass), "libraries" (workspace of cuBLAS), "data" (that ``fit`` moves to a
            GPU as a whole).
        at_peak: kind -> bytes in the moment of the highest sum. Gradients and activations are
            seldom whole at the same time; "activations" then counts all other tensors, too.
        step_seconds: (least, most) for one update of the weights, input and evaluation apart.
    """

    batch_size: int
    accumulation_steps: int
    precision: str
    whole: dict[str, int]
    at_peak: dict[str, int]
    step_seconds: tuple[float, float]

    @property
    def peak_bytes(self) -> int:
        """On a GPU comparable with ``torch.cuda.max_memory_allocated``."""
        return sum(self.at_peak.values())

    def __str__(self) -> str:
        size = f"{self.batch_size:,} example{'s' * (self.batch_size > 1)}"
        if self.accumulation_steps > 1:
            size = f"{self.accumulation_steps} x {size}"
        low, high = (seconds_text(x) for x in self.step_seconds)
        return f"{size}, {self.precision}: {size_text(self.peak_bytes)}, {low} to {high} a step"


def step_seconds(run: DryRun, device: Device, accumulation_steps: int) -> tuple[float, float]:
    """(least, most) seconds of a step, from the roofline (Williams et al. 2009) of the device.

    Each operation takes as long as its arithmetic or its traffic, whichever is longer. A GPU is
    told what to do while it works, so that either the work or the telling decides.
    """
    seconds = []
    for share, each in zip(reversed(device.shares), device.op_seconds, strict=True):
        bandwidth = share * device.bandwidth
        work = sum(
            max(
                op.flops / (share * (device.half_flops if op.half else device.float_flops)),
                op.num_bytes / bandwidth,
            )
            for op in run.operations
        )
        calls = each * len(run.operations)
        once = max(work, calls) if device.type == "cuda" else work + calls
        seconds.append(once * accumulation_steps + run.update_bytes / bandwidth)
    return seconds[0], seconds[1]


def size_text(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def seconds_text(seconds: float) -> str:
    value, unit = (seconds, "s") if seconds >= 1 else (seconds * 1e3, "ms")
    return f"{value:.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"
