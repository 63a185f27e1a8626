"""Fine-tune a model and show what it learned and what it kept.

Run as: python -m selfaug.train [SETTING=VALUE ...]            one run; the same command again resumes or skips it
        python -m selfaug.train -m alignment.alpha=0,0.5       a sweep, one run for each value
        python -m selfaug.train +experiment=NAME               a prepared run or sweep (selfaug/conf/experiment)
        python -m selfaug.train --cfg job                      show the configuration
"""

import logging
import shutil
import traceback
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from selfaug import cli
from selfaug.errors import UserError
from selfaug.run.identity import RunDirectory
from selfaug.run.sweep import record_job

log = logging.getLogger(__name__)


def train(config: DictConfig, directory: str) -> Any:
    """One run, from whatever point it has reached to its results. Returns selfaug.reporting.results.Results."""
    # Here and not above, so that --help and --cfg answer at once.
    from selfaug.run import build, method
    from selfaug.run.score import check

    cli.quieten()  # Lightning sets its log level when it is imported
    method.check_alignment_is_used(config, HydraConfig.get().overrides.task)
    build.check(config)
    check(config)
    run = RunDirectory(directory)
    with run.alone():
        return _train(config, run)


def _train(config: DictConfig, run: RunDirectory) -> Any:
    from selfaug.reporting.results import read_results, write_results
    from selfaug.run import build
    from selfaug.run.fit import fit
    from selfaug.run.launch import launch_workers
    from selfaug.run.loggers import log_results, run_loggers
    from selfaug.run.ranks import inside_launcher, rank
    from selfaug.run.score import score

    if config.force and run.finished:
        for leftover in (run.adapter, run.model, run.prepared, run.checkpoints, run.evaluation):
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in (run.results, run.path / "fit.json", run.path / "run.json", run.path / "metrics.csv"):
            leftover.unlink(missing_ok=True)
    data = build.data(config)
    run.claim(config, build.with_method_texts(config, data.fingerprint), build.precision(config).name)
    if run.finished:
        log.info("this run is finished: %s (force=true does it again)", run.path)
        return read_results(run.results)
    processes = build.devices(config)
    if not run.fitted and processes > 1 and not inside_launcher():
        launch_workers(run.path, processes)
    with run_loggers(config, run.path, training=not run.fitted) as loggers:
        if not run.fitted:
            fit(config, run, data, loggers)
        if rank() > 0:
            return None  # the first process scores
        write_results(run.results, score(config, run, data))
        results = read_results(run.results)
        log_results(loggers, results)
    return results


def _task(config: DictConfig) -> None:
    directory = HydraConfig.get().runtime.output_dir
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        _sweep_job(config, directory)
        return
    try:
        results = train(config, directory)
    except UserError:
        RunDirectory(directory).discard_unstarted()
        raise
    if results is not None:
        _show(results, directory)


def _sweep_job(config: DictConfig, directory: str) -> None:
    """A job that fails is recorded and does not take the others down."""
    number = HydraConfig.get().job.num
    try:
        train(config, directory)
    except Exception as error:
        message = cli.sentence(error)
        if message is None:
            message = f"{type(error).__name__}: {error}"
            log.error(traceback.format_exc())
        log.error("this run failed: %s", message)
        record_job(directory, config.run_name, number, error=message)
    else:
        record_job(directory, config.run_name, number)


def _show(results: Any, directory: str) -> None:
    from selfaug.reporting.retention_table import retention_table
    from selfaug.reporting.table import console, results_table, samples_panel

    page = console()
    for table in (results_table(results), retention_table(results)):
        if table is not None:
            page.print(table)
    if results.samples:
        page.print(samples_panel(results))
    page.print(f"Adapter or model, metrics and results.json: {directory}", soft_wrap=True, highlight=False)


def main() -> None:
    cli.run(_task, "train")


if __name__ == "__main__":
    main()
