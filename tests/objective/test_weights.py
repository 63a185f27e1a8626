"""Token weights against whole logits in float64: value and gradient, no gradient through the weight."""

import math

import pytest
import torch

from selfaug.errors import UserError
from selfaug.objective import DFT, EAFT, LogitAlignment, Objective
from tests.objective.test_objective import assert_close_gradients, gradients, make_batch, run, take
from tests.test_module import make_rows, train, weights
from tests.tiny import tiny_model


def response_logits(model, batch):
    """[N, V] logits of the rows that predict a response token, and the tokens [N]."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    labels = batch.labels[:, 1:]
    return logits[labels != -100], labels[labels != -100]


def eaft(logits, targets, k=20, power=1.0):
    """As the paper has it: the top-k probabilities, made to add up to 1, their entropy, over log k."""
    chances = logits.softmax(-1).sort(descending=True).values[:, :k]
    chances = chances / chances.sum(-1, keepdim=True)
    return ((-chances * chances.log()).sum(-1) / math.log(k)) ** power


def dft(logits, targets):
    return logits.softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize(
    ("weighting", "formula"),
    [
        (EAFT(), eaft),
        (EAFT(k=5, power=2.0), lambda *a: eaft(*a, k=5, power=2.0)),
        (DFT(), dft),
    ],
    ids=["eaft", "eaft-5-squared", "dft"],
)
def test_equals_the_formula_on_whole_logits(family, weighting, formula):
    model, batch = tiny_model(family, lora=True).double(), make_batch()
    logits, targets = response_logits(model, batch)
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    weight = formula(logits.detach(), targets)
    assert 0 < weight.min() < weight.max() <= 1
    expected = (weight * nll).mean()
    expected.backward()
    expected_gradients = gradients(model)
    loss, parts, found = run(Objective(weights=weighting), model, [batch])
    assert loss == pytest.approx(expected.item(), rel=1e-9)
    assert parts == {"nll": pytest.approx(nll.mean().item(), rel=1e-9), "weighted_nll": pytest.approx(loss)}
    assert_close_gradients(found, expected_gradients, relative=1e-7)


def test_asft_adds_the_kl_on_response_rows():
    model, base, batch = tiny_model(lora=True).double(), tiny_model().double(), make_batch()
    logits, targets = response_logits(model, batch)
    reference, _ = response_logits(base, batch)
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    kl = torch.nn.functional.kl_div(
        logits.log_softmax(-1), reference.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    expected = (nll * dft(logits.detach(), targets) + 0.1 * kl).mean()
    objective = Objective({"kl": LogitAlignment(0.1, "output_logits")}, weights=DFT())
    loss, _, _ = run(objective, model, [batch])
    assert loss == pytest.approx(expected.item(), rel=1e-9)


def test_weights_of_1_are_plain_lora_bit_for_bit():
    rows, settings = make_rows(16), {"lora": {"lora_dropout": 0.2}, "loading": {"micro_batch_size": 3}}
    plain, _ = train(Objective(), rows, **settings)
    same, record = train(Objective(weights=EAFT(power=0)), rows, **settings)
    other, _ = train(Objective(weights=EAFT()), rows, **settings)
    assert all(torch.equal(value, weights(same)[name]) for name, value in weights(plain).items())
    assert any(not torch.equal(value, weights(other)[name]) for name, value in weights(plain).items())
    assert record.column("train/weighted_nll") == record.column("train/nll")


def test_a_step_may_be_cut_into_micro_batches():
    model, batch = tiny_model(lora=True), make_batch()
    objective = Objective(weights=EAFT())
    loss, _, whole = run(objective, model, [batch])
    parts = [take(batch, slice(i, i + 3)) for i in range(0, 8, 3)]
    found, _, cut = run(objective, model, parts)
    assert found == pytest.approx(loss, rel=1e-5)
    assert_close_gradients(cut, whole)


@pytest.mark.parametrize("settings", [{"k": 1}, {"k": 2.5}, {"power": -1.0}, {"power": math.inf}], ids=str)
def test_values_out_of_range_are_refused(settings):
    (name,) = settings
    with pytest.raises(UserError, match=rf"^method\.weights\.{name}=.* is not allowed: set it to .*\.$"):
        EAFT(**settings)
