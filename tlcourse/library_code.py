"""Two styles of text without a download: code and documentation of Python's standard library.

Neither was part of the pre-training of the course's own language models. The files are parsed with
``ast``; nothing is imported or run.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from tlcourse.docstrings import docstrings_of, paragraphs, place

MODULES = (
    "argparse", "asyncio", "bdb", "calendar", "cmd", "code", "collections", "concurrent",
    "configparser", "contextlib", "csv", "dataclasses", "difflib", "email", "enum", "fractions",
    "ftplib", "functools", "gettext", "heapq", "html", "http", "inspect", "ipaddress", "json",
    "logging", "mailbox", "multiprocessing", "pdb", "pickle", "pprint", "queue", "random", "sched",
    "selectors", "shlex", "shutil", "smtplib", "socketserver", "statistics", "string",
    "subprocess", "tempfile", "textwrap", "threading", "trace", "urllib", "weakref", "xmlrpc",
)  # fmt: skip


@lru_cache(maxsize=1)
def library_styles() -> dict[str, list[list[str]]]:
    """Texts by part: "train code", "val code", "test code", "val docs" and "test docs".

    Each part is a list with a list of texts for each of its files. The split is by file (60, 15
    and 25 %), the same for both styles and on every machine; versions of Python differ a little.
    Do not change what you get: it is shared.
    """
    parts: dict[str, list[list[str]]] = {}
    for name, path in _library_files():
        share = place(name)
        part = "val" if share < 0.15 else "test" if share < 0.4 else "train"
        parts.setdefault(f"{part} code", []).append(functions_of(path))
        if part != "train":
            prose = [text for docstring in docstrings_of(path) for text in paragraphs(docstring)]
            parts.setdefault(f"{part} docs", []).append(prose)
    return parts


def functions_of(path: Path) -> list[str]:
    """The functions and methods of a Python file, without docstrings and comments.

    ``ast.unparse`` writes them anew from the syntax tree, which holds no comments.

    Raises:
        SyntaxError: if this version of Python cannot parse the file.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (*definitions, ast.ClassDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef)):
            found += [ast.unparse(part) for part in node.body if isinstance(part, definitions)]
    return found


def _library_files() -> Iterator[tuple[str, Path]]:
    """(name, path) of the files of ``MODULES``; the names are the same on every machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for module in MODULES:
        for path in [root / f"{module}.py", *sorted((root / module).rglob("*.py"))]:
            if path.is_file():
                yield path.relative_to(root).as_posix(), path
