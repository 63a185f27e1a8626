"""A whole optimiser step (forward, backward, AdamW) of LoRA fine-tuning: what SelfAug adds to it, and what the official
way does.

Run as: python -m benchmarks.step [--model asset:smollm2-135m-instruct] [--contexts 1024] [--examples 2]
        python -m benchmarks.step --device cuda --model random:qwen2.5-0.5b --contexts 2048,8192,32768 --examples 1

plain: NLL on the response. selfaug: KL on all input rows, one more forward pass. cache: the reference read from a
filled cache. cache+sampling: and a random quarter of the rows. sampling (only if asked for): the quarter, no cache.
official: two passes, all logits of both in float32.
Every example is `context` tokens long, the last 32 of them the response; bf16 autocast. Ratios are to plain.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import common
from benchmarks.common import MEGABYTES, Column, Row, value, with_range
from benchmarks.models import adapted, contexts, model_folder
from benchmarks.peers import official_loss
from selfaug import processor
from selfaug.model.cache import CachedReference
from selfaug.model.decoder import Decoder
from selfaug.model.entries import MemoryEntries
from selfaug.model.reference import adapters_off
from selfaug.objective import LogitAlignment, Objective, TokenBatch
from selfaug.objective.batch import IGNORE

MODES = ("plain", "selfaug", "cache", "cache+sampling", "official")
ALL_MODES = (*MODES, "sampling")
ALPHA, SHARE, RESPONSE = 0.5, 0.25, 32
COLUMNS = (
    Column("model", value("model")),
    Column("context", value("context", "{:,}")),
    Column("mode", value("implementation")),
    Column("s / step (quartiles)", with_range("seconds", "{:.3f}")),
    Column("of plain LoRA", with_range("ratio", "{:.2f}")),
    Column("tokens/s", value("tokens_per_second", "{:,.0f}")),
    Column("peak MB", value("total_bytes", "{:,.0f}", MEGABYTES)),
    Column("of plain's", value("memory_ratio", "{:.2f}")),
    Column("above the weights, MB", value("extra_bytes", "{:,.0f}", MEGABYTES)),
)


def objective_of(mode: str) -> Objective:
    """What a mode trains on, other than official."""
    reference = CachedReference(MemoryEntries()) if mode.startswith("cache") else None
    sampling: dict[str, Any] = {"rows": "random", "share": SHARE} if mode.endswith("sampling") else {}
    terms = {} if mode == "plain" else {"kl": LogitAlignment(ALPHA, **sampling)}
    return Objective(terms, reference=reference)


class Training:
    """A model, a batch and an optimiser; `step(mode)` trains on the batch once."""

    def __init__(self, folder: str, model_name: str, context: int, examples: int, device: str, checkpointing: bool):
        self.device = device
        self.model = adapted(folder, device)
        if checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.decoder = Decoder(self.model)
        vocabulary = self.decoder.head.arguments()["weight"].shape[0]
        ids = contexts(model_name, vocabulary, examples, context).to(device)
        labels = ids.clone()
        labels[:, : -min(RESPONSE, context // 2)] = IGNORE
        batch = TokenBatch.from_labels(ids, torch.ones_like(ids), labels)
        spans, keys = zip(*batch.examples, strict=True)  # as the data loader works them out, ahead of the step
        self.batch = dataclasses.replace(batch, spans=spans, keys=keys, right_padded=True)
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-5)
        self.number = 0
        self._losses: dict[str, Callable[[], torch.Tensor]] = {}

    def step(self, mode: str) -> None:
        if mode not in self._losses:
            self._losses[mode] = self._loss(mode)
        self.number += 1
        with torch.autocast(self.device, torch.bfloat16):
            loss = self._losses[mode]()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss(self, mode: str) -> Callable[[], torch.Tensor]:
        if mode == "official":
            return self._official
        objective = objective_of(mode)
        return lambda: objective(
            self.decoder, self.batch, objective.count(self.batch), draw=(0, self.number)
        ).loss  # fmt: skip

    def _official(self) -> torch.Tensor:
        """As the official forward: both passes whole, logits in float32, rows taken by labels == -100."""
        ids, labels = self.batch.input_ids, self.batch.labels
        with adapters_off(self.model):
            base = self.model(input_ids=ids, use_cache=False).logits.float()
        tuned = self.model(input_ids=ids, use_cache=False).logits.float()
        nll = F.cross_entropy(tuned[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
        return nll + ALPHA * official_loss(base, tuned, labels == IGNORE)


def alone(mode: str, *arguments: Any) -> Row:
    """Peak memory of a step, in a process of its own. The step before it makes the optimiser's state and the cache."""
    training = Training(*arguments)
    training.step(mode)
    peak = common.peak_memory(lambda: training.step(mode), training.device)
    return {"extra_bytes": peak.extra, "total_bytes": peak.total}


def together(modes: list[str], rounds: int, seconds: float, *arguments: Any) -> dict[str, list[float]]:
    """Seconds of a step in every mode, in turns."""
    training = Training(*arguments)
    for mode in modes:
        training.step(mode)
    calls = {mode: lambda mode=mode: training.step(mode) for mode in modes}
    return common.interleaved(calls, rounds=rounds, device=training.device, seconds=seconds)


def measure(folder: str, context: int, arguments: argparse.Namespace) -> list[Row]:
    """One row for each mode."""
    device, fresh = arguments.device, arguments.device == "cpu" and not arguments.quick
    settings = (folder, arguments.model, context, arguments.examples, device, arguments.checkpointing)
    rows: dict[str, Row] = {}
    for mode in arguments.only:
        found, why = common.in_process(alone, mode, *settings, limit_bytes=common.memory_limit(device), fresh=fresh)
        row: Row = {"model": arguments.model, "context": context, "implementation": mode}
        rows[mode] = row | (found or {"why": why})
        print(f"  {mode}: {why or 'ready'}", flush=True)
    ready = [mode for mode, row in rows.items() if "why" not in row]
    times, why = common.in_process(
        together, ready, arguments.rounds, arguments.seconds, *settings,
        limit_bytes=common.memory_limit(device), fresh=fresh,
    )  # fmt: skip
    if why:
        raise RuntimeError(f"timing: {why}")
    for mode, columns in common.time_columns(times, "plain").items():
        rows[mode] |= columns | {"tokens_per_second": arguments.examples * context / columns["seconds"]}
    plain = rows.get("plain", {})
    for row in rows.values():
        for key, ratio in (("total_bytes", "memory_ratio"), ("extra_bytes", "extra_ratio")):
            if plain.get(key) and row.get(key) is not None:
                row[ratio] = row[key] / plain[key]
    return list(rows.values())


def main(argv: list[str] | None = None) -> None:
    processor.tune()  # as selfaug.train does, for everything that is compared
    parser = common.parser(__doc__, "step")
    parser.add_argument("--model", default="asset:smollm2-135m-instruct", help="a model of selfaug, or random:SHAPE")
    parser.add_argument("--contexts", type=common.numbers, default=(1024,), help="tokens of an example, with commas")
    parser.add_argument("--examples", type=int, default=2, help="in the step, all in one forward pass")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, in every mode")
    parser.add_argument("--only", type=common.names, default=MODES, help=", ".join(ALL_MODES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=600, help="stop a case after so long, but not before 3 rounds")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.model, arguments.contexts, arguments.rounds = "random:tiny", (64,), 3
    if unknown := set(arguments.only) - set(ALL_MODES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    out = common.out_path(arguments, "step")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as work:
        folder = model_folder(arguments.model, Path(work))
        for context in arguments.contexts:
            print(f"{arguments.model}, contexts of {context} tokens", flush=True)
            case, why = common.in_process(measure, folder, context, arguments, fresh=arguments.device == "cuda")
            if why:
                raise SystemExit(f"contexts of {context} tokens failed: {why}")
            rows += case
            common.show(f"{arguments.model} on {arguments.device}", rows, COLUMNS[1:])
            common.write(out, "step", arguments, rows)


if __name__ == "__main__":
    main()
