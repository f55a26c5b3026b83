"""What a CUDA GPU keeps in memory differently from the CPU, for fake tensors on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

HALF = (torch.bfloat16, torch.float16)

# What CUDA's autocast computes in float32 (ATen/autocast_mode.h, AT_FORALL_FP32...) and the CPU's
# does not; rare functions are left out. Those of the second group keep no float32 copy of their
# input: they take a ``dtype``.
# fmt: off
_IN_FLOAT32 = frozenset((
    "layer_norm", "group_norm", "rms_norm", "exp", "expm1", "log", "log2", "log10", "log1p", "pow",
    "__pow__", "rsqrt", "reciprocal", "softplus", "logsumexp", "norm", "cosine_similarity", "cdist",
    "dist", "interpolate", "upsample", "smooth_l1_loss", "mse_loss", "l1_loss", "huber_loss",
    "kl_div", "nll_loss", "binary_cross_entropy_with_logits",
))
# fmt: on
_TO_FLOAT32 = frozenset(("softmax", "log_softmax", "sum", "prod", "cumsum", "cumprod"))
_ATTENTION_DROPOUT = {"scaled_dot_product_attention": 4, "multi_head_attention_forward": 10}


class AsOnGPU(TorchFunctionMode):
    """Functions as a CUDA GPU computes them, for fake tensors on the CPU.

    Args:
        half: inside autocast to half precision.
        on_gpu: False changes nothing.
    """

    def __init__(self, half: bool, on_gpu: bool) -> None:
        super().__init__()
        self.half, self.on_gpu = half, on_gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if not self.on_gpu:
            return func(*args, **kwargs)
        if name == "dropout" and func is F.dropout:
            return _dropout(func, *args, **kwargs)
        if name in _ATTENTION_DROPOUT:
            # Fused kernels draw the dropout anew in the backward pass; the CPU's has none.
            place = _ATTENTION_DROPOUT[name]
            if len(args) > place:
                args = (*args[:place], 0.0, *args[place + 1 :])
            elif name == "scaled_dot_product_attention":
                kwargs["dropout_p"] = 0.0
        if self.half and name in _IN_FLOAT32:
            args, kwargs = tree_map(_to_float32, (args, kwargs))
        elif self.half and name in _TO_FLOAT32 and kwargs.get("dtype") is None:
            first = args[0] if args else kwargs.get("input")
            if isinstance(first, Tensor) and first.dtype in HALF:
                kwargs["dtype"] = torch.float32
        return func(*args, **kwargs)


def _dropout(
    func: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """A GPU keeps a mask of one byte per number; the CPU keeps factors."""
    if not training or p == 0 or inplace:
        return func(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def _to_float32(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in HALF else x
