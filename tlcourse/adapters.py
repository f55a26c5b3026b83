"""Adapters beside LoRA: bottlenecks, (IA)3, BitFit, and training the last layers only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlcourse.freezing import head_name, layer_names
from tlcourse.merging import MergeableLayer, fold
from tlcourse.wrapping import (
    WrapConfig,
    WrappedLayer,
    find_saved,
    freeze_except,
    matching,
    stores_transposed,
    train_in_full,
    wrap,
)


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(WrapConfig):
    """Settings of bottleneck adapters.

    Attributes:
        bottleneck_dim: width of the bottleneck, >= 1.
        init_std: standard deviation of the new weights, > 0. Up to 1e-2 the start is near enough
            to the identity (Houlsby et al. 2019, section 3.6).
        train_norms: train the scales and shifts of layer normalisation, too, as in the paper.
        target_modules: see ``WrapConfig``. The default names the two places of the paper in a
            BERT: the projection after the attention and the second layer of the feed-forward.
        modules_to_save: see ``WrapConfig``.

    Raises:
        ValueError: names the setting, the value and what was expected.
        TypeError: if a number is not a number, bottleneck_dim no int, or names are no tuple.
    """

    bottleneck_dim: int = 64
    init_std: float = 1e-2
    train_norms: bool = True
    target_modules: tuple[str, ...] = ("output.dense",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("bottleneck_dim", ">= 1", lambda dim: dim >= 1, integral=True)
        self._check("init_std", "> 0 and finite", lambda std: 0 < std < math.inf)


class BottleneckLinear(WrappedLayer):
    """A frozen linear layer, then a small network with a short cut.

    Houlsby et al. 2019, section 2.1 and figure 2, arXiv:1902.00751: down to m dimensions, a
    nonlinearity (GELU, as in their code), up again, plus the input; 2 m d + d + m parameters.
    New weights are drawn from a Gaussian cut off at two standard deviations, biases are zero.

    Args:
        base: an ``nn.Linear`` or the ``Conv1D`` of transformers; frozen in place.
        config: its names are not used here.

    Attributes:
        down: ``nn.Linear``, out_features -> bottleneck_dim.
        up: ``nn.Linear``, bottleneck_dim -> out_features.

    Raises:
        TypeError: if base is something else.
    """

    config: BottleneckConfig

    def __init__(self, base: nn.Module, config: BottleneckConfig) -> None:
        super().__init__(base, config)
        dim, options = config.bottleneck_dim, self.new_options()
        self.down = nn.Linear(self.out_features, dim, **options)
        self.up = nn.Linear(dim, self.out_features, **options)
        for layer in (self.down, self.up):
            cut = 2 * config.init_std
            nn.init.trunc_normal_(layer.weight, std=config.init_std, a=-cut, b=cut)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        hidden = self.base(x)
        change = self.up(F.gelu(self.down(hidden.to(self.down.weight.dtype))))
        return (hidden + change).to(hidden.dtype)


def add_bottlenecks(model: nn.Module, config: BottleneckConfig) -> nn.Module:
    """Put a bottleneck adapter behind each target layer of a model, in place.

    Everything else is frozen, but for ``modules_to_save`` (and the dropout beside them) and the
    layer normalisations. Behind the dense layers of a BERT this is the paper's place, before
    the residual sum; the dropout between the two is off, as in all that is frozen.

    There is no peft format for these. ``tl.save_model`` saves the whole model; load it with
    ``tl.load_model`` into a model that ``add_bottlenecks`` has prepared in the same way.

    Args:
        model: any module; on its device.
        config: see ``BottleneckConfig``.

    Returns:
        The same model.

    Raises:
        ValueError, TypeError: as ``tlcourse.lora.add_lora``; the model is then unchanged.
    """
    wrap(model, config, lambda _, layer: BottleneckLinear(layer, config))
    if config.train_norms:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__:
                train_in_full(module)
    return model


@dataclass(frozen=True, kw_only=True)
class IA3Config(WrapConfig):
    """Settings of (IA)3.

    Attributes:
        target_modules: see ``WrapConfig``: the layers that compute keys and values (their outputs
            are scaled), and those of ``feedforward_modules``.
        feedforward_modules: those of the targets whose *inputs* are scaled: the second layer of
            each feed-forward. For a BERT ``("layer.0.output.dense", "layer.1.output.dense", ...)``,
            since "output.dense" alone is a name of the attention's projection as well.
        modules_to_save: see ``WrapConfig``.

    Raises:
        ValueError: if a feed-forward name is not among the targets, or names are missing.
        TypeError: if names are not a tuple of strings.
    """

    feedforward_modules: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._keep_names("feedforward_modules")
        for name in self.feedforward_modules:
            if name not in self.target_modules:
                raise ValueError(
                    f"feedforward_modules must be among target_modules, got {name!r}; "
                    f"targets are {', '.join(self.target_modules)}"
                )


class IA3Linear(MergeableLayer):
    """A frozen linear layer whose outputs, or inputs, are multiplied by a trained vector.

    Liu et al. 2022, section 3.3, arXiv:2205.05638. The vector starts at one, so the layer starts
    as its base. See ``MergeableLayer`` for ``merge`` and ``unmerge``.

    Args:
        base: an ``nn.Linear`` or the ``Conv1D`` of transformers; frozen in place.
        config: its names are not used here.
        is_feedforward: scale the inputs in place of the outputs.

    Attributes:
        ia3_l: parameter, shape (in_features,) for a feed-forward, else (out_features,). With one
            dimension it has no weight decay (``tlcourse.freezing.parameter_groups``), which
            would switch the unit off.

    Raises:
        TypeError: if base is something else.
    """

    config: IA3Config

    def __init__(self, base: nn.Module, config: IA3Config, is_feedforward: bool = False) -> None:
        super().__init__(base, config)
        self.is_feedforward = is_feedforward
        size = self.in_features if is_feedforward else self.out_features
        self.ia3_l = nn.Parameter(torch.ones(size, **self.new_options()))

    def adapted(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        if self.is_feedforward:
            return self.base((x * self.ia3_l).to(x.dtype))
        result = self.base(x)
        return (result * self.ia3_l).to(result.dtype)

    def merged_parameters(self) -> dict[str, Tensor]:
        weight, bias = self.base.weight, self.base.bias
        along_rows = self.is_feedforward != stores_transposed(self.base)
        merged = {"weight": weight * (self.ia3_l if along_rows else self.ia3_l[:, None])}
        if bias is not None and not self.is_feedforward:
            merged["bias"] = bias * self.ia3_l
        return merged

    def extra_repr(self) -> str:
        return f"is_feedforward={self.is_feedforward}, merged={self.merged}"


def add_ia3(model: nn.Module, config: IA3Config) -> nn.Module:
    """Adapt a model by (IA)3, in place; all else but ``modules_to_save`` is frozen.

    Args:
        model: any module; on its device.
        config: see ``IA3Config``.

    Returns:
        The same model.

    Raises:
        ValueError, TypeError: as ``tlcourse.lora.add_lora``; the model is then unchanged.
    """
    feedforward = set(matching(model, config.feedforward_modules))
    return wrap(model, config, lambda full, layer: IA3Linear(layer, config, full in feedforward))


def merge_ia3(model: nn.Module) -> nn.Module:
    """Fold every ``IA3Linear`` into its base, in place; see ``tlcourse.lora.merge_lora``.

    Raises:
        ValueError: if there is no ``IA3Linear``.
    """
    return fold(model, IA3Linear)


def train_biases(model: nn.Module, modules_to_save: tuple[str, ...] = ("head",)) -> nn.Module:
    """BitFit: train the biases alone, those of normalisation layers included, and the head.

    Ben Zaken et al. 2021, section 3, arXiv:2106.10199. Save the result with ``tl.save_model``.

    Args:
        model: any module; changed in place.
        modules_to_save: names of the modules that are trained in full (see ``WrapConfig``).

    Returns:
        The same model.

    Raises:
        ValueError: if the model has no bias, a name matches nothing, or a module to train in
            full shares its weight with another; the model is then unchanged.
    """
    saved = find_saved(model, modules_to_save)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    if not biases:
        raise ValueError(f"{type(model).__name__} has no parameter whose name ends with 'bias'")
    freeze_except(model, saved)
    for bias in biases:
        bias.requires_grad_(True)
    return model


def train_last_layers(
    model: nn.Module, num_layers: int, modules_to_save: tuple[str, ...] = ("head",)
) -> nn.Module:
    """Train the last layers alone, and the head.

    Layers are the blocks of ``tlcourse.freezing.layer_names``: those that stand in a stack, such
    as the layers of a transformer. What comes after the last block (a final normalisation, a
    pooler) goes with it; a head that is not in ``modules_to_save`` does not. Save the result with
    ``tl.save_model``.

    Args:
        model: any module; changed in place.
        num_layers: how many blocks, counted from the head, >= 0; 0 trains the head alone.
        modules_to_save: names of the modules that are trained in full (see ``WrapConfig``).

    Returns:
        The same model.

    Raises:
        ValueError: if num_layers is negative or more than there are, nothing would be trained, a
            name matches nothing, or a module to train in full shares its weight with another;
            the model is then unchanged.
    """
    saved = find_saved(model, modules_to_save)
    layers = [n for n in layer_names(model) if n not in saved and n != head_name(model)]
    blocks = [n for n, name in enumerate(layers) if _stands_in_stack(model, name)]
    if not 0 <= num_layers <= len(blocks):
        raise ValueError(
            f"num_layers must be in 0..{len(blocks)}, the number of blocks of "
            f"{type(model).__name__} below its head, got {num_layers}"
        )
    if num_layers == 0 and not saved:
        raise ValueError("num_layers=0 without modules_to_save would train nothing")
    freeze_except(model, saved)
    for name in layers[blocks[-num_layers] :] if num_layers else []:
        train_in_full(model.get_submodule(name))
    return model


def _stands_in_stack(model: nn.Module, name: str) -> bool:
    parent = model.get_submodule(name.rpartition(".")[0])
    return isinstance(parent, (nn.Sequential, nn.ModuleList))
