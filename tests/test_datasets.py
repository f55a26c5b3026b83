"""Tasks: no leaks, label budgets, loaders, augmentation."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from tlcourse.datasets import TASKS, BatchLoader, augment_images, draw_labels, load_task


@pytest.mark.parametrize("name", TASKS)
def test_splits_do_not_leak(name):
    task = load_task(name, labels_per_class=None)
    train, val, test = (set(part.ids.tolist()) for part in (task.train, task.val, task.test))
    assert len(train) == 700 and len(val) == 300 and len(test) == 797
    assert not (train & val or train & test or val & test)
    # Contiguous blocks, so that writers are kept apart.
    assert max(train) < min(val) and max(val) < min(test)


def test_digits_are_stored_in_the_order_of_their_writers():
    """The reason for contiguous blocks, measured: nearest neighbours lie close in the file."""
    digits = load_digits().data
    index = NearestNeighbors(n_neighbors=2).fit(digits)
    nearest = index.kneighbors(digits, return_distance=False)[:, 1]
    near = np.abs(nearest - np.arange(len(digits))) <= 130
    assert near.mean() > 0.5  # by chance: 0.14


def test_labels_and_images_belong_together():
    task = load_task("plain_digits", labels_per_class=3, seed=1)
    digits = load_digits()
    assert task.train.targets.tolist() == digits.target[task.train.ids].tolist()
    ink = (task.train.inputs[:, 0] + 1).sum(dim=(1, 2)).numpy()
    coarse = digits.images[task.train.ids].sum(axis=(1, 2))
    assert np.corrcoef(ink, coarse)[0, 1] > 0.9


def test_label_budget_is_balanced_nested_and_seeded():
    five, ten = (load_task("wild_digits", count, seed=3).train for count in (5, 10))
    assert torch.bincount(five.targets).tolist() == [5] * 10
    assert set(five.ids.tolist()) < set(ten.ids.tolist())
    assert not torch.equal(five.ids, load_task("wild_digits", 5, seed=4).train.ids)
    assert torch.equal(five.inputs, load_task("wild_digits", 5, seed=3).train.inputs)


def test_images_are_in_range_and_the_same_in_every_split_and_draw():
    task = load_task("wild_digits", 5, seed=0)
    for part in (task.train, task.val, task.test):
        assert part.inputs.shape[1:] == (3, 32, 32)
        assert part.inputs.min() >= -1 and part.inputs.max() <= 1
    assert torch.equal(task.test.inputs, load_task("wild_digits", 50, seed=9).test.inputs)


@pytest.mark.parametrize("count", [0, 71, -1])
def test_impossible_budget_is_refused(count):
    with pytest.raises(ValueError, match=f"got {count}"):
        load_task("wild_digits", count)


def test_unknown_task_lists_the_names():
    with pytest.raises(ValueError, match=r"'digits'.*wild_digits, plain_digits"):
        load_task("digits")


def test_loader_gives_every_example_once():
    inputs, targets = torch.arange(10.0).view(10, 1), torch.arange(10)
    loader = BatchLoader(inputs, targets, batch_size=4, shuffle=True, seed=1)
    passes = [[t for _, batch in loader for t in batch.tolist()] for _ in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(10))
    assert passes[0] != passes[1], "a new order in every pass"
    assert [len(batch) for _, batch in loader] == [4, 4, 2] and len(loader) == 3
    assert all((x[:, 0] == t).all() for x, t in loader)
    assert len(list(BatchLoader(inputs, targets, 4, drop_last=True))) == 2


def test_loader_refuses_bad_input():
    images, labels = torch.zeros(4, 1), torch.zeros(3)
    with pytest.raises(ValueError, match="4 inputs but 3 targets"):
        BatchLoader(images, labels, 2)
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        BatchLoader(images, torch.zeros(4), 0)
    with pytest.raises(ValueError, match="nothing to load"):
        BatchLoader(images[:0], labels[:0], 2)


def test_only_training_images_are_augmented():
    task = load_task("wild_digits", 2, seed=0)
    loaders = task.loaders(batch_size=20, augment=True, seed=0)
    clean = task.loaders(batch_size=20, augment=False, seed=0)
    (seen, labels), (original, same) = next(iter(loaders.train)), next(iter(clean.train))
    assert torch.equal(labels.sort().values, same.sort().values)
    assert not torch.isin(seen.mean(dim=(1, 2, 3)), original.mean(dim=(1, 2, 3))).any()
    assert torch.equal(next(iter(loaders.test))[0], task.test.inputs[:256])


def test_augmentation_keeps_range_shape_and_identity_of_the_picture():
    images = load_task("plain_digits", 5, seed=0).train.inputs
    changed = augment_images(images, torch.Generator().manual_seed(0))
    assert changed.shape == images.shape and changed.min() >= -1 and changed.max() <= 1
    flat = lambda x: torch.nn.functional.normalize(x.mean(1).flatten(1), dim=1)  # noqa: E731
    alike = (flat(changed) * flat(images)).sum(1)
    assert alike.mean() > 0.6 and (changed != images).float().mean() > 0.3


def test_draw_labels_needs_every_class():
    pool = load_task("wild_digits", 2, seed=0).train
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        draw_labels(pool, 3, seed=0)
