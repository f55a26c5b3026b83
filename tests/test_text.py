"""Documentation routing: nothing leaks, labels are hidden, batches are right."""

import re
import subprocess
import sys

import pytest
import torch
from torch import tensor

from tlcourse.docstrings import (
    LABEL_WORDS,
    MAX_WORDS,
    MIN_WORDS,
    TOPICS,
    docstrings_of,
    package_prose,
    paragraphs,
    prose,
    standard_library,
)
from tlcourse.text import TokenLoader, load_text_task, pad, split_of


@pytest.fixture(scope="module")
def task():
    return load_text_task("doc_routing", None)


def test_every_topic_has_enough_passages_in_every_split(task):
    for part, least in ((task.train, 64), (task.val, 25), (task.test, 45)):
        counts = torch.bincount(part.targets, minlength=len(TOPICS))
        assert counts.min() >= least
    for part in (task.val, task.test):
        assert torch.bincount(part.targets).unique().numel() == 1, "balanced"


def test_no_file_and_no_text_is_in_two_splits(task):
    for part in ("files", "texts"):
        sets = [set(getattr(split, part)) for split in (task.train, task.val, task.test)]
        assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])


def test_no_text_names_its_topic_or_a_module():
    forbidden = (
        LABEL_WORDS | set(TOPICS) | {"asyncio", "unittest", "threading", "decimal", "zipfile"}
    )
    for passage in standard_library():
        words = set(re.findall("[a-z]+", passage.text.lower()))
        assert not words & forbidden, passage
        assert MIN_WORDS <= len(passage.text.split()) <= MAX_WORDS


def test_prose_drops_examples_and_identifiers():
    docstring = """Return the mean of `data` as a float.

    >>> fmean([1, 2])
    1.5

    Raises StatisticsError if data_set is empty, see os.path."""
    assert prose(docstring) == "Return the mean of as a float. Raises if is empty, see"


def test_paragraphs_take_what_a_parameter_means_and_leave_its_type():
    docstring = """Fit the model to all of the training data that there is.

    Parameters
    ----------
    X : array of shape (n, d)
        The training samples, one row for each of the samples given.

    >>> fit(3)
    """
    assert paragraphs(docstring) == [
        "Fit the model to all of the training data that there is.",
        "The training samples, one row for each of the samples given.",
    ]


def test_docstrings_of_a_broken_file_are_none(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("def f(:\n", encoding="utf-8")
    assert docstrings_of(broken) == [] and docstrings_of(tmp_path / "missing.py") == []


def test_package_prose_gives_each_paragraph_once():
    found = [paragraph for _, paragraph in package_prose(("joblib",))]
    assert len(found) == len(set(found)) > 200
    with pytest.raises(ModuleNotFoundError, match="'nothing_of_that_name'"):
        list(package_prose(("nothing_of_that_name",)))


def test_reading_the_library_imports_none_of_it():
    code = (
        "import sys; from tlcourse.docstrings import standard_library; standard_library(); "
        "print(any(name in sys.modules for name in ('imaplib', 'unittest', 'doctest', 'torch')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_budgets_are_nested_and_draws_differ():
    few, more = load_text_task("doc_routing", 4, 3), load_text_task("doc_routing", 16, 3)
    assert set(few.train.texts) < set(more.train.texts)
    assert torch.bincount(few.train.targets).tolist() == [4] * 4
    assert few.train.texts != load_text_task("doc_routing", 4, 4).train.texts
    assert few.test.texts == more.test.texts


@pytest.mark.parametrize("labels", [0, -1, 10_000])
def test_bad_budgets_are_refused(labels):
    with pytest.raises(ValueError, match=rf"labels_per_class must be in \[1, .*got {labels}"):
        load_text_task("doc_routing", labels)


def test_unknown_task_lists_the_names():
    with pytest.raises(ValueError, match="'x'; choose one of doc_routing"):
        load_text_task("x")


@pytest.mark.parametrize("file", ["decimal", "statistics", "calendar", "asyncio/locks"])
def test_a_file_keeps_its_split(file):
    expected = {"decimal": "train", "statistics": "test", "calendar": "val"}
    assert split_of(file) == expected.get(file, split_of(file)) in ("train", "val", "test")


@pytest.mark.parametrize("batch_size", [8, 64])
def test_only_the_training_loader_shuffles(task, batch_size):
    loaders = task.loaders(lambda texts: [[1] * len(text.split()) for text in texts], batch_size)
    for name in ("train", "val", "test"):
        loader = getattr(loaders, name)
        first, second = (torch.cat([targets for _, targets in loader]) for _ in range(2))
        assert torch.equal(first, second) == (name != "train")


def lengths_of(loader):
    return [batch["attention_mask"].sum(dim=1).tolist() for batch, _ in loader]


def make_loader(**options):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (101,), generator=generator).tolist()
    tokens = [list(range(1, length + 1)) for length in lengths]
    return TokenLoader(tokens, torch.arange(101), batch_size=8, **options), lengths


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("bucketing", [False, True])
def test_every_text_comes_once_with_its_target(shuffle, bucketing):
    loader, lengths = make_loader(shuffle=shuffle, bucketing=bucketing)
    assert len(loader) == len(list(loader)) == 13
    for _ in range(2):
        seen = {}
        for batch, targets in loader:
            assert batch["input_ids"].shape == batch["attention_mask"].shape
            sizes = batch["attention_mask"].sum(dim=1)
            assert batch["input_ids"].shape[1] == sizes.max()
            assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
            seen |= dict(zip(targets.tolist(), sizes.tolist(), strict=True))
        assert [seen[i] for i in range(101)] == lengths


def test_bucketing_computes_far_fewer_places():
    def places(bucketing):
        loader, _ = make_loader(shuffle=True, bucketing=bucketing)
        return sum(batch["input_ids"].numel() for batch, _ in loader)

    _, lengths = make_loader()
    assert places(True) < 1.15 * sum(lengths) < 1.4 * sum(lengths) < places(False)


def test_shuffled_batches_come_in_another_order_and_one_seed_repeats():
    first, second = (make_loader(shuffle=True, seed=5)[0] for _ in range(2))
    once = lengths_of(first)
    assert once == lengths_of(second)
    assert once != lengths_of(first), "a second pass is another order"
    sizes = [max(batch) for batch in once]
    assert sizes != sorted(sizes), "short texts do not always come first"


def test_pad_by_hand():
    batch = pad([[5, 6, 7], [8]], pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("tokens", "targets", "size", "message"),
    [
        ([[1]], tensor([0, 1]), 1, "1 texts but 2 targets"),
        ([[1]], tensor([0]), 0, "batch_size must be >= 1, got 0"),
        ([], tensor([]), 1, "at least one text"),
        ([[1], []], tensor([0, 1]), 1, "at least one token in each"),
    ],
)
def test_bad_batches_are_refused(tokens, targets, size, message):
    with pytest.raises(ValueError, match=message):
        TokenLoader(tokens, targets, size)
