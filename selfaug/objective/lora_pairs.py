"""The LoRA layers of a model as pairs of matrices: the effective weight of each is W + scale * B A."""

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from selfaug.errors import UserError


@dataclass(frozen=True)
class LoraPair:
    """One layer. name: of its module, a LoraLayer. A: [r, in], B: [out, r], as parameters of the model."""

    name: str
    layer: Any
    A: nn.Parameter
    B: nn.Parameter
    scale: float

    def weight(self) -> Tensor:
        """W [out, in] of the base layer, without a graph, whole where it is sharded."""
        weight = whole(self.layer.get_base_layer().weight.detach())
        return weight.T if getattr(self.layer, "fan_in_fan_out", False) else weight


def lora_pairs(model: nn.Module, what: str) -> list[LoraPair]:
    """All trained pairs of matrices; an empty list where `model` has no LoRA.

    Raises UserError, in the name of `what`, where their product is not what is added to the weight (DoRA and other
    variants; an embedding), or where a layer has several adapters at once.
    """
    pairs = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module
        if any(adapter in layer.lora_embedding_A for adapter in layer.active_adapters):
            raise UserError(
                f"{what} is a formula for linear layers, and {name} is an embedding with LoRA: take it out of "
                "adapter.target_modules."
            )
        adapters = [a for a in layer.active_adapters if a in layer.lora_A and layer.lora_A[a].weight.dim() == 2]
        if len(adapters) > 1:
            raise UserError(f"{what} takes one adapter for each layer, and {name} has {len(adapters)}: train one only.")
        for adapter in adapters:
            if variant := layer.lora_variant.get(adapter):
                raise UserError(
                    f"{what} is a formula for plain LoRA, where B A is what changes of a weight, and {name} has a "
                    f"{type(variant).__name__.removesuffix('LinearVariant')}: set adapter=lora."
                )
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            pairs.append(LoraPair(name, layer, a, b, float(layer.scaling[adapter])))
    return pairs


def whole(tensor: Tensor) -> Tensor:
    """A sharded parameter gathered, with a graph, and in float32 at least.

    The gradient that flows back is this process's slice of it and is not averaged over the processes, which is what the
    training expects of a penalty: every process has the whole of it, times (1 / processes) * processes.
    """
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
