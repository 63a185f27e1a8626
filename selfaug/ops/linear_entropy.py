"""Entropy of next-token distributions from hidden states, without [N, V] tensors: which rows the model is unsure of."""

import torch
from torch import Tensor

from selfaug.ops.head import HeadShape, cast, check_head, chunk_rows, head_logits, product_dtype, reduction_dtype


@torch.no_grad()
def linear_entropy(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """-sum p log p of each row, [N], in nats, float32 (float64 for float64 hidden states). No gradient.

    Args:
        hidden: [N, d] last hidden states.
        weight, bias, scale, softcap: the output head, as in linear_kl.
        chunk_bytes: what the [rows, V] buffers of one chunk may take together; see head.CHUNK_BYTES for the default.

    Raises:
        ValueError: shapes that do not fit.
    """
    shape = HeadShape(scale, softcap)
    check_head(hidden, weight, bias, shape)
    accurate, dtype = reduction_dtype(hidden), product_dtype(hidden)
    size = chunk_rows(len(hidden), 4 * accurate.itemsize * len(weight), hidden.device, chunk_bytes)
    values = hidden.new_empty(len(hidden), dtype=accurate)
    with torch.autocast(hidden.device.type, enabled=False):
        weight = cast(weight, dtype)
        for start in range(0, len(hidden), size):
            logits = head_logits(hidden[start : start + size].to(dtype), weight, bias, shape).to(accurate)
            top = logits.amax(-1)
            chances = torch.softmax(logits, -1)
            normaliser = top - chances.amax(-1).log()  # the largest chance is exp(top - normaliser)
            values[start : start + size] = normaliser - chances.mul_(logits).sum(-1)
    return values
