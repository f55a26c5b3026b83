"""Linear layers that keep their frozen weight in four bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlcourse.freezing import head_name
from tlcourse.quantisation import (
    Quantised,
    QuantisedScales,
    dequantise,
    double_quantise,
    quantise_blockwise,
)
from tlcourse.wrapping import is_in, layer_size, matching, put, stores_transposed, wrapped_layers


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose weight is kept in four bits.

    Dettmers et al. 2023, section 3, equation 5, arXiv:2305.14314, without its adapter: put one
    around it (``tlcourse.lora.add_lora``). The weight is dequantised anew in each forward and
    each backward pass, and nothing of full size stays in between. Scales and levels stay
    float32 when the model is cast. The state dict holds codes, scales, levels and bias.

    Args:
        layer: an ``nn.Linear``, or the ``Conv1D`` of transformers, of which the transpose is
            quantised. It is not changed.
        levels, block_size: as for ``tlcourse.quantisation.quantise_blockwise``.
        double: quantise the scales as well (``tlcourse.quantisation.double_quantise``).

    Attributes:
        weight: the dequantised weight, shape (out_features, in_features); read-only.
        bias: frozen parameter, shape (out_features,), or None.

    Raises:
        ValueError: if the layer is quantised already, or as ``quantise_blockwise``.
        TypeError: if it is not linear.
    """

    codes: Tensor
    levels: Tensor

    def __init__(
        self,
        layer: nn.Module,
        levels: Tensor | None = None,
        block_size: int = 64,
        double: bool = True,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight of full size
        if isinstance(layer, QuantisedLinear):
            raise ValueError("the layer is quantised already")
        self.in_features, self.out_features = layer_size(layer)
        full: Any = layer.weight.T if stores_transposed(layer) else layer.weight  # type: ignore
        quantised = quantise_blockwise(full.detach(), levels, block_size)
        quantised = double_quantise(quantised) if double else quantised
        self._dtype, self._block_sizes, scales = full.dtype, [block_size], quantised.scales
        parts = {"codes": quantised.codes, "levels": quantised.levels.clone()}
        if isinstance(scales, Tensor):
            parts["scales"] = scales
        else:
            self._block_sizes.append(scales.block_size)
            parts |= {"scale_codes": scales.codes, "scale_steps": scales.steps}
            parts["scale_mean"] = scales.mean
        for name, part in parts.items():
            self.register_buffer(name, part)
        bias: Any = layer.bias
        frozen = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", frozen)

    @property
    def quantised(self) -> Quantised:
        """The weight as it is kept."""
        scales: Any
        if len(self._block_sizes) == 1:
            scales = self.scales
        else:
            codes: Any = self.scale_codes
            steps: Any = self.scale_steps
            mean: Any = self.scale_mean
            scales = QuantisedScales(codes, steps, mean, self._block_sizes[1])
        shape = torch.Size((self.out_features, self.in_features))
        return Quantised(self.codes, scales, self.levels, shape, self._dtype, self._block_sizes[0])

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return dequantise(self.quantised)

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        return _Product.apply(x, self.bias, self)

    def dequantised(self) -> nn.Linear:
        """A plain frozen layer with the same outputs."""
        with torch.device("meta"):  # no memory, and no random numbers drawn
            plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        plain.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return plain.train(self.training)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            raise TypeError(
                "the weight of a quantised layer cannot be replaced, as merging an adapter would; "
                "call dequantise_linears(model) first"
            )
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        """Casting reaches the weight that comes out, not the scales and levels inside."""
        kept = {name: part for name, part in self._buffers.items() if part is not None}
        super()._apply(fn, recurse)
        for name, part in kept.items():
            moved: Any = self._buffers[name]
            if moved.dtype != part.dtype:
                self._buffers[name] = part.to(moved.device)
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self.codes.device)).dtype
        return self

    def extra_repr(self) -> str:
        bits = self.quantised.bits_per_weight
        return f"{super().extra_repr()}, bits_per_weight={bits:.3f}"


class _Product(torch.autograd.Function):
    """``F.linear`` that keeps no weight for the backward pass, but dequantises it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads  # (..., out_features)
        wants_x, wants_bias, _ = ctx.needs_input_grad
        grad_x = grad @ ctx.layer.weight.to(grad.dtype) if wants_x else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0) if wants_bias else None
        return grad_x, grad_bias, None


def quantise_linears(
    model: nn.Module,
    target_modules: Iterable[str] | None = None,
    levels: Tensor | None = None,
    block_size: int = 64,
    double: bool = True,
) -> nn.Module:
    """Put a ``QuantisedLinear`` in the place of linear layers, in place.

    Quantise first, then adapt. What is not quantised (embeddings, norms, biases, the head)
    stays as it is, trainable or not. To read a saved model back, quantise one of the same
    architecture in the same way, and load the state dict.

    Args:
        model: any module.
        target_modules: names of ``nn.Linear`` and ``Conv1D`` layers; a name stands for each
            module whose full name equals it or ends with ``"." + name``. None: all such layers,
            except the head and those that share their weight with another module.
        levels, block_size, double: as for ``QuantisedLinear``.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has adapters, a name matches no layer that could be quantised
            (lists those), or a weight is not finite. The model is then unchanged.
    """
    for full, layer in wrapped_layers(model).items():
        raise ValueError(f"{full!r} is a {type(layer).__name__}; quantise before you adapt")
    candidates = _candidates(model)
    if target_modules is None:
        head = head_name(model)
        chosen = [full for full in candidates if head is None or not is_in(full, [head])]
    else:
        names = tuple(target_modules)
        for name in names:
            if not candidates.keys() & set(matching(model, [name])):
                raise ValueError(
                    f"target_modules: no layer of {type(model).__name__} that can be quantised is "
                    f"named {name!r}; these can: {', '.join(candidates) or 'none'}"
                )
        chosen = [full for full in matching(model, names) if full in candidates]
    made = {
        id(candidates[full]): QuantisedLinear(candidates[full], levels, block_size, double)
        for full in chosen
    }
    return _replace(model, made)


def dequantise_linears(model: nn.Module) -> nn.Module:
    """Undo ``quantise_linears`` but for the rounding, in place: before an adapter is merged.

    Returns:
        The same model.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, QuantisedLinear)]
    return _replace(model, {id(layer): layer.dequantised() for layer in layers})


def memory_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers; one that two modules share counts once."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by full name, but those that are quantised, or share their weight."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {
        full: module
        for full, module in model.named_modules()
        if (isinstance(module, nn.Linear) or stores_transposed(module))
        and not isinstance(module, QuantisedLinear)
        and owners.get(id(module.weight)) == 1
    }


def _replace(model: nn.Module, made: dict[int, Any]) -> nn.Module:
    """Put new modules in every place where the old ones, given by ``id``, stand."""
    for full, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in made:
            put(model, full, made[id(module)])
    return model
