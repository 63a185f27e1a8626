"""Row sampling: probabilities, weights, the expected gradient, and what a draw depends on."""

import itertools
import re
from dataclasses import replace

import pytest
import torch

from selfaug.errors import UserError
from selfaug.model.decoder import Decoder
from selfaug.objective import LogitAlignment, Objective, TokenBatch, sampling
from selfaug.objective.sampling import RowSampling, inclusion_probabilities, systematic_weights
from tests.objective.test_objective import assert_close_gradients, make_batch, run, take
from tests.tiny import tiny_model

KINDS = ("random", "entropy", "attention", "document_rank")


def with_documents(batch: TokenBatch) -> TokenBatch:
    """Tokens 2 to 4 of every example are the second best document, 5 and 6 the best."""
    documents = torch.zeros_like(batch.input_ids)
    for span, _ in batch.examples:
        documents[span.row, span.start + 2 : span.start + 5] = 2
        documents[span.row, span.start + 5 : span.start + 7] = 1
    return replace(batch, documents=documents * batch.attention_mask)


def random_scores(seed=0, rows=40):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, generator=generator).pow(6), torch.rand(rows, generator=generator) < 0.7


def offsets(chances):
    """Where in [0, 1) the draw changes, as (a point inside, its width): an exact expectation has so many terms."""
    edges = sorted({0.0, 1.0, *(x % 1.0 for x in chances.cumsum(0).tolist())})
    return [((a + b) / 2, b - a) for a, b in itertools.pairwise(edges) if b - a > 1e-12]


# --- probabilities and weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.03, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_probabilities_add_up_to_the_share_and_follow_the_importance(share, seed):
    importance, mask = random_scores(seed)
    chances = inclusion_probabilities(importance, mask, share)
    assert chances.sum().item() == pytest.approx(share * mask.sum().item(), rel=1e-9)
    assert chances.max() <= 1
    assert not chances[~mask].any()
    assert (chances[mask] >= sampling.UNIFORM * share * (1 - 1e-9)).all()  # so weights are bounded
    inside = chances[mask & (chances < 1)]
    order = importance[mask & (chances < 1)].argsort()
    assert (inside[order].diff() >= -1e-12).all()
    if share <= 0.25 and (chances < 1).all():  # proportional, apart from the uniform part
        expected = 0.8 * importance * mask / (importance * mask).sum() + 0.2 * mask / mask.sum()
        torch.testing.assert_close(chances / chances.sum(), expected.double(), rtol=1e-5, atol=1e-9)


def test_without_importance_all_rows_are_equal_and_without_rows_there_are_none():
    mask = torch.tensor([True, True, False, True, True])
    assert inclusion_probabilities(torch.zeros(5), mask, 0.5).tolist() == [0.5, 0.5, 0.0, 0.5, 0.5]
    nothing = inclusion_probabilities(torch.ones(5), torch.zeros(5, dtype=torch.bool), 0.5)
    assert not nothing.any()
    assert not systematic_weights(nothing, 0.3).any()


@pytest.mark.parametrize("share", [0.1, 0.37, 0.8])
def test_weights_are_one_in_expectation_and_the_number_of_rows_hardly_varies(share):
    for seed in range(5):
        chances = inclusion_probabilities(*random_scores(seed), share)
        draws = [(systematic_weights(chances, offset), width) for offset, width in offsets(chances)]
        expected = sum(weights.double() * width for weights, width in draws)
        torch.testing.assert_close(expected, (chances > 0).double(), rtol=1e-5, atol=1e-6)
        counts = {int((weights > 0).sum()) for weights, _ in draws}
        assert max(counts) - min(counts) <= 1
        assert abs(max(counts) - chances.sum().item()) <= 1


# --- the loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", KINDS)
@pytest.mark.parametrize("position", ["input_logits", "all_logits"])
def test_the_expected_gradient_is_the_full_one(rows, position, monkeypatch):
    model = tiny_model(lora=True)
    batch = with_documents(take(make_batch(), slice(1, 2), unpad=True))
    full = Objective({"kl": LogitAlignment(0.7, position)})
    loss, _, gradients = run(full, model, [batch])
    sampled = Objective({"kl": LogitAlignment(0.7, position, rows=rows, share=0.3)})
    totals = sampled.count(batch)
    assert torch.equal(totals, full.count(batch))  # the mean is over all rows, drawn or not

    seen = []
    inner = sampling.systematic_weights
    monkeypatch.setattr(sampling, "systematic_weights", lambda c, o: (seen.append(c), inner(c, o))[1])
    model.zero_grad()
    sampled(Decoder(model), batch, totals, draw=(1, 1))
    chances = seen[0]
    assert chances.sum().item() == pytest.approx(0.3 * totals[1].item(), rel=1e-6)
    expected_loss, expected = 0.0, [torch.zeros_like(g) for g in gradients]
    for offset, width in offsets(chances):
        monkeypatch.setattr(sampling, "_offset", lambda *_, offset=offset: offset)
        model.zero_grad()
        losses = sampled(Decoder(model), batch, totals, draw=(1, 1))
        losses.loss.backward()
        expected_loss += width * losses.loss.item()
        for total, p in zip(expected, (p for p in model.parameters() if p.requires_grad), strict=True):
            total += width * p.grad
    assert expected_loss == pytest.approx(loss, rel=1e-5)
    assert_close_gradients(expected, gradients)


def rows_drawn(objective, model, batch, draw, monkeypatch):
    """Per example key, the positions drawn within it."""
    found = {}
    inner = RowSampling.draw

    def remember(self, batch, mask, scores, draw):
        drawn, weights = inner(self, batch, mask, scores, draw)
        for span, key in batch.examples:
            found[key] = drawn[span.row, span.start : span.stop].nonzero().flatten().tolist()
        return drawn, weights

    with monkeypatch.context() as patch:
        patch.setattr(RowSampling, "draw", remember)
        objective(Decoder(model), batch, objective.count(batch), draw=draw)
    return found


@pytest.mark.parametrize("rows", KINDS)
def test_a_draw_depends_on_seed_step_and_example_alone(rows, monkeypatch):
    model = tiny_model(lora=True)
    objective = Objective({"kl": LogitAlignment(0.7, rows=rows, share=0.4)})
    batches = {side: with_documents(make_batch(side=side)) for side in ("left", "right")}
    draws = {side: rows_drawn(objective, model, batch, (1, 5), monkeypatch) for side, batch in batches.items()}
    assert draws["left"] == draws["right"]
    assert len(draws["left"]) == 8
    alone = {}
    for i in range(8):
        example = with_documents(take(make_batch(side="left"), slice(i, i + 1), unpad=True))
        alone |= rows_drawn(objective, model, example, (1, 5), monkeypatch)
    assert alone == draws["left"]
    assert rows_drawn(objective, model, batches["left"], (1, 6), monkeypatch) != alone
    assert rows_drawn(objective, model, batches["left"], (2, 5), monkeypatch) != alone


@pytest.mark.parametrize("rows", KINDS)
def test_micro_batches_change_nothing(rows):
    model = tiny_model(lora=True)
    objective = Objective({"kl": LogitAlignment(0.7, rows=rows, share=0.4)})
    batch = make_batch()

    def together(micro_batches):
        micro_batches = [with_documents(b) for b in micro_batches]
        totals = torch.stack([objective.count(b) for b in micro_batches]).sum(0)
        model.zero_grad()
        loss = sum(objective(Decoder(model), b, totals, draw=(1, 5)).loss for b in micro_batches)
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.parameters() if p.requires_grad]

    one, eight = together([batch]), together([take(batch, slice(i, i + 1)) for i in range(8)])
    assert one[0] == pytest.approx(eight[0], rel=1e-5)
    assert_close_gradients(one[1], eight[1])


def test_measurements_and_share_one_take_every_row():
    model, batch = tiny_model(lora=True), make_batch()
    full = run(Objective({"kl": LogitAlignment(0.7)}), model, [batch])
    sampled = Objective({"kl": LogitAlignment(0.7, rows="random", share=0.3)})
    found = run(sampled, model, [batch])  # no draw
    assert found[:2] == full[:2]
    whole = Objective({"kl": LogitAlignment(0.7, rows="random", share=1.0)})
    model.zero_grad()
    losses = whole(Decoder(model), batch, whole.count(batch), draw=(1, 1))
    assert losses.loss.item() == full[0]
    part = sampled(Decoder(model), batch, sampled.count(batch), draw=(1, 1))
    assert part.loss.item() != full[0]


def test_alpha_zero_is_plain_training_with_sampling_too():
    model, batch = tiny_model(lora={"lora_dropout": 0.3}), make_batch()

    def gradients(objective):
        torch.manual_seed(3)
        model.zero_grad()
        for half in (slice(0, 4), slice(4, 8)):
            part = with_documents(take(batch, half))
            objective(Decoder(model), part, objective.count(batch), draw=(1, 5)).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradients(Objective())
    for rows in KINDS:
        found = gradients(Objective({"kl": LogitAlignment(0.0, rows=rows, share=0.3)}))
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_importance_means_what_it_says(monkeypatch):
    model = tiny_model(lora=True)
    batch = with_documents(take(make_batch(), slice(1, 2), unpad=True))
    chances = {}
    inner = sampling.systematic_weights
    for rows in KINDS:
        with monkeypatch.context() as patch:
            patch.setattr(sampling, "systematic_weights", lambda c, o, r=rows: (chances.update({r: c}), inner(c, o))[1])
            objective = Objective({"kl": LogitAlignment(0.7, rows=rows, share=0.3)})
            objective(Decoder(model), batch, objective.count(batch), draw=(1, 1))
    aligned = LogitAlignment(0.7).select(batch)[0]
    assert chances["random"][aligned].unique().numel() == 1
    ranks = batch.documents[0]
    best, second = (chances["document_rank"][aligned & (ranks == r)] for r in (1, 2))
    assert best.min() > second.max()
    assert best[0] == chances["document_rank"][0]  # what is no document counts as the best one
    with torch.no_grad(), model.disable_adapter():
        logits = model(input_ids=batch.input_ids).logits[0]
    entropy = torch.distributions.Categorical(logits=logits).entropy()[aligned]
    assert (chances["entropy"][aligned][entropy.argsort()].diff() >= -1e-6).all()


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rows": "some"}, "alignment.rows=some"),
        ({"rows": "random", "share": 0.0}, "alignment.share=0.0"),
        ({"rows": "random", "share": 1.5}, "alignment.share=1.5"),
        ({"rows": "random", "share": float("nan")}, "alignment.share=nan"),
        ({"rows": "random", "share": "half"}, "alignment.share=half"),
        ({"share": 0.5}, "alignment.rows=random"),
        ({"rows": "random", "share": 0.5, "official": True}, "alignment.official=true"),
    ],
)
def test_settings_out_of_range_are_named(settings, named):
    with pytest.raises(UserError, match=re.escape(named)):
        LogitAlignment(0.5, **settings)


def test_two_terms_that_need_different_scores_are_refused():
    with pytest.raises(UserError, match="attention and by entropy"):
        Objective({name: LogitAlignment(0.5, rows=name, share=0.5) for name in ("entropy", "attention")})


def test_document_rank_without_documents():
    objective = Objective({"kl": LogitAlignment(0.5, rows="document_rank", share=0.5)})
    batch = make_batch()
    with pytest.raises(UserError, match=r"alignment\.rows=random"):
        objective(Decoder(tiny_model(lora=True)), batch, objective.count(batch), draw=(1, 1))
