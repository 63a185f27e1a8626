"""Decoder: hidden states and head give the model's own logits, for every family (invariant 3)."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model, inject_adapter_in_model
from transformers import GPT2Config, GPT2LMHeadModel

from selfaug.errors import UserError
from selfaug.model.decoder import Decoder, verify_decoder
from tests.tiny import FAMILIES, VOCAB, lora_config, random_batch, randomise_b, tiny_lora, tiny_model

each_family = pytest.mark.parametrize("family", FAMILIES)


def injected(family: str, **settings):
    """A transformers model with LoRA layers inside, and no PeftModel around it."""
    model = inject_adapter_in_model(lora_config(**settings), tiny_model(family))
    randomise_b(model)
    return model


MODELS = {
    "plain": tiny_model,
    "peft": lambda family: tiny_model(family, lora=True),
    # "all-linear" knows the head only of a PeftModel
    "injected": lambda family: injected(family, exclude_modules=["lm_head", "embed_out"]),
}


@each_family
@pytest.mark.parametrize("kind", MODELS)
def test_logits_equal_the_models_own(family, kind):
    model = MODELS[kind](family).eval()
    ids, mask, _ = random_batch((12, 12), (3, 3))
    decoder = Decoder(model)
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=mask).logits
        ours = decoder.head.logits(decoder.hidden(ids, mask))
    assert theirs.std() > 1.5  # a flat distribution would hide a forgotten scale
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
    verify_decoder(model)
    if kind != "plain":
        assert not torch.allclose(theirs, tiny_model(family)(input_ids=ids, attention_mask=mask).logits, atol=1e-2)


@each_family
def test_gradients_equal_the_models_own(family):
    model = tiny_model(family, lora=True)
    ids, mask, _ = random_batch((8, 8), (3, 3))
    weights = torch.randn(2, 8, 97)
    trainable = [p for p in model.parameters() if p.requires_grad]
    decoder = Decoder(model)
    theirs = torch.autograd.grad((model(input_ids=ids, attention_mask=mask).logits * weights).sum(), trainable)
    ours = torch.autograd.grad((decoder.head.logits(decoder.hidden(ids, mask)) * weights).sum(), trainable)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-8


def test_head_shapes_of_the_families():
    """The families whose head is more than a product: without this the test above would not look at one."""
    heads = {family: Decoder(tiny_model(family)).head for family in FAMILIES}
    assert heads["granite"].scale == 1 / 4
    assert heads["cohere"].scale == 1 / 2
    assert heads["gemma2"].softcap == 3.0
    assert heads["phi"].arguments()["bias"] is not None
    assert heads["llama"].arguments() == {
        "weight": heads["llama"].module.weight, "bias": None, "scale": 1.0, "softcap": None
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere", "phi"])
def test_verify_accepts_half_precision(family, dtype):
    verify_decoder(tiny_model(family).to(dtype))


@each_family
def test_verify_accepts_every_family_under_autocast(family):
    """selfaug_loss is called, and verifies, under a Trainer's autocast: rounding is no other family."""
    with torch.autocast("cpu", torch.bfloat16):
        verify_decoder(tiny_model(family, lora=True))


@each_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_hidden_state(family, side):
    assert_padding_changes_nothing(tiny_model(family), side)


def assert_padding_changes_nothing(model, side):
    lengths = (9, 14, 6)
    ids, mask, _ = random_batch(lengths, (3, 3, 3), side=side)
    decoder = Decoder(model)
    # Padding on the right alone needs no mask: causal attention never sees it.
    for right_padded in (False, True)[: 2 if side == "right" else 1]:
        with torch.no_grad():
            padded = decoder.hidden(ids, mask, right_padded=right_padded)
            for row, length in enumerate(lengths):
                alone = ids[row : row + 1, mask[row].bool()]
                expected = decoder.hidden(alone, torch.ones_like(alone))[0]
                assert len(expected) == length
                torch.testing.assert_close(padded[row, mask[row].bool()], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_hidden_state_with_absolute_positions(side):
    """Rotary positions are relative and forgive a shift; learned ones do not: positions must not count padding."""
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    model = GPT2LMHeadModel(config).eval()
    torch.nn.init.normal_(model.transformer.wpe.weight)
    verify_decoder(model)
    assert_padding_changes_nothing(model, side)


def test_a_mask_of_another_type_is_taken():
    model = tiny_model()
    ids, mask, _ = random_batch()
    decoder = Decoder(model)
    with torch.no_grad():
        expected = decoder.hidden(ids, mask)
        for other in (mask.bool(), mask.float(), mask.to(torch.int32)):
            assert torch.equal(decoder.hidden(ids, other), expected)


def test_the_head_is_read_at_call_time():
    model = tiny_model()
    head = Decoder(model).head
    model.to(torch.float64)
    assert head.arguments()["weight"].dtype == torch.float64


def doctor(model, change):
    """`model` whose logits are `change`d behind the back of its config."""
    forward = model.forward

    def doctored(**arguments):
        out = forward(**arguments)
        out.logits = change(out.logits)
        return out

    model.forward = doctored
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z * 1.05,
        lambda z: z + torch.arange(z.shape[-1]) * 0.02,
        lambda z: 20 * torch.tanh(z / 20),
        lambda z: z.roll(1, -1),
        lambda z: z[..., :-1],
    ],
    ids=["scale", "bias", "softcap", "order", "shape"],
)
def test_an_unknown_head_is_refused(change):
    model = doctor(tiny_model("llama"), change)
    with pytest.raises(UserError, match=r"LlamaForCausalLM turns hidden states into logits .*set model\.name"):
        verify_decoder(model)
    with pytest.raises(UserError, match="LlamaForCausalLM turns hidden states into logits"):
        verify_decoder(tiny_lora(doctor(tiny_model("llama"), change)))


@pytest.mark.parametrize(
    ("family", "forgotten"),
    [("gemma2", {"softcap": None}), ("granite", {"scale": 1.0}), ("cohere", {"scale": 1.0})],
    ids=["gemma2", "granite", "cohere"],
)
def test_verify_sees_a_forgotten_softcap_or_scale(monkeypatch, family, forgotten):
    original = Decoder.__init__

    def forgetful(self, model):
        original(self, model)
        self.head = replace(self.head, **forgotten)

    monkeypatch.setattr(Decoder, "__init__", forgetful)
    with pytest.raises(UserError, match="turns hidden states into logits"):
        verify_decoder(tiny_model(family))


def test_verify_leaves_the_models_modes_alone():
    model = tiny_model(lora=True)
    model.get_base_model().model.norm.eval()
    before = {name: module.training for name, module in model.named_modules()}
    verify_decoder(model)
    assert before == {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 2
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["target_modules", "modules_to_save"],
)
def test_an_adapter_on_the_head_is_refused(settings):
    model = tiny_lora(tiny_model("llama"), **settings)
    with pytest.raises(UserError, match=r"adapter sits on the output head.*adapter\.target_modules"):
        Decoder(model)


def test_trainable_tokens_on_a_tied_head_are_refused():
    model = get_peft_model(tiny_model("qwen2"), TrainableTokensConfig(token_indices=[3, 4], task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match="trainable_token_indices"):
        Decoder(model)


def test_not_a_language_model_is_refused():
    with pytest.raises(UserError, match=r"Linear is no causal language model .*model\.name"):
        Decoder(torch.nn.Linear(3, 3))
    with pytest.raises(UserError, match=r"LlamaModel is no causal language model"):
        Decoder(tiny_model("llama").model)
    classifier = get_peft_model(tiny_model("llama").model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="LlamaModel is no causal language model"):
        Decoder(classifier)
