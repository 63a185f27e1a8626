"""Score a model against its base: what it learned, what it kept.

Run as: python -m selfaug.evaluate target=RUN_DIRECTORY          a finished or stopped run of selfaug.train
        python -m selfaug.evaluate target=ADAPTER_FOLDER model=qwen2_5_7b
        python -m selfaug.evaluate target=MODEL_FOLDER_OR_HUB_NAME model=qwen2_5_7b
        python -m selfaug.evaluate baseline [model=...]           the base model alone, kept for all later runs
        ... evaluation=quick|standard|full, evaluation.rag=null to leave the task out

A killed evaluation goes on with the benchmark in which it was stopped.
"""

import logging
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from selfaug import cli
from selfaug.errors import UserError

log = logging.getLogger(__name__)

BASE = "base"
_OF_THE_RUN = ("model", "data", "trainer", "adapter", "method", "seed")  # what a run directory brings along
# Settings of `data` that only feed others.
_SHORTHAND = {
    "path": "data.source.path",
    "context_tokens": "data.source.context_tokens",
    "answer_tokens": "evaluation.rag.max_new_tokens",
    "name": "data.source",
}


def evaluate(config: DictConfig, directory: str) -> Any:
    """Score config.target and write results.json. Returns selfaug.reporting.results.Results."""
    # Here and not above, so that --help and --cfg answer at once.
    from selfaug.reporting.results import write_results
    from selfaug.run import build
    from selfaug.run.identity import RunDirectory, config_hash
    from selfaug.run.loggers import log_results, run_loggers
    from selfaug.run.score import as_results, asks, check, measure
    from selfaug.run.targets import load_models

    cli.quieten()
    if OmegaConf.is_missing(config, "target"):
        raise UserError("target is not set: set it to a run directory, an adapter folder or a model, or to base.")
    run = RunDirectory(directory)
    name, identity = config.run_name, config_hash(config)
    said = HydraConfig.get()
    chosen = [one.partition("=")[0] for one in said.overrides.task if re.fullmatch(r"(model|data|trainer)=\w+", one)]
    asked = config  # whose hash names the run
    config = with_settings_of_run(config, chosen, said.overrides.task)
    check(config)
    if not asks(config):
        raise UserError("evaluation=none measures nothing: set evaluation to quick, standard or full.")
    # First, so that a logger that cannot be had is not noticed only after an hour.
    with run_loggers(asked, run.path, training=False, job_type="evaluate") as loggers:
        started = time.perf_counter()
        models = load_models(config)
        data = build.data(config) if config.evaluation.get("rag") else None
        results = as_results(config, measure(config, models, data, run.evaluation), data)
        results.time["evaluate_s"] = results.time["total_s"] = time.perf_counter() - started
        results.name, results.config_hash = name, identity  # the directory's, not those of the settings taken over
        write_results(run.results, results)
        log_results(loggers, results)
    return results


def with_settings_of_run(config: DictConfig, choices: Sequence[str], overrides: Sequence[str]) -> DictConfig:
    """Where the target is a run directory, or a checkpoint in one: its model, data, precision, seed and method.

    choices: the groups that the command line chose (data=crag), which win. overrides: its settings (model.dtype=...),
    which win too; but a setting that others have been worked out from in the run cannot be changed any more.

    Raises:
        UserError: such a setting.
    """
    path = Path(str(config.target)).expanduser()
    folder = path.parent.parent if path.suffix == ".ckpt" else path
    saved = folder / "config.yaml"
    if config.target == BASE or not (saved.is_file() and (folder / "run.json").is_file()):
        return config
    theirs = OmegaConf.load(saved)
    assert isinstance(theirs, DictConfig)
    merged = config.copy()
    with open_dict(merged):
        given = {override.lstrip("+").partition("=")[0] for override in overrides}
        for key in _OF_THE_RUN:
            if key in theirs and key not in choices and not (key == "seed" and key in given):
                merged[key] = theirs[key]
        for override in overrides:
            name = override.lstrip("+").partition("=")[0]
            group = name.split(".")[0]
            if "." not in name or group not in _OF_THE_RUN or group in choices:
                continue
            if group == "data" and name.count(".") == 1 and name.split(".")[1] in _SHORTHAND:
                raise UserError(
                    f"{name} was worked into other settings of the run {folder.name}: set {_SHORTHAND[name[5:]]} "
                    "instead, or choose the data anew with data=..."
                )
            OmegaConf.update(merged, name, OmegaConf.select(config, name))
    return merged


def _task(config: DictConfig) -> None:
    from selfaug.reporting.retention_table import retention_table
    from selfaug.reporting.table import console, results_table

    directory = HydraConfig.get().runtime.output_dir
    results = evaluate(config, directory)
    page = console()
    for table in (results_table(results), retention_table(results)):
        if table is not None:
            page.print(table)
    page.print(f"Prompts, answers and results.json: {directory}", soft_wrap=True, highlight=False)


def main() -> None:
    sys.argv[1:] = [re.sub(r"^baseline$", f"target={BASE}", argument) for argument in sys.argv[1:]]
    cli.run(_task, "evaluate")


if __name__ == "__main__":
    main()
