"""The data of a run: a source, worded as prompts, tokenised, cut into optimiser steps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from selfaug.data.batching import StepDataset, StepLoader, StepSampler
from selfaug.data.mixture import MixedRows, Mixture, MixtureSource, Part, lengths_of
from selfaug.data.prompt import PromptBuilder, PromptConfig
from selfaug.data.schema import Source, Split
from selfaug.data.tokenised import TokenisedData, tokenise
from selfaug.errors import UserError
from selfaug.objective.batch import TASK
from selfaug.paths import cache_dir


class RagDataModule(L.LightningDataModule):
    """Training and validation steps of a RAG data set.

    Args:
        source: where the examples come from (selfaug/data/sources).
        tokenizer: the model's.
        prompt: how they are worded.
        batch_size: examples in one optimiser step, over all processes and micro-batches.
        micro_batch_size: examples in one forward pass of one process; None for no limit.
        micro_batch_tokens: tokens computed in one forward pass of one process, padding included; None for no limit.
        packing: put the examples of a forward pass one after another in one row instead of padding them.
        limit_train, limit_val: use the first so many examples; None for all.
        mixture: further data sources for the training, by name (mixture.py).
        batch_counts: what batch_size counts: all examples of a step, or the task's alone, the others coming on top.
        seed: of the order of the training examples.
        cache: where the token cache lies; default selfaug's cache directory.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Any,
        prompt: PromptConfig,
        *,
        batch_size: int = 16,
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = 2048,
        packing: bool = False,
        limit_train: int | None = None,
        limit_val: int | None = None,
        num_workers: int = 0,
        mixture: Mapping[str, MixtureSource] | None = None,
        batch_counts: str = "all",
        seed: int = 0,
        cache: Path | None = None,
        progress: bool = True,
    ):
        super().__init__()
        if batch_size < 1:
            raise UserError(f"data.batch_size={batch_size} is not allowed: set it to at least 1.")
        for name, limit in (("micro_batch_size", micro_batch_size), ("micro_batch_tokens", micro_batch_tokens)):
            if limit is not None and limit < 1:
                raise UserError(f"data.{name}={limit} is not allowed: set it to at least 1, or to null for no limit.")
        if not isinstance(packing, bool):
            raise UserError(f"data.packing={packing} is not allowed: set it to true or false.")
        if batch_counts not in ("all", TASK):
            raise UserError(f"data.batch_counts={batch_counts} is unknown: set it to all or {TASK}.")
        self.source, self.tokenizer = source, tokenizer
        self.builder = PromptBuilder(tokenizer, prompt)
        self.batch_size, self.packing = batch_size, packing
        self.micro_batch_size, self.micro_batch_tokens = micro_batch_size, micro_batch_tokens
        self.limits: dict[str, int | None] = {"train": limit_train, "val": limit_val, "test": None}
        self.num_workers, self.seed, self.progress = num_workers, seed, progress
        self.cache = cache or cache_dir()
        self.batch_counts = batch_counts
        self.mixture = Mixture(
            mixture or {}, self.builder.chat, self.builder.max_tokens, seed=seed, cache=self.cache, progress=progress
        )
        self._mixed: MixedRows | None = None
        self._data: TokenisedData | None = None
        self._train_loader: StepLoader | None = None
        self._steps_done = 0  # in the current epoch, when a run resumes

    @property
    def data(self) -> TokenisedData:
        """The token cache, built at the first use."""
        if self._data is None:
            self._data = tokenise(self.source, self.builder, self.cache, self.progress)
        return self._data

    def prepare_data(self) -> None:
        _ = self.data

    @property
    def fingerprint(self) -> str:
        """Of all that the training reads; `data.fingerprint` is the task's alone."""
        if self.mixture.sources:
            self.rows("train")
        return self.mixture.fingerprint(self.data.fingerprint)

    def rows(self, split: Split) -> Any:
        """The examples of a split that this run uses: of the training also those that are mixed in (MixedRows)."""
        rows, limit = self.data[split], self.limits[split]
        rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
        if not self.mixture.sources:
            return rows
        if split != "train":
            return MixedRows([Part(TASK, rows)])
        if self._mixed is None:
            self._mixed = self.mixture.rows(rows)
        return self._mixed

    def train_dataloader(self) -> StepLoader:
        self._train_loader = self._loader("train", shuffle=True)
        self._train_loader.skip(self._steps_done)
        return self._train_loader

    def state_dict(self) -> dict[str, int]:
        """How far the current epoch has come; Lightning puts it into checkpoints."""
        return {"steps_done": self._train_loader.steps_done if self._train_loader else 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on within the epoch. The loader may exist already, or be made later."""
        self._steps_done = state["steps_done"]
        if self._train_loader is not None:
            self._train_loader.skip(self._steps_done)

    def val_dataloader(self) -> StepLoader | list:
        return self._loader("val", shuffle=False) if len(self.rows("val")) else []

    @property
    def _world(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def _loader(self, split: Split, shuffle: bool) -> StepLoader:
        rows = self.rows(split)
        sampler = StepSampler(
            lengths_of(rows),
            step_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            micro_batch_tokens=self.micro_batch_tokens,
            packing=self.packing,
            shuffle=shuffle,
            seed=self.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            world=self._world,
            sources=rows.sizes if isinstance(rows, MixedRows) else None,
            on_top=self.batch_counts == TASK,
        )
        pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        pinned = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        dataset = StepDataset(rows, pad_id, self.packing, self.mixture.names)
        return StepLoader(dataset, sampler, num_workers=self.num_workers, pin_memory=pinned)
