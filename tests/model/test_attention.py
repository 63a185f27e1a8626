"""Attention received from question and response, against transformers' own attention probabilities."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from transformers import AttentionInterface, MambaConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from selfaug.data.collate import collate, pack
from selfaug.errors import UserError
from selfaug.model import attention
from selfaug.model.attention import received_attention
from selfaug.model.decoder import Decoder
from selfaug.model.reference import AdaptersOff, adapters_off
from selfaug.objective import Role
from tests.model.packing import ATTENTION, FAMILIES, LENGTHS, make_model, make_rows
from tests.tiny import VOCAB


def expected_attention(model, row):
    """[n]: of one example, from the attention probabilities that transformers gives out in eager attention."""
    ids = torch.tensor([row["input_ids"]])
    with adapters_off(model):
        layers = model(input_ids=ids, output_attentions=True).attentions
    probabilities = torch.stack(layers).mean((0, 2))[0]  # [queries, keys], mean over layers and heads
    asking = torch.tensor([role in (Role.QUESTION, Role.RESPONSE) for role in row["roles"]])
    received = torch.zeros(row["length"])
    for j in range(row["length"]):
        behind = asking & (torch.arange(row["length"]) > j)
        if behind.any():
            received[j] = probabilities[behind, j].mean()
    return received


def recorded(model, batch, masked=False):
    return AdaptersOff().states(Decoder(model), batch, masked=masked, score="attention")


def left(batch):
    """The same examples padded on the left."""

    def shift(tensor):
        return torch.stack(
            [row.roll(tensor.shape[1] - span.stop) for row, span in zip(tensor, batch.spans, strict=True)]
        )

    moved = batch._each(shift)
    return replace(moved, spans=(), keys=(), right_padded=False)


@pytest.mark.parametrize(("family", "name"), ATTENTION, ids=lambda value: value)
def test_it_is_what_the_question_and_the_response_attend_to(family, name):
    rows = make_rows()
    expected = {
        key: expected_attention(make_model(family), row) for key, row in zip(pack(rows).keys, rows, strict=True)
    }
    assert expected[pack(rows).keys[0]].max() > 0.05
    model = make_model(family, name)
    for batch in (collate(rows, 0), left(collate(rows, 0)), pack(rows), pack(rows[::-1])):
        hidden, scores = recorded(model, batch)
        assert (scores.shape, scores.dtype) == (batch.roles.shape, torch.float32)
        assert not scores.requires_grad
        assert len(batch.examples) == len(rows)
        for span, key in batch.examples:
            found = scores[span.row, span.start : span.stop]
            torch.testing.assert_close(found, expected[key], rtol=1e-4, atol=1e-6)
        assert not scores[batch.attention_mask == 0].any()
        again = AdaptersOff().states(Decoder(model), batch, masked=False)
        assert torch.equal(again.hidden, hidden)  # to look on changes nothing
        assert again.scores is None


def test_without_a_marked_question_it_is_the_response():
    rows = make_rows()
    for row in rows:
        row["roles"] = [role if role == Role.RESPONSE else Role.TEMPLATE for role in row["roles"]]
    _, scores = recorded(make_model("llama"), pack(rows))
    torch.testing.assert_close(
        scores[0, : LENGTHS[0]], expected_attention(make_model("llama"), rows[0]), rtol=1e-4, atol=1e-6
    )
    for row in rows:
        row["roles"] = [int(Role.TEMPLATE)] * row["length"]
    assert not recorded(make_model("llama"), pack(rows)).scores.any()


def test_only_the_asking_rows_are_computed_and_only_so_many_at_once(monkeypatch):
    """64 tokens ask, 1936 do not: no tensor of the recording comes near [heads, T, T]."""
    monkeypatch.setattr(attention, "_SCORES", 2**14)
    rows = make_rows((2000,))
    rows[0]["roles"] = [int(Role.DOCUMENT)] * 1936 + [int(Role.QUESTION)] * 64
    sizes = []
    whole = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, dim: sizes.append(self.numel()) or whole(self, dim))
    _, scores = recorded(make_model("llama", "sdpa"), pack(rows))
    assert max(sizes) <= 2**14
    assert sum(sizes) == 2 * 4 * 64 * 2000  # layers, heads, asking rows, keys
    monkeypatch.undo()
    torch.testing.assert_close(scores[0], expected_attention(make_model("llama"), rows[0]), rtol=1e-3, atol=1e-7)


def test_autocast_does_not_round_it():
    batch = pack(make_rows())
    draw = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 4, sum(LENGTHS), 8, generator=draw), torch.randn(1, 2, sum(LENGTHS), 8, generator=draw)
    found = []
    for autocast in (False, True):
        recorder = attention._Recorder(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            recorder.add(query, key, 0.3, None, None)
        found.append(recorder.mean())
    assert torch.equal(*found)
    with torch.autocast("cpu", torch.bfloat16):
        _, scores = recorded(make_model("llama", "sdpa"), batch)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_another_implementation_is_listened_to_and_given_back(family, monkeypatch):
    """Flash and flex attention keep transformers' own function, but for the time of a recording."""
    own = AttentionInterface()["sdpa"]
    monkeypatch.setitem(AttentionInterface._global_mapping, "other_like", own)
    monkeypatch.setitem(
        attention.AttentionMaskInterface._global_mapping, "other_like", attention.AttentionMaskInterface()["sdpa"]
    )
    model = make_model(family, "other_like")
    rows = make_rows()
    _, scores = recorded(model, collate(rows, 0))
    assert model.config._attn_implementation == "other_like"
    assert AttentionInterface()["other_like"] is own
    torch.testing.assert_close(scores[0], expected_attention(make_model(family), rows[0]), rtol=1e-4, atol=1e-6)


def test_an_error_inside_leaves_nothing_behind():
    model = make_model("llama")
    batch = pack(make_rows())
    with pytest.raises(ZeroDivisionError), received_attention(Decoder(model).body, batch) as received:
        raise ZeroDivisionError
    assert attention._recorder.get() is None
    assert attention._longest.get() is None
    kept = weakref.ref(received.__self__)
    del received
    gc.collect()
    assert kept() is None


def test_a_model_without_attention_is_refused():
    model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2))
    body = Decoder(model).body
    batch = collate(make_rows(), 0)
    with received_attention(body, batch) as received, torch.no_grad():
        body(input_ids=batch.input_ids, use_cache=False)
    with pytest.raises(UserError, match=r"^The model has no attention .* set alignment\.rows=random\.$"):
        received()
