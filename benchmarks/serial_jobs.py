"""Does a sweep in one process leak? Memory after each of fifty small runs.

Run as: python -m benchmarks.serial_jobs [--jobs 50] [--override SETTING=VALUE ...]

The sweep is the one that a user would start (`python -m selfaug.train -m debug=smoke seed=range(1,51)`), with a Hydra
callback that looks at the process when a job has ended: the resident set as it stands, and what is left of it when
garbage is collected and the C library gives back what it keeps for later. The first jobs fill caches (compiled
kernels, modules); from the tenth on nothing may grow.
"""

import gc
import json
import shlex
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from hydra.experimental.callback import Callback

from benchmarks import common
from benchmarks.common import MEGABYTES, Column, Row, value
from benchmarks.sweep import execute
from selfaug.run.machine import free_unused

SETTLED = 10  # the job that later ones are compared with
COLUMNS = (
    Column("after job", value("job")),
    Column("resident, MB", value("resident_bytes", "{:,.0f}", MEGABYTES)),
    Column("of the tenth", value("ratio", "{:.3f}")),
    Column("and collected, MB", value("collected_bytes", "{:,.0f}", MEGABYTES)),
    Column("of the tenth", value("collected_ratio", "{:.3f}")),
    Column("Python objects", value("objects", "{:,}")),
)


class Memory(Callback):
    """Hydra callback: one line of JSON into `path` after each job."""

    def __init__(self, path: str):
        self.path = Path(path)

    def on_job_end(self, config: Any, job_return: Any, **_: Any) -> None:
        row = {"job": config.hydra.job.num + 1, "resident_bytes": psutil.Process().memory_info().rss}
        # Only now and then, so that looking does not clean up for the jobs that come after.
        if row["job"] % SETTLED == 0:
            free_unused()
            row |= {"collected_bytes": psutil.Process().memory_info().rss, "objects": len(gc.get_objects())}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def measure(jobs: int, override: list[str], place: Path) -> list[Row]:
    """A row for each job."""
    log = place / "memory.jsonl"
    command = [
        sys.executable, "-m", "selfaug.train", "-m", f"seed=range(1,{jobs + 1})", "debug=smoke", "progress=false",
        f"paths.runs_dir={place / 'runs'}", *override,
        f"+hydra.callbacks.memory={{_target_: benchmarks.serial_jobs.Memory, path: '{log}'}}",
    ]  # fmt: skip
    print(shlex.join(["python", *command[1:]]), flush=True)
    done = execute(command)
    if done.returncode:
        raise SystemExit(f"the sweep failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    settled = rows[min(SETTLED, len(rows)) - 1]
    for row in rows:
        row["implementation"] = "serial"
        row["ratio"] = row["resident_bytes"] / settled["resident_bytes"]
        if "collected_bytes" in row and "collected_bytes" in settled:
            row["collected_ratio"] = row["collected_bytes"] / settled["collected_bytes"]
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, "serial_jobs")
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument("--override", nargs="*", default=[], help="further settings for every run")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.jobs = 2
    override = list(arguments.override)
    if arguments.device == "cpu":
        override.append("trainer.accelerator=cpu")
    with TemporaryDirectory(prefix="selfaug-jobs-") as place:
        rows = measure(arguments.jobs, override, Path(place))
    shown = [row for row in rows if row["job"] in (1, 2, 5, len(rows)) or row["job"] % SETTLED == 0]
    shown[-1]["resident_bytes_of_all"] = [row["resident_bytes"] for row in rows]
    common.show(f"{len(rows)} runs in one process", shown, COLUMNS)
    common.write(common.out_path(arguments, "serial_jobs"), "serial_jobs", arguments, shown)


if __name__ == "__main__":
    main()
