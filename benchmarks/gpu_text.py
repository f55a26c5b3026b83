"""How much of a GPU does fine-tuning BERT-base on packed rows use?

    python benchmarks/gpu_text.py [--out FILE] [--seconds N] [--rows N] [--dropout P]
    python benchmarks/gpu_text.py --plot FILE

BERT-base (``BertConfig``'s defaults, random weights, dropout 0.1 also in attention, sdpa), full
fine-tuning on synthetic texts: lengths lognormal (median 40, sigma 0.6), cut to 8 to 128 tokens;
rows of 128 tokens, bf16 autocast, fused AdamW, gradients clipped. Batches lie on the GPU. The
Trainer of transformers pads each of 256 texts to 128, with bf16 and its other defaults.

Counted are operations on real tokens alone, forward and backward (three times the forward pass):

    6 P N + 12 L d (sum of the squared lengths)

with P parameters of the encoder's layers, N real tokens, L layers, d their width: two operations
for each weight and token; in each layer, for each pair of tokens of one text, 2 d for the score and
2 d for the weighted sum. Padding, embeddings, the head and softmax count nothing.

Seconds are those of steps in the middle of a run, between two synchronisations; the start of a run
and compiling stay outside and are recorded by themselves. Rounds in turns; medians with 95 %
intervals. A way that fails is recorded and left out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertConfig, BertForSequenceClassification, BertModel

import tlcourse as tl
from tlcourse.language_models import TextBackbone
from tlcourse.locations import data_dir
from tlcourse.packing import PackedLoader, best_fit, pack_backbone, varying
from tlcourse.timing import Timings, load_timings, save_timings, take_turns

BEGAN = time.perf_counter()
FIT, EAGER, RAW, TRAINER = (
    "tl.fit, compiled", "tl.fit, eager", "loop by hand, compiled", "Trainer of transformers",
)  # fmt: skip
PEAK = 989e12  # dense bf16 operations in a second of an H100 or H200 (SXM), by its datasheet
GOAL, ROUNDS, SKIP, CLASSES, BATCHES, CASE = 0.4, 7, 2, 4, 4, "BERT-base"
TINY = {
    "vocab_size": 500, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64,
}  # fmt: skip
BACKENDS = {
    "auto": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
}  # fmt: skip
Batch = tuple[dict[str, Tensor], Tensor]


@dataclasses.dataclass
class Bench:
    """What all ways share: model, batches, and what has been found so far."""

    config: BertConfig
    device: torch.device
    rows: int
    row_length: int
    steps: int = 8  # in the middle of a run
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    windows: dict[str, list[tuple[float, float]]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        body = BertModel(self.config, add_pooling_layer=False)
        width = self.config.hidden_size
        backbone = TextBackbone(body, "bert", width, None, "cls")  # type: ignore[arg-type]
        self.model = tl.Classifier(pack_backbone(backbone), CLASSES).to(self.device)
        self.for_trainer = BertForSequenceClassification(self.config)
        tokens = synthetic(BATCHES * self.rows, self.row_length, self.config)
        self.lengths = torch.tensor([len(one) for one in tokens])
        targets = torch.randint(CLASSES, (len(tokens),))
        whole = len(tokens) // self.rows * self.rows  # no short batch at the end
        self.padded = pad_all(tokens[:whole], targets[:whole], self.row_length)
        loader = PackedLoader(tokens, targets, self.rows, self.row_length, shuffle=True)
        self.batches = [
            ({name: x.to(self.device) for name, x in inputs.items()}, targets.to(self.device))
            for inputs, targets in loader.resident(self.device)
        ]
        for inputs, _ in self.batches:
            varying(inputs)  # all batches run through what is compiled for the first

    def count(self, lengths: Tensor) -> tuple[float, float]:
        """Operations of a step on texts of these lengths, and real tokens."""
        weights = sum(p.numel() for p in self.model.backbone.body.encoder.parameters())
        real, squares = lengths.sum().item(), lengths.double().square().sum().item()
        pairs = 12 * self.config.num_hidden_layers * self.config.hidden_size * squares
        return 6.0 * weights * real + pairs, float(real)


class Clock:
    """Notes wall and CPU time after ``SKIP`` steps and ``steps`` steps later."""

    def __init__(self, steps: int) -> None:
        self.last, self.stamps = SKIP + steps, dict[int, tuple[float, float]]()

    def after(self, done: int) -> None:
        if done in (SKIP, self.last):
            synchronise()
            self.stamps[done] = time.perf_counter(), time.process_time()

    def per_step(self) -> tuple[float, float]:
        (wall, cpu), (wall_end, cpu_end) = self.stamps[SKIP], self.stamps[self.last]
        steps = self.last - SKIP
        return (wall_end - wall) / steps, (cpu_end - cpu) / steps


class Clocked:
    """A loader: the batches in turn, for as many steps as a run has; it holds the clock."""

    def __init__(self, batches: list[Batch], clock: Clock) -> None:
        self.batches, self.clock = batches, clock
        self.targets = torch.cat([targets for _, targets in batches])  # checked once

    def __len__(self) -> int:
        return self.clock.last + 1

    def __iter__(self) -> Iterator[Batch]:
        for done, batch in zip(range(len(self)), itertools.cycle(self.batches), strict=False):
            self.clock.after(done)  # asked for the next batch, so this many steps are on their way
            yield batch


def synthetic(rows: int, row_length: int, config: BertConfig) -> list[list[int]]:
    """Texts of random tokens with a realistic spread of lengths, as many as fit into the rows."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(rows * row_length // 40, generator=generator)
    drawn = (40 * (0.6 * noise).exp()).round().long().clamp(8, row_length).tolist()
    while len(best_fit(drawn, row_length)) > rows:
        drawn = drawn[: int(0.998 * len(drawn))]
    # Numbers under 5 stand for special tokens.
    stream = torch.randint(5, config.vocab_size, (len(drawn), row_length), generator=generator)
    return [row[:length] for row, length in zip(stream.tolist(), drawn, strict=True)]


def run_fit(bench: Bench, clock: Clock, compiled: bool) -> None:
    config = tl.TrainConfig(
        lr=3e-5, num_steps=clock.last + 1, precision="bf16", compile=compiled,
        schedule="constant", progress=False,
    )  # fmt: skip
    tl.fit(bench.model, Clocked(bench.batches, clock), None, config)


def run_by_hand(bench: Bench, clock: Clock) -> None:
    model, device = bench.model.train(), bench.device
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5, fused=device.type == "cuda")
    for inputs, targets in Clocked(bench.batches, clock):
        with torch.autocast(device.type, torch.bfloat16):
            logits = compiled(**inputs)
        F.cross_entropy(logits.float(), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def run_trainer(bench: Bench, clock: Clock) -> None:
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Stamp(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.after(state.global_step)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=bench.rows, bf16=True,
            max_steps=clock.last + 1, report_to="none", save_strategy="no", disable_tqdm=True,
            use_cpu=bench.device.type == "cpu",
        )  # fmt: skip
        trainer = Trainer(
            bench.for_trainer, arguments, train_dataset=bench.padded, callbacks=[Stamp()]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def pad_all(tokens: list[list[int]], targets: Tensor, row_length: int) -> list[dict[str, Tensor]]:
    """The texts as a data set of transformers, each padded to the length of a row."""
    found = []
    for one, target in zip(tokens, targets, strict=True):
        room = (0, row_length - len(one))
        ids = F.pad(torch.tensor(one), room)
        mask = F.pad(torch.ones(len(one), dtype=torch.long), room)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": target})
    return found


WAYS: dict[str, Callable[[Bench, Clock], None]] = {
    # First what makes models: transformers keeps a list of their classes, and a longer list makes
    # torch.compile start again.
    TRAINER: run_trainer,
    EAGER: lambda bench, clock: run_fit(bench, clock, compiled=False),
    FIT: lambda bench, clock: run_fit(bench, clock, compiled=True),
    RAW: run_by_hand,
}


def run(bench: Bench, way: str) -> None:
    """One run of a way: keep the seconds of its steps, and those of all the rest."""
    clock, start = Clock(bench.steps), time.perf_counter()
    WAYS[way](bench, clock)
    synchronise()
    seconds = time.perf_counter() - start
    wall, cpu = clock.per_step()
    bench.windows.setdefault(way, []).append((wall, cpu))
    starting = seconds - wall * (clock.last + 1)
    bench.facts["seconds besides steps"].setdefault(way, []).append(round(starting, 3))
    say(f"{way}: {wall * 1e3:.1f} ms a step, {starting:.1f} s besides")


def warm_up(bench: Bench, out: Path, options: argparse.Namespace) -> list[str]:
    """Run each way once, and say which ones work; compiling happens here."""
    working: list[str] = []
    for way in options.ways or WAYS:
        counters.clear()
        try:
            run(bench, way)
            working.append(way)
        except Exception as error:  # whatever it is, the other ways go on
            traceback.print_exc()
            bench.facts["failed"][way] = f"{type(error).__name__}: {str(error)[:300]}"
        bench.facts["graphs compiled"][way] = int(counters["stats"]["unique_graphs"])
        bench.facts["graph breaks"][way] = sum(counters["graph_break"].values())
        save(bench, out, options, {})
    return working


def measure(bench: Bench, out: Path, options: argparse.Namespace) -> None:
    """Warm up, choose how many steps the time left allows, and take turns."""
    for name in ("seconds besides steps", "failed", "graphs compiled", "graph breaks"):
        bench.facts[name] = {}
    working = warm_up(bench, out, options)
    if not working:
        raise SystemExit("no way works")
    bench.steps = choose_steps(bench, working, options)
    bench.facts["steps timed in a run"] = bench.steps
    warm = {way: len(bench.windows[way]) for way in working}
    try:
        take_turns({way: lambda way=way: run(bench, way) for way in working}, ROUNDS, warm_up=False)
    except Exception as error:
        traceback.print_exc()
        bench.facts["failed"]["rounds"] = f"{type(error).__name__}: {str(error)[:300]}"
    count_work(bench, working)
    save(bench, out, options, warm)


def choose_steps(bench: Bench, working: list[str], options: argparse.Namespace) -> int:
    """As many steps as fit into the seconds left, from 6 to 24."""
    left = options.seconds - (time.perf_counter() - BEGAN) - 3
    besides = bench.facts["seconds besides steps"]
    # The first start of a compiled way holds the compiling, which does not come again.
    start = sum(min(besides[way][-1], 1.0) for way in working)
    step = sum(bench.windows[way][-1][0] for way in working)
    steps = int((left / ROUNDS - start) / step) - SKIP - 1
    say(f"{left:.0f} s left: {steps} steps in each run would fit")
    return max(6, min(24, steps))


def count_work(bench: Bench, working: list[str]) -> None:
    """Operations, real tokens and places of a step, for each way."""
    flops, real = bench.count(bench.lengths[: len(bench.padded)])
    share = bench.rows / len(bench.padded)  # of the texts, that the Trainer sees in a step
    timed = [
        bench.count(bench.batches[i % len(bench.batches)][0]["lengths"].cpu())
        for i in range(SKIP, SKIP + bench.steps)
    ]
    packed = [sum(column) / len(timed) for column in zip(*timed, strict=True)]
    for way in working:
        of_step = [flops * share, real * share] if way == TRAINER else packed
        bench.facts.setdefault("operations of a step", {})[way] = of_step[0]
        bench.facts.setdefault("real tokens of a step", {})[way] = of_step[1]
    bench.facts["places of a step"] = bench.rows * bench.row_length


def save(bench: Bench, out: Path, options: argparse.Namespace, warm: dict[str, int]) -> None:
    """Everything so far; windows of the warm-up are left out, and rounds that are not whole."""
    timed = {way: bench.windows[way][first:] for way, first in warm.items()}
    whole = min(map(len, timed.values()), default=0)
    wall, cpu = (
        {way: [window[i] for window in windows[:whole]] for way, windows in timed.items()}
        for i in (0, 1)
    )
    bench.facts["seconds in all"] = round(time.perf_counter() - BEGAN, 1)
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "plot")}
    save_timings(
        out, {CASE: Timings(wall, cpu, bench.facts)},
        "python3 benchmarks/gpu_text.py", **settings, row_length=bench.row_length, classes=CLASSES,
    )  # fmt: skip


def ceiling(device: torch.device, side: int) -> float:
    """Operations in a second of a large matrix product in bf16, median of 5 times 10 products."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    found = []
    for _ in range(6):
        synchronise()
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        synchronise()
        found.append(10 * 2 * side**3 / (time.perf_counter() - start))
    return float(torch.tensor(found[1:]).median())


def attention_probe(bench: Bench) -> dict[str, Any]:
    """Milliseconds of one layer's attention, forward and backward, with each kernel."""
    heads = bench.config.num_attention_heads
    shape = (bench.rows, heads, bench.row_length, bench.config.hidden_size // heads)
    q, k, v = (
        torch.randn(shape, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    ids = bench.batches[0][0]["text_ids"].view(bench.rows, -1)
    mask = (ids[:, :, None] == ids[:, None, :]).unsqueeze(1)
    dropout = bench.config.attention_probs_dropout_prob
    found: dict[str, Any] = {}
    for name in BACKENDS:
        try:
            with attention(name):
                for i in range(25):
                    if i == 5:
                        synchronise()
                        start = time.perf_counter()
                    out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
                    torch.autograd.grad(out, (q, k, v), out)
                synchronise()
            found[name] = round((time.perf_counter() - start) / 20 * 1e3, 3)
        except RuntimeError as error:
            say(f"attention with {name} fails: {error}")
    return found


def attention(name: str) -> contextlib.AbstractContextManager[Any]:
    backend = BACKENDS[name]
    return contextlib.nullcontext() if backend is None else sdpa_kernel([backend])


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - BEGAN:5.1f} s] {text}", flush=True)


def rates(timings: Timings, way: str) -> tuple[float, float, float]:
    """Operations on real tokens in a second: median, low, high."""
    seconds, work = timings.seconds(way), timings.facts["operations of a step"][way]
    return work / seconds.mean, work / seconds.high, work / seconds.low


def tables(path: Path) -> str:
    """Markdown for benchmarks/README.md."""
    timings = load_timings(path)[CASE]
    facts, reference = timings.facts, FIT if FIT in timings.wall else next(iter(timings.wall))
    lines = [
        f"| way | ms a step | real tokens a second | padding | TFLOP/s on real tokens | of "
        f"{PEAK / 1e12:.0f} | of the matrix product | seconds a token / {reference} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    tokens = facts["real tokens of a step"]
    for way in timings.wall:
        seconds, rate = timings.seconds(way), rates(timings, way)
        ratio, scale = timings.ratio(way, reference), tokens[reference] / tokens[way]
        cells = [
            way, f"{seconds.mean * 1e3:.1f} [{seconds.low * 1e3:.1f}, {seconds.high * 1e3:.1f}]",
            f"{tokens[way] / seconds.mean:,.0f}",
            f"{1 - tokens[way] / facts['places of a step']:.1%}",
            "{:.0f} [{:.0f}, {:.0f}]".format(*(value / 1e12 for value in rate)),
            f"{rate[0] / PEAK:.1%}", f"{rate[0] / facts['matrix product, per second']:.1%}",
            "{:.2f} [{:.2f}, {:.2f}]".format(
                *(value * scale for value in (ratio.mean, ratio.low, ratio.high))
            ),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    besides, kernels = facts["seconds besides steps"], facts["attention, ms"]
    starts = ", ".join(f"{way} {besides[way][0]:.1f} s" for way in timings.wall)
    lines += [
        "",
        f"Matrix product of {facts['side']} x {facts['side']} in bf16: "
        f"{facts['matrix product, per second'] / 1e12:.0f} TFLOP/s. The first run of each way, "
        f"besides its steps (compiling included): {starts}. Attention of one layer, forward and "
        f"backward, by kernel: {', '.join(f'{name} {ms} ms' for name, ms in kernels.items())}.",
    ]
    lines += [f"{way} failed: {why}." for way, why in facts["failed"].items()]
    return "\n".join(lines)


def plot(path: Path, out: Path) -> None:
    """Operations on real tokens in a second, by way, with the goal."""
    timings = load_timings(path)[CASE]
    found = {way: tuple(x / 1e12 for x in rates(timings, way)) for way in timings.wall}
    ax = tl.plots.plot_intervals(
        found, xlabel="TFLOP/s on real tokens (median, 95 % interval)", reference=GOAL * PEAK / 1e12
    )
    ax.text(GOAL * PEAK / 1e12, -0.5, f" {GOAL:.0%} of {PEAK / 1e12:.0f}", va="top", ha="left")
    ax.set_xlim(0, None)
    out.parent.mkdir(parents=True, exist_ok=True)
    ax.figure.savefig(out, dpi=110)


def make_bench(options: argparse.Namespace) -> Bench:
    dropouts = dict.fromkeys(
        ("hidden_dropout_prob", "attention_probs_dropout_prob"), options.dropout
    )
    tiny = TINY if options.tiny else {}
    config = BertConfig(num_labels=CLASSES, **dropouts, **tiny)
    config._attn_implementation = "sdpa"
    device = torch.device("cpu" if options.tiny else "cuda")
    bench = Bench(config, device, options.rows, 128)
    side = 256 if options.tiny else 8192
    bench.facts |= {"side": side, "matrix product, per second": ceiling(device, side)}
    bench.facts["attention, ms"] = attention_probe(bench)
    bench.facts["texts"] = len(bench.lengths)
    bench.facts["parameters of the layers"] = sum(
        p.numel() for p in bench.model.backbone.body.encoder.parameters()
    )
    say(f"{len(bench.batches)} batches; {bench.facts}")
    return bench


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=data_dir() / "results" / "gpu_text.json")
    parser.add_argument("--plot", type=Path, help="draw what is in this file, and do nothing else")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="that it should take, imports aside"
    )
    parser.add_argument("--rows", type=int, default=256, help="of 128 tokens in a batch")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--attention", choices=list(BACKENDS), default="auto")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS))
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plot is not None:
        plot(options.plot, Path(__file__).parent / "plots" / "gpu_text.png")
        return
    if not (options.tiny or torch.cuda.is_available()):
        print("gpu_text: nothing measured, no CUDA GPU here")
        return
    with attention(options.attention):
        measure(make_bench(options), options.out, options)
    say("done")
    print(tables(options.out))
    if not options.tiny:
        plot(options.out, Path(__file__).parent / "plots" / "gpu_text.png")


if __name__ == "__main__":
    main()
