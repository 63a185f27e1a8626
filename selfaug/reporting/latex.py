"""table.tex: the comparison in the layout of the papers' tables, for booktabs.

Rows are methods or positions, columns are scores and, of the drift, KL(base||tuned); below each row, in small print,
its difference to plain LoRA with its interval and mark. The published rows stand in a block of their own.
"""

from selfaug.evaluation.statistics import Interval
from selfaug.reporting.cells import NOTHING
from selfaug.reporting.compare import Comparison
from selfaug.reporting.measures import Measure
from selfaug.reporting.published import CAUTION, SOURCE
from selfaug.reporting.summary import seeds_of
from selfaug.reporting.tables import PublishedLine, published_lines

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "–": "--", "±": r"$\pm$", "−": "$-$",
}  # fmt: skip


# The page and table.md have them; with all the benchmarks they would not fit a printed page.
_LEFT_OUT = ("time", "/kl_tuned_base", "/perplexity_ratio")


def escaped(text: str) -> str:
    """Any text as LaTeX that prints as it is, on one line."""
    return "".join(_SPECIAL.get(sign, sign if sign.isprintable() else " ") for sign in text)


def latex_table(found: Comparison) -> str:
    """The whole `table` environment. Needs \\usepackage{booktabs} and, for the quotation marks, T1 fonts."""
    columns = [index for index, one in enumerate(found.measures) if not one.key.endswith(_LEFT_OUT)]
    measures = [found.measures[index] for index in columns]
    lines = [
        r"% \usepackage{booktabs} \usepackage[T1]{fontenc}",
        r"\begin{table}", r"\centering", r"\small",
        r"\begin{tabular}{l" + "r" * len(columns) + "}", r"\toprule",
        *_headings(measures), r"\midrule",
    ]  # fmt: skip
    if found.base is not None:
        lines.append(_line("base model", [_cell(found.measures[i], found.base[i]) for i in columns]))
    for row, one in enumerate(found.rows):
        cells = [_cell(found.measures[i], found.values[row][i], bold=found.best[i] == row) for i in columns]
        lines.append(_line(escaped(one.label), cells))
        if one.baseline is not None:
            lines.append(_line("", [_difference(found, row, i) for i in columns]))
    published = published_lines(found)
    if published:
        lines.append(r"\midrule")
        lines.append(rf"\multicolumn{{{len(columns) + 1}}}{{l}}{{\footnotesize\textit{{{escaped(SOURCE)}}}}} \\")
        lines += [_line(rf"\textit{{{escaped(one.label)}}}", _published(one, measures)) for one in published]
    caption = f"Means of {seeds_of(found)} with half a 95% interval, best in bold; below, the difference to plain LoRA "
    caption += "with its interval: * p < 0.05, ** after Holm's correction (paired over seeds and items)."
    if published:
        caption += f" In italics: {CAUTION[0].lower()}{CAUTION[1:]}"
    lines += [r"\bottomrule", r"\end{tabular}", rf"\caption{{{escaped(caption)}}}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def _headings(measures: list[Measure]) -> list[str]:
    """Two lines: what columns stand under (merged), and what each is called."""
    top, rules, names = [""], [], [""]
    start = 2
    while measures:
        group = measures[0].group
        size = next((i for i, one in enumerate(measures) if one.group != group), len(measures))
        top.append(rf"\multicolumn{{{size}}}{{c}}{{{escaped(group)}}}")
        rules.append(rf"\cmidrule(lr){{{start}-{start + size - 1}}}")
        names += [escaped(one.short) for one in measures[:size]]
        measures, start = measures[size:], start + size
    return [" & ".join(top) + r" \\", "".join(rules), " & ".join(names) + r" \\"]


def _line(label: str, cells: list[str]) -> str:
    return " & ".join([label, *cells]) + r" \\"


def _cell(measure: Measure, value: Interval | None, bold: bool = False) -> str:
    text = measure.quantity.short(value)
    if text == NOTHING:
        return "--"
    number, _, spread = text.partition(" ±")
    number = rf"\textbf{{{escaped(number)}}}" if bold else escaped(number)
    return number + (rf" $\pm$ {escaped(spread)}" if spread else "")


def _difference(found: Comparison, row: int, column: int) -> str:
    gap = found.differences[row][column]
    if gap is None:
        return ""
    text = escaped(found.measures[column].quantity.cell(gap.interval, sign=True, comma=", "))
    mark = found.marks[row][column]
    return r"{\scriptsize " + text + (f"$^{{{mark}}}$" if mark else "") + "}"


def _published(line: PublishedLine, measures: list[Measure]) -> list[str]:
    scores = (line.published.scores.get(one.key) for one in measures)
    return ["" if score is None else rf"\textit{{{score:.2f}}}" for score in scores]
