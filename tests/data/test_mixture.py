"""Mixtures: which examples, how many, in which steps; and the task as it would be without them."""

import logging
import re
from itertools import chain

import numpy as np
import pytest

from selfaug.data.batching import StepSampler
from selfaug.data.datamodule import RagDataModule
from selfaug.data.dialogue import Dialogue
from selfaug.data.mixture import MixedRows, MixtureSource, choose
from selfaug.data.prompt import PromptConfig
from selfaug.data.schema import Example
from selfaug.errors import UserError
from selfaug.objective import IGNORE, Role
from tests.tiny import tiny_tokenizer

TASKS = 40


class Task:
    def fingerprint(self):
        return "task"

    def examples(self, split, count_tokens):
        for i in range({"train": TASKS, "val": 5, "test": 0}[split]):
            yield Example(f"{split}-{i}", f"Which is {i}?" * (1 + i % 3), (str(i),), ())


class Talk:
    """n dialogues, the longer the later."""

    def __init__(self, n=100, word="so"):
        self.n, self.word, self.asked = n, word, None

    def fingerprint(self):
        return f"talk {self.n} {self.word}"

    def dialogues(self):
        for i in range(self.n):
            turns = (
                {"role": "user", "content": f"{self.word} {i}"},
                {"role": "assistant", "content": "yes " * (i + 1)},
            )
            yield Dialogue(str(i), turns)


def module(tmp_path, mixture=None, **settings):
    settings = {"batch_size": 8, "seed": 3, **settings}
    return RagDataModule(
        Task(), tiny_tokenizer(), PromptConfig(), cache=tmp_path, progress=False, mixture=mixture, **settings
    )


def steps(data, epoch=0):
    """The ids of each step of an epoch, in the sampler's order within the step lost."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [sorted(chain.from_iterable(b.ids for b in step.micro_batches)) for step in loader]


def of(ids, source):
    return [name for name in ids if name.startswith(f"{source}:")]


# ---- which examples -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wanted", "number"), [(0.4, 0), (7, 7), (7.6, 8), (10, 10), (25, 25)])
def test_chosen_by_examples(wanted, number):
    chosen = choose(np.arange(1, 11), wanted, by="examples", lot=(1, "a"))
    assert len(chosen) == number
    counts = np.bincount(chosen, minlength=10)
    assert counts.max() - counts.min() <= 1  # nothing comes again before all have come
    longer = choose(np.arange(1, 11), wanted + 5, by="examples", lot=(1, "a"))
    assert (longer[:number] == chosen).all()  # a larger ratio adds to a smaller one


@pytest.mark.parametrize("wanted", [0, 1, 13, 55, 300])
def test_chosen_by_tokens(wanted):
    lengths = np.arange(1, 11)
    chosen = choose(lengths, wanted, by="tokens", lot=(1, "a"))
    order = choose(lengths, 100, by="examples", lot=(1, "a"))
    sums = [lengths[order[:n]].sum() for n in range(100)]
    assert (chosen == order[: len(chosen)]).all()
    assert abs(lengths[chosen].sum() - wanted) == min(abs(s - wanted) for s in sums)


def test_choice_depends_on_seed_and_name_alone():
    first = choose(np.ones(50), 20, by="examples", lot=(1, "a")).tolist()
    assert first == choose(np.ones(50), 20, by="examples", lot=(1, "a")).tolist()
    assert first != choose(np.ones(50), 20, by="examples", lot=(2, "a")).tolist()
    assert first != choose(np.ones(50), 20, by="examples", lot=(1, "b")).tolist()


class Writes(Talk):
    """Writes as many as are asked for, by words, of which a dialogue has fewer than tokens."""

    def ask(self, tokens):
        self.n = 0
        while sum(i + 1 for i in range(self.n)) < tokens:
            self.n += 1


def test_a_larger_ratio_adds_to_a_smaller_one_where_the_source_writes_more_for_it(tmp_path):
    def chosen(ratio):
        data = module(tmp_path, {"a": MixtureSource(Writes(), ratio, by="tokens")})
        part = data.rows("train").parts[1]
        return {part.rows[int(i)]["id"] for i in part.indices}, len(part.rows)

    (few, written), (many, _) = chosen(0.5), chosen(2.0)
    assert 2 < len(few) < written
    assert few < many


# ---- the order ------------------------------------------------------------------------------------------------------


def order(sources, on_top=False, **settings):
    sampler = StepSampler(
        np.ones(sum(sources.values()), dtype=int), step_size=8, shuffle=True, seed=5, sources=sources, on_top=on_top,
        **settings,
    )  # fmt: skip
    return [list(chain.from_iterable(group.indices for group in step)) for step in sampler], len(sampler)


@pytest.mark.parametrize("on_top", [False, True])
def test_every_step_has_its_share(on_top):
    sources = {"task": 80, "a": 20, "b": 80}
    found, number = order(sources, on_top)
    assert len(found) == number == (10 if on_top else 23)
    assert sorted(chain.from_iterable(found)) == list(range(180))
    for step in found[: None if on_top else -1]:
        counts = [sum(low <= i < high for i in step) for low, high in ((0, 80), (80, 100), (100, 180))]
        for count, n in zip(counts, sources.values(), strict=True):
            assert abs(count - n * len(step) / 180) <= 1
    if on_top:
        assert {len(step) for step in found} == {18}


def test_on_top_the_steps_of_the_task_are_those_without_the_others():
    alone, _ = order({"task": 83})
    for more in ({"a": 1}, {"a": 7, "b": 300}):
        mixed, _ = order({"task": 83, **more}, on_top=True)
        assert [sorted(i for i in step if i < 83) for step in mixed] == [sorted(step) for step in alone]


def test_the_task_keeps_its_order():
    alone = list(chain.from_iterable(sorted(step) for step in order({"task": 16})[0]))
    sampler = StepSampler(np.ones(24, dtype=int), step_size=1, shuffle=True, seed=5, sources={"task": 16, "a": 8})
    mixed = [step[0].indices[0] for step in sampler]
    mine = [i for i in mixed if i < 16]
    assert [*sorted(mine[:8]), *sorted(mine[8:])] == alone
    assert [i >= 16 for i in mixed] == [False, True, False] * 8  # one of each third


def test_a_source_is_shuffled_as_if_it_were_the_only_one():
    def own(sources, start):
        sampler = StepSampler(
            np.ones(sum(sources.values()), dtype=int), step_size=1, shuffle=True, seed=5, sources=sources
        )
        return [i - start for (group,) in sampler for i in group.indices if start <= i < start + 6]

    assert own({"task": 9, "b": 6}, 9) == own({"task": 9, "a": 4, "b": 6}, 13) == own({"task": 9, "a": 0, "b": 6}, 9)


# ---- the data module ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("nll", [True, False])
def test_batches_know_their_sources(tmp_path, packing, nll):
    mixture = {"talk": MixtureSource(Talk(), ratio=0.5, nll=nll), "more": MixtureSource(Talk(9, "more"), ratio=0.25)}
    data = module(tmp_path, mixture, packing=packing, micro_batch_tokens=400)
    batches = [batch for step in data.train_dataloader() for batch in step.micro_batches]
    assert {batch.source_names for batch in batches} == {("task", "talk", "more")}
    names = list(chain.from_iterable(batch.ids for batch in batches))
    assert [len(of(names, source)) for source in ("talk", "more")] == [20, 10]
    assert len(names) == 70
    for batch in batches:
        for span, name in zip(batch.spans, batch.ids, strict=True):
            source = name.split(":")[0] if ":" in name else "task"
            place = (span.row, slice(span.start, span.stop))
            assert batch.of(source)[place].all()
            learned = batch.labels[place] != IGNORE
            response = batch.roles[place] == Role.RESPONSE
            assert response.any()
            assert (learned == (response if nll or source != "talk" else False)).all()
    assert data.mixture.stats(data.rows("train"))["more"] | {"tokens": 0} == {
        "examples": 10, "different": 9, "tokens": 0, "learned": True,
        "dialogues": data.mixture.stats(data.rows("train"))["more"]["dialogues"],
    }  # fmt: skip


def test_ratio_0_is_the_run_without_it(tmp_path):
    plain, zero = module(tmp_path), module(tmp_path, {"talk": MixtureSource(Talk(), ratio=0)})
    assert steps(zero) == steps(plain)
    assert zero.fingerprint == plain.fingerprint == plain.data.fingerprint
    assert not isinstance(zero.rows("train"), MixedRows)
    only = module(tmp_path, {"talk": MixtureSource(Talk(), ratio=0), "more": MixtureSource(Talk(50, "b"), ratio=0.5)})
    assert steps(only) == steps(module(tmp_path, {"more": MixtureSource(Talk(50, "b"), ratio=0.5)}))


def test_validation_is_the_task_s(tmp_path):
    data = module(tmp_path, {"talk": MixtureSource(Talk())})
    names = [name for step in data.val_dataloader() for batch in step.micro_batches for name in batch.ids]
    assert sorted(names) == [f"val-{i}" for i in range(5)]


def test_the_same_examples_in_every_epoch_in_another_order(tmp_path):
    data = module(tmp_path, {"talk": MixtureSource(Talk(), ratio=0.5)})
    first, second = steps(data), steps(data, epoch=1)
    assert sorted(chain.from_iterable(first)) == sorted(chain.from_iterable(second))
    assert first != second


def test_batch_counts_the_task_alone(tmp_path):
    data = module(tmp_path, {"talk": MixtureSource(Talk(), ratio=0.5)}, batch_counts="task")
    found = steps(data)
    assert [len(of(step, "talk")) for step in found] == [4] * 5
    assert [[name for name in step if ":" not in name] for step in found] == steps(module(tmp_path))
    data.load_state_dict({"steps_done": 3})  # resumed within the epoch
    assert steps(data) == found[3:]


def test_by_tokens_and_with_a_limit(tmp_path):
    data = module(tmp_path, {"talk": MixtureSource(Talk(), ratio=0.5, by="tokens", max_tokens=60)}, limit_train=20)
    rows = data.rows("train")
    tokens = rows.tokens()
    assert rows.sizes["task"] == 20
    assert abs(tokens["talk"] - tokens["task"] / 2) <= 60
    assert max(rows[i]["length"] for i in range(20, len(rows))) <= 60
    assert (rows.lengths == [rows[i]["length"] for i in range(len(rows))]).all()


def test_too_few_are_repeated_and_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        rows = module(tmp_path, {"talk": MixtureSource(Talk(8), ratio=0.5)}).rows("train")
    assert rows.sizes == {"task": 40, "talk": 20}
    assert "data.mixture.talk: 20 examples are wanted of 8 that there are: each comes 2.5 times" in caplog.text


def test_a_source_that_writes_is_told_how_many(tmp_path):
    class Writer(Talk):
        def ask(self, examples=None, tokens=None):
            self.asked = examples, tokens

    one, other = Writer(), Writer(word="else")
    data = module(tmp_path, {"a": MixtureSource(one, ratio=0.24), "b": MixtureSource(other, ratio=0.5, by="tokens")})
    data.rows("train")
    assert one.asked == (10, None)
    assert other.asked == (None, -(-data.rows("train").tokens()["task"] // 2))


def test_fingerprint_is_of_all_sources(tmp_path):
    found = {
        module(tmp_path, mixture).fingerprint
        for mixture in ({}, {"a": MixtureSource(Talk())}, {"a": MixtureSource(Talk(99))}, {"b": MixtureSource(Talk())})
    }
    assert len(found) == 4


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("task", {}, "data.mixture.task: a source cannot be called task"),
        ("a b", {}, "data.mixture.a b: a source cannot be called a b: use letters"),
        ("a", {"ratio": -1}, "data.mixture.a.ratio=-1 is not allowed: set it to 0 or a positive number."),
        ("a", {"ratio": "x"}, "data.mixture.a.ratio=x is not allowed"),
        ("a", {"by": "words"}, "data.mixture.a.by=words is unknown: set it to examples or tokens."),
        ("a", {"nll": "no"}, "data.mixture.a.nll=no is not allowed"),
        ("a", {"max_tokens": 1}, "data.mixture.a.max_tokens=1 is not allowed"),
        ("a", {"source": object()}, "data.mixture.a.source is no source of dialogues"),
        ("a", {"source": Talk(0)}, "data.mixture.a has no dialogue left"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, name, settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        module(tmp_path, {name: MixtureSource(**{"source": Talk(), **settings})}).rows("train")
    with pytest.raises(UserError, match=r"data.batch_counts=x is unknown"):
        module(tmp_path, batch_counts="x")
