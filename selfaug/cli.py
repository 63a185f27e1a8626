"""The command line of the entry points: Hydra, with errors in one sentence.

+experiment=NAME and experiment=NAME mean the same.
debug=traceback shows where an error came from.
"""

import difflib
import errno
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import ContextDecorator
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from selfaug import processor
from selfaug.errors import UserError
from selfaug.run import launchers
from selfaug.run.identity import register_resolvers

INTERRUPTED = 128 + signal.SIGINT  # what a shell reports for a process ended by Ctrl-C


def run(task: Callable[[DictConfig], Any], config_name: str) -> None:
    """Compose the configuration from sys.argv and call `task` with it (once for each job of a sweep).

    A mistake of the user's ends in one sentence on stderr and exit status 1.
    """
    register_resolvers()
    launchers.register()
    quieten()
    arguments = [re.sub(r"^\+(experiment=)", r"\1", argument) for argument in sys.argv[1:]]
    sys.argv[1:] = flags_first(arguments)
    # Hydra prints its own paragraphs unless it is told to raise.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    processor.tune()
    with _user_errors():
        # The inner one, because Hydra prints a line of its own about an exception that leaves a job.
        hydra.main(version_base="1.3", config_path="pkg://selfaug.conf", config_name=config_name)(
            _user_errors()(task)
        )()


_VALUED = re.compile(r"--?(config-(dir|name|path)|c[dnp]|package|p|cfg|c|experimental-rerun)")


def flags_first(arguments: list[str]) -> list[str]:
    """Hydra's flags, with their values, before the overrides: its parser wants that, people write them anywhere."""
    flags: list[str] = []
    overrides: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        (flags if argument.startswith("-") else overrides).append(argument)
        if _VALUED.fullmatch(argument) and (value := next(rest, None)) is not None:
            flags.append(value)
    return flags + overrides


class _user_errors(ContextDecorator):
    """Ends the program with one sentence where the user can mend the error, or has stopped it; lets every other error
    through."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, KeyboardInterrupt):
            print("selfaug: interrupted; the same command goes on where it was stopped.", file=sys.stderr)
            sys.exit(INTERRUPTED)
        message = sentence(error) if isinstance(error, Exception) else None
        if message is not None and not wants_traceback():
            print(f"selfaug: {message}", file=sys.stderr)
            sys.exit(1)


def quieten() -> None:
    """Silence what libraries say that is no news to the user; their warnings about his run stay."""
    for name in ("bm25s", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "`is_gradient_checkpointing` is deprecated",  # peft 0.21 under transformers 5
        "Experiment logs directory",  # the run directory is meant to be found again
        "`isinstance\\(treespec, LeafSpec\\)`",  # Lightning 2.6 under torch 2.13
        "The 'train_dataloader' does not have many workers",
        "The 'val_dataloader' does not have many workers",
    ):
        warnings.filterwarnings("ignore", message=f".*{message}")


def wants_traceback() -> bool:
    """debug=traceback was given."""
    return any(re.match(r"\+?debug=.*traceback", argument) for argument in sys.argv[1:])


def sentence(error: BaseException) -> str | None:
    """What to tell the user about an error that is his to mend; None for one that is ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, (HydraException, OmegaConfBaseException)):  # one of Hydra's is an OSError too
        if isinstance(error.__cause__, (UserError, OSError)):
            return sentence(error.__cause__)
        return _hydra_sentence(error)
    if isinstance(error, OSError):
        return _system_sentence(error)
    if isinstance(error, RuntimeError) and (missing := _MISSING_LAUNCHER.search(str(error))):
        return f"This hydra/launcher needs a package that is missing: pip install 'selfaug[{missing[1]}]'."
    if type(error).__name__ in _KILLED and type(error).__module__.split(".")[0] in ("joblib", "submitit", "ray"):
        return (
            "A process of the sweep was killed, perhaps for want of memory: the same command does what is missing, and "
            "fewer jobs at once (hydra.launcher.n_jobs, hydra.sweeper.max_batch_size) need less."
        )
    # Libraries written in Rust (safetensors, tokenizers) hide the system's error in their text.
    hidden = re.search(r"\(os error (\d+)\)", str(error))
    return _system_sentence(OSError(int(hidden[1]), str(error))) if hidden else None


_KILLED = ("TerminatedWorkerError", "UncompletedJobError", "WorkerCrashedError", "OutOfMemoryError")
_MISSING_LAUNCHER = re.compile(r"Unknown plugin class : 'hydra_plugins\.hydra_(\w+)_launcher\.")


def _system_sentence(error: OSError) -> str | None:
    place = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"The disk is full{place}: free some space, or set paths.runs_dir or SELFAUG_CACHE to another disk; "
            "the same command then goes on from the last checkpoint."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return f"Cannot write there{place}: set paths.runs_dir (or SELFAUG_CACHE) to a directory that can be written."
    return None


def _hydra_sentence(error: BaseException) -> str:
    text = str(error)
    if missing := re.search(r"[Mm]issing mandatory value: ([\w.]+)", text):
        return f"{missing[1]} is not set and has no default: add {missing[1]}=... to the command."
    if missing := re.search(r"Interpolation key '([\w.]+)' not found", text):
        return f"{missing[1]} is not set, and another setting is made of it: set it, or correct its name there."
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if missing := re.search(r"Could not override '([^']+)'", text):
        # An override by a dictionary names the setting, and only its cause the key in it that is wrong.
        full = re.search(r"full_key: ([\w.]+)", f"{text}\n{error.__cause__}")
        key = full[1] if full else missing[1]
        if (nearest := _nearest(key)) == f", did you mean {key}":
            return f"What was chosen has no setting {key}: leave it out, or choose another {key.partition('.')[0]}."
        if nearest and key.startswith(f"{nearest.removeprefix(', did you mean ')}."):
            nearest = ""  # where it stands is right, its own name is not
        return f"There is no setting {key}{nearest}; to add it all the same write +{key}=..."
    if missing := re.search(r"In '[^']+': Could not find '([^']+)'|Could not find '([^']+)'", text):
        group, _, choice = (missing[1] or missing[2]).rpartition("/")
        known = [line for line in lines[1:] if re.fullmatch(r"[\w\-.]+", line) and line != "base"]
        among = f"; choose one of {', '.join(known)}" if known else ""
        own = " (one of your own needs --config-dir FOLDER)" if group == "method" else ""
        return f"There is no {group}={choice}{among}{own}." if group else f"There is no configuration {choice}{among}."
    return f"The configuration is not valid: {lines[0].rstrip('.') if lines else type(error).__name__}."


def _nearest(key: str) -> str:
    """', did you mean X' for the setting of train.yaml that is spelled most like `key`."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_module("selfaug.conf", version_base="1.3"):
        known = _flatten(compose("train"))
    near = difflib.get_close_matches(key, known, n=1) or difflib.get_close_matches(
        key, [k for k in known if "." not in k]
    )
    return f", did you mean {near[0]}" if near else ""


def _flatten(config: Any, prefix: str = "") -> list[str]:
    names = []
    for key in config:
        names.append(f"{prefix}{key}")
        child = config._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
            names += _flatten(child, f"{prefix}{key}.")
    return names
