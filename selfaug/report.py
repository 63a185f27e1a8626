"""Show the results of runs side by side, and write a report about them.

Run as: python -m selfaug.report RUNS ...              run directories, folders of them, or sweeps (runs/sweeps/NAME)
        python -m selfaug.report runs --out report     table.md, table.tex, plots and report.html go there
        python -m selfaug.report --markdown runs       print the table as Markdown
        python -m selfaug.report runs --against ROW    print every row minus this one, in standard errors

Without --out a sweep's report goes into the sweep's directory, any other into ./report.
"""

import argparse
import sys
from pathlib import Path

from selfaug.errors import UserError


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m selfaug.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("places", nargs="+", metavar="RUNS", help="run directories, folders of them, or sweeps")
    parser.add_argument("--out", type=Path, help="folder for the report; default: a sweep's directory, else ./report")
    parser.add_argument("--title", help="of the report; default: the sweep's name")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--against", metavar="ROW", help="print the differences to this row, as a Markdown table")
    options = parser.parse_args(arguments)
    # Here and not above, so that --help answers at once.
    from selfaug.reporting.against import against
    from selfaug.reporting.compare import Comparison
    from selfaug.reporting.places import read_places
    from selfaug.reporting.table import as_markdown, comparison_table, console, results_table, samples_panel
    from selfaug.reporting.write import write_report

    try:
        found = read_places(options.places)
        results = found.results
        if options.against is not None:
            print(against(Comparison(results), options.against))
        elif options.markdown:
            print(as_markdown(results))
        elif len(results) == 1:
            for part in (results_table(results[0]), samples_panel(results[0])):
                if part is not None:
                    console().print(part)
        elif results:
            console().print(comparison_table(results))
        for job in found.failed:
            print(f"selfaug: {job.name} failed: {job.error}", file=sys.stderr)
        report = write_report(found, options.out or found.sweep or Path("report"), options.title)
    except UserError as error:
        sys.exit(f"selfaug: {error}")
    except OSError as error:
        sys.exit(f"selfaug: {error.filename}: {error.strerror}, so set --out to a folder that can be written to.")
    printed = options.markdown or options.against is not None
    print(f"Report: {report.page}", file=sys.stderr if printed else sys.stdout)


if __name__ == "__main__":
    main()
