"""One batch of dialogues, written by a model that plays both sides.

Each text of each dialogue has a stream of random numbers of its own, seeded by (seed, number of the dialogue, place of
the text in it): what a dialogue is given depends neither on its batch nor on the lengths of its texts, and whoever goes
on with dialogue 1,000 needs to know nothing of the first 999.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from selfaug.data.chat import ChatFormat
from selfaug.data.dialogue import Message
from selfaug.evaluation.sampling import Sampled
from selfaug.self_dialogues.settings import Settings

_MARK = "selfaugusermark"
_HALF = "\ufffd"  # what a character is decoded to that was cut between its bytes

# (prompts as tokens, uniforms [prompts, most], temperature, top_p) -> what follows each prompt
Sampler = Callable[[list[list[int]], np.ndarray, float, float], list[Sampled]]


@dataclass
class Draft:
    """A dialogue that is being written. tokens: of its texts; asked: of these, the last user text's; sampled: what the
    model wrote of it, and of what was left out. problem: why it is none."""

    number: int
    messages: list[Message] = field(default_factory=list)
    ended: bool = True
    tokens: int = 0
    asked: int = 0
    sampled: int = 0
    problem: str | None = None
    closed: bool = False


class _Text(NamedTuple):
    text: str
    tokens: int
    ended: bool


class Conversation:
    """Writes dialogues for one chat template. seeds: the seed prompts of recipe=prompts."""

    def __init__(self, settings: Settings, chat: ChatFormat, sampler: Sampler, seeds: Sequence[str] = ()):
        self.settings, self.chat, self.sampler = settings, chat, sampler
        order = np.random.default_rng(settings.seed).permutation(len(seeds))
        self.seeds = [seeds[i] for i in order]

    def write(self, numbers: Sequence[int]) -> list[Draft]:
        """The dialogues of these numbers, in one batch."""
        drafts = [Draft(number) for number in numbers]
        for turn in range(self.settings.turns):
            self._ask([draft for draft in drafts if not draft.closed], turn)
            self._answer([draft for draft in drafts if not draft.closed], turn)
        return drafts

    def _ask(self, drafts: list[Draft], turn: int) -> None:
        """The user's text. A turn without one is left out, and the first one's dialogue with it."""
        own = self.settings
        if turn == 0 and own.recipe == "prompts":
            texts = [self.chat.defuse(self.seeds[draft.number % len(self.seeds)]) for draft in drafts]
            sizes = [len(ids) for ids in self.chat.encode(texts)["input_ids"]]
            found = [_Text(text, size, True) for text, size in zip(texts, sizes, strict=True)]
        else:
            if turn == 0 and own.recipe == "bait":
                prompts = [self.chat.prompt(own.bait)] * len(drafts)
            else:
                prompts = [self._before_user(draft.messages) for draft in drafts]
            found = self._sample(drafts, prompts, 2 * turn, own.max_user_tokens, own.temperature, own.top_p)
        for draft, text in zip(drafts, found, strict=True):
            if text.ended and text.text:
                draft.messages.append({"role": "user", "content": text.text})
                draft.asked = text.tokens
                draft.tokens += text.tokens
                continue
            draft.closed = True
            if turn == 0:
                draft.problem = "endless question" if not text.ended else "empty question"

    def _answer(self, drafts: list[Draft], turn: int) -> None:
        """The assistant's text. As with the user's, a turn without one is left out, and the first one's dialogue."""
        own = self.settings
        prompts = [self.chat.render(draft.messages, add_generation_prompt=True) for draft in drafts]
        found = self._sample(
            drafts, prompts, 2 * turn + 1, own.max_answer_tokens, own.answer_temperature, own.answer_top_p
        )
        for draft, text in zip(drafts, found, strict=True):
            if not text.text:
                draft.closed = True
                draft.messages.pop()
                draft.tokens -= draft.asked
                if turn == 0:
                    draft.problem = "empty answer"
                continue
            draft.messages.append({"role": "assistant", "content": text.text})
            draft.tokens += text.tokens
            draft.ended = text.ended
            draft.closed = not text.ended

    def _before_user(self, messages: list[Message]) -> str:
        """The chat template up to where the user's next text begins."""
        return self.chat.render([*messages, {"role": "user", "content": _MARK}]).partition(_MARK)[0]

    def _sample(
        self, drafts: list[Draft], prompts: list[str], place: int, most: int, temperature: float, top_p: float
    ) -> list[_Text]:
        if not drafts:
            return []
        uniforms = np.stack(
            [np.random.default_rng([self.settings.seed, draft.number, place]).random(most) for draft in drafts]
        )
        found = self.sampler(self.chat.encode(prompts)["input_ids"], uniforms, temperature, top_p)
        texts = []
        for draft, one in zip(drafts, found, strict=True):
            draft.sampled += len(one.tokens) + one.ended
            text = self.chat.tokenizer.decode(one.tokens, skip_special_tokens=True).strip()
            if not one.ended:
                text = text.rstrip(_HALF)
            texts.append(_Text(self.chat.defuse(text), len(one.tokens), one.ended))
        return texts
