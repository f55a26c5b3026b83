"""Lesson 14: the reference answers against torch, transformers, peft and the library."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from judging import assert_hints_name, assert_reference_is

from tlcourse.freezing import count_parameters
from tlcourse.language_models import pool_tokens
from tlcourse.locations import data_dir
from tlcourse.prompts import PrefixTuning, PromptTuning
from tlcourse.questions import load_questions

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "lessons" / "14_prompts_and_prefixes"
QUESTIONS = {question.id: question for question in load_questions(FOLDER / "questions.py")}
SEEDS = (0, 1, b"a class secret")


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.tensor(array) for array in arrays]


def by_torch(q, K, V, mask, prefix_K, prefix_V):
    """One call of torch's own attention; the gate from values that mark the prefix."""
    q, K, V, prefix_K, prefix_V = tensors(q, K, V, prefix_K, prefix_V)
    seen = torch.cat([torch.ones(len(prefix_K)), torch.tensor(mask)]).bool()[None]
    keys, values = torch.cat([prefix_K, K]), torch.cat([prefix_V, V])
    marks = torch.cat([torch.ones_like(prefix_V), torch.zeros_like(V)])
    output, gate = (
        F.scaled_dot_product_attention(q[None], keys[None], x[None], attn_mask=seen[None])[0]
        for x in (values, marks)
    )
    return {"gate": gate[:, 0].numpy(), "output": output.numpy()}


def gradients_by_autograd(q, K, V, prefix_K, prefix_V, G):
    q, K, V, prefix_K, prefix_V, G = tensors(q, K, V, prefix_K, prefix_V, G)
    prefix_K.requires_grad_(), prefix_V.requires_grad_()
    keys, values = torch.cat([prefix_K, K]), torch.cat([prefix_V, V])
    F.scaled_dot_product_attention(q[None], keys[None], values[None])[0].backward(G)
    return {"keys": prefix_K.grad.numpy(), "values": prefix_V.grad.numpy()}


def pooled_by_the_library(hidden, attention_mask):
    hidden, mask = tensors(hidden, attention_mask)
    return pool_tokens(hidden[:, -mask.shape[1] :], mask).numpy()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_gate_is_that_of_torchs_attention(seed: int | bytes) -> None:
    assert_reference_is(by_torch, QUESTIONS["14.q1"], seed, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_equal_autograd(seed: int | bytes) -> None:
    assert_reference_is(gradients_by_autograd, QUESTIONS["14.q3"], seed, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_pooling_is_that_of_the_library(seed: int | bytes) -> None:
    assert_reference_is(pooled_by_the_library, QUESTIONS["14.q4"], seed, rtol=1e-9, atol=1e-12)


def test_weights_without_prefix_are_those_of_the_first_layer() -> None:
    """On a real encoder: with a prefix, undone, against no prefix."""
    torch.manual_seed(0)
    body = bert(layers=1, width=16, heads=2)
    body.set_attn_implementation("eager")
    wrapped = PrefixTuning(body, 3, std=2.0, shift_positions=False)
    ids = torch.randint(3, 40, (1, 6))
    with torch.no_grad():
        plain = body(ids, output_attentions=True).attentions[0][0]
        prefixed = wrapped(ids, output_attentions=True).attentions[0][0]
    for head in range(2):
        found = QUESTIONS["14.q2"].expect((prefixed[head].double().numpy(), 3))
        assert not np.allclose(prefixed[head][:, 3:], plain[head], atol=1e-3)
        np.testing.assert_allclose(found, plain[head], atol=1e-6)


def bert(layers: int, width: int, heads: int) -> transformers.BertModel:
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    config = transformers.BertConfig(
        vocab_size=40, intermediate_size=8, max_position_embeddings=64, **shape
    )
    return transformers.BertModel(config).eval()


def llama(layers: int, width: int, heads: int, kv_heads: int) -> transformers.LlamaModel:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=8, head_dim=width // heads,
    )  # fmt: skip
    return transformers.LlamaModel(config).eval()


def test_the_account_equals_counted_parameters() -> None:
    question = QUESTIONS["14.q5"]
    for case in question.draw_cases(0):
        method, num, layers, width, kv_heads, head_size, hidden, positions = case
        width -= width % (2 * kv_heads)  # even heads, for rotary positions
        heads = max(kv_heads, 2 * kv_heads) if method != "prompt" else kv_heads
        head_size = 2 * (width // heads // 2)
        width = head_size * heads
        case = (method, num, layers, width, kv_heads, head_size, hidden, positions)
        body = llama(layers, width, heads, kv_heads)
        options = {"hidden": hidden} if method == "mlp" else {}
        model = (PromptTuning if method == "prompt" else PrefixTuning)(body, num, **options)
        expected = question.expect(case)
        assert count_parameters(model).trainable == expected["trained"]
        if method == "mlp":
            model.drop_reparametrisation()
        assert count_parameters(model).trainable == expected["saved"]
        assert model.prompt_embeddings().numel() == expected["saved"]


def test_peft_gives_back_the_virtual_tokens() -> None:
    """What question 4 and the lesson rest on."""
    body, ids = bert(layers=1, width=16, heads=2), torch.randint(3, 40, (2, 5))
    mask = torch.ones_like(ids)
    for kind, extra in ((peft.PromptTuningConfig, 4), (peft.PrefixTuningConfig, 0)):
        config = kind(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4)
        model = peft.get_peft_model(bert(layers=1, width=16, heads=2), config)
        assert model(input_ids=ids, attention_mask=mask).last_hidden_state.shape[1] == 5 + extra
    assert PromptTuning(body, 4)(ids, mask).last_hidden_state.shape[1] == 5


HINTS = {
    "14.q1": {
        "no root": "root", "no mask": "padding", "keys of padding set to zero": "zeros|padding",
        "two softmaxes": "one softmax", "share of the words": "share of the words",
        "no values of the prefix": "values of the prefix",
    },
    "14.q2": {"cut only": "sum to 1", "softmax again": "second softmax", "spread evenly": "ratio"},
    "14.q3": {
        "no root": "sqrt(d)", "others do not shrink": "shrink", "no weight": "weight",
        "softmax over the prefix": "together", "mean over queries": "no mean",
    },
    "14.q4": {
        "everything": "virtual tokens and padding", "virtual tokens too": "cut",
        "cut at the end": "first", "padding too": "mask", "first vector": "first virtual token",
    },
    "14.q5": {
        "as wide as the model": "kv_heads", "keys only": "twice", "MLP kept": "thrown away",
        "all positions": "position", "no biases": "biases",
    },
}  # fmt: skip


@pytest.mark.parametrize("question_id", HINTS)
def test_hints_name_the_mistake(question_id: str) -> None:
    assert_hints_name(QUESTIONS[question_id], HINTS[question_id])


# --- what the lesson derives ---------------------------------------------------------------


def test_no_prefix_beats_the_floor_of_one_head() -> None:
    """Least squares over gate and bias, on many texts, against the formula."""
    rng = np.random.default_rng(0)
    w, w_0 = (np.exp(score) / (np.exp(4.0) + 5) for score in (4.0, 0.0))
    contents = rng.normal(size=(200_000, 6))
    output = contents @ np.array([w, w_0, w_0, w_0, w_0, w_0])
    design = np.stack([output, np.ones_like(output)], axis=1)
    target = contents[:, 1]
    best = np.linalg.lstsq(design, target, rcond=None)[0]
    left = np.mean((design @ best - target) ** 2)
    assert left == pytest.approx(1 - w_0**2 / (w**2 + 5 * w_0**2), abs=0.01)


@pytest.mark.parametrize("std", [0.056, 1.0])
def test_a_step_moves_a_normalised_vector_by_rate_over_deviation(std: float) -> None:
    z = std * torch.randn(50, 384, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = 1e-4 * torch.randn_like(z).sign()
    before, after = (F.layer_norm(x, (384,), eps=0.0) for x in (z, z + step))
    change = (after - before).square().mean().sqrt().item()
    assert change == pytest.approx(1e-4 / std, rel=0.03)
    delta = step - step.mean(dim=1, keepdim=True)
    along = before * (before * step).sum(dim=1, keepdim=True) / 384
    exact = (delta - along) / z.std(dim=1, keepdim=True, correction=0)
    torch.testing.assert_close(after - before, exact, rtol=1e-2, atol=1e-5 / std)


# --- the benchmark -------------------------------------------------------------------------


def benchmark():
    path = ROOT / "benchmarks" / "prompt_sensitivity.py"
    spec = importlib.util.spec_from_file_location("prompt_sensitivity", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_what_is_recorded_is_what_the_benchmark_does() -> None:
    path = data_dir() / "results" / "prompt_sensitivity.json"
    content, module = json.loads(path.read_text("utf-8")), benchmark()
    arms = {*module.RATES, *module.STARTS, *module.LONGER}
    assert set(content["scores"]) == arms | {module.NAMES, module.HEAD}
    assert all(len(scores) == module.DRAWS for scores in content["scores"].values())
    assert content["settings"]["steps"] == module.STEPS
    for arm, rates in module.RATES.items():
        cells = content["cells"][arm]
        assert {float(rate) for rate in cells} == set(rates)
        loss = {float(rate): sum(cell["val_loss"]) for rate, cell in cells.items()}
        assert loss[content["lr"][arm]] == min(loss.values())
    for arm in (*module.STARTS, *module.LONGER):
        like = module.LONGER.get(arm, module.BASE)
        assert content["lr"][arm] == content["lr"][like]


def test_what_is_there_is_not_done_again() -> None:
    module, done = benchmark(), []
    cells = {"a": {"0.1": {"loss": [1, 2]}}}
    runs = [module.Run("a", draw, lr) for draw in (0, 1) for lr in (0.1, 1.0)]

    def run_all(missing):
        done.extend(missing)
        return [{"loss": run.draw} for run in missing]

    module.collect(cells, runs, run_all)
    assert [run.lr for run in done] == [1.0, 1.0]
    assert cells == {"a": {"0.1": {"loss": [1, 2]}, "1": {"loss": [0, 1]}}}


def test_logits_are_similarities_with_names() -> None:
    module = benchmark()
    torch.manual_seed(0)
    body = bert(layers=1, width=16, heads=2)
    names = F.normalize(torch.randn(3, 16), dim=1)
    ids, mask = torch.randint(3, 40, (2, 5)), torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    with torch.no_grad():
        features = pool_tokens(body(ids, mask).last_hidden_state, mask)
        expected = 20 * F.cosine_similarity(features[:, None], names[None], dim=2)
        torch.testing.assert_close(module.NearestName(body, names)(ids, mask), expected)
        wrapped = module.NearestName(PrefixTuning(body, 8, std=0.0, shift_positions=False), names)
        share = module.attention_share(wrapped, {"input_ids": ids, "attention_mask": mask})
    assert 0.3 < share < 0.9  # eight zeros beside three or five words
