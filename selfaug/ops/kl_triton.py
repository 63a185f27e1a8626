"""What kl_rows.py does, in one CUDA kernel: optional, asked for with `available`, and never needed.

triton is imported on the first use on a GPU, not with this file; the CUDA builds of torch bring it along.
"""

import functools
import logging

import torch
from torch import Tensor

from selfaug.ops import kl_rows
from selfaug.ops.head import HeadShape
from selfaug.ops.kl_rows import DIVERGENCES, Divergence

log = logging.getLogger(__name__)

BLOCK = 4096
WARPS = 16


def available(device: torch.device) -> bool:
    """Whether the kernel can be used on this device: a GPU, triton installed, and a first tiny result that is right.
    Tried once per process and device; if not, the reason is logged once."""
    return device.type == "cuda" and _works(device)


@functools.cache
def _works(device: torch.device) -> bool:
    try:
        problem = _self_check(device)
    except Exception as error:  # whatever a missing module, a compiler or a driver can raise: the op works without
        problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if problem:
        log.warning("The KL runs without its Triton kernel on %s, in plain torch, more slowly: %s", device, problem)
    return not problem


def divergence_rows(
    tuned: Tensor,
    difference: Tensor,
    bias: Tensor | None,
    shape: HeadShape,
    divergence: Divergence,
    needs_gradient: bool,
) -> Tensor:
    """KL of each row [m], float32, from the raw products [m, V] of a GPU; see kl_rows.divergence_rows, whose meaning
    and arguments these are. The rows of a product may lie any distance apart, the elements of a row may not.

    Products in float64 are handed to kl_rows: the kernel computes in float32.
    """
    if tuned.dtype == torch.float64:
        return kl_rows.divergence_rows(tuned, difference, bias, shape, divergence, needs_gradient)
    from selfaug.ops.kl_kernel import divergence_rows_kernel

    m, vocabulary = tuned.shape
    values = tuned.new_empty(m, dtype=torch.float32)
    if m == 0:
        return values
    if shape.softcap is None:
        inner, outer = shape.scale / shape.temperature, 1.0
    else:
        inner, outer = shape.scale / shape.softcap, shape.softcap / shape.temperature
    with torch.cuda.device_of(tuned):  # triton launches on the current device, whichever the tensors are on
        divergence_rows_kernel[(m,)](
            tuned,
            difference,
            tuned if bias is None else bias.contiguous(),
            values,
            vocabulary,
            tuned.stride(0),
            difference.stride(0),
            inner,
            outer,
            shape.scale / shape.temperature,
            BASE_TUNED=divergence == "kl_base_tuned",
            HAS_BIAS=bias is not None,
            SOFTCAP=shape.softcap is not None,
            GRADIENT=needs_gradient,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,  # equal expressions must give equal numbers: the KL of equal rows is exactly 0
        )
    return values


def _self_check(device: torch.device) -> str | None:
    """What is wrong with the kernel's result on a tiny input, or None. Every branch of the kernel runs once."""
    generator = torch.Generator().manual_seed(0)
    rows, vocabulary = 3, BLOCK + 100  # more than one block, the last one not full
    tuned, difference = (3 * torch.randn(2, rows, vocabulary, generator=generator)).to(device, torch.bfloat16)
    difference[1] = 0
    bias = torch.randn(vocabulary, generator=generator).to(device)
    shape = HeadShape(scale=0.7, softcap=5.0, temperature=1.3)
    for divergence in DIVERGENCES:
        expected_gradient = tuned.double()
        expected = kl_rows.divergence_rows(
            expected_gradient, difference.double(), bias.double(), shape, divergence, True
        )
        gradient = tuned.clone()
        values = divergence_rows(gradient, difference, bias, shape, divergence, True)
        # bfloat16 gradients carry 2^-9 of themselves
        for name, found, wanted, limit in (
            ("values", values, expected, 1e-4),
            ("gradient", gradient, expected_gradient, 1e-2),
        ):
            error = ((found.double() - wanted).norm() / wanted.norm()).item()
            if not error <= limit:  # NaN too
                return f"its {name} of {divergence} are {error:.1e} (relative) from the formula's"
        if values[1].item() != 0 or gradient[1].any():
            return f"its {divergence} of equal rows is not exactly 0"
    return None
