"""Dialogues from files, from the packaged instructions and from the hub.

A record, a line of a JSONL file or a row of a data set, is read by the keys that it has:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}
    {"prompt": "...", "response": "..."}
    {"instruction": "...", "input": "..." (may be empty or missing), "output": "..."}          Alpaca's
    {"text": "..."}                                                                            plain text

and may have an `id`. `messages` may open with a system message; `ended: false` says that the last answer was cut off.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from selfaug.assets import asset_path
from selfaug.data.dialogue import TEXT, Dialogue, Message
from selfaug.data.packaged import MEASURED, unmeasured_instructions
from selfaug.data.text import check_file, decode_object, hash_sources, json_type, read_lines
from selfaug.errors import UserError

_ROLES = ("system", "user", "assistant")


class JsonlDialogues:
    """The records of a JSON-lines file (also .gz, .bz2), in its order.

    Raises UserError: on construction without such a file; from `dialogues` for a bad line, `file:line: what is wrong`.
    """

    VERSION = 1  # goes into the fingerprint: raise it when the same file would give other dialogues

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        check_file(
            self.path,
            f"data.mixture: {self.path} does not exist: set the path of its source to a .jsonl file of dialogues.",
        )

    def fingerprint(self) -> str:
        """sha256 over the file's content and the version of this class."""
        return hash_sources(type(self).__name__, self.VERSION, {}, {"dialogues": self.path})

    def dialogues(self) -> Iterator[Dialogue]:
        """All of them, one line in memory at a time."""
        for number, line in read_lines(self.path):
            try:
                yield dialogue(decode_object(line), str(number))
            except ValueError as error:
                raise UserError(f"{self.path}:{number}: {error}; correct that line.") from error


class PackagedInstructions:
    """The packaged Alpaca sample (999 instructions, Taori et al. 2023), without those that the shipped evaluations
    measure drift and style on."""

    VERSION = 1

    def fingerprint(self) -> str:
        """sha256 over the file's content, what is left out, and the version of this class."""
        file = asset_path("alpaca-sample") / "alpaca.jsonl"
        return hash_sources(type(self).__name__, self.VERSION, {"without": MEASURED}, {"alpaca": file})

    def dialogues(self) -> Iterator[Dialogue]:
        """All of them in the order of the file."""
        for number, (prompt, answer) in enumerate(unmeasured_instructions(), start=1):
            yield Dialogue(f"alpaca-{number}", _turn(prompt, answer))


class HubDialogues:
    """Rows of a data set that `datasets` can load: a hub name or a folder with data files.

    split, revision: of the data set. limit: the first so many rows, null for all.

    UltraChat is HuggingFaceH4/ultrachat_200k (split train_sft, MIT), Alpaca is tatsu-lab/alpaca (CC BY-NC 4.0).

    Raises UserError where it cannot be loaded, or a row is no dialogue.
    """

    VERSION = 1

    def __init__(self, repo: str, split: str = "train", revision: str | None = None, limit: int | None = None):
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise UserError(
                f"data.mixture: limit={limit} of {repo} is not allowed: set it to a positive number or null."
            )
        self.repo, self.split, self.revision, self.limit = repo, split, revision, limit
        self._loaded: Any = None

    def fingerprint(self) -> str:
        """sha256 over the content of the rows: what the hub calls by a name may change."""
        content = hashlib.sha256()
        for one in self.dialogues():
            content.update(json.dumps([one.id, one.messages, one.ended]).encode())
        return hash_sources(type(self).__name__, self.VERSION, {"rows": content.hexdigest()}, {})

    def dialogues(self) -> Iterator[Dialogue]:
        """The rows in their order."""
        for number, row in enumerate(self._rows(), start=1):
            try:
                yield dialogue(row, str(number))
            except ValueError as error:
                raise UserError(
                    f"data.mixture: row {number} of {self.repo} is no dialogue ({error}): set its source to a data set "
                    "with messages, or with prompt and response, or with instruction and output."
                ) from error

    def _rows(self) -> Iterable[dict[str, Any]]:
        import datasets  # slow to import

        if self._loaded is None:
            split = self.split if self.limit is None else f"{self.split}[:{self.limit}]"
            try:
                self._loaded = datasets.load_dataset(self.repo, split=split, revision=self.revision)
            # What is raised without a network changes between versions of datasets, huggingface_hub and httpx.
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                raise UserError(
                    f"data.mixture: {self.repo} (split {self.split}) could not be loaded ({reason}): check name, split "
                    "and network, or take a local file with mixture jsonl."
                ) from error
        return self._loaded


def dialogue(record: dict[str, Any], name: str) -> Dialogue:
    """The dialogue of a record (see above). Raises ValueError with what is wrong."""
    name = str(record.get("id", name))
    if "messages" in record:
        ended = record.get("ended", True)
        if not isinstance(ended, bool):
            raise ValueError(f"'ended' must be true or false, not {json_type(ended)}")
        return Dialogue(name, _messages(record["messages"]), ended)
    for asked, answered in (("prompt", "response"), ("instruction", "output")):
        if asked in record and answered in record:
            given = record.get("input") or "" if asked == "instruction" else ""
            question, answer = _text(record[asked], asked), _text(record[answered], answered)
            return Dialogue(name, _turn(f"{question}\n\n{given}" if given else question, answer))
    if "text" in record:
        return Dialogue(name, ({"role": TEXT, "content": _text(record["text"], "text")},))
    raise ValueError(
        "needs messages, or prompt and response, or instruction and output, or text; it has "
        f"{', '.join(map(str, record)) or 'nothing'}"
    )


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("'messages' must be a list that is not empty")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise ValueError(f"message {number} must be an object with a role of {', '.join(_ROLES)}")
        messages.append({"role": message["role"], "content": _text(message.get("content"), f"message {number}")})
    spoken = [message["role"] for message in messages if message["role"] != "system"]
    if any(role == "system" for role in (one["role"] for one in messages[1:])):
        raise ValueError("only the first message may be a system message")
    if spoken != ["user" if i % 2 == 0 else "assistant" for i in range(len(spoken))]:
        raise ValueError("user and assistant must take turns, the user first")
    return tuple(messages)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"'{name}' must have a text, not {json_type(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell it, but it is no text: tokenizers refuse it
        raise ValueError(f"'{name}' holds half a surrogate pair") from None
    return value


def _turn(prompt: str, answer: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
