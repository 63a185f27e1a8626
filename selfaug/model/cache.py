"""The reference cache: what the base model computes for an example, computed once.

The base model does not change, so its hidden states of an example are the same in every epoch and in every run of a
sweep over alpha, seed, rank or position. An entry holds the last hidden states [T, d] of all rows of one example,
exactly as the model gives them and in their dtype, under the fingerprint of the model (selfaug/model/fingerprint.py)
and the example's tokens; a score of its rows (selfaug/objective/sampling.py) is an entry of its own. Every entry is
computed from its example alone, without padding, and so depends on no batch, seed or process: whoever fills the cache,
all runs see the same bits. An uncached run differs from them by rounding, which there is the same in base and tuned
model as long as the two are nearly the same: the KL before the first step is 0 uncached, and cached the rounding noise
of two forward passes of other shapes (2e-4 nats under bf16 autocast, nothing in float32; SmolLM2-135M on Wikipedia).

With all entries there before the first step, the base weights themselves may train (full fine-tuning) without a second
copy of them.
"""

import hashlib
import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from selfaug.errors import UserError
from selfaug.model.decoder import Decoder, Tokens
from selfaug.model.entries import DiskEntries, Entries
from selfaug.model.fingerprint import model_digest, place_digest
from selfaug.model.reference import (
    AdaptersOff,
    ReferenceStates,
    Score,
    adapters_off,
    check_adapters,
    check_head_frozen,
    trains_outside,
)
from selfaug.ops import linear_entropy

log = logging.getLogger(__name__)

GB = 10**9
_SCORE_BYTES = 4  # a row's score is one float32
_LEAVE_FREE = 0.1  # of the disk or memory that is free, so that filling never takes the last of it


class Batches(Protocol):
    """A list of batches, or what reads them when they are asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Tokens: ...


class Processes(NamedTuple):
    """The processes that fill together, on so many machines. Where a model is sharded, each must make equally many
    forward passes: `most` gives the largest of the numbers that they call it with."""

    rank: int = 0
    world: int = 1
    nodes: int = 1
    most: Callable[[int], int] = int


@dataclass(frozen=True)
class Example:
    """One example as a batch of its own (selfaug.model.decoder.Tokens), without padding. Tensors [1, T]."""

    input_ids: Tensor
    roles: Tensor
    asking: Tensor
    span: Any
    key: str
    packed = False
    right_padded = True

    @classmethod
    def all(cls, tokens: Tokens, score: Score | None) -> "list[Example]":
        """Of a batch; their tensors are views of its own."""
        # For the names of the entries; on a GPU each example would have to wait for its own otherwise.
        asking = tokens.asking.cpu() if score == "attention" else tokens.asking
        examples = []
        for span, key in tokens.examples:
            here = (slice(span.row, span.row + 1), slice(span.start, span.stop))
            alone = span._replace(row=0, start=0, stop=span.stop - span.start)
            examples.append(cls(tokens.input_ids[here], tokens.roles[here], asking[here], alone, key))
        return examples

    @property
    def attention_mask(self) -> Tensor:
        return torch.ones_like(self.input_ids)

    @property
    def spans(self) -> tuple[Any, ...]:
        return (self.span,)

    @property
    def examples(self) -> tuple[tuple[Any, str], ...]:
        return ((self.span, self.key),)

    def __len__(self) -> int:
        """Tokens."""
        return self.input_ids.shape[1]

    def to(self, device: torch.device) -> "Example":
        return replace(
            self, input_ids=self.input_ids.to(device), roles=self.roles.to(device), asking=self.asking.to(device)
        )

    def names(self, score: Score | None) -> tuple[str, ...]:
        """Of its entries: the hidden states', and the score's if one is asked for."""
        states = f"{self.key}-states"
        if score is None:
            return (states,)
        if score == "entropy":
            return states, f"{self.key}-entropy"
        # Whose attention counts depends on the roles, which the key of the tokens does not know.
        asking = hashlib.blake2b(self.asking.cpu().numpy().tobytes(), digest_size=8).hexdigest()
        return states, f"{self.key}-attention-{asking}"


class _Base(NamedTuple):
    """A model's base, as `check` found it. trains: its weights do, so that only then could it be computed."""

    digest: str
    trains: bool


class CachedReference:
    """A Reference (selfaug/model/reference.py) that is looked up, and computed only where it is missing.

    Args:
        entries: where the tensors are kept.
        limit_gb: `fill` refuses to keep more than so many GB (1e9 bytes) for a run.
    """

    def __init__(self, entries: Entries, limit_gb: float = 50.0):
        if not (isinstance(limit_gb, (int, float)) and limit_gb > 0):
            raise UserError(f"reference.limit_gb={limit_gb} is not allowed: set it to a positive number.")
        self.entries, self.limit_gb = entries, limit_gb
        self._bases: WeakKeyDictionary[nn.Module, _Base] = WeakKeyDictionary()

    def check(self, model: nn.Module) -> None:
        """Take the fingerprint of the base model, which must not have trained yet.

        Raises UserError where adapters off would not be the base model now, or where the output head trains.
        """
        check_adapters(model)
        check_head_frozen(model)
        outside = trains_outside(model)
        self._bases[model] = _Base(model_digest(model), bool(outside))

    def states(self, decoder: Decoder, tokens: Tokens, *, masked: bool, score: Score | None = None) -> ReferenceStates:
        """The hidden states of every example of the batch; zeros between them.

        Raises UserError where an entry is missing that cannot be computed any more, and for `masked`.
        """
        if masked:
            raise UserError(
                "alignment.official=true counts padding, which the reference cache does not keep: set "
                "reference.cache=off with it."
            )
        model, device = self._fingerprint(decoder), tokens.input_ids.device
        shape = tokens.input_ids.shape
        hidden: Tensor | None = None
        scores = None if score is None else torch.zeros(shape, dtype=torch.float32, device=device)
        for (span, _), example in zip(tokens.examples, Example.all(tokens, score), strict=True):
            # Where nobody asks, the scores are 0: a batch that only keeps processes in step, its roles all padding.
            wanted = None if score == "attention" and not bool(example.asking.any()) else score
            found = self._kept(model, example, wanted)
            if found is None:
                self._check_computable(decoder)
                found = self._compute(decoder, model, example, wanted)
            if hidden is None:
                # Put together on the host, in memory that is copied to a GPU at once and in one piece.
                values = found.hidden
                hidden = torch.zeros(*shape, values.shape[-1], dtype=values.dtype, pin_memory=device.type == "cuda")
            hidden[span.row, span.start : span.stop] = found.hidden
            if scores is not None and found.scores is not None:
                scores[span.row, span.start : span.stop] = found.scores.to(device)
        if hidden is None:  # a batch without examples has no rows either
            weight = decoder.head.arguments()["weight"]
            hidden = torch.zeros(*shape, weight.shape[1], dtype=weight.dtype)
        return ReferenceStates(hidden.to(device, non_blocking=True), scores)

    def fill(
        self,
        decoder: Decoder,
        batches: Batches,
        *,
        score: Score | None = None,
        processes: Processes = Processes(),  # noqa: B008 (immutable)
        progress: bool = True,
    ) -> None:
        """Compute what is missing of the examples in `batches`; damaged entries are replaced.

        To be called where the training will run: on its device, under its autocast. On disk each process does its
        share of the examples, in memory each does all.

        Raises UserError, before anything is computed, where the entries would take more than limit_gb or than there
        is room for.
        """
        model = self._fingerprint(decoder)
        row_bytes = self._row_bytes(decoder) + (_SCORE_BYTES if score else 0)
        where = _Places(batches, score, progress)
        self._check_limit(where, row_bytes)
        share = where.keys
        if isinstance(self.entries, DiskEntries):
            self.entries.tidy(model)
            share = share[processes.rank :: processes.world]
        missing = [
            place
            for place in _bar(share, "checking the reference cache", progress)
            if self._kept(model, where.example(place), score) is None
        ]
        self._check_room(where, missing, row_bytes, processes)
        log.info(
            "reference cache in %s: %.2f GB for %d examples, %d of them to be computed%s",
            self.entries.place, where.tokens * row_bytes / GB, len(where.keys), len(missing),
            "" if len(share) == len(where.keys) else f" by this of {processes.world} processes",
        )  # fmt: skip
        sharded = _sharded(decoder.model)
        rounds = processes.most(len(missing)) if sharded else len(missing)
        if rounds and self._bases[decoder.model].trains:
            self._check_untrained(decoder)
        # Several runs that fill at once take different ways through the examples, and so share the work.
        random.Random(os.getpid()).shuffle(missing)
        for i in _bar(range(rounds), "filling the reference cache", progress):
            # Where the others have more to do, this process still has to bring its part of the weights.
            example = where.example(missing[i] if i < len(missing) else where.keys[0])
            if sharded or self._kept(model, example, score) is None:
                self._compute(decoder, model, example, score)

    # ---- one example -----------------------------------------------------------------------------------------------

    def _kept(self, model: str, example: Example, score: Score | None) -> ReferenceStates | None:
        """hidden [T, d] and scores [T] of an example, on the CPU; None where one of them is missing."""
        hidden, *scores = (self.entries.get(model, name, len(example)) for name in example.names(score))
        if hidden is None or any(values is None for values in scores):
            return None
        return ReferenceStates(hidden, *scores)

    @torch.no_grad()
    def _compute(self, decoder: Decoder, model: str, example: Example, score: Score | None) -> ReferenceStates:
        """The same, computed on the model's device and kept."""
        head = decoder.head.arguments()
        states, *_ = example.names(score)
        if score == "entropy" and not _sharded(decoder.model):
            known = self.entries.get(model, states, len(example))
            if known is not None:  # another run had no use for the entropy
                hidden = known.to(head["weight"].device)
                return self._keep(model, example, ReferenceStates(hidden, linear_entropy(hidden, **head)), score)
        found = AdaptersOff().states(decoder, example.to(head["weight"].device), masked=False, score=score)
        found = ReferenceStates(found.hidden[0], None if found.scores is None else found.scores[0])
        return self._keep(model, example, found, score)

    def _keep(self, model: str, example: Example, found: ReferenceStates, score: Score | None) -> ReferenceStates:
        for name, values in zip(example.names(score), found, strict=False):
            if values is not None:
                self.entries.put(model, name, values)
        return found

    # ---- what is refused -------------------------------------------------------------------------------------------

    def _fingerprint(self, decoder: Decoder) -> str:
        if decoder.model not in self._bases:
            self.check(decoder.model)
        device = decoder.head.arguments()["weight"].device
        return place_digest(self._bases[decoder.model].digest, device)

    def _check_computable(self, decoder: Decoder) -> None:
        if self._bases[decoder.model].trains:
            raise UserError(
                "The reference cache has no entry for an example of this batch, and the base weights train, so that it "
                "cannot be computed any more: fill it before the first step with all examples, those of the "
                "validation too."
            )
        if _sharded(decoder.model):
            raise UserError(
                "The reference cache has no entry for an example of this batch, and of a sharded model one process "
                "cannot compute it alone: fill it before the first step (reference.directory on a disk that all "
                "processes share, or reference.cache=memory), or set reference.cache=off."
            )

    def _check_untrained(self, decoder: Decoder) -> None:
        if model_digest(decoder.model) != self._bases[decoder.model].digest:
            raise UserError(
                "The base weights have been trained since the reference cache was checked against them, so that what "
                "is missing cannot be computed any more: fill it before the first step, with reference.cache=disk if "
                "the training is to be resumed."
            )

    def _check_limit(self, where: "_Places", row_bytes: int) -> None:
        size = where.tokens * row_bytes / GB
        if size > self.limit_gb:
            raise UserError(
                f"The reference cache would take {size:.2f} GB for {len(where.keys)} examples ({where.tokens} tokens "
                f"of {row_bytes} bytes), more than reference.limit_gb={self.limit_gb}: raise that, set "
                f"reference.cache=off, or use fewer tokens (data.limit_train, data.prompt.max_tokens)."
            )

    def _check_room(
        self, where: "_Places", missing: list[tuple[int, int]], row_bytes: int, processes: Processes
    ) -> None:
        on_disk = isinstance(self.entries, DiskEntries)
        # On disk every process does about the same; in memory, those of one machine share what it has.
        others = processes.world if on_disk else processes.world // processes.nodes
        needed = sum(where.lengths[place] for place in missing) * row_bytes * others / GB
        free = self.entries.free() * (1 - _LEAVE_FREE) / GB
        if needed > free:
            other = "reference.directory to a larger disk" if on_disk else "reference.cache=disk"
            raise UserError(
                f"The reference cache needs {needed:.2f} GB more in {self.entries.place}, where {free:.2f} GB may be "
                f"used: set {other}, reference.cache=off, or use fewer tokens (data.limit_train, "
                "data.prompt.max_tokens)."
            )

    @staticmethod
    def _row_bytes(decoder: Decoder) -> int:
        """Bytes of the hidden state of one row, as the model gives it here."""
        device = decoder.head.arguments()["weight"].device
        with adapters_off(decoder.model):
            token = torch.zeros(1, 1, dtype=torch.long, device=device)
            hidden = decoder.hidden(token, torch.ones_like(token), right_padded=True)
        return hidden.shape[-1] * hidden.element_size()


class _Places:
    """Which different examples there are in `batches`, and where: (number of the batch, number within it)."""

    def __init__(self, batches: Batches, score: Score | None, progress: bool):
        self._batches, self._score = batches, score
        self.keys: list[tuple[int, int]] = []
        self.lengths: dict[tuple[int, int], int] = {}
        seen = set()
        for i in _bar(range(len(batches)), "reading the examples", progress):
            for j, example in enumerate(Example.all(batches[i], score)):
                name = example.names(score)[-1]
                if name not in seen:
                    seen.add(name)
                    self.keys.append((i, j))
                    self.lengths[i, j] = len(example)
        self.tokens = sum(self.lengths.values())

    def example(self, place: tuple[int, int]) -> Example:
        return Example.all(self._batches[place[0]], self._score)[place[1]]


def _sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _bar(items: Sequence[Any], description: str, progress: bool) -> Iterator[Any]:
    return iter(tqdm(items, desc=description, unit=" examples", disable=not (progress and len(items))))
