"""Layers put around linear layers: which ones a method wraps, and what it trains."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tlcourse.freezing import freeze, unfreeze


@dataclass(frozen=True, kw_only=True)
class WrapConfig:
    """Names that every method of this kind is given.

    A name stands for each module whose full name (as in ``model.named_modules()``) equals it or
    ends with ``"." + name``, as in Hugging Face peft.

    Attributes:
        target_modules: names of the linear layers to adapt; at least one.
        modules_to_save: names of the modules that are trained in full and saved with the
            adapter, such as a new head. May be empty.

    Raises:
        ValueError: if there is no target, or a name is empty.
        TypeError: if names are not a tuple (or list) of strings.
    """

    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...] = ("head",)

    def __post_init__(self) -> None:
        self._keep_names("target_modules", at_least_one=True)
        self._keep_names("modules_to_save")

    def _keep_names(self, field: str, at_least_one: bool = False) -> None:
        names: Any = getattr(self, field)
        if not isinstance(names, (tuple, list)) or not all(isinstance(n, str) for n in names):
            hint = f"; write ({names!r},)" if isinstance(names, str) else ""
            raise TypeError(f"{field} must be a tuple of names, got {names!r}{hint}")
        if "" in names or (at_least_one and not names):
            raise ValueError(f"{field} must hold names that are not empty, got {names!r}")
        object.__setattr__(self, field, tuple(names))

    def _check(
        self, field: str, wanted: str, fits: Callable[[Any], bool], integral: bool = False
    ) -> None:
        value, kind = getattr(self, field), numbers.Integral if integral else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            raise TypeError(
                f"{field} must be {'an int' if integral else 'a number'}, got {value!r}"
            )
        if not fits(value):
            raise ValueError(f"{field} must be {wanted}, got {value}")
        if hasattr(value, "item"):  # a NumPy scalar cannot be written as JSON
            object.__setattr__(self, field, value.item())


class WrappedLayer(nn.Module):
    """A frozen linear layer, ``base``, with something trainable around it.

    Args:
        base: an ``nn.Linear``, or the ``Conv1D`` of transformers; frozen in place.
        config: of the method; kept, so that the layer can be saved.

    Raises:
        TypeError: if base is neither.
    """

    def __init__(self, base: nn.Module, config: WrapConfig) -> None:
        super().__init__()
        self.in_features, self.out_features = layer_size(base)
        self.base: Any = freeze(base)
        self.config = config

    def new_options(self) -> dict[str, Any]:
        """Device and dtype for new parameters: the base's, but float32 for half precision."""
        weight = self.base.weight
        half = weight.dtype in (torch.float16, torch.bfloat16)
        return {"device": weight.device, "dtype": torch.float32 if half else weight.dtype}


def layer_size(layer: nn.Module, where: str = "") -> tuple[int, int]:
    """Inputs and outputs of a layer; TypeError, which begins with ``where``, if not linear."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if stores_transposed(layer):
        inputs, outputs = layer.weight.shape  # type: ignore[union-attr,misc]
        return int(inputs), int(outputs)
    raise TypeError(
        f"{where}only nn.Linear and the Conv1D of transformers can be adapted, "
        f"got {type(layer).__name__}"
    )


def stores_transposed(layer: nn.Module) -> bool:
    """Whether it is the ``Conv1D`` of transformers (GPT-2): a linear layer, weight (in, out)."""
    library = sys.modules.get("transformers.pytorch_utils")  # not loaded: there can be none
    return library is not None and isinstance(layer, library.Conv1D)


def matching(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Full names of the modules that ``names`` stand for (see ``WrapConfig``), in model order."""
    names = tuple(names)
    return [
        full
        for full, _ in model.named_modules()
        if any(full == name or full.endswith("." + name) for name in names)
    ]


def is_in(full: str, modules: Iterable[str]) -> bool:
    """Whether a full name is one of these modules, or lies in one."""
    return any(full == module or full.startswith(module + ".") for module in modules)


def wrapped_layers(model: nn.Module) -> dict[str, WrappedLayer]:
    """The wrapped layers of a model by full name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, WrappedLayer)}


def find_saved(model: nn.Module, modules_to_save: Iterable[str]) -> list[str]:
    """Full names of the modules to train in full; the model is not changed.

    Raises:
        ValueError: if a name matches nothing, or such a module shares a parameter with another
            module (training it would change both; peft would train a copy).
    """
    for name in modules_to_save:
        if not matching(model, [name]):
            children = ", ".join(n for n, _ in model.named_children())
            raise ValueError(
                f"modules_to_save: no module of {type(model).__name__} is named {name!r}; its "
                f"parts are {children}. Give the name of its head, or () to train none in full"
            )
    saved = matching(model, modules_to_save)
    for full in saved:
        inside = {id(p) for p in model.get_submodule(full).parameters()}
        for other, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in inside and not is_in(other, saved):
                raise ValueError(
                    f"modules_to_save: {full!r} shares its weight with {other!r}, and training "
                    "it would change both; leave it out, or untie the two first"
                )
    return saved


def find_targets(model: nn.Module, config: WrapConfig) -> list[str]:
    """Full names of the layers that ``config`` adapts; the model is not changed.

    What lies in ``modules_to_save`` is trained in full and not adapted.

    Raises:
        ValueError: if the model has adapters already, a name matches nothing (the error lists
            what could be adapted), or a matching layer stands in two places.
        TypeError: if a matching module cannot be adapted.
    """
    for full, layer in wrapped_layers(model).items():
        raise ValueError(f"{full!r} is a {type(layer).__name__} already; merge, or start afresh")
    saved = find_saved(model, config.modules_to_save)
    places: dict[int, list[str]] = {}
    for full, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(full)
    targets = []
    for name in config.target_modules:
        found = [full for full in matching(model, [name]) if not is_in(full, saved)]
        if not found:
            raise ValueError(
                f"target_modules: no layer of {type(model).__name__} outside modules_to_save is "
                f"named {name!r}; names of layers that can be adapted: {_candidates(model, saved)}"
            )
        targets += found
    for full in targets:
        module = model.get_submodule(full)
        layer_size(module, f"target_modules: {full!r}: ")
        if len(twice := places[id(module)]) > 1:
            raise ValueError(f"target_modules: {twice[0]!r} and {twice[1]!r} are one layer")
    return list(dict.fromkeys(targets))


def freeze_except(model: nn.Module, saved: Iterable[str]) -> None:
    """Freeze a model but for the modules named in full, and the dropout layers beside them."""
    freeze(model)
    for full in saved:
        for sibling in model.get_submodule(full.rpartition(".")[0]).children():
            if isinstance(sibling, nn.Dropout):
                unfreeze(sibling)
        train_in_full(model.get_submodule(full))


def train_in_full(module: nn.Module) -> None:
    """Unfreeze a module, and all of its parameters whether they were trainable before or not."""
    for parameter in unfreeze(module).parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def wrap(
    model: nn.Module,
    config: WrapConfig,
    make: Callable[[str, nn.Module], WrappedLayer],
) -> nn.Module:
    """Freeze a model but for ``modules_to_save``, and wrap its targets, in place.

    Args:
        model: any module.
        config: names the targets.
        make: ``make(full name, layer)`` gives the layer to put in its place.

    Raises:
        ValueError, TypeError: as ``find_targets``; the model is then unchanged.
    """
    targets = find_targets(model, config)
    mode = model.training
    freeze_except(model, find_saved(model, config.modules_to_save))
    for full in targets:
        put(model, full, make(full, model.get_submodule(full)).train(mode))
    return model


def put(model: nn.Module, full: str, layer: nn.Module) -> None:
    """Set the module of that full name."""
    parent, _, child = full.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _candidates(model: nn.Module, saved: list[str]) -> str:
    """Last parts of the names of layers that can be adapted, each with its count."""
    counts: dict[str, int] = {}
    for full, module in model.named_modules():
        if (isinstance(module, nn.Linear) or stores_transposed(module)) and not is_in(full, saved):
            parts = full.split(".")
            name = ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])
            counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{name} ({n})" for name, n in counts.items()) or "none"
