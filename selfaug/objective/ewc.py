"""Elastic weight consolidation: weights that mattered for what the model could do before are held where they were."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from selfaug.errors import UserError
from selfaug.model.decoder import Decoder, evaluating
from selfaug.objective.batch import TokenBatch
from selfaug.objective.lora_pairs import whole
from selfaug.objective.parameters import StartingPoint, check_weight, trained
from selfaug.objective.preparation import Preparation
from selfaug.objective.rows import learned_rows
from selfaug.ops import linear_nll


@dataclass
class EWC:
    """Elastic weight consolidation (Kirkpatrick et al. 2017, eq. 3), F being the diagonal of the empirical Fisher
    information of the weights that train, at the start and on old text:

        penalty = 1/2 * sum_i F_i (theta_i - theta*_i)^2        loss = NLL + alpha * penalty
        F_i = (sum over examples of (d NLL of the example / d theta_i)^2) / (number of their tokens)

    Divided by tokens and not by examples, F belongs to a mean over tokens, as the NLL is one: with alpha = 1 the
    penalty is, to second order and with the diagonal alone, by how much the NLL per token of the old text rises. The
    diagonal alone is far too little: it knows nothing of weights that move together, as those of B do. Hence the large
    default of alpha.

    LoRA starts at B = 0, where no gradient reaches A: F of A is exactly 0, A is free, and the penalty holds B alone,
    which is measured with the A of the start. That is what EWC says of the weights that train. The Fisher information
    of the effective weights W + B A would not have this gap, but it takes gradients and memory of the size of the
    model, which LoRA is there to save.

    Args:
        alpha: its weight.
        text: what the model could do before: settings of a corpus as in evaluation.drift.corpora (kind: dialogue or
            text; asset or path; limit; max_tokens). Of a dialogue the response counts, of a text every token.

    Raises:
        UserError: alpha outside its range; before the first step, a text that cannot be read.
    """

    text: Mapping[str, Any]
    alpha: float = 3000.0
    _start: StartingPoint = field(default_factory=StartingPoint, repr=False)
    _fisher: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_weight("EWC", self.alpha)
        if not isinstance(self.text, Mapping):
            raise UserError(f"text={self.text} of EWC in method.terms is not allowed: give it settings of a corpus.")

    def start(self, model: nn.Module) -> None:
        self._start.keep(trained(model))

    def held_bytes(self, model: nn.Module) -> int:
        return 8 * sum(p.numel() for p in trained(model).values())

    def prepare(self, at: Preparation) -> dict[str, Tensor]:
        # Every process goes through all examples: of sharded weights none could do it alone, and of others it takes no
        # longer, and all come to the same sums.
        return fisher(at.model, at.corpus(self.text, "method.terms.ewc.text"), at.progress)

    def use(self, found: Mapping[str, Tensor], at: Preparation) -> dict[str, float]:
        self._fisher = dict(found)
        sizes = sum(f.numel() for f in self._fisher.values())
        return {"fisher_mean": float(sum(f.double().sum() for f in self._fisher.values())) / max(sizes, 1)}

    def penalty(self, model: nn.Module) -> Tensor:
        summed = []
        for name, parameter in trained(model).items():
            apart = whole(parameter) - self._start.of(name, parameter)
            self._fisher[name] = importance = self._fisher[name].to(apart.device)
            summed.append((importance * apart**2).sum())
        return torch.stack(summed).sum() / 2


def fisher(model: nn.Module, examples: Sequence[TokenBatch], progress: bool = False) -> dict[str, Tensor]:
    """F of EWC for all weights of `model` that train, by name, on the CPU, float32 at least.

    examples: batches of one example each. They are streamed: memory is that of one, and of F. The model computes as it
    does in evaluation, without dropout.
    """
    weights = trained(model)
    sums = {name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in weights.items()}
    decoder, tokens = Decoder(model), 0
    device = decoder.head.arguments()["weight"].device
    for example in tqdm(examples, desc="Fisher information", unit=" examples", disable=not progress):
        batch = example.to(device)
        rows = learned_rows(batch.roles, batch.labels)
        tokens += int(rows.sum())
        with evaluating(model):
            hidden = decoder.states(batch)[rows]
            targets = batch.labels[:, 1:][rows[:, :-1]]
            nll = linear_nll(hidden, targets, **decoder.head.arguments()).sum()
        # Not torch.autograd.grad, which sharded weights do not support.
        with torch.autocast(device.type, enabled=False):
            nll.backward()
        for name, parameter in weights.items():
            if parameter.grad is not None:
                sums[name] += parameter.grad.to(sums[name].dtype) ** 2
                parameter.grad = None
    found: dict[str, Any] = {n: s.full_tensor() if isinstance(s, DTensor) else s for n, s in sums.items()}
    return {name: (value / max(tokens, 1)).cpu() for name, value in found.items()}
