"""What is trained, and how fast: freezing, and groups of parameters for the optimizer."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

# Names under which models keep their head: ours, torchvision's, transformers'.
HEAD_NAMES = ("head", "heads", "fc", "classifier", "score", "lm_head")


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of scalar parameters; one that two modules share counts once."""

    trainable: int
    total: int

    def __str__(self) -> str:
        share = self.trainable / self.total if self.total else 0.0
        return f"{self.trainable:,} of {self.total:,} parameters are trainable ({share:.2%})"


def freeze(module: nn.Module) -> nn.Module:
    """Stop a module from changing: no gradients, and evaluation mode for good.

    Evaluation mode keeps the running statistics of BatchNorm still and turns dropout off.
    It stays after ``model.train()``, in a deep copy and in a pickled copy. The state dict is
    as before. ``unfreeze`` a part of a frozen module to train that part alone.

    Args:
        module: any module; frozen in place, with everything in it.

    Returns:
        The same module.
    """
    for part in module.modules():
        if not _is_frozen(part):
            part._before_freezing = _BeforeFreezing(  # type: ignore[assignment]
                trainable={n for n, p in part.named_parameters(recurse=False) if p.requires_grad},
                training=part.training,
            )
            # An attribute of the instance hides the method of the class.
            part.train = functools.partial(_stay_in_eval, part)  # type: ignore[method-assign]
        part.training = False
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return module


def freeze_statistics(module: nn.Module, affine: bool = False) -> nn.Module:
    """Hold the running statistics of every BatchNorm still; the rest of the module trains on.

    Each BatchNorm stays in evaluation mode for good, as under ``freeze``: it normalises by its
    running averages (Ioffe & Szegedy 2015, section 3.1, arXiv:1502.03167), in training too, and
    does not change them. ``unfreeze`` undoes it. A BatchNorm that is frozen already stays so.

    Args:
        module: any module; changed in place. Without a BatchNorm nothing happens.
        affine: freeze scale and shift as well.

    Returns:
        The same module.
    """
    for part in module.modules():
        if not isinstance(part, nn.modules.batchnorm._BatchNorm) or _is_frozen(part):
            continue
        freeze(part)
        before: Any = part._before_freezing
        for name, parameter in part.named_parameters(recurse=False):
            parameter.requires_grad_(name in before.trainable and not affine)
    return module


def unfreeze(module: nn.Module) -> nn.Module:
    """Undo ``freeze`` and ``freeze_statistics``: what was trainable is trainable again.

    The mode becomes the one that was last asked for with ``train()`` or ``eval()``. A module
    that ``freeze`` never saw gets ``requires_grad=True`` for all its floating parameters.

    Args:
        module: any module; changed in place, with everything in it.

    Returns:
        The same module.
    """
    for part in module.modules():
        parameters = dict(part.named_parameters(recurse=False))
        if _is_frozen(part):
            before: Any = part._before_freezing
            parameters = {n: p for n, p in parameters.items() if n in before.trainable}
            part.training = before.training
            del part._before_freezing, part.train
        for parameter in parameters.values():
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    return module


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the scalar parameters of a model, all and trainable."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return ParameterCount(
        trainable=sum(size for size, trainable in sizes if trainable),
        total=sum(size for size, _ in sizes),
    )


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    head_lr: float | None = None,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Split the trainable parameters by learning rate and weight decay.

    Biases and the scales of normalisation layers are not decayed: pulling a scale to zero
    switches its channel off. Layer-wise decay follows Clark et al. 2020 (ELECTRA),
    appendix A, arXiv:2003.10555: each layer learns ``layer_decay`` times as fast as the one
    above it. Layers are those of ``layer_names``.

    Args:
        model: its head, if it has one, is what ``head_name`` finds.
        lr: learning rate of the top, > 0; without ``layer_decay``, of every layer.
        weight_decay: >= 0.
        head_lr: learning rate of the head, > 0; None: the same as ``lr``.
        layer_decay: in (0, 1]; None is 1.

    Returns:
        Groups for a torch optimizer, from the input side to the head. Each is a dict with
        ``params``, ``names``, ``lr``, ``weight_decay``; every trainable parameter is in
        exactly one.

    Raises:
        ValueError: if nothing is trainable, a number is out of range, or ``head_lr`` is given
            and no head is found.
    """
    _check_rates(lr, weight_decay, head_lr, layer_decay)
    head = head_name(model)
    if head_lr is not None and head is None:
        raise ValueError(
            f"head_lr={head_lr} was given, but no part of {type(model).__name__} is named "
            + ", ".join(HEAD_NAMES)
        )
    undecayed = _undecayed_names(model)
    layers = [name for name in layer_names(model) if name != head]
    top = max(len(layers), 1) - (head is None)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_head = head is not None and name.startswith(head + ".")
        depth = top if is_head else _layer_index(name, layers)
        rate = (head_lr or lr) if is_head else lr * (layer_decay or 1.0) ** (top - depth)
        if layer_decay is None:
            depth = int(is_head)  # two rates at most: two groups of layers will do
        decay = 0.0 if name in undecayed else weight_decay
        group = groups.setdefault(
            (depth, name in undecayed),
            {"params": [], "names": [], "lr": rate, "weight_decay": decay},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ValueError(
            f"no trainable parameter: all {count_parameters(model).total:,} parameters of "
            f"{type(model).__name__} are frozen; unfreeze a part, for example "
            "tl.unfreeze(model.head)"
        )
    return [groups[key] for key in sorted(groups)]


def head_name(model: nn.Module) -> str | None:
    """Name of the head, as in ``model.named_modules()``, or None.

    The head is the child with a name of ``HEAD_NAMES``. A model with a single child, such as
    the wrapper of peft, is looked into.
    """
    path, module = "", model
    while True:
        children = {
            name: child for name, child in module.named_children() if _has_parameters(child)
        }
        found = next((name for name in HEAD_NAMES if name in children), None)
        if found is not None:
            return path + found
        if len(children) != 1:
            return None
        [(name, module)] = children.items()
        path += name + "."


def layer_names(model: nn.Module) -> list[str]:
    """Names of the layers of a model, from the input to the head.

    A layer is one block of a stack of blocks (an ``nn.Sequential`` or ``nn.ModuleList`` whose
    items have parts, such as the blocks of a ResNet or of a transformer); outside stacks it is
    one child module, such as a stem, an embedding or a head. Children count in the order in
    which they were registered. The head comes last.

    Returns:
        Names as in ``model.named_modules()``; only modules with parameters.
    """
    names = [name for child, module in model.named_children() for name in _expand(child, module)]
    head = head_name(model)
    if head is None:
        return names
    return [name for name in names if name != head and not name.startswith(head + ".")] + [head]


def _expand(name: str, module: nn.Module, in_stack: bool = False) -> Iterator[str]:
    if not _has_parameters(module):
        return
    if _is_stack(module):
        for child, part in module.named_children():
            yield from _expand(f"{name}.{child}", part, in_stack=True)
    elif not in_stack and _holds_stack(module):
        for child, part in module.named_children():
            yield from _expand(f"{name}.{child}", part)
    else:
        yield name


def _is_stack(module: nn.Module) -> bool:
    """A list of blocks; a ``Sequential`` of plain layers (a stem, a shortcut) is one block."""
    return isinstance(module, (nn.Sequential, nn.ModuleList)) and any(
        any(True for _ in item.children()) for item in module.children()
    )


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _holds_stack(module: nn.Module) -> bool:
    return any(_is_stack(child) or _holds_stack(child) for child in module.children())


def _layer_index(name: str, layers: list[str]) -> int:
    """Place of a parameter's layer; a loose one (class token, positions) is at the input."""
    found = (i for i, layer in enumerate(layers) if name.startswith(layer + "."))
    return next(found, 0)


def _undecayed_names(model: nn.Module) -> set[str]:
    norms = {name for name, module in model.named_modules() if "Norm" in type(module).__name__}
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim <= 1 or name.endswith("bias") or name.rpartition(".")[0] in norms
    }


def _check_rates(
    lr: float, weight_decay: float, head_lr: float | None, layer_decay: float | None
) -> None:
    if not lr > 0:
        raise ValueError(f"lr must be > 0, got {lr}")
    if head_lr is not None and not head_lr > 0:
        raise ValueError(f"head_lr must be > 0, got {head_lr}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be >= 0, got {weight_decay}")
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay}")


@dataclass
class _BeforeFreezing:
    """What ``unfreeze`` needs: names of trainable direct parameters, and the mode asked for."""

    trainable: set[str]
    training: bool


def _is_frozen(part: nn.Module) -> bool:
    return "_before_freezing" in part.__dict__


def _stay_in_eval(part: nn.Module, mode: bool = True) -> nn.Module:
    """Stands in for ``part.train`` while the part is frozen."""
    before: Any = part._before_freezing
    before.training = mode
    part.training = False
    for child in part.children():
        child.train(mode)  # a child may have been unfrozen by itself
    return part
