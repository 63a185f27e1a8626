"""One row against every other: the numbers of an independent t-test, the marks, and names that are none."""

import re

import numpy as np
import pytest
from scipy import stats

from benchmarks.report import made_up
from selfaug import report
from selfaug.errors import UserError
from selfaug.reporting.against import against
from selfaug.reporting.compare import Comparison
from selfaug.reporting.results import Results, write_results

SEEDS = (1, 2, 3, 4)


def runs() -> list[Results]:
    plain = [made_up(plain=True, seed=seed) for seed in SEEDS]
    return plain + [made_up(one, seed=seed) for one in ("input_logits", "output_logits") for seed in SEEDS]


def test_differences_in_standard_errors():
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in against(Comparison(runs()), "input").splitlines()
    ]
    assert table[0][0] == "minus position=input_logits"
    assert [line[0] for line in table[2:]] == ["plain LoRA", "position=output_logits"]
    f1 = table[0].index("F1 (%)")
    values = {
        name: [100 * run.task["f1"]["tuned"]["mean"] for run in made]
        for name, made in zip(("plain", "input", "output"), np.array(runs(), dtype=object).reshape(3, 4), strict=True)
    }
    for line, name in ((table[2], "plain"), (table[3], "output")):
        test = stats.ttest_rel(values[name], values["input"])
        mean, errors, p = re.match(r"([+-][\d.]+) \(([\d.]+) SE, p (.*?)\)", line[f1]).groups()
        assert float(mean) == pytest.approx(np.subtract(values[name], values["input"]).mean(), abs=0.051)
        assert float(errors) == pytest.approx(abs(test.statistic), abs=0.051)
        assert (
            p == "&lt; 0.001"
            if test.pvalue < 0.001
            else float(p.removeprefix("= ")) == pytest.approx(test.pvalue, abs=0.006)
        )
        assert (r"\*" in line[f1]) == (test.pvalue < 0.05)


@pytest.mark.parametrize(("name", "said"), [("hidden", "no row is"), ("logits", "more than one row is")])
def test_a_name_that_is_not_one_row(name: str, said: str):
    with pytest.raises(UserError, match=rf"--against={name}: {said} called that; the rows are plain LoRA; position="):
        against(Comparison(runs()), name)


def test_on_the_command_line(tmp_path, capsys):
    for run in runs():
        write_results(tmp_path / "runs" / run.name / "results.json", run)
    report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "report"), "--against", "plain LoRA"])
    assert capsys.readouterr().out.startswith("| minus plain LoRA | EM (%) |")
    assert (tmp_path / "report" / "report.html").exists()
