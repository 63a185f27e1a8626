"""The objective against whole logits and torch's own losses; padding, micro-batches, alpha = 0, step 0, empty batches.

Invariants 1, 4 and 6 of the design.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn import functional as F

from selfaug.errors import UserError
from selfaug.model.decoder import Decoder
from selfaug.model.reference import adapters_off
from selfaug.objective import LogitAlignment, Objective, Role, TokenBatch
from selfaug.objective.rows import POSITIONS
from selfaug.objective.sampling import RowSampling
from tests.tiny import FAMILIES, random_batch, tiny_model

DIVERGENCES = ("kl_base_tuned", "kl_tuned_base")
LENGTHS, RESPONSES = (9, 14, 6, 11, 3, 10, 14, 7), (3, 5, 2, 4, 2, 9, 1, 6)
each_family = pytest.mark.parametrize("family", FAMILIES)
each_side = pytest.mark.parametrize("side", ["left", "right"])


def make_batch(lengths=LENGTHS, responses=RESPONSES, **settings) -> TokenBatch:
    """Of the prompts' tokens every third is a document's and the next one the question's."""
    batch = TokenBatch.from_labels(*random_batch(lengths, responses, **settings))
    place = torch.arange(batch.roles.shape[1]) % 3
    prompt = batch.roles == Role.TEMPLATE
    roles = batch.roles.masked_fill(prompt & (place == 1), Role.DOCUMENT)
    return replace(batch, roles=roles.masked_fill(prompt & (place == 2), Role.QUESTION))


def take(batch: TokenBatch, rows: slice, unpad: bool = False) -> TokenBatch:
    """Some examples of a batch; with unpad, one example without its padding."""
    names = ("input_ids", "attention_mask", "labels", "roles")
    parts = {name: getattr(batch, name)[rows] for name in names}
    if unpad:
        keep = parts["attention_mask"][0].bool()
        parts = {name: value[:, keep] for name, value in parts.items()}
    return replace(batch, **parts)


def selfaug(alpha: float = 0.5, **settings) -> Objective:
    return Objective({"kl": LogitAlignment(alpha, **settings)})


def gradients(model) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def run(objective, model, micro_batches, totals=None, seed=0):
    """Losses and gradients, summed over micro-batches. Returns (loss, parts, gradients)."""
    torch.manual_seed(seed)  # dropout
    model.zero_grad()
    decoder = Decoder(model)
    if totals is None:
        totals = torch.stack([objective.count(batch) for batch in micro_batches]).sum(0)
    loss, parts = 0.0, dict.fromkeys(objective.names, 0.0)
    for batch in micro_batches:
        losses = objective(decoder, batch, totals)
        losses.loss.backward()
        loss += losses.loss.item()
        for name, value in losses.parts.items():
            parts[name] += value.item()
    return loss, parts, gradients(model)


def assert_close_gradients(found, expected, relative=1e-4):
    assert len(found) == len(expected) > 0
    scale = max(g.norm().item() for g in expected)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= relative * other.norm() + 1e-6 * scale


# --- against an independent computation ---------------------------------------------------------------------------


def kl_mask(labels, mask, roles, position, boundary):
    """[B, T - 1] bool over the shifted rows, from transformers' tensors; from roles only where these cannot know."""
    token, following = mask[:, :-1].bool(), mask[:, 1:].bool()
    response, predicts_response = labels[:, :-1] != -100, labels[:, 1:] != -100
    exists = token & following
    return {
        "output_logits": exists & predicts_response,
        "all_logits": exists,
        "input_logits": exists & ~response & (boundary | ~predicts_response),
        "document_logits": exists & (roles[:, :-1] == 2) & (boundary | ~predicts_response),
        "question_logits": exists & (roles[:, :-1] == 3) & (boundary | ~predicts_response),
    }[position]


def straightforward(model, base, batch, alpha, position, divergence, boundary):
    """Whole logits of two models, shifted as transformers shifts them, torch's cross_entropy and kl_div."""
    ids, mask, labels = batch.input_ids, batch.attention_mask, batch.labels
    tuned = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    with torch.no_grad():
        reference = base(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    nll = F.cross_entropy(tuned.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    keep = kl_mask(labels, mask, batch.roles, position, boundary)
    log_tuned, log_base = tuned[keep].log_softmax(-1), reference[keep].log_softmax(-1)
    log_q, log_p = (log_tuned, log_base) if divergence == "kl_base_tuned" else (log_base, log_tuned)
    kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return nll + alpha * kl, nll, kl


def check_against_straightforward(family, position="input_logits", divergence="kl_base_tuned", boundary=True):
    model, base = tiny_model(family, lora=True), tiny_model(family)
    batch = make_batch()
    loss, nll, kl = straightforward(model, base, batch, 0.7, position, divergence, boundary)
    loss.backward()
    expected = gradients(model)
    objective = selfaug(0.7, position=position, divergence=divergence, boundary=boundary)
    found, parts, found_gradients = run(objective, model, [batch])
    assert kl.item() > 0.01
    assert parts["nll"] == pytest.approx(nll.item(), rel=1e-5)
    assert parts["kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert found == pytest.approx(loss.item(), rel=1e-5)
    assert_close_gradients(found_gradients, expected)


@each_family
def test_equals_the_straightforward_computation(family):
    check_against_straightforward(family)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("boundary", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_every_setting_equals_the_straightforward_computation(family, position, divergence, boundary):
    if not boundary and position in ("output_logits", "all_logits"):
        with pytest.raises(UserError, match=rf"^alignment\.boundary=false .* of {position}: set"):
            selfaug(position=position, boundary=False)
        return
    check_against_straightforward(family, position, divergence, boundary)


def test_loss_is_nll_plus_weighted_terms():
    model, batch = tiny_model(lora=True), make_batch()
    terms = {
        "kl": LogitAlignment(0.5),
        "answer": LogitAlignment(0.25, "output_logits", "kl_tuned_base"),
        "watched": LogitAlignment(0.0, "all_logits"),
    }
    objective = Objective(terms)
    assert objective.names == ("nll", "kl", "answer", "watched")
    loss, parts, found = run(objective, model, [batch])
    assert loss == pytest.approx(parts["nll"] + 0.5 * parts["kl"] + 0.25 * parts["answer"], rel=1e-6)
    alone = {name: run(Objective({name: term}), model, [batch]) for name, term in terms.items()}
    plain = run(Objective(), model, [batch])
    for name in terms:
        assert parts[name] == pytest.approx(alone[name][1][name], rel=1e-6)
        assert parts[name] > 0.01
    summed = [
        a + b - c for a, b, c in zip(alone["kl"][2], alone["answer"][2], plain[2], strict=True)
    ]  # gradients add up
    assert_close_gradients(found, summed)


def test_a_term_of_ones_own():
    @dataclass
    class Distance:
        """Squared distance of hidden states, on every row that exists."""

        alpha: float = 0.1

        sampling = RowSampling()

        def select(self, batch):
            return batch.roles != 0

        schedule = None

        def total(self, states, head):
            assert not states.reference.requires_grad
            return (states.tuned - states.reference).square().sum()

    model, base, batch = tiny_model(lora=True), tiny_model(), make_batch(side="left")
    objective = Objective({"distance": Distance()})
    keep = batch.attention_mask.bool()
    tuned, reference = (Decoder(m).hidden(batch.input_ids, batch.attention_mask)[keep] for m in (model, base))
    expected = (tuned - reference).square().sum().item() / keep.sum().item()
    loss, parts, _ = run(objective, model, [batch])
    assert objective.count(batch).tolist() == [sum(RESPONSES), sum(LENGTHS)]
    assert parts["distance"] == pytest.approx(expected, rel=1e-5)
    assert loss == pytest.approx(parts["nll"] + 0.1 * expected, rel=1e-5)


def test_counts_are_rows():
    batch = make_batch()
    terms = {
        "input": LogitAlignment(),
        "strict": LogitAlignment(boundary=False),
        "output": LogitAlignment(position="output_logits"),
        "all": LogitAlignment(position="all_logits"),
        "official": LogitAlignment(official=True),
    }
    counts = dict(zip(Objective(terms).names, Objective(terms).count(batch).tolist(), strict=True))
    sequences, tokens, responses = len(LENGTHS), sum(LENGTHS), sum(RESPONSES)
    assert counts == {
        "nll": responses,
        "input": tokens - responses,
        "strict": tokens - responses - sequences,
        "output": responses,
        "all": tokens - sequences,
        "official": sequences * max(LENGTHS) - responses,
    }


# --- invariant 4: padding and micro-batches -----------------------------------------------------------------------


@each_family
@each_side
def test_a_padded_batch_equals_its_examples_one_by_one(family, side):
    model = tiny_model(family, lora=True)
    batch = make_batch((9, 14, 6), (3, 5, 2), side=side)
    whole = run(selfaug(), model, [batch])
    single = run(selfaug(), model, [take(batch, slice(i, i + 1), unpad=True) for i in range(3)])
    assert whole[1]["kl"] > 0.01
    assert whole[0] == pytest.approx(single[0], rel=1e-5)
    assert whole[1] == pytest.approx(single[1], rel=1e-5)
    assert_close_gradients(whole[2], single[2])


@each_side
@pytest.mark.parametrize("position", POSITIONS)
def test_the_cut_into_micro_batches_changes_nothing(side, position):
    model = tiny_model(lora=True)
    batch = make_batch(side=side)
    objective = selfaug(position=position, divergence="kl_tuned_base")
    expected = run(objective, model, [batch])
    for size in (1, 2, 4):
        found = run(objective, model, [take(batch, slice(i, i + size)) for i in range(0, 8, size)])
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        assert found[1] == pytest.approx(expected[1], rel=1e-5)
        assert_close_gradients(found[2], expected[2])


def test_means_are_over_tokens_and_not_over_sequences():
    """With totals per micro-batch instead of per step the result would be another: the test above can see it."""
    model, batch = tiny_model(lora=True), make_batch()
    expected = run(selfaug(), model, [batch])[0]
    decoder = Decoder(model)
    parts = [take(batch, slice(i, i + 1)) for i in range(8)]
    wrong = sum(selfaug()(decoder, part, selfaug().count(part)).loss.item() for part in parts) / 8
    assert abs(wrong / expected - 1) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_official_rows_see_what_the_official_code_sees(side):
    """It calls the model with the attention mask and without positions, so that they count padding."""
    model, batch = tiny_model(lora=True), make_batch((9, 14), (3, 5), side=side)
    with torch.no_grad():
        tuned = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        with adapters_off(model):
            base = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    rows = batch.labels == -100
    tuned, base = tuned[rows].log_softmax(-1), base[rows].log_softmax(-1)
    expected = (base.exp() * (base - tuned)).sum(-1).mean().item()
    found = run(selfaug(official=True), model, [batch])[1]["kl"]
    assert found == pytest.approx(expected, rel=1e-4)


def test_official_rows_depend_on_the_padding():
    """What makes them unfit for anything but a comparison."""
    model = tiny_model(lora=True)
    narrow = make_batch((9, 14), (3, 5))
    wide = TokenBatch.from_labels(
        *(
            F.pad(t, (0, 6), value=v)
            for t, v in ((narrow.input_ids, 0), (narrow.attention_mask, 0), (narrow.labels, -100))
        )
    )
    official = [run(selfaug(official=True), model, [batch])[1]["kl"] for batch in (narrow, wide)]
    ours = [run(selfaug(), model, [batch])[1]["kl"] for batch in (narrow, wide)]
    assert abs(official[0] / official[1] - 1) > 1e-3
    assert ours[0] == pytest.approx(ours[1], rel=1e-5)


def test_padded_ids_do_not_matter():
    model, batch = tiny_model(lora=True), make_batch()
    other = replace(batch, input_ids=torch.where(batch.attention_mask == 0, 41, batch.input_ids))
    one, two = (run(selfaug(), model, [b]) for b in (batch, other))
    assert one[0] == pytest.approx(two[0], rel=1e-6)
    assert_close_gradients(one[2], two[2])


# --- alpha = 0 and step 0 (invariants 1 and 6) --------------------------------------------------------------------


def test_alpha_zero_is_plain_fine_tuning_bit_for_bit():
    """Gradients of every step and the weights after four, with dropout: the reference must not draw random numbers."""
    results = []
    for objective in (Objective(), selfaug(0.0)):
        model = tiny_model(lora={"lora_dropout": 0.2}, attention_dropout=0.1)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(3)
        history = []
        for step in range(4):
            batch = make_batch(seed=step)
            losses = objective(Decoder(model), batch, objective.count(batch))
            optimiser.zero_grad()
            losses.loss.backward()
            history += gradients(model)
            optimiser.step()
        results.append((history, [p.detach().clone() for p in model.parameters()], losses))
    (plain, plain_weights, _), (zero, zero_weights, losses) = results
    assert all(torch.equal(a, b) for a, b in zip(plain, zero, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain_weights, zero_weights, strict=True))
    assert losses.parts["kl"] > 0.01  # measured all the same
    assert not losses.parts["kl"].requires_grad
    # ... and the comparison is not blind: with any weight the gradients are others
    model = tiny_model(lora=True)
    one, other = (run(objective, model, [make_batch()])[2] for objective in (Objective(), selfaug(1e-3)))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@each_family
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_a_fresh_adapter_has_exactly_no_kl(family, autocast):
    """B = 0: no KL and no gradient of it, although the tuned pass runs in train mode with dropout in the adapters."""
    model = tiny_model(family, lora={"lora_dropout": 0.1}, random_b=False)
    batch = make_batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        results = {d: run(selfaug(divergence=d), model, [batch]) for d in DIVERGENCES}
        plain = run(Objective(), model, [batch])
    for _, parts, found in results.values():
        assert parts["kl"] == 0.0
        assert all(torch.equal(a, b) for a, b in zip(found, plain[2], strict=True))


@each_family
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_kl_is_positive_after_a_step(family, divergence):
    model = tiny_model(family, lora=True)
    with torch.no_grad():
        for position in POSITIONS:
            objective = selfaug(position=position, divergence=divergence)
            batch = make_batch()
            assert objective(Decoder(model), batch, objective.count(batch)).parts["kl"] > 0.01


def test_training_with_the_term_stays_nearer_to_the_base_model():
    drift = []
    for alpha in (0.0, 2.0):
        model = tiny_model(lora=True, random_b=False)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        batch, objective = make_batch(), selfaug(alpha)
        first = objective(Decoder(model), batch, objective.count(batch))
        for _ in range(12):
            losses = objective(Decoder(model), batch, objective.count(batch))
            optimiser.zero_grad()
            losses.loss.backward()
            optimiser.step()
        assert losses.parts["nll"] < 0.7 * first.parts["nll"]  # both learn
        drift.append(losses.parts["kl"].item())
    assert drift[1] < 0.5 * drift[0]


# --- batches without rows -----------------------------------------------------------------------------------------


def assert_no_gradient(model, losses):
    model.zero_grad()
    assert losses.loss.requires_grad
    losses.loss.backward()
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(model))


def test_a_batch_without_response_rows():
    model, batch = tiny_model(lora=True), make_batch((9, 14), (0, 0))
    objective = Objective()
    assert objective.count(batch).tolist() == [0]
    losses = objective(Decoder(model), batch, objective.count(batch))
    assert losses.loss == 0
    assert_no_gradient(model, losses)
    loss, parts, found = run(selfaug(), model, [batch])  # its prompt rows are aligned all the same
    assert parts["nll"] == 0
    assert loss == pytest.approx(0.5 * parts["kl"], rel=1e-6)
    assert parts["kl"] > 0.01
    assert any(g.norm() > 0 for g in found)


def test_a_batch_without_aligned_rows():
    model, batch = tiny_model(lora=True), make_batch((5, 9), (4, 8))  # prompts of one token: only boundary rows
    objective = selfaug(boundary=False)
    assert objective.count(batch).tolist() == [12, 0]
    loss, parts, found = run(objective, model, [batch])
    plain_loss, _, plain = run(Objective(), model, [batch])
    assert parts["kl"] == 0
    assert loss == plain_loss
    assert_close_gradients(found, plain)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_without_any_rows(side):
    model, batch = tiny_model(lora=True), make_batch((1, 1), (0, 0), side=side)
    objective = selfaug()
    assert objective.count(batch).tolist() == [0, 0]
    losses = objective(Decoder(model), batch, objective.count(batch))
    assert losses.loss == losses.parts["nll"] == losses.parts["kl"] == 0
    assert_no_gradient(model, losses)


def test_an_empty_micro_batch_adds_nothing_to_its_step():
    model = tiny_model(lora=True)
    full, empty = make_batch(), make_batch((1, 1), (0, 0))
    expected, found = run(selfaug(), model, [full]), run(selfaug(), model, [empty, full])
    assert found[0] == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(found[2], expected[2], strict=True))


# --- with what people use it --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_nothing():
    """The tuned pass is computed again in backward, after the reference: with adapters on and the same dropout."""
    results = []
    for checkpointing in (False, True):
        model = tiny_model(lora={"lora_dropout": 0.2})
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        results.append(run(selfaug(), model, [make_batch()]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][2], results[1][2], strict=True))


def test_under_autocast_close_to_float32():
    model, batch = tiny_model(lora=True), make_batch()
    expected = run(selfaug(), model, [batch])
    with torch.autocast("cpu", torch.bfloat16):
        found = run(selfaug(), model, [batch])
    assert found[1]["nll"] == pytest.approx(expected[1]["nll"], rel=0.03)
    assert found[1]["kl"] == pytest.approx(expected[1]["kl"], rel=0.1)


def test_check_asks_for_a_reference_only_where_a_term_needs_one():
    model = tiny_model()  # no adapters: all of it trains
    Objective().check(model)
    with pytest.raises(UserError, match="no adapters"):
        selfaug().check(model)
    with pytest.raises(UserError, match="no adapters"):
        selfaug(0.0).check(model)  # measuring the KL needs one too
    selfaug().check(tiny_model(lora=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -0.1}, r"^alignment\.alpha=-0\.1 is not allowed: set it to 0 or a positive"),
        ({"alpha": math.nan}, r"^alignment\.alpha=nan"),
        ({"alpha": math.inf}, r"^alignment\.alpha=inf"),
        ({"position": "inputs"}, r"^alignment\.position=inputs is unknown: .*input_logits, output_logits, all_logits"),
        ({"divergence": "forward"}, r"^alignment\.divergence=forward is unknown: .*kl_base_tuned, kl_tuned_base"),
        ({"official": True, "position": "all_logits"}, r"^alignment\.official=true .*position=input_logits"),
        ({"official": True, "boundary": False}, r"^alignment\.official=true .*boundary=true"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        LogitAlignment(**settings)


def test_the_defaults_are_the_papers():
    assert LogitAlignment() == LogitAlignment(0.5, "input_logits", "kl_base_tuned", True, False)
