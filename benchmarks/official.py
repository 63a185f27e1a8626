"""The official way as a term of selfaug's objective, so that `python -m selfaug.train` can run it for comparison."""

from dataclasses import dataclass

from torch import Tensor

from benchmarks.peers import official_kl
from selfaug.model.decoder import Head
from selfaug.objective import LogitAlignment, States


@dataclass(frozen=True)
class OfficialAlignment(LogitAlignment):
    """The same term, computed from whole float32 logits of both models.

    Run as: python -m selfaug.train alignment._target_=benchmarks.official.OfficialAlignment
    """

    def total(self, states: States, head: Head) -> Tensor:
        """The penalty summed over the rows. Raises ValueError for weights and fancy heads."""
        tuned, reference = states.tuned, states.reference
        arguments = head.arguments()
        if states.weights is not None or arguments["scale"] != 1.0 or arguments["softcap"] is not None:
            raise ValueError("the official code has neither row weights nor a scale or soft-cap of the logits")
        return len(tuned) * official_kl(tuned, reference, arguments["weight"], arguments["bias"])
