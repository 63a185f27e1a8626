"""The LightningModule: one training_step is one optimiser step.

Optimisation is manual because the means of the loss run over all tokens of the step, which are known only when all of
its micro-batches are, and because their number differs from step to step and is no constant of the trainer.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import get_cosine_schedule_with_warmup

from selfaug.data.batching import Step
from selfaug.errors import UserError
from selfaug.model.decoder import Decoder
from selfaug.objective import Objective
from selfaug.objective.alphas import Alphas, Balance


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a cosine schedule; the defaults are the paper's (appendix A.2, CRAG).

    warmup_ratio: share of all steps over which the learning rate rises from 0. max_grad_norm: gradients are scaled to
    at most this norm; null for no limit.
    """

    lr: float = 5e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_ratio: float = 0.05
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[bool, str]] = {
            "lr": (_number(self.lr) and self.lr > 0, "a positive number"),
            "weight_decay": (_number(self.weight_decay) and self.weight_decay >= 0, "0 or a positive number"),
            "eps": (_number(self.eps) and self.eps >= 0, "0 or a positive number"),
            "betas": (
                len(self.betas) == 2 and all(_number(b) and 0 <= b < 1 for b in self.betas),
                "two numbers in [0, 1)",
            ),
            "warmup_ratio": (_number(self.warmup_ratio) and 0 <= self.warmup_ratio < 1, "a number in [0, 1)"),
            "max_grad_norm": (
                self.max_grad_norm is None or (_number(self.max_grad_norm) and self.max_grad_norm > 0),
                "a positive number or null",
            ),
        }
        for name, (fits, wanted) in ranges.items():
            if not fits:
                raise UserError(f"optimizer.{name}={getattr(self, name)} is not allowed: set it to {wanted}.")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


class SelfAugModule(L.LightningModule):
    """Fine-tunes `model` with `objective`.

    Args:
        model: a peft.PeftModel (or a transformers model with injected adapters), or, for full fine-tuning, a
            transformers model; what requires gradients trains.
        objective: NLL and its terms.
        optimizer: AdamW and its schedule.
        seed: with the number of the step it seeds dropout, so that a resumed run draws what the first would have.
        shard: called by FSDP2 with the model and its device mesh (see selfaug/model/shard.py).
    """

    # Checkpoints hold what trains; the frozen base is not in them.
    strict_loading = False

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: OptimizerConfig,
        *,
        seed: int = 0,
        shard: Callable[[nn.Module, Any], None] | None = None,
    ):
        super().__init__()
        self.automatic_optimization = False
        objective.check(model)
        objective.start(model)
        self.model, self.objective, self.optimizer_config, self.seed, self._shard = (
            model,
            objective,
            optimizer,
            seed,
            shard,
        )
        self.alphas = Alphas(objective.terms, others=len(objective.parameter_terms))
        self.step_seconds = 0.0
        self.latest: dict[str, float] = {}  # what was logged of the last optimiser step
        self.step_tokens = 0  # of the last optimiser step, over all processes, without padding
        self.drift: float | None = None  # as a callback has just measured it, for the schedules
        self._sums = torch.zeros(2, 1)  # of the validation: [2, parts], nats and rows

    def configure_model(self) -> None:
        if self._shard is not None:
            self._shard(self.model, self.device_mesh)
            self._shard = None  # Lightning may call this hook again

    # ---- training --------------------------------------------------------------------------------------------------

    def training_step(self, step: Step, _: int) -> None:
        started = time.perf_counter()
        torch.manual_seed(hash((self.seed, self.global_step, self.global_rank)) % 2**63)
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        decoder = Decoder(self.model)
        # With a warm-up the first step has learning rate 0: the tuned model is the base model in the second one too.
        steps = int(self.trainer.estimated_stepping_batches)
        moved = self.global_step > (1 if self._warmup(steps) else 0)
        totals = self._over_processes(torch.stack([self.objective.count(b) for b in step.micro_batches]).sum(0))
        balance = Balance(self.model) if self.alphas.wants_gradients(self.global_step) else None
        alphas = self.alphas(self.global_step, steps)

        sums = torch.zeros(len(self.objective.names) + 1, device=self.device)
        for i, batch in enumerate(step.micro_batches):
            losses = self.objective(decoder, batch, totals, draw=(self.seed, self.global_step), alphas=alphas)
            if balance is not None:
                balance.add(losses.parts[self.objective.minimised])
            last = i == len(step.micro_batches) - 1
            penalty, penalties = self.objective.penalties(self.model) if last else (None, {})
            # With the last micro-batch, because data-parallel training takes one backward pass with an exchange.
            self._backward(losses.loss if penalty is None else losses.loss + penalty / self.trainer.world_size, last)
            self.objective.close()
            sums += torch.stack([losses.loss.detach(), *(part.detach() for part in losses.parts.values())])
        own = sums[0].clone()  # the sum over the processes may be taken in place
        sums = self._over_processes(sums)
        if not torch.isfinite(sums[0]):
            raise NonFiniteLoss(self.global_step, self._suspects(step, bool(own.isfinite())))

        norms = (None, None) if balance is None else balance.norms(self._over_processes)
        gradient_norm = self._clip_gradients()
        if not math.isfinite(gradient_norm):
            raise NonFiniteLoss(self.global_step, self._suspects(step, True))
        learning_rate = optimizer.param_groups[0]["lr"]
        torch.clear_autocast_cache()  # else casts of all weights that train stay in memory beside the optimiser's work
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        tokens = sum(batch.attention_mask.sum() for batch in step.micro_batches if batch.ids)  # silent ones have no ids
        tokens = self._over_processes(torch.as_tensor(tokens, device=self.device))
        if penalty is not None:
            sums[0] += penalty.detach()
        self._log_step(sums, totals, learning_rate, gradient_norm, tokens, started, alphas, penalties)
        seen = [self.latest.get(f"train/{name}") if moved else None for name in self.objective.terms]
        self.alphas.observe(seen, self.drift, *norms)
        self.drift = None

    def _backward(self, loss: Tensor, last: bool) -> None:
        # Data-parallel training averages the gradients over the processes; our sums are already over all of them.
        loss = loss * self.trainer.world_size
        # With DDP gradients are exchanged once, with the last micro-batch.
        block = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        wait = nullcontext() if last else block()
        with wait, torch.autocast(self.device.type, enabled=False):
            self.manual_backward(loss)

    def _clip_gradients(self) -> float:
        """Scale the gradients to at most max_grad_norm; returns their norm before that."""
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        limit = self.optimizer_config.max_grad_norm
        norm: Any = torch.nn.utils.clip_grad_norm_(trainable, math.inf if limit is None else limit)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _over_processes(self, value: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return value
        return self.trainer.strategy.reduce(value, reduce_op="sum")

    def _suspects(self, step: Step, finite: bool) -> list[str]:
        """The examples of the processes whose own loss is not finite; of all, where all are. Every process asks."""
        ids = [name for batch in step.micro_batches for name in batch.ids]
        if self.trainer.world_size == 1:
            return ids
        found: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(found, (finite, ids))
        wrong = [names for fine, names in found if not fine] or [names for _, names in found]
        return [name for names in wrong for name in names]

    def _log_step(
        self, sums: Tensor, totals: Tensor, learning_rate: float, gradient_norm: float, tokens: Tensor, started: float,
        alphas: dict[str, float], penalties: dict[str, Tensor],
    ) -> None:  # fmt: skip
        values = {"train/loss": float(sums[0]), "train/lr": learning_rate, "train/tokens": int(tokens)}
        values["train/grad_norm"] = gradient_norm
        self.step_tokens, self.step_seconds = int(tokens), time.perf_counter() - started
        values["speed/tokens_per_s"] = self.step_tokens / self.step_seconds
        for i, name in enumerate(self.objective.names):
            values[f"train/rows_{name}"] = int(totals[i])
            if totals[i]:  # a mean over nothing says nothing
                values[f"train/{name}"] = float(sums[1 + i])
        values |= {f"train/{name}": float(penalty) for name, penalty in penalties.items()}
        for name, alpha in alphas.items():
            values["train/alpha" if len(alphas) == 1 else f"train/alpha_{name}"] = alpha
        self.latest = values
        self.write_metrics(values)
        shown = {name: values[f"train/{name}"] for name in self.objective.names if f"train/{name}" in values}
        self.log_dict(shown, prog_bar=True, logger=False)

    def write_metrics(self, values: dict[str, float]) -> None:
        """To every logger, at the number of optimiser steps done so far.

        Directly and not through self.log, which writes only after the callbacks: a checkpoint of step n must not be
        older than the row of step n.
        """
        for logger in self.loggers:
            logger.log_metrics(values, step=self.global_step)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        # Lightning's own waits for every tensor that is inside something else.
        return batch.to(device, non_blocking=True)

    # ---- validation ------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._sums = torch.zeros(2, len(self.objective.names), device=self.device, dtype=torch.float64)

    def validation_step(self, step: Step, _: int) -> None:
        for batch in step.micro_batches:
            counts = self.objective.count(batch)
            losses = self.objective(Decoder(self.model), batch, torch.ones_like(counts))
            self._sums += torch.stack([torch.stack([*losses.parts.values()]).double(), counts.double()])

    def on_validation_epoch_end(self) -> None:
        nats, rows = self._over_processes(self._sums)
        means = (nats / rows.clamp_min(1)).tolist()
        # Of the further data sources, and of terms on them, there is nothing in the validation.
        measured = zip(self.objective.names, means, rows.tolist(), strict=True)
        values = {f"val/{name}": value for name, value, count in measured if count}
        self.write_metrics(values)
        self.log_dict(values, prog_bar=True, logger=False)

    # ---- optimiser and checkpoints -----------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        config = self.optimizer_config
        matrices: list[nn.Parameter] = []
        vectors: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                (vectors if parameter.ndim <= 1 or "ia3_l" in name else matrices).append(parameter)
        groups: list[dict[str, Any]] = [{"params": matrices}] if matrices else []
        if vectors:
            # Norms, biases, DoRA's magnitudes, IA3's factors: to make them small is not to hold them where they were.
            groups.append({"params": vectors, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=(config.betas[0], config.betas[1]),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_cosine_schedule_with_warmup(optimizer, self._warmup(steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _warmup(self, steps: int) -> int:
        return round(self.optimizer_config.warmup_ratio * steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["alphas"] = {**self.alphas.state_dict(), "drift": self.drift}
        trainable = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_fits(checkpoint)
        state = dict(checkpoint["alphas"])
        self.drift = state.pop("drift")
        self.alphas.load_state_dict(state)

    def _check_fits(self, checkpoint: dict[str, Any]) -> None:
        """Raises UserError for a checkpoint of another training, which Lightning would load as far as names agree."""
        problem = None if "alphas" in checkpoint else "it is none of selfaug"
        kept = checkpoint.get("state_dict", {})
        # A sharded one comes without, and says itself what it lacks.
        for name, parameter in self.named_parameters() if "state_dict" in checkpoint else ():
            if parameter.requires_grad and (name not in kept or kept[name].shape != parameter.shape):
                problem = problem or f"it has no {name.removeprefix('model.')} of {tuple(parameter.shape)}"
        wanted, found = self.alphas.schedules.keys(), checkpoint.get("alphas", {}).keys() - {"drift"}
        if problem is None and not wanted <= found:
            problem = f"it has no schedule of {', '.join(sorted(wanted - found))}"
        if problem:
            raise UserError(
                f"The checkpoint does not fit what is trained here ({problem}): set ckpt_path to one that was trained "
                "with the same model, adapter and terms, or to null to begin anew."
            )


class NonFiniteLoss(UserError):
    """A loss, or its gradient, is NaN or infinite. The optimiser has not stepped on it."""

    def __init__(self, step: int, examples: list[str]):
        shown = ", ".join(examples[:8]) + (f" and {len(examples) - 8} more" if len(examples) > 8 else "")
        super().__init__(
            f"The loss of step {step} or its gradient is not finite (examples {shown}): look at these examples, lower "
            "optimizer.lr or the weight of a term (alignment.alpha, method.terms.NAME.alpha), or set "
            "trainer.precision=32-true; the last checkpoint is kept."
        )
