"""The arms of a transfer experiment: each takes a task and says how well one method did.

Every arm sees the same labelled images. What it chooses, it chooses on the validation split;
the test split is read once, by the finished model.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from torch import nn

from tlcourse.backbones import Backbone, Classifier
from tlcourse.comparing import Comparison
from tlcourse.config import TrainConfig
from tlcourse.datasets import Task
from tlcourse.evaluation import evaluate
from tlcourse.inference import device_of
from tlcourse.locations import data_dir
from tlcourse.probing import Features, extract_features, linear_probe
from tlcourse.train import fit


@dataclass(frozen=True)
class Outcome:
    """What one arm reached on one draw of labelled images.

    Attributes:
        val_accuracy: in [0, 1]; choose by this.
        test_accuracy: in [0, 1]; report this.
        seconds: wall time.
    """

    val_accuracy: float
    test_accuracy: float
    seconds: float


def pixels(task: Task) -> Outcome:
    """Logistic regression on raw pixels: what the labels say without any network."""
    return _probe_outcome(nn.Flatten(), task, time.perf_counter())


def probe(task: Task, backbone: nn.Module) -> Outcome:
    """Logistic regression on the frozen features of ``backbone``.

    With a randomly initialised backbone this is the "random features" control.
    """
    return _probe_outcome(backbone, task, time.perf_counter())


def train_all(
    task: Task,
    backbone: Backbone,
    config: TrainConfig,
    probe_first: bool = False,
    batch_size: int = 32,
    augment: bool = True,
) -> Outcome:
    """Put a new head on ``backbone`` and train everything.

    From a random backbone this is the "scratch" control; from a pre-trained one it is full
    fine-tuning.

    Args:
        task: with its labelled training split.
        backbone: changed in place.
        config: for ``fit``; its seed also orders and augments the training images.
        probe_first: start the head from logistic regression on the frozen features
            (Kumar et al. 2022, section 3, arXiv:2202.10054).
        batch_size: of training; no more than there are labelled images is used.
        augment: whether the training images are augmented.
    """
    start = time.perf_counter()
    model = Classifier(backbone, task.num_classes).to(device_of(backbone))
    if probe_first:
        train, val, _ = _features(backbone, task)
        linear_probe(train, val, val).copy_to(model.head)
    loaders = task.loaders(min(batch_size, len(task.train)), augment=augment, seed=config.seed)
    fit(model, loaders.train, loaders.val, config)
    val_accuracy = evaluate(model, loaders.val).accuracy
    test_accuracy = evaluate(model, loaders.test).accuracy
    return Outcome(val_accuracy, test_accuracy, time.perf_counter() - start)


def _probe_outcome(backbone: nn.Module, task: Task, start: float) -> Outcome:
    train, val, test = _features(backbone, task)
    chosen = linear_probe(train, test, val)
    on_val = (chosen.logits(val.features).argmax(axis=1) == val.targets).mean()
    return Outcome(float(on_val), chosen.accuracy, time.perf_counter() - start)


def _features(backbone: nn.Module, task: Task) -> tuple[Features, Features, Features]:
    loaders = task.loaders(256, augment=False)
    parts = (
        extract_features(backbone, part) for part in (loaders.train, loaders.val, loaders.test)
    )
    train, val, test = parts
    return train, val, test


def recorded(name: str) -> dict[int, Comparison]:
    """Results that ``benchmarks/wild_digits.py`` recorded: labels per class -> comparison.

    Args:
        name: "wild_digits" or "plain_digits", a file in ``data/results``.

    Raises:
        FileNotFoundError: if nothing of that name is recorded.
    """
    path = data_dir() / "results" / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"no recorded result {name!r}: {path} is missing; run `make bench`")
    content = json.loads(path.read_text(encoding="utf-8"))
    return {
        int(count): Comparison(
            entry["scores"], entry["seconds"], content["command"], content["versions"]
        )
        for count, entry in content["counts"].items()
    }
