"""Keep what a finished sweep found: the results of its runs and the report on them, small enough to commit.

Run as: python experiments/collect.py runs/sweeps/ablation_position-1a2b3c4d experiments/ablation_position

Writes results/RUN/results.json, table.md, table.tex and plots/ into the folder. The page (report.html) is made from the
same files at any time: python -m selfaug.report experiments/ablation_position --out DIR
"""

import argparse
import shutil
import sys
from pathlib import Path

from selfaug.reporting.places import is_sweep, read_places
from selfaug.reporting.results import write_results
from selfaug.reporting.write import write_report

_CURVE_POINTS = 60


def collect(sweep: Path, folder: Path) -> int:
    """How many runs were kept. Raises SystemExit for a sweep that is not whole."""
    found = read_places([sweep])
    if not is_sweep(sweep) or found.failed:
        names = ", ".join(job.name for job in found.failed)
        sys.exit(f"{sweep} is not a finished sweep: {f'{names} failed' if names else 'it has no jobs'}.")
    shutil.rmtree(folder / "results", ignore_errors=True)
    for run in found.results:
        run.samples = run.samples[:1]
        run.curves = {name: points[:: 1 + len(points) // _CURVE_POINTS] for name, points in run.curves.items()}
        write_results(folder / "results" / run.name / "results.json", run)
    report = write_report(read_places([folder / "results"]), folder, folder.name)
    report.page.unlink()
    return len(found.results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(f"{collect(arguments.sweep, arguments.folder)} runs in {arguments.folder}")


if __name__ == "__main__":
    main()
