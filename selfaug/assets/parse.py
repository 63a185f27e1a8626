"""Turns the raw data files of the archives into clean JSON lines (the benchmarks: parse_benchmarks.py).

Each function takes the archive's member and an output directory, writes one `<name>.jsonl` there, and returns the
number of lines. The standard library only, but for the Arrow files.
"""

import gzip
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from selfaug.errors import UserError

# doc.query of the SQuAD requests. Paragraphs may hold line breaks; none holds one of the field names.
_SQUAD_QUERY = re.compile(
    r"Title: (?P<title>[^\n]+)\nBackground: (?P<paragraph>.+)\nQuestion: (?P<question>.+)\nAnswer:", re.DOTALL
)
# The Wikipedia file lost its line breaks: "... of the state.Etymology", "... (ASD).Several". A sentence end after a
# lower-case letter, bracket or quote, with a capital right behind it, was a paragraph's end. "U.S.Army" is left alone.
_LOST_BREAK = re.compile(r"(?<=[a-z)\]\"][.!?])(?=[A-Z])")


def squad(member: Path, out: Path) -> int:
    """SQuAD -> {"id", "title", "question", "answers", "paragraph"}; every answer stands in its paragraph."""
    return write_jsonl(out / "squad.jsonl", (_squad_record(doc) for doc in request_docs(member)))


def _squad_record(doc: dict[str, Any]) -> dict[str, Any]:
    match = _SQUAD_QUERY.fullmatch(doc["query"])
    if match is None:
        raise UserError(f"squad: question {doc['id']} is not in the known format; report this as a bug of selfaug.")
    answers = _unique(doc["answers_text"])
    if not answers or answers[0] not in match["paragraph"]:
        raise UserError(f"squad: the answer to {doc['id']} is not in its paragraph; report this as a bug of selfaug.")
    # Titles are page names, with underscores for spaces; they are shown to the model.
    title = match["title"].replace("_", " ")
    return {
        "id": doc["id"],
        "title": title,
        "question": match["question"],
        "answers": answers,
        "paragraph": match["paragraph"],
    }


def drop(member: Path, out: Path) -> int:
    """DROP -> {"id", "question", "answers", "passage"}; an answer of several spans is joined with ", "."""
    records = (
        {
            "id": doc["query_id"],
            "question": doc["question"],
            "answers": _unique(", ".join(spans) for spans in doc["answers"]),
            "passage": doc["passage"],
        }
        for doc in request_docs(member)
    )
    return write_jsonl(out / "drop.jsonl", records)


def boolq(member: Path, out: Path) -> int:
    """BoolQ -> {"id", "question", "answers": ["yes"] or ["no"], "passage"}."""
    records = (
        {
            "id": f"boolq-{number}",
            "question": row["question"],
            "answers": ["yes" if row["answer"] else "no"],
            "passage": row["passage"],
        }
        for number, row in enumerate(arrow_rows(member, ["question", "answer", "passage"]))
    )
    return write_jsonl(out / "boolq.jsonl", records)


def triviaqa(member: Path, out: Path) -> int:
    """TriviaQA -> {"id", "question", "answers"}; the first answer is the canonical one, then come its aliases."""
    records = (
        {
            "id": row["question_id"],
            "question": row["question"],
            "answers": _unique([row["answer"]["value"], *row["answer"]["aliases"]]),
        }
        for row in arrow_rows(member, ["question_id", "question", "answer"])
    )
    return write_jsonl(out / "triviaqa.jsonl", records)


def wikipedia_articles(member: Path, out: Path) -> int:
    """One article a line -> {"id", "text"}, the lost paragraph breaks put back as blank lines where they show."""
    lines = (line for line in member.read_text(encoding="utf-8").split("\n") if line.strip())
    records = (
        {"id": f"wikipedia-{number:02d}", "text": _LOST_BREAK.sub("\n\n", line.strip())}
        for number, line in enumerate(lines)
    )
    return write_jsonl(out / "articles.jsonl", records)


def wikipedia_leads(member: Path, out: Path) -> int:
    """The lead texts -> {"id", "title", "text"}."""
    pages = json.loads(member.read_text(encoding="utf-8"))
    records = (
        {"id": f"lead-{number:05d}", "title": page["title"], "text": page["extract"].strip()}
        for number, page in enumerate(pages.values())
    )
    return write_jsonl(out / "leads.jsonl", records)


def alpaca(member: Path, out: Path) -> int:
    """The instructions -> {"id", "instruction", "input", "output"}."""
    rows = json.loads(member.read_text(encoding="utf-8"))
    records = (
        {"id": f"alpaca-{number}", **{key: row[key] for key in ("instruction", "input", "output")}}
        for number, row in enumerate(rows)
    )
    return write_jsonl(out / "alpaca.jsonl", records)


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> int:
    """One JSON object a line, in UTF-8; returns how many."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count


def request_docs(member: Path) -> Iterator[dict[str, Any]]:
    """The `doc` of each request of an OLMo evaluation file."""
    with gzip.open(member, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["doc"]


def arrow_rows(member: Path, columns: list[str]) -> list[dict[str, Any]]:
    """These columns of an Arrow stream file, as dictionaries."""
    import pyarrow as pa  # 0.2 s to import, and here only

    with pa.memory_map(str(member)) as source:
        return pa.ipc.open_stream(source).read_all().select(columns).to_pylist()


def _unique(answers: Iterable[str]) -> list[str]:
    """The answers in order, each once: several annotators often gave the same."""
    return list(dict.fromkeys(answers))
