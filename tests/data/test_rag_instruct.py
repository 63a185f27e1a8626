"""RagInstructSource on local files in the hub file's format, and on a hub that is stubbed or out of reach."""

import gzip
import json

import datasets
import pytest

from selfaug.data.sources import rag_instruct
from selfaug.data.sources.rag_instruct import RagInstructSource
from selfaug.errors import UserError

SPLITS = ("train", "val", "test")


def count(texts):
    return [len(text.split()) for text in texts]


def record(number=0, **changes):
    value = {
        "question": f"Question {number}?",
        "answer": f"A long answer {number}. With, [brackets] and {{braces}}.",
        "documents": [f"Passage {number}.{place} é" for place in range(10)],
    }
    value.update(changes)
    return value


def write(path, records, indent=None):
    if path.name.endswith(".jsonl"):
        text = "".join(json.dumps(value) + "\n" for value in records)
    else:
        text = json.dumps(records, indent=indent, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    return path


def everything(source):
    return {split: list(source.examples(split, count)) for split in SPLITS}


def test_one_record(tmp_path):
    (example,) = everything(RagInstructSource(write(tmp_path / "a.json", [record(3)]), val_share=0, test_share=0))[
        "train"
    ]
    assert example.id == "1"
    assert example.question == "Question 3?"
    assert example.answers == ("A long answer 3. With, [brackets] and {braces}.",)
    assert [d.text for d in example.documents] == [f"Passage 3.{place} é" for place in range(10)]
    assert not any(d.gold or d.title for d in example.documents)
    assert example.answerable


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("piece", [1, 37, 1 << 20])
def test_list_and_lines_give_the_same(tmp_path, monkeypatch, indent, piece):
    records = [record(i) for i in range(8)]
    lines = everything(RagInstructSource(write(tmp_path / "a.jsonl", records)))
    monkeypatch.setattr(rag_instruct, "_PIECE", piece)
    listed = write(tmp_path / "a.json", records, indent)
    assert everything(RagInstructSource(listed)) == lines
    packed = tmp_path / "b.json.gz"
    packed.write_bytes(gzip.compress(listed.read_bytes()))
    assert everything(RagInstructSource(packed)) == lines


def test_splits(tmp_path):
    records = [record(i % 500, documents=[f"d{i}"]) for i in range(1000)]  # each question twice
    splits = everything(RagInstructSource(write(tmp_path / "a.json", records), val_share=0.1, test_share=0.2))
    questions = [{e.question for e in examples} for examples in splits.values()]
    assert sum(map(len, splits.values())) == 1000
    assert sum(map(len, questions)) == 500
    assert len(questions[1]) == pytest.approx(50, abs=20)
    assert len(questions[2]) == pytest.approx(100, abs=30)


def test_deterministic_and_fingerprint(tmp_path):
    path = write(tmp_path / "a.json", [record(i) for i in range(100)])
    assert everything(RagInstructSource(path)) == everything(RagInstructSource(path))
    changes = [{}, {"seed": 1}, {"val_share": 0.2}, {"test_share": 0.2}]
    assert len({RagInstructSource(path, **change).fingerprint() for change in changes}) == len(changes)
    assert RagInstructSource(path).fingerprint() == RagInstructSource(path).fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": ""}, "'answer' must be a string with some text"),
        ({"question": 3}, "'question' must be a string with some text"),
        ({"documents": "one"}, "'documents' must be a list of strings"),
        ({"documents": [{"text": "x"}]}, "'documents' must be a list of strings"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_bad_records(tmp_path, name, change, message):
    path = write(tmp_path / name, [record(), record(1, **change)])
    with pytest.raises(UserError, match=rf"{name}:2: {message}"):
        everything(RagInstructSource(path))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"question": 1}', r"must be a JSON list \[\.\.\.\]"),
        ("a.json", "", r"must be a JSON list"),
        ("a.json", '[{"question": ', r"a\.json:1: not valid JSON"),
        ("a.json", "[3]", r"a\.json:1: must be a JSON object, not a number"),
        ("a.json", '[{"instruction": "x", "output": "y"}]', "missing key 'question'; it has: instruction, output"),
        ("a.jsonl", "\n{]", r"a\.jsonl:2: not valid JSON at column 2"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        everything(RagInstructSource(path))


def test_invalid_utf8(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"question": "\xff"}]')
    with pytest.raises(UserError, match="cannot be read after record 0"):
        everything(RagInstructSource(path))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"does not exist: download rag_instruct\.json .* set data\.path=[^\n]*$"):
        RagInstructSource(tmp_path / "none.json")


def test_hub(tmp_path, monkeypatch):
    asked = []
    records = [record(i) for i in range(20)]

    def load_dataset(repo, split):
        asked.append((repo, split))
        return datasets.Dataset.from_list(records)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = RagInstructSource()
    assert everything(source) == everything(RagInstructSource(write(tmp_path / "a.json", records)))
    assert set(asked) == {("FreedomIntelligence/RAG-Instruct", "train")}
    first = source.fingerprint()
    assert first == RagInstructSource().fingerprint() != RagInstructSource(seed=1).fingerprint()
    records[3]["answer"] = "another"
    assert RagInstructSource().fingerprint() != first


def test_hub_without_network(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route to host\nand a second line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for use in (lambda: RagInstructSource().fingerprint(), lambda: everything(RagInstructSource())):
        with pytest.raises(UserError, match=r"could not be loaded from the hub .*set data\.path=") as caught:
            use()
        assert "\n" not in str(caught.value)
        assert "no route to host" in str(caught.value)
