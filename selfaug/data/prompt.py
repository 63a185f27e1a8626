"""From an example to tokens, each with its role.

The prompt goes through the model's own chat template. Its text is put together from segments with known roles, is
tokenised whole (so that training sees the tokens that inference sees), and every token takes the role of its middle
character. The response is tokenised apart, as it is when the model generates it, and ends with the template's
end-of-turn tokens, which are to be learned too.

Where a prompt is too long, documents give way, the lowest-ranked first; never the question, never the response.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from selfaug.data.chat import ChatFormat
from selfaug.data.schema import Document, Example
from selfaug.errors import UserError
from selfaug.objective.batch import Role

_MIN_CUT = 16  # a document of which fewer tokens than this would be left is dropped whole


@dataclass(frozen=True)
class PromptConfig:
    """How a question and its documents are worded. The defaults follow CRAG's task-1 baseline in spirit.

    max_tokens: prompt and response together, the template included; null for the model's own limit.
    on_too_long: what happens to an example whose question and response alone do not fit: drop (counted) or error.
    shuffle_documents: show the documents in a seeded random order instead of rank order.
    chat_template: Jinja text for models that ship none. template_arguments: passed to the template, for example
    enable_thinking: false.
    """

    system: str | None = None
    instruction: str = (
        "Answer the question from the documents below, in as few words as possible. "
        'If they do not hold the answer, say "I don\'t know".'
    )
    max_tokens: int | None = None
    on_too_long: str = "drop"
    shuffle_documents: bool = False
    seed: int = 0
    chat_template: str | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.on_too_long not in ("drop", "error"):
            raise UserError(f"data.prompt.on_too_long={self.on_too_long} is unknown: set it to drop or error.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"data.prompt.max_tokens={self.max_tokens} is not allowed: set a positive number or null.")


@dataclass(frozen=True)
class Prompted:
    """One example as tokens.

    input_ids, roles, documents: [T], a document being its rank in retrieval order, from 1 (0: the token is of none),
    wherever in the prompt it is shown; the first prompt_length tokens are the prompt.
    """

    example: Example
    input_ids: list[int]
    roles: list[int]
    documents: list[int]
    prompt_length: int


class Segment(NamedTuple):
    """A piece of the prompt's text. document: the rank of the document that it is, 0 for all else."""

    text: str
    role: Role
    document: int = 0


@dataclass
class PromptStats:
    """What became of the examples: counts over all that were built."""

    examples: int = 0
    dropped_examples: int = 0  # question and response alone do not fit
    examples_truncated: int = 0
    documents_dropped: int = 0
    documents_cut: int = 0
    gold_documents_dropped: int = 0
    document_tokens_cut: int = 0
    special_tokens_defused: int = 0  # chat markup found inside user text
    document_tokens: int = 0
    question_tokens: int = 0
    response_tokens: int = 0
    template_tokens: int = 0


class PromptBuilder:
    """Builds prompts for one tokenizer and one PromptConfig. `stats` counts what was built and what was cut."""

    def __init__(self, tokenizer: Any, config: PromptConfig):
        self.tokenizer = tokenizer
        self.config = config
        self.stats = PromptStats()
        self.chat = ChatFormat(tokenizer, config.chat_template, config.template_arguments, config.system)
        limit = getattr(tokenizer, "model_max_length", None)
        self.max_tokens = config.max_tokens or (limit if limit and limit < 10**9 else None)

    def fingerprint(self) -> str:
        """A hash of the tokenizer, the template and the settings: of all that changes the tokens."""
        template = [self.chat.before, self.chat.after, self.chat.end_ids]
        parts = [self.tokenizer.backend_tokenizer.to_str(), template, self.max_tokens, asdict(self.config)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def count_tokens(self, texts: list[str]) -> list[int]:
        """The number of tokens of each text."""
        return [len(ids) for ids in self.chat.encode(texts)["input_ids"]] if texts else []

    def build(self, examples: Sequence[Example]) -> list[Prompted]:
        """The examples as tokens, in order, without those that cannot fit (see `stats`).

        The tokenizer works on all of them in parallel. Raises UserError for one that cannot fit under
        on_too_long=error.
        """
        targets = self.chat.encode([self.chat.defuse(example.answers[0]) for example in examples])["input_ids"]
        responses = [[*target, *self.chat.end_ids] for target in targets]
        segments = [self._segments(example, example.documents) for example in examples]
        encoded = self._encode_segments(segments)
        built = []
        for i, (example, response) in enumerate(zip(examples, responses, strict=True)):
            self.stats.examples += 1
            ids, offsets = encoded["input_ids"][i], encoded["offset_mapping"][i]
            if self.max_tokens is not None and len(ids) + len(response) > self.max_tokens:
                documents = self._fit(example, len(ids), self.max_tokens - len(response))
                if documents is None:
                    self._drop(example)
                    continue
                segments[i] = self._segments(example, documents)
                again = self._encode_segments([segments[i]])
                ids, offsets = again["input_ids"][0], again["offset_mapping"][0]
            roles, ranks = of_tokens(segments[i], offsets)
            roles += [int(Role.RESPONSE)] * len(response)
            ranks += [0] * len(response)
            prompted = Prompted(example, ids + response, roles, ranks, prompt_length=len(ids))
            self._count(prompted)
            built.append(prompted)
        return built

    def _drop(self, example: Example) -> None:
        if self.config.on_too_long == "error":
            raise UserError(
                f"Example {example.id}: its question and response alone are longer than "
                f"data.prompt.max_tokens={self.max_tokens}; raise it, or set data.prompt.on_too_long=drop."
            )
        self.stats.dropped_examples += 1

    # ---- one example ----------------------------------------------------------------------------------------------

    def _segments(self, example: Example, documents: Sequence[Document]) -> list[Segment]:
        ranked = list(enumerate(documents, start=1))
        if self.config.shuffle_documents:
            random.Random(f"{self.config.seed}/{example.id}").shuffle(ranked)
        parts = [Segment(self.chat.before + self.config.instruction + "\n\n", Role.TEMPLATE)]
        for number, (rank, document) in enumerate(ranked, start=1):
            parts.append(Segment(f"[{number}] ", Role.TEMPLATE))
            parts.append(Segment(self._document_text(document), Role.DOCUMENT, rank))
            parts.append(Segment("\n\n", Role.TEMPLATE))
        parts.append(Segment("Question: ", Role.TEMPLATE))
        parts.append(Segment(self.chat.defuse(example.question), Role.QUESTION))
        return [*parts, Segment(self.chat.after, Role.TEMPLATE)]

    def _document_text(self, document: Document) -> str:
        return self.chat.defuse(f"{document.title}\n{document.text}" if document.title else document.text)

    def _fit(self, example: Example, tokens: int, room: int) -> tuple[Document, ...] | None:
        """The documents with which a prompt of `tokens` tokens fits into `room`: the lowest-ranked go first, the last
        one to go may stay in part. None if even the bare question does not fit."""
        kept = list(example.documents)
        excess = tokens - room
        dropped = cut = tokens_cut = gold_dropped = 0
        while excess > 0 and kept:
            document = kept.pop()
            length = self.count_tokens([self._document_text(document)])[0]
            left = length - excess
            shortened = self._cut(document, left) if left >= _MIN_CUT else None
            if shortened is not None and self._prompt_tokens(example, [*kept, shortened]) <= room:
                kept.append(shortened)
                left = self.count_tokens([self._document_text(shortened)])[0]  # what is really left of it
                cut, tokens_cut = cut + 1, tokens_cut + length - left
                break
            dropped, tokens_cut, gold_dropped = dropped + 1, tokens_cut + length, gold_dropped + document.gold
            excess = self._prompt_tokens(example, kept) - room
        else:
            if excess > 0:
                return None
        self.stats.examples_truncated += 1
        self.stats.documents_dropped += dropped
        self.stats.documents_cut += cut
        self.stats.gold_documents_dropped += gold_dropped
        self.stats.document_tokens_cut += tokens_cut
        return tuple(kept)

    def _cut(self, document: Document, tokens: int) -> Document | None:
        """The document with its text cut at the end so that title and text have about `tokens` tokens."""
        whole = self._document_text(document)
        offsets = self.chat.encode([whole], offsets=True)["offset_mapping"][0]
        # A little less than asked for: tokens at the seams merge differently in the whole prompt.
        end = offsets[max(tokens - 3, 0)][0]
        start = len(whole) - len(self.chat.defuse(document.text))
        text = whole[start:end].rstrip()
        return Document(text, document.title, document.gold) if text else None

    def _prompt_tokens(self, example: Example, documents: Sequence[Document]) -> int:
        return self.count_tokens([text_of(self._segments(example, documents))])[0]

    def _encode_segments(self, segments: list[list[Segment]]) -> Any:
        return self.chat.encode([text_of(parts) for parts in segments], offsets=True)

    def _count(self, prompted: Prompted) -> None:
        if self.chat.markup is not None:
            texts = [prompted.example.question, prompted.example.answers[0]]
            texts += [part for document in prompted.example.documents for part in (document.title, document.text)]
            self.stats.special_tokens_defused += sum(len(self.chat.markup.findall(text)) for text in texts)
        counts = np.bincount(prompted.roles, minlength=len(Role))
        self.stats.document_tokens += int(counts[Role.DOCUMENT])
        self.stats.question_tokens += int(counts[Role.QUESTION])
        self.stats.response_tokens += int(counts[Role.RESPONSE])
        self.stats.template_tokens += int(counts[Role.TEMPLATE])


def text_of(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def of_tokens(segments: list[Segment], offsets: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Role and document of each token: those of its middle character; of a token without characters, TEMPLATE and 0."""
    sizes = [len(segment.text) for segment in segments]
    spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    middle = np.minimum(spans.sum(1) // 2, sum(sizes) - 1)
    empty = spans[:, 0] == spans[:, 1]
    roles = np.repeat([int(segment.role) for segment in segments], sizes)[middle]
    documents = np.repeat([segment.document for segment in segments], sizes)[middle]
    return np.where(empty, int(Role.TEMPLATE), roles).tolist(), np.where(empty, 0, documents).tolist()
