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
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from selfaug import cli
from selfaug.errors import UserError

log = logging.getLogger(__name__)

BASE = "base"
_OF_THE_RUN = ("model", "data", "trainer", "adapter")  # settings that a run directory brings along


def evaluate(config: DictConfig, directory: str) -> Any:
    """Score config.target and write results.json. Returns selfaug.reporting.results.Results."""
    # Here and not above, so that --help and --cfg answer at once.
    from selfaug.reporting.results import write_results
    from selfaug.run import build
    from selfaug.run.identity import RunDirectory
    from selfaug.run.score import as_results, asks, check, measure
    from selfaug.run.targets import load_models

    cli.quieten()
    if OmegaConf.is_missing(config, "target"):
        raise UserError("target is not set: set it to a run directory, an adapter folder or a model, or to base.")
    run = RunDirectory(directory)
    config = with_settings_of_run(config)
    check(config)
    if not asks(config):
        raise UserError("evaluation=none measures nothing: set evaluation to quick, standard or full.")
    started = time.perf_counter()
    models = load_models(config)
    data = build.data(config) if config.evaluation.get("rag") else None
    results = as_results(config, measure(config, models, data, run.evaluation), data)
    results.time["evaluate_s"] = results.time["total_s"] = time.perf_counter() - started
    write_results(run.results, results)
    return results


def with_settings_of_run(config: DictConfig) -> DictConfig:
    """Where the target is a run directory, or a checkpoint in one: its model, data, precision and adapter settings.

    What the command line says wins.
    """
    path = Path(str(config.target)).expanduser()
    folder = path.parent.parent if path.suffix == ".ckpt" else path
    saved = folder / "config.yaml"
    if config.target == BASE or not (saved.is_file() and (folder / "run.json").is_file()):
        return config
    theirs = OmegaConf.load(saved)
    assert isinstance(theirs, DictConfig)
    merged = config.copy()
    said = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    with open_dict(merged):
        for key in _OF_THE_RUN:
            if key in theirs:
                merged[key] = theirs[key]
        for override in said:
            name = override.lstrip("+").partition("=")[0]
            if name.split(".")[0] in _OF_THE_RUN and "." in name:
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
