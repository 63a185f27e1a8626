"""The scoring stage: base and tuned model on the same questions, texts and benchmarks, in the same process."""

import importlib.util
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from peft import PeftConfig
from torch import nn

from selfaug.data.datamodule import RagDataModule
from selfaug.data.mixture import MixedRows
from selfaug.errors import UserError
from selfaug.evaluation.drift import DriftConfig, measure_drift
from selfaug.evaluation.rag import answer_questions, samples, score_answers
from selfaug.evaluation.retention.benchmarks import BENCHMARKS, RetentionConfig
from selfaug.evaluation.retention.harness import Item, Scores, conditions
from selfaug.evaluation.retention.store import Store
from selfaug.evaluation.retention.suite import Retention, StyleConfig, Suite, base_store, keep_copy, tuned_store
from selfaug.evaluation.sandbox import check_sandbox
from selfaug.evaluation.token_kl import token_kl
from selfaug.model.load import load_tokenizer, locate
from selfaug.objective.batch import TASK
from selfaug.reporting.curves import read_curves
from selfaug.reporting.results import Metric, Results, code_version, environment
from selfaug.run import build
from selfaug.run.identity import RunDirectory, config_hash
from selfaug.run.machine import free_unused
from selfaug.run.make import call, plain
from selfaug.run.models import Models, device, saved_models

log = logging.getLogger(__name__)


@dataclass
class Measured:
    """All scores of a pair of models, as they stand in results.json."""

    task: dict[str, Metric] = field(default_factory=dict)
    drift: dict[str, dict[str, Metric]] = field(default_factory=dict)
    retention: Retention = field(default_factory=Retention)
    samples: list[dict[str, Any]] = field(default_factory=list)
    questions: int = 0
    token_kl: dict[str, Any] = field(default_factory=dict)


def score(config: DictConfig, run: RunDirectory, data: RagDataModule) -> Results:
    """Load the base model and what was trained, measure what the configuration asks for, and put it all together.

    The adapter (or the model) is read back from disk, so what is scored is what was saved.
    """
    started = time.perf_counter()
    free_unused()  # of the training: a second model is loaded now
    measured = Measured()
    if asks(config):
        assert run.tuned is not None  # as the caller has made sure of
        measured = measure(config, saved_models(config, run.tuned), data, run.evaluation)
    seconds = time.perf_counter() - started
    fitted = run.read_fit()
    results = as_results(config, measured, data)
    trained = data.rows("train")
    if isinstance(trained, MixedRows):
        results.data["used"]["train"] = trained.sizes[TASK]
        results.data["used"] |= {name: size for name, size in trained.sizes.items() if name != TASK}
        results.data["mixture"] = data.mixture.stats(trained)
    else:
        results.data["used"]["train"] = len(trained)
    results.time = {
        "fit_s": fitted["seconds"], "prepare_s": fitted["prepare_seconds"], "reference_s": fitted["reference_seconds"],
        "evaluate_s": seconds,
    }  # fmt: skip
    results.time["total_s"] = sum(part for part in results.time.values() if part is not None)
    results.speed = {"train_tokens_per_s": fitted["tokens"] / fitted["seconds"] if fitted["seconds"] else None}
    results.memory = {"peak_bytes": fitted["peak_bytes"]}
    results.curves = read_curves(run.path / "metrics.csv")
    return results


def asks(config: DictConfig) -> bool:
    """Whether anything is to be measured."""
    return any(config.evaluation.get(part) for part in ("rag", "drift", "retention", "style"))


def check(config: DictConfig) -> None:
    """Refuse wrong settings of the evaluation, and what this machine cannot do, before an hour of training."""
    _, retention, _ = _parts(config)
    if retention.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "evaluation.retention.backend=vllm needs vLLM, which is not installed: pip install vllm, or set it to hf."
        )
    if any(BENCHMARKS[name].runs_code for name in retention.benchmarks):
        check_sandbox()


def measure(config: DictConfig, models: Models, data: RagDataModule | None, folder: Path) -> Measured:
    """Everything that `config.evaluation` asks for. folder: for the files of the benchmarks."""
    found = Measured()
    drift, retention, style = _parts(config)
    tokenizer = data.tokenizer if data is not None else load_tokenizer(config.model.name, config.model.revision)
    with build.precision(config).autocast(next(models.base.parameters()).device.type):
        if config.evaluation.get("rag") and data is not None:
            _answer(config, models, data, folder, found)
        if drift is not None and models.tuned is not None:
            found.drift = measure_drift(
                models.tuned, tokenizer, drift, base=models.second, progress=config.progress
            )  # fmt: skip
        make_lm = _vllm(config, models) if retention.backend == "vllm" else None
        suite = Suite(retention, style, tokenizer, progress=config.progress, make_lm=make_lm)
        if suite.wanted:
            with models.as_base():
                store = base_store(models.base)
                before = suite.score(models.base, store, "base")
            keep_copy(store, before, folder / "base")
            after = None
            if models.tuned is not None:
                after = suite.score(models.tuned, tuned_store(models.tuned, folder / "tuned"), "tuned")
            found.retention = suite.compared(before, after)
            if models.tuned is not None and after is not None and drift is not None:
                found.drift |= suite.drift(models.tuned, after, drift, base=models.second)
    return found


def as_results(config: DictConfig, measured: Measured, data: RagDataModule | None) -> Results:
    """results.json, but for what only a training knows."""
    where = device(config)
    return Results(
        name=config.run_name,
        config=plain(config),
        config_hash=config_hash(config),
        seed=config.seed,
        code=code_version(),
        data={}
        if data is None
        else {
            "fingerprint": data.data.fingerprint,
            "counts": {split: len(data.data[split]) for split in ("train", "val", "test")},
            "used": {"test": measured.questions},
            "truncation": data.data.stats,
        },
        task=measured.task,
        drift=measured.drift,
        retention=measured.retention.benchmarks,
        retention_mean=measured.retention.mean,
        style=measured.retention.style,
        evaluation=measured.retention.about,
        time={"fit_s": None, "evaluate_s": None, "total_s": None},
        speed={"train_tokens_per_s": None},
        memory={"peak_bytes": None},
        environment=environment(
            torch.cuda.get_device_name(where) if where.type == "cuda" else None, build.precision(config).name
        ),
        samples=measured.samples,
        token_kl=measured.token_kl,
    )


def _answer(config: DictConfig, models: Models, data: RagDataModule, folder: Path, found: Measured) -> None:
    """Questions with documents: what was learned."""
    wanted = config.evaluation
    if not len(data.data["test"]):
        raise UserError("The test split is empty: raise data.source.test_share, or give a test file.")
    rows = data.data["test"].select(range(min(wanted.rag.limit or len(data.data["test"]), len(data.data["test"]))))
    answering: dict[str, Any] = {
        "max_new_tokens": wanted.rag.max_new_tokens,
        "tokens_per_batch": wanted.tokens_per_batch,
        "progress": config.progress,
    }
    about = {
        "benchmark": TASK, "items": len(rows), "data": data.data.fingerprint,
        "max_new_tokens": wanted.rag.max_new_tokens,
        **conditions(_parts(config)[1], data.tokenizer), "tokens_per_batch": wanted.tokens_per_batch,
    }  # fmt: skip

    def answers(model: nn.Module, store: Store, which: str) -> list[str]:
        """From `store` where they are there: a sweep asks the base model once."""
        scores = store.get(TASK, about)
        if scores is None:
            said = answer_questions(model, data.tokenizer, rows, description=f"answering: {which}", **answering)
            items = [
                Item(row["id"], row["question"], answer, list(row["answers"]), {})
                for row, answer in zip(rows, said, strict=True)
            ]
            scores = Scores(TASK, about, items)
            store.put(TASK, scores)
        if store.shared:
            keep_copy(store, {TASK: scores}, folder / which)
        return [str(item.output) for item in scores.items]

    with models.as_base():
        base = answers(models.base, base_store(models.base), "base")
    tuned = None
    if models.tuned is not None:
        tuned = answers(models.tuned, tuned_store(models.tuned, folder / "tuned"), "tuned")
    found.questions = len(rows)
    # Not the seed of the run: the base model's interval is the same beside every run.
    found.task = score_answers(rows["answers"], base, tuned)
    if tuned is not None:
        found.samples = samples(rows, base, tuned, n=wanted.samples, seed=config.seed)
    if models.tuned is not None:
        found.token_kl = token_kl(models.tuned, data.tokenizer, rows[0], base=models.second)


def chat_settings(config: DictConfig) -> dict[str, Any]:
    """Dialogues are asked in the chat template of the training."""
    prompt = config.data.prompt if config.get("data") else {}
    settings = plain(prompt) if prompt else {}
    return {key: settings[key] for key in ("chat_template", "template_arguments") if key in settings}


def drift_settings(config: DictConfig) -> DriftConfig:
    """evaluation.drift, or its defaults where it is null."""
    wanted = plain(config.evaluation.drift) if config.evaluation.get("drift") else {}
    return call(DriftConfig, "evaluation/drift", **{**chat_settings(config), **wanted})


def _parts(config: DictConfig) -> tuple[DriftConfig | None, RetentionConfig, StyleConfig]:
    """The settings of drift, benchmarks and style."""
    wanted = config.evaluation
    retention = plain(wanted.retention) if wanted.get("retention") else {}
    style = plain(wanted.style) if wanted.get("style") else {}
    return (
        drift_settings(config) if wanted.get("drift") else None,
        call(RetentionConfig, "evaluation", **{**chat_settings(config), **retention}),
        call(StyleConfig, "evaluation", **style),
    )


def _vllm(config: DictConfig, models: Models) -> Callable[[str], Any]:
    """lm-eval's own vLLM backend; adapters and models are given to it as the folder that they were loaded from."""
    lora = models.folder is not None and (models.folder / "adapter_config.json").is_file()
    if models.tuned is not None and models.folder is None:
        raise UserError(
            "evaluation.retention.backend=vllm takes the tuned model as a folder (an adapter's or a whole one): set it "
            "to hf."
        )
    if lora and not (models.shared and PeftConfig.from_pretrained(str(models.folder)).peft_type == "LORA"):
        raise UserError(
            "evaluation.retention.backend=vllm runs LoRA adapters only, on the base model as it is: set it to hf."
        )
    if chat_settings(config).get("chat_template") or chat_settings(config).get("template_arguments"):
        raise UserError(
            "evaluation.retention.backend=vllm uses the model's own chat template: set data.prompt.chat_template=null "
            "and data.prompt.template_arguments={}, or the backend to hf."
        )

    def make(which: str) -> Any:
        from lm_eval.models.vllm_causallms import VLLM

        settings: dict[str, Any] = {"pretrained": locate(config.model.name), "revision": config.model.revision}
        if which == "tuned" and lora:
            rank = PeftConfig.from_pretrained(str(models.folder)).r
            settings |= {"lora_local_path": str(models.folder), "max_lora_rank": rank}
        elif which == "tuned":
            settings = {"pretrained": str(models.folder), "revision": None}
        return VLLM(dtype="auto", trust_remote_code=False, gpu_memory_utilization=0.5, **settings)

    return make
