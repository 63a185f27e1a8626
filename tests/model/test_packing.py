"""Packed rows are their examples one by one, in every family that is not refused (invariant 4)."""

import logging
import re
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig, StableLmConfig

from selfaug.data.collate import collate, pack
from selfaug.errors import UserError
from selfaug.model import attention
from selfaug.model.attention import packed_states
from selfaug.model.decoder import Decoder, verify_packing
from selfaug.objective import LogitAlignment, Objective
from selfaug.objective.rows import alignment_rows, existing_rows
from tests.model.packing import (
    ATTENTION,
    FAMILIES,
    LENGTHS,
    assert_same_outcome,
    batchings,
    make_model,
    make_rows,
    outcome,
)
from tests.tiny import VOCAB, randomise, tiny_model

each_attention = pytest.mark.parametrize(("family", "name"), ATTENTION, ids=lambda value: value)


def selfaug(**settings):
    return Objective({"kl": LogitAlignment(0.5, **settings), "out": LogitAlignment(0.3, "output_logits")})


@each_attention
def test_a_step_has_one_loss_and_one_gradient_however_it_is_batched(family, name):
    steps, model = batchings(make_rows()), make_model(family, name)
    expected = outcome(model, selfaug(), steps.pop("one by one"))
    for batches in steps.values():
        assert_same_outcome(outcome(model, selfaug(), batches), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_these_examples_do_feel_each_other_where_they_are_not_kept_apart(family):
    """Else the test above would show nothing."""
    body = make_model(family).eval().get_base_model().base_model
    batch = pack(make_rows())
    with torch.no_grad():
        apart = packed_states(body, batch.input_ids, batch.spans)[0]
        mixed = body(input_ids=batch.input_ids, use_cache=False).last_hidden_state[0]
    difference = (mixed - apart).norm(dim=-1) / apart.norm(dim=-1)
    first, *others = batch.spans
    assert difference[: first.stop].max() < 1e-4
    assert all(difference[span.start] > 0.1 for span in others)


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_packing_accepts_and_leaves_no_trace(family):
    model = make_model(family)
    training = [module.training for module in model.modules()]
    verify_packing(model)
    assert [module.training for module in model.modules()] == training
    with torch.autocast("cpu", torch.bfloat16):
        verify_packing(model)


# --- what was not packed is as before -----------------------------------------------------------------------------


@each_attention
def test_a_model_that_can_pack_computes_everything_else_as_before_bit_for_bit(family, name):
    ids = torch.arange(1, 41).remainder(VOCAB).view(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    generate = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}

    def everything(model):
        with torch.no_grad():
            states = [
                model(input_ids=ids).logits,
                model(input_ids=ids, attention_mask=mask).logits,
                model.generate(input_ids=ids, attention_mask=mask, **generate),
                model.generate(input_ids=ids[1:, :7], **generate),
            ]
        return [*states, *outcome(model.train(), selfaug(), [collate(make_rows(), 0)])[2].values()]

    model = make_model(family, name).eval()
    before = everything(model)
    assert model.config._attn_implementation == name
    verify_packing(model)
    assert model.config._attn_implementation == f"selfaug_{name}"
    assert all(torch.equal(*pair) for pair in zip(everything(model.eval()), before, strict=True))


def test_a_saved_model_does_not_know_about_it(tmp_path):
    model = tiny_model("mistral")
    verify_packing(model)
    model.save_pretrained(tmp_path)
    assert "selfaug" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation in ("sdpa", "eager")


# --- no mask of [T, T] --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), [("llama", "sdpa"), ("mistral", "sdpa"), ("mistral", "eager")])
def test_masks_are_as_large_as_the_longest_example_and_not_as_the_row(family, name, monkeypatch):
    model = make_model(family, name)
    batch = pack(make_rows())
    seen = []
    whole = attention._mask(name)

    def watched(**settings):
        seen.append(whole(**settings))
        return seen[-1]

    attention.AttentionMaskInterface.register(f"selfaug_{name}", watched)
    try:
        Decoder(model).states(batch)
    finally:
        attention.AttentionMaskInterface.register(f"selfaug_{name}", whole)
    assert seen
    if family == "llama":
        assert seen == [None]  # plain causal attention: its faster path
    else:
        assert {mask.shape for mask in seen} == {(1, 1, max(LENGTHS), max(LENGTHS))}


# --- rows ---------------------------------------------------------------------------------------------------------


def test_rows_of_a_packed_batch_are_those_of_its_examples():
    rows = make_rows((7, 2, 1, 12))
    batch = pack(rows)
    for position in ("input_logits", "output_logits", "all_logits"):
        for boundary in (True, False):
            found = alignment_rows(batch.roles, position, boundary=boundary, last=batch.last)[0]
            alone = [alignment_rows(collate([r], 0).roles, position, boundary=boundary)[0] for r in rows]
            assert found.tolist() == torch.cat(alone).tolist()
            assert not found[[6, 8, 9, 21]].any()  # the last token of an example predicts nothing
    assert existing_rows(batch.roles, batch.last).sum() == 6 + 1 + 0 + 11
    assert not LogitAlignment(position="all_logits").select(batch)[0, [6, 8, 9, 21]].any()


@pytest.mark.parametrize("kind", ["random", "entropy", "attention", "document_rank"])
def test_the_same_rows_are_drawn_padded_and_packed(kind):
    """Not merely the same loss: the very rows, with the same weights."""
    rows = make_rows((40, 23, 1, 31))
    drawn = {}
    for how, batch in {"padded": collate(rows, 0), "packed": pack(rows)}.items():
        model = make_model("llama", "sdpa")
        term = LogitAlignment(rows=kind, share=0.3)
        objective = Objective({"kl": term})
        reference = objective.reference.states(Decoder(model), batch, masked=False, score=term.sampling.score)
        mask, weights = term.sampling.draw(batch, term.select(batch), reference.scores, (1, 7))
        full = torch.zeros(mask.shape).masked_scatter(mask, weights)
        drawn[how] = [full[s.row, s.start : s.stop] for s, _ in batch.examples]
    assert sum(int((w > 0).sum()) for w in drawn["packed"]) > 10
    for one, other in zip(*drawn.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["random", "attention", "document_rank"])
def test_sampled_losses_are_the_same_however_they_are_batched(kind):
    steps, model = batchings(make_rows((40, 23, 1, 31))), make_model("qwen2", "sdpa")
    objective = Objective({"kl": LogitAlignment(0.5, rows=kind, share=0.3)})
    expected = outcome(model, objective, steps.pop("one by one"), draw=(1, 7))
    for batches in steps.values():
        assert_same_outcome(outcome(model, objective, batches, draw=(1, 7)), expected, 1e-4)


def test_official_rows_are_refused():
    objective = Objective({"kl": LogitAlignment(0.5, official=True)})
    with pytest.raises(UserError, match=r"^alignment\.official=true .*data\.packing=false\.$"):
        outcome(make_model("llama"), objective, [pack(make_rows())])


# --- what is refused ----------------------------------------------------------------------------------------------


def foreign(config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        randomise(model)
    return model


REFUSED = {
    # its attention is not in transformers' registry
    "bloom": lambda: BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
    # its layers do not hand the boundaries on
    "stablelm": lambda: StableLmConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    ),
    # its state runs through the whole row
    "mamba": lambda: MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2),
}  # fmt: skip


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_whose_examples_cannot_be_kept_apart_is_refused(family, caplog):
    model = foreign(REFUSED[family]())
    with caplog.at_level(logging.CRITICAL), pytest.raises(UserError) as refused:
        verify_packing(model)
    assert re.fullmatch(rf"{type(model.base_model).__name__} [^.]*data\.packing=[^.]*(\.[^.]+)*\.", str(refused.value))
    assert "set data.packing=false" in str(refused.value)


def test_positions_that_do_not_begin_again_are_found(monkeypatch):
    model = make_model("gpt2").get_base_model()
    whole = model.base_model.forward

    def forward(position_ids=None, **given):
        return whole(**given)

    monkeypatch.setattr(model.base_model, "forward", forward)
    with pytest.raises(UserError, match=r"^GPT2Model does not keep the examples of a packed row apart"):
        verify_packing(model)


def test_spans_must_cover_the_row():
    body = tiny_model("llama").base_model
    ids = torch.ones(1, 10, dtype=torch.long)
    for edges in ([0, 4, 9], [0, 4, 11], [1, 4, 10]):
        with pytest.raises(ValueError, match="without a gap"):
            packed_states(body, ids, [(0, *edge) for edge in pairwise(edges)])
    for spans in ([(0, 0, 4), (0, 5, 10)], [(0, 0, 4), (1, 4, 10)], []):
        with pytest.raises(ValueError, match="without a gap"):
            packed_states(body, ids, spans)
    with pytest.raises(ValueError, match="without a gap"):
        packed_states(body, ids.view(2, 5), [(0, 0, 5), (1, 0, 5)])
