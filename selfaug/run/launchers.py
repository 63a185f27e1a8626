"""Launchers: where the jobs of a sweep run. Hydra's own runs them one after the other in this process.

The others are Hydra's plug-ins, each behind an extra of selfaug. Their configurations are here and not in
selfaug/conf, where Hydra would check them against those of the plug-ins, which have the same names.
"""

import fcntl
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

_SUBMITIT: dict[str, Any] = {
    "submitit_folder": "${hydra.sweep.dir}/.submitit/%j",  # what the jobs print
    "name": "selfaug",
    "timeout_min": 1440,
    "nodes": 1,
    "tasks_per_node": 1,
    "gpus_per_node": None,
    "cpus_per_task": None,
    "mem_gb": None,
    "stderr_to_stdout": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    # Several jobs at once on this machine, each process with a GPU of its own, or with its share of the cores.
    "joblib": {
        "_target_": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
        "n_jobs": "${gpus:2}",  # as many as there are GPUs; two where there are none
        "pre_dispatch": "n_jobs",
        "batch_size": 1,
        "timeout": None,
        "verbose": 0,
    },
    # A process for each job, all at once (or hydra.sweeper.max_batch_size of them): to try what Slurm will do.
    "submitit_local": {
        "_target_": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
        **_SUBMITIT,
    },
    # A Slurm job with one GPU for each. Run directories, cache and code must be where all nodes see them.
    "submitit_slurm": {
        "_target_": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
        **_SUBMITIT,
        "gpus_per_node": 1,
        "cpus_per_task": 8,
        "mem_gb": 64,
        "max_num_timeout": 10,  # a job out of time is queued again so often, and goes on from its last checkpoint
        "signal_delay_s": 120,
        "array_parallelism": 64,  # jobs at once
        **dict.fromkeys(("partition", "account", "qos", "constraint", "exclude", "comment", "setup")),
        "additional_parameters": {},  # anything else that sbatch takes
    },
    "ray": {
        "_target_": "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher",
        "ray": {
            # address: None starts a cluster on this machine, for this sweep; auto or host:port is one that is running.
            "init": {"address": None, "include_dashboard": False},
            # What a job asks for; cores are its threads too. What failed is done again by the same command, not by ray.
            "remote": {"num_gpus": "${gpus_per_job:}", "num_cpus": 1, "max_retries": 0},
        },
    },
}
_ON_THIS_MACHINE = tuple(PRESETS[name]["_target_"] for name in ("joblib", "submitit_local"))
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_held: int | None = None  # file descriptor of this process's lock


def register() -> None:
    """Make the presets known to Hydra, after its plug-ins: of two configurations of one name the later one counts."""
    Plugins.instance()
    for name, settings in PRESETS.items():
        ConfigStore.instance().store(group="hydra/launcher", name=name, node=settings, provider="selfaug")
    OmegaConf.register_new_resolver("gpus", lambda default: len(visible_gpus()) or default, replace=True)
    OmegaConf.register_new_resolver("gpus_per_job", lambda: min(len(visible_gpus()), 1), replace=True)


class OneGpuEach(Callback):
    """Hydra callback, set in train.yaml: one GPU for each process that joblib or submitit_local has started.

    The number of a job says nothing about which GPU is free when it starts. So a process takes a lock on a GPU when
    its first job starts, and keeps both to its end; the lock goes with the process, however that ends. Where there are
    more processes than GPUs they share them evenly.
    """

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        global _held
        if _held is not None or config.hydra.launcher._target_ not in _ON_THIS_MACHINE:
            return
        if names := visible_gpus():
            # Of this user and not of this sweep, so that two sweeps at once do not meet on one GPU.
            os.environ[_VISIBLE], _held = take(names, Path(tempfile.gettempdir()) / f"selfaug-gpus-{os.getuid()}")


def visible_gpus() -> list[str]:
    """The names, as CUDA_VISIBLE_DEVICES has them, of the GPUs that this process may use. Does not start CUDA."""
    if (named := os.environ.get(_VISIBLE)) is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def take(names: list[str], directory: Path) -> tuple[str, int]:
    """Lock the GPU that has the fewest users. Its name, and the file descriptor whose end is the lock's end."""
    directory.mkdir(mode=0o700, exist_ok=True)
    for users in itertools.count():
        for name in names:
            place = os.open(directory / f"{name}-{users}", os.O_CREAT | os.O_RDWR, 0o600)
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return name, place
            except BlockingIOError:
                os.close(place)
    raise AssertionError("itertools.count() has no end")
