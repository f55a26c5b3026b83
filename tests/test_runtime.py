"""Seed, device, precision, profile."""

import random

import numpy as np
import pytest
import torch

from tlcourse import locations, runtime


def test_setup_says_what_it_found_in_one_line(capsys, monkeypatch):
    monkeypatch.delenv("TLCOURSE_PROFILE", raising=False)
    run = runtime.setup(seed=3)
    assert capsys.readouterr().out == f"{run}\n"
    assert run.profile == ("full" if run.device.type == "cuda" else "tiny")
    assert run.precision in runtime.PRECISIONS
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_seed_repeats_every_generator():
    def draw():
        runtime.set_seed(7)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, "0", True, None])
def test_bad_seed_is_refused(seed):
    with pytest.raises(ValueError, match="seed must be an integer"):
        runtime.set_seed(seed)


def test_profile_can_be_chosen(monkeypatch):
    assert runtime.setup(profile="full").profile == "full"
    monkeypatch.setenv("TLCOURSE_PROFILE", "huge")
    with pytest.raises(ValueError, match="'huge'"):
        runtime.setup()


@pytest.mark.parametrize(
    "capability, expected", [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")]
)
def test_precision_by_capability(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert runtime.default_precision(torch.device("cuda")) == expected
    assert runtime.default_precision(torch.device("cpu")) == "fp32"


def test_locations(tmp_path, monkeypatch):
    assert (locations.data_dir() / "checkpoints").is_dir()
    assert (locations.lessons_dir() / "00_start_here").is_dir()
    monkeypatch.setenv("TLCOURSE_CACHE", str(tmp_path / "new" / "cache"))
    assert locations.cache_dir() == tmp_path / "new" / "cache" and locations.cache_dir().is_dir()
    monkeypatch.setattr(locations, "_PACKAGE", tmp_path)
    with pytest.raises(FileNotFoundError, match="data folder is missing"):
        locations.data_dir()
