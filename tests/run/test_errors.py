"""What a user can do wrong ends in one sentence that names the setting and the fix, and loses nothing."""

import contextlib
import os
import resource
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch

from selfaug.assets import registry
from selfaug.objective import Objective
from tests.run.conftest import UNSCORED, Runs
from tests.run.test_resume import adapter
from tests.workspace import write_lines


def refused(result: subprocess.CompletedProcess[str], *parts: str) -> str:
    """The one sentence of a command that failed; each of `parts` is in it."""
    assert result.returncode != 0
    lines = result.stderr.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("selfaug: ")]
    assert len(starts) == 1, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    sentence = "\n".join(lines[starts[0] :])  # a list of bad lines goes on below it
    for part in parts:
        assert part in sentence, sentence
    return sentence


STEPS = "trainer.max_steps=2"
WORKS = ("trainer.max_steps=1", *UNSCORED)  # a run that must only work


def data_file(path: Path, *changed: dict) -> str:
    """60 good questions and then the changed ones; the override that names the file."""
    rows = [
        {"id": f"q{i}", "question": f"Where is Ada {i}?", "answers": ["Bonn"], "documents": [_gold(i)]}
        for i in range(60)
    ]
    write_lines(path, rows + [{**rows[0], **change} for change in changed])
    return f"data.path={path}"


def _gold(i: int) -> dict:
    return {"text": f"Ada {i} is in Bonn, and has been there for a long time, as everybody knows.", "gold": True}


# Data


def test_broken_lines_are_all_named_and_the_mended_file_works(runs: Runs, tmp_path: Path):
    path = tmp_path / "mine.jsonl"
    setting = data_file(path)
    good = path.read_text()
    lines = good.splitlines()
    lines[4] = lines[4][:-5]
    lines[17] = "not JSON at all"
    path.write_text("\n".join(lines) + "\n")
    refused(runs.inline(STEPS, setting), "2 bad lines", f"{path}:5:", f"{path}:18:")
    path.write_text(good)
    assert runs.inline(*WORKS, setting).returncode == 0


@pytest.mark.parametrize("answers", [[""], [], "  "])
def test_empty_answer(runs: Runs, tmp_path: Path, answers):
    setting = data_file(tmp_path / "mine.jsonl", {"answers": answers})
    refused(runs.inline(STEPS, setting), f"{tmp_path / 'mine.jsonl'}:61:", "answer")


def test_question_longer_than_the_budget(runs: Runs, tmp_path: Path):
    setting = data_file(tmp_path / "mine.jsonl", {"id": "epic", "question": "Where, oh where, is Ada? " * 100})
    refused(runs.inline(STEPS, setting, "data.prompt.on_too_long=error"), "epic", "data.prompt.max_tokens")
    result = runs.inline(*WORKS, setting, "data.prompt.on_too_long=drop")
    assert result.returncode == 0
    assert "1 examples were dropped" in result.stdout


def test_data_file_that_is_not_there(runs: Runs):
    refused(runs.inline("data.path=nowhere.jsonl"), "data.path=nowhere.jsonl", "does not exist")


def test_missing_data_path(runs: Runs):
    refused(runs.inline("data.path=???"), "data.path is not set", "data.path=...")


# Settings


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optimizer.lrr=1", ("optimizer.lrr", "did you mean optimizer.lr")),
        ("sed=1", ("sed", "did you mean seed")),
        ("alignment.alpha=-1", ("alpha", "-1")),
        ("alignment.divergence=jeffreys", ("divergence", "kl_base_tuned")),
        ("alignment.position=middle", ("position", "input_logits")),
        ("+optimizer.lrr=1", ("optimizer", "lrr")),
        ("+adapter.rank=1", ("adapter", "rank")),
        ("+trainer.max_step=1", ("trainer", "max_step")),
        ("optimizer.lr=-1", ("optimizer.lr=-1", "positive")),
        ("optimizer.lr=high", ("optimizer.lr",)),
        ("trainer.precision=8-true", ("trainer.precision=8-true", "32-true")),
        ("trainer.devices=0", ("trainer.devices=0",)),
        ("data.batch_size=0", ("data.batch_size=0", "at least 1")),
        ("data.source.test_share=0.99", ("test_share",)),
        ("adapter.target_modules=[nothing]", ("adapter.target_modules",)),
        ("model=foo", ("model=foo", "smollm2_135m", "local")),
        ("experiment=foo", ("experiment=foo", "demo")),
        ("data=foo", ("data=foo", "squad", "jsonl")),
        ("method=foo", ("method=foo", "sa_sft", "--config-dir")),
        ("~method.name", ("method.name is not set", "correct its name")),
        ("data.mixture.mine.ration=1", ("There is no setting data.mixture.mine; to add it",)),
        ("seed=", ("seed",)),
        ("seed", ("seed",)),
        ("model.name=nowhere/at/all", ("model.name=nowhere/at/all", "does not exist")),
        ("model.name=./nowhere", ("model.name=./nowhere", "does not exist")),
        ("model.name=owner/name", ("model.name=owner/name", "hub", "network")),
        ("model.name=cache", ("model.name=cache", "config.json")),
        ("method=output_kl alignment.alpha=0.1", ("alignment.alpha=0.1", "method=output_kl", "method.terms.kl.alpha")),
        ("method=replay data.mixture.replay.nll=false", ("data.mixture.replay.nll=false", "source: replay")),
        ("ckpt_path=nowhere.ckpt", ("ckpt_path=nowhere.ckpt", "auto")),
        ("evaluation.drift.corpora.wikipedia.path=nowhere.jsonl", ("nowhere.jsonl",)),
    ],
)
def test_wrong_setting(runs: Runs, override: str, parts: tuple[str, ...]):
    (runs.path / "cache").mkdir(exist_ok=True)
    refused(runs.inline(STEPS, *override.split()), *parts)


@pytest.mark.parametrize("override", ["alignment.alpha=-1", "data.path=nowhere.jsonl"])
def test_what_is_refused_before_its_start_leaves_no_directory(runs: Runs, override: str):
    refused(runs.inline(STEPS, override))
    assert [path.name for path in runs.runs.iterdir()] == []


def test_what_was_started_stays_when_it_is_refused(runs: Runs):
    started = runs.runs / "mine"
    started.mkdir(parents=True)
    (started / "run.json").write_text('{"data_fingerprint": "another", "precision": "32-true"}')
    refused(runs.inline(STEPS, f"hydra.run.dir={started}"), "The data has changed")
    assert {"run.json", "train.log"} <= {path.name for path in started.iterdir()}


@pytest.mark.parametrize(("other", "off"), [("data.packing=true", "data.packing=false"),
                                            ("reference.cache=memory", "reference.cache=off")])  # fmt: skip
def test_padding_that_counts_must_be_there(runs: Runs, other: str, off: str):
    refused(runs.inline(STEPS, "alignment.official=true", other), "alignment.official=true", off)


def test_one_sentence_from_a_process_of_its_own(runs: Runs):
    result = runs.train("sed=1")
    refused(result, "sed")
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
    assert result.returncode == 1


@pytest.mark.parametrize("override", ["sed=1", "alignment.alpha=-1"])
def test_traceback_on_demand(runs: Runs, override: str):
    result = runs.inline(override, "debug=traceback")
    assert result.returncode != 0
    assert "Traceback" in result.stderr
    assert override.partition("=")[0].rpartition(".")[2] in result.stderr.splitlines()[-1]


# Disk


@contextlib.contextmanager
def full_disk(bytes_per_file: int):
    """Every file that grows beyond this size fails as on a full disk (EFBIG), whatever library writes it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_per_file, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def poisoned(call: int):
    """The loss of the n-th forward pass of training is not a number."""
    objective, calls = Objective.__call__, 0

    def stumble(self, *arguments, **named):
        nonlocal calls
        calls += 1
        losses = objective(self, *arguments, **named)
        return type(losses)(losses.loss * float("nan"), losses.parts) if calls == call else losses

    with mock.patch.object(Objective, "__call__", stumble):
        yield


SHORT = (*UNSCORED, "trainer.max_steps=4", "data.micro_batch_size=4",
         "callbacks.checkpoint_every_n_steps=2")  # fmt: skip


@pytest.fixture(scope="module")
def whole(workspace: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run to which nothing happens."""
    return workspace.into(tmp_path_factory.mktemp("whole")).done(*SHORT)


@pytest.fixture(scope="module")
def stumbled(workspace: Runs, tmp_path_factory: pytest.TempPathFactory):
    """A run whose fourth step has a loss that is not finite."""
    runs = workspace.into(tmp_path_factory.mktemp("stumbled"))
    with poisoned(call=4):
        result = runs.inline(*SHORT)
    return runs.only(), result


def test_loss_that_is_not_finite(stumbled, whole: Path, runs: Runs):
    left, result = stumbled
    sentence = refused(result, "not finite", "optimizer.lr", "checkpoint is kept")
    assert sentence.count(" q") == 4  # the examples of the step
    (path,) = (left / "checkpoints").glob("*.ckpt")
    assert path.name == "step-2.ckpt"
    assert all(value.isfinite().all() for value in torch.load(path, weights_only=True)["state_dict"].values())
    assert not (left / "adapter").exists()
    directory = Path(shutil.copytree(left, runs.runs / left.name))
    assert runs.inline(*SHORT).returncode == 0  # it was not the configuration's fault
    assert adapter(directory) == adapter(whole)


def test_learning_rate_that_blows_up(runs: Runs):
    result = runs.inline(*SHORT, "optimizer.lr=1e30", "optimizer.warmup_ratio=0", "optimizer.max_grad_norm=null")
    refused(result, "not finite", "optimizer.lr")
    assert not (runs.only() / "results.json").exists()


def test_disk_full_while_a_checkpoint_is_saved(stumbled, whole: Path, runs: Runs):
    left, _ = stumbled
    directory = Path(shutil.copytree(left, runs.runs / left.name))
    (path,) = (directory / "checkpoints").glob("*.ckpt")
    before = path.read_bytes()
    with full_disk(len(before) // 2):
        refused(runs.inline(*SHORT), "disk is full", "paths.runs_dir", "goes on")
    assert path.read_bytes() == before
    assert [p for p in (directory / "checkpoints").iterdir() if p.suffix == ".ckpt"] == [path]
    assert runs.inline(*SHORT).returncode == 0
    assert adapter(directory) == adapter(whole)


def test_disk_full_while_the_adapter_is_saved(whole: Path, runs: Runs):
    with full_disk(len(adapter(whole)) // 2):
        refused(runs.inline(*SHORT, "callbacks.checkpoint_every_n_steps=0"), "disk is full", "paths.runs_dir")
    directory = runs.only()
    assert not (directory / "adapter").exists()
    assert runs.inline(*SHORT).returncode == 0
    assert adapter(directory) == adapter(whole)


def test_disk_full_while_tokens_are_cached(runs: Runs, tmp_path: Path):
    setting = data_file(tmp_path / "mine.jsonl")
    cache = {"SELFAUG_CACHE": str(tmp_path / "cache")}
    with full_disk(8000):  # Hydra's own files are smaller
        refused(runs.inline(STEPS, setting, **cache), "disk is full", "SELFAUG_CACHE")
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
    assert runs.inline(*WORKS, setting, **cache).returncode == 0


def test_runs_directory_that_cannot_be_written(runs: Runs, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    refused(runs.into(tmp_path / "file" / "runs").inline(STEPS), "paths.runs_dir", str(tmp_path / "file"))
    os.remove(tmp_path / "file")
    assert runs.into(tmp_path / "file" / "runs").inline(*WORKS).returncode == 0


def test_asset_archive_with_other_content(runs: Runs, tmp_path: Path):
    archive = tmp_path / "cache" / "archives" / registry.find("smollm2-135m-instruct").archive.filename
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"something else")
    result = runs.inline("model=smollm2_135m", "model.name=asset:smollm2-135m-instruct",
                         SELFAUG_CACHE=str(tmp_path / "cache"))  # fmt: skip
    refused(result, str(archive), "sha256", "delete the file")
    assert archive.read_bytes() == b"something else"
    assert not list((tmp_path / "cache" / "assets").glob("[!.]*"))
