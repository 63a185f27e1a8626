"""Where results lie: run directories, folders of them, sweeps."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from selfaug.errors import UserError
from selfaug.reporting.labels import row_labels
from selfaug.reporting.results import Results, read_results


@dataclass(frozen=True, slots=True)
class FailedJob:
    """A job of a sweep that left no results, or results that cannot be read, and why."""

    name: str
    error: str


@dataclass
class Found:
    """What lies at some places. sweep: the sweep's directory, where there was one and nothing else was asked for."""

    results: list[Results] = field(default_factory=list)
    failed: list[FailedJob] = field(default_factory=list)
    sweep: Path | None = None


def read_places(places: Sequence[str | Path]) -> Found:
    """All results at or below the places, each once; of a sweep directory those of its jobs, in their order. Without a
    sweep the names of the runs, which end in a hash, say nothing: the order is that of what tells them apart.

    Raises UserError where a place holds neither results nor failed jobs, and where its only results cannot be read; of
    several, those go to `failed`.
    """
    found = Found()
    seen: set[Path] = set()
    for place in map(Path, places):
        sweep = is_sweep(place)
        files = _jobs(place, found.failed) if sweep else results_files(place)
        if sweep and len(places) == 1:
            found.sweep = place
        for file in files:
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            try:
                found.results.append(read_results(file))
            except UserError as wrong:  # one of many must not cost the report on the others
                if len(files) == 1:
                    raise
                found.failed.append(FailedJob(file.parent.name, str(wrong)))
    if not any(is_sweep(Path(place)) for place in places):
        labels = row_labels([run.config for run in found.results])
        order = sorted(range(len(labels)), key=lambda i: (_natural(labels[i]), found.results[i].seed))
        found.results = [found.results[i] for i in order]
    return found


def _natural(label: str) -> list[tuple[float, str]]:
    """A key by which alpha=0.5 comes before alpha=10."""
    parts = re.split(r"(\d+(?:\.\d+)?)", label)
    return [(float(part), "") if index % 2 else (-1.0, part) for index, part in enumerate(parts)]


def is_sweep(place: Path) -> bool:
    """Whether `place` is a sweep's directory (runs/sweeps/NAME; see selfaug/run/sweep.py)."""
    return (place / "jobs").is_dir()


def results_files(place: Path) -> list[Path]:
    """Every results.json at or below a place. Raises UserError where there is none."""
    files = [place] if place.is_file() else sorted(place.rglob("results.json"))
    if not files:
        raise UserError(f"{place} holds no results.json: give a run directory, a folder of them, or a sweep directory.")
    return files


def _jobs(sweep: Path, failed: list[FailedJob]) -> list[Path]:
    """The results of a sweep's jobs, in their order; what has none goes to `failed`."""
    jobs = []
    for path in sorted((sweep / "jobs").glob("*.json")):
        try:
            job = json.loads(path.read_text(encoding="utf-8"))
            jobs.append((int(job["number"]), str(job["name"]), str(job["directory"]), job["error"]))
        except (ValueError, KeyError, TypeError) as wrong:
            raise UserError(f"{path}: no record of a job, so delete the file and start the sweep again.") from wrong
    if not jobs:
        raise UserError(f"{sweep} holds no job that has ended: wait for the first one, or start the sweep again.")
    files = []
    for _, name, directory, error in sorted(jobs, key=lambda job: job[:2]):
        # Runs and sweeps may have been moved together: runs/NAME beside runs/sweeps/NAME.
        candidates = [Path(directory) / "results.json", sweep.parent.parent / Path(directory).name / "results.json"]
        file = next((path for path in candidates if path.is_file()), None)
        if error or file is None:
            failed.append(FailedJob(name, str(error) if error else "its results.json is missing"))
        else:
            files.append(file)
    return files
