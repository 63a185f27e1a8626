"""Write a report: table.md, table.tex, plots and report.html."""

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from selfaug.files import write_text
from selfaug.reporting.compare import Comparison
from selfaug.reporting.figures import plots, style
from selfaug.reporting.latex import latex_table
from selfaug.reporting.page import page
from selfaug.reporting.places import Found, read_places
from selfaug.reporting.svg import inline
from selfaug.reporting.tables import markdown_report

_DOTS_PER_INCH = 160


class Report(NamedTuple):
    """page: report.html. rows: how many settings it compares."""

    page: Path
    rows: int


def write_report(found: Found, out: Path, title: str | None = None) -> Report:
    """table.md, table.tex, plots/*.svg, plots/*.png and report.html in `out`; the same files for the same results."""
    title = title or (found.sweep.name if found.sweep is not None else "Results")
    compared = Comparison(found.results)
    drawn = _draw(compared, out / "plots")
    write_text(out / "table.md", markdown_report(compared, found.failed, title))
    if compared.rows:
        write_text(out / "table.tex", latex_table(compared))
    write_text(out / "report.html", page(compared, found.failed, drawn, title))
    return Report(out / "report.html", len(compared.rows))


def write_sweep_report(sweep: Path) -> Report:
    """The report of a sweep, in its directory (runs/sweeps/NAME)."""
    return write_report(read_places([sweep]), sweep)


def _draw(compared: Comparison, folder: Path) -> Sequence[tuple[str, str, str, str]]:
    """Write the plots' files; returns (name, title, caption, SVG for the page) of each. Plots of an earlier report
    that there is no data for any more go."""
    for old in folder.glob("*.*"):
        if old.suffix in (".svg", ".png"):
            old.unlink()
    drawn = []
    with style():
        for plot in plots(compared):
            folder.mkdir(parents=True, exist_ok=True)
            # Laid out once: the slowest part, and the two files are to look alike.
            plot.figure.draw_without_rendering()
            plot.figure.set_layout_engine("none")
            svg = io.StringIO()
            # Neither a date nor a version: the files are to change only when the results do.
            plot.figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
            write_text(folder / f"{plot.name}.svg", svg.getvalue())
            plot.figure.savefig(folder / f"{plot.name}.png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
            element = inline(svg.getvalue(), plot.name, escape(f"{plot.title}. {plot.caption}"))
            drawn.append((plot.name, plot.title, plot.caption, element))
    return drawn
