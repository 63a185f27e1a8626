"""Intervals: against scipy's, against their promise (coverage), and at the edges."""

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from selfaug.errors import UserError
from selfaug.evaluation import statistics
from selfaug.evaluation.statistics import (
    Interval,
    bootstrap,
    over_seeds,
    over_seeds_and_items,
    paired_difference,
    paired_weighted_difference,
    pseudo_values,
    weighted_bootstrap,
)


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def values():
    return np.random.default_rng(7).gamma(2.0, size=200)


def test_equals_scipy(values):
    ours = bootstrap(values, resamples=20_000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    width = theirs.high - theirs.low
    assert ours.mean == pytest.approx(values.mean())
    # Two draws of 20,000 resamples: the ends differ by their own Monte Carlo error, about 1% of the width.
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * width)
    assert ours.n == 200


def test_ratio_equals_scipy(values):
    weights = np.random.default_rng(8).integers(10, 400, size=200).astype(float)
    sums = values * weights
    ours = weighted_bootstrap(sums, weights, transform=np.exp, resamples=10_000, confidence=0.9)

    def statistic(s, w, axis):
        return np.exp(s.sum(axis=axis) / w.sum(axis=axis))

    theirs = stats.bootstrap(
        (sums, weights), statistic, paired=True, confidence_level=0.9, n_resamples=10_000, method="percentile", rng=1
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.mean == pytest.approx(math.exp(sums.sum() / weights.sum()))
    assert ours.low == pytest.approx(theirs.low, abs=0.04 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.04 * width)


@pytest.mark.parametrize("kind", ["binary", "skewed"])
def test_coverage(kind):
    """A 95% interval holds the true mean in about 95% of the data sets (300 of them, 100 items each)."""
    generator = np.random.default_rng(3)
    draw, truth = {
        "binary": (lambda: generator.binomial(1, 0.3, size=100), 0.3),
        "skewed": (lambda: generator.gamma(2.0, size=100), 2.0),
    }[kind]
    covered = 0
    for number in range(300):
        interval = bootstrap(draw(), resamples=1000, seed=number)
        covered += interval.low <= truth <= interval.high
    assert 0.90 <= covered / 300 <= 0.99


@pytest.mark.parametrize("items", [8, 24])
def test_coverage_of_a_few(items):
    generator = np.random.default_rng(4)
    intervals = [bootstrap(generator.normal(1, 1, size=items)) for _ in range(400)]
    assert 0.93 <= np.mean([one.low <= 1 <= one.high for one in intervals]) <= 0.97


def test_same_seed_same_numbers(values):
    assert bootstrap(values, seed=5) == bootstrap(values, seed=5)
    assert bootstrap(values, seed=5) != bootstrap(values, seed=6)
    state = np.random.get_state()[1].copy()
    bootstrap(values)
    assert (np.random.get_state()[1] == state).all(), "the global generator belongs to the training run"


def test_memory_is_bounded_without_changing_much(values, monkeypatch):
    whole = bootstrap(values)
    monkeypatch.setattr(statistics, "_DRAWS_AT_ONCE", 1000)
    parts = bootstrap(values)
    assert parts.low == pytest.approx(whole.low, rel=0.02)
    assert parts.high == pytest.approx(whole.high, rel=0.02)


def test_more_confidence_is_wider(values):
    narrow, wide = bootstrap(values, confidence=0.5), bootstrap(values, confidence=0.99)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_edges():
    one = bootstrap([0.3])
    assert (one.mean, one.n) == (0.3, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert bootstrap([0.1] * 3) == Interval(pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1), 3)
    assert bootstrap([True, False, True, False]).mean == 0.5
    diverged = bootstrap([1.0, math.inf])
    assert diverged.mean == math.inf
    assert math.isnan(diverged.low)
    assert math.isnan(bootstrap([1.0, math.nan, 2.0]).mean)
    assert weighted_bootstrap([1e6, 1e6], [1, 2], transform=np.exp).mean == math.inf
    for function in (bootstrap, over_seeds):
        with pytest.raises(UserError, match="nothing to average"):
            function([])
    with pytest.raises(ValueError, match="one-dimensional"):
        bootstrap([[1.0], [2.0]])
    with pytest.raises(UserError, match="confidence"):
        bootstrap([1.0, 2.0], confidence=95)
    with pytest.raises(UserError, match="resamples"):
        bootstrap([1.0, 2.0], resamples=0)


def test_pairing_cancels_what_items_share(values):
    gain = np.random.default_rng(1).normal(0.1, 0.01, size=200)
    interval = paired_difference(values, values + gain)
    assert interval.mean == pytest.approx(gain.mean())
    assert interval.low > 0.09
    apart = bootstrap(values)
    assert interval.high - interval.low < 0.05 * (apart.high - apart.low)
    with pytest.raises(ValueError, match="before 2, after 3"):
        paired_difference([1, 2], [1, 2, 3])


def test_kl_per_token_weighs_by_tokens():
    # One long document at 1 nat per token, one short at 3: not the mean of the two means.
    assert weighted_bootstrap([90.0, 30.0], [90, 10]).mean == pytest.approx(1.2)
    assert weighted_bootstrap([90.0, 30.0], [90, 10]).n == 2
    equal = weighted_bootstrap([1.0, 2.0, 4.0, 8.0] * 8, [1] * 32)
    assert equal == bootstrap([1.0, 2.0, 4.0, 8.0] * 8)


def test_a_handful_of_documents_has_students_interval():
    values = [0.2, 0.1, 0.4, 0.3, 0.15]
    ours, theirs = weighted_bootstrap(values, [1] * 5), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (ours.low, ours.high) == (pytest.approx(theirs.low), pytest.approx(theirs.high))
    generator = np.random.default_rng(0)
    weights = generator.integers(50, 256, 8).astype(float)
    sums = weights * generator.gamma(4, 0.005, 8)
    ratio, spread = weighted_bootstrap(sums, weights), pseudo_values(sums, weights)
    assert (ratio.high - ratio.mean) == pytest.approx(stats.t.ppf(0.975, 7) * stats.sem(spread), rel=0.1)


def test_coverage_of_eight_documents():
    """Of documents of unequal length and unequal KL; the percentile bootstrap would hold 0.87."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(1500):
        weights = generator.integers(100, 256, 8).astype(float)
        interval = weighted_bootstrap(weights * generator.gamma(9, 0.002, 8), weights)
        covered += interval.low <= 0.018 <= interval.high
    assert 0.93 <= covered / 1500 <= 0.97


def test_documents_without_tokens_do_not_count():
    assert weighted_bootstrap([1.0, 0.0, 2.0], [2, 0, 2]) == weighted_bootstrap([1.0, 2.0], [2, 2])
    with pytest.raises(UserError, match="no document has a token"):
        weighted_bootstrap([0.0], [0])
    with pytest.raises(ValueError, match="negative"):
        weighted_bootstrap([1.0], [-1])
    with pytest.raises(ValueError, match="sums 1, weights 2"):
        weighted_bootstrap([1.0], [1, 2])


def test_perplexities_over_the_same_documents():
    generator = np.random.default_rng(2)
    tokens = generator.integers(50, 500, size=80).astype(float)
    base = tokens * generator.normal(2.9, 0.4, size=80)
    tuned = base + tokens * generator.normal(0.05, 0.005, size=80)
    difference = paired_weighted_difference(base, tuned, tokens, transform=np.exp)
    alone = [weighted_bootstrap(nll, tokens, transform=np.exp) for nll in (base, tuned)]
    assert difference.mean == pytest.approx(alone[1].mean - alone[0].mean)
    assert difference.low > 0
    assert difference.high - difference.low < alone[0].high - alone[0].low
    ratio = weighted_bootstrap(tuned - base, tokens, transform=np.exp)
    assert ratio.mean == pytest.approx(alone[1].mean / alone[0].mean)
    assert ratio.low < math.exp(0.05) < ratio.high
    same = paired_weighted_difference(base, base, tokens, transform=np.exp)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_over_seeds():
    runs = [0.41, 0.44, 0.47, 0.40]
    test = stats.ttest_1samp(runs, 0)
    expected = test.confidence_interval(0.95)
    found = over_seeds(runs)
    interval = found.interval()
    assert interval.mean == pytest.approx(0.43)
    assert (interval.low, interval.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert interval.n == 4
    assert (found.p, found.standard_errors) == (pytest.approx(test.pvalue), pytest.approx(test.statistic))
    assert over_seeds([0.5, 0.5]).interval() == Interval(0.5, 0.5, 0.5, 2)
    assert (over_seeds([0.5, 0.5]).p, over_seeds([0.0, 0.0]).p) == (None, 1.0)
    single = over_seeds([0.5]).interval()
    assert single.mean == 0.5
    assert math.isnan(single.low)


def test_over_seeds_and_items_adds_half_widths_in_squares():
    rng = np.random.default_rng(1)
    values = 0.3 + rng.normal(0, 0.2, (4, 1)) + rng.normal(0, 1, (1, 30)) + rng.normal(0, 0.5, (4, 30))
    found = over_seeds_and_items(values)

    def half(confidence):
        parts = [stats.ttest_1samp(values.mean(axis), 0).confidence_interval(confidence) for axis in (0, 1)]
        return math.hypot(*((part.high - part.low) / 2 for part in parts))

    interval = found.interval(0.9)
    assert (interval.mean, interval.n) == (pytest.approx(values.mean()), 4)
    assert (interval.high - interval.mean, interval.mean - interval.low) == pytest.approx((half(0.9), half(0.9)))
    assert found.p is not None
    assert half(1 - found.p) == pytest.approx(abs(values.mean()))  # the interval of that confidence ends at 0
    squared = stats.sem(values.mean(0)) ** 2 + stats.sem(values.mean(1)) ** 2
    assert found.standard_errors == pytest.approx(values.mean() / math.sqrt(squared))


@pytest.mark.parametrize(("between_seeds", "between_items"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.3, 1.0)])
def test_over_seeds_and_items_finds_nothing_where_nothing_is(between_seeds, between_items):
    """Of sweeps in which both rows are equal, hardly more than one in twenty differs at 5%, whatever scatters more."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(4000):
        seeds, items = rng.normal(0, between_seeds, (3, 1)), rng.normal(0, between_items, (1, 40))
        interval = over_seeds_and_items(seeds + items + rng.normal(0, 1, (3, 40))).interval()
        missed += not interval.low <= 0 <= interval.high
    assert missed / 4000 < 0.06


def test_one_seed_speaks_about_items_alone():
    values = np.random.default_rng(0).normal(0.1, 1, 50)
    test = stats.ttest_1samp(values, 0)
    found = over_seeds_and_items(values[None])
    assert found.p == pytest.approx(test.pvalue)
    assert math.isnan(over_seeds_and_items([[0.5]]).interval().low)
    assert over_seeds_and_items(np.zeros((3, 5))).p == 1.0
    # All seeds alike: what is left is the items.
    alike = over_seeds_and_items(np.stack([values] * 3))
    assert alike.p == pytest.approx(test.pvalue)


def test_pseudo_values_have_the_ratio_and_its_error():
    rng = np.random.default_rng(0)
    weights = rng.integers(20, 200, 150).astype(float)
    sums = weights * rng.gamma(2, 0.05, 150)
    values = pseudo_values(sums, weights)
    interval = weighted_bootstrap(sums, weights, resamples=4000)
    assert values.mean() == pytest.approx(sums.sum() / weights.sum())
    half = 1.96 * values.std(ddof=1) / np.sqrt(150)
    assert half == pytest.approx((interval.high - interval.low) / 2, rel=0.05)
    assert list(pseudo_values([1.0, 0.0, 1.0], np.ones(3))) == [1.0, 0.0, 1.0]
