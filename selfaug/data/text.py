"""Small helpers that the data sources share: seeded splits, file hashes, compressed files, answer texts.

Nothing here depends on Python's own `hash` or on global random state: the same inputs give the same split on
every machine and in every process.
"""

import bz2
import gzip
import hashlib
import json
import re
import string
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from selfaug.data.schema import Document, Split
from selfaug.errors import UserError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LFS_HEADER = b"version https://git-lfs.github.com/spec/"
_HASH_CHUNK = 1 << 20  # bytes read at a time


def normalise_answer(text: str) -> str:
    """`text` in lower case, without ASCII punctuation and without the words a, an, the; white space collapsed.

    The order of the steps is that of the SQuAD v1.1 evaluation script (Rajpurkar et al. 2016, section 6.1).
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def unique_answers(answers: Iterable[str]) -> tuple[str, ...]:
    """The answers without surrounding white space, empty ones and exact repetitions; their order kept."""
    return tuple(dict.fromkeys(stripped for answer in answers if (stripped := answer.strip())))


def document_text(document: Document) -> str:
    """The text by which a document is ranked and measured: its title, if it has one, and its text."""
    return f"{document.title}\n{document.text}" if document.title else document.text


def hash64(text: str) -> int:
    """A 64-bit hash of `text`, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def hash_share(key: str, seed: int, purpose: str = "") -> float:
    """A number in [0, 1) that depends on nothing but the arguments and looks uniform over keys.

    `purpose` keeps two uses of one key apart (say, its split and its place in the order).
    """
    return hash64(f"{seed}\x1f{purpose}\x1f{key}") / 2.0**64


def choose_split(key: str, val_share: float, test_share: float, seed: int) -> Split:
    """The split of everything that has this key: val and test with these shares, otherwise train."""
    place = hash_share(key, seed, "split")
    if place < test_share:
        return "test"
    return "val" if place < test_share + val_share else "train"


def question_key(question: str) -> str:
    """The split key of a question without a marked gold document: case and white space make no difference."""
    return "question\x1f" + " ".join(question.casefold().split())


def check_shares(val_share: float, test_share: float = 0.0) -> None:
    """Raises UserError unless both shares are at least 0 and something is left for training."""
    if val_share < 0 or test_share < 0 or val_share + test_share >= 1:
        raise UserError(
            f"data.source.val_share={val_share} and data.source.test_share={test_share} must be at least 0 and "
            "together below 1"
        )


def check_file(path: Path, missing: str) -> None:
    """Raises UserError with the sentence `missing` if there is no such file, and another if it is a Git LFS pointer."""
    if not path.is_file():
        raise UserError(missing)
    with path.open("rb") as file:
        if file.read(len(_LFS_HEADER)) == _LFS_HEADER:
            raise UserError(
                f"{path} is a Git LFS pointer, not the data: run `git lfs pull` in that repository, "
                "or download the file itself, and point data.path at it"
            )


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading bytes; names that end in .gz or .bz2 are decompressed on the way."""
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix == ".bz2":
        return cast(IO[bytes], bz2.open(path, "rb"))
    return path.open("rb")


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1; one line in memory at a time.

    Only a line feed ends a line: JSON strings may hold the other separators that Unicode knows.
    Raises UserError naming the line after which a compressed file is damaged.
    """
    number = 0
    try:
        with open_bytes(path) as file:
            for number, line in enumerate(file, start=1):
                stripped = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
                if stripped:
                    yield number, stripped
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path}: cannot be read after line {number}: {error}") from error


def decode_object(line: bytes) -> dict[str, Any]:
    """One JSON object. Raises ValueError whose message says what is wrong and where in the line."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8 at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON at column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object {{...}}, not {json_type(value)}")
    return value


def json_type(value: object) -> str:
    """The JSON name of a value's type, with its article, for error messages."""
    if isinstance(value, bool):
        return "a boolean"
    if value is None:
        return "null"
    names: dict[type, str] = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def hash_sources(name: str, version: int, settings: Mapping[str, object], files: Mapping[str, Path]) -> str:
    """sha256 over a source's name and version, its settings and the contents of its files, read in pieces.

    `files` are named by their role, not by their path: a data set that was moved is still the same.
    """
    digest = hashlib.sha256(json.dumps([name, version, dict(settings)], sort_keys=True).encode())
    for role, path in sorted(files.items()):
        content = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(_HASH_CHUNK):
                content.update(piece)
        digest.update(f"{role}\x1f{content.hexdigest()}".encode())
    return digest.hexdigest()
