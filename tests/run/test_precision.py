"""Precisions that a run can train in, and a model that only its own device can verify."""

import csv
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from selfaug.run import build
from selfaug.run.identity import RunDirectory
from tests.run.conftest import Runs

SHORT = "trainer.max_steps=2"


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_low_precision_trains(runs: Runs, precision: str):
    directory = runs.done(SHORT, f"trainer.precision={precision}")
    weights = load_file(directory / "adapter" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    with (directory / "metrics.csv").open(newline="") as file:
        losses = [row for row in csv.DictReader(file) if row["train/kl"]]
    assert len(losses) == 2
    assert float(losses[0]["train/kl"]) < 1e-3


def test_bf16_true_loads_the_weights_in_bfloat16(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    seen: list[set[torch.dtype]] = []
    load = build.load_base

    def loaded(*arguments, **settings):
        model = load(*arguments, **settings)
        seen.append({parameter.dtype for parameter in model.parameters()})
        return model

    monkeypatch.setattr(build, "load_base", loaded)
    runs.done(SHORT, "trainer.precision=bf16-true")
    assert seen[0] == {torch.bfloat16}


def test_attention_that_no_cpu_runs_is_verified_where_it_trains(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    moments: list[tuple[bool, bool]] = []
    monkeypatch.setattr(build, "needs_accelerator", lambda model: True)
    monkeypatch.setattr(
        build, "verify", lambda model, packing: moments.append((packing, getattr(model, "training", False)))
    )
    directory: Path = runs.done(SHORT, "data.packing=true")
    assert moments == [(True, True)]  # once, in the fit
    assert (directory / "adapter").exists()


def test_going_on_in_another_precision_is_said(tmp_path, caplog):
    """trainer.precision=auto is the machine's choice, and a run may go on on another machine."""
    run = RunDirectory(tmp_path)
    config = OmegaConf.create({"seed": 1})
    run.claim(config, "data", "bf16-mixed")
    run.claim(config, "data", "bf16-mixed")
    assert not caplog.records
    run.claim(config, "data", "32-true")
    assert "started in bf16-mixed and goes on in 32-true" in caplog.text
    caplog.clear()
    (tmp_path / "results.json").touch()  # finished: nothing goes on
    run.claim(config, "data", "bf16-mixed")
    assert not caplog.records
