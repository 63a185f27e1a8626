"""How much training a run has had: seconds and tokens, summed over resumed parts."""

import resource
import sys
from typing import Any

import lightning as L


class Throughput(L.Callback):
    """Sums SelfAugModule's step_tokens (padding excluded, over all processes) and step_seconds (wall clock).

    The first step of a process, which warms up kernels, is in the sums.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds += pl_module.step_seconds
        self.tokens += pl_module.step_tokens

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.seconds, self.tokens = float(state["seconds"]), int(state["tokens"])

    @staticmethod
    def peak_host_bytes() -> int:
        """The largest resident set of this process so far."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
