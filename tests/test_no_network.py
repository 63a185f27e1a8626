"""Invariant 10: a run that names no hub model or data set opens no connection and looks up no host."""

from tests.workspace import Workspace

# Python imports this module at start-up. Anything but a local socket is written down and refused.
BLOCK = """
import os, socket

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
"""


def test_training_and_scoring_need_no_network(tmp_path):
    workspace = Workspace(tmp_path)
    blocker = tmp_path / "blocker"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(BLOCK)
    log = tmp_path / "network.log"
    environment = workspace.environment()
    variables = {"PYTHONPATH": f"{blocker}:{environment['PYTHONPATH']}", "NETWORK_LOG": str(log), "HF_HUB_OFFLINE": "0"}
    done = workspace.train("trainer.max_steps=1", **variables)
    assert done.returncode == 0, done.stderr
    assert not log.exists(), log.read_text()


def test_the_block_works(tmp_path):
    workspace = Workspace(tmp_path)
    blocker = tmp_path / "blocker"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(BLOCK)
    log = tmp_path / "network.log"
    environment = workspace.environment()
    variables = {"PYTHONPATH": f"{blocker}:{environment['PYTHONPATH']}", "NETWORK_LOG": str(log), "HF_HUB_OFFLINE": "0"}
    done = workspace.train("model.name=nobody/nothing", **variables)
    assert done.returncode == 1
    assert "the hub cannot be reached" in done.stderr
    assert log.exists()
