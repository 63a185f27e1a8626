"""Batches without waste: which share of the computed tokens is real, and how fast batches are put together.

Run as: python -m benchmarks.data [--data squad,long-tailed] [--steps-of 16,64]

random: examples as they come, a fixed number in a forward pass, padded to the longest. sorted: the same after sorting
a step's examples by length. budget: selfaug's default, cut by data.micro_batch_tokens. packed: data.packing=true.
long-tailed: 2,000 made-up examples, log-normal lengths, median 300 tokens, the longest 8,192.
The last column compares loss and gradient of one step with those of its examples one by one (a tiny float32 model).
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Column, Row, value
from benchmarks.models import RANDOM, adapted, model_folder
from selfaug import processor
from selfaug.data.batching import MicroBatch, Step, StepDataset, StepLoader, StepSampler
from selfaug.data.collate import collate
from selfaug.model.decoder import Decoder
from selfaug.objective import LogitAlignment, Objective, TokenBatch
from selfaug.objective.batch import Role

BATCHINGS = ("random", "sorted", "budget", "packed")
COLUMNS = (
    Column("data", value("data")),
    Column("examples in a step", value("step_size")),
    Column("batching", value("implementation")),
    Column("useful / computed", value("useful_share", "{:.1%}")),
    Column("passes a step", value("passes_per_step", "{:.1f}")),
    Column("tokens a pass", value("tokens_per_pass", "{:,.0f}")),
    Column("largest pass", value("largest_pass", "{:,}")),
    Column("batched, tokens/s", value("tokens_per_second", "{:,.0f}")),
    Column("loss differs by", value("loss_error", "{:.0e}")),
    Column("gradient by", value("gradient_error", "{:.0e}")),
)

Rows = Sequence[dict[str, Any]]


class _Chunks(StepSampler):
    """Fixed numbers of examples in a forward pass, as plain training loops have them."""

    def __init__(self, lengths: np.ndarray, *, by_length: bool, **arguments: Any):
        super().__init__(lengths, **arguments)
        self.by_length = by_length

    def _step(self, indices: np.ndarray) -> list[MicroBatch]:
        if self.by_length:
            indices = indices[np.argsort(self.lengths[indices], kind="stable")]
        size = self.micro_batch_size or len(indices)
        return [MicroBatch(tuple(indices[i : i + size].tolist())) for i in range(0, len(indices), size)]


def loader(rows: Rows, lengths: np.ndarray, batching: str, step_size: int, arguments: argparse.Namespace) -> StepLoader:
    """Steps of `rows`, cut into forward passes in one of the four ways."""
    common_arguments: dict[str, Any] = {"step_size": step_size, "shuffle": True, "seed": 0}
    packing = batching == "packed"
    sampler: StepSampler
    if batching in ("random", "sorted"):
        size = arguments.examples_in_pass
        sampler = _Chunks(lengths, by_length=batching == "sorted", micro_batch_size=size, **common_arguments)
    else:
        tokens = arguments.micro_batch_tokens
        sampler = StepSampler(lengths, micro_batch_tokens=tokens, packing=packing, **common_arguments)
    return StepLoader(StepDataset(rows, 0, packing), sampler)


def measure(
    name: str, rows: Rows, batching: str, step_size: int, arguments: argparse.Namespace, decoder: Decoder
) -> Row:
    lengths = np.asarray([row["length"] for row in rows])
    steps = loader(rows, lengths, batching, step_size, arguments)
    useful, sizes, count = 0, [], 0
    began = time.perf_counter()
    for step in steps:
        count += 1
        for batch in step.micro_batches:
            useful += int((batch.roles != Role.PADDING).sum())
            sizes.append(batch.input_ids.numel())
    seconds = time.perf_counter() - began
    assert useful == lengths.sum()
    return {
        "data": name, "step_size": step_size, "implementation": batching,
        "useful_share": useful / sum(sizes), "passes_per_step": len(sizes) / count,
        "tokens_per_pass": float(np.mean(sizes)), "largest_pass": max(sizes), "tokens_per_second": useful / seconds,
        **same_loss(decoder, rows, next(iter(steps)), next(iter(steps.sampler))),
    }  # fmt: skip


def same_loss(decoder: Decoder, rows: Rows, step: Step, groups: Any) -> dict[str, float]:
    """Relative distance of the step's loss and gradient from those of its examples one by one."""
    indices = [i for group in groups for i in group.indices]
    alone = [collate([rows[i]], pad_id=0) for i in indices]
    loss, gradient = _loss(decoder, step.micro_batches)
    wanted, truth = _loss(decoder, alone)
    return {
        "loss_error": abs(loss / wanted - 1),
        "gradient_error": ((gradient - truth).norm() / truth.norm()).item(),
    }


def _loss(decoder: Decoder, batches: Sequence[TokenBatch]) -> tuple[float, Tensor]:
    """Loss and gradient [P] of an optimiser step on `batches`."""
    objective = Objective({"kl": LogitAlignment(0.5)})
    totals = torch.stack([objective.count(batch) for batch in batches]).sum(0)
    decoder.model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = objective(decoder, batch, totals).loss
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in decoder.model.parameters() if p.grad is not None])


def long_tailed(examples: int, vocabulary: int, longest: int = 8192) -> Rows:
    """Made-up rows of the token cache; a twentieth of each, and at least 4 tokens, is the response."""
    random = np.random.default_rng(0)
    lengths = np.clip(np.exp(random.normal(np.log(300), 1.0, examples)), 16, longest).astype(int)
    rows = []
    for i, length in enumerate(lengths.tolist()):
        response = max(length // 20, 4)
        roles = [int(Role.DOCUMENT)] * (length - response) + [int(Role.RESPONSE)] * response
        ids = random.integers(1, vocabulary, length).tolist()
        rows.append({"id": str(i), "input_ids": ids, "roles": roles, "documents": [0] * length, "length": length})
    return rows


def packaged(name: str, vocabulary: int) -> Rows:
    """The training examples of one of selfaug's data sets; token ids folded into the tiny model's vocabulary."""
    from hydra import compose, initialize_config_module

    from selfaug.run import build
    from selfaug.run.identity import register_resolvers

    register_resolvers()
    with initialize_config_module("selfaug.conf", version_base=None):
        config = compose("train", overrides=[f"data={name}", "progress=false"])
    rows = build.data(config).rows("train").to_list()
    return [{**row, "input_ids": [i % vocabulary for i in row["input_ids"]]} for row in rows]


def main(argv: list[str] | None = None) -> None:
    processor.tune()  # as selfaug.train does, for everything that is compared
    parser = common.parser(__doc__, "data")
    parser.add_argument("--data", type=common.names, default=("squad", "long-tailed"), help="long-tailed, or selfaug's")
    parser.add_argument("--steps-of", type=common.numbers, default=(16, 64), help="examples in an optimiser step")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096, help="of budget and packed")
    parser.add_argument("--examples-in-pass", type=int, default=4, help="of random and sorted")
    arguments = parser.parse_args(argv)
    arguments.device = "cpu"  # nothing here runs on another
    if arguments.quick:
        arguments.data, arguments.steps_of = ("long-tailed",), (4,)
        arguments.micro_batch_tokens, arguments.examples_in_pass = 512, 2
    table: list[Row] = []
    with TemporaryDirectory() as work:
        decoder = Decoder(adapted(model_folder(f"{RANDOM}tiny", Path(work)), "cpu").float())
        vocabulary = decoder.head.arguments()["weight"].shape[0]
        for name in arguments.data:
            made_up = name == "long-tailed"
            size = {"examples": 8, "longest": 512} if arguments.quick else {"examples": 2000}
            rows = long_tailed(vocabulary=vocabulary, **size) if made_up else packaged(name, vocabulary)
            for step_size in arguments.steps_of:
                table += [measure(name, rows, way, step_size, arguments, decoder) for way in BATCHINGS]
    common.show("Batching", table, COLUMNS)
    common.write(common.out_path(arguments, "data"), "data", arguments, table)


if __name__ == "__main__":
    main()
