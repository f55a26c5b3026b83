"""A page for each student: marks, comments, and the notebook; safe and readable without a network.

The page is nbgrader's own feedback with another head. It has no script, and its policy allows
none; mathematics stays as TeX. Of the hidden inputs it says what :meth:`Mark.words` says.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbconvert.exporters import HTMLExporter
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

from tlcourse import locations
from tlcourse.grading import journal
from tlcourse.grading.class_folder import ClassError, ClassFolder
from tlcourse.grading.formgrader import safe_markdown
from tlcourse.grading.gradebook import (
    answer_cell,
    enter_students,
    grade_cell,
    open_gradebook,
    set_late_penalty,
)
from tlcourse.grading.scoring import Mark
from tlcourse.grading.store import write_atomically
from tlcourse.questions import load_questions

_STYLE = """
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem; color: #222; background: #fff;
  font: 16px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1, h2, h3 { line-height: 1.25; }
a { color: #0072b2; }
code, pre { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { font-size: 13px; line-height: 1.4; margin: 0; white-space: pre-wrap;
  overflow-wrap: anywhere; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border-bottom: 1px solid #ccc; padding: .35rem .7rem; text-align: left;
  vertical-align: top; overflow-wrap: break-word; }
.notebook table { display: block; overflow-x: auto; }
td.number, th.number { text-align: right; white-space: nowrap; }
blockquote { border-left: 4px solid #ccc; margin: 1rem 0; padding: 0 1rem; color: #444; }
img { max-width: 100%; }
.total { font-size: 1.4rem; font-weight: 600; margin: .3rem 0; }
.note { color: #444; margin: .3rem 0; }
.comment { border-left: 4px solid #e69f00; padding-left: .6rem; }
.comment > p { margin: .2rem 0; }
.notebook { border-top: 2px solid #222; margin-top: 2rem; padding-top: 1rem; }
.prompt { display: none; }
.cell { margin: .8rem 0; }
.input_area { background: #f6f6f6; padding: .6rem .8rem; border-radius: 4px; }
.output_subarea { padding: .4rem .8rem; }
.output_stderr { background: #fdf0ea; }
.nbgrader_cell { border: 1px solid #0072b2; border-radius: 4px; }
.panel-heading { background: #0072b2; color: #fff; padding: .3rem .8rem; }
.panel-heading a, .panel-heading code { color: #fff; }
.panel-body { padding: .3rem .8rem; }
.panel-body .input_area { background: none; padding: .3rem 0; }
.panel-footer { background: #fff6e0; border-top: 1px solid #e69f00; padding: .3rem .8rem; }
.pull-right { float: right; }
"""
# nbgrader's template gives the cells; head and summary are ours.
_TEMPLATE = """\
{%- extends 'index.html.j2' -%}
{%- block header -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ resources.page.title | e }}: {{ resources.page.student | e }}</title>
<style>{{ resources.page.style }}</style>
</head>
{%- endblock header -%}
{%- block body -%}
{%- set page = resources.page -%}
<body>
<a name="top"></a>
<h1>{{ page.title | e }}</h1>
<p class="note">{{ page.student | e }}</p>
<p class="total">{{ page.total | e }}</p>
{% for note in page.notes %}<p class="note">{{ note | e }}</p>{% endfor %}
<table>
<thead><tr><th>Question</th><th></th><th class="number">Points</th><th></th></tr></thead>
<tbody>
{% for row in page.rows %}
<tr><td><a href="#{{ row.link | e }}">{{ row.id | e }}</a></td><td>{{ row.title | e }}</td>
<td class="number">{{ row.points | e }}</td>
<td>{{ row.words | e }}
{% if row.comment %}<div class="comment">{{ row.comment | markdown2html }}</div>{% endif %}
</td></tr>
{% endfor %}
</tbody>
</table>
<div class="notebook">
{{ self.body_loop() }}
</div>
</body>
{%- endblock body -%}
{%- block footer -%}
</html>
{%- endblock footer -%}
"""


@dataclass(frozen=True)
class Row:
    """A line of the summary: what a question earned, in words for the student."""

    id: str
    title: str
    points: str
    words: str
    comment: str
    link: str


def write_feedback(folder: ClassFolder, name: str) -> list[Path]:
    """Write ``feedback/STUDENT/NAME/NAME.html`` for all whose submission is graded.

    Args:
        folder: of the class.
        name: of an exercise that was handed out.

    Returns:
        The pages, by student.

    Raises:
        ClassError: if a graded notebook is missing; all other pages are then written.
    """
    entries = journal.read(folder.results(name))
    path = locations.lessons_dir() / name / "questions.py"
    titles = {question.id: question.title for question in load_questions(path)}
    exporter = _exporter()
    pages, missing = [], []
    with open_gradebook(folder) as book:
        enter_students(book, folder)
        known = {each.student.id for each in book.notebook_submissions(name, name)}
        for student, entry in sorted(entries.items()):
            source = folder.autograded(student, name) / f"{name}.ipynb"
            if student not in known or not source.is_file():
                missing.append(student)
                continue
            set_late_penalty(book, folder, name, student)
            submission = book.find_submission_notebook(name, name, student)
            nb = nbformat.read(source, as_version=4)
            page = _page(name, student, entry.outcome.status, submission)
            page["rows"] = _rows(entry.outcome.marks, titles, submission, nb)
            html, _ = exporter.from_notebook_node(nb, {"page": page})
            pages.append(_write(folder, name, student, html))
    if missing:
        raise ClassError(
            f"{name}: no graded notebook of {', '.join(missing)}; "
            f"run: tlcourse grade run {name[:2]} --again"
        )
    return pages


def _page(name: str, student: str, status: str, submission: Any) -> dict[str, Any]:
    penalty = submission.late_submission_penalty or 0.0
    total, most = submission.score - penalty, submission.max_score
    person = " ".join(filter(None, (submission.student.first_name, submission.student.last_name)))
    notes = []
    if penalty:
        notes.append(f"{_number(penalty)} points were taken off, as it came late.")
    waiting = sum(1 for grade in submission.grades if grade.needs_manual_grade)
    if waiting:
        answers = "1 answer is" if waiting == 1 else f"{waiting} answers are"
        notes.append(f"{answers} still to be marked by your teacher.")
    if status != "graded":
        notes.append(f"Status: {status}.")
    return {
        "title": f"Feedback on exercise {name[:2]}: {name[3:].replace('_', ' ')}",
        "student": f"{person} ({student})" if person else student,
        "total": f"{_number(total)} of {_number(most)} points",
        "notes": notes,
        "style": _STYLE + HtmlFormatter().get_style_defs(".highlight"),
    }


def _rows(
    marks: list[Mark], titles: dict[str, str], submission: Any, nb: NotebookNode
) -> list[Row]:
    """The summary; points and comments also go into the cells, where nbgrader's template looks."""
    grades = {grade.name: grade for grade in submission.grades}
    comments = {comment.name: comment.manual_comment or "" for comment in submission.comments}
    cells = {c.metadata.nbgrader.grade_id: c for c in nb.cells if "nbgrader" in c.metadata}
    rows = []
    for mark in marks:
        grade, comment = grades[grade_cell(mark)], comments.get(answer_cell(mark), "")
        cells[grade_cell(mark)].metadata.nbgrader.update(score=grade.score, points=mark.of)
        cells[answer_cell(mark)].metadata.nbgrader.comment = comment
        given = grade.manual_score is not None or grade.auto_score is not None
        points = f"{_number(grade.score) if given else '?'} of {_number(mark.of)}"
        link = f"comment-{answer_cell(mark)}"  # nbgrader's name for the place of the answer
        title = titles.get(mark.id, "")
        rows.append(Row(mark.id, title, points, _words(mark, grade), comment, link))
    return rows


def _words(mark: Mark, grade: Any) -> str:
    by_person = grade.manual_score is not None
    if mark.status != "manual":
        return mark.words() + ("; the points were given by hand" if by_person else "")
    if by_person:
        return mark.words()
    return "not marked yet" if grade.auto_score is None else "no answer"


def _number(points: float) -> str:
    return f"{round(points, 2) + 0.0:g}"


def _exporter() -> HTMLExporter:
    import nbgrader

    log = logging.getLogger(__name__)
    log.setLevel(logging.ERROR)  # no warning for each picture without alternative text
    templates = Path(nbgrader.__file__).parent / "server_extensions" / "formgrader" / "templates"
    return HTMLExporter(
        log=log,
        template_name="feedback",
        extra_template_basedirs=[str(templates)],
        raw_template=_TEMPLATE,
        filters={"markdown2html": safe_markdown},
        sanitize_html=True,
    )


def _write(folder: ClassFolder, name: str, student: str, page: str) -> Path:
    """Write a page, and beside it what nbgrader's `release_feedback` asks for."""
    place, submitted = folder.feedback(student, name), folder.submitted(student, name)
    path = place / f"{name}.html"
    write_atomically(path, page.encode())
    path.chmod(0o644)  # as nbgrader's own: the exchange copies it with its mode
    for extra in ("timestamp.txt", "submission_secret.txt"):
        source = submitted / extra
        if source.is_file() and not source.is_symlink() and source.stat().st_size < 1000:
            write_atomically(place / extra, source.read_bytes())
    return path
