"""A run besides its loop: the plan made before it, the record kept of it, its best weights."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from tlcourse import runtime, tracking
from tlcourse.config import TrainConfig
from tlcourse.evaluation import score
from tlcourse.inference import Loader, check_range, check_targets, device_of
from tlcourse.processes import Processes, join_processes
from tlcourse.sharding import assign, whole

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_EXPLODED = 1e5  # times the first loss (or 1, if that is more)
_STEPS_PER_LOOK = {"cpu": 1}  # where a look at the loss is free
_INTERRUPTS_RAISE: ContextVar[bool] = ContextVar("interrupts_raise", default=False)


@dataclass
class History:
    """What happened in a run.

    Attributes:
        step: 1, 2, ..., one entry per update of the weights.
        train_loss: mean training loss over the examples of each step, before its update.
        lr: learning rate of each step (of the head, if it has its own and learns alone).
        eval_step: steps after which the validation set was read.
        val_loss: mean cross-entropy per validation example, at each ``eval_step``.
        val_accuracy: fraction of the validation examples, likewise.
        best_step: the ``eval_step`` whose weights the model has now; None: those of the last
            step.
        seconds: wall time of the run.
        stop_reason: "finished", "patience" (see ``TrainConfig``) or "interrupted" (by Ctrl-C).
    """

    step: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    eval_step: list[int] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    val_accuracy: list[float] = field(default_factory=list)
    best_step: int | None = None
    seconds: float = 0.0
    stop_reason: Literal["finished", "patience", "interrupted"] = "finished"

    @property
    def stopped_early(self) -> bool:
        """Whether the run ended because the validation number no longer improved."""
        return self.stop_reason == "patience"

    def __repr__(self) -> str:
        text = f"History({len(self.step)} steps in {self.seconds:.1f} s, {self.stop_reason}"
        if self.best_step is not None:
            at = self.eval_step.index(self.best_step)
            text += f"; best step {self.best_step}: val_loss {self.val_loss[at]:.4f}, "
            text += f"val_accuracy {self.val_accuracy[at]:.4f}"
        return text + ")"


class TrainingDiverged(RuntimeError):
    """The loss, or a weight, became NaN or infinite. ``history`` holds the run up to there."""

    def __init__(self, message: str, history: History) -> None:
        super().__init__(message, history)  # both, so that it can be sent between processes
        self.history = history

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def interrupts_raise() -> Iterator[None]:
    """Inside, Ctrl-C in ``fit`` still keeps the best weights, but then ends the caller too."""
    token = _INTERRUPTS_RAISE.set(True)
    try:
        yield
    finally:
        _INTERRUPTS_RAISE.reset(token)


@dataclass(frozen=True)
class Plan:
    """What follows from model, loader and config before the first step."""

    config: TrainConfig
    device: torch.device
    dtype: torch.dtype
    num_steps: int
    steps_per_epoch: int
    all_targets: torch.Tensor | None  # of the training loader, if it has them
    processes: Processes = field(default_factory=Processes)

    def lr_factor(self, step: int) -> float:
        return lr_factor(step, self.num_steps, self.config.warmup_steps, self.config.schedule)

    def no_autocast(self) -> AbstractContextManager[Any]:
        """For the whole run: what the caller has switched on is off, in backward passes, too."""
        if not torch.is_autocast_enabled(self.device.type):
            return nullcontext()
        return torch.autocast(self.device.type, enabled=False)

    def autocast(self) -> AbstractContextManager[Any]:
        """For forward passes, inside ``no_autocast``."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def evaluates_after(self, step: int) -> bool:
        every = self.config.eval_every_steps or self.steps_per_epoch
        return step % every == 0 or step == self.num_steps


def lr_factor(step: int, num_steps: int, warmup_steps: int, schedule: str) -> float:
    """What the learning rate is multiplied by.

    Linear warm-up, then constant or half a cosine (Loshchilov & Hutter 2017, equation 5,
    without restarts, arXiv:1608.03983).

    Args:
        step: updates made so far, from 0.
        num_steps: length of the run; the factor would reach 0 at this step.
        warmup_steps: factor (step + 1) / warmup_steps until it is 1.
        schedule: "cosine" or "constant".
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def make_plan(
    model: nn.Module, train_loader: Loader, val_loader: Loader | None, config: TrainConfig
) -> Plan:
    """Check that the run can work, and count its steps.

    Raises:
        ValueError: as ``fit`` says.
        TypeError: if a loader has no length.
    """
    for name, loader in (("training", train_loader), ("validation", val_loader)):
        if loader is None:
            continue
        if not hasattr(loader, "__len__"):
            raise TypeError(f"the {name} loader must have a length, got {type(loader).__name__}")
        if len(loader) == 0:
            raise ValueError(f"the {name} loader is empty: its length is 0")
    if config.patience is not None and val_loader is None:
        raise ValueError(f"patience={config.patience} needs a val_loader, got None")
    steps_per_epoch = math.ceil(len(train_loader) / config.accumulation_steps)
    num_steps = config.num_steps or (config.num_epochs or 0) * steps_per_epoch
    if config.warmup_steps >= num_steps:
        raise ValueError(
            f"warmup_steps must be less than the {num_steps} steps of the run, "
            f"got {config.warmup_steps}"
        )
    device, precision = device_of(model), str(config.precision)
    dtype = _DTYPES[runtime.default_precision(device) if precision == "auto" else precision]
    targets = getattr(train_loader, "targets", None)
    known = isinstance(targets, torch.Tensor) and targets.dtype == torch.int64
    all_targets = targets if known else None
    processes = join_processes(device)
    return Plan(config, device, dtype, num_steps, steps_per_epoch, all_targets, processes)


class Recorder:
    """Keeps the history and the best weights of a run, and decides when it ends.

    Losses stay on the device and are looked at every so many steps, as each look makes the
    CPU wait for a GPU.
    """

    def __init__(
        self, model: nn.Module, val_loader: Loader | None, config: TrainConfig, plan: Plan
    ) -> None:
        self.model, self.val_loader, self.config, self.plan = model, val_loader, config, plan
        self.history = History()
        self.best_weights = self._copy_weights()
        self.pending: list[torch.Tensor] = []
        self.steps_per_look = _STEPS_PER_LOOK.get(plan.device.type, 20)
        self.labels_fit = False
        self.unseen_targets: list[torch.Tensor] = []  # least and largest of each batch
        self.num_classes = 0
        self.done = 0
        self.since_best = 0
        self.seconds_before = 0.0  # of the run, in processes before this one
        self.last_checkpoint: str | None = None

    def __enter__(self) -> Recorder:
        with ExitStack() as cleanup:  # undone at once if the tracker's package is missing
            cleanup.callback(self.model.eval)
            speaks = self.plan.processes.first
            self.tracker = tracking.make_tracker(self.config) if speaks else tracking.Tracker()
            cleanup.callback(self.tracker.close)
            bar = tracking.progress_bar(self.plan.num_steps, self.config.progress and speaks)
            self.bar = cleanup.enter_context(bar)
            self.cleanup = cleanup.pop_all()
        self.start = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: Any) -> bool:
        interrupted = kind is KeyboardInterrupt
        self.history.seconds = self.seconds()
        with self.cleanup:
            if kind is None or interrupted:
                self._finish(interrupted)
        return interrupted and not _INTERRUPTS_RAISE.get()

    def checked(self, targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Targets that fit the logits (``check_targets``), looked at as seldom as is safe.

        All labels of a loader that shows them are looked at before the first step. Labels on a
        GPU, in the first epoch of another loader, are looked at together with the losses: until
        then, one outside the range counts as no label.
        """
        if self.plan.all_targets is not None and not self.labels_fit:
            check_range(self.plan.all_targets, logits.shape[1])
            self.labels_fit = True
        if len(targets) != len(logits) or not (self.labels_fit or targets.is_cuda):
            check_targets(targets, logits)
        elif not self.labels_fit and self.done < self.plan.steps_per_epoch:
            self.num_classes = logits.shape[1]
            self.unseen_targets.append(torch.stack(torch.aminmax(targets)))
            outside = (targets < 0) | (targets >= self.num_classes)
            return targets.masked_fill(outside, -100)  # which cross_entropy leaves out
        return targets

    def record(self, loss: torch.Tensor, lr: float) -> None:
        """Take the loss of the step just made, and the learning rate it was made with."""
        self.done += 1
        self.pending.append(loss)
        self.history.step.append(self.done)
        self.history.lr.append(lr)
        if len(self.pending) >= self.steps_per_look:
            self._look_at_losses()
        self.bar.update()

    def should_stop(self) -> bool:
        """Evaluate if it is time to; True if patience has run out."""
        if self.val_loader is None or not self.plan.evaluates_after(self.done):
            return False
        self._look_at_losses()
        with self.plan.autocast():
            self.plan.processes.align_buffers(self.model)
            # Divided weights come together in every forward pass, so all processes need as many.
            share = None if self.config.fsdp else self.plan.processes
            self.note(*score(self.model, self.val_loader, share))
        return self.history.stopped_early

    def note(self, loss: float, accuracy: float) -> None:
        """Take the numbers of an evaluation; keep the weights if they are the best so far."""
        if not math.isfinite(loss):
            self._diverge(f"the validation loss became {loss}", self.done)
        history = self.history
        history.eval_step.append(self.done)
        history.val_loss.append(loss)
        history.val_accuracy.append(accuracy)
        self.tracker.log(self.done, **{"val/loss": loss, "val/accuracy": accuracy})
        self.since_best += 1
        if self._is_best():
            self.since_best, history.best_step = 0, self.done
            self.best_weights = self._copy_weights()
        if self.config.patience is not None and self.since_best >= self.config.patience:
            history.stop_reason = "patience"

    def go_to(
        self,
        history: History,
        since_best: int,
        weights: dict[str, torch.Tensor],
        best_weights: dict[str, torch.Tensor] | None,
    ) -> None:
        """Take up a run where a checkpoint left it."""
        self.history, self.since_best, self.done = history, since_best, len(history.step)
        self.seconds_before = history.seconds
        self._restore(weights)
        if best_weights is not None:
            self.best_weights = best_weights
        self.bar.update(self.done)

    def seconds(self) -> float:
        """Wall time of the run so far."""
        return self.seconds_before + time.perf_counter() - self.start

    def check_finite(self) -> None:
        """Look at all losses and weights.

        Raises:
            TrainingDiverged: if one is NaN or infinite.
        """
        self._look_at_losses()
        if not all(bool(torch.isfinite(whole(p)).all()) for p in self.model.parameters()):
            self._diverge("a weight became NaN or infinite", self.done)

    def _is_best(self) -> bool:
        values = getattr(self.history, self.config.monitor)
        if self.config.monitor == "val_accuracy":
            return values[-1] > max(values[:-1], default=-math.inf)
        return values[-1] < min(values[:-1], default=math.inf)

    def _look_at_losses(self) -> None:
        if not self.pending:
            return
        if self.unseen_targets:
            extremes = torch.cat(self.unseen_targets)
            self.unseen_targets.clear()
            try:
                check_range(extremes, self.num_classes)
            except ValueError:
                self._restore(self.best_weights)
                raise
        several = len(self.pending) > 1  # one transfer for all
        losses = torch.stack(self.pending).tolist() if several else [self.pending[0].item()]
        self.pending.clear()
        history = self.history
        for loss in losses:
            history.train_loss.append(loss)
            step = len(history.train_loss)
            if not math.isfinite(loss):
                self._diverge(f"the training loss became {loss}", step)
            if loss > _EXPLODED * max(1.0, history.train_loss[0]):
                self._diverge(f"the training loss exploded to {loss:.3g}", step)
            if self.config.log_to is not None:
                self.tracker.log(step, **{"train/loss": loss, "train/lr": history.lr[step - 1]})
        if not self.bar.disable:
            self.bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)

    def _finish(self, interrupted: bool) -> None:
        if interrupted:
            self.history.stop_reason = "interrupted"
            print(f"Interrupted after step {self.done}.", file=sys.stderr)
        self._look_at_losses()
        self.plan.processes.align_buffers(self.model)
        if self.history.best_step is not None:
            self._restore(self.best_weights)
        else:
            self.check_finite()

    def _diverge(self, problem: str, step: int) -> None:
        self._restore(self.best_weights)
        best = self.history.best_step
        kept = "from before training" if best is None else f"of step {best}"
        saved = "" if self.last_checkpoint is None else f"; last checkpoint: {self.last_checkpoint}"
        raise TrainingDiverged(
            f"{problem} at step {step} of {self.plan.num_steps}, "
            f"lr {self.history.lr[step - 1]:.3g}; the model has the weights {kept} again{saved}. "
            "Try a smaller lr, a warm-up, or max_grad_norm.",
            self.history,
        )

    def weights(self) -> dict[str, torch.Tensor]:
        """All that training can change: trainable parameters and buffers."""
        trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        return trainable | dict(self.model.named_buffers())

    def _copy_weights(self) -> dict[str, torch.Tensor]:
        return {n: whole(t).detach().to("cpu", copy=True) for n, t in self.weights().items()}

    def _restore(self, saved: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self.weights().items():
                if name in saved:
                    assign(tensor, saved[name])
