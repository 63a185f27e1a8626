"""Which of several processes this one is, whoever has started them."""

import os


def inside_launcher() -> bool:
    """Whether somebody (torchrun, srun with several tasks, launch_workers) has started this process as one of several.
    A Slurm job that runs one task, such as an interactive shell, has not."""
    return "LOCAL_RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def rank() -> int:
    """The number of this process among those that train together, 0 where it is alone."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    return int(os.environ.get("SLURM_PROCID", "0")) if inside_launcher() else 0
