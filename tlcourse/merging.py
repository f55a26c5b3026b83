"""Layers that can be folded into the layer they wrap, and how a whole model is folded."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tlcourse.wrapping import WrapConfig, WrappedLayer, is_in, put, wrapped_layers


class MergeableLayer(WrappedLayer):
    """A wrapped layer that can be folded into its base.

    Merging sets the base's parameters aside and puts new ones in their place; it writes into no
    tensor. So ``unmerge`` brings back the same bits, and a module that shares the weight (tied
    embeddings) does not change. The price is a second copy of the weight while merged. The
    state dict always holds the unmerged weight, and loading one unmerges.
    """

    def __init__(self, base: nn.Module, config: WrapConfig) -> None:
        super().__init__(base, config)
        self._originals: dict[str, nn.Parameter] = {}  # what is in the base when not merged
        self._paused: list[str] = []  # own parameters that merging made untrainable
        self.register_state_dict_post_hook(_put_originals)

    def merged_parameters(self) -> dict[str, Tensor]:
        """Parameters with which the base alone computes what this layer does, by name."""
        raise NotImplementedError

    def adapted(self, x: Tensor) -> Tensor:
        """Forward while not merged."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        return bool(self._originals)

    @property
    def weight(self) -> Tensor:
        """The weight in effect, differentiable. ``nn.MultiheadAttention`` reads it, for one."""
        return self.base.weight if self.merged else self.merged_parameters()["weight"]

    @property
    def bias(self) -> Tensor | None:
        """The bias in effect."""
        own = {} if self.merged else self.merged_parameters()
        return own.get("bias", self.base.bias)

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        return self.base(x) if self.merged else self.adapted(x)

    def merge(self) -> None:
        """Fold the adapter into the base. Its own parameters are untrainable while merged."""
        if self.merged:
            return
        with torch.no_grad(), torch.autocast(self.base.weight.device.type, enabled=False):
            merged = self.merged_parameters()
        for name, value in merged.items():
            original = getattr(self.base, name)
            value = value.to(original.dtype)
            setattr(self.base, name, nn.Parameter(value, requires_grad=False))
            self._originals[name] = original  # after it: a base may refuse, and is then unmerged
        self._paused = [name for name, p in self.named_parameters() if p.requires_grad]
        self.requires_grad_(False)

    def unmerge(self) -> None:
        """Put the base's own parameters back, the same bits as before; no effect if not merged."""
        for name, original in self._originals.items():
            present = getattr(self.base, name)  # the model may have been moved or cast meanwhile
            original.data = original.data.to(device=present.device, dtype=present.dtype)
            setattr(self.base, name, original)
        for name in self._paused:
            self.get_parameter(name).requires_grad_(True)
        self._originals, self._paused = {}, []

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unmerge()  # before the base, a child, is filled
        super()._load_from_state_dict(*args, **kwargs)


def fold(model: nn.Module, kind: type[MergeableLayer]) -> nn.Module:
    """Merge all layers of a kind, and put their plain bases in their place.

    The plain layers stay frozen. A merged weight is no longer shared with another module; there
    is a warning, and ``tie_word_embeddings`` of a transformers configuration becomes False.

    Raises:
        ValueError: if the model has no such layer.
    """
    layers = {n: m for n, m in wrapped_layers(model).items() if isinstance(m, kind)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no {kind.__name__} to merge")
    for layer in layers.values():
        layer.unmerge()  # its weight may be shared; merged again below
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for full, layer in layers.items():
        layer.merge()
        put(model, full, layer.base)
        for original in layer._originals.values():
            for other in owners[id(original)]:
                if not is_in(other, [full]):
                    _untied(model, full, other)
    return model


def _untied(model: nn.Module, full: str, other: str) -> None:
    warnings.warn(
        f"{full!r} shared a parameter with {other!r}; merged, it has one of its own",
        stacklevel=4,
    )
    for module in model.modules():
        if getattr(getattr(module, "config", None), "tie_word_embeddings", False):
            module.config.tie_word_embeddings = False  # type: ignore[union-attr]


def _put_originals(layer: Any, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    """Let the state dict of a merged layer hold the weight that fits the adapter beside it."""
    for name, original in layer._originals.items():
        state[f"{prefix}base.{name}"] = original.detach()
