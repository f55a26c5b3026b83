"""What all tests share: few threads, no window, no hub, and honest skips."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator

# Before anything imports torch, NumPy or a hub library; kernels of notebook tests inherit it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import matplotlib
import pytest

# By this call, not by MPLBACKEND: notebook kernels inherit the environment and must draw inline.
matplotlib.use("Agg")


def pytest_configure(config: pytest.Config) -> None:
    """Share the cores among the test processes, or their threads get in each other's way."""
    processes = getattr(config.option, "numprocesses", None) or 1
    if isinstance(processes, int):
        threads = max(1, (os.cpu_count() or 1) // processes)
        os.environ.setdefault("OMP_NUM_THREADS", str(min(threads, 4)))


def chromium() -> str | None:
    """Path of a Chromium or Chrome for the browser tests, or None."""
    named = os.environ.get("TLCOURSE_CHROMIUM")
    names = [named] if named else ["chromium", "chromium-browser", "google-chrome", "chrome"]
    return next((path for name in names if (path := shutil.which(name))), None)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run; with TLCOURSE_REQUIRE_BROWSER no browser fails instead."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not _has_cuda():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
    if not chromium() and not os.environ.get("TLCOURSE_REQUIRE_BROWSER"):
        for item in items:
            if item.get_closest_marker("browser"):
                item.add_marker(pytest.mark.skip(reason="no Chromium (set TLCOURSE_CHROMIUM)"))


@pytest.fixture(autouse=True)
def no_figure_stays_open() -> Iterator[None]:
    """A figure that one test leaves must not be found by another."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """The browser of the browser tests; fails where CI requires one and there is none."""
    path = chromium()
    assert path, "no Chromium was found, but TLCOURSE_REQUIRE_BROWSER is set"
    return path
