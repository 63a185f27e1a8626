"""Two models on the same rows: their KL and NLL equal a plain computation in float64, with one head and with two."""

import pytest
import torch

from selfaug.errors import UserError
from selfaug.evaluation import pair as pair_module
from selfaug.evaluation.drift import DriftConfig, drift_on_answers, measure_drift
from selfaug.evaluation.pair import Pair
from selfaug.evaluation.statistics import Interval
from selfaug.evaluation.token_kl import token_kl
from selfaug.model.full import FullFineTuning
from selfaug.objective.batch import Role
from tests.tiny import FAMILIES, TOKENIZER_VOCAB, random_batch, tiny_model, tiny_tokenizer
from tests.workspace import write_lines


def tuned(family="llama", freeze=None, **settings):
    """As if all weights, or all but `freeze`, had been trained a little."""
    model = FullFineTuning(freeze=freeze).apply(tiny_model(family, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def rows():
    ids, mask, _ = random_batch()
    return ids, mask, mask.bool() & torch.cat([mask[:, 1:].bool(), torch.zeros_like(mask[:, :1]).bool()], 1)


@torch.no_grad()
def naive(model, ids, mask, rows):
    """[N, V] log-probabilities in float64 from the model's own logits, one example after the other."""
    model = model.double().eval()
    lengths = mask.sum(1).tolist()
    logits = [
        model(input_ids=one[None, :n]).logits[0, kept[:n]] for one, kept, n in zip(ids, rows, lengths, strict=True)
    ]
    return torch.cat(logits).log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("freeze", [None, "head"])
def test_two_models_equal_a_plain_computation(family, freeze):
    ids, mask, chosen = rows()
    base, model = tiny_model(family), tuned(family, freeze)
    model.train()
    pair = Pair(model, base)
    assert pair.one_head == (freeze == "head")
    states = pair.hidden(ids, mask, chosen)
    found = [pair.kl(*states), pair.kl(*states, "kl_tuned_base"), *pair.nll(*states, ids.roll(-1, 1)[chosen])]
    assert model.training
    one, other = naive(model, ids, mask, chosen), naive(base, ids, mask, chosen)  # tuned, base
    targets = ids.roll(-1, 1)[chosen].unsqueeze(-1)
    expected = [
        (other.exp() * (other - one)).sum(-1), (one.exp() * (one - other)).sum(-1),
        -one.gather(1, targets).squeeze(-1), -other.gather(1, targets).squeeze(-1),
    ]  # fmt: skip
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=2e-3, atol=2e-5)
    assert found[0].median() > 1e-3


def test_chunks_do_not_change_it(monkeypatch):
    ids, mask, chosen = rows()
    pair = Pair(tuned(), tiny_model())
    states = pair.hidden(ids, mask, chosen)
    whole = pair.kl(*states)
    monkeypatch.setattr(pair_module, "chunk_rows", lambda *_: 2)
    torch.testing.assert_close(pair.kl(*states), whole)
    nothing = pair.hidden(ids, mask, torch.zeros_like(chosen))
    assert pair.kl(*nothing).shape == (0,)


def test_a_model_and_itself_are_the_same():
    ids, mask, chosen = rows()
    pair = Pair(tiny_model(), tiny_model())
    assert pair.one_head
    assert not pair.kl(*pair.hidden(ids, mask, chosen)).any()


def test_without_a_second_model_it_needs_adapters():
    with pytest.raises(UserError, match="no adapters that could be switched off"):
        Pair(tiny_model())


@pytest.fixture
def corpora(tmp_path):
    write_lines(tmp_path / "texts.jsonl", [{"text": f"Text {i}: the cat is on the mat of the inn."} for i in range(6)])
    write_lines(tmp_path / "turns.jsonl", [{"prompt": f"What is {i}?", "response": f"A number {i}."} for i in range(6)])
    return {
        "texts": {"kind": "text", "path": str(tmp_path / "texts.jsonl")},
        "turns": {"kind": "dialogue", "path": str(tmp_path / "turns.jsonl")},
    }


def means(drift):
    return {
        (corpus, name, part): interval.mean
        for corpus, metrics in drift.items() for name, metric in metrics.items() for part, interval in metric.items()
        if isinstance(interval, Interval)
    }  # fmt: skip


def test_drift_of_two_models_is_that_of_adapters_and_their_base(corpora):
    """The same pair, once as one model with adapters and once as a merged model beside the base."""
    adapted = tiny_model(lora=True, vocab_size=TOKENIZER_VOCAB)
    config, tokenizer = DriftConfig(corpora), tiny_tokenizer()
    expected = measure_drift(adapted, tokenizer, config, progress=False)
    turns = [("Who is it?", "It is the cat."), ("Where?", "On the mat.")]
    answers = drift_on_answers(adapted, tokenizer, turns, config, progress=False)
    ids = {"id": "q", "input_ids": list(range(4, 24)), "roles": [int(Role.DOCUMENT)] * 20}
    tokens = token_kl(adapted, tokenizer, ids)
    merged, base = adapted.merge_and_unload(), tiny_model(vocab_size=TOKENIZER_VOCAB)
    found = measure_drift(merged, tokenizer, config, base=base, progress=False)
    assert means(found) == pytest.approx(means(expected), rel=1e-3)
    assert found["texts"]["kl_base_tuned"]["tuned"].mean > 0.01
    assert means({"a": drift_on_answers(merged, tokenizer, turns, config, base=base, progress=False)}) == pytest.approx(
        means({"a": answers}), rel=1e-3
    )
    second = token_kl(merged, tokenizer, ids, base=base)
    assert second["kl"][:-1] == pytest.approx(tokens["kl"][:-1], rel=1e-2)


def test_drift_with_another_head(corpora):
    """Only the head has been trained: the hidden states are the same, the drift is not 0."""
    base = tiny_model(vocab_size=TOKENIZER_VOCAB)
    model = FullFineTuning(train="head").apply(tiny_model(vocab_size=TOKENIZER_VOCAB))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.3)
    drift = measure_drift(model, tiny_tokenizer(), DriftConfig(corpora), base=base, progress=False)
    assert drift["texts"]["kl_base_tuned"]["tuned"].mean > 0.01
    again = tiny_model(vocab_size=TOKENIZER_VOCAB)
    same = measure_drift(again, tiny_tokenizer(), DriftConfig(corpora), base=base, progress=False)
    assert same["texts"]["kl_base_tuned"]["tuned"].mean == 0
