"""adapters_off is the base model, exactly, and leaves no trace; check_reference refuses what is not (invariant 2)."""

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
    inject_adapter_in_model,
)

from selfaug.errors import UserError
from selfaug.model.decoder import Decoder
from selfaug.model.reference import adapters_off, check_reference
from tests.tiny import FAMILIES, lora_config, random_batch, randomise_b, tiny_model

each_family = pytest.mark.parametrize("family", FAMILIES)
each_precision = pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])


def state(model: torch.nn.Module) -> dict:
    """Everything about a model that adapters_off touches and must give back."""
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "disabled": {n: m.disable_adapters for n, m in model.named_modules() if hasattr(m, "disable_adapters")},
        "active": {n: m.active_adapters for n, m in model.named_modules() if hasattr(m, "active_adapters")},
        "values": {name: p.detach().clone() for name, p in model.named_parameters()},
        "grad": torch.is_grad_enabled(),
    }


def assert_same_state(one: dict, other: dict) -> None:
    for key in ("training", "requires_grad", "disabled", "active", "grad"):
        assert one[key] == other[key], key
    assert all(torch.equal(one["values"][name], value) for name, value in other["values"].items())


def outputs(model, ids, mask):
    """Hidden states and logits, as the objective takes them."""
    decoder = Decoder(model)
    hidden = decoder.hidden(ids, mask)
    return hidden, decoder.head.logits(hidden)


def assert_reference_is_base(model, base, autocast=False) -> None:
    """adapters_off(model) == base bit for bit, while model itself is different, and is left as it was."""
    ids, mask, _ = random_batch((9, 14, 6), (3, 3, 3))
    before = state(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            expected = outputs(base.eval(), ids, mask)
            tuned = outputs(model, ids, mask)
        with adapters_off(model):
            found = outputs(model, ids, mask)
            logits = model(input_ids=ids, attention_mask=mask).logits
        with torch.no_grad():
            assert torch.equal(logits, base(input_ids=ids, attention_mask=mask).logits)
    for one, other, different in zip(found, expected, tuned, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
        assert not torch.allclose(different.float(), other.float(), atol=1e-2)
    assert_same_state(state(model), before)


@each_family
@each_precision
def test_reference_is_the_base_model(family, autocast):
    """In train mode, with dropout in the adapters and in the model: a reference with dropout is another model."""
    settings = {"attention_dropout": 0.1}
    model = tiny_model(family, lora={"lora_dropout": 0.1}, **settings)
    check_reference(model)
    assert_reference_is_base(model, tiny_model(family, **settings), autocast)


@each_family
def test_reference_is_the_base_model_with_injected_adapters(family):
    config = lora_config(lora_dropout=0.1, exclude_modules=["lm_head", "embed_out"])
    model = inject_adapter_in_model(config, tiny_model(family)).train()
    randomise_b(model)
    check_reference(model)
    assert_reference_is_base(model, tiny_model(family))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": False},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4, 5]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ],
    ids=lambda settings: "-".join(f"{k}={v}" for k, v in settings.items()),
)
def test_other_adapters_that_keep_the_base_model(settings):
    model = tiny_model("llama", lora=settings)
    with torch.no_grad():  # as if trained
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    check_reference(model)
    assert_reference_is_base(model, tiny_model("llama"))


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
        TrainableTokensConfig(token_indices=list(range(3, 90)), task_type="CAUSAL_LM"),
    ],
    ids=["ia3", "trainable_tokens"],
)
def test_other_peft_methods_that_keep_the_base_model(config):
    model = get_peft_model(tiny_model("llama"), config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    check_reference(model)
    assert_reference_is_base(model, tiny_model("llama"))


def two_adapters():
    """A trained adapter and a second one that is loaded but frozen, and some parameters frozen by hand."""
    model = tiny_model("llama", lora=True)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    randomise_b(model)
    for name, parameter in model.named_parameters():
        if ".second." in name or "layers.0.self_attn.k_proj" in name:
            parameter.requires_grad_(False)
    return model.train()


def test_a_second_frozen_adapter_stays_frozen():
    model = two_adapters()
    for active in (["default"], ["default", "second"]):
        model.base_model.set_adapter(active)
        for name, parameter in model.named_parameters():
            if ".second." in name or "layers.0.self_attn.k_proj" in name:
                parameter.requires_grad_(False)
        assert sum(p.requires_grad for p in model.parameters()) == 26
        assert_reference_is_base(model, tiny_model("llama"))


def test_an_exception_inside_leaves_everything_as_it_was():
    model = two_adapters()
    model.get_base_model().model.layers[0].eval()
    before = state(model)

    def fails():
        with adapters_off(model):
            assert not model.training
            assert not torch.is_grad_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert_same_state(state(model), before)


def test_inside_another_disabled_context_and_twice():
    model = tiny_model("llama", lora=True)
    before = state(model)
    ids, mask, _ = random_batch()
    expected = outputs(tiny_model("llama"), ids, mask)[1]
    with adapters_off(model):
        with adapters_off(model):
            assert torch.equal(outputs(model, ids, mask)[1], expected)
        assert torch.equal(outputs(model, ids, mask)[1], expected)  # still off: the inner one does not switch on
    assert_same_state(state(model), before)
    with model.disable_adapter():
        with adapters_off(model):
            pass
        assert torch.equal(outputs(model, ids, mask)[1], expected)


def test_inside_nothing_records_a_graph():
    model = tiny_model("llama", lora=True)
    ids, mask, _ = random_batch()
    with adapters_off(model):
        assert not outputs(model, ids, mask)[0].requires_grad
    assert outputs(model, ids, mask)[0].requires_grad


def test_training_goes_on_after_the_reference():
    """The gradients of a step are the same with and without a reference pass in between."""
    gradients = []
    for with_reference in (False, True):
        model = tiny_model("llama", lora=True)
        ids, mask, _ = random_batch()
        logits = model(input_ids=ids, attention_mask=mask).logits
        if with_reference:
            with adapters_off(model):
                outputs(model, ids, mask)
        logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) == 28
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


# What check_reference refuses: name -> (a model, what the sentence must say)
def _unfrozen(pattern: str, family: str = "llama"):
    model = tiny_model(family, lora=True)
    for name, parameter in model.named_parameters():
        if pattern in name:
            parameter.requires_grad_(True)
    return model


def _merged():
    model = tiny_model("llama", lora=True)
    model.merge_adapter()
    return model


def _prompt(kind):
    return get_peft_model(tiny_model("llama"), kind(num_virtual_tokens=3, task_type="CAUSAL_LM"))


OUTSIDE = (
    r"^These weights train outside the adapters, .*{}.*freeze them \(adapter\.bias=none, requires_grad_\(False\)\)\.$"
)
REFUSED = {
    "bias=all": (lambda: tiny_model("qwen2", lora={"bias": "all"}), OUTSIDE.format("bias and 3 more")),
    "bias=lora_only": (lambda: tiny_model("qwen2", lora={"bias": "lora_only"}), OUTSIDE.format("q_proj.base_layer.b")),
    "norm": (lambda: _unfrozen("model.norm.weight"), OUTSIDE.format(r"model\.norm\.weight;")),
    "embeddings": (lambda: _unfrozen("embed_tokens"), OUTSIDE.format(r"embed_tokens\.weight;")),
    "head": (lambda: _unfrozen("lm_head"), OUTSIDE.format(r"lm_head\.weight;")),
    "tied head": (lambda: _unfrozen("embed_tokens", "qwen2"), OUTSIDE.format(r"embed_tokens\.weight;")),
    "base weight": (lambda: _unfrozen("q_proj.base_layer.weight"), OUTSIDE.format(r"q_proj\.base_layer\.weight")),
    "everything": (lambda: _unfrozen(""), OUTSIDE.format("and 18 more")),
    "head in modules_to_save": (
        lambda: tiny_model("llama", lora={"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        "^An adapter sits on the output head",
    ),
    "tied embeddings in modules_to_save": (
        lambda: tiny_model("qwen2", lora={"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"],
                                          "ensure_weight_tying": True}),
        "^An adapter sits on the output head",
    ),
    **{
        init: (
            lambda init=init: tiny_model("llama", lora={"init_lora_weights": init}),
            rf"^adapter\.init_lora_weights={init} rewrites the base weights, .*init_lora_weights=true, gaussian",
        )
        for init in ("pissa", "pissa_niter_2", "olora")
    },
    "injected pissa": (
        lambda: inject_adapter_in_model(
            LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"), tiny_model("llama")
        ),
        r"^adapter\.init_lora_weights=pissa rewrites the base weights",
    ),
    "second adapter pissa": (
        lambda: _with_second_adapter(init_lora_weights="pissa"),
        r"^adapter\.init_lora_weights=pissa rewrites the base weights",
    ),
    "prompt tuning": (lambda: _prompt(PromptTuningConfig), "^PROMPT_TUNING changes the prompt .*set adapter=lora"),
    "prefix tuning": (lambda: _prompt(PrefixTuningConfig), "^PREFIX_TUNING changes the prompt .*set adapter=lora"),
    "tied embeddings": (
        lambda: tiny_model("qwen2", lora={"target_modules": ["q_proj", "embed_tokens"]}),
        r"^An adapter sits on the embeddings, which are tied .*\(embed_tokens\) out of adapter\.target_modules",
    ),
    "adalora": (
        lambda: get_peft_model(tiny_model("llama"), AdaLoraConfig(init_r=4, target_r=2, total_step=9,
                               target_modules=["q_proj"], task_type="CAUSAL_LM")),
        "^AdaLoRA moves its ranks .*set adapter=lora",
    ),
    "alora": (
        lambda: tiny_model("llama", lora={"alora_invocation_tokens": [5, 6]}), "^aLoRA .*set adapter=lora"
    ),
    "merged": (_merged, r"^The adapters are merged into the base weights: call unmerge_adapter\(\)"),
    "no adapters": (lambda: tiny_model("llama"), "^The model has no adapters .*set adapter=lora"),
    "no adapters, all frozen": (lambda: tiny_model("llama").requires_grad_(False), "^The model has no adapters"),
}  # fmt: skip


def _with_second_adapter(**settings):
    model = tiny_model("llama", lora=True)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings))
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_check_refuses_and_says_what_to_change(name):
    build, message = REFUSED[name]
    model = build()
    with pytest.raises(UserError, match=message) as error:
        check_reference(model)
    assert "\n" not in str(error.value)


@each_family
def test_check_accepts_lora_on_every_family(family):
    check_reference(tiny_model(family, lora=True))


def test_check_accepts_again_after_unmerging():
    model = _merged()
    model.unmerge_adapter()
    check_reference(model)
