"""The output head as arithmetic: hidden states to logits, whole or a chunk of rows at a time.

    logits = cap(scale * (h W^T + b)) / temperature        cap(z) = softcap * tanh(z / softcap), or z without one

covers every decoder-only family of transformers: Cohere multiplies its logits by a scale, Granite divides them,
Gemma 2 caps them, GPT-J and Phi have a bias.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# What the [rows, V] buffers of one chunk may take together. Larger chunks read the head less often, which matters where
# products are fast; 144 MiB is 384 rows of a 49K vocabulary in float32, 512 MiB is 880 rows of a 152K one in bfloat16.
CHUNK_BYTES = {"cpu": 144 * 2**20, "cuda": 512 * 2**20}


class HeadShape(NamedTuple):
    """What stands between the product h W^T and the distribution, apart from the bias."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: HeadShape) -> None:
    """Raise ValueError, saying what does not fit, unless hidden [N, d], weight [V, d] and bias [V] belong together."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [N, d] and [V, d]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [V] with V={weight.shape[0]}")
    if shape.temperature <= 0:
        raise ValueError(f"temperature must be positive, got {shape.temperature}")
    if shape.softcap is not None and shape.softcap <= 0:
        raise ValueError(f"softcap must be positive or None, got {shape.softcap}")


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: HeadShape) -> Tensor:
    """Differentiable logits [N, V], in float32 at least. hidden [N, d], weight [V, d], bias [V]."""
    logits = torch.nn.functional.linear(hidden, weight.to(hidden.dtype), None)
    logits = logits.to(reduction_dtype(hidden))
    if bias is not None:
        logits = logits + bias
    logits = logits * shape.scale
    if shape.softcap is not None:
        logits = shape.softcap * torch.tanh(logits / shape.softcap)
    return logits / shape.temperature


def reduction_dtype(hidden: Tensor) -> torch.dtype:
    """Softmax and sums run in float32, or in float64 where the hidden states do."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The matrix products follow autocast as torch.nn.Linear would, else the hidden states' own dtype."""
    kind = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def chunk_rows(rows: int, row_bytes: int, device: torch.device, chunk_bytes: int | None, least: int = 1) -> int:
    """How many of `rows` rows make a chunk whose buffers, `row_bytes` for each row, stay within `chunk_bytes`.

    All chunks get about as many rows. At least one row, whatever it takes; `least` where no budget is given.
    """
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    else:
        least = 1
    if chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes must be positive, got {chunk_bytes}")
    most = max(least, chunk_bytes // row_bytes)
    return max(1, -(-rows // max(1, -(-rows // most))))


_casts: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weight -> (its state when it was cast, the cast)


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A frozen weight in another dtype, cast once and kept as long as the weight lives and is not changed."""
    if weight.dtype == dtype:
        return weight
    if weight.is_inference():  # these have no version
        return weight.to(dtype)
    state = (weight._version, weight.data_ptr(), weight.device, dtype)
    kept = _casts.get(weight)
    if kept is None or kept[0] != state:
        kept = (state, weight.detach().to(dtype))
        _casts[weight] = kept
    return kept[1]
