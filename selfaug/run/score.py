"""The scoring stage of a run: base and tuned model on the same questions and texts, in the same process."""

import logging
import time
from typing import Any

import torch
from omegaconf import DictConfig

from selfaug.data.datamodule import RagDataModule
from selfaug.errors import UserError
from selfaug.evaluation.drift import DriftConfig, measure_drift
from selfaug.evaluation.rag import answer_questions, samples, score_answers
from selfaug.model.load import load_adapter
from selfaug.model.reference import adapters_off
from selfaug.reporting.results import Results, code_version, environment
from selfaug.run import build
from selfaug.run.identity import RunDirectory, config_hash
from selfaug.run.machine import free_unused

log = logging.getLogger(__name__)


def score(config: DictConfig, run: RunDirectory, data: RagDataModule) -> Results:
    """Load base and saved adapter, answer the test questions with both, measure drift, and put it all together.

    The adapter is read back from disk, so what is scored is what was saved.
    """
    started = time.perf_counter()
    free_unused()  # of the training: a second model is loaded now
    on_gpu = torch.cuda.is_available() and config.trainer.accelerator != "cpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    model = load_adapter(build.base_model(config), run.adapter).to(device)
    wanted = config.evaluation
    if not len(data.data["test"]):
        raise UserError("The test split is empty: raise data.source.test_share, or give a test file.")
    rows = data.data["test"].select(range(min(wanted.rag.limit or len(data.data["test"]), len(data.data["test"]))))
    answering: dict[str, Any] = {
        "max_new_tokens": wanted.rag.max_new_tokens,
        "tokens_per_batch": wanted.tokens_per_batch,
        "progress": config.progress,
    }
    with build.precision(config).autocast(device.type):
        with adapters_off(model):
            base = answer_questions(model, data.tokenizer, rows, description="answering: base", **answering)
        tuned = answer_questions(model, data.tokenizer, rows, description="answering: tuned", **answering)
        words = {key: config.data.prompt[key] for key in ("chat_template", "template_arguments")}
        drift_config = build.call(DriftConfig, "evaluation/drift", **{**words, **build.plain(wanted.drift)})
        drift = measure_drift(model, data.tokenizer, drift_config, progress=config.progress)
    seconds = time.perf_counter() - started
    fitted = run.read_fit()
    return Results(
        name=config.run_name,
        config=build.plain(config),
        config_hash=config_hash(config),
        seed=config.seed,
        code=code_version(),
        data={
            "fingerprint": data.data.fingerprint,
            "counts": {split: len(data.data[split]) for split in ("train", "val", "test")},
            "used": {"train": len(data.rows("train")), "test": len(rows)},
            "truncation": data.data.stats,
        },
        task=score_answers(rows["answers"], base, tuned, seed=config.seed),
        drift=drift,
        time={"fit_s": fitted["seconds"], "evaluate_s": seconds, "total_s": fitted["seconds"] + seconds},
        speed={"train_tokens_per_s": fitted["tokens"] / fitted["seconds"] if fitted["seconds"] else None},
        memory={"peak_bytes": fitted["peak_bytes"]},
        environment=environment(torch.cuda.get_device_name(device) if device.type == "cuda" else None),
        samples=samples(rows, base, tuned, n=wanted.samples, seed=config.seed),
    )
