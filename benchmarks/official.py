"""The official way as a term of selfaug's objective, so that `python -m selfaug.train` can run it for comparison."""

from dataclasses import dataclass

from torch import Tensor

from benchmarks.peers import official_kl
from selfaug.model.decoder import Head
from selfaug.objective import LogitAlignment


@dataclass(frozen=True)
class OfficialAlignment(LogitAlignment):
    """The same term, computed from whole float32 logits of both models.

    Run as: python -m selfaug.train alignment._target_=benchmarks.official.OfficialAlignment
    """

    def total(self, tuned: Tensor, reference: Tensor, head: Head, weights: Tensor | None) -> Tensor:
        """The penalty summed over N rows; tuned, reference: [N, d]. Raises ValueError for weights and fancy heads."""
        arguments = head.arguments()
        if weights is not None or arguments["scale"] != 1.0 or arguments["softcap"] is not None:
            raise ValueError("the official code has neither row weights nor a scale or soft-cap of the logits")
        return len(tuned) * official_kl(tuned, reference, arguments["weight"], arguments["bias"])
