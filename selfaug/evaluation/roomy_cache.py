"""Keys and values with room to grow.

transformers' DynamicCache makes a longer copy of all keys and values for every new token, which on a CPU takes as long
as attending to them. Here there is room for the next tokens, and a copy is made only when it is used up.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 64  # tokens


def roomy_cache(config: Any) -> DynamicCache:
    """A DynamicCache for a model of `config`, whose layers that keep everything have room to grow."""
    cache = DynamicCache(config=config)
    # Layers of other kinds (sliding windows, recurrent states) do not grow without end.
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class RoomyLayer(DynamicLayer):
    """`keys` and `values` [B, heads, T, d] are the filled part of longer tensors."""

    _rooms: tuple[Tensor, Tensor] | None = None  # [B, heads, T + room, d]
    _views: tuple[Tensor, Tensor] | None = None  # what update() has returned

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        # Somebody may have put other tensors in place meanwhile: sequences that were reordered or taken out.
        ours = self._views is not None and self._views[0] is self.keys and self._views[1] is self.values
        if self._rooms is None or not ours or stop > self._rooms[0].shape[-2]:
            self._rooms = (self._room(self.keys, key_states, stop), self._room(self.values, value_states, stop))
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[..., start:stop, :] = new
        self._views = self._rooms[0][..., :stop, :], self._rooms[1][..., :stop, :]
        self.keys, self.values = self._views
        return self._views

    def _room(self, old: Tensor | None, new: Tensor, stop: int) -> Tensor:
        room = new.new_empty(*new.shape[:-2], stop + ROOM, new.shape[-1])
        start = stop - new.shape[-2]
        if start and old is not None:
            room[..., :start, :] = old
        return room

    def reset(self) -> None:
        super().reset()
        self._rooms = self._views = None
