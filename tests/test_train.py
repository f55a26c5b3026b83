from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from interrupting import Interrupting
from torch import nn

import tlcourse as tl
from tlcourse import recording
from tlcourse.config import TrainConfig
from tlcourse.recording import TrainingDiverged, lr_factor
from tlcourse.resuming import StepBatches

Batch = tuple[torch.Tensor, torch.Tensor]


def batches(*sizes: int, classes: int = 3, seed: int = 0, dtype=torch.float32) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 4, generator=generator, dtype=dtype),
            torch.randint(classes, (size,), generator=generator),
        )
        for size in sizes
    ]


class Net(nn.Module):
    """Has what makes loops differ: dropout, BatchNorm, a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.backbone = nn.Sequential(
                nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3)
            )
            self.head = nn.Linear(8, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(inputs))


def linear(dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3, dtype=dtype)


def settings(**changes) -> TrainConfig:
    return TrainConfig(**({"progress": False, "precision": "fp32"} | changes))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(a: nn.Module | dict, b: nn.Module | dict) -> None:
    a, b = (x if isinstance(x, dict) else x.state_dict() for x in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# The loop against one written out by hand.


def by_hand(model: nn.Module, loader: list[Batch], config: TrainConfig, num_epochs: int) -> list:
    """The plainest loop that does what the config says; returns the losses."""
    no_decay = [p for n, p in model.named_parameters() if p.ndim == 1]
    decay = [p for n, p in model.named_parameters() if p.ndim > 1]
    groups = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
    if config.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            groups, lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
    else:
        optimizer = torch.optim.SGD(
            groups, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum
        )
    losses, step, num_steps = [], 0, num_epochs * len(loader)
    torch.manual_seed(config.seed)
    model.train()
    for _ in range(num_epochs):
        for inputs, targets in loader:
            if step < config.warmup_steps:
                factor = (step + 1) / config.warmup_steps
            else:
                done = (step - config.warmup_steps) / (num_steps - config.warmup_steps)
                factor = 0.5 * (1 + math.cos(math.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = config.lr * factor
            loss = F.cross_entropy(model(inputs), targets, label_smoothing=config.label_smoothing)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            step += 1
    return losses


@pytest.mark.parametrize("length", [{"num_epochs": 4}, {"num_steps": 12}])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_gives_the_bits_of_a_loop_written_by_hand(length: dict, optimizer: str) -> None:
    loader, ours, theirs = batches(8, 8, 5), Net(), Net()
    config = settings(
        **length, optimizer=optimizer, lr=0.05, warmup_steps=3, label_smoothing=0.1,
        max_grad_norm=0.5, weight_decay=0.1, seed=3,
    )  # fmt: skip
    history = tl.fit(ours, loader, None, config)
    assert history.train_loss == by_hand(theirs, loader, config, num_epochs=4)
    assert_same_weights(ours, theirs)
    assert history.step == list(range(1, 13)) and history.best_step is None


def test_steps_may_end_within_an_epoch() -> None:
    ours, theirs = Net(), Net()
    loader = batches(8, 8, 8)
    config = settings(num_steps=4, schedule="constant")
    assert len(tl.fit(ours, loader, None, config).step) == 4
    config = settings(num_steps=4, schedule="constant")
    tl.fit(theirs, [*loader, loader[0]], None, config)
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("sizes", [(8, 8), (8, 3), (5, 1, 2)])
def test_accumulation_is_one_large_batch(sizes: tuple[int, ...]) -> None:
    """In double precision; short micro-batches count by example."""
    loader = batches(*sizes, dtype=torch.float64)
    whole = [tuple(torch.cat(parts) for parts in zip(*loader, strict=True))]
    accumulated, at_once = linear(torch.float64), linear(torch.float64)
    config = settings(num_steps=5, optimizer="sgd", lr=0.5, accumulation_steps=len(sizes))
    first = tl.fit(accumulated, loader, None, config)
    second = tl.fit(at_once, whole, None, settings(num_steps=5, optimizer="sgd", lr=0.5))
    torch.testing.assert_close(accumulated.weight, at_once.weight, rtol=0, atol=1e-12)
    # The recorded loss is kept in single precision.
    torch.testing.assert_close(first.train_loss, second.train_loss, rtol=1e-6, atol=0)


def test_last_step_of_an_epoch_takes_what_is_left() -> None:
    loader = batches(4, 4, 4, 4, 2)
    groups = list(StepBatches(loader, num_steps=5, accumulation_steps=2))
    sizes = [[len(targets) for _, targets in group] for group in groups]
    assert sizes == [[4, 4], [4, 4], [2], [4, 4], [4, 4]]
    history = tl.fit(linear(), loader, loader, settings(num_epochs=2, accumulation_steps=2))
    assert len(history.step) == 6
    assert history.eval_step == [3, 6]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])  # fp16: not the scaled gradient
def test_clipping_bounds_the_whole_gradient(precision: str) -> None:
    model = linear()
    before = weights(model)
    inputs, targets = batches(8)[0]
    config = settings(
        num_steps=1, optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, max_grad_norm=0.01,
        precision=precision,
    )  # fmt: skip
    tl.fit(model, [(inputs, targets)], None, config)
    moved = torch.cat([(before[n] - p.detach()).flatten() for n, p in model.named_parameters()])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_head_has_its_own_learning_rate() -> None:
    model = Net()
    before = weights(model)
    config = settings(
        num_steps=1, optimizer="sgd", momentum=0.0, lr=1e-30, head_lr=0.5, weight_decay=0.0
    )
    history = tl.fit(model, batches(8), None, config)
    moved = {n for n, p in model.named_parameters() if (p.detach() - before[n]).abs().max() > 1e-20}
    assert moved == {"head.weight", "head.bias"}
    assert history.lr == [1e-30]


def test_learning_rates_are_warm_up_then_cosine() -> None:
    config = settings(num_steps=10, lr=0.2, warmup_steps=4)
    lrs = tl.fit(linear(), batches(4), None, config).lr
    cosine = [0.1 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert lrs == pytest.approx([0.05, 0.1, 0.15, 0.2, *cosine])
    constant = settings(num_steps=6, lr=0.2, warmup_steps=2, schedule="constant")
    lrs = tl.fit(linear(), batches(4), None, constant).lr
    assert lrs == pytest.approx([0.1, 0.2, 0.2, 0.2, 0.2, 0.2])
    assert lr_factor(10, 10, 4, "cosine") == pytest.approx(0.0)


def test_label_smoothing_is_for_training_only() -> None:
    model = linear()
    (inputs, targets) = batches(8)[0]
    logp = model(inputs).log_softmax(dim=1)
    plain = -logp[torch.arange(8), targets].mean()
    smooth = 0.7 * plain + 0.3 * -logp.mean()
    config = settings(num_steps=1, lr=1e-30, weight_decay=0.0, label_smoothing=0.3)
    history = tl.fit(model, [(inputs, targets)], [(inputs, targets)], config)
    assert history.train_loss[0] == pytest.approx(smooth.item(), rel=1e-5)
    assert history.val_loss[0] == pytest.approx(plain.item(), rel=1e-5)


# Randomness and modes.


def test_same_seed_same_bits_other_seed_other_bits() -> None:
    models = [Net() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.rand(seed)  # whatever ran before does not matter
        tl.fit(model, batches(8, 8), batches(8, seed=1), settings(num_epochs=3, seed=seed))
    assert_same_weights(models[0], models[1])
    assert not torch.equal(models[0].head.weight, models[2].head.weight)


def test_global_generator_goes_on_as_if_unused() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tl.fit(Net(), batches(8), None, settings(num_steps=3, seed=1))
    assert torch.equal(torch.rand(3), expected)


def test_model_comes_back_in_evaluation_mode() -> None:
    model = Net()
    tl.fit(model, batches(8), batches(8), settings(num_steps=2))
    assert not any(part.training for part in model.modules())


def test_trains_in_training_mode_and_validates_in_evaluation_mode() -> None:
    modes = []
    model = Net().eval()
    model.register_forward_hook(lambda module, *_: modes.append(module.training))
    tl.fit(model, batches(8), batches(8), settings(num_steps=4, eval_every_steps=2))
    assert modes == [True, True, False, True, True, False]


def test_frozen_backbone_does_not_move_in_any_way() -> None:
    model = Net()
    tl.freeze(model.backbone)
    before = weights(model)
    tl.fit(model, batches(8, 8), batches(8), settings(num_epochs=3, lr=0.1))
    moved = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert moved == {"head.weight", "head.bias"}


# Validation, early stopping, best weights.


def wrong_later() -> tuple[list[Batch], list[Batch]]:
    """Training on these labels makes the validation loss rise from the first step on."""
    inputs = torch.ones(6, 4)
    train_targets = torch.zeros(6, dtype=torch.int64)
    return [(inputs, train_targets)], [(inputs, train_targets + 1)]


@pytest.mark.parametrize("patience", [1, 3])
def test_early_stopping_restores_the_best_weights(patience: int) -> None:
    train_loader, val_loader = wrong_later()
    stopped, short = linear(), linear()
    config = settings(num_steps=50, schedule="constant", lr=0.1)
    early = settings(num_steps=50, schedule="constant", lr=0.1, patience=patience)
    history = tl.fit(stopped, train_loader, val_loader, early)
    assert history.stopped_early and history.stop_reason == "patience"
    assert history.best_step == 1 and len(history.step) == 1 + patience
    one_step = settings(num_steps=1, schedule="constant", lr=0.1)
    tl.fit(short, train_loader, None, one_step)
    assert_same_weights(stopped, short)
    full = tl.fit(linear(), train_loader, val_loader, config)
    assert not full.stopped_early and len(full.step) == 50 and full.best_step == 1


def test_best_weights_include_the_buffers() -> None:
    model = Net()
    inputs, _ = batches(16)[0]
    zeros = torch.zeros(16, dtype=torch.int64)
    config = settings(num_steps=20, lr=0.1, eval_every_steps=1)
    history = tl.fit(model, [(inputs, zeros)], [(inputs, zeros + 1)], config)
    at = history.eval_step.index(history.best_step)
    again = tl.evaluate(model, [(inputs, zeros + 1)])
    assert again.loss == pytest.approx(history.val_loss[at], rel=1e-5)
    assert history.best_step < 20


@pytest.mark.parametrize("monitor", ["val_loss", "val_accuracy"])
def test_the_monitor_decides(monitor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = iter([(0.9, 0.5), (0.5, 0.6), (0.7, 0.8), (0.6, 0.8)])
    monkeypatch.setattr(recording, "score", lambda *_: next(scripted))
    model, states = linear(), []
    model.register_forward_pre_hook(lambda *_: states.append(weights(model)))
    history = tl.fit(model, batches(4), batches(4), settings(num_steps=4, lr=0.1, monitor=monitor))
    assert history.val_loss == [0.9, 0.5, 0.7, 0.6]
    assert history.val_accuracy == [0.5, 0.6, 0.8, 0.8]
    best = 2 if monitor == "val_loss" else 3  # of equals, the first
    assert history.best_step == best
    assert_same_weights(model, states[best])  # seen before step best + 1


def test_the_last_step_is_always_evaluated() -> None:
    config = settings(num_steps=7, eval_every_steps=3)
    assert tl.fit(linear(), batches(4), batches(4), config).eval_step == [3, 6, 7]
    config = settings(num_steps=2, eval_every_steps=30)
    assert tl.fit(linear(), batches(4), batches(4), config).eval_step == [2]


def test_validation_numbers_are_by_example() -> None:
    model, val = linear(), batches(7, 7, 1)
    history = tl.fit(model, batches(4), val, settings(num_steps=1))
    inputs, targets = (torch.cat(parts) for parts in zip(*val, strict=True))
    logits = model(inputs)
    assert history.val_loss[0] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert history.val_accuracy[0] == pytest.approx(
        (logits.argmax(1) == targets).double().mean().item()
    )


def test_history_reads_well() -> None:
    history = tl.fit(linear(), batches(4), batches(4), settings(num_steps=2))
    assert repr(history).startswith("History(2 steps in ")
    assert f"best step {history.best_step}: val_loss " in repr(history)
    assert history.seconds > 0


# Inputs and precision.


class Words(nn.Module):
    """Called like a transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.classifier = nn.Linear(6, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        mask = attention_mask.unsqueeze(2)
        pooled = (self.embedding(input_ids) * mask).sum(1) / mask.sum(1)
        return SimpleNamespace(logits=self.classifier(pooled))


def test_takes_dicts_and_outputs_with_logits() -> None:
    ids = torch.arange(9).reshape(9, 1) + torch.zeros(9, 4, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": torch.ones(9, 4)}
    loader = [(inputs, torch.arange(9) % 3)]
    model = Words()
    tl.fit(model, loader, loader, settings(num_steps=150, lr=0.05))
    assert tl.evaluate(model, loader).accuracy == 1.0


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_low_precision_computes_in_it_and_keeps_full_weights(precision: str, dtype) -> None:
    seen = set()
    model, exact = Net(), Net()
    model.head.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    loader = batches(32, 32)
    history = tl.fit(model, loader, loader, settings(num_epochs=5, precision=precision))
    reference = tl.fit(exact, loader, loader, settings(num_epochs=5))
    assert seen == {dtype}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert history.train_loss != reference.train_loss
    torch.testing.assert_close(history.train_loss, reference.train_loss, rtol=0.03, atol=0.0)
    torch.testing.assert_close(model.head.weight, exact.head.weight, rtol=0, atol=0.005)


def test_auto_precision_is_that_of_the_device() -> None:
    seen = set()
    model = linear()
    model.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    tl.fit(model, batches(4), None, settings(num_steps=1, precision="auto"))
    assert seen == {torch.float32}


def test_fp16_steps_are_not_wasted() -> None:
    """The first update already counts: the first loss scale does not overflow."""
    model = Net()
    before = weights(model)
    tl.fit(model, batches(32), None, settings(num_steps=1, precision="fp16"))
    assert not torch.equal(before["head.weight"], model.head.weight)


def test_fp16_recovers_from_gradients_that_overflow() -> None:
    """Steps are skipped, without a warning, until the loss scale is small enough."""
    model = linear()
    inputs, targets = batches(32)[0]
    before = weights(model)
    config = settings(num_steps=1, precision="fp16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tl.fit(model, [(300 * inputs, targets)], None, config)
        assert_same_weights(model, before)
        config = settings(num_steps=8, precision="fp16")
        tl.fit(model, [(300 * inputs, targets)], None, config)
    assert not torch.equal(model.weight, before["weight"])
    assert torch.isfinite(model.weight).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("resident", [False, True])
def test_trains_on_a_gpu(precision: str, resident: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 4, generator=generator)
    targets = (inputs @ torch.randn(4, 3, generator=generator)).argmax(1)
    loader = [(inputs[i : i + 32], targets[i : i + 32]) for i in range(0, 256, 32)]
    if resident:
        loader = [(x.cuda(), y.cuda()) for x, y in loader]
    model = Net().cuda()
    config = settings(num_epochs=20, lr=0.02, precision=precision)
    history = tl.fit(model, loader, loader, config)
    assert len(history.train_loss) == 160
    assert tl.evaluate(model, loader).accuracy > 0.85
    with pytest.raises(ValueError, match=r"label [345] is outside"):
        tl.fit(model, [(x, y + 3) for x, y in loader], None, settings(num_steps=2))


# What cannot work is refused.


def test_refuses_a_model_with_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="no trainable parameter: all 15 parameters of Linear"):
        tl.fit(tl.freeze(linear()), batches(4), None, settings(num_steps=1))


class Uncounted:
    def __init__(self, loader: list[Batch]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.loader)


class Empty(Uncounted):
    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("train_loader", "val_loader", "error", "message"),
    [
        ([], None, ValueError, "training loader is empty: its length is 0"),
        (batches(4), [], ValueError, "validation loader is empty: its length is 0"),
        (Empty([]), None, ValueError, "training loader is empty: it gave no batch"),
        (batches(4), Empty([]), ValueError, "loader is empty: it gave no batch to evaluate"),
        (Uncounted(batches(4)), None, TypeError, "training loader must have a length"),
        (iter(batches(4)), None, TypeError, "training loader must have a length"),
    ],
)
def test_refuses_loaders_that_give_nothing(train_loader, val_loader, error, message) -> None:
    with pytest.raises(error, match=message):
        tl.fit(linear(), train_loader, val_loader, settings(num_epochs=1))


INPUTS = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((INPUTS, torch.tensor([0, 3])), r"label 3 is outside .* 3 classes, .* in 0\.\.2"),
        ((INPUTS, torch.tensor([-100, 1])), r"label -100 is outside .* 0\.\.2"),
        ((INPUTS, torch.tensor([0.0, 1.0])), "torch.int64.*got torch.float32"),
        ((INPUTS, torch.tensor([0, 1], dtype=torch.int32)), "torch.int64.*got torch.int32"),
        ((INPUTS, torch.eye(2, 3, dtype=torch.int64)), r"shape \(batch,\), got .*\(2, 3\)"),
        ((INPUTS, torch.tensor(1)), r"got torch.int64, shape \(\)"),
        ((INPUTS, [0, 1]), "got <class 'list'>"),
        ((INPUTS[:0], torch.zeros(0, dtype=torch.int64)), r"got torch.int64, shape \(0,\)"),
        ((INPUTS, torch.tensor([0, 1, 2])), "2 rows of logits for a batch of 3 targets"),
        (INPUTS, "must yield .*, got a Tensor"),
        ((INPUTS,), "got a tuple of length 1"),
        ({"pixels": INPUTS, "labels": torch.tensor([0, 1])}, "got a dict"),
    ],
)
@pytest.mark.parametrize("role", ["train", "val"])
def test_refuses_batches_that_do_not_fit(batch: object, message: str, role: str) -> None:
    model = linear()
    before = weights(model)
    train_loader, val_loader = ([batch], None) if role == "train" else (batches(4), [batch])
    with pytest.raises(ValueError, match=message):
        tl.fit(model, train_loader, val_loader, settings(num_steps=1))
    if role == "train":
        assert_same_weights(model, before)


def test_refuses_logits_of_another_shape() -> None:
    loader = [(torch.zeros(2, 5, 4), torch.tensor([0, 1]))]  # a sequence of 5 per example
    with pytest.raises(ValueError, match=r"shape \(batch, classes\), got \(2, 5, 3\)"):
        tl.fit(linear(), loader, None, settings(num_steps=1))


def test_refuses_patience_without_validation() -> None:
    with pytest.raises(ValueError, match="patience=2 needs a val_loader"):
        tl.fit(linear(), batches(4), None, settings(num_steps=5, patience=2))


def test_refuses_a_warm_up_longer_than_the_run() -> None:
    with pytest.raises(ValueError, match="less than the 6 steps of the run, got 6"):
        tl.fit(linear(), batches(4, 4), None, settings(num_epochs=3, warmup_steps=6))


class Explodes(nn.Module):
    """Gives NaN (or infinite) logits from the n-th training step on."""

    def __init__(self, step: int, value: float = math.nan) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 3)
        self.step, self.value, self.calls = step, value, 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        logits = self.head(inputs)
        return logits * self.value if self.calls >= self.step else logits


@pytest.mark.parametrize("steps_per_look", [1, 4, 20])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence_names_the_step_and_restores_the_initial_weights(
    value: float, steps_per_look: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(recording._STEPS_PER_LOOK, "cpu", steps_per_look)
    model = Explodes(3, value)
    before = weights(model)
    with pytest.raises(TrainingDiverged, match=r"training loss became \w+ at step 3 of 9") as error:
        tl.fit(model, batches(4), None, settings(num_steps=9, schedule="constant", lr=0.02))
    assert "lr 0.02" in str(error.value) and "weights from before training" in str(error.value)
    assert len(error.value.history.train_loss) == 3
    assert model.calls == min(9, math.ceil(3 / steps_per_look) * steps_per_look)
    assert isinstance(error.value, RuntimeError)
    assert_same_weights(model, before)


def test_divergence_restores_the_best_weights_so_far() -> None:
    loader = batches(16)
    model, reference = Explodes(6), Explodes(100)
    config = settings(num_steps=9, eval_every_steps=2, schedule="constant")
    with pytest.raises(TrainingDiverged, match=r"at step 6 of 9.* weights of step 4"):
        tl.fit(model, loader, loader, config)
    tl.fit(reference, loader, None, settings(num_steps=4, schedule="constant"))
    assert_same_weights(model, reference)


def test_weights_that_blow_up_in_the_last_step_are_noticed() -> None:
    model = linear()
    before = weights(model)
    config = settings(num_steps=1, optimizer="sgd", lr=1e38, max_grad_norm=None, weight_decay=10.0)
    with pytest.raises(TrainingDiverged, match="a weight became NaN or infinite at step 1 of 1"):
        tl.fit(model, [(1e3 * INPUTS + 1e3, torch.tensor([0, 1]))], None, config)
    assert_same_weights(model, before)


def test_infinite_buffers_are_no_divergence() -> None:
    model = linear()
    model.register_buffer("mask", torch.full((2,), -math.inf))
    tl.fit(model, batches(4), None, settings(num_steps=1))


def test_a_nan_on_the_validation_set_is_noticed() -> None:
    val = [(torch.full((2, 4), math.nan), torch.tensor([0, 1]))]
    with pytest.raises(TrainingDiverged, match="validation loss became nan at step 1 of 2"):
        tl.fit(linear(), batches(4), val, settings(num_steps=2))


# Interruption.


def test_interruption_keeps_the_best_weights(capsys: pytest.CaptureFixture) -> None:
    train_loader, val_loader = wrong_later()
    model, short = linear(), linear()
    config = settings(num_steps=50, schedule="constant", lr=0.1)
    history = tl.fit(model, Interrupting(train_loader[0], 5), val_loader, config)
    assert history.stop_reason == "interrupted" and not history.stopped_early
    assert len(history.step) == len(history.train_loss) == 4 and history.best_step == 1
    tl.fit(short, train_loader, None, settings(num_steps=1, schedule="constant", lr=0.1))
    assert_same_weights(model, short)
    assert capsys.readouterr().err == "Interrupted after step 4.\n"
    assert not model.training


def test_interruption_without_validation_keeps_the_present_weights() -> None:
    batch = batches(4)[0]
    model, short = linear(), linear()
    config = settings(num_steps=50, schedule="constant")
    assert tl.fit(model, Interrupting(batch, 5), None, config).best_step is None
    tl.fit(short, [batch], None, settings(num_steps=4, schedule="constant"))
    assert_same_weights(model, short)


def test_real_digits_are_learnt() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    inputs = torch.tensor(digits.data, dtype=torch.float32) / 16
    targets = torch.tensor(digits.target)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))

    def loader(rows: torch.Tensor) -> list[Batch]:
        return [(inputs[part], targets[part]) for part in rows.split(64)]

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    config = settings(num_epochs=15, lr=1e-2, warmup_steps=10)
    tl.fit(model, loader(order[:900]), loader(order[900:1200]), config)
    assert tl.evaluate(model, loader(order[1200:])).accuracy > 0.93


def with_gaps() -> tuple[nn.Linear, torch.Tensor]:
    """A layer whose weight is a part of a larger tensor."""
    layer, whole = linear(), torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    layer.weight = nn.Parameter(whole[:, : layer.weight.shape[1]])
    return layer, whole


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weights_with_gaps_between_them_train_and_nothing_else_does(optimizer: str) -> None:
    layer, whole = with_gaps()
    twin, _ = with_gaps()
    twin.weight = nn.Parameter(twin.weight.detach().clone())  # without gaps
    outside = whole[:, layer.weight.shape[1] :].clone()
    config = settings(num_steps=8, lr=0.05, optimizer=optimizer)
    for model in (layer, twin):
        tl.fit(model, batches(6, 6), None, config)
    torch.testing.assert_close(layer.weight, twin.weight)
    assert torch.equal(whole[:, layer.weight.shape[1] :], outside)


def test_sgd_takes_a_parameter_that_joins_later() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.shift, self.calls = linear(), nn.Parameter(torch.zeros(3)), 0

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.layer(inputs) + (self.shift if self.calls > 1 else 0)

    model = Late()
    history = tl.fit(model, batches(6, 6), None, settings(num_steps=4, optimizer="sgd"))
    assert history.stop_reason == "finished" and model.shift.abs().max() > 0


def test_gradients_from_before_do_not_count() -> None:
    fresh, used = linear(), linear()
    (100 * used(torch.ones(1, used.in_features)).square().sum()).backward()
    histories = [tl.fit(m, batches(6, 6), None, settings(num_steps=3)) for m in (fresh, used)]
    assert histories[0].train_loss == histories[1].train_loss
    assert_same_weights(fresh, used)


def test_deep_copies_train_alike() -> None:
    model = Net()
    tl.freeze(model.backbone)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        tl.fit(each, batches(8), batches(8), settings(num_steps=5))
    assert_same_weights(model, twin)
