"""Put the tables of benchmarks/results into the pages of docs/; no figure in them is typed by hand.

Run as: python -m benchmarks.tables            between the markers <!-- table: NAME --> and <!-- end -->
        python -m benchmarks.tables --check    only say whether the page is up to date

NAME is a file of benchmarks/results without .json (`step-cpu`), the same and `.agreement` for the second table of a
sweep, or `goals`.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks import (
    common,
    data,
    dialogues,
    evaluation,
    full_finetuning,
    goals,
    linear_kl,
    long_context,
    serial_jobs,
    step,
    sweep,
)
from benchmarks.common import Column, Row

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = (DOCS / "speed.md", DOCS / "evaluation.md", DOCS / "sweeps.md", DOCS / "methods.md")
COLUMNS: dict[str, Sequence[Column]] = {
    "linear_kl": linear_kl.COLUMNS,
    "step": step.COLUMNS,
    "data": data.COLUMNS,
    "sweep": sweep.COLUMNS,
    "long_context": long_context.COLUMNS,
    "evaluation": evaluation.COLUMNS,
    "serial_jobs": serial_jobs.COLUMNS,
    "full_finetuning": full_finetuning.COLUMNS,
    "dialogues": dialogues.COLUMNS,
}
_MARKED = re.compile(r"(<!-- table: ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A Markdown table; the first columns to the left, figures to the right."""
    lines = [[column.title for column in columns], ["---"] * len(columns), *common.cells(rows, columns)]
    return "".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |\n" for line in lines)


def table(name: str, results: goals.Results) -> str:
    """The table `name`, with what it was measured on; a sentence where it has not been measured."""
    if name == "goals":
        return markdown(goals.judged(results), goals.COLUMNS)
    source, _, part = name.partition(".")
    if source not in results:
        return "Not measured yet.\n"
    content = results[source]
    agreement = [row for row in content["rows"] if "agree" in row]
    if part == "agreement":
        return markdown(agreement, sweep.AGREEMENT)
    rows = [row for row in content["rows"] if "agree" not in row]
    return markdown(rows, COLUMNS[content["benchmark"]]) + f"\n{measured_on(content['machine'])}\n"


def measured_on(machine: Row) -> str:
    """One line of what the figures depend on."""
    gpu = "" if machine["device"] == "cpu" else f"{machine['device']}, "
    code = machine["selfaug"]
    commit = f" ({code['commit'][:7]}{', changed' if code['dirty'] else ''})" if code.get("commit") else ""
    return (
        f"{gpu}{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; torch {machine['torch']}; "
        f"selfaug {code['version']}{commit}; {machine['date']}."
    )


def filled(text: str, results: goals.Results) -> str:
    """The page with its tables replaced."""
    return _MARKED.sub(lambda found: found[1] + table(found[2], results) + found[3], text)


def read_results(folder: Path = common.RESULTS) -> goals.Results:
    """All result files but those of --quick runs."""
    files = [path for path in sorted(folder.glob("*.json")) if not path.stem.endswith("-quick")]
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES)
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    arguments = parser.parse_args(argv)
    results = read_results(arguments.results)
    for page in arguments.pages:
        before = page.read_text(encoding="utf-8")
        after = filled(before, results)
        if arguments.check and after != before:
            raise SystemExit(f"{page} is out of date: run python -m benchmarks.tables")
        if not arguments.check:
            page.write_text(after, encoding="utf-8")
            print(f"Tables in {page}")


if __name__ == "__main__":
    main()
