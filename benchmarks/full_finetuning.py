"""Full fine-tuning with alignment: what the reference takes in memory, as a second model or as a cache on disk.

Run as: python -m benchmarks.full_finetuning [--model asset:smollm2-135m-instruct] [--context 512] [--examples 2]
        python -m benchmarks.full_finetuning --device cuda --model random:qwen2.5-1.5b --context 2048

plain: NLL alone, head frozen as in the others. copy: KL to a frozen copy of the base model. cache: KL to states that
were kept on disk before the first step. Every example has `context` tokens, the last 32 of them the response; float32
weights under bf16 autocast, AdamW. Peaks are of one optimiser step, each in a process of its own; the gradients of copy
and cache are compared in one.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import MEGABYTES, Column, Row, value
from benchmarks.models import contexts, model_folder
from selfaug import processor
from selfaug.model.cache import CachedReference
from selfaug.model.decoder import Decoder
from selfaug.model.entries import DiskEntries
from selfaug.model.frozen_copy import FrozenCopy
from selfaug.model.full import FullFineTuning
from selfaug.model.load import load_base
from selfaug.model.reference import Reference
from selfaug.objective import LogitAlignment, Objective, TokenBatch
from selfaug.objective.batch import IGNORE

MODES = ("plain", "copy", "cache")
ALPHA, RESPONSE = 0.5, 32
COLUMNS = (
    Column("reference", value("implementation")),
    Column("peak MB", value("total_bytes", "{:,.0f}", MEGABYTES)),
    Column("above plain, MB", value("above_plain_bytes", "{:,.0f}", MEGABYTES)),
    Column("of the weights as the copy stores them", value("of_a_copy", "{:.2f}")),
    Column("gradient differs from copy's by", value("gradient_error", "{:.1e}")),
)


class Training:
    """A model whose weights all train but the head's, a batch, an optimiser; `step()` trains on the batch once."""

    def __init__(self, mode: str, folder: str, name: str, context: int, examples: int, device: str, work: str):
        self.device = device
        model = FullFineTuning(freeze="head").apply(load_base(folder, dtype="float32"))
        reference: Reference | None = None
        if mode == "copy":
            reference = FrozenCopy(lambda: load_base(folder, dtype="auto", mixed=True))
        elif mode == "cache":
            reference = CachedReference(DiskEntries(Path(work)))
        self.objective = Objective({} if mode == "plain" else {"kl": LogitAlignment(ALPHA)}, reference)
        self.objective.check(model)
        self.decoder = Decoder(model.to(device))
        ids = contexts(name, len(self.decoder.head.arguments()["weight"]), examples, context).to(device)
        labels = ids.clone()
        labels[:, : -min(RESPONSE, context // 2)] = IGNORE
        self.batch = TokenBatch.from_labels(ids, torch.ones_like(ids), labels)
        if isinstance(reference, CachedReference):
            with torch.autocast(device, torch.bfloat16):
                reference.fill(self.decoder, [self.batch], progress=False)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)

    def backward(self) -> None:
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.objective(self.decoder, self.batch, self.objective.count(self.batch)).loss
        loss.backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def peak(mode: str, *arguments: Any) -> Row:
    """Peak memory of a step; the step before it makes the optimiser's state."""
    training = Training(mode, *arguments)
    training.step()
    found = common.peak_memory(training.step, training.device)
    copied = load_base(arguments[0], dtype="auto", mixed=True)  # as the copy stores it
    return {"total_bytes": found.total, "copy_bytes": sum(p.nbytes for p in copied.parameters())}


def gradient_error(*arguments: Any) -> float:
    """After one step: ||gradient with the cache - gradient with the copy|| / ||gradient with the copy||."""
    gradients = []
    for mode in ("copy", "cache"):
        training = Training(mode, *arguments)
        with torch.no_grad():  # away from the base model, the same way in both
            torch.manual_seed(0)
            for parameter in training.trained:
                parameter.add_(1e-3 * parameter.std() * torch.randn_like(parameter))
        training.backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in training.trained if p.grad is not None]))
    return float((gradients[1] - gradients[0]).norm() / gradients[0].norm())


def measure(folder: str, work: str, arguments: argparse.Namespace) -> list[Row]:
    """One row for each reference."""
    device, fresh = arguments.device, not arguments.quick
    settings = (folder, arguments.model, arguments.context, arguments.examples, device, work)
    rows: list[Row] = []
    for mode in MODES:
        found, why = common.in_process(peak, mode, *settings, limit_bytes=common.memory_limit(device), fresh=fresh)
        rows.append({"model": arguments.model, "implementation": mode, **(found or {"why": why})})
        print(f"  {mode}: {why or 'ready'}", flush=True)
    error, why = common.in_process(gradient_error, *settings, limit_bytes=common.memory_limit(device), fresh=fresh)
    plain = rows[0]
    for row in rows:
        if row.get("total_bytes") and plain.get("total_bytes"):
            row["above_plain_bytes"] = row["total_bytes"] - plain["total_bytes"]
            row["of_a_copy"] = row["above_plain_bytes"] / plain["copy_bytes"]
    rows[-1] |= {"gradient_error": error} if why is None else {"why": why}
    return rows


def main(argv: list[str] | None = None) -> None:
    processor.tune()
    parser = common.parser(__doc__, "full_finetuning")
    parser.add_argument("--model", default="asset:smollm2-135m-instruct", help="a model of selfaug, or random:SHAPE")
    parser.add_argument("--context", type=int, default=512, help="tokens of an example")
    parser.add_argument("--examples", type=int, default=2, help="in the step, all in one forward pass")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.model, arguments.context = "random:tiny", 64
    with tempfile.TemporaryDirectory() as work:
        folder = model_folder(arguments.model, Path(work))
        rows = measure(folder, str(Path(work) / "cache"), arguments)
    common.show(f"{arguments.model} on {arguments.device}", rows, COLUMNS)
    common.write(common.out_path(arguments, "full_finetuning"), "full_finetuning", arguments, rows)


if __name__ == "__main__":
    main()
