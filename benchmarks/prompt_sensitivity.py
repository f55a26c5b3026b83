"""How touchy are virtual tokens? Learning rate and start of soft prompts and prefixes.

    python benchmarks/prompt_sensitivity.py [--workers N] [--out FILE]

Documentation routing, 16 labels per topic, and no head that is trained: a text goes to the topic
whose *name* is nearest, as MiniLM sees it. So whatever is learned, the virtual tokens have learned
it. Each method and start is trained with each rate of its grid on five draws of the labels, paired,
and read on the validation split. The rate with the least mean validation loss is then read on the
test split, once. Two more starts of the prompt use the rate that was chosen for the random one, and
so do two arms with four times the steps. Finished runs wait in a folder beside the result, and what
the result holds already is kept, so that a stopped benchmark goes on where it was.
Writes ``data/results/prompt_sensitivity.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tlcourse as tl
from tlcourse.comparing import Comparison, versions
from tlcourse.language_models import TextBackbone, Tokeniser, pool_tokens
from tlcourse.locations import data_dir
from tlcourse.parallel import default_workers, side_by_side
from tlcourse.prompts import PrefixTuning, PromptTuning
from tlcourse.text import TextTask, load_text_task, pad

DRAWS, LABELS, BATCH_SIZE, STEPS, WARMUP = 5, 16, 8, 24, 3
TOKENS, MAX_TOKENS, TEMPERATURE, HIDDEN = 8, 32, 20.0, 64
SMALL, WIDE = 0.056, 1.0  # deviation of MiniLM's embeddings; of the start that peft takes
RATES = {
    "prompt, std 0.056": (1e-3, 1e-2, 1e-1, 1.0),
    "prompt, std 1": (1e-2, 1e-1, 1.0, 10.0),
    "prefix, std 0.02": (1e-3, 1e-2, 1e-1, 1.0),
    "prefix, std 1": (1e-3, 1e-2, 1e-1, 1.0),
    "prefix from an MLP": (1e-4, 1e-3, 1e-2, 1e-1),
}
BASE = "prompt, std 0.056"  # whose rate the two other starts take
STARTS = ("prompt, vocabulary", "prompt, topic names")
LONG_STEPS = 96
LONGER = {"prompt, 96 steps": BASE, "prefix, 96 steps": "prefix, std 0.02"}
NAMES, HEAD = "names only", "head only"


@dataclass(frozen=True)
class Run:
    arm: str
    draw: int
    lr: float

    @property
    def file(self) -> str:
        return f"{self.arm}, lr {self.lr:g}, draw {self.draw}".replace(" ", "_") + ".safetensors"


class NearestName(nn.Module):
    """Logits are similarities of a text with the names of the topics; nothing here is trained.

    Args:
        body: gives ``last_hidden_state`` of the real tokens.
        names: unit vectors, shape (K, D).
        temperature: the similarities, in [-1, 1], are multiplied by it (MiniLM's own: 20).
    """

    def __init__(self, body: nn.Module, names: Tensor, temperature: float = TEMPERATURE) -> None:
        super().__init__()
        self.body, self.temperature = body, temperature
        self.register_buffer("names", names)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # -> (B, K)
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        features = F.normalize(pool_tokens(hidden, attention_mask), dim=1)
        return self.temperature * features @ self.names.T


def tokeniser() -> Tokeniser:
    return Tokeniser(tl.load_backbone("minilm").preprocess.tokenizer, MAX_TOKENS)


def build(arm: str, task: TextTask, seed: int) -> NearestName:
    """MiniLM with the virtual tokens of an arm; ``NAMES`` has none."""
    torch.manual_seed(seed)
    backbone = tl.load_backbone("minilm").eval()
    tokenise = tokeniser()
    with torch.no_grad():
        names = F.normalize(backbone(**pad(tokenise(task.classes))), dim=1)
    body = backbone.body
    if arm == "prompt, vocabulary":
        body = PromptTuning(body, TOKENS, "vocabulary")
    elif arm == "prompt, topic names":
        ids = tokenise.tokenizer(" ".join(task.classes), add_special_tokens=False)["input_ids"]
        body = PromptTuning(body, TOKENS, ids)
    elif arm.startswith("prompt"):  # those with more steps start small, too
        body = PromptTuning(body, TOKENS)
        nn.init.normal_(body.prompt, std=WIDE if arm == "prompt, std 1" else SMALL)
    elif arm == "prefix from an MLP":
        body = PrefixTuning(body, TOKENS, hidden=HIDDEN)
    elif arm.startswith("prefix"):
        body = PrefixTuning(body, TOKENS, std=WIDE if arm == "prefix, std 1" else 0.02)
    return NearestName(body, names)


def attention_share(model: NearestName, inputs: dict[str, Tensor]) -> float:
    """Share of attention that real tokens give to virtual ones, mean over layers and heads."""
    inputs = {name: x[:16] for name, x in inputs.items()}
    model.body.body.set_attn_implementation("eager")  # sdpa keeps no weights
    with torch.no_grad():
        weights = model.body(**inputs, output_attentions=True).attentions
    model.body.body.set_attn_implementation("sdpa")
    share = torch.stack(weights)[..., :TOKENS].sum(dim=-1)  # (layers, B, heads, T)
    real = inputs["attention_mask"].bool()[None, :, None, :].expand_as(share)
    return share[real].mean().item()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def perform(kept: Path, run: Run) -> dict[str, Any]:
    """Train, and read training and validation; what was trained waits in a file for the test."""
    path = kept / run.file
    done = path.with_suffix(".json")  # written last
    if done.is_file():
        return json.loads(done.read_text("utf-8"))
    task = load_text_task("doc_routing", LABELS, run.draw)
    model = build(run.arm, task, run.draw)
    loaders = task.loaders(tokeniser(), BATCH_SIZE, run.draw)
    steps = LONG_STEPS if run.arm in LONGER else STEPS
    config = tl.TrainConfig(
        lr=run.lr, num_steps=steps, warmup_steps=WARMUP, weight_decay=0.0, precision="fp32",
        progress=False, seed=run.draw,
    )  # fmt: skip
    loss = tl.fit(model, loaders.train, None, config).train_loss
    val = tl.evaluate(model, loaders.val)
    epoch = len(loaders.train)
    found = {
        "train_loss": [round(sum(loss[i : i + epoch]) / epoch, 5) for i in range(0, steps, epoch)],
        "val_loss": val.loss,
        "val_accuracy": val.accuracy,
        "attention_share": attention_share(model, next(iter(loaders.val))[0]),
    }
    save_file({k: v.contiguous() for k, v in trained(model).items()}, path)
    done.write_text(json.dumps(found), encoding="utf-8")
    return found


def test(kept: Path, run: Run) -> float:
    """Test accuracy of what ``perform`` trained."""
    task = load_text_task("doc_routing", LABELS, run.draw)
    model = build(run.arm, task, run.draw)
    if run.arm != NAMES:
        perform(kept, run)  # unless it was
        saved = load_file(kept / run.file)
        for name, parameter in trained(model).items():
            parameter.copy_(saved[name])
    return tl.evaluate(model, task.loaders(tokeniser(), BATCH_SIZE).test).accuracy


def head_only(draw: int) -> float:
    """Test accuracy of logistic regression on frozen features, no virtual tokens."""
    task, backbone = load_text_task("doc_routing", LABELS, draw), tl.load_backbone("minilm")
    assert isinstance(backbone, TextBackbone)
    loaders = task.loaders(tokeniser(), BATCH_SIZE)
    train, val, test_ = (
        tl.extract_features(backbone, part) for part in (loaders.train, loaders.val, loaders.test)
    )
    return tl.linear_probe(train, test_, val).accuracy


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    default = data_dir() / "results" / "prompt_sensitivity.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    kept = options.out.with_suffix(".partial")
    kept.mkdir(parents=True, exist_ok=True)
    run_all = partial(_run_all, options.workers or default_workers(), kept)

    settings = {
        "model": "minilm", "labels_per_class": LABELS, "steps": STEPS, "long_steps": LONG_STEPS,
        "draws": DRAWS, "batch_size": BATCH_SIZE, "warmup_steps": WARMUP, "virtual_tokens": TOKENS,
        "max_tokens": MAX_TOKENS, "temperature": TEMPERATURE, "hidden": HIDDEN, "small": SMALL,
        "wide": WIDE, "precision": "fp32",
    }  # fmt: skip
    before = json.loads(options.out.read_text("utf-8")) if options.out.is_file() else {}
    if before.get("settings") != settings:
        before = {"cells": {}, "scores": {}, "lr": {}}
    cells, scores = before["cells"], before["scores"]

    grid = [Run(a, d, lr) for d in range(DRAWS) for a, rates in RATES.items() for lr in rates]
    collect(cells, grid, run_all)
    rates = {arm: min(cells[arm], key=lambda lr: sum(cells[arm][lr]["val_loss"])) for arm in RATES}
    rates |= dict.fromkeys(STARTS, rates[BASE]) | {a: rates[like] for a, like in LONGER.items()}
    more = [Run(a, d, float(rates[a])) for a in (*STARTS, *LONGER) for d in range(DRAWS)]
    collect(cells, more, run_all)

    if NAMES not in scores:
        scores[NAMES] = [test(kept, Run(NAMES, 0, 0.0))] * DRAWS
        scores[HEAD] = [head_only(draw) for draw in range(DRAWS)]
    for arm, rate in rates.items():
        if arm not in scores or before["lr"][arm] != float(rate):
            scores[arm] = [test(kept, Run(arm, draw, float(rate))) for draw in range(DRAWS)]
    content = {
        "scores": scores,
        "lr": {arm: float(rate) for arm, rate in rates.items()},
        "cells": cells,
        "command": "python benchmarks/prompt_sensitivity.py",
        "versions": versions(),
        "settings": settings,
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(kept)
    print(Comparison(scores), flush=True)


Cells = dict[str, dict[str, dict[str, list]]]  # arm -> rate -> measured -> one for each draw


def collect(cells: Cells, runs: list[Run], run_all: Callable[[list[Run]], list]) -> None:
    """Perform the runs whose cell is not there yet, and put what they found into the cells."""
    missing = [run for run in runs if f"{run.lr:g}" not in cells.get(run.arm, {})]
    for run, found in zip(missing, run_all(missing), strict=True):
        cell = cells.setdefault(run.arm, {}).setdefault(f"{run.lr:g}", {})
        for name, value in found.items():
            cell.setdefault(name, []).append(value)


def _run_all(workers: int, kept: Path, runs: list[Run]) -> list[dict[str, Any]]:
    results = []
    for run, found in zip(runs, side_by_side(partial(perform, kept), runs, workers), strict=True):
        print(f"{run.arm}, draw {run.draw}, lr {run.lr:g}: loss {found['train_loss'][-1]:.3f}, "
              f"val {found['val_accuracy']:.3f}", flush=True)  # fmt: skip
        results.append(found)
    return results


if __name__ == "__main__":
    main()
