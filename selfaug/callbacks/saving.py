"""Checkpoints for resuming: the newest one is kept, the older goes only once the newer is whole."""

import logging
import math
import pickle
import signal
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from selfaug.callbacks.metrics_file import MetricsFile

log = logging.getLogger(__name__)


class SaveCheckpoints(L.Callback):
    """Saves checkpoints/step-N.ckpt every n optimiser steps, and after the step in which SIGTERM comes; then it stops
    the training with SIGTERMException.

    Lightning writes a checkpoint beside its place and renames it, so that a kill at any moment leaves the last whole
    one. (Lightning's ModelCheckpoint picks by a monitored metric and carries that state; resuming needs neither.)
    """

    def __init__(self, directory: Path, every_n_steps: int):
        self.directory, self.every_n_steps = directory, every_n_steps
        self.stop_requested = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning's handler talks to the other processes from within the signal, between whatever collectives they
        # happen to be in. Ours only takes note; Lightning puts the handler from before the training back at its end.
        signal.signal(signal.SIGTERM, self._take_note)
        self.keep_metrics(trainer)

    def keep_metrics(self, trainer: L.Trainer) -> None:
        """Bring back the rows of metrics.csv that belong to the steps done so far."""
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.keep_until(trainer.global_step)

    def _take_note(self, *_: Any) -> None:
        self.stop_requested = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        validates = trainer.enable_validation and any(trainer.num_val_batches)  # none without an example
        if validates and (batch_idx + 1) % (trainer.val_check_batch or math.inf) == 0:
            return  # validation comes next: a checkpoint before it would lose its row
        self._save_if_due(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save_if_due(trainer)

    def _save_if_due(self, trainer: L.Trainer) -> None:
        stop = self.stop_requested
        if trainer.world_size > 1:  # the signal may reach the processes in different steps: they decide together
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop or (self.every_n_steps > 0 and trainer.global_step % self.every_n_steps == 0):
            self.save(trainer)
        if stop:
            raise SIGTERMException

    def save(self, trainer: L.Trainer) -> None:
        """Every process takes part."""
        for logger in trainer.loggers:
            logger.save()  # a resumed run must find the rows of all steps up to its checkpoint
        path = self.directory / f"step-{trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            for old in self.directory.glob("step-*.ckpt"):
                if old != path:
                    old.unlink(missing_ok=True)


def newest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint with the highest step that can be read; damaged ones are passed over with a warning."""
    for path in sorted(directory.glob("step-*.ckpt"), key=lambda p: int(p.stem.rpartition("-")[2]), reverse=True):
        try:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
            log.warning("%s cannot be read (%s); looking for an older one", path, str(error).split("\n")[0])
            continue
        return path
    return None
