from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
import torchvision
from torch import nn

import tlcourse as tl
from tlcourse import freezing


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5)
        )
        self.head = nn.Linear(4 * 36, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def images() -> torch.Tensor:
    return torch.randn(6, 3, 8, 8) + 3.0


def train_some_steps(model: nn.Module) -> None:
    """A loop as learners write it, with model.train() every time."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(3):
        model.train()
        model(images()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(before: dict[str, torch.Tensor], module: nn.Module) -> set[str]:
    after = module.state_dict()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_nothing_frozen_moves_and_all_else_does() -> None:
    model = Net()
    tl.freeze(model.backbone)
    before = state(model)
    train_some_steps(model)
    assert moved(before, model) == {"head.weight", "head.bias"}


def test_without_freezing_the_same_loop_moves_parameters_and_buffers() -> None:
    model = Net()
    before = state(model)
    train_some_steps(model)
    # A bias in front of BatchNorm has no gradient: the mean is subtracted again.
    assert moved(before, model) | {"backbone.0.bias"} == set(before)


def test_gradients_off_alone_would_let_the_buffers_move() -> None:
    model = Net()
    model.backbone.requires_grad_(False)
    before = state(model)
    train_some_steps(model)
    assert "backbone.1.running_mean" in moved(before, model)


def test_stays_in_evaluation_mode_whatever_is_asked() -> None:
    model = Net()
    tl.freeze(model.backbone)
    assert model.training and not any(part.training for part in model.backbone.modules())
    for ask in (model.train, model.backbone.train, model.backbone[1].train, model.eval):
        ask()
        assert not any(part.training for part in model.backbone.modules())
    model.train()
    assert model.head.training and model.training
    x = images()
    torch.testing.assert_close(model.backbone(x), model.backbone(x))  # no dropout


def test_unfreeze_restores_exactly() -> None:
    model = Net()
    model.backbone[0].bias.requires_grad_(False)
    model.backbone[4].eval()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: part.training for name, part in model.named_modules()}
    attributes = {name: set(vars(part)) for name, part in model.named_modules()}
    tl.unfreeze(tl.freeze(tl.freeze(model.backbone)))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert {name: set(vars(part)) for name, part in model.named_modules()} == attributes
    model.eval().train()
    assert all(part.training for part in model.modules())


@pytest.mark.parametrize("mode", [True, False])
def test_unfreeze_takes_the_mode_asked_for_meanwhile(mode: bool) -> None:
    model = Net().train(not mode)
    tl.freeze(model.backbone)
    model.train(mode)
    tl.unfreeze(model.backbone)
    assert {part.training for part in model.modules()} == {mode}


def test_a_part_of_a_frozen_model_can_be_unfrozen() -> None:
    model = Net()
    tl.freeze(model)
    tl.unfreeze(model.head)
    model.train()
    assert model.head.training and not model.backbone.training
    before = state(model)
    train_some_steps(model)
    assert moved(before, model) == {"head.weight", "head.bias"}


def test_unfreeze_makes_trainable_what_was_switched_off_by_hand() -> None:
    model = Net()
    model.requires_grad_(False)
    tl.unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("affine", [False, True])
def test_frozen_statistics_stay_while_the_rest_trains(affine: bool) -> None:
    model = Net()
    tl.freezing.freeze_statistics(model, affine=affine)
    before = state(model)
    train_some_steps(model)
    batchnorm = {"backbone.1.weight", "backbone.1.bias"}
    still = {name for name in before if "running" in name or "tracked" in name}
    assert moved(before, model) == set(before) - still - (batchnorm if affine else set())
    assert model.training and model.backbone[4].training and not model.backbone[1].training


def test_frozen_statistics_normalise_by_the_running_averages() -> None:
    norm = tl.freezing.freeze_statistics(nn.BatchNorm2d(3)).train()
    norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    norm.running_var.copy_(torch.tensor([4.0, 9.0, 1.0]))
    x = images()
    mean, var = norm.running_mean.view(1, 3, 1, 1), norm.running_var.view(1, 3, 1, 1)
    torch.testing.assert_close(norm(x), (x - mean) / (var + norm.eps).sqrt())


def test_unfreeze_undoes_frozen_statistics() -> None:
    model = Net()
    model.backbone[1].bias.requires_grad_(False)
    attributes = {name: set(vars(part)) for name, part in model.named_modules()}
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    tl.unfreeze(tl.freezing.freeze_statistics(model, affine=True))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert {name: set(vars(part)) for name, part in model.named_modules()} == attributes
    assert model.backbone[1].training


def test_what_is_frozen_already_stays_frozen() -> None:
    model = Net()
    tl.freezing.freeze_statistics(tl.freeze(model))
    assert not any(p.requires_grad for p in model.parameters())
    model = tl.freezing.freeze_statistics(Net())
    tl.freeze(model)  # on top: scale and shift stop, too
    before = state(model)
    tl.unfreeze(model.head)
    train_some_steps(model)
    assert moved(before, model) == {"head.weight", "head.bias"}


def test_tied_parameters_come_back() -> None:
    model = nn.ModuleDict({"embed": nn.Linear(3, 3), "head": nn.Linear(3, 3)})
    model["head"].weight = model["embed"].weight
    tl.unfreeze(tl.freeze(model))
    assert all(p.requires_grad for p in model.parameters())


def test_drops_stale_gradients() -> None:
    model = Net()
    model(images()).sum().backward()
    tl.freeze(model.backbone)
    assert all(p.grad is None for p in model.backbone.parameters())
    assert model.head.weight.grad is not None


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _saved])
def test_a_copy_is_frozen_by_itself(copied) -> None:
    model = Net()
    keys = list(model.state_dict())
    tl.freeze(model.backbone)
    assert list(model.state_dict()) == keys
    twin = copied(model)
    tl.unfreeze(model.backbone)
    before = state(twin)
    train_some_steps(twin)
    assert moved(before, twin) == {"head.weight", "head.bias"}
    tl.unfreeze(twin.backbone)
    twin.train()
    assert twin.backbone[1].training and twin.backbone[1].weight.requires_grad


def test_count_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    assert freezing.count_parameters(model) == freezing.ParameterCount(16 + 20, 16 + 20)
    tl.freeze(model[0])
    count = freezing.count_parameters(model)
    assert count == freezing.ParameterCount(20, 36)
    assert str(count) == "20 of 36 parameters are trainable (55.56%)"
    model[1].weight = model[0].weight = nn.Parameter(torch.zeros(4, 4))  # shared: once
    assert freezing.count_parameters(model).total == 16 + 4 + 4


def vision_transformer() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 4, 2, 16, 32, num_classes=5)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32, num_labels=4,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


MODELS = {
    "net": Net,
    "resnet18": torchvision.models.resnet18,
    "vit": vision_transformer,
    "swin": lambda: torchvision.models.SwinTransformer([4, 4], 8, [2, 2], [2, 2], [4, 4]),
    "mobilenet": torchvision.models.mobilenet_v3_small,
    "bert": bert,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize("head_lr", [None, 0.5])
def test_every_trainable_parameter_is_in_exactly_one_group(
    name: str, layer_decay: float | None, head_lr: float | None
) -> None:
    model = MODELS[name]()
    next(model.parameters()).requires_grad_(False)
    groups = freezing.parameter_groups(model, 0.1, 0.01, head_lr, layer_decay)
    found = [id(p) for group in groups for p in group["params"]]
    trainable = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    assert len(found) == len(set(found))
    assert set(found) == set(trainable)
    for group in groups:
        assert [trainable[id(p)] for p in group["params"]] == group["names"]
    torch.optim.AdamW(groups)


@pytest.mark.parametrize("name", MODELS)
def test_biases_and_norms_are_not_decayed_and_other_weights_are(name: str) -> None:
    model = MODELS[name]()
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    expected = set()
    for path, module in model.named_modules():
        for parameter, _ in module.named_parameters(prefix=path, recurse=False):
            if isinstance(module, norms) or parameter.endswith("bias"):
                expected.add(parameter)
    groups = freezing.parameter_groups(model, 0.1, 0.01)
    assert {n for g in groups if g["weight_decay"] == 0.0 for n in g["names"]} == expected
    assert {g["weight_decay"] for g in groups} == {0.0, 0.01}


def test_norms_over_several_dimensions_are_not_decayed() -> None:
    model = nn.Sequential(nn.LayerNorm([4, 3, 3]), nn.Conv2d(4, 2, 3))
    groups = freezing.parameter_groups(model, 0.1, 0.01)
    assert [n for g in groups if g["weight_decay"] for n in g["names"]] == ["1.weight"]


def test_vectors_of_any_name_are_not_decayed() -> None:
    model = nn.Linear(2, 2)
    model.layer_scale = nn.Parameter(torch.ones(2))
    groups = freezing.parameter_groups(model, 0.1, 0.01)
    assert [n for g in groups if g["weight_decay"] for n in g["names"]] == ["weight"]


def test_layers_of_well_known_models() -> None:
    resnet = freezing.layer_names(torchvision.models.resnet18())
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert resnet == ["conv1", "bn1", *blocks, "fc"]
    layers = [f"encoder.layers.encoder_layer_{n}" for n in range(4)]
    assert freezing.layer_names(vision_transformer()) == [
        "conv_proj", *layers, "encoder.ln", "heads",
    ]  # fmt: skip
    encoder = [f"bert.encoder.layer.{n}" for n in range(3)]
    assert freezing.layer_names(bert()) == [
        "bert.embeddings", *encoder, "bert.pooler", "classifier",
    ]  # fmt: skip


def test_layer_decay_is_the_closed_form() -> None:
    model = bert()
    groups = freezing.parameter_groups(model, 0.1, 0.01, head_lr=0.7, layer_decay=0.5)
    rates = {name.rsplit(".", 1)[0]: g["lr"] for g in groups for name in g["names"]}
    assert rates["classifier"] == 0.7
    assert rates["bert.pooler.dense"] == pytest.approx(0.1 * 0.5)
    for layer in range(3):
        rate = rates[f"bert.encoder.layer.{layer}.output.dense"]
        assert rate == pytest.approx(0.1 * 0.5 ** (4 - layer))
    assert rates["bert.embeddings.word_embeddings"] == pytest.approx(0.1 * 0.5**5)


@pytest.mark.parametrize("name", MODELS)
def test_layer_decay_never_rises_towards_the_input(name: str) -> None:
    model = MODELS[name]()
    groups = freezing.parameter_groups(model, 0.1, 0.0, layer_decay=0.8)
    rates = [group["lr"] for group in groups]
    assert all(low <= high for low, high in itertools.pairwise(rates))
    assert rates[0] < rates[-1] == 0.1


def test_class_token_and_positions_learn_as_slowly_as_the_input() -> None:
    model = vision_transformer()
    groups = freezing.parameter_groups(model, 0.1, 0.0, layer_decay=0.5)
    rates = {name: g["lr"] for g in groups for name in g["names"]}
    assert rates["class_token"] == rates["encoder.pos_embedding"] == rates["conv_proj.weight"]


def test_loose_parameters_never_belong_to_the_head() -> None:
    model = nn.Module()
    model.prompt = nn.Parameter(torch.zeros(3))
    model.head = nn.Linear(3, 2)
    groups = freezing.parameter_groups(model, 0.1, 0.0, head_lr=0.9, layer_decay=0.5)
    rates = {name: g["lr"] for g in groups for name in g["names"]}
    assert rates == {"prompt": 0.05, "head.weight": 0.9, "head.bias": 0.9}


def test_head_is_found_inside_the_wrapper_of_peft() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    model = peft.get_peft_model(bert(), config)
    assert freezing.head_name(model) == "base_model.model.classifier"
    groups = freezing.parameter_groups(model, 0.1, 0.0, head_lr=0.9)
    for group in groups:
        for name in group["names"]:
            assert group["lr"] == (0.9 if "classifier" in name else 0.1)
    assert {n for g in groups for n in g["names"]} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr must be > 0, got 0"),
        ({"head_lr": -1.0}, "head_lr must be > 0, got -1"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0, got -1"),
        ({"layer_decay": 0.0}, r"layer_decay must be in \(0, 1\], got 0"),
        ({"layer_decay": 1.5}, r"layer_decay must be in \(0, 1\], got 1.5"),
    ],
)
def test_refuses_bad_numbers(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        freezing.parameter_groups(Net(), **({"lr": 0.1, "weight_decay": 0.0} | settings))


def test_refuses_what_cannot_be_meant() -> None:
    model = tl.freeze(Net())
    with pytest.raises(ValueError, match="no trainable parameter: all 845 parameters of Net"):
        freezing.parameter_groups(model, 0.1, 0.0)
    with pytest.raises(ValueError, match=r"head_lr=0.2 .* no part of Sequential is named head"):
        freezing.parameter_groups(nn.Sequential(nn.Linear(2, 2)), 0.1, 0.0, head_lr=0.2)
