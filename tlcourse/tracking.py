"""Watching a run: a progress line that cleans up after itself, TensorBoard, Weights & Biases."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tlcourse.config import TrainConfig
from tlcourse.display import in_notebook


class Tracker:
    """Takes numbers and keeps none; the trackers below do keep them."""

    def log(self, step: int, **scalars: float) -> None:
        """Record numbers that belong to a step; a name is one curve."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard(Tracker):
    """Event files in a folder of the run's own; look at them with ``tensorboard --logdir``."""

    def __init__(self, config: TrainConfig) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                'log_to="tensorboard" needs the package tensorboard: pip install tensorboard'
            ) from error
        self.writer = SummaryWriter(str(_run_folder(config)))
        self.writer.add_text("config", "\n".join(f"    {k}: {v}" for k, v in _settings(config)))

    def log(self, step: int, **scalars: float) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases(Tracker):
    """A run of the project "tlcourse"; account and mode are those of ``wandb`` itself."""

    def __init__(self, config: TrainConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                'log_to="wandb" needs the package wandb: pip install wandb'
            ) from error
        folder = Path(config.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.run: Any = wandb.init(
            project="tlcourse", config=dict(_settings(config)), dir=str(folder)
        )

    def log(self, step: int, **scalars: float) -> None:
        self.run.log(scalars, step=step)

    def close(self) -> None:
        self.run.finish()


def make_tracker(config: TrainConfig) -> Tracker:
    """The tracker of ``config.log_to``; its package is imported only now.

    Raises:
        ImportError: says which package to install.
    """
    if config.log_to == "tensorboard":
        return TensorBoard(config)
    if config.log_to == "wandb":
        return WeightsAndBiases(config)
    return Tracker()


@contextmanager
def progress_bar(total: int, wanted: bool = True) -> Iterator[tqdm]:
    """A line on stderr, or one output in a notebook, that is gone at the end.

    Silent if not wanted, if stderr is a file or a pipe, or if ``TQDM_DISABLE`` is set.
    """
    notebook = in_notebook()
    silent = not wanted or bool(os.environ.get("TQDM_DISABLE"))
    silent = silent or not (notebook or sys.stderr.isatty())
    line: Any = _NotebookLine() if notebook and not silent else sys.stderr
    place = 0 if notebook else None  # nested bars share a terminal; in a notebook each is alone
    with tqdm(total=total, file=line, leave=False, disable=silent, position=place) as bar:
        try:
            yield bar
        finally:
            bar.close()
            if isinstance(line, _NotebookLine):
                line.remove()


class _NotebookLine:
    """A text file for tqdm that shows its last line as one output of the cell.

    Plain stderr would leave every state of the bar in the saved notebook, and a widget an
    empty box.
    """

    def __init__(self) -> None:
        from IPython.display import display

        self.handle: Any = display({"text/plain": ""}, raw=True, display_id=True)

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            self.handle.update({"text/plain": line}, raw=True)

    def flush(self) -> None:
        pass

    def remove(self) -> None:
        self.handle.update({}, raw=True)


def _run_folder(config: TrainConfig) -> Path:
    """A new folder below ``log_dir``, named by date and seed."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-seed{config.seed}"
    for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
        folder = Path(config.log_dir) / (name + suffix)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise RuntimeError(f"cannot make a new folder for the run in {config.log_dir}")


def _settings(config: TrainConfig) -> list[tuple[str, Any]]:
    return list(dataclasses.asdict(config).items())
