"""A run that is saved now and then, and goes on where it was."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tlcourse import checkpoints
from tlcourse.inference import Inputs, Loader, unpack
from tlcourse.recording import History, Recorder
from tlcourse.sharding import part_like, whole

Resume = Literal["never", "auto"]
MicroBatch = tuple[Inputs, Tensor]


class StepBatches:
    """Yields, ``num_steps`` times, the micro-batches of one step.

    Passes over the loader as often as needed. A step never spans two epochs: the last of an
    epoch may have fewer micro-batches.

    Args:
        loader: see ``tlcourse.inference.Loader``.
        num_steps: of the run.
        accumulation_steps: micro-batches of a step.
        remember: note the state of all chance before each pass, as ``position`` needs it.
    """

    def __init__(
        self, loader: Loader, num_steps: int, accumulation_steps: int, remember: bool = False
    ) -> None:
        self.loader, self.num_steps, self.group_size = loader, num_steps, accumulation_steps
        self.remember = remember
        self.done, self.taken = 0, 0  # steps of the run, batches of this pass
        self.chance: dict[str, Tensor] = {}  # before this pass
        self.resumed: dict[str, Tensor] | None = None  # chance at the step to go on after

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        while self.done < self.num_steps:
            batches = self._begin_pass()
            while self.done < self.num_steps and (group := list(islice(batches, self.group_size))):
                self.taken += len(group)
                self.done += 1
                yield [unpack(batch) for batch in group]
            if self.taken == 0:
                raise ValueError("the training loader is empty: it gave no batch")

    def go_to(
        self, done: int, taken: int, before: dict[str, Tensor], now: dict[str, Tensor]
    ) -> None:
        """Go on after step ``done``, ``taken`` batches into a pass that began with ``before``."""
        self.done, self.taken, self.chance, self.resumed = done, taken, before, now

    def _begin_pass(self) -> Iterator[Any]:
        if self.resumed is None:
            self.taken = 0
            self.chance = checkpoints.chance_of(self.loader) if self.remember else {}
            return iter(self.loader)
        # The same pass again: its order, and what its batches draw, follow from chance before it.
        checkpoints.set_chance(self.chance, self.loader)
        batches = iter(self.loader)
        deque(islice(batches, self.taken), maxlen=0)
        checkpoints.set_chance(self.resumed, self.loader)
        self.resumed = None
        return batches


class Saver:
    """Writes the checkpoints of a run, and brings the run back from the newest.

    Without ``config.checkpoint_dir`` it does nothing. While it is open, Ctrl-C waits for the end
    of the step, so that what is saved is whole; a second Ctrl-C does not wait.

    Args:
        recorder: of the run; its model, history and best weights are saved.
        optimizer: its state is saved.
        scaler: likewise.
        batches: their position is saved.
        resume: see ``tlcourse.train.fit``.

    Raises:
        ValueError: as ``fit`` says of ``resume``.
    """

    def __init__(
        self,
        recorder: Recorder,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        batches: StepBatches,
        resume: Resume,
    ) -> None:
        self.recorder, self.optimizer, self.scaler = recorder, optimizer, scaler
        self.batches, self.config = batches, recorder.config
        self.folder = (
            None if self.config.checkpoint_dir is None else Path(self.config.checkpoint_dir)
        )
        self.last_time, self.last_step, self.interrupted = time.monotonic(), 0, False
        self.best_written: int | None = None  # the step of the best weights, if their file is good
        self.processes = recorder.plan.processes
        check_resume(resume, self.folder)
        if self.folder is not None:
            self.processes.any(False)  # none goes on, and writes, before all have looked
            self.run = self._identity()
            if resume == "auto":
                self._resume(self.folder)

    def __enter__(self) -> Saver:
        self.handler: Any = None
        here = threading.current_thread() is threading.main_thread()
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # in the background, say
        if self.folder is not None and here and not ignored:
            self.handler = signal.signal(signal.SIGINT, self._note_interrupt)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self.handler is not None:
            signal.signal(signal.SIGINT, self.handler)
        if kind is None and self.folder is not None and self.last_step < self.recorder.done:
            self._save(self.folder)
        if kind is None and self.interrupted:  # in the evaluation that ended the run, say
            raise KeyboardInterrupt

    def after_step(self) -> None:
        """Save if it is time to."""
        if self.folder is None:
            return
        interrupted = self.processes.any(self.interrupted)
        due = time.monotonic() - self.last_time >= 60 * self.config.checkpoint_minutes
        if self.processes.any(due) or interrupted:
            self._save(self.folder)
        if interrupted:
            raise KeyboardInterrupt

    def _note_interrupt(self, *_: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def _save(self, folder: Path) -> None:
        self.recorder.check_finite()  # what is no good is not saved
        self.processes.align_buffers(self.recorder.model)
        history = self.recorder.history
        best_step = history.best_step
        best = None if best_step is None else (best_step, self.recorder.best_weights)
        facts = {
            "run": self.run, "step": self.recorder.done, "taken": self.batches.taken,
            "since_best": self.recorder.since_best, "scaler": self.scaler.state_dict(),
            "history": asdict(history) | {"seconds": self.recorder.seconds()},
        }  # fmt: skip
        problem, keep, tensors = None, self.config.keep_checkpoints, self._tensors()
        try:
            if self.processes.first:
                checkpoints.write_checkpoint(
                    folder, self.recorder.done, tensors, best, facts, keep,
                    best_is_there=best_step is not None and best_step == self.best_written,
                )  # fmt: skip
            self.best_written = best_step
        except OSError as error:
            problem = error
            print(
                f"No checkpoint of step {self.recorder.done} ({error}); the run goes on.",
                file=sys.stderr,
            )
        if not self.processes.any(problem is not None):  # the others wait here for the first
            self.last_step = self.recorder.done
            self.recorder.last_checkpoint = f"step-{self.last_step:08d} in {folder}"
        self.last_time = time.monotonic()

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"weights.{name}": whole(x) for name, x in self.recorder.weights().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            found = {key: whole(x) for key, x in state.items() if x is not None}
            tensors |= {f"optimizer.{index}.{key}": x for key, x in found.items()}
        now = checkpoints.chance_of(self.batches.loader, self.recorder.val_loader)
        for place, states in (("before", self.batches.chance), ("now", now)):
            tensors |= {f"{place}.{name}": x for name, x in states.items()}
        return tensors

    def _resume(self, folder: Path) -> None:
        found = checkpoints.read_newest(folder)
        if found is None:
            return
        facts = found.facts
        checkpoints.check_same_run(self.run, facts["run"], folder)
        parts: dict[str, dict[str, Tensor]] = {}
        for name, x in found.tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = x
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, x in parts.get("optimizer", {}).items():
            index, _, key = name.partition(".")
            # Averages of a weight are divided as it is; the count of steps is one number.
            weight = weights[int(index)]
            value = as_stored(x, weight) if x.shape == weight.shape else x
            state.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.scaler.load_state_dict(facts["scaler"])
        history = History(**facts["history"])
        self.recorder.go_to(history, facts["since_best"], parts["weights"], found.best)
        ended = history.stopped_early
        done = self.batches.num_steps if ended else facts["step"]
        self.batches.go_to(done, facts["taken"], parts["before"], parts["now"])
        checkpoints.set_generators(parts["now"], self.batches.loader, self.recorder.val_loader)
        self.last_step, self.best_written = facts["step"], history.best_step
        self.recorder.last_checkpoint = f"{found.name} in {folder}"
        if not self.processes.first:
            return
        print(
            f"Going on after step {facts['step']} of {self.batches.num_steps} "
            f"({found.name} in {folder}).",
            file=sys.stderr,
        )

    def _identity(self) -> dict[str, Any]:
        """What must be the same when the run goes on."""
        model = self.recorder.model
        trained = self.recorder.weights()
        frozen = {n: whole(p) for n, p in model.named_parameters() if n not in trained}
        return {
            **{f"config.{k}": v for k, v in checkpoints.settings_of(self.config).items()},
            "num_steps": self.batches.num_steps,
            "batches of an epoch": len(self.batches.loader),
            "what is trained": {name: list(x.shape) for name, x in trained.items()},
            "frozen weights": checkpoints.fingerprint(frozen),
        }


def as_stored(value: Tensor, weight: Tensor) -> Tensor:
    """A whole value, divided among processes as the weight is, or laid out in memory like it.

    A fused optimizer pairs what lies at the same place.
    """
    if hasattr(weight, "full_tensor"):
        return part_like(value, weight)
    return torch.empty_like(weight, dtype=value.dtype, device=value.device).copy_(value)


def check_resume(resume: Resume, folder: Path | None) -> None:
    if resume not in ("never", "auto"):
        raise ValueError(f"resume must be 'never' or 'auto', got {resume!r}")
    if resume == "auto" and folder is None:
        raise ValueError("resume='auto' needs config.checkpoint_dir, got None")
    if resume == "never" and folder is not None and checkpoints.has_checkpoints(folder):
        raise ValueError(
            f"checkpoint_dir {str(folder)!r} holds the checkpoints of a run: pass resume='auto' to "
            "go on with it, or name another folder"
        )
