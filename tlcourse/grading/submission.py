"""Read a submitted notebook, whatever it turns out to be.

Nothing is executed, and no name, point or checksum that the notebook carries is used: from its
metadata only the grade ids that the exercise knows are taken, to see where a cell stands.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_raw_cell

_LONGEST_SOURCE = 1_000_000  # characters of a cell
_MOST_CELLS = 2_000


class UnreadableError(ValueError):
    """A submission that cannot be read; the message is for teacher and student."""


@dataclass(frozen=True)
class Submission:
    """A notebook as it was handed in.

    Attributes:
        data: the bytes of the file.
        sha256: of these.
    """

    data: bytes
    sha256: str

    def notebook(self) -> NotebookNode:
        """The notebook, in the newest format, with plain cells only.

        Raises:
            UnreadableError: if it is not a notebook; says why.
        """
        return parse(self.data)


def read(path: Path, most_bytes: int) -> Submission:
    """Read a submitted file; no link is followed, and never more than ``most_bytes`` are read.

    Raises:
        UnreadableError: if it is too large, or no plain file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise UnreadableError(f"the file cannot be opened: {error.strerror}") from None
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode):
        os.close(descriptor)
        raise UnreadableError("it is not a plain file")
    with open(descriptor, "rb") as file:
        data = file.read(most_bytes + 1) if info.st_size <= most_bytes else b""
    if info.st_size > most_bytes or len(data) > most_bytes:
        found, most = info.st_size / 10**6, most_bytes / 10**6
        raise UnreadableError(f"the file has {found:.0f} MB; at most {most:.0f} MB are read")
    return Submission(data, hashlib.sha256(data).hexdigest())


def parse(data: bytes) -> NotebookNode:
    """A notebook from bytes: cells with text only, of formats 3 and 4.

    Raises:
        UnreadableError: if it is not a notebook; says why.
    """
    if not data.strip():
        raise UnreadableError("the file is empty")
    try:
        raw = json.loads(data.decode("utf-8-sig"))  # some editors put a mark before it
    except UnicodeDecodeError as error:
        raise UnreadableError(f"the file is not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise UnreadableError("the file is nested too deeply") from None
    except ValueError as error:
        raise UnreadableError(f"the file is not JSON: {str(error)[:100]}") from None
    cells = _raw_cells(raw)
    if len(cells) > _MOST_CELLS:
        raise UnreadableError(f"it has {len(cells)} cells; at most {_MOST_CELLS} are read")
    nb = nbformat.v4.new_notebook()
    nb.cells = [_cell(cell, number) for number, cell in enumerate(cells)]
    return nb


def _raw_cells(raw: Any) -> list[dict]:
    if not isinstance(raw, dict):
        raise UnreadableError("the file is JSON, but not a notebook")
    cells: Any = raw.get("cells")
    if cells is None and isinstance(raw.get("worksheets"), list):  # format 3
        sheets = [sheet for sheet in raw["worksheets"] if isinstance(sheet, dict)]
        parts = [sheet.get("cells") for sheet in sheets]
        cells = [cell for part in parts if isinstance(part, list) for cell in part]
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise UnreadableError("the file is JSON, but not a notebook: it has no list of cells")
    return cells


def _cell(raw: dict, number: int) -> NotebookNode:
    source = raw.get("source", raw.get("input", ""))
    if isinstance(source, list):
        source = "".join(line for line in source if isinstance(line, str))
    if not isinstance(source, str):
        source = ""
    source = source.encode("utf-8", "replace").decode("utf-8")  # no half characters
    if len(source) > _LONGEST_SOURCE:
        raise UnreadableError(f"cell {number + 1} has {len(source)} characters")
    kind = raw.get("cell_type")
    make = new_code_cell if kind == "code" else new_raw_cell
    cell = (new_markdown_cell if kind == "markdown" else make)(source)
    cell.id = f"cell-{number}"
    metadata = raw.get("metadata")
    nbgrader = metadata.get("nbgrader") if isinstance(metadata, dict) else None
    grade_id = nbgrader.get("grade_id") if isinstance(nbgrader, dict) else None
    if isinstance(grade_id, str):
        cell.metadata["claims"] = grade_id
    if kind == "code" and isinstance(raw.get("outputs"), list):
        cell.outputs = raw["outputs"]
    return cell
