"""The self-check quiz of a lesson: reads ``quiz.toml``, shows it, gives the reason at once."""

from __future__ import annotations

import html
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ipywidgets

from tlcourse import display, locations

_KEYS = {"text", "options", "answer", "why"}
_FEWEST, _MOST = 3, 5
# One native radio button for each option, so that an option can hold mathematics and break
# over lines. The button's own label is spread over the row, unseen: a click anywhere selects,
# and a screen reader still reads the option.
_CSS = """<style>
.tl-quiz { max-width: 46rem; }
.tl-quiz .widget-htmlmath-content { font-size: 14px; line-height: 1.5; }
.tl-quiz .widget-htmlmath-content p { margin: 4px 0; }
.tl-quiz code { padding: 1px 4px; border-radius: 3px; background: rgba(128, 128, 128, 0.15); }
.tl-option { position: relative; align-items: flex-start; padding: 1px 4px; border-radius: 4px; }
.tl-option:hover { background: rgba(128, 128, 128, 0.15); }
.tl-option:focus-within { outline: 2px solid #0072B2; }
.tl-option .tl-radio, .tl-option .widget-radio-box { position: static; margin: 0; width: auto; }
.tl-option .tl-radio { flex: 0 0 1.7rem; height: 1.6rem; overflow: hidden; }
.tl-option .widget-radio-box label { position: absolute; inset: 0; margin: 0; height: auto;
  max-width: none; cursor: pointer; color: transparent; font-size: 1px; overflow: hidden; }
.tl-option .widget-radio-box input { position: absolute; left: 6px; top: 5px; margin: 0;
  width: 15px; height: 15px; }
.tl-right, .tl-wrong { border-left: 4px solid #009E73; padding-left: 0.6em; }
.tl-wrong { border-left-color: #D55E00; }
</style>"""


@dataclass(frozen=True)
class QuizQuestion:
    """One question.

    Attributes:
        text: the question; Markdown with ``code``, **bold**, *italic* and $mathematics$.
        options: what can be chosen, at least two.
        answer: index of the right option, from 0.
        why: for each option, the reason why it is right or wrong.
    """

    text: str
    options: tuple[str, ...]
    answer: int
    why: tuple[str, ...]


def quiz(lesson: str) -> None:
    """Show the quiz of a lesson; each answer is judged at once and can be tried again.

    Args:
        lesson: its two-digit number, such as "03".

    Raises:
        ValueError: if there is no such lesson, or its quiz.toml is not as expected.
    """
    title = f"Quiz {lesson}"
    questions = read_quiz(_quiz_file(lesson))
    display.show_widget(
        quiz_widget(questions),
        f"{title}: {len(questions)} questions. Run the cell to answer them.",
        quiz_html(questions),
    )


def read_quiz(path: Path) -> list[QuizQuestion]:
    """Read and check a quiz file.

    Raises:
        ValueError: names the file, the question, what was found and what was expected.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(
            f"{path}: not valid TOML: {error}; write text with backslashes in 'single quotes'"
        ) from None
    entries = content.pop("question", None)
    if content or not isinstance(entries, list):
        raise ValueError(f"{path}: expected only [[question]] tables, got {sorted(content)}")
    if not _FEWEST <= len(entries) <= _MOST:
        raise ValueError(f"{path}: expected {_FEWEST} to {_MOST} questions, got {len(entries)}")
    return [_question(entry, f"{path}, question {i}") for i, entry in enumerate(entries, 1)]


def _question(entry: dict[str, Any], where: str) -> QuizQuestion:
    if set(entry) != _KEYS:
        raise ValueError(f"{where}: expected the keys {sorted(_KEYS)}, got {sorted(entry)}")
    options, why, answer = entry["options"], entry["why"], entry["answer"]
    _check_text(entry["text"], f"{where}, text")
    for name, texts in (("options", options), ("why", why)):
        if not isinstance(texts, list):
            raise ValueError(f"{where}: {name} must be a list of texts, got {texts!r}")
        for i, text in enumerate(texts):
            _check_text(text, f"{where}, {name}[{i}]")
    if len(options) < 2 or len(set(options)) < len(options):
        raise ValueError(f"{where}: expected two or more different options, got {options}")
    if len(why) != len(options):
        raise ValueError(
            f"{where}: expected one reason (why) for each of {len(options)} options, got {len(why)}"
        )
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(options):
        raise ValueError(
            f"{where}: answer must be the index of an option, 0 to {len(options) - 1}, "
            f"got {answer!r}"
        )
    return QuizQuestion(entry["text"], tuple(options), answer, tuple(why))


def _check_text(text: Any, where: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: expected a text, got {text!r}")
    # "\theta" in double quotes is a tab and "heta"; "\nabla" is a new line and "abla".
    broken = re.search(r"[\t\f\b\r]", text) or re.search(r"\$[^$]*\n[^$]*\$", text)
    if broken:
        raise ValueError(
            f"{where}: a backslash was taken for a control character in {text!r}; "
            "write text with backslashes in 'single quotes'"
        )


def _quiz_file(lesson: str) -> Path:
    files = sorted(locations.lessons_dir().glob("[0-9][0-9]_*/quiz.toml"))
    for path in files:
        if path.parent.name[:2] == lesson:
            return path
    known = ", ".join(path.parent.name[:2] for path in files)
    raise ValueError(f"no quiz for lesson {lesson!r}; lessons with a quiz: {known or 'none'}")


def to_html(markdown: str) -> str:
    """The little Markdown that quizzes use, as HTML; mathematics is left for MathJax."""
    parts = re.split(r"(\$[^$]+\$|`[^`]+`)", markdown.strip())
    for i, part in enumerate(parts):
        escaped = html.escape(part, quote=False)
        if i % 2 == 0:
            escaped = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escaped)
            escaped = re.sub(r"(?<!\w)\*(?!\s)(.+?)\*(?!\w)", r"<i>\1</i>", escaped)
            escaped = re.sub(r"\n\s*\n", "<br><br>", escaped)
        elif part.startswith("`"):
            escaped = f"<code>{escaped[1:-1]}</code>"
        parts[i] = escaped
    return "".join(parts)


def _spoken(markdown: str) -> str:
    """The text for a screen reader: without the marks of Markdown, mathematics as written."""
    return re.sub(r"\*+(?=\S)|(?<=\S)\*+|`", "", " ".join(markdown.split()))


def quiz_html(questions: list[QuizQuestion]) -> str:
    """The quiz for a page without a kernel: the answers fold out."""
    items = []
    for number, question in enumerate(questions, 1):
        options = "".join(f"<li>{to_html(option)}</li>" for option in question.options)
        reasons = "".join(
            f"<li>{'<b>Right.</b>' if i == question.answer else 'Wrong.'} {to_html(reason)}</li>"
            for i, reason in enumerate(question.why)
        )
        items.append(
            f"<p><b>{number}.</b> {to_html(question.text)}</p>"
            f'<ol type="A">{options}</ol>'
            f'<details><summary>Answer</summary><ol type="A">{reasons}</ol></details>'
        )
    return "\n".join(items)


def quiz_widget(questions: list[QuizQuestion]) -> ipywidgets.Widget:
    """All questions below each other, then the score."""
    score = ipywidgets.HTML()
    forms = [_Form(number, question) for number, question in enumerate(questions, 1)]

    def count() -> None:
        right = sum(form.right for form in forms)
        score.value = f'<b role="status">{right} of {len(forms)} right</b>'

    for form in forms:
        form.on_judged = count
    count()
    box = ipywidgets.VBox([ipywidgets.HTML(_CSS), *(form.widget for form in forms), score])
    box.add_class("tl-quiz")
    return box


class _Form:
    """One question: a radio button for each option, a button, and what comes of it."""

    def __init__(self, number: int, question: QuizQuestion) -> None:
        self.right = False
        self.on_judged = lambda: None
        self._question = question
        self._radios = [
            ipywidgets.RadioButtons(options=[f"{letter}. {_spoken(option)}"], value=None)
            for letter, option in zip("ABCDEFGHIJ", question.options, strict=False)
        ]
        rows = []
        for radio, option in zip(self._radios, question.options, strict=True):
            radio.add_class("tl-radio")
            radio.observe(self._selected, names="index")
            row = ipywidgets.HBox([radio, ipywidgets.HTMLMath(to_html(option))])
            row.add_class("tl-option")
            rows.append(row)
        button = ipywidgets.Button(description="Check", tooltip=f"Check question {number}")
        button.on_click(lambda _: self._judge())
        self._feedback = ipywidgets.HTMLMath()
        text = ipywidgets.HTMLMath(f"<b>{number}.</b> {to_html(question.text)}")
        self.widget = ipywidgets.VBox([text, *rows, button, self._feedback])
        self.widget.layout.margin = "0 0 1.2em 0"

    def _selected(self, change: dict[str, Any]) -> None:
        """Only one option of the question is selected at a time."""
        if change["new"] is None:
            return
        for radio in self._radios:
            if radio is not change["owner"]:
                radio.index = None
        self._feedback.value = ""

    def _judge(self) -> None:
        chosen = [i for i, radio in enumerate(self._radios) if radio.index is not None]
        self.right = chosen == [self._question.answer]
        if not chosen:
            self._feedback.value = '<p role="status">Choose one of the options first.</p>'
        else:
            word = "Right" if self.right else "Wrong"
            reason = to_html(self._question.why[chosen[0]])
            self._feedback.value = (
                f'<p role="status" class="tl-{word.lower()}"><b>{word}.</b> {reason}</p>'
            )
        self.on_judged()
