"""What SelfAug set out to show, each as a number to reach, and what the results in benchmarks/results say to it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.common import Column, Row, value

Results = Mapping[str, Mapping[str, Any]]  # name of the result file -> its content

COLUMNS = (
    Column("what", value("what")),
    Column("goal", value("goal")),
    Column("measured", value("measured")),
    Column("reached", value("reached")),
)
_SHAPES = ("2048, 49152, 576", "4096, 151936, 896")
_MODEL = "asset:smollm2-135m-instruct"


class Goal(NamedTuple):
    """rows: those of result file `source` that it is about, all of which have to fit; measured by `key`."""

    what: str
    source: str
    wanted: Mapping[str, Any]
    key: str
    most: float | None = None
    least: float | None = None
    form: str = "{:.2f}"


def goals() -> list[Goal]:
    """Issue by issue; the sizes are named in `what`."""
    found: list[Goal] = []
    for shape in _SHAPES:
        for dtype, most in (("float32", 1.15), ("bf16", 1.5)):
            rows: Row = {"case": shape, "dtype": dtype, "implementation": "selfaug"}
            name = f"op at ({shape}), {dtype}"
            found += [
                Goal(f"{name}: time, of the three bare products", "linear_kl-cpu", rows, "ratio", most=most),
                Goal(f"{name}: times faster than the official computation", "linear_kl-cpu", rows, "speedup", least=2),
                Goal(f"{name}: extra memory, of the official's", "linear_kl-cpu", rows, "memory_share", 0.05, None,
                     "{:.1%}"),
            ]  # fmt: skip
            if dtype == "float32":
                for key, of in (("value_error_relative", "value"), ("gradient_error", "gradient")):
                    found.append(
                        Goal(f"{name}: {of}, relative distance from float64", "linear_kl-cpu", rows, key, 1e-5, None,
                             "{:.0e}")
                    )  # fmt: skip
    for mode, about, most in (
        ("cache+sampling", "cache and a quarter of the rows", 1.05),
        ("cache", "cache, all rows", 1.15),
        ("selfaug", "no cache, all rows", 1.50),
    ):
        rows = {"model": _MODEL, "context": 1024, "implementation": mode}
        found.append(Goal(f"optimiser step, {about}: time, of plain LoRA's", "step-cpu", rows, "ratio", most=most))
        found.append(Goal(f"optimiser step, {about}: peak memory", "step-cpu", rows, "memory_ratio", most=1.10))
    cheap: Row = {"implementation": "cheap", "runs": 5}
    found.append(Goal("sweep of five alphas, cache and sampling: plain runs", "sweep-cpu", cheap, "ratio", most=5.6))
    for data in ("squad", "long-tailed"):
        for way in ("budget", "packed"):
            rows = {"data": data, "implementation": way}
            found.append(
                Goal(f"batching of {data}, {way}: useful share", "data-cpu", rows, "useful_share", None, 0.95, "{:.1%}")
            )
            found.append(Goal(f"batching of {data}, {way}: loss, relative distance from one by one", "data-cpu", rows,
                              "loss_error", 1e-5, None, "{:.0e}"))  # fmt: skip
    rows = {"context": 65_536, "implementation": "sampling"}
    found.append(Goal("64K tokens with sampled rows: peak in bytes", "long_context-cpu", rows, "total_bytes",
                      24 * 2**30, None, "{:,.0f}"))  # fmt: skip
    return found


def judged(results: Results) -> list[Row]:
    """One row for each goal. The worst of its rows counts."""
    rows = [_judge(goal, results) for goal in goals()]
    return [*rows, *_agreement(results), *_official_fails(results), *_peers(results)]


def _judge(goal: Goal, results: Results) -> Row:
    limit = goal.most if goal.most is not None else goal.least
    sign = "at most" if goal.most is not None else "at least"
    row: Row = {"what": goal.what, "goal": f"{sign} {goal.form.format(limit)}"}
    matching = _matching(results, goal.source, goal.wanted)
    values = [found[goal.key] for found in matching if found.get(goal.key) is not None]
    if not matching or len(values) < len(matching):
        return row | {"measured": "–", "reached": "not measured"}
    worst = max(values) if goal.most is not None else min(values)
    met = worst <= goal.most if goal.most is not None else worst >= (goal.least or 0.0)
    return row | {"measured": goal.form.format(worst), "reached": "yes" if met else "no"}


def _matching(results: Results, source: str, wanted: Mapping[str, Any]) -> list[Row]:
    rows: Sequence[Row] = results.get(source, {}).get("rows", ())
    return [row for row in rows if all(row.get(key) == wish for key, wish in wanted.items())]


def _agreement(results: Results) -> list[Row]:
    rows = [row for row in results.get("sweep-cpu", {}).get("rows", ()) if "agree" in row]
    if not rows:
        return []
    yes = sum(row["agree"] == "yes" for row in rows)
    return [
        {"what": "the cheap sweep's task scores and drift agree with the full one's", "goal": "within their intervals",
         "measured": f"{yes} of {len(rows)} comparisons", "reached": "yes" if yes == len(rows) else "no"}
    ]  # fmt: skip


def _official_fails(results: Results) -> list[Row]:
    rows = _matching(results, "long_context-cpu", {"context": 65_536, "implementation": "official"})
    return [
        {"what": "64K tokens, the official way in 24 GiB", "goal": "cannot", "measured": row["outcome"],
         "reached": "yes" if row.get("why") else "no"}
        for row in rows
    ]  # fmt: skip


def _peers(results: Results) -> list[Row]:
    """On a GPU: in how many cases the op is faster, and leaner, than every other implementation that ran."""
    rows: Sequence[Row] = results.get("linear_kl-cuda", {}).get("rows", ())
    found = []
    for key, word in (("seconds", "faster"), ("extra_bytes", "leaner")):
        cases: dict[tuple[str, str], dict[str, float]] = {}
        for row in rows:
            if row.get(key) is not None and row["implementation"] != "floor":
                cases.setdefault((row["case"], row["dtype"]), {})[row["implementation"]] = row[key]
        won = [case for case in cases.values() if case.get("selfaug") == min(case.values())]
        if cases:
            found.append(
                {"what": f"op on a GPU, {word} than every peer", "goal": "in every case",
                 "measured": f"in {len(won)} of {len(cases)}", "reached": "yes" if len(won) == len(cases) else "no"}
            )  # fmt: skip
    return found
