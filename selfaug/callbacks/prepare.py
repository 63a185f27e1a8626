"""Calls what a method needs done before its first step, and keeps what came of it.

See selfaug/objective/preparation.py.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file, save_file

from selfaug.data.collate import collate
from selfaug.data.datamodule import RagDataModule
from selfaug.errors import UserError
from selfaug.evaluation.drift import tokenised_corpus
from selfaug.objective import Role, TokenBatch
from selfaug.objective.preparation import Preparation, Prepares

log = logging.getLogger(__name__)


class Prepare(L.Callback):
    """Prepares `parts` (by name) in on_fit_start; DIRECTORY/NAME.safetensors keeps what they have found.

    A run that goes on reads the files again: its weights may not be those of the start any more, and another machine
    would round differently. `seconds`: that it took, over resumed parts.

    Args:
        parts: those of the method that have something to prepare.
        directory: of the run.
        chat: the chat template and its arguments, for dialogues among the texts that are asked for.
    """

    def __init__(
        self,
        parts: Mapping[str, Prepares],
        directory: Path,
        data: RagDataModule,
        chat: Mapping[str, Any] | None = None,
        progress: bool = True,
    ):
        self.parts, self.directory, self.data, self.progress = dict(parts), directory, data, progress
        self._chat = dict(chat or {})
        self._measured: dict[str, float] = {}
        self.seconds = 0.0

    def check_resumable(self) -> None:
        """Raise UserError where a run cannot go on, because what was prepared before its first step is gone."""
        for name in self.parts:
            if not self._file(name).is_file():
                raise UserError(
                    f"{self._file(name)} was made before the first step of this run and is missing, so that it cannot "
                    "go on from a checkpoint: set ckpt_path=null to begin again."
                )

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        began = time.perf_counter()
        # As in FillReference: the model is on its device, and sharded if it is to be.
        steps = int(trainer.estimated_stepping_batches)  # makes the loader
        at = Preparation(
            model=pl_module.model,
            loader=trainer.train_dataloader,
            steps=steps,
            rank=trainer.global_rank,
            world=trainer.world_size,
            over_processes=partial(trainer.strategy.reduce, reduce_op="sum"),
            corpus=self._corpus,
            progress=self.progress and trainer.is_global_zero,
        )
        for name, part in self.parts.items():
            path = self._file(name)
            there = trainer.strategy.broadcast(path.is_file())  # one process decides for all
            if there:
                found = load_file(path)
            else:
                with trainer.precision_plugin.train_step_context():
                    found = part.prepare(at)
                if trainer.is_global_zero:
                    _save(found, path)
            trainer.strategy.barrier()
            if not there and not trainer.is_global_zero and path.is_file():
                found = load_file(path)  # what a resumed run goes on with, to the bit
            measured = part.use(found, at)
            self._measured |= {f"{name}/{what}": value for what, value in measured.items()}
        self.seconds += time.perf_counter() - began

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.seconds = float(state["seconds"])

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step == 0 and self._measured:
            pl_module.write_metrics(self._measured)

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"

    def _corpus(self, settings: Mapping[str, Any], setting: str) -> Sequence[TokenBatch]:
        documents = tokenised_corpus(self.data.tokenizer, settings, setting, seed=self.data.seed, **self._chat)
        return _Batches(documents, self.data.tokenizer.pad_token_id or 0)


class _Batches(Sequence):
    """Tokenised documents as batches of one. What is to be predicted has role RESPONSE, a plain text all of it."""

    def __init__(self, documents: Sequence[Any], pad_id: int):
        self._documents, self._pad_id = documents, pad_id

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, i: Any) -> Any:
        ids, roles = self._documents[i]
        spoken = [Role.RESPONSE if role == Role.DOCUMENT else role for role in roles]
        row = {"id": str(i), "input_ids": ids, "roles": spoken, "length": len(ids)}
        return collate([row], self._pad_id)


def _save(found: Mapping[str, torch.Tensor], path: Path) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: value.contiguous() for name, value in found.items()}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
