"""One benchmark through lm-eval's task code: prompts, answers, and the value of every metric for every item."""

import hashlib
import importlib.metadata
import logging
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from selfaug.assets import asset_path
from selfaug.errors import UserError
from selfaug.evaluation.retention.benchmarks import (
    BENCHMARKS,
    Benchmark,
    BenchmarkConfig,
    PackagedItems,
    RetentionConfig,
    task_settings,
)

log = logging.getLogger(__name__)

SCORING = 3  # raise it whenever the same model and settings would get other scores
_SHOWN = 20_000  # characters of a prompt or an answer that are kept
_PACKAGES = ("lm_eval", "transformers", "tokenizers", "torch", "peft", "nltk", "langdetect", "vllm")


@dataclass
class Item:
    """What was asked and answered, for the audit of a score.

    id: task and number of the document there. prompt: of multiple choice with contexts of their own, the first's.
    output: the answer as text, or the log-likelihoods of the choices in nats. choices: what was scored after which
    context, where that is not the prompt. values: metric -> its value, of an instruction-level metric one for each
    instruction.
    """

    id: str
    prompt: str
    output: Any
    target: Any
    values: dict[str, float | list[float]]
    choices: list[str] | None = None


@dataclass
class Scores:
    """One benchmark, one model. `about`: settings and versions that the values depend on."""

    benchmark: str
    about: dict[str, Any]
    items: list[Item] = field(default_factory=list)
    seconds: float = 0.0

    def values(self, metric: str) -> list[float | list[float]]:
        return [item.values[metric] for item in self.items]


def about(name: str, config: RetentionConfig, template: str | None, tokenizer: Any) -> dict[str, Any]:
    """All that a score depends on beside the model: what the JSON of a result says, and what it is found again by.

    template: a digest of the chat format.
    """
    benchmark, settings = BENCHMARKS[name], config.benchmarks[name]
    chat = uses_chat(benchmark, settings)
    return {
        "benchmark": name,
        "items": settings.items,
        "shots": settings.shots,  # None: the task's own
        "chat": chat,
        "chat_template": template if chat else None,
        # Where there is no chat, answers end at its end of turn all the same.
        **({"end_of_turn": template} if benchmark.generates and not chat and template else {}),
        "max_new_tokens": limit(benchmark, settings, config) if benchmark.generates else None,
        "decoding": "greedy" if benchmark.generates else "log-likelihood",
        "data": config.data,
        "content": content_digest(benchmark) if config.data == "packaged" else None,
        "backend": config.backend,
        **conditions(config, tokenizer),
    }


def conditions(config: RetentionConfig, tokenizer: Any) -> dict[str, Any]:
    """What every benchmark depends on alike."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(tokenizer)
    text += f"\n{getattr(tokenizer, 'eos_token_id', None)}"  # ends an answer, and is no part of tokenizer.json
    return {
        "scoring": SCORING,
        "seed": config.seed,
        # Of bfloat16 the batch decides close calls.
        "tokens_per_batch": config.tokens_per_batch,
        "tokenizer": hashlib.sha256(text.encode()).hexdigest()[:16],
        "versions": {package: _version(package) for package in _PACKAGES},
    }


def content_digest(benchmark: Benchmark) -> str:
    """Of the packaged items."""
    digest = hashlib.sha256()
    for name in benchmark.files.values():
        digest.update((asset_path(benchmark.asset) / name).read_bytes())
    return digest.hexdigest()[:16]


def uses_chat(benchmark: Benchmark, settings: BenchmarkConfig) -> bool:
    return benchmark.chat if settings.chat is None else settings.chat


def limit(benchmark: Benchmark, settings: BenchmarkConfig, config: RetentionConfig) -> int:
    """The most new tokens of an answer: what is said of this benchmark, or the least of its own limit and the limit of
    all."""
    return settings.max_new_tokens or min(benchmark.max_new_tokens, config.max_new_tokens)


def run_benchmark(lm: Any, name: str, config: RetentionConfig, described: dict[str, Any]) -> Scores:
    """Ask `lm` (a RetentionLM, or another of lm-eval's) the items of one benchmark.

    Raises:
        UserError: items that cannot be had, or a chat template that is missing.
    """
    began = time.perf_counter()
    benchmark, settings = BENCHMARKS[name], config.benchmarks[name]
    evaluate, manager = _lm_eval(benchmark)
    chat = uses_chat(benchmark, settings)
    if chat and getattr(lm, "chat", True) is None:
        raise UserError(
            f"evaluation.retention.benchmarks.{name} needs a chat template, which the model has not: set "
            f"evaluation.retention.benchmarks.{name}.chat=false, or data.prompt.chat_template."
        )
    packaged = PackagedItems(benchmark) if config.data == "packaged" else None
    # lm-eval renders every item that it is given, so it is given only those that are wanted.
    chosen = sample(packaged.sizes(), settings.items, config.seed) if packaged else None
    try:
        loaded = manager.load(task_settings(benchmark, chosen, packaged))
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(
            f"The items of {name} cannot be read from the hub ({str(error).splitlines()[0]}): check the network, or "
            "set evaluation.retention.data=packaged."
        ) from error
    for task in loaded["tasks"].values():
        if settings.shots is not None:
            task.set_config("num_fewshot", settings.shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(config.seed)
        if benchmark.generates:
            most = limit(benchmark, settings, config)
            task.set_config("generation_kwargs", {"max_gen_toks": most}, update=True)
    tasks = loaded["tasks"]
    if chosen is None:
        chosen = sample({task: len(each.eval_docs) for task, each in tasks.items()}, settings.items, config.seed)
    # The checkers of IFEval draw what an instruction leaves open.
    random.seed(config.seed)
    found = evaluate(
        lm=lm,
        task_dict={"tasks": {task: tasks[task] for task in chosen}, "groups": {}},
        samples=None if packaged else chosen,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=chat,
        confirm_run_unsafe_code=config.run_code,
    )
    items = []
    for task, indices in chosen.items():
        ids = indices if packaged else range(max(indices) + 1)  # by the number that lm-eval knows a document by
        items += _items(benchmark, task, found["samples"][task], ids)
    return Scores(name, described, items, time.perf_counter() - began)


def sample(sizes: Mapping[str, int], items: int | None, seed: int) -> dict[str, list[int]]:
    """Which documents of each task: all, or a seeded sample with as many of each task as far as they go. The same for
    every model that is asked with the same seed."""
    if items is None:
        return {task: list(range(size)) for task, size in sizes.items()}
    draw = random.Random(seed)
    shares = dict.fromkeys(sizes, 0)
    left = min(items, sum(sizes.values()))
    while left:
        open_tasks = [task for task in sizes if shares[task] < sizes[task]]
        if left < len(open_tasks):
            open_tasks = draw.sample(open_tasks, left)
        for task in open_tasks:
            shares[task] += 1
        left -= len(open_tasks)
    return {task: sorted(draw.sample(range(sizes[task]), share)) for task, share in shares.items() if share}


def _items(benchmark: Benchmark, task: str, samples: Sequence[Mapping[str, Any]], ids: Sequence[int]) -> list[Item]:
    """lm-eval's samples, of which it has one for each document and filter."""
    by_document: dict[int, Item] = {}
    for one in samples:
        item = by_document.setdefault(
            one["doc_id"],
            Item(
                id=f"{task}/{ids[one['doc_id']]}",
                prompt=str(one["arguments"][0][0])[:_SHOWN],
                output=_output(benchmark, one),
                target=one["target"] if isinstance(one["target"], (int, float)) else str(one["target"])[:_SHOWN],
                values={},
                choices=None if benchmark.generates else _choices(one["arguments"]),
            ),
        )
        for theirs, ours in benchmark.metrics.items():
            metric, _, wanted = theirs.partition(",")
            if metric in one and wanted in ("", one["filter"]):
                value = one[metric]
                item.values[ours] = [float(v) for v in value] if isinstance(value, (list, tuple)) else float(value)
    return list(by_document.values())


def _choices(arguments: Sequence[Sequence[str]]) -> list[str]:
    alone = all(context == arguments[0][0] for context, *_ in arguments)
    return [str(choice if alone else f"{context}{choice}")[:_SHOWN] for context, choice in arguments]


def _output(benchmark: Benchmark, one: Mapping[str, Any]) -> Any:
    if benchmark.generates:
        return str(one["resps"][0][0])[:_SHOWN]
    return [round(float(response[0][0]), 4) for response in one["resps"]]


def _lm_eval(benchmark: Benchmark) -> tuple[Any, Any]:
    """lm-eval's evaluate, and a TaskManager that has read the task files of this benchmark only (all take a minute)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if benchmark.name == "ifeval":
        prepare_ifeval()
    import datasets
    import lm_eval
    import lm_eval.api.task
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    # Its bars count the making of prompts, which takes no time.
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)
    folder = Path(lm_eval.__file__).parent / "tasks" / benchmark.folder
    return evaluate, TaskManager(include_path=str(folder) if benchmark.folder else None, include_defaults=False)


def prepare_ifeval() -> None:
    """What IFEval's checkers need and would otherwise download, or draw anew in every process."""
    import nltk
    from langdetect import DetectorFactory

    folder = str(asset_path("punkt-tab"))
    if folder not in nltk.data.path:
        nltk.data.path.insert(0, folder)
    DetectorFactory.seed = 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
