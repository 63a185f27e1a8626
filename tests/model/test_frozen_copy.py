"""The reference from a frozen copy: exactly the base model, whatever trains, and gradients as from the cache."""

import copy

import pytest
import torch

from selfaug.errors import UserError
from selfaug.model.cache import CachedReference
from selfaug.model.decoder import Decoder
from selfaug.model.entries import MemoryEntries
from selfaug.model.frozen_copy import FrozenCopy
from selfaug.model.full import FullFineTuning
from selfaug.model.reference import AdaptersOff
from selfaug.objective import HiddenAlignment, LogitAlignment, Objective, TokenBatch
from tests.tiny import FAMILIES, random_batch, tiny_model


def batch() -> TokenBatch:
    return TokenBatch.from_labels(*random_batch())


def changed(model):
    """As if trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def full(family: str = "llama", **settings):
    return FullFineTuning(freeze="head").apply(tiny_model(family, **settings)).train()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_copy_is_the_base_model_while_the_weights_train(family):
    model, tokens = full(family), batch()
    reference = FrozenCopy(lambda: tiny_model(family))
    reference.check(model)
    expected = AdaptersOff().states(Decoder(tiny_model(family)), tokens, masked=False).hidden
    changed(model)
    found = reference.states(Decoder(model), tokens, masked=False)
    assert torch.equal(found.hidden, expected)
    assert found.scores is None
    assert not torch.allclose(Decoder(model).states(tokens), expected, atol=1e-2)
    assert model.training
    head = {id(p) for p in model.get_output_embeddings().parameters()}
    assert all(p.requires_grad == (id(p) not in head) for p in model.parameters())


@pytest.mark.parametrize("score", ["entropy", "attention"])
def test_scores_are_those_of_the_base_model(score):
    tokens, model = batch(), tiny_model(lora=True)
    expected = AdaptersOff().states(Decoder(model), tokens, masked=False, score=score)
    found = FrozenCopy(tiny_model).states(Decoder(model), tokens, masked=False, score=score)
    assert torch.equal(found.scores, expected.scores)
    assert found.scores.any()


def test_with_adapters_it_gives_the_same_bits_as_switching_them_off():
    gradients = []
    for reference in (None, FrozenCopy(tiny_model)):
        model, tokens = tiny_model(lora=True), batch()
        objective = Objective({"kl": LogitAlignment(0.5)}, reference)
        objective.check(model)
        objective(Decoder(model), tokens, objective.count(tokens)).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_an_adapter_that_rewrites_the_base_weights_is_aligned_with_the_copy():
    model, tokens = tiny_model(lora={"init_lora_weights": "pissa"}, random_b=False), batch()
    reference = FrozenCopy(tiny_model)
    Objective({"kl": LogitAlignment(0.5)}, reference).check(model)
    found = reference.states(Decoder(model), tokens, masked=False).hidden
    assert torch.equal(found, AdaptersOff().states(Decoder(tiny_model()), tokens, masked=False).hidden)
    torch.testing.assert_close(Decoder(model).states(tokens).detach(), found, rtol=1e-3, atol=1e-4)  # before training


@pytest.mark.parametrize("position", ["input_logits", "all_logits"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_copy_and_the_cache_give_the_same_gradients(family, position):
    """Full fine-tuning in float64, a few steps away from the base model: one model in memory, or two."""
    tokens = batch()
    found = []
    for kind in (FrozenCopy, CachedReference):
        model = full(family).double()
        base = copy.deepcopy(model)
        reference = FrozenCopy(lambda base=base: base) if kind is FrozenCopy else CachedReference(MemoryEntries())
        objective = Objective({"kl": LogitAlignment(0.5, position)}, reference)
        objective.check(model)
        if kind is CachedReference:
            reference.fill(Decoder(model), [tokens], progress=False)
        torch.manual_seed(1)
        changed(model)
        losses = objective(Decoder(model), tokens, objective.count(tokens))
        losses.loss.backward()
        assert losses.parts["kl"] > 1e-3
        found.append((losses.loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    (loss, gradients), (other_loss, others) = found
    assert torch.allclose(loss, other_loss, rtol=1e-12, atol=0)
    assert gradients.keys() == others.keys()
    assert len(gradients) == len(list(model.parameters())) - 1
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(others[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_a_head_that_trains_or_another_base_is_refused():
    for family, settings in (("llama", {}), ("qwen2", {}), ("phi", {})):
        model = FullFineTuning(**settings).apply(tiny_model(family))
        for reference in (FrozenCopy(lambda family=family: tiny_model(family)), CachedReference(MemoryEntries())):
            with pytest.raises(UserError, match=r"^The output head trains, .*freeze it \(adapter\.freeze=head"):
                reference.check(model)
    with pytest.raises(UserError, match=r"has another output head .*make it from the same base model"):
        FrozenCopy(lambda: tiny_model(seed=1)).check(full())
    with pytest.raises(UserError, match="another output head"):
        FrozenCopy(lambda: tiny_model(vocab_size=50)).check(full())


def test_states_inside_the_model_need_adapters():
    objective = Objective({"kl": LogitAlignment(0.5)}, FrozenCopy(tiny_model))
    objective.check(full())
    with pytest.raises(UserError, match=r"neither a cache nor a copy keeps"):
        Objective({"kl": HiddenAlignment(0.5, "attention_q")}, FrozenCopy(tiny_model)).check(full())


def test_without_copy_or_cache_the_weights_cannot_train_with_a_term():
    with pytest.raises(UserError, match=r"^The model has no adapters .*reference=frozen_copy or reference\.cache=disk"):
        Objective({"kl": LogitAlignment(0.5)}).check(full())


def test_it_is_loaded_once_and_only_when_needed():
    loaded = []

    def load():
        loaded.append(1)
        return tiny_model()

    reference = FrozenCopy(load)
    Objective({}, reference).check(full())  # without terms nobody needs it
    assert not loaded
    reference.check(full())
    reference.states(Decoder(full()), batch(), masked=False)
    assert len(loaded) == 1
    assert not any(p.requires_grad for p in reference.model.parameters())
    assert reference.bytes_on(torch.device("cpu")) >= sum(p.nbytes for p in tiny_model().parameters())
    assert reference.bytes_on(torch.device("cuda", 0)) > 0
    assert FrozenCopy(load, "cpu").bytes_on(torch.device("cuda", 0)) == 0
    assert FrozenCopy(load, "cuda:1").bytes_on(torch.device("cuda", 0)) == 0


def test_a_wrong_device_is_one_sentence():
    with pytest.raises(UserError, match=r"^reference\.device=gpu7 is no device: set it to null"):
        FrozenCopy(tiny_model, "gpu7")
