"""Self-dialogues on disk: as many as wanted, killed and resumed, filtered, counted."""

import json
import os
import signal
import subprocess
import sys

import pytest

from selfaug.errors import UserError
from selfaug.self_dialogues.filters import Sieve, language
from selfaug.self_dialogues.settings import Filters
from selfaug.self_dialogues.statistics import statistics
from selfaug.self_dialogues.store import DialogueStore, Wanted
from tests.self_dialogues.test_converse import conversation
from tests.tiny import tiny_tokenizer


def numbered(prompts, uniforms, temperature, top_p):
    """Says a number that depends on the random numbers alone; every fifth or so never ends."""
    from selfaug.evaluation.sampling import Sampled

    numbers = [int(row[0] * 1000) for row in uniforms]
    return [Sampled(tiny_tokenizer()(f"number {n}")["input_ids"], n % 5 > 0) for n in numbers]


def extended(folder, wanted, batch_size=4, **settings):
    store = DialogueStore(folder)
    store.extend(conversation(numbered, batch_size=batch_size, **settings), wanted, progress=False)
    return store


def test_whole_batches_until_there_are_enough(tmp_path):
    store = extended(tmp_path, Wanted(dialogues=15))
    progress = store.progress
    assert progress.next % 4 == 0
    assert progress.kept >= 15
    assert progress.kept + sum(progress.dropped.values()) == progress.next
    assert set(progress.dropped) == {"endless question"}
    records = list(store.records())
    assert len(records) == progress.kept
    assert [int(record["id"]) for record in records] == sorted({int(record["id"]) for record in records})
    assert sum(record["tokens"] for record in records) == progress.tokens
    assert any(not record["ended"] for record in records)
    assert len(list(store.lines(Wanted(dialogues=5)))) == 5
    assert store.holds(Wanted(dialogues=progress.kept))
    assert not store.holds(Wanted(dialogues=progress.kept + 1))


def test_token_budget(tmp_path):
    store = extended(tmp_path, Wanted(tokens=60))
    used = [record["tokens"] for record in store.records(Wanted(tokens=60))]
    assert sum(used) >= 60 > sum(used[:-1])
    assert extended(tmp_path, Wanted(dialogues=3, tokens=10**6)).progress == store.progress  # what comes first


def test_more_are_added_to_those_there_are(tmp_path):
    extended(tmp_path / "a", Wanted(dialogues=5))
    extended(tmp_path / "a", Wanted(dialogues=30))
    extended(tmp_path / "b", Wanted(dialogues=30))
    assert (tmp_path / "a/dialogues.jsonl").read_bytes() == (tmp_path / "b/dialogues.jsonl").read_bytes()


_KILLED = """
import os, signal, sys
from pathlib import Path
from tests.self_dialogues import test_store
from tests.self_dialogues.test_store import Wanted, extended, numbered
calls = []
def dying(prompts, uniforms, temperature, top_p):
    calls.append(0)
    if len(calls) == int(sys.argv[2]):
        # What a batch had written when it was killed.
        with open(Path(sys.argv[1]) / "dialogues.jsonl", "ab") as file:
            file.write(b'{"id": "99", "mess')
        os.kill(os.getpid(), signal.SIGKILL)
    return numbered(prompts, uniforms, temperature, top_p)
test_store.numbered = dying
extended(Path(sys.argv[1]), Wanted(dialogues=20), filters={"duplicates": "exact"})
"""


@pytest.mark.parametrize("call", [1, 6])
def test_killed_and_resumed_is_never_killed(tmp_path, call):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p) or "."}
    dead = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "a"), str(call)], env=environment, capture_output=True, text=True
    )
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert (DialogueStore(tmp_path / "a").progress.next > 0) == (call > 1)
    for name in "ab":
        extended(tmp_path / name, Wanted(dialogues=20), filters={"duplicates": "exact"})
    assert (tmp_path / "a/dialogues.jsonl").read_bytes() == (tmp_path / "b/dialogues.jsonl").read_bytes()
    one, other = (DialogueStore(tmp_path / name).progress for name in "ab")
    assert (one.next, one.kept, one.dropped) == (other.next, other.kept, other.dropped)


def test_filters_that_leave_nothing(tmp_path):
    with pytest.raises(
        UserError, match=r"Of the last 40 self-dialogues none could be kept \(endless question \d+, too"
    ):
        extended(tmp_path, Wanted(dialogues=2), filters={"min_words": 1000})


# ---- filters and statistics -----------------------------------------------------------------------------------------


def turn(question, answer="It is the cat that sat there."):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(
    ("filters", "messages", "reason"),
    [
        ({}, turn("", ""), None),
        ({"min_words": 8}, turn("Who?"), "too short"),
        ({"min_words": 7}, turn("Who?"), None),
        ({"max_words": 6}, turn("Who?"), "too long"),
        ({"max_words": 7}, turn("Who?"), None),
        ({"refusals": True}, turn("Who?", "I'm sorry, I cannot say."), "refusal"),
        ({"refusals": True}, turn("Who?"), None),
        ({"language": "en"}, turn("Where was the cat all day?", "It was sleeping in the garden of our house."), None),
        (
            {"language": "en"},
            turn("Wo war die Katze?", "Sie hat den ganzen Tag im Garten geschlafen."),
            "other language",
        ),
        ({"duplicates": "exact"}, turn("  one two THREE four five six"), "duplicate"),
        ({"duplicates": "exact"}, turn("one two three four five"), None),
        ({"duplicates": "near"}, turn("one two three four five"), "near duplicate"),  # 3 of 4 sequences
        ({"duplicates": "near", "similarity": 0.8}, turn("one two three four five"), None),
        ({"duplicates": "near"}, turn("something else"), None),
    ],
)
def test_filters(filters, messages, reason):
    sieve = Sieve(Filters(**filters))
    sieve.remember(turn("One two three four five six"))
    sieve.remember(turn("Another question, about nothing"))
    assert sieve.reason(messages) == reason


def test_language_is_always_the_same():
    assert {language("Ceci est une phrase.") for _ in range(5)} == {"fr"}
    assert language("12345") == "unknown"


def test_statistics(tmp_path):
    store = extended(tmp_path, Wanted(dialogues=3))
    records = [
        {"id": "0", "messages": [*turn("One two"), *turn("Three", "a b")], "ended": True, "tokens": 10},
        {"id": "1", "messages": turn("one  TWO"), "ended": False, "tokens": 5},
    ]
    found = statistics(records, store.progress)
    assert found["dialogues"] == 2
    assert found["turns"] == 1.5
    assert found["tokens"] == 15
    assert found["user_words_mean"] == pytest.approx(5 / 3)
    assert found["assistant_words_median"] == 7
    assert found["duplicates"] == 0.5
    assert found["cut"] == 0.5
    assert found["tokens_per_s"] == store.progress.sampled / store.progress.seconds
    assert json.dumps(statistics([], store.progress))
