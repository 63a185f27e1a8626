"""Runs for the tests of this folder: one tiny workspace for all of them, and a runner that saves the imports."""

import contextlib
import gc
import importlib
import io
import logging
import os
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from unittest import mock

import pytest
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra

from selfaug import train
from selfaug.run import launch
from tests.run.warm import PRELOADED, Warm
from tests.workspace import Workspace

# For tests that do not look at the scores.
UNSCORED = ("evaluation.rag=null", "evaluation.drift=null")
QUICK = ("trainer.precision=32-true", "evaluation.rag.limit=2", "evaluation.rag.max_new_tokens=2")


class Runs(Workspace):
    """A workspace whose commands can also run in this process: the same entry point without 4 s of imports."""

    def __init__(self, path: Path):
        path.mkdir(parents=True, exist_ok=True)
        super().__init__(path)

    def overrides(self) -> list[str]:
        return [*super().overrides(), *QUICK]

    def into(self, runs: str | Path) -> "Runs":
        """The same workspace (and token cache) with another directory for its runs."""
        other = object.__new__(type(self))
        other.path, other.runs = self.path, self.path / runs
        return other

    def inline(self, *overrides: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """As train(), but in this process."""
        command = self.command(*overrides)
        # Hydra composes every configuration twice, the first time for hydra.mode, which only these set.
        asks = any(one.lstrip("+").startswith(("experiment=", "hparams_search=", "hydra.mode=")) for one in overrides)
        mode = contextlib.nullcontext() if asks else mock.patch.object(Hydra, "get_mode", return_value=None)
        out, err, status = io.StringIO(), io.StringIO(), 0
        with (
            _restored(),
            mode,
            mock.patch.dict(os.environ, self.environment(**variables)),
            mock.patch.object(sys, "argv", command[2:]),
            mock.patch.object(launch, "Popen", Warm),  # workers of several processes
            contextlib.chdir(self.path),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                train.main()
            except SystemExit as error:
                status = error.code if isinstance(error.code, int) else int(error.code is not None)
            except Exception:
                traceback.print_exc()
                status = 1
        return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())

    def done(self, *overrides: str, **variables: str) -> Path:
        """Run to the end in this process, which must succeed; the run directory, the only one there."""
        result = self.inline(*overrides, **variables)
        assert result.returncode == 0, result.stdout + result.stderr
        return self.only()

    def only(self) -> Path:
        (directory,) = self.directories()
        return directory


@contextlib.contextmanager
def _restored():
    """Hydra and Lightning configure logging, warnings and singletons for a whole process; give them back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for handler in [h for h in root.handlers if h not in handlers]:
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        GlobalHydra.instance().clear()


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Shared by all tests of the folder: read its files only, and use into() for a directory of runs."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # what was imported stays: every run collects garbage twice, and need not look through it again
    return Runs(tmp_path_factory.mktemp("workspace"))


@pytest.fixture
def runs(workspace: Runs, tmp_path: Path) -> Runs:
    """The shared workspace with an empty directory for this test's runs."""
    return workspace.into(tmp_path / "runs")
