"""W&B: job types, summaries and tables of a run, and a workspace that shows nothing that is not logged."""

import csv
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from selfaug import dashboard, evaluate, train
from selfaug.evaluation.retention.benchmarks import BENCHMARKS
from selfaug.reporting.results import read_results
from selfaug.run import loggers
from selfaug.run.loggers import SUMMARIES, has_wandb_key, scalars, tables
from tests.evaluation.retention.tiny_items import items  # noqa: F401
from tests.run.conftest import Runs
from tests.run.test_probe import PROBE

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb_workspaces")
KEY = "0123456789abcdef0123456789abcdef01234567"
LOGGED = ("logger=wandb", "logger.wandb.offline=true", "data.limit_train=8", "trainer.max_epochs=1",
          "evaluation.retention.benchmarks.arc_easy={items: 4}")  # fmt: skip


def records(directory: Path) -> list[dict[str, Any]]:
    """What is in a run's W&B file."""
    (place,) = (directory / "wandb").glob("offline-run-*")
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(place)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def of_type(found: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in found if record["type"] == kind]


def named(spec: Any) -> Iterator[str]:
    """Every metric that a workspace's specification names, tables aside."""
    if isinstance(spec, dict):
        for key, value in spec.items():
            if key in ("metrics", "xAxis", "yAxis"):
                yield from [value] if isinstance(value, str) else value
            elif key == "columnPinned":
                yield from (name for name in value if name.startswith("summary:"))
            else:
                yield from named(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from named(value)


def test_a_run_and_its_evaluation(runs: Runs, items: Path, capsys: pytest.CaptureFixture[str]):  # noqa: F811
    directory = runs.done(*LOGGED, *PROBE, WANDB_API_KEY=KEY)
    found = records(directory)
    (run,) = of_type(found, "run")
    assert (run["job_type"], run["project"]) == ("train", "selfaug")
    defined = {metric["name"]: metric.get("summary") for metric in of_type(found, "metric") if "name" in metric}
    assert {name: ",".join(sorted(kept)) for name, kept in defined.items() if kept} == {
        name: ",".join(sorted(kept.split(","))) for name, kept in SUMMARIES.items()
    }
    summary: dict[str, Any] = {}
    for update in of_type(found, "summary"):
        summary |= update["update"]
    rows = list(csv.DictReader((directory / "metrics.csv").open(newline="")))
    drifts = [float(row["probe/drift_wikipedia"]) for row in rows if row["probe/drift_wikipedia"]]
    assert summary["probe/drift_wikipedia"] == pytest.approx({"max": max(drifts), "last": drifts[-1]})
    results = read_results(directory / "results.json")
    assert summary["task/f1"] == results.task["f1"]["tuned"]["mean"]
    for name, (columns, wanted) in tables(results).items():
        assert summary[f"{name}._type"] == "table-file"
        (file,) = (directory / "wandb").glob(f"offline-run-*/files/{summary[f'{name}.path']}")
        table = json.loads(file.read_text())
        assert (table["columns"], table["data"]) == (columns, json.loads(json.dumps(wanted)))
        assert len(wanted) == {"samples": len(results.samples), "benchmarks": 2}[name]
    texts = [path for path in directory.rglob("*") if path.is_file()]
    assert not [path for path in texts if KEY.encode() in path.read_bytes()]

    # The workspace: what a run with everything measured would log, from this one with a few things measured.
    metric = {part: {"mean": 0.5} for part in ("base", "tuned")}
    everything = dataclasses.replace(
        results,
        retention={name: dict.fromkeys(benchmark.metrics.values(), metric) for name, benchmark in BENCHMARKS.items()},
        retention_mean={"retention": {"mean": 0.9}},
    )
    known = set(rows[0]) | set(scalars(everything)) | {"trainer/global_step"}
    capsys.readouterr()
    dashboard.main(["me/selfaug", "--dry-run", "--name", "forgetting"])
    spec = json.loads(capsys.readouterr().out)
    assert (spec["entity"], spec["project"], spec["displayName"]) == ("me", "selfaug", "forgetting")
    shown = {name.removeprefix("summary:") for name in named(spec)}
    shown.discard("_step")  # of sections, where no panel says otherwise
    assert shown == dashboard.metrics() | {"trainer/global_step"}
    assert shown <= known, shown - known
    assert {panel[2][0] for view in dashboard.VIEWS.values() for panel in view if panel[0] == "table"} <= set(
        tables(results)
    )

    command = [f"target={directory}", "evaluation=task", "evaluation.rag=null", "progress=false", *LOGGED[:2],
               "evaluation.drift.corpora.wikipedia={kind: text, asset: null, path: texts.jsonl, limit: 2}",
               "evaluation.drift.corpora.dialogues={kind: text, asset: null, path: texts.jsonl, limit: 2}"]  # fmt: skip
    with mock.patch.object(train, "main", evaluate.main), mock.patch.object(runs, "overrides", list):
        result = runs.inline(*command)
    assert result.returncode == 0, result.stdout + result.stderr
    (place,) = (path for path in runs.runs.iterdir() if path.name.startswith("evaluate-"))
    (run,) = of_type(records(place), "run")
    assert run["job_type"] == "evaluate"
    assert run["run_id"] == place.name.removeprefix("evaluate-")


@pytest.mark.parametrize("place", ["me", "me/", "/x", "a/b/c"])
def test_a_place_that_is_none(place: str):
    with pytest.raises(SystemExit, match="ENTITY/PROJECT"):
        dashboard.main([place, "--dry-run"])


def test_without_a_key_or_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(SystemExit, match="WANDB_API_KEY"):
        dashboard.main(["me/selfaug"])
    for name in ("wandb_workspaces", "wandb_workspaces.workspaces", "wandb_workspaces.reports.v2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=r"selfaug\[wandb\]"):
        dashboard.main(["me/selfaug", "--dry-run"])


def test_a_server_that_refuses_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    import wandb
    from wandb_workspaces.workspaces import Workspace

    def refuse(self: Any) -> None:
        raise wandb.Error("project not found\nand much more")

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(Workspace, "save", refuse)
    with pytest.raises(SystemExit) as caught:
        dashboard.main(["me/selfaug"])
    assert str(caught.value).startswith("selfaug: W&B did not take the workspace (project not found):")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("machine", "server", "found"),
    [
        ("api.forge.coreweave.com", None, True), ("api.wandb.ai", None, True), ("example.org", None, False),
        ("w.example.org:8080", "http://w.example.org:8080", True), ("api.wandb.ai", "http://w.example.org", False),
    ],
)  # fmt: skip
def test_where_a_key_may_be(
    machine: str, server: str | None, found: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    if server:
        monkeypatch.setenv("WANDB_BASE_URL", server)
    (tmp_path / "netrc").write_text(f"machine {machine}\n  login user\n  password {KEY}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert has_wandb_key() is found


def test_a_run_that_failed_is_failed_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ended: list[Any] = []

    class Fake(loggers.WandbLogger):
        def __init__(self) -> None:
            pass

        experiment = mock.Mock(finish=lambda exit_code=None: ended.append(exit_code))

        def finalize(self, status: str) -> None:
            ended.append(status)

    monkeypatch.setattr(loggers, "_add_chosen", lambda found, *_: found.append(Fake()))
    with loggers.run_loggers(mock.Mock(), tmp_path, training=False):
        pass
    assert ended == ["success", 0]
    with pytest.raises(ValueError, match="not finite"), loggers.run_loggers(mock.Mock(), tmp_path, training=False):
        raise ValueError("not finite")
    assert ended[2:] == ["failed", 1]
