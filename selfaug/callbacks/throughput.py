"""How fast training goes: seconds and tokens, summed over resumed parts of a run."""

import resource
import sys
import time
from typing import Any

import lightning as L

from selfaug.data.batching import Step
from selfaug.module import SelfAugModule


class Throughput(L.Callback):
    """Counts tokens (padding excluded, this run's own processes together) and wall-clock seconds of training steps.

    Logs speed/tokens_per_s. The first step of a process (warm-up of kernels) is in the sums.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0
        self._started = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: SelfAugModule, batch: Step, batch_idx: int) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: SelfAugModule, outputs: Any, batch: Step, batch_idx: int
    ) -> None:
        seconds = time.perf_counter() - self._started
        self.seconds += seconds
        self.tokens += pl_module.step_tokens
        pl_module.write_metrics({"speed/tokens_per_s": pl_module.step_tokens / seconds})

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.seconds, self.tokens = float(state["seconds"]), int(state["tokens"])

    @staticmethod
    def peak_host_bytes() -> int:
        """The largest resident set of this process so far."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
