"""Jobs of a sweep in processes of their own: all are run and recorded, one that fails is named, GPUs are shared out."""

import json
import os
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins
from hydra_plugins.hydra_joblib_launcher.config import JobLibLauncherConf
from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf
from omegaconf import OmegaConf

from selfaug.run import launchers
from tests.run.conftest import Runs

STEPS = "trainer.max_steps=1"


def test_processes_do_the_same_as_one(runs: Runs):
    result = runs.inline("-m", "alignment.alpha=-1,0.5", STEPS, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert result.returncode == 1, result.stdout + result.stderr
    (good,) = [path.parent for path in runs.runs.glob("*/results.json")]
    # The process of the sweep knows what happened in the others.
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("selfaug: ")]
    assert " failed: " in line
    assert "alpha=-1" in line
    assert "Table: " in result.stdout
    (records,) = (runs.runs / "sweeps").glob("*/jobs")
    assert sorted(json.loads(path.read_text())["number"] for path in records.iterdir()) == [0, 1]

    trained = (good / "fit.json").stat().st_mtime_ns
    (good / "results.json").unlink()
    # Wherever it is started again, a run is the same run: what is there is not done again.
    again = runs.inline("-m", "alignment.alpha=0.5", STEPS, "hydra/launcher=submitit_local")
    assert again.returncode == 0, again.stdout + again.stderr
    assert (good / "results.json").is_file()
    assert (good / "fit.json").stat().st_mtime_ns == trained


@pytest.mark.parametrize("name", ["joblib", "submitit", "ray"])
def test_package_that_is_missing(name: str, runs: Runs, monkeypatch: pytest.MonkeyPatch):
    known = {key: kind for key, kind in Plugins.instance().class_name_to_class.items() if f"hydra_{name}_" not in key}
    monkeypatch.setattr(Plugins.instance(), "class_name_to_class", known)
    result = runs.inline("-m", f"hydra/launcher={name}{'_local' * (name == 'submitit')}", "seed=1,2")
    assert result.returncode == 1
    assert result.stderr.strip().endswith(f"a package that is missing: pip install 'selfaug[{name}]'.")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "schema"),
    [("joblib", JobLibLauncherConf), ("submitit_local", LocalQueueConf), ("submitit_slurm", SlurmQueueConf)],
)
def test_presets_are_settings_that_the_plugins_take(name: str, schema: type):
    launchers.register()
    OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(launchers.PRESETS[name]))


def test_processes_for_gpus(monkeypatch: pytest.MonkeyPatch):
    launchers.register()
    preset = OmegaConf.create(launchers.PRESETS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5,7")
    assert preset.joblib.n_jobs == 3
    assert preset.ray.ray.remote.num_gpus == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert preset.joblib.n_jobs == 2
    assert preset.ray.ray.remote.num_gpus == 0


def test_each_process_takes_the_gpu_with_the_fewest_users(tmp_path: Path):
    held = [launchers.take(["2", "GPU-ab"], tmp_path) for _ in range(5)]
    assert [name for name, _ in held] == ["2", "GPU-ab", "2", "GPU-ab", "2"]
    os.close(held[1][1])  # as when a process ends
    assert launchers.take(["2", "GPU-ab"], tmp_path)[0] == "GPU-ab"


@pytest.mark.parametrize(("launcher", "given"), [("joblib", "5"), ("submitit_local", "5"), ("submitit_slurm", "5,6")])
def test_gpus_are_shared_out_on_this_machine_alone(
    launcher: str, given: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    monkeypatch.setattr(launchers, "_held", None)
    monkeypatch.setattr(launchers.tempfile, "gettempdir", lambda: str(tmp_path))
    target = launchers.PRESETS[launcher]["_target_"]
    config = OmegaConf.create({"hydra": {"launcher": {"_target_": target}}})
    launchers.OneGpuEach().on_job_start(config)
    launchers.OneGpuEach().on_job_start(config)  # the next job of this process keeps it
    assert os.environ["CUDA_VISIBLE_DEVICES"] == given
    assert (launchers._held is None) == (given == "5,6")
