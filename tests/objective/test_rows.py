"""The rows of each definition, written out by hand, and their properties on random sequences."""

import random

import pytest
import torch

from selfaug.objective import Role
from selfaug.objective.rows import alignment_rows, existing_rows, output_rows

ROLES = {".": Role.PADDING, "t": Role.TEMPLATE, "d": Role.DOCUMENT, "q": Role.QUESTION, "R": Role.RESPONSE}

# A sequence's roles and, below each token, an x where its row belongs to the set.
EXAMPLES = {
    "no padding": {
        "roles   ": "tddqRR",
        "existing": "xxxxx ",
        "output  ": "   xx ",
        "input   ": "xxxx  ",
        "strict  ": "xxx   ",
        "official": "xxxx  ",
        "document": " xx   ",
        "question": "   x  ",
    },
    "right padding": {
        "roles   ": "tdqRR..",
        "existing": "xxxx   ",
        "output  ": "  xx   ",
        "input   ": "xxx    ",
        "strict  ": "xx     ",
        "official": "xxx  xx",
        "document": " x     ",
        "question": "  x    ",
    },
    "left padding": {
        "roles   ": "..tdqRR",
        "existing": "  xxxx ",
        "output  ": "    xx ",
        "input   ": "  xxx  ",
        "strict  ": "  xx   ",
        "official": "xxxxx  ",
        "document": "   x   ",
        "question": "    x  ",
    },
    "two turns": {  # the row of a response token that predicts a template token is in `existing` alone
        "roles   ": "tqRRtqRRR.",
        "existing": "xxxxxxxx  ",
        "output  ": " xx  xxx  ",
        "input   ": "xx  xx    ",
        "strict  ": "x   x     ",
        "official": "xx  xx   x",
        "document": "          ",
        "question": " x   x    ",
    },
    "one response token": {
        "roles   ": "tqR",
        "existing": "xx ",
        "output  ": " x ",
        "input   ": "xx ",
        "strict  ": "x  ",
        "official": "xx ",
        "document": "   ",
        "question": " x ",
    },
    "no response": {  # the last token predicts nothing; the official mask counts it all the same
        "roles   ": "tddq.",
        "existing": "xxx  ",
        "output  ": "     ",
        "input   ": "xxx  ",
        "strict  ": "xxx  ",
        "official": "xxxxx",
        "document": " xx  ",
        "question": "     ",
    },
    "only a response": {
        "roles   ": ".RRR",
        "existing": " xx ",
        "output  ": " xx ",
        "input   ": "    ",
        "strict  ": "    ",
        "official": "x   ",
        "document": "    ",
        "question": "    ",
    },
    "prompt of one token": {
        "roles   ": "tRR",
        "existing": "xx ",
        "output  ": "xx ",
        "input   ": "x  ",
        "strict  ": "   ",
        "official": "x  ",
        "document": "   ",
        "question": "   ",
    },
    "one token": {
        "roles   ": "t",
        "existing": " ",
        "output  ": " ",
        "input   ": " ",
        "strict  ": " ",
        "official": "x",
        "document": " ",
        "question": " ",
    },
    "nothing but padding": {  # it fills up a batch and is no part of the official one
        "roles   ": "...",
        "existing": "   ",
        "output  ": "   ",
        "input   ": "   ",
        "strict  ": "   ",
        "official": "   ",
        "document": "   ",
        "question": "   ",
    },
}
SETS = {
    "existing": existing_rows,
    "output  ": output_rows,
    "input   ": lambda roles: alignment_rows(roles, "input_logits"),
    "strict  ": lambda roles: alignment_rows(roles, "input_logits", boundary=False),
    "official": lambda roles: alignment_rows(roles, "input_logits", official=True),
    "document": lambda roles: alignment_rows(roles, "document_logits"),
    "question": lambda roles: alignment_rows(roles, "question_logits"),
}


def parse(text: str) -> torch.Tensor:
    return torch.tensor([[ROLES[c] for c in text]])


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("rows", SETS, ids=lambda s: s.strip())
def test_examples_by_hand(name, rows):
    found = SETS[rows](parse(EXAMPLES[name]["roles   "]))
    assert found.dtype == torch.bool
    assert "".join("x" if x else " " for x in found[0].tolist()) == EXAMPLES[name][rows]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_other_positions_are_named_sets(name):
    roles = parse(EXAMPLES[name]["roles   "])
    assert torch.equal(alignment_rows(roles, "output_logits"), output_rows(roles))
    assert torch.equal(alignment_rows(roles, "all_logits"), existing_rows(roles))


def test_without_the_boundary_a_question_that_ends_the_prompt_loses_its_last_row():
    roles = parse("tdqqRR")
    assert alignment_rows(roles, "question_logits", boundary=False)[0].tolist() == [0, 0, 1, 0, 0, 0]
    assert alignment_rows(roles, "document_logits", boundary=False)[0].tolist() == [0, 1, 0, 0, 0, 0]


def random_sequence(rng: random.Random, length: int, one_response: bool) -> list[Role]:
    """Padding on one or both sides; between them random roles, responses anywhere or once at the end."""
    left, right = (rng.randint(0, length // 3) for _ in range(2))
    inner = length - left - right
    if one_response:
        response = rng.randint(0, inner)
        body = [rng.choice([Role.TEMPLATE, Role.DOCUMENT, Role.QUESTION]) for _ in range(inner - response)]
        body += [Role.RESPONSE] * response
    else:
        body = [Role(rng.randint(1, 4)) for _ in range(inner)]
    return [Role.PADDING] * left + body + [Role.PADDING] * right


@pytest.mark.parametrize("one_response", [True, False])
def test_definitions_on_random_sequences(one_response):
    """The words of the module's docstring, row by row."""
    rng = random.Random(0)
    length = 16
    roles = torch.tensor([random_sequence(rng, length, one_response) for _ in range(200)])
    found = {name.strip(): rows(roles) for name, rows in SETS.items()}
    for b, t in torch.cartesian_prod(torch.arange(len(roles)), torch.arange(length)).tolist():
        token = roles[b, t]
        following = roles[b, t + 1] if t + 1 < length else Role.PADDING
        exists = token != Role.PADDING and following != Role.PADDING
        assert found["existing"][b, t] == exists
        assert found["output"][b, t] == (exists and following == Role.RESPONSE)
        assert found["input"][b, t] == (exists and token != Role.RESPONSE)
        assert found["document"][b, t] == (exists and token == Role.DOCUMENT)
        assert found["question"][b, t] == (exists and token == Role.QUESTION)
        assert found["strict"][b, t] == (exists and token != Role.RESPONSE and following != Role.RESPONSE)
        assert found["official"][b, t] == (token != Role.RESPONSE)


def test_disjoint_and_complete():
    rng = random.Random(1)
    roles = torch.tensor([random_sequence(rng, 20, one_response=True) for _ in range(200)])
    strict, boundary = (alignment_rows(roles, "input_logits", boundary=b) for b in (False, True))
    output = output_rows(roles)
    assert not (strict & output).any()
    assert torch.equal(strict | output, existing_rows(roles))
    # The boundary row is the one row in both, once per sequence that has a prompt and a response.
    has_both = (roles == Role.RESPONSE).any(1) & ((roles != Role.RESPONSE) & (roles != Role.PADDING)).any(1)
    assert torch.equal((boundary & output).sum(1), has_both.long())
    assert has_both.any()
    assert not has_both.all()


def test_a_sequence_does_not_see_its_neighbours():
    rng = random.Random(2)
    roles = torch.tensor([random_sequence(rng, 12, one_response=False) for _ in range(30)])
    for rows in SETS.values():
        assert torch.equal(rows(roles), torch.cat([rows(sequence[None]) for sequence in roles]))
