"""The weights of all terms, step by step: their schedules asked, and told what came of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from selfaug.errors import UserError
from selfaug.objective.schedules import Observed
from selfaug.objective.terms import Term


class Alphas:
    """The schedules of `terms` (name to Term). others: further parts of the loss, whose weights are constant.

    Raises:
        UserError: gradients are to be balanced between more than two parts.
    """

    def __init__(self, terms: Mapping[str, Term], others: int = 0):
        self.terms = dict(terms)
        self.schedules = {name: term.schedule for name, term in self.terms.items() if term.schedule is not None}
        if len(terms) + others > 1 and any(
            s.wants_gradients(step) for s in self.schedules.values() for step in range(100)
        ):
            raise UserError(
                "alignment/schedule=gradient_balance balances the NLL with one term, and the method has several: use "
                "another schedule."
            )

    def __call__(self, step: int, steps: int) -> dict[str, float]:
        """The weights in step 0 <= step < steps, by name."""
        alphas = {name: term.alpha for name, term in self.terms.items()}
        return alphas | {name: s.alpha(alphas[name], step, steps) for name, s in self.schedules.items()}

    def wants_gradients(self, step: int) -> bool:
        """Whether `observe` needs the gradient norms of this step."""
        return any(schedule.wants_gradients(step) for schedule in self.schedules.values())

    def observe(
        self,
        penalties: Sequence[float | None],
        drift: float | None,
        nll_norm: float | None,
        weighted_norm: float | None,
    ) -> None:
        """After a step. penalties: of all terms, in order, None of one that the step says nothing of (it had no rows,
        or the model is still the base model); weighted_norm: of the gradient of alpha * term."""
        for (name, term), penalty in zip(self.terms.items(), penalties, strict=True):
            if (schedule := self.schedules.get(name)) is not None:
                alpha = schedule.alpha(term.alpha, 0, 1) if schedule.adaptive else 0.0
                norm = None if weighted_norm is None or not alpha else weighted_norm / alpha
                schedule.observe(term.alpha, Observed(penalty, drift, nll_norm, norm))

    def state_dict(self) -> dict[str, Any]:
        return {name: schedule.state_dict() for name, schedule in self.schedules.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, schedule in self.schedules.items():
            schedule.load_state_dict(state[name])


class Balance:
    """How large the gradients of the NLL and of the rest of the loss are, over all trained weights of `model`.

    `add` the NLL of every micro-batch before its backward pass; what is then left of the whole gradient is the rest's.
    One more backward pass, and a copy of the gradients.
    """

    def __init__(self, model: nn.Module):
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.gradients = [torch.zeros_like(p) for p in self.weights]

    def add(self, nll: Tensor) -> None:
        with torch.autocast(nll.device.type, enabled=False):
            found = torch.autograd.grad(nll, self.weights, retain_graph=True, allow_unused=True)
        for gradient, more in zip(self.gradients, found, strict=True):
            if more is not None:
                gradient += more

    def norms(self, over_processes: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """(of the NLL, of the rest), when the weights hold the whole gradient of the step."""
        nll = rest = torch.zeros((), dtype=torch.float64)
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            gradient = over_processes(gradient)
            whole = torch.zeros_like(gradient) if weight.grad is None else weight.grad
            nll = nll.to(gradient.device) + _square(gradient)
            rest = rest.to(gradient.device) + _square(whole - gradient)
        return math.sqrt(float(nll)), math.sqrt(float(rest))


def _square(gradient: Tensor) -> Tensor:
    square: Tensor = gradient.double().square().sum()
    return square.full_tensor() if isinstance(square, DTensor) else square
