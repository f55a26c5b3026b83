"""Two processes of torchrun give the run of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tlcourse as tl
from tlcourse.processes import Processes
from tlcourse.sharding import assign, sharded, whole

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import dataclasses, json, os, sys
import torch
from torch import nn
import tlcourse as tl
from tlcourse.checkpoints import fingerprint
from tlcourse.datasets import BatchLoader

out, options = sys.argv[1], json.loads(sys.argv[2])
stop_after = options.pop("stop_after", None)
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
inputs = torch.randn(51, 6, generator=generator)
targets = (inputs @ torch.randn(6, 3, generator=generator)).argmax(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
batch_norm = options.pop("batch_norm", False)  # which cannot train on one row
if batch_norm:
    model.insert(1, nn.BatchNorm1d(8))
if options.pop("freeze", False):
    tl.freeze(model[0])
if options.pop("unused", False):
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
# The last batch of 51 examples in batches of 10 has one: nothing is left for the second process.
loader = BatchLoader(inputs, targets, 10, shuffle=True, seed=1, drop_last=batch_norm)
val = BatchLoader(inputs[:25] * 1.5, targets[:25], 8)  # the last batch has one, too
if stop_after is not None:
    class Stops(BatchLoader):
        def __iter__(self):
            for batch in super().__iter__():
                Stops.left -= 1
                if Stops.left < 0:
                    os._exit(0)  # gone, without a word to the others
                yield batch
    Stops.left = stop_after
    loader.__class__ = Stops
config = tl.TrainConfig(**({"num_steps": 40, "lr": 0.02, "progress": False} | options))
resume = "auto" if config.checkpoint_dir else "never"
history = tl.fit(model, loader, val, config, resume=resume)
rank = os.environ.get("RANK", "0")
found = dataclasses.asdict(history) | {"bits": fingerprint(model.state_dict())}
found["weights"] = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
with open(f"{out}.{rank}.json", "w") as file:
    json.dump(found, file)
"""


def run(folder: Path, name: str, processes: int, **options) -> list[dict]:
    """What each process found."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc-per-node={processes}"]
    command = [*launcher, str(script), str(folder / name), json.dumps(options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = [folder / f"{name}.{rank}.json" for rank in range(processes)]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def assert_same_run(one: dict, other: dict) -> None:
    for key in ("train_loss", "val_loss", "val_accuracy", "lr", "weights"):
        assert other[key] == pytest.approx(one[key], abs=1e-5), key
    for key in ("step", "eval_step", "best_step", "stop_reason"):
        assert other[key] == one[key], key


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"accumulation_steps": 2, "eval_every_steps": 7},
    {"patience": 2, "lr": 0.3, "optimizer": "sgd", "freeze": True, "unused": True},
    {"fsdp": True, "eval_every_steps": 7, "max_grad_norm": 0.2, "optimizer": "sgd"},
    {"fsdp": True, "patience": 2, "lr": 0.3, "freeze": True, "accumulation_steps": 2},
], ids=["accumulation", "early stopping", "divided", "divided, early stopping"])  # fmt: skip
def test_two_processes_give_the_run_of_one(options: dict, tmp_path: Path) -> None:
    [alone] = run(tmp_path, "alone", 1, **options)
    first, second = run(tmp_path, "both", 2, **options)
    assert_same_run(alone, first)
    assert first["bits"] == second["bits"] and first["train_loss"] == second["train_loss"]
    if "patience" in options:
        assert alone["stop_reason"] == "patience"


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_keep_one_set_of_checkpoints(fsdp: bool, tmp_path: Path) -> None:
    """With BatchNorm, whose statistics are those of the first process."""
    options = {"batch_norm": True, "eval_every_steps": 9, "fsdp": fsdp}
    whole, _ = run(tmp_path, "whole", 2, **options)
    kept = options | {"checkpoint_dir": str(tmp_path / "kept"), "checkpoint_minutes": 0}
    assert run(tmp_path, "stopped", 2, **kept, stop_after=13) == []
    assert max((tmp_path / "kept").glob("step-*.json")).stem == "step-00000013"
    first, second = run(tmp_path, "resumed", 2, **kept)
    assert first["bits"] == second["bits"] == whole["bits"]
    assert first["train_loss"] == whole["train_loss"]


def test_rows_are_divided_among_the_processes() -> None:
    inputs, targets = {"a": torch.arange(7)}, torch.arange(7)
    parts = [Processes(rank, 3).rows(inputs, targets) for rank in range(3)]
    assert torch.cat([targets for _, targets, _ in parts]).tolist() == list(range(7))
    assert [count for *_, count in parts] == [3, 2, 2]
    assert all(torch.equal(x["a"], y) for x, y, _ in parts)
    inputs, targets, count = Processes(1, 2).rows(torch.ones(1, 2), torch.zeros(1))
    assert (len(inputs), len(targets), count) == (1, 1, 0)
    assert list(Processes(1, 2).part_of([(torch.ones(1, 2), torch.zeros(1))])) == []


def test_batches_that_have_no_row_for_each_target_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 processes need batches with a row for each target"):
        Processes(0, 2).rows(torch.ones(3, 2), torch.zeros(5))


def test_alone_nothing_is_wrapped() -> None:
    model, alone = nn.Linear(2, 2), Processes()
    assert alone.wrap(model) is model and alone.first and alone.any(True) and not alone.any(False)
    loader = [(torch.ones(1, 2), torch.zeros(1))]
    assert alone.part_of(loader) is loader


def test_alone_nothing_is_divided() -> None:
    model = nn.Linear(2, 2)
    with sharded(model, Processes(), True) as trained:
        assert trained is model
    with sharded(model, Processes(0, 2), False) as trained:
        assert trained is model
    x, y = torch.zeros(2), torch.ones(2)
    assert whole(x) is x
    assign(x, y)
    assert torch.equal(x, y)


def test_the_device_of_a_process_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert tl.runtime.default_device() == torch.device("cuda", 1)
    monkeypatch.delenv("LOCAL_RANK")
    assert tl.runtime.default_device() == torch.device("cuda")
