"""Groups 1 to 5: time, crashes, memory, processes, output."""

from __future__ import annotations

from typing import Any

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from tests.grading.hostile.scene import (
    Attack,
    Scene,
    before_checks,
    beside,
    edited,
    failed_text,
    first,
    last,
)
from tlcourse.grading.scoring import Outcome

TOO_LONG, ENDED, CRASHED = "it took too long", "it ended the", "it crashed the"
MEMORY, OUTPUT = "it took too much memory", "it gave too much output"

SHORT = {"cell_seconds": 1.5, "question_seconds": 1.2}
DEAF = """\
import ctypes, signal
for number in range(1, 32):
    try:
        signal.signal(number, signal.SIG_IGN)
    except OSError:
        pass
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
while True:
    ctypes.CDLL(None).pause()"""
LOOP_AND_CATCH = """\
def loop():
    while True:
        pass
while True:
    try:
        loop()
    except BaseException:
        pass"""
SLOW_TEXT = """\
class Slow(Exception):
    def __str__(self):
        while True:
            pass
raise Slow"""


def staircase(nb: NotebookNode) -> None:
    steps = [f"name_{n} = name_{n + 1}" for n in range(60)]
    nb.cells = [new_code_cell(step) for step in [*steps, "name_60 = 0"]] + nb.cells


TIME = [
    Attack(group=1, name="loop in the first cell", does="Loops for ever in the first cell.",
           make=first("while True: pass"), says=(f"cell 1: {TOO_LONG}",), limits=SHORT),
    Attack(group=1, name="loop in the last cell", does="Loops for ever in the last cell.",
           make=last("while True: pass"), says=(f"cell 23: {TOO_LONG}",), limits=SHORT),
    Attack(group=1, name="loop that catches all", does="Loops and catches BaseException.",
           make=first(LOOP_AND_CATCH), says=(f"cell 1: {TOO_LONG}",), limits=SHORT),
    Attack(group=1, name="long multiplication", does="Computes pow(7, 10**8), which no signal "
           "interrupts.", make=first("pow(7, 10**8)"), says=(f"cell 1: {TOO_LONG}",), limits=SHORT),
    Attack(group=1, name="regular expression", does="Matches an expression with 2**40 ways.",
           make=first("import re\nre.match(r'(a|a)*$', 'a' * 40 + 'b')"),
           says=(f"cell 1: {TOO_LONG}",), limits=SHORT),
    Attack(group=1, name="deaf to signals", does="Ignores and blocks all signals and sleeps in C.",
           make=first(DEAF), says=(f"cell 1: {TOO_LONG}",), limits=SHORT),
    Attack(group=1, name="text of an error", does="Raises an error whose text never ends.",
           make=first(SLOW_TEXT), says=(f"cell 1: {TOO_LONG}",), limits=SHORT),
    Attack(group=1, name="a staircase", does="60 cells that lack a name, so that each can run only "
           "after another round over all of them.", make=edited(staircase)),
    Attack(group=1, name="loop in an answer", does="Loops for ever in the answer to question 1.",
           make=edited(q1="def cross_entropy(logits, targets):\n    while True: pass"),
           points={"q1": 0}, status={"q1": "time limit"}, says=("question 03.q1",), limits=SHORT),
    Attack(group=1, name="slow answer", does="Takes 0.8 seconds for each of three hidden inputs.",
           make=edited(q1=beside("import time; time.sleep(0.8)")),
           points={"q1": 0.666667}, status={"q1": "time limit"}, says=("question 03.q1",),
           limits=SHORT),
]  # fmt: skip

CRASH = [
    Attack(group=2, name=f"{name}, {place}", does=f"{does} in the {place} cell.",
           make=put(source), says=(f"cell {number}: {words}",))
    for place, put, number in (("first", first, 1), ("last", last, 23))
    for name, does, source, words in (
        ("os._exit", "Ends the process", "import os; os._exit(0)", ENDED),
        ("segfault", "Reads from address 0", "import ctypes; ctypes.string_at(0)", CRASHED),
    )
] + [
    Attack(group=2, name="os._exit in an answer", does="Ends the process in answer 1.",
           make=edited(q1=beside("import os; os._exit(0)")),
           points={"q1": 0}, status={"q1": "ended the process"}, says=("question 03.q1",)),
    Attack(group=2, name="segfault in an answer", does="Reads from address 0 in answer 1.",
           make=edited(q1=beside("import ctypes; ctypes.string_at(0)")),
           points={"q1": 0}, status={"q1": "crashed"}, says=("question 03.q1",)),
    Attack(group=2, name="sys.exit in an answer", does="Raises SystemExit in answer 1.",
           make=edited(q1=beside("import sys; sys.exit()")),
           points={"q1": 0}, status={"q1": "raised"}),
    Attack(group=2, name="abort", does="Calls abort().", make=first("import os; os.abort()"),
           says=(f"cell 1: {CRASHED}",)),
    Attack(group=2, name="endless recursion", does="Recurses in C until the stack is full.",
           make=first("import sys\nsys.setrecursionlimit(10**9)\nx = []\n"
                      "for _ in range(3 * 10**5): x = [x]\nrepr(x)"), says=("cell 1: ",)),
    Attack(group=2, name="another program", does="Replaces the process by another program.",
           make=first("import os; os.execv('/bin/true', ['true'])"), says=(f"cell 1: {ENDED}",)),
    Attack(group=2, name="kill the group", does="Sends SIGKILL to its whole process group.",
           make=first("import os; os.kill(0, 9)"), says=("cell 1: ",)),
    Attack(group=2, name="terminate the group", does="Sends SIGTERM to its whole process group.",
           make=first("import os; os.killpg(0, 15)"), says=(f"cell 1: {CRASHED}",)),
    Attack(group=2, name="interrupt the group", does="Sends SIGINT to its whole process group.",
           make=first("import os; os.kill(0, 2)")),
    Attack(group=2, name="a thread ends it later", does="Ends the process from a thread, a moment "
           "after the cell: whichever cell runs then is taken for the culprit.",
           make=first("import os, threading\nthreading.Timer(0.15, os._exit, [0]).start()"),
           points=None, says=(ENDED,)),
    Attack(group=2, name="not enough memory, said politely", does="Raises MemoryError.",
           make=first("raise MemoryError"), says=(f"cell 1: {MEMORY}",)),
]  # fmt: skip

MAPPED = """\
import mmap
m = mmap.mmap(-1, 1_500_000_000)
for i in range(0, len(m), 4096):
    m[i] = 1
import time; time.sleep(1)"""
MANY = """\
import subprocess, sys
code = "x = bytearray(60_000_000); x[::4096] = bytes(len(x[::4096])); import time; time.sleep(3)"
all_ = [subprocess.Popen([sys.executable, "-I", "-S", "-c", code]) for _ in range(25)]
for each in all_:
    each.wait()"""
FORKED = """\
import os, time
for _ in range(12):
    if os.fork() == 0:
        x = bytearray(100_000_000)
        x[::4096] = b"1" * len(x[::4096])
        time.sleep(3)
        os._exit(0)
time.sleep(2)"""
UNMAPPED = """\
import ctypes, os
libc, refused = ctypes.CDLL(None, use_errno=True), []
try:
    f = os.memfd_create("x")
    for _ in range(300): os.write(f, bytes(10**6))
except OSError as error:
    refused.append(error.errno)
for name, *a in (("shmget", 0, 300_000_000), ("msgget", 0), ("semget", 0, 100)):
    if getattr(libc, name)(*a, 0o1600) < 0:
        refused.append(ctypes.get_errno())
raise ValueError(refused)"""
EMPTY_FILES = """\
import os
count = 0
try:
    for folder in ("/tmp/files", "/tmp/links"):
        os.mkdir(folder)
        for count in range(100_000):
            open(f"/tmp/files/{count}", "w").close() if "files" in folder else (
                os.link("/tmp/files/0", f"/tmp/links/{count}"))
except OSError:
    pass
raise ValueError(len(os.listdir("/tmp/files")))"""
FULL_DISK = """\
import os
written = {}
for folder in ("/tmp", "/dev/shm"):
    written[folder] = 0
    try:
        for i in range(300):
            with open(f"{folder}/{i}", "wb") as f: f.write(bytes(10**6))
            written[folder] += 1
    except OSError as error:
        pass
raise ValueError(written)"""


def refuses_unmapped_memory(scene: Scene, outcome: Outcome, raw: dict[str, Any]) -> None:
    assert failed_text(raw) == "[1, 1, 1, 1]"


def makes_few_files(scene: Scene, outcome: Outcome, raw: dict[str, Any]) -> None:
    assert 10_000 < int(failed_text(raw)) < 20_000


def fills_a_small_disk(scene: Scene, outcome: Outcome, raw: dict[str, Any]) -> None:
    written = eval(failed_text(raw))
    assert all(10 <= count <= 17 for count in written.values()), written


HOLDS = [
    Attack(group=3, name="list of bytearrays", does="Appends to a list until memory is full.",
           make=first("x = []\nwhile True: x.append(bytearray(10**7))"),
           says=(f"cell 1: {MEMORY}",)),
    Attack(group=3, name="numpy arrays", does="Fills NumPy arrays.",
           make=last("x = [np.ones(5_000_000) for _ in range(60)]"), says=(f"cell 23: {MEMORY}",)),
    Attack(group=3, name="numpy in an answer", does="Fills NumPy arrays in answer 1.",
           make=edited(q1=beside("x = [np.ones(5_000_000) for _ in range(60)]")),
           points={"q1": 0}, status={"q1": "memory limit"}),
    Attack(group=3, name="shared mapping", does="Fills 1.5 GB of shared anonymous memory.",
           make=first(MAPPED), says=(f"cell 1: {MEMORY}",)),
    Attack(group=3, name="memory without a mapping", does="Writes to memfd_create and asks for "
           "System V shared memory, which no process need map.", make=first(UNMAPPED),
           check=refuses_unmapped_memory),
    Attack(group=3, name="files in memory", does="Fills /tmp and /dev/shm.",
           make=first(FULL_DISK), check=fills_a_small_disk),
    Attack(group=3, name="empty files", does="Makes 100,000 empty files, each of which takes a "
           "kilobyte of the kernel's memory.", make=first(EMPTY_FILES), check=makes_few_files),
    Attack(group=3, name="many programs", does="Starts 25 programs that hold 60 MB each.",
           make=first(MANY), says=(f"cell 1: {MEMORY}",)),
    Attack(group=3, name="many copies", does="Forks 12 copies that hold 100 MB each.",
           make=first(FORKED), says=(f"cell 1: {MEMORY}",)),
]  # fmt: skip

BOMB = """\
import os, time
for _ in range(200):
    try:
        if os.fork() == 0:
            time.sleep(100)
            os._exit(0)
    except OSError:
        pass"""
BREEDING = """\
import os, resource
try:
    resource.setrlimit(resource.RLIMIT_NPROC, (32, 32))  # enough, and where there is no wall
except ValueError:
    pass
if os.fork() == 0:
    while True:
        try:
            os.fork()
        except OSError:
            pass"""
THREADS = """\
import threading, time
for _ in range(200):
    try:
        threading.Thread(target=time.sleep, args=[100], daemon=True).start()
    except RuntimeError:
        pass"""
ORPHAN = """\
import os, signal, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        for number in range(1, 32):
            try: signal.signal(number, signal.SIG_IGN)
            except OSError: pass
        for _ in range(600):
            try:
                with open("@FOLDER@/orphan", "w") as f: f.write("was here")
            except OSError: pass
            time.sleep(0.1)
    os._exit(0)"""
GUARD = """\
import ctypes, os
libc, refused = ctypes.CDLL(None, use_errno=True), []
for name in ("mem", "environ", "maps", "oom_score_adj", "fd"):
    try:
        os.listdir("/proc/1/fd") if name == "fd" else open(f"/proc/1/{name}", "r+b")
    except OSError:
        refused.append(name)
if libc.ptrace(16, 1, 0, 0) < 0:  # PTRACE_ATTACH
    refused.append("ptrace")
for number in (9, 19, 15, 2):
    os.kill(1, number)
raise ValueError(refused)"""


def leaves_the_guard_alone(scene: Scene, outcome: Outcome, raw: dict[str, Any]) -> None:
    assert failed_text(raw) == "['mem', 'environ', 'maps', 'oom_score_adj', 'fd', 'ptrace']"


SPAWNS = [
    Attack(group=4, name="fork bomb", does="Forks 200 processes that sleep.", make=first(BOMB)),
    Attack(group=4, name="breeding fork bomb", does="Processes that fork for ever, each of them.",
           make=before_checks(BREEDING)),
    Attack(group=4, name="threads", does="Starts 200 threads.", make=first(THREADS),
           says=(f"cell 1: {ENDED}",)),
    Attack(group=4, name="orphan", does="Leaves a process behind, in a session of its own and deaf "
           "to signals, that writes to the class folder.", make=first(ORPHAN)),
    Attack(group=4, name="orphan of an answer", does="Leaves such a process behind in answer 1.",
           make=edited(q1=beside(ORPHAN))),
    Attack(group=4, name="the process that guards it", does="Kills, stops, traces and writes to "
           "the process that ends it.", make=first(GUARD), check=leaves_the_guard_alone),
]  # fmt: skip

NOISE = """\
import os, sys
print("x" * 10**8)
for i in range(10**6):
    print(i)
sys.stderr.write("y" * 10**8)
for fd in (1, 2):
    os.write(fd, b"z" * 10**7)"""
SHOW = """\
from IPython.display import HTML, display
for _ in range(2000):
    display(HTML("<b>x</b>" * 1000))"""

OUTPUT_ = [
    Attack(group=5, name="printing", does="Prints 100 MB in one line and a million short ones.",
           make=first(NOISE)),
    Attack(group=5, name="display", does="Displays 2,000 large outputs.", make=first(SHOW)),
    Attack(group=5, name="huge array as an answer", does="Returns an array of 80 MB.",
           make=edited(q1="def cross_entropy(logits, targets):\n    return np.zeros(10**7)"),
           points={"q1": 0}, status={"q1": "output limit"}, says=("question 03.q1",)),
    Attack(group=5, name="huge text as an answer", does="Returns a text of 50 MB.",
           make=edited(q1="def cross_entropy(logits, targets):\n    return 'x' * 5 * 10**7"),
           points={"q1": 0}, status={"q1": "output limit"}),
    Attack(group=5, name="list of brackets", does="Returns a list of 200,000 empty lists.",
           make=edited(q1="def cross_entropy(logits, targets):\n    return [[]] * 200_000"),
           points={"q1": 0}, status={"q1": "output limit"}),
    Attack(group=5, name="huge text of an error", does="Raises an error with a text of 100 MB.",
           make=edited(q1=beside("raise ValueError('x' * 10**8)")),
           points={"q1": 0}, status={"q1": "raised"}),
]  # fmt: skip

ATTACKS = [*TIME, *CRASH, *HOLDS, *SPAWNS, *OUTPUT_]
