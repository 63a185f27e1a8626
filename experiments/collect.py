"""Keep what sweeps found: the results of their runs and the report on them, small enough to commit.

Run as: python experiments/collect.py experiments/ablation_position runs/sweeps/ablation_position-1a2b3c4d

Writes results/RUN/results.json, table.md, table.tex and plots/ into the folder. With --add the results that lie there
already stay: runs of several machines, or of a sweep that is not finished, come together run by run. The page
(report.html) is made from the same files at any time: python -m selfaug.report experiments/ablation_position --out DIR
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from selfaug.errors import UserError
from selfaug.reporting.places import read_places
from selfaug.reporting.results import write_results
from selfaug.reporting.write import write_report

_CURVE_POINTS = 60


def collect(folder: Path, places: Sequence[Path], add: bool = False) -> int:
    """How many runs lie in the folder then. places: sweeps, run directories or folders of them.

    Raises:
        UserError: a place without results, or, without `add`, a sweep of which a job has failed.
    """
    found = read_places(places)
    if found.failed and not add:
        raise UserError(f"{', '.join(job.name for job in found.failed)} failed: start the sweep again, or use --add.")
    if not add:
        shutil.rmtree(folder / "results", ignore_errors=True)
    for run in found.results:
        run.samples = run.samples[:1]
        run.config = run.config | {"paths": {"runs_dir": "runs"}}  # the folders of one machine say nothing elsewhere
        run.curves = {name: points[:: 1 + len(points) // _CURVE_POINTS] for name, points in run.curves.items()}
        write_results(folder / "results" / run.name / "results.json", run)
    whole = read_places([folder / "results"])
    report = write_report(whole, folder, folder.name)
    report.page.unlink()
    return len(whole.results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("places", type=Path, nargs="+", metavar="SWEEP", help="sweeps, or run directories")
    parser.add_argument("--add", action="store_true", help="keep the results that lie in the folder already")
    arguments = parser.parse_args()
    try:
        print(f"{collect(arguments.folder, arguments.places, arguments.add)} runs in {arguments.folder}")
    except UserError as error:
        sys.exit(f"collect: {error}")


if __name__ == "__main__":
    main()
