"""The committed notebooks are what their sources give. Running them is nbval's part."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tlcourse.authoring import check_products
from tlcourse.execution import MAX_NOTEBOOK_BYTES
from tlcourse.lesson_rules import MAX_CELL_LINES
from tlcourse.lessons import find_lessons
from tlcourse.notebooks import is_code, read_cells, regions

REPO = Path(__file__).resolve().parents[1]
LESSONS = find_lessons(REPO)
EXERCISES = [lesson for lesson in LESSONS if lesson.has_exercise]
PRODUCTS = [
    REPO / lesson.product(kind)
    for lesson in LESSONS
    for kind in lesson.kinds()
    if (REPO / lesson.product(kind)).is_file()
]


def product_id(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


@pytest.mark.skipif(not LESSONS, reason="no lesson yet")
def test_products_match_their_sources() -> None:
    assert check_products(REPO, LESSONS) == []


@pytest.mark.parametrize("path", PRODUCTS, ids=product_id)
def test_notebook_is_valid_and_small(path: Path) -> None:
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    assert path.stat().st_size <= MAX_NOTEBOOK_BYTES
    ids = [cell.id for cell in nb.cells]
    assert len(set(ids)) == len(ids)
    assert not any(out.output_type == "error" for c in nb.cells for out in c.get("outputs", []))


@pytest.mark.parametrize("path", PRODUCTS, ids=product_id)
def test_nbgrader_accepts_the_notebook(path: Path) -> None:
    v3 = pytest.importorskip("nbgrader.nbgraderformat.v3")
    v3.MetadataValidatorV3().validate_nb(nbformat.read(path, as_version=4))


@pytest.mark.parametrize("lesson", EXERCISES, ids=lambda lesson: lesson.name)
def test_exercise_shows_no_solution(lesson) -> None:
    path = REPO / lesson.product("exercise")
    if not path.is_file():
        pytest.skip("not built; another test says so")
    nb = nbformat.read(path, as_version=4)
    shown = {line.strip() for cell in nb.cells for line in cell.source.split("\n")}
    assert not any(cell.get("outputs") for cell in nb.cells)
    for cell in read_cells(lesson.source("exercise")):
        for region, block in regions(cell.source):
            # Long lines only: "return x" may well stand elsewhere.
            secret = {line.strip() for line in block[1:-1] if len(line.strip()) > 25}
            assert not region or not secret & shown, secret & shown


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_lesson_pacing(lesson) -> None:
    cells = read_cells(lesson.source("lesson"))
    code = sorted(len(cell.source.split("\n")) for cell in cells if is_code(cell))
    assert code[len(code) // 2] <= MAX_CELL_LINES * 2 // 3  # the median cell is short
    assert sum(not is_code(cell) for cell in cells) >= 0.5 * len(code)  # text beside code
