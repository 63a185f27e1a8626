"""Fills the reference cache before the first step."""

import copy
import time
from collections.abc import Sequence, Set
from itertools import islice
from typing import Any

import lightning as L
import torch

from selfaug.data.collate import collate
from selfaug.data.datamodule import RagDataModule
from selfaug.model.cache import CachedReference, Processes
from selfaug.model.decoder import Decoder
from selfaug.model.shard import reshard
from selfaug.objective.batch import TASK, TokenBatch


class FillReference(L.Callback):
    """Fills `cache` with the examples of `data` that the training and its validation will see.

    A kill meanwhile costs nothing that is on disk: the same command goes on from there.
    """

    def __init__(self, cache: CachedReference, data: RagDataModule, progress: bool = True):
        self.cache, self.data, self.progress = cache, data, progress
        self.seconds = 0.0  # that it took, over resumed parts

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        began = time.perf_counter()
        # Here the model is on its device, and sharded if it is to be. Where a checkpoint with base weights has been
        # read, nothing may be missing any more (CachedReference.fill).
        pad_id = self.data.tokenizer.pad_token_id or 0
        terms = pl_module.objective.terms.values()
        named = [getattr(term, "source", None) for term in terms]
        sources = None if None in named else {str(name) for name in named}
        examples = _Rows(self._needed(trainer, sources), pad_id)
        scores = {term.sampling.score for term in terms} - {None}

        def most(number: int) -> int:
            return int(trainer.strategy.reduce(torch.tensor(number, device=pl_module.device), reduce_op="max"))

        with trainer.precision_plugin.train_step_context():
            self.cache.fill(
                Decoder(pl_module.model),
                examples,
                score=scores.pop() if scores else None,
                processes=Processes(trainer.global_rank, trainer.world_size, trainer.num_nodes, most),
                progress=self.progress and trainer.is_global_zero,
            )
        reshard(pl_module.model)  # Lightning reads the checkpoint of a sharded model after this hook
        trainer.strategy.barrier()
        self.seconds += time.perf_counter() - began

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.seconds = float(state["seconds"])

    def _needed(self, trainer: L.Trainer, sources: Set[str] | None) -> list[tuple[Any, Sequence[int]]]:
        """(data set, which of its rows): of the training all, or those of its steps where they are less than an
        epoch. sources: the data sources that the terms look at; None for all."""
        train, val = self.data.rows("train"), self.data.rows("val")
        steps = int(trainer.estimated_stepping_batches)
        # Of all processes, whichever of them is to meet an example: the order is the same in each.
        loader: Any = trainer.train_dataloader
        sampler = copy.copy(loader.sampler)
        sampler.rank, sampler.world, sampler.first_step, sampler.epoch = 0, 1, 0, 0
        used: Sequence[int] = range(len(train))
        if steps < len(sampler):
            used = sorted({i for step in islice(iter(sampler), steps) for group in step for i in group.indices})
        validated = range(len(val) if trainer.limit_val_batches and (sources is None or TASK in sources) else 0)
        if sources is not None:
            names = self.data.mixture.names
            used = [i for i in used if names[train[i].get("source", 0)] in sources]
        return [(train, used), (val, validated)]


class _Rows:
    """Rows of the token cache as batches of one, read when they are asked for."""

    def __init__(self, parts: list[tuple[Any, Sequence[int]]], pad_id: int):
        self._rows = [(rows, i) for rows, indices in parts for i in indices]
        self._pad_id = pad_id

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> TokenBatch:
        rows, i = self._rows[number]
        return collate([rows[i]], self._pad_id)
