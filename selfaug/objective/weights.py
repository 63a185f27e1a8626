"""How much each response token counts: what is minimised is the mean over the learned rows of weight * NLL.

The weights have no gradient and come from the tuned model itself, so that these methods need neither a reference nor
another pass. train/nll stays the plain mean; train/weighted_nll is what is minimised.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from selfaug.errors import UserError
from selfaug.model.decoder import Head
from selfaug.ops import linear_topk_entropy


@dataclass(frozen=True)
class EAFT:
    """Entropy-adaptive fine-tuning (arXiv 2601.02151): weight = (H_k / log k) ** power.

    H_k is the entropy of the tuned model's k likeliest next tokens, made to add up to 1. A token that the model is sure
    of and that the data contradicts has a low weight; it is what makes a model give up what it knew.

    Raises:
        UserError: k below 2, or a power that is negative.
    """

    k: int = 20
    power: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 2:
            raise UserError(f"method.weights.k={self.k} is not allowed: set it to a whole number, at least 2.")
        if not (isinstance(self.power, (int, float)) and math.isfinite(self.power) and self.power >= 0):
            raise UserError(f"method.weights.power={self.power} is not allowed: set it to 0 or a positive number.")

    def __call__(self, nll: Tensor, hidden: Tensor, head: Head) -> Tensor:
        entropy = linear_topk_entropy(hidden, k=self.k, **head.arguments())
        return (entropy / math.log(self.k)).clamp_(0, 1) ** self.power


@dataclass(frozen=True)
class DFT:
    """Dynamic fine-tuning (arXiv 2508.05629): weight = p(token), which makes the gradient that of -p(token)."""

    def __call__(self, nll: Tensor, hidden: Tensor, head: Head) -> Tensor:
        return (-nll).exp()
