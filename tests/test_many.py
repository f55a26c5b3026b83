"""Many models at once: the same as one after another."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interrupting import Interrupting
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tlcourse as tl
from tlcourse.config import TrainConfig
from tlcourse.datasets import BatchLoader
from tlcourse.many import SomeDiverged, fit_many
from tlcourse.recording import History, TrainingDiverged, interrupts_raise

Batch = tuple[Tensor, Tensor]
SEEDS = (3, 4, 5)


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**({"progress": False, "precision": "fp32", "num_epochs": 3} | changes))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(64, 16), nn.LayerNorm(16), nn.ReLU())
        self.head = nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.backbone(inputs.flatten(1)))


def cnn(norm: Callable[[int], nn.Module]) -> nn.Module:
    # No bias: before BatchNorm its gradient is zero but for rounding, which AdamW makes a step of.
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), norm(4), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "mlp": Mlp,
    "cnn": lambda: cnn(lambda _: nn.Identity()),
    "cnn, GroupNorm": lambda: cnn(group_norm),
    "cnn, BatchNorm": lambda: cnn(nn.BatchNorm2d),
}


def make(maker: Callable[[], nn.Module] = Mlp, count: int = 3) -> list[nn.Module]:
    models = []
    for seed in range(count):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            models.append(maker())
    return models


def data(count: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 1, 8, 8, generator=generator)
    return inputs, (inputs.mean((1, 2, 3)) * 8 + 1.5).long().clamp(0, 2)


def loaders(count: int = 3, size: int = 8) -> list[BatchLoader]:
    return [BatchLoader(*data(28, seed), size, shuffle=True, seed=seed) for seed in range(count)]


def val_loader() -> BatchLoader:
    return BatchLoader(*data(20, seed=9), 16)


def assert_same_run(ours: History, theirs: History) -> None:
    for name in ("step", "eval_step", "best_step", "stop_reason"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("train_loss", "lr", "val_loss", "val_accuracy"):
        torch.testing.assert_close(
            torch.tensor(getattr(ours, name)), torch.tensor(getattr(theirs, name)),
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip
    assert ours.seconds > 0


def assert_same_models(ours: Sequence[nn.Module], theirs: Sequence[nn.Module]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), rtol=1e-5, atol=1e-5)
        assert not any(part.training for part in a.modules())


def check(
    models: list[nn.Module],
    config: TrainConfig,
    make_loaders: Callable[[], Any] = loaders,
    val: Any = None,
) -> list[History]:
    """Train copies one by one and the models together; both must agree."""
    twins, ours, theirs = copy.deepcopy(models), make_loaders(), make_loaders()
    shared = not isinstance(ours, list) or isinstance(ours[0], tuple)
    each = [theirs] * len(models) if shared else theirs
    expected = [
        tl.fit(model, loader, val, replace(config, seed=seed))
        for model, loader, seed in zip(twins, each, SEEDS, strict=True)
    ]
    histories = fit_many(models, ours, val, config, SEEDS)
    for history, other in zip(histories, expected, strict=True):
        assert_same_run(history, other)
    assert_same_models(models, twins)
    return histories


@pytest.fixture
def stacked(capsys: pytest.CaptureFixture) -> Iterator[None]:
    """The test's runs did not fall back."""
    yield
    assert "one after another" not in capsys.readouterr().out


# The same as separate fits.


@pytest.mark.usefixtures("stacked")
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_same_as_separate_fits(name: str, optimizer: str) -> None:
    """With clipping, weight decay, smoothing, warm-up and a short last batch."""
    config = settings(
        optimizer=optimizer, lr=1e-2, max_grad_norm=0.3, label_smoothing=0.1, weight_decay=0.1,
        warmup_steps=2, patience=5,
    )  # fmt: skip
    histories = check(make(MAKERS[name]), config, val=val_loader())
    assert len(histories[0].step) == 12 and histories[0].train_loss != histories[1].train_loss


@pytest.mark.usefixtures("stacked")
@pytest.mark.parametrize(
    "changes",
    [
        {"head_lr": 0.05, "layer_decay": 0.5},
        {"accumulation_steps": 3},
        {"max_grad_norm": None, "optimizer": "sgd", "momentum": 0.0},
        {"num_epochs": None, "num_steps": 6, "eval_every_steps": 4, "schedule": "constant"},
        {"monitor": "val_accuracy", "eval_every_steps": 1},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_same_with_each_setting(changes: dict[str, Any]) -> None:
    check(make(), settings(**({"lr": 1e-2} | changes)), val=val_loader())


@pytest.mark.usefixtures("stacked")
def test_same_without_validation() -> None:
    assert check(make(), settings())[0].best_step is None


@pytest.mark.usefixtures("stacked")
def test_one_loader_is_read_once_for_all() -> None:
    batches = list(loaders(1)[0])
    check(make(), settings(lr=1e-2), lambda: batches, val_loader())

    shuffled, passes = loaders(1)[0], loaders(1)[0]
    models, twins = make(), make()
    fit_many(models, shuffled, None, settings(num_epochs=2))
    seen = [batch for _ in range(2) for batch in passes]
    for twin in twins:
        tl.fit(twin, seen, None, settings(num_epochs=1))
    assert_same_models(models, twins)


@pytest.mark.usefixtures("stacked")
@pytest.mark.parametrize("same", [True, False])
def test_frozen_parts_stay(same: bool) -> None:
    """Whether equal in all models, then used without copies, or not."""
    models = make(lambda: cnn(nn.BatchNorm2d))
    for model in models:
        if same:
            model.load_state_dict(models[0].state_dict())
        tl.freeze(model[:4])
    before = copy.deepcopy(models[1].state_dict())
    check(models, settings(lr=0.05), val=val_loader())
    moved = [name for name, x in models[1].state_dict().items() if not torch.equal(x, before[name])]
    assert moved == ["7.weight", "7.bias"]


@pytest.mark.usefixtures("stacked")
def test_models_may_share_what_is_frozen() -> None:
    models = make()
    backbone = tl.freeze(models[0].backbone)
    for model in models:
        model.backbone = backbone
    fit_many(models, loaders(), None, settings())
    assert models[2].backbone is models[0].backbone
    with pytest.raises(ValueError, match=r"models 0 and 1 share 'backbone.0.weight': freeze it"):
        fit_many([tl.unfreeze(model) for model in models], loaders(), None, settings())


@pytest.mark.usefixtures("stacked")
def test_batches_may_differ_in_size_later() -> None:
    def uneven() -> list[BatchLoader]:
        sizes = (25, 28, 31)
        return [BatchLoader(*data(n, n), 8, shuffle=True, seed=n) for n in sizes]

    check(make(lambda: cnn(nn.BatchNorm2d)), settings(accumulation_steps=2), uneven, val_loader())


@pytest.mark.usefixtures("stacked")
def test_loaders_may_draw_from_torchs_generator() -> None:
    """Each run's draws follow from its own seed, and the generator outside goes on untouched."""

    def noisy(inputs: Tensor, generator: torch.Generator) -> Tensor:
        return inputs + torch.randn(inputs.shape)

    def random_loaders() -> list[DataLoader]:
        return [DataLoader(TensorDataset(*data(28)), 8, shuffle=True) for _ in SEEDS]

    def transformed() -> list[BatchLoader]:
        return [BatchLoader(*data(28), 8, transform=noisy) for _ in SEEDS]

    torch.manual_seed(1)
    outside = torch.get_rng_state()
    val = DataLoader(TensorDataset(*data(20, seed=9)), 16)  # draws too, at each pass
    config = settings(eval_every_steps=1)
    histories = check(make(), config, random_loaders, val)
    assert histories[0].train_loss != histories[1].train_loss
    check(make(), config, transformed, val)
    assert torch.equal(outside, torch.get_rng_state())


@pytest.mark.usefixtures("stacked")
def test_dicts_and_outputs_with_logits() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, input_ids: Tensor, mask: Tensor) -> Any:
            return _Output(self.head((self.embedding(input_ids) * mask[..., None]).mean(1)))

    ids = torch.randint(10, (9, 4), generator=torch.Generator().manual_seed(0))
    loader = [({"input_ids": ids, "mask": torch.ones(9, 4)}, ids[:, 0] % 3)]
    check(make(Words), settings(), lambda: loader, loader)
    check(make(Words), settings(), lambda: [list(loader) for _ in SEEDS], loader)


class _Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


# One model ends before the others.


def wrong_later(start: int) -> tuple[list[list[Batch]], list[Batch]]:
    """Loaders whose labels turn wrong at batch 2 + start, 3 + start, ..."""
    inputs, targets = data(8)
    good, bad = (inputs, targets), (inputs, (targets + 1) % 3)
    return [[good] * (start + 2 * i) + [bad] * (16 - start - 2 * i) for i in range(3)], [good]


@pytest.mark.usefixtures("stacked")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_each_model_stops_for_itself(optimizer: str) -> None:
    each, val = wrong_later(2)
    config = settings(
        num_epochs=1, eval_every_steps=1, patience=3, lr=0.02, schedule="constant",
        optimizer=optimizer,
    )  # fmt: skip
    histories = check(make(lambda: cnn(group_norm)), config, lambda: each, val)
    lengths = [len(history.step) for history in histories]
    assert len(set(lengths)) > 1 and histories[0].stopped_early
    assert histories[0].seconds < histories[2].seconds


@pytest.mark.usefixtures("stacked")
@pytest.mark.parametrize("with_val", [True, False])
def test_divergence_of_one_does_not_touch_the_others(with_val: bool) -> None:
    inputs, targets = data(8)
    fine, broken = (inputs, targets), (inputs * math.nan, targets)
    each = [[fine] * 8, [fine] * 5 + [broken] + [fine] * 2, [fine] * 8]
    val = [fine] if with_val else None
    config = settings(num_epochs=1, eval_every_steps=2, lr=1e-2)
    models, twins = make(), make()
    with pytest.raises(SomeDiverged) as caught:
        fit_many(models, each, val, config, SEEDS)
    expected = [tl.fit(twins[i], each[i], val, config) for i in (0, 2)]
    with pytest.raises(TrainingDiverged) as alone:
        tl.fit(twins[1], each[1], val, config)
    assert_same_models(models, twins)
    assert str(caught.value) == f"1 of 3 models diverged. Model 1 (seed 4): {alone.value}"
    assert_same_run(caught.value.histories[0], expected[0])
    assert_same_run(caught.value.histories[2], expected[1])
    assert caught.value.history is caught.value.histories[1]
    assert len(caught.value.history.step) == 6
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and len(again.histories) == 3


@pytest.mark.usefixtures("stacked")
def test_weights_that_blow_up_in_the_last_step() -> None:
    inputs, targets = data(8)
    each = [[(inputs, targets)], [(inputs * 1e30, targets)], [(inputs, targets)]]
    config = settings(num_epochs=1, optimizer="sgd", lr=1e9, max_grad_norm=None)
    models = make(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    for model in models:
        nn.init.zeros_(model[1].weight)
    with pytest.raises(SomeDiverged, match=r"1 of 3 .*Model 1 .*a weight became NaN or infinite"):
        fit_many(models, each, None, config)
    assert torch.equal(models[1][1].weight, torch.zeros(3, 64))
    assert not torch.equal(models[2][1].weight, torch.zeros(3, 64))


@pytest.mark.parametrize("with_val", [True, False])
def test_interruption_keeps_the_best_so_far(with_val: bool, capsys: pytest.CaptureFixture) -> None:
    batch, val = data(8), [data(8)] if with_val else None
    config = settings(num_epochs=None, num_steps=9, schedule="constant", lr=1e-2)
    models, twins = make(), make()
    histories = fit_many(models, Interrupting(batch, 5), val, config)
    assert [history.stop_reason for history in histories] == ["interrupted"] * 3
    assert capsys.readouterr().err == "Interrupted after step 4.\n"
    for twin in twins:
        tl.fit(twin, [batch], val, replace(config, num_steps=4))
    assert_same_models(models, twins)
    with interrupts_raise(), pytest.raises(KeyboardInterrupt):
        fit_many(models, Interrupting(batch, 5), val, config)


@pytest.mark.usefixtures("stacked")
def test_losses_of_low_precision_weights_are_not_rounded() -> None:
    models = [model.to(torch.bfloat16) for model in make()]
    halves = [(x.to(torch.bfloat16), y) for x, y in loaders(1)[0]]
    alone = tl.fit(copy.deepcopy(models[0]), halves, None, settings(seed=SEEDS[0]))
    together = fit_many(models, halves, None, settings(), SEEDS)[0]
    assert together.train_loss == pytest.approx(alone.train_loss, rel=1e-2)  # bfloat16: .4 %
    rounded = torch.tensor(together.train_loss).to(torch.bfloat16).tolist()
    assert together.train_loss != rounded


@pytest.mark.usefixtures("stacked")
def test_an_autocast_around_it_changes_nothing() -> None:
    outside, inside = make(), make()
    expected = fit_many(outside, loaders(), val_loader(), settings(), SEEDS)
    alone = tl.fit(copy.deepcopy(inside[0]), loaders()[0], val_loader(), settings(seed=SEEDS[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one = make()[0]
        history = tl.fit(one, loaders()[0], val_loader(), settings(seed=SEEDS[0]))
        found = fit_many(inside, loaders(), val_loader(), settings(), SEEDS)
    assert history.train_loss == alone.train_loss and history.val_loss == alone.val_loss
    assert [h.train_loss for h in found] == [h.train_loss for h in expected]
    assert [h.val_loss for h in found] == [h.val_loss for h in expected]


def test_models_own_their_weights_afterwards() -> None:
    models = make()
    addresses = [p.data_ptr() for model in models for p in model.parameters()]
    fit_many(models, loaders(), None, settings(num_epochs=1))
    assert addresses == [p.data_ptr() for model in models for p in model.parameters()]
    wrong = [(data(8)[0], torch.full((8,), 7))]
    good = [data(8)]
    with pytest.raises(ValueError, match=r"label 7 is outside .* 0\.\.2"):
        fit_many(models, [[*good, *wrong] for _ in models], None, settings(num_epochs=1))
    assert addresses == [p.data_ptr() for model in models for p in model.parameters()]
    assert not any(part.training for model in models for part in model.modules())


# What cannot be stacked.


class Counting(Mlp):
    calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(inputs)


class Branching(Mlp):
    def forward(self, inputs: Tensor) -> Tensor:
        logits = super().forward(inputs)
        return logits if logits.sum() > 0 else logits * 2


class Dropping(Mlp):
    def forward(self, inputs: Tensor) -> Tensor:
        return F.dropout(super().forward(inputs), 0.3, self.training)


class Replacing(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return super().forward(inputs)


def wide() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.Conv2d(32, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 3),
    )  # fmt: skip


def scaled() -> list[nn.Module]:
    models = make()
    for i, model in enumerate(models):
        model.scale = float(i)
    return models


def hooked() -> list[nn.Module]:
    models = make()
    for model in models:
        model.head.register_forward_hook(_double)
    return models


def _double(module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
    return logits * 2


def penalty(model: nn.Module) -> Tensor:
    return sum(p.square().sum() for p in model.parameters())


@pytest.mark.parametrize(
    ("models", "changes", "reason"),
    [
        (make(Dropping), {}, r"cannot be stacked \(it draws random numbers\)"),
        (make(Branching), {}, r"cannot be stacked \(vmap: It looks like .*control flow"),
        (make(Replacing), {}, "the forward pass replaces a buffer"),
        (make(Counting), {}, "their forward pass changes calls"),
        (make(wide), {}, "convolutions of 32 channels gain nothing on a CPU"),
        (scaled(), {}, "they differ in scale"),
        (hooked(), {}, "they have hooks"),
        ([*make(count=2), *make(MAKERS["cnn"], 1)], {}, "they differ in their parts"),
        (make(), {"penalty": penalty}, "config.penalty is set"),
        (make(), {"precision": "bf16"}, "their precision is torch.bfloat16"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_falls_back_with_the_reason(
    models: list[nn.Module], changes: dict, reason: str, capsys: pytest.CaptureFixture
) -> None:
    config = settings(num_epochs=2, **changes)
    check(copy.deepcopy(models), config, val=val_loader())
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("fit_many trains the models one after another: ")
    assert re.search(reason, said[0]), said


def test_falls_back_for_logs_checkpoints_and_loaders(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def of_sizes(*sizes: int) -> list[BatchLoader]:
        return [BatchLoader(*data(28), size) for size in sizes]

    def reason(models: list[nn.Module], loaders: Any, config: TrainConfig) -> str:
        fit_many(models, loaders, None, config)
        return capsys.readouterr().out.partition(": ")[2].strip()

    plain, folder = settings(num_epochs=1), str(tmp_path)
    tracked = replace(plain, log_to="tensorboard", log_dir=folder)
    assert reason(make(), loaders(), tracked) == "log_to is 'tensorboard'."
    assert reason(make(count=1), loaders(1), plain) == "there is only one."
    with pytest.raises(ValueError, match="checkpoint_dir must be None, got"):
        fit_many(make(), loaders(), None, replace(plain, checkpoint_dir=folder))
    assert reason(make(), of_sizes(8, 14, 14), plain) == "their loaders have [2, 4] batches."
    assert reason(make(), of_sizes(14, 15, 14), plain) == "their batches differ in shape."


def test_falls_back_where_chance_has_begun() -> None:
    """The trial takes each loader's first batch; the run after it still sees the same numbers."""

    def random_loaders() -> list[DataLoader]:
        return [DataLoader(TensorDataset(*data(28)), 8, shuffle=True) for _ in SEEDS]

    check(make(Dropping), settings(accumulation_steps=2), random_loaders, val_loader())


def test_fallback_goes_on_after_a_divergence_and_ends_at_an_interruption() -> None:
    inputs, targets = data(8)
    each = [[(inputs, targets)], [(inputs * math.nan, targets)], [(inputs, targets)]]
    models, twins = make(Dropping), make(Dropping)
    with pytest.raises(
        SomeDiverged, match=r"1 of 3 models diverged. Model 1 \(seed 0\): "
    ) as caught:
        fit_many(models, each, None, settings())
    assert [len(history.step) for history in caught.value.histories] == [3, 1, 3]
    tl.fit(twins[2], each[2], None, settings())
    assert_same_models(models[2:], twins[2:])

    stops = [Interrupting((inputs, targets), at) for at in (99, 3, 99)]
    histories = fit_many(make(Dropping), stops, None, settings())
    assert [history.stop_reason for history in histories] == [
        "finished", "interrupted", "interrupted",
    ]  # fmt: skip
    assert [len(history.step) for history in histories] == [3, 2, 0]


# What cannot work is refused.


def test_refuses_what_does_not_fit() -> None:
    models, each, config = make(), loaders(), settings()
    cases: list[tuple[Any, Any, Any, str]] = [
        ([], each, None, "at least one model, got none"),
        (models, each[:2], None, "expected 3 loaders, one for each model, got 2"),
        (models, each, [1, 2], "expected 3 seeds, one for each model, got 2"),
        ([*models[:2], models[0]], each, None, "model 2 is given twice, expected 3 different"),
        (models, [each[0]] * 3, None, "loader 1 is given twice"),
        (models, [], None, "training loader is empty"),
        (models, each, [1, 2, -3], "seed must be >= 0, got -3"),
    ]
    for some, given, seeds, message in cases:
        with pytest.raises(ValueError, match=message):
            fit_many(some, given, None, config, seeds)
    with pytest.raises(ValueError, match="patience=2 needs a val_loader"):
        fit_many(models, each, None, settings(patience=2))
    with pytest.raises(TypeError, match="must have a length"):
        fit_many(models, iter([data(8)]), None, config)
    with pytest.raises(ValueError, match="no trainable parameter"):
        fit_many([tl.freeze(model) for model in models], each, None, config)
