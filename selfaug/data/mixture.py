"""Further data sources beside the task: `data.mixture`, a mapping of names to

    {source: {_target_: ...}, ratio: R, by: examples | tokens, nll: true | false, max_tokens: null}

ratio: examples (or tokens) of this source for each one of the task's in an epoch; 0 leaves it out, and the run is bit
for bit the one without it. Which examples these are is a function of the run's seed and the source's name alone; they
are the same in every epoch, and where there are not enough they come again, which is said. With nll: false its
responses are not learned: it is there for terms of the objective with `source: NAME`.

The validation split is the task's alone.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from selfaug.data.chat import ChatFormat
from selfaug.data.dialogue import DialogueBuilder, DialogueSource
from selfaug.data.text import hash64
from selfaug.data.tokenised import TokenisedDialogues, tokenise_dialogues
from selfaug.errors import UserError
from selfaug.objective.batch import TASK

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MixtureSource:
    """One source of the mixture; see above. max_tokens: of a dialogue; None for data.prompt.max_tokens."""

    source: DialogueSource
    ratio: float = 1.0
    by: Literal["examples", "tokens"] = "examples"
    nll: bool = True
    max_tokens: int | None = None


def check_source(name: str, one: MixtureSource) -> None:
    """Raises UserError for a setting out of its range."""
    setting = f"data.mixture.{name}"
    if name == TASK or not name.isidentifier():
        raise UserError(f"{setting}: a source cannot be called {name}: use letters, digits and _, and not {TASK}.")
    for method in ("fingerprint", "dialogues"):
        if not callable(getattr(one.source, method, None)):
            raise UserError(
                f"{setting}.source is no source of dialogues: choose one of selfaug/conf/mixture, as in "
                f"+mixture@{setting}=jsonl."
            )
    if not _is_number(one.ratio) or one.ratio < 0 or not math.isfinite(one.ratio):
        raise UserError(f"{setting}.ratio={one.ratio} is not allowed: set it to 0 or a positive number.")
    if one.by not in ("examples", "tokens"):
        raise UserError(f"{setting}.by={one.by} is unknown: set it to examples or tokens.")
    if not isinstance(one.nll, bool):
        raise UserError(f"{setting}.nll={one.nll} is not allowed: set it to true or false.")
    if one.max_tokens is not None and (not isinstance(one.max_tokens, int) or one.max_tokens < 2):
        raise UserError(f"{setting}.max_tokens={one.max_tokens} is not allowed: set it to 2 or more, or to null.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Part(NamedTuple):
    """Rows of one source: those of the data set `rows` that `indices` [n] names, perhaps none; all where it is None.
    learn: 1 if their responses are learned, else 0."""

    name: str
    rows: Any
    indices: np.ndarray | None = None
    learn: int = 1


class MixedRows:
    """Rows of several sources as one data set, the task's first, with the columns `source` (number of the part) and
    `learn` that collate.py reads."""

    def __init__(self, parts: list[Part]):
        self.parts = parts
        self.sizes = {part.name: len(part.rows) if part.indices is None else len(part.indices) for part in parts}
        self._ends = np.cumsum([*self.sizes.values()])
        lengths = []
        for part in parts:
            own = lengths_of(part.rows)
            lengths.append(own if part.indices is None else own[part.indices])
        self.lengths = np.concatenate(lengths)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        part = self.parts[number]
        place = int(index) - int(self._ends[number] - self.sizes[part.name])
        row = part.rows[place if part.indices is None else int(part.indices[place])]
        name = row["id"] if number == 0 else f"{part.name}:{row['id']}"
        # What a method has decided about single tokens stands, unless nothing is learned at all.
        return {**row, "id": name, "source": number, "learn": row.get("learn", 1) if part.learn else 0}

    def tokens(self) -> dict[str, int]:
        """By source."""
        starts = self._ends - np.array([*self.sizes.values()])
        return {name: int(self.lengths[a:b].sum()) for name, a, b in zip(self.sizes, starts, self._ends, strict=True)}


def lengths_of(rows: Any) -> np.ndarray:
    """[n]: the tokens of each row."""
    return rows.lengths if isinstance(rows, MixedRows) else np.asarray(rows.with_format("numpy")["length"])


class Mixture:
    """The sources that are mixed in (those with a ratio above 0), read and tokenised at the first use.

    chat, max_tokens: how a dialogue becomes tokens, as the task's prompts do. cache: directory of the token cache.
    """

    def __init__(
        self,
        sources: Mapping[str, MixtureSource],
        chat: ChatFormat,
        max_tokens: int | None,
        *,
        seed: int,
        cache: Path,
        progress: bool = True,
    ):
        for name, one in sources.items():
            check_source(name, one)
        self.sources = {name: one for name, one in sources.items() if one.ratio > 0}
        self._chat, self._max_tokens = chat, max_tokens
        self._seed, self._cache, self._progress = seed, cache, progress
        self._tokenised: dict[str, TokenisedDialogues] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The numbers in the column `source` are places in it."""
        return (TASK, *self.sources)

    def fingerprint(self, task: str) -> str:
        """Of the task's data, whose own it is, together with the sources that have been read (see `rows`)."""
        if not self.sources:
            return task
        parts = [task, {name: found.fingerprint for name, found in self._tokenised.items()}]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]

    def stats(self, rows: MixedRows) -> dict[str, dict[str, Any]]:
        """By source: how many examples and tokens an epoch has of it, how many different examples, and what became of
        its dialogues."""
        tokens = rows.tokens()
        return {
            part.name: {
                "examples": rows.sizes[part.name],
                "different": len(np.unique(part.indices)) if part.indices is not None else len(part.rows),
                "tokens": tokens[part.name],
                "learned": bool(part.learn),
                **({"dialogues": self._tokenised[part.name].stats} if part.name in self._tokenised else {}),
            }
            for part in rows.parts
        }

    def rows(self, task: Any) -> MixedRows:
        """`task`, the rows of the task that the run trains on, and what is mixed in."""
        parts = [Part(TASK, task)]
        lengths = lengths_of(task)
        for name, one in self.sources.items():
            wanted = one.ratio * (len(lengths) if one.by == "examples" else int(lengths.sum()))
            found = self._read(name, one, wanted)
            # A source that writes more for a larger ratio would have another order then.
            in_order = one.by == "tokens" and hasattr(one.source, "ask")
            lot = None if in_order else (self._seed, name)
            indices = choose(lengths_of(found.rows), wanted, by=one.by, lot=lot)
            if len(indices) > len(found.rows):
                log.warning(
                    "data.mixture.%s: %d examples are wanted of %d that there are: each comes %.1f times in an epoch",
                    name, len(indices), len(found.rows), len(indices) / len(found.rows),
                )  # fmt: skip
            elif not len(indices):
                log.warning("data.mixture.%s: its ratio of %g is less than one example", name, one.ratio)
            parts.append(Part(name, found.rows, indices, int(one.nll)))
        return MixedRows(parts)

    def _read(self, name: str, one: MixtureSource, wanted: float) -> TokenisedDialogues:
        if name not in self._tokenised:
            ask = getattr(one.source, "ask", None)  # a source that writes as many as are wanted
            if ask is not None:
                ask(**{one.by: math.ceil(wanted)})
            limits = [limit for limit in (one.max_tokens, self._max_tokens) if limit is not None]
            builder = DialogueBuilder(self._chat, min(limits, default=None))
            self._tokenised[name] = tokenise_dialogues(one.source, builder, self._cache, name, self._progress)
        return self._tokenised[name]


def choose(lengths: np.ndarray, wanted: float, *, by: str, lot: tuple[int, str] | None) -> np.ndarray:
    """Which examples of a source are used: [n] indices into `lengths`, their tokens [all].

    n is `wanted` rounded; by tokens it is the n with which the sum of their lengths comes nearest to it. They are
    drawn without replacement until all are used up, then once more in the same order. lot: the seed and the source's
    name, of which alone the order is a function; None to take them as they stand.
    """
    order = np.arange(len(lengths))
    if lot is not None:
        order = np.random.default_rng([lot[0], hash64(lot[1])]).permutation(len(lengths))
    if by == "examples":
        number = round(wanted)
    else:
        sums = np.concatenate([[0], np.cumsum(lengths[order])])
        rounds, rest = divmod(wanted, sums[-1])
        number = int(rounds) * len(lengths) + int(np.abs(sums - rest).argmin())
    return np.resize(order, number)
