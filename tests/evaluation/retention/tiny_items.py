"""A few items of some benchmarks in the packaged format, in place of the packaged ones."""

import json
from pathlib import Path

import pytest

from selfaug.data import packaged
from selfaug.evaluation.retention import benchmarks, harness, suite

WORDS = ("cat", "dog", "hen", "rain", "the end", "and", "one", "other")


def write(folder: Path, name: str, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def tiny_items(root: Path) -> Path:
    """Folders named as the assets are."""
    choices = [{"text": list(WORDS[i : i + 3]), "label": ["A", "B", "C"]} for i in range(5)]
    arc = [
        {"id": f"q{i}", "question": f"What is {word}?", "choices": choices[i % 5], "answerKey": "ABC"[i % 3]}
        for i, word in enumerate(WORDS)
    ]
    write(root / "arc-easy", "test.jsonl", arc)
    write(root / "lambada", "test.jsonl", [{"text": f"In the {word} there is the {word}"} for word in WORDS])
    write(
        root / "mmlu", "test.jsonl",
        [
            {"subject": subject, "question": f"Which {word}?", "choices": list(WORDS[:4]), "answer": i % 4}
            for subject in benchmarks.MMLU_SUBJECTS
            for i, word in enumerate(WORDS[:3])
        ],
    )  # fmt: skip
    write(
        root / "mmlu", "dev.jsonl",
        [
            {"subject": subject, "question": "Which?", "choices": list(WORDS[:4]), "answer": 1}
            for subject in benchmarks.MMLU_SUBJECTS
        ],
    )  # fmt: skip
    write(
        root / "ifeval", "test.jsonl",
        [
            {"key": i, "prompt": f"Write of the {word}, without commas, in lower case.",
             "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"][: 1 + i % 2],
             "kwargs": [{}, {}][: 1 + i % 2]}
            for i, word in enumerate(WORDS)
        ],
    )  # fmt: skip
    write(
        root / "humaneval", "test.jsonl",
        [
            {"task_id": f"t/{i}", "prompt": "def f(x):\n", "canonical_solution": "    return x\n",
             "test": "def check(candidate):\n    assert candidate(1) == 1\n", "entry_point": "f"}
            for i in range(2)
        ],
    )  # fmt: skip
    (root / "punkt-tab" / "tokenizers" / "punkt_tab" / "english").mkdir(parents=True)
    write(
        root / "alpaca-sample", "alpaca.jsonl",
        [{"instruction": f"Tell me of the {word}.", "input": "", "output": "No."} for word in WORDS],
    )  # fmt: skip
    return root


@pytest.fixture
def items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny items are there instead of the packaged ones, and nothing can be fetched."""
    root = tiny_items(tmp_path / "items")
    for module in (benchmarks, harness, packaged):
        monkeypatch.setattr(module, "asset_path", lambda name: root / name)
    monkeypatch.setattr(suite, "asset_paths", lambda names: [root / name for name in names])
    return root
