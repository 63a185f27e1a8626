"""hparams_search=optuna: the front is searched, a stopped search goes on as if it had not been, failures are kept."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from selfaug.errors import UserError
from selfaug.run import search, sweep
from selfaug.run.optuna_sweeper import OptunaSweeper
from tests.run.conftest import Runs

CONFIG = OmegaConf.create(
    {
        "x": 0.5,
        "y": 7.0,
        "kind": "a",
        "evaluation": {"rag": {"limit": 2}, "drift": {"seed": 0}, "retention": {"benchmarks": {"piqa": {}}}},
    }
)
PARAMS = {"x": "tag(log, interval(0.01, 1))", "y": "interval(0, 1)"}


class Jobs:
    """In place of a launcher: a run's scores are a formula of its settings. Some runs fail, some kill the search."""

    def __init__(self) -> None:
        self.launched: list[dict[str, str]] = []
        self.kill_at: int | None = None

    def launch(self, overrides: list[list[str]], initial_job_idx: int) -> list[Any]:
        done = []
        for number, job in enumerate(overrides, initial_job_idx):
            if len(self.launched) == self.kill_at:
                raise KeyboardInterrupt
            settings = dict(one.split("=", 1) for one in job)
            self.launched.append(settings)
            x, y, seed = float(settings["x"]), float(settings["y"]), int(settings.get("seed", 0))
            place = sweep.sweep_directory().parent / f"run-{settings['x']}-{settings['y']}-{seed}"
            place.mkdir(exist_ok=True)
            error = "it was too large" if x > 0.4 and y < 0.4 else None
            sweep.record_job(str(place), place.name, number, error)
            scores = {"f1": x - y + seed, "kept": y - x * x}
            (place / "scores.json").write_text(json.dumps(scores))
            done.append(SimpleNamespace(cfg=SimpleNamespace(run_name=place.name), return_value=None))
        return done


@pytest.fixture
def searching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """search(trials, ...) in a directory; gives the launched jobs and the trials that the study knows."""

    def read(path: Path) -> Any:
        scores = json.loads(path.with_name("scores.json").read_text())
        return SimpleNamespace(
            task={"f1": {"tuned": {"mean": scores["f1"]}}}, retention_mean={"retention": {"mean": scores["kept"]}}
        )

    monkeypatch.setattr(search, "read_results", read)
    monkeypatch.setattr(OptunaSweeper, "validate_batch_is_legal", lambda *_: None)

    def run(place: str, jobs: Jobs, trials: int, *arguments: str, **settings: Any) -> list[dict[str, Any]]:
        directory = tmp_path / place
        (directory / "jobs").mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("SELFAUG_SWEEP_DIR", str(directory))
        given = {"params": PARAMS, "parallel": 1, "sampler": "tpe", "seed": 0, "task": "f1", **settings}
        sweeper = OptunaSweeper(trials=trials, **given)
        sweeper.config, sweeper.launcher = CONFIG, jobs  # type: ignore[assignment]
        sweeper.hydra_context = SimpleNamespace(config_loader=None)  # type: ignore[assignment]
        sweeper.sweep(list(arguments))
        return told(directory)

    return run


def told(directory: Path) -> list[dict[str, Any]]:
    """The trials in the study's journal, read with Optuna alone."""
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    storage = JournalStorage(JournalFileBackend(str(directory / "study.journal")))
    study = optuna.load_study(study_name=directory.name, storage=storage)
    return [
        {"params": trial.params, "values": trial.values, "state": trial.state.name, "number": trial.number}
        for trial in study.trials
    ]


def test_a_search(searching, tmp_path: Path):
    jobs = Jobs()
    trials = searching("one", jobs, 15)
    assert len(jobs.launched) == len(trials) == 15
    assert jobs.launched[0]["x"] == "0.5"  # the configuration's own; its y is outside of the space
    assert 0 <= float(jobs.launched[0]["y"]) <= 1
    failed = [trial for trial in trials if trial["state"] == "FAIL"]
    assert 0 < len(failed) < 15
    assert all((trial["values"] is None) == (trial["state"] == "FAIL") for trial in trials)
    for trial, job in zip(trials, jobs.launched, strict=True):
        assert job == {name: f"{value:.4g}" for name, value in trial["params"].items()}
        if trial["values"]:
            x, y = float(job["x"]), float(job["y"])
            assert trial["values"] == pytest.approx([x - y, y - x * x])
    page = (tmp_path / "one" / "front.md").read_text()
    listed = {int(line.split("|")[1]) for line in page.splitlines() if line.startswith("| ") and "trial" not in line}
    good = [trial for trial in trials if trial["values"]]
    best = {
        a["number"] for a in good
        if not any(b["values"][0] >= a["values"][0] and b["values"][1] >= a["values"][1] and b is not a for b in good)
    }  # fmt: skip
    assert listed == best
    assert f"{len(failed)} failed" in page
    assert len(list((tmp_path / "one" / "jobs").iterdir())) == 15


@pytest.mark.parametrize("parallel", [1, 3])
def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(searching, parallel: int):
    whole = searching("whole", Jobs(), 15, parallel=parallel)
    jobs = Jobs()
    for jobs.kill_at in (4, 11, 13):
        with pytest.raises(KeyboardInterrupt):
            searching("parts", jobs, 15, parallel=parallel)
    jobs.kill_at = None
    assert searching("parts", jobs, 15, parallel=parallel) == whole


@pytest.mark.parametrize("sampler", ["tpe", "nsgaii"])
def test_more_trials_go_on_where_fewer_ended(searching, sampler: str, tmp_path: Path):
    whole = searching("whole", Jobs(), 24, sampler=sampler)
    jobs = Jobs()
    searching("parts", jobs, 8, sampler=sampler)
    for record in (tmp_path / "parts" / "jobs").iterdir():
        record.unlink()  # as at the start of every sweep
    assert searching("parts", jobs, 24, sampler=sampler) == whole
    assert len(jobs.launched) == 24
    # Those of the first part are in the table too. NSGA-II tries some settings twice, which are one run.
    assert len(list((tmp_path / "parts" / "jobs").iterdir())) == len({tuple(job.items()) for job in jobs.launched})
    assert searching("parts", jobs, 24, sampler=sampler) == whole
    assert len(jobs.launched) == 24


def test_every_trial_has_all_seeds(searching):
    jobs = Jobs()
    trials = searching("seeds", jobs, 4, "seed=1,2", "x=0.25")
    assert [(job["seed"], job["x"]) for job in jobs.launched] == [("1", "0.25"), ("2", "0.25")] * 4
    for trial in trials:
        assert set(trial["params"]) == {"y"}  # x has a value now
        assert trial["values"][0] == pytest.approx(0.25 - trial["params"]["y"] + 1.5, abs=1e-3)


def test_another_space_is_another_search(searching):
    searching("one", Jobs(), 2)
    with pytest.raises(UserError, match="delete that directory"):
        searching("one", Jobs(), 2, params={**PARAMS, "x": "interval(0, 2)"})


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"trials": 0}, "hydra.sweeper.trials=0"), ({"parallel": "x"}, "hydra.sweeper.parallel=x"),
        ({"sampler": "grid"}, "tpe or nsgaii"), ({"task": "bleu"}, "crag_score"), ({"params": {}}, "nothing to search"),
        ({"params": {"x": "tag(log, interval(0, 1))"}}, "x=tag"),
    ],
)  # fmt: skip
def test_wrong_settings(searching, settings: dict[str, Any], word: str):
    trials = settings.pop("trials", 2)
    with pytest.raises(UserError, match=word.replace("(", r"\(")):
        searching("wrong", Jobs(), trials, **settings)


def test_what_is_searched():
    lines = ["a=interval(0,1)", "b=tag(log,interval(1e-4,1e-2))", "c=int(interval(2,8))", "d=choice(x,y)", "e=3,4",
             "f=range(1,4)", "g=1", "g=2", "seed=5,6", "h=interval(0,1)", "h=0.5"]  # fmt: skip
    fixed, seeds, space = search.split(OverridesParser.create().parse_overrides(lines))
    assert fixed == ["g=2", "h=0.5"]
    assert seeds == [["seed=5"], ["seed=6"]]
    assert space == {
        "a": FloatDistribution(0, 1), "b": FloatDistribution(1e-4, 1e-2, log=True), "c": IntDistribution(2, 8),
        "d": CategoricalDistribution(["x", "y"]), "e": CategoricalDistribution(["3", "4"]),
        "f": CategoricalDistribution(["1", "2", "3"]),
    }  # fmt: skip


def test_drift_stands_in_for_retention():
    none: dict[str, Any] = {
        "evaluation": {"rag": {"limit": 2}, "drift": {"seed": 0}, "retention": {"benchmarks": {"piqa": None}}}
    }
    assert search.measures(OmegaConf.create(none), "f1") == ("f1", "drift")
    assert search.measures(CONFIG, "f1") == ("f1", "retention")
    none["evaluation"]["drift"] = None
    with pytest.raises(UserError, match="evaluation=task"):
        search.measures(OmegaConf.create(none), "f1")
    run = SimpleNamespace(
        drift={name: {"kl_base_tuned": {"tuned": {"mean": mean}}} for name, mean in (("a", 1.0), ("b", 3.0))}
    )
    assert search._value(run, "drift") == 2


def test_package_that_is_missing(searching, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"selfaug\[optuna\]"):
        searching("missing", Jobs(), 2)


def test_from_the_command_line(runs: Runs):
    space = ("alignment.alpha=choice(-1,0.5)", "optimizer.lr=interval(1e-4,1e-3)", "hydra.sweeper.trials=3")
    result = runs.inline("hparams_search=optuna", *space, "trainer.max_steps=1")
    assert result.returncode == 1  # alpha = -1 is refused, and tried in at least one of three
    finished = [d for d in runs.directories() if (d / "results.json").is_file()]
    refused = [line for line in result.stderr.splitlines() if line.startswith("selfaug: ")]
    assert len(finished) + len(refused) == 3
    assert finished
    assert refused
    assert "Traceback" not in result.stdout + result.stderr
    (directory,) = (runs.runs / "sweeps").iterdir()
    page = (directory / "front.md").read_text()
    assert page in result.stdout
    assert "drift (nats per token)" in page
    again = runs.inline("hparams_search=optuna", *space, "trainer.max_steps=1")
    assert again.returncode == 1
    assert "this run is finished" not in again.stdout  # nothing was launched
    assert page in again.stdout
