"""Parsing of the benchmarks: the fields that lm-eval's task code reads, and rows that are not as they should be."""

import json

import pytest

from selfaug.assets import parse_benchmarks as parse
from tests.assets.helpers import arrow, lines, refused, requests

PROMPT = {"key": 1, "prompt": "Say é.", "instruction_id_list": ["a:b", "c:d"], "kwargs": [{}, {"num_words": 3}]}
ARC = {"id": "q1", "query": "Question: Which?\nThis?\nAnswer:", "choices": ["one", "two", "three"], "gold": 1}
HELLASWAG = {
    "ind": 7,
    "activity_label": "Roofing",
    "ctx_a": "A man sits.",
    "ctx_b": "he",
    "ctx": "A man sits. he",
    "endings": ["a", "b", "c", "d"],
    "source_id": "x~y",
    "split": "val",
    "split_type": "indomain",
    "label": "3",
}
PIQA = {"goal": "Dry a cup", "sol1": "Use a towel.", "sol2": "Use water.", "label": 0}
WINOGRANDE = {"sentence": "Ann beat Bo as _ was faster.", "option1": "Ann", "option2": "Bo", "answer": "1"}
LAMBADA = {"id": 0, "query": "I don't care about", "answers_text": ["signs"], "choices": ["signs"]}
GSM8K = {"question": "1  + 1?", "answer": "<<1+1=2>>2.\n#### 2", "short_answer": "2", "choices": ["2"]}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def f(x):\n    """Same."""\n',
    "canonical_solution": "    return x\n",
    "test": "def check(candidate):\n    assert candidate(1) == 1\n",
    "entry_point": "f",
    "choices": ["    return x\n"],
}


def prompts(folder, *rows):
    path = folder / "input.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def stream(folder, *rows):
    return arrow(folder, rows)


# parser, how its raw file is written, a row of it, the split, the record
GOOD = {
    "ifeval": (parse.ifeval, prompts, PROMPT | {"more": 1}, "test", PROMPT),
    "arc": (
        parse.arc,
        requests,
        ARC,
        "test",
        {
            "id": "q1",
            "question": "Which?\nThis?",
            "choices": {"text": ["one", "two", "three"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        },
    ),
    "hellaswag": (parse.hellaswag, stream, HELLASWAG, "validation", HELLASWAG),
    "piqa": (parse.piqa, stream, PIQA, "validation", PIQA),
    "winogrande": (parse.winogrande, stream, WINOGRANDE | {"id": 1}, "validation", WINOGRANDE),
    "lambada": (parse.lambada, requests, LAMBADA, "test", {"text": "I don't care about signs"}),
    "gsm8k": (parse.gsm8k, requests, GSM8K, "test", {key: GSM8K[key] for key in ("question", "answer")}),
    "humaneval": (parse.humaneval, requests, HUMANEVAL, "test", {k: HUMANEVAL[k] for k in HUMANEVAL if k != "choices"}),
}


@pytest.mark.parametrize("name", GOOD)
def test_the_record_has_the_fields_of_the_hub(tmp_path, name):
    parser, write, row, split, record = GOOD[name]
    assert parser(write(tmp_path, row), tmp_path) == 1
    assert lines(tmp_path / f"{split}.jsonl") == [record]


BAD = [
    ("ifeval", {"kwargs": [{}]}),
    ("ifeval", {"kwargs": [], "instruction_id_list": []}),
    ("arc", {"query": "Which?\nAnswer:"}),
    ("arc", {"query": "Question: Which?"}),
    ("arc", {"gold": 3}),
    ("arc", {"gold": -1}),
    ("hellaswag", {"endings": ["a", "b", "c"]}),
    ("hellaswag", {"label": ""}),  # as in the hub's test split
    ("piqa", {"label": -1}),  # as in the hub's test split
    ("winogrande", {"answer": ""}),  # as in the hub's test split
    ("winogrande", {"sentence": "no blank"}),
    ("winogrande", {"sentence": "_ and _"}),
    ("lambada", {"answers_text": ["two words"]}),
    ("lambada", {"answers_text": ["a", "b"]}),
    ("lambada", {"query": "a space at the end "}),
    ("gsm8k", {"answer": "2"}),
    ("humaneval", {"entry_point": "g"}),
]


@pytest.mark.parametrize(("name", "change"), BAD, ids=[f"{name}-{next(iter(change))}" for name, change in BAD])
def test_a_malformed_row_is_named(tmp_path, name, change):
    parser, write, row, _, _ = GOOD[name]
    # After a good one, so that the number is seen to count; of ARC's equal ids the first would do.
    good = row | {"id": "q0"} if name == "arc" else row
    refused(lambda: parser(write(tmp_path, good, row | change), tmp_path), f"{name}: record 2 is not in the known")


@pytest.mark.parametrize("name", ["ifeval", "arc", "lambada", "gsm8k", "humaneval"])
def test_a_row_without_a_field_is_named(tmp_path, name):
    parser, write, _, _, _ = GOOD[name]
    refused(lambda: parser(write(tmp_path, {"id": 1}), tmp_path), f"{name}: record 1 is not in the known")


def test_a_line_that_is_no_json_is_named(tmp_path):
    path = prompts(tmp_path, PROMPT)
    path.write_text(path.read_text() + "{half\n")
    refused(lambda: parse.ifeval(path, tmp_path), "ifeval: record 2 is not in the known")


def test_arc_makes_one_record_of_all_requests_of_a_question(tmp_path):
    other = ARC | {"id": "q2", "gold": 0}
    assert parse.arc(requests(tmp_path, ARC, ARC, other, ARC), tmp_path) == 2
    assert [(row["id"], row["answerKey"]) for row in lines(tmp_path / "test.jsonl")] == [("q1", "B"), ("q2", "A")]
    refused(lambda: parse.arc(requests(tmp_path, ARC, ARC | {"gold": 0}), tmp_path), "two questions q1")


def mmlu_folder(root, subjects, dev=5, **change):
    """The folder of the archive: subjects with two test questions and `dev` examples, any field changed."""
    for subject in subjects:
        row = {"question": "Which?", "subject": subject, "choices": ["p", "q", "r", "s"], "answer": 2} | change
        for split, number in {"test": 2, "dev": dev, "validation": 1}.items():
            folder = root / subject / split
            folder.mkdir(parents=True)
            rows = [row | {"question": f"{split} {index}"} for index in range(number)]
            arrow(folder, rows).rename(folder / "data-00000-of-00001.arrow")
    return root


def test_mmlu_joins_its_subjects_and_keeps_the_order_of_the_examples(tmp_path):
    folder = mmlu_folder(tmp_path / "in", ["virology", "anatomy"])
    assert parse.mmlu(folder, tmp_path) == 4 + 10
    test, dev = (lines(tmp_path / f"{split}.jsonl") for split in ("test", "dev"))
    assert test[0] == {"subject": "anatomy", "question": "test 0", "choices": ["p", "q", "r", "s"], "answer": 2}
    assert [row["subject"] for row in test] == ["anatomy"] * 2 + ["virology"] * 2
    assert [row["question"] for row in dev] == [f"dev {index}" for index in range(5)] * 2


@pytest.mark.parametrize("change", [{"choices": ["p", "q", "r"]}, {"answer": 4}, {"subject": "law"}, {"dev": 4}])
def test_mmlu_that_is_not_as_expected_is_refused(tmp_path, change):
    folder = mmlu_folder(tmp_path / "in", ["anatomy"], **change)
    split = "dev" if "dev" in change else "test"
    refused(lambda: parse.mmlu(folder, tmp_path), f"mmlu {split}: record 1 is not in the known")


def test_punkt_is_laid_out_as_nltk_looks_for_it(tmp_path):
    member, out = tmp_path / "english", tmp_path / "out"
    member.mkdir()
    for name in (*parse.PUNKT_FILES, "README"):
        (member / name).write_text(name)
    assert parse.punkt_tab(member, out) == 4
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert found == [f"tokenizers/punkt_tab/english/{name}" for name in parse.PUNKT_FILES]
    (member / "ortho_context.tab").unlink()
    refused(lambda: parse.punkt_tab(member, tmp_path / "again"), "punkt-tab: ortho_context.tab is not in the archive")
