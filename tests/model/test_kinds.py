"""PEFT adapters of many kinds: trained, saved, loaded; aligned where switching them off is exactly the base model."""

from pathlib import Path

import peft
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate

import selfaug.conf
from selfaug.errors import UserError
from selfaug.model.decoder import Decoder
from selfaug.model.full import FullFineTuning
from selfaug.model.load import add_adapter, load_adapter, load_base
from selfaug.model.reference import adapters_off, check_adapters, check_reference, check_runs, keeps_base
from selfaug.objective import LogitAlignment, Objective, TokenBatch
from tests.tiny import lora_config, random_batch, save_tiny, tiny_model

LINEAR = "all-linear"
COMMON = {"target_modules": LINEAR, "task_type": "CAUSAL_LM"}
# name -> a configuration of peft for the tiny Llama (32 wide, 48 in the feed-forward blocks)
EXACT = {
    "dora": lambda: lora_config(use_dora=True),
    "rslora": lambda: lora_config(use_rslora=True),
    "mica": lambda: lora_config(init_lora_weights="mica"),
    "orthogonal": lambda: lora_config(init_lora_weights="orthogonal"),
    "loha": lambda: peft.LoHaConfig(r=4, **COMMON),
    "lokr": lambda: peft.LoKrConfig(r=4, **COMMON),
    "oft": lambda: peft.OFTConfig(oft_block_size=16, **COMMON),
    "hra": lambda: peft.HRAConfig(r=4, **COMMON),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=20, **COMMON),
    "c3a": lambda: peft.C3AConfig(block_size=16, **COMMON),
    "randlora": lambda: peft.RandLoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
    "miss": lambda: peft.MissConfig(r=4, **COMMON),
    "osf": lambda: peft.OSFConfig(effective_rank=0.5, **COMMON),
    "layer norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
}


def trained(model):
    """As if trained: everything that trains is somewhere else."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids, mask, _ = random_batch()
    return model.eval()(input_ids=ids, attention_mask=mask).logits


@pytest.mark.filterwarnings("ignore:Unsupported layer type .*RMSNorm:UserWarning")
@pytest.mark.parametrize("kind", EXACT)
def test_switched_off_it_is_the_base_model_and_saved_it_comes_back(kind, tmp_path):
    model = add_adapter(tiny_model(), EXACT[kind]())
    check_reference(model)
    assert keeps_base(model)
    trained(model)
    expected = logits(tiny_model())
    with adapters_off(model):
        assert torch.equal(logits(model), expected)
    tuned = logits(model)
    assert (tuned - expected).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    loaded = load_adapter(tiny_model(), tmp_path)
    torch.testing.assert_close(logits(loaded), tuned, rtol=1e-4, atol=1e-4)
    check_adapters(loaded)
    with adapters_off(loaded):
        assert torch.equal(logits(loaded), expected)


@pytest.mark.filterwarnings("ignore:Unsupported layer type .*RMSNorm:UserWarning")
@pytest.mark.parametrize("kind", EXACT)
def test_alignment_reaches_what_trains(kind):
    model = trained(add_adapter(tiny_model(), EXACT[kind]())).train()
    batch = TokenBatch.from_labels(*random_batch())
    objective = Objective({"kl": LogitAlignment(0.5)})
    objective.check(model)
    losses = objective(Decoder(model), batch, objective.count(batch))
    assert losses.parts["kl"] > 1e-4
    (0.5 * losses.parts["kl"]).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients
    assert sum(g is not None and bool(g.any()) for g in gradients) >= 0.5 * len(gradients)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_rewrites_the_base_trains_without_alignment_only(init):
    model = add_adapter(tiny_model(), lora_config(init_lora_weights=init))
    check_runs(model)
    assert not keeps_base(model)
    Objective().check(model)
    with pytest.raises(
        UserError, match=rf"^adapter\.init_lora_weights={init} .*reference=frozen_copy, or train without"
    ):
        Objective({"kl": LogitAlignment(0.5)}).check(model)


def test_trained_biases_of_the_base_are_not_switched_off_when_loaded(tmp_path):
    model = add_adapter(tiny_model("qwen2"), lora_config(bias="all"))
    assert not keeps_base(model)
    trained(model).save_pretrained(tmp_path)
    assert not keeps_base(load_adapter(tiny_model("qwen2"), tmp_path))


def test_without_adapters_there_is_nothing_to_switch_off():
    assert not keeps_base(tiny_model())


@pytest.mark.parametrize(
    ("init", "needed"),
    [
        ("eva", "a pass over data"), ("corda", "a pass over data"), ("lora_ga", "gradients of data"),
        ("pissa_niter_4", "random numbers"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*config.* is not specified:UserWarning")
def test_what_a_configuration_alone_cannot_describe_is_refused(init, needed):
    with pytest.raises(UserError, match=rf"^adapter\.init_lora_weights={init} needs .*{needed}.*: set it to true"):
        add_adapter(tiny_model(), lora_config(init_lora_weights=init))


@pytest.mark.parametrize("kind", ["osf", "dora", "oft"])
def test_under_mixed_precision_the_adapter_is_float32_and_comes_back_as_it_was(kind, tmp_path):
    folder = save_tiny(tmp_path / "model", vocab_size=97)
    model = add_adapter(load_base(str(folder), mixed=True), EXACT[kind]())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    trained(model)
    ids, _, _ = random_batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tuned = model.eval()(input_ids=ids).logits
        model.save_pretrained(tmp_path / "adapter")
        loaded = load_adapter(load_base(str(folder), mixed=True), tmp_path / "adapter").eval()
        assert torch.equal(loaded(input_ids=ids).logits, tuned)
    saved, back = (
        {n: p for n, p in one.named_parameters() if "osf_svd" in n or "lora" in n} for one in (model, loaded)
    )
    assert all(torch.equal(back[name], p) for name, p in saved.items())


# ---- the files of conf/adapter -------------------------------------------------------------------------------------


FILES = sorted(path.stem for path in (Path(selfaug.conf.__file__).parent / "adapter").glob("*.yaml"))


@pytest.mark.parametrize("name", FILES)
def test_every_option_trains_a_llama(name):
    GlobalHydra.instance().clear()
    with initialize_config_module("selfaug.conf", version_base="1.3"):
        config = instantiate(compose("train", overrides=[f"adapter={name}"]).adapter, _convert_="all")
    GlobalHydra.instance().clear()
    base = tiny_model(hidden_size=64, intermediate_size=96)
    model = config.apply(base) if isinstance(config, FullFineTuning) else add_adapter(base, config)
    check_runs(model)
    exact = keeps_base(model)
    assert exact == (name not in ("full", "pissa"))
    batch = TokenBatch.from_labels(*random_batch())
    objective = Objective({"kl": LogitAlignment(0.5)} if exact else {})
    objective.check(model)
    objective(Decoder(model.train()), batch, objective.count(batch)).loss.backward()
    assert any(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)
