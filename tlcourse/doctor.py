"""`tlcourse doctor`: can the course run here, and if not, what mends it.

Each check gives one or more rows; a row that is not fine carries its remedy. Only a row of
status "problem" means that the course cannot run.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tlcourse import downloads, locations, machine

GIB = 2**30
LEAST_PYTHON = (3, 11)
LEAST_MEMORY_BYTES = 4 * GIB
LEAST_DISK_BYTES = GIB
NEEDED = (
    "torch",
    "torchvision",
    "transformers",
    "peft",
    "numpy",
    "scikit-learn",
    "matplotlib",
    "safetensors",
    "ipywidgets",
)
# Imported, to see that their libraries load. The others take seconds to import and stand on these.
IMPORTED = ("numpy", "torch")
FOR_NOTEBOOKS = ("jupyterlab", "ipykernel")


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        name: what was looked at.
        value: what was found.
        status: "ok"; "note" (the course runs, but); "problem" (it cannot run).
        remedy: what to do; empty exactly when the status is "ok".
    """

    name: str
    value: str
    status: str = "ok"
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.status not in ("ok", "note", "problem"):
            raise ValueError(f"status must be ok, note or problem, got {self.status!r}")
        if (self.status == "ok") != (not self.remedy):
            raise ValueError(f"a remedy goes with a note or a problem, and only there: {self}")


def examine() -> list[Row]:
    """All checks, in the order in which a user should read them."""
    rows: list[Row] = []
    for check in CHECKS:
        rows.extend(_guarded(check))
    return rows


def main() -> int:
    """Print the rows; 0 if the course can run, 1 if not."""
    rows = examine()
    width = max(len(row.name) for row in rows)
    marks = {"ok": "ok  ", "note": "note", "problem": "STOP"}
    for row in rows:
        print(f"  {marks[row.status]}  {row.name:<{width}}  {row.value}")
        if row.remedy:
            print(f"        {'':<{width}}  -> {row.remedy}")
    problems = [row.name for row in rows if row.status == "problem"]
    if problems:
        print(f"The course cannot run yet: {', '.join(problems)}.")
        return 1
    print("The course can run here.")
    return 0


def python_rows() -> list[Row]:
    """Version of this Python and of the course."""
    version = platform.python_version()
    found = f"{version}, {platform.system()} {platform.machine()}, {sys.prefix}"
    if sys.version_info < LEAST_PYTHON:
        need = ".".join(map(str, LEAST_PYTHON))
        return [Row("python", found, "problem", f"install Python {need} or newer")]
    return [Row("python", found)]


def package_rows() -> list[Row]:
    """Versions of the libraries, against the lower bounds of the course's own metadata."""
    bounds = _lower_bounds()
    return [_package_row(name, bounds.get(name, "")) for name in NEEDED]


def notebook_rows() -> list[Row]:
    """JupyterLab, and whether its Python kernel is this environment."""
    missing = [name for name in FOR_NOTEBOOKS if _version(name) is None]
    if missing:
        remedy = "make course, or: pip install 'tlcourse[lab]'"
        return [Row("notebooks", f"no {' and no '.join(missing)}", "note", remedy)]
    return [Row("notebooks", f"jupyterlab {_version('jupyterlab')}"), _kernel_row()]


def device_rows() -> list[Row]:
    """Device and precision that `tl.setup` will choose."""
    from tlcourse import runtime

    device = runtime.default_device()
    precision = runtime.default_precision(device)
    if device.type == "cuda":
        import torch

        name = torch.cuda.get_device_name(device)
        total = torch.cuda.get_device_properties(device).total_memory
        return [Row("device", f"{device} ({name}, {total / GIB:.0f} GiB), {precision}")]
    if shutil.which("nvidia-smi"):
        remedy = "install a torch built for this driver's CUDA; the CPU does for every lesson"
        return [Row("device", f"cpu, {precision}; a GPU is there, unused", "note", remedy)]
    return [Row("device", f"cpu, {precision} (every lesson runs on it)")]


def machine_rows() -> list[Row]:
    """Cores, memory, and free disk where the course writes."""
    rows = [Row("cores", str(machine.core_count()))]
    total, available = machine.memory_bytes()
    found = f"{total / GIB:.1f} GiB, {available / GIB:.1f} GiB free" if total else "unknown"
    if total and total < LEAST_MEMORY_BYTES:
        remedy = f"close other programs: lessons want {LEAST_MEMORY_BYTES // GIB} GiB"
        rows.append(Row("memory", found, "note", remedy))
    else:
        rows.append(Row("memory", found))
    free = shutil.disk_usage(locations.cache_dir()).free
    found = f"{free / GIB:.1f} GiB free at {locations.cache_dir()}"
    if free < LEAST_DISK_BYTES:
        remedy = "make room, or let TLCOURSE_CACHE name a folder on another disk"
        rows.append(Row("disk", found, "note", remedy))
    else:
        rows.append(Row("disk", found))
    return rows


def write_rows() -> list[Row]:
    """Whether the course may write where it has to."""
    rows = [_write_row("cache", locations.cache_dir(), "let TLCOURSE_CACHE name another folder")]
    root = locations.repo_root()
    if root:
        remedy = "make the checkout yours (sudo chown -R $USER .), or clone it again"
        rows.append(_write_row("notebooks folder", root, remedy))
    return rows


def data_rows() -> list[Row]:
    """sha256 of each embedded checkpoint against its card."""
    folder = locations.data_dir() / "checkpoints"
    weights = sorted(folder.glob("*.safetensors"))
    names = sorted({path.stem for path in [*weights, *folder.glob("*.json")]})
    if not names:
        remedy = f"none in {folder}: git checkout -- data, or: tlcourse pretrain glyphnet"
        return [Row("embedded data", "no checkpoint", "problem", remedy)]
    wrong = {name: why for name in names if (why := checkpoint_problem(folder, name))}
    rows = [
        Row(f"checkpoint {name}", why, "problem", f"git checkout -- data/checkpoints/{name}.*")
        for name, why in wrong.items()
    ]
    if len(wrong) < len(names):
        right = [name for name in names if name not in wrong]
        size = sum((folder / f"{name}.safetensors").stat().st_size for name in right)
        found = f"{', '.join(right)}: {size / 2**20:.1f} MiB, sha256 as on the cards"
        rows.insert(0, Row("embedded data", found))
    return rows


def sandbox_rows() -> list[Row]:
    """Whether a class could be graded here; learners need no sandbox."""
    if sys.platform != "linux":
        remedy = "only for grading a class: use Linux, or WSL 2 on Windows"
        return [Row("sandbox", f"none on {platform.system()}", "note", remedy)]
    from tlcourse.grading import cgroups, sandbox

    why, *advice = sandbox.problem().split("; ", 1)
    if why:
        remedy = "only for grading a class: " + (advice or [sandbox.HOW_TO_GET_ONE])[0]
        return [Row("sandbox", why, "note", remedy)]
    found = ["bubblewrap"]
    if sandbox.can_nest():
        found.append("a wall around each submission")
    group = cgroups.new_group(2**30, 64)
    if group is not None:
        group.remove()
        found.append("a control group")
    rows = [Row("sandbox", ", ".join(found))]
    if not sandbox.can_nest():
        remedy = "grading works, slower: allow user namespaces inside bubblewrap"
        rows.append(Row("sandbox speed", "a new sandbox for each submission", "note", remedy))
    return rows


CHECKS: tuple[Callable[[], list[Row]], ...] = (
    python_rows,
    package_rows,
    notebook_rows,
    device_rows,
    machine_rows,
    write_rows,
    data_rows,
    sandbox_rows,
)


def checkpoint_problem(folder: Path, name: str) -> str:
    """What is wrong with ``NAME.safetensors`` and its card ``NAME.json``; "" if nothing."""
    card, weights = folder / f"{name}.json", folder / f"{name}.safetensors"
    for path in (card, weights):
        if not path.is_file():
            return f"{path.name} is missing"
    try:
        expected = json.loads(card.read_text(encoding="utf-8"))["sha256"]
    except (ValueError, KeyError):
        return f"{card.name} has no sha256"
    found = downloads.file_digest(weights)
    return (
        "" if found == expected else f"sha256 is {found[:12]}..., the card says {expected[:12]}..."
    )


def _guarded(check: Callable[[], Iterable[Row]]) -> list[Row]:
    """The rows of a check; a check that fails is itself a problem, not the end of the report."""
    try:
        return list(check())
    except Exception as error:
        name = check.__name__.removesuffix("_rows").replace("_", " ")
        remedy = "the environment is damaged: delete .venv and run make course again"
        return [Row(name, f"{type(error).__name__}: {error}", "problem", remedy)]


def _package_row(name: str, bound: str) -> Row:
    remedy = "make course (or, without it: pip install --upgrade tlcourse)"
    version = _version(name)
    if version is None:
        return Row(name, "not installed", "problem", remedy)
    if bound and _release(version) < _release(bound):
        return Row(name, f"{version}, older than {bound}", "problem", remedy)
    if name == "torchvision" and (mismatch := _torch_mismatch()):
        return Row(name, f"{version}, {mismatch}", "problem", remedy)
    try:
        if name in IMPORTED:
            importlib.import_module(name)
    except Exception as error:  # a broken library raises anything, OSError included
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Row(name, f"{version}, but cannot be imported: {first}", "problem", remedy)
    return Row(name, version)


def _torch_mismatch() -> str:
    """torchvision works only with the one torch that it was built against."""
    from packaging.requirements import Requirement

    torch_version = _version("torch")
    for line in importlib.metadata.requires("torchvision") or []:
        wanted = Requirement(line)
        if wanted.name != "torch" or torch_version is None:
            continue
        if not wanted.specifier.contains(torch_version, prereleases=True):
            return f"built for torch{wanted.specifier}, but torch is {torch_version}"
    return ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lower_bounds() -> dict[str, str]:
    """Distribution -> lowest version, from the installed metadata; empty in a bare checkout."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("tlcourse") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    bounds = {}
    for requirement in map(Requirement, lines):
        lowest = [part.version for part in requirement.specifier if part.operator == ">="]
        if lowest and requirement.marker is None:
            bounds[requirement.name] = lowest[0]
    return bounds


def _release(version: str) -> tuple[int, ...]:
    from packaging.version import Version

    return Version(version).release


def _kernel_row() -> Row:
    """The notebooks ask for the kernel `python3`; it has to be this Python."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    remedy = f"choose the kernel of {sys.prefix}, or: python -m ipykernel install --sys-prefix"
    try:
        program = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        return Row("kernel", "no kernel named python3", "note", remedy)
    # jupyter_client starts a bare "python" with its own interpreter.
    if os.path.basename(program) == program and program.startswith("python"):
        program = sys.executable
    folder = Path(program).parent.parent
    if folder.exists() and os.path.samefile(folder, sys.prefix):
        return Row("kernel", "python3 is this environment")
    return Row("kernel", f"python3 is {program}", "note", remedy)


def _write_row(name: str, folder: Path, remedy: str) -> Row:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Row(name, f"{folder} can be written")
    except OSError as error:
        return Row(name, f"{folder} cannot be written: {error.strerror}", "problem", remedy)
