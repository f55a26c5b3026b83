"""tlcourse: the helper library of the transfer learning course.

Names load on first use, so ``import tlcourse`` is immediate and brings in no torch.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

# Threads that wait for each other sleep instead of spinning. It must be set before torch loads.
# Where other programs use the cores too (a browser, a second kernel), spinning threads hold up
# the very thread they wait for, and a training step takes several times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

# Public name -> module that defines it.
_HOME = {
    "setup": "runtime",
    "TrainConfig": "config",
    "load_task": "datasets",
    "load_backbone": "backbones",
    "load_text_task": "text",
    "load_text_backbone": "language_models",
    "load_generator": "language_models",
    "Classifier": "backbones",
    "save_model": "saving",
    "load_model": "saving",
    "freeze": "freezing",
    "unfreeze": "freezing",
    "fit": "train",
    "fit_many": "many",
    "preflight": "preflight",
    "run_dir": "locations",
    "evaluate": "evaluation",
    "predict": "evaluation",
    "extract_features": "probing",
    "linear_probe": "probing",
    "knn": "probing",
    "compare": "comparing",
    "side_by_side": "parallel",
    "check": "checks",
    "quiz": "quizzes",
}
_MODULES = (
    "adapters", "arms", "authoring", "backbones", "checks", "comparing", "config", "datasets",
    "derivatives", "evaluation", "freezing", "language_models", "layers", "library_code", "lora",
    "losses", "packing", "parallel", "peft_files", "plots", "probing", "prompts", "quantisation",
    "quantised_layers", "runtime", "scenes", "shift", "sources", "text", "train",
    "training_memory", "transferability", "weight_space", "widgets",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"tlcourse.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"tlcourse.{name}")
    raise AttributeError(f"tlcourse has no name {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])


__all__ = [*_HOME, *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]
