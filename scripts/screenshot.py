"""Pictures of a notebook as a learner sees it, in real JupyterLab.

    python scripts/screenshot.py notebooks/part1_foundations/01_why_transfer.ipynb out.png --run

Without ``--full`` a long notebook becomes out-1.png, out-2.png, ... of ``--height`` pixels.
The notebook is opened as a copy, so the file itself does not change.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import lab

_TOOLBARS = 110  # pixels that menu and toolbar take at most
_TALLEST = 16_000  # Chromium draws no picture taller than this


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("out", type=Path, help="PNG file, or its stem when there are several")
    parser.add_argument("--run", action="store_true", help="run all cells first")
    parser.add_argument("--full", action="store_true", help="one picture, as tall as it takes")
    parser.add_argument("--dark", action="store_true", help="JupyterLab's dark theme")
    parser.add_argument("--width", type=int, default=1280, help="in pixels")
    parser.add_argument("--height", type=int, default=1600, help="in pixels, of each picture")
    arguments = parser.parse_args()
    executable = lab.chromium()
    if executable is None:
        sys.exit("no Chromium: apt-get install chromium, or set TLCOURSE_CHROMIUM to a browser")
    if not arguments.notebook.is_file():
        sys.exit(f"no such notebook: {arguments.notebook}")
    for path in take(arguments, executable):
        print(path)


def take(arguments: argparse.Namespace, executable: str) -> list[Path]:
    """Open, run if asked, and save the pictures; returns their paths."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(arguments.notebook, folder)
        theme = "dark" if arguments.dark else "light"
        with (
            lab.server(Path(folder), theme) as (address, token),
            lab.browser(executable) as browser,
        ):
            page = browser.new_page(viewport={"width": arguments.width, "height": arguments.height})
            notebook = lab.Notebook(page, address, token)
            notebook.open(arguments.notebook.name, simple=True)
            if arguments.run:
                notebook.run_all(600)
            paths = save(notebook, arguments)
            for problem in notebook.problems:
                print(problem, file=sys.stderr)
            return paths


def save(notebook: lab.Notebook, arguments: argparse.Namespace) -> list[Path]:
    """One tall picture, or as many as it takes."""
    page, out = notebook.page, arguments.out.with_suffix(".png")
    out.parent.mkdir(parents=True, exist_ok=True)
    total = notebook.height()
    if arguments.full:
        tall = min(total + _TOOLBARS, _TALLEST)
        page.set_viewport_size({"width": arguments.width, "height": tall})
        page.wait_for_timeout(1000)
        page.screenshot(path=out)
        return [out]
    seen = page.locator(".jp-WindowedPanel-outer").bounding_box()
    assert seen is not None
    x, y, width, height = seen["x"], seen["y"], seen["width"], seen["height"]
    paths: list[Path] = []
    for number, top in enumerate(range(0, total, int(height)), 1):
        # At the end the notebook scrolls less than asked: cut off what was seen before.
        before = top - notebook.scroll_to(top)
        page.wait_for_timeout(150)
        rest = min(height - before, total - top)
        path = out.with_name(f"{out.stem}-{number}.png")
        page.screenshot(path=path, clip={"x": x, "y": y + before, "width": width, "height": rest})
        paths.append(path)
    return paths


if __name__ == "__main__":
    main()
