"""Results on the terminal: one run in full (`results_table`, `samples_panel`), many runs side by side
(`comparison_table`, and `as_markdown` for the same as Markdown).

Text of users and models goes into rich as `Text`, never as markup: an answer such as "[red]" must print as it is.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from selfaug.reporting.cells import Quantity, clean, interval_of
from selfaug.reporting.compare import base_means, rows_of
from selfaug.reporting.labels import setting_labels
from selfaug.reporting.measures import DRIFT, TASK, Measure, measures
from selfaug.reporting.results import Results

__all__ = ["as_markdown", "comparison_table", "console", "literal", "results_table", "samples_panel", "setting_labels"]


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
    groups = [("task", results.task, TASK)]
    groups += [(corpus, metrics, DRIFT) for corpus, metrics in results.drift.items()]
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
    return f"{asked}In brackets: 95% intervals (for other questions or documents). KL in nats per token."


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
    """One row per run, named by the settings that differ; runs that differ only by the seed get a mean row too, and of
    many runs that row alone."""
    columns, rows = _comparison(results, _WIDEST)
    if len(results) > _MANY and any(row.summary for row in rows):
        rows = [row for row in rows if row.summary or not row.averaged]
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
    body = "\n".join("| " + " | ".join(literal(cell) for cell in line) + " |" for line in lines)
    return f"{body}\n\n{_COMPARISON_NOTE}\n"


def literal(cell: str) -> str:
    """Text of a configuration in a Markdown table: no cell of its own, no HTML."""
    return cell.replace("|", r"\|").replace("<", "&lt;")


_COMPARISON_NOTE = (
    "± is half a 95% interval: over questions, documents or prompts in the row of a run, over seeds and these in a "
    "row of means. kept: tuned / base, averaged over the benchmarks that are above chance. KL in nats per token; ppl "
    "ratio: perplexity of the tuned model / of the base."
)


_MANY = 16  # runs that a terminal has room for
_WIDEST = 12  # columns that one of 100 characters has room for
_LEFT_OUT = ("/kl_tuned_base", "/perplexity_ratio")  # where there are more; the report has them


@dataclass(frozen=True, slots=True)
class _Line:
    cells: list[str]
    summary: bool = False  # a mean
    averaged: bool = False  # a run that is part of one


def _comparison(results: Sequence[Results], most: int | None = None) -> tuple[list[Measure], list[_Line]]:
    columns = measures(results)
    if most is not None and len(columns) > most:
        columns = [one for one in columns if not one.key.endswith(_LEFT_OUT)]
    lines: list[_Line] = []
    finished = [run for run in results if run.status == "finished"]
    bases = {base_means(run, columns) for run in finished}
    # Runs on different models or data have different bases: no one line could stand for them.
    if len(bases) == 1 and any(bases.pop()):
        lines.append(_Line(["base", *(one.quantity.short(one.base(finished[0])) for one in columns)]))
    for row in rows_of(results):
        for index in row.members:
            run = results[index]
            label = row.label
            # A row without settings of its own has a run's name, which is that of one seed.
            if len(row.members) > 1 or label == clean(run.name, 40):
                label = f"{label}, seed={run.seed}"
            if run.status != "finished":
                label += f" ({clean(run.status, 20)})"
            averaged = len(row.runs) > 1 and run.status == "finished"
            lines.append(_Line([label, *(one.quantity.short(one.tuned(run)) for one in columns)], averaged=averaged))
        if len(row.runs) > 1:
            cells = [one.quantity.short(row.value(one)) for one in columns]
            lines.append(_Line([f"{row.label}: mean of {len(row.runs)} seeds", *cells], summary=True))
    return columns, lines
