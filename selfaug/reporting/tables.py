"""table.md, and the published rows that every table shows beside ours."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from selfaug.reporting.cells import clean
from selfaug.reporting.compare import Comparison
from selfaug.reporting.places import FailedJob
from selfaug.reporting.published import CAUTION, SOURCE, Published, published_base, published_for
from selfaug.reporting.summary import NOTES, findings, headline
from selfaug.reporting.table import as_markdown, literal


@dataclass(frozen=True, slots=True)
class PublishedLine:
    """A row of the paper that stands beside one of ours. label: `LoRA (Table 2)`."""

    label: str
    published: Published


def published_lines(found: Comparison) -> list[PublishedLine]:
    """The paper's rows for ours, each once and only where one of our columns has a number of it."""
    configs = [next(iter(row.runs.values())).config for row in found.rows]
    keys = {one.key for one in found.measures}
    if any(str((config.get("data") or {}).get("name")) != "crag" for config in configs):
        keys -= {"task/crag_score"}  # a score on other questions
    lines: dict[str, PublishedLine] = {}
    matched = [one for one in published_for(configs) if one is not None] if configs else []
    for one in [published_base(configs), *matched] if matched else []:
        if one is not None and keys & one.scores.keys():
            label = f"{one.row} ({one.table})"
            scores = {key: score for key, score in one.scores.items() if key in keys}
            lines.setdefault(label, PublishedLine(label, replace(one, scores=scores)))
    return list(lines.values())


def markdown_report(found: Comparison, failed: Sequence[FailedJob] = (), title: str = "Results") -> str:
    """The rows with their differences to plain LoRA, the published ones, what failed, and every run."""
    columns = [index for index, one in enumerate(found.measures) if one.key != "time"]
    measures = [found.measures[index] for index in columns]
    parts = [f"# {literal(title)}", " ".join([headline(found), *findings(found)]).replace("<", "&lt;")]
    if found.rows:
        lines = [["row", "seeds", *(one.header for one in measures)], ["---", "---:"] + ["---:"] * len(columns)]
        if found.base is not None:
            lines.append(["base model", "", *(found.measures[i].quantity.short(found.base[i]) for i in columns)])
        for row, one in enumerate(found.rows):
            cells = [found.measures[i].quantity.short(found.values[row][i]) for i in columns]
            best = [f"**{c}**" if found.best[i] == row else c for i, c in zip(columns, cells, strict=True)]
            lines.append([one.label, str(len(one.runs)), *best])
            if one.baseline is not None:
                lines.append(["– plain LoRA", "", *(_difference(found, row, i) for i in columns)])
        published = published_lines(found)
        for line in published:
            scores = (line.published.scores.get(one.key) for one in measures)
            lines.append([f"*paper: {line.label}*", "", *("" if s is None else f"*{s:.2f}*" for s in scores)])
        parts.append("\n".join("| " + " | ".join(map(literal, line)) + " |" for line in lines))
        if published:
            parts.append(f"*paper*: {SOURCE}. {CAUTION}")
        parts.append("\n".join(f"- {note.replace('*', chr(92) + '*')}" for note in NOTES))
    if failed:
        names = [f"- {literal(clean(job.name, 120))}: {literal(clean(job.error, 300))}" for job in failed]
        parts.append("\n".join(["## Failed jobs", "", *names]))
    if found.results:
        parts.append(f"## Every run\n\n{as_markdown(found.results)}".rstrip())
    return "\n\n".join(parts) + "\n"


def _difference(found: Comparison, row: int, column: int) -> str:
    gap = found.differences[row][column]
    if gap is None:
        return ""
    text = found.measures[column].quantity.cell(gap.interval, sign=True)
    return text + found.marks[row][column].replace("*", r"\*")
