"""Rows, means, differences, tests and the Pareto front against independent computations."""

import itertools
import math
import random

import numpy as np
import pytest
from scipy import stats

from benchmarks.report import POSITIONS, made_up
from selfaug.evaluation.statistics import over_seeds_and_items
from selfaug.reporting.compare import Comparison, difference, holm, rows_of
from selfaug.reporting.correlation import rank_correlation, within_runs
from selfaug.reporting.results import Results
from selfaug.reporting.summary import findings, headline
from selfaug.reporting.table import as_markdown

SEEDS = (1, 2, 3)


def sweep(*positions: str, seeds: tuple[int, ...] = SEEDS) -> list[Results]:
    runs = [made_up(plain=True, seed=seed) for seed in seeds]
    return runs + [made_up(position, seed=seed) for position in positions for seed in seeds]


def values(runs: list[Results], name: str = "f1") -> list[float]:
    return [run.task[name]["tuned"]["mean"] for run in runs]


def column(found: Comparison, key: str) -> int:
    return next(index for index, one in enumerate(found.measures) if one.key == key)


def test_means_and_paired_differences():
    runs = sweep("input_logits", "output_logits")
    random.Random(0).shuffle(runs)  # pairs are found by seed, not by order
    found = Comparison(runs)
    assert found.rows[0].label == "plain LoRA"
    f1 = column(found, "task/f1")
    plain = values([made_up(plain=True, seed=seed) for seed in SEEDS])
    for index, row in enumerate(found.rows[1:], 1):
        ours = values([made_up(row.label.partition("=")[2], seed=seed) for seed in SEEDS])
        low, high = stats.t.interval(0.95, 2, np.mean(ours), stats.sem(ours))
        mean = found.values[index][f1]
        assert mean is not None
        assert (mean.mean, mean.low, mean.high, mean.n) == pytest.approx((np.mean(ours), low, high, 3))
        test = stats.ttest_rel(ours, plain)
        gap = found.differences[index][f1]
        assert gap is not None
        assert gap.paired
        assert gap.seeds == 3
        assert gap.p == pytest.approx(test.pvalue)
        assert gap.standard_errors == pytest.approx(test.statistic)
        interval = test.confidence_interval(0.95)
        assert (gap.interval.low, gap.interval.high) == pytest.approx((interval.low, interval.high))
        assert gap.telling == (test.pvalue < 0.05)
    assert found.differences[0] == [None] * len(found.measures)


def test_seeds_that_are_not_the_same_are_not_compared():
    runs = [made_up(plain=True, seed=seed) for seed in (1, 2, 3)] + [made_up(seed=seed) for seed in (4, 5, 6)]
    found = Comparison(runs)
    assert found.rows[1].baseline is found.rows[0]
    assert found.differences[1] == [None] * len(found.measures)


def test_full_fine_tuning_is_compared_with_the_only_plain_lora():
    runs = sweep("input_logits")
    full = [made_up(plain=True, seed=seed) for seed in SEEDS]
    for run in full:
        run.config["method"] = {"name": "sft", "terms": {}}
        run.config["adapter"] = {"_target_": "selfaug.model.full.FullFineTuning", "train": "all"}
        run.config["optimizer"] = {"lr": 1e-5}
    rows = rows_of([*runs, *full])
    assert [row.plain for row in rows] == [True, False, False]
    assert rows[2].baseline is rows[0]


def test_a_row_that_diverged_is_on_no_front():
    runs = [*sweep("input_logits", seeds=(1,)), made_up("output_logits")]
    for corpus in runs[-1].drift.values():
        for metric in corpus.values():
            metric["tuned"] = {"mean": None, "low": None, "high": None, "n": 4}
    found = Comparison(runs)
    assert [found.rows[i].label for i in found.front_at(found.drift)] != []
    assert 2 not in found.front_at(found.drift)


def with_items(runs: list[Results], asked: str = "same") -> list[Results]:
    """Values of 100 questions for F1, some harder than others, that have each run's mean."""
    for run in runs:
        hard = np.random.default_rng(0).normal(0, 0.3, 100)
        own = np.random.default_rng([run.seed, len(run.config["method"]["terms"])]).normal(0, 0.05, 100)
        items = run.task["f1"]["tuned"]["mean"] + hard - hard.mean() + own - own.mean()
        run.task["f1"] |= {"items": list(items), "asked": asked if asked == "same" else f"{run.seed}"}
    return runs


def test_seeds_and_items_are_both_drawn():
    runs = with_items(sweep("input_logits"))
    found = Comparison(runs)
    f1 = column(found, "task/f1")
    ours, plain = (
        np.array([run.task["f1"]["items"] for run in runs if bool(run.config["method"]["terms"]) == terms])
        for terms in (True, False)
    )
    gap, value = found.differences[1][f1], found.values[1][f1]
    assert gap is not None
    assert value is not None
    expected = over_seeds_and_items(ours - plain)
    assert (gap.p, gap.seeds, gap.items) == (pytest.approx(expected.p), 3, 100)
    assert gap.standard_errors == pytest.approx(expected.standard_errors)
    assert gap.interval.mean == pytest.approx(np.mean(values(runs[3:])) - np.mean(values(runs[:3])))
    assert value.high - value.low == pytest.approx(2 * (over_seeds_and_items(ours).interval().high - value.mean))
    # What questions have in common cancels out of the difference, not out of the row.
    assert gap.interval.high - gap.interval.low < value.high - value.low


def test_one_seed_is_paired_by_item_and_still_makes_no_claim():
    runs = with_items(sweep("input_logits", seeds=(1,)))
    gap = Comparison(runs).differences[1][1]
    test = stats.ttest_rel(runs[1].task["f1"]["items"], runs[0].task["f1"]["items"]).confidence_interval(0.95)
    assert gap is not None
    assert (gap.paired, gap.p, gap.items) == (False, None, 100)
    assert (gap.interval.low, gap.interval.high) == pytest.approx((test.low, test.high))


def test_one_seed_is_told_apart_by_items_and_corrected_for_the_number_of_rows():
    """p of 0.02 over the items holds alone, not among six rows."""
    runs = [made_up(plain=True, seed=1), *(made_up(position, seed=1) for position in POSITIONS[:6])]
    noise = np.random.default_rng(0).normal(0, 0.1, 100)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    runs[0].task["f1"] |= {"items": [0.4] * 100, "asked": "same"}
    runs[0].task["f1"]["tuned"]["mean"] = 0.4
    t = stats.t.isf(0.01, 99)
    for number, run in enumerate(runs[1:]):
        gain = t / 10 if number == 0 else 0.0
        run.task["f1"] |= {"items": list(0.4 + gain + np.roll(noise, number)), "asked": "same"}
        run.task["f1"]["tuned"]["mean"] = 0.4 + gain
    alone, among = Comparison(runs[:2]), Comparison(runs)
    for found in (alone, among):
        gap = found.differences[1][column(found, "task/f1")]
        assert gap is not None
        assert (gap.p, gap.p_items) == (None, pytest.approx(0.02))
        assert set(itertools.chain(*found.marks)) == {""}
    assert "answers best" in headline(alone)
    assert "No row answers demonstrably better" in headline(among)
    assert "nothing here speaks about other seeds" in " ".join(findings(among))


@pytest.mark.parametrize("items", [True, False])
def test_rows_of_unequal_seeds_are_not_told_apart_without_a_test(items: bool):
    """One seed in common is no test, however far apart their numbers are; and it is that seed that is compared."""
    runs = [made_up(plain=True, seed=seed) for seed in SEEDS] + [made_up(seed=1, gain=0.3)]
    found = Comparison(with_items(runs) if items else runs)
    gap = found.differences[1][column(found, "task/f1")]
    assert gap is not None
    assert gap.interval.mean == pytest.approx(values(runs)[3] - values(runs)[0])
    assert gap.interval.low > 0
    assert gap.p is None
    assert "No row answers demonstrably better" in headline(found)
    assert "is not told apart from plain LoRA" in " ".join(findings(found))


def test_other_items_in_every_run_leave_the_seeds():
    """Their chance is in the scatter of the seeds; broken and missing values are no reason to fail."""
    without = Comparison(sweep("input_logits")).differences[1][1]
    others = with_items(sweep("input_logits"), asked="other in each seed")
    assert Comparison(others).differences[1][1] == without
    broken = with_items(sweep("input_logits"))
    broken[-1].task["f1"]["items"][3] = None
    assert Comparison(broken).differences[1][1] == without
    del broken[-1].task["f1"]["items"]
    assert Comparison(broken).differences[1][1] == without


def test_one_seed_makes_no_claim():
    found = Comparison(sweep("input_logits", seeds=(1,)))
    gap = found.differences[1][column(found, "task/f1")]
    assert gap is not None
    assert not gap.paired
    assert gap.p is None
    assert gap.interval.high - gap.interval.low == pytest.approx(2 * math.hypot(0.04, 0.04))
    assert set(itertools.chain(*found.marks)) == {""}


def test_only_seeds_that_both_have_are_paired():
    runs = [made_up(plain=True, seed=seed) for seed in (1, 2, 3)] + [made_up(seed=seed) for seed in (2, 3, 4)]
    gap = Comparison(runs).differences[1][1]
    ours, plain = ([made_up(plain=plain, seed=seed) for seed in (2, 3)] for plain in (False, True))
    test = stats.ttest_rel(values(ours), values(plain))
    assert gap is not None
    assert (gap.seeds, gap.p) == (2, pytest.approx(test.pvalue))


def test_equal_differences_have_no_test():
    rows = rows_of(sweep("input_logits"))
    f1 = Comparison(sweep("input_logits")).measures[1]
    same = difference(rows[0], rows[0], f1)
    assert same is not None
    assert (same.p, same.standard_errors, same.telling) == (1.0, None, False)
    shifted = {seed: made_up(plain=True, seed=seed, gain=0.25) for seed in SEEDS}
    rows[1].runs = shifted
    constant = difference(rows[1], rows[0], f1)
    assert constant is not None
    assert constant.p is None
    assert not constant.telling


def test_failed_and_doubled_runs_do_not_count():
    runs = sweep("input_logits")
    twice = [*runs, made_up("input_logits", seed=1), made_up("input_logits", seed=9, status="failed", task={})]
    row = rows_of(twice)[1]
    assert sorted(row.runs) == [1, 2, 3]
    assert len(row.members) == 5
    assert Comparison(twice).values == Comparison(runs).values


def test_a_row_without_all_seeds_has_no_mean():
    runs = sweep("input_logits")
    runs[-1].retention_mean = {}
    found = Comparison(runs)
    assert found.values[1][column(found, "kept")] is None
    assert found.value(1, found.task) is not None


def test_a_seed_that_diverged_leaves_no_difference():
    """Neither the mean nor the difference may be that of the seeds that went well."""
    runs = sweep("input_logits", "output_logits")
    runs[-1].task["f1"]["tuned"] = {"mean": None, "low": None, "high": None, "n": 100}
    found = Comparison(runs)
    f1 = column(found, "task/f1")
    assert found.differences[1][f1] is not None
    assert found.differences[2][f1] is None
    assert found.marks[2][f1] == ""


def test_full_fine_tuning_has_no_plain_lora_of_other_data():
    full = made_up(plain=True, seed=1)
    full.config["method"] = {"name": "sft", "terms": {}}
    full.config["adapter"] = {"_target_": "selfaug.model.full.FullFineTuning", "train": "all"}
    full.config["data"] = {**full.config["data"], "name": "crag"}
    assert [row.baseline for row in rows_of([made_up(plain=True, seed=1), full])] == [None, None]


def test_no_baseline_of_other_settings():
    other = made_up("input_logits", seed=1)
    other.config["adapter"]["r"] = 64
    found = Comparison([made_up(plain=True, seed=1), other])
    assert [row.baseline for row in found.rows] == [None, None]


def test_different_base_models_have_no_common_row():
    other = made_up("input_logits")
    other.task["f1"]["base"]["mean"] = 0.5
    assert Comparison([made_up(plain=True)]).base is not None
    assert Comparison([made_up(plain=True), other]).base is None
    # Drawn by the seed of its run, an interval of the same scores may be another.
    same = made_up("input_logits")
    same.task["f1"]["base"] |= {"low": 0.0713, "high": 0.1512}
    assert Comparison([made_up(plain=True), same]).base is not None
    assert "| base |" in as_markdown([made_up(plain=True), same])


def test_holm_by_its_definition():
    ps = [0.01, 0.04, 0.03, 0.005]
    # In order .005 .01 .03 .04 times 4 3 2 1, none smaller than the one before.
    assert holm(ps) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    # Of six tests, of which four are looked at: times 6 5 4 3.
    assert holm(ps, 6) == pytest.approx([0.05, 0.12, 0.12, 0.03])


def test_the_best_row_is_told_apart_only_if_any_two_would_be():
    """Which row is the best is seen in the same numbers, so that all pairs are tested, and not those with it alone."""
    runs = sweep("input_logits", "output_logits")
    e = 0.05 * math.sqrt(3) / 6.965  # Student's two-sided p is 0.02 then, with two degrees of freedom
    for index, run in enumerate(runs):
        mean = 0.5 if index >= 6 else 0.45 + e * (index % 3 - 1)
        run.task["f1"] = run.task["f1"] | {"tuned": run.task["f1"]["tuned"] | {"mean": mean}}
    found = Comparison(runs)
    gap = found.differences[2][column(found, "task/f1")]
    assert gap is not None
    assert gap.p == pytest.approx(0.02, rel=1e-3)
    said = [one for one in findings(found) if one.startswith("At the task")]
    assert "beats plain LoRA" in said[0]  # one of two tests that were to be made: 0.04
    assert said[1:] == ["At the task, position=output_logits cannot be told apart from position=input_logits."]  # 0.06


def test_rows_that_are_all_plain_lora_are_compared_with_none():
    runs = [made_up(plain=True, seed=seed) for seed in SEEDS for _ in range(2)]
    for run, rate in zip(runs, [1e-4, 5e-4] * 3, strict=True):
        run.config = run.config | {"optimizer": {"lr": rate}}
        run.task["f1"] = run.task["f1"] | {"tuned": run.task["f1"]["tuned"] | {"mean": rate}}
    text = headline(Comparison(runs))
    assert "lr=" in text
    assert "than plain LoRA" not in text


def test_means_over_different_benchmarks_are_named():
    runs = sweep("input_logits")
    assert not any("different benchmarks" in one for one in findings(Comparison(runs)))
    name, metrics = next(iter(runs[0].retention.items()))
    runs[0].retention = runs[0].retention | {name: {key: one | {"at_floor": True} for key, one in metrics.items()}}
    (said,) = [one for one in findings(Comparison(runs)) if "different benchmarks" in one]
    assert f"(only some have {name}," in said


def test_marks_are_of_each_column():
    found = Comparison(sweep("input_logits", "all_logits", "attention_q", "attention_k"))
    kept = column(found, "kept")
    ps = [gap.p for line in found.differences[1:] if (gap := line[kept]) is not None and gap.p is not None]
    assert len(ps) == 4
    order = sorted(ps)
    for row, p in enumerate(ps, 1):
        adjusted = max(min(1, (4 - place) * q) for place, q in enumerate(order) if q <= p)
        assert found.marks[row][kept] == ("**" if adjusted < 0.05 else "*" if p < 0.05 else "")


def test_pareto_front_by_brute_force():
    found = Comparison(
        sweep("input_logits", "output_logits", "all_logits", "attention_q", "feed_forward", "all_layers")
    )
    points = [(found.value(i, found.task).mean, found.value(i, found.retention).mean) for i in range(len(found.rows))]
    front = [i for i, (a, b) in enumerate(points) if not any(x >= a and y >= b and (x, y) != (a, b) for x, y in points)]
    assert found.front == front
    assert 0 < len(front) < len(points)


def test_less_drift_is_better_where_no_benchmark_was_measured():
    runs = sweep("input_logits", "output_logits")
    for run in runs:
        run.retention, run.retention_mean = {}, {}
    found = Comparison(runs)
    assert found.retention is not None
    assert found.retention.key == "drift/dialogues/kl_base_tuned"
    drifts = [found.value(i, found.retention).mean for i in range(3)]
    assert int(np.argmin(drifts)) in found.front
    assert found.best[found.measures.index(found.retention)] == int(np.argmin(drifts))


def test_rank_correlation():
    draw = random.Random(1)
    x = [draw.random() for _ in range(12)]
    y = [value + draw.gauss(0, 0.3) for value in x]
    found = rank_correlation(x, y)
    r = np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1]
    half = 1.959964 * math.sqrt((1 + r**2 / 2) / 9)
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx(
        (r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)), rel=1e-5
    )
    assert rank_correlation(x[:3], y[:3]) is None
    assert rank_correlation(x, [1.0] * 12) is None
    perfect = rank_correlation([1, 2, 3, 4], [2, 4, 6, 9])
    assert perfect is not None
    assert perfect.mean == 1
    assert math.isnan(perfect.low)


def test_correlation_within_runs_is_over_runs():
    def with_probes(drift: list[float], score: list[float]) -> Results:
        steps = range(len(drift))
        curves = {
            "probe/drift_a": [[s, drift[s]] for s in steps],
            "probe/ifeval_prompt_strict": [[s, score[s]] for s in steps],
        }
        return made_up(curves=curves)

    scores = ([5, 4, 3, 1, 2], [5, 3, 4, 2, 1], [4, 5, 2, 3, 1])
    runs = [with_probes([0.0, 0.1, 0.2, 0.3, 0.4], [float(s) for s in one]) for one in scores]
    r = [stats.spearmanr(range(5), one).statistic for one in scores]
    _, high = stats.t.interval(0.95, 2, np.mean(r), stats.sem(r))
    found = within_runs(runs)
    assert found is not None
    assert (found.mean, found.low, found.high, found.n) == pytest.approx((np.mean(r), -1, high, 3))  # no less
    # Where three of four orders are perfect the fourth still counts for a quarter.
    orders = [[5.0, 4.0, 3.0, 2.0, 1.0]] * 3 + [[1.0, 2.0, 3.0, 4.0, 5.0]]
    mixed = within_runs([with_probes([0.0, 0.1, 0.2, 0.3, 0.4], one) for one in orders])
    assert mixed is not None
    assert mixed.mean == pytest.approx(-0.5)
    assert within_runs(runs[:1]) is None


def test_stars_and_sentences_are_corrected_for_the_number_of_rows():
    found = Comparison(sweep("input_logits", "output_logits", "all_logits"))
    for column in range(len(found.measures)):
        gaps = [line[column] for line in found.differences]
        p = {i: gap.p for i, gap in enumerate(gaps) if gap is not None and gap.p is not None}
        expected = dict(zip(p, holm(list(p.values())), strict=True))
        assert [line[column] for line in found.adjusted] == [expected.get(i) for i in range(len(gaps))]
    f1 = next(index for index, one in enumerate(found.measures) if one.key == "task/f1")
    both = [(line[f1], gaps[f1]) for line, gaps in zip(found.adjusted, found.differences, strict=True)]
    assert any(p != gap.p for p, gap in both if gap is not None)
