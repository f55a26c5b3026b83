"""Show that installing the course on Colab replaces none of Colab's own packages.

    python scripts/colab_check.py                      resolve only, seconds
    python scripts/colab_check.py --install FOLDER     also run the unit tests in an
                                                       environment with Colab's versions

The list of Colab's packages is a `pip freeze` of its runtime, not part of this repository:
``--freeze PATH``, by default ``../shared/colab/pip-freeze.gpu.txt``. Without it the check is
skipped. The exit code is 0 for "nothing changes" (or skipped), 1 for anything else.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import bootstrap

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_FREEZE = ROOT.parent / "shared" / "colab" / "pip-freeze.gpu.txt"
COLAB_PYTHON = "3.13"
COLAB_PLATFORM = "x86_64-manylinux_2_35"
# What the unit tests need beyond the course's own dependencies.
TEST_TOOLS = ("pytest", "pytest-xdist", "pyyaml", "jupytext", "nbformat", "nbclient", "hatchling")
# CUDA libraries: they belong to one build of torch, and the registry's build is another one.
BUILD_PARTS = re.compile(r"(nvidia|cuda|triton)\b")


@dataclass(frozen=True)
class Freeze:
    """A runtime's packages.

    Attributes:
        versions: normalised name -> version without its local label.
        labelled: names whose version had a local label (2.11.0+cu128): other builds than the
            registry's, with other dependencies.
        addresses: names that were installed from an address, whose version is not known.
    """

    versions: dict[str, str]
    labelled: tuple[str, ...]
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What an installation of the course would do to a runtime.

    Attributes:
        kept: how many of the runtime's packages the course uses as they are.
        changed: name -> (the runtime's version, the one that would replace it).
        added: name -> version, packages that the runtime does not have.
        failure: the resolver's explanation where there is no solution, else "".
    """

    kept: int = 0
    changed: dict[str, tuple[str, str]] | None = None
    added: dict[str, str] | None = None
    failure: str = ""

    @property
    def good(self) -> bool:
        """Whether every package of the runtime stays as it is."""
        return not self.failure and not self.changed


def main(argv: list[str] | None = None) -> int:
    """Run the check; its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--freeze", type=Path, default=DEFAULT_FREEZE, metavar="PATH")
    parser.add_argument("--install", type=Path, metavar="FOLDER")
    options = parser.parse_args(argv)
    if not options.freeze.is_file():
        print(f"skipped: no list of Colab's packages at {options.freeze} (give --freeze PATH)")
        return 0
    freeze = parse_freeze(options.freeze.read_text(encoding="utf-8"))
    outcome = resolve(freeze, ROOT / "pyproject.toml")
    print(report(freeze, outcome))
    if not outcome.good:
        return 1
    if options.install:
        python = install(freeze, options.install)
        return run_tests(python) if python else 1
    return 0


def parse_freeze(text: str) -> Freeze:
    """Read the lines of a `pip freeze`; comments are skipped."""
    versions, labelled, addresses = {}, [], []
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if " @ " in line:
            addresses.append(normalise(line.split(" @ ")[0]))
            continue
        name, _, version = line.partition("==")
        public, _, label = version.partition("+")
        versions[normalise(name)] = public
        if label:
            labelled.append(normalise(name))
    return Freeze(versions, tuple(labelled), tuple(addresses))


def normalise(name: str) -> str:
    """A package name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(freeze: Freeze, project: Path) -> Outcome:
    """Resolve a project's dependencies with a runtime's versions as constraints."""
    with tempfile.TemporaryDirectory() as scratch:
        constraints = _write_constraints(Path(scratch), freeze.versions)
        config = Path(scratch) / "uv.toml"
        config.write_text(_metadata(freeze), encoding="utf-8")
        command = ["pip", "compile", str(project), "--quiet", "--no-header", "--no-annotate"]
        command += ["--config-file", str(config), "--constraint", str(constraints)]
        command += ["--python-version", COLAB_PYTHON, "--python-platform", COLAB_PLATFORM]
        done = _uv(command, capture=True)
    if done.returncode != 0:
        return Outcome(failure=done.stderr.strip())
    lines = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", done.stdout, flags=re.MULTILINE)
    resolved = {normalise(name): version for name, version in lines}
    return compare(freeze, resolved)


def compare(freeze: Freeze, resolved: dict[str, str]) -> Outcome:
    """What a resolved set of versions would change in a runtime, and add to it."""
    known = freeze.versions
    changed = {
        name: (known[name], version)
        for name, version in resolved.items()
        if name in known and known[name] != version
    }
    # An address has no version to compare; if one is needed, pip would replace it.
    changed |= {
        name: ("from an address", resolved[name]) for name in freeze.addresses if name in resolved
    }
    added = {
        name: version
        for name, version in resolved.items()
        if name not in known and name not in freeze.addresses
    }
    return Outcome(len(resolved) - len(changed) - len(added), changed, added)


def report(freeze: Freeze, outcome: Outcome) -> str:
    """The outcome for a person to read."""
    if outcome.failure:
        return f"Colab's packages cannot stay as they are:\n{outcome.failure}"
    lines = [f"Colab's runtime: {len(freeze.versions)} packages, Python {COLAB_PYTHON}"]
    lines.append(f"used as they are: {outcome.kept}")
    added = [f"{name} {version}" for name, version in (outcome.added or {}).items()]
    lines.append(f"would be added: {', '.join(added) or 'none'}")
    changes = [f"{name} {old} -> {new}" for name, (old, new) in (outcome.changed or {}).items()]
    lines.append(f"would be changed: {', '.join(changes) or 'none'}")
    return "\n".join(lines)


def install(freeze: Freeze, folder: Path) -> Path | None:
    """Make a new environment with the runtime's versions and the course; its Python, or None."""
    python = Path(bootstrap.program(str(folder.resolve()), "python"))
    create = ["venv", "--clear", "--no-project", "--python", COLAB_PYTHON, str(folder)]
    if _uv(create).returncode != 0:
        print(f"put a working python{COLAB_PYTHON} first on the PATH", file=sys.stderr)
        return None
    pinned = {name: v for name, v in freeze.versions.items() if not BUILD_PARTS.match(name)}
    loose = {name: v for name, v in pinned.items() if name not in freeze.labelled}
    for versions in (pinned, loose):  # other builds of the same version first, then any version
        with tempfile.TemporaryDirectory() as scratch:
            constraints = _write_constraints(Path(scratch), versions)
            command = ["pip", "install", "--python", str(python), "--constraint", str(constraints)]
            if _uv([*command, "--editable", str(ROOT), *TEST_TOOLS]).returncode == 0:
                _print_versions(freeze, python)
                return python
    return None


def run_tests(python: Path) -> int:
    """Run the unit tests with an environment's Python; pytest's exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    tests = ["-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", str(ROOT / "tests")]
    chosen = ["-m", "not browser and not build and not gpu"]
    return subprocess.run([str(python), *tests, *chosen], cwd=ROOT, env=environment).returncode


def _print_versions(freeze: Freeze, python: Path) -> None:
    names = ("torch", "torchvision", "numpy", "scikit-learn", "matplotlib", "ipywidgets", "peft")
    for name in (*names, "transformers"):
        code = f"from importlib.metadata import version; print(version({name!r}))"
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
        print(f"  {name}: here {done.stdout.strip()}, on Colab {freeze.versions[name]}", flush=True)


def _write_constraints(folder: Path, versions: dict[str, str]) -> Path:
    path = folder / "constraints.txt"
    lines = [f"{name}=={version}\n" for name, version in versions.items()]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _metadata(freeze: Freeze) -> str:
    """uv settings: packages of another build are there already, with all that they need."""
    tables = [
        f'[[dependency-metadata]]\nname = "{name}"\nversion = "{freeze.versions[name]}"\n'
        "requires-dist = []\n"
        for name in freeze.labelled
    ]
    return "\n".join(tables)


def _uv(arguments: list[str], capture: bool = False) -> subprocess.CompletedProcess[str]:
    uv = bootstrap.find_uv(make=True)
    environment = bootstrap.uv_environment(uv)
    return subprocess.run(
        [uv, *arguments], cwd=ROOT, env=environment, capture_output=capture, text=True
    )


if __name__ == "__main__":
    sys.exit(main())
