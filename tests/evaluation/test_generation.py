"""Batched greedy answers: against a plain loop of argmax, one prompt and one token at a time."""

import warnings

import pytest
import torch

from selfaug.evaluation import generation
from selfaug.evaluation.generation import MAX_SEQUENCES, evaluating, generate, length_batches, stop_ids
from selfaug.model.reference import adapters_off
from tests.tiny import TOKENIZER_VOCAB, tiny_model, tiny_tokenizer

NEW = 12


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def prompts(lengths=(5, 17, 9, 30, 6, 9), seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 280, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def plain_greedy(model, prompt, stops, new=NEW):
    """One sequence, whole forward pass per token, no cache, no padding."""
    ids = list(prompt)
    for _ in range(new):
        token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        ids.append(token)
        if token in stops:
            break
    return ids[len(prompt) :]


class Numbers:
    """A tokenizer that shows token ids: random bytes are mostly no valid text, and all alike when decoded."""

    pad_token_id, eos_token_id = 0, 2

    def decode(self, tokens, skip_special_tokens):
        return " ".join(map(str, tokens))


def text(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "mistral", "gpt_neox", "cohere"])
def test_equals_plain_loop_in_order(family):
    model = tiny_model(family, vocab_size=TOKENIZER_VOCAB)
    expected = [plain_greedy(model, prompt, [2]) for prompt in prompts()]
    wanted = [" ".join(map(str, tokens if tokens[-1] != 2 else tokens[:-1])) for tokens in expected]
    assert len(set(wanted)) > 3  # else the order would not be tested
    for tokens_per_batch in (1, 90, 16384):
        answers = generate(
            model, Numbers(), prompts(), max_new_tokens=NEW, tokens_per_batch=tokens_per_batch, progress=False
        )
        assert answers == wanted


def test_stops_at_every_eos(tokenizer):
    model = tiny_model(vocab_size=TOKENIZER_VOCAB)
    free = [plain_greedy(model, prompt, []) for prompt in prompts()]
    third = free[0][2]  # a common token of the vocabulary becomes an end of answer through the generation settings
    model.generation_config.eos_token_id = [third, 2]
    assert set(stop_ids(model, tokenizer)) == {third, 2}
    expected = [plain_greedy(model, prompt, [third, 2]) for prompt in prompts()]
    assert len(expected[0]) <= 3
    wanted = [text(tokenizer, [token for token in tokens if token not in (third, 2)]) for tokens in expected]
    assert generate(model, tokenizer, prompts(), max_new_tokens=NEW, progress=False) == wanted


def test_padding_that_is_no_special_token_stays_out(tokenizer):
    model = tiny_model(vocab_size=TOKENIZER_VOCAB)
    expected = generate(model, tokenizer, prompts(), max_new_tokens=NEW, progress=False)
    other = tiny_tokenizer()
    other.pad_token = other.convert_ids_to_tokens(40)
    assert generate(model, other, prompts(), max_new_tokens=NEW, progress=False) == expected


def test_models_own_sampling_settings_change_nothing(tokenizer, capsys):
    model = tiny_model(vocab_size=TOKENIZER_VOCAB)
    expected = generate(model, tokenizer, prompts(), max_new_tokens=NEW, progress=False)
    own = model.generation_config
    own.do_sample, own.temperature, own.top_p, own.top_k = True, 5.0, 0.9, 7
    own.repetition_penalty, own.no_repeat_ngram_size = 3.0, 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(model, tokenizer, prompts(), max_new_tokens=NEW, progress=False) == expected
    assert capsys.readouterr().err == ""
    assert model.generation_config is own


def test_settings_and_mode_come_back_after_an_error(tokenizer):
    model = tiny_model(vocab_size=TOKENIZER_VOCAB, lora=True)
    own = model.generation_config
    with pytest.raises(IndexError):
        generate(model, tokenizer, [[TOKENIZER_VOCAB + 5]], max_new_tokens=2, progress=False)
    assert model.get_base_model().generation_config is own
    assert not model.get_base_model().get_output_embeddings()._forward_pre_hooks
    assert model.training


def test_adapters_on_and_off(tokenizer):
    base = tiny_model(vocab_size=TOKENIZER_VOCAB)
    plain = generate(base, tokenizer, prompts(), max_new_tokens=NEW, progress=False)
    model = tiny_model(vocab_size=TOKENIZER_VOCAB, lora={"lora_dropout": 0.5})  # in train mode: dropout must not act
    expected = [text(tokenizer, plain_greedy(model.eval(), prompt, [2])) for prompt in prompts()]
    model.train()
    tuned = generate(model, tokenizer, prompts(), max_new_tokens=NEW, progress=False)
    assert tuned == expected
    assert tuned != plain
    assert model.training
    assert all(module.training for module in model.modules())
    with adapters_off(model):
        assert generate(model, tokenizer, prompts(), max_new_tokens=NEW, progress=False) == plain
    assert generate(model, tokenizer, prompts(), max_new_tokens=NEW, progress=False) == tuned


def test_evaluating_gives_each_module_its_own_mode_back():
    model = tiny_model()
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


def test_training_goes_on_after_generation(tokenizer):
    model = tiny_model(vocab_size=TOKENIZER_VOCAB, lora=True)
    generate(model, tokenizer, prompts(), max_new_tokens=2, progress=False)
    ids = torch.tensor([prompts()[0]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_length_batches():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 200, (300,), generator=generator).tolist()
    batches = list(length_batches(lengths, 1000, extra=10))
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    assert all(len(b) <= MAX_SEQUENCES and len(b) * (max(lengths[i] for i in b) + 10) <= 1000 for b in batches)
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(lengths, reverse=True)
    ones = length_batches([1] * (2 * MAX_SEQUENCES + 2), 10**6)
    assert [len(batch) for batch in ones] == [MAX_SEQUENCES, MAX_SEQUENCES, 2]
    assert list(length_batches([50, 60], 20)) == [[1], [0]]  # too long for the budget: alone
    assert list(length_batches([], 20)) == []


def test_edges(tokenizer):
    model = tiny_model(vocab_size=TOKENIZER_VOCAB)
    assert generate(model, tokenizer, [], max_new_tokens=3, progress=False) == []
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        generate(model, tokenizer, [[5], []], max_new_tokens=3, progress=False)
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(model, tokenizer, [[5]], max_new_tokens=0, progress=False)


def test_progress_counts_answers(tokenizer, capsys):
    model = tiny_model(vocab_size=TOKENIZER_VOCAB)
    generate(model, tokenizer, prompts(), max_new_tokens=2, description="asking the base model")
    shown = capsys.readouterr().err
    assert "asking the base model" in shown
    assert "6/6" in shown


def test_keys_are_kept_in_the_dtype_of_autocast(tokenizer, monkeypatch):
    dtypes = []
    real = generation.keep_rows

    def seen(cache, rows):
        dtypes.append(cache.layers[0].keys.dtype)
        real(cache, rows)

    monkeypatch.setattr(generation, "keep_rows", seen)
    monkeypatch.setattr(generation, "STRIDE", 2)
    model = tiny_model("llama", vocab_size=TOKENIZER_VOCAB)
    settings = {"max_new_tokens": 40, "progress": False, "also_stop": range(4, 150)}
    generate(model, tokenizer, prompts(), **settings)
    before, dtypes[:] = set(dtypes), []
    with torch.autocast("cpu", torch.bfloat16):
        generate(model, tokenizer, prompts(), **settings)
    assert before == {torch.float32}
    assert set(dtypes) == {torch.bfloat16}
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt_neox"])
def test_stages_change_nothing(family, monkeypatch):
    model = tiny_model(family, vocab_size=TOKENIZER_VOCAB)
    stops = range(4, 60)  # some answers end early and leave their batch
    found = []
    for stride in (1, 3, 100):
        monkeypatch.setattr(generation, "STRIDE", stride)
        found.append(generate(model, Numbers(), prompts(), max_new_tokens=30, progress=False, also_stop=stops))
    assert found[0] == found[1] == found[2]
    assert len({len(answer.split()) for answer in found[0]}) > 1
