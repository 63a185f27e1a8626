"""callbacks=retention_probe: curves of forgetting that leave the training as it is."""

import csv
import shutil
from pathlib import Path

import pytest

from selfaug.callbacks import advice
from selfaug.callbacks.advice import Advice
from tests.evaluation.retention.tiny_items import items  # noqa: F401
from tests.run.conftest import Runs
from tests.run.test_errors import refused
from tests.run.test_resume import same

PROBE = ("callbacks=retention_probe", "callbacks.retention_probe.every_n_steps=3",
         "callbacks.retention_probe.ifeval_items=2", "callbacks.retention_probe.max_new_tokens=4",
         "callbacks.retention_probe.documents=2")  # fmt: skip
LENGTH = ("trainer.max_epochs=2", "data.limit_train=16", "adapter.lora_dropout=0.1")  # epochs of 4 steps


def rows(directory: Path) -> dict[int, dict[str, str]]:
    found: dict[int, dict[str, str]] = {}
    with (directory / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(int(row["step"]), {}).update({key: value for key, value in row.items() if value})
    return found


def test_curves_leave_the_weights_alone_and_are_whole_after_a_kill(runs: Runs, items):  # noqa: F811
    settings = (*LENGTH, *PROBE, "callbacks.checkpoint_every_n_steps=1")
    watched = runs.into(runs.runs / "watched").done(*settings)
    found = rows(watched)
    assert [step for step, row in found.items() if "probe/drift_wikipedia" in row] == [0, 3, 4, 6, 8]
    answered = [step for step, row in found.items() if "probe/ifeval_prompt_strict" in row]
    assert answered == [0, 4, 8]
    assert all("probe/words" in found[step] for step in answered)
    assert float(found[0]["probe/drift_wikipedia"]) == 0
    assert float(found[8]["probe/drift_wikipedia"]) > 0

    plain = runs.into(runs.runs / "plain").done(*LENGTH)
    name = "adapter/adapter_model.safetensors"
    assert (plain / name).read_bytes() == (watched / name).read_bytes()

    part = runs.into(runs.runs / "part")
    copy = Path(shutil.copytree(watched, part.runs / watched.name))
    for name in ("adapter", "fit.json", "results.json"):  # as if it had been killed after its last step
        (copy / name).rename(copy / f"{name}.gone")
    assert part.done(*settings) == copy
    same(copy, watched)


def test_a_run_that_ends_within_an_epoch_has_a_last_point(runs: Runs, items):  # noqa: F811
    found = rows(runs.done(*LENGTH, *PROBE, "trainer.max_steps=2"))
    assert [step for step, row in found.items() if "probe/ifeval_prompt_strict" in row] == [0, 2]


@pytest.mark.parametrize("setting", ["every_n_steps=0", "documents=0", "ifeval_items=-1"])
def test_wrong_settings(runs: Runs, items, setting: str):  # noqa: F811
    refused(runs.inline(*PROBE, f"callbacks.retention_probe.{setting}", "trainer.max_steps=1"), setting)


class Module:
    latest: dict[str, float]


class Trainer:
    is_global_zero = True


def advised(caplog, steps: list[tuple[float, float]], alpha: float, drift: float | None) -> list[str]:
    """What is advised after steps of (NLL, KL)."""
    callback, module = Advice(lambda: drift), Module()
    caplog.clear()
    with caplog.at_level("WARNING", logger=advice.__name__):
        for nll, kl in steps:
            module.latest = {"train/nll": nll, "train/kl": kl, "train/alpha": alpha}
            callback.on_train_batch_end(Trainer(), module, None, None, 0)
    return [record.message for record in caplog.records]


STEADY = [(2.0, 0.2)] * advice.WINDOW
FALLING = [(4.0 - 0.1 * i, 0.2) for i in range(advice.WINDOW)]


@pytest.mark.parametrize(
    ("steps", "alpha", "drift", "word"),
    [
        (STEADY, 2.0, 0.001, "too high"),
        (FALLING, 2.0, 0.001, None),
        (STEADY, 2.0, 0.1, None),
        (STEADY, 2.0, None, None),
        ([(2.0, 0.01)] * advice.WINDOW, 0.5, 0.8, "too low"),
        (STEADY, 2.0, 0.8, None),
        ([*FALLING[:-2], (2.0, 5.0), (2.0, 0.2)], 0.5, None, "jumps"),
        ([(4.0, 0.5 * (i / 20) ** 4) for i in range(advice.WINDOW)], 5.0, None, None),  # the start of a run
        (FALLING[:-2], 0.5, 9.0, None),  # too few steps to say anything
    ],
)
def test_advice(caplog, steps, alpha, drift, word):
    messages = advised(caplog, steps, alpha, drift)
    assert len(messages) == (word is not None)
    assert all(word in message for message in messages)


def test_advice_is_given_once(caplog):
    assert len(advised(caplog, STEADY * 5, 2.0, 0.001)) == 1


def test_plain_lora_gets_none(caplog):
    callback, module = Advice(lambda: 0.9), Module()
    module.latest = {"train/nll": 2.0}
    for _ in range(50):
        callback.on_train_batch_end(Trainer(), module, None, None, 0)
    assert not caplog.records
