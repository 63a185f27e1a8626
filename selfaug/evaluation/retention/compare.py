"""Base against tuned, item by item: was a benchmark's score kept?

    difference   tuned - base, with the paired bootstrap interval over the items
    retention    tuned / base, with the same
    mcnemar_p    exact p that the items lost and gained differ by chance, for items that are right or wrong

A benchmark whose base score cannot be told from guessing, or from nothing, says little about forgetting: it is marked
at_floor and left out of the mean. An instruction-level metric weighs every instruction the same, and is resampled by
prompt, whose instructions are answered together.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from selfaug.errors import UserError
from selfaug.evaluation.items import by_item
from selfaug.evaluation.retention.benchmarks import BENCHMARKS
from selfaug.evaluation.retention.harness import Scores
from selfaug.evaluation.statistics import (
    Interval,
    bootstrap,
    mcnemar,
    mean_of_ratios,
    paired_difference,
    paired_ratio,
    paired_weighted_difference,
    pseudo_values,
    weighted_bootstrap,
    wilson_low,
)
from selfaug.reporting.results import Metric

# Scores of free answers have no chance level; below one in a hundred there is nothing that could be forgotten.
_NOTHING = 0.01
# With fewer right answers of the base model the bootstrap of a ratio says nothing.
_FEW = 5


def compare(before: Scores, after: Scores | None, seed: int = 0) -> dict[str, Metric]:
    """metric -> {base, tuned, difference, retention: Interval, mcnemar_p, at_floor, main} and the tuned model's
    `by_item`; of the base alone where there is no tuned model."""
    benchmark = BENCHMARKS[before.benchmark]
    asked = [[(item.id, item.prompt, item.target) for item in side.items] for side in (before, after) if side]
    if asked[0] != asked[-1]:
        raise UserError(
            f"{before.benchmark}: base and tuned model were asked different items, so delete the run's evaluation "
            "folder and run it again."
        )
    return {
        metric: {
            **_metric(before.values(metric), None if after is None else after.values(metric), seed),
            **({} if after is None else by_item(asked[0], pseudo_values(*_by_item(after.values(metric))))),
            "at_floor": at_floor(before, metric),
            "main": metric == benchmark.main,
        }
        for metric in benchmark.metrics.values()
    }


def at_floor(scores: Scores, metric: str) -> bool:
    """Whether the 95% interval of the score reaches down to chance, or to (almost) nothing."""
    chance = max(BENCHMARKS[scores.benchmark].chance, _NOTHING)
    sums, weights = _by_item(scores.values(metric))
    # Of an instruction-level metric the same share of as many prompts: a prompt's instructions are no separate items.
    hits = round(len(sums) * sums.sum() / weights.sum())
    return wilson_low([1.0] * hits + [0.0] * (len(sums) - hits)) <= chance


def mean_retention(pairs: Sequence[tuple[Scores, Scores]], seed: int = 0) -> Metric:
    """{retention: Interval} and its `by_item`: the mean over the benchmarks that are not at their floor, by their main
    metrics; empty if all are."""
    columns, asked = [], []
    for before, after in pairs:
        metric = BENCHMARKS[before.benchmark].main
        if not at_floor(before, metric):
            columns.append((_by_item(before.values(metric))[0], _by_item(after.values(metric))[0]))
            asked += [(before.benchmark, item.id, item.prompt, item.target) for item in before.items]
    if not columns:
        return {}
    mean = mean_of_ratios(columns, seed=seed)
    # Of each benchmark the deviations from its own ratio, weighted so that their mean over all items is the mean of
    # the benchmarks' own means.
    deviations = []
    for first, second in columns:
        values = pseudo_values(second, first)
        deviations.append((values - values.mean()) * len(asked) / len(columns) / len(values))
    return {"retention": mean, **by_item(asked, mean.mean + np.concatenate(deviations))}


def averages(
    metrics: Mapping[str, Mapping[str, Sequence[float]]], asked: Sequence[Any], seed: int = 0
) -> dict[str, Metric]:
    """metric -> {base, tuned, difference} and the tuned model's `by_item` of plain values: {"base": [n], "tuned": [n]}
    by metric. asked: what identifies each of the n."""
    found = {}
    for name, values in metrics.items():
        found[name] = {part: bootstrap(column, seed=seed) for part, column in values.items()}
        if "tuned" in values and "base" in values:
            found[name]["difference"] = paired_difference(values["base"], values["tuned"], seed=seed)
        if "tuned" in values:
            found[name] |= by_item(asked, values["tuned"])
    return found


def _metric(before: Sequence[float | list[float]], after: Sequence[float | list[float]] | None, seed: int) -> Metric:
    first, weights = _by_item(before)
    single = all(not isinstance(value, list) for value in before)
    if after is None:
        return {"base": bootstrap(first, seed=seed) if single else weighted_bootstrap(first, weights, seed=seed)}
    second, _ = _by_item(after)
    ratio = paired_ratio(first, second, seed=seed)
    if first.sum() < _FEW:
        ratio = Interval(ratio.mean, math.nan, math.nan, ratio.n)
    if not single:
        return {
            "base": weighted_bootstrap(first, weights, seed=seed),
            "tuned": weighted_bootstrap(second, weights, seed=seed),
            "difference": paired_weighted_difference(first, second, weights, seed=seed),
            "retention": ratio,
        }
    metric: Metric = {
        "base": bootstrap(first, seed=seed),
        "tuned": bootstrap(second, seed=seed),
        "difference": paired_difference(first, second, seed=seed),
        "retention": ratio,
    }
    if np.isin(np.concatenate([first, second]), (0.0, 1.0)).all():
        metric["mcnemar_p"] = mcnemar(first, second)
    return metric


def _by_item(values: Sequence[float | list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each item, both [n]."""
    rows = [value if isinstance(value, list) else [value] for value in values]
    return np.array([sum(row) for row in rows], dtype=float), np.array([len(row) for row in rows], dtype=float)
