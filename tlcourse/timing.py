"""Ways of doing the same work, timed in turns: medians, ratios with intervals, a table, a plot."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.special import bdtr

from tlcourse.comparing import versions
from tlcourse.evaluation import Interval
from tlcourse.machine import core_count, memory_bytes

Clock = Literal["wall", "cpu"]


@dataclass(frozen=True)
class Timings:
    """Seconds of each way in each round; round i of one way is paired with round i of another.

    Attributes:
        wall: way -> one number for each round.
        cpu: likewise, CPU time of this process (all its threads).
        facts: what else was measured or set, for the reader (floats, ints, strings, lists).
    """

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]
    facts: dict[str, Any] = field(default_factory=dict)

    def seconds(self, way: str, clock: Clock = "wall") -> Interval:
        """Median over the rounds with its interval."""
        return median_interval(self._of(clock)[way])

    def ratio(self, way: str, reference: str, clock: Clock = "wall") -> Interval:
        """Median over the rounds of (seconds of way / seconds of reference), with its interval."""
        times = self._of(clock)
        return median_interval([a / b for a, b in zip(times[way], times[reference], strict=True)])

    def table(self, reference: str, per: float = 1.0, unit: str = "s") -> str:
        """Markdown: seconds and CPU time of each way, and both over those of ``reference``.

        Args:
            reference: the way that others are divided by.
            per: seconds are divided by this (the number of steps, say)...
            unit: ...and shown in this unit: "s", "ms" or "us".
        """
        factor = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit] / per
        lines = [
            f"| way | wall, {unit} | CPU, {unit} | wall / {reference} | CPU / {reference} |",
            "|---|---|---|---|---|",
        ]
        for way in self.wall:
            times = [_scaled(self.seconds(way, clock), factor) for clock in ("wall", "cpu")]
            ratios = [str(_rounded(self.ratio(way, reference, clock))) for clock in ("wall", "cpu")]
            lines.append(f"| {' | '.join([way, *times, *ratios])} |")
        return "\n".join(lines)

    def _of(self, clock: Clock) -> dict[str, list[float]]:
        return self.wall if clock == "wall" else self.cpu


def take_turns(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int = 7,
    warm_up: bool = True,
    facts: Mapping[str, Any] | None = None,
) -> Timings:
    """Time every way once in each round, in an order that turns from round to round.

    A way must leave nothing to wait for; on a GPU the clock stops after a synchronisation.

    Args:
        ways: name -> the work; each call does the same work.
        rounds: >= 7, so that the interval of a median holds with at least 95 %.
        warm_up: run every way once before the first round, untimed.
        facts: see ``Timings``.

    Raises:
        ValueError: for fewer than 7 rounds, or no way.
    """
    if rounds < 7 or not ways:
        raise ValueError(f"need at least 7 rounds and one way, got {rounds} and {len(ways)}")
    names = list(ways)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    if warm_up:
        for name in names:
            ways[name]()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            _synchronise()
            start = time.perf_counter(), time.process_time()
            ways[name]()
            _synchronise()
            wall[name].append(time.perf_counter() - start[0])
            cpu[name].append(time.process_time() - start[1])
    return Timings(wall, cpu, dict(facts or {}))


class Clocked:
    """A loader's batches, over and over, with the time of the steps after a warm-up.

    The clock is read when batch ``warm_up`` (from 0) is asked for, and again when the last one is,
    as not every training loop asks once more after it. A GPU is waited for both times.

    Args:
        loader: its batches are given as they come, for ``steps`` steps in all.
        steps: > warm_up + 1.
        warm_up: steps that are not timed, such as those in which a model is compiled.

    Raises:
        ValueError: if no step would be timed.

    Attributes:
        seconds: mean wall time of a timed step, once the last batch was asked for.
    """

    def __init__(self, loader: Any, steps: int, warm_up: int) -> None:
        if not 0 <= warm_up < steps - 1:
            raise ValueError(f"warm_up must be in [0, {steps - 2}] of {steps} steps, got {warm_up}")
        self.loader, self.steps, self.warm_up, self.seconds = loader, steps, warm_up, 0.0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        endless = chain.from_iterable(repeat(self.loader))  # the loader must not be empty
        last, start = self.steps - 1, 0.0
        for step, batch in enumerate(islice(endless, self.steps)):
            if step in (self.warm_up, last):
                _synchronise()
                now = time.perf_counter()
                self.seconds, start = (now - start) / (last - self.warm_up), now
            yield batch


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Median and its interval from order statistics: no assumption on the distribution.

    Between the k-th smallest and the k-th largest of n independent values lies the true median
    with probability 1 - 2 P(Binomial(n, 1/2) < k); the largest such k is taken. Of 7 values that
    is the smallest and the largest (98.4 %).

    Raises:
        ValueError: if there are too few values for the level (6 for 95 %).
    """
    ordered, n = np.sort(np.asarray(values, dtype=np.float64)), len(values)
    good = [k for k in range(1, n // 2 + 1) if 1 - 2 * bdtr(k - 1, n, 0.5) >= confidence]
    if not good:
        raise ValueError(f"an interval at level {confidence} needs more than {n} values")
    k = max(good)
    return Interval(float(np.median(ordered)), float(ordered[k - 1]), float(ordered[n - k]))


def save_timings(
    path: str | Path, cases: Mapping[str, Timings], command: str, **settings: Any
) -> None:
    """Write timings by case as JSON, with the settings and where they were measured."""
    content = {
        "command": command,
        "settings": settings,
        "where": where(),
        "cases": {name: asdict(case) for name, case in cases.items()},
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, allow_nan=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def load_timings(path: str | Path) -> dict[str, Timings]:
    """The cases that ``save_timings`` wrote."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    return {name: Timings(**case) for name, case in content["cases"].items()}


def where(*packages: str) -> str:
    """Processor, cores, memory, the GPU if there is one, and versions: where a result is from.

    Args:
        packages: shown besides those of ``tlcourse.comparing.versions``.
    """
    processor = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    parts = [f"{platform.system()}, {processor}, {core_count()} cores"]
    parts += [f"{round(memory_bytes()[0] / 1e9)} GB"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    shown = versions() | {
        name: metadata.version(name) for name in ("peft", "transformers", *packages)
    }
    return ", ".join([*parts, *(f"{name} {version}" for name, version in shown.items())])


def _synchronise() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _scaled(interval: Interval, factor: float) -> str:
    digits = f"{interval.mean * factor:.3g}"
    return f"{digits} [{interval.low * factor:.3g}, {interval.high * factor:.3g}]"


def _rounded(interval: Interval) -> str:
    return f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
