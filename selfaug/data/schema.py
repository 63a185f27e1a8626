"""What one training example is, whatever file or hub it came from.

A source (selfaug/data/sources/) yields `Example`s; everything after it (prompt, tokens, batches, evaluation)
knows only this shape. The same shape on disk, one JSON object a line, is the format of `data=jsonl`:

    {"question": "Who wrote Emma?",
     "answers": ["Jane Austen", "Austen"],
     "documents": [{"title": "Emma", "text": "Emma is a novel by Jane Austen ...", "gold": true}],
     "answerable": true, "id": "q1"}

`question`, `answers` and `documents` are required (documents may be empty); in a document `text` is required,
`title` and `gold` are not; `answerable` is true and `id` the line number where they are left out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

# CRAG's convention: what to say when the documents do not hold the answer.
DONT_KNOW = "I don't know"


@dataclass(frozen=True, slots=True)
class Document:
    """One retrieved document. `gold`: it holds the answer (unknown counts as False)."""

    text: str
    title: str = ""
    gold: bool = False


@dataclass(frozen=True, slots=True)
class Example:
    """One question. `documents` stand in rank order, the best first: truncation takes the last ones first.

    `answers` are all accepted answers, the first one is the training target. Where the documents do not hold
    the answer, `answerable` is False and `answers` is `("I don't know",)`.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    documents: tuple[Document, ...]
    answerable: bool = True


class Source(Protocol):
    """Where examples come from. To add one: a class with these two methods in selfaug/data/sources/ and a YAML
    file in selfaug/conf/data/ whose `source._target_` names it."""

    def fingerprint(self) -> str:
        """A hash of all that changes what `examples` yields: the content of its files and its settings."""
        ...

    def examples(self, split: Split, count_tokens: Callable[[list[str]], list[int]]) -> Iterator[Example]:
        """The examples of one split, in a fixed order, streamed.

        `count_tokens` gives the number of tokens of each text, for sources that fill a context to a length.
        Raises UserError for bad input, naming `file:line: what is wrong`.
        """
        ...
