"""Several short texts in one row: hardly a place is padding, and every batch has one shape.

Packing without mixing (Krell et al. 2021, sections 3.1 and 3.2, arXiv:2107.02027): a text sees
itself alone, its positions count from 0, and it is pooled by itself. So the model computes for
each text what it computes for it alone.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tlcourse.backbones import Backbone
from tlcourse.language_models import MAX_TOKENS, TextBackbone, pool_tokens

# Bodies whose positions start at 0 and that take a mask of shape (R, 1, T, T).
_BODIES = ("bert", "modernbert")


class PackedLoader:
    """Batches of rows with several texts each, for a backbone of ``pack_backbone``.

    Yields ``(inputs, targets)`` for n texts, which differs a little from batch to batch; the
    rows R and their length T do not:

    - ``input_ids``, ``position_ids``: long, shape (R, T); positions count from 0 in each text;
    - ``text_ids``: long, shape (R * T,), the number of each place's text, in [0, n); padding has n
      (flat, so that no batch looks as if its tensors could be cut into single texts);
    - ``starts``, ``lengths``: long, shape (n,): where each text starts in the flattened rows, and
      how many tokens it has;
    - targets: long, shape (n,).

    Which *lengths* share a row is settled once, by best fit: the longest text first, each into the
    fullest row that still has room (Johnson 1974). So every pass has as many batches. Which *texts*
    of those lengths share a row, and which rows share a batch, is drawn anew in every pass, such
    that all batches have nearly as many texts.

    Args:
        tokens: token ids of each text.
        targets: long tensor, shape (N,).
        rows_per_batch: at most so many rows, >= 1. It may be up to a quarter fewer (see ``rows``),
            where the last batch would leave over 2 % of all rows empty otherwise.
        row_length: tokens in a row, T.
        pad_id: fills up the rows.
        shuffle: draw texts and rows from ``seed``.
        seed: of the order; two loaders of one seed give the same batches.

    Attributes:
        rows: rows in each batch, R.
        real_share: share of all places that hold a token of a text, in (0, 1].

    Raises:
        ValueError: if there are not as many texts as targets, there is no text, one has no token
            or more than ``row_length``, or rows_per_batch < 1.
    """

    def __init__(
        self,
        tokens: Sequence[Sequence[int]],
        targets: Tensor,
        rows_per_batch: int,
        row_length: int = MAX_TOKENS,
        pad_id: int = 0,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        _check(tokens, targets, rows_per_batch, row_length)
        self.targets, self.row_length, self.pad_id = targets, row_length, pad_id
        self.shuffle = shuffle
        self.device: torch.device | None = None  # None: batches stay where they are made
        self._lengths = torch.tensor([len(one) for one in tokens])
        self._stream = torch.tensor([token for one in tokens for token in one])
        self._offsets = self._lengths.cumsum(0) - self._lengths  # of each text in the stream
        self._plan = best_fit(self._lengths.tolist(), row_length)
        self.rows = _rows_of_a_batch(len(self._plan), rows_per_batch)
        self._num_batches = -(-len(self._plan) // self.rows)
        places = self._num_batches * self.rows * row_length
        self.real_share = len(self._stream) / places
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        rows = self._swap_equals() if self.shuffle else self._plan
        for batch in self._deal(rows):
            yield self._fill(batch)

    def _swap_equals(self) -> list[list[int]]:
        """The plan, with texts of equal length exchanged at random."""
        order = torch.randperm(len(self.targets), generator=self._generator)
        drawn = order[self._lengths[order].argsort(stable=True)].tolist()
        place_of = dict(zip(self._lengths.argsort(stable=True).tolist(), drawn, strict=True))
        return [[place_of[text] for text in row] for row in self._plan]

    def _deal(self, rows: list[list[int]]) -> list[list[list[int]]]:
        """Rows of each batch: the row with most texts to the batch that has fewest so far."""
        if not self.shuffle:
            return [rows[i :: self._num_batches] for i in range(self._num_batches)]
        batches: list[list[list[int]]] = [[] for _ in range(self._num_batches)]
        sizes = [0] * self._num_batches
        order = torch.randperm(len(rows), generator=self._generator).tolist()
        order.sort(key=lambda row: -len(rows[row]))  # ties stay in the shuffled order
        for first in range(0, len(order), self._num_batches):  # a row for each batch
            turn = torch.randperm(self._num_batches, generator=self._generator).tolist()
            turn.sort(key=sizes.__getitem__)
            for batch, row in zip(turn, order[first : first + self._num_batches], strict=False):
                batches[batch].append(rows[row])
                sizes[batch] += len(rows[row])
        return [batches[i] for i in torch.randperm(len(batches), generator=self._generator)]

    def _fill(self, rows: list[list[int]]) -> tuple[dict[str, Tensor], Tensor]:
        texts = torch.tensor([text for row in rows for text in row])  # (n,)
        row_of = torch.tensor([i for i, row in enumerate(rows) for _ in row])
        lengths = self._lengths[texts]
        before = lengths.cumsum(0) - lengths  # tokens of the batch before each text
        first = torch.tensor([len(row) for row in rows]).cumsum(0) - 1  # last text of each row...
        filled = (before + lengths)[first]
        filled = torch.cat([filled.new_zeros(1), filled])[row_of]  # ...and tokens before each row
        starts = row_of * self.row_length + before - filled
        number = torch.arange(len(texts)).repeat_interleave(lengths)  # text of each token
        within = torch.arange(len(number)) - before[number]
        places = starts[number] + within
        shape = (self.rows, self.row_length)
        ids = torch.full(shape, self.pad_id)
        positions, text_ids = torch.zeros_like(ids), torch.full((ids.numel(),), len(texts))
        ids.view(-1)[places] = self._stream[self._offsets[texts][number] + within]
        positions.view(-1)[places] = within
        text_ids[places] = number
        inputs = {"input_ids": ids, "position_ids": positions, "text_ids": text_ids}
        inputs |= {"starts": starts, "lengths": lengths}
        if self.device is None:
            return varying(inputs), self.targets[texts]
        moved = {name: _moved(x, self.device) for name, x in inputs.items()}
        return varying(moved), _moved(self.targets[texts], self.device)

    def resident(self, device: torch.device) -> PackedLoader:
        """This loader with batches on a GPU, sent there while the GPU works on the one before.

        The two share their source of chance: the batches are those that this one would give.
        """
        if device.type != "cuda":
            return self
        moved = copy.copy(self)
        moved.device = device
        return moved


class PackedBackbone(TextBackbone):
    """An encoder of text that takes packed rows, and padded texts as before.

    Made by ``pack_backbone``. Its state dict has the keys of the backbone that it was made of.
    """

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        starts: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Args:
            input_ids: long, shape (R, T).
            attention_mask: long, shape (R, T): one text in each row; nothing else is given then.
            position_ids, text_ids, starts, lengths: see ``PackedLoader``.

        Returns:
            features, float tensor, shape (n, feature_dim); n is R without packing.

        Raises:
            ValueError: if neither a mask nor all of the others are given.
        """
        if attention_mask is not None:
            hidden = self.body(input_ids=input_ids, attention_mask=attention_mask)
            return pool_tokens(hidden.last_hidden_state, attention_mask, self.pooling)
        if position_ids is None or text_ids is None or starts is None or lengths is None:
            raise ValueError(
                "give attention_mask (padded texts), or position_ids, text_ids, starts and lengths "
                "(rows of a PackedLoader)"
            )
        mask = self._mask(text_ids.view_as(input_ids))
        hidden = self.body(
            input_ids=input_ids, attention_mask=mask, position_ids=position_ids
        ).last_hidden_state
        if self.pooling == "cls":
            return hidden.flatten(0, 1).index_select(0, starts)
        return mean_of_texts(hidden, text_ids, lengths)

    def _mask(self, text_ids: Tensor) -> Tensor:
        """Shape (R, 1, T, T): places of one text see each other, and so do those of padding."""
        same = (text_ids[:, :, None] == text_ids[:, None, :]).unsqueeze(1)
        config: Any = self.body.config
        if config._attn_implementation == "sdpa":
            return same
        lowest = torch.finfo(torch.float32).min  # "eager" adds the mask to the scores
        return torch.zeros(same.shape, device=same.device).masked_fill(~same, lowest)


def pack_backbone(backbone: Backbone) -> PackedBackbone:
    """A backbone for the batches of a ``PackedLoader``; it shares the weights of ``backbone``.

    Padded batches (``TokenLoader``) still work, so that a model may learn from packed rows and be
    validated on padded texts.

    Args:
        backbone: an encoder of text, "sdpa" or "eager" attention (transformers' two defaults).

    Raises:
        ValueError: if it is no encoder that can be packed (names what it is).
    """
    config: Any = getattr(getattr(backbone, "body", None), "config", None)
    kind = getattr(config, "model_type", type(backbone).__name__)
    if not isinstance(backbone, TextBackbone) or kind not in _BODIES:
        raise ValueError(f"can pack text backbones of {' and '.join(_BODIES)}, got {kind}")
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"attention must be 'sdpa' or 'eager', got {attention!r}")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError("a model with sliding windows cannot be packed: the mask replaces them")
    packed = PackedBackbone(
        backbone.body, backbone.name, backbone.feature_dim, backbone.preprocess,
        backbone.pooling, backbone.card,
    )  # fmt: skip
    packed.training = backbone.training  # not .train(): the body keeps its own mode
    return packed


def mean_of_texts(hidden: Tensor, text_ids: Tensor, lengths: Tensor) -> Tensor:
    """Mean over the tokens of each text, added up in single precision.

    Args:
        hidden: shape (R, T, D).
        text_ids: long, shape (R * T,), in [0, n]; n stands for padding.
        lengths: long, shape (n,), each >= 1.

    Returns:
        shape (n, D).
    """
    sums = hidden.new_zeros(lengths.shape[0] + 1, hidden.shape[-1], dtype=torch.float32)
    sums = sums.index_add(0, text_ids, hidden.flatten(0, 1).float())
    return (sums[:-1] / lengths.unsqueeze(1)).to(hidden.dtype)


def best_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Best fit, longest first: each text goes into the fullest row that still has room for it.

    Args:
        lengths: of each text, in [1, row_length].
        row_length: what a row can hold.

    Returns:
        The numbers of the texts of each row.
    """
    rows: list[list[int]] = []
    with_room: list[list[list[int]]] = [[] for _ in range(row_length + 1)]  # by free places
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        length = lengths[text]
        room = next((r for r in range(length, row_length + 1) if with_room[r]), None)
        if room is None:
            row: list[int] = []
            rows.append(row)
            room = row_length
        else:
            row = with_room[room].pop()
        row.append(text)
        with_room[room - length].append(row)
    return rows


def _rows_of_a_batch(total: int, most: int) -> int:
    """The largest number up to ``most`` that leaves few rows of the last batch empty."""
    most = min(most, total)
    choices = range(most, (3 * most + 3) // 4 - 1, -1)
    few = (rows for rows in choices if -total % rows <= total / 50)
    return next(few, min(choices, key=lambda rows: -total % rows))


def varying(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tell torch.compile, where it is in use, that the number of texts will change.

    Without this it compiles for the first number, and a second time when it meets another. A
    copy to another device loses the mark: call this again on tensors moved beforehand.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        for name in ("starts", "lengths"):
            dynamo.maybe_mark_dynamic(inputs[name], 0)
    return inputs


def _moved(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True)  # from other memory the copy would wait


def _check(
    tokens: Sequence[Sequence[int]], targets: Tensor, rows_per_batch: int, row_length: int
) -> None:
    if len(tokens) != len(targets):
        raise ValueError(f"{len(tokens)} texts but {len(targets)} targets; expected as many")
    if rows_per_batch < 1:
        raise ValueError(f"rows_per_batch must be >= 1, got {rows_per_batch}")
    if len(tokens) == 0 or min(map(len, tokens)) == 0:
        raise ValueError("need at least one text, and at least one token in each")
    longest = max(range(len(tokens)), key=lambda text: len(tokens[text]))
    if len(tokens[longest]) > row_length:
        raise ValueError(
            f"text {longest} has {len(tokens[longest])} tokens, a row only {row_length}; "
            "cut it (Tokeniser does, with max_tokens) or lengthen the rows"
        )
