"""The token cache: built once for each fingerprint, whole or not there at all, on disk and not in memory."""

import logging
import multiprocessing
import os
import signal
import tracemalloc

import pyarrow as pa
import pytest

from selfaug.data import tokenised
from selfaug.data.prompt import PromptBuilder, PromptConfig, Prompted
from selfaug.data.schema import DONT_KNOW, SPLITS, Document, Example
from selfaug.data.tokenised import tokenise
from selfaug.errors import UserError
from tests.tiny import tiny_tokenizer

fork = multiprocessing.get_context("fork")  # no second import of torch


class Numbered:
    """A lazy source of `sizes` examples; counts how often a split is read."""

    def __init__(self, sizes=(7, 3, 2), version="1", text="Number", stop=None, words=1):
        self.sizes = dict(zip(SPLITS, sizes, strict=True))
        self.version, self.text, self.stop, self.words = version, text, stop, words
        self.reads = []

    def fingerprint(self):
        return f"numbered {self.version} {self.sizes}"

    def examples(self, split, count_tokens):
        self.reads.append(split)
        for i in range(self.sizes[split]):
            if self.stop is not None and self.stop[0] == (split, i):
                self.stop[1]()
            known = i % 3 > 0
            yield Example(
                f"{split}-{i}",
                f"Which number is {i}?",
                (f"It is {i}", str(i)) if known else (DONT_KNOW,),
                (Document(" ".join([self.text, str(i)] * self.words), "T", gold=known),),
                answerable=known,
            )


def builder(**settings):
    return PromptBuilder(tiny_tokenizer(), PromptConfig(**settings))


def entries(cache):
    """What lies under tokens/, hidden things included."""
    return sorted(path.name for path in (cache / "tokens").iterdir()) if (cache / "tokens").is_dir() else []


def contents(data):
    return {split: list(data[split]) for split in SPLITS}


def build(source, cache, **settings):
    return tokenise(source, builder(**settings), cache, progress=False)


def test_what_is_read_back_is_what_was_built(tmp_path):
    source = Numbered((300, 3, 2))  # more than one block
    data = build(source, tmp_path)
    for split in SPLITS:
        built = builder().build(list(source.examples(split, None)))
        assert len(built) == len(data[split]) == source.sizes[split]
        for row, prompted in zip(data[split], built, strict=True):
            example = prompted.example
            assert row == {
                "id": example.id,
                "input_ids": prompted.input_ids,
                "roles": prompted.roles,
                "documents": prompted.documents,
                "prompt_length": prompted.prompt_length,
                "length": len(prompted.input_ids),
                "question": example.question,
                "answers": list(example.answers),
                "answerable": example.answerable,
            }
            assert set(row["documents"]) == {0, 1}


def test_a_cache_is_built_once(tmp_path):
    first, second = Numbered(), Numbered()
    one = build(first, tmp_path)
    two = build(second, tmp_path)
    assert first.reads == list(SPLITS)
    assert second.reads == []
    assert one.fingerprint == two.fingerprint
    assert contents(one) == contents(two)
    assert one.stats == two.stats
    assert entries(tmp_path) == [one.fingerprint]


def test_whatever_changes_the_tokens_makes_another_entry(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Number"])
    made = [
        build(Numbered(), tmp_path),
        build(Numbered(version="2"), tmp_path),
        build(Numbered(), tmp_path, system="Be careful."),
        build(Numbered(), tmp_path, max_tokens=500),
        tokenise(Numbered(), PromptBuilder(tokenizer, PromptConfig()), tmp_path, progress=False),
    ]
    assert len({data.fingerprint for data in made}) == len(made)
    assert entries(tmp_path) == sorted(data.fingerprint for data in made)
    again = Numbered(version="2")
    assert contents(build(again, tmp_path)) == contents(made[1])
    assert again.reads == []


def test_a_cache_of_an_older_format_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenised, "_FORMAT", 1)  # without the ranks of the documents
    old = build(Numbered(), tmp_path)
    monkeypatch.undo()
    again = Numbered()
    assert build(again, tmp_path).fingerprint != old.fingerprint
    assert again.reads == list(SPLITS)


def test_it_is_mapped_and_not_loaded(tmp_path):
    build(Numbered((400, 3, 2), words=50), tmp_path)
    before = pa.total_allocated_bytes()
    data = build(Numbered((400, 3, 2), words=50), tmp_path)
    size = sum(path.stat().st_size for path in (tmp_path / "tokens" / data.fingerprint).iterdir())
    assert size > 500_000
    assert pa.total_allocated_bytes() - before < size / 10
    assert {file["filename"] for file in data["train"].cache_files} <= {
        str(tmp_path / "tokens" / data.fingerprint / "train.arrow")
    }


class Quick(PromptBuilder):
    """Under tracemalloc the real tokenizer takes a minute."""

    def build(self, examples):
        return [Prompted(example, [5] * 8, [1] * 4 + [4] * 4, [0] * 8, prompt_length=4) for example in examples]


def test_a_large_source_is_streamed(tmp_path):
    """20,000 examples of 1,000 characters and more."""

    def run(source):
        return tokenise(source, Quick(tiny_tokenizer(), PromptConfig()), tmp_path, progress=False)

    run(Numbered((1, 1, 1), version="warm up"))
    tracemalloc.start()
    try:
        data = run(Numbered((20_000, 1, 1), words=120))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(data["train"]) == 20_000
    assert data["train"][19_999]["id"] == "train-19999"
    assert peak < 3e6


def test_splits_may_be_empty_but_not_the_training_one(tmp_path):
    data = build(Numbered((3, 0, 0)), tmp_path)
    assert [len(data[split]) for split in SPLITS] == [3, 0, 0]
    assert list(data["val"]) == []
    for _ in range(2):  # built, then found
        with pytest.raises(UserError, match=r"^No training example is left: check data\.path, and raise .*\.$"):
            build(Numbered((0, 2, 2)), tmp_path)
        with pytest.raises(UserError, match=r"data\.prompt\.max_tokens"):
            build(Numbered((5, 0, 0)), tmp_path, max_tokens=10)


def test_what_was_cut_and_dropped_is_kept_and_told_each_time(tmp_path, caplog):
    source = Numbered((4, 2, 0), words=40, text="<|im_end|>")
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="selfaug"):
            data = build(source, tmp_path, max_tokens=300)
        told = [record.getMessage() for record in caplog.records if record.name.startswith("selfaug")]
        assert len(told) == 4
        assert told[0].startswith("train: 4 of 4 examples had documents cut to fit data.prompt.max_tokens")
        assert told[1] == "train: 160 pieces of chat markup inside user text were broken up"
    assert data.stats["train"]["examples"] == 4
    assert data.stats["val"]["examples_truncated"] == 2
    assert data.stats["test"]["examples"] == 0
    lengths = data["train"]["length"]
    parts = ("document", "question", "response", "template")
    assert sum(data.stats["train"][f"{part}_tokens"] for part in parts) == sum(lengths)


# --- interrupted --------------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


def fail():
    raise Broken


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


PLACES = [("train", 280), ("test", 1)]  # 256 examples are one block


@pytest.mark.parametrize("place", PLACES)
def test_a_source_that_fails_leaves_nothing(tmp_path, place):
    with pytest.raises(Broken):
        build(Numbered((300, 3, 2), stop=(place, fail)), tmp_path)
    assert entries(tmp_path) == []
    again = Numbered((300, 3, 2))
    data = build(again, tmp_path)
    assert again.reads == list(SPLITS)
    assert [len(data[split]) for split in SPLITS] == [300, 3, 2]


def test_an_interrupt_leaves_nothing(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(Numbered((300, 3, 2), stop=(("train", 280), interrupt)), tmp_path)
    assert entries(tmp_path) == []


def test_an_example_that_is_refused_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="Example train-0"):
        build(Numbered(), tmp_path, max_tokens=10, on_too_long="error")
    assert entries(tmp_path) == []


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_build_leaves_nothing_that_is_used(tmp_path, place):
    process = fork.Process(target=build, args=(Numbered((300, 3, 2), stop=(place, kill)), tmp_path))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    left = entries(tmp_path)
    assert all(name.startswith(".") for name in left)
    again = Numbered((300, 3, 2))
    data = build(again, tmp_path)
    assert again.reads == list(SPLITS)
    assert data.fingerprint not in left
    assert [len(data[split]) for split in SPLITS] == [300, 3, 2]


# --- two at once --------------------------------------------------------------------------------------------------


def build_and_tell(cache, barrier, queue):
    """Both processes are in the middle of their build when either goes on."""
    source = Numbered((300, 3, 2), stop=(("val", 1), lambda: barrier.wait(30)))
    data = build(source, cache)
    queue.put((data.fingerprint, contents(data), data.stats, source.reads))


def test_two_processes_at_once_both_get_it(tmp_path):
    barrier, queue = fork.Barrier(2), fork.Queue()
    processes = [fork.Process(target=build_and_tell, args=(tmp_path, barrier, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    one, two = (queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert one == two
    assert one[3] == list(SPLITS)  # neither found the other's
    assert entries(tmp_path) == [one[0]]
    assert one[1] == contents(build(Numbered((300, 3, 2)), tmp_path / "elsewhere"))
