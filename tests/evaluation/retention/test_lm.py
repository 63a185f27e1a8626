"""Our model for lm-eval against a plain forward pass, and against lm-eval's own backend."""

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from selfaug.data.chat import ChatFormat
from selfaug.errors import UserError
from selfaug.evaluation.retention import lm as lm_module
from selfaug.evaluation.retention.lm import RetentionLM
from selfaug.model.reference import adapters_off
from tests.tiny import TOKENIZER_VOCAB, tiny_model, tiny_tokenizer

CONTEXTS = ("Question: what is the cat?\nAnswer:", "in the end", "One and another and the other", "the", "")
CHOICES = (" a cat", " the dog and the hen", " of", " in the rain, again")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def requests(pairs):
    return [Instance("loglikelihood", {}, pair, i, ("test", i, 1)) for i, pair in enumerate(pairs)]


def all_pairs():
    """Shared contexts, a context with one choice, choices of one token, and one that comes twice."""
    pairs = [(context, choice) for context in CONTEXTS for choice in CHOICES]
    return [*pairs, ("alone in its context", " the end"), ("alone", "s"), pairs[3]]


@torch.no_grad()
def plain(model, tokenizer, context, choice):
    """Log-likelihood and greediness from one forward pass over the whole text, nothing shared."""
    start = tokenizer.encode(context) or [tokenizer.eos_token_id]
    ids = tokenizer.encode(context + choice) if context else [*start, *tokenizer.encode(choice)]
    log_p = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    rows = range(len(start) - 1, len(ids) - 1)
    return (
        sum(log_p[row, ids[row + 1]].item() for row in rows),
        all(log_p[row].argmax().item() == ids[row + 1] for row in rows),
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "mistral", "gpt_neox", "cohere", "granite"])
@pytest.mark.parametrize("tokens", [1, 60, 8192])
def test_log_likelihoods_equal_a_plain_pass(family, tokens, tokenizer):
    model = tiny_model(family, vocab_size=TOKENIZER_VOCAB)
    pairs = all_pairs()
    found = RetentionLM(model, tokenizer, tokens_per_batch=tokens, progress=False).loglikelihood(requests(pairs))
    for (context, choice), (value, greedy) in zip(pairs, found, strict=True):
        expected, expected_greedy = plain(model, tokenizer, context, choice)
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert greedy == expected_greedy


def test_greedy_continuations_are_recognised(tokenizer):
    model = tiny_model(vocab_size=TOKENIZER_VOCAB)
    lm = RetentionLM(model, tokenizer, progress=False)
    ids = tokenizer.encode("the cat and the")
    with torch.no_grad():
        tokens = []
        for _ in range(3):
            tokens.append(int(model(input_ids=torch.tensor([[*ids, *tokens]])).logits[0, -1].argmax()))
    wrong = [tokens[0], tokens[1], (tokens[2] + 1) % TOKENIZER_VOCAB]
    asked = [(("", ""), ids, tokens), (("", ""), ids, wrong)]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(asked)] == [True, False]


def test_equals_lm_eval_s_own_backend(tokenizer):
    model = tiny_model(vocab_size=TOKENIZER_VOCAB)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=4096).loglikelihood(
        requests(all_pairs()), disable_tqdm=True
    )
    ours = RetentionLM(model, tokenizer, progress=False).loglikelihood(requests(all_pairs()))
    for (value, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert greedy == expected_greedy


def test_what_is_too_long_loses_its_beginning(tokenizer):
    model = tiny_model(vocab_size=TOKENIZER_VOCAB, max_position_embeddings=24)
    lm = RetentionLM(model, tokenizer, progress=False)
    context, choice = list(range(10, 60)), [5, 6, 7]
    cut = [(("", ""), context[-22:], choice)]  # 24 positions hold 22 + 3 - 1 tokens
    assert lm._loglikelihood_tokens([(("", ""), context, choice)]) == lm._loglikelihood_tokens(cut)


def test_a_shared_context_runs_once(tokenizer, monkeypatch):
    model = tiny_model(vocab_size=TOKENIZER_VOCAB)
    lm = RetentionLM(model, tokenizer, progress=False)
    seen = []
    body = lm_module.RetentionLM._body
    monkeypatch.setattr(
        lm_module.RetentionLM, "_body", lambda self, ids, *rest: (seen.append(ids.numel()), body(self, ids, *rest))[1]
    )
    context = list(range(10, 50))
    lm._loglikelihood_tokens([(("", ""), context, [token, 5]) for token in range(60, 64)])
    assert sum(seen) == 40 + 4
    seen.clear()
    lm._loglikelihood_tokens([(("", ""), context, [token]) for token in range(60, 64)])
    assert sum(seen) == 40


def test_positions_count_real_tokens(tokenizer, monkeypatch):
    """Rotary positions forgive a shift by the padding, learned ones would not."""
    lm = RetentionLM(tiny_model(vocab_size=TOKENIZER_VOCAB), tokenizer, progress=False)
    seen = []
    body = lm._decoder.body.forward
    monkeypatch.setattr(
        lm._decoder.body, "forward", lambda **given: (seen.append(given["position_ids"].tolist()), body(**given))[1]
    )
    requests = [(("", ""), list(range(10, 10 + n)), [token, 5]) for n in (4, 2) for token in (60, 61)]
    lm._loglikelihood_tokens(requests)
    assert seen == [[[0, 1, 2, 3], [0, 0, 0, 1]], [[4], [4], [2], [2]]]


def test_adapters_off_is_the_base(tokenizer):
    tuned = tiny_model(lora=True, vocab_size=TOKENIZER_VOCAB)
    base = tiny_model(vocab_size=TOKENIZER_VOCAB)
    ours = RetentionLM(tuned, tokenizer, progress=False)
    expected = RetentionLM(base, tokenizer, progress=False).loglikelihood(requests(all_pairs()))
    with adapters_off(tuned):
        assert ours.loglikelihood(requests(all_pairs())) == expected
    assert ours.loglikelihood(requests(all_pairs())) != expected
    assert tuned.training


def answers(lm, *settings):
    asked = [Instance("generate_until", {}, ("the cat", one), i, ("test", i, 1)) for i, one in enumerate(settings)]
    return lm.generate_until(asked)


def test_answers_end_at_their_stop_text_and_keep_white_space(tokenizer):
    model = tiny_model(vocab_size=TOKENIZER_VOCAB)
    lm = RetentionLM(model, tokenizer, progress=False)
    whole, short = answers(lm, {"until": [], "max_gen_toks": 40}, {"until": [], "max_gen_toks": 3})
    assert whole.startswith(short)
    stop = whole[5:7]
    (cut,) = answers(lm, {"until": [stop], "max_gen_toks": 40})
    assert cut == whole[: whole.index(stop)]
    (given,) = answers(lm, {"until": stop, "max_gen_toks": 40})
    assert given == cut


def test_sampling_is_refused(tokenizer):
    lm = RetentionLM(tiny_model(vocab_size=TOKENIZER_VOCAB), tokenizer, progress=False)
    with pytest.raises(UserError, match="greedy"):
        answers(lm, {"do_sample": True, "max_gen_toks": 3})
    with pytest.raises(UserError, match="perplexity"):
        lm.loglikelihood_rolling([])


def test_chat_template(tokenizer):
    lm = RetentionLM(tiny_model(vocab_size=TOKENIZER_VOCAB), tokenizer, ChatFormat(tokenizer), progress=False)
    turns = [{"role": "user", "content": "hi"}]
    assert lm.apply_chat_template(turns) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_bos_is_added_once(tokenizer):
    class Bos:
        bos_token, bos_token_id, eos_token_id, name_or_path = "<s>", 7, 2, "x"

        def encode(self, text, add_special_tokens, verbose):
            return [7] * add_special_tokens + [len(text)]

    lm = RetentionLM(tiny_model(vocab_size=TOKENIZER_VOCAB), Bos(), progress=False)
    assert lm.tok_encode("text") == [7, 4]
    assert lm.tok_encode("<s>text") == [7]
    assert lm.tok_encode("text", add_special_tokens=False) == [4]
    assert lm.prefix_token_id == 7
