"""KL token by token: equal to a plain forward pass of both models, with the right texts and roles."""

import pytest
import torch

from selfaug.evaluation.token_kl import GAP, token_kl, token_texts
from selfaug.objective.batch import Role
from tests.tiny import TOKENIZER_VOCAB, tiny_model, tiny_tokenizer

ROLES = [Role.TEMPLATE] * 3 + [Role.DOCUMENT] * 20 + [Role.QUESTION] * 5 + [Role.TEMPLATE] * 2 + [Role.RESPONSE] * 4


def example(length: int = len(ROLES), seed: int = 0) -> dict:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, len(tiny_tokenizer()), (length,), generator=draw).tolist()
    roles = [int(role) for role in (ROLES if length == len(ROLES) else [Role.DOCUMENT] * (length - 4) + ROLES[-4:])]
    return {"id": "q7", "input_ids": ids, "roles": roles}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", lora=True, vocab_size=TOKENIZER_VOCAB)


@torch.no_grad()
def naive(model, ids: list[int]) -> torch.Tensor:
    """[T]: KL(base||tuned) in float64 from the models' own logits, the adapters switched by peft."""
    model.eval()
    tokens = torch.tensor([ids])
    tuned = model(tokens).logits[0].double().log_softmax(-1)
    with model.disable_adapter():
        base = model(tokens).logits[0].double().log_softmax(-1)
    model.train()
    return (base.exp() * (base - tuned)).sum(-1)


def test_every_row_equals_a_plain_forward_pass(model):
    one = example()
    found = token_kl(model, tiny_tokenizer(), one)
    expected = naive(model, one["input_ids"])
    assert found["id"] == "q7"
    assert found["roles"] == [role.name.lower() for role in ROLES]
    assert found["kl"][-1] is None
    assert found["kl"][:-1] == pytest.approx(expected[:-1].tolist(), rel=2e-3)
    assert min(found["kl"][:-1]) > 1e-3  # a difference that a wrong row would show
    assert model.training
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_zero_where_the_models_are_one():
    model = tiny_model("llama", lora=True, random_b=False, vocab_size=TOKENIZER_VOCAB)
    found = token_kl(model, tiny_tokenizer(), example())
    assert found["kl"] == [0.0] * (len(ROLES) - 1) + [None]


def test_a_long_example_keeps_its_start_and_its_end(model):
    one = example(200)
    whole, cut = token_kl(model, tiny_tokenizer(), one), token_kl(model, tiny_tokenizer(), one, most=40)
    assert len(cut["tokens"]) == len(cut["roles"]) == len(cut["kl"]) == 40
    gap = cut["roles"].index(GAP)
    assert gap == 10
    assert (cut["tokens"][gap], cut["kl"][gap]) == ("161", None)
    for key in ("tokens", "roles", "kl"):
        assert cut[key][:gap] == whole[key][:10]
        assert cut[key][gap + 1 :] == whole[key][-29:]
    assert token_kl(model, tiny_tokenizer(), one, most=200) == whole


@pytest.mark.parametrize(
    "text", ["the cat is in the house", "Où? 中文 and 😀!", "a\n\n b  c", "<|im_start|>user\nx<|im_end|>\n", ""]
)
def test_texts_of_tokens_make_up_the_text(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    assert "\ufffd" not in "".join(texts)


def test_half_a_character_at_the_end_is_shown_as_such():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a中", add_special_tokens=False)["input_ids"][:-1]
    assert token_texts(tokenizer, ids)[0] == "a"
    assert token_texts(tokenizer, ids)[-1].endswith("\ufffd")
