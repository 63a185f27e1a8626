"""The implementations that benchmarks.linear_kl compares, each as forward + backward to the hidden states.

Every `build` takes a Problem and a chunk size and returns a function that computes the mean KL(base || tuned) over
the rows and its gradient. What has a chunk size gets the best of a few for the problem at hand, except selfaug's own,
which runs as it ships. What is not installed, or has no path for the device, raises Unavailable.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import Unavailable
from selfaug.ops import linear_kl

Run = Callable[[], tuple[Tensor | None, Tensor | None]]


class Problem(NamedTuple):
    """hidden [T, d] with requires_grad, reference [T, d], weight [V, d]; autocast: float32 tensors, bf16 products."""

    hidden: Tensor
    reference: Tensor
    weight: Tensor
    autocast: bool = False


def make_problem(rows: int, vocabulary: int, width: int, dtype: str, device: str, seed: int = 0) -> Problem:
    """Like a model early in fine-tuning: logits with a standard deviation of 3 (the largest are above 10), and tuned
    hidden states 3% away from the base model's, a KL of some 1e-3 nats."""
    random = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device)

    weight = normal(vocabulary, width).mul_(3 / width**0.5)
    reference = normal(rows, width)
    hidden = reference + 0.03 * normal(rows, width)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    return Problem(hidden.to(kind).requires_grad_(), reference.to(kind), weight.to(kind), dtype == "autocast")


def exact(problem: Problem) -> tuple[float, Tensor]:
    """Value and gradient in float64, of the very numbers that the problem holds."""
    hidden = problem.hidden.detach().double().requires_grad_()
    loss = linear_kl(hidden, problem.reference.double(), problem.weight.double(), impl="naive")
    loss.backward()
    assert hidden.grad is not None
    return loss.item(), hidden.grad


def errors(problem: Problem, run: Run, truth: tuple[float, Tensor]) -> dict[str, float]:
    """How far `run` is from float64: of the value in nats and relative, of the gradient as a relative distance and as
    the largest difference over the largest entry."""
    value, gradient = run()
    assert value is not None
    assert gradient is not None
    gap = gradient.double() - truth[1]
    return {
        "value_error": abs(value.item() - truth[0]),
        "value_error_relative": abs(value.item() / truth[0] - 1),
        "gradient_error": (gap.norm() / truth[1].norm()).item(),
        "gradient_error_largest": (gap.abs().max() / truth[1].abs().max()).item(),
    }


def _autograd(problem: Problem, loss_of: Callable[[Tensor], Tensor]) -> Run:
    hidden = problem.hidden

    def run() -> tuple[Tensor, Tensor]:
        hidden.grad = None
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=problem.autocast):
            loss = loss_of(hidden)
        loss.backward()
        assert hidden.grad is not None
        return loss.detach(), hidden.grad

    return run


def floor(problem: Problem, chunk: int) -> Run:
    """Not an implementation: the three matrix products that none can do without, into reused buffers, nothing else."""
    dtype = torch.bfloat16 if problem.autocast else problem.weight.dtype
    hidden, reference, weight = (tensor.detach().to(dtype) for tensor in problem[:3])
    logits, difference = hidden.new_empty(2, min(chunk, len(hidden)), len(weight))
    gradient = torch.empty_like(hidden)

    def run() -> tuple[None, None]:
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            m = len(hidden[rows])
            torch.mm(hidden[rows], weight.T, out=logits[:m])
            torch.mm(reference[rows], weight.T, out=difference[:m])
            torch.mm(logits[:m], weight, out=gradient[rows])
        return None, None

    return run


def selfaug(problem: Problem, chunk: int) -> Run:
    """selfaug.ops.linear_kl as it ships."""
    return _autograd(problem, lambda hidden: linear_kl(hidden, problem.reference, problem.weight))


def naive(problem: Problem, chunk: int) -> Run:
    """The formula in plain torch, whole logits."""
    return _autograd(problem, lambda hidden: linear_kl(hidden, problem.reference, problem.weight, impl="naive"))


def official(problem: Problem, chunk: int) -> Run:
    """What the official code computes: see official_kl."""
    return _autograd(problem, lambda hidden: official_kl(hidden, problem.reference, problem.weight))


def official_kl(hidden: Tensor, reference: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Logits of both models, whole and in float32; softmax of one and log-softmax of the other over all positions;
    the masked positions (here all of them) copied out; the mean over these of KL(base || tuned)."""
    with torch.no_grad():
        base = F.linear(reference, weight, bias).float()
    tuned = F.linear(hidden, weight, bias).float()
    return official_loss(base, tuned, torch.ones(len(hidden), dtype=torch.bool, device=hidden.device))


def official_loss(base: Tensor, tuned: Tensor, mask: Tensor) -> Tensor:
    """base, tuned: [..., V] float32 logits; mask: [...] bool, the positions that count."""
    log_tuned = F.log_softmax(tuned, dim=-1)[mask]
    return F.kl_div(log_tuned, F.softmax(base, dim=-1)[mask], reduction="batchmean")


def compiled(problem: Problem, chunk: int) -> Run:
    """torch.compile of one chunk's value and gradient, in a plain loop."""
    hidden, reference, weight = (tensor.detach() for tensor in problem[:3])

    def total(rows: Tensor, base: Tensor, weight: Tensor) -> Tensor:
        log_tuned = F.linear(rows, weight).float().log_softmax(-1)
        log_base = F.linear(base, weight).float().log_softmax(-1)
        return (log_base.exp() * (log_base - log_tuned)).sum()

    step = torch.compile(torch.func.grad_and_value(total), dynamic=False)

    def run() -> tuple[Tensor, Tensor]:
        gradient, value = torch.empty_like(hidden), hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            with torch.autocast(hidden.device.type, torch.bfloat16, enabled=problem.autocast):
                gradient[rows], part = step(hidden[rows], reference[rows], weight)
            value += part
        return value / len(hidden), gradient.div_(len(hidden))

    return run


def liger_chunked(problem: Problem, chunk: int) -> Run:
    """Liger's chunked JSD with beta = 0, which is KL(base || tuned). It always computes the head's gradient as well."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError as error:
        raise Unavailable(f"liger-kernel is not installed ({error})") from error
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=0.0,
        compiled=problem.hidden.is_cuda,  # its default; on a CPU it is the slower way
        chunk_size=chunk,
    )
    labels = torch.zeros(len(problem.hidden), dtype=torch.long, device=problem.hidden.device)
    return _autograd(
        problem, lambda hidden: loss(hidden, problem.weight, problem.reference, problem.weight, labels)
    )  # fmt: skip


def liger_triton(problem: Problem, chunk: int) -> Run:
    """Liger's Triton FusedLinearJSD, beta = 0."""
    if not problem.hidden.is_cuda:
        raise Unavailable("Triton kernels need a GPU")
    try:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    except ImportError as error:
        raise Unavailable(f"liger-kernel is not installed ({error})") from error
    loss = LigerFusedLinearJSD(jsd_beta=0.0)
    return _autograd(
        problem, lambda hidden: loss(hidden, problem.weight, problem.reference, problem.weight, None)
    )  # fmt: skip


def orda(problem: Problem, chunk: int) -> Run:
    """orda-kernel with a teacher that shares the head. Without a GPU it builds whole logits."""
    try:
        from orda_kernel import TiedTeacher, distillation_loss
    except ImportError as error:
        raise Unavailable(f"orda-kernel is not installed ({error})") from error
    labels = torch.zeros(len(problem.hidden), dtype=torch.long, device=problem.hidden.device)
    teacher = TiedTeacher(hidden=problem.reference)
    return _autograd(
        problem,
        lambda hidden: distillation_loss(
            hidden, problem.weight, labels, teacher,
            student_ce_weight=0.0, teacher_ce_weight=0.0, kl_weight=1.0, kl_temperature=1.0, kl_divergence="forward",
        ).loss,
    )  # fmt: skip


class Implementation(NamedTuple):
    """`chunks`: the chunk sizes to choose from, by device; none where it has no chunk size."""

    build: Callable[[Problem, int], Run]
    chunks: dict[str, tuple[int, ...]] = {}  # noqa: RUF012


IMPLEMENTATIONS: dict[str, Implementation] = {
    "floor": Implementation(floor, {"cpu": (64, 128, 256, 512), "cuda": (512, 1024, 2048, 4096, 16384)}),
    "selfaug": Implementation(selfaug),
    "naive": Implementation(naive),
    "official": Implementation(official),
    "compiled": Implementation(compiled, {"cpu": (256, 1024), "cuda": (1024, 4096)}),
    "liger_chunked": Implementation(liger_chunked, {"cpu": (256, 1024), "cuda": (1024, 4096)}),
    "liger_triton": Implementation(liger_triton),
    "orda": Implementation(orda),
}
