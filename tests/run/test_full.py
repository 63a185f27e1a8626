"""Full fine-tuning as whole runs: what is saved, resumed, scored and refused."""

import csv
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from selfaug.run.identity import config_hash, register_resolvers
from tests.evaluation.retention.tiny_items import items  # noqa: F401
from tests.run import conftest
from tests.run.conftest import UNSCORED, Runs
from tests.run.test_cache import disk, entries, passes
from tests.run.test_errors import refused
from tests.run.test_evaluate import results, scored
from tests.run.test_resume import metrics, stop
from tests.run.test_same import relative_error
from tests.run.warm import Warm
from tests.tiny import save_tiny

SFT = ("method=sft", "trainer.max_steps=5", "optimizer.lr=1e-3")
# SelfAug on all weights but the head; a reference has to be chosen with it. Two epochs of 5 steps over 17 examples,
# validation within them.
ALIGNED = ("adapter=full", "adapter.freeze=head", "optimizer.lr=1e-3", "data.source.test_share=0.6",
           "data.limit_train=17", "trainer.max_epochs=2", "trainer.val_check_interval=3")  # fmt: skip
STEPS = 10
COPY = "reference=frozen_copy"
EVERY = "callbacks.checkpoint_every_n_steps=4"


class WithoutRank(Runs):
    """Not every adapter has a rank."""

    def overrides(self) -> list[str]:
        return [one for one in super().overrides() if not one.startswith("adapter.")]


@pytest.fixture(scope="module")
def workspace(workspace: Runs) -> Runs:
    own = object.__new__(WithoutRank)
    own.path, own.runs = workspace.path, workspace.runs
    return own


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model" / "model.safetensors")


def column(directory: Path, name: str) -> list[float]:
    with (directory / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.fixture(scope="module")
def sft(workspace: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace.into(tmp_path_factory.mktemp("sft")).done(*SFT, "callbacks.checkpoint_every_n_steps=2")


@pytest.fixture(scope="module")
def aligned(workspace: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = workspace.into(tmp_path_factory.mktemp("aligned")).done(*ALIGNED, COPY)
    assert len(column(directory, "train/kl")) == STEPS
    assert len(column(directory, "val/kl")) == 2
    return directory


@pytest.fixture(scope="module")
def cached(workspace: Runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same with the cache, and the cache."""
    place = tmp_path_factory.mktemp("cached")
    return workspace.into(place / "runs").done(*ALIGNED, *disk(place / "cache")), place / "cache"


@pytest.fixture(scope="module")
def unaligned(workspace: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace.into(tmp_path_factory.mktemp("unaligned")).done(*ALIGNED, "alignment=none")


# --- what is saved ----------------------------------------------------------------------------------------------------


def test_a_whole_model_is_saved_and_loads_with_its_tokenizer(sft: Path, workspace: Runs):
    assert not (sft / "adapter").exists()
    assert not list(sft.glob(".model*"))
    model = AutoModelForCausalLM.from_pretrained(sft / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(sft / "model")
    assert tokenizer("the cat")["input_ids"] == AutoTokenizer.from_pretrained(workspace.path / "model")(
        "the cat"
    )["input_ids"]  # fmt: skip
    before = load_file(workspace.path / "model" / "model.safetensors")
    assert weights(sft).keys() == before.keys()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in weights(sft).items())
    assert all(torch.equal(p, weights(sft)[name]) for name, p in model.named_parameters())


def test_it_is_scored_against_the_base_model(sft: Path):
    found = json.loads((sft / "results.json").read_text())
    assert found["task"]["exact_match"]["tuned"]["n"] == 2
    for corpus in ("wikipedia", "dialogues"):
        assert found["drift"][corpus]["kl_base_tuned"]["tuned"]["mean"] > 1e-4
    assert len(found["token_kl"]["kl"]) > 10
    assert max(value or 0 for value in found["token_kl"]["kl"]) > 0
    assert found["config"]["adapter"]["_target_"].endswith("FullFineTuning")
    plan = json.loads((sft / "fit.json").read_text())["memory_plan"]
    size = sum(tensor.nbytes for tensor in weights(sft).values())
    assert (plan["adapters_bytes"], plan["optimiser_bytes"], plan["gradients_bytes"]) == (size, 2 * size, size)


def test_a_tied_head_stays_tied(runs: Runs, tmp_path: Path):
    folder = save_tiny(tmp_path / "tied", "qwen2")
    directory = runs.done(*SFT, "trainer.max_steps=1", *UNSCORED, f"model.name={folder}")
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "lm_head.weight" not in weights(directory)
    name = "model.embed_tokens.weight"
    assert not torch.equal(weights(directory)[name], load_file(folder / "model.safetensors")[name])


def test_the_model_is_whole_or_not_there(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    save = PreTrainedModel.save_pretrained

    def interrupted(self, directory, **settings):
        save(self, directory, **settings)
        raise RuntimeError("interrupted")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", interrupted)
    setting = (*SFT, "trainer.max_steps=1", *UNSCORED)
    assert runs.inline(*setting).returncode == 1
    assert list(runs.only().glob(".model*"))
    assert not (runs.only() / "model").exists()
    monkeypatch.undo()
    assert runs.inline(*setting).returncode == 0
    assert (runs.only() / "model" / "config.json").is_file()
    assert not list(runs.only().glob(".model*"))


def test_checkpoints_hold_what_trains(runs: Runs):
    directory = runs.done(*SFT, *UNSCORED, "adapter.freeze=[embeddings,head,0]", "callbacks.checkpoint_every_n_steps=5")
    state = torch.load(directory / "checkpoints" / "step-5.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".layers.")[-1].split(".")[0] for name in state if "layers" in name} == {"1"}
    assert not any("embed" in name or "head" in name for name in state)
    before = load_file(runs.path / "model" / "model.safetensors")
    moved = {name for name, tensor in weights(directory).items() if not torch.equal(tensor, before[name])}
    assert moved == {name.removeprefix("model.") for name in state}


# --- equal where they must be equal -----------------------------------------------------------------------------------


def test_alpha_0_gives_the_weights_of_no_terms_bit_for_bit(unaligned: Path, runs: Runs):
    zero = runs.done(*ALIGNED, *UNSCORED, COPY, "alignment.alpha=0")
    assert column(zero, "train/kl")[-1] > 0  # measured all the same
    assert all(torch.equal(tensor, weights(unaligned)[name]) for name, tensor in weights(zero).items())


def test_nothing_frozen_is_full_fine_tuning(sft: Path, runs: Runs):
    directory = runs.done("method=freeze", *SFT[1:], *UNSCORED, "adapter.freeze=[]")
    assert all(torch.equal(tensor, weights(directory)[name]) for name, tensor in weights(sft).items())


def test_alignment_holds_the_weights_back(aligned: Path, unaligned: Path):
    assert column(aligned, "train/kl")[0] == 0  # the copy is the base model, bit for bit
    drift = [
        json.loads((run / "results.json").read_text())["drift"]["wikipedia"]["kl_base_tuned"]["tuned"]["mean"]
        for run in (aligned, unaligned)
    ]
    assert 0 < drift[0] < drift[1]


def test_the_cache_gives_what_the_copy_gives(aligned: Path, cached: tuple[Path, Path]):
    assert relative_error(weights(cached[0]), weights(aligned)) < 1e-5
    assert column(cached[0], "train/kl") == pytest.approx(column(aligned, "train/kl"), rel=1e-2, abs=1e-6)


def test_under_mixed_precision_the_weights_are_float32_and_the_base_is_exact(runs: Runs):
    directory = runs.done(
        *ALIGNED, *UNSCORED, COPY, "trainer.precision=bf16-mixed", "optimizer.lr=1e-5", "trainer.max_steps=5"
    )
    assert column(directory, "train/kl")[0] == 0
    assert {tensor.dtype for tensor in weights(directory).values()} == {torch.float32}
    before = load_file(runs.path / "model" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    steps = (weights(directory)[name] - before[name]).abs()
    assert 0 < steps.max() < 1e-4  # updates that bfloat16 would have rounded away
    assert (steps > 0).float().mean() > 0.9


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_equal_one(aligned: Path, runs: Runs, strategy: str, tmp_path: Path):
    """With the cache: of a sharded model no process could hold a copy. One has more examples to fill it with."""
    directory = runs.done(*ALIGNED, *UNSCORED, f"trainer={strategy}", *disk(tmp_path / "cache"))
    assert len(entries(tmp_path / "cache")) == 17 + 2
    assert relative_error(weights(aligned), weights(directory)) < 1e-4
    assert column(directory, "train/kl") == pytest.approx(column(aligned, "train/kl"), rel=1e-2, abs=1e-6)


def test_two_processes_train_the_head_too(sft: Path, runs: Runs):
    assert relative_error(weights(sft), weights(runs.done(*SFT, *UNSCORED, "trainer=ddp"))) < 1e-4


# --- killed and resumed -----------------------------------------------------------------------------------------------


def same(one: Path, other: Path) -> None:
    assert (one / "model/model.safetensors").read_bytes() == (other / "model/model.safetensors").read_bytes()
    assert metrics(one) == metrics(other)
    scores = [json.loads((run / "results.json").read_text()) for run in (one, other)]
    assert all(scores[0][name] == scores[1][name] for name in ("task", "drift", "data", "samples", "token_kl"))


def test_killed_and_resumed_is_never_killed(cached: tuple[Path, Path], runs: Runs, tmp_path: Path):
    setting = (*ALIGNED, EVERY, *disk(tmp_path / "cache"))
    assert stop(runs, 4, signal.SIGKILL, *setting).returncode == -signal.SIGKILL
    assert len(entries(tmp_path / "cache")) == len(entries(cached[1]))  # all before the first step
    with passes() as keys:
        result = runs.inline(*setting)
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stdout
    assert keys == []  # the weights have trained: nothing could be computed any more
    same(runs.only(), cached[0])


def test_sharded_too(aligned: Path, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    workers: list[Warm] = []

    class Stopped(Warm):
        """The processes get the signal once a checkpoint is there, as the command would pass it on to them."""

        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            workers.append(self)

        def poll(self) -> int | None:
            if len(workers) == 2 and list(runs.runs.glob("*/checkpoints/step-*.ckpt")):
                both = [*workers]
                workers.clear()
                for worker in both:
                    worker.send_signal(signal.SIGTERM)
            return super().poll()

    setting = (*ALIGNED, *UNSCORED, EVERY, "trainer=fsdp", *disk(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(conftest, "Warm", Stopped)
        assert runs.inline(*setting).returncode == 143
    assert not (runs.only() / "model").exists()
    result = runs.inline(*setting)
    assert result.returncode == 0, result.stderr
    assert relative_error(weights(aligned), weights(runs.only())) < 1e-4


def test_with_a_copy_too(aligned: Path, runs: Runs):
    setting = (*ALIGNED, COPY, EVERY)
    assert stop(runs, 4, signal.SIGKILL, *setting).returncode == -signal.SIGKILL
    result = runs.inline(*setting)
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stdout
    same(runs.only(), aligned)


def test_a_cache_in_memory_cannot_be_resumed_and_says_so(runs: Runs):
    setting = (*ALIGNED, EVERY, "reference.cache=memory")
    assert stop(runs, 4, signal.SIGKILL, *setting).returncode == -signal.SIGKILL
    refused(runs.inline(*setting), "base weights have been trained", "reference.cache=disk")


# --- scored later -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["run", "model", "checkpoint"])
def test_it_is_a_target_of_evaluate(sft: Path, runs: Runs, items, kind: str):  # noqa: F811
    target = {"run": sft, "model": sft / "model", "checkpoint": sft / "checkpoints/step-4.ckpt"}[kind]
    done = scored(runs, f"target={target}")
    assert done.returncode == 0, done.stderr
    found = results(runs)
    assert found["retention"]["arc_easy"]["acc"]["difference"]["n"] == 4
    assert found["task"]["exact_match"]["tuned"]["n"] == 2
    assert {"wikipedia", "dialogues", "own answers to ifeval"} <= set(found["drift"])
    if kind == "run":
        trained = json.loads((sft / "results.json").read_text())
        assert found["drift"]["wikipedia"] == trained["drift"]["wikipedia"]


def test_a_run_without_a_model_yet_is_refused(sft: Path, runs: Runs, items, tmp_path: Path):  # noqa: F811
    copy = shutil.copytree(sft, tmp_path / "copy", ignore=shutil.ignore_patterns("model"))
    refused(scored(runs, f"target={copy}"), "without an adapter or a model", "checkpoints")


# --- adapters that switching off does not undo ------------------------------------------------------------------------


def test_an_adapter_that_rewrites_the_base_is_scored_beside_it(runs: Runs, items):  # noqa: F811
    directory = runs.done("method=lora", "adapter=pissa", "trainer.max_steps=2", "adapter.r=4")
    found = json.loads((directory / "results.json").read_text())
    assert found["drift"]["wikipedia"]["kl_base_tuned"]["tuned"]["mean"] > 0
    done = scored(runs.into(runs.runs / "later"), f"target={directory}")
    assert done.returncode == 0, done.stderr
    later = results(runs.into(runs.runs / "later"))
    assert later["drift"]["wikipedia"] == found["drift"]["wikipedia"]
    refused(runs.inline("adapter=pissa", "adapter.r=4"), "rewrites the base weights", "reference=frozen_copy")
    aligned = runs.into(runs.runs / "aligned").done(
        "adapter=pissa", "adapter.r=4", "trainer.max_steps=1", *UNSCORED, COPY
    )
    assert column(aligned, "train/kl")[0] < 1e-4


def test_an_adapter_of_another_kind_is_trained_and_scored(runs: Runs):
    directory = runs.done("adapter=oft", "adapter.oft_block_size=16", "trainer.max_steps=3")
    assert column(directory, "train/kl")[0] == 0
    assert column(directory, "train/kl")[-1] > 0
    found = json.loads((directory / "results.json").read_text())
    assert found["drift"]["wikipedia"]["kl_base_tuned"]["tuned"]["mean"] > 0


# --- refused, in a sentence -------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_one_sentence(runs: Runs):
    steps = "trainer.max_steps=2"
    result = runs.inline("adapter=full", steps)
    refused(result, "no adapters that could be switched off", "reference=frozen_copy")
    assert "1e-5 is usual" in result.stdout  # the learning rate is LoRA's still
    refused(runs.inline("adapter=full", COPY, steps), "The output head trains", "adapter.freeze=head")
    refused(runs.inline(*ALIGNED, COPY, "reference.cache=disk"), "reference.frozen_copy=true and reference.cache=disk")
    refused(runs.inline(*ALIGNED, COPY, "reference.device=gpu"), "reference.device=gpu is no device")
    refused(runs.inline(*SFT, "trainer.precision=bf16-true"), "adapter=full", "bf16-mixed")
    refused(runs.inline(*SFT, "adapter.freeze=q_porj"), "adapter.freeze", "fits q_porj")
    refused(
        runs.inline(*SFT, "callbacks=retention_probe", "callbacks.retention_probe.ifeval_items=0"),
        "callbacks=retention_probe",
        "reference=frozen_copy",
    )
    refused(runs.inline("adapter=lora", "+adapter.init_lora_weights=eva"), "init_lora_weights=eva needs")


def test_fsdp_does_not_train_the_head(runs: Runs):
    refused(runs.inline(*SFT, "trainer=fsdp"), "The output head trains", "adapter.freeze=head", "trainer=ddp")


def test_the_probe_measures_against_the_copy(runs: Runs):
    directory = runs.done(
        *SFT, COPY, "callbacks=retention_probe", "callbacks.retention_probe.every_n_steps=2",
        "callbacks.retention_probe.ifeval_items=0",
    )  # fmt: skip
    drift = column(directory, "probe/drift_wikipedia")
    assert drift[0] == 0
    assert len(drift) >= 3
    assert drift[-1] > 0


# --- the name of a run ------------------------------------------------------------------------------------------------


def test_a_copy_does_not_change_the_name_of_a_run():
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_module("selfaug.conf", version_base="1.3"):
        names = {
            config_hash(compose("train", overrides=[*one])) for one in ((), (COPY,), (COPY, "reference.device=cpu"))
        }
    GlobalHydra.instance().clear()
    assert len(names) == 1
