"""Drift: against full logits, one document at a time; on which rows; on bad settings and files."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from selfaug.data import packaged
from selfaug.data.packaged import instruction_answers, wikipedia_texts
from selfaug.errors import UserError
from selfaug.evaluation import drift as drift_module
from selfaug.evaluation.drift import CorpusConfig, DriftConfig, measure_drift
from selfaug.reporting.results import Results, read_results, write_results
from tests.tiny import SPECIAL_TOKENS, TOKENIZER_VOCAB, tiny_lora, tiny_model, tiny_tokenizer

TEXTS = ["the cat and the other one in a hat", "on", "it is written there and nowhere else " * 4, "one of the seas"]
TURNS = [("what is it?", "a thing in the sea"), ("and who is there? " * 5, "on"), ("where", "the end of it all")]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def files(tmp_path):
    """The corpora as a user's files; returns the settings of both."""
    texts, turns = tmp_path / "texts.jsonl", tmp_path / "turns.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    turns.write_text("".join(json.dumps({"prompt": prompt, "response": answer}) + "\n" for prompt, answer in TURNS))
    return {"texts": {"kind": "text", "path": str(texts)}, "turns": {"kind": "dialogue", "path": str(turns)}}


def tuned_model(**lora):
    return tiny_model(vocab_size=TOKENIZER_VOCAB, lora=lora or True)


@torch.no_grad()
def by_hand(model, documents):
    """documents: (ids, first row that counts). Per-document sums over rows, from the models' own whole logits."""
    sums = []
    model.eval()
    for ids, first in documents:
        batch = torch.tensor([ids])
        tuned = model(input_ids=batch).logits[0].double().log_softmax(-1)
        with model.disable_adapter():
            base = model(input_ids=batch).logits[0].double().log_softmax(-1)
        rows = range(first, len(ids) - 1)
        sums.append(
            [
                sum(float((base[t].exp() * (base[t] - tuned[t])).sum()) for t in rows),
                sum(float((tuned[t].exp() * (tuned[t] - base[t])).sum()) for t in rows),
                sum(-float(tuned[t, ids[t + 1]]) for t in rows),
                sum(-float(base[t, ids[t + 1]]) for t in rows),
                len(rows),
            ]
        )
    model.train()
    return np.array(sums).sum(0)


def check(metrics, sums, documents):
    kl_base_tuned, kl_tuned_base, nll_tuned, nll_base, tokens = sums
    expected = {
        ("kl_base_tuned", "tuned"): kl_base_tuned / tokens,
        ("kl_tuned_base", "tuned"): kl_tuned_base / tokens,
        ("perplexity", "base"): np.exp(nll_base / tokens),
        ("perplexity", "tuned"): np.exp(nll_tuned / tokens),
        ("perplexity", "difference"): np.exp(nll_tuned / tokens) - np.exp(nll_base / tokens),
        ("perplexity_ratio", "tuned"): np.exp((nll_tuned - nll_base) / tokens),
    }
    by_item = {"items", "asked"}
    assert {(name, part) for name, metric in metrics.items() for part in set(metric) - by_item} == set(expected)
    for name in set(metrics) - {"perplexity"}:
        assert len(metrics[name]["items"]) == documents
        assert np.mean(metrics[name]["items"]) == pytest.approx(metrics[name]["tuned"].mean, rel=1e-4)
    for (name, part), value in expected.items():
        interval = metrics[name][part]
        assert interval.mean == pytest.approx(value, rel=1e-4), (name, part)
        assert interval.low <= interval.mean <= interval.high
        assert interval.n == documents


def dialogue_documents(tokenizer):
    documents = []
    for prompt, answer in TURNS:
        opening = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(opening)["input_ids"]
        documents.append(([*ids, *tokenizer(answer)["input_ids"], 2], len(ids) - 1))
    return documents


@pytest.mark.parametrize("tokens_per_batch", [1, 120, 8192])
def test_equals_whole_logits(tokenizer, files, tokens_per_batch):
    model = tuned_model(lora_dropout=0.5)  # in train mode: dropout must not act
    config = DriftConfig(files, tokens_per_batch=tokens_per_batch)
    drift = measure_drift(model, tokenizer, config, progress=False)
    assert list(drift) == ["texts", "turns"]
    texts = [(ids, 0) for ids in tokenizer(TEXTS)["input_ids"]]
    check(drift["texts"], by_hand(model, texts), documents=sum(len(ids) > 1 for ids, _ in texts))
    check(drift["turns"], by_hand(model, dialogue_documents(tokenizer)), documents=len(TURNS))
    assert drift["texts"]["kl_base_tuned"]["tuned"].mean > 0.01
    assert drift["texts"]["kl_base_tuned"] != drift["texts"]["kl_tuned_base"]


def test_head_with_cap_and_dialogue_rows_only(tokenizer, files):
    model = tiny_model("gemma2", vocab_size=TOKENIZER_VOCAB, lora=True)
    drift = measure_drift(model, tokenizer, DriftConfig({"turns": files["turns"]}), progress=False)
    check(drift["turns"], by_hand(model, dialogue_documents(tokenizer)), documents=len(TURNS))


def test_fresh_adapter_has_not_drifted(tokenizer, files):
    model = tiny_lora(tiny_model(vocab_size=TOKENIZER_VOCAB), random_b=False)
    for metrics in measure_drift(model, tokenizer, DriftConfig(files), progress=False).values():
        assert metrics["kl_base_tuned"]["tuned"].mean == 0.0
        assert metrics["kl_tuned_base"]["tuned"].mean == 0.0
        assert metrics["perplexity"]["difference"].mean == 0.0
        assert metrics["perplexity_ratio"]["tuned"].mean == 1.0


def test_model_is_left_as_it_was(tokenizer, files):
    model = tuned_model()
    before = [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]
    measure_drift(model, tokenizer, DriftConfig(files), progress=False)
    assert [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()] == before
    assert all(module.training for module in model.modules())


def test_follows_the_callers_autocast(tokenizer, files):
    model = tuned_model()
    exact = measure_drift(model, tokenizer, DriftConfig(files), progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        rough = measure_drift(model, tokenizer, DriftConfig(files), progress=False)
    for name in exact:
        wanted, found = (d[name]["kl_base_tuned"]["tuned"].mean for d in (exact, rough))
        assert found != wanted
        assert found == pytest.approx(wanted, rel=0.1)


def test_max_tokens_cuts_the_end(tokenizer, files, caplog):
    model = tuned_model()
    files["texts"]["max_tokens"] = 6
    files["turns"]["max_tokens"] = max(len(ids) for ids, _ in dialogue_documents(tokenizer)[::2]) - 1
    limit = files["turns"]["max_tokens"]
    drift = measure_drift(model, tokenizer, DriftConfig(files), progress=False)
    texts = [(ids[:6], 0) for ids in tokenizer(TEXTS)["input_ids"]]
    check(drift["texts"], by_hand(model, texts), documents=sum(len(ids) > 1 for ids, _ in texts))
    turns = [(ids[:limit], first) for ids, first in dialogue_documents(tokenizer) if first + 1 < limit]
    assert len(turns) == 2  # the long prompt leaves no room for a response
    check(drift["turns"], by_hand(model, turns), documents=2)
    assert "1 of 3 documents were left out" in caplog.text
    files["turns"]["max_tokens"] = 3
    with pytest.raises(UserError, match=r"evaluation\.drift\.corpora\.turns .* raise its max_tokens=3"):
        measure_drift(model, tokenizer, DriftConfig(files), progress=False)


def test_limit_is_a_seeded_sample(tokenizer, files):
    model = tuned_model()
    settings = {"texts": {**files["texts"], "limit": 2}}

    def perplexity(seed):
        drift = measure_drift(model, tokenizer, DriftConfig(settings, seed=seed), progress=False)
        return drift["texts"]["perplexity"]["base"].mean

    assert perplexity(3) == perplexity(3)
    assert len({perplexity(seed) for seed in range(8)}) > 2
    counts = np.zeros(10)
    for seed in range(2000):
        sample = packaged.sample(range(10), 3, seed)
        assert sample == sorted(set(sample))
        counts[sample] += 1
    assert np.abs(counts / 2000 - 0.3).max() < 0.05
    assert packaged.sample(range(3), 5, 0) == packaged.sample(range(3), None, 0) == [0, 1, 2]


def test_results_file_holds_it(tokenizer, files, tmp_path):
    drift = measure_drift(tuned_model(), tokenizer, DriftConfig(files), progress=False)
    keys = ("config", "code", "data", "task", "time", "speed", "memory", "environment")
    empty: dict[str, Any] = {key: {} for key in keys}
    write_results(tmp_path / "results.json", Results("run", config_hash="", seed=0, drift=drift, **empty))
    stored = read_results(tmp_path / "results.json").drift["turns"]["kl_base_tuned"]["tuned"]
    assert stored["mean"] == drift["turns"]["kl_base_tuned"]["tuned"].mean
    assert stored["n"] == len(TURNS)


def test_packaged_corpora(tokenizer, tmp_path, monkeypatch):
    """With stand-ins for the assets: the default configuration runs, an instruction's input follows it."""
    for asset, file, records in (
        ("wikipedia-articles", "articles.jsonl", [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)]),
        (
            "alpaca-sample",
            "alpaca.jsonl",
            [
                {"id": "0", "instruction": "add", "input": "1 and 1", "output": "two"},
                {"id": "1", "instruction": "who?", "input": "", "output": "the cat"},
            ],
        ),
    ):
        (tmp_path / asset).mkdir()
        (tmp_path / asset / file).write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(packaged, "asset_path", lambda name: tmp_path / name)
    assert wikipedia_texts() == TEXTS
    assert len(wikipedia_texts(2, seed=1)) == 2
    assert instruction_answers() == [("add\n\n1 and 1", "two"), ("who?", "the cat")]
    drift = measure_drift(tuned_model(), tokenizer, DriftConfig(), progress=False)
    assert drift["dialogues"]["perplexity"]["tuned"].n == 2
    assert drift["wikipedia"]["perplexity"]["tuned"].mean > 1


PATH = r"evaluation\.drift\.corpora\.mine\.path"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "text", "asset": "wikipedia-artikel"}, rf"asset=wikipedia-artikel .* or set {PATH} to"),
        ({"kind": "dialogue", "asset": "wikipedia-articles"}, rf"no packaged corpus of kind dialogue.*{PATH}"),
        ({"kind": "text"}, rf"set either {PATH} or"),
        ({"kind": "text", "asset": "wikipedia-articles", "path": "x"}, rf"set either {PATH} or"),
        ({"kind": "poem", "path": "x"}, r"corpora\.mine\.kind=poem is unknown: set it to text or dialogue"),
        ({"path": "x"}, r"corpora\.mine has no kind"),
        (None, r"corpora\.mine has no kind"),
        ({"kind": "text", "path": "x", "limits": 3}, r"corpora\.mine\.limits is unknown"),
        ({"kind": "text", "path": "x", "limit": 0}, r"corpora\.mine\.limit=0 is not allowed"),
        ({"kind": "text", "path": "x", "max_tokens": 1}, r"corpora\.mine\.max_tokens=1 is not allowed"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        DriftConfig({"mine": settings})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"does not exist: set it to a JSON-lines file with prompt and response"),
        ("", r"is empty: set it to"),
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n', r', line 2: "response" must be a text'),
        ('{"prompt": " ", "response": "b"}\n', r', line 1: "prompt" must be a text'),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', r', line 1: "messages" must begin with'),
        ('{"messages": "a"}\n', r', line 1: "messages" must begin with'),
        ("[1]\n", r", line 1: must be a JSON object"),
        ("{\n", r", line 1: not valid JSON"),
    ],
)
def test_bad_files(tokenizer, tmp_path, content, message):
    path = tmp_path / "mine.jsonl"
    if content is not None:
        path.write_text(content)
    config = DriftConfig({"mine": CorpusConfig("dialogue", path=str(path))})
    with pytest.raises(UserError, match=PATH + "=.*" + message):
        measure_drift(tuned_model(), tokenizer, config, progress=False)


def test_models_that_cannot_be_measured(files, tokenizer):
    with pytest.raises(UserError, match="no adapters"):
        measure_drift(tiny_model(vocab_size=TOKENIZER_VOCAB), tokenizer, DriftConfig(files), progress=False)
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(UserError, match=r"evaluation\.drift\.chat_template"):
        measure_drift(tuned_model(), bare, DriftConfig(files), progress=False)
    given = DriftConfig(files, chat_template=tokenizer.chat_template)
    with_own = measure_drift(tuned_model(), bare, given, progress=False)
    assert with_own == measure_drift(tuned_model(), tokenizer, DriftConfig(files), progress=False)


def test_messages_are_read_as_their_first_turn(files, tokenizer, tmp_path):
    """The lines of a file of self-dialogues, here with a second turn."""
    path = tmp_path / "messages.jsonl"
    with path.open("w") as file:
        for prompt, answer in TURNS:
            said = [("user", prompt), ("assistant", answer), ("user", "more"), ("assistant", "no")]
            messages = [{"role": role, "content": content} for role, content in said]
            file.write(json.dumps({"id": prompt, "messages": messages, "ended": True}) + "\n")
    config = DriftConfig({"turns": {"kind": "dialogue", "path": str(path)}})
    assert drift_module._tokenised("turns", tokenizer, config) == drift_module._tokenised(
        "turns", tokenizer, DriftConfig(files)
    )


def test_response_ends_as_the_model_ends_it(files):
    """A template whose end of turn is not the tokenizer's eos, and one that has none."""
    assert SPECIAL_TOKENS[3] == "<|endoftext|>"
    for template_end, token in (("<|endoftext|>", 3), ("", 2)):
        other = tiny_tokenizer()
        other.chat_template = other.chat_template.replace("'<|im_end|>\n'", f"'{template_end}\n'")
        documents = drift_module._tokenised("turns", other, DriftConfig(files))
        assert [ids[-1] for ids, _ in documents] == [token] * len(TURNS)


@pytest.mark.assets
def test_a_method_is_not_given_what_is_measured_on(tokenizer):
    """EWC's text: other instructions than those of drift and style, of every shipped evaluation."""
    corpus = {"kind": "dialogue", "asset": "alpaca-sample", "limit": 64, "max_tokens": 4096}
    given = drift_module.tokenised_corpus(tokenizer, corpus, "text")
    measured = drift_module._tokenised("mine", tokenizer, DriftConfig({"mine": corpus | {"limit": 200}}))
    assert len(given) == 64
    assert not {tuple(ids) for ids, _ in given} & {tuple(ids) for ids, _ in measured}


@pytest.mark.assets
def test_packaged_corpora_are_there():
    articles, turns = wikipedia_texts(), instruction_answers()
    assert len(articles) > 0
    assert len(turns) > 0
    assert len(wikipedia_texts(5, seed=1)) == len(instruction_answers(5, seed=1)) == 5
    assert min(map(len, articles)) > 100
