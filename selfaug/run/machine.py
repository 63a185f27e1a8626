"""How much memory there is, and how much of it this process has."""

import contextlib
import ctypes
import gc
import platform
from pathlib import Path

import psutil
import torch

GB = 10**9

# What a device's allocator takes for what lives in it. CUDA's rounds and splits. glibc's heap grows by half, because it
# cannot put a new aligned block into the hole that an old one of the same size has left (blocks over 32 MiB are mapped
# one by one instead); measured with SmolLM2 in micro-batches of 256 to 4096 tokens.
_ALLOCATED = {"cuda": 1.05, "glibc": 1.5}


def heap_factor(device: torch.device) -> float:
    """From the bytes of the tensors that live on `device` to the bytes that they take there."""
    return _ALLOCATED.get("cuda" if device.type == "cuda" else platform.libc_ver()[0], 1.1)


def resident_bytes(device: torch.device) -> int:
    """What this process has: of a GPU its tensors, of the host everything."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def room(device: torch.device, processes: int = 1) -> int | None:
    """Bytes that this process, one of so many on the machine, can still have on `device`; None where that is not
    known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    free = psutil.virtual_memory().available
    limit = container_room()
    return (free if limit is None else min(free, limit)) // processes


def container_room(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes left below the tightest memory limit of this process's control groups, of version 1 or 2; None: no limit.

    Cached files count as free. A path that is not there is one of the machine's, seen from a container: what the
    container sees as the root is then its own.
    """
    rooms = []
    for line in _text(groups).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, names, files = (
            (root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file ")
            if controllers
            else (root, ("memory.max", "memory.current"), "inactive_file ")
        )
        place = base / path.strip("/")
        for directory in (place, *place.parents):
            limit, used = (_text(directory / name).strip() for name in names)
            if limit.isdecimal() and used.isdecimal():
                cached = [s.split()[1] for s in _text(directory / "memory.stat").splitlines() if s.startswith(files)]
                rooms.append(int(limit) - int(used) + int(cached[0] if cached else 0))
            if directory == base:
                break
    return max(min(rooms), 0) if rooms else None


def reset_peak() -> None:
    """Begin to measure `peak_bytes` anew: an earlier job of a sweep may have had more."""
    free_unused()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # of the resident set, on Linux


def peak_bytes(device: torch.device) -> int | None:
    """The most that this process has had since `reset_peak`: of a GPU its tensors, of the host everything. None where
    the machine does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = next((line for line in _text(Path("/proc/self/status")).splitlines() if line.startswith("VmHWM:")), None)
    return None if peak is None else int(peak.split()[1]) * 1024


def free_unused() -> None:
    """Give memory that nothing uses back to the machine, which glibc and CUDA's allocator keep for themselves."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
