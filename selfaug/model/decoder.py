"""One view on every decoder-only transformers model: last hidden states and output head, apart.

The loss needs logits of chosen rows only, so it asks for the hidden states of the body and applies the head itself
(selfaug/ops). What a family does between head and logits (a scale, a soft-cap) is read from its config here, and
`verify_decoder` compares the outcome with the model's own logits once, so that a family that does something else is
refused and never trained wrongly. `verify_packing` does the same for packed rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from selfaug.errors import UserError
from selfaug.model.attention import packed_states
from selfaug.ops.head import HeadShape, head_logits


class Tokens(Protocol):
    """What the model needs to know of a batch (selfaug.objective.TokenBatch)."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def attention_mask(self) -> Tensor: ...
    @property
    def roles(self) -> Tensor: ...
    @property
    def asking(self) -> Tensor: ...
    @property
    def packed(self) -> bool: ...
    @property
    def right_padded(self) -> bool: ...
    @property
    def spans(self) -> tuple[Any, ...]: ...
    @property
    def examples(self) -> tuple[tuple[Any, str], ...]: ...


@dataclass(frozen=True)
class Head:
    """logits = cap(scale * (h W^T + b)); W [V, d], b [V] or None."""

    module: nn.Module
    scale: float
    softcap: float | None

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of selfaug.ops.linear_kl and linear_nll."""
        # Read at call time: the weight may have been moved or cast since.
        return {
            "weight": self.module.weight,
            "bias": getattr(self.module, "bias", None),
            "scale": self.scale,
            "softcap": self.softcap,
        }

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] to [..., V], in float32 at least. For checks and small inputs: nothing is chunked."""
        arguments = self.arguments()
        flat = head_logits(
            hidden.reshape(-1, hidden.shape[-1]),
            arguments["weight"],
            arguments["bias"],
            HeadShape(self.scale, self.softcap),
        )
        return flat.reshape(*hidden.shape[:-1], -1)


class Decoder:
    """Hidden states and head of `model`: a peft.PeftModel, or a transformers model with or without injected adapters.

    Raises UserError where the model has no body and head of that kind, or where an adapter sits on the head.
    """

    def __init__(self, model: nn.Module):
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise UserError(
                f"{type(model).__name__} exchanges gradients in a forward pass of its own, which would be passed by: "
                "give its .module where one process trains, or train with `python -m selfaug.train trainer=ddp`."
            )
        inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
        if head is None or not hasattr(inner, "base_model"):
            raise UserError(
                f"{type(inner).__name__} is no causal language model of transformers: set model.name to one."
            )
        if isinstance(head, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise UserError(
                "An adapter sits on the output head, which base and tuned model must share: take the head (lm_head) "
                "and tied embeddings out of adapter.target_modules, modules_to_save and trainable_token_indices."
            )
        embeddings = inner.get_input_embeddings()
        if isinstance(embeddings, BaseTunerLayer) and embeddings.get_base_layer().weight is head.weight:
            raise UserError(
                "An adapter sits on the embeddings, which are tied to the output head: merged into the weights, it "
                "would change the head too; take them (embed_tokens) out of adapter.target_modules."
            )
        config = inner.config.get_text_config(decoder=True)
        scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides
        self.model = model
        self.body: nn.Module = inner.base_model
        self.head = Head(head, scale, getattr(config, "final_logit_softcapping", None))  # Gemma 2 caps

    def states(self, tokens: Tokens, *, masked: bool = False) -> Tensor:
        """Last hidden states [B, T, d] of a batch, padded or packed.

        masked: run the model as the official code does, with the attention mask and with positions that count padding,
            so that the states of the padding are those that it aligns.
        """
        if tokens.packed:
            return packed_states(self.body, tokens.input_ids, tokens.spans)
        if masked:
            mask = tokens.attention_mask.long()
            return self.body(input_ids=tokens.input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        return self.hidden(tokens.input_ids, tokens.attention_mask, right_padded=tokens.right_padded)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor, *, right_padded: bool = False) -> Tensor:
        """Last hidden states [B, T, d], after the final norm. input_ids, attention_mask: [B, T].

        Positions count real tokens only, so that padding on either side changes nothing. With `right_padded` the
        caller vouches that all padding is on the right: no real token ever attends to it, so no mask is needed and
        attention takes its faster causal path; the states of the padding itself then mean nothing.
        """
        if right_padded:
            return self.body(input_ids=input_ids, use_cache=False).last_hidden_state
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
        return self.body(
            input_ids=input_ids, attention_mask=attention_mask.long(), position_ids=position_ids, use_cache=False
        ).last_hidden_state


def decoder_layers(body: nn.Module) -> nn.ModuleList:
    """The list of decoder layers: the longest ModuleList directly inside the body."""
    return max((child for child in body.children() if isinstance(child, nn.ModuleList)), key=len)


@torch.no_grad()
def verify_decoder(model: nn.Module, tolerance: float = 1e-3) -> None:
    """Compare `Decoder`'s logits with the model's own on a few tokens; raises UserError where they differ.

    `tolerance` is relative to the largest logit: the two take the same products in another order.
    """
    decoder = Decoder(model)
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    device = next(decoder.body.parameters()).device
    vocabulary = decoder.head.arguments()["weight"].shape[0]
    ids = torch.arange(3, 11, device=device).remainder(vocabulary).unsqueeze(0)
    mask = torch.ones_like(ids)
    with evaluating(model):
        theirs = inner(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        hidden = decoder.hidden(ids, mask)
    head_dtype = decoder.head.arguments()["weight"].dtype
    ours = decoder.head.logits(hidden.to(head_dtype)).float()
    # In low precision transformers rounds after each step of the head, selfaug only after the product.
    allowed = tolerance * (16 if _low(head_dtype, device) else 1) * max(theirs.abs().max().item(), 1.0)
    if theirs.shape != ours.shape or not torch.allclose(ours, theirs, rtol=0, atol=allowed):
        raise UserError(
            f"{type(inner).__name__} turns hidden states into logits in a way selfaug does not know: "
            "set model.name to another family, or teach selfaug/model/decoder.py this one."
        )


@torch.no_grad()
def verify_packing(model: nn.Module, tolerance: float = 1e-3) -> None:
    """Compare the states of a few examples packed with those of each alone; raises UserError where they differ.

    `tolerance` is the mean distance of the states allowed, relative to their length: the two take the same products in
    another order. Examples that feel each other are a hundred times as far apart, and ten times in low precision.
    """
    body = Decoder(model).body
    parameter = next(body.parameters())
    lengths = (5, 9, 1, 4)
    edges = list(accumulate(lengths, initial=0))
    ids = torch.arange(3, 3 + edges[-1], device=parameter.device).unsqueeze(0)
    problem = UserError(
        f"{type(body).__name__} does not keep the examples of a packed row apart: set data.packing=false, or "
        "model.name to another family."
    )
    with evaluating(model):
        expected = [body(input_ids=part, use_cache=False).last_hidden_state.float() for part in ids.split(lengths, 1)]
        try:
            packed = packed_states(body, ids, [(0, *edge) for edge in pairwise(edges)]).float()
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
            raise problem from error
    alone = torch.cat(expected, 1)
    distance = ((packed - alone).norm(dim=-1) / alone.norm(dim=-1)).mean().item()
    if not distance <= tolerance * (50 if _low(parameter.dtype, parameter.device) else 1):
        raise problem


def _low(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype.itemsize < 4 or torch.is_autocast_enabled(device.type)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in eval mode; on exit every module has its mode back."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True
