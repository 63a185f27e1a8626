"""docs/methods.md: the example of a method of one's own, taken from the page and run as the page says."""

import csv
import re
import shlex

import pytest

from tests.run.conftest import Runs
from tests.workspace import ROOT

PAGE = (ROOT / "docs" / "methods.md").read_text()


def block(language: str) -> str:
    section = PAGE.partition("\n## Your own method\n")[2]
    return re.findall(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)[0]


def test_the_example_runs_and_is_short(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    code, method = block("python"), block("yaml")
    assert len((code + method).splitlines()) < 60
    (runs.path / "keep.py").write_text(code)
    (runs.path / "conf" / "method").mkdir(parents=True, exist_ok=True)
    (runs.path / "conf" / "method" / "keep.yaml").write_text(method)
    command = shlex.split(block("bash").splitlines()[0])
    assert command[:3] == ["python", "-m", "selfaug.train"]
    assert command[-1] == "debug=smoke"
    monkeypatch.syspath_prepend(runs.path)  # as `python -m` does with the folder where it is started
    result = runs.inline(*command[3:])
    assert result.returncode == 0, result.stderr
    assert runs.only().name.startswith("keep-")
    with (runs.only() / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert len(rows) == 2  # 6 examples, 4 in a step
    for row in rows:
        assert float(row["train/choice"]) > 0
        assert abs(float(row["train/loss"]) - float(row["train/nll"]) - 0.5 * float(row["train/choice"])) < 1e-4


def test_what_the_page_names_exists():
    methods = PAGE.partition("\n### The mixture\n")[0]  # whose tables begin with methods; the others, with settings
    for name in re.findall(r"^\| `(\w+)` \|", methods, flags=re.MULTILINE):
        assert (ROOT / "selfaug" / "conf" / "method" / f"{name}.yaml").is_file(), name
    for path in re.findall(r"`((?:selfaug|tests|docs)/[\w./]+\w)`", PAGE):
        assert (ROOT / path).exists(), path
