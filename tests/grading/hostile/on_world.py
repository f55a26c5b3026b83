"""Groups 13 and 14: writing where it must not, the network, and forged results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.grading.hostile.scene import (
    ROOT,
    WRONG_1,
    Attack,
    Scene,
    before_checks,
    beside,
    failed_text,
    first,
)
from tlcourse.grading.scoring import Outcome

SHORT = {"cell_seconds": 1.5, "question_seconds": 1.2}
PROBE = "hostile_probe_file"  # a name that nothing else has; removed where it turns up
WRITE = f"""\
import glob, json, os, sys, sysconfig
site = sysconfig.get_paths()["purelib"]
done = []
def attempt(what, function, *a):
    try:
        function(*a)
        done.append(what)
    except OSError:
        pass
def write(path):
    with open(path, "w") as f: f.write("was here")
for top in ("@FOLDER@", "@FOLDER@/submitted/other/03_gradients_by_hand", site, "@PACKAGE@",
            "@PACKAGE@/grading", "@PACKAGE@/../data", "/", "/dev", "/etc", "/usr",
            "/usr/bin", "/var/tmp", "/run", "/sys", "/proc", "/proc/1", sys.prefix, sys.base_prefix,
            os.path.dirname(os.__file__)):
    attempt(top, write, f"{{top}}/{PROBE}")
if not "@PACKAGE@".startswith("/tmp/"):  # there it would be in a /tmp of its own
    attempt("above", write, f"@PACKAGE@/../{PROBE}")
raise ValueError(json.dumps(done))"""
CHANGE = """\
import json, os, tlcourse, numpy
done = []
def attempt(what, function, *a):
    try:
        function(*a)
        done.append(what)
    except OSError:
        pass
for path in (tlcourse.__file__, numpy.__file__, "@FOLDER@/gradebook.db", "@FOLDER@/class_secret"):
    attempt("open " + path, open, path, "r+b")
    attempt("append " + path, open, path, "ab")
    attempt("chmod " + path, os.chmod, path, 0o666)
    attempt("utime " + path, os.utime, path)
    attempt("hard link " + path, os.link, path, "/tmp/hard")
    attempt("xattr " + path, os.setxattr, path, "user.probe", b"x")
    attempt("rename " + path, os.rename, path, path + ".old") if "class" in path else None
raise ValueError(json.dumps(done))"""
LINKS = """\
import json, os
done = []
for number, path in enumerate(("@FOLDER@/gradebook.db", "@FOLDER@", "/proc/1/root@FOLDER@",
                               "@PACKAGE@/hostile_probe_file")):
    link = f"/tmp/link{number}"
    os.symlink(path, link)
    for name in (link, link + "/hostile_probe_file"):
        try:
            with open(name, "w") as f: f.write("was here")
            done.append(path)
        except OSError:
            pass
raise ValueError(json.dumps(done))"""
ROOTS = """\
import ctypes, json, os, stat
libc, done = ctypes.CDLL(None, use_errno=True), []
MS_BIND, MS_REMOUNT = 4096, 32
tries = {
    "mount": lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None),
    "bind": lambda: libc.mount(b"/", b"/tmp", None, MS_BIND, None),
    "remount": lambda: libc.mount(b"none", b"/usr", None, MS_REMOUNT | MS_BIND, None),
    "umount /tmp": lambda: libc.umount2(b"/tmp", 2),
    "umount /proc": lambda: libc.umount2(b"/proc", 2),
    "unshare user": lambda: libc.unshare(0x10000000),
    "unshare mounts": lambda: libc.unshare(0x20000),
    "chroot": lambda: libc.chroot(b"/tmp"),
    "pivot_root": lambda: libc.syscall(155, b"/tmp", b"/tmp"),
    "setuid": lambda: libc.setuid(0),
    "sethostname": lambda: libc.sethostname(b"x", 1),
    "mknod": lambda: libc.mknod(b"/tmp/disk", stat.S_IFBLK | 0o666, os.makedev(254, 0)),
    "setns": lambda: libc.setns(os.open("/proc/1/ns/mnt", os.O_RDONLY), 0),
    "kernel log": lambda: min(0, libc.klogctl(3, ctypes.create_string_buffer(10**6), 10**6)),
    "nice": lambda: libc.setpriority(0, 0, -10),
    "clock": lambda: libc.settimeofday(bytes(16), None),
    "reboot": lambda: libc.reboot(0x89ABCDEF),  # would only allow Ctrl-Alt-Delete
}
for name, function in tries.items():
    try:
        if function() == 0: done.append(name)
    except OSError:
        pass
for path in ("/proc/sys/user/max_user_namespaces", "/proc/sys/kernel/hostname",
             "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/1/oom_score_adj"):
    try:
        os.close(os.open(path, os.O_WRONLY))
        done.append(path)
    except OSError:
        pass
raise ValueError(json.dumps(done))"""


def does_nothing(scene: Scene, outcome: Outcome, raw: dict[str, Any]) -> None:
    """It succeeded in none of its attempts, and what it may have left is removed."""
    left = [path for top in (ROOT, *(ROOT / "tlcourse").rglob("*"), Path("/usr"), Path("/etc"))
            if top.is_dir() and (path := top / PROBE).exists()]  # fmt: skip
    for path in left:
        path.unlink()
    assert json.loads(failed_text(raw)) == [] and not left, (failed_text(raw), left)


WRITES = [
    Attack(group=13, name=name, does=does, make=first(source), check=does_nothing)
    for name, does, source in (
        ("files", "Writes to the class folder, the package, the environment and the system.",
         WRITE),
        ("what is there", "Opens, links, renames and marks files of the class, the package and "
         "NumPy.", CHANGE),
        ("symbolic links", "Writes to the class folder through links in /tmp.", LINKS),
        ("rights of root", "Mounts, unshares, changes root, user, clock and kernel settings.",
         ROOTS),
    )
]  # fmt: skip

CALL = """\
import json, socket
done = []
def attempt(name, function):
    try:
        function()
        done.append(name)
    except OSError:
        pass
def connect(family, kind, address):
    with socket.socket(family, kind) as s:
        s.settimeout(0.3)
        s.connect(address)
        s.send(b"hello")
for host in ("127.0.0.1", "localhost", "0.0.0.0"):
    attempt("TCP", lambda: connect(socket.AF_INET, socket.SOCK_STREAM, (host, @TCP@)))
    attempt("UDP", lambda: connect(socket.AF_INET, socket.SOCK_DGRAM, (host, @UDP@)))
attempt("TCP 6", lambda: connect(socket.AF_INET6, socket.SOCK_STREAM, ("::ffff:127.0.0.1", @TCP@)))
attempt("abstract", lambda: connect(socket.AF_UNIX, socket.SOCK_STREAM, "\\0@ABSTRACT@"))
attempt("path", lambda: connect(socket.AF_UNIX, socket.SOCK_STREAM, "@FOLDER@/socket"))
attempt("root", lambda: connect(socket.AF_UNIX, socket.SOCK_STREAM, "/proc/1/root@FOLDER@/socket"))
attempt("vsock", lambda: socket.socket(40, socket.SOCK_STREAM))
for family in range(46):
    if family not in (1, 2, 10, 16):
        attempt(f"family {family}", lambda: socket.socket(family, socket.SOCK_RAW))
attempt("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
attempt("interfaces", lambda: done.extend(
    name for _, name in socket.if_nameindex() if name != "lo"))
raise ValueError(json.dumps([x for x in done if x != "interfaces"]))"""
DESCRIPTORS = """\
import json, os
found, written = {}, []
for fd in range(3, 256):
    try:
        found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        continue
own = ("/proc", "/dev/null")
kinds = sorted({x.split(":")[0] for x in found.values() if not x.startswith(own)})
raise ValueError(json.dumps([kinds, sum(x.startswith("socket") for x in found.values())]))"""
SEND = """\
import array, json, os, pickle, socket, threading, time
def send(*messages):
    for each in messages:
        os.write(3, (each if type(each) is bytes else json.dumps(each).encode()) + b"\\n")
"""
CANDIDATES = """\
send(*({"got": "03.q1", "case": case, "value": guess}
       for guess in np.linspace(0, 3, 200) for case in range(3)))"""
PICKLE = """\
class Evil:
    def __reduce__(self): return os.system, ("touch @FOLDER@/pickled",)
for protocol in range(6): send(pickle.dumps(Evil(), protocol))"""
RIGHT_FIRST = """\
for case in range(3):
    os.write(3, json.dumps({"got": "03.q1", "case": case, "value": 0.5}).encode() + b"\\n")"""


def has_one_socket(scene: Scene, outcome: Outcome, raw: dict[str, Any]) -> None:
    assert json.loads(failed_text(raw)) == [["socket"], 1], failed_text(raw)


def _calls_nobody(scene: Scene, outcome: Outcome, raw: dict[str, Any]) -> None:
    assert json.loads(failed_text(raw)) == [], failed_text(raw)


def _forged(name: str, does: str, body: str, says: str = "it interfered", **more: Any) -> Attack:
    """A cell that writes to the parent itself; the honest rest keeps its points."""
    return Attack(group=14, name=name, does=does, make=first(f"{SEND}{body}"),
                  says=(f"cell 1: {says}",), **more)  # fmt: skip


def _forged_answer(name: str, does: str, body: str, status: str, **more: Any) -> Attack:
    """Such an answer to question 1; the value that it returns in the end is right."""
    return Attack(group=14, name=name, does=does, make=before_checks(SEND, q1=beside(body)),
                  points={"q1": 0}, status={"q1": status}, **more)  # fmt: skip


OUTSIDE = [
    Attack(group=14, name="network", does="Calls listeners of the machine: TCP, UDP, Unix sockets; "
           "and every other family of sockets.", make=first(CALL), check=_calls_nobody),
    Attack(group=14, name="descriptors", does="Looks for open files and sockets from 3 to 255.",
           make=first(DESCRIPTORS), check=has_one_socket),
    _forged("a value", "Sends a value for a question from a cell.",
            'send({"got": "03.q1", "case": 0, "value": 0.0, "points": 2, "score": 2})'),
    Attack(group=14, name="a lottery", does="Sends 200 guesses for each hidden input.",
           make=before_checks(SEND + CANDIDATES, q1=WRONG_1), points={"q1": 0},
           status={"q1": "wrong"}, says=("cell 4: it interfered",)),
    _forged("points", "Sends points, marks and a finished outcome.",
            'send({"points": 14}, {"mark": "03.q1", "status": "right"}, {"status": "graded"})'),
    _forged("pickles", "Sends pickles that run a program.", PICKLE),
    _forged("noise", "Sends random bytes.", "os.write(3, os.urandom(10**5) + b'\\n')"),
    _forged("the end", "Says that it is done.", 'send({"end": True})'),
    _forged("questions and the end", "Says that all questions were asked, and the end.",
            'send(*({"asked": f"03.q{n}"} for n in range(1, 6)), {"end": True})'),
    _forged("asking", "Asks for hidden inputs from a cell, again and again, without reading.",
            'while True: send({"ask": "03.q4"})'),
    _forged("heartbeat", "Says every second that a cell begins, to get more time.",
            'while True:\n    send({"cell": 0})\n    time.sleep(0.3)', limits=SHORT),
    _forged("short messages", "Sends a million short messages.",
            'send(*[{"asked": "03.q1"}] * 10**6)'),
    _forged("one line", "Sends one line that never ends.",
            "while True: os.write(3, b'x' * 10**5)", "it gave too much output"),
    _forged("one byte at a time", "Sends single bytes, each with a descriptor, for ever.", """\
s = socket.socket(fileno=os.dup(3))
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))]
while True:
    try: s.sendmsg([b"x"], rights)
    except OSError: pass""", "it took too long", limits=SHORT),
    _forged("deep JSON", "Sends 900 levels of JSON as the text of an error.",
            'send(b\'{"failed": 0, "error": \' + b"[" * 900 + b"]" * 900 + b"}", b"no")'),
    _forged("very deep JSON", "Sends a million levels of JSON.",
            'send(b\'{"failed": 0, "error": \' + b"[" * 10**6)'),
    _forged("no objects", "Sends numbers, lists and empty objects.", 'send(1); send([]); send({})'),
    _forged("odd objects", "Sends objects with wrong types and cells that do not exist.",
            'send({"cell": True}, {"cell": 10**20}, {"failed": -1}, {"got": ["03.q1"]})'),
    _forged("shutdown", "Closes the connection for both sides and goes on.",
            "socket.socket(fileno=3).shutdown(2)\nwhile True: pass"),
    _forged("closed", "Closes the descriptor.", "os.close(3)", "it ended the"),
    Attack(group=14, name="stopped between", does="Stops the process between the hidden inputs of "
           "question 1 and its answer.", make=before_checks("""\
import os, sys
real = os.fork
def fork():
    question = sys._getframe(2).f_locals.get("question", {})
    while question.get("id") == "03.q1": pass
    return real()
os.fork = fork"""), points={"q1": 0}, status={"q1": "time limit"},
           says=("question 03.q1: it took",), limits=SHORT),
    _forged_answer("wrong first", "Answer 1 sends wrong values and then returns the right ones.",
                   RIGHT_FIRST, "wrong"),
    _forged_answer("other questions", "Answer 1 sends a value for question 2.",
                   'send({"got": "03.q2", "case": 0, "value": 0})', "interfered"),
    _forged_answer("cases that are none", "Answer 1 sends values for inputs -1 and 10**30.",
                   'send({"got": "03.q1", "case": -1, "value": 0}, '
                   '{"got": "03.q1", "case": 10**30, "value": 0})', "interfered"),
    _forged_answer("array of 10**4000", "Answer 1 sends an array whose shape takes hours to "
                   "multiply.", """\
n = b"9" * 4000
head = b'{"got": "03.q1", "case": 0, "value": {"array": {"dtype": "<f8", "base64": "", "shape": ['
send(head + b",".join([n] * 900) + b"]}}}")""", "output limit"),
    _forged_answer("wide text", "Answer 1 sends few words of which one is long, which as an array "
                   "would fill 1.6 GB.", """\
words = json.dumps(["x" * 20_000] + [""] * 20_000).encode()
head = b'{"got": "03.q1", "case": 0, "value": {"array": {"dtype": "U", "shape": [20001], "text": '
send(head + words + b"}}}")""", "output limit"),
    _forged_answer("deep value", "Answer 1 sends a value of 900 levels.", """\
send(b'{"got": "03.q1", "case": 0, "value": ' + b"[" * 900 + b"]" * 900 + b"}")""",
                   "output limit"),
    _forged_answer("broken arrays", "Answer 1 sends arrays that contradict themselves.", """\
for case, array in enumerate(({"dtype": "O", "shape": [1], "base64": "AAAA"},
                              {"dtype": "<f8", "shape": [0, 10**7], "base64": ""},
                              {"dtype": "<f8", "shape": [-1, True], "base64": "?"})):
    send({"got": "03.q1", "case": case, "value": {"array": array}})""", "wrong"),
    _forged_answer("numbers that are none", "Answer 1 sends NaN, 1e999 and a long number.", """\
for case, number in enumerate((b"NaN", b"1e999", b"7" * 4000)):
    send(b'{"got": "03.q1", "case": %d, "value": %s}' % (case, number))""", "wrong"),
    _forged_answer("the end of a question", "Answer 1 says that it was asked and is done.",
                   'send({"asked": "03.q1"})', "interfered"),
    _forged_answer("its own death", "Answer 1 says that it died, with odd codes.",
                   'send({"died": "03.q1", "code": {"a": 1}, "time": [[]]})', "interfered"),
]  # fmt: skip

ATTACKS = [*WRITES, *OUTSIDE]
