"""The forward pass of a run: eager, or through ``torch.compile`` from the step where that pays."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tlcourse.config import Compile
from tlcourse.inference import Inputs, device_of, forward
from tlcourse.processes import Processes

# What compiling a training step takes, and the part of an eager step that it saves: near what
# data/results/gpu_vision.json shows of ViT-B/16 and ResNet-50 on an H200.
SECONDS_TO_START, SECONDS_PER_LAYER, SHARE_SAVED = 8.0, 0.3, 0.25
WARM_UP_STEPS, TIMED_STEPS = 5, 5


def num_layers(model: nn.Module) -> int:
    """Modules with parameters of their own: what the time of compiling grows with."""
    return sum(
        1 for part in model.modules() if next(part.parameters(recurse=False), None) is not None
    )


def worth_compiling(model: nn.Module, step_seconds: float, steps_left: int) -> bool:
    """Whether the steps to come should save more time than compiling takes.

    Args:
        model: whose forward pass would be compiled.
        step_seconds: wall time of an eager step.
        steps_left: steps to come.
    """
    cost = SECONDS_TO_START + SECONDS_PER_LAYER * num_layers(model)
    return SHARE_SAVED * step_seconds * steps_left > cost


class Forward:
    """Logits of a batch, as ``tlcourse.inference.forward`` gives them.

    With ``compile="auto"`` the first steps on a GPU run eagerly and are timed, which costs
    nothing; then ``worth_compiling`` decides once. A compiled model takes batches of the shape
    it was compiled for (but for tensors of one dimension); the others, such as a short last
    batch, run eagerly. If compiling fails, the run goes on without, and says so in one line.

    Args:
        model: stays as it is, and shares its weights with what is compiled.
        compile: see ``TrainConfig``.
        num_steps: length of the run.
        processes: of the run; all decide alike.
    """

    def __init__(
        self,
        model: nn.Module,
        compile: Compile,
        num_steps: int,
        processes: Processes | None = None,
    ) -> None:
        self.processes, self.num_steps = processes or Processes(), num_steps
        self.device, self.model = device_of(model), self.processes.wrap(model)
        model = self.model
        self.compiled: Any = torch.compile(model) if compile is True else None
        self.shapes: list[torch.Size] | None = None
        self.undecided = compile == "auto" and self.device.type == "cuda"
        self.timed_from = (0, 0.0)  # (step, clock)

    def __call__(self, inputs: Inputs) -> Tensor:  # -> (B, K)
        if self.compiled is None:
            return forward(self.model, inputs, self.device)
        shapes = _shapes(inputs)
        if self.shapes is None:
            return self._first_compiled(inputs, shapes)
        known = shapes == self.shapes
        return forward(self.compiled if known else self.model, inputs, self.device)

    def after_step(self, step: int) -> None:
        """Time the eager steps and decide; called after each step, 1, 2, ..."""
        if not self.undecided or step not in (WARM_UP_STEPS, WARM_UP_STEPS + TIMED_STEPS):
            return
        torch.cuda.synchronize()
        before, self.timed_from = self.timed_from, (step, time.perf_counter())
        if step == WARM_UP_STEPS:
            return
        self.undecided = False
        seconds = (self.timed_from[1] - before[1]) / TIMED_STEPS
        if self.processes.any(worth_compiling(self.model, seconds, self.num_steps - step)):
            self.compiled = torch.compile(self.model)

    def _first_compiled(self, inputs: Inputs, shapes: list[torch.Size]) -> Tensor:
        self.shapes = shapes
        try:
            return forward(self.compiled, inputs, self.device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Broad on purpose: a missing compiler, an unsupported model and a bug in a backend
            # come as all kinds of errors. If the model itself is at fault, it raises again.
            self.compiled = None
            logits = forward(self.model, inputs, self.device)
            problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            print(f"Not compiled ({problem[:200]}); the run goes on without.", file=sys.stderr)
            return logits


def _shapes(inputs: Inputs) -> list[torch.Size]:
    tensors = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    return [x.shape for x in tensors if x.ndim > 1]
