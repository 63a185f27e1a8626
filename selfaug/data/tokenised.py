"""The token cache: every split of a source as one memory-mapped Arrow file, built once for each fingerprint; so too the
dialogues of another data source.

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
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from tqdm import tqdm

from selfaug.data.dialogue import DialogueBuilder, DialogueSource, DialogueStats
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
_DIALOGUE_SCHEMA = pa.schema([_SCHEMA.field(name) for name in ("id", "input_ids", "roles", "documents", "length")])


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

    def write(work: Path) -> dict[str, Any]:
        return {split: _write_split(source, split, builder, work, progress) for split in SPLITS}

    data = TokenisedData(_entry(cache, [_FORMAT, source.fingerprint(), builder.fingerprint()], write))
    _report(data)
    return data


class TokenisedDialogues:
    """The dialogues of a source as a data set, `rows` (columns: _DIALOGUE_SCHEMA); `stats` is a DialogueStats as a
    dictionary, `fingerprint` of all of it."""

    def __init__(self, directory: Path):
        self.fingerprint = directory.name
        self.stats: dict[str, int] = json.loads((directory / "stats.json").read_text())
        self.rows = Dataset.from_file(str(directory / "dialogues.arrow"))


def tokenise_dialogues(
    source: DialogueSource, builder: DialogueBuilder, cache: Path, name: str, progress: bool = True
) -> TokenisedDialogues:
    """The token cache of another data source, called `name` in messages, under `cache`, built if it is not there yet.

    Raises UserError for bad input (see the source), and where no dialogue is left.
    """

    def write(work: Path) -> dict[str, Any]:
        return _write_dialogues(source, builder, work, name, progress)

    found = TokenisedDialogues(
        _entry(cache, [_FORMAT, "dialogues", source.fingerprint(), builder.fingerprint()], write)
    )
    stats = DialogueStats(**found.stats)
    if stats.cut or stats.dropped_long or stats.dropped_silent:
        log.warning(
            "%s: of %d dialogues %d lost their last turns (or the end of a text) to fit max_tokens=%s, %d were dropped "
            "because not even their first answer fits, and %d because there is nothing to learn in them",
            name, stats.dialogues, stats.cut, builder.max_tokens, stats.dropped_long, stats.dropped_silent,
        )  # fmt: skip
    if not len(found.rows):
        raise UserError(
            f"data.mixture.{name} has no dialogue left: check its source, and raise data.mixture.{name}.max_tokens if "
            "all were dropped."
        )
    return found


def _entry(cache: Path, fingerprint: list[Any], write: Callable[[Path], dict[str, Any]]) -> Path:
    """The directory of an entry; where there is none, `write` fills it and returns its statistics."""
    key = hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()[:20]
    directory = cache / "tokens" / key
    if not (directory / "stats.json").is_file():
        directory.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=directory.parent))
        try:
            (work / "stats.json").write_text(json.dumps(write(work), indent=1))
            _publish(work, directory)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return directory


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


def _write_dialogues(
    source: DialogueSource, builder: DialogueBuilder, work: Path, name: str, progress: bool
) -> dict[str, int]:
    builder.stats = DialogueStats()
    dialogues = iter(source.dialogues())
    with (
        pa.OSFile(str(work / "dialogues.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, _DIALOGUE_SCHEMA) as writer,
        tqdm(desc=f"tokenising {name}", unit=" dialogues", disable=not progress) as bar,
    ):
        for block in iter(lambda: list(islice(dialogues, _BLOCK)), []):
            rows = [
                {
                    "id": tokens.dialogue.id,
                    "input_ids": tokens.input_ids,
                    "roles": tokens.roles,
                    "documents": [0] * len(tokens.input_ids),
                    "length": len(tokens.input_ids),
                }
                for tokens in builder.build(block)
            ]
            if rows:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=_DIALOGUE_SCHEMA))
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
