from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest

from tlcourse.config import TrainConfig


def test_defaults_are_those_of_the_course() -> None:
    config = TrainConfig(num_steps=10)
    assert (config.lr, config.optimizer, config.schedule) == (1e-3, "adamw", "cosine")
    assert (config.max_grad_norm, config.precision, config.monitor) == (1.0, "auto", "val_loss")


def test_is_frozen_and_copied_with_replace() -> None:
    config = TrainConfig(num_epochs=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0  # type: ignore[misc]
    assert dataclasses.replace(config, lr=0.5) == TrainConfig(num_epochs=3, lr=0.5)
    with pytest.raises(ValueError, match="lr must be > 0"):
        dataclasses.replace(config, lr=-0.5)


@pytest.mark.parametrize("lengths", [{}, {"num_steps": 3, "num_epochs": 2}])
def test_needs_exactly_one_length(lengths: dict) -> None:
    with pytest.raises(ValueError, match="exactly one of num_steps and num_epochs"):
        TrainConfig(**lengths)


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("lr", 0.0, "> 0, got 0"),
        ("lr", math.nan, "> 0, got nan"),
        ("lr", math.inf, "> 0, got inf"),
        ("head_lr", -1.0, "> 0, got -1"),
        ("max_grad_norm", 0, "> 0, got 0"),
        ("weight_decay", -0.1, ">= 0, got -0.1"),
        ("momentum", 1.0, ">= 0 and < 1, got 1"),
        ("label_smoothing", 1.0, ">= 0 and < 1, got 1"),
        ("num_epochs", 0, ">= 1, got 0"),
        ("accumulation_steps", 0, ">= 1, got 0"),
        ("warmup_steps", -1, ">= 0, got -1"),
        ("eval_every_steps", 0, ">= 1, got 0"),
        ("patience", 0, ">= 1, got 0"),
        ("seed", -1, ">= 0, got -1"),
        ("optimizer", "adam", "one of 'adamw', 'sgd', got 'adam'"),
        ("schedule", "linear", "one of 'cosine', 'constant', got 'linear'"),
        ("precision", "fp8", "one of 'auto', 'fp32', 'bf16', 'fp16', got 'fp8'"),
        ("monitor", "loss", "one of 'val_loss', 'val_accuracy', got 'loss'"),
        ("log_to", "mlflow", "one of None, 'tensorboard', 'wandb', got 'mlflow'"),
    ],
)
def test_error_names_setting_value_and_expectation(
    setting: str, value: object, expected: str
) -> None:
    settings = {"num_epochs": 1, setting: value}
    with pytest.raises(ValueError) as error:
        TrainConfig(**settings)  # type: ignore[arg-type]
    assert str(error.value).startswith(f"{setting} must be ")
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("lr", "1e-3"), ("lr", True), ("lr", None), ("seed", 1.0), ("patience", 2.5), ("seed", True)],
)
def test_refuses_other_types(setting: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{setting} must be"):
        TrainConfig(num_epochs=1, **{setting: value})  # type: ignore[arg-type]


def test_warmup_must_end_before_the_run() -> None:
    TrainConfig(num_steps=5, warmup_steps=4)
    with pytest.raises(ValueError, match="less than num_steps=5, got 5"):
        TrainConfig(num_steps=5, warmup_steps=5)


def test_takes_numbers_of_numpy() -> None:
    config = TrainConfig(lr=np.float32(0.5), num_steps=np.int64(3), seed=np.int64(2))
    assert (config.lr, config.num_steps, config.seed) == (0.5, 3, 2)
    assert {type(config.lr), type(config.num_steps), type(config.seed)} == {float, int}


def test_loads_no_torch() -> None:
    code = "import sys, tlcourse.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
