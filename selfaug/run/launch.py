"""Several processes: torchrun starts them on a small worker, so that only one process ever runs Hydra.

Lightning's own launcher would start `python -m selfaug.train` again for every further process, and each would compose
the configuration, make directories and, in a sweep, start a second job.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from selfaug.errors import UserError
from selfaug.run.fit import SIGTERM_EXIT


def inside_launcher() -> bool:
    """Whether somebody (torchrun, srun) has started this process as one of several."""
    return "LOCAL_RANK" in os.environ or "SLURM_PROCID" in os.environ


def launch_workers(run_directory: Path, processes: int) -> None:
    """Run `python -m selfaug.run.worker RUN_DIRECTORY` in so many processes and wait for them.

    Raises UserError with the last lines of the first failing worker's message where it failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["--module", "selfaug.run.worker", str(run_directory)]
    message = run_directory / "worker-error.txt"
    message.unlink(missing_ok=True)
    # On a CPU the processes share the cores instead of each taking all.
    threads = str(max(len(os.sched_getaffinity(0)) // processes, 1))
    with subprocess.Popen(command, env={"OMP_NUM_THREADS": threads, **os.environ}) as workers:
        before = signal.signal(signal.SIGTERM, lambda *_: workers.send_signal(signal.SIGTERM))
        try:
            status = workers.wait()
        except BaseException:
            workers.terminate()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if message.is_file():
        raise UserError(message.read_text())
    if status in (SIGTERM_EXIT, -signal.SIGTERM):
        sys.exit(SIGTERM_EXIT)
    if status != 0:
        raise UserError(f"Training in {processes} processes failed (exit status {status}): its messages are above.")
