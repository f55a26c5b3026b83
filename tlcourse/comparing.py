"""Several arms of an experiment on the same draws, with intervals."""

from __future__ import annotations

import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path

from tlcourse.evaluation import Interval, mean_interval
from tlcourse.parallel import side_by_side
from tlcourse.recording import interrupts_raise
from tlcourse.tracking import progress_bar

_PACKAGES = ("tlcourse", "torch", "torchvision", "numpy", "scikit-learn")


@dataclass(frozen=True)
class Comparison:
    """Scores of each arm on each draw; draw i of one arm is paired with draw i of another.

    Attributes:
        scores: for each arm one number per draw.
        seconds: for each arm the wall time of each draw.
        command: how the comparison was made.
        versions: of Python and the packages, when it was made.
    """

    scores: dict[str, list[float]]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = {arm: len(scores) for arm, scores in self.scores.items()}
        if len(set(counts.values())) != 1:
            raise ValueError(f"every arm needs a score for every draw, got numbers {counts}")

    def interval(self, arm: str) -> Interval:
        """Mean over the draws and its 95 % interval (Student's t)."""
        return mean_interval(self._of(arm))

    def difference(self, a: str, b: str) -> Interval:
        """Mean of (score of a - score of b) over the draws; the interval is paired."""
        return mean_interval([x - y for x, y in zip(self._of(a), self._of(b), strict=True)])

    def table(self, reference: str | None = None) -> str:
        """Markdown table: mean and 95 % interval of each arm, and its gain over one of them.

        Args:
            reference: the arm that others are compared with; None: the first.
        """
        reference = next(iter(self.scores)) if reference is None else reference
        self._of(reference)  # refuses an unknown one
        names = {arm: arm.replace("|", r"\|") for arm in self.scores}
        lines = [
            f"| arm | mean | 95 % interval | minus {names[reference]} (paired) |",
            "|---|---|---|---|",
        ]
        for arm, name in names.items():
            mean, gain = self.interval(arm), self.difference(arm, reference)
            gained = f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
            lines.append(
                f"| {name} | {mean.mean:.3f} | [{mean.low:.3f}, {mean.high:.3f}] "
                f"| {'' if arm == reference else gained} |"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def save(self, path: str | Path, command: str | None = None) -> None:
        """Write everything as JSON, to be recorded as a result.

        Args:
            path: file to write; its folder is made if missing.
            command: how to make the result again; None: as the program was started.
        """
        content = asdict(self) | ({} if command is None else {"command": command})
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Read what ``save`` wrote."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def _of(self, arm: str) -> list[float]:
        if arm not in self.scores:
            raise KeyError(f"no arm {arm!r}; there are {', '.join(map(repr, self.scores))}")
        return self.scores[arm]


def compare(
    arms: Mapping[str, Callable[[int], float]],
    draws: int = 5,
    progress: bool = True,
    workers: int | None = 1,
) -> Comparison:
    """Run every arm on the same draws.

    Before each run torch's generators are seeded alike, so that an arm gives the same score
    whichever arms run beside it.

    Args:
        arms: name to function; each is called with the seeds 0, 1, ..., draws - 1 and returns
            its score. To keep the draws paired, an arm takes its labelled set from the seed:
            ``tl.load_task("wild_digits", labels_per_class=10, seed=seed)``.
        draws: how many, >= 2 (one draw has no interval).
        progress: show a progress line.
        workers: runs side by side, each in a process of its own (see
            ``tlcourse.parallel.side_by_side``); None: one for each core.

    Raises:
        ValueError: if there is no arm, fewer than 2 draws, or a score is not a finite number
            (names the arm and the draw).
        TypeError: if an arm cannot be called.
    """
    if not arms:
        raise ValueError("compare needs at least one arm, got none")
    for name, arm in arms.items():
        if not callable(arm):
            raise TypeError(f"arm {name!r} must be a function of the seed, got {arm!r}")
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 2:
        raise ValueError(f"draws must be an int >= 2, got {draws!r}")
    scores: dict[str, list[float]] = {name: [] for name in arms}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    runs = [(name, seed) for seed in range(draws) for name in arms]
    timed = side_by_side(partial(_timed_score, arms), runs, workers)
    with progress_bar(len(runs), progress) as bar:
        for name, seed in runs:
            bar.set_description(f"draw {seed + 1}/{draws}, {name}")
            score, taken = next(timed)
            scores[name].append(score)
            seconds[name].append(taken)
            bar.update()
    return Comparison(scores, seconds, _command(), versions())


def _timed_score(
    arms: Mapping[str, Callable[[int], float]], run: tuple[str, int]
) -> tuple[float, float]:
    """Score of one arm on one draw, and its seconds."""
    name, seed = run
    start = time.perf_counter()
    with interrupts_raise():  # an arm that was cut short must not enter the table
        score = _checked_score(arms[name](seed), name, seed)
    return score, round(time.perf_counter() - start, 3)


def _checked_score(score: object, arm: str, seed: int) -> float:
    try:
        value = float(score)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"arm {arm!r} must return a finite number, got {score!r} on draw {seed}")
    return value


def _command() -> str:
    """The program and its arguments, without the folders of this machine."""
    if "ipykernel" in sys.modules:
        return "in a notebook"
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a measurement rests on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
