"""Lesson 17: the reference answers against models that exist, autograd and scipy; the benchmark."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import peft
import pytest
import torch
from judging import assert_hints_name, assert_reference_is
from scipy.stats import ttest_rel
from torch import nn
from transformers import BertConfig, BertModel

import tlcourse as tl
from tlcourse.adapters import (
    BottleneckConfig,
    IA3Config,
    add_bottlenecks,
    add_ia3,
    train_biases,
    train_last_layers,
)
from tlcourse.backbones import Backbone, Preprocess
from tlcourse.locations import data_dir
from tlcourse.prompts import PrefixTuning, PromptTuning
from tlcourse.questions import load_questions

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "lessons" / "17_bake_off"
QUESTIONS = {question.id: question for question in load_questions(FOLDER / "questions.py")}
SEEDS = (0, 1, b"a class secret")


def classifier(layers: int, d: int, f: int, classes: int) -> nn.Module:
    shape = {"num_hidden_layers": layers, "hidden_size": d, "intermediate_size": f}
    config = BertConfig(**shape, vocab_size=30, num_attention_heads=2, max_position_embeddings=40)
    body = BertModel(config, add_pooling_layer=False)
    return tl.Classifier(Backbone(body, "bert", d, Preprocess(32)), classes)


def counted(method: str, layers: int, d: int, f: int, classes: int, size: int) -> int:
    """Trainable numbers of a real model."""
    model = classifier(layers, d, f, classes)
    beside = {"target_modules": ["query", "value"], "modules_to_save": ["head"], "r": size}
    if method == "head":
        train_last_layers(model, 0)
    elif method == "BitFit":
        train_biases(model)
    elif method == "(IA)3":
        inner = tuple(f"layer.{n}.output.dense" for n in range(layers))
        names = ("key", "value", *inner)
        add_ia3(model, IA3Config(target_modules=names, feedforward_modules=inner))
    elif method == "bottleneck":
        add_bottlenecks(model, BottleneckConfig(bottleneck_dim=size, train_norms=False))
    elif method in ("LoRA", "DoRA"):
        model = peft.get_peft_model(model, peft.LoraConfig(**beside, use_dora=method == "DoRA"))
    else:
        kind = PromptTuning if method == "prompt" else PrefixTuning
        model.backbone.body = kind(model.backbone.body, size)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def dora_by_autograd(X, W, A, B, m, s, D, constant_length):
    numbers = {"W": W, "A": A, "B": B, "m": m}
    t = {k: torch.tensor(v, requires_grad=k in "Bm") for k, v in numbers.items()}
    V = t["W"] + s * t["B"] @ t["A"]
    length = V.norm(dim=1, keepdim=True)
    rows = t["m"][:, None] * V / (length.detach() if constant_length else length)
    H = torch.tensor(X) @ rows.T
    H.backward(torch.tensor(D))
    return {"H": H.detach().numpy(), "m": t["m"].grad.numpy(), "B": t["B"].grad.numpy()}


def step_by_step(p):
    """Holm's procedure itself: the smallest level at which each one is rejected."""

    def rejected(level: float) -> set[int]:
        found: set[int] = set()
        for place, index in enumerate(np.argsort(p)):
            if p[index] * (len(p) - place) > level:
                break
            found.add(int(index))
        return found

    adjusted = np.ones(len(p))
    for index in range(len(p)):
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if index in rejected(middle) else (middle, high)
        adjusted[index] = high
    return adjusted


def verdicts_by_scipy(scores, reference, level):
    others = [row for row in range(len(scores)) if row != reference]
    tests = [ttest_rel(scores[row], scores[reference]) for row in others]
    adjusted = step_by_step(np.array([test.pvalue for test in tests]))
    gaps = np.array([scores[row].mean() - scores[reference].mean() for row in others])
    return gaps, adjusted, ["tie" if p >= level else "?" for p in adjusted]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_counts_are_those_of_real_models(seed: int | bytes) -> None:
    assert_reference_is(counted, QUESTIONS["17.q1"], seed, rtol=0, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_dora_equals_autograd(seed: int | bytes) -> None:
    assert_reference_is(dora_by_autograd, QUESTIONS["17.q2"], seed, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_holm_equals_the_procedure(seed: int | bytes) -> None:
    assert_reference_is(step_by_step, QUESTIONS["17.q3"], seed, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_verdicts_equal_scipy(seed: int | bytes) -> None:
    question = QUESTIONS["17.q4"]
    for case in question.draw_cases(seed):
        gaps, adjusted, words = verdicts_by_scipy(*case)
        found = question.expect(case)
        np.testing.assert_allclose(found["difference"], gaps, rtol=1e-9)
        np.testing.assert_allclose(found["p"], adjusted, rtol=1e-6, atol=1e-9)
        for word, expected, gap in zip(found["words"], words, gaps, strict=True):
            assert word == (expected if expected == "tie" else "better" if gap > 0 else "worse")


HINTS = {
    "17.q1": {
        "no head": "head", "BitFit with scales": "shift", "(IA)3 scales outputs": "inputs",
        "LoRA with one factor": "B", "DoRA with one length": "each output",
        "prefix of keys": "value",
    },
    "17.q2": {
        "one norm for the matrix": "row", "length of W": "V", "dm not normalised": "divided",
        "the other way round": "constant_length", "dB without scale": "scale",
    },
    "17.q3": {
        "Bonferroni": "Bonferroni", "no running maximum": "running maximum",
        "sorted": "order", "Hochberg": "Hochberg", "wrong way round": "smallest",
    },
    "17.q4": {
        "not corrected": "Holm", "unpaired": "paired", "divides by n": "ddof", "normal": "Student",
        "reference minus method": "minus", "no ties": "tie", "one-sided": "two-sided",
    },
}  # fmt: skip


@pytest.mark.parametrize("question_id", HINTS)
def test_hints_name_the_mistake(question_id: str) -> None:
    assert_hints_name(QUESTIONS[question_id], HINTS[question_id])


# --- the benchmark -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bake_off", ROOT / "benchmarks" / "bake_off.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads((data_dir() / "results" / "bake_off.json").read_text("utf-8"))


@pytest.mark.parametrize("name", ["text", "vision"])
def test_what_is_recorded_is_what_the_benchmark_does(name: str, benchmark, recorded) -> None:
    found, setting = recorded["tasks"][name], benchmark.SETTINGS[name]
    methods = list(setting.rates)
    places = [place for part in benchmark.PARTS for place in found["where"][part]]
    assert all(word in place for word in (" cores, ", "torch 2", "peft 0") for place in places)
    assert len(found["where"]["accuracy"]) == len(found["where"]["time"]) == 1, "side by side"
    for part in ("scores", "trainable", "bytes", "saved", "step_seconds"):
        assert list(found[part]) == methods
    assert all(len(scores) == benchmark.DRAWS >= 5 for scores in found["scores"].values())
    assert found["settings"]["steps"] == setting.steps
    for method, rates in setting.rates.items():
        tuning = found["tuning"].get(method, {})
        assert all(len(scores) == len(benchmark.TUNING_DRAWS) for scores in tuning.values())
        tried = {float(rate): np.mean(scores) for rate, scores in tuning.items()}
        assert set(tried) == set(rates)
        if rates:
            assert tried[found["lr"][method]] == max(tried.values())


def test_each_training_did_something(recorded) -> None:
    """No method repeats the scores of the head that all began with."""
    for found in recorded["tasks"].values():
        start = found["scores"]["linear head"]
        for method, scores in found["scores"].items():
            assert method == "linear head" or scores != start, method


def test_bytes_recorded_are_counts_times_four(recorded) -> None:
    for found in recorded["tasks"].values():
        for method, kinds in found["bytes"].items():
            trained, total = found["trainable"][method], found["total"][method]
            assert kinds["weights"] == 4 * total
            assert kinds["gradients"] == 4 * trained
            assert kinds["state"] >= 8 * trained
            assert method == "AdaLoRA" or kinds["state"] == 8 * trained


@pytest.mark.parametrize("method", ["linear head", "BitFit", "(IA)3", "LoRA", "DoRA", "AdaLoRA"])
def test_a_method_starts_as_the_backbone_and_trains_its_head(method: str, benchmark) -> None:
    task = tl.load_task("wild_digits", labels_per_class=2)
    setting = benchmark.SETTINGS["vision"]
    model = benchmark.build(task, setting, method, seed=0).eval()
    plain = benchmark.build(task, setting, benchmark.FULL, seed=0).eval()
    images = task.train.inputs[:4]
    with torch.no_grad():
        torch.testing.assert_close(model(images), plain(images), rtol=1e-5, atol=1e-5)
    assert all(p.requires_grad for p in benchmark.head_of(model).parameters())
    before = model(images).detach()
    benchmark.head_of(model).bias.data += 1
    torch.testing.assert_close(model(images), before + 1, rtol=1e-5, atol=1e-5)


def test_the_budget_of_adalora_is_shared_out_by_the_hook(benchmark) -> None:
    task = tl.load_task("wild_digits", labels_per_class=2)
    setting = replace(benchmark.SETTINGS["vision"], steps=12)
    model = benchmark.build(task, setting, benchmark.ADALORA, seed=0)
    config = tl.TrainConfig(
        lr=1e-2, num_steps=12, progress=False, penalty=benchmark.orthogonality, precision="fp32"
    )
    with benchmark.allocating(model, benchmark.ADALORA):
        tl.fit(model, task.loaders(10).train, None, config)
    values = [p for name, p in model.named_parameters() if "lora_E" in name]
    assert sum((p != 0).sum().item() for p in values) == benchmark.RANK * len(values)
    kept = sum(sum(kept) for kept in model.active_peft_config.rank_pattern.values())
    assert kept == benchmark.RANK * len(values)
    whole = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert benchmark.numbers_to_save(model) < whole
    before = [p.detach().clone() for p in values]  # outside, nobody shares out any more
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert all(torch.equal(a, b) for a, b in zip(before, values, strict=True))


def test_a_result_is_written_at_once_and_found_again(benchmark, tmp_path, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(benchmark, "perform", lambda run: calls.append(run) or {"x": len(calls)})
    monkeypatch.setattr(benchmark, "where", lambda: "here")
    found = [{"x": n, "where": "here"} for n in (1, 2, 3)]
    runs = [benchmark.Run("time", "vision", "all", n) for n in range(3)]
    path = tmp_path / "log.jsonl"
    assert benchmark.Notebook(path).all_of(runs[:2], 1) == found[:2]
    with path.open("a") as file:
        file.write('["time|vision|all|2|0|')  # stopped in the middle of a line
    again = benchmark.Notebook(path).all_of(runs, 1)
    assert again == found and len(calls) == 3
    assert benchmark.Notebook(path).all_of(runs, 1) == again and len(calls) == 3


def test_equally_good_rates_give_the_middle_one(benchmark) -> None:
    assert benchmark.choose({"0.001": 0.7, "0.003": 0.7, "0.01": 0.6}) == 0.003
    assert benchmark.choose({"0.001": 0.7, "0.003": 0.6, "0.01": 0.7}) == 0.001
    assert benchmark.choose({"0.001": 0.5, "0.003": 0.6, "0.01": 0.7}) == 0.01


def test_the_rate_is_chosen_by_the_mean_over_the_tuning_draws(benchmark, tmp_path) -> None:
    notebook = benchmark.Notebook(tmp_path / "log.jsonl")
    for run in benchmark.trials_of("vision"):
        luck = {1_000: 0.5, 1_001: -0.2, 1_002: -0.2}[run.draw]  # one draw flatters the largest
        rates = sorted(benchmark.SETTINGS["vision"].rates[run.method])
        score = 0.5 + 0.2 * (run.lr == rates[1]) + luck * (run.lr == rates[2])
        notebook.found[benchmark.key_of(run)] = {"accuracy": score}
    chosen = benchmark.choose_all(benchmark.tune("vision", notebook))
    for method, lr in chosen.items():
        assert lr == sorted(benchmark.SETTINGS["vision"].rates[method])[1], method


def test_the_tables_in_the_readme_are_those_of_the_result(benchmark, recorded) -> None:
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert all(benchmark.markdown(found) in readme for found in recorded["tasks"].values())
