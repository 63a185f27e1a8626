"""Results on the terminal: one run in full (`results_table`, `samples_panel`), many runs side by side
(`comparison_table`, and `as_markdown` for the same as Markdown).

Text of users and models goes into rich as `Text`, never as markup: an answer such as "[red]" must print as it is.
"""

import json
import math
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from selfaug.evaluation.statistics import Interval, over_seeds_and_items, t_interval
from selfaug.reporting.cells import NOTHING, Quantity, clean, interval_of
from selfaug.reporting.results import Results

_TASK = {
    "exact_match": Quantity("Exact match (%)", 100, 1),
    "f1": Quantity("F1 (%)", 100, 1),
    "crag_score": Quantity("CRAG score (%)", 100, 1),
    "correct": Quantity("Correct (%)", 100, 1),
    "missing": Quantity("Missing (%)", 100, 1),
    "incorrect": Quantity("Incorrect (%)", 100, 1),
}
_DRIFT = {
    "kl_base_tuned": Quantity("KL(base||tuned)"),
    "kl_tuned_base": Quantity("KL(tuned||base)"),
    "perplexity": Quantity("Perplexity", 1, 2),
    "perplexity_ratio": Quantity("Perplexity ratio", 1, 3),
}


def console() -> Console:
    """The terminal, or, where the output goes to a file, a page wide enough for every table."""
    return Console() if sys.stdout.isatty() else Console(width=110)


def results_table(results: Results) -> Table | None:
    """Task and drift of one run, for the base and the tuned model, and the difference, with 95% intervals; None where
    neither was measured."""
    if not results.task and not results.drift:
        return None
    title = Text(f"{clean(results.name, 60)}, seed {results.seed}", style="bold")
    table = Table(box=box.SIMPLE_HEAD, title=title, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
    table.add_column("", max_width=14, overflow="fold")
    table.add_column("Metric", no_wrap=True)
    for name in ("Base", "Tuned", "Difference"):
        table.add_column(name, justify="right", overflow="fold")
    groups = [("task", results.task, _TASK)]
    groups += [(corpus, metrics, _DRIFT) for corpus, metrics in results.drift.items()]
    for group, metrics, known in groups:
        names = [name for name in known if name in metrics] + [name for name in metrics if name not in known]
        for index, name in enumerate(names):
            quantity = known.get(name, Quantity(name.replace("_", " ")))
            parts = [interval_of(metrics[name], part) for part in ("base", "tuned", "difference")]
            cells = [quantity.cell(part, sign=index == 2) for index, part in enumerate(parts)]
            first = Text(clean(group, 40) if index == 0 else "", style="bold")
            label = Text(clean(quantity.label, 24))
            table.add_row(first, label, *map(Text, cells), end_section=index == len(names) - 1)
    table.caption = Text(_caption(results), justify="left")
    return table


def _caption(results: Results) -> str:
    questions = {part.n for metric in results.task.values() if (part := interval_of(metric, "tuned"))}
    asked = f"{max(questions):,} questions. " if questions else ""
    return f"{asked}In brackets: 95% intervals (bootstrap over questions or documents). KL in nats per token."


def samples_panel(results: Results, n: int = 3) -> Panel:
    """The first `n` sample questions with the base model's and the tuned model's answers."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for index, sample in enumerate(results.samples[:n]):
        if index:
            grid.add_row()
        accepted = " · ".join(clean(answer, 80) for answer in sample["answers"][:4])
        grid.add_row("question", Text(clean(sample["question"], 200), style="bold"))
        for name, text in (("accepted", accepted), ("base", sample["base"]), ("tuned", sample["tuned"])):
            grid.add_row(name, Text(clean(text, 240) or "(nothing)"))
    return Panel(grid if grid.rows else Text("no samples"), title="Sample answers", title_align="left")


# ---------------------------------------------------------------------------------------------------------------------
# Many runs


def comparison_table(results: Sequence[Results]) -> Table:
    """One row per run, named by the settings that differ; runs that differ only by the seed get a mean row too."""
    columns, rows = _comparison(results)
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    height = max(len(column.narrow) for column in columns)
    table.add_column("\n" * (height - 1) + "run", overflow="fold")
    for column in columns:
        lines = [""] * (height - len(column.narrow)) + column.narrow
        # Only the label may break: half a number is worse than none.
        table.add_column(Text("\n".join(lines)), justify="right", no_wrap=True)
    for row in rows:
        label, *numbers = row.cells
        # The spread goes below the number: ten columns then fit on a terminal of 80.
        cells = [Text(label), *(Text(number.replace(" ±", "\n±")) for number in numbers)]
        table.add_row(*cells, style="bold" if row.summary else None)
    table.caption = Text(_COMPARISON_NOTE, justify="left")
    return table


def as_markdown(results: Sequence[Results]) -> str:
    """`comparison_table` as a Markdown table, with its note below."""
    columns, rows = _comparison(results)
    lines = [["run", *(column.header for column in columns)], ["---"] + ["---:"] * len(columns)]
    # A row of means is set in bold by its label alone: bold numbers mean "the best" in most papers.
    lines += [[f"**{row.cells[0]}**" if row.summary else row.cells[0], *row.cells[1:]] for row in rows]
    body = "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
    return f"{body}\n\n{_COMPARISON_NOTE}\n"


_COMPARISON_NOTE = (
    "± is half a 95% interval: over questions or documents in the row of a run, over seeds (Student t; of general "
    "benchmarks over their items too) in a row of means. kept: tuned / base, averaged over the benchmarks that are "
    "above chance. KL in nats per token; ppl ratio: perplexity of the tuned model / of the base."
)


@dataclass(frozen=True, slots=True)
class _Row:
    cells: list[str]
    summary: bool = False


@dataclass(frozen=True, slots=True)
class _Column:
    header: str
    narrow: list[str]  # the same in lines of a few characters
    quantity: Quantity
    tuned: Callable[[Results], Interval | None]
    base: Callable[[Results], Interval | None]
    # Whether a mean over seeds also carries the uncertainty of the items, which are the same for every seed.
    same_items: bool = False


def _columns(results: Sequence[Results]) -> list[_Column]:
    def task(header: str, name: str) -> _Column:
        def read(part: str) -> Callable[[Results], Interval | None]:
            return lambda run: interval_of(run.task.get(name), part)

        return _Column(f"{header} (%)", [header, "%"], _TASK[name], read("tuned"), read("base"))

    def drift(corpus: str, name: str, lines: list[str], base: float) -> _Column:
        read = _perplexity_ratio if name == "perplexity_ratio" else _kl
        # A model does not drift from itself, by definition: no interval.
        constant = Interval(base, math.nan, math.nan, 1)
        shown = clean(corpus, 28)
        return _Column(
            f"{shown} {_DRIFT[name].label}",
            [*textwrap.wrap(shown, 7), *lines],
            _DRIFT[name],
            lambda run: read(run, corpus, name),
            lambda run: constant if corpus in run.drift else None,
        )

    columns = [task("EM", "exact_match"), task("F1", "f1"), task("CRAG", "crag_score")]
    for corpus in dict.fromkeys(corpus for run in results for corpus in run.drift):
        columns.append(drift(corpus, "kl_base_tuned", ["KL", "base||", "tuned"], 0.0))
        columns.append(drift(corpus, "kl_tuned_base", ["KL", "tuned||", "base"], 0.0))
        columns.append(drift(corpus, "perplexity_ratio", ["ppl", "ratio"], 1.0))
    for benchmark in dict.fromkeys(benchmark for run in results for benchmark in run.retention):
        columns.append(_benchmark(benchmark))
    if any(run.retention_mean for run in results):
        columns.append(
            _Column("kept (%)", ["kept", "%"], Quantity("kept", 100, 1),
                    lambda run: interval_of(run.retention_mean, "retention"), lambda run: None, same_items=True)
        )  # fmt: skip
    columns.append(_Column("time (s)", ["time", "s"], Quantity("time", 1, 0), _seconds, lambda run: None))
    return columns


def _benchmark(name: str) -> _Column:
    """Its main metric, the one that counts for the mean."""

    def read(part: str) -> Callable[[Results], Interval | None]:
        def of(run: Results) -> Interval | None:
            main = next((metric for metric in run.retention.get(name, {}).values() if metric.get("main")), None)
            return interval_of(main, part)

        return of

    shown = clean(name, 28)
    lines = textwrap.wrap(shown.replace("_", " "), 7)
    return _Column(f"{shown} (%)", [*lines, "%"], Quantity(shown, 100, 1), read("tuned"), read("base"), same_items=True)


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
    seconds = run.time.get("total_s")
    return None if seconds is None else Interval(seconds, math.nan, math.nan, 1)


def _comparison(results: Sequence[Results]) -> tuple[list[_Column], list[_Row]]:
    columns = _columns(results)
    labels = setting_labels([run.config for run in results])
    rows: list[_Row] = []
    base_rows = {tuple(c.quantity.short(c.base(run)) for c in columns) for run in results if run.status == "finished"}
    # Runs on different models or data have different bases: no one row could stand for them.
    if len(base_rows) == 1 and any(cell != NOTHING for cell in next(iter(base_rows))):
        rows.append(_Row(["base", *base_rows.pop()]))
    groups: dict[str, list[int]] = defaultdict(list)
    for index, run in enumerate(results):
        groups[json.dumps(_settings(run.config), sort_keys=True, default=str)].append(index)
    for members in groups.values():
        for index in members:
            run = results[index]
            label = labels[index]
            if len(members) > 1 or not label:
                label = f"{label}, seed={run.seed}" if label else clean(run.name, 40) + f", seed={run.seed}"
            if run.status != "finished":
                label += f" ({clean(run.status, 20)})"
            rows.append(_Row([label, *(c.quantity.short(c.tuned(run)) for c in columns)]))
        # The same seed twice (a copied directory) is not a second opinion.
        seeds = {results[i].seed: results[i] for i in members if results[i].status == "finished"}
        if len(seeds) > 1:
            label = labels[members[0]] or clean(results[members[0]].name, 40)
            cells = [c.quantity.short(_over_seeds(map(c.tuned, seeds.values()), c.same_items)) for c in columns]
            rows.append(_Row([f"{label}: mean of {len(seeds)} seeds", *cells], summary=True))
    return columns, rows


def _over_seeds(intervals: Iterable[Interval | None], same_items: bool) -> Interval | None:
    runs = list(intervals)
    known = [run for run in runs if run is not None and not math.isnan(run.mean)]
    # A mean over the seeds that happened to have a number would be a mean of something else.
    if len(known) < len(runs):
        return None
    return over_seeds_and_items(known) if same_items else t_interval([run.mean for run in known])


# ---------------------------------------------------------------------------------------------------------------------
# What differs between runs

# `alignment` only feeds method.terms, where it is named once more.
_IGNORED_GROUPS = frozenset({"alignment", "callbacks", "force", "hydra", "logger", "paths", "progress"})
_IGNORED_NAMES = frozenset({"seed", "run_name", "tags", "notes", "resume", "ckpt_path", "dirpath"})
# Only at the top: a nested `name` (of a model, of a data set) is often the setting that differs.
_IGNORED_AT_TOP = frozenset({"name", "task_name", "group", "output"})


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; the items of a list are numbered."""
    if isinstance(value, dict) and value:
        items = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list) and any(isinstance(inner, (dict, list)) for inner in value):
        items = [(str(index), inner) for index, inner in enumerate(value)]
    else:
        return {prefix: value}
    return {k: v for key, inner in items for k, v in _flat(inner, f"{prefix}.{key}" if prefix else key).items()}


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """The flattened settings that make a run what it is: not where it writes, how it logs or its seed."""

    def ignored(key: str) -> bool:
        path = key.split(".")
        at_top = path[0] in _IGNORED_GROUPS or (len(path) == 1 and key in _IGNORED_AT_TOP)
        return at_top or path[-1] in _IGNORED_NAMES or path[-1].endswith("_dir")

    return {key: value for key, value in _flat(config).items() if not ignored(key)}


_NAMED_TOGETHER = 3


def setting_labels(configs: Sequence[dict[str, Any]]) -> list[str]:
    """For each run "alpha=0.5, rows=input": the settings in which the runs differ, seeds and paths aside.

    A choice such as `model=...` sets many settings of one config group that change together: more than three of them
    are named by the shortest, and the rest counted. Empty strings where nothing differs.
    """
    flat = [_settings(config) for config in configs]
    missing = object()
    together: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for key in dict.fromkeys(key for settings in flat for key in settings):
        values = [_shown(settings[key]) if key in settings else missing for settings in flat]
        # Which runs share a value: settings of equal pattern change together. Those of different groups are
        # not folded, or a run that changes both alpha and the learning rate would be named by one of them.
        pattern = tuple(values.index(value) for value in values)
        if any(pattern):
            together[key.partition(".")[0], pattern].append(key)

    def length(key: str) -> int:
        absent = sum(key not in settings for settings in flat)
        shown = sum(len(_shown(settings[key])) for settings in flat if key in settings)
        return 1000 * absent + len(flat) * len(key) + shown

    groups = [keys if len(keys) <= _NAMED_TOGETHER else sorted(keys, key=length) for keys in together.values()]
    short = _short_names([key for keys in groups for key in keys])
    labels = []
    for settings in flat:
        parts = []
        for keys in groups:
            present = [key for key in keys if key in settings]
            named = present[:1] if len(present) > _NAMED_TOGETHER else present
            parts += [f"{short[key]}={clean(_shown(settings[key]), 32)}" for key in named]
            if len(named) < len(present):
                parts[-1] += f" (+{len(present) - 1})"
        labels.append(", ".join(parts))
    return labels


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted name cut from the left as far as it stays different from the others."""
    names: dict[str, str] = {}
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            names[key] = ".".join(parts[-count:])
            clash = any(other != key and f".{other}".endswith(f".{names[key]}") for other in keys)
            # "terms.0.weight" may lose its head, but a bare list index says nothing.
            if not clash and not names[key].split(".")[0].isdigit():
                break
    return names
