"""The tree of processes, as /proc shows it."""

from __future__ import annotations

from pathlib import Path


def descendants(ancestor: int) -> set[int]:
    """Processes below a process, its sandboxes among them."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    below = {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return below - {ancestor}
