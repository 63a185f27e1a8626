"""Scores of two models on the same questions, worked out by hand; samples; answers from token rows."""

from typing import Any

import pytest

from selfaug.errors import UserError
from selfaug.evaluation.generation import generate
from selfaug.evaluation.rag import answer_questions, samples, score_answers
from selfaug.evaluation.statistics import bootstrap, paired_difference
from tests.tiny import TOKENIZER_VOCAB, tiny_model, tiny_tokenizer

ANSWERS = [["Jane Austen", "Austen"], ["1815"], ["red house"], ["I don't know"]]
#          judged: correct (exact F1 1/2)   missing         incorrect (F1 1/2)    missing, and rightly so
BASE = ["It was Jane Austen, wasn't it", "I don't know", "blue house", "I don't know."]
#          exact             correct         correct (F1 4/5)      incorrect
TUNED = ["Austen", "in 1815", "the big red house", "a goat"]


def test_scores_by_hand():
    scores = score_answers(ANSWERS, BASE, TUNED)
    assert list(scores) == ["exact_match", "f1", "crag_score", "correct", "missing", "incorrect"]
    # Normalised "it was jane austen wasnt it" has 6 words, 2 of them shared: F1 = 4 / 8.
    f1_base = [0.5, 0.0, 0.5, 1.0]
    f1_tuned = [1.0, 2 / 3, 0.8, 0.0]
    means = {name: (metric["base"].mean, metric["tuned"].mean) for name, metric in scores.items()}
    assert means["exact_match"] == (0.25, 0.25)
    assert means["f1"] == pytest.approx((sum(f1_base) / 4, sum(f1_tuned) / 4))
    assert means["correct"] == (0.25, 0.75)
    assert means["missing"] == (0.5, 0.0)
    assert means["incorrect"] == (0.25, 0.25)
    assert means["crag_score"] == (0.0, 0.5)
    for metric in scores.values():
        intervals = {part: metric[part] for part in ("base", "tuned", "difference")}
        assert set(metric) == {*intervals, "items", "asked"}
        assert metric["difference"].mean == pytest.approx(metric["tuned"].mean - metric["base"].mean)
        assert all(one.n == 4 and one.low <= one.mean <= one.high for one in intervals.values())
    assert scores["f1"]["items"] == pytest.approx(f1_tuned, rel=1e-5)
    assert score_answers([*ANSWERS[:3], ["no"]], BASE, TUNED)["f1"]["asked"] != scores["f1"]["asked"]
    assert scores["f1"]["base"] == bootstrap(f1_base)
    assert scores["f1"]["difference"] == paired_difference(f1_base, f1_tuned)


def test_difference_is_paired():
    """Questions of very different difficulty, the same gain on each: the difference has no spread."""
    answers = [["a b c d"], ["e"]] * 10
    scores = score_answers(answers, ["x"] * 20, ["x"] * 20)
    assert scores["f1"]["difference"].low == scores["f1"]["difference"].high == 0.0
    half = ["yes", "no"] * 10
    both = score_answers([["yes"]] * 20, half, half)["exact_match"]
    assert both["base"].low < 0.5 < both["base"].high
    assert (both["difference"].low, both["difference"].high) == (0.0, 0.0)


def test_seed_decides_the_interval_and_nothing_else():
    answers, base, tuned = ANSWERS * 10, BASE * 10, TUNED * 10  # of a few there is no drawing
    again = score_answers(answers, base, tuned, seed=0)
    assert again == score_answers(answers, base, tuned, seed=0)
    other = score_answers(answers, base, tuned, seed=1)
    assert other != again
    assert other["f1"]["base"].mean == again["f1"]["base"].mean


def test_nothing_to_score():
    with pytest.raises(UserError, match="at least one item"):
        score_answers([], [], [])
    with pytest.raises(ValueError, match="zip"):
        score_answers(ANSWERS, BASE[:3], TUNED)


def rows(n: int) -> list[dict[str, Any]]:
    return [{"id": f"q{i}", "question": f"why {i}?", "answers": (f"{i}",)} for i in range(n)]


def test_samples_prefer_a_mix():
    base = [f"b{i}" for i in range(12)]
    tuned = list(base)
    tuned[3], tuned[7], tuned[9] = "other", "words", "here"
    for seed in range(10):
        chosen = samples(rows(12), base, tuned, n=3, seed=seed)
        assert sum(sample["base"] != sample["tuned"] for sample in chosen) == 2
        numbers = [int(sample["id"][1:]) for sample in chosen]
        assert numbers == sorted(set(numbers))
        for i, sample in zip(numbers, chosen, strict=True):
            expected = {"question": f"why {i}?", "answers": [f"{i}"], "base": base[i], "tuned": tuned[i]}
            assert sample == {"id": f"q{i}", **expected}
    assert samples(rows(12), base, tuned, seed=4) == samples(rows(12), base, tuned, seed=4)
    assert len({str(samples(rows(12), base, tuned, seed=seed)) for seed in range(10)}) > 3


@pytest.mark.parametrize(("differing", "n", "shown"), [(0, 3, 3), (5, 3, 3), (4, 3, 3), (1, 9, 5), (2, 0, 0)])
def test_samples_are_as_many_as_there_are(differing, n, shown):
    base = ["same"] * 5
    tuned = ["other"] * differing + base[differing:]
    assert len(samples(rows(5), base, tuned, n=n)) == shown


def test_samples_of_unequal_lists():
    with pytest.raises(ValueError, match="3 rows, 3 base and 2 tuned"):
        samples(rows(3), ["a"] * 3, ["a"] * 2)


def test_answer_questions_shows_the_prompt_only():
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=TOKENIZER_VOCAB)
    texts = ["who wrote the novel?", "in which year", "and where is it?"]
    prompts = tokenizer(texts)["input_ids"]
    shown: list[dict[str, Any]] = [{"input_ids": [*ids, 77, 78, 2], "prompt_length": len(ids)} for ids in prompts]
    answers = answer_questions(model, tokenizer, shown, max_new_tokens=6, progress=False)
    assert answers == generate(model, tokenizer, prompts, max_new_tokens=6, progress=False)
    assert answers != generate(model, tokenizer, [row["input_ids"] for row in shown], max_new_tokens=6, progress=False)
