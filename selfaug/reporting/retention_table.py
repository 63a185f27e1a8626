"""What one run kept: general benchmarks and style of base and tuned model on the terminal."""

from rich import box
from rich.table import Table
from rich.text import Text

from selfaug.reporting.cells import Quantity, clean, interval_of
from selfaug.reporting.results import Metric, Results

_SCORE = Quantity("score", 100, 1)
_RATIO = Quantity("ratio", 100, 0)
_STYLE = {
    "words": Quantity("words", 1, 1),
    "one_line": Quantity("one line (%)", 100, 1),
    "refusal": Quantity("refusals (%)", 100, 1),
    "repetition": Quantity("repetition (%)", 100, 1),
    "empty": Quantity("empty (%)", 100, 1),
}
_NOTE = (
    "In brackets: 95% intervals (paired bootstrap over the items). kept: tuned / base. p: McNemar's exact test. "
    "* counts for the mean. (chance): the base model does no better than guessing, so it is left out of the mean."
)


def retention_table(results: Results) -> Table | None:
    """Benchmarks (scores in percent) and style; None where neither was measured."""
    if not results.retention and not results.style:
        return None
    table = Table(box=box.SIMPLE_HEAD, title=Text("What was kept", style="bold"), padding=(0, 0, 0, 1), pad_edge=False,
                  show_edge=False)  # fmt: skip
    table.add_column("", max_width=14, overflow="fold")
    table.add_column("Metric", no_wrap=True)
    for name in ("Base", "Tuned", "Difference", "Kept (%)", "p"):
        table.add_column(name, justify="right", overflow="fold")
    for benchmark, metrics in results.retention.items():
        for index, (name, metric) in enumerate(metrics.items()):
            label = name.replace("_", " ") + ("*" if _counts(metric) else " (chance)" if metric.get("at_floor") else "")
            kept = _RATIO.cell(interval_of(metric, "retention"))
            _row(table, benchmark, index, len(metrics), label, _SCORE, metric, kept)
    mean = interval_of(results.retention_mean, "retention")
    if mean is not None:
        cells = ["mean", f"{mean.n} benchmarks", "", "", "", _RATIO.cell(mean), ""]
        table.add_row(*map(Text, cells), style="bold", end_section=True)
    for prompts, metrics in results.style.items():
        for index, (name, metric) in enumerate(metrics.items()):
            quantity = _STYLE.get(name, Quantity(name))
            _row(table, f"style: {prompts}", index, len(metrics), quantity.label, quantity, metric, "")
    table.caption = Text(_NOTE, justify="left")
    return table


def _counts(metric: Metric) -> bool:
    return bool(metric.get("main")) and not metric.get("at_floor")


def _row(
    table: Table, group: str, index: int, rows: int, label: str, quantity: Quantity, metric: Metric, kept: str
) -> None:
    parts = [interval_of(metric, part) for part in ("base", "tuned", "difference")]
    p = metric.get("mcnemar_p")
    cells = [
        clean(label, 32),
        *(quantity.cell(part, sign=i == 2) for i, part in enumerate(parts)),
        kept,
        "" if p is None else f"{p:.3f}" if p >= 0.001 else f"{p:.0e}",
    ]
    first = Text(clean(group, 40) if index == 0 else "", style="bold")
    table.add_row(first, *map(Text, cells), end_section=index == rows - 1)
