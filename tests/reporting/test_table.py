"""The tables: readable at 80 and 100 columns, literal about user text, honest about seeds."""

import io
from typing import Any

import pytest
from rich.console import Console

from selfaug.evaluation.statistics import Interval, over_seeds
from selfaug.reporting.results import Results, read_results, write_results
from selfaug.reporting.table import as_markdown, comparison_table, results_table, samples_panel, setting_labels


def metric(base: float | None, tuned: float, half: float, n: int = 500) -> dict[str, Any]:
    def around(mean: float) -> dict[str, Any]:
        return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}

    if base is None:
        return {"tuned": around(tuned)}
    return {"base": around(base), "tuned": around(tuned), "difference": around(tuned - base)}


def run(alpha: float = 0.5, seed: int = 0, shift: float = 0.0, **changes: Any) -> Results:
    corpora = {
        corpus: {
            "kl_base_tuned": metric(None, kl, kl / 8, 200),
            "kl_tuned_base": metric(None, kl * 1.1, kl / 8, 200),
            "perplexity": metric(18.4, 18.4 * (1 + kl), 0.9, 200),
        }
        for corpus, kl in (("wiki", 0.0213 / (1 + alpha)), ("instructions", 0.3104 / (1 + alpha)))
    }
    values: dict[str, Any] = {
        "name": "rag_squad",
        "config": {
            "seed": seed,
            "objective": {"terms": [{"name": "input_kl", "weight": alpha}], "rows": "input"},
            "paths": {"run_dir": f"/data/runs/{alpha}-{seed}"},
            "trainer": {"max_steps": 200, "default_root_dir": f"/data/runs/{alpha}-{seed}"},
            "logger": {"csv": {"version": seed}},
        },
        "config_hash": f"{alpha}{seed}",
        "seed": seed,
        "code": {"version": "0.1.0", "commit": None, "dirty": None},
        "data": {"fingerprint": "abc", "counts": {"train": 2000, "test": 500}, "truncation": {}},
        "task": {
            "exact_match": metric(0.214, 0.4523 + shift, 0.043),
            "f1": metric(0.3312, 0.5518 + shift, 0.039),
            "crag_score": metric(-0.3011, 0.0412 + shift, 0.081),
            "correct": metric(0.31, 0.5, 0.044),
            "missing": metric(0.0789, 0.0412, 0.02),
            "incorrect": metric(0.6111, 0.4588, 0.044),
        },
        "drift": corpora,
        "time": {"fit_s": 1100.2, "evaluate_s": 300.0, "total_s": 1412.7},
        "speed": {"train_tokens_per_s": 812.0},
        "memory": {"peak_bytes": 2**31},
        "environment": {},
    }
    return Results(**{**values, **changes})


def rendered(renderable: Any, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 100])
def test_results_fit(width):
    text = rendered(results_table(run()), width)
    assert max(map(len, text.splitlines())) <= width
    for expected in (
        "Exact match (%)",
        "45.2",
        "[40.9,49.5]",
        "+23.8",
        "CRAG score (%)",
        "+34.2",
        "wiki",
        "instructions",
    ):
        assert expected in text
    for expected in ("KL(base||tuned)", "KL(tuned||base)", "Perplexity", "0.0142", "nats per token", "500 questions"):
        assert expected in " ".join(text.split())


def test_results_stand_on_one_line_each_at_100_columns():
    line = next(line for line in rendered(results_table(run()), 100).splitlines() if "Exact match" in line)
    assert all(part in line for part in ("21.4 [17.1,25.7]", "45.2 [40.9,49.5]", "+23.8 [+19.5,+28.1]"))


def test_kl_of_the_base_is_not_invented():
    line = next(line for line in rendered(results_table(run()), 100).splitlines() if "KL(base||tuned)" in line)
    assert line.count("–") == 2


def test_same_table_before_and_after_the_file(tmp_path):
    """Intervals just computed and dictionaries read back print alike, the missing interval included."""
    fresh = run(
        task={"exact_match": {"base": None, "tuned": Interval(1.0, float("nan"), float("nan"), 1)}},
        drift={"wiki": {"kl_base_tuned": {"tuned": Interval(2.5e-5, 1e-5, 4e-5, 30)}}},
    )
    write_results(tmp_path / "results.json", fresh)
    text = rendered(results_table(fresh), 100)
    assert text == rendered(results_table(read_results(tmp_path / "results.json")), 100)
    assert "100.0" in text
    assert "2.5e-05 [1.0e-05,4.0e-05]" in text
    assert "nan" not in text


def test_a_diverged_run_prints():
    lost = run(
        drift={"wiki": {"perplexity": {"base": None, "tuned": {"mean": None, "low": None, "high": None, "n": 3}}}}
    )
    assert "–" in rendered(results_table(lost), 80)
    assert rendered(comparison_table([lost]), 80)


def test_user_text_is_literal():
    samples = [
        {
            "id": "1",
            "question": "[red]Who?[/red]",
            "answers": ["[bold]x"],
            "base": "[/] a\x1b[31mb",
            "tuned": "y" * 999,
        },
        {"id": "2", "question": "Second", "answers": ["a"], "base": "", "tuned": "a"},
        {"id": "3", "question": "Third", "answers": ["a"], "base": "b", "tuned": "a"},
    ]
    wild = run(name="[red]name", samples=samples, drift={"[blue]c": {}, "[green]": {"[x]": metric(0.1, 0.2, 0.01)}})
    text = rendered(samples_panel(wild, n=2), 80)
    for literal in ("[red]Who?[/red]", "[bold]x", "[/] a [31mb", "Second", "(nothing)"):
        assert literal in text
    assert "Third" not in text
    assert "\x1b" not in text
    assert text.count("y") < 250
    assert max(map(len, text.splitlines())) <= 80
    table = rendered(results_table(wild), 100)
    assert "[red]name" in table
    assert "[green]" in table
    assert "[x]" in table
    wild.config["data"] = {"name": "[/red]"}
    assert "name=[/red]" in rendered(comparison_table([wild, run()]), 200)


def test_no_samples():
    assert "no samples" in rendered(samples_panel(run()), 80)


@pytest.mark.parametrize("width", [80, 100])
def test_comparison_fits(width):
    text = rendered(comparison_table([run(0.0), run(0.5)]), width)
    assert max(map(len, text.splitlines())) <= width
    for expected in ("weight=0", "weight=0.5", "base", "45.2", "21.4", "1,100", "0.310"):
        assert expected in text


def test_seeds_are_summarised():
    runs = [run(0.5, seed, shift) for seed, shift in ((0, 0.0), (1, 0.01), (2, -0.02))] + [run(0.0)]
    lines = as_markdown(runs).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    labels = [row[0] for row in cells]
    assert labels[2:] == [
        "base",
        "weight=0.5, seed=0",
        "weight=0.5, seed=1",
        "weight=0.5, seed=2",
        "**weight=0.5: mean of 3 seeds**",
        "weight=0.0",
    ]
    expected = over_seeds([45.23, 46.23, 43.23]).interval()
    assert cells[6][1] == f"{expected.mean:.1f} ±{(expected.high - expected.low) / 2:.1f}"
    assert cells[3][1] == "45.2 ±4.3"


def test_the_same_run_twice_is_not_two_seeds():
    assert "mean of" not in as_markdown([run(0.5, 0), run(0.5, 0)])


def test_failed_runs_are_marked_and_left_out_of_the_mean():
    failed = run(0.5, 2, status="failed", task={}, drift={}, time={})
    text = as_markdown([run(0.5, 0), run(0.5, 1), failed])
    assert "seed=2 (failed) | – |" in text
    assert "mean of 2 seeds" in text


def test_markdown_escapes_pipes():
    header = as_markdown([run()]).splitlines()[0]
    assert r"| wiki KL(base\|\|tuned) |" in header
    assert header.replace(r"\|", "").count("|") == 12  # a run, three scores, two corpora of three, the time


def test_no_common_base_row_for_different_bases():
    other = run(0.1, task={"exact_match": metric(0.5, 0.6, 0.01)})
    assert "| base |" in as_markdown([run()])
    assert "| base |" not in as_markdown([run(), other])


def test_no_column_of_perplexity_where_none_was_measured():
    own = run(0.5)
    del own.drift["instructions"]["perplexity"]
    table = as_markdown([own])
    assert "wiki Perplexity ratio" in table
    assert "instructions KL" in table
    assert "instructions Perplexity ratio" not in table


def test_measured_perplexity_ratio_is_preferred():
    measured = run()
    measured.drift["wiki"]["perplexity_ratio"] = {"tuned": {"mean": 1.5, "low": 1.4, "high": 1.6, "n": 200}}
    assert "1.500 ±0.100" in as_markdown([measured])
    assert "1.014 |" in as_markdown([run()])


def test_labels():
    def config(model: str, layers: int, rows: str, seed: int) -> dict[str, Any]:
        return {
            "seed": seed,
            "name": f"run{seed}",
            "model": {"path": f"hub/{model}", "layers": layers},
            "objective": {"terms": [{"rows": rows}, {"rows": "output"}]},
            "hydra": {"job": seed},
        }

    assert setting_labels([config("a", 12, "input", 1), config("b", 24, "input", 2), config("a", 12, "all", 3)]) == [
        "path=hub/a, layers=12, rows=input",
        "path=hub/b, layers=24, rows=input",
        "path=hub/a, layers=12, rows=all",
    ]
    assert setting_labels([config("a", 12, "input", 1), config("a", 12, "input", 2)]) == ["", ""]
    assert setting_labels([]) == []


def test_labels_tell_equal_names_apart():
    runs = [(1, 2), (2, 2), (1, 3)]
    labels = setting_labels([{"x": {"rate": x}, "y": {"rate": y}} for x, y in runs])
    assert labels == ["x.rate=1, y.rate=2", "x.rate=2, y.rate=2", "x.rate=1, y.rate=3"]


def test_labels_of_settings_that_change_together():
    # One choice of a config group sets many settings: one is named, the rest counted.
    wide = [{"model": {"path": f"hub/{name}", "k": name, "heads": name * 3, "dim": name * 5}} for name in "ab"]
    assert setting_labels(wide) == ["k=a (+3)", "k=b (+3)"]
    # Two settings of different groups that happen to change together are both named.
    assert setting_labels([{"alpha": 0, "optimizer": {"lr": 1}}, {"alpha": 1, "optimizer": {"lr": 2}}]) == [
        "alpha=0, lr=1",
        "alpha=1, lr=2",
    ]


def test_labels_of_settings_that_only_some_runs_have():
    assert setting_labels([{"terms": []}, {"terms": [{"weight": 1, "rows": "input"}]}]) == [
        "terms=[]",
        "weight=1, rows=input",
    ]


def test_nothing_to_compare():
    assert as_markdown([]).startswith("| run | EM (%) |")
    assert rendered(comparison_table([]), 80)


def test_style_of_the_answers_is_a_column():
    answers = {"words": metric(42.6, 29.3, 3.0, 32), "one_line": metric(0.594, 0.875, 0.1, 32)}
    text = as_markdown([run(style={"instructions": answers, "ifeval": answers})] * 2)
    header, _, base, first = text.splitlines()[:4]
    assert header.count("answers:") == 2  # of general instructions alone
    assert "| 42.6 ±3.0 | 59.4 ±10.0 |" in base
    assert "| 29.3 ±3.0 | 87.5 ±10.0 |" in first


def test_crowded_terminal_leaves_out_what_says_the_least():
    scores = {f"bench{i}": {"acc": {**metric(0.5, 0.4, 0.02), "main": True}} for i in range(4)}
    wide, crowded = rendered(comparison_table([run()]), 200), rendered(comparison_table([run(retention=scores)]), 200)
    assert "tuned||" in wide
    assert "tuned||" not in crowded
    assert "bench3" in crowded
    assert "KL(tuned" in as_markdown([run(retention=scores)])
