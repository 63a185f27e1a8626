"""Invariant 10: a run that names no hub model or data set opens no connection and looks up no host."""

import subprocess
from pathlib import Path

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


def blocked_train(workspace: Workspace, *overrides: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The finished command, and the file that names what it tried to reach (absent if nothing)."""
    blocker, log = workspace.path / "blocker", workspace.path / "network.log"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(BLOCK)
    path = f"{blocker}:{workspace.environment()['PYTHONPATH']}"
    return workspace.train(*overrides, PYTHONPATH=path, NETWORK_LOG=str(log), HF_HUB_OFFLINE="0"), log


def test_training_and_scoring_need_no_network(tmp_path):
    done, log = blocked_train(Workspace(tmp_path), "trainer.max_steps=1")
    assert done.returncode == 0, done.stderr
    assert not log.exists(), log.read_text()


def test_the_block_works(tmp_path):
    done, log = blocked_train(Workspace(tmp_path), "model.name=nobody/nothing")
    assert done.returncode == 1
    assert "the hub cannot be reached" in done.stderr
    assert log.exists()
