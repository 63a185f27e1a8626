"""The training objective: NLL on the response plus a weighted list of terms. The only implementation of it.

    L = (sum of NLL over the learned rows) / N_learned  +  sum over terms of alpha * (sum over its rows) / N_term
        + sum over parameter terms of alpha * penalty

The learned rows are the output rows, unless a method leaves some out (rows.py). Every N counts the rows of the whole
optimiser step, of all micro-batches and all processes, so that neither padding nor the way a step is cut into
micro-batches changes the loss.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selfaug.errors import UserError
from selfaug.model.decoder import Decoder, Head
from selfaug.model.outputs import ModuleOutputs
from selfaug.model.reference import AdaptersOff, Reference
from selfaug.objective.batch import TASK, TokenBatch
from selfaug.objective.hidden import HiddenAlignment
from selfaug.objective.rows import learned_rows
from selfaug.objective.terms import ParameterTerm, States, Term, TokenWeights
from selfaug.ops import linear_nll

NLL = "nll"
WEIGHTED = "weighted_nll"
# Names of other metrics of a step, of other state in checkpoints, and in `prepared/`.
_RESERVED = (NLL, WEIGHTED, "loss", "alpha", "lr", "tokens", "grad_norm", "drift", "weights", "learn")


@dataclass(frozen=True)
class Losses:
    """`loss` to call backward on, but for the parameter terms; `parts` by name, not times alpha: this batch's share of
    each mean, in nats."""

    loss: Tensor
    parts: dict[str, Tensor]


class Objective:
    """NLL plus `terms` (name to Term or ParameterTerm; none is plain fine-tuning).

    reference: knows the base model. weights: of the response tokens; None counts all alike. sources: names of the data
    sources; with several, the NLL is measured of each.
    """

    def __init__(
        self,
        terms: Mapping[str, Term | ParameterTerm] | None = None,
        reference: Reference | None = None,
        weights: TokenWeights | None = None,
        sources: Sequence[str] = (TASK,),
    ):
        all_terms: dict[str, Any] = dict(terms or {})
        self.terms: dict[str, Term] = {k: v for k, v in all_terms.items() if not hasattr(v, "penalty")}
        self.parameter_terms: dict[str, ParameterTerm] = {k: v for k, v in all_terms.items() if k not in self.terms}
        self.reference = reference or AdaptersOff()
        self.weights = weights
        self.sources = tuple(sources) if len(sources) > 1 else ()
        for name in all_terms:
            if name in _RESERVED or name.startswith(f"{NLL}_"):
                raise UserError(f"A term cannot be called {name}, which names another part of the loss: rename it.")
        for name, term in self.terms.items():
            if (source := getattr(term, "source", None)) not in (None, *sources):
                raise UserError(
                    f"The term {name} is for the data source {source}, and there is none of that name: set its source "
                    f"to one of {', '.join(sources)}, or add {source} to data.mixture."
                )
        scores = {term.sampling.score for term in self.terms.values()} - {None}
        if len(scores) > 1:
            raise UserError(f"Terms sample their rows by {' and by '.join(sorted(map(str, scores)))}: use one of them.")
        self._score = scores.pop() if scores else None
        # What watches the modules of the model, by term, until the backward pass is done.
        self._inside: dict[str, ModuleOutputs] = {}
        # The official code's rows include padding, whose states depend on the mask.
        self._masked = any(getattr(term, "official", False) for term in self.terms.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The parts of the loss that are means over rows, in a fixed order: nll, what is minimised in its place where
        tokens are weighted, the nll of each source where there are several, the terms."""
        weighted = () if self.weights is None else (WEIGHTED,)
        return (NLL, *weighted, *self.measured, *self.terms)

    @property
    def measured(self) -> tuple[str, ...]:
        """The parts that are only looked at: the nll of each source."""
        return tuple(f"{NLL}_{source}" for source in self.sources)

    @property
    def minimised(self) -> str:
        """The part that stands in the loss for the NLL."""
        return NLL if self.weights is None else WEIGHTED

    def start(self, model: nn.Module) -> None:
        """Let the parameter terms that ask for it see the weights that the training starts from."""
        for term in self.parameter_terms.values():
            if hasattr(term, "start"):
                term.start(model)

    def check(self, model: nn.Module) -> None:
        """Raise UserError where a term needs what `model`, or its reference, cannot give."""
        if self.terms:
            self.reference.check(model)
        for term in self.terms.values():
            if isinstance(term, HiddenAlignment):
                term.modules(Decoder(model).body)
                if not isinstance(self.reference, AdaptersOff):
                    raise UserError(
                        f"alignment.position={term.position} compares states inside the model, which neither a cache "
                        "nor a copy keeps: set reference.cache=off (and reference.frozen_copy=false, with an adapter)."
                    )

    def count(self, batch: TokenBatch) -> Tensor:
        """How many rows each part has in this batch: [number of parts] int64, ordered as `names`.

        Add them up over micro-batches and processes to get the step's totals. Sampling does not change them.
        """
        learned = learned_rows(batch.roles, batch.labels, batch.last)
        masks = [learned] * (1 if self.weights is None else 2)
        masks += [learned & batch.of(source) for source in self.sources]
        masks += [term.select(batch) for term in self.terms.values()]
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
        # Of a sharded model all processes have to make the same passes, whatever rows theirs have.
        asked = self._inside or any(bool(rows.any()) for rows in selected.values())
        if self.terms and (asked or (isinstance(self.reference, AdaptersOff) and _sharded(decoder.body))):
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

        mean = dict(zip(self.names, totals, strict=True))
        loss, parts = self._nll(tuned, batch, head, mean)
        for name, term in self.terms.items():
            if name in self._inside:
                summed = self._inside[name].total / len(self._inside[name].modules)
            else:
                rows = selected[name]
                next_tokens = batch.input_ids.roll(-1, 1)[rows]
                base = tuned.detach() if reference is None else reference.hidden  # of no rows, where there is none
                states = States(tuned[rows], base[rows], next_tokens, weights[name])
                with torch.set_grad_enabled(torch.is_grad_enabled() and alphas[name] != 0):
                    summed = term.total(states, head)
                _check_scalar(summed, f"total of the term {name}")
            parts[name] = summed / mean[name]
            if alphas[name] != 0:  # adding 0 * KL would already change the bits of the gradient
                loss = loss + alphas[name] * parts[name]
        return Losses(loss, parts)

    def _nll(
        self, tuned: Tensor, batch: TokenBatch, head: Head, mean: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What is minimised of the learned rows, and all that is measured of them. tuned: [B, T, d]; mean: the number
        of rows that each part is divided by."""
        rows = learned_rows(batch.roles, batch.labels, batch.last)
        targets = batch.labels[:, 1:][rows[:, :-1]]
        hidden = tuned[rows]
        nll = linear_nll(hidden, targets, **head.arguments())  # [N]
        loss = nll.sum() / mean[NLL]
        parts = {NLL: loss}
        if self.weights is not None:
            with torch.no_grad():
                weights = self.weights(nll.detach(), hidden.detach(), head)
            if not isinstance(weights, Tensor) or weights.shape != nll.shape:  # it would be broadcast to something else
                raise UserError(
                    f"method.weights ({type(self.weights).__name__}) gives {_said(weights)} for {len(nll)} tokens: "
                    "return a tensor like nll, one weight for each."
                )
            loss = (weights * nll).sum() / mean[WEIGHTED]
            parts = {NLL: parts[NLL].detach(), WEIGHTED: loss}
        for source in self.sources:
            name = f"{NLL}_{source}"
            parts[name] = nll.detach()[batch.of(source)[rows]].sum() / mean[name]
        return loss, parts

    def penalties(self, model: nn.Module) -> tuple[Tensor | None, dict[str, Tensor]]:
        """alpha * penalty of all parameter terms together, None where no alpha is above 0, and each penalty by name."""
        total, found = None, {}
        for name, term in self.parameter_terms.items():
            # Sums over all weights are no place for the low precision of the model's products.
            with (
                torch.autocast(next(model.parameters()).device.type, enabled=False),
                torch.set_grad_enabled(torch.is_grad_enabled() and term.alpha != 0),
            ):
                penalty = term.penalty(model)
            _check_scalar(penalty, f"penalty of the term {name}")
            found[name] = penalty.detach()
            if term.alpha != 0:
                total = term.alpha * penalty if total is None else total + term.alpha * penalty
        return total, found

    def close(self) -> None:
        """Forget what the last call has kept for its backward pass."""
        while self._inside:
            self._inside.popitem()[1].close()


def _check_scalar(value: Any, what: str) -> None:
    """A sum of nothing is 0 in Python, and a vector would only fail in the backward pass."""
    if not isinstance(value, Tensor) or value.dim():
        raise UserError(f"The {what} is {_said(value)}: return a tensor of one number, without dimensions.")


def _said(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)[:40]


def _sharded(model: nn.Module) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule  # slow to import, and here it has been

    return isinstance(model, FSDPModule)
