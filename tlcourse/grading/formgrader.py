"""What nbgrader's formgrader needs, so that hostile text is safe to look at and never run.

nbconvert passes the HTML and ``javascript:`` links of a Markdown cell through, and nbgrader's
templates do not clean them: a submission could act for the teacher in Jupyter, which can run
anything. So Markdown becomes HTML here only if each ``<`` in it belongs to a tag that Markdown
itself makes. Otherwise the whole cell is shown as it was written.

The ``nbgrader_config.py`` of a class folder names :func:`safe_markdown` and :class:`Refused`.
"""

from __future__ import annotations

import functools
import html
import re
import textwrap
from typing import Any

from nbconvert.exporters import NotebookExporter

_LONGEST = 20_000  # characters; the parser's time grows faster than the text
_URL = r'(?:https?://|mailto:|\#|(?:\.\.?/)+)[^"<>]*'
_CLASS = r"highlight|[a-z][a-z0-9]{0,2}|task-list-item(?:-checkbox)?|language-[\w+-]+"
_TAG = re.compile(
    rf"""<(?P<end>/)?
    (?P<name>a|blockquote|br|code|dd|del|div|dl|dt|em|h[1-6]|hr|input|kbd|li|ol|p|pre|span|strong|
        sub|sup|table|tbody|td|th|thead|tr|ul)
    (?:[\ \n](?:href="{_URL}"|class="(?:{_CLASS})"|title="[^"<>]*"|start="\d+"|type="checkbox"|
        style="text-align:(?:left|right|center)"|disabled|checked))*
    [ ]?/?>""",
    re.VERBOSE | re.ASCII,
)
_VOID = {"br", "hr", "input"}
_PASTED = re.compile(r"!\[([^\[\]\n]*)\]\(\s*(?:attachment|data):[^()\n]*\)")
_REFUSAL = "this class is graded with tlcourse; in its folder, run: tlcourse grade --help"


class Refused(NotebookExporter):
    """Stands where nbgrader's own steps would run a submission, or undo what ours have done.

    Raises:
        RuntimeError: always; says what to do instead.
    """

    def __init__(self, **_: Any) -> None:
        raise RuntimeError(_REFUSAL)


@functools.lru_cache(maxsize=4096)  # most of what students hand in is the exercise's own text
def rendered(source: str) -> str | None:
    """HTML of a Markdown text from anyone, with mathematics left as TeX.

    Pictures that were pasted into the text are left out.

    Returns:
        None if there is, or may be, anything but formatted text in it, or it is too long.
    """
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    text = _without_pictures(source)
    if len(text) > _LONGEST:
        return None
    # No anchors: the id of a heading could take the place of one of formgrader's own.
    renderer = IPythonRenderer(escape=False, exclude_anchor_links=True)
    try:
        made = MarkdownWithMath(renderer=renderer).render(text)
    except Exception:  # whatever a text provokes in the parser: it is shown as it was written
        return None
    return made if _only_formats(made) else None


def safe_markdown(source: str) -> str:
    """In the place of nbconvert's filter ``markdown2html``: HTML with nothing active in it."""
    made = rendered(source)
    return f"<pre>{html.escape(source)}</pre>\n" if made is None else made


def inert(source: str) -> str:
    """Markdown that every renderer of notebooks can show safely.

    Returns:
        The text without pasted pictures; or, if it is not safe, a code block with its source.
    """
    if rendered(source) is not None:
        return _without_pictures(source)
    block = textwrap.indent(_without_pictures(source)[: _LONGEST // 4], "    ")
    return block if rendered(block) is not None else "*This cell cannot be shown.*"


def _without_pictures(source: str) -> str:
    return _PASTED.sub(r"(picture, not kept: \1)", source)


def _only_formats(made: str) -> bool:
    """Whether every tag is one of those above, and is closed in its place."""
    opened: list[str] = []
    for place in re.finditer("<", made):
        tag = _TAG.match(made, place.start())
        if tag is None:
            return False
        if tag["name"] in _VOID:
            continue
        if not tag["end"]:
            opened.append(tag["name"])
        elif not opened or opened.pop() != tag["name"]:
            return False
    return not opened
