"""The columns of every table about many runs: how each number is called, read from a run, and which way is better."""

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from selfaug.evaluation.statistics import Interval
from selfaug.reporting.cells import Quantity, clean, interval_of
from selfaug.reporting.results import Metric, Results

Read = Callable[[Results], Interval | None]

TASK = {
    "exact_match": Quantity("Exact match (%)", 100, 1),
    "f1": Quantity("F1 (%)", 100, 1),
    "crag_score": Quantity("CRAG score (%)", 100, 1),
    "correct": Quantity("Correct (%)", 100, 1),
    "missing": Quantity("Missing (%)", 100, 1),
    "incorrect": Quantity("Incorrect (%)", 100, 1),
}
DRIFT = {
    "kl_base_tuned": Quantity("KL(base||tuned)"),
    "kl_tuned_base": Quantity("KL(tuned||base)"),
    "perplexity": Quantity("Perplexity", 1, 2),
    "perplexity_ratio": Quantity("Perplexity ratio", 1, 3),
}
STYLE = {"words": Quantity("words", 1, 1), "one_line": Quantity("one line (%)", 100, 1)}
KEPT = "kept"


@dataclass(frozen=True, slots=True)
class Measure:
    """One column."""

    key: str  # task/f1, drift/wikipedia/kl_base_tuned, retention/ifeval, kept, time
    group: str  # what it stands under in a table with room for two lines of headings
    short: str  # its heading there
    header: str  # its heading in a table with one line
    narrow: list[str]  # the same in lines of a few characters
    quantity: Quantity
    tuned: Read
    base: Read
    better: int  # 1: more is better; -1: less is; 0: neither
    # {items, asked} of the tuned model, as evaluation/items.py writes them; empty where there are none.
    by_item: Callable[[Results], Metric] = lambda run: {}


def measures(results: Sequence[Results]) -> list[Measure]:
    """What the runs have measured, in the order of the table. The three task scores and the time are always there."""
    found = [_task("EM", "exact_match"), _task("F1", "f1"), _task("CRAG", "crag_score")]
    for corpus in dict.fromkeys(corpus for run in results for corpus in run.drift):
        found.append(_drift(corpus, "kl_base_tuned", ["KL", "base||", "tuned"], 0.0))
        found.append(_drift(corpus, "kl_tuned_base", ["KL", "tuned||", "base"], 0.0))
        if any(_perplexity_ratio(run, corpus, "perplexity_ratio") is not None for run in results):
            found.append(_drift(corpus, "perplexity_ratio", ["ppl", "ratio"], 1.0))
    for benchmark in dict.fromkeys(benchmark for run in results for benchmark in run.retention):
        found.append(_benchmark(benchmark))
    # Of general instructions, whose answers shorten long before a benchmark moves. Neither way is better as such.
    if any("instructions" in run.style for run in results):
        found += [_style(name, quantity) for name, quantity in STYLE.items()]
    if any(run.retention_mean for run in results):
        found.append(
            Measure(KEPT, "Benchmarks", "kept (%)", "kept (%)", ["kept", "%"], Quantity("kept", 100, 1),
                    lambda run: interval_of(run.retention_mean, "retention"), _nothing, 1,
                    lambda run: run.retention_mean)
        )  # fmt: skip
    seconds = Quantity("training", 1, 0)
    title, lines = "training (s)", ["train-", "ing", "s"]
    found.append(Measure("time", "Cost", title, title, lines, seconds, _seconds, _nothing, -1))
    return found


def main_task(results: Sequence[Results], found: Sequence[Measure]) -> Measure | None:
    """The task score that plots and headlines speak of: CRAG's own for CRAG, else F1, which sees half a right answer;
    None where no run has it."""
    crag = any(str((run.config.get("data") or {}).get("name", "")).startswith("crag") for run in results)
    for key in ("task/crag_score", "task/f1") if crag else ("task/f1", "task/exact_match", "task/crag_score"):
        chosen = next((one for one in found if one.key == key), None)
        if chosen is not None and any(chosen.tuned(run) is not None for run in results):
            return chosen
    return None


def main_drift(found: Sequence[Measure]) -> Measure | None:
    """KL(base||tuned) on dialogues, where there are some: forgetting shows there first; else on the first corpus."""
    drifts = [one for one in found if one.key.startswith("drift/") and one.key.endswith("/kl_base_tuned")]
    return next((one for one in drifts if one.key.split("/")[1] == "dialogues"), drifts[0] if drifts else None)


def main_retention(found: Sequence[Measure]) -> Measure | None:
    """The mean share of benchmark scores that was kept; where no benchmark was measured, drift."""
    return next((one for one in found if one.key == KEPT), None) or main_drift(found)


def _nothing(run: Results) -> Interval | None:
    return None


def _task(header: str, name: str) -> Measure:
    def metric(run: Results) -> Metric:
        return run.task.get(name) or {}

    title = f"{header} (%)"
    return Measure(
        f"task/{name}", "Task", title, title, [header, "%"], TASK[name], *_parts(metric), better=1, by_item=metric
    )


def _drift(corpus: str, name: str, lines: list[str], base: float) -> Measure:
    read = _perplexity_ratio if name == "perplexity_ratio" else _kl
    # A model does not drift from itself, by definition: no interval.
    constant = Interval(base, math.nan, math.nan, 1)
    title, label = clean(corpus, 28), DRIFT[name].label
    return Measure(
        f"drift/{corpus}/{name}", f"Drift: {title}", label, f"{title} {label}", [*textwrap.wrap(title, 7), *lines],
        DRIFT[name], lambda run: read(run, corpus, name), lambda run: constant if corpus in run.drift else None, -1,
        lambda run: run.drift.get(corpus, {}).get(name) or {},
    )  # fmt: skip


def _benchmark(name: str) -> Measure:
    """Its main metric, the one that counts for the mean."""

    def metric(run: Results) -> Metric:
        return next((metric for metric in run.retention.get(name, {}).values() if metric.get("main")), {})

    title = clean(name, 28)
    lines = [*textwrap.wrap(title.replace("_", " "), 7), "%"]
    return Measure(
        f"retention/{name}", "Benchmarks", f"{title} (%)", f"{title} (%)", lines, Quantity(title, 100, 1),
        *_parts(metric), 1, metric,
    )  # fmt: skip


def _style(name: str, quantity: Quantity) -> Measure:
    """Of the answers to general instructions; the prompts are the same in every run."""

    def metric(run: Results) -> Metric:
        return run.style.get("instructions", {}).get(name) or {}

    title = quantity.label
    return Measure(f"style/{name}", "Style of answers", title, f"answers: {title}", textwrap.wrap(title, 7), quantity,
                   *_parts(metric), 0, metric)  # fmt: skip


def _parts(metric: Callable[[Results], Metric]) -> tuple[Read, Read]:
    """How to read the tuned and the base model's number."""
    return (lambda run: interval_of(metric(run), "tuned"), lambda run: interval_of(metric(run), "base"))


def _kl(run: Results, corpus: str, name: str) -> Interval | None:
    return interval_of(run.drift.get(corpus, {}).get(name), "tuned")


def _perplexity_ratio(run: Results, corpus: str, name: str) -> Interval | None:
    """As measured, with its paired interval; else from the two perplexities, which gives no interval."""
    metrics = run.drift.get(corpus, {})
    if (measured := interval_of(metrics.get(name), "tuned")) is not None:
        return measured
    base, tuned = (interval_of(metrics.get("perplexity"), part) for part in ("base", "tuned"))
    if base is None or tuned is None or not base.mean:
        return None
    return Interval(tuned.mean / base.mean, math.nan, math.nan, tuned.n)


def _seconds(run: Results) -> Interval | None:
    # Not the evaluation: whoever comes first measures the base model for all.
    steps = run.time.get("fit_s")
    before = [run.time.get(part) or 0.0 for part in ("prepare_s", "reference_s")]
    return None if steps is None else Interval(steps + sum(before), math.nan, math.nan, 1)
