"""The course's folders: where a lesson's sources lie, and where what is made of them goes."""

from __future__ import annotations

import hashlib
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tlcourse.questions import Question, load_questions

Kind = Literal["lesson", "exercise", "solution"]
PARTS = (  # last lesson of the part, folder under notebooks/, name
    (4, "part1_foundations", "Part 1. Foundations"),
    (10, "part2_fine_tuning", "Part 2. Fine-tuning"),
    (17, "part3_parameter_efficient", "Part 3. Parameter-efficient"),
    (22, "part4_fewer_labels", "Part 4. Fewer labels"),
    (28, "part5_shift", "Part 5. When worlds differ"),
    (38, "part6_practice", "Part 6. In practice"),
)


class SourceError(ValueError):
    """A lesson source that cannot be made into a notebook; names the file and the reason."""


@dataclass(frozen=True)
class Lesson:
    """One folder ``lessons/NN_name``.

    Attributes:
        root: the repository.
        name: such as ``"03_gradients_by_hand"``.
    """

    root: Path
    name: str

    @property
    def number(self) -> str:
        return self.name[:2]

    @property
    def folder(self) -> Path:
        return self.root / "lessons" / self.name

    @property
    def part(self) -> tuple[str, str]:
        """Folder under ``notebooks/`` and name of the part."""
        for last, folder, title in PARTS:
            if int(self.number) <= last:
                return folder, title
        raise SourceError(f"lessons/{self.name}: lessons are numbered 00 to {PARTS[-1][0]}")

    @property
    def has_exercise(self) -> bool:
        return (self.folder / "exercise.py").is_file()

    def questions(self) -> list[Question]:
        """The graded questions, in order; none without a ``questions.py``."""
        path = self.folder / "questions.py"
        return load_questions(path) if path.is_file() else []

    def product(self, kind: Kind) -> Path:
        """Where a notebook goes, relative to the repository."""
        if kind == "lesson":
            return Path("notebooks", self.part[0], f"{self.name}.ipynb")
        folder = Path("notebooks", "exercises") if kind == "exercise" else Path("solutions")
        return folder / f"{self.name}.ipynb"

    def kinds(self) -> tuple[Kind, ...]:
        return ("lesson", "exercise", "solution") if self.has_exercise else ("lesson",)

    def source(self, kind: Kind) -> Path:
        return self.folder / ("lesson.py" if kind == "lesson" else "exercise.py")

    def inputs(self, kind: Kind) -> list[Path]:
        """The files that a notebook is made of; its outputs depend on them too."""
        beside = [] if kind == "lesson" else [self.folder / "questions.py"]
        if "tl.quiz(" in self.source(kind).read_text(encoding="utf-8"):
            beside.append(self.folder / "quiz.toml")
        return [self.source(kind), *(path for path in beside if path.is_file())]


def find_lessons(root: Path) -> list[Lesson]:
    """All folders ``lessons/NN_name`` that hold a ``lesson.py``, in order."""
    found = sorted((root / "lessons").glob("[0-9][0-9]_*/lesson.py"))
    return [Lesson(root, path.parent.name) for path in found]


def repository_url(root: Path) -> str | None:
    """The repository's public address; it stands in pyproject.toml and nowhere else."""
    with (root / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file).get("project", {})
    url = project.get("urls", {}).get("Repository")
    return url.rstrip("/").removesuffix(".git") if url else None


def colab_url(root: Path, product: Path) -> str | None:
    """Where Colab opens a notebook; None unless the repository is on GitHub."""
    url = repository_url(root)
    if url is None or not url.startswith("https://github.com/"):
        return None
    place = url.removeprefix("https://github.com/")
    return f"https://colab.research.google.com/github/{place}/blob/main/{product.as_posix()}"


def relative(target: Path, start: Path) -> str:
    """A link from one notebook to another file, both relative to the repository."""
    return Path(os.path.relpath(target, start.parent)).as_posix()


def files_sha256(paths: list[Path]) -> str:
    """One hash over names and contents; line ends of Windows count as ``\\n``."""
    total = hashlib.sha256()
    for path in paths:
        content = path.read_bytes().replace(b"\r\n", b"\n")
        total.update(path.name.encode() + b"\0" + hashlib.sha256(content).digest())
    return total.hexdigest()
