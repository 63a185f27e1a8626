"""The report's files: all there, deterministic, safe, small; failed jobs named."""

import base64
import hashlib
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from scipy.stats import ttest_rel

from benchmarks import report as benchmark
from benchmarks.report import made_up
from selfaug import report as command
from selfaug.errors import UserError
from selfaug.reporting.compare import Comparison
from selfaug.reporting.latex import escaped, latex_table
from selfaug.reporting.page import embedded
from selfaug.reporting.places import FailedJob, Found, read_places
from selfaug.reporting.results import write_results
from selfaug.reporting.summary import findings, headline, p_value
from selfaug.reporting.write import write_report, write_sweep_report
from tests.reporting.hostile import ALL, SCRIPT, hostile_runs


def ablation() -> list:
    positions = ("input_logits", "output_logits")
    return [made_up(plain=True, seed=s) for s in (1, 2, 3)] + [made_up(p, seed=s) for p in positions for s in (1, 2, 3)]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report")
    write_report(Found(ablation(), [FailedJob("selfaug-bad-s1", "data.path=x does not exist.")]), out, "Ours")
    return out


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hostile")
    write_report(hostile_runs(tmp_path_factory.mktemp("runs")), out, f"title {ALL}".replace("\ud800", "?"))
    return out


class Page(HTMLParser):
    """The page as a browser would read it: elements, attributes, text."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.data = "", ""
        self.inside: str | None = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = dict(attrs).get("type") or tag if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside is None:
            self.text += data
        elif self.inside == "application/json":
            self.data += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


# ---- what is written -------------------------------------------------------------------------------------------------


def test_all_files(written):
    files = sorted(str(path.relative_to(written)) for path in written.rglob("*") if path.is_file())
    names = ("curves", "drift-forgetting", "task-drift", "task-retention")
    plots = [f"plots/{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert files == [*plots, "report.html", "table.md", "table.tex"]
    for name in names:
        assert (written / f"plots/{name}.png").read_bytes().startswith(b"\x89PNG")
        ElementTree.parse(written / f"plots/{name}.svg")


def test_same_results_same_files(written, tmp_path):
    write_report(Found(ablation(), [FailedJob("selfaug-bad-s1", "data.path=x does not exist.")]), tmp_path, "Ours")
    for path in written.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / path.relative_to(written)).read_bytes(), path.name


def test_old_plots_go(tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "alpha.svg").write_text("old")
    write_report(Found([made_up(curves={})]), tmp_path)
    assert not list((tmp_path / "plots").glob("alpha.*"))


def test_alpha_plot_where_alphas_differ(tmp_path):
    write_report(
        Found([made_up(plain=True, curves={}), *(made_up(alpha=alpha, curves={}) for alpha in (0.1, 1.0))]), tmp_path
    )
    assert (tmp_path / "plots" / "alpha.svg").is_file()


def test_markdown_names_everything(written):
    text = (written / "table.md").read_text()
    assert text.startswith("# Ours\n")
    assert "| plain LoRA | 3 |" in text
    assert "| position=input_logits | 3 |" in text
    assert "- selfaug-bad-s1: data.path=x does not exist." in text
    assert "position=input_logits, seed=2" in text
    found = Comparison(ablation())
    gap = found.differences[1][1]
    assert gap is not None
    assert f"{100 * gap.interval.mean:+.1f} [{100 * gap.interval.low:+.1f},{100 * gap.interval.high:+.1f}]" in text


def test_latex_is_a_table(written):
    text = (written / "table.tex").read_text()
    columns = re.search(r"\\begin\{tabular\}\{l(r+)\}", text)
    assert columns
    width = len(columns[1]) + 1
    lines = [line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {line.count("&") - line.count(r"\&") for line in lines} == {width - 1}
    assert text.count("{") - 2 * text.count(r"\{") == text.count("}") - 2 * text.count(r"\}")
    for rule in ("toprule", "midrule", "bottomrule", r"\textbf{", r"$\pm$", r"\scriptsize"):
        assert rule in text
    found = Comparison(ablation())
    best = found.best[1]
    assert best is not None
    value = found.values[best][1]
    assert value is not None
    assert rf"\textbf{{{100 * value.mean:.1f}}}" in text


def test_page_is_self_contained(written):
    page = Page(written / "report.html")
    outside = [a for _, a in page.elements if any(re.match(r"(https?:)?//", str(a.get(k))) for k in ("src", "href"))]
    assert outside == []
    assert page.all("link") == [{"rel": "icon", "href": "data:,"}]
    assert not page.all("iframe")
    (policy,) = (m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    text = (written / "report.html").read_text(encoding="utf-8")
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert f"script-src 'sha256-{hashed}'" in policy
    assert "selfaug-bad-s1: data.path=x does not exist." in page.text
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_tables_are_tables(written):
    page = Page(written / "report.html")
    scopes = [head.get("scope") for head in page.all("th")]
    assert set(scopes) <= {"col", "row", "colgroup", "rowgroup"}
    figures = [a for a in page.all("svg") if a.get("role") == "img" and a.get("aria-label")]
    assert len(figures) == 4


# ---- foreign text ----------------------------------------------------------------------------------------------------


def test_hostile_text_stays_text(hostile):
    page = Page(hostile / "report.html")
    assert [a for tag, a in page.elements if any(name.startswith("on") for name in a)] == []
    assert page.all("img") == []
    assert len(page.all("script")) == 2
    assert page.text.count("window.hacked = 1") >= 8
    data = json.loads(page.data)
    (sample,) = (run["samples"][0] for run in data["runs"] if SCRIPT in run["samples"][0]["question"])
    assert sample["tuned"] == ALL.replace("\ud800", "?")
    assert any(SCRIPT in example["tokens"] for example in data["examples"])


def test_json_in_a_script_element():
    text = embedded({"a": "</script><!-- <script> & \u2028\u2029"})
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text) == {"a": "</script><!-- <script> & \u2028\u2029"}


def test_hostile_text_in_plots(hostile):
    for path in (hostile / "plots").glob("*.svg"):
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.parse(path).iter()}
        assert "script" not in tags
        assert "img" not in tags


def test_hostile_text_in_latex(hostile):
    text = (hostile / "table.tex").read_text(encoding="utf-8")
    body = text[text.index(r"\midrule") :]
    assert r"\input" not in body
    assert r"\$x\_1\$ 50\%" in body
    assert r"\textbackslash{}input\{secret\}" in body
    assert "\n\n" not in text


def test_latex_escapes():
    assert escaped(r"a_b%$&#{}") == r"a\_b\%\$\&\#\{\}"
    assert escaped('\\~^<>|"\n\x1b') == (
        r"\textbackslash{}\textasciitilde{}\textasciicircum{}\textless{}\textgreater{}\textbar{}\textquotedbl{}  "
    )


def test_hostile_text_in_markdown(hostile):
    text = (hostile / "table.md").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img" not in text


# ---- places ----------------------------------------------------------------------------------------------------------


def sweep_of(place: Path, runs: list, errors: dict[str, str] | None = None) -> Path:
    sweep = place / "runs" / "sweeps" / "position-1234"
    (sweep / "jobs").mkdir(parents=True)
    for number, run in enumerate(runs):
        directory = place / "runs" / run.name
        error = (errors or {}).get(run.name)
        if error is None:
            write_results(directory / "results.json", run)
        record = {"number": number, "name": run.name, "directory": str(directory), "error": error}
        (sweep / "jobs" / f"{run.name}.json").write_text(json.dumps(record))
    return sweep


def test_a_sweep_with_a_failed_job(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [made_up(plain=True, seed=s, curves={}) for s in (1, 2, 3)] + [made_up(curves={})]
    sweep = sweep_of(tmp_path, runs, {runs[2].name: "It broke."})
    (tmp_path / "runs" / runs[1].name / "results.json").unlink()
    command.main([str(sweep)])
    printed = capsys.readouterr()
    assert f"{runs[2].name} failed: It broke." in printed.err
    assert f"{runs[1].name} failed: its results.json is missing" in printed.err
    assert "plain LoRA" in printed.out
    assert f"Report: {sweep / 'report.html'}" in printed.out
    assert "It broke." in Page(sweep / "report.html").text
    assert "position-1234" in (sweep / "table.md").read_text()
    assert not (tmp_path / "report").exists()


def test_a_sweep_that_was_moved(tmp_path):
    sweep_of(tmp_path / "here", ablation())
    (tmp_path / "here").rename(tmp_path / "there")
    moved = tmp_path / "there" / "runs" / "sweeps" / "position-1234"
    found = read_places([moved])
    assert len(found.results) == 9
    assert found.failed == []
    assert found.sweep == moved


def test_runs_without_a_sweep_are_ordered_by_their_settings(tmp_path):
    alphas = [10.0, 2.0, 0.5, 0.05]
    for seed in (2, 1):
        for number, alpha in enumerate(alphas):  # as names that end in a hash fall
            write_results(tmp_path / f"run-{seed}{number}" / "results.json", made_up(alpha=alpha, seed=seed))
    found = read_places([tmp_path])
    assert [(run.config["method"]["terms"]["kl"]["alpha"], run.seed) for run in found.results] == [
        (alpha, seed) for alpha in sorted(alphas) for seed in (1, 2)
    ]


def test_a_sweep_in_which_everything_failed(tmp_path):
    runs = ablation()[:2]
    sweep = sweep_of(tmp_path, runs, {run.name: "No." for run in runs})
    report = write_sweep_report(sweep)
    page = Page(report.page)
    assert report.rows == 0
    assert "2 jobs failed" in page.text
    assert "No run has finished." in page.text


def test_one_file_that_cannot_be_read_does_not_cost_the_others(tmp_path):
    for run in ablation()[:2]:
        write_results(tmp_path / run.name / "results.json", run)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("{")
    found = read_places([tmp_path])
    assert len(found.results) == 2
    assert [(job.name, "not whole JSON" in job.error) for job in found.failed] == [("broken", True)]
    with pytest.raises(UserError, match="not whole JSON"):
        read_places([tmp_path / "broken"])


def test_one_run_and_a_file(tmp_path, capsys):
    write_results(tmp_path / "run" / "results.json", made_up(curves={}))
    out = tmp_path / "new" / "out"
    command.main([str(tmp_path / "run" / "results.json"), str(tmp_path), "--out", str(out), "--title", "One <run>"])
    assert "Exact match" in capsys.readouterr().out
    page = Page(out / "report.html")
    assert "One <run>" in page.text
    assert len(json.loads(page.data)["runs"]) == 1


def test_markdown_to_stdout_stays_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_results(tmp_path / "results.json", made_up(curves={}))
    command.main(["--markdown", "results.json"])
    printed = capsys.readouterr()
    assert printed.out.startswith("| run |")
    assert "Report" not in printed.out
    assert (tmp_path / "report" / "report.html").is_file()


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda place: place.mkdir(), "holds no results.json"),
        (lambda place: (place / "jobs").mkdir(parents=True), "holds no job that has ended"),
        (
            lambda place: ((place / "jobs").mkdir(parents=True), (place / "jobs" / "a.json").write_text("{")),
            "no record",
        ),
    ],
)
def test_places_without_results(tmp_path, prepare, says):
    prepare(tmp_path / "place")
    with pytest.raises(UserError, match=says):
        read_places([tmp_path / "place"])
    with pytest.raises(SystemExit, match="selfaug: "):
        command.main([str(tmp_path / "place")])


def test_out_that_cannot_be_written(tmp_path):
    write_results(tmp_path / "results.json", made_up())
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="--out"):
        command.main([str(tmp_path / "results.json"), "--out", str(tmp_path / "file" / "below")])


# ---- sentences, size -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gain", "says"),
    [
        (-0.05, "No row answers demonstrably better than plain LoRA (F1 41.9 ±2.8 %); "),
        (0.028, "No row answers demonstrably better than plain LoRA (best: position=input_logits, F1 42.3 ±1.4 %); "),
        (0.2, "position=input_logits answers best (F1 59.5 ±1.4 %, +17.6 against plain LoRA); "),
    ],
)
def test_headline_claims_what_the_test_says(gain, says):
    runs = [made_up(plain=True, seed=s) for s in (1, 2, 3)] + [made_up(seed=s, gain=gain) for s in (1, 2, 3)]
    runs += [made_up("output_logits", seed=s, gain=-0.05) for s in (1, 2, 3)]
    found = Comparison(runs)
    ours, plain = ([run.task["f1"]["tuned"]["mean"] for run in runs[start : start + 3]] for start in (3, 0))
    assert ("demonstrably" not in says) == (ttest_rel(ours, plain).pvalue < 0.05 and sum(ours) > sum(plain))
    assert headline(found) == (
        f"{says}position=input_logits forgets least (kept 93.8 ±0.6 % of the base model's benchmark scores, +7.0 "
        "against plain LoRA); position=input_logits drifts least (dialogues KL(base||tuned) 0.131 ±0.013, -0.182 "
        "against plain LoRA)."
    )


def test_headline_names_the_row_that_is_better_and_not_only_the_best():
    """A noisy row with the best mean does not hide one that is better in every seed; the test is corrected for both."""

    def score(run, value):
        run.task["f1"]["tuned"] = {"mean": value, "low": value - 0.05, "high": value + 0.05, "n": 100}
        return run

    runs = [score(made_up(plain=True, seed=s), 0.4 + s / 100) for s in (1, 2, 3)]
    runs += [score(made_up("output_logits", seed=s), (0.41, 0.6, 0.49)[s - 1]) for s in (1, 2, 3)]
    runs += [score(made_up("all_logits", seed=s), 0.43 + s / 100 + (0, 0.001, 0)[s - 1]) for s in (1, 2, 3)]
    found = Comparison(runs)
    assert found.rows[found.best[1] or 0].label == "position=output_logits"
    assert headline(found).startswith("position=all_logits answers demonstrably better than plain LoRA (F1 45.0 ")
    assert "At the task, position=output_logits is not told apart from plain LoRA" in " ".join(findings(found))
    # Better in every seed, but not by enough for three.
    alone = [run for run in runs if "output_logits" not in str(run.config["method"])]
    for run, value in zip(alone[3:], (0.418, 0.431, 0.452), strict=True):
        score(run, value)
    assert ttest_rel([0.418, 0.431, 0.452], [0.41, 0.42, 0.43]).pvalue > 0.05
    assert headline(Comparison(alone)).startswith("No row answers demonstrably better")


def test_findings_name_what_cannot_be_told_apart():
    text = " ".join(findings(Comparison(ablation())))
    assert "At the task, plain LoRA cannot be told apart from position=input_logits and position=output_logits." in text
    assert "At retention, position=input_logits beats plain LoRA: kept +7.0 [+6.4,+7.6] points, " in text
    assert "standard errors, p < 0.001." in text
    assert "At retention, position=input_logits is told apart from every other row." in text
    assert "In drift, position=input_logits beats plain LoRA: dialogues KL(base||tuned) -0.18" in text


def test_findings_say_that_precisions_differ():
    runs = ablation()
    assert "precision" not in " ".join(findings(Comparison(runs)))
    for run, name in zip(runs, ("bf16-mixed", "bf16-mixed", "32-true"), strict=False):
        run.environment = {**run.environment, "precision": name}
    assert "different precisions (32-true, bf16-mixed)" in " ".join(findings(Comparison(runs)))


def test_headline_of_little():
    assert headline(Comparison([])) == "No run has finished."
    assert "scores F1" in headline(Comparison([made_up()]))
    one_seed = Comparison([made_up(plain=True), made_up()])
    assert any("one seed" in sentence for sentence in findings(one_seed))
    nothing = made_up(task={}, drift={}, retention={}, retention_mean={}, curves={}, token_kl={}, samples=[])
    assert "nothing was measured" in headline(Comparison([nothing]))
    assert "nothing was measured" in headline(Comparison([nothing, made_up(plain=True, task={}, drift={}, retention={},
                                                                           retention_mean={})]))  # fmt: skip


def test_p_values():
    assert [p_value(p) for p in (0.00001, 0.0123, 0.456, 1.0)] == ["< 0.001", "= 0.012", "= 0.46", "= 1.00"]


def test_a_run_with_nothing_measured(tmp_path):
    nothing = made_up(task={}, drift={}, retention={}, retention_mean={}, curves={}, token_kl={}, samples=[], time={})
    write_report(Found([nothing]), tmp_path)
    assert r"\begin{tabular}" in latex_table(Comparison([nothing]))


def test_page_of_200_runs_is_small(tmp_path, capsys):
    """By the benchmark, which writes the runs' files first. Its times depend on the machine; the size does not."""
    benchmark.main(["--device", "cpu", "--out", str(tmp_path / "out.json")])
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (row["runs"], row["rows"]) == (200, 67)
    assert row["page_bytes"] < 5e6
    assert row["page_bytes"] < row["all_bytes"]
    assert 0 < row["read_seconds"] < row["seconds"]
    assert "page, MB" in capsys.readouterr().out
