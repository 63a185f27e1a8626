"""linear_nll against cross-entropy of whole logits."""

import itertools

import pytest
import scipy.special
import torch

from selfaug.ops import linear_nll
from selfaug.ops.head import HeadShape
from selfaug.ops.linear_nll import naive_nll
from tests.ops.helpers import LargestTensor, chunk_sizes, make_case, plain_logits, relative_error

HEADS = [
    {"bias": bias, "scale": scale, "softcap": softcap}
    for bias, scale, softcap in itertools.product((False, True), (1.0, 0.37), (None, 4.0))
]
SHAPES = ((7, 31, 5), (1, 2, 1), (13, 17, 33))
each_head = pytest.mark.parametrize("head", HEADS, ids=lambda h: "-".join(f"{k}={v}" for k, v in h.items()))


def plain_nll(hidden, targets, **head):
    return torch.nn.functional.nll_loss(torch.log_softmax(plain_logits(hidden, **head), -1), targets, reduction="none")


@each_head
def test_equals_cross_entropy_in_float64(head):
    for shape in SHAPES:
        case = make_case(*shape, **head)
        upstream = torch.linspace(-1, 2, shape[0], dtype=torch.float64)
        expected = plain_nll(case.hidden, case.targets, **case.head)
        (expected_grad,) = torch.autograd.grad(expected @ upstream, case.hidden)
        for chunk_bytes in chunk_sizes(shape[1]).values():
            found = linear_nll(case.hidden, case.targets, chunk_bytes=chunk_bytes, **case.head)
            (grad,) = torch.autograd.grad(found @ upstream, case.hidden)
            assert found.shape == (shape[0],)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-10)
        naive = naive_nll(
            case.hidden,
            case.targets,
            case.head["weight"],
            case.head["bias"],
            HeadShape(case.head["scale"], case.head["softcap"]),
        )
        torch.testing.assert_close(naive, expected, rtol=1e-10, atol=1e-10)


def test_equals_scipy():
    case = make_case(11, 29, 6, bias=True, scale=0.7, softcap=5.0)
    with torch.no_grad():
        log_p = scipy.special.log_softmax(plain_logits(case.hidden, **case.head).numpy(), axis=-1)
    expected = -torch.from_numpy(log_p)[torch.arange(11), case.targets]
    torch.testing.assert_close(linear_nll(case.hidden, case.targets, **case.head), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("head_trains", [False, True])
def test_gradcheck(softcap, head_trains):
    case = make_case(3, 7, 4, bias=True)
    weight, bias = (case.head[name].requires_grad_(head_trains) for name in ("weight", "bias"))

    def rows(hidden, weight, bias):
        return linear_nll(hidden, case.targets, weight, bias=bias, scale=0.8, softcap=softcap, chunk_bytes=200)

    assert torch.autograd.gradcheck(rows, (case.hidden, weight, bias))


@pytest.mark.parametrize("trains", [("weight",), ("bias",), ("weight", "bias")], ids="+".join)
@pytest.mark.parametrize("chunk_bytes", chunk_sizes(31).values(), ids=chunk_sizes(31))
def test_trainable_head_gets_cross_entropys_gradients(trains, chunk_bytes):
    case = make_case(bias=True, scale=1.7, softcap=6.0)
    leaves = [case.hidden, *(case.head[name].requires_grad_() for name in trains)]
    expected = torch.autograd.grad(plain_nll(case.hidden, case.targets, **case.head).mean(), leaves)
    found = linear_nll(case.hidden, case.targets, chunk_bytes=chunk_bytes, **case.head).mean()
    for one, other in zip(torch.autograd.grad(found, leaves), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [(torch.float32, False, 1e-5), (torch.float32, True, 2e-2), (torch.bfloat16, False, 2e-2)],
    ids=["float32", "autocast", "bfloat16"],
)
def test_close_to_float64(softcap, dtype, autocast, tolerance):
    case = make_case(40, 301, 24, bias=True, softcap=softcap, scale=1.3, dtype=dtype)
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in case.head.items()}
    hidden = case.hidden.detach().double().requires_grad_()
    expected = plain_nll(hidden, case.targets, **exact)
    (expected_grad,) = torch.autograd.grad(expected.mean(), hidden)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = linear_nll(case.hidden, case.targets, chunk_bytes=20_000, **case.head)
    (grad,) = torch.autograd.grad(found.mean(), case.hidden)
    assert found.dtype == torch.float32
    assert grad.dtype == dtype
    assert relative_error(found, expected) < tolerance
    assert relative_error(grad, expected_grad) < tolerance


@pytest.mark.parametrize("head_trains", [False, True])
def test_no_rows_give_zero_and_keep_the_graph(head_trains):
    case = make_case(0, bias=True, softcap=3.0)
    case.head["weight"].requires_grad_(head_trains)
    found = linear_nll(case.hidden, case.targets, **case.head)
    assert found.shape == (0,)
    assert found.requires_grad
    found.sum().backward()
    assert case.hidden.grad.shape == case.hidden.shape
    if head_trains:
        assert torch.equal(case.head["weight"].grad, torch.zeros_like(case.head["weight"]))


@pytest.mark.parametrize("softcap", [None, 150.0])
def test_large_logits_stay_finite(softcap):
    head = 300.0 * torch.eye(4)
    hidden = torch.eye(4).requires_grad_()
    targets = torch.tensor([0, 0, 1, 3])  # two sure and right, two sure and wrong
    found = linear_nll(hidden, targets, head, softcap=softcap)
    found.sum().backward()
    expected = plain_nll(torch.eye(4).double(), targets, weight=head.double(), softcap=softcap)
    torch.testing.assert_close(found.detach().double(), expected, rtol=1e-5, atol=1e-5)
    assert hidden.grad.isfinite().all()


def test_without_gradients_the_value_is_the_same():
    case = make_case(softcap=3.0)
    with torch.no_grad():
        found = linear_nll(case.hidden, case.targets, **case.head)
    assert not found.requires_grad
    assert torch.equal(found, linear_nll(case.hidden, case.targets, **case.head))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("head_trains", [False, True])
def test_no_tensor_of_all_rows_and_all_words(softcap, head_trains):
    rows, vocabulary = 64, 97
    case = make_case(rows, vocabulary, 8, softcap=softcap, bias=True, dtype=torch.float32)
    case.head["weight"].requires_grad_(head_trains)
    with LargestTensor() as largest:
        linear_nll(case.hidden, case.targets, chunk_bytes=8 * 2 * vocabulary * 4, **case.head).sum().backward()
    assert largest.numel <= 16 * vocabulary < rows * vocabulary


def test_wrong_arguments_are_named():
    case = make_case()
    hidden, targets, weight = case.hidden, case.targets, case.head["weight"]
    wrong = [
        ("hidden .* weight", (hidden, targets, weight[:, :-1]), {}),
        ("targets", (hidden, targets[:-1], weight), {}),
        ("bias", (hidden, targets, weight), {"bias": weight[:-1, 0]}),
        ("softcap", (hidden, targets, weight), {"softcap": 0.0}),
        ("chunk_bytes", (hidden, targets, weight), {"chunk_bytes": -1}),
    ]
    for message, tensors, settings in wrong:
        with pytest.raises(ValueError, match=message):
            linear_nll(*tensors, **settings)
