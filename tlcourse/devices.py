"""Devices that a run is planned for: their memory and speed, by name, present or not."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from tlcourse import machine, runtime

GB = 10**9
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Device:
    """What planning needs to know of a device.

    Attributes:
        name: as asked for, "T4"; of the device that is here, what the driver calls it.
        type: "cuda" or "cpu".
        memory_bytes: that torch sees; a little less than the data sheet's. 0: unknown.
        free_bytes: of them, what a run may take.
        precision: what ``precision="auto"`` means there.
        half_flops: peak floating-point operations per second of matrix products in bf16 or fp16
            with float32 sums, without sparsity.
        float_flops: likewise in float32, without TF32.
        bandwidth: peak bytes per second of its memory.
        shares: (least, most) of those peaks that training usually reaches.
        op_seconds: (least, most) that one operation takes, however small it is.
        fill_share: of the free memory that a run should take at most. On a GPU the rest is for
            blocks that torch's allocator cannot use; on a CPU, where malloc keeps freed memory
            in pieces, a process takes up to 1.6 times what its tensors need.
        is_here: it is of this machine.
        workspace_bytes: of the matrix library: torch gives one workspace to the thread of the
            forward pass and one to that of the backward pass.
    """

    name: str
    type: str
    memory_bytes: int
    free_bytes: int
    precision: str
    half_flops: float
    float_flops: float
    bandwidth: float
    shares: tuple[float, float] = (0.25, 0.7)
    op_seconds: tuple[float, float] = (5e-6, 20e-6)
    fill_share: float = 0.9
    is_here: bool = False
    workspace_bytes: int = 0

    @property
    def allocation_bytes(self) -> int:
        """Allocations are rounded up to multiples of this."""
        return 512 if self.type == "cuda" else 1


# Of the CUDA context (kernels, stacks): not in torch's count, but gone from the card.
CONTEXT_BYTES = GB // 2
# Names and (GiB that torch sees, compute capability, peak TFLOPS in half precision with float32
# sums and in float32, GB/s), from NVIDIA's data sheets of the T4, the L4, the A100 (SXM4), the
# H100 (SXM5) and the H200 (SXM5). Where a sheet gives "with sparsity", half of it stands here.
_CARDS = {
    "T4": (14.6, (7, 5), 65, 8.1, 320),
    "L4": (22.0, (8, 9), 121, 30.3, 300),
    "A100": (39.4, (8, 0), 312, 19.5, 1555),
    "A100-80GB": (79.2, (8, 0), 312, 19.5, 2039),
    "H100": (79.1, (9, 0), 989, 67, 3350),
    "H200": (139.8, (9, 0), 989, 67, 4800),
}
NAMES = (*_CARDS, "cpu")


def find_device(device: torch.device | str | None = None) -> Device:
    """A device by name, or the one that is here.

    Args:
        device: a name of ``NAMES`` (upper or lower case), "cuda" or a ``torch.device`` for a GPU
            of this machine; None: the first GPU, else the CPU.

    Raises:
        ValueError: for an unknown name (lists the names), or a GPU that is not here.
    """
    if device is None:
        device = runtime.default_device()
    if isinstance(device, str) and device.upper() in _CARDS:
        return _card(device.upper())
    try:
        here = torch.device(device)
    except (RuntimeError, TypeError):
        here = torch.device("meta")
    if here.type == "cpu":
        return _cpu()
    if here.type != "cuda":
        raise ValueError(f"unknown device {device!r}; choose one of {', '.join(NAMES)}, 'cuda'")
    if not torch.cuda.is_available() or (here.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"there is no {str(device)!r} here; to plan for a GPU elsewhere, name it: "
            + ", ".join(_CARDS)
        )
    return _present_card(here)


def _card(name: str) -> Device:
    gib, capability, half, single, gigabytes = _CARDS[name]
    memory_bytes = int(gib * 2**30)
    return Device(
        name=name,
        type="cuda",
        memory_bytes=memory_bytes,
        free_bytes=memory_bytes - CONTEXT_BYTES,
        precision="bf16" if capability >= (8, 0) else "fp16",
        half_flops=half * 1e12,
        float_flops=single * 1e12,
        bandwidth=gigabytes * 1e9,
        # Two cuBLAS workspaces of torch's default size.
        workspace_bytes=2 * (32 * MIB if capability >= (9, 0) else 8_519_680),
    )


def _present_card(here: torch.device) -> Device:
    """The card of the table that it is, or is most like, with the memory of the one here."""
    title = torch.cuda.get_device_name(here)
    total = torch.cuda.get_device_properties(here).total_memory
    # What torch holds and does not use is free for the next run.
    unused = torch.cuda.memory_reserved(here) - torch.cuda.memory_allocated(here)
    free = torch.cuda.mem_get_info(here)[0] + unused
    capability = torch.cuda.get_device_capability(here)
    words = title.replace("-", " ").split()
    alike = [name for name in _CARDS if name.split("-")[0] in words]
    alike = alike or [max(_CARDS, key=lambda name: (_CARDS[name][1] <= capability, name == "L4"))]
    card = _card(min(alike, key=lambda name: abs(_CARDS[name][0] * 2**30 - total)))
    return Device(
        **{
            **vars(card),
            "name": title,
            "memory_bytes": total,
            "free_bytes": free,
            "precision": runtime.default_precision(here),
            "is_here": True,
        }
    )


def _cpu() -> Device:
    total, available = machine.memory_bytes()
    flops, bandwidth = _cpu_speed(torch.get_num_threads())
    return Device(
        name="cpu",
        type="cpu",
        memory_bytes=total,
        free_bytes=available,
        precision="fp32",
        half_flops=flops,  # of no use to a CPU without special instructions, so taken as equal
        float_flops=flops,
        bandwidth=bandwidth,
        shares=(0.25, 1.2),  # a convolution can do better than the product that was timed
        op_seconds=(3e-6, 12e-6),
        fill_share=0.6,
        is_here=True,
    )


@cache
def _cpu_speed(num_threads: int) -> tuple[float, float]:
    """Operations and bytes per second of this CPU: a product and a copy, a few milliseconds."""
    # A generator of its own: the caller's random numbers stay as they are.
    x = torch.rand(512, 512, generator=torch.Generator().manual_seed(0))
    large = torch.zeros(4 * MIB)
    target = torch.empty_like(large)
    flops = 2 * 512**3 / _best_seconds(lambda: x @ x)
    return flops, 2 * large.nbytes / _best_seconds(lambda: target.copy_(large))


def _best_seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
