"""A small fixed probe of forgetting while the model trains, for curves over steps (the SelfAug paper's Figure 2).

Every n steps the drift on a few held-out texts; at the end of every epoch a short sample of IFEval, with the length of
the answers. The same items every time, so a curve shows the model and not the sample. What it draws at random is drawn
from states of its own: a run with the probe trains the same weights, bit for bit, as one without.
"""

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn

from selfaug.errors import UserError
from selfaug.evaluation.drift import DriftConfig, measure_drift
from selfaug.evaluation.retention import style
from selfaug.evaluation.retention.benchmarks import RetentionConfig, whole_number
from selfaug.evaluation.retention.harness import Item
from selfaug.evaluation.retention.suite import StyleConfig, Suite
from selfaug.model.frozen_copy import FrozenCopy
from selfaug.model.reference import keeps_base, trains_outside

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbeConfig:
    """every_n_steps: how often drift is measured. ifeval_items: prompts at the end of an epoch; 0 for none.
    max_new_tokens: of an answer. documents: of each drift corpus. tokens_per_batch: of a forward pass."""

    every_n_steps: int = 20
    ifeval_items: int = 24
    max_new_tokens: int = 96
    documents: int = 6
    tokens_per_batch: int = 4096

    def __post_init__(self) -> None:
        for name, least in (("every_n_steps", 1), ("ifeval_items", 0), ("max_new_tokens", 1), ("documents", 1),
                            ("tokens_per_batch", 1)):  # fmt: skip
            whole_number(f"callbacks.retention_probe.{name}", getattr(self, name), least)


class RetentionProbe(L.Callback):
    """Writes probe/drift_CORPUS (KL(base||tuned), nats per token), probe/ifeval_prompt_strict, probe/words and
    probe/one_line to the loggers."""

    def __init__(
        self,
        config: ProbeConfig,
        drift: DriftConfig,
        tokenizer: Any,
        words: dict[str, Any],
        stopping: Callable[[], bool] = lambda: False,
    ):
        self.config, self.tokenizer, self.stopping = config, tokenizer, stopping
        small = {
            name: {**vars(corpus), "limit": min(config.documents, corpus.limit or config.documents)}
            for name, corpus in drift.corpora.items()
        }
        self.drift = DriftConfig(
            small, config.tokens_per_batch, drift.seed, drift.chat_template, drift.template_arguments
        )
        self.suite: Suite | None = None
        if config.ifeval_items:
            settings = {"items": config.ifeval_items, "max_new_tokens": config.max_new_tokens}
            retention = RetentionConfig(
                {"ifeval": settings}, tokens_per_batch=config.tokens_per_batch, seed=drift.seed, **words
            )
            self.suite = Suite(retention, StyleConfig(), tokenizer, progress=False)
            if self.suite.chat is None:
                raise UserError(
                    "callbacks.retention_probe asks IFEval through a chat template, which the model has not: set "
                    "callbacks.retention_probe.ifeval_items=0, or data.prompt.chat_template."
                )
        self.latest: dict[str, float] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        model = pl_module.model
        if self._base(pl_module) is None and not (keeps_base(model) and not trains_outside(model)):
            raise UserError(
                "callbacks=retention_probe compares with the base model, whose own weights train: set "
                "reference=frozen_copy with it."
            )

    @staticmethod
    def _base(pl_module: Any) -> nn.Module | None:
        """The base model, where it is not the tuned one with its adapters off."""
        reference = pl_module.objective.reference
        return reference.on(pl_module.device) if isinstance(reference, FrozenCopy) else None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step == 0:  # where tuned is base: the first point of every curve
            self._probe(trainer, pl_module, answers=True)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Not on_train_epoch_end, which comes after the checkpoint of the epoch's last step.
        last = bool(trainer.is_last_batch) or trainer.global_step == trainer.max_steps
        if self.stopping():  # a signal to stop waits for no answers
            return
        if last or trainer.global_step % self.config.every_n_steps == 0:
            self._probe(trainer, pl_module, answers=last)

    def _probe(self, trainer: L.Trainer, pl_module: Any, answers: bool) -> None:
        with _own_randomness(), torch.no_grad(), trainer.precision_plugin.train_step_context():
            found = measure_drift(
                pl_module.model, self.tokenizer, self.drift, base=self._base(pl_module), progress=False
            )
            values = {f"probe/drift_{name}": metrics["kl_base_tuned"]["tuned"].mean for name, metrics in found.items()}
            if answers and self.suite is not None:
                values |= _answered(self.suite.items(pl_module.model, "ifeval"))
        self.latest = values
        if trainer.global_step:
            pl_module.drift = float(np.mean([value for name, value in values.items() if "drift" in name]))
        pl_module.write_metrics(values)


def _answered(items: list[Item]) -> dict[str, float]:
    styles = [style.style(str(item.output)) for item in items]
    return {
        "probe/ifeval_prompt_strict": float(np.mean([item.values["prompt_strict"] for item in items])),
        **{f"probe/{name}": float(np.mean([one[name] for one in styles])) for name in ("words", "one_line")},
    }


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Inside, draws do not change what is drawn outside."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
