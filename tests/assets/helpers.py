"""Shared by the tests of the assets: raw files as the archives hold them, and one-sentence refusals."""

import gzip
import json

import pyarrow as pa
import pytest

from selfaug.errors import UserError


def refused(call, *fragments):
    """The call raises a UserError of one sentence that holds the fragments."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    return message


def requests(folder, *docs):
    """An OLMo evaluation file of these docs."""
    path = folder / "requests.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"doc": doc}) + "\n" for doc in docs).encode()))
    return path


def arrow(folder, rows):
    """An Arrow stream file of these rows."""
    path = folder / "data.arrow"
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def lines(path):
    """The records of a JSON-lines file."""
    # Not splitlines: it would also split at the other line separators of Unicode, which stand inside some texts.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
