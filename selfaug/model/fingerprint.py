"""Who a base model is: a digest of all that decides what it computes.

Of the weights themselves and not of their name: one changed element of one weight gives another digest, while adapters
around the base, and the names that peft gives its modules then, do not.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from selfaug.model.attention import ATTENTION_PREFIX

_CHUNK = 1 << 22  # bytes that one thread hashes at a time
_BASE = frozenset({"base_layer", "original_module"})  # where peft's wrappers keep what they wrap
_PEFT = _BASE | {"token_adapter"}  # what peft adds to the names of the base's own weights
# Settings of a model that say nothing about its hidden states: where it came from, and whether generation keeps keys.
_IRRELEVANT = ("_name_or_path", "transformers_version", "use_cache")


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every weight and buffer of the base model, by its name there; tied ones under each of their names.

    The same for a transformers model, for a PeftModel around it and for one with injected adapters. Rotary tables are
    left out: they follow from the configuration, and some of them change with the length of the text.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    wrappers = tuple(
        f"{name}." if name else ""
        for name, module in inner.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    )
    tensors = {}
    everything = [*inner.named_parameters(remove_duplicate=False), *inner.named_buffers(remove_duplicate=False)]
    for name, tensor in everything:
        inside = [name[len(wrapper) :].split(".") for wrapper in wrappers if name.startswith(wrapper)]
        if "inv_freq" in name or not all(_BASE.intersection(parts) for parts in inside):
            continue
        if inside:
            name = ".".join(part for part in name.split(".") if part not in _PEFT)
        tensors[name] = tensor
    return tensors


def model_digest(model: nn.Module) -> str:
    """A digest of the base model of `model`: its weights and buffers, configuration, and the libraries that run it.

    32 hex digits. Hashed on several threads (hashlib gives the interpreter lock back), about a second per GB and
    thread. Of a sharded model every process must call it, because its weights are gathered.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    settings = {key: value for key, value in inner.config.to_dict().items() if key not in _IRRELEVANT}
    described: list[Any] = [
        type(inner).__name__,
        settings,
        # Ours hands on to transformers' own where nothing is packed, and an entry never is.
        str(inner.config._attn_implementation).removeprefix(ATTENTION_PREFIX),
        torch.__version__,
        transformers.__version__,
    ]
    seen: dict[int, list[str]] = {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(cores) as pool:
        for name, tensor in sorted(base_tensors(model).items()):
            if id(tensor) not in seen:
                seen[id(tensor)] = list(pool.map(_digest, _chunks(tensor)))
            described.append([name, str(tensor.dtype), list(tensor.shape), seen[id(tensor)]])
    return _digest(json.dumps(described, sort_keys=True, default=_plain).encode())


def place_digest(digest: str, device: torch.device) -> str:
    """The digest of a model (model_digest) that runs on `device` as things stand: under autocast or not, and so on.

    These can differ from one forward pass to the next, so they are asked for with each.
    """
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    surroundings = [device.type, autocast, torch.get_default_dtype(), _float32_products()]
    return _digest(json.dumps([digest, *map(str, surroundings)]).encode())


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, in row-major order; without a copy where it is contiguous."""
    # Not Tensor.numpy(), after which the storage could no longer be resized, as FSDP does with gathered weights.
    return np.from_dlpack(tensor.detach().contiguous().reshape(-1).view(torch.uint8)).data


def _chunks(tensor: Tensor) -> list[memoryview]:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    content = tensor_bytes(whole.detach().cpu())
    return [content[start : start + _CHUNK] for start in range(0, len(content), _CHUNK)]


def _float32_products() -> str:
    """In what precision products of float32 matrices are taken (TF32 and the like)."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by torch's newer names
        return str(torch.backends.cuda.matmul.fp32_precision)


def _digest(content: bytes | memoryview) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)
