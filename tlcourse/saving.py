"""Files that are whole or not there: tensors as safetensors, models, and what else is written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PARTIAL = ".partial"  # ends the name of a file that is not whole yet


def save_model(model: nn.Module, path: str | Path) -> Path:
    """Write every parameter and buffer as safetensors, whole or not at all.

    Raises:
        ValueError: if a trainable parameter would not be in the file.
    """
    storages = {value.untyped_storage().data_ptr() for value in model.state_dict().values()}
    lost = [
        key
        for key, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.untyped_storage().data_ptr() not in storages
    ]
    if lost:
        raise ValueError(f"trainable parameter {lost[0]!r} would not be saved; nothing was written")
    return save_state(model.state_dict(), path)


def save_state(state: Mapping[str, Tensor], path: str | Path) -> Path:
    """Write tensors by name as safetensors, whole or not at all (``write_whole``).

    Raises:
        OSError: if the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Copies: safetensors refuses tensors that share memory.
    copies = {key: x.detach().to("cpu", copy=True).contiguous() for key, x in state.items()}

    def write(partial: Path) -> None:
        save_file(copies, partial)
        with contextlib.suppress(OSError):  # a file system without permissions
            partial.chmod(0o644)

    write_whole(path, write)
    return path


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, flush it to the disk, and rename it when it is whole.

    Args:
        path: where the file is in the end; one that is there stays until then.
        write: fills the file it is given.

    Raises:
        OSError: if it cannot be written; also for what safetensors makes of a full disk.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")  # other processes may save it
    try:
        write(partial)
        with partial.open("r+b") as file:  # Windows flushes only what may be written
            os.fsync(file.fileno())
        partial.replace(path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        partial.unlink(missing_ok=True)


def load_model(path: str | Path, model: nn.Module) -> nn.Module:
    """Fill ``model`` with what ``save_model`` wrote; returns the same object.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a key is missing, left over, or has another shape (names the first);
            the model is then unchanged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no saved model at {path}")
    state, own = load_file(path), model.state_dict()
    for key in sorted(own.keys() ^ state.keys()):
        where = "the file lacks" if key in own else "the model lacks"
        raise ValueError(f"{path}: {where} {key!r}; was it saved from another architecture?")
    for key, value in own.items():
        if value.shape != state[key].shape:
            raise ValueError(
                f"{path}: {key!r} has shape {tuple(state[key].shape)}, "
                f"the model expects {tuple(value.shape)}"
            )
    model.load_state_dict(state)
    return model
