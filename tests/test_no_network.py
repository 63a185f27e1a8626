"""Invariant 10: a run that names no hub model or data set opens no connection and looks up no host."""

import json
import subprocess
import sys

import pytest

from tests.workspace import Workspace

# Python imports this module at start-up. Anything but a local socket is written down and refused.
BLOCK = """
import os, socket, time

def refuse(kind):
    def attempt(*arguments, **_):
        with open(os.environ["NETWORK_LOG"], "a") as log:
            log.write(f"{kind} {arguments[-1]!r}\\n")
        raise OSError("the network is blocked in this test")
    return attempt

connect = socket.socket.connect
def only_local(self, address):
    return connect(self, address) if self.family == socket.AF_UNIX else refuse("connect")(address)

socket.socket.connect = only_local
socket.getaddrinfo = refuse("getaddrinfo")
# The hub's client would try again for a minute.
time.sleep = lambda seconds: None
"""


# The commands one after the other; how each of them ended, and what has been written down by then.
ONE_AFTER_THE_OTHER = """
import json, os, runpy, sys
from pathlib import Path

log, found = Path(os.environ["NETWORK_LOG"]), []
for sys.argv in json.loads(sys.argv[1]):
    status = 0
    try:
        runpy.run_module("selfaug.train", run_name="__main__", alter_sys=True)
    except SystemExit as error:
        status = error.code
    found.append({"status": status, "reached": log.read_text() if log.exists() else ""})
log.with_suffix(".json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def blocked(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], str]:
    """Of a process that cannot reach the network: a run that names a folder, then one that names a hub model; how each
    ended and what was tried to reach until then, and what the process said."""
    workspace = Workspace(tmp_path_factory.mktemp("blocked"))
    blocker, log = workspace.path / "blocker", workspace.path / "network.log"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(BLOCK)
    path = f"{blocker}:{workspace.environment()['PYTHONPATH']}"
    commands = [workspace.command(override)[2:] for override in ("trainer.max_steps=1", "model.name=nobody/nothing")]
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER, json.dumps(commands)], cwd=workspace.path,
        env=workspace.environment(PYTHONPATH=path, NETWORK_LOG=str(log), HF_HUB_OFFLINE="0"), capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(log.with_suffix(".json").read_text()), done.stderr


def test_training_and_scoring_need_no_network(blocked: tuple[list[dict], str]):
    (local, _), stderr = blocked
    assert local["status"] == 0, stderr
    assert local["reached"] == ""


def test_the_block_works(blocked: tuple[list[dict], str]):
    (_, hub), stderr = blocked
    assert hub["status"] == 1
    assert "the hub cannot be reached" in stderr
    assert hub["reached"]
