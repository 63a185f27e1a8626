"""Curves kept in results.json: short, whole at both ends, finite."""

import json
from itertools import pairwise

from benchmarks.report import made_up
from selfaug.reporting.curves import read_curves, thinned
from selfaug.reporting.results import read_results, write_results


def write(path, lines: list[str]):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_reads_by_metric(tmp_path):
    path = write(
        tmp_path / "metrics.csv",
        [
            "probe/drift_a,step,train/loss,speed/tokens_per_s,val/loss",
            "0.0,0,,,",
            ",1,2.123456789,150,",
            "0.1,2,1.5,149,1.9",
        ],
    )
    assert read_curves(path) == {
        "probe/drift_a": [[0, 0.0], [2, 0.1]],
        "train/loss": [[1, 2.12346], [2, 1.5]],
        "val/loss": [[2, 1.9]],
    }


def test_what_is_not_finite_is_left_out_and_the_later_of_two_counts(tmp_path):
    path = write(
        tmp_path / "metrics.csv",
        ["step,train/loss", "1,nan", "2,inf", "3,1.0", "4,-inf", "3,2.0", "5,", "x,1.0", ",4.0", "6,abc", "7,9.0"],
    )
    assert read_curves(path) == {"train/loss": [[3, 2.0], [7, 9.0]]}


def test_no_file(tmp_path):
    assert read_curves(tmp_path / "metrics.csv") == {}


def test_thinning_is_even_and_keeps_both_ends():
    points = [[step, step / 2] for step in range(1, 1001)]
    kept = thinned(points, 200)
    assert len(kept) == 200
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    gaps = {b[0] - a[0] for a, b in pairwise(kept)}
    assert gaps <= {5, 6}
    assert thinned(points[:200], 200) == points[:200]
    assert thinned(points[:201], 200)[0] == points[0]
    assert len(thinned(points[:201], 200)) == 200


def test_long_runs_stay_small_in_results_json(tmp_path):
    lines = ["step,train/loss,train/kl,train/lr", *(f"{s},{1 / s},{s / 7},{s / 1e9}" for s in range(1, 20_001))]
    curves = read_curves(write(tmp_path / "metrics.csv", lines))
    run = made_up(curves=curves)
    write_results(tmp_path / "results.json", run)
    text = (tmp_path / "results.json").read_text()
    assert len(text) < 60_000
    (line,) = [line for line in text.splitlines() if line.startswith('  "curves"')]
    assert json.loads("{" + line.strip().rstrip(",") + "}") == {"curves": curves}
    back = read_results(tmp_path / "results.json")
    assert back.curves == curves
    assert back.token_kl == run.token_kl
    assert back.curves["train/loss"][-1] == [20_000, 5e-05]


def test_files_without_curves_still_read(tmp_path):
    write_results(tmp_path / "results.json", made_up())
    content = json.loads((tmp_path / "results.json").read_text())
    del content["curves"], content["token_kl"]
    (tmp_path / "results.json").write_text(json.dumps(content))
    back = read_results(tmp_path / "results.json")
    assert (back.curves, back.token_kl) == ({}, {})


def test_a_lone_surrogate_is_replaced_where_it_is_read(tmp_path):
    write_results(tmp_path / "results.json", made_up(name="a-b 😀"))
    path = tmp_path / "results.json"
    path.write_text(path.read_text().replace("a-b 😀", "a\\ud83dz \\ud83d\\ude00"))
    assert read_results(path).name == "a?z 😀"
