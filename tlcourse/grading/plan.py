"""From an exercise and a class secret to what is asked of a submission, and what is right.

The part that goes into a sandbox (:class:`Plan`.questions, .inputs) holds no answer, and no code
of a reference.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from tlcourse import locations
from tlcourse.plain_data import to_json
from tlcourse.questions import Question, load_questions

_MAGIC = re.compile(r"^(\s*)[%!].*$", re.MULTILINE)


class PlanError(ValueError):
    """An exercise that cannot be graded; names the question or cell and the reason."""


@dataclass(frozen=True)
class Plan:
    """What is asked of every submission of one exercise.

    Attributes:
        name: the exercise, such as ``"03_gradients_by_hand"``.
        questions: all graded questions, those marked by hand included.
        asked: for the sandbox, one dict for each question that is not marked by hand: its id,
            the expression that names the answer, the code that puts a case to it, and the names
            that its check cell binds.
        checks: grade id of a check cell -> question id.
        inputs: question id -> cases as JSON, for the sandbox.
        cases, expected: question id -> plain data; they stay with the parent.
        preload: modules that the exercise imports.
        sha256: of all that decides a grade but the submission.
    """

    name: str
    questions: list[Question]
    asked: list[dict[str, Any]]
    checks: dict[str, str]
    inputs: dict[str, list]
    cases: dict[str, list[tuple]]
    expected: dict[str, list]
    preload: tuple[str, ...]
    sha256: str


def make_plan(name: str, release: NotebookNode, secret: bytes) -> Plan:
    """Draw the hidden inputs of an exercise and work out what is right.

    Args:
        name: the lesson's full name.
        release: the notebook that was handed out; trusted.
        secret: of the class.

    Raises:
        PlanError: if the notebook and ``questions.py`` do not fit together.
    """
    path = locations.lessons_dir() / name / "questions.py"
    if not path.is_file():
        raise PlanError(f"{name}: there are no questions in {path}")
    questions = load_questions(path)
    automatic = [question for question in questions if not question.manual]
    checks, asked = {}, []
    for question in automatic:
        cell = _check_cell(release, question)
        checks[cell.metadata.nbgrader.grade_id] = question.id
        asked.append(_ask(question, cell.source))
    cases = {question.id: question.draw_cases(secret) for question in automatic}
    expected = {q.id: [q.expect(case) for case in cases[q.id]] for q in automatic}
    inputs = {key: [to_json(list(case)) for case in drawn] for key, drawn in cases.items()}
    parts: list[Any] = [asked, inputs, {key: to_json(value) for key, value in expected.items()}]
    parts += [[q.id, q.points, q.rtol, q.atol, q.manual] for q in questions]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    preload = tuple(sorted(_imports(release)))
    return Plan(name, questions, asked, checks, inputs, cases, expected, preload, digest)


def check_call(source: str, question_id: str) -> tuple[str, list[str]]:
    """The answer that a check cell asks for, as an expression, and the names the cell binds.

    ``right_1 = tl.check("03.q1", cross_entropy)`` gives ``"cross_entropy"`` and ``["right_1"]``.

    Raises:
        PlanError: if the cell holds no such call.
    """
    tree = ast.parse(source)
    names = _stored(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or len(node.args) != 2:
            continue
        function = node.func
        called = function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)
        first = node.args[0]
        if called == "check" and isinstance(first, ast.Constant) and first.value == question_id:
            return ast.unparse(node.args[1]), names
    raise PlanError(f"{question_id}: its check cell does not call check({question_id!r}, ...)")


def apply_source(question: Question) -> str:
    """The code of ``question.apply`` and of all that it uses, and nothing of the answer.

    Raises:
        PlanError: if it uses the reference, another answer, or something not of its module.
    """
    if question.apply is None:
        return ""
    module = inspect.getmodule(question.apply)
    path = inspect.getsourcefile(question.apply)
    name = question.apply.__name__
    if path is None or not name.isidentifier() or name == "<lambda>":
        raise PlanError(f"{question.id}: apply must be a function of its questions.py")
    source = Path(path).read_text(encoding="utf-8")
    blocks = {bound: node for node in ast.parse(source).body for bound in _binds(node)}
    needed, waiting = set(), [name]
    while waiting:
        current = waiting.pop()
        if current in needed or current not in blocks:
            continue
        needed.add(current)
        waiting += [n.id for n in ast.walk(blocks[current]) if isinstance(n, ast.Name)]
    secrets = [question.expected, question.right, question.cases, *question.wrong.values()]
    for part in secrets:
        hidden = getattr(part, "__name__", "")
        if hidden in needed and getattr(module, hidden, part) is part:
            raise PlanError(f"{question.id}: apply uses {hidden}, which must stay hidden")
    kept = sorted({id(blocks[n]): blocks[n] for n in needed}.values(), key=lambda n: n.lineno)
    future = "from __future__ import annotations\n"
    return future + "\n\n".join(ast.get_source_segment(source, node) or "" for node in kept) + "\n"


def _ask(question: Question, check_source: str) -> dict[str, Any]:
    expression, names = check_call(check_source, question.id)
    name = question.apply.__name__ if question.apply else ""
    return {
        "id": question.id,
        "expression": expression,
        "names": names,
        "apply": apply_source(question),
        "apply_name": name,
    }


def _check_cell(release: NotebookNode, question: Question) -> NotebookNode:
    wanted = f"{question.id.replace('.', '-')}-check"
    for cell in release.cells:
        if cell.metadata.get("nbgrader", {}).get("grade_id") == wanted:
            return cell
    raise PlanError(f"{question.id}: the notebook that was handed out has no cell {wanted}")


def _binds(node: ast.stmt) -> list[str]:
    """Names that a top-level statement binds."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
    return _stored(node)


def _stored(tree: ast.AST) -> list[str]:
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return [node.id for node in names if isinstance(node.ctx, ast.Store)]


def _imports(release: NotebookNode) -> set[str]:
    """Modules that a notebook imports, and the parts of this package that it uses as ``tl``."""
    found: set[str] = set()
    for cell in release.cells:
        if cell.cell_type != "code":
            continue
        try:
            tree = ast.parse(_MAGIC.sub(r"\1pass", cell.source))
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                found |= {f"tl.{node.attr}"} if node.value.id == "tl" else set()
    return found
