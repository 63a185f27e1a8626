"""What a method does before its first step, and terms on the weights, in whole runs: with several processes, killed and
resumed, and with a weight of 0."""

import csv
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.run.conftest import UNSCORED, Runs
from tests.run.test_resume import adapter, copied, metrics, same, stop
from tests.run.test_same import relative_error

EWC = ("method=ewc", "method.terms.ewc.text.asset=null", "method.terms.ewc.text.path=dialogues.jsonl")
LEARN = "+method.learn={_target_: selfaug.data.low_perplexity.LowPerplexity, threshold: 300}"
# Everything at once, strong enough to be felt; 5 examples a step: 3 micro-batches for 2 processes.
ALL = (
    *EWC, "method.terms.ewc.alpha=1000", LEARN,
    "+method.terms.l2sp={_target_: selfaug.objective.L2SP, alpha: 1.0}",
    "+method.terms.orthogonal={_target_: selfaug.objective.Orthogonal, alpha: 1.0}",
    "data.batch_size=5", "trainer.val_check_interval=5",
)  # fmt: skip
SHORT = ("trainer.max_steps=4", "trainer.max_epochs=1", "adapter.lora_dropout=0.1", *UNSCORED)
# With a text that a test may change.
OWN_TEXT = (*EWC[:2], "method.terms.ewc.text.path=own.jsonl", *SHORT)
EVERY = "callbacks.checkpoint_every_n_steps=2"


@pytest.fixture(scope="module")
def single(workspace: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace.into(tmp_path_factory.mktemp("single")).done(*ALL)


@pytest.fixture(scope="module")
def killed(workspace: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = workspace.into(tmp_path_factory.mktemp("killed"))
    assert stop(runs, 2, signal.SIGKILL, *ALL, EVERY).returncode == -signal.SIGKILL
    return runs.only()


@pytest.fixture(scope="module")
def short(workspace: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (workspace.path / "own.jsonl").write_text((workspace.path / "dialogues.jsonl").read_text())
    return workspace.into(tmp_path_factory.mktemp("short")).done(*OWN_TEXT)


def rows(directory: Path) -> list[dict[str, float]]:
    with (directory / "metrics.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def prepared(directory: Path) -> dict:
    return {path.name: load_file(path) for path in sorted((directory / "prepared").iterdir())}


def test_one_process(single: Path):
    assert set(prepared(single)) == {"ewc.safetensors", "learn.safetensors"}
    first, *steps = rows(single)
    assert first["step"] == 0
    assert 0 < first["learn/learned_tokens"] < 1
    assert first["ewc/fisher_mean"] > 0
    trained = [row for row in steps if "train/loss" in row]
    for row in trained:
        total = row.get("train/nll", 0) + 1000 * row["train/ewc"] + row["train/l2sp"] + row["train/orthogonal"]
        assert row["train/loss"] == pytest.approx(total, rel=1e-5)
    assert trained[-1]["train/ewc"] > 0
    assert trained[-1]["train/l2sp"] > 0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_equal_one(single: Path, runs: Runs, strategy: str):
    directory = runs.done(*ALL, *UNSCORED, f"trainer={strategy}")
    name = "adapter/adapter_model.safetensors"
    assert relative_error(load_file(single / name), load_file(directory / name)) < 1e-4
    for file, found in prepared(directory).items():
        expected = prepared(single)[file]
        assert found.keys() == expected.keys()
        for key, value in found.items():  # the Fisher information of A is 0 but for rounding
            assert (value.double() - expected[key]).norm() <= 1e-4 * expected[key].double().norm() + 1e-12, (file, key)
    one, two = rows(single), rows(directory)
    assert len(one) == len(two)
    for row, other in zip(one, two, strict=True):
        measured = {key for key in row if not key.startswith("speed/")}
        assert measured == {key for key in other if not key.startswith("speed/")}
        for key in measured:
            assert other[key] == pytest.approx(row[key], rel=1e-4, abs=1e-6), (row["step"], key)


def test_killed_and_resumed_is_never_killed(single: Path, killed: Path, runs: Runs):
    directory = copied(killed, runs)
    result = runs.inline(*ALL, EVERY)
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stdout
    same(directory, single)


def test_a_run_without_its_preparation_does_not_go_on(killed: Path, runs: Runs):
    (copied(killed, runs) / "prepared" / "ewc.safetensors").unlink()
    result = runs.inline(*ALL, EVERY)
    assert result.returncode == 1
    assert "ewc.safetensors was made before the first step of this run and is missing" in result.stderr
    assert "ckpt_path=null" in result.stderr


def test_a_run_that_begins_again_prepares_again(short: Path, runs: Runs):
    directory = copied(short, runs)
    file = directory / "prepared" / "ewc.safetensors"
    before = file.stat().st_mtime_ns
    (directory / "results.json").unlink()
    (directory / "fit.json").unlink()
    assert runs.inline(*OWN_TEXT, "ckpt_path=null").returncode == 0
    assert runs.only() == directory
    assert file.stat().st_mtime_ns > before


def test_a_text_that_has_changed_is_another_run(short: Path, runs: Runs):
    copied(short, runs)
    text = runs.path / "own.jsonl"
    before = text.read_text()
    text.write_text(before + '{"prompt": "Who?", "response": "Me."}\n')
    result = runs.inline(*OWN_TEXT)
    text.write_text(before)
    assert result.returncode == 1
    assert "The data has changed since the run" in result.stderr


def test_without_effect_they_are_plain_lora(runs: Runs):
    plain = runs.into(runs.runs / "plain").done(*SHORT, "method=lora")
    without = {
        "ewc": (*EWC, "method.terms.ewc.alpha=0"),
        "stm": ("method=stm", "method.learn.threshold=inf"),
    }
    for name, overrides in without.items():
        directory = runs.into(runs.runs / name).done(*SHORT, *overrides)
        assert adapter(directory) == adapter(plain), name
        assert (directory / "prepared").is_dir()
    assert not (plain / "prepared").exists()
    assert len(metrics(plain)) > 0


def test_a_text_that_is_not_there_is_one_sentence(runs: Runs):
    result = runs.inline(*EWC, "method.terms.ewc.text.path=nowhere.jsonl")
    assert result.returncode == 1
    assert "method.terms.ewc.text.path=nowhere.jsonl does not exist" in result.stderr
    assert "Traceback" not in result.stderr
