"""Keys and values with room: the same numbers as transformers' own cache, without a copy for every token."""

import pytest
import torch
from transformers import DynamicCache

from selfaug.evaluation import generation, roomy_cache
from selfaug.evaluation.generation import generate, keep_rows
from selfaug.evaluation.roomy_cache import RoomyLayer
from tests.evaluation.test_generation import Numbers, plain_greedy, prompts
from tests.tiny import TOKENIZER_VOCAB, tiny_model


def draw(rows, tokens):
    return torch.randn(2, rows, 3, tokens, 4)  # keys and values


def test_equals_the_growing_copies_of_transformers(monkeypatch):
    monkeypatch.setattr(roomy_cache, "ROOM", 4)
    torch.manual_seed(0)
    config = tiny_model().config
    ours, theirs = roomy_cache.roomy_cache(config), DynamicCache(config=config)
    assert all(type(layer) is RoomyLayer for layer in ours.layers)
    rows = 5
    for step in range(30):
        new = draw(rows, 7 if step == 0 else 1)
        for one, other in zip(ours.update(*new, 0), theirs.update(*new, 0), strict=True):
            assert torch.equal(one, other)
        if step in (6, 7, 20):  # sequences leave, come twice, change places
            keep = torch.tensor([3, 0, 3] if step == 6 else [2, 1, 0])
            rows = len(keep)
            for cache in (ours, theirs):
                keep_rows(cache, keep)
        assert ours.get_seq_length() == theirs.get_seq_length() == 7 + step
    ours.layers[0].reset()
    new = draw(2, 3)
    assert torch.equal(ours.update(*new, 0)[1], new[1])


def test_copies_only_when_the_room_is_used_up():
    layer = RoomyLayer()
    places = []
    for step in range(roomy_cache.ROOM + 2):
        new = draw(2, 3 if step == 0 else 1)
        places.append(layer.update(*new)[0].data_ptr())
    assert len(set(places[:-1])) == 1
    assert places[-1] != places[0]


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2 has sliding windows, whose layers stay as they are
def test_answers_are_the_same_when_rooms_and_stages_end(family, monkeypatch):
    monkeypatch.setattr(roomy_cache, "ROOM", 3)
    monkeypatch.setattr(generation, "STRIDE", 5)
    model = tiny_model(family, vocab_size=TOKENIZER_VOCAB)
    expected = [plain_greedy(model, prompt, [2]) for prompt in prompts()]
    wanted = [" ".join(map(str, tokens if tokens[-1] != 2 else tokens[:-1])) for tokens in expected]
    assert generate(model, Numbers(), prompts(), max_new_tokens=12, progress=False) == wanted
