"""Sampling in batches: against a plain loop that sorts all tokens, and against the distribution itself."""

import numpy as np
import pytest
import torch

from selfaug.evaluation import sampling
from selfaug.evaluation.sampling import draw, sample
from tests.evaluation.test_generation import prompts
from tests.tiny import TOKENIZER_VOCAB, tiny_model, tiny_tokenizer

NEW = 40  # longer than a stride of generation, so that sequences leave the batch on the way


def plain_draw(logits, u, temperature, top_p):
    """One row in float64: sort all tokens, keep the nucleus, invert its cumulated probability."""
    p = torch.softmax(logits.double() / temperature, -1)
    order = sorted(range(len(p)), key=lambda i: -float(p[i]))
    nucleus, total = [], 0.0
    for token in order:
        nucleus.append(token)
        total += float(p[token])
        if total >= top_p:
            break
    if top_p == 1:
        nucleus = list(range(len(p)))
    at = u * sum(float(p[token]) for token in nucleus)
    for token in nucleus:
        at -= float(p[token])
        if at < 0:
            return token
    return nucleus[-1]


@torch.no_grad()
def plain_sample(model, prompt, uniforms, stops, temperature, top_p):
    """One sequence, a whole forward pass for each token."""
    ids = list(prompt)
    for u in uniforms:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        token = int(logits.argmax()) if temperature == 0 else plain_draw(logits, u, temperature, top_p)
        if token in stops:
            return ids[len(prompt) :], True
        ids.append(token)
    return ids[len(prompt) :], False


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 0.9), (1.0, 1.0), (2.0, 0.5), (0.0, 1.0)])
def test_equals_plain_loop_whatever_the_batch(temperature, top_p):
    model = tiny_model("llama", vocab_size=TOKENIZER_VOCAB)
    asked = prompts()
    uniforms = np.random.default_rng(0).random((len(asked), NEW))
    stops = [2, *range(40, 45)]
    expected = [
        plain_sample(model, prompt, row, stops, temperature, top_p) for prompt, row in zip(asked, uniforms, strict=True)
    ]
    assert {ended for _, ended in expected} == {True, False} or temperature == 0
    how = {"temperature": temperature, "top_p": top_p, "also_stop": stops[1:]}
    assert sample(model, tiny_tokenizer(), asked, uniforms, **how) == expected
    for i in (0, 3):  # alone
        assert sample(model, tiny_tokenizer(), asked[i : i + 1], uniforms[i : i + 1], **how) == expected[i : i + 1]


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("first", [3, 128], ids=["whole sort", "top"])
def test_frequencies_are_those_of_the_nucleus(monkeypatch, top_p, first):
    monkeypatch.setattr(sampling, "_FIRST", first)
    logits = torch.randn(12) * 1.5
    p = torch.softmax(logits / 0.8, -1).double()
    ranked = p.sort(descending=True)
    kept = ranked.indices[(ranked.values.cumsum(-1) - ranked.values) < top_p]
    expected = torch.zeros_like(p)
    expected[kept] = p[kept] / p[kept].sum()
    n = 40_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    found = torch.bincount(draw(logits.expand(n, -1), u, 0.8, top_p), minlength=12) / n
    torch.testing.assert_close(found.double(), expected, atol=2 / n * 12, rtol=0)


def test_the_ends_of_the_interval_are_tokens_of_the_nucleus():
    logits = torch.tensor([[5.0, 5.0, -50.0]])
    for u, token in ((0.0, 0), (1 - 1e-16, 1)):
        assert int(draw(logits, torch.tensor([u], dtype=torch.float64), 1.0, 1.0)) == token
        assert int(draw(logits, torch.tensor([u], dtype=torch.float64), 1.0, 0.99)) == token


def test_modes_and_settings_of_the_model_are_left_alone():
    model = tiny_model("llama", vocab_size=TOKENIZER_VOCAB).train()
    settings = model.generation_config
    sample(model, tiny_tokenizer(), prompts()[:2], np.zeros((2, 3)))
    assert model.training
    assert model.generation_config is settings
