"""What pre-training is worth on text: documentation routing, by labels per topic.

    python benchmarks/text_transfer.py [--labels 4 16 all] [--arms NAME ...] [--workers N]

TF-IDF, frozen and fine-tuned encoders, and the same architectures from random weights. A learning
rate is chosen for each fine-tuned arm and number of labels on the validation split of one extra
draw; five other draws, paired across the arms, are then measured on the test split.
Writes ``data/results/text_transfer.json``; what is not asked for keeps what is recorded there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

import tlcourse as tl
from tlcourse.comparing import Comparison, versions
from tlcourse.language_models import load_text_backbone
from tlcourse.locations import data_dir
from tlcourse.parallel import default_workers, side_by_side
from tlcourse.probing import C_GRID
from tlcourse.text import TextTask, load_text_task

DRAWS, TUNING_DRAW, BATCH_SIZE = 5, 1_000, 16
STEPS = {4: 30, 16: 40, None: 100}  # labels per topic -> updates
# arm -> (encoder, pre-trained, rates to choose from); random weights get twice the steps.
FINE_TUNED = {
    "MiniLM": ("minilm", True, (1e-4, 3e-4)),
    "MiniLM, random init": ("minilm", False, (3e-4, 1e-3)),
    "docbert": ("docbert", True, (3e-4, 1e-3)),
    "docbert, random init": ("docbert", False, (3e-4, 1e-3)),
}
# arm -> (encoder, pre-trained, pooling)
FROZEN = {
    "MiniLM frozen": ("minilm", True, "mean"),
    "MiniLM frozen, first token": ("minilm", True, "cls"),
    "MiniLM random, frozen": ("minilm", False, "mean"),
    "docbert frozen": ("docbert", True, "mean"),
    "docbert frozen, first token": ("docbert", True, "cls"),
}
ARMS = ("TF-IDF", *FROZEN, *FINE_TUNED)


@dataclass(frozen=True)
class Run:
    arm: str
    labels: int | None
    draw: int
    lr: float = 0.0


def tf_idf(task: TextTask) -> tuple[float, float]:
    """Logistic regression on word counts; its penalty is chosen on validation."""
    vectorizer = TfidfVectorizer(sublinear_tf=True, stop_words="english")
    x_train = vectorizer.fit_transform(task.train.texts)
    x_val, x_test = (vectorizer.transform(part.texts) for part in (task.val, task.test))
    found = []
    for C in C_GRID:
        model = LogisticRegression(C=C, max_iter=1_000).fit(x_train, task.train.targets)
        on_val = float(model.score(x_val, task.val.targets))
        found.append((on_val, float(model.score(x_test, task.test.targets))))
    return max(found, key=lambda scores: scores[0])


def frozen(task: TextTask, name: str, pretrained: bool, pooling: Any) -> tuple[float, float]:
    """Linear probe on features that are computed once."""
    backbone = load_text_backbone(name, pretrained, pooling=pooling)
    loaders = task.loaders(backbone.preprocess, 64)
    train, val, test = (
        tl.extract_features(backbone, part) for part in (loaders.train, loaders.val, loaders.test)
    )
    probe = tl.linear_probe(train, test, val)
    on_val = (probe.logits(val.features).argmax(axis=1) == val.targets).mean()
    return float(on_val), probe.accuracy


def fine_tuned(task: TextTask, name: str, pretrained: bool, run: Run) -> tuple[float, float]:
    """Encoder and head trained together; the head at ten times the rate."""
    backbone = load_text_backbone(name, pretrained, seed=run.draw)
    model = tl.Classifier(backbone, task.num_classes)
    loaders = task.loaders(backbone.preprocess, BATCH_SIZE, run.draw)
    steps = STEPS[run.labels] * (1 if pretrained else 2)
    config = tl.TrainConfig(
        lr=run.lr, head_lr=10 * run.lr, num_steps=steps, warmup_steps=steps // 10,
        eval_every_steps=steps // 4, precision="bf16", progress=False, seed=run.draw,
    )  # fmt: skip
    history = tl.fit(model, loaders.train, loaders.val, config)
    best = history.eval_step.index(history.best_step)
    return history.val_accuracy[best], tl.evaluate(model, loaders.test).accuracy


def perform(run: Run) -> tuple[float, float]:
    """Accuracy on the validation and on the test split."""
    task = load_text_task("doc_routing", run.labels, run.draw)
    if run.arm == "TF-IDF":
        return tf_idf(task)
    if run.arm in FROZEN:
        return frozen(task, *FROZEN[run.arm])
    name, pretrained, _ = FINE_TUNED[run.arm]
    return fine_tuned(task, name, pretrained, run)


def choose_rate(arm: str, labels: int | None, run_all: Callable) -> float:
    runs = [Run(arm, labels, TUNING_DRAW, lr) for lr in FINE_TUNED[arm][2]]
    found = dict(zip(runs, run_all(runs), strict=True))
    for run, (on_val, _) in found.items():
        print(f"tuning {arm}, {labels} labels, lr {run.lr:g}: {on_val:.3f}", flush=True)
    return max(found, key=lambda run: found[run][0]).lr


def record(out: Path, labels: int | None, arm: str, lr: float | None, scores: list[float]) -> None:
    content = json.loads(out.read_text("utf-8")) if out.is_file() else {"counts": {}}
    entry = content["counts"].setdefault(str(labels or "all"), {"scores": {}, "lr": {}})
    entry["scores"][arm] = scores
    if lr is not None:
        entry["lr"][arm] = lr
    content |= {
        "command": "python benchmarks/text_transfer.py",
        "versions": versions(),
        "settings": {
            "steps": {str(k or "all"): v for k, v in STEPS.items()}, "batch_size": BATCH_SIZE,
            "draws": DRAWS, "precision": "bf16",
        },
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    counts = {"all" if count is None else str(count): count for count in STEPS}
    parser.add_argument("--labels", nargs="+", choices=list(counts), default=list(counts))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    parser.add_argument("--out", type=Path, default=data_dir() / "results" / "text_transfer.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run_all = partial(_run_all, arguments.workers or default_workers())
    for count in arguments.labels:
        labels = counts[count]
        for arm in arguments.arms:
            lr = choose_rate(arm, labels, run_all) if arm in FINE_TUNED else None
            runs = [Run(arm, labels, draw, lr or 0.0) for draw in range(DRAWS)]
            scores = [on_test for _, on_test in run_all(runs)]
            record(arguments.out, labels, arm, lr, scores)
            print(f"{count} labels, {arm}: {[round(score, 3) for score in scores]}", flush=True)
        content = json.loads(arguments.out.read_text("utf-8"))
        print(Comparison(content["counts"][count]["scores"]), flush=True)


def _run_all(workers: int, runs: list[Run]) -> list[tuple[float, float]]:
    return list(side_by_side(perform, runs, workers))


if __name__ == "__main__":
    main()
