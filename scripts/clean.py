"""Remove what tools and tests left behind; the environment and all tracked files stay."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("artifacts", "build", "dist", "runs", "site")
CACHES = (
    "__pycache__",
    ".ipynb_checkpoints",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    ".import_linter_cache",
)


def main() -> None:
    """Delete the folders that .gitignore names, except the environment."""
    doomed = [ROOT / name for name in FOLDERS]
    for name in CACHES:
        doomed += [path for path in ROOT.rglob(name) if not _in_environment(path)]
    for path in doomed:
        shutil.rmtree(path, ignore_errors=True)


def _in_environment(path: Path) -> bool:
    return path.relative_to(ROOT).parts[0] in (".venv", ".tools", ".git")


if __name__ == "__main__":
    main()
