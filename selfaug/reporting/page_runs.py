"""The page's list of runs: what each was, cost and ran on, and its whole configuration."""

from html import escape
from typing import Any

import yaml

from selfaug.reporting.compare import Comparison, Row
from selfaug.reporting.results import Results, mask_secrets

_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml, ten times as fast, where PyYAML was built with it


def run_title(row: Row, run: Results) -> str:
    """`position=input_logits, seed 1`"""
    return f"{row.label}, seed {run.seed}"


def runs_section(found: Comparison) -> str:
    """The section's HTML; every run, those that did not finish too."""
    if not found.results:
        return ""
    rows = {id(run): row for row in found.rows for run in row.runs.values()}
    ordered = [run for row in found.rows for run in row.runs.values()]
    ordered += [run for run in found.results if id(run) not in rows]
    items = "".join(_run(run, rows.get(id(run))) for run in ordered)
    return (
        '<h2 id="runs-title">Runs</h2><div class="tools"><label><span>Filter</span>'
        '<input type="search" id="filter-runs" placeholder="words of a run"></label>'
        f'<span class="count" id="count-runs" aria-live="polite"></span></div><div class="card runs">{items}</div>'
    )


def _run(run: Results, row: Row | None) -> str:
    why = "its seed is there twice" if run.status == "finished" else run.status
    title = run_title(row, run) if row is not None else f"{run.name} (not counted: {why})"
    cost = (duration(run.time.get("total_s")), memory(run.memory.get("peak_bytes")))
    short = " · ".join(text for text in cost if text)
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _facts(run))
    config = yaml.dump(mask_secrets(run.config), Dumper=_DUMPER, sort_keys=False, allow_unicode=True)
    return (
        f"<details><summary><b>{escape(title)}</b><span>{escape(short)}</span></summary><dl>{facts}</dl>"
        f"<details><summary>Configuration</summary><pre>{escape(config)}</pre></details></details>"
    )


def _facts(run: Results) -> list[tuple[str, str]]:
    code, data = run.code, run.data
    commit = f", commit {str(code['commit'])[:12]}" if code.get("commit") else ""
    commit += " with changes" if code.get("dirty") else ""
    speed = run.speed.get("train_tokens_per_s")
    facts = [
        ("name", run.name),
        ("seed", str(run.seed)),
        ("status", run.status),
        ("selfaug", f"{code.get('version')}{commit}"),
        ("configuration hash", run.config_hash),
        ("examples used", _listed(data.get("used"))),
        ("data fingerprint", str(data.get("fingerprint") or "")),
        ("training", duration(run.time.get("fit_s"))),
        ("evaluation", duration(run.time.get("evaluate_s"))),
        ("training speed", f"{speed:,.0f} tokens/s" if speed else ""),
        ("peak memory", memory(run.memory.get("peak_bytes"))),
        ("environment", _listed(run.environment)),
    ]
    return [(name, text) for name, text in facts if text]


def _listed(values: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items()) if isinstance(values, dict) else ""


def duration(seconds: float | None) -> str:
    """`48 s`, `8 min 52 s`, `2 h 05 min`; nothing where it was not measured."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def memory(count: int | None) -> str:
    """`4.3 GiB`"""
    return f"{count / 2**30:.1f} GiB" if count else ""
