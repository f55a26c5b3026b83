"""The measurements of the engine run at a tiny size, and the README shows what is recorded."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tlcourse.timing import Timings, load_timings

ROOT = Path(__file__).resolve().parents[1]
RECORDED = (
    "loop_overhead", "feature_cache", "many_seeds", "text_batches", "lora_step", "gpu_vision",
    "gpu_text", "gpu_input", "auto_compile", "preflight_memory",
)  # fmt: skip


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    """Imports a script of ``benchmarks`` by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)
    for name in RECORDED:
        sys.modules.pop(name, None)


@pytest.fixture
def loops(benchmark) -> ModuleType:
    return benchmark("loop_overhead")


def test_loop_overhead_runs(loops: ModuleType, tmp_path: Path, capsys) -> None:
    out, plot = tmp_path / "result.json", tmp_path / "plot.png"
    tiny = ["--cases", "MLP", "--ways", loops.FIT, loops.HAND, "--steps", "5"]
    loops.main([*tiny, "--out", str(out), "--plot", str(plot)])
    cases = load_timings(out)
    assert list(cases) == ["MLP", loops.SLOPE] and plot.stat().st_size > 1000
    assert cases["MLP"].facts["largest_difference"] <= loops.TOLERANCE
    assert loops.tables(out) in capsys.readouterr().out
    assert json.loads(out.read_text())["settings"]["threads"] == 1


@pytest.mark.parametrize("name", ["MLP", "CNN"])
def test_installed_ways_agree_on_the_last_loss(loops: ModuleType, name: str) -> None:
    case = loops.make_case(name, 4)
    with loops.silence():
        losses = {way: loops.WAYS[way].train(case) for way in loops.available(loops.WAYS)}
    assert max(losses.values()) - min(losses.values()) <= loops.TOLERANCE, losses
    other = loops.make_case(name, 5)  # another schedule, another last batch
    assert abs(loops.by_hand(other, fused=True) - losses[loops.HAND]) > 1e-4


def test_ways_that_differ_are_refused(loops: ModuleType, monkeypatch) -> None:
    wrong = loops.Way(lambda case: loops.by_hand(case, fused=True) + 1e-4)
    monkeypatch.setitem(loops.WAYS, loops.PLAIN, wrong)
    with pytest.raises(ValueError, match="last losses differ"):
        loops.measure(loops.make_case("MLP", 2), [loops.HAND, loops.PLAIN], 7)


def test_what_one_way_sets_does_not_slow_the_others(loops: ModuleType, monkeypatch) -> None:
    seen = []

    def sets(case) -> float:
        os.environ[loops.NVML_CHECK] = "1"
        return 0.0

    def sees(case) -> float:
        seen.append(os.environ.get(loops.NVML_CHECK))
        return 0.0

    monkeypatch.setitem(loops.WAYS, "sets", loops.Way(sets))
    monkeypatch.setitem(loops.WAYS, "sees", loops.Way(sees))
    loops.measure(loops.make_case("MLP", 2), ["sets", "sees"], 7)
    assert len(seen) == 8 and not any(seen)  # the warm-up too


def test_a_peer_that_is_not_installed_is_left_out(loops: ModuleType, monkeypatch, capsys) -> None:
    monkeypatch.setitem(loops.WAYS, "other", loops.Way(lambda case: 0.0, "surely_not_installed"))
    assert loops.available([loops.HAND, "other"]) == [loops.HAND]
    assert capsys.readouterr().out == "surely_not_installed is not installed: left out\n"


def test_slope_is_the_cost_of_a_step_without_that_of_a_start(loops: ModuleType) -> None:
    def run(steps: int) -> Timings:  # 0.5 s to start, 2 ms a step
        times = {"a": [0.5 + 2e-3 * steps] * 7}
        return Timings(times, times, {"num_steps": steps})

    found = loops.slope(run(1000), run(200))
    assert found.facts["num_steps"] == 800
    assert found.seconds("a").mean / 800 == pytest.approx(2e-3)
    assert found.facts["start_cpu_ms"]["a"] == pytest.approx(500)


@pytest.mark.parametrize("case", ["GlyphNet, batches of 128"])
def test_feature_cache_runs(benchmark, tmp_path: Path, capsys, case: str) -> None:
    module = benchmark("feature_cache")
    out, plot = tmp_path / "result.json", tmp_path / "plot.png"
    tiny = ["--cases", case, "--epochs", "2", "--labels", "3"]
    module.main([*tiny, "--out", str(out), "--plot", str(plot)])
    facts = load_timings(out)[case].facts
    assert facts["accuracy"][module.ANEW] == facts["accuracy"][module.ONCE]
    assert facts["largest_weight_difference"] < 1e-5 and plot.stat().st_size > 1000
    assert module.tables(out) in capsys.readouterr().out


def test_kept_features_of_texts_come_in_the_batches_of_the_texts(benchmark) -> None:
    """Also behind length bucketing: the targets of every batch, and its features, are the same."""
    case = benchmark("feature_cache").minilm(epochs=2, labels=5)
    features, targets = case.extract()
    texts, kept = case.loader(), case.cached_loader(features, targets)
    with torch.no_grad():
        for _ in range(2):
            for (inputs, labels), (vectors, same) in zip(texts, kept, strict=True):
                assert torch.equal(labels, same)
                torch.testing.assert_close(
                    case.model.backbone(**inputs), vectors, atol=1e-5, rtol=1e-4
                )


@pytest.mark.parametrize("name", RECORDED)
def test_readme_shows_the_recorded_tables(benchmark, name: str) -> None:
    results = ROOT / "data" / "results"
    recorded = [p for p in (results / f"{name}.json", results / f"{name}_gpu.json") if p.is_file()]
    if not recorded:
        pytest.skip(f"{name} is not recorded")
    for path in recorded:
        shown = benchmark(name).tables(path).strip()
        assert shown in (ROOT / "benchmarks" / "README.md").read_text("utf-8"), (
            f"benchmarks/README.md lacks the tables of data/results/{path.name}:\n\n{shown}"
        )
