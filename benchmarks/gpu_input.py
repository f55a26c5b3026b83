"""Can data and augmentation on the GPU keep up with a network that trains there?

    python benchmarks/gpu_input.py [--out FILE]

ResNet-50, ``tl.fit`` compiled, bf16, 256 images of 224 x 224 in a step, from 4,096 random pictures
as bytes. The augmentation is the course's own (``augment_images``: affine, colour).
Ways: one batch on the GPU again and again ("synthetic", the most that loading could allow); the
pictures on the GPU, drawn and augmented there by ``BatchLoader``; torch's DataLoader whose workers
(one less than there are cores) augment whole batches by the same function; the same with
torchvision's transforms on single images, as most scripts have it. Both pin memory. The clock is
read before steps 2 and 10 of 0 to 10, with the GPU waited for. 7 rounds, in turns.

Writes ``data/results/gpu_input.json`` and a plot.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import tlcourse as tl
from tlcourse.datasets import BatchLoader, augment_images
from tlcourse.locations import data_dir, repo_root
from tlcourse.machine import core_count
from tlcourse.plots import plot_intervals
from tlcourse.timing import Clocked, Timings, load_timings, median_interval, save_timings

ROUNDS, WARM_UP, STEPS, NUM_CLASSES = 7, 2, 11, 100


def augment_bytes(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 pictures, shape (B, 3, H, W), as augmented floats in [-1, 1]."""
    return augment_images(images.float().div_(127.5).sub_(1), generator)


augment_bytes.takes_any_device = True  # type: ignore[attr-defined]


class Batches(Dataset):
    """Whole augmented batches, so that a worker works on many images at once."""

    def __init__(self, images: Tensor, targets: Tensor, batch_size: int) -> None:
        self.images, self.targets, self.batch_size = images, targets, batch_size

    def __len__(self) -> int:
        return len(self.targets) // self.batch_size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        rows = torch.randint(len(self.targets), (self.batch_size,), generator=generator)
        return augment_bytes(self.images[rows], generator), self.targets[rows]


class Images(Dataset):
    """Single images through torchvision's transforms."""

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        from torchvision.transforms import v2

        self.images, self.targets = images, targets
        self.transform = v2.Compose([
            v2.RandomAffine(15, translate=(0.06, 0.06), scale=(0.85, 1.18), shear=8,
                            interpolation=v2.InterpolationMode.BILINEAR),
            v2.ColorJitter(brightness=0.3, contrast=0.3),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), int(self.targets[index])


def loaders(images: Tensor, targets: Tensor, batch_size: int, device: Any) -> dict[str, Any]:
    workers = max(1, core_count() - 1)
    options = {"num_workers": workers, "pin_memory": device.type == "cuda",
               "persistent_workers": True}  # fmt: skip
    first = augment_bytes(images[:batch_size], torch.Generator()).to(device)
    resident = BatchLoader(images, targets, batch_size, shuffle=True, transform=augment_bytes,
                           drop_last=True)  # fmt: skip
    whole: Any = DataLoader(Batches(images, targets, batch_size), batch_size=None, **options)
    single: Any = DataLoader(
        Images(images, targets), batch_size, shuffle=True, drop_last=True, **options
    )
    return {
        "synthetic": [(first, targets[:batch_size].to(device))],
        "BatchLoader on the GPU": resident.resident(device),
        "DataLoader, whole batches": whole,
        "DataLoader, torchvision": single,
    }


def measure(model: Any, ways: dict[str, Any], batch_size: int, compile: bool) -> Timings:
    config = tl.TrainConfig(lr=1e-4, num_epochs=1, progress=False, compile=compile)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(ROUNDS + 1):
        for way, loader in ways.items():
            clocked = Clocked(loader, STEPS, WARM_UP)
            tl.fit(model, clocked, None, config)
            if turn:
                seconds[way].append(clocked.seconds)
        print(f"round {turn} of {ROUNDS}", flush=True)
    return Timings(seconds, seconds, {"batch_size": batch_size, "workers": core_count() - 1})


def tables(path: Path) -> str:
    """The table of a result, as it stands in benchmarks/README.md."""
    [case] = load_timings(path).values()
    lines = ["| input | images a second | rate / synthetic |", "|---|---|---|"]
    for way in case.wall:
        rate, share = (
            case.facts["batch_size"] / case.seconds(way).mean,
            case.ratio("synthetic", way),
        )
        lines.append(
            f"| {way} | {rate:,.0f} | {share.mean:.3f} [{share.low:.3f}, {share.high:.3f}] |"
        )
    return "\n".join(lines)


def plot(path: Path, target: Path) -> None:
    [case] = load_timings(path).values()
    rates: Callable[[str], Any] = lambda way: median_interval(  # noqa: E731
        [case.facts["batch_size"] / s for s in case.wall[way]]
    )
    ax = plot_intervals({way: rates(way) for way in case.wall}, xlabel="images a second")
    target.parent.mkdir(parents=True, exist_ok=True)
    ax.figure.savefig(target, dpi=120, bbox_inches="tight")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=data_dir() / "results" / "gpu_input.json")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, to see that it runs")
    options = parser.parse_args(arguments)
    if not (options.tiny or torch.cuda.is_available()):
        print("gpu_input: nothing measured, no CUDA GPU here")
        return
    device = torch.device("cpu" if options.tiny else "cuda")
    count, size, batch_size = (16, 32, 4) if options.tiny else (4096, 224, 256)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, size, size), generator=generator).to(torch.uint8)
    targets = torch.randint(NUM_CLASSES, (count,), generator=generator)
    name = "resnet18" if options.tiny else "resnet50"
    model = tl.Classifier(tl.load_backbone(name, pretrained=False), NUM_CLASSES).to(device)
    ways = loaders(images, targets, batch_size, device)
    case = measure(model, ways, batch_size, compile=not options.tiny)
    save_timings(options.out, {"ResNet-50": case}, "python benchmarks/gpu_input.py", steps=STEPS)
    print(tables(options.out), flush=True)
    plot(options.out, (repo_root() or Path()) / "benchmarks" / "plots" / "gpu_input.png")


if __name__ == "__main__":
    main()
