"""EWC: the Fisher information against gradients of the model's own logits, one example after another, in float64."""

import pytest
import torch
from torch.nn import functional as F

from selfaug.data.collate import collate
from selfaug.objective import EWC, Objective
from selfaug.objective.ewc import fisher
from tests.test_module import make_rows
from tests.tiny import tiny_model

TEXT = {"kind": "dialogue", "path": "somewhere"}


def examples(n=6):
    return [collate([row], 0) for row in make_rows(n)]


def independent(model, batches):
    """(sum over examples of squared gradients) / (response tokens), from transformers' logits and torch's loss."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums, tokens = {name: torch.zeros_like(p) for name, p in trained.items()}, 0
    for batch in batches:
        logits, labels = model.eval()(input_ids=batch.input_ids).logits[0, :-1], batch.labels[0, 1:]
        loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        tokens += int((labels != -100).sum())
        for name, grad in zip(trained, torch.autograd.grad(loss, trained.values(), allow_unused=True), strict=True):
            if grad is not None:
                sums[name] += grad**2
    return {name: value / tokens for name, value in sums.items()}


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_fisher_is_the_mean_of_squared_gradients(lora):
    model = tiny_model(lora={"lora_dropout": 0.5} if lora else False).double()
    found = fisher(model, examples())
    assert all(p.grad is None for p in model.parameters())
    assert model.training == lora
    expected = independent(model, examples())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-14)
    assert sum(value.sum() for value in found.values()) > 0


def test_where_lora_starts_only_b_matters():
    found = fisher(tiny_model(lora=True, random_b=False), examples())
    assert all((value == 0).all() for name, value in found.items() if "lora_A" in name)
    assert all((value > 0).any() for name, value in found.items() if "lora_B" in name)


def prepared(model, alpha=1.0) -> EWC:
    term = EWC(TEXT, alpha)
    term.start(model)
    term.use(fisher(model, examples()), None)
    return term


def test_penalty_is_the_weighted_distance():
    model = tiny_model(lora=True).double()
    term = prepared(model)
    assert term.penalty(model).item() == 0
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    weights = independent(model, examples())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in start:
                p += 0.3 * torch.randn_like(p)
    found = term.penalty(model)
    found.backward()
    expected = 0.5 * sum((weights[n] * (p - start[n]) ** 2).sum() for n, p in model.named_parameters() if n in start)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    for name, p in model.named_parameters():
        if name in start:
            torch.testing.assert_close(p.grad, weights[name] * (p.detach() - start[name]), rtol=1e-8, atol=1e-12)


def test_it_says_what_it_found_and_what_it_holds():
    model = tiny_model(lora=True)
    found = fisher(model, examples())
    term = EWC(TEXT)
    measured = term.use(found, None)
    values = torch.cat([value.flatten() for value in found.values()])
    assert measured == {"fisher_mean": pytest.approx(values.double().mean().item())}
    assert term.held_bytes(model) == 8 * len(values)
    assert Objective({"ewc": term}).names == ("nll",)  # no mean over rows
