"""Attention over packed rows, and attention as a measure of which tokens matter.

Both need to stand where the model attends. transformers looks that function up by name in a registry, so one function
is registered here and a model is told its name, once and for good: with gradient checkpointing the layers run again
in the backward pass, long after the call that they belong to. Without anything to cut or to record the function hands
on to transformers' own (sdpa or eager), unchanged.

Where transformers itself keeps packed examples apart, in its flash and flex attention, it is left to do so.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from selfaug.errors import UserError

ATTENTION_PREFIX = "selfaug_"
_CUT = ("sdpa", "eager")  # the implementations that are cut here, example by example
_SCORES = 2**24  # attention probabilities that are held at once while recording (64 MiB)
# The longest example of the packed row that is on its way through the model: how large a mask has to be.
_longest: ContextVar[int | None] = ContextVar("longest", default=None)
_recorder: ContextVar["_Recorder | None"] = ContextVar("recorder", default=None)


class Asking(Protocol):
    """What recording needs to know of a batch (selfaug.objective.TokenBatch)."""

    @property
    def asking(self) -> Tensor: ...
    @property
    def examples(self) -> tuple[tuple[Any, str], ...]: ...


# ---- packing -------------------------------------------------------------------------------------------------------


def packed_states(body: nn.Module, input_ids: Tensor, spans: Sequence[Any]) -> Tensor:
    """Last hidden states [1, T, d] of examples that follow each other in one row.

    Each has positions from 0 and attends to itself alone. input_ids: [1, T]; spans: (row, start, stop) of each
    example, in order, which together cover the row.

    Raises UserError where the model's attention cannot be cut.
    """
    edges = [0, *(span[2] for span in spans)]
    if input_ids.shape != (1, edges[-1]) or [(0, *edge) for edge in pairwise(edges)] != [tuple(s) for s in spans]:
        raise ValueError(f"spans {list(spans)} do not cover one row of tokens {tuple(input_ids.shape)} without a gap")
    lengths = tuple(stop - start for start, stop in pairwise(edges))
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0).to(input_ids.device, non_blocking=True)
    arguments: dict[str, Any] = {"input_ids": input_ids, "position_ids": positions, "use_cache": False}
    implementation = _prepare(body)
    if implementation in _CUT:
        # With a mask transformers does not look for examples in the positions, for which it would build one of [T, T].
        arguments |= {"attention_mask": torch.ones_like(input_ids), "packed_lengths": lengths}
    elif "flash" in implementation:
        ends = torch.tensor(edges, dtype=torch.int32).to(input_ids.device, non_blocking=True)
        arguments |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        arguments |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    token = _longest.set(max(lengths))
    try:
        return body(**arguments).last_hidden_state
    finally:
        _longest.reset(token)


# ---- recording -----------------------------------------------------------------------------------------------------


@contextmanager
def received_attention(body: nn.Module, tokens: Asking) -> Iterator[Callable[[], Tensor]]:
    """Inside, a forward pass of `body` over `tokens`, padded or packed, records how much attention each token gets.

    Yields a function that returns it afterwards: [B, T] float32, for token j the attention probability that the
    question and response tokens behind it in its example give it, on average over these tokens, all heads and all
    layers; 0 for padding and where no such token follows. Only the rows of these tokens are computed.

    Raises UserError where the model's attention cannot be recorded, at the latest when it is asked for.
    """
    implementation = _prepare(body)
    recorder = _Recorder(tokens)
    own = None
    if implementation not in _CUT:  # known under transformers' own name: stand in for it while this lasts
        own = AttentionInterface()[implementation]
        AttentionInterface.register(implementation, _attention(own))
    token = _recorder.set(recorder)
    try:
        yield recorder.mean
    finally:
        _recorder.reset(token)
        if own is not None:
            AttentionInterface.register(implementation, own)


class _Recorder:
    """Adds up the attention that the asking tokens of each example give, layer by layer."""

    def __init__(self, tokens: Asking):
        device = tokens.asking.device
        asking = tokens.asking.cpu()
        self.sum = torch.zeros(asking.shape, device=device)
        count = torch.zeros(asking.shape)
        self.layers = 0
        self.examples: list[tuple[Any, Tensor]] = []
        for span, _ in tokens.examples:
            here = asking[span.row, span.start : span.stop]
            behind = here.flip(0).cumsum(0).flip(0) - here.long()  # asking tokens after each token
            count[span.row, span.start : span.stop] = behind
            if here.any():
                self.examples.append((span, here.nonzero().flatten().to(device)))
        self.count = count.to(device)

    def mean(self) -> Tensor:
        if not self.layers:
            raise UserError("The model has no attention that could be recorded: set alignment.rows=random.")
        return self.sum / (self.count * self.layers).clamp_min(1)

    @torch.no_grad()
    def add(self, query: Tensor, key: Tensor, scale: float, window: int | None, softcap: float | None) -> None:
        """One layer. query: [B, heads, T, d]; key: [B, key heads, T, d]."""
        self.layers += 1
        heads, key_heads = query.shape[1], key.shape[1]
        with torch.autocast(query.device.type, enabled=False):
            for span, asking in self.examples:
                here = (span.row, slice(None), slice(span.start, span.stop))
                queries, keys = query[here], key[here].float()
                places = torch.arange(span.stop - span.start, device=query.device)
                for part in asking.split(max(1, _SCORES * key_heads // (heads * len(places)))):
                    distance = part[:, None] - places
                    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
                    asked = queries[:, part].float().unflatten(0, (key_heads, -1))
                    for one, known in zip(asked, keys, strict=True):  # [group, rows, d] and [n, d]
                        scores = one @ known.T * scale
                        if softcap is not None:
                            scores = softcap * torch.tanh(scores / softcap)
                        given = scores.masked_fill_(hidden, -torch.inf).softmax(-1).masked_fill_(distance == 0, 0)
                        self.sum[span.row, span.start : span.stop] += given.sum((0, 1)) / heads


# ---- the function that attends -------------------------------------------------------------------------------------


def _prepare(body: Any) -> str:
    """Give `body` the attention function below, for good, and return the name of transformers' own that it stands for.

    Flash and flex attention stay as they are.
    """
    name = body.config.get_text_config(decoder=True)._attn_implementation
    if name in _CUT:
        body.set_attn_implementation(ATTENTION_PREFIX + name)
        if body.config.get_text_config(decoder=True)._attn_implementation != ATTENTION_PREFIX + name:
            raise UserError(
                f"{type(body).__name__} does not let its attention be changed, which data.packing=true and "
                "alignment.rows=attention need: set data.packing=false and alignment.rows=random."
            )
    return name.removeprefix(ATTENTION_PREFIX)


def _attention(own: Callable[..., Any] | None) -> Callable[..., Any]:
    """An attention function in transformers' sense that stands for `own`; None means the eager one of each family."""

    def attend(
        module: nn.Module,
        query: Tensor,  # [B, heads, T, d]
        key: Tensor,  # [B, key heads, T, d]
        value: Tensor,
        attention_mask: Any,
        packed_lengths: tuple[int, ...] | None = None,
        **settings: Any,
    ) -> tuple[Tensor, Tensor | None]:
        recorder = _recorder.get()
        if recorder is not None:
            scale = settings.get("scaling")
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            recorder.add(query, key, scale, settings.get("sliding_window"), settings.get("softcap"))
        function = own or _eager(module)
        if packed_lengths is None:
            return function(module, query, key, value, attention_mask, **settings)
        outputs = []
        parts = (tensor.split(packed_lengths, 2) for tensor in (query, key, value))
        for n, one in zip(packed_lengths, zip(*parts, strict=True), strict=True):
            # The mask is that of the longest example, from position 0 on; that of a shorter one is its corner.
            mask = None if attention_mask is None else attention_mask[..., :n, :n]
            outputs.append(function(module, *one, mask, **settings)[0])  # [1, n, heads, d]
        return torch.cat(outputs, 1), None

    return attend


def _mask(implementation: str) -> Callable[..., Any]:
    """transformers' mask function of `implementation`, which in a packed row makes the mask of the longest example."""
    own = AttentionMaskInterface()[implementation]

    def mask(**settings: Any) -> Any:
        longest = _longest.get()
        if longest is not None:
            settings |= {"q_length": longest, "kv_length": longest, "attention_mask": None}
        return own(**settings)

    return mask


def _eager(module: nn.Module) -> Callable[..., Any]:
    """The eager attention of the module's family, which transformers keeps beside the class and in no registry."""
    for kind in type(module).__mro__:  # sharding puts a class of its own in front
        function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise UserError(f"{type(module).__name__} keeps its eager attention to itself: set model.attn_implementation=sdpa.")


for _name in _CUT:
    AttentionInterface.register(ATTENTION_PREFIX + _name, _attention(AttentionInterface().get(_name)))
    AttentionMaskInterface.register(ATTENTION_PREFIX + _name, _mask(_name))
