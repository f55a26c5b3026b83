from __future__ import annotations

import builtins
import dataclasses
import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import tlcourse as tl
from tlcourse import recording, tracking
from tlcourse.config import TrainConfig

BATCH = (torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))


def run(**settings):
    config = TrainConfig(**({"num_steps": 5, "eval_every_steps": 2, "progress": False} | settings))
    return tl.fit(nn.Linear(4, 3), [BATCH], [BATCH], config)


# TensorBoard


def test_tensorboard_files_hold_the_history(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    histories = [run(log_to="tensorboard", log_dir=str(tmp_path), seed=7) for _ in range(2)]
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 2, "every run has a folder of its own"
    assert all("seed7" in folder.name for folder in folders)
    events = accumulator.EventAccumulator(str(folders[0]))
    events.Reload()
    history = histories[0]
    for name, steps, values in (
        ("train/loss", history.step, history.train_loss),
        ("train/lr", history.step, history.lr),
        ("val/loss", history.eval_step, history.val_loss),
        ("val/accuracy", history.eval_step, history.val_accuracy),
    ):
        found = events.Scalars(name)
        assert [event.step for event in found] == steps
        assert [event.value for event in found] == pytest.approx(values)
    [tag] = events.Tags()["tensors"]
    assert b"lr: 0.001" in events.Tensors(tag)[0].tensor_proto.string_val[0]


# Weights & Biases, through a stub that records what it is told


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    calls: list[tuple] = []
    stub = ModuleType("wandb")
    fake_run = SimpleNamespace(
        log=lambda scalars, step: calls.append(("log", step, scalars)),
        finish=lambda: calls.append(("finish",)),
    )

    def init(**settings):
        calls.append(("init", settings))
        return fake_run

    stub.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return calls


@pytest.mark.parametrize("steps_per_look", [1, 20])
def test_wandb_gets_config_numbers_and_an_end(
    steps_per_look: int, wandb: list[tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(recording._STEPS_PER_LOOK, "cpu", steps_per_look)
    history = run(log_to="wandb", log_dir=str(tmp_path / "runs"))
    name, settings = wandb[0]
    assert name == "init" and settings["project"] == "tlcourse"
    assert settings["config"]["num_steps"] == 5 and settings["config"]["lr"] == 1e-3
    assert Path(settings["dir"]).is_dir()
    assert wandb[-1] == ("finish",)
    logs = [call[1:] for call in wandb[1:-1]]
    steps = [step for step, _ in logs]
    assert steps == sorted(steps), "wandb drops numbers of earlier steps"
    train = [(step, s["train/loss"], s["train/lr"]) for step, s in logs if "train/loss" in s]
    assert train == list(zip(history.step, history.train_loss, history.lr, strict=True))
    val = [(step, s["val/loss"], s["val/accuracy"]) for step, s in logs if "val/loss" in s]
    assert val == list(zip(history.eval_step, history.val_loss, history.val_accuracy, strict=True))


def test_a_run_that_fails_is_ended_too(wandb: list[tuple], tmp_path: Path) -> None:
    bad = (BATCH[0], BATCH[1] + 3)
    config = TrainConfig(num_steps=2, log_to="wandb", log_dir=str(tmp_path), progress=False)
    with pytest.raises(ValueError, match="outside the head's range"):
        tl.fit(nn.Linear(4, 3), [bad], None, config)
    assert wandb[-1] == ("finish",)


@pytest.mark.parametrize(
    ("log_to", "module", "package"),
    [
        ("tensorboard", "torch.utils.tensorboard", "tensorboard"),
        ("wandb", "wandb", "wandb"),
    ],
)
def test_a_missing_package_is_named_before_the_first_step(
    log_to: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real_import = builtins.__import__

    def without(name: str, *args, **kwargs):
        if name == module:
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        run(log_to=log_to, log_dir=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_imported_or_written_unless_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    run()
    assert "wandb" not in sys.modules and "torch.utils.tensorboard" not in sys.modules
    assert list(tmp_path.iterdir()) == []
    assert type(tracking.make_tracker(TrainConfig(num_steps=1))) is tracking.Tracker


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("wanted", "terminal", "variable", "shown"),
    [
        (True, True, "", True),
        (False, True, "", False),
        (True, False, "", False),
        (True, True, "1", False),
    ],
)
def test_bar_shows_in_a_terminal_and_leaves_nothing(
    wanted: bool, terminal: bool, variable: str, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TQDM_DISABLE", variable)
    run(progress=wanted)
    text = stderr.getvalue()
    assert ("0/5" in text) == shown
    assert text.rpartition("\r")[2].strip() == ""  # the last line is wiped
    assert "\n" not in text


def test_bar_goes_away_when_training_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stderr := Terminal())
    config = TrainConfig(num_steps=3)
    with pytest.raises(ValueError):
        tl.fit(nn.Linear(4, 3), [(BATCH[0], BATCH[1] + 9)], None, config)
    assert stderr.getvalue().rpartition("\r")[2].strip() == ""


@pytest.mark.slow
def test_a_notebook_keeps_no_trace_of_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    root = str(Path(tl.__file__).parents[1])
    code = (
        f"import sys; sys.path.insert(0, {root!r})\n"
        "import time\n"
        "from tlcourse.tracking import progress_bar\n"
        "print('before')\n"
        "with progress_bar(3) as outer:\n"
        "    for _ in range(3):\n"
        "        with progress_bar(7) as bar:\n"
        "            time.sleep(0.15); bar.update(5)\n"
        "            time.sleep(0.15); outer.update()\n"
        "print('after')"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    seen: list[str] = []

    class Watching(client.NotebookClient):
        def process_message(self, msg, cell, cell_index):
            if "display" in msg["msg_type"]:
                seen.append(msg["content"]["data"].get("text/plain", ""))
            return super().process_message(msg, cell, cell_index)

    Watching(notebook, timeout=120, kernel_name="python3").execute()
    assert any("2/3" in text for text in seen) and any("5/7" in text for text in seen)
    assert not any("\x1b" in text for text in seen)
    outputs = notebook.cells[0].outputs
    assert all(output.get("name") != "stderr" for output in outputs)
    assert "".join(output.get("text", "") for output in outputs) == "before\nafter\n"
    assert [output.data for output in outputs if "data" in output] == [{}] * 4


def test_config_is_logged_whole() -> None:
    config = TrainConfig(num_steps=1)
    assert dict(tracking._settings(config)) == dataclasses.asdict(config)
