"""The paper's numbers: as printed, beside the right rows of ours, never among them."""

from typing import Any

import pytest

from benchmarks.report import made_up
from selfaug.reporting.compare import Comparison
from selfaug.reporting.published import TABLE_1, TABLE_2, TABLE_3, TABLE_4, published_base, published_for
from selfaug.reporting.tables import markdown_report, published_lines

IFEVAL = "retention/ifeval"


def config(position: str = "input_logits", plain: bool = False, data: str = "crag", **changes: Any) -> dict[str, Any]:
    made = made_up(position, plain=plain).config
    made["data"] |= {"name": data} | changes.pop("data_settings", {})
    made["model"] |= changes.pop("model", {})
    if not plain:
        made["method"]["terms"]["kl"] |= changes
    return made


def matched(*configs: dict[str, Any]) -> list[tuple[str, float] | None]:
    found = published_for(configs)
    return [None if one is None else (one.table, one.scores[IFEVAL]) for one in found]


def test_differences_that_the_paper_prints():
    """Deltas are printed apart from the numbers (Tables 3 and 4), so they check the copying."""
    gains = {k: rows["SelfAug"].scores[IFEVAL] - rows["LoRA"].scores[IFEVAL] for k, rows in TABLE_3.items()}
    assert {k: round(gain, 2) for k, gain in gains.items()} == {2: 4.80, 4: 6.29, 6: 2.95, 8: 7.39}
    sizes = {size: rows["SelfAug"].scores[IFEVAL] - rows["LoRA"].scores[IFEVAL] for size, rows in TABLE_4.items()}
    assert {size: round(gain, 2) for size, gain in sizes.items()} == {
        "3B": 8.32, "7B": 13.31, "14B": 21.63, "32B": 14.79, "72B": 9.98,
    }  # fmt: skip
    assert (
        TABLE_1["crag", "lora"].scores[IFEVAL] == TABLE_2["none"].scores[IFEVAL] == TABLE_4["7B"]["LoRA"].scores[IFEVAL]
    )
    # IFEval is k of 541 prompts, and the CRAG score k of 1335 questions.
    for one in [*TABLE_1.values(), *TABLE_2.values(), *(row for size in TABLE_4.values() for row in size.values())]:
        k = one.scores[IFEVAL] * 5.41
        assert abs(k - round(k)) < 0.06, one
        k = one.scores.get("task/crag_score", 0) * 13.35
        assert abs(k - round(k)) < 0.14, one


def test_positions_match_table_2():
    rows = [config(plain=True), config(), config("attention_q"), config("feed_forward"), config("output_logits")]
    assert matched(*rows) == [
        ("Table 2", 48.80), ("Table 2", 62.11), ("Table 2", 47.13), ("Table 2", 51.02), None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {"divergence": "kl_tuned_base"},
        {"tokens": "output"},
        {"share": 0.5},
        {"layers": [0]},
        {"schedule": {"_target_": "x.Linear"}},
    ],
)
def test_rows_that_the_paper_has_not(changed):
    assert matched(config("attention_q"), config(**changed))[1] is None


def test_contexts_sizes_and_data():
    contexts = [
        config(plain=plain, data_settings={"context_tokens": n}) for n in (2048, 8000, 384) for plain in (True, False)
    ]
    assert matched(*contexts) == [
        ("Table 3", 58.23), ("Table 3", 63.03), ("Table 3", 50.28), ("Table 3", 57.67), None, None,
    ]  # fmt: skip
    sizes = [config(model={"label": label}) for label in ("qwen2_5_3b", "qwen2_5_72b", "smollm2_135m")]
    assert matched(*sizes) == [("Table 4", 57.86), ("Table 4", 62.85), None]
    assert matched(config(plain=True), config()) == [("Table 1", 48.80), ("Table 1", 62.11)]
    methods = [config(plain=True), config(), config("orthogonal"), config("x")]
    for row, name in zip(methods[2:], ("orthogonal", "l2sp"), strict=True):
        row["method"] = {"name": name, "terms": {name: {"_target_": "a.B", "alpha": 0.5}}}
    assert matched(*methods) == [("Table 1", 48.80), ("Table 1", 62.11), ("Table 1", 63.77), None]
    instruct = [config(plain=True, data="rag_instruct"), config(data="rag_instruct")]
    assert matched(*instruct) == [("Table 1", 63.77), ("Table 1", 68.02)]
    assert published_base(instruct) == TABLE_1["rag_instruct", "base"]


def test_beside_ours_and_marked():
    found = Comparison([made_up(plain=True), made_up("input_logits"), made_up("output_logits")])
    labels = [line.label for line in published_lines(found)]
    assert labels == ["base model (Table 1)", "LoRA (Table 2)", "SelfAug (input logits) (Table 2)"]
    text = markdown_report(found)
    assert "*paper: LoRA (Table 2)*" in text
    assert "*48.80*" in text
    assert "best of five runs" in text
    assert 0.488 not in [value.mean for line in found.values for value in line if value]


def test_scores_on_crag_do_not_stand_beside_scores_on_other_questions():
    for name, shown in (("crag", True), ("squad", False)):
        runs = [made_up(plain=True), made_up("input_logits")]
        for run in runs:
            run.config["data"]["name"] = name
        lines = published_lines(Comparison(runs))
        assert {"task/crag_score" in line.published.scores for line in lines} == {shown}
        assert all(IFEVAL in line.published.scores for line in lines)
        assert ("*8.76*" in markdown_report(Comparison(runs))) == shown


def test_not_where_no_column_is_shared():
    runs = [made_up(plain=True), made_up("input_logits")]
    for run in runs:
        run.retention, run.task = {}, {"f1": run.task["f1"]}
    assert published_lines(Comparison(runs)) == []
    assert published_lines(Comparison([])) == []
