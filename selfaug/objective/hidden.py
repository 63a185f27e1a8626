"""Alignment of hidden states: what modules inside the tuned and the base model put out, row by row.

The rows of the paper's Table 2 beside SelfAug itself. The paper does not give their loss; here it is the mean squared
error of the module's outputs, or a cosine distance, averaged over the modules.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from selfaug.errors import UserError
from selfaug.model.decoder import Head, decoder_layers
from selfaug.objective.batch import TokenBatch
from selfaug.objective.rows import Position, alignment_rows, check_boundary
from selfaug.objective.sampling import Rows, RowSampling
from selfaug.objective.schedules import AlphaSchedule, check_alpha
from selfaug.objective.terms import States

HiddenPosition = Literal[
    "attention_q", "attention_k", "attention_v", "attention_o", "attention_all", "feed_forward", "all_layers",
    "layer_outputs",
]  # fmt: skip
Tokens = Literal["input", "output", "all", "document", "question"]
Distance = Literal["mse", "cosine"]

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# What transformers' families of the Llama kind call these modules, inside a decoder layer.
_MODULES: dict[str, tuple[str, ...]] = {
    "attention_q": ("q_proj",),
    "attention_k": ("k_proj",),
    "attention_v": ("v_proj",),
    "attention_o": ("o_proj",),
    "attention_all": _ATTENTION,
    "feed_forward": ("mlp",),
    "all_layers": (*_ATTENTION, "mlp"),
}
_ROWS: dict[Tokens, Position] = {
    "input": "input_logits",
    "output": "output_logits",
    "all": "all_logits",
    "document": "document_logits",
    "question": "question_logits",
}


@dataclass(frozen=True)
class HiddenAlignment:
    """Distance between what modules of the base and of the tuned model put out (paper section 4.4.1, Table 2).

    Args:
        alpha: its weight.
        position: attention_q, attention_k, attention_v, attention_o: that projection in every layer; attention_all:
            the four of them; feed_forward: the feed-forward blocks; all_layers: all of these; layer_outputs: the
            residual stream after every layer.
        tokens: which rows: input (as SelfAug's), output, all, document or question.
        distance: mse: mean over the features of (tuned - base)^2; cosine: 1 - cos(tuned, base).
        layers: numbers of the layers, from 0, negative ones from the end; None for all.
        boundary, rows, share, schedule, source: as in LogitAlignment.

    Raises:
        UserError: a value outside its range.
    """

    alpha: float = 0.5
    position: HiddenPosition = "all_layers"
    tokens: Tokens = "input"
    distance: Distance = "mse"
    layers: Sequence[int] | None = None
    boundary: bool = True
    rows: Rows = "all"
    share: float = 1.0
    schedule: AlphaSchedule | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        for name, known in (("position", HiddenPosition), ("tokens", Tokens), ("distance", Distance)):
            if getattr(self, name) not in get_args(known):
                raise UserError(
                    f"alignment.{name}={getattr(self, name)} is unknown: set it to one of {', '.join(get_args(known))}."
                )
        check_alpha(self.alpha, self.schedule)
        check_boundary(self.boundary, _ROWS[self.tokens], f"tokens={self.tokens}")
        _ = self.sampling  # refuses what it does not know
        if self.layers is not None and not (self.layers and all(isinstance(i, int) for i in self.layers)):
            raise UserError(
                f"alignment.layers={self.layers} is not allowed: set it to a list of layer numbers, or null."
            )

    @property
    def sampling(self) -> RowSampling:
        return RowSampling(self.rows, self.share)

    def select(self, batch: TokenBatch) -> Tensor:
        rows = alignment_rows(batch.roles, _ROWS[self.tokens], boundary=self.boundary, last=batch.last)
        return rows if self.source is None else rows & batch.of(self.source)

    def modules(self, body: nn.Module) -> list[nn.Module]:
        """The modules of `body` that are compared. Raises UserError where the family has none of these names."""
        layers = list(decoder_layers(body))
        if self.layers is not None:
            wrong = [i for i in self.layers if not -len(layers) <= i < len(layers)]
            if wrong:
                raise UserError(
                    f"alignment.layers={list(self.layers)} names layer {wrong[0]}, and the model has {len(layers)}: "
                    f"set it to numbers from 0 to {len(layers) - 1}."
                )
            layers = [layers[i] for i in sorted({i % len(layers) for i in self.layers})]
        if self.position == "layer_outputs":
            return layers
        names = _MODULES[self.position]
        found = [
            module for layer in layers for name, module in layer.named_modules() if name.rpartition(".")[2] in names
        ]
        if len(found) != len(names) * len(layers):
            raise UserError(
                f"{type(body).__name__} does not compute {', '.join(names)} in modules of their own, which "
                f"alignment.position={self.position} looks for: set alignment.position=layer_outputs."
            )
        return found

    def compare(self, tuned: Tensor, reference: Tensor, weights: Tensor | None) -> Tensor:
        """The distance of one module, summed over its N rows. tuned, reference: [N, width]; weights: [N]."""
        if self.distance == "mse":
            rows = _SquaredNorm.apply(tuned - reference) / tuned.shape[-1]
        else:  # as a squared length it is exactly 0 where the two are equal
            accurate = torch.float64 if tuned.dtype == torch.float64 else torch.float32
            apart = normalize(tuned.to(accurate), dim=-1) - normalize(reference.to(accurate), dim=-1)
            rows = apart.square().sum(-1) / 2
        return (rows if weights is None else rows * weights).sum()

    def total(self, states: States, head: Head) -> Tensor:
        raise TypeError("hidden states are compared inside the forward pass, see Objective")


class _SquaredNorm(torch.autograd.Function):
    """[N, width] to [N], in float32 at least; keeps its input as it is, where autograd would keep it in float32."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        accurate = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x.to(accurate).square().sum(-1)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return (2 * gradient.unsqueeze(-1) * x).to(x.dtype)
