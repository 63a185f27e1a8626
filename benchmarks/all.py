"""Run the benchmarks one after another, each as a command of its own, and fill in docs/speed.md.

Run as: python -m benchmarks.all --device cpu      about two hours on two quiet cores, 23 GB
        python -m benchmarks.all --device cuda     at most --minutes (default 9), the most telling ones first
        ... --only op,step                         some of them

One that fails or runs out of time takes no other down, and keeps the rows that it has written. On a GPU nothing is
fetched: the models there have random weights.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import common

# name -> arguments, and the most minutes it may take.
CPU: dict[str, tuple[str, float]] = {
    "op": ("linear_kl", 60),
    "step": ("step", 20),
    "data": ("data", 10),
    "long_context": ("long_context --official", 15),
    "sweep": ("sweep", 90),
    "evaluation": ("evaluation", 40),
    "full_finetuning": ("full_finetuning", 15),
    "dialogues": ("dialogues", 30),
    "serial_jobs": ("serial_jobs", 40),
}
_T = (1024, 4096, 16384)
_OP_SHAPES = ",".join(f"{t}x{v}x{d}" for v, d in ((151_936, 896), (49_152, 576)) for t in _T)
_MORE_SHAPES = ",".join(f"{t}x{v}x{d}" for v, d in ((151_936, 896), (49_152, 576)) for t in (2048, 8192))
_QWEN = "step --model random:qwen2.5-0.5b --examples 1 --rounds 7 --seconds 20"
CUDA: dict[str, tuple[str, float]] = {
    "op": (f"linear_kl --dtypes bf16 --rounds 21 --seconds 5 --shapes {_OP_SHAPES}", 6),
    "step": (f"{_QWEN} --contexts 2048,8192,32768", 4),
    "full_finetuning": ("full_finetuning --model random:qwen2.5-1.5b --context 2048 --examples 1", 3),
    "op_more": (f"linear_kl --dtypes bf16 --rounds 21 --seconds 5 --shapes {_MORE_SHAPES}", 4),
    "op_float32": ("linear_kl --dtypes float32 --rounds 11 --seconds 5 --shapes 4096x151936x896,2048x49152x576", 3),
    "step_long": (f"{_QWEN} --contexts 16384,32768 --checkpointing", 3),
}
_OWN_FILE = {"op_more", "op_float32", "step_long"}


def command(name: str, arguments: argparse.Namespace) -> list[str]:
    plan = CPU if arguments.device == "cpu" else CUDA
    text = plan[name][0]
    folder = Path(arguments.results)
    stem = text.split()[0] + (f"_{name.split('_', 1)[1]}" if name in _OWN_FILE else "")
    out = folder / f"{stem}-{arguments.device}{'-quick' if arguments.quick else ''}.json"
    quick = ["--quick"] if arguments.quick else []
    module, *rest = shlex.split(text)
    return [
        sys.executable, "-m", f"benchmarks.{module}", *rest, *quick, "--device", arguments.device, "--out", str(out)
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.all", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--only", type=common.names, default=None, help="names of the parts")
    parser.add_argument("--results", default=str(common.RESULTS), help="folder for the JSON files")
    parser.add_argument("--minutes", type=float, default=None, help="for everything; default 9 on cuda, none on cpu")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    arguments = parser.parse_args(argv)
    plan = CPU if arguments.device == "cpu" else CUDA
    chosen = arguments.only or tuple(plan)
    if unknown := set(chosen) - set(plan):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(plan)}")
    minutes = arguments.minutes or (9.0 if arguments.device == "cuda" else float("inf"))
    ends = time.monotonic() + 60 * minutes
    failed = []
    for name in chosen:
        line = command(name, arguments)
        print(f"== {name}: {shlex.join(['python', *line[1:]])}", flush=True)
        if arguments.dry_run:
            continue
        left = min(60 * plan[name][1], ends - time.monotonic())
        if left < 20:
            failed.append(f"{name} (no time left)")
            continue
        began = time.monotonic()
        try:
            status: int | str = subprocess.run(line, timeout=left, check=False).returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {left:.0f} s"
        print(f"== {name}: {time.monotonic() - began:.0f} s, {status or 'well'}", flush=True)
        if status:
            failed.append(f"{name} ({status})")
    if failed:
        raise SystemExit(f"not whole: {', '.join(failed)}")


if __name__ == "__main__":
    main()
