"""linear_topk_entropy against torch's own entropy of the k largest, and without tensors of all rows and all words."""

import pytest
import torch

from selfaug.ops import linear_entropy, linear_topk_entropy
from tests.ops.helpers import LargestTensor, chunk_sizes, make_case, plain_logits

HEADS = [{}, {"bias": True}, {"scale": 0.3, "softcap": 2.0, "bias": True}]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("k", [2, 5, 31])
@pytest.mark.parametrize("chunk_bytes", chunk_sizes(31).values(), ids=chunk_sizes(31))
def test_equals_torch(head, k, chunk_bytes):
    case = make_case(11, 31, 5, **head)
    chances = plain_logits(case.hidden, **case.head).softmax(-1).detach().sort(-1, descending=True).values[:, :k]
    expected = torch.distributions.Categorical(probs=chances / chances.sum(-1, keepdim=True)).entropy()
    found = linear_topk_entropy(case.hidden, **case.head, k=k, chunk_bytes=chunk_bytes)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert not found.requires_grad


def test_of_all_words_it_is_the_entropy():
    case = make_case(9, 31, 5)
    torch.testing.assert_close(
        linear_topk_entropy(case.hidden, **case.head, k=31), linear_entropy(case.hidden, **case.head)
    )


def test_bfloat16_hidden_states_and_autocast():
    case = make_case(9, 64, 16)
    exact = linear_topk_entropy(case.hidden, **case.head, k=20)
    low = linear_topk_entropy(case.hidden.bfloat16(), weight=case.head["weight"].bfloat16(), k=20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = linear_topk_entropy(case.hidden.float(), weight=case.head["weight"].float(), k=20)
    for found in (low, mixed):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=0.05)


def test_no_tensor_of_all_rows_and_all_words():
    case = make_case(64, 200, 8, dtype=torch.float32)
    with LargestTensor() as largest:
        linear_topk_entropy(case.hidden, **case.head, k=20, chunk_bytes=10 * 200 * 3 * 4)
    assert largest.numel <= 10 * 200


def test_no_rows_and_what_is_refused():
    assert linear_topk_entropy(torch.zeros(0, 4), torch.eye(4), 3).shape == (0,)
    for k in (0, 5):
        with pytest.raises(ValueError, match=rf"k={k}"):
            linear_topk_entropy(torch.zeros(2, 4), torch.eye(4), k)
    with pytest.raises(ValueError, match=r"hidden .* weight"):
        linear_topk_entropy(torch.zeros(3, 4), torch.zeros(5, 6), 2)
