"""Entropy of next-token distributions from hidden states, without [N, V] tensors: which rows the model is unsure of."""

import torch
from torch import Tensor

from selfaug.ops.head import HeadShape, check_head, chunk_rows, head_logits, product_dtype, reduction_dtype
from selfaug.ops.linear_kl import CHUNK_BYTES


@torch.no_grad()
def linear_entropy(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """-sum p log p of each row, [N], in nats, float32 (float64 for float64 hidden states). No gradient.

    Args:
        hidden: [N, d] last hidden states.
        weight, bias, scale, softcap: the output head, as in linear_kl.
        chunk_bytes: what the [rows, V] buffers of one chunk may take together.

    Raises:
        ValueError: shapes that do not fit.
    """
    shape = HeadShape(scale, softcap)
    check_head(hidden, weight, bias, shape)
    accurate, dtype = reduction_dtype(hidden), product_dtype(hidden)
    size = chunk_rows(len(hidden), len(weight), 3, accurate.itemsize, chunk_bytes)
    values = hidden.new_empty(len(hidden), dtype=accurate)
    with torch.autocast(hidden.device.type, enabled=False):
        weight = weight.to(dtype)
        for start in range(0, len(hidden), size):
            logits = head_logits(hidden[start : start + size].to(dtype), weight, bias, shape).to(accurate)
            top = logits.amax(-1)
            chances = torch.softmax(logits, -1)
            normaliser = top - chances.amax(-1).log()  # the largest chance is exp(top - normaliser)
            values[start : start + size] = normaliser - torch.linalg.vecdot(chances, logits)
    return values
