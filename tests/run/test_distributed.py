"""Two processes equal one (invariant 4), on CPUs, with steps that do not divide evenly."""

import csv
import json
import signal
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from selfaug.errors import UserError
from selfaug.run import launch, ranks
from tests.run.conftest import UNSCORED, Runs
from tests.run.test_resume import newest_step, stop
from tests.run.test_same import relative_error
from tests.run.warm import Warm

# 5 examples a step, 2 of them in a micro-batch: 3 micro-batches for 2 processes; the last step has 2 examples.
UNEVEN = ("data.batch_size=5", "trainer.val_check_interval=5")
# ... and other data mixed in, with a term of its own and SelfAug's on the task's.
MIXED = (
    *UNEVEN, *UNSCORED, "method=replay_kl", "data.limit_train=17", "mixture@data.mixture.replay=jsonl",
    "data.mixture.replay.source.path=dialogues.jsonl",
    "data.batch_counts=all", "method.ratio=0.3", "data.mixture.replay.nll=true", "+alignment.source=task",
    "+method.terms.kl=${alignment}",
)  # fmt: skip


@pytest.fixture(scope="module")
def single(workspace: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace.into(tmp_path_factory.mktemp("single")).done(*MIXED)


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_equal_one(single: Path, runs: Runs, strategy: str):
    directory = runs.done(*MIXED, f"trainer={strategy}")
    name = "adapter/adapter_model.safetensors"
    assert relative_error(load_file(single / name), load_file(directory / name)) < 1e-4
    one, two = rows(single), rows(directory)
    assert len(one) == len(two) >= 5
    for row, other in zip(one, two, strict=True):
        measured = {key for key, value in row.items() if value and not key.startswith("speed/")}
        assert measured == {key for key, value in other.items() if value and not key.startswith("speed/")}
        for key in measured:
            assert float(other[key]) == pytest.approx(float(row[key]), rel=1e-4, abs=1e-6), (row["step"], key)
        for key in measured & {"step", "train/tokens", "train/rows_nll", "train/rows_kl", "train/rows_replay_kl"}:
            assert float(other[key]) == float(row[key])
    assert {"train/kl", "train/replay_kl", "train/nll_task", "train/nll_replay"} <= one[1].keys()


def test_an_error_in_a_worker_is_one_sentence(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    workers: list[Warm] = []

    def start(command: list[str], env: dict[str, str]) -> Warm:
        workers.append(Warm(command, env=env, stdout=subprocess.PIPE))
        return workers[-1]

    monkeypatch.setattr("tests.run.conftest.Warm", start)
    # What is wrong is found once the model is loaded, and only the workers load it.
    result = runs.inline("trainer=ddp", "adapter.target_modules=[nothing]", "trainer.max_steps=2")
    assert result.returncode == 1
    printed = [result.stdout, result.stderr, *(text for worker in workers for text in worker.communicate())]
    (sentence,) = [line for text in printed for line in text.splitlines() if line.startswith("selfaug: ")]
    assert sentence in result.stderr.splitlines()
    assert "adapter.target_modules" in sentence
    assert [worker.returncode for worker in workers] == [1, 1]
    assert not any("Traceback" in text for text in printed)


def test_sigterm_stops_all_processes_at_a_checkpoint(runs: Runs):
    result = stop(runs, 2, signal.SIGTERM, *UNEVEN, "trainer=ddp", "callbacks.checkpoint_every_n_steps=2")
    assert result.returncode == 143, result.stdout + result.stderr
    assert 2 <= newest_step(runs.only()) < 8
    assert not (runs.only() / "adapter").exists()
    assert "Traceback" not in result.stdout + result.stderr
    assert "failed" not in result.stderr


def test_sigterm_while_the_processes_load_is_no_failure(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    def ends(number: int) -> BaseException:
        monkeypatch.setattr(launch, "_wait", lambda workers: [w.send_signal(number) or w.wait() for w in workers])
        with pytest.raises((SystemExit, UserError)) as error:
            launch.launch_workers(runs.path, 2)
        return error.value

    ended = ends(signal.SIGTERM)
    assert isinstance(ended, SystemExit)
    assert ended.code == 143
    assert isinstance(ends(signal.SIGKILL), UserError)


@pytest.mark.parametrize(
    ("variables", "inside", "number"),
    [
        ({}, False, 0),
        ({"RANK": "3", "LOCAL_RANK": "1"}, True, 3),  # torchrun, launch_workers
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, False, 0),  # srun --pty bash
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, False, 0),  # a batch script, before any srun
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, True, 2),  # srun --ntasks=4
    ],
)
def test_who_one_is(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], inside: bool, number: int):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (ranks.inside_launcher(), ranks.rank()) == (inside, number)


def test_two_processes_in_an_interactive_slurm_job(runs: Runs):
    """One task of Slurm's, which is neither one of the two processes nor their number."""
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_NAME": "bash",
             "SLURM_JOB_ID": "7", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}  # fmt: skip
    directory = runs.done(*UNEVEN, *UNSCORED, "trainer=ddp", "trainer.max_steps=2", **slurm)
    assert json.loads((directory / "fit.json").read_text())["steps"] == 2
