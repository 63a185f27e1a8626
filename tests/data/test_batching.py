"""Optimiser steps: every example once an epoch, the same ones however a step is cut up, as little padding as pays."""

from dataclasses import replace
from importlib import resources
from itertools import chain, combinations, pairwise

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from selfaug.assets import asset_path
from selfaug.data import batching
from selfaug.data.batching import MicroBatch, Step, StepDataset, StepLoader, StepSampler
from selfaug.data.collate import collate, pack
from selfaug.data.prompt import PromptBuilder, PromptConfig
from selfaug.data.sources.squad import SquadSource
from selfaug.data.tokenised import tokenise
from selfaug.model.decoder import Decoder
from selfaug.objective import IGNORE, LogitAlignment, Objective, Role
from selfaug.objective.batch import token_key
from tests.tiny import VOCAB, tiny_model

N = 53


def lengths(n=N, seed=0):
    return np.random.default_rng(seed).integers(3, 40, n)


def sampler(n=N, *, sizes=None, step_size=8, shuffle=True, **settings):
    return StepSampler(lengths(n) if sizes is None else sizes, step_size=step_size, shuffle=shuffle, **settings)


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


LIMITS = [
    {"micro_batch_size": 1},
    {"micro_batch_size": 3},
    {"micro_batch_size": 8},
    {},
    {"micro_batch_tokens": 60},
    {"micro_batch_tokens": 60, "packing": True},
    {"micro_batch_tokens": 20, "micro_batch_size": 2},
]
GRID = [
    {"world": world, "step_size": size, "n": n, **limits}
    for limits in LIMITS
    for world in (1, 2, 3)
    for size in (1, 8)
    for n in (1, 16, N)
]


def name_of(settings):
    return "-".join(f"{key}={value}" for key, value in settings.items())


def computed_tokens(group, sizes, packing=False):
    """What a forward pass of one process computes."""
    mine = [sizes[i] for i in group.indices]
    return sum(mine) if packing else len(mine) * max(mine)


@pytest.mark.parametrize("settings", GRID, ids=name_of)
def test_every_example_once_an_epoch_and_equally_many_micro_batches(settings):
    steps = epoch(**settings)
    assert len(steps) == -(-settings["n"] // settings["step_size"])
    assert sorted(chain.from_iterable(step_sets(steps))) == list(range(settings["n"]))
    for step in steps:
        assert len({len(rank) for rank in step}) == 1  # FSDP: equally many forward passes
        assert len(step[0]) > 0
        for group in chain(*step):
            assert 1 <= len(group.indices) <= settings.get("micro_batch_size", settings["n"])
            tokens = computed_tokens(group, lengths(settings["n"]), settings.get("packing", False))
            assert tokens <= settings.get("micro_batch_tokens", 10**6) or len(group.indices) == 1
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


@pytest.mark.parametrize("packing", [False, True])
def test_pass_by_pass_the_processes_have_similar_work(packing):
    """Processes wait for the one that works longest; what is left to wait for is a single example that dwarfs all."""
    sizes = long_tail(4096)
    steps = epoch(sizes=sizes, world=4, step_size=64, micro_batch_tokens=4096, packing=packing)
    work = np.array([[sum(computed_tokens(g, sizes, packing) for g in rank) for rank in step] for step in steps])
    assert (work.max(1) / work.mean(1)).mean() < 1.08  # dealt out in turn: 1.2
    for step in steps:
        for groups in zip(*step, strict=True):
            assert len({len(group.indices) for group in groups}) == 1  # 64 examples divide evenly


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
@pytest.mark.parametrize("limits", LIMITS, ids=name_of)
def test_a_step_holds_the_same_examples_however_it_is_cut_up(world, limits):
    assert step_sets(epoch(2, world=world, **limits)) == step_sets(epoch(2))


@pytest.mark.parametrize("limits", LIMITS, ids=name_of)
def test_neighbours_in_length_stand_together(limits):
    sizes = lengths()
    for (micro_batches,) in epoch(**limits):
        flat = [sizes[i] for i in heard(micro_batches)]
        assert flat == sorted(flat)


@pytest.mark.parametrize("limits", LIMITS, ids=name_of)
def test_resuming_begins_at_the_step_and_only_once(limits):
    whole = sampler(**limits)
    all_steps = list(whole)
    for first in (0, 1, 5, len(all_steps) - 1):
        whole.first_step = first
        assert list(whole) == all_steps[first:]
        assert list(whole) == all_steps  # the next epoch begins at its start


# --- the cut ------------------------------------------------------------------------------------------------------


def long_tail(n=2000, seed=0):
    """Log-normal lengths from 50 to 8000, half of them under 600."""
    return np.exp(np.random.default_rng(seed).normal(np.log(600), 1.0, n)).clip(50, 8000).astype(np.int64)


def all_cuts(n):
    """Every way to cut n things into ranges."""
    for count in range(n):
        for inner in combinations(range(1, n), count):
            yield list(pairwise((0, *inner, n)))


def cost(ranges, sizes, packing):
    def computed(start, stop):
        return sum(sizes[start:stop]) if packing else (stop - start) * sizes[stop - 1]

    return sum(computed(*one) + batching._PASS for one in ranges)


def fits(ranges, sizes, size, tokens, packing):
    """Whether every range keeps to the limits, or is one sequence."""
    for start, stop in ranges:
        computed = cost([(start, stop)], sizes, packing) - batching._PASS
        if stop - start > 1 and (stop - start > (size or 99) or computed > (tokens or 10**9)):
            return False
    return True


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("size", "tokens"), [(None, None), (3, None), (None, 900), (2, 700), (None, 1)])
def test_no_other_cut_is_cheaper(size, tokens, packing):
    for seed in range(6):
        sizes = np.sort(np.random.default_rng(seed).integers(5, 400, 1 + seed + 3))
        ranges = batching.cut(sizes, size, tokens, packing)
        assert fits(ranges, sizes, size, tokens, packing)
        others = [cost(c, sizes, packing) for c in all_cuts(len(sizes)) if fits(c, sizes, size, tokens, packing)]
        assert cost(ranges, sizes, packing) == min(others)


def test_an_example_beyond_the_budget_stands_alone():
    assert batching.cut(np.array([10, 10, 10, 500]), None, 100) == [(0, 3), (3, 4)]
    assert batching.cut(np.array([500]), 4, 100) == [(0, 1)]


def useful(sizes, world=1, **settings):
    """Share of the computed tokens that are tokens of an example, over two epochs, silent passes included."""
    steps = [*epoch(0, sizes=sizes, world=world, **settings), *epoch(1, sizes=sizes, world=world, **settings)]
    groups = [group for step in steps for group in chain(*step)]
    real = sum(sizes[i] for group in groups if not group.silent for i in group.indices)
    return real / sum(computed_tokens(group, sizes, settings.get("packing", False)) for group in groups)


def defaults():
    """What selfaug/conf/data/base.yaml says."""
    node = yaml.safe_load(resources.files("selfaug").joinpath("conf/data/base.yaml").read_text())
    limits = {key: node[key] for key in ("micro_batch_size", "micro_batch_tokens", "packing")}
    return {"step_size": node["batch_size"], **limits}


@pytest.mark.parametrize("world", [1, 2])
def test_hardly_anything_is_wasted_on_a_long_tail(world):
    assert useful(long_tail(), world, **defaults()) >= 0.95
    assert useful(long_tail(), world, **defaults() | {"packing": True}) == 1
    # What it is for: padding micro-batches of four in the order of the data.
    sizes = long_tail()
    groups = sizes[: len(sizes) // 4 * 4].reshape(-1, 4)
    assert groups.sum() / (4 * groups.max(1)).sum() < 0.6


@pytest.mark.assets
def test_hardly_anything_is_wasted_on_squad(tmp_path):
    """The packaged questions through the packaged tokenizer, as data=squad makes them."""
    tokenizer = AutoTokenizer.from_pretrained(asset_path("smollm2-135m-instruct"))
    builder = PromptBuilder(tokenizer, PromptConfig(shuffle_documents=True))
    data = tokenise(SquadSource(context_tokens=256), builder, tmp_path, progress=False)
    sizes = np.asarray(data["train"].with_format("numpy")["length"])
    assert len(sizes) > 600
    assert useful(sizes, **defaults()) >= 0.95
    assert useful(sizes, world=2, **defaults()) >= 0.95


# --- batches ------------------------------------------------------------------------------------------------------


def row(name, *roles, seed=0):
    ids = np.random.default_rng([seed, *name.encode()]).integers(1, VOCAB, len(roles)).tolist()
    documents = [1 + i % 2 if role == Role.DOCUMENT else 0 for i, role in enumerate(roles)]
    roles = [int(role) for role in roles]
    return {"id": name, "input_ids": ids, "roles": roles, "documents": documents, "length": len(ids)}


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
    assert batch.documents.tolist() == [[0] * 7, [0, 2, 1, 0, 0, 0, 0]]
    tensors = (batch.input_ids, batch.attention_mask, batch.labels, batch.roles, batch.documents)
    assert {t.dtype for t in tensors} == {torch.int64}
    assert batch.right_padded
    assert not batch.packed
    assert batch.spans == ((0, 0, 3), (1, 0, 7))
    assert batch.keys == (token_key(np.array(b)), token_key(np.array(a)))


def test_pack_leaves_no_padding():
    batch = pack([ROWS[1], ROWS[0]])
    b, a = ROWS[1]["input_ids"], ROWS[0]["input_ids"]
    assert batch.input_ids.tolist() == [[*b, *a]]
    assert batch.attention_mask.tolist() == [[1] * 10]
    assert batch.roles.tolist() == [[T, Q, R, T, D, D, Q, T, R, R]]
    assert batch.labels.tolist() == [[IGNORE, IGNORE, b[2], *[IGNORE] * 5, a[5], a[6]]]
    assert batch.documents.tolist() == [[0, 0, 0, 0, 2, 1, 0, 0, 0, 0]]
    assert batch.ids == ("b", "a")
    assert batch.packed
    assert batch.spans == ((0, 0, 3), (0, 3, 10))
    assert batch.last.nonzero().tolist() == [[0, 2], [0, 9]]


def test_spans_and_keys_are_those_that_the_tokens_tell():
    """Padded or packed, alone or together, an example has one key; nothing has to be worked out on the device."""
    padded, packed = collate(ROWS, 0), pack(ROWS)
    assert padded.examples == replace(padded, spans=(), keys=()).examples
    assert [key for _, key in packed.examples] == [key for _, key in padded.examples]
    assert [collate([one], 0).keys[0] for one in ROWS] == list(padded.keys)
    assert len(set(padded.keys)) == len(ROWS)


def test_rows_without_ranks_give_a_batch_without_ranks():
    bare = [{key: value for key, value in one.items() if key != "documents"} for one in ROWS]
    assert collate(bare, 0).documents is None
    assert pack(bare).documents is None


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


@pytest.mark.parametrize("packing", [False, True])
def test_a_silent_micro_batch_counts_for_nothing_and_keeps_the_graph(packing):
    model = tiny_model(lora=True)
    dataset = StepDataset(ROWS, pad_id=0, packing=packing)
    groups = [MicroBatch((0, 1)), MicroBatch((2,))]
    plain = dataset[groups]
    with_silent = dataset[[*groups, MicroBatch((3,), silent=True)]]
    silent = with_silent.micro_batches[-1]
    assert silent.ids == ()
    assert silent.input_ids.shape == (1, 4)  # a real forward pass
    assert objective().count(silent).tolist() == [0, 0, 0]
    if not packing:
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
