"""Sweeps: every job leaves a record; at the end one table, the failures by name, and an honest exit status."""

import hashlib
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from selfaug.files import write_json, write_text

log = logging.getLogger(__name__)

SWEEP_VARIABLE = "SELFAUG_SWEEP"  # name of the sweep: the group of its runs in W&B
_DIRECTORY_VARIABLE = "SELFAUG_SWEEP_DIR"  # where its jobs leave their records; jobs may be other processes


class SweepSummary(Callback):
    """Hydra callback, set in train.yaml. The same sweep command has the same name and directory."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        task = list(config.hydra.overrides.task)
        choice = config.hydra.runtime.choices.get("experiment")
        name = f"{choice or 'sweep'}-{hashlib.sha256(json.dumps(sorted(task)).encode()).hexdigest()[:8]}"
        directory = Path(config.hydra.sweep.dir) / "sweeps" / name
        shutil.rmtree(directory / "jobs", ignore_errors=True)
        (directory / "jobs").mkdir(parents=True)
        os.environ[SWEEP_VARIABLE], os.environ[_DIRECTORY_VARIABLE] = name, str(directory)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        directory = Path(os.environ.pop(_DIRECTORY_VARIABLE))
        os.environ.pop(SWEEP_VARIABLE)
        if not summarise(directory):
            sys.exit(1)


def record_job(run_directory: str, name: str, number: int, error: str | None = None) -> None:
    """Called by each job when it ends; `number` is its place in the sweep."""
    directory = Path(os.environ[_DIRECTORY_VARIABLE])
    write_json(
        directory / "jobs" / f"{name}.json",
        {"number": number, "name": name, "directory": str(run_directory), "error": error},
    )


def summarise(directory: Path) -> bool:
    """Print the sweep's table and write it to table.md; False where a job failed."""
    from selfaug.reporting.results import read_results
    from selfaug.reporting.table import as_markdown, comparison_table, console

    jobs = [json.loads(path.read_text()) for path in (directory / "jobs").glob("*.json")]
    jobs.sort(key=lambda job: job["number"])
    failed = [job for job in jobs if job["error"]]
    results = [read_results(Path(job["directory"]) / "results.json") for job in jobs if not job["error"]]
    page = console()
    if results:
        page.print(comparison_table(results))
        write_text(directory / "table.md", as_markdown(results))
        page.print(f"Table: {directory / 'table.md'}", soft_wrap=True, highlight=False)
    for job in failed:
        print(f"selfaug: {job['name']} failed: {job['error']}", file=sys.stderr)
    return not failed and bool(jobs)
