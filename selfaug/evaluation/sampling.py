"""Sampled continuations, in batches, where every sequence has random numbers of its own.

A token is drawn by inversion: of the nucleus (Holtzman et al. 2019, section 3.1: the fewest most likely tokens whose
probabilities add up to top_p) the first token at which the cumulated probability passes u times that of the nucleus,
for a u in [0, 1) that the caller gives. So what a sequence is given does not depend on its batch, and in float32
neither does what it becomes (in bfloat16 the padding moves roundings).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig

from selfaug.evaluation.generation import grow, ready_to_generate, stop_ids

_FIRST = 128  # the nucleus is looked for among so many tokens before all of them are sorted


class Sampled(NamedTuple):
    """tokens: what was sampled, without the token that ended it. ended: there was one; else the limit was reached."""

    tokens: list[int]
    ended: bool


def sample(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    uniforms: np.ndarray,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    also_stop: Sequence[int] = (),
) -> list[Sampled]:
    """The continuation of each prompt, all in one batch, in their order.

    Args:
        model: a transformers causal language model or a PeftModel around one.
        prompts: token ids, at least one token each.
        uniforms: [prompts, most] numbers in [0, 1): the t-th new token of a sequence is drawn with the t-th of its row.
            `most` is where a continuation is cut.
        temperature: the logits are divided by it; 0 takes the likeliest token.
        top_p: share of the probability that the nucleus has, (0, 1].
        also_stop: tokens that end a continuation beside the tokenizer's and the model's own.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    device = next(model.parameters()).device
    stops = list(dict.fromkeys([*stop_ids(inner, tokenizer), *also_stop]))
    most = uniforms.shape[1]
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), filler, dtype=torch.long)  # [B, T], padded on the left
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    numbers = torch.as_tensor(uniforms, dtype=torch.float64, device=device)

    def choose(rows: list[int], new: int, logits: Tensor) -> Tensor:
        return draw(logits.float(), numbers[rows, new], temperature, top_p)

    def ended(tokens: list[int]) -> bool:
        return any(token in stops for token in tokens)

    settings = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=most, pad_token_id=filler, eos_token_id=stops or None,
        use_cache=True,
    )  # fmt: skip
    found: list[Sampled] = [Sampled([], False)] * len(prompts)
    with ready_to_generate(model, settings):
        for row, tokens in grow(model, settings, ids.to(device), mask.to(device), most, ended, choose):
            end = next((place for place, token in enumerate(tokens) if token in stops), None)
            found[row] = Sampled(tokens[:end], end is not None)
    return found


def draw(logits: Tensor, u: Tensor, temperature: float, top_p: float) -> Tensor:
    """[B] tokens from logits [B, V] and numbers u [B] in [0, 1)."""
    if temperature == 0:
        return logits.argmax(-1)
    likely = (logits / temperature).softmax(-1)
    if top_p >= 1:
        return _invert(likely, u)
    probabilities, tokens = likely.topk(min(_FIRST, likely.shape[1]))
    chosen = torch.empty_like(tokens[:, 0])
    enough = probabilities.double().sum(-1) >= top_p  # the others are sorted whole
    for rows, (some, names) in (
        (enough, (probabilities[enough], tokens[enough])),
        (~enough, likely[~enough].sort(descending=True)),
    ):
        if rows.any():
            before = some.double().cumsum(-1) - some  # what the more likely tokens have together
            nucleus = some.masked_fill(before >= top_p, 0)
            chosen[rows] = names.gather(1, _invert(nucleus, u[rows])[:, None])[:, 0]
    return chosen


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """[B]: the first place at which the sum of weights [B, n] passes u [B] times their whole sum."""
    sums = weights.double().cumsum(-1)
    places = torch.searchsorted(sums, (u * sums[:, -1])[:, None], right=True)[:, 0]
    # Rounding may put u * sum at the very end, behind the last weight that is not 0.
    last = (sums < sums[:, -1:]).sum(-1)
    return torch.minimum(places, last)
