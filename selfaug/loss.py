"""selfaug_loss: the method for people with their own training loop (transformers Trainer, TRL, plain torch).

The same Objective as `python -m selfaug.train` uses; this file only translates transformers' tensors.
"""

import warnings
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from selfaug.errors import UserError
from selfaug.model.decoder import Decoder, verify_decoder
from selfaug.model.reference import AdaptersOff, Reference, check_head_frozen
from selfaug.objective import LogitAlignment, Objective, TokenBatch
from selfaug.objective.rows import Position
from selfaug.objective.sampling import Rows
from selfaug.ops import Divergence


class SelfAugLoss(NamedTuple):
    """loss = nll + alpha * kl. All three are scalars with a graph, but for kl where alpha is 0; `rows` is the
    number of aligned rows."""

    loss: Tensor
    nll: Tensor
    kl: Tensor
    rows: int


class RowCounts(NamedTuple):
    """What the two means are over: rows that predict a response token, and aligned rows."""

    response: int
    aligned: int


_verified: WeakSet[nn.Module] = WeakSet()  # models that `verify_decoder`, which runs the model, has passed
# References that have been checked, which may take a pass over all weights, by the model that they were checked with.
_checked: WeakKeyDictionary[nn.Module, "WeakSet[Reference]"] = WeakKeyDictionary()


def selfaug_loss(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    *,
    alpha: float = 0.5,
    position: Position = "input_logits",
    divergence: Divergence = "kl_base_tuned",
    boundary: bool = True,
    official: bool = False,
    step_rows: RowCounts | None = None,
    rows: Rows = "all",
    share: float = 1.0,
    draw: tuple[int, int] | None = None,
    reference: Reference | None = None,
) -> SelfAugLoss:
    """NLL on the response + alpha * KL between base and tuned model (SelfAug, arXiv 2509.03934, section 3.3).

    Args:
        model: a peft.PeftModel, or the transformers model inside which adapters were injected. Its adapters are
            switched off for one more forward pass without gradients.
        input_ids, attention_mask, labels: [B, T], as transformers takes them (labels not shifted, -100 where a token
            is not to be learned). Padding on either side; no mask means no padding.
        alpha, position, divergence, boundary, official: see selfaug.objective.LogitAlignment.
        step_rows: with gradient accumulation, the sums of `count_rows` over the micro-batches of the optimiser step;
            the losses of the micro-batches then add up to the step's (do not divide them by their number).
        rows, share: align a share of the rows only ("random", 0.25), the same in expectation; see RowSampling.
        draw: seed and number of the step, which decide what is drawn. None takes every row, as for validation.
        reference: where the base model's hidden states come from, for example a CachedReference; by default the
            second forward pass.

    Returns:
        SelfAugLoss; the means are over this batch's rows, or over step_rows.

    Raises:
        UserError: adapters off would not be the base model (weights train outside the adapters, an adapter on the
            output head ...), or a setting out of range.
        ValueError: tensors that do not fit, or share below 1 in training without draw.
    """
    _check(position)
    if draw is None and share != 1 and torch.is_grad_enabled():
        raise ValueError("share below 1 draws rows by seed and step: give draw=(seed, step)")
    term = LogitAlignment(alpha, position, divergence, boundary, official, rows, share)
    objective = Objective({"kl": term}, reference)
    batch = TokenBatch.from_labels(input_ids, attention_mask, labels)
    _check_model(model, objective)
    counts = objective.count(batch)
    if counts[0] and not counts[1] and position != "output_logits":
        warnings.warn(
            "selfaug_loss has no row to align, because labels make every token a response: set them to -100 on the "
            "prompt (in TRL: prompt-completion data).",
            stacklevel=2,
        )
    totals = counts if step_rows is None else torch.tensor(step_rows, device=counts.device)
    losses = objective(Decoder(model), batch, totals, draw)
    return SelfAugLoss(losses.loss, losses.parts["nll"], losses.parts["kl"], int(counts[1]))


def count_rows(
    attention_mask: Tensor | None,
    labels: Tensor,
    *,
    position: Position = "input_logits",
    boundary: bool = True,
    official: bool = False,
) -> RowCounts:
    """The rows of one micro-batch, to be added up for `selfaug_loss(step_rows=...)`. attention_mask, labels: [B, T]."""
    _check(position)
    term = LogitAlignment(0.0, position, boundary=boundary, official=official)
    counts = Objective({"kl": term}).count(TokenBatch.from_labels(labels, attention_mask, labels))
    return RowCounts(int(counts[0]), int(counts[1]))


def _check_model(model: nn.Module, objective: Objective) -> None:
    reference = objective.reference
    if isinstance(reference, AdaptersOff):
        reference.check(model)  # a look at the modules
    else:
        check_head_frozen(model)
        # Once, and before the first step: afterwards the base weights may be others, which the reference knows.
        checked = _checked.setdefault(model, WeakSet())
        if reference not in checked:
            reference.check(model)
            checked.add(reference)
    if model not in _verified:
        verify_decoder(model)
        # Under the caller's autocast it has left casts of the adapter without a graph, which torch before 2.10 takes.
        torch.clear_autocast_cache()
        _verified.add(model)


def _check(position: Position) -> None:
    if position in ("document_logits", "question_logits"):
        raise UserError(
            f"position={position} needs to know which tokens are documents and which are the question, which labels do "
            "not say: set position=input_logits, or call selfaug.objective.Objective with a TokenBatch that has roles."
        )
