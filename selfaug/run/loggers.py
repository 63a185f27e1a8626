"""Loggers: metrics.csv always, Weights & Biases and TensorBoard when asked."""

import netrc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from omegaconf import DictConfig

from selfaug.callbacks.metrics_file import MetricsFile
from selfaug.errors import UserError
from selfaug.reporting.results import Results, mask_secrets
from selfaug.run.build import plain
from selfaug.run.identity import config_hash
from selfaug.run.sweep import SWEEP_VARIABLE


@contextmanager
def run_loggers(config: DictConfig, directory: Path, training: bool = True) -> Iterator[list[Logger]]:
    """The loggers of a run, closed at the end: those of config.logger (name to settings) and, while training,
    MetricsFile.

    Raises UserError for an unknown logger or one whose package is missing.
    """
    loggers: list[Logger] = [MetricsFile(directory)] if training else []
    try:
        _add_chosen(loggers, config, directory)
        yield loggers
    finally:
        for logger in loggers:
            logger.finalize("success")
            if isinstance(logger, WandbLogger):
                # Otherwise the next job of a sweep in this process would write into the same W&B run.
                logger.experiment.finish()


def log_results(loggers: list[Logger], results: Results) -> None:
    """The scores of a run, as task/... and drift/..., and as the summary of its W&B run."""
    for logger in loggers:
        if isinstance(logger, MetricsFile):
            continue  # its rows are steps; the scores are in results.json
        logger.log_metrics(scalars(results))
        if isinstance(logger, WandbLogger):
            columns = ["id", "question", "base", "tuned"]
            logger.log_text("samples", columns, [[str(row[key]) for key in columns] for row in results.samples])


def scalars(results: Results) -> dict[str, float]:
    """task/exact_match, task/exact_match_base, drift/wikipedia/kl_base_tuned ...: the means of results.json."""
    groups = {"task": results.task, "retention/mean": {"kept": results.retention_mean}}
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


def _add_chosen(loggers: list[Logger], config: DictConfig, directory: Path) -> None:
    for name, settings in (config.logger or {}).items():
        arguments = plain(settings) if settings else {}
        try:
            if name == "wandb":
                loggers.append(_wandb(config, directory, arguments))
            elif name == "tensorboard":
                loggers.append(TensorBoardLogger(str(directory), name="tensorboard", version="", **arguments))
            else:
                raise UserError(f"logger.{name} is unknown: set logger to csv, wandb or tensorboard.")
        except ModuleNotFoundError as error:
            raise UserError(f"logger={name} needs a package that is missing: pip install 'selfaug[{name}]'.") from error


def _wandb(config: DictConfig, directory: Path, arguments: dict[str, Any]) -> WandbLogger:
    """A run whose id is the configuration's hash, so that resuming continues it; its group is the sweep."""
    offline = arguments.pop("offline", "auto")
    if offline == "auto":
        offline = not _has_wandb_key()
    arguments.setdefault("group", os.environ.get(SWEEP_VARIABLE))
    os.environ.setdefault("WANDB_SILENT", "true")
    logger = WandbLogger(
        name=config.run_name,
        id=config_hash(config),
        save_dir=str(directory),
        offline=offline,
        resume=None if offline else "allow",  # offline files of one id are merged when they are synced
        tags=list(config.tags),
        job_type="train",
        **arguments,
    )
    logger.experiment.config.update(mask_secrets(plain(config)), allow_val_change=True)
    return logger


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
