"""The models that are scored: what was trained, read back from where it was saved, and its base beside it."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from selfaug.errors import UserError
from selfaug.model.load import load_adapter, load_base
from selfaug.model.reference import adapters_off, check_runs, keeps_base
from selfaug.run import build


@dataclass
class Models:
    """What is compared. shared: the base is the tuned model with its adapters off; otherwise two models, or one."""

    base: nn.Module
    tuned: nn.Module | None
    shared: bool = False
    folder: Path | None = None  # where the tuned model lies: an adapter, or a whole model

    def as_base(self) -> AbstractContextManager[Any]:
        return adapters_off(self.base) if self.shared else nullcontext()

    @property
    def second(self) -> nn.Module | None:
        """The base, where it is a model of its own."""
        return None if self.shared else self.base


def device(config: DictConfig) -> torch.device:
    """Where models are scored."""
    return torch.device("cuda" if torch.cuda.is_available() and config.trainer.accelerator != "cpu" else "cpu")


def saved_models(config: DictConfig, folder: Path) -> Models:
    """Base and tuned model of a folder that holds an adapter, or a whole model."""
    if (folder / "adapter_config.json").is_file():
        return beside_base(config, load_adapter(build.base_model(config), folder), folder)
    return beside_base(config, whole_model(config, str(folder)), folder)


def beside_base(config: DictConfig, tuned: nn.Module, folder: Path | None = None) -> Models:
    """The tuned model and its base: the same with its adapters off where that is exact, else a second model."""
    check_runs(tuned)
    tuned = tuned.to(device(config))
    if keeps_base(tuned):
        return Models(tuned, tuned, shared=True, folder=folder)
    return Models(build.base_model(config).to(device(config)), tuned, folder=folder)


def whole_model(config: DictConfig, name: str) -> nn.Module:
    """A model of its own: fully fine-tuned, merged, or from the hub."""
    settings = build.precision(config)
    return load_base(
        name, dtype="bfloat16" if settings.name == "bf16-true" else config.model.dtype, mixed=settings.mixed,
        attn_implementation=config.model.attn_implementation, setting="target",
    )  # fmt: skip


def check_vocabulary(config: DictConfig, models: Models) -> None:
    """Raise UserError where the two models have different numbers of tokens."""
    both: list[Any] = [models.base, models.tuned]
    sizes = [one.get_output_embeddings().weight.shape[0] for one in both]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"target={config.target} has a vocabulary of {sizes[1]} tokens and model.name={config.model.name} one of "
            f"{sizes[0]}: set model to the one that it was made from."
        )
