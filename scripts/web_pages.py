"""The lessons as static web pages: notebooks/part*/*.ipynb -> site/, with an index."""

from __future__ import annotations

import html
import shutil
import sys
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "site"


def main() -> int:
    """Write the pages; 1 if there is nothing to write."""
    notebooks = sorted((ROOT / "notebooks").glob("part*/*.ipynb"))
    if not notebooks:
        print("no notebooks: run make build first", file=sys.stderr)
        return 1
    shutil.rmtree(SITE, ignore_errors=True)
    links: dict[str, list[str]] = {}
    for path in notebooks:
        page = SITE / path.relative_to(ROOT / "notebooks").with_suffix(".html")
        title = write_page(path, page)
        part = path.parent.name.partition("_")[2].replace("_", " ").capitalize()
        address = page.relative_to(SITE).as_posix()
        links.setdefault(part, []).append(f'<li><a href="{address}">{html.escape(title)}</a></li>')
    (SITE / "index.html").write_text(index(links), encoding="utf-8")
    print(f"{len(notebooks)} pages: {SITE / 'index.html'}")
    return 0


def write_page(path: Path, page: Path) -> str:
    """Convert one notebook; its title."""
    notebook = nbformat.read(path, as_version=4)
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    title = first.splitlines()[0].lstrip("# ").strip()
    resources = {"metadata": {"name": title}}
    body, _ = HTMLExporter().from_notebook_node(notebook, resources=resources)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(body, encoding="utf-8")
    return title


def index(links: dict[str, list[str]]) -> str:
    """The page that lists all lessons by part."""
    parts = "".join(
        f"<h2>{html.escape(part)}</h2><ul>{''.join(items)}</ul>" for part, items in links.items()
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<title>Transfer learning</title>"
        "<style>body{max-width:40rem;margin:3rem auto;padding:0 1rem;font:1.1rem/1.5 sans-serif}"
        f"</style><h1>Transfer learning</h1>{parts}</html>\n"
    )


if __name__ == "__main__":
    sys.exit(main())
