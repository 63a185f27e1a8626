"""Show the results of runs side by side.

Run as: python -m selfaug.report RUN_DIRECTORY ...          any folders that hold results.json, at any depth
        python -m selfaug.report --markdown runs            the same table as Markdown
"""

import argparse
import sys
from pathlib import Path

from selfaug.errors import UserError


def find_results(places: list[str]) -> list[Path]:
    """Every results.json at or below the places, each once, in order. Raises UserError where there is none."""
    found: list[Path] = []
    for place in places:
        path = Path(place)
        here = [path] if path.is_file() else sorted(path.rglob("results.json"))
        if not here:
            raise UserError(f"{place} holds no results.json: give a run directory, or a folder of them.")
        found += [file for file in here if file not in found]
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m selfaug.report", description="Show the results of runs side by side.")
    parser.add_argument("places", nargs="+", metavar="RUN", help="run directories, or folders that hold some")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args(arguments)
    from selfaug.reporting.results import read_results
    from selfaug.reporting.table import as_markdown, comparison_table, console, results_table, samples_panel

    try:
        results = [read_results(path) for path in find_results(options.places)]
    except UserError as error:
        sys.exit(f"selfaug: {error}")
    if options.markdown:
        print(as_markdown(results))
    elif len(results) == 1:
        console().print(results_table(results[0]))
        console().print(samples_panel(results[0]))
    else:
        console().print(comparison_table(results))


if __name__ == "__main__":
    main()
