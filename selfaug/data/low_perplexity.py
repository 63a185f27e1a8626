"""Which response tokens are learned: those that the base model finds likely (STM, arXiv 2501.14315)."""

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from selfaug.data.batching import MicroBatch
from selfaug.errors import UserError
from selfaug.model.decoder import Decoder
from selfaug.model.reference import adapters_off, check_adapters, rewrites_base
from selfaug.objective.batch import TokenBatch
from selfaug.objective.preparation import Preparation
from selfaug.objective.rows import learned_rows
from selfaug.ops import linear_nll

log = logging.getLogger(__name__)

_FEW = 0.1  # of the tokens, or of the examples: less is worth a warning


@dataclass
class LowPerplexity:
    """Selective token masking: a response token whose perplexity under the base model, exp(its NLL), is above
    `threshold` is not learned. One pass of the base model over the training examples before the first step, and none
    in training. The rows of the training loader get (or keep, and narrow) a column `learn`; validation is left alone.

    Raises:
        UserError: a threshold that is not above 1; before the first step, one that leaves nothing to be learned, or a
            model with adapters off that is not the base model.
    """

    threshold: float = 2.5

    def __post_init__(self) -> None:
        if not (isinstance(self.threshold, (int, float)) and self.threshold > 1):
            raise UserError(
                f"method.learn.threshold={self.threshold} is not allowed: set it to a perplexity, a number above 1."
            )

    @torch.no_grad()
    def prepare(self, at: Preparation) -> dict[str, Tensor]:
        """positions: [K] int32, places of the tokens to be learned within their examples, one example after another;
        counts: [examples] int32, how many are of each; seen: [2] int64, response tokens and examples looked at."""
        if rewritten := rewrites_base(at.model):
            raise UserError(
                f"method.learn asks the base model, and {rewritten} rewrites its weights: set "
                "adapter.init_lora_weights=true, gaussian or orthogonal."
            )
        check_adapters(at.model)
        decoder, dataset = Decoder(at.model), at.loader.dataset
        device = decoder.head.arguments()["weight"].device
        lengths = at.loader.sampler.lengths
        begins = np.concatenate([[0], np.cumsum(lengths)])
        learn = torch.zeros(int(begins[-1]), dtype=torch.uint8)  # all tokens of all examples
        groups = _micro_batches(at.loader.sampler, at.steps)
        tokens = 0
        # Every process takes its share. All make the same number of passes, which sharded weights need: one that has
        # none left looks at the first group again, and keeps nothing of it.
        rounds = range(0, len(groups), at.world)
        for first in tqdm(rounds, desc="perplexity of the responses", unit=" passes", disable=not at.progress):
            mine = first + at.rank < len(groups)
            group = groups[first + at.rank if mine else 0]
            batch = dataset[[group]].micro_batches[0]
            kept, rows = self._kept(decoder, batch.to(device))
            if mine:
                tokens += int(rows.sum())
                for i, span in zip(group.indices, batch.spans, strict=True):
                    learn[begins[i] : begins[i + 1]] = kept[span.row, span.start : span.stop].to(torch.uint8)
        if at.world > 1:
            learn = at.over_processes(learn.to(device)).cpu()
            tokens = int(at.over_processes(torch.tensor(tokens, device=device)))
        parts = [learn[begin:end].nonzero().flatten().int() for begin, end in pairwise(begins)]
        seen = sum(len(group.indices) for group in groups)
        return {
            "positions": torch.cat(parts),
            "counts": torch.tensor([len(part) for part in parts], dtype=torch.int32),
            "seen": torch.tensor([tokens, seen]),
        }

    def _kept(self, decoder: Decoder, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """[B, T] bool each: the tokens that are to be learned, on the CPU, and the rows that would have been."""
        rows = learned_rows(batch.roles, batch.labels, batch.last)
        with adapters_off(decoder.model):
            hidden = decoder.states(batch)[rows]
        nll = linear_nll(hidden, batch.labels[:, 1:][rows[:, :-1]], **decoder.head.arguments())
        kept = torch.zeros_like(rows)
        kept[rows] = nll <= math.log(self.threshold)
        return kept.roll(1, 1).cpu(), rows  # a row predicts the token after it; the last row never counts

    def use(self, found: Mapping[str, Tensor], at: Preparation) -> dict[str, float]:
        tokens, examples = found["seen"].tolist()
        kept, left = int(found["counts"].sum()), int((found["counts"] > 0).sum())
        if not kept:
            raise UserError(
                f"method.learn.threshold={self.threshold} leaves none of {tokens} response tokens to be learned, the "
                "base model finds all of them unlikely: raise it, or set another method."
            )
        said = "%d of %d response tokens, in %d of %d examples, are learned (base perplexity at most %g)"
        few = kept < _FEW * tokens or left < _FEW * examples
        log.log(
            logging.WARNING if few else logging.INFO,
            said + ("; so little is left that there may be next to nothing to learn from" if few else ""),
            kept, tokens, left, examples, self.threshold,
        )  # fmt: skip
        at.loader.dataset.rows = LearnedRows(at.loader.dataset.rows, found["positions"], found["counts"])
        return {"learned_tokens": kept / tokens, "learned_examples": left / examples}


class LearnedRows:
    """`rows` (by number, as mappings) with a column `learn`: 1 for the tokens at `positions`, see LowPerplexity."""

    def __init__(self, rows: Any, positions: Tensor, counts: Tensor):
        self.rows, self._positions = rows, positions.numpy()
        self._begins = np.concatenate([[0], counts.numpy().cumsum()])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = dict(self.rows[i])
        learn = np.zeros(row["length"], dtype=np.int8)
        learn[self._positions[self._begins[i] : self._begins[i + 1]]] = 1
        return {**row, "learn": learn}


def _micro_batches(sampler: Any, steps: int) -> list[MicroBatch]:
    """Of all processes together, those of the first epoch or of its first `steps` steps. They do not depend on how many
    processes there are, so that any number comes to the same choice."""
    sampler = copy.copy(sampler)
    sampler.rank, sampler.world, sampler.first_step, sampler.epoch = 0, 1, 0, 0
    return [group for step in islice(iter(sampler), steps) for group in step]
