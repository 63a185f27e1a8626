"""linear_kl against the formula written out (invariants 5 and 6), its accuracy in low precision, memory and errors."""

import itertools

import pytest
import scipy.special
import torch

from selfaug.ops import head, kl_rows, linear_kl
from tests.ops.helpers import (
    DIVERGENCES,
    LargestTensor,
    chunk_sizes,
    make_case,
    plain_kl,
    plain_logits,
    relative_error,
)

HEADS = [
    {"bias": bias, "scale": scale, "softcap": softcap, "temperature": temperature}
    for bias, scale, softcap, temperature in itertools.product((False, True), (1.0, 0.37), (None, 4.0), (1.0, 2.5))
]
SHAPES = ((7, 31, 5), (1, 2, 1), (13, 17, 33))
each_head = pytest.mark.parametrize("head", HEADS, ids=lambda h: "-".join(f"{k}={v}" for k, v in h.items()))
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)


@each_head
@each_divergence
def test_equals_the_formula_in_float64(head, divergence):
    for shape in SHAPES:
        case = make_case(*shape, **head)
        # The rows' gradients are weighted differently, so that a mixed-up or unscaled row shows.
        upstream = torch.linspace(-1, 2, shape[0], dtype=torch.float64)
        expected = plain_kl(case.hidden, case.reference, divergence, **case.head)
        (expected_grad,) = torch.autograd.grad(expected @ upstream, case.hidden)
        assert expected.max() > (1e-4 if shape[0] > 1 else 0)  # not a comparison of zeros
        arguments = {"divergence": divergence, "reduction": "none", **case.head}
        for impl, chunk_bytes in [("naive", 1), *(("chunked", size) for size in chunk_sizes(shape[1]).values())]:
            found = linear_kl(case.hidden, case.reference, impl=impl, chunk_bytes=chunk_bytes, **arguments)
            (grad,) = torch.autograd.grad(found @ upstream, case.hidden)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, check_dtype=True)
            torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-10)


def test_direction_and_value_by_hand():
    # Two words. base: p = (0.9, 0.1), tuned: q = (0.5, 0.5); head = identity, so hidden states are log-probabilities.
    base, tuned = (torch.tensor([p], dtype=torch.float64).log() for p in ((0.9, 0.1), (0.5, 0.5)))
    head = torch.eye(2, dtype=torch.float64)
    base_tuned = linear_kl(tuned, base, head, divergence="kl_base_tuned").item()
    tuned_base = linear_kl(tuned, base, head, divergence="kl_tuned_base").item()
    assert base_tuned == pytest.approx(0.9 * 0.5877866649 + 0.1 * -1.6094379124, abs=1e-9)  # 0.3680642
    assert tuned_base == pytest.approx(0.5 * -0.5877866649 + 0.5 * 1.6094379124, abs=1e-9)  # 0.5108256
    assert linear_kl(tuned, base, head).item() == base_tuned  # the default is the official code's direction


@each_head
@each_divergence
def test_an_excluded_token_is_as_good_as_a_smaller_vocabulary(head, divergence):
    """Each row over the words that are left, as whole vectors and without any -inf."""
    for shape in SHAPES[:2]:
        case = make_case(*shape, **head)
        excluded = torch.arange(shape[0]) * 5 % shape[1]
        upstream = torch.linspace(-1, 2, shape[0], dtype=torch.float64)
        expected = []
        for i, token in enumerate(excluded.tolist()):
            others = [v for v in range(shape[1]) if v != token]
            smaller = {**case.head, "weight": case.head["weight"][others]}
            if smaller.get("bias") is not None:
                smaller["bias"] = smaller["bias"][others]
            row = slice(i, i + 1)
            expected.append(plain_kl(case.hidden[row], case.reference[row], divergence, **smaller))
        expected = torch.cat(expected)
        (expected_grad,) = torch.autograd.grad(expected @ upstream, case.hidden)
        arguments = {"divergence": divergence, "reduction": "none", "excluded": excluded, **case.head}
        for impl, chunk_bytes in [("naive", 1), *(("chunked", size) for size in chunk_sizes(shape[1]).values())]:
            found = linear_kl(case.hidden, case.reference, impl=impl, chunk_bytes=chunk_bytes, **arguments)
            (grad,) = torch.autograd.grad(found @ upstream, case.hidden)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-10)


@each_divergence
@pytest.mark.parametrize("far", [False, True])
def test_an_excluded_token_counts_for_nothing(far, divergence):
    """However sure the base model is of it; `far` takes the branch for large differences."""
    case = make_case(6, 40, 8)
    excluded = torch.full((6,), 7)
    weight = case.head["weight"].clone()
    arguments = {"divergence": divergence, "reduction": "none", "excluded": excluded}
    with torch.no_grad():
        hidden = case.hidden * (40.0 if far else 1.0)
        before = linear_kl(hidden, case.reference, weight, **arguments)
        weight[7] *= -30.0
        assert torch.equal(linear_kl(hidden, case.reference, weight, **arguments), before)
        factors = torch.tensor([0.0, 1, 0, 2, 0, 0]).double()
        weighted = linear_kl(hidden, case.reference, weight, row_weights=factors, **arguments)
    torch.testing.assert_close(weighted, before * factors)
    assert before.isfinite().all()


def test_what_is_excluded_must_fit():
    case = make_case(3, 10, 4)
    with pytest.raises(ValueError, match="excluded"):
        linear_kl(case.hidden, case.reference, **case.head, excluded=torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="triton"):
        linear_kl(case.hidden, case.reference, **case.head, excluded=torch.zeros(3, dtype=torch.long), impl="triton")


@each_divergence
def test_equals_scipy(divergence):
    case = make_case(11, 29, 6, bias=True, scale=0.7, softcap=5.0, temperature=1.3)
    with torch.no_grad():
        tuned = scipy.special.softmax(plain_logits(case.hidden, **case.head).numpy(), axis=-1)
        base = scipy.special.softmax(plain_logits(case.reference, **case.head).numpy(), axis=-1)
    p, q = (base, tuned) if divergence == "kl_base_tuned" else (tuned, base)
    expected = torch.from_numpy(scipy.special.rel_entr(p, q).sum(-1))
    found = linear_kl(case.hidden, case.reference, divergence=divergence, reduction="none", **case.head)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@each_divergence
def test_equals_torch_distributions(divergence):
    case = make_case(5, 19, 4)
    tuned, base = (
        torch.distributions.Categorical(logits=plain_logits(h, **case.head)) for h in (case.hidden, case.reference)
    )
    pair = (base, tuned) if divergence == "kl_base_tuned" else (tuned, base)
    found = linear_kl(case.hidden, case.reference, divergence=divergence, reduction="none", **case.head)
    torch.testing.assert_close(found, torch.distributions.kl_divergence(*pair), rtol=1e-10, atol=1e-10)


@each_divergence
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("head_trains", [False, True])
def test_gradcheck(divergence, softcap, head_trains):
    case = make_case(3, 7, 4, bias=True, scale=0.8, softcap=softcap, temperature=1.5, distance=1.0)
    weight, bias = case.head["weight"], case.head["bias"]
    settings = {k: case.head[k] for k in ("scale", "softcap", "temperature")}

    def hidden_only(hidden):
        return linear_kl(
            hidden,
            case.reference,
            weight,
            bias=bias,
            divergence=divergence,
            chunk_bytes=500,
            reduction="none",
            **settings,
        )

    if not head_trains:
        assert torch.autograd.gradcheck(hidden_only, (case.hidden,))
        return
    # The base distribution is a constant, which a finite difference in the head cannot know: compare with autograd.
    weight.requires_grad_()
    bias.requires_grad_()
    found = torch.autograd.grad(hidden_only(case.hidden).sum(), (case.hidden, weight, bias))
    expected = plain_kl(case.hidden, case.reference, divergence, **case.head).sum()
    for one, other in zip(found, torch.autograd.grad(expected, (case.hidden, weight, bias)), strict=True):
        assert other.norm() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("trains", [("weight",), ("bias",), ("weight", "bias")], ids="+".join)
@each_divergence
@pytest.mark.parametrize("chunk_bytes", chunk_sizes(31).values(), ids=chunk_sizes(31))
def test_trainable_head_gets_the_formulas_gradients(trains, divergence, chunk_bytes):
    case = make_case(bias=True, scale=1.7, softcap=6.0)
    leaves = [case.hidden, *(case.head[name].requires_grad_() for name in trains)]
    expected = torch.autograd.grad(plain_kl(case.hidden, case.reference, divergence, **case.head).mean(), leaves)
    found = linear_kl(case.hidden, case.reference, divergence=divergence, chunk_bytes=chunk_bytes, **case.head)
    for one, other in zip(torch.autograd.grad(found, leaves), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_the_reference_is_a_constant():
    case = make_case()
    case.reference.requires_grad_()
    for impl in ("naive", "chunked"):
        linear_kl(case.hidden, case.reference, impl=impl, **case.head).backward()
    assert case.reference.grad is None
    assert case.hidden.grad.norm() > 0


@each_divergence
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_float32_close_to_float64(divergence, softcap):
    case = make_case(40, 301, 24, bias=True, softcap=softcap, scale=1.3, dtype=torch.float32)
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in case.head.items()}
    hidden = case.hidden.detach().double().requires_grad_()
    expected = plain_kl(hidden, case.reference.double(), divergence, **exact)
    (expected_grad,) = torch.autograd.grad(expected.mean(), hidden)
    found = linear_kl(
        case.hidden, case.reference, divergence=divergence, reduction="none", chunk_bytes=20_000, **case.head
    )
    (grad,) = torch.autograd.grad(found.mean(), case.hidden)
    assert found.dtype == grad.dtype == torch.float32
    assert relative_error(found, expected) < 1e-5
    assert relative_error(grad, expected_grad) < 1e-5


@each_divergence
@pytest.mark.parametrize("softcap", [None, 12.0])
@pytest.mark.parametrize("kl", [1e-4, 1e-3])
def test_bfloat16_autocast_keeps_a_small_kl(divergence, softcap, kl):
    """The difference of hidden states, not of logits, is multiplied with the head: stack.md, section 4."""
    distance = (2 * kl) ** 0.5 / 5.0  # KL is about half the variance of the logits' difference
    case = make_case(64, 512, 64, distance=distance, logit_std=5.0, softcap=softcap, dtype=torch.float32)
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in case.head.items()}
    hidden = case.hidden.detach().double().requires_grad_()
    expected = plain_kl(hidden, case.reference.double(), divergence, **exact).mean()
    (expected_grad,) = torch.autograd.grad(expected, hidden)
    assert 0.1 * kl < expected < 3 * kl
    errors, grad_errors = {}, {}
    with torch.autocast("cpu", torch.bfloat16):
        for impl in ("naive", "chunked"):
            found = linear_kl(case.hidden, case.reference, divergence=divergence, impl=impl, **case.head)
            (grad,) = torch.autograd.grad(found, case.hidden)
            assert found.dtype == grad.dtype == torch.float32
            errors[impl] = abs(found.item() / expected.item() - 1)
            grad_errors[impl] = relative_error(grad, expected_grad)
    assert errors["chunked"] < 0.05
    assert errors["chunked"] < 0.2 * errors["naive"]
    assert grad_errors["chunked"] < 0.1
    assert grad_errors["chunked"] < 0.2 * grad_errors["naive"]


@each_divergence
def test_bfloat16_hidden_states(divergence):
    case = make_case(16, 211, 32, distance=0.05, dtype=torch.bfloat16)
    exact = {"weight": case.head["weight"].double()}
    hidden = case.hidden.detach().double().requires_grad_()
    expected = plain_kl(hidden, case.reference.double(), divergence, **exact).mean()
    (expected_grad,) = torch.autograd.grad(expected, hidden)
    found = linear_kl(case.hidden, case.reference, divergence=divergence, **case.head)
    found.backward()
    assert found.dtype == torch.float32
    assert case.hidden.grad.dtype == torch.bfloat16
    assert found.item() == pytest.approx(expected.item(), rel=0.03)
    assert relative_error(case.hidden.grad, expected_grad) < 0.1


@each_divergence
def test_reductions(divergence):
    case = make_case()
    rows = linear_kl(case.hidden, case.reference, divergence=divergence, reduction="none", **case.head)
    assert rows.shape == (7,)
    for reduction, expected in (("sum", rows.sum()), ("mean", rows.mean())):
        found = linear_kl(case.hidden, case.reference, divergence=divergence, reduction=reduction, **case.head)
        assert found.shape == ()
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
        one, other = (torch.autograd.grad(v, case.hidden, retain_graph=True)[0] for v in (found, expected))
        torch.testing.assert_close(one, other, rtol=1e-14, atol=0)


@pytest.mark.parametrize("impl", ["naive", "chunked"])
@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_give_zero_and_keep_the_graph(impl, head_trains, reduction):
    case = make_case(0, bias=True, softcap=3.0)
    case.head["weight"].requires_grad_(head_trains)
    none = torch.zeros(0, dtype=torch.long)
    assert linear_kl(case.hidden, case.reference, impl=impl, reduction="sum", excluded=none, **case.head) == 0
    found = linear_kl(case.hidden, case.reference, impl=impl, reduction=reduction, **case.head)
    assert found.shape == (() if reduction != "none" else (0,))
    assert found.sum() == 0
    assert found.requires_grad
    found.sum().backward()
    assert case.hidden.grad.shape == case.hidden.shape
    if head_trains:
        assert torch.equal(case.head["weight"].grad, torch.zeros_like(case.head["weight"]))


@each_head
@each_divergence
def test_equal_hidden_states_give_exactly_zero(head, divergence):
    for dtype, autocast in (
        (torch.float64, False),
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, False),
    ):
        case = make_case(9, dtype=dtype, distance=0.0, **head)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = linear_kl(case.hidden, case.reference, divergence=divergence, reduction="none", **case.head)
        found.sum().backward()
        assert torch.equal(found, torch.zeros_like(found))
        assert torch.equal(case.hidden.grad, torch.zeros_like(case.hidden))


@each_divergence
@pytest.mark.parametrize("distance", [1e-6, 1e-4, 1e-2, 1.0, 10.0])
@pytest.mark.parametrize("autocast", [False, True])
def test_never_negative(divergence, distance, autocast):
    case = make_case(128, 101, 16, distance=distance, logit_std=5.0, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rows = linear_kl(case.hidden, case.reference, divergence=divergence, reduction="none", **case.head)
    # A row's KL is made of logits, which float32 knows to 2^-23 of their size; over rows the error averages out.
    largest = plain_logits(case.hidden, **case.head).abs().max().item()
    assert rows.min() >= -2 * 2**-23 * largest
    assert rows.mean() >= -1e-6


@each_divergence
@pytest.mark.parametrize("softcap", [None, 150.0])
def test_large_differences_stay_finite(divergence, softcap):
    head = 200.0 * torch.eye(4, dtype=torch.float32)  # logits of 200 for another word each
    hidden, reference = torch.eye(4)[:3].requires_grad_(), torch.eye(4)[1:]
    found = linear_kl(hidden, reference, head, divergence=divergence, softcap=softcap, reduction="none")
    found.sum().backward()
    exact = hidden.detach().double().requires_grad_()
    expected = plain_kl(exact, reference.double(), divergence, weight=head.double(), softcap=softcap)
    expected.sum().backward()
    assert expected.min() > 100
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


def test_without_gradients_the_value_is_the_same():
    case = make_case(softcap=3.0)
    for divergence in DIVERGENCES:
        expected = linear_kl(case.hidden, case.reference, divergence=divergence, **case.head)
        with torch.no_grad():
            found = linear_kl(case.hidden, case.reference, divergence=divergence, **case.head)
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_arguments_are_left_as_they_are():
    case = make_case(bias=True, softcap=3.0, scale=0.5)
    before = [t.detach().clone() for t in (case.hidden, case.reference, case.head["weight"], case.head["bias"])]
    linear_kl(case.hidden, case.reference, **case.head).backward()
    for now, then in zip((case.hidden, case.reference, case.head["weight"], case.head["bias"]), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("head_trains", [False, True])
def test_no_tensor_of_all_rows_and_all_words(softcap, head_trains):
    rows, vocabulary, width = 64, 97, 8
    case = make_case(rows, vocabulary, width, softcap=softcap, bias=True, dtype=torch.float32)
    case.head["weight"].requires_grad_(head_trains)
    sizes = {}
    for impl in ("naive", "chunked"):
        with LargestTensor() as largest:
            linear_kl(
                case.hidden, case.reference, impl=impl, chunk_bytes=8 * 4 * vocabulary * 4, **case.head
            ).backward()
        sizes[impl] = largest.numel
    assert sizes["naive"] >= rows * vocabulary  # the meter works
    assert sizes["chunked"] <= 3 * 11 * vocabulary < rows * vocabulary


@each_divergence
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distance", [0.3, 30.0])
def test_blocks_of_rows_change_nothing(divergence, softcap, dtype, distance, monkeypatch):
    case = make_case(23, 31, 5, bias=True, scale=0.7, temperature=1.5, softcap=softcap, dtype=dtype, distance=distance)
    arguments = {"divergence": divergence, "reduction": "none", "chunk_bytes": 10**9, **case.head}

    def run():
        values = linear_kl(case.hidden, case.reference, **arguments)
        return values.detach(), torch.autograd.grad(values.sum(), case.hidden)[0]

    monkeypatch.setattr(kl_rows, "BLOCK_BYTES_PER_THREAD", 2**30)
    value, gradient = run()
    monkeypatch.setattr(kl_rows, "BLOCK_BYTES_PER_THREAD", 1)  # as many rows as there are threads
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    blocks = []
    inner = kl_rows._finished_rows
    monkeypatch.setattr(kl_rows, "_finished_rows", lambda t, *rest: (blocks.append(len(t)), inner(t, *rest))[1])
    block_value, block_gradient = run()
    assert blocks == [5, 5, 5, 5, 3]
    # A block with a large difference takes two softmaxes, one without takes one: equal up to rounding.
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(block_value, value, **tolerance)
    torch.testing.assert_close(
        block_gradient, gradient, **(tolerance if dtype != torch.bfloat16 else {"rtol": 0.02, "atol": 1e-3})
    )


@each_divergence
@pytest.mark.parametrize("difference", [29.9, 30.1, 300.0])
def test_both_ways_around_the_largest_fast_difference(divergence, difference):
    # One word gains, or loses, so much that it takes all the mass, or gives it up.
    for sign in (1, -1):
        hidden = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
        reference = torch.zeros(3, 4, dtype=torch.float64)
        reference[1, 2] = sign * difference
        weight = torch.eye(4, dtype=torch.float64)
        found = linear_kl(hidden, reference, weight, divergence=divergence, reduction="none")
        expected = plain_kl(hidden, reference, divergence, weight=weight)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        (grad,), (expected_grad,) = (torch.autograd.grad(x.sum(), hidden) for x in (found, expected))
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)


@each_divergence
@pytest.mark.parametrize("impl", ["naive", "chunked"])
@pytest.mark.parametrize("head_trains", [False, True])
def test_row_weights(divergence, impl, head_trains):
    case = make_case(6, 31, 5)
    case.head["weight"].requires_grad_(head_trains)
    weights = torch.tensor([0.0, 2.0, 0.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    expected = plain_kl(case.hidden, case.reference, divergence, **case.head) * weights
    (expected_grad,) = torch.autograd.grad(expected.sum(), case.hidden)
    arguments = {"divergence": divergence, "impl": impl, "row_weights": weights, **case.head}
    rows = linear_kl(case.hidden, case.reference, reduction="none", **arguments)
    torch.testing.assert_close(rows, expected, rtol=1e-10, atol=1e-12)
    total = linear_kl(case.hidden, case.reference, reduction="sum", **arguments)
    mean = linear_kl(case.hidden, case.reference, reduction="mean", **arguments)
    torch.testing.assert_close(total, expected.sum(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mean, expected.sum() / 6, rtol=1e-10, atol=1e-12)
    for loss in (rows.sum(), total):
        (grad,) = torch.autograd.grad(loss, case.hidden, retain_graph=True)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)


def test_rows_of_weight_zero_cost_nothing(monkeypatch):
    case, seen = make_case(8, 31, 5), []
    inner = kl_rows.divergence_rows
    monkeypatch.setattr(kl_rows, "divergence_rows", lambda t, *rest: (seen.append(len(t)), inner(t, *rest))[1])
    linear_kl(case.hidden, case.reference, row_weights=torch.tensor([1.0, 0, 0, 3, 0, 0, 0, 1]), **case.head)
    nothing = linear_kl(case.hidden, case.reference, row_weights=torch.zeros(8), **case.head)
    nothing.backward()
    assert seen == [3]
    assert nothing.item() == 0
    assert not case.hidden.grad.any()


def test_a_frozen_head_is_cast_once_and_again_when_it_changes():
    weight = torch.randn(7, 5)
    first = head.cast(weight, torch.bfloat16)
    assert head.cast(weight, torch.bfloat16) is first
    assert head.cast(weight, torch.float32) is weight
    weight[3, 2] += 1
    changed = head.cast(weight, torch.bfloat16)
    assert torch.equal(changed, weight.bfloat16())
    assert not torch.equal(changed, first)
    weight.data = torch.randn(7, 5)
    assert torch.equal(head.cast(weight, torch.bfloat16), weight.bfloat16())
    kept = len(head._casts)
    del weight
    assert len(head._casts) == kept - 1


def test_chunks_are_even_and_within_the_budget():
    device = torch.device("cpu")
    assert head.chunk_rows(100, 10, device, 400) == 34  # 40 fit: three chunks of 34, 34 and 32
    assert head.chunk_rows(100, 10, device, 10**9) == 100
    assert head.chunk_rows(100, 10, device, 1) == 1
    assert head.chunk_rows(0, 10, device, 1) == 1
    assert head.chunk_rows(10**6, 1, device, None) == 10**6
    assert head.chunk_rows(10**6, 2**20, device, None) == 144


def test_wrong_arguments_are_named():
    case = make_case()
    hidden, reference, weight = case.hidden, case.reference, case.head["weight"]
    wrong = [
        ("hidden .* weight", (hidden, reference, weight[:, :-1]), {}),
        ("hidden .* weight", (hidden[None], reference[None], weight), {}),
        ("reference", (hidden, reference[:-1], weight), {}),
        ("bias", (hidden, reference, weight), {"bias": weight[:-1, 0]}),
        ("temperature", (hidden, reference, weight), {"temperature": 0.0}),
        ("softcap", (hidden, reference, weight), {"softcap": 0.0}),
        ("softcap", (hidden, reference, weight), {"softcap": -1.0}),
        ("chunk_bytes", (hidden, reference, weight), {"chunk_bytes": 0}),
        ("divergence must be one of kl_base_tuned, kl_tuned_base, got 'forward'", (hidden, reference, weight),
         {"divergence": "forward"}),
        ("reduction .*'average'", (hidden, reference, weight), {"reduction": "average"}),
        ("row_weights", (hidden, reference, weight), {"row_weights": weight[:-1, 0]}),
        ("impl .*'fast'", (hidden, reference, weight), {"impl": "fast"}),
    ]  # fmt: skip
    for message, tensors, settings in wrong:
        with pytest.raises(ValueError, match=message):
            linear_kl(*tensors, **settings)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("tuned", "base"),
    [
        ([500.0, 500.0, 501.0], [0.0, 0.0, 1.0]),
        ([110.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        ([0.0, 0.0, 60.0], [0.0, 40.0, 0.0]),
    ],
    ids=["a common shift", "all of the mass", "to and fro"],
)
def test_logits_that_are_far_apart(tuned, base, divergence):
    """One softmax would not do: what it leaves of the base model's distribution is nothing."""
    hidden = torch.tensor([tuned, [1.0, 2.0, 3.0]], requires_grad=True)
    reference, head = torch.tensor([base, [1.0, 2.0, 2.0]]), torch.eye(3)
    value = linear_kl(hidden, reference, head, divergence=divergence, reduction="none")
    (gradient,) = torch.autograd.grad(value.sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    log_tuned, log_base = exact.log_softmax(-1), reference.double().log_softmax(-1)
    one, other = (log_base, log_tuned) if divergence == "kl_base_tuned" else (log_tuned, log_base)
    expected = (one.exp() * (one - other)).sum(-1)
    (wanted,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-6)
