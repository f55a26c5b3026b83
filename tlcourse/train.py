"""Training: ``fit`` is the one loop of the course."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from tlcourse.compiling import Forward
from tlcourse.config import TrainConfig, no_penalty
from tlcourse.freezing import parameter_groups
from tlcourse.inference import Loader, device_of
from tlcourse.processes import has_rows, take_rows
from tlcourse.recording import History, Plan, Recorder, TrainingDiverged, make_plan
from tlcourse.resuming import MicroBatch, Resume, Saver, StepBatches
from tlcourse.sharding import sharded, whole


def fit(
    model: nn.Module,
    train_loader: Loader,
    val_loader: Loader | None,
    config: TrainConfig,
    resume: Resume = "never",
) -> History:
    """Train a classifier, and leave it with its best weights, in evaluation mode.

    The loss is cross-entropy, averaged over all examples of a step (so that a short last
    micro-batch does not count more per example), plus ``config.penalty``. The run uses torch's
    random generators seeded with ``config.seed``; afterwards they are as before. Ctrl-C ends
    the run and keeps the best weights so far (without any evaluation: the present ones).

    On a GPU, a loader that can (``BatchLoader``) moves its data there, convolutions take the
    memory order "channels last", and losses are looked at every 20 steps, so that no step waits.
    When the GPU's memory runs out, micro-batches are cut in halves, as often as needed: each step
    still sees the same examples (but BatchNorm takes its statistics over smaller batches).

    Started by ``torchrun``, the processes share the work: each makes the same batches and computes
    its rows of them, so the run is that of one process with these batches, to rounding. Dropout
    and BatchNorm see the rows of their process. (Then out of memory is an error.)

    Args:
        model: gives logits, shape (B, K), or an object with such ``.logits``; stays on its
            device. Modules frozen with ``tl.freeze`` do not change in any way.
        train_loader: see ``tlcourse.inference.Loader``.
        val_loader: likewise; decides which weights are best. None: the last weights stay.
        config: see ``TrainConfig``.
        resume: "auto" goes on from the newest good checkpoint in ``config.checkpoint_dir``, or
            starts there if it has none; model and loaders must be made as they were at the
            start. On a CPU the run then ends with the bits of one that was never stopped. A run
            that had ended gives its result at once. "never" refuses a folder with checkpoints.

    Raises:
        ValueError: if nothing is trainable, a loader is empty, a batch or a label does not fit
            the model, ``patience`` is set without ``val_loader``, the warm-up is longer than
            the run, or the checkpoints are of a run with other settings.
        TrainingDiverged: if the loss or a weight becomes NaN or infinite, or the loss explodes;
            the model has its best weights so far, else those it came with.
    """
    plan = make_plan(model, train_loader, val_loader, config)
    train_loader = resident(train_loader, plan.device)
    val_loader = None if val_loader is None else resident(val_loader, plan.device)
    with (
        seeded(config.seed),
        plan.no_autocast(),
        fast_convolutions(model),
        sharded(model, plan.processes, config.fsdp, TrainingDiverged) as trained,
    ):
        return _train(trained, train_loader, val_loader, plan, resume)


def _train(
    model: nn.Module, train_loader: Loader, val_loader: Loader | None, plan: Plan, resume: Resume
) -> History:
    """The loop."""
    config, optimizer = plan.config, make_optimizer(model, plan.config)
    # fp16 only. Torch's own first scale, 2**16, often overflows and wastes the first steps.
    scaler = torch.amp.GradScaler(
        plan.device.type, init_scale=2.0**12, enabled=plan.dtype == torch.float16
    )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    peak_lrs = [group["lr"] for group in optimizer.param_groups]
    remember = config.checkpoint_dir is not None
    batches = StepBatches(train_loader, plan.num_steps, config.accumulation_steps, remember)
    with (
        Recorder(model, val_loader, config, plan) as recorder,
        Saver(recorder, optimizer, scaler, batches, resume) as saver,
    ):
        forward = Forward(model, config.compile, plan.num_steps, plan.processes)
        gradient = StepGradient(forward, scaler, recorder)
        model.train()
        for parameter in trainable:  # what an earlier backward pass may have left
            parameter.grad = None
        for micro_batches in batches:
            factor = plan.lr_factor(recorder.done)
            for group, peak_lr in zip(optimizer.param_groups, peak_lrs, strict=True):
                group["lr"] = peak_lr * factor
            loss = gradient(micro_batches)
            if config.max_grad_norm is not None:
                scaler.unscale_(optimizer)  # the norm of the true gradient is meant
                clip(trainable, config.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            for parameter in trainable:  # optimizer.zero_grad(), without its entry in profiles
                parameter.grad = None
            recorder.record(loss, float(optimizer.param_groups[0]["lr"]))
            forward.after_step(recorder.done)
            if recorder.should_stop():
                break
            saver.after_step()
    return recorder.history


class StepGradient:
    """Forward and backward pass of one step, in as many pieces as the memory needs.

    Args:
        forward: inputs -> logits, shape (B, K).
        scaler: scales the loss for fp16.
        recorder: of the run; checks labels against logits.
    """

    def __init__(self, forward: Forward, scaler: torch.amp.GradScaler, recorder: Recorder) -> None:
        self.forward, self.scaler, self.recorder = forward, scaler, recorder
        self.model, self.config, self.plan = recorder.model, recorder.config, recorder.plan
        self.pieces = 1  # that each micro-batch is cut into

    def __call__(self, micro_batches: list[MicroBatch]) -> torch.Tensor:
        """Leave the gradient of the step in the parameters; return its mean loss, a scalar."""
        while True:
            try:
                return self._backward(self._cut(micro_batches))
            except torch.OutOfMemoryError:
                if not self._can_halve(micro_batches):
                    raise
            # Out here the traceback, and with it the tensors of the pass, are gone.
            self._halve(micro_batches)

    def _backward(self, micro_batches: list[MicroBatch]) -> torch.Tensor:
        processes = self.plan.processes
        num_examples = sum(len(targets) for _, targets in micro_batches)
        step_loss: torch.Tensor | None = None
        for number, batch in enumerate(micro_batches, start=1):
            inputs, targets, count = processes.rows(*batch)  # all of them, if there is one process
            with processes.waiting(self.forward.model, last=number == len(micro_batches)):
                with self.plan.autocast():
                    logits = self.forward(inputs)  # (B, K)
                targets = self.recorder.checked(targets, logits)
                targets = targets.to(self.plan.device, non_blocking=True)
                loss = F.cross_entropy(logits, targets, label_smoothing=self.config.label_smoothing)
                if self.config.penalty is not no_penalty:
                    loss = loss + self.config.penalty(self.model)
                share = count / num_examples * processes.size  # gradients of processes are averaged
                if share != 1:
                    loss = loss * share  # so that all together is the mean over the step
                self.scaler.scale(loss).backward()
            step_loss = loss.detach() if step_loss is None else step_loss + loss.detach()
        assert step_loss is not None
        return step_loss if processes.size == 1 else processes.sum(step_loss) / processes.size

    def _cut(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        if self.pieces == 1:
            return micro_batches
        return [piece for batch in micro_batches for piece in cut(batch, self.pieces)]

    def _can_halve(self, micro_batches: list[MicroBatch]) -> bool:
        if self.plan.processes.size > 1:  # the others are in the middle of the step
            return False
        largest = max(len(targets) for _, targets in micro_batches)
        return self.pieces < largest and all(has_rows(*batch) for batch in micro_batches)

    def _halve(self, micro_batches: list[MicroBatch]) -> None:
        self.pieces *= 2
        for parameter in self.model.parameters():
            parameter.grad = None
        if self.plan.device.type == "cuda":
            torch.cuda.empty_cache()
        largest = max(len(targets) for _, targets in self._cut(micro_batches))
        print(
            f"Out of memory in step {self.recorder.done + 1}: the run goes on with at most "
            f"{largest} examples at a time, the same batch in each step.",
            file=sys.stderr,
        )


def clip(parameters: list[nn.Parameter], max_norm: float) -> None:
    """``clip_grad_norm_``; on a CPU, where looking is free, without multiplying by one."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients and hasattr(gradients[0], "full_tensor"):  # divided among processes
        norm = whole(nn.utils.get_total_norm(gradients))
        for gradient in gradients:
            gradient.mul_(min(1.0, max_norm / (norm.item() + 1e-6)))
    elif gradients and gradients[0].is_cpu:
        norm = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).norm()
        if not norm.item() + 1e-6 <= max_norm:  # NaN is not, either
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    else:
        nn.utils.clip_grad_norm_(parameters, max_norm)


def cut(batch: MicroBatch, pieces: int) -> list[MicroBatch]:
    """A batch of B examples as up to ``pieces`` batches of nearly equal size."""
    inputs, targets = batch
    rows = torch.arange(len(targets)).tensor_split(min(pieces, len(targets)))
    parts = [slice(int(part[0]), int(part[-1]) + 1) for part in rows]
    return [(take_rows(inputs, part), targets[part]) for part in parts]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD over ``parameter_groups``."""
    groups = parameter_groups(
        model, config.lr, config.weight_decay, config.head_lr, config.layer_decay
    )
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    # Fused: one kernel updates all tensors, where torch's default starts about 15 for each. Sums
    # come in another order, so the last bits are not those of the default.
    fused = all(is_dense(p) and p.is_floating_point() for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=config.lr, fused=fused or None)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether its numbers lie side by side, in any order; a fused kernel would walk into a gap."""
    if hasattr(tensor, "full_tensor"):  # divided among processes: each part was made dense
        return True
    # Only of a dense tensor a copy has the same strides.
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def resident(loader: Loader, device: torch.device) -> Loader:
    """The loader with its data on the device, where it can (see ``BatchLoader.resident``)."""
    return loader.resident(device) if hasattr(loader, "resident") else loader


@contextmanager
def fast_convolutions(model: nn.Module) -> Iterator[None]:
    """On a GPU, store 4-D weights channels last, and let cuDNN try which algorithm is fastest."""
    if device_of(model).type != "cuda":
        yield
        return
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators inside; outside, on the CPU and on CUDA, they go on as if unused."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield
