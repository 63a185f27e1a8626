"""Untrusted programs: each in a process of its own that can compute, and write in its own folder, and nothing else.

For benchmarks whose answers are programs (HumanEval). `sandbox_child.py` builds the walls and runs the program; this
file starts it, watches the clock and the folder, and reads the verdict.

A program passes if it ran to its last line. Leaving before that, however politely, does not pass: only then does the
child answer a secret that this side has drawn. The program and its tests share one interpreter, as in the official
harness, so a program written against its own tests (an object equal to everything) or against this very file (reading
the process's memory) can still get a pass it has not earned; what it cannot get is out.

What is different from running it by hand: the standard library only, no threads, no processes, no sockets (asyncio
included), no folders inside its folder, hashes not randomised so that the verdict is the same each time.
"""

import contextlib
import functools
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from selfaug.errors import UserError

# Never imported here: it is for Linux only.
CHILD = Path(__file__).with_name("sandbox_child.py")
SECRET_BYTES = 32
# Of all files of one program together. Looked at every so many seconds, so it can be passed for a moment.
FOLDER_BYTES = 64 << 20
FOLDER_FILES = 1000
GLANCE_SECONDS = 0.05
_NOT_CONTAINED = "not contained: "


@dataclass(frozen=True)
class Outcome:
    """How a program ended. reason: "passed", "failed: <exception>", "ended before its last line", "timed out", "out of
    memory", "out of disk" or "killed: <signal>"."""

    passed: bool
    reason: str


def run_program(program: str, *, seconds: float = 10.0, memory_bytes: int = 1 << 30) -> Outcome:
    """Runs a program with its tests, contained.

    Args:
        program: Python source; its tests stand at its end and raise where they fail.
        seconds: of the clock, from the start of the interpreter on (about 0.05 s).
        memory_bytes: of address space, beside what the interpreter takes itself.

    Raises:
        UserError: this machine cannot contain programs; it has not been run.
    """
    if sys.platform != "linux":
        raise _refusal(f"it runs {sys.platform}")
    secret = secrets.token_hex(SECRET_BYTES // 2)
    # -P: the folder of the script, this package, must not hide modules of the standard library; -S, -s: no installed
    # packages; -B: no attempt to write bytecode.
    flags = ["-P", "-S", "-s", "-B", "-X", "utf8"]
    with tempfile.TemporaryDirectory(prefix="selfaug-") as folder:
        child = subprocess.Popen(
            [sys.executable, *flags, str(CHILD), *map(str, (SECRET_BYTES, seconds, memory_bytes, os.getpid()))],
            cwd=folder,
            env={"PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        with child.stdin, child.stdout:
            try:
                # A child that could not start reads nothing. Surrogates: the child refuses them, and that is a verdict.
                with contextlib.suppress(BrokenPipeError):
                    child.stdin.write(secret.encode() + program.encode(errors="surrogatepass"))
                    child.stdin.close()
                stopped = _watch(child, Path(folder), time.monotonic() + seconds)
            finally:
                child.kill()
                status = child.wait()
            # The process is gone, and it had no others: what it wrote is in the pipe. A verdict fits one read.
            answer = os.read(child.stdout.fileno(), 4096).decode(errors="replace")
    reason = stopped or _reason(answer, secret, status)
    if reason.startswith(_NOT_CONTAINED):
        raise _refusal(reason.removeprefix(_NOT_CONTAINED))
    return Outcome(reason == "passed", reason)


def run_programs(
    programs: Sequence[str],
    *,
    processes: int | None = None,
    progress: bool = True,
    seconds: float = 10.0,
    memory_bytes: int = 1 << 30,
) -> list[Outcome]:
    """`run_program` of each, in their order; `processes` at a time, by default as many as there are cores.

    Raises:
        UserError: this machine cannot contain programs.
    """
    check_sandbox()
    run = functools.partial(run_program, seconds=seconds, memory_bytes=memory_bytes)
    # Threads: they only wait.
    pool = ThreadPoolExecutor(processes or len(os.sched_getaffinity(0)))
    try:
        bar = tqdm(pool.map(run, programs), total=len(programs), desc="programs", disable=not progress)
        return list(bar)
    finally:
        # Interrupted, those that wait for a process are not started any more.
        pool.shutdown(cancel_futures=True)


@functools.cache
def check_sandbox() -> None:
    """Tries the walls from inside, once per process.

    Raises:
        UserError: this machine cannot contain programs.
    """
    with tempfile.NamedTemporaryFile(prefix="selfaug-") as outside:
        outcome = run_program(_PROBE.format(outside=outside.name), seconds=60)
    if not outcome.passed:
        raise _refusal(f"a harmless probe ended with: {outcome.reason}")


# What a program needs must be there, and what it must not do must be refused.
_PROBE = """
import datetime, decimal, hashlib, os, random, socket, zlib
with open("own", "w") as file:
    file.write("own")
for attempt in (lambda: open({outside!r}, "a"), lambda: open("/proc/self/status"), socket.socket, os.fork):
    try:
        attempt()
    except PermissionError:
        continue
    raise RuntimeError("not refused")
"""


def _watch(child: subprocess.Popen[bytes], folder: Path, deadline: float) -> str | None:
    """Waits for the end of the child; the reason to stop it, if there is one."""
    while True:
        remaining = deadline - time.monotonic()
        try:
            child.wait(max(0.0, min(GLANCE_SECONDS, remaining)))
            return None
        except subprocess.TimeoutExpired:
            if remaining <= 0:
                return "timed out"
        if _too_full(folder):
            return "out of disk"


def _too_full(folder: Path) -> bool:
    used = 0
    with os.scandir(folder) as entries:
        for number, entry in enumerate(entries):
            with contextlib.suppress(FileNotFoundError):  # the program deletes while we count
                used += entry.stat(follow_symlinks=False).st_blocks * 512
            if used > FOLDER_BYTES or number >= FOLDER_FILES:
                return True
    return False


def _reason(answer: str, secret: str, status: int) -> str:
    """status: as Popen has it, negative for a signal."""
    if status == 0 and answer.startswith(secret):
        return answer.removeprefix(secret)
    if status < 0:
        return f"killed: {signal.strsignal(-status)}"
    return "ended before its last line"


def _refusal(why: str) -> UserError:
    return UserError(
        "evaluation.retention.run_code=true runs programs only where they can be contained, and this machine cannot "
        f"({why}): set evaluation.retention.run_code=false, or run on Linux, x86_64 or aarch64, with a "
        "kernel that has Landlock (5.13 or later) and seccomp."
    )
