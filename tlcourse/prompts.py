"""Soft prompts, and prefixes of keys and values, for a frozen language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tlcourse.freezing import freeze
from tlcourse.virtual_tokens import NOT_FORWARDED, VirtualTokens, check_count, refuse


class PromptTuning(VirtualTokens):
    """A soft prompt: P trained vectors in front of the embedded text.

    Lester et al. 2021, section 2, arXiv:2104.08691. ``prompt``, shape (P, D), is the only
    trainable parameter. As in peft, and as with real tokens in their place, the virtual tokens
    have the positions 0 to P - 1. Deliberate differences: they are cut from the output, and
    "random" is normal with the scale of the body's embeddings (the paper: uniform in
    [-0.5, 0.5], made for T5).

    Args:
        body, num_tokens, shift_positions: as for ``VirtualTokens``.
        init: "random"; "vocabulary": P tokens drawn from the vocabulary, with replacement; or
            the ids of a text, which is repeated or cut to length P (the paper's class labels).

    Raises:
        ValueError: for a body of another kind, an unknown ``init``, or ids outside the
            vocabulary.
    """

    def __init__(
        self,
        body: nn.Module,
        num_tokens: int,
        init: str | Sequence[int] | Tensor = "random",
        shift_positions: bool = True,
    ) -> None:
        super().__init__(body, num_tokens, shift_positions)
        self.prompt = nn.Parameter(self._initial(init))
        freeze(self.body)

    def _initial(self, init: str | Sequence[int] | Tensor) -> Tensor:
        table = self.body.get_input_embeddings().weight.detach().float()  # (V, D)
        vocabulary_size, dim = table.shape
        if isinstance(init, str):
            if init == "random":
                return torch.randn(self.num_tokens, dim, device=table.device) * table.std()
            if init == "vocabulary":
                return table[torch.randint(vocabulary_size, (self.num_tokens,))].clone()
            raise ValueError(f"init must be 'random', 'vocabulary' or token ids, got {init!r}")
        ids = torch.as_tensor(init, dtype=torch.long).flatten()
        outside = ids[(ids < 0) | (ids >= vocabulary_size)]
        if len(ids) == 0 or len(outside):
            found = f"id {int(outside[0])}" if len(outside) else "no id"
            raise ValueError(f"init ids must be in [0, {vocabulary_size}), got {found}")
        return table[ids.repeat(-(-self.num_tokens // len(ids)))[: self.num_tokens]].clone()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Args:
            input_ids: int64 tensor, shape (B, T).
            attention_mask: 1 for text, 0 for padding, shape (B, T); None: all is text.
            kwargs: what else the body takes; ``token_type_ids`` and ``labels``, shape (B, T),
                are extended.

        Returns:
            The body's output for the real tokens: ``last_hidden_state`` (B, T, D) or ``logits``
            (B, T, V); ``hidden_states`` likewise; ``attentions`` (B, heads, T, P + T). BERT's
            ``pooler_output`` is that of the first real token, not of the first virtual one.

        Raises:
            ValueError: if shapes differ, the text is too long, or the body gives no vector per
                token (classifiers of sequences; wrap their encoder).
            TypeError: for an argument that the wrapper sets itself.
        """
        refuse(NOT_FORWARDED, kwargs)
        mask = self._mask(input_ids, attention_mask)
        embedded = self.body.get_input_embeddings()(input_ids)  # (B, T, D)
        prompt = self.prompt.to(embedded.dtype).expand(len(embedded), -1, -1)
        virtual = torch.arange(self.num_tokens, device=mask.device) + self._first_position
        positions = torch.cat([virtual.expand(len(mask), -1), self._positions(mask)], dim=1)
        for name, filler in (("token_type_ids", 0), ("labels", -100)):
            if kwargs.get(name) is not None:
                kwargs[name] = self._extend(kwargs[name], filler)
        if "use_cache" in self._takes:
            kwargs.setdefault("use_cache", False)
        outputs = self.body(
            inputs_embeds=torch.cat([prompt, embedded], dim=1),
            attention_mask=self._extend(mask, 1),
            **self._as_argument(positions),
            **kwargs,
        )
        return self._without_virtual(outputs, input_ids.shape[1])

    def _without_virtual(self, outputs: Any, length: int) -> Any:
        for name in ("last_hidden_state", "logits"):
            value = getattr(outputs, name, None)
            if value is None:
                continue
            if value.ndim != 3:
                raise ValueError(
                    f"body must give a vector per token, got {name} of shape "
                    f"{tuple(value.shape)}; wrap the encoder of {type(self.body).__name__}"
                )
            outputs[name] = value[:, -length:]
        if getattr(outputs, "hidden_states", None) is not None:
            outputs["hidden_states"] = tuple(h[:, -length:] for h in outputs.hidden_states)
        if getattr(outputs, "attentions", None) is not None:
            outputs["attentions"] = tuple(a[:, :, -length:] for a in outputs.attentions)
        if getattr(outputs, "pooler_output", None) is not None:
            outputs["pooler_output"] = self.body.pooler(outputs.last_hidden_state)
        return outputs

    def _cache(self, batch_size: int) -> Any:
        # Through a causal body, a soft prompt is a prefix: its keys and values see no text.
        device = self.prompt.device
        prompt = self.prompt.to(self.body.get_input_embeddings().weight.dtype)
        positions = torch.arange(self.num_tokens, device=device) + self._first_position
        return self.body(
            inputs_embeds=prompt.expand(batch_size, -1, -1),
            attention_mask=torch.ones(batch_size, self.num_tokens, dtype=torch.long, device=device),
            use_cache=True,
            **self._as_argument(positions.expand(batch_size, -1)),
        ).past_key_values

    def prompt_embeddings(self) -> Tensor:
        """What peft saves under this name, shape (P, D)."""
        return self.prompt.detach().clone()

    def load_prompt_embeddings(self, embeddings: Tensor) -> None:
        """Take over ``prompt_embeddings`` of a file of peft.

        Raises:
            ValueError: if the shape is not (P, D).
        """
        _copy(embeddings, self.prompt)


class PrefixTuning(VirtualTokens):
    """Trained keys and values in every layer of attention, which all tokens attend to.

    Li and Liang 2021, section 4, arXiv:2101.00190; for encoders and without ``hidden`` it is
    P-tuning v2, Liu et al. 2021, section 3.2, arXiv:2110.07602. The prefix goes into the cache
    of past keys and values. A decoder is made for that. BertModel takes the cache too, though
    it is no decoder, as long as the mask covers prefix and text: transformers keeps this path
    open for peft ("prefix tuning is evil", masking_utils.py), and this class equals peft's.

    Trainable is ``prefix`` alone, shape (P, layers, 2, heads, head size), where 2 is key and
    value; its rows are the prompt embeddings of peft. With ``hidden``, ``prefix`` has shape
    (P, D) and is mapped there by a trained ``mlp`` of two layers (section 4.3, which found
    direct training unstable); ``drop_reparametrisation`` when training is over.

    Deliberate difference: ``prefix`` starts small, so that the body starts near its pre-trained
    features; peft draws it with standard deviation 1.

    Args:
        body: must take ``past_key_values``.
        num_tokens, shift_positions: as for ``VirtualTokens``.
        hidden: width of the MLP, >= 1; None: no MLP.
        std: of the normal start without MLP, >= 0. The MLP starts as ``nn.Linear`` does.

    Raises:
        ValueError: for a body of another kind, or a number outside its range.
    """

    def __init__(
        self,
        body: nn.Module,
        num_tokens: int,
        hidden: int | None = None,
        std: float = 0.02,
        shift_positions: bool = True,
    ) -> None:
        super().__init__(body, num_tokens, shift_positions)
        if "past_key_values" not in self._takes:
            raise ValueError(f"{type(body).__name__} takes no past_key_values; use PromptTuning")
        if not std >= 0:
            raise ValueError(f"std must be >= 0, got {std}")
        config, weight = self.body.config, self.body.get_input_embeddings().weight
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_size = getattr(config, "head_dim", None)
        head_size = head_size or config.hidden_size // config.num_attention_heads
        self._shape = (num_tokens, config.num_hidden_layers, 2, heads, head_size)
        self.mlp: nn.Sequential | None = None
        if hidden is None:
            start = torch.randn(self._shape) * std
        else:
            check_count("hidden", hidden)
            start = torch.randn(num_tokens, config.hidden_size)
            width = start[0].new_empty(self._shape[1:]).numel()
            self.mlp = nn.Sequential(
                nn.Linear(config.hidden_size, hidden), nn.Tanh(), nn.Linear(hidden, width)
            ).to(weight.device)
        self.prefix = nn.Parameter(start.to(weight.device))
        freeze(self.body)

    def keys_and_values(self) -> Tensor:
        """The prefix as attention sees it, shape (layers, 2, heads, P, head size)."""
        prefix = self.prefix if self.mlp is None else self.mlp(self.prefix)
        return prefix.view(self._shape).permute(1, 2, 3, 0, 4)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Args:
            input_ids: int64 tensor, shape (B, T).
            attention_mask: 1 for text, 0 for padding, shape (B, T); None: all is text.
            kwargs: what else the body takes.

        Returns:
            The body's output, as without a prefix: ``last_hidden_state`` (B, T, D) or
            ``logits`` (B, T, V); ``attentions`` are (B, heads, T, P + T).

        Raises:
            ValueError: if shapes differ, the text is too long, or gradient checkpointing is on.
            TypeError: for an argument that the wrapper sets itself.
        """
        refuse(NOT_FORWARDED, kwargs)
        mask = self._mask(input_ids, attention_mask)
        parts = self.body.modules() if self.body.training else ()  # it is off in evaluation mode
        if any(getattr(part, "gradient_checkpointing", False) for part in parts):
            raise ValueError("gradient checkpointing drops the cache, and the prefix with it")
        kwargs.setdefault("use_cache", False)
        return self.body(
            input_ids=input_ids,
            attention_mask=self._extend(mask, 1),
            past_key_values=self._cache(len(input_ids)),
            **self._as_argument(self._positions(mask)),
            **kwargs,
        )

    def _cache(self, batch_size: int) -> Any:
        from transformers import DynamicCache

        dtype = self.body.get_input_embeddings().weight.dtype
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.keys_and_values().to(dtype)):
            shape = (batch_size, *keys.shape)  # (B, heads, P, head size)
            cache.update(keys.expand(shape), values.expand(shape), layer)
        return cache

    def drop_reparametrisation(self) -> None:
        """Keep the prefix and forget the MLP that made it (section 4.3); the outputs stay."""
        self.prefix = nn.Parameter(self.prompt_embeddings().view(self._shape))
        self.mlp = None

    def prompt_embeddings(self) -> Tensor:
        """What peft saves under this name, shape (P, layers * 2 * heads * head size)."""
        prefix = self.prefix if self.mlp is None else self.mlp(self.prefix)
        return prefix.detach().reshape(self.num_tokens, -1).clone()

    def load_prompt_embeddings(self, embeddings: Tensor) -> None:
        """Take over ``prompt_embeddings`` of a file of peft; an MLP is dropped first.

        Raises:
            ValueError: if the shape differs.
        """
        self.drop_reparametrisation()
        _copy(embeddings, self.prefix)


def _copy(embeddings: Tensor, parameter: nn.Parameter) -> None:
    expected = parameter.flatten(1).shape
    if embeddings.shape != expected:
        raise ValueError(
            f"prompt_embeddings must have shape {tuple(expected)}, got {tuple(embeddings.shape)}"
        )
    with torch.no_grad():
        parameter.copy_(embeddings.view_as(parameter))
