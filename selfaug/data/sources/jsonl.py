"""Your own data: one JSON object a line, in the format that selfaug/data/schema.py describes.

A file is checked completely before its first example is used, and all that is wrong with it is reported at once:
a typo in line 900,000 should not end a run that took an hour to get there. Both passes read one line at a time.
"""

import difflib
import logging
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from selfaug.data.schema import DONT_KNOW, SPLITS, Document, Example, Split
from selfaug.data.text import (
    check_file,
    check_shares,
    choose_split,
    decode_object,
    hash64,
    hash_sources,
    json_type,
    question_key,
    read_lines,
    unique_answers,
)
from selfaug.errors import UserError

_log = logging.getLogger(__name__)
_KEYS = ("question", "answers", "documents", "answerable", "id")
_REQUIRED = ("question", "answers", "documents")
_DOCUMENT_KEYS = ("text", "title", "gold")
_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.bz2")


class JsonlSource:
    """Examples from a JSON-lines file, or from a directory with train.jsonl and maybe val.jsonl and test.jsonl.

    `path`: the file or directory; .gz and .bz2 are read as they are. A file, and a directory without val or test,
    is divided by a seeded hash of the gold documents (title and text), or of the question where none is marked:
    the shares of *examples* are then near `val_share` and `test_share`, and no gold document is in two splits.
    Examples that share gold documents, directly or through others, stay together. Files that a directory does have
    are taken as they are. `max_errors`: how many bad lines are listed.

    Raises UserError: on construction if there is no such file or a share is impossible; from `examples`, before
    the first one, with a line `file:line: what is wrong` for each bad line.
    """

    VERSION = 1  # goes into the fingerprint: raise it when the same file would give other examples

    def __init__(
        self,
        path: str | Path,
        val_share: float = 0.05,
        test_share: float = 0.15,
        seed: int = 0,
        max_errors: int = 20,
    ):
        check_shares(val_share, test_share)
        self.path = Path(path).expanduser()
        self.seed = seed
        self.max_errors = max(1, max_errors)
        self.files = _find_files(self.path)
        self.val_share = 0.0 if "val" in self.files else val_share
        self.test_share = 0.0 if "test" in self.files else test_share

    def fingerprint(self) -> str:
        """sha256 over the files' contents, the settings that choose the split, and the version of this class."""
        settings = {"val_share": self.val_share, "test_share": self.test_share, "seed": self.seed}
        files = {str(split): file for split, file in self.files.items()}
        return hash_sources(type(self).__name__, self.VERSION, settings, files)

    def examples(self, split: Split, count_tokens: Callable[[list[str]], list[int]]) -> Iterator[Example]:
        """The examples of `split` in the order of the file. All files are checked first; see the class.

        `count_tokens` is not used: documents are taken as they are.
        """
        groups = self._checked()
        return self._stream(split, groups)

    def _checked(self) -> "_GoldGroups":
        errors: list[str] = []
        total = 0
        groups = _GoldGroups()
        for split, file in self.files.items():
            result = _check(file, self.max_errors)
            total += result.total
            errors += result.errors
            if split == "train":
                groups = result.groups
        if not total:
            return groups
        if total > self.max_errors:
            errors = [*errors[: self.max_errors], f"... and {total - self.max_errors} more"]
        lines = "1 bad line" if total == 1 else f"{total} bad lines"
        raise UserError(f"data.path={self.path} has {lines}, nothing was used:\n" + "\n".join(errors))

    def _stream(self, split: Split, groups: "_GoldGroups") -> Iterator[Example]:
        own_file = split in self.files and split != "train"
        share = {"val": self.val_share, "test": self.test_share}.get(split, 1.0)
        if share == 0 and not own_file:
            return
        found = False
        file = self.files[split if own_file else "train"]
        for number, line in read_lines(file):
            example = _example(decode_object(line), number)
            if own_file or self._split_of(example, groups) == split:
                found = True
                yield example
        if not found:
            _log.warning("%s gives no example for the split %s: see data.source.%s_share", file, split, split)

    def _split_of(self, example: Example, groups: "_GoldGroups") -> Split:
        gold = _gold_hashes(example)
        key = f"gold\x1f{groups.of(gold[0])}" if gold else question_key(example.question)
        return choose_split(key, self.val_share, self.test_share, self.seed)


def _find_files(path: Path) -> dict[Split, Path]:
    """The file of each split; a single file counts as train."""
    if not path.is_dir():
        check_file(path, f"data.path={path} does not exist: set data.path to a .jsonl file or a directory with one")
        return {"train": path}
    files: dict[Split, Path] = {}
    for split in SPLITS:
        present = [path / f"{split}{ending}" for ending in _ENDINGS if (path / f"{split}{ending}").is_file()]
        if len(present) > 1:
            names = " and ".join(file.name for file in present)
            raise UserError(f"data.path={path} holds both {names}: remove one of them")
        if present:
            check_file(present[0], "")
            files[split] = present[0]
    if "train" not in files:
        raise UserError(f"data.path={path} holds no train.jsonl: add one, or set data.path to a single file")
    return files


class _GoldGroups:
    """Which gold documents must stay in one split because some example has several of them.

    Kept as two flat arrays, 16 bytes for each document that is in such an example, whatever the file's size.
    """

    def __init__(self, first: array | None = None, second: array | None = None):
        self._hashes = np.empty(0, dtype=np.uint64)
        self._roots = self._hashes
        if first and second:
            pairs = np.array([first, second], dtype=np.uint64)
            self._hashes, index = np.unique(pairs, return_inverse=True)
            left, right = index.reshape(2, -1)
            size = len(self._hashes)
            graph = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(size, size))
            labels = connected_components(graph, directed=False)[1]
            # The documents are sorted by hash, so the first with a label has the smallest hash of its group.
            self._roots = self._hashes[np.unique(labels, return_index=True)[1]][labels]

    def of(self, gold: int) -> int:
        """The hash that stands for the whole group of the gold document with this hash."""
        place = int(np.searchsorted(self._hashes, np.uint64(gold)))
        if place < len(self._hashes) and int(self._hashes[place]) == gold:
            return int(self._roots[place])
        return gold


class _Checked:
    """What the validating pass over one file found: all bad lines counted, the first ones described."""

    def __init__(self, errors: dict[int, str], total: int, groups: _GoldGroups, file: Path):
        self.errors = [f"{file}:{number}: {errors[number]}" for number in sorted(errors)]
        self.total = total
        self.groups = groups


# Files without fault by (path, size, mtime): the three splits of a run check a file once. Few, so never emptied.
_CLEAN: dict[tuple[str, int, int], _Checked] = {}


def _check(file: Path, max_errors: int) -> _Checked:
    stat = file.stat()
    key = (str(file.resolve()), stat.st_size, stat.st_mtime_ns)
    if key not in _CLEAN:
        result = _check_lines(file, max_errors)
        if result.total:
            return result
        _CLEAN[key] = result
    return _CLEAN[key]


def _check_lines(file: Path, max_errors: int) -> _Checked:
    errors: dict[int, str] = {}
    total = 0
    ids, first, second = array("Q"), array("Q"), array("Q")
    for number, line in tqdm(read_lines(file), desc=f"checking {file.name}", unit=" lines", delay=2, disable=None):
        try:
            value = decode_object(line)
            problems = _problems(value)
        except ValueError as error:
            value, problems = {}, [str(error)]
        if problems:
            total += 1
            if len(errors) < max_errors:
                errors[number] = "; ".join(problems)
            continue
        example = _example(value, number)
        ids.append(hash64(example.id))
        gold = _gold_hashes(example)
        first.extend(gold[:1] * (len(gold) - 1))
        second.extend(gold[1:])
    for number, problem in _repeated_ids(file, ids):
        total += 1
        errors[number] = problem
        if len(errors) > max_errors:
            del errors[max(errors)]
    return _Checked(errors, total, _GoldGroups(first, second), file)


def _repeated_ids(file: Path, hashes: array) -> Iterator[tuple[int, str]]:
    """Lines whose id an earlier line has. A set of all ids would grow with the file; sorted hashes need 8 bytes a line,
    and only where two of them are equal is the file read again for the ids themselves."""
    values, counts = np.unique(np.array(hashes, dtype=np.uint64), return_counts=True)
    suspects = {int(value) for value in values[counts > 1]}
    if not suspects:
        return
    seen: dict[str, int] = {}
    for number, line in read_lines(file):
        try:
            value = decode_object(line)
        except ValueError:
            continue
        if _problems(value):
            continue
        name = _id(value, number)
        if hash64(name) not in suspects:
            continue
        if name in seen:
            yield number, f"duplicate id {name!r}, already in line {seen[name]}"
        else:
            seen[name] = number


def _id(value: dict[str, Any], number: int) -> str:
    return str(value.get("id", number))


def _example(value: dict[str, Any], number: int) -> Example:
    """The example in a checked object."""
    answerable = value.get("answerable", True)
    return Example(
        id=_id(value, number),
        question=value["question"],
        answers=unique_answers(value["answers"]) if answerable else (DONT_KNOW,),
        documents=tuple(Document(d["text"], d.get("title", ""), d.get("gold", False)) for d in value["documents"]),
        answerable=answerable,
    )


def _gold_hashes(example: Example) -> list[int]:
    return [hash64(f"{document.title}\x1f{document.text}") for document in example.documents if document.gold]


def _problems(value: dict[str, Any]) -> list[str]:
    """All that is wrong with one object, in words."""
    problems = [f"missing key {key!r}" for key in _REQUIRED if key not in value]
    problems += _unknown_keys(value, _KEYS, "")
    if "question" in value:
        problems += _text_problems(value["question"], "'question'")
    if isinstance(value.get("id"), str):
        problems += _text_problems(value["id"], "'id'")
    elif "id" in value and (isinstance(value["id"], bool) or not isinstance(value["id"], int)):
        problems.append(f"'id' must be a string or a whole number, not {json_type(value['id'])}")
    if not isinstance(value.get("answerable", True), bool):
        problems.append(f"'answerable' must be true or false, not {json_type(value['answerable'])}")
    if "answers" in value:
        answers = value["answers"]
        if not isinstance(answers, list):
            problems.append(f"'answers' must be a list of strings, not {json_type(answers)}")
        elif not answers and value.get("answerable", True) is not False:
            problems.append("'answers' is empty: give an answer, or set \"answerable\": false")
        else:
            for place, answer in enumerate(answers, start=1):
                problems += _text_problems(answer, f"answer {place}")
    documents = value.get("documents", [])
    if not isinstance(documents, list):
        return [*problems, f"'documents' must be a list of objects, not {json_type(documents)}"]
    for place, document in enumerate(documents, start=1):
        problems += _document_problems(document, f"document {place}")
    return problems


def _document_problems(document: object, name: str) -> list[str]:
    if not isinstance(document, dict):
        return [f"{name} must be an object with the key 'text', not {json_type(document)}"]
    problems = _unknown_keys(document, _DOCUMENT_KEYS, f"{name}: ")
    if "text" not in document:
        problems.append(f"{name}: missing key 'text'")
    else:
        problems += _text_problems(document["text"], f"{name}: 'text'")
    if "title" in document:
        problems += _text_problems(document["title"], f"{name}: 'title'", may_be_empty=True)
    if not isinstance(document.get("gold", False), bool):
        problems.append(f"{name}: 'gold' must be true or false, not {json_type(document['gold'])}")
    return problems


def _text_problems(value: object, name: str, may_be_empty: bool = False) -> list[str]:
    if not isinstance(value, str):
        return [f"{name} must be a string, not {json_type(value)}"]
    if not may_be_empty and not value.strip():
        return [f"{name} is empty"]
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell it, but it is no text: tokenizers refuse it
        return [f"{name} holds half a surrogate pair (\\ud800 to \\udfff)"]
    return []


def _unknown_keys(value: dict[str, Any], known: tuple[str, ...], where: str) -> list[str]:
    problems = []
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            problems.append(f"{where}unknown key {key!r} ({hint})")
    return problems
