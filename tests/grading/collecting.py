"""What the tests of collecting share: make a download, collect it, look at what was stored."""

from __future__ import annotations

import zipfile
from datetime import UTC, datetime
from pathlib import Path

from tlcourse.grading.class_folder import ClassFolder
from tlcourse.grading.collect import Collected, Entry, collect

A3, A4 = "03_gradients_by_hand", "04_five_steps"
ASSIGNMENTS = [A3, A4]
NOW = datetime(2026, 11, 21, 8, 0, 0, 123456, tzinfo=UTC)
STAMP = "2026-11-21 08:00:00 UTC\n"
HEADER = "id,first_name,last_name,email,platform_id\n"


def run(folder: ClassFolder, source: Path, **options) -> Collected:
    return collect(folder, source, ASSIGNMENTS, **{"now": NOW, **options})


def put(source: Path, path: str, content: bytes = b"{}") -> Path:
    target = source / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return target


def make_zip(path: Path, files: dict[str, bytes] | list[tuple]) -> Path:
    pairs = files.items() if isinstance(files, dict) else files
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in pairs:
            archive.writestr(name, content)
    return path


def zip_bytes(tmp_path: Path, files: dict[str, bytes] | list[tuple]) -> bytes:
    path = make_zip(tmp_path / "inner.tmp", files)
    content = path.read_bytes()
    path.unlink()
    return content


def with_students(folder: ClassFolder, *lines: str) -> None:
    (folder.root / "students.csv").write_text(HEADER + "".join(f"{line}\n" for line in lines))


def with_limit(folder: ClassFolder, megabytes: float) -> None:
    text = f"course_id = 'a'\n[limits]\nnotebook_mb = {megabytes}\n"
    (folder.root / "class.toml").write_text(text)


def stored(folder: ClassFolder, student: str, assignment: str = A3) -> bytes | None:
    path = folder.submitted(student, assignment) / f"{assignment}.ipynb"
    return path.read_bytes() if path.exists() else None


def stamp(folder: ClassFolder, student: str, assignment: str = A3) -> str:
    return (folder.submitted(student, assignment) / "timestamp.txt").read_text()


def files_in(root: Path) -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if not p.is_dir())


def statuses(collected: Collected) -> dict[str, str]:
    return {entry.path: entry.status for entry in collected.entries}


def only_entry(collected: Collected) -> Entry:
    assert len(collected.entries) == 1, collected.entries
    return collected.entries[0]
