"""When a run compiles its forward pass, and what then stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tlcourse as tl
from tlcourse import compiling
from tlcourse.compiling import Forward, num_layers, worth_compiling
from tlcourse.config import TrainConfig

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [
    (torch.randn(n, 4, generator=GENERATOR), torch.randint(3, (n,), generator=GENERATOR))
    for n in (8, 8, 3)
]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def settings(**changes) -> TrainConfig:
    return TrainConfig(**({"progress": False, "num_epochs": 3} | changes))


@pytest.fixture
def eager_backend(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """torch.compile that traces, counts its calls' shapes and generates no code."""
    shapes: list[tuple] = []

    def compile(model: nn.Module):
        compiled = torch.compile(model, backend="eager")

        def call(inputs: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(inputs.shape))
            return compiled(inputs)

        call.parameters, call.buffers = model.parameters, model.buffers
        return call

    monkeypatch.setattr(compiling, "torch", _Torch(compile))
    return shapes


class _Torch:
    """torch with another ``compile``."""

    def __init__(self, compile) -> None:
        self.compile = compile

    def __getattr__(self, name: str):
        return getattr(torch, name)


def test_a_compiled_run_equals_an_eager_one(eager_backend: list[tuple]) -> None:
    compiled, eager = net(), net()
    ours = tl.fit(compiled, BATCHES, BATCHES, settings(compile=True))
    assert ours.train_loss == pytest.approx(
        tl.fit(eager, BATCHES, BATCHES, settings(compile=False)).train_loss, rel=1e-6
    )
    for a, b in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert not any("orig_mod" in key for key in compiled.state_dict())
    assert eager_backend == [(8, 4)] * 6, "the short batch of each epoch runs eagerly"


def test_auto_never_compiles_on_a_cpu(eager_backend: list[tuple]) -> None:
    tl.fit(net(), BATCHES, None, settings(compile="auto", num_epochs=10))
    assert eager_backend == []


def test_a_failing_compiler_is_said_once_and_the_run_goes_on(monkeypatch, capsys) -> None:
    def broken(*args):
        raise RuntimeError("no C++ compiler found\nand a long story")

    def compile(model: nn.Module):
        broken.parameters, broken.buffers = model.parameters, model.buffers
        return broken

    monkeypatch.setattr(compiling, "torch", _Torch(compile))
    history = tl.fit(net(), BATCHES, None, settings(compile=True))
    assert history.train_loss == tl.fit(net(), BATCHES, None, settings(compile=False)).train_loss
    message = "Not compiled (RuntimeError: no C++ compiler found); the run goes on without.\n"
    assert capsys.readouterr().err == message


def test_worth_compiling_weighs_steps_against_layers() -> None:
    model = net()
    assert num_layers(model) == 2
    cost = compiling.SECONDS_TO_START + 2 * compiling.SECONDS_PER_LAYER
    enough = cost / compiling.SHARE_SAVED / 0.1
    assert worth_compiling(model, 0.1, int(1.1 * enough))
    assert not worth_compiling(model, 0.1, int(0.9 * enough))


def test_auto_on_a_gpu_times_its_first_steps_and_decides_once(monkeypatch) -> None:
    """The clock and the GPU are stand-ins."""
    clock = iter([10.0, 15.0])
    model, made = net(), []
    forward = Forward(model, "auto", num_steps=1000)
    assert not forward.undecided
    forward.undecided = True
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(compiling.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(compiling, "torch", _Torch(lambda model: made.append(model)))
    for step in range(1, 30):
        forward.after_step(step)
    assert made == [model] and not forward.undecided  # a second a step, 990 to come
