"""python -m selfaug.dialogues, and methods that mix other data in, from the command line to results.json."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from safetensors.torch import load_file

from selfaug import dialogues, train
from tests.run.conftest import Runs
from tests.run.test_errors import refused
from tests.run.warm import Warm
from tests.tiny import save_tiny

SHORT = (
    "self_dialogues.max_user_tokens=12", "self_dialogues.max_answer_tokens=12", "self_dialogues.batch_size=8",
    "self_dialogues.temperature=1.5",
)  # fmt: skip
QUICK = ("evaluation.rag=null", "evaluation.drift=null", "trainer.max_steps=3", "optimizer.lr=0.05")


@pytest.fixture(scope="module")
def talkative(workspace: Runs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A workspace whose model ends a text now and then: every fifth of its tokens ends one."""
    runs = Runs(tmp_path_factory.mktemp("talkative"))
    settings = json.loads((runs.path / "model/generation_config.json").read_text())
    settings["eos_token_id"] = [2, *range(30, 90)]
    (runs.path / "model/generation_config.json").write_text(json.dumps(settings))
    return runs


@pytest.fixture
def talk(talkative: Runs, tmp_path: Path) -> Runs:
    return talkative.into(tmp_path / "runs")


def spoken(runs: Runs, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """As `python -m selfaug.dialogues` would, in this process."""
    shared = [one for one in runs.overrides() if one.startswith(("model", "trainer", "progress"))]
    with mock.patch.object(train, "main", dialogues.main), mock.patch.object(runs, "overrides", list):
        return runs.inline(*shared, *SHORT, *arguments, **variables)


def folder(cache: Path) -> Path:
    (found,) = (cache / "dialogues").iterdir()
    return found


def test_dialogues(talk: Runs, tmp_path: Path):
    done = spoken(talk, "self_dialogues.number=10", SELFAUG_CACHE=str(tmp_path / "c"))
    assert done.returncode == 0, done.stdout + done.stderr
    place = folder(tmp_path / "c")
    assert place.name.startswith("seedless-")
    records = [json.loads(line) for line in (place / "dialogues.jsonl").read_text().splitlines()]
    assert len(records) >= 10
    assert all([m["role"] for m in record["messages"]] == ["user", "assistant"] for record in records)
    about = json.loads((place / "settings.json").read_text())
    assert about["settings"]["temperature"] == 1.5
    assert about["settings"]["top_p"] == 0.9
    assert about["model"]["name"] == "model"
    assert "message['role']" in about["chat_template"]
    assert json.loads((place / "statistics.json").read_text())["dialogues"] == 10
    assert "tokens per s" in done.stdout
    assert done.stdout.count("user: ") == 3
    assert str(place) in done.stdout
    before = (place / "dialogues.jsonl").read_bytes()
    assert spoken(talk, "self_dialogues.number=10", SELFAUG_CACHE=str(tmp_path / "c")).returncode == 0
    assert (place / "dialogues.jsonl").read_bytes() == before
    assert spoken(talk, "self_dialogues.number=10", SELFAUG_CACHE=str(tmp_path / "d")).returncode == 0
    assert (folder(tmp_path / "d") / "dialogues.jsonl").read_bytes() == before  # the same anywhere


def test_killed_and_resumed(talk: Runs, tmp_path: Path):
    wanted = ["self_dialogues.number=40", "self_dialogues=bait", "self_dialogues.turns=2"]
    shared = [one for one in talk.overrides() if one.startswith(("model", "trainer", "progress"))]
    process = Warm(
        [sys.executable, "-m", "selfaug.dialogues", *shared, *SHORT, *wanted],
        cwd=talk.path, env=talk.environment(SELFAUG_CACHE=str(tmp_path / "c")), stdout=subprocess.PIPE,
    )  # fmt: skip
    limit = time.monotonic() + 240
    while not list(tmp_path.glob("c/dialogues/*/progress.json")) and process.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    if process.returncode != -signal.SIGKILL:  # it was too fast to be killed
        assert process.returncode == 0, err
    for cache in "cd":
        done = spoken(talk, *wanted, SELFAUG_CACHE=str(tmp_path / cache))
        assert done.returncode == 0, done.stderr
    one, other = (folder(tmp_path / cache) / "dialogues.jsonl" for cache in "cd")
    assert one.read_bytes() == other.read_bytes()


def test_a_file_of_another_s_is_not_written_over(talk: Runs, tmp_path: Path):
    mine = tmp_path / "mine/dialogues.jsonl"
    mine.parent.mkdir()
    mine.write_text("mine\n")
    refused(spoken(talk, "self_dialogues.number=2", f"out={mine.parent}"), "selfaug has not written", "another folder")
    assert mine.read_text() == "mine\n"


def test_another_model_or_setting_writes_elsewhere(talk: Runs, tmp_path: Path):
    cache = {"SELFAUG_CACHE": str(tmp_path / "c")}
    save_tiny(talk.path / "other", seed=1)
    settings = (talk.path / "model/generation_config.json").read_text()
    (talk.path / "other/generation_config.json").write_text(settings)
    for change in ("self_dialogues.seed=0", "self_dialogues.seed=1", "model.name=other", "self_dialogues.turns=2"):
        assert spoken(talk, "self_dialogues.number=2", change, **cache).returncode == 0
    places = list((tmp_path / "c/dialogues").iterdir())
    assert len(places) == 4
    assert len({(place / "dialogues.jsonl").read_bytes() for place in places}) == 4
    out = f"out={places[0]}"
    refused(spoken(talk, "self_dialogues.seed=9", out, **cache), "another model or other settings", "set out")


# ---- methods --------------------------------------------------------------------------------------------------------


def adapter(directory: Path) -> dict:
    return load_file(directory / "adapter/adapter_model.safetensors")


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def results(directory: Path) -> dict:
    return json.loads((directory / "results.json").read_text())


def metrics(directory: Path) -> list[str]:
    return (directory / "metrics.csv").read_text().splitlines()[0].split(",")


@pytest.fixture(scope="module")
def plain(talkative: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talkative.into(tmp_path_factory.mktemp("plain")).done("method=lora", *QUICK)


def test_sa_sft_alone_writes_what_it_needs(talk: Runs, tmp_path: Path):
    cache = tmp_path / "c"
    run = talk.done("method=sa_sft", "method.ratio=0.5", *QUICK, *SHORT, SELFAUG_CACHE=str(cache))
    found = results(run)["data"]
    tasks = found["used"]["train"]
    assert found["used"]["self_dialogues"] == round(tasks / 2)
    # Empty answers, of which a random model has some, are not learned; others come again in their place.
    assert round(tasks / 4) < found["mixture"]["self_dialogues"]["different"] <= round(tasks / 2)
    assert found["mixture"]["self_dialogues"]["dialogues"]["response_tokens"] > 0
    assert {"train/nll_task", "train/nll_self_dialogues"} <= set(metrics(run))
    place = folder(cache)
    # The same that the command writes.
    assert spoken(talk, "self_dialogues.number=5", SELFAUG_CACHE=str(cache)).returncode == 0
    assert folder(cache) == place
    before = place.stat().st_mtime_ns, (place / "dialogues.jsonl").read_bytes()
    again = talk.into(tmp_path / "again").done(
        "method=self_kl", "method.ratio=0.5", *QUICK, *SHORT, SELFAUG_CACHE=str(cache)
    )
    assert (place / "dialogues.jsonl").read_bytes() == before[1]  # shared by methods
    assert "train/self_kl" in metrics(again)
    assert not results(again)["data"]["mixture"]["self_dialogues"]["learned"]


@pytest.mark.parametrize("method", ["sa_sft", "magpie", "replay", "self_kl", "replay_kl"])
def test_ratio_0_is_plain_lora_bit_for_bit(talk: Runs, plain: Path, method: str):
    run = talk.done(f"method={method}", "method.ratio=0", *QUICK)
    assert equal(adapter(run), adapter(plain))
    assert results(run)["data"]["used"] == results(plain)["data"]["used"]


def test_selfaug_plus_without_self_dialogues_is_selfaug(talk: Runs, tmp_path: Path):
    one = talk.done("method=selfaug", *QUICK)
    other = talk.into(tmp_path / "other").done("method=selfaug_plus", "method.ratio=0", *QUICK)
    assert equal(adapter(one), adapter(other))


@pytest.mark.parametrize(
    "more", [[], ["data.packing=true"], ["reference.cache=memory"]], ids=["padded", "packed", "cached"]
)
def test_a_mixture_of_files(talk: Runs, plain: Path, more: list[str]):
    """The aligned file has rows of its own, and the learned one changes what is learned."""
    mixed = [
        "method=replay_kl", "mixture@data.mixture.replay=jsonl", "data.mixture.replay.source.path=dialogues.jsonl",
        "+mixture@data.mixture.texts=jsonl", "data.mixture.texts.source.path=texts.jsonl", "method.ratio=0.5",
        "data.mixture.texts.ratio=0.2", "data.mixture.texts.by=tokens",
    ]  # fmt: skip
    run = talk.done(*mixed, *QUICK, *more)
    used = results(run)["data"]["used"]
    assert used["replay"] == round(used["train"] / 2)
    tokens = {name: part["tokens"] for name, part in results(run)["data"]["mixture"].items()}
    assert tokens["texts"] == pytest.approx(0.2 * tokens["task"], abs=20)
    assert {"train/nll_texts", "train/rows_nll_replay", "train/replay_kl"} <= set(metrics(run))
    assert "train/nll_replay" not in metrics(run)  # a mean over nothing
    assert not equal(adapter(run), adapter(plain))
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    column = dict(zip(*(rows[0], rows[1]), strict=True))
    assert float(column["train/rows_nll_replay"]) == 0
    assert float(column["train/rows_nll_texts"]) > 0
    assert float(column["train/rows_replay_kl"]) > 0


def test_evaluation_does_not_need_the_mixture(talk: Runs, tmp_path: Path):
    from selfaug import evaluate

    own = tmp_path / "more.jsonl"
    own.write_text((talk.path / "dialogues.jsonl").read_text())
    run = talk.done(
        "method=replay", "mixture@data.mixture.replay=jsonl", f"data.mixture.replay.source.path={own}",
        "method.ratio=0.2", *QUICK,
    )  # fmt: skip
    with mock.patch.object(train, "main", evaluate.main), mock.patch.object(talk, "overrides", list):
        done = talk.inline(
            f"target={run}", "evaluation=task", "evaluation.rag.limit=2", "evaluation.drift=null", "progress=false",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method=sa_sft", "method.ratio=-1"], ("data.mixture.self_dialogues.ratio=-1", "set it to 0 or a positive")),
        (["method=sa_sft", "self_dialogues.recipe=x"], ("self_dialogues.recipe=x is unknown", "seedless, bait")),
        (["+mixture@data.mixture.a=jsonl"], ("data.mixture.a.source.path",)),
        (["+mixture@data.mixture.a=jsonl", "data.mixture.a.source.path=none"], ("none does not exist", "set the path")),
        (["+data.mixture.a={ratio: 1}"], ("data.mixture.a.source is no source", "conf/mixture")),
        (["+mixture@data.mixture.a=alpaca_sample", "+data.mixture.a.share=1"], ("mixture", "share")),
        (["method=self_kl", "method.terms.self_kl.source=b"], ("data source b", "data.mixture")),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_mistakes_in_one_sentence(talk: Runs, overrides: list[str], words: tuple[str, ...]):
    refused(talk.inline(*overrides), *words)


def test_the_module_runs(talk: Runs):
    text = subprocess.run(
        [sys.executable, "-m", "selfaug.dialogues", "--help"], capture_output=True, text=True, check=True,
        cwd=talk.path, env={**os.environ, **talk.environment()},
    ).stdout  # fmt: skip
    assert "self_dialogues" in text
