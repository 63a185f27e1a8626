"""Optimiser steps: every example once an epoch, the same examples however a step is cut up, padding that counts for
nothing."""

from itertools import chain

import numpy as np
import pytest
import torch

from selfaug.data.batching import MicroBatch, Step, StepDataset, StepLoader, StepSampler, collate
from selfaug.model.decoder import Decoder
from selfaug.objective import IGNORE, LogitAlignment, Objective, Role
from tests.tiny import VOCAB, tiny_model

N = 53


def lengths(n=N, seed=0):
    return np.random.default_rng(seed).integers(3, 40, n)


def sampler(n=N, *, step_size=8, micro_batch_size=3, shuffle=True, **settings):
    return StepSampler(lengths(n), step_size=step_size, micro_batch_size=micro_batch_size, shuffle=shuffle, **settings)


def epoch(number=0, **settings):
    """The steps of one epoch, each a list over ranks of micro-batches."""
    world = settings.pop("world", 1)
    ranks = []
    for rank in range(world):
        one = sampler(rank=rank, world=world, **settings)
        one.set_epoch(number)
        ranks.append(list(one))
        assert len(ranks[-1]) == len(one)
    return list(zip(*ranks, strict=True))


def heard(micro_batches):
    return [i for group in micro_batches if not group.silent for i in group.indices]


def step_sets(steps):
    """The examples of each step, of all ranks, in order of their number."""
    return [sorted(chain.from_iterable(heard(rank) for rank in step)) for step in steps]


GRID = [
    {"world": world, "micro_batch_size": micro, "step_size": size, "n": n}
    for world in (1, 2, 3)
    for micro in (1, 3, 8)
    for size in (1, 8)
    for n in (1, 16, N)
]


@pytest.mark.parametrize("settings", GRID, ids=lambda s: "-".join(map(str, s.values())))
def test_every_example_once_an_epoch_and_equally_many_micro_batches(settings):
    steps = epoch(**settings)
    assert len(steps) == -(-settings["n"] // settings["step_size"])
    assert sorted(chain.from_iterable(step_sets(steps))) == list(range(settings["n"]))
    for step in steps:
        assert len({len(rank) for rank in step}) == 1  # FSDP: equally many forward passes
        assert len(step[0]) > 0
        for group in chain(*step):
            assert 1 <= len(group.indices) <= settings["micro_batch_size"]
    assert all(len(found) == settings["step_size"] for found in step_sets(steps)[:-1])


def test_silent_micro_batches_only_where_they_are_needed():
    for settings in GRID:
        for step in epoch(**settings):
            silent = sum(group.silent for group in chain(*step))
            assert silent < settings["world"]
            if settings["world"] == 1:
                assert silent == 0
            assert all(len(group.indices) == 1 for group in chain(*step) if group.silent)


def test_work_is_spread_over_the_processes():
    """Four examples in micro-batches of up to eight, two processes: two each, and nobody is silent."""
    ((one, two),) = epoch(n=4, step_size=8, micro_batch_size=8, world=2)
    assert [len(heard(one)), len(heard(two))] == [2, 2]


def test_the_order_depends_on_seed_and_epoch_only():
    first = step_sets(epoch(0, seed=1))
    assert step_sets(epoch(0, seed=1)) == first
    assert step_sets(epoch(1, seed=1)) != first
    assert step_sets(epoch(0, seed=2)) != first
    np.random.seed(7)
    torch.manual_seed(7)
    assert step_sets(epoch(0, seed=1)) == first
    # A pair of numbers, not their sum.
    assert step_sets(epoch(1, seed=0)) != step_sets(epoch(0, seed=1))
    # The lengths decide what stands together in a micro-batch, never which step an example is in.
    other = StepSampler(lengths(seed=9), step_size=8, micro_batch_size=3, shuffle=True, seed=1)
    assert [sorted(heard(step)) for step in other] == first


def test_unshuffled_is_the_order_of_the_data_in_every_epoch():
    expected = [list(range(i, min(i + 8, N))) for i in range(0, N, 8)]
    for number in (0, 3):
        assert step_sets(epoch(number, shuffle=False)) == expected


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 5, 8, 20])
def test_a_step_holds_the_same_examples_however_it_is_cut_up(world, micro_batch_size):
    assert step_sets(epoch(2, world=world, micro_batch_size=micro_batch_size)) == step_sets(epoch(2))


def test_neighbours_in_length_stand_together():
    sizes = lengths()
    for (micro_batches,) in epoch():
        flat = [sizes[i] for i in heard(micro_batches)]
        assert flat == sorted(flat)


def test_resuming_begins_at_the_step_and_only_once():
    whole = sampler()
    all_steps = list(whole)
    for first in (0, 1, 5, len(all_steps) - 1):
        whole.first_step = first
        assert list(whole) == all_steps[first:]
        assert list(whole) == all_steps  # the next epoch begins at its start


# --- batches ------------------------------------------------------------------------------------------------------


def row(name, *roles, seed=0):
    ids = np.random.default_rng([seed, *name.encode()]).integers(1, VOCAB, len(roles)).tolist()
    return {"id": name, "input_ids": ids, "roles": [int(role) for role in roles], "length": len(ids)}


T, D, Q, R = Role.TEMPLATE, Role.DOCUMENT, Role.QUESTION, Role.RESPONSE
ROWS = [row("a", T, D, D, Q, T, R, R), row("b", T, Q, R), row("c", D, D, D, D, Q, T, R, R, R, R), row("d", T, Q, T, R)]


def test_collate_pads_on_the_right():
    batch = collate([ROWS[1], ROWS[0]], pad_id=7)
    b, a = ROWS[1]["input_ids"], ROWS[0]["input_ids"]
    assert batch.ids == ("b", "a")
    assert batch.input_ids.tolist() == [[*b, 7, 7, 7, 7], a]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0, 0, 0], [1] * 7]
    assert batch.roles.tolist() == [[T, Q, R, 0, 0, 0, 0], [T, D, D, Q, T, R, R]]
    assert batch.labels.tolist() == [[IGNORE, IGNORE, b[2], *[IGNORE] * 4], [*[IGNORE] * 5, a[5], a[6]]]
    assert {t.dtype for t in (batch.input_ids, batch.attention_mask, batch.labels, batch.roles)} == {torch.int64}


def test_a_pad_token_inside_the_text_is_a_token_like_any_other():
    """Where the tokenizer has no padding token of its own, pad is eos: the end of the response is learned."""
    eos = ROWS[1]["input_ids"][-1]
    batch = collate([ROWS[1], ROWS[0]], pad_id=eos)
    assert batch.attention_mask[0].tolist() == [1, 1, 1, 0, 0, 0, 0]
    assert batch.labels[0].tolist() == [IGNORE, IGNORE, eos, *[IGNORE] * 4]


def objective():
    return Objective({"kl": LogitAlignment(0.5), "out": LogitAlignment(0.3, "output_logits")})


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def run(model, step, totals):
    model.zero_grad()
    parts = []
    for batch in step.micro_batches:
        losses = objective()(Decoder(model), batch, totals)
        losses.loss.backward()
        parts.append(losses)
    return parts


def test_a_silent_micro_batch_counts_for_nothing_and_keeps_the_graph():
    model = tiny_model(lora=True)
    dataset = StepDataset(ROWS, pad_id=0)
    groups = [MicroBatch((0, 1)), MicroBatch((2,))]
    plain = dataset[groups]
    with_silent = dataset[[*groups, MicroBatch((3,), silent=True)]]
    silent = with_silent.micro_batches[-1]
    assert silent.ids == ()
    assert silent.input_ids.shape == (1, 4)  # a real forward pass
    assert objective().count(silent).tolist() == [0, 0, 0]
    official = Objective({"kl": LogitAlignment(0.5, official=True)})
    assert official.count(silent).tolist() == [0, 0]

    totals = sum(objective().count(batch) for batch in plain.micro_batches)
    run(model, plain, totals)
    expected = gradients(model)
    parts = run(model, with_silent, totals)
    assert parts[-1].loss.item() == 0
    assert [part.item() for part in parts[-1].parts.values()] == [0, 0, 0]
    assert all(torch.equal(*pair) for pair in zip(gradients(model), expected, strict=True))

    run(model, Step((silent,)), torch.zeros(3, dtype=torch.int64))  # a process that has nothing else
    assert all(not gradient.any() for gradient in gradients(model))
    assert len(gradients(model)) == len(expected)  # none is missing: every gradient is there and 0


def loader(n=11, step_size=4, **settings):
    rows = [row(str(i), *[T] * (2 + i % 5), R) for i in range(n)]
    sizes = np.array([one["length"] for one in rows])
    return StepLoader(
        StepDataset(rows, 0), StepSampler(sizes, step_size=step_size, micro_batch_size=2, shuffle=True), **settings
    )


def names(step):
    return sorted(chain.from_iterable(batch.ids for batch in step.micro_batches))


def test_a_loader_counts_the_steps_and_skips():
    ours = loader()
    assert len(ours) == 3
    steps = []
    for i, step in enumerate(ours, start=1):
        assert ours.steps_done == i
        steps.append(names(step))
    assert sorted(chain.from_iterable(steps)) == sorted(map(str, range(11)))
    for skipped in (0, 1, 2):
        ours.skip(skipped)
        found = []
        for i, step in enumerate(ours, start=skipped + 1):
            assert ours.steps_done == i
            found.append(names(step))
        assert found == steps[skipped:]
    ours.skip(3)  # a checkpoint at the end of an epoch: the next one begins at its start
    assert [names(step) for step in ours] == steps


def test_a_loaders_state_resumes_within_the_epoch():
    first, second = loader(), loader()
    everything = [names(step) for step in loader()]
    for step in first:
        seen = names(step)
        break
    assert seen == everything[0]
    assert first.state_dict() == {"steps_done": 1}
    second.load_state_dict(first.state_dict())
    assert [names(step) for step in second] == everything[1:]


def test_worker_processes_give_the_same_steps():
    ours = loader(num_workers=1, multiprocessing_context="fork")
    ours.skip(1)
    assert [names(step) for step in ours] == [names(step) for step in loader()][1:]
    assert ours.steps_done == 3


def test_a_step_moves_as_a_whole():
    step = StepDataset(ROWS, 0)[[MicroBatch((0, 1)), MicroBatch((2,))]]
    moved = step.to(torch.device("meta"))
    assert isinstance(moved, Step)
    assert {batch.roles.device.type for batch in moved.micro_batches} == {"meta"}
    assert [batch.ids for batch in moved.micro_batches] == [("a", "b"), ("c",)]
