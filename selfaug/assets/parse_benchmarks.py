"""Turns the benchmarks' raw files into the records that lm-eval's task code reads.

Field names, types and order of records are those of the hub data set that lm-eval's task of the same name reads, so
that its code runs on them unchanged. Each function takes the archive's member and an output directory, writes one
`<split>.jsonl` a split there, and returns the number of records. A record that is not as expected is a UserError:
the archives are pinned, so only another pin can bring one.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from selfaug.assets.parse import arrow_rows, request_docs, write_jsonl
from selfaug.errors import UserError

LETTERS = "ABCDE"
PUNKT_FILES = ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt")
DEV_QUESTIONS = 5  # of each MMLU subject

Record = dict[str, Any]


def ifeval(member: Path, out: Path) -> int:
    """Google's prompts -> {"key", "prompt", "instruction_id_list", "kwargs"}, one kwargs for each instruction."""

    def record(row: Record) -> Record:
        _require(len(row["kwargs"]) == len(row["instruction_id_list"]) > 0, "one kwargs for each instruction")
        return _fields(row, "key", "prompt", "instruction_id_list", "kwargs")

    with member.open(encoding="utf-8") as file:
        rows = (json.loads(line) for line in file if line.strip())
        return write_jsonl(out / "test.jsonl", _records("ifeval", rows, record))


def punkt_tab(member: Path, out: Path) -> int:
    """The English model's four tables -> the folder below a data directory in which NLTK looks for it."""
    folder = out / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    for name in PUNKT_FILES:
        if not (member / name).is_file():
            raise UserError(f"punkt-tab: {name} is not in the archive; report this as a bug of selfaug.")
        shutil.copyfile(member / name, folder / name)
    return len(PUNKT_FILES)


def arc(member: Path, out: Path) -> int:
    """ARC requests -> {"id", "question", "choices": {"text", "label"}, "answerKey"}.

    There is a request for every choice, and each again without its question; one record is made of all of a question.
    The labels are always A, B, ...: in a few questions of the hub's set they are 1, 2, ..., in the same order.
    """

    def record(doc: Record) -> Record:
        query, texts = doc["query"], doc["choices"]
        _require(query.startswith("Question: ") and query.endswith("\nAnswer:"), "a question")
        _require(0 <= doc["gold"] < len(texts) <= len(LETTERS), "an answer among the choices")
        return {
            "id": doc["id"],
            "question": query.removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": texts, "label": list(LETTERS[: len(texts)])},
            "answerKey": LETTERS[doc["gold"]],
        }

    unique: dict[str, Record] = {}
    for row in _records("arc", request_docs(member), record):
        if unique.setdefault(row["id"], row) != row:
            raise UserError(f"arc: there are two questions {row['id']}; report this as a bug of selfaug.")
    return write_jsonl(out / "test.jsonl", unique.values())


def hellaswag(member: Path, out: Path) -> int:
    """HellaSwag -> its ten columns; `label` is a digit as text, the index of the right one of `endings`."""
    columns = ["ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "source_id", "split", "split_type", "label"]

    def record(row: Record) -> Record:
        _require(len(row["endings"]) == 4 and row["label"] in ("0", "1", "2", "3"), "four endings and a label")
        return row

    rows = arrow_rows(member, columns)
    return write_jsonl(out / "validation.jsonl", _records("hellaswag", rows, record))


def piqa(member: Path, out: Path) -> int:
    """PIQA -> {"goal", "sol1", "sol2", "label"}; label 0 is sol1."""

    def record(row: Record) -> Record:
        _require(row["label"] in (0, 1), "a label")
        return row

    rows = arrow_rows(member, ["goal", "sol1", "sol2", "label"])
    return write_jsonl(out / "validation.jsonl", _records("piqa", rows, record))


def winogrande(member: Path, out: Path) -> int:
    """WinoGrande -> {"sentence", "option1", "option2", "answer"}; the answer is "1" or "2", the blank is "_"."""

    def record(row: Record) -> Record:
        _require(row["sentence"].count("_") == 1 and row["answer"] in ("1", "2"), "one blank and an answer")
        return row

    rows = arrow_rows(member, ["sentence", "option1", "option2", "answer"])
    return write_jsonl(out / "validation.jsonl", _records("winogrande", rows, record))


def lambada(member: Path, out: Path) -> int:
    """LAMBADA requests -> {"text"}: the passage with its last word, which lm-eval cuts off at the last space."""

    def record(doc: Record) -> Record:
        (word,) = doc["answers_text"]
        _require(" " not in word and not doc["query"].endswith(" "), "a passage and its last word")
        return {"text": f"{doc['query']} {word}"}

    return write_jsonl(out / "test.jsonl", _records("lambada", request_docs(member), record))


def mmlu(member: Path, out: Path) -> int:
    """MMLU, a folder for each subject -> test.jsonl and dev.jsonl of {"subject", "question", "choices", "answer"}.

    The subject is lm-eval's `dataset_name`; `answer` is the index of the right one of four choices. The examples (dev)
    keep their order: lm-eval shows the first ones.
    """

    def rows(split: str) -> Iterator[Record]:
        for folder in sorted(member.iterdir()):
            found = arrow_rows(
                folder / split / "data-00000-of-00001.arrow", ["subject", "question", "choices", "answer"]
            )
            _require(split == "test" or len(found) == DEV_QUESTIONS, f"{DEV_QUESTIONS} examples of {folder.name}")
            for row in found:
                _require(row["subject"] == folder.name, f"the subject {folder.name}")
                yield row

    def record(row: Record) -> Record:
        _require(len(row["choices"]) == 4 and row["answer"] in range(4), "four choices and an answer")
        return row

    return sum(
        write_jsonl(out / f"{split}.jsonl", _records(f"mmlu {split}", rows(split), record)) for split in ("test", "dev")
    )


def gsm8k(member: Path, out: Path) -> int:
    """GSM8K requests -> {"question", "answer"}; the answer ends with "#### " and the number."""

    def record(doc: Record) -> Record:
        _require("\n#### " in doc["answer"], "an answer that ends with the number")
        return _fields(doc, "question", "answer")

    return write_jsonl(out / "test.jsonl", _records("gsm8k", request_docs(member), record))


def humaneval(member: Path, out: Path) -> int:
    """HumanEval requests -> {"task_id", "prompt", "canonical_solution", "test", "entry_point"}."""

    def record(doc: Record) -> Record:
        _require(f"def {doc['entry_point']}(" in doc["prompt"], "a prompt that starts the function")
        return _fields(doc, "task_id", "prompt", "canonical_solution", "test", "entry_point")

    return write_jsonl(out / "test.jsonl", _records("humaneval", request_docs(member), record))


def _records(name: str, rows: Iterable[Record], record: Callable[[Record], Record]) -> Iterator[Record]:
    """The records of the rows; a row that `record` cannot take is named in a UserError."""
    done = 0
    try:
        for row in rows:
            yield record(row)
            done += 1
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{name}: record {done + 1} is not in the known format ({error}); report this as a bug of selfaug."
        ) from error


def _require(condition: bool, what: str) -> None:
    """A ValueError, which `_records` turns into a sentence, where the condition does not hold."""
    if not condition:
        raise ValueError(f"{what} expected")


def _fields(row: Record, *names: str) -> Record:
    return {name: row[name] for name in names}
