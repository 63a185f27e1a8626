"""The token cache: every split of a source as one memory-mapped Arrow file, built once for each fingerprint.

Examples are streamed from the source through the prompt builder to disk in blocks, so that the size of a data set is
bounded by the disk and not by the memory. A cache entry is a directory that appears whole (built beside its place,
then renamed), so an interrupted build leaves nothing that could be taken for a finished one.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from tqdm import tqdm

from selfaug.data.prompt import PromptBuilder, Prompted, PromptStats
from selfaug.data.schema import SPLITS, Source, Split
from selfaug.errors import UserError

log = logging.getLogger(__name__)

_FORMAT = 2  # raise it whenever the columns or their meaning change
_BLOCK = 256  # examples that are tokenised together
_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "roles": pa.list_(pa.int8()),
        "documents": pa.list_(pa.int16()),  # rank of the document that a token is from, from 1; 0: of none
        "prompt_length": pa.int32(),
        "length": pa.int32(),
        "question": pa.string(),
        "answers": pa.list_(pa.string()),
        "answerable": pa.bool_(),
    }
)


class TokenisedData:
    """The splits of a source as datasets (columns: _SCHEMA), `stats` by split, `fingerprint` of all of it."""

    def __init__(self, directory: Path):
        self.fingerprint = directory.name
        self.stats: dict[str, dict[str, int]] = json.loads((directory / "stats.json").read_text())
        self._datasets = {split: Dataset.from_file(str(directory / f"{split}.arrow")) for split in SPLITS}

    def __getitem__(self, split: Split) -> Dataset:
        return self._datasets[split]


def tokenise(source: Source, builder: PromptBuilder, cache: Path, progress: bool = True) -> TokenisedData:
    """The token cache of `source` under `cache`, built if it is not there yet.

    Raises UserError for bad input (see the source), and where no training example is left.
    """
    key = hashlib.sha256(json.dumps([_FORMAT, source.fingerprint(), builder.fingerprint()]).encode()).hexdigest()[:20]
    directory = cache / "tokens" / key
    if not (directory / "stats.json").is_file():
        directory.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=directory.parent))
        try:
            stats = {split: _write_split(source, split, builder, work, progress) for split in SPLITS}
            (work / "stats.json").write_text(json.dumps(stats, indent=1))
            _publish(work, directory)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    data = TokenisedData(directory)
    _report(data)
    return data


def _write_split(source: Source, split: Split, builder: PromptBuilder, work: Path, progress: bool) -> dict[str, int]:
    builder.stats = PromptStats()
    examples = iter(source.examples(split, builder.count_tokens))
    with (
        pa.OSFile(str(work / f"{split}.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, _SCHEMA) as writer,
        tqdm(desc=f"tokenising {split}", unit=" examples", disable=not progress) as bar,
    ):
        for block in iter(lambda: list(islice(examples, _BLOCK)), []):
            rows = [_row(prompted) for prompted in builder.build(block)]
            if rows:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=_SCHEMA))
            bar.update(len(block))
    return asdict(builder.stats)


def _row(prompted: Prompted) -> dict[str, Any]:
    example = prompted.example
    return {
        "id": example.id,
        "input_ids": prompted.input_ids,
        "roles": prompted.roles,
        "documents": prompted.documents,
        "prompt_length": prompted.prompt_length,
        "length": len(prompted.input_ids),
        "question": example.question,
        "answers": list(example.answers),
        "answerable": example.answerable,
    }


def _publish(work: Path, directory: Path) -> None:
    """Rename the finished directory to its place; if another process was faster, its equal result stays."""
    try:
        os.rename(work, directory)
    except OSError:
        if not (directory / "stats.json").is_file():
            raise


def _report(data: TokenisedData) -> None:
    for split, stats in data.stats.items():
        if stats["examples_truncated"] or stats["dropped_examples"]:
            log.warning(
                "%s: %d of %d examples had documents cut to fit data.prompt.max_tokens (%d documents dropped, %d of "
                "them gold, %d shortened, %d tokens in all); %d examples were dropped because question and response "
                "alone do not fit",
                split, stats["examples_truncated"], stats["examples"], stats["documents_dropped"],
                stats["gold_documents_dropped"], stats["documents_cut"], stats["document_tokens_cut"],
                stats["dropped_examples"],
            )  # fmt: skip
        if stats["special_tokens_defused"]:
            log.warning(
                "%s: %d pieces of chat markup inside user text were broken up", split, stats["special_tokens_defused"]
            )
    if not len(data["train"]):
        raise UserError(
            "No training example is left: check data.path, and raise data.prompt.max_tokens if all were dropped."
        )
