"""Loggers: metrics.csv always, Weights & Biases and TensorBoard when asked."""

import netrc
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from selfaug.callbacks.metrics_file import MetricsFile
from selfaug.errors import UserError
from selfaug.reporting.results import mask_secrets
from selfaug.run.identity import config_hash
from selfaug.run.sweep import SWEEP_VARIABLE


def build_loggers(config: DictConfig, directory: Path) -> list[Logger]:
    """The loggers of a run: MetricsFile and those of config.logger (name to settings).

    Raises UserError for an unknown logger or one whose package is missing.
    """
    loggers: list[Logger] = [MetricsFile(directory)]
    for name, settings in (config.logger or {}).items():
        arguments = dict(OmegaConf.to_container(settings, resolve=True)) if settings else {}
        try:
            if name == "wandb":
                loggers.append(_wandb(config, directory, arguments))
            elif name == "tensorboard":
                loggers.append(TensorBoardLogger(str(directory), name="tensorboard", version="", **arguments))
            else:
                raise UserError(f"logger.{name} is unknown: set logger to csv, wandb or tensorboard.")
        except ModuleNotFoundError as error:
            raise UserError(f"logger={name} needs a package that is missing: pip install 'selfaug[{name}]'.") from error
    return loggers


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
    logger.experiment.config.update(mask_secrets(OmegaConf.to_container(config, resolve=True)), allow_val_change=True)
    return logger


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
