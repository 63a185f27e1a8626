"""A sweep that chooses its runs: Optuna searches the front between what is learned and what is kept.

The study is a journal in the sweep's directory. A search that was stopped goes on: finished trials are known, one that
was under way is done again with the same settings (its finished runs are skipped), and the suggestions are those of a
search that was never stopped, because the random numbers of a trial depend on its number alone.

(The hydra-optuna-sweeper for Hydra 1.3 wants Optuna 2 and crashes with a study in a file.)
"""

import logging
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from selfaug.errors import UserError
from selfaug.files import write_text
from selfaug.run import search
from selfaug.run.sweep import read_job, record_job, sweep_directory

log = logging.getLogger(__name__)


class OptunaSweeper(Sweeper):
    """The arguments are explained in selfaug/conf/hydra/sweeper/selfaug_optuna.yaml."""

    def __init__(self, params: dict[str, Any], trials: int, parallel: int, sampler: str, seed: int, task: str) -> None:
        self.params, self.trials, self.parallel = params, trials, parallel
        self.sampler, self.seed, self.task = sampler, seed, task
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run trials until there are enough, then write front.md. `arguments` are the overrides of the command line.

        Raises:
            UserError: wrong settings of the search, or others than those that it was started with.
        """
        assert self.hydra_context is not None
        assert self.config is not None
        assert self.launcher is not None
        self._check()
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        lines = [f"{key}={value}" for key, value in self.params.items() if value is not None]
        fixed, seeds, space = search.split(parser.parse_overrides(lines + arguments))
        measures = search.measures(self.config, self.task)
        study = self._study(space, measures, search.inside(space, self.config))
        while pending := self._next(study, space):
            jobs = [[*fixed, *search.settings(params), *seed] for _, params in pending for seed in seeds]
            self.validate_batch_is_legal(jobs)
            returns = self.launcher.launch(jobs, initial_job_idx=pending[0][0] * len(seeds))
            # The value of a job is asked for so that an error outside the task ends the search.
            ended = [read_job(str(job.cfg.run_name)) for job in returns if job.cfg and job.return_value is None]
            for place, (number, params) in enumerate(pending):
                mine = ended[place * len(seeds) : (place + 1) * len(seeds)]
                self._tell(study, number, params, mine, measures)
        trials = [trial for name, trial in study.user_attrs.items() if name.startswith("trial ")]
        for job in (job for trial in trials for job in trial["jobs"]):  # those of earlier parts are in the table too
            record_job(**job)
        best = {trial.number for trial in study.best_trials} if any(trial["values"] for trial in trials) else set()
        write_text(sweep_directory() / "front.md", search.front(trials, best, measures))

    def _check(self) -> None:
        for name, least in (("trials", 1), ("parallel", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise UserError(f"hydra.sweeper.{name}={value} is not allowed: set it to a number from {least} on.")
        if self.sampler not in ("tpe", "nsgaii"):
            raise UserError(f"hydra.sweeper.sampler={self.sampler} is unknown: set it to tpe or nsgaii.")
        try:
            import optuna
        except ModuleNotFoundError as error:
            raise UserError("hparams_search=optuna needs a package: pip install 'selfaug[optuna]'.") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)

    def _study(self, space: dict[str, Any], measures: tuple[str, str], first: dict[str, Any]) -> Any:
        """The study of this sweep. first: settings of the first trial of a new one; what they lack is proposed."""
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        directory = sweep_directory()
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(directory / "study.journal"))),
            study_name=directory.name,
            directions=["maximize", "minimize" if measures[1] == "drift" else "maximize"],
            load_if_exists=True,
        )
        about = [[f"{key}={space[key]}" for key in sorted(space)], list(measures), self.sampler, self.seed]
        if "about" not in study.user_attrs:
            study.enqueue_trial(first)
            study.set_user_attr("about", about)
        elif study.user_attrs["about"] != about:
            raise UserError(
                f"The search in {directory} was started with another hydra.sweeper: delete that directory to start it "
                "anew, or set hydra.sweeper back."
            )
        return study

    def _next(self, study: Any, space: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
        """Number and settings of the trials to run now: what was under way when the search was stopped, then new."""
        from optuna.samplers import NSGAIISampler, TPESampler
        from optuna.trial import TrialState

        pending = []
        begun = study.get_trials(deepcopy=False, states=tuple(set(TrialState) - {TrialState.WAITING}))
        for trial in begun:
            if trial.state == TrialState.RUNNING and set(trial.params) == set(space):
                pending.append((trial.number, trial.params))
            elif trial.state == TrialState.RUNNING:  # stopped between two of its suggestions
                self._tell(study, trial.number, {}, [], None)
        for number in range(len(begun), min(len(begun) + self.parallel - len(pending), self.trials)):
            seed = 100_003 * self.seed + number
            tpe = self.sampler == "tpe"
            study.sampler = TPESampler(seed=seed) if tpe else NSGAIISampler(population_size=10, seed=seed)
            pending.append((number, study.ask(space).params))
        return pending

    def _tell(self, study: Any, number: int, params: dict[str, Any], jobs: list[dict[str, Any]], measures: Any) -> None:
        """Keep what became of a trial: ours first, so that of a trial that is over for Optuna we know all."""
        from optuna.trial import TrialState

        values, error = search.objectives(jobs, measures) if jobs else (None, "stopped before it began")
        told = {"number": number, "settings": search.settings(params), "values": values, "error": error, "jobs": jobs}
        study.set_user_attr(f"trial {number}", told)
        if error:
            log.warning("trial %d failed: %s", number, error)
        study.tell(number, values, state=TrialState.FAIL if error else TrialState.COMPLETE)
