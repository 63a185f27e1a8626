"""Many runs as rows: one for each setting, its seeds together, each against plain LoRA.

A row's number is the mean over its seeds. Its difference to plain LoRA is taken seed by seed (both runs of a seed see
the same examples in the same order) and item by item (both answer the same questions), and the test asks whether the
mean of these differences could be 0 for other seeds and other items. With one seed there is no such test: the
difference has an interval over the items and claims nothing about other seeds. Where the items differ from run to run,
or results hold none, their chance lies in the differences of the seeds, and the seeds alone are tested.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from selfaug.evaluation.statistics import Estimate, Interval, over_seeds, over_seeds_and_items
from selfaug.reporting.cells import clean
from selfaug.reporting.labels import baseline_key, is_plain, row_key, row_labels, trained_otherwise
from selfaug.reporting.measures import Measure, main_drift, main_retention, main_task, measures
from selfaug.reporting.results import Results

SIGNIFICANT = 0.05
_HALF_WIDTH = 1.96  # standard errors, of a 95% interval


@dataclass(eq=False)
class Row:
    """The runs that differ only by the seed. runs: the finished ones by seed; members: all, as places in the list."""

    label: str
    plain: bool
    members: list[int]
    runs: dict[int, Results]
    baseline: "Row | None" = None

    def value(self, measure: Measure) -> Interval | None:
        """The mean over the seeds, None where one of them has no number; of one seed its own, with its interval over
        the items."""
        runs = list(self.runs.values())
        values = [measure.tuned(run) for run in runs]
        if len(values) == 1:
            return values[0]
        # A mean over the seeds that happened to have a number would be a mean of something else.
        known = [value.mean for value in values if value is not None and not math.isnan(value.mean)]
        return estimate(known, _items(runs, measure)).interval() if known and len(known) == len(values) else None


@dataclass(frozen=True, slots=True)
class Difference:
    """One row minus another. paired: by `seeds` seeds, with the p of a test and the mean in standard errors (None where
    all differences are the same); otherwise there is only an interval. items: by how many items it is paired too."""

    interval: Interval
    paired: bool
    seeds: int
    items: int = 0
    p: float | None = None
    standard_errors: float | None = None
    p_items: float | None = None  # of one seed: for other items

    @property
    def telling(self) -> bool:
        """Whether 5% separate it from 0: by the test, or, without one, by an interval that leaves 0 out."""
        if self.paired:
            return self.p is not None and self.p < SIGNIFICANT
        return not (self.interval.low <= 0 <= self.interval.high) and not math.isnan(self.interval.low)


def rows_of(results: Sequence[Results]) -> list[Row]:
    """The rows in the order in which their first runs stand."""
    labels = row_labels([run.config for run in results])
    found: dict[str, Row] = {}
    for index, run in enumerate(results):
        key = row_key(run.config) + str(is_plain(run.config))
        if key not in found:
            found[key] = Row(labels[index] or clean(run.name, 40), is_plain(run.config), [], {})
        found[key].members.append(index)
        if run.status == "finished":
            # The same seed twice (a copied directory) is not a second opinion.
            found[key].runs[run.seed] = run
    rows = list(found.values())
    plain = {baseline_key(results[row.members[0]].config): row for row in rows if row.plain and row.runs}
    for row in rows:
        if not row.plain:
            config = results[row.members[0]].config
            row.baseline = plain.get(baseline_key(config))
            if row.baseline is None and len(plain) == 1:
                # Full fine-tuning has no plain LoRA of its own settings; where there is one only, it is meant.
                (only,) = plain.values()
                if trained_otherwise(config, results[only.members[0]].config):
                    row.baseline = only
    return rows


def estimate(means: Sequence[float], items: np.ndarray | None) -> Estimate:
    """The mean over seeds with its error. items: [seeds, items], where all seeds have the same."""
    if items is None:
        return over_seeds(means)
    # The items were written to six digits only.
    return replace(over_seeds_and_items(items), mean=float(np.mean(means)))


def _items(runs: Sequence[Results], measure: Measure) -> np.ndarray | None:
    """[runs, items]: what each item contributed; None where the runs have no items, or not the same."""
    found = [measure.by_item(run) for run in runs]
    asked = {(one.get("asked"), len(one.get("items") or [])) for one in found}
    if len(asked) != 1 or not found[0].get("items") or not found[0].get("asked"):
        return None
    values = np.array([one["items"] for one in found], dtype=float)
    return values if np.isfinite(values).all() else None


def difference(row: Row, other: Row, measure: Measure) -> Difference | None:
    """row - other; None where one of them has no number, and where both have several seeds and none in common."""
    seeds = [seed for seed in row.runs if seed in other.runs]
    deltas: dict[int, float] = {}
    for seed in seeds:
        a, b = measure.tuned(row.runs[seed]), measure.tuned(other.runs[seed])
        if a is None or b is None or math.isnan(a.mean - b.mean):
            return None  # the other seeds alone would be a choice of those that went well
        deltas[seed] = a.mean - b.mean
    both = _items([runs[seed] for runs in (row.runs, other.runs) for seed in deltas], measure) if deltas else None
    gaps = None if both is None else both[: len(deltas)] - both[len(deltas) :]
    items = 0 if gaps is None else gaps.shape[1]
    if len(deltas) > 1 or gaps is not None:
        found = estimate(list(deltas.values()), gaps)
        if len(deltas) == 1:
            return Difference(found.interval(), False, 1, items, p_items=found.p)
        return Difference(found.interval(), True, len(deltas), items, found.p, found.standard_errors)
    if not seeds and max(len(row.runs), len(other.runs)) > 1:
        return None
    # One seed, the same if they have one in common, as two independent samples of items.
    ours, theirs = (
        measure.tuned(one.runs[seeds[0]] if seeds else next(iter(one.runs.values()))) for one in (row, other)
    )
    if ours is None or theirs is None or math.isnan(ours.mean - theirs.mean):
        return None
    half = math.hypot((ours.high - ours.low) / 2, (theirs.high - theirs.low) / 2)
    mean = ours.mean - theirs.mean
    # By the normal distribution, of which the interval is. With different seeds it is of both, and there is no test.
    p = math.erfc(abs(mean) / (half / _HALF_WIDTH) / math.sqrt(2)) if seeds and half > 0 else None
    return Difference(Interval(mean, mean - half, mean + half, 1), False, 1, p_items=p)


def holm(values: Sequence[float], tests: int = 0) -> list[float]:
    """Holm's (1979) adjusted p values: below 0.05 they stay so although so many were looked at. tests: how many, where
    that is more than these."""
    adjusted, highest, tests = [0.0] * len(values), 0.0, max(tests, len(values))
    for place, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = max(highest, min(1.0, (tests - place) * values[index]))
        adjusted[index] = highest
    return adjusted


def adjusted_p(gaps: Sequence[Difference | None], one_seed: bool = False, tests: int = 0) -> list[float | None]:
    """p of each difference after Holm's correction for their number, or for that of `tests`; None where there is no
    test. one_seed: of the test for other items, which is all that one seed allows."""
    found = [None if gap is None else gap.p_items if one_seed else gap.p for gap in gaps]
    tested = {index: p for index, p in enumerate(found) if p is not None}
    adjusted = dict(zip(tested, holm(list(tested.values()), tests), strict=True))
    return [adjusted.get(index) for index in range(len(gaps))]


@dataclass
class Comparison:
    """All rows and columns of a report, worked out once. Plain LoRA stands first, as in the papers' tables."""

    results: Sequence[Results]
    measures: list[Measure] = field(init=False)
    rows: list[Row] = field(init=False)

    def __post_init__(self) -> None:
        finished = [run for run in self.results if run.status == "finished"]
        self.measures = [
            one for one in measures(self.results) if any(one.tuned(run) is not None for run in finished)
        ]  # fmt: skip
        rows = [row for row in rows_of(self.results) if row.runs]
        self.rows = [row for row in rows if row.plain] + [row for row in rows if not row.plain]
        self.task, self.retention = main_task(finished, self.measures), main_retention(self.measures)
        self.drift = main_drift(self.measures)

    @cached_property
    def values(self) -> list[list[Interval | None]]:
        """[row][measure]"""
        return [[row.value(one) for one in self.measures] for row in self.rows]

    @cached_property
    def differences(self) -> list[list[Difference | None]]:
        """[row][measure], to plain LoRA; None of plain LoRA itself, and where it was not run."""
        return [
            [None if row.baseline is None else difference(row, row.baseline, one) for one in self.measures]
            for row in self.rows
        ]

    @cached_property
    def adjusted(self) -> list[list[float | None]]:
        """[row][measure]: p of the difference to plain LoRA, after Holm's correction for the rows of the column; None
        where there is no test."""
        columns = [adjusted_p(list(column)) for column in zip(*self.differences, strict=True)]
        return [list(row) for row in zip(*columns, strict=True)] if columns else [[] for _ in self.rows]

    @cached_property
    def marks(self) -> list[list[str]]:
        """[row][measure]: * for p < 0.05, ** where that holds after Holm's correction for the rows of the column."""
        return [
            [mark(gap, p) for gap, p in zip(*both, strict=True)]
            for both in zip(self.differences, self.adjusted, strict=True)
        ]

    @cached_property
    def base(self) -> list[Interval | None] | None:
        """[measure] of the base model; None where the runs have different ones: no one row could stand for them."""
        runs = [run for row in self.rows for run in row.runs.values()]
        seen = {base_means(run, self.measures) for run in runs}
        return [one.base(runs[0]) for one in self.measures] if len(seen) == 1 else None

    @cached_property
    def best(self) -> list[int | None]:
        """[measure]: the row with the best mean; None where there is nothing to choose from."""
        found: list[int | None] = []
        for column, one in enumerate(self.measures):
            known = {i: v.mean for i, line in enumerate(self.values) if (v := line[column]) and not math.isnan(v.mean)}
            ranked = sorted(known, key=known.__getitem__, reverse=one.better > 0)
            found.append(ranked[0] if one.better and len(set(known.values())) > 1 else None)
        return found

    def value(self, row: int, measure: Measure | None) -> Interval | None:
        """A row's number; None where it has none."""
        return None if measure is None else self.values[row][self.measures.index(measure)]

    @cached_property
    def front(self) -> list[int]:
        """The rows that no other row beats at both the task and retention (Pareto front)."""
        return self.front_at(self.retention)

    def front_at(self, kept: Measure | None) -> list[int]:
        """The same at the task and another measure."""
        points: dict[int, tuple[float, float]] = {}
        for index in range(len(self.rows)):
            score, value = self.value(index, self.task), self.value(index, kept)
            if score is None or value is None or not self.task or not kept:
                continue
            if math.isfinite(score.mean) and math.isfinite(value.mean):
                points[index] = (self.task.better * score.mean, kept.better * value.mean)
        return [i for i, p in points.items() if not any(_beats(q, p) for q in points.values())]


def base_means(run: Results, of: Sequence[Measure]) -> tuple[str, ...]:
    """What the base model has scored beside a run, as it is printed: equal for runs on the same model and data."""
    return tuple(one.quantity.number(base.mean) if (base := one.base(run)) else "" for one in of)


def mark(gap: Difference | None, adjusted: float | None) -> str:
    """* for p < 0.05, ** where that holds after the correction."""
    if gap is None or gap.p is None or adjusted is None:
        return ""
    return "**" if adjusted < SIGNIFICANT else "*" if gap.p < SIGNIFICANT else ""


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))
