"""What is searched, what is measured, and the front that was found: the parts of a search that no library knows."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from selfaug.errors import UserError
from selfaug.reporting.results import read_results

Space = dict[str, Any]  # setting -> distribution of Optuna
_TASK_SCORES = ("exact_match", "f1", "crag_score")


def split(overrides: Sequence[Override]) -> tuple[list[str], list[list[str]], Space]:
    """The overrides of every run, those of each seed, and what is searched; of two for one setting the later counts.

    A list of seeds is no choice between them: every trial is run with all.
    """
    fixed: list[str] = []
    seeds: list[list[str]] = [[]]
    space: Space = {}
    for key, override in {one.get_key_element(): one for one in overrides}.items():
        if not override.is_sweep_override():
            fixed.append(f"{key}={override.get_value_element_as_str()}")
        elif key == "seed" and override.is_discrete_sweep():
            seeds = [[f"seed={value}"] for value in override.sweep_string_iterator()]
        else:
            space[key] = _distribution(override)
    if not space:
        raise UserError("There is nothing to search: give a setting a range, such as 'alignment.alpha=interval(0,1)'.")
    return fixed, seeds, space


def _distribution(override: Override) -> Any:
    """interval(...) is continuous, or of whole numbers where int(...) is around it; a list or range is a choice."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not override.is_interval_sweep():
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    interval: Any = override.value()
    kind = IntDistribution if isinstance(interval.start, int) else FloatDistribution
    try:
        return kind(interval.start, interval.end, log="log" in interval.tags)
    except ValueError as error:
        raise UserError(f"{override.input_line} is no range to search: {str(error).rstrip('.')}.") from error


def inside(space: Space, config: DictConfig) -> dict[str, Any]:
    """The settings of `config` that lie in the space."""
    found = {key: OmegaConf.select(config, key) for key in space}
    return {
        key: value
        for key, value in found.items()
        if isinstance(value, (int, float)) and hasattr(space[key], "low") and space[key].low <= value <= space[key].high
    }


def settings(params: dict[str, Any]) -> list[str]:
    """As overrides. Four digits tell two runs apart, and can be read."""
    return [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in params.items()]


def measures(config: DictConfig, task: str) -> tuple[str, str]:
    """The two objectives: a task score, and retention or, where no general benchmark is asked for, drift."""
    if task not in _TASK_SCORES:
        raise UserError(f"hydra.sweeper.task={task} is no task score: set it to one of {', '.join(_TASK_SCORES)}.")
    benchmarks = OmegaConf.select(config, "evaluation.retention.benchmarks") or {}
    kept = "retention" if any(benchmarks[name] is not None for name in benchmarks) else "drift"
    if not config.evaluation.get("rag") or (kept == "drift" and not config.evaluation.get("drift")):
        raise UserError("A search needs the task, and retention or drift: set evaluation=task, quick or standard.")
    return task, kept


def objectives(jobs: Sequence[dict[str, Any]], wanted: tuple[str, str]) -> tuple[list[float] | None, str | None]:
    """The means of the two measures over the jobs of a trial (records of selfaug.run.sweep), or why there are none."""
    if failed := [job["error"] for job in jobs if job["error"]]:
        return None, failed[0]
    runs = [read_results(Path(job["directory"]) / "results.json") for job in jobs]
    found = []
    for name in wanted:
        values = [value for run in runs if (value := _value(run, name)) is not None and math.isfinite(value)]
        if len(values) < len(runs):
            return None, f"{name} could not be measured (a benchmark at chance counts for nothing)"
        found.append(fmean(values))
    return found, None


def _value(run: Any, name: str) -> float | None:
    if name == "retention":
        return (run.retention_mean.get("retention") or {}).get("mean")
    if name == "drift":
        return fmean(metrics["kl_base_tuned"]["tuned"]["mean"] for metrics in run.drift.values())
    return run.task[name]["tuned"]["mean"]


def front(trials: Sequence[dict[str, Any]], best: set[int], names: tuple[str, str]) -> str:
    """The trials that no other one beats in both measures, as Markdown, with what became of the rest."""
    shown = sorted((trial for trial in trials if trial["number"] in best), key=lambda trial: -trial["values"][0])
    good = "kept (1: as the base model)" if names[1] == "retention" else "drift (nats per token)"
    lines = [f"| trial | settings | {names[0]} | {good} |", "|---:|---|---:|---:|"]
    for trial in shown:
        first, second = trial["values"]
        lines.append(f"| {trial['number']} | {', '.join(trial['settings'])} | {first:.4g} | {second:.4g} |")
    failed = sum(bool(trial["error"]) for trial in trials)
    return (
        f"The front of {len(trials)} trials: no other one is better in both, by single numbers without their intervals"
        + (f"; {failed} failed" if failed else "")
        + ".\n\n"
        + "\n".join(lines)
        + "\n"
    )
