"""The set-up: lock, bootstrap, Makefile, conda file, wheel, and that they tell one story."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import bootstrap
import colab_check
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
POSIX = pytest.mark.skipif(os.name != "posix", reason="uses shell scripts")
CHECKOUT = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")


def locked_versions() -> dict[str, list[Version]]:
    """Name -> versions; a universal lock may hold one for each platform."""
    versions: dict[str, list[Version]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", LOCK, flags=re.MULTILINE):
        versions.setdefault(canonicalize_name(name), []).append(Version(version))
    return versions


def project_requirements(*extras: str) -> list[Requirement]:
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return [req for line in lines if (req := Requirement(line)).name != PROJECT["name"]]


# The lock


def test_the_lock_names_packages_and_hashes_but_no_address_or_path():
    for text in (LOCK, (ROOT / "scripts/uv-requirements.txt").read_text(encoding="utf-8")):
        assert "://" not in text
        assert str(Path.home()) not in text and str(ROOT) not in text
        blocks = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]
        assert blocks
        assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks)


def test_the_lock_fulfils_the_project_with_all_extras():
    versions = locked_versions()
    extras = PROJECT["optional-dependencies"]
    for requirement in project_requirements(*extras):
        found = versions.get(canonicalize_name(requirement.name))
        assert found, f"{requirement} is not in requirements.lock: run make lock"
        assert all(requirement.specifier.contains(version) for version in found), requirement


def tracked_text() -> dict[str, str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    texts = {}
    for name in listed.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file() and path.stat().st_size < 2_000_000:
            try:
                texts[name] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
    return texts


@CHECKOUT
def test_the_repositorys_address_stands_in_one_place():
    address = PROJECT["urls"]["Repository"].removeprefix("https://")
    made_from_it = ("notebooks/", "solutions/")  # links in products are made from it
    places = [
        name
        for name, text in tracked_text().items()
        if address in text and not name.startswith(made_from_it) and not name.endswith(".md")
    ]
    assert places == ["pyproject.toml"]


@CHECKOUT
def test_no_file_names_a_package_registrys_host():
    hosts = [
        "py" + "pi.org",
        "python" + "hosted.org",
        "registry.npm" + "js.org",
        "conda.ana" + "conda",
    ]
    for name, text in tracked_text().items():
        for host in hosts:
            assert host not in text, f"{name} names {host}"


# conda


def test_environment_yml_has_the_names_and_bounds_of_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    lines = [line for line in environment["dependencies"] if isinstance(line, str)]
    conda = {}
    for line in lines:
        requirement = Requirement(line)
        name = {"pytorch": "torch"}.get(requirement.name, requirement.name)
        conda[name] = str(requirement.specifier)
    assert conda.pop("python") == PROJECT["requires-python"]
    conda.pop("pip")
    ours = {req.name: str(req.specifier) for req in project_requirements("lab")}
    assert conda == ours


# The bootstrap


def test_bootstrap_can_be_parsed_by_an_old_python():
    """What an old Python cannot parse would hide the message that says it is too old."""
    tree = ast.parse((ROOT / "scripts/bootstrap.py").read_text(encoding="utf-8"))
    newer = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.AsyncFunctionDef, ast.Starred)
    for node in ast.walk(tree):
        assert not isinstance(node, newer), f"line {node.lineno}: {type(node).__name__}"
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            assert not arguments.kwonlyargs and not arguments.posonlyargs and node.returns is None
            assert all(argument.annotation is None for argument in arguments.args)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
            assert set(names) <= sys.stdlib_module_names | {"__future__"}


def test_an_old_python_is_told_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 9, 2, "final", 0))
    monkeypatch.setattr(bootstrap, "is_ready", lambda: False)
    monkeypatch.setattr(bootstrap, "is_good_python", lambda name: False)
    monkeypatch.delenv("PYTHON", raising=False)
    assert bootstrap.main([]) == 1
    message = capsys.readouterr().err
    assert "needs Python 3.11" in message and "3.9.2" in message and "apt install" in message


FAKE_UV = """#!/bin/sh
# A uv that only writes down what it is asked, and makes an environment of links.
if [ "$1" = --version ]; then echo "uv 0.99.0"; exit; fi
echo "$1 $2 $3" >> "{root}/calls"
if [ "$1" = venv ]; then
  rm -rf "{root}/.venv" && mkdir -p "{root}/.venv/bin" && ln -s {python} "{root}/.venv/bin/python"
fi
if [ "$2" = sync ] && [ -e "{root}/no-network" ]; then exit 2; fi
exit 0
"""


@pytest.fixture()
def copy(tmp_path, monkeypatch):
    """A copy of the set-up with a fake uv; gives a function that runs it and lists uv's calls."""
    root = tmp_path / "a folder"  # a space in the path must not matter
    (root / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/bootstrap.py", root / "scripts")
    (root / "requirements.lock").write_text("one")
    (root / "pyproject.toml").write_text("two")
    programs = tmp_path / "bin"
    programs.mkdir()
    uv = programs / "uv"
    uv.write_text(FAKE_UV.format(root=root, python=sys.executable))
    uv.chmod(0o755)

    def run(python: str = sys.executable, **variables: str) -> tuple[int, list[str], str]:
        (root / "calls").write_text("")
        environment = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(tmp_path), **variables}
        command = [python, str(root / "scripts/bootstrap.py")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.returncode, (root / "calls").read_text().splitlines(), done.stderr

    run.root = root
    return run


INSTALL = ["pip sync --require-hashes", "pip install --no-deps"]
ANEW = ["venv --quiet --clear", *INSTALL]


@POSIX
def test_the_second_run_does_nothing_and_a_changed_lock_only_syncs(copy):
    assert copy()[:2] == (0, ANEW)
    assert copy()[:2] == (0, [])
    (copy.root / "requirements.lock").write_text("changed")
    assert copy()[:2] == (0, INSTALL)
    (copy.root / "pyproject.toml").write_text("changed")
    assert copy()[:2] == (0, INSTALL)
    assert copy()[:2] == (0, [])


@POSIX
def test_an_interrupted_installation_is_repaired_by_the_next_run(copy):
    (copy.root / "no-network").touch()
    code, calls, message = copy()
    assert (code, calls) == (1, ANEW[:2])
    assert "Run the same command again" in message
    (copy.root / "no-network").unlink()
    assert copy()[:2] == (0, ANEW), "half an environment must not be trusted"
    assert copy()[:2] == (0, [])


@POSIX
def test_a_broken_environment_is_made_anew(copy):
    copy()
    (copy.root / ".venv/bin/python").unlink()
    (copy.root / ".venv/bin/python").symlink_to("/nowhere/python")
    assert copy()[:2] == (0, ANEW)


@POSIX
def test_another_python_asked_for_by_name_makes_the_environment_anew(copy):
    copy()
    stamp = copy.root / ".venv/tlcourse-ready.json"
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "python": "3.99"}))
    assert copy(PYTHON=sys.executable)[1] == INSTALL  # .venv itself has the wanted one
    assert copy()[:2] == (0, [])


@POSIX
def test_a_python_without_venv_is_told_the_remedy(copy, tmp_path):
    (tmp_path / "bin/uv").unlink()
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\n[ "$2" = venv ] && exit 1\nexec {sys.executable} "$@"\n')
    fake.chmod(0o755)
    script = (copy.root / "scripts/bootstrap.py").read_text()
    (copy.root / "scripts/bootstrap.py").write_text(
        script.replace("import time\n", f"import time\nsys.executable = {str(fake)!r}\n", 1)
    )
    code, calls, message = copy()
    assert (code, calls) == (1, [])
    assert "cannot make a virtual environment" in message and "-venv" in message


@POSIX
def test_uv_of_the_repository_keeps_its_cache_there(monkeypatch):
    monkeypatch.delenv("UV_CACHE_DIR", raising=False)
    private = os.path.join(bootstrap.TOOLS, "bin", "uv")
    assert bootstrap.uv_environment(private)["UV_CACHE_DIR"].startswith(bootstrap.TOOLS)
    assert "UV_CACHE_DIR" not in bootstrap.uv_environment("/usr/bin/uv")
    assert bootstrap.uv_environment(private)["UV_PYTHON_DOWNLOADS"] == "never"


# make

TARGETS = (
    "setup",
    "course",
    "first",
    "lab",
    "test",
    "check",
    "build",
    "bench",
    "gpu",
    "lock",
    "colab",
)
TARGETS += ("site", "clean", "help")
needs_make = pytest.mark.skipif(not shutil.which("make"), reason="no make")


def make(*arguments: str) -> str:
    environment = {name: v for name, v in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", "--no-print-directory", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), "make warns, or fails"
    return done.stdout


@needs_make
def test_make_knows_its_targets_and_helps_by_default():
    assert make() == make("help")
    for target in TARGETS:
        assert make(target), f"make {target} does nothing"
    listed = re.findall(r'echo "make (\w+)', make("help"))
    assert set(listed) == set(TARGETS) - {"setup", "help"}


@needs_make
def test_make_course_stops_before_the_server_when_asked():
    def steps(*variables: str) -> list[str]:
        lines = make("course", *variables).splitlines()
        return [line.split()[-1] for line in lines if "-m tlcourse.cli" in line]

    assert steps("FIRST_RESULT=") == ["doctor", "first", "lab"]
    assert steps("FIRST_RESULT=", "LAB=0") == ["doctor", "first"]
    assert steps("FIRST_RESULT=picture.png", "LAB=1") == ["doctor", "lab"], "shown once"


@needs_make
def test_a_ready_environment_can_take_the_place_of_venv():
    lines = make("gpu", "PY=python", "PYTHON=nothing").splitlines()
    assert [line.split()[0] for line in lines] == ["python"]


@needs_make
def test_windows_has_its_own_folder_of_programs():
    text = make("test", "OS=Windows_NT")
    assert ".venv/Scripts/python.exe" in text and ".venv/bin" not in text


# The wheel


@pytest.mark.build
def test_the_wheel_carries_data_and_lessons(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for source, target in (("data", "tlcourse/_data"), ("lessons", "tlcourse/_lessons")):
        for path in (ROOT / source).rglob("*"):
            hidden = any(part.startswith((".", "__pycache__")) for part in path.parts[-3:])
            if path.is_file() and not hidden:
                assert f"{target}/{path.relative_to(ROOT / source).as_posix()}" in names
    assert any(name.startswith("tlcourse/_data/checkpoints/") for name in names)
    assert any(re.match(r"tlcourse/_lessons/.*/questions.py", name) for name in names)
    assert not any(name.startswith(("data/", "lessons/", "tests/", "scripts/")) for name in names)
    assert {"LICENSE", "LICENSE-text"} <= {Path(name).name for name in names}


@pytest.mark.build
def test_an_installed_wheel_finds_its_data_and_questions(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "from tlcourse import locations, downloads; import tlcourse; print(tlcourse.__file__);"
        "assert locations.repo_root() is None; downloads.load_registry();"
        "print(len(list(locations.lessons_dir().glob('*/questions.py'))))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, count = done.stdout.splitlines()
    assert Path(file).is_relative_to(tmp_path)
    assert int(count) == len(list((ROOT / "lessons").glob("*/questions.py"))) > 0


# Colab

FREEZE = colab_check.parse_freeze(
    "# comment\nnumpy==2.1.3\ntorch==2.11.0+cu128\nen_core_web_sm @ https://host/x.whl\n"
)


def test_a_freeze_is_read_without_labels_and_addresses():
    assert FREEZE.versions == {"numpy": "2.1.3", "torch": "2.11.0"}
    assert FREEZE.labelled == ("torch",)
    assert FREEZE.addresses == ("en-core-web-sm",)


def test_a_replaced_package_is_noticed():
    good = colab_check.compare(FREEZE, {"numpy": "2.1.3", "pooch": "1.9"})
    assert good.good and good.added == {"pooch": "1.9"} and good.kept == 1
    for resolved in ({"numpy": "2.2"}, {"en-core-web-sm": "3.8"}):
        assert not colab_check.compare(FREEZE, resolved).good


@pytest.mark.skipif(not colab_check.DEFAULT_FREEZE.is_file(), reason="no list of Colab's packages")
def test_colabs_packages_stay_as_they_are(tmp_path):
    if bootstrap.find_uv() is None:
        pytest.skip("no uv")
    freeze = colab_check.parse_freeze(colab_check.DEFAULT_FREEZE.read_text(encoding="utf-8"))
    outcome = colab_check.resolve(freeze, ROOT / "pyproject.toml")
    assert outcome.good, colab_check.report(freeze, outcome)
    assert outcome.kept > 50
    too_new = tmp_path / "pyproject.toml"
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    too_new.write_text(text.replace('"numpy>=2.0"', '"numpy>=2.3"'), encoding="utf-8")
    assert not colab_check.resolve(freeze, too_new).good, "the check must be able to fail"
