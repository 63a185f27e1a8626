"""BM25 ranking, filling a context, and the text helpers under both."""

import pytest

from selfaug.data.retrieval import Retriever, fill_context
from selfaug.data.schema import Document
from selfaug.data.text import choose_split, hash_share, normalise_answer, unique_answers

TEXTS = ["the cat sat on the mat", "dogs chase cats", "a treatise on naval gunnery", "gunnery and the cat"]


def count(texts):
    return [len(text.split()) for text in texts]


def document(words, name, gold=False):
    return Document(" ".join([name] * words), gold=gold)


def test_best_text_first():
    assert Retriever(TEXTS).top(["naval gunnery", "chase dogs"], 2) == [[2, 3], [1, 0]]


def test_ties_stand_in_the_order_of_the_texts():
    retriever = Retriever(["same words", "other thing", "same words", "same words"])
    assert retriever.top(["same words", "zebra", ""], 4) == [[0, 2, 3, 1], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_k_larger_than_the_collection_and_empty_collections():
    assert len(Retriever(TEXTS).top(["cat"], 99)[0]) == len(TEXTS)
    assert Retriever([]).top(["cat", "dog"], 3) == [[], []]
    assert Retriever(["", "?"]).top(["cat"], 3) == [[0, 1]]
    assert Retriever(TEXTS).top([], 3) == []


def test_two_retrievers_agree():
    queries = ["cat gunnery", "sat on a mat with dogs"]
    assert Retriever(TEXTS).top(queries, 4) == Retriever(list(TEXTS)).top(queries, 4)


def test_no_progress_bar_unless_asked(capfd):
    Retriever(TEXTS).top(["cat"], 1)
    assert capfd.readouterr().err == ""
    Retriever(TEXTS).top(["cat"], 1, progress=True)
    assert "retrieving" in capfd.readouterr().err


def test_fill_passes_over_what_does_not_fit_and_goes_on():
    a, b, c = document(4, "a"), document(9, "b"), document(3, "c")
    assert fill_context(None, [a, b, c], 8, count) == (a, c)


def test_gold_keeps_its_rank_and_its_room():
    gold = document(5, "g", gold=True)
    a, c = document(4, "a"), document(3, "c")
    unmarked = Document(gold.text)
    assert fill_context(gold, [a, unmarked, c], 9, count) == (a, gold)
    assert fill_context(gold, [a, unmarked, c], 12, count) == (a, gold, c)
    assert fill_context(gold, iter([a, c, unmarked, unmarked]), 8, count) == (c, gold)


def test_gold_that_was_not_retrieved_stands_first():
    gold = document(5, "g", gold=True)
    assert fill_context(gold, [document(2, "a")], 9, count) == (gold, document(2, "a"))


def test_gold_longer_than_the_budget_stands_alone():
    gold = document(50, "g", gold=True)
    assert fill_context(gold, [document(1, "a"), Document(gold.text)], 9, count) == (gold,)


def test_nothing_fits():
    assert fill_context(None, [document(5, "a")], 4, count) == ()


def test_titles_count():
    assert fill_context(None, [Document("two words", title="three more words")], 4, count) == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Beatles!", "beatles"),
        ("An apple a day.", "apple day"),
        ("U.S.A.", "usa"),
        ("theatre", "theatre"),
        ("\t23  years\n", "23 years"),
        ("the", ""),
        ("Zürich", "zürich"),
    ],
)
def test_normalise_answer(text, expected):
    assert normalise_answer(text) == expected


def test_unique_answers_keep_their_order():
    assert unique_answers(["23 years", "23", " 23 ", "", "23 years"]) == ("23 years", "23")


def test_hashes_are_the_same_on_every_machine():
    assert hash_share("key", 0) == pytest.approx(0.7199116456, abs=1e-9)
    assert hash_share("key", 1) != hash_share("key", 0) != hash_share("key", 0, "order")


def test_split_shares():
    splits = [choose_split(str(i), 0.1, 0.2, 0) for i in range(5000)]
    assert splits.count("val") / 5000 == pytest.approx(0.1, abs=0.02)
    assert splits.count("test") / 5000 == pytest.approx(0.2, abs=0.02)
