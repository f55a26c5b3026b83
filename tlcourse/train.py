"""Training: ``fit`` is the one loop of the course."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from tlcourse.config import TrainConfig
from tlcourse.freezing import parameter_groups
from tlcourse.inference import Inputs, Loader, device_of, forward, unpack
from tlcourse.recording import History, Recorder, make_plan


def fit(
    model: nn.Module, train_loader: Loader, val_loader: Loader | None, config: TrainConfig
) -> History:
    """Train a classifier, and leave it with its best weights, in evaluation mode.

    The loss is cross-entropy, averaged over all examples of a step (so that a short last
    micro-batch does not count more per example), plus ``config.penalty``. The run uses torch's
    random generators seeded with ``config.seed``; afterwards they are as before. Ctrl-C ends
    the run and keeps the best weights so far (without any evaluation: the present ones).

    Args:
        model: gives logits, shape (B, K), or an object with such ``.logits``; stays on its
            device. Modules frozen with ``tl.freeze`` do not change in any way.
        train_loader: see ``tlcourse.inference.Loader``.
        val_loader: likewise; decides which weights are best. None: the last weights stay.
        config: see ``TrainConfig``.

    Raises:
        ValueError: if nothing is trainable, a loader is empty, a batch or a label does not fit
            the model, ``patience`` is set without ``val_loader``, or the warm-up is longer
            than the run.
        TrainingDiverged: if the loss or a weight becomes NaN or infinite; the model has its
            best weights so far, else those it came with.
    """
    plan = make_plan(model, train_loader, val_loader, config)
    optimizer = make_optimizer(model, config)
    scheduler = LambdaLR(optimizer, plan.lr_factor)
    # fp16 only. Torch's own first scale, 2**16, often overflows and wastes the first steps.
    scaler = torch.amp.GradScaler(
        plan.device.type, init_scale=2.0**12, enabled=plan.dtype == torch.float16
    )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    with seeded(config.seed), Recorder(model, val_loader, config, plan) as recorder:
        model.train()
        for micro_batches in step_batches(train_loader, plan.num_steps, config.accumulation_steps):
            num_examples = sum(len(targets) for _, targets in micro_batches)
            step_loss = torch.zeros((), device=plan.device)
            for inputs, targets in micro_batches:
                with plan.autocast():
                    logits = forward(model, inputs)  # (B, K)
                recorder.check_labels(targets, logits)
                targets = targets.to(plan.device, non_blocking=True)
                loss = F.cross_entropy(logits, targets, label_smoothing=config.label_smoothing)
                loss = loss + config.penalty(model)
                loss = loss * (len(targets) / num_examples)  # its share of the step's mean
                scaler.scale(loss).backward()
                step_loss += loss.detach()
            if config.max_grad_norm is not None:
                scaler.unscale_(optimizer)  # the norm of the true gradient is meant
                nn.utils.clip_grad_norm_(trainable, config.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            lr = float(scheduler.get_last_lr()[0])
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            recorder.record(step_loss, lr)
            if recorder.should_stop():
                break
    return recorder.history


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD over ``parameter_groups``."""
    groups = parameter_groups(
        model, config.lr, config.weight_decay, config.head_lr, config.layer_decay
    )
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    # One kernel for all parameters on a GPU. On the CPU torch's default, so that a loop
    # written out by hand gives the same bits.
    fused = device_of(model).type == "cuda"
    return torch.optim.AdamW(groups, lr=config.lr, fused=fused or None)


def step_batches(
    loader: Loader, num_steps: int, accumulation_steps: int
) -> Iterator[list[tuple[Inputs, torch.Tensor]]]:
    """Yield, ``num_steps`` times, the micro-batches of one step.

    Passes over the loader as often as needed. A step never spans two epochs: the last of an
    epoch may have fewer micro-batches.
    """
    done = 0
    while done < num_steps:
        batches, before = iter(loader), done
        while done < num_steps and (group := list(islice(batches, accumulation_steps))):
            yield [unpack(batch) for batch in group]
            done += 1
        if done == before:
            raise ValueError("the training loader is empty: it gave no batch")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators inside; outside, on the CPU and on CUDA, they go on as if unused."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield
