"""Where the course's own files lie: in a checkout, or inside an installed wheel."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def repo_root() -> Path | None:
    """The checkout this package runs from, or None when it was installed as a wheel."""
    root = _PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() and (root / "lessons").is_dir() else None


def data_dir() -> Path:
    """Folder of the embedded data: checkpoints, cards, registry, recorded results."""
    return _part("data")


def lessons_dir() -> Path:
    """Folder of the lesson sources, one sub-folder ``NN_name`` for each lesson."""
    return _part("lessons")


def cache_dir() -> Path:
    """Folder for files that can be made again; created. ``TLCOURSE_CACHE`` moves it."""
    folder = Path(os.environ.get("TLCOURSE_CACHE") or Path.home() / ".cache" / "tlcourse")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _part(name: str) -> Path:
    root = repo_root()
    folder = root / name if root else _PACKAGE / f"_{name}"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the course's {name} folder is missing: expected {folder}; install tlcourse again"
        )
    return folder
