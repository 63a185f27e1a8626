"""The assets: fetched once, verified, whole or not there at all. No network and no torch, but for the last test."""

import errno
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from selfaug.assets import __main__ as command
from selfaug.assets import asset_path, fetch, parse, pip_download, registry
from selfaug.errors import UserError
from tests.assets import fake_assets as fakes

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


def refused(call, *fragments):
    """The call raises a UserError of one sentence that holds the fragments."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    return message


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


def test_unknown_name_is_one_sentence_with_the_closest(cache, capsys):
    assert command.main(["sqad"]) == 1
    assert capsys.readouterr().err == "selfaug.assets: There is no asset 'sqad': did you mean 'squad'?\n"
    refused(lambda: asset_path("???"), "choose one of smollm2-135m-instruct, squad")


def test_the_default_set_exists():
    assert [asset.name for asset in registry.select([])] == list(registry.DEFAULT)
    assert len(registry.select(["all", "squad"])) == len(registry.ASSETS)


def test_importing_the_assets_does_not_import_torch():
    code = "import sys, selfaug.assets, selfaug.assets.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# Parsing


def requests(tmp_path, *docs):
    path = tmp_path / "requests.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"doc": doc}) + "\n" for doc in docs).encode()))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_squad_is_parsed_and_checked(tmp_path):
    doc = {
        "id": "1",
        "query": "Title: Big_Ben\nBackground: It is\na tall clock.\nQuestion: What is it?\nAnswer:",
        "answers_text": ["a tall clock", "clock", "clock"],
    }
    assert parse.squad(requests(tmp_path, doc), tmp_path) == 1
    assert lines(tmp_path / "squad.jsonl") == [
        {
            "id": "1",
            "title": "Big Ben",
            "question": "What is it?",
            "answers": ["a tall clock", "clock"],
            "paragraph": "It is\na tall clock.",
        }
    ]
    refused(lambda: parse.squad(requests(tmp_path, doc | {"answers_text": ["a dog"]}), tmp_path), "answer to 1")
    refused(lambda: parse.squad(requests(tmp_path, doc | {"query": "Who?"}), tmp_path), "known format")


def test_drop_joins_the_spans_of_an_answer(tmp_path):
    doc = {"query_id": "q", "question": "Who?", "passage": "Ann and Bob.", "answers": [["Ann", "Bob"], ["Ann", "Bob"]]}
    parse.drop(requests(tmp_path, doc), tmp_path)
    assert lines(tmp_path / "drop.jsonl")[0]["answers"] == ["Ann, Bob"]


def arrow(tmp_path, rows):
    path = tmp_path / "data.arrow"
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def test_boolq_answers_are_yes_and_no(tmp_path):
    rows = [{"question": "is it", "answer": flag, "passage": "It is."} for flag in (True, False)]
    assert parse.boolq(arrow(tmp_path, rows), tmp_path) == 2
    assert [row["answers"] for row in lines(tmp_path / "boolq.jsonl")] == [["yes"], ["no"]]


def test_triviaqa_has_the_canonical_answer_first(tmp_path):
    row = {"question_id": "t", "question": "Who?", "answer": {"value": "Jane Austen", "aliases": ["Austen"]}}
    parse.triviaqa(arrow(tmp_path, [row]), tmp_path)
    assert lines(tmp_path / "triviaqa.jsonl")[0]["answers"] == ["Jane Austen", "Austen"]


def test_wikipedia_articles_get_their_paragraphs_back(tmp_path):
    raw = tmp_path / "wiki.txt"
    raw.write_text('The U.S.Army is old.It is "big".See (it).End\nSecond article.\n\n', encoding="utf-8")
    assert parse.wikipedia_articles(raw, tmp_path) == 2
    first = lines(tmp_path / "articles.jsonl")[0]
    assert first["text"] == 'The U.S.Army is old.\n\nIt is "big".\n\nSee (it).\n\nEnd'


def test_json_files(tmp_path):
    raw = tmp_path / "in.json"
    raw.write_text(json.dumps([{"instruction": "Say", "input": "", "output": "é", "system": "x"}]), encoding="utf-8")
    assert parse.alpaca(raw, tmp_path) == 1
    assert lines(tmp_path / "alpaca.jsonl") == [{"id": "alpaca-0", "instruction": "Say", "input": "", "output": "é"}]
    raw.write_text(json.dumps({"A": {"title": "A", "extract": " Text. ", "topic": "Arts"}}), encoding="utf-8")
    assert parse.wikipedia_leads(raw, tmp_path) == 1
    assert lines(tmp_path / "leads.jsonl") == [{"id": "lead-00000", "title": "A", "text": "Text."}]


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
