"""A Dask cluster gives the gradebook that one process gives, also when it loses a worker."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.grading.conftest import SMALL
from tests.grading.synthetic import make_class
from tests.grading.test_run import grades, lines, submit
from tlcourse.grading import attempt, journal, pools, report
from tlcourse.grading.class_folder import ClassFolder
from tlcourse.grading.run import Options, grade

distributed = pytest.importorskip("dask.distributed")
pytestmark = [pytest.mark.usefixtures("needs_sandbox"), pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two workers in processes of their own."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as started:
        yield started


def graded(school: ClassFolder, root: Path, options: Options) -> tuple[bytes, list]:
    """Grade a copy of a class; its gradebook.csv and all that the database says."""
    copy = ClassFolder(Path(shutil.copytree(school.root, root)))
    summary = grade(copy, SMALL, options)
    assert not summary.failed and not summary.interrupted
    report.report(copy)
    return (copy.reports / "gradebook.csv").read_bytes(), grades(copy)


def test_the_same_gradebook_byte_for_byte(school: ClassFolder, tmp_path: Path, cluster) -> None:
    submit(school, make_class(SMALL, 9))
    alone = graded(school, tmp_path / "alone", Options(workers=1, quiet=True))
    scheduler = Options(scheduler=cluster.scheduler_address, quiet=True)
    together = graded(school, tmp_path / "together", scheduler)
    assert alone == together
    assert len(alone[1]) == 9 * 3


def test_a_lost_worker_loses_nothing(
    school: ClassFolder, cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(school, make_class(SMALL, 10))
    before = dict(cluster.scheduler_info["workers"])
    assert len(before) == 2
    run = pools.DaskPool.run
    killed = []

    def kills_a_worker(self, function, jobs):
        for number, result in enumerate(run(self, function, jobs)):
            if number == 2:
                pids = self._client.run(os.getpid)
                killed.append(next(iter(pids.values())))
                os.kill(killed[0], signal.SIGKILL)
            yield result

    monkeypatch.setattr(pools.DaskPool, "run", kills_a_worker)
    summary = grade(school, SMALL, Options(scheduler=cluster.scheduler_address, quiet=True))
    assert killed and (summary.graded, summary.failed) == (10, {})
    assert sorted(line["student"] for line in lines(school)) == sorted(
        journal.read(school.results(SMALL))
    )
    assert len(grades(school)) == 10 * 3


def test_no_scheduler_at_this_address_says_so(school: ClassFolder) -> None:
    submit(school, make_class(SMALL, 1))
    distributed_config = pytest.importorskip("dask").config
    with (
        distributed_config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(OSError, match=r"127\.0\.0\.1:9"),
    ):
        grade(school, SMALL, Options(scheduler="tcp://127.0.0.1:9", quiet=True))
    assert lines(school) == []


def test_a_pool_gives_an_error_in_place_of_a_result() -> None:
    pool = pools.open_pool(1)
    found = dict(pool.run(_fails_on_x, [("a", b"y"), ("b", b"x")]))
    pool.close()
    assert found["a"] == b"y" and isinstance(found["b"], ValueError)
    with pytest.raises(ValueError, match="workers must be >= 1, got 0"):
        pools.open_pool(0)


def _fails_on_x(job: bytes) -> bytes:
    if job == b"x":
        raise ValueError("x")
    return job


def test_a_job_needs_nothing_but_bytes() -> None:
    """What crosses to another machine is a function by name, and bytes."""
    assert attempt.attempt.__module__ == "tlcourse.grading.attempt"
    assert attempt.attempt.__annotations__ == {"job": "bytes", "return": "bytes"}
