"""How much training a run has had: seconds and tokens, summed over resumed parts, and the most memory."""

from typing import Any

import lightning as L
import torch

from selfaug.run.machine import peak_bytes


class Throughput(L.Callback):
    """Sums SelfAugModule's step_tokens (padding excluded, over all processes) and step_seconds (wall clock).

    The first step of a process, which warms up kernels, is in the sums.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0
        self._device = torch.device("cpu")
        self._earlier: int | None = None

    @property
    def peak(self) -> int | None:
        """Bytes, the most of all parts; None where the machine does not say."""
        now = peak_bytes(self._device)
        return max(now or 0, self._earlier or 0) or None

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._device = pl_module.device

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds += pl_module.step_seconds
        self.tokens += pl_module.step_tokens

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "tokens": self.tokens, "peak": self.peak}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds, self.tokens = float(state["seconds"]), int(state["tokens"])
        self._earlier = state.get("peak")
