"""Reading a network in the middle: what one of its layers says of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Pooling = Literal["mean", "max", "mean+max", "flatten", "first"]


class LayerFeatures(nn.Module):
    """A network read at one of its layers; what comes after the layer does not run.

    It takes the place of a backbone, for example in ``tl.extract_features``.

    Args:
        network: any module; it is not changed, and its weights are shared.
        layer: as in ``network.named_modules()``, for example one of
            ``tlcourse.freezing.layer_names(network)``.
        pooling: how its output becomes one vector. Of a map, shape (B, C, H, W), or of tokens,
            shape (B, T, C): "mean" or "max" over the places, "mean+max" of both side by side,
            "flatten" of all numbers, "first" token (tokens only). An output of shape (B, D) is
            taken as it is.

    Raises:
        ValueError: for an unknown layer (lists the layers) or pooling, or, when called, for an
            output that it cannot pool.
    """

    def __init__(self, network: nn.Module, layer: str, pooling: Pooling = "mean") -> None:
        super().__init__()
        module = _module(network, layer)
        if pooling not in _POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(_POOLINGS)}, got {pooling!r}")
        self.network, self.layer, self.pooling = network, layer, pooling
        self._module = [module]  # in a list, so that it is not registered a second time

    def forward(self, images: Tensor) -> Tensor:
        """Args:
            images: what the network takes.

        Returns:
            float tensor, shape (B, D).
        """
        return pool(self.activations(images), self.pooling)

    def activations(self, images: Tensor) -> Tensor:
        """The layer's own output, unpooled."""

        def stop(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            raise _ReachedLayer(output)

        handle = self._module[0].register_forward_hook(stop)
        try:
            self.network(images)
        except _ReachedLayer as reached:
            return reached.output
        finally:
            handle.remove()
        raise ValueError(f"layer {self.layer!r} did not run on this input")


def all_activations(network: nn.Module, layers: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """The unpooled outputs of several layers, from one forward pass.

    Args:
        network: run in the mode it is in; it is not changed.
        layers: names as in ``LayerFeatures``.
        images: what the network takes.

    Returns:
        Layer name -> output, in the order of ``layers``.

    Raises:
        ValueError: for no layer at all, an unknown one, or one that did not run (names it).
    """
    if not layers:
        raise ValueError("all_activations needs at least one layer, got none")
    modules = {layer: _module(network, layer) for layer in layers}
    found: dict[str, Tensor] = {}

    def keep(layer: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            found[layer] = output

        return hook

    handles = [part.register_forward_hook(keep(layer)) for layer, part in modules.items()]
    try:
        network(images)
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers:
        if layer not in found:
            raise ValueError(f"layer {layer!r} did not run on this input")
    return {layer: found[layer] for layer in layers}


def pool(activations: Tensor, pooling: Pooling) -> Tensor:
    """One vector for each example; see ``LayerFeatures``.

    Args:
        activations: shape (B, C, H, W), (B, T, C) or (B, D).

    Returns:
        float tensor, shape (B, D).
    """
    if activations.ndim == 2:
        return activations
    if pooling == "flatten":
        return activations.flatten(1)
    if activations.ndim == 4 and pooling != "first":
        places = activations.flatten(2)  # (B, C, H * W)
    elif activations.ndim == 3:
        if pooling == "first":
            return activations[:, 0]
        places = activations.transpose(1, 2)  # (B, C, T)
    else:
        raise ValueError(f"cannot pool shape {tuple(activations.shape)} by {pooling!r}")
    mean, largest = places.mean(dim=2), places.amax(dim=2)
    return {"mean": mean, "max": largest, "mean+max": torch.cat([mean, largest], 1)}[pooling]


def _module(network: nn.Module, layer: str) -> nn.Module:
    modules = dict(network.named_modules())
    if layer not in modules or layer == "":
        from tlcourse.freezing import layer_names

        known = ", ".join(layer_names(network))
        raise ValueError(f"no layer {layer!r}; the layers are {known}, and their parts")
    return modules[layer]


_POOLINGS = ("mean", "max", "mean+max", "flatten", "first")


class _ReachedLayer(Exception):
    """Ends the forward pass at the layer, with its output."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output
