"""A tuned model and its base on the same rows: one model with adapters to switch off, or two models.

Two models may have two output heads (full fine-tuning trains it too). Where the heads are the same, the KL is taken as
in training, from the difference of the hidden states, which keeps small values above the rounding (ops/linear_kl.py);
where they differ there is no such difference, and both sets of logits are computed in float32, chunk by chunk.
"""

import torch
from torch import Tensor, nn

from selfaug.evaluation.generation import evaluating
from selfaug.model.decoder import Decoder, Head
from selfaug.model.frozen_copy import autocast_as
from selfaug.model.reference import adapters_off, check_reference
from selfaug.ops import Divergence, linear_kl, linear_nll
from selfaug.ops.head import chunk_rows


class Pair:
    """base: None where it is `model` with its adapters off.

    Raises:
        UserError: no second model, and no adapters that could be switched off.
    """

    def __init__(self, model: nn.Module, base: nn.Module | None = None):
        if base is None:
            check_reference(model)
        self.tuned = Decoder(model)
        self.base = self.tuned if base is None else Decoder(base)
        self.one_head = base is None or _same(self.tuned.head, self.base.head)

    @property
    def device(self) -> torch.device:
        return _device(self.tuned)

    @torch.no_grad()
    def hidden(self, ids: Tensor, mask: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Last hidden states [N, d] of tuned and base, each on its device, on the chosen rows. ids, mask, rows: [B, T],
        padding on the right."""
        with evaluating(self.tuned.model):
            tuned = self.tuned.hidden(ids, mask, right_padded=True)[rows]
        there = _device(self.base)
        with adapters_off(self.base.model), autocast_as(ids.device, there):  # of a second model: in eval mode
            base = self.base.hidden(ids.to(there), mask.to(there), right_padded=True)[rows.to(there)]
        return tuned, base

    @torch.no_grad()
    def kl(self, tuned: Tensor, base: Tensor, divergence: Divergence = "kl_base_tuned") -> Tensor:
        """KL of each row [N] in nats, from what `hidden` has returned."""
        if self.one_head:
            base = base.to(tuned.device)
            return linear_kl(tuned, base, **self.tuned.head.arguments(), divergence=divergence, reduction="none")
        # Of every row two sets of logits, their log-probabilities and what lies between.
        size = chunk_rows(len(tuned), 24 * len(self.tuned.head.arguments()["weight"]), tuned.device, None)
        parts = [tuned.new_empty(0, dtype=torch.float32)]
        with torch.autocast(tuned.device.type, enabled=False), torch.autocast(base.device.type, enabled=False):
            for start in range(0, len(tuned), size):
                log_tuned, log_base = (
                    head.logits(hidden[start : start + size].float()).log_softmax(-1).to(tuned.device)
                    for head, hidden in ((self.tuned.head, tuned), (self.base.head, base))
                )
                if divergence == "kl_tuned_base":
                    log_base, log_tuned = log_tuned, log_base
                parts.append((log_base.exp() * (log_base - log_tuned)).sum(-1))
        return torch.cat(parts)

    @torch.no_grad()
    def nll(self, tuned: Tensor, base: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """-log p(target) of each row [N] in nats, of tuned and of base."""
        return (
            linear_nll(tuned, targets, **self.tuned.head.arguments()),
            linear_nll(base, targets.to(base.device), **self.base.head.arguments()).to(tuned.device),
        )


def _device(decoder: Decoder) -> torch.device:
    return decoder.head.arguments()["weight"].device


def _same(one: Head, other: Head) -> bool:
    if (one.scale, one.softcap) != (other.scale, other.softcap):
        return False
    for name in ("weight", "bias"):
        mine, theirs = one.arguments()[name], other.arguments()[name]
        if (mine is None) != (theirs is None):
            return False
        if mine is not None and not (
            mine.shape == theirs.shape and torch.equal(mine.float(), theirs.to(mine.device).float())
        ):
            return False
    return True
