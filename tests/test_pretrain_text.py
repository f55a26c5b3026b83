"""Masking, packing and a short run of ``tlcourse pretrain docbert`` and ``docgpt``."""

import hashlib
import json
import math

import pytest
import torch

from tlcourse import pretrain
from tlcourse import pretrain_text as pt
from tlcourse.backbones import checkpoint_path
from tlcourse.evaluation import evaluate
from tlcourse.language_modelling import (
    MASK_SHARE,
    MaskedBlocks,
    MaskedTokens,
    NextTokenBlocks,
    NextTokens,
)
from tlcourse.language_models import load_generator, load_masked_lm, load_tokeniser, small_bert


def blocks(num=64, width=32):
    tokenizer = load_tokeniser("docbert").tokenizer
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, len(tokenizer), (num, width), generator=generator)
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    return ids, tokenizer


def test_masking_has_its_share_and_the_kinds_of_the_paper_and_spares_special_tokens():
    ids, tokenizer = blocks(2_000)
    loader = MaskedBlocks(ids, tokenizer, 2_000, seed=0)
    inputs, targets = loader.hide(ids, torch.Generator().manual_seed(1))
    shown, positions = inputs["input_ids"].flatten(), inputs["positions"]
    assert torch.equal(ids.flatten()[positions], targets)
    assert not torch.isin(targets, torch.tensor(tokenizer.all_special_ids)).any()
    assert len(targets) / (2_000 * 30) == pytest.approx(MASK_SHARE, abs=0.005)
    masked = (shown[positions] == tokenizer.mask_token_id).float().mean().item()
    same = (shown[positions] == targets).float().mean().item()
    assert masked == pytest.approx(0.8, abs=0.01) and same == pytest.approx(0.1, abs=0.01)
    untouched = torch.ones(ids.numel(), dtype=torch.bool)
    untouched[positions] = False
    assert torch.equal(shown[untouched], ids.flatten()[untouched])


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_that_hides_nothing_or_all_is_refused(share):
    with pytest.raises(ValueError, match=rf"share must be in \(0, 1\), got {share}"):
        MaskedBlocks(*blocks(8), 4, seed=0, share=share)


def test_validation_masks_stay_and_training_masks_change():
    ids, tokenizer = blocks()
    fixed = MaskedBlocks(ids, tokenizer, 32, seed=0, shuffle=False)
    moving = MaskedBlocks(ids, tokenizer, 32, seed=0)
    assert torch.equal(next(iter(fixed))[1], next(iter(fixed))[1])
    first, second = next(iter(moving))[1], next(iter(moving))[1]
    assert len(first) != len(second) or not torch.equal(first, second)


def test_masked_logits_are_those_of_the_whole_model():
    model = small_bert().eval()
    ids, tokenizer = blocks(4)
    inputs, _ = MaskedBlocks(ids, tokenizer, 4, seed=0).hide(ids, torch.Generator())
    with torch.no_grad():
        whole = model(input_ids=inputs["input_ids"]).logits.flatten(0, 1)
        ours = MaskedTokens(model)(**inputs)
    torch.testing.assert_close(ours, whole[inputs["positions"]], rtol=1e-4, atol=1e-4)


def test_next_token_loss_is_that_of_transformers():
    model = load_generator("docgpt", pretrained=False)
    ids = torch.randint(1, 4_000, (4, 33), generator=torch.Generator().manual_seed(0))
    result = evaluate(NextTokens(model), NextTokenBlocks(ids, 2, shuffle=False))
    with torch.no_grad():
        theirs = model(input_ids=ids, labels=ids).loss.item()
    assert result.loss == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(("name", "extra"), [("docbert", 0), ("docgpt", 1)])
def test_packing_loses_and_repeats_nothing(name, extra):
    texts = [f"This is the text of number {i}, and it is not long." for i in range(40)]
    packed = pt.blocks_of(name, texts, 32)
    assert packed.shape[1] == 32 + extra
    tokenizer = load_tokeniser(name).tokenizer
    inner = packed[:, 1:-1] if name == "docbert" else packed[:, :-1]
    if name == "docgpt":
        assert torch.equal(packed[1:, 0], packed[:-1, -1]), "a block ends where the next begins"
    words = tokenizer.decode(inner.flatten().tolist(), skip_special_tokens=True)
    assert all(f"number {i}," in words.replace(" ,", ",") for i in range(30))


@pytest.mark.parametrize("name", list(pt.TEXT_RECIPES))
def test_short_run_writes_checkpoint_and_card(name, tmp_path):
    path = pt.pretrain_text(name, num_steps=3, folder=tmp_path, packages=("joblib", "networkx"))
    card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert card["num_steps"] == 3 and card["command"].endswith("--steps 3 --out FOLDER")
    assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert math.log(card["test_perplexity"]) == pytest.approx(card["test_loss"], abs=0.01)


@pytest.mark.parametrize("name", list(pt.TEXT_RECIPES))
def test_shipped_card_tells_of_a_model_that_has_learned(name):
    card = json.loads(checkpoint_path(name).with_suffix(".json").read_text(encoding="utf-8"))
    recipe = pt.TEXT_RECIPES[name]
    assert (card["num_steps"], card["lr"]) == (recipe.num_steps, recipe.lr)
    assert card["test_loss"] < 0.6 * math.log(recipe.vocab_size)
    low, high = card["test_accuracy_interval_95"]
    assert 0 < low < card["test_accuracy"] < high


def test_shipped_docbert_guesses_a_hidden_word_from_its_neighbours_in_their_order():
    model, tokeniser = load_masked_lm(), load_tokeniser("docbert")
    tokenizer = tokeniser.tokenizer

    def probability(text, word):
        ids = torch.tensor(tokeniser([text]))
        with torch.no_grad():
            p = model(input_ids=ids).logits[ids == tokenizer.mask_token_id].softmax(dim=1)
        return p[0, tokenizer.get_vocab()[word]].item()

    assert probability("raises an error if the file does [MASK] exist.", "not") > 0.5
    assert probability("error exist raises the does if file an [MASK].", "not") < 0.1


def test_shipped_docgpt_prefers_text_in_its_order():
    model, tokenizer = load_generator(), load_tokeniser("docgpt").tokenizer
    text = "Return the sum of the array elements over the given axis."
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        loss, turned = (model(input_ids=x, labels=x).loss.item() for x in (ids, ids.flip(1)))
    assert loss < 4.5 < turned


def test_short_run_replaces_nothing_shipped(capsys):
    assert pretrain.main(["docgpt", "--steps", "5"]) == 2
    assert "needs --out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown checkpoint 'x'"):
        pt.pretrain_text("x")
