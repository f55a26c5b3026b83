"""What do length bucketing and packing save against padding every text to the maximum?

    python benchmarks/text_batches.py [--texts N] [--rounds N] [--out FILE]

Full fine-tuning of MiniLM on documentation routing, with ``tl.fit`` on one thread: one pass over
the same 64 texts in each way, 16 texts in a step (packing: six rows, about 16 texts). They stand at
evenly spaced ranks of length in the training texts. Padding to the maximum means 128 tokens, where
the tokeniser cuts. The token ratio is the number of places computed when padding to the maximum
over the number computed in a way: the speed-up that there would be if every place cost the same and
nothing else took time. Rounds in turns; medians with 95 % intervals. Writes
``data/results/text_batches.json`` and draws ``benchmarks/plots/text_batches.png``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tlcourse as tl
from tlcourse.figures import GREY, markers, palette
from tlcourse.language_models import MAX_TOKENS
from tlcourse.locations import data_dir
from tlcourse.packing import PackedLoader, pack_backbone
from tlcourse.text import TokenLoader
from tlcourse.timing import Clock, Timings, load_timings, save_timings, take_turns

BATCH_SIZE, ROWS, SEED = 16, 6, 0
MAXIMUM, LONGEST, BUCKETS, PACKED = (
    "padded to the maximum", "padded to the longest of the batch", "bucketing", "packing",
)  # fmt: skip
CASE = "training"
PLOT = Path(__file__).parent / "plots" / "text_batches.png"
CLOCKS: tuple[Clock, ...] = ("wall", "cpu")


def make_loaders(num_texts: int | None) -> tuple[dict[str, Any], list[int]]:
    """Loaders of each way over the same texts (None: over all), and the length of each text."""
    split = tl.load_text_task("doc_routing", None).train
    tokenise = tl.load_backbone("minilm").preprocess
    tokens = tokenise(split.texts)
    order = torch.tensor([len(one) for one in tokens]).argsort(stable=True)
    ranks = (torch.arange(num_texts or len(order)) + 0.5) * len(order) / (num_texts or len(order))
    drawn = order[ranks.long()]
    tokens, targets = [tokens[row] for row in drawn.tolist()], split.targets[drawn]
    common = {"pad_id": tokenise.pad_id, "shuffle": True, "seed": SEED}
    longest = TokenLoader(tokens, targets, BATCH_SIZE, bucketing=False, **common)
    loaders = {
        MAXIMUM: [widen(batch, tokenise.pad_id) for batch in longest],
        LONGEST: longest,
        BUCKETS: TokenLoader(tokens, targets, BATCH_SIZE, **common),
        PACKED: PackedLoader(tokens, targets, ROWS, MAX_TOKENS, **common),
    }
    return loaders, [len(one) for one in tokens]


def widen(batch: tuple[dict[str, Tensor], Tensor], pad_id: int) -> tuple[dict[str, Tensor], Tensor]:
    """A padded batch, (B, T), as one of (B, MAX_TOKENS)."""
    inputs, targets = batch
    fill = {"input_ids": pad_id, "attention_mask": 0}
    room = (0, MAX_TOKENS - inputs["input_ids"].shape[1])
    return {name: F.pad(x, room, value=fill[name]) for name, x in inputs.items()}, targets


def train(model: tl.Classifier, loader: Any) -> None:
    """One pass; how good the weights are does not change how long it takes."""
    config = tl.TrainConfig(lr=3e-5, num_epochs=1, progress=False, compile=False)
    tl.fit(model, loader, None, config)


def measure(num_texts: int, rounds: int) -> Timings:
    loaders, lengths = make_loaders(num_texts)
    whole, all_lengths = make_loaders(None)
    facts: dict[str, Any] = {
        "texts": len(lengths), "real tokens": sum(lengths), "longest": max(lengths),
        "places": {way: places(loader) for way, loader in loaders.items()},
        "steps": {way: len(loader) for way, loader in loaders.items()},
        "texts of the task": len(all_lengths),
        "places of the task": {way: places(loader) for way, loader in whole.items()},
    }  # fmt: skip
    model = tl.Classifier(pack_backbone(tl.load_backbone("minilm")), 4)  # takes padded texts too
    ways = {way: lambda loader=loader: train(model, loader) for way, loader in loaders.items()}
    ways[BUCKETS]()  # a warm-up of each would take a minute
    return take_turns(ways, rounds, warm_up=False, facts=facts)


def places(loader: Iterable[Any]) -> int:
    return sum(inputs["input_ids"].numel() for inputs, _ in loader)


def tables(path: Path) -> str:
    """Markdown for benchmarks/README.md."""
    timings = load_timings(path)[CASE]
    facts = timings.facts
    lines = [
        f"{facts['texts']} of the {facts['texts of the task']} training texts, "
        f"{facts['real tokens'] / facts['texts']:.0f} tokens on average, {facts['longest']} at "
        "most; one thread.",
        "",
        "| way | steps | padding | seconds | token ratio | speed-up, wall | of the token ratio "
        "| speed-up, CPU | of the token ratio | token ratio, all texts |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    number, of_all = facts["places"], facts["places of the task"]
    for way in number:
        ratio = number[MAXIMUM] / number[way]
        cells = [
            way, str(facts["steps"][way]), f"{1 - facts['real tokens'] / number[way]:.0%}",
            f"{timings.seconds(way).mean:.1f}", f"{ratio:.2f}",
        ]  # fmt: skip
        for clock in CLOCKS:
            x = timings.ratio(MAXIMUM, way, clock)
            cells.append(f"{x.mean:.2f} [{x.low:.2f}, {x.high:.2f}]")
            cells.append(f"{x.mean / ratio:.0%} [{x.low / ratio:.0%}, {x.high / ratio:.0%}]")
        cells.append(f"{of_all[MAXIMUM] / of_all[way]:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(path: Path, out: Path) -> None:
    """Achieved speed-up over token ratio: wall filled, CPU time hollow, a little to the right."""
    timings = load_timings(path)[CASE]
    number = timings.facts["places"]
    figure, ax = tl.plots.subplots(figsize=(8.8, 4.2))
    most = 1.05 * max(number[MAXIMUM] / count for count in number.values())
    ax.plot([1, most], [1, most], color=GREY, ls="--", lw=1.2, label="the token ratio")
    ax.plot([1, most], [0.85, 0.85 * most], color=GREY, ls=":", lw=1.2, label="85 % of it")
    for i, way in enumerate(number):
        for j, clock in enumerate(CLOCKS):
            found = timings.ratio(MAXIMUM, way, clock)
            ax.errorbar(
                number[MAXIMUM] / number[way] + 0.03 * j, found.mean,
                yerr=[[found.mean - found.low], [found.high - found.mean]],
                color=palette[i], marker=markers[i], ms=8, capsize=4, ls="none",
                mfc="white" if j else palette[i], label=f"{way}, {clock}",
            )  # fmt: skip
    ax.set(xlabel="token ratio (places when padding to the maximum / places)")
    ax.set(ylabel="speed-up of training (median, 95 % interval)")
    figure.legend(loc="outside right upper", fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--texts", type=int, default=64, help="drawn from the training texts")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=data_dir() / "results" / "text_batches.json")
    parser.add_argument("--plot", action="store_true", help="draw what is in the file, only")
    options = parser.parse_args()
    if options.plot:
        print(tables(options.out))
        plot(options.out, PLOT)
        return
    torch.set_num_threads(1)
    timings = measure(options.texts, options.rounds)
    save_timings(
        options.out, {CASE: timings}, "python benchmarks/text_batches.py",
        batch_size=BATCH_SIZE, rows=ROWS, row_length=MAX_TOKENS, rounds=options.rounds, threads=1,
    )  # fmt: skip
    print(tables(options.out))
    plot(options.out, PLOT)


if __name__ == "__main__":
    main()
