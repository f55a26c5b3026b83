from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import transformers
from safetensors.torch import load_file, save_file
from small_models import CASES, NAMES, bert, gpt2, logits, shake, vit
from torch import nn

import tlcourse as tl
from tlcourse.adapters import BottleneckConfig, IA3Config, add_bottlenecks, add_ia3, train_biases
from tlcourse.lora import LoRAConfig, LoRALinear, add_lora
from tlcourse.peft_files import CONFIG_FILE, WEIGHTS_FILE, load_adapter, save_adapter

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def lora(name: str = "bert", **settings: Any) -> LoRAConfig:
    case = CASES[name]
    defaults = {"rank": 3, "alpha": 5.0, "target_modules": case.targets}
    return LoRAConfig(**(defaults | {"modules_to_save": case.head} | settings))


def ia3(name: str = "bert") -> IA3Config:
    case = CASES[name]
    targets = case.outputs + case.feedforward
    return IA3Config(
        target_modules=targets,
        feedforward_modules=case.feedforward,
        modules_to_save=case.head,
    )


def add(model: nn.Module, config: LoRAConfig | IA3Config) -> nn.Module:
    return add_ia3(model, config) if isinstance(config, IA3Config) else add_lora(model, config)


def peft_config(config: LoRAConfig | IA3Config, **more: Any) -> Any:
    shared = {
        "target_modules": list(config.target_modules),
        "modules_to_save": list(config.modules_to_save) or None,
    }
    if isinstance(config, IA3Config):
        names = list(config.feedforward_modules)
        return peft.IA3Config(**(shared | {"feedforward_modules": names} | more))
    own = {"r": config.rank, "lora_alpha": config.alpha, "use_rslora": config.rank_stabilised}
    return peft.LoraConfig(**(shared | own | more))


def fresh(model: nn.Module) -> nn.Module:
    """The same base; another head, as after a restart."""
    twin = copy.deepcopy(model)
    if hasattr(twin, "head"):
        torch.manual_seed(99)
        twin.head.reset_parameters()
    return twin.eval()


def trained(config: LoRAConfig | IA3Config, plain: nn.Module) -> nn.Module:
    model = add(copy.deepcopy(plain), config).eval()
    for part in ("lora_", "ia3_", "head."):
        shake(model, part)
    return model


CONFIGS = {
    "lora": lora,
    "rslora": lambda name: lora(name, rank_stabilised=True, dropout=0.1),
    "ia3": ia3,
}


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", NAMES)
def test_our_files_load_in_peft_with_identical_logits(name: str, method: str, tmp_path) -> None:
    config, plain, inputs = CONFIGS[method](name), CASES[name].build(), CASES[name].inputs()
    ours = trained(config, plain)
    assert save_adapter(ours, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    theirs = peft.PeftModel.from_pretrained(fresh(plain), tmp_path / "new" / "folder").eval()
    expected = logits(ours, inputs)
    assert torch.equal(logits(theirs, inputs), expected)
    assert not torch.equal(expected, logits(plain.eval(), inputs))
    stored = json.loads((tmp_path / "new" / "folder" / CONFIG_FILE).read_text())
    assert stored["fan_in_fan_out"] is (name == "gpt2")
    if method != "ia3":
        assert stored["use_rslora"] is (method == "rslora")
    # Every key of the file was read, and nothing was made up.
    keys = load_file(tmp_path / "new" / "folder" / WEIGHTS_FILE).keys()
    assert keys == peft.get_peft_model_state_dict(theirs).keys()
    # What peft writes again is the same.
    theirs.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS_FILE)
    for key, tensor in load_file(tmp_path / "new" / "folder" / WEIGHTS_FILE).items():
        assert torch.equal(again[key], tensor)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", NAMES)
def test_peft_files_load_here_with_identical_logits(name: str, method: str, tmp_path) -> None:
    config, plain, inputs = CONFIGS[method](name), CASES[name].build(), CASES[name].inputs()
    theirs = peft.get_peft_model(copy.deepcopy(plain), peft_config(config)).eval()
    for part in ("lora_", "ia3_", "head.modules_to_save"):
        shake(theirs, part)
    theirs.save_pretrained(tmp_path)
    model = fresh(plain).train()
    ours = load_adapter(model, tmp_path)
    assert ours is model and not any(module.training for module in ours.modules())
    assert torch.equal(logits(ours, inputs), logits(theirs, inputs))
    theirs_trainable = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert tl.freezing.count_parameters(ours).trainable == theirs_trainable
    if method != "ia3":
        layer = next(m for m in ours.modules() if isinstance(m, LoRALinear))
        assert layer.config.rank_stabilised is (method == "rslora")
    save_adapter(ours, tmp_path / "again")  # and back once more
    back = peft.PeftModel.from_pretrained(fresh(plain), tmp_path / "again").eval()
    assert torch.equal(logits(back, inputs), logits(theirs, inputs))


@pytest.mark.parametrize("method", CONFIGS)
def test_round_trip_here_and_on_with_training(method: str, tmp_path) -> None:
    config, plain, inputs = CONFIGS[method]("vit"), vit(), CASES["vit"].inputs()
    ours = trained(config, plain)
    save_adapter(ours, tmp_path)
    back = load_adapter(fresh(plain), tmp_path)
    assert torch.equal(logits(back, inputs), logits(ours, inputs))
    names = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert {n for n, p in back.named_parameters() if p.requires_grad} == names
    loader = [(inputs["images"], torch.tensor([0, 1, 2, 0]))]
    history = tl.fit(back, loader, None, tl.TrainConfig(lr=0.01, num_steps=3, progress=False))
    assert history.train_loss[-1] < history.train_loss[0]


def test_a_transformers_classifier_with_a_task_type_loads_here(tmp_path) -> None:
    """peft adds the names "classifier" and "score" by itself; only one is there."""
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, num_labels=3,
    )  # fmt: skip
    plain = transformers.BertForSequenceClassification(config)
    theirs = peft.get_peft_model(
        copy.deepcopy(plain),
        peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "nothing"]),
    ).eval()
    shake(theirs, "lora_")
    shake(theirs, "classifier.modules_to_save")
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(copy.deepcopy(plain), tmp_path)
    inputs = CASES["bert"].inputs()
    assert torch.equal(logits(ours, inputs), logits(theirs, inputs))
    save_adapter(ours, tmp_path / "back")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "back").eval()
    assert torch.equal(logits(back, inputs), logits(ours, inputs))


def test_a_tied_lm_head_goes_both_ways(tmp_path) -> None:
    """peft writes the base weight of an adapted lm_head as well."""
    config, plain = lora("gpt2", target_modules=("c_attn", "lm_head")), gpt2().eval()
    theirs = peft.get_peft_model(copy.deepcopy(plain), peft_config(config)).eval()
    shake(theirs, "lora_")
    theirs.save_pretrained(tmp_path / "theirs")
    assert any("base_layer" in key for key in load_file(tmp_path / "theirs" / WEIGHTS_FILE))
    ours, inputs = load_adapter(copy.deepcopy(plain), tmp_path / "theirs"), CASES["gpt2"].inputs()
    assert torch.equal(logits(ours, inputs), logits(theirs, inputs))
    save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval()
    assert torch.equal(logits(back, inputs), logits(ours, inputs))
    with pytest.raises(ValueError, match="is not the model's own weight: another base model"):
        load_adapter(gpt2(), tmp_path / "theirs")  # other random weights


def test_merged_or_not_the_files_are_the_same(tmp_path) -> None:
    model = trained(lora(), bert())
    save_adapter(model, tmp_path / "a")
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.merge()
    save_adapter(model, tmp_path / "b")
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_numpy_scalars_are_written(tmp_path) -> None:
    config = lora(rank=np.int64(2), alpha=np.float32(3))
    save_adapter(trained(config, bert()), tmp_path)
    assert load_adapter(bert(), tmp_path) is not None


def test_a_frozen_adapter_is_saved_with_its_head(tmp_path) -> None:
    plain, inputs = bert(), CASES["bert"].inputs()
    model = tl.freeze(trained(lora(), plain))
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(fresh(plain), tmp_path), inputs), logits(model, inputs))


def test_half_precision_models_go_through(tmp_path) -> None:
    plain, inputs = bert().bfloat16(), CASES["bert"].inputs()
    model = trained(lora(), plain)
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    assert {t.dtype for k, t in tensors.items() if "lora" in k} == {torch.float32}
    back = load_adapter(fresh(plain), tmp_path)
    assert torch.equal(logits(back, inputs), logits(model, inputs))


def not_saved(model: nn.Module, folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_adapter(model, folder)
    assert not folder.exists()


def test_refuses_to_lose_a_trainable_parameter(tmp_path) -> None:
    folder = tmp_path / "folder"
    model = trained(lora(), bert())
    norm = tl.unfreeze(model.backbone["body"].encoder.layer[0].output.LayerNorm)
    not_saved(model, folder, r"'backbone.body.*LayerNorm.weight' would not be in the files")
    tl.freeze(norm)
    tl.unfreeze(model.backbone["body"].encoder.layer[1].attention.self.query.base)
    not_saved(model, folder, r"'backbone.body.*query.base.weight' would not be in the files")
    tl.freeze(model.backbone["body"].encoder.layer[1].attention.self.query.base)
    model.extra = nn.Parameter(torch.zeros(2))
    not_saved(model, folder, "'extra' would not be in the files")
    model.extra.requires_grad_(False)
    save_adapter(model, folder)


def test_refuses_to_leave_a_head_behind(tmp_path) -> None:
    folder = tmp_path / "folder"
    for model in (bert(), vit()):
        name = "vit" if isinstance(model, tl.Classifier) else "bert"
        adapted = add_lora(model, lora(name, modules_to_save=()))
        not_saved(adapted, folder, "parameter of the head 'head.weight' would not be in the files")
        tl.unfreeze(adapted.head)  # trained behind the back of the configuration
        not_saved(adapted, folder, "trainable parameter 'head.weight' would not be in the files")
    on_head = add_lora(bert(), lora(target_modules=("query", "head"), modules_to_save=()))
    not_saved(on_head, folder, "'head.lora_A' would not be in the files")


def test_a_head_may_be_saved_under_the_name_of_its_layer(tmp_path) -> None:
    model = torchvision.models.VisionTransformer(16, 8, 1, 2, 32, 64, num_classes=3)
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it at zero
    plain, images = copy.deepcopy(model).eval(), torch.randn(2, 3, 16, 16)
    for names in (("head",), ("heads",)):
        config = LoRAConfig(rank=2, target_modules=("out_proj", "mlp.3"), modules_to_save=names)
        ours = trained(config, plain)
        shake(ours, "heads")
        save_adapter(ours, tmp_path)
        back = load_adapter(copy.deepcopy(plain), tmp_path)
        assert torch.equal(back(images), ours(images))


def test_refuses_what_has_no_peft_format(tmp_path) -> None:
    folder = tmp_path / "folder"
    not_saved(bert(), folder, "TextClassifier has no adapter to save; tl.save_model")
    not_saved(train_biases(bert()), folder, "has no adapter to save; tl.save_model")
    bottlenecks = add_bottlenecks(bert(), BottleneckConfig(bottleneck_dim=2))
    not_saved(bottlenecks, folder, "BottleneckLinear, which has no peft format; .*tl.save_model")


def test_refuses_layers_that_do_not_fit_the_configuration(tmp_path) -> None:
    folder = tmp_path / "folder"
    model = trained(lora(), bert())
    attention = model.backbone["body"].encoder.layer[1].attention.self
    attention.query = attention.query.base
    not_saved(model, folder, "query' is not adapted, unlike target_modules")
    model = trained(lora(), bert())
    attention = model.backbone["body"].encoder.layer[1].attention.self
    attention.key = LoRALinear(attention.key, lora())
    not_saved(model, folder, "key' is adapted, unlike target_modules")
    attention.key = LoRALinear(attention.key.base, lora(rank=2))
    not_saved(model, folder, "key' has another configuration")


def test_refuses_names_that_peft_reads_otherwise(tmp_path) -> None:
    """peft wants no dot before the names in modules_to_save and feedforward_modules."""
    folder = tmp_path / "folder"
    model = bert()
    model.overhead = nn.Linear(2, 2)
    not_saved(add_lora(model, lora()), folder, "peft would count 'overhead'.*modules_to_save")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.predense, self.head = (nn.Linear(2, 2) for _ in range(3))

    ahead = Net()
    ahead.ahead = ahead.predense
    del ahead.predense
    config = IA3Config(target_modules=("dense", "ahead"), feedforward_modules=("dense",))
    not_saved(add_ia3(ahead, config), folder, "peft would count 'ahead'.*modules_to_save")
    config = IA3Config(target_modules=("dense", "predense"), feedforward_modules=("dense",))
    not_saved(add_ia3(Net(), config), folder, "peft would count 'predense'.*feedforward_modules")


def saved(folder: Path, model: nn.Module | None = None) -> tuple[dict[str, Any], dict]:
    """A good adapter; its settings and tensors, to be spoilt."""
    save_adapter(trained(lora(), bert()) if model is None else model, folder)
    tensors = load_file(folder / WEIGHTS_FILE)  # mapped: gone once the file is written over
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    return json.loads((folder / CONFIG_FILE).read_text()), tensors


def not_loaded(folder: Path, message: str, error: type = ValueError) -> None:
    model = bert()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {n: (type(m), m.training) for n, m in model.named_modules()}
    with pytest.raises(error, match=message):
        load_adapter(model, folder)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trainable
    assert {n: (type(m), m.training) for n, m in model.named_modules()} == modes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "ADALORA"}, "peft_type must be 'LORA' or 'IA3', got 'ADALORA'"),
        ({"peft_type": None}, "got None"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"rank_pattern": {"query": 4}}, "rank_pattern=.* is not supported"),
        ({"layers_to_transform": [0]}, r"layers_to_transform=\[0\] is not supported"),
        ({"exclude_modules": ["key"]}, "exclude_modules=.* is not supported"),
        ({"something_new": 1.5}, "something_new=1.5 is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changed the base"),
        ({"target_modules": ".*query"}, "target_modules must be a list of names, got '.*query'"),
        ({"target_modules": ["no"]}, "is named 'no'; names of layers that can be adapted: query"),
        ({"target_modules": None}, "target_modules must hold names"),
        ({"target_modules": ["query", "value"]}, "the model has no place for 'base_model.*dense"),
        ({"modules_to_save": None}, "the model has no place for 'base_model.model.head.bias'"),
        ({"modules_to_save": ["classifier"]}, "is named 'classifier'"),
        ({"r": 4}, r"lora_A.weight' has shape \(3, 32\), the model expects \(4, 32\)"),
        ({"r": 0}, "rank must be >= 1, got 0"),
        ({"peft_type": "IA3", "feedforward_modules": []}, "lacks .*ia3_l|no place for .*lora_A"),
    ],
)
def test_refuses_settings_that_do_not_fit(change: dict, message: str, tmp_path) -> None:
    settings, _ = saved(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(settings | change))
    not_loaded(tmp_path, message)


def test_refuses_tensors_that_do_not_fit(tmp_path) -> None:
    _, tensors = saved(tmp_path)
    head, some = "base_model.model.head.weight", next(k for k in tensors if "lora_B" in k)
    for spoilt, message in (
        ({k: t for k, t in tensors.items() if k != head}, f"the file lacks '{head}'"),
        ({k: t for k, t in tensors.items() if k != some}, f"the file lacks '{some}'"),
        (tensors | {"extra": torch.zeros(1)}, "the model has no place for 'extra'"),
        (tensors | {head: torch.zeros(5, 32)}, r"head.weight' has shape \(5, 32\), .* \(3, 32\)"),
        (tensors | {some: tensors[some].T.contiguous()}, "lora_B.weight' has shape"),
    ):
        save_file(spoilt, tmp_path / WEIGHTS_FILE)
        not_loaded(tmp_path, message)


def test_refuses_a_model_that_is_adapted_already(tmp_path) -> None:
    saved(tmp_path)
    model = trained(lora(), bert())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="is a LoRALinear already"):
        load_adapter(model, tmp_path)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_refuses_missing_and_broken_files(tmp_path) -> None:
    settings, tensors = saved(tmp_path)
    good = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(good[: len(good) // 2])
    not_loaded(tmp_path, "the files are broken")
    (tmp_path / WEIGHTS_FILE).unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    not_loaded(tmp_path, "no adapter_model.safetensors .*never read", FileNotFoundError)
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    for text, message in (("{", "the files are broken"), ("[]", "must hold an object")):
        (tmp_path / CONFIG_FILE).write_text(text)
        not_loaded(tmp_path, message)
    del settings["lora_alpha"]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(settings))
    not_loaded(tmp_path, "lacks 'lora_alpha'")
    (tmp_path / CONFIG_FILE).unlink()
    not_loaded(tmp_path, "no adapter_config.json", FileNotFoundError)
    not_loaded(tmp_path / "nowhere", "no adapter_config.json", FileNotFoundError)


def test_saving_replaces_an_adapter_and_nothing_else(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    plain, inputs = bert(), CASES["bert"].inputs()
    save_adapter(trained(lora(), plain), tmp_path)
    second = trained(ia3(), plain)
    save_adapter(second, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        CONFIG_FILE, WEIGHTS_FILE, "notes.txt",
    ]  # fmt: skip
    assert torch.equal(logits(load_adapter(fresh(plain), tmp_path), inputs), logits(second, inputs))
    assert (tmp_path / WEIGHTS_FILE).stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("at", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_failing_disk_leaves_no_mixture(at: str, tmp_path, monkeypatch) -> None:
    saved(tmp_path)
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if Path(target).name == at:
            raise OSError("disk full")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(trained(ia3(), bert()), tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.partial"))
    not_loaded(tmp_path, "no adapter_config.json", FileNotFoundError)
