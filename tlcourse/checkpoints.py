"""Checkpoints of a run, so that it can go on where it was: whole or not at all, checked when read.

A checkpoint is two files: ``step-00000120.safetensors`` with all tensors, then
``step-00000120.json`` with the rest and the sha256 of the tensors. It counts once the second is
there. Each file is written beside its place, flushed to the disk and renamed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import random
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tlcourse.config import TrainConfig
from tlcourse.saving import PARTIAL, save_state, write_whole

# What a run may change when it goes on: nothing that its numbers depend on.
FREE_SETTINGS = {
    "checkpoint_dir", "checkpoint_minutes", "compile", "fsdp", "keep_checkpoints",
    "log_dir", "log_to", "penalty", "progress",
}  # fmt: skip
_GENERATORS = (torch.Generator, np.random.Generator)


@dataclass(frozen=True)
class Checkpoint:
    """What was read.

    Attributes:
        name: "step-" and the number of the step.
        tensors: name -> tensor on the CPU.
        best: the best weights up to there, or None.
        facts: what is no tensor.
    """

    name: str
    tensors: dict[str, Tensor]
    best: dict[str, Tensor] | None
    facts: dict[str, Any]


def write_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    best: tuple[int, Mapping[str, Tensor]] | None,
    facts: Mapping[str, Any],
    keep: int,
    best_is_there: bool = False,
) -> None:
    """Write a checkpoint; then delete those older than the ``keep`` newest, and any of later steps.

    Those of later steps are what a run left that has gone on from an earlier one: damaged.

    Args:
        folder: made if need be.
        step: updates made so far.
        tensors: copied to the CPU.
        best: the step with the best weights and these weights, or None. They have a file of
            their own.
        facts: JSON.
        keep: >= 1.
        best_is_there: the file of the best weights is known to be good, and not written again.

    Raises:
        OSError: if the disk is full, say. What was there before is then as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name, content = f"step-{step:08d}", dict(facts)
    if best is not None:
        best_file = folder / f"best-{best[0]:08d}.safetensors"
        if not (best_is_there and best_file.is_file()):
            save_state(best[1], best_file)
        content["best"] = {"file": best_file.name, "sha256": _sha256(best_file)}
    data = folder / f"{name}.safetensors"
    save_state(tensors, data)
    content["sha256"] = _sha256(data)
    text = json.dumps(content).encode()
    write_whole(folder / f"{name}.json", lambda path: path.write_bytes(text))
    _prune(folder, name, keep)


def read_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None. Each one that is not gives a warning."""
    for path in sorted(folder.glob("step-*.json"), reverse=True):
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            warnings.warn(
                f"checkpoint {path.stem} in {folder} is damaged ({error}); "
                "trying the one before it",
                stacklevel=2,
            )
    return None


def has_checkpoints(folder: Path) -> bool:
    return any(folder.glob("step-*.json"))


def check_same_run(now: Mapping[str, Any], then: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with another run than the one that the checkpoint is of.

    Raises:
        ValueError: names the first setting (or fact of the model) that differs.
    """
    for key in sorted(now.keys() | then.keys()):
        if now.get(key) != then.get(key):
            raise ValueError(
                f"the checkpoints in {folder} are of another run: {key} was {then.get(key)!r} "
                f"and is {now.get(key)!r}; expected the same, or another checkpoint_dir"
            )


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """The settings that the numbers of a run depend on, as JSON would give them back."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {name: value for name, value in fields.items() if name not in FREE_SETTINGS}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def chance_of(*loaders: Any) -> dict[str, Tensor]:
    """The states of all random generators that a run draws from, as bytes by name.

    Those of torch (CPU and CUDA), Python and NumPy, and those that loaders have as attributes, or
    that the loaders, samplers and data sets in them have.
    """
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"cuda.{i}": x for i, x in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, *rest = np.random.get_state()
    states["numpy"] = _to_bytes([kind, np.asarray(keys).tolist(), *rest])
    states["python"] = _to_bytes(random.getstate())
    for i, generator in enumerate(_generators(*loaders)):
        is_torch = isinstance(generator, torch.Generator)
        state = generator.get_state() if is_torch else _to_bytes(generator.bit_generator.state)
        states[f"loader.{i}"] = state
    return states


def set_chance(states: Mapping[str, Tensor], loader: Any) -> None:
    """Put all generators where ``chance_of`` found them."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda.{i}" in states:
                torch.cuda.set_rng_state(states[f"cuda.{i}"], i)
    kind, keys, *rest = _from_bytes(states["numpy"])
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, numbers, gauss = _from_bytes(states["python"])
    random.setstate((version, tuple(numbers), gauss))
    set_generators(states, loader)


def set_generators(states: Mapping[str, Tensor], *loaders: Any) -> None:
    """Put only the generators of these loaders where ``chance_of`` found them."""
    for i, generator in enumerate(_generators(*loaders)):
        if isinstance(generator, torch.Generator):
            generator.set_state(states[f"loader.{i}"])
        else:
            generator.bit_generator.state = _from_bytes(states[f"loader.{i}"])


def _generators(*loaders: Any) -> list[Any]:
    """Those of the first loader come first, so that its own numbers are the same without others."""
    found: dict[int, Any] = {}
    seen: set[int] = set()
    for loader in loaders:
        parts = [loader]
        while parts:
            part = parts.pop(0)
            if id(part) in seen:
                continue
            seen.add(id(part))
            values = list(getattr(part, "__dict__", {}).values())
            found |= {id(x): x for x in values if isinstance(x, _GENERATORS)}
            parts += [x for x in values if _gives_examples(x)]
    return list(found.values())


def _gives_examples(value: Any) -> bool:
    """A loader, a sampler or a data set, by what it can do."""
    if isinstance(value, (Tensor, torch.nn.Module, np.ndarray, type)):
        return False
    can = any(hasattr(type(value), name) for name in ("__iter__", "__getitem__"))
    return can and hasattr(value, "__dict__")


def _to_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(data: Tensor) -> Any:
    return json.loads(bytes(data.numpy()))


def _read(path: Path) -> Checkpoint:
    facts = json.loads(path.read_text(encoding="utf-8"))
    files = {path.with_suffix(".safetensors"): facts["sha256"]}
    if "best" in facts:
        files[path.with_name(facts["best"]["file"])] = facts["best"]["sha256"]
    loaded = []
    for file, expected in files.items():
        if _sha256(file) != expected:
            raise ValueError(f"{file.name} is not what was written")
        loaded.append(load_file(file))
    return Checkpoint(path.stem, loaded[0], loaded[1] if "best" in facts else None, facts)


def _prune(folder: Path, newest: str, keep: int) -> None:
    """Keep some checkpoints up to the newest; delete others (the JSON first), unused best weights
    and what a crash left."""
    names = sorted((path.stem for path in folder.glob("step-*.json")), reverse=True)
    kept = [name for name in names if name <= newest][:keep]
    for name in set(names) - set(kept):
        (folder / f"{name}.json").unlink(missing_ok=True)
    used = set(kept)
    for name in kept:
        with contextlib.suppress(ValueError):  # a damaged one, left for ``read_newest`` to report
            facts = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            used.add(Path(facts.get("best", {}).get("file", "")).stem)
    for path in folder.iterdir():
        ours = re.fullmatch(r"(step|best)-\d{8}\.(safetensors|json)(\.\d+\.partial)?", path.name)
        if ours and (path.suffix == PARTIAL or path.stem not in used):
            path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
