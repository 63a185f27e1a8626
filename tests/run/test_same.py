"""Same numbers where they must be the same (invariants 1, 4, 9, 11)."""

import subprocess
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from selfaug.run import fit
from tests.run.conftest import UNSCORED, Runs
from tests.run.warm import Warm

STEPS = ("trainer.max_steps=5", "trainer.max_epochs=2")


def adapter_file(directory: Path) -> Path:
    return directory / "adapter" / "adapter_model.safetensors"


def tensors(directory: Path) -> dict[str, Tensor]:
    return load_file(adapter_file(directory))


def relative_error(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest of all tensors, in the Euclidean norm."""
    assert one.keys() == other.keys()
    return max(((one[name] - other[name]).norm() / one[name].norm()).item() for name in one)


class Trained:
    """A finished run and the model as it was when training ended."""

    def __init__(self, runs: Runs, monkeypatch: pytest.MonkeyPatch):
        save = fit.save_tuned

        def save_and_keep(module, *arguments):
            self.model: nn.Module = module.model
            save(module, *arguments)

        monkeypatch.setattr(fit, "save_tuned", save_and_keep)
        self.directory = runs.done(*STEPS)


@pytest.fixture(scope="module")
def trained(workspace: Runs, tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return Trained(workspace.into(tmp_path_factory.mktemp("trained")), monkeypatch)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(4, 200, (3, 40), generator=torch.Generator().manual_seed(1))
    return model.eval()(input_ids=ids).logits


def test_same_command_gives_the_same_bytes(trained: Trained, runs: Runs):
    # In a process of its own, from another place, with other loggers and bars: none of that may count.
    command = runs.command(*STEPS, "tags=[again]", "callbacks.checkpoint_every_n_steps=1")
    process = Warm(command, cwd=runs.path, env=runs.environment(), stdout=subprocess.PIPE)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert runs.only().name == trained.directory.name
    assert adapter_file(runs.only()).read_bytes() == adapter_file(trained.directory).read_bytes()


def test_another_seed_gives_another_adapter(trained: Trained, runs: Runs):
    other = runs.done(*STEPS, *UNSCORED, "seed=2")
    assert other.name != trained.directory.name
    assert relative_error(tensors(trained.directory), tensors(other)) > 0.01


def test_alpha_0_is_plain_lora(trained: Trained, runs: Runs):
    setting = (*STEPS, *UNSCORED, "adapter.lora_dropout=0.1")  # the reference pass must not draw from it
    zero = runs.into(runs.runs / "zero").done(*setting, "alignment.alpha=0")
    lora = runs.into(runs.runs / "lora").done(*setting, "method=lora")
    assert adapter_file(zero).read_bytes() == adapter_file(lora).read_bytes()
    assert relative_error(tensors(trained.directory), tensors(zero)) > 1e-3  # alpha 0.5 is something else


def test_adapter_loads_in_plain_peft(trained: Trained, workspace: Runs):
    wanted = logits(trained.model)
    base = AutoModelForCausalLM.from_pretrained(workspace.path / "model")
    untuned = logits(base)
    loaded = PeftModel.from_pretrained(base, str(trained.directory / "adapter"))
    assert torch.equal(logits(loaded), wanted)
    assert (wanted - untuned).abs().max() > 0.01
    merged = loaded.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-5, atol=1e-4)


def test_one_times_eight_is_eight_times_one(runs: Runs):
    setting = ("trainer.max_steps=4", *UNSCORED, "data.batch_size=8")
    one, eight = (
        tensors(runs.into(runs.runs / size).done(*setting, f"data.micro_batch_size={size}")) for size in ("1", "8")
    )
    assert relative_error(one, eight) < 1e-4
