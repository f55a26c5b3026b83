"""Control groups: the kernel's own bound on memory and processes, where we may use it.

Groups also have equal shares of the processor, so that a submission with many processes does not
take the time of those that run beside it.

Without one, the bounds of :mod:`tlcourse.grading.walls` and the zygote's watch on memory hold
alone; a control group also counts memory that no process maps.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import time
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_names = itertools.count()


class Group:
    """A bound on everything that one sandbox holds.

    Args:
        folders: one for version 2, one for each controller for version 1; must not exist.
    """

    def __init__(self, folders: list[Path]) -> None:
        self.folders = folders
        for folder in folders:
            folder.mkdir()

    def limit(self, memory_bytes: int, processes: int) -> None:
        """Set both bounds; swap counts as memory."""
        for folder in self.folders:
            if (folder / "memory.max").exists():
                (folder / "memory.max").write_text(str(memory_bytes))
                with contextlib.suppress(OSError):
                    (folder / "memory.swap.max").write_text("0")
            if (folder / "memory.limit_in_bytes").exists():
                (folder / "memory.limit_in_bytes").write_text(str(memory_bytes))
            if (folder / "pids.max").exists():
                (folder / "pids.max").write_text(str(processes))

    def entered_by(self, command: list[str]) -> list[str]:
        """A command that enters the group before it becomes the given one.

        From outside it would be too late: a process moves alone, without those it has started.
        """
        files = [str(folder / "cgroup.procs") for folder in self.folders]
        script = 'while [ "$1" != -- ]; do echo $$ > "$1"; shift; done; shift; exec "$@"'
        return ["/bin/sh", "-e", "-c", script, "sh", *files, "--", *command]

    def remove(self) -> None:
        """Remove the group once its processes have ended."""
        for folder in self.folders:
            for _ in range(100):
                with contextlib.suppress(OSError):
                    folder.rmdir()
                if not folder.exists():
                    break
                time.sleep(0.02)


def new_group(memory_bytes: int, processes: int, root: Path = _ROOT) -> Group | None:
    """A group for one sandbox; None where we cannot make one that works."""
    name = f"tlcourse-{os.getpid()}-{next(_names)}"
    parents = _parents(root)
    if not parents:
        return None
    _clear_up(parents)
    group = None
    try:
        group = Group([parent / name for parent in parents])
        group.limit(memory_bytes, processes)
        if not all(_bounded(folder) for folder in group.folders):
            raise OSError("the bound did not take")
        subprocess.run(group.entered_by(["true"]), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        for parent in parents:
            with contextlib.suppress(OSError):
                (parent / name).rmdir()
        return None
    return group


def _clear_up(parents: list[Path]) -> None:
    """Remove the groups of processes that were killed before they could do it."""
    for folder in (folder for parent in parents for folder in parent.glob("tlcourse-*-*")):
        if not Path("/proc", folder.name.split("-")[1]).exists():
            with contextlib.suppress(OSError):
                folder.rmdir()


def _bounded(folder: Path) -> bool:
    names = ("memory.max", "memory.limit_in_bytes", "pids.max", "cpu.shares")
    return any((folder / name).exists() for name in names)


def _parents(root: Path) -> list[Path]:
    """The groups that this process is in, one for each hierarchy that can bound something."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    version_1: list[Path] = []
    version_2: list[Path] = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if {"memory", "pids", "cpu"} & set(controllers.split(",")):
            version_1.append(root / controllers / place.lstrip("/"))
        elif not controllers and (root / "cgroup.controllers").exists():
            version_2.append(root / place.lstrip("/"))
    return [path for path in version_1 or version_2 if os.access(path, os.W_OK)]
