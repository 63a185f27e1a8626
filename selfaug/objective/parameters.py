"""Terms on the trained weights alone: they need no tokens, no reference and next to no time.

L2SP      holds the weights near those that the training started from
OLoRA     keeps the new adapter out of the directions that an earlier one uses
Orthogonal  the same with the base weights in the place of an earlier adapter: the paper's +Orthogonal
EWC is in ewc.py, because it has to be estimated first.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import normalize

from selfaug.errors import UserError
from selfaug.objective.lora_pairs import LoraPair, lora_pairs, whole


def check_weight(term: str, alpha: float) -> None:
    """Raise UserError unless `alpha` can be the weight of a term."""
    if not (isinstance(alpha, (int, float)) and math.isfinite(alpha)) or alpha < 0:
        raise UserError(f"alpha={alpha} of {term} in method.terms is not allowed: set it to 0 or a positive number.")


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _without(weights: dict[str, nn.Parameter], pairs: list[LoraPair]) -> dict[str, nn.Parameter]:
    inside = {id(p) for pair in pairs for p in (pair.A, pair.B)}
    return {name: p for name, p in weights.items() if id(p) not in inside}


class StartingPoint:
    """The values that weights had when the training started, in float32 at least, on the device that asks for them."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}

    def keep(self, weights: dict[str, nn.Parameter]) -> None:
        self._values |= {name: whole(p.detach()).clone() for name, p in weights.items()}

    def of(self, name: str, like: Tensor) -> Tensor:
        """What `name` was, on the device of `like`, where it stays."""
        self._values[name] = value = self._values[name].to(like.device)
        return value

    def __contains__(self, name: str) -> bool:
        return name in self._values

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self._values.values())


@dataclass
class L2SP:
    """Distance to the starting point (Li, Grandvalet & Davoine 2018):

        penalty = 1/2 * |theta - theta_0|^2        loss = NLL + alpha * penalty

    theta are the effective weights of the model, so that a LoRA layer counts |scale * B A|^2, what it adds to the base
    weight, and not the size of A and B. That is scale^2 * trace((B^T B) (A A^T)), two r x r products: B A itself is
    never computed. Where B does not start at 0 (PiSSA, say), it is the same with [B, -B_0] and [A; A_0]. Whatever else
    trains is compared with a copy of its start.

    Raises:
        UserError: alpha outside its range; at the start, DoRA, LoRA on an embedding, or several adapters on one layer.
    """

    alpha: float = 0.1
    _start: StartingPoint = field(default_factory=StartingPoint, repr=False)

    def __post_init__(self) -> None:
        check_weight("L2SP", self.alpha)

    def start(self, model: nn.Module) -> None:
        pairs = lora_pairs(model, "L2SP")
        self._start.keep(_without(trained(model), pairs))
        for pair in pairs:
            if pair.B.any():
                self._start.keep({f"{pair.name}.A": pair.A, f"{pair.name}.B": pair.B})

    def held_bytes(self, model: nn.Module) -> int:
        return self._start.nbytes

    def penalty(self, model: nn.Module) -> Tensor:
        pairs = lora_pairs(model, "L2SP")
        squares = [
            ((whole(p) - self._start.of(name, p)) ** 2).sum() for name, p in _without(trained(model), pairs).items()
        ]
        for pair in pairs:
            a, b = whole(pair.A), whole(pair.B)
            if f"{pair.name}.B" in self._start:
                a = torch.cat([a, self._start.of(f"{pair.name}.A", a)])
                b = torch.cat([b, -self._start.of(f"{pair.name}.B", b)], dim=1)
            squares.append(pair.scale**2 * ((b.T @ b) * (a @ a.T)).sum())
        return torch.stack(squares).sum() / 2


@dataclass
class Orthogonal:
    """LoRA's A orthogonal to the base weights: the "+Orthogonal" of SelfAug's Table 1, of which the paper says that it
    is inspired by O-LoRA and keeps LoRA's parameters orthogonal to the model's own. Ours is O-LoRA's loss with the base
    weight W [out, in] in the place of the earlier adapter's A:

        scale_free:  mean over layers of sqrt(in) * mean over (i, j) of |cos(row i of W, row j of A)|
        otherwise:   sum over layers of the sum over (i, j) of |W A^T|, as in O-LoRA's code

    W has full rank, so that no A is orthogonal to all of its rows; A turns towards the inputs that W answers least. The
    sum can also fall by making A small, which holds back all learning; scale_free it can only turn A. A random A has
    about sqrt(2 / pi) = 0.8 then, whatever the width.

    Costs as much as r more tokens in a step, and nothing is kept for the backward pass.

    Raises:
        UserError: alpha outside its range; at the start, no LoRA layers or base weights that are quantised.
    """

    alpha: float = 0.5
    scale_free: bool = True

    def __post_init__(self) -> None:
        check_weight("Orthogonal", self.alpha)

    def start(self, model: nn.Module) -> None:
        for pair in _needed(model, "Orthogonal"):
            if not pair.layer.get_base_layer().weight.is_floating_point():
                raise UserError(
                    f"Orthogonal multiplies with the base weights, and those of {pair.name} are quantised: load the "
                    "model in float32 or bfloat16."
                )

    def penalty(self, model: nn.Module) -> Tensor:
        pairs = lora_pairs(model, "Orthogonal")
        if not self.scale_free:
            return torch.stack([_Overlap.apply(whole(pair.A), pair.weight(), False) for pair in pairs]).sum()
        cosines = []
        for pair in pairs:
            a = normalize(whole(pair.A), dim=-1)
            w = pair.weight()
            cosines.append(_Overlap.apply(a, w, True) * a.shape[1] ** 0.5 / (a.shape[0] * w.shape[0]))
        return torch.stack(cosines).mean()


@dataclass
class OLoRA:
    """O-LoRA (arXiv 2310.14152, as in its code): a new adapter orthogonal to an earlier one.

        penalty = sum over layers of the sum over (i, j) of |A_earlier A^T|

    A layer that the earlier adapter did not change has nothing to be kept out of, and is left free.

    Args:
        adapter: folder of the earlier adapter (PEFT, safetensors). Only its A is used. The model itself knows the
            earlier task if model.name is a folder that the adapter was merged into.

    Raises:
        UserError: alpha outside its range; at the start, a folder that holds no such adapter, or none that fits.
    """

    adapter: str
    alpha: float = 0.5
    _earlier: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_weight("OLoRA", self.alpha)

    def start(self, model: nn.Module) -> None:
        earlier = _read_a(Path(self.adapter).expanduser(), self.adapter)
        for pair in _needed(model, "OLoRA"):
            # PEFT saves an adapter as if it were named nothing and the model were wrapped.
            name = f"base_model.model.{pair.name.removeprefix('base_model.model.')}"
            if name not in earlier:
                continue
            if earlier[name].shape[1] != pair.A.shape[1]:
                raise UserError(
                    f"The adapter in {self.adapter} is not for this model (its {name} takes {earlier[name].shape[1]} "
                    f"numbers, the model's {pair.A.shape[1]}): set the term's adapter to another folder."
                )
            self._earlier[pair.name] = whole(earlier[name])
        if not self._earlier:
            raise UserError(
                f"The adapter in {self.adapter} shares no layer with the one that is trained: set the term's adapter, "
                "or adapter.target_modules."
            )

    def held_bytes(self, model: nn.Module) -> int:
        return sum(a.nbytes for a in self._earlier.values())

    def penalty(self, model: nn.Module) -> Tensor:
        found = []
        for pair in lora_pairs(model, "OLoRA"):
            if pair.name in self._earlier:
                a = whole(pair.A)
                self._earlier[pair.name] = earlier = self._earlier[pair.name].to(a)
                found.append(_Overlap.apply(a, earlier, False))
        return torch.stack(found).sum()


class _Overlap(torch.autograd.Function):
    """sum over (i, j) of |<w_i, a_j>|, or of |<w_i, a_j>| / |w_i|. a: [r, in]; w: [out, in], without a gradient.

    The gradient sum_i sign(<w_i, a_j>) w_i is computed at once, so that w need not be kept for the backward pass: it
    may have been gathered or converted for this.
    """

    @staticmethod
    def forward(ctx, a, w, relative):
        products = a @ w.T  # [r, out]
        if relative:
            lengths = w.norm(dim=1).clamp_min(torch.finfo(w.dtype).tiny)
            ctx.save_for_backward((products.sign() / lengths) @ w)
            return (products.abs() / lengths).sum()
        ctx.save_for_backward(products.sign() @ w)
        return products.abs().sum()

    @staticmethod
    def backward(ctx, gradient):
        (direction,) = ctx.saved_tensors
        return gradient * direction, None, None


def _needed(model: nn.Module, what: str) -> list[LoraPair]:
    pairs = lora_pairs(model, what)
    if not pairs:
        raise UserError(f"{what} is a term on LoRA's matrices, and the model has none: set adapter=lora.")
    return pairs


def _read_a(folder: Path, named: str) -> dict[str, Tensor]:
    """The A [r, in] of every linear layer of an adapter on disk, by the layer's name."""
    path, suffix = folder / "adapter_model.safetensors", ".lora_A.weight"
    try:
        with safe_open(path, "pt") as file:
            found = {name.removesuffix(suffix): file.get_tensor(name) for name in file.keys() if name.endswith(suffix)}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"There is no adapter to be read in {named}: set the term's adapter to a PEFT folder with an "
            "adapter_model.safetensors."
        ) from error
    return {name: a for name, a in found.items() if a.dim() == 2}
