"""The training objective: NLL on the response plus a weighted list of terms. The only implementation of it.

    L = (sum of NLL over the output rows) / N_output  +  sum over terms of alpha * (sum over its rows) / N_term

Every N counts the rows of the whole optimiser step, of all micro-batches and all processes, so that neither padding
nor the way a step is cut into micro-batches changes the loss.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selfaug.errors import UserError
from selfaug.model.decoder import Decoder
from selfaug.model.outputs import ModuleOutputs
from selfaug.model.reference import AdaptersOff, Reference
from selfaug.objective.batch import TokenBatch
from selfaug.objective.hidden import HiddenAlignment
from selfaug.objective.rows import output_rows
from selfaug.objective.terms import States, Term
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
        # What watches the modules of the model, by term, until the backward pass is done.
        self._inside: dict[str, ModuleOutputs] = {}
        self._masked = any(getattr(term, "official", False) for term in self.terms.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The parts of the loss: nll and the terms, in a fixed order."""
        return (NLL, *self.terms)

    def check(self, model: nn.Module) -> None:
        """Raise UserError where a term needs what `model`, or its reference, cannot give."""
        if self.terms:
            self.reference.check(model)
        for term in self.terms.values():
            if isinstance(term, HiddenAlignment):
                term.modules(Decoder(model).body)
                if not isinstance(self.reference, AdaptersOff):
                    raise UserError(
                        f"alignment.position={term.position} compares states inside the model, which a cache does not "
                        "keep: set reference.cache=off."
                    )

    def count(self, batch: TokenBatch) -> Tensor:
        """How many rows each part has in this batch: [1 + number of terms] int64, ordered as `names`.

        Add them up over micro-batches and processes to get the step's totals. Sampling does not change them.
        """
        masks = [output_rows(batch.roles, batch.last), *(term.select(batch) for term in self.terms.values())]
        return torch.stack([mask.sum() for mask in masks])

    def __call__(
        self,
        decoder: Decoder,
        batch: TokenBatch,
        totals: Tensor,
        draw: tuple[int, int] | None = None,
        alphas: Mapping[str, float] | None = None,
    ) -> Losses:
        """The loss of one micro-batch, whose means are over `totals` rows (see count).

        draw: (seed, step) of the row sampling. None takes every row, as measurements do.
        alphas: the weights of the terms by name, where a schedule has changed them.
        """
        self.close()
        totals = totals.clamp_min(1)
        alphas = {name: term.alpha for name, term in self.terms.items()} | dict(alphas or {})
        head = decoder.head
        selected = {name: term.select(batch) for name, term in self.terms.items()}  # [B, T] bool
        for name, term in self.terms.items():
            if isinstance(term, HiddenAlignment):
                self._inside[name] = ModuleOutputs(term.modules(decoder.body), selected[name])

        reference: Any = None
        if self.terms:
            with ExitStack() as recording:
                for outputs in self._inside.values():
                    recording.enter_context(outputs.recorded())
                score = self._score if draw is not None else None
                reference = self.reference.states(decoder, batch, masked=self._masked, score=score)
        weights: dict[str, Tensor | None] = dict.fromkeys(self.terms)
        if draw is not None and reference is not None:
            for name, term in self.terms.items():
                if not term.sampling.everything:
                    selected[name], weights[name] = term.sampling.draw(batch, selected[name], reference.scores, draw)

        with ExitStack() as comparing:
            for name, outputs in self._inside.items():
                hidden: Any = self.terms[name]
                drawn = None if weights[name] is None else selected[name]
                comparing.enter_context(outputs.compared(hidden.compare, drawn, weights[name], alphas[name] != 0))
            tuned = decoder.states(batch, masked=self._masked)  # [B, T, d]

        rows = output_rows(batch.roles, batch.last)
        targets = batch.labels[:, 1:][rows[:, :-1]]
        nll = linear_nll(tuned[rows], targets, **head.arguments()).sum() / totals[0]
        loss, parts = nll, {NLL: nll}
        for total, (name, term) in zip(totals[1:], self.terms.items(), strict=True):
            if name in self._inside:
                summed = self._inside[name].total / len(self._inside[name].modules)
            else:
                rows = selected[name]
                next_tokens = batch.input_ids.roll(-1, 1)[rows]
                states = States(tuned[rows], reference.hidden[rows], next_tokens, weights[name])
                with torch.set_grad_enabled(torch.is_grad_enabled() and alphas[name] != 0):
                    summed = term.total(states, head)
            parts[name] = summed / total
            if alphas[name] != 0:  # adding 0 * KL would already change the bits of the gradient
                loss = loss + alphas[name] * parts[name]
        return Losses(loss, parts)

    def close(self) -> None:
        """Forget what the last call has kept for its backward pass."""
        while self._inside:
            self._inside.popitem()[1].close()
