"""Negative log-likelihood from hidden states, without [N, V] tensors: the task half of the loss.

Same chunks and the same treatment of the head as linear_kl, which see. (torch 2.13 has a chunked
linear_cross_entropy, without soft-cap, scale or the per-row values that the measurements need.)
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from selfaug.ops.head import HeadShape, cast, check_head, chunk_rows, head_logits, product_dtype, reduction_dtype


def linear_nll(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """-log p(target) of each row, [N], in nats, float32 (float64 for float64 hidden states).

    Args:
        hidden: [N, d] last hidden states; gradients flow to it.
        targets: [N] int64 token ids, each in [0, V).
        weight, bias, scale, softcap: the output head, as in linear_kl.
        chunk_bytes: what the [rows, V] buffers of one chunk may take together; see head.CHUNK_BYTES for the default.

    Raises:
        ValueError: shapes that do not fit.
    """
    shape = HeadShape(scale, softcap)
    check_head(hidden, weight, bias, shape)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} must be [N] with N={len(hidden)}")
    dtype = product_dtype(hidden)
    accurate = reduction_dtype(hidden).itemsize * (1 if softcap is None else 2)  # with the slope of the cap
    row_bytes = (accurate + dtype.itemsize) * len(weight)
    size = chunk_rows(len(hidden), row_bytes, hidden.device, chunk_bytes)
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        starts = range(0, max(len(hidden), 1), size)
        return torch.cat(
            [
                checkpoint(naive_nll, hidden[i : i + size], targets[i : i + size], weight, bias, shape,
                           use_reentrant=False)
                for i in starts
            ]
        )  # fmt: skip
    return _ChunkedNLL.apply(hidden, targets, weight, bias, shape, size, dtype)


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
            weight = cast(weight, dtype)
            raw = hidden.new_empty(min(size, n), len(weight), dtype=dtype)
            finished = raw if dtype == accurate else torch.empty_like(raw, dtype=accurate)
            for start in range(0, n, size):
                rows = slice(start, min(start + size, n))
                products, logits = raw[: rows.stop - start], finished[: rows.stop - start]
                target = targets[rows].unsqueeze(-1)
                torch.mm(hidden[rows].to(dtype), weight.T, out=products)
                if products is not logits:
                    logits.copy_(products)
                if bias is not None:
                    logits.add_(bias)
                slope = None
                if shape.softcap is not None:
                    logits.mul_(shape.scale / shape.softcap).tanh_()
                    slope = torch.mul(logits, logits).neg_().add_(1.0)
                    logits.mul_(shape.softcap)
                elif shape.scale != 1.0:
                    logits.mul_(shape.scale)
                top, chosen = logits.amax(-1), logits.gather(-1, target).squeeze(-1)
                torch.softmax(logits, -1, out=logits)
                # The largest probability is exp(top - logsumexp): the normaliser without another pass of exp.
                values[rows] = (top - chosen) - logits.amax(-1).log_()
                if gradient is not None:
                    logits.scatter_add_(-1, target, torch.full_like(target, -1, dtype=accurate))
                    if slope is not None:
                        logits.mul_(slope)
                    if shape.scale != 1.0:
                        logits.mul_(shape.scale)
                    gradient[rows] = torch.mm(logits.to(dtype), weight)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad.unsqueeze(-1)).to(gradient.dtype), None, None, None, None, None, None
