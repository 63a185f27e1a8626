"""Self-dialogues on disk: a folder for each set of settings, in which more are written whenever more are wanted.

dialogues.jsonl  {"id", "messages", "ended", "tokens"} a line, in the order of their numbers
settings.json    everything that they were written with
progress.json    how far it has come: written after each batch, and what stands in dialogues.jsonl behind it is of a
                 batch that was killed, and is taken off again

So a process that is killed costs one batch, and ends with the file that it would have written at once.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from selfaug.errors import UserError
from selfaug.files import write_json
from selfaug.self_dialogues.converse import Conversation, Draft
from selfaug.self_dialogues.filters import Sieve

_PATIENCE = 10  # batches of which nothing is kept


@dataclass(frozen=True)
class Wanted:
    """How much: so many dialogues, or so many tokens of their texts, whichever is reached first. None: no limit."""

    dialogues: int | None = None
    tokens: int | None = None

    def reached(self, dialogues: int, tokens: int) -> bool:
        """Whether that many are enough."""
        enough = self.dialogues is not None and dialogues >= self.dialogues
        return enough or (self.tokens is not None and tokens >= self.tokens)


@dataclass
class Progress:
    """next: number of the first dialogue that has not been tried. bytes: of dialogues.jsonl. kept: dialogues in it.
    tokens: of their texts. sampled: tokens that the model wrote, also of what was left out. seconds: that it took.
    dropped: dialogues that were left out, by reason."""

    next: int = 0
    bytes: int = 0
    kept: int = 0
    tokens: int = 0
    sampled: int = 0
    seconds: float = 0.0
    dropped: dict[str, int] = field(default_factory=dict)


class DialogueStore:
    """The folder of one set of settings."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.file = folder / "dialogues.jsonl"

    @property
    def progress(self) -> Progress:
        """How far it has come."""
        file = self.folder / "progress.json"
        return Progress(**json.loads(file.read_text())) if file.is_file() else Progress()

    def holds(self, wanted: Wanted) -> bool:
        """Whether there are enough."""
        progress = self.progress
        return wanted.reached(progress.kept, progress.tokens)

    def lines(self, wanted: Wanted | None = None) -> Iterator[bytes]:
        """The first lines of dialogues.jsonl that are enough; all of them for None. Each is whole."""
        kept = tokens = 0
        left = self.progress.kept
        if not left:
            return
        with self.file.open("rb") as file:
            for line in file:
                if kept == left or (wanted is not None and wanted.reached(kept, tokens)):
                    return
                kept, tokens = kept + 1, tokens + json.loads(line)["tokens"]
                yield line

    def records(self, wanted: Wanted | None = None) -> Iterator[dict[str, Any]]:
        """The same, decoded."""
        return map(json.loads, self.lines(wanted))

    @property
    def about(self) -> dict[str, Any]:
        """What the dialogues are written with; empty before the first one."""
        file = self.folder / "settings.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def begin(self, about: dict[str, Any]) -> None:
        """Record what the dialogues are written with."""
        write_json(self.folder / "settings.json", about)

    def extend(self, writer: Conversation, wanted: Wanted, progress: bool = True) -> None:
        """Write batch after batch until there are enough. Raises UserError where the filters leave nothing."""
        state, own = self.progress, writer.settings
        sieve = Sieve(own.filters)
        for record in self.records():
            sieve.remember(record["messages"])
        self.folder.mkdir(parents=True, exist_ok=True)
        empty = 0
        with (
            self.file.open("ab") as file,
            tqdm(
                desc="writing self-dialogues", unit=" dialogues", total=wanted.dialogues, initial=state.kept,
                disable=not progress,
            ) as bar,
        ):  # fmt: skip
            file.truncate(state.bytes)
            while not wanted.reached(state.kept, state.tokens):
                began = time.perf_counter()
                drafts = writer.write(range(state.next, state.next + own.batch_size))
                kept = _sift(drafts, sieve, state)
                for draft in kept:
                    file.write(_line(draft))
                file.flush()
                os.fsync(file.fileno())
                state.bytes = os.fstat(file.fileno()).st_size
                state.seconds += time.perf_counter() - began
                write_json(self.folder / "progress.json", asdict(state))
                bar.update(len(kept))
                empty = 0 if kept else empty + 1
                if empty == _PATIENCE:
                    raise UserError(
                        f"Of the last {_PATIENCE * own.batch_size} self-dialogues none could be kept "
                        f"({_listed(state.dropped)}): change self_dialogues.recipe, its limits or its filters."
                    )


def _sift(drafts: Sequence[Draft], sieve: Sieve, state: Progress) -> list[Draft]:
    """Those that are kept; `state` counts them all."""
    kept = []
    dropped = Counter(state.dropped)
    for draft in drafts:
        state.sampled += draft.sampled
        reason = draft.problem or sieve.reason(draft.messages)
        if reason is not None:
            dropped[reason] += 1
            continue
        sieve.remember(draft.messages)
        kept.append(draft)
    state.next += len(drafts)
    state.kept += len(kept)
    state.tokens += sum(draft.tokens for draft in kept)
    state.dropped = dict(sorted(dropped.items()))
    return kept


def _line(draft: Draft) -> bytes:
    record = {"id": str(draft.number), "messages": draft.messages, "ended": draft.ended, "tokens": draft.tokens}
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
