"""Killed and resumed = never killed (invariant 8): the same adapter, byte for byte, and the same metrics."""

import csv
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfaug.callbacks.saving import newest_checkpoint
from tests.run.conftest import Runs
from tests.run.warm import Warm

# 10 steps an epoch, validation between them, dropout that draws random numbers and a controller that changes alpha in
# every step.
LONG = ("trainer.max_epochs=2", "callbacks.checkpoint_every_n_steps=4", "trainer.val_check_interval=5",
        "adapter.lora_dropout=0.1", "alignment/schedule=kl_target", "alignment.schedule.target=1e-5")  # fmt: skip


def adapter(directory: Path) -> bytes:
    return (directory / "adapter" / "adapter_model.safetensors").read_bytes()


def metrics(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("speed/")} for row in csv.DictReader(file)]


def scores(directory: Path) -> dict:
    results = json.loads((directory / "results.json").read_text())
    return {name: results[name] for name in ("task", "drift", "data", "samples", "config_hash", "seed")}


def same(one: Path, other: Path) -> None:
    assert adapter(one) == adapter(other)
    assert metrics(one) == metrics(other)
    assert scores(one) == scores(other)
    assert one.name == other.name


def stop(runs: Runs, step: int, by: signal.Signals, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Start the command in a process of its own and send it a signal once its checkpoint of `step`, or a later one, is
    there."""
    command = runs.command(*overrides)
    process = Warm(command, cwd=runs.path, env=runs.environment(), stdout=subprocess.PIPE)

    def there() -> bool:
        files = runs.runs.glob("*/checkpoints/step-*.ckpt")
        return any(int(file.stem.rpartition("-")[2]) >= step for file in files)

    while process.poll() is None and not there():
        time.sleep(0.002)
    process.send_signal(by)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def newest_step(directory: Path) -> int:
    path = newest_checkpoint(directory / "checkpoints")
    assert path is not None
    return int(path.stem.rpartition("-")[2])


def copied(directory: Path, runs: Runs) -> Path:
    """A run directory moved into another directory of runs, as if it had been left there."""
    return Path(shutil.copytree(directory, runs.runs / directory.name))


@pytest.fixture(scope="module")
def whole(workspace: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody interrupts."""
    directory = workspace.into(tmp_path_factory.mktemp("whole")).done(*LONG)
    assert len([row for row in metrics(directory) if row["train/loss"]]) == 20
    assert len([row for row in metrics(directory) if row["val/nll"]]) == 4
    assert len({row["train/alpha"] for row in metrics(directory)}) > 10
    return directory


@pytest.fixture(scope="module")
def killed(workspace: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run killed in the middle of its first epoch."""
    runs = workspace.into(tmp_path_factory.mktemp("killed"))
    assert stop(runs, 4, signal.SIGKILL, *LONG).returncode == -signal.SIGKILL
    return runs.only()


def test_killed_twice_and_resumed_is_never_killed(whole: Path, killed: Path, runs: Runs):
    directory = copied(killed, runs)
    assert 4 <= newest_step(directory) < 10
    assert stop(runs, 16, signal.SIGKILL, *LONG).returncode == -signal.SIGKILL
    assert 16 <= newest_step(directory) < 20  # within the second epoch
    assert not (directory / "adapter").exists()
    result = runs.inline(*LONG)
    assert result.returncode == 0
    assert f"resuming from {directory}" in result.stdout
    same(runs.only(), whole)


def test_sigterm_leaves_a_checkpoint_and_ctrl_c_says_how_to_go_on(whole: Path, runs: Runs):
    """Exit statuses 143 and 130; a run that was stopped by either is the one that nobody stops."""
    result = stop(runs, 4, signal.SIGTERM, *LONG)
    assert result.returncode == 143
    directory = runs.only()
    step = newest_step(directory)
    assert 4 <= step < 20
    assert f"stopped by SIGTERM after step {step}" in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert not (directory / "adapter").exists()

    result = runs.inline(*LONG)
    assert result.returncode == 0
    assert f"step-{step}.ckpt" in result.stdout
    same(directory, whole)

    runs = runs.into(runs.runs / "other")
    result = stop(runs, 4, signal.SIGINT, *LONG)
    assert result.returncode == 130
    assert result.stderr.splitlines()[-1] == "selfaug: interrupted; the same command goes on where it was stopped."
    assert "Traceback" not in result.stdout + result.stderr
    assert not (runs.only() / "adapter").exists()
    assert runs.inline(*LONG).returncode == 0
    same(runs.only(), whole)


def test_finished_run_is_not_done_again(whole: Path, runs: Runs):
    directory = copied(whole, runs)
    files = [p for p in directory.rglob("*") if "adapter" in p.parts or p.suffix in (".json", ".csv", ".ckpt")]
    kept = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files if p.is_file() and p.name != "run.json"}
    assert {"results.json", "fit.json", "metrics.csv", "adapter_model.safetensors"} <= {p.name for p in kept}
    result = runs.inline(*LONG)
    assert result.returncode == 0
    assert f"this run is finished: {directory}" in result.stdout
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in kept} == kept


def test_killed_while_scoring_is_only_scored(whole: Path, runs: Runs):
    directory = copied(whole, runs)
    (directory / "results.json").unlink()
    trained = (directory / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert runs.inline(*LONG).returncode == 0
    assert (directory / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == trained
    same(directory, whole)


def test_killed_between_the_last_step_and_the_adapter_keeps_its_metrics(whole: Path, runs: Runs):
    """The last checkpoint is of the last step: the resumed run has nothing left to train."""
    directory = copied(whole, runs)
    assert newest_step(directory) == 20
    shutil.rmtree(directory / "adapter")
    for file in ("fit.json", "results.json"):
        (directory / file).unlink()
    assert runs.inline(*LONG).returncode == 0
    same(directory, whole)
    assert not (directory / "metrics.before-resume.csv").exists()


def test_damaged_newest_checkpoint_is_passed_over(whole: Path, killed: Path, runs: Runs):
    directory = copied(killed, runs)
    (good,) = (directory / "checkpoints").glob("*.ckpt")
    damaged = directory / "checkpoints" / "step-9.ckpt"
    damaged.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    result = runs.inline(*LONG)
    assert result.returncode == 0
    assert f"{damaged} cannot be read" in result.stdout
    assert f"resuming from {good}" in result.stdout
    same(directory, whole)


@pytest.mark.parametrize("keep", [0, 100, 0.5, -1])
def test_truncated_checkpoint_is_never_used(killed: Path, tmp_path: Path, keep: float):
    (good,) = (killed / "checkpoints").glob("*.ckpt")
    content = good.read_bytes()
    end = int(keep * len(content)) if isinstance(keep, float) else keep
    (tmp_path / good.name).write_bytes(content[:end])
    assert newest_checkpoint(tmp_path) is None


def test_checkpoint_holds_only_what_trains(whole: Path, killed: Path, workspace: Runs):
    (path,) = (killed / "checkpoints").glob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    weights = checkpoint["state_dict"]
    assert weights
    assert all("lora_A" in name or "lora_B" in name for name in weights)
    saved = load_file(whole / "adapter" / "adapter_model.safetensors")
    bytes_of_adapter = sum(t.numel() * t.element_size() for t in saved.values())
    assert sum(t.numel() * t.element_size() for t in weights.values()) == bytes_of_adapter
    # Weights, two moments of AdamW, and what zip and pickle take for each tensor.
    assert path.stat().st_size < 3 * bytes_of_adapter + 3 * len(weights) * 1000 + 20_000
    everything = sum(
        t.numel() * t.element_size() for t in load_file(workspace.path / "model/model.safetensors").values()
    )
    assert everything > bytes_of_adapter


def test_changed_data_is_refused_and_force_does_it_again(workspace: Runs, tmp_path: Path):
    changed = object.__new__(Runs)  # the same command in another folder
    changed.path, changed.runs = tmp_path / "folder", tmp_path / "runs"
    changed.path.mkdir()
    for name in ("model", "texts.jsonl", "dialogues.jsonl"):
        (changed.path / name).symlink_to(workspace.path / name)
    shutil.copy(workspace.path / "data.jsonl", changed.path / "data.jsonl")
    directory = changed.done("trainer.max_steps=1")
    before = adapter(directory), (directory / "results.json").read_bytes()

    lines = (changed.path / "data.jsonl").read_text().splitlines(keepends=True)
    (changed.path / "data.jsonl").write_text("".join(lines[:40]))
    result = changed.inline("trainer.max_steps=1")
    assert result.returncode == 1
    (sentence,) = result.stderr.strip().splitlines()[-1:]
    assert sentence.startswith("selfaug: The data has changed since the run in")
    assert "Traceback" not in result.stderr
    assert (adapter(directory), (directory / "results.json").read_bytes()) == before

    result = changed.inline("trainer.max_steps=1", "force=true")
    assert result.returncode == 0
    assert changed.only() == directory
    assert (adapter(directory), (directory / "results.json").read_bytes()) != before


def test_without_validation_examples_checkpoints_are_saved_at_the_ends_of_epochs(runs: Runs):
    """Lightning passes over a validation that has no batch, so that a checkpoint put off for it would never come."""
    no_validation = ("data.source.val_share=0", "data.limit_train=16", "trainer.max_epochs=3",
                     "callbacks.checkpoint_every_n_steps=4")  # fmt: skip
    directory = runs.done(*no_validation)
    assert newest_step(directory) == 12
    other = runs.into(runs.runs / "stopped")
    assert stop(other, 4, signal.SIGTERM, *no_validation).returncode == 143
    assert newest_step(other.only()) < 12
    same(other.done(*no_validation), directory)


def test_force_does_a_finished_run_again_and_an_unfinished_one_goes_on(whole: Path, runs: Runs):
    """Else a job that is put back into the queue with force=true would never end."""
    directory = copied(whole, runs)
    shutil.rmtree(directory / "adapter")  # as if it had been killed after its last step
    for file in ("fit.json", "results.json"):
        (directory / file).unlink()
    result = runs.inline(*LONG, "force=true")
    assert result.returncode == 0
    assert f"resuming from {directory}" in result.stdout
    same(directory, whole)
    written = [directory / "adapter" / "adapter_model.safetensors", directory / "results.json"]
    before = [path.stat().st_mtime_ns for path in written]
    result = runs.inline(*LONG, "force=true")
    assert result.returncode == 0
    assert "resuming" not in result.stdout
    assert all(path.stat().st_mtime_ns > time for path, time in zip(written, before, strict=True))
    assert len([row for row in metrics(directory) if row["train/loss"]]) == 20  # not those of the first time as well
    same(runs.only(), whole)


def test_a_run_that_began_with_a_given_checkpoint_goes_on_with_its_own(killed: Path, runs: Runs, tmp_path: Path):
    given = newest_checkpoint(killed / "checkpoints")
    assert given is not None
    start = (*LONG, f"ckpt_path={shutil.copy(given, tmp_path / 'start.ckpt')}")
    assert stop(runs, 16, signal.SIGKILL, *start).returncode == -signal.SIGKILL
    result = runs.inline(*start)
    assert result.returncode == 0
    assert f"resuming from {runs.only() / 'checkpoints' / 'step-16.ckpt'}" in result.stdout
