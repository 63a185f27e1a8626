"""Texts of JSON-lines files, the packaged ones among them: Wikipedia articles and instructions."""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from selfaug.assets import asset_path
from selfaug.data.text import decode_object, read_lines
from selfaug.errors import UserError

T = TypeVar("T")

TURN = ("prompt", "response")
# How many of the packaged instructions the shipped evaluations ask at once, all with seed 0: those of drift and of
# style. What is measured on must not be trained on.
MEASURED = (2, 6, 8, 16, 24, 32, 48, 100, 200)


def wikipedia_texts(limit: int | None = None, seed: int = 0) -> list[str]:
    """A seeded sample of the packaged Wikipedia articles."""
    found = records(asset_path("wikipedia-articles") / "articles.jsonl", ("text",))
    return [text for (text,) in sample(found, limit, seed)]


def instruction_answers(limit: int | None = None, seed: int = 0) -> list[tuple[str, str]]:
    """A seeded sample of the packaged instructions, as (prompt, response); an instruction's input follows it after a
    blank line."""
    path = asset_path("alpaca-sample") / "alpaca.jsonl"
    found = sample(records(path, ("instruction", "input", "output"), optional=("input",)), limit, seed)
    return [(f"{task}\n\n{given}" if given else task, answer) for task, given, answer in found]


def unmeasured_instructions(limit: int | None = None, seed: int = 0) -> list[tuple[str, str]]:
    """A seeded sample of the packaged instructions that no shipped evaluation asks, as (prompt, response)."""
    measured = {turn for asked in MEASURED for turn in instruction_answers(asked, seed=0)}
    return sample((turn for turn in instruction_answers() if turn not in measured), limit, seed)


def records(
    path: Path, fields: tuple[str, ...], optional: tuple[str, ...] = (), setting: str = ""
) -> Iterator[tuple[str, ...]]:
    """`fields` of every line; raises UserError, naming `setting` and the line, where one is not a text."""
    for number, line in read_lines(path):
        try:
            record = decode_object(line)
            if fields == TURN and "messages" in record:
                record = _first_turn(record["messages"])
            values = tuple(record.get(name) for name in fields)
            for name, value in zip(fields, values, strict=True):
                if not isinstance(value, str) or not (value.strip() or name in optional):
                    raise ValueError(f'"{name}" must be a text that is not empty')
        except ValueError as error:
            raise UserError(f"{setting or path}, line {number}: {error}; correct that line.") from error
        yield values  # type: ignore[misc]


def _first_turn(messages: Any) -> dict[str, Any]:
    """The first user message and its answer, of a line such as `python -m selfaug.dialogues` writes."""
    turns = messages[:2] if isinstance(messages, list) else []
    if [turn.get("role") if isinstance(turn, dict) else None for turn in turns] != ["user", "assistant"]:
        raise ValueError('"messages" must begin with a message of the user and one of the assistant')
    return {"prompt": turns[0].get("content"), "response": turns[1].get("content")}


def sample(items: Iterable[T], limit: int | None, seed: int) -> list[T]:
    """`limit` of the items, all equally likely, in their order: a reservoir, so that a long file is never in memory."""
    if limit is None:
        return list(items)
    draw = random.Random(seed)
    kept: list[tuple[int, T]] = []
    for number, item in enumerate(items):
        if number < limit:
            kept.append((number, item))
        elif (place := draw.randrange(number + 1)) < limit:
            kept[place] = (number, item)
    return [item for _, item in sorted(kept, key=lambda pair: pair[0])]
