"""Helpers of the tests on packing: examples of several lengths, batched in every way there is, in every family."""

from dataclasses import replace

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from selfaug.data.collate import collate, pack
from selfaug.model.decoder import Decoder
from selfaug.objective import Objective, Role
from tests.tiny import FAMILIES, VOCAB, randomise, tiny_lora, tiny_model

FAMILIES = (*FAMILIES, "gpt2")  # learned positions, layers that are no nn.Linear
# Gemma 2 caps its attention scores, which transformers does in its eager attention only.
ATTENTION = [
    (family, name) for family in FAMILIES for name in ("eager", "sdpa") if (family, name) != ("gemma2", "sdpa")
]
LENGTHS = (23, 9, 1, 12)  # longer and shorter than the sliding window of 8 that Mistral and Gemma 3 have here


def make_rows(lengths=LENGTHS, seed=0):
    """Rows of the token cache: a template token, two documents, a question and a response, as far as there is room."""
    draw = np.random.default_rng(seed)
    rows = []
    for i, n in enumerate(lengths):
        roles = np.full(n, int(Role.DOCUMENT))
        roles[:1], roles[n // 2 :], roles[n - n // 4 :] = Role.TEMPLATE, Role.QUESTION, Role.RESPONSE
        documents = np.where(roles == Role.DOCUMENT, 1 + np.arange(n) % 2, 0)
        rows.append(
            {
                "id": f"e{i}",
                "input_ids": draw.integers(1, VOCAB, n).tolist(),
                "roles": roles.tolist(),
                "documents": documents.tolist(),
                "length": n,
            }
        )
    return rows


def batchings(rows):
    """The same examples one by one, padded, packed, and some of each."""
    return {
        "one by one": [collate([row], 0) for row in rows],
        "padded": [collate(rows, 0)],
        "masked": [replace(collate(rows, 0), right_padded=False)],
        "packed": [pack(rows)],
        "packed in two": [pack(rows[:3]), pack(rows[3:])],
        "mixed": [pack(rows[1:]), collate(rows[:1], 0)],
    }


def make_model(family, attention="eager", **lora):
    """Tiny, with LoRA on every linear layer of the body, B random."""
    if family != "gpt2":
        model = tiny_model(family)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = GPT2Config(
                vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2,
                attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
            )  # fmt: skip
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            randomise(model)
        lora |= {"fan_in_fan_out": True}
    model.set_attn_implementation(attention)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return tiny_lora(model, **lora)


def outcome(model, objective: Objective, batches, draw=None):
    """Loss and gradients of one optimiser step: (float, parts, {name: gradient})."""
    model.zero_grad()
    totals = torch.stack([objective.count(batch) for batch in batches]).sum(0)
    loss, parts = 0.0, torch.zeros(len(objective.names))
    for batch in batches:
        losses = objective(Decoder(model), batch, totals, draw=draw)
        losses.loss.backward()
        loss += losses.loss.item()
        parts += torch.stack([part.detach() for part in losses.parts.values()])
    return loss, parts, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_outcome(found, expected, tolerance=1e-5):
    """Relative to the loss, and for every gradient to the largest of its parameter."""
    assert abs(found[0] - expected[0]) <= tolerance * abs(expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=tolerance, atol=0)
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        assert gradient.any(), name
        error = (found[2][name] - gradient).norm() / gradient.norm()
        assert error <= tolerance, f"{name}: {error}"
