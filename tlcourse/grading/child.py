"""Inside the sandbox: run a notebook's cells, and put hidden inputs to its answers.

Everything here shares a process with hostile code. Nothing that it reports is believed, but
for the values that answers give to inputs, and those the parent compares itself.
"""

from __future__ import annotations

import ast
import contextlib
import os
import resource
import select
import signal
import socket
import sys
import time
import types
from typing import Any

import tlcourse
from tlcourse import checks, plain_data
from tlcourse.grading.channel import Channel
from tlcourse.questions import respond

_LONGEST_TEXT = 2000
_MAGICS = (
    "autosave",
    "clear",
    "connect_info",
    "qtconsole",
    "tensorflow_version",
)  # of Jupyter, Colab
_NO_ROOM = 1
_ROOM = 8  # processes, those of the sandbox among them
_NO_MEMORY = 128 + signal.SIGKILL  # as if the kernel had done it


class _Later:
    """What ``tl.check`` returns here: not right yet, so that no experiment behind it runs."""

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "graded later"


LATER = _Later()


def make_shell() -> Any:
    """An IPython shell without history or tracebacks."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "nocolor"
    shell: Any = InteractiveShell.instance(config=config)
    shell.showtraceback = shell.showsyntaxerror = lambda *a, **k: None
    shell.enable_matplotlib = lambda gui=None: (gui, "agg")
    for name in _MAGICS:
        shell.register_magic_function(lambda line: None, "line", name)
    # IPython would keep all that is printed, for its history.
    shell._tee = lambda *a, **k: contextlib.nullcontext()
    return shell


def serve(connection: socket.socket, shell: Any, alone: bool) -> None:
    """Take one job from the parent and work it off.

    Args:
        connection: leads to the parent.
        shell: what :func:`make_shell` gave.
        alone: all processes that can be seen from here belong to the job.
    """
    channel = Channel(connection)
    job = channel.receive()
    job["alone"] = alone
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for module in (tlcourse, checks):
        vars(module)["check"] = lambda *arguments, **named: LATER
    sys.path.insert(0, "")  # as in Jupyter: modules that a cell has written
    namespace = shell.user_ns
    namespace.update(__name__="__main__")
    questions = {question["id"]: question for question in job["questions"]}
    for question in questions.values():
        namespace.update(dict.fromkeys(question["names"], LATER))
    unsettled = dict(questions)
    failed = []
    for number, cell in enumerate(job["cells"]):
        if number in job["skip_cells"]:
            continue
        only_checks = cell["check"] and _only_checks(cell["source"])
        if not only_checks and _run_cell(channel, shell, number, cell["source"]) == "NameError":
            failed.append(number)
        if cell["check"]:
            _ask(channel, job, questions[cell["check"]], namespace, unsettled)
    # Cells out of order: what failed for want of a name is run again while that helps.
    while failed and (again := [n for n in failed if _again(channel, shell, job, n)]) != failed:
        failed = again
    for question in list(unsettled.values()):
        _ask(channel, job, question, namespace, unsettled)
    channel.send({"end": True})


def _only_checks(source: str) -> bool:
    """Whether a check cell is as it was handed out; in another, work may have been done."""
    try:
        (statement,) = ast.parse(source).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    call = getattr(statement, "value", None)
    return isinstance(call, ast.Call) and ast.unparse(call.func).endswith("check")


def _again(channel: Channel, shell: Any, job: dict, number: int) -> bool:
    """Run a failed cell again; True if it still lacks a name."""
    return _run_cell(channel, shell, number, job["cells"][number]["source"]) == "NameError"


def _run_cell(channel: Channel, shell: Any, number: int, source: str) -> str:
    """Run one cell; the name of the error, or ""."""
    channel.send({"cell": number})
    result = shell.run_cell(source, store_history=False)
    error = result.error_before_exec or result.error_in_exec
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        with contextlib.suppress(Exception):
            pyplot.close("all")
    if _no_room():
        os._exit(_NO_ROOM)
    if error is None:
        channel.send({"passed": number})
        return ""
    name = type(error).__name__
    if isinstance(error, MemoryError):
        os._exit(_NO_MEMORY)  # what it holds would starve the cells after it: run without this one
    channel.send({"failed": number, "error": name, "text": str(error)[:_LONGEST_TEXT]})
    return name


def _no_room() -> bool:
    """Whether a cell has left so many threads behind that no process can be started."""
    most = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    return most > 0 and len(os.listdir("/proc/self/task")) > most - _ROOM


def _ask(channel: Channel, job: dict, question: dict, namespace: dict, unsettled: dict) -> None:
    """Put a question to a copy of this process; strike it from ``unsettled`` if that is final."""
    if question["id"] in job["skip_questions"] or question["id"] not in unsettled:
        return
    channel.send({"ask": question["id"]})
    cases = channel.receive()
    reader, writer = os.pipe()
    pid = _fork(job["alone"])
    if pid == 0:
        os.close(reader)
        clean = _answer(channel, job, question, plain_data.from_json(cases), namespace)
        os.write(writer, b"y" if clean else b"n")
        os._exit(0)
    os.close(writer)
    end = os.pidfd_open(pid)  # processes that the answer has started may live on
    ended = bool(select.select([end], [], [], job["question_seconds"])[0])
    os.close(end)
    said = os.read(reader, 1) if select.select([reader], [], [], 0)[0] else b""
    os.close(reader)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if said:
        channel.send({"asked": question["id"]})
    else:
        channel.send({"died": question["id"], "code": code, "time": not ended})
    if said != b"n":
        del unsettled[question["id"]]


def _fork(alone: bool) -> int:
    """Fork; where a cell has left too many processes behind, end those first."""
    for _ in range(20):
        try:
            return os.fork()
        except OSError:
            if not alone:
                raise
            os.kill(-1, signal.SIGKILL)  # all but this process and process 1
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            time.sleep(0.05)
    return os.fork()


def _answer(channel: Channel, job: dict, question: dict, cases: list, namespace: dict) -> bool:
    """In a process of its own: the answer's values for all cases; whether it gave them all."""
    clean = True
    try:
        answer = eval(question["expression"], namespace)
    except BaseException as error:
        channel.send({"no_answer": question["id"], "error": type(error).__name__})
        return False
    if answer is None or answer is Ellipsis:
        channel.send({"no_answer": question["id"], "error": "NotImplementedError"})
        return False
    apply = _load_apply(question)
    for number, case in enumerate(cases):
        report: dict[str, Any] = {"got": question["id"], "case": number}
        try:
            value = plain_data.to_plain(respond(answer, tuple(case), apply))
            report["value"] = plain_data.to_json(value)
        except plain_data.NotPlainError as error:
            report |= {"error": "NotPlainError", "text": str(error)[:_LONGEST_TEXT]}
        except BaseException as error:
            text = str(error)[:_LONGEST_TEXT]
            report |= {"error": type(error).__name__, "text": text}
        clean = clean and "error" not in report
        channel.send(report)
    return clean


def _load_apply(question: dict) -> Any:
    """The function that puts a case to an answer; None if the answer is called itself."""
    if not question["apply"]:
        return None
    module = types.ModuleType("apply")
    exec(compile(question["apply"], "<apply>", "exec"), module.__dict__)
    return module.__dict__[question["apply_name"]]
