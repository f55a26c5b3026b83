"""Rebuild the embedded checkpoints: ``tlcourse pretrain NAME``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tlcourse import saving
from tlcourse.backbones import (
    EMBEDDED,
    HEAD_BIAS,
    HEAD_WEIGHT,
    Backbone,
    Classifier,
    GlyphNet,
    Preprocess,
    checkpoint_path,
)
from tlcourse.cards import check_request, machine_facts, run_facts
from tlcourse.config import TrainConfig
from tlcourse.pretrain_text import TEXT_RECIPES, pretrain_text
from tlcourse.runtime import default_device
from tlcourse.scenes import SOURCES, SceneLoader
from tlcourse.train import History, fit


@dataclass(frozen=True)
class Recipe:
    """How one checkpoint is made.

    Attributes:
        seed: of the initial weights and of the scenes.
        source: a name of ``tlcourse.scenes.SOURCES``.
        num_steps: updates of the weights.
        batch_size: scenes in each step.
        lr: peak learning rate of AdamW, with warm-up and cosine.
    """

    seed: int = 0
    source: str = "glyphs"
    num_steps: int = 12_000
    batch_size: int = 96
    lr: float = 2e-3
    weight_decay: float = 0.02
    warmup_steps: int = 300
    label_smoothing: float = 0.05


SMALL_BUDGET = 2_500  # steps, for sources that are compared with each other
RECIPES = {
    "glyphnet": Recipe(),
    "glyphnet_seed1": Recipe(seed=1),
    "glyphnet_seed2": Recipe(seed=2),
    "glyphnet_bn": Recipe(num_steps=4_000),
    "glyphs_seed1": Recipe(seed=1, num_steps=SMALL_BUDGET),
    "shapes_seed1": Recipe(seed=1, source="shapes", num_steps=SMALL_BUDGET),
} | {name: Recipe(source=name, num_steps=SMALL_BUDGET) for name in SOURCES}
VAL_SEED, TEST_SEED = 9_001, 9_002


def pretrain(name: str, num_steps: int | None = None, folder: Path | None = None) -> Path:
    """Pre-train a backbone on its source; write the checkpoint and its card.

    Args:
        name: a key of ``RECIPES``.
        num_steps: at least 1, overrides the recipe (a short run tests the path); such a
            checkpoint goes to ``folder`` only.
        folder: where to write; None is ``data/checkpoints``.

    Returns:
        the path of the safetensors file; the card is beside it, as JSON.

    Raises:
        ValueError: for an unknown name, or a shortened run without a folder.
    """
    check_request(name, RECIPES, num_steps, folder)
    recipe = RECIPES[name]
    steps = num_steps or recipe.num_steps
    torch.manual_seed(recipe.seed)
    source = SOURCES[recipe.source]
    body = GlyphNet(norm=EMBEDDED[name])
    backbone = Backbone(body, name, body.feature_dim, Preprocess(32))
    model = Classifier(backbone, source.num_classes).to(default_device())
    config = TrainConfig(
        lr=recipe.lr,
        num_steps=steps,
        weight_decay=recipe.weight_decay,
        warmup_steps=min(recipe.warmup_steps, steps // 10),
        label_smoothing=recipe.label_smoothing,
        precision="bf16",
        eval_every_steps=max(1, steps // 20),
        monitor="val_accuracy",
        seed=recipe.seed,
    )
    # Scenes for training, choosing the step and the card come from different seeds.
    train = SceneLoader(recipe.source, steps, recipe.batch_size, seed=100 + recipe.seed)
    history = fit(model, train, SceneLoader(recipe.source, 8, 250, VAL_SEED, fixed=True), config)
    path = (folder / f"{name}.safetensors") if folder else checkpoint_path(name)
    head = {HEAD_WEIGHT: model.head.weight, HEAD_BIAS: model.head.bias}
    saving.save_state(body.state_dict() | head, path)
    card = make_card(name, recipe, history, model, path)
    path.with_suffix(".json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    return path


def make_card(
    name: str, recipe: Recipe, history: History, model: Classifier, path: Path
) -> dict[str, Any]:
    """The card of a checkpoint: data, command, seed, steps, machine, metrics, licence, sha256."""
    from tlcourse.evaluation import evaluate

    source = SOURCES[recipe.source]
    result = evaluate(model, SceneLoader(recipe.source, 20, 250, TEST_SEED, fixed=True))
    return {
        "name": name,
        "architecture": f"GlyphNet, widths 32-32-64-128, {EMBEDDED[name].title()}Norm",
        "num_parameters": sum(p.numel() for p in model.backbone.parameters()),
        "trained_on": f"source {recipe.source!r} of tlcourse.scenes ({source.about}), "
        f"{source.num_classes} classes; made from {source.material}",
        **run_facts(name, recipe, history),
        "source_test_accuracy": round(result.accuracy, 4),
        "source_test_interval_95": [round(result.interval.low, 4), round(result.interval.high, 4)],
        "val_accuracy_by_step": dict(
            zip(history.eval_step, (round(a, 4) for a in history.val_accuracy), strict=True)
        ),
        **machine_facts(
            history, path, "CC0-1.0 (the weights; fonts and photographs keep their own licences)"
        ),
    }


def main(argv: list[str] | None = None) -> int:
    """Command line: ``tlcourse pretrain NAME [--steps N --out FOLDER]``."""
    parser = argparse.ArgumentParser(prog="tlcourse pretrain", description=__doc__)
    parser.add_argument("name", choices=sorted({**RECIPES, **TEXT_RECIPES}))
    parser.add_argument("--steps", type=int, help="a shortened run; needs --out")
    parser.add_argument("--out", type=Path, help="folder to write to (default: data/checkpoints)")
    arguments = parser.parse_args(argv)
    try:
        run = pretrain_text if arguments.name in TEXT_RECIPES else pretrain
        path = run(arguments.name, arguments.steps, arguments.out)
    except ValueError as error:
        print(f"tlcourse pretrain: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
