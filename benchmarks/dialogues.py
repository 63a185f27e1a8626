"""Self-dialogues written in batches against one at a time.

Run as: python -m benchmarks.dialogues [--dialogues 128] [--alone 12] [--model asset:smollm2-135m-instruct]

batch-N is selfaug.self_dialogues with batches of N; transformers is its own generate(do_sample=True), one dialogue at a
time, with the same temperature and top-p. Dialogues differ in length, so what is compared is sampled tokens per second.
Each starts with a warm-up; fewer dialogues are written one at a time, of the same distribution.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from benchmarks import common
from benchmarks.common import Column, Row, value
from selfaug import processor
from selfaug.data.chat import ChatFormat
from selfaug.evaluation.sampling import Sampled, sample
from selfaug.model.load import load_base, load_tokenizer
from selfaug.self_dialogues.converse import Conversation
from selfaug.self_dialogues.settings import Settings

COLUMNS = (
    Column("dtype", value("dtype")),
    Column("writer", value("implementation")),
    Column("dialogues", value("dialogues")),
    Column("tokens", value("tokens")),
    Column("seconds", value("seconds", "{:.1f}")),
    Column("tokens/s", value("tokens_per_s", "{:.1f}")),
    Column("of transformers", value("ratio", "{:.1f}")),
    Column("500 dialogues, minutes", value("minutes_500", "{:.1f}")),
)


def sampler(name: str, model: Any, tokenizer: Any, chat: ChatFormat) -> Any:
    """(prompts, uniforms, temperature, top_p) -> what follows."""
    stops = sorted(chat.special_ids)
    if name != "transformers":
        return lambda prompts, uniforms, temperature, top_p: sample(
            model, tokenizer, prompts, uniforms, temperature=temperature, top_p=top_p, also_stop=stops
        )

    def alone(prompts: list[list[int]], uniforms: np.ndarray, temperature: float, top_p: float) -> list[Sampled]:
        found = []
        for prompt in prompts:
            settings = GenerationConfig(
                do_sample=True, temperature=temperature, top_p=top_p, top_k=0, max_new_tokens=uniforms.shape[1],
                eos_token_id=stops, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            ids = torch.tensor([prompt], device=model.device)
            with torch.inference_mode():
                out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            new = out[0, len(prompt) :].tolist()
            ended = bool(new) and new[-1] in stops
            found.append(Sampled(new[:-1] if ended else new, ended))
        return found

    return alone


def measure(dtype: str, arguments: argparse.Namespace) -> list[Row]:
    """One row for each way of writing."""
    tokenizer = load_tokenizer(arguments.model)
    model = load_base(arguments.model, mixed=dtype == "bf16").eval().to(arguments.device)
    chat = ChatFormat(tokenizer)
    torch.manual_seed(0)
    rows: list[Row] = []
    for size in (None, 1, *arguments.batches):
        name = "transformers" if size is None else f"batch-{size}"
        size = size or 1
        number = arguments.alone if size == 1 else arguments.dialogues
        settings = Settings(
            batch_size=size, max_user_tokens=arguments.user_tokens, max_answer_tokens=arguments.answer_tokens
        )
        writer = Conversation(settings, chat, sampler(name, model, tokenizer, chat))
        with torch.autocast(arguments.device, torch.bfloat16, enabled=dtype == "bf16"):
            writer.write(range(10**6, 10**6 + min(size, 2)))
            began = time.perf_counter()
            drafts = [one for i in range(0, number, size) for one in writer.write(range(i, min(i + size, number)))]
            seconds = time.perf_counter() - began
        tokens = sum(draft.sampled for draft in drafts)
        kept = sum(draft.problem is None for draft in drafts)
        rows.append(
            {"dtype": dtype, "implementation": name, "dialogues": kept, "tokens": tokens, "seconds": seconds,
             "tokens_per_s": tokens / seconds, "ratio": tokens / seconds / (rows[0]["tokens_per_s"] if rows else
             tokens / seconds), "minutes_500": seconds / max(kept, 1) * 500 / 60}
        )  # fmt: skip
        common.show(name, rows[-1:], COLUMNS)
    return rows


def main(argv: list[str] | None = None) -> None:
    processor.tune()  # as selfaug.dialogues does
    parser = common.parser(__doc__, "dialogues")
    parser.add_argument("--model", default="asset:smollm2-135m-instruct")
    parser.add_argument("--dialogues", type=int, default=128, help="written in batches")
    parser.add_argument("--alone", type=int, default=12, help="written one at a time")
    parser.add_argument("--batches", type=common.numbers, default=(16, 64), help="dialogues in a batch")
    parser.add_argument("--user-tokens", type=int, default=128)
    parser.add_argument("--answer-tokens", type=int, default=384)
    parser.add_argument("--dtypes", type=common.names, default=("float32", "bf16"))
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.dialogues, arguments.alone, arguments.batches, arguments.dtypes = 4, 1, (4,), ("float32",)
        arguments.user_tokens, arguments.answer_tokens = 8, 8
    out = common.out_path(arguments, "dialogues")
    rows: list[Row] = []
    for dtype in arguments.dtypes:
        found, why = common.in_process(measure, dtype, arguments, fresh=not arguments.quick)
        if why:
            raise SystemExit(f"{dtype} failed: {why}")
        rows += found
        common.show(f"{arguments.model} on {arguments.device}", found, COLUMNS)
        common.write(out, "dialogues", arguments, rows)


if __name__ == "__main__":
    main()
