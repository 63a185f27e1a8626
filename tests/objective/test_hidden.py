"""Alignment of hidden states: against outputs collected by plain hooks on two separate models; rows, checkpointing,
sampling, step 0, alpha = 0, memory."""

import copy
import weakref

import pytest
import torch
from torch import nn

from selfaug.data.collate import collate, pack
from selfaug.errors import UserError
from selfaug.model.cache import CachedReference
from selfaug.model.decoder import Decoder
from selfaug.model.entries import MemoryEntries
from selfaug.model.load import recompute_activations
from selfaug.objective import HiddenAlignment, LogitAlignment, Objective, Role
from selfaug.objective.rows import alignment_rows
from tests.model.packing import assert_same_outcome, batchings, make_model, make_rows, outcome
from tests.tiny import tiny_model

# position -> the modules of a layer, by their path in the Llama family
MODULES = {
    "attention_q": ["self_attn.q_proj"],
    "attention_k": ["self_attn.k_proj"],
    "attention_v": ["self_attn.v_proj"],
    "attention_o": ["self_attn.o_proj"],
    "attention_all": [f"self_attn.{name}_proj" for name in "qkvo"],
    "feed_forward": ["mlp"],
    "all_layers": [*(f"self_attn.{name}_proj" for name in "qkvo"), "mlp"],
    "layer_outputs": [""],
}
DISTANCES = ("mse", "cosine")


def hidden(alpha=0.7, **settings):
    return Objective({"hidden": HiddenAlignment(alpha, **settings)})


def collected(model, batch, paths, layers):
    """The outputs of the modules, [B, T, width] each."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    found, handles = [], []
    for i in layers:
        for path in paths:
            module = inner.model.layers[i].get_submodule(path)
            handles.append(module.register_forward_hook(lambda m, a, out: found.append(out)))
    inner.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    for handle in handles:
        handle.remove()
    return found


def expected_penalty(model, base, batch, position, distance, mask, layers=(0, 1)):
    """Mean over rows, features and modules, written out."""
    values = []
    with torch.no_grad():
        references = collected(base, batch, MODULES[position], layers)
    for tuned, reference in zip(collected(model, batch, MODULES[position], layers), references, strict=True):
        if distance == "mse":
            values.append(nn.functional.mse_loss(tuned[mask], reference[mask]))
        else:
            values.append((1 - nn.functional.cosine_similarity(tuned[mask], reference[mask], dim=-1)).mean())
    return torch.stack(values).mean()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("position", MODULES)
def test_equals_the_distance_written_out_in_float64(position, distance):
    model, base = tiny_model(lora=True).double(), tiny_model().double()
    batch = collate(make_rows(), 0)
    term = HiddenAlignment(0.7, position=position, distance=distance)
    mask = alignment_rows(batch.roles, "input_logits")
    expected = expected_penalty(model, base, batch, position, distance, mask)
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    objective = Objective({"hidden": term})
    losses = objective(Decoder(model), batch, objective.count(batch))
    losses.parts["hidden"].backward()
    assert expected.item() > 1e-3
    torch.testing.assert_close(losses.parts["hidden"], expected, rtol=1e-10, atol=1e-12)
    assert losses.loss.item() == pytest.approx((losses.parts["nll"] + 0.7 * losses.parts["hidden"]).item(), rel=1e-12)
    found = {name: g for name, g in gradients(model).items() if g.any()}
    assert found
    for name, gradient in wanted.items():
        torch.testing.assert_close(found.get(name, torch.zeros_like(gradient)), gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("tokens", ["input", "output", "all", "document", "question"])
def test_only_its_own_rows_count(tokens):
    model, base, batch = tiny_model(lora=True), tiny_model(), collate(make_rows(), 0)
    following = batch.roles.roll(-1, 1)
    following[:, -1] = Role.PADDING
    exists = (batch.roles != Role.PADDING) & (following != Role.PADDING)
    mask = (
        exists
        & {
            "input": batch.roles != Role.RESPONSE,
            "output": following == Role.RESPONSE,
            "all": exists,
            "document": batch.roles == Role.DOCUMENT,
            "question": batch.roles == Role.QUESTION,
        }[tokens]
    )
    objective = hidden(position="attention_v", tokens=tokens)
    losses = objective(Decoder(model), batch, objective.count(batch))
    assert objective.count(batch)[1] == mask.sum() > 0
    expected = expected_penalty(model, base, batch, "attention_v", "mse", mask)
    assert losses.parts["hidden"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_chosen_layers():
    model, base, batch = tiny_model(lora=True), tiny_model(), collate(make_rows(), 0)
    mask = alignment_rows(batch.roles, "input_logits")
    values = {}
    for layers, meant in (([0], (0,)), ([1], (1,)), ([-1], (1,)), ([1, -2], (0, 1)), ([1, -1], (1,))):
        objective = hidden(position="attention_all", layers=layers)
        found = objective(Decoder(model), batch, objective.count(batch)).parts["hidden"].item()
        expected = expected_penalty(model, base, batch, "attention_all", "mse", mask, meant)
        assert found == pytest.approx(expected.item(), rel=1e-5)
        values[meant] = found
    assert len({round(value, 9) for value in values.values()}) == 3
    with pytest.raises(UserError, match=r"alignment.layers=\[2\] names layer 2, and the model has 2"):
        hidden(layers=[2]).check(model)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("autocast", [False, True])
def test_zero_at_step_0(distance, autocast):
    """Exactly, and so is the gradient: the first step is plain LoRA's."""
    model, batch = tiny_model(lora=True, random_b=False), collate(make_rows(), 0)
    outcomes = []
    for objective in (Objective(), hidden(100.0, position="all_layers", distance=distance)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = objective(Decoder(model), batch, objective.count(batch))
        losses.loss.backward()
        outcomes.append((losses.parts, gradients(model)))
    assert outcomes[1][0]["hidden"].item() == 0
    assert all(torch.equal(gradient, outcomes[0][1][name]) for name, gradient in outcomes[1][1].items())


def test_alpha_0_measures_and_changes_no_bit():
    model, batch = tiny_model(lora=True), collate(make_rows(), 0)
    outcomes = [outcome(model, objective, [batch]) for objective in (Objective(), hidden(0.0))]
    assert outcomes[1][1][1] > 1e-3
    assert all(torch.equal(gradient, outcomes[0][2][name]) for name, gradient in outcomes[1][2].items())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral", "granite", "cohere", "olmo2"])
def test_batching_changes_nothing(family):
    objective = Objective({"hidden": HiddenAlignment(0.7), "v": HiddenAlignment(0.3, "attention_all", "output"),
                           "kl": LogitAlignment(0.2)})  # fmt: skip
    steps = batchings(make_rows())
    model = make_model(family)
    expected = outcome(model, objective, steps.pop("one by one"))
    assert (expected[1] > 1e-3).all()
    for batches in steps.values():
        assert_same_outcome(outcome(model, objective, batches), expected, 1e-4)


@pytest.mark.parametrize("position", ["all_layers", "layer_outputs"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("packing", [False, True])
def test_gradient_checkpointing_changes_nothing(position, distance, packing):
    rows = make_rows()
    batches = [pack(rows)] if packing else [collate(rows[:2], 0), collate(rows[2:], 0)]
    terms = {"hidden": HiddenAlignment(0.7, position, distance=distance, rows="random", share=0.5)}
    results = []
    for recompute in (False, True):
        model = make_model("llama", "sdpa", lora_dropout=0.2)
        if recompute:
            recompute_activations(model)
        torch.manual_seed(3)
        results.append(outcome(model, Objective(terms), batches, draw=(1, 2)))
    assert_same_outcome(results[1], results[0])


def test_a_measurement_between_the_passes_disturbs_nothing():
    """A probe that runs the model without gradients before the backward pass, with other shapes."""
    model = make_model("llama", "sdpa")
    recompute_activations(model)
    model.train()
    objective, batch = hidden(), collate(make_rows(), 0)
    losses = objective(Decoder(model), batch, objective.count(batch))
    with torch.no_grad():
        Decoder(model).hidden(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.long))
    losses.loss.backward()
    expected = outcome(make_model("llama", "sdpa"), hidden(), [batch])
    assert losses.loss.item() == pytest.approx(expected[0], rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[2][name], rtol=1e-4, atol=1e-7)


def test_sampled_rows_are_right_on_average():
    model, batch = tiny_model(lora=True), collate(make_rows(), 0)
    full = outcome(model, hidden(), [batch])
    sampled = Objective({"hidden": HiddenAlignment(0.7, rows="random", share=0.4)})
    found = [outcome(model, sampled, [batch], draw=(5, step)) for step in range(120)]
    parts = torch.stack([one[1][1] for one in found])
    error = parts.std() / len(parts) ** 0.5
    assert parts.std() > 0
    assert abs(parts.mean() - full[1][1]) < 4 * error


def test_nothing_is_left_behind():
    """After the backward pass no hook is on the model and the reference's rows are gone."""
    model, batch = tiny_model(lora=True), collate(make_rows(), 0)
    objective = hidden()
    losses = objective(Decoder(model), batch, objective.count(batch))
    kept = [weakref.ref(t) for t in objective._inside["hidden"]._kept.values()]
    assert kept
    losses.loss.backward()
    objective.close()
    assert not any(ref() is not None for ref in kept)
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():  # a measurement cleans up by itself
        objective(Decoder(model), batch, objective.count(batch))
    assert not any(module._forward_hooks for module in model.modules())
    copy.deepcopy(model)


def test_keeps_the_chosen_rows_alone():
    """Memory: of the reference one tensor [N, width] for each module; of the tuned pass one more, for its gradient."""
    model, batch = tiny_model(lora=True), collate(make_rows(), 0)
    objective = hidden(position="attention_q", tokens="question")
    rows = int(objective.count(batch)[1])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        objective(Decoder(model), batch, objective.count(batch))
    kept = [tuple(t.shape) for t in objective._inside["hidden"]._kept.values()]
    objective.close()
    plain = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: plain.append(t.shape) or t, lambda t: t):
        Objective()(Decoder(model), batch, Objective().count(batch))
    assert kept == [(rows, 32)] * 2
    for shape in plain:
        saved.remove(shape)
    assert sum(shape == (rows, 32) for shape in saved) == 2  # the two layers' differences
    assert sum(shape.numel() for shape in saved) < 4 * rows * 32


@pytest.mark.parametrize(
    ("family", "position", "fits"),
    [("phi3", "attention_q", False), ("gpt_neox", "attention_all", False), ("phi3", "feed_forward", True),
     ("gpt_neox", "feed_forward", True), ("gpt_neox", "layer_outputs", True), ("phi", "attention_q", True)],
)  # fmt: skip
def test_fused_projections_are_refused(family, position, fits):
    model = tiny_model(family, lora=True)
    if fits:
        batch = collate(make_rows(), 0)
        assert outcome(model, hidden(position=position), [batch])[1][1] > 1e-4
    else:
        with pytest.raises(UserError, match=r"in modules of their own.*set alignment.position=layer_outputs"):
            hidden(position=position).check(model)


def test_what_is_refused():
    with pytest.raises(UserError, match=r"alignment.position=nose is unknown: set it to one of attention_q"):
        HiddenAlignment(position="nose")
    with pytest.raises(UserError, match=r"alignment.distance=l1 is unknown"):
        HiddenAlignment(distance="l1")
    with pytest.raises(UserError, match=r"alignment.layers=\[\] is not allowed"):
        HiddenAlignment(layers=[])
    with pytest.raises(UserError, match=r"alignment.alpha=-1"):
        HiddenAlignment(-1)
    with pytest.raises(UserError, match=r"alignment.share=2"):
        HiddenAlignment(rows="random", share=2)
    cached = Objective({"hidden": HiddenAlignment()}, CachedReference(MemoryEntries()))
    with pytest.raises(UserError, match=r"set reference.cache=off"):
        cached.check(tiny_model(lora=True))
