"""Tasks: data split so that nothing leaks, label budgets, and loaders over tensors in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tlcourse.sources import affine_matrices, composite, enlarge, photograph, uniform_draws

TASKS = ("wild_digits", "plain_digits")
# scikit-learn's 1,797 digits keep the order in which their writers wrote them (the nearest
# neighbour of an image lies within 130 places for 58 % of them, 14 % by chance). Contiguous
# blocks therefore put different writers into different splits, but for the two seams.
TRAIN_END, VAL_END = 700, 1000
_COMPOSITE_SEED = 20_241
_GATHERED_BYTES = 2**19


@dataclass(frozen=True)
class Split:
    """One part of a task.

    Attributes:
        inputs: float tensor, shape (N, 3, 32, 32), in [-1, 1].
        targets: long tensor, shape (N,), in [0, num_classes).
        ids: long tensor, shape (N,): which of the 1,797 digits each image shows.
    """

    inputs: Tensor
    targets: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: Tensor) -> Split:
        """The examples at ``rows`` (long indices, or a boolean mask)."""
        return Split(self.inputs[rows], self.targets[rows], self.ids[rows])


class BatchLoader:
    """Batches sliced from tensors in memory: (inputs, targets) pairs.

    Args:
        inputs: tensor, shape (N, ...); batches lie on its device.
        targets: tensor, shape (N,).
        batch_size: at least 1; the last batch may be shorter unless ``drop_last``.
        shuffle: a new order in every pass, drawn from ``seed``.
        transform: ``transform(inputs, generator) -> inputs``, applied to each batch. One with a
            true attribute ``takes_any_device`` works on inputs of any device, with a generator
            on the CPU; data with another transform is never moved to a GPU as a whole.
        seed: of order and transform; two loaders of one seed give the same batches.

    Raises:
        ValueError: if lengths differ, there is nothing to load, or batch_size < 1.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        batch_size: int,
        shuffle: bool = False,
        transform: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} inputs but {len(targets)} targets; expected as many")
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        if len(inputs) < (batch_size if drop_last else 1):
            raise ValueError(f"nothing to load: {len(inputs)} examples, batch_size {batch_size}")
        self.inputs, self.targets, self.batch_size = inputs, targets, batch_size
        self.shuffle, self.transform, self.drop_last = shuffle, transform, drop_last
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.targets), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        num = len(self.targets)
        order = (
            torch.randperm(num, generator=self._generator) if self.shuffle else torch.arange(num)
        )
        order = order[: len(self) * self.batch_size].to(self.inputs.device)  # once, for all batches
        # Small batches are gathered many at a time: indexing costs the same for few rows.
        batch_bytes = self.batch_size * max(1, self.inputs.nbytes // num)
        at_once = self.batch_size * max(1, _GATHERED_BYTES // batch_bytes)
        for rows in order.split(at_once):
            inputs, targets = self.inputs[rows], self.targets[rows]
            batches = zip(
                inputs.split(self.batch_size), targets.split(self.batch_size), strict=True
            )
            for batch, labels in batches:
                if self.transform is not None:
                    batch = self.transform(batch, self._generator)
                yield batch, labels

    def resident(self, device: torch.device) -> BatchLoader:
        """This loader with its data on a GPU, if they take at most a quarter of its free memory.

        The two share their source of chance: the batches are those that this one would give.
        """
        here = device.type != "cuda" or self.inputs.device == device
        if here or not self.resident_bytes(torch.cuda.mem_get_info(device)[0]):
            return self
        moved = copy.copy(self)
        moved.inputs, moved.targets = self.inputs.to(device), self.targets.to(device)
        return moved

    def resident_bytes(self, free_bytes: int) -> int:
        """What ``resident`` puts on a GPU that has so much free memory; 0: the data stay."""
        num_bytes = self.inputs.nbytes + self.targets.nbytes
        portable = self.transform is None or getattr(self.transform, "takes_any_device", False)
        return num_bytes if portable and num_bytes <= free_bytes // 4 else 0


AnyLoader = TypeVar("AnyLoader")
AnySplit = TypeVar("AnySplit")


@dataclass(frozen=True)
class Loaders(Generic[AnyLoader]):
    """The three loaders of a task; only ``train`` shuffles (and augments)."""

    train: AnyLoader
    val: AnyLoader
    test: AnyLoader


@dataclass(frozen=True)
class SplitTask(Generic[AnySplit]):
    """A task with its splits, of images or of text.

    Attributes:
        name: as given to ``load_task`` or ``load_text_task``.
        train: the labelled examples that may be learned from.
        val: for choosing; never trained on.
        test: read once, at the end.
        classes: a name for each label.
    """

    name: str
    train: AnySplit
    val: AnySplit
    test: AnySplit
    classes: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.classes)


class Task(SplitTask[Split]):
    """A task of images."""

    def loaders(
        self, batch_size: int = 32, augment: bool = True, seed: int = 0
    ) -> Loaders[BatchLoader]:
        """Loaders over the splits.

        Args:
            batch_size: of the training loader, at least 1; a batch never exceeds the split.
            augment: whether training images are augmented (``augment_images``).
            seed: of the training order and augmentation.
        """
        transform = augment_images if augment else None
        train = BatchLoader(
            self.train.inputs, self.train.targets, batch_size, True, transform, seed
        )
        val = BatchLoader(self.val.inputs, self.val.targets, 256)
        return Loaders(train, val, BatchLoader(self.test.inputs, self.test.targets, 256))


def load_task(name: str, labels_per_class: int | None = 10, seed: int = 0) -> Task:
    """A task whose training split holds ``labels_per_class`` labelled images of each class.

    Args:
        name: "wild_digits" (digits in colour over photo patches) or "plain_digits" (the same
            digits, grey on black).
        labels_per_class: at least 1; None takes the whole training block (700 images).
        seed: chooses which images are labelled. Validation (300) and test (797) are fixed.

    Raises:
        ValueError: for an unknown name (lists the names), or if a class has too few images.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; choose one of {', '.join(TASKS)}")
    images, targets = _digit_images(name)
    everything = Split(images, targets, torch.arange(len(targets)))
    ids = everything.ids
    pool = everything.take(ids < TRAIN_END)
    return Task(
        name=name,
        train=pool if labels_per_class is None else draw_labels(pool, labels_per_class, seed),
        val=everything.take((ids >= TRAIN_END) & (ids < VAL_END)),
        test=everything.take(ids >= VAL_END),
        classes=tuple(str(digit) for digit in range(10)),
    )


class Examples(Protocol):
    """What labels can be drawn from: images or texts."""

    @property
    def targets(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def take(self, rows: Any) -> Self: ...


SomeExamples = TypeVar("SomeExamples", bound=Examples)


def draw_labels(pool: SomeExamples, labels_per_class: int, seed: int) -> SomeExamples:
    """A random subset with the same number of examples of each class.

    Budgets are nested: with one seed, the 5 labelled examples of a class are among the 10.

    Raises:
        ValueError: if labels_per_class < 1 or above what the scarcest class has.
    """
    scarcest = int(torch.bincount(pool.targets).min())
    if not 1 <= labels_per_class <= scarcest:
        raise ValueError(
            f"labels_per_class must be in [1, {scarcest}] (or None for all), got {labels_per_class}"
        )
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    shuffled = pool.take(order)
    kept = [
        (shuffled.targets == label).nonzero().squeeze(1)[:labels_per_class]
        for label in range(int(pool.targets.max()) + 1)
    ]
    return shuffled.take(torch.cat(kept))


def augment_images(images: Tensor, generator: torch.Generator) -> Tensor:
    """Small turns, zooms, shears and shifts, and a change of brightness, contrast and colour.

    No flips: a mirrored digit is not a digit.

    Args:
        images: float tensor, shape (B, 3, H, W), in [-1, 1].
        generator: the only source of chance; on the CPU, wherever the images are.

    Returns:
        float tensor of the same shape, in [-1, 1].
    """
    num = len(images)
    draw = uniform_draws(num, generator, images.device)
    theta = affine_matrices(
        angle=draw(-0.26, 0.26),
        scale_x=draw(0.85, 1.18),
        scale_y=draw(0.85, 1.18),
        shear=draw(-0.15, 0.15),
        shift=draw(-0.12, 0.12, 2),
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    gain = draw(0.7, 1.3, 1, 1, 1) * draw(0.85, 1.15, 3, 1, 1)
    return (moved * gain + draw(-0.25, 0.25, 1, 1, 1)).clamp(-1, 1)


augment_images.takes_any_device = True  # type: ignore[attr-defined]  # see BatchLoader.resident


@lru_cache(maxsize=len(TASKS))
def _digit_images(name: str) -> tuple[Tensor, Tensor]:
    """All 1,797 digits as images, shape (1797, 3, 32, 32), in [-1, 1], and their labels."""
    masks, targets = _digit_masks()
    if name == "plain_digits":
        grey = F.interpolate(masks.unsqueeze(1), size=(32, 32), mode="area") * 2 - 1
        return grey.expand(-1, 3, -1, -1).contiguous(), targets
    return digit_scenes("flower"), targets


@lru_cache(maxsize=2)
def digit_scenes(photo: str) -> Tensor:
    """All 1,797 digits over patches of a photograph, shape (1797, 3, 32, 32), in [-1, 1].

    Turns, scales, colours and places of the patches are the same for either photograph.

    Args:
        photo: "flower" (wild digits) or "china".
    """
    generator = torch.Generator().manual_seed(_COMPOSITE_SEED)
    return composite(_digit_masks()[0], photograph(photo), generator)


@lru_cache(maxsize=1)
def _digit_masks() -> tuple[Tensor, Tensor]:
    """All digits as ink, shape (1797, 48, 48), in [0, 1], and their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    coarse = torch.from_numpy(digits.images.astype(np.float32) / 16)  # (1797, 8, 8) in [0, 1]
    masks = F.pad(enlarge(coarse), (4, 4, 4, 4))  # (1797, 48, 48): air around the digit
    return masks, torch.from_numpy(digits.target).long()
