"""From logits to divergences and their gradients, row by row: what linear_kl does between its matrix products.

THIS FILE AND kl_triton.py DECIDE THE DIRECTION of the KL; everything else only passes its name on.

With D = base logits - tuned logits and c = logsumexp(base) - logsumexp(tuned) = log E_tuned[exp D]:

    log p_base - log p_tuned = D - c
    KL(base||tuned) = E_base[D] - c         gradient to the tuned logits  p_tuned - p_base
    KL(tuned||base) = c - E_tuned[D]        gradient to the tuned logits  p_tuned ((c - D) - KL)
"""

from typing import Literal

import torch
from torch import Tensor

from selfaug.ops.head import HeadShape

Divergence = Literal["kl_base_tuned", "kl_tuned_base"]
DIVERGENCES: tuple[Divergence, ...] = ("kl_base_tuned", "kl_tuned_base")

# On a CPU the passes over the logits run on blocks of rows that stay in the cores' own caches: 2 to 3 times faster
# than over a whole chunk, whose every pass would go to main memory.
BLOCK_BYTES_PER_THREAD = 2**20
# Up to here exp(D) times a probability neither overflows nor loses mass that counts: what underflows in p_tuned is
# below 1e-38, and exp(30) = 1e13; what is left must not be as small itself (`_one_softmax_does`).
LARGEST_FAST_DIFFERENCE = 30.0


def divergence_rows(
    tuned: Tensor,
    difference: Tensor,
    bias: Tensor | None,
    shape: HeadShape,
    divergence: Divergence,
    needs_gradient: bool,
    excluded: Tensor | None = None,
) -> Tensor:
    """KL of each row [m], in float32 at least, from the raw products, which are overwritten.

    Args:
        tuned: [m, V] h_tuned W^T. With needs_gradient it holds dKL/d(h_tuned W^T) afterwards.
        difference: [m, V] (h_base - h_tuned) W^T.
        bias: [V]; shape: what else the head does.
        excluded: [m], a token of each row that is left out of both distributions.
    """
    m, vocabulary = tuned.shape
    accurate = torch.float64 if tuned.dtype == torch.float64 else torch.float32
    size = _block_rows(m, vocabulary, tuned.device)
    copies = tuned.new_empty(1 if tuned.dtype == accurate else 3, size, vocabulary, dtype=accurate)
    values = tuned.new_empty(m, dtype=accurate)
    for start in range(0, m, size):
        rows = slice(start, min(start + size, m))
        work = copies[0, : rows.stop - start]
        t, d = tuned[rows], difference[rows]
        if tuned.dtype != accurate:
            t, d = copies[1:, : rows.stop - start]
            t.copy_(tuned[rows])
            d.copy_(difference[rows])
        slope = _finish_logits(t, d, bias, shape, work)
        if excluded is not None:  # probability 0 in both, and no part of any sum
            token = excluded[rows].unsqueeze(-1)
            t.scatter_(1, token, -torch.inf)
            d.scatter_(1, token, 0.0)
        values[rows] = _finished_rows(t, d, work, divergence, needs_gradient)
        if needs_gradient:
            if slope is not None:
                t.mul_(slope)
            if shape.scale != shape.temperature:
                t.mul_(shape.scale / shape.temperature)
            if tuned.dtype != accurate:
                tuned[rows] = t
    return values


def _block_rows(rows: int, vocabulary: int, device: torch.device) -> int:
    if device.type != "cpu":
        return max(rows, 1)
    threads = torch.get_num_threads()
    wanted = threads * BLOCK_BYTES_PER_THREAD // (4 * vocabulary)
    return max(1, min(rows, max(wanted, threads)))


def _finish_logits(
    tuned: Tensor, difference: Tensor, bias: Tensor | None, shape: HeadShape, work: Tensor
) -> Tensor | None:
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
    capped_base = torch.add(tuned, difference, out=work).tanh_()
    tuned.tanh_()
    factor = shape.softcap / shape.temperature
    difference.tanh_().mul_(capped_base.mul_(tuned).neg_().add_(1.0)).mul_(factor)
    slope = torch.mul(tuned, tuned).neg_().add_(1.0)
    tuned.mul_(factor)
    return slope


def _one_softmax_does(tuned: Tensor, difference: Tensor, work: Tensor) -> bool:
    """Whether the sum over p_tuned exp(D), which is exp(logsumexp(base) - logsumexp(tuned)), is a number that the
    terms which underflow do not count in; `work` is overwritten."""
    low, high = torch.aminmax(difference)
    if not high <= LARGEST_FAST_DIFFERENCE:
        return False
    if low >= -LARGEST_FAST_DIFFERENCE:
        return True
    # A single token may be far less likely for the base model, a whole row not. A logsumexp is at most log V = 13 above
    # its row's largest logit.
    tops = torch.add(tuned, difference, out=work).amax(-1) - tuned.amax(-1)
    return bool(tops.amin() >= 13 - LARGEST_FAST_DIFFERENCE)


def _finished_rows(
    tuned: Tensor, difference: Tensor, work: Tensor, divergence: Divergence, needs_gradient: bool
) -> Tensor:
    """KL of each row [m] from finished logits and differences [m, V]; all three are overwritten.
    With needs_gradient, `tuned` holds dKL/d(tuned logits) afterwards.

    Where D is 0 everywhere, both sums run over equal numbers in equal order, so value and gradient are exactly 0.
    """
    # A question to the device: fine on a CPU, too slow to ask an accelerator for every chunk.
    if tuned.device.type == "cpu" and _one_softmax_does(tuned, difference, work):
        # p_base is p_tuned exp(D), normalised: one softmax instead of two.
        p_tuned = torch.softmax(tuned, -1, out=tuned)
        p_base = torch.exp(difference, out=work).mul_(p_tuned)
        sum_tuned, sum_base = p_tuned.sum(-1), p_base.sum(-1)
        c = (sum_base / sum_tuned).log_()
    else:
        base = torch.add(tuned, difference, out=work)
        tuned_top, base_top = tuned.amax(-1), base.amax(-1)
        p_tuned, p_base = torch.softmax(tuned, -1, out=tuned), torch.softmax(base, -1, out=base)
        sum_tuned = sum_base = torch.ones_like(tuned_top)
        # After softmax the largest entry is exp(top - logsumexp). The tops are large and nearly equal, so their
        # difference is taken first.
        c = (base_top - tuned_top) - (p_base.amax(-1).log_() - p_tuned.amax(-1).log_())
    if divergence == "kl_base_tuned":
        value = difference.mul_(p_base).sum(-1).div_(sum_base).sub_(c)
        if needs_gradient:
            p_tuned.addcmul_(p_base, (sum_tuned / sum_base).unsqueeze(-1), value=-1)
        return value
    value = c - torch.mul(p_tuned, difference, out=work).sum(-1)
    if needs_gradient:
        p_tuned.mul_(difference.neg_().add_((c - value).unsqueeze(-1)))
    return value
