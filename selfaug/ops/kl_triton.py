"""What kl_rows.py does, in one CUDA kernel: optional, asked for with `available`, and never needed.

triton is imported on the first use on a GPU, not with this file; the CUDA builds of torch bring it along.
"""

import functools
import importlib
import logging

import torch
from torch import Tensor

from selfaug.ops import kl_rows
from selfaug.ops.head import HeadShape
from selfaug.ops.kl_rows import DIVERGENCES, Divergence

log = logging.getLogger(__name__)

# Chosen for a Hopper GPU from what the compiler reports, the same for every vocabulary of 32K to 256K: a thread holds
# 4 elements of a block, so that its six running numbers for each stay within 40 to 50 registers, nothing spills, and
# 2 to 3 rows (32 to 48 warps) share a multiprocessor, enough to hide memory and exp behind one another. 8 elements a
# thread would halve the warps. Larger blocks on fewer, wider programs spill. Logits in bfloat16 make the kernel as
# busy with arithmetic as with memory, so the reads need not be wider. Where V is no multiple of 16 (GPT-2), they are
# element by element, and slower.
BLOCK = 2048
WARPS = 16


def available(device: torch.device) -> bool:
    """Whether the kernel can be used on this device: a GPU, triton installed, and a first tiny result that is right.
    Tried once per process and device; if not, the reason is logged once."""
    try:
        return device.type == "cuda" and _works(device)
    except torch.OutOfMemoryError:  # says nothing about the kernel: the next call tries again
        return False


@functools.cache
def _works(device: torch.device) -> bool:
    try:
        problem = _self_check(device)
    except torch.OutOfMemoryError:
        raise
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
    """KL of each row [m], float32, from the raw products [m, V] on a GPU: the arguments and the meaning of
    kl_rows.divergence_rows. The rows of a product may lie any distance apart.

    What the kernel does not do is handed to kl_rows: float64 (it computes in float32) and elements apart in a row.
    """
    if tuned.dtype == torch.float64 or tuned.stride(1) != 1 or difference.stride(1) != 1:
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
    """What is wrong with the kernel's results on a tiny input, or None. Raises whatever a broken installation raises.

    Two of its variants run: the usual one (bfloat16, kl_base_tuned, a plain head), which is then compiled already,
    and the one with everything else.
    """
    importlib.import_module("selfaug.ops.kl_kernel")
    generator = torch.Generator().manual_seed(0)
    vocabulary = BLOCK + 96  # a second block that is not full
    tuned, difference = (3 * torch.randn(2, 3, vocabulary, generator=generator)).to(device, torch.bfloat16)
    difference[1] = 0
    bias = torch.randn(vocabulary, generator=generator).to(device)
    for divergence, head_bias, shape in zip(
        DIVERGENCES, (None, bias), (HeadShape(), HeadShape(scale=0.7, softcap=5.0, temperature=1.3)), strict=True
    ):
        exact, gradient = tuned.double(), tuned.clone()
        expected = kl_rows.divergence_rows(exact, difference.double(), head_bias, shape, divergence, True)
        values = divergence_rows(gradient, difference.clone(), head_bias, shape, divergence, True)
        if values[1].item() != 0 or bool(gradient[1].any()):
            return f"{divergence} of equal rows is not exactly 0"
        # The gradient is rounded to bfloat16, 2^-9 of itself.
        for name, found, wanted, limit in (("value", values, expected, 1e-4), ("gradient", gradient, exact, 1e-2)):
            error = ((found.double() - wanted).norm() / wanted.norm()).item()
            if not error <= limit:  # NaN is wrong too
                return f"{name} of {divergence} is {error:.1e} (relative) off"
    return None
