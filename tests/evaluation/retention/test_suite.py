"""The suite: what is measured, kept, found again and compared."""

import json
from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from selfaug.errors import UserError
from selfaug.evaluation.drift import DriftConfig
from selfaug.evaluation.retention import suite as suite_module
from selfaug.evaluation.retention.benchmarks import RetentionConfig
from selfaug.evaluation.retention.suite import STYLE, StyleConfig, Suite, base_store, keep_copy, tuned_store
from selfaug.model.reference import adapters_off
from tests.evaluation.retention.tiny_items import items  # noqa: F401
from tests.tiny import TOKENIZER_VOCAB, randomise_b, tiny_model, tiny_tokenizer

ASKED = {"ifeval": {"max_new_tokens": 6}, "arc_easy": {}, "lambada": {}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SELFAUG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_suite(asked=None, prompts=4, **settings) -> Suite:
    config = RetentionConfig(ASKED if asked is None else asked, **settings)
    return Suite(config, StyleConfig(prompts, max_new_tokens=6), tiny_tokenizer(), progress=False)


def model(random_b: bool = True):
    return tiny_model(lora=True, random_b=random_b, vocab_size=TOKENIZER_VOCAB)


def both(suite: Suite, tuned, folder: Path):
    with adapters_off(tuned):
        store = base_store(tuned)
        before = suite.score(tuned, store, "base")
    keep_copy(store, before, folder / "base")
    return before, suite.score(tuned, tuned_store(tuned, folder / "tuned"), "tuned")


def runs_of(monkeypatch) -> list[str]:
    """The benchmarks that are really asked."""
    asked: list[str] = []
    real = suite_module.run_benchmark

    def counted(lm, name, *rest):
        asked.append(name)
        return real(lm, name, *rest)

    monkeypatch.setattr(suite_module, "run_benchmark", counted)
    return asked


def test_an_adapter_of_zeros_changes_nothing(items, tmp_path):  # noqa: F811
    suite, tuned = make_suite(), model(random_b=False)
    before, after = both(suite, tuned, tmp_path)
    found = suite.compared(before, after)
    for metrics in found.benchmarks.values():
        for metric in metrics.values():
            assert (metric["difference"].low, metric["difference"].mean, metric["difference"].high) == (0, 0, 0)
            assert metric.get("mcnemar_p", 1) == 1
    for metrics in found.style.values():
        assert all(metric["difference"].mean == 0 for metric in metrics.values())
    drift = suite.drift(tuned, after, DriftConfig())
    assert set(drift) == {"own answers to ifeval", f"own answers to {STYLE}"}
    assert all(metrics["kl_base_tuned"]["tuned"].mean == 0 for metrics in drift.values())
    assert [item.output for item in before["ifeval"].items] == [item.output for item in after["ifeval"].items]


def test_another_model_answers_otherwise(items, tmp_path):  # noqa: F811
    suite, tuned = make_suite(), model()
    before, after = both(suite, tuned, tmp_path)
    found = suite.compared(before, after)
    assert set(found.benchmarks) == set(ASKED)
    assert set(found.style) == {"ifeval", STYLE}
    assert [item.output for item in before["ifeval"].items] != [item.output for item in after["ifeval"].items]
    drift = suite.drift(tuned, after, DriftConfig())
    assert set(drift) == {"own answers to ifeval", f"own answers to {STYLE}"}
    assert all(metrics["kl_base_tuned"]["tuned"].mean > 0 for metrics in drift.values())
    assert found.about["ifeval"]["n"] == 8
    assert found.about["ifeval"]["chat_template"]


def test_files_hold_what_an_audit_needs(items, tmp_path):  # noqa: F811
    both(make_suite(), model(), tmp_path)
    for side in ("base", "tuned"):
        content = json.loads((tmp_path / side / "ifeval.json").read_text())
        about = content["about"]
        assert about["max_new_tokens"] == 6
        assert about["chat"] is True
        assert {"lm_eval", "transformers", "torch", "langdetect"} <= set(about["versions"])
        first = content["items"][0]
        assert first["prompt"].startswith("<|im_start|>user")
        assert {"id", "output", "target", "values"} <= set(first)


def test_a_killed_evaluation_goes_on(items, tmp_path, monkeypatch):  # noqa: F811
    tuned, asked = model(), runs_of(monkeypatch)
    real = suite_module.run_benchmark

    def dies(lm, name, *rest):
        if name == "lambada":
            raise KeyboardInterrupt
        return real(lm, name, *rest)

    monkeypatch.setattr(suite_module, "run_benchmark", dies)
    with pytest.raises(KeyboardInterrupt):
        both(make_suite(), tuned, tmp_path)
    assert asked == ["ifeval", "arc_easy"]
    asked.clear()
    monkeypatch.setattr(suite_module, "run_benchmark", real)
    both(make_suite(), tuned, tmp_path)
    assert asked == ["lambada", "ifeval", "arc_easy", "lambada"]
    asked.clear()
    both(make_suite(), tuned, tmp_path)
    assert asked == []


def test_a_base_model_is_scored_once_for_all_runs(items, tmp_path, monkeypatch):  # noqa: F811
    asked = runs_of(monkeypatch)
    both(make_suite(), model(), tmp_path / "one")
    asked.clear()
    other = model()
    with torch.no_grad():
        randomise_b(other, 0.3)
    both(make_suite(), other, tmp_path / "two")
    assert asked == list(ASKED)  # of the other adapter alone
    assert (tmp_path / "one/base/ifeval.json").read_bytes() == (tmp_path / "two/base/ifeval.json").read_bytes()


CHANGES = {
    "adapter": 1, "scale": 1, "items": 2, "damage": 1, "base": 2, "shots": 2, "batch": 2, "seed": 2, "content": 2,
    "nothing": 0,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_asked_again(items, tmp_path, monkeypatch, change):  # noqa: F811
    asked, tuned = runs_of(monkeypatch), model()
    both(make_suite({"arc_easy": {}}, prompts=0), tuned, tmp_path)
    asked.clear()
    if change == "adapter":
        with torch.no_grad():
            next(p for name, p in tuned.named_parameters() if "lora_B" in name)[0, 0] += 1e-3
    if change == "damage":
        (tmp_path / "tuned" / "arc_easy.json").write_text("{")
    if change == "base":
        with torch.no_grad():
            tuned.get_base_model().get_input_embeddings().weight[5, 0] += 1e-3
    if change == "scale":
        for module in tuned.modules():
            if isinstance(module, BaseTunerLayer):
                module.scaling["default"] *= 2
    if change == "content":
        path = items / "arc-easy" / "test.jsonl"
        path.write_text(path.read_text().replace("What is cat", "What is a cat"))
    own = {"items": {"items": 5}, "shots": {"shots": 0}}.get(change, {})
    shared = {"batch": {"tokens_per_batch": 64}, "seed": {"seed": 3}}.get(change, {})
    both(make_suite({"arc_easy": own}, prompts=0, **shared), tuned, tmp_path)
    assert asked == ["arc_easy"] * CHANGES[change]


@pytest.mark.parametrize("change", ["arguments", "template"])
def test_another_chat_format_is_asked_again(items, tmp_path, monkeypatch, change):  # noqa: F811
    template = "{% if loud %}{{ 'LOUD ' }}{% endif %}" + tiny_tokenizer().chat_template
    asked, tuned = runs_of(monkeypatch), model()
    both(make_suite({"ifeval": {"max_new_tokens": 3}}, chat_template=template), tuned, tmp_path)
    asked.clear()
    other = {"template_arguments": {"loud": True}, "chat_template": template} if change == "arguments" else {}
    both(make_suite({"ifeval": {"max_new_tokens": 3}}, **other), tuned, tmp_path)
    assert asked == ["ifeval", "ifeval"]


def test_levels_do_not_push_each_other_out(items, tmp_path, monkeypatch):  # noqa: F811
    asked, base = runs_of(monkeypatch), tiny_model(vocab_size=TOKENIZER_VOCAB)
    for settings in ({"items": 3}, {}, {"items": 3}, {}):
        make_suite({"arc_easy": settings}, prompts=0).score(base, base_store(base), "base")
    assert asked == ["arc_easy", "arc_easy"]


@pytest.mark.parametrize("setting", [{"prompts": -3}, {"max_new_tokens": 0}])
def test_wrong_style_settings(setting):
    with pytest.raises(UserError, match=f"evaluation.style.{next(iter(setting))}="):
        StyleConfig(**setting)


def test_base_alone(items, tmp_path):  # noqa: F811
    suite, base = make_suite(), tiny_model(vocab_size=TOKENIZER_VOCAB)
    found = suite.compared(suite.score(base, base_store(base), "base"), None)
    assert set(found.benchmarks["arc_easy"]["acc"]) == {"base", "at_floor", "main"}
    assert found.mean == {}
    assert set(found.style[STYLE]["words"]) == {"base"}


def test_style_without_a_chat_template_is_refused(items):  # noqa: F811
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    suite = Suite(RetentionConfig(), StyleConfig(2), tokenizer, progress=False)
    base = tiny_model(vocab_size=TOKENIZER_VOCAB)
    with pytest.raises(UserError, match=r"style\.prompts=0"):
        suite.score(base, base_store(base), "base")


def test_another_backend_is_asked_instead(items):  # noqa: F811
    seen = []

    class Lm:
        rank, world_size, chat = 0, 1, None

        def loglikelihood(self, requests):
            seen.append(len(requests))
            return [(-float(i % 3), False) for i in range(len(requests))]

    suite = Suite(
        RetentionConfig({"arc_easy": {}}), StyleConfig(), tiny_tokenizer(), progress=False, make_lm=lambda which: Lm()
    )
    base = tiny_model(vocab_size=TOKENIZER_VOCAB)
    scores = suite.score(base, base_store(base), "base")["arc_easy"]
    assert seen == [24]
    assert [item.values["acc"] for item in scores.items] == [float(item.target == 0) for item in scores.items]
