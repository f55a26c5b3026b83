"""Any file is read, or refused with a reason; nothing of its claims is believed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.grading.synthetic import solved
from tlcourse.grading.submission import UnreadableError, parse, read


def notebook(**cell: object) -> bytes:
    return json.dumps({"cells": [{"cell_type": "code", "source": "1"} | cell]}).encode()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b'{"cells": [', "not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[1, 2]", "not a notebook"),
        (b"{}", "not a notebook"),
        (b'{"cells": 3}', "not a notebook"),
        (b'{"cells": [3]}', "not a notebook"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"cells": [' + b"9" * 10_000 + b"]}", "not JSON"),
        (notebook(source="x" * 1_000_001), "1000001 characters"),
        (json.dumps({"cells": [{}] * 2_001}).encode(), "2001 cells"),
    ],
)
def test_what_is_no_notebook_is_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableError, match=reason):
        parse(data)


@pytest.mark.parametrize(
    "cell",
    [{"source": None}, {"source": {"a": 1}}, {"source": [1, None]}, {"metadata": 3},
     {"metadata": {"nbgrader": "x"}}, {"metadata": {"nbgrader": {"grade_id": 3}}},
     {"outputs": "x"}, {"cell_type": ["code"]}, {"source": "\ud800"}],
)  # fmt: skip
def test_a_strange_cell_is_no_reason_to_refuse_the_rest(cell: dict) -> None:
    nb = parse(notebook(**cell))
    assert len(nb.cells) == 1
    assert isinstance(nb.cells[0].source, str)
    nb.cells[0].source.encode()


def test_only_the_grade_id_is_taken_from_metadata() -> None:
    nbgrader = {"grade_id": "03-q1-check", "points": 1000, "locked": False, "checksum": "0"}
    [cell] = parse(notebook(metadata={"nbgrader": nbgrader, "tags": ["x"]})).cells
    assert dict(cell.metadata) == {"claims": "03-q1-check"}


def test_format_3_is_read() -> None:
    whole = solved("00_start_here")
    old = [dict(cell) for cell in whole.cells]
    for cell in old:
        if cell["cell_type"] == "code":
            cell["input"] = cell.pop("source").splitlines(keepends=True)
    data = {"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": [{"cells": old}]}
    nb = parse(json.dumps(data).encode())
    code = [cell.source for cell in whole.cells if cell.cell_type == "code"]
    assert [cell.source for cell in nb.cells if cell.cell_type == "code"] == code


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.ipynb"
    with path.open("wb") as file:
        file.truncate(500_000_000)
    with pytest.raises(UnreadableError, match="500 MB; at most 20 MB"):
        read(path, 20_000_000)


def test_links_pipes_and_folders_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(notebook())
    (tmp_path / "link.ipynb").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "pipe.ipynb")
    (tmp_path / "folder.ipynb").mkdir()
    for name in ("link", "pipe", "folder", "nothing"):
        with pytest.raises(UnreadableError):
            read(tmp_path / f"{name}.ipynb", 1_000)
