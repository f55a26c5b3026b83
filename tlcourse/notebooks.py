"""Lesson sources -> notebooks: what the learner opens, with nothing executed yet.

``lesson.py`` and ``exercise.py`` are jupytext py:percent files. An exercise marks its answers
with ``question="03.q1"``, its checks with ``check="03.q1"``, and its solutions with lines
``### BEGIN SOLUTION`` and ``### END SOLUTION`` (in markdown ``<!-- BEGIN SOLUTION -->``).
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import jupytext
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tlcourse.lessons import (
    Kind,
    Lesson,
    SourceError,
    colab_url,
    files_sha256,
    relative,
    repository_url,
)
from tlcourse.questions import Question, load_questions

NOTE = (
    "Generated from the file named in 'source' by `tlcourse build`. Edit that file, not this one."
)
_MARK = re.compile(r"^\s*(?:#+|<!--)\s*(BEGIN|END) SOLUTION\s*(?:-->)?\s*$")
_COLAB = """\
# On Colab: install the course if it is missing. Colab keeps its own torch and numpy.
import importlib.util

if importlib.util.find_spec("tlcourse") is None:
    %pip install -q "tlcourse @ git+{url}"

"""


def make(lesson: Lesson, kind: Kind) -> NotebookNode:
    """A notebook without outputs, complete with metadata and fixed cell ids.

    Raises:
        SourceError: if the source breaks the format.
    """
    nb = _skeleton(lesson, kind)
    for cell in read_cells(lesson.source(kind)):
        marks = cell.metadata.pop("marks")
        if marks.question and kind == "exercise":
            cell.source = stub(cell, marks.question, _checked_names(lesson, marks.question))
        elif marks.question:
            cell.source = _without_marks(cell.source)
        nb.cells.append(cell)
    _head(nb, lesson, kind)
    _install(nb, lesson.root)
    _name_cells(nb, lesson.number)
    nb.metadata.tlcourse.cells_sha256 = cells_sha256(nb)
    return nb


def make_teacher(lesson: Lesson) -> NotebookNode:
    """The exercise with its solution regions, as nbgrader's own source notebooks have them."""
    nb = _skeleton(lesson, "exercise")
    for cell in read_cells(lesson.source("exercise")):
        cell.metadata.pop("marks")
        nb.cells.append(cell)
    _name_cells(nb, lesson.number)
    return nb


@dataclass(frozen=True)
class Marks:
    """What a cell's header says: the question that it answers or checks."""

    question: str = ""
    check: str = ""


def read_cells(path: Path) -> list[NotebookNode]:
    """Cells of a source, nbgrader metadata in place; ``metadata["marks"]`` keeps the marks.

    Raises:
        SourceError: for an unknown word in a cell's header, or a mark that cannot be.
    """
    points = {}
    if path.name == "exercise.py":
        questions = path.with_name("questions.py")
        points = {q.id: q for q in load_questions(questions)} if questions.is_file() else {}
    cells = []
    for raw in jupytext.read(path, fmt="py:percent").cells:
        words = {k: v for k, v in raw.metadata.items() if k != "lines_to_next_cell"}
        marks = Marks(words.pop("question", ""), words.pop("check", ""))
        tags = words.pop("tags", [])
        view = words.pop("jupyter", {})  # {"source_hidden": true} folds the code of a figure
        where = f"{path.parent.name}/{path.name}: cell {raw.source[:50]!r}"
        if words:
            raise SourceError(f"{where}: unknown words in its header: {sorted(words)}")
        if raw.cell_type not in ("code", "markdown"):
            raise SourceError(f"{where}: cells are code or markdown, got {raw.cell_type}")
        question = points.get(marks.question or marks.check)
        if (marks.question or marks.check) and question is None:
            raise SourceError(f"{where}: questions.py has no {marks.question or marks.check}")
        make_cell = new_code_cell if raw.cell_type == "code" else new_markdown_cell
        cell = make_cell(raw.source)
        cell.metadata.update({k: v for k, v in (("tags", tags), ("jupyter", view)) if v})
        if question is not None:
            cell.metadata.update(_nbgrader(question, marks, raw.cell_type, where))
        cell.metadata["marks"] = marks
        cells.append(cell)
    return cells


def stub(cell: NotebookNode, question_id: str, checked: set[str]) -> str:
    """A cell's source with its solution regions replaced by something to fill in.

    Inside a function a region becomes ``raise NotImplementedError``; at the margin, each name
    that the check reads becomes ``...``; in markdown, a line that asks for an answer.
    """
    lines: list[str] = []
    for region, block in regions(cell.source):
        if not region:
            lines += block
        elif cell.cell_type == "markdown":
            lines.append("*Write your answer here.*")
        elif indent := re.match(r"\s*", block[0]).group():  # type: ignore[union-attr]
            text = f"{question_id}: write your answer here"
            lines.append(f'{indent}raise NotImplementedError("{text}")')
        else:
            names = [n for n in _bound_names("\n".join(block[1:-1])) if n in checked]
            comment = f"  # {question_id}: write your answer here"
            lines += [f"{name} = ...{comment}" for name in names] or [comment.strip()]
    return "\n".join(lines)


def regions(source: str) -> list[tuple[bool, list[str]]]:
    """A source in blocks: (is it a solution region?, its lines, the two marks included).

    Raises:
        SourceError: if the marks do not pair.
    """
    blocks: list[tuple[bool, list[str]]] = [(False, [])]
    for line in source.split("\n"):
        mark = _MARK.match(line)
        inside = blocks[-1][0]
        if mark and inside == (mark[1] == "BEGIN"):
            raise SourceError(f"{mark[1]} SOLUTION without its pair in {source[:60]!r}")
        if mark and mark[1] == "BEGIN":
            blocks.append((True, [line]))
            continue
        blocks[-1][1].append(line)
        if mark:
            blocks.append((False, []))
    if blocks[-1][0]:
        raise SourceError(f"BEGIN SOLUTION without its pair in {source[:60]!r}")
    return [block for block in blocks if block[1]]


def title(lesson: Lesson) -> str:
    """The heading of a lesson, without its number."""
    cells = read_cells(lesson.source("lesson"))
    first = cells[0].source.split("\n")[0] if cells else ""
    if not first.startswith("# "):
        raise SourceError(f"{lesson.name}/lesson.py: must begin with a markdown cell '# Title'")
    return re.sub(r"^\d+[.:]?\s*", "", first.removeprefix("# ").strip())


def cells_sha256(nb: NotebookNode) -> str:
    """A hash of all cell sources: it tells whether somebody has edited the notebook."""
    return _sha256([[cell.cell_type, cell.source] for cell in nb.cells])


def code_sha256(nb: NotebookNode, inputs: list[Path]) -> str:
    """A hash of all that decides the outputs, the library apart."""
    code = [[cell.source, cell.metadata.get("tags", [])] for cell in nb.cells if is_code(cell)]
    return _sha256([code, files_sha256(inputs[1:])])


def outputs_sha256(nb: NotebookNode) -> str:
    """A hash of all outputs: it tells whether somebody has run and saved the notebook."""
    outputs = [[cell.outputs, cell.execution_count] for cell in nb.cells if is_code(cell)]
    return _sha256([outputs, nb.metadata.get("widgets", {})])


def is_code(cell: NotebookNode) -> bool:
    return cell.cell_type == "code"


def _skeleton(lesson: Lesson, kind: Kind) -> NotebookNode:
    source = lesson.source(kind).relative_to(lesson.root).as_posix()
    return new_notebook(
        metadata={
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "tlcourse": {
                "generated": True,
                "note": NOTE,
                "source": source,
                "source_sha256": files_sha256(lesson.inputs(kind)),
            },
        }
    )


def _head(nb: NotebookNode, lesson: Lesson, kind: Kind) -> None:
    """Put links to Colab and to the lesson's other notebooks below the title."""
    if not nb.cells or not nb.cells[0].source.startswith("# "):
        raise SourceError(f"{lesson.source(kind)}: must begin with a markdown cell '# Title'")
    here = lesson.product(kind)
    links = [f"[{k.capitalize()}]({relative(lesson.product(k), here)})" for k in lesson.kinds()]
    links = [link for link in links if not link.lower().startswith(f"[{kind}]")]
    if kind == "lesson":
        links = links[:1]  # nobody needs the solution before the exercise
    if colab := colab_url(lesson.root, here):
        links.insert(0, f"[Open in Colab]({colab})")
    if kind == "solution":
        links.insert(0, "**Solution**")
    if links:
        heading, _, rest = nb.cells[0].source.partition("\n")
        nb.cells[0].source = f"{heading}\n\n{' | '.join(links)}\n{rest}".rstrip("\n")


def _install(nb: NotebookNode, root: Path) -> None:
    url = repository_url(root)
    for cell in nb.cells:
        if url and "setup" in cell.metadata.get("tags", []):
            cell.source = _COLAB.format(url=url) + cell.source


def _name_cells(nb: NotebookNode, number: str) -> None:
    """Ids from the question or from the content, so that they stay the same."""
    seen: dict[str, int] = {}
    for cell in nb.cells:
        grade_id = cell.metadata.get("nbgrader", {}).get("grade_id")
        digest = _sha256([cell.cell_type, cell.source])[:8]
        name = grade_id or f"{number}-{'code' if is_code(cell) else 'text'}-{digest}"
        seen[name] = seen.get(name, 0) + 1
        cell.id = name if seen[name] == 1 else f"{name}-{seen[name]}"


def _nbgrader(question: Question, marks: Marks, cell_type: str, where: str) -> dict:
    """Cell metadata in nbgrader's schema 3."""
    if marks.question and question.manual != (cell_type == "markdown"):
        raise SourceError(f"{where}: a manual question is a markdown cell, any other is code")
    if marks.check and (question.manual or cell_type != "code"):
        raise SourceError(f"{where}: a check is a code cell of a question that is not manual")
    prefix = question.id.replace(".", "-")
    graded = bool(marks.check) or question.manual
    nbgrader = {
        "schema_version": 3,
        "solution": bool(marks.question),
        "grade": graded,
        "locked": bool(marks.check),
        "task": False,
        "grade_id": f"{prefix}-check" if marks.check else f"{prefix}-answer",
    }
    if graded:
        nbgrader["points"] = question.points
    if marks.check:
        return {"nbgrader": nbgrader, "deletable": False, "editable": False}
    return {"nbgrader": nbgrader}


def _without_marks(source: str) -> str:
    return "\n".join(line for line in source.split("\n") if not _MARK.match(line))


def _checked_names(lesson: Lesson, question_id: str) -> set[str]:
    """Names that the check cells of a question read."""
    names: set[str] = set()
    for cell in read_cells(lesson.source("exercise")):
        if cell.metadata["marks"].check == question_id:
            tree = ast.parse(cell.source)
            names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return names


def _bound_names(source: str) -> list[str]:
    """Names that top-level statements bind, in order."""
    names: list[str] = []
    for node in ast.parse(textwrap.dedent(source)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            for child in ast.walk(node):
                if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                    names.append(child.id)
    return list(dict.fromkeys(names))


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
