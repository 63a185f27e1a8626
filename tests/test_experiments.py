"""experiments/collect.py: what is kept of a sweep, run by run."""

import importlib.util
from pathlib import Path

import pytest

from benchmarks.report import made_up
from selfaug.errors import UserError
from selfaug.files import write_text
from selfaug.reporting.results import read_results, write_results

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("collect", ROOT / "experiments" / "collect.py")
assert _spec is not None
assert _spec.loader is not None
module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(module)


def sweep(place: Path, seeds: tuple[int, ...], error: str | None = None) -> Path:
    """A sweep's directory with a run for each seed; error: of a further job."""
    for number, seed in enumerate(seeds):
        run = made_up(seed=seed)
        run.config["paths"] = {"runs_dir": str(place)}
        write_results(place / run.name / "results.json", run)
        directory = f'"{place / run.name}"'
        write_text(
            place / "sweeps/s/jobs" / f"{number}.json",
            f'{{"number": {number}, "name": "{run.name}", "directory": {directory}, "error": null}}',
        )
    if error:
        job = f'{{"number": 9, "name": "other", "directory": "gone", "error": "{error}"}}'
        write_text(place / "sweeps/s/jobs/9.json", job)
    return place / "sweeps/s"


def test_results_of_sweeps_come_together(tmp_path):
    folder = tmp_path / "experiment"
    assert module.collect(folder, [sweep(tmp_path / "a", (1, 2))]) == 2
    assert module.collect(folder, [sweep(tmp_path / "b", (2, 3), error="killed")], add=True) == 3
    assert {file.name for file in folder.iterdir()} == {"results", "table.md", "table.tex", "plots"}
    kept = [read_results(file) for file in sorted((folder / "results").glob("*/results.json"))]
    assert sorted(run.seed for run in kept) == [1, 2, 3]
    assert {run.config["paths"]["runs_dir"] for run in kept} == {"runs"}
    assert all(len(points) <= 61 for run in kept for points in run.curves.values())
    assert module.collect(folder, [tmp_path / "a/sweeps/s"]) == 2  # without --add what lay there goes


def test_a_sweep_with_a_failed_job_is_not_kept_as_a_whole_one(tmp_path):
    place = sweep(tmp_path / "a", (1,), error="killed")
    with pytest.raises(UserError, match="other failed"):
        module.collect(tmp_path / "experiment", [place])
    assert not (tmp_path / "experiment").exists()
