"""The outer wall: bubblewrap around a process that holds the imports, one for each worker.

What can be seen from inside: the Python environment, the package and its data, all read-only,
and an empty /tmp. No network, no other process, no rights, and not the user root. Lessons,
solutions, tests and the class folder are not there.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tlcourse import locations
from tlcourse.grading.cgroups import Group
from tlcourse.grading.walls import Bounds

START_SECONDS = 120  # imports on a slow disk
_END_SECONDS = 15
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
HOW_TO_GET_ONE = (
    "grading runs other people's code, so it needs a sandbox. On Linux install bubblewrap (Debian "
    "and Ubuntu: sudo apt install bubblewrap; Fedora: sudo dnf install bubblewrap) and allow "
    "unprivileged user namespaces; `tlcourse doctor` checks it. On macOS and Windows grade in a "
    "Linux virtual machine or in WSL 2"
)


class SandboxError(RuntimeError):
    """The sandbox itself cannot start or has failed; no fault of a submission."""


class Sandbox:
    """A process behind the outer wall that forks a walled copy of itself for each job.

    Args:
        preload: modules that submissions will import; imported once.
        walled: False runs without any wall, for a teacher's own notebooks.
        nest: False never builds the inner wall, as where the system forbids it.
        group: control group that bounds memory and processes of the whole sandbox, where the
            system lets us make one.

    Attributes:
        nested: copies have walls of their own. Where they cannot have, use a sandbox for one
            job and close it.

    Raises:
        SandboxError: if it cannot start.
    """

    def __init__(
        self,
        preload: tuple[str, ...] = (),
        *,
        walled: bool = True,
        nest: bool = True,
        group: Group | None = None,
    ) -> None:
        self._group = group
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._control, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        descriptor = inside.fileno()
        program = [sys.executable, "-m", "tlcourse.grading.zygote", str(descriptor)]
        command = [*outer_wall(), *program] if walled else program
        if group is not None:
            command = group.entered_by(command)
        try:
            self._process = subprocess.Popen(
                command,
                pass_fds=(descriptor,),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                # Not the teacher's environment: bubblewrap's own process would show it.
                env=_environment() if walled else {**os.environ, **_environment()},
                start_new_session=True,
            )
        except OSError as error:
            self._control.close()
            self._log.close()
            if group is not None:
                group.remove()
            raise SandboxError(f"{command[0]} cannot be started: {error.strerror}") from None
        finally:
            inside.close()
        kept = [str(path) for path in visible() if path.is_relative_to("/tmp")]
        settings = {"preload": list(preload), "walled": walled, "nest": nest, "kept": kept}
        with contextlib.suppress(OSError):  # it has ended already; _answer says why
            self._control.send(json.dumps(settings).encode())
        self.nested = bool(self._answer(START_SECONDS)["nested"])

    def start(self, bounds: Bounds) -> socket.socket:
        """Fork a copy; returns the socket that leads to it.

        Raises:
            SandboxError: if the sandbox has died.
        """
        ours, theirs = socket.socketpair()
        try:
            order = json.dumps({"bounds": asdict(bounds)}).encode()
            socket.send_fds(self._control, [order], [theirs.fileno()])
        except OSError as error:
            ours.close()
            raise SandboxError(f"the sandbox is gone: {error}") from None
        finally:
            theirs.close()
        return ours

    def kill(self) -> None:
        """End the running copy and all its processes."""
        with contextlib.suppress(OSError):
            self._control.send(b'{"kill": true}')

    def wait(self) -> dict[str, Any]:
        """Wait until the copy has ended; its exit code and why it was ended.

        Raises:
            SandboxError: if that takes too long, or a process is left over.
        """
        ending = self._answer(_END_SECONDS)
        if ending["left"]:
            raise SandboxError(f"{ending['left']} processes outlived their submission")
        return ending

    def end(self) -> None:
        """Kill everything in the sandbox; another thread may be using it, and gets an error."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the sandbox and free what it holds; a second time does nothing."""
        if self._log.closed:
            return
        self._control.close()
        self.end()
        self._process.wait()
        if self._group is not None:
            self._group.remove()
        self._log.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, seconds: float) -> dict[str, Any]:
        self._control.settimeout(seconds)
        try:
            message = self._control.recv(1 << 16)
        except OSError:
            message = b""
        if message:
            return json.loads(message)
        deadline = time.monotonic() + 1  # let it finish what it has to say
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        self._log.seek(0)
        said = self._log.read()[-2000:].decode(errors="replace").strip().splitlines()
        self.close()
        raise SandboxError(f"the sandbox does not answer: {said[-1] if said else 'no message'}")


def outer_wall() -> list[str]:
    """The command that builds the outer wall; a program and its arguments follow it.

    Raises:
        SandboxError: if there is no bubblewrap.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise SandboxError(f"no bwrap on the PATH; {HOW_TO_GET_ONE}")
    command = [program, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    command += ["--die-with-parent", "--clearenv", "--cap-drop", "ALL"]
    if os.getuid() == 0:  # the zygote mounts /proc and becomes nobody before all else
        for capability in ("SETUID", "SETGID", "SYS_ADMIN"):
            command += ["--cap-add", f"CAP_{capability}"]
        command += ["--dir", "/proc"]
    else:
        command += ["--unshare-user", "--unshare-cgroup-try", "--proc", "/proc"]
    for name, value in _environment().items():
        command += ["--setenv", name, value]
    for path in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            command += ["--ro-bind", path, path]
    command += ["--dev", "/dev", "--perms", "1777", "--size", str(64 * 2**20), "--tmpfs", "/tmp"]
    folders = visible()
    above = {parent for folder in folders for parent in folder.parents}
    above -= {Path("/"), Path("/tmp")}
    for parent in sorted(above - set(folders)):
        command += ["--perms", "0755", "--dir", str(parent)]
    for folder in folders:
        command += ["--ro-bind", str(folder), str(folder)]
    for hidden in hidden_folders():
        command += ["--tmpfs", str(hidden), "--remount-ro", str(hidden)]
    return [*command, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/"]


def visible() -> list[Path]:
    """Files and folders that a submission can read; everything else is not there."""
    package = Path(__file__).resolve().parents[1]
    wanted = [Path("/usr"), Path(sys.base_prefix), Path(sys.prefix), package, locations.data_dir()]
    wanted += [Path("/etc", name) for name in ("ld.so.cache", "alternatives", "fonts")]
    if fonts := _font_cache():
        wanted.append(fonts)
    found: list[Path] = []
    for path in dict.fromkeys(wanted):
        inside = any(path.is_relative_to(other) for other in found)
        if path.exists() and not inside:
            found.append(path)
    return found


def hidden_folders() -> list[Path]:
    """Folders with lessons and answers that lie within a visible one (an installed wheel)."""
    lessons = locations.lessons_dir()
    return [lessons] if any(lessons.is_relative_to(folder) for folder in visible()) else []


def problem() -> str:
    """Why no sandbox can be had here; "" if one works. Tried once."""
    return _tried()[0]


def can_nest() -> bool:
    """Whether copies have walls of their own here; without, each submission starts a sandbox."""
    return _tried()[1]


@functools.cache
def _tried() -> tuple[str, bool]:
    try:
        with Sandbox() as sandbox:
            return "", sandbox.nested
    except SandboxError as error:
        return str(error), False


def _environment() -> dict[str, str]:
    one = dict.fromkeys(_THREADS, "1")
    root = Path(__file__).resolve().parents[2]
    fonts = _font_cache()
    return one | {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "MPLBACKEND": "Agg",
        "MPLCONFIGDIR": str(fonts or "/tmp"),
        "HF_HUB_OFFLINE": "1",
        "PIP_NO_INDEX": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TLCOURSE_CACHE": "/tmp/tlcourse",
        "IPYTHONDIR": "/tmp/ipython",
    }


@functools.cache
def _font_cache() -> Path | None:
    """Matplotlib's list of fonts, which takes seconds to make; None if there is none yet."""
    try:
        import matplotlib
    except ImportError:
        return None
    folder = Path(matplotlib.get_cachedir())
    return folder if any(folder.glob("fontlist-*.json")) else None
