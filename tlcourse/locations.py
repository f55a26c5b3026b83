"""Where the course's own files lie: in a checkout, or inside an installed wheel."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_MOUNTED_DRIVE = Path("/content/drive/MyDrive")  # where Colab mounts Google Drive


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


def run_dir(name: str) -> str:
    """A folder for the checkpoints of a run, in a place that outlives the machine if there is one.

    That is ``TLCOURSE_RUNS`` if it is set; on Colab with Google Drive mounted, ``tlcourse`` there;
    else ``runs`` in the present folder.

    Args:
        name: of the run; a folder in that place.

    Returns:
        The path, for ``TrainConfig.checkpoint_dir``; ``tl.fit`` makes the folder.

    Raises:
        ValueError: if name is empty or leads elsewhere.
    """
    if name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(f"name must be the name of one folder, got {name!r}")
    place = os.environ.get("TLCOURSE_RUNS")
    if place is None:
        place = str(_MOUNTED_DRIVE / "tlcourse") if _MOUNTED_DRIVE.is_dir() else "runs"
    return str(Path(place) / name)


def _part(name: str) -> Path:
    root = repo_root()
    folder = root / name if root else _PACKAGE / f"_{name}"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the course's {name} folder is missing: expected {folder}; install tlcourse again"
        )
    return folder
