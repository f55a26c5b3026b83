"""What is predicted against what happens, and what is proposed against what is known."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tlcourse as tl
from tlcourse.config import TrainConfig
from tlcourse.datasets import BatchLoader
from tlcourse.devices import NAMES, find_device
from tlcourse.dry_run import dry_run
from tlcourse.language_models import load_text_backbone
from tlcourse.lora import LoRAConfig, add_lora
from tlcourse.preflight import preflight
from tlcourse.train import fit
from tlcourse.training_memory import num_bytes

CONFIG = TrainConfig(lr=1e-5, num_steps=2, progress=False)


def targets(n):
    return torch.zeros(n, dtype=torch.long)


def mlp(width=256):
    return nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 5)
    )


def vectors(n=32):
    return torch.randn(n, 64), targets(n)


def glyphnet(name="glyphnet"):
    return tl.Classifier(tl.load_backbone(name), 10)


def images(n=32):
    return torch.randn(n, 3, 32, 32), targets(n)


def text_model():
    return tl.Classifier(load_text_backbone("docbert"), 7)


def texts(n=16):
    ids = torch.randint(5, 100, (n, 48))
    mask = torch.ones_like(ids)
    mask[0, 40:] = 0
    return {"input_ids": ids, "attention_mask": mask}, targets(n)


def head_only(model):
    tl.freeze(model.backbone)
    return model


def measured_peak(model, batch, config):
    """Highest sum of what torch allocates in a run, as its profiler sees it, and what was there."""
    inputs = batch[0].values() if isinstance(batch[0], dict) else [batch[0]]
    before = num_bytes((*model.parameters(), *model.buffers(), *inputs, batch[1]))
    loader = [batch] * (config.num_steps * config.accumulation_steps)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        fit(model, loader, None, config)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return before + peak


@pytest.mark.parametrize(
    ("make", "batch", "changes"),
    [
        (lambda: mlp(1024), vectors(64), {}),
        (lambda: mlp(1024), vectors(2048), {"optimizer": "sgd"}),
        (glyphnet, images(64), {}),
        (glyphnet, images(64), {"accumulation_steps": 2, "optimizer": "sgd", "momentum": 0.0}),
        (lambda: glyphnet("glyphnet_bn"), images(16), {}),
        (lambda: head_only(glyphnet()), images(64), {}),
        (text_model, texts(32), {}),
        (lambda: add_lora(text_model(), LoRAConfig(target_modules=("Wqkv",))), texts(32), {}),
    ],
    ids=["mlp", "mlp-sgd", "glyphnet", "accumulated", "batch-norm", "head", "text", "lora"],
)
def test_the_predicted_peak_is_that_of_a_run(make, batch, changes):
    model, config = make(), dataclasses.replace(CONFIG, **changes)
    predicted = preflight(model, config, "cpu", example=batch).planned.peak_bytes
    assert predicted == pytest.approx(measured_peak(model, batch, config), rel=0.15)


@pytest.mark.parametrize(("optimizer", "copies"), [("adamw", 2), ("sgd", 1)])
@pytest.mark.parametrize(
    "change", [lambda m: m, head_only, lambda m: add_lora(m, LoRAConfig(target_modules=("Wqkv",)))]
)
def test_weights_gradients_and_state_are_counted_to_the_byte(change, optimizer, copies):
    model = change(text_model())
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    trainable = [p for p in model.parameters() if p.requires_grad]
    state = copies * num_bytes(trainable) + 4 * len(trainable) * (optimizer == "adamw")
    whole = preflight(model, config, "cpu", example=texts(4)).planned.whole
    assert whole["parameters"] == num_bytes((*model.parameters(), *model.buffers()))
    assert whole["gradients"] == num_bytes(trainable)
    assert whole["optimizer"] == state
    assert whole["best weights"] == num_bytes((*trainable, *model.buffers()))


def test_the_state_is_that_which_the_optimizer_makes():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    nn.functional.cross_entropy(model(vectors()[0]), vectors()[1]).backward()
    optimizer.step()
    made = num_bytes(x for state in optimizer.state.values() for x in state.values())
    assert preflight(mlp(), CONFIG, "cpu", example=vectors()).planned.whole["optimizer"] == made


def test_activations_of_linear_layers_are_those_known_by_hand():
    # Kept of 8 examples: the input, the output of the ReLU, the input of the last layer, the
    # log-probabilities; besides them live the targets, the logits, the loss and two numbers.
    whole = preflight(mlp(256), CONFIG, "cpu", example=vectors(8)).planned.whole
    kept = 4 * 8 * (64 + 256 + 256 + 5)
    assert kept <= whole["activations"] <= kept + 8 * 8 + 4 * 8 * 5 + 64


@pytest.mark.parametrize("device", ["cpu", "A100"])
def test_activations_are_affine_in_the_batch(device):
    def activations(size):
        found = preflight(glyphnet(), CONFIG, device, example=images(4), batch_size=size)
        return found.planned.whole["activations"]

    one, two, many = activations(64), activations(128), activations(512)
    assert many == pytest.approx(one + (two - one) * (512 - 64) / 64, rel=1e-3)


def test_half_precision_keeps_half_the_activations_and_whole_weights():
    full, half = (
        dry_run(mlp(), CONFIG, vectors(), batch_size=4096, on_gpu=True, half=half).whole
        for half in (False, True)
    )
    assert half["parameters"] == full["parameters"]
    assert half["gradients"] == full["gradients"]
    assert half["activations"] == pytest.approx(full["activations"] / 2, rel=0.15)


def test_a_gpu_normalises_in_float32_and_keeps_a_mask_of_dropout():
    def activations(layer, on_gpu):
        model = nn.Sequential(nn.Linear(64, 4096), layer, nn.Linear(4096, 2))
        run = dry_run(model, CONFIG, vectors(), batch_size=4096, on_gpu=on_gpu, half=True)
        return run.whole["activations"]

    num = 4096 * 4096
    # Kept are the float32 input of the norm and the bf16 input of the product after it.
    assert activations(nn.LayerNorm(4096), True) == pytest.approx(6 * num, rel=0.05)
    assert activations(nn.Dropout(), True) == pytest.approx(3 * num, rel=0.05)
    assert activations(nn.Dropout(), False) == pytest.approx(4 * num, rel=0.05)


def test_attention_on_a_gpu_keeps_no_matrix_of_all_pairs():
    length, layer = 512, nn.TransformerEncoderLayer(32, 4, 32, dropout=0.1, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(32 * length, 2))
    batch = torch.randn(2, length, 32), targets(2)
    sizes = [
        dry_run(model, CONFIG, batch, batch_size=2, on_gpu=on_gpu, half=False).whole["activations"]
        for on_gpu in (True, False)
    ]
    pairs = 2 * 4 * length * length * 4
    assert sizes[0] < pairs < sizes[1]


def test_nothing_is_changed():
    model, batch = glyphnet("glyphnet_bn"), images(8)
    model.train()
    tl.freeze(model.backbone.body.stem)
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    before = copy.deepcopy(model.state_dict())
    grads = {name: p.grad for name, p in model.named_parameters()}
    kept = {name: None if g is None else g.clone() for name, g in grads.items()}
    modes, chance = [m.training for m in model.modules()], torch.get_rng_state()
    storages = [p.data_ptr() for p in model.parameters()]

    preflight(model, CONFIG, "T4", example=batch)
    preflight(model, CONFIG, "cpu", example=batch, measure=True)

    assert torch.equal(torch.get_rng_state(), chance)
    assert [m.training for m in model.modules()] == modes
    assert [p.data_ptr() for p in model.parameters()] == storages
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for name, parameter in model.named_parameters():
        assert parameter.grad is grads[name]
        assert kept[name] is None or torch.equal(parameter.grad, kept[name])


@pytest.mark.parametrize("kind", [BatchLoader, DataLoader])
def test_a_loader_is_an_example_and_keeps_its_order(kind):
    inputs, labels = vectors(24)
    if kind is BatchLoader:
        make = lambda: BatchLoader(inputs, labels, 8, shuffle=True, seed=3)  # noqa: E731
    else:
        make = lambda: DataLoader(  # noqa: E731
            TensorDataset(inputs, labels),
            8,
            shuffle=True,
            generator=torch.Generator().manual_seed(3),
        )
    loader, model = make(), mlp()
    chance = torch.get_rng_state()
    found = preflight(model, CONFIG, "T4", example=loader)
    assert found.planned.batch_size == 8
    assert torch.equal(torch.get_rng_state(), chance)
    for ours, untouched in zip(loader, make(), strict=True):
        assert torch.equal(ours[0], untouched[0])
    # fit moves the tensors of a BatchLoader to the GPU.
    data = inputs.nbytes + labels.nbytes if kind is BatchLoader else 0
    assert found.planned.whole["data"] == data


def test_what_fits_as_planned_stays_but_for_the_precision():
    config = dataclasses.replace(CONFIG, precision="fp32", lr=3e-4)
    for name, precision in {"T4": "fp16", "l4": "bf16", "A100": "bf16", "cpu": "fp32"}.items():
        found = preflight(mlp(), config, name, example=vectors(16))
        assert found.fits
        assert (found.planned.precision, found.micro_batch) == ("fp32", 16)
        assert found.config == dataclasses.replace(config, precision=precision)
        assert "It fits." in str(found)


def test_auto_is_what_the_device_does_well():
    for name in NAMES:
        found = preflight(mlp(), CONFIG, name, example=vectors(4))
        assert found.planned.precision == find_device(name).precision == found.config.precision


def test_a_step_that_does_not_fit_is_accumulated():
    wide = nn.Sequential(nn.Linear(64, 2**16), nn.ReLU(), nn.Linear(2**16, 5))
    config = dataclasses.replace(CONFIG, accumulation_steps=3)
    found = preflight(wide, config, "T4", example=vectors(8), batch_size=2**16)
    assert not found.fits
    assert found.micro_batch * found.config.accumulation_steps == 3 * 2**16
    assert found.proposed.peak_bytes <= found.usable_bytes
    assert f"batch_size={found.micro_batch}" in str(found)
    # The next larger divisor would not fit.
    larger = min(n for n in range(found.micro_batch + 1, 3 * 2**16 + 1) if 3 * 2**16 % n == 0)
    once = preflight(wide, found.config, "T4", example=vectors(8), batch_size=larger)
    assert not once.fits


def test_accumulation_is_dropped_where_all_fits_at_once():
    config = dataclasses.replace(CONFIG, accumulation_steps=4)
    found = preflight(mlp(), config, "L4", example=vectors(8))
    assert (found.micro_batch, found.config.accumulation_steps) == (32, 1)


def test_a_model_that_is_too_large_for_the_device_and_for_this_machine():
    model = nn.Sequential(*(nn.Linear(60_000, 60_000, device="meta") for _ in range(2)))
    found = preflight(model, CONFIG, "T4", example=(torch.zeros(2, 60_000), targets(2)))
    assert not found.fits
    assert found.micro_batch is None
    assert "LoRA" in str(found)
    with pytest.raises(ValueError, match="Not even a micro-batch of 1 fits"):
        _ = found.config


def test_inputs_that_are_too_long():
    model = nn.Sequential(nn.Conv1d(1, 5, 3), nn.GELU(), nn.Conv1d(5, 5, 3), _Mean())
    batch = torch.zeros(1, 1, 500_000_000, device="meta"), targets(1)
    found = preflight(model, CONFIG, "T4", example=batch)
    assert found.proposed is None
    assert "the activations take" in str(found)


class _Mean(nn.Module):
    def forward(self, x):  # (B, C, T) -> (B, C)
        return x.mean(2)


def test_time_is_a_range_and_grows():
    few, many = (
        preflight(glyphnet(), CONFIG, "T4", example=images(4), batch_size=n).planned.step_seconds
        for n in (4, 4096)
    )
    assert 0 < few[0] < few[1] < many[1]
    assert many[0] > few[0]
    measured = preflight(mlp(), CONFIG, "cpu", example=vectors(), measure=True)
    assert measured.measured_step_seconds > 0
    assert "A step took" in str(measured)
    assert (
        preflight(mlp(), CONFIG, "T4", example=vectors(), measure=True).measured_step_seconds
        is None
    )


class _Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 5)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (mlp(), {"device": "V100"}, "unknown device 'V100'; choose one of T4, L4, A100"),
        (mlp(), {"device": "mps"}, "unknown device 'mps'"),
        (mlp(), {"batch_size": 0}, "batch_size must be an int >= 1, got 0"),
        (mlp(), {"example": torch.zeros(2, 64)}, "example must be a batch"),
        (mlp(), {"example": []}, "example is empty"),
        (mlp(), {"example": (torch.zeros(2, 64), torch.zeros(2))}, "targets must be class numbers"),
        (mlp(), {"example": (torch.zeros(2, 63), targets(2))}, "cannot be followed"),
        (nn.Conv1d(64, 5, 1), {"example": (torch.zeros(2, 64, 9), targets(2))}, "must give logits"),
        (mlp().requires_grad_(False), {}, "no trainable parameter"),
        (_Reads(), {}, "reads the numbers"),
    ],
)
def test_errors_say_what_is_wrong(model, options, message):
    with pytest.raises(ValueError, match=message):
        preflight(model, CONFIG, **{"device": "T4", "example": vectors(2), **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here():
    with pytest.raises(
        ValueError, match="no 'cuda' here; to plan for a GPU elsewhere, name it: T4"
    ):
        preflight(mlp(), CONFIG, "cuda", example=vectors(2))


@pytest.mark.parametrize(
    ("title", "gib", "alike"),
    [
        ("Tesla T4", 14.6, "T4"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", 79.1, "H100"),
        ("NVIDIA GeForce RTX 4090", 23.5, "L4"),
    ],
)
def test_the_card_that_is_here_has_its_own_memory_and_the_speed_of_one_like_it(
    monkeypatch, title, gib, alike
):
    total = int(gib * 2**30)
    capability = {"T4": (7, 5), "A100-80GB": (8, 0), "H100": (9, 0), "L4": (8, 9)}[alike]
    for name, value in {
        "is_available": True, "device_count": 1, "get_device_name": title,
        "get_device_properties": SimpleNamespace(total_memory=total),
        "memory_reserved": 3000, "memory_allocated": 1000, "mem_get_info": (total // 2, total),
        "get_device_capability": capability,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    found, named = find_device("cuda"), find_device(alike)
    assert (found.name, found.memory_bytes, found.is_here) == (title, total, True)
    assert found.free_bytes == total // 2 + 2000
    assert (found.half_flops, found.precision) == (named.half_flops, named.precision)
    assert found.workspace_bytes == named.workspace_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_predicted_peak_is_that_of_a_run_on_a_gpu():
    model, batch = mlp(4096).cuda(), vectors(16384)
    config = dataclasses.replace(CONFIG, num_steps=3, compile=False)
    predicted = preflight(model, config, "cuda", example=batch).planned.peak_bytes
    torch.cuda.reset_peak_memory_stats()
    fit(model, [batch] * 3, None, config)
    assert predicted == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)
