"""The reference cache: the base model's states, exactly, whoever filled it; nothing damaged or foreign is ever used."""

import logging
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file

from selfaug.errors import UserError
from selfaug.model import cache as cache_module
from selfaug.model import entries as entries_module
from selfaug.model.cache import CachedReference
from selfaug.model.decoder import Decoder
from selfaug.model.entries import DiskEntries, MemoryEntries
from selfaug.model.reference import AdaptersOff
from selfaug.objective import LogitAlignment, Objective, TokenBatch
from selfaug.objective.batch import Role, Span
from tests.run import warm  # noqa: F401  (its processes have what takes long to import)
from tests.tiny import FAMILIES, HIDDEN, random_batch, tiny_model

LENGTHS, RESPONSES = (9, 14, 6), (3, 5, 2)
each_family = pytest.mark.parametrize("family", FAMILIES)
each_precision = pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])


def padded(lengths=LENGTHS, responses=RESPONSES, **settings) -> TokenBatch:
    batch = TokenBatch.from_labels(*random_batch(lengths, responses, **settings))
    return replace(batch, right_padded=settings.get("side", "right") == "right")


def alone(batch: TokenBatch, i: int) -> TokenBatch:
    """Example i, without padding."""
    span, _ = batch.examples[i]
    names = ("input_ids", "attention_mask", "labels", "roles")
    parts = {name: getattr(batch, name)[span.row : span.row + 1, span.start : span.stop] for name in names}
    return replace(batch, **parts, spans=(), keys=(), packed=False, right_padded=True)


def packed(batch: TokenBatch) -> TokenBatch:
    parts = [alone(batch, i) for i in range(len(batch.examples))]
    names = ("input_ids", "attention_mask", "labels", "roles")
    ends = torch.tensor([part.input_ids.shape[1] for part in parts]).cumsum(0).tolist()
    return TokenBatch(
        **{name: torch.cat([getattr(part, name) for part in parts], 1) for name in names},
        spans=tuple(Span(0, start, stop) for start, stop in zip([0, *ends], ends, strict=False)),
        packed=True,
    )


def on_disk(directory: Path, **settings) -> CachedReference:
    """A new one, as another process would make it."""
    return CachedReference(DiskEntries(directory), **settings)


def states(cache, model, batch, score=None):
    return cache.states(Decoder(model), batch, masked=False, score=score)


@contextmanager
def passes() -> Iterator[list[int]]:
    """Counts the base model's forward passes that the cache asks for: their tokens."""
    lengths: list[int] = []
    real = AdaptersOff.states

    def counted(self, decoder, tokens, **settings):
        lengths.append(tokens.input_ids.shape[1])
        return real(self, decoder, tokens, **settings)

    with mock.patch.object(cache_module.AdaptersOff, "states", counted):
        yield lengths


def files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file())


# --- the same as without ------------------------------------------------------------------------------------------


@each_family
@each_precision
def test_one_example_has_the_same_bits_as_uncached(family, autocast, tmp_path: Path):
    model = tiny_model(family, lora={"lora_dropout": 0.1}, attention_dropout=0.1)
    batch = padded()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        each = [alone(batch, i) for i in range(3)]
        uncached = [AdaptersOff().states(Decoder(model), one, masked=False).hidden for one in each]
        for cache in (on_disk(tmp_path), on_disk(tmp_path), CachedReference(MemoryEntries())):
            for one, expected in zip(each, uncached, strict=True):
                for _ in range(2):
                    found = states(cache, model, one).hidden
                    assert found.dtype == expected.dtype
                    assert torch.equal(found, expected)
                    assert not found.requires_grad


@each_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_differ_by_rounding_only(family, side):
    model, batch = tiny_model(family, lora=True), padded(side=side)
    expected = AdaptersOff().states(Decoder(model), batch, masked=False).hidden
    found = states(CachedReference(MemoryEntries()), model, batch).hidden
    real = batch.attention_mask.bool()
    assert found.shape == expected.shape
    assert not found[~real].any()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)


def test_an_entry_does_not_depend_on_the_batch_it_was_asked_for_in(tmp_path: Path):
    model, batch = tiny_model(lora=True), padded()
    wanted = [states(on_disk(tmp_path / "one"), model, alone(batch, i)).hidden[0] for i in range(3)]
    for number, other in enumerate((batch, padded(side="left"), packed(batch))):
        found = states(on_disk(tmp_path / str(number)), model, other).hidden
        for (span, _), one in zip(other.examples, wanted, strict=True):
            assert torch.equal(found[span.row, span.start : span.stop], one)


def test_a_batch_without_examples():
    batch = padded()
    empty = replace(batch, attention_mask=torch.zeros_like(batch.attention_mask), roles=torch.zeros_like(batch.roles))
    found = states(CachedReference(MemoryEntries()), tiny_model(lora=True), empty, "entropy")
    assert found.hidden.shape == (3, 14, HIDDEN)
    assert not found.hidden.any()
    assert not found.scores.any()


def test_computed_once(tmp_path: Path):
    model, batch = tiny_model(lora=True), padded()
    with passes() as lengths:
        cache = on_disk(tmp_path)
        for tokens in (batch, packed(batch), alone(batch, 1)):
            states(cache, model, tokens)
        states(on_disk(tmp_path), model, batch)
        assert sorted(lengths) == sorted(LENGTHS)
        states(on_disk(tmp_path), tiny_model(lora={"r": 2}), batch)  # another adapter, the same base model
        states(on_disk(tmp_path), tiny_model().requires_grad_(False), batch)
        assert len(lengths) == 3


TERMS = {
    "input": LogitAlignment(0.5),
    "output": LogitAlignment(0.25, "output_logits", "kl_tuned_base"),
    "all": LogitAlignment(0.125, "all_logits"),
}


def run(objective: Objective, model, batch: TokenBatch, draw=None):
    """Loss, parts and gradients of a whole step."""
    model.zero_grad()
    losses = objective(Decoder(model), batch, objective.count(batch), draw)
    losses.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    return losses.loss.item(), {name: part.item() for name, part in losses.parts.items()}, gradients


def assert_same_step(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1] == pytest.approx(expected[1], rel=1e-4)
    assert len(found[2]) == len(expected[2]) > 0
    scale = max(gradient.norm() for gradient in expected[2])
    for one, other in zip(found[2], expected[2], strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6 * scale


@pytest.mark.parametrize("rows", ["all", "random", "entropy", "attention"])
def test_loss_and_gradients_are_those_of_the_uncached_objective(rows, tmp_path: Path):
    share = 1.0 if rows == "all" else 0.5
    terms = {name: replace(term, rows=rows, share=share) for name, term in TERMS.items()}
    model, batch = tiny_model(lora=True), padded()
    expected = run(Objective(terms), model, batch, draw=(1, 2))
    assert min(expected[1].values()) > 0.01
    for reference in (on_disk(tmp_path), on_disk(tmp_path), CachedReference(MemoryEntries())):
        objective = Objective(terms, reference)
        objective.check(model)
        assert_same_step(run(objective, model, batch, draw=(1, 2)), expected)


def test_official_rows_are_refused():
    objective = Objective({"kl": LogitAlignment(official=True)}, CachedReference(MemoryEntries()))
    with pytest.raises(UserError, match=r"^alignment\.official=true .*set reference\.cache=off"):
        run(objective, tiny_model(lora=True), padded())


# --- scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["entropy", "attention"])
def test_scores_are_those_of_the_example_alone(score, tmp_path: Path):
    model, batch = tiny_model(lora=True), padded()
    with passes() as lengths:
        states(on_disk(tmp_path), model, batch)  # another run, which needed no scores
        for cache in (on_disk(tmp_path), on_disk(tmp_path), CachedReference(MemoryEntries())):
            found = states(cache, model, batch, score)
            assert found.scores.shape == (3, 14)
            assert (found.scores.sum(1) > 0).all()
            assert not found.scores[batch.attention_mask == 0].any()
    # Entropies come from the states that are there; attention has to be looked at again.
    assert len(lengths) == (3 + 3 if score == "entropy" else 3 + 3 + 3)
    for i, (span, _) in enumerate(batch.examples):
        expected = AdaptersOff().states(Decoder(model), alone(batch, i), masked=False, score=score)
        assert torch.equal(found.scores[span.row, span.start : span.stop], expected.scores[0])
        assert torch.equal(found.hidden[span.row, span.start : span.stop], expected.hidden[0])


def test_scores_are_float32_whatever_the_default_is():
    """Lightning's bf16-true sets another one."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = states(CachedReference(MemoryEntries()), tiny_model(lora=True).to(torch.bfloat16), padded(), "entropy")
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.scores.dtype == torch.float32
    assert found.hidden.dtype == torch.bfloat16


def test_attention_depends_on_the_roles_and_the_states_do_not(tmp_path: Path):
    model, batch = tiny_model(lora=True), alone(padded(), 1)
    other = replace(batch, roles=batch.roles.masked_fill(torch.arange(14) < 4, Role.QUESTION))
    one, two = (states(on_disk(tmp_path), model, b, "attention") for b in (batch, other))
    assert not torch.equal(one.scores, two.scores)
    assert torch.equal(one.hidden, two.hidden)
    with passes() as lengths:
        for tokens, expected in ((batch, one), (other, two)):
            assert torch.equal(states(on_disk(tmp_path), model, tokens, "attention").scores, expected.scores)
        silent = replace(batch, roles=torch.zeros_like(batch.roles))  # keeps processes in step, and is never filled
        assert not states(on_disk(tmp_path), model, silent, "attention").scores.any()
    assert lengths == []


# --- filling ------------------------------------------------------------------------------------------------------

MANY = tuple(range(5, 35))


def many() -> list[TokenBatch]:
    """30 examples in 10 batches."""
    return [padded(MANY[i : i + 3], (2, 2, 2), seed=i) for i in range(0, 30, 3)]


@pytest.mark.parametrize("score", [None, "entropy", "attention"])
def test_fill_computes_what_is_missing_and_training_finds_it(score, tmp_path: Path, caplog):
    model, batches = tiny_model(lora=True), many()
    states(on_disk(tmp_path), model, batches[3])
    caplog.set_level(logging.INFO)
    with passes() as lengths:
        for _ in range(2):
            cache = on_disk(tmp_path)
            cache.fill(Decoder(model), [*batches, batches[0]], score=score, progress=False)
            for batch in batches:
                states(cache, model, batch, score)
        if score != "attention":
            assert sorted(lengths) == sorted(set(MANY) - set(MANY[9:12]))
        else:
            assert sorted(lengths) == list(MANY)
    row = HIDDEN * 4 + (4 if score else 0)
    size = f"{sum(MANY) * row / 1e9:.2f} GB for 30 examples"
    missing = 27 if score is None else 30
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("reference cache in")]
    assert lines == [f"reference cache in {tmp_path}: {size}, {n} of them to be computed" for n in (missing, 0)]


def test_fill_leaves_the_model_as_it_was():
    model = tiny_model(lora=True)
    modes = [module.training for module in model.modules()]
    draws = torch.get_rng_state()
    CachedReference(MemoryEntries()).fill(Decoder(model), many(), progress=False)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(p.grad is None for p in model.parameters())


def test_processes_fill_a_disk_together_and_memory_each_for_itself(tmp_path: Path):
    model, counts = tiny_model(lora=True), {}
    for kind in ("disk", "memory"):
        counts[kind] = []
        for rank in range(3):
            cache = on_disk(tmp_path) if kind == "disk" else CachedReference(MemoryEntries())
            with passes() as lengths:
                cache.fill(Decoder(model), many(), processes=cache_module.Processes(rank, 3), progress=False)
            counts[kind].append(len(lengths))
    assert counts == {"disk": [10, 10, 10], "memory": [30, 30, 30]}
    with passes() as lengths:
        for batch in many():
            states(on_disk(tmp_path), model, batch)
    assert lengths == []


def test_processes_of_a_sharded_model_make_equally_many_passes(tmp_path: Path):
    model = tiny_model(lora=True)
    with mock.patch.object(cache_module, "_sharded", return_value=True), passes() as lengths:
        four = cache_module.Processes(0, 2, most=lambda number: number + 4)
        on_disk(tmp_path).fill(Decoder(model), many(), processes=four, progress=False)
        assert len(lengths) == 15 + 4
        with pytest.raises(UserError, match="of a sharded model one process cannot compute it alone"):
            states(on_disk(tmp_path), model, padded((40,), (2,)))
    assert len(files(tmp_path)) == 15


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_more_than_the_limit_is_refused_before_anything_is_computed(kind, tmp_path: Path):
    limit = (sum(MANY) * HIDDEN * 4 - 1) / 1e9
    entries = DiskEntries(tmp_path) if kind == "disk" else MemoryEntries()
    decoder = Decoder(tiny_model(lora=True))
    with passes() as lengths:
        with pytest.raises(UserError, match=r"more than reference\.limit_gb=.*raise that, set reference\.cache=off"):
            CachedReference(entries, limit).fill(decoder, many(), progress=False)
        assert lengths == []
        CachedReference(entries, limit + 2e-9).fill(decoder, many(), progress=False)
        assert len(lengths) == 30


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_more_than_there_is_room_for_is_refused_before_anything_is_computed(kind, tmp_path: Path):
    entries = DiskEntries(tmp_path) if kind == "disk" else MemoryEntries()
    cache, decoder = CachedReference(entries), Decoder(tiny_model(lora=True))
    three = [padded((10, 11, 12), (2, 2, 2))]
    cache.fill(decoder, three, progress=False)
    fix = r"reference\.directory to a larger disk" if kind == "disk" else r"reference\.cache=disk"
    with passes() as lengths, mock.patch.object(type(entries), "free", return_value=1000):
        with pytest.raises(UserError, match=rf"GB more in .*{fix}, reference\.cache=off"):
            cache.fill(decoder, many(), progress=False)
        assert lengths == []
        cache.fill(decoder, three, progress=False)  # what is there needs no more room


@pytest.mark.parametrize("limit", [0, -1, "much", None])
def test_an_impossible_limit(limit):
    with pytest.raises(UserError, match=r"^reference\.limit_gb=.* is not allowed"):
        CachedReference(MemoryEntries(), limit)


def test_free_room_is_that_of_the_place(tmp_path: Path):
    assert DiskEntries(tmp_path / "not" / "yet").free() == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert MemoryEntries().free() > 2**20


def test_a_directory_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("not a directory")
    for directory in (tmp_path / "file", tmp_path / "file" / "cache"):
        cache = on_disk(directory)
        with pytest.raises(UserError, match=r"cannot be written to .*: set reference\.directory") as error:
            states(cache, tiny_model(lora=True), padded())
        assert "\n" not in str(error.value)
    assert files(tmp_path) == [tmp_path / "file"]


# --- damaged and foreign entries ------------------------------------------------------------------------------------


@pytest.fixture
def entry(tmp_path: Path):
    """(directory, model, a batch of one example, its file, its states)"""
    model, batch = tiny_model(lora=True), padded((5,), (2,))
    expected = states(on_disk(tmp_path), model, batch).hidden
    (file,) = files(tmp_path)
    return tmp_path, model, batch, file, expected


def entry_of(file: Path) -> tuple[str, str, int]:
    """Model, name and rows of a good file."""
    content = file.read_bytes()
    return file.parts[-3], file.stem, (len(content) - 8 - int.from_bytes(content[:8], "little")) // (HIDDEN * 4)


def test_every_flipped_bit_is_found_or_harmless(entry):
    """The whole file: length of the header, header, values."""
    directory, _, _, file, expected = entry
    good, place = file.read_bytes(), entry_of(file)
    values_start = 8 + int.from_bytes(good[:8], "little")
    assert len(good) == values_start + 5 * HIDDEN * 4
    kept = []
    for number in range(len(good)):
        # Of the header two bits of each byte, which of them changes from byte to byte; a checksum guards the values.
        for bit in {number % 8, (5 * number + 2) % 8} if number < values_start else (number % 8,):
            bad = bytearray(good)
            bad[number] ^= 1 << bit
            file.write_bytes(bad)
            found = DiskEntries(directory).get(*place)
            if found is not None:
                kept.append(number)
                assert found.dtype == expected.dtype
                assert torch.equal(found, expected[0])
    assert not [number for number in kept if number >= values_start]
    assert len(kept) < 16  # e.g. a blank that becomes another blank


def test_every_shorter_or_longer_file_is_found(entry):
    directory, _, _, file, _ = entry
    good, place = file.read_bytes(), entry_of(file)
    for content in [good[:n] for n in range(len(good))] + [good + b"\0", good + good]:
        file.write_bytes(content)
        assert DiskEntries(directory).get(*place) is None
    file.write_bytes(good)
    assert DiskEntries(directory).get(*place) is not None


def test_a_damaged_entry_is_computed_again_and_replaced_with_one_line(entry, caplog):
    directory, model, batch, file, expected = entry
    good = file.read_bytes()
    for bad in (good[:-1] + bytes([good[-1] ^ 1]), good[:100], b""):
        caplog.clear()
        file.write_bytes(bad)
        cache = on_disk(directory)
        with passes() as lengths:
            for _ in range(2):
                assert torch.equal(states(cache, model, batch).hidden, expected)
        assert lengths == [5]
        (line,) = caplog.messages
        assert line.startswith(f"reference cache: {file} is damaged or foreign (")
        assert "\n" not in line
        assert file.read_bytes() == good


def test_fill_replaces_damaged_entries(entry, caplog):
    directory, model, batch, file, _ = entry
    good = file.read_bytes()
    file.write_bytes(good[:-4] + b"\1\2\3\4")
    on_disk(directory).fill(Decoder(model), [batch], progress=False)
    assert file.read_bytes() == good
    assert len(caplog.messages) == 1


def test_a_file_of_another_model_or_example_is_not_used(entry, tmp_path_factory):
    directory, model, batch, file, expected = entry
    elsewhere = tmp_path_factory.mktemp("other")
    states(on_disk(elsewhere), tiny_model(lora=True, seed=5), batch)  # another model, the same tokens
    states(on_disk(elsewhere), model, padded((5,), (2,), seed=5))  # the same model, other tokens
    foreign = files(elsewhere)
    assert len(foreign) == 2
    for other in foreign:
        assert other.stat().st_size == file.stat().st_size
        shutil.copy(other, file)
        with passes() as lengths:
            assert torch.equal(states(on_disk(directory), model, batch).hidden, expected)
        assert lengths == [5]


@pytest.mark.parametrize("change", [lambda v: v.view(torch.int32), lambda v: v.view(5, 2, HIDDEN // 2)])
def test_the_same_bytes_as_another_type_or_shape_are_not_used(entry, change):
    directory, _, _, file, _ = entry
    place = entry_of(file)
    with safe_open(file, "pt") as opened:
        values, metadata = opened.get_tensor("values").clone(), opened.metadata()
    save_file({"values": values}, file, metadata)
    assert DiskEntries(directory).get(*place) is not None
    save_file({"values": change(values)}, file, metadata)
    assert DiskEntries(directory).get(*place) is None


def test_an_entry_of_another_format_is_not_used(entry):
    directory, model, batch, _, _ = entry
    with mock.patch.object(entries_module, "FORMAT", "0"), passes() as lengths:
        states(on_disk(directory), model, batch)
    assert lengths == [5]


def test_a_base_model_that_differs_in_one_element_has_entries_of_its_own(entry):
    directory, _, batch, _, expected = entry
    other = tiny_model(lora=True)
    with torch.no_grad():
        other.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight[3, 4] += 1e-2
    with passes() as lengths:
        found = states(on_disk(directory), other, batch).hidden
    assert lengths == [5]
    assert not torch.equal(found, expected)
    assert torch.equal(found, AdaptersOff().states(Decoder(other), batch, masked=False).hidden)
    assert len({file.parts[-3] for file in files(directory)}) == 2


def test_precision_and_device_have_entries_of_their_own(tmp_path: Path):
    model, batch = tiny_model(lora=True), padded()
    cache = on_disk(tmp_path)
    plain = states(cache, model, batch).hidden
    with torch.autocast("cpu", torch.bfloat16):
        low = states(cache, model, batch).hidden
        assert torch.equal(low[0, :9], AdaptersOff().states(Decoder(model), alone(batch, 0), masked=False).hidden[0])
    assert not torch.equal(low, plain)
    assert torch.equal(states(cache, model, batch).hidden, plain)
    assert len(files(tmp_path)) == 6


def test_one_cache_keeps_two_models_apart():
    cache, batch = CachedReference(MemoryEntries()), padded((5,), (2,))
    one, two = tiny_model(lora=True), tiny_model(lora=True, seed=1)
    for _ in range(2):
        for model in (one, two):
            found = states(cache, model, batch).hidden
            assert torch.equal(found, AdaptersOff().states(Decoder(model), batch, masked=False).hidden)


# --- killed, and several processes --------------------------------------------------------------------------------


def fill(directory: Path, kill_at: int, rewrites: int, told: Connection) -> None:
    """In a process of its own: fill `directory` once it is told to, and be killed in the middle of write number
    `kill_at`; or write one entry again so many times."""
    torch.set_num_threads(1)
    write, written = Path.write_bytes, []

    def killed(path, content):
        written.append(path)
        if len(written) == kill_at:
            write(path, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, content)

    model = tiny_model(lora=True)
    told.send("ready")
    told.recv()
    with mock.patch.object(Path, "write_bytes", killed):
        with passes() as lengths:
            on_disk(directory).fill(Decoder(model), many(), progress=False)
        told.send(len(lengths))
        file = min(directory.rglob("*.safetensors"))
        for _ in range(rewrites):
            entries = DiskEntries(directory)
            entries.put(*entry_of(file)[:2], entries.get(*entry_of(file)))


def filling(directory: Path, kill_at: int = 0, rewrites: int = 0) -> tuple[BaseProcess, Connection]:
    """A process that calls `fill`, and a way to tell it to and to hear from it."""
    processes = multiprocessing.get_context("forkserver")
    told, its = processes.Pipe()
    process = processes.Process(target=fill, args=(directory, kill_at, rewrites, its))
    process.start()
    its.close()
    assert told.recv() == "ready"
    return process, told


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a fill that nobody disturbs."""
    directory = tmp_path_factory.mktemp("filled")
    on_disk(directory).fill(Decoder(tiny_model(lora=True)), many(), progress=False)
    assert len(files(directory)) == 30
    return contents(directory)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in files(directory)}


def test_killed_while_writing_goes_on_where_it_was(tmp_path: Path, filled):
    process, told = filling(tmp_path, kill_at=12)
    told.send("go")
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    (half,) = (file for file in files(tmp_path) if file.suffix == ".tmp")
    assert half.stat().st_size > 0
    left = contents(tmp_path)
    assert len(left) == 12
    assert sum(filled.get(name) == content for name, content in left.items()) == 11
    model = tiny_model(lora=True)
    for age, gone in ((0, False), (7200, True)):
        os.utime(half, (time.time() - age,) * 2)
        with passes() as lengths:
            on_disk(tmp_path).fill(Decoder(model), many(), progress=False)
        assert len(lengths) == (0 if gone else 30 - 11)
        assert half.exists() != gone
    assert contents(tmp_path) == filled


def test_two_processes_that_fill_at_once(tmp_path: Path, filled):
    """And then write the same entry again and again, which a third one reads."""
    both = [filling(tmp_path, rewrites=60) for _ in range(2)]
    for _, told in both:
        told.send("go")
    computed = [told.recv() for _, told in both]
    assert 30 <= sum(computed) <= 60
    assert min(computed) > 0
    written, reads = min(tmp_path.rglob("*.safetensors")), 0
    while any(process.is_alive() for process, _ in both):
        assert DiskEntries(tmp_path).get(*entry_of(written)) is not None
        reads += 1
    assert reads > 3
    assert [process.exitcode for process, _ in both] == [0, 0]
    assert contents(tmp_path) == filled


# --- full fine-tuning -----------------------------------------------------------------------------------------------


def trainable_body(family: str = "llama"):
    model = tiny_model(family).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lm_head" not in name and "embed" not in name)
    return model


class SecondModel:
    """The reference from a copy of the base model."""

    def __init__(self, base):
        self.base = base

    def check(self, model):
        pass

    def states(self, decoder, tokens, *, masked, score=None):
        return AdaptersOff().states(Decoder(self.base), tokens, masked=masked, score=score)


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_full_fine_tuning_without_a_second_model(kind, tmp_path: Path):
    batches = [padded(seed=seed) for seed in range(3)]
    histories = []
    for cached in (True, False):
        model = trainable_body()
        entries = DiskEntries(tmp_path) if kind == "disk" else MemoryEntries()
        reference = CachedReference(entries) if cached else SecondModel(tiny_model())
        objective = Objective(TERMS, reference)
        objective.check(model)
        if cached:
            reference.fill(Decoder(model), batches, progress=False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        history = []
        for batch in batches:
            history.append(run(objective, model, batch))
            optimizer.step()
        histories.append(history)
    cached, expected = histories
    assert expected[0][1]["input"] == pytest.approx(0, abs=1e-5)
    assert expected[2][1]["input"] > 0.01  # the model has moved away from what it was
    for found, wanted in zip(cached, expected, strict=True):
        assert found[0] == pytest.approx(wanted[0], rel=1e-5)
        assert found[1] == pytest.approx(wanted[1], rel=1e-4, abs=1e-5)
        for one, other in zip(found[2], wanted[2], strict=True):
            assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6


def test_while_the_base_trains_nothing_missing_is_computed(tmp_path: Path):
    model, batch = trainable_body(), padded()
    objective = Objective(TERMS, on_disk(tmp_path))
    objective.check(model)
    with passes() as lengths:
        for _ in range(2):  # before the first step and after it: the cache cannot know which it is
            with pytest.raises(UserError, match=r"^The reference cache has no entry .*fill it before the first step"):
                run(objective, model, batch)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.mul_(1.1)
        with pytest.raises(UserError, match=r"^The base weights have been trained since"):
            objective.reference.fill(Decoder(model), [batch], progress=False)
    assert lengths == []
    assert files(tmp_path) == []


def test_a_resumed_full_fine_tuning_finds_its_entries(tmp_path: Path):
    batch = padded()
    on_disk(tmp_path).fill(Decoder(trainable_body()), [batch], progress=False)
    model = trainable_body()
    cache = on_disk(tmp_path)
    cache.check(model)
    model.load_state_dict(tiny_model(seed=3).state_dict())  # as from a checkpoint
    with passes() as lengths:
        cache.fill(Decoder(model), [batch], progress=False)
        found = states(cache, model, alone(batch, 2)).hidden
    assert lengths == []
    assert torch.equal(found, AdaptersOff().states(Decoder(tiny_model()), alone(batch, 2), masked=False).hidden)


def _head_trains(family: str):
    model = trainable_body(family)
    model.get_output_embeddings().requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: _head_trains("llama"), "^The output head trains, .*freeze it"),
        (lambda: tiny_model("qwen2").requires_grad_(True), "^The output head trains, .*embeddings where they are tied"),
        (lambda: tiny_model(lora={"init_lora_weights": "pissa"}), r"^adapter\.init_lora_weights=pissa rewrites"),
        (
            lambda: get_peft_model(tiny_model(), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
            "^PREFIX_TUNING changes the prompt",
        ),
    ],
    ids=["head", "tied embeddings", "pissa", "prefix"],
)
def test_what_no_cache_can_help(build, message):
    with pytest.raises(UserError, match=message):
        CachedReference(MemoryEntries()).check(build())


def test_trainable_norms_and_embeddings_beside_adapters():
    """Weights outside the adapters may train too, as long as the head does not."""
    model = tiny_model(lora=True)
    for name, parameter in model.named_parameters():
        if "norm" in name or "embed" in name:
            parameter.requires_grad_(True)
    cache, batch = CachedReference(MemoryEntries()), padded()
    cache.check(model)
    with pytest.raises(UserError, match="no entry"):
        states(cache, model, batch)
    cache.fill(Decoder(model), [batch], progress=False)
    expected = AdaptersOff().states(Decoder(tiny_model()), alone(batch, 0), masked=False).hidden
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert torch.equal(states(cache, model, alone(batch, 0)).hidden, expected)
