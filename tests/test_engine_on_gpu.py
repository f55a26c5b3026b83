"""What ``fit`` does on a CUDA GPU alone: compiling, data there, going on, running out of memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import tlcourse as tl
from tlcourse.config import TrainConfig
from tlcourse.datasets import BatchLoader, augment_images

pytestmark = pytest.mark.gpu

INPUTS = torch.randn(96, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
TARGETS = torch.randint(4, (96,), generator=torch.Generator().manual_seed(1))


def network() -> nn.Module:
    backbone = tl.load_backbone("glyphnet", pretrained=False)
    torch.manual_seed(0)
    return tl.Classifier(backbone, 4).cuda()


def loader(transform=augment_images, batch_size: int = 32) -> BatchLoader:
    return BatchLoader(INPUTS, TARGETS, batch_size, shuffle=True, transform=transform, seed=2)


def settings(**changes) -> TrainConfig:
    return TrainConfig(**({"num_steps": 12, "progress": False, "compile": False} | changes))


def test_resident_data_give_the_batches_of_the_cpu() -> None:
    there = loader().resident(torch.device("cuda"))
    for (images, targets), (expected, labels) in zip(there, loader(), strict=True):
        assert images.is_cuda and targets.is_cuda and torch.equal(targets.cpu(), labels)
        torch.testing.assert_close(images.cpu(), expected, rtol=1e-4, atol=1e-4)
    unknown = loader(lambda images, generator: images)
    assert unknown.resident(torch.device("cuda")) is unknown


@pytest.mark.slow
def test_a_compiled_run_agrees_with_an_eager_one() -> None:
    eager = tl.fit(network(), loader(), None, settings())
    compiled = tl.fit(network(), loader(), None, settings(compile=True))
    assert compiled.train_loss == pytest.approx(eager.train_loss, abs=1e-2)


def test_a_stopped_run_goes_on_to_tolerance(tmp_path: Path) -> None:
    class Stops(BatchLoader):
        left = 7

        def __iter__(self):
            for batch in super().__iter__():
                if self.left == 0:
                    raise ConnectionError
                self.left -= 1
                yield batch

    whole = tl.fit(network(), loader(), None, settings())
    kept = settings(checkpoint_dir=str(tmp_path), checkpoint_minutes=0)
    stopping = loader()
    stopping.__class__ = Stops
    with pytest.raises(ConnectionError):
        tl.fit(network(), stopping, None, kept)
    resumed = tl.fit(network(), loader(), None, kept, resume="auto")
    assert resumed.train_loss == pytest.approx(whole.train_loss, abs=1e-2)


def test_out_of_memory_halves_the_micro_batch(capsys) -> None:
    """The limit is torch's own, set so that 96 images at once do not fit and 24 do."""
    model, images = network(), loader(None, batch_size=96)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    expected = tl.fit(network(), images, None, settings(num_steps=3, precision="fp32"))
    peak, total = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.6 * peak / total)
    try:
        same = loader(None, batch_size=96)
        history = tl.fit(model, same, None, settings(num_steps=3, precision="fp32"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "Out of memory in step 1: the run goes on with at most " in capsys.readouterr().err
    assert history.train_loss == pytest.approx(expected.train_loss, rel=1e-3)


def test_labels_on_the_gpu_outside_the_range_are_named_and_change_nothing() -> None:
    model = network()
    before = [p.clone() for p in model.parameters()]
    batches = [(INPUTS[:32].cuda(), TARGETS[:32].cuda() + 2)] * 3
    with pytest.raises(ValueError, match=r"label [45] is outside the head's range"):
        tl.fit(model, batches, None, settings(num_steps=3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
