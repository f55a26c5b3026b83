"""Inside bubblewrap: import everything once, then fork a walled copy for each submission.

Started by :mod:`tlcourse.grading.sandbox` as ``python -m tlcourse.grading.zygote FD``. It obeys
messages on the socket FD: a job comes with the socket that the copy will talk over, "kill" ends
the copy; when the copy and all its processes are gone, it says how that ended. One job at a
time. It never reads a byte that a submission has written.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any

from tlcourse.grading import child, walls

_PAGE = resource.getpagesize()
_LOOK_SECONDS = 0.05  # between two looks at memory


@dataclass(frozen=True)
class _Place:
    """What every copy finds here.

    Attributes:
        shell: that runs the cells.
        walled: copies have limits.
        nested: copies have an inner wall.
        kept: folders below /tmp that they can see.
    """

    shell: Any
    walled: bool
    nested: bool
    kept: list[str]


def main() -> int:
    control = socket.socket(fileno=int(sys.argv[1]))
    settings = json.loads(control.recv(1 << 16))
    walled = bool(settings["walled"])
    if walled:
        walls.become_nobody()
    shell = child.make_shell()
    for name in settings["preload"]:
        _preload(name)
    _one_thread()
    kept: list[str] = settings["kept"]
    nested = walled and settings["nest"] and _can_nest(kept)
    place = _Place(shell, walled, nested, kept)
    gc.collect()
    gc.freeze()  # copies share these pages as long as nobody writes to them
    walls.remember_size()
    control.send(json.dumps({"nested": nested}).encode())
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 1)
        if not message:
            return 0
        order = json.loads(message)
        if "bounds" not in order:
            continue  # a "kill" that came after the end
        connection = socket.socket(fileno=descriptors[0])
        bounds = walls.Bounds(**order["bounds"])
        ending = _run(control, connection, bounds, place)
        control.send(json.dumps(ending).encode())


def _run(
    control: socket.socket, connection: socket.socket, bounds: walls.Bounds, place: _Place
) -> dict:
    """Fork one copy and watch it to its end."""
    pid = os.fork()
    if pid == 0:
        control.close()
        try:
            _enter(connection, bounds, place)
        finally:
            os._exit(70)
    connection.close()
    reason = _watch(control, pid, bounds if place.nested else None)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if place.nested:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # all but bubblewrap's first process and this one
    left = _wait_for_nobody() if place.nested else 0
    return {"code": code, "reason": reason, "left": left}


def _enter(connection: socket.socket, bounds: walls.Bounds, place: _Place) -> None:
    """In the copy: through the wall, and on as process 1, whose end ends all the others."""
    os.setsid()
    walls.die_with_parent()
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)
    if connection.fileno() != 3:
        os.dup2(connection.fileno(), 3)
    os.closerange(4, 4096)
    if place.nested:
        walls.new_namespaces()
        if first := os.fork():
            os._exit(_exit_status(os.waitpid(first, 0)[1]))
        walls.furnish(bounds, place.kept)
        walls.die_with_parent()
        walls.hide()  # what the worker does to this process it cannot take back
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Descriptor 3 stays open here: where the parent sees its end, the exit code is known.
    if worker := os.fork():
        os._exit(_reap_until(worker))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    walls.die_with_parent()
    os.setsid()  # a signal to its group does not reach the processes that watch it
    if place.nested:
        walls.show()
    if place.walled:
        walls.limit(bounds)
        walls.forbid_calls()
    os.chdir("/tmp")
    child.serve(socket.socket(fileno=3), place.shell, alone=place.nested)
    os._exit(0)


def _reap_until(worker: int) -> int:
    """Bury children, orphans among them, until the worker ends; its exit status."""
    while True:
        pid, status = os.wait()
        if pid == worker:
            return _exit_status(status)


def _exit_status(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _watch(control: socket.socket, pid: int, bounds: walls.Bounds | None) -> str:
    """Wait for the end of the copy; kill it when told to, or when it takes too much memory."""
    descriptor = os.pidfd_open(pid)
    memory = _Memory() if bounds else None
    most = bounds.memory_mb * 10**6 * 5 // 4 if bounds else 0  # one process alone holds less
    reason = ""
    try:
        while True:
            seconds = _LOOK_SECONDS if memory else None
            readable, _, _ = select.select([descriptor, control.fileno()], [], [], seconds)
            if descriptor in readable:
                return reason
            if control.fileno() in readable and not reason:
                control.recv(1 << 16)  # "kill", or the parent has gone
                reason = "killed"
                os.kill(pid, signal.SIGKILL)
            elif memory and not reason and memory.more_than(most):
                reason = "memory"
                os.kill(pid, signal.SIGKILL)
            elif reason:
                time.sleep(_LOOK_SECONDS)
    finally:
        os.close(descriptor)


class _Memory:
    """What the processes of a job hold beyond what they share with this one.

    Pages that several processes share count once: a copy of a large notebook, made to answer a
    question, holds nothing yet. To count so takes a while, so it is done only where the sum of
    all that is mapped says that it may be needed.
    """

    def __init__(self) -> None:
        self.inherited = _anonymous(os.getpid())
        self.before = _share(os.getpid())

    def more_than(self, most: int) -> bool:
        pids = _others()
        mapped = [_resident(pid) for pid in pids]
        # Two that guard the job and the one that runs it are copies of this process.
        shared = sum(min(size, self.inherited) for size in mapped[:3])
        if sum(mapped) - shared <= most:
            return False
        # One of the guards hides, and is counted in full. What an answer held that has just ended
        # is no reason to stop the cell that runs by now: look twice.
        held = []
        for _ in range(2):
            time.sleep(_LOOK_SECONDS / 5)
            held.append(sum(_share(pid) for pid in [*_others(), os.getpid()]) - self.before)
        return min(held) - self.inherited > most


def _others() -> list[int]:
    """All processes here but bubblewrap's first one and this one: the job's."""
    known = {1, os.getpid()}
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) not in known]


def _resident(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def _anonymous(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        _, mapped, shared, *_ = file.read().split()
    return (int(mapped) - int(shared)) * _PAGE


def _share(pid: int) -> int:
    """Bytes that a process holds, files aside; of those shared by n processes, one n-th.

    A process that nobody may look into counts in full.
    """
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            words = [line.split() for line in file if line.startswith("Pss")]
    except ProcessLookupError:
        return 0
    except OSError:
        return _resident(pid)
    sizes = {word[0]: int(word[1]) * 1024 for word in words}
    return sizes.get("Pss:", 0) - sizes.get("Pss_File:", 0)


def _wait_for_nobody() -> int:
    """Wait until the kernel has cleared the job away; how many processes are left after that."""
    end = time.monotonic() + 5
    while (left := len(_others())) and time.monotonic() < end:
        time.sleep(0.002)
    return left


def _can_nest(kept: list[str]) -> bool:
    """Whether a copy may make namespaces of its own; tried in a copy."""
    pid = os.fork()
    if pid == 0:
        try:
            walls.new_namespaces()
            if first := os.fork():
                os._exit(_exit_status(os.waitpid(first, 0)[1]))
            bounds = walls.Bounds(memory_mb=64, processes=8, disk_mb=1, cpu_seconds=5)
            walls.furnish(bounds, kept)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def _preload(name: str) -> None:
    """Import a module, or what the notebook calls ``tl.something``; not there is no fault."""
    with contextlib.suppress(ImportError, AttributeError):
        if name.startswith("tl."):
            getattr(importlib.import_module("tlcourse"), name.removeprefix("tl."))
        else:
            importlib.import_module(name)


def _one_thread() -> None:
    """Threads do not survive a fork, and small matrices gain nothing by them."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
