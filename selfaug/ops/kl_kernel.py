"""The Triton kernel behind kl_triton.py: one program per row, two passes over the vocabulary. Needs triton to import.

The first pass reads the two raw products of a row once and keeps, in each lane of a block, a running maximum and the
sums relative to it; the lanes are joined at the end, so that nothing in the loop waits for other threads. The second
pass, for the gradient only, reads the products again and overwrites one of them: 4 reads and 1 write of a row in the
products' dtype, where kl_rows.py, the same in torch, makes over twenty, most of them in float32.

Rounding. Base logits are never formed where they would be rounded to the size of a logit: t + d with t = 30 and
d = 1e-4 has lost d to two digits. The base distribution is taken relative to a point with a t and a d of its own:
(t - t_top) + (d - d_top). Where all d are 0 this is t - t_top, and both sums see the same numbers in the same order;
kl_triton.py launches without floating-point contraction so that a compiler cannot make them differ.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # below every logit, and finite: -inf - -inf is NaN


@triton.jit
def _tanh(x):
    """To float32 accuracy relative to itself, also near 0. Triton's own is not to be had in every version and mode."""
    square = x * x
    series = tl.fma(square, tl.fma(square, tl.fma(square, -17.0 / 315.0, 2.0 / 15.0), -1.0 / 3.0), 1.0)
    size = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.2, x * series, tl.where(x < 0, -size, size))


@triton.jit
def _finished(tuned, difference, bias, columns, inside, inner, outer, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """Of a block of one row: finished tuned logits, finished differences, derivative of the cap. See _finish_logits
    in kl_rows.py. `inner` multiplies before the cap, `outer` after it."""
    t = tl.load(tuned + columns, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(difference + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        t += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    t *= inner
    d *= inner
    slope = tl.full(t.shape, 1.0, tl.float32)
    if SOFTCAP:
        capped = _tanh(t)
        d = _tanh(d) * (1.0 - capped * _tanh(t + d)) * outer
        slope = 1.0 - capped * capped
        t = capped * outer
    return tl.where(inside, t, LOWEST), d, slope


@triton.jit
def _joined(total, term, grew, factor):
    """total + term * factor, or, where the maximum grew to this term, total * factor + term: one exp for both."""
    return tl.fma(tl.where(grew, total, term), factor, tl.where(grew, term, total))


@triton.jit
def divergence_rows_kernel(
    tuned,
    difference,
    bias,
    values,
    vocabulary,
    tuned_stride,
    difference_stride,
    inner,
    outer,
    chain,
    BASE_TUNED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # rows times vocabulary passes 2^31
    tuned += row * tuned_stride
    difference += row * difference_stride
    lanes = tl.arange(0, BLOCK)

    tuned_top = tl.full((BLOCK,), LOWEST, tl.float32)
    base_top, base_lift = tuned_top, tl.zeros((BLOCK,), tl.float32)  # the base maximum's t and its d
    tuned_sum, base_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)  # sum of p D, p as yet unnormalised
    for start in range(0, vocabulary, BLOCK):
        columns = start + lanes
        inside = columns < vocabulary
        t, d, _ = _finished(tuned, difference, bias, columns, inside, inner, outer, HAS_BIAS, SOFTCAP)

        above = t - tuned_top
        tuned_grew, tuned_factor = above > 0, tl.exp(-tl.abs(above))
        tuned_sum = _joined(tuned_sum, 1.0, tuned_grew, tuned_factor)
        tuned_top = tl.where(tuned_grew, t, tuned_top)

        above = (t - base_top) + (d - base_lift)
        base_grew, base_factor = above > 0, tl.exp(-tl.abs(above))
        base_sum = _joined(base_sum, 1.0, base_grew, base_factor)
        base_top = tl.where(base_grew, t, base_top)
        base_lift = tl.where(base_grew, d, base_lift)

        if BASE_TUNED:
            weighted = _joined(weighted, d, base_grew, base_factor)
        else:
            weighted = _joined(weighted, d, tuned_grew, tuned_factor)

    # Join the lanes. A lane that saw no logit has LOWEST for its maximum, hence the factor 0.
    top = tl.max(tuned_top, 0)
    tuned_factor = tl.exp(tuned_top - top)
    tuned_total = tl.sum(tuned_sum * tuned_factor, 0)
    reference = tl.max(base_top, 0)
    lift = tl.max(base_top + base_lift, 0) - reference  # any point near the maximum serves: its rounding does no harm
    base_factor = tl.exp((base_top - reference) + (base_lift - lift))
    base_total = tl.sum(base_sum * base_factor, 0)
    c = (reference - top) + lift + tl.log(tl.div_rn(base_total, tuned_total))  # div_rn: x / x is 1, exactly
    if BASE_TUNED:
        value = tl.sum(weighted * base_factor, 0) / base_total - c
    else:
        value = c - tl.sum(weighted * tuned_factor, 0) / tuned_total
    tl.store(values + row, value)

    if GRADIENT:
        tuned_scale, base_scale = 1.0 / tuned_total, 1.0 / base_total
        for start in range(0, vocabulary, BLOCK):
            columns = start + lanes
            inside = columns < vocabulary
            t, d, slope = _finished(tuned, difference, bias, columns, inside, inner, outer, HAS_BIAS, SOFTCAP)
            p_tuned = tl.exp(t - top) * tuned_scale
            if BASE_TUNED:
                gradient = p_tuned - tl.exp((t - reference) + (d - lift)) * base_scale
            else:
                gradient = p_tuned * ((c - d) - value)
            gradient *= slope * chain
            tl.store(tuned + columns, gradient.to(tuned.dtype.element_ty), mask=inside)
