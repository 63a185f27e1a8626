"""method=sdft from the command line: the base model rewrites the targets once, a killed writing goes on."""

import json
from pathlib import Path

import pytest

from selfaug.data import rewriting
from selfaug.run.rewriting import ModelRewriter
from tests.run.conftest import Runs

SDFT = ("method=sdft", "data.rewrite.max_new_tokens=6", "trainer.max_steps=2", "evaluation.drift=null")


def files(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (cache / "rewritten").rglob("*.json")}


def test_a_run_rewrites_its_targets_once(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rewriting, "BLOCK", 8)
    cache = tmp_path / "c"
    written: list[int] = []
    write = ModelRewriter._write

    def counted(self, examples):
        written.append(len(examples))
        if fail and len(written) == 2:
            raise RuntimeError("killed")
        return write(self, examples)

    monkeypatch.setattr(ModelRewriter, "_write", counted)
    fail = True
    assert runs.inline(*SDFT, SELFAUG_CACHE=str(cache)).returncode != 0
    assert len(files(cache)) == 1
    fail = False
    done = runs.inline(*SDFT, SELFAUG_CACHE=str(cache))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "training targets were rewritten" in done.stdout + done.stderr
    found = files(cache)
    assert len(found) == len(written) - 1 > 1  # one was stopped, and the first block was not written again
    directory = runs.only()
    assert json.loads((directory / "results.json").read_text())["config"]["data"]["rewrite"]["max_new_tokens"] == 6

    # Another seed, and never killed: the same targets.
    written.clear()
    assert runs.inline(*SDFT, "seed=2", SELFAUG_CACHE=str(cache)).returncode == 0
    assert not written
    other = tmp_path / "other"
    assert runs.inline(*SDFT, "seed=3", SELFAUG_CACHE=str(other)).returncode == 0
    assert files(other) == found
