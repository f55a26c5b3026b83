"""A run that is stopped anywhere goes on, and ends as if it had never been stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tlcourse as tl
from tlcourse import checkpoints, locations, recording, resuming, saving
from tlcourse.config import TrainConfig
from tlcourse.datasets import BatchLoader
from tlcourse.recording import TrainingDiverged

ROOT = Path(__file__).resolve().parents[1]


class Net(nn.Module):
    """With what has a state: dropout, BatchNorm, a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = tl.freeze(nn.Linear(4, 8))
        self.middle = nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.frozen(inputs)))


INPUTS = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(3, (50,), generator=torch.Generator().manual_seed(1))


def noisy(inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draws from every kind of generator."""
    noise = torch.randn(inputs.shape, generator=generator) + torch.randn(inputs.shape)
    return inputs + 0.1 * (noise + np.random.randn() + random.random())


def ours() -> BatchLoader:
    return BatchLoader(INPUTS, TARGETS, 8, shuffle=True, transform=noisy, seed=3)


def torchs() -> DataLoader:
    """Its order comes from torch's own generator."""
    return DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=8, shuffle=True)


def torchs_own_generator() -> DataLoader:
    generator = torch.Generator().manual_seed(5)
    data = TensorDataset(INPUTS, TARGETS)
    return DataLoader(data, batch_size=8, shuffle=True, generator=generator)


def settings(folder: Path | None, **changes) -> TrainConfig:
    plain = {"num_steps": 20, "eval_every_steps": 3, "progress": False, "checkpoint_minutes": 0}
    directory = None if folder is None else str(folder)
    return TrainConfig(**(plain | {"checkpoint_dir": directory} | changes))


class Stop(Exception):
    pass


class StopsAfter:
    """A loader that fails after some batches, as a process that dies would."""

    def __init__(self, loader, batches: int) -> None:
        self.loader, self.left = loader, batches
        self.__dict__.update({k: v for k, v in vars(loader).items() if "generator" in k})
        self.sampler = getattr(loader, "sampler", None)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            if self.left == 0:
                raise Stop
            self.left -= 1
            yield batch


def fit_fresh(loader, config: TrainConfig, **options):
    random.seed(9)
    np.random.seed(9)
    model = Net()
    val = [(INPUTS, TARGETS)]
    return model, tl.fit(model, loader, val, config, **options)


@pytest.mark.parametrize("make", [ours, torchs, torchs_own_generator])
@pytest.mark.parametrize("stopped_after", [1, 6, 7, 12, 17])
@pytest.mark.parametrize("options", [{}, {"optimizer": "sgd"}, {"accumulation_steps": 2}])
def test_goes_on_with_the_same_bits(make, stopped_after: int, options, tmp_path: Path) -> None:
    whole, history = fit_fresh(make(), settings(None, **options))
    config = settings(tmp_path, **options)
    with pytest.raises(Stop):
        fit_fresh(StopsAfter(make(), stopped_after), config)
    resumed, after = fit_fresh(make(), config, resume="auto")
    assert after.train_loss == history.train_loss and after.lr == history.lr
    assert after.val_loss == history.val_loss and after.best_step == history.best_step
    for name, x in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], x), name


def turned(layer: nn.Linear) -> None:
    """The same weights, in memory column by column."""
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weights_may_lie_in_memory_in_any_order(optimizer: str, tmp_path: Path) -> None:
    def fit_turned(loader, folder: Path | None, **options) -> nn.Module:
        model = Net()
        turned(model.head)
        config = settings(folder, optimizer=optimizer, max_grad_norm=None)
        tl.fit(model, loader, None, config, **options)
        return model

    loader = BatchLoader(INPUTS, TARGETS, 8)
    whole = fit_turned(loader, None)
    with pytest.raises(Stop):
        fit_turned(StopsAfter(loader, 7), tmp_path)
    resumed = fit_turned(loader, tmp_path, resume="auto")
    assert not resumed.head.weight.is_contiguous()
    assert torch.equal(resumed.head.weight, whole.head.weight)


class Around:
    """A loader of somebody's own around another."""

    def __init__(self, loader) -> None:
        self.inner = loader

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self):
        return iter(self.inner)


def test_chance_in_validation_and_in_a_wrapped_loader_goes_on_too(tmp_path: Path) -> None:
    def run(loader, folder: Path | None, **options):
        random.seed(9)
        np.random.seed(9)
        return tl.fit(Net(), loader, Around(ours()), settings(folder), **options)

    whole = run(Around(ours()), None)
    with pytest.raises(Stop):
        run(StopsAfter(Around(ours()), 10), tmp_path)
    resumed = run(Around(ours()), tmp_path, resume="auto")
    assert resumed.train_loss == whole.train_loss and resumed.val_loss == whole.val_loss


def test_a_finished_run_gives_its_result_at_once(tmp_path: Path, capsys) -> None:
    model, history = fit_fresh(ours(), settings(tmp_path))
    files = sorted(tmp_path.iterdir())

    class Untouched(BatchLoader):
        def __iter__(self):
            raise AssertionError("a batch was asked for")

    loader = Untouched(INPUTS, TARGETS, 8)
    again, same = fit_fresh(loader, settings(tmp_path), resume="auto")
    assert same.train_loss == history.train_loss and same.best_step == history.best_step
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert "Going on after step 20 of 20" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == files


def test_a_run_that_stopped_early_stays_stopped(tmp_path: Path) -> None:
    config = settings(tmp_path, patience=1, lr=0.5, num_steps=60)
    _, history = fit_fresh(ours(), config)
    assert history.stopped_early
    _, again = fit_fresh(ours(), config, resume="auto")
    assert again.stopped_early and again.step == history.step


def test_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    _, history = fit_fresh(ours(), settings(tmp_path, keep_checkpoints=3))
    names = {path.name for path in tmp_path.iterdir()}
    steps = {f"step-{step:08d}.{end}" for step in (18, 19, 20) for end in ("json", "safetensors")}
    assert steps <= names
    bests = names - steps
    assert f"best-{history.best_step:08d}.safetensors" in bests and len(bests) <= 2


def test_time_decides_when_to_save(tmp_path: Path, monkeypatch) -> None:
    clock = iter(range(0, 10_000, 20))  # seconds; looked at after each step and each save
    monkeypatch.setattr(resuming.time, "monotonic", lambda: next(clock))
    saved = []
    write = checkpoints.write_checkpoint
    monkeypatch.setattr(
        checkpoints,
        "write_checkpoint",
        lambda f, step, *a, **k: (saved.append(step), write(f, step, *a, **k)),
    )
    fit_fresh(ours(), settings(tmp_path, checkpoint_minutes=1))
    assert saved == [3, 6, 9, 12, 15, 18, 20]


# Damage


def damage_sha(folder: Path) -> None:
    path = max(folder.glob("step-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def damage_length(folder: Path) -> None:
    path = max(folder.glob("step-*.safetensors"))
    path.write_bytes(path.read_bytes()[:100])


def damage_json(folder: Path) -> None:
    max(folder.glob("step-*.json")).write_text('{"step": 1')


def damage_by_removal(folder: Path) -> None:
    max(folder.glob("step-*.safetensors")).unlink()


@pytest.mark.parametrize("damage", [damage_sha, damage_length, damage_json, damage_by_removal])
def test_a_damaged_newest_checkpoint_is_skipped(damage, tmp_path: Path) -> None:
    whole, _ = fit_fresh(ours(), settings(None))
    with pytest.raises(Stop):
        fit_fresh(StopsAfter(ours(), 9), settings(tmp_path))
    damage(tmp_path)
    with pytest.warns(UserWarning, match="checkpoint step-00000009 in .* is damaged"):
        resumed, history = fit_fresh(ours(), settings(tmp_path), resume="auto")
    assert len(history.step) == 20
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_goes_on_from_before_its_damaged_checkpoints(tmp_path: Path) -> None:
    """Stopped again and again: what is saved after the damage is newer than the damaged ones."""
    whole, _ = fit_fresh(ours(), settings(None))
    with pytest.raises(Stop):
        fit_fresh(StopsAfter(ours(), 12), settings(tmp_path))
    for path in tmp_path.glob("best-*"):  # of both checkpoints
        path.write_bytes(path.read_bytes()[:50])
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(Stop):
        fit_fresh(StopsAfter(ours(), 5), settings(tmp_path), resume="auto")
    assert sorted(path.stem for path in tmp_path.glob("step-*.json"))[-1] == "step-00000005"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed, _ = fit_fresh(ours(), settings(tmp_path), resume="auto")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_damaged_file_of_best_weights_is_not_taken_for_good(tmp_path: Path) -> None:
    whole, history = fit_fresh(ours(), settings(None))
    with pytest.raises(Stop):
        fit_fresh(StopsAfter(ours(), 4), settings(tmp_path, keep_checkpoints=9))
    [best] = tmp_path.glob("best-*")  # of steps 3 and 4
    data = bytearray(best.read_bytes())
    data[-3] ^= 1
    best.write_bytes(data)
    with pytest.warns(UserWarning, match="is damaged"):  # goes on after step 2
        _, again = fit_fresh(ours(), settings(tmp_path, keep_checkpoints=9), resume="auto")
    assert again.best_step == history.best_step
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed, _ = fit_fresh(ours(), settings(tmp_path, keep_checkpoints=9), resume="auto")
    for name, x in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], x), name


def test_a_full_disk_stops_the_save_and_not_the_training(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    real = saving.save_file

    def full(tensors, path):
        if "00000007" in str(path) or "00000008" in str(path):
            Path(path).write_bytes(b"some")
            raise saving.SafetensorError("No space left on device (os error 28)")
        real(tensors, path)

    monkeypatch.setattr(saving, "save_file", full)
    _, history = fit_fresh(ours(), settings(tmp_path))
    assert len(history.step) == 20
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"No checkpoint of step {n} (No space left on device (os error 28)); the run goes on."
        for n in (7, 8)
    ]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on the size of files")
def test_a_file_that_cannot_be_written_whole_leaves_nothing(tmp_path: Path) -> None:
    """The system itself refuses: files of this process may have 50 kB."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError):
            saving.save_state({"x": torch.zeros(100_000)}, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


# What is refused


def test_another_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        fit_fresh(StopsAfter(ours(), 4), settings(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="holds the checkpoints of a run: pass resume='auto'"):
        fit_fresh(ours(), settings(tmp_path))
    with pytest.raises(ValueError, match=r"config\.lr was 0\.001 and is 0\.5"):
        fit_fresh(ours(), settings(tmp_path, lr=0.5), resume="auto")
    model = Net()
    with torch.no_grad():
        model.frozen.weight += 1
    with pytest.raises(ValueError, match="frozen weights was"):
        tl.fit(model, ours(), [(INPUTS, TARGETS)], settings(tmp_path), resume="auto")
    with pytest.raises(ValueError, match="'auto' needs config"):
        fit_fresh(ours(), settings(None), resume="auto")
    with pytest.raises(ValueError, match="resume must be 'never' or 'auto', got 'yes'"):
        fit_fresh(ours(), settings(None), resume="yes")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_does_not_change_the_numbers_may_change(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        fit_fresh(StopsAfter(ours(), 4), settings(tmp_path))
    _, history = fit_fresh(ours(), settings(tmp_path, checkpoint_minutes=5), resume="auto")
    assert len(history.step) == 20


def test_auto_starts_where_there_is_nothing(tmp_path: Path) -> None:
    _, history = fit_fresh(ours(), settings(tmp_path / "new" / "folder"), resume="auto")
    assert len(history.step) == 20 and (tmp_path / "new" / "folder").is_dir()


def test_chance_is_as_before_the_run_without_checkpoints() -> None:
    """The generators of Python and NumPy are looked at only where checkpoints are wanted."""
    state = random.getstate()
    tl.fit(Net(), [(INPUTS, TARGETS)], None, settings(None, eval_every_steps=None))
    assert random.getstate() == state


def test_the_folder_of_a_run_outlives_the_machine_where_it_can(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("TLCOURSE_RUNS", raising=False)
    monkeypatch.setattr(locations, "_MOUNTED_DRIVE", tmp_path / "no drive")
    assert tl.run_dir("04") == os.path.join("runs", "04")
    monkeypatch.setattr(locations, "_MOUNTED_DRIVE", tmp_path)
    assert tl.run_dir("04") == str(tmp_path / "tlcourse" / "04")
    monkeypatch.setenv("TLCOURSE_RUNS", str(tmp_path / "mine"))
    assert tl.run_dir("04") == str(tmp_path / "mine" / "04")
    for bad in ("", "..", "a/b"):
        with pytest.raises(ValueError, match="name of one folder"):
            tl.run_dir(bad)


# NaN, Ctrl-C


def test_divergence_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    batches = [(INPUTS, TARGETS)] * 4 + [(INPUTS * float("nan"), TARGETS)] * 2
    with pytest.raises(TrainingDiverged, match="last checkpoint: step-00000004 in ") as error:
        tl.fit(Net(), batches, None, settings(tmp_path, num_steps=6))
    assert "at step 5 of 6, lr " in str(error.value)
    assert json.loads((tmp_path / "step-00000004.json").read_text())["step"] == 4


def test_an_exploding_loss_is_a_divergence() -> None:
    batches = [(INPUTS, TARGETS)] * 4 + [(INPUTS * 1e9, TARGETS)]
    with pytest.raises(TrainingDiverged, match=r"training loss exploded to .*e\+0\d at step 5"):
        tl.fit(nn.Linear(4, 3), batches, None, settings(None, num_steps=5))


@pytest.fixture
def sigint(request: pytest.FixtureRequest):
    """Ctrl-C as in a foreground program; in a background one it is ignored from the start."""
    before = signal.signal(signal.SIGINT, request.param)
    yield request.param
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("sigint", [signal.SIG_IGN], indirect=True)
def test_an_ignored_ctrl_c_stays_ignored(sigint, tmp_path: Path) -> None:
    class PressesCtrlC(StopsAfter):
        def __iter__(self):
            for batch in self.loader:
                os.kill(os.getpid(), signal.SIGINT)
                yield batch

    _, history = fit_fresh(PressesCtrlC(ours(), 0), settings(tmp_path, num_steps=3))
    assert history.stop_reason == "finished"
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("sigint", [signal.default_int_handler], indirect=True)
def test_ctrl_c_waits_for_the_step_and_saves(sigint, tmp_path: Path) -> None:
    class PressesCtrlC(StopsAfter):
        def __iter__(self):
            for batch in self.loader:
                self.left -= 1
                if self.left == 0:
                    os.kill(os.getpid(), signal.SIGINT)
                yield batch

    config = settings(tmp_path, checkpoint_minutes=60)
    _, history = fit_fresh(PressesCtrlC(ours(), 5), config)
    assert history.stop_reason == "interrupted" and len(history.step) == 5
    assert signal.getsignal(signal.SIGINT) is sigint
    whole, _ = fit_fresh(ours(), settings(None))
    resumed, after = fit_fresh(ours(), config, resume="auto")
    assert after.stop_reason == "finished"
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sigint", [signal.default_int_handler], indirect=True)
def test_ctrl_c_in_the_last_evaluation_reaches_the_caller(sigint, tmp_path: Path) -> None:
    class PressesCtrlC(Around):
        def __iter__(self):
            os.kill(os.getpid(), signal.SIGINT)
            return iter(self.inner)

    config = settings(tmp_path, num_steps=3, checkpoint_minutes=60)
    with pytest.raises(KeyboardInterrupt), recording.interrupts_raise():
        tl.fit(Net(), ours(), PressesCtrlC([(INPUTS, TARGETS)]), config)
    assert (tmp_path / "step-00000003.json").is_file()


# SIGKILL (20 kills: benchmarks/kill_and_resume.py)


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "kill_and_resume.py"
    command = [sys.executable, str(script), "--kills", "3", "--steps", "60", "--out"]
    done = subprocess.run(
        [*command, str(tmp_path / "kills.json")], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "kills.json").read_text())
    assert len(found["kills"]) == 3 and found["same_bits"] is True
    assert any(kill["during_a_save"] for kill in found["kills"])


def test_no_warning_for_a_whole_folder(tmp_path: Path) -> None:
    fit_fresh(ours(), settings(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start = time.perf_counter()
        assert checkpoints.read_newest(tmp_path).facts["step"] == 20
    assert time.perf_counter() - start < 5
