"""Base against tuned: formulas against independent ones, and the degenerate cases."""

import math

import numpy as np
import pytest
from scipy import stats

from selfaug.errors import UserError
from selfaug.evaluation.retention.compare import at_floor, averages, compare, mean_retention
from selfaug.evaluation.retention.harness import Item, Scores
from selfaug.evaluation.statistics import mcnemar, paired_ratio, wilson_low


def scores(values, benchmark="lambada", metric="acc"):
    return Scores(benchmark, {}, [Item(f"t/{i}", "", "", "", {metric: value}) for i, value in enumerate(values)])


def ifeval(rows):
    names = ("prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose")
    items = [
        Item(f"t/{i}", "", "", "", {n: row if "instruction" in n else float(all(row)) for n in names})
        for i, row in enumerate(rows)
    ]
    return Scores("ifeval", {}, items)


BEFORE = [1.0] * 60 + [0.0] * 40
AFTER = [1.0] * 40 + [0.0] * 55 + [1.0] * 5  # 20 lost, 5 gained


def test_binary_metric():
    metric = compare(scores(BEFORE), scores(AFTER))["acc"]
    assert metric["base"].mean == pytest.approx(0.6)
    assert metric["tuned"].mean == pytest.approx(0.45)
    assert metric["difference"].mean == pytest.approx(-0.15)
    assert metric["difference"].high < 0
    assert metric["retention"].mean == pytest.approx(0.75)
    assert metric["retention"].low < 0.75 < metric["retention"].high < 1
    assert metric["mcnemar_p"] == pytest.approx(2 * stats.binom.cdf(5, 25, 0.5))
    assert metric["main"] is True
    assert metric["at_floor"] is False


def test_the_same_answers_show_nothing():
    metric = compare(scores(BEFORE), scores(BEFORE))["acc"]
    assert metric["mcnemar_p"] == 1
    assert (metric["difference"].low, metric["difference"].mean, metric["difference"].high) == (0, 0, 0)
    assert (metric["retention"].low, metric["retention"].high) == (1, 1)


def test_instruction_level_weighs_every_instruction():
    before, after = ifeval([[1.0, 1.0, 1.0], [0.0], [1.0, 0.0]]), ifeval([[1.0, 0.0, 1.0], [0.0], [0.0, 0.0]])
    metric = compare(before, after)["instruction_strict"]
    assert metric["base"].mean == pytest.approx(4 / 6)
    assert metric["tuned"].mean == pytest.approx(2 / 6)
    assert metric["difference"].mean == pytest.approx(-2 / 6)
    assert metric["retention"].mean == pytest.approx(0.5)
    assert "mcnemar_p" not in metric
    assert compare(before, after)["prompt_strict"]["mcnemar_p"] == 1.0


def test_base_alone():
    metric = compare(scores(BEFORE), None)["acc"]
    assert set(metric) == {"base", "at_floor", "main"}


@pytest.mark.parametrize("what", ["id", "prompt", "target"])
def test_different_items_are_refused(what):
    other = scores(BEFORE)
    setattr(other.items[0], what, "other")
    with pytest.raises(UserError, match="different items"):
        compare(scores(BEFORE), other)


@pytest.mark.parametrize(
    ("benchmark", "share", "floor"),
    [
        ("ifeval", 0.12, True),
        ("ifeval", 0.3, False),
        ("lambada", 0.0, True),
        ("lambada", 0.2, False),
        ("piqa", 0.55, True),
        ("piqa", 0.75, False),
    ],
)
def test_floor(benchmark, share, floor):
    metric = {"lambada": "acc", "ifeval": "prompt_strict"}.get(benchmark, "acc_norm")
    assert (
        at_floor(scores([1.0] * round(100 * share) + [0.0] * round(100 - 100 * share), benchmark, metric), metric)
        == floor
    )


def test_the_mean_leaves_out_what_is_at_its_floor():
    good, bad = (scores(BEFORE), scores(AFTER)), (scores([0.0] * 50), scores([0.0] * 50))
    mean = mean_retention([good, bad])["retention"]
    assert mean.mean == pytest.approx(0.75)
    assert mean.low < 0.75 < mean.high
    assert mean.n == 1
    assert mean_retention([bad]) == {}
    both = mean_retention([good, (scores(BEFORE), scores(BEFORE))])["retention"]
    assert both.mean == pytest.approx((0.75 + 1) / 2)
    assert both.high - both.low < mean.high - mean.low


def test_items_of_the_mean_have_its_mean_and_its_spread():
    """Benchmarks of different sizes count alike, as in the bootstrap that draws each by itself."""
    rng = np.random.default_rng(0)
    small, large = ((rng.random(n) < 0.7).astype(float) for n in (60, 240))
    lost = [np.where(rng.random(len(one)) < 0.3, 1 - one, one) for one in (small, large)]
    found = mean_retention([(scores(one), scores(after)) for one, after in zip((small, large), lost, strict=True)])
    interval, items = found["retention"], np.array(found["items"])
    assert items.mean() == pytest.approx(interval.mean)
    assert 1.96 * items.std(ddof=1) / np.sqrt(300) == pytest.approx((interval.high - interval.low) / 2, rel=0.05)
    alone = compare(scores(small), scores(lost[0]))["acc"]
    assert alone["items"] == list(lost[0])
    assert alone["asked"] != found["asked"]


def test_a_ratio_to_a_handful_has_no_interval():
    few = compare(scores([1.0] * 4 + [0.0] * 40), scores([1.0] * 2 + [0.0] * 42))["acc"]["retention"]
    assert few.mean == 0.5
    assert math.isnan(few.low)
    assert math.isnan(few.high)


def test_ratio_of_nothing_is_not_a_number():
    assert math.isnan(paired_ratio([0.0, 0.0], [1.0, 0.0]).mean)
    some = paired_ratio([1.0] + [0.0] * 9, [1.0] + [0.0] * 9)  # a third of the resamples have no success
    assert (some.mean, some.low, some.high) == (1, 1, 1)


def test_mcnemar_is_exact():
    assert mcnemar([1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]) == pytest.approx(2 * 0.5**6)
    assert mcnemar([1, 0], [0, 1]) == 1


def test_wilson():
    expected = stats.binomtest(3, 20).proportion_ci(0.95, "wilson").low
    assert wilson_low([1.0] * 3 + [0.0] * 17) == pytest.approx(expected)
    assert wilson_low([0.0] * 20) == 0


def test_averages():
    given = {"words": {"base": [10.0, 20.0], "tuned": [5.0, 5.0]}, "empty": {"base": [0.0, 0.0]}}
    found = averages(given, ["why", "how"])
    assert found["words"]["difference"].mean == -10
    assert found["words"]["items"] == [5.0, 5.0]
    assert set(found["empty"]) == {"base"}
