"""Rows of the token cache as one TokenBatch: padded, a row of its own for each example, or packed, all in one row.

Everything that a batch knows about its examples (spans, keys) is worked out here, on the CPU and by the loader's
workers, so that training never has to wait for the accelerator to tell where an example ends.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfaug.objective.batch import IGNORE, TASK, Role, Span, TokenBatch, token_key


def collate(rows: list[dict[str, Any]], pad_id: int, source_names: tuple[str, ...] = (TASK,)) -> TokenBatch:
    """Pad `rows` on the right to the longest of them: B = len(rows), T = its length.

    source_names: of the data sources; where there are several, the rows have their number in the column `source`."""
    spans = tuple(Span(i, 0, row["length"]) for i, row in enumerate(rows))
    shape = (len(rows), max(row["length"] for row in rows))
    return _batch(rows, spans, shape, pad_id, source_names, packed=False)


def pack(rows: list[dict[str, Any]], source_names: tuple[str, ...] = (TASK,)) -> TokenBatch:
    """`rows` one after another without any padding: B = 1, T = the sum of their lengths."""
    ends = np.cumsum([row["length"] for row in rows]).tolist()
    spans = tuple(Span(0, end - row["length"], end) for end, row in zip(ends, rows, strict=True))
    return _batch(rows, spans, (1, ends[-1]), 0, source_names, packed=True)


def _batch(
    rows: list[dict[str, Any]], spans: tuple[Span, ...], shape: tuple[int, int], pad_id: int,
    source_names: tuple[str, ...], *, packed: bool,
) -> TokenBatch:  # fmt: skip
    def fill(column: str, empty: int) -> Tensor:
        tensor = torch.full(shape, empty, dtype=torch.int64)
        for row, span in zip(rows, spans, strict=True):
            tensor[span.row, span.start : span.stop] = torch.as_tensor(row[column], dtype=torch.int64)
        return tensor

    input_ids, roles = fill("input_ids", pad_id), fill("roles", int(Role.PADDING))
    learned = roles == Role.RESPONSE
    if "learn" in rows[0]:  # of an example or of each of its tokens; see mixture.py
        learned &= fill("learn", 0).bool()
    return TokenBatch(
        input_ids,
        attention_mask=(roles != Role.PADDING).long(),
        labels=input_ids.masked_fill(~learned, IGNORE),
        roles=roles,
        documents=fill("documents", 0) if "documents" in rows[0] else None,
        ids=tuple(row["id"] for row in rows),
        spans=spans,
        keys=tuple(token_key(np.asarray(row["input_ids"])) for row in rows),
        packed=packed,
        right_padded=True,
        sources=fill("source", -1) if len(source_names) > 1 else None,
        source_names=source_names,
    )
