"""report.html: everything in one page that opens from a file and loads nothing.

Text of users and models gets into it in two ways only: through `html.escape` here, and as JSON that the page's script
puts in with textContent. The content security policy of the page allows no other script, and no network at all.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from selfaug.evaluation.statistics import Interval
from selfaug.reporting.cells import NOTHING
from selfaug.reporting.compare import Comparison, Difference
from selfaug.reporting.measures import Measure
from selfaug.reporting.page_runs import run_title, runs_section
from selfaug.reporting.places import FailedJob
from selfaug.reporting.published import CAUTION, SOURCE
from selfaug.reporting.summary import NOTES, findings, headline, p_value, seeds_of
from selfaug.reporting.tables import PublishedLine, published_lines


def page(found: Comparison, failed: Sequence[FailedJob], drawn: Sequence[tuple[str, str, str, str]], title: str) -> str:
    """The page. drawn: (name, title, caption, inline SVG) of every plot."""
    data = _data(found)
    sections = [
        ("results", "Results", _results(found)),
        ("plots", "Plots", _plots(drawn)),
        ("answers", "Answers", _answers(data)),
        ("tokens", "Tokens", _tokens(data, found)),
        ("runs", "Runs", runs_section(found)),
        ("notes", "Notes", _notes()),
    ]
    present = [(name, link, content) for name, link, content in sections if content]
    body = _hero(found, failed, title) + "".join(
        f'<section id="{name}" aria-labelledby="{name}-title">{content}</section>' for name, _, content in present
    )
    script = _file("script.js")
    return Template(_file("page.html")).substitute(
        title=escape(title),
        style=_file("style.css"),
        script=script,
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        nav="".join(f'<a href="#{name}">{link}</a>' for name, link, _ in present),
        body=body,
        data=embedded(data),
    )


def embedded(value: Any) -> str:
    """JSON that stands inside a <script> element: no character of it can end the element or begin another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _file(name: str) -> str:
    return (resources.files("selfaug.reporting") / "web" / name).read_text(encoding="utf-8")


# ---- the top --------------------------------------------------------------------------------------------------------


def _hero(found: Comparison, failed: Sequence[FailedJob], title: str) -> str:
    more = "".join(f"<li>{_sentence(text)}</li>" for text in findings(found))
    runs = [run for row in found.rows for run in row.runs.values()]
    facts = [(str(len(found.results)), "runs"), (str(len(found.rows)), "rows"), ("", seeds_of(found))]
    for group, key in (("model", "label"), ("data", "name")):
        values = {str((run.config.get(group) or {}).get(key, "")) for run in runs} - {""}
        if values:
            facts.append(("", f"{group}: {', '.join(sorted(values))}"))
    if runs:
        hours = sum(run.time.get("total_s") or 0 for run in runs) / 3600
        facts.append((f"{hours:.1f}", "hours of computing"))
    counted = [(f"<b>{escape(number)}</b> " if number else "", escape(text)) for number, text in facts]
    listed = "".join(f"<li>{number}{text}</li>" for number, text in counted)
    return (
        f'<div class="hero"><h1>{escape(title)}</h1><p class="headline">{_sentence(headline(found))}</p>'
        + (f'<ul class="findings">{more}</ul>' if more else "")
        + f'<ul class="facts">{listed}</ul>{_failed(failed)}</div>'
    )


def _sentence(text: str) -> str:
    """Escaped, and never broken between a number and what belongs to it."""
    for pair in (" ±", " %", " =", "= ", " points"):
        text = text.replace(pair, pair.replace(" ", "\u00a0"))
    return escape(text)


def _failed(failed: Sequence[FailedJob]) -> str:
    if not failed:
        return ""
    items = "".join(f"<li><code>{escape(job.name)}</code>: {escape(job.error)}</li>" for job in failed)
    what = "1 job failed and is" if len(failed) == 1 else f"{len(failed)} jobs failed and are"
    return f'<div class="failed" role="note"><strong>{what} not in the table.</strong><ul>{items}</ul></div>'


# ---- the table ------------------------------------------------------------------------------------------------------


def _results(found: Comparison) -> str:
    if not found.rows:
        return ""
    groups = list(dict.fromkeys(one.group for one in found.measures))
    number = {group: index for index, group in enumerate(groups)}
    gaps = any(row.baseline is not None for row in found.rows)
    boxes = "".join(
        f'<label><input type="checkbox" checked data-group="{number[group]}">{escape(group)}</label>'
        for group in groups
    )
    if gaps:
        boxes += '<label><input type="checkbox" checked id="show-gaps">differences to plain LoRA</label>'
    top = "".join(
        f'<th scope="colgroup" class="first" data-g="{number[group]}" '
        f'colspan="{sum(one.group == group for one in found.measures)}">{escape(group)}</th>'
        for group in groups
    )
    names = "".join(
        f'<th scope="col" data-better="{one.better}"{_column(found.measures, index, number)}>'
        f'<button type="button">{escape(one.short)}</button></th>'
        for index, one in enumerate(found.measures)
    )
    head = f'<thead><tr><td></td>{top}</tr><tr><th scope="col" data-better="-1"><button type="button">Row</button></th>'
    head += f"{names}</tr></thead>"
    rows = "".join(_row(found, index, number) for index in range(len(found.rows)))
    lead = "Means with half a 95% interval; the best of a column in bold. "
    if gaps:
        lead += "Below, the difference to plain LoRA with its interval: coloured where 5% tell it from 0, "
        lead += "* p &lt; 0.05, ** after Holm's correction. "
    lead += "Click a heading to sort."
    return (
        f'<h2 id="results-title">Results</h2><p class="lead">{lead}</p><div class="tools">'
        '<label><span>Filter</span><input type="search" id="filter-rows" placeholder="words of a row"></label>'
        '<span class="count" id="count-rows" aria-live="polite"></span>'
        f'<fieldset aria-label="Columns">{boxes}</fieldset></div>'
        '<div class="card scroll" tabindex="0" role="region" aria-label="Results table"><table class="results">'
        f'{head}{_base(found, number)}<tbody class="rows">{rows}</tbody>{_published(found, number)}</table></div>'
    )


def _column(measures: Sequence[Measure], index: int, number: dict[str, int]) -> str:
    first = index == 0 or measures[index - 1].group != measures[index].group
    return f' data-g="{number[measures[index].group]}"' + (' class="first"' if first else "")


def _row(found: Comparison, row: int, number: dict[str, int]) -> str:
    one = found.rows[row]
    seeds = f"{len(one.runs)} seed{'' if len(one.runs) == 1 else 's'}"
    chip = ' <span class="chip">baseline</span>' if one.plain else ""
    label = escape(one.label)
    # Broken between settings rather than within one.
    broken = " ".join(f'<span class="part">{part.replace("=", "=<wbr>")}</span>' for part in label.split(" "))
    cells = [f'<th scope="row" data-v="{label}">{broken}{chip} <span class="seeds">{seeds}</span></th>']
    for index, measure in enumerate(found.measures):
        value, attributes = found.values[row][index], _column(found.measures, index, number)
        if found.best[index] == row:
            attributes = attributes.replace('class="first"', 'class="first best"')
            attributes += "" if "class=" in attributes else ' class="best"'
        if value is not None and value.mean == value.mean:
            attributes += f' data-v="{value.mean:.9g}"'
        gap = _gap(measure, found.differences[row][index], found.marks[row][index])
        cells.append(f"<td{attributes}>{_value(measure, value)}{gap}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _value(measure: Measure, value: Interval | None) -> str:
    text, _, spread = measure.quantity.short(value).partition(" ±")
    if text == NOTHING:
        return f'<span class="spread">{NOTHING}</span>'
    return f'<span class="number">{escape(text)}</span>' + (
        f' <span class="spread">±{escape(spread)}</span>' if spread else ""
    )


def _gap(measure: Measure, gap: Difference | None, mark: str) -> str:
    if gap is None:
        return ""
    better = gap.interval.mean * measure.better
    # Without a test nothing is coloured: an unpaired interval of one seed speaks about items only.
    tone = (" up" if better > 0 else " down") if gap.paired and gap.telling and better else ""
    items = f"paired over {gap.items} items" if gap.items else "over items, unpaired"
    said = f"one seed: interval {items}, no test"
    if gap.paired:
        said = f"paired over {gap.seeds} seeds" + (f" and {gap.items} items" if gap.items else "")
    if gap.p is not None:
        said += f"; p {p_value(gap.p)}"
    if gap.standard_errors is not None:
        said += f"; {abs(gap.standard_errors):.1f} standard errors"
    text = measure.quantity.cell(gap.interval, sign=True, comma=", ")
    return f'<span class="gap{tone}" title="{escape(said)}">{escape(text)}{mark}</span>'


def _base(found: Comparison, number: dict[str, int]) -> str:
    if found.base is None:
        return ""
    cells = "".join(
        f"<td{_column(found.measures, index, number)}>{_value(measure, found.base[index])}</td>"
        for index, measure in enumerate(found.measures)
    )
    return f'<tbody class="base"><tr><th scope="row">base model</th>{cells}</tr></tbody>'


def _published(found: Comparison, number: dict[str, int]) -> str:
    lines = published_lines(found)
    if not lines:
        return ""

    def cells(line: PublishedLine) -> str:
        scores = [line.published.scores.get(one.key) for one in found.measures]
        return "".join(
            f"<td{_column(found.measures, index, number)}>{'' if score is None else f'{score:.2f}'}</td>"
            for index, score in enumerate(scores)
        )

    rows = "".join(
        f'<tr><th scope="row" title="{escape(line.published.setting)}">{escape(line.label)}</th>{cells(line)}</tr>'
        for line in lines
    )
    width = len(found.measures)
    title = f'<tr class="title"><th scope="rowgroup">Published</th><td colspan="{width}"><span>{escape(SOURCE)}. '
    return f'<tbody class="published">{title}{escape(CAUTION)}</span></td></tr>{rows}</tbody>'


# ---- plots, answers, tokens, notes ----------------------------------------------------------------------------------


def _plots(drawn: Sequence[tuple[str, str, str, str]]) -> str:
    if not drawn:
        return ""
    figures = "".join(
        f'<figure class="card{" broad" if name in ("alpha", "curves") else ""}"><h3>{escape(title)}</h3>'
        f'<div class="canvas">{svg}</div><figcaption>{escape(caption)}</figcaption></figure>'
        for name, title, caption, svg in drawn
    )
    return f'<h2 id="plots-title">Plots</h2><div class="plots">{figures}</div>'


def _data(found: Comparison) -> dict[str, Any]:
    """What the viewers show. Runs share the tokens of their example; each has values of its own."""
    examples: dict[str, int] = {}
    runs: list[dict[str, Any]] = []
    shared: list[dict[str, Any]] = []
    for row in found.rows:
        for run in row.runs.values():
            kl = None
            if run.token_kl.get("tokens"):
                example = {key: run.token_kl[key] for key in ("id", "tokens", "roles")}
                key = json.dumps(example)
                if key not in examples:
                    examples[key] = len(shared)
                    shared.append(example)
                kl = {"example": examples[key], "values": run.token_kl["kl"]}
            samples = [
                {"question": str(one["question"]), "answers": [str(text) for text in one["answers"]],
                 "base": str(one["base"]), "tuned": str(one["tuned"])}
                for one in run.samples
            ]  # fmt: skip
            runs.append({"title": run_title(row, run), "plain": row.plain, "samples": samples, "kl": kl})
    return {"runs": runs, "examples": shared}


def _answers(data: dict[str, Any]) -> str:
    if not any(run["samples"] for run in data["runs"]):
        return ""
    return (
        '<h2 id="answers-title">Sample answers</h2><p class="lead">Chosen so that most of them differ between base and '
        "tuned model: no fair sample of how often they agree.</p>"
        '<div class="tools"><label><span>Run</span><select id="sample-run"></select></label></div>'
        '<div class="samples" id="samples" aria-live="polite"><noscript>Needs JavaScript.</noscript></div>'
    )


def _tokens(data: dict[str, Any], found: Comparison) -> str:
    measured = [index for index, run in enumerate(data["runs"]) if run["kl"]]
    if not measured:
        return ""
    plain = next((index for index in measured if data["runs"][index]["plain"]), measured[0])
    other = next((index for index in measured if not data["runs"][index]["plain"]), measured[-1])
    chosen = [plain] if plain == other else [plain, other]
    panes = "".join(
        f'<div class="card pane" data-run="{index}"><label><span hidden>Run</span><select aria-label="Run"></select>'
        '</label><div class="text" tabindex="0" role="group" aria-label="Text of the example, coloured by KL"></div>'
        '<p class="readout" aria-live="polite"></p><table class="byrole"><thead><tr>'
        '<th scope="col">role of the token</th><th scope="col">rows</th><th scope="col">mean KL, nats</th></tr></thead>'
        "<tbody></tbody></table></div>"
        for index in chosen
    )
    return (
        '<h2 id="tokens-title">Where it moved: KL(base||tuned) token by token</h2><p class="lead">The first example of '
        "the test split. A token is coloured by the KL of its row, which predicts the token after it; the line below "
        "it is its role. Framed: the boundary row, which predicts the first token of the response.</p>"
        '<p class="legend"><span>0<span class="scale"></span><span id="scale-top"></span> (root scale)</span>'
        "<span>one scale for all texts shown</span></p>"
        f'<div class="panes">{panes}</div>'
    )


def _notes() -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in NOTES)
    return f'<h2 id="notes-title">How the numbers were got</h2><ul class="notes">{items}</ul>'
