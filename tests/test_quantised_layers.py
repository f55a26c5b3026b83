from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import tlcourse as tl
from tlcourse.quantisation import dequantise, int4_levels, quantise_blockwise
from tlcourse.quantised_layers import (
    QuantisedLinear,
    dequantise_linears,
    memory_bytes,
    quantise_linears,
)
from tlcourse.saving import load_model, save_model


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=40, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=40,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def vit() -> Any:
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5)
    nn.init.normal_(model.heads[0].weight)  # torchvision starts it at zero
    return model.eval()


def inputs(name: str) -> Tensor:
    return torch.randn(2, 3, 32, 32) if name == "vit" else torch.randint(3, 60, (2, 7))


MODELS = {"bert": bert, "gpt2": gpt2, "vit": vit}


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    output: Any = model(x)
    return getattr(output, "logits", output)


def quantised_names(model: nn.Module) -> set[str]:
    return {n for n, m in model.named_modules() if isinstance(m, QuantisedLinear)}


SETTINGS = [{}, {"double": False}, {"levels": int4_levels(), "block_size": 10}]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_the_dequantised_layer(
    settings: dict[str, Any], bias: bool
) -> None:
    base = nn.Linear(33, 7, bias=bias)
    layer = QuantisedLinear(base, **settings)
    plain = layer.dequantised()
    assert type(plain) is nn.Linear and torch.equal(plain.weight, layer.weight)
    assert 0 < (plain.weight - base.weight).abs().max() < 0.1
    x = torch.randn(2, 5, 33, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    assert torch.equal(layer(x), plain(twin))
    for found, output in ((x, layer(x)), (twin, plain(twin))):
        output.square().sum().backward()
        assert found.grad is not None
    torch.testing.assert_close(x.grad, twin.grad)
    assert not any(p.requires_grad for p in layer.parameters())


def test_gradient_is_that_of_finite_differences() -> None:
    layer = QuantisedLinear(nn.Linear(6, 4).double())
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(lambda x: layer(x).square(), (x,))
    assert torch.autograd.gradcheck(layer, (x[0].detach().requires_grad_(),))


def test_a_bias_can_be_trained() -> None:
    layer = QuantisedLinear(nn.Linear(6, 4))
    layer.bias.requires_grad_(True)
    x, direction = torch.randn(2, 3, 6), torch.randn(2, 3, 4)
    (layer(x) * direction).sum().backward()
    torch.testing.assert_close(layer.bias.grad, direction.sum(dim=(0, 1)))


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that the graph keeps for the backward pass, parameters and inputs included."""
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x).sum()
    return sum(sizes)


def test_no_weight_of_full_size_waits_for_the_backward_pass() -> None:
    layer = QuantisedLinear(nn.Linear(64, 64))
    x = torch.randn(2, 64, requires_grad=True)
    assert saved_bytes(layer, x) == 0
    assert saved_bytes(layer.dequantised(), x) >= 64 * 64 * 4  # as F.linear does


def test_conv1d_is_quantised_as_its_transpose() -> None:
    base = Conv1D(nf=8, nx=20)
    nn.init.normal_(base.bias)
    layer = QuantisedLinear(base, block_size=10, double=False)
    assert (layer.in_features, layer.out_features) == (20, 8)
    expected = dequantise(quantise_blockwise(base.weight.T, block_size=10))
    assert torch.equal(layer.weight, expected)
    x = torch.randn(3, 20)
    torch.testing.assert_close(layer(x), x @ expected.T + base.bias)


def test_is_a_linear_layer_to_others() -> None:
    layer = QuantisedLinear(nn.Linear(64, 32))
    assert isinstance(layer, nn.Linear) and layer.weight.shape == (32, 64)
    assert list(layer.state_dict()) == [
        "bias", "codes", "levels", "scale_codes", "scale_steps", "scale_mean",
    ]  # fmt: skip
    # 32 scales: two codes a byte, one byte a scale, one step, one mean.
    text = "in_features=64, out_features=32, bias=True, bits_per_weight=4.156"
    assert repr(layer) == f"QuantisedLinear({text})"
    assert memory_bytes(layer) == 64 * 32 // 2 + 32 + 4 + 4 + 16 * 4 + 32 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_rounds_the_weight_and_not_its_scales(dtype: torch.dtype) -> None:
    layer = QuantisedLinear(nn.Linear(64, 32))
    before = {name: part.clone() for name, part in layer.named_buffers()}
    weight = layer.weight
    layer.to(dtype)
    for name, part in layer.named_buffers():
        assert torch.equal(part, before[name]) and part.dtype == before[name].dtype
    assert torch.equal(layer.weight, weight.to(dtype)) and layer.bias.dtype == dtype
    assert layer(torch.randn(2, 64, dtype=dtype)).dtype == dtype
    assert layer.dequantised().weight.dtype == dtype
    layer.float()
    assert torch.equal(layer.weight, weight)  # nothing was lost on the way


def test_under_autocast() -> None:
    layer = QuantisedLinear(nn.Linear(64, 32))
    plain = layer.dequantised()
    x = torch.randn(5, 64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = layer(x), plain(twin)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    for output in (found, expected):
        output.float().square().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, twin.grad, atol=1e-2, rtol=1e-2)


def test_a_copy_is_independent() -> None:
    layer = QuantisedLinear(nn.Linear(8, 8))
    twin = copy.deepcopy(layer)
    layer.codes.zero_()
    assert not torch.equal(twin.weight, layer.weight)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_its_dequantised_twin_does(name: str) -> None:
    model, x = MODELS[name](), inputs(name)
    exact = outputs(model, x)
    quantise_linears(model)
    assert quantised_names(model)
    rough = outputs(model, x)
    assert 0 < (rough - exact).abs().mean() < exact.abs().mean()
    dequantise_linears(model)
    assert not quantised_names(model)
    torch.testing.assert_close(outputs(model, x), rough)


def test_everything_but_the_head_by_default() -> None:
    model = quantise_linears(bert())
    linear = {n for n, m in bert().named_modules() if isinstance(m, nn.Linear)}
    assert quantised_names(model) == linear - {"classifier"} and len(linear) == 2 * 6 + 2
    model = quantise_linears(gpt2())  # the head is the embedding
    assert len(quantised_names(model)) == 2 * 4 and type(model.lm_head) is nn.Linear


def test_targets_by_name() -> None:
    model = quantise_linears(bert(), ["query", "0.output.dense", "bert.pooler.dense"])
    layers = "bert.encoder.layer."
    assert quantised_names(model) == {
        layers + "0.attention.self.query", layers + "1.attention.self.query",
        layers + "0.output.dense", "bert.pooler.dense",
    }  # fmt: skip
    quantise_linears(model, ["key"])  # a second time, others
    assert len(quantised_names(model)) == 6
    assert quantised_names(quantise_linears(bert(), ["classifier"])) == {"classifier"}


def test_memory_of_a_model_is_counted() -> None:
    model = gpt2()
    before = memory_bytes(model)
    assert before == 4 * sum(p.numel() for p in model.parameters())  # tied weights once
    weights = 2 * 12 * 32 * 32  # of 8 layers; 6144 or 4096 ... weights each
    quantise_linears(model, block_size=64, double=False)
    tables = 8 * 16 * 4
    assert memory_bytes(model) == before - 4 * weights + weights // 2 + weights // 64 * 4 + tables


def test_a_layer_in_two_places_is_replaced_in_both() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    quantise_linears(model)
    assert isinstance(model[0], QuantisedLinear) and model[0] is model[2]


@pytest.mark.parametrize("settings", SETTINGS)
def test_round_trip_through_safetensors(settings: dict[str, Any], tmp_path: Path) -> None:
    model, x = quantise_linears(bert(), **settings), inputs("bert")
    save_file(model.state_dict(), tmp_path / "direct.safetensors")
    torch.manual_seed(1)
    twin = quantise_linears(bert(), **settings)
    assert not torch.equal(outputs(twin, x), outputs(model, x))
    twin.load_state_dict(load_file(tmp_path / "direct.safetensors"))
    assert torch.equal(outputs(twin, x), outputs(model, x))
    path = save_model(model, tmp_path / "model.safetensors")
    assert path.stat().st_size < 0.9 * memory_bytes(bert())
    torch.manual_seed(2)
    third = load_model(path, quantise_linears(bert(), **settings))
    assert torch.equal(outputs(third, x), outputs(model, x))


def test_levels_come_from_the_file() -> None:
    """A file of int4 codes is not read with the levels of NF4."""
    model, twin = nn.Linear(8, 8), nn.Linear(8, 8)
    four_bit = QuantisedLinear(model, levels=torch.linspace(-1, 1, 16))
    nf4 = QuantisedLinear(twin)
    nf4.load_state_dict(four_bit.state_dict())
    assert torch.equal(nf4.weight, four_bit.weight)


def test_with_lora() -> None:
    """QLoRA: only the adapter trains; merging needs a weight that can be written."""
    lora = pytest.importorskip("tlcourse.lora")
    model, x = quantise_linears(bert()), inputs("bert")
    start = outputs(model, x)
    config = lora.LoRAConfig(
        rank=2, target_modules=("query", "value"), modules_to_save=("classifier",)
    )
    lora.add_lora(model, config)
    assert torch.equal(outputs(model, x), start)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    buffers = {name: part.clone() for name, part in model.named_buffers()}
    for _ in range(3):
        F.cross_entropy(outputs(model, x), torch.tensor([0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(part, buffers[name]) for name, part in model.named_buffers())
    trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "weight", "bias"}
    adapted = outputs(model, x)
    assert (adapted - start).abs().max() > 1e-3
    dequantise_linears(model)
    torch.testing.assert_close(outputs(model, x), adapted)
    lora.merge_lora(model)
    torch.testing.assert_close(outputs(model, x), adapted)


def test_a_quantised_weight_is_never_replaced_in_silence() -> None:
    layer = QuantisedLinear(nn.Linear(8, 8))
    with pytest.raises(TypeError, match=r"cannot be replaced.*dequantise_linears\(model\) first"):
        layer.weight = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(AttributeError):
        layer.weight = torch.zeros(8, 8)


def test_refuses_what_is_no_linear_layer() -> None:
    with pytest.raises(TypeError, match="got Conv2d"):
        QuantisedLinear(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="the layer is quantised already"):
        QuantisedLinear(QuantisedLinear(nn.Linear(8, 8)))


def test_refuses_names_and_leaves_the_model_alone() -> None:
    model = bert()
    for name in ("quary", "LayerNorm", "word_embeddings"):
        with pytest.raises(ValueError, match=rf"named '{name}'; these can: .*self\.query, "):
            quantise_linears(model, ["query", name])
    with pytest.raises(ValueError, match="named 'lm_head'"):  # it is the embedding
        quantise_linears(gpt2(), ["lm_head"])
    with torch.no_grad():
        model.bert.pooler.dense.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="x must be finite, got nan"):
        quantise_linears(model)
    assert not quantised_names(model)


def test_refuses_a_model_with_adapters() -> None:
    lora = pytest.importorskip("tlcourse.lora")
    config = lora.LoRAConfig(rank=2, modules_to_save=("classifier",))
    with pytest.raises(ValueError, match="LoRALinear; quantise before you adapt"):
        quantise_linears(lora.add_lora(bert(), config))


def test_freezing_and_counting_go_on() -> None:
    model = tl.freeze(quantise_linears(vit()))
    model.train()
    x = inputs("vit").requires_grad_()
    outputs(model, x).sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
