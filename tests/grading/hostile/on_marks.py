"""Groups 10 to 12: marks by trickery, and a search for answers, secrets and other students."""

from __future__ import annotations

import json
import struct
from typing import Any

from tests.grading.hostile.scene import (
    WRONG_1,
    Attack,
    Scene,
    before_checks,
    beside,
    edited,
    failed_text,
    first,
)
from tlcourse.grading.scoring import Outcome


def _wrong(name: str, does: str, source: str) -> Attack:
    """A wrong answer to question 1, and a cell that should make it right."""
    return Attack(group=10, name=name, does=does, make=first(source, q1=WRONG_1),
                  points={"q1": 0}, status={"q1": "wrong"})  # fmt: skip


TURNED = [
    _wrong("input transformer", "Strips every check and assertion from later cells.", """\
def strip(lines):
    return [x for x in lines if "check" not in x and "assert" not in x]
get_ipython().input_transformers_cleanup.append(strip)
get_ipython().input_transformers_post.append(strip)"""),
    _wrong("syntax tree transformer", "Turns every check of later cells into True.", """\
import ast
class Yes(ast.NodeTransformer):
    def visit_Assert(self, node): return ast.copy_location(ast.Pass(), node)
    def visit_Call(self, node):
        is_check = getattr(node.func, "attr", "") == "check"
        return ast.copy_location(ast.Constant(True), node) if is_check else node
get_ipython().ast_transformers.append(Yes())"""),
    _wrong("trace and profile", "Changes the locals of every frame that holds an expected value.",
           """\
import sys, threading
def trace(frame, event, value):
    for name in ("expected", "want", "right", "points", "got"):
        if name in frame.f_locals:
            frame.f_locals["got"] = frame.f_locals[name]
    return trace
sys.settrace(trace); threading.settrace(trace); sys.setprofile(trace)"""),
    _wrong("display hook", "Replaces the hooks for display and exceptions.", """\
import sys
sys.displayhook = sys.excepthook = sys.unraisablehook = lambda *a: None
get_ipython().display_pub.publish = lambda *a, **k: None"""),
    _wrong("builtins", "Replaces abs, all, any and max, which a comparison may use.", """\
import builtins
builtins.abs = lambda x: 0.0
builtins.all = lambda x: True
builtins.any = lambda x: False"""),
    _wrong("imports", "Gives every later import of the grader's modules a module of its own.", """\
import importlib.abc, importlib.machinery, sys, types
class Yes(types.ModuleType):
    def __getattr__(self, name): return lambda *a, **k: None
class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.startswith("tlcourse") or name == "json":
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec): return Yes(spec.name)
    def exec_module(self, module): pass
sys.meta_path.insert(0, Finder())"""),
    _wrong("tl.check", "Replaces check by a function that says yes.", """\
import tlcourse, tlcourse.checks, tlcourse.questions, tlcourse.plain_data
tlcourse.check = tlcourse.checks.check = lambda *a, **k: True
tlcourse.plain_data.compare = lambda *a, **k: None
tlcourse.plain_data._close = lambda *a: True
tlcourse.questions.Question.measured = lambda self, raw, case: self.expect(case)"""),
    _wrong("exit handlers", "Sends a result when the process ends.", """\
import atexit, json, os, weakref
line = json.dumps({"got": "03.q1", "case": 0, "value": 1.0, "points": 2}).encode() + b"\\n"
class Last: pass
keep = Last()
weakref.finalize(keep, os.write, 3, line)
atexit.register(os.write, 3, line)"""),
    _wrong("events of the shell", "Puts a function before and after every cell.", """\
def forge(*a):
    import tlcourse
    tlcourse.check = lambda *a: True
    get_ipython().user_ns["right_1"] = True
for event in ("pre_run_cell", "post_run_cell", "pre_execute", "post_execute"):
    get_ipython().events.register(event, forge)"""),
    _wrong("the names of the checks", "Sets right_1 to True, where the notebook reads it.",
           "right_1 = right_2 = right_3 = right_4 = right_5 = True"),
    Attack(group=10, name="run_cell replaced", does="Replaces the function that runs cells.",
           make=before_checks("""\
from types import SimpleNamespace
get_ipython().run_cell = lambda *a, **k: SimpleNamespace(
    error_before_exec=None, error_in_exec=None, result=True)""", q1=WRONG_1),
           points=dict.fromkeys(("q1", "q2", "q3", "q4", "q5"), 0.0)),
]  # fmt: skip


def _looks_right(name: str, does: str, answer: str, status: str, points: float = 0) -> Attack:
    return Attack(group=11, name=name, does=does, make=edited(q1=answer), points={"q1": points},
                  status={"q1": status})  # fmt: skip


def _returns(setup: str, value: str) -> str:
    return f"{setup}\ndef cross_entropy(logits, targets):\n    return {value}"


EQUAL = """\
class Equal:
    shape, dtype, ndim = (), np.dtype(float), 0
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
    def __hash__(self): return 0
    def __bool__(self): return True
    def __float__(self): return 0.0
    def __sub__(self, other): return 0.0
    def __rsub__(self, other): return 0.0
    def __abs__(self): return 0.0
    def __array__(self, *a, **k): return np.zeros(())"""
FLOAT = """\
class Float(float):
    def __eq__(self, other): return True
    def __sub__(self, other): return 0.0
    def __rsub__(self, other): return 0.0
    def __abs__(self): return 0.0
    def __repr__(self): return "nan"
    __hash__ = float.__hash__"""
ARRAY = """\
class Array(np.ndarray):
    def __eq__(self, other): return np.ones(self.shape, bool)
    def __sub__(self, other): return np.zeros(self.shape)
    def __array_function__(self, *a): return np.ones(self.shape, bool)
    def __array_ufunc__(self, *a, **k): return np.zeros(self.shape)
    def __reduce__(self): return (print, ("x",))"""
SPOOF = """\
class Spoof:
    __class__ = property(lambda self: float)
    def __float__(self): return 0.0
    def __eq__(self, other): return True"""
FORGED_JSON = """\
import json, types
real = json.dumps
def dumps(value, *a, **k):
    if type(value) is dict and value.get("got") == "03.q1":
        return '{"got": "03.q1", "case": 0, "right": true, "points": 2, "score": 1.0}'
    return real(value, *a, **k)
json.dumps = dumps"""
PATCHED_PLAIN = """\
from tlcourse import plain_data
real = plain_data.to_json
forged = {"equal": True, "right": True, "points": 2}
plain_data.to_json = lambda value: forged if type(value) is float else real(value)"""

LOOKS_RIGHT = [
    _looks_right("equal to everything", "Returns an object that equals everything.",
                 _returns(EQUAL, "Equal()"), "not plain"),
    _looks_right("a float that equals", "Returns a float with comparisons of its own.",
                 _returns(FLOAT, "Float(0)"), "not plain"),
    _looks_right("an array that equals", "Returns an array with comparisons of its own.",
                 _returns(ARRAY, "np.zeros(()).view(Array)"), "wrong"),
    _looks_right("a class that lies", "Returns an object whose class says float.",
                 _returns(SPOOF, "Spoof()"), "not plain"),
    _looks_right("array of objects", "Returns an array of objects that equal everything.",
                 _returns(EQUAL, "np.array(Equal(), dtype=object)"), "not plain"),
    _looks_right("NaN", "Returns NaN.", _returns("", "float('nan')"), "wrong"),
    _looks_right("infinity", "Returns infinity.", _returns("", "np.inf"), "wrong"),
    _looks_right("array of NaN", "Returns NaN of every shape.",
                 _returns("", "np.full((1,), np.nan)"), "wrong"),
    _looks_right("True", "Returns True.", _returns("", "True"), "wrong"),
    _looks_right("None", "Returns None.", _returns("", "None"), "wrong"),
    _looks_right("complex", "Returns a complex number.", _returns("", "0j"), "not plain"),
    _looks_right("2**70", "Returns a whole number beyond 64 bits.", _returns("", "2**70"),
                 "not plain"),
    _looks_right("a list in itself", "Returns a list that holds itself.",
                 _returns("x = []\nx.append(x)", "x"), "not plain"),
    _looks_right("all answers at once", "Returns a list of many guesses.",
                 _returns("", "list(np.linspace(0, 10, 10_000))"), "wrong"),
    _looks_right("NumPy patched", "Replaces isclose, allclose and testing in its process.",
                 _returns("np.isclose = np.allclose = np.array_equal = lambda *a, **k: True\n"
                          "np.testing.assert_allclose = lambda *a, **k: None", "0.0"), "wrong"),
    _looks_right("JSON patched", "Replaces json.dumps by one that writes points.",
                 _returns(FORGED_JSON, "0.0"), "wrong"),
    _looks_right("plain data patched", "Replaces the conversion to plain data.",
                 _returns(PATCHED_PLAIN, "0.0"), "wrong"),
    _looks_right("a callable class", "Is an object that calls itself equal and returns itself.",
                 EQUAL + "\n    def __call__(self, *a): return self\ncross_entropy = Equal()",
                 "not plain"),
    _looks_right("an error that is none", "Raises an error called like a status.",
                 "class right(Exception): pass\n"
                 + _returns("", "(_ for _ in ()).throw(right('right on all'))"), "raised"),
    Attack(group=11, name="a dict that lies", does="Returns a dict whose items change.",
           make=edited(q5="""\
class Dict(dict):
    def items(self): return [("A", 0.0), ("B", 0.0)]
    def __getitem__(self, key): return 0.0
    def __eq__(self, other): return True
    def __iter__(self): return iter(["A", "B"])
def lora_gradients(H, dU, A, B, alpha): return Dict(A=A, B=B)"""), points={"q5": 0}),
]  # fmt: skip

WALK = """\
import json, os, sys
found = set()
known = {"/proc", "/usr", sys.prefix, sys.base_prefix}  # large, and nobody puts a class there
for top, folders, files in os.walk("/"):
    folders[:] = [x for x in folders if os.path.join(top, x) not in known]
    for name in [*folders, *files]:
        path = os.path.join(top, name)
        if (name in ("questions.py", "class_secret", "class.toml", "gradebook.db", "solutions",
                     "lessons", "submitted", "answers.py") or name.endswith(".ipynb")
                or "by_hand" in name) and path != "@PACKAGE@/questions.py":
            found.add(path)
for path in ("@FOLDER@", "@FOLDER@/class_secret", "@FOLDER@/submitted", "/etc/passwd",
             "/etc/shadow", "/var", "/run", "/sys", "/boot", "/mnt",
             "@PACKAGE@/../lessons", "@PACKAGE@/../solutions", "@PACKAGE@/../tests",
             "@PACKAGE@/../.git", "/proc/1/root@FOLDER@", "/proc/self/root@FOLDER@"):
    try:
        os.listdir(path) if os.path.isdir(path) else open(path).read()
        found.add(path)
    except OSError:
        pass
raise ValueError(json.dumps(sorted(found)))"""
PROCESSES = """\
import json, os
found = {"pids": [p for p in os.listdir("/proc") if p.isdigit()], "environ": dict(os.environ)}
for pid in found["pids"]:
    for name in ("environ", "cmdline", "maps", "mountinfo"):
        try:
            text = open(f"/proc/{pid}/{name}", "rb").read().decode(errors="replace")
            found[f"{pid}/{name}"] = [w for w in text.replace("\\0", "\\n").splitlines()
                                      if "PROBE" in w or "class" in w or "lesson" in w]
        except OSError:
            pass
    try:
        found[f"{pid}/fd"] = [os.readlink(f"/proc/{pid}/fd/{fd}")
                              for fd in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        pass
def cross_entropy(*a): return json.dumps(found)"""
# All that the process can write to, in pieces that overlap. The patterns do not match themselves.
SEARCH = """\
import re
def pieces(size=2**23):
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
        for line in maps.read().splitlines():
            ends, rights = line.split()[:2]
            start, end = (int(x, 16) for x in ends.split("-"))
            for at in range(start, end, size) if rights.startswith("rw") else ():
                try:
                    memory.seek(at)
                    yield memory.read(min(size + 64, end - at))
                except OSError:
                    pass
def search(*patterns):
    hits = {x for piece in pieces() for p in patterns for x in re.findall(p, piece)}
    return sorted(x.decode() for x in hits)
planted = "PLANTED-" + "here"
"""
MEMORY = (
    SEARCH
    + """
found = search(rb"PROBE-[a-z]+-[0-9a-f]{16}", rb"_naive_cross_entrop[y]", rb"PLANTED-[h]ere")
def cross_entropy(*a): return found"""
)
EXPECTED = (
    SEARCH
    + """
planted, found = np.array([np.pi * 1e5, np.e]), []
for k, (masked, mask) in enumerate([(planted.view(np.uint64)[0] ^ np.uint64(99), 99), *@MASKED@]):
    for piece in pieces():
        words = np.frombuffer(piece, np.uint64, len(piece) // 8)
        if np.any((words ^ np.uint64(mask)) == np.uint64(masked)):
            found.append("PLANTED-here" if k == 0 else "an expected value")
def cross_entropy(*a): return sorted(set(found))"""
)
FRAMES = """\
import gc, sys
names, frame = set(), sys._getframe()
while frame:
    names |= set(frame.f_locals)
    frame = frame.f_back
kinds = {}
gc.unfreeze()
for each in gc.get_objects():
    kinds[type(each).__name__] = kinds.get(type(each).__name__, 0) + 1
modules = [m for m in sys.modules if m.startswith("tlcourse_") or m.endswith((".plan", ".scoring"))]
def cross_entropy(*a):
    return {"names": sorted(names), "kinds": sorted(kinds), "modules": modules}"""
LEAVE = """\
import builtins, ctypes, gc, os, socket, subprocess, sys, tlcourse
mark = "PROBE-" + "first-" + "0123456789abcdef"
builtins.mark = tlcourse.mark = sys.mark = os.environ["MARK"] = mark
keep = [mark + str(i) for i in range(100_000)]
for place in ("/tmp", "/dev/shm", "/dev", "/dev/pts", "/", "/var/tmp", "/run", os.getcwd(),
              os.path.expanduser("~"), "/tmp/ipython", sys.prefix, "@PACKAGE@"):
    try:
        with open(f"{place}/probe-mark", "w") as f: f.write(mark)
    except OSError: pass
libc = ctypes.CDLL(None)
for key in (-1, -2, -3, -4, -5):
    libc.syscall(248, b"user", mark.encode(), mark.encode(), len(mark), key)
s = socket.socket(socket.AF_UNIX); s.bind("\\0probe-mark"); s.listen()
get_ipython().user_ns_hidden["mark"] = mark
if os.fork() == 0:
    os.setsid()
    import time; time.sleep(60); os._exit(0)"""
LOOK = (
    SEARCH
    + """
import builtins, os, socket, sys, tlcourse
found = search(rb"PROBE-[a-z]+-[0-9a-f]{16}", rb"PLANTED-[h]ere")
found += [v for v in map(lambda x: getattr(x, "mark", ""), (builtins, tlcourse, sys)) if v]
found += [os.environ["MARK"]] if "MARK" in os.environ else []
for top in ("/tmp", "/dev", "/dev/shm", "/var/tmp", "/", "/run"):
    found += [f"{top}/{x}" for x in (os.listdir(top) if os.path.isdir(top) else []) if "mark" in x]
try:
    found.append(open("/proc/keys").read() and "keys")
except OSError: pass
try:
    socket.socket(socket.AF_UNIX).connect("\\0probe-mark"); found.append("socket")
except OSError: pass
found += [p for p in os.listdir("/proc") if p.isdigit() and int(p) > 2]
def cross_entropy(*a): return [x for x in found if x]"""
)
SHOUT = """\
class Told(Exception): pass
Told.__name__ = Told.__qualname__ = repr(logits)[:80] + "\\x1b[31m\\u202e"
raise Told(repr((logits, targets)), "\\x1b]0;x\\x07\\n<script>alert(1)</script>")"""


def value_of(raw: dict[str, Any], question: str = "03.q1") -> Any:
    """What an answer gave for the first hidden input, as the JSON of plain data."""
    return raw["values"][question]["0"]


def finds_no_file(scene: Scene, outcome: Outcome, raw: dict[str, Any]) -> None:
    found = json.loads(failed_text(raw, 3))
    assert not found, found


def finds_no_process(scene: Scene, outcome: Outcome, raw: dict[str, Any]) -> None:
    found = json.loads(value_of(raw))
    assert found.pop("pids") == ["1", "2"], found
    assert "TLCOURSE_PROBE" not in found["environ"]
    assert not [x for key, lines in found.items() if key.endswith(("environ", "cmdline", "info"))
                for x in lines if str(scene.folder) in x or "PROBE" in x]  # fmt: skip
    assert not [x for x in found.get("2/fd", []) if not x.startswith(("/dev/", "socket:", "/proc"))]


def finds_nothing(scene: Scene, outcome: Outcome, raw: dict[str, Any]) -> None:
    assert value_of(raw) == ["PLANTED-here"], value_of(raw)  # the search itself works


def finds_no_frame(scene: Scene, outcome: Outcome, raw: dict[str, Any]) -> None:
    found = value_of(raw)["dict"]
    assert found["modules"] == []
    assert {"Plan", "Question", "Outcome", "Mark"}.isdisjoint(found["kinds"])
    assert {"expected", "secret", "plan", "inputs", "points"}.isdisjoint(found["names"])


def tells_nothing(scene: Scene, outcome: Outcome, raw: dict[str, Any]) -> None:
    assert outcome.marks[0].words() == "an error was raised on hidden inputs"
    assert "array" in raw["errors"]["03.q1"]["0"][1]  # the teacher may see it


def _hunt(name: str, does: str, source: str, check: Any, **more: Any) -> Attack:
    lost: dict[str, Any] = {"points": {"q1": 0}, "status": {"q1": "wrong"}}
    make = edited(q1=source) if "def cross_entropy" in source else before_checks(source)
    lost = lost if "def cross_entropy" in source else {}
    return Attack(group=12, name=name, does=does, make=make, check=check, **lost, **more)


def _masked(scene: Scene) -> str:
    """The right answers to question 1, each hidden by a mask that is given beside it."""
    bits = [struct.unpack("<Q", struct.pack("<d", x))[0] for x in scene.plan.expected["03.q1"]]
    return repr([(word ^ (0x5A5A5A5A5A5A5A5A + i), 0x5A5A5A5A5A5A5A5A + i)
                 for i, word in enumerate(bits)])  # fmt: skip


def search_expected(scene: Scene) -> bytes | Any:
    scene.places["MASKED"] = _masked(scene)
    return edited(q1=EXPECTED)(scene)


HUNTS = [
    _hunt("disk", "Looks through the whole disk for lessons, solutions and classes.", WALK,
          finds_no_file),
    _hunt("processes", "Reads /proc: processes, environments, open files, mounts.", PROCESSES,
          finds_no_process),
    _hunt("memory", "Searches its memory for secrets, other students and reference answers.",
          MEMORY, finds_nothing),
    Attack(group=12, name="expected values", does="Searches its memory for the right answers to "
           "the hidden inputs.", make=search_expected, points={"q1": 0}, check=finds_nothing),
    _hunt("frames and objects", "Walks up the stack and through all objects.", FRAMES,
          finds_no_frame),
    _hunt("the student before", "Searches memory, files, keys, sockets and processes for what the "
          "submission before it has left in all of them.", LOOK, finds_nothing,
          before=first(LEAVE)),
    Attack(group=12, name="hidden inputs told", does="Raises an error whose name and text are the "
           "hidden inputs and codes for a terminal.", make=edited(q1=beside(SHOUT)),
           points={"q1": 0}, status={"q1": "raised"}, check=tells_nothing),
]  # fmt: skip

ATTACKS = [*TURNED, *LOOKS_RIGHT, *HUNTS]
