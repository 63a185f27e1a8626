"""TokenBatch: roles from transformers' tensors."""

import pytest
import torch

from selfaug.objective import IGNORE, Role, TokenBatch


def test_roles_from_labels():
    ids = torch.tensor([[5, 6, 7, 8, 0], [0, 5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]])
    labels = torch.tensor([[IGNORE, IGNORE, 7, 8, IGNORE], [IGNORE, IGNORE, IGNORE, IGNORE, 8]])
    batch = TokenBatch.from_labels(ids, mask, labels)
    p, t, r = Role.PADDING, Role.TEMPLATE, Role.RESPONSE
    assert batch.roles.tolist() == [[t, t, r, r, p], [p, t, t, t, r]]
    assert batch.input_ids is ids
    assert batch.labels is labels


def test_padding_stays_padding_whatever_its_label():
    ids = torch.tensor([[5, 6, 0]])
    batch = TokenBatch.from_labels(ids, torch.tensor([[1, 1, 0]]), torch.tensor([[IGNORE, 6, 0]]))
    assert batch.roles.tolist() == [[Role.TEMPLATE, Role.RESPONSE, Role.PADDING]]


def test_no_mask_is_no_padding():
    ids = torch.tensor([[0, 6, 7]])
    batch = TokenBatch.from_labels(ids, None, torch.tensor([[IGNORE, IGNORE, 7]]))
    assert batch.attention_mask.tolist() == [[1, 1, 1]]
    assert batch.roles.tolist() == [[Role.TEMPLATE, Role.TEMPLATE, Role.RESPONSE]]


@pytest.mark.parametrize(
    ("ids", "mask", "labels"), [((1, 3), (1, 3), (1, 2)), ((1, 3), (1, 2), (1, 3)), ((3,), (3,), (3,))]
)
def test_shapes_that_do_not_fit_are_named(ids, mask, labels):
    with pytest.raises(ValueError, match=r"input_ids .* attention_mask .* labels .* must all be \[B, T\]"):
        TokenBatch.from_labels(*(torch.ones(shape, dtype=torch.long) for shape in (ids, mask, labels)))


def test_to_moves_every_tensor_and_keeps_the_names():
    ids = torch.tensor([[5, 6]])
    batch = TokenBatch(ids, torch.ones_like(ids), ids, ids, ids=("a",)).to(torch.device("meta"))
    assert {t.device.type for t in (batch.input_ids, batch.attention_mask, batch.labels, batch.roles)} == {"meta"}
    assert batch.ids == ("a",)
