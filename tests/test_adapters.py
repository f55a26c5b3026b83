from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
import transformers
from small_models import CASES, NAMES, bert, bert_body, gpt2, logits, shake, vit
from torch import nn

import tlcourse as tl
from tlcourse.adapters import (
    BottleneckConfig,
    BottleneckLinear,
    IA3Config,
    IA3Linear,
    add_bottlenecks,
    add_ia3,
    merge_ia3,
    train_biases,
    train_last_layers,
)
from tlcourse.freezing import count_parameters, parameter_groups
from tlcourse.lora import LoRAConfig, add_lora


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def ia3(name: str = "bert") -> IA3Config:
    case = CASES[name]
    return IA3Config(
        target_modules=case.outputs + case.feedforward,
        feedforward_modules=case.feedforward,
        modules_to_save=case.head,
    )


def adapted(name: str = "bert") -> nn.Module:
    model = add_ia3(CASES[name].build(), ia3(name)).eval()
    shake(model, "ia3_l")
    return model


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def moved_by_training(model: nn.Module) -> set[str]:
    """What a few steps of ``tl.fit`` change."""
    name = "vit" if isinstance(model, tl.Classifier) else "bert"
    inputs = CASES[name].inputs()
    inputs = inputs.get("images", inputs)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    loader = [(inputs, torch.tensor([0, 1, 2, 0]))] * 2
    tl.fit(model, loader, None, tl.TrainConfig(lr=0.01, num_steps=4, progress=False))
    after = model.state_dict()
    return {key for key in before if not torch.equal(before[key], after[key])}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("name", NAMES)
def test_ia3_equals_peft_outputs_and_gradients(name: str) -> None:
    peft = pytest.importorskip("peft")
    config = ia3(name)
    plain = CASES[name].build().double().eval()
    theirs = peft.get_peft_model(
        copy.deepcopy(plain),
        peft.IA3Config(
            target_modules=list(config.target_modules),
            feedforward_modules=list(config.feedforward_modules),
            modules_to_save=list(config.modules_to_save) or None,
        ),
    ).eval()
    ours = add_ia3(plain, config).eval()
    shake(ours, "ia3_l")
    prefix = "base_model.model."
    vectors = {n: m for n, m in ours.named_modules() if isinstance(m, IA3Linear)}
    assert {layer.is_feedforward for layer in vectors.values()} == {True, False}
    for full, layer in vectors.items():
        vector = theirs.get_submodule(prefix + full).ia3_l["default"]
        assert vector.shape == (
            (1, layer.in_features) if layer.is_feedforward else (layer.out_features, 1)
        )
        vector.data.copy_(layer.ia3_l.view_as(vector))
    inputs = CASES[name].inputs()
    inputs = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    a, b = logits(ours, inputs), logits(theirs, inputs)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    a.square().mean().backward()
    b.square().mean().backward()
    for full, layer in vectors.items():
        gradient = theirs.get_submodule(prefix + full).ia3_l["default"].grad
        torch.testing.assert_close(layer.ia3_l.grad, gradient.flatten(), rtol=1e-6, atol=1e-10)
        assert gradient.abs().max() > 0
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert count_parameters(ours).trainable == trained


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_ia3_starts_as_the_plain_model(name: str) -> None:
    model, inputs = CASES[name].build().eval(), CASES[name].inputs()
    before = logits(model, inputs).detach()
    assert torch.equal(logits(add_ia3(model, ia3(name)).eval(), inputs), before)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_merged_ia3_equals_unmerged(name: str) -> None:
    plain = CASES[name].build()
    keys = list(plain.state_dict())
    model, inputs = add_ia3(plain, ia3(name)).eval(), CASES[name].inputs()
    shake(model, "ia3_l")
    layers = [module for module in model.modules() if isinstance(module, IA3Linear)]
    with torch.no_grad():
        for layer in layers:
            layer.ia3_l[0] = 0.0  # dividing by it could not undo the merge
    before = logits(model, inputs)
    saved = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for layer in layers:
        layer.merge()
    merged = logits(model, inputs)
    torch.testing.assert_close(merged, before, rtol=1e-5, atol=1e-5)
    for layer in layers:
        layer.unmerge()
    assert all(torch.equal(tensor, saved[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(logits(model, inputs), before)
    merge_ia3(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model, inputs), merged)
    with pytest.raises(ValueError, match="has no IA3Linear to merge"):
        merge_ia3(model)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("is_feedforward", [False, True])
def test_ia3_layer_is_its_formula(conv1d: bool, is_feedforward: bool) -> None:
    base = transformers.pytorch_utils.Conv1D(3, 5) if conv1d else nn.Linear(5, 3)
    nn.init.normal_(base.bias)
    weight = base.weight.T if conv1d else base.weight  # (3, 5)
    config = IA3Config(target_modules=("x",), feedforward_modules=())
    layer = IA3Linear(base, config, is_feedforward)
    shake(layer, "ia3_l")
    x, vector = torch.randn(2, 5), layer.ia3_l
    expected = (
        (x * vector) @ weight.T + base.bias
        if is_feedforward
        else (x @ weight.T + base.bias) * vector
    )
    torch.testing.assert_close(layer(x), expected)
    # What other code may read instead of calling the layer.
    read = layer.weight.T if conv1d else layer.weight
    torch.testing.assert_close(x @ read.T + layer.bias, expected)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    assert layer.weight is base.weight


def test_ia3_without_bias_and_in_half_precision() -> None:
    base = nn.Linear(4, 4, bias=False).bfloat16()
    layer = IA3Linear(base, IA3Config(target_modules=("x",), feedforward_modules=()))
    assert layer.ia3_l.dtype == torch.float32 and layer.bias is None
    shake(layer, "ia3_l")
    x = torch.randn(2, 4).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), base(x).float() * layer.ia3_l, rtol=0.02, atol=0.02)
    layer.merge()
    torch.testing.assert_close(layer(x).float(), y.float(), rtol=0.05, atol=0.05)


def test_ia3_vectors_are_not_pulled_to_zero_by_weight_decay() -> None:
    groups = parameter_groups(add_ia3(bert(), ia3()), 0.1, 0.01)
    decayed = {name for g in groups if g["weight_decay"] for name in g["names"]}
    assert decayed == {"head.weight"}


def test_ia3_training_changes_only_the_vectors_and_the_head() -> None:
    model = add_ia3(bert(), ia3())
    moved = moved_by_training(model)
    assert moved == {k for k in model.state_dict() if "ia3_l" in k or k.startswith("head.")}
    per_layer = 32 + 32 + 64
    assert count_parameters(model).trainable == 2 * per_layer + 32 * 3 + 3


def test_ia3_refuses_feedforward_names_that_are_no_targets() -> None:
    with pytest.raises(ValueError, match="got 'dense'; targets are key, value"):
        IA3Config(target_modules=("key", "value"), feedforward_modules=("dense",))
    with pytest.raises(TypeError, match="feedforward_modules must be a tuple of names"):
        IA3Config(target_modules=("key",), feedforward_modules="key")


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2"])
def test_bottlenecks_start_near_the_plain_model(name: str) -> None:
    case = CASES[name]
    targets = {"bert": ("output.dense",), "vit": case.feedforward, "gpt2": ("c_proj",)}[name]
    plain, inputs = case.build().eval(), case.inputs()
    before = logits(plain, inputs).detach()
    gaps = []
    for std in (1e-2, 1e-1, 1.0):
        config = BottleneckConfig(
            bottleneck_dim=8, init_std=std, target_modules=targets, modules_to_save=case.head
        )
        with torch.no_grad():
            model = add_bottlenecks(copy.deepcopy(plain), config).eval()
            gaps.append((logits(model, inputs) - before).abs().max().item())
    assert 0 < gaps[0] < 1e-2 * before.abs().max().item()
    assert gaps[0] < gaps[1] < gaps[2]
    assert gaps[2] > 10 * gaps[0]


def test_bottleneck_is_its_formula_and_counts_2md_d_m() -> None:
    dim, width = 6, 2
    layer = BottleneckLinear(nn.Linear(4, dim), BottleneckConfig(bottleneck_dim=width))
    assert count_parameters(layer).trainable == 2 * width * dim + dim + width
    assert max(layer.down.weight.abs().max(), layer.up.weight.abs().max()) <= 2e-2
    assert not layer.down.bias.any() and not layer.up.bias.any()
    shake(layer, "down")
    shake(layer, "up")
    x = torch.randn(3, 4)
    h = layer.base(x)
    inner = h @ layer.down.weight.T + layer.down.bias
    gelu = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
    torch.testing.assert_close(layer(x), h + gelu @ layer.up.weight.T + layer.up.bias)
    with pytest.raises(AttributeError, match="weight"):  # no weight could stand for it
        _ = layer.weight


def test_bottlenecks_stand_before_the_residual_sum_in_a_bert() -> None:
    """Figure 2 of Houlsby et al., computed by hand for one BertOutput."""
    model = add_bottlenecks(bert_body(), BottleneckConfig(bottleneck_dim=4, modules_to_save=()))
    model.train()  # dropout of what is frozen is off in training, too
    shake(model, "up.")
    found = [n for n, m in model.named_modules() if isinstance(m, BottleneckLinear)]
    assert found == [
        f"encoder.layer.{n}.{place}output.dense" for n in (0, 1) for place in ("attention.", "")
    ]
    block = model.encoder.layer[0].output
    hidden, residual = torch.randn(2, 5, 64), torch.randn(2, 5, 32)
    h = block.dense.base(hidden)
    h = h + block.dense.up(F.gelu(block.dense.down(h)))
    norm = block.LayerNorm
    expected = F.layer_norm(h + residual, (32,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(block(hidden, residual), expected)


@pytest.mark.parametrize("train_norms", [True, False])
def test_bottleneck_training_changes_adapters_norms_and_head(train_norms: bool) -> None:
    model = add_bottlenecks(bert(), BottleneckConfig(bottleneck_dim=4, train_norms=train_norms))
    expected = {
        key
        for key in model.state_dict()
        if ".down." in key
        or ".up." in key
        or key.startswith("head.")
        or ("LayerNorm" in key and train_norms)
    }
    assert trainable(model) == expected
    assert moved_by_training(model) == expected


def test_a_bottleneck_model_is_saved_whole(tmp_path) -> None:
    config, inputs = BottleneckConfig(bottleneck_dim=4), CASES["bert"].inputs()
    model = add_bottlenecks(bert(), config).eval()
    shake(model, "up.")
    tl.save_model(model, tmp_path / "model.safetensors")
    fresh = tl.load_model(tmp_path / "model.safetensors", add_bottlenecks(bert(), config)).eval()
    assert torch.equal(logits(fresh, inputs), logits(model, inputs))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"bottleneck_dim": 0}, ValueError, "bottleneck_dim must be >= 1, got 0"),
        ({"bottleneck_dim": 1.5}, TypeError, "bottleneck_dim must be an int, got 1.5"),
        ({"init_std": 0.0}, ValueError, "init_std must be > 0 and finite, got 0.0"),
        ({"init_std": None}, TypeError, "init_std must be a number, got None"),
        ({"target_modules": ()}, ValueError, "target_modules must hold names"),
    ],
)
def test_bottleneck_refuses_bad_settings(settings: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        BottleneckConfig(**settings)


def test_methods_do_not_go_on_top_of_each_other() -> None:
    methods = {
        "LoRALinear": (add_lora, LoRAConfig()),
        "IA3Linear": (add_ia3, ia3()),
        "BottleneckLinear": (add_bottlenecks, BottleneckConfig()),
    }
    for name, (first, settings) in methods.items():
        model = first(bert(), settings)
        before = trainable(model)
        for second, more in methods.values():
            with pytest.raises(ValueError, match=f"is a {name} already"):
                second(model, more)
        assert trainable(model) == before


def test_bitfit_trains_the_biases_and_the_head() -> None:
    model = train_biases(bert())
    expected = {k for k in model.state_dict() if k.endswith("bias") or k.startswith("head.")}
    assert trainable(model) == expected
    moved = moved_by_training(model)
    # One constant added to all scores of a query: softmax does not see the bias of the keys.
    unseen = {key for key in expected if key.endswith("key.bias")}
    assert expected - unseen <= moved <= expected
    assert not any(module.training for module in model.train().backbone.modules())


def test_bitfit_finds_the_biases_of_packed_attention() -> None:
    model = torchvision.models.VisionTransformer(16, 8, 2, 2, 32, 64, num_classes=3)
    train_biases(model, ("heads",))
    assert "encoder.layers.encoder_layer_0.self_attention.in_proj_bias" in trainable(model)
    assert "heads.head.weight" in trainable(model)


def test_bitfit_refuses_a_model_without_biases() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with pytest.raises(ValueError, match="no parameter whose name ends with 'bias'"):
        train_biases(model, ())
    assert trainable(model) == {"0.weight"}


def test_last_layers_of_transformers() -> None:
    for build, layer in ((bert, "encoder.layer"), (vit, "layer")):
        for num_layers in (0, 1, 2):
            model = train_last_layers(build(), num_layers)
            blocks = {
                n for n in (0, 1) for name in trainable(model) if f"{layer}.{n}." in name
                or f"{layer}s.{n}." in name
            }  # fmt: skip
            assert blocks == set(range(2 - num_layers, 2))
            assert {"head.weight", "head.bias"} <= trainable(model)
            assert not any("embed" in name for name in trainable(model))
            # The norm after the last block goes with it.
            norm = any(name.startswith("backbone.body.layernorm") for name in trainable(model))
            assert norm == (build is vit and num_layers > 0)
            assert moved_by_training(model) >= trainable(model) - {
                name for name in trainable(model) if name.endswith(("key.bias", "k_proj.bias"))
            }


def test_last_layers_leave_a_tied_head_alone() -> None:
    model = train_last_layers(gpt2(), 1, ())
    assert {name.split(".")[1] + name.split(".")[2] for name in trainable(model)} == {
        "h1", "ln_fweight", "ln_fbias",
    }  # fmt: skip
    with pytest.raises(ValueError, match="'lm_head' shares its weight"):
        train_last_layers(gpt2(), 1, ("lm_head",))


def test_last_layers_of_a_convolutional_network() -> None:
    model = tl.Classifier(tl.load_backbone("glyphnet_bn", pretrained=False), 3)
    train_last_layers(model, 1)
    assert {".".join(name.split(".")[:4]) for name in trainable(model)} == {
        "backbone.body.stages.2", "head.weight", "head.bias",
    }  # fmt: skip
    model.train()
    assert model.backbone.body.stages[2].training and not model.backbone.body.stages[1].training


def test_last_layers_refuse_what_cannot_be_meant() -> None:
    model = bert()
    before = trainable(model)
    with pytest.raises(ValueError, match=r"in 0..2, the number of blocks .* got 3"):
        train_last_layers(model, 3)
    with pytest.raises(ValueError, match=r"got -1"):
        train_last_layers(model, -1)
    with pytest.raises(ValueError, match="would train nothing"):
        train_last_layers(model, 0, ())
    with pytest.raises(ValueError, match="is named 'top'"):
        train_last_layers(model, 1, ("top",))
    assert trainable(model) == before
