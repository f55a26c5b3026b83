"""Independent runs side by side: one process for each core, one thread in each process.

A small network gains little from a second core, but two draws of an experiment do not wait
for each other. The processes come from joblib's loky, which also takes functions that were
defined in a notebook.
"""

from __future__ import annotations

import copyreg
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from joblib import Parallel, cpu_count, delayed

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def side_by_side(
    function: Callable[[Argument], Result],
    arguments: Iterable[Argument],
    workers: int | None = None,
) -> Iterator[Result]:
    """Yield ``function(argument)`` for each argument, in their order.

    Args:
        function: what it needs and returns travels between processes (models may). It must
            draw its chance from seeds of its own: torch's generator starts the same for each.
        arguments: seeds, for example.
        workers: processes, >= 1; None is ``default_workers()``. With 1 everything runs in
            this process.

    Raises:
        ValueError: if workers is less than 1.
    """
    tasks = list(arguments)
    workers = default_workers() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers must be >= 1, got {workers}")
    if min(workers, len(tasks)) < 2:
        yield from (_seeded_call(function, task) for task in tasks)
        return
    calls = (delayed(_call_on_one_thread)(function, task) for task in tasks)
    # No memory maps: what a worker gets is its own, to change as it likes.
    yield from Parallel(workers, backend="loky", max_nbytes=None, return_as="generator")(calls)


def default_workers() -> int:
    """One process for each core, at most 4; 1 where there is a GPU (one run keeps it busy)."""
    return 1 if torch.cuda.is_available() else min(4, cpu_count())


def _by_name(module: Any) -> tuple[Any, tuple[str]]:
    return importlib.import_module, (module.__name__,)


# A function that uses ``torch`` and any attribute called ``classes`` is sent with the module
# ``torch.classes``, a special object that pickle cannot take: by its name, then.
copyreg.pickle(type(torch.classes), _by_name)


def _call_on_one_thread(function: Callable[[Argument], Result], argument: Argument) -> Result:
    torch.set_num_threads(1)
    return _seeded_call(function, argument)


def _seeded_call(function: Callable[[Argument], Result], argument: Argument) -> Result:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return function(argument)
