"""What some methods do once before the first step, with model, data and device at hand.

Anything that a method is made of (a term, token weights, `method.learn`) may have `prepare` and `use` beside the rest:
EWC measures how much each weight matters, STM which tokens the base model finds likely. What `prepare` returns is kept
in the run directory, so that a resumed run goes on with the very same. selfaug/callbacks/prepare.py calls them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from selfaug.objective.batch import TokenBatch


@dataclass(frozen=True)
class Preparation:
    """What there is before the first step.

    model: on its device, sharded if it is to be, with the weights that the training starts from.
    loader: of the training steps of this process (selfaug.data.batching.StepLoader).
    steps: optimiser steps that the training has.
    rank, world: of this process, among how many.
    over_processes: adds a tensor up over all of them.
    corpus: reads texts that are no training data: (settings, their name in the configuration) to batches of one
        example each, on the CPU; settings as of evaluation.drift.corpora.
    progress: show bars.
    """

    model: nn.Module
    loader: Any
    steps: int
    rank: int
    world: int
    over_processes: Callable[[Tensor], Tensor]
    corpus: Callable[[Mapping[str, Any], str], Sequence[TokenBatch]]
    progress: bool = True


class Prepares(Protocol):
    """A part of a method that is prepared."""

    def prepare(self, at: Preparation) -> dict[str, Tensor]:
        """Computed by all processes together and the same in each. On the CPU; called under the training's autocast.

        Leaves no gradients behind, and the model as it was.
        """
        ...

    def use(self, found: Mapping[str, Tensor], at: Preparation) -> dict[str, float]:
        """Take what `prepare` has returned, now or before the run was stopped. Returns measurements of it, by name."""
        ...
