"""Groups 6 to 9: files that are no notebook, and notebooks whose test cells are not ours."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from tests.grading.hostile.scene import (
    POINTS,
    WRONG_1,
    Attack,
    Make,
    Scene,
    checks,
    edited,
    find,
    grade_id,
)

NOTHING = dict.fromkeys(POINTS, 0.0)
HONEST = edited()


def as_bytes(make: Callable[[bytes], bytes]) -> Make:
    """The bytes of an honest notebook after some change."""
    return lambda scene: make(HONEST(scene))


def as_file(make: Callable[[Path, Scene], None]) -> Make:
    """Something that stands where the file should be; beside the class folder, not in it."""

    def put(scene: Scene) -> Path:
        path = scene.folder.parent / "handed_in.ipynb"
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        path.unlink(missing_ok=True)
        make(path, scene)
        return path

    return put


def sparse(path: Path, scene: Scene) -> None:
    with path.open("wb") as file:
        file.truncate(500 * 10**6)


def format_3(data: bytes) -> bytes:
    nb = nbformat.reads(data.decode(), 4)
    return nbformat.writes(nbformat.convert(nb, 3)).encode()


def with_odd_parts(data: bytes) -> bytes:
    """Cells that are no cells beside the honest ones."""
    raw = json.loads(data)
    odd: list[dict[str, Any]] = [
        {}, {"cell_type": ["code"]}, {"cell_type": "code", "source": {"a": 1}},
        {"cell_type": "code", "source": [1, None, "x = 1\n"], "metadata": [], "outputs": "none"},
        {"cell_type": "code", "source": "\ud800", "metadata": {"nbgrader": ["03-q1-check"]}},
        {"cell_type": "code", "source": "y = 2", "metadata": {"nbgrader": {"grade_id": {}}}},
        {"cell_type": "code", "source": "\x00", "outputs": [[[]], 5, {"output_type": 7}]},
    ]  # fmt: skip
    raw["cells"] = odd + raw["cells"]
    raw["nbformat"], raw["metadata"] = "four", 7
    return json.dumps(raw).encode()


def _unreadable(name: str, does: str, make: Make, *says: str, within: float = 5) -> Attack:
    status = dict.fromkeys(POINTS, "unreadable")
    return Attack(group=6, name=name, does=does, make=make, points=NOTHING, within=within,
                  status=status, says=("unreadable", *says))  # fmt: skip


NO_NOTEBOOKS = [
    _unreadable("cut off", "Half a notebook.", as_bytes(lambda b: b[: len(b) // 2]), "not JSON"),
    _unreadable("UTF-16", "A notebook in UTF-16.",
                as_bytes(lambda b: b.decode().encode("utf-16")), "not UTF-8"),
    _unreadable("noise", "Random bytes.", lambda scene: os.urandom(10**6), "not UTF-8"),
    _unreadable("empty", "An empty file.", lambda scene: b" \n", "empty"),
    _unreadable("other JSON", "JSON that is no notebook.", lambda scene: b'{"a": [1]}', "no list"),
    _unreadable("a list", "JSON that is a list.", lambda scene: b"[1, 2]", "not a notebook"),
    _unreadable("cells that are none", "Numbers in place of cells.",
                lambda scene: b'{"cells": [1, 2]}', "no list"),
    _unreadable("100,000 levels", "JSON in 100,000 levels.",
                lambda scene: b"[" * 100_000 + b"]" * 100_000, "nested"),
    _unreadable("100,000 levels in a cell", "A source in 100,000 levels.",
                lambda scene: b'{"cells": [{"source": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]}",
                "nested"),
    _unreadable("a number of 100,000 digits", "A number that takes long to read.",
                lambda scene: b'{"cells": [{"execution_count": ' + b"7" * 100_000 + b"}]}", "JSON"),
    _unreadable("a million cells", "More cells than a person writes.",
                lambda scene: b'{"cells": [' + b"{}," * 10**6 + b"{}]}", "1000001 cells"),
    _unreadable("500 MB", "A file of 500 MB, all of it a hole.", as_file(sparse), "500 MB"),
    _unreadable("symbolic link", "A link to the class secret.",
                as_file(lambda path, scene: path.symlink_to(scene.folder / "class_secret")),
                "cannot be opened"),
    _unreadable("named pipe", "A pipe to which nobody writes.",
                as_file(lambda path, scene: os.mkfifo(path)), "not a plain file"),
    _unreadable("folder", "A folder.", as_file(lambda path, scene: path.mkdir()), "plain file"),
    Attack(group=6, name="no cells in format 3", does="Sheets of format 3 that hold a number.",
           make=lambda scene: b'{"worksheets": [{"cells": 5}, {"cells": null}, 7]}',
           points=NOTHING, status=dict.fromkeys(POINTS, "no answer")),
    Attack(group=6, name="format 3", does="Honest work in nbformat 3.", make=as_bytes(format_3)),
    Attack(group=6, name="odd parts", does="Honest work beside cells whose source, metadata and "
           "outputs are of wrong types.", make=as_bytes(with_odd_parts)),
    Attack(group=6, name="byte order mark", does="Honest work, saved with a mark before it.",
           make=as_bytes(lambda b: b"\xef\xbb\xbf" + b)),
    Attack(group=6, name="nested type of a cell", does="Honest work and a cell whose type is a "
           "list of 900 levels.", make=as_bytes(lambda b: b.replace(
               b'"cells": [', b'"cells": [{"cell_type": ' + b"[" * 900 + b"]" * 900 + b"},", 1))),
]  # fmt: skip


def without(*parts: str) -> Callable[[NotebookNode], None]:
    """Delete all cells whose grade id ends in one of the parts."""

    def edit(nb: NotebookNode) -> None:
        nb.cells = [cell for cell in nb.cells if not grade_id(cell).endswith(parts)]

    return edit


def only(*numbers: int) -> Callable[[NotebookNode], None]:
    def edit(nb: NotebookNode) -> None:
        nb.cells = [nb.cells[number] for number in numbers]

    return edit


DELETED = [
    Attack(group=7, name="checks deleted", does="Honest work without its test cells.",
           make=edited(without("-check"))),
    Attack(group=7, name="checks deleted, wrong answer", does="A wrong answer without test cells.",
           make=edited(without("-check"), q1=WRONG_1), points={"q1": 0}, status={"q1": "wrong"}),
    Attack(group=7, name="answer deleted", does="One answer and its test cell deleted.",
           make=edited(without("q5-answer", "q5-check")), points={"q5": 0},
           status={"q5": "no answer"}),
    Attack(group=7, name="answer set to True", does="An answer replaced by True.",
           make=edited(q5="lora_gradients = True"), points={"q5": 0}, status={"q5": "raised"}),
    Attack(group=7, name="all deleted", does="No cell at all.", make=edited(only()),
           points=NOTHING, status=dict.fromkeys(POINTS, "no answer")),
    Attack(group=7, name="two answers kept", does="Only the imports and two honest answers.",
           make=edited(only(1, 2, 6, 27)), points={"q2": 0, "q3": 0, "q4": 0}),
]  # fmt: skip


def more_points(nb: NotebookNode) -> None:
    for cell in nb.cells:
        if "nbgrader" in cell.metadata:
            cell.metadata.nbgrader |= {"points": 1000, "locked": False, "grade": True,
                                       "checksum": "0" * 32, "solution": True}  # fmt: skip
    nb.metadata["points"] = 1000


def replaced(source: str) -> Callable[[NotebookNode], None]:
    def edit(nb: NotebookNode) -> None:
        for cell in checks(nb):
            cell.source = source

    return edit


def ungraded(nb: NotebookNode) -> None:
    for cell in checks(nb):
        cell.metadata.nbgrader |= {"grade": False, "points": -5, "schema_version": 99}


def answers_in_checks(nb: NotebookNode) -> None:
    """Each answer merged into the test cell below it."""
    for number in range(1, 6):
        answer, check = find(nb, f"q{number}-answer"), find(nb, f"q{number}-check")
        check.source = f"{answer.source}\n\n\n{check.source}"
    without("-answer")(nb)


EDITED = [
    Attack(group=8, name=f"{name}{extra}", does=f"{does}{' A wrong answer.' if extra else ''}",
           make=edited(edit, **({"q1": WRONG_1} if extra else {})),
           points={"q1": 0} if extra else {}, status={"q1": "wrong"} if extra else {})
    for extra in ("", ", wrong answer")
    for name, does, edit in (
        ("1,000 points", "Points, locks and checksums edited.", more_points),
        ("checks that pass", "Test cells replaced by `pass`.", replaced("pass")),
        ("checks that assert", "Test cells replaced by `assert True`.", replaced("assert True")),
        ("not graded", "Test cells that say they are none.", ungraded),
    )
] + [
    Attack(group=8, name="checks that end it", does="Test cells replaced by os._exit.",
           make=edited(replaced("import os; os._exit(0)")), says=("it ended the",)),
    Attack(group=8, name="another question checked", does="Test cells ask for another answer.",
           make=edited(replaced('tl.check("03.q2", logit_gradient)'), q1=WRONG_1),
           points={"q1": 0}, status={"q1": "wrong"}),
    Attack(group=8, name="answers in the test cells", does="Honest answers merged into the test "
           "cells below them.", make=edited(answers_in_checks)),
]  # fmt: skip


def doubled(nb: NotebookNode) -> None:
    """Every test cell twice, and a third one whose content is the student's own."""
    for cell in checks(nb):
        place = nb.cells.index(cell)
        copy, own = new_code_cell(cell.source), new_code_cell("mine = 1")
        copy.metadata, own.metadata = cell.metadata, cell.metadata
        nb.cells[place:place] = [copy, own]


def swap(a: str, b: str) -> Callable[[NotebookNode], None]:
    def edit(nb: NotebookNode) -> None:
        one, other = find(nb, a), find(nb, b)
        one.metadata, other.metadata = other.metadata, one.metadata

    return edit


def answers_named(part: str) -> Callable[[NotebookNode], None]:
    """Give every answer the grade id of something else."""

    def edit(nb: NotebookNode) -> None:
        for number in range(1, 6):
            find(nb, f"q{number}-answer").metadata.nbgrader["grade_id"] = f"03-{part}"

    return edit


IDS = [
    Attack(group=9, name=name, does=does, make=edited(edit))
    for name, does, edit in (
        ("doubled", "Honest work with every test cell three times.", doubled),
        ("checks swapped", "Honest work, ids of two test cells swapped.",
         swap("q1-check", "q5-check")),
        ("answer and check swapped", "Honest work, the ids of an answer and its test swapped.",
         swap("q1-answer", "q1-check")),
        ("answers called checks", "Honest work in cells that carry the id of a test cell.",
         answers_named("q1-check")),
        ("unknown ids", "Honest work in cells of another lesson.", answers_named("../../04-q1")),
    )
] + [
    Attack(group=9, name="wrong answer called another", does="A wrong answer with the id of a "
           "right one.", make=edited(swap("q1-answer", "q2-answer"), q1=WRONG_1),
           points={"q1": 0}, status={"q1": "wrong"}),
    Attack(group=9, name="wrong answer, checks swapped", does="A wrong answer whose test cell is "
           "called that of a right one.", make=edited(swap("q1-check", "q5-check"), q1=WRONG_1),
           points={"q1": 0}, status={"q1": "wrong"}),
]  # fmt: skip

ATTACKS = [*NO_NOTEBOOKS, *DELETED, *EDITED, *IDS]
