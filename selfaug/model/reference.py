"""The reference: what the base model computes for the same tokens.

The base model is the tuned model with its adapters switched off (SelfAug, appendix B: one more forward pass, no second
copy of the weights), in eval mode and under no_grad. That is exactly the base model only while nothing outside the
adapters trains, which `check_reference` makes sure of. selfaug/model/cache.py keeps what it computes, and
frozen_copy.py is for trainings that change the base weights themselves.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, Protocol

import torch
from peft import PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from selfaug.errors import UserError
from selfaug.model.attention import received_attention
from selfaug.model.decoder import Decoder, Tokens
from selfaug.ops import linear_entropy

# These initialisations leave the base weights as they are. The others (PiSSA, OLoRA, CorDA, LoftQ ...) move a part of
# them into the adapter, so that switching it off no longer gives the base model.
_BASE_KEEPING_INITS = (True, False, "gaussian", "orthogonal", "mica", "eva")


Score = Literal["entropy", "attention"]


class ReferenceStates(NamedTuple):
    """What the base model says about a batch.

    hidden: [B, T, d] its last hidden states, in the dtype they were computed in.
    scores: [B, T] float32, not negative, how much each row matters; None unless a score was asked for.
    """

    hidden: Tensor
    scores: Tensor | None = None


class Reference(Protocol):
    """Where the reference comes from."""

    def check(self, model: nn.Module) -> None:
        """Raise UserError where `model` cannot have this reference."""
        ...

    def states(self, decoder: Decoder, tokens: Tokens, *, masked: bool, score: Score | None = None) -> ReferenceStates:
        """masked: the states of the padding count (alignment.official): see Decoder.states."""
        ...


class AdaptersOff:
    """One more forward pass with the adapters switched off."""

    def check(self, model: nn.Module) -> None:
        check_reference(model)

    def states(self, decoder: Decoder, tokens: Tokens, *, masked: bool, score: Score | None = None) -> ReferenceStates:
        with adapters_off(decoder.model):
            if score == "attention":
                with received_attention(decoder.body, tokens) as received:
                    hidden = decoder.states(tokens, masked=masked)
                return ReferenceStates(hidden, received())
            hidden = decoder.states(tokens, masked=masked)
        if score == "entropy":
            rows = linear_entropy(hidden.flatten(0, 1), **decoder.head.arguments())
            return ReferenceStates(hidden, rows.view(hidden.shape[:2]))
        return ReferenceStates(hidden)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes what its base model computes: adapters off, eval mode, no gradients.

    Works for a PeftModel and for a transformers model with injected adapters. On exit every module has its mode back
    and every parameter its requires_grad.
    """
    wrappers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    enabled = [m for m in wrappers if not m.disable_adapters]
    training = [m for m in model.modules() if m.training]
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for wrapper in enabled:
            wrapper.enable_adapters(False)
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for wrapper in enabled:
            wrapper.enable_adapters(True)
        for module in training:
            module.training = True
        # enable_adapters(True) makes every active adapter trainable: give each parameter its own flag back. (Where
        # nothing was switched, FSDP may have put whole parameters in the place of sharded ones meanwhile.)
        keep = {id(p) for p in trainable}
        for parameter in model.parameters() if enabled else ():
            if parameter.requires_grad != (id(parameter) in keep):
                parameter.requires_grad_(id(parameter) in keep)


def check_reference(model: nn.Module) -> None:
    """Raise UserError, saying what to change, unless `adapters_off(model)` is exactly the base model, and stays it."""
    check_adapters(model)
    if not has_adapters(model):
        raise UserError(
            "The model has no adapters that could be switched off for the reference: set adapter=lora (or wrap the "
            "model with peft.get_peft_model), or let something else keep the base model while its weights train: "
            "reference=frozen_copy or reference.cache=disk."
        )
    outside = trains_outside(model)
    if outside:
        shown = ", ".join(outside[:3]) + (f" and {len(outside) - 3} more" if len(outside) > 3 else "")
        raise UserError(
            f"These weights train outside the adapters, so switching the adapters off no longer gives the base model: "
            f"{shown}; freeze them (adapter.bias=none, requires_grad_(False))."
        )


def check_adapters(model: nn.Module) -> None:
    """Raise UserError, saying what to change, where `adapters_off(model)` is not even the base model before training.

    A model without adapters passes."""
    check_runs(model)
    if rewritten := rewrites_base(model):
        raise UserError(
            f"{rewritten} rewrites the base weights, so switching the adapter off no longer gives the base model: set "
            "adapter.init_lora_weights=true, gaussian or orthogonal, or reference=frozen_copy, or train without "
            "alignment."
        )
    if any(m.merged for m in model.modules() if isinstance(m, BaseTunerLayer)):
        raise UserError("The adapters are merged into the base weights: call unmerge_adapter() before training.")


def check_runs(model: nn.Module) -> None:
    """Raise UserError where `Decoder` would not run the tuned model: adapters on the head or in the prompt."""
    Decoder(model)
    for config in getattr(model, "peft_config", {}).values():
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise UserError(
                f"{config.peft_type.value} changes the prompt and not the layers, so there is no base model to switch "
                "back to: set adapter=lora."
            )
        own = "AdaLoRA moves its ranks" if config.peft_type == PeftType.ADALORA else None
        if getattr(config, "alora_invocation_tokens", None):
            own = "aLoRA (adapter.alora_invocation_tokens) finds where it begins"
        if config.peft_type in (PeftType.XLORA, PeftType.POLY):
            own = f"{config.peft_type.value} chooses its adapters"
        if own:
            raise UserError(
                f"{own} in a forward pass of peft's own, which is passed by here, so that it would train nothing or "
                "something else: set adapter=lora."
            )


def check_head_frozen(model: nn.Module) -> None:
    """Raise UserError where the output head trains: the KL is taken through one head, of base and tuned model."""
    if any(parameter.requires_grad for parameter in Decoder(model).head.module.parameters()):
        raise UserError(
            "The output head trains, which base and tuned model must share for alignment: freeze it "
            "(adapter.freeze=head, or model.get_output_embeddings().requires_grad_(False)), and with it the embeddings "
            "where they are tied."
        )


def has_adapters(model: nn.Module) -> bool:
    """Whether there are layers of peft that could be switched off."""
    return any(isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for m in model.modules())


def rewrites_base(model: nn.Module) -> str | None:
    """The setting with which an adapter of `model` moves a part of the base weights into itself when it is made."""
    for config in getattr(model, "peft_config", {}).values():
        init = getattr(config, "init_lora_weights", True)
        if init not in _BASE_KEEPING_INITS:
            return f"adapter.init_lora_weights={init}"
    return None


def keeps_base(model: nn.Module) -> bool:
    """Whether `adapters_off` of a model as it was loaded, with all that was trained, is its base model."""
    biases = {getattr(config, "bias", "none") for config in getattr(model, "peft_config", {}).values()}
    return has_adapters(model) and rewrites_base(model) is None and biases <= {"none", None, False}


def trains_outside(model: nn.Module) -> list[str]:
    """The names of the weights that train and are not an adapter's."""
    inside = {
        id(p)
        for module in model.modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        for name, p in module.named_parameters()
        if not name.startswith(("base_layer.", "original_module."))
    }
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
