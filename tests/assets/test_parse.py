"""Parsing: the raw files of the archives become clean JSON lines."""

import json

from selfaug.assets import parse
from tests.assets.helpers import arrow, lines, refused, requests


def test_squad_is_parsed_and_checked(tmp_path):
    doc = {
        "id": "1",
        "query": "Title: Big_Ben\nBackground: It is\na tall clock.\nQuestion: What is it?\nAnswer:",
        "answers_text": ["a tall clock", "clock", "clock"],
    }
    assert parse.squad(requests(tmp_path, doc), tmp_path) == 1
    assert lines(tmp_path / "squad.jsonl") == [
        {
            "id": "1",
            "title": "Big Ben",
            "question": "What is it?",
            "answers": ["a tall clock", "clock"],
            "paragraph": "It is\na tall clock.",
        }
    ]
    refused(lambda: parse.squad(requests(tmp_path, doc | {"answers_text": ["a dog"]}), tmp_path), "answer to 1")
    refused(lambda: parse.squad(requests(tmp_path, doc | {"query": "Who?"}), tmp_path), "known format")


def test_drop_joins_the_spans_of_an_answer(tmp_path):
    doc = {"query_id": "q", "question": "Who?", "passage": "Ann and Bob.", "answers": [["Ann", "Bob"], ["Ann", "Bob"]]}
    parse.drop(requests(tmp_path, doc), tmp_path)
    assert lines(tmp_path / "drop.jsonl")[0]["answers"] == ["Ann, Bob"]


def test_boolq_answers_are_yes_and_no(tmp_path):
    rows = [{"question": "is it", "answer": flag, "passage": "It is."} for flag in (True, False)]
    assert parse.boolq(arrow(tmp_path, rows), tmp_path) == 2
    assert [row["answers"] for row in lines(tmp_path / "boolq.jsonl")] == [["yes"], ["no"]]


def test_triviaqa_has_the_canonical_answer_first(tmp_path):
    row = {"question_id": "t", "question": "Who?", "answer": {"value": "Jane Austen", "aliases": ["Austen"]}}
    parse.triviaqa(arrow(tmp_path, [row]), tmp_path)
    assert lines(tmp_path / "triviaqa.jsonl")[0]["answers"] == ["Jane Austen", "Austen"]


def test_wikipedia_articles_get_their_paragraphs_back(tmp_path):
    raw = tmp_path / "wiki.txt"
    raw.write_text('The U.S.Army is old.It is "big".See (it).End\nSecond article.\n\n', encoding="utf-8")
    assert parse.wikipedia_articles(raw, tmp_path) == 2
    first = lines(tmp_path / "articles.jsonl")[0]
    assert first["text"] == 'The U.S.Army is old.\n\nIt is "big".\n\nSee (it).\n\nEnd'


def test_json_files(tmp_path):
    raw = tmp_path / "in.json"
    raw.write_text(json.dumps([{"instruction": "Say", "input": "", "output": "é", "system": "x"}]), encoding="utf-8")
    assert parse.alpaca(raw, tmp_path) == 1
    assert lines(tmp_path / "alpaca.jsonl") == [{"id": "alpaca-0", "instruction": "Say", "input": "", "output": "é"}]
    raw.write_text(json.dumps({"A": {"title": "A", "extract": " Text. ", "topic": "Arts"}}), encoding="utf-8")
    assert parse.wikipedia_leads(raw, tmp_path) == 1
    assert lines(tmp_path / "leads.jsonl") == [{"id": "lead-00000", "title": "A", "text": "Text."}]
