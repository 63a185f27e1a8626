"""Dialogues from files, from the packaged sample and from data sets."""

import gzip
import json
import re
from pathlib import Path

import pytest
import yaml

import selfaug.conf
from selfaug.data import packaged
from selfaug.data.packaged import MEASURED
from selfaug.data.sources.dialogues import HubDialogues, JsonlDialogues, PackagedInstructions, dialogue
from selfaug.errors import UserError

TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The cat."}]


def written(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TURNS},
        {"prompt": "Who?", "response": "The cat."},
        {"instruction": "Who?", "input": "", "output": "The cat."},
        {"instruction": "Who?", "output": "The cat."},
    ],
)
def test_records_of_every_kind(record):
    found = dialogue(record, "7")
    assert (found.id, list(found.messages), found.ended) == ("7", TURNS, True)
    assert dialogue({**record, "id": "x"}, "7").id == "x"


def test_input_text_and_cut_answers():
    assert dialogue({"instruction": "Add", "input": "1, 2", "output": "3"}, "1").messages[0]["content"] == "Add\n\n1, 2"
    assert dialogue({"text": "A text."}, "1").messages == ({"role": "text", "content": "A text."},)
    assert not dialogue({"messages": TURNS, "ended": False}, "1").ended
    assert dialogue({"messages": [{"role": "system", "content": "s"}, *TURNS]}, "1").messages[0]["role"] == "system"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "Who?"}, "needs messages, or prompt and response"),
        ({"messages": []}, "'messages' must be a list that is not empty"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "message 1 must be an object with a role of system"),
        ({"messages": TURNS[::-1]}, "user and assistant must take turns, the user first"),
        ({"messages": [*TURNS, {"role": "system", "content": "s"}]}, "only the first message may be a system message"),
        ({"messages": [{"role": "user", "content": 3}]}, "'message 1' must have a text, not a number"),
        ({"messages": TURNS, "ended": 1}, "'ended' must be true or false"),
        ({"text": "\ud800"}, "half a surrogate pair"),
    ],
)
def test_bad_lines_are_named(tmp_path, record, message):
    path = written(tmp_path / "d.jsonl", [{"messages": TURNS}, record])
    with pytest.raises(UserError, match=re.escape(f"{path}:2: ") + ".*" + re.escape(message)):
        list(JsonlDialogues(path).dialogues())


def test_jsonl(tmp_path):
    path = written(tmp_path / "d.jsonl", [{"messages": TURNS}, {"prompt": "a", "response": "b"}])
    source = JsonlDialogues(path)
    assert [one.id for one in source.dialogues()] == ["1", "2"]
    packed = tmp_path / "d.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert list(JsonlDialogues(packed).dialogues()) == list(source.dialogues())
    before = source.fingerprint()
    written(path, [{"messages": TURNS}])
    assert source.fingerprint() != before
    with pytest.raises(UserError, match=r"data.mixture: .* does not exist: set the path"):
        JsonlDialogues(tmp_path / "none.jsonl")


@pytest.mark.parametrize("kind", ["ultrachat", "alpaca"])
def test_data_sets(tmp_path, monkeypatch, kind):
    """As the hub has them, from a folder."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    rows = {
        "ultrachat": [{"prompt": f"Who {i}?", "prompt_id": str(i), "messages": TURNS * 2} for i in range(5)],
        "alpaca": [{"instruction": f"Say {i}", "input": "", "output": "x", "text": "all of it"} for i in range(5)],
    }[kind]
    (tmp_path / kind).mkdir()
    written(tmp_path / kind / "train.jsonl", rows)
    source = HubDialogues(str(tmp_path / kind), split="train", limit=3)
    found = list(source.dialogues())
    assert len(found) == 3
    assert len(found[0].messages) == (4 if kind == "ultrachat" else 2)
    assert found[1].messages[0]["content"] == ("Who?" if kind == "ultrachat" else "Say 1")
    whole = HubDialogues(str(tmp_path / kind))
    assert len(list(whole.dialogues())) == 5
    assert source.fingerprint() == HubDialogues(str(tmp_path / kind), limit=3).fingerprint() != whole.fingerprint()
    with pytest.raises(UserError, match=r"split nowhere\) could not be loaded"):
        list(HubDialogues(str(tmp_path / kind), split="nowhere").dialogues())
    with pytest.raises(UserError, match="limit=0"):
        HubDialogues("a/b", limit=0)


def test_rows_that_are_no_dialogues(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "set").mkdir()
    written(tmp_path / "set" / "train.jsonl", [{"question": "Who?"}])
    with pytest.raises(UserError, match=r"row 1 of .* is no dialogue"):
        list(HubDialogues(str(tmp_path / "set")).dialogues())


def test_what_is_measured_on_is_not_replayed(monkeypatch):
    everything = [(f"q{i}", f"a{i}") for i in range(30)]

    def drawn(limit=None, seed=0):
        assert limit is None or seed == 0
        return everything if limit is None else everything[:: max(30 // limit, 1)][:limit]

    monkeypatch.setattr(packaged, "instruction_answers", drawn)
    monkeypatch.setattr(packaged, "MEASURED", (3, 5))
    left = [one.messages[0]["content"] for one in PackagedInstructions().dialogues()]
    assert left == [f"q{i}" for i in range(30) if i not in {0, 10, 20, 6, 12, 18, 24}]


def test_every_shipped_evaluation_is_thought_of():
    asked = set()
    for file in Path(selfaug.conf.__file__).parent.rglob("*.yaml"):
        content = yaml.safe_load(file.read_text()) or {}
        probe = content.get("retention_probe") or {}
        if isinstance(probe, dict) and "documents" in probe:
            asked.add(probe["documents"])
        for part in (content, content.get("evaluation") or {}):
            style, drift = part.get("style") or {}, part.get("drift") or {}
            asked |= {style.get("prompts"), ((drift.get("corpora") or {}).get("dialogues") or {}).get("limit")}
    assert {24, 200} <= asked - {None} <= set(MEASURED)


@pytest.mark.assets
def test_packaged_instructions():
    found = list(PackagedInstructions().dialogues())
    assert 500 < len(found) < 999
    assert len({one.id for one in found}) == len(found)
