"""Loggers: metrics.csv always, Weights & Biases and TensorBoard when asked."""

import netrc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from selfaug.callbacks.metrics_file import MetricsFile
from selfaug.errors import UserError
from selfaug.reporting.results import Results, mask_secrets
from selfaug.run.identity import config_hash
from selfaug.run.make import plain
from selfaug.run.sweep import SWEEP_VARIABLE

_WANDB_SERVER, _WANDB_SERVER_BEFORE = "api.forge.coreweave.com", "api.wandb.ai"  # since wandb 0.31, and until then
STEP = "trainer/global_step"  # what W&B draws curves over
# What W&B's summary of a run keeps of a curve; of all others it keeps the last value.
SUMMARIES = {
    "val/nll": "min,last",
    "val/kl": "max,last",
    "train/grad_norm": "max,last",
    "speed/tokens_per_s": "mean,last",
    "probe/drift_wikipedia": "max,last",
    "probe/drift_dialogues": "max,last",
    "probe/ifeval_prompt_strict": "min,last",
}


@contextmanager
def run_loggers(
    config: DictConfig, directory: Path, training: bool = True, job_type: str = "train"
) -> Iterator[list[Logger]]:
    """The loggers of a run, closed at the end: those of config.logger (name to settings) and, while training,
    MetricsFile. job_type: train or evaluate, by which W&B tells runs apart.

    Raises UserError for an unknown logger or one whose package is missing.
    """
    loggers: list[Logger] = [MetricsFile(directory)] if training else []
    failed = True
    try:
        _add_chosen(loggers, config, directory, job_type)
        yield loggers
        failed = False
    finally:
        for logger in loggers:
            logger.finalize("failed" if failed else "success")
            if isinstance(logger, WandbLogger):
                # Otherwise the next job of a sweep in this process would write into the same W&B run.
                logger.experiment.finish(exit_code=int(failed))


def log_results(loggers: list[Logger], results: Results) -> None:
    """The scores of a run, as task/... and drift/..., and as the summary of its W&B run, which gets tables too."""
    for logger in loggers:
        if isinstance(logger, MetricsFile):
            continue  # its rows are steps; the scores are in results.json
        logger.log_metrics(scalars(results))
        if isinstance(logger, WandbLogger):
            for name, (columns, rows) in tables(results).items():
                if rows:
                    logger.log_table(name, columns, rows)


def scalars(results: Results) -> dict[str, float]:
    """task/exact_match, task/exact_match_base, drift/wikipedia/kl_base_tuned, retention/mean/kept ...: the means of
    results.json."""
    groups = {"task": results.task, "retention/mean": {"kept": {"tuned": results.retention_mean.get("retention")}}}
    for group, found in (("drift", results.drift), ("retention", results.retention), ("style", results.style)):
        groups |= {f"{group}/{name}": metrics for name, metrics in found.items()}
    values: dict[str, float] = {}
    for group, metrics in groups.items():
        for name, metric in metrics.items():
            for part, interval in metric.items():
                # Beside intervals a benchmark has a p and marks.
                if isinstance(interval, dict) and interval["mean"] is not None:
                    values[f"{group}/{name}" + ("" if part == "tuned" else f"_{part}")] = interval["mean"]
    return values


def tables(results: Results) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Columns and rows of `samples`, answers of base and tuned model side by side, and of `benchmarks`."""
    columns = ["id", "question", "answers", "base", "tuned"]
    texts = [{**row, "answers": " | ".join(map(str, row["answers"]))} for row in results.samples]
    answers = [[str(row[name]) for name in columns] for row in texts]
    scores = [
        [benchmark, name, *(_mean(metric, part) for part in ("base", "tuned", "difference")),
         *((metric.get("difference") or {}).get(end) for end in ("low", "high")),
         _mean(metric, "retention"), metric.get("mcnemar_p"), bool(metric.get("at_floor"))]
        for benchmark, metrics in results.retention.items()
        for name, metric in metrics.items()
    ]  # fmt: skip
    about = ["benchmark", "metric", "base", "tuned", "difference", "low", "high", "kept", "p", "at chance"]
    return {"samples": (columns, answers), "benchmarks": (about, scores)}


def _mean(metric: dict[str, Any], part: str) -> float | None:
    return (metric.get(part) or {}).get("mean")


def _add_chosen(loggers: list[Logger], config: DictConfig, directory: Path, job_type: str) -> None:
    for name, settings in (config.logger or {}).items():
        arguments = plain(settings) if settings else {}
        try:
            if name == "wandb":
                loggers.append(_wandb(config, directory, job_type, arguments))
            elif name == "tensorboard":
                loggers.append(TensorBoardLogger(str(directory), name="tensorboard", version="", **arguments))
            else:
                raise UserError(f"logger.{name} is unknown: set logger to csv, wandb or tensorboard.")
        except ModuleNotFoundError as error:
            raise UserError(f"logger={name} needs a package that is missing: pip install 'selfaug[{name}]'.") from error


def _wandb(config: DictConfig, directory: Path, job_type: str, arguments: dict[str, Any]) -> WandbLogger:
    """A run whose id is the configuration's hash, so that resuming continues it; its group is the sweep."""
    offline = arguments.pop("offline", "auto")
    if offline == "auto":
        offline = not has_wandb_key()
    arguments.setdefault("group", os.environ.get(SWEEP_VARIABLE))
    os.environ.setdefault("WANDB_SILENT", "true")
    logger = WandbLogger(
        name=config.run_name,
        id=config_hash(config),
        save_dir=str(directory),
        offline=offline,
        resume=None if offline else "allow",  # offline files of one id are merged when they are synced
        tags=list(config.tags),
        job_type=job_type,
        **arguments,
    )
    if getattr(rank_zero_only, "rank", 0) == 0:  # of several processes only the first has a W&B run
        logger.experiment.config.update(mask_secrets(plain(config)), allow_val_change=True)
        for name, summary in SUMMARIES.items():
            logger.experiment.define_metric(name, step_metric=STEP, step_sync=True, summary=summary)
    return logger


def has_wandb_key() -> bool:
    """Whether W&B would find a key: in the environment, or where `wandb login` leaves it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    servers = [_WANDB_SERVER, _WANDB_SERVER_BEFORE]
    if own := os.environ.get("WANDB_BASE_URL"):
        servers = [str(urlsplit(own).netloc)]
    try:
        kept = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(kept.authenticators(server) is not None for server in servers)
