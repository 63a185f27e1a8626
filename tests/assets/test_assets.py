"""The assets: fetched once, verified, whole or not there at all. No network and no torch, but for the last test."""

import errno
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from selfaug.assets import __main__ as command
from selfaug.assets import asset_path, asset_paths, fetch, pip_download, registry
from tests.assets import fake_assets as fakes
from tests.assets.helpers import lines, refused

GENUINE_DOWNLOAD = pip_download.download
ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("SELFAUG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def archives(tmp_path, cache, monkeypatch):
    """The fake index: a folder, a registry of two assets in one wheel, and a stand-in for pip."""
    folder = tmp_path / "index"
    fakes.write_archives(folder)
    monkeypatch.setattr(pip_download, "download", fakes.copy_from(folder))
    known = {name: fakes.asset(folder, name) for name in ("letters", "more-letters")}
    monkeypatch.setattr(registry, "ASSETS", known)
    monkeypatch.setattr(registry, "DEFAULT", ("letters",))
    return folder


def check_whole(cache):
    """The asset is finished, right, and nothing else lies about."""
    folder = asset_path("letters")
    assert folder == cache / "assets" / "letters"
    assert (folder / "letters.txt").read_bytes() == fakes.TEXT
    assert list((cache / "downloads").glob("*")) == []
    assert sorted(p.name for p in (cache / "assets").iterdir() if p.name != "more-letters") == [".lock", "letters"]


def real_pip(monkeypatch, archives):
    """The real pip, no network, the folder in place of an index."""
    monkeypatch.setattr(pip_download, "download", GENUINE_DOWNLOAD)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(archives))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


# Fetching


def test_fetches_once_and_leaves_only_the_asset(cache, archives):
    check_whole(cache)
    check_whole(cache)
    assert fakes.downloads(archives) == 1
    manifest = json.loads((cache / "assets" / "letters" / "manifest.json").read_text())
    assert manifest["licence"] == "CC0-1.0"
    assert manifest["files"]["letters.txt"]["bytes"] == len(fakes.TEXT)


def test_two_assets_of_one_archive_download_it_once(cache, archives):
    fetch.fetch(list(registry.ASSETS.values()))
    assert fakes.downloads(archives) == 1


def test_several_assets_are_asked_for_at_once(cache, archives):
    assert asset_paths(["more-letters", "letters"]) == [cache / "assets" / name for name in ("more-letters", "letters")]
    assert fakes.downloads(archives) == 1


def test_a_folder_of_a_wheel_is_given_to_build_whole(archives):
    wanted = fakes.asset(archives, member="letters/more/", build=fakes.folder_of_letters, count=2, unit="files")
    (folder,) = fetch.fetch([wanted])
    found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.txt")}
    assert found == {"letters/d.txt": "d\n", "letters/deep/e.txt": "e\n"}
    assert fetch.is_finished(wanted)
    (folder / "letters" / "deep" / "e.txt").unlink()
    assert not fetch.is_finished(wanted)


def test_kept_archives_are_used_again(cache, archives):
    fetch.fetch([registry.find("letters")], keep_archives=True)
    assert [p.name for p in (cache / "archives").iterdir()] == ["selfaug_letters-1.0-py3-none-any.whl"]
    asset_path("more-letters")
    assert fakes.downloads(archives) == 1
    assert len(list((cache / "archives").iterdir())) == 1


@pytest.mark.parametrize("sdist", [False, True], ids=["wheel", "sdist"])
def test_real_pip_downloads_without_running_code_of_the_archive(archives, monkeypatch, sdist):
    wanted = fakes.asset(archives, sdist=sdist)
    real_pip(monkeypatch, archives)
    (folder,) = fetch.fetch([wanted])
    assert (folder / "letters.txt").read_bytes() == fakes.TEXT


def test_an_asset_made_by_an_older_recipe_or_damaged_is_made_again(cache, archives, monkeypatch):
    check_whole(cache)
    monkeypatch.setitem(registry.ASSETS, "letters", fakes.asset(archives, recipe=2))
    check_whole(cache)
    (cache / "assets" / "letters" / "letters.txt").write_bytes(b"a")
    check_whole(cache)
    assert fakes.downloads(archives) == 3


# What goes wrong is one sentence


def test_wrong_hash_from_the_index(cache, archives):
    right = registry.find("letters").archive.sha256
    (archives / "selfaug_letters-1.0-py3-none-any.whl").write_bytes(b"another file")
    refused(lambda: asset_path("letters"), right, "selfaug-letters==1.0", "PIP_INDEX_URL", "has sha256")
    assert not list(cache.rglob("*.whl"))


def test_wrong_hash_of_a_file_put_there_by_hand(cache, archives):
    (cache / "archives").mkdir(parents=True)
    path = cache / "archives" / "selfaug_letters-1.0-py3-none-any.whl"
    path.write_bytes(b"another file")
    refused(lambda: asset_path("letters"), str(path), "has sha256", "delete the file")
    assert path.exists()


def test_wrong_hash_of_the_member(cache, archives, monkeypatch):
    monkeypatch.setitem(registry.ASSETS, "letters", fakes.asset(archives, member_sha256="0" * 64))
    refused(lambda: asset_path("letters"), "letters/letters.txt", "0" * 64)


def test_wrong_count(cache, archives, monkeypatch):
    monkeypatch.setitem(registry.ASSETS, "letters", fakes.asset(archives, count=4))
    refused(lambda: asset_path("letters"), "3 letters were read where 4")


def test_no_network_with_the_real_pip_and_the_way_out(cache, archives, monkeypatch, capsys):
    real_pip(monkeypatch, archives)
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert command.main(["letters"]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("selfaug.assets: Could not download selfaug-letters==1.0: the package index cannot be ")
    assert str(cache / "archives") in error
    assert "Traceback" not in error
    # The way out that the sentence names.
    (cache / "archives").mkdir()
    wheel = "selfaug_letters-1.0-py3-none-any.whl"
    (cache / "archives" / wheel).write_bytes((archives / wheel).read_bytes())
    assert command.main(["letters"]) == 0
    assert (cache / "archives" / wheel).exists()


@pytest.mark.parametrize(
    ("stderr", "fragment"),
    [
        ("ERROR: No matching distribution found (from versions: 0.9)", "does not have this version"),
        ("WARNING: Retrying ... HTTPSConnectionPool(host=...): timed out", "cannot be reached"),
        ("/usr/bin/python: No module named pip", "has no pip"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "SELFAUG_CACHE"),
        ("error: x\n\n× something new\nhint: y", "pip: something new"),
        ("ERROR: something else", "pip: something else"),
        ("", "pip: no message"),
    ],
)
def test_what_pip_says_becomes_one_sentence(cache, archives, monkeypatch, tmp_path, stderr, fragment):
    monkeypatch.setattr(subprocess, "run", lambda *_a, **_k: SimpleNamespace(returncode=1, stderr=stderr))
    archive = fakes.asset(archives).archive
    refused(lambda: GENUINE_DOWNLOAD(archive, tmp_path), "selfaug-letters==1.0", fragment)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("I/O: No space left on device (28)")])
def test_full_disk_while_building(cache, archives, monkeypatch, error):
    def build(*_):
        raise error

    monkeypatch.setitem(registry.ASSETS, "letters", fakes.asset(archives, build=build, work_bytes=5_000_000))
    refused(lambda: asset_path("letters"), "SELFAUG_CACHE", "5 MB are needed")
    monkeypatch.setitem(registry.ASSETS, "letters", fakes.asset(archives))
    check_whole(cache)


def test_full_disk_is_seen_before_downloading(cache, archives, monkeypatch):
    monkeypatch.setitem(registry.ASSETS, "letters", fakes.asset(archives, work_bytes=10**18))
    refused(lambda: asset_path("letters"), "SELFAUG_CACHE", "MB are needed")
    assert fakes.downloads(archives) == 0


def test_a_cache_that_cannot_be_written(cache, archives):
    cache.write_text("a file where the directory should be")
    refused(lambda: asset_path("letters"), "SELFAUG_CACHE", str(cache))


def test_other_errors_are_not_hidden(cache, archives, monkeypatch):
    def build(*_):
        raise ZeroDivisionError

    monkeypatch.setitem(registry.ASSETS, "letters", fakes.asset(archives, build=build))
    with pytest.raises(ZeroDivisionError):
        asset_path("letters")


@pytest.mark.parametrize("member", ["../escaped.txt", "/tmp/escaped.txt", "letters/../../escaped.txt"])
def test_a_member_outside_the_archive_is_refused(cache, archives, monkeypatch, member):
    monkeypatch.setitem(registry.ASSETS, "letters", fakes.asset(archives, member=member))
    refused(lambda: asset_path("letters"), "outside the archive")
    assert not list(cache.rglob("escaped.txt"))


def test_a_link_in_the_archive_is_refused(archives, tmp_path):
    sdist = archives / "selfaug_letters-1.0.tar.gz"
    refused(lambda: fetch.extract(sdist, "selfaug_letters-1.0/link.txt", tmp_path / "x"), "not a plain file")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["letters/more/../../escaped.txt", "letters/more/{absolute}"])
def test_a_folder_with_a_member_outside_is_refused(tmp_path, name):
    escaped = tmp_path / "escaped.txt"
    with zipfile.ZipFile(tmp_path / "evil.whl", "w") as wheel:
        wheel.writestr("letters/more/a.txt", b"a")
        wheel.writestr(name.format(absolute=escaped), b"b")
    (tmp_path / "x").mkdir()
    refused(lambda: fetch.extract_folder(tmp_path / "evil.whl", "letters/more/", tmp_path / "x" / "y"), "outside the")
    assert not escaped.exists()
    assert list((tmp_path / "x").iterdir()) == []


# Killed and concurrent


def spawn(archives, stage):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    script = Path(fakes.__file__)
    return subprocess.Popen(
        [sys.executable, str(script), str(archives), stage], env=environment, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("stage", ["download", "extract", "build", "manifest", "dispose"])
def test_killed_anywhere_the_next_call_finishes(cache, archives, stage):
    killed = spawn(archives, stage)
    killed.communicate(timeout=60)
    assert killed.returncode == -9
    assert fetch.is_finished(registry.find("letters")) == (stage == "dispose")
    # Until the last step only work directories are there, never the asset's own name.
    assert (cache / "assets" / "letters").exists() == (stage == "dispose")
    check_whole(cache)
    # A verified archive is not downloaded twice.
    assert fakes.downloads(archives) == (2 if stage == "download" else 1)


def test_a_half_directory_under_the_final_name_is_never_used(cache, archives):
    half = cache / "assets" / "letters"
    half.mkdir(parents=True)
    (half / "letters.txt").write_bytes(b"a")
    check_whole(cache)


def test_two_processes_at_once(cache, archives):
    both = [spawn(archives, "slow") for _ in range(2)]
    printed = [process.communicate(timeout=60)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert printed == [str(cache / "assets" / "letters")] * 2
    assert fakes.downloads(archives) == 1
    check_whole(cache)


# The command line and the registry


def test_list_names_source_and_licence_of_every_asset(cache, capsys):
    assert command.main(["--list"]) == 0
    printed = capsys.readouterr().out
    for asset in registry.ASSETS.values():
        assert f"\n{asset.name} (not fetched" in printed
        for text in (asset.licence, asset.source, asset.archive.requirement, asset.archive.sha256):
            assert text in printed
    assert not cache.exists()


def test_command_fetches_the_default_set(cache, archives, capsys):
    assert command.main([]) == 0
    assert capsys.readouterr().out == f"letters: {cache / 'assets' / 'letters'}\n"
    assert command.main(["all"]) == 0
    assert (cache / "assets" / "more-letters").is_dir()
    assert command.main(["--list"]) == 0
    assert "letters (fetched, default set)" in capsys.readouterr().out


def test_command_fetches_the_benchmarks(cache, archives, monkeypatch, capsys):
    monkeypatch.setattr(registry, "BENCHMARKS", ("more-letters",))
    assert command.main(["benchmarks"]) == 0
    assert capsys.readouterr().out == f"more-letters: {cache / 'assets' / 'more-letters'}\n"


def test_unknown_name_is_one_sentence_with_the_closest(cache, capsys):
    assert command.main(["sqad"]) == 1
    assert capsys.readouterr().err == "selfaug.assets: There is no asset 'sqad': did you mean 'squad'?\n"
    refused(lambda: registry.select(["squad", "benchmark"]), "did you mean 'benchmarks'?")
    refused(lambda: asset_path("benchmarks"), "There is no asset 'benchmarks'")
    refused(lambda: asset_path("???"), "choose one of smollm2-135m-instruct, squad")


def test_the_default_set_exists():
    assert [asset.name for asset in registry.select([])] == list(registry.DEFAULT)
    assert len(registry.select(["all", "squad"])) == len(registry.ASSETS)


def test_the_benchmarks_are_a_group_outside_the_default_set():
    names = [asset.name for asset in registry.select(["benchmarks", "mmlu"])]
    assert names == list(registry.BENCHMARKS)
    assert {"ifeval", "punkt-tab", "hellaswag", "mmlu"} < set(names) < set(registry.ASSETS)
    assert not set(names) & set(registry.DEFAULT)


def test_importing_the_assets_does_not_import_torch():
    code = "import sys, selfaug.assets, selfaug.assets.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# The real ones


@pytest.mark.assets
def test_the_packaged_model_and_squad():
    from transformers import AutoConfig, AutoTokenizer

    model = asset_path("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(model)
    # Digits are split off before white space is: the double newline stays one token, as in llama.cpp.
    assert tokenizer.tokenize("\n\n1.") == ["ĊĊ", "1", "."]
    assert tokenizer.tokenize("2024") == list("2024")
    assert tokenizer.model_max_length == 8192
    assert "<|im_start|>user\nHi<|im_end|>" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    assert getattr(AutoConfig.from_pretrained(model), "quantization_config", None) is None
    assert (model / "model.safetensors").stat().st_size > 500_000_000  # float32

    questions = lines(asset_path("squad") / "squad.jsonl")
    assert len(questions) == 1000
    assert all(any(answer in q["paragraph"] for answer in q["answers"]) for q in questions)


@pytest.mark.assets
def test_the_packaged_benchmarks():
    folder = dict(zip(registry.BENCHMARKS, asset_paths(["benchmarks"]), strict=True))
    prompts = lines(folder["ifeval"] / "test.jsonl")
    assert sum(len(prompt["instruction_id_list"]) for prompt in prompts) == 834
    assert prompts[1]["kwargs"] == [{}]
    # The published numbers of right answers A, B, C and D: the choices are in their first order.
    questions = lines(folder["mmlu"] / "test.jsonl")
    answers = [question["answer"] for question in questions]
    assert [answers.count(index) for index in range(4)] == [3222, 3462, 3582, 3776]
    assert len({question["subject"] for question in questions}) == 57
    # Known documents, whose right answers are plain to a reader.
    arc = lines(folder["arc-easy"] / "test.jsonl")[0]
    assert arc["choices"]["text"][arc["choices"]["label"].index(arc["answerKey"])].startswith("Sunlight is the source")
    hellaswag = lines(folder["hellaswag"] / "validation.jsonl")[0]
    assert hellaswag["endings"][int(hellaswag["label"])] == "starts pulling up roofing on a roof."
    piqa = lines(folder["piqa"] / "validation.jsonl")[0]
    assert "paper strips" in piqa[("sol1", "sol2")[piqa["label"]]]
    assert lines(folder["lambada"] / "test.jsonl")[0]["text"].endswith("I don't care about signs")
    assert lines(folder["gsm8k"] / "test.jsonl")[0]["answer"].endswith("\n#### 18")
