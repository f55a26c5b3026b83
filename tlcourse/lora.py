"""LoRA: a frozen layer plus a trainable update of low rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlcourse.merging import MergeableLayer, fold
from tlcourse.wrapping import WrapConfig, stores_transposed, wrap


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(WrapConfig):
    """Settings of LoRA. Make a changed copy with ``dataclasses.replace``.

    Attributes:
        rank: of the update, >= 1.
        alpha: strength of the update, > 0; the update is multiplied by ``scale``.
        dropout: share of a layer's inputs that the update does not see in training, in [0, 1).
        target_modules: see ``WrapConfig``; by default the queries and values of a BERT, after
            Hu et al. 2021, section 7.1.
        modules_to_save: see ``WrapConfig``.
        rank_stabilised: scale by ``alpha / sqrt(rank)`` in place of ``alpha / rank``
            (rsLoRA, Kalajdzievski 2023, equation 3, arXiv:2312.03732).

    Raises:
        ValueError: names the setting, the value and what was expected.
        TypeError: if a number is not a number, rank is not an int, or names are no tuple.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("query", "value")
    rank_stabilised: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("rank", ">= 1", lambda rank: rank >= 1, integral=True)
        self._check("alpha", "> 0 and finite", lambda alpha: 0 < alpha < math.inf)
        self._check("dropout", "in [0, 1)", lambda dropout: 0 <= dropout < 1)
        if not isinstance(self.rank_stabilised, bool):
            raise TypeError(f"rank_stabilised must be True or False, got {self.rank_stabilised!r}")

    @property
    def scale(self) -> float:
        """What the update is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


class LoRALinear(MergeableLayer):
    """A frozen linear layer plus ``scale * B A``.

    Hu et al. 2021, section 4.1, equation 3, arXiv:2106.09685. As in Hugging Face peft, A starts
    as ``nn.Linear`` weights do (Kaiming uniform) where the paper has a Gaussian, and A and B are
    float32 where the base is in half precision. B starts at zero, so the layer starts as its
    base. See ``MergeableLayer`` for ``merge`` and ``unmerge``.

    Args:
        base: an ``nn.Linear`` or the ``Conv1D`` of transformers; frozen in place.
        config: its names are not used here.

    Attributes:
        lora_A: parameter, shape (rank, in_features).
        lora_B: parameter, shape (out_features, rank).

    Raises:
        TypeError: if base is something else.
    """

    config: LoRAConfig

    def __init__(self, base: nn.Module, config: LoRAConfig) -> None:
        super().__init__(base, config)
        options = self.new_options()
        self.lora_A = nn.Parameter(torch.empty(config.rank, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, config.rank, **options))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dropout = nn.Dropout(config.dropout)

    def adapted(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        result = self.base(x)
        if not torch.is_autocast_enabled(x.device.type):  # which would cast back again
            x = x.to(self.lora_A.dtype)
        low = F.linear(self.dropout(x), self.lora_A)  # (..., rank)
        if low.dtype != result.dtype or not x.is_cuda:  # on a CPU the bits that peft gives
            return (result + F.linear(low, self.lora_B) * self.config.scale).to(result.dtype)
        # One kernel for result + scale * low B^T, without a tensor for the update alone.
        flat = result.reshape(-1, self.out_features), low.reshape(-1, self.config.rank)
        adapted = torch.addmm(*flat, self.lora_B.T, alpha=self.config.scale)
        return adapted.view_as(result)

    def merged_parameters(self) -> dict[str, Tensor]:
        update = self.lora_B @ self.lora_A * self.config.scale  # (out_features, in_features)
        weight = self.base.weight
        return {"weight": weight + (update.T if stores_transposed(self.base) else update)}

    def extra_repr(self) -> str:
        return f"rank={self.config.rank}, scale={self.config.scale:g}, merged={self.merged}"


def add_lora(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Adapt a model by LoRA, in place.

    Everything is frozen (``tl.freeze``: no gradients, still statistics, no dropout); then each
    target gets an update of low rank, and ``modules_to_save`` are trained in full, with the
    dropout beside them. Unlike in peft, dropout inside the frozen model is off in training.

    Args:
        model: any module; on its device.
        config: see ``LoRAConfig``.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has adapters already, a name matches nothing (lists what could
            be adapted), a layer stands in two places, or one of ``modules_to_save`` shares its
            weight with another module. The model is then unchanged.
        TypeError: if a matching module is not linear; the model is then unchanged.
    """
    return wrap(model, config, lambda _, layer: LoRALinear(layer, config))


def merge_lora(model: nn.Module) -> nn.Module:
    """Fold every ``LoRALinear`` into its base, in place, and leave plain layers.

    The state dict has the same keys as before ``add_lora``, and the model costs what it cost
    then. The model stays frozen but for ``modules_to_save``. There is no way back: to compare,
    use ``LoRALinear.merge`` and ``unmerge``, or copy the model first.

    A weight that two modules share (the embedding and ``lm_head`` of GPT-2) is shared no longer
    if one of them was adapted: a warning says so, and ``config.tie_word_embeddings`` of
    transformers becomes False, so that ``save_pretrained`` keeps both.

    Returns:
        The same model.

    Raises:
        ValueError: if there is no ``LoRALinear``.
    """
    return fold(model, LoRALinear)
