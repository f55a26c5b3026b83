"""The learner's ``check("03.q1", answer)``: not attempted, right, or what differs.

It runs in the learner's own kernel, on public cases, and records nothing.
"""

from __future__ import annotations

import html
import inspect
import os
import sys
import sysconfig
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tlcourse.plain_data import Difference, NotPlainError, compare, describe
from tlcourse.questions import PUBLIC_SEED, Question, find_question, load_questions, selfcheck

__all__ = ["CheckResult", "Question", "check", "evaluate_answer", "load_questions", "selfcheck"]

Status = Literal["not attempted", "right", "wrong"]
SYMBOLS = {"not attempted": "\N{WHITE CIRCLE}", "right": "\N{CHECK MARK}", "wrong": "\N{BALLOT X}"}
_COLOURS = {"not attempted": "#E69F00", "right": "#009E73", "wrong": "#D55E00"}  # Okabe-Ito


@dataclass(frozen=True)
class CheckResult:
    """What :func:`check` found; true if and only if the answer is right.

    Attributes:
        id, title: of the question.
        status: "not attempted", "right" or "wrong".
        detail: what differs, as text of one or more lines; empty when right.
    """

    id: str
    title: str
    status: Status
    detail: str = ""

    def __bool__(self) -> bool:
        return self.status == "right"

    def __repr__(self) -> str:
        lines = [f"{SYMBOLS[self.status]} {self.id} {self.title}: {self.status}"]
        return "\n".join(lines + [f"  {line}" for line in self.detail.splitlines()])

    def _repr_html_(self) -> str:
        # Colour only on the edge and the symbol; text keeps the theme's own colours.
        colour = _COLOURS[self.status]
        head = (
            f'<span style="color:{colour};font-weight:bold">{SYMBOLS[self.status]}</span> '
            f"<b>{html.escape(self.id)}</b> {html.escape(self.title)}: <b>{self.status}</b>"
        )
        body = ""
        if self.detail:
            body = (
                '<pre style="margin:0.4em 0 0 0;background:transparent;color:inherit;'
                f'white-space:pre-wrap">{html.escape(self.detail)}</pre>'
            )
        return (
            f'<div style="border-left:4px solid {colour};padding:0.3em 0.8em" '
            f'role="status">{head}{body}</div>'
        )

    def _ipython_display_(self) -> None:
        # check() has shown this result already; a last line `check(...)` must not repeat it.
        shell = _shell()
        if shell is None or _last_shown.get("cell") == (id(self), shell.execution_count):
            return
        _show(self)


def check(question_id: str, answer: Any) -> CheckResult:
    """Check an answer on the question's public cases, and show what was found.

    It shows its result in a notebook and prints it in a script. It never raises for what the
    answer does, and records nothing. An answer that does not end is not cut off: interrupt
    the kernel.

    Args:
        question_id: lesson and question, such as ``"03.q1"``.
        answer: what the question asks for, a function or a value.

    Raises:
        ValueError: if there is no such question, or it is marked by hand; lists the known ids.
        AssertionError: if the answer is not right, but only where nbgrader itself runs the
            notebook: it gives full points to every check cell that does not fail.
    """
    question = find_question(question_id)
    if question.manual:
        raise ValueError(f"{question_id} is free text and marked by hand; there is no check")
    result = evaluate_answer(question, answer)
    _show(result)
    if not result and os.environ.get("NBGRADER_EXECUTION"):
        raise AssertionError(f"{question_id}: {result.status}")
    return result


def evaluate_answer(
    question: Question, answer: Any, seed: int | bytes = PUBLIC_SEED
) -> CheckResult:
    """Run an answer on the cases of a seed, up to the first that is not right."""

    def result(status: Status, *lines: str) -> CheckResult:
        return CheckResult(question.id, question.title, status, "\n".join(filter(None, lines)))

    if answer is None or answer is Ellipsis:
        return result("not attempted")
    cases = question.draw_cases(seed)
    if question.apply is None and not callable(answer) and cases[0]:
        return result("wrong", f"expected a function, yours is of type {type(answer).__name__}")
    static_hint = f"hint: {question.hint}" if isinstance(question.hint, str) else ""
    for i, case in enumerate(cases):
        where = "\n".join([f"on input {i + 1} of {len(cases)}", *_arguments(question, case)])
        expected = question.expect(case)
        try:
            got = question.run(answer, case)
        except NotImplementedError as error:
            own_stub = str(error).startswith(f"{question.id}: write")
            return result("not attempted", "" if own_stub else _error_text(error))
        except NotPlainError as error:
            return result("wrong", where, f"your answer gave {error}", static_hint)
        except (Exception, SystemExit) as error:
            return result("wrong", where, _error_text(error), static_hint)
        difference = compare(got, expected, question.rtol, question.atol)
        if difference is not None:
            hint = _hint(question, case, expected, got)
            return result("wrong", where, *_difference_lines(difference, got, expected), hint)
    return result("right")


def _arguments(question: Question, case: tuple) -> list[str]:
    """One text for each argument of a case, named as in the reference."""
    if not case:
        return []
    names = [f"argument {i + 1}" for i in range(len(case))]
    parameters = list(inspect.signature(question.expected or len).parameters.values())
    for i, parameter in enumerate(parameters[: len(case)]):
        if parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            names[i] = parameter.name
    return [_aligned(f"  {name} = ", value) for name, value in zip(names, case, strict=True)]


def _difference_lines(difference: Difference, got: Any, expected: Any) -> list[str]:
    note = " (is a return missing?)" if got is None else ""
    return [
        _aligned("expected ", expected),
        _aligned("yours    ", got) + note,
        f"first difference {difference}" if difference.place else f"difference: {difference}",
    ]


def _aligned(head: str, value: Any) -> str:
    return head + describe(value).replace("\n", "\n" + " " * len(head))


def _hint(question: Question, case: tuple, expected: Any, got: Any) -> str:
    if isinstance(question.hint, str):
        return f"hint: {question.hint}" if question.hint else ""
    try:
        text = question.hint(case, expected, got)
    except Exception:  # a hint is a courtesy: its own mistake must not hide what differs
        return ""
    return f"hint: {text}" if text else ""


def _error_text(error: BaseException) -> str:
    """Type and message of what a learner's code raised, with the line in that code."""
    text = f"your code raised {type(error).__name__}: {str(error)[:500]}"
    library = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    library.append(Path(__file__).resolve().parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        ours = path.name == "questions.py" or any(path.is_relative_to(p) for p in library)
        if not ours and not frame.filename.startswith("<frozen"):
            return f"{text}\n  line {frame.lineno}, in {frame.name}: {frame.line}"
    return text


def _shell() -> Any:
    """IPython's shell when this runs in a notebook or an IPython prompt, else None."""
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython is not None else None


def _show(result: CheckResult) -> None:
    shell = _shell()
    if shell is None:
        print(result)
        return
    from IPython.display import display

    _last_shown["cell"] = (id(result), shell.execution_count)
    display({"text/html": result._repr_html_(), "text/plain": repr(result)}, raw=True)


_last_shown: dict[str, tuple[int, int]] = {}
