"""Gradient checkpointing: the same loss and gradients from less memory, in training alone."""

import re
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from selfaug.data.collate import collate, pack
from selfaug.errors import UserError
from selfaug.model.decoder import Decoder
from selfaug.model.load import recompute_activations
from selfaug.model.reference import AdaptersOff
from selfaug.objective import LogitAlignment, Objective
from tests.model.packing import ATTENTION, assert_same_outcome, batchings, make_model, make_rows, outcome
from tests.tiny import tiny_model

OBJECTIVE = Objective({"kl": LogitAlignment(0.5)})


def layers_of(model):
    lists = [child for child in Decoder(model).body.children() if isinstance(child, nn.ModuleList)]
    return max(lists, key=len)


@contextmanager
def counted_layers(model):
    """How often a layer has run, forward passes within a backward pass included (these may stop before its end)."""
    runs = []
    inside = [next(module for module in layer.modules() if hasattr(module, "weight")) for layer in layers_of(model)]
    handles = [module.register_forward_pre_hook(lambda *_: runs.append(1)) for module in inside]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


def run(model, batches):
    torch.manual_seed(3)  # of the dropout
    return outcome(model, OBJECTIVE, batches)


@pytest.mark.parametrize(
    ("family", "name", "dropout"), [*((*one, 0.3) for one in ATTENTION), ("llama", "sdpa", 0.0), ("gpt2", "eager", 0.0)]
)
def test_loss_and_gradients_are_the_same_padded_and_packed(family, name, dropout):
    model = make_model(family, name, lora_dropout=dropout)
    padded, packed = [collate(make_rows()[:2], 0), collate(make_rows()[2:], 0)], [pack(make_rows())]
    expected = [run(model, batches) for batches in (padded, packed)]
    recompute_activations(model)
    for batches, before in zip((padded, packed), expected, strict=True):
        with counted_layers(model) as runs:
            found = run(model, batches)
        # Per batch and layer: the tuned pass, the reference, and the tuned pass once more in the backward pass.
        assert len(runs) == len(batches) * len(layers_of(model)) * 3
        assert_same_outcome(found, before)
        if dropout:  # it is drawn, and drawn the same again in the backward pass
            with pytest.raises(AssertionError):
                assert_same_outcome(outcome(model, OBJECTIVE, batches), before, 1e-3)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_packed_and_recomputed_is_one_by_one_and_not(family):
    steps, model = batchings(make_rows()), make_model(family, "sdpa")
    expected = run(model, steps.pop("one by one"))
    recompute_activations(model)
    for batches in steps.values():
        assert_same_outcome(run(model, batches), expected)


def test_nothing_is_recomputed_for_the_reference():
    model = make_model("llama", "sdpa")
    recompute_activations(model)
    used = []
    for layer in layers_of(model):
        function = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = lambda *a, function=function, **k: used.append(1) or function(*a, **k)
    batch = pack(make_rows())
    with counted_layers(model) as runs:
        AdaptersOff().states(Decoder(model), batch, masked=False)
        assert (len(used), len(runs)) == (0, 2)
        Decoder(model).states(batch)
        assert (len(used), len(runs)) == (2, 4)


def test_it_keeps_fewer_activations():
    def kept(model):
        total = 0

        def pack_hook(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
            Decoder(model).states(collate(make_rows((200, 150)), 0))
        return total

    model = make_model("llama", "sdpa")
    before = kept(model)
    recompute_activations(model)
    assert kept(model) < before / 3


def test_embeddings_need_no_gradient_and_no_library_warns():
    """peft would make them need one, as reentrant checkpointing does."""
    model = make_model("llama", "sdpa")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recompute_activations(model)
    assert not Decoder(model).body.get_input_embeddings()(torch.ones(1, 3, dtype=torch.long)).requires_grad


def test_a_model_without_adapters_can_do_it_too():
    model = tiny_model("llama").train()
    recompute_activations(model)
    with counted_layers(model) as runs:
        Decoder(model).states(collate(make_rows(), 0)).sum().backward()
    assert len(runs) == 4


def test_a_family_that_cannot_is_refused(monkeypatch):
    model = make_model("llama")
    monkeypatch.setattr(type(model.get_base_model()), "supports_gradient_checkpointing", False)
    with pytest.raises(UserError) as refused:
        recompute_activations(model)
    assert re.fullmatch(r"LlamaForCausalLM has no [^.]*model\.gradient_checkpointing=false\.", str(refused.value))
