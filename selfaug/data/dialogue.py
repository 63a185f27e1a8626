"""Dialogues as training examples: instructions, self-dialogues, replayed text, all in one shape; and its tokens.

The tokens are those of the chat template around the messages. As in prompt.py a response is tokenised apart, as it is
when a model generates it, and ends with the template's end-of-turn tokens, which belong to the response; all that
stands between two responses is tokenised in one piece.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from selfaug.data.chat import ChatFormat
from selfaug.data.prompt import Segment, of_tokens, text_of
from selfaug.errors import UserError
from selfaug.objective.batch import Role

Message = dict[str, str]  # {"role": system | user | assistant | text, "content": ...}
TEXT = "text"  # the role of the only message of a plain text, which has no chat template around it
_VERSION = 2  # raise it when the same dialogue would give other tokens
_ROLES = {"user": Role.QUESTION, "assistant": Role.RESPONSE}


@dataclass(frozen=True, slots=True)
class Dialogue:
    """messages: in order. ended: False where the last answer was cut off, so that its end is not to be learned."""

    id: str
    messages: tuple[Message, ...]
    ended: bool = True


class DialogueSource(Protocol):
    """Where dialogues come from. To add one: a class with these two methods, and a YAML file in selfaug/conf/mixture/
    whose `source._target_` names it."""

    def fingerprint(self) -> str:
        """A hash of all that changes what `dialogues` yields."""
        ...

    def dialogues(self) -> Iterator[Dialogue]:
        """All dialogues in a fixed order, streamed. Raises UserError for bad input."""
        ...


@dataclass
class DialogueStats:
    """What became of the dialogues: counts over all that were built."""

    dialogues: int = 0
    dropped_long: int = 0  # not even the first answer fits
    dropped_silent: int = 0  # there is no answer, or no text, to learn
    cut: int = 0  # later turns, or the end of a plain text, left out
    tokens: int = 0
    response_tokens: int = 0


@dataclass(frozen=True)
class Tokens:
    """A dialogue as tokens: input_ids, roles [T]."""

    dialogue: Dialogue
    input_ids: list[int]
    roles: list[int]


class DialogueBuilder:
    """Builds the tokens of dialogues for one chat template. max_tokens: of a dialogue, None for no limit. Longer ones
    lose their last turns; where the first answer does not fit whole, the dialogue is dropped. Both are counted."""

    def __init__(self, chat: ChatFormat, max_tokens: int | None = None):
        self.chat, self.max_tokens = chat, max_tokens
        self.stats = DialogueStats()
        self._pieces: dict[tuple[str, ...], list[str]] = {}

    def fingerprint(self) -> str:
        """A hash of all that changes the tokens."""
        tokenizer = self.chat.tokenizer.backend_tokenizer.to_str()
        template = self._template(("user", "assistant", "user", "assistant"))
        return hashlib.sha256(json.dumps([_VERSION, tokenizer, template, self.max_tokens]).encode()).hexdigest()

    def build(self, dialogues: Sequence[Dialogue]) -> list[Tokens]:
        """The dialogues as tokens, in order, without those that were dropped (see `stats`)."""
        built = []
        for dialogue in dialogues:
            self.stats.dialogues += 1
            tokens = self._build(dialogue)
            if tokens is not None:
                built.append(tokens)
                self.stats.tokens += len(tokens.input_ids)
                self.stats.response_tokens += tokens.roles.count(int(Role.RESPONSE))
        return built

    def _build(self, dialogue: Dialogue) -> Tokens | None:
        messages = list(dialogue.messages)
        if messages and messages[0]["role"] == TEXT:
            return self._text(dialogue)
        # An empty answer teaches nothing but to be silent.
        turns = [i + 1 for i, one in enumerate(messages) if one["role"] == "assistant" and one["content"].strip()]
        if not turns:
            self.stats.dropped_silent += 1
            return None
        for turn in reversed(turns):
            last = turn == turns[-1]
            ids, roles = self._tokens(messages[:turn], ended=dialogue.ended or not last)
            if self.max_tokens is None or len(ids) <= self.max_tokens:
                self.stats.cut += turn != turns[-1]
                return Tokens(dialogue, ids, roles)
        self.stats.dropped_long += 1
        return None

    def _text(self, dialogue: Dialogue) -> Tokens | None:
        """Plain text, all of it to be learned, with the special tokens that the tokenizer adds to any text."""
        text = self.chat.defuse(dialogue.messages[0]["content"])
        ids = self.chat.tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
        if len(ids) < 2:  # nothing is predicted
            self.stats.dropped_silent += 1
            return None
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            self.stats.cut += 1
            ids = ids[: self.max_tokens]
        return Tokens(dialogue, ids, [int(Role.RESPONSE)] * len(ids))

    def _tokens(self, messages: Sequence[Message], *, ended: bool) -> tuple[list[int], list[int]]:
        """Of messages that end with an answer."""
        pieces = self._template(tuple(message["role"] for message in messages))
        ids: list[int] = []
        roles: list[int] = []
        after_answer = False
        run = [Segment(pieces[0], Role.TEMPLATE)]  # what stands before the next answer
        for message, piece in zip(messages, pieces[1:], strict=True):
            content = self.chat.defuse(message["content"].strip())
            if message["role"] != "assistant":
                run += [
                    Segment(content, _ROLES.get(message["role"], Role.TEMPLATE)),
                    Segment(piece, Role.TEMPLATE),
                ]
                continue
            self._add(run, ids, roles, after_answer)
            answer = self.chat.encode([content])["input_ids"][0]
            ids += answer
            roles += [int(Role.RESPONSE)] * len(answer)
            # The end of an empty answer is not to be learned either.
            run, after_answer = [Segment(piece, Role.TEMPLATE)], bool(content)
        if ended:  # the template may write more behind it, which nobody has to predict
            ids += self.chat.end_ids
            roles += [int(Role.RESPONSE)] * len(self.chat.end_ids)
        return ids, roles

    def _add(self, run: list[Segment], ids: list[int], roles: list[int], after_answer: bool) -> None:
        """Append the tokens of `run`. Behind an answer with a word its first ones, up to a special token, end it."""
        encoded = self.chat.encode([text_of(run)], offsets=True)
        new = encoded["input_ids"][0]
        kinds, _ = of_tokens(run, encoded["offset_mapping"][0])
        if after_answer:
            special = self.chat.special_ids
            end = next((i for i, token in enumerate(new) if token in special or kinds[i] != int(Role.TEMPLATE)), None)
            if end is not None and new[end] in special:
                kinds[: end + 1] = [int(Role.RESPONSE)] * (end + 1)
        ids += new
        roles += kinds

    def _template(self, roles: tuple[str, ...]) -> list[str]:
        """What the template writes around messages of these roles: before the first, between them, after the last.

        Rendered with marks in place of the contents; plain letters, which no template trims or escapes.
        """
        if roles not in self._pieces:
            marks = [f"selfaugmark{i}x" for i in range(len(roles))]
            messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
            try:
                rest = self.chat.render(messages)
            except Exception as error:  # Jinja's own errors, and whatever a template raises
                raise UserError(
                    f"The chat template does not take a dialogue of {', '.join(roles)} ({error}): correct the "
                    "dialogue, or set data.prompt.chat_template."
                ) from error
            pieces = []
            for mark in marks:
                piece, found, rest = rest.partition(mark)
                if not found or mark in rest:
                    raise UserError(
                        f"The chat template does not show every message of a dialogue of {', '.join(roles)} once and "
                        "in order: correct the dialogue, or set data.prompt.chat_template."
                    )
                pieces.append(piece)
            self._pieces[roles] = [*pieces, rest]
        return self._pieces[roles]
