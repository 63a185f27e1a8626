"""Which rows count. Row t holds the logits that predict token t+1; a row exists where tokens t and t+1 both do.

output rows: token t+1 is a response token.
learned rows: output rows whose token t+1 is also to be learned. They are all output rows, unless a data source is there
             for alignment only, or a method leaves tokens out (TokenBatch.labels).
input rows:  token t is not a response token. They include the *boundary row*, the last prompt position, which
             predicts the first response token, because the paper's code includes it (its mask is not shifted).
             boundary=False drops it; input and output rows are then disjoint and, with one response at the end,
             together are all rows.
document rows, question rows: token t is a document (question) token.
official:    what the official code's mask selects: every token that is not a response token, padding included,
             whether it predicts anything or not. For comparison only: the mean then depends on the padding.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from selfaug.errors import UserError
from selfaug.objective.batch import IGNORE, Role

Position = Literal["input_logits", "output_logits", "all_logits", "document_logits", "question_logits"]
POSITIONS: tuple[Position, ...] = get_args(Position)


def existing_rows(roles: Tensor, last: Tensor | None = None) -> Tensor:
    """[B, T] bool from roles [B, T]: token t and token t+1 are both there, not padding, and of one example.

    last: [B, T] bool, the last tokens of the examples, where several share a row (TokenBatch.last).
    """
    token = roles != Role.PADDING
    rows = token & _next(token)
    return rows if last is None else rows & ~last


def output_rows(roles: Tensor, last: Tensor | None = None) -> Tensor:
    """[B, T] bool: rows that predict a response token."""
    return existing_rows(roles, last) & _next(roles == Role.RESPONSE)


def learned_rows(roles: Tensor, labels: Tensor, last: Tensor | None = None) -> Tensor:
    """[B, T] bool: output rows whose token is to be learned; labels [B, T] as in TokenBatch."""
    return output_rows(roles, last) & _next(labels != IGNORE)


def alignment_rows(
    roles: Tensor, position: Position, *, boundary: bool = True, official: bool = False, last: Tensor | None = None
) -> Tensor:
    """[B, T] bool: the rows on which the tuned model is aligned to the base model."""
    response = roles == Role.RESPONSE
    if position == "output_logits":
        return output_rows(roles, last)
    if position == "all_logits":
        return existing_rows(roles, last)
    if official:  # sequences that are all padding stand for nothing and are no part of the official batch
        return ~response & (roles != Role.PADDING).any(1, keepdim=True)
    rows = existing_rows(roles, last) & ~response
    if position == "document_logits":
        rows &= roles == Role.DOCUMENT
    elif position == "question_logits":
        rows &= roles == Role.QUESTION
    return rows if boundary else rows & ~_next(response)


def check_boundary(boundary: bool, rows: Position, named: str) -> None:
    """Raise UserError where the boundary is to be dropped from rows that it is no boundary of."""
    if not boundary and rows in ("output_logits", "all_logits"):
        raise UserError(
            f"alignment.boundary=false drops the last prompt position from the input rows, and changes nothing of "
            f"{named}: set alignment.boundary=true with it."
        )


def _next(mask: Tensor) -> Tensor:
    """mask[t+1] at t, False at the last position."""
    return torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
