"""What can be set about a training run: one frozen, validated dataclass."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

Optimizer = Literal["adamw", "sgd"]
Schedule = Literal["cosine", "constant"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Compile = Literal["auto", True, False]
Monitor = Literal["val_loss", "val_accuracy"]
Tracker = Literal["tensorboard", "wandb"]
Penalty = Callable[[Any], Any]  # model -> scalar tensor (or a plain 0)


def no_penalty(model: Any) -> float:
    """The loss is the cross-entropy alone."""
    return 0.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one call of ``tl.fit``. Make a changed copy with ``dataclasses.replace``.

    A *step* is one update of the weights; an *epoch* is one pass over the training loader.
    Give exactly one of ``num_steps`` and ``num_epochs``.

    Attributes:
        lr: peak learning rate, > 0.
        head_lr: peak learning rate of the head, > 0; None: the same as ``lr``.
        layer_decay: each layer learns so many times as fast as the one above it, in (0, 1]
            (see ``tlcourse.freezing.parameter_groups``); None is 1.
        num_steps: length of the run in steps, >= 1.
        num_epochs: length of the run in epochs, >= 1.
        weight_decay: >= 0; decoupled for adamw (Loshchilov & Hutter 2019, arXiv:1711.05101),
            the gradient of an L2 penalty for sgd. Biases and norm scales have none.
        optimizer: "adamw" or "sgd".
        momentum: of sgd, in [0, 1).
        warmup_steps: steps of linear warm-up, >= 0 and shorter than the run.
        schedule: after the warm-up, "cosine" down to zero or "constant".
        max_grad_norm: gradients are scaled down to this L2 norm, > 0; None: never.
        label_smoothing: in [0, 1); for the training loss only.
        penalty: ``penalty(model)`` is added to the loss of every step; a scalar tensor, or 0.
            ``tlcourse.losses.L2SP`` is one. It is part of the recorded training loss.
        precision: "auto" takes what the device does well ("fp32" on a CPU).
        compile: run the model through ``torch.compile``: True, False, or "auto": on a CUDA GPU
            from the step on at which the steps to come should save more time than compiling
            takes; on a CPU never, so that a run gives the same bits each time.
        fsdp: under ``torchrun``, divide weights, gradients and optimizer state among the processes
            (``tlcourse.sharding``); without it each process has all of them. Alone, no effect.
        accumulation_steps: micro-batches (batches of the loader) per step, >= 1.
        eval_every_steps: steps between evaluations, >= 1; None: once per epoch.
        patience: evaluations without improvement before the run stops, >= 1; None: never.
        monitor: which validation number says "best": "val_loss" or "val_accuracy".
        checkpoint_dir: folder for the checkpoints of this one run, from which
            ``fit(..., resume="auto")`` goes on; None: no checkpoints.
        checkpoint_minutes: wall time between two of them, >= 0 (0: after every step). The end of
            a run, Ctrl-C included, is always kept.
        keep_checkpoints: how many of the newest stay, >= 1; the best weights stay besides.
        log_to: None, "tensorboard" or "wandb".
        log_dir: folder in which each logged run gets a folder of its own.
        progress: show a progress bar.
        seed: seeds dropout and whatever else draws from torch's generators in the run.

    Raises:
        ValueError: names the setting, the value and what was expected.
        TypeError: if a number is not a number, or a count is not an int.
    """

    lr: float = 1e-3
    head_lr: float | None = None
    layer_decay: float | None = None
    num_steps: int | None = None
    num_epochs: int | None = None
    weight_decay: float = 0.01
    optimizer: Optimizer = "adamw"
    momentum: float = 0.9
    warmup_steps: int = 0
    schedule: Schedule = "cosine"
    max_grad_norm: float | None = 1.0
    label_smoothing: float = 0.0
    penalty: Penalty = no_penalty
    precision: Precision = "auto"
    compile: Compile = "auto"
    fsdp: bool = False
    accumulation_steps: int = 1
    eval_every_steps: int | None = None
    patience: int | None = None
    monitor: Monitor = "val_loss"
    checkpoint_dir: str | None = None
    checkpoint_minutes: float = 5.0
    keep_checkpoints: int = 2
    log_to: Tracker | None = None
    log_dir: str = "runs"
    progress: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError(
                "give exactly one of num_steps and num_epochs, "
                f"got num_steps={self.num_steps} and num_epochs={self.num_epochs}"
            )
        for name in ("lr", "head_lr", "max_grad_norm"):
            _check_number(name, getattr(self, name), above=0.0, optional=name != "lr")
        _check_number("layer_decay", self.layer_decay, above=0.0, most=1.0, optional=True)
        _check_number("weight_decay", self.weight_decay, least=0.0)
        _check_number("momentum", self.momentum, least=0.0, below=1.0)
        _check_number("label_smoothing", self.label_smoothing, least=0.0, below=1.0)
        for name in ("num_steps", "num_epochs", "eval_every_steps", "patience"):
            _check_count(name, getattr(self, name), least=1, optional=True)
        _check_count("accumulation_steps", self.accumulation_steps, least=1)
        _check_count("keep_checkpoints", self.keep_checkpoints, least=1)
        _check_number("checkpoint_minutes", self.checkpoint_minutes, least=0.0)
        _check_count("warmup_steps", self.warmup_steps, least=0)
        _check_count("seed", self.seed, least=0)
        if self.num_steps is not None and self.warmup_steps >= self.num_steps:
            raise ValueError(
                f"warmup_steps must be less than num_steps={self.num_steps}, "
                f"got {self.warmup_steps}"
            )
        if self.checkpoint_dir is not None and not isinstance(self.checkpoint_dir, str):
            raise TypeError(f"checkpoint_dir must be a str or None, got {self.checkpoint_dir!r}")
        if not isinstance(self.fsdp, bool):
            raise TypeError(f"fsdp must be True or False, got {self.fsdp!r}")
        if not callable(self.penalty):
            raise TypeError(f"penalty must be a function of the model, got {self.penalty!r}")
        _check_choice("optimizer", self.optimizer, get_args(Optimizer))
        _check_choice("schedule", self.schedule, get_args(Schedule))
        _check_choice("precision", self.precision, get_args(Precision))
        _check_choice("compile", self.compile, get_args(Compile))
        _check_choice("monitor", self.monitor, get_args(Monitor))
        _check_choice("log_to", self.log_to, (None, *get_args(Tracker)))
        for name, value in vars(self).items():
            if isinstance(value, numbers.Number) and hasattr(value, "item"):
                object.__setattr__(self, name, value.item())  # NumPy's, which JSON does not know


def _check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float = math.inf,
    most: float = math.inf,
    optional: bool = False,
) -> None:
    """Refuse what is not a finite number in the range; the error shows the range."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    value = float(value)
    low_ok = (above is None or value > above) and (least is None or value >= least)
    if not (math.isfinite(value) and low_ok and value < below and value <= most):
        wanted = f"> {above:g}" if above is not None else f">= {least:g}"
        wanted += f" and < {below:g}" if math.isfinite(below) else ""
        wanted += f" and <= {most:g}" if math.isfinite(most) else ""
        raise ValueError(f"{name} must be {wanted}, got {value}")


def _check_count(name: str, value: Any, *, least: int, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")
