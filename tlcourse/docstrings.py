"""Text without a download: docstrings of the interpreter's own standard library.

They are read from the ``.py`` files with ``ast``; nothing is imported or run.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

# Topic -> modules and packages. All are there in Python 3.11 to 3.14, and in distributions that
# leave tkinter, idlelib and test out.
TOPICS = {
    "concurrency": (
        "asyncio", "threading", "_threading_local", "multiprocessing", "concurrent", "queue",
        "sched", "selectors", "subprocess",
    ),
    "numbers": (
        "_pydecimal", "fractions", "statistics", "random", "numbers", "colorsys", "datetime",
        "_pydatetime", "calendar",
    ),
    "files": (
        "zipfile", "tarfile", "gzip", "bz2", "lzma", "shutil", "pathlib", "tempfile", "os",
        "glob", "fileinput", "filecmp", "posixpath", "genericpath", "_pyio", "shelve", "stat",
    ),
    "testing": (
        "unittest", "doctest", "pdb", "bdb", "trace", "timeit", "cProfile", "profile", "pstats",
        "tracemalloc", "traceback",
    ),
}  # fmt: skip
# Words that name a topic, and so would give the label away.
LABEL_WORDS = frozenset({
    "concurrency", "concurrent", "concurrently", "number", "numbers", "numeric", "numerical",
    "file", "files", "filename", "filenames", "test", "tests", "tested", "testing",
})  # fmt: skip
MIN_WORDS, MAX_WORDS, MAX_PARAGRAPHS = 12, 60, 4

_IDENTIFIER = re.compile(r"[_.()\[\]{}=<>*/\\|@`:%$#&+~^]|\d|[a-z][A-Z]")
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*[,;.!?]?")


@dataclass(frozen=True)
class Passage:
    """The first words of a docstring.

    Attributes:
        text: ``MIN_WORDS`` to ``MAX_WORDS`` words of prose.
        topic: a key of ``TOPICS``.
        file: where it stands, the same name in every version of Python ("asyncio/locks").
    """

    text: str
    topic: str
    file: str


@lru_cache(maxsize=1)
def standard_library() -> tuple[Passage, ...]:
    """All passages of the topics, each text once, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: dict[str, Passage] = {}
    for topic, names in TOPICS.items():
        for path, file in _files(root, names):
            for docstring in docstrings_of(path):
                text = prose(docstring)
                if len(text.split()) >= MIN_WORDS:
                    seen.setdefault(text, Passage(text, topic, file))
    return tuple(seen.values())


def docstrings_of(path: Path) -> list[str]:
    """Every docstring of a module, a class or a function in a file, from top to bottom.

    A file that does not parse gives none.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    except (SyntaxError, ValueError, OSError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text]


def prose(docstring: str) -> str:
    """Words of the first paragraphs; names of things in the code are taken out.

    Examples (``>>>``), identifiers, the names of the modules above and ``LABEL_WORDS`` go: a
    reader of the text alone has to tell the topic from what it says.
    """
    paragraphs = re.split(r"\n\s*\n", docstring.strip())[:MAX_PARAGRAPHS]
    lines = [
        line
        for paragraph in paragraphs
        for line in paragraph.splitlines()
        if not line.lstrip().startswith((">>>", "...", "- ", "| "))
    ]
    words = [word for line in lines for word in line.split() if not _names_a_thing(word)]
    return " ".join(words[:MAX_WORDS])


def _names_a_thing(word: str) -> bool:
    bare = word.strip("\"'(),;.!?:")
    if not _WORD.fullmatch(bare + word[len(word.rstrip(",;.!?")) :]) or _IDENTIFIER.search(bare):
        return True
    return not _given_away().isdisjoint(re.split(r"['-]", bare.lower()))


@lru_cache(maxsize=1)
def _given_away() -> frozenset[str]:
    """Words that name a topic or a module, in lower case."""
    modules = {
        name.removeprefix("_py").strip("_").lower() for names in TOPICS.values() for name in names
    }
    return LABEL_WORDS | modules | {name.removesuffix("s") for name in modules}


def place(file: str) -> float:
    """A number in [0, 1) that depends on the name of a file alone: for splits by file."""
    return int(hashlib.sha256(file.encode()).hexdigest()[:8], 16) / 2**32


def _files(root: Path, names: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    """(path, name that is the same in every version) of modules and packages."""
    for name in names:
        module, package = root / f"{name}.py", root / name
        if module.is_file():
            yield module, name.removeprefix("_py")
        for path in sorted(package.rglob("*.py")):
            inside = path.relative_to(root).with_suffix("").as_posix()
            yield path, inside.removesuffix("/__init__")


def paragraphs(docstring: str) -> list[str]:
    """Its paragraphs of prose, in one line each: no examples, tables or formulas.

    What a list of parameters says of each counts as a paragraph, without name and type.
    """
    found = []
    for block in re.split(r"\n\s*\n", _HEADING.sub("\n", docstring)):
        if any(line.lstrip().startswith(_NO_PROSE) for line in block.splitlines()):
            continue
        for part in _PARAMETER.split(block):
            words = part.split()
            plain = sum(bool(_WORD.fullmatch(word.strip("\"'()"))) for word in words)
            if len(words) >= 8 and plain >= 0.75 * len(words) and words[-1][-1] in ".!?":
                found.append(" ".join(words))
    return found


_HEADING = re.compile(r"^[^\n]*\n[ \t]*(?:-{3,}|={3,}|~{3,})[ \t]*$", re.M)
# "name : type" on a line of its own, or "name (type): " before what it says.
_PARAMETER = re.compile(r"^[ \t]*(?:[\w*, ./]+ : .*|\w+(?: ?\([^)\n]*\))?:(?=\s)|\w+:)[ \t]*", re.M)
_NO_PROSE = (">>>", "...", "| ", "===", "~~~", "+-", "..", "@")
PACKAGES = (
    "torch", "torchvision", "transformers", "peft", "numpy", "scipy", "sklearn", "matplotlib",
    "sympy", "networkx", "joblib", "huggingface_hub",
)  # fmt: skip


def package_prose(
    packages: tuple[str, ...] = PACKAGES, low: float = 0.0, high: float = 1.0
) -> Iterator[tuple[str, str]]:
    """(file, paragraph) for docstrings of installed packages, each paragraph once.

    Args:
        packages: their names.
        low: files whose ``place`` is less are left out.
        high: and those whose ``place`` is this or more.

    Raises:
        ModuleNotFoundError: if a package is not installed.
    """
    seen: set[int] = set()
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"the package {package!r} is not installed")
        root = Path(spec.submodule_search_locations[0])
        for path in sorted(root.rglob("*.py")):
            file = f"{package}/{path.relative_to(root).as_posix()}"
            if not low <= place(file) < high:
                continue
            for docstring in docstrings_of(path):
                for paragraph in paragraphs(docstring):
                    if hash(paragraph) not in seen:
                        seen.add(hash(paragraph))
                        yield file, paragraph
