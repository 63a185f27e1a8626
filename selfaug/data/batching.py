"""From token rows to optimiser steps.

One item of the training loader is one *optimiser step* of this process: a list of micro-batches. So the whole step is
known before its first backward pass, its means can be taken over all of its tokens, and a checkpoint never falls
between two micro-batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from selfaug.objective.batch import IGNORE, Role, TokenBatch


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

    The order is a function of seed and epoch alone. A step's examples are sorted by length before they are cut into
    micro-batches (less padding; the loss does not depend on it) and dealt to the processes; where they do not divide
    evenly, a silent repetition keeps the number of forward passes equal, which FSDP needs.

    Args:
        lengths: [n] tokens of each example.
        step_size: examples in one optimiser step, over all processes.
        micro_batch_size: examples in one forward pass.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        step_size: int,
        micro_batch_size: int,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        self.lengths, self.step_size, self.micro_batch_size = lengths, step_size, micro_batch_size
        self.shuffle, self.seed, self.rank, self.world = shuffle, seed, rank, world
        self.epoch = 0
        self.first_step = 0  # where the next iteration begins: set when a run resumes within an epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.step_size)

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        first, self.first_step = self.first_step, 0
        order = np.arange(len(self.lengths))
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        for step in range(first, len(self)):
            yield self._step(order[step * self.step_size : (step + 1) * self.step_size])

    def _step(self, indices: np.ndarray) -> list[MicroBatch]:
        by_length = indices[np.argsort(self.lengths[indices], kind="stable")].tolist()
        size = min(self.micro_batch_size, -(-len(by_length) // self.world))
        groups = [MicroBatch(tuple(by_length[i : i + size])) for i in range(0, len(by_length), size)]
        missing = -len(groups) % self.world
        groups += [MicroBatch(groups[0].indices[:1], silent=True)] * missing
        return groups[self.rank :: self.world]


class StepDataset(TorchDataset):
    """Turns what StepSampler yields into Steps of padded tensors."""

    def __init__(self, rows: Dataset, pad_id: int):
        self.rows, self.pad_id = rows, pad_id

    def __getitem__(self, micro_batches: list[MicroBatch]) -> Step:
        return Step(tuple(self._collate(group) for group in micro_batches))

    def _collate(self, group: MicroBatch) -> TokenBatch:
        batch = collate([self.rows[i] for i in group.indices], self.pad_id)
        if not group.silent:
            return batch
        # No row of it is an output row or an aligned row: it contributes a zero with a graph.
        return replace(batch, roles=torch.zeros_like(batch.roles), labels=torch.full_like(batch.labels, IGNORE), ids=())


def collate(rows: list[dict[str, Any]], pad_id: int) -> TokenBatch:
    """Pad rows of the token cache on the right to the longest of them."""
    longest = max(row["length"] for row in rows)
    input_ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    roles = torch.full((len(rows), longest), int(Role.PADDING), dtype=torch.int64)
    for i, row in enumerate(rows):
        input_ids[i, : row["length"]] = torch.tensor(row["input_ids"])
        roles[i, : row["length"]] = torch.tensor(row["roles"])
    return TokenBatch(
        input_ids,
        attention_mask=(roles != Role.PADDING).long(),
        labels=input_ids.masked_fill(roles != Role.RESPONSE, IGNORE),
        roles=roles,
        ids=tuple(row["id"] for row in rows),
        right_padded=True,
    )


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
