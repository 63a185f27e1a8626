"""KL between two distributions that share one output head, from hidden states, without [N, V] tensors.

The reference (base) and the tuned model differ in their last hidden states only; the head W is one and frozen:

    kl_base_tuned = KL(base || tuned) = sum_v p_base (log p_base - log p_tuned)      what the official code computes
    kl_tuned_base = KL(tuned || base) = sum_v p_tuned (log p_tuned - log p_base)     what the paper writes (3.3)

THIS FILE DECIDES THE DIRECTION; everything else only passes its name on.

The chunked implementation walks over the rows, takes the gradient in the forward pass (so that no buffer outlives its
chunk), and computes three products a chunk: the tuned logits, the logit *difference* and the gradient. The difference
comes from the difference of the hidden states, D = (h_base - h_tuned) W^T, and not from subtracting two sets of
logits: logits of size 20 in bfloat16 carry errors of 0.1, which drown a KL of 1e-4; D carries a relative error of
2^-8 of itself. It is exactly 0 where the hidden states are equal.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from selfaug.ops.head import HeadShape, check_head, chunk_rows, head_logits, product, product_dtype, reduction_dtype

Divergence = Literal["kl_base_tuned", "kl_tuned_base"]
DIVERGENCES: tuple[Divergence, ...] = ("kl_base_tuned", "kl_tuned_base")
CHUNK_BYTES = 128 * 2**20


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
    reduction: Literal["mean", "sum", "none"] = "mean",
    impl: Literal["auto", "naive", "chunked"] = "auto",
    chunk_bytes: int = CHUNK_BYTES,
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
        reduction: over the N rows. The mean of no rows is 0, with the graph kept.
        impl: "naive" builds whole [N, V] logits (for tests and as documentation), "chunked" does not; "auto" is
            "chunked".
        chunk_bytes: what the [rows, V] buffers of one chunk may take together.

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
    reference = reference.detach()
    if impl == "naive":
        rows = naive_kl(hidden, reference, weight, bias, shape, divergence)
    elif impl in ("auto", "chunked"):
        rows = _chunked_kl(hidden, reference, weight, bias, shape, divergence, chunk_bytes)
    else:
        raise ValueError(f"impl must be auto, naive or chunked, got {impl!r}")
    if row_weights is not None:
        rows = rows * row_weights
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / max(rows.numel(), 1)


def naive_kl(
    hidden: Tensor, reference: Tensor, weight: Tensor, bias: Tensor | None, shape: HeadShape, divergence: Divergence
) -> Tensor:
    """The formula as it stands, [N]: the yardstick for every other implementation."""
    frozen_bias = None if bias is None else bias.detach()
    log_tuned = head_logits(hidden, weight, bias, shape).log_softmax(-1)
    log_base = head_logits(reference, weight.detach(), frozen_bias, shape).log_softmax(-1)
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
    chunk_bytes: int,
) -> Tensor:
    itemsize = reduction_dtype(hidden).itemsize
    size = chunk_rows(len(hidden), len(weight), 4 if shape.softcap else 3, itemsize, chunk_bytes)
    head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and head_trains:
        # A trainable head is not the case this op is made for: recompute each chunk in the backward pass instead.
        starts = range(0, max(len(hidden), 1), size)
        return torch.cat(
            [
                checkpoint(naive_kl, hidden[i : i + size], reference[i : i + size], weight, bias, shape, divergence,
                           use_reentrant=False)
                for i in starts
            ]
        )  # fmt: skip
    return _ChunkedKL.apply(hidden, reference, weight, bias, shape, divergence, size, product_dtype(hidden))


class _ChunkedKL(torch.autograd.Function):
    """Per-row KL [N]. The gradient of each row to its hidden state is taken in forward; backward only scales it."""

    @staticmethod
    def forward(ctx, hidden, reference, weight, bias, shape, divergence, size, dtype):
        needs_gradient = ctx.needs_input_grad[0]
        accurate = reduction_dtype(hidden)
        n, vocabulary = len(hidden), len(weight)
        values = hidden.new_empty(n, dtype=accurate)
        gradient = torch.empty_like(hidden) if needs_gradient else None
        with torch.autocast(hidden.device.type, enabled=False):
            weight = weight.to(dtype)
            buffers = hidden.new_empty(3, size, vocabulary, dtype=accurate)
            for start in range(0, n, size):
                rows = slice(start, min(start + size, n))
                m = rows.stop - start
                tuned, difference, base = buffers[:, :m]
                hidden_rows = hidden[rows].to(accurate)
                product(hidden_rows, weight.T, dtype, out=tuned)
                product(reference[rows].to(accurate) - hidden_rows, weight.T, dtype, out=difference)
                slope = _finish_logits(tuned, difference, bias, shape)
                torch.add(tuned, difference, out=base)
                values[rows] = _divergence_rows(tuned, difference, base, divergence, needs_gradient)
                if gradient is not None:  # `tuned` now holds dKL/dlogits
                    if slope is not None:
                        tuned.mul_(slope)
                    grad_rows = torch.mm(tuned.to(dtype), weight).to(accurate)
                    gradient[rows] = grad_rows.mul_(shape.scale / shape.temperature).to(gradient.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad.unsqueeze(-1)).to(gradient.dtype), None, None, None, None, None, None, None


def _finish_logits(tuned: Tensor, difference: Tensor, bias: Tensor | None, shape: HeadShape) -> Tensor | None:
    """In place: raw products to finished tuned logits and finished differences. Returns the cap's derivative."""
    if bias is not None:
        tuned.add_(bias)
    if shape.softcap is None:
        factor = shape.scale / shape.temperature
        if factor != 1.0:
            tuned.mul_(factor)
            difference.mul_(factor)
        return None
    # tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b): the difference keeps its relative accuracy under the cap.
    tuned.mul_(shape.scale / shape.softcap)
    difference.mul_(shape.scale / shape.softcap)
    capped_base = torch.add(tuned, difference).tanh_()
    tuned.tanh_()
    factor = shape.softcap / shape.temperature
    difference.tanh_().mul_(capped_base.mul_(tuned).neg_().add_(1.0)).mul_(factor)
    slope = torch.mul(tuned, tuned, out=capped_base).neg_().add_(1.0)
    tuned.mul_(factor)
    return slope


def _divergence_rows(
    tuned: Tensor, difference: Tensor, base: Tensor, divergence: Divergence, needs_gradient: bool
) -> Tensor:
    """KL of each row [m] from tuned logits, difference = base - tuned and base logits, all [m, V] and all overwritten.
    With needs_gradient, `tuned` holds dKL/d(tuned logits) afterwards.

    With c = logsumexp(base) - logsumexp(tuned):  log p_base - log p_tuned = difference - c, hence
      KL(base||tuned) = sum p_base difference - c,      gradient p_tuned - p_base
      KL(tuned||base) = c - sum p_tuned difference,     gradient p_tuned ((c - difference) - KL)
    """
    tuned_top, base_top = tuned.amax(-1), base.amax(-1)
    torch.softmax(tuned, -1, out=tuned)
    torch.softmax(base, -1, out=base)
    # After softmax the largest entry is exp(top - logsumexp): the log-normaliser without another pass of exp.
    # The tops are large and nearly equal, so their difference is taken first.
    c = (base_top - tuned_top) - (base.amax(-1).log() - tuned.amax(-1).log())
    if divergence == "kl_base_tuned":
        if needs_gradient:
            tuned.sub_(base)
        return base.mul_(difference).sum(-1).sub_(c)
    value = c - torch.mul(tuned, difference, out=base).sum(-1)
    if needs_gradient:
        tuned.mul_(difference.neg_().add_((c - value).unsqueeze(-1)))
    return value
