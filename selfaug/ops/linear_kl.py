"""KL between two distributions that share one output head, from hidden states, without [N, V] tensors.

The reference (base) and the tuned model differ in their last hidden states only; the head W is one and frozen:

    kl_base_tuned = KL(base || tuned) = sum_v p_base (log p_base - log p_tuned)      what the official code computes
    kl_tuned_base = KL(tuned || base) = sum_v p_tuned (log p_tuned - log p_base)     what the paper writes (3.3)

The chunked implementation walks over the rows, takes the gradient in the forward pass (so that no buffer outlives its
chunk), and computes three products a chunk: the tuned logits, the logit *difference* and the gradient; none for a
frozen head. The difference comes from the difference of the hidden states, D = (h_base - h_tuned) W^T, and not from
subtracting two sets of logits: logits of size 20 in bfloat16 carry errors of 0.1, which drown a KL of 1e-4; D carries
a relative error of 2^-8 of itself. It is exactly 0 where the hidden states are equal.

What happens between the products is in kl_rows.py (torch) and kl_triton.py (CUDA). These files, head.py and torch are
all that this op needs.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from selfaug.ops import kl_rows, kl_triton
from selfaug.ops.head import HeadShape, cast, check_head, chunk_rows, head_logits, product_dtype, reduction_dtype
from selfaug.ops.kl_rows import DIVERGENCES, Divergence

# The logits are faster in large products, the gradient, whose sums run over the whole vocabulary, in smaller ones
# (bfloat16 on a CPU with AMX, 682 rows: 62 ms and 140 ms; the gradient in two halves: 80 ms).
GRADIENT_ROWS = 384
# On a CPU a chunk has so many rows whatever they take: with fewer the products need up to twice the time (121 rows of a
# 152K vocabulary in float32), and the buffers weigh no more than the head itself.
LEAST_ROWS = 384


def linear_kl(
    hidden: Tensor,
    reference: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    divergence: Divergence = "kl_base_tuned",
    row_weights: Tensor | None = None,
    excluded: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    impl: Literal["auto", "naive", "chunked", "triton"] = "auto",
    chunk_bytes: int | None = None,
) -> Tensor:
    """KL between base and tuned next-token distributions, a value in nats per row.

    Args:
        hidden: [N, d] last hidden states of the tuned model; gradients flow to it.
        reference: [N, d] last hidden states of the base model for the same rows; a constant.
        weight: [V, d] the output head. Frozen, it costs no gradient and no buffer; trainable, its gradient is taken
            through the tuned distribution alone (the base distribution is a constant).
        bias: [V] of the head.
        scale, softcap, temperature: logits = cap(scale * (h W^T + b)) / temperature. No factor temperature^2 is
            applied to the result.
        divergence: "kl_base_tuned" (default) or "kl_tuned_base".
        row_weights: [N] a factor for each row; rows of weight 0 are left out before the first product. Constants.
        excluded: [N] int64, a token of each row that is left out of both distributions, which are normalised over the
            others: the target-masked KL of arXiv 2605.29498, with the row's target.
        reduction: over the N rows: the mean is the (weighted) sum / N, and that of no rows is 0, with the graph kept.
        impl: "naive" builds whole [N, V] logits (for tests and as documentation), "chunked" does not, and "triton" is
            "chunked" with one CUDA kernel between the products; "auto" is "triton" where it works, else "chunked".
        chunk_bytes: what the [rows, V] buffers of one chunk may take together; see head.CHUNK_BYTES for the default.

    Returns:
        A scalar, or [N] with reduction="none", in float32 (float64 for float64 hidden states).

    Raises:
        ValueError: shapes that do not fit, or an unknown name.
    """
    shape = HeadShape(scale, softcap, temperature)
    check_head(hidden, weight, bias, shape)
    if reference.shape != hidden.shape:
        raise ValueError(f"reference {tuple(reference.shape)} and hidden {tuple(hidden.shape)} must have one shape")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
    if impl not in ("auto", "naive", "chunked", "triton"):
        raise ValueError(f"impl must be auto, naive, chunked or triton, got {impl!r}")
    if excluded is not None and excluded.shape != hidden.shape[:1]:
        raise ValueError(f"excluded {tuple(excluded.shape)} must be [N] with N={len(hidden)}")
    if impl == "triton" and excluded is not None:
        raise ValueError("impl=triton cannot leave tokens out: use auto")
    reference = reference.detach()
    kept = None
    if row_weights is not None:
        if row_weights.shape != hidden.shape[:1]:
            raise ValueError(f"row_weights {tuple(row_weights.shape)} must be [N] with N={len(hidden)}")
        row_weights = row_weights.detach()
        kept = row_weights.nonzero().squeeze(-1)
        if len(kept) == len(hidden):
            kept = None
    n = len(hidden)
    if kept is not None:
        hidden, reference = hidden[kept], reference[kept]
        excluded = None if excluded is None else excluded[kept]
    if impl == "naive":
        rows = naive_kl(hidden, reference, weight, bias, shape, divergence, excluded)
    else:
        rows = _chunked_kl(hidden, reference, weight, bias, shape, divergence, excluded, impl, chunk_bytes)
    if row_weights is not None:
        rows = rows * (row_weights if kept is None else row_weights[kept])
    if reduction == "none":
        return rows if kept is None else rows.new_zeros(n).index_put((kept,), rows)
    return rows.sum() if reduction == "sum" else rows.sum() / max(n, 1)


def naive_kl(
    hidden: Tensor,
    reference: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: HeadShape,
    divergence: Divergence,
    excluded: Tensor | None = None,
) -> Tensor:
    """The formula as it stands, [N]: the yardstick for every other implementation."""
    frozen_bias = None if bias is None else bias.detach()
    tuned, base = head_logits(hidden, weight, bias, shape), head_logits(reference, weight.detach(), frozen_bias, shape)
    if excluded is not None:
        others = torch.ones_like(tuned, dtype=torch.bool).scatter_(1, excluded.unsqueeze(-1), False)
        tuned, base = (logits[others].view(len(logits), logits.shape[1] - 1) for logits in (tuned, base))
    log_tuned, log_base = tuned.log_softmax(-1), base.log_softmax(-1)
    if divergence == "kl_base_tuned":
        return (log_base.exp() * (log_base - log_tuned)).sum(-1)
    return (log_tuned.exp() * (log_tuned - log_base)).sum(-1)


def _chunked_kl(
    hidden: Tensor,
    reference: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: HeadShape,
    divergence: Divergence,
    excluded: Tensor | None,
    impl: str,
    chunk_bytes: int | None,
) -> Tensor:
    dtype = product_dtype(hidden)
    fits = dtype != torch.float64 and excluded is None
    triton = impl == "triton" or (impl == "auto" and fits and kl_triton.available(hidden.device))
    # Two buffers in the products' dtype; without a kernel, on an accelerator, four more to compute in.
    row_bytes = 2 * dtype.itemsize * len(weight)
    if not triton and hidden.device.type != "cpu":
        row_bytes += 4 * reduction_dtype(hidden).itemsize * len(weight)
    least = LEAST_ROWS if hidden.device.type == "cpu" else 1
    size = chunk_rows(len(hidden), row_bytes, hidden.device, chunk_bytes, least)
    head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and head_trains:
        # A trainable head is not the case this op is made for: recompute each chunk in the backward pass instead.
        starts = range(0, max(len(hidden), 1), size)
        return torch.cat(
            [
                checkpoint(naive_kl, hidden[i : i + size], reference[i : i + size], weight, bias, shape, divergence,
                           None if excluded is None else excluded[i : i + size], use_reentrant=False)
                for i in starts
            ]
        )  # fmt: skip
    between = kl_triton.divergence_rows if triton else kl_rows.divergence_rows
    return _ChunkedKL.apply(hidden, reference, weight, bias, shape, divergence, excluded, size, dtype, between)


class _ChunkedKL(torch.autograd.Function):
    """Per-row KL [N]. The gradient of each row to its hidden state is taken in forward; backward only scales it."""

    @staticmethod
    def forward(ctx, hidden, reference, weight, bias, shape, divergence, excluded, size, dtype, between):
        needs_gradient = ctx.needs_input_grad[0]
        accurate = reduction_dtype(hidden)
        n, vocabulary = len(hidden), len(weight)
        values = hidden.new_empty(n, dtype=accurate)
        gradient = torch.empty_like(hidden) if needs_gradient else None
        with torch.autocast(hidden.device.type, enabled=False):
            weight = cast(weight, dtype)
            buffers = hidden.new_empty(2, min(size, n), vocabulary, dtype=dtype)
            for start in range(0, n, size):
                rows = slice(start, min(start + size, n))
                tuned, difference = buffers[:, : rows.stop - start]
                hidden_rows = hidden[rows].to(accurate)
                torch.mm(hidden_rows.to(dtype), weight.T, out=tuned)
                torch.mm((reference[rows].to(accurate) - hidden_rows).to(dtype), weight.T, out=difference)
                left_out = {} if excluded is None else {"excluded": excluded[rows]}
                values[rows] = between(tuned, difference, bias, shape, divergence, needs_gradient, **left_out)
                if gradient is not None:  # `tuned` now holds dKL/d(h W^T)
                    pieces = -(-len(tuned) // GRADIENT_ROWS) if tuned.device.type == "cpu" else 1
                    gradient[rows] = torch.cat([torch.mm(piece, weight) for piece in tuned.chunk(pieces)])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad.unsqueeze(-1)).to(gradient.dtype), *[None] * 9
