"""Where submissions are run: threads of this process, each with its own sandbox, or Dask.

A pool takes pairs of a label and a job, and gives pairs of a label and a result, or the exception
in its place, as they come. Only a few jobs wait at a time, however long the list.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol, TypeVar

from tlcourse.grading import attempt

Label = TypeVar("Label")
Function = Callable[[bytes], bytes]
_WAITING = 4  # jobs in hand for each worker


class Pool(Protocol):
    """Runs jobs; :meth:`close` ends what still runs."""

    def run(
        self, function: Function, jobs: Iterable[tuple[Label, bytes]]
    ) -> Iterator[tuple[Label, Any]]: ...

    def close(self) -> None: ...


def open_pool(workers: int, scheduler: str | None = None) -> Pool:
    """A pool on this machine, or on the cluster of a Dask scheduler.

    Raises:
        ValueError: if ``workers`` is less than 1.
        OSError: if no scheduler answers.
        ModuleNotFoundError: if Dask is not installed; says how to get it.
    """
    if scheduler is not None:
        return DaskPool(scheduler)
    if workers < 1:
        raise ValueError(f"workers must be >= 1, got {workers}")
    return LocalPool(workers)


class LocalPool:
    """Threads that wait for sandboxes; the work is done in the sandboxes' processes."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._executor = ThreadPoolExecutor(workers)

    def run(
        self, function: Function, jobs: Iterable[tuple[Label, bytes]]
    ) -> Iterator[tuple[Label, Any]]:
        waiting = iter(jobs)
        running: dict[Future[bytes], Label] = {}
        while True:
            room = self._workers * _WAITING - len(running)
            for label, job in itertools.islice(waiting, room):
                running[self._executor.submit(function, job)] = label
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.exception() or future.result()

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
        attempt.end_all()
        self._executor.shutdown(wait=True)
        attempt.close_all()


class DaskPool:
    """A Dask cluster; a job whose worker is lost goes to another one."""

    def __init__(self, scheduler: str) -> None:
        try:
            from dask.distributed import Client
        except ImportError:
            raise ModuleNotFoundError(
                "a scheduler needs Dask: pip install 'tlcourse[cluster]'"
            ) from None
        self._client = Client(scheduler)

    def run(
        self, function: Function, jobs: Iterable[tuple[Label, bytes]]
    ) -> Iterator[tuple[Label, Any]]:
        from dask.distributed import as_completed

        waiting = iter(jobs)
        labels: dict[Any, Label] = {}
        results = as_completed()
        while True:
            room = max(1, self._threads()) * _WAITING - len(labels)
            for label, job in itertools.islice(waiting, max(0, room)):
                future = self._client.submit(function, job, pure=False, retries=3)
                labels[future.key] = label
                results.add(future)
            if not labels:
                return
            future = next(results)
            yield labels.pop(future.key), future.exception() or future.result()

    def close(self) -> None:
        self._client.close()

    def _threads(self) -> int:
        """Threads of all workers; the number changes while a cluster grows or shrinks."""
        return sum(self._client.nthreads().values())
