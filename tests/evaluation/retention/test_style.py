"""Style of answers, by hand."""

import pytest

from selfaug.evaluation.retention.style import METRICS, style


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {"words": 0, "one_line": 0, "refusal": 0, "repetition": 0, "empty": 1}),
        ("Paris.", {"words": 1, "one_line": 1, "refusal": 0, "repetition": 0, "empty": 0}),
        ("One line\n\n", {"words": 2, "one_line": 1}),
        ("One\ntwo", {"one_line": 0}),
        ("a b c d a b c d", {"repetition": 1 / 5}),
        ("x x x x x", {"repetition": 1 / 2}),
        ("x x x x", {"repetition": 0}),
        ("I'm sorry, but that will not do.", {"refusal": 1}),
        ("I’m sorry, no.", {"refusal": 1}),
        ("As an AI language model, I ...", {"refusal": 1}),
        ("I can tell you more. " * 10 + "I cannot.", {"refusal": 0}),
        ("Hi! I can't wait to share this with you.", {"refusal": 0}),
        ("The view in Hawaii cannot be missed.", {"refusal": 0}),
        ("As an aid to memory, write it down.", {"refusal": 0}),
        ("Dear boss, I am sorry for being late.", {"refusal": 0}),
        ("I cannot help with that.", {"refusal": 1}),
        ("I do not have access to the internet.", {"refusal": 1}),
        ("The candy is unfortunately gone.", {"refusal": 0}),
    ],
)
def test_style(text, expected):
    found = style(text)
    assert tuple(found) == METRICS
    assert {name: found[name] for name in expected} == pytest.approx(expected)
