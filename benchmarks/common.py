"""How everything here is measured, shown and written.

Time: implementations take turns, round by round and in a new order each round, in one process. A machine that slows
down slows all of them, so what is compared is the ratio to the yardstick *of the same round*, and the median of these
ratios. Memory: on a CPU every measurement has a process of its own, so that nothing that another one left behind
counts, and one that runs out of memory takes no other down. On a GPU, whose allocator knows exactly what is in use,
every case (a shape, a context length) has one.
"""

import argparse
import ctypes
import datetime
import gc
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from selfaug.reporting.results import code_version

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


class Unavailable(Exception):
    """This implementation cannot run here; the text says why."""


# ---- time --------------------------------------------------------------------------------------------------------


def interleaved(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int, device: str, seconds: float = float("inf")
) -> dict[str, list[float]]:
    """Wall-clock seconds of each call, by round. Stops after `rounds`, or after `seconds` but not before 3 rounds.

    The calls must have been warmed up. The order within a round is drawn anew, the same in every run.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for number in range(rounds):
        for name in random.Random(number).sample(list(calls), len(calls)):
            times[name].append(stopwatch(calls[name], device))
        if number >= 2 and time.perf_counter() - began > seconds:
            break
    return times


def stopwatch(call: Callable[[], Any], device: str) -> float:
    """Seconds that `call` takes, until the device has finished."""
    _synchronise(device)
    began = time.perf_counter()
    call()
    _synchronise(device)
    return time.perf_counter() - began


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_columns(times: Mapping[str, list[float]], yardstick: str) -> dict[str, Row]:
    """By name: seconds (median, minimum, quartiles), and the same of the ratios to `yardstick` round by round."""
    columns = {}
    for name, mine in times.items():
        ratios = [a / b for a, b in zip(mine, times[yardstick], strict=True)] if yardstick in times else []
        columns[name] = {
            "rounds": len(mine),
            "seconds": statistics.median(mine),
            "seconds_min": min(mine),
            "seconds_quartiles": quartiles(mine),
            "ratio": statistics.median(ratios) if ratios else None,
            "ratio_quartiles": quartiles(ratios) if ratios else None,
            "ratio_of_minima": min(mine) / min(times[yardstick]) if ratios else None,
        }
    return columns


def quartiles(values: Sequence[float]) -> list[float]:
    """[lower, upper] quartile; the value itself where there is only one."""
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


# ---- memory ------------------------------------------------------------------------------------------------------


class Peak(NamedTuple):
    """Bytes at the peak of a call: above what was there before it, and in all. None where it cannot be measured."""

    extra: int | None
    total: int | None


def peak_memory(call: Callable[[], Any], device: str) -> Peak:
    """On a GPU what PyTorch allocated; on a CPU the resident set, whose high-water mark Linux lets us reset."""
    gc.collect()
    if device == "cuda":
        _synchronise(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        _synchronise(device)
        total = torch.cuda.max_memory_allocated()
        return Peak(total - before, total)
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed but kept would hide a part of the peak
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        call()
        return Peak(None, None)
    before = _status("VmRSS")
    call()
    total = _status("VmHWM")
    return Peak(max(total - before, 0), total)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def available_memory() -> int | None:
    """Bytes that this machine could still give; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


# ---- processes ---------------------------------------------------------------------------------------------------


def in_process(
    function: Callable[..., Any], *arguments: Any, limit_bytes: int | None = None, fresh: bool = True
) -> tuple[Any, str | None]:
    """function(*arguments) in a fresh process: (result, None), or (None, why it failed).

    limit_bytes: of the private memory (heap and anonymous maps) of that process, beyond which allocations fail there
    instead of the whole machine. Linux only, and not for CUDA, whose driver reserves more than it uses.
    fresh: False stays in this process, without a limit: for --quick, where starting processes takes the longest.
    """
    if not fresh:
        answer = _attempt(function, arguments, None)
        if torch.cuda.is_initialized():
            gc.collect()
            torch.cuda.empty_cache()
        return answer
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, function, arguments, limit_bytes))
    process.start()
    theirs.close()
    try:
        result, why = ours.recv()
    except EOFError:
        process.join()
        result, why = None, f"its process ended with status {process.exitcode}, most likely for want of memory"
    process.join()
    return result, why


def _run(pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...], limit_bytes: int | None) -> None:
    pipe.send(_attempt(function, arguments, limit_bytes))


def _attempt(
    function: Callable[..., Any], arguments: tuple[Any, ...], limit_bytes: int | None
) -> tuple[Any, str | None]:
    try:
        if limit_bytes is not None and sys.platform == "linux":
            import resource

            resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
        return function(*arguments), None
    except Exception as error:
        return None, reason(error, limit_bytes)


def reason(error: BaseException, limit_bytes: int | None = None) -> str:
    """One line on why something did not run."""
    text = str(error).strip().split("\n")[0]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        return "out of memory" + (f" at a limit of {limit_bytes / 2**30:.1f} GiB" if limit_bytes else "")
    return text if isinstance(error, Unavailable) else f"{type(error).__name__}: {text}"[:200]


# ---- tables and files --------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """One column of a table: its title, and how a row's cell reads."""

    title: str
    cell: Callable[[Row], str]


def value(key: str, form: str = "{}", factor: float = 1.0) -> Callable[[Row], str]:
    """A cell with row[key] * factor; a dash where there is none."""

    def cell(row: Row) -> str:
        found = row.get(key)
        if found is None:
            return "–"
        return form.format(found if factor == 1.0 else found * factor)

    return cell


def with_range(key: str, form: str, factor: float = 1.0) -> Callable[[Row], str]:
    """A median with its quartiles: "1.08 (1.05–1.11)"."""

    def cell(row: Row) -> str:
        if row.get(key) is None:
            return "–"
        low, high = (form.format(q * factor) for q in row[f"{key}_quartiles"])
        return f"{form.format(row[key] * factor)} ({low}–{high})"

    return cell


MEGABYTES = 1e-6


def cells(rows: Sequence[Row], columns: Sequence[Column]) -> list[list[str]]:
    """The text of every cell; of what did not run, the last cell says why."""
    table = []
    for row in rows:
        texts = [column.cell(row) for column in columns]
        if row.get("why"):
            texts[-1] = row["why"]
        table.append(texts)
    return table


def show(title: str, rows: Sequence[Row], columns: Sequence[Column]) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column.title, overflow="fold")
    for texts in cells(rows, columns):
        table.add_row(*texts)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def write(path: str | Path, benchmark: str, arguments: argparse.Namespace, rows: Sequence[Row]) -> None:
    """All of a benchmark's results as JSON, with what they were measured on."""
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    content = {
        "benchmark": benchmark,
        "machine": machine(getattr(arguments, "device", "cpu")),
        "settings": settings,
        "rows": list(rows),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    print(f"Results: {path}")


def machine(device: str) -> Row:
    """What the figures depend on; no names of hosts or users."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "selfaug": code_version(),
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line for line in lines if line.startswith("flags")), "")
    extras = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag} " in f"{flags} "]
    return f"{name} ({', '.join(extras)})" if extras else name


def parser(about: str | None, name: str) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    flags = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all? The figures mean nothing")
    flags.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    flags.add_argument("--out", default=None, help=f"JSON file; default benchmarks/results/{name}-DEVICE.json")
    return flags


def numbers(text: str) -> tuple[int, ...]:
    """A list of whole numbers as an argument: 2048,4096."""
    return tuple(int(part) for part in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """A list of names as an argument."""
    return tuple(part.strip() for part in text.split(","))


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of above / below, round by round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def out_path(arguments: argparse.Namespace, name: str) -> Path:
    """Where the results go. A --quick run never overwrites figures that mean something."""
    if arguments.out:
        return Path(arguments.out)
    return RESULTS / f"{name}-{arguments.device}{'-quick' if arguments.quick else ''}.json"


def memory_limit(device: str, share: float = 0.95) -> int | None:
    """What a process on this CPU may take before its allocations fail."""
    free = available_memory()
    return None if device != "cpu" or free is None else int(share * free)
