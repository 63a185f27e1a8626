"""Commands in processes of their own that need not import everything again: forked from one that has.

A fresh interpreter takes seconds to import torch, transformers and Lightning, and tests that kill and resume start
many. `Warm` has the part of subprocess.Popen's interface that they need; the process has its own memory, signals and
exit status, as any other.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from selfaug.run import launch

PRELOADED = [
    "torch", "torch.distributed.fsdp", "transformers", "transformers.models.llama.modeling_llama", "peft", "lightning",
    "torchmetrics", "hydra", "selfaug.train", "selfaug.run.fit", "selfaug.run.score", "selfaug.run.worker",
    "selfaug.dialogues",
]  # fmt: skip
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOADED)


class Warm:
    """`python -m MODULE ARGUMENTS`, started as subprocess.Popen would, without the imports.

    stdout, stderr: subprocess.PIPE to have them from communicate(), else they go where the tests' own go.
    """

    def __init__(self, command: list[str], *, env: dict[str, str], cwd: Path | None = None, stdout: int | None = None):
        assert command[:2] == [sys.executable, "-m"]
        self._outputs = tempfile.TemporaryDirectory() if stdout == subprocess.PIPE else None
        place = self._outputs and self._outputs.name
        self._process = _CONTEXT.Process(target=_run, args=(command[2:], env, str(cwd or Path.cwd()), place))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a command of a test", timeout or 0.0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        if self._outputs is None:
            return "", ""
        out, err = (Path(self._outputs.name, str(number)).read_text() for number in (1, 2))
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _run(command: list[str], environment: dict[str, str], directory: str, place: str | None) -> None:
    """In the forked process."""
    # As in a terminal: where the tests themselves run in the background, a shell has told them to ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (1, 2) if place else ():
        os.dup2(os.open(f"{place}/{number}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    launch.Popen = Warm  # type: ignore[misc, assignment]
    sys.argv = ["", *command[1:]]
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
