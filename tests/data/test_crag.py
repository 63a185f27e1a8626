"""CragSource on files made here in CRAG's original format."""

import bz2
import json

import pytest

from selfaug.data.schema import DONT_KNOW
from selfaug.data.sources.crag import CragSource, html_to_text, split_chunks
from selfaug.errors import UserError

PAGE = """<!DOCTYPE html><html><head><title>Gunnery</title><style>.x {color: red}</style>
<script>var hidden = "naval gunnery record";</script></head>
<body><nav>Home | About</nav><header>Site header</header>
<h1>Naval gunnery</h1><p>The record distance in naval gunnery is <b>24</b> kilometres. It was set in 1940.</p>
<div>Water is H<sub>2</sub>O.<br>New line.<script>alert("gunnery")</script></div>
<form>Subscribe</form><aside>Advert</aside><footer>Imprint</footer></body></html>"""


def count(texts):
    return [len(text.split()) for text in texts]


def page(html=PAGE, name="Gunnery page", snippet=""):
    return {
        "page_name": name,
        "page_url": "https://example.org/a",
        "page_snippet": snippet,
        "page_result": html,
        "page_last_modified": "Tue, 05 Mar 2024 19:50:08 GMT",
    }


def record(number=0, **changes):
    value = {
        "interaction_id": f"id-{number}",
        "query_time": "03/05/2024, 23:18:31 PT",
        "domain": "open",
        "question_type": "simple",
        "static_or_dynamic": "static",
        "query": f"what is record {number} in naval gunnery?",
        "answer": "24 km",
        "alt_ans": ["24 kilometres", "24 km"],
        "split": 0,
        "search_results": [page(), page("<p>Cats sleep all day.</p>", "Cats")],
    }
    value.update(changes)
    return value


def write(path, records):
    path.write_bytes(bz2.compress("".join(json.dumps(value) + "\n" for value in records).encode()))
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "crag_task_1_and_2_dev_v4.jsonl.bz2"


def read(source, split="train"):
    return list(source.examples(split, count))


def test_one_question(file):
    (example,) = read(CragSource(write(file, [record(1)]), val_share=0))
    assert example.id == "id-1"
    assert example.question == "what is record 1 in naval gunnery?"
    assert example.answers == ("24 km", "24 kilometres")
    assert example.answerable
    assert [d.title for d in example.documents] == ["Gunnery page", "Cats"]
    assert not any(d.gold for d in example.documents)
    assert "record distance in naval gunnery is 24 kilometres. It was set in 1940." in example.documents[0].text


def test_html_to_text():
    text = html_to_text(PAGE)
    assert text.splitlines() == [
        "Naval gunnery",
        "The record distance in naval gunnery is 24 kilometres. It was set in 1940.",
        "Water is H2O.",
        "New line.",
    ]


@pytest.mark.parametrize("html", ["", "  ", "<!-- only -->", "<script>x</script>"])
def test_html_without_text(html):
    assert html_to_text(html) == ""


def test_broken_and_nested_html():
    assert html_to_text("<p>one<p>two</div></b><li>three") == "one\ntwo\nthree"
    assert html_to_text("<nav><div><nav>menu</nav></div></nav><p>text</p>") == "text"
    assert html_to_text("<div>" * 3000 + "deep") in ("deep", "")
    assert html_to_text("https://example.org/just-an-address") == "https://example.org/just-an-address"


def test_chunks():
    assert list(split_chunks("One two. Three four five! Six?\nSeven.", 4)) == [
        "One two.",
        "Three four five! Six?",
        "Seven.",
    ]
    assert list(split_chunks("a b c d e. f", 2)) == ["a b", "c d", "e. f"]
    assert list(split_chunks("", 5)) == []


def test_chunk_size_and_number_of_documents(file):
    sentences = " ".join(f"Sentence {i} has some words about gunnery." for i in range(200))
    source = CragSource(write(file, [record(search_results=[page(f"<p>{sentences}</p>")])]), 20, 4, val_share=0)
    (example,) = read(source)
    assert len(example.documents) == 4
    assert all(10 <= length <= 20 for length in count([d.text for d in example.documents]))


def test_repeated_pages_give_their_text_once(file):
    (example,) = read(CragSource(write(file, [record(search_results=[page()] * 5)]), val_share=0))
    assert len(example.documents) == 1


def test_empty_page_gives_its_snippet(file):
    pages = [page("", snippet="A <b>bold</b> snippet."), page(None), {}]
    (example,) = read(CragSource(write(file, [record(search_results=pages)]), val_share=0))
    assert [d.text for d in example.documents] == ["A bold snippet."]
    (example,) = read(CragSource(write(file, [record(search_results=[])]), val_share=0))
    assert example.documents == ()


def test_answers(file):
    records = [
        record(0, answer="invalid question", alt_ans=[]),
        record(1, answer="I don’t know.", alt_ans=None),
        record(2, answer="i don't know", alt_ans=[]),
        record(3, answer=42, alt_ans=["forty-two"]),
    ]
    examples = read(CragSource(write(file, records), val_share=0))
    assert [e.answers for e in examples] == [
        ("invalid question",),
        (DONT_KNOW,),
        (DONT_KNOW,),
        ("42", "forty-two"),
    ]
    assert [e.answerable for e in examples] == [True, False, False, True]


def test_split_mapping(file):
    source = CragSource(write(file, [record(i, split=i % 2, search_results=[]) for i in range(600)]))
    splits = {split: {e.id for e in read(source, split)} for split in ("train", "val", "test")}
    assert splits["test"] == {f"id-{i}" for i in range(1, 600, 2)}
    assert splits["train"] | splits["val"] == {f"id-{i}" for i in range(0, 600, 2)}
    assert not splits["train"] & splits["val"]
    assert len(splits["val"]) == pytest.approx(30, abs=15)
    assert read(CragSource(file, val_share=0), "val") == []


def test_deterministic_and_fingerprint(file):
    write(file, [record(i) for i in range(30)])
    assert read(CragSource(file)) == read(CragSource(file))
    changes = [{}, {"seed": 1}, {"chunk_words": 5}, {"top_k": 1}, {"val_share": 0.2}]
    assert len({CragSource(file, **change).fingerprint() for change in changes}) == len(changes)
    assert CragSource(file).fingerprint() == CragSource(file).fingerprint()


def test_unpacked_file(file):
    write(file, [record(1)])
    plain = file.with_suffix("")
    plain.write_bytes(bz2.decompress(file.read_bytes()))
    assert read(CragSource(plain)) == read(CragSource(file))


def test_missing_file_says_what_to_download(tmp_path):
    for path in (tmp_path / "none.bz2", None, ""):
        with pytest.raises(UserError, match=r"crag_task_1_and_2_dev_v4\.jsonl\.bz2 .*set data\.path") as caught:
            CragSource(path)
        assert "\n" not in str(caught.value)


def test_lfs_pointer(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:afa29f2b\nsize 739384484\n")
    with pytest.raises(UserError, match=r"is a Git LFS pointer.*git lfs pull.*data\.path"):
        CragSource(file)


def test_not_compressed_data(file):
    file.write_bytes(b"not bzip2 at all")
    with pytest.raises(UserError, match="cannot be read after line 0"):
        read(CragSource(file))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": 2}, "'split' must be 0"),
        ({"query": " "}, "'query' must be"),
        ({"answer": None}, "'answer' is empty"),
        ({"alt_ans": "x"}, "'alt_ans' must be a list, not a string"),
        ({"search_results": None}, "'search_results' must be"),
    ],
)
def test_bad_lines(file, change, message):
    write(file, [record(0), record(1, **change)])
    with pytest.raises(UserError, match=rf"\.bz2:2: {message}"):
        read(CragSource(file))


def test_another_file(file):
    write(file, [{"question": "x"}])
    with pytest.raises(UserError, match="bz2:1: missing key 'interaction_id'"):
        read(CragSource(file))


def test_bad_settings(file):
    write(file, [record()])
    with pytest.raises(UserError, match=r"data\.top_k=0"):
        CragSource(file, top_k=0)
    with pytest.raises(UserError, match=r"data\.source\.val_share"):
        CragSource(file, val_share=1)
