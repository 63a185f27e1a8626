"""The memory plan: what the probe measures holds at the real length, and the advice names settings that help."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from torch import nn

from selfaug.callbacks.throughput import Throughput
from selfaug.data.batching import StepSampler
from selfaug.errors import UserError
from selfaug.model.decoder import Decoder
from selfaug.model.load import recompute_activations
from selfaug.objective import EWC, LogitAlignment, Objective, Orthogonal
from selfaug.run import machine, memory, probe
from selfaug.run.identity import register_resolvers
from selfaug.run.machine import peak_bytes, reset_peak, resident_bytes
from selfaug.run.memory import Costs, Largest, advise, count, largest
from selfaug.run.probe import Growth, Measured, fit, measure
from tests.run.conftest import Runs
from tests.run.test_resume import same
from tests.tiny import tiny_model


def context(mixed: bool) -> Any:
    return lambda: torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed)


def model_for(attention: str = "sdpa", recompute: bool = False) -> nn.Module:
    model = tiny_model("llama", lora=True, max_position_embeddings=2048)
    model.set_attn_implementation(attention)
    if recompute:
        recompute_activations(model)
    return model


def saved_bytes(model: nn.Module, length: int, mixed: bool) -> int:
    """What autograd keeps for the backward pass of `length` tokens, told by autograd itself."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other tensor gets its address
        return tensor

    ids = (torch.arange(length) % 97).unsqueeze(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context(mixed)():
        states = Decoder(model).hidden(ids, torch.ones_like(ids), right_padded=True)
    return sum(storage.nbytes() for storage in kept.values()) + states.nbytes


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_is_kept_is_foretold_from_short_probes(attention: str, mixed: bool):
    model = model_for(attention)
    measured = measure(model, context(mixed), reference=False)
    for length in (512, 1024):
        assert measured.held(length, length) == pytest.approx(saved_bytes(model, length, mixed), rel=0.1)
    assert (measured.held.per_pair > 0) == (attention == "eager")


@pytest.mark.parametrize(
    ("attention", "recompute"), [("sdpa", False), ("sdpa", True), ("eager", False), ("eager", True)]
)
def test_the_top_is_foretold_from_short_probes(monkeypatch, attention: str, recompute: bool):
    model = model_for(attention, recompute)
    foretold = measure(model, context(False), reference=True)
    monkeypatch.setattr(probe, "LONGEST", 1024)
    measured = measure(model, context(False), reference=True)  # at 1024 tokens themselves
    for growth, real in ((foretold.held, measured.held), (foretold.top, measured.top)):
        assert growth(1024, 1024) == pytest.approx(real(1024, 1024), rel=0.1)
    assert foretold.top(1024, 1024) > foretold.held(1024, 1024)


def test_several_sequences_take_what_their_tokens_take():
    """The fit is of single sequences and is used for batches."""
    model = model_for("eager")
    measured = measure(model, context(False), reference=False)
    ids = (torch.arange(4 * 256) % 97).view(4, 256)
    with probe._Tensors(model) as meter:
        states = Decoder(model).hidden(ids, torch.ones_like(ids), right_padded=True)
        assert measured.held(4 * 256, 256) == pytest.approx(meter.live(), rel=0.1)
    del states


def test_the_reference_pass_counts(monkeypatch):
    """It seldom decides, the backward pass takes more: so make it large."""
    model = model_for()

    @contextmanager
    def costly(_: nn.Module) -> Iterator[None]:
        torch.ones(10**7)  # 40 MB, for a moment
        yield

    monkeypatch.setattr(probe, "adapters_off", costly)
    without, with_it = (measure(model, context(False), reference=wanted) for wanted in (False, True))
    assert with_it.held == without.held
    assert without.top(128, 128) < 4 * 10**7 < with_it.top(128, 128)


def test_the_meter_counts_storages_once_while_they_live():
    model = nn.Linear(4, 4)
    with probe._Tensors(model) as meter:
        a = torch.zeros(1000)
        view = a[:10].view(2, 5)
        again = model.weight.t()  # the model's own
        assert meter.live() == 4000
        b = a + 1
        assert meter.live() == 8000
        del a
        assert meter.live() == 8000  # the view holds it
        del view, b
        assert meter.live() == 0
        assert meter.peak() == 8000
    assert again.shape == (4, 4)


def test_measuring_leaves_no_trace():
    model = tiny_model("llama", lora={"lora_dropout": 0.5})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    measure(model, context(True), reference=True)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad == trains[name]


def test_a_fit_is_exact_and_straight_where_it_may_be():
    lengths = [32, 64, 128]
    assert fit(lengths, [7 + 3 * t for t in lengths]) == pytest.approx((7, 3, 0))
    assert fit(lengths, [7 + 300 * t + 2 * t * t for t in lengths]) == pytest.approx((7, 300, 2))
    slightly_bent = fit(lengths, [100_000 * t + t * t for t in lengths])
    assert slightly_bent.per_pair == 0
    assert Growth(7, 3, 2)(tokens=8, longest=4) == 7 + 24 + 64


# ---- the plan --------------------------------------------------------------------------------------------------------

MB = 10**6
# Per token: 10 kB are kept, 11 kB at the top; 10 layers with 100 bytes of state.
COSTS = Costs(
    weights=100 * MB, adapters=10 * MB, gradients=10 * MB, optimiser=20 * MB, head=0, logits=1000, chunk=MB,
    measured=Measured(Growth(0, 10_000, 0), Growth(0, 11_000, 0), 100), heap=1.0, layers=10, rank=16,
)  # fmt: skip
AT = Largest(4096, 1000)


def test_the_peak_is_the_largest_moment_and_not_the_sum():
    assert COSTS.resident == 140 * MB
    assert COSTS.loss(AT) == MB + 5 * 100 * 4096
    assert COSTS.peak(AT) == 140 * MB + 11_000 * 4096  # the backward pass
    loss = replace(COSTS, logits=20_000, chunk=50 * MB)
    assert loss.peak(AT) == 140 * MB + 10_000 * 4096 + 50 * MB + 500 * 4096
    assert replace(COSTS, adapters=500 * MB).peak(AT) == 130 * MB + 500 * MB + 500 * MB  # the optimiser's step
    assert replace(COSTS, heap=1.5).peak(AT) == 140 * MB + 1.5 * 11_000 * 4096


def test_counted_parts():
    model = model_for()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4
    everything = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    costs = count(model, context(False), reference=True)
    assert (costs.adapters, costs.gradients, costs.optimiser) == (trained, trained, 2 * trained)
    assert costs.weights == everything - trained
    assert (costs.head, costs.logits) == (0, 2 * 4 * 97)
    assert (costs.rank, costs.layers, costs.recomputes) == (4, 2, False)
    assert count(model, context(False), reference=True, processes=2).gradients == 2 * trained
    mixed = count(model_for(recompute=True), context(True), reference=True)
    assert (mixed.head, mixed.logits) == (97 * 32 * 2, 2 * 2 * 97)
    assert mixed.recomputes


def test_what_terms_on_the_weights_hold_is_counted():
    model = model_for()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    goal = Objective({"ewc": EWC({}), "orthogonal": Orthogonal(), "kl": LogitAlignment()})
    assert memory.term_bytes(goal, model) == 2 * 4 * trained  # Fisher information and start
    assert replace(COSTS, terms=5 * MB).peak(AT) == COSTS.peak(AT) + 5 * MB
    assert memory.as_parts(replace(COSTS, terms=5 * MB), AT, None)["terms_bytes"] == 5 * MB


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_advised_checkpointing_takes_what_it_will_take(attention: str):
    """Worked out from a model without it, against one measured with it."""
    change = memory._checkpointing(count(model_for(attention), context(False), reference=True), AT, 0)
    assert change is not None
    real = count(model_for(attention, recompute=True), context(False), reference=True)
    if attention == "sdpa":  # eager also keeps a mask, which is small beside a layer's attention
        assert change.costs.measured.held(4096, 1000) == pytest.approx(real.measured.held(4096, 1000), rel=0.25)
    assert change.costs.measured.top(4096, 1000) == pytest.approx(real.measured.top(4096, 1000), rel=0.25)
    assert memory._checkpointing(real, AT, 0) is None


def test_the_largest_micro_batch():
    sampler = StepSampler(np.array([5, 100, 90, 5, 60, 60, 60, 60]), step_size=4, micro_batch_size=2, shuffle=False)
    assert largest(sampler, 2, COSTS) == (200, 100)  # 90 and 100, padded
    sampler.packing = True
    assert largest(sampler, 2, COSTS) == (190, 100)
    sampler.micro_batch_tokens = 100
    assert largest(sampler, 2, COSTS) == (100, 100)
    sampler.micro_batch_tokens, sampler.micro_batch_size = None, 4
    assert largest(sampler, 2, COSTS) == (240, 60)
    assert largest(sampler, 1, COSTS) == (200, 100)  # training ends before the second step
    bent = replace(COSTS, adapters=0, measured=Measured(Growth(0, 1, 100), Growth(0, 1, 100), 100))
    assert largest(sampler, 2, bent) == (200, 100)
    sampler.first_step = 1  # a run that resumes has the same plan
    assert largest(sampler, 1, COSTS) == (200, 100)
    assert sampler.first_step == 1


# ---- advice ----------------------------------------------------------------------------------------------------------


def settings(costs: Costs, limit: int, at: Largest = AT) -> list[str]:
    changes = advise(costs, at, limit)
    assert all(change.peak <= limit for change in changes)
    return [change.settings for change in changes]


def test_each_setting_that_would_do_is_named():
    peak = COSTS.peak(AT)
    assert settings(COSTS, peak - MB) == [
        "model.gradient_checkpointing=true",
        "data.micro_batch_tokens=3968",
        "adapter.r=8",
    ]
    assert settings(COSTS, peak - 15 * MB) == [
        "model.gradient_checkpointing=true",
        "data.micro_batch_tokens=2688",
        "adapter.r=8",
    ]
    assert "adapter.r=4" in settings(COSTS, peak - 25 * MB)
    assert "reference.cache=disk" in settings(replace(COSTS, cache=30 * MB), peak)
    assert "model.gradient_checkpointing=true" not in settings(replace(COSTS, recomputes=True), peak - MB)


def test_the_advised_tokens_are_as_many_as_fit():
    limit = COSTS.peak(AT) - 15 * MB
    assert COSTS.peak(Largest(2688, 1000)) <= limit < COSTS.peak(Largest(2688 + 64, 1000))


def test_where_no_example_fits_the_documents_are_cut():
    long = Largest(4096, 4096)
    stubborn = replace(COSTS, recomputes=True, rank=None)
    assert settings(stubborn, stubborn.peak(Largest(1024, 1024)), long) == [
        "data.micro_batch_tokens=1024 data.prompt.max_tokens=1024"
    ]


def test_settings_that_only_do_together():
    wide = replace(COSTS, adapters=MB, logits=100_000, chunk=100 * MB, cache=100 * MB, rank=None)
    (together,) = settings(wide, wide.resident - 100 * MB + 50 * MB)
    assert together.startswith("reference.cache=disk model.gradient_checkpointing=true data.micro_batch_tokens=")
    assert settings(COSTS, 50 * MB) == []
    assert "smaller" in memory.warning(COSTS, AT, 50 * MB)


# ---- the machine -----------------------------------------------------------------------------------------------------


def test_the_limit_of_a_container(tmp_path: Path):
    def group(path: str, **files: str) -> None:
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / path / name.replace("_in_", "~").replace("_", ".", 1).replace("~", "_in_")).write_text(text)

    groups = tmp_path / "groups"
    assert machine.container_room(groups, tmp_path) is None  # no /proc/self/cgroup, as on a Mac
    groups.write_text("0::/a/b\n")
    assert machine.container_room(groups, tmp_path) is None
    group("a/b", memory_max="max\n", memory_current="10\n")
    assert machine.container_room(groups, tmp_path) is None
    group("a", memory_max="1000\n", memory_current="700\n", memory_stat="anon 400\ninactive_file 200\n")
    assert machine.container_room(groups, tmp_path) == 500
    group(".", memory_max="450\n", memory_current="100\n")
    assert machine.container_room(groups, tmp_path) == 350
    groups.write_text("5:cpu:/x\n4:memory:/not/seen/from/here\n")  # version 1
    group("memory", memory_limit_in_bytes="900\n", memory_usage_in_bytes="800\n",
          memory_stat="inactive_file 1\ntotal_inactive_file 50\n")  # fmt: skip
    assert machine.container_room(groups, tmp_path) == 150


def test_the_room_is_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(machine, "container_room", lambda: None)
    cpu = torch.device("cpu")
    assert machine.room(cpu) == 1000
    assert machine.room(cpu, processes=4) == 250
    monkeypatch.setattr(machine, "container_room", lambda: 600)
    assert machine.room(cpu) == 600
    assert machine.room(torch.device("meta")) is None


def test_weights_that_cannot_be_there_are_refused(monkeypatch):
    device = torch.device("cuda:0")
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=device))
    module = SimpleNamespace(model=nn.Linear(1000, 1000))
    plan = memory.MemoryPlan(None)  # type: ignore[arg-type]
    monkeypatch.setattr(memory, "room", lambda _: 3 * MB)
    with pytest.raises(UserError, match=r"model\.dtype=bfloat16"):
        plan.setup(trainer, module, "fit")
    monkeypatch.setattr(memory, "room", lambda _: 5 * MB)
    plan.setup(trainer, module, "fit")


# ---- in a run --------------------------------------------------------------------------------------------------------


def known(setting: str) -> bool:
    """Whether the command line takes it."""
    GlobalHydra.instance().clear()
    register_resolvers()
    with initialize_config_module("selfaug.conf", version_base="1.3"):
        compose("train", overrides=[setting])
    return True


def test_a_run_says_its_plan_and_trains_as_without_one(runs: Runs, monkeypatch):
    result = runs.inline("trainer.max_steps=3", "reference.cache=memory")
    assert result.returncode == 0, result.stderr
    planned = runs.only()
    parts = json.loads((planned / "fit.json").read_text())["memory_plan"]
    output = (planned / "train.log").read_text() if (planned / "train.log").exists() else result.stdout + result.stderr
    assert "memory plan: about" in output
    assert "may need" not in output
    assert parts["cache_bytes"] > 0
    assert parts["longest_tokens"] <= parts["micro_batch_tokens"] <= 4096
    assert parts["weights_bytes"] + parts["process_bytes"] < parts["peak_bytes"] < parts["available_bytes"]
    monkeypatch.setattr(memory.MemoryPlan, "on_fit_start", lambda *_: None)
    without = runs.into(runs.path / "without")
    same(planned, without.done("trainer.max_steps=3", "reference.cache=memory"))


def test_a_run_that_may_not_fit_is_warned_and_trained(runs: Runs, monkeypatch):
    monkeypatch.setattr(memory, "room", lambda *_: MB // 2)
    result = runs.inline("trainer.max_steps=1", "data.micro_batch_size=null")
    assert result.returncode == 0, result.stderr
    output = "".join(path.read_text() for path in runs.only().glob("*.log")) + result.stdout + result.stderr
    warning = next(line for line in output.splitlines() if "may need" in line)
    named = re.findall(r"[a-z_.]+=\w+", warning)
    assert named
    assert all(known(setting) for setting in named)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="Linux only")
def test_the_peak_of_a_run_is_not_that_of_an_earlier_one():
    cpu = torch.device("cpu")
    torch.ones(100_000_000).sum()  # 400 MB, of an earlier job in this process
    before = peak_bytes(cpu)
    reset_peak()
    throughput = Throughput()
    assert before is not None
    assert throughput.peak is not None
    assert throughput.peak < before - 300e6
    torch.ones(50_000_000).sum()
    assert throughput.peak > resident_bytes(cpu) + 100e6
    resumed = Throughput()
    resumed.load_state_dict(throughput.state_dict() | {"peak": 10**15})  # of the part before
    assert resumed.peak == 10**15
