"""Attention over packed rows, and attention as a measure of which tokens matter."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def packed_states(body: nn.Module, input_ids: Tensor, spans: Sequence[Any]) -> Tensor:
    """Last hidden states [B, T, d] of packed rows. input_ids: [B, T]; spans: (row, start, stop) of each example."""
    raise NotImplementedError


@contextmanager
def received_attention(model: nn.Module, tokens: Any) -> Iterator[Callable[[], Tensor]]:
    """Inside, a forward pass of `model` over `tokens` records which tokens the question and the response attend to."""
    raise NotImplementedError
    yield
