"""Lesson 15: the reference answers against torch and transformers, and what was recorded."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from judging import assert_hints_name, assert_reference_is
from transformers import AutoTokenizer
from transformers.generation import logits_process

from tlcourse.language_models import load_generator, load_tokeniser
from tlcourse.locations import data_dir
from tlcourse.questions import load_questions

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "lessons" / "15_generation"
QUESTIONS = {question.id: question for question in load_questions(FOLDER / "questions.py")}
SEEDS = (0, 1, b"a class secret")


def report_by_torch(log_p, real, num_bytes):
    """One long text, through cross-entropy with two classes of that probability."""
    p = torch.tensor(log_p[real]).exp()
    logits = torch.stack([p, 1 - p], dim=1).log()
    loss = F.cross_entropy(logits, torch.zeros(len(p), dtype=torch.long), reduction="none")
    bits = (loss / torch.tensor(2.0).log()).sum().item()
    return {"perplexity": loss.mean().exp().item(), "bits_per_byte": bits / num_bytes}


def attention_by_torch(q, k, v):
    """All tokens at once with torch's own causal mask; what is not asked for is thrown away."""
    q, k, v = (torch.tensor(x)[None] for x in (q, k, v))
    early = torch.zeros(1, k.shape[1] - q.shape[1], q.shape[2], dtype=q.dtype)
    every = torch.cat([early, q], dim=1)
    return F.scaled_dot_product_attention(every, k, v, is_causal=True)[0, early.shape[1] :]


def probabilities_by_transformers(logits, temperature, k, p):
    scores = torch.tensor(logits)[None]
    for warper in (
        logits_process.TemperatureLogitsWarper(temperature),
        logits_process.TopKLogitsWarper(k),
        logits_process.TopPLogitsWarper(p),
    ):
        scores = warper(None, scores)
    return scores.softmax(dim=1)[0]


def loss_by_autograd(logits, targets):
    z = torch.tensor(logits, requires_grad=True)
    loss = F.cross_entropy(z, torch.tensor(targets))
    loss.backward()
    return {"loss": loss.item(), "gradient": z.grad.numpy()}


TRUTHS = {
    "15.q1": report_by_torch,
    "15.q2": attention_by_torch,
    "15.q3": probabilities_by_transformers,
    "15.q4": loss_by_autograd,
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("question_id", TRUTHS)
def test_reference_equals_torch_or_transformers(question_id: str, seed: int | bytes) -> None:
    assert_reference_is(TRUTHS[question_id], QUESTIONS[question_id], seed, rtol=1e-7, atol=1e-9)


HINTS = {
    "15.q1": {
        "filling counts": "filling", "mean of means": "every token", "nats per byte": "ln 2",
        "mean of perplexities": "geometric", "bits per token": "bits per token", "sign": "sign",
        "the loss itself": "exp", "two to the nats": "powers of two",
    },
    "15.q2": {
        "mask from the first token": "last n tokens", "no mask": "future", "no scale": "root of d",
        "divided by d": "not by d", "one ahead": "one token too many", "not itself": "itself",
        "zeroed after the softmax": "before the softmax", "scores zeroed": "infinity",
    },
    "15.q3": {
        "times temperature": "divide", "temperature last": "first the temperature",
        "no temperature": "missing", "no top-k": "top-k is missing", "not renormalised": "sum to 1",
        "in order of size": "order of the logits",
    },
    "15.q4": {
        "mean over all": "that count", "sum": "mean", "gradient of the sum": "count",
        "ignored as token 0": "not token 0", "ignored still pushes": "no gradient",
        "sign": "sign", "no one-hot": "one-hot", "moved again": "again",
    },
}  # fmt: skip


@pytest.mark.parametrize("question_id", HINTS)
def test_hints_name_the_mistake(question_id: str) -> None:
    assert_hints_name(QUESTIONS[question_id], HINTS[question_id])


def test_later_mistakes_in_sampling_have_hints_of_their_own() -> None:
    """They agree with the right answer on the first cases."""
    question = QUESTIONS["15.q3"]
    for name, word in {"too few": "reaches p", "no top-p": "top-p is missing"}.items():
        said = set()
        for case in question.draw_cases(0):
            expected, got = question.expect(case), question.run(question.wrong[name], case)
            if not np.allclose(expected, got):
                said.add(question.hint(case, expected, got))
        assert any(word in hint for hint in said), (name, said)


# --- the lesson and its benchmark -------------------------------------------------------------


def benchmark():
    path = ROOT / "benchmarks" / "adapting_a_generator.py"
    spec = importlib.util.spec_from_file_location("adapting_a_generator", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def definitions(path: Path) -> dict[str, str]:
    """Functions of a file without annotations and docstrings, as text."""
    found = {}
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            for argument in node.args.args:
                argument.annotation = None
            if ast.get_docstring(node):
                node.body = node.body[1:]
            found[node.name] = ast.unparse(node)
    return found


def test_half_of_a_lora_is_its_update_times_a_half() -> None:
    """``part_of_the_way`` scales B; compare with the line between the two merged models."""
    from tlcourse.lora import LoRALinear, merge_lora
    from tlcourse.weight_space import interpolate

    module = benchmark()
    run = module.Run(module.LORA, 0, 1e-2)
    adapted, start = module.build(run), load_generator("docgpt")
    for layer in adapted.modules():
        if isinstance(layer, LoRALinear):
            torch.nn.init.normal_(layer.lora_B, std=0.02)
    seen = {}
    module.SHARES = (0.5,)
    module.losses = lambda model, split: seen.update(logits=model(IDS).logits.detach()) or {}
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    module.part_of_the_way(module.LORA, adapted, before, "val")
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    end = merge_lora(adapted).state_dict()
    middle = load_generator("docgpt")
    middle.load_state_dict(interpolate(start.state_dict(), end, 0.5))
    with torch.no_grad():
        torch.testing.assert_close(seen["logits"], middle(IDS).logits, rtol=1e-3, atol=1e-3)


IDS = torch.arange(1, 30)[None]


def test_what_is_recorded_is_what_the_benchmark_does() -> None:
    path = data_dir() / "results" / "adapting_a_generator.json"
    content, module = json.loads(path.read_text("utf-8")), benchmark()
    assert list(content["runs"]) == list(module.ARMS)
    assert all(len(runs) == module.DRAWS for runs in content["runs"].values())
    assert content["settings"]["steps"] == module.STEPS
    for arm, rates in module.RATES.items():
        tried = {float(rate): found["code"] for rate, found in content["tuning"][arm].items()}
        assert list(tried) == list(rates)
        assert tried[content["lr"][arm]] == min(tried.values())
    assert content["lr"][module.REPLAY] == content["lr"][module.FULL]


def test_replay_exchanges_blocks_and_keeps_the_size_of_a_batch() -> None:
    module = benchmark()
    new, old = torch.zeros(24, 5, dtype=torch.long), torch.ones(8, 5, dtype=torch.long)
    batches = list(module.WithReplay(new, old, 0))
    assert len(batches) == 4
    for x, y in batches:
        assert x.shape == (module.BATCH_SIZE, 4) and y.shape == (module.BATCH_SIZE * 4,)
        assert x.sum() == module.REPLAYED * 4


def test_a_gpt2_from_a_folder_goes_through_the_lesson_s_load(tmp_path: Path) -> None:
    """The path of the profile "full", without a hub."""
    model, tokenizer = (
        load_generator("docgpt", pretrained=False),
        load_tokeniser("docgpt").tokenizer,
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    place = {"load_generator": load_generator, "load_tokeniser": load_tokeniser}
    place["AutoTokenizer"] = AutoTokenizer
    exec(definitions(FOLDER / "lesson.py")["load"], place)
    loaded, read = place["load"](f"hf:{tmp_path}")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    text = "def f(x):\n    return x"
    assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
    with pytest.raises(ConnectionError, match="docgpt"):
        place["load"](f"hf:{tmp_path}/nothing")
