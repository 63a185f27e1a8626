"""Sweeps: one table at the end, only what is missing is done, one failure does not take the others down."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from selfaug.run.sweep import summarise
from tests.run.conftest import Runs

STEPS = "trainer.max_steps=2"
GRID = ("alignment.alpha=0,0.5", "seed=1,2")


@pytest.fixture(scope="module")
def swept(workspace: Runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Runs, subprocess.CompletedProcess[str]]:
    """Four runs."""
    runs = workspace.into(tmp_path_factory.mktemp("sweep"))
    result = runs.inline("-m", *GRID, STEPS)
    assert result.returncode == 0, result.stdout + result.stderr
    return runs, result


@pytest.fixture
def copied(swept, tmp_path: Path) -> Runs:
    """The four runs and their sweep in a directory of this test's own."""
    first, _ = swept
    runs = first.into(tmp_path / "runs")
    shutil.copytree(first.runs, runs.runs)
    for record in (runs.runs / "sweeps").glob("*/jobs/*.json"):
        record.write_text(record.read_text().replace(str(first.runs), str(runs.runs)))
    return runs


def table(runs: Runs) -> str:
    (path,) = (runs.runs / "sweeps").glob("*/table.md")
    return path.read_text()


def choices(directory: Path) -> tuple[float, int]:
    """alpha and seed of a run."""
    config = json.loads((directory / "results.json").read_text())["config"]
    return config["alignment"]["alpha"], config["seed"]


def test_a_run_for_each_value_and_a_table(swept):
    runs, result = swept
    assert sorted(choices(d) for d in runs.directories()) == [(0, 1), (0, 2), (0.5, 1), (0.5, 2)]
    assert table(runs).count("\n|") >= 3
    (path,) = (runs.runs / "sweeps").glob("*/table.md")
    assert f"Table: {path}" in result.stdout
    assert "alpha" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_wandb_run_of_each_job(runs: Runs):
    assert runs.inline("-m", "alignment.alpha=0.5", "seed=1,2", STEPS, "logger=wandb").returncode == 0
    assert len(runs.directories()) == 2
    groups = set()
    for directory in runs.directories():
        (place,) = (directory / "wandb").glob("offline-run-*")
        wanted = directory.name.rpartition("-")[2]
        assert place.name.endswith(f"-{wanted}")  # the id is the configuration's hash
        command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(place)]
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        records = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        text = json.dumps(records)
        assert wanted in text
        (group,) = _find(records, "runGroup", "run_group", "group")
        groups.add(group)
        for key in ("train/loss", "train/nll", "train/kl", "train/alpha", "alignment", "drift/wikipedia/kl_base_tuned"):
            assert key in text, key
    assert len(groups) == 1


def _find(records: list, *names: str) -> set[str]:
    """All values that any of these keys has, at any depth."""
    found = set()
    stack: list = list(records)
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            found |= {v for k, v in item.items() if k in names and isinstance(v, str) and v}
            stack += item.values()
        elif isinstance(item, list):
            stack += item
    return found


def test_only_the_missing_run_is_done_again(copied: Runs):
    gone, *others = copied.directories()
    before = {d: (d / "results.json").stat().st_mtime_ns for d in others}
    shutil.rmtree(gone)
    result = copied.inline(*GRID, STEPS, "-m")  # -m at the end is the same
    assert result.returncode == 0, result.stderr
    assert {d: (d / "results.json").stat().st_mtime_ns for d in others} == before
    assert (gone / "results.json").is_file()
    assert len(copied.directories()) == 4
    assert result.stdout.count("this run is finished") == 3
    assert "Table: " in result.stdout


def test_a_failing_job_does_not_take_the_others_down(runs: Runs):
    result = runs.inline("--multirun", "alignment.alpha=-1,0.5", STEPS)
    assert result.returncode != 0
    finished = [d for d in runs.directories() if (d / "results.json").is_file()]
    assert [choices(d)[0] for d in finished] == [0.5]
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("selfaug: ")]
    assert "failed: " in line
    assert "alpha" in line
    assert finished[0].name not in line
    assert "Traceback" not in result.stdout + result.stderr
    assert "Table: " in result.stdout


def test_results_that_cannot_be_read_are_a_failure(copied: Runs, monkeypatch: pytest.MonkeyPatch, capsys):
    """And a table that cannot be written hides no failure."""
    (sweep,) = (copied.runs / "sweeps").iterdir()
    assert summarise(sweep)
    (copied.directories()[0] / "results.json").write_text("{")
    monkeypatch.setattr("selfaug.reporting.table.as_markdown", lambda _: 1 / 0)
    capsys.readouterr()
    assert not summarise(sweep)
    assert f"{copied.directories()[0].name} failed: " in capsys.readouterr().err


def test_an_experiment_that_is_a_sweep(runs: Runs, tmp_path: Path):
    """However its folder is named and it is chosen, it is the same sweep."""
    folder = tmp_path / "conf"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "both.yaml").write_text(
        "# @package _global_\n"
        "trainer: {max_steps: 1}\n"
        'hydra: {mode: MULTIRUN, sweeper: {params: {alignment.alpha: "0,0.5"}}}\n'
    )
    ways = [
        (*found, choice)
        for found in (("--config-dir", str(folder)), (f"hydra.searchpath=[file://{folder}]",))
        for choice in ("+experiment=both", "experiment=both")
    ]
    for number, way in enumerate(ways):
        result = runs.inline(*way)
        assert result.returncode == 0, result.stdout + result.stderr
        assert sorted(choices(d)[0] for d in runs.directories()) == [0, 0.5]
        assert "Table: " in result.stdout
        assert result.stdout.count("this run is finished") == (2 if number else 0)
    assert [p.name.startswith("both-") for p in (runs.runs / "sweeps").iterdir()] == [True]
