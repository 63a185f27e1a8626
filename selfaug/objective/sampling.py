"""Row sampling: align a share of the rows, so that the sampled KL and its gradient equal the full ones in expectation.

Row i of an example is drawn with probability p_i and then weighs 1 / p_i (Horvitz and Thompson 1952). The rows are
drawn by systematic sampling: the p_i are laid end to end, and the rows hit by a comb of teeth 1 apart with one random
offset are taken. So p_i is exact, nearly the same number of rows is drawn every time, and they are spread over the
example.

The draw depends on seed, step and the tokens of the example alone, not on the batch that it is in.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from selfaug.errors import UserError
from selfaug.objective.batch import TokenBatch

Rows = Literal["all", "random", "entropy", "attention", "document_rank"]
# Of the draws, this share is uniform whatever the score, which bounds the weights by 1 / (UNIFORM * share).
UNIFORM = 0.2


@dataclass(frozen=True)
class RowSampling:
    """Which of the aligned rows are used in a training step.

    Args:
        rows: all | random | entropy (rows on which the base model is unsure are likelier) | attention (rows whose
            token the question and the response attend to) | document_rank (rows of better-ranked documents).
        share: expected share of each example's rows that is drawn, in (0, 1]. 1 is the same as rows=all.

    Raises:
        UserError: a value outside its range.
    """

    rows: Rows = "all"
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.rows not in get_args(Rows):
            raise UserError(f"alignment.rows={self.rows} is unknown: set it to one of {', '.join(get_args(Rows))}.")
        if not (isinstance(self.share, (int, float)) and 0 < self.share <= 1):
            raise UserError(f"alignment.share={self.share} is not allowed: set it to a number above 0 and at most 1.")
        if self.rows == "all" and self.share != 1:
            raise UserError(
                f"alignment.share={self.share} has no effect with alignment.rows=all: set alignment.rows=random."
            )

    @property
    def everything(self) -> bool:
        return self.rows == "all" or self.share == 1

    @property
    def score(self) -> Literal["entropy", "attention"] | None:
        """What the reference pass must tell about each row."""
        if self.everything or (self.rows != "entropy" and self.rows != "attention"):
            return None
        return self.rows

    def draw(
        self, batch: TokenBatch, mask: Tensor, scores: Tensor | None, draw: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """The rows of `mask` [B, T] bool that are used in this step, as a mask [B, T], and their weights [N].

        scores: [B, T] from the reference pass, where `score` asks for them. draw: (seed, step).
        """
        # On the host, and back in one go: hardly anything to compute, and much to decide.
        device, mask = mask.device, mask.cpu()
        weights = torch.zeros(mask.shape, dtype=torch.float32)
        importance = self._importance(batch, scores).cpu()
        for span, key in batch.examples:
            here = (span.row, slice(span.start, span.stop))
            example = mask[here]
            chances = inclusion_probabilities(example * importance[here], example, self.share)
            weights[here] = systematic_weights(chances, _offset(*draw, key))
        drawn = weights > 0
        return drawn.to(device), weights[drawn].to(device)

    def _importance(self, batch: TokenBatch, scores: Tensor | None) -> Tensor:
        """[B, T], not negative."""
        if self.rows == "random":
            return torch.ones(batch.roles.shape, device=batch.roles.device)
        if self.rows == "document_rank":
            if batch.documents is None:
                raise UserError(
                    "alignment.rows=document_rank needs to know which document each token is from, which this data "
                    "does not say: set alignment.rows=random."
                )
            # 1 for the best document, 1/2, 1/3 ... for the next; what is no document counts as the best one.
            return 1.0 / batch.documents.clamp_min(1).float()
        if scores is None:
            raise ValueError(f"rows={self.rows} needs scores from the reference pass")
        return scores.float().clamp_min(0)


def inclusion_probabilities(importance: Tensor, mask: Tensor, share: float) -> Tensor:
    """[T] float64: probabilities proportional to importance [T], at most 1, 0 outside `mask` [T], which add up to
    share * (number of rows)."""
    mask = mask.to(torch.float64)
    count = mask.sum()
    importance = importance.to(torch.float64) * mask
    total = importance.sum()
    even = mask / count.clamp_min(1)
    mixed = torch.where(total > 0, (1 - UNIFORM) * importance / total.clamp_min(1e-300) + UNIFORM * even, even)
    wanted = share * count
    chances = torch.zeros_like(mixed)
    certain = torch.zeros_like(mixed)
    # Rows that would be drawn more than once are certain; the others share what is left. A few rounds settle it.
    for _ in range(64):
        rest = mixed * (1 - certain)
        chances = certain + rest * ((wanted - certain.sum()) / rest.sum().clamp_min(1e-300)).clamp_min(0)
        over = (chances > 1).to(torch.float64)
        if not over.any():
            break
        certain = torch.maximum(certain, over)
    return chances.clamp(max=1) * mask


def systematic_weights(chances: Tensor, offset: float) -> Tensor:
    """[T] float32: 1 / p_i for the rows that are drawn, 0 for the others. chances: [T] float64; offset in [0, 1)."""
    teeth = torch.floor(chances.cumsum(0) - offset)
    before = torch.cat([teeth.new_full((1,), math.floor(-offset)), teeth[:-1]])
    hit = (teeth > before) & (chances > 0)
    return torch.where(hit, 1.0 / chances.clamp_min(1e-12), 0.0).float()


def _offset(seed: int, step: int, key: str) -> float:
    """Uniform in [0, 1)."""
    digest = hashlib.blake2b(f"{seed} {step} {key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53
