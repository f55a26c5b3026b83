"""Rules of a lesson's sources that a program can check."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from nbformat import NotebookNode

from tlcourse.lessons import Kind, Lesson, SourceError
from tlcourse.notebooks import Marks, is_code, read_cells, regions, title

MAX_CELL_LINES = 15
MAX_HIDDEN_LINES = 40  # a figure's code, folded with jupyter={"source_hidden": true}
SETUP = "import tlcourse as tl\n\nrun = tl.setup(seed=0)"
TAGS = {
    "setup",
    "allow-warning",  # a warning in this cell's output is meant to be seen
    "nbval-check-output",
    "nbval-ignore-output",
    "nbval-raises-exception",
    "nbval-skip",
    "raises-exception",
}


def source_problems(lesson: Lesson) -> list[str]:
    """What breaks a rule in ``lesson.py``, ``exercise.py``, ``questions.py``; one line each."""
    problems = []
    for kind in ("lesson", "exercise"):
        path = lesson.source(kind)
        if not path.is_file():
            continue
        try:
            cells = read_cells(path)
            found = _cell_problems(cells, kind)
            if kind == "lesson":
                title(lesson)
            else:
                found += _drift(cells, lesson)
        except (SourceError, SyntaxError) as error:
            found = [str(error)]
        problems += [f"lessons/{lesson.name}/{path.name}: {problem}" for problem in found]
    return problems


def link_problems(nb: NotebookNode, product: Path, root: Path) -> list[str]:
    """Relative links of a notebook that lead nowhere.

    Args:
        nb: the notebook.
        product: its path, relative to the repository.
        root: the repository.
    """
    problems = []
    for cell in nb.cells:
        if is_code(cell):
            continue
        for link in re.findall(r"\]\(([^)\s]+)\)", cell.source):
            target = link.split("#")[0]
            if not target or re.match(r"[a-z]+:", target) or target.startswith("/"):
                continue
            if not (root / product.parent / target).exists():
                problems.append(f"{product.as_posix()}: link to {target} leads nowhere")
    return problems


def _cell_problems(cells: list[NotebookNode], kind: Kind) -> list[str]:
    problems = []
    setups = [cell.source for cell in cells if "setup" in cell.metadata.get("tags", [])]
    if setups != [SETUP]:
        problems.append(f"needs one cell with the tag setup that holds exactly {SETUP!r}")
    for cell in cells:
        where = f"cell {cell.source.strip()[:50]!r}"
        unknown = set(cell.metadata.get("tags", [])) - TAGS
        if unknown:
            problems.append(f"{where} has unknown tags {sorted(unknown)}; known: {sorted(TAGS)}")
        if not cell.source.strip():
            problems.append("has an empty cell")
        marks = cell.metadata["marks"]
        if any(region for region, _ in regions(cell.source)) != bool(marks.question):
            problems.append(f'{where}: question="..." and BEGIN SOLUTION belong together')
        count = _code_lines(cell.source, count_docstrings=kind == "lesson") if is_code(cell) else 0
        hidden = cell.metadata.get("jupyter", {}).get("source_hidden", False)
        limit = MAX_HIDDEN_LINES if hidden else MAX_CELL_LINES
        if count > limit:
            problems.append(f"{where} has {count} lines; at most {limit}")
    return problems


def _code_lines(source: str, count_docstrings: bool) -> int:
    """Lines of a cell. In an exercise, docstrings (they hold the task) and marks are free."""
    lines = source.strip("\n").split("\n")
    if count_docstrings:
        return len(lines)
    free = {i for i, line in enumerate(lines, 1) if re.search(r"(BEGIN|END) SOLUTION", line)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            free |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines) - len(free)


def _drift(cells: list[NotebookNode], lesson: Lesson) -> list[str]:
    """Where exercise and questions have drifted apart."""
    problems = []
    questions = lesson.questions()
    marks: list[Marks] = [cell.metadata["marks"] for cell in cells]
    asked = [mark.question for mark in marks if mark.question]
    listed = [question.id for question in questions]
    if asked != listed:
        problems.append(f"asks the questions {asked}, but questions.py lists {listed}")
    for question in questions:
        checks = [i for i, mark in enumerate(marks) if mark.check == question.id]
        answers = [i for i, mark in enumerate(marks) if mark.question == question.id]
        if question.manual or not answers:
            continue
        if len(checks) != 1 or checks[0] < answers[0]:
            problems.append(f"{question.id} needs one check cell below its answer cell")
        elif f'tl.check("{question.id}"' not in cells[checks[0]].source:
            problems.append(f'the check cell of {question.id} must call tl.check("{question.id}"')
    return problems
