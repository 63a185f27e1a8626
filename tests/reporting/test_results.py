"""results.json: whole or absent, valid JSON, no secrets, readable again."""

import dataclasses
import getpass
import json
import math
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import selfaug
from selfaug.errors import UserError
from selfaug.evaluation.statistics import Interval
from selfaug.reporting import results as module
from selfaug.reporting.results import (
    Results,
    code_version,
    environment,
    mask_secrets,
    read_results,
    write_results,
)


def make(**changes) -> Results:
    score = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    values = {
        "name": "run",
        "config": {"data": {"max_tokens": 512}, "tags": ["a"]},
        "config_hash": "abc",
        "seed": 1,
        "code": {"version": "0.1.0", "commit": None, "dirty": None},
        "data": {"fingerprint": "f", "counts": {"train": 3}, "truncation": {"train": {"documents_cut": 1}}},
        "task": {"exact_match": {"base": score, "tuned": score, "difference": None}},
        "drift": {"wiki": {"kl_base_tuned": {"tuned": score}}},
        "time": {"fit_s": 1.5, "evaluate_s": 2.0, "total_s": 3.5},
        "speed": {"train_tokens_per_s": 100.0},
        "memory": {"peak_bytes": 123},
        "environment": {"python": "3.11"},
        "samples": [{"id": "1", "question": "Où? 中", "answers": ["a"], "base": "b", "tuned": "c"}],
    }
    return Results(**{**values, **changes})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "results.json"


def test_round_trip(path):
    write_results(path, make())
    assert read_results(path) == make()
    assert read_results(str(path)) == make()
    assert os.listdir(path.parent) == ["results.json"]
    assert json.loads(path.read_text(encoding="utf-8"))["schema_version"] == 1
    assert "中" in path.read_text(encoding="utf-8")


def test_intervals_and_scalars(path):
    interval = Interval(0.5, math.nan, math.inf, 4)
    write_results(
        path,
        make(
            task={"f1": {"base": interval}},
            time={"fit_s": np.float32(0.5), "total_s": float("-inf")},
            memory={"peak_bytes": np.int64(7)},
            config={"path": Path("a/b"), "shape": (1, 2), "on": np.bool_(True), 3: math.nan},
        ),
    )

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    back = read_results(path)
    assert back.task["f1"]["base"] == {"mean": 0.5, "low": None, "high": None, "n": 4}
    assert back.time == {"fit_s": 0.5, "total_s": None}
    assert back.memory == {"peak_bytes": 7}
    assert back.config == {"path": "a/b", "shape": [1, 2], "on": True, "3": None}


def test_broken_unicode_is_written(path):
    write_results(path, make(name="half a \ud83d sign"))
    assert read_results(path).name == "half a ? sign"


@pytest.mark.parametrize("stage", ["write", "fsync", "replace", "value"])
def test_a_failed_write_leaves_the_old_file(path, monkeypatch, stage):
    write_results(path, make())
    before = path.read_bytes()
    new = make(name="new")

    def fail(*arguments):
        raise OSError("disk full")

    if stage == "write":
        opened = Path.open
        monkeypatch.setattr(module.Path, "open", lambda self, *a, **k: _Half(opened(self, *a, **k)))
    elif stage == "value":
        new.config["object"] = object()
    else:
        monkeypatch.setattr(module.os, stage, fail)
    with pytest.raises((OSError, TypeError)) as caught:
        write_results(path, new)
    monkeypatch.undo()
    assert stage != "value" or "config.object is a object" in str(caught.value)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["results.json"], "the temporary file is gone"


class _Half:
    """A file on which writing stops in the middle."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, text):
        self.file.write(text[: len(text) // 2])
        self.file.flush()
        raise OSError("disk full")


def test_killed_while_writing(path):
    """The process dies without cleaning up: the old file is still whole, and the next write goes through."""
    write_results(path, make())
    code = (
        "import os, sys\n"
        "from selfaug.reporting import results\n"
        "old = results.read_results(sys.argv[1])\n"
        "old.name = 'new'\n"
        "results.os.fsync = lambda descriptor: os._exit(9)\n"
        "results.write_results(sys.argv[1], old)\n"
    )
    root = Path(selfaug.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=root, check=False).returncode == 9
    assert read_results(path) == make()
    write_results(path, make(name="newer"))
    assert read_results(path).name == "newer"


def test_secrets(path):
    config = {
        "logger": {"wandb": {"api_key": "k1", "WANDB_API_KEY": "k2", "project": "p", "entity": None}},
        "hub": {"token": "hf_1", "HfToken": "hf_2", "auth_tokens": ["t1", "t2"], "use_token": True},
        "db": [{"password": 1234, "clientSecret": {"a": "s"}, "credentials": "cred-1", "secret": None}],
        "overrides": ["logger.wandb.api_key=k3", "+hub.token=hf_3", "data.max_tokens=512", "model.tokenizer=x"],
        "data": {
            "max_tokens": 512,
            "tokens": "input,output",
            "tokenizer": "a/b",
            "pad_token": "<pad>",
            "eos_token_id": 3,
        },
    }
    write_results(path, make(config=config))
    text = path.read_text()
    for secret in ("k1", "k2", "k3", "hf_1", "hf_2", "hf_3", "t1", "t2", "1234", '"s"', "cred-1"):
        assert secret not in text
    back = read_results(path).config
    assert back["logger"]["wandb"] == {"api_key": "***", "WANDB_API_KEY": "***", "project": "p", "entity": None}
    assert back["hub"] == {"token": "***", "HfToken": "***", "auth_tokens": ["***", "***"], "use_token": True}
    assert back["db"][0] == {"password": "***", "clientSecret": {"a": "***"}, "credentials": "***", "secret": None}
    assert back["overrides"] == [
        "logger.wandb.api_key=***",
        "+hub.token=***",
        "data.max_tokens=512",
        "model.tokenizer=x",
    ]
    assert back["data"] == config["data"], "settings about tokens are no secrets"
    assert config["hub"]["token"] == "hf_1", "the caller's config is not touched"
    assert mask_secrets("plain") == "plain"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not whole JSON"),
        ('{"schema_version": 1, "name": "ru', "not whole JSON"),
        ("[1, 2]", "not a results file"),
        ("{}", "schema_version is missing"),
        ('{"schema_version": 2}', "schema_version is 2 and this selfaug reads 1"),
        ('{"schema_version": 1}', "'name' is missing"),
    ],
)
def test_unreadable_files(path, content, message):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_results(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_unreadable_files(path):
    with pytest.raises(UserError, match="no such file"):
        read_results(path)
    path.mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be read"):
        read_results(path)
    binary = path.parent / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not whole JSON"):
        read_results(binary)


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(Results)])
def test_wrong_types_are_named(path, key):
    write_results(path, make())
    content = json.loads(path.read_text())
    content[key] = 1.5
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=key):
        read_results(path)


def test_unknown_keys_are_passed_over(path):
    write_results(path, make())
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "later": 1}))
    assert read_results(path) == make()


def test_code_version(tmp_path, monkeypatch):
    version = code_version()
    assert set(version) == {"version", "commit", "dirty"}
    assert version["version"] == selfaug.__version__

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    package = tmp_path / "selfaug"
    package.mkdir()
    (package / "__init__.py").write_text("x = 1\n")
    (tmp_path / "other.py").write_text("")
    monkeypatch.setattr(selfaug, "__file__", str(package / "__init__.py"))
    nowhere = {"version": selfaug.__version__, "commit": None, "dirty": None}
    assert code_version() == nowhere
    git("init", "-q")
    git("add", "other.py")
    git("commit", "-qm", "somebody else's repository around an installed package")
    assert code_version() == nowhere
    git("add", "selfaug")
    git("commit", "-qm", "a checkout")
    # As inside a git hook, where these point elsewhere.
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nothing"))
    clean = code_version()
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "notes.txt").write_text("outside the package")
    assert code_version() == clean
    (package / "new.py").write_text("y = 2\n")
    assert code_version() == {**clean, "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_version() == nowhere


def test_environment_names_no_person_and_no_machine(monkeypatch):
    monkeypatch.setenv("SOME_VARIABLE", "some-value-of-the-environment")
    found = environment("NVIDIA H100", "bf16-mixed")
    assert found["python"] == platform.python_version()
    assert found["device"] == "NVIDIA H100"
    assert environment()["device"] == "cpu"
    assert found["precision"] == "bf16-mixed"
    assert found["cpu_count"] >= 1
    assert {"torch", "transformers", "peft", "lightning"} <= set(found)
    texts = [str(value) for value in found.values()]
    assert not any("/" in text for text in texts)
    for private in (getpass.getuser(), socket.gethostname(), str(Path.home()), "some-value-of-the-environment"):
        assert private not in texts


def test_no_torch_is_imported():
    code = (
        "import sys, selfaug.reporting.table, selfaug.evaluation.answers as a\n"
        "from selfaug.reporting.results import environment\n"
        "environment()\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    root = Path(selfaug.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
