"""The reference from a second, frozen copy of the base model.

For trainings that change the base weights themselves (full fine-tuning), or adapters that do so when they are added
(PiSSA and the like), where there is nothing to switch off. It holds two models; selfaug/model/cache.py needs one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from selfaug.errors import UserError
from selfaug.model.decoder import Decoder
from selfaug.model.reference import AdaptersOff, ReferenceStates, Score, check_head_frozen, check_runs


class FrozenCopy:
    """A Reference (selfaug/model/reference.py).

    Args:
        load: makes the base model. It is called once, when the copy is first needed.
        device: where the copy computes; None: where the tuned model does.
    """

    def __init__(self, load: Callable[[], nn.Module], device: str | None = None):
        self._load, self._device = load, None if device is None else _device(device)
        self._model: nn.Module | None = None

    @property
    def model(self) -> nn.Module:
        """The base model, frozen and in eval mode."""
        if self._model is None:
            self._model = self._load().requires_grad_(False).eval()
        return self._model

    def on(self, device: torch.device) -> nn.Module:
        """The copy on its device, for a tuned model on `device`."""
        return self.model.to(self._device or device)

    def bytes_on(self, device: torch.device) -> int:
        """What the copy takes there, for a tuned model on `device`."""
        there = self._device or device
        if there.type != device.type or (there.index or 0) != (device.index or 0):
            return 0
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))

    def check(self, model: nn.Module) -> None:
        """Raises UserError where the head trains, or where the copy has another one: both models must share it."""
        check_runs(model)
        check_head_frozen(model)
        ours, theirs = (Decoder(one).head for one in (model, self.model))
        for name in ("weight", "bias"):
            mine, copied = (one.arguments()[name] for one in (ours, theirs))
            if (mine is None) != (copied is None) or (mine is not None and not _equal(mine, copied)):
                raise UserError(
                    "The frozen copy of the reference has another output head than the model that trains: make it from "
                    "the same base model."
                )

    def states(self, decoder: Decoder, tokens: Any, *, masked: bool, score: Score | None = None) -> ReferenceStates:
        device = tokens.input_ids.device
        copy = Decoder(self.on(device))
        there = copy.head.arguments()["weight"].device
        with autocast_as(device, there):
            # The copy has no adapters: off or on, it is the base model.
            found = AdaptersOff().states(copy, tokens.to(there), masked=masked, score=score)
        return ReferenceStates(found.hidden.to(device), None if found.scores is None else found.scores.to(device))


def autocast_as(device: torch.device, there: torch.device) -> torch.autocast:
    """Inside, `there` has the autocast of `device`, which is a setting of each kind of device."""
    return torch.autocast(
        there.type, dtype=torch.get_autocast_dtype(device.type), enabled=torch.is_autocast_enabled(device.type)
    )


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.detach().cpu().float(), other.detach().cpu().float())


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"reference.device={name} is no device: set it to null (where the model trains), cpu, or cuda:1 and so on."
        ) from error
