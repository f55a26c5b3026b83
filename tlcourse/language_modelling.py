"""Language modelling through ``fit``: the tokens to be guessed, one row of logits for each.

``tl.fit`` and ``tl.evaluate`` want logits, shape (B, K), and B targets. Here B counts tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

MASK_SHARE = 0.3  # of the tokens are to be guessed


class MaskedTokens(nn.Module):
    """A masked language model whose logits are those of the hidden tokens only.

    Args:
        model: a ``ModernBertForMaskedLM``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """input_ids (B, T), positions (M,) in the flattened batch -> logits (M, vocabulary)."""
        hidden = self.model.model(input_ids=input_ids).last_hidden_state
        return self.model.decoder(self.model.head(hidden.flatten(0, 1)[positions]))


class NextTokens(nn.Module):
    """A causal language model with one row of logits for each token of the batch.

    Args:
        model: gives ``.logits``, shape (B, T, vocabulary).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:  # (B, T) -> (B * T, vocabulary)
        return self.model(input_ids=input_ids).logits.flatten(0, 1)


def pack(texts: list[str], tokenizer: Any, length: int) -> Tensor:
    """Texts in a row, an end token before the first and behind each, cut into blocks.

    Args:
        texts: any number of any length.
        tokenizer: of transformers, with an ``eos_token_id``.
        length: tokens that a model sees of a block, >= 1.

    Returns:
        long tensor, shape (N, length + 1): the last token of a block is the first of the next.
        What does not fill a block is left out.

    Raises:
        ValueError: if the texts do not fill one block.
    """
    end = tokenizer.eos_token_id
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    stream = [end, *(token for ids in encoded for token in (*ids, end))]
    starts = range(0, len(stream) - length, length)
    if not starts:
        raise ValueError(f"{len(stream)} tokens do not fill a block of {length} and a target")
    return torch.tensor([stream[start : start + length + 1] for start in starts])


class MaskedBlocks:
    """Batches for ``MaskedTokens``: tokens are hidden anew in every pass.

    Devlin et al. 2019, section 3.1, arXiv:1810.04805: some tokens are picked; 80 % of these become
    [MASK], 10 % a random token, 10 % stay; the model has to name all of them. BERT picks 15 %.
    Here it is 30 %, as in ModernBERT: twice as much to learn from in each step (Wettig et al.
    2022, arXiv:2202.08005).

    Args:
        blocks: long tensor, shape (N, T).
        tokenizer: gives the special ids, which are never hidden.
        batch_size: blocks in a batch; a rest is left out when shuffling.
        seed: of order and masks.
        shuffle: False gives the same batches in every pass.
        share: of the tokens to be guessed, in (0, 1).

    Raises:
        ValueError: for another share.
    """

    def __init__(
        self,
        blocks: Tensor,
        tokenizer: Any,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        share: float = MASK_SHARE,
    ) -> None:
        if not 0 < share < 1:
            raise ValueError(f"share must be in (0, 1), got {share}")
        self.blocks, self.batch_size, self.seed, self.shuffle = blocks, batch_size, seed, shuffle
        self.share = share
        self.mask_id, self.vocab_size = tokenizer.mask_token_id, len(tokenizer)
        self.special = torch.tensor(tokenizer.all_special_ids)
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.blocks) // self.batch_size

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        chance = self._generator if self.shuffle else torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.blocks), generator=chance)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield self.hide(self.blocks[order[start : start + self.batch_size]], chance)

    def hide(self, ids: Tensor, chance: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """({"input_ids", "positions"}, the hidden tokens) of a batch of blocks, shape (B, T)."""
        candidates = ~torch.isin(ids, self.special)
        picked = (torch.rand(ids.shape, generator=chance) < self.share) & candidates
        positions = picked.flatten().nonzero().squeeze(1)
        targets = ids.flatten()[positions]
        how = torch.rand(len(positions), generator=chance)
        other = torch.randint(self.vocab_size, (len(positions),), generator=chance)
        shown = torch.where(how < 0.8, self.mask_id, torch.where(how < 0.9, other, targets))
        hidden = ids.flatten().clone()
        hidden[positions] = shown
        return {"input_ids": hidden.view_as(ids), "positions": positions}, targets


class NextTokenBlocks:
    """Batches for ``NextTokens``: each token is the target of the one before it.

    Args:
        blocks: long tensor, shape (N, T + 1).
        batch_size: blocks in a batch; a rest is left out when shuffling.
        seed: of the order.
        shuffle: False keeps the order.
    """

    def __init__(
        self, blocks: Tensor, batch_size: int, seed: int = 0, shuffle: bool = True
    ) -> None:
        self.blocks, self.batch_size, self.shuffle = blocks, batch_size, shuffle
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.blocks) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        num = len(self.blocks)
        order = (
            torch.randperm(num, generator=self._generator) if self.shuffle else torch.arange(num)
        )
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            block = self.blocks[order[start : start + self.batch_size]]
            yield block[:, :-1], block[:, 1:].flatten()
