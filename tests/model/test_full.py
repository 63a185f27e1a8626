"""Full fine-tuning: which weights a choice names, on every family, and what is refused."""

import pytest
import torch

from selfaug.errors import UserError
from selfaug.model.decoder import Decoder, decoder_layers
from selfaug.model.full import FullFineTuning
from tests.tiny import FAMILIES, tiny_model


def trains(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def names(model) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def layer_of(model, *numbers: int) -> set[str]:
    """Names of the weights of these layers, found by the layers themselves."""
    layers = decoder_layers(Decoder(model).body)
    inside = {id(p) for number in numbers for p in layers[number].parameters()}
    return {name for name, p in model.named_parameters() if id(p) in inside}


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_trains_and_freezing_takes_away(family):
    model = tiny_model(family, layers=4)
    assert FullFineTuning().apply(model) is model
    assert trains(model) == names(model)
    FullFineTuning(freeze=[0, "head"]).apply(model)
    head = {name for name, p in model.named_parameters() if p is model.get_output_embeddings().weight}
    assert layer_of(model, 0)
    assert trains(model) & (layer_of(model, 0) | head) == set()
    assert layer_of(model, 1, 2, 3) <= trains(model)


@pytest.mark.parametrize(
    ("choice", "layers"),
    [
        (2, {2}), ("2", {2}), ("1-2", {1, 2}), ("0-4", {0, 1, 2, 3, 4}), ([0, "3-4"], {0, 3, 4}),
        ("0-50%", {0, 1, 2}), ("50-100%", {3, 4}), ("0-100%", {0, 1, 2, 3, 4}), ("0-20%", {0}), ("20-40%", {1}),
    ],
)  # fmt: skip
def test_layers(choice, layers):
    """Of 5 layers, those that begin before the middle are the lower half."""
    model = tiny_model(layers=5)
    FullFineTuning(train=choice).apply(model)
    assert trains(model) == layer_of(model, *layers)
    FullFineTuning(freeze=choice).apply(model) if len(layers) else None
    assert trains(model) == names(model) - layer_of(model, *layers)


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # with a head of its own, and tied to the embeddings
def test_embeddings_and_head(family):
    model = tiny_model(family)
    FullFineTuning(freeze="head").apply(model)
    missing = names(model) - trains(model)
    assert missing == ({"lm_head.weight"} if family == "llama" else {"model.embed_tokens.weight"})
    FullFineTuning(freeze=["embeddings"]).apply(model)
    assert names(model) - trains(model) == {"model.embed_tokens.weight"}
    FullFineTuning(freeze="lm_head").apply(model)  # also by a name that the tied weight has
    assert names(model) - trains(model) == missing


def test_a_regular_expression():
    model = tiny_model()
    FullFineTuning(train="self_attn", freeze=[1, r"q_proj|o_proj"]).apply(model)
    attention = "model.layers.0.self_attn."
    assert trains(model) == {f"{attention}k_proj.weight", f"{attention}v_proj.weight"}


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"freeze": 7}, (r"adapter\.freeze: no weight of LlamaForCausalLM, which has 2 layers, fits 7", "embeddings")),
        ({"freeze": "0-14"}, (r"which has 2 layers, fits 0-14",)),  # and not quietly the two that there are
        ({"train": "0-150%"}, (r"fits 0-150%",)),
        ({"train": "1-0"}, (r"fits 1-0",)),
        ({"train": "q_porj"}, (r"adapter\.train: no weight", r"fits q_porj", r"model\.layers\.")),
        ({"freeze": "all"}, (r"adapter\.train=all with adapter\.freeze=all leaves nothing", "freeze less")),
        ({"train": None}, (r"adapter\.train=None", "leaves nothing")),
        ({"train": "self_attn["}, ("no regular expression", r"self_attn\[")),
        ({"train": True}, (r"adapter\.train=True is not allowed",)),
        ({"freeze": [1.5]}, (r"adapter\.freeze=\[1\.5\] is not allowed",)),
        ({"freeze": ""}, (r"adapter\.freeze= is not allowed",)),
    ],
)
def test_what_does_not_fit_is_one_sentence(settings, parts):
    with pytest.raises(UserError) as error:
        FullFineTuning(**settings).apply(tiny_model())
    for part in parts:
        error.match(part)
    assert "\n" not in str(error.value)


def test_weights_in_low_precision_do_not_train():
    model = tiny_model()
    model.model.layers[0].to(torch.bfloat16)
    with pytest.raises(UserError, match=r"^adapter=full .*bfloat16.*set model\.dtype=auto and trainer\.precision="):
        FullFineTuning().apply(model)
    FullFineTuning(freeze=0).apply(model)  # frozen, they may be
    assert trains(model) == names(model) - layer_of(model, 0)
