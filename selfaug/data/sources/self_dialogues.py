"""Dialogues that the run's own base model writes before it is fine-tuned (SA-SFT, arXiv 2602.20162).

They lie in a folder of the cache that is named by a hash of the model and of all settings, so that runs share them:
what is missing is written at the first use, more of them whenever more are wanted.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from selfaug.data.dialogue import Dialogue
from selfaug.data.sources.dialogues import dialogue
from selfaug.errors import UserError
from selfaug.self_dialogues.settings import Settings
from selfaug.self_dialogues.store import DialogueStore, Wanted

# (settings, how much) -> where at least so much of it now lies
Writer = Callable[[Settings, Wanted], DialogueStore]


class SelfDialogues:
    """number, max_tokens: how many dialogues, or tokens of their texts, at most; both None: as many as the mixture asks
    for. settings: see selfaug/self_dialogues/settings.py.

    `writer` must be set before the first use: it knows the model (selfaug/run/self_dialogues.py).
    """

    def __init__(self, number: int | None = None, max_tokens: int | None = None, **settings: Any):
        for name, value in (("number", number), ("max_tokens", max_tokens)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UserError(f"self_dialogues.{name}={value} is not allowed: set it to a positive number or null.")
        self.settings = Settings(**settings)
        self.wanted = Wanted(number, max_tokens)
        self.writer: Writer | None = None
        self._written: DialogueStore | None = None

    def ask(self, examples: int | None = None, tokens: int | None = None) -> None:
        """How much the mixture has a use for; a number of one's own wins."""
        if self.wanted == Wanted():
            self.wanted = Wanted(examples, tokens)

    def fingerprint(self) -> str:
        """sha256 over the lines that are used."""
        content = hashlib.sha256()
        for line in self._store().lines(self.wanted):
            content.update(line)
        return content.hexdigest()

    def dialogues(self) -> Iterator[Dialogue]:
        """The first ones in the order of their numbers, until there are enough."""
        for record in self._store().records(self.wanted):
            yield dialogue(record, record["id"])

    def _store(self) -> DialogueStore:
        if self.writer is None:
            raise UserError(
                "Self-dialogues need a model to write them: write them with python -m selfaug.dialogues, and give the "
                "file to mixture jsonl."
            )
        if self._written is None:
            self._written = self.writer(self.settings, self.wanted)
        return self._written
