"""Runs with the reference cache: the same adapter whoever filled it, filled once for a sweep, refused in a sentence."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

from selfaug.model import cache as cache_module
from selfaug.model.reference import AdaptersOff
from selfaug.run.identity import config_hash, register_resolvers
from tests.run.conftest import Runs
from tests.run.test_errors import refused
from tests.run.test_resume import adapter, metrics, same, stop
from tests.run.test_same import relative_error

# Two epochs of 10 steps each, validation within them.
LONG = ("trainer.max_epochs=2", "trainer.val_check_interval=5", "adapter.lora_dropout=0.1",
        "callbacks.checkpoint_every_n_steps=4")  # fmt: skip


def disk(directory: Path) -> tuple[str, str]:
    return "reference.cache=disk", f"reference.directory={directory}"


@contextmanager
def passes() -> Iterator[list[str]]:
    """The examples that the cache has the base model run for."""
    keys: list[str] = []
    real = AdaptersOff.states

    def counted(self, decoder, tokens, **settings):
        keys.extend(key for _, key in tokens.examples)
        return real(self, decoder, tokens, **settings)

    with mock.patch.object(cache_module.AdaptersOff, "states", counted):
        yield keys


def entries(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.safetensors"))


def used(directory: Path) -> int:
    """How many examples a run trained and validated on."""
    counts = json.loads((directory / "results.json").read_text())["data"]["counts"]
    return counts["train"] + counts["val"]


@pytest.fixture(scope="module")
def cold(workspace: Runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that found nothing in the cache, and the cache."""
    place = tmp_path_factory.mktemp("cold")
    with passes() as keys:
        run = workspace.into(place / "runs").done(*LONG, *disk(place / "cache"))
    assert len(keys) == len(set(keys)) == len(entries(place / "cache")) == used(run)
    return run, place / "cache"


def test_a_warm_cache_gives_the_same_bytes(cold: tuple[Path, Path], runs: Runs):
    run, directory = cold
    with passes() as keys:
        same(runs.done(*LONG, *disk(directory)), run)
    assert keys == []


def test_memory_gives_the_same_bytes(cold: tuple[Path, Path], runs: Runs):
    with passes() as keys:
        same(run := runs.done(*LONG, "reference.cache=memory"), cold[0])
    assert len(keys) == used(cold[0])
    seconds = json.loads((run / "fit.json").read_text())["reference_seconds"]
    assert seconds > 0
    times = json.loads((run / "results.json").read_text())["time"]
    assert times["reference_s"] == seconds
    assert times["total_s"] == pytest.approx(times["fit_s"] + seconds + times["evaluate_s"])


def test_an_uncached_run_differs_by_rounding_and_has_another_name(cold: tuple[Path, Path], runs: Runs):
    uncached = runs.done(*LONG)
    assert uncached.name != cold[0].name
    name = "adapter/adapter_model.safetensors"
    assert 0 < relative_error(load_file(uncached / name), load_file(cold[0] / name)) < 1e-3
    for one, other in zip(metrics(uncached), metrics(cold[0]), strict=True):
        for key in ("train/kl", "val/kl"):
            if one[key]:
                assert float(one[key]) == pytest.approx(float(other[key]), rel=1e-3, abs=1e-6)


def test_a_sweep_over_alpha_seed_and_rank_fills_once(runs: Runs, tmp_path: Path):
    with passes() as keys:
        swept = runs.inline(
            "-m", "alignment.alpha=0.1,0.5", "adapter.r=2,4", "trainer.max_steps=3", *disk(tmp_path / "cache")
        )  # fmt: skip
        other = runs.inline("alignment=all_logits", "seed=2", "trainer.max_steps=3", *disk(tmp_path / "cache"))
    assert (swept.returncode, other.returncode) == (0, 0), swept.stderr + other.stderr
    assert len(runs.directories()) == 5
    assert len(keys) == len(set(keys)) == len(entries(tmp_path / "cache"))


def test_a_short_run_fills_only_what_it_will_see(runs: Runs, tmp_path: Path):
    setting = ("trainer.max_steps=2", "trainer.limit_val_batches=0", *disk(tmp_path / "cache"))
    with passes() as keys:
        run = runs.done(*setting)
    assert len(keys) == 2 * 4 < used(run)
    assert len(entries(tmp_path / "cache")) == 8


def test_killed_in_training_and_resumed_is_never_killed(cold: tuple[Path, Path], runs: Runs, tmp_path: Path):
    setting = (*LONG, *disk(tmp_path / "cache"))
    assert stop(runs, 4, signal.SIGKILL, *setting).returncode == -signal.SIGKILL
    with passes() as keys:
        result = runs.inline(*setting)
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stdout
    assert keys == []
    same(runs.only(), cold[0])


def test_killed_while_filling_goes_on(cold: tuple[Path, Path], runs: Runs, tmp_path: Path):
    setting = (*LONG, *disk(tmp_path / "cache"))
    # It stops after the fifth entry, and is killed there.
    slow = tmp_path / "sitecustomize.py"
    slow.write_text(
        "import os, time\nreplace, count = os.replace, []\n"
        "def slow(source, target):\n"
        "    if 'safetensors' in str(target):\n"
        "        count.append(target)\n"
        "        if len(count) > 5: time.sleep(300)\n"
        "    return replace(source, target)\n"
        "os.replace = slow\n"
    )
    path = os.pathsep.join([str(tmp_path), runs.environment()["PYTHONPATH"]])
    with subprocess.Popen(
        runs.command(*setting), cwd=runs.path, env=runs.environment(PYTHONPATH=path),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        while process.poll() is None and len(entries(tmp_path / "cache")) < 5:
            time.sleep(0.01)
        process.kill()
        process.communicate(timeout=60)
    assert process.returncode != 0
    assert len(entries(tmp_path / "cache")) == 5
    with passes() as keys:
        result = runs.inline(*setting)
    assert result.returncode == 0, result.stderr
    assert len(keys) == used(cold[0]) - 5
    same(runs.only(), cold[0])


def test_a_damaged_entry_changes_nothing(cold: tuple[Path, Path], runs: Runs, tmp_path: Path):
    directory = tmp_path / "cache"
    for file in entries(cold[1]):
        copy = directory / file.relative_to(cold[1])
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    first, second, *_ = entries(directory)
    damaged = bytearray(first.read_bytes())
    damaged[-7] ^= 1
    first.write_bytes(damaged)
    second.write_bytes(entries(cold[1])[2].read_bytes())  # another example's
    result = runs.inline(*LONG, *disk(directory))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("is damaged or foreign") == 2
    same(runs.only(), cold[0])
    assert [file.read_bytes() for file in entries(directory)] == [file.read_bytes() for file in entries(cold[1])]


# Steps that do not divide evenly over two processes, epochs in which they see other examples.
UNEVEN = ("trainer.max_epochs=2", "data.batch_size=5")


@pytest.fixture(scope="module")
def single(workspace: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace.into(tmp_path_factory.mktemp("single")).done(*UNEVEN, "reference.cache=memory")


@pytest.mark.parametrize(("strategy", "where"), [("ddp", "disk"), ("fsdp", "disk"), ("fsdp", "memory")])
def test_two_processes_equal_one(single: Path, runs: Runs, tmp_path: Path, strategy: str, where: str):
    run = runs.done(*UNEVEN, f"trainer={strategy}", *disk(tmp_path / "cache"), f"reference.cache={where}")
    assert len(entries(tmp_path / "cache")) == (used(run) if where == "disk" else 0)
    name = "adapter/adapter_model.safetensors"
    assert relative_error(load_file(run / name), load_file(single / name)) < 1e-4


@pytest.mark.parametrize("rows", ["entropy", "attention"])
def test_scores_are_cached_with_the_states(runs: Runs, tmp_path: Path, rows: str):
    setting = (f"alignment.rows={rows}", "alignment.share=0.5", "trainer.max_steps=4", *disk(tmp_path / "cache"))
    first = runs.done(*setting)
    files = entries(tmp_path / "cache")
    assert sum("-states" in file.name for file in files) == sum(f"-{rows}" in file.name for file in files) > 16
    with passes() as keys:
        again = runs.into(tmp_path / "again").done(*setting)
    assert keys == []
    assert adapter(again) == adapter(first)


def test_the_cache_is_filled_under_the_autocast_of_the_training(runs: Runs, tmp_path: Path):
    setting = ("trainer.precision=bf16-mixed", "trainer.max_steps=4", *disk(tmp_path / "cache"))
    with passes() as keys:
        run = runs.done(*setting)
    assert len(keys) == len(set(keys)) == len(entries(tmp_path / "cache")) == 4 * 4 + 4
    plain = runs.into(tmp_path / "plain").done(*setting, "reference.cache=off")
    found, expected = ([float(row["train/kl"]) for row in metrics(directory)] for directory in (run, plain))
    assert expected[0] == 0
    assert 0 <= found[0] < 1e-3  # the rounding of two passes of other shapes
    assert found == pytest.approx(expected, rel=0.05, abs=1e-3)


def test_packed_batches_find_the_same_entries(cold: tuple[Path, Path], runs: Runs):
    with passes() as keys:
        runs.done(*LONG, "data.packing=true", *disk(cold[1]))
    assert keys == []


# --- refused ----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_one_sentence(runs: Runs, tmp_path: Path):
    on_disk, steps = disk(tmp_path / "cache"), "trainer.max_steps=2"
    (tmp_path / "file").touch()
    refused(runs.inline(steps, "reference.cache=cloud"), "reference.cache=cloud is unknown", "off, memory or disk")
    refused(runs.inline(steps, *on_disk, "alignment.official=true"), "alignment.official", "reference.cache=off")
    refused(runs.inline(steps, *on_disk, "reference.limit_gb=0"), "reference.limit_gb=0 is not allowed")
    refused(
        runs.inline(steps, *on_disk, "reference.limit_gb=1e-6"), "reference.limit_gb=1e-06", "GB", "reference.cache=off"
    )
    refused(runs.inline(steps, *disk(tmp_path / "file" / "cache")), "cannot be written", "reference.directory")
    assert not (tmp_path / "cache").exists()


# --- the name of a run ----------------------------------------------------------------------------------------------


def hashed(*overrides: str) -> str:
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_module("selfaug.conf", version_base="1.3"):
        return config_hash(compose("train", overrides=list(overrides)))


def test_a_run_is_cached_or_not_and_where_does_not_count():
    uncached, cached = hashed(), hashed("reference.cache=disk")
    assert cached != uncached
    assert {hashed("reference.cache=off"), hashed("reference.cache=false")} == {uncached}
    for same_result in ("reference.cache=memory", "reference.limit_gb=1", "reference.directory=/elsewhere"):
        assert hashed("reference.cache=disk", same_result) == cached
    assert hashed("method=lora", "reference.cache=disk") == hashed("method=lora")
    assert hashed("reference.limit_gb=1") == uncached


def test_plain_lora_keeps_nothing(runs: Runs, tmp_path: Path):
    runs.done("method=lora", "trainer.max_steps=2", *disk(tmp_path / "cache"))
    assert entries(tmp_path / "cache") == []
