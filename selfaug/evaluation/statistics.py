"""Error bars: percentile bootstrap intervals of means, of ratios of sums, and of paired differences.

The bootstrap (Efron and Tibshirani 1993, chapter 13) draws the items that were measured (questions, documents)
again with replacement and asks how much the number would have moved. It therefore speaks about other questions of
the same kind, not about other training runs: for those, train with several seeds and use `over_seeds`.

Everything is a function of its arguments and the seed. One item has no spread, so its interval is NaN; items that
are all equal have an interval of width zero, which says more about the sample than about the world.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import brentq
from scipy.special import stdtrit

from selfaug.errors import UserError

Array = NDArray[np.float64]
Transform = Callable[[Array], Array]

# Of a handful of items the percentile bootstrap of a mean is a fifth too narrow.
_FEW = 30
# Indices drawn at once: 2**22 of 8 bytes are 32 MiB, whatever the number of items.
_DRAWS_AT_ONCE = 2**22


@dataclass(frozen=True, slots=True)
class Interval:
    """A number and its interval, in the unit of what was measured. `n`: the items (or seeds) behind it.

    `low` and `high` are NaN where there is no interval (a single item, or values that are not finite).
    """

    mean: float
    low: float
    high: float
    n: int


def bootstrap(values: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """The mean of the values and its percentile bootstrap interval; of fewer than 30 values Student's."""
    column = _column(values, "values")
    ones = np.ones(len(column))
    return _interval([column, ones], lambda s: s[0] / s[1], confidence, resamples, seed, few=_FEW)


def paired_difference(
    before: ArrayLike, after: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The mean of after - before, item by item over the same items: what both find hard cancels out."""
    first, second = _column(before, "before"), _column(after, "after")
    _same_length(before=first, after=second)
    return bootstrap(second - first, confidence=confidence, resamples=resamples, seed=seed)


def weighted_bootstrap(
    sums: ArrayLike,
    weights: ArrayLike,
    *,
    transform: Transform | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """transform(sum(sums) / sum(weights)), resampling documents (tokens of one document are not independent).

    With fewer than 30 documents Student's interval over the jackknife's pseudo-values (the same, chapter 11).

    KL per token in nats: `sums` the KL summed over each document's rows, `weights` their number. Perplexity: the
    NLL summed per document, `transform=np.exp`. Perplexity of the tuned model over that of the base: the tuned
    minus the base NLL per document, `transform=np.exp` (paired, since both are summed over the same documents).
    """
    numerator, tokens = _with_tokens(sums, weights)
    apply = transform or _identity
    return _interval([numerator, tokens], lambda s: apply(s[0] / s[1]), confidence, resamples, seed, few=_FEW)


def paired_weighted_difference(
    before: ArrayLike,
    after: ArrayLike,
    weights: ArrayLike,
    *,
    transform: Transform | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """transform(sum(after) / sum(weights)) - transform(sum(before) / sum(weights)) over the same documents.

    Difference of two perplexities: NLL sums in nats and `transform=np.exp`.
    """
    first, tokens = _with_tokens(before, weights)
    second, _ = _with_tokens(after, weights)
    apply = transform or _identity
    return _interval(
        [first, second, tokens],
        lambda s: apply(s[1] / s[2]) - apply(s[0] / s[2]),
        confidence,
        resamples,
        seed,
        few=_FEW,
    )


def paired_ratio(
    before: ArrayLike,
    after: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """sum(after) / sum(before) over the same items; NaN where before is 0 throughout. Resamples in which it is 0 are
    left out."""
    first, second = _column(before, "before"), _column(after, "after")
    _same_length(before=first, after=second)
    return _interval([first, second], lambda s: np.where(s[0] == 0, np.nan, s[1] / s[0]), confidence, resamples, seed)


def mean_of_ratios(
    pairs: Sequence[tuple[ArrayLike, ArrayLike]], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The mean over several sets of items of sum(after) / sum(before), each set resampled apart. n: the sets."""
    generator = np.random.default_rng(seed)
    columns = [(_column(before, "before"), _column(after, "after")) for before, after in pairs]
    means = np.mean([after.sum() / before.sum() for before, after in columns])
    replicates = np.zeros(resamples)
    with np.errstate(all="ignore"):
        for before, after in columns:
            _same_length(before=before, after=after)
            for r in range(resamples):
                draw = generator.integers(0, len(before), len(before))
                replicates[r] += after[draw].sum() / before[draw].sum() / len(columns)
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(np.where(np.isfinite(replicates), replicates, np.nan), [tail, 1 - tail])
    return Interval(float(means), float(low), float(high), len(columns))


def mcnemar(before: ArrayLike, after: ArrayLike) -> float:
    """Exact two-sided p of McNemar's test (1947): of the items that only one of the two got right (values 0 or 1), is
    the split compatible with half and half? 1 where there are none."""
    first, second = _column(before, "before"), _column(after, "after")
    _same_length(before=first, after=second)
    lost, gained = int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum())
    return float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def wilson_low(values: ArrayLike, confidence: float = 0.95) -> float:
    """Lower end of the Wilson interval of a share (values in 0..1), which zero successes do not shrink to nothing."""
    column = _column(values, "values")
    return float(stats.binomtest(round(column.sum()), len(column)).proportion_ci(confidence, "wilson").low)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and how sure it is. n: the seeds behind it.

    parts: (variance of the mean, degrees of freedom with which it was estimated) of each source of chance; none where
    there is nothing to estimate them from.
    """

    mean: float
    parts: tuple[tuple[float, float], ...]
    n: int

    def interval(self, confidence: float = 0.95) -> Interval:
        """The mean ± Student's half widths of the parts, added in squares (MOVER, Zou and Donner 2008)."""
        half = self._half_width(1 - confidence) if self.parts else math.nan
        return Interval(self.mean, self.mean - half, self.mean + half, self.n)

    @property
    def standard_errors(self) -> float | None:
        """How many of them the mean is away from 0; None where the error is 0 or unknown."""
        squared = sum(variance for variance, _ in self.parts)
        return self.mean / math.sqrt(squared) if squared > 0 else None

    @property
    def p(self) -> float | None:
        """1 minus the confidence of the interval that ends at 0; with one part the p of Student's two-sided test. None
        where the error is unknown, or 0 with a mean that is not."""
        if not self.parts or not any(variance > 0 for variance, _ in self.parts):
            return 1.0 if self.parts and self.mean == 0 else None
        smallest = 1e-12
        if self._half_width(smallest) <= abs(self.mean):
            return smallest
        return float(brentq(lambda p: self._half_width(p) - abs(self.mean), smallest, 1.0, xtol=1e-13, rtol=1e-9))

    def _half_width(self, p: float) -> float:
        return math.sqrt(sum(variance * float(stdtrit(df, p / 2)) ** 2 for variance, df in self.parts))


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean over a few independent runs (seeds), for other seeds: Student's t.

    Not a bootstrap: resampling three or five values gives intervals that are far too narrow.
    """
    column = _column(values, "values")
    return Estimate(float(column.mean()), _parts(column), len(column))


def over_seeds_and_items(values: ArrayLike) -> Estimate:
    """The mean of values [seeds, items], for other seeds *and* other items of their kind. Of one seed: for other items.

    The items are the same for every seed, so their part does not shrink with the number of seeds. What seeds and items
    have in common counts in both parts, which errs on the side of caution.
    """
    table = np.asarray(values, dtype=np.float64)
    return Estimate(float(table.mean()), _parts(table.mean(axis=1)) + _parts(table.mean(axis=0)), len(table))


def pseudo_values(sums: ArrayLike, weights: ArrayLike) -> Array:
    """[n]: for each item a value, such that their mean is sum(sums) / sum(weights), and the standard error of that
    mean is that of the ratio to first order (its influence function). With equal weights: sums / weights."""
    numerator, tokens = _column(sums, "sums"), _column(weights, "weights")
    _same_length(sums=numerator, weights=tokens)
    with np.errstate(all="ignore"):
        ratio = numerator.sum() / tokens.sum()
        return ratio + len(tokens) * (numerator - ratio * tokens) / tokens.sum()


def _parts(means: Array) -> tuple[tuple[float, float], ...]:
    """The variance of the mean of these, as Estimate has it; exactly 0 where they are the same but for rounding."""
    n = len(means)
    if n < 2 or not np.isfinite(means).all():
        return ()
    alike = np.ptp(means) <= 1e-12 * np.abs(means).max()
    return ((0.0 if alike else float(means.var(ddof=1)) / n, n - 1),)


def _interval(
    columns: list[Array],
    statistic: Callable[[Array], Array],
    confidence: float,
    resamples: int,
    seed: int,
    few: int = 0,
) -> Interval:
    """`statistic` maps sums of the columns [C, R] to values [R]; it must not care how R is split. few: with fewer items
    Student's interval over the jackknife's pseudo-values, since the percentile bootstrap is too narrow then."""
    if not 0 < confidence < 1:
        raise UserError(f"confidence is {confidence}: it must lie between 0 and 1, such as 0.95.")
    if resamples < 1:
        raise UserError(f"resamples is {resamples}: it must be at least 1, such as 2000.")
    table = np.stack(columns)  # [C, N]
    n = table.shape[1]
    # A run that diverged has infinite perplexity: that is a result to print, not a warning.
    with np.errstate(all="ignore"):
        value = float(statistic(table.sum(axis=1, keepdims=True))[0])
        if n == 1 or not math.isfinite(value):
            return Interval(value, math.nan, math.nan, n)
        if (table == table[:, :1]).all():
            # Every resample is the sample; summing would only add rounding.
            return Interval(value, value, value, n)
        if n < few:
            without = statistic(table.sum(axis=1, keepdims=True) - table)  # [N], each item left out once
            half = stats.t.ppf((1 + confidence) / 2, n - 1) * (n - 1) * without.std(ddof=1) / math.sqrt(n)
            return Interval(value, value - float(half), value + float(half), n)
        generator = np.random.default_rng(seed)
        at_once = max(1, _DRAWS_AT_ONCE // n)
        replicates: list[Array] = []
        for start in range(0, resamples, at_once):
            draws = generator.integers(0, n, size=(min(at_once, resamples - start), n))  # [R, N]
            replicates.append(statistic(np.stack([column[draws].sum(axis=1) for column in table])))
        tail = (1 - confidence) / 2
        drawn = np.concatenate(replicates)
        low, high = np.quantile(drawn[~np.isnan(drawn)], [tail, 1 - tail])
    return Interval(value, float(low), float(high), n)


def _identity(values: Array) -> Array:
    return values


def _column(values: ArrayLike, name: str) -> Array:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, not of shape {column.shape}")
    if column.size == 0:
        raise UserError(f"There is nothing to average ({name} is empty): the evaluation set needs at least one item.")
    return column


def _same_length(**columns: Array) -> None:
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
        raise ValueError(f"these must belong to the same items, one by one, but differ in length: {lengths}")


def _with_tokens(sums: ArrayLike, weights: ArrayLike) -> tuple[Array, Array]:
    """Both as columns, without the documents that have no tokens: a resample of only those would be 0 / 0."""
    numerator, tokens = _column(sums, "sums"), _column(weights, "weights")
    _same_length(sums=numerator, weights=tokens)
    if (tokens < 0).any():
        raise ValueError("weights must not be negative")
    kept = tokens > 0
    if not kept.any():
        raise UserError("There is nothing to average (no document has a token): the corpus needs longer documents.")
    return numerator[kept], tokens[kept]
