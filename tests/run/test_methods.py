"""+experiment=methods debug=smoke: every method from the command line to one table."""

import json
from pathlib import Path
from unittest import mock

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from tests.run.conftest import Runs
from tests.run.test_dialogues import SHORT, talk, talkative  # noqa: F401


def test_every_method_runs_and_one_that_cannot_is_named(talk: Runs, tmp_path: Path):  # noqa: F811
    # Two of them have no LoRA whose rank could be set.
    shared = [one for one in talk.overrides() if not one.startswith("adapter.")]
    with (
        mock.patch.object(talk, "overrides", return_value=shared),
        # Hydra would compose the configurations of all jobs twice: before the first one, and each before its job.
        mock.patch.object(BasicSweeper, "validate_batch_is_legal"),
    ):
        done = talk.inline("+experiment=methods", "debug=smoke", "seed=1", *SHORT, SELFAUG_CACHE=str(tmp_path / "c"))
    assert done.returncode == 1
    (named,) = [line for line in done.stderr.splitlines() if line.startswith("selfaug: ")]
    assert "stm" in named  # the random model finds no token likely, so that there is nothing to be learned
    assert "method.learn.threshold=2.5 leaves none of" in named
    (sweep,) = (talk.runs / "sweeps").iterdir()
    records = [json.loads(path.read_text()) for path in (sweep / "jobs").iterdir()]
    methods = {record["name"].partition("-")[0]: record["error"] is None for record in records}
    assert len(methods) == len(records) == 20
    assert [method for method, finished in methods.items() if not finished] == ["stm"]
    table = (sweep / "table.md").read_text()
    assert all(f"\n| {method}" in table for method in methods if method not in ("stm", "lora"))
    assert "| plain LoRA |" in table
    assert (sweep / "report.html").is_file()
