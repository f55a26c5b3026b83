"""Models of one architecture, one for each seed, say, trained in one loop: ``fit_many``.

A step of a small network is mostly overhead: Python, and the start of each operation. Here the
weights are stacked, a row for each model, and each operation works on all rows at once
(``torch.func.vmap``), so that the overhead is paid once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tlcourse import recording, tracking
from tlcourse.config import TrainConfig
from tlcourse.inference import Loader, check_targets
from tlcourse.recording import History, Plan, Recorder, TrainingDiverged, make_plan
from tlcourse.resuming import MicroBatch
from tlcourse.stacking import Source, Stack, alike, collate, cross_entropy, obstacle, trial
from tlcourse.train import fit, make_optimizer, resident

Run = tuple[nn.Module, Loader, Loader | None, TrainConfig]  # what fit takes
Result = tuple[TrainConfig, History, TrainingDiverged | None]


class SomeDiverged(TrainingDiverged):
    """Some models diverged; ``histories`` holds the runs of all, ``history`` the first of them."""

    def __init__(self, message: str, history: History, histories: list[History]) -> None:
        super().__init__(message, history)
        self.histories = histories
        self.args = (message, history, histories)  # all, so that it can be sent between processes


def fit_many(
    models: Sequence[nn.Module],
    train_loaders: Loader | Sequence[Loader],
    val_loader: Loader | None,
    config: TrainConfig,
    seeds: Sequence[int] | None = None,
) -> list[History]:
    """Train N models at once; each as by ``fit(model, train_loader, val_loader, config)``.

    Histories and weights agree with those of ``fit`` to rounding: sums are taken in another
    order, and long training can make such a difference larger. What cannot be stacked with the
    same results (active dropout, a penalty, half precision, logs, models that are not alike,
    ...) is trained by ``fit``, one model after another; a printed line says why.

    Args:
        models: N modules of one architecture, each as for ``fit``. They may share frozen parts;
            what is frozen and equal in all is computed once where the inputs allow it.
        train_loaders: a loader for each model, or a single one, read once: all models get the
            same batches. (One after another, each model makes passes of its own over it.)
        val_loader: as for ``fit``; read once for all, so it must give the same each time.
        config: of every model.
        seeds: one for each model, in place of ``config.seed``; None: that one for all.

    Returns:
        One history for each model; its ``seconds`` count until that model was done.

    Raises:
        ValueError, TypeError: as ``fit`` says; or if ``checkpoint_dir`` is set, there is no model,
            a model or a loader is given twice, models share a trainable parameter, or there are
            not N loaders or seeds.
        SomeDiverged: at the end, if models diverged (each has its best weights so far); names
            them. The others are trained to their end.
    """
    runs = _check(list(models), train_loaders, val_loader, config, seeds)
    plans = [make_plan(*run) for run in runs]
    reason = obstacle(runs, plans[0])
    if reason is None:
        shared = runs[-1][1] is runs[0][1] and len(runs) > 1
        readers = list(zip(runs, plans, strict=True))[: 1 if shared else None]
        sources = [Source(run[1], plan) for run, plan in readers]
        reason = trial([run[0] for run in runs], sources)
        # Their first pass has begun, so from here on they stand for the loaders.
        runs = [(m, sources[0 if shared else i], v, c) for i, (m, _, v, c) in enumerate(runs)]
    if reason is not None:
        print(f"fit_many trains the models one after another: {reason}.")
        return _one_after_another(runs)
    with ExitStack() as cleanup:
        cleanup.enter_context(plans[0].no_autocast())
        return Together(runs, sources, plans, cleanup).train()


class Together:
    """The run of all models: the loop of ``fit``, with a lane for each model that still trains."""

    def __init__(
        self, runs: list[Run], sources: list[Source], plans: list[Plan], cleanup: ExitStack
    ) -> None:
        self.sources, self.plan, self.config = sources, plans[0], plans[0].config
        self.val_loader = runs[0][2] and resident(runs[0][2], self.plan.device)
        self.stack = Stack([run[0] for run in runs])
        cleanup.callback(self.stack.release)  # whatever happens, each model gets its weights back
        self.stack.bind()
        self.optimizer = make_optimizer(runs[0][0], self.config)
        for group in self.optimizer.param_groups:
            group["params"] = [self.stack.rows[name] for name in group["names"]]
        self.everyone = [Lane(*run, plan) for run, plan in zip(runs, plans, strict=True)]
        self.lanes = list(self.everyone)
        for lane in self.lanes:
            cleanup.enter_context(lane)
        bar = tracking.progress_bar(self.plan.num_steps, self.config.progress)
        self.bar = cleanup.enter_context(bar)

    def train(self) -> list[History]:
        groups, interrupted = self.optimizer.param_groups, False
        peak_lrs = [group["lr"] for group in groups]
        try:
            for step in range(self.plan.num_steps):
                for group, peak_lr in zip(groups, peak_lrs, strict=True):
                    group["lr"] = peak_lr * self.plan.lr_factor(step)
                losses = self.gradients([source.next_step() for source in self.sources])  # (M,)
                if self.config.max_grad_norm is not None:
                    self.clip(self.config.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                for lane, loss in zip(self.lanes, losses.unbind(), strict=True):
                    lane.attempt(lane.record, loss, float(groups[0]["lr"]))
                if self.val_loader is not None and self.plan.evaluates_after(step + 1):
                    self.evaluate(self.val_loader)
                self.bar.update()
                self.drop_what_has_stopped()
                if not self.lanes:
                    break
        except KeyboardInterrupt:
            interrupted = True
            print(f"Interrupted after step {self.lanes[0].done}.", file=sys.stderr)
        for lane in self.lanes:
            lane.finish(interrupted)
        if interrupted and recording._INTERRUPTS_RAISE.get():
            raise KeyboardInterrupt
        return _histories([(lane.config, lane.history, lane.error) for lane in self.everyone])

    def gradients(self, steps: list[list[MicroBatch]]) -> Tensor:
        """Add each model's gradient of its step's mean loss to its row; returns losses, (M,).

        Args:
            steps: of each model (or of all) the micro-batches of a step.
        """
        losses: Tensor | None = None
        for rows, members in alike(steps):
            num_examples = sum(len(targets) for _, targets in members[0])
            for batches in zip(*members, strict=True):
                inputs, targets = collate(batches)  # targets: (M, B), or (1, B) for all models
                logits = self.stack.logits(inputs, rows, each=len(steps) > 1)  # (M, B, K)
                first_epoch = self.lanes[0].done < self.plan.steps_per_epoch
                if targets.device.type == "cpu" or first_epoch:  # later, a GPU need not wait
                    check_targets(targets.flatten(), logits[: len(targets)].flatten(0, 1))
                loss = cross_entropy(logits, targets, self.config.label_smoothing).mean(1)
                if targets.shape[1] < num_examples:
                    loss = loss * (targets.shape[1] / num_examples)  # its share of the step's mean
                loss.sum().backward()  # no model's loss depends on another's weights
                if losses is None:
                    losses = loss.detach().new_zeros(len(self.lanes))
                losses[rows] += loss.detach()
        assert losses is not None
        return losses

    def clip(self, max_norm: float) -> None:
        """As ``nn.utils.clip_grad_norm_``, for each row."""
        grads = [x.grad for x in self.stack.rows.values() if x.grad is not None]
        norms = [torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in grads]
        norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)  # (M,)
        factors = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if factors.is_cpu and bool((factors == 1.0).all()):
            return
        for grad in grads:
            grad.mul_(factors.view(-1, *[1] * (grad.ndim - 1)))

    def evaluate(self, loader: Loader) -> None:
        """Score all models; each lane then knows whether it is to stop."""
        chance = self.sources[0].state
        with self.sources[0].chance():
            scores = self.stack.score(loader)
        if not torch.equal(chance, self.sources[0].state):
            # A pass draws from torch's generator (so does a DataLoader's): each run its own.
            for row, source in enumerate(self.sources[1:], start=1):
                with source.chance():
                    scores[row] = self.stack.score(loader, slice(row, row + 1))[0]
        for lane, (loss, accuracy) in zip(self.lanes, scores, strict=True):
            lane.attempt(lane._look_at_losses)
            lane.attempt(lane.note, loss, accuracy)

    def drop_what_has_stopped(self) -> None:
        going = [i for i, lane in enumerate(self.lanes) if not lane.stopped]
        if len(going) == len(self.lanes):
            return
        for lane in self.lanes:
            if lane.stopped:
                lane.finish()
        self.stack.keep(going, self.optimizer)
        self.lanes = [self.lanes[i] for i in going]
        self.sources = [self.sources[i] for i in going] if len(self.sources) > 1 else self.sources


class Lane(Recorder):
    """The record of one model; what it raises as ``TrainingDiverged`` is kept for the end."""

    def __init__(
        self, model: nn.Module, _: Loader, val: Loader | None, config: TrainConfig, plan: Plan
    ) -> None:
        super().__init__(model, val, replace(config, progress=False), plan)
        self.error: TrainingDiverged | None = None

    def __exit__(self, *details: Any) -> Literal[False]:
        self.cleanup.close()  # evaluation mode; the rest of leaving is ``finish``
        return False

    @property
    def stopped(self) -> bool:
        return self.error is not None or self.history.stopped_early

    def attempt(self, action: Callable[..., Any], *arguments: Any) -> None:
        if self.error is not None:
            return
        try:
            action(*arguments)
        except TrainingDiverged as error:
            self.error = error

    def finish(self, interrupted: bool = False) -> None:
        self.history.seconds = time.perf_counter() - self.start
        if interrupted:
            self.history.stop_reason = "interrupted"
        if self.error is None:
            self.attempt(self._finish, False)


def _check(
    models: list[nn.Module],
    loaders: Any,
    val_loader: Loader | None,
    config: TrainConfig,
    seeds: Sequence[int] | None,
) -> list[Run]:
    """What each model is trained with; raises as ``fit_many`` says."""
    count = len(models)
    if config.checkpoint_dir is not None:
        raise ValueError(
            f"fit_many keeps no checkpoints: checkpoint_dir must be None, got "
            f"{config.checkpoint_dir!r} (train the models by fit, each with a folder of its own)"
        )
    if count == 0:
        raise ValueError("fit_many needs at least one model, got none")
    # A list whose items are batches is a loader itself.
    one_loader = not isinstance(loaders, (list, tuple)) or not loaders or _is_batch(loaders[0])
    loaders = [loaders] * count if one_loader else list(loaders)
    seeds = [config.seed] * count if seeds is None else list(seeds)
    for name, values in (("loaders", loaders), ("seeds", seeds)):
        if len(values) != count:
            raise ValueError(f"expected {count} {name}, one for each model, got {len(values)}")
    for name, values in (("model", models), ("loader", [] if one_loader else loaders)):
        if twice := [i for i, x in enumerate(values) if any(x is y for y in values[:i])]:
            raise ValueError(f"{name} {twice[0]} is given twice, expected {count} different ones")
    owners: dict[int, int] = {}
    for i, model in enumerate(models):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and owners.setdefault(id(parameter), i) != i:
                other = owners[id(parameter)]
                raise ValueError(f"models {other} and {i} share {name!r}: freeze it")
    configs = [replace(config, seed=seed) for seed in seeds]
    return [(m, x, val_loader, c) for m, x, c in zip(models, loaders, configs, strict=True)]


def _one_after_another(runs: list[Run]) -> list[History]:
    results: list[Result] = []
    for run in runs:
        if results and results[-1][1].stop_reason == "interrupted":
            results.append((run[-1], History(stop_reason="interrupted"), None))
            continue
        try:
            results.append((run[-1], fit(*run), None))
        except TrainingDiverged as error:
            results.append((run[-1], error.history, error))
    return _histories(results)


def _histories(results: list[Result]) -> list[History]:
    histories = [history for _, history, _ in results]
    failed = [(i, c.seed, error) for i, (c, _, error) in enumerate(results) if error is not None]
    if failed:
        said = " ".join(f"Model {i} (seed {seed}): {error}" for i, seed, error in failed)
        message = f"{len(failed)} of {len(results)} models diverged. {said}"
        raise SomeDiverged(message, failed[0][2].history, histories)
    return histories


def _is_batch(item: Any) -> bool:
    return isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[1], Tensor)
