"""Adapters on disk, in the format of Hugging Face peft, both ways.

Bottleneck adapters, BitFit and last layers have no such format: use ``tl.save_model`` for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tlcourse.adapters import IA3Config, IA3Linear, add_ia3
from tlcourse.freezing import head_name
from tlcourse.lora import LoRAConfig, LoRALinear, add_lora
from tlcourse.wrapping import (
    WrapConfig,
    WrappedLayer,
    find_saved,
    find_targets,
    is_in,
    layer_size,
    matching,
    stores_transposed,
    wrapped_layers,
)

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # peft's two wrappers
# Settings of peft that do not change what a loaded adapter computes. Others must be off.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "fan_in_fan_out", "inference_mode",
    "init_ia3_weights", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
}  # fmt: skip
NAMES = ("target_modules", "feedforward_modules", "modules_to_save")
LORA_SETTINGS = {  # peft's name -> ours
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rank_stabilised",
}  # fmt: skip
# Starts of LoRA that leave the base model as it is. PiSSA, OLoRA and others change it.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Write the LoRA or (IA)3 layers of a model, and its ``modules_to_save``.

    ``peft.PeftModel.from_pretrained(fresh_model, folder)`` reads the folder, and so does
    ``load_adapter``. The base model is not in it. Merged layers are saved as if unmerged.

    Args:
        model: as ``add_lora`` or ``add_ia3`` left it, trained.
        folder: made if need be; an adapter in it is replaced, other files stay.

    Returns:
        The folder.

    Raises:
        ValueError: if the model has no such layers, or a trainable parameter or the head would
            not be in the files, or peft would read them otherwise. Nothing is written then.
    """
    layers = wrapped_layers(model)
    config = _common_config(model, layers)
    saved = find_saved(model, config.modules_to_save)
    _check_nothing_is_lost(model, layers, saved)
    _check_peft_agrees(model, layers, saved)
    tensors = _head_tensors(model, saved)
    for full, layer in layers.items():
        for key, tensor in _layer_tensors(layer).items():
            tensors[f"{PREFIX}{full}.{key}"] = tensor
    folder = Path(folder)
    _write(folder, tensors, _to_peft(config, model, layers))
    return folder


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put a saved LoRA or (IA)3 adapter into a model, in place.

    Args:
        model: the plain base model with a head of the same shape, as it was before ``add_lora``.
        folder: written by ``save_adapter``, or by ``save_pretrained`` of peft.

    Returns:
        The same model, in evaluation mode. As after ``add_lora`` the adapter is trainable, so
        that it can be trained further.

    Raises:
        FileNotFoundError: if one of the two files is missing.
        ValueError: if the files are of a method or have a setting that is not known here, do not
            fit the model (names the first key that is missing, left over, or has another shape),
            or are broken; or as for ``add_lora``. The model is then unchanged.
        TypeError: if a setting has the wrong type; the model is then unchanged.
    """
    folder = Path(folder)
    tensors, settings = _read(folder)
    config = _from_peft(settings, model, folder)
    saved = find_saved(model, config.modules_to_save)
    feedforward = matching(model, getattr(config, "feedforward_modules", ()))
    expected = {key: tuple(t.shape) for key, t in _head_tensors(model, saved).items()}
    for full in find_targets(model, config):
        layer = model.get_submodule(full)
        for key, shape in _layer_shapes(config, layer, full in feedforward).items():
            expected[f"{PREFIX}{full}.{key}"] = shape
        _drop_base(tensors, full, layer, folder)
    _check_fit(tensors, expected, folder)

    add_ia3(model, config) if isinstance(config, IA3Config) else add_lora(model, config)
    places = _head_tensors(model, saved)
    for full, wrapped in wrapped_layers(model).items():
        for key, place in _layer_tensors(wrapped).items():
            places[f"{PREFIX}{full}.{key}"] = place
    with torch.no_grad():
        for key, place in places.items():
            place.copy_(tensors[key])
    return model.eval()


def _common_config(model: nn.Module, layers: Mapping[str, WrappedLayer]) -> WrapConfig:
    """The one configuration of all wrapped layers."""
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapter to save; tl.save_model saves all")
    first = next(iter(layers.values()))
    for full, layer in layers.items():
        if not isinstance(layer, (LoRALinear, IA3Linear)):
            kind = type(layer).__name__
            raise ValueError(f"{full!r} is a {kind}, which has no peft format; use tl.save_model")
        if layer.config != first.config:
            raise ValueError(f"{full!r} has another configuration than the first adapted layer")
    saved = find_saved(model, first.config.modules_to_save)
    wanted = {n for n in matching(model, first.config.target_modules) if not is_in(n, saved)}
    for full in sorted(wanted ^ layers.keys()):
        how = "not adapted" if full in wanted else "adapted"
        raise ValueError(f"{full!r} is {how}, unlike target_modules={first.config.target_modules}")
    return first.config


def _check_nothing_is_lost(model: nn.Module, layers: Iterable[str], saved: list[str]) -> None:
    """Every trainable parameter, and the head in any case, must be in the files."""
    bases, head = [f"{full}.base" for full in layers], head_name(model)
    # An lm_head is pre-trained with its model; any other head is taken for new.
    heads = [head] if head and head.rpartition(".")[2] != "lm_head" else []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        adapter = is_in(name, layers) and not is_in(name, bases)
        if is_in(name, saved) or (adapter and not is_in(name, heads)):
            continue
        if parameter.requires_grad or is_in(name, heads):
            kind = "trainable parameter" if parameter.requires_grad else "parameter of the head"
            raise ValueError(
                f"{kind} {name!r} would not be in the files: name its module in modules_to_save, "
                "or save all with tl.save_model; nothing was written"
            )


def _check_peft_agrees(
    model: nn.Module, layers: Mapping[str, WrappedLayer], saved: list[str]
) -> None:
    """Refuse names that peft, which here wants no dot before them, would read otherwise."""
    config: Any = next(iter(layers.values())).config
    for full, module in model.named_modules():
        if full.endswith(config.modules_to_save) and not is_in(full, saved):
            field = "modules_to_save"
        elif isinstance(module, IA3Linear) and not module.is_feedforward:
            if not full.endswith(config.feedforward_modules):
                continue
            field = "feedforward_modules"
        else:
            continue
        names = getattr(config, field)
        raise ValueError(f"peft would count {full!r}, as its name ends so, to {field}={names}")


def _head_tensors(model: nn.Module, saved: Iterable[str]) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{full}.{key}": tensor
        for full in saved
        for key, tensor in model.get_submodule(full).state_dict().items()
    }


def _layer_shapes(
    config: WrapConfig, layer: nn.Module, is_feedforward: bool
) -> dict[str, tuple[int, ...]]:
    """Shapes in the files, of a layer not wrapped yet."""
    inputs, outputs = layer_size(layer)
    if isinstance(config, LoRAConfig):
        return {"lora_A.weight": (config.rank, inputs), "lora_B.weight": (outputs, config.rank)}
    return {"ia3_l": (1, inputs) if is_feedforward else (outputs, 1)}


def _layer_tensors(layer: WrappedLayer) -> dict[str, Tensor]:
    """What goes into the files, as views that can be filled."""
    if isinstance(layer, LoRALinear):
        return {"lora_A.weight": layer.lora_A, "lora_B.weight": layer.lora_B}
    assert isinstance(layer, IA3Linear)
    vector = layer.ia3_l.detach()
    return {"ia3_l": vector[None, :] if layer.is_feedforward else vector[:, None]}


def _to_peft(
    config: WrapConfig, model: nn.Module, layers: Mapping[str, WrappedLayer]
) -> dict[str, Any]:
    kind = type(model)
    settings: dict[str, Any] = {
        "auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "fan_in_fan_out": any(stores_transposed(layer.base) for layer in layers.values()),
        "inference_mode": True,
        "modules_to_save": list(config.modules_to_save) or None,
        "target_modules": list(config.target_modules),
        "task_type": None,
    }
    if isinstance(config, IA3Config):
        names = list(config.feedforward_modules)
        return settings | {"peft_type": "IA3", "feedforward_modules": names}
    own = {theirs: getattr(config, ours) for theirs, ours in LORA_SETTINGS.items()}
    return settings | own | {"peft_type": "LORA", "bias": "none", "init_lora_weights": True}


def _from_peft(
    settings: Mapping[str, Any], model: nn.Module, folder: Path
) -> LoRAConfig | IA3Config:
    kind = settings.get("peft_type")
    if kind not in ("LORA", "IA3"):
        raise ValueError(f"{folder}: peft_type must be 'LORA' or 'IA3', got {kind!r}")
    known = {"peft_type", *NAMES, *HARMLESS, "init_lora_weights", *LORA_SETTINGS}
    for name, value in settings.items():
        if name not in known and value not in (None, False, "none", {}, []):
            raise ValueError(f"{folder}: {name}={value!r} is not supported here; load it with peft")
    if (start := settings.get("init_lora_weights", True)) not in PLAIN_STARTS:
        raise ValueError(f"{folder}: init_lora_weights={start!r} changed the base; load with peft")
    names: dict[str, Any] = {}
    for field in NAMES if kind == "IA3" else (NAMES[0], NAMES[2]):
        value = settings.get(field) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{folder}: {field} must be a list of names, got {value!r}")
        # As in peft, a name may match nothing (it adds "score" where there is a "classifier").
        names[field] = tuple(n for n in value if matching(model, [n]) or not matching(model, value))
    if kind == "IA3":
        return IA3Config(**names)
    settings = {"use_rslora": False, **settings}  # files from before 2024 lack it
    if missing := sorted(LORA_SETTINGS.keys() - settings.keys()):
        raise ValueError(f"{folder}: {CONFIG_FILE} lacks {missing[0]!r}")
    return LoRAConfig(**names, **{ours: settings[n] for n, ours in LORA_SETTINGS.items()})


def _drop_base(tensors: dict[str, Tensor], full: str, layer: nn.Module, folder: Path) -> None:
    """Take out a base weight, which peft writes beside an adapted ``lm_head``; it must be ours."""
    for name, own in layer.named_parameters():
        key = f"{PREFIX}{full}.base_layer.{name}"
        theirs = tensors.pop(key, None)
        if theirs is not None and not torch.equal(theirs.to(own.dtype), own.detach().cpu()):
            raise ValueError(f"{folder}: {key!r} is not the model's own {name}: another base model")


def _check_fit(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    for key in sorted(expected.keys() ^ tensors.keys()):
        where = "the file lacks" if key in expected else "the model has no place for"
        raise ValueError(f"{folder}: {where} {key!r}; was it saved from another model?")
    for key, shape in expected.items():
        if (got := tuple(tensors[key].shape)) != shape:
            raise ValueError(f"{folder}: {key!r} has shape {got}, the model expects {shape}")


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} in {folder} (pickled weights are never read)")
    try:
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: the files are broken ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{folder}: {CONFIG_FILE} must hold an object, got {settings!r}")
    return tensors, settings


def _write(folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Both files or none; stopped between the two moves, it leaves no adapter, never a mixture."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = {name: folder / f"{name}.partial" for name in (WEIGHTS_FILE, CONFIG_FILE)}
    copies = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
    try:
        save_file(copies, partial[WEIGHTS_FILE], metadata={"format": "pt"})
        partial[WEIGHTS_FILE].chmod(0o644)
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        partial[CONFIG_FILE].write_text(text, encoding="utf-8")
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        for name, path in partial.items():
            path.replace(folder / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
