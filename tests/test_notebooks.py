"""Every cell of the notebooks runs, on a tiny model and on made-up results.

What the numbers must be is asserted by the notebooks' own cells: an AssertionError there fails the test here.
"""

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from benchmarks.report import made_up
from selfaug.reporting.results import write_results
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
TOWNS = ("Aachen", "Bonn", "Cham", "Daun", "Emden", "Fulda", "Gera", "Hof", "Ilm", "Jena", "Kiel", "Lahr")


def parameters(notebook: Any) -> Any:
    """The cell that holds what a reader may change."""
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    return cell


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Run a notebook with other parameters in an empty folder; gives its cells' outputs as one text."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # The kernel keeps its history and its connection files out of the user's folders.
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(name: str, **values: Any) -> str:
        notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
        cell = parameters(notebook)
        names: dict[str, Any] = {}
        exec(cell.source, names)
        assert set(values) <= set(names), "the notebook no longer knows these parameters"
        cell.source += "".join(f"\n{key} = {value!r}" for key, value in values.items())
        (tmp_path / "empty").mkdir(exist_ok=True)
        folder = {"metadata": {"path": str(tmp_path / "empty")}}
        # The limits are for what hangs: on a busy machine the imports alone may take minutes.
        NotebookClient(notebook, timeout=600, startup_timeout=300, kernel_name="python3", resources=folder).execute()
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        complaints = [output.text for output in outputs if output.get("name") == "stderr"]
        assert not complaints, complaints
        return json.dumps(outputs, ensure_ascii=False)

    return run


def test_step_by_step(execute, tmp_path):
    """Four ways to the loss agree, the KL starts at 0 without a gradient, its term lowers it: asserted there."""
    questions = [
        {
            "id": f"{town}{number}", "title": town, "question": f"Where does man {number} of {town} live?",
            "answers": [f"{town} {number}"], "paragraph": f"In {town} man {number} lives in {town} {number}.",
        }
        for town in TOWNS
        for number in range(2)
    ]  # fmt: skip
    data = tmp_path / "squad.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    model = save_tiny(tmp_path / "model")
    settings = {"CONTEXT_TOKENS": 120, "RANK": 4, "LEARNING_RATE": 5e-3, "STEPS": 6}
    shown = execute("selfaug_step_by_step", MODEL=str(model), DATA=str(data), **settings)
    assert "selfaug_loss" in shown
    assert shown.count("image/png") == 5


def test_explore_a_sweep(execute, tmp_path):
    """Means of the notebook's own table equal the report's: asserted there. All plots are drawn."""
    runs = [{"plain": True}] + [
        {"position": position, "alpha": alpha} for position in ("input_logits", "output_logits") for alpha in (0.1, 0.5)
    ]
    for index, settings in enumerate(runs):
        for seed in (1, 2):
            run = made_up(**settings, seed=seed, tokens=60)
            run.samples[0]["tuned"] = "<script>alert(1)</script> costs $5 or $6"
            write_results(tmp_path / "runs" / f"{index}-{seed}" / "results.json", run)
    shown = execute("explore_sweep", RUNS=[str(tmp_path / "runs")])
    assert "10 runs in 5 rows, 2 seeds" in shown
    assert shown.count("image/png") == 7
    assert "no data for this plot" not in shown
    assert "&lt;script&gt;" in shown
    assert "<script>alert" not in shown


def test_explore_a_single_run_with_little_in_it(execute, tmp_path):
    """No seeds to compare, no benchmarks, no curves, no samples: the cells say so and do not fail."""
    run = made_up(curves={}, token_kl={}, samples=[], retention={}, retention_mean={}, drift={})
    write_results(tmp_path / "run" / "results.json", run)
    shown = execute("explore_sweep", RUNS=[str(tmp_path / "run")])
    assert "1 runs in 1 rows, 1 seed" in shown
    assert shown.count("no data for this plot") == 4
    assert "image/png" not in shown


def test_there_are_two():
    assert list(NOTEBOOKS) == ["explore_sweep", "selfaug_step_by_step"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_committed_is_small_and_clean(name):
    text = NOTEBOOKS[name].read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert len(text) < 500_000
    assert notebook.cells.index(parameters(notebook)) == 1, "after the title, before all other code"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    for place in ("/home/", "/root/", "/tmp/", "/Users/", "site-packages"):
        assert place not in text, place
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
