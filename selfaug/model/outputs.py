"""What modules inside the model put out, on chosen rows: the reference pass keeps it, the tuned pass compares with it.

Only the chosen rows of the reference are kept. The tuned pass keeps nothing: its outputs are compared where they
arise, inside the forward pass, and only the sum goes on.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# compare(tuned [N, width], reference [N, width], weights [N] or None) -> scalar, summed over the rows
Compare = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class ModuleOutputs:
    """The outputs of `modules` on the rows `mask` [B, T] bool: `recorded()` goes around the reference pass, then
    `compared(...)` around the tuned pass. Call `close()` after the backward pass.

    total: the sum of what was compared, a scalar.
    """

    def __init__(self, modules: Sequence[nn.Module], mask: Tensor):
        self.modules, self.mask = modules, mask
        self.total: Tensor = torch.zeros((), device=mask.device)
        self._kept: dict[nn.Module, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Inside, a forward pass leaves the rows of `mask` behind."""

        def keep(module: nn.Module, _: Any, output: Any) -> None:
            self._kept[module] = _tensor(output).detach()[self.mask]

        handles = [module.register_forward_hook(keep) for module in self.modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def compared(
        self, compare: Compare, mask: Tensor | None = None, weights: Tensor | None = None, gradient: bool = True
    ) -> Iterator[None]:
        """Inside, a forward pass adds `compare` of every module to `total`.

        mask: [B, T] bool, the rows to compare, where these are only a part of those that were recorded; weights: [N]
        of them. gradient: False measures only.
        """
        part = None if mask is None else mask[self.mask]
        rows = self.mask if mask is None else mask
        forward = True

        def add(module: nn.Module, _: Any, output: Any) -> None:
            # With gradient checkpointing the layers run again in the backward pass. Their hooks must then save what
            # they saved before, but the sum is complete. Other passes meanwhile are measurements, without gradients.
            if not (forward or torch.is_grad_enabled()):
                return
            reference = self._kept[module] if part is None else self._kept[module][part]
            with torch.set_grad_enabled(gradient and torch.is_grad_enabled()):
                value = compare(_tensor(output)[rows], reference, weights)
            if forward:
                self.total = self.total + value

        self._handles += [module.register_forward_hook(add) for module in self.modules]
        try:
            yield
        finally:
            forward = False
            if not torch.is_grad_enabled():
                self.close()

    def close(self) -> None:
        """Take the hooks off and forget the reference."""
        while self._handles:
            self._handles.pop().remove()
        self._kept.clear()


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
