"""What `python -m selfaug.evaluate` is pointed at: base model, adapter, checkpoint, run or another model."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from selfaug.errors import UserError
from selfaug.evaluate import BASE
from selfaug.run import build
from selfaug.run.identity import RunDirectory
from selfaug.run.models import Models, beside_base, check_vocabulary, device, saved_models, whole_model


def load_models(config: DictConfig) -> Models:
    """The base model `config.model` and, unless it is asked for alone, what `config.target` names.

    Raises:
        UserError: a target that is none of a run directory, an adapter, a checkpoint and a model.
    """
    target = str(config.target)
    if target == BASE:
        return Models(build.base_model(config).to(device(config)), None)
    path = Path(target).expanduser()
    folder = RunDirectory(path).tuned or path
    checkpoint, adapter = path.suffix == ".ckpt", (folder / "adapter_config.json").is_file()
    if not (checkpoint or adapter) and folder == path:
        if (path / "run.json").is_file():
            raise UserError(
                f"target={target} is a run without an adapter or a model yet: finish it, or set target to one of its "
                "checkpoints."
            )
        # Merged, fully fine-tuned elsewhere, or from the hub, which is no folder.
        models = beside_base(config, whole_model(config, target), path if path.is_dir() else None)
        check_vocabulary(config, models)
        return models
    try:
        models = beside_base(config, _from_checkpoint(config, path)) if checkpoint else saved_models(config, folder)
        check_vocabulary(config, models)
        return models
    except (RuntimeError, ValueError) as error:  # peft's and torch's ways of saying that shapes or names differ
        raise UserError(
            f"target={target} was not trained on model.name={config.model.name} "
            f"({str(error).strip().splitlines()[0]}): set model to the one that it was trained on."
        ) from error


def _from_checkpoint(config: DictConfig, path: Path) -> Any:
    """The base with the trained weights of a checkpoint of selfaug.train."""
    if not path.is_file():
        raise UserError(f"target={path} does not exist: set it to a checkpoint of a run.")
    if "adapter" not in config:
        raise UserError(f"target={path} is not in the checkpoints folder of a run, whose adapter settings it needs.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except (OSError, EOFError, RuntimeError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise UserError(f"target={path} cannot be read ({str(error).splitlines()[0]}): set another one.") from error
    model = build.tuned_model(config)
    trained = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    missing = {name for name, parameter in model.named_parameters() if parameter.requires_grad} - set(trained)
    if missing:
        raise UserError(f"target={path} does not hold the weights that were trained ({min(missing)}): set another one.")
    model.load_state_dict(trained, strict=False)
    return model
