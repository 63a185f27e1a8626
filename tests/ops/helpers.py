"""What the tests of the ops compare with: the formulas written out anew, sharing no code with selfaug.ops."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DIVERGENCES = ("kl_base_tuned", "kl_tuned_base")


def plain_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """[N, d] to [N, V], as the model families' own code has it."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits / temperature


def plain_kl(hidden: Tensor, reference: Tensor, divergence: str, **head: Any) -> Tensor:
    """[N], with torch's kl_div, whose arguments are (log q, log p) for KL(p || q)."""
    tuned = torch.log_softmax(plain_logits(hidden, **head), -1)
    with torch.no_grad():
        base = torch.log_softmax(plain_logits(reference, **head), -1)
    log_p, log_q = (base, tuned) if divergence == "kl_base_tuned" else (tuned, base)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


@dataclass
class Case:
    """Tensors of one head and N rows; `head` holds the keyword arguments beside hidden and reference."""

    hidden: Tensor
    reference: Tensor
    head: dict[str, Any] = field(default_factory=dict)
    targets: Tensor | None = None


def make_case(
    rows: int = 7,
    vocabulary: int = 31,
    width: int = 5,
    *,
    bias: bool = False,
    dtype: torch.dtype = torch.float64,
    distance: float = 0.3,
    logit_std: float = 3.0,
    seed: int = 0,
    **head: Any,
) -> Case:
    """Rows whose logits are `logit_std` wide; the reference is `distance` (relative) away from hidden."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = normal(rows, width)
    reference = hidden + distance * normal(rows, width)
    weight = logit_std * width**-0.5 * normal(vocabulary, width)
    head["weight"] = weight.to(dtype)
    head["bias"] = normal(vocabulary).to(dtype) if bias else None
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    return Case(hidden.to(dtype).requires_grad_(), reference.to(dtype), head, targets)


def chunk_sizes(vocabulary: int) -> dict[str, int]:
    """chunk_bytes for: one row at a time; an odd number of rows that does not divide N; all rows at once."""
    return {"one row": 1, "odd": 3 * 4 * vocabulary * 8, "all": 2**27}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected, in float64."""
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm()).item()


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation inside returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out
