"""What `python -m selfaug.evaluate` is pointed at: base model, adapter, checkpoint, run or another model."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from selfaug.errors import UserError
from selfaug.evaluate import BASE
from selfaug.model.load import add_adapter, load_adapter, load_base
from selfaug.model.reference import check_adapters
from selfaug.run import build
from selfaug.run.score import Models, device


def load_models(config: DictConfig) -> Models:
    """The base model `config.model` and, unless it is asked for alone, what `config.target` names.

    Raises:
        UserError: a target that is none of a run directory, an adapter, a checkpoint and a model.
    """
    where, target = device(config), str(config.target)
    base = build.base_model(config)
    if target == BASE:
        return Models(base.to(where), None)
    path = Path(target).expanduser()
    folder = path / "adapter" if (path / "adapter" / "adapter_config.json").is_file() else path
    checkpoint, adapter = path.suffix == ".ckpt", (folder / "adapter_config.json").is_file()
    if checkpoint or adapter:
        try:
            model = _from_checkpoint(config, base, path) if checkpoint else load_adapter(base, folder)
        except (RuntimeError, ValueError) as error:  # peft's and torch's ways of saying that shapes or names differ
            raise UserError(
                f"target={target} is no adapter of model.name={config.model.name} "
                f"({str(error).strip().splitlines()[0]}): set model to the one that it was trained on."
            ) from error
        check_adapters(model)  # with them off it must be the base
        model = model.to(where)
        return Models(model, model, shared=True, adapter=folder if adapter else None)
    if (path / "run.json").is_file():
        raise UserError(
            f"target={target} is a run without an adapter yet: finish it, or set target to one of its checkpoints."
        )
    # A model of its own: merged, fully fine-tuned, or from the hub.
    settings = build.precision(config)
    tuned = load_base(
        target, dtype="bfloat16" if settings.name == "bf16-true" else config.model.dtype, mixed=settings.mixed,
        attn_implementation=config.model.attn_implementation, setting="target",
    )  # fmt: skip
    sizes = [one.get_output_embeddings().weight.shape[0] for one in (base, tuned)]  # type: ignore[operator]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"target={target} has a vocabulary of {sizes[1]} tokens and model.name={config.model.name} one of "
            f"{sizes[0]}: set model to the one that it was made from."
        )
    return Models(base.to(where), tuned.to(where))


def _from_checkpoint(config: DictConfig, base: Any, path: Path) -> Any:
    """The base with the trained weights of a checkpoint of selfaug.train."""
    if not path.is_file():
        raise UserError(f"target={path} does not exist: set it to a checkpoint of a run.")
    if "adapter" not in config:
        raise UserError(f"target={path} is not in the checkpoints folder of a run, whose adapter settings it needs.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except (OSError, EOFError, RuntimeError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise UserError(f"target={path} cannot be read ({str(error).splitlines()[0]}): set another one.") from error
    model = add_adapter(base, build.make(config.adapter, "adapter"))
    trained = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    missing = {name for name, parameter in model.named_parameters() if parameter.requires_grad} - set(trained)
    if missing:
        raise UserError(f"target={path} does not hold the adapter's weights ({min(missing)}): set another one.")
    model.load_state_dict(trained, strict=False)
    return model
