"""A sweep over alpha: what it costs with cache and sampled rows, in plain LoRA runs, and whether it finds the same.

Run as: python -m benchmarks.sweep [--examples 40 --context 512 --epochs 2 --alphas 0.1,0.3,0.5,1,2] [--official 1]

Every run is one that a user would start (`python -m selfaug.train`, sweeps with -m). plain: LoRA alone, once before
and once after everything else. cheap: cache on disk and a random quarter of the rows. full: no cache, all rows.
official: whole float32 logits of both models (benchmarks/official.py), for the first so many alphas. A run's cost is
its training seconds, to which the sweep's cache adds the time to fill it, once.

Agreement of cheap and full, alpha by alpha: of the task scores the paired difference over the same questions has 0 in
its interval; of the drift, whose values by document a run does not keep, the two intervals overlap.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import common
from benchmarks.common import Column, Row, value
from selfaug import processor
from selfaug.evaluation.answers import exact_match, token_f1
from selfaug.evaluation.statistics import over_seeds, paired_difference
from selfaug.reporting.results import Results, read_results

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "plain": ["method=lora"],
    "cheap": ["method=selfaug", "reference.cache=disk", "alignment.rows=random", "alignment.share=0.25"],
    "full": ["method=selfaug"],
    "official": ["method=selfaug", "alignment._target_=benchmarks.official.OfficialAlignment"],
}
SCORES = {"exact_match": exact_match, "f1": token_f1}
COLUMNS = (
    Column("what", value("implementation")),
    Column("runs", value("runs")),
    Column("training, s", value("train_seconds", "{:,.1f}")),
    Column("filling the cache, s", value("fill_seconds", "{:,.1f}")),
    Column("of one plain run", value("ratio", "{:.2f}")),
    Column("five runs of it", value("five_runs", "{:.2f}")),
    Column("commands without evaluation, s", value("command_seconds", "{:,.1f}")),
)


def _interval(key: str, form: str = "{:+.3f}") -> Any:
    def cell(row: Row) -> str:
        mean, low, high = row[key]
        return f"{form.format(mean)} ({form.format(low)} to {form.format(high)})"

    return cell


AGREEMENT = (
    Column("alpha", value("alpha")),
    Column("measure", value("measure")),
    Column("full", _interval("full", "{:.4f}")),
    Column("cheap", _interval("cheap", "{:.4f}")),
    Column("cheap - full", _interval("difference", "{:+.4f}")),
    Column("compared", value("how")),
    Column("agree", value("agree")),
)


def command(way: str, place: Path, alphas: Sequence[str], arguments: argparse.Namespace) -> list[str]:
    """What a user would type."""
    corpora = "evaluation.drift.corpora"
    settings = [
        *WAYS[way], "evaluation=task", f"paths.runs_dir={place / way}", f"reference.directory={place / 'reference'}",
        f"trainer.max_epochs={arguments.epochs}", f"data.batch_size={arguments.batch}",
        f"data.limit_train={arguments.examples}", "data.limit_val=4", f"evaluation.rag.limit={arguments.questions}",
        f"evaluation.samples={arguments.questions}", f"seed={arguments.seed}", "progress=false",
        f"{corpora}.wikipedia.limit={arguments.documents}", f"{corpora}.dialogues.limit={2 * arguments.documents}",
        *([f"data.context_tokens={arguments.context}"] if arguments.context else []), *arguments.override,
    ]  # fmt: skip
    sweep = ["-m", f"alignment.alpha={','.join(alphas)}"] if alphas else []
    return [sys.executable, "-m", "selfaug.train", *sweep, *settings]


def execute(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run it to its end. benchmarks/ is no part of the package, so it has to be on the path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def run(way: str, place: Path, alphas: Sequence[str], arguments: argparse.Namespace) -> tuple[list[Path], float]:
    """Run it; the run directories and the seconds that the command took, evaluation included."""
    print(f"  {way} in {place.name} ...", flush=True)
    began = time.perf_counter()
    done = execute(command(way, place, alphas, arguments))
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    directories = sorted(path.parent for path in (place / way).glob("*/results.json"))
    print(f"  {way}: {len(directories)} runs, {seconds:.0f} s", flush=True)
    return directories, seconds


def fill_seconds(directory: Path) -> float | None:
    """From the first entry that was written to the last, and one entry's share for the first. The runs' own figures
    begin with their first step, which comes after."""
    written = sorted(path.stat().st_mtime for path in directory.rglob("*.safetensors"))
    if len(written) < 2:
        return None
    return (written[-1] - written[0]) * len(written) / (len(written) - 1)


def cost(way: str, directories: Sequence[Path], seconds: float, fill: float | None) -> Row:
    """One row of the table of costs."""
    trained = [json.loads((directory / "fit.json").read_text())["seconds"] for directory in directories]
    scored = [read_results(directory / "results.json").time["evaluate_s"] or 0.0 for directory in directories]
    return {
        "implementation": way, "runs": len(directories), "train_seconds": sum(trained), "each": trained,
        "fill_seconds": fill, "command_seconds": seconds - sum(scored),
    }  # fmt: skip


def ratios(rows: list[Row]) -> None:
    """Add each row's cost in plain runs: the mean of the plain ones, which were run at both ends of the whole."""
    plain = [row for row in rows if row["implementation"] == "plain"]
    one = sum(row["train_seconds"] for row in plain) / sum(row["runs"] for row in plain)
    for row in rows:
        row["ratio"] = (row["train_seconds"] + (row["fill_seconds"] or 0.0)) / one
        row["five_runs"] = row["train_seconds"] / row["runs"] * 5 / one + (row["fill_seconds"] or 0.0) / one


def agreement(full: Sequence[Path], cheap: Sequence[Path]) -> list[Row]:
    """Task scores and drift of the two sweeps, alpha by alpha, and over all alphas."""
    ours, theirs = _by_alpha(cheap), _by_alpha(full)
    rows: list[Row] = []
    for alpha in sorted(theirs):
        rows += _compare(alpha, theirs[alpha], ours[alpha])
    for measure in dict.fromkeys(row["measure"] for row in rows):
        same = [row for row in rows if row["measure"] == measure]
        if len(same) > 1:
            rows.append(_over_alphas(measure, same))
    return rows


def _by_alpha(directories: Sequence[Path]) -> dict[float, Results]:
    results = [read_results(directory / "results.json") for directory in directories]
    return {float(result.config["method"]["terms"]["kl"]["alpha"]): result for result in results}


def _compare(alpha: float, full: Results, cheap: Results) -> list[Row]:
    rows = []
    answers = {sample["id"]: sample for sample in full.samples}
    pairs = [(answers[sample["id"]], sample) for sample in cheap.samples]
    for name, score in SCORES.items():
        before = [float(score(one["tuned"], one["answers"])) for one, _ in pairs]
        after = [float(score(other["tuned"], other["answers"])) for _, other in pairs]
        gap = paired_difference(before, after)
        difference = [gap.mean, gap.low, gap.high]
        rows.append(
            _row(alpha, name, full.task[name]["tuned"], cheap.task[name]["tuned"], difference, "paired by question")
            | {"agree": "yes" if gap.low <= 0 <= gap.high else "no"}
        )
    for corpus in full.drift:
        one, other = (result.drift[corpus]["kl_base_tuned"]["tuned"] for result in (full, cheap))
        difference = [other["mean"] - one["mean"], other["low"] - one["high"], other["high"] - one["low"]]
        overlap = other["low"] <= one["high"] and one["low"] <= other["high"]
        rows.append(
            _row(alpha, f"drift, {corpus}", one, other, difference, "intervals") | {"agree": "yes" if overlap else "no"}
        )
    return rows


def _row(alpha: Any, measure: str, full: Row, cheap: Row, difference: list[float], how: str) -> Row:
    ends = ("mean", "low", "high")
    return {
        "alpha": alpha, "measure": measure, "full": [full[end] for end in ends], "cheap": [cheap[end] for end in ends],
        "difference": difference, "how": how,
    }  # fmt: skip


def _over_alphas(measure: str, rows: Sequence[Row]) -> Row:
    """The differences of all alphas as one sample: is the cheap sweep off in one direction?"""
    intervals = {key: over_seeds([row[key][0] for row in rows]).interval() for key in ("full", "cheap", "difference")}
    found = {key: [i.mean, i.low, i.high] for key, i in intervals.items()}
    low, high = found["difference"][1:]
    agree = "yes" if low <= 0 <= high else "no"
    return {"alpha": "all", "measure": measure, **found, "how": "paired by alpha", "agree": agree}


def measure(place: Path, arguments: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """Costs and agreement."""
    costs: list[Row] = []
    found: dict[str, list[Path]] = {}
    plan: list[tuple[str, str, Sequence[str]]] = [("plain", "first", ()), ("cheap", "sweep", arguments.alphas)]
    plan.append(("full", "sweep", arguments.alphas))
    if arguments.official:
        plan.append(("official", "sweep", arguments.alphas[: arguments.official]))
    plan.append(("plain", "last", ()))
    for way, where, alphas in plan:
        directories, seconds = run(way, place / where, alphas, arguments)
        found[way] = directories
        fill = fill_seconds(place / where / "reference") if way == "cheap" else None
        costs.append(cost(way, directories, seconds, fill))
    ratios(costs)
    return costs, agreement(found["full"], found["cheap"])


def main(argv: list[str] | None = None) -> None:
    processor.tune()  # as selfaug.train does, for everything that is compared
    parser = common.parser(__doc__, "sweep")
    parser.add_argument("--alphas", type=common.names, default=("0.1", "0.3", "0.5", "1", "2"))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--examples", type=int, default=40)
    parser.add_argument("--context", type=int, default=512, help="data.context_tokens; 0: leave it")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument(
        "--documents", type=int, default=6, help="of each text corpus of the drift; twice the dialogues"
    )
    parser.add_argument("--official", type=int, default=1, help="how many of the alphas to run the official way")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--override", nargs="*", default=[], help="further settings for every run")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.alphas, arguments.epochs, arguments.examples, arguments.batch = ("0.5", "1"), 1, 4, 2
        arguments.questions, arguments.documents = 4, 2
        arguments.context = arguments.context and 128
    if arguments.device == "cpu":
        arguments.override = ["trainer.accelerator=cpu", *arguments.override]
    with TemporaryDirectory(prefix="selfaug-sweep-") as place:
        costs, compared = measure(Path(place), arguments)
    common.show(f"A sweep of {len(arguments.alphas)} alphas, {arguments.epochs} epochs each", costs, COLUMNS)
    common.show("Does the cheap sweep find the same?", compared, AGREEMENT)
    common.write(common.out_path(arguments, "sweep"), "sweep", arguments, costs + compared)


if __name__ == "__main__":
    main()
