"""Several processes on this node, started on a small worker so that only one process ever runs Hydra.

Lightning's own launcher would start `python -m selfaug.train` again for every further process, and each would compose
the configuration, make directories and, in a sweep, start a second job. (On several nodes, torchrun or srun starts
`python -m selfaug.train` itself, and nothing is launched here.)
"""

import os
import signal
import socket
import sys
import time
from pathlib import Path
from subprocess import Popen
from typing import Any

from selfaug.errors import UserError
from selfaug.run.fit import SIGTERM_EXIT

_GRACE_SECONDS = 60  # for the others to end, once one process has


def launch_workers(run_directory: Path, processes: int) -> None:
    """Run `python -m selfaug.run.worker RUN_DIRECTORY` in so many processes and wait for them.

    SIGTERM is passed on to all of them, and this process then exits as they do.
    Raises UserError with the sentence of the worker that failed.
    """
    message = run_directory / "worker-error.txt"
    message.unlink(missing_ok=True)
    command = [sys.executable, "-m", "selfaug.run.worker", str(run_directory)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = {
        # On a CPU the processes share the cores instead of each taking all.
        "OMP_NUM_THREADS": str(max(cores // processes, 1)),
        # Lightning would take the number of Slurm's tasks, of which this process is one, for that of the workers.
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "NODE_RANK": "0",
    }
    workers = [Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(processes)]

    def pass_on(number: int, _: Any) -> None:
        for worker in workers:
            worker.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        statuses = _wait(workers)
    finally:
        signal.signal(signal.SIGTERM, before)
        for worker in workers:
            worker.kill()
    if message.is_file():
        raise UserError(message.read_text())
    if {SIGTERM_EXIT, -signal.SIGTERM} & set(statuses):
        sys.exit(SIGTERM_EXIT)
    if any(statuses):
        raise UserError(f"Training in {processes} processes failed (exit statuses {statuses}): see the messages above.")


def _wait(workers: list[Popen]) -> list[int]:
    """The exit statuses. Once one worker has failed the others, which wait for it, are ended after a while."""
    deadline = float("inf")
    while any(worker.poll() is None for worker in workers):
        if any(worker.poll() for worker in workers):
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if time.monotonic() > deadline:
            for worker in workers:
                worker.kill()
        time.sleep(0.05)
    return [worker.wait() for worker in workers]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
