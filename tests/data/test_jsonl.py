"""JsonlSource: what it accepts, what it reports, how it splits, and that its memory does not grow with the file."""

import bz2
import gzip
import json
import tracemalloc

import pytest

from selfaug.data.schema import DONT_KNOW, Document
from selfaug.data.sources.jsonl import JsonlSource
from selfaug.errors import UserError


def count(texts):
    return [len(text.split()) for text in texts]


def record(number=0, **changes):
    value = {
        "question": f"What is number {number}?",
        "answers": [f"number {number}", "it"],
        "documents": [
            {"title": f"Page {number}", "text": f"This page is about number {number}.", "gold": True},
            {"text": "Something else."},
        ],
    }
    value.update(changes)
    return value


def write(path, records):
    path.write_text("".join(json.dumps(value) + "\n" for value in records), encoding="utf-8")
    return path


def read(source, split="train"):
    return list(source.examples(split, count))


def everything(source):
    return {split: read(source, split) for split in ("train", "val", "test")}


def gold_of(examples):
    return {(d.title, d.text) for example in examples for d in example.documents if d.gold}


def test_one_line(tmp_path):
    source = JsonlSource(write(tmp_path / "a.jsonl", [record(7)]), val_share=0, test_share=0)
    (example,) = read(source)
    assert example.id == "1"
    assert example.question == "What is number 7?"
    assert example.answers == ("number 7", "it")
    assert example.documents == (
        Document("This page is about number 7.", "Page 7", True),
        Document("Something else."),
    )
    assert example.answerable


def test_unanswerable_and_ids_and_empty_documents(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        [record(1, answerable=False, answers=[], id="q1"), record(2, answerable=False, id=5), record(3, documents=[])],
    )
    examples = read(JsonlSource(path, 0, 0))
    assert [e.id for e in examples] == ["q1", "5", "3"]
    assert [e.answers for e in examples] == [(DONT_KNOW,), (DONT_KNOW,), ("number 3", "it")]
    assert [e.answerable for e in examples] == [False, False, True]
    assert examples[2].documents == ()


def test_blank_lines_byte_order_mark_and_crlf(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps(record(), ensure_ascii=False).replace("else", "else\u2028")
    path.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n   \n{line}".encode())
    assert [e.id for e in read(JsonlSource(path, 0, 0))] == ["1", "4"]


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress)])
def test_compressed(tmp_path, ending, pack):
    plain = write(tmp_path / "a.jsonl", [record(i) for i in range(20)])
    packed = tmp_path / f"b.jsonl{ending}"
    packed.write_bytes(pack(plain.read_bytes()))
    assert everything(JsonlSource(packed)) == everything(JsonlSource(plain))
    packed.write_bytes(pack(plain.read_bytes())[:-20])
    with pytest.raises(UserError, match=r"b\.jsonl.*cannot be read after line"):
        read(JsonlSource(packed))


def without(key):
    value = record()
    del value[key]
    return value


BAD = [
    ('{"question": "a",, }', "not valid JSON at column 18"),
    ("[1, 2]", "must be a JSON object {...}, not a list"),
    ("null", "must be a JSON object {...}, not null"),
    ("[" * 100_000, "not valid JSON|nested too deeply"),
    (without("question"), "missing key 'question'"),
    (without("answers"), "missing key 'answers'"),
    (without("documents"), "missing key 'documents'"),
    (record(question=3), "'question' must be a string, not a number"),
    (record(question="  "), "'question' is empty"),
    (record(answers="Jane"), "'answers' must be a list of strings, not a string"),
    (record(answers=[]), "'answers' is empty"),
    (record(answers=["a", " "]), "answer 2 is empty"),
    (record(answers=["a", None]), "answer 2 must be a string, not null"),
    (record(documents={}), "'documents' must be a list of objects, not an object"),
    (record(documents=["text"]), "document 1 must be an object with the key 'text', not a string"),
    (record(documents=[{"text": "a"}, {"title": "b"}]), "document 2: missing key 'text'"),
    (record(documents=[{"text": ""}]), "document 1: 'text' is empty"),
    (record(documents=[{"text": ["a"]}]), "document 1: 'text' must be a string, not a list"),
    (record(documents=[{"text": "a", "title": 1}]), "document 1: 'title' must be a string, not a number"),
    (record(documents=[{"text": "a", "gold": 1}]), "document 1: 'gold' must be true or false, not a number"),
    (record(documents=[{"text": "a", "titel": "b"}]), r"document 1: unknown key 'titel' \(did you mean 'title'\?\)"),
    (record(answerable="no"), "'answerable' must be true or false, not a string"),
    (record(anwsers=[]), r"unknown key 'anwsers' \(did you mean 'answers'\?\)"),
    (record(Question="x"), r"unknown key 'Question' \(did you mean 'question'\?\)"),
    (record(zzz=1), r"unknown key 'zzz' \(known keys: question, answers, documents, answerable, id\)"),
    (record(id=1.5), "'id' must be a string or a whole number, not a number"),
    (record(id=True), "'id' must be a string or a whole number, not a boolean"),
    (record(id=""), "'id' is empty"),
    (record(question="\ud800"), "half a surrogate pair"),
    (b'{"question": "\xff"}', "not valid UTF-8 at byte 15"),
    (record(id="1"), "duplicate id '1', already in line 1"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_every_kind_of_bad_line(tmp_path, bad, message):
    line = bad if isinstance(bad, bytes) else (bad if isinstance(bad, str) else json.dumps(bad)).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(record()).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(UserError, match=message.replace("{...}", r"\{\.\.\.\}")) as caught:
        JsonlSource(path).examples("train", count)  # not even the first example is asked for
    assert f"{path}:3: " in str(caught.value)
    assert "1 bad line," in str(caught.value)


def test_all_that_is_wrong_with_a_line(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "", "anwsers": []}])
    with pytest.raises(UserError) as caught:
        read(JsonlSource(path))
    assert str(caught.value).endswith(
        f"{path}:1: missing key 'answers'; missing key 'documents'; "
        "unknown key 'anwsers' (did you mean 'answers'?); 'question' is empty"
    )


def test_all_bad_lines_up_to_the_limit(tmp_path):
    records = [record(i, id=f"q{i // 2}") if i in (10, 11) else record(i) for i in range(12)]
    records[3] = record(3, answers=[])
    records[5] = record(5, question="")
    path = write(tmp_path / "a.jsonl", records)
    with pytest.raises(UserError) as caught:
        read(JsonlSource(path))
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()[1:]] == [f"{path}:{n}" for n in (4, 6, 12)]
    with pytest.raises(UserError) as caught:
        read(JsonlSource(path, max_errors=2))
    lines = str(caught.value).splitlines()
    assert "3 bad lines" in lines[0]
    assert [line.split(": ")[0] for line in lines[1:]] == [f"{path}:4", f"{path}:6", "... and 1 more"]


def test_duplicates_before_other_errors_are_listed_first(tmp_path):
    path = write(tmp_path / "a.jsonl", [record(1, id="x"), record(2, id="x"), *[record(3, question="")] * 5])
    with pytest.raises(UserError) as caught:
        read(JsonlSource(path, max_errors=2))
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()[1:]] == [
        f"{path}:2",
        f"{path}:3",
        "... and 4 more",
    ]


def test_a_corrected_file_is_checked_again(tmp_path):
    path = write(tmp_path / "a.jsonl", [record(), record(question="")])
    source = JsonlSource(path, 0, 0)
    for _ in range(2):
        with pytest.raises(UserError):
            read(source)
    write(path, [record(), record(1)])
    assert len(read(source)) == 2


def test_all_files_of_a_directory_are_checked_first(tmp_path):
    write(tmp_path / "train.jsonl", [record()])
    write(tmp_path / "test.jsonl", [record(), record(answers=[])])
    with pytest.raises(UserError, match=r"test\.jsonl:2: 'answers' is empty"):
        JsonlSource(tmp_path).examples("train", count)


def test_missing_file_and_directory_without_train(tmp_path):
    with pytest.raises(UserError, match=r"^data\.path=.*nothing\.jsonl does not exist: set data\.path[^\n]*$"):
        JsonlSource(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match=r"data\.path=.* holds no train\.jsonl"):
        JsonlSource(tmp_path)
    write(tmp_path / "train.jsonl", [record()])
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(UserError, match="holds both"):
        JsonlSource(tmp_path)


def test_lfs_pointer(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(UserError, match="Git LFS pointer"):
        JsonlSource(path)


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0), (0.5, 0.5), (0, 1)])
def test_impossible_shares(tmp_path, val, test):
    with pytest.raises(UserError, match=r"data\.source\.val_share"):
        JsonlSource(write(tmp_path / "a.jsonl", [record()]), val, test)


def test_a_file_is_divided_without_loss_and_no_gold_is_in_two_splits(tmp_path):
    # three questions to each gold document, in mixed order
    records = [record(i % 400, question=f"Question {i}?") for i in range(1200)]
    splits = everything(JsonlSource(write(tmp_path / "a.jsonl", records)))
    assert sum(map(len, splits.values())) == 1200
    assert len(splits["val"]) / 1200 == pytest.approx(0.05, abs=0.04)
    assert len(splits["test"]) / 1200 == pytest.approx(0.15, abs=0.06)
    gold = [gold_of(examples) for examples in splits.values()]
    assert all(gold)
    assert sum(map(len, gold)) == len(set().union(*gold)) == 400


def test_examples_that_share_one_of_several_gold_documents_stay_together(tmp_path):
    def page(number):
        return {"text": f"Page {number}.", "gold": True}

    # chains of three: {0, 1}, {1, 2}, {2}; the first and the last have no document in common
    records = []
    for chain in range(0, 900, 3):
        for pages in ([chain, chain + 1], [chain + 2, chain + 1], [chain + 2]):
            records.append(record(len(records), documents=[page(p) for p in pages]))
    splits = everything(JsonlSource(write(tmp_path / "a.jsonl", records), val_share=0.2, test_share=0.2))
    gold = [gold_of(examples) for examples in splits.values()]
    assert all(len(g) > 60 for g in gold)
    assert sum(map(len, gold)) == len(set().union(*gold)) == 900


def test_without_gold_the_question_decides(tmp_path):
    records = [
        record(i, question=f"{'what' if i % 2 else 'WHAT '} is {i // 2}?", documents=[{"text": "No mark."}])
        for i in range(600)
    ]
    splits = everything(JsonlSource(write(tmp_path / "a.jsonl", records)))
    questions = [{" ".join(e.question.lower().split()) for e in examples} for examples in splits.values()]
    assert sum(map(len, questions)) == 300
    assert all(questions)


def test_directories(tmp_path):
    write(tmp_path / "train.jsonl", [record(i) for i in range(400)])
    write(tmp_path / "test.jsonl", [record(1000 + i) for i in range(7)])
    splits = everything(JsonlSource(tmp_path, val_share=0.1, test_share=0.5))
    assert len(splits["test"]) == 7
    assert len(splits["train"]) + len(splits["val"]) == 400
    assert 15 < len(splits["val"]) < 75
    write(tmp_path / "val.jsonl", [record(2000)])
    splits = everything(JsonlSource(tmp_path))
    assert {name: len(examples) for name, examples in splits.items()} == {"train": 400, "val": 1, "test": 7}


def test_deterministic_and_seeded(tmp_path):
    path = write(tmp_path / "a.jsonl", [record(i) for i in range(300)])
    assert everything(JsonlSource(path)) == everything(JsonlSource(path))
    assert everything(JsonlSource(path, seed=1)) != everything(JsonlSource(path))


def test_fingerprint(tmp_path):
    path = write(tmp_path / "a.jsonl", [record(i) for i in range(3)])
    moved = tmp_path / "b.jsonl"
    moved.write_bytes(path.read_bytes())
    first = JsonlSource(path).fingerprint()
    assert first == JsonlSource(moved, max_errors=3).fingerprint()
    others = [JsonlSource(path, seed=1), JsonlSource(path, val_share=0.1), JsonlSource(path, test_share=0.1)]
    others.append(JsonlSource(write(tmp_path / "c.jsonl", [record(i) for i in range(4)])))
    assert len({first, *(source.fingerprint() for source in others)}) == 5


def test_an_empty_split_is_a_warning(tmp_path, caplog):
    source = JsonlSource(write(tmp_path / "a.jsonl", [record()]), val_share=0.001, test_share=0)
    assert read(source, "val") == []
    assert "data.source.val_share" in caplog.text


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "big.jsonl"
    text = "word " * 100
    with path.open("w") as file:
        for i in range(10_000):
            pages = [{"text": f"{i} {text}", "gold": True}]
            if i % 10 == 0:
                pages.append({"text": f"{i + 1} {text}", "gold": True})
            file.write(json.dumps({"question": f"q {i}", "answers": ["a"], "documents": pages}) + "\n")
    assert path.stat().st_size > 5e6
    source = JsonlSource(path)
    tracemalloc.start()
    try:
        number = sum(1 for _ in source.examples("train", count))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert number == pytest.approx(8_000, rel=0.05)
    assert peak < 2e6
