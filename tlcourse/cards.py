"""What the cards of all pre-trained checkpoints say, whatever the network."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from tlcourse.recording import History
from tlcourse.runtime import default_device


class Recipe(Protocol):
    """What is common to the recipes of images and of text."""

    @property
    def seed(self) -> int: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def lr(self) -> float: ...


def check_request(
    name: str, known: Iterable[str], num_steps: int | None, folder: Path | None
) -> None:
    """Refuse a checkpoint that has no recipe, or a shortened run that would replace one.

    Raises:
        ValueError: says which.
    """
    if name not in set(known):
        raise ValueError(f"unknown checkpoint {name!r}; choose one of {', '.join(known)}")
    if num_steps is not None and folder is None:
        raise ValueError("a shortened run needs --out FOLDER, so that it replaces nothing shipped")


def run_facts(name: str, recipe: Recipe, history: History) -> dict[str, Any]:
    """How a checkpoint was trained: command, seed, steps, batch, rate."""
    steps = len(history.step)
    shortened = f" --steps {steps} --out FOLDER" if steps != recipe.num_steps else ""
    return {
        "command": f"tlcourse pretrain {name}{shortened}",
        "seed": recipe.seed,
        "num_steps": steps,
        "best_step": history.best_step,
        "batch_size": recipe.batch_size,
        "lr": recipe.lr,
    }


def machine_facts(history: History, path: Path, licence: str) -> dict[str, Any]:
    """Where it was trained, for how long, and the hash of the file at ``path``."""
    return {
        "machine": f"{platform.machine()} {default_device().type}, "
        f"{torch.get_num_threads()} thread(s), bf16, torch {torch.__version__.partition('+')[0]}",
        "minutes": round(history.seconds / 60, 1),
        "licence": licence,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
