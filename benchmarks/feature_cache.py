"""A linear head over a frozen backbone: features computed in each epoch, or once and kept.

    python benchmarks/feature_cache.py [--cases NAME ...] [--epochs N] [--rounds N] [--out FILE]

Both ways train the same head with the same call, ``tl.fit`` (AdamW), on the same batches in the
same order, without augmentation and without validation, in float32 on one CPU thread. *In each
epoch*: the model is backbone and head, the backbone frozen with ``tl.freeze``. *Once*:
``tl.extract_features`` over the training split, then the head alone on its output; extraction is
part of the time. The parts of the second way are timed besides. Accuracy on the test split and
the heads are compared after the clock has stopped; accuracies that differ by more than one
example are an error.

GlyphNet sees all 700 images of wild digits; MiniLM 16 texts of each topic of documentation
routing (8 turns with all 619 would take 40 minutes; both ways grow with their number alike). If
an epoch of features takes E and an epoch of the head h, 20 epochs gain 20 (E + h) / (E + 20 h):
at least 16 only where h < E / 75. Hence GlyphNet, whose E is short, twice: in small batches the
head's many steps of a fraction of a millisecond are what is left.
Writes ``data/results/feature_cache.json`` and ``benchmarks/plots/feature_cache.png``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tlcourse as tl
from tlcourse.datasets import BatchLoader
from tlcourse.figures import BLACK, markers, palette, subplots
from tlcourse.locations import data_dir, repo_root
from tlcourse.text import TokenLoader
from tlcourse.timing import Timings, load_timings, save_timings, take_turns

EPOCHS, LR = 20, 1e-2
ANEW, ONCE = "features in each epoch", "features once"
EXTRACTION, HEAD = "of it: extraction", "of it: the head"


@dataclass(frozen=True)
class Case:
    """A frozen backbone, a new head, and the batches that both ways share.

    Attributes:
        model: a ``tl.Classifier`` whose backbone is frozen.
        loader: makes the training loader at its beginning.
        extract: features of the training split, shape (N, D), and targets, in its order.
        cached_loader: a loader over those, with the batches of ``loader``.
        test: loader of the test split.
    """

    model: nn.Module
    loader: Callable[[], Any]
    extract: Callable[[], tuple[Tensor, Tensor]]
    cached_loader: Callable[[Tensor, Tensor], Any]
    test: Any


class SameBatches:
    """Features in the batches that another loader gave, pass by pass."""

    def __init__(self, features: Tensor, targets: Tensor, passes: list[list[Tensor]]) -> None:
        self.features, self.targets, self.passes, self.done = features, targets, passes, 0

    def __len__(self) -> int:
        return len(self.passes[0])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows_of_pass = self.passes[self.done % len(self.passes)]
        self.done += 1
        for rows in rows_of_pass:
            yield self.features[rows], self.targets[rows]


def glyphnet(batch_size: int, epochs: int, labels: int | None = None) -> Case:
    """GlyphNet on wild digits."""
    task = tl.load_task("wild_digits", labels)
    train, model = task.train, frozen_model("glyphnet", task.num_classes)

    def extract() -> tuple[Tensor, Tensor]:
        loader = BatchLoader(train.inputs, train.targets, batch_size)
        found = tl.extract_features(model.backbone, loader)
        return torch.from_numpy(found.features), torch.from_numpy(found.targets)

    def batches(inputs: Tensor, targets: Tensor) -> BatchLoader:
        return BatchLoader(inputs, targets, batch_size, shuffle=True, seed=0)

    test = task.loaders(augment=False).test
    return Case(model, lambda: batches(train.inputs, train.targets), extract, batches, test)


def minilm(epochs: int, labels: int | None = 16) -> Case:
    """MiniLM on documentation routing."""
    task = tl.load_text_task("doc_routing", labels)
    model = frozen_model("minilm", task.num_classes)
    tokens, targets = model.backbone.preprocess(task.train.texts), task.train.targets
    rows = torch.arange(len(targets))  # as labels they say which text is where
    numbered = TokenLoader(tokens, rows, 16, shuffle=True, seed=0)
    passes = [[rows for _, rows in numbered] for _ in range(epochs)]

    def extract() -> tuple[Tensor, Tensor]:
        # Texts of one length together, as in training; then back into the order of the split.
        found = tl.extract_features(model.backbone, TokenLoader(tokens, rows, 16))
        order = torch.from_numpy(found.targets).argsort()
        return torch.from_numpy(found.features)[order], targets

    return Case(
        model,
        lambda: TokenLoader(tokens, targets, 16, shuffle=True, seed=0),
        extract,
        lambda features, targets: SameBatches(features, targets, passes),
        task.loaders(model.backbone.preprocess).test,
    )


CASES: dict[str, Callable[..., Case]] = {
    "GlyphNet, batches of 128": partial(glyphnet, 128),
    "GlyphNet, batches of 32": partial(glyphnet, 32),
    "MiniLM, batches of 16": minilm,
}


def frozen_model(name: str, num_classes: int) -> Any:
    """A pre-trained backbone, frozen, with a new head drawn from seed 0."""
    backbone = tl.freeze(tl.load_backbone(name))
    torch.manual_seed(0)
    return tl.Classifier(backbone, num_classes)


def train_anew(case: Case, epochs: int) -> nn.Module:
    """The head, trained behind its backbone."""
    model = copy.copy(case.model)  # shares the frozen backbone
    model._modules = case.model._modules | {"head": copy.deepcopy(case.model.head)}
    tl.fit(model, case.loader(), None, configuration(epochs))
    return model.head


def train_on(features: Tensor, targets: Tensor, case: Case, epochs: int) -> nn.Module:
    """The head, trained alone on kept features."""
    head = copy.deepcopy(case.model.head)
    tl.fit(head, case.cached_loader(features, targets), None, configuration(epochs))
    return head


def configuration(epochs: int) -> Any:
    return tl.TrainConfig(num_epochs=epochs, lr=LR, precision="fp32", progress=False)


def accuracy(case: Case, head: nn.Module) -> float:
    """Accuracy on the test split of the backbone with this head."""
    case.model.head = head
    return tl.evaluate(case.model, case.test).accuracy


def measure(case: Case, epochs: int, rounds: int) -> Timings:
    """Time both ways in turns, and compare what they trained."""
    heads: dict[str, nn.Module] = {}
    kept = case.extract()

    def anew() -> None:
        heads[ANEW] = train_anew(case, epochs)

    def once() -> None:
        heads[ONCE] = train_on(*case.extract(), case, epochs)

    ways: dict[str, Callable[[], Any]] = {ANEW: anew, ONCE: once}
    ways |= {EXTRACTION: case.extract, HEAD: lambda: train_on(*kept, case, epochs)}
    timings = take_turns(ways, rounds)
    accuracies = {way: accuracy(case, head) for way, head in heads.items()}
    num_test = sum(len(targets) for _, targets in case.test)
    if abs(accuracies[ANEW] - accuracies[ONCE]) * num_test > 1.5:
        raise ValueError(f"the two ways differ by more than one example: {accuracies}")
    pairs = zip(heads[ANEW].parameters(), heads[ONCE].parameters(), strict=True)
    facts = {
        "epochs": epochs,
        "train_examples": len(kept[1]),
        "test_examples": num_test,
        "accuracy": accuracies,
        "largest_weight_difference": max((a - b).abs().max().item() for a, b in pairs),
    }
    return Timings(timings.wall, timings.cpu, facts)


def tables(path: Path) -> str:
    """Markdown: a table for each recorded case, as in ``benchmarks/README.md``."""
    parts = []
    for name, timings in load_timings(path).items():
        facts, accuracies = timings.facts, timings.facts["accuracy"]
        gains = [timings.ratio(ANEW, ONCE, clock) for clock in ("wall", "cpu")]
        shown = [f"{gain.mean:.1f} [{gain.low:.1f}, {gain.high:.1f}]" for gain in gains]
        parts.append(
            f"**{name}**, {facts['train_examples']} examples, {facts['epochs']} epochs: features "
            f"once are {shown[0]} times as fast (CPU time: {shown[1]}).\n\n"
            f"{timings.table(ONCE, unit='ms')}\n\n"
            f"Accuracy on {facts['test_examples']}: {accuracies[ANEW]:.4f} and "
            f"{accuracies[ONCE]:.4f}; the heads' weights differ by at most "
            f"{facts['largest_weight_difference']:.1g}."
        )
    return "\n\n".join(parts) + "\n"


def draw(cases: dict[str, Timings], path: Path) -> Path:
    """Seconds of each way on a logarithmic axis, a panel for each case."""
    import matplotlib.pyplot as plt

    figure, axes = subplots(1, len(cases), figsize=(4.4 * len(cases), 2.8), squeeze=False)
    for ax, (name, timings) in zip(axes[0], cases.items(), strict=True):
        for row, way in enumerate(timings.wall):
            time = timings.seconds(way)
            ax.errorbar(
                time.mean, row, xerr=[[time.mean - time.low], [time.high - time.mean]],
                color=palette[row], marker=markers[row], ms=7, capsize=4, lw=2,
            )  # fmt: skip
            ax.annotate(
                f"{time.mean:.3g} s", (time.mean, row), (0, 7), textcoords="offset points",
                ha="center", fontsize=9, color=BLACK,
            )  # fmt: skip
        ax.set(xscale="log", ylim=(len(timings.wall) - 0.5, -0.8), title=name)
        ax.set_xlabel("seconds, median with 95 % interval")
        ax.margins(x=0.15)
        first = ax is axes[0][0]
        ax.set_yticks(range(len(timings.wall)), list(timings.wall) if first else [])
        ax.grid(False, axis="y")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--labels", type=int, help="labelled examples of a class")
    parser.add_argument("--out", type=Path, default=data_dir() / "results" / "feature_cache.json")
    plots = (repo_root() or Path()) / "benchmarks" / "plots"
    parser.add_argument("--plot", type=Path, default=plots / "feature_cache.png")
    options = parser.parse_args(None if arguments is None else list(arguments))
    torch.set_num_threads(1)

    labels = {} if options.labels is None else {"labels": options.labels}
    cases = {}
    for name in options.cases:
        case = CASES[name](options.epochs, **labels)
        cases[name] = measure(case, options.epochs, options.rounds)
        print(f"{name}: measured", flush=True)
    save_timings(
        options.out, cases, "python benchmarks/feature_cache.py", threads=1, lr=LR,
        epochs=options.epochs,
    )  # fmt: skip
    print(tables(options.out))
    print(draw(cases, options.plot))


if __name__ == "__main__":
    main()
