"""One row of a report against every other: by how much, in how many standard errors."""

from selfaug.errors import UserError
from selfaug.reporting.compare import Comparison, Difference, Row, adjusted_p, difference, mark
from selfaug.reporting.measures import Measure
from selfaug.reporting.summary import p_value
from selfaug.reporting.table import literal


def against(found: Comparison, name: str) -> str:
    """A Markdown table of every other row minus the row called `name`: mean, standard errors, p.

    * and ** as in the report: p < 0.05 for other seeds and items, and still so after Holm's correction for the rows of
    the column. Raises UserError where no row, or more than one, is called that.
    """
    chosen = _row(found, name)
    others = [row for row in found.rows if row is not chosen]
    measures = [one for one in found.measures if one.key != "time"]
    columns = [_column(others, chosen, one) for one in measures]
    lines = [[f"minus {chosen.label}", *(one.header for one in measures)], ["---"] + ["---:"] * len(measures)]
    lines += [[row.label, *(column[index] for column in columns)] for index, row in enumerate(others)]
    return "\n".join("| " + " | ".join(map(literal, line)) + " |" for line in lines)


def _row(found: Comparison, name: str) -> Row:
    """The row of that label; else the one that the name is a part of, as `input_logits` of `position=input_logits`."""
    labels = [row.label for row in found.rows]
    alike = [row for row in found.rows if row.label == name] or [row for row in found.rows if name in row.label]
    if len(alike) != 1:
        many = "no row is" if not alike else "more than one row is"
        raise UserError(f"--against={name}: {many} called that; the rows are {'; '.join(labels) or 'none'}.")
    return alike[0]


def _column(rows: list[Row], chosen: Row, measure: Measure) -> list[str]:
    gaps = [difference(row, chosen, measure) for row in rows]
    return [_cell(measure, gap, p) for gap, p in zip(gaps, adjusted_p(gaps), strict=True)]


def _cell(measure: Measure, gap: Difference | None, adjusted: float | None) -> str:
    if gap is None:
        return ""
    text = measure.quantity.number(gap.interval.mean, sign=True)
    if gap.p is None:
        return text
    errors = "" if gap.standard_errors is None else f"{abs(gap.standard_errors):.1f} SE, "
    stars = mark(gap, adjusted).replace("*", r"\*")
    return f"{text} ({errors}p {p_value(gap.p)}){stars}"
