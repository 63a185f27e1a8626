"""A batch of tokens in which every token has a role."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # label of a token that is not to be learned, as in transformers
TASK = "task"  # the data source that every run has


class Role(IntEnum):
    """What a token is. TEMPLATE: system text, instructions and chat markup."""

    PADDING = 0
    TEMPLATE = 1
    DOCUMENT = 2
    QUESTION = 3
    RESPONSE = 4


class Span(NamedTuple):
    """Where an example lies in a batch: tokens [start, stop) of row `row`."""

    row: int
    start: int
    stop: int


def token_key(input_ids: np.ndarray) -> str:
    """Names an example by its tokens alone: equal tokens, equal key, whatever batch, process or run they are in."""
    return hashlib.blake2b(np.ascontiguousarray(input_ids, dtype="<i8").tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class TokenBatch:
    """Tokens of several examples, all tensors [B, T]. labels[t] is the token at t where it is to be learned, else -100.

    Padded, every example has a row of its own. Packed, several follow each other in one row; each then has positions
    from 0 and attends to itself alone.

    Args:
        documents: rank of the document that a token belongs to, from 1; 0 for all other tokens. None: not known.
        sources: number, in source_names, of the data source that a token is from, -1 of padding. None: all are
            task data.
        source_names: what the sources are called; see selfaug/data/mixture.py.
        ids: names of the examples, for messages about them.
        spans, keys: where each example lies, and its `token_key`; left out, they are worked out when asked for.
        packed: several examples may share a row.
        right_padded: known to have padding on the right only, which causal attention never sees, so that the model
            may be run without a mask.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    roles: Tensor
    documents: Tensor | None = None
    ids: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()
    keys: tuple[str, ...] = ()
    packed: bool = False
    right_padded: bool = False
    sources: Tensor | None = None
    source_names: tuple[str, ...] = (TASK,)

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

    @property
    def examples(self) -> tuple[tuple[Span, str], ...]:
        """Span and key of every example; rows that are all padding hold none."""
        spans = self.spans
        if not spans:
            if self.packed:
                raise ValueError("a packed batch must say where its examples lie: give spans")
            real = self.attention_mask.cpu().bool()
            edges = [(i, row.nonzero().flatten()) for i, row in enumerate(real) if row.any()]
            spans = tuple(Span(i, int(at[0]), int(at[-1]) + 1) for i, at in edges)
        if self.keys:
            return tuple(zip(spans, self.keys, strict=True))
        ids = self.input_ids.cpu().numpy()
        return tuple((span, token_key(ids[span.row, span.start : span.stop])) for span in spans)

    @property
    def asking(self) -> Tensor:
        """[B, T] bool: the question and response tokens, whose attention tells which other tokens matter."""
        return (self.roles == Role.QUESTION) | (self.roles == Role.RESPONSE)

    def of(self, source: str) -> Tensor:
        """[B, T] bool: the tokens of a data source's examples."""
        if source not in self.source_names:
            return torch.zeros_like(self.roles, dtype=torch.bool)
        if self.sources is None:
            return torch.ones_like(self.roles, dtype=torch.bool)
        return self.sources == self.source_names.index(source)

    @cached_property
    def last(self) -> Tensor | None:
        """[B, T] bool: the last token of each example of a packed batch, after which another one begins."""
        if not self.packed:
            return None
        last = torch.zeros(self.roles.shape, dtype=torch.bool)
        for span in self.spans:
            last[span.row, span.stop - 1] = True
        return last.to(self.roles.device, non_blocking=True)

    def to(self, device: torch.device, non_blocking: bool = False) -> "TokenBatch":
        """The same batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "TokenBatch":
        """Called by a DataLoader with pin_memory=True."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, function: Callable[[Tensor], Tensor]) -> "TokenBatch":
        return replace(
            self,
            input_ids=function(self.input_ids),
            attention_mask=function(self.attention_mask),
            labels=function(self.labels),
            roles=function(self.roles),
            documents=None if self.documents is None else function(self.documents),
            sources=None if self.sources is None else function(self.sources),
        )
