"""The training objective: NLL on the response plus a weighted list of terms. The only implementation of it.

    L = (sum of NLL over the output rows) / N_output  +  sum over terms of alpha * (sum over its rows) / N_term

Every N counts the rows of the whole optimiser step, of all micro-batches and all processes, so that neither padding
nor the way a step is cut into micro-batches changes the loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from selfaug.errors import UserError
from selfaug.model.decoder import Decoder
from selfaug.model.reference import AdaptersOff, Reference
from selfaug.objective.batch import TokenBatch
from selfaug.objective.rows import output_rows
from selfaug.objective.terms import Term
from selfaug.ops import linear_nll

NLL = "nll"


@dataclass(frozen=True)
class Losses:
    """`loss` to call backward on; `parts` by name, unweighted: this batch's share of each mean, in nats."""

    loss: Tensor
    parts: dict[str, Tensor]


class Objective:
    """NLL plus `terms` (name to Term; none is plain fine-tuning), whose base model `reference` knows."""

    def __init__(self, terms: Mapping[str, Term] | None = None, reference: Reference | None = None):
        self.terms = dict(terms or {})
        self.reference = reference or AdaptersOff()
        scores = {term.sampling.score for term in self.terms.values()} - {None}
        if len(scores) > 1:
            raise UserError(f"Terms sample their rows by {' and by '.join(sorted(map(str, scores)))}: use one of them.")
        self._score = scores.pop() if scores else None
        # The official code's rows include padding, whose states depend on the mask.
        self._masked = any(getattr(term, "official", False) for term in self.terms.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The parts of the loss: nll and the terms, in a fixed order."""
        return (NLL, *self.terms)

    def check(self, model: nn.Module) -> None:
        """Raise UserError where a term needs a reference that `model` cannot give."""
        if self.terms:
            self.reference.check(model)

    def count(self, batch: TokenBatch) -> Tensor:
        """How many rows each part has in this batch: [1 + number of terms] int64, ordered as `names`.

        Add them up over micro-batches and processes to get the step's totals. Sampling does not change them.
        """
        masks = [output_rows(batch.roles, batch.last), *(term.select(batch) for term in self.terms.values())]
        return torch.stack([mask.sum() for mask in masks])

    def __call__(
        self, decoder: Decoder, batch: TokenBatch, totals: Tensor, draw: tuple[int, int] | None = None
    ) -> Losses:
        """The loss of one micro-batch, whose means are over `totals` rows (see count).

        draw: (seed, step) of the row sampling. None takes every row, as measurements do.
        """
        totals = totals.clamp_min(1)
        head = decoder.head
        tuned = decoder.states(batch, masked=self._masked)  # [B, T, d]

        rows = output_rows(batch.roles, batch.last)
        targets = batch.labels[:, 1:][rows[:, :-1]]
        nll = linear_nll(tuned[rows], targets, **head.arguments()).sum() / totals[0]
        loss, parts = nll, {NLL: nll}

        if self.terms:
            score = self._score if draw is not None else None
            reference = self.reference.states(decoder, batch, masked=self._masked, score=score)
        for total, (name, term) in zip(totals[1:], self.terms.items(), strict=True):
            rows, weights = term.select(batch), None
            if draw is not None and not term.sampling.everything:
                rows, weights = term.sampling.draw(batch, rows, reference.scores, draw)
            with torch.set_grad_enabled(torch.is_grad_enabled() and term.alpha != 0):
                penalty = term.total(tuned[rows], reference.hidden[rows], head, weights) / total
            parts[name] = penalty
            if term.alpha != 0:  # adding 0 * KL would already change the bits of the gradient
                loss = loss + term.alpha * penalty
        return Losses(loss, parts)
