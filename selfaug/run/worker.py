"""One of several training processes, started by selfaug.run.launch: python -m selfaug.run.worker RUN_DIRECTORY"""

import logging
import os
import signal
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from selfaug.cli import INTERRUPTED, quieten, sentence
from selfaug.run import build
from selfaug.run.fit import SIGTERM_EXIT, fit
from selfaug.run.identity import RunDirectory, register_resolvers
from selfaug.run.loggers import run_loggers


def main() -> None:
    """Train as the process that the environment says; the configuration is the run directory's."""
    register_resolvers()
    logging.basicConfig(level=logging.INFO if os.environ.get("RANK") == "0" else logging.ERROR, format="%(message)s")
    quieten()
    # While it loads and fills there is nothing to save; from the first step on SaveCheckpoints handles it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(SIGTERM_EXIT))
    run = RunDirectory(sys.argv[1])
    config = OmegaConf.load(run.path / "config.yaml")
    assert isinstance(config, DictConfig)
    try:
        with run_loggers(config, run.path) as loggers:
            fit(config, run, build.data(config), loggers)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)  # whoever started the workers says so
    except Exception as error:
        message = sentence(error)
        if message is None:
            raise
        (run.path / "worker-error.txt").write_text(message)
        sys.exit(1)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python -m selfaug.run.worker RUN_DIRECTORY")
    main()
