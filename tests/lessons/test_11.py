"""Lesson 11: the reference answers against truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judging import assert_hints_name, assert_reference_is
from tokenizers.models import WordPiece
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM

from tlcourse.language_models import load_tokeniser
from tlcourse.pretrain_text import MaskedBlocks
from tlcourse.questions import load_questions
from tlcourse.text import TokenLoader

FOLDER = Path(__file__).resolve().parents[2] / "lessons" / "11_language_models"
QUESTIONS = {question.id: question for question in load_questions(FOLDER / "questions.py")}
SEEDS = (0, 1, 2, b"a class secret")


def answer(question_id: str, *case: Any) -> Any:
    return QUESTIONS[question_id].expect(case)


def pieces_by_tokenizers(word: str, vocabulary: dict[str, int]) -> list[str]:
    model = WordPiece(vocab=vocabulary, unk_token="[UNK]")
    return [token.value for token in model.tokenize(word)]


def padding_by_counting(lengths: np.ndarray, batch_size: int) -> dict[str, float]:
    """Builds the batches and counts the zeros of their masks."""
    texts, shares = [[7] * int(length) for length in lengths], {}
    for name, bucketing in (("plain", False), ("bucketed", True)):
        loader = TokenLoader(texts, torch.zeros(len(texts)), batch_size, bucketing=bucketing)
        masks = torch.cat([batch["attention_mask"].flatten() for batch, _ in loader])
        shares[name] = (masks == 0).double().mean().item()
    return shares


def attention_by_torch(q: np.ndarray, k: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The values are the unit vectors, so the result is the weights."""
    values = torch.eye(len(q), dtype=torch.float64)
    seen = torch.from_numpy(mask == 1).expand(len(q), -1)
    return functional.scaled_dot_product_attention(
        torch.from_numpy(q), torch.from_numpy(k), values, attn_mask=seen
    ).numpy()


def hidden_by_loops(
    ids: np.ndarray,
    special_ids: list[int],
    mask_id: int,
    pick: np.ndarray,
    how: np.ndarray,
    other: np.ndarray,
) -> dict[str, np.ndarray]:
    shown, hidden = ids.copy(), np.zeros(ids.shape, dtype=bool)
    for b, t in np.ndindex(*ids.shape):
        if ids[b, t] in special_ids or pick[b, t] >= 0.15:
            continue
        hidden[b, t] = True
        if how[b, t] < 0.8:
            shown[b, t] = mask_id
        elif how[b, t] < 0.9:
            shown[b, t] = other[b, t]
    return {"shown": shown, "hidden": hidden}


def loss_by_torch(logits: np.ndarray, ids: np.ndarray, hidden: np.ndarray) -> dict[str, Any]:
    z = torch.tensor(logits, requires_grad=True)
    labels = torch.from_numpy(np.where(hidden, ids, -100))
    if not hidden.any():  # torch says nan, the question 0
        return {"loss": 0.0, "gradient": np.zeros_like(logits)}
    loss = functional.cross_entropy(z.flatten(0, 1), labels.flatten(), ignore_index=-100)
    loss.backward()
    assert z.grad is not None
    return {"loss": loss.item(), "gradient": z.grad.numpy()}


@pytest.mark.parametrize("seed", SEEDS)
def test_wordpiece_is_that_of_tokenizers(seed: int | bytes) -> None:
    for case in QUESTIONS["11.q1"].draw_cases(seed):
        assert answer("11.q1", *case) == pieces_by_tokenizers(*case)


@pytest.mark.parametrize("name", ["minilm", "docbert"])
def test_wordpiece_on_words_of_documentation(name: str) -> None:
    tokenizer = load_tokeniser(name).tokenizer
    vocabulary = tokenizer.get_vocab()
    words = "asyncio subprocess unhashable returns mutex thread monkeypatch tokenization 42 \u2603"
    for word in words.split():
        assert answer("11.q1", word, vocabulary) == tokenizer.tokenize(word)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("question_id", "truth"),
    [
        ("11.q2", padding_by_counting),
        ("11.q3", attention_by_torch),
        ("11.q4", hidden_by_loops),
        ("11.q5", loss_by_torch),
    ],
)
def test_reference_equals_truth(question_id: str, truth: Any, seed: int | bytes) -> None:
    assert_reference_is(truth, QUESTIONS[question_id], seed, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_masked_text_attends_as_if_alone(seed: int | bytes) -> None:
    for q, k, mask in QUESTIONS["11.q3"].draw_cases(seed):
        weights, real = answer("11.q3", q, k, mask), mask == 1
        alone = answer("11.q3", q[real], k[real], mask[real])
        np.testing.assert_allclose(weights[np.ix_(real, real)], alone, rtol=1e-9, atol=1e-300)
        assert not weights[:, ~real].any()


def test_hiding_is_that_of_the_library() -> None:
    """The same draws, from a torch generator, put where ``MaskedBlocks.hide`` uses them."""
    tokenizer = load_tokeniser("docbert").tokenizer
    ids = torch.randint(len(tokenizer), (8, 64), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    batch, targets = MaskedBlocks(ids, tokenizer, 8, seed=0, share=0.15).hide(
        ids, torch.Generator().manual_seed(1)
    )
    chance = torch.Generator().manual_seed(1)
    pick = torch.rand(ids.shape, generator=chance)
    where = batch["positions"]
    how, other = torch.zeros(ids.numel()), torch.zeros(ids.numel(), dtype=torch.long)
    how[where] = torch.rand(len(where), generator=chance)
    other[where] = torch.randint(len(tokenizer), (len(where),), generator=chance)
    result = answer(
        "11.q4",
        ids.numpy(),
        list(tokenizer.all_special_ids),
        tokenizer.mask_token_id,
        pick.numpy(),
        how.view_as(ids).numpy(),
        other.view_as(ids).numpy(),
    )
    np.testing.assert_array_equal(result["shown"], batch["input_ids"].numpy())
    np.testing.assert_array_equal(result["hidden"].ravel().nonzero()[0], where.numpy())
    np.testing.assert_array_equal(ids.numpy()[result["hidden"]], targets.numpy())


def test_loss_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(vocab_size=40, intermediate_size=32, **shape)).eval()
    ids, hidden = torch.randint(40, (3, 9)), torch.rand(3, 9) < 0.3
    output = model(input_ids=ids, labels=ids.masked_fill(~hidden, -100))
    ours = answer("11.q5", output.logits.detach().double().numpy(), ids.numpy(), hidden.numpy())
    assert ours["loss"] == pytest.approx(output.loss.item(), rel=1e-6)


def test_a_model_that_knows_nothing_loses_log_v() -> None:
    hidden = np.random.default_rng(0).random((2, 10)) < 0.5
    result = answer("11.q5", np.zeros((2, 10, 6000)), np.zeros((2, 10), dtype=int), hidden)
    assert result["loss"] == pytest.approx(np.log(6000))


@pytest.mark.parametrize("seed", SEEDS)
def test_cases_reach_what_the_questions_are_about(seed: int | bytes) -> None:
    q1 = [QUESTIONS["11.q1"].expect(case) for case in QUESTIONS["11.q1"].draw_cases(seed)]
    assert q1.count(["[UNK]"]) == 3 and any(len(pieces) >= 3 for pieces in q1)
    for ids, special, mask_id, pick, how, other in QUESTIONS["11.q4"].draw_cases(seed):
        asked = (pick < 0.15) & ~np.isin(ids, special)
        kinds = np.digitize(how[asked], [0.8, 0.9])
        assert set(kinds) == {0, 1, 2}
        assert mask_id not in ids
        assert np.any((other == ids) & asked), "no token that is replaced by itself"
    hidden = [case[2] for case in QUESTIONS["11.q5"].draw_cases(seed)]
    assert not hidden[-1].any() and all(places.any() for places in hidden[:-1])
    assert len(set(hidden[0].sum(axis=1))) > 1, "every text has as many hidden tokens"


HINTS = {
    "11.q1": {
        "shortest first": "longest",
        "## written, not looked up": "##",
        "## looked up, not written": "##",
        "keeps the beginning": "whole",
        "[UNK] for one character": "whole",
        "takes choices back": "choice back",
        "longest piece anywhere": "beginning",
    },
    "11.q2": {
        "mean over batches": "divide once",
        "over the real tokens": "all places",
        "last batch filled up": "fewer rows",
        "one width for all": "own",
        "longest first": "shortest first",
        "share of real tokens": "real tokens",
    },
    "11.q3": {
        "zeros after the softmax": "less than 1",
        "scores set to 0": "exp(0) = 1",
        "no maximum": "maximum",
        "maximum over the padding": "real",
        "minus 10,000": "outweighed",
        "rows masked": "columns",
        "rows of padding zeroed, too": "still sum to 1",
        "queries and keys swapped": "queries",
        "mask inverted": "0 for padding",
        "no scale": "square root",
        "scale D": "square root",
    },
    "11.q4": {
        "asks only for what was changed": "all the same",
        "special tokens hidden": "special",
        "always [MASK]": "the model sees",
        "never kept": "the token itself",
        "80/10/10 of all tokens": "those asked for",
        "hidden inverted": "asked",
        "bounds": "the model sees",
    },
    "11.q5": {
        "mean over all places": "not by all places",
        "all places asked": "only the hidden",
        "sum": "not a sum",
        "mean of each text first": "batch",
        "the visible tokens": "visible",
        "0/0 when nothing is hidden": "nothing is hidden",
        "naive softmax": "any size",
        "gradient at visible places": "visible",
        "gradient without 1/|H|": "1 / |H|",
        "gradient without the true token": "minus true",
        "gradient at the true token only": "one-hot",
    },
}


@pytest.mark.parametrize("question_id", HINTS)
def test_hints_name_the_mistake(question_id: str) -> None:
    assert_hints_name(QUESTIONS[question_id], HINTS[question_id])
