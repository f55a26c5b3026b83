"""`import tlcourse` is immediate, and imports go downward only."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEAST_TRIES = 5
HEAVY = ("torch", "numpy", "sklearn", "matplotlib", "transformers", "IPython", "ipywidgets")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)


def test_import_takes_at_most_a_tenth_of_a_second():
    """The best of several tries: other processes may slow any one of them."""
    totals = []
    for _ in range(LEAST_TRIES):
        lines = python("-X", "importtime", "-c", "import tlcourse").stderr.splitlines()
        last = re.match(r"import time:\s+\d+ \|\s+(\d+) \| tlcourse$", lines[-1])
        assert last, lines[-1]
        totals.append(int(last[1]) / 1e6)
    assert min(totals) <= 0.1, f"import tlcourse took {min(totals):.3f} s"


def test_import_loads_nothing_heavy():
    code = "import sys, tlcourse; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = python("-c", code).stdout.split()
    assert not set(HEAVY) & set(loaded)


@pytest.mark.parametrize("module", ["cli", "doctor", "downloads", "locations"])
def test_commands_start_without_heavy_imports(module):
    code = f"import sys, tlcourse.{module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    assert not set(HEAVY) & set(python("-c", code).stdout.split())


# What only a notebook, the teacher or a download needs: absent on a bare GPU machine.
NOT_ON_A_BARE_MACHINE = (
    "ipywidgets", "IPython", "jupyterlab", "jupytext", "nbformat", "nbclient", "nbconvert",
    "nbgrader", "pooch", "requests", "pytest", "yaml", "playwright",
)  # fmt: skip


def test_training_needs_no_notebook_software():
    """The modules that train import, and train, with the notebook software made unavailable."""
    code = f"""
import sys
for name in {NOT_ON_A_BARE_MACHINE!r}:
    sys.modules[name] = None
import torch, tlcourse as tl
from tlcourse import backbones, datasets, evaluation, freezing, sources, train
model = tl.Classifier(tl.load_backbone("glyphnet", pretrained=False), num_classes=3)
inputs = torch.zeros(8, 3, 32, 32)
targets = torch.arange(8) % 3
loader = datasets.BatchLoader(inputs, targets, batch_size=4)
tl.fit(model, loader, loader, tl.TrainConfig(num_steps=2))
print(tl.evaluate(model, loader).accuracy)
"""
    assert 0 <= float(python("-c", code).stdout.splitlines()[-1]) <= 1


def test_every_module_has_a_layer_and_imports_only_downward():
    importlinter = pytest.importorskip("importlinter.cli")
    config = str(ROOT / "pyproject.toml")
    assert importlinter.lint_imports(config_filename=config, no_cache=True) == 0


def test_the_contract_can_fail(tmp_path):
    """A copy in which layer 0 imports layer 2 must be refused."""
    pytest.importorskip("importlinter.cli")
    package = tmp_path / "tlcourse"
    package.mkdir()
    for path in (ROOT / "tlcourse").glob("*.py"):
        (package / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    with (package / "locations.py").open("a", encoding="utf-8") as file:
        file.write("\ndef later():\n    from tlcourse import train\n    return train\n")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    code = (
        "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports;"
        "sys.exit(lint_imports(no_cache=True))"
    )
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "tlcourse.locations -> tlcourse.train" in done.stdout


def test_public_names_have_a_home():
    """Each name that `tlcourse` offers can be loaded from the module that the table names."""
    import tlcourse

    for name in tlcourse.__all__:
        assert getattr(tlcourse, name) is not None
    with pytest.raises(AttributeError, match="no name 'nothing'"):
        tlcourse.nothing  # noqa: B018


def test_the_version_is_the_projects():
    import tlcourse

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert tlcourse.__version__ == project["version"]
