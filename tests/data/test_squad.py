"""SquadSource on a small collection made here: splits, distractors, withheld gold paragraphs, context lengths."""

import json
import random
import sys
import types

import pytest

from selfaug.data.schema import DONT_KNOW
from selfaug.data.sources.squad import SquadSource
from selfaug.data.text import document_text, normalise_answer
from selfaug.errors import UserError

SPLITS = ("train", "val", "test")
WORDS = [a + b for a in ("ba", "ke", "li", "mo", "nu", "pra") for b in ("dor", "fin", "gus", "hal", "jet", "zum")]


def count(texts):
    return [len(text.split()) for text in texts]


def write(path, records):
    path.write_text("".join(json.dumps(value) + "\n" for value in records), encoding="utf-8")
    return path


@pytest.fixture
def squad(tmp_path):
    """40 titles, 3 paragraphs each, 2 questions to a paragraph; answers differ between paragraphs."""
    rng = random.Random(0)
    records = []
    for title in range(40):
        for place in range(3):
            answer = f"Answer {title}x{place}"
            filler = " ".join(rng.choices(WORDS, k=rng.randint(10, 60)))
            paragraph = f"Topic{title} part {place}: {filler}. The {answer}, of course."
            for number in range(2):
                records.append(
                    {
                        "id": f"{title}-{place}-{number}",
                        "title": f"Topic_{title}",
                        "question": f"What is said {number} about topic{title} {filler[:20]}?",
                        "answers": [answer, answer, f"the {answer}"],
                        "paragraph": paragraph,
                    }
                )
    return write(tmp_path / "squad.jsonl", records)


@pytest.fixture
def leads(tmp_path):
    rng = random.Random(1)
    records = [
        {"id": str(i), "title": f"Lead {i}", "text": f"Lead {i}: " + " ".join(rng.choices(WORDS, k=20))}
        for i in range(300)
    ]
    records += [{"id": f"s{i}", "title": f"topic {i}", "text": f"Lead of topic {i}."} for i in range(40)]
    return write(tmp_path / "leads.jsonl", records)


def everything(source):
    return {split: list(source.examples(split, count)) for split in SPLITS}


def texts_of(examples):
    return {document.text for example in examples for document in example.documents}


def assert_disjoint(sets):
    assert all(sets)
    assert sum(map(len, sets)) == len(set().union(*sets))


def test_each_question_is_in_one_split_near_the_shares(squad):
    splits = everything(SquadSource(squad))
    assert sum(map(len, splits.values())) == len({e.id for examples in splits.values() for e in examples}) == 240
    assert len(splits["val"]) == pytest.approx(24, abs=6)
    assert len(splits["test"]) == pytest.approx(48, abs=6)


def test_no_paragraph_is_in_two_splits(squad):
    splits = everything(SquadSource(squad, context_tokens=1000))
    assert_disjoint([texts_of(examples) for examples in splits.values()])


def test_a_paragraph_under_two_titles_is_in_one_split(squad):
    records = [json.loads(line) for line in squad.read_text().splitlines()]
    records += [{**record, "id": f"again-{record['id']}", "title": "Other"} for record in records[::5]]
    write(squad, records)
    for seed in range(3):
        splits = everything(SquadSource(squad, unanswerable_share=0, seed=seed))
        assert_disjoint([{d.text for e in s for d in e.documents if d.gold} for s in splits.values()])


def test_leads_are_divided_too(squad, leads):
    splits = everything(SquadSource(squad, context_tokens=3000, distractors="split+leads", leads_path=leads))
    assert_disjoint([texts_of(examples) for examples in splits.values()])
    for examples in splits.values():
        topics = {d.title for e in examples for d in e.documents if d.gold}
        own = {d.title.capitalize() for e in examples for d in e.documents if d.text.startswith("Lead of topic")}
        assert own
        assert own <= topics


def test_answerable_examples(squad):
    for example in everything(SquadSource(squad, unanswerable_share=0))["train"]:
        gold = [d for d in example.documents if d.gold]
        assert len(gold) == 1
        assert normalise_answer(example.answers[0]) in normalise_answer(gold[0].text)
        assert sum(d.text == gold[0].text for d in example.documents) == 1  # the gold is never its own distractor
        assert len(set(example.documents)) == len(example.documents)
        assert example.answerable
        assert len(example.answers) == 2  # the repeated one is gone
        assert example.answers[0].startswith("Answer")
        assert gold[0].title == example.id.split("-")[0].join(["Topic ", ""])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_unanswerable_share_and_its_gold_is_absent(squad, share):
    paragraphs = {}
    answers = {}
    for line in squad.read_text().splitlines():
        record = json.loads(line)
        paragraphs[record["id"]] = record["paragraph"]
        answers[record["id"]] = record["answers"]
    for examples in everything(SquadSource(squad, context_tokens=300, unanswerable_share=share)).values():
        unanswerable = [e for e in examples if not e.answerable]
        assert len(unanswerable) == round(share * len(examples))
        for example in unanswerable:
            assert example.answers == (DONT_KNOW,)
            assert example.documents
            for document in example.documents:
                assert not document.gold
                assert document.text != paragraphs[example.id]
                shown = normalise_answer(document_text(document))
                assert not any(normalise_answer(answer) in shown for answer in answers[example.id])


def test_distractors_that_hold_the_answer_are_left_out(tmp_path):
    records = [
        {"id": str(i), "title": "T", "question": "Who won?", "answers": ["The Broncos!"], "paragraph": f"{i} {text}"}
        for i, text in enumerate(["the Broncos won", "who won? broncos", "who won is unknown", "who won is open"])
    ]
    source = SquadSource(write(tmp_path / "a.jsonl", records), 100, unanswerable_share=1, val_share=0, test_share=0)
    for example in source.examples("train", count):
        assert not any("broncos" in document.text.lower() for document in example.documents)
        assert example.documents


@pytest.mark.parametrize("context_tokens", [20, 100, 400])
def test_context_length(squad, context_tokens):
    longest = max(count([json.loads(line)["paragraph"] for line in squad.read_text().splitlines()]))
    for example in everything(SquadSource(squad, context_tokens))["train"]:
        lengths = count([document_text(document) for document in example.documents])
        gold = sum(length for length, d in zip(lengths, example.documents, strict=True) if d.gold)
        assert sum(lengths) <= max(context_tokens, gold)
        if context_tokens >= 100:
            assert sum(lengths) >= context_tokens - longest


def test_tokens_are_counted_once(squad):
    calls = []

    def counting(texts):
        calls.append(len(texts))
        return count(texts)

    list(SquadSource(squad).examples("train", counting))
    assert len(calls) == 1


def test_a_context_that_cannot_be_filled_is_a_warning(squad, leads, caplog):
    source = SquadSource(squad, context_tokens=3000)
    assert list(source.examples("val", count))
    assert "data.source.distractors=split+leads" in caplog.text
    longer = SquadSource(squad, context_tokens=3000, distractors="split+leads", leads_path=leads)
    for split in ("train", "val", "test"):
        without, with_leads = next(source.examples(split, count)), next(longer.examples(split, count))
        assert len(with_leads.documents) > len(without.documents) or split == "train"


def test_deterministic_and_seeded(squad):
    first = everything(SquadSource(squad))
    assert first == everything(SquadSource(squad))
    other = everything(SquadSource(squad, seed=1))
    assert [e.id for e in first["train"]] != [e.id for e in other["train"]]
    assert [e.id for e in first["train"]] != sorted(e.id for e in first["train"])


def test_fingerprint(squad, leads, tmp_path):
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(squad.read_bytes())
    assert SquadSource(squad).fingerprint() == SquadSource(moved).fingerprint()
    changes = [{}, {"seed": 1}, {"context_tokens": 9}, {"unanswerable_share": 0.2}, {"val_share": 0.2}]
    changes += [{"test_share": 0.3}, {"distractors": "split+leads", "leads_path": leads}]
    assert len({SquadSource(squad, **change).fingerprint() for change in changes}) == len(changes)


def test_packaged_questions(squad, leads, tmp_path, monkeypatch):
    assets = types.ModuleType("selfaug.assets")
    assets.asset_path = lambda name: {"squad": squad.parent, "wikipedia-leads": leads.parent}[name]
    monkeypatch.setitem(sys.modules, "selfaug.assets", assets)
    source = SquadSource(distractors="split+leads")
    assert source.fingerprint() == SquadSource(squad, distractors="split+leads", leads_path=leads).fingerprint()
    squad.unlink()
    with pytest.raises(UserError, match=r"python -m selfaug\.assets"):
        SquadSource()


def test_bad_settings_and_files(squad, tmp_path):
    for settings, name in [
        ({"context_tokens": 0}, "context_tokens"),
        ({"unanswerable_share": 1.5}, "unanswerable_share"),
        ({"distractors": "all"}, "distractors"),
        ({"val_share": 0.5, "test_share": 0.5}, "val_share"),
    ]:
        with pytest.raises(UserError, match=rf"data\.(source\.)?{name}"):
            SquadSource(squad, **settings)
    with pytest.raises(UserError, match=r"data\.path=.* does not exist"):
        SquadSource(tmp_path / "none.jsonl")
    good = json.loads(squad.read_text().splitlines()[0])
    for change in ({"paragraph": ""}, {"answers": []}, {"answers": "x"}, {"title": None}):
        bad = write(tmp_path / "bad.jsonl", [good, {**good, **change}])
        with pytest.raises(UserError, match=rf"bad\.jsonl:2: '{next(iter(change))}'"):
            SquadSource(bad).examples("train", count)
