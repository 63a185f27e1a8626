"""Training targets in the model's own words (SDFT, Yang et al., arXiv 2402.13669): the base model is shown a question
with its reference answer and writes the answer itself; what passes a check takes the reference's place.

Only the training split is rewritten: the model is judged by the same answers as ever.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from typing import Literal, Protocol

from selfaug.data.schema import Example, Source, Split
from selfaug.data.text import normalise_answer
from selfaug.errors import UserError

log = logging.getLogger(__name__)

_VERSION = 3  # raise it when the same settings would give other targets
BLOCK = 128  # examples that are rewritten together, and kept together


@dataclass(frozen=True)
class RewriteConfig:
    """How targets are rewritten.

    instruction: takes the place of data.prompt.instruction. request: follows the question; {answer} is the reference.
    max_new_tokens: where a rewritten answer is cut; one that is cut is not used. check: contains, a rewritten answer is
    used only if a reference stands in it; none, for answers that are free text. banned: a rewritten answer with one of
    these phrases, in any case, is not used.

    Raises UserError for a value outside its range.
    """

    instruction: str
    request: str
    max_new_tokens: int = 64
    check: Literal["contains", "none"] = "contains"
    banned: Sequence[str] = ()

    def __post_init__(self) -> None:
        if "{answer}" not in self.request:
            raise UserError("data.rewrite.request does not show the reference answer: put {answer} into it.")
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise UserError(
                f"data.rewrite.max_new_tokens={self.max_new_tokens} is not allowed: set it to a positive number."
            )
        if self.check not in ("contains", "none"):
            raise UserError(f"data.rewrite.check={self.check} is unknown: set it to contains or none.")


class Rewriter(Protocol):
    """The model that rewrites; see selfaug/run/rewriting.py."""

    config: RewriteConfig

    def fingerprint(self) -> str:
        """A hash of the model, and of how it is asked."""
        ...

    def __call__(self, number: int, examples: Sequence[Example]) -> list[str]:
        """What it writes for each example of block `number`; an empty text where there is none, or no end to it."""
        ...

    def close(self) -> None:
        """Give the memory of the model back."""
        ...


class RewrittenSource:
    """`source` with the targets of its training split rewritten."""

    def __init__(self, source: Source, rewriter: Rewriter):
        self.source, self.rewriter = source, rewriter

    def fingerprint(self) -> str:
        config = asdict(self.rewriter.config)
        parts = ["rewritten", _VERSION, self.source.fingerprint(), self.rewriter.fingerprint(), config]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()

    def examples(self, split: Split, count_tokens: Callable[[list[str]], list[int]]) -> Iterator[Example]:
        found = self.source.examples(split, count_tokens)
        if split != "train":
            yield from found
            return
        reasons: Counter[str] = Counter()
        blocks = iter(lambda: list(islice(found, BLOCK)), [])
        try:
            for number, block in zip(count(), blocks, strict=False):
                for example, text in zip(block, self.rewriter(number, block), strict=True):
                    reason = problem(text, example, self.rewriter.config)
                    reasons[reason or "rewritten"] += 1
                    yield example if reason else replace(example, answers=(text, *example.answers))
        finally:
            self.rewriter.close()
        _report(reasons)


def problem(text: str, example: Example, config: RewriteConfig) -> str | None:
    """Why a rewritten answer is not used; None where it is."""
    if not text:
        return "no answer that ends"
    if any(phrase.casefold() in text.casefold() for phrase in config.banned):
        return "banned phrase"
    if config.check == "none":
        return None
    words = f" {normalise_answer(text)} "
    if not any(f" {short} " in words for answer in example.answers if (short := normalise_answer(answer))):
        return "reference answer not in it"
    return None


def _report(reasons: Counter[str]) -> None:
    total, rewritten = reasons.total(), reasons.pop("rewritten", 0)
    kept = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())
    log.info("%d of %d training targets were rewritten; as they were: %s", rewritten, total, kept or "none")
    if total and rewritten < total / 10:
        log.warning(
            "less than a tenth of the training targets could be rewritten, so that this is next to plain fine-tuning: "
            "set data.rewrite.check=none where answers are free text, a larger data.rewrite.max_new_tokens, or another "
            "method"
        )
