"""RAG-Instruct, the paper's second training set: 40,541 instructions with about ten Wikipedia passages each.

Data set: https://huggingface.co/datasets/FreedomIntelligence/RAG-Instruct (one split, rag_instruct.json, Apache-2.0;
Liu et al. 2024, arXiv 2501.00353). The passages that the answer rests on stand among random ones and are not marked.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from selfaug.data.schema import Document, Example, Split
from selfaug.data.text import (
    check_file,
    check_shares,
    choose_split,
    decode_object,
    hash_sources,
    json_type,
    open_bytes,
    question_key,
    read_lines,
)
from selfaug.errors import UserError

_KEYS = ("question", "answer", "documents")
_PIECE = 1 << 20  # characters of a JSON list that are read at a time
_LONGEST = 1 << 26  # no record is longer: what cannot be parsed by then is a mistake in the file


class RagInstructSource:
    """Examples with the fields `question`, `answer` and `documents` (a list of strings).

    `path`: rag_instruct.json (one list) or the same as .jsonl, both also as .gz or .bz2, read piece by piece;
    None loads `repo` from the Hugging Face hub. The set has no test split of its own: `val_share` and `test_share`
    (0 to 1) are held out by a seeded hash of the question, so that a repeated question stays in one split.

    Raises UserError: without such a file, or without a network where `path` is None; for a bad record,
    `file:line: what is wrong` (in a .json list the number is the record's, from 1).
    """

    VERSION = 1  # goes into the fingerprint: raise it when the same file would give other examples

    def __init__(
        self,
        path: str | Path | None = None,
        repo: str = "FreedomIntelligence/RAG-Instruct",
        val_share: float = 0.01,
        test_share: float = 0.02,
        seed: int = 0,
    ):
        check_shares(val_share, test_share)
        self.path = Path(path).expanduser() if path is not None else None
        self.repo = repo
        if self.path is not None:
            check_file(self.path, f"data.path={self.path} does not exist: {self._how()}")
        self.val_share = val_share
        self.test_share = test_share
        self.seed = seed

    def _how(self) -> str:
        return (
            f"download rag_instruct.json from https://huggingface.co/datasets/{self.repo} and set data.path=<that file>"
        )

    def fingerprint(self) -> str:
        """sha256 over the content (the file's, or each record's from the hub), the settings and the class's version."""
        settings: dict[str, object] = {
            "val_share": self.val_share,
            "test_share": self.test_share,
            "seed": self.seed,
        }
        if self.path is not None:
            return hash_sources(type(self).__name__, self.VERSION, settings, {"rag_instruct": self.path})
        content = hashlib.sha256()
        for record in self._hub():
            content.update(json.dumps([record.get(key) for key in _KEYS]).encode())
        return hash_sources(type(self).__name__, self.VERSION, settings | {"hub": content.hexdigest()}, {})

    def examples(self, split: Split, count_tokens: Callable[[list[str]], list[int]]) -> Iterator[Example]:
        """The examples of `split` in the order of the file; their documents in its order too, unranked.

        `count_tokens` is not used: documents are taken as they are.
        """
        records = enumerate(self._hub(), start=1) if self.path is None else _read(self.path)
        for number, record in records:
            try:
                example = _example(record, number)
            except ValueError as error:
                raise UserError(f"{self.path or self.repo}:{number}: {error}") from error
            if choose_split(question_key(example.question), self.val_share, self.test_share, self.seed) == split:
                yield example

    def _hub(self) -> Iterable[dict[str, Any]]:
        import datasets  # slow to import, and not needed for a local file

        try:
            return datasets.load_dataset(self.repo, split="train")
        # What is raised without a network changes between versions of datasets, huggingface_hub, requests and httpx.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"{self.repo} could not be loaded from the hub ({reason}): {self._how()}") from error


def _read(path: Path) -> Iterator[tuple[int, Any]]:
    name = path.name.removesuffix(".gz").removesuffix(".bz2")
    if name.endswith(".json"):
        yield from enumerate(_read_list(path), start=1)
        return
    for number, line in read_lines(path):
        try:
            yield number, decode_object(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from error


def _read_list(path: Path) -> Iterator[Any]:
    """The members of a JSON list, without holding the whole list (300 MB, and several times that as objects)."""
    decoder = json.JSONDecoder()
    number = 0
    try:
        with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig") as file:
            text = file.read(_PIECE).lstrip()
            if not text.startswith("["):
                raise UserError(f"{path}: must be a JSON list [...]; name a file with one object a line .jsonl")
            place = 1
            while True:
                while place < len(text) and text[place] in " \t\r\n,":
                    place += 1
                if text[place : place + 1] == "]":
                    return
                try:
                    record, place = decoder.raw_decode(text, place)
                except json.JSONDecodeError as error:  # the record may go on in the next piece
                    piece = file.read(_PIECE) if len(text) - place < _LONGEST else ""
                    if not piece:
                        raise UserError(f"{path}:{number + 1}: not valid JSON: {error.msg}") from error
                    text, place = text[place:] + piece, 0
                else:
                    number += 1
                    yield record
    except (UnicodeDecodeError, EOFError, OSError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read after record {number}: {error}") from error


def _example(record: Any, number: int) -> Example:
    if not isinstance(record, dict):
        raise ValueError(f"must be a JSON object, not {json_type(record)}")
    for key in _KEYS:
        if key not in record:
            raise ValueError(f"missing key {key!r}; it has: {', '.join(map(str, record)) or 'none'}")
    for key in ("question", "answer"):
        if not isinstance(record[key], str) or not record[key].strip():
            raise ValueError(f"{key!r} must be a string with some text")
    documents = record["documents"]
    if not isinstance(documents, list) or not all(isinstance(text, str) for text in documents):
        raise ValueError("'documents' must be a list of strings")
    return Example(
        id=str(number),
        question=record["question"].strip(),
        answers=(record["answer"].strip(),),
        documents=tuple(Document(text.strip()) for text in documents if text.strip()),
    )
