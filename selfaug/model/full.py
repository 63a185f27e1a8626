"""Full fine-tuning: no adapter, the base model's own weights train, all of them or a choice.

A choice is `all`, or one item or a list of items, each of them
    7, 0-14        decoder layers, counted from the input at 0; both ends belong to it
    0-50%          the same as a share of the layers, so that one choice fits models of any depth (the lower half)
    embeddings     the input embeddings; where they are tied to the output head, that is frozen or trained with them
    head           the output head
    self_attn      anything else is a regular expression, which a part of the weight's name must match
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from selfaug.errors import UserError
from selfaug.model.decoder import Decoder, decoder_layers

_LAYERS = re.compile(r"(\d+)(?:-(\d+))?(%)?")

Choice = str | int | Sequence[str | int] | None


@dataclass(frozen=True)
class FullFineTuning:
    """`train` without what `freeze` names; either a choice as above, None for nothing.

    Raises:
        UserError: a choice of another kind.
    """

    train: Choice = "all"
    freeze: Choice = None

    def __post_init__(self) -> None:
        for name in ("train", "freeze"):
            for item in _items(getattr(self, name)):
                if isinstance(item, bool) or not isinstance(item, (str, int)) or item == "":
                    raise UserError(
                        f"adapter.{name}={getattr(self, name)} is not allowed: set it to all, embeddings, head, layers "
                        "(0-14 or 0-50%), a regular expression of names, a list of these, or null."
                    )

    def apply(self, model: nn.Module) -> nn.Module:
        """Make the chosen weights of a transformers model trainable and freeze all others; returns the model.

        Raises:
            UserError: an item that no weight fits, nothing left to train, or weights that are to train in low
                precision: at the learning rates of full fine-tuning most updates would be rounded away.
        """
        frozen = _chosen(model, self.freeze, "adapter.freeze")
        chosen = _chosen(model, self.train, "adapter.train") - frozen
        if not chosen:
            raise UserError(
                f"adapter.train={self.train} with adapter.freeze={self.freeze} leaves nothing to train: choose "
                "more, or freeze less."
            )
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                raise UserError(
                    "adapter=full trains the weights themselves, and in bfloat16 most updates are too small to change "
                    "them: set model.dtype=auto and trainer.precision=bf16-mixed or 32-true (float32 weights)."
                )
        return model


def _items(choice: Choice) -> list[Any]:
    if choice is None:
        return []
    return list(choice) if isinstance(choice, (list, tuple)) else [choice]


def _chosen(model: nn.Module, choice: Choice, setting: str) -> set[int]:
    """The ids of the parameters. (A tied weight is one parameter with several names.)"""
    chosen: set[int] = set()
    for item in _items(choice):
        found = _fitting(model, str(item))
        if not found:
            names, layers = [name for name, _ in model.named_parameters()], decoder_layers(Decoder(model).body)
            raise UserError(
                f"{setting}: no weight of {type(model).__name__}, which has {len(layers)} layers, fits {item}: set it "
                f"to layers, embeddings, head or a part of a name such as {names[len(names) // 2]}."
            )
        chosen |= found
    return chosen


def _fitting(model: Any, item: str) -> set[int]:
    if item == "all":
        return {id(p) for p in model.parameters()}
    if item in ("embeddings", "head"):
        module = model.get_input_embeddings() if item == "embeddings" else model.get_output_embeddings()
        return {id(p) for p in module.parameters()}
    if place := _LAYERS.fullmatch(item):
        layers = decoder_layers(Decoder(model).body)
        first, last = int(place[1]), int(place[2] or place[1])
        if first > last or last > (100 if place[3] else len(layers) - 1):
            return set()  # what is not there is not left out without a word
        if place[3]:  # a share; a layer belongs to the part in which it begins
            inside = [layer for i, layer in enumerate(layers) if first * len(layers) <= 100 * i < last * len(layers)]
        else:
            inside = list(layers)[first : last + 1]
        return {id(p) for layer in inside for p in layer.parameters()}
    try:
        pattern = re.compile(item)
    except re.error as error:
        raise UserError(f"adapter: {item} is no regular expression ({error}): correct it.") from error
    return {id(p) for name, p in model.named_parameters(remove_duplicate=False) if pattern.search(name)}
