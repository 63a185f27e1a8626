"""STM's choice of tokens against the base model's own logits; packed, over processes, narrowed and in training."""

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from selfaug.data.batching import MicroBatch, StepDataset, StepLoader, StepSampler
from selfaug.data.low_perplexity import LowPerplexity
from selfaug.errors import UserError
from selfaug.model.decoder import Decoder
from selfaug.objective import IGNORE, Objective, Role
from selfaug.objective.preparation import Preparation
from tests.test_module import make_rows, train, weights
from tests.tiny import tiny_model

THRESHOLD = 2e4  # about half of a random model's tokens are below


def loader(rows, packing=False) -> StepLoader:
    lengths = np.array([row["length"] for row in rows])
    sampler = StepSampler(lengths, step_size=5, micro_batch_size=2, packing=packing, shuffle=True)
    return StepLoader(StepDataset(rows, 0, packing), sampler)


def preparation(model, source, **changes) -> Preparation:
    steps = len(source.sampler)
    return replace(Preparation(model, source, steps, 0, 1, lambda tensor: tensor, None, progress=False), **changes)


def perplexities(row) -> np.ndarray:
    """[T] of each token of an example under the base model, from transformers' logits; token 0 has none."""
    ids = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        logits = tiny_model()(input_ids=ids).logits[0, :-1]
    return np.concatenate([[np.inf], F.cross_entropy(logits, ids[0, 1:], reduction="none").exp().numpy()])


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_tokens_that_the_base_model_finds_likely_are_learned(packing, caplog):
    rows, model = make_rows(17), tiny_model(lora={"lora_dropout": 0.5})  # whose tuned model is another
    source, choice = loader(rows, packing), LowPerplexity(THRESHOLD)
    at = preparation(model, source)
    caplog.set_level(logging.INFO)
    measured = choice.use(choice.prepare(at), at)
    kept = total = left = 0
    for i, row in enumerate(rows):
        wanted = (perplexities(row) <= THRESHOLD) & (np.array(row["roles"]) == Role.RESPONSE)
        assert np.array_equal(source.dataset.rows[i]["learn"], wanted.astype(np.int8))
        kept, total, left = kept + wanted.sum(), total + row["roles"].count(Role.RESPONSE), left + wanted.any()
    assert 0.2 < kept / total < 0.8
    assert measured == {"learned_tokens": pytest.approx(kept / total), "learned_examples": pytest.approx(left / 17)}
    assert f"{kept} of {total} response tokens, in {left} of 17 examples, are learned" in caplog.text
    assert model.training
    learned = sum(int((b.labels != IGNORE).sum()) for step in source for b in step.micro_batches)
    responses = sum(int((b.roles == Role.RESPONSE).sum()) for step in source for b in step.micro_batches)
    assert (learned, responses) == (kept, total)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_work_and_come_to_the_same_choice(world):
    rows, model, choice = make_rows(17), tiny_model(lora=True), LowPerplexity(THRESHOLD)
    alone = choice.prepare(preparation(model, loader(rows)))
    sent: list[list[torch.Tensor]] = []
    for rank in range(world):
        source, mine = loader(rows), []
        source.sampler.rank, source.sampler.world = rank, world
        record = lambda tensor, mine=mine: mine.append(tensor) or tensor  # noqa: E731
        choice.prepare(preparation(model, source, rank=rank, world=world, over_processes=record))
        sent.append(mine)
    mask, tokens = (torch.stack(parts).sum(0) for parts in zip(*sent, strict=True))
    assert mask.max() == 1
    assert all(0 < part.sum() < mask.sum() for part, _ in sent)
    assert int(tokens) == alone["seen"][0]
    ends = np.cumsum([row["length"] for row in rows])
    places = torch.cat([part.nonzero().flatten() for part in mask.tensor_split(ends[:-1].tolist())])
    assert torch.equal(places.int(), alone["positions"])


def test_what_is_not_learned_anyway_stays_so():
    rows = [{**row, "learn": i % 2} for i, row in enumerate(make_rows(8))]
    source, choice = loader(rows), LowPerplexity(math.inf)
    at = preparation(tiny_model(lora=True), source)
    measured = choice.use(choice.prepare(at), at)
    assert measured == {"learned_tokens": 1.0, "learned_examples": 0.5}
    for i in range(8):
        row = source.dataset.rows[i]
        assert row["learn"].sum() == (i % 2) * row["roles"].count(Role.RESPONSE)


def test_only_the_steps_that_are_made_are_looked_at():
    rows, choice = make_rows(17), LowPerplexity(math.inf)
    source = loader(rows)
    found = choice.prepare(preparation(tiny_model(lora=True), source, steps=2))
    used = {i for step in list(source.sampler)[:2] for group in step for i in group.indices}
    assert found["seen"][1] == len(used) == 10
    assert set(found["counts"].nonzero().flatten().tolist()) == used


def chosen(rows, threshold):
    """The rows as LowPerplexity leaves them."""
    source, choice = loader(rows), LowPerplexity(threshold)
    at = preparation(tiny_model(lora=True), source)
    choice.use(choice.prepare(at), at)
    return [source.dataset.rows[i] for i in range(len(rows))]


def trained(rows):
    """The model after 3 epochs, with dropout, and what was logged."""
    return train(Objective(), rows, lora={"lora_dropout": 0.2}, loading={"micro_batch_size": 3}, max_epochs=3)


def test_a_threshold_that_all_pass_is_plain_lora_bit_for_bit():
    rows = make_rows(16)
    plain, _ = trained(rows)
    same, _ = trained(chosen(rows, math.inf))
    other, record = trained(chosen(rows, THRESHOLD))
    assert all(torch.equal(value, weights(same)[name]) for name, value in weights(plain).items())
    assert any(not torch.equal(value, weights(other)[name]) for name, value in weights(plain).items())
    assert 0 < record.rows[0]["train/rows_nll"] < sum(row["roles"].count(Role.RESPONSE) for row in rows)


def test_examples_without_a_token_left_add_nothing():
    rows = make_rows(4)
    source = loader([{**row, "learn": 0} for row in rows])
    (batch,) = source.dataset[[MicroBatch(tuple(range(4)))]].micro_batches
    model = tiny_model(lora=True)
    losses = Objective()(Decoder(model), batch, torch.tensor([0]))
    losses.loss.backward()
    assert losses.loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_next_to_nothing_left_is_a_warning_and_nothing_an_error(caplog):
    rows = make_rows(17)
    found = [perplexities(row)[np.array(row["roles"]) == Role.RESPONSE] for row in rows]
    lowest, second, *_ = np.sort(np.concatenate(found)).tolist()
    source = loader(rows)
    at = preparation(tiny_model(lora=True), source)
    few = LowPerplexity(second * 1.01)
    few.use(few.prepare(at), at)
    assert "next to nothing to learn from" in caplog.text
    none = LowPerplexity(lowest * 0.99)
    with pytest.raises(UserError, match=r"^method\.learn\.threshold=.* leaves none of \d+ response tokens.*raise it"):
        none.use(none.prepare(preparation(tiny_model(lora=True), loader(rows))), at)


@pytest.mark.parametrize("threshold", [1.0, -2, "high", float("nan")])
def test_thresholds_that_are_refused(threshold):
    with pytest.raises(UserError, match=r"^method\.learn\.threshold=.* is not allowed"):
        LowPerplexity(threshold)
