"""Entropy among the likeliest next tokens from hidden states, without [N, V] tensors: how sure the model is."""

import torch
from torch import Tensor

from selfaug.ops.head import HeadShape, cast, check_head, chunk_rows, head_logits, product_dtype, reduction_dtype


@torch.no_grad()
def linear_topk_entropy(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """-sum q log q of each row, [N], where q are the k largest probabilities, made to add up to 1. No gradient.

    In nats, at most log k; float32 (float64 for float64 hidden states).

    Args:
        hidden: [N, d] last hidden states.
        k: in [1, V].
        weight, bias, scale, softcap: the output head, as in linear_kl.
        chunk_bytes: what the [rows, V] buffers of one chunk may take together; see head.CHUNK_BYTES for the default.

    Raises:
        ValueError: shapes that do not fit, or a k outside its range.
    """
    shape = HeadShape(scale, softcap)
    check_head(hidden, weight, bias, shape)
    if not 1 <= k <= len(weight):
        raise ValueError(f"k={k} must be in [1, V] with V={len(weight)}")
    accurate, dtype = reduction_dtype(hidden), product_dtype(hidden)
    # Products, logits and one tensor on the way between them.
    size = chunk_rows(len(hidden), 3 * accurate.itemsize * len(weight), hidden.device, chunk_bytes)
    values = hidden.new_empty(len(hidden), dtype=accurate)
    with torch.autocast(hidden.device.type, enabled=False):
        weight = cast(weight, dtype)
        for start in range(0, len(hidden), size):
            logits = head_logits(hidden[start : start + size].to(dtype), weight, bias, shape)
            logs = torch.log_softmax(logits.topk(k, -1, sorted=False).values.to(accurate), -1)
            values[start : start + size] = -(logs.exp() * logs).sum(-1)
    return values
