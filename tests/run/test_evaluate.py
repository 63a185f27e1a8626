"""python -m selfaug.evaluate: every kind of target, and the wrong ones."""

import importlib.util
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from transformers import AutoModelForCausalLM

from selfaug import evaluate, train
from selfaug.errors import UserError
from selfaug.run.identity import register_resolvers
from tests.evaluation.retention.tiny_items import items  # noqa: F401
from tests.run.conftest import Runs
from tests.run.test_errors import refused
from tests.tiny import save_tiny

SMALL = ("evaluation=quick", "evaluation.retention.benchmarks={ifeval: {items: 3, max_new_tokens: 4}, arc_easy: "
         "{items: 4}, hellaswag: null, piqa: null, lambada: null}", "evaluation.style.prompts=2",
         "evaluation.style.max_new_tokens=4")  # fmt: skip


def scored(runs: Runs, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As `python -m selfaug.evaluate` would, in this process."""
    known = ("model", "data.path", "data=", "evaluation", "trainer", "progress", "data.source", "data.prompt")
    shared = [one for one in runs.overrides() if one.startswith(known) and one != "evaluation=task"]
    with mock.patch.object(train, "main", evaluate.main), mock.patch.object(runs, "overrides", list):
        return runs.inline(*shared, *SMALL, *arguments)


def results(runs: Runs) -> dict:
    (file,) = runs.runs.glob("evaluate-*/results.json")
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def finished(workspace: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an adapter that has learned something, and its checkpoint."""
    return workspace.into(tmp_path_factory.mktemp("run")).done(
        "trainer.max_steps=4", "optimizer.lr=0.05", "callbacks.checkpoint_every_n_steps=4"
    )


def test_a_run_its_adapter_and_its_checkpoint_are_the_same_model(finished: Path, runs: Runs, items):  # noqa: F811
    outputs = []
    for number, target in enumerate((finished, finished / "adapter", finished / "checkpoints/step-4.ckpt")):
        own = runs.into(runs.runs / str(number))
        done = scored(own, f"target={target}")
        assert done.returncode == 0, done.stderr
        found = results(own)
        assert set(found["retention"]) == {"ifeval", "arc_easy"}
        assert found["retention"]["arc_easy"]["acc"]["difference"]["n"] == 4
        assert found["task"]["exact_match"]["tuned"]["n"] == 2
        assert found["drift"]["wikipedia"]["kl_base_tuned"]["tuned"]["mean"] > 0
        assert set(found["style"]) == {"ifeval", "instructions"}
        assert "What was kept" in done.stdout
        (folder,) = own.runs.glob("evaluate-*/evaluation")
        names = {"ifeval.json", "arc_easy.json", "instructions.json", "task.json"}
        assert {path.name for side in ("base", "tuned") for path in (folder / side).iterdir()} == names
        items_of = json.loads((folder / "tuned" / "arc_easy.json").read_text())["items"]
        outputs.append([item["output"] for item in items_of])
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_merged_model(finished: Path, runs: Runs, items, tmp_path: Path):  # noqa: F811
    base = AutoModelForCausalLM.from_pretrained(runs.path / "model", dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, str(finished / "adapter")).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    done = scored(runs, f"target={tmp_path / 'merged'}")
    assert done.returncode == 0, done.stderr
    found = results(runs)
    trained = json.loads((finished / "results.json").read_text())["drift"]
    for corpus in ("wikipedia", "dialogues"):  # two models here, one with an adapter there
        mean = found["drift"][corpus]["kl_base_tuned"]["tuned"]["mean"]
        assert mean == pytest.approx(trained[corpus]["kl_base_tuned"]["tuned"]["mean"], rel=1e-3)
    assert found["retention"]["arc_easy"]["acc"]["tuned"]["n"] == 4


def test_baseline(runs: Runs, items):  # noqa: F811
    done = scored(runs, "baseline")
    assert done.returncode == 0, done.stderr
    found = results(runs)
    assert "tuned" not in found["retention"]["ifeval"]["prompt_strict"]
    assert "tuned" not in found["task"]["f1"]


def test_a_training_run_is_scored_with_the_benchmarks(runs: Runs, items):  # noqa: F811
    directory = runs.done("trainer.max_steps=2", *SMALL)
    found = json.loads((directory / "results.json").read_text())
    assert set(found["retention"]) == {"ifeval", "arc_easy"}
    assert "own answers to ifeval" in found["drift"]
    assert (directory / "evaluation/base/ifeval.json").is_file()


def test_nothing_is_measured_where_nothing_is_asked(runs: Runs):
    shared = [one for one in runs.overrides() if not one.startswith("evaluation")]
    with mock.patch.object(runs, "overrides", return_value=shared):
        directory = runs.done("trainer.max_steps=2", "evaluation=none")
    found = json.loads((directory / "results.json").read_text())
    assert (found["task"], found["drift"], found["retention"]) == ({}, {}, {})


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), ("target",)),
        (("target=nowhere/at/all",), ("target=nowhere/at/all", "does not exist")),
        (("target=nowhere.ckpt",), ("target=nowhere.ckpt", "does not exist")),
        (
            ("baseline", *(f"evaluation.{part}=null" for part in ("rag", "drift", "retention", "style"))),
            ("evaluation=none", "quick"),
        ),
        (("baseline", "evaluation.retention.backend=vllm"), ("backend=vllm", "pip install vllm")),
        (("baseline", "evaluation.retention.benchmarks.arc_easy.items=-1"), ("arc_easy.items=-1",)),
    ],
)
def test_wrong_targets(runs: Runs, items, arguments: tuple[str, ...], parts: tuple[str, ...]):  # noqa: F811
    refused(scored(runs, *arguments), *parts)


def test_vllm_gets_the_model_and_the_adapter(finished: Path, runs: Runs, items, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    """vLLM itself needs a GPU: a stand-in with its class's name says what it was given."""
    given: list[dict] = []

    class VLLM:
        rank, world_size, tokenizer_name = 0, 1, ""

        def __init__(self, **settings):
            given.append(settings)

        def loglikelihood(self, requests):
            return [(-float(i), False) for i in range(len(requests))]

    module = types.ModuleType("lm_eval.models.vllm_causallms")
    module.VLLM = VLLM
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, find=importlib.util.find_spec: name == "vllm" or find(name)
    )
    done = scored(
        runs, f"target={finished}", "evaluation.retention.backend=vllm", "evaluation.retention.benchmarks.ifeval=null",
        "evaluation.style.prompts=null",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [Path(settings["pretrained"]).name for settings in given] == ["model", "model"]
    assert [settings.get("lora_local_path") for settings in given] == [None, str(finished / "adapter")]
    assert [settings.get("max_lora_rank") for settings in given] == [None, 4]
    assert not any(settings["trust_remote_code"] for settings in given)


def test_an_adapter_of_another_model_is_refused(finished: Path, runs: Runs, items, tmp_path: Path):  # noqa: F811
    other = save_tiny(tmp_path / "other", layers=3, hidden_size=64)
    refused(
        scored(runs, f"target={finished / 'adapter'}", f"model.name={other}"),
        "was not trained on model.name",
        "set model",
    )


def test_a_model_of_another_vocabulary_is_refused(runs: Runs, items, tmp_path: Path):  # noqa: F811
    other = save_tiny(tmp_path / "other", vocab_size=400)
    refused(scored(runs, f"target={other}"), "vocabulary of 400", "set model")


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("selfaug.conf", version_base="1.3"):
        return compose("evaluate", overrides=list(overrides))


@pytest.fixture
def saved_run(tmp_path: Path) -> Path:
    register_resolvers()
    OmegaConf.save(
        OmegaConf.create(
            {"model": {"name": "mine", "dtype": "auto"}, "data": {"path": "old", "source": {"path": "old"}},
             "trainer": {"precision": "32-true"}, "seed": 7, "method": {"name": "lora"}}
        ),
        tmp_path / "config.yaml",
    )  # fmt: skip
    (tmp_path / "run.json").write_text("{}")
    return tmp_path


def test_the_run_s_settings_are_taken_over_and_the_command_line_wins(saved_run: Path):
    override = "model.dtype=float32"
    merged = evaluate.with_settings_of_run(composed(f"target={saved_run}", override), [], [override])
    assert (merged.model.name, merged.model.dtype, merged.seed, merged.method.name) == ("mine", "float32", 7, "lora")
    assert merged.data.source.path == "old"
    chosen = evaluate.with_settings_of_run(composed(f"target={saved_run}", "data=jsonl"), ["data"], ["data=jsonl"])
    assert chosen.data.name == "jsonl"
    assert chosen.model.name == "mine"


def test_the_seed_of_the_command_line_wins(saved_run: Path):
    overrides = [f"target={saved_run}", "seed=5"]
    assert evaluate.with_settings_of_run(composed(*overrides), [], overrides).seed == 5


def test_a_setting_that_no_longer_counts_is_refused(saved_run: Path):
    config = composed(f"target={saved_run}", "data=jsonl", "data.path=new")
    with pytest.raises(UserError, match=r"data\.source\.path"):
        evaluate.with_settings_of_run(config, [], ["data.path=new"])


def test_an_unfinished_run_is_refused(finished: Path, runs: Runs, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "adapter")
    refused(scored(runs, f"target={copy}"), "without an adapter or a model", "checkpoints")


def test_the_module_runs(runs: Runs):
    help_text = subprocess.run(
        [sys.executable, "-m", "selfaug.evaluate", "--help"], capture_output=True, text=True, check=True,
        cwd=runs.path, env=runs.environment(),
    ).stdout  # fmt: skip
    assert "target" in help_text
