"""Verifies the model on the device that trains it, where a CPU cannot run it."""

from collections.abc import Callable
from typing import Any

import lightning as L
from torch import nn


class VerifyModel(L.Callback):
    """Calls `verify` with the model before the first step, under the training's autocast; it raises UserError where
    the model does not compute what selfaug expects."""

    def __init__(self, verify: Callable[[nn.Module], None]):
        self.verify = verify

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        with trainer.precision_plugin.train_step_context():
            self.verify(pl_module.model)
