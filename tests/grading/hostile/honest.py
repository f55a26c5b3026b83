"""Group 15: honest work that looks odd, and keeps all its points."""

from __future__ import annotations

from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from tests.grading.hostile.scene import (
    Attack,
    Edit,
    Scene,
    before_checks,
    beside,
    checks,
    edited,
    find,
    first,
    grade_id,
    last,
    solution,
)
from tlcourse.grading.scoring import Outcome


def check_first(nb: NotebookNode) -> None:
    """Every test cell above its answer."""
    for number in range(1, 6):
        check = find(nb, f"q{number}-check")
        nb.cells.remove(check)
        nb.cells.insert(nb.cells.index(find(nb, f"q{number}-answer")), check)


def imports_last(nb: NotebookNode) -> None:
    nb.cells = [*nb.cells[3:], *nb.cells[:3]]


def backwards(nb: NotebookNode) -> None:
    nb.cells.reverse()


def helper_later(nb: NotebookNode) -> None:
    """An answer that a decorator needs, one that calls a helper; both are defined below."""
    find(nb, "q1-answer").source = "@as_float\n" + find(nb, "q1-answer").source
    find(nb, "q5-answer").source = find(nb, "q5-answer").source.replace(
        "alpha / len(A)", "scale_of(alpha, A)"
    )
    nb.cells.append(new_code_cell("def scale_of(alpha, A): return alpha / len(A)"))
    nb.cells.append(new_code_cell("def as_float(f): return lambda *a: float(f(*a))"))


def other_kernel(nb: NotebookNode) -> None:
    nb.metadata = {"kernelspec": {"name": "ir", "display_name": "R", "language": "R"},
                   "language_info": {"name": "julia"}, "colab": {"provenance": []}}  # fmt: skip


def html_outputs(nb: NotebookNode) -> None:
    for cell in nb.cells:
        if cell.cell_type == "code":
            data = {"text/html": "<script>alert(1)</script><img src=x>"}
            cell.outputs = [new_output("display_data", data)]
            cell.execution_count = 7


def experiments_deleted(nb: NotebookNode) -> None:
    """Only imports, answers and test cells."""
    nb.cells = nb.cells[1:3] + [cell for cell in nb.cells[3:] if grade_id(cell)]


def many_cells(nb: NotebookNode) -> None:
    nb.cells += [new_code_cell(f"x_{n} = {n}") for n in range(500)]
    nb.cells += [new_markdown_cell("text " * 1000) for _ in range(200)]


def module(nb: NotebookNode) -> None:
    nb.cells[3:3] = [new_code_cell("%%writefile own.py\ndef own(): return 7"),
                     new_code_cell("from own import own\nassert own() == 7")]  # fmt: skip


def magic_cells(nb: NotebookNode) -> None:
    sources = [
        "%%time\ny = sum(range(10))",
        "%%capture out\nprint(5)",
        "%%bash\necho hi > hi.txt",
        "%%timeit -n 1 -r 1\nsum(range(10))",
        "assert (y, out.stdout, open('hi.txt').read()) == (45, '5\\n', 'hi\\n')",
    ]
    nb.cells[3:3] = [new_code_cell(source) for source in sources]


def split_answer(nb: NotebookNode) -> None:
    """An answer in two cells, both with its grade id, as an editor splits them."""
    answer = find(nb, "q3-answer")
    rest = new_code_cell("def head_gradients(*a): return _head_gradients(*a)")
    rest.metadata = answer.metadata
    answer.source = answer.source.replace("def head_gradients", "def _head_gradients")
    nb.cells.insert(nb.cells.index(answer) + 1, rest)


def no_checks_no_setup(nb: NotebookNode) -> None:
    """No test cells, and the package imported in other ways."""
    nb.cells = [cell for cell in nb.cells if cell not in checks(nb)]
    nb.cells[1].source = "from tlcourse import check, plots, setup\nimport tlcourse as tl"


MAGICS = """\
%matplotlib inline
%config InlineBackend.figure_format = "retina"
%load_ext autoreload
%autoreload 2
%autosave 60
%timeit -n 1 -r 1 sum(range(10))
!echo hi
files = !ls /tmp
%env PROBABLY=1
%pwd
x = 1"""
ASYNC = """\
import asyncio
async def later(x):
    await asyncio.sleep(0.01)
    return x
z = await later(3)
values = await asyncio.gather(*(later(n) for n in range(5)))
assert z == 3 and values == list(range(5))"""
CLASSES = """\
import abc, dataclasses, enum, functools, typing
@dataclasses.dataclass(frozen=True)
class Point:
    x: float
    y: float = 0.0
class Color(enum.Enum):
    RED = 1
class Base(abc.ABC):
    @abc.abstractmethod
    def loss(self): ...
class Loss(Base):
    def loss(self): return 1
    def __call__(self, logits, targets):
        top = logits.max(axis=1, keepdims=True)
        lse = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
        return np.mean(lse - logits[np.arange(len(targets)), targets])
cross_entropy = Loss()"""
PARALLEL = """\
import multiprocessing, threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
def square(x): return x * x
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(square, range(10)) == [x * x for x in range(10)]
with ThreadPoolExecutor(4) as pool:
    assert list(pool.map(square, range(4))) == [0, 1, 4, 9]
found = []
thread = threading.Thread(target=lambda: found.append(1)); thread.start(); thread.join()
kept_open = ProcessPoolExecutor(2, multiprocessing.get_context("fork"))
assert kept_open.submit(square, 3).result() == 9
lock = multiprocessing.Lock()
with lock: pass
shared = multiprocessing.Array("d", 10)"""
JOBLIB = """\
from joblib import Parallel, delayed
assert Parallel(n_jobs=2)(delayed(abs)(n) for n in (-1, 2)) == [1, 2]"""
PLOTS = """\
import matplotlib.pyplot as plt
for _ in range(3):
    plt.figure(); plt.plot([1, 2]); plt.title("$x^2$"); plt.show()
fig, ax = plt.subplots()
fig.savefig("/tmp/x.png")"""
FILES = """\
import json, pathlib, pickle, tempfile
pathlib.Path("notes.txt").write_text("hello")
assert pathlib.Path("notes.txt").read_text() == "hello"
np.savez("data.npz", a=np.ones(3)); assert np.load("data.npz")["a"].sum() == 3
with tempfile.NamedTemporaryFile() as f: pickle.dump([1], f)
with open("/dev/shm/x", "wb") as f: f.write(b"x")"""
NOISY = """\
import logging, sys, warnings
warnings.warn("old"); print("to stderr", file=sys.stderr); logging.error("wrong")
sys.stdout.write("x"); sys.stdout.flush()
from tqdm import tqdm
for _ in tqdm(range(3)): pass
np.log(np.zeros(1))"""
LAMBDA = """\
cross_entropy = lambda z, t: np.mean(
    z.max(1) + np.log(np.exp(z - z.max(1, keepdims=True)).sum(1)) - z[np.arange(len(t)), t])"""
TYPES = beside("pass").replace("return np.mean", "return np.float32(1) * 0 + np.mean")
BIG = "large = np.ones(50_000_000)  # 400 of 600 MB\nprint(large.nbytes)"
COPY_OF_BIG = beside("import time; time.sleep(0.15); total = len(large)")
DIVERGED = """\
def cross_entropy(logits, targets, _seen=[]):
    _seen.append(1)
    global calls
    calls = len(_seen)
    logits -= logits.max(axis=1, keepdims=True)  # changes its input in place
    lse = np.log(np.exp(logits).sum(axis=1))
    return np.mean(lse - logits[np.arange(len(targets)), targets])"""
POOL_IN_ANSWER = beside("""\
import multiprocessing
pool = multiprocessing.get_context("fork").Pool(2)
pool.map(abs, range(3))""")


def all_cells_ran(scene: Scene, outcome: Outcome, raw: dict[str, Any]) -> None:
    assert outcome.status == "graded" and not raw["failed"], raw["failed"]


def _odd(name: str, does: str, *edits: Edit, **answers: str) -> Attack:
    return Attack(group=15, name=name, does=does, make=edited(*edits, **answers),
                  check=all_cells_ran)  # fmt: skip


def _cell(name: str, does: str, source: str) -> Attack:
    return Attack(group=15, name=name, does=does, make=before_checks(source),
                  check=all_cells_ran)  # fmt: skip


def _failing(name: str, does: str, source: str) -> Attack:
    return Attack(group=15, name=name, does=does, make=before_checks(source))


ATTACKS = [
    Attack(group=15, name="as it should be", does="The solution itself.",
           make=lambda scene: nbformat.writes(solution(whole=True)).encode(), check=all_cells_ran),
    _odd("checks first", "Every test cell stands above its answer.", check_first),
    _odd("imports last", "The imports stand at the end.", imports_last),
    _odd("backwards", "All cells in reverse order.", backwards),
    _odd("helpers later", "A decorator and a helper are defined in the last cells.", helper_later),
    _odd("another kernel", "The metadata names R, Julia and Colab.", other_kernel),
    _odd("HTML in outputs", "Every cell has kept an output with a script.", html_outputs),
    _odd("experiments deleted", "Only imports, answers and test cells are left.",
         experiments_deleted),
    _odd("many cells", "500 more cells, and long texts.", many_cells),
    _odd("answer split", "An answer in two cells with one grade id.", split_answer),
    _odd("other imports", "No test cells, the package imported by parts.", no_checks_no_setup),
    _odd("lambda", "An answer is a lambda.", q1=LAMBDA),
    _odd("object", "An answer is an object that can be called; classes of all sorts.", q1=CLASSES),
    _odd("prints", "An answer prints.", q1=beside("print('hello', logits); display(targets)")),
    _odd("other types", "An answer returns other NumPy types.", q1=TYPES),
    _odd("changes its input", "An answer changes its arguments and counts its calls.", q1=DIVERGED),
    _odd("pool in an answer", "An answer starts processes and leaves them running.",
         q1=POOL_IN_ANSWER),
    _odd("warns", "An answer warns and logs.", q1=beside("import warnings; warnings.warn('x')")),
    Attack(group=15, name="large array", does="Holds two thirds of its memory while answers run.",
           make=before_checks(BIG, q1=COPY_OF_BIG)),
    _cell("magics", "Line magics, shell commands.", MAGICS),
    _odd("magic cells", "Cells that are timed, captured, or run by bash.", magic_cells),
    _odd("module", "Writes a module in one cell and imports it in the next.", module),
    _cell("pip", "Installs a package, without a network.",
          "%pip install -q nothing-like-it\nz = 1"),
    _cell("await", "Top-level await.", ASYNC),
    _cell("processes", "Pools of processes and threads, one left open.", PARALLEL),
    _cell("joblib", "Runs scikit-learn's loops in processes of their own.", JOBLIB),
    _cell("plots", "Plots, shows and saves.", PLOTS),
    _cell("files", "Writes and reads files of its own.", FILES),
    _cell("noise", "Warnings, logs, progress bars, text on stderr.", NOISY),
    _failing("input", "Asks the user something.", "name = input('your name? ')"),
    _failing("syntax error", "A cell that is no Python.", "def broken(:\n    pass"),
    _failing("an error", "A cell that raises.", "1 / 0"),
    _failing("Colab", "Imports what only Colab has.", "from google.colab import drive"),
    _cell("widgets", "Makes a widget.",
          "import ipywidgets\nipywidgets.IntSlider()\nfrom IPython.display import clear_output\n"
          "clear_output()"),
    _cell("torch", "Uses torch, which the exercise does not import.",
          "import torch\nassert torch.ones(3).sum() == 3"),
    Attack(group=15, name="sys.exit in the last cell", does="Ends with sys.exit().",
           make=last("import sys\nsys.exit()")),
    Attack(group=15, name="exit in the last cell", does="Ends with exit().", make=last("exit()")),
    Attack(group=15, name="quit in the first cell", does="Begins with quit.", make=first("quit")),
    Attack(group=15, name="restart", does="Clears all names, as after a restart.",
           make=last("%reset -f")),
]  # fmt: skip
