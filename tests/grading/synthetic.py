"""A class of made-up students, from the solution of an exercise: who is right where is known."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("ada", "bela", "chen", "dora", "emil", "fatma", "gao", "hana", "ivan", "jun", "kofi",
         "lena", "milan", "nuri", "olga", "pia", "quang", "rosa", "said", "tara", "uma", "vera",
         "wang", "xenia", "yusuf", "zoe")  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A made-up submission: its notebook, and the share of the points that each question earns."""

    student: str
    notebook: NotebookNode
    share: dict[str, float]


def solved(name: str) -> NotebookNode:
    """The solution of an exercise as a student would hand it in."""
    nb = nbformat.read(ROOT / "solutions" / f"{name}.ipynb", as_version=4)
    nb.metadata.pop("tlcourse", None)
    handed_out = ROOT / "notebooks" / "exercises" / f"{name}.ipynb"
    nb.cells[0] = nbformat.read(handed_out, as_version=4).cells[0]
    return nb


def cell_of(nb: NotebookNode, grade_id: str) -> NotebookNode:
    """The cell with this grade id."""
    return next(c for c in nb.cells if c.metadata.get("nbgrader", {}).get("grade_id") == grade_id)


def answer_index(nb: NotebookNode, question_id: str) -> int:
    """Where the answer to a question stands."""
    return nb.cells.index(cell_of(nb, f"{question_id.replace('.', '-')}-answer"))


def check_name(nb: NotebookNode, question_id: str) -> str:
    """The name that the check of a question looks at."""
    source = cell_of(nb, f"{question_id.replace('.', '-')}-check").source
    return source.split(f'"{question_id}",')[1].split(")")[0].strip()


def _stub(name: str, question_id: str) -> str:
    text = f"{question_id}: write your answer here"
    return f"def {name}(*arguments):\n    raise NotImplementedError({text!r})"


def _raises(name: str, question_id: str) -> str:
    return f"def {name}(*arguments):\n    return arguments[0] / 'nothing'"


def _constant(name: str, question_id: str) -> str:
    return f"def {name}(*arguments):\n    return 12345.678"


def _nothing(name: str, question_id: str) -> str:
    return f"def {name}(*arguments):\n    pass"


MISTAKES: tuple[Callable[[str, str], str], ...] = (_stub, _raises, _constant, _nothing)


def make_class(name: str, count: int, seed: int = 0) -> list[Made]:
    """Students of all kinds: about a third has everything right.

    A mistake in one question leaves the others right.
    """
    rng = random.Random(seed)
    whole = solved(name)
    ids = [c.metadata.nbgrader.grade_id for c in whole.cells if "nbgrader" in c.metadata]
    questions = [i.removesuffix("-check").replace("-", ".") for i in ids if i.endswith("-check")]
    made = []
    for number in range(count):
        student = NAMES[number % len(NAMES)] + (
            str(number // len(NAMES) + 1) if number >= 26 else ""
        )
        nb, share = copy.deepcopy(whole), dict.fromkeys(questions, 1.0)
        for question in questions:
            if number % 3 and rng.random() < 0.4:
                _spoil(nb, question, rng.choice(MISTAKES))
                share[question] = 0.0
        made.append(Made(student, nb, share))
    return made


def _spoil(nb: NotebookNode, question: str, mistake: Callable[[str, str], str]) -> None:
    """Put a mistake right before the check; other cells go on with the right answer."""
    name = check_name(nb, question)
    place = answer_index(nb, question) + 1
    for cell in nb.cells[place:]:
        if cell.cell_type == "code":
            cell.source = re.sub(rf"(?<!def )\b{name}\(", f"kept_{name}(", cell.source)
    wrong = f"kept_{name} = {name}\n\n\n{mistake(name, question)}"
    nb.cells.insert(place, nbformat.v4.new_code_cell(wrong))


def hand_in(made: list[Made], folder: Path, name: str) -> None:
    """Write the submissions as a folder ``STUDENT/NOTEBOOK``."""
    for one in made:
        path = folder / one.student / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(one.notebook, path)
