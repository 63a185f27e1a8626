"""The memory plan: what a training takes at its peak, said before its first step, and what to set if that is too much.

Weights, gradients and optimiser are counted; what grows with the micro-batch is measured (probe.py) and read off at the
largest micro-batch of the run; the loss works in chunks of known size. The peak is the largest of three moments and
not the sum of all parts: the loss, while everything for the backward pass is kept; the backward pass; the optimiser's
step. A plan is an estimate: it warns, and refuses only weights for which there is no room at all.
"""

import copy
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from selfaug.data.batching import StepSampler
from selfaug.data.datamodule import RagDataModule
from selfaug.data.mixture import lengths_of
from selfaug.errors import UserError
from selfaug.model.cache import CachedReference
from selfaug.model.decoder import Decoder
from selfaug.model.entries import MemoryEntries
from selfaug.model.frozen_copy import FrozenCopy
from selfaug.objective import HiddenAlignment, Objective
from selfaug.ops.head import CHUNK_BYTES, product_dtype
from selfaug.ops.linear_kl import LEAST_ROWS
from selfaug.run.machine import GB, free_unused, heap_factor, resident_bytes, room
from selfaug.run.probe import Measured, measure

log = logging.getLogger(__name__)

_STEP = 64  # numbers of tokens that are advised are multiples of it


class Largest(NamedTuple):
    """The micro-batch that takes most memory: its computed tokens, padding included, and its longest sequence."""

    tokens: int
    longest: int


@dataclass(frozen=True)
class Costs:
    """What the parts of a training take, in bytes.

    weights: of the model, frozen, and of a copy of it. adapters: all that trains (in full fine-tuning the weights
    themselves), with its gradients and the optimiser's state. head: a copy of it in the dtype of the products. logits:
    buffers of the loss for one row, at most `chunk` for all of them. heap: factor from what lives to what it takes
    (machine.py). layers: of the model. cache: reference states in memory. inside: for one token, what terms on hidden
    states keep of both models. terms: what terms on the weights keep. process: what there is beside the model, on a
    CPU. recomputes: gradient checkpointing is on. rank: of the adapter.
    """

    weights: int
    adapters: int
    gradients: int
    optimiser: int
    head: int
    logits: int
    chunk: int
    measured: Measured
    heap: float
    layers: int
    cache: int = 0
    process: int = 0
    inside: int = 0
    terms: int = 0
    recomputes: bool = False
    rank: int | None = None

    @property
    def resident(self) -> int:
        """All that does not depend on the micro-batch."""
        training = self.adapters + self.gradients + self.optimiser + self.terms
        return self.process + self.weights + training + self.head + self.cache

    def activations(self, at: Largest) -> int:
        return round(self.heap * self.measured.top(*at)) + self.inside * at.tokens

    def loss(self, at: Largest) -> int:
        """A chunk of logits, and hidden states: of the base model, the rows chosen from both, and two gradients."""
        return min(self.logits * at.tokens, self.chunk) + (5 * self.measured.state_bytes + self.inside) * at.tokens

    def peak(self, at: Largest) -> int:
        loss = round(self.heap * self.measured.held(*at)) + self.loss(at)
        step = self.adapters  # the roots of the second moments, where all are updated at once
        return self.resident + max(loss, self.activations(at), step)


def count(
    model: nn.Module,
    forward_context: Callable[[], AbstractContextManager[Any]],
    *,
    reference: bool,
    processes: int = 1,
) -> Costs:
    """The costs of training `model`, on its device, with AdamW; `cache` and `process` are left at 0.

    forward_context: what the forward passes run under. reference: each step has a pass of the base model.
    processes: so many exchange their gradients.
    """
    head = Decoder(model).head.arguments()["weight"]
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    adapters = sum(p.nbytes for p in trained)
    with forward_context():
        product = product_dtype(head)
    config: Any = model.config
    ranks = {getattr(adapter, "r", None) for adapter in getattr(model, "peft_config", {}).values()}
    return Costs(
        weights=sum(tensor.nbytes for tensor in (*frozen, *model.buffers())),
        adapters=adapters,
        gradients=adapters * (2 if processes > 1 else 1),  # and the buckets in which they are exchanged
        optimiser=2 * adapters,
        head=0 if product == head.dtype else head.numel() * product.itemsize,
        logits=(row := 2 * product.itemsize * len(head)),
        chunk=max(CHUNK_BYTES["cpu"], LEAST_ROWS * row) if head.device.type == "cpu" else CHUNK_BYTES["cuda"],
        measured=measure(model, forward_context, reference=reference),
        heap=heap_factor(head.device),
        layers=config.get_text_config().num_hidden_layers,
        recomputes=any(getattr(module, "gradient_checkpointing", False) for module in model.modules()),
        rank=ranks.pop() if len(ranks) == 1 else None,
    )


def hidden_bytes(goal: Objective, model: nn.Module) -> int:
    """For one token: what the modules put out that terms on hidden states compare, of the base model and as the
    difference of both."""
    decoder = Decoder(model)
    weight = decoder.head.arguments()["weight"]
    terms = [term for term in goal.terms.values() if isinstance(term, HiddenAlignment)]
    modules = [module for term in terms for module in term.modules(decoder.body)]
    return sum(2 * product_dtype(weight).itemsize * getattr(m, "out_features", weight.shape[1]) for m in modules)


def term_bytes(goal: Objective, model: nn.Module) -> int:
    """What terms on the weights keep beside them, as they say themselves."""
    return sum(term.held_bytes(model) for term in goal.parameter_terms.values() if hasattr(term, "held_bytes"))


def largest(sampler: StepSampler, steps: int, costs: Costs) -> Largest:
    """Of the first epoch, or of its first `steps` steps."""
    sampler = copy.copy(sampler)
    sampler.first_step = sampler.epoch = 0
    sizes = set()
    for step in islice(iter(sampler), steps):
        for group in step:
            lengths = sampler.lengths[list(group.indices)]
            longest = int(lengths.max())
            sizes.add(Largest(int(lengths.sum()) if sampler.packing else len(lengths) * longest, longest))
    return max(sizes, key=lambda at: (costs.peak(at), at))


# ---- advice ----------------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """Settings, as they are given on the command line, and what they lead to."""

    settings: str
    costs: Costs
    at: Largest

    @property
    def peak(self) -> int:
        return self.costs.peak(self.at)


def advise(costs: Costs, at: Largest, limit: int) -> list[Change]:
    """What would keep the peak within `limit` bytes: each single change that does, else the changes that do together,
    else nothing."""
    options = (_cache_on_disk, _checkpointing, _fewer_tokens, _lower_rank)
    alone = [change for option in options if (change := option(costs, at, limit)) and change.peak <= limit]
    if alone:
        return alone
    settings = []
    for option in options:
        if change := option(costs, at, limit):
            settings.append(change.settings)
            costs, at = change.costs, change.at
            if change.peak <= limit:
                return [Change(" ".join(settings), costs, at)]
    return []


def _cache_on_disk(costs: Costs, at: Largest, limit: int) -> Change | None:
    return Change("reference.cache=disk", replace(costs, cache=0), at) if costs.cache else None


def _checkpointing(costs: Costs, at: Largest, limit: int) -> Change | None:
    """The layers keep their inputs only, and the final norm and its output are kept beside; one layer at a time is
    computed again."""
    if costs.recomputes:
        return None
    held, top, state = costs.measured
    kept = held._replace(per_token=float((costs.layers + 2) * state), per_pair=0.0)
    # By the time the backward pass of a layer needs room of its own, about as much of the layer is gone; but not where
    # attention builds matrices.
    again = top._replace(
        per_token=kept.per_token + held.per_token / costs.layers,
        per_pair=held.per_pair / costs.layers + (top.per_pair - held.per_pair),
    )
    changed = replace(costs, measured=Measured(kept, again, state), recomputes=True)
    return Change("model.gradient_checkpointing=true", changed, at)


def _fewer_tokens(costs: Costs, at: Largest, limit: int) -> Change | None:
    """As many as fit; where not even the longest example does, the documents are cut too."""
    for tokens in range((at.tokens - 1) // _STEP * _STEP, 0, -_STEP):
        smaller = Largest(tokens, min(tokens, at.longest))
        if costs.peak(smaller) <= limit:
            settings = f"data.micro_batch_tokens={tokens}"
            if tokens < at.longest:
                settings += f" data.prompt.max_tokens={tokens}"
            return Change(settings, costs, smaller)
    return None


def _lower_rank(costs: Costs, at: Largest, limit: int) -> Change | None:
    """The highest power of two that fits."""
    if not costs.rank:
        return None
    for exponent in reversed(range((costs.rank - 1).bit_length())):
        share = 2**exponent / costs.rank
        parts = {name: round(getattr(costs, name) * share) for name in ("adapters", "gradients", "optimiser", "terms")}
        change = Change(f"adapter.r={2**exponent}", replace(costs, **parts, rank=2**exponent), at)
        if change.peak <= limit:
            return change
    return None


# ---- before the first step -------------------------------------------------------------------------------------------


class MemoryPlan(L.Callback):
    """Says what the training will take, and warns where there is less. `parts`: the plan in bytes, for fit.json."""

    def __init__(self, data: RagDataModule):
        self.data = data
        self.parts: dict[str, int | None] = {}

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        # After this Lightning moves the model to its device.
        device = trainer.strategy.root_device
        if device.type != "cuda" or isinstance(trainer.strategy, ModelParallelStrategy):
            return
        weights = sum(p.nbytes for p in pl_module.model.parameters() if p.device != device)
        free = room(device)
        if free is not None and weights > free:
            raise UserError(
                f"The weights alone take {weights / GB:.1f} GB, and {device} has {free / GB:.1f} GB free: set "
                "trainer=fsdp to share them among devices, model.dtype=bfloat16, or model to a smaller one."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if isinstance(trainer.strategy, ModelParallelStrategy):
            log.info("memory plan: none, the model is sharded")
            return
        free_unused()  # of an earlier run of the sweep: it would count as taken
        here = max(trainer.world_size // trainer.num_nodes, 1)
        taken, free = resident_bytes(pl_module.device), room(pl_module.device, here)
        goal, model = pl_module.objective, pl_module.model
        cached = isinstance(goal.reference, CachedReference)
        copied = 0  # a second model on this device
        if goal.terms and isinstance(goal.reference, FrozenCopy):
            goal.reference.on(pl_module.device)
            copied = goal.reference.bytes_on(pl_module.device)
        costs = count(
            model,
            trainer.precision_plugin.train_step_context,
            reference=bool(goal.terms) and not cached,
            processes=trainer.world_size,
        )
        costs = replace(costs, weights=costs.weights + copied)
        with trainer.precision_plugin.train_step_context():
            costs = replace(costs, inside=hidden_bytes(goal, model), terms=term_bytes(goal, model))
        if pl_module.device.type != "cuda":
            costs = replace(costs, process=max(taken - costs.weights - costs.adapters, 0))
        steps = int(trainer.estimated_stepping_batches)  # this also makes the loader
        loader: Any = trainer.train_dataloader
        if goal.terms and cached and isinstance(goal.reference.entries, MemoryEntries):
            train, val = (int(lengths_of(self.data.rows(split)).sum()) for split in ("train", "val"))
            tokens = train * min(steps / len(loader.sampler), 1) + val
            costs = replace(costs, cache=round(tokens * costs.measured.state_bytes))
        at = largest(loader.sampler, steps, costs)
        limit = None if free is None else taken + free
        self.parts = as_parts(costs, at, limit)
        log.info("%s", line(costs, at, limit))
        if limit is not None and costs.peak(at) > limit:
            log.warning("%s", warning(costs, at, limit))


def as_parts(costs: Costs, at: Largest, limit: int | None) -> dict[str, int | None]:
    """The plan in bytes; the moments of the peak do not add up to it, see Costs.peak."""
    named = ("process", "weights", "adapters", "gradients", "optimiser", "terms", "cache")
    return {
        "peak_bytes": costs.peak(at),
        "available_bytes": limit,
        **{f"{name}_bytes": getattr(costs, name) for name in named},
        "activations_bytes": costs.activations(at),
        "loss_bytes": costs.loss(at) + costs.head,
        "micro_batch_tokens": at.tokens,
        "longest_tokens": at.longest,
    }


def line(costs: Costs, at: Largest, limit: int | None) -> str:
    """The plan for the log. GB are 1e9 bytes."""
    parts = as_parts(costs, at, limit)
    named = ("process", "weights", "adapters", "gradients", "optimiser", "terms", "cache", "activations", "loss")
    sizes = ", ".join(f"{name} {(parts[f'{name}_bytes'] or 0) / GB:.2f}" for name in named if parts[f"{name}_bytes"])
    known = "" if limit is None else f" of the {limit / GB:.1f} GB there are"
    return (
        f"memory plan: about {costs.peak(at) / GB:.2f} GB at the peak{known} (GB of {sizes}; the largest micro-batch "
        f"has {at.tokens} tokens, its longest example {at.longest})"
    )


def warning(costs: Costs, at: Largest, limit: int) -> str:
    """One sentence that names what would fit."""
    changes = advise(costs, at, limit)
    choice = " or ".join(f"{change.settings} ({change.peak / GB:.2f} GB)" for change in changes)
    return f"The training may need {costs.peak(at) / GB:.2f} GB and has {limit / GB:.2f} GB: " + (
        f"set {choice}." if choice else "set model to a smaller one, or trainer=fsdp on several devices."
    )
