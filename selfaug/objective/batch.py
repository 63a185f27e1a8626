"""A batch of tokens in which every token has a role."""

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

IGNORE = -100  # label of a token that is not to be predicted, as in transformers


class Role(IntEnum):
    """What a token is. TEMPLATE: system text, instructions and chat markup."""

    PADDING = 0
    TEMPLATE = 1
    DOCUMENT = 2
    QUESTION = 3
    RESPONSE = 4


@dataclass(frozen=True)
class TokenBatch:
    """B sequences padded to T tokens, all [B, T]. labels[t] is the token at t where it is to be learned, else -100.

    `ids` names the examples, for messages about them. `right_padded`: known to have padding on the right only, which
    causal attention never sees, so that the model may be run without a mask.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    roles: Tensor
    ids: tuple[str, ...] = ()
    right_padded: bool = False

    @classmethod
    def from_labels(cls, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> "TokenBatch":
        """From transformers' three tensors. Of the roles only response, padding and the rest are known then."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if not (input_ids.shape == attention_mask.shape == labels.shape and input_ids.dim() == 2):
            raise ValueError(
                f"input_ids {tuple(input_ids.shape)}, attention_mask {tuple(attention_mask.shape)} and labels "
                f"{tuple(labels.shape)} must all be [B, T]"
            )
        roles = torch.full_like(input_ids, Role.TEMPLATE)
        roles = roles.masked_fill(labels != IGNORE, Role.RESPONSE).masked_fill(attention_mask == 0, Role.PADDING)
        return cls(input_ids, attention_mask, labels, roles)

    def to(self, device: torch.device, non_blocking: bool = False) -> "TokenBatch":
        """The same batch on another device."""
        names = ("input_ids", "attention_mask", "labels", "roles")
        return replace(self, **{n: getattr(self, n).to(device, non_blocking=non_blocking) for n in names})

    def pin_memory(self) -> "TokenBatch":
        """Called by a DataLoader with pin_memory=True."""
        names = ("input_ids", "attention_mask", "labels", "roles")
        return replace(self, **{n: getattr(self, n).pin_memory() for n in names})
