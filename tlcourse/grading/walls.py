"""The inner wall: namespaces and limits that part one submission from all others.

It stands inside the outer wall, bubblewrap's, and needs nothing but Linux and ctypes. A process
that has already imported everything can walk in with all that it holds in memory, which no
program that ends in ``exec`` allows.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import signal
import socket
import struct
from dataclasses import dataclass

NOBODY = 65534  # user and group that a teacher who is root becomes

# <sched.h>, <sys/mount.h>, <sys/prctl.h>: the same on all processors.
_NEW_MOUNTS, _NEW_CGROUP, _NEW_UTS, _NEW_IPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
_NEW_USER, _NEW_PID, _NEW_NET = 0x10000000, 0x20000000, 0x40000000
_EVERYTHING = (
    _NEW_USER | _NEW_MOUNTS | _NEW_PID | _NEW_NET | _NEW_IPC | _NEW_UTS | _NEW_CGROUP
)  # fmt: skip
_NOSUID, _NODEV, _NOEXEC, _BIND, _MOVE, _ALL_BELOW = 2, 4, 8, 0x1000, 0x2000, 0x4000
_SET_PDEATHSIG, _SET_DUMPABLE, _SET_SECCOMP, _SET_NO_NEW_PRIVS = 1, 4, 22, 38
_CAPABILITY_VERSION_3 = 0x20080522

# <linux/audit.h> and <asm/unistd.h>: for each processor its name in the kernel, its number of
# socket(), and those of system calls that no lesson needs: memory that no process maps
# (memfd_create, shmget, msgget, semget), keyrings, which outlive a process (add_key, request_key,
# keyctl), the machine's log (syslog), a look into other processes (ptrace, process_vm_readv,
# process_vm_writev), and large, young parts of the kernel (io_uring_setup, userfaultfd, bpf,
# perf_event_open).
_CALLS = {
    "x86_64": (0xC000003E, 41, (319, 29, 68, 64, 248, 249, 250, 103, 101, 310, 311,
                                425, 323, 321, 298)),
    "aarch64": (0xC00000B7, 198, (279, 194, 186, 190, 217, 218, 219, 116, 117, 270, 271,
                                  425, 282, 280, 241)),
}  # fmt: skip
_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, 16)  # 16: netlink

_libc = ctypes.CDLL(None, use_errno=True)
_MEGABYTE = 10**6
_FILES = 16384  # in /tmp; an empty one takes memory, too
_LIBRARIES = 8 * 2**30  # address space for libraries that a submission imports


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What one submission may use.

    Attributes:
        memory_mb: writable memory of each process beyond what it began with.
        processes: processes and threads at the same time.
        disk_mb: all files in /tmp; also the size of any one file.
        cpu_seconds: processor time of any one process.
    """

    memory_mb: int
    processes: int
    disk_mb: int
    cpu_seconds: int


def become_nobody() -> None:
    """Give up root for good, and the right to gain anything by ``exec``."""
    _call("prctl", _SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getuid() == 0:
        # Here, and not by bubblewrap: where root starts it, it covers parts of /proc, and then
        # the kernel lets nobody mount a /proc of their own.
        _mount("proc", "/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        show()  # /proc/self is this user's, not root's


def new_namespaces() -> None:
    """Leave for new namespaces; the next child is process 1 of its own world.

    Raises:
        OSError: where the system forbids it to a user without rights.
    """
    uid, gid = os.getuid(), os.getgid()
    _call("unshare", _EVERYTHING)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{uid} {uid} 1")
    _write("/proc/self/gid_map", f"{gid} {gid} 1")


def furnish(bounds: Bounds, kept: list[str]) -> None:
    """As process 1 of :func:`new_namespaces`: empty folders, a /proc of its own, no rights.

    Args:
        bounds: of the submission.
        kept: folders within /tmp that stay visible.
    """
    with contextlib.suppress(OSError):  # who is killed first when memory runs out
        _write("/proc/self/oom_score_adj", "1000")
    _write("/proc/sys/user/max_user_namespaces", "0")  # no way further in
    size = f"size={bounds.disk_mb * _MEGABYTE},nr_inodes={_FILES},mode=1777"
    _mount("tmpfs", "/dev/shm", "tmpfs", _NOSUID | _NODEV, size)
    for folder in kept:
        target = "/dev/shm" + folder.removeprefix("/tmp")
        os.makedirs(target)
        _mount(folder, target, "", _BIND | _ALL_BELOW)
    _mount("/dev/shm", "/tmp", "", _MOVE)
    _mount("tmpfs", "/dev/shm", "tmpfs", _NOSUID | _NODEV | _NOEXEC, size)
    _mount("proc", "/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
    socket.sethostname("sandbox")
    _drop_capabilities()


def limit(bounds: Bounds) -> None:
    """Set this process's limits; children inherit them."""
    size, data = _size
    memory = bounds.memory_mb * _MEGABYTE
    for what, most in (
        (resource.RLIMIT_DATA, data + memory),
        (resource.RLIMIT_AS, size + memory + _LIBRARIES),
        (resource.RLIMIT_NPROC, bounds.processes),
        (resource.RLIMIT_FSIZE, bounds.disk_mb * _MEGABYTE),
        (resource.RLIMIT_CPU, bounds.cpu_seconds),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def forbid_calls() -> None:
    """Refuse system calls that could leave the namespaces, for this process and its children.

    A network namespace holds no ``AF_VSOCK``, which leads from a virtual machine to its host, and
    no namespace holds memory. On a processor that is not in the table nothing is refused.
    """
    if platform.machine() not in _CALLS:
        return
    processor, socket_call, refused = _CALLS[platform.machine()]
    load, equal, at_least = 0x20, 0x15, 0x35  # <linux/filter.h>: (what, if true, if false, with)
    allow, refuse = (0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x50000 | errno.EPERM)
    program = [(load, 0, 0, 4), (equal, 1, 0, processor), refuse]
    program += [(load, 0, 0, 0), (at_least, 0, 1, 0x40000000), refuse]  # calls of x32
    for number in refused:
        program += [(equal, 0, 1, number), refuse]
    program += [(equal, 1, 0, socket_call), allow, (load, 0, 0, 16)]  # its first argument
    for family in _FAMILIES:
        program += [(equal, 0, 1, family), allow]
    program.append(refuse)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    header = struct.pack("HP", len(program), ctypes.addressof(code))
    with contextlib.suppress(OSError):  # a kernel that knows no filters
        _call("prctl", _SET_SECCOMP, 2, header, 0, 0)


def hide() -> None:
    """Let no process of the same user look into this one, or change it."""
    _call("prctl", _SET_DUMPABLE, 0, 0, 0, 0)


def show() -> None:
    """The inverse of :func:`hide`."""
    _call("prctl", _SET_DUMPABLE, 1, 0, 0, 0)


def die_with_parent() -> None:
    """Be killed when the parent ends."""
    _call("prctl", _SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _call("capset", header, (ctypes.c_uint32 * 6)())


def remember_size() -> None:
    """Note the size of this process, for :func:`limit` in a child that has no /proc."""
    with open("/proc/self/statm") as file:
        pages = [int(word) * resource.getpagesize() for word in file.read().split()]
    _size[:] = pages[0], pages[5]


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    texts = [text.encode() or None for text in (source, target, kind)]
    _call("mount", *texts, ctypes.c_ulong(flags), data.encode() or None)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


_size = [0, 0]  # bytes of address space, of it writable; before a submission
