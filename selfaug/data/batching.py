"""From token rows to optimiser steps.

One item of the training loader is one *optimiser step* of this process: a list of micro-batches. So the whole step is
known before its first backward pass, its means can be taken over all of its tokens, and a checkpoint never falls
between two micro-batches.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from selfaug.data.collate import collate, pack
from selfaug.data.text import hash64
from selfaug.objective.batch import IGNORE, TASK, TokenBatch

_NOBODY = -1
# What one more forward and backward pass costs before its first token, in tokens. A pass reads all weights and starts
# all kernels; much more than this and short steps are padded to save passes, much less and every example stands alone.
_PASS = 64


@dataclass(frozen=True)
class Step:
    """This process's micro-batches of one optimiser step."""

    micro_batches: tuple[TokenBatch, ...]

    def to(self, device: torch.device, non_blocking: bool = False) -> "Step":
        return Step(tuple(batch.to(device, non_blocking) for batch in self.micro_batches))

    def pin_memory(self) -> "Step":
        return Step(tuple(batch.pin_memory() for batch in self.micro_batches))


@dataclass(frozen=True)
class MicroBatch:
    """Which examples make up a micro-batch. `silent`: it counts for nothing and only keeps processes in step."""

    indices: tuple[int, ...]
    silent: bool = False


class StepSampler(Sampler[list[MicroBatch]]):
    """Yields, for this process, the micro-batches of one optimiser step after another.

    Which examples make up a step is a function of seed and epoch alone. Within a step they are sorted by length, dealt
    to the processes and cut into micro-batches (`cut`); the loss does not depend on any of it.

    Where there are several data sources, each is shuffled by itself, the task as it would be without the others, and
    the k-th of the n examples of a source stands at (k + 1/2) / n of the epoch: every step has its share of each.

    Args:
        lengths: [n] tokens of each example.
        step_size: examples in one optimiser step, over all processes.
        micro_batch_size: examples in one forward pass; None for no limit.
        micro_batch_tokens: tokens computed in one forward pass, padding included; None for no limit. A longer example
            gets a pass of its own.
        packing: the examples of a micro-batch will be packed and not padded.
        sources: examples of each data source, in the order of `lengths`, the task's first; None: all are the task's.
        on_top: step_size counts the task's examples alone, and the shares of the others are added to each step. The
            steps then are those of the run without the others, with more in them.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        step_size: int,
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
        packing: bool = False,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        sources: Mapping[str, int] | None = None,
        on_top: bool = False,
    ):
        self.lengths, self.step_size = lengths, step_size
        self.sources, self.on_top = dict(sources or {TASK: len(lengths)}), on_top
        self.micro_batch_size, self.micro_batch_tokens, self.packing = micro_batch_size, micro_batch_tokens, packing
        self.shuffle, self.seed, self.rank, self.world = shuffle, seed, rank, world
        self.epoch = 0
        self.first_step = 0  # where the next iteration begins: set when a run resumes within an epoch

    def __len__(self) -> int:
        return -(-(self.sources[TASK] if self.on_top else len(self.lengths)) // self.step_size)

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        first, self.first_step = self.first_step, 0
        order, steps = self._order()
        ends = np.searchsorted(steps, np.arange(len(self) + 1))
        for step in range(first, len(self)):
            yield self._step(order[ends[step] : ends[step + 1]])

    def _order(self) -> tuple[np.ndarray, np.ndarray]:
        """[n] the examples in the order of the epoch, and the step that each is in."""
        examples, places, steps = [], [], []
        start, of_task = 0, self.sources[TASK]
        for name, number in self.sources.items():
            own = np.arange(start, start + number)
            start += number
            if self.shuffle:
                # By name and not by number: another source beside it changes nothing.
                seed = [self.seed, self.epoch] if name == TASK else [self.seed, self.epoch, hash64(name)]
                own = np.random.default_rng(seed).permutation(own)
            middle = 2 * np.arange(number) + 1  # of the k-th of n, times 2n
            examples.append(own)
            places.append(middle / (2 * max(number, 1)))
            steps.append(middle * of_task // (2 * max(number, 1) * self.step_size))
        order = np.argsort(np.concatenate(places), kind="stable")
        in_step = np.concatenate(steps)[order] if self.on_top else np.arange(len(order)) // self.step_size
        return np.concatenate(examples)[order], in_step

    def _step(self, indices: np.ndarray) -> list[MicroBatch]:
        by_length = indices[np.argsort(self.lengths[indices], kind="stable")]
        # [hands, world]: a hand gives every process one example, all of nearly the same length. Cutting between hands
        # gives all processes equally many micro-batches and, pass by pass, nearly the same work. Where the examples do
        # not divide evenly, the first hand, of the shortest ones, is not full.
        missing = -len(by_length) % self.world
        hands = np.concatenate([np.full(missing, _NOBODY), by_length]).reshape(-1, self.world)
        sizes = np.where(hands == _NOBODY, 0, self.lengths[hands])  # ascending within a hand
        longest = sizes[:, -1]
        work = np.zeros(self.world)
        for hand, size in zip(hands[::-1], sizes[::-1], strict=True):
            places = np.argsort(-work, kind="stable")  # who has the least work so far gets the longest
            hand[places] = hand.copy()
            work[places] += size
        groups = []
        for start, stop in cut(longest, self.micro_batch_size, self.micro_batch_tokens, self.packing):
            mine = hands[start:stop, self.rank]
            mine = mine[mine != _NOBODY].tolist()
            groups.append(MicroBatch(tuple(mine)) if mine else MicroBatch((int(by_length[0]),), silent=True))
        return groups


def cut(lengths: np.ndarray, size: int | None, tokens: int | None, packing: bool = False) -> list[tuple[int, int]]:
    """Where to cut sequences of ascending `lengths` [n] into micro-batches, as ranges [start, stop).

    Of all the ways that keep to at most `size` sequences and `tokens` computed tokens a micro-batch (None: no limit;
    a longer sequence stands alone), the one with the least computed tokens + _PASS * number of micro-batches, found by
    dynamic programming: the best way to cut the first n sequences ends with some last micro-batch, and before that is
    the best way to cut what is left.
    """
    ends = np.concatenate([[0], np.cumsum(lengths)])
    best = np.zeros(len(lengths) + 1)  # best[n]: the cost of the first n sequences
    begin = np.zeros(len(lengths) + 1, dtype=np.int64)  # begin[n]: where their last micro-batch begins
    for stop in range(1, len(lengths) + 1):
        start = np.arange(0 if size is None else max(stop - size, 0), stop)
        computed = ends[stop] - ends[start] if packing else (stop - start) * lengths[stop - 1]
        allowed = (start == stop - 1) | (computed <= (math.inf if tokens is None else tokens))
        costs = np.where(allowed, best[start] + computed + _PASS, math.inf)
        choice = int(costs.argmin())
        best[stop], begin[stop] = costs[choice], start[choice]
    ranges = []
    stop = len(lengths)
    while stop > 0:
        ranges.append((int(begin[stop]), stop))
        stop = int(begin[stop])
    return ranges[::-1]


class StepDataset(TorchDataset):
    """Turns what StepSampler yields into Steps of tensors, padded or packed. rows: of the token cache, or MixedRows."""

    def __init__(self, rows: Any, pad_id: int, packing: bool = False, source_names: tuple[str, ...] = (TASK,)):
        self.rows, self.pad_id, self.packing, self.source_names = rows, pad_id, packing, source_names

    def __getitem__(self, micro_batches: list[MicroBatch]) -> Step:
        return Step(tuple(self._collate(group) for group in micro_batches))

    def _collate(self, group: MicroBatch) -> TokenBatch:
        rows = [self.rows[i] for i in group.indices]
        batch = pack(rows, self.source_names) if self.packing else collate(rows, self.pad_id, self.source_names)
        if not group.silent:
            return batch
        # No row of it is an output row or an aligned row: it contributes a zero with a graph.
        return replace(batch, roles=torch.zeros_like(batch.roles), labels=torch.full_like(batch.labels, IGNORE), ids=())


class StepLoader(DataLoader):
    """A DataLoader of Steps that knows how far it has come, so that a checkpoint can resume within an epoch."""

    def __init__(self, dataset: StepDataset, sampler: StepSampler, **arguments: Any):
        # batch_size=None: what the sampler yields is one whole item.
        super().__init__(dataset, sampler=sampler, batch_size=None, **arguments)
        self.steps_done = 0  # in the current epoch

    def skip(self, steps: int) -> None:
        """Begin the next iteration after so many steps; a whole epoch's worth means at its start."""
        self.sampler.first_step = steps % len(self.sampler)  # type: ignore[attr-defined, arg-type]

    def __iter__(self) -> Iterator[Step]:  # type: ignore[override]
        self.steps_done = self.sampler.first_step  # type: ignore[attr-defined]
        for step in super().__iter__():
            self.steps_done += 1
            yield step

    # Lightning asks for these two before it trusts a loader to resume, but in 2.6 it never calls the second one where
    # the schedule has asked for the number of steps: the data module's state does the work (datamodule.py).
    def state_dict(self) -> dict[str, int]:
        return {"steps_done": self.steps_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip(state["steps_done"])
