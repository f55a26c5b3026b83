"""``tlcourse build``: lesson sources -> notebooks, with outputs, cached and checked.

A notebook is executed again only when its code, what it reads beside it, or the library that
lessons use has changed; a change of prose keeps its outputs. Files are replaced whole, or not
at all.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from tlcourse import contents, locations
from tlcourse.execution import BuildError, as_bytes, execute
from tlcourse.lesson_rules import link_problems, source_problems
from tlcourse.lessons import Kind, Lesson, SourceError, files_sha256, find_lessons
from tlcourse.machine import core_count
from tlcourse.notebooks import cells_sha256, code_sha256, is_code, make, outputs_sha256

# Modules that no lesson can reach: a change there changes no output.
_NOT_IN_LESSONS = ("authoring", "cli", "contents", "doctor", "execution", "first", "lesson_rules",
                   "lessons", "notebooks", "pretrain")  # fmt: skip
_RIGHT = "\N{CHECK MARK} "  # how a check's result begins when it is right


@dataclass(frozen=True)
class Options:
    """How to build.

    Attributes:
        force: execute everything, and replace notebooks that were edited by hand.
        execute: False makes drafts without outputs where the outputs are not known.
        jobs: notebooks executed at the same time; times are only comparable with 1.
    """

    force: bool = False
    execute: bool = True
    jobs: int = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``tlcourse build``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tlcourse build", description=__doc__.split("\n")[0])
    parser.add_argument("lessons", nargs="*", metavar="NN", help="lesson numbers; all if none")
    parser.add_argument("--check", action="store_true", help="only say which products are stale")
    parser.add_argument("--force", action="store_true", help="execute even what is unchanged")
    parser.add_argument("--no-execute", action="store_true", help="make drafts without outputs")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks run at the same time")
    parser.add_argument("--root", type=Path, default=None, help="repository (default: this one)")
    arguments = parser.parse_args(argv)
    root = arguments.root or locations.repo_root()
    if root is None:
        print("tlcourse build needs a checkout of the repository", file=sys.stderr)
        return 1
    try:
        lessons = _chosen(find_lessons(root.resolve()), arguments.lessons)
    except ValueError as error:
        parser.error(str(error))
    if arguments.check:
        problems = check_products(root.resolve(), lessons)
    else:
        options = Options(arguments.force, not arguments.no_execute, max(1, arguments.jobs))
        problems = build(root.resolve(), lessons, options)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


def build(root: Path, lessons: list[Lesson], options: Options = Options()) -> list[str]:
    """Make the notebooks of some lessons, then the pages that list all of them.

    Returns:
        Problems; what has one keeps its old file.
    """
    problems = []
    jobs: list[tuple[Lesson, Kind]] = []
    for lesson in lessons:
        found = source_problems(lesson)
        problems += found
        jobs += [(lesson, kind) for kind in lesson.kinds()] if not found else []
    with ThreadPoolExecutor(options.jobs) as pool:
        for report in pool.map(lambda job: _build_one(job[0], job[1], options), jobs):
            print(report.line, flush=True)
            problems += report.problems
    for lesson, kind in jobs if not problems else ():  # a failed build leaves links open
        nb = read(root / lesson.product(kind))
        problems += link_problems(nb, lesson.product(kind), root) if nb else []
    return problems + contents.write(root) + _orphans(root)


def check_products(root: Path, lessons: list[Lesson]) -> list[str]:
    """Name each product that is missing, stale, edited by hand, or without a source."""
    problems = []
    for lesson in lessons:
        found = source_problems(lesson)
        problems += found
        for kind in lesson.kinds() if not found else ():
            problems += _product_problems(lesson, kind)
    return problems + contents.problems(root) + _orphans(root)


def read(path: Path) -> NotebookNode | None:
    """A notebook, or None if there is no file or it is no notebook."""
    try:
        return nbformat.read(path, as_version=4)
    except (OSError, nbformat.reader.NotJSONError, nbformat.ValidationError):
        return None


def environment_sha256(root: Path) -> str:
    """A hash of what outputs depend on beside the lesson: library, lock, checkpoints."""
    library = sorted((root / "tlcourse").glob("*.py"))
    files = [path for path in library if path.stem not in _NOT_IN_LESSONS]
    files += [root / "requirements.lock", *sorted(root.glob("data/checkpoints/*.safetensors"))]
    return files_sha256([path for path in files if path.is_file()])


@dataclass(frozen=True)
class _Report:
    line: str
    problems: list[str]


def _build_one(lesson: Lesson, kind: Kind, options: Options) -> _Report:
    product = lesson.product(kind)
    try:
        done = _produce(lesson, kind, options)
    except (BuildError, SourceError) as error:
        return _Report(f"{product.as_posix()}: FAILED", [str(error)])
    return _Report(f"{product.as_posix()}: {done}", [])


def _produce(lesson: Lesson, kind: Kind, options: Options) -> str:
    """Make one product; returns what was done."""
    path = lesson.root / lesson.product(kind)
    old = read(path)
    if old is not None and not options.force and _edited(old):
        raise BuildError(
            f"{lesson.product(kind).as_posix()} was edited by hand: change "
            f"{lesson.source(kind).relative_to(lesson.root).as_posix()} instead, "
            f"or replace the notebook with --force"
        )
    nb = make(lesson, kind)
    done = "written"
    if kind != "exercise":
        done = _fill(nb, old, lesson, kind, options)
        nb.metadata.tlcourse.outputs_sha256 = outputs_sha256(nb)
    data = as_bytes(nb, lesson.product(kind).as_posix())
    if path.is_file() and path.read_bytes() == data:
        return "unchanged"
    _replace(path, data)
    return f"{done}, {len(data) // 1000} kB"


def _fill(
    nb: NotebookNode, old: NotebookNode | None, lesson: Lesson, kind: Kind, options: Options
) -> str:
    """Outputs into a new notebook: from the old one where they must be the same, or run."""
    info = nb.metadata.tlcourse
    info.code_sha256 = code_sha256(nb, lesson.inputs(kind))
    info.environment_sha256 = environment_sha256(lesson.root)
    known = old.metadata.get("tlcourse", {}) if old is not None else {}
    same = all(known.get(k) == info[k] for k in ("code_sha256", "environment_sha256"))
    if old is not None and same and _has_own_outputs(old) and not options.force:
        _copy_outputs(old, nb)
        return "outputs kept"
    if not options.execute:
        info.environment_sha256 = ""  # no outputs yet: the next build runs it
        return "draft"
    seconds = execute(nb, lesson.product(kind).as_posix(), lesson.root)
    if kind == "lesson":
        info.seconds = round(seconds, 1)
        info.machine = machine()
    else:
        _demand_right(nb, lesson)
    return f"executed in {seconds:.1f} s"


def _copy_outputs(old: NotebookNode, nb: NotebookNode) -> None:
    pairs = zip(filter(is_code, old.cells), filter(is_code, nb.cells), strict=True)
    for before, after in pairs:
        after.outputs = before.outputs
        after.execution_count = before.execution_count
    if "widgets" in old.metadata:
        nb.metadata.widgets = old.metadata.widgets
    for key in ("seconds", "machine"):
        if key in old.metadata.tlcourse:
            nb.metadata.tlcourse[key] = old.metadata.tlcourse[key]


def _demand_right(nb: NotebookNode, lesson: Lesson) -> None:
    """Every check of a solution must say that it is right, where a learner can see it."""
    for cell in nb.cells:
        grade_id = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        if not grade_id.endswith("-check"):
            continue
        shown = [out.data.get("text/plain", "") for out in cell.outputs if "data" in out]
        if not any(text.startswith(_RIGHT) for text in shown):
            found = shown[0] if shown else "nothing is shown"
            raise BuildError(f"{lesson.name}: {grade_id} of the solution is not right: {found}")


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _edited(nb: NotebookNode) -> bool:
    return nb.metadata.get("tlcourse", {}).get("cells_sha256") != cells_sha256(nb)


def _has_own_outputs(nb: NotebookNode) -> bool:
    """False if a person has run the notebook, or cleared it, and saved it."""
    return nb.metadata.tlcourse.get("outputs_sha256") == outputs_sha256(nb)


def _product_problems(lesson: Lesson, kind: Kind) -> list[str]:
    product = lesson.product(kind).as_posix()
    nb = read(lesson.root / product)
    if nb is None:
        return [f"{product} is missing; run `tlcourse build {lesson.number}`"]
    if _edited(nb):
        source = lesson.source(kind).relative_to(lesson.root).as_posix()
        return [f"{product} was edited by hand; edit {source} instead"]
    try:
        fresh = make(lesson, kind)
    except SourceError as error:
        return [str(error)]
    known, info = nb.metadata.tlcourse, fresh.metadata.tlcourse
    if known.get("source_sha256") != info.source_sha256:
        return [f"{product} is older than {info.source}; run `tlcourse build {lesson.number}`"]
    cells = [[(c.id, c.cell_type, c.source, c.metadata) for c in x.cells] for x in (nb, fresh)]
    if cells[0] != cells[1] or known.cells_sha256 != info.cells_sha256:
        return [f"{product} is not what its source gives now; run `tlcourse build`"]
    if kind == "exercise":
        outputs = [cell for cell in filter(is_code, nb.cells) if cell.outputs]
        return [f"{product} holds outputs; an exercise has none"] if outputs else []
    if not known.get("environment_sha256"):
        return [f"{product} is a draft without outputs; run `tlcourse build {lesson.number}`"]
    if not _has_own_outputs(nb):
        return [f"{product} was run or cleared by hand; run `tlcourse build {lesson.number}`"]
    return link_problems(nb, lesson.product(kind), lesson.root)


def _orphans(root: Path) -> list[str]:
    """Generated notebooks that no source makes any more."""
    made = {lesson.product(kind) for lesson in find_lessons(root) for kind in lesson.kinds()}
    problems = []
    for folder in ("notebooks", "solutions"):
        for path in sorted((root / folder).rglob("*.ipynb")):
            if path.relative_to(root) in made or ".ipynb_checkpoints" in path.parts:
                continue
            nb = read(path)  # a notebook that the reader made is none of our business
            if nb is not None and nb.metadata.get("tlcourse", {}).get("generated"):
                problems.append(f"{path.relative_to(root).as_posix()} has no source; remove it")
    return problems


def machine() -> str:
    """Cores and processor, for the table of times."""
    name = platform.processor() or platform.machine()
    cpus = Path("/proc/cpuinfo")
    if cpus.is_file():
        names = [line for line in cpus.read_text().splitlines() if line.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    return f"{core_count()} cores, {name}"


def _chosen(lessons: list[Lesson], numbers: list[str]) -> list[Lesson]:
    known = {lesson.number: lesson for lesson in lessons}
    for number in numbers:
        if number not in known:
            raise ValueError(f"no lesson {number!r}; there are {', '.join(known) or 'none'}")
    return [known[number] for number in numbers] or lessons
