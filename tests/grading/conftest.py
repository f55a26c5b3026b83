"""What the tests of grading share: a class with a released exercise, and a working sandbox."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tlcourse.grading import class_folder, sandbox
from tlcourse.grading.class_folder import ClassFolder
from tlcourse.grading.release import release

SMALL = "00_start_here"  # the exercise that is run fastest


@pytest.fixture(scope="session")
def needs_sandbox() -> None:
    """Skip where nothing can be graded; with TLCOURSE_REQUIRE_SANDBOX that is a failure."""
    why = sandbox.problem()
    if why and os.environ.get("TLCOURSE_REQUIRE_SANDBOX"):
        pytest.fail(f"no sandbox, but TLCOURSE_REQUIRE_SANDBOX is set: {why}")
    if why:
        pytest.skip(why.split(";")[0])


@pytest.fixture(scope="session")
def released_class(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class folder with exercise 00 handed out; not to be written to."""
    pytest.importorskip("nbgrader")
    root = tmp_path_factory.mktemp("released") / "school"
    release(class_folder.create(root), SMALL[:2])
    return root


@pytest.fixture
def school(released_class: Path, tmp_path: Path) -> ClassFolder:
    """A class folder of this test's own, with exercise 00 handed out."""
    shutil.copytree(released_class, tmp_path / "school")
    return ClassFolder(tmp_path / "school")


@pytest.fixture
def change_settings(school: ClassFolder) -> Callable[[str, str], None]:
    """Replace a text in ``class.toml``."""

    def change(old: str, new: str) -> None:
        path = school.root / "class.toml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


@pytest.fixture
def folder(tmp_path: Path) -> ClassFolder:
    """A class folder in which nothing was handed out."""
    return class_folder.create(tmp_path / "class")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An empty folder for what a platform gives back."""
    (tmp_path / "download").mkdir()
    return tmp_path / "download"
