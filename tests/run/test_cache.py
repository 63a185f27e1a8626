"""Runs with the reference cache: the same adapter whoever filled it, filled once for a sweep, refused in a sentence."""

import copy
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from safetensors.torch import load_file

from selfaug.model import cache as cache_module
from selfaug.model.reference import AdaptersOff
from selfaug.run.identity import config_hash, register_resolvers
from tests.run.conftest import UNSCORED, Runs
from tests.run.test_errors import refused
from tests.run.test_resume import adapter, metrics, same, stop
from tests.run.test_same import relative_error

# Two epochs of 5 steps each, the last one smaller, validation within them.
SMALL = "data.source.test_share=0.6"
LONG = (SMALL, "trainer.max_epochs=2", "trainer.val_check_interval=3", "adapter.lora_dropout=0.1",
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


def test_a_sweep_over_alpha_seed_rank_and_position_fills_once(runs: Runs, tmp_path: Path):
    setting = ("data.source.test_share=0.7", *UNSCORED, *disk(tmp_path / "cache"))
    with passes() as keys:
        swept = runs.inline("-m", "alignment.alpha=0.1,0.5", *setting)
        other = runs.inline("alignment=all_logits", "seed=2", "adapter.r=2", *setting)
    assert (swept.returncode, other.returncode) == (0, 0), swept.stderr + other.stderr
    assert len(runs.directories()) == 3
    assert len(keys) == len(set(keys)) == len(entries(tmp_path / "cache"))
    assert {used(directory) for directory in runs.directories()} == {len(keys)}  # each saw all of them


def test_a_short_run_fills_only_what_it_will_see(runs: Runs, tmp_path: Path):
    setting = ("trainer.max_steps=2", "trainer.limit_val_batches=0", *UNSCORED, *disk(tmp_path / "cache"))
    with passes() as keys:
        run = runs.done(*setting)
    assert len(keys) == 2 * 4 < used(run)
    assert len(entries(tmp_path / "cache")) == 8


def killed_at_entry(number: int, runs: Runs, setting: tuple[str, ...]) -> None:
    """To be called in a process of its own, which is killed when it would keep entry `number` of the cache."""
    real, kept = os.replace, []

    def replace(source, target):
        if Path(target).suffix == ".safetensors":
            kept.append(target)
            if len(kept) == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return real(source, target)

    with mock.patch.object(os, "replace", replace):
        runs.inline(*setting)


def test_killed_while_filling_and_in_training_and_resumed_is_never_killed(
    cold: tuple[Path, Path], runs: Runs, tmp_path: Path
):
    setting = (*LONG, *disk(tmp_path / "cache"))
    process = multiprocessing.get_context("forkserver").Process(target=killed_at_entry, args=(6, runs, setting))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == -signal.SIGKILL
    first = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in entries(tmp_path / "cache")}
    assert len(first) == 5

    killed = stop(runs, 4, signal.SIGKILL, *setting)
    assert killed.returncode == -signal.SIGKILL
    assert f"for {used(cold[0])} examples, {used(cold[0]) - 5} of them to be computed" in killed.stdout
    assert {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in first} == first
    assert len(entries(tmp_path / "cache")) == used(cold[0])

    with passes() as keys:
        result = runs.inline(*setting)
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stdout
    assert keys == []
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
UNEVEN = (SMALL, "trainer.max_epochs=2", "data.batch_size=5", *UNSCORED)


@pytest.fixture(scope="module")
def single(workspace: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace.into(tmp_path_factory.mktemp("single")).done(*UNEVEN, "reference.cache=memory")


@pytest.mark.parametrize(("strategy", "where"), [("ddp", "disk"), ("fsdp", "memory")])
def test_two_processes_equal_one(single: Path, runs: Runs, tmp_path: Path, strategy: str, where: str):
    """A sharded model that fills a disk: test_full.py."""
    run = runs.done(*UNEVEN, f"trainer={strategy}", *disk(tmp_path / "cache"), f"reference.cache={where}")
    assert len(entries(tmp_path / "cache")) == (used(run) if where == "disk" else 0)
    name = "adapter/adapter_model.safetensors"
    assert relative_error(load_file(run / name), load_file(single / name)) < 1e-4


@pytest.mark.parametrize("rows", ["entropy", "attention"])
def test_scores_are_cached_with_the_states(runs: Runs, tmp_path: Path, rows: str):
    setting = (f"alignment.rows={rows}", "alignment.share=0.5", SMALL, *UNSCORED, *disk(tmp_path / "cache"))
    first = runs.done(*setting)
    files = entries(tmp_path / "cache")
    assert (
        sum("-states" in file.name for file in files) == sum(f"-{rows}" in file.name for file in files) == used(first)
    )
    with passes() as keys:
        again = runs.into(tmp_path / "again").done(*setting)
    assert keys == []
    assert adapter(again) == adapter(first)


def test_the_cache_is_filled_under_the_autocast_of_the_training(runs: Runs, tmp_path: Path):
    setting = ("trainer.precision=bf16-mixed", "trainer.max_steps=4", *UNSCORED, *disk(tmp_path / "cache"))
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
        runs.done(*LONG, *UNSCORED, "trainer.max_epochs=1", "data.packing=true", *disk(cold[1]))
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


def hashed(config: DictConfig, **reference: object) -> str:
    changed = copy.deepcopy(config)
    changed.reference.update(reference)
    return config_hash(changed)


def test_a_run_is_cached_or_not_and_where_does_not_count():
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_module("selfaug.conf", version_base="1.3"):
        config, lora, on_disk = (
            compose("train", overrides=list(one)) for one in ((), ("method=lora",), ("reference.cache=disk",))
        )
    uncached, cached = hashed(config), hashed(on_disk)
    assert cached != uncached
    assert hashed(config, cache="disk") == cached
    assert {hashed(config, cache="off"), hashed(config, cache=False)} == {uncached}
    for same_result in ({"cache": "memory"}, {"limit_gb": 1}, {"directory": "/elsewhere"}):
        assert hashed(on_disk, **same_result) == cached
    assert hashed(lora, cache="disk") == hashed(lora)
    assert hashed(config, limit_gb=1) == uncached


def test_plain_lora_keeps_nothing(runs: Runs, tmp_path: Path):
    runs.done("method=lora", "trainer.max_steps=2", *UNSCORED, *disk(tmp_path / "cache"))
    assert entries(tmp_path / "cache") == []
