"""Data sources and weights of tokens: what is learned of whom, what is measured, and what the terms see."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from selfaug.data.collate import collate, pack
from selfaug.errors import UserError
from selfaug.model.reference import AdaptersOff
from selfaug.objective import IGNORE, HiddenAlignment, LogitAlignment, Objective, Role, TokenBatch
from tests.objective.test_objective import gradients, make_batch, run, straightforward
from tests.tiny import tiny_model

NAMES = ("task", "dialogues", "notes")
OF = (0, 1, 0, 2, 1, 0, 1, 0)  # the source of each example of make_batch


def mixed(**changes) -> TokenBatch:
    batch = make_batch()
    sources = torch.tensor(OF)[:, None].expand_as(batch.input_ids)
    return replace(batch, sources=sources, source_names=NAMES, **changes)


def only(batch: TokenBatch, source: int) -> TokenBatch:
    keep = torch.tensor([of == source for of in OF])
    return replace(
        batch, input_ids=batch.input_ids[keep], attention_mask=batch.attention_mask[keep], labels=batch.labels[keep],
        roles=batch.roles[keep], sources=None, source_names=("task",),
    )  # fmt: skip


def test_the_nll_is_measured_of_each_source_and_learned_of_all():
    model, batch = tiny_model(lora=True), mixed()
    loss, parts, found = run(Objective(sources=NAMES), model, [batch])
    assert list(parts) == ["nll", "nll_task", "nll_dialogues", "nll_notes"]
    for number, name in enumerate(NAMES):
        _, alone, _ = run(Objective(), model, [only(batch, number)])
        assert parts[f"nll_{name}"] == pytest.approx(alone["nll"], rel=1e-5)
    plain_loss, _, expected = run(Objective(), model, [batch])
    assert loss == plain_loss
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("term", [LogitAlignment, HiddenAlignment])
def test_a_term_of_one_source_sees_its_examples_alone(term):
    batch = mixed()

    def penalty(objective: Objective, batch: TokenBatch) -> float:
        _, parts, _ = run(objective, tiny_model(lora=True), [batch])
        objective.close()
        return parts["kl"]

    of_dialogues = penalty(Objective({"kl": term(0.5, source="dialogues")}, sources=NAMES), batch)
    assert of_dialogues == pytest.approx(penalty(Objective({"kl": term(0.5)}), only(batch, 1)), rel=1e-4)
    assert of_dialogues != pytest.approx(penalty(Objective({"kl": term(0.5)}), batch), rel=1e-3)


def test_responses_that_are_not_learned_are_aligned_all_the_same():
    model, base, batch = tiny_model(lora=True), tiny_model(), mixed()
    learned = torch.tensor(OF)[:, None] == 0
    batch = replace(batch, labels=batch.labels.masked_fill(~learned, IGNORE))
    term = LogitAlignment(0.5, position="output_logits", source="dialogues")
    objective = Objective({"kl": term}, sources=NAMES)
    loss, parts, found = run(objective, model, [batch])
    assert parts["nll"] == parts["nll_task"]
    assert parts["nll_dialogues"] == 0  # none of its rows is learned
    counts = dict(zip(objective.names, objective.count(batch).tolist(), strict=True))
    assert counts["nll"] == counts["nll_task"] > 0
    assert counts["nll_dialogues"] == 0
    assert counts["kl"] == ((mixed().labels != IGNORE) & (torch.tensor(OF)[:, None] == 1)).sum()

    model.zero_grad()
    task, dialogues = only(mixed(), 0), only(mixed(), 1)
    _, nll, _ = straightforward(model, base, task, 0.0, "output_logits", "kl_base_tuned", True)
    _, _, kl = straightforward(model, base, dialogues, 1.0, "output_logits", "kl_base_tuned", True)
    (nll + 0.5 * kl).backward()
    assert loss == pytest.approx((nll + 0.5 * kl).item(), rel=1e-4)
    for one, other in zip(found, gradients(model), strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6


def test_a_source_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"data source dialogue, .* one of task, dialogues, notes, or add dialogue to"):
        Objective({"kl": LogitAlignment(source="dialogue")}, sources=NAMES)
    with pytest.raises(UserError, match=r"one of task, or add dialogues to data\.mixture"):
        Objective({"kl": LogitAlignment(source="dialogues")})


def test_what_a_term_cannot_be():
    for name in ("nll", "weighted_nll", "nll_task", "learn", "loss", "alpha", "lr", "tokens", "grad_norm", "drift"):
        with pytest.raises(UserError, match=f"cannot be called {name}"):
            Objective({name: LogitAlignment()})
    with pytest.raises(UserError, match=r"official=true counts padding, which belongs to no data source"):
        LogitAlignment(official=True, source="dialogues")


@pytest.mark.parametrize("term", [LogitAlignment, HiddenAlignment])
def test_the_base_model_is_asked_only_where_a_term_has_rows(term):
    asked = []

    class Counted(AdaptersOff):
        def states(self, decoder, tokens, **settings):
            asked.append(tokens)
            return super().states(decoder, tokens, **settings)

    batch = mixed()
    tasks, others = only(batch, 0), only(batch, 1)
    nobody = replace(tasks, sources=torch.zeros_like(tasks.input_ids), source_names=NAMES)
    ours = replace(others, sources=torch.ones_like(others.input_ids), source_names=NAMES)
    objective = Objective({"kl": term(0.5, source="dialogues")}, reference=Counted(), sources=NAMES)
    loss, parts, found = run(objective, tiny_model(lora=True), [nobody])
    assert parts["kl"] == 0
    # A hidden-state term watches the model's modules in any case.
    assert len(asked) == (1 if term is HiddenAlignment else 0)
    plain_loss, _, plain = run(Objective(sources=NAMES), tiny_model(lora=True), [nobody])
    assert loss == plain_loss
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))
    asked.clear()
    _, parts, _ = run(objective, tiny_model(lora=True), [ours])
    assert parts["kl"] > 0
    assert len(asked) == 1


class Halves:
    """0.5 for the tokens that are hard, 2 for the others."""

    def __call__(self, nll, hidden, head):
        assert not torch.is_grad_enabled()
        assert not nll.requires_grad
        assert hidden.shape == (len(nll), head.arguments()["weight"].shape[1])
        return torch.where(nll > nll.median(), 0.5, 2.0)


def test_weighted_tokens_are_what_is_minimised_and_the_nll_what_is_measured():
    model, batch = tiny_model(lora=True), make_batch()
    loss, parts, found = run(Objective(weights=Halves()), model, [batch])
    assert list(parts) == ["nll", "weighted_nll"]
    assert loss == parts["weighted_nll"] != parts["nll"]

    model.zero_grad()
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].float()
    labels = batch.labels[:, 1:]
    each = F.cross_entropy(logits[labels != IGNORE], labels[labels != IGNORE], reduction="none")
    expected = (each * torch.where(each > each.median(), 0.5, 2.0).detach()).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert parts["nll"] == pytest.approx(each.mean().item(), rel=1e-5)
    for one, other in zip(found, gradients(model), strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6


def test_rows_of_several_sources_become_a_batch():
    response, question = int(Role.RESPONSE), int(Role.QUESTION)
    rows = [
        {"id": "a", "input_ids": [5, 6, 7, 8], "roles": [question, question, response, response], "length": 4,
         "source": 0, "learn": 1},
        {"id": "b", "input_ids": [5, 9, 7], "roles": [question, response, response], "length": 3, "source": 1,
         "learn": 0},
        {"id": "c", "input_ids": [4, 9, 3], "roles": [question, response, response], "length": 3, "source": 1,
         "learn": [1, 0, 1]},
    ]  # fmt: skip
    padded = collate(rows, 0, ("task", "dialogues"))
    assert padded.labels.tolist() == [[IGNORE, IGNORE, 7, 8], [IGNORE] * 4, [IGNORE, IGNORE, 3, IGNORE]]
    assert padded.of("task").tolist() == [[True] * 4, [False] * 4, [False] * 4]  # padding is nobody's
    assert not padded.of("notes").any()
    packed = pack(rows, ("task", "dialogues"))
    assert packed.labels[0].tolist() == [IGNORE, IGNORE, 7, 8, *[IGNORE] * 5, 3]
    assert packed.of("dialogues")[0].tolist() == [False] * 4 + [True] * 6
    assert collate(rows[:1], 0).sources is None
