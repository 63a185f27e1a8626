"""What is left out of the self-dialogues, where somebody wants it (settings.Filters)."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any

from selfaug.data.dialogue import Message
from selfaug.evaluation.retention.style import style
from selfaug.self_dialogues.settings import Filters

_GRAM = 3  # words


class Sieve:
    """Says why a dialogue is to be left out. Duplicates are those of dialogues that it has been told of."""

    def __init__(self, filters: Filters):
        self.filters = filters
        self._seen: set[str] = set()
        self._grams: dict[tuple[str, ...], list[int]] = defaultdict(list)  # where each sequence occurs
        self._sizes: list[int] = []  # sequences of each dialogue

    def reason(self, messages: Sequence[Message]) -> str | None:
        """Why this dialogue is left out; None where it is kept."""
        own = self.filters
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        words = [len(answer.split()) for answer in answers]
        if own.min_words is not None and min(words) < own.min_words:
            return "too short"
        if own.max_words is not None and max(words) > own.max_words:
            return "too long"
        if own.refusals and any(style(answer)["refusal"] for answer in answers):
            return "refusal"
        if own.language is not None and language(" ".join(m["content"] for m in messages)) != own.language:
            return "other language"
        if own.duplicates is not None and question(messages) in self._seen:
            return "duplicate"
        if own.duplicates == "near" and self._similar(messages):
            return "near duplicate"
        return None

    def remember(self, messages: Sequence[Message]) -> None:
        """A dialogue that is kept."""
        if self.filters.duplicates is not None:
            self._seen.add(question(messages))
        if self.filters.duplicates == "near":
            grams = _grams(messages)
            for gram in grams:
                self._grams[gram].append(len(self._sizes))
            self._sizes.append(len(grams))

    def _similar(self, messages: Sequence[Message]) -> bool:
        grams = _grams(messages)
        shared = Counter(other for gram in grams for other in self._grams.get(gram, ()))
        return any(
            both / (len(grams) + self._sizes[other] - both) >= self.filters.similarity for other, both in shared.items()
        )


def question(messages: Sequence[Message]) -> str:
    """The first user text, as it is compared with others."""
    return " ".join(next((m["content"] for m in messages if m["role"] == "user"), "").casefold().split())


def _grams(messages: Sequence[Message]) -> set[tuple[str, ...]]:
    """The three-word sequences of the first user text; the whole text where it is shorter."""
    words = question(messages).split()
    return {tuple(words[i : i + _GRAM]) for i in range(max(len(words) - _GRAM + 1, 1))}


def language(text: str) -> str:
    """The code of the language that langdetect takes it for, always the same one; unknown where it cannot say."""
    from langdetect import LangDetectException

    detector = _detectors().create()
    try:
        detector.append(text)
        return str(detector.detect())
    except LangDetectException:
        return "unknown"


@cache
def _detectors() -> Any:
    """langdetect draws samples of a text: a factory of our own, so that its seed is nobody else's."""
    from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    factory.set_seed(0)
    return factory
