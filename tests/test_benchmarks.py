"""Every benchmark runs on tiny sizes and writes all that the tables need; what they compare computes the same."""

import json
import os
import re
import subprocess
import time

import pytest
import torch

from benchmarks import all as everything
from benchmarks import (
    common,
    data,
    dialogues,
    evaluation,
    full_finetuning,
    goals,
    linear_kl,
    long_context,
    official,
    peers,
    step,
    sweep,
    tables,
)
from selfaug.model.decoder import Head
from selfaug.objective import LogitAlignment, States
from tests.evaluation.retention.tiny_items import items  # noqa: F401
from tests.run.conftest import Runs
from tests.tiny import save_tiny

QUICK = ("--quick", "--device", "cpu")
TIMES = {"rounds", "seconds", "seconds_min", "seconds_quartiles", "ratio", "ratio_quartiles", "ratio_of_minima"}


def run(main, path, *arguments: str) -> list[common.Row]:
    main([*QUICK, "--out", str(path), *arguments])
    content = json.loads(path.read_text())
    assert {"cpu", "cores", "threads", "torch", "device", "date", "selfaug"} <= set(content["machine"])
    assert content["settings"]["quick"] is True
    return content["rows"]


def by_name(rows: list[common.Row]) -> dict[str, common.Row]:
    return {row["implementation"]: row for row in rows}


# ---- the scripts -----------------------------------------------------------------------------------------------------


def test_linear_kl(tmp_path, capsys):
    names = "floor,selfaug,naive,official,liger_triton"
    rows = by_name(run(linear_kl.main, tmp_path / "op.json", "--only", names, "--dtypes", "float32"))
    assert list(rows) == names.split(",")
    assert rows.pop("liger_triton")["why"] == "Triton kernels need a GPU"
    for name, row in rows.items():
        assert set(row) >= TIMES | {"extra_bytes", "speedup", "memory_share"}, name
        assert row["rounds"] == 3
        assert row["seconds_min"] <= row["seconds"]
        assert 0 < row["seconds_quartiles"][0] <= row["seconds_quartiles"][1]
        if name != "floor":
            assert row["value_error"] < 1e-6
            assert row["gradient_error"] < 1e-3
    assert rows["floor"]["ratio"] == 1
    assert rows["official"]["speedup"] == 1
    assert rows["floor"]["chunk"] == 64
    printed = capsys.readouterr().out
    assert "Triton kernels need a GPU" in printed
    kept = run(linear_kl.main, tmp_path / "op.json", "--only", "floor", "--dtypes", "bf16,float32", "--keep")
    assert [(row["dtype"], row["implementation"]) for row in kept] == [("bf16", "floor"), ("float32", "floor")]
    assert "gradient error" in printed


@pytest.mark.parametrize("shapes", ["2048", "64x1000", "64x0x32", "axbxc", ""])
def test_a_wrong_shape_is_one_sentence(shapes, capsys):
    with pytest.raises(SystemExit):
        linear_kl.main(["--shapes", shapes])
    message = capsys.readouterr().err.splitlines()[-1]
    assert "TxVxd" in message
    assert f"--shapes {shapes}" in message


def test_step(tmp_path):
    rows = by_name(run(step.main, tmp_path / "step.json", "--only", ",".join(step.ALL_MODES)))
    assert set(rows) == {"plain", "selfaug", "cache", "cache+sampling", "official", "sampling"}
    for row in rows.values():
        assert set(row) >= TIMES | {"extra_bytes", "total_bytes", "memory_ratio", "extra_ratio", "tokens_per_second"}
    assert rows["plain"]["ratio"] == rows["plain"]["memory_ratio"] == 1


def test_full_finetuning(tmp_path):
    rows = by_name(run(full_finetuning.main, tmp_path / "full.json"))
    assert tuple(rows) == full_finetuning.MODES
    assert all(row["total_bytes"] > 0 for row in rows.values())
    assert rows["plain"]["copy_bytes"] > 0
    assert rows["cache"]["gradient_error"] < 1e-2


def test_modes_of_a_step_are_what_they_are_called():
    assert not step.objective_of("plain").terms
    found = {}
    for mode in ("selfaug", "cache", "cache+sampling", "sampling"):
        objective = step.objective_of(mode)
        term = objective.terms["kl"]
        assert term.alpha == 0.5
        found[mode] = (type(objective.reference).__name__, term.sampling.rows, term.sampling.share)
    assert found == {
        "selfaug": ("AdaptersOff", "all", 1.0),
        "cache": ("CachedReference", "all", 1.0),
        "cache+sampling": ("CachedReference", "random", 0.25),
        "sampling": ("AdaptersOff", "random", 0.25),
    }


def test_data(tmp_path):
    rows = by_name(run(data.main, tmp_path / "data.json"))
    assert list(rows) == list(data.BATCHINGS)
    shares = {name: row["useful_share"] for name, row in rows.items()}
    assert shares["random"] < shares["budget"] <= shares["packed"] == 1
    assert shares["random"] < shares["sorted"]
    for row in rows.values():
        assert row["loss_error"] < 1e-5
        assert row["gradient_error"] < 1e-5
        assert row["tokens_per_second"] > 0


def test_packaged_rows_are_shorter_than_the_long_tail():
    lengths = [row["length"] for row in data.long_tailed(2000, 512)]
    assert max(lengths) > 10 * sorted(lengths)[1000]  # else there is no long tail to show


def test_long_context(tmp_path):
    rows = by_name(run(long_context.main, tmp_path / "long.json"))
    assert [rows[mode]["outcome"] for mode in ("plain", "sampling", "selfaug")] == ["trained"] * 3
    assert rows["official"]["outcome"] == "not tried (--official)"
    assert rows["official"]["logit_bytes"] == 8 * 256 * 512 * 4


@pytest.fixture
def workspace(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("benchmarked"))


def test_evaluation(tmp_path, items, monkeypatch):  # noqa: F811
    save_tiny(tmp_path / "model")
    arguments = ("--model", str(tmp_path / "model"), "--only", "arc_easy,lambada,ifeval")
    rows = run(evaluation.main, tmp_path / "evaluation.json", *arguments)
    assert {row["benchmark"] for row in rows} == {"arc_easy", "lambada", "ifeval", "multiple choice", "all"}
    assert {row["implementation"] for row in rows} == set(evaluation.BACKENDS)
    assert all(row["same"] == 1 for row in rows)
    assert all(row["seconds"] > 0 for row in rows)


def test_dialogues(tmp_path):
    save_tiny(tmp_path / "model")
    rows = run(dialogues.main, tmp_path / "dialogues.json", "--model", str(tmp_path / "model"))
    assert [row["implementation"] for row in rows] == ["transformers", "batch-1", "batch-4"]
    assert all(row["tokens"] > 0 and row["tokens_per_s"] > 0 for row in rows)


def test_sweep(workspace: Runs, tmp_path, monkeypatch):
    """As benchmarks.sweep runs it, but for the processes: the commands run in this one."""

    def inline(command: list[str]) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-m", "selfaug.train"]
        return workspace.inline(*command[3:])

    monkeypatch.setattr(sweep, "execute", inline)
    own = [
        setting
        for setting in workspace.overrides()
        if not setting.startswith(("data.batch_size", "evaluation=", "evaluation.rag"))
    ]
    monkeypatch.setattr(Runs, "overrides", lambda self: own)
    rows = run(sweep.main, tmp_path / "sweep.json", "--context", "0", "--override", "evaluation.rag.max_new_tokens=2")
    costs, compared = [row for row in rows if "runs" in row], [row for row in rows if "agree" in row]
    assert [(row["implementation"], row["runs"]) for row in costs] == [
        ("plain", 1), ("cheap", 2), ("full", 2), ("official", 1), ("plain", 1),
    ]  # fmt: skip
    for row in costs:
        assert (row["fill_seconds"] is not None) == (row["implementation"] == "cheap")
        assert row["train_seconds"] == pytest.approx(sum(row["each"]))
        assert row["ratio"] > 0
    plain = [row["ratio"] for row in costs if row["implementation"] == "plain"]
    assert sum(plain) == pytest.approx(2)
    measures = ["exact_match", "f1", "drift, wikipedia", "drift, dialogues"]
    assert [(row["alpha"], row["measure"]) for row in compared] == [
        (alpha, measure) for alpha in (0.5, 1.0, "all") for measure in measures
    ]
    assert {row["agree"] for row in compared} <= {"yes", "no"}
    assert compared[2]["full"][0] > 0  # the drift of a run that trained


# ---- how it measures -------------------------------------------------------------------------------------------------


def test_rounds_are_interleaved_and_compared_with_their_own_round():
    order: list[str] = []

    def call(name: str, seconds: float):
        def sleep() -> None:
            order.append(name)
            # The machine slows down fivefold from the third round on.
            time.sleep(seconds * (5 if len(order) > 4 else 1))

        return sleep

    times = common.interleaved({"one": call("one", 0.01), "two": call("two", 0.02)}, rounds=5, device="cpu")
    assert all(set(order[i : i + 2]) == {"one", "two"} for i in range(0, 10, 2))
    assert order[0:2] != order[2:4] or order[2:4] != order[4:6] or order[4:6] != order[6:8]
    columns = common.time_columns(times, "one")
    assert columns["two"]["ratio"] == pytest.approx(2, rel=0.2)
    assert columns["one"]["ratio"] == 1
    assert columns["two"]["rounds"] == 5
    assert columns["two"]["seconds_min"] == min(times["two"])


def test_ratios_are_of_the_same_round():
    columns = common.time_columns({"one": [3.0, 1.0, 2.0], "two": [6.0, 2.0, 5.0]}, "one")
    assert columns["two"]["ratio"] == 2
    assert columns["two"]["ratio_quartiles"] == [2, 2.25]
    assert columns["two"]["ratio_of_minima"] == 2
    assert columns["two"]["seconds"] == 5
    assert common.time_columns({"two": [1.0, 2.0]}, "one")["two"]["ratio"] is None


def test_a_time_limit_leaves_three_rounds():
    times = common.interleaved({"one": lambda: time.sleep(0.01)}, rounds=50, device="cpu", seconds=0.0)
    assert len(times["one"]) == 3


@pytest.mark.skipif(not common.available_memory(), reason="reads Linux's /proc")
def test_peak_memory_counts_what_is_freed_within_the_call():
    megabytes = 64

    def call() -> None:
        torch.ones(megabytes * 2**20 // 4).sum()

    torch.ones(4 * megabytes * 2**20 // 4).sum()  # an earlier peak, which is not the call's
    call()
    peak = common.peak_memory(call, "cpu")
    assert peak.extra is not None
    assert 0.9 * megabytes < peak.extra / 2**20 < 1.5 * megabytes
    assert peak.total is not None
    assert peak.total > peak.extra


def test_a_process_of_its_own_fails_alone():
    """`bytes` and `len`, so that the processes need not import what this file does."""
    assert common.in_process(len, "three") == (5, None)
    result, why = common.in_process(bytes, 16 * 2**30, limit_bytes=8 * 2**30)
    assert result is None
    assert why == "out of memory at a limit of 8.0 GiB"


def test_a_process_that_dies_is_reported():
    result, why = common.in_process(os._exit, 9)
    assert result is None
    assert why is not None
    assert "status 9" in why


def test_reasons_are_one_line():
    assert common.reason(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")) == "out of memory"
    assert common.reason(common.Unavailable("not installed")) == "not installed"
    assert common.reason(ValueError("one\ntwo")) == "ValueError: one"


# ---- what it compares ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "autocast", "bf16"])
@pytest.mark.parametrize("name", ["selfaug", "naive", "official"])
def test_implementations_compute_the_same_kl(name: str, dtype: str):
    problem = peers.make_problem(40, 500, 16, dtype, "cpu")
    found = peers.errors(problem, peers.IMPLEMENTATIONS[name].build(problem, 16), peers.exact(problem))
    value, gradient = (1e-4, 1e-3) if dtype == "float32" else (0.3, 0.6)
    assert found["value_error_relative"] < value
    assert found["gradient_error"] < gradient


def test_problems_are_like_a_model_early_in_fine_tuning():
    problem = peers.make_problem(64, 4000, 64, "float32", "cpu")
    logits = problem.reference @ problem.weight.T
    assert 8 < logits.max() < 25
    kl, gradient = peers.exact(problem)
    assert 1e-3 < kl < 1e-2
    assert gradient.abs().sum() > 0


def test_errors_are_noticed():
    problem = peers.make_problem(8, 100, 16, "float32", "cpu")
    right = peers.IMPLEMENTATIONS["naive"].build(problem, 8)

    def wrong():
        value, gradient = right()
        return value * 1.01, gradient * 0.98

    found = peers.errors(problem, wrong, peers.exact(problem))
    assert found["value_error_relative"] == pytest.approx(0.01, rel=0.01)
    assert found["gradient_error"] == pytest.approx(0.02, rel=0.01)


def test_the_floor_writes_three_products():
    problem = peers.make_problem(10, 50, 8, "float32", "cpu")
    assert peers.floor(problem, 4)() == (None, None)


def test_the_official_term_is_the_same_term():
    problem = peers.make_problem(12, 60, 8, "float32", "cpu")
    module = torch.nn.Linear(8, 60, bias=True)
    module.weight.data, module.bias.data = problem.weight, torch.randn(60)
    head = Head(module.requires_grad_(False), 1.0, None)
    states = States(problem.hidden, problem.reference, torch.zeros(12, dtype=torch.long))
    totals = [kind(0.5).total(states, head)
              for kind in (LogitAlignment, official.OfficialAlignment)]  # fmt: skip
    assert totals[0].item() == pytest.approx(totals[1].item(), rel=1e-4)
    with pytest.raises(ValueError, match="soft-cap"):
        official.OfficialAlignment(0.5).total(states, Head(module, 1.0, 30.0))


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_results_say():
    pages = [page.read_text() for page in tables.PAGES]
    for page in pages:
        assert tables.filled(page, tables.read_results()) == page, "run python -m benchmarks.tables"
    page = "\n".join(pages)
    marked = set(re.findall(r"<!-- table: ([\w.-]+) -->", page))
    assert {
        "goals",
        "linear_kl-cpu",
        "step-cpu",
        "data-cpu",
        "sweep-cpu",
        "sweep-cpu.agreement",
        "evaluation-cpu",
    } <= marked
    written = {f"{name.partition(' ')[0]}" for name in tables.read_results()}
    assert written <= {name.partition(".")[0] for name in marked}, "a result that no table shows"


def test_every_planned_command_is_one_that_its_script_takes(capsys):
    for device, plan in (("cpu", everything.CPU), ("cuda", everything.CUDA)):
        everything.main(["--device", device, "--dry-run"])
        printed = capsys.readouterr().out
        assert printed.count("== ") == len(plan)
        outs = re.findall(r"--out (\S+)", printed)
        assert len(set(outs)) == len(plan)  # none overwrites another's
        page = "\n".join(page.read_text() for page in tables.PAGES)
        assert all(f"<!-- table: {out.rsplit('/', 1)[1].removesuffix('.json')} -->" in page for out in outs)


def test_goals_are_judged_by_the_worst_row():
    def results(*ratios: float) -> dict:
        rows = [
            {"data": "squad", "implementation": "packed", "useful_share": ratio, "loss_error": 0.0} for ratio in ratios
        ]
        return {"data-cpu": {"rows": rows}}

    def reached(found: dict) -> dict[str, str]:
        return {row["what"]: row["reached"] for row in goals.judged(found)}

    name = "batching of squad, packed: useful share"
    assert reached({})[name] == "not measured"
    assert reached(results(0.99, 0.96))[name] == "yes"
    assert reached(results(0.99, 0.94))[name] == "no"
    assert reached(results(0.94))["batching of squad, budget: useful share"] == "not measured"


def test_goals_at_most_are_judged_by_the_largest():
    rows = [{"model": "asset:smollm2-135m-instruct", "context": 1024, "implementation": "cache", "ratio": ratio}
            for ratio in (1.0, 1.2)]  # fmt: skip

    def reached(rows: list) -> str:
        judged = goals.judged({"step-cpu": {"rows": rows}})
        (row,) = [row for row in judged if row["what"] == "optimiser step, cache, all rows: time, of plain LoRA's"]
        return row["reached"]

    assert reached(rows) == "no"
    assert reached(rows[:1]) == "yes"


def test_gpu_goals_count_the_cases_that_are_won():
    def row(implementation: str, seconds: float, case: str) -> common.Row:
        return {"implementation": implementation, "seconds": seconds, "case": case, "dtype": "bf16"}

    rows = [row("floor", 0.1, "a"), row("selfaug", 1, "a"), row("compiled", 2, "a"), row("selfaug", 3, "b"),
            row("compiled", 2, "b")]  # fmt: skip
    (found,) = [
        row for row in goals.judged({"linear_kl-cuda": {"rows": rows}}) if "faster than every peer" in row["what"]
    ]
    assert found["measured"] == "in 1 of 2"
    assert found["reached"] == "no"


def test_markdown_escapes_and_explains():
    columns = (
        common.Column("a|b", common.value("x", "{:.1f}")),
        common.Column("c", common.with_range("r", "{:.0f}", 10)),
    )
    rows = [{"x": 1.25, "r": 2.0, "r_quartiles": [1.0, 3.0]}, {"x": None, "why": "no | room"}]
    assert tables.markdown(rows, columns) == (
        "| a\\|b | c |\n| --- | --- |\n| 1.2 | 20 (10–30) |\n| – | no \\| room |\n"
    )
