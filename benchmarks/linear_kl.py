"""The KL op: time, memory and accuracy against the bare products and against everything else that computes it.

Run as: python -m benchmarks.linear_kl [--shapes 2048x49152x576,4096x151936x896] [--dtypes float32,bf16] [--only NAMES]

floor: the three matrix products alone (best chunk size of a few); ratios are to it. Errors are against float64 on the
first 128 rows. Memory is what the peak lies above the inputs.
"""

import argparse
import json
import re
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import MEGABYTES, Column, Row, value, with_range
from benchmarks.peers import IMPLEMENTATIONS, Run, errors, exact, make_problem
from selfaug import processor

DTYPES = ("float32", "bf16", "autocast")
COLUMNS = (
    Column("T, V, d", value("case")),
    Column("dtype", value("dtype")),
    Column("implementation", value("implementation")),
    Column("chunk", value("chunk")),
    Column("ms (quartiles)", with_range("seconds", "{:.1f}", 1000)),
    Column("of the floor", with_range("ratio", "{:.2f}")),
    Column("official / this", value("speedup", "{:.2f}")),
    Column("extra MB", value("extra_bytes", "{:,.0f}", MEGABYTES)),
    Column("of official's", value("memory_share", "{:.1%}")),
    Column("value error", value("value_error_relative", "{:.0e}")),
    Column("gradient error", value("gradient_error", "{:.0e}")),
)
# Rows on which errors are taken: the float64 logits of these must fit.
_ERROR_ROWS = 128

Shape = tuple[int, int, int]


def alone(name: str, shape: Shape, dtype: str, device: str) -> Row:
    """What an implementation shows in a process of its own: its best chunk size, errors and peak memory."""
    implementation = IMPLEMENTATIONS[name]
    rows, vocabulary, width = shape
    found: Row = {"chunk": None}
    if name != "floor":
        small = make_problem(min(rows, _ERROR_ROWS), vocabulary, width, dtype, device)
        found |= errors(small, implementation.build(small, 64), exact(small))
        del small
    problem = make_problem(rows, vocabulary, width, dtype, device)
    choices = sorted({min(chunk, rows) for chunk in implementation.chunks.get(device, (rows,))})
    timed: list[tuple[float, int]] = []
    for chunk in choices:
        run = implementation.build(problem, chunk)
        run()
        if len(choices) > 1:
            timed.append((min(common.stopwatch(run, device) for _ in range(2)), chunk))
        del run
    best = min(timed)[1] if timed else choices[0]
    if implementation.chunks:
        found["chunk"] = best
    holder: list[Run] = []

    def call() -> None:  # building it is a part of what it takes: its buffers
        holder.append(implementation.build(problem, best))
        holder[0]()

    problem.hidden.grad = None
    return found | {"extra_bytes": common.peak_memory(call, device).extra}


def together(
    chunks: dict[str, int], shape: Shape, dtype: str, device: str, rounds: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of all implementations, in turns; and why those failed that need more than the others leave."""
    problem = make_problem(*shape, dtype, device)
    runs: dict[str, Run] = {}
    failed: dict[str, str] = {}
    for name, chunk in chunks.items():
        try:
            run = IMPLEMENTATIONS[name].build(problem, chunk)
            run()
            runs[name] = run
        except Exception as error:
            failed[name] = common.reason(error)
    return common.interleaved(runs, rounds=rounds, device=device, seconds=seconds), failed


def measure(shape: Shape, dtype: str, arguments: argparse.Namespace) -> list[Row]:
    """One row for each implementation."""
    device, fresh = arguments.device, arguments.device == "cpu" and not arguments.quick
    rows: dict[str, Row] = {}
    for name in arguments.only:
        row: Row = {"case": ", ".join(map(str, shape)), "dtype": dtype, "implementation": name}
        found, why = common.in_process(
            alone, name, shape, dtype, device, limit_bytes=common.memory_limit(device), fresh=fresh
        )
        rows[name] = row | (found or {"why": why})
        print(f"  {name}: {why or 'ready'}", flush=True)
    chunks = {name: row.get("chunk") or shape[0] for name, row in rows.items() if "why" not in row}
    answer, why = common.in_process(
        together, chunks, shape, dtype, device, arguments.rounds, arguments.seconds,
        limit_bytes=common.memory_limit(device), fresh=fresh,
    )  # fmt: skip
    nothing: tuple[dict[str, list[float]], dict[str, Any]] = ({}, dict.fromkeys(chunks, why))
    times, failed = answer or nothing
    for name, message in failed.items():
        rows[name]["why"] = f"timing: {message}"
    official = times.get("official")
    for name, columns in common.time_columns(times, "floor").items():
        rows[name] |= columns
        if official:
            rows[name]["speedup"] = common.median_ratio(official, times[name])
    theirs = rows.get("official", {}).get("extra_bytes")
    for row in rows.values():
        if theirs and row.get("extra_bytes") is not None:
            row["memory_share"] = row["extra_bytes"] / theirs
    return list(rows.values())


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, "linear_kl")
    parser.add_argument(
        "--shapes", default="2048x49152x576,2048x151936x896,4096x151936x896", help="TxVxd, several with commas"
    )
    parser.add_argument("--dtypes", type=common.names, default=("float32", "bf16"), help=", ".join(DTYPES))
    parser.add_argument("--only", type=common.names, default=tuple(IMPLEMENTATIONS), help="implementations")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=300, help="stop a case after so long, but not before 3 rounds")
    parser.add_argument("--keep", action="store_true", help="keep what the file holds about other cases")
    parser.add_argument("--huge-pages", action="store_true", help="as selfaug.train sets it, not as PyTorch does")
    arguments = parser.parse_args(argv)
    if arguments.huge_pages:
        processor.tune()
    if arguments.quick:
        arguments.shapes, arguments.rounds = "64x1000x32", 3
    unknown = (set(arguments.only) - set(IMPLEMENTATIONS)) | (set(arguments.dtypes) - set(DTYPES))
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if not all(re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", text) for text in arguments.shapes.split(",")):
        parser.error(f"--shapes {arguments.shapes} is not of the form TxVxd: write 2048x49152x576, several with commas")
    out = common.out_path(arguments, "linear_kl")
    rows: list[Row] = json.loads(out.read_text())["rows"] if arguments.keep and out.exists() else []
    for text in arguments.shapes.split(","):
        shape: Any = tuple(int(part) for part in text.split("x"))
        for dtype in arguments.dtypes:
            print(f"T, V, d = {shape}, {dtype}", flush=True)
            case, why = common.in_process(measure, shape, dtype, arguments, fresh=arguments.device == "cuda")
            if why:
                raise SystemExit(f"{text} in {dtype} failed: {why}")
            common.show(f"{text} {dtype} on {arguments.device}", case, COLUMNS[2:])
            rows = [row for row in rows if (row["case"], row["dtype"]) != (case[0]["case"], dtype)] + case
            common.write(out, "linear_kl", arguments, rows)  # after every case: a long run that is cut short counts


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
