"""linear_entropy against torch's own entropy, and without tensors of all rows and all words."""

import pytest
import torch

from selfaug.ops import linear_entropy
from tests.ops.helpers import LargestTensor, chunk_sizes, make_case, plain_logits

HEADS = [{}, {"bias": True}, {"scale": 0.3, "softcap": 2.0, "bias": True}]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk_bytes", chunk_sizes(31).values(), ids=chunk_sizes(31))
def test_equals_torch(head, chunk_bytes):
    case = make_case(11, 31, 5, **head)
    expected = torch.distributions.Categorical(logits=plain_logits(case.hidden, **case.head)).entropy()
    found = linear_entropy(case.hidden, **case.head, chunk_bytes=chunk_bytes)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-12)
    assert not found.requires_grad


def test_bfloat16_hidden_states_and_autocast():
    case = make_case(9, 64, 16)
    exact = linear_entropy(case.hidden, **case.head)
    low = linear_entropy(case.hidden.bfloat16(), weight=case.head["weight"].bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = linear_entropy(case.hidden.float(), weight=case.head["weight"].float())
    for found in (low, mixed):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=0.05)


def test_extremes_are_finite():
    weight = torch.eye(4)
    certain = linear_entropy(torch.tensor([[1e4, 0, 0, 0], [0, 0, 0, 0]]), weight)
    torch.testing.assert_close(certain, torch.tensor([0.0, 4.0]).log1p().mul(torch.tensor([0.0, 0.8613531161])))
    assert linear_entropy(torch.zeros(0, 4), weight).shape == (0,)


def test_no_tensor_of_all_rows_and_all_words():
    case = make_case(64, 200, 8, dtype=torch.float32)
    with LargestTensor() as largest:
        linear_entropy(case.hidden, **case.head, chunk_bytes=10 * 200 * 4 * 4)
    assert largest.numel <= 10 * 200


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"hidden .* weight"):
        linear_entropy(torch.zeros(3, 4), torch.zeros(5, 6))
