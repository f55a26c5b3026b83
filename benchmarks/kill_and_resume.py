"""Does a run that is killed again and again end with the same bits?

    python benchmarks/kill_and_resume.py [--kills N] [--steps N] [--out FILE]

A network with dropout and BatchNorm is trained on wild digits, augmented and in random order, with
a checkpoint after every step. The process gets SIGKILL at 20 random moments, every fifth time in
the middle of a save (the moment a half-written file is seen), and is started again with
``resume="auto"``. One more run is never stopped and writes no checkpoint. The sha256 of all weights
at the end, and the whole history, must be the same. One thread on a CPU.

Writes ``data/results/kill_and_resume.json``: where each kill fell, and both hashes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tlcourse as tl
from tlcourse.checkpoints import fingerprint
from tlcourse.locations import data_dir
from tlcourse.saving import PARTIAL
from tlcourse.timing import where

SAVES, PATIENCE_SECONDS = 5, 120.0


def train(folder: str | None, num_steps: int) -> dict[str, Any]:
    """The run; returns what must come out the same."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 32 * 32, 256), nn.BatchNorm1d(256), nn.ReLU(),
        nn.Dropout(0.3), nn.Linear(256, 10),
    )  # fmt: skip
    loaders = tl.load_task("wild_digits", labels_per_class=20).loaders(batch_size=16)
    config = tl.TrainConfig(
        num_steps=num_steps, eval_every_steps=10, warmup_steps=5, progress=False,
        checkpoint_dir=folder, checkpoint_minutes=0,
    )  # fmt: skip
    resume: Any = "never" if folder is None else "auto"
    history = tl.fit(model, loaders.train, loaders.val, config, resume=resume)
    numbers = [history.train_loss, history.lr, history.val_loss, history.best_step]
    return {
        "weights": fingerprint(model.state_dict()),
        "history": hashlib.sha256(json.dumps(numbers).encode()).hexdigest(),
    }


def start(folder: Path | None, num_steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--steps", str(num_steps), "--child", str(folder or "")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def newest_step(folder: Path) -> int:
    return max((int(path.stem[5:]) for path in folder.glob("step-*.json")), default=0)


def half_written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(f"*{PARTIAL}"))


def kill_somewhere(folder: Path, num_steps: int, target: int, in_a_save: bool) -> dict[str, Any]:
    """Start, and kill once ``target`` steps are saved: after a moment, or in the next save."""
    process = start(folder, num_steps)
    began = time.monotonic()
    while newest_step(folder) < target:
        if process.poll() is not None or time.monotonic() - began > PATIENCE_SECONDS:
            raise RuntimeError(f"the run ended, or hung, before step {target}")
        time.sleep(0.002)
    if in_a_save:
        while process.poll() is None and not half_written(folder):
            pass
    else:
        time.sleep(random.uniform(0.0, 0.1))
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = half_written(folder)
    return {"after_step": newest_step(folder), "during_a_save": bool(left), "left": left}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=data_dir() / "results/kill_and_resume.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        print(json.dumps(train(options.child or None, options.steps)))
        return 0

    random.seed(0)
    expected = json.loads(start(None, options.steps).communicate()[0])
    kills, stride = [], options.steps // (options.kills + 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(1, options.kills + 1):
            target = newest_step(folder) + random.randint(1, max(1, stride - 2))
            in_a_save = number % SAVES == 0 or number == options.kills
            kills.append(kill_somewhere(folder, options.steps, target, in_a_save))
            print(f"kill {number}: {kills[-1]}", flush=True)
        found = json.loads(start(folder, options.steps).communicate()[0])
    content = {
        "command": "python benchmarks/kill_and_resume.py", "where": where(),
        "steps": options.steps, "kills": kills, "never_stopped": expected, "killed": found,
        "same_bits": expected == found,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"never stopped: {expected['weights'][:16]}, killed: {found['weights'][:16]}")
    return 0 if content["same_bits"] else 1


if __name__ == "__main__":
    sys.exit(main())
