"""How drift and forgetting go together: rank correlations with intervals."""

import math
from collections.abc import Sequence

from scipy import stats

from selfaug.evaluation.statistics import Interval, over_seeds
from selfaug.reporting.results import Results

LEAST_POINTS = 4  # the interval below divides by sqrt(n - 3)


def rank_correlation(x: Sequence[float], y: Sequence[float], *, confidence: float = 0.95) -> Interval | None:
    """Spearman's correlation with the interval of Bonett and Wright (2000): Fisher's z with the standard error
    sqrt((1 + r^2 / 2) / (n - 3)). None for fewer than four points, or where x or y does not vary.

    The points must be independent: rows, not the seeds of a row or the steps of a run.
    """
    if len(x) < LEAST_POINTS or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    r = float(stats.spearmanr(x, y).statistic)
    if abs(r) > 1 - 1e-12:  # Fisher's z is infinite there
        return Interval(r, math.nan, math.nan, len(x))
    half = float(stats.norm.ppf((1 + confidence) / 2)) * math.sqrt((1 + r * r / 2) / (len(x) - 3))
    z = math.atanh(r)
    return Interval(r, math.tanh(z - half), math.tanh(z + half), len(x))


def within_runs(runs: Sequence[Results]) -> Interval | None:
    """The correlation of probe/drift_* (the first corpus) with probe/ifeval_* over the probes of a run: one number for
    each run, and over the runs the mean with Student's interval. (On Fisher's scale a perfect order, which is common
    with four probes, would be infinite.) The probes of one run follow one another, so an interval over them would be
    far too narrow. None where fewer than two runs have four probes."""
    found = [one for run in runs if (one := _of_probes(run)) is not None]
    if len(found) < 2:
        return None
    mean = over_seeds(found).interval()
    return Interval(mean.mean, max(mean.low, -1.0), min(mean.high, 1.0), len(found))


def _of_probes(run: Results) -> float | None:
    drift = next((curve for name, curve in sorted(run.curves.items()) if name.startswith("probe/drift_")), [])
    score = next((curve for name, curve in sorted(run.curves.items()) if name.startswith("probe/ifeval")), [])
    at, kept = ({int(step): value for step, value in curve} for curve in (drift, score))
    steps = [step for step in at if step in kept]
    x, y = [at[step] for step in steps], [kept[step] for step in steps]
    if len(steps) < LEAST_POINTS or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return float(stats.spearmanr(x, y).statistic)
