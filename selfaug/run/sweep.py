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

from selfaug.errors import UserError
from selfaug.files import write_json, write_text

log = logging.getLogger(__name__)

SWEEP_VARIABLE = "SELFAUG_SWEEP"  # name of the sweep: the group of its runs in W&B
_DIRECTORY_VARIABLE = "SELFAUG_SWEEP_DIR"  # where its jobs leave their records


class SweepSummary(Callback):
    """Hydra callback, set in train.yaml. The same sweep command has the same name and directory."""

    def __init__(self) -> None:
        self.variables: dict[str, str] = {}

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        task = list(config.hydra.overrides.task)
        choice = config.hydra.runtime.choices.get("experiment")
        name = f"{choice or 'sweep'}-{hashlib.sha256(json.dumps(sorted(task)).encode()).hexdigest()[:8]}"
        directory = Path(config.hydra.sweep.dir) / "sweeps" / name
        shutil.rmtree(directory / "jobs", ignore_errors=True)
        (directory / "jobs").mkdir(parents=True)
        self.variables = {SWEEP_VARIABLE: name, _DIRECTORY_VARIABLE: str(directory.absolute())}
        os.environ.update(self.variables)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        # Launchers take the callbacks along to other processes and nodes, but not every one takes the environment.
        os.environ.update(self.variables)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        directory = sweep_directory()
        for name in self.variables:
            del os.environ[name]
        whole = summarise(directory)
        if (directory / "front.md").is_file():  # of a search
            print((directory / "front.md").read_text())
        if not whole:
            sys.exit(1)


def sweep_directory() -> Path:
    """The directory of the sweep that is running: SWEEPS/sweeps/NAME."""
    return Path(os.environ[_DIRECTORY_VARIABLE])


def record_job(directory: str, name: str, number: int, error: str | None = None) -> None:
    """Called by each job when it ends: its run directory, and `number`, its place in the sweep."""
    write_json(
        sweep_directory() / "jobs" / f"{name}.json",
        {"number": number, "name": name, "directory": str(directory), "error": error},
    )


def read_job(name: str) -> dict[str, Any]:
    """What record_job has written of the run `name`."""
    return json.loads((sweep_directory() / "jobs" / f"{name}.json").read_text())


def summarise(directory: Path) -> bool:
    """Print the sweep's table, write it to table.md, and the report, and name the jobs that failed; False where one
    did, or left results that cannot be read."""
    from selfaug.reporting.results import read_results
    from selfaug.reporting.table import as_markdown, comparison_table, console
    from selfaug.reporting.write import write_sweep_report

    jobs = [json.loads(path.read_text()) for path in (directory / "jobs").glob("*.json")]
    jobs.sort(key=lambda job: job["number"])
    results, failed = [], []
    for job in jobs:
        try:
            if job["error"]:
                raise UserError(job["error"])
            results.append(read_results(Path(job["directory"]) / "results.json"))
        except (UserError, OSError) as error:
            failed.append(f"selfaug: {job['name']} failed: {error}")
    page = console()
    try:
        if results:
            page.print(comparison_table(results))
            write_text(directory / "table.md", as_markdown(results))
            page.print(f"Table: {directory / 'table.md'}", soft_wrap=True, highlight=False)
        if jobs:
            page.print(f"Report: {write_sweep_report(directory).page}", soft_wrap=True, highlight=False)
    except Exception:  # whatever it is, the runs are done and their status is what counts
        log.exception("table or report could not be written; try python -m selfaug.report %s", directory)
    for sentence in failed:
        print(sentence, file=sys.stderr)
    return not failed and bool(jobs)
