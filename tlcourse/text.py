"""Text tasks: documentation routing, split by file, and batches of tokens of similar length."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tlcourse.datasets import Loaders, SplitTask, draw_labels
from tlcourse.docstrings import TOPICS, standard_library

Tokenise = Callable[[Sequence[str]], list[list[int]]]  # texts -> token ids of each
TEXT_TASKS = ("doc_routing",)
# A file belongs to one split as a whole, by a hash of its name. The eight files of "numbers" are
# too few for that, and one of them holds half of its passages: those are dealt by hand.
_BY_HAND = {
    "decimal": "train", "numbers": "train", "fractions": "train", "random": "val",
    "calendar": "val", "colorsys": "val", "statistics": "test", "datetime": "test",
}  # fmt: skip
_SALT, _TRAIN_SHARE, _VAL_SHARE = "34", 0.5, 0.17
# At most so many passages of each topic, so that each counts the same.
VAL_PER_CLASS, TEST_PER_CLASS = 30, 50


@dataclass(frozen=True)
class TextSplit:
    """One part of a text task.

    Attributes:
        texts: N texts.
        targets: long tensor, shape (N,), in [0, num_classes).
        files: for each text, where it comes from; no file is in two splits.
    """

    texts: tuple[str, ...]
    targets: Tensor
    files: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Tensor) -> TextSplit:
        """The examples at ``rows`` (long indices), in that order."""
        numbers = rows.tolist()
        return TextSplit(
            tuple(self.texts[row] for row in numbers),
            self.targets[rows],
            tuple(self.files[row] for row in numbers),
        )


class TokenLoader:
    """Batches of tokens: ``({"input_ids", "attention_mask"}, targets)``.

    Texts of similar length share a batch, and a batch is only as wide as its longest text
    (*length bucketing*), so that little is computed for padding.

    Args:
        tokens: token ids of each text.
        targets: long tensor, shape (N,).
        batch_size: at least 1; the last batch may be shorter.
        pad_id: fills up short texts; their mask is 0 there.
        shuffle: a new order in every pass, drawn from ``seed``.
        bucketing: False takes the texts as they come (to measure what bucketing saves).
        seed: of the order; two loaders of one seed give the same batches.

    Raises:
        ValueError: if lengths differ, a text has no token, there is none, or batch_size < 1.
    """

    def __init__(
        self,
        tokens: Sequence[Sequence[int]],
        targets: Tensor,
        batch_size: int,
        pad_id: int = 0,
        shuffle: bool = False,
        bucketing: bool = True,
        seed: int = 0,
    ) -> None:
        if len(tokens) != len(targets):
            raise ValueError(f"{len(tokens)} texts but {len(targets)} targets; expected as many")
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        if len(tokens) == 0 or min(map(len, tokens)) == 0:
            raise ValueError("need at least one text, and at least one token in each")
        self.tokens, self.targets, self.batch_size = list(tokens), targets, batch_size
        self.pad_id, self.shuffle, self.bucketing = pad_id, shuffle, bucketing
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        num = len(self.tokens)
        order = list(range(num))
        if self.shuffle:
            order = torch.randperm(num, generator=self._generator).tolist()
        if self.bucketing:  # ties stay in the shuffled order
            order.sort(key=lambda row: len(self.tokens[row]))
        batches = [
            order[start : start + self.batch_size] for start in range(0, num, self.batch_size)
        ]
        if self.shuffle:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=self._generator)]
        for rows in batches:
            yield pad([self.tokens[row] for row in rows], self.pad_id), self.targets[rows]


def pad(tokens: Sequence[Sequence[int]], pad_id: int = 0) -> dict[str, Tensor]:
    """``{"input_ids", "attention_mask"}``, long, shape (B, T): filled up on the right."""
    width = max(map(len, tokens))
    ids = torch.full((len(tokens), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(tokens):
        ids[row, : len(one)] = torch.as_tensor(one, dtype=torch.long)
        mask[row, : len(one)] = 1
    return {"input_ids": ids, "attention_mask": mask}


class TextTask(SplitTask[TextSplit]):
    """A task of texts."""

    def loaders(
        self, tokenise: Tokenise, batch_size: int = 16, seed: int = 0
    ) -> Loaders[TokenLoader]:
        """Loaders over the splits.

        Args:
            tokenise: texts -> token ids, such as the ``preprocess`` of a text backbone; its
                ``pad_id`` (0 if it has none) fills up short texts.
            batch_size: of the training loader, at least 1.
            seed: of the training order.
        """
        pad_id = getattr(tokenise, "pad_id", 0)

        def loader(part: TextSplit, size: int, shuffle: bool = False) -> TokenLoader:
            tokens = tokenise(part.texts)
            return TokenLoader(tokens, part.targets, size, pad_id, shuffle=shuffle, seed=seed)

        train = loader(self.train, batch_size, shuffle=True)
        return Loaders(train, loader(self.val, 64), loader(self.test, 64))


def load_text_task(name: str, labels_per_class: int | None = 16, seed: int = 0) -> TextTask:
    """A text task whose training split holds ``labels_per_class`` labelled texts of each class.

    Args:
        name: "doc_routing": the beginnings of docstrings of the interpreter's own standard
            library (``tlcourse.docstrings``); the label is the topic of the module. The texts
            differ a little from one version of Python to the next.
        labels_per_class: at least 1; None takes all there are of the training files.
        seed: chooses which texts are labelled. Validation and test are fixed, and balanced.

    Raises:
        ValueError: for an unknown name (lists the names), or if a class has too few texts.
    """
    if name not in TEXT_TASKS:
        raise ValueError(f"unknown text task {name!r}; choose one of {', '.join(TEXT_TASKS)}")
    classes = tuple(TOPICS)
    passages = standard_library()
    everything = TextSplit(
        tuple(passage.text for passage in passages),
        torch.tensor([classes.index(passage.topic) for passage in passages]),
        tuple(passage.file for passage in passages),
    )
    part_of = [split_of(file) for file in everything.files]

    def part(name: str) -> TextSplit:
        return everything.take(torch.tensor([r for r, p in enumerate(part_of) if p == name]))

    pool = part("train")
    return TextTask(
        name=name,
        train=pool if labels_per_class is None else draw_labels(pool, labels_per_class, seed),
        val=_balanced(part("val"), VAL_PER_CLASS),
        test=_balanced(part("test"), TEST_PER_CLASS),
        classes=classes,
    )


def split_of(file: str) -> str:
    """The split of a file: "train", "val" or "test"."""
    if file in _BY_HAND:
        return _BY_HAND[file]
    share = int(hashlib.sha256(f"{_SALT}{file}".encode()).hexdigest()[:8], 16) / 2**32
    if share < _TRAIN_SHARE:
        return "train"
    return "val" if share < _TRAIN_SHARE + _VAL_SHARE else "test"


def _balanced(split: TextSplit, most: int) -> TextSplit:
    """The same number of texts of each class, at most ``most``, always the same ones."""
    scarcest = int(torch.bincount(split.targets).min())
    return draw_labels(split, min(most, scarcest), seed=0)
