"""One submission through a sandbox: bytes in, bytes out, so that any machine can do it.

A worker knows hidden inputs and no answer. What it returns is what the submission said, within
bounds, and where it had to be stopped; nothing is judged here.
"""

from __future__ import annotations

import atexit
import json
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from tlcourse.grading import cgroups
from tlcourse.grading.channel import Channel, ChannelError
from tlcourse.grading.sandbox import Sandbox, SandboxError
from tlcourse.grading.untrusted import one_line, within_bounds
from tlcourse.grading.walls import Bounds

_MOST_RUNS = 6  # a notebook that has been stopped so often is left as it is
_GRACE_SECONDS = 5  # for what the copy itself should have stopped
_GROUP_SPARE = 2 * 2**30  # for the imports that all copies share
_here = threading.local()
_open: set[Sandbox] = set()
_lock = threading.Lock()
_stopping = threading.Event()


@dataclass
class Answers:
    """What a submission said, and what happened; as JSON it is a worker's result.

    Attributes:
        values: question id -> case number -> plain data in JSON; the first that came counts.
        errors: question id -> case number -> [name, text] of what was raised.
        no_answer: question id -> name of the error that came in place of an answer.
        stopped: where it had to be stopped: "cell" or "question", and the reason.
        failed: cell number -> [name, text] of what it raised.
        finished: it came to its own end.
    """

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    no_answer: dict[str, str] = field(default_factory=dict)
    stopped: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, list[str]] = field(default_factory=dict)
    finished: bool = False
    seconds: float = 0.0


def attempt(job: bytes) -> bytes:
    """Run one submission; a pure function of its bytes, but for the clock.

    Args:
        job: JSON with "cells", "questions", "inputs", "preload", "walled" and "limits".

    Raises:
        SandboxError: if no sandbox can be had. One that breaks twice while a submission runs
            counts as the submission's doing.
    """
    order = json.loads(job)
    start = time.monotonic()
    try:
        answers = _Attempt(order).run()
    except SandboxError:
        close_sandbox()
        if _stopping.is_set():
            raise
        answers = _Attempt(order, last=True).run()
    answers.seconds = round(time.monotonic() - start, 2)
    return json.dumps(vars(answers)).encode()


def close_sandbox() -> None:
    """End this thread's sandbox, if it has one."""
    kept = getattr(_here, "sandbox", None)
    if kept is not None:
        _here.sandbox = None
        with _lock:
            _open.discard(kept[1])
        kept[1].close()


def end_all() -> None:
    """Kill all sandboxes of this process, whoever uses them: their submissions fail at once."""
    _stopping.set()
    with _lock:
        for sandbox in _open:
            sandbox.end()


def close_all() -> None:
    """Free what the sandboxes of threads that have ended hold; new ones may be made again."""
    with _lock:
        for sandbox in _open:
            sandbox.close()
        _open.clear()
    _stopping.clear()


atexit.register(close_all)


def _sandbox(order: dict[str, Any], bounds: Bounds) -> Sandbox:
    """This thread's sandbox with the right imports, kept from one submission to the next."""
    key = (tuple(order["preload"]), order["walled"], bounds)
    kept = getattr(_here, "sandbox", None)
    if kept is None or kept[0] != key:
        close_sandbox()
        memory = _GROUP_SPARE + bounds.memory_mb * 10**6
        group = cgroups.new_group(memory, bounds.processes + 32) if order["walled"] else None
        _here.sandbox = (key, Sandbox(key[0], walled=key[1], group=group))
        with _lock:
            _open.add(_here.sandbox[1])
    return _here.sandbox[1]


class _Attempt:
    """The runs of one submission: each skips what stopped the runs before it.

    Args:
        order: the job.
        last: a sandbox that breaks is not given another chance.
    """

    def __init__(self, order: dict[str, Any], last: bool = False) -> None:
        self.order = order
        self.last = last
        self.limits = order["limits"]
        self.ids = {question["id"] for question in order["questions"]}
        self.skip_cells: set[int] = set()
        self.skip_questions: set[str] = set()
        self.answers = Answers()
        self.deadline = time.monotonic() + self.limits["submission_seconds"]

    def run(self) -> Answers:
        for _ in range(_MOST_RUNS):
            where, reason = self._run_once()
            if not reason:
                self.answers.finished = True
                break
            kind, which = where
            if kind == "start" and not self.last:  # no code of the submission has run yet
                raise SandboxError(f"a copy did not begin: {reason}")
            self.answers.stopped.append({"kind": kind, "which": which, "reason": reason})
            if kind == "cell":
                self.skip_cells.add(which)
            elif kind == "question":
                self.skip_questions.add(which)
            if kind == "start" or time.monotonic() > self.deadline:
                break
        return self.answers

    def _run_once(self) -> tuple[tuple[str, Any], str]:
        """One run; where it was when it ended, and why it did not come to its end."""
        bounds = Bounds(
            memory_mb=self.limits["memory_mb"],
            processes=self.limits["processes"],
            disk_mb=self.limits["disk_mb"],
            cpu_seconds=int(self.limits["submission_seconds"]) + 1,
        )
        before = time.monotonic()
        sandbox = _sandbox(self.order, bounds)
        self.deadline += time.monotonic() - before  # imports are not the submission's time
        self.where: tuple[str, Any] = ("start", "")
        self.inside = False  # a cell or question that has begun and not ended
        self.seen: set[str] = set()
        self.limit_at = min(self.deadline, time.monotonic() + self.limits["cell_seconds"])
        most = int(self.limits["output_mb"] * 10**6)
        channel = Channel(sandbox.start(bounds), most)
        try:
            reason = self._talk(channel)
        finally:
            channel.close()
            sandbox.kill()
            ending = self._ending(sandbox)
        if reason == "gone" and (ending["reason"], ending["code"]) == ("killed", -signal.SIGKILL):
            reason = "protocol"  # it lived, and had closed the connection
        elif reason == "gone":
            reason = ending["reason"] if ending["reason"] == "memory" else _why(ending["code"])
        return self.where, reason

    def _ending(self, sandbox: Sandbox) -> dict[str, Any]:
        """How the copy ended; what breaks the sandbox, too, is as good as a crash."""
        try:
            ending = sandbox.wait()
        except SandboxError:
            if not self.last or self.where[0] == "start" or _stopping.is_set():
                raise
            close_sandbox()
            return {"code": 128 + signal.SIGSEGV, "reason": ""}
        if not sandbox.nested:
            close_sandbox()
        return ending

    def _talk(self, channel: Channel) -> str:
        """Listen until the end; "" if that was its own, else the reason."""
        job = {
            "cells": self.order["cells"],
            "questions": self.order["questions"],
            "skip_cells": sorted(self.skip_cells),
            "skip_questions": sorted(self.skip_questions),
            "question_seconds": self.limits["question_seconds"],
        }
        channel.connection.settimeout(_GRACE_SECONDS)
        try:
            channel.send(job)
            while True:
                message = channel.receive(max(0.0, self.limit_at - time.monotonic()))
                if message is None:
                    return "gone" if channel.ended else "time"
                if message == {"end": True}:
                    done = self.seen >= self.ids - self.skip_questions and not self.inside
                    return "" if done else "protocol"
                if not self._take(channel, message):
                    return "protocol"
        except ChannelError as error:
            return "output" if "more output" in str(error) else "protocol"
        except TimeoutError:  # it does not read
            return "time"
        except OSError:
            return "gone"

    def _take(self, channel: Channel, message: Any) -> bool:
        """Note one message; False if it is not one of ours."""
        if type(message) is not dict or not message:
            return False
        kind, which = next(iter(message.items()))
        now = time.monotonic()
        if kind in ("cell", "passed", "failed") and type(which) is int:
            # Cells and questions begin and end in turn. Whatever a cell says while it runs is
            # none of our messages, and it is that cell that has to be skipped.
            if not 0 <= which < len(self.order["cells"]) or self.inside == (kind == "cell"):
                return False
            if kind != "cell" and self.where != ("cell", which):
                return False
            self.inside = kind == "cell"
            if kind == "cell":
                self.where = ("cell", which)
                self.limit_at = min(self.deadline, now + self.limits["cell_seconds"])
                self.answers.failed.pop(str(which), None)
            elif kind == "failed":
                self.answers.failed[str(which)] = _error(message)
            return True
        if type(which) is not str or which not in self.ids or self.inside == (kind == "ask"):
            return False
        if kind != "ask" and self.where != ("question", which):
            return False
        self.inside = kind not in ("asked", "died")
        if kind == "ask":
            self.where = ("question", which)
            self.seen.add(which)
            seconds = self.limits["question_seconds"] + _GRACE_SECONDS
            self.limit_at = min(self.deadline, now + seconds)
            channel.send(self.order["inputs"][which])
        elif kind == "got":
            return self._take_value(which, message)
        elif kind == "no_answer":
            self.answers.no_answer[which] = _error(message)[0]
        elif kind == "died":
            reason = "time" if message.get("time") else _why(message.get("code"))
            stop = {"kind": "question", "which": which, "reason": reason}
            if stop not in self.answers.stopped:
                self.answers.stopped.append(stop)
        elif kind != "asked":
            return False
        return True

    def _take_value(self, which: str, message: dict) -> bool:
        case = message.get("case")
        if type(case) is not int or not 0 <= case < len(self.order["inputs"][which]):
            return False
        self.answers.no_answer.pop(which, None)
        errors = self.answers.errors.setdefault(which, {})
        values = self.answers.values.setdefault(which, {})
        if "error" in message:
            errors[str(case)] = _error(message)
        elif not within_bounds(message.get("value")):
            raise ChannelError("more output than a value may be")
        elif str(case) not in values:  # the first counts: nobody may guess twice
            values[str(case)] = message.get("value")
        return True


def _error(message: dict) -> list[str]:
    return [one_line(message.get("error"), 100), one_line(message.get("text"), 2000)]


def _why(code: Any) -> str:
    """The reason behind an exit code; 128 and more stand for a signal."""
    if type(code) is not int or code == 0:
        return "exit"
    number = -code if code < 0 else code - 128
    if number == signal.SIGKILL:
        return "memory"
    if number == signal.SIGXCPU:
        return "time"
    return "crash" if number > 0 else "exit"
