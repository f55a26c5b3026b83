"""A frozen language model that sees more tokens than its text: mask, positions, generation."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Names under which transformers' models keep a learned table of absolute positions.
POSITION_TABLES = ("position_embeddings", "wpe", "embed_positions")
NOT_FORWARDED = {"inputs_embeds", "past_key_values", "position_ids"}  # the wrapper's own business
NOT_GENERATED = NOT_FORWARDED | {"max_length", "min_length"}  # these would count virtual tokens


class VirtualTokens(nn.Module):
    """What soft prompts and prefixes share: a frozen body that sees ``num_tokens`` more tokens.

    Every real token attends to every virtual one: they are in front, for a causal mask, and
    never padding. The body runs in evaluation mode for good (``tlcourse.freezing.freeze``).
    Positions count from the first token that is not padding, so that padding on either side
    changes nothing; transformers and peft count the padding on the left as well.

    The body is a text encoder or decoder of transformers, called as
    ``body(input_ids=..., attention_mask=...)``; encoder-decoders and image models are refused.

    Args:
        body: frozen in place.
        num_tokens: number P of virtual tokens, >= 1.
        shift_positions: True, as transformers and peft do it: text starts at position P.
            False: at 0, where the body met it in pre-training. A shift of 20 alone turns the
            mean features of all-MiniLM-L6-v2 to a cosine of 0.90 with themselves (200
            docstrings, up to 32 tokens).
    """

    def __init__(self, body: nn.Module, num_tokens: int, shift_positions: bool = True) -> None:
        super().__init__()
        check_count("num_tokens", num_tokens)
        self._takes = set(inspect.signature(body.forward).parameters)
        config: Any = getattr(body, "config", None)
        if not {"input_ids", "inputs_embeds", "attention_mask"} <= self._takes or (
            getattr(config, "is_encoder_decoder", True)
        ):
            raise ValueError(
                "body must be a text encoder or decoder of transformers, such as BertModel or "
                f"GPT2LMHeadModel, got {type(body).__name__}"
            )
        self.body: Any = body  # frozen by the method, once all its arguments have been found good
        self.num_tokens, self.shift_positions = num_tokens, shift_positions
        self._first_position, self._num_positions = _position_table(body)

    def extra_repr(self) -> str:
        return f"num_tokens={self.num_tokens}, shift_positions={self.shift_positions}"

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Continue texts with ``body.generate``; the virtual tokens wait in its cache.

        Args:
            input_ids: int64 tensor, shape (B, T); shorter texts are padded on the left.
            attention_mask: 1 for text, 0 for padding, shape (B, T); None: all is text.
            options: what ``generate`` of transformers takes; lengths as ``max_new_tokens``.

        Returns:
            int64 tensor, shape (B, T + new), or (B * N, T + new) with
            ``num_return_sequences=N``.

        Raises:
            ValueError: if the body has no ``generate``, the last token of a text is padding,
                the text is too long, or shapes differ.
            TypeError: for an option that the wrapper sets itself.
        """
        if not getattr(self.body, "can_generate", bool)():
            raise ValueError(f"{type(self.body).__name__} cannot generate; wrap a language model")
        refuse(NOT_GENERATED, options)
        mask = self._mask(input_ids, attention_mask, extra=options.get("max_new_tokens") or 0)
        if not mask[:, -1].all():
            raise ValueError("a text ends in padding; pad on the left to generate")
        settings = options.get("generation_config") or self.body.generation_config
        copies = [  # of each text, made by generate itself
            options.get(name) or getattr(settings, name, None) or 1
            for name in ("num_beams", "num_return_sequences")
        ]
        with torch.no_grad():
            cache = self._cache(len(input_ids) * max(copies))
        # generate skips as many ids as are cached. These the text has anyway, so that a penalty
        # on repeated tokens hits no other.
        stand_ins = input_ids[:, :1].expand(-1, self.num_tokens)
        with self._positions_for_generate():
            ids = self.body.generate(
                input_ids=torch.cat([stand_ins, input_ids], dim=1),
                attention_mask=self._extend(mask, 1),
                past_key_values=cache,
                **options,
            )
        return ids[:, self.num_tokens :]

    def _cache(self, batch_size: int) -> Any:
        """Keys and values of the virtual tokens, a transformers ``Cache``."""
        raise NotImplementedError

    def _extend(self, values: Tensor, filler: int) -> Tensor:
        """Put a constant for each virtual token in front: (B, T) -> (B, P + T)."""
        return torch.cat([values.new_full((len(values), self.num_tokens), filler), values], dim=1)

    def _mask(self, input_ids: Tensor, attention_mask: Tensor | None, extra: int = 0) -> Tensor:
        """The mask, shape (B, T), once the inputs are found to fit."""
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids must have shape (B, T), got {tuple(input_ids.shape)}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, "
                f"got {tuple(mask.shape)}"
            )
        offset = self.num_tokens if self.shift_positions else 0
        needed = offset + input_ids.shape[1] + extra
        if needed > self._num_positions:
            raise ValueError(
                f"{offset} virtual tokens and {needed - offset} real ones need {needed} "
                f"positions, the body has {self._num_positions:g}; truncate the text"
            )
        return mask

    def _positions(self, mask: Tensor) -> Tensor:
        """Position of each real token, shape (B, T)."""
        padding_on_the_left = (mask.cumsum(dim=1) == 0).sum(dim=1, keepdim=True)
        steps = torch.arange(mask.shape[1], device=mask.device)
        start = self._first_position + self.num_tokens * self.shift_positions
        return start + (steps - padding_on_the_left).clamp(min=0)

    def _as_argument(self, positions: Tensor) -> dict[str, Tensor]:
        """Bodies without absolute positions (ALiBi, relative) take none."""
        return {"position_ids": positions} if "position_ids" in self._takes else {}

    @contextmanager
    def _positions_for_generate(self) -> Iterator[None]:
        """generate counts from the mask, so that text starts at P; take P off where asked to."""

        def unshift(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            positions = (kwargs["position_ids"] - self.num_tokens).clamp(min=0)
            return args, kwargs | {"position_ids": positions}

        handles = []
        if not self.shift_positions and "position_ids" in self._takes:
            handles.append(self.body.register_forward_pre_hook(unshift, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _position_table(body: nn.Module) -> tuple[int, float]:
    """First position of a text, and number of positions; infinitely many without a table."""
    for name, module in body.named_modules():
        if name.rpartition(".")[2] in POSITION_TABLES and isinstance(module, nn.Embedding):
            # RoBERTa and its kin begin behind the row that stands for padding.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            config: Any = body.config
            return first, config.max_position_embeddings - first
    return 0, float("inf")


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int >= 1, got {value!r}")


def refuse(names: set[str], given: dict[str, Any]) -> None:
    for name in sorted(names & given.keys()):
        raise TypeError(f"{name} is set by the virtual tokens' wrapper and cannot be given")
