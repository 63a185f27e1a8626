"""One example of 64K tokens with a sampled quarter of its rows, within 24 GiB, where the official way cannot.

Run as: python -m benchmarks.long_context [--tokens 65536] [--limit-gib 24] [--official]

A random model of two layers with a vocabulary of 49,152, so that nearly all there is to see is the loss. Every mode
runs in a process that cannot have more private memory than the limit, or than the machine can give. --official lets
the official way try, and reports how it fails; what its logits need is worked out in any case.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks import common
from benchmarks.common import Column, Row, value
from benchmarks.models import RANDOM, SHAPES, model_folder
from benchmarks.step import Training
from selfaug import processor

GIB = 2**30
# Float32 [T, V] tensors that are alive at once in the official computation, as benchmarks.linear_kl measures it: logits
# of both, log-softmax, the masked copies of it and of the softmax, and three inside torch's kl_div.
OFFICIAL_TENSORS = 8
MODES = ("plain", "sampling", "selfaug", "official")
COLUMNS = (
    Column("tokens", value("context", "{:,}")),
    Column("mode", value("implementation")),
    Column("limit, GiB", value("limit_bytes", "{:.0f}", 1 / GIB)),
    Column("logits would take, GiB", value("logit_bytes", "{:.0f}", 1 / GIB)),
    Column("s / step", value("seconds", "{:.1f}")),
    Column("peak, GiB", value("total_bytes", "{:.2f}", 1 / GIB)),
    Column("outcome", value("outcome")),
)


def one_step(mode: str, folder: str, model: str, tokens: int, device: str) -> Row:
    """Time and memory of the second step on one example of `tokens` tokens."""
    training = Training(folder, model, tokens, 1, device, checkpointing=False)
    training.step(mode)
    seconds: list[float] = []
    peak = common.peak_memory(lambda: seconds.append(common.stopwatch(lambda: training.step(mode), device)), device)
    return {"seconds": seconds[0], "total_bytes": peak.total, "extra_bytes": peak.extra, "outcome": "trained"}


def measure(folder: str, arguments: argparse.Namespace) -> list[Row]:
    """One row for each mode. The official way, if it is not to try, says what it needs."""
    vocabulary = SHAPES[arguments.model.removeprefix(RANDOM)].vocab_size
    limit = min(int(arguments.limit_gib * GIB), common.memory_limit(arguments.device) or 2**63)
    logits = arguments.tokens * vocabulary * 4
    rows = []
    for mode in arguments.only:
        row: Row = {"context": arguments.tokens, "implementation": mode, "limit_bytes": limit}
        if mode == "official":
            row["logit_bytes"] = OFFICIAL_TENSORS * logits
            if not arguments.official:
                rows.append(row | {"outcome": "not tried (--official)"})
                continue
        found, why = common.in_process(
            one_step, mode, folder, arguments.model, arguments.tokens, arguments.device,
            limit_bytes=limit if arguments.device == "cpu" else None, fresh=not arguments.quick,
        )  # fmt: skip
        rows.append(row | (found or {"outcome": why, "why": why}))
        print(f"  {mode}: {why or 'trained'}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    processor.tune()  # as selfaug.train does, for everything that is compared
    parser = common.parser(__doc__, "long_context")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--limit-gib", type=float, default=24.0)
    parser.add_argument("--model", default=f"{RANDOM}two-layers", help="random:SHAPE (benchmarks/models.py)")
    parser.add_argument("--only", type=common.names, default=MODES, help=", ".join(MODES))
    parser.add_argument("--official", action="store_true", help="let the official way try")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.tokens, arguments.model = 256, f"{RANDOM}tiny"
    if unknown := set(arguments.only) - set(MODES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as work:
        rows = measure(model_folder(arguments.model, Path(work)), arguments)
    common.show(f"{arguments.model} on {arguments.device}", rows, COLUMNS)
    common.write(common.out_path(arguments, "long_context"), "long_context", arguments, rows)


if __name__ == "__main__":
    main()
