"""Generated pages: the list of lessons in the README, and the table of measured times."""

from __future__ import annotations

from pathlib import Path

import nbformat

from tlcourse.lessons import PARTS, Lesson, SourceError, colab_url, find_lessons
from tlcourse.notebooks import title

BEGIN, END = "<!-- lessons:begin -->", "<!-- lessons:end -->"
TIMINGS = Path("notebooks", "TIMINGS.md")


def write(root: Path) -> list[str]:
    """Bring the generated pages up to date; returns problems."""
    try:
        for path, text in _pages(root).items():
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8", newline="\n")
    except SourceError as error:
        return [str(error)]
    return []


def problems(root: Path) -> list[str]:
    """Generated pages that are not up to date."""
    try:
        pages = _pages(root)
    except SourceError as error:
        return [str(error)]
    return [
        f"{path.relative_to(root).as_posix()} is not up to date; run `tlcourse build`"
        for path, text in pages.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def lesson_table(root: Path) -> str:
    """Markdown: for each part a table of its lessons, with links."""
    lines: list[str] = []
    lessons = find_lessons(root)
    for _, folder, name in PARTS:
        rows = [_row(lesson) for lesson in lessons if lesson.part[0] == folder]
        if rows:
            lines += [f"**{name}**", "", "| | Lesson | Exercise | Colab |", "|---|---|---|---|"]
            lines += [*rows, ""]
    return "\n".join(lines).rstrip("\n")


def _row(lesson: Lesson) -> str:
    here = lesson.product("lesson").as_posix()
    exercise = ""
    if lesson.has_exercise:
        points = sum(question.points for question in lesson.questions())
        unit = "point" if points == 1 else "points"
        exercise = f"[{points:g} {unit}]({lesson.product('exercise').as_posix()})"
    url = colab_url(lesson.root, lesson.product("lesson"))
    colab = f"[open]({url})" if url else ""
    return f"| {lesson.number} | [{title(lesson)}]({here}) | {exercise} | {colab} |"


def _timings(root: Path) -> str:
    """The table of measured times, from what each built lesson records about itself."""
    lines = [
        "# Measured times",
        "",
        "Written by `tlcourse build`: wall time of a whole lesson in a fresh kernel, its start",
        "included, and the size of its file.",
        "",
        "| lesson | code cells | seconds | kB | machine |",
        "|---|---|---|---|---|",
    ]
    for lesson in find_lessons(root):
        path = root / lesson.product("lesson")
        if not path.is_file():
            continue
        nb = nbformat.read(path, as_version=4)
        info = nb.metadata.get("tlcourse", {})
        if "seconds" not in info:
            continue
        cells = sum(cell.cell_type == "code" for cell in nb.cells)
        size = path.stat().st_size // 1000
        lines.append(f"| {lesson.name} | {cells} | {info.seconds} | {size} | {info.machine} |")
    return "\n".join(lines) + "\n"


def _pages(root: Path) -> dict[Path, str]:
    pages = {root / TIMINGS: _timings(root)}
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if BEGIN in text and END in text:
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
        pages[readme] = f"{before}{BEGIN}\n\n{lesson_table(root)}\n\n{END}{after}"
    return pages
