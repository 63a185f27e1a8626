"""Negative log-likelihood from hidden states, without [N, V] tensors: the task half of the loss.

Same chunks and the same treatment of the head as linear_kl, which see. (torch 2.13 has a chunked
linear_cross_entropy, without soft-cap, scale or the per-row values that the measurements need.)
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from selfaug.ops.head import HeadShape, check_head, chunk_rows, head_logits, product, product_dtype, reduction_dtype
from selfaug.ops.linear_kl import CHUNK_BYTES


def linear_nll(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """-log p(target) of each row, [N], in nats, float32 (float64 for float64 hidden states).

    Args:
        hidden: [N, d] last hidden states; gradients flow to it.
        targets: [N] int64 token ids, each in [0, V).
        weight, bias, scale, softcap: the output head, as in linear_kl.
        chunk_bytes: what the [rows, V] buffers of one chunk may take together.

    Raises:
        ValueError: shapes that do not fit.
    """
    shape = HeadShape(scale, softcap)
    check_head(hidden, weight, bias, shape)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} must be [N] with N={len(hidden)}")
    size = chunk_rows(len(hidden), len(weight), 2, reduction_dtype(hidden).itemsize, chunk_bytes)
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        starts = range(0, max(len(hidden), 1), size)
        return torch.cat(
            [
                checkpoint(naive_nll, hidden[i : i + size], targets[i : i + size], weight, bias, shape,
                           use_reentrant=False)
                for i in starts
            ]
        )  # fmt: skip
    return _ChunkedNLL.apply(hidden, targets, weight, bias, shape, size, product_dtype(hidden))


def naive_nll(hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, shape: HeadShape) -> Tensor:
    """The formula as it stands, [N]."""
    return torch.nn.functional.cross_entropy(head_logits(hidden, weight, bias, shape), targets, reduction="none")


class _ChunkedNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, targets, weight, bias, shape, size, dtype):
        accurate = reduction_dtype(hidden)
        n = len(hidden)
        values = hidden.new_empty(n, dtype=accurate)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        with torch.autocast(hidden.device.type, enabled=False):
            weight = weight.to(dtype)
            buffer = hidden.new_empty(size, len(weight), dtype=accurate)
            for start in range(0, n, size):
                rows = slice(start, min(start + size, n))
                logits, target = buffer[: rows.stop - start], targets[rows].unsqueeze(-1)
                product(hidden[rows].to(accurate), weight.T, dtype, out=logits)
                if bias is not None:
                    logits.add_(bias)
                slope = None
                if shape.softcap is not None:
                    logits.mul_(shape.scale / shape.softcap).tanh_()
                    slope = torch.mul(logits, logits).neg_().add_(1.0)
                    logits.mul_(shape.softcap)
                elif shape.scale != 1.0:
                    logits.mul_(shape.scale)
                values[rows] = logits.logsumexp(-1) - logits.gather(-1, target).squeeze(-1)
                if gradient is not None:
                    torch.softmax(logits, -1, out=logits)
                    logits.scatter_add_(-1, target, torch.full_like(target, -1, dtype=accurate))
                    if slope is not None:
                        logits.mul_(slope)
                    grad_rows = torch.mm(logits.to(dtype), weight).to(accurate)
                    gradient[rows] = grad_rows.mul_(shape.scale).to(gradient.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad.unsqueeze(-1)).to(gradient.dtype), None, None, None, None, None, None
