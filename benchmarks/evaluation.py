"""General benchmarks: our backend for lm-eval against lm-eval's own (hf), on the same items of the same model.

Run as: python -m benchmarks.evaluation [--items 50] [--model asset:smollm2-135m-instruct] [--dtypes float32,bf16]

hf-1 and hf-16 are lm_eval.models.huggingface.HFLM with batches of 1 (its default) and 16. Compared are the seconds of
a whole benchmark, prompts and verdicts included, and what came out: the choice that is taken in each multiple-choice
item, or the text of each answer. In bf16 every way of batching rounds a little differently, and greedy answers part
where two tokens are nearly as likely.
"""

import argparse
import time
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import Column, Row, value
from selfaug import processor
from selfaug.data.chat import ChatFormat
from selfaug.evaluation.retention.benchmarks import BENCHMARKS, RetentionConfig
from selfaug.evaluation.retention.harness import Scores, run_benchmark
from selfaug.evaluation.retention.lm import RetentionLM
from selfaug.model.load import load_base, load_tokenizer

NAMES = ("arc_easy", "hellaswag", "piqa", "winogrande", "lambada", "mmlu", "ifeval")
BACKENDS = ("selfaug", "hf-1", "hf-16")
COLUMNS = (
    Column("dtype", value("dtype")),
    Column("benchmark", value("benchmark")),
    Column("items", value("items")),
    Column("backend", value("implementation")),
    Column("seconds", value("seconds", "{:.1f}")),
    Column("of ours", value("ratio", "{:.2f}")),
    Column("same outcome", value("same", "{:.1%}")),
    Column("score", value("score", "{:.3f}")),
)


def outcomes(scores: Scores) -> list[Any]:
    """Of each item the choice that is taken (raw and by length), or the answer."""
    if BENCHMARKS[scores.benchmark].generates:
        return [str(item.output).strip() for item in scores.items]
    return [(*tuple(item.values.values()), _taken(item.output)) for item in scores.items]


def _taken(likelihoods: list[float]) -> int:
    return max(range(len(likelihoods)), key=lambda i: likelihoods[i])


def backend(name: str, model: Any, tokenizer: Any, tokens_per_batch: int, dtype: str) -> Any:
    if name == "selfaug":
        return RetentionLM(model, tokenizer, ChatFormat(tokenizer), tokens_per_batch=tokens_per_batch, progress=False)
    from lm_eval.models.huggingface import HFLM

    # It switches autocast off unless it is told of it.
    return HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=int(name.rpartition("-")[2]),
        mixed_precision_dtype="bfloat16" if dtype == "bf16" else None,
    )  # fmt: skip


def measure(dtype: str, arguments: argparse.Namespace) -> list[Row]:
    """One row for each benchmark and backend."""
    tokenizer = load_tokenizer(arguments.model)
    model = load_base(arguments.model, mixed=dtype == "bf16").eval().to(arguments.device)
    lms = {name: backend(name, model, tokenizer, arguments.tokens_per_batch, dtype) for name in arguments.backends}
    rows: list[Row] = []
    for name in arguments.only:
        limit = {"max_new_tokens": arguments.new_tokens} if BENCHMARKS[name].generates else {}
        config = RetentionConfig({name: {"items": arguments.items, **limit}})
        found: dict[str, Scores] = {}
        seconds: dict[str, float] = {}
        run_benchmark(lms["selfaug"], name, RetentionConfig({name: {"items": 2, **limit}}), {})  # warm: files, kernels
        for which, lm in lms.items():
            began = time.perf_counter()
            with torch.autocast(arguments.device, torch.bfloat16, enabled=dtype == "bf16"):
                found[which] = run_benchmark(lm, name, config, {})
            seconds[which] = time.perf_counter() - began
        ours = outcomes(found["selfaug"])
        for which, scores in found.items():
            theirs = outcomes(scores)
            main = [item.values[BENCHMARKS[name].main] for item in scores.items]
            rows.append(
                {"dtype": dtype, "benchmark": name, "items": len(scores.items), "implementation": which,
                 "seconds": seconds[which], "ratio": seconds[which] / seconds["selfaug"],
                 "same": sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours),
                 "score": sum(main) / len(main)}
            )  # fmt: skip
        common.show(f"{name}, {dtype}", rows[-len(lms) :], COLUMNS[2:])
    for which in lms:
        own = [row for row in rows if row["implementation"] == which]
        choices = [row for row in own if not BENCHMARKS[row["benchmark"]].generates]
        for title, part in (("multiple choice", choices), ("all", own)):
            total = sum(row["seconds"] for row in part)
            names = {row["benchmark"] for row in part}
            mine = sum(r["seconds"] for r in rows if r["implementation"] == "selfaug" and r["benchmark"] in names)
            items = sum(row["items"] for row in part)
            same = sum(row["same"] * row["items"] for row in part) / items
            rows.append(
                {"dtype": dtype, "benchmark": title, "items": items, "implementation": which, "seconds": total,
                 "ratio": total / mine, "same": same}
            )  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> None:
    processor.tune()  # as selfaug.train does, for everything that is compared
    parser = common.parser(__doc__, "evaluation")
    parser.add_argument("--model", default="asset:smollm2-135m-instruct")
    parser.add_argument("--items", type=int, default=50, help="of each benchmark")
    parser.add_argument("--new-tokens", type=int, default=96, help="of an answer")
    parser.add_argument("--tokens-per-batch", type=int, default=8192)
    parser.add_argument("--dtypes", type=common.names, default=("float32", "bf16"))
    parser.add_argument("--only", type=common.names, default=NAMES, help=", ".join(NAMES))
    parser.add_argument("--backends", type=common.names, default=BACKENDS, help=", ".join(BACKENDS))
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.items, arguments.new_tokens, arguments.dtypes = 3, 4, ("float32",)
    out = common.out_path(arguments, "evaluation")
    rows: list[Row] = []
    for dtype in arguments.dtypes:
        found, why = common.in_process(measure, dtype, arguments, fresh=not arguments.quick)
        if why:
            raise SystemExit(f"{dtype} failed: {why}")
        rows += found
        common.show(f"{arguments.model} on {arguments.device}", found, COLUMNS[1:])
        common.write(out, "evaluation", arguments, rows)


if __name__ == "__main__":
    main()
