"""Device, precision, random seed and profile: what a run stands on."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

import numpy as np
import torch

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Runtime:
    """What ``setup`` found.

    Attributes:
        device: where models and batches go.
        precision: "fp32", "bf16" or "fp16"; what ``precision="auto"`` means here.
        profile: "tiny" (embedded data, two cores) or "full" (a CUDA GPU, hub data).
        seed: the seed that was set.
    """

    device: torch.device
    precision: str
    profile: str
    seed: int

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return (
            f"device: {self.device} ({name}), precision: {self.precision}, "
            f"profile: {self.profile}, seed: {self.seed}"
        )


def setup(seed: int = 0, profile: str | None = None) -> Runtime:
    """Seed everything, choose device, precision and profile, and say so in one line.

    From here on float32 means float32 on a GPU, too: convolutions and products that round their
    inputs to 10 bits (TF32) are switched off. Speed comes from the half precision of ``fit``.

    Args:
        seed: in [0, 2**32 - 1]; seeds Python, NumPy and torch.
        profile: "tiny" or "full"; None chooses "full" exactly when a CUDA GPU is there.
            The environment variable ``TLCOURSE_PROFILE`` does the same.

    Raises:
        ValueError: if the seed or the profile is outside its range.
    """
    set_seed(seed)
    device = default_device()
    chosen = profile or os.environ.get("TLCOURSE_PROFILE") or _natural_profile(device)
    if chosen not in ("tiny", "full"):
        raise ValueError(f"profile must be 'tiny' or 'full', got {chosen!r}")
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")  # sets torch's old and new switches alike
    run = Runtime(device, default_precision(device), chosen, seed)
    print(run)
    if os.environ.get("COLAB_RELEASE_TAG") and device.type == "cpu":
        print(
            "No GPU in this Colab runtime: fine for every lesson; Runtime > Change type adds one."
        )
    return run


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices).

    Raises:
        ValueError: if seed is not an integer in [0, 2**32 - 1].
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer in [0, 2**32 - 1], got {seed!r}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def default_device() -> torch.device:
    """The first CUDA GPU (under ``torchrun`` the one of this process), else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = os.environ.get("LOCAL_RANK")
    return torch.device("cuda") if local_rank is None else torch.device("cuda", int(local_rank))


def default_precision(device: torch.device) -> str:
    """The fast precision that is safe on ``device``.

    A GPU of compute capability 8.0 or newer has bf16; an older one (a T4 is 7.5) takes fp16
    with a gradient scaler. The CPU stays with fp32.
    """
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def _natural_profile(device: torch.device) -> str:
    return "full" if device.type == "cuda" else "tiny"
