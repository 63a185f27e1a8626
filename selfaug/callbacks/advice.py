"""What the curves of a run say about its settings, said in the log while there is still time to change them.

    alpha too high   the task's NLL no longer falls while drift stays near nothing
    alpha too low    drift grows while the weighted KL is a small part of the loss
    unstable KL      single steps whose KL is many times the usual

Rules of thumb, and said as such. Each is given once in a run.
"""

import logging
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

import lightning as L

log = logging.getLogger(__name__)

WINDOW = 20  # optimiser steps that are looked at
STALLED = 0.02  # the NLL falls by less than this share over the window
LITTLE_DRIFT = 0.01  # nats per token
MUCH_DRIFT = 0.3
SMALL_PART = 0.05  # of the loss
SPIKE = 6.0  # times the median


class Advice(L.Callback):
    """Looks at train/nll, train/kl and train/alpha of every step, and at the probe's drift where there is one.

    drift: asks for the latest drift in nats per token; None where none has been measured.
    """

    def __init__(self, drift: Callable[[], float | None]):
        self.drift = drift
        self._steps: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self._given: set[str] = set()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        values = pl_module.latest
        if not {"train/nll", "train/kl", "train/alpha"} <= values.keys():  # the last of them: a step without rows
            return
        self._steps.append(values)
        if len(self._steps) < WINDOW or not trainer.is_global_zero:
            return
        for name, sentence in self._findings().items():
            if name not in self._given:
                self._given.add(name)
                log.warning("advice: %s", sentence)

    def _findings(self) -> dict[str, str]:
        nll = [step["train/nll"] for step in self._steps]
        kl = [step["train/kl"] for step in self._steps]
        alpha = self._steps[-1]["train/alpha"]
        half = WINDOW // 2
        early, late = statistics.mean(nll[:half]), statistics.mean(nll[half:])
        drift = self.drift()
        part = alpha * statistics.mean(kl) / max(late + alpha * statistics.mean(kl), 1e-12)
        found = {}
        stalled = early - late < STALLED * early
        if stalled and drift is not None and drift < LITTLE_DRIFT and part > SMALL_PART:
            found["high"] = (
                f"the task loss has stopped falling at {late:.2f} while drift is only {drift:.1e} nats per token; "
                f"alignment.alpha={alpha:g} may be too high."
            )
        if drift is not None and drift > MUCH_DRIFT and part < SMALL_PART:
            found["low"] = (
                f"drift has reached {drift:.2f} nats per token while the weighted KL is {part:.1%} of the loss; "
                f"alignment.alpha={alpha:g} may be too low, or alignment.position miss what drifts."
            )
        usual = statistics.median(kl)
        # A rise that stays, as at the start of every run, is no jump.
        falls_back = kl.index(max(kl)) < WINDOW - 1 and kl[-1] < max(kl) / 2
        if usual > 0 and max(kl) > SPIKE * usual and falls_back and alpha * max(kl) > SMALL_PART * late:
            found["unstable"] = (
                f"the KL jumps (largest of {WINDOW} steps {max(kl):.2g}, median {usual:.2g} nats); lower optimizer.lr "
                "or raise optimizer.warmup_ratio to steady it."
            )
        return found
