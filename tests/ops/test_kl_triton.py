"""The CUDA middle of linear_kl: what happens without triton, and the kernel against the formula in float64.

Without triton (it is no dependency; the CUDA builds of torch bring it along) the first part of this file runs. With
it, the kernel runs too: compiled where there is a GPU, else through triton's interpreter on CPU tensors, in a process
of its own, because triton looks at TRITON_INTERPRET when it is imported. By hand, in any environment with torch,
triton, numpy and pytest:

    TRITON_INTERPRET=1 python -m pytest --noconftest tests/ops/test_kl_triton.py
"""

import importlib.util
import itertools
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from selfaug.ops import kl_rows, kl_triton, linear_kl
from selfaug.ops.head import HeadShape
from tests.ops.helpers import DIVERGENCES, make_case, relative_error

ROOT = Path(__file__).resolve().parents[2]
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = HAS_TRITON and not INTERPRETED
HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if HAS_GPU and not INTERPRETED else torch.device("cpu")
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
runs_kernel = pytest.mark.skipif(
    not HAS_TRITON or not (INTERPRETED or HAS_GPU),
    reason="needs triton and a GPU or TRITON_INTERPRET=1; test_through_the_interpreter sets it",
)


# ---- the decision: runs everywhere ----


@pytest.fixture
def undecided():
    """Forget, before and after, what was found out about a device."""
    kl_triton._works.cache_clear()
    yield
    kl_triton._works.cache_clear()


@pytest.fixture
def pretend_kernel(monkeypatch: pytest.MonkeyPatch, undecided):
    """The torch code in the kernel's place, which a test can then damage."""
    monkeypatch.setitem(sys.modules, "selfaug.ops.kl_kernel", ModuleType("selfaug.ops.kl_kernel"))

    def use(function=kl_rows.divergence_rows):
        monkeypatch.setattr(kl_triton, "divergence_rows", function)

    use()
    return use


def test_without_triton_it_is_not_available_says_why_once_and_the_op_works(monkeypatch, caplog, undecided):
    monkeypatch.setitem(sys.modules, "triton", None)  # "import triton" raises, installed or not
    monkeypatch.delitem(sys.modules, "selfaug.ops.kl_kernel", raising=False)
    with caplog.at_level(logging.WARNING, logger="selfaug.ops.kl_triton"):
        assert [kl_triton.available(torch.device("cuda", 0)) for _ in range(3)] == [False] * 3
    (record,) = caplog.records
    assert "cuda:0" in record.getMessage()
    assert "ModuleNotFoundError" in record.getMessage()
    assert "triton" in record.getMessage()


def test_a_cpu_is_not_asked(monkeypatch, caplog):
    monkeypatch.setattr(kl_triton, "_works", lambda device: pytest.fail("asked"))
    assert kl_triton.available(torch.device("cpu")) is False
    assert not caplog.records


def test_importing_and_using_the_op_does_not_import_triton():
    code = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "from selfaug.ops import linear_kl\n"
        "h = torch.randn(3, 4, requires_grad=True)\n"
        "linear_kl(h, h.detach() + 1, torch.randn(9, 4)).backward()\n"
        "print(bool(h.grad.any()), 'selfaug.ops.kl_kernel' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert out.stdout.split() == ["True", "False"], out.stderr


@pytest.mark.parametrize("usable", [False, True])
def test_the_op_asks_and_falls_back(monkeypatch, usable):
    asked, used = [], []

    def kernel(*arguments):
        used.append(arguments[0].shape)
        return kl_rows.divergence_rows(*arguments)

    monkeypatch.setattr(kl_triton, "available", lambda device: asked.append(device) or usable)
    monkeypatch.setattr(kl_triton, "divergence_rows", kernel)
    case = make_case(bias=True, softcap=4.0, dtype=torch.float32)
    found = linear_kl(case.hidden, case.reference, **case.head)
    torch.testing.assert_close(found, linear_kl(case.hidden, case.reference, impl="naive", **case.head))
    assert asked == [case.hidden.device]
    assert bool(used) == usable


def test_no_memory_for_the_self_check_decides_nothing(monkeypatch, undecided):
    found = iter([torch.OutOfMemoryError("full"), None])

    def check(device):
        if (outcome := next(found)) is not None:
            raise outcome

    monkeypatch.setattr(kl_triton, "_self_check", check)
    assert not kl_triton.available(torch.device("cuda"))
    assert kl_triton.available(torch.device("cuda"))


def test_the_self_check_accepts_a_right_kernel(pretend_kernel):
    assert kl_triton._self_check(torch.device("cpu")) is None
    assert kl_triton._works(torch.device("cpu"))


@pytest.mark.parametrize("fault", ["value", "gradient", "equal", "nan", "sign"])
@each_divergence
def test_the_self_check_refuses_a_wrong_kernel(pretend_kernel, caplog, fault, divergence):
    def wrong(tuned, difference, bias, shape, which, needs_gradient):
        equal = (difference == 0).all(-1)
        values = kl_rows.divergence_rows(tuned, difference, bias, shape, which, needs_gradient)
        if which == divergence:
            if fault == "value":
                values *= 1.001
            elif fault == "gradient":
                tuned *= 1.03
            elif fault == "equal":
                values += 1e-7 * equal
            elif fault == "nan":
                tuned[0, 5] = torch.nan
            else:
                tuned *= -1
        return values

    pretend_kernel(wrong)
    assert not kl_triton._works(torch.device("cpu"))
    (record,) = caplog.records
    assert divergence in record.getMessage()


@each_divergence
def test_float64_and_elements_apart_go_to_the_torch_code(divergence):
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 3, 34, generator=generator)
    apart, dense = wide[:, :, ::2], wide[:, :, 17:].clone()
    for tuned, difference in ((wide[0].double(), wide[1].double()), (apart[0], dense[1]), (dense[0], apart[1])):
        expected_gradient = tuned.clone()
        expected = kl_rows.divergence_rows(expected_gradient, difference.clone(), None, HeadShape(), divergence, True)
        found = kl_triton.divergence_rows(tuned, difference, None, HeadShape(), divergence, True)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(tuned, expected_gradient)


# ---- the kernel ----


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED or HAS_GPU, reason="needs triton; with a GPU the kernel runs there")
def test_through_the_interpreter():
    command = [sys.executable, "-m", "pytest", "--noconftest", "-k", "test_kernel", str(Path(__file__))]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    out = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert out.returncode == 0, out.stdout
    assert "passed" in out.stdout
    assert "skipped" not in out.stdout


@pytest.mark.skipif(not COMPILED, reason="needs triton without its interpreter")
@pytest.mark.parametrize("element", ["bf16", "fp16", "fp32"])
@each_divergence
def test_compiles_for_gpus_that_are_not_here(element, divergence):
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from selfaug.ops.kl_kernel import divergence_rows_kernel as kernel

    options = {"num_warps": kl_triton.WARPS, "enable_fp_fusion": False}
    for generation, head, gradient in itertools.product((80, 90), (False, True), (False, True)):
        constants = {
            "BASE_TUNED": divergence == "kl_base_tuned",
            "HAS_BIAS": head,
            "SOFTCAP": head,
            "GRADIENT": gradient,
            "BLOCK": kl_triton.BLOCK,
        }
        types = {"tuned": f"*{element}", "difference": f"*{element}", "bias": "*fp32", "values": "*fp32"}
        types |= dict.fromkeys(("vocabulary", "tuned_stride", "difference_stride"), "i32")
        types |= dict.fromkeys(("inner", "outer", "chain"), "fp32")
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(7)}
        source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants, aligned)
        binary = compile(source, target=GPUTarget("cuda", generation, 32), options=options)
        assert len(binary.asm["cubin"]) > 1000  # ptxas took it
        assert f"sm_{generation}" in binary.asm["ptx"]


def formula(tuned, difference, bias, shape, divergence):
    """KL [m] and its gradient [m, V] to `tuned`, in float64, through autograd."""
    tuned = tuned.detach().double().requires_grad_()

    def logits(raw):
        raw = raw if bias is None else raw + bias.double()
        raw = shape.scale * raw
        capped = raw if shape.softcap is None else shape.softcap * torch.tanh(raw / shape.softcap)
        return torch.log_softmax(capped / shape.temperature, -1)

    base = logits(tuned.detach() + difference.double())
    log_p, log_q = (base, logits(tuned)) if divergence == "kl_base_tuned" else (logits(tuned), base)
    values = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return values.detach(), torch.autograd.grad(values.sum(), tuned)[0]


def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (std * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(DEVICE, dtype)


def check(tuned, difference, bias, shape, divergence, *, rtol=1e-5, atol=1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel and compare: values to rtol and atol (nats), gradients by norm and row, to rtol in float32."""
    expected, exact = formula(tuned, difference, bias, shape, divergence)
    untouched, before = tuned.clone(), difference.clone()
    values_only = kl_triton.divergence_rows(untouched, difference, bias, shape, divergence, False)
    assert untouched.equal(tuned)
    values = kl_triton.divergence_rows(tuned, difference, bias, shape, divergence, True)
    assert values.dtype == torch.float32
    assert values.equal(values_only)
    assert difference.equal(before)
    torch.testing.assert_close(values.double(), expected, rtol=rtol, atol=atol)
    # On top of it come the normaliser's rounding (times a probability), and that to the dtype: the interpreter cuts
    # bfloat16 off where a GPU rounds, and float16 has a smallest number.
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-11}[tuned.dtype]
    smallest = 2**-25 * tuned.shape[1] ** 0.5 if tuned.dtype == torch.float16 else 0.0
    error, size = (tuned.double() - exact).norm(dim=-1), exact.norm(dim=-1)
    assert (error <= (rtol + rounding) * size + smallest + 5e-7).all(), (error / size).tolist()
    return values, tuned


HEADS = {
    "plain": (False, HeadShape()),
    "bias": (True, HeadShape()),
    "scale and temperature": (False, HeadShape(scale=0.37, temperature=2.5)),
    "softcap": (False, HeadShape(softcap=4.0)),
    "everything": (True, HeadShape(scale=1.7, softcap=20.0, temperature=0.6)),
}


@runs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_divergence
def test_kernel_equals_the_formula(divergence, dtype):
    every, two = tuple(HEADS), ("plain", "everything")
    for vocabulary, heads in {1: two, 7: every, 128: two, 1000: two, 4097: every}.items():
        for has_bias, shape in (HEADS[head] for head in heads):
            tuned = normal(4, vocabulary, std=4.0, dtype=dtype, seed=1)
            difference = normal(4, vocabulary, dtype=dtype, seed=2)
            difference *= torch.tensor([[0.3], [0.0], [2.0], [20.0]], dtype=dtype, device=DEVICE)
            bias = normal(vocabulary, seed=3) if has_bias else None
            values, gradient = check(tuned, difference, bias, shape, divergence)
            assert values[1].item() == 0  # equal rows: exactly
            assert not gradient[1].any()
            if vocabulary > 1:
                assert values[2:].min() > 1e-2  # not a comparison of zeros


@runs_kernel
@pytest.mark.parametrize("softcap", [None, 30.0])
@each_divergence
def test_kernel_takes_huge_differences_and_extreme_logits(divergence, softcap):
    shape = HeadShape(softcap=softcap)
    tuned, difference = normal(6, 5000, std=3.0, seed=1), normal(6, 5000, std=1.0, seed=2)
    difference[0] *= 1e3
    tuned[1] *= 1e4  # one token has all the mass
    tuned[2], difference[2] = tuned[2] * 1e3, -2e3 * tuned[2]  # the order of all tokens turned round
    tuned[3] += 3e4  # a large common part
    tuned[4, 4999], difference[4, 4999] = 80.0, -160.0  # the last token only: all the mass, then none
    difference[5] += 500.0  # a constant difference changes nothing
    check(tuned, difference, None, shape, divergence, rtol=2e-5, atol=2e-5)


@runs_kernel
@each_divergence
def test_kernel_keeps_small_differences_under_large_logits(divergence):
    # Base logits formed in float32 would be off by 2e-6 (logits of 30) to 3e-5 (of 300): as much as the divergence.
    tuned, difference = normal(3, 4097, std=3.0, seed=1), normal(3, 4097, std=1e-2, seed=2)
    tuned[1, :2] += 300.0
    tuned[2] += 100.0
    expected, exact = formula(tuned, difference, None, HeadShape(), divergence)
    values = kl_triton.divergence_rows(tuned, difference, None, HeadShape(), divergence, True)
    assert (values - expected).abs().max() < 3e-7
    assert relative_error(tuned, exact) < 5e-5


@runs_kernel
def test_kernel_keeps_small_differences_under_the_cap():
    # tanh a - tanh b, subtracted, or a tanh good to 6e-8 of 1, would leave two digits. (In this direction the
    # gradient is as accurate as the differences; in the other the normaliser's rounding counts.)
    tuned, difference = normal(2, 3000, std=8.0, seed=1), normal(2, 3000, std=1e-4, seed=2)
    difference[1] *= 3e4
    shape = HeadShape(softcap=20.0)
    _, exact = formula(tuned, difference, None, shape, "kl_tuned_base")
    kl_triton.divergence_rows(tuned, difference, None, shape, "kl_tuned_base", True)
    assert max(map(relative_error, tuned, exact)) < 5e-6


@runs_kernel
@each_divergence
def test_kernel_writes_inside_its_rows_only(divergence):
    # Chunks are views of a buffer: rows further apart than V, and neighbours that belong to someone else.
    buffer = normal(2, 6, 1100, dtype=torch.bfloat16)
    before = buffer.clone()
    tuned, difference = buffer[0, 1:4, 16:1016], buffer[1, 2:5, :1000]
    check(tuned, difference, None, HeadShape(), divergence)
    assert not tuned.equal(before[0, 1:4, 16:1016])
    buffer[0, 1:4, 16:1016] = before[0, 1:4, 16:1016]
    assert buffer.equal(before)


@runs_kernel
@each_divergence
def test_kernel_shows_a_broken_row_and_only_that(divergence):
    tuned, difference = normal(4, 3000, seed=1), normal(4, 3000, seed=2)
    tuned[0, 2999], difference[1, 0], tuned[2, 5] = torch.nan, torch.nan, torch.inf
    values = kl_triton.divergence_rows(tuned, difference, None, HeadShape(), divergence, True)
    assert values.isfinite().tolist() == [False, False, False, True]
    assert tuned[3].isfinite().all()


@runs_kernel
def test_kernel_of_no_rows():
    empty = torch.empty(0, 50, device=DEVICE)
    assert kl_triton.divergence_rows(empty, empty.clone(), None, HeadShape(), "kl_base_tuned", True).shape == (0,)


@runs_kernel
@each_divergence
def test_kernel_inside_the_op(monkeypatch, divergence):
    monkeypatch.setattr(kl_triton, "available", lambda device: True)
    case = make_case(9, 2100, 16, dtype=torch.float32, bias=True, scale=0.8, softcap=9.0, temperature=1.5)
    head = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in case.head.items()}
    results = []
    for impl in ("auto", "naive"):
        hidden = case.hidden.detach().to(DEVICE).requires_grad_()
        values = linear_kl(
            hidden, case.reference.to(DEVICE), divergence=divergence, reduction="none", impl=impl,
            chunk_bytes=4 * 2 * 4 * 2100, **head,
        )  # fmt: skip
        values.sum().backward()
        results.append((values.detach(), hidden.grad))
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-5


@runs_kernel
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_available_on_this_gpu(undecided):
    assert kl_triton.available(DEVICE)
