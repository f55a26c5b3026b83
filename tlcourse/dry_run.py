"""One training step without memory or arithmetic: which bytes live when, and what is computed.

The step runs on fake tensors (``torch._subclasses.FakeTensorMode``), which have shapes, types and
storages but no numbers. Autograd works as always, so each storage appears and goes when it would
in a real step; counting those that live gives the peak. No GPU is needed to plan for one: what a
GPU does differently in ``fit`` (rules of autocast, dropout, attention) is put in its place.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tlcourse.as_on_gpu import HALF, AsOnGPU
from tlcourse.config import TrainConfig
from tlcourse.freezing import parameter_groups
from tlcourse.inference import Inputs, forward

_CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)
KINDS = ("parameters", "gradients", "optimizer", "best weights", "activations")


@dataclass(frozen=True)
class Operation:
    """One operation: floating-point operations, bytes read and written, in half precision?"""

    flops: int
    num_bytes: int
    half: bool


@dataclass
class DryRun:
    """What a step would take.

    Attributes:
        whole: kind -> bytes: all parameters and buffers, all gradients, the whole state of the
            optimizer, and the activations that live between forward and backward pass.
        at_peak: kind -> bytes in the moment when their sum is largest. "activations" are then
            all that is no other kind: activations, their gradients, copies in half precision.
        operations: of one forward and backward pass.
        update_bytes: read and written by clipping and by the update of the weights.
    """

    whole: dict[str, int] = field(default_factory=dict)
    at_peak: dict[str, int] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)
    update_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        return sum(self.at_peak.values())


class Tracker(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, for as long as each lives.

    Args:
        allocation_bytes: sizes are rounded up to multiples of this.
        blocked: a convolution copies its largest tensor into a layout of blocks, as the CPU's does.
    """

    def __init__(self, allocation_bytes: int = 1, blocked: bool = False) -> None:
        super().__init__()
        self.allocation_bytes, self.blocked = allocation_bytes, blocked
        self.live = dict.fromkeys(KINDS, 0)
        self.at_peak = dict(self.live)
        self.operations: list[Operation] = []
        self._kinds: dict[int, str] = {}  # storage -> kind
        self._watched: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "prim":  # asks for a device or the like
            return result
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        known = {_key(x) for x in inputs}
        if func._schema.is_mutable or not all(_key(x) in known for x in outputs):  # not a view
            count = flop_registry.get(func._overloadpacket)
            flops = int(count(*args, **kwargs, out_val=result)) if count else 0
            moved = sum(x.numel() * x.element_size() for x in (*inputs, *outputs))
            half = any(x.dtype in HALF for x in inputs)
            self.operations.append(Operation(flops, moved, half))
        for x in outputs:
            self.watch(x, "activations")
        if self.blocked and func._overloadpacket in _CONVOLUTIONS:
            copied = max(x.nbytes for x in (*inputs, *outputs))
            self.add("activations", copied)
            self.add("activations", -copied)
        return result

    def watch(self, x: Tensor, kind: str) -> None:
        """Count the storage of ``x`` until it is gone; one that is counted already stays so."""
        storage, key = x.untyped_storage(), _key(x)
        if key in self._watched:
            return
        size = self.rounded(storage.nbytes())

        def forget(_: Any) -> None:
            self.live[self._kinds.pop(key)] -= size
            del self._watched[key]

        self._kinds[key] = kind
        self._watched[key] = weakref.ref(storage, forget)
        self.add(kind, size)

    def take_gradient(self, parameter: Tensor) -> None:
        """From here on the storage of the parameter's gradient counts as one."""
        assert parameter.grad is not None
        key, size = _key(parameter.grad), self.rounded(parameter.grad.untyped_storage().nbytes())
        self.live[self._kinds[key]] -= size
        self.live["gradients"] += size
        self._kinds[key] = "gradients"

    def add(self, kind: str, num_bytes: int) -> None:
        """Count bytes that no tensor stands for; a negative number takes them away."""
        self.live[kind] += num_bytes
        if sum(self.live.values()) > sum(self.at_peak.values()):
            self.at_peak = dict(self.live)

    def rounded(self, size: int) -> int:
        return -(-size // self.allocation_bytes) * self.allocation_bytes


def dry_run(
    model: nn.Module,
    config: TrainConfig,
    batch: tuple[Inputs, Tensor],
    *,
    batch_size: int,
    on_gpu: bool,
    half: bool,
    allocation_bytes: int = 1,
) -> DryRun:
    """Follow a step of ``tl.fit`` (a later one: the optimizer has its state already).

    Args:
        model: not changed; may be on any device, and larger than any memory.
        config: optimizer, penalty, label smoothing and accumulation are used.
        batch: an example, (inputs, targets) as of a loader; only shapes and types matter.
        batch_size: examples in each micro-batch, >= 1.
        on_gpu: the step is on a CUDA GPU; else on the CPU.
        half: autocast to bf16 (or fp16, which takes the same memory).
        allocation_bytes: sizes are rounded up to multiples of this.

    Raises:
        ValueError: if the model cannot be followed, or does not give logits for the batch.
    """
    tracker = Tracker(allocation_bytes, blocked=not on_gpu)
    log = logging.getLogger("torch._subclasses.fake_tensor")  # shows a traceback before it raises
    was_disabled, log.disabled = log.disabled, True
    try:
        with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True):
            fake = _fake_copy(model).train()
            return _follow(fake, config, _fake_batch(batch, batch_size), tracker, on_gpu, half)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"a training step of {type(model).__name__} cannot be followed without running it: "
            f"{str(error).strip('. ') or type(error).__name__}. Is example a batch of its inputs? "
            "A forward pass that reads the numbers (x.item(), if x > 0) cannot be planned"
        ) from error
    finally:
        log.disabled = was_disabled


def _follow(
    fake: nn.Module,
    config: TrainConfig,
    batch: tuple[Inputs, Tensor],
    tracker: Tracker,
    on_gpu: bool,
    half: bool,
) -> DryRun:
    """``dry_run`` of a fake model and batch, in a fake mode."""
    groups = parameter_groups(
        fake, config.lr, config.weight_decay, config.head_lr, config.layer_decay
    )
    trainable = [p for p in fake.parameters() if p.requires_grad]
    for x in (*fake.parameters(), *fake.buffers()):
        tracker.watch(x, "parameters")
    for parameter in trainable:
        parameter.register_post_accumulate_grad_hook(tracker.take_gradient)
    state_bytes = _state_bytes(trainable, config, tracker.rounded)
    tracker.add("optimizer", state_bytes)
    if not on_gpu:  # ``fit`` keeps the best weights in this memory, too
        tracker.add("best weights", sum(x.nbytes for x in (*trainable, *fake.buffers())))
        for x in tree_leaves(batch):
            tracker.watch(x, "activations")
    # With accumulation, the gradients of the first micro-batch are there in the second.
    for _ in range(min(config.accumulation_steps, 2)):
        tracker.operations.clear()
        with tracker:
            loss = _loss(fake, *batch, config, on_gpu=on_gpu, half=half)
            activation_bytes = tracker.live["activations"]
            loss.backward()
            del loss
    whole = dict(tracker.live, activations=activation_bytes)
    temporary_bytes = _update_temporaries(groups, config, on_gpu)
    tracker.add("activations", temporary_bytes)
    # Clipping reads the gradients twice and writes them; the update reads and writes the rest.
    gradient_bytes = sum(p.nbytes for p in trainable)
    moved = 2 * state_bytes + (3 + 3 * (config.max_grad_norm is not None)) * gradient_bytes
    return DryRun(whole, tracker.at_peak, tracker.operations, moved)


def _loss(
    model: nn.Module,
    inputs: Inputs,
    targets: Tensor,
    config: TrainConfig,
    *,
    on_gpu: bool,
    half: bool,
) -> Tensor:
    """The loss of a micro-batch as ``fit`` has it."""
    if on_gpu:  # they come over from the host
        inputs = (
            inputs.clone()
            if isinstance(inputs, Tensor)
            else {k: x.clone() for k, x in inputs.items()}
        )
    with AsOnGPU(half, on_gpu), torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = forward(model, inputs)
    del inputs
    loss = F.cross_entropy(logits, targets, label_smoothing=config.label_smoothing)
    return loss + config.penalty(model)


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _fake_copy(model: nn.Module) -> nn.Module:
    """The model with fake tensors on the CPU for all its tensors; call it in a fake mode."""
    own = [x for part in model.modules() for x in tree_leaves(list(vars(part).values()))]
    found = (*model.parameters(), *model.buffers(), *(x for x in own if isinstance(x, Tensor)))
    memo: dict[int, Any] = {}
    for x in found:
        fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")
        if isinstance(x, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=x.requires_grad)
        memo.setdefault(id(x), fake)
    with unset_fake_temporarily():
        return copy.deepcopy(model, memo)


def _fake_batch(batch: tuple[Inputs, Tensor], batch_size: int) -> tuple[Inputs, Tensor]:
    """The batch with another number of examples; tensors that do not grow with it stay."""
    inputs, targets = batch

    def resized(x: Tensor) -> Tensor:
        grows = x.ndim > 0 and len(x) == len(targets)
        shape = (batch_size, *x.shape[1:]) if grows else x.shape
        return torch.empty(shape, dtype=x.dtype)

    if isinstance(inputs, Mapping):
        return {name: resized(x) for name, x in inputs.items()}, resized(targets)
    return resized(inputs), resized(targets)


def _state_bytes(
    trainable: Sequence[Tensor], config: TrainConfig, rounded: Callable[[int], int]
) -> int:
    """Of AdamW: two averages for each number, a step count for each tensor. SGD: the momentum."""
    if config.optimizer == "sgd":
        return sum(rounded(p.nbytes) for p in trainable) if config.momentum else 0
    return sum(2 * rounded(p.nbytes) + rounded(4) for p in trainable)


def _update_temporaries(groups: list[dict[str, Any]], config: TrainConfig, on_gpu: bool) -> int:
    """Bytes that the update of the weights takes for a moment.

    AdamW takes none, as it is fused. SGD computes gradients with their weight decay: on a GPU all
    of a group at once, on the CPU one after another.
    """
    if config.optimizer != "sgd":
        return 0
    together = sum if on_gpu else max
    decayed = [[p.nbytes for p in group["params"]] for group in groups if group["weight_decay"]]
    return max((together(sizes) for sizes in decayed if sizes), default=0)
