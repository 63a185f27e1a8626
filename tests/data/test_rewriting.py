"""Rewritten training targets: what is used of what the model wrote, and that nothing but the training is touched."""

import logging
from dataclasses import replace

import pytest

from selfaug.data import rewriting
from selfaug.data.rewriting import RewriteConfig, RewrittenSource, problem
from selfaug.data.schema import Document, Example
from selfaug.errors import UserError

CONFIG = RewriteConfig("Answer.", "It is {answer}. Say so.", banned=("Reference answer",))


def example(number: int, *answers: str) -> Example:
    return Example(f"e{number}", f"question {number}?", answers or (f"the answer {number}",), (Document("text"),))


class Some:
    """Examples 0 to 4 of every split."""

    def __init__(self, settings: str = "a"):
        self.settings = settings

    def fingerprint(self):
        return self.settings

    def examples(self, split, count_tokens):
        return iter([replace(example(i), id=f"{split}{i}") for i in range(5)])


class Says:
    """A rewriter that was told what to say."""

    def __init__(self, texts, config=CONFIG):
        self.texts, self.config, self.blocks, self.closed = texts, config, [], 0

    def fingerprint(self):
        return "model"

    def __call__(self, number, examples):
        self.blocks.append((number, [one.id for one in examples]))
        return [self.texts[int(one.id[-1])] for one in examples]

    def close(self):
        self.closed += 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It was The Answer 1, of course.", None),
        ("", "no answer that ends"),
        ("It was answer 12.", "reference answer not in it"),  # whole words
        ("Something else.", "reference answer not in it"),
        ("The REFERENCE answer is answer 1.", "banned phrase"),
    ],
)
def test_which_answers_are_used(text: str, expected: str | None):
    assert problem(text, example(1), CONFIG) == expected


def test_any_of_the_accepted_answers_will_do():
    assert problem("by Austen", example(0, "Jane Austen", "Austen"), CONFIG) is None
    assert problem("?", example(0, "!"), CONFIG) == "reference answer not in it"  # nothing is left of it to look for


def test_free_text_is_not_looked_through_for_the_reference():
    free = replace(CONFIG, check="none")
    assert problem("Something else.", example(1), free) is None
    assert problem("", example(1), free) == "no answer that ends"
    assert problem("The reference answer is this.", example(1), free) == "banned phrase"


def test_the_training_targets_alone_change(monkeypatch, caplog):
    monkeypatch.setattr(rewriting, "BLOCK", 2)
    rewriter = Says(["answer 0, I say", "no", "answer 2", "", "answer 4!"])
    source = RewrittenSource(Some(), rewriter)
    with caplog.at_level(logging.INFO):
        found = list(source.examples("train", len))
    assert [one.answers[0] for one in found] == [
        "answer 0, I say", "the answer 1", "answer 2", "the answer 3", "answer 4!",
    ]  # fmt: skip
    assert found[0].answers == ("answer 0, I say", "the answer 0")  # the reference is still accepted
    assert [replace(one, answers=()) for one in found] == [
        replace(one, answers=()) for one in Some().examples("train", len)
    ]
    assert rewriter.blocks == [(0, ["train0", "train1"]), (1, ["train2", "train3"]), (2, ["train4"])]
    assert rewriter.closed == 1
    assert "3 of 5 training targets were rewritten; as they were: 1 " in caplog.text
    for split in ("val", "test"):
        assert list(source.examples(split, len)) == list(Some().examples(split, len))
    assert len(rewriter.blocks) == 3


def test_next_to_nothing_rewritten_is_said(caplog):
    list(RewrittenSource(Some(), Says([""] * 5)).examples("train", len))
    assert "less than a tenth of the training targets" in caplog.text


def test_fingerprint_is_of_all_that_changes_the_targets():
    found = {
        RewrittenSource(Some(settings), Says([], config)).fingerprint()
        for settings in "ab"
        for config in (
            CONFIG, replace(CONFIG, max_new_tokens=3), replace(CONFIG, banned=()), replace(CONFIG, check="none")
        )
    }  # fmt: skip
    assert len(found) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"request": "Say so."}, "put {answer} into it"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is not allowed"),
        ({"check": "some"}, "set it to contains or none"),
    ],
)
def test_refused(change: dict, message: str):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **change)
