from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torchvision
import transformers
from small_models import CASES, NAMES, bert, gpt2, logits, shake, vit
from torch import nn

import tlcourse as tl
from tlcourse.freezing import count_parameters, parameter_groups
from tlcourse.lora import LoRAConfig, LoRALinear, add_lora, merge_lora


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def lora(name: str = "bert", **settings) -> LoRAConfig:
    case = CASES[name]
    defaults = {"rank": 3, "alpha": 5.0, "target_modules": case.targets}
    return LoRAConfig(**(defaults | {"modules_to_save": case.head} | settings))


def adapted(name: str = "bert", std: float = 0.3, **settings) -> nn.Module:
    """A LoRA model in evaluation mode whose B is not zero."""
    model = add_lora(CASES[name].build(), lora(name, **settings)).eval()
    shake(model, "lora_B", std)
    return model


def layers(model: nn.Module) -> list[LoRALinear]:
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def as_peft(model: nn.Module, config: LoRAConfig) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            use_rslora=config.rank_stabilised,
            target_modules=list(config.target_modules),
            modules_to_save=list(config.modules_to_save) or None,
        ),
    )


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_lora_equals_peft_outputs_and_gradients(name: str, rank_stabilised: bool) -> None:
    config = lora(name, rank_stabilised=rank_stabilised)
    plain = CASES[name].build().double().eval()
    theirs = as_peft(copy.deepcopy(plain), config).eval()
    ours = add_lora(plain, config).eval()
    shake(ours, "lora_")
    prefix = "base_model.model."
    for full, layer in ours.named_modules():
        if isinstance(layer, LoRALinear):
            twin = theirs.get_submodule(prefix + full)
            twin.lora_A["default"].weight.data.copy_(layer.lora_A)
            twin.lora_B["default"].weight.data.copy_(layer.lora_B)
    inputs = CASES[name].inputs()
    inputs = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    a, b = logits(ours, inputs), logits(theirs, inputs)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    a.square().mean().backward()
    b.square().mean().backward()
    for full, parameter in ours.named_parameters():
        if ".lora_" in full:
            twin = theirs.get_parameter(f"{prefix}{full}.default.weight")
        elif parameter.requires_grad:
            module, _, leaf = full.rpartition(".")
            twin = theirs.get_parameter(f"{prefix}{module}.modules_to_save.default.{leaf}")
        else:
            assert parameter.grad is None
            continue
        torch.testing.assert_close(parameter.grad, twin.grad, rtol=1e-6, atol=1e-10)
        assert parameter.grad.abs().max() > 0
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert count_parameters(ours).trainable == trained


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_starts_as_the_plain_model(name: str) -> None:
    model, inputs = CASES[name].build().eval(), CASES[name].inputs()
    before = logits(model, inputs).detach()
    assert torch.equal(logits(add_lora(model, lora(name)).eval(), inputs), before)


def test_at_the_start_only_b_has_a_gradient() -> None:
    model = add_lora(bert(), lora())
    logits(model, CASES["bert"].inputs()).square().mean().backward()
    for layer in layers(model):
        assert torch.equal(layer.lora_A.grad, torch.zeros_like(layer.lora_A))
        assert layer.lora_B.grad.abs().max() > 0


def test_a_starts_as_the_weight_of_a_linear_layer_and_b_at_zero() -> None:
    layer = LoRALinear(nn.Linear(10_000, 7), LoRAConfig(rank=4))
    assert layer.lora_A.shape == (4, 10_000) and layer.lora_B.shape == (7, 4)
    assert not layer.lora_B.any()
    bound = 1 / math.sqrt(10_000)  # Kaiming uniform with a = sqrt(5)
    assert 0.99 * bound < layer.lora_A.abs().max() <= bound
    torch.testing.assert_close(layer.lora_A.std().item(), bound / 3**0.5, rtol=0.02, atol=0)


@pytest.mark.parametrize(("rank_stabilised", "scale"), [(False, 6 / 4), (True, 6 / 2)])
def test_weight_in_effect_is_w_plus_scaled_ba(rank_stabilised: bool, scale: float) -> None:
    base = nn.Linear(5, 3).double()
    layer = LoRALinear(base, LoRAConfig(rank=4, alpha=6, rank_stabilised=rank_stabilised))
    shake(layer, "lora_B")
    expected = base.weight + scale * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.weight, expected)
    x = torch.randn(2, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ expected.T + base.bias)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_merged_equals_unmerged(name: str) -> None:
    model, inputs = adapted(name), CASES[name].inputs()
    before, weights = logits(model, inputs), state(model)
    originals = [layer.base.weight for layer in layers(model)]
    for layer in layers(model):
        layer.merge()
        layer.merge()  # once more changes nothing
    torch.testing.assert_close(logits(model, inputs), before, rtol=1e-5, atol=1e-5)
    assert not any(
        torch.equal(a.base.weight, b) for a, b in zip(layers(model), originals, strict=True)
    )
    for layer in layers(model):
        layer.unmerge()
        layer.unmerge()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    assert all(a.base.weight is b for a, b in zip(layers(model), originals, strict=True))
    assert torch.equal(logits(model, inputs), before)


def test_unmerging_is_exact_where_subtracting_would_not_be() -> None:
    layer = LoRALinear(nn.Linear(6, 6), LoRAConfig(rank=2))
    shake(layer, "lora_B", 1e4)
    before = layer.base.weight.clone()
    layer.merge()
    update = layer.lora_B @ layer.lora_A * layer.config.scale
    assert not torch.equal(layer.base.weight - update, before)
    layer.unmerge()
    assert torch.equal(layer.base.weight, before)


def test_a_merged_layer_runs_its_base_alone() -> None:
    layer = LoRALinear(nn.Linear(4, 4), LoRAConfig(rank=2))
    shake(layer, "lora_B")
    layer.merge()
    x = torch.randn(2, 4)
    expected = layer.base(x)
    layer.lora_A = layer.lora_B = None  # not needed any more
    assert torch.equal(layer(x), expected)


def test_a_base_that_refuses_a_new_weight_stays_unmerged() -> None:
    class Fixed(nn.Linear):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "weight" and "weight" in self._parameters:
                raise ValueError("fixed")
            super().__setattr__(name, value)

    layer = LoRALinear(Fixed(4, 4), LoRAConfig(rank=2))
    shake(layer, "lora_B")
    x = torch.randn(2, 4)
    before = layer(x)
    with pytest.raises(ValueError, match="fixed"):
        layer.merge()
    assert not layer.merged and layer.lora_A.requires_grad
    assert torch.equal(layer(x), before)


def test_merging_stops_the_adapter_and_unmerging_lets_it_train() -> None:
    model = adapted()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    for layer in layers(model):
        layer.merge()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "head.weight", "head.bias",
    }  # fmt: skip
    for layer in layers(model):
        layer.unmerge()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable


def test_state_dict_of_a_merged_model_is_that_of_the_unmerged(tmp_path) -> None:
    model, inputs = adapted(), CASES["bert"].inputs()
    before, expected = state(model), logits(model, inputs)
    for layer in layers(model):
        layer.merge()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()
    tl.save_model(model, tmp_path / "merged.safetensors")
    fresh = add_lora(bert(), lora()).eval()
    for layer in layers(fresh):
        layer.merge()  # loading undoes it
    tl.load_model(tmp_path / "merged.safetensors", fresh)
    assert not any(layer.merged for layer in layers(fresh))
    assert torch.equal(logits(fresh, inputs), expected)


@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_independent(merged: bool) -> None:
    model, inputs = adapted(), CASES["bert"].inputs()
    if merged:
        for layer in layers(model):
            layer.merge()
    expected = logits(model, inputs)
    twin = copy.deepcopy(model)
    shake(model, "", 1.0)
    assert torch.equal(logits(twin, inputs), expected)
    for layer in layers(twin):
        layer.unmerge()
    torch.testing.assert_close(logits(twin, inputs), expected, rtol=1e-5, atol=1e-5)


def test_a_model_cast_while_merged_unmerges_in_the_new_precision() -> None:
    model, inputs = adapted(), CASES["bert"].inputs()
    expected = logits(model, inputs)
    for layer in layers(model):
        layer.merge()
    model.double()
    for layer in layers(model):
        layer.unmerge()
        assert layer.base.weight.dtype == torch.float64
    torch.testing.assert_close(logits(model, inputs).float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_merge_lora_leaves_the_plain_architecture(name: str) -> None:
    plain = CASES[name].build().eval()
    keys = list(plain.state_dict())
    kinds = {full: type(module) for full, module in plain.named_modules()}
    model = add_lora(plain, lora(name)).eval()
    shake(model, "lora_B")
    inputs = CASES[name].inputs()
    before = logits(model, inputs)
    assert merge_lora(model) is model
    assert list(model.state_dict()) == keys
    assert {full: type(module) for full, module in model.named_modules()} == kinds
    after = logits(model, inputs)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        fresh = CASES[name].build().eval()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(logits(fresh, inputs), after)
    with pytest.raises(ValueError, match="has no LoRALinear to merge"):
        merge_lora(model)
    add_lora(model, lora(name))  # a second round may follow


def test_merged_model_can_be_unfrozen_and_trained() -> None:
    model = tl.unfreeze(merge_lora(adapted()))
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.train().modules())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_merging_a_tied_head_leaves_the_embedding_alone(tmp_path) -> None:
    config = lora("gpt2", target_modules=("c_attn", "lm_head"))
    model = add_lora(gpt2(), config).eval()
    shake(model, "lora_B")
    inputs = CASES["gpt2"].inputs()
    expected, embedding = logits(model, inputs), model.transformer.wte.weight.clone()
    model.lm_head.merge()
    assert torch.equal(model.transformer.wte.weight, embedding)
    assert model.lm_head.base.weight is not model.transformer.wte.weight
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-5, atol=1e-5)
    model.lm_head.unmerge()
    assert model.lm_head.base.weight is model.transformer.wte.weight  # tied again

    model.lm_head.merge()  # merged or not, the tie is seen
    with pytest.warns(UserWarning, match=r"'lm_head' shared a parameter with 'transformer.wte"):
        merge_lora(model)
    assert torch.equal(model.transformer.wte.weight, embedding)
    merged = logits(model, inputs)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path)
    reloaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(reloaded, inputs), merged)


def test_without_a_tie_merging_does_not_warn() -> None:
    model = adapted("gpt2")
    layers(model)[0].merge()  # merged already: no difference
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_lora(model)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.transformer.wte.weight


def test_training_changes_only_the_adapters_and_the_head() -> None:
    model = add_lora(vit(), lora("vit", dropout=0.1))
    before = state(model)
    loader = [(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])) for _ in range(3)]
    config = tl.TrainConfig(lr=0.01, num_steps=6, progress=False)
    history = tl.fit(model, loader, None, config)
    after = model.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if "lora_" in key or key.startswith("head.")}
    assert len(history.train_loss) == 6


class WithStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8)
        )
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.body(x)))


def test_frozen_batchnorm_statistics_stay_untouched() -> None:
    model = add_lora(WithStatistics(), LoRAConfig(rank=2, target_modules=("3",)))
    statistics = {k: v.clone() for k, v in model.named_buffers()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model.train()
        model(torch.randn(5, 6) + 4).square().mean().backward()
        optimizer.step()
    assert len(statistics) == 3
    assert all(torch.equal(v, statistics[k]) for k, v in model.named_buffers())


def test_dropout_in_training_is_that_of_the_adapter_and_beside_the_head() -> None:
    model = add_lora(WithStatistics(), LoRAConfig(rank=2, dropout=0.5, target_modules=("3",)))
    for mode in (True, False):
        model.train(mode)
        assert model.body[3].dropout.training is mode
        assert model.dropout.training is mode
        assert not model.body[2].training and not model.body[1].training
    shake(model, "lora_B")
    layer, x = model.body[3], torch.randn(50, 8)
    layer.train()
    base = layer.base(x)
    assert not torch.equal(layer(x), layer(x))
    layer.dropout.p = 0.0
    full = layer(x) - base
    layer.dropout.p = 0.5
    mean = torch.stack([layer(x) - base for _ in range(3000)]).mean(0)
    torch.testing.assert_close(mean, full, rtol=0.0, atol=0.15 * full.abs().max().item())


def test_new_layers_take_the_mode_of_the_model() -> None:
    for mode in (True, False):
        model = add_lora(bert().train(mode), lora())
        assert {layer.dropout.training for layer in layers(model)} == {mode}


def test_a_head_that_was_frozen_is_trained() -> None:
    for freeze_it in (tl.freeze, lambda module: module.requires_grad_(False)):
        model = bert()
        freeze_it(model)
        add_lora(model, lora())
        assert model.head.weight.requires_grad
        assert all(layer.lora_A.requires_grad for layer in layers(model))
        assert not model.backbone["body"].embeddings.word_embeddings.weight.requires_grad


def test_parameters_of_the_adapter_are_in_the_optimizers_groups() -> None:
    model = add_lora(bert(), lora())
    groups = parameter_groups(model, 0.1, 0.01, head_lr=0.5)
    names = {name for group in groups for name in group["names"]}
    assert names == {n for n, p in model.named_parameters() if p.requires_grad}
    rank, dim, inner = 3, 32, 64
    per_layer = 3 * rank * 2 * dim + rank * (inner + dim)  # query, value, two of output.dense
    assert count_parameters(model).trainable == 2 * per_layer + 32 * 3 + 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("conv1d", [False, True])
def test_half_precision_base_gets_float32_adapters(dtype: torch.dtype, conv1d: bool) -> None:
    base = transformers.pytorch_utils.Conv1D(6, 4) if conv1d else nn.Linear(4, 6)
    layer = LoRALinear(base.to(dtype), LoRAConfig(rank=2))
    shake(layer, "lora_B")
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    x = torch.randn(3, 4, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    exact = base(x).float() + x.float() @ (layer.lora_B @ layer.lora_A).T * layer.config.scale
    torch.testing.assert_close(y.float(), exact, rtol=0.01, atol=0.01)
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32
    layer.merge()
    assert layer.base.weight.dtype == dtype
    torch.testing.assert_close(layer(x).float(), exact, rtol=0.05, atol=0.05)


def test_works_under_autocast() -> None:
    model, inputs = adapted(), CASES["bert"].inputs()
    expected = logits(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = logits(model, inputs)
        for layer in layers(model):
            layer.merge()  # in full precision all the same
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), expected, rtol=0.1, atol=0.1)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-5, atol=1e-5)
    mixed.float().sum().backward()


def test_attention_that_reads_the_weight_directly_sees_the_adapter() -> None:
    """``nn.MultiheadAttention`` never calls its output projection, but reads the weight."""
    model = torchvision.models.VisionTransformer(16, 8, 2, 2, 32, 64, num_classes=3).eval()
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it at zero
    config = LoRAConfig(rank=2, target_modules=("out_proj", "mlp.0"))
    images = torch.randn(2, 3, 16, 16)
    plain = model(images)
    add_lora(model, config).eval()
    torch.testing.assert_close(model(images), plain)
    for layer in layers(model):
        if layer.in_features == 32 == layer.out_features:
            shake(layer, "lora_B", 1.0)
    with torch.no_grad():
        unmerged = model(images)
    assert (unmerged - plain).abs().max() > 1e-2
    model(images).sum().backward()
    attention = model.encoder.layers[0].self_attention.out_proj
    assert isinstance(attention, LoRALinear) and attention.lora_B.grad.abs().max() > 0
    torch.testing.assert_close(merge_lora(model)(images), unmerged, rtol=1e-4, atol=1e-4)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(2, 2)


def test_names_match_as_in_peft() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.subquery = nn.Linear(2, 2), nn.Linear(2, 2)
            self.block = nn.ModuleDict({"query": nn.Linear(2, 2), "queryx": nn.Linear(2, 2)})
            self.head = Inner()

    config = LoRAConfig(rank=1, target_modules=["query"])
    theirs = as_peft(Net(), config)
    model = add_lora(Net(), config)
    found = {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert found == {"query", "block.query"}  # what is trained in full is not adapted
    prefix = "base_model.model."
    assert found == {
        name.removeprefix(prefix) for name, module in theirs.named_modules()
        if hasattr(module, "lora_A")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be >= 1, got 0"),
        ({"rank": 2.0}, TypeError, "rank must be an int, got 2.0"),
        ({"rank": True}, TypeError, "rank must be an int, got True"),
        ({"alpha": 0}, ValueError, "alpha must be > 0 and finite, got 0"),
        ({"alpha": math.nan}, ValueError, "alpha must be > 0 and finite, got nan"),
        ({"alpha": "4"}, TypeError, "alpha must be a number, got '4'"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, ValueError, r"dropout must be in \[0, 1\), got -0.1"),
        ({"target_modules": "query"}, TypeError, r"got 'query'; write \('query',\)"),
        ({"target_modules": ()}, ValueError, r"target_modules must hold names .* got \(\)"),
        ({"target_modules": ("",)}, ValueError, "target_modules must hold names"),
        ({"target_modules": (3,)}, TypeError, "target_modules must be a tuple of names"),
        ({"modules_to_save": "head"}, TypeError, "modules_to_save must be a tuple of names"),
        ({"rank_stabilised": 1}, TypeError, "rank_stabilised must be True or False, got 1"),
    ],
)
def test_refuses_bad_settings(settings: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        LoRAConfig(**settings)


def test_settings_are_frozen_and_hold_tuples() -> None:
    config = LoRAConfig(target_modules=["a", "b"], modules_to_save=[])
    assert config.target_modules == ("a", "b") and config.modules_to_save == ()
    with pytest.raises(AttributeError):
        config.rank = 3  # type: ignore[misc]


def refused(model: nn.Module, config: LoRAConfig, error: type, message: str) -> None:
    trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    with pytest.raises(error, match=message):
        add_lora(model, config)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trainable
    assert {n: m.training for n, m in model.named_modules()} == modes


def test_a_refused_model_is_unchanged() -> None:
    wrong = LoRAConfig(target_modules=("query", "querry"))
    listed = r"named 'querry'; .* adapted: query \(2\), key \(2\), value \(2\), dense \(6\)$"
    refused(bert(), wrong, ValueError, listed)
    attention = LoRAConfig(target_modules=("attention",))
    refused(bert(), attention, TypeError, "attention': only nn.Linear .* got BertAttention")
    no_head = LoRAConfig(target_modules=("c_attn",))
    refused(gpt2(), no_head, ValueError, "of GPT2LMHeadModel is named 'head'; .* lm_head")
    tied = LoRAConfig(target_modules=("c_attn",), modules_to_save=("lm_head",))
    refused(gpt2(), tied, ValueError, "'lm_head' shares its weight with 'transformer.wte.weight'")
    in_head = LoRAConfig(target_modules=("head",))
    refused(bert(), in_head, ValueError, "outside modules_to_save is named 'head'")
    twice = bert()
    twice.other = twice.backbone["body"].encoder.layer[0].attention.self.query
    refused(twice, LoRAConfig(), ValueError, "are one layer")
    refused(add_lora(bert(), lora()), lora(), ValueError, "is a LoRALinear already")


def test_wraps_nothing_but_linear_layers() -> None:
    with pytest.raises(TypeError, match=r"only nn.Linear .* got Conv2d"):
        LoRALinear(nn.Conv2d(1, 1, 1), LoRAConfig())


def test_rank_may_exceed_the_size_of_the_layer() -> None:
    layer = LoRALinear(nn.Linear(3, 2), LoRAConfig(rank=9))
    assert layer.lora_A.shape == (9, 3) and layer.lora_B.shape == (2, 9)
    assert "rank=9" in repr(layer)


@pytest.mark.gpu
def test_on_a_gpu_merged_equals_unmerged() -> None:
    model = adapted().cuda()
    inputs = {k: x.cuda() for k, x in CASES["bert"].inputs().items()}
    before = logits(model, inputs)
    for layer in layers(model):
        layer.merge()
    torch.testing.assert_close(logits(model, inputs), before, rtol=1e-4, atol=1e-4)
    model.cpu()
    for layer in layers(model):
        layer.unmerge()
        assert layer.base.weight.device.type == "cpu"
