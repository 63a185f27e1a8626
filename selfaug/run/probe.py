"""How a model's memory grows with the micro-batch, measured: it runs forward and backward over three short sequences,
and the bytes that live meanwhile are fitted."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selfaug.model.decoder import Decoder
from selfaug.model.reference import adapters_off

LONGEST = 128  # tokens of the longest probe; the others have a half and a quarter of it
_STRAIGHT = 0.002  # a quadratic part below this share of the longest probe may be noise


class Growth(NamedTuple):
    """Bytes of a micro-batch: constant + per_token * tokens + per_pair * tokens * longest sequence. The last part is
    attention that builds its whole matrix (eager), else 0."""

    constant: float
    per_token: float
    per_pair: float

    def __call__(self, tokens: int, longest: int) -> float:
        return self.constant + self.per_token * tokens + self.per_pair * tokens * longest


class Measured(NamedTuple):
    """held: what the forward pass keeps for the backward pass. top: the most that lives at once in forward, reference
    and backward pass, without the loss. Neither holds weights or gradients. state_bytes: of one token's last hidden
    state."""

    held: Growth
    top: Growth
    state_bytes: int


def measure(
    model: nn.Module, forward_context: Callable[[], AbstractContextManager[Any]], *, reference: bool
) -> Measured:
    """Run `model` on its device, in the mode it is in; its gradients and the random state are left as they were.

    forward_context: what the forward passes run under (autocast). reference: a pass with adapters off follows the
    tuned one.
    """
    decoder = Decoder(model)
    weight = decoder.head.arguments()["weight"]
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST  # type: ignore
    lengths = [min(LONGEST, most) // part for part in (4, 2, 1)]
    held, top, state_bytes = [], [], 0
    devices = [weight.device] if weight.device.type == "cuda" else []
    with _gradients_in_place(model), torch.random.fork_rng(devices=devices):
        for length in lengths[:1] * len(devices) + lengths:  # CUDA's libraries first take room for themselves
            ids = (torch.arange(length, device=weight.device) % len(weight)).unsqueeze(0)
            mask = torch.ones_like(ids)
            with _meter(model, weight.device) as meter:
                with forward_context():
                    states = decoder.hidden(ids, mask, right_padded=True)  # [1, T, d]
                    held.append(meter.live())
                    if reference:
                        with adapters_off(model):
                            base = decoder.hidden(ids, mask, right_padded=True)
                        del base
                states.backward(torch.zeros_like(states))
                top.append(meter.peak())
            state_bytes = states.shape[-1] * states.element_size()
            del states
    return Measured(fit(lengths, held[-3:]), fit(lengths, top[-3:]), state_bytes)


def fit(lengths: Sequence[int], values: Sequence[int]) -> Growth:
    """Through measurements of three single sequences, ascending; straight where the curve is hardly bent."""
    x, y = np.asarray(lengths, dtype=np.float64), np.asarray(values, dtype=np.float64)
    bent = np.polyfit(x, y, 2)
    if bent[0] * x[-1] ** 2 > _STRAIGHT * y[-1]:
        return Growth(float(bent[2]), float(bent[1]), float(bent[0]))
    slope, constant = np.polyfit(x[1:], y[1:], 1)
    return Growth(float(constant), float(slope), 0.0)


@contextmanager
def _gradients_in_place(model: nn.Module) -> Iterator[None]:
    """Gradients are there before the measurement begins: the plan counts them by themselves."""
    before = [(p, p.grad) for p in model.parameters() if p.requires_grad]
    try:
        for parameter, _ in before:
            parameter.grad = torch.zeros_like(parameter)
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def _meter(model: nn.Module, device: torch.device) -> Any:
    return _Allocator(device) if device.type == "cuda" else _Tensors(model)


class _Allocator:
    """What CUDA's allocator counts."""

    def __init__(self, device: torch.device):
        self.device, self.before = device, 0

    def __enter__(self) -> "_Allocator":
        torch.cuda.reset_peak_memory_stats(self.device)
        self.before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    def live(self) -> int:
        return torch.cuda.memory_allocated(self.device) - self.before

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self.before


class _Tensors(TorchDispatchMode):
    """The storages of all tensors that operations return, while they live; for devices whose allocator does not tell.
    Those of `model`'s parameters, gradients and buffers are not counted."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._now = self._peak = 0
        self._known: dict[int, Any] = {}  # id of a storage -> a reference that notices its end
        for tensor in (*model.parameters(), *model.buffers()):
            for own in (tensor, tensor.grad):
                if own is not None:
                    storage = own.untyped_storage()
                    self._known[id(storage)] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def end(_: Any) -> None:
            self._now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, end)
        self._now += size
        self._peak = max(self._peak, self._now)

    def live(self) -> int:
        return self._now

    def peak(self) -> int:
        return self._peak
