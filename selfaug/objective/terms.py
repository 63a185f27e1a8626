"""The terms that are added to the NLL. A term says which rows it needs and sums its penalty over them.

To add one: a class with `alpha`, `sampling`, `select` and `total` like LogitAlignment's, and a YAML file in
selfaug/conf/method/.
"""

import math
from dataclasses import dataclass
from typing import Protocol, get_args

from torch import Tensor

from selfaug.errors import UserError
from selfaug.model.decoder import Head
from selfaug.objective.batch import TokenBatch
from selfaug.objective.rows import POSITIONS, Position, alignment_rows
from selfaug.objective.sampling import Rows, RowSampling
from selfaug.ops import Divergence, linear_kl


class Term(Protocol):
    """alpha * (sum of the penalty over its rows) / (number of its rows in the whole optimiser step)."""

    @property
    def alpha(self) -> float:
        """Its weight in the loss."""
        ...

    @property
    def sampling(self) -> RowSampling:
        """Which of its rows are used in a training step."""
        ...

    def select(self, batch: TokenBatch) -> Tensor:
        """[B, T] bool: the rows it is taken over."""
        ...

    def total(self, tuned: Tensor, reference: Tensor, head: Head, weights: Tensor | None) -> Tensor:
        """The penalty summed over N rows, a scalar; tuned, reference: [N, d] last hidden states of those rows;
        weights: [N] of the rows in the sum, None for 1."""
        ...


@dataclass(frozen=True)
class LogitAlignment:
    """SelfAug's term: KL between base and tuned next-token distributions (paper section 3.3).

    Args:
        alpha: its weight; the paper uses 0.5 and recommends 0.3 to 0.5. At 0 the KL is measured without a gradient,
            and training is plain LoRA, bit for bit.
        position: input_logits (SelfAug), output_logits or all_logits.
        divergence: kl_base_tuned = KL(base || tuned), as the official code computes and our default;
            kl_tuned_base = KL(tuned || base), as the paper's formula says. See selfaug/ops/linear_kl.py.
        boundary: keep the last prompt position among the input rows.
        official: take the official code's rows, padding included (input_logits only).
        rows, share: use a share of the rows in each training step, weighted so that the loss is the same in
            expectation; see selfaug/objective/sampling.py.

    Raises:
        UserError: a value outside its range.
    """

    alpha: float = 0.5
    position: Position = "input_logits"
    divergence: Divergence = "kl_base_tuned"
    boundary: bool = True
    official: bool = False
    rows: Rows = "all"
    share: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha) or self.alpha < 0:
            raise UserError(f"alignment.alpha={self.alpha} is not allowed: set it to 0 or a positive number.")
        if self.position not in POSITIONS:
            raise UserError(f"alignment.position={self.position} is unknown: set it to one of {', '.join(POSITIONS)}.")
        if self.divergence not in get_args(Divergence):
            known = ", ".join(get_args(Divergence))
            raise UserError(f"alignment.divergence={self.divergence} is unknown: set it to one of {known}.")
        if self.official and (self.position != "input_logits" or not self.boundary):
            raise UserError(
                "alignment.official=true means the official code's rows: set alignment.position=input_logits and "
                "alignment.boundary=true with it."
            )
        if not self.sampling.everything and self.official:
            raise UserError(
                "alignment.official=true counts padding, which is never sampled: set alignment.rows=all with it."
            )

    @property
    def sampling(self) -> RowSampling:
        return RowSampling(self.rows, self.share)

    def select(self, batch: TokenBatch) -> Tensor:
        if self.official and batch.packed:
            raise UserError(
                "alignment.official=true counts padding, which a packed batch does not have: set data.packing=false."
            )
        return alignment_rows(
            batch.roles, self.position, boundary=self.boundary, official=self.official, last=batch.last
        )

    def total(self, tuned: Tensor, reference: Tensor, head: Head, weights: Tensor | None) -> Tensor:
        return linear_kl(
            tuned, reference, **head.arguments(), divergence=self.divergence, row_weights=weights, reduction="sum"
        )
